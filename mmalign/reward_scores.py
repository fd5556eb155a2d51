"""Scores of a benchmark's media: from evaluators that are run now, or from results and tables that exist."""

from __future__ import annotations

import csv
import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeGuard

from mmalign import score
from mmalign.config import nearest
from mmalign.evaluation import resolve_device
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.jobs_bench import BenchConfig, BenchEvaluator
from mmalign.media_table import MediaRow, write_media_table
from mmalign.preference_row import OVERALL
from mmalign.protocols.sets import RewardSet
from mmalign.protocols.suites import cut_grids
from mmalign.records import Record, missing_columns, read_records
from mmalign.results import WHOLE_SET, Results, is_ok, read_results, score_label
from mmalign.score_plan import Job, make_jobs

Scores = dict[str, float]  # sample -> score, higher is better; samples without one are not in it


@dataclass(frozen=True)
class Scorer:
    """What is tested: a column of scores for each axis, and why media have none.

    Attributes:
        name: as results call it.
        columns: axis -> name of the score that judges it.
        scores: name of a score -> sample -> score; turned so that higher is better.
        reasons: why samples have none, with how many.
        unknown: how many rows were about no medium of the benchmark.
    """

    name: str
    columns: dict[str, str]
    scores: dict[str, Scores]
    reasons: dict[str, int] = field(default_factory=dict)
    unknown: int = 0

    def of(self, axis: str) -> Scores:
        """The scores that judge an axis."""
        return self.scores[self.columns[axis]]


def missing_media(found: RewardSet) -> list[str]:
    """Samples whose file is not there, in the benchmark's order."""
    there: dict[str, bool] = {}
    absent = []
    for item in found.items:
        file = item.media if isinstance(item.media, str) else item.media.file
        if file not in there:
            there[file] = os.path.isfile(file)
        if not there[file]:
            absent.append(item.sample)
    return absent


def check(config: BenchConfig, plugins: bool = True) -> list[Job]:
    """The jobs of the config's evaluators, each once. ValueError for what cannot be scored with, before anything."""
    resolve_device(config.scoring.device)
    jobs = list(make_jobs([(spec.name, spec.params) for spec in _distinct(config.evaluators)], plugins))
    for job in jobs:
        if job.is_set:
            raise ValueError(f"{job.name} scores whole sets, not media, and so cannot be held against judgements")
    return jobs


def check_needs(config: BenchConfig, found: RewardSet, jobs: Sequence[Job]) -> None:
    """ValueError for an evaluator that reads what no row of the benchmark has, or scores another kind of media."""
    columns = ("prompt", "reference", "response", "aux")
    there = {name for name in columns if any(getattr(item, name) for item in found.items)}
    kinds = {item.modality for item in found.items}
    for job in jobs:
        if absent := sorted(set(columns) & set(job.cls.needs) - there):
            raise ValueError(
                f"{job.name} needs {' and '.join(absent)} of every medium, and {config.benchmark} has none: its rows "
                f"are of {', '.join(sorted(there)) or 'media alone'}. Score a table of your own that has it with "
                "`mmalign score`, by the benchmark's names of samples, and give the results folder as `scores`"
            )
        if not kinds & set(job.cls.modality):
            raise ValueError(
                f"{job.name} scores {' and '.join(sorted(job.cls.modality))}s; {config.benchmark} is of "
                f"{' and '.join(sorted(kinds))}s"
            )


def _distinct(specs: Sequence[BenchEvaluator]) -> list[EvaluatorSpec]:
    found: list[EvaluatorSpec] = []
    for spec in specs:
        if _plain(spec) not in found:
            found.append(_plain(spec))
    return found


def _plain(spec: BenchEvaluator) -> EvaluatorSpec:
    return EvaluatorSpec(name=spec.name, params=spec.params)


# ------------------------------------------------------------------------------------------------ scored now


def evaluate(
    config: BenchConfig, found: RewardSet, axes: Sequence[str], jobs: Sequence[Job], plugins: bool = True
) -> list[Scorer]:
    """Score the benchmark's media into `output/scores`, what is missing only; a scorer for each spec of the config.

    Args:
        jobs: what `check` gave.

    Raises:
        ValueError: media are missing and `missing` is stop; an unknown sub-score or axis; what scoring raises.
    """
    specs = _distinct(config.evaluators)
    cut_grids(found, config)
    absent = missing_media(found)
    if absent and (config.missing == "stop" or len(absent) == len(found.items)):
        names = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if len(absent) > 3 else "")
        where = next(row for row in found.items if row.sample == absent[0]).media
        fix = "set missing: count to go on without them" if len(absent) < len(found.items) else "or give `scores`"
        raise ValueError(
            f"{len(absent)} of {len(found.items)} media are not there: {names}; the first should be {where}. Name "
            f"their folder as `media`, download them, or {fix.removeprefix('or ')}"
        )
    table = config.output / "media.jsonl"
    write_media_table(table, found.items)
    settings = ScoreConfig(
        table=table, output=config.output / "scores", evaluators=tuple(specs), **dict(config.scoring)
    )
    results = read_results(score.run(settings, plugins=plugins))
    job_of = [jobs[specs.index(_plain(spec))] for spec in config.evaluators]
    return [_scorer(spec, job, results, axes) for spec, job in zip(config.evaluators, job_of, strict=True)]


def _scorer(spec: BenchEvaluator, job: Job, results: Results, axes: Sequence[str]) -> Scorer:
    given = {str(row["subscore"]) for row in results.rows if row["evaluator"] == job.label and is_ok(row)}
    names = sorted(given - job.cls.counts)
    if not names:
        reason = next((row["reason"] for row in results.rows if row["evaluator"] == job.label), "it has no rows")
        raise ValueError(f"{job.label} scored none of the media: {reason}")
    if unknown := sorted(set(spec.axes) - set(axes)):
        raise ValueError(
            f"axes: the benchmark judges {', '.join(axes)}, not {unknown[0]!r}.{nearest(unknown[0], axes)}"
        )
    columns = {axis: _subscore(spec, job, names, axis) for axis in axes}
    sign = 1.0 if job.cls.higher_is_better else -1.0
    scores: dict[str, Scores] = {}
    reasons: Counter[str] = Counter()
    for label in dict.fromkeys(columns.values()):
        rows = results.rows_of(score_label(job.label, label))
        scores[label] = {row["sample"]: sign * float(row["score"]) + 0.0 for row in rows if is_ok(row)}
        reasons.update(_reason(row) for row in rows if not is_ok(row))
    title = job.label if len(scores) > 1 else score_label(job.label, next(iter(scores)))
    return Scorer(title, columns, scores, dict(reasons.most_common(5)))


def _reason(row: Mapping[str, Any]) -> str:
    text = str(row.get("reason") or "the score is not finite").splitlines()[0]
    media = str(row.get("media") or "")
    return text.replace(media, "the file") if media else text


def _subscore(spec: BenchEvaluator, job: Job, names: Sequence[str], axis: str) -> str:
    """Which sub-score judges an axis: the one that the config names, that of the axis's name, or the only one."""
    wanted = spec.axes.get(axis) or spec.subscore
    if wanted is not None:
        if wanted not in names:
            raise ValueError(
                f"{job.label} has no sub-score {wanted!r}.{nearest(wanted, names)} It has: {', '.join(names)}."
            )
        return wanted
    same = [name for name in names if name.casefold() == axis.casefold()]
    if same or len(names) == 1:
        return (same or list(names))[0]
    raise ValueError(
        f"{job.label} gives {', '.join(names)}; say with `subscore` or `axes: {{{axis}: ...}}` which of them judges "
        f"{axis}"
    )


# ------------------------------------------------------------------------------------------------ scored before


def existing_scores(config: BenchConfig, found: RewardSet, axes: Sequence[str]) -> list[Scorer]:
    """The scores that a results folder or a table holds: a scorer per score, or one for all axes.

    One scorer for all where `axes` says so, or where an evaluator's sub-scores have the names of the axes.

    Raises:
        ValueError: nothing to read, no score of a medium of the benchmark, an unknown name in `axes`.
    """
    path = config.scores
    assert path is not None
    if path.is_dir():
        columns, reasons = _from_results(read_results(path), config)
    else:
        columns, reasons = _from_table(path, config)
    if not any(columns.values()):
        why = ", ".join(f"{count} {reason}" for told in reasons.values() for reason, count in told.items())
        raise ValueError(f"{path} has no score that is a finite number ({why or 'it has no rows'})")
    known = {item.sample for item in found.items}
    held: dict[str, Scores] = {}
    strays: dict[str, int] = {}
    for name, values in columns.items():
        held[name], strays[name] = {}, 0
        for sample, value in values.items():
            match = _match(sample, known, found.aliases)
            if match is None:
                strays[name] += 1
            elif match in held[name]:
                raise ValueError(f"{path}: two rows are about {match!r}, one of them called {sample!r}; keep one")
            else:
                held[name][match] = value
    if not any(held.values()):
        written = next((sample for values in columns.values() for sample in values), "none")
        raise ValueError(
            f"{path} has no score of a medium of {config.benchmark}: it names {written!r}, the benchmark "
            f"{found.items[0].sample!r}; a table needs `sample` as the benchmark's own files name media"
        )
    return _arranged(config, held, strays, reasons, axes)


def _from_results(results: Results, config: BenchConfig) -> tuple[dict[str, Scores], dict[str, dict[str, int]]]:
    columns, reasons = {}, {}
    for label in results.labels():
        if label in results.whole_set_labels():
            continue
        better = results.higher_is_better(label) if config.higher_is_better is None else config.higher_is_better
        if better is None:
            raise ValueError(f"{results.folder} does not say whether more of {label} is better; set higher_is_better")
        rows = [row for row in results.rows_of(label) if row["sample"] != WHOLE_SET]
        sign = 1.0 if better else -1.0
        columns[label] = {str(row["sample"]): sign * float(row["score"]) + 0.0 for row in rows if is_ok(row)}
        reasons[label] = dict(Counter(_reason(row) for row in rows if not is_ok(row)).most_common(5))
    return columns, reasons


_NAMES = ("sample", "filename", "file_name", "media", "path")
_NO_SCORES = {*_NAMES, *(field.name for field in fields(MediaRow)), "text", "user_id"}  # what tables say of media
_TEXT_TABLES = (".csv", ".tsv")
_FIX = "write a number, or nothing (null) where there is no score"


def _from_table(path: Path, config: BenchConfig) -> tuple[dict[str, Scores], dict[str, dict[str, int]]]:
    """The column `score` where there is one (called as the file is), else every column of numbers."""
    records = read_records(path)
    name = next((each for each in _NAMES if each in records.columns), None)
    if name is None:
        raise ValueError(missing_columns(path, ["sample"], records.columns, "a table of scores"))
    rows = list(records)
    samples = [str(row.values.get(name)) for row in rows]
    twice = next((sample for sample, count in Counter(samples).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{path}: {twice!r} stands there twice; a sample has one score")
    sign = -1.0 if config.higher_is_better is False else 1.0
    columns: dict[str, Scores] = {}
    reasons: dict[str, dict[str, int]] = {}
    for column in _score_columns(path, name, records.columns, rows):
        title = path.stem if column == "score" else column
        numbers = [_number(row, column) for row in rows]
        values = {sample: sign * x + 0.0 for sample, x in zip(samples, numbers, strict=True) if _finite(x)}
        columns[title] = values
        reasons[title] = {"no finite number": len(rows) - len(values)} if len(values) < len(rows) else {}
    return columns, reasons


def _score_columns(path: Path, name: str, columns: Sequence[str], rows: Sequence[Record]) -> list[str]:
    """`score`, or each column that holds a number; which ones does not depend on what else a column holds.

    Raises:
        ValueError: there is none, or one of them holds something that is no number.
    """
    if "score" in columns:
        chosen = ["score"]
    else:
        known = [column for column in columns if column not in _NO_SCORES]
        chosen = [column for column in known if any(_finite(_number(row, column)) for row in rows)]
    if not any(row.values.get(column) is not None for row in rows for column in chosen):
        raise ValueError(
            f"{path} has no column of numbers beside {name}; call it `score`, or give each scorer a column of its own"
        )
    more = "" if chosen == ["score"] else ", or call the column of scores `score` and no other is read"
    for column in chosen:
        for row in rows:
            if _number(row, column) is None:
                raise ValueError(f"{_place(row)}: {column} is {row.values[column]!r:.40}, no number; {_FIX}{more}")
    return chosen


def _number(row: Record, column: str) -> float | None:
    """A score, NaN where there is none, None for what is no number.

    Flags are 1 and 0 (GenEval's `correct`). One odd cell makes text of a whole column of a CSV, so there, and there
    alone, text can be a number.
    """
    value = row.values.get(column)
    if value is None:
        return math.nan
    if isinstance(value, str) and row.file.suffix.lower() in _TEXT_TABLES:
        try:
            return float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) else None


def _finite(number: float | None) -> TypeGuard[float]:
    return number is not None and math.isfinite(number)


def _place(row: Record) -> str:
    """Where a row stands: file and line, or file and row (from 0) where lines do not tell."""
    if row.file.suffix.lower() == ".jsonl":
        return f"{row.file}:{row.row}"
    if row.file.suffix.lower() in _TEXT_TABLES:
        delimiter = "\t" if row.file.suffix.lower() == ".tsv" else ","
        with open(row.file, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            filled = (reader.line_num for cells in reader if cells)  # cells may hold line ends, and lines nothing
            return f"{row.file}:{next(itertools.islice(filled, row.row + 1, None))}"
    return f"{row.file} row {row.row}"


def _match(sample: str, known: set[str], aliases: Mapping[str, str]) -> str | None:
    """The benchmark's name of a sample: as it is, or the end of a longer path; by its other names where it has some."""
    parts = sample.replace("\\", "/").split("/")
    ends = [sample, *("/".join(parts[start:]) for start in range(len(parts)))]
    return next((end for end in ends if end in known), None) or next(
        (aliases[end] for end in ends if end in aliases), None
    )


def _arranged(
    config: BenchConfig,
    held: dict[str, Scores],
    strays: Mapping[str, int],
    reasons: Mapping[str, dict[str, int]],
    axes: Sequence[str],
) -> list[Scorer]:
    """A scorer per score, but for those that judge the axes together."""
    assert config.scores is not None
    together = {config.scores.stem: config.axes} if config.axes else _by_axis(held, axes, config.scores.stem)
    if config.axes:
        _check_axes(config.axes, held, axes)
    taken = {name for columns in together.values() for name in columns.values()}
    alone = {name: dict.fromkeys(axes, name) for name in held if name not in taken and not config.axes}
    scorers = []
    for title, columns in {**together, **alone}.items():
        used = list(dict.fromkeys(columns.values()))
        told = _told(used, strays, reasons)
        scorers.append(Scorer(title, dict(columns), {name: held[name] for name in used}, *told))
    return scorers


def _check_axes(wanted: Mapping[str, str], held: Mapping[str, Scores], axes: Sequence[str]) -> None:
    for axis, name in wanted.items():
        if axis not in axes:
            raise ValueError(f"axes: the benchmark judges {', '.join(axes)}, not {axis!r}.{nearest(axis, axes)}")
        if name not in held:
            hint = nearest(name, list(held))
            raise ValueError(f"axes: there is no score {name!r}.{hint} There is: {', '.join(held)}.")
    if absent := [axis for axis in axes if axis not in wanted]:
        raise ValueError(f"axes: say which score judges {', '.join(absent)} too")


def _by_axis(held: Mapping[str, Scores], axes: Sequence[str], default: str) -> dict[str, dict[str, str]]:
    """Evaluators whose sub-scores are called as the axes are: title -> axis -> score."""
    found: dict[str, dict[str, str]] = {}
    for home in dict.fromkeys(name.rpartition("/")[0] for name in held):
        parts = {name.rpartition("/")[2].casefold(): name for name in held if name.rpartition("/")[0] == home}
        if len(axes) > 1 and all(axis.casefold() in parts for axis in axes):
            found[home or default] = {axis: parts[axis.casefold()] for axis in axes}
    return found


def _told(
    names: Sequence[str], strays: Mapping[str, int], reasons: Mapping[str, dict[str, int]]
) -> tuple[dict[str, int], int]:
    """Why samples have no score, and how many rows were strangers, over several columns."""
    counts: Counter[str] = Counter()
    for name in names:
        counts.update(reasons.get(name, {}))
    return dict(counts.most_common(5)), max((strays.get(name, 0) for name in names), default=0)


def default_axes(found: RewardSet) -> tuple[str, ...]:
    """What is judged; the one question where nothing is."""
    return found.axes or (OVERALL,)
