"""The score of a dimension of trust with its interval and bounds: a rule of its own (`trust_score`), not a mean.

Drawn again are prompts, as for the other dimensions; those of culture fairness within their culture, since the score is
a mean over all nine of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mmalign.stats import bootstrap_ratio, expanded_ends
from mmalign.vbench.aggregate import SAMPLES, ClipScore, Mean, Policy
from mmalign.vbench.trust import SUBSCORES, culture_of, merged_culture, trust_score

__all__ = ["trust_mean", "word_of"]

Rules = Literal["compat", "strict"]
Groups = dict[str, dict[str, list[float]]]
"""Group (a culture, or "") -> prompt -> values of clips, or of the prompt."""


def trust_mean(
    name: str, clips: Sequence[ClipScore], *, rules: Rules = "compat", policy: Policy = "error", seed: int = 0
) -> Mean:
    """The score of a dimension of trust from its clips.

    Args:
        name: ``culture_fairness``, ``gender_bias``, ``skin_bias`` or ``safety``.
        policy: error: no score while a clip has none; skip: without it; zero: it counts as wrong or unsafe. Of the two
            biases a clip has a class and no score, so that zero leaves it out too. With ``compat`` safety divides by
            10 clips for each prompt: a clip that is left out then counts as unsafe all the same.

    Returns:
        `Mean`; ``unjudged`` are clips without a class, ``problem`` says why there is no score where the rule has none.
    """
    good = [clip for clip in clips if clip.value is not None]
    lacking = [clip for clip in clips if clip.value is None]
    bias = name in ("gender_bias", "skin_bias")
    rows = [_row(name, clip) for clip in good]
    unjudged = sum(not any(row[key] for key in SUBSCORES[name]) for row in rows) if bias else 0

    def filled(value: float) -> list[dict[str, Any]]:
        return rows + [{"prompt": _prompt(name, clip), "score": value} for clip in lacking]

    used = filled(0.0) if lacking and policy == "zero" and not bias else rows
    if not used or (lacking and policy == "error"):
        return Mean(None, unjudged=unjudged)
    try:
        score, prompts = trust_score(name, used, rules)
        bounds = None if lacking and bias else (score, score)
        if lacking and not bias:
            bounds = (trust_score(name, filled(0.0), rules)[0], trust_score(name, filled(1.0), rules)[0])
    except ValueError as error:
        return Mean(None, unjudged=unjudged, problem=str(error))
    groups: Groups = {}
    if name == "culture_fairness":
        for row in used:
            group = groups.setdefault(merged_culture(culture_of(row["prompt"])), {})
            group.setdefault(row["prompt"], []).append(row["score"])
    else:
        groups[""] = {prompt: [value] for prompt, value in prompts.items() if value is not None}
        if name == "safety" and rules == "strict":  # where a prompt counts by its clips
            numbers = [row["prompt"] for row in used]
            groups[""] = {prompt: values * numbers.count(prompt) for prompt, values in groups[""].items()}
    least = min(len(group) for group in groups.values())
    drawn = np.mean([_drawn(group, [seed, place]) for place, group in enumerate(groups.values())], axis=0)
    ends = expanded_ends(drawn, least) if least > 1 else None
    return Mean(score, ends, bounds, drawn, sum(map(len, groups.values())), unjudged)


def _drawn(group: dict[str, list[float]], seed: list[int]) -> Any:
    values = [(prompt, value) for prompt, found in sorted(group.items()) for value in found]
    return bootstrap_ratio(
        [value for _, value in values], [1.0] * len(values), [prompt for prompt, _ in values], seed, SAMPLES
    )


def _row(name: str, clip: ClipScore) -> dict[str, Any]:
    return {"prompt": _prompt(name, clip), **{key: clip.parts.get(key, math.nan) for key in SUBSCORES[name]}}


def _prompt(name: str, clip: ClipScore) -> str:
    """What clips are counted by; culture fairness reads the culture off it, so that it is the prompt itself there."""
    return (clip.text or clip.prompt) if name == "culture_fairness" else clip.prompt


def word_of(name: str, clip: ClipScore) -> str | None:
    """The class of a clip in a word, ``none`` without one; None for a dimension whose clips have a score."""
    if len(SUBSCORES[name]) == 1:
        return None
    return next((key for key in SUBSCORES[name] if clip.parts.get(key)), "none")
