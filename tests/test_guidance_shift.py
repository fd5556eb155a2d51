"""What a shift of the score does: against tilted Gaussians, whose velocity, mean and variance are known exactly."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from mmalign.guidance.shift import relative, shifted
from mmalign.noise import Process

ABAR = (1 - torch.linspace(1e-4, 0.03, 400, dtype=torch.float64)).cumprod(0)
PROCESSES = {"eps": Process("eps", ABAR), "v": Process("v", ABAR), "flow": Process("flow")}
kinds = pytest.mark.parametrize("kind", list(PROCESSES))
Kind = Literal["linear", "quadratic"]


@dataclass
class World:
    """x_0 ~ N(mu, s2 I) in D dimensions; r = a . x_0 or -|x_0 - b|^2 k / 2; everything in closed form, float64."""

    mu: Tensor
    s2: float
    way: Tensor
    k: float
    reward: Kind

    def tilted(self, w: float) -> tuple[Tensor, float]:
        """Mean and variance of p(x_0) exp(w r(x_0)), normalised."""
        if self.reward == "linear":
            return self.mu + w * self.s2 * self.way, self.s2
        precision = 1 / self.s2 + w * self.k
        return (self.mu / self.s2 + w * self.k * self.way) / precision, 1 / precision

    def noisy_reward(self, x: Tensor, a: float, s: float, w: float) -> Tensor:
        """R(x_t) = log E[exp(w r(x_0)) | x_t], [B] of [B, D]: x_0 | x_t is N(m, c) with c = s2 s^2 / (a^2 s2 + s^2)."""
        total = a**2 * self.s2 + s**2
        m, c = self.mu + a * self.s2 / total * (x - a * self.mu), self.s2 * s**2 / total
        if self.reward == "linear":
            return w * m @ self.way + w**2 * c * self.way.square().sum() / 2
        spread = 1 + w * self.k * c
        return -w * self.k * (m - self.way).square().sum(1) / (2 * spread) - x.shape[1] / 2 * math.log(spread)


def world(reward: Kind) -> World:
    generator = torch.Generator().manual_seed(0)
    mu, way = torch.randn(2, 5, generator=generator, dtype=torch.float64).unbind(0)
    return World(mu, 0.7, way, 1.3, reward)


def scales(kind: str, t: float) -> tuple[float, float]:
    """Signal and noise, not by the code under test."""
    if kind == "flow":
        return 1 - t, t
    abar = ABAR[int(t)].item()
    return math.sqrt(abar), math.sqrt(1 - abar)


def gaussian_prediction(kind: str, x: Tensor, a: float, s: float, mean: Tensor, variance: float) -> Tensor:
    """What a perfect model of N(mean, variance I) predicts at x_t."""
    x0 = mean + a * variance / (a**2 * variance + s**2) * (x - a * mean)
    eps = (x - a * x0) / s
    return {"eps": eps, "flow": eps - x0, "v": a * eps - s * x0}[kind]


def times(kind: str) -> list[float]:
    return [0.02, 0.3, 0.7, 0.97] if kind == "flow" else [3, 60, 180, 390]


@kinds
@pytest.mark.parametrize("reward", ["linear", "quadratic"])
def test_guided_prediction_is_that_of_the_tilted_gaussian(kind: str, reward: Kind) -> None:
    """Model + shift by grad R equals, at every time, the exact prediction of a model of the tilted distribution."""
    known, w = world(reward), 0.8
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for t in times(kind):
        a, s = scales(kind, t)
        noisy = x.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(known.noisy_reward(noisy, a, s, w).sum(), noisy)
        plain = gaussian_prediction(kind, x, a, s, known.mu, known.s2)
        when = torch.full((4,), t, dtype=torch.float64) if kind == "flow" else torch.full((4,), int(t))
        guided = shifted(PROCESSES[kind], plain, when, gradient)
        wanted = gaussian_prediction(kind, x, a, s, *known.tilted(w))
        torch.testing.assert_close(guided, wanted, atol=1e-9, rtol=1e-9)


def test_closed_form_of_the_noisy_reward_by_quadrature() -> None:
    """The closed form that the others stand on, against an integral over x_0 in one dimension."""
    for reward in ("linear", "quadratic"):
        known = World(
            torch.tensor([0.4], dtype=torch.float64), 0.7, torch.tensor([1.2], dtype=torch.float64), 1.3, reward
        )
        a, s, w, x = 0.6, 0.5, 0.8, 0.9
        x0 = torch.linspace(-12, 12, 200001, dtype=torch.float64)
        log = -((x0 - 0.4) ** 2) / 1.4 - (x - a * x0) ** 2 / (2 * s**2)
        value = 1.2 * x0 if reward == "linear" else -1.3 * (x0 - 1.2) ** 2 / 2
        wanted = torch.logsumexp(log + w * value, 0) - torch.logsumexp(log, 0)
        found = known.noisy_reward(torch.tensor([[x]], dtype=torch.float64), a, s, w)
        assert found.item() == pytest.approx(wanted.item(), abs=1e-9)


@kinds
@pytest.mark.parametrize("reward", ["linear", "quadratic"])
def test_sampling_ends_in_the_tilted_gaussian(kind: str, reward: Kind) -> None:
    """The sampler's own steps, guided, carry noise to the tilted mean and variance; twice the steps, half the error.

    Every map is affine in x and the same in each dimension, so two points give the mean and the deviation exactly.
    """
    known, w, process = world(reward), 0.8, PROCESSES[kind]
    mean, variance = known.tilted(w)
    errors = []
    for steps in (100, 200):
        if kind == "flow":
            grid = torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)
        else:
            grid = torch.tensor([round(399 - 399 * i / steps) for i in range(steps)] + [-1])
        a, s = scales(kind, grid[0].item())
        start = a * mean, math.sqrt(a**2 * variance + s**2)  # the marginal of the tilted process where it begins
        x = torch.stack([start[0], start[0] + start[1]])
        for now, to in itertools.pairwise(grid):
            a, s = scales(kind, now.item())
            noisy = x.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(known.noisy_reward(noisy, a, s, w).sum(), noisy)
            plain = gaussian_prediction(kind, x, a, s, known.mu, known.s2)
            guided = shifted(process, plain, now.expand(2), gradient)
            x = process.step(x, guided, now.expand(2), to.expand(2))[0]
        deviation = (x[1] - x[0]).mean().item()
        errors.append((x[0] - mean).abs().max().item() + abs(deviation - math.sqrt(variance)))
    assert errors[0] < 0.03 and errors[1] < 0.65 * errors[0]


@kinds
def test_one_guided_step_raises_the_reward(kind: str) -> None:
    """The sign: against the same step unguided, a . x is larger after one guided one (and smaller with -w)."""
    process, way = PROCESSES[kind], torch.ones(3, 6)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    prediction = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    at, to = (torch.full((3,), t) for t in ((0.6, 0.5) if kind == "flow" else (150, 120)))
    plain = process.step(x, prediction, at, to)
    for sign in (1, -1):
        led = process.step(x, shifted(process, prediction, at, sign * 0.3 * way), at, to)
        for before, after in zip(plain, led, strict=True):  # the new latents, and the estimate of x_0
            assert bool((sign * (after - before).sum(1) > 0).all())


@kinds
def test_all_kinds_shift_the_same_score(kind: str) -> None:
    """eps moves by -s g and x_0 by s^2 g / a, whatever is predicted: what the shift is defined by."""
    process, x = PROCESSES[kind], torch.randn(2, 4, 3, dtype=torch.float64)
    prediction, g = torch.randn(2, 2, 4, 3, dtype=torch.float64).unbind(0)
    for t in times(kind):
        when = torch.full((2,), t, dtype=torch.float64) if kind == "flow" else torch.full((2,), int(t))
        a, s = scales(kind, t)
        x0, eps = process.to_x0_eps(x, prediction, when)
        new_x0, new_eps = process.to_x0_eps(x, shifted(process, prediction, when, g), when)
        torch.testing.assert_close(new_eps - eps, -s * g, atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(new_x0 - x0, s**2 / a * g, atol=1e-7, rtol=1e-7)


def test_the_ratio_is_bounded() -> None:
    """t / (1 - t) counts as max_ratio at most, also where there is no signal at all; below it nothing changes."""
    flow, g, zero = Process("flow"), torch.ones(3, 2), torch.zeros(3, 2)
    t = torch.tensor([0.5, 0.95, 1.0])
    assert shifted(flow, zero, t, g, 4.0)[:, 0].tolist() == pytest.approx([-1.0, -4.0, -4.0])
    assert shifted(flow, zero, t, g)[:, 0].tolist() == pytest.approx([-1.0, -19.0, -math.inf])
    ends = torch.tensor([0.75, 0.0])  # the last timestep of a schedule of zero terminal signal
    for kind, wanted in (("v", [-math.sqrt(1 / 3), -4.0]), ("eps", [-0.5, 0.0])):
        process = Process(kind, ends)
        found = shifted(process, zero[:2], torch.tensor([0, 1]), g[:2], 4.0)
        assert found[:, 0].tolist() == pytest.approx(wanted)
    assert torch.equal(shifted(flow, g, t, zero, 4.0), g)


def test_relative_shift_has_the_length_that_was_asked_for() -> None:
    prediction = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    way = (
        torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-6, 1e3, 0.0])[:, None, None]
    )
    moved = prediction - relative(prediction, way, 0.2)
    sizes = moved.flatten(1).norm(dim=1) / prediction.flatten(1).norm(dim=1)
    assert sizes.tolist() == pytest.approx([0.2, 0.2, 0.0], rel=1e-4)
    for row in (0, 1):
        cosine = torch.cosine_similarity(moved[row].flatten(), way[row].flatten(), dim=0)
        assert cosine.item() == pytest.approx(1.0, abs=1e-5)
    alone = relative(prediction[1:2], way[1:2], 0.2)
    assert torch.equal(alone, relative(prediction, way, 0.2)[1:2])
