"""CREAM (Wang et al. 2410.12735): self-rewarded pairs are believed as far as two rounds' models agree on their order.

Answers to a prompt are ranked by the model that gave them and by that of the round before. Their agreement is Kendall's
tau; C = (tau + 1) / 2, as a mean over prompts. The loss is C DPO(better, worse) + (1 - C) DPO(worse, better), so a row
of each, with these weights, is the whole method.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["agreement", "kendall"]


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-a of two rankings: (concordant - discordant) / pairs; ties are neither, one item gives 0."""
    count = len(one)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    signs = [_sign(one[i] - one[j]) * _sign(other[i] - other[j]) for i, j in pairs]
    return sum(signs) / len(pairs) if pairs else 0.0


def agreement(one: Sequence[float], other: Sequence[float]) -> float:
    """C = (tau + 1) / 2, in [0, 1]."""
    return (kendall(one, other) + 1) / 2


def _sign(value: float) -> int:
    return int(value > 0) - int(value < 0)
