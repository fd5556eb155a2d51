"""What `bench/mllm_methods.py` has found so far, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SHOWN = {
    "chair_i": "shapes_claims/chair_i", "chair_s": "shapes_claims/chair_s", "recall": "shapes_claims/recall",
    "false relations": "shapes_claims/false_relation", "words": "shapes_claims/words",
    "unfinished": "shapes_claims/unfinished",
    "POPE random": "pope/random/accuracy", "popular": "pope/popular/accuracy",
    "adversarial": "pope/adversarial/accuracy",
}  # fmt: skip
_PLAIN = {"words"}


def value(line: dict[str, Any], name: str) -> float:
    """A figure of one run; nan where it is not defined."""
    found = line["figures"][SHOWN[name]]["value"]
    return float("nan") if found is None else float(found)


def summary_line(line: dict[str, Any]) -> str:
    """One run in one line."""
    told = "  ".join(f"{name} {_number(value(line, name), name)}" for name in SHOWN)
    return f"{line['method']:8} seed {line['seed']}  {told}  {line['train_seconds']:.0f} s"


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per method and setting. Means over seeds; in brackets the hull of the seeds' 95 % intervals over
    scenes; for falls and words, the smallest and largest over seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["method"], str(line["changed"] or "")), []).append(line)
    head = ["method", "seeds", *SHOWN, "fewer hallucinated mentions", "seconds of training"]
    rows = [head, ["---"] * len(head)]
    base = next((line for line in lines if line["method"] == "base"), None)
    for (method, changed), runs in groups.items():
        cells = [_spread(runs, name) for name in SHOWN]
        less = "" if base is None or method == "base" else _less(base, runs)
        seconds = "" if method == "base" else f"{np.mean([run['train_seconds'] for run in runs]):.0f}"
        rows.append([f"{method} {changed}".strip(), str(len(runs)), *cells, less, seconds])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _spread(runs: Sequence[dict[str, Any]], name: str) -> str:
    values = [value(run, name) for run in runs]
    ends = [run["figures"][SHOWN[name]].get("ci95") or [each, each] for run, each in zip(runs, values, strict=True)]
    low, high = min(end[0] for end in ends), max(end[1] for end in ends)
    return f"{_number(float(np.mean(values)), name)} [{_number(low, name)}, {_number(high, name)}]"


def _less(base: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """Relative fall of CHAIR_i: mean, smallest and largest over seeds."""
    falls = [1 - value(run, "chair_i") / value(base, "chair_i") for run in runs]
    return f"{np.mean(falls):.0%} ({min(falls):.0%} to {max(falls):.0%})"


def _number(value: float, name: str) -> str:
    return f"{value:.1f}" if name in _PLAIN else f"{100 * value:.1f}"
