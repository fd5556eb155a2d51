"""Best of n by the consensus of the weights around the wished ones (`neighbourhood`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mmalign.guidance.denoising import Bar, Denoising, Outcome, candidate_seed
from mmalign.guidance.neighbourhood import Floats, cap, choose, consensus, dirichlet, scaled
from mmalign.guidance.rewards import Rewards
from mmalign.jobs_guidance import Neighbourhood


def robust_choice(denoising: Denoising, rewards: Rewards, settings: Neighbourhood, bar: Bar) -> Outcome:
    """Draws candidates 0 to n - 1 of each request (`candidate_seed`), scores them by every reward, and lets the
    directions around the rewards' weights choose.

    Costs what best of n costs; the choice itself is arithmetic on n times d numbers. A candidate that some reward could
    not score is left out.
    """
    drawn, told = [], []
    weights: list[float] = []
    for number in range(settings.n):
        latents = denoising.plain(denoising.draw([candidate_seed(seed, number) for seed in denoising.seeds]))
        values = []
        with torch.no_grad():
            for start in range(0, len(latents), denoising.batch_size):
                rows = list(range(start, min(start + denoising.batch_size, len(latents))))
                pixels = denoising.pixels(latents[rows[0] : rows[-1] + 1], rows)
                found = rewards.counted(pixels, [denoising.prompts[row] for row in rows], rows)
                part, weights = rewards.axes(found)
                values.append(part)
        drawn.append(latents)
        told.append(torch.cat(values))
        bar((number + 1) / settings.n, None)
    scores = torch.stack(told, dim=1).numpy()  # [B, n, d]
    directions = drawn_directions(settings, weights)
    records = [_chosen(settings, scores[row], weights, directions, seed) for row, seed in enumerate(denoising.seeds)]
    latents = torch.stack([drawn[record["candidate"]][row] for row, record in enumerate(records)])
    return Outcome(latents, records)


def drawn_directions(settings: Neighbourhood, weights: list[float]) -> Floats:
    """The weights around the wished ones, [m, d], as the settings say."""
    rng = np.random.default_rng(settings.direction_seed)
    if settings.concentration is not None:
        return dirichlet(weights, settings.directions, settings.concentration, rng)
    return cap(weights, settings.directions, settings.angle, rng)


def _chosen(
    settings: Neighbourhood, scores: Floats, weights: list[float], directions: Floats, seed: int
) -> dict[str, Any]:
    """The record of one request: which candidate, and which one plain best of n by the wished weights would be."""
    whole = np.flatnonzero(np.isfinite(scores).all(axis=1))
    if not len(whole):
        return {"candidate": 0, "seed": seed, "plain": 0, "agreement": None, "candidates": []}
    units = scaled(scores[whole], settings.scale)
    place = int(whole[choose(units, weights, directions, settings.rule)])
    plain = int(whole[np.argmax(units @ np.array(weights))])
    agreed = consensus(units, directions, settings.rule)
    return {
        "candidate": place,
        "seed": candidate_seed(seed, place),
        "plain": plain,
        "agreement": float(agreed.max()),
        "candidates": [
            {"seed": candidate_seed(seed, int(k)), "scores": scores[k].tolist(), "agreement": float(a)}
            for k, a in zip(whole, agreed, strict=True)
        ],
    }
