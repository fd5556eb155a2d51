"""Cuts an image of the shapes world into pieces: connected regions that differ from the background and have one hue."""

from __future__ import annotations

import colorsys

import numpy as np

from mmalign.shapes.scene import HUES, SIDE

MIN_AREA = 24  # pixels of 64x64; smaller pieces are specks (the smallest shape that is ever drawn has 72)
MIN_PIXELS = 12  # in smaller images noise makes larger specks
CONTRAST = 0.16  # smallest RGB distance to the background that can be a part of a shape
SAME_HUE = 25.0  # degrees; two neighbours among the colours are 44 or more apart
MIN_CHROMA = 0.2  # paler pixels have no say about the hue

COLOURS = tuple(HUES)


def cut(offset: np.ndarray, contrast: np.ndarray, pixels: np.ndarray) -> list[np.ndarray]:
    """Boolean masks of the connected pieces that are large enough to be objects, each of one hue.

    Shapes of the arguments: [side, side, 3], [side, side] and [side, side, 3], side being at most 64.
    """
    least = max(MIN_AREA * (len(pixels) / SIDE) ** 2, MIN_PIXELS)
    # Half of the strongest contrast nearby: the outline stays where it is drawn, on any background and when blurred.
    foreground = contrast > np.maximum(CONTRAST, 0.5 * _spread_max(contrast, 2))
    found = []
    for piece in components(foreground, least):
        found += _by_hue(piece, pixels, least)
    return found


def components(classes: np.ndarray, least: float) -> list[np.ndarray]:
    """Masks of the 4-connected regions of equal non-zero class, [side, side], that have at least `least` pixels."""
    labels = np.where(classes > 0, np.arange(classes.size).reshape(classes.shape), -1)
    across = (classes[:, 1:] == classes[:, :-1]) & (classes[:, 1:] > 0)
    down = (classes[1:] == classes[:-1]) & (classes[1:] > 0)
    while True:  # every region takes its smallest flat index; looking labels up by label makes the paths short
        before = labels.copy()
        for same, one, other in ((across, labels[:, 1:], labels[:, :-1]), (down, labels[1:], labels[:-1])):
            np.minimum(one, other, out=one, where=same)
            np.minimum(one, other, out=other, where=same)
        labels = np.where(labels >= 0, labels.ravel()[labels], -1)
        if np.array_equal(labels, before):
            break
    sizes = np.bincount(labels[labels >= 0], minlength=1)
    return [labels == label for label in np.flatnonzero(sizes >= least)]


def _by_hue(piece: np.ndarray, pixels: np.ndarray, least: float) -> list[np.ndarray]:
    """Cuts a piece where shapes of different colours touch."""
    values = pixels[piece]
    chroma = np.ptp(values, axis=-1)
    angles = _angle(values)
    classes = _nearest(angles)
    votes = np.bincount(classes[chroma > MIN_CHROMA], minlength=len(_ANGLES))
    if np.sort(votes)[-2] < least:
        return [piece]
    # One shape whose hue lies between two of ours is one shape: classes of nearly the same mean are one.
    means: dict[int, float] = {}
    for one in np.argsort(-votes, kind="stable")[: int((votes > 0).sum())].tolist():
        mean = float(_angle(values[classes == one].mean(0)))
        near = [other for other, angle in means.items() if abs((mean - angle + 180) % 360 - 180) < SAME_HUE]
        if near:
            classes[classes == one] = near[0]
        else:
            means[one] = mean
    # A pixel takes the class that most of its neighbours have, so that noise and blended outlines make no pieces.
    ballots = np.zeros((*piece.shape, len(_ANGLES)))
    ballots[piece] = np.eye(len(_ANGLES))[classes] * chroma[:, None]
    majority = np.where(piece, 1 + _box_sum(ballots).argmax(-1), 0)
    return [part for part in components(majority, least) if eroded(part).sum() >= least / 4]


def nearest_colour(rgb: np.ndarray) -> str:
    """The name of the colour with the nearest hue, for RGB [3]."""
    return COLOURS[int(_nearest(_angle(rgb[None]))[0])]


def _angle(rgb: np.ndarray) -> np.ndarray:
    """Hue in degrees on the circle around the grey axis, RGB [..., 3] -> [...]; mixing with grey does not change it."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    return np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))


# HSV measures hue on a hexagon, hence the way round by RGB.
_ANGLES = _angle(np.array([colorsys.hsv_to_rgb(hue / 360, 1.0, 1.0) for hue in HUES.values()]))


def _nearest(angles: np.ndarray) -> np.ndarray:
    return abs((angles[:, None] - _ANGLES + 180) % 360 - 180).argmin(-1)


def _spread_max(field: np.ndarray, reach: int) -> np.ndarray:
    """The maximum over a square of 2 * reach + 1 pixels, for a field that is nowhere negative."""
    for _ in "xy":  # along the columns, then (transposed) along the rows
        padded = np.zeros((len(field) + 2 * reach, len(field)))
        padded[reach:-reach] = field
        field = np.maximum.reduce([padded[shift : shift + len(field)] for shift in range(2 * reach + 1)]).T
    return field


def _box_sum(field: np.ndarray) -> np.ndarray:
    padded = np.zeros((field.shape[0] + 2, field.shape[1] + 2, field.shape[2]))
    padded[1:-1, 1:-1] = field
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def eroded(mask: np.ndarray) -> np.ndarray:
    """The pixels whose four neighbours are set too; beyond the frame nothing is."""
    padded = _framed(mask)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def dilated(mask: np.ndarray) -> np.ndarray:
    """The pixels that are set or have one of their eight neighbours set."""
    padded = _framed(mask)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def _framed(mask: np.ndarray) -> np.ndarray:
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), bool)
    padded[1:-1, 1:-1] = mask
    return padded
