"""From scores of clips to scores of dimensions and totals, with intervals, bounds, and a policy for what is missing.

The rule of ``compat`` is the reference's on one GPU: subject and background consistency weigh a clip by its pairs of
frames, appearance style and what counts frames (objects, relations, scenes) by its frames
(`mmalign.vbench.dimensions.Dimension.counted_by`), all others take the mean over clips; a clip with nothing to judge
(``needs_count``: a colour whose object is found in no frame) is in no mean; imaging quality is divided by 100.
``strict`` takes the mean over clips everywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from mmalign.stats import bootstrap_ratio, expanded_ends
from mmalign.vbench.dimensions import DIMENSIONS
from mmalign.vbench.record import Figure

__all__ = ["ClipScore", "Mean", "Policy", "dimension_mean", "static_only", "total_ends"]

Policy = Literal["error", "skip", "zero"]
Totals = Callable[[Mapping[str, float | None]], Mapping[str, Figure]]
SAMPLES = 2000


@dataclass(frozen=True)
class ClipScore:
    """One clip of one dimension.

    Attributes:
        prompt: what it was made from; clips of one prompt are one cluster.
        path: of the clip.
        value: on the evaluator's scale; None where there is none.
        counts: how much there was to measure, by name (pairs, frames).
        reason: why there is no value.
        missing: whether the clip is not there.
        text: its prompt, word for word, where `prompt` is another name for it.
        parts: all sub-scores by name, for dimensions that no single one of them decides.
    """

    sample: str
    prompt: str
    path: str
    value: float | None
    counts: Mapping[str, float] = field(default_factory=dict)
    reason: str | None = None
    missing: bool = False
    text: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Mean:
    """A dimension's score.

    Attributes:
        score: in [0, 1] as a rule; None where no clip has one, or where one has none and the policy is error.
        ci95: clustered by prompt; None where it cannot be known.
        bounds: the score if clips without one had got the lowest and the highest there is; None without a limit.
        replicates: bootstrap scores, for totals.
        clusters: how many prompts.
        unjudged: clips with nothing to judge, which are in no mean.
        problem: why a dimension whose clips have scores has none.
    """

    score: float | None
    ci95: tuple[float, float] | None = None
    bounds: tuple[float, float] | None = None
    replicates: npt.NDArray[np.float64] | None = field(default=None, repr=False, compare=False)
    clusters: int = 0
    unjudged: int = 0
    problem: str | None = None


def dimension_mean(
    name: str,
    clips: Sequence[ClipScore],
    *,
    rules: Literal["compat", "strict"] = "compat",
    policy: Policy = "error",
    limits: tuple[float | None, float | None] = (0.0, 1.0),
    seed: int = 0,
) -> Mean:
    """The score of a dimension from those of its clips.

    Args:
        name: of `mmalign.vbench.dimensions`.
        policy: error: no score while a clip has none; skip: the mean of the others; zero: those without one count as 0,
            or as the lowest score where 0 is none. Where clips are weighted, one without a score has the mean weight.
        limits: lowest and highest score of a clip, None for no limit.
        seed: of the bootstrap. Dimensions of the same prompts are drawn together.
    """
    dimension = DIMENSIONS[name]
    counted = dimension.counted_by if rules == "compat" else None
    needed = [key for key in (dimension.needs_count, counted) if key]
    # A clip with nothing to judge: without the count that the dimension needs, or of no weight.
    judged = [clip for clip in clips if clip.value is None or 0 not in (clip.counts.get(key) for key in needed)]
    good = [clip for clip in judged if clip.value is not None]
    lacking = len(judged) - len(good)
    unjudged = len(clips) - len(judged)
    if not good:
        return Mean(None, unjudged=unjudged)
    weights = [float(clip.counts.get(counted, 1.0)) if counted else 1.0 for clip in good]
    usual = sum(weights) / len(weights)

    def mean_with(value: float | None) -> float:
        """With this in the place of scores that are not there."""
        parts = [float(clip.value or 0.0) * weight for clip, weight in zip(good, weights, strict=True)]
        further = [] if value is None else [value * usual] * lacking
        return math.fsum(parts + further) / math.fsum(weights + [usual] * len(further)) / dimension.divisor

    low, high = limits
    bounds = None if low is None or high is None or not lacking else (mean_with(low), mean_with(high))
    if lacking and policy == "error":
        return Mean(None, bounds=bounds, unjudged=unjudged)
    filled = _zero(low, high) if lacking and policy == "zero" else None
    used = judged if filled is not None else good
    found = [float(filled if clip.value is None else clip.value) for clip in used]  # type: ignore[arg-type]
    share = [usual if clip.value is None else float(clip.counts.get(counted, 1.0)) if counted else 1.0 for clip in used]
    prompts = [clip.prompt for clip in used]
    size = len(set(prompts))
    drawn = bootstrap_ratio(found, share, prompts, [seed, *_digest(prompts)], SAMPLES) / dimension.divisor
    ends = expanded_ends(drawn, size) if size > 1 else None
    score = mean_with(filled)
    return Mean(score, ends, bounds if lacking else (score, score), drawn, size, unjudged)


def _zero(low: float | None, high: float | None) -> float:
    return max(low if low is not None else 0.0, min(0.0, high if high is not None else 0.0))


def _digest(prompts: Sequence[str]) -> list[int]:
    """Numbers that say which prompts these are, whatever their order."""
    whole = hashlib.sha256("\0".join(sorted(set(prompts))).encode("utf-8", "surrogatepass")).digest()
    return [int.from_bytes(whole[place : place + 4]) for place in range(0, 16, 4)]


def total_ends(means: Mapping[str, Mean], totals: Totals) -> dict[str, Figure]:
    """Totals with intervals and bounds, from the dimensions' own.

    A total is a sum of weighted scores and a constant; the weights are read off `totals`, so that the interval is that
    of the formula which gives the value.

    Args:
        means: by the evaluator's label.
        totals: from scores by label, such as `mmalign.vbench.score.t2v_totals`.
    """
    scores = {label: mean.score for label, mean in means.items()}
    found = totals(scores)
    steps = {label: totals(scores | {label: score + 1.0}) for label, score in scores.items() if score is not None}
    result = {}
    for name, figure in found.items():
        if figure.value is None:
            result[name] = figure
            continue
        slopes = {label: (step[name].value or 0.0) - figure.value for label, step in steps.items()}
        used = {label: means[label] for label, slope in slopes.items() if abs(slope) > 1e-12}
        ci95 = _interval(figure.value, used, slopes)
        result[name] = replace(figure, ci95=ci95, bounds=_bounds(figure.value, used, slopes))
    return result


def _interval(value: float, used: Mapping[str, Mean], slopes: Mapping[str, float]) -> tuple[float, float] | None:
    drawn = np.full(SAMPLES, value)
    for label, mean in used.items():
        if mean.ci95 is None or mean.replicates is None or mean.score is None:
            return None
        drawn += slopes[label] * (mean.replicates - mean.score)
    return expanded_ends(drawn, min(mean.clusters for mean in used.values())) if used else None


def _bounds(value: float, used: Mapping[str, Mean], slopes: Mapping[str, float]) -> tuple[float, float] | None:
    low = high = value
    for label, mean in used.items():
        if mean.bounds is None or mean.score is None:
            return None
        low += slopes[label] * (mean.bounds[0] - mean.score)
        high += slopes[label] * (mean.bounds[1] - mean.score)
    return low, high


def static_only(clips: Sequence[ClipScore], static: Mapping[str, float | None], samples: int) -> list[ClipScore]:
    """The clips of temporal_flickering that the static filter leaves: of each prompt the first `samples` static ones.

    In the order of their names as text (``-10`` before ``-2``), as the reference takes them (static_filter.py). A clip
    of which the filter says nothing stays, without a score, so that it is missed.

    Args:
        static: 1 for a static clip, by sample.
    """
    kept: list[ClipScore] = []
    groups: dict[str, list[ClipScore]] = {}
    for clip in clips:
        groups.setdefault(clip.prompt, []).append(clip)
    for group in groups.values():
        accepted: list[ClipScore] = []
        for clip in sorted(group, key=lambda each: each.path.rpartition("/")[2]):
            verdict = static.get(clip.sample)
            if len(accepted) < samples and verdict is None:
                why = clip.reason or "the static filter has no result for it"
                accepted.append(replace(clip, value=None, reason=why))
            elif len(accepted) < samples and verdict:
                accepted.append(clip)
        kept += accepted
    return kept
