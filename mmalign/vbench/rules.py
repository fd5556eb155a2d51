"""VBench's rules on what was found in frames: which objects are there, of which colour, where, and which scene.

Pure functions on detections and captions; whatever found them is no matter here. Each has two readings:

    compat   what the reference computes (object_class.py, multiple_objects.py, color.py, spatial_relationship.py,
             scene.py of Vchitect/VBench, package 0.1.5), quirks with it
    strict   what it was meant to compute, where the two differ

The signs of ``strict`` relations are those of T2I-CompBench (UniDet_eval/2D_spatial_eval.py), after which VBench's rule
was made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "COLOUR_WORDS",
    "RELATIONS",
    "Detection",
    "Frame",
    "Outcome",
    "Rules",
    "asked",
    "check_relation",
    "color",
    "iou",
    "multiple_objects",
    "object_class",
    "object_of",
    "scene",
    "scores",
    "spatial_relationship",
    "two_objects",
]

Rules = Literal["compat", "strict"]
Box = tuple[float, float, float, float]

COLOUR_WORDS = (
    *("white", "red", "pink", "blue", "silver", "purple"),
    *("orange", "green", "gray", "yellow", "black", "grey"),
)
"""The words by which the reference tells that a caption names a colour at all (color.py)."""

IOU = 0.1
"""From this intersection over union on, a relation counts in part."""

# The axis of the centres' distance, and the sign of (b - a) along it; y grows downwards.
RELATIONS = {
    "on the left of": (0, 1),
    "on the right of": (0, -1),
    "on the top of": (1, 1),
    "on the bottom of": (1, -1),
}
"""The relations of the suite: (0 for x and 1 for y, sign of the centre of b less that of a)."""


@dataclass(frozen=True)
class Detection:
    """One object in one frame.

    Attributes:
        label: its class, such as ``traffic light``.
        box: left, top, right, bottom in pixels.
        score: how sure the detector is, in [0, 1]; the rules do not read it.
        caption: words about it, which `color` reads.
    """

    label: str
    box: Box
    score: float = 1.0
    caption: str = ""


Frame = Sequence[Detection]
"""The detections of one frame, the surest first."""


@dataclass(frozen=True)
class Outcome:
    """What a rule says of one clip.

    Attributes:
        values: of every frame: 1 or 0, in between for relations.
        counted: which frames are in the denominator.
    """

    values: tuple[float, ...]
    counted: tuple[bool, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Outcome:
        """With every frame in the denominator."""
        found = tuple(float(value) for value in values)
        return cls(found, (True,) * len(found))

    @property
    def frames(self) -> int:
        """The denominator: 0 where there is nothing to judge, and then the clip is in no mean."""
        return sum(self.counted)

    @property
    def score(self) -> float:
        """The sum of all values over `frames`; 0 where that is 0."""
        return sum(self.values) / self.frames if self.frames else 0.0


# ------------------------------------------------------------------------------------------------ objects


def object_class(frames: Sequence[Frame], wanted: str) -> Outcome:
    """1 for each frame in which an object has exactly this label."""
    return Outcome.of(any(each.label == wanted for each in frame) for frame in frames)


def multiple_objects(frames: Sequence[Frame], wanted: Iterable[str]) -> Outcome:
    """1 for each frame in which each of these labels occurs exactly."""
    names = set(wanted)
    return Outcome.of(names <= {each.label for each in frame} for frame in frames)


def two_objects(text: str) -> tuple[str, str]:
    """The labels of the suite's ``a and b``.

    Raises:
        ValueError: the text is not of that form.
    """
    names = tuple(part.strip() for part in text.split(" and "))
    if len(names) != 2 or not all(names):
        raise ValueError(f"object is {text!r}; multiple_objects takes two names with ' and ' between them")
    return names[0], names[1]


# ------------------------------------------------------------------------------------------------ colour


def object_of(prompt: str, colour: str, rules: Rules = "compat") -> str:
    """What a prompt of the suite's colours is about: ``clock`` of "a red clock".

    ``compat`` takes the letters of "a ", "an " and the colour out wherever they stand, in this order, also inside of
    words ("a red panda bear" is about a "pandbear"); ``strict`` takes out articles and the colour, once, as words.

    Raises:
        ValueError: nothing is left.
    """
    if rules == "compat":
        name = prompt.replace("a ", "").replace("an ", "").replace(colour, "").strip()
    else:
        words = [word for word in prompt.split() if word.lower() not in ("a", "an", "the")]
        if colour in words:
            words.remove(colour)
        name = " ".join(words)
    if not name:
        raise ValueError(f"the prompt {prompt!r} names nothing that could be {colour}")
    return name


def color(frames: Sequence[Frame], wanted: str, colour: str, rules: Rules = "compat") -> Outcome:
    """Of the frames that show the object in some colour, those in which it has the right one.

    ``compat`` asks for the class of the frame's first detection alone, whichever one a caption belongs to; a word
    counts as a part of another ("covered" holds "red"); frames without a colour word are not counted, so that a clip
    without the object has `Outcome.frames` 0 and is in no mean. A colour that is none of `COLOUR_WORDS` may be found in
    frames that are not counted, and a score be above 1; the suite has no such colour.

    ``strict`` reads the captions of the object's own detections, whole words, and counts every frame.
    """
    if rules == "strict":
        same = {"gray", "grey"} if colour in ("gray", "grey") else {colour}
        return Outcome.of(
            any(each.label == wanted and not same.isdisjoint(_words(each.caption)) for each in frame)
            for frame in frames
        )
    captions = [[each.caption for each in frame] if frame and frame[0].label == wanted else [] for frame in frames]
    return Outcome(
        tuple(float(any(colour in text for text in texts)) for texts in captions),
        tuple(any(word in text for text in texts for word in COLOUR_WORDS) for texts in captions),
    )


# ------------------------------------------------------------------------------------------------ places


def spatial_relationship(frames: Sequence[Frame], a: str, b: str, relation: str, rules: Rules = "compat") -> Outcome:
    """How well the best pair of each frame stands as "a `relation` b" says.

    A pair counts where the distance of its centres along the relation's axis is above that along the other one: 1, or
    0.1 / IoU where its boxes' intersection over union is 0.1 or more.

    ``compat`` takes any two boxes of either class, in any order, whatever the direction, in whole pixels (cut off):
    left is right, and two of a are enough. ``strict`` takes one of a and one of b and asks for the direction: a is on
    the left of b where its centre has the smaller x, on top where it has the smaller y.

    Raises:
        ValueError: a relation that is none of `RELATIONS`.
    """
    check_relation(relation)
    axis, sign = RELATIONS[relation]
    pairs = _either if rules == "compat" else _each

    def best(frame: Frame) -> float:
        return max((_placed(*pair, axis, sign * (rules == "strict")) for pair in pairs(frame, a, b)), default=0.0)

    return Outcome.of(best(frame) for frame in frames)


def check_relation(relation: str) -> None:
    """ValueError for a relation that is none of `RELATIONS`; the reference would score every frame 0."""
    if relation not in RELATIONS:
        raise ValueError(f"relationship is {relation!r}; known are {', '.join(RELATIONS)}")


def _either(frame: Frame, a: str, b: str) -> Iterable[tuple[Box, Box]]:
    boxes: list[Box] = []
    for each in frame:
        if each.label in (a, b):
            left, top, right, bottom = (float(int(value)) for value in each.box)
            boxes.append((left, top, right, bottom))
    return combinations(boxes, 2)


def _each(frame: Frame, a: str, b: str) -> Iterable[tuple[Box, Box]]:
    return ((one.box, other.box) for one in frame for other in frame if (one.label, other.label) == (a, b))


def _placed(one: Box, other: Box, axis: int, sign: int) -> float:
    """The score of a pair; a sign of 0 asks for no direction."""
    along, across = ((other[side] + other[side + 2]) / 2 - (one[side] + one[side + 2]) / 2 for side in (axis, 1 - axis))
    if not abs(along) > abs(across) or along * sign < 0:
        return 0.0
    overlap = iou(one, other)
    return 1.0 if overlap < IOU else IOU / overlap


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes; 0 where neither has an area, which the reference divides by."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    shared = width * height
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / union if union else 0.0


# ------------------------------------------------------------------------------------------------ scenes


def scene(captions: Sequence[str], wanted: str, rules: Rules = "compat") -> Outcome:
    """1 for each frame whose caption has every word of the scene's name.

    ``compat`` splits the name at spaces and is content with parts of words ("arch" in "march"), in the same case;
    ``strict`` asks for whole words, in any case.
    """
    if rules == "compat":
        parts = wanted.split(" ")
        return Outcome.of(all(part in caption for part in parts) for caption in captions)
    words = set(_words(wanted))
    return Outcome.of(words.issubset(_words(caption)) for caption in captions)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


# ------------------------------------------------------------------------------------------------ rows


def asked(aux: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """What the suite asks of a clip, from the row's further columns.

    Raises:
        ValueError: one of them is missing or no text.
    """
    values = [aux.get(name) for name in names]
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"the row has no {name}; it is of the suite's auxiliary_info, or a column of your table")
    return tuple(str(value) for value in values)


def scores(outcomes: Sequence[Outcome]) -> dict[str, Tensor]:
    """As evaluators return them: ``score`` and ``frames``, float32 [B]."""
    return {
        "score": torch.tensor([each.score for each in outcomes], dtype=torch.float32),
        "frames": torch.tensor([each.frames for each in outcomes], dtype=torch.float32),
    }
