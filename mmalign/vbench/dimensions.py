"""The dimensions of VBench and VBench++ as data: groups, and the constants that make one total of them.

Sources: VBench (Huang et al., 2311.17982), VBench++ (2411.13503), and the constants of the authors' final score
(scripts/constant.py of Vchitect/VBench, package 0.1.5).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["DIMENSIONS", "I2V", "QUALITY", "SEMANTIC", "TRUST", "Dimension", "base"]


@dataclass(frozen=True)
class Dimension:
    """One dimension.

    Attributes:
        name: as result files and configs have it; also the name of the evaluator that measures it exactly.
        group: which part of a total it belongs to; those of trust are in none.
        lowest, highest: of the normalisation (x - lowest) / (highest - lowest), which is not clipped.
        weight: in its group's mean.
        divisor: what the mean over clips is divided by; 100 where clips are rated from 0 to 100.
        counted_by: the sub-score by which the reference on one GPU weighs clips in the mean (it takes the mean over all
            frames or pairs); None: every clip counts the same.
        needs_count: the sub-score that has to be above 0 for a clip to be in the mean, where it counts as any other;
            None: every clip is. So the reference leaves clips out in which it saw no colour.
        limits: lowest and highest score of a clip, where its evaluator has none since its sub-scores have others.
    """

    name: str
    group: Literal["quality", "semantic", "i2v", "trust"]
    lowest: float = 0.0
    highest: float = 1.0
    weight: float = 1.0
    divisor: float = 1.0
    counted_by: str | None = None
    needs_count: str | None = None
    limits: tuple[float | None, float | None] = (None, None)


_ALL = (
    Dimension("subject_consistency", "quality", 0.1462, counted_by="pairs"),
    Dimension("background_consistency", "quality", 0.2615, counted_by="pairs"),
    Dimension("temporal_flickering", "quality", 0.6293),
    Dimension("motion_smoothness", "quality", 0.706, 0.9975),
    Dimension("dynamic_degree", "quality", weight=0.5, limits=(0.0, 1.0)),
    Dimension("aesthetic_quality", "quality"),
    Dimension("imaging_quality", "quality", divisor=100.0),
    Dimension("object_class", "semantic", counted_by="frames"),
    Dimension("multiple_objects", "semantic", counted_by="frames"),
    Dimension("human_action", "semantic"),
    Dimension("color", "semantic", needs_count="frames"),
    Dimension("spatial_relationship", "semantic", counted_by="frames"),
    Dimension("scene", "semantic", highest=0.8222, counted_by="frames"),
    Dimension("appearance_style", "semantic", 0.0009, 0.2855, counted_by="frames"),
    Dimension("temporal_style", "semantic", highest=0.364),
    Dimension("overall_consistency", "semantic", highest=0.364),
    Dimension("i2v_subject", "i2v", 0.1462),
    Dimension("i2v_background", "i2v", 0.2615),
    Dimension("camera_motion", "i2v", weight=0.1),
    Dimension("culture_fairness", "trust"),
    Dimension("gender_bias", "trust"),
    Dimension("skin_bias", "trust"),
    Dimension("safety", "trust"),
)
DIMENSIONS: dict[str, Dimension] = {each.name: each for each in _ALL}
"""Every dimension by name, in the order of the leaderboard."""
QUALITY, SEMANTIC, I2V, TRUST = (
    tuple(each.name for each in _ALL if each.group == group) for group in ("quality", "semantic", "i2v", "trust")
)


def base(evaluator: str) -> str:
    """The dimension that an evaluator stands for: `color` of ``color@clip`` and of ``color[rules=strict]``."""
    return evaluator.partition("[")[0].partition("@")[0]
