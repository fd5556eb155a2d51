"""Scenes of the shapes world as training data: captioned pictures, and pairs that an annotator judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from mmalign.shapes.annotators import ANNOTATORS
from mmalign.shapes.captions import COLOURS, COUNT_WEIGHTS, KINDS, Caption, captions
from mmalign.shapes.scene import SIDE, Scene, render, sample_scene


@dataclass(frozen=True)
class Drawing:
    """A picture drawn when it is needed. `damage` in [0, 1] blurs and speckles it; `wrong` changes what is drawn."""

    caption: Caption
    seed: tuple[int, ...]
    damage: float = 0.0
    wrong: bool = False

    @property
    def name(self) -> str:
        return f"shapes {self.seed}: {self.caption}"

    @cached_property
    def scene(self) -> Scene:
        rng = np.random.default_rng(self.seed)
        scene = sample_scene(self.caption, rng)
        return _spoil(scene, rng) if self.wrong else scene

    def hash(self) -> str:
        """What identifies the picture, for caches."""
        return f"shapes-1:{self.seed}:{self.caption}:{self.damage}:{self.wrong}"

    def image(self) -> np.ndarray:
        """uint8 RGB [64, 64, 3]."""
        picture = render(self.scene)
        if not self.damage:
            return picture
        rng = np.random.default_rng([*self.seed, 1])
        blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(2.5 * self.damage * rng.random()))
        noise = rng.normal(0, 40 * self.damage, (SIDE, SIDE, 3)) * rng.random()
        return np.clip(np.asarray(blurred) + noise, 0, 255).astype(np.uint8)


def _spoil(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one shape dropped, or of another kind or colour."""
    shapes = list(scene.shapes)
    index = int(rng.integers(len(shapes)))
    how = rng.choice(["kind", "colour", "drop"], p=[0.45, 0.45, 0.1])
    if how == "drop":
        del shapes[index]
    else:
        choices = [word for word in (KINDS if how == "kind" else COLOURS) if word != getattr(shapes[index], str(how))]
        changed: dict[str, Any] = {str(how): str(rng.choice(choices))}
        shapes[index] = replace(shapes[index], **changed)
    return Scene(tuple(shapes), scene.background)


def drawings(
    count: int, seed: int, *, held_out: bool = False, counts: tuple[float, ...] = COUNT_WEIGHTS
) -> list[Drawing]:
    """`count` captioned scenes that match their captions; `counts` as in `captions`."""
    wanted = captions(count, seed, held_out=held_out, counts=counts)
    return [Drawing(caption, (seed, i)) for i, caption in enumerate(wanted)]


@dataclass(frozen=True)
class JudgedPair:
    """Two drawings for one caption; `label` is 1 when `winner` was preferred and 0.5 for a tie."""

    prompt: str
    winner: Drawing
    loser: Drawing
    label: float
    weight: float = 1.0
    origin: str = "shapes"


def judged_pairs(count: int, seed: int, annotator: str, *, held_out: bool = False) -> list[JudgedPair]:
    """Pairs in which either picture may be wrong or damaged, judged by a simulated annotator; ties are kept.

    Raises:
        ValueError: no annotator has that name.
    """
    if annotator not in ANNOTATORS:
        raise ValueError(f"no annotator is called {annotator!r}; there are: {', '.join(ANNOTATORS)}")
    judge = ANNOTATORS[annotator]
    pairs = []
    for i, caption in enumerate(captions(count, seed, held_out=held_out)):
        rng = np.random.default_rng([seed, i, 2])
        a, b = (
            Drawing(caption, (seed, i, side), float(rng.random() * (rng.random() < 0.6)), bool(rng.random() < 0.4))
            for side in (3, 4)
        )
        verdict = judge.judge(rng, judge.utility(caption, a.image()), judge.utility(caption, b.image()))
        winner, loser = (b, a) if verdict == "B" else (a, b)
        pairs.append(
            JudgedPair(str(caption), winner, loser, 0.5 if verdict == "same" else 1.0, 1.0, f"shapes {seed}/{i}")
        )
    return pairs
