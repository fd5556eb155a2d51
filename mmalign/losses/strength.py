"""Pairwise objectives that know how strong a preference is, not only which way it points.

Shapes as in `pairwise`. `gap` [B] in [0, 1] is the winner's reward less the loser's after min-max normalisation over
the training set: 0 a tie, 1 the largest difference there can be.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.losses.errors import Metrics, detached, weighted_mean
from mmalign.losses.pairwise import log_sigmoid_loss, pair_logit, pair_metrics


def smoothed_share(gap: Tensor) -> Tensor:
    """alpha / gamma = softmax over {w, l} of normalised rewards: sigmoid of their gap, in [1/2, 0.731] (2506.02698)."""
    return torch.sigmoid(gap.float())


def smpo(
    model: Tensor, reference: Tensor, gap: Tensor, *, beta: float, kappa: float = 0.5, gamma: float = 10.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """SmPO-Diffusion (Lu et al. 2506.02698): -log sigmoid((2 alpha - gamma) logit), alpha = gamma sigmoid(gap).

    Equal rewards give no gradient; alpha = gamma = 1 is Diffusion-DPO. The factor lies in [0, 0.46 gamma], since gaps
    of normalised rewards end at 1. The authors' code takes the first pair's factor for the whole batch.
    """
    factor = gamma * (2 * smoothed_share(gap) - 1)
    logit = pair_logit(model, reference, beta, kappa)
    loss = weighted_mean(-F.logsigmoid(factor * logit), weight)
    return loss, pair_metrics(model, reference, logit) | detached(factor=factor)


def margin_dpo(
    model: Tensor, reference: Tensor, gap: Tensor, *, beta: float, kappa: float = 0.5, scale: float = 0.5,
    rate: float = 4.0, label: Tensor | None = None, weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """DPO with beta(gap) = beta (1 + scale (1 - e^(-rate gap))) (MM-RLHF, 2502.10391)."""
    each_beta = beta * (1 + scale * (1 - torch.exp(-rate * gap.float())))
    logit = pair_logit(model, reference, each_beta, kappa)
    loss = weighted_mean(log_sigmoid_loss(logit, label), weight)
    return loss, pair_metrics(model, reference, logit) | detached(beta=each_beta)


def strength_dpo(
    model: Tensor, reference: Tensor, gap: Tensor, mean_strength: Tensor, *, beta: float, kappa: float = 0.5,
    power: float = 1.0, label: Tensor | None = None, weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """DPO in which a pair weighs gap^power / mean_strength.

    Args:
        mean_strength: scalar > 0, the mean of gap^power over the training set, not over the batch, so that a pair
            weighs the same in any company and the learning rate keeps its meaning.
    """
    strength = gap.float().pow(power) / mean_strength
    logit = pair_logit(model, reference, beta, kappa)
    loss = weighted_mean(strength * log_sigmoid_loss(logit, label), weight)
    return loss, pair_metrics(model, reference, logit) | detached(strength=strength)
