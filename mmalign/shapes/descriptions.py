"""Detailed descriptions of a scene, several sentences of a small grammar, with the place of every claim in the text.

- There is a large red circle in the top left. A small blue cross is to its right. The background is grey.
- The picture shows two shapes. On the left there is a red circle. Below it is a blue square. It is small.

What is claimed (`Beliefs`) is apart from how it is said (a seed): the same seed writes other beliefs about as many
shapes in the same sentences, so a false twin differs from its true text in the words of the false claims alone.
`mmalign.shapes.claims` reads the claims back and judges them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mmalign.shapes.captions import BACKGROUNDS, COLOURS, KINDS, SIZES
from mmalign.shapes.scene import LARGE, SIDE, SMALL, Scene, Shape, relation_of
from mmalign.shapes.typical import FAVOURITES, companion_of, temptations

PLACES = ("left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right", "centre")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
NUMBERS = ("one", "two", "three", "four", "five")
MIDDLE = 7.0  # pixels from the middle of the picture within which a centre is neither left nor right, top nor bottom
ROOM = 1.5  # a description names a place only if it holds with this many pixels of room
LENGTHS = (10, 45)  # words
_PLACE_WORDS = {
    **{side: (f"on the {side}", f"on the {side} side") for side in ("left", "right")},
    **{side: (f"at the {side}", f"at the {side}") for side in ("top", "bottom")},
    **{f"{a} {b}": (f"in the {a} {b}", f"in the {a} {b} corner") for a in ("top", "bottom") for b in ("left", "right")},
    "centre": ("in the centre", "in the middle"),
}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "above"),
    "below": ("below", "below"),
}
_ITS_WORDS = {"left of": "to its left", "right of": "to its right", "above": "above it", "below": "below it"}
# A: the shape with article, size and colour; PLACE: where it is; REL THE and ITS: how it stands to an earlier one.
_OPENINGS = ("the picture shows COUNT", "there ARECOUNT in the picture", "I can see COUNT")
_FIRST = ("there is A PLACE", "A is PLACE", "I can see A PLACE", "PLACE there is A", "the picture shows A PLACE")
_NEXT = ("there is also A PLACE", "A is PLACE", "PLACE there is A")
_UNPLACED = ("there is A in the picture", "the picture shows A", "I can see A")
_RELATED = ("A is REL THE", "REL THE there is A", "A can be seen REL THE")
_RELATED_IT = ("A is ITS", "ITS is A", "ITS there is A")
_GROUNDS = ("the background is GROUND", "everything is on a GROUND background", "the background is plain GROUND")
WORDS = frozenset(
    " ".join([*_OPENINGS, *_FIRST, *_NEXT, *_UNPLACED, *_RELATED, *_RELATED_IT, *_GROUNDS, "it is shape shapes are"])
    .replace("COUNT", " ".join(NUMBERS))
    .split()
) - {"A", "PLACE", "REL", "THE", "ITS", "GROUND", "ARECOUNT"} | {
    word
    for phrases in (*_PLACE_WORDS.values(), *_RELATION_WORDS.values(), tuple(_ITS_WORDS.values()))
    for phrase in phrases
    for word in phrase.split()
} | {"a", *KINDS, *COLOURS, *SIZES, *BACKGROUNDS}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One shape as a writer believes it to be; None where a word would be a close call, and is never said."""

    kind: str
    colour: str
    size: str | None
    place: str | None


@dataclass(frozen=True)
class Beliefs:
    """What a description says. `relations`: (i, j) -> how thing i stands to thing j; `count`: how many there are."""

    things: tuple[Thing, ...]
    relations: Mapping[tuple[int, int], str]
    background: str
    count: int


@dataclass(frozen=True)
class Slot:
    """One word or phrase of a text that claims something.

    `category`: kind, colour, size, place, relation, background or count. `about`: indices of the things, empty for
    background and count. `start` and `end`: characters, end exclusive.
    """

    category: str
    about: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Description:
    """A text and its claims in the order of the text; `sentences` are (start, end, subject) in characters, where the
    subject is "thing", "relation", "size", "count" or "background"."""

    text: str
    slots: tuple[Slot, ...]
    sentences: tuple[tuple[int, int, str], ...] = field(repr=False)


def places_of(shape: Shape, room: float = 0.0) -> frozenset[str]:
    """All words of `PLACES` that are true of where a shape's centre is.

    `left` is more than 7 pixels left of the middle of the picture, `top left` is both, `centre` is neither left nor
    right, top nor bottom. `room`: pixels by which each has to hold; below 0 they hold more easily.
    """
    dx, dy = shape.x - SIDE / 2, shape.y - SIDE / 2
    far = MIDDLE + room
    sides = {"left": dx < -far, "right": dx > far, "top": dy < -far, "bottom": dy > far}
    found = {name for name, holds in sides.items() if holds}
    found |= {name for name in PLACES if " " in name and set(name.split()) <= found}
    if max(abs(dx), abs(dy)) <= MIDDLE - room:
        found.add("centre")
    return frozenset(found)


def size_of(shape: Shape) -> str | None:
    """`small` up to 10 pixels of radius, `large` from 12 on, None between."""
    return "small" if shape.radius <= SMALL else "large" if shape.radius >= LARGE else None


def beliefs_of(scene: Scene) -> Beliefs:
    """What is true of a scene; of the places that hold the narrowest. ValueError without one to three shapes."""
    if not 1 <= len(scene.shapes) <= 3:
        raise ValueError(f"a description is of one to three shapes, not {len(scene.shapes)}")
    things = []
    for shape in scene.shapes:
        place = max(sorted(places_of(shape, ROOM)), key=lambda name: " " in name, default=None)
        things.append(Thing(shape.kind, shape.colour, size_of(shape), place))
    pairs = [(i, j) for i in range(len(things)) for j in range(len(things)) if i != j]
    relations = {(i, j): relation_of(scene.shapes[i], scene.shapes[j]) for i, j in pairs}
    return Beliefs(tuple(things), relations, scene.background, len(things))


def describe(scene: Scene, seed: Any) -> Description:
    """A true description that mentions every shape. `seed`: anything `np.random.default_rng` takes."""
    return write(beliefs_of(scene), seed)


def noisy_description(scene: Scene, seed: Any, rate: float) -> Description:
    """A description by somebody who gives in to each temptation of a scene with `rate`, see `believe`.

    One with a rate of 0 is true.
    """
    rng = np.random.default_rng(seed)
    seen, swapped = believe(scene, rng, rate)
    beliefs = beliefs_of(seen)
    if swapped:
        beliefs = replace(beliefs, relations={pair: OPPOSITE[word] for pair, word in beliefs.relations.items()})
    return write(beliefs, rng.integers(2**32))


def believe(scene: Scene, rng: np.random.Generator, rate: float) -> tuple[Scene, bool]:
    """What somebody of fixed habits takes a scene for, who gives in to each of its `typical.temptations` with `rate`.

    Colours become the favourite of their kind, and a companion is added that is not there. The second value: whether a
    circle that stands right of a square is said to stand left of it.
    """
    seen, swapped = list(scene.shapes), False
    for temptation in temptations(scene):
        if rng.random() >= rate:
            continue
        if temptation == "companion":
            seen.append(companion_of(scene, rng))
        elif temptation == "relation":
            swapped = True
        else:
            i = int(temptation.split()[1])
            seen[i] = replace(seen[i], colour=FAVOURITES[seen[i].kind])
    return Scene(tuple(seen), scene.background), swapped


def write(beliefs: Beliefs, seed: Any) -> Description:
    """Says what is believed of one to three things in 10 to 45 words. The seed alone chooses sentences and their order,
    besides how many things there are and which sizes and places are None."""
    rng = np.random.default_rng(seed)
    writer = _Writer(beliefs, rng)
    order = [int(i) for i in rng.permutation(len(beliefs.things))]
    opening, ground, related = rng.random() < 0.35, rng.random() < 0.7, False
    if opening:
        writer.sentence("count", _pick(_OPENINGS, rng))
    for position, thing in enumerate(order):
        related |= _introduce(writer, thing, order[:position], rng)
        if len(order) == 1 and not writer.sized[thing] and beliefs.things[thing].size and rng.random() < 0.5:
            writer.sentence("size", "it is SIZE", thing)
    if len(order) == 2 and not related and not opening and rng.random() < 0.6:
        writer.sentence("relation", "THE is REL THE", order[0], other=order[1])
    if len(order) == 1 or (ground and not (len(order) == 3 and opening)):
        writer.sentence("background", _pick(_GROUNDS, rng))
    return Description("".join(writer.parts), tuple(writer.slots), tuple(writer.sentences))


def _introduce(writer: _Writer, thing: int, earlier: list[int], rng: np.random.Generator) -> bool:
    """A sentence that mentions a thing for the first time; whether it says how the thing stands to an earlier one."""
    wants_place, wants_relation, wants_it = rng.random() < 0.75, rng.random() < 0.5, rng.random() < 0.5
    other = earlier[int(rng.integers(len(earlier)))] if earlier else None
    if other is not None and wants_relation:
        if wants_it:
            other = earlier[-1]  # the subject of the sentence before, which is what "it" means
        writer.sentence("thing", _pick(_RELATED_IT if wants_it else _RELATED, rng), thing, other=other)
        return True
    placed = wants_place and writer.beliefs.things[thing].place
    writer.sentence("thing", _pick((_NEXT if earlier else _FIRST) if placed else _UNPLACED, rng), thing)
    return False


def _pick(templates: tuple[str, ...], rng: np.random.Generator) -> str:
    return templates[int(rng.integers(len(templates)))]


class _Writer:
    """Puts sentences together and notes where claims stand."""

    def __init__(self, beliefs: Beliefs, rng: np.random.Generator) -> None:
        self.beliefs, self.rng = beliefs, rng
        self.parts: list[str] = []
        self.slots: list[Slot] = []
        self.sentences: list[tuple[int, int, str]] = []
        self.sized = [False] * len(beliefs.things)
        self.length = 0

    def sentence(self, subject: str, template: str, thing: int = -1, other: int | None = None) -> None:
        """Writes one sentence. The first THE of a template without A is `thing`, every other THE is `other`."""
        if self.parts:
            self._put(" ")
        begin, first = self.length, len(self.parts)
        named = "A" in template.split()
        for i, word in enumerate(template.split()):
            if i:
                self._put(" ")
            if word == "THE":
                self._name("the", thing if not named else other, sized=False)
                named = True
            elif word == "A":
                self._name("a", thing, sized=bool(self.rng.random() < 0.65))
            else:
                self._fill(word, thing, other)
        self.parts[first] = self.parts[first][0].upper() + self.parts[first][1:]
        self._put(".")
        self.sentences.append((begin, self.length, subject))

    def _fill(self, word: str, thing: int, other: int | None) -> None:
        beliefs, variant = self.beliefs, int(self.rng.integers(2))
        if word == "PLACE":
            self._claim(_PLACE_WORDS[beliefs.things[thing].place or ""][variant], "place", thing)
        elif word in ("REL", "ITS"):
            assert other is not None
            relation = beliefs.relations[thing, other]
            phrase = _ITS_WORDS[relation] if word == "ITS" else _RELATION_WORDS[relation][variant]
            self._claim(phrase, "relation", thing, other)
        elif word == "SIZE":
            self._claim(beliefs.things[thing].size or "", "size", thing)
        elif word == "GROUND":
            self._claim(beliefs.background, "background")
        elif word in ("COUNT", "ARECOUNT"):
            verb = "" if word == "COUNT" else "is " if beliefs.count == 1 else "are "
            self._claim(f"{verb}{NUMBERS[beliefs.count - 1]} shape{'s' * (beliefs.count > 1)}", "count")
        else:
            self._put(word)

    def _name(self, article: str, thing: int | None, sized: bool) -> None:
        assert thing is not None
        named = self.beliefs.things[thing]
        self._put(article + " ")
        if sized and named.size:
            self._claim(named.size, "size", thing)
            self._put(" ")
            self.sized[thing] = True
        self._claim(named.colour, "colour", thing)
        self._put(" ")
        self._claim(named.kind, "kind", thing)

    def _claim(self, text: str, category: str, *about: int) -> None:
        self.slots.append(Slot(category, about, self.length, self.length + len(text)))
        self._put(text)

    def _put(self, text: str) -> None:
        self.parts.append(text)
        self.length += len(text)
