"""Clips of the shapes world whose truth is known exactly, for `vbench_shapes.py`: one series for each truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from vbench_shapes_models import ACTIONS, FRAME, action_of

from mmalign.shapes.axes import axes
from mmalign.shapes.captions import BACKGROUNDS, KINDS
from mmalign.shapes.clip_data import drawn_clips
from mmalign.shapes.clip_reader import read_clip
from mmalign.shapes.damage import Film, damage, film
from mmalign.shapes.scene import SIDE

FPS = 8.0
KIND_WORDS = dict(zip(KINDS, ("sports ball", "tv", "kite", "scissors"), strict=True))  # COCO's, so that rules know them


@dataclass(frozen=True)
class Clip:
    """One clip: pixels uint8 [T, H, W, 3], the truth that was made, the prompt, what a suite tells, the input image."""

    series: str
    pixels: np.ndarray
    truth: float
    prompt: str
    aux: dict[str, Any]
    reference: np.ndarray | None = None


def _amounts(count: int, rng: np.random.Generator) -> np.ndarray:
    """From 0 to 1, evenly, in any order."""
    return rng.permutation(np.linspace(0, 1, count))


def faults(kind: str) -> Callable[[int, int], Iterator[Clip]]:
    """Clips with one fault of `mmalign.shapes.damage`; those of flicker stand still."""

    def make(count: int, seed: int) -> Iterator[Clip]:
        rng = np.random.default_rng(seed)
        drawn = (each for each in drawn_clips(8 * count, seed, held_out=True, side=FRAME))
        still = kind == "flicker"
        chosen = [each for each in drawn if all((m.direction is None) == still for m in each.caption.movers)][:count]
        for item, amount in zip(chosen, _amounts(len(chosen), rng), strict=True):
            spoilt = damage(film(item.scene, side=FRAME), kind, float(amount), rng)
            yield Clip(kind, spoilt.draw(), float(amount), str(item.caption), {})

    return make


def backgrounds(count: int, seed: int) -> Iterator[Clip]:
    """The ground turns from one grey to another for the last 0 to 4 frames; the truth is their share."""
    rng = np.random.default_rng(seed)
    for number, item in enumerate(drawn_clips(count, seed, held_out=True, side=FRAME)):
        scenes, turned = film(item.scene, side=FRAME).scenes, number % 5
        other = str(rng.choice([name for name in BACKGROUNDS if name != scenes[0].background]))
        changed = [replace(each, background=other) for each in scenes[len(scenes) - turned :]]
        spoilt = Film((*scenes[: len(scenes) - turned], *changed), FRAME)
        yield Clip("background", spoilt.draw(), turned / len(scenes), str(item.caption), {})


def speeds(count: int, seed: int) -> Iterator[Clip]:
    """One shape that stands or moves: pixels from frame to frame."""
    for item in drawn_clips(count, seed, held_out=True, counts=(1.0, 0.0), side=FRAME):
        first, second = item.scene.at(0.0).shapes[0], item.scene.at(1 / FPS).shapes[0]
        step = np.hypot(second.x - first.x, second.y - first.y) * FRAME / SIDE
        yield Clip("speed", item.clip(), float(step), str(item.caption), {})


def captions(count: int, seed: int) -> Iterator[Clip]:
    """A third shows the caption, a third breaks one thing of it, a third shows another caption: text alignment (TA)."""
    rng = np.random.default_rng(seed)
    items = drawn_clips(count, seed, held_out=True, side=FRAME)
    for number, item in enumerate(items):
        shown, said = item, str(item.caption)
        if number % 3 == 1:
            shown = replace(item, wrong=str(rng.choice(["kind", "colour", "direction", "count"])))
        elif number % 3 == 2:
            said = str(items[(number + 1) % len(items)].caption)
        pixels, caption = shown.clip(), items[(number + 1) % len(items)].caption if number % 3 == 2 else item.caption
        small = replace(shown, side=64).clip()
        style = str(rng.choice([f"on a {name} background" for name in BACKGROUNDS]))
        truth = axes(caption, read_clip(small, FPS))["TA"]
        yield Clip("caption", pixels, truth, said, {"appearance_style": style})


def styles(count: int, seed: int) -> Iterator[Clip]:
    """A named background that is there (1) or not (0)."""
    rng = np.random.default_rng(seed)
    for number, item in enumerate(drawn_clips(count, seed, held_out=True, side=FRAME)):
        there = item.scene.background
        named = there if number % 2 else str(rng.choice([name for name in BACKGROUNDS if name != there]))
        item_ = item.caption.movers[0].item
        phrase = f"a {item_.colour} {item_.kind} on a {named} background"
        yield Clip("style", item.clip(), float(named == there), str(item.caption), {"appearance_style": phrase})


def actions(count: int, seed: int) -> Iterator[Clip]:
    """An action that is shown (1) or another one (0)."""
    rng = np.random.default_rng(seed)
    for number, item in enumerate(drawn_clips(count, seed, held_out=True, counts=(1.0, 0.0), side=FRAME)):
        shown = action_of(item)
        named = shown if number % 2 else str(rng.choice([each for each in ACTIONS if each != shown]))
        yield Clip("action", item.clip(), float(named == shown), f"A person is {named}", {})


def inputs(count: int, seed: int) -> Iterator[Clip]:
    """The input image is the clip's first frame (1), or that of a clip of another caption (0)."""
    items = drawn_clips(count, seed, held_out=True, side=FRAME)
    for number, item in enumerate(items):
        other = item if number % 2 else items[(number + 1) % len(items)]
        yield Clip("input", item.clip(), float(other is item), str(item.caption), {}, other.clip()[0])


def objects(count: int, seed: int) -> Iterator[Clip]:
    """Two shapes and what is asked of them, right or wrong: kinds, colour, relation. The truth is of the pixels."""
    rng = np.random.default_rng(seed)
    drawn = drawn_clips(4 * count, seed, held_out=True, counts=(0.0, 1.0), side=FRAME)
    chosen = [each for each in drawn if len({m.item.kind for m in each.caption.movers}) == 2][:count]
    for number, item in enumerate(chosen):
        pixels, (a, b) = item.clip(), item.caption.movers
        kinds = [KIND_WORDS[a.item.kind], KIND_WORDS[b.item.kind]]
        absent = [KIND_WORDS[kind] for kind in KINDS if KIND_WORDS[kind] not in kinds]
        one = kinds[0] if number % 2 else absent[0]
        yield Clip("object", pixels, float(number % 2), "", {"object": one})
        yield Clip("objects", pixels, float(number % 2), "", {"object": f"{kinds[1]} and {one}"})
        colour = (
            a.item.colour
            if number % 2
            else str(rng.choice([c for c in ("red", "green", "blue") if c != a.item.colour]))
        )
        yield Clip("colour", pixels, float(number % 2), f"a {colour} {kinds[0]}", {"color": colour})
        scenes = film(item.scene, side=FRAME).scenes
        left = np.array([s.shapes[0].x < s.shapes[1].x and _across(s.shapes) for s in scenes])
        right = np.array([s.shapes[0].x > s.shapes[1].x and _across(s.shapes) for s in scenes])
        aux = {"object_a": kinds[0], "object_b": kinds[1]}
        asked, truth = (("left", left), ("right", right))[number % 2]
        yield Clip("relation", pixels, float(truth.mean()), "", {**aux, "relationship": f"on the {asked} of"})
        named = item.scene.background if number % 2 else str(
            rng.choice([name for name in BACKGROUNDS if name != item.scene.background])
        )  # fmt: skip
        yield Clip("scene", pixels, float(number % 2), "", {"scene": f"{named} background"})


def _across(shapes: Any) -> bool:
    return abs(shapes[0].x - shapes[1].x) > abs(shapes[0].y - shapes[1].y)


SERIES: dict[str, Callable[[int, int], Iterator[Clip]]] = {
    **{kind: faults(kind) for kind in ("flicker", "swap", "vanish", "jitter", "repeat", "lurch", "noise", "blur")},
    "background": backgrounds,
    "speed": speeds,
    "caption": captions,
    "style": styles,
    "action": actions,
    "input": inputs,
    "objects": objects,
}
