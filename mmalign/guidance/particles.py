"""Particles: many samples at once, of which those that promise more reward are continued and the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmalign.guidance import clouds
from mmalign.guidance.clouds import Cloud
from mmalign.guidance.denoising import Bar, Denoising, Outcome, candidate_seed
from mmalign.guidance.rewards import Rewards
from mmalign.jobs_guidance import Particles


def particles(denoising: Denoising, rewards: Rewards, settings: Particles, bar: Bar) -> Outcome:
    """Feynman-Kac steering (2501.06848), or tempered SMC (DAS, 2501.05803), with n particles for each request.

    Particles take stochastic steps (`Denoising.stochastic_step`, eta), are weighed by their estimates' rewards at
    the steps that `looks` names, and are resampled where few carry the weight. At the end one is kept: the best, or one
    drawn by weight, which is a draw from the target as n grows.

    Costs n times the network calls of plain sampling, and n decodes and rewards at each look.
    """
    n, count = settings.n, len(denoising.prompts)
    seeds = [candidate_seed(seed, k) for seed in denoising.seeds for k in range(n)]
    generators = [denoising.generator(row, "steps", k) for row in range(count) for k in range(n)]
    resampling = [denoising.generator(row, "resampling") for row in range(count)]
    latents, cloud = denoising.draw(seeds), Cloud.even(count, n)
    seen, events = looks(denoising.steps, settings.every, settings.start, settings.stop), [0] * count
    heat = clouds.temperatures(denoising.steps, settings.gamma)
    for i in range(denoising.steps):
        prediction, gradient = _asked(denoising, rewards, latents, i, settings.gradient)
        if i in seen:
            with torch.no_grad():
                reward = denoising.reward(rewards, denoising.estimate(latents, prediction, i)).reshape(count, n)
            cloud = clouds.weighed(cloud, _log_g(cloud, reward, settings, heat[i], False), reward)
            uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in resampling])
            cloud, parents = clouds.resampled(cloud, uniform, settings.threshold)
            events = [e + int(not torch.equal(p, torch.arange(n))) for e, p in zip(events, parents, strict=True)]
            order = _flat(parents).to(latents.device)
            latents, prediction = latents[order], prediction[order]
            gradient = None if gradient is None else gradient[order]
            bar((i + 1) / denoising.steps, reward.amax(1).mean().item())
        with torch.no_grad():
            latents, mean, std = denoising.stochastic_step(latents, prediction, i, generators, settings.eta)
            if gradient is not None:
                push = std.square() * heat[i + 1] * settings.strength * gradient
                latents = denoising.checked(latents + push, i)
                shift = clouds.correction(latents, mean, std, push).reshape(count, n)
                cloud = replace(cloud, log_weights=cloud.log_weights + shift)
    reward = denoising.reward(rewards, latents).reshape(count, n)
    cloud = clouds.weighed(cloud, _log_g(cloud, reward, settings, 1.0, True), reward)
    bar(1.0, reward.amax(1).mean().item())
    kept = _kept(cloud, resampling, settings)
    records = [_record(cloud, row, place, events[row]) for row, place in enumerate(kept)]
    return Outcome(latents[[row * n + place for row, place in enumerate(kept)]], records)


def looks(steps: int, every: int, start: float, stop: float) -> set[int]:
    """The steps before which particles are weighed: each `every`-th but the first, within [start, stop] of them all."""
    return {i for i in range(1, steps) if i % every == 0 and start <= i / steps <= stop}


def _asked(
    denoising: Denoising, rewards: Rewards, latents: Tensor, i: int, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The prediction, and the gradient of the estimate's reward with respect to the latents where it is asked for."""
    if not gradient:
        with torch.no_grad():
            return denoising.predict(latents, i), None
    latents = latents.detach().requires_grad_(True)
    with torch.enable_grad():
        prediction = denoising.predict(latents, i)
        rows = denoising.rows(len(latents))
        pixels = denoising.pixels(denoising.estimate(latents, prediction, i), rows)
        reward = rewards.tensor(pixels, [denoising.prompts[row] for row in rows], rows)
        (found,) = torch.autograd.grad(reward.sum(), latents)
    return prediction.detach(), found


def _log_g(cloud: Cloud, reward: Tensor, settings: Particles, temperature: float, final: bool) -> Tensor:
    if settings.method == "smc":
        return clouds.tempered(cloud, reward, settings.strength, temperature)
    return clouds.potential(cloud, reward, settings.strength, settings.potential, final)


def _flat(parents: Tensor) -> Tensor:
    """Parents [B, K] as places in the flat list of all particles."""
    return (parents + parents.shape[1] * torch.arange(len(parents))[:, None]).flatten()


def _kept(cloud: Cloud, generators: Sequence[torch.Generator], settings: Particles) -> list[int]:
    if settings.choose == "best":
        return [int(place) for place in cloud.last.masked_fill(torch.isneginf(cloud.log_weights), -torch.inf).argmax(1)]
    return [
        int(torch.multinomial(share, 1, generator=generator))
        for share, generator in zip(cloud.shares, generators, strict=True)
    ]


def _record(cloud: Cloud, row: int, place: int, resamplings: int) -> dict[str, Any]:
    return {
        "particle": place, "rewards": cloud.last[row].tolist(), "weights": cloud.shares[row].tolist(),
        "effective_size": clouds.effective_size(cloud)[row].item(), "resamplings": resamplings,
        "log_normaliser": cloud.normaliser[row].item(),
    }  # fmt: skip
