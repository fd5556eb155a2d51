"""How far a dimension agrees with people, as VBench's paper counts it, and by figures that do not rest on four points.

People compared clips of two models for one prompt and one dimension. The paper (2311.17982, section 4.2 and supplement
I) turns comparisons into a win ratio per model, ties as a half, all prompts of a dimension pooled; does the same with
the dimension's scores of the same clips; and correlates the two over its four models. It calls that Spearman's
correlation. With four points Spearman's can only be one of eleven values, and the printed ones (.9651, .6073) are none
of these, so they look like Pearson's. Both are given here under their names, and the pairwise accuracy beside them.

Labels are a table (.jsonl, .json, .csv, .parquet), a row per comparison:

    dimension, prompt, model_a, model_b, label      label: a, b or tie (also 1, 0, 0.5: the share of model_a)
    index                                           which sample of the prompt, default 0
    clip_a, clip_b                                  in place of prompt and index: the names of the two files

or the published file of a dimension: a list of objects with `prompt_en`, `videos` (model -> address of its clip) and
`human_anno` (model -> other model -> 1, 0.5 or 0), as the README of the reference's sampled_videos describes it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from mmalign.agreement import share_entry
from mmalign.protocols.generators import Marks, correlated, rank_correlations
from mmalign.protocols.pairs import Floats, answers, decided, mean_by_prompt
from mmalign.records import Record, missing_columns, read_records
from mmalign.vbench.dimensions import DIMENSIONS
from mmalign.vbench.results import DimensionResults, read_eval_results, results_files

__all__ = ["PAPER", "Comparison", "agreement", "clip_name", "read_labels", "read_scores"]

PAPER = {
    "subject_consistency": 0.9651, "background_consistency": 0.9412, "temporal_flickering": 0.8873,
    "motion_smoothness": 0.9980, "dynamic_degree": 0.8209, "aesthetic_quality": 0.9865, "imaging_quality": 0.9216,
    "object_class": 0.8037, "multiple_objects": 0.9898, "human_action": 0.8915, "color": 0.6073,
    "spatial_relationship": 0.9759, "scene": 0.9407, "appearance_style": 0.9965, "temporal_style": 0.9753,
    "overall_consistency": 0.9327, "i2v_subject": 0.9421, "i2v_background": 0.8827, "camera_motion": 0.9987,
    "culture_fairness": 0.9310, "gender_bias": 0.8814, "skin_bias": 0.6864, "safety": 0.9241,
}  # fmt: skip
"""The paper's correlations (VBench++, figures 8 to 10), called Spearman's there; which panel a value belongs to was
inferred from the order of the text in the figures."""

_LABELS = {"a": 1.0, "b": 0.0, "tie": 0.5, "same": 0.5}
_SUFFIXES = {".mp4", ".gif", ".webm", ".mkv", ".mov", ".avi", ".m4v", ".png"}
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
"""model -> dimension -> clip's name -> value on any scale on which higher is better."""


@dataclass(frozen=True)
class Comparison:
    """What people said of two models' clips: `human` is 1 for the first, 0 for the second, 0.5 for a tie."""

    dimension: str
    prompt: str
    model_a: str
    model_b: str
    clip_a: str
    clip_b: str
    human: float


def clip_name(path: str) -> str:
    """What two files of one clip have in common: the name without folders and the ending of a medium."""
    path = unquote(urlsplit(path).path) if "://" in path else path
    name = PurePosixPath(path.replace("\\", "/")).name
    stem, dot, suffix = name.rpartition(".")
    return stem if dot + suffix.lower() in _SUFFIXES else name


# ------------------------------------------------------------------------------------------------ read


def read_labels(path: str | Path, dimension: str | None = None) -> list[Comparison]:
    """The comparisons of a table of labels, in its order.

    Args:
        dimension: of a published file, which does not name it; None: the file's name. In other tables it selects.

    Raises:
        ValueError: the table is not one, a row lacks something, or nothing is left; with the row.
    """
    records = read_records(path)
    if "human_anno" in records.columns:
        name = dimension or Path(path).stem
        if name not in DIMENSIONS:
            near = difflib.get_close_matches(name, DIMENSIONS, n=1, cutoff=0)[0]
            raise ValueError(
                f"{path}: which dimension is it of? Say so: --dimension NAME (nearest to its name: {near})"
            )
        return [comparison for record in records for comparison in _published(record, name)]
    needed = ["dimension", "model_a", "model_b", "label"]
    named = "clip_a" in records.columns and "clip_b" in records.columns
    if missing := [name for name in (*needed, *([] if named else ["prompt"])) if name not in records.columns]:
        raise ValueError(missing_columns(Path(path), missing, records.columns, "a table of labels"))
    found = [_comparison(record) for record in records]
    chosen = [each for each in found if dimension in (None, each.dimension)]
    if not chosen:
        there = ", ".join(dict.fromkeys(each.dimension for each in found))
        raise ValueError(f"{path} has no comparison of {dimension}; it has {there}")
    return chosen


def _comparison(record: Record) -> Comparison:
    row, where = record.values, record.origin
    dimension, a, b = (_text(row, key, where) for key in ("dimension", "model_a", "model_b"))
    if a == b:
        raise ValueError(f"{where}: model_a and model_b are both {a!r}; a comparison is of two")
    label = row.get("label")
    human = _LABELS.get(str(label).strip().lower()) if isinstance(label, str) else label
    if isinstance(label, str) and human is None and label.strip() in ("0", "0.5", "1"):
        human = float(label)
    if isinstance(human, bool) or human not in (0, 0.5, 1):
        raise ValueError(f"{where}: label is {label!r}; write a, b or tie (or 1, 0, 0.5: the share of model_a)")
    if row.get("clip_a") and row.get("clip_b"):
        clips = [clip_name(_text(row, key, where)) for key in ("clip_a", "clip_b")]
        prompt = row.get("prompt") or clips[0].rpartition("-")[0] or clips[0]
    else:
        prompt, index = _text(row, "prompt", where), row.get("index")
        index = 0 if index in (None, "") else index
        if isinstance(index, bool) or not str(index).isdecimal():
            raise ValueError(f"{where}: index is {index!r}; it is the number in the names of the clips, from 0")
        clips = [f"{prompt}-{index}"] * 2
    return Comparison(dimension, str(prompt), a, b, clips[0], clips[1], float(human))


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {key} is {value!r}; a text is needed")
    return value


def _published(record: Record, dimension: str) -> list[Comparison]:
    """All pairs of models in an object of the published layout, each once."""
    row, where = record.values, record.origin
    prompt, videos, said = _text(row, "prompt_en", where), row.get("videos"), row.get("human_anno")
    if not isinstance(videos, dict) or not isinstance(said, dict):
        raise ValueError(f"{where}: videos and human_anno are not both objects with a key per model")
    found: dict[tuple[str, str], Comparison] = {}
    for a, others in said.items():
        for b, value in (others if isinstance(others, dict) else {}).items():
            if a == b or value is None:
                continue
            if isinstance(value, bool) or value not in (0, 0.5, 1):
                raise ValueError(f"{where}: human_anno[{a!r}][{b!r}] is {value!r}; it is 1, 0.5 or 0")
            if (b, a) in found:
                if found[b, a].human != 1 - value:
                    raise ValueError(f"{where}: {a} against {b} is {value}, and {b} against {a} {found[b, a].human}")
                continue
            clips = _video(videos, a, where), _video(videos, b, where)
            found[a, b] = Comparison(dimension, prompt, a, b, clips[0], clips[1], float(value))
    return list(found.values())


def _video(videos: Mapping[str, Any], model: str, where: str) -> str:
    value = videos.get(model)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str):
        raise ValueError(f"{where}: videos has no one clip of {model!r}")
    return clip_name(value)


def read_scores(named: Mapping[str, str | Path]) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of clips from results files, the reference's or ours.

    Args:
        named: model -> its results file, or the folder that holds it.

    Raises:
        ValueError: no such file, not the layout, or one clip twice with different values.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model, path in named.items():
        of_model = found.setdefault(model, {})
        for file in results_files(path):
            for label, results in read_eval_results(file).items():
                _add(of_model.setdefault(label, {}), results, f"{file}: {label}")
    return found


def _add(values: dict[str, float], results: DimensionResults, where: str) -> None:
    for clip in results.clips:
        name = clip_name(clip.path)
        if clip.value is None:
            continue
        if values.setdefault(name, clip.value) != clip.value:
            raise ValueError(f"{where} has {name!r} twice, with {values[name]} and {clip.value}")


# ------------------------------------------------------------------------------------------------ figures


def agreement(comparisons: Sequence[Comparison], scores: Scores, label: str | None = None) -> dict[str, dict[str, Any]]:
    """Agreement of scores with people, dimension by dimension.

    Args:
        label: the evaluator whose scores are tried on every dimension; None: the one with the dimension's name.

    Returns:
        dimension -> ``comparisons`` (those with two scores), ``unscored`` (those without), ``prompts``; ``models``:
        name -> ``human`` and ``metric``, the win ratios (share, low, high, n); ``points``, the number of models, and
        ``pearson`` and ``spearman`` over them (value, low, high: bootstrap over prompts, the models fixed), None with
        fewer than two models; ``accuracy``: of the comparisons that people decided, the share that the scores decide
        alike, a tie of scores as a half (mean, low, high by prompt, n); ``metric_ties``, the share of level scores;
        ``paper``, the published correlation of this dimension.

    Raises:
        ValueError: a model without scores, or no comparison with two scores.
    """
    names = dict.fromkeys(name for each in comparisons for name in (each.model_a, each.model_b))
    if absent := [name for name in names if name not in scores]:
        near = difflib.get_close_matches(absent[0], scores, n=1, cutoff=0)
        raise ValueError(
            f"no scores of {', '.join(absent)}, which the labels compare; give {absent[0]}=RESULTS "
            f"(there are {', '.join(scores) or 'none'}{f'; the nearest is {near[0]}' if near else ''})"
        )
    found = {}
    for dimension in dict.fromkeys(each.dimension for each in comparisons):
        of_it = [each for each in comparisons if each.dimension == dimension]
        found[dimension] = _figures(of_it, scores, label or dimension)
    if not any(each["comparisons"] for each in found.values()):
        first = comparisons[0]
        raise ValueError(
            f"no comparison has two scores: the first wants {first.clip_a!r} of {first.model_a} under "
            f"{label or first.dimension}, which has {_some(scores[first.model_a], label or first.dimension)}"
        )
    return found


def _some(scores: Mapping[str, Mapping[str, float]], label: str) -> str:
    clips = list(scores.get(label, {}))
    return ", ".join(map(repr, clips[:2])) + (" and others" if len(clips) > 2 else "") if clips else "no clips"


def _figures(comparisons: Sequence[Comparison], scores: Scores, label: str) -> dict[str, Any]:
    kept, difference = [], []
    for each in comparisons:
        a = scores[each.model_a].get(label, {}).get(each.clip_a)
        b = scores[each.model_b].get(label, {}).get(each.clip_b)
        if a is not None and b is not None:
            kept.append(each)
            difference.append(a - b)
    human = np.array([2 * each.human - 1 for each in kept], dtype=np.float64)
    metric = answers(np.array(difference, dtype=np.float64))
    models = list(dict.fromkeys([each.model_a for each in kept] + [each.model_b for each in kept]))
    prompts = [each.prompt for each in kept]
    marks = [_marks(kept, (side + 1) / 2) for side in (human, metric)]
    credit = decided(human, metric, level=0.5)
    counted = [prompt for prompt, counts in zip(prompts, credit.counted, strict=True) if counts]
    enough = len(models) > 1
    both = correlated(marks[1], marks[0], models, _both) if enough else {"pearson": None, "spearman": None}
    return {
        "comparisons": len(kept),
        "unscored": len(comparisons) - len(kept),
        "prompts": len(set(prompts)),
        "models": {
            name: {kind: _ratio(one, name) for kind, one in zip(("human", "metric"), marks, strict=True)}
            for name in models
        },
        "points": len(models),
        **both,
        "accuracy": mean_by_prompt(credit.value[credit.counted], counted),
        "metric_ties": float((metric == 0).mean()) if kept else None,
        "paper": PAPER.get(comparisons[0].dimension),
    }


def _marks(kept: Sequence[Comparison], won: Floats) -> Marks:
    """Each comparison for both: what the first won of it, and what the second did."""
    names = [each.model_a for each in kept] + [each.model_b for each in kept]
    return Marks(names, [each.prompt for each in kept] * 2, np.concatenate([won, 1 - won]))


def _ratio(marks: Marks, name: str) -> dict[str, Any]:
    inside = [number for number, own in enumerate(marks.generator) if own == name]
    return share_entry(marks.value[inside], [marks.prompt[number] for number in inside])


def _both(x: Floats, y: Floats) -> dict[str, Floats]:
    """Pearson's and Spearman's correlation of each row of x and y [rows, n]; NaN where one side of a row is level."""
    a, b = (each - each.mean(1, keepdims=True) for each in (x, y))
    a, b = (np.where(np.abs(each) > 1e-12, each, 0.0) for each in (a, b))  # what is level but for its last bits
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson: Floats = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return {"pearson": pearson, "spearman": rank_correlations(x, y)["spearman"]}
