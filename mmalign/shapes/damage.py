"""Clips of the shapes world with a known fault: of the pictures, of the motion, or against the caption.

`damage` spoils a film in one way and to a known amount, `mistaken` changes one thing in a caption, so that a clip drawn
from it is wrong in that. `PICTURE`, `MOTION` and `TEXT` say which of the axes of `mmalign.shapes.axes` should suffer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter

from mmalign.shapes.captions import BACKGROUNDS, COLOURS, KINDS, SIZES, Item
from mmalign.shapes.clip import FPS, FRAMES, MARGIN, PIXELS, MovingScene
from mmalign.shapes.motion import DIRECTIONS, SPEEDS, MotionCaption, Mover
from mmalign.shapes.scene import SIDE, Scene, Shape, render

PICTURE = ("noise", "blur", "specks", "flicker")
MOTION = ("jitter", "repeat", "lurch", "swap", "vanish", "pulse")
TEXT = ("kind", "colour", "size", "direction", "speed", "background", "count")
LEAST_RADIUS = 7.5  # below 7 the reader takes a shape for a speck


@dataclass(frozen=True)
class Film:
    """A clip before it is drawn: the scene of each frame, and what is then done to the pictures."""

    scenes: tuple[Scene, ...]
    side: int = PIXELS
    spoilt: tuple[tuple[str, float, int], ...] = ()  # kind, amount, seed

    def draw(self) -> np.ndarray:
        """uint8 RGB [T, side, side, 3]."""
        clip = np.stack([render(scene, self.side) for scene in self.scenes])
        for kind, amount, seed in self.spoilt:
            clip = spoil(clip, kind, amount, np.random.default_rng(seed))
        return clip


def film(scene: MovingScene, frames: int = FRAMES, fps: float = FPS, side: int = PIXELS) -> Film:
    """The undamaged clip of a moving scene; drawn, it is `clip.render_clip`."""
    return Film(tuple(scene.at(k / fps) for k in range(frames)), side)


def damage(clip: Film, kind: str, amount: float, rng: np.random.Generator) -> Film:
    """The film with one fault more, one of PICTURE or MOTION; `amount` in [0, 1], 0 changes nothing.

    Of the pictures, see `spoil`. Of the motion, in units of the 64x64 frame:
    ``jitter``: each shape in each frame is moved by a normal step of deviation 3 * amount, and kept in the frame.
    ``repeat``: round(0.6 * amount * (T - 1)) of the frames after the first show the scene of the frame before.
    ``lurch``: time runs unevenly, as t ** (1 + 1.5 * amount) from the first frame (0) to the last (1).
    ``swap``: one shape has another kind or another colour, as chance has it, in the last round(amount * (T - 1) / 2)
    frames.
    ``vanish``: one shape is missing in round(amount * (T - 1) / 2) frames, anywhere.
    ``pulse``: each radius in each frame is multiplied by 1 - 0.4 * amount * u, u uniform in [0, 1], if that is not
    below 7.5, else it is 7.5.
    A clip without a shape has no motion to spoil; ``repeat`` and ``lurch`` change nothing where nothing
    moves.

    Raises:
        ValueError: an unknown kind, or an amount outside of [0, 1].
    """
    _check(kind, amount, PICTURE + MOTION)
    if kind in PICTURE:
        return replace(clip, spoilt=(*clip.spoilt, (kind, amount, int(rng.integers(2**32)))))
    if not amount or not all(scene.shapes for scene in clip.scenes):
        return clip
    return replace(clip, scenes=tuple(_MOTION[kind](clip.scenes, amount, rng)))


def spoil(clip: np.ndarray, kind: str, amount: float, rng: np.random.Generator) -> np.ndarray:
    """Any clip with spoilt pictures: uint8 RGB [T, H, W, 3] -> the same; `kind` of PICTURE, `amount` in [0, 1].

    ``noise``: normal, of deviation 25 * amount in each value. ``blur``: Gaussian, of radius 2.5 * amount pixels in
    frames of 64x64 and in proportion in others. ``specks``: round(8 * amount) squares of one thirty-second of the side,
    each of any colour, anywhere in each frame. ``flicker``: each frame is darkened by a factor 1 - 0.4 * amount * u,
    u uniform in [0, 1].

    Raises:
        ValueError: an unknown kind, or an amount outside of [0, 1].
    """
    _check(kind, amount, PICTURE)
    frames, height, width = clip.shape[:3]
    if kind == "noise":
        values = clip + rng.normal(0, 25 * amount, clip.shape)
    elif kind == "flicker":
        values = clip * (1 - 0.4 * amount * rng.random((frames, 1, 1, 1)))
    elif kind == "blur":
        soft = ImageFilter.GaussianBlur(2.5 * amount * min(height, width) / SIDE)
        values = np.stack([np.asarray(Image.fromarray(frame).filter(soft)) for frame in clip])
    else:
        values, edge = clip.copy(), max(1, min(height, width) // 32)
        for frame in values:
            for _ in range(round(8 * amount)):
                y, x = rng.integers(height - edge + 1), rng.integers(width - edge + 1)
                frame[y : y + edge, x : x + edge] = rng.integers(256, size=3)
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _check(kind: str, amount: float, kinds: Sequence[str]) -> None:
    if kind not in kinds:
        raise ValueError(f"there is no damage called {kind!r}; there are: {', '.join(kinds)}")
    if not 0 <= amount <= 1:
        raise ValueError(f"the amount of {kind} has to lie in [0, 1], and is {amount}")


Scenes = Sequence[Scene]


def _each(scene: Scene, change: Callable[[Shape], Shape]) -> Scene:
    return replace(scene, shapes=tuple(map(change, scene.shapes)))


def _jitter(scenes: Scenes, amount: float, rng: np.random.Generator) -> list[Scene]:
    def moved(shape: Shape) -> Shape:
        edge = shape.radius + MARGIN
        x, y = np.clip(rng.normal((shape.x, shape.y), 3 * amount), edge, SIDE - edge)
        return replace(shape, x=float(x), y=float(y))

    return [_each(scene, moved) for scene in scenes]


def _repeat(scenes: Scenes, amount: float, rng: np.random.Generator) -> list[Scene]:
    later = np.arange(1, len(scenes))
    again = set(rng.choice(later, round(0.6 * amount * len(later)), replace=False).tolist())
    shown: list[int] = []
    for k in range(len(scenes)):
        shown.append(shown[-1] if k in again else k)
    return [scenes[k] for k in shown]


def _lurch(scenes: Scenes, amount: float, rng: np.random.Generator) -> list[Scene]:
    """Places between frames are interpolated, which a straight uniform motion allows."""
    last = len(scenes) - 1
    warped = last * (np.arange(len(scenes)) / max(last, 1)) ** (1 + 1.5 * amount)
    found = []
    for time in warped:
        before = min(int(time), max(last - 1, 0))
        share, one, other = time - before, scenes[before], scenes[min(before + 1, last)]
        shapes = [
            replace(a, x=float(a.x + share * (b.x - a.x)), y=float(a.y + share * (b.y - a.y)))
            for a, b in zip(one.shapes, other.shapes, strict=True)
        ]
        found.append(replace(one, shapes=tuple(shapes)))
    return found


def _swap(scenes: Scenes, amount: float, rng: np.random.Generator) -> list[Scene]:
    which, first = int(rng.integers(len(scenes[0].shapes))), len(scenes) - round(amount * (len(scenes) - 1) / 2)
    old = scenes[0].shapes[which]
    part, words = ("kind", KINDS) if rng.random() < 0.5 else ("colour", COLOURS)
    word = str(rng.choice([word for word in words if word != getattr(old, part)]))
    return [
        scene if k < first else _with(scene, which, replace(scene.shapes[which], **{part: word}))  # type: ignore[arg-type]
        for k, scene in enumerate(scenes)
    ]


def _vanish(scenes: Scenes, amount: float, rng: np.random.Generator) -> list[Scene]:
    which = int(rng.integers(len(scenes[0].shapes)))
    gone = set(rng.choice(len(scenes), round(amount * (len(scenes) - 1) / 2), replace=False).tolist())
    return [_with(scene, which) if k in gone else scene for k, scene in enumerate(scenes)]


def _pulse(scenes: Scenes, amount: float, rng: np.random.Generator) -> list[Scene]:
    def pulsed(shape: Shape) -> Shape:
        return replace(shape, radius=max(LEAST_RADIUS, float(shape.radius * (1 - 0.4 * amount * rng.random()))))

    return [_each(scene, pulsed) for scene in scenes]


def _with(scene: Scene, which: int, *instead: Shape) -> Scene:
    return replace(scene, shapes=(*scene.shapes[:which], *instead, *scene.shapes[which + 1 :]))


_MOTION = {
    "jitter": _jitter, "repeat": _repeat, "lurch": _lurch, "swap": _swap, "vanish": _vanish, "pulse": _pulse,
}  # fmt: skip


def mistaken(caption: MotionCaption, part: str, rng: np.random.Generator) -> MotionCaption:
    """A caption that differs from this one in one thing, one of TEXT: a clip drawn from it breaks this one in that.

    ``count`` is one shape more or less. Another kind or colour never gives two shapes of one name.

    Raises:
        ValueError: an unknown part, or a caption that asks nothing about it; see `parts`.
    """
    if part not in parts(caption):
        raise ValueError(f"{str(caption)!r} says nothing about {part!r}; it does about {', '.join(parts(caption))}")
    if part == "background":
        return replace(caption, background=_other(BACKGROUNDS, caption.background, rng))
    movers = list(caption.movers)
    if part == "count":
        if len(movers) == 2:
            del movers[int(rng.integers(2))]
        else:
            movers.append(Mover(_unlike(movers[0].item, rng), None))
        return replace(caption, movers=tuple(movers))
    i = int(rng.choice([i for i, mover in enumerate(movers) if part in _said(mover)]))
    others = [mover.item for k, mover in enumerate(movers) if k != i]
    while True:
        changed = _changed(movers[i], part, rng)
        if all((changed.item.kind, changed.item.colour) != (other.kind, other.colour) for other in others):
            break
    movers[i] = changed
    return replace(caption, movers=tuple(movers))


def parts(caption: MotionCaption) -> tuple[str, ...]:
    """What `mistaken` can change in a caption."""
    said = {"count"} | {part for mover in caption.movers for part in _said(mover)}
    return tuple(part for part in TEXT if part in said or (part == "background" and caption.background))


def _said(mover: Mover) -> set[str]:
    optional = {"size": mover.item.size, "speed": mover.speed}
    return {"kind", "colour", "direction"} | {part for part, word in optional.items() if word}


def _changed(mover: Mover, part: str, rng: np.random.Generator) -> Mover:
    item = mover.item
    if part == "kind":
        return replace(mover, item=replace(item, kind=_other(KINDS, item.kind, rng)))
    if part == "colour":
        return replace(mover, item=replace(item, colour=_other(COLOURS, item.colour, rng)))
    if part == "size":
        return replace(mover, item=replace(item, size=_other(SIZES, item.size, rng)))
    if part == "speed":
        return replace(mover, speed=_other(SPEEDS, mover.speed, rng))
    direction = _other((*DIRECTIONS, "still"), mover.direction or "still", rng)
    return replace(mover, direction=None, speed=None) if direction == "still" else replace(mover, direction=direction)


def _other(words: Sequence[str], word: str | None, rng: np.random.Generator) -> str:
    return str(rng.choice([other for other in words if other != word]))


def _unlike(item: Item, rng: np.random.Generator) -> Item:
    return Item(_other(KINDS, item.kind, rng), _other(COLOURS, item.colour, rng))
