"""A true description and its false twin, which differ in a known number of claims and nowhere else."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmalign.shapes.captions import BACKGROUNDS, COLOURS, KINDS, SIZES
from mmalign.shapes.claims import CATEGORIES, judge, read_description
from mmalign.shapes.descriptions import OPPOSITE, PLACES, Beliefs, Description, Slot, beliefs_of, write
from mmalign.shapes.scene import Scene
from mmalign.shapes.typical import COMPANIONS, FAVOURITES

EXTRA = "extra"  # a sentence about a shape that is not there, in place of that about the background
ERRORS = (*CATEGORIES, EXTRA)
_TRIES = 40

Span = tuple[int, int]


@dataclass(frozen=True)
class Twins:
    """Spans are characters (start, end), end exclusive, of what is said in other words in the other text."""

    chosen: str
    rejected: str
    chosen_spans: tuple[Span, ...]
    rejected_spans: tuple[Span, ...]
    errors: tuple[str, ...]


def corrupt(scene: Scene, seed: Any, errors: int = 1, kinds: Collection[str] = ERRORS) -> Twins:
    """A description of the scene that is true, and one with exactly `errors` false claims, as `claims.judge` counts.

    Both have the same sentences, and lengths within eight words of each other. ``object``: a shape is called by a kind
    that is not in the scene, at every mention. ``extra``: one more shape, of such a kind, likely by habit. The other
    names: another word for what the category says. Drawn at random from `kinds`, among what the description speaks of.

    Raises:
        ValueError: an unknown name in `kinds`, or no description of this scene holds so many such claims.
    """
    if unknown := sorted(set(kinds) - set(ERRORS)):
        raise ValueError(f"no kind of error is called {', '.join(unknown)}; there are: {', '.join(ERRORS)}")
    rng = np.random.default_rng(seed)
    truth = beliefs_of(scene)
    for _ in range(_TRIES):
        writing = int(rng.integers(2**32))
        true = write(truth, writing)
        chosen = _choose(true, errors, kinds, rng)
        if chosen is None:
            continue
        beliefs = truth
        for category, about in chosen:
            if category != EXTRA:
                beliefs = _falsified(beliefs, scene, category, about, rng)
        twins = _twins(true, write(beliefs, writing), scene, chosen, rng)
        verdict = judge(read_description(twins.rejected), scene)
        wanted = sorted("object" if name == EXTRA else name for name in twins.errors)
        if wanted == sorted(name for name in CATEGORIES for _ in range(verdict.errors[name])):
            return twins
    raise ValueError(f"found no description of this scene with {errors} false claims among {', '.join(sorted(kinds))}")


def _choose(
    true: Description, errors: int, kinds: Collection[str], rng: np.random.Generator
) -> list[tuple[str, tuple[int, ...]]] | None:
    """So many different claims of a description; None if it has fewer. Nothing else is false of a wrong object."""
    said = dict.fromkeys((_category(slot), slot.about) for slot in true.slots)
    claims = [claim for claim in said if claim[0] in kinds]
    if EXTRA in kinds and true.sentences[-1][2] == "background":
        claims.append((EXTRA, ()))
    chosen: list[tuple[str, tuple[int, ...]]] = []
    for i in rng.permutation(len(claims)):
        category, about = claims[i]
        wrong = {thing for name, things in chosen if name == "object" for thing in things}
        spoilt = category == "object" and any(set(about) & set(things) for _, things in chosen)
        if len(chosen) == errors or spoilt or wrong & set(about):
            continue
        if (category, about[::-1]) in chosen or (category == EXTRA and ("background", ()) in chosen):
            continue
        if category == "background" and (EXTRA, ()) in chosen:
            continue
        chosen.append(claims[i])
    return chosen if len(chosen) == errors else None


def _category(slot: Slot) -> str:
    return "object" if slot.category == "kind" else slot.category


def _falsified(
    beliefs: Beliefs, scene: Scene, category: str, about: tuple[int, ...], rng: np.random.Generator
) -> Beliefs:
    """The beliefs with one word changed."""
    if category == "background":
        return replace(beliefs, background=_other(BACKGROUNDS, beliefs.background, rng))
    if category == "count":
        return replace(beliefs, count=max(1, beliefs.count + int(rng.choice([-1, 1]))))
    if category == "relation":
        i, j = about
        word = OPPOSITE[beliefs.relations[i, j]]
        return replace(beliefs, relations={**beliefs.relations, (i, j): word, (j, i): OPPOSITE[word]})
    things = list(beliefs.things)
    thing = things[about[0]]
    if category == "object":
        thing = replace(thing, kind=_absent_kind(scene, rng))
    elif category == "colour":
        thing = replace(thing, colour=_other(COLOURS, thing.colour, rng))
    elif category == "size":
        thing = replace(thing, size=_other(SIZES, thing.size, rng))
    else:
        assert thing.place is not None
        same_length = [place for place in PLACES if (" " in place) == (" " in thing.place)]
        thing = replace(thing, place=_other(tuple(same_length), thing.place, rng))
    things[about[0]] = thing
    return replace(beliefs, things=tuple(things))


def _other(words: tuple[str, ...], word: str | None, rng: np.random.Generator) -> str:
    return str(rng.choice([each for each in words if each != word]))


def _absent_kind(scene: Scene, rng: np.random.Generator) -> str:
    """A kind that the scene has not, more often than not a companion of what it has."""
    there = [shape.kind for shape in scene.shapes]
    absent = [kind for kind in KINDS if kind not in there]
    likely = [COMPANIONS[kind] for kind in there if COMPANIONS[kind] in absent]
    return str(rng.choice(likely if likely and rng.random() < 0.7 else absent))


def _twins(
    true: Description, false: Description, scene: Scene, chosen: list[tuple[str, tuple[int, ...]]],
    rng: np.random.Generator,
) -> Twins:  # fmt: skip
    spans: tuple[list[Span], list[Span]] = ([], [])
    for a, b in zip(true.slots, false.slots, strict=True):
        if true.text[a.start : a.end].lower() != false.text[b.start : b.end].lower():
            spans[0].append((a.start, a.end))
            spans[1].append((b.start, b.end))
    rejected = false.text
    if (EXTRA, ()) in chosen:
        kind = _absent_kind(scene, rng)
        colour = FAVOURITES[kind] if rng.random() < 0.7 else str(rng.choice(COLOURS))
        start = false.sentences[-1][0]
        rejected = false.text[:start] + f"There is also a {rng.choice(SIZES)} {colour} {kind} in the picture."
        spans[0].append(true.sentences[-1][:2])
        spans[1].append((start, len(rejected)))
    return Twins(true.text, rejected, tuple(spans[0]), tuple(spans[1]), tuple(name for name, _ in chosen))
