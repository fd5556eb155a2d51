"""What a VBench record contributes to the report: dimensions beside rows of the board, a picture, quirks in force."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.report_plots import Bar, Mark, bars
from mmalign.vbench.dimensions import DIMENSIONS, base
from mmalign.vbench.leaderboard import Row, Suite, choose
from mmalign.vbench.quirks import QUIRKS
from mmalign.vbench.record import RECORD_FILE, DimensionScore, VBenchRecord, read_record
from mmalign.vbench.results import suite_of
from mmalign.vbench.score import missing_words, normalise

__all__ = ["vbench_section"]


def vbench_section(models: Sequence[dict[str, Any]], against: Sequence[str] | None = None) -> dict[str, Any] | None:
    """The template's data for the folders that hold a VBench record.

    Args:
        models: `name`, `colour` and `results` of each, as the report has them.
        against: rows of the board to set beside; None: those of the first run's config (`vbench.against`), or the three
            best and the nearest to it.

    Returns:
        None where no folder holds one.

    Raises:
        ValueError: a record that cannot be read, an unknown row (with the nearest), or rows asked for and no record.
    """
    found = [
        (model, read_record(folder))
        for model in models
        if ((folder := Path(model["results"].folder)) / RECORD_FILE).is_file()
    ]
    if not found:
        if against:
            raise ValueError(f"rows of VBench's board were asked for, and no folder holds a {RECORD_FILE}")
        return None
    labels = _labels([record for _, record in found])
    suite = suite_of(labels)
    asked = against if against is not None else _asked(found[0][0])
    board = choose(_exact(found[0][1]), suite, asked) if suite != "vbench2" else []
    return {
        "models": [{"name": model["name"], "colour": model["colour"]} for model, _ in found],
        "board": board,
        "lines": [_line(label, found, board) for label in labels],
        "totals": [_total(name, found, board) for name in dict.fromkeys(t for _, r in found for t in r.totals)],
        "svg": _picture(labels, found, board),
        "remarks": [remark for model, record in found for remark in _remarks(model["name"], record, suite)],
        "notes": [f"{row.name}: {row.source}. {row.note}".strip() for row in board],
        "quirks": [_quirk(name) for name in dict.fromkeys(q for _, record in found for q in record.quirks)],
        "facts": [(model["name"], _facts(record)) for model, record in found],
    }


def _asked(model: dict[str, Any]) -> list[str] | None:
    """The rows that the run's own config names, `vbench.against`."""
    block: Any = model["results"].run
    for key in ("config", "vbench", "against"):
        block = block.get(key) if isinstance(block, dict) else None
    return [str(name) for name in block] if isinstance(block, list) and block else None


def _labels(records: Sequence[VBenchRecord]) -> list[str]:
    """Evaluators' labels in the order of the board, exact ones before what stands in for them."""
    labels = dict.fromkeys(each.name for record in records for each in record.dimensions)
    order = {name: number for number, name in enumerate(DIMENSIONS)}
    return sorted(labels, key=lambda label: (order.get(base(label), len(order)), base(label) != label, label))


def _exact(record: VBenchRecord) -> dict[str, float | None]:
    return {each.name: each.score for each in record.exact()}


def _of(record: VBenchRecord, label: str) -> DimensionScore | None:
    return next((each for each in record.dimensions if each.name == label), None)


def _line(label: str, found: Sequence[tuple[dict[str, Any], VBenchRecord]], board: Sequence[Row]) -> dict[str, Any]:
    """One dimension: a cell per model and per row of the board."""
    cells = [_of(record, label) for _, record in found]
    kinds = {cell.kind for cell in cells if cell is not None}
    return {
        "label": label,
        "substitute": kinds != {"exact"},
        "cells": cells,
        "board": [row.scores.get(label) for row in board],  # a substitute's label is on no board
    }


def _total(name: str, found: Sequence[tuple[dict[str, Any], VBenchRecord]], board: Sequence[Row]) -> dict[str, Any]:
    cells = [record.totals.get(name) for _, record in found]
    return {
        "label": name.replace("_", " "),
        "substitute": any(cell is not None and cell.substitutes for cell in cells),
        "cells": cells,
        "board": [row.totals.get(name) for row in board],
    }


def _picture(labels: Sequence[str], found: Sequence[tuple[dict[str, Any], VBenchRecord]], board: Sequence[Row]) -> str:
    """Normalised scores: a bar per model, a mark per row of the board; a substitute's own score, hollow."""
    drawn: list[Bar] = []
    for label in labels:
        ours = []
        for model, record in found:
            each = _of(record, label)
            if each is None or each.score is None:
                continue
            exact = each.kind == "exact" and label in DIMENSIONS
            value, low, high = (
                normalise(label, x) if exact else x for x in (each.score, *(each.ci95 or (each.score, each.score)))
            )
            ours.append((int(model["colour"]), value, (low, high) if each.ci95 else None))
        marks = [
            Mark(number, normalise(label, row.scores[label]))
            for number, row in enumerate(board)
            if label in row.scores and label in DIMENSIONS
        ]
        if ours:
            drawn.append(Bar(label, ours, marks, hollow=label not in DIMENSIONS))
    return bars(drawn, "Normalised scores of VBench's dimensions") if drawn else ""


def _remarks(name: str, record: VBenchRecord, suite: Suite | str) -> list[str]:
    """What keeps a model's figures from being set beside the board's."""
    said = []
    substitutes = [each.name for each in record.dimensions if each.kind == "substitute"]
    if substitutes:
        said.append(f"{name}: {', '.join(substitutes)} are substitutes, and not leaderboard-comparable.")
    if record.rules == "strict":
        said.append(f"{name}: strict rules repair the reference's quirks; scores are not leaderboard-comparable.")
    if record.mode != "standard":
        said.append(f"{name}: clips of the {record.mode} mode, not the standard suite; not leaderboard-comparable.")
    for total, figure in record.totals.items():
        if figure.missing and total not in ("total", "i2v_total"):
            fate = "which has no figure" if figure.value is None else "where it counts as 0"
            said.append(f"{name}: {missing_words(total, figure)} missing in {total.replace('_', ' ')}, {fate}.")
    short = [f"{each.name} {each.n} of {each.expected}" for each in record.dimensions if each.n < each.expected]
    if short:
        said.append(f"{name}: clips without a score: {', '.join(short)}. Bounds say what they could change.")
    said += [f"{name}: {each.name}: {note}" for each in record.dimensions for note in each.notes]
    return said


def _quirk(name: str) -> tuple[str, str]:
    """A quirk's id and words; one that this version does not know is named all the same."""
    if name not in QUIRKS:
        return name, "not known to this version"
    each = QUIRKS[name]
    return name, f"{each.dimension}: {each.what}; {each.effect}"


def _facts(record: VBenchRecord) -> list[tuple[str, str]]:
    """How the record was made."""
    facts = {
        "mode": record.mode,
        "rules": record.rules,
        "suite": record.suite,
        "suite sha256": record.suite_sha256,
        "clips without a score": record.on_failure,
        "decoder": record.decoder,
        **record.libraries,
        "mmalign": record.mmalign_version or None,
    }
    return [(key, str(value)) for key, value in facts.items() if value is not None]
