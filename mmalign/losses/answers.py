"""What objectives on answers are given: log-probabilities of tokens, and sequence scores made of them.

Shapes, everywhere: B rows, T tokens padded on the right. A `Side` holds one answer of each row, token by token; a
`Scores` one number for each answer. Answers are compared by the log-ratio D = log pi(y|x) - log pi_ref(y|x).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.losses.errors import Metrics, accuracy, detached


@dataclass(frozen=True)
class Side:
    """One answer of each row.

    Attributes:
        policy: [B, T] log p of each token under the policy; 0 where `mask` is False.
        mask: [B, T] bool: the answer's tokens, with its end of turn.
        reference: [B, T] under the reference; None for objectives without one.
        changed: [B, T] bool: tokens of corrected segments (RLHF-V).
        blind, blind_reference: [B, T] the same tokens under the negative image.
        kl: [B, T] KL(reference || policy) over the vocabulary at each token.
        rewards: [B, T] what each token is worth, without gradients (TGDPO, T-REG).
        sparse, sparse_kl: [B, T] how much each token's log-ratio and KL count (SparsePO).
    """

    policy: Tensor
    mask: Tensor
    reference: Tensor | None = None
    changed: Tensor | None = None
    blind: Tensor | None = None
    blind_reference: Tensor | None = None
    kl: Tensor | None = None
    rewards: Tensor | None = None
    sparse: Tensor | None = None
    sparse_kl: Tensor | None = None

    @property
    def length(self) -> Tensor:
        """Scored tokens [B], at least 1."""
        return self.mask.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Pairs:
    """Rows of two answers, or of one (`rejected` None).

    Attributes:
        weight: [B] >= 0, of each row's loss, which is divided by B.
        margin: [B] how much better the chosen answer is, in a reward's units.
        safer: [B] 1 where the chosen answer is also the safer one, -1 where the rejected is, 0 for neither.
        label: [B] of single answers: 1 good, 0 bad.
        drift: scalar, how far the policy is from the reference on answers to other prompts (KTO's z_0).
    """

    chosen: Side
    rejected: Side | None
    weight: Tensor
    margin: Tensor | None = None
    safer: Tensor | None = None
    label: Tensor | None = None
    drift: Tensor | None = None


@dataclass(frozen=True)
class Score:
    """One number for one answer of each row, [B] each: log-probabilities as the token transform sums them up.

    `rewarded`: sum over tokens of reward times log p under the policy, where tokens have rewards.
    """

    policy: Tensor
    reference: Tensor | None
    length: Tensor
    blind: Tensor | None = None
    blind_reference: Tensor | None = None
    kl: Tensor | None = None
    rewarded: Tensor | None = None

    @property
    def ratio(self) -> Tensor:
        """D = log pi(y|x) - log pi_ref(y|x)."""
        assert self.reference is not None
        return self.policy - self.reference

    @property
    def blind_ratio(self) -> Tensor:
        """D of the same answer under the negative image."""
        assert self.blind is not None
        assert self.blind_reference is not None
        return self.blind - self.blind_reference


@dataclass(frozen=True)
class Scores:
    """The two answers of each row; `other` is None for single answers.

    Attributes:
        label, drift, safer: as in `Pairs`.
        nll: scalar, mean of -log p over all tokens of the batch's chosen answers.
    """

    chosen: Score
    other: Score | None
    label: Tensor | None = None
    drift: Tensor | None = None
    safer: Tensor | None = None
    nll: Tensor | None = None

    @property
    def rejected(self) -> Score:
        assert self.other is not None
        return self.other

    @property
    def difference(self) -> Tensor:
        """h = D(chosen) - D(rejected), [B]."""
        return self.chosen.ratio - self.rejected.ratio


def margin_beta(beta: float, margin: Tensor, *, scale: float = 0.5, rate: float = 0.5) -> Tensor:
    """MM-RLHF's dynamic reward scaling (Zhang et al. 2502.10391): beta (1 + w (1 - exp(-k margin))), [B].

    Between beta and beta (1 + w); a margin below 0 counts as 0. The released code computes it and then overwrites it by
    `batch_beta`, so that no reward's margin reaches its loss.
    """
    return beta * (1 + scale * -torch.expm1(-rate * margin.float().clamp(min=0)))


def batch_beta(beta: float, difference: Tensor, *, scale: float = 0.5, keep: float = 0.8) -> Tensor:
    """The beta of MM-RLHF's released code: beta (1 + w (mean of the kept h - mean of h)), [B], detached.

    Of the batch the `keep` share whose h lies nearest the mean is kept. The code draws them from N(mean, std) instead,
    which is random, and of one row its std is NaN; here a batch of one has beta itself.
    """
    h = difference.detach().float()
    count = max(1, round(keep * len(h)))
    kept = h[(h - h.mean()).abs().argsort(stable=True)[:count]]
    return (beta * (1 + scale * (kept.mean() - h.mean()))).clamp(min=1e-3 * beta).expand(len(h))


def combine(terms: list[tuple[float, Tensor]], weight: Tensor) -> Tensor:
    """sum over terms of w_k mean_i(weight_i loss_ki): scalar."""
    total = weight.new_zeros((), dtype=torch.float32)
    for factor, each in terms:
        total = total + factor * (each * weight).mean()
    return total


def metrics(scores: Scores, beta: Tensor | float) -> Metrics:
    """What every objective on answers logs: mean rewards beta D, how often they rank right (equal ones count one half),
    log-probabilities per answer and lengths in tokens."""
    chosen = scores.chosen
    found: dict[str, Any] = {"logp_chosen": chosen.policy, "length_chosen": chosen.length.float()}
    if chosen.reference is not None:
        found["reward_chosen"] = beta * chosen.ratio
    if scores.other is not None:
        found |= {"logp_rejected": scores.other.policy, "length_rejected": scores.other.length.float()}
        if chosen.reference is not None:
            found["reward_rejected"] = beta * scores.other.ratio
            found["margin"] = beta * scores.difference
            found["implicit_accuracy"] = accuracy(scores.difference)
        else:
            found["implicit_accuracy"] = accuracy(chosen.policy - scores.other.policy)
    if chosen.blind is not None and chosen.blind_reference is not None:
        found["image_accuracy"] = accuracy(chosen.ratio - chosen.blind_ratio)
    return detached(**found)
