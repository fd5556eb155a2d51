"""Fits the shapes that `scene.render` can draw to a piece of an image: kind, centre, radius and colour.

Images are [side, side], side being at most 64, and places are in their own pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmalign.shapes.captions import KINDS
from mmalign.shapes.pieces import components, dilated, eroded
from mmalign.shapes.scene import CROSS_ARM, SIDE, signed_distance

MIN_MATCH = 0.78  # intersection over union under which a piece is no circle, square, triangle or cross
SPLIT_MATCH = 0.85  # a piece that fits worse than this may be two shapes that touch

_AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "cross": 8 * CROSS_ARM - 4 * CROSS_ARM**2}  # over radius ** 2
_STEP = 0.25  # of the finite differences, pixels
_NUDGES = np.vstack([np.zeros(3), _STEP * np.eye(3)])


@dataclass(frozen=True)
class Fit:
    kind: str
    place: np.ndarray  # x, y, radius, in pixels
    offset: np.ndarray  # colour minus background
    match: float  # intersection over union of the drawn and the seen outline


def explain(piece: np.ndarray, pieces: list[np.ndarray], offset: np.ndarray) -> list[Fit]:
    """One fit for a piece, or several when it is better explained by shapes of one colour that touch."""
    others = [other for other in pieces if other is not piece]
    whole = _fit(piece, others, offset)
    if whole.match >= SPLIT_MATCH:
        return [whole]
    parts = _split(piece)
    if len(parts) > 1:
        fits = [_fit(part, others + [o for o in parts if o is not part], offset) for part in parts]
        if min(fit.match for fit in fits) > max(whole.match, MIN_MATCH):
            return fits
    return [whole]


def _split(piece: np.ndarray) -> list[np.ndarray]:
    """Erodes a piece until it falls apart, then grows the parts back to the whole of it."""
    core = piece
    while core.any():
        core = eroded(core)
        seeds = components(core, least=6 * (len(piece) / SIDE) ** 2)
        if len(seeds) > 1:
            break
    else:
        return [piece]
    owner = np.zeros(piece.shape, int)
    for number, seed in enumerate(seeds, 1):
        owner[seed] = number
    while True:
        before = owner.copy()
        for number in range(1, len(seeds) + 1):
            owner[dilated(owner == number) & piece & (owner == 0)] = number
        if np.array_equal(owner, before):
            return [owner == number for number in range(1, len(seeds) + 1)]


def _fit(piece: np.ndarray, others: list[np.ndarray], offset: np.ndarray) -> Fit:
    """The kind, centre and radius whose drawing comes nearest to a piece."""
    rows, columns = np.flatnonzero(piece.any(1)), np.flatnonzero(piece.any(0))
    window = np.s_[max(rows[0] - 3, 0) : rows[-1] + 4, max(columns[0] - 3, 0) : columns[-1] + 4]
    # Where another object is, this one may be hidden or not: such pixels say nothing.
    known = np.ones_like(piece)
    for other in others:
        known &= ~dilated(other) | piece
    inside, known, local = piece[window], known[window], offset[window]
    grid = np.arange(len(piece)) + 0.5
    xs, ys = grid[window[1]], grid[window[0]]
    core = eroded(inside)
    colour = np.median(local[core if core.sum() >= 5 else inside], axis=0)

    share = _share(local, colour)
    nearby = dilated(dilated(inside)) & known
    starts = {kind: _start(kind, np.clip(share, 0, 1) * nearby, xs, ys) for kind in KINDS}
    fits = {kind: _refine(kind, starts[kind], share, known, xs, ys, rounds=1) for kind in KINDS}
    best, slack = min(residual for _, residual in fits.values()), 10.0 * (len(piece) / SIDE) ** 2
    close = {kind: place for kind, (place, residual) in fits.items() if residual <= 3.0 * best + slack}
    refined = {kind: _refine(kind, place, share, known, xs, ys, rounds=4) for kind, place in close.items()}
    kind = min(refined, key=lambda kind: refined[kind][1])

    # The colour from the whole of the shape, outline included, then the last word on the place.
    cover = cover_of(kind, refined[kind][0], xs, ys) * known
    if (cover**2).sum() > 1:
        colour = (cover[..., None] * local).sum((0, 1)) / (cover**2).sum()
        share = _share(local, colour)
    place, _ = _refine(kind, refined[kind][0], share, known, xs, ys, rounds=2)
    drawn, seen = (cover_of(kind, place, xs, ys) > 0.5) & known, (share > 0.5) & known
    match = float((drawn & seen).sum() / max((drawn | seen).sum(), 1))
    return Fit(kind, place, colour, match)


def _share(local: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """How much of each pixel has the shape's colour: 0 for background, 1 inside."""
    return np.clip(local @ colour / max(float(colour @ colour), 1e-6), -0.5, 1.5)


def _start(kind: str, share: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Centre and radius from the centre of mass and the area."""
    area = max(float(share.sum()), 1.0)
    radius = np.sqrt(area / _AREA[kind])
    x, y = (share.sum(0) @ xs) / area, (share.sum(1) @ ys) / area
    return np.array([x, y - radius / 3 if kind == "triangle" else y, radius])


def cover_of(kind: str, places: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """`scene.render`'s share of a shape in each pixel, [..., height, width] for places [..., 3]."""
    x, y, radius = (places[..., i, None, None] for i in range(3))
    distance = signed_distance(kind, xs[None, :] - x, ys[:, None] - y, radius)
    return np.minimum(np.maximum(0.5 - distance, 0.0), 1.0)


def _refine(
    kind: str, place: np.ndarray, share: np.ndarray, known: np.ndarray, xs: np.ndarray, ys: np.ndarray, rounds: int
) -> tuple[np.ndarray, float]:
    """Gauss-Newton steps on the squared difference between drawn and seen; returns the best place and its residual."""
    best, least = place, np.inf
    pixels = np.flatnonzero(known)
    target = share.ravel()[pixels]
    for turn in range(rounds + 1):
        covers = cover_of(kind, place + _NUDGES, xs, ys).reshape(len(_NUDGES), -1)
        if len(pixels) < covers.shape[1]:
            covers = covers[:, pixels]
        error = target - covers[0]
        residual = float(error @ error)
        if residual < least:
            best, least = place, residual
        if turn == rounds or least < 0.02:
            break
        slopes = (covers[1:] - covers[0]) / _STEP
        step = np.linalg.solve(slopes @ slopes.T + 0.1 * np.eye(3), slopes @ error)
        place = place + np.clip(step, -2.0, 2.0)
        place[2] = max(place[2], 1.0)
    return best, least
