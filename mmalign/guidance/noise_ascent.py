"""Noise optimisation: the initial noise is moved until what is drawn from it pleases the rewards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmalign.guidance.denoising import Bar, Denoising, Outcome
from mmalign.guidance.rewards import Rewards
from mmalign.jobs_guidance import NoiseOptimisation


def length_likelihood(noise: Tensor) -> Tensor:
    """log density, but for a constant, of the length of D independent unit Gaussians: (D - 1) log |x| - |x|^2 / 2.

    That of a chi distribution (ReNO, 2406.04312, section 3.2): [n] of [n, ...], highest at |x| = sqrt(D - 1).
    """
    flat = noise.flatten(1).float()
    length = flat.norm(dim=1)
    return (flat.shape[1] - 1) * length.clamp(min=1e-12).log() - length.square() / 2


def to_sphere(noise: Tensor, first: Tensor) -> Tensor:
    """Each row of the noise [n, ...] put back to the length that it had at first (DOODL, 2303.13703)."""
    flat = noise.flatten(1)
    length = first.flatten(1).norm(dim=1, keepdim=True)
    return (flat * (length / flat.norm(dim=1, keepdim=True).clamp(min=1e-12))).reshape(noise.shape)


def clipped(gradient: Tensor, limit: float) -> Tensor:
    """Each row's gradient at most `limit` long."""
    length = gradient.flatten(1).norm(dim=1).reshape(-1, *[1] * (gradient.ndim - 1))
    return gradient * (limit / length.clamp(min=1e-12)).clamp(max=1.0)


def noise_ascent(denoising: Denoising, rewards: Rewards, settings: NoiseOptimisation, bar: Bar) -> Outcome:
    """Ascends reward + length term - drift term from each request's own noise; keeps the best picture that it saw.

    Its first picture is that of plain sampling, so the reward never falls. Costs one trajectory for each iteration and
    one more, and as much again or twice for the gradient, which `Costs` counts as reward gradients, not network calls.
    """
    first = denoising.initial()
    noise, velocity = first.clone(), torch.zeros_like(first)
    best, kept = torch.full((len(first),), -torch.inf, dtype=torch.float64), first.clone()
    at, path = [0] * len(first), []
    for number in range(settings.iterations + 1):
        last = number == settings.iterations
        clean, gradient = _climbed(denoising, rewards, settings, noise, first, last)
        reward = denoising.reward(rewards, clean)
        better = reward > best
        best, at = torch.where(better, reward, best), [number if b else a for a, b in zip(at, better, strict=True)]
        kept = torch.where(better.to(kept.device).reshape(-1, *[1] * (kept.ndim - 1)), clean, kept)
        path.append(reward.tolist())
        bar((number + 1) / (settings.iterations + 1), best.mean().item())
        if gradient is not None:
            step = clipped(gradient, settings.max_grad_norm)
            velocity = settings.momentum * velocity + step
            noise = noise + settings.lr * (step + settings.momentum * velocity)
            noise = denoising.checked(to_sphere(noise, first) if settings.method == "doodl" else noise, 0)
    moved = (noise - first).flatten(1).square().mean(1).sqrt().tolist()
    return Outcome(
        kept,
        [
            {"iteration": place, "rewards": [each[row] for each in path], "moved": moved[row]}
            for row, place in enumerate(at)
        ],
    )


def _climbed(
    denoising: Denoising, rewards: Rewards, settings: NoiseOptimisation, noise: Tensor, first: Tensor, last: bool
) -> tuple[Tensor, Tensor | None]:
    """What is drawn from the noise, and the gradient of its objective; none for the last, that is only looked at."""
    if last:
        return denoising.plain(noise), None
    noise = noise.detach().requires_grad_(True)
    with torch.enable_grad():
        clean = drawn(denoising, noise, settings.checkpoint)
        pixels = denoising.pixels(clean)
        aim = rewards.tensor(pixels, denoising.prompts)
        if settings.method == "reno":
            aim = aim + settings.length * length_likelihood(noise)
        aim = aim - settings.drift * (noise - first).flatten(1).square().mean(1)
        (gradient,) = torch.autograd.grad(aim.sum(), noise)
    return clean.detach(), gradient


def drawn(denoising: Denoising, noise: Tensor, remember: bool) -> Tensor:
    """Clean latents by deterministic steps, with a gradient to the noise.

    With `remember` the activations of one step at a time are held, and computed again on the way back: memory does not
    grow with the steps but for their latents, which is what DOODL inverts a sampler for, here without its error.
    """
    latents = noise
    for i in range(denoising.steps):

        def step(before: Tensor, i: int = i) -> Tensor:
            return denoising.step(before, denoising.predict(before, i), i)

        latents = checkpoint(step, latents, use_reentrant=False) if remember else step(latents)
    return latents
