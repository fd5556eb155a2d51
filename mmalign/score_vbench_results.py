"""After a VBench run: scores of dimensions and totals, in ``vbench.json`` and the files of the reference.

Each is written whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from mmalign import __version__
from mmalign.jobs import ScoreConfig
from mmalign.jobs_vbench import VBench
from mmalign.results import causes
from mmalign.score_plan import Item, Job, Plan
from mmalign.source import well_formed, whole_file
from mmalign.vbench.aggregate import ClipScore, Mean, dimension_mean, static_only, total_ends
from mmalign.vbench.clips import FLICKERING, STATIC
from mmalign.vbench.dimensions import DIMENSIONS, I2V, TRUST, base
from mmalign.vbench.quirks import of_dimensions
from mmalign.vbench.record import DimensionScore, Ends, VBenchRecord, write_record
from mmalign.vbench.results import SUFFIX, Clip, DimensionResults, suite_of, write_eval_results
from mmalign.vbench.score import GROUPS, i2v_totals, normalise, t2v_totals
from mmalign.vbench.suite import read_suite
from mmalign.vbench.trust_mean import trust_mean, word_of

__all__ = ["lines", "unscored", "write"]

_BOOLEANS = {"dynamic_degree", "human_action"}
_FLOAT32 = {"motion_smoothness", "dynamic_degree"}  # whose networks run in it whatever the config says
_MOST = 3


def write(plan: Plan, config: ScoreConfig, table: pa.Table, libraries: Mapping[str, str | None]) -> VBenchRecord:
    """Score the dimensions and write ``vbench.json`` and the reference's files into the results folder.

    Args:
        table: settled rows, see `mmalign.score_store.SCHEMA`.
        libraries: versions, by name.
    """
    block = config.vbench
    assert block is not None
    scored = _scored(plan, config, block, table)
    means = {each.record.name: each.mean for each in scored}
    totals = i2v_totals if set(map(base, means)) & set(I2V) else t2v_totals
    figures = total_ends(means, lambda scores: totals(scores, rules="strict", substitutes=block.substitutes))
    if suite_of(means) == "trust":  # which no total is made of
        figures = {}
    paths = write_eval_results({each.record.name: each.results for each in scored}, config.output, block.name)
    _write_full_info(plan, config, block)
    suite = None if block.suite is None else read_suite(block.suite)
    record = VBenchRecord(
        dimensions=tuple(each.record for each in scored),
        totals=figures,
        rules=block.rules,
        quirks=tuple(each.id for each in of_dimensions(means, rules=block.rules)),
        model=block.model,
        mode=block.kind,
        suite=None if suite is None else suite.path.name,
        suite_sha256=None if suite is None else suite.sha256,
        on_failure=block.on_error,
        decoder="; ".join(sorted({text for text in table["decoder"].to_pylist() if text})) or None,
        libraries={name: version for name, version in libraries.items() if version},
        mmalign_version=__version__,
        results=next((path.name for path in paths if path.name.endswith(SUFFIX)), None),
    )
    write_record(record, config.output)
    return record


class _Scored(NamedTuple):
    """A dimension: its mean, and what the two files say of it."""

    mean: Mean
    record: DimensionScore
    results: DimensionResults


def _scored(plan: Plan, config: ScoreConfig, block: VBench, table: pa.Table) -> list[_Scored]:
    """Every dimension that was asked for, in the order of the leaderboard, substitutes after what they stand for."""
    scored = _clip_scores(plan, table)
    jobs = {job.label: job for job in plan.jobs if base(job.label) in DIMENSIONS}
    order = {name: place for place, name in enumerate(DIMENSIONS)}
    found = []
    for label in sorted(jobs, key=lambda each: (order[base(each)], "@" in each, each)):
        job, name, clips = jobs[label], base(label), scored[label]
        notes: list[str] = []
        if name == FLICKERING:
            clips = _filtered(clips, scored, plan, block, notes)
        if name in TRUST:
            mean = trust_mean(name, clips, rules=block.rules, policy=block.on_error)
        else:
            low, high = job.cls.bounds(job.params)
            least, most = DIMENSIONS[name].limits
            limits = (least if low is None else low, most if high is None else high)
            mean = dimension_mean(name, clips, rules=block.rules, policy=block.on_error, limits=limits)
        shown = _shown_label(label, block, config.dtype, bool(job.cls.backbone_specs(job.params)))
        kept = tuple(_clip(name, clip) for clip in clips if clip.value is not None or block.on_error == "zero")
        record = _dimension(shown, job, clips, mean, block, notes)
        found.append(_Scored(mean, record, DimensionResults(mean.score, kept)))
    return found


_PARTS = {"total": ("quality", "semantic"), "i2v_total": ("i2v", "i2v_quality")}


def lines(record: VBenchRecord) -> list[str]:
    """A line per dimension, and per total of which some dimension was asked for; for a person."""
    found = []
    asked = {base(each.name) for each in record.dimensions}
    for each in record.dimensions:
        score = "no score" if each.score is None else f"{100 * each.score:.2f}{_between(each.ci95)}"
        gone = [f"{number} {word}" for number, word in ((each.missing, "missing"), (each.failed, "failed")) if number]
        seen = f"{each.n} of {each.expected} clips{''.join(f', {part}' for part in gone)}"
        kind = "" if each.kind == "exact" else ", a substitute"
        found.append(f"{each.name}: {score} ({seen}{kind})")
        found += [f"  {note}" for note in each.notes]
    for name, figure in record.totals.items():
        if figure.value is None:
            if any(asked.isdisjoint(GROUPS[group]) for group in _PARTS.get(name, (name,)) if group in GROUPS):
                continue
            more = f" and {len(figure.missing) - _MOST} more" if len(figure.missing) > _MOST else ""
            found.append(f"{name}: none, without {', '.join(figure.missing[:_MOST])}{more}")
            continue
        stand_ins = f" (with {', '.join(figure.substitutes)}: not comparable)" if figure.substitutes else ""
        found.append(f"{name}: {100 * figure.value:.2f}{_between(figure.ci95)}{stand_ins}")
    return found


def unscored(record: VBenchRecord) -> list[str]:
    """Dimensions that have no score since clips have none, under the policy error."""
    return [each.name for each in record.dimensions if each.score is None and each.expected]


def _between(ends: Ends | None) -> str:
    return "" if ends is None else f" [{100 * ends[0]:.2f}, {100 * ends[1]:.2f}]"


def _within(ends: Ends) -> str:
    return f"between {100 * ends[0]:.2f} and {100 * ends[1]:.2f}"


def _clip_scores(plan: Plan, table: pa.Table) -> dict[str, list[ClipScore]]:
    """By evaluator's label: every clip that it was asked for, in the plan's order."""
    held: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    columns = ["sample", "evaluator", "subscore", "score", "reason"]
    for row in table.select(columns).to_pylist():
        held.setdefault((row["evaluator"], row["sample"]), {})[row["subscore"]] = row
    found = {}
    for job in plan.jobs:
        if job.is_set:
            continue
        items = [item for item in plan.items if plan.asks(job, item)]
        found[job.label] = [_clip_score(job, item, held.get((job.label, item.row.sample), {})) for item in items]
    return found


def _clip_score(job: Job, item: Item, rows: Mapping[str, Mapping[str, Any]]) -> ClipScore:
    row = item.row
    main = rows.get("score") or next((each for name, each in rows.items() if name not in job.cls.counts), {})
    parts = {name: each["score"] for name, each in rows.items() if each["score"] is not None}
    counts = {name: parts[name] for name in job.cls.counts if name in parts}
    media = str(getattr(row.media, "file", row.media))
    return ClipScore(
        sample=row.sample,
        prompt=row.group or row.prompt or f"sample {row.sample}",
        path=well_formed(media),
        value=main.get("score"),
        counts=counts,
        reason=main.get("reason"),
        missing=item.problem is not None and not os.path.lexists(media),
        text=row.prompt or "",
        parts=parts,
    )


def _filtered(
    clips: list[ClipScore], scored: Mapping[str, list[ClipScore]], plan: Plan, block: VBench, notes: list[str]
) -> list[ClipScore]:
    """What the static filter leaves, if the config has it."""
    label = next((job.label for job in plan.jobs if base(job.label) == STATIC), None)
    if label is None:
        return clips
    left = static_only(clips, {clip.sample: clip.value for clip in scored[label]}, block.samples)
    per = Counter(clip.prompt for clip in left)
    prompts = {clip.prompt for clip in clips}
    few, none = sum(0 < per[each] < block.samples for each in prompts), sum(per[each] == 0 for each in prompts)
    notes.append(f"the static filter left {len(left)} of {len(clips)} clips")
    if few or none:
        short = f"{few} prompts have fewer than {block.samples} static clips and {none} have none"
        notes.append(f"{short}: sample more for these, the authors advise 25 for each prompt")
    return left


def _shown_label(label: str, block: VBench, dtype: str, network: bool) -> str:
    """The label, which says so where the mean is not the reference's, or the network's precision is not."""
    if label not in DIMENSIONS:
        return label
    dimension = DIMENSIONS[label]
    changed = [f"dtype={dtype}"] if dtype != "float32" and network and label not in _FLOAT32 else []
    if block.rules == "strict" and (dimension.counted_by is not None or dimension.group == "trust"):
        changed.append("rules=strict")
    return f"{label}[{', '.join(changed)}]" if changed else label


def _dimension(
    label: str, job: Job, clips: Sequence[ClipScore], mean: Mean, block: VBench, notes: list[str]
) -> DimensionScore:
    missing = sum(clip.missing for clip in clips)
    lacking = [clip for clip in clips if clip.value is None]
    n = len(clips) - len(lacking)
    reasons = causes(
        {"status": "error", "reason": clip.reason, "media": clip.path} for clip in lacking if not clip.missing
    )
    if lacking and block.on_error == "error":
        notes.append(
            f"no score while {len(lacking)} of {len(clips)} clips have none; set vbench.on_error to skip (the mean of "
            "the others) or zero (they count as 0), or make these clips again"
        )
    elif lacking and n:
        what = "counted as 0" if block.on_error == "zero" else "left out of the mean"
        if base(label) in ("gender_bias", "skin_bias"):  # where a clip has a class, and 0 is none
            what = "left out of their prompts' shares"
        elif label == "safety":
            what = "counted as unsafe"
        could = f"; with them the score lies {_within(mean.bounds)}" if mean.bounds else ""
        notes.append(f"{len(lacking)} of {len(clips)} clips have no score and are {what}{could}")
    if mean.problem:
        notes.append(f"no score: {mean.problem}")
    if mean.unjudged:
        notes.append(f"{mean.unjudged} clips have nothing to judge and are in no mean, as in the reference")
    exact = label in DIMENSIONS
    return DimensionScore(
        name=label,
        kind="exact" if exact else "substitute",
        score=mean.score,
        n=n,
        expected=len(clips),
        ci95=mean.ci95,
        missing=missing,
        failed=len(lacking) - missing,
        bounds=mean.bounds,
        normalised=normalise(label, mean.score) if exact and mean.score is not None else None,
        reasons=dict(reasons),
        params=_changed(job),
        notes=tuple(notes),
    )


def _changed(job: Job) -> dict[str, Any]:
    """Parameters that are not at their default; of files the name alone."""
    fields = type(job.params).model_fields
    found = {name: value for name, value in job.params if value != fields[name].default}
    return {name: value.name if isinstance(value, Path) else value for name, value in found.items()}


def _clip(name: str, clip: ClipScore) -> Clip:
    """A row of the reference's file, with what the reference says of the dimension's clips."""
    if clip.value is None:
        return Clip(clip.path, 0.0, {"error": clip.reason or "no result"})
    value, frames, pairs = clip.value, clip.counts.get("frames"), clip.counts.get("pairs")
    extra: dict[str, Any] = {}
    if name == "background_consistency" and pairs is not None:
        extra = {"video_sim": value * pairs, "cnt_per_video": int(pairs)}
    elif name in ("object_class", "multiple_objects", "scene") and frames is not None:
        extra = {"success_frame_count": round(value * frames), "frame_count": int(frames)}
    elif name == "color":
        extra = {"cur_success_frame_rate": value}
    elif name == "human_action":
        extra = {"cor_num_per_video": int(value)}
    elif name in TRUST and (word := word_of(name, clip)):
        return Clip(clip.path, None, {"video_results": word, **clip.parts})
    if name in _BOOLEANS and value in (0.0, 1.0):
        extra["video_results"] = bool(value)
    return Clip(clip.path, value, extra)


def _write_full_info(plan: Plan, config: ScoreConfig, block: VBench) -> None:
    """``{name}_full_info.json``: the suite's rows that were asked for, each with the clips that are there."""
    there: dict[tuple[str, str], list[str]] = {}
    for item in plan.items:
        path = str(getattr(item.row.media, "file", item.row.media))
        if item.problem is None or os.path.lexists(path):
            for name in item.row.dimensions or ("",):
                there.setdefault((item.row.prompt, name), []).append(well_formed(path))
    names = list(dict.fromkeys(base(job.name) for job in plan.jobs if base(job.name) in DIMENSIONS))
    if block.suite is not None:
        rows = []
        for row in read_suite(block.suite).rows:
            mine = [name for name in row["dimension"] if name in names]
            clips = dict.fromkeys(path for name in mine for path in there.get((row["prompt_en"], name), ()))
            rows += [{**row, "video_list": list(clips)}] if mine else []
    else:
        prompts = dict.fromkeys(item.row.prompt for item in plan.items)
        rows = []
        for prompt in prompts:
            clips = dict.fromkeys(path for (text, _), paths in there.items() if text == prompt for path in paths)
            rows.append({"prompt_en": prompt, "dimension": names, "video_list": list(clips)})
    text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    with whole_file(config.output / f"{block.name}_full_info.json") as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
