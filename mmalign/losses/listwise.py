"""Preference objectives on lists of k judged pictures of one prompt, in one forward for the whole list.

Shapes, everywhere: `model` and `reference` are squared errors [B, k]; `phi` [B, k] in [0, 1] says how good each picture
is, higher is better, equal values are ties; `mask` [B, k] is True where there is a picture, so that lists of different
lengths share a batch; what stands elsewhere is never read. A list's loss is a sum over its pairs or places, the batch's
a mean over lists times `weight` [B]. For k = 2 with phi = (1, 0) all are Diffusion-DPO, up to a constant weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.losses.errors import Metrics, detached, implicit_reward, weighted_mean

HIDDEN = -1e30


def _reward(model: Tensor, reference: Tensor, mask: Tensor, beta: float, kappa: float) -> Tensor:
    """Implicit rewards, 0 where there is no picture (and no gradient)."""
    zero = torch.zeros_like(model, dtype=torch.float32)
    model, reference = (torch.where(mask, error.float(), zero) for error in (model, reference))
    return implicit_reward(model, reference, beta, kappa)


def above(phi: Tensor, mask: Tensor) -> Tensor:
    """[B, k, k], True at i, j where both are pictures and i is strictly better than j."""
    return (phi[:, :, None] > phi[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def ranks(score: Tensor, mask: Tensor, then: Tensor | None = None) -> Tensor:
    """Rank of each picture by descending score: 1 is best, tied ones share the mean of their ranks. [B, k] float32.

    `then` [B, k] decides between pictures of equal score.
    """
    equal = (score[:, :, None] == score[:, None, :]) & mask[:, :, None] & mask[:, None, :]
    ahead = above(score, mask)
    if then is not None:
        ahead, equal = ahead | (equal & above(then, mask)), equal & (then[:, :, None] == then[:, None, :])
    better, tied = (
        ahead.float().sum(1),
        equal.float().sum(1),
    )  # how many are strictly better than j, and how many like it
    return torch.where(mask, better + (tied + 1) / 2, torch.ones_like(better))


def dcg_weight(gain: Tensor, rank: Tensor) -> Tensor:
    """|G_i - G_j| |1/D(i) - 1/D(j)| with D(rank) = log(1 + rank): what swapping two changes of the DCG. [B, k, k]."""
    discount = 1 / torch.log1p(rank)
    return (gain[:, :, None] - gain[:, None, :]).abs() * (discount[:, :, None] - discount[:, None, :]).abs()


def list_metrics(reward: Tensor, phi: Tensor, mask: Tensor, model: Tensor, reference: Tensor) -> Metrics:
    """Accuracy over the ordered pairs of all lists, rewards of best and worst, and mean errors."""
    ordered = above(phi, mask)
    gap = reward[:, :, None] - reward[:, None, :]
    right = (gap > 0).float() + 0.5 * (gap == 0).float()
    count = ordered.sum().clamp(min=1)
    number = mask.sum().clamp(min=1)
    zero = torch.zeros_like(reward)
    return detached(
        implicit_accuracy=(right * ordered).sum() / count, logit=torch.where(ordered, gap, 0.0).sum() / count,
        logit_abs=torch.where(ordered, gap.abs(), 0.0).sum() / count,
        model_err=torch.where(mask, model, zero).sum() / number,
        ref_err=torch.where(mask, reference, zero).sum() / number,
    )  # fmt: skip


def _pairs(weights: Tensor, reward: Tensor, ordered: Tensor) -> Tensor:
    """Sum over ordered pairs of weight * -log sigmoid(r_i - r_j): [B]."""
    gap = torch.where(ordered, reward[:, :, None] - reward[:, None, :], 0.0)
    return torch.where(ordered, -weights * F.logsigmoid(gap), 0.0).sum((1, 2))


def rank_dpo(
    model: Tensor, reference: Tensor, phi: Tensor, mask: Tensor, *, beta: float, kappa: float = 0.5,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """RankDPO (Karthik et al. 2410.18013, algorithm 2).

        Delta_ij = |2^phi_i - 2^phi_j| |1 / log(1 + tau_i) - 1 / log(1 + tau_j)|
        loss     = -sum over i better than j of Delta_ij log sigmoid(r_i - r_j)

    tau is the rank by phi, natural logarithms (another base is another beta). The paper has no factor 1/2 in the logit:
    its beta is kappa beta here.
    """
    reward = _reward(model, reference, mask, beta, kappa)
    weights = dcg_weight(torch.exp2(phi.float()), ranks(phi, mask))
    each = _pairs(weights, reward, above(phi, mask))
    return weighted_mean(each, weight), list_metrics(reward, phi, mask, model, reference)


def lipo(
    model: Tensor, reference: Tensor, phi: Tensor, mask: Tensor, *, beta: float, kappa: float = 0.5,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """LiPO-lambda (Liu et al. 2402.01878, section 4): gains 2^phi - 1, ranks by the policy's own implicit rewards.

    A pair that the policy has at the top of its list weighs more than the same pair at the bottom. No gradient goes
    through the ranks. Equal rewards are ranked by phi: a fresh policy has nothing but ties, which would weigh nothing,
    and it would never leave them.
    """
    reward = _reward(model, reference, mask, beta, kappa)
    weights = dcg_weight(torch.exp2(phi.float()) - 1, ranks(reward.detach(), mask, phi))
    each = _pairs(weights, reward, above(phi, mask))
    return weighted_mean(each, weight), list_metrics(reward, phi, mask, model, reference)


def plackett_luce(
    model: Tensor, reference: Tensor, phi: Tensor, mask: Tensor, *, beta: float, kappa: float = 0.5,
    weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """Plackett-Luce likelihood of a ranking (DPO, 2305.18290, appendix A.3).

        loss = -sum_i log( e^{r_i} / [e^{r_i} + sum over j worse than i of e^{r_j}] )

    Tied pictures are not compared with each other: a choice is made among i and those strictly worse. Without ties this
    is the paper's likelihood.
    """
    reward = _reward(model, reference, mask, beta, kappa)
    rivals = above(phi, mask) | torch.diag_embed(mask)
    total = torch.logsumexp(torch.where(rivals, reward[:, None, :], HIDDEN), dim=2)
    each = torch.where(mask, total - reward, 0.0).sum(1)
    return weighted_mean(each, weight), list_metrics(reward, phi, mask, model, reference)


def pro(
    model: Tensor, reference: Tensor, phi: Tensor, mask: Tensor, *, beta: float, kappa: float = 0.5,
    sft: float = 0.05, weight: Tensor | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """PRO (Song et al. 2306.17492), with implicit rewards for the log-likelihoods.

        loss = -sum_i log( e^{d_ii r_i} / [e^{d_ii r_i} + sum over j worse than i of e^{d_ij r_j}] ) + sft E(best)

    d_ij = phi_i - phi_j is an inverse temperature: a rival that is nearly as good pushes little. d_ii is the largest of
    them, as in the paper. The best pictures, where tied, share the last term.
    """
    reward = _reward(model, reference, mask, beta, kappa)
    worse = above(phi, mask)
    distance = torch.where(worse, phi[:, :, None].float() - phi[:, None, :].float(), 0.0)
    sharpest = distance.amax(2)
    own = sharpest * reward
    rivals = torch.where(worse, distance * reward[:, None, :], HIDDEN)
    each = torch.logsumexp(torch.cat([rivals, own[:, :, None]], dim=2), dim=2) - own
    each = torch.where(worse.any(2), each, 0.0).sum(1)
    best = best_of(phi, mask)
    zero = torch.zeros_like(reward)
    each = each + sft * (best * torch.where(mask, model.float(), zero)).sum(1)
    return weighted_mean(each, weight), list_metrics(reward, phi, mask, model, reference)


def best_of(score: Tensor, mask: Tensor) -> Tensor:
    """1 at the best picture of each list, shared equally among tied ones; [B, k] float32, rows sum to 1."""
    hidden = torch.where(mask, score.float(), HIDDEN)
    best = (hidden == hidden.amax(1, keepdim=True)) & mask
    return best.float() / best.sum(1, keepdim=True).clamp(min=1)
