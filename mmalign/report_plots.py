"""The report's figures: small SVG drawings that follow the page's light or dark colours.

matplotlib cannot draw in "whatever the page's text colour is", so every colour here is a stand-in that is replaced by a
CSS variable of the page after drawing. Text stays text: it takes the page's font and can be selected and searched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmalign.figures import printable, short

SERIES = 6  # colours the page defines, --c0 to --c5
INK, MUTED, GRID = "#010203", "#010204", "#010205"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"} | {
    f"#01010{i}": f"var(--c{i})" for i in range(SERIES)
}
_MAX_POINTS = 400
_MAX_BARS = 8


def series_colour(index: int) -> str:
    """Stand-in for the page's colour number `index`, counted round."""
    return f"#01010{index % SERIES}"


def histogram(series: Sequence[tuple[str, int, Sequence[float]]], name: str) -> str:
    """Distributions of one score, one above the other.

    Args:
        series: (model, colour number, finite values) for each model.
        name: what is drawn, for screen readers.

    Returns:
        SVG text. Up to eight distinct values are drawn as bars, more as outlines; a dashed line marks each mean.
    """
    figure, axes = _figure(4.6, 2.1)
    filled = [(colour, np.asarray(values, dtype=float)) for _, colour, values in series if len(values)]
    distinct = np.unique(np.concatenate([values for _, values in filled])) if filled else np.zeros(0)
    if 0 < len(distinct) <= _MAX_BARS:
        _bars(axes, filled, distinct)
    elif filled:
        _outlines(axes, filled)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}%")
    return _svg(figure, f"Distribution of {name}: " + ", ".join(label for label, _, _ in series))


def _bars(axes: Axes, filled: list[tuple[int, np.ndarray]], distinct: np.ndarray) -> None:
    places = np.arange(len(distinct))
    width = 0.72 / len(filled)
    for i, (colour, values) in enumerate(filled):
        share = [(values == x).mean() for x in distinct]
        offset = (i - (len(filled) - 1) / 2) * width
        axes.bar(places + offset, share, width * 0.92, color=series_colour(colour), alpha=0.85, linewidth=0)
    axes.set_xlim(-0.7, len(distinct) - 0.3)
    axes.set_xticks(places, [short(x) for x in distinct])


def _outlines(axes: Axes, filled: list[tuple[int, np.ndarray]]) -> None:
    every = np.concatenate([values for _, values in filled])
    count = int(np.clip(len(np.histogram_bin_edges(every, bins="auto")) - 1, 12, 36))
    edges = np.linspace(every.min(), every.max(), count + 1)
    for colour, values in filled:
        share = np.histogram(values, edges)[0] / len(values)
        axes.stairs(share, edges, fill=True, color=series_colour(colour), alpha=0.28, linewidth=0)
        axes.stairs(share, edges, color=series_colour(colour), linewidth=1.4)
    for colour, values in filled:
        axes.axvline(values.mean(), color=series_colour(colour), linewidth=1.4, linestyle=(0, (4, 2.5)))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02)


def curves(series: Mapping[str, tuple[np.ndarray, np.ndarray]], reference: float | None = None) -> str:
    """Quantities over training steps: the record itself faintly, a running mean of it strongly.

    Args:
        series: name -> (steps [n], values [n]), at least one, drawn in colours 1, 0, 2, 3, ...
        reference: a level to mark with a thin line, for example 0.5 for an accuracy.

    Returns:
        SVG text of at most 400 points per curve; longer records are averaged over equal stretches.
    """
    figure, axes = _figure(4.6, 2.1)
    if reference is not None:
        axes.axhline(reference, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    for i, (steps, values) in enumerate(series.values()):
        steps, values = _thin(steps), _thin(values)
        colour = series_colour(curve_colour(i))
        if len(steps) > 30:
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
            axes.plot(steps, _smooth(values), color=colour, linewidth=1.8)
        else:
            axes.plot(steps, values, color=colour, linewidth=1.6, marker="o" if len(steps) < 3 else None, markersize=4)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02)
    return _svg(figure, "Training curves: " + ", ".join(series))


@dataclass(frozen=True)
class Mark:
    """What somebody else has: `number` chooses shape and colour, the same one in `mark_sign`."""

    number: int
    value: float


@dataclass(frozen=True)
class Bar:
    """A row of bars: (colour number, value, ends of its interval or None) for each model, and marks on its line."""

    label: str
    ours: Sequence[tuple[int, float, tuple[float, float] | None]]
    marks: Sequence[Mark] = ()
    hollow: bool = False


_SHAPES = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"))


def mark_sign(number: int) -> tuple[str, int]:
    """The sign and the colour number that a legend has for a mark."""
    return _SHAPES[number % len(_SHAPES)][1], mark_colour(number)


def mark_colour(number: int) -> int:
    """Colour number of a mark, those that models rarely have first."""
    return (2, 3, 4, 5, 0, 1)[number % SERIES]


def bars(rows: Sequence[Bar], description: str) -> str:
    """Horizontal bars with whiskers, and marks beside them, from 0 to 1; what lies outside widens the axis.

    Args:
        rows: from top to bottom, at least one.
        description: for screen readers.

    Returns:
        SVG text.
    """
    most = max(len(row.ours) for row in rows)
    figure, axes = _figure(7.6, 0.5 + 0.3 * len(rows) * (1 + 0.35 * (most - 1)))
    figure.subplots_adjust(left=0.27, bottom=0.32 / figure.get_figheight(), top=1 - 0.1 / figure.get_figheight())
    height = 0.74 / most
    for place, row in enumerate(rows):
        for i, (number, value, ends) in enumerate(row.ours):
            y, colour = place + (i - (len(row.ours) - 1) / 2) * height, series_colour(number)
            if row.hollow:
                axes.barh(y, value, height * 0.8, facecolor="none", edgecolor=colour, linewidth=1.2)
            else:
                axes.barh(y, value, height * 0.86, color=colour, alpha=0.8, linewidth=0)
            if ends is not None:
                axes.plot(ends, (y, y), color=INK, linewidth=1.3, solid_capstyle="butt")
        for mark in row.marks:
            shape, colour = _SHAPES[mark.number % len(_SHAPES)][0], series_colour(mark_colour(mark.number))
            axes.plot(mark.value, place, shape, color=colour, markersize=5.5, markeredgecolor=INK, markeredgewidth=0.5)
    axes.set_yticks(range(len(rows)), [printable(row.label) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0, color=GRID, linewidth=0.7)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.0), max(high, 1.0))
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    return _svg(figure, description)


def curve_colour(index: int) -> int:
    """Colour number of the curve number `index` in a panel: the accent first."""
    return (1, 0, 2, 3, 4, 5)[index % SERIES]


def _thin(x: np.ndarray) -> np.ndarray:
    if len(x) <= _MAX_POINTS:
        return x
    return np.array([part.mean() for part in np.array_split(x, _MAX_POINTS)])


def _smooth(x: np.ndarray) -> np.ndarray:
    """Centred running mean over a fifteenth of the curve; at the ends, over what there is."""
    half = max(1, len(x) // 30)
    total = np.concatenate([[0.0], np.cumsum(x)])
    low = np.maximum(np.arange(len(x)) - half, 0)
    high = np.minimum(np.arange(len(x)) + half + 1, len(x))
    return (total[high] - total[low]) / (high - low)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    figure.subplots_adjust(left=0.135, right=0.98, bottom=0.13, top=0.95)  # a layout engine would cost half the time
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, labelsize=9, length=0, pad=4)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(lambda x, _: short(x))
    axes.yaxis.set_major_formatter(lambda y, _: short(y))
    return figure, axes


def _svg(figure: Figure, description: str) -> str:
    """The figure as an `<svg>` element that stands in a page: no prologue, no metadata, no style of its own."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description, "text.parse_math": False}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'<svg([^>]*?)\swidth="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r'<svg([^>]*?)\sheight="[^"]*"', r"<svg\1", text, count=1)
    text = text.replace("<svg", f'<svg role="img" aria-label="{_attribute(description)}"', 1)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return re.sub(r"\n\s*", "\n", text)


def _attribute(text: str) -> str:
    return printable(text).replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
