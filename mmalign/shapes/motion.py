"""Captions of moving shapes: a small grammar that can be sampled, written and parsed back.

- a red circle moves left
- a small blue square moves up quickly on a grey background
- a green cross stands still
- a red circle moves left and a large blue square stands still on a white background
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmalign.shapes.captions import BACKGROUNDS, COLOURS, KINDS, SIZES, Item

DIRECTIONS = ("left", "right", "up", "down")
SPEEDS = ("slowly", "quickly")
WORDS = sorted(
    {"a", "and", "on", "background", "moves", "stands", "still"}
    | {*KINDS, *COLOURS, *BACKGROUNDS, *SIZES, *DIRECTIONS, *SPEEDS}
)
COUNT_WEIGHTS = (0.75, 0.25)  # share of captions with one and with two shapes


@dataclass(frozen=True)
class Mover:
    """One shape and what it does. `direction` None: it stands still; `speed` None: the caption does not say."""

    item: Item
    direction: str | None = None
    speed: str | None = None

    def __str__(self) -> str:
        does = ("moves", self.direction, self.speed) if self.direction else ("stands still",)
        return " ".join(word for word in (str(self.item), *does) if word)


@dataclass(frozen=True)
class MotionCaption:
    """What a caption asks of a clip: one or two shapes of different kind or colour; `background` None is any."""

    movers: tuple[Mover, ...]
    background: str | None = None

    def __str__(self) -> str:
        text = " and ".join(map(str, self.movers))
        return f"{text} on a {self.background} background" if self.background else text

    @property
    def held_out(self) -> bool:
        """True for the tenth of all captions that training never shows (chosen by a hash of the text)."""
        return zlib.crc32(str(self).encode()) % 10 == 0


def sample_motion(rng: np.random.Generator, *, counts: tuple[float, ...] = COUNT_WEIGHTS) -> MotionCaption:
    """Draws a caption; `counts` are the probabilities of one and of two shapes."""
    count = 1 + int(rng.choice(len(counts), p=np.asarray(counts) / sum(counts)))
    movers: list[Mover] = []
    while len(movers) < count:
        size = str(rng.choice(SIZES)) if rng.random() < 0.3 else None
        item = Item(str(rng.choice(KINDS)), str(rng.choice(COLOURS)), size)
        direction = str(rng.choice(DIRECTIONS)) if rng.random() < 0.8 else None
        speed = str(rng.choice(SPEEDS)) if direction and rng.random() < 0.5 else None
        if all((item.kind, item.colour) != (other.item.kind, other.item.colour) for other in movers):
            movers.append(Mover(item, direction, speed))
    background = str(rng.choice(BACKGROUNDS)) if rng.random() < 0.5 else None
    return MotionCaption(tuple(movers), background)


def motions(
    count: int, seed: int, *, held_out: bool, counts: tuple[float, ...] = COUNT_WEIGHTS,
    where: Callable[[MotionCaption], bool] = lambda caption: True,
) -> list[MotionCaption]:  # fmt: skip
    """`count` captions from the training part of the grammar, or from its held-out part; those for which `where` is so.

    Raises:
        ValueError: `counts` are not the probabilities of one and of two shapes.
    """
    if not 1 <= len(counts) <= 2 or min(counts) < 0 or sum(counts) <= 0:
        raise ValueError(f"counts are the probabilities of one and of two shapes in a clip, not {counts}")
    rng = np.random.default_rng([seed, int(held_out)])
    found: list[MotionCaption] = []
    while len(found) < count:
        caption = sample_motion(rng, counts=counts)
        if caption.held_out == held_out and where(caption):
            found.append(caption)
    return found


_MOVER = (
    rf"a (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<kind>{'|'.join(KINDS)}) "
    rf"(?:stands still|moves (?P<direction>{'|'.join(DIRECTIONS)})(?: (?P<speed>{'|'.join(SPEEDS)}))?)"
)
_ANY_MOVER = re.sub(r"\?P<\w+>", "?:", _MOVER)
_CAPTION = re.compile(
    rf"(?P<movers>{_ANY_MOVER}(?: and {_ANY_MOVER})?)(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


def parse_motion(text: str) -> MotionCaption:
    """Reads a caption of the grammar. Raises ValueError for any other text."""
    match = _CAPTION.fullmatch(" ".join(text.lower().split()).rstrip("."))
    if match is None:
        raise ValueError(
            f"not a caption of moving shapes: {text!r}. Write it like 'a small red circle moves left quickly on a "
            "grey background' or 'a red circle moves up and a blue square stands still'."
        )
    movers = tuple(
        Mover(Item(m["kind"], m["colour"], m["size"]), m["direction"], m["speed"])
        for m in re.finditer(_MOVER, match["movers"])
    )
    names = {(mover.item.kind, mover.item.colour) for mover in movers}
    if len(names) < len(movers):
        raise ValueError(f"{text!r} asks for two shapes of one kind and colour, which nobody could tell apart.")
    return MotionCaption(movers, match["background"])
