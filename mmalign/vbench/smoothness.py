"""Motion smoothness as VBench computes it from interpolated frames (motion_smoothness.py of Vchitect/VBench)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["differences", "levels", "margins", "pairs", "smoothness", "surround"]


def pairs(frames: int) -> int:
    """How many frames of a clip are compared: those at odd places that have a neighbour on either side.

    Raises:
        ValueError: none, in a clip of fewer than 3 frames.
    """
    if frames < 3:
        raise ValueError(
            f"motion_smoothness compares a frame with what is interpolated between its neighbours, so it takes a clip "
            f"of 3 frames or more, and this one has {frames}"
        )
    return (frames - 1) // 2


def margins(height: int, width: int, multiple: int, least: int = 0) -> tuple[int, int, int, int]:
    """Pixels (left, right, top, bottom) that make both sides multiples; an odd one is at the right and the bottom.

    Args:
        least: of a side with its margins, a multiple itself.

    Raises:
        ValueError: a side stays below `least`.
    """
    across, down = -width % multiple, -height % multiple
    if min(width + across, height + down) < least:
        raise ValueError(
            f"motion_smoothness takes frames whose sides are {least - multiple + 1} pixels or more, and these are "
            f"{width} x {height}: its correlations have no pixel left at the coarsest scale"
        )
    return across // 2, across - across // 2, down // 2, down - down // 2


def surround(frames: Tensor, margins: tuple[int, int, int, int]) -> Tensor:
    """[N, C, H, W] with its edge repeated over the margins (left, right, top, bottom)."""
    return F.pad(frames, margins, mode="replicate") if any(margins) else frames


def levels(frames: Tensor, strict: bool = False) -> Tensor:
    """Interpolated frames in [0, 1] as whole numbers from 0 to 255, in floating point.

    The gradient passes as if nothing was cut off (straight through).

    Args:
        strict: rounded to the nearest; otherwise what lies behind the point is cut off, as the reference's cast to
            uint8 does, which darkens by half a level on average.
    """
    exact = frames * 255
    return exact + ((exact.round() if strict else exact.floor()) - exact).detach()


def differences(drawn: Tensor, shown: Tensor) -> Tensor:
    """Mean absolute difference of each pair over channels and pixels: [N, 3, H, W] from 0 to 255 -> float64 [N]."""
    return (drawn - shown).abs().flatten(1).double().mean(1)


def smoothness(differences: Tensor) -> Tensor:
    """A clip's score from its differences [K]: 1 where every frame is as interpolated, 0 where all differ by 255."""
    return (255 - torch.mean(differences)) / 255
