"""Latents as FLUX and Qwen-Image transformers take them: a row of tokens, each a patch of 2x2 latents."""

from __future__ import annotations

import torch
from torch import Tensor

PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] to tokens [B, h/2 * w/2, 4 C], row by row; within a token channel, row, column."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def unpack(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack` for latents [B, C, h, w] of `shape`."""
    b, c, h, w = shape
    patches = tokens.reshape(b, h // PATCH, w // PATCH, c, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c, h, w)


def positions(h: int, w: int, device: torch.device) -> Tensor:
    """Where each token of latents [h, w] is: (0, row, column), [h/2 * w/2, 3]."""
    rows, columns = torch.meshgrid(torch.arange(h // PATCH), torch.arange(w // PATCH), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(device, torch.float32)
