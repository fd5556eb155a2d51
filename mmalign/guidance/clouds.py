"""Weighted particles: potentials, resampling and the normaliser, apart from what the particles are.

A cloud of K particles for each of B requests approximates a target that is proportional to q(x_0) exp(strength r(x_0)),
where q is what the sampler draws. On the way particles are weighed by potentials of rewards of their x_0 estimates; the
last potential makes the product of all of them exp(strength r(x_0)), whatever the ones before were. So the estimates of
the target and of its normaliser are those of a particle filter, consistent, and of the normaliser unbiased, also where
it is resampled only when the effective sample size is low (Feynman-Kac steering 2501.06848; Del Moral, Doucet and
Jasra, Sequential Monte Carlo samplers, 2006).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Potential = Literal["difference", "max", "sum"]


@dataclass(frozen=True)
class Cloud:
    """What is known of K particles for each of B requests; tensors are float64 [B, K] but for `log_z` [B].

    Attributes:
        log_weights: since the last resampling.
        product: log of all potentials along each particle's line of descent.
        last, highest, total: along it the reward before, the highest and the sum of rewards; 0, -inf and 0 at first.
        log_z: log of the normaliser's estimate up to the last resampling.
    """

    log_weights: Tensor
    product: Tensor
    last: Tensor
    highest: Tensor
    total: Tensor
    log_z: Tensor

    @classmethod
    def even(cls, requests: int, particles: int) -> Cloud:
        """The cloud at the beginning: equal weights, nothing seen."""
        zeros = torch.zeros(requests, particles, dtype=torch.float64)
        return cls(zeros, zeros, zeros, torch.full_like(zeros, -torch.inf), zeros, zeros[:, 0])

    @property
    def normaliser(self) -> Tensor:
        """log of the estimate of E[exp(strength r)] now, [B]."""
        return self.log_z + log_mean(self.log_weights)

    @property
    def shares(self) -> Tensor:
        """Normalised weights [B, K]; equal ones where none is above 0."""
        dead = torch.isneginf(self.log_weights).all(1, keepdim=True)
        return torch.where(dead, 0.0, self.log_weights).softmax(1)


def log_mean(log_weights: Tensor) -> Tensor:
    """log of the mean of exp(log_weights) [..., K] over its last axis."""
    return torch.logsumexp(log_weights, -1) - math.log(log_weights.shape[-1])


def effective_size(cloud: Cloud) -> Tensor:
    """1 / sum of squared normalised weights, [B], from 1 to K."""
    return 1 / cloud.shares.square().sum(1)


def potential(cloud: Cloud, reward: Tensor, strength: float, kind: Potential, final: bool = False) -> Tensor:
    """log G of each particle [B, K] for the rewards that it has now [B, K] (2501.06848, section 3.1).

    difference: strength (r - r before). max: strength times the highest reward so far. sum: strength times the sum of
    rewards so far. final: what makes the product of all potentials exp(strength r), for any kind.
    """
    if final:
        return strength * reward - cloud.product
    if kind == "difference":
        return strength * (reward - cloud.last)
    if kind == "max":
        return strength * torch.maximum(cloud.highest, reward)
    return strength * (cloud.total + reward)


def tempered(cloud: Cloud, reward: Tensor, strength: float, temperature: float) -> Tensor:
    """log of the incremental weight [B, K] of tempered SMC (DAS, 2501.05803): temperature * strength * r over what
    the product of the increments before had come to. With temperature 1 at the end the target is that of `potential`.
    """
    return temperature * strength * reward - cloud.product


def correction(moved: Tensor, mean: Tensor, std: Tensor, push: Tensor) -> Tensor:
    """log N(moved; mean, std) - log N(moved; mean + push, std), summed over all but the first axis: float64 [n].

    What a proposal that was pushed adds to a log weight, so that the target stays. 0 where std is 0: nothing is pushed.
    """
    wide, mean, std, push = (value.double() for value in (moved, mean, std, push))
    inside = -push * (wide - mean - push / 2) / std.square()
    return torch.where(std > 0, inside, 0.0).flatten(1).sum(1).cpu()


def weighed(cloud: Cloud, log_g: Tensor, reward: Tensor) -> Cloud:
    """The cloud after a potential; rewards that are not finite (not scored) count as the least that there can be."""
    log_g = torch.where(reward.isfinite(), log_g, -torch.inf)
    seen = torch.where(reward.isfinite(), reward, 0.0)
    return Cloud(
        cloud.log_weights + log_g, torch.where(log_g.isfinite(), cloud.product + log_g, cloud.product), seen,
        torch.maximum(cloud.highest, seen), cloud.total + seen, cloud.log_z,
    )  # fmt: skip


def systematic(shares: Tensor, uniform: Tensor) -> Tensor:
    """Systematic resampling: K parents [B, K] for normalised weights [B, K] and one uniform number each [B].

    Particle i has floor(K w_i) or one more children; the expected number is K w_i.
    """
    count = shares.shape[1]
    places = (uniform[:, None] + torch.arange(count, dtype=shares.dtype)) / count
    edges = shares.cumsum(1)
    edges = edges / edges[:, -1:]
    return torch.searchsorted(edges, places, right=True).clamp(max=count - 1)


def resampled(cloud: Cloud, uniform: Tensor, threshold: float) -> tuple[Cloud, Tensor]:
    """The cloud after adaptive resampling, and each particle's parent [B, K].

    A request is resampled where its effective sample size is below `threshold` times K; others keep their weights.
    """
    count = cloud.log_weights.shape[1]
    low = effective_size(cloud) < threshold * count
    alive = ~torch.isneginf(cloud.log_weights).all(1)
    low &= alive
    same = torch.arange(count).expand(len(low), -1)
    parents = torch.where(low[:, None], systematic(cloud.shares, uniform), same)

    def taken(values: Tensor) -> Tensor:
        return values.gather(1, parents)

    fresh = torch.where(low[:, None], 0.0, cloud.log_weights)
    log_z = torch.where(low, cloud.normaliser, cloud.log_z)
    moved = Cloud(fresh, taken(cloud.product), taken(cloud.last), taken(cloud.highest), taken(cloud.total), log_z)
    return moved, parents


def temperatures(steps: int, gamma: float) -> list[float]:
    """DAS's schedule [steps + 1]: min(1, (1 + gamma)^k - 1) after k of the steps, 0 before and 1 after the last.

    Particles at step k are weighed at temperature k, and the step from there is pushed at temperature k + 1, that of
    where it leads (2501.05803, section 4).
    """
    return [1.0 if k == steps else min(1.0, (1 + gamma) ** k - 1) for k in range(steps + 1)]
