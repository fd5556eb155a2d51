"""What a training run folder contributes to the report: its curves and its resolved config."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.figures import short
from mmalign.report_plots import curve_colour, curves
from mmalign.results import flat, read_json

# Quantities that belong into one picture, in the order of the page; `reference` is the level that means "no effect".
_PANELS: tuple[tuple[str, tuple[str, ...], float | None], ...] = (
    ("Loss", ("loss",), None),
    ("Implicit accuracy", ("implicit_accuracy",), 0.5),
    ("Margin", ("margin",), 0.0),
    ("Denoising error, preferred", ("model_w_err", "ref_w_err"), None),
    ("Denoising error, rejected", ("model_l_err", "ref_l_err"), None),
    ("Gradient norm", ("grad_norm",), None),
    ("Learning rate", ("lr",), None),
    ("Pairs per second", ("pairs_per_second",), None),
    ("Peak memory", ("peak_memory",), None),
)
_NOT_CURVES = frozenset({"step", "epoch", "time", "seconds", "wall_time", "timestamp"})
_MOST_PANELS = 12


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Records of a `metrics.jsonl` by step, and the number of lines that could not be read.

    A resumed run writes some steps twice; the later record counts. A killed run may leave half a line.

    Raises:
        ValueError: the file holds no record with a step at all.
    """
    records: dict[int, dict[str, Any]] = {}
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        records[step] = records.get(step, {}) | record
    if not records:
        raise ValueError(f"{path} holds no training record with a step; is it the metrics.jsonl of a training run?")
    return [records[step] for step in sorted(records)], unreadable


def training_section(run: Path) -> dict[str, Any]:
    """The template's data for a training run: panels, remarks and the text of its config.

    Args:
        run: folder with metrics.jsonl, and as a rule config.yaml and run.json.

    Raises:
        ValueError: no such file, or nothing in it.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is not a training run: it has no metrics.jsonl")
    records, unreadable = read_metrics(path)
    panels, left = _panels(records)
    remarks = []
    if unreadable:
        remarks.append(f"Lines of metrics.jsonl that could not be read and are left out: {unreadable}.")
    if left:
        remarks.append(f"Logged and not drawn: {', '.join(left)}.")
    config, facts = run / "config.yaml", run / "run.json"
    return {
        "folder": run.name,
        "steps": records[-1]["step"],
        "panels": panels,
        "remarks": remarks,
        "config": config.read_text(encoding="utf-8") if config.is_file() else None,
        "facts": flat(read_json(facts)),
    }


def _panels(records: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    logged = dict.fromkeys(name for record in records for name in record if name not in _NOT_CURVES)
    columns = {name: pair for name in logged if len((pair := _column(records, name))[0])}
    known = {name for _, names, _ in _PANELS for name in names}
    groups = [(title, [n for n in names if n in columns], level) for title, names, level in _PANELS]
    groups = [group for group in groups if group[1]]
    groups += [(name.replace("_", " ").capitalize(), [name], None) for name in sorted(columns) if name not in known]
    left = [name for _, names, _ in groups[_MOST_PANELS:] for name in names]
    return [_panel(title, {n: columns[n] for n in names}, level) for title, names, level in groups[:_MOST_PANELS]], left


def _panel(title: str, series: dict[str, tuple[np.ndarray, np.ndarray]], level: float | None) -> dict[str, Any]:
    return {
        "title": title,
        "svg": curves(series, level),
        "lines": [
            {
                "name": name,
                "colour": curve_colour(i),
                "last": short(float(values[-max(1, len(values) // 20) :].mean())),
            }
            for i, (name, (_, values)) in enumerate(series.items())
        ],
    }


def _column(records: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one quantity where it is a finite number."""
    points = [(r["step"], r[name]) for r in records if _is_number(r.get(name))]
    return np.array([s for s, _ in points], dtype=float), np.array([v for _, v in points], dtype=float)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
