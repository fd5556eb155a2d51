"""Best of n and search on rewards whose answer is known, and on a real tiny model whose calls are counted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign import sample
from mmalign.guidance.best_of_n import best, best_of_n
from mmalign.guidance.denoising import begin, candidate_seed
from mmalign.guidance.rewards import Rewards
from mmalign.guidance.search import explore, neighbour, network_calls, schedule, search
from mmalign.jobs import SampleConfig
from mmalign.jobs_guidance import BestOfN, Search
from mmalign.testing.tiny import tiny_sd

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a large green square", "a blue circle", "a small triangle", "a red circle"]
HPS = {"name": "hps", "params": {"checkpoint": "assets/shapes-clip"}}


# -------------------------------------------------------------------------------------------------- pure functions


@pytest.mark.parametrize(
    ("n", "expected"), [(2, 1 / math.sqrt(math.pi)), (3, 1.5 / math.sqrt(math.pi)), (5, 1.16296447)]
)
def test_the_best_of_n_gaussians_is_their_expected_maximum(n: int, expected: float) -> None:
    """Closed forms of the largest of n standard Gaussians (order statistics), within four standard errors."""
    rewards = torch.from_numpy(np.random.default_rng(n).standard_normal((40_000, n)))
    chosen = rewards.gather(1, best(rewards)[:, None]).flatten()
    assert abs(chosen.mean().item() - expected) < 4 * chosen.std().item() / 200


def test_ties_go_to_the_first_and_nothing_to_nan() -> None:
    nan, inf = math.nan, math.inf
    rewards = torch.tensor([[1.0, 1.0, 0.0], [nan, -2.0, -1.0], [nan, nan, -inf], [-inf, 0.0, nan]])
    assert best(rewards).tolist() == [0, 2, 0, 1]


@pytest.mark.parametrize("radius", [0.1, 0.5, 1.0])
def test_neighbours_of_unit_noise_are_unit_noise_at_a_distance(radius: float) -> None:
    drawn = np.random.default_rng(0).standard_normal((2, 200_000))
    pivot, noise = torch.from_numpy(drawn)
    found = neighbour(pivot, radius, noise)
    assert found.var().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / 200_000))
    correlation = (found * pivot).mean() / (found.std() * pivot.std())
    assert correlation.item() == pytest.approx(math.sqrt(1 - radius**2), abs=0.01)
    expected = 2 * (1 - math.sqrt(1 - radius**2))  # E |y - x|^2 per dimension
    assert (found - pivot).square().mean().item() == pytest.approx(expected, abs=0.02)


def _climb(rounds: int, n: int, radius: float, kind: str) -> tuple[Tensor, Any]:
    """Eight pivots in 16 dimensions; the reward is the cosine with a direction, at most 1."""
    direction = torch.ones(16, dtype=torch.float64) / 4
    rng = torch.Generator().manual_seed(0)

    def propose(number: int, pivot: Tensor | None) -> Tensor:
        fresh = torch.randn(8, n, 16, generator=rng, dtype=torch.float64)
        return fresh if pivot is None or kind == "random" else neighbour(pivot[:, None], radius, fresh)

    def evaluate(candidates: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * candidates, candidates @ direction / candidates.norm(dim=-1)

    told: list[int] = []
    found = explore(propose, evaluate, rounds, lambda done, reward: told.append(done))
    assert told == list(range(1, rounds + 1))
    torch.testing.assert_close(found.drawn, 2 * found.noise)
    torch.testing.assert_close(found.noise @ direction / found.noise.norm(dim=-1), found.reward)
    return torch.stack(found.history), found


def test_zero_order_search_finds_the_maximum_of_a_smooth_reward() -> None:
    history, found = _climb(rounds=120, n=8, radius=0.3, kind="zero_order")
    assert (history[1:] >= history[:-1]).all(), "the best seen is never let go"
    assert found.reward.min() > 0.93
    aimless, _ = _climb(rounds=120, n=8, radius=0.3, kind="random")
    assert found.reward.min() > aimless[-1].max() + 0.05, "neighbours beat as many independent draws"


def test_explore_keeps_the_best_ever_seen() -> None:
    rewards = iter([[[0.0, 3.0], [1.0, 1.0]], [[2.0, -1.0], [1.0, 4.0]], [[3.0, 3.0], [math.nan, 0.0]]])
    seen: list[Tensor | None] = []

    def propose(number: int, pivot: Tensor | None) -> Tensor:
        seen.append(pivot)
        return torch.full((2, 2, 1), float(number)) + torch.tensor([[[0.0], [0.5]]])

    found = explore(propose, lambda c: (c, torch.tensor(next(rewards))), 3, lambda done, reward: None)
    assert found.reward.tolist() == [3.0, 4.0] and found.noise.flatten().tolist() == [0.5, 1.5]
    assert found.place == [(0, 1), (1, 1)]
    assert seen[0] is None and [each.flatten().tolist() for each in seen[1:] if each is not None] == [
        [0.5, 0.0],
        [0.5, 1.5],
    ]


@pytest.mark.parametrize("steps", [2, 5, 20, 50])
@pytest.mark.parametrize(("start", "back", "forth"), [(0.8, 2, 6), (0.5, 1, 2), (0.95, 4, 5), (0.1, 3, 30)])
def test_every_schedule_of_paths_ends(steps: int, start: float, back: int, forth: int) -> None:
    settings = _search(method="paths", start=start, back=back, forth=forth)
    first, rounds = schedule(steps, settings)
    ends = [first, *(end for _, end in rounds)]
    assert ends == sorted(set(ends)) and ends[-1] == steps and 0 < first < steps
    for (begin_at, end), before in zip(rounds, ends, strict=False):
        assert begin_at == max(0, before - back) and end == min(begin_at + forth, steps)


def test_paths_that_would_never_end_are_refused() -> None:
    with pytest.raises(ValueError, match=r"set forth above back"):
        _search(method="paths", back=4, forth=4)


# -------------------------------------------------------------------------------------------------- a tiny model


def _search(**changes: Any) -> Search:
    return Search.model_validate({"rewards": [HPS], **changes})


class _Brightness(Rewards):
    """The mean of the pixels, as a reward that a test can compute."""

    def __init__(self) -> None:
        self.spent = []

    def scores(self, pixels: Tensor, prompts: Any, rows: Any = None) -> Tensor:
        self._count("reward_calls", len(pixels), rows)
        return (pixels * 255).round().double().mean((1, 2, 3))


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("search")
    (home / "prompts.txt").write_text("\n".join(PROMPTS))
    config = SampleConfig.model_validate(
        {
            "model": {"path": tiny_sd(home / "sd")}, "prompts": home / "prompts.txt", "output": home / "out",
            "device": "cpu", "steps": 5, "guidance_scale": 2.0, "batch_size": 3,
        }
    )  # fmt: skip
    return sample.load(config, CPU), config


def _run(model: Any, settings: Any, rows: slice = slice(None), batch_size: int = 3) -> Any:
    adapter, config = model
    prompts, seeds = PROMPTS[rows], list(range(5))[rows]
    denoising = begin(adapter, prompts, seeds, config.model_copy(update={"batch_size": batch_size}), settings.kind)
    rewards = _Brightness()
    rewards.spent = denoising.spent
    told: list[float] = []
    strategy = best_of_n if settings.kind == "best_of_n" else search
    outcome = strategy(denoising, rewards, settings, lambda share, reward=None: told.append(share))  # type: ignore[operator]
    assert told == sorted(told) and told[-1] == 1.0
    return outcome, denoising, rewards


def test_best_of_n_keeps_the_brightest_of_its_seeds(model: Any) -> None:
    outcome, denoising, rewards = _run(model, BestOfN.model_validate({"rewards": [HPS], "n": 4}))
    costs = [(each.network_calls, each.decodes, each.reward_calls, each.reward_gradients) for each in denoising.spent]
    assert costs == [(4 * 5 * 2, 4, 4, 0)] * 5
    for row, record in enumerate(outcome.records):
        alone = begin(model[0], [PROMPTS[row]], [row], model[1])
        drawn = [alone.plain(alone.draw([candidate_seed(row, k)])) for k in range(4)]
        scores = [rewards.scores(alone.pixels(each), [], [0]).item() for each in drawn]
        assert record["candidate"] == int(np.argmax(scores))
        assert [each["reward"] for each in record["candidates"]] == pytest.approx(scores, abs=0.01)
        assert record["seed"] == candidate_seed(row, record["candidate"])
        torch.testing.assert_close(outcome.latents[row], drawn[record["candidate"]][0], rtol=0, atol=1e-5)
    assert len({record["candidate"] for record in outcome.records}) > 1


@pytest.mark.parametrize("method", ["random", "zero_order", "paths"])
def test_costs_are_counted_and_choices_do_not_depend_on_the_batch(method: str, model: Any) -> None:
    settings = _search(method=method, rounds=3, n=2, keep=2, start=0.6, back=1, forth=2)
    outcome, denoising, _ = _run(model, settings)
    calls = network_calls(5, settings)
    assert [each.network_calls for each in denoising.spent] == [2 * calls] * 5
    looked = 6 if method != "paths" else 4 * len(schedule(5, settings)[1])
    assert [(each.decodes, each.reward_calls) for each in denoising.spent] == [(looked, looked)] * 5
    for rows, batch_size in ((slice(0, 1), 1), (slice(2, 5), 8)):
        part, _, _ = _run(model, settings, rows, batch_size)
        torch.testing.assert_close(part.latents, outcome.latents[rows], rtol=0, atol=1e-5)
        for ours, theirs in zip(part.records, outcome.records[rows], strict=True):
            values = "best_reward" if method == "paths" else "best_after_round"
            assert ours.pop(values) == pytest.approx(theirs[values], abs=0.02)
            assert ours == {name: value for name, value in theirs.items() if name != values}


def test_random_search_is_best_of_as_many(model: Any) -> None:
    found, _, _ = _run(model, _search(method="random", rounds=2, n=3))
    expected, _, _ = _run(model, BestOfN.model_validate({"rewards": [HPS], "n": 6}))
    torch.testing.assert_close(found.latents, expected.latents, rtol=0, atol=1e-5)
    assert [each["seed"] for each in found.records] == [each["seed"] for each in expected.records]


def test_zero_order_begins_with_the_plain_sample_and_never_loses_to_it(model: Any) -> None:
    settings = _search(method="zero_order", rounds=3, n=3)
    outcome, denoising, rewards = _run(model, settings)
    plain = rewards.scores(denoising.pixels(denoising.plain(denoising.initial())), []).tolist()
    first, _, _ = _run(model, settings.model_copy(update={"rounds": 1, "n": 1}))
    assert [each["best_after_round"][-1] for each in first.records] == pytest.approx(plain, abs=0.01)
    assert all(r["best_after_round"][-1] >= value - 0.01 for r, value in zip(outcome.records, plain, strict=True))
    assert all(r["best_after_round"] == sorted(r["best_after_round"]) for r in outcome.records)
    assert any(r["best_after_round"][-1] > r["best_after_round"][0] for r in outcome.records)
