"""Objectives that need no preferences: denoising, and the autoencoder that the latents come from."""

from __future__ import annotations

import torch
from torch import Tensor


def denoising(
    error: Tensor, *, snr: Tensor | None = None, snr_gamma: float | None = None, parameterisation: str = "eps"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean denoising error (DDPM 2006.11239, equation 14), optionally min-SNR weighted (2303.09556, section 3.4).

    Args:
        error: [B] squared errors of the model's own parameterisation.
        snr: [B] signal-to-noise ratios, needed with `snr_gamma`.
        snr_gamma: caps the weight of the x_0 error: min(snr, gamma) / snr for eps, / (snr + 1) for v, and
            / (sqrt(snr) + 1)^2 for flow, whose squared error is the x_0 error over t^2.
    """
    error = error.float()
    weight = torch.ones_like(error)
    if snr_gamma is not None:
        assert snr is not None
        per_x0 = {"eps": snr, "v": snr + 1, "flow": (snr.sqrt() + 1).square()}[parameterisation]
        weight = snr.clamp(max=snr_gamma) / per_x0
    loss = (weight * error).mean()
    return loss, {"model_err": error.mean().detach()}


def reconstruction(
    pixels: Tensor, decoded: Tensor, kl: Tensor, *, l1: float, l2: float, kl_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """L1, L2 and KL of a variational autoencoder (2112.10752, appendix G, without the adversarial terms).

    Args:
        pixels, decoded: [B, 3, H, W] in [-1, 1].
        kl: [B] KL divergence to a unit Gaussian, per latent element.
    """
    difference = decoded.float() - pixels.float()
    absolute, squared, divergence = difference.abs().mean(), difference.square().mean(), kl.float().mean()
    loss = l1 * absolute + l2 * squared + kl_weight * divergence
    return loss, {"l1": absolute.detach(), "l2": squared.detach(), "kl": divergence.detach()}
