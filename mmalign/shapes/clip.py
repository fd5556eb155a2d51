"""Moving scenes of the shapes world: one or two shapes, each standing still or moving straight at one speed.

Coordinates are those of `mmalign.shapes.scene`, a frame of 64 by 64 units whatever the number of pixels; speeds are in
units per second.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mmalign.shapes.captions import Item
from mmalign.shapes.motion import MotionCaption, Mover
from mmalign.shapes.scene import GREYS, LARGE, SATURATION, SIDE, SMALL, Scene, Shape, render

FRAMES, FPS, PIXELS = 9, 8.0, 32  # of a clip, where nothing else is said
RADII = (8.0, (15.0, 13.0))  # the least, and the largest in clips of one and of two shapes
SPEED_RANGE = (6.0, 28.0)
SLOW, QUICK = 12.0, 16.0  # a slow shape does at most SLOW, a quick one at least QUICK
HEADINGS = {None: (0.0, 0.0), "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
LONGEST = 2.0  # seconds; in more a quick shape runs out of the frame
APART = 2.0  # least gap between bounding boxes
MARGIN = 1.0  # least gap between a bounding box and the frame
_ROOM = 1.0  # units per second between a word's limit and what is drawn for it, so that a reader can tell
_DRAWS, _ROUNDS = 64, 200  # pairs of starting places tried at once, and how often sizes and speeds are drawn anew


@dataclass(frozen=True)
class Moving:
    """A shape as it is at the beginning, and its velocity."""

    shape: Shape
    vx: float = 0.0
    vy: float = 0.0

    def at(self, seconds: float) -> Shape:
        return replace(self.shape, x=self.shape.x + seconds * self.vx, y=self.shape.y + seconds * self.vy)


@dataclass(frozen=True)
class MovingScene:
    shapes: tuple[Moving, ...]
    background: str

    def at(self, seconds: float) -> Scene:
        return Scene(tuple(moving.at(seconds) for moving in self.shapes), self.background)


def render_clip(scene: MovingScene, frames: int = FRAMES, fps: float = FPS, side: int = PIXELS) -> np.ndarray:
    """Draws a moving scene: uint8 RGB [frames, side, side, 3], frame k at k / fps seconds, without motion blur."""
    return np.stack([render(scene.at(k / fps), side) for k in range(frames)])


def has_room(caption: MotionCaption, seconds: float) -> bool:
    """Whether `sample_moving` finds a scene for a clip that long: up to 1 second always, up to LONGEST mostly.

    Two large shapes that cross quickly are soon in each other's way, wherever they begin.
    """
    crossing = {mover.direction in ("left", "right") for mover in caption.movers} == {True, False}
    crowded = crossing and all(mover.item.size == "large" and mover.speed == "quickly" for mover in caption.movers)
    return seconds <= (1.0 if crowded else LONGEST)


def sample_moving(
    caption: MotionCaption, rng: np.random.Generator, *, frames: int = FRAMES, fps: float = FPS
) -> MovingScene:
    """Draws a moving scene that the caption describes; whatever the caption leaves open is random.

    From the first frame to the last each shape is MARGIN inside of the frame, and no two bounding boxes come within
    APART of each other. Starting places are drawn from where that holds for each shape by itself. Where two shapes
    are in each other's way, draw after draw, they are drawn smaller, slower and nearer to the edges.

    Raises:
        ValueError: a clip that long has no room for the caption; see `has_room`.
    """
    seconds = (frames - 1) / fps
    for turn in range(_ROUNDS):
        ease = turn / (_ROUNDS - 1)
        moving = [_start(mover, len(caption.movers), seconds, ease, rng) for mover in caption.movers]
        places = [_places(one, seconds, 1 if len(moving) == 1 else _DRAWS, ease, rng) for one in moving]
        free = np.flatnonzero(_apart(moving, places, np.arange(frames) / fps)) if len(moving) > 1 else [0]
        if len(free):
            chosen = [
                replace(one, shape=replace(one.shape, x=float(place[free[0], 0]), y=float(place[free[0], 1])))
                for one, place in zip(moving, places, strict=True)
            ]
            background = caption.background or str(rng.choice(sorted(GREYS)))
            return MovingScene(tuple(chosen), background)
    raise ValueError(f"found no room for {str(caption)!r} in {frames} frames at {fps:g} per second; use a shorter clip")


def _start(mover: Mover, count: int, seconds: float, ease: float, rng: np.random.Generator) -> Moving:
    """A shape of the asked size and velocity, placed nowhere yet; with `ease` 1 the least that the caption allows."""
    low, high = _radii(mover.item, count)
    slowest, fastest = _speeds(mover.speed) if mover.direction else (0.0, 0.0)
    width = SIDE - 2 * MARGIN
    high = min(high, (width - slowest * seconds) / 2)
    if high < low:
        raise ValueError(
            f"{str(mover)!r} would leave the frame within {seconds:g} seconds; use fewer frames or more per second"
        )
    radius = float(rng.uniform(low, high - ease * (high - low)))
    fastest = min(fastest, (width - 2 * radius) / seconds) if seconds else fastest
    speed = float(rng.uniform(slowest, fastest - ease * (fastest - slowest)))
    saturation = float(rng.uniform(*SATURATION))
    across, down = HEADINGS[mover.direction]
    shape = Shape(mover.item.kind, mover.item.colour, SIDE / 2, SIDE / 2, radius, saturation)
    return Moving(shape, speed * across, speed * down)


def _radii(item: Item, count: int) -> tuple[float, float]:
    low, high = RADII[0], RADII[1][count - 1]
    return {None: (low, high), "small": (low, SMALL - 0.5), "large": (LARGE + 0.5, high)}[item.size]


def _speeds(word: str | None) -> tuple[float, float]:
    low, high = SPEED_RANGE
    return {None: (low, high), "slowly": (low, SLOW - _ROOM), "quickly": (QUICK + _ROOM, high)}[word]


def _places(moving: Moving, seconds: float, count: int, ease: float, rng: np.random.Generator) -> np.ndarray:
    """Starting places [count, 2] from which the shape stays inside of the frame: anywhere, with `ease` at the edges."""
    way = seconds * np.array([moving.vx, moving.vy])
    edge = moving.shape.radius + MARGIN
    low, high = edge - np.minimum(way, 0), SIDE - edge - np.maximum(way, 0)
    spread = 1 - 0.7 * ease  # 1: uniform; less: towards both ends
    shares = rng.beta(spread, spread, (count, 2))
    return low + shares * np.maximum(high - low, 0)


def _apart(moving: list[Moving], places: list[np.ndarray], times: np.ndarray) -> np.ndarray:
    """Which of the drawn pairs of starting places [count, 2] keep two shapes apart at all times: bool [count]."""
    one, other = moving
    drift = np.array([one.vx - other.vx, one.vy - other.vy])
    between = (places[0] - places[1])[:, None] + times[:, None] * drift
    enough: np.ndarray = abs(between).max(-1).min(-1) >= one.shape.radius + other.shape.radius + APART
    return enough
