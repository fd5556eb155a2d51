"""Figures that are no means over items, such as F1: an evaluator's own function of its scores, with intervals.

The function (`Evaluator.figures`) is run on all items that have a score, and on resamples of whole clusters (a row's
``group``, else its medium), so that an interval needs no formula of its own. Items stand in a fixed order, and clusters
are drawn in the order of their names: neither batches nor processes matter, and two folders with the same items are
drawn together, so that the difference of their figures has its own spread (`mmalign.compare_figures`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.compare_figures import FILE, UNDEFINED
from mmalign.evaluation import FigureRow, figures_declared
from mmalign.hallucination import amber
from mmalign.progress import Progress
from mmalign.score_plan import Job, Plan
from mmalign.source import whole_file
from mmalign.stats import expanded_ends

__all__ = ["FILE", "Source", "add_figures", "estimate", "resamples"]

MOST, LEAST, WORK = 2000, 200, 4_000_000


@dataclass(frozen=True)
class Source:
    """Where figures come from.

    Attributes:
        label: of the evaluator, as the summary has it.
        name: what messages call it.
        figures: of rows.
    """

    label: str
    name: str
    figures: Callable[[Sequence[FigureRow]], Mapping[str, float | None]]

    @classmethod
    def of(cls, job: Job) -> Source:
        """An evaluator of single items."""
        return cls(job.label, job.name, lambda rows: job.cls.figures(job.params, rows))  # type: ignore[union-attr]


def resamples(rows: int) -> int:
    """How many resamples are drawn of so many items: 2000, and fewer above 2000 items, 200 at the least."""
    return max(LEAST, min(MOST, WORK // max(1, rows)))


def add_figures(summary: dict[str, Any], table: pa.Table, plan: Plan, folder: Path, seed: int = 0) -> None:
    """Put ``figures`` into the summary's entries of evaluators that declare them, and their resamples beside it.

    An entry gets ``figures``: name -> ``value`` and ``ci95`` (None where it has none), and ``figures_of``: how many
    items and clusters they are of, and how often these were drawn again. With several models in the table
    ``figures_by_model`` has the same for each. Where the evaluator's function fails ``figures_problem`` says how. Where
    both of AMBER's evaluators are in the run, the entry of amber_generative gets its score, see `_add_amber`.

    Args:
        summary: of `mmalign.score_summary.summarise`, by label; changed.
        table: settled rows.
        folder: of the results.
    """
    saved: list[dict[str, Any]] = []
    for job in plan.jobs:
        if not figures_declared(job.cls):
            continue
        entry = summary[job.label]
        try:
            found, models = _of_models(Source.of(job), _rows(table, job, plan), seed)
        except Exception as error:  # of the evaluator's own code: its scores are written all the same
            entry |= {"figures": {}, "figures_problem": f"{type(error).__name__}: {error}"}
            continue
        entry |= found.told | ({"figures_by_model": models} if models else {})
        saved += [{"evaluator": job.label, **each} for each in found.saved]
    saved += _add_amber(summary, table, plan, seed)
    place = folder / FILE
    if not saved:
        place.unlink(missing_ok=True)
        return
    with whole_file(place) as temporary:
        pq.write_table(pa.Table.from_pylist(saved), temporary)


def _add_amber(summary: dict[str, Any], table: pa.Table, plan: Plan, seed: int) -> list[dict[str, Any]]:
    """Put AMBER's score, which takes both of its evaluators, among the figures of amber_generative, with ``n`` of its
    own, the rows of both; whole pictures are drawn again, with the description and all questions of each."""
    saved = []
    fine = [job for job in plan.jobs if "figures_problem" not in summary[job.label]]
    asked = [job for job in fine if job.name == "amber_discriminative"]
    for job in (job for job in fine if job.name == "amber_generative"):
        entry = summary[job.label]
        for other in asked:
            both = {model: [*rows] for model, rows in _rows(table, job, plan).items()}
            for model, rows in _rows(table, other, plan).items():
                both.setdefault(model, []).extend(rows)
            name = "amber_score" if len(asked) == 1 else f"amber_score ({other.label})"
            found, models = _of_models(Source(job.label, name, partial(_amber_score, name)), both, seed)
            for figure in found.told["figures"].values():
                entry["figures"][name] = figure | {"n": found.told["figures_of"]["n"]}
            for model, figures in models.items():
                entry.setdefault("figures_by_model", {}).setdefault(model, {}).update(figures)
            saved += [{"evaluator": job.label, **each} for each in found.saved]
    return saved


def _amber_score(name: str, rows: Sequence[FigureRow]) -> dict[str, float | None]:
    return {name: amber.score(rows)}


def _of_models(
    source: Source, rows: Mapping[str, list[FigureRow]], seed: int
) -> tuple[Estimate, dict[str, dict[str, Any]]]:
    """The figures of all rows, and those of each model where there are several."""
    found = estimate(source, [row for of_model in rows.values() for row in of_model], seed)
    apart = rows if len(rows) > 1 else {}
    return found, {name: estimate(source, some, seed).told["figures"] for name, some in apart.items()}


def _rows(table: pa.Table, job: Job, plan: Plan) -> dict[str, list[FigureRow]]:
    """What the evaluator's function sees of each item with a score, by model."""
    items = {item.row.sample: item.row for item in plan.items}
    scores: dict[str, dict[str, float]] = {}
    failed: set[str] = set()
    columns = table.select(["sample", "evaluator", "subscore", "score", "status"]).to_pylist()
    for row in columns:
        if row["evaluator"] == job.label and row["status"] == "ok":
            scores.setdefault(row["sample"], {})[row["subscore"]] = row["score"]
        elif row["evaluator"] == job.label:
            failed.add(row["sample"])
    found: dict[str, list[FigureRow]] = {}
    for sample in sorted(scores.keys() - failed):
        item = items[sample]
        group = item.group or str(getattr(item.media, "name", item.media)) or sample
        row = {"sample": sample, "group": group, "scores": scores[sample], "aux": item.aux}
        found.setdefault(str(item.model), []).append(row)
    return found


class Estimate:
    """Figures with intervals.

    Attributes:
        told: what the summary says, ``figures`` and ``figures_of``.
        saved: for each figure its name, value, resampled values (NaN where undefined) and ``drawn``, a hash of what
            they were drawn from, equal for two folders whose resamples belong together.
    """

    def __init__(self, told: dict[str, Any], saved: list[dict[str, Any]]):
        self.told, self.saved = told, saved


def estimate(source: Source, rows: Sequence[FigureRow], seed: int = 0) -> Estimate:
    """Figures of these rows, in an order of their own.

    Raises:
        TypeError: the evaluator returned something else than numbers by name, or other names for a resample.
    """
    clusters: dict[str, list[FigureRow]] = {}
    for row in sorted(rows, key=lambda row: (row["group"], row["sample"])):
        clusters.setdefault(row["group"], []).append(row)
    number = resamples(len(rows)) if len(clusters) > 1 else 0
    about = {"n": len(rows), "clusters": len(clusters), "resamples": number}
    if not rows:
        return Estimate({"figures": {}, "figures_of": about}, [])
    groups = list(clusters.values())
    values = _figures(source, [row for group in groups for row in group])
    drawn = _drawn(source, groups, list(values), number, seed)
    items = [seed, number, [[name, [row["sample"] for row in group]] for name, group in clusters.items()]]
    mark = hashlib.sha256(json.dumps(items).encode()).hexdigest()
    told = {
        name: {"value": value, "ci95": None if value is None else _ends(drawn[:, place], len(groups))}
        for place, (name, value) in enumerate(values.items())
    }
    saved = [
        {"figure": name, "value": value, "drawn": mark, "resampled": drawn[:, place].tolist()}
        for place, (name, value) in enumerate(values.items())
    ]
    return Estimate({"figures": told, "figures_of": about}, saved)


def _drawn(
    source: Source, groups: Sequence[list[FigureRow]], names: Sequence[str], number: int, seed: int
) -> np.ndarray:
    """The figures of resamples [number, figures], NaN where one is undefined."""
    generator = np.random.default_rng(seed)
    copies: dict[tuple[int, int], list[FigureRow]] = {}
    drawn = np.full((number, len(names)), np.nan)
    with Progress(f"resampling {source.label}", number) as bar:
        for each in range(number):
            places = generator.integers(0, len(groups), len(groups)).tolist()
            found = _figures(source, _resample(groups, places, copies))
            if strange := sorted(found.keys() - set(names)):
                raise TypeError(f"{source.name}.figures names other figures for a resample: {', '.join(strange)}")
            drawn[each] = [np.nan if (value := found.get(name)) is None else value for name in names]
            bar.update(each + 1)
    return drawn


def _figures(source: Source, rows: Sequence[FigureRow]) -> dict[str, float | None]:
    found = source.figures(rows)
    if not isinstance(found, Mapping):
        raise TypeError(f"{source.name}.figures returned {type(found).__name__}; it has to be a dictionary of numbers")
    for name, value in found.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float | np.number)):
            raise TypeError(
                f"{source.name}.figures returned {value!r:.40} for {name!r}; it has to be a number, or None"
            )
        if value is not None and not np.isfinite(value):
            raise TypeError(f"{source.name}.figures returned {value} for {name!r}; what is undefined is None")
    return {str(name): None if value is None else float(value) for name, value in found.items()}


def _resample(
    groups: Sequence[list[FigureRow]], places: Iterable[int], copies: dict[tuple[int, int], list[FigureRow]]
) -> list[FigureRow]:
    """The rows of these clusters; the second time that one is drawn its rows have another group, kept in `copies`."""
    rows: list[FigureRow] = []
    times: dict[int, int] = {}
    for place in places:
        time = times[place] = times.get(place, 0) + 1
        if time == 1:
            rows += groups[place]
            continue
        if (place, time) not in copies:
            copies[place, time] = [{**row, "group": f"{row['group']} (drawn {time})"} for row in groups[place]]
        rows += copies[place, time]
    return rows


def _ends(drawn: np.ndarray, clusters: int) -> list[float] | None:
    known = drawn[~np.isnan(drawn)]
    if clusters < 2 or len(known) < (1 - UNDEFINED) * len(drawn):
        return None
    return list(expanded_ends(known, clusters))
