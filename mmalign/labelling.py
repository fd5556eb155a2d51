"""From the scores of k pictures of one prompt to a ranking and to pairs: wins, phi, strength, disagreement, choice.

Everything is a pure function of numbers, in numpy alone. Throughout, `scores` are [k, r]: k pictures, r rewards, higher
is better, finite; `weights` are [r], not negative, one of them positive. A *pair* (i, j) has i < j, and its *signs* are
+1, 0 or -1 per reward: i is better, neither, j is better. Only the order of a reward's scores counts, never their size,
so that rewards of different units can vote together, and multiplying one by a positive number changes nothing.

Sources: phi is that of Syn-Pic (RankDPO, 2410.18013), but that a tie is half a win for each side, where the paper's
formula counts it as a loss for both; so phi adds up to k / 2 and is 1/2 throughout where nothing is preferred. tau-b is
Kendall's, "The treatment of ties in ranking problems", Biometrika 33 (1945).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Signs = npt.NDArray[np.int8]
Select = Literal["best_worst", "all", "top_bottom", "margin"]
_PLACES = 12  # sums of weights in another order differ in the last bits, and equal counts have to stay ties


@functools.lru_cache(maxsize=64)
def pair_index(k: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """First and second members of the k(k-1)/2 pairs of k pictures, each [P], in the order of `itertools`."""
    first, second = np.triu_indices(k, 1)
    for index in (first, second):
        index.flags.writeable = False  # everybody gets the same arrays
    return first, second


def signs(scores: npt.ArrayLike) -> Signs:
    """Who wins each pair by each reward: +1 the first, 0 neither, -1 the second; int8 [P, r].

    Raises ValueError for scores that are not [k >= 2, r >= 1] or not finite.
    """
    values = _scores(scores)
    first, second = pair_index(len(values))
    # Not the sign of a difference, which is nan for two equal infinities and 0 for tiny ones that underflow.
    above, below = values[first] > values[second], values[first] < values[second]
    return above.astype(np.int8) - below.astype(np.int8)


def wins(scores: npt.ArrayLike) -> Floats:
    """How many of the other k - 1 pictures each picture beats by each reward, a tie being half a win: [k, r]."""
    values = _scores(scores)
    above = (values[:, None] > values[None]).sum(1)
    level = (values[:, None] == values[None]).sum(1) - 1
    return above + level / 2


def phi(scores: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> Floats:
    """Weighted share of comparisons won, in [0, 1], of each picture: [k]; they add up to k / 2.

    phi_i = sum_r w_r wins_ir / ((k - 1) sum_r w_r). With one reward and no ties it is the normalised rank,
    (rank from below) / (k - 1).
    """
    won = wins(scores)
    weight = checked_weights(weights, won.shape[1])
    shares: Floats = np.round(won @ weight / (len(won) - 1), _PLACES)
    return shares


def vote(pair_signs: Signs, weights: npt.ArrayLike | None = None) -> Floats:
    """The rewards' vote on each pair: weighted shares for the first, for neither, for the second; [P, 3], sum 1."""
    weight = checked_weights(weights, pair_signs.shape[1])
    return np.stack([np.round((pair_signs == side) @ weight, _PLACES) for side in (1, 0, -1)], axis=1)


def strength(shares: Floats, direction: npt.ArrayLike) -> Floats:
    """How much of the vote is for the side that is taken as better, a "neither" being half a vote: [P] in [0, 1].

    `direction` [P] is positive where the first is taken as better, negative for the second, and 0 for a tie, whose
    strength is 1/2. Below 1/2 the pair's own vote is against the direction, as can happen where that comes from phi,
    which is decided by the whole list.
    """
    for_first = shares[:, 0] + shares[:, 1] / 2
    side = np.sign(np.asarray(direction, dtype=np.float64))
    return 0.5 + side * (for_first - 0.5)


def disagreement(shares: Floats) -> Floats:
    """Expected disagreement of two voters drawn by weight, with replacement: [P] in [0, 1/2].

    With answers first = 1, neither = 1/2, second = 0 it is E|x - y| = 2 p_A p_B + p_same (p_A + p_B): 1/2 where the
    rewards are split in two halves, 0 where they are of one mind, be it that the pair is a tie. (The entropy of the
    vote would call "a tie or A" as unclear as "B or A".)
    """
    a, same, b = shares.T
    return 2 * a * b + same * (a + b)


def tau_b(pair_signs: Signs) -> Floats:
    """Kendall's tau-b between each two rewards over the pairs of one list: [r, r] in [-1, 1].

    NaN where one of the two rewards ties all pairs, since there is no order to agree with.
    """
    s = pair_signs.astype(np.float64)
    together = s.T @ s
    decided = np.diag(together)
    with np.errstate(invalid="ignore", divide="ignore"):
        tau: Floats = together / np.sqrt(np.outer(decided, decided))
    return np.clip(tau, -1, 1)


def list_agreement(tau: Floats, weights: npt.ArrayLike | None = None) -> float:
    """Mean tau-b over the pairs of rewards with positive weight; NaN where none of them is defined."""
    used = np.flatnonzero(checked_weights(weights, len(tau)) > 0)
    first, second = pair_index(len(used))
    values = tau[used[first], used[second]]
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def choose(
    ranking: npt.ArrayLike,
    select: Select,
    *,
    count: int | None = None,
    min_margin: float = 0.0,
    ties: Literal["keep", "drop"] = "keep",
) -> list[tuple[int, int]]:
    """The pairs (i, j), i < j, to make of a list, in the order in which they stand in it.

    Args:
        ranking: [k] finite, higher is better: phi, or one reward.
        select: best_worst: the best with the worst. all: every pair. top_bottom: each of the `count` best with each of
            the `count` worst, at most half of the list at either end. margin: the `count` pairs (None: all) that
            are furthest apart.
        count: see above; 1 for top_bottom if None.
        min_margin: leave out pairs that are less than this apart.
        ties: whether `all` and `margin` keep pairs that are level. The other two never pair what is level, since then
            neither is best nor worst.

    Where places are level, the picture that stands first in the list takes the better one.
    """
    values = np.asarray(ranking, dtype=np.float64)
    order = np.argsort(-values, kind="stable")
    k = len(values)
    if select in ("best_worst", "top_bottom"):
        n = 1 if select == "best_worst" else min(count or 1, k // 2)
        found = [(int(i), int(j)) for i in order[:n] for j in order[k - n :] if values[i] > values[j]]
    else:
        found = [(int(i), int(j)) for i, j in zip(*pair_index(k), strict=True)]
        found = [pair for pair in found if ties == "keep" or values[pair[0]] != values[pair[1]]]
    apart = {pair: round(abs(float(values[pair[0]] - values[pair[1]])), _PLACES) for pair in found}
    found = [pair for pair in found if apart[pair] >= min_margin]
    if select == "margin" and count is not None:
        found = sorted(found, key=lambda pair: (-apart[pair], pair))[:count]
    return sorted((min(pair), max(pair)) for pair in found)


def checked_weights(weights: npt.ArrayLike | None, r: int) -> Floats:
    """Weights [r] that add up to 1; equal ones for None.

    Raises ValueError for another number of weights, negative ones, or only zeros.
    """
    values = np.ones(r) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.shape != (r,):
        raise ValueError(f"there are {r} rewards and {values.size} weights; give each reward one")
    if not np.isfinite(values).all() or (values < 0).any() or values.sum() == 0:
        raise ValueError(f"the weights {values.tolist()} must be finite, not negative, and one of them above 0")
    normal: Floats = values / values.sum()
    return normal


def _scores(scores: npt.ArrayLike | Sequence[Sequence[float]]) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 2 or values.shape[1] < 1:
        raise ValueError(
            f"scores must be [pictures, rewards] of two pictures or more, got shape {list(values.shape)}; "
            "one picture alone cannot be ranked"
        )
    if not np.isfinite(values).all():
        raise ValueError("scores hold NaN or infinity; leave pictures out that could not be scored, and count them")
    return values
