"""Read a results folder as scoring writes it: long parquet parts, a summary and the run that made them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmalign.source import shown

WHOLE_SET = "(whole set)"  # the sample of a score that belongs to all items together, as FID does
# Without these a row is not a result; all others may be missing.
REQUIRED = ("sample", "prompt", "media", "evaluator", "subscore", "score", "status")
MOST_VANISHED = 9  # a name that is always listed and never there is a link to nothing


@dataclass(frozen=True)
class Results:
    """One results folder. `rows` are dicts with the columns of the parquet parts, one per (sample, score)."""

    folder: Path
    rows: list[dict[str, Any]]
    summary: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def model(self) -> str | None:
        """The name of the one model that made all the media; None where there are several or it is unknown."""
        names = {row.get("model") for row in self.rows}
        return names.pop() if len(names) == 1 else None

    @cached_property
    def _by_label(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault(score_label(row["evaluator"], row["subscore"]), []).append(row)
        return found

    def labels(self) -> list[str]:
        """Labels of all scores (`hps`, `shapes_truth/colour`), in the order in which they first occur, less counts."""
        return [label for label in self._by_label if label not in self.count_labels]

    @cached_property
    def count_labels(self) -> frozenset[str]:
        """Labels of what only says how much there was to measure, as `summary.json` has it; no measures of quality."""
        evaluators: Any = self.summary.get("evaluators")
        entries = evaluators.items() if isinstance(evaluators, dict) else ()
        counted = {(name, part) for name, entry in entries for part in _counts(entry)}
        return frozenset(score_label(name, part) for name, part in counted)

    def evaluator(self, label: str) -> str:
        """The evaluator that gave the score `label`."""
        return str(self._by_label[label][0]["evaluator"])

    def whole_set_labels(self) -> set[str]:
        """Labels of the scores that have one figure for the whole set and none per item."""
        return {label for label in self.labels() if all(row["sample"] == WHOLE_SET for row in self.rows_of(label))}

    def rows_of(self, label: str) -> list[dict[str, Any]]:
        """All rows of one score, failed ones too."""
        return self._by_label.get(label, [])

    def higher_is_better(self, label: str) -> bool | None:
        """Direction of the score as `summary.json` states it; None where it does not."""
        evaluators: Any = self.summary.get("evaluators")
        known = isinstance(evaluators, dict) and label in self._by_label
        entry = evaluators.get(self.evaluator(label)) if known else None
        direction = entry.get("higher_is_better") if isinstance(entry, dict) else None
        return direction if isinstance(direction, bool) else None


def _counts(entry: Any) -> list[str]:
    parts = entry.get("counts") if isinstance(entry, dict) else None
    return [part for part in parts if isinstance(part, str)] if isinstance(parts, list) else []


def read_results(folder: str | Path) -> Results:
    """Read the parts of a results folder.

    Where the same (sample, evaluator, subscore) occurs more than once, as after a resumed run, the row of the last part
    counts.

    Args:
        folder: holds `parts/part-*.parquet`, and as a rule `summary.json` and `run.json`.

    Returns:
        Results, rows in the order of the parts.

    Raises:
        ValueError: no such folder, no parts, no rows, or parts without a column that every result has.
    """
    import pyarrow.parquet as pq

    folder = Path(folder)
    parts = read_parts(lambda: sorted((folder / "parts").glob("part-*.parquet")), pq.read_table)
    if not parts:
        raise ValueError(
            f"{folder} is not a results folder: it has no parts/part-*.parquet. Make one with mmalign score"
        )
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part, table in parts:
        missing = [name for name in REQUIRED if name not in table.column_names]
        if missing:
            raise ValueError(f"{part} has no column {', '.join(missing)}; it was not written by mmalign score")
        for row in table.to_pylist():
            rows[(row["sample"], row["evaluator"], row["subscore"])] = row
    if not rows:
        raise ValueError(f"{folder} holds no rows; the table that was scored was empty")
    return Results(folder, list(rows.values()), read_json(folder / "summary.json"), read_json(folder / "run.json"))


def read_parts(files: Callable[[], Sequence[Path]], read: Callable[[Path], Any]) -> list[tuple[Path, Any]]:
    """Each part with what `read` gives of it.

    A run that ends puts one part in the place of many: where one of them has vanished meanwhile, all is read again.

    Args:
        files: lists the parts, as they are now.

    Raises:
        ValueError: a part is damaged.
    """
    import pyarrow as pa

    vanished = 0
    while True:
        found = []
        for file in files():
            try:
                found.append((file, read(file)))
            except (pa.ArrowException, OSError) as error:
                vanished += isinstance(error, FileNotFoundError)
                if isinstance(error, FileNotFoundError) and vanished < MOST_VANISHED:
                    break
                fix = "delete it and score again, the rest is kept"
                raise ValueError(f"{file} cannot be read ({error}); {fix}") from error
        else:
            return found


def score_label(evaluator: str, subscore: str | None) -> str:
    """`hps` for an evaluator's only score, `shapes_truth/colour` for a named part of it."""
    return evaluator if subscore in (None, "", "score", evaluator) else f"{evaluator}/{subscore}"


def is_ok(row: dict[str, Any]) -> bool:
    """Whether the row holds a score to count with."""
    return row["status"] == "ok" and row["score"] is not None and math.isfinite(row["score"])


def causes(rows: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    """Why rows have no score, and how many of them for each reason, the commonest first.

    The first line of each reason, without the name of its file. Reasons that differ in their numbers alone count as
    one, with `…` for the numbers.
    """
    groups: dict[str, Counter[str]] = {}
    for row in rows:
        reason = "the score is not a finite number" if row["status"] == "ok" else row.get("reason") or "no reason given"
        lines = reason.removeprefix(f"{shown(str(row['media']))}: ").splitlines()
        first = lines[0] if lines else "no reason given"
        groups.setdefault(re.sub(r"\d[\d.,]*", "…", first), Counter())[first] += 1
    counted = [(next(iter(said)) if len(said) == 1 else group, said.total()) for group, said in groups.items()]
    return sorted(counted, key=lambda each: -each[1])


def distinct_names(results: Iterable[Results]) -> tuple[str, ...]:
    """A name for each folder: its one model where these differ, the folder's name otherwise, numbered if need be."""
    results = list(results)
    for candidates in (
        [r.model for r in results],
        [r.folder.name for r in results],
        [f"{r.folder.parent.name}/{r.folder.name}" for r in results],
    ):
        if all(candidates) and len(set(candidates)) == len(candidates):
            return tuple(str(name) for name in candidates)
    return tuple(f"{r.folder.name} ({i})" for i, r in enumerate(results, 1))


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested dicts as (dotted key, text) lines."""
    if isinstance(value, dict):
        return [line for key, inner in value.items() for line in flat(inner, f"{prefix}.{key}" if prefix else str(key))]
    return [(prefix, str(value))]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file. ValueError if it is not JSON."""
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write it anew") from error
    return data if isinstance(data, dict) else {}
