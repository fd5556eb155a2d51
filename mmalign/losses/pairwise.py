"""Pairwise preference objectives on denoising errors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def squared_error(prediction: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Squared error of each sample, float32: [B, ...] -> [B]; `reduction` over all dims but the first."""
    error = (prediction.float() - target.float()).square().flatten(1)
    return error.mean(1) if reduction == "mean" else error.sum(1)


def diffusion_dpo(
    model_w: Tensor,
    model_l: Tensor,
    ref_w: Tensor,
    ref_l: Tensor,
    *,
    beta: float,
    kappa: float = 0.5,
    label: Tensor | None = None,
    weight: Tensor | None = None,
    anchor: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Diffusion-DPO (Wallace et al. 2311.12908, equation 14).

        logit = -kappa * beta * [(E(w) - E_ref(w)) - (E(l) - E_ref(l))]
        loss  = -label * log sigmoid(logit) - (1 - label) * log sigmoid(-logit)

    Args:
        model_w, model_l, ref_w, ref_l: squared errors [B] of winner and loser under the policy and the reference.
        beta: > 0; per sample when errors are sums, per element when they are means (see `beta_units`).
        kappa: 1/2 in the authors' code; the diffusers SD 1.5 script has 1 with half the beta.
        label: [B] in [0, 1], probability that w is preferred; 1 when None, 0.5 for a tie kept as a soft label.
        weight: [B] >= 0; the loss is sum(weight * each) / B, so that a weight means the same in every batch, also in
            one of a single pair, and however a step is cut into micro-batches. None is 1.
        anchor: adds `anchor * mean E(w)`, which keeps the winner's likelihood from falling.

    Returns:
        The scalar loss, and detached scalar metrics: implicit_accuracy counts logit == 0 as one half.
    """
    model_w, model_l, ref_w, ref_l = (error.float() for error in (model_w, model_l, ref_w, ref_l))
    margin = (model_l - ref_l) - (model_w - ref_w)
    logit = kappa * beta * margin
    label = torch.ones_like(logit) if label is None else label.float()
    weight = torch.ones_like(logit) if weight is None else weight.float()
    each = -label * F.logsigmoid(logit) - (1 - label) * F.logsigmoid(-logit)
    loss = (weight * each).mean()
    if anchor:
        loss = loss + anchor * (weight * model_w).mean()
    accuracy = (logit > 0).float() + 0.5 * (logit == 0).float()
    metrics = {
        "implicit_accuracy": accuracy.mean(),
        "margin": margin.mean(),
        "logit": logit.mean(),
        "model_w_err": model_w.mean(),
        "model_l_err": model_l.mean(),
        "ref_w_err": ref_w.mean(),
        "ref_l_err": ref_l.mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def beta_units(beta: float, elements: int, reduction: str) -> dict[str, float]:
    """beta in both units for a latent of `elements` numbers.

    A mean over D elements with beta is a sum with beta / D: `beta_per_sample` multiplies mean errors,
    `beta_per_element` multiplies summed errors. Only the latter compares across resolutions.
    """
    per_element = beta / elements if reduction == "mean" else beta
    return {"beta_per_element": per_element, "beta_per_sample": per_element * elements}
