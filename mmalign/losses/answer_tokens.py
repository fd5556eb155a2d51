"""From tokens to sequences: which tokens of an answer count how much, and where two answers differ.

Each transform takes `Pairs` [B, T] and returns `Scores` [B].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

import torch
from torch import Tensor

from mmalign.losses.answers import Pairs, Score, Scores, Side

Weights = Callable[[Side, Side | None], Tensor]


def plain(pairs: Pairs) -> Scores:
    """log pi(y|x) = sum of log p over the answer's tokens."""
    return _scores(pairs, lambda side, other: side.mask.float())


def mean(pairs: Pairs) -> Scores:
    """The mean over the answer's tokens instead of the sum, for policy and reference alike."""
    return _scores(pairs, lambda side, other: side.mask.float() / side.length[:, None])


def segments(pairs: Pairs, *, gamma: float = 5.0, normalise: bool = True) -> Scores:
    """RLHF-V's dense scoring (Yu et al. 2312.00849): corrected segments count gamma times.

        log pi(y|x) = (1/N) [sum_{unchanged} log p + gamma sum_{changed} log p],   N = |unchanged| + gamma |changed|

    Args:
        normalise: by N, as the paper has it; False is the released recipe, which sums (with gamma 1.1 and beta 0.1
            instead of the paper's 5 and 0.5).
    """

    def weights(side: Side, other: Side | None) -> Tensor:
        assert side.changed is not None
        weight = side.mask * (1 + (gamma - 1) * side.changed.float())
        return weight / weight.sum(1, keepdim=True).clamp(min=1e-6) if normalise else weight

    return _scores(pairs, weights)


def changed_only(pairs: Pairs) -> Scores:
    """VL-RLHF's form of dense DPO: tokens that both answers share count nothing."""
    return _scores(pairs, lambda side, other: (side.mask & _given(side.changed)).float())


def ld(pairs: Pairs, *, alpha: float = 0.5) -> Scores:
    """LD-DPO (Liu et al. 2409.06411): tokens beyond the shorter answer's length count alpha; 1 is DPO."""

    def weights(side: Side, other: Side | None) -> Tensor:
        assert other is not None
        place = side.mask.cumsum(1)
        shared = torch.minimum(side.length, other.length)[:, None]
        return side.mask * torch.where(place <= shared, 1.0, alpha)

    return _scores(pairs, weights)


def guided(pairs: Pairs, *, alpha: float = 0.5) -> Scores:
    """TGDPO (Zhu et al. 2506.14574, its code): weights 1 + alpha r of chosen and 1 - alpha r of rejected tokens, with
    r = beta log pi_guide / pi_ref of each token under a model that was aligned before; alpha 0 is DPO."""

    def weights(side: Side, other: Side | None) -> Tensor:
        sign = 1.0 if side is pairs.chosen else -1.0
        return side.mask * (1 + sign * alpha * _given(side.rewards).float())

    return _scores(pairs, weights)


def sparse(pairs: Pairs) -> Scores:
    """SparsePO (Christopoulou et al. 2410.05102, its code): log-ratios and KLs of tokens count m_t and k_t, from masks
    of the reference's hidden states."""
    return _scores(pairs, lambda side, other: side.mask * _given(side.sparse).float())


def _scores(pairs: Pairs, weights: Weights) -> Scores:
    chosen = _score(pairs.chosen, pairs.rejected, weights)
    other = None if pairs.rejected is None else _score(pairs.rejected, pairs.chosen, weights)
    mask = pairs.chosen.mask
    nll = -(pairs.chosen.policy * mask).sum() / mask.sum().clamp(min=1)
    return Scores(chosen, other, label=pairs.label, drift=pairs.drift, safer=pairs.safer, nll=nll)


def _score(side: Side, other: Side | None, weights: Weights) -> Score:
    weight = weights(side, other)
    tokens = {"policy": side.policy, "reference": side.reference, "blind": side.blind}
    tokens |= {"blind_reference": side.blind_reference}
    summed = {name: None if value is None else (value.float() * weight).sum(1) for name, value in tokens.items()}
    counted = side.mask if side.sparse_kl is None else side.mask * side.sparse_kl.float()
    kl = None if side.kl is None else (side.kl.float() * counted).sum(1)
    rewarded = None if side.rewards is None else (side.policy.float() * side.rewards.float() * side.mask).sum(1)
    policy = summed.pop("policy")
    assert policy is not None
    return Score(policy=policy, length=side.length, kl=kl, rewarded=rewarded, **summed)


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def changed_tokens(
    one: Sequence[int], other: Sequence[int], *, min_block: int = 3, both_sides: bool = False
) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    """Which tokens of two answers are not common to both: a mark for each token of each.

    Args:
        one, other: token ids without padding (a diff of padded ids depends on the batch).
        min_block: runs of common tokens shorter than this count as changed, since single words recur by chance.
        both_sides: a span counts only where both answers have tokens in it, as in RLHF-V's released code; so what one
            of them adds or leaves out does not count.
    """
    blocks = SequenceMatcher(None, one, other, autojunk=False).get_matching_blocks()
    kept = [block for block in blocks if block.size >= min_block]
    marks = ([True] * len(one), [True] * len(other))
    start = (0, 0)
    for block in [*kept, None]:
        stop = (len(one), len(other)) if block is None else (block.a, block.b)
        if both_sides and (start[0] == stop[0] or start[1] == stop[1]):
            for mark, a, b in zip(marks, start, stop, strict=True):
                mark[a:b] = [False] * (b - a)
        if block is not None:
            for mark, a in zip(marks, (block.a, block.b), strict=True):
                mark[a : a + block.size] = [False] * block.size
            start = (block.a + block.size, block.b + block.size)
    return tuple(marks[0]), tuple(marks[1])
