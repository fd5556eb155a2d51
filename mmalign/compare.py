"""Compare two results folders item by item: differences, win rates, and how sure one can be of them.

Two models are compared on the same items. An item is a prompt together with a seed, or a prompt together with a sample
name; it is never the position in a file. The second folder is the one whose wins are counted, so that
`compare(base, aligned)` answers "does the aligned model win?", and a positive difference means that it scores higher.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmalign.compare_figures import FigureComparison, compare_figures
from mmalign.compare_figures import remarks as figure_remarks
from mmalign.figures import number, p_value, share_interval, signed_interval
from mmalign.results import WHOLE_SET, Results, distinct_names, is_ok, read_results, score_label
from mmalign.stats import Interval, WinRate, mean_ci, permutation_test, sign_test, win_rate

PairBy = Literal["auto", "seed", "sample"]

# What has to be equal before two scores may be subtracted, and how a person would call it.
IDENTITY = {
    "evaluator_version": "evaluator version",
    "params_hash": "parameters",
    "weight_hash": "weights",
    "dtype": "precision",
    "decoder": "media decoder",
}


@dataclass(frozen=True)
class ScoreComparison:
    """One (evaluator, subscore) over all items that both sides scored.

    `difference` is b - a in the score's own units; `wins` counts items in which b is *better*, which is lower where
    `higher_is_better` is False. `failed` counts matched items left out because one side or both has no score.
    Without any item (n = 0) all figures are NaN and the p-values 1. A score of the whole set, as FID is, has n = 1 and
    `whole_set` True: two figures and their difference, but nothing from which to tell how sure it is.
    """

    evaluator: str
    subscore: str
    higher_is_better: bool
    n: int
    failed: int
    prompts: int
    mean_a: float
    mean_b: float
    difference: Interval
    wins: WinRate
    sign_p: float
    permutation_p: float
    whole_set: bool = False

    @property
    def label(self) -> str:
        """Short name, `hps` or `shapes_truth/colour`."""
        return score_label(self.evaluator, self.subscore)


@dataclass(frozen=True)
class Comparison:
    """The comparison of folder `a` with folder `b`; every count of what could not be compared is kept beside it."""

    name_a: str
    name_b: str
    paired_by: str
    level: float
    items: int
    unmatched_a: int
    unmatched_b: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    scores: tuple[ScoreComparison, ...]
    notes: tuple[str, ...] = field(default=())
    figures: tuple[FigureComparison, ...] = ()

    def score(self, label: str) -> ScoreComparison:
        """The row called `label` (`hps`, `shapes_truth/colour`); ValueError naming the rows there are."""
        for row in self.scores:
            if row.label == label:
                return row
        raise ValueError(f"no score called {label!r} was compared; there are {', '.join(s.label for s in self.scores)}")

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dump; what is undefined is None, since NaN is not JSON."""
        data = asdict(self)
        for row, score in zip(data["scores"], self.scores, strict=True):
            row["label"] = score.label
            row["difference"] = score.difference._asdict()
            row["wins"] = score.wins._asdict()
        for row, figure in zip(data["figures"], self.figures, strict=True):
            row["difference"] = figure.difference._asdict()
        return _without_nan(data)

    def save(self, path: str | Path) -> Path:
        """Write `to_json()` to `path`, making its folder."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def remarks(self) -> list[str]:
        """Everything a reader must know before trusting the figures, one sentence each."""
        said = list(self.notes)
        if self.unmatched_a or self.unmatched_b:
            said.append(
                f"{self.unmatched_a} items of {self.name_a} and {self.unmatched_b} of {self.name_b} have no partner "
                f"with the same {self.paired_by} and are left out."
            )
        failed = [f"{s.label} {s.failed}" for s in self.scores if s.failed]
        if failed:
            said.append(f"Matched items left out because a side has no score: {', '.join(failed)}.")
        for name, labels in ((self.name_a, self.only_a), (self.name_b, self.only_b)):
            if labels:
                said.append(f"Scored in {name} alone: {', '.join(labels)}.")
        said += figure_remarks(self.figures)
        whole = [s.label for s in self.scores if s.whole_set]
        if whole:
            said.append(f"One figure for the whole set, hence without interval and test: {', '.join(whole)}.")
        return said

    def show(self) -> None:
        """Prints the table; in a pipe or a log 150 columns wide, since 80 would fold every cell."""
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 150).print(self.table())

    def table(self) -> Any:
        """A rich Table, a line per score, with the remarks as its caption."""
        from rich.table import Table
        from rich.text import Text

        remarks = "\n".join(self.remarks())
        table = Table(title=Text(f"{self.name_b} against {self.name_a}"), caption=Text(remarks) if remarks else None)
        percent = f"{100 * self.level:g} %"
        table.add_column("score", no_wrap=True)
        for heading in ("n", self.name_a, self.name_b, f"difference [{percent}]", f"win rate [{percent}]"):
            table.add_column(Text(heading), justify="right")
        table.add_column("p sign", justify="right")
        table.add_column("p permutation", justify="right")
        for s in self.scores:
            cells = [s.label + ("" if s.higher_is_better else " (lower is better)"), str(s.n)]
            cells += [number(s.mean_a), number(s.mean_b), signed_interval(s.difference), share_interval(s.wins)]
            cells += [p_value(s.sign_p), p_value(s.permutation_p)]
            table.add_row(*(Text(cell) for cell in cells))
        for f in self.figures:
            table.add_row(
                *map(Text, [f.label, "", number(f.value_a), number(f.value_b), signed_interval(f.difference)])
            )
        return table


def compare(
    results_a: str | Path | Results,
    results_b: str | Path | Results,
    *,
    names: tuple[str, str] | None = None,
    pair_by: PairBy = "auto",
    allow_different: bool = False,
    higher_is_better: Mapping[str, bool] | None = None,
    seed: int = 0,
    level: float = 0.95,
) -> Comparison:
    """Join two results folders item by item and compare every score that both have.

    Args:
        results_a: the folder to compare against, as a rule the base model's.
        results_b: the folder whose wins are counted, as a rule the aligned model's.
        names: how to call the two; the model column, or else the folder names.
        pair_by: what makes an item besides its prompt. "seed" needs a seed on every row; "sample" takes the sample
            name; "auto" takes the seed where both folders have one everywhere, and the sample name otherwise.
        allow_different: compare although evaluator version, parameters, weights or decoder differ, and say so in
            the notes. Such a difference may come from the measuring stick instead of the models.
        higher_is_better: direction by label (`hps`) or evaluator, where the folders do not know it.
        seed: seed of bootstrap and permutation.
        level: confidence level of all intervals.

    Returns:
        Comparison, with scores in the order of `results_a`. Intervals are clustered by prompt.

    Raises:
        ValueError: a folder without results; nothing in common; an item that occurs twice; scores made by different
            evaluator versions, parameters, weights or decoders.
    """
    a = results_a if isinstance(results_a, Results) else read_results(results_a)
    b = results_b if isinstance(results_b, Results) else read_results(results_b)
    name_a, name_b = names or distinct_names([a, b])
    labels_a, labels_b = a.labels(), b.labels()
    common = [label for label in labels_a if label in set(labels_b)]
    if not common:
        raise ValueError(
            f"{a.folder} and {b.folder} have no score in common ({_listed(labels_a)} and {_listed(labels_b)}); "
            "score both with the same evaluators"
        )
    notes = _check_same_stick(a, b, (name_a, name_b), common, allow_different)
    key = _pairing(a, b, pair_by)
    index_a, index_b = _index(a, key), _index(b, key)
    items_a, items_b = _items(index_a), _items(index_b)
    items = items_a & items_b
    if not items and any(label not in a.whole_set_labels() for label in common):
        raise ValueError(_nothing_matches(a, b, key))
    scores = []
    for label in common:
        direction = _direction(label, (a, b), higher_is_better or {}, notes)
        rows = index_a[label], index_b[label]
        if label in a.whole_set_labels() and label in b.whole_set_labels():
            scores.append(_compare_whole(rows[0][WHOLE_SET], rows[1][WHOLE_SET], direction))
        else:
            scores.append(_compare_score(*rows, items, direction, seed, level))
    return Comparison(
        name_a=name_a,
        name_b=name_b,
        paired_by=f"prompt and {key}",
        level=level,
        items=len(items),
        unmatched_a=len(items_a - items),
        unmatched_b=len(items_b - items),
        only_a=tuple(x for x in labels_a if x not in common),
        only_b=tuple(x for x in labels_b if x not in common),
        scores=tuple(scores),
        notes=tuple(notes),
        figures=tuple(compare_figures(a, b, level)),
    )


def pair_rows(a: Results, b: Results, label: str, pair_by: PairBy = "auto") -> list[tuple[dict, dict]]:
    """The rows of score `label` for every item that both sides scored successfully, in the order of `a`."""
    key = _pairing(a, b, pair_by)
    left, right = _index(a, key).get(label, {}), _index(b, key).get(label, {})
    return [(row, right[k]) for k, row in left.items() if k in right and is_ok(row) and is_ok(right[k])]


# --- joining ---------------------------------------------------------------------------------------------------------


def _pairing(a: Results, b: Results, pair_by: PairBy) -> str:
    if pair_by not in ("auto", "seed", "sample"):
        raise ValueError(f"pair_by is {pair_by!r}; use 'auto', 'seed' or 'sample'")
    without = [r.folder for r in (a, b) if any(row.get("seed") is None for row in r.rows if row["sample"] != WHOLE_SET)]
    if pair_by == "seed" and without:
        raise ValueError(f"{without[0]} has rows without a seed; pair by sample instead, or write seeds when sampling")
    return "sample" if pair_by == "sample" or without else "seed"


def _index(results: Results, key: str) -> dict[str, dict[Hashable, dict[str, Any]]]:
    """label -> (prompt, seed or sample) -> row."""
    index: dict[str, dict[Hashable, dict[str, Any]]] = {}
    for row in results.rows:
        rows = index.setdefault(score_label(row["evaluator"], row["subscore"]), {})
        item = WHOLE_SET if row["sample"] == WHOLE_SET else (row.get("prompt"), row[key])
        if item in rows:
            raise ValueError(
                f"{results.folder}: samples {rows[item]['sample']!r} and {row['sample']!r} share the prompt "
                f"{_short(row.get('prompt'))} and the {key} {row[key]!r}; pair by sample, or give each its own {key}"
            )
        rows[item] = row
    return index


def _items(index: dict[str, dict[Hashable, dict[str, Any]]]) -> set[Hashable]:
    return {item for rows in index.values() for item in rows} - {WHOLE_SET}


def _nothing_matches(a: Results, b: Results, key: str) -> str:
    first_a, first_b = a.rows[0], b.rows[0]
    return (
        f"no item of {a.folder} has a partner in {b.folder} with the same prompt and {key}; the first items are "
        f"{_short(first_a.get('prompt'))}, {first_a[key]!r} and {_short(first_b.get('prompt'))}, {first_b[key]!r}. "
        "Sample both models on the same prompts and seeds, under the same sample names"
    )


def _check_same_stick(
    a: Results, b: Results, names: tuple[str, str], labels: list[str], allow_different: bool
) -> list[str]:
    """What differs in how the common scores were made: a ValueError, or notes if the user allows it."""
    found: dict[str, None] = {}
    marks_a, marks_b = _marks(a), _marks(b)
    for label in labels:
        if label not in marks_a or label not in marks_b:
            continue  # no successful row on one side: nothing will be subtracted
        for column, called in IDENTITY.items():
            seen_a, seen_b = marks_a[label][column], marks_b[label][column]
            if seen_a != seen_b or len(seen_a) > 1:
                said = f"{called} {_listed(seen_a)} in {names[0]}, {_listed(seen_b)} in {names[1]}"
                found[f"{a.evaluator(label)}: {said}"] = None
    if found and not allow_different:
        raise ValueError(
            "these results were not made in the same way, so their difference would not be the models': "
            + "; ".join(found)
            + ". Score both again with one configuration, or allow different evaluators to compare nevertheless"
        )
    return [f"Not made in the same way: {line}." for line in found]


def _marks(results: Results) -> dict[str, dict[str, set[str]]]:
    marks: dict[str, dict[str, set[str]]] = {}
    for row in results.rows:
        if is_ok(row):
            of_label = marks.setdefault(score_label(row["evaluator"], row["subscore"]), {c: set() for c in IDENTITY})
            for column in IDENTITY:
                of_label[column].add(str(row.get(column) or "none"))
    return marks


def _direction(label: str, sides: tuple[Results, Results], given: Mapping[str, bool], notes: list[str]) -> bool:
    evaluator = sides[0].evaluator(label)
    if label in given or evaluator in given:
        return given.get(label, given.get(evaluator, True))
    said = {r.higher_is_better(label) for r in sides} - {None}
    if len(said) > 1:
        raise ValueError(f"the two folders disagree on whether a higher {label} is better; pass higher_is_better")
    if not said:
        notes.append(f"{label}: the folders do not say which direction is better; higher is taken as better.")
    return bool(said.pop()) if said else True


# --- figures ---------------------------------------------------------------------------------------------------------


def _compare_score(
    rows_a: dict[Hashable, dict[str, Any]],
    rows_b: dict[Hashable, dict[str, Any]],
    items: set[Hashable],
    higher_is_better: bool,
    seed: int,
    level: float,
) -> ScoreComparison:
    first = next(iter(rows_a.values()))
    matched = [item for item in rows_a if item in items and item in rows_b]
    good = [item for item in matched if is_ok(rows_a[item]) and is_ok(rows_b[item])]
    a, b = ([float(rows[item]["score"]) for item in good] for rows in (rows_a, rows_b))
    clusters = [cluster(rows_a[item]) for item in good]
    undefined = not good
    sign = 1 if higher_is_better else -1
    difference = [y - x for x, y in zip(a, b, strict=True)]
    wins = (
        WinRate(math.nan, 0.0, 1.0, 0, 0, 0, 0)
        if undefined
        else win_rate([sign * y for y in b], [sign * x for x in a], clusters, level=level)
    )
    return ScoreComparison(
        evaluator=first["evaluator"],
        subscore=first["subscore"],
        higher_is_better=higher_is_better,
        n=len(good),
        failed=len(matched) - len(good),
        prompts=len(set(clusters)),
        mean_a=math.nan if undefined else math.fsum(a) / len(a),
        mean_b=math.nan if undefined else math.fsum(b) / len(b),
        difference=Interval(math.nan, math.nan, math.nan)
        if undefined
        else mean_ci(difference, clusters, seed=seed, level=level),
        wins=wins,
        sign_p=sign_test(wins.wins, wins.losses),
        permutation_p=1.0 if undefined else permutation_test(b, a, clusters, seed=seed),
    )


def _compare_whole(row_a: dict[str, Any], row_b: dict[str, Any], higher_is_better: bool) -> ScoreComparison:
    good = is_ok(row_a) and is_ok(row_b)
    a, b = (float(row["score"]) if is_ok(row) else math.nan for row in (row_a, row_b))
    return ScoreComparison(
        evaluator=row_a["evaluator"],
        subscore=row_a["subscore"],
        higher_is_better=higher_is_better,
        n=int(good),
        failed=int(not good),
        prompts=0,
        mean_a=a,
        mean_b=b,
        difference=Interval(b - a, math.nan, math.nan),
        wins=WinRate(math.nan, 0.0, 1.0, 0, 0, 0, 0),
        sign_p=1.0,
        permutation_p=1.0,
        whole_set=True,
    )


def cluster(row: dict[str, Any]) -> Hashable:
    """What a row was drawn with: its prompt. An item without one stands for itself."""
    return row.get("prompt") or ("sample", row["sample"])


# --- text ------------------------------------------------------------------------------------------------------------


def _listed(values: Iterable[str]) -> str:
    values = sorted(values)
    return ", ".join(values) if values else "none"


def _short(prompt: Any) -> str:
    text = repr(prompt)
    return text if len(text) <= 60 else text[:57] + "..."


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
