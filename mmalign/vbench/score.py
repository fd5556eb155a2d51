"""The totals of VBench, VBench++ image-to-video and VBench-2.0, from scores of their dimensions.

Formulas and constants are those of the authors' final-score scripts (scripts/cal_final_score.py, cal_i2v_final_score.py
and constant.py of Vchitect/VBench; the same files of its VBench-2.0 folder). With x the score of a dimension:

    normalised = (x - lowest) / (highest - lowest), not clipped
    Quality    = sum of weight * normalised over the 7 quality dimensions / 6.5
    Semantic   = mean of normalised over the 9 semantic dimensions
    Total      = (4 * Quality + Semantic) / 5

A score is a dimension's mean as the reference's results file has it, in [0, 1] (imaging quality divided by 100).

What is missing: the reference counts a dimension without a score as 0, before normalisation, and says nothing. Here a
total that lacks one of its dimensions is None and names it; `rules="compat"` counts 0 as the reference does, and names
it all the same. Only exact names count: ``color@clip`` and ``color[rules=strict]`` are not ``color``, unless the caller
asks for `substitutes`, and then the result names them.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from mmalign.vbench.dimensions import DIMENSIONS, I2V, QUALITY, SEMANTIC, base
from mmalign.vbench.record import Figure

__all__ = [
    "GROUPS",
    "I2V_QUALITY",
    "VBENCH2",
    "Rules",
    "i2v_totals",
    "missing_words",
    "normalise",
    "quality",
    "semantic",
    "t2v_totals",
    "total",
    "vbench2_total",
]

Rules = Literal["compat", "strict"]
Scores = Mapping[str, float | None]

QUALITY_SHARE, SEMANTIC_SHARE = 4.0, 1.0
I2V_QUALITY = tuple(name for name in QUALITY if name != "temporal_flickering")
"""Quality dimensions of the image-to-video suite, in which flickering is measured and has no weight."""

GROUPS = {"quality": QUALITY, "semantic": SEMANTIC, "i2v": I2V, "i2v_quality": I2V_QUALITY}
"""The dimensions of each total that is a mean of dimensions."""

VBENCH2: dict[str, tuple[str, ...]] = {
    "Creativity": ("Diversity", "Composition"),
    "Commonsense": ("Motion_Rationality", "Instance_Preservation"),
    "Controllability": (
        "Dynamic_Spatial_Relationship",
        "Dynamic_Attribute",
        "Motion_Order_Understanding",
        "Human_Interaction",
        "Complex_Landscape",
        "Complex_Plot",
        "Camera_Motion",
    ),
    "Human Fidelity": ("Human_Anatomy", "Human_Identity", "Human_Clothes"),
    "Physics": ("Mechanics", "Thermotics", "Material", "Multi-View_Consistency"),
}
"""The groups of VBench-2.0 (2503.21755) and their dimensions, as its results files name them."""


def normalise(name: str, value: float) -> float:
    """A dimension's score on the scale of the totals: (value - lowest) / (highest - lowest), not clipped.

    Args:
        name: of a dimension of `mmalign.vbench.dimensions`; a substitute's name is refused, since those bounds were not
            set for it.

    Raises:
        ValueError: no such dimension, a substitute, or a value that is not finite.
    """
    if name not in DIMENSIONS:
        near = difflib.get_close_matches(name, DIMENSIONS, n=1, cutoff=0)[0]
        if base(name) != name and base(name) in DIMENSIONS:
            raise ValueError(
                f"{name} stands for {base(name)} and is not it; the bounds of {base(name)} are not its own"
            )
        raise ValueError(f"{name!r} is no dimension of VBench; the nearest is {near}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: the score is {value}; what is not known is None")
    dimension = DIMENSIONS[name]
    return (value - dimension.lowest) / (dimension.highest - dimension.lowest)


def quality(scores: Scores, *, rules: Rules = "strict", substitutes: bool = False) -> Figure:
    """The weighted mean of the 7 quality dimensions, dynamic degree with a weight of 0.5.

    Args:
        scores: dimension -> score, None where there is none; names that the total does not need are passed over.
        rules: compat counts a missing dimension as 0; strict gives None.
        substitutes: take ``color@clip`` where there is no ``color``, on the bounds of the latter.

    Raises:
        ValueError: a score that is not finite; two substitutes of one dimension that lacks its own score.
    """
    return _group(scores, QUALITY, rules, substitutes)


def semantic(scores: Scores, *, rules: Rules = "strict", substitutes: bool = False) -> Figure:
    """The mean of the 9 semantic dimensions; arguments and errors as for `quality`."""
    return _group(scores, SEMANTIC, rules, substitutes)


def total(scores: Scores, *, rules: Rules = "strict", substitutes: bool = False) -> Figure:
    """(4 * Quality + Semantic) / 5; arguments and errors as for `quality`."""
    return t2v_totals(scores, rules=rules, substitutes=substitutes)["total"]


def t2v_totals(scores: Scores, *, rules: Rules = "strict", substitutes: bool = False) -> dict[str, Figure]:
    """``quality, semantic, total`` of the text-to-video suite; arguments and errors as for `quality`."""
    parts = [
        quality(scores, rules=rules, substitutes=substitutes),
        semantic(scores, rules=rules, substitutes=substitutes),
    ]
    return {"quality": parts[0], "semantic": parts[1], "total": _mean(parts, (QUALITY_SHARE, SEMANTIC_SHARE))}


def i2v_totals(scores: Scores, *, rules: Rules = "strict", substitutes: bool = False) -> dict[str, Figure]:
    """``i2v, i2v_quality, i2v_total`` of the image-to-video suite; arguments and errors as for `quality`.

    I2V = (subject + background + 0.1 * camera motion) / 2.1, Quality = the quality dimensions without temporal
    flickering / 5.5, Total = the mean of the two.
    """
    parts = [_group(scores, names, rules, substitutes) for names in (I2V, I2V_QUALITY)]
    return {"i2v": parts[0], "i2v_quality": parts[1], "i2v_total": _mean(parts, (1.0, 1.0))}


def missing_words(name: str, figure: Figure) -> str:
    """The dimensions that a total lacks, as a sentence has them; empty where it lacks none."""
    if figure.missing and set(figure.missing) == set((GROUPS | VBENCH2).get(name, ())):
        return "all dimensions"
    return ", ".join(figure.missing)


def vbench2_total(scores: Scores, *, rules: Rules = "strict") -> dict[str, Figure]:
    """The means of the five groups of VBench-2.0 and, as ``total``, the mean of the five.

    Args:
        scores: dimension -> score in [0, 1], named as in its results files (``Multi-View_Consistency``) or with spaces.
        rules: as for `quality`.
    """
    named = {name.replace(" ", "_"): value for name, value in scores.items()}
    groups = {}
    for group, names in VBENCH2.items():
        values, missing = _values({name: named.get(name) for name in names})
        value = None if missing and rules == "strict" else math.fsum(values.values()) / len(names)
        groups[group] = Figure(value, missing=missing)
    return {**groups, "total": _mean(list(groups.values()), [1.0] * len(groups))}


def _group(scores: Scores, names: Sequence[str], rules: Rules, substitutes: bool) -> Figure:
    """Weighted mean of normalised scores."""
    assert rules in ("compat", "strict"), rules
    taken = {name: scores.get(name) for name in names}
    stand_ins = {name: _substitute(scores, name) for name in names if substitutes and taken[name] is None}
    used = {name: label for name, label in stand_ins.items() if label is not None}
    values, missing = _values(taken | {name: scores[label] for name, label in used.items()})
    if missing and rules == "strict":
        return Figure(None, missing=missing, substitutes=tuple(used.values()))
    weights = {name: DIMENSIONS[name].weight for name in names}
    whole = sum(normalise(name, values.get(name, 0.0)) * weights[name] for name in names)
    return Figure(whole / sum(weights.values()), missing=missing, substitutes=tuple(used.values()))


def _values(scores: Scores) -> tuple[dict[str, float], tuple[str, ...]]:
    """What there is, and the names of what there is not."""
    values = {name: float(value) for name, value in scores.items() if value is not None}
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name}: the score is {value}; what is not known is None")
    return values, tuple(name for name in scores if name not in values)


def _substitute(scores: Scores, name: str) -> str | None:
    """The label of the one substitute of a dimension that has a score."""
    found = [label for label, value in scores.items() if label != name and base(label) == name and value is not None]
    if len(found) > 1:
        raise ValueError(f"{', '.join(found)} all stand for {name}; keep the one that shall count")
    return found[0] if found else None


def _mean(parts: Sequence[Figure], weights: Sequence[float]) -> Figure:
    """Weighted mean of totals; None where a part is."""
    values = [part.value for part in parts if part.value is not None]
    value = (
        sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights) if len(values) == len(parts) else None
    )
    return Figure(
        value,
        missing=tuple(name for part in parts for name in part.missing),
        substitutes=tuple(name for part in parts for name in part.substitutes),
    )
