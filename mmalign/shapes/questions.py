"""Yes/no questions about a scene, half of each kind with the answer yes.

`existence` asks for objects (a kind in a colour) as POPE does (Li et al., Evaluating Object Hallucination in Large
Vision-Language Models, 2305.10355): as many that are there as not, those that are not drawn at random, by how
frequent they are (``popular``), or by how often they stand beside what is there (``adversarial``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmalign.shapes.captions import COLOURS, KINDS
from mmalign.shapes.claims import Claims
from mmalign.shapes.descriptions import OPPOSITE
from mmalign.shapes.scene import Scene, relation_of
from mmalign.shapes.typical import FAVOURITES, habits

SPLITS = ("random", "popular", "adversarial")
FAMILIES = (*SPLITS, "colour", "relation")
WORDS = frozenset({"is", "there", "a", "in", "the", "picture"})


@dataclass(frozen=True)
class Question:
    """`family`: one of `FAMILIES`. `yes`: the true answer."""

    text: str
    yes: bool
    family: str

    @property
    def answer(self) -> str:
        return "Yes." if self.yes else "No."


def questions(scene: Scene, family: str, seed: Any) -> list[Question]:
    """The questions of one family about a scene, as many with yes as with no, none where nothing can be asked.

    Raises:
        ValueError: no family has that name.
    """
    rng = np.random.default_rng(seed)
    if family in SPLITS:
        return existence(scene, family, rng)
    if family == "colour":
        return colour_questions(scene, rng)
    if family == "relation":
        return relation_questions(scene, rng)
    raise ValueError(f"no family of questions is called {family!r}; there are: {', '.join(FAMILIES)}")


def questions_of(claims: Claims) -> list[str]:
    """A question for each mention with a colour and each relation between two such, to which yes says that it is so."""
    named = [f"{each.colour} {each.kind}" if each.colour else "" for each in claims.mentions]
    asked = [f"Is there a {name} in the picture?" for name in named if name]
    asked += [
        f"Is the {named[i]} {relation} the {named[j]}?" for i, relation, j in claims.relations if named[i] and named[j]
    ]
    return list(dict.fromkeys(asked))


def existence(scene: Scene, split: str, rng: np.random.Generator) -> list[Question]:
    """For every shape one question after it and one after an object that is not there.

    ``random``: any absent object. ``popular``: the most frequent absent objects of `typical.habits`. ``adversarial``:
    for each shape the absent object that stands beside it most often, no object twice.
    """
    there = [(shape.kind, shape.colour) for shape in scene.shapes]
    absent = [(kind, colour) for kind in KINDS for colour in COLOURS if (kind, colour) not in there]
    absent = [absent[i] for i in rng.permutation(len(absent))]
    single, together = habits()
    if split == "popular":
        absent.sort(key=lambda each: -single[each])
    wrong: list[tuple[str, str]] = []
    for object_ in there:
        left = [each for each in absent if each not in wrong]
        if split == "adversarial":
            beside = {each: together[object_, each] for each in left}
            left.sort(key=lambda each, often=beside: -often[each])  # type: ignore[misc]
        wrong.append(left[0])
    asked = []
    for pair in zip(there, wrong, strict=True):
        for (kind, colour), yes in zip(pair, (True, False), strict=True):
            asked.append(Question(f"Is there a {colour} {kind} in the picture?", yes, split))
    return asked


def colour_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """For every kind of which there is one: its colour, and another, its kind's favourite if that is another."""
    kinds = [shape.kind for shape in scene.shapes]
    asked = []
    for shape in scene.shapes:
        if kinds.count(shape.kind) == 1:
            other = FAVOURITES[shape.kind]
            if other == shape.colour:
                other = str(rng.choice([colour for colour in COLOURS if colour != shape.colour]))
            asked += [Question(f"Is the {shape.kind} {shape.colour}?", True, "colour")]
            asked += [Question(f"Is the {shape.kind} {other}?", False, "colour")]
    return asked


def relation_questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """For every two shapes, in a random order: how the one stands to the other, and the opposite."""
    asked = []
    for i in range(len(scene.shapes)):
        for j in range(i):
            a, b = (scene.shapes[k] for k in ((i, j) if rng.random() < 0.5 else (j, i)))
            for word, yes in ((relation_of(a, b), True), (OPPOSITE[relation_of(a, b)], False)):
                text = f"Is the {a.colour} {a.kind} {word} the {b.colour} {b.kind}?"
                asked.append(Question(text, yes, "relation"))
    return asked
