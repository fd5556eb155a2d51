"""Pictures as PIL resizes them, for those that a scorer's authors read with PIL: the library itself, to the bit."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["as_it_is", "pil_bicubic"]


def pil_bicubic(picture: Tensor, size: int | tuple[int, int], crop: int | None = None) -> Tensor:
    """Resize with PIL's bicubic filter, in 8 bits, and cut out the central square, as torchvision does on PIL images.

    Args:
        picture: uint8 [3, H, W].
        size: of the shortest side, or (height, width).
        crop: side of the square, at most ``size``; None keeps all.

    Returns:
        uint8 [3, h, w] on the CPU.
    """
    height, width = picture.shape[-2:]
    if isinstance(size, int):
        long = int(size * max(height, width) / min(height, width))
        size = (size, long) if height <= width else (long, size)
    image = Image.fromarray(picture.permute(1, 2, 0).cpu().contiguous().numpy())
    if (height, width) != size:
        image = image.resize(size[::-1], Image.Resampling.BICUBIC)
    if crop is not None:
        top, left = (round((side - crop) / 2) for side in size)
        image = image.crop((left, top, left + crop, top + crop))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_it_is(images: Tensor, size: int) -> Tensor:
    """The geometry of pictures that were resized before."""
    return images
