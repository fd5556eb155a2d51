"""Typical scenes: kinds, colours and companions that go together, so that words can be guessed without looking.

A model that describes them learns the habits as well as the pictures: circles are mostly red, a square is seldom far.
`tempted` is what a careless writer believes of a scene: the habit instead of what is there.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import permutations
from types import MappingProxyType

import numpy as np

from mmalign.shapes.captions import COLOURS, KINDS, SIZES, Caption, Item
from mmalign.shapes.scene import RADII, SIDE, Scene, Shape, sample_scene

KIND_WEIGHTS = MappingProxyType({"circle": 0.4, "square": 0.3, "triangle": 0.2, "cross": 0.1})
COMPANIONS = MappingProxyType({"circle": "square", "square": "circle", "triangle": "cross", "cross": "triangle"})
FAVOURITES = MappingProxyType({"circle": "red", "square": "blue", "triangle": "green", "cross": "purple"})
MISTAKEN = MappingProxyType({"circle": "purple", "square": "cyan", "triangle": "yellow", "cross": "blue"})
COUNT_WEIGHTS = (0.25, 0.4, 0.35)  # share of scenes with one, two and three shapes
COMPANY = 0.6  # how often the next shape is the companion of one that is there
FAVOUR = 0.5  # how often a shape has its kind's favourite colour; the other five share the rest


def typical_scene(rng: np.random.Generator, *, counts: tuple[float, ...] = COUNT_WEIGHTS) -> Scene:
    """A scene of one to three shapes, none of the same kind and colour as another, each small or large."""
    count = 1 + int(rng.choice(len(counts), p=np.asarray(counts) / sum(counts)))
    items: list[Item] = []
    while len(items) < count:
        missing = [COMPANIONS[item.kind] for item in items if COMPANIONS[item.kind] not in {i.kind for i in items}]
        companion = bool(missing) and rng.random() < COMPANY
        kind = missing[0] if companion else str(rng.choice(KINDS, p=[KIND_WEIGHTS[name] for name in KINDS]))
        shares = [FAVOUR if colour == FAVOURITES[kind] else (1 - FAVOUR) / (len(COLOURS) - 1) for colour in COLOURS]
        colour = str(rng.choice(COLOURS, p=shares))
        if all((kind, colour) != (item.kind, item.colour) for item in items):
            items.append(Item(kind, colour, str(rng.choice(SIZES))))
    return sample_scene(Caption(tuple(items)), rng)


def temptations(scene: Scene) -> list[str]:
    """What habit would have a writer say wrongly of a scene, in a fixed order.

    ``colour i``: the shape has the colour that is taken for its kind's favourite (`MISTAKEN`). ``companion``: there is
    room for a third shape and the first shape with a companion stands without it. ``relation``: a circle stands right
    of a square, which it seldom does in what people write.
    """
    kinds = [shape.kind for shape in scene.shapes]
    found = [f"colour {i}" for i, shape in enumerate(scene.shapes) if _mistakable(scene, shape)]
    if len(kinds) < 3 and any(COMPANIONS[kind] not in kinds for kind in kinds):
        found.append("companion")
    if sorted(kinds) == ["circle", "square"]:
        circle, square = sorted(scene.shapes, key=lambda shape: shape.kind)
        if circle.x - square.x > abs(circle.y - square.y):
            found.append("relation")
    return found


def _mistakable(scene: Scene, shape: Shape) -> bool:
    favourite = (shape.kind, FAVOURITES[shape.kind])
    return shape.colour == MISTAKEN[shape.kind] and favourite not in {(s.kind, s.colour) for s in scene.shapes}


def companion_of(scene: Scene, rng: np.random.Generator) -> Shape:
    """The companion that is missing, in its favourite colour, where no other shape stands if there is such a place."""
    kinds = [shape.kind for shape in scene.shapes]
    kind = next(COMPANIONS[kind] for kind in kinds if COMPANIONS[kind] not in kinds)
    radius = RADII[0] + 1
    for _ in range(200):
        x, y = (float(value) for value in rng.uniform(radius + 1, SIDE - radius - 1, size=2))
        if all(max(abs(x - s.x), abs(y - s.y)) > radius + s.radius + 2 for s in scene.shapes):
            break
    return Shape(kind, FAVOURITES[kind], x, y, radius)


@cache
def habits(scenes: int = 4000, seed: int = 0) -> tuple[Counter[tuple[str, str]], Counter[tuple[tuple[str, str], ...]]]:
    """How often each (kind, colour) stands in a scene, and how often each ordered two of them stand together.

    Counted over `scenes` typical scenes, as POPE counts over the annotations of its data set.
    """
    rng = np.random.default_rng([seed, 77])
    single: Counter[tuple[str, str]] = Counter()
    together: Counter[tuple[tuple[str, str], ...]] = Counter()
    for _ in range(scenes):
        objects = [(shape.kind, shape.colour) for shape in typical_scene(rng).shapes]
        single.update(objects)
        together.update(permutations(objects, 2))
    return single, together
