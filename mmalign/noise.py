"""Parameterisations of a diffusion process, and seeded randomness that does not depend on the batch.

Shapes: latents [B, C, H, W] (any trailing dims), timesteps `t` [B] int64, `alphas_cumprod` [T] float32.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

Parameterisation = Literal["eps", "v"]


def generator(*identity: object) -> torch.Generator:
    """A CPU generator seeded by what it is for (say run seed, pair, draw).

    Draws made this way are the same whatever batch, process or device they are used in, and after a resume.
    """
    digest = hashlib.sha256("\x1f".join(map(str, identity)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, torch.float32)[t].reshape(-1, *[1] * (like.ndim - 1))


def add_noise(latents: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM 2006.11239, equation 4)."""
    abar = _at(alphas_cumprod, t, latents)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


def target(kind: Parameterisation, latents: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """What the model is to predict: eps, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 (2202.00512, appendix D)."""
    if kind == "eps":
        return noise
    abar = _at(alphas_cumprod, t, latents)
    return abar.sqrt() * noise - (1 - abar).sqrt() * latents


def to_x0_eps(
    kind: Parameterisation, noisy: Tensor, prediction: Tensor, t: Tensor, alphas_cumprod: Tensor
) -> tuple[Tensor, Tensor]:
    """The clean latents and the noise that a prediction implies at `t`."""
    abar = _at(alphas_cumprod, t, noisy)
    if kind == "eps":
        return (noisy - (1 - abar).sqrt() * prediction) / abar.sqrt(), prediction
    return abar.sqrt() * noisy - (1 - abar).sqrt() * prediction, abar.sqrt() * prediction + (1 - abar).sqrt() * noisy


def snr(t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Signal-to-noise ratio abar / (1 - abar) at `t`: [B]."""
    abar = alphas_cumprod.to(t.device, torch.float32)[t]
    return abar / (1 - abar)


def ddim_step(noisy: Tensor, x0: Tensor, eps: Tensor, previous: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """One deterministic DDIM step to timestep `previous` [B], -1 for the clean end (2010.02502, equation 12, eta 0)."""
    abar = torch.where(previous >= 0, alphas_cumprod.to(noisy.device)[previous.clamp(min=0)], 1.0)
    abar = abar.reshape(-1, *[1] * (noisy.ndim - 1)).to(noisy.dtype)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps
