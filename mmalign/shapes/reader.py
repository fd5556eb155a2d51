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
from mmalign.shapes.fitting import MIN_MATCH, Fit, cover_of, explain
from mmalign.shapes.pieces import cut, nearest_colour
from mmalign.shapes.scene import GREYS, LARGE, RADII, SIDE, SMALL, Shape, place_of, relation_of

MIN_SATURATION = 0.25  # a paler piece has no colour
BACKGROUND_TOLERANCE = 0.17  # how far a background may drift from its grey
MAX_TINT = 0.15  # and how far its channels from one another
MESS_SCALE = 0.3  # an RGB error of this size spoils its pixel completely
MESS_AREA = 150.0  # this many spoilt pixels of 64x64 bring the cleanliness from 1 to 1/e
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
    rgb: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def proper(self) -> bool:
        """Whether this is a shape of this world: of a kind, of a colour, and not much smaller than the smallest."""
        return self.kind is not None and self.colour is not None and self.radius >= RADII[0] - 1


@dataclass(frozen=True)
class Reading:
    """What an image shows: `shapes` from left to right, `background` None where it is none of the three.

    `ground`: RGB of the background in [0, 1]. `mess`: as in `read`, with or without a proper shape.
    """

    shapes: tuple[SeenShape, ...]
    background: str | None
    cleanliness: float
    ground: tuple[float, float, float] = (0.0, 0.0, 0.0)
    mess: float = 0.0


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


def read(image: np.ndarray, side: int = SIDE) -> Reading:
    """Reads one image: uint8 RGB [height, width, 3]; any size but side x side is first brought there by area averaging.

    `side`, at most 64, is how many pixels across the image is looked at. One that was drawn smaller than 64x64 is best
    read at its own side: enlarged, its outlines are softer than any drawing's. Places are in the 64x64 frame all the
    same, and areas of mess in its pixels.

    Deterministic. Cleanliness is exp(-mess / 150), where the mess sums min(1, (RGB error / 0.3) ** 2) over the pixels
    of the difference between the image and the redrawn reading. Redrawn are proper shapes alone: an object without a
    kind or a colour, or smaller than any shape of this world, is mess. Without any proper shape the cleanliness is 0.
    Raises ValueError for anything but a uint8 RGB array, and for a side above 64.
    """
    if not 0 < side <= SIDE:
        raise ValueError(f"images are read at 1 to {SIDE} pixels across, not {side}; larger ones are brought there.")
    pixels = _canonical(image, side)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)
    offset = pixels - ground
    contrast = np.sqrt((offset**2).sum(-1))
    pieces = cut(offset, contrast, pixels)
    fits = [fit for piece in pieces for fit in explain(piece, pieces, offset)]
    seen = [_seen(fit, ground, SIDE / side) for fit in fits]
    proper = [fit for fit, shape in zip(fits, seen, strict=True) if shape.proper]
    mess = _mess(proper, offset)
    clean = float(np.exp(-mess / MESS_AREA)) if proper else 0.0
    shapes = tuple(sorted(seen, key=lambda shape: shape.x))
    return Reading(shapes, _background(border, ground), clean, tuple(ground.tolist()), mess)


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


def _canonical(image: np.ndarray, side: int) -> np.ndarray:
    """Float RGB in [0, 1], [side, side, 3]."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"the reader needs a uint8 RGB image [height, width, 3], not {image.dtype} {list(image.shape)}; convert it."
        )
    pixels = image / 255.0
    if image.shape[:2] == (side, side):
        return pixels
    rows, columns = _averages(image.shape[0], side), _averages(image.shape[1], side)
    return np.einsum("yh,hwc,xw->yxc", rows, pixels, columns, optimize=True)


def _averages(old: int, new: int) -> np.ndarray:
    """Weights [new, old] of area averaging: how much of each new pixel each old one covers."""
    edges, source = np.arange(new + 1) * old / new, np.arange(old)
    overlap = np.minimum(edges[1:, None], source + 1) - np.maximum(edges[:-1, None], source)
    return np.clip(overlap, 0, None) * new / old


def _background(border: np.ndarray, ground: np.ndarray) -> str | None:
    name = min(GREYS, key=lambda grey: abs(GREYS[grey] - ground.mean()))
    plain = np.ptp(ground) <= MAX_TINT and (abs(border - ground).max(-1) < 0.15).mean() >= 0.6
    return name if plain and abs(GREYS[name] - ground.mean()) <= BACKGROUND_TOLERANCE else None


def _seen(fit: Fit, ground: np.ndarray, scale: float) -> SeenShape:
    rgb = np.clip(ground + fit.offset, 0, 1)
    saturation = float(np.ptp(rgb) / max(rgb.max(), 1e-6))
    clear = saturation >= MIN_SATURATION and np.ptp(rgb) >= 0.15
    colour = nearest_colour(rgb) if clear else None
    kind = fit.kind if fit.match >= MIN_MATCH else None
    x, y, radius = map(float, scale * fit.place)
    return SeenShape(kind, colour, x, y, radius, saturation, fit.match, tuple(rgb.tolist()))


def _mess(fits: list[Fit], offset: np.ndarray) -> float:
    """How many pixels of the 64x64 frame differ from the drawing of these shapes, less where they differ little."""
    drawn, side = np.zeros_like(offset), len(offset)
    grid = np.arange(side) + 0.5
    for fit in fits:
        x, y, radius = fit.place
        left, right, top, bottom = np.clip(
            np.rint([x - radius - 1, x + radius + 1, y - radius - 1, y + radius + 1]).astype(int), 0, side
        )
        cover = cover_of(fit.kind, fit.place, grid[left:right], grid[top:bottom])[..., None]
        patch = drawn[top:bottom, left:right]
        patch += cover * (fit.offset - patch)
    error = abs(offset - drawn).max(-1)
    return float(np.minimum(1.0, (error / MESS_SCALE) ** 2).sum() * (SIDE / side) ** 2)
