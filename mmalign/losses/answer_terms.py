"""Objectives on sequence scores of answers: each takes `Scores` and beta, and returns a loss for each row, [B].

beta is a number or [B]; D is the log-ratio of an answer, h = D(chosen) - D(rejected), s log sigmoid, lp-bar the mean
log-probability of an answer's tokens. Names are TRL's where it has the loss; tests compare values and gradients.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.losses.answers import Score, Scores

Beta = Tensor | float
_LARGEST = 80.0  # e^80 is as far as float32 goes


def _norm(score: Score, value: Tensor) -> Tensor:
    return value / score.length


# ----------------------------------------------------------------------------------------------------------- DPO
def dpo(scores: Scores, *, beta: Beta) -> Tensor:
    """DPO (Rafailov et al. 2305.18290, equation 7): -s(beta h). TRL: sigmoid."""
    return -F.logsigmoid(beta * scores.difference)


def conservative(scores: Scores, *, beta: Beta, flip_rate: float = 0.1) -> Tensor:
    """cDPO (Mitchell 2023): -(1 - e) s(beta h) - e s(-beta h). TRL's `sigmoid` ignores label_smoothing since 0.29."""
    u = beta * scores.difference
    return -(1 - flip_rate) * F.logsigmoid(u) - flip_rate * F.logsigmoid(-u)


def robust(scores: Scores, *, beta: Beta, flip_rate: float = 0.1) -> Tensor:
    """Robust DPO (Chowdhury et al. 2403.00409): [-(1 - e) s(beta h) + e s(-beta h)] / (1 - 2 e), e < 1/2."""
    if not 0 <= flip_rate < 0.5:
        raise ValueError(f"flip_rate is {flip_rate}; it must lie in [0, 0.5): at one half labels say nothing")
    u = beta * scores.difference
    return (-(1 - flip_rate) * F.logsigmoid(u) + flip_rate * F.logsigmoid(-u)) / (1 - 2 * flip_rate)


def hinge(scores: Scores, *, beta: Beta) -> Tensor:
    """Hinge (SLiC, Zhao et al. 2305.10425): max(0, 1 - beta h)."""
    return F.relu(1 - beta * scores.difference)


def ipo(scores: Scores, *, beta: Beta, average: bool = True) -> Tensor:
    """IPO (Azar et al. 2310.12036, equation 17): (h - 1 / (2 beta))^2.

    Args:
        average: D per token, as the authors confirmed to TRL; False is D of the whole answer (MM-RLHF, VL-RLHF).
    """
    h = _averaged(scores) if average else scores.difference
    return (h - 1 / (2 * beta)).square()


def _averaged(scores: Scores) -> Tensor:
    chosen, rejected = scores.chosen, scores.rejected
    return _norm(chosen, chosen.ratio) - _norm(rejected, rejected.ratio)


def dpo_norm(scores: Scores, *, beta: Beta) -> Tensor:
    """Length-normalised DPO (as in Tulu 3, 2411.15124): -s(beta (D-bar_w - D-bar_l)). TRL: sigmoid_norm."""
    return -F.logsigmoid(beta * _averaged(scores))


def f_dpo(scores: Scores, *, beta: Beta, divergence: str = "js", alpha: float = 0.5) -> Tensor:
    """f-divergence DPO (Wang et al. 2309.16240): -s(beta [f'(u_w) - f'(u_l)]), u = e^D.

        reverse_kl D      forward_kl 1 - e^-D      js log 2 + s(D)      alpha (e^((a - 1) D) - 1) / (a - 1)

    up to constants, which cancel. At `alpha` 1 the last is the first; 0 is forward KL. Exponents stop at 80.
    """

    def slope(ratio: Tensor) -> Tensor:
        if divergence == "forward_kl":
            return 1 - torch.exp((-ratio).clamp(max=_LARGEST))
        if divergence == "js":
            return math.log(2) + F.logsigmoid(ratio)
        if divergence == "alpha" and abs(alpha - 1) > 1e-6:
            return (torch.exp(((alpha - 1) * ratio).clamp(max=_LARGEST)) - 1) / (alpha - 1)
        return ratio

    return -F.logsigmoid(beta * (slope(scores.chosen.ratio) - slope(scores.rejected.ratio)))


def jpo(scores: Scores, *, beta: Beta) -> Tensor:
    """JPO (Bansal et al. 2404.00530): DPO of (prompt, answer) pairs whose prompts differ.

    Every chosen answer against the rejected ones of the batch's other rows, averaged; its own in a batch of one.
    It takes each chosen answer to be better than each rejected one, whatever was asked.
    """
    difference = scores.chosen.ratio[:, None] - scores.rejected.ratio[None]
    own = beta[:, None] if isinstance(beta, Tensor) and beta.ndim else beta
    each = -F.logsigmoid(own * difference)
    if len(each) == 1:
        return each[:, 0]
    others = 1 - torch.eye(len(each), device=each.device)
    return (each * others).sum(1) / others.sum(1)


# -------------------------------------------------------------------------------------------- two sides by themselves
def bco_pair(scores: Scores, *, beta: Beta, shift: Tensor | float = 0.0) -> Tensor:
    """BCO on pairs (Jung et al. 2404.04656): -s(beta D_w - delta) - s(-(beta D_l - delta)).

    Args:
        shift: delta, the running mean of rewards; TRL 1.16's bco_pair has none.
    """
    return -F.logsigmoid(beta * scores.chosen.ratio - shift) - F.logsigmoid(-(beta * scores.rejected.ratio - shift))


def sppo_hard(scores: Scores, *, beta: Beta) -> Tensor:
    """SPPO (Wu et al. 2405.00675, equation 4.7), the winner surely better: (D_w - 1/2beta)^2 + (D_l + 1/2beta)^2."""
    target = 0.5 / beta
    return (scores.chosen.ratio - target).square() + (scores.rejected.ratio + target).square()


def nca_pair(scores: Scores, *, beta: Beta) -> Tensor:
    """NCA (Chen et al. 2402.05369): -s(r_w) - s(-r_w) / 2 - s(-r_l) / 2, r = beta D."""
    chosen, rejected = beta * scores.chosen.ratio, beta * scores.rejected.ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def exo_pair(scores: Scores, *, beta: Beta, flip_rate: float = 1e-3) -> Tensor:
    """EXO (Ji et al. 2402.00856, equation 16): KL(softmax(beta D) || (1 - e, e)), e = `flip_rate` > 0."""
    u = beta * scores.difference
    better = torch.sigmoid(u) * (F.logsigmoid(u) - math.log1p(-flip_rate))
    return better + torch.sigmoid(-u) * (F.logsigmoid(-u) - math.log(flip_rate))


def apo_zero(scores: Scores, *, beta: Beta) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2408.06266, equation 7): 1 - sigmoid(beta D_w) + sigmoid(beta D_l)."""
    return 1 - torch.sigmoid(beta * scores.chosen.ratio) + torch.sigmoid(beta * scores.rejected.ratio)


def apo_down(scores: Scores, *, beta: Beta) -> Tensor:
    """APO-down (2408.06266, equation 8): sigmoid(beta D_w) + 1 - sigmoid(beta h)."""
    return torch.sigmoid(beta * scores.chosen.ratio) + 1 - torch.sigmoid(beta * scores.difference)


def discopop(scores: Scores, *, beta: Beta, tau: float = 0.05) -> Tensor:
    """DiscoPOP (Lu et al. 2406.08414, equation 5): -s(u) (1 - m) + e^-u m, u = beta h, m = sigmoid(u / tau)."""
    u = beta * scores.difference
    mixed = torch.sigmoid(u / tau)
    return -F.logsigmoid(u) * (1 - mixed) + torch.exp((-u).clamp(max=_LARGEST)) * mixed


# ------------------------------------------------------------------------------------------------- sorted over a batch
def aot(scores: Scores, *, beta: Beta, flip_rate: float = 0.0) -> Tensor:
    """AOT on pairs (Melnyk et al. 2406.05882): policy and reference differences, each sorted over the batch."""
    chosen, rejected = scores.chosen, scores.rejected
    assert chosen.reference is not None
    assert rejected.reference is not None
    policy = (chosen.policy - rejected.policy).sort().values
    return _sorted(policy - (chosen.reference - rejected.reference).sort().values, beta, flip_rate)


def aot_unpaired(scores: Scores, *, beta: Beta, flip_rate: float = 0.0) -> Tensor:
    """AOT unpaired (2406.05882): log-ratios of chosen and of rejected answers, each sorted over the batch."""
    return _sorted(scores.chosen.ratio.sort().values - scores.rejected.ratio.sort().values, beta, flip_rate)


def _sorted(delta: Tensor, beta: Beta, flip_rate: float) -> Tensor:
    u = beta * delta
    return -(1 - flip_rate) * F.logsigmoid(u) - flip_rate * F.logsigmoid(-u)


# ------------------------------------------------------------------------------------------------------- no reference
def orpo(scores: Scores, *, beta: Beta) -> Tensor:
    """ORPO (Hong et al. 2403.07691): -lp-bar_w - beta s(log odds_w - log odds_l), odds = p / (1 - p), p = e^lp-bar."""
    chosen, rejected = scores.chosen, scores.rejected
    own, others = _norm(chosen, chosen.policy), _norm(rejected, rejected.policy)
    odds = (own - others) - (_log1mexp(own) - _log1mexp(others))
    return -own - beta * F.logsigmoid(odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, exact at both ends; x from -1e-6 on counts as -1e-6."""
    x = x.clamp(max=-1e-6)
    near = x > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def simpo(scores: Scores, *, beta: Beta, gamma: float = 0.5) -> Tensor:
    """SimPO (Meng et al. 2405.14734): -s(beta (lp-bar_w - lp-bar_l) - gamma)."""
    chosen, rejected = scores.chosen, scores.rejected
    return -F.logsigmoid(beta * (_norm(chosen, chosen.policy) - _norm(rejected, rejected.policy)) - gamma)


def sft(scores: Scores, *, beta: Beta) -> Tensor:
    """Cross-entropy of the chosen answers, the mean over all tokens of the batch (TRL: sft), for each row alike; beta
    has no part."""
    assert scores.nll is not None
    return scores.nll.expand(len(scores.chosen.policy))


# ------------------------------------------------------------------------------------------------------------ unpaired
def kto(scores: Scores, *, beta: Beta, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """KTO (Ethayarajh et al. 2402.01306): 1 - sigmoid(beta (D - z)) of good answers, 1 - sigmoid(beta (z - D)) of bad.

    z is the drift of the policy from the reference on answers to other prompts, not below 0 (`Scores.drift`). Of pairs
    the chosen answer is good and the rejected bad, and a row's loss is the mean of the two.
    """
    drift = torch.zeros(()) if scores.drift is None else scores.drift
    drift = drift.detach().to(scores.chosen.policy).clamp(min=0)

    def good(ratio: Tensor) -> Tensor:
        return desirable_weight * (1 - torch.sigmoid(beta * (ratio - drift)))

    def bad(ratio: Tensor) -> Tensor:
        return undesirable_weight * (1 - torch.sigmoid(beta * (drift - ratio)))

    if scores.other is not None:
        return (good(scores.chosen.ratio) + bad(scores.other.ratio)) / 2
    assert scores.label is not None
    return torch.where(scores.label > 0.5, good(scores.chosen.ratio), bad(scores.chosen.ratio))


# ------------------------------------------------------------------------------------------------------------- images
def image_dpo(scores: Scores, *, beta: Beta) -> Tensor:
    """mDPO's conditional preference (Wang et al. 2406.11839): -s(beta [D(y_w | m) - D(y_w | m_neg)])."""
    return -F.logsigmoid(beta * (scores.chosen.ratio - scores.chosen.blind_ratio))


def anchor(scores: Scores, *, beta: Beta, delta: float = 0.0) -> Tensor:
    """mDPO's anchor (2406.11839): -s(beta D(y_w) - delta), so that the chosen answer does not sink too."""
    return -F.logsigmoid(beta * scores.chosen.ratio - delta)


def chip(scores: Scores, *, beta: Beta, token_beta: float = 0.1) -> Tensor:
    """CHiP (Fu et al. 2501.16629, its code): one log sigmoid over responses, images and tokens.

    -s(beta [h + D_w - D_w(m_neg) - token_beta (KL_l - stop(KL_w))]),   KL = sum over tokens of KL(ref || policy)
    """
    chosen, rejected = scores.chosen, scores.rejected
    assert chosen.kl is not None
    assert rejected.kl is not None
    tokens = rejected.kl - chosen.kl.detach()
    return -F.logsigmoid(beta * (scores.difference + chosen.ratio - chosen.blind_ratio - token_beta * tokens))


# ------------------------------------------------------------------------------------------------------------- tokens
def tdpo(scores: Scores, *, beta: Beta, alpha: float = 0.5, both: bool = False) -> Tensor:
    """TDPO (Zeng et al. 2404.11999): -s(beta [h - alpha (KL_l - stop(KL_w))]), KL the sum over tokens as in CHiP.

    Args:
        both: without the stop; with alpha 1 that is TDPO1, and with masks SparsePO's loss (2410.05102).
    """
    chosen, rejected = scores.chosen.kl, scores.rejected.kl
    assert chosen is not None
    assert rejected is not None
    tokens = rejected - (chosen if both else chosen.detach())
    return -F.logsigmoid(beta * (scores.difference - alpha * tokens))


def t_reg(scores: Scores, *, beta: Beta) -> Tensor:
    """T-REG's regulariser (Zhou et al. 2412.02685): -s'(h) beta sum over both answers' tokens of r_t log pi(y_t).

    s'(h) = sigmoid(-beta h), without gradients, is the weight that DPO's own gradient has. r_t = sigmoid(log p(y_t |
    better) - log p(y_t | worse)) - 1/2 of the reference, asked for a better and for a worse answer.
    """
    chosen, rejected = scores.chosen.rewarded, scores.rejected.rewarded
    assert chosen is not None
    assert rejected is not None
    return -torch.sigmoid(-beta * scores.difference).detach() * beta * (chosen + rejected)


# ------------------------------------------------------------------------------------------------------------- safety
def safe_dpo(scores: Scores, *, beta: Beta, multiplier: Tensor | float = 1.0) -> Tensor:
    """Helpful and safe labels with a Lagrange multiplier: [-s(beta h) + lambda -s(beta h')] / (1 + lambda).

    h' is h with its sign turned where the rejected answer is the safer one; where neither is, the second term is left
    out. Safe RLHF-V (Ji et al. 2503.17682) is PPO with a reward and a cost model; this is its Lagrangian with both
    replaced by the implicit rewards of preferences, which no paper that we know has measured.
    """
    assert scores.safer is not None
    helpful = -F.logsigmoid(beta * scores.difference)
    safe = -F.logsigmoid(beta * scores.difference * scores.safer) * (scores.safer != 0)
    weight = multiplier * (scores.safer != 0)
    return (helpful + weight * safe) / (1 + weight)


def multiplier_step(log_multiplier: Tensor, violation: Tensor, *, budget: float, rate: float) -> Tensor:
    """One step of dual ascent: log lambda + rate (violation - budget), kept within [-10, 5].

    Args:
        violation: share of pairs whose unsafe answer the policy prefers, in [0, 1].
        budget: share that is put up with.
    """
    return (log_multiplier + rate * (violation - budget)).clamp(-10.0, 5.0)
