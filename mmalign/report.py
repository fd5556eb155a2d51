"""One self-contained HTML page about scored results: figures with intervals, pictures, curves, and how they were made.

The page fetches nothing and runs no script but the one that plays clips, where there are some; its content security
policy forbids all else. Pictures and clips are inside it. Every text that came from a table, a config or a model name
is escaped.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mmalign.compare import Comparison, PairBy, ScoreComparison, cluster, compare, pair_rows
from mmalign.compare_figures import figures_in
from mmalign.figures import number, p_value, percent, printable, share_interval, signed_interval
from mmalign.report_media import Thumbnails, script
from mmalign.report_plots import SERIES, histogram, mark_sign
from mmalign.report_run import training_section
from mmalign.report_vbench import vbench_section
from mmalign.results import Results, causes, distinct_names, flat, is_ok, read_results
from mmalign.stats import mean_ci

_MOST_RANKED = 3  # scores that get galleries of their own, unless the caller names more
_MOST_REASONS = 5


def build(
    results: Sequence[str | Path],
    output: str | Path,
    *,
    run: str | Path | None = None,
    comparison: Comparison | Sequence[Comparison] | None = None,
    title: str | None = None,
    rank_by: Sequence[str] | None = None,
    per_gallery: int = 6,
    vbench_against: Sequence[str] | None = None,
) -> Path:
    """Write the report.

    Args:
        results: results folders, the one to compare against (the base model's) first; at least one.
        output: the HTML file; its folder is made.
        run: training run folder with metrics.jsonl and config.yaml.
        comparison: of the first folder with each of the others, in their order. None: made here with the defaults of
            `mmalign.compare.compare`.
        title: heading of the page.
        rank_by: labels of the scores (`hps`, `shapes_truth/colour`) by which pictures are chosen, the most important
            first. None: the first score of each of the first three evaluators.
        per_gallery: how many pictures or pairs a gallery shows; a page of 6 stays under 5 MB.
        vbench_against: rows of VBench's board beside the dimensions of folders that hold a `vbench.json`. None: the
            three best and the nearest.

    Returns:
        The path written.

    Raises:
        ValueError: no folder, a folder without results, results that cannot be compared (see `compare`), an unknown
            label in `rank_by`, comparisons that do not fit the folders, a run without metrics.jsonl.
    """
    if not results:
        raise ValueError("a report needs at least one results folder")
    folders = [read_results(folder) for folder in results]
    comparisons = _comparisons(folders, comparison)
    names = [comparisons[0].name_a, *(c.name_b for c in comparisons)] if comparisons else list(distinct_names(folders))
    ranked = _ranked(folders, comparisons, rank_by)
    directions = _directions(folders, comparisons)
    thumbnails = Thumbnails()
    models: list[dict[str, Any]] = [
        {"name": name, "colour": i % SERIES if comparisons else 1, "folder": str(r.folder), "results": r}
        for i, (name, r) in enumerate(zip(names, folders, strict=True))
    ]
    page = {
        "title": title or (f"{names[-1]} against {names[0]}" if comparisons else f"Scores of {names[0]}"),
        "models": models,
        "comparisons": [_comparison_section(c, ranked[0]) for c in comparisons],
        "vbench": vbench_section(models, vbench_against),
        "scores": _score_sections(models, directions),
        "figures": _figure_lines(models),
        "pairs": [_pair_tabs(folders[0], r, c, ranked, thumbnails, per_gallery) for r, c in _zip(folders, comparisons)],
        "extremes": [_extreme_tab(models, label, directions[label], thumbnails, per_gallery) for label in ranked],
        "training": training_section(Path(run)) if run is not None else None,
        "accounts": [_account(model, label) for model in models for label in model["results"].labels()],
        "origins": [_origin(model) for model in models],
        "thumbnails": thumbnails,
    }
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(_render(page), encoding="utf-8")
    return output


def _render(page: dict[str, Any]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    environment.filters |= {
        "number": number,
        "p_value": p_value,
        "percent": percent,
        "share": share_interval,
        "signed": signed_interval,
        "sign": mark_sign,
        "svg": Markup,  # our own drawings, in which report_plots has escaped all text
    }
    template = files("mmalign").joinpath("report.html.j2").read_text(encoding="utf-8")
    text, digest = script("clips.js")
    return environment.from_string(template).render(page, script=text, digest=digest)


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


# --- what is compared, and by what pictures are chosen ---------------------------------------------------------------


def _comparisons(folders: list[Results], given: Comparison | Sequence[Comparison] | None) -> list[Comparison]:
    if given is None:
        names = distinct_names(folders)
        return [compare(folders[0], r, names=(names[0], n)) for r, n in zip(folders[1:], names[1:], strict=True)]
    comparisons = [given] if isinstance(given, Comparison) else list(given)
    if len(comparisons) != len(folders) - 1:
        raise ValueError(
            f"{len(folders)} results folders need {len(folders) - 1} comparisons, each of the first folder with one "
            f"of the others; got {len(comparisons)}"
        )
    return comparisons


def _zip(folders: list[Results], comparisons: list[Comparison]) -> list[tuple[Results, Comparison]]:
    return list(zip(folders[1:], comparisons, strict=True))


def _ranked(folders: list[Results], comparisons: list[Comparison], wanted: Sequence[str] | None) -> list[str]:
    whole = folders[0].whole_set_labels()  # no picture has such a score
    labels = [s.label for s in comparisons[0].scores] if comparisons else folders[0].labels()
    labels = [label for label in labels if label not in whole]
    for comparison in comparisons[1:]:
        labels = [label for label in labels if label in {s.label for s in comparison.scores}]
    if not labels:
        raise ValueError("the results folders have no score of single items in common; make a report for each")
    if wanted is None:
        first: dict[str, str] = {}
        for label in labels:
            first.setdefault(folders[0].evaluator(label), label)
        return list(first.values())[:_MOST_RANKED]
    unknown = [label for label in wanted if label not in labels]
    if unknown or not wanted:
        raise ValueError(f"rank_by names {', '.join(unknown) or 'nothing'}; the scores are {', '.join(labels)}")
    return list(dict.fromkeys(wanted))


# --- sections --------------------------------------------------------------------------------------------------------


def _comparison_section(comparison: Comparison, headline: str) -> dict[str, Any]:
    score = comparison.score(headline)
    return {"data": comparison, "headline": score, "verdict": _verdict(comparison, score)}


def _verdict(comparison: Comparison, score: ScoreComparison) -> str:
    """What the interval allows to say: a win, a loss, or neither."""
    wins, a, b = score.wins, comparison.name_a, comparison.name_b
    if not score.n:
        return f"No item could be compared by {score.label}."
    if wins.low > 0.5:
        return f"{b} beats {a} by {score.label}."
    if wins.high < 0.5:
        return f"{b} loses to {a} by {score.label}."
    return f"No clear winner between {b} and {a} by {score.label}."


def _score_sections(models: list[dict[str, Any]], directions: dict[str, bool]) -> list[dict[str, Any]]:
    """Distribution and mean of every score, in order of first appearance over all models."""
    sections = []
    for label in dict.fromkeys(label for model in models for label in model["results"].labels()):
        lines, series = [], []
        whole = any(label in model["results"].whole_set_labels() for model in models)
        for model in models:
            rows = [row for row in model["results"].rows_of(label) if is_ok(row)]
            if not rows:
                continue
            values = [float(row["score"]) for row in rows]
            mean = mean_ci(values, [cluster(row) for row in rows])
            extent = {"low": min(values), "high": max(values)}
            lines.append({"name": model["name"], "colour": model["colour"], "n": len(rows), "mean": mean, **extent})
            series.append((model["name"], model["colour"], values))
        sections.append(
            {
                "label": label,
                "lines": lines,
                "svg": None if whole or not series else histogram(series, label),
                "whole_set": whole,
                "higher_is_better": directions[label],
            }
        )
    return sections


def _figure_lines(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each model's figures of the whole table, such as F1, with intervals, and the items they are of."""
    lines = []
    for model in models:
        for label, figures in figures_in(model["results"]).items():
            entry = model["results"].summary["evaluators"][label]
            shared = {"name": model["name"], "colour": model["colour"], "label": label, "n": entry["figures_of"]["n"]}
            lines += [{**shared, "figure": name, **each, "total": _total(entry)} for name, each in figures.items()]
    return lines


def _total(entry: dict[str, Any]) -> int:
    return int(entry["n_ok"] + entry["n_skipped"] + entry["n_error"])


def _directions(folders: list[Results], comparisons: list[Comparison]) -> dict[str, bool]:
    """Whether higher is better, for every score: as the comparison took it, or else as the folders say."""
    found = {label: r.higher_is_better(label) is not False for r in reversed(folders) for label in r.labels()}
    return found | {score.label: score.higher_is_better for c in comparisons for score in c.scores}


def _pair_tabs(
    a: Results, b: Results, comparison: Comparison, ranked: list[str], thumbnails: Thumbnails, count: int
) -> dict[str, Any]:
    """Side by side: where b gained most, where it lost most, and a fair draw."""
    key: PairBy = "seed" if comparison.paired_by.endswith("seed") else "sample"
    tabs = []
    for label in ranked:
        score = comparison.score(label)
        sign = 1 if score.higher_is_better else -1
        pairs = [(sign * (y["score"] - x["score"]), x, y) for x, y in pair_rows(a, b, label, key)]
        pairs.sort(key=lambda pair: (-pair[0], str(pair[1]["sample"])))
        drawn = random.Random(0).sample(pairs, min(count, len(pairs)))
        galleries = [
            ("Biggest gains", [p for p in pairs[:count] if p[0] > 0]),
            ("Biggest losses", [p for p in reversed(pairs[-count:]) if p[0] < 0]),
            ("Drawn at random", drawn),
        ]
        shown = [
            {"title": name, "cards": [_card(a, b, x, y, gain, thumbnails) for gain, x, y in chosen]}
            for name, chosen in galleries
        ]
        tabs.append({"label": label, "galleries": shown, "n": len(pairs)})
    return {"name_a": comparison.name_a, "name_b": comparison.name_b, "tabs": tabs}


def _card(
    a: Results, b: Results, x: dict[str, Any], y: dict[str, Any], gain: float, thumbnails: Thumbnails
) -> dict[str, Any]:
    return {
        "prompt": x.get("prompt"),
        "seed": x.get("seed"),
        "sample": x["sample"],
        "gain": gain,
        "change": y["score"] - x["score"],
        "a": _side(a, x, thumbnails),
        "b": _side(b, y, thumbnails),
    }


def _side(results: Results, row: dict[str, Any], thumbnails: Thumbnails) -> dict[str, Any]:
    shown = {name: row.get(name) for name in ("score", "response", "note")}
    return {**shown, "thumbnail": thumbnails.of(results, row)}


def _extreme_tab(
    models: list[dict[str, Any]], label: str, higher_is_better: bool, thumbnails: Thumbnails, count: int
) -> dict[str, Any]:
    """Best and worst of each model by one score; with few rows no picture is in both."""
    sign = 1 if higher_is_better else -1
    strips = []
    for model in models:
        rows = [row for row in model["results"].rows_of(label) if is_ok(row)]
        rows.sort(key=lambda row: (-sign * row["score"], str(row["sample"])))
        each = min(count, math.ceil(len(rows) / 2))
        worst = rows[max(each, len(rows) - count) :][::-1]
        for name, chosen in (("best", rows[:each]), ("worst", worst)):
            tiles = [{"row": row, "thumbnail": thumbnails.of(model["results"], row)} for row in chosen]
            strips.append({"model": model["name"], "colour": model["colour"], "name": name, "tiles": tiles})
    return {"label": label, "strips": strips}


def _account(model: dict[str, Any], label: str) -> dict[str, Any]:
    """How many rows of a score are ok, skipped and failed, and why."""
    rows = model["results"].rows_of(label)
    status = Counter(row["status"] if row["status"] != "ok" or is_ok(row) else "error" for row in rows)
    reasons = causes(row for row in rows if not is_ok(row))
    versions = sorted({str(row["evaluator_version"]) for row in rows if row.get("evaluator_version") is not None})
    return {
        "model": model["name"],
        "label": label,
        "rows": len(rows),
        "ok": status.pop("ok", 0),
        "skipped": status.pop("skipped", 0),
        "error": sum(status.values()),
        "reasons": reasons[:_MOST_REASONS],
        "other_reasons": sum(n for _, n in reasons[_MOST_REASONS:]),
        "seconds": sum(row.get("seconds") or 0.0 for row in rows),
        "version": ", ".join(versions),
    }


def _origin(model: dict[str, Any]) -> dict[str, Any]:
    """The config of a scoring run as YAML, and everything else that it wrote down, as dotted lines."""
    run = dict(model["results"].run)
    config = run.pop("config", None)
    text = None if config is None else yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return {"name": model["name"], "folder": model["folder"], "config": text, "facts": flat(run)}
