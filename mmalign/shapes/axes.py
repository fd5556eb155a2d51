"""What a clip of the shapes world is worth on the three axes of VideoReward: VQ, MQ and TA, exactly.

- VQ, visual quality: the frames as pictures, and colours that stay, wherever things are.
- MQ, motion quality: the same shapes go on at one speed in one direction, frame by frame, whatever was asked.
- TA, text alignment: kinds, colours, sizes, number, directions, speeds and background against the caption.

The axes are those of Liu et al., Improving Video Generation with Human Feedback (2501.13918); the formulas are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from mmalign.shapes.clip import QUICK, SLOW
from mmalign.shapes.clip_reader import STILL, ClipReading, Track
from mmalign.shapes.motion import MotionCaption, Mover
from mmalign.shapes.reader import SIZE_TOLERANCE
from mmalign.shapes.scene import LARGE, SMALL

AXES = ("VQ", "MQ", "TA")
FLICKER_SCALE = 0.1  # RGB in [0, 1]; a flicker of this size brings VQ to 1/e
JITTER_SCALE = 1.5  # units; a jitter of this size brings MQ to 1/e
SPEED_TOLERANCE = 1.0  # units per second beyond the limits of the words slowly and quickly
SPEED_FADE, SIZE_FADE = 6.0, 2.0  # so far beyond tolerance nothing is left of the grade


@dataclass(frozen=True)
class Kept:
    """One thing that a caption asks of a clip: whether it is kept, and how nearly, a grade in [0, 1]."""

    exact: bool
    grade: float


def axes(caption: MotionCaption, reading: ClipReading) -> dict[str, float]:
    """VQ, MQ and TA of a clip that has been read, each in [0, 1]; see the functions of these names in lower case."""
    return {"VQ": visual_quality(reading), "MQ": motion_quality(reading), "TA": text_alignment(caption, reading)}


def visual_quality(reading: ClipReading) -> float:
    """cleanliness * exp(-(flicker / 0.1) ** 2); 0 where no frame shows a proper shape."""
    return reading.cleanliness * float(np.exp(-((reading.flicker / FLICKER_SCALE) ** 2)))


def motion_quality(reading: ClipReading) -> float:
    """identity * (1 - dropped) * exp(-(jitter / 1.5) ** 2); 0 where no object is there in half of the frames.

    A clip in which everything stands still has no fault of motion, nor has one of a single frame.
    """
    return reading.identity * (1 - reading.dropped) * float(np.exp(-((reading.jitter / JITTER_SCALE) ** 2)))


def text_alignment(caption: MotionCaption, reading: ClipReading) -> float:
    """Mean grade of everything that the caption asks, see `kept`.

    For each track beyond the asked number there are three more grades of 0, as many as a missing shape has at least.
    """
    parts = kept(caption, reading)
    beyond = max(0, len(reading.tracks) - len(caption.movers))
    return sum(part.grade for part in parts.values()) / (len(parts) + 3 * beyond)


def everything(caption: MotionCaption, reading: ClipReading) -> bool:
    """Whether everything that the caption asks is kept exactly."""
    return all(part.exact for part in kept(caption, reading).values())


def kept(caption: MotionCaption, reading: ClipReading) -> dict[str, Kept]:
    """All that a caption asks, by name: ``count``, ``background`` where it is asked, and for each asked shape i

    ``kind i``, ``colour i``: equal, or not at all.
    ``size i``, if asked: a small radius is at most 10 units, a large one at least 12, with half a unit of tolerance;
    the grade falls to 0 over 2 units more.
    ``direction i``: exact within 30 degrees of the direction at 3 units per second or more; the grade is the cosine of
    the angle, not below 0, and less by the share that is missing of those 3. For a shape that shall stand still: exact
    below 3 units per second, and the grade falls to 0 at 6.
    ``speed i``, if asked: slowly is at most 12 units per second, quickly at least 16, with 1 of tolerance; the grade
    falls to 0 over 6 more, and is less by the share that is missing of 3.

    ``count``: exact if there are as many tracks as asked shapes, else 1 - |difference| / asked, not below 0. Asked
    shapes are matched with tracks so that the sum of the grades is largest; what is not there has the grade 0.
    """
    asked, there = len(caption.movers), len(reading.tracks)
    parts = {"count": Kept(asked == there, max(0.0, 1 - abs(asked - there) / asked))}
    if caption.background:
        same = reading.background == caption.background
        parts["background"] = Kept(same, float(same))
    tracks: list[Track | None] = [*reading.tracks, *[None] * asked]
    graded = [[dict(_mover(mover, track)) for track in tracks] for mover in caption.movers]
    worth = [[sum(part.grade for part in parts.values()) for parts in row] for row in graded]
    chosen = max(permutations(range(len(tracks)), asked), key=lambda c: sum(worth[i][j] for i, j in enumerate(c)))
    for i, j in enumerate(chosen):
        parts |= {f"{name} {i}": part for name, part in graded[i][j].items()}
    return parts


def _mover(mover: Mover, track: Track | None) -> Iterator[tuple[str, Kept]]:
    """What a caption asks of one shape against one track."""
    if track is None:
        absent = Kept(False, 0.0)
        asked = {"kind": True, "colour": True, "size": mover.item.size, "direction": True, "speed": mover.speed}
        yield from ((name, absent) for name, wanted in asked.items() if wanted)
        return
    yield "kind", _same(track.kind, mover.item.kind)
    yield "colour", _same(track.colour, mover.item.colour)
    if mover.item.size:
        beyond = track.radius - SMALL if mover.item.size == "small" else LARGE - track.radius
        yield "size", _within(beyond - SIZE_TOLERANCE, SIZE_FADE)
    if mover.direction is None:
        yield "direction", _within(track.speed - STILL, STILL)
        return
    moves = min(1.0, track.speed / STILL)
    grade = max(0.0, track.along(mover.direction)) * moves
    yield "direction", Kept(track.direction == mover.direction, grade)
    if mover.speed:
        beyond = track.speed - SLOW if mover.speed == "slowly" else QUICK - track.speed
        part = _within(beyond - SPEED_TOLERANCE, SPEED_FADE)
        yield "speed", Kept(part.exact and track.speed >= STILL, part.grade * moves)


def _same(one: str | None, other: str) -> Kept:
    return Kept(one == other, float(one == other))


def _within(beyond: float, fade: float) -> Kept:
    return Kept(beyond <= 0, 1 - min(1.0, max(0.0, beyond / fade)))
