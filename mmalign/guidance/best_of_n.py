"""Best of n: the plainest way to spend computation on a reward, and what every other strategy has to beat."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mmalign.guidance.denoising import Bar, Denoising, Outcome, candidate_seed
from mmalign.guidance.rewards import Rewards
from mmalign.jobs_guidance import BestOfN


def best(rewards: Tensor) -> Tensor:
    """The place of the highest reward in each row, [B] of [B, n]; the first where several are level; NaN never."""
    return torch.where(rewards.isnan(), -torch.inf, rewards).argmax(1)


def _told(bar: Bar, number: int, n: int, share: float) -> None:
    bar((number + share) / n, None)


def best_of_n(denoising: Denoising, rewards: Rewards, settings: BestOfN, bar: Bar) -> Outcome:
    """Draws candidates 0 to n - 1 of each request (`candidate_seed`) and keeps the one with the highest reward.

    Costs n times the network calls of plain sampling. With continuous rewards of n independent draws the expected gain
    is that of the largest of n, which grows as sqrt(2 log n) standard deviations where rewards are Gaussian.
    """
    kept: Tensor | None = None
    found: list[Tensor] = []
    for number in range(settings.n):
        noise = denoising.draw([candidate_seed(seed, number) for seed in denoising.seeds])
        latents = denoising.plain(noise, told=partial(_told, bar, number, settings.n))
        reward = denoising.reward(rewards, latents)
        better = reward > torch.stack(found).amax(0) if found else torch.ones_like(reward, dtype=torch.bool)
        found.append(reward)
        shape = (-1, *[1] * (latents.ndim - 1))
        kept = latents if kept is None else torch.where(better.to(latents.device).reshape(shape), latents, kept)
        bar((number + 1) / settings.n, torch.stack(found).amax(0).mean().item())
    assert kept is not None
    values = torch.stack(found, dim=1)
    places = best(values).tolist()
    records = [
        {
            "candidate": place,
            "seed": candidate_seed(seed, place),
            "candidates": [{"seed": candidate_seed(seed, k), "reward": r} for k, r in enumerate(row)],
        }
        for seed, place, row in zip(denoising.seeds, places, values.tolist(), strict=True)
    ]
    return Outcome(kept, records)
