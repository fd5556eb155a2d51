"""Captions of the shapes world: a small grammar that can be sampled, written and parsed back.

- a red circle
- a small red circle on the left on a white background
- a red circle above a large blue square
- a red circle, a blue square and a green triangle on a grey background
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

KINDS = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
BACKGROUNDS = ("white", "grey", "black")
SIZES = ("small", "large")
POSITIONS = ("on the left", "on the right", "at the top", "at the bottom", "in the centre")
RELATIONS = ("left of", "right of", "above", "below")
WORDS = sorted(
    {"a", "and", "background", ",", *KINDS, *COLOURS, *BACKGROUNDS, *SIZES}
    | {word for phrase in POSITIONS + RELATIONS for word in phrase.split()}
)
COUNT_WEIGHTS = (0.6, 0.3, 0.1)  # share of captions with one, two and three shapes


@dataclass(frozen=True)
class Item:
    """One shape as a caption names it; `size` is None when the caption does not say."""

    kind: str
    colour: str
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in ("a", self.size, self.colour, self.kind) if word)


@dataclass(frozen=True)
class Caption:
    """What a caption asks for. `position` only with one item, `relation` (first to second) only with two."""

    items: tuple[Item, ...]
    position: str | None = None
    relation: str | None = None
    background: str | None = None

    def __str__(self) -> str:
        names = [str(item) for item in self.items]
        if self.relation:
            text = f"{names[0]} {self.relation} {names[1]}"
        else:
            text = ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
        if self.position:
            text += f" {self.position}"
        if self.background:
            text += f" on a {self.background} background"
        return text

    @property
    def held_out(self) -> bool:
        """True for the tenth of all captions that training never shows (chosen by a hash of the text)."""
        return zlib.crc32(str(self).encode()) % 10 == 0


def sample_caption(rng: np.random.Generator, *, counts: tuple[float, ...] = COUNT_WEIGHTS) -> Caption:
    """Draws a caption; `counts` are the probabilities of one, two and three shapes."""
    count = 1 + int(rng.choice(len(counts), p=np.asarray(counts) / sum(counts)))
    items: list[Item] = []
    while len(items) < count:
        size = str(rng.choice(SIZES)) if rng.random() < 0.3 else None
        item = Item(str(rng.choice(KINDS)), str(rng.choice(COLOURS)), size)
        if all((item.kind, item.colour) != (other.kind, other.colour) for other in items):
            items.append(item)
    position = str(rng.choice(POSITIONS)) if count == 1 and rng.random() < 0.4 else None
    relation = str(rng.choice(RELATIONS)) if count == 2 and rng.random() < 0.6 else None
    background = str(rng.choice(BACKGROUNDS)) if rng.random() < 0.5 else None
    return Caption(tuple(items), position, relation, background)


def captions(count: int, seed: int, *, held_out: bool, counts: tuple[float, ...] = COUNT_WEIGHTS) -> list[Caption]:
    """`count` captions from the training part of the grammar, or from its held-out part."""
    rng = np.random.default_rng([seed, int(held_out)])
    found: list[Caption] = []
    while len(found) < count:
        caption = sample_caption(rng, counts=counts)
        if caption.held_out == held_out:
            found.append(caption)
    return found


_ITEM = rf"a (?:(?P<size>{'|'.join(SIZES)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<kind>{'|'.join(KINDS)})"
_ANY_ITEM = re.sub(r"\?P<\w+>", "?:", _ITEM)
_CAPTION = re.compile(
    rf"(?P<items>{_ANY_ITEM}(?:(?:, | and | (?:{'|'.join(RELATIONS)}) ){_ANY_ITEM})*)"
    rf"(?: (?P<position>{'|'.join(POSITIONS)}))?(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


def parse_caption(text: str) -> Caption:
    """Reads a caption of the grammar. Raises ValueError for any other text."""
    match = _CAPTION.fullmatch(" ".join(text.lower().split()).rstrip("."))
    if match is None:
        raise ValueError(
            f"not a caption of the shapes world: {text!r}. Write it like 'a small red circle on the left'."
        )
    named = match["items"]
    items = tuple(Item(m["kind"], m["colour"], m["size"]) for m in re.finditer(_ITEM, named))
    relation = re.search(rf" ({'|'.join(RELATIONS)}) a ", named)
    caption = Caption(items, match["position"], relation and relation[1], match["background"])
    if len(items) > 3 or (relation and len(items) != 2) or (caption.position and len(items) > 1):
        raise ValueError(
            f"{text!r} asks for more than the shapes world draws: at most three shapes, "
            "a relation between two, a position for one."
        )
    return caption
