"""How alike the frames of a clip are: VBench's formulas on unit-length features, and its mean absolute difference.

Sources: VBench (Huang et al., 2311.17982), VBench++ (2411.13503), and the order of operations in Vchitect/VBench 0.1.5.
All functions let a gradient through to what they are given.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["MAX_WEIGHT", "MEAN_WEIGHT", "MIN_WEIGHT", "consistency", "flicker", "pair_count", "resemblance"]

MAX_WEIGHT, MEAN_WEIGHT, MIN_WEIGHT = 0.4, 0.3, 0.3
"""Of `resemblance`: the best match with the input image, the mean and the least of the matches of neighbours."""

CHUNK_BYTES = 1 << 22
"""Of frames that `flicker` compares at once: what stays in a processor's cache."""


def pair_count(frames: int) -> int:
    """How many pairs of neighbours a clip of so many frames has.

    Raises:
        ValueError: it has none.
    """
    if frames < 2:
        some = "1 frame" if frames == 1 else f"{frames} frames"
        raise ValueError(f"the clip has {some}; this compares frames, so it takes 2 or more")
    return frames - 1


def consistency(features: Tensor) -> Tensor:
    """Consistency of a clip: the mean over t >= 1 of (cos+(f_{t-1}, f_t) + cos+(f_0, f_t)) / 2.

    cos+ is the cosine, or 0 where that is negative.

    Args:
        features: unit-length, float [T, D] with T >= 2.

    Returns:
        A scalar in [0, 1], to rounding.

    Raises:
        ValueError: fewer than 2 frames; the reference divides by 0 there.
    """
    pair_count(len(features))
    return (_likeness(features[:-1], features[1:]) + _likeness(features[:1], features[1:])).mean() / 2


def resemblance(features: Tensor, image: Tensor) -> Tensor:
    """How far a clip shows its input image all along: 0.4 max c + 0.3 mean k + 0.3 min k.

    c_t = cos+(image, f_t) over all frames, k_t = cos+(f_{t-1}, f_t) over all pairs of neighbours.

    Args:
        features: of the frames, unit-length, float [T, D] with T >= 2.
        image: of the input image, unit-length, float [D].

    Returns:
        A scalar in [0, 1], to rounding.

    Raises:
        ValueError: fewer than 2 frames; the reference has no least pair there.
    """
    pair_count(len(features))
    conformity, neighbours = _likeness(image[None], features), _likeness(features[:-1], features[1:])
    return MAX_WEIGHT * conformity.max() + MEAN_WEIGHT * neighbours.mean() + MIN_WEIGHT * neighbours.min()


def _likeness(one: Tensor, other: Tensor) -> Tensor:
    """cos+ of unit-length features."""
    return (one * other).sum(-1).clamp(min=0.0)


def flicker(frames: Tensor, device: torch.device | None = None) -> Tensor:
    """Mean absolute difference of neighbouring frames, over all pixels, channels and pairs, from 0 to 255.

    Frames of 8 bits are subtracted in 8 bits and summed in whole numbers, a few at a time, so that the mean is exact
    and no float copy of the clip is made. The reference has numpy's float32 means of float32 images, which are within
    1e-6 of it as a share.

    Args:
        frames: uint8 [T, 3, H, W], or float in [0, 1] where a gradient is wanted; T >= 2.
        device: where to compute; where the frames are if None.

    Returns:
        A scalar: float64 of uint8 frames, otherwise of the frames' own type.

    Raises:
        ValueError: fewer than 2 frames.
    """
    pairs = pair_count(len(frames))
    step = max(1, CHUNK_BYTES // max(1, frames[0].nbytes))
    total: Tensor | int = 0
    for start in range(0, pairs, step):
        part = frames[start : min(start + step, pairs) + 1]
        part = part if device is None else part.to(device)
        one, other = part[:-1], part[1:]
        if frames.dtype == torch.uint8:
            total = total + _sum(torch.maximum(one, other).sub_(torch.minimum(one, other)))
        else:  # each pair by itself, so that no long sum loses digits
            total = total + (one - other).abs().flatten(1).mean(1).sum()
    assert isinstance(total, Tensor)
    if frames.dtype == torch.uint8:
        return total.double() / (pairs * frames[0].numel())
    return total * 255 / pairs


def _sum(differences: Tensor) -> Tensor:
    """Of uint8, in whole numbers; on a CPU by numpy, which is several times as fast as torch there."""
    if differences.device.type == "cpu":
        return torch.tensor(int(differences.numpy().sum(dtype=np.uint64)))
    return differences.sum(dtype=torch.int64)
