"""`mmalign bench reward`: how far a score agrees with people, by the protocols of the public reward benchmarks.

The benchmark is read from its published files, its media are scored as by `mmalign score` (resumable, in
`output/scores`) or their scores are read from where they are, and every protocol that fits is computed, each with its
baselines and intervals. `bench.json` holds all of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmalign import __version__, reward_scores
from mmalign.agreement import mean_entry
from mmalign.config import nearest
from mmalign.jobs_bench import BenchConfig, Counting
from mmalign.preference_row import counted
from mmalign.progress import track
from mmalign.protocols.benchmarks import BENCHMARKS, Benchmark, headline
from mmalign.protocols.correlations import pooled
from mmalign.protocols.figures import (
    calibration_figure,
    correlation_figure,
    one_person,
    pooled_figure,
    protocol_figure,
)
from mmalign.protocols.generators import Marks, contests, generator_figure
from mmalign.protocols.pairs import Floats, Judged, Pairs, expand
from mmalign.protocols.published import published
from mmalign.protocols.sets import RewardSet, each_item
from mmalign.protocols.tables import GROUP, by_label, by_task, question_score, random_question_score, style_table
from mmalign.reward_scores import Scorer
from mmalign.reward_show import show
from mmalign.source import whole_file

_NAMED = 5  # how many samples without a score are named


def run(config: BenchConfig, *, plugins: bool = True, tables: bool = True) -> Path:
    """Run a benchmark, print its tables, and return the JSON file that holds every figure.

    Args:
        config: benchmark, folder, evaluators or scores, protocols, scoring.
        plugins: whether evaluators of other installed packages may be named.
        tables: whether to print them.

    Raises:
        ValueError: an unknown protocol or evaluator, annotation files or media that are not there, scores of other
            media. Before anything is scored, where it can be known then.
    """
    benchmark = BENCHMARKS[config.benchmark]
    names = _protocols(config, benchmark)
    jobs = reward_scores.check(config, plugins) if config.evaluators else []
    found = benchmark.read(config)
    if not found.items:
        reasons = ", ".join(f"{entry['count']} {reason}" for reason, entry in counted(found.dropped).items())
        raise ValueError(f"{config.folder}: no row of {config.benchmark} can be used ({reasons or 'it has none'})")
    reward_scores.check_needs(config, found, jobs)
    axes = reward_scores.default_axes(found)
    if config.evaluators:
        scorers = reward_scores.evaluate(config, found, axes, jobs, plugins)
    else:
        scorers = reward_scores.existing_scores(config, found, axes)
    work = [(scorer, axis) for scorer in scorers for axis in axes]
    results = [
        examine(found, scorer, axis, names, benchmark, config.protocols)
        for scorer, axis in track(work, "counting", len(work))
    ]
    report = {
        "benchmark": {"name": config.benchmark, **_about(benchmark)},
        "data": _data(found, config),
        "results": results,
        "published": [each._asdict() for each in published(config.benchmark) if each.protocol in names],
        "config": config.model_dump(mode="json"),
        "mmalign": __version__,
    }
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "bench.json"
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    if tables:
        show(report)
    return path


def _protocols(config: BenchConfig, benchmark: Benchmark) -> tuple[str, ...]:
    chosen: tuple[str, ...] = config.protocols.only or benchmark.protocols
    for name in chosen:
        if name not in benchmark.protocols:
            fitting = ", ".join(benchmark.protocols)
            hint = nearest(name, benchmark.protocols)
            raise ValueError(f"protocols.only: {name} does not fit {config.benchmark}.{hint} Those that do: {fitting}.")
    return chosen


def _about(benchmark: Benchmark) -> dict[str, str]:
    return {name: getattr(benchmark, name) for name in ("summary", "judgement", "licence", "source", "remark")}


def _data(found: RewardSet, config: BenchConfig) -> dict[str, Any]:
    """What was read: counts, what was dropped, and which media are not there (asked only where they were scored)."""
    absent = reward_scores.missing_media(found) if config.evaluators else None
    tried = [group for group in found.groups if not group.validation]
    return {
        "media": len(found.items),
        "prompts": len({item.prompt for item in found.items}),
        "groups": len(tried),
        "validation_groups": len(found.groups) - len(tried),
        "missing_media": None if absent is None else {"n": len(absent), "first": absent[:_NAMED]},
        "dropped_rows": counted(found.dropped),
    }


# ------------------------------------------------------------------------------------------------ figures


def examine(
    found: RewardSet,
    scorer: Scorer,
    axis: str,
    names: Sequence[str],
    benchmark: Benchmark,
    options: Counting,
) -> dict[str, Any]:
    """The entry of a scorer on one axis: what it covers, and its figures.

    Raises:
        ValueError: no pair has two scores (judgements), or no item one (suites).
    """
    scores = scorer.of(axis)
    whose = {"scorer": scorer.name, "axis": axis, "score": scorer.columns[axis]}
    covered = _coverage(found, scorer, axis)
    if benchmark.judgement == "none":
        return {**whose, "coverage": covered, "figures": [_SUITES[name](found, scores, options) for name in names]}
    pairs, unscored = expand(
        Judged(
            tuple(scores.get(sample, math.nan) for sample in group.samples),
            group.human[axis],
            group.prompt,
            group.unit,
            group.validation,
            group.vote,
        )
        for group in found.groups
    )
    if not (~pairs.validation[pairs.group]).any():
        raise ValueError(f"{scorer.name}: no pair of {axis} has two scores, so there is nothing to compare")
    figures = [_judged(name, found, axis, scores, pairs, benchmark, options) for name in names]
    return {**whose, "coverage": {**covered, **_pair_counts(pairs, unscored)}, "figures": figures}


def _coverage(found: RewardSet, scorer: Scorer, axis: str) -> dict[str, Any]:
    scores = scorer.of(axis)
    absent = [item.sample for item in found.items if item.sample not in scores]
    return {
        "media": len(found.items),
        "scored": len(found.items) - len(absent),
        "unscored": {"n": len(absent), "first": absent[:_NAMED], "reasons": scorer.reasons},
        "scores_of_other_media": scorer.unknown,
    }


def _pair_counts(pairs: Pairs, unscored: int) -> dict[str, int]:
    tried = ~pairs.validation[pairs.group]
    return {
        "pairs": int(tried.sum()),
        "pairs_without_two_scores": unscored,
        "pairs_not_judged": int(np.isnan(pairs.human[tried]).sum()),
        "tied_by_people": int((pairs.human[tried] == 0).sum()),
        "validation_pairs": int((~tried).sum()),
    }


def _judged(
    name: str,
    found: RewardSet,
    axis: str,
    scores: dict[str, float],
    pairs: Pairs,
    benchmark: Benchmark,
    options: Counting,
) -> dict[str, Any]:
    if name == "calibration":
        return calibration_figure(pairs)
    if name == "correlations":
        figure = correlation_figure(pairs, None if benchmark.judgement == "pairs" else _items(found, axis, scores))
        return {**figure, "generators": _generators(found, axis, scores, pairs, benchmark)}
    if name == "ties_aware_pooled":
        return pooled_figure(*_items(found, axis, scores), options)
    if name == "skills":
        return _rated_skills(found, axis, scores)
    average = headline(name, benchmark.judgement)
    figure = protocol_figure(name, pairs, options, average)
    said = [Judged(one, group.human[axis], group.prompt, group.unit) for group in found.groups for one in group.people]
    if said:
        figure["baselines"]["one_person"] = one_person(name, expand(said).pairs, options, average)
    return figure


def _items(
    found: RewardSet, axis: str, scores: dict[str, float], label: str | None = None
) -> tuple[Floats, Floats, list[str]]:
    """Scores, human values and prompts of the media that have both; of one skill, if it is named."""
    kept = [
        (scores[sample], value, group.prompt)
        for group, sample, value in each_item(found.groups, axis)
        if sample in scores and not math.isnan(value) and not group.validation
        and (label is None or label in group.labels)
    ]  # fmt: skip
    values = np.array([one[:2] for one in kept], dtype=np.float64).reshape(-1, 2)
    return values[:, 0], values[:, 1], [one[2] for one in kept]


def _generators(
    found: RewardSet, axis: str, scores: dict[str, float], pairs: Pairs, benchmark: Benchmark
) -> dict[str, Any] | None:
    """How far the generators are ranked as people rank them; None where the benchmark's rows do not name them."""
    model = {item.sample: item.model for item in found.items}
    if benchmark.judgement == "ratings":
        rows = [
            (str(model[sample]), group.prompt, scores[sample], value)
            for group, sample, value in each_item(found.groups, axis)
            if model[sample] and sample in scores and not math.isnan(value)
        ]
        names, prompts = [row[0] for row in rows], [row[1] for row in rows]
        marks = [Marks(names, prompts, np.array([row[place] for row in rows], dtype=np.float64)) for place in (2, 3)]
        return generator_figure(marks[0], marks[1], None)
    samples = [sample for group in found.groups for sample in group.samples]  # as `expand` counts slots
    tried = pairs.select(~pairs.validation[pairs.group] & ~np.isnan(pairs.human))
    human, wins = contests(tried, [model[sample] or None for sample in samples])
    whose = {
        samples[slot]: prompt
        for side in (tried.first, tried.second)
        for slot, prompt in zip(side.tolist(), tried.prompts, strict=True)
        if model[samples[slot]]
    }
    values = np.array([scores[sample] for sample in whose], dtype=np.float64)
    return generator_figure(Marks([str(model[sample]) for sample in whose], list(whose.values()), values), human, wins)


def _rated_skills(found: RewardSet, axis: str, scores: dict[str, float]) -> dict[str, Any]:
    """Correlations and means of each skill, over all its media."""
    skills = {}
    for label in sorted({label for group in found.groups for label in group.labels}):
        x, y, prompts = _items(found, axis, scores, label)
        means = {"score": mean_entry(x, prompts), "human": mean_entry(y, prompts)}
        skills[label] = {"n": len(x), **means, **pooled(x, y, prompts)}
    return {"protocol": "skills", "skills": skills}


# ------------------------------------------------------------------------------------------------ suites


def _values(found: RewardSet, scores: dict[str, float]) -> Floats:
    return np.array([scores.get(item.sample, math.nan) for item in found.items], dtype=np.float64)


def _styles(found: RewardSet, scores: dict[str, float], options: Counting) -> dict[str, Any]:
    values = _values(found, scores) * options.times
    style = np.array([place["style"] for place in found.places])
    names = list(dict.fromkeys(style.tolist()))
    prompts = {
        name: [item.prompt for item, own in zip(found.items, style, strict=True) if own == name] for name in names
    }
    group = GROUP if len(names) > 1 else len(found.items)  # DrawBench is published as one mean
    table = style_table({name: values[style == name] for name in names}, prompts, group)
    return {"protocol": "styles", "times": options.times, "group": group, **table}


def _tasks(found: RewardSet, scores: dict[str, float], options: Counting) -> dict[str, Any]:
    task, prompt = ([place[key] for place in found.places] for key in ("task", "prompt"))
    return {"protocol": "tasks", **by_task(_values(found, scores), task, prompt)}


def _questions(found: RewardSet, scores: dict[str, float], options: Counting) -> dict[str, Any]:
    """DPG-Bench: a picture whose questions are not all answered has no score, and is named."""
    pictures: dict[tuple[str, int], list[int]] = {}
    for number, place in enumerate(found.places):
        pictures.setdefault((place["item"], place["crop"]), []).append(number)
    values = _values(found, scores)
    last = max(place["crop"] for place in found.places)
    each: dict[str, list[float]] = {}
    chance: dict[str, float] = {}
    answered, labels, whose, absent = [], [], [], []
    for (item, crop), numbers in pictures.items():
        parents = [found.places[n]["parents"] for n in numbers]
        chance[item] = random_question_score(parents)
        if not np.isfinite(values[numbers]).all():
            absent.append(f"{item}/{crop}")
            continue
        yes = [bool(values[n] >= options.yes_from) for n in numbers]
        each.setdefault(item, []).append(question_score(yes, parents))
        if options.question_categories == "all_crops" or crop == last:
            answered += yes
            labels += [_categories(found.places[n]["category"]) for n in numbers]
            whose += [item] * len(numbers)
    means = [float(np.mean(parts)) for parts in each.values()]
    expected = float(np.mean([chance[item] for item in each])) if each else None
    return {
        "protocol": "questions",
        "score": mean_entry(means, list(each)),
        "missing": {"n": len(absent), "first": absent[:_NAMED]},
        "baselines": {"coin": expected, "all_yes": 1.0, "all_no": 0.0},
        "yes_from": options.yes_from,
        "categories_over": options.question_categories,
        "categories": by_label(np.array(answered, dtype=np.float64), labels, whose)["labels"],
    }


def _categories(text: str) -> tuple[str, ...]:
    """`entity - whole` counts under `entity` and under itself."""
    broad = text.split("-")[0].strip()
    return (broad, text) if broad != text else (text,)


def _skills(found: RewardSet, scores: dict[str, float], options: Counting) -> dict[str, Any]:
    values = _values(found, scores)
    prompt = [place["prompt"] for place in found.places]
    families = {
        key: by_label(values, [place[key] for place in found.places], prompt)
        for key in ("part", "category", "skill", "reliable_below")
    }
    return {
        "protocol": "skills",
        "all": families["part"]["all"],
        "families": {key: {"labels": one["labels"], "mean": one["mean_of_labels"]} for key, one in families.items()},
    }


_SUITES: dict[str, Callable[[RewardSet, dict[str, float], Counting], dict[str, Any]]] = {
    "styles": _styles,
    "tasks": _tasks,
    "questions": _questions,
    "skills": _skills,
}
