"""Robust choice among many: by the consensus of the weights around the wished ones.

A user wishes a direction of preference: weights over several rewards, say VQ : MQ : TA as 2 : 1 : 1. Nobody means such
weights to the last digit. So weights are drawn around the wished ones, every candidate is ranked under each of them,
and the one is taken on which that neighbourhood agrees best.

Source: robust preference selection (Mao et al., "Robust Preference Alignment via Directional Neighborhood Consensus",
2510.20498) draws one answer of a language model under each of several directions near the wished one, and takes the
answer that scores best under the wished one. There the neighbourhood acts on what is *made*, by a model that is told a
direction. Here the candidates are made without one, and a choice by the wished weights alone would be plain best-of-n;
so the neighbourhood acts on the *choice*, by the rules of `consensus`, which are this project's reading of "consensus"
and not that paper's.

Everything is a pure function, in numpy alone: scores are [n candidates, d axes], higher is better, finite; directions
are [m, d]. Only ratios of weights count.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Rule = Literal["reciprocal_rank", "wins", "worst_regret", "regret"]
Scale = Literal["rank", "deviation", "none"]
_GRID = 8193  # points of the angle's distribution function; its error is then below 1e-6 radians


def cap(wished: npt.ArrayLike, count: int, angle: float, rng: np.random.Generator) -> Floats:
    """Directions drawn uniformly from a cap of the unit sphere: [count, d], at most `angle` degrees from the wished.

    The angle phi to the wished direction has the density sin(phi)^(d - 2) on [0, angle], and the rest is uniform around
    it. A draw that would turn an axis round (a negative weight where the wished one is 0 or more) is drawn again, so
    that more of a reward never counts against a candidate that is wished for it.

    Args:
        wished: [d] weights, d >= 2, not all 0; negative ones ask for less of an axis.
        angle: degrees in [0, 90]; 0 gives the wished direction itself.

    Raises:
        ValueError: other weights or angles, or count < 1.
    """
    centre = _unit(wished)
    if not 0 <= angle <= 90 or count < 1:
        raise ValueError(f"angle is {angle} and count {count}; give an angle from 0 to 90 degrees and a count from 1")
    found = np.empty((0, len(centre)))
    while len(found) < count:
        drawn = _tilted(centre, _angles(2 * count, math.radians(angle), len(centre), rng), rng)
        found = np.concatenate([found, drawn[((drawn >= 0) | (centre < 0)).all(1)]])
    return found[:count]


def dirichlet(wished: npt.ArrayLike, count: int, concentration: float, rng: np.random.Generator) -> Floats:
    """Weights drawn around the wished ones on the simplex: [count, d] that add up to 1, with exactly their mean.

    Dirichlet(concentration * w / sum(w)); the variance of weight i is w_i (1 - w_i) / (concentration + 1). An axis that
    is not wished (0) stays at 0.

    Raises:
        ValueError: a negative weight, only zeros, a concentration that is not above 0, or count < 1.
    """
    weights = np.asarray(wished, dtype=np.float64)
    _unit(weights)
    if (weights < 0).any() or not 0 < concentration < math.inf or count < 1:
        raise ValueError(
            f"wished weights {weights.tolist()}, concentration {concentration}, count {count}: on the simplex weights "
            "are not negative, and concentration and count above 0; use an angle for negative weights"
        )
    drawn = np.zeros((count, len(weights)))
    drawn[:, weights > 0] = rng.dirichlet(concentration * weights[weights > 0] / weights.sum(), size=count)
    return drawn


def scaled(scores: npt.ArrayLike, how: Scale) -> Floats:
    """Scores [n, d] in units that can be added: weights mean nothing between rewards of different units.

    rank: the share of the other candidates that each beats on an axis, a tie being half, in [0, 1]; outliers count no
    more than a first place. deviation: less the mean, over the standard deviation, of these n candidates. none: as they
    are. An axis on which all are level is 0 throughout.
    """
    values = _matrix(scores)
    if how == "none":
        return values
    if how == "rank":
        above = (values[:, None] > values[None]).sum(1) - (values[:, None] < values[None]).sum(1)
        return above / max(1, len(values) - 1) / 2 + np.where(np.ptp(values, axis=0) > 0, 0.5, 0.0)
    spread = values.std(axis=0)
    level = np.ptp(values, axis=0) == 0
    shares: Floats = np.where(level, 0.0, (values - values.mean(axis=0)) / np.where(level, 1.0, spread))
    return shares


def consensus(scores: npt.ArrayLike, directions: npt.ArrayLike, rule: Rule) -> Floats:
    """How far the directions agree on each candidate: [n], higher is better.

    With u_ij = directions_j . scores_i:
        reciprocal_rank: mean over j of 1 / rank of i under j; level candidates share the better place.
        wins: share of the j under which i is best, a tie for the first place being shared out.
        worst_regret: -max over j of (max_k u_kj - u_ij), minimax regret (Savage 1951): how bad the choice can be.
        regret: the same with the mean over j. Utility is linear in the weights, so that this is the order of the mean
            direction, and the plain choice wherever the directions' mean is the wished one.
    """
    values, weights = _matrix(scores), np.asarray(directions, dtype=np.float64)
    if weights.ndim != 2 or weights.shape[1] != values.shape[1] or not len(weights):
        raise ValueError(f"directions have shape {list(weights.shape)} and scores {list(values.shape)}; give [m, d]")
    utility = _weighed(values, weights)
    best = utility.max(axis=0)
    if rule == "reciprocal_rank":
        # rank = 1 + how many are above = n less how many are at most level
        ranks = [len(values) - np.searchsorted(np.sort(column), column, side="right") + 1 for column in utility.T]
        return np.asarray((1 / np.stack(ranks)).mean(axis=0))
    if rule == "wins":
        first = utility == best
        return np.asarray((first / first.sum(axis=0)).mean(axis=1))
    regrets = best - utility
    return np.asarray(-(regrets.max(axis=1) if rule == "worst_regret" else regrets.mean(axis=1)))


def choose(scores: npt.ArrayLike, wished: npt.ArrayLike, directions: npt.ArrayLike, rule: Rule) -> int:
    """The candidate on which the directions agree best; among equals the better one by the wished weights, then the
    first.

    With all directions equal to the wished one this is argmax of scores @ wished under every rule. A candidate that
    another one beats on every axis is never chosen, as long as no weight is negative.
    """
    agreed = consensus(scores, directions, rule)
    plain = _weighed(_matrix(scores), np.asarray(wished, dtype=np.float64)[None])[:, 0]
    level = agreed >= agreed.max() - 1e-12 * max(1.0, abs(float(agreed.max())))  # sums in another order
    return int(np.flatnonzero(level)[np.argmax(plain[level])])


def _weighed(values: Floats, weights: Floats) -> Floats:
    """values @ weights.T, [n, m], each sum in the order of the axes: a matrix product may round equal rows apart."""
    utility = np.zeros((len(values), len(weights)))
    for axis in range(values.shape[1]):
        utility += values[:, axis, None] * weights[None, :, axis]
    return utility


def _unit(wished: npt.ArrayLike) -> Floats:
    weights = np.asarray(wished, dtype=np.float64)
    if weights.ndim != 1 or len(weights) < 2 or not np.isfinite(weights).all() or not weights.any():
        raise ValueError(
            f"wished weights are {weights.tolist()}; a direction needs two axes or more, finite weights, and one that "
            "is not 0"
        )
    return np.asarray(weights / np.linalg.norm(weights))


def _matrix(scores: npt.ArrayLike) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"scores have shape {list(values.shape)} and must be [candidates, axes], finite: leave out candidates that "
            "could not be scored, and count them"
        )
    return values


def _angles(count: int, largest: float, dimensions: int, rng: np.random.Generator) -> Floats:
    """Angles [count] in radians with density sin^(d - 2) on [0, largest], by their distribution function."""
    u = rng.random(count)
    if dimensions == 2 or largest == 0:
        return np.asarray(u * largest)
    # Over sin^(d-1), which is nearly uniform, so that the points lie where the mass is.
    grid = np.arcsin(np.sin(largest) * np.linspace(0, 1, _GRID) ** (1 / (dimensions - 1)))
    density = np.sin(grid) ** (dimensions - 2)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
    return np.asarray(np.interp(u, mass / mass[-1], grid))


def _tilted(centre: Floats, angles: Floats, rng: np.random.Generator) -> Floats:
    """Unit vectors [count, d] at these angles from the centre, uniform around it."""
    tangent = rng.standard_normal((len(angles), len(centre)))
    tangent -= (tangent @ centre)[:, None] * centre
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    return np.asarray(np.cos(angles)[:, None] * centre + np.sin(angles)[:, None] * tangent)
