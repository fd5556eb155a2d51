"""Search over initial noise and over paths with a fixed sampler (Ma et al., 2501.09732, section 3.2)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmalign.guidance.best_of_n import best
from mmalign.guidance.denoising import Bar, Denoising, Outcome, candidate_seed
from mmalign.guidance.rewards import Rewards
from mmalign.jobs_guidance import Search

Propose = Callable[[int, Tensor | None], Tensor]
"""(round, best noise so far [B, ...], None in the first round) -> candidates [B, n, ...]."""
Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Candidates [B, n, ...] -> what is drawn from them, [B, n, ...], and its rewards [B, n], float64 on the CPU."""


@dataclass
class Found:
    """The best that a search has seen.

    Attributes:
        noise, drawn: [B, ...], and what the sampler made of it.
        reward: [B].
        history: the best reward after each round, [B] each.
        place: (round, candidate) of each row's best.
    """

    noise: Tensor
    drawn: Tensor
    reward: Tensor
    history: list[Tensor]
    place: list[tuple[int, int]]


def explore(propose: Propose, evaluate: Evaluate, rounds: int, told: Callable[[int, Tensor], None]) -> Found:
    """Candidates round after round; of each row the best that was ever seen is kept, the first where several are level.

    Args:
        told: called after each round with the number of rounds that are done and the best rewards so far.
    """
    found: Found | None = None
    for number in range(rounds):
        candidates = propose(number, None if found is None else found.noise)
        drawn, rewards = evaluate(candidates)
        places = best(rewards)
        row = torch.arange(len(places))
        noise, picture, reward = candidates[row, places], drawn[row, places], rewards[row, places]
        if found is None:
            found = Found(noise, picture, reward, [], [(0, place) for place in places.tolist()])
        else:
            better = reward > found.reward
            found.noise, found.drawn = _choose(better, noise, found.noise), _choose(better, picture, found.drawn)
            found.reward = torch.where(better, reward, found.reward)
            for each in torch.nonzero(better).flatten().tolist():
                found.place[each] = (number, int(places[each]))
        found.history.append(found.reward)
        told(number + 1, found.reward)
    assert found is not None
    return found


def _choose(which: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(which.to(one.device).reshape(-1, *[1] * (one.ndim - 1)), one, other)


def neighbour(pivot: Tensor, radius: float, noise: Tensor) -> Tensor:
    """sqrt(1 - radius^2) pivot + radius noise: unit noise again, at about radius sqrt(2 D) for small radii.

    In D dimensions unit noise lies near the sphere of radius sqrt(D), where the model was trained. The paper's
    neighbours, at a fixed distance of the pivot in any direction, leave it as they move.
    """
    return (1 - radius**2) ** 0.5 * pivot + radius * noise


def search(denoising: Denoising, rewards: Rewards, settings: Search, bar: Bar) -> Outcome:
    """Searches by `settings.method`. See docs/guidance/search.md for what each costs."""
    if settings.method == "paths":
        return paths(denoising, rewards, settings, bar)
    count = len(denoising.prompts)

    def propose(number: int, pivot: Tensor | None) -> Tensor:
        first = number * settings.n
        if settings.method == "random":
            seeds = [candidate_seed(seed, first + k) for seed in denoising.seeds for k in range(settings.n)]
            return denoising.draw(seeds).unflatten(0, (count, settings.n))
        return _around(denoising, denoising.initial() if pivot is None else pivot, settings, number, pivot is None)

    rounds = itertools.count()

    def evaluate(candidates: Tensor) -> tuple[Tensor, Tensor]:
        number = next(rounds)
        drawn = denoising.plain(
            candidates.flatten(0, 1), told=lambda share: bar((number + share) / settings.rounds, None)
        )
        return drawn.unflatten(0, (count, -1)), denoising.reward(rewards, drawn).unflatten(0, (count, -1))

    def told(done: int, reward: Tensor) -> None:
        bar(done / settings.rounds, reward.mean().item())

    found = explore(propose, evaluate, settings.rounds, told)
    history = torch.stack(found.history, dim=1).tolist()
    records = [
        {"method": settings.method, "round": place[0], "candidate": place[1], "best_after_round": row}
        | ({"seed": candidate_seed(seed, place[0] * settings.n + place[1])} if settings.method == "random" else {})
        for seed, place, row in zip(denoising.seeds, found.place, history, strict=True)
    ]
    return Outcome(found.drawn, records)


def _around(denoising: Denoising, pivot: Tensor, settings: Search, number: int, itself: bool) -> Tensor:
    """Neighbours of pivots [B, ...]: [B, n, ...]; in the first round the pivot itself is one of the candidates."""
    rows = []
    for row, centre in enumerate(pivot):
        generators = [denoising.generator(row, "neighbour", number, k) for k in range(settings.n)]
        noise = torch.stack([torch.randn(centre.shape, generator=each) for each in generators]).to(centre)
        around = neighbour(centre, settings.radius, noise)
        rows.append(torch.cat([centre[None], around[1:]]) if itself else around)
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------------------ paths


def paths(denoising: Denoising, rewards: Rewards, settings: Search, bar: Bar) -> Outcome:
    """Search over paths: branch with fresh noise along the way, and keep those that look best.

    `keep` noises are taken to the first comparison. Then, until the end: each path goes `back` steps by the forward
    process, in n branches with noise of their own; each branch takes `forth` steps; and by the reward of the x_0
    estimate of its last prediction, which costs no call of its own, the best `keep` of a request's branches go on.
    """
    count, keep, n, steps = len(denoising.prompts), settings.keep, settings.n, denoising.steps
    at, bounds = schedule(steps, settings)
    seeds = [candidate_seed(seed, k) for seed in denoising.seeds for k in range(keep)]
    latents = denoising.plain(denoising.draw(seeds), end=at)
    seen: list[Tensor] = []
    for begin, end in bounds:
        branches = latents.repeat_interleave(n, dim=0)
        generators = [
            denoising.generator(row, "branch", at, k) for row in range(count) for k in range(keep * n)
        ]  # fmt: skip
        reached, estimates = _walk(denoising, denoising.renoise(branches, at, begin, generators), begin, end)
        scores = denoising.reward(rewards, estimates).unflatten(0, (count, -1))
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :keep]
        latents = reached.unflatten(0, (count, -1))[torch.arange(count)[:, None], order].flatten(0, 1)
        seen.append(scores.amax(1))
        at = end
        bar(end / steps, seen[-1].mean().item())
    records = [
        {"method": "paths", "compared_after_step": [end for _, end in bounds], "best_reward": row}
        for row in torch.stack(seen, dim=1).tolist()
    ]
    return Outcome(latents.unflatten(0, (count, keep))[:, 0], records)


def schedule(steps: int, settings: Search) -> tuple[int, list[tuple[int, int]]]:
    """The step of the first comparison, and of each round the step that it goes back to and the one that it ends at."""
    at = min(max(1, round(steps * (1 - settings.start))), steps - 1)
    first, rounds = at, []
    while at < steps:
        begin = max(0, at - settings.back)
        at = min(begin + settings.forth, steps)
        rounds.append((begin, at))
    return first, rounds


def network_calls(steps: int, settings: Search) -> int:
    """Predictions for each request; with classifier-free guidance each is two calls."""
    if settings.method != "paths":
        return settings.rounds * settings.n * steps
    first, rounds = schedule(steps, settings)
    return settings.keep * first + settings.keep * settings.n * sum(end - begin for begin, end in rounds)


@torch.no_grad()
def _walk(denoising: Denoising, latents: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Latents at timesteps[end], and the x_0 that the last prediction implied; at the end the latents themselves."""
    estimate = latents
    for i in range(begin, end):
        prediction = denoising.predict(latents, i)
        estimate = denoising.estimate(latents, prediction, i)
        latents = denoising.step(latents, prediction, i)
    return latents, latents if end == denoising.steps else estimate
