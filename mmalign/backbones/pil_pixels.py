"""Pictures as PIL resizes them, for those that a scorer's authors read with PIL: the library itself, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["as_it_is", "pil_bicubic"]


def pil_bicubic(picture: Tensor, size: int | tuple[int, int], crop: int | None = None) -> Tensor:
    """Resize with PIL's bicubic filter, in 8 bits, and cut out the central square, as torchvision does on PIL images.

    Args:
        picture: uint8 [3, H, W].
        size: of the shortest side, or (height, width).
        crop: side of the square; None keeps all.

    Returns:
        uint8 [3, h, w] on the CPU.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, to_pil_image

    image = resize(to_pil_image(picture.cpu()), size, InterpolationMode.BICUBIC)
    result: Tensor = pil_to_tensor(image if crop is None else center_crop(image, [crop]))
    assert result.dtype == torch.uint8
    return result


def as_it_is(images: Tensor, size: int) -> Tensor:
    """The geometry of pictures that were resized before."""
    return images
