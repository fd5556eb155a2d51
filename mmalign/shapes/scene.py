"""Scenes of the shapes world: one to three coloured shapes on a plain background, drawn at 64x64.

Coordinates are pixels with the origin at the top left; `radius` is half the side of a shape's bounding box.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

from mmalign.shapes.captions import COLOURS, Caption

SIDE = 64
HUES = dict(zip(COLOURS, (0.0, 52.0, 130.0, 183.0, 228.0, 288.0), strict=True))  # degrees
GREYS = {"white": 0.97, "grey": 0.62, "black": 0.06}
RADII = (8.0, 16.0)
SMALL, LARGE = 10.0, 12.0  # a small shape has radius <= SMALL, a large one >= LARGE
SATURATION = (0.55, 0.95)
CROSS_ARM = 0.36  # half the width of a cross's arm, as a share of its radius


@dataclass(frozen=True)
class Shape:
    kind: str
    colour: str
    x: float
    y: float
    radius: float
    saturation: float = 0.85

    @property
    def rgb(self) -> np.ndarray:
        """Colour in [0, 1]; all hues are drawn at one HSV value, so saturation is the only other freedom."""
        return np.array(colorsys.hsv_to_rgb(HUES[self.colour] / 360, self.saturation, 0.88))


@dataclass(frozen=True)
class Scene:
    shapes: tuple[Shape, ...]
    background: str


def signed_distance(kind: str, dx: np.ndarray, dy: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Distance in pixels to the outline of a shape centred at 0, negative inside (a bound near corners)."""
    if kind == "circle":
        return np.hypot(dx, dy) - radius
    if kind == "square":
        return np.maximum(abs(dx), abs(dy)) - radius
    if kind == "triangle":  # apex up, base and height 2 * radius
        slant = (2 * abs(dx) - dy - radius) / np.sqrt(5.0)
        return np.maximum(slant, dy - radius)
    if kind == "cross":
        arm = CROSS_ARM * radius
        upright = np.maximum(abs(dx) - arm, abs(dy) - radius)
        level = np.maximum(abs(dx) - radius, abs(dy) - arm)
        return np.minimum(upright, level)
    raise ValueError(f"no shape is called {kind!r}")


def render(scene: Scene, side: int = SIDE) -> np.ndarray:
    """Draws a scene: uint8 RGB [side, side, 3], edges one pixel soft."""
    scale = side / SIDE
    grid = (np.arange(side) + 0.5) / scale
    image = np.full((side, side, 3), GREYS[scene.background])
    for shape in scene.shapes:
        distance = signed_distance(shape.kind, grid[None, :] - shape.x, grid[:, None] - shape.y, shape.radius)
        cover = np.clip(0.5 - distance * scale, 0.0, 1.0)[..., None]
        image = image * (1 - cover) + shape.rgb * cover
    return np.round(image * 255).astype(np.uint8)


def _radius(size: str | None, count: int, rng: np.random.Generator) -> float:
    low, high = RADII[0], (RADII[1], 14.5, 13.0)[count - 1]
    if size == "small":
        high = SMALL - 0.5  # half a pixel of room, so that a reader can tell
    elif size == "large":
        low = LARGE + 0.5
    return float(rng.uniform(low, high))


def _within(caption: Caption, shapes: list[Shape]) -> bool:
    """True when positions and relations hold and no two bounding boxes come within two pixels."""
    for i, a in enumerate(shapes):
        for b in shapes[:i]:
            if max(abs(a.x - b.x), abs(a.y - b.y)) < a.radius + b.radius + 2:
                return False
    if caption.position and place_of(shapes[0].x, shapes[0].y, margin=1.0) != caption.position:
        return False
    return not (caption.relation and relation_of(shapes[0], shapes[1]) != caption.relation)


def place_of(x: float, y: float, margin: float = 0.0) -> str | None:
    """The position word for a centre: the middle box, else the side that the centre is farthest towards."""
    dx, dy = x - SIDE / 2, y - SIDE / 2
    if max(abs(dx), abs(dy)) <= 7 - margin:
        return "in the centre"
    if abs(abs(dx) - abs(dy)) <= 2 * margin or max(abs(dx), abs(dy)) <= 7 + margin:
        return None if margin else _side(dx, dy)
    return _side(dx, dy)


def _side(dx: float, dy: float) -> str:
    if abs(dx) >= abs(dy):
        return "on the left" if dx < 0 else "on the right"
    return "at the top" if dy < 0 else "at the bottom"


def relation_of(a: Shape, b: Shape) -> str:
    """How `a` stands to `b`, along the axis on which they are farther apart."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def sample_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """Draws a scene that the caption describes; whatever the caption leaves open is random."""
    count = len(caption.items)
    while True:
        shapes = []
        for item in caption.items:
            radius = _radius(item.size, count, rng)
            x, y = rng.uniform(radius + 1, SIDE - radius - 1, size=2)
            saturation = float(rng.uniform(*SATURATION))
            shapes.append(Shape(item.kind, item.colour, float(x), float(y), radius, saturation))
        if _within(caption, shapes):
            break
    background = caption.background or str(rng.choice(sorted(GREYS)))
    return Scene(tuple(shapes), background)
