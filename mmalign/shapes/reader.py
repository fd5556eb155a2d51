"""Reads an image of the shapes world back: which shapes and colours, where, how large, on which background, how clean.

Analysis by synthesis, from the pixels alone: the border gives the background, what differs from it is cut into
connected pieces of one hue, and every piece is fitted with each kind of shape as `scene.render` would draw it
(Gauss-Newton over centre and radius, on the share of the shape's colour in each pixel). The kind with the smallest
residual wins. Whatever the fitted shapes leave unexplained lowers the cleanliness.

Two answers of `None` keep the reader honest about images that a model drew: a piece that no kind fits has no kind, and
a piece without a clear hue has no colour. Both count as objects, as they would for a person.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from mmalign.shapes.captions import Caption, Item
from mmalign.shapes.fitting import GRID, MIN_MATCH, Fit, cover_of, explain
from mmalign.shapes.pieces import cut, nearest_colour
from mmalign.shapes.scene import GREYS, LARGE, RADII, SIDE, SMALL, Shape, place_of, relation_of

MIN_SATURATION = 0.25  # a paler piece has no colour
BACKGROUND_TOLERANCE = 0.17  # how far a background may drift from its grey
MAX_TINT = 0.15  # and how far its channels from one another
MESS_SCALE = 0.3  # an RGB error of this size spoils its pixel completely
MESS_AREA = 150.0  # this many spoilt pixels bring the cleanliness from 1 to 1/e
SIZE_TOLERANCE = 0.5  # pixels


@dataclass(frozen=True)
class SeenShape:
    """One object, in pixels of the 64x64 frame; `cleanliness` is its overlap (IoU) with the shape of that radius."""

    kind: str | None
    colour: str | None
    x: float
    y: float
    radius: float
    saturation: float
    cleanliness: float

    @property
    def proper(self) -> bool:
        """Whether this is a shape of this world: of a kind, of a colour, and not much smaller than the smallest."""
        return self.kind is not None and self.colour is not None and self.radius >= RADII[0] - 1


@dataclass(frozen=True)
class Reading:
    """What an image shows: `shapes` from left to right, `background` None where it is none of the three."""

    shapes: tuple[SeenShape, ...]
    background: str | None
    cleanliness: float


@dataclass(frozen=True)
class Fidelity:
    """Whether an image keeps what its caption asks; None where the caption does not ask.

    `shape_colour`: the objects are exactly the asked kinds and colours, none missing and none besides. `size`,
    `position` and `relation` look at the asked objects, whatever else is there, and are False when one is missing.
    """

    shape_colour: bool
    count: bool
    size: bool | None
    position: bool | None
    relation: bool | None
    background: bool | None

    @property
    def everything(self) -> bool:
        return all(part is not False for part in vars(self).values())


def read(image: np.ndarray) -> Reading:
    """Reads one image: uint8 RGB [height, width, 3]; any size but 64x64 is first brought there by area averaging.

    Deterministic. Cleanliness is exp(-mess / 150), where the mess sums min(1, (RGB error / 0.3) ** 2) over the pixels
    of the difference between the image and the redrawn reading. Redrawn are proper shapes alone: an object without a
    kind or a colour, or smaller than any shape of this world, is mess. Without any proper shape the cleanliness is 0.
    Raises ValueError for anything but a uint8 RGB array.
    """
    pixels = _canonical(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)
    offset = pixels - ground
    contrast = np.sqrt((offset**2).sum(-1))
    pieces = cut(offset, contrast, pixels)
    fits = [fit for piece in pieces for fit in explain(piece, pieces, offset)]
    seen = [_seen(fit, ground) for fit in fits]
    proper = [fit for fit, shape in zip(fits, seen, strict=True) if shape.proper]
    clean = _cleanliness(proper, offset) if proper else 0.0
    return Reading(tuple(sorted(seen, key=lambda shape: shape.x)), _background(border, ground), clean)


def fidelity(caption: Caption, reading: Reading) -> Fidelity:
    """Judges a reading against its caption; sizes have half a pixel of tolerance."""
    asked = sorted((item.kind, item.colour) for item in caption.items)
    seen = sorted((shape.kind or "", shape.colour or "") for shape in reading.shapes)
    wanted = [shape for shape in reading.shapes if (shape.kind, shape.colour) in asked]
    matches = [
        shapes
        for shapes in permutations(wanted, len(caption.items))
        if all((s.kind, s.colour) == (i.kind, i.colour) for s, i in zip(shapes, caption.items, strict=True))
    ]
    size = position = relation = background = None
    if any(item.size for item in caption.items):
        size = any(all(map(_right_size, caption.items, shapes)) for shapes in matches)
    if caption.position:
        position = any(place_of(shapes[0].x, shapes[0].y) == caption.position for shapes in matches)
    if caption.relation:
        relation = any(relation_of(_drawn(m[0]), _drawn(m[1])) == caption.relation for m in matches)
    if caption.background:
        background = reading.background == caption.background
    return Fidelity(asked == seen, len(asked) == len(seen), size, position, relation, background)


def _right_size(item: Item, shape: SeenShape) -> bool:
    if item.size == "small":
        return shape.radius <= SMALL + SIZE_TOLERANCE
    return item.size is None or shape.radius >= LARGE - SIZE_TOLERANCE


def _drawn(shape: SeenShape) -> Shape:
    assert shape.kind and shape.colour  # it matched an item of a caption
    return Shape(shape.kind, shape.colour, shape.x, shape.y, shape.radius, shape.saturation)


def _canonical(image: np.ndarray) -> np.ndarray:
    """Float RGB in [0, 1] at 64x64."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"the reader needs a uint8 RGB image [height, width, 3], not {image.dtype} {list(image.shape)}; convert it."
        )
    pixels = image / 255.0
    if image.shape[:2] == (SIDE, SIDE):
        return pixels
    return np.einsum("yh,hwc,xw->yxc", _averages(image.shape[0]), pixels, _averages(image.shape[1]), optimize=True)


def _averages(side: int) -> np.ndarray:
    """Weights [64, side] of area averaging: how much of each new pixel each old one covers."""
    edges, source = np.arange(SIDE + 1) * side / SIDE, np.arange(side)
    overlap = np.minimum(edges[1:, None], source + 1) - np.maximum(edges[:-1, None], source)
    return np.clip(overlap, 0, None) * SIDE / side


def _background(border: np.ndarray, ground: np.ndarray) -> str | None:
    name = min(GREYS, key=lambda grey: abs(GREYS[grey] - ground.mean()))
    plain = np.ptp(ground) <= MAX_TINT and (abs(border - ground).max(-1) < 0.15).mean() >= 0.6
    return name if plain and abs(GREYS[name] - ground.mean()) <= BACKGROUND_TOLERANCE else None


def _seen(fit: Fit, ground: np.ndarray) -> SeenShape:
    rgb = np.clip(ground + fit.offset, 0, 1)
    saturation = float(np.ptp(rgb) / max(rgb.max(), 1e-6))
    clear = saturation >= MIN_SATURATION and np.ptp(rgb) >= 0.15
    colour = nearest_colour(rgb) if clear else None
    kind = fit.kind if fit.match >= MIN_MATCH else None
    x, y, radius = map(float, fit.place)
    return SeenShape(kind, colour, x, y, radius, saturation, fit.match)


def _cleanliness(fits: list[Fit], offset: np.ndarray) -> float:
    drawn = np.zeros_like(offset)
    for fit in fits:
        x, y, radius = fit.place
        left, right, top, bottom = np.clip(
            np.rint([x - radius - 1, x + radius + 1, y - radius - 1, y + radius + 1]).astype(int), 0, SIDE
        )
        cover = cover_of(fit.kind, fit.place, GRID[left:right], GRID[top:bottom])[..., None]
        patch = drawn[top:bottom, left:right]
        patch += cover * (fit.offset - patch)
    error = abs(offset - drawn).max(-1)
    mess = np.minimum(1.0, (error / MESS_SCALE) ** 2).sum()
    return float(np.exp(-mess / MESS_AREA))
