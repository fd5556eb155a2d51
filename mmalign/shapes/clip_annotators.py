"""Simulated annotators of clips: tastes over VQ, MQ and TA, with the noise and the ties of `mmalign.shapes.annotators`.

Besides which of two clips is better, they say which is on each axis: the same model of Rao and Kupper, on the
difference of that axis alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mmalign.shapes.annotators import Annotator, Label
from mmalign.shapes.axes import AXES, axes
from mmalign.shapes.clip_reader import read_clip
from mmalign.shapes.motion import MotionCaption


def clip_utility(annotator: Annotator, caption: MotionCaption, clip: np.ndarray, fps: float) -> float:
    """Noise-free utility in [0, 1] of one clip, uint8 RGB [T, height, width, 3], for an annotator of clips."""
    return annotator.weigh(axes(caption, read_clip(clip, fps)))


def judge_axes(
    annotator: Annotator, rng: np.random.Generator, axes_a: Mapping[str, float], axes_b: Mapping[str, float]
) -> dict[str, Label]:
    """One answer for each axis, {VQ, MQ, TA} as in a preference table; uses up one draw of `rng` for each."""
    return {axis: annotator.judge(rng, axes_a[axis], axes_b[axis]) for axis in AXES}


def _annotator(name: str, temperature: float, tie_margin: float, *weights: float) -> Annotator:
    tastes = dict(zip(AXES, weights, strict=True))
    return Annotator(name, tastes, temperature, tie_margin, f"shapes-clips-{name}", features=AXES)


CLIP_ANNOTATORS: dict[str, Annotator] = {
    annotator.name: annotator
    for annotator in (
        _annotator("balanced", 0.06, 0.02, 1 / 3, 1 / 3, 1 / 3),
        _annotator("visual", 0.06, 0.02, 0.6, 0.2, 0.2),
        _annotator("smooth", 0.06, 0.02, 0.2, 0.6, 0.2),
        _annotator("textual", 0.06, 0.02, 0.2, 0.2, 0.6),
        _annotator("careless", 0.4, 0.1, 1 / 3, 1 / 3, 1 / 3),
    )
}
