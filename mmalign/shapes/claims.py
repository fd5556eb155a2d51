"""Reads a text about a scene as claims, and judges them against the scene: CHAIR with an exact truth.

A mention is one shape of the discourse, however often it is named. "A red circle" is a new shape unless a shape of the
same kind and colour was mentioned before; "the circle" is the latest circle; "it" and "its" are what the latest
sentence before is about, the first shape that it names other than to say where one is; "another" and "two" always make
new ones. So neither a pronoun nor a repetition is a second mention, and nobody is punished twice for one error.

CHAIR_i, the share of hallucinated mentions, and CHAIR_s, the share of texts with one, follow Rohrbach et al., Object
Hallucination in Image Captioning (1809.02156); there every naming counts, here every shape named. What a shape of this
world has beyond its kind (colour, size, place, relation) is claimed of the shape, and judged besides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmalign.shapes.captions import BACKGROUNDS, COLOURS, KINDS, SIZES
from mmalign.shapes.descriptions import NUMBERS, places_of
from mmalign.shapes.scene import LARGE, SMALL, Scene, Shape

CATEGORIES = ("object", "colour", "size", "place", "relation", "background", "count")
TOLERANCE = 1.0  # pixels by which a place may be missed
SIZE_TOLERANCE = 0.5  # pixels of radius, as in `reader`
APART = 2.0  # pixels by which centres have to differ for a relation to be true
_SIDES = {"left": "left of", "right": "right of"}
_RELATIONS = (
    (re.compile(r"(?:to|on|at) (its) (left|right)\b"), None),
    (re.compile(r"(?:(?:to|on|at) )?(?:the )?(left|right)(?: side)? of\b"), None),
    (re.compile(r"(?:above|over)\b"), "above"),
    (re.compile(r"(?:below|under|beneath)\b"), "below"),
)
_PLACE = re.compile(r"(?:(top|upper|bottom|lower) )?(left|right|top|bottom|centre|center|middle)\b")
_SAME = {"upper": "top", "lower": "bottom", "center": "centre", "middle": "centre"}
_COUNT = re.compile(rf"({'|'.join(NUMBERS)}) (?:shape|object|thing)s?\b")
_KIND = rf"({'|'.join(KINDS)})(?:e?s)?\b"
_HUES = (*COLOURS, *BACKGROUNDS)
_NAME = re.compile(
    rf"(?:(?P<article>a|an|the|this|that|another|{'|'.join(NUMBERS)}) )?(?:(?:other|second|third) )?"
    rf"(?P<adjectives>(?:(?:{'|'.join((*SIZES, *_HUES))}|and|plain) )*){_KIND}"
)
_PRONOUN = re.compile(r"(?:its?|(?:the|this|that) (?:shape|object|thing|one))\b")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Mention:
    """One shape of which a text speaks, with what it says of it first; None where it does not say.

    `more`: (category, word) of whatever it says besides, that is, contradictions and a second place.
    """

    kind: str
    colour: str | None = None
    size: str | None = None
    place: str | None = None
    more: tuple[tuple[str, str], ...] = ()

    def said(self) -> Iterator[tuple[str, str]]:
        """(category, word) of everything said of it but the kind."""
        for category in ("colour", "size", "place"):
            if getattr(self, category) is not None:
                yield category, getattr(self, category)
        yield from self.more


@dataclass(frozen=True)
class Claims:
    """What a text claims. `relations`: (i, relation, j) with indices of `mentions`; nothing stands in it twice."""

    mentions: tuple[Mention, ...]
    relations: tuple[tuple[int, str, int], ...] = ()
    backgrounds: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    words: int = 0


@dataclass
class _Reader:
    """The mentions so far, and what "it" means."""

    mentions: list[dict[str, Any]] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    backgrounds: list[str] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    topic: int | None = None

    def sentence(self, text: str) -> None:
        if "background" in text:
            self.backgrounds += [w for w in _WORD.findall(text) if w in BACKGROUNDS and w not in self.backgrounds]
            return
        first = None
        subject: int | None = None  # the shape named last in this sentence
        waiting_places: list[str] = []
        relation: str | None = None  # a relation whose second shape is to come
        fronted: list[tuple[str, int]] = []  # relations whose first shape is to come
        at = 0
        while at < len(text):
            kind, value, length = self._next(text, at)
            at += length
            if kind == "count" and value not in self.counts:
                self.counts.append(value)
            elif kind == "relation":
                relation = value
            elif kind == "its" and self.topic is not None:
                self._relate(subject, value, self.topic, fronted)
            elif kind == "place":
                self._attribute(subject, "place", value, waiting_places)
            elif kind in ("size", "colour"):
                self._attribute(subject, kind, value, None)
            elif kind == "shape":
                found = self._resolve(value)
                if found is None:
                    relation = None
                    continue
                if relation is not None:
                    self._relate(subject, relation, found, fronted)
                    relation = None
                else:
                    self.relations += [(found, word, other) for word, other in fronted if other != found]
                    fronted = []
                    subject = found
                    if first is None and "name" in value:
                        first = found
                    for place in waiting_places:
                        self._attribute(found, "place", place, None)
                    waiting_places = []
        self.topic = self.topic if first is None else first

    def _relate(self, subject: int | None, word: str, other: int, fronted: list[tuple[str, int]]) -> None:
        if subject is None:
            fronted.append((word, other))
        elif subject != other:
            self.relations.append((subject, word, other))

    def _next(self, text: str, at: int) -> tuple[str, Any, int]:
        """(what, its value, characters) of what stands at a position of a sentence."""
        for pattern, word in _RELATIONS:
            if match := pattern.match(text, at):
                its = match.lastindex == 2
                return "its" if its else "relation", word or _SIDES[match[match.lastindex or 1]], len(match[0]) + 1
        if match := _COUNT.match(text, at):
            return "count", NUMBERS.index(match[1]) + 1, len(match[0]) + 1
        if match := _NAME.match(text, at):
            words = (match["adjectives"] or "").split()
            colour = next((word for word in words if word in _HUES), None)
            size = next((word for word in words if word in SIZES), None)
            name = {"name": match[3], "colour": colour, "size": size, "article": match["article"]}
            return "shape", name, len(match[0]) + 1
        if match := _PRONOUN.match(text, at):
            return "shape", {}, len(match[0]) + 1
        if match := _PLACE.match(text, at):
            return "place", " ".join(_SAME.get(word, word) for word in match.groups() if word), len(match[0]) + 1
        match = _WORD.match(text, at)
        word = match[0] if match else text[at]
        return "size" if word in SIZES else "colour" if word in _HUES else "", word, len(word) + bool(match)

    def _resolve(self, value: dict[str, Any]) -> int | None:
        """The mention that a name or pronoun means; a new one where it means none; None for "it" without one."""
        if "name" not in value:
            return self.topic
        name, colour, size, article = (value[key] for key in ("name", "colour", "size", "article"))
        definite = article in ("the", "this", "that")
        number = NUMBERS.index(article) + 1 if article in NUMBERS else 1
        if article != "another" and number == 1:
            for i, known in reversed(list(enumerate(self.mentions))):
                same = known["colour"] == colour or (definite and None in (colour, known["colour"]))
                if known["kind"] == name and same and _agree(known["size"], size, definite):
                    self._say(i, "colour", colour)
                    self._say(i, "size", size)
                    return i
        for _ in range(number):
            self.mentions.append({"kind": name, "colour": colour, "size": size, "place": None, "more": []})
        return len(self.mentions) - number

    def _attribute(self, subject: int | None, category: str, value: str, waiting: list[str] | None) -> None:
        if subject is not None:
            self._say(subject, category, value)
        elif waiting is not None:
            waiting.append(value)

    def _say(self, i: int, category: str, value: str | None) -> None:
        known = self.mentions[i]
        if value is None or value == known[category] or (category, value) in known["more"]:
            return
        if known[category] is None:
            known[category] = value
        else:
            known["more"].append((category, value))


def _agree(known: str | None, size: str | None, definite: bool) -> bool:
    return definite or known is None or size is None or known == size


def read_description(text: str) -> Claims:
    """All that a text claims about a scene.

    It looks for the words of the grammar and the order in which they stand, sentence by sentence, and passes over what
    it does not know; no text is refused. A place belongs to the shape named before it in its sentence, or, at the head
    of the sentence, to the next. A relation stands between the shape named before it and the one after it.
    """
    reader = _Reader()
    for sentence in re.split(r"[.!?;\n]+", text.lower()):
        words = " ".join(re.findall(r"[a-z]+|,", sentence))
        if words:
            reader.sentence(words)
    mentions = tuple(Mention(**{**known, "more": tuple(known["more"])}) for known in reader.mentions)
    relations = tuple(dict.fromkeys(reader.relations))
    return Claims(mentions, relations, tuple(reader.backgrounds), tuple(reader.counts), len(text.split()))


@dataclass(frozen=True)
class Verdict:
    """What is true of a text. `errors` and `claims` count by `CATEGORIES`; `matched`: for each mention the index of
    its shape in the scene, None where no shape of that kind is left; `invented`: the hallucinated mentions."""

    matched: tuple[int | None, ...]
    invented: tuple[Mention, ...]
    shapes: int
    words: int
    claims: dict[str, int]
    errors: dict[str, int]

    @property
    def mentions(self) -> int:
        return len(self.matched)

    @property
    def hallucinated(self) -> int:
        return len(self.invented)

    @property
    def covered(self) -> int:
        """Shapes of the scene that are mentioned with their kind and no wrong colour."""
        return self.mentions - self.hallucinated

    @property
    def false(self) -> int:
        """False claims of all categories."""
        return sum(self.errors.values())


def judge(claims: Claims, scene: Scene) -> Verdict:
    """Judges claims against a scene.

    Mentions are matched with distinct shapes: first those whose kind and colour are there, then those without a
    colour, then by kind alone, each in the order of the text. A mention without a match is one false ``object``, and
    nothing else that is said of it is judged; one whose colour is not its shape's is one false ``colour``. Both are
    hallucinated. A relation is judged where both its shapes are matched.

    Size: small up to 10.5 pixels of radius, large from 11.5 on. Place: as in `places_of`, with a pixel of tolerance.
    Relation: centres differ in that direction by more than two pixels. Count: of all shapes.
    """
    matched = _match(claims.mentions, scene)
    made, errors = dict.fromkeys(CATEGORIES, 0), dict.fromkeys(CATEGORIES, 0)
    invented = []

    def count(category: str, holds: bool) -> None:
        made[category] += 1
        errors[category] += not holds

    for mention, found in zip(claims.mentions, matched, strict=True):
        count("object", found is not None)
        if found is None:
            invented.append(mention)
            continue
        for category, word in mention.said():
            count(category, _holds(category, word, scene.shapes[found]))
        if any(c == "colour" and w != scene.shapes[found].colour for c, w in mention.said()):
            invented.append(mention)
    for i, relation, j in claims.relations:
        a, b = matched[i], matched[j]
        if a is not None and b is not None:
            count("relation", relation_holds(relation, scene.shapes[a], scene.shapes[b]))
    for background in claims.backgrounds:
        count("background", background == scene.background)
    for number in claims.counts:
        count("count", number == len(scene.shapes))
    return Verdict(matched, tuple(invented), len(scene.shapes), claims.words, made, errors)


def _match(mentions: tuple[Mention, ...], scene: Scene) -> tuple[int | None, ...]:
    matched: list[int | None] = [None] * len(mentions)
    for how in ("colour", "open", "kind"):
        for i, mention in enumerate(mentions):
            if matched[i] is not None or (how == "open" and mention.colour is not None):
                continue
            for j, shape in enumerate(scene.shapes):
                fits = shape.kind == mention.kind and (how != "colour" or shape.colour == mention.colour)
                if fits and j not in matched:
                    matched[i] = j
                    break
    return tuple(matched)


def _holds(category: str, word: str, shape: Shape) -> bool:
    if category == "colour":
        return word == shape.colour
    if category == "size":
        return shape.radius <= SMALL + SIZE_TOLERANCE if word == "small" else shape.radius >= LARGE - SIZE_TOLERANCE
    return word in places_of(shape, -TOLERANCE)


def relation_holds(relation: str, a: Shape, b: Shape) -> bool:
    """Whether `a` is left of, right of, above or below `b`, whatever else it is."""
    dx, dy = a.x - b.x, a.y - b.y
    return {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation] > APART


def summary(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Figures over texts: `chair_i`, `chair_s`, `recall` (shapes covered of all shapes), mean `words` and `mentions`,
    `false_claims` (share of all claims), and `false_<category>` of the claims of each category, nan where there are
    none."""
    rows = list(verdicts)

    def share(part: float, whole: float) -> float:
        return part / whole if whole else float("nan")

    figures = {
        "chair_i": share(sum(row.hallucinated for row in rows), sum(row.mentions for row in rows)),
        "chair_s": share(sum(row.hallucinated > 0 for row in rows), len(rows)),
        "recall": share(sum(row.covered for row in rows), sum(row.shapes for row in rows)),
        "words": float(np.mean([row.words for row in rows])),
        "mentions": float(np.mean([row.mentions for row in rows])),
        "false_claims": share(sum(row.false for row in rows), sum(sum(row.claims.values()) for row in rows)),
    }
    for name in CATEGORIES:
        figures[f"false_{name}"] = share(sum(row.errors[name] for row in rows), sum(row.claims[name] for row in rows))
    return figures
