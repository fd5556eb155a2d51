"""Figures over a set of scores: counts, mean, spread, an interval clustered by prompt, and what they belong to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmalign.figures import number
from mmalign.results import causes_by_example
from mmalign.score_plan import Job
from mmalign.source import shown
from mmalign.stats import mean_ci

__all__ = ["account", "scored_nothing", "summarise"]

MOST_REASONS = 5


def summarise(table: pa.Table, jobs: Sequence[Job], seed: int = 0) -> dict[str, Any]:
    """One entry per evaluator's label.

    Args:
        table: settled rows, see `mmalign.score_store.SCHEMA`.
        jobs: the evaluators, in the order in which they shall stand.
        seed: of the bootstrap.

    Returns:
        label -> what the evaluator is, ``n_ok, n_skipped, n_error`` in items, ``coverage`` (the share of items with a
        score), the most frequent reasons with an example of each, the share of prompts that the text encoder saw only
        in part, and ``mean, std, ci95``: at this level for a single score, under ``subscores`` for named ones. Where
        the table names several models, ``by_model`` holds the same figures for each. ``counts`` names the sub-scores
        that only say how much there was to measure; they have no figures.
    """
    rows: dict[str, list[dict[str, Any]]] = {job.label: [] for job in jobs}
    for row in table.to_pylist():
        rows[row["evaluator"]].append(row)
    return {job.label: {**_identity(job), **_figures(_measures(rows[job.label], job), seed)} for job in jobs}


def account(summary: Mapping[str, Any], means: bool = True) -> list[str]:
    """Lines for a person: of each evaluator how many items have a score, why the others have none, and its figures.

    Args:
        summary: what ``summary.json`` holds.
        means: whether to say the means too.
    """
    lines: list[str] = []
    before: list[str] = []
    for label, entry in summary.get("evaluators", {}).items():
        total = entry["n_ok"] + entry["n_skipped"] + entry["n_error"]
        share = f"{math.floor(100 * entry['coverage'])} %" if total else "nothing"
        missed = [f"{entry[f'n_{kind}']} {word}" for kind, word in _MISSED if entry[f"n_{kind}"]]
        mean = [f"mean {number(entry['mean'])}"] if means and entry.get("mean") is not None else []
        lines.append(", ".join([f"{label}: {entry['n_ok']} of {total} scored ({share})", *missed, *mean]))
        examples = entry.get("examples", {})
        reasons = [_reason(count, reason, examples.get(reason)) for reason, count in entry["reasons"].items()]
        if entry["other_reasons"]:
            reasons.append(f"  {entry['other_reasons']} for other reasons; parts/ has a row for each")
        lines += ["  for the same reasons"] if reasons and reasons == before else reasons
        before = reasons
        if "figures_problem" in entry:
            lines.append(f"  no figures, since computing them failed: {shown(entry['figures_problem'])}")
        lines += [f"  {name} {_interval(each)}" for name, each in entry.get("figures", {}).items()]
    return lines


def _interval(figure: Mapping[str, Any]) -> str:
    """`0.8531 [0.8410, 0.8655]`, or the value alone where it has no interval."""
    ends = figure["ci95"]
    return number(figure["value"]) + (f" [{number(ends[0])}, {number(ends[1])}]" if ends else "")


def _reason(count: int, reason: str, example: str | None) -> str:
    which = "" if example is None else f" ({'' if count == 1 else 'such as '}{shown(example)})"
    return f"  {count} x {shown(reason)}{which}"


def scored_nothing(summary: Mapping[str, Any]) -> bool:
    """Whether no evaluator has a single score, although there was something to score."""
    entries = summary.get("evaluators", {}).values()
    return bool(summary.get("n_rows")) and not any(entry["n_ok"] for entry in entries)


def _measures(rows: Sequence[dict[str, Any]], job: Job) -> list[dict[str, Any]]:
    """The rows without those of counts."""
    return [row for row in rows if row["subscore"] not in job.cls.counts]


_MISSED = (("skipped", "skipped"), ("error", "failed"))


def _identity(job: Job) -> dict[str, Any]:
    cls = job.cls
    lines = (cls.__doc__ or "").strip().splitlines()
    return {
        "name": job.name,
        "summary": lines[0] if lines else "",
        "version": cls.version,
        "params": job.params.model_dump(mode="json"),
        "params_hash": job.params_hash,
        "weight_hash": job.weight_hash,
        "higher_is_better": cls.higher_is_better,
        "counts": sorted(cls.counts),
        "score_range": list(cls.bounds(job.params)),
        "licence": cls.licence,
        "source": cls.source,
    }


def _figures(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    names = list(dict.fromkeys(str(row["subscore"]) for row in rows))
    status = {row["sample"]: row["status"] for row in rows}
    cut = {row["sample"]: row["prompt_truncated"] for row in rows if row["prompt_truncated"] is not None}
    reasons = causes_by_example(dict(row) for row in rows if row["status"] != "ok" and row["subscore"] == names[0])
    counts = Counter(status.values())
    result: dict[str, Any] = {
        "n_ok": counts["ok"],
        "n_skipped": counts["skipped"],
        "n_error": counts["error"],
        "coverage": counts["ok"] / len(status) if status else None,
        "reasons": {reason: count for reason, count, _ in reasons[:MOST_REASONS]},
        "examples": {reason: sample for reason, _, sample in reasons[:MOST_REASONS]},
        "other_reasons": sum(count for _, count, _ in reasons[MOST_REASONS:]),
        "truncated_prompt_share": sum(cut.values()) / len(cut) if cut else None,
        "seconds_per_item": _mean([row["seconds"] for row in rows if row["seconds"] is not None]),
        "decoders": sorted({str(row["decoder"]) for row in rows}),
    }
    if names in (["score"], []):
        result |= _spread(rows, seed)
    else:
        result["subscores"] = {name: _spread([row for row in rows if row["subscore"] == name], seed) for name in names}
    models = list(dict.fromkeys(row["model"] for row in rows))
    if len(models) > 1:
        result["by_model"] = {
            str(model): {
                name: _spread([row for row in rows if row["model"] == model and row["subscore"] == name], seed)
                for name in names
            }
            for model in models
        }
    return result


def _spread(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    good = [row for row in rows if row["status"] == "ok"]
    if not good:
        return {"n": 0, "mean": None, "std": None, "ci95": None}
    values = np.array([row["score"] for row in good], dtype=np.float64)
    # Images of one prompt are not independent of each other; an item without a prompt stands for itself.
    clusters = [row["prompt"] or f"sample {row['sample']}" for row in good]
    mean, low, high = mean_ci(values, clusters, seed=seed)
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    ends = [float(low), float(high)]
    return {"n": len(good), "mean": float(mean), "std": std, "ci95": ends if all(map(math.isfinite, ends)) else None}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
