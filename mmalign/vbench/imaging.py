"""How frames are made ready for imaging quality, as VBench does (imaging_quality.py of Vchitect/VBench)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

__all__ = ["LARGEST", "Mode", "prepare", "target"]

Mode = Literal["longer", "shorter", "shorter_centercrop", "None"]
LARGEST = 512


def target(height: int, width: int, mode: Mode, strict: bool = False) -> tuple[int, int]:
    """(height, width) that frames are resized to; their own where they are not above 512 pixels.

    Args:
        mode: which side becomes 512: the longer one, or the shorter one; None resizes nothing.
        strict: sides are rounded. Otherwise the product of the float 512 / side with each side is cut to an integer, as
            the reference has it, which makes 511 of the 512 for 1069 of the sizes up to 8192 (561, 569, 644, ...).

    Raises:
        ValueError: a side would have no pixels.
    """
    side = max(height, width) if mode == "longer" else min(height, width)
    if mode == "None" or side <= LARGEST:
        return height, width
    scale = float(LARGEST) / side
    size = (int(scale * height), int(scale * width))
    if strict:
        size = (round(height * LARGEST / side), round(width * LARGEST / side))
    if 0 in size:
        raise ValueError(f"a frame of {width} x {height} has no pixels left across at {LARGEST}; crop it")
    return size


def prepare(frames: Tensor, mode: Mode = "longer", strict: bool = False) -> Tensor:
    """Frames of one size as the network takes them.

    Args:
        frames: [N, 3, H, W] RGB from 0 to 255, of any dtype.

    Returns:
        float32 [N, 3, h, w] in [0, 1]: resized bilinearly without a filter, in floating point; with
        ``shorter_centercrop`` and a shorter side above 512, the 512 x 512 pixels in the middle.

    Raises:
        ValueError: a side would have no pixels.
    """
    height, width = frames.shape[-2:]
    size = target(height, width, mode, strict)
    values = frames.float()
    if size != (height, width):
        values = F.interpolate(values, size, mode="bilinear", align_corners=False)
        if mode == "shorter_centercrop":
            values = _middle(values, LARGEST)
    return values / 255


def _middle(frames: Tensor, side: int) -> Tensor:
    """The side x side pixels in the middle, as torchvision cuts them; zeros where one is missing (511 of 512)."""
    down, across = (max(0, side - length) for length in frames.shape[-2:])
    frames = F.pad(frames, (across // 2, -(-across // 2), down // 2, -(-down // 2)))
    top, left = (round((length - side) / 2) for length in frames.shape[-2:])
    return frames[..., top : top + side, left : left + side]
