"""Images that an answer is not about, made once per row from its content, so that policy and reference see the same.

mDPO's code crops inside the forward pass, once for the policy and once for the reference; two crops make the log-ratio
noisy, and nothing of it can be cached.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torchvision.transforms.functional import InterpolationMode, resized_crop

from mmalign.jobs_mllm import Negative


def negative(image: Tensor, settings: Negative, generator: Generator) -> Tensor:
    """One negative image: uint8 [3, H, W] of the same size. Of kind `other` the caller gives the other picture."""
    if settings.kind == "crop":
        return crop(image, settings.low, settings.high, generator)
    if settings.kind == "noise":
        return diffused(image, settings.step, generator)
    if settings.kind == "rotate":
        turns = int(torch.randint(1, 4, (), generator=generator))
        return fitted(torch.rot90(image, turns, (1, 2)), image.shape[-2:])
    if settings.kind == "black":
        return torch.zeros_like(image)
    return image


def crop(image: Tensor, low: float, high: float, generator: Generator) -> Tensor:
    """A part of `low` to `high` of the area with sides of 3:4 to 4:3, enlarged to the whole (mDPO, 2406.11839)."""
    height, width = image.shape[-2:]
    share = low + (high - low) * float(torch.rand((), generator=generator))
    aspect = math.exp(math.log(3 / 4) + 2 * math.log(4 / 3) * float(torch.rand((), generator=generator)))
    area = share * height * width
    h = min(height, max(1, round(math.sqrt(area / aspect))))
    w = min(width, max(1, round(math.sqrt(area * aspect))))
    top = int(torch.randint(0, height - h + 1, (), generator=generator))
    left = int(torch.randint(0, width - w + 1, (), generator=generator))
    return _cut(image, (top, left, h, w), (height, width))


def diffused(image: Tensor, step: int, generator: Generator) -> Tensor:
    """x_t of DDPM's linear schedule (2006.11239), pixels in [-1, 1]: uint8 again, cut at the ends of the range.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e,  a_t = prod_{s <= t} (1 - beta_s),  beta from 1e-4 to 0.02 over 1000
    """
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[step].item()
    noise = torch.randn(image.shape, generator=generator)
    x = math.sqrt(kept) * (image.float() / 127.5 - 1) + math.sqrt(1 - kept) * noise
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def fitted(image: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """The image stretched to a size, so that it takes as many tokens as the one whose place it takes."""
    height, width = image.shape[-2:]
    return image if (height, width) == tuple(size) else _cut(image, (0, 0, height, width), (size[0], size[1]))


def _cut(image: Tensor, box: tuple[int, int, int, int], size: tuple[int, int]) -> Tensor:
    made: Tensor = resized_crop(image, *box, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return made
