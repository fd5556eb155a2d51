"""Figures of a whole table, such as F1, of two results folders against each other.

Both folders' resamples are drawn by the same seed from clusters in the order of their names (`mmalign.score_figures`).
Where both scored the same items, the same clusters are in each of them, and the difference has a paired interval. Where
they did not, the figures are of different items, and the difference gets no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.results import Results
from mmalign.stats import Interval, expanded_ends

__all__ = ["FILE", "UNDEFINED", "FigureComparison", "compare_figures", "figures_in", "remarks"]

FILE = "figures.parquet"
"""Beside the summary: a row per figure with its value in every resample, for paired comparisons."""
UNDEFINED = 0.05
"""Share of resamples without the figure above which no interval is given."""


@dataclass(frozen=True)
class FigureComparison:
    """One figure in both folders; `difference` is b - a, its ends NaN where no interval can be given.

    Figures have no direction: whether more is better is for the reader to know (of a yes-ratio neither is).
    """

    evaluator: str
    figure: str
    value_a: float | None
    value_b: float | None
    difference: Interval
    same_items: bool

    @property
    def label(self) -> str:
        """Such as `pope: f1`."""
        return f"{self.evaluator}: {self.figure}"


def figures_in(results: Results) -> dict[str, dict[str, Any]]:
    """label -> name -> ``value`` and ``ci95``, as the folder's summary has them."""
    entries: Any = results.summary.get("evaluators")
    if not isinstance(entries, dict):
        return {}
    return {label: entry["figures"] for label, entry in entries.items() if entry.get("figures")}


def compare_figures(a: Results, b: Results, level: float = 0.95) -> list[FigureComparison]:
    """Every figure that both folders have, in the order of `a`."""
    told_a, told_b = figures_in(a), figures_in(b)
    common = [label for label in told_a if label in told_b]
    drawn_a, drawn_b = (_drawn(results.folder) if common else {} for results in (a, b))
    found = []
    for label in common:
        for name in (name for name in told_a[label] if name in told_b[label]):
            values = told_a[label][name]["value"], told_b[label][name]["value"]
            pair = drawn_a.get((label, name)), drawn_b.get((label, name))
            same = pair[0] is not None and pair[1] is not None and pair[0][0] == pair[1][0]
            clusters = a.summary["evaluators"][label]["figures_of"]["clusters"]
            found.append(FigureComparison(label, name, *values, _difference(values, pair, same, clusters, level), same))
    return found


def remarks(figures: Sequence[FigureComparison]) -> list[str]:
    """What a reader must know of them, one sentence each."""
    unlike = list(dict.fromkeys(each.evaluator for each in figures if not each.same_items))
    if not unlike:
        return []
    return [f"The figures of {', '.join(unlike)} are of different items in the two folders, so their difference has no "
            "interval and may come from the items."]  # fmt: skip


_Drawn = tuple[str, np.ndarray]


def _drawn(folder: Path) -> Mapping[tuple[str, str], _Drawn]:
    import pyarrow.parquet as pq

    if not (folder / FILE).is_file():
        return {}
    rows = pq.read_table(folder / FILE).to_pylist()
    return {
        (row["evaluator"], row["figure"]): (row["drawn"], np.array(row["resampled"], dtype=np.float64)) for row in rows
    }


def _difference(
    values: tuple[float | None, float | None],
    pair: tuple[_Drawn | None, _Drawn | None],
    same: bool,
    clusters: int,
    level: float,
) -> Interval:
    if values[0] is None or values[1] is None:
        return Interval(math.nan, math.nan, math.nan)
    difference = values[1] - values[0]
    if not same or pair[0] is None or pair[1] is None or clusters < 2:
        return Interval(difference, math.nan, math.nan)
    both = pair[1][1] - pair[0][1]
    known = both[~np.isnan(both)]
    if len(known) < (1 - UNDEFINED) * len(both):
        return Interval(difference, math.nan, math.nan)
    return Interval(difference, *expanded_ends(known, clusters, level))
