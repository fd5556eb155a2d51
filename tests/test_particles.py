"""Particles: unbiased on a chain whose target is known; resampling, potentials; and as a strategy of sampling."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from guidance_kit import asked, brightness, unheard
from torch import Tensor

from mmalign.guidance import clouds
from mmalign.guidance.clouds import Cloud
from mmalign.guidance.particles import looks, particles
from mmalign.jobs_guidance import Particles
from mmalign.testing import tiny, tiny_transformers, tiny_video

STATES, STEPS, STRENGTH = 4, 3, 0.5
RNG = np.random.default_rng(0)
START = RNG.dirichlet(np.ones(STATES))
MOVES = RNG.dirichlet(np.ones(STATES), (STEPS, STATES))  # [step, from, to]
REWARDS = RNG.normal(size=(STEPS + 1, STATES))  # of the estimates along the way, and at last of the end


def exact() -> tuple[float, np.ndarray]:
    """The normaliser E[exp(strength r(x_0))], and the target over the last states, by going through all paths."""
    mass = np.zeros(STATES)
    for path in itertools.product(range(STATES), repeat=STEPS + 1):
        chance = START[path[0]] * math.prod(MOVES[k, a, b] for k, (a, b) in enumerate(itertools.pairwise(path)))
        mass[path[-1]] += chance * math.exp(STRENGTH * REWARDS[-1, path[-1]])
    return float(mass.sum()), mass / mass.sum()


def filtered(kind: str, runs: int, count: int, threshold: float, seed: int) -> tuple[Tensor, Tensor]:
    """`runs` independent filters of `count` particles: the normaliser's estimates [runs], and times the shares of each
    last state [runs, STATES]."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.multinomial(torch.from_numpy(START).expand(runs, -1), count, True, generator=generator)
    cloud, heat = Cloud.even(runs, count), clouds.temperatures(STEPS, 0.3)
    for step in range(STEPS + 1):
        reward, final = torch.from_numpy(REWARDS[step])[state], step == STEPS
        if kind == "smc":
            log_g = clouds.tempered(cloud, reward, STRENGTH, 1.0 if final else heat[step])
        else:
            log_g = clouds.potential(cloud, reward, STRENGTH, kind, final)  # type: ignore[arg-type]
        cloud = clouds.weighed(cloud, log_g, reward)
        if final:
            break
        uniform = torch.rand(runs, generator=generator, dtype=torch.float64)
        cloud, parents = clouds.resampled(cloud, uniform, threshold)
        state = state.gather(1, parents)
        chances = torch.from_numpy(MOVES[step])[state].reshape(-1, STATES)
        state = torch.multinomial(chances, 1, generator=generator).reshape(runs, count)
    z = cloud.normaliser.exp()
    shares = torch.stack([(cloud.shares * (state == each)).sum(1) for each in range(STATES)], dim=1)
    return z, z[:, None] * shares


@pytest.mark.parametrize("kind", ["difference", "max", "sum", "smc"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_the_estimates_are_unbiased_within_their_standard_error(kind: str, threshold: float) -> None:
    """Of the normaliser, and of the target's mass at each state; with never, sometimes and always resampling."""
    z, target = exact()
    estimates, masses = filtered(kind, 20_000, 6, threshold, seed=7)
    assert abs(estimates.mean().item() - z) < 4 * estimates.std().item() / math.sqrt(len(estimates))
    for state in range(STATES):
        found = masses[:, state]
        assert abs(found.mean().item() - z * target[state]) < 4 * found.std().item() / math.sqrt(len(found))
    assert estimates.std().item() / math.sqrt(len(estimates)) < 0.01 * z  # tight enough to tell


def test_without_the_last_correction_the_target_would_be_another() -> None:
    """So that the test above can fail."""
    z, _ = exact()
    generator = torch.Generator().manual_seed(0)
    state = torch.multinomial(torch.from_numpy(START).expand(20_000, -1), 6, True, generator=generator)
    cloud = Cloud.even(20_000, 6)
    for step in range(STEPS + 1):
        reward = torch.from_numpy(REWARDS[step])[state]
        cloud = clouds.weighed(cloud, clouds.potential(cloud, reward, STRENGTH, "sum"), reward)
        if step < STEPS:
            chances = torch.from_numpy(MOVES[step])[state].reshape(-1, STATES)
            state = torch.multinomial(chances, 1, generator=generator).reshape(state.shape)
    estimates = cloud.normaliser.exp()
    assert abs(estimates.mean().item() - z) > 10 * estimates.std().item() / math.sqrt(len(estimates))


def test_many_particles_are_drawn_from_the_target() -> None:
    _, target = exact()
    z, masses = filtered("max", 4, 50_000, 0.5, seed=1)
    np.testing.assert_allclose((masses / z[:, None]).numpy(), np.tile(target, (4, 1)), atol=0.02)


@pytest.mark.parametrize("kind", ["difference", "max", "sum"])
def test_potentials_by_hand(kind: str) -> None:
    rewards = [[0.5, -1.0], [0.2, 2.0], [1.5, 0.3]]
    cloud, product = Cloud.even(1, 2), np.zeros(2)
    for step, row in enumerate(rewards):
        reward, final = torch.tensor([row], dtype=torch.float64), step == 2
        log_g = clouds.potential(cloud, reward, 2.0, kind, final)  # type: ignore[arg-type]
        so_far = np.array(rewards[: step + 1])
        before = so_far[-2] if step else np.zeros(2)
        expected = {
            "difference": 2 * (so_far[-1] - before), "max": 2 * so_far.max(0), "sum": 2 * so_far.sum(0),
        }[kind]  # fmt: skip
        expected = 2 * so_far[-1] - product if final else expected
        np.testing.assert_allclose(log_g[0], expected, atol=1e-12)
        product += expected
        cloud = clouds.weighed(cloud, log_g, reward)
    np.testing.assert_allclose(cloud.product[0], 2 * np.array(rewards[-1]), atol=1e-12)


def test_a_pushed_proposal_keeps_the_target_by_its_correction() -> None:
    """Importance sampling of E[exp(x)] under N(m, s^2) from N(m + push, s^2): exp(m + s^2 / 2)."""
    generator = torch.Generator().manual_seed(3)
    n, m, s, push = 200_000, 0.3, 0.8, 0.5
    mean, std, moved_by = torch.full((n, 1), m), torch.tensor(s), torch.full((n, 1), push)
    moved = mean + moved_by + std * torch.randn(n, 1, generator=generator)
    weights = (clouds.correction(moved, mean, std, moved_by) + moved[:, 0].double()).exp()
    error = weights.std().item() / math.sqrt(n)
    assert abs(weights.mean().item() - math.exp(m + s * s / 2)) < 4 * error < 0.02
    by_hand = torch.distributions.Normal(m, s).log_prob(moved) - torch.distributions.Normal(m + push, s).log_prob(moved)
    torch.testing.assert_close(clouds.correction(moved, mean, std, moved_by), by_hand[:, 0].double(), atol=1e-5, rtol=0)
    assert torch.equal(clouds.correction(moved, mean, torch.tensor(0.0), moved_by), torch.zeros(n, dtype=torch.float64))


def test_systematic_resampling_gives_as_many_children_as_weight() -> None:
    shares = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    counts = torch.zeros(2, 4)
    for k in range(1000):
        parents = clouds.systematic(shares, torch.full((2,), (k + 0.5) / 1000, dtype=torch.float64))
        once = torch.stack([torch.bincount(row, minlength=4) for row in parents])
        assert ((once - 4 * shares).abs() < 1).all() and (once.sum(1) == 4).all()
        counts += once
    torch.testing.assert_close(counts / 1000, (4 * shares).float(), atol=2e-3, rtol=0)


def test_only_requests_whose_weight_lies_on_few_are_resampled() -> None:
    weights = torch.tensor([[0.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    cloud = clouds.weighed(Cloud.even(2, 4), weights, weights)
    np.testing.assert_allclose(
        clouds.effective_size(cloud), [4.0, 1 / (np.exp(weights[1] - weights[1].logsumexp(0)) ** 2).sum()], rtol=1e-12
    )
    moved, parents = clouds.resampled(cloud, torch.tensor([0.3, 0.3], dtype=torch.float64), 0.5)
    assert parents.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert torch.equal(moved.log_weights[1], torch.zeros(4, dtype=torch.float64))
    np.testing.assert_allclose(moved.normaliser, cloud.normaliser, atol=1e-12)  # resampling changes no estimate


def test_particles_that_cannot_be_scored_are_not_continued() -> None:
    reward = torch.tensor([[-torch.inf, 0.0, 1.0]], dtype=torch.float64)
    cloud = Cloud.even(1, 3)
    cloud = clouds.weighed(cloud, clouds.potential(cloud, reward, 1.0, "difference"), reward)
    assert cloud.shares[0, 0] == 0
    for u in (0.01, 0.5, 0.99):
        _, parents = clouds.resampled(cloud, torch.tensor([u], dtype=torch.float64), 1.1)
        assert 0 not in parents
    dead = clouds.weighed(Cloud.even(1, 3), torch.zeros(1, 3).double(), torch.full((1, 3), -torch.inf).double())
    assert torch.allclose(dead.shares, torch.full((1, 3), 1 / 3, dtype=torch.float64))
    assert clouds.resampled(dead, torch.tensor([0.5], dtype=torch.float64), 1.1)[1].tolist() == [[0, 1, 2]]


def test_temperatures_rise_to_one() -> None:
    found = clouds.temperatures(10, 0.1)
    np.testing.assert_allclose(found[:4], [0.0, 0.1, 0.21, 0.331], atol=1e-12)
    assert len(found) == 11 and clouds.temperatures(3, 0.01)[-2:] == [pytest.approx(0.0201), 1.0]
    assert found == sorted(found) and found[-1] == 1.0 and max(clouds.temperatures(50, 0.1)) == 1.0


# -------------------------------------------------------------------------------------------------- as a strategy

MAKERS = {"sd": tiny.tiny_sd, "sd3": tiny_transformers.tiny_sd3, "wan": tiny_video.tiny_wan}


@pytest.fixture(scope="module", name="model", params=MAKERS)
def _model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = MAKERS[request.param](tmp_path_factory.mktemp("particles") / request.param)
    return folder, {"frames": 5} if request.param == "wan" else {}


def settings(**changes: Any) -> Particles:
    told = {"rewards": [{"name": "hps"}], "n": 3, "every": 1, "start": 0.0, "stop": 1.0, "strength": 50.0}
    return Particles.model_validate({**told, **changes})


def run(model: Any, wanted: Particles, rows: slice = slice(None), **changes: Any) -> Any:
    rewards = brightness()
    denoising = asked(model[0], wanted, rewards, rows, **model[1], **changes)
    return particles(denoising, rewards, wanted, unheard), denoising


@pytest.mark.parametrize(
    "changes",
    [{}, {"potential": "difference", "choose": "draw"}, {"method": "smc"}, {"method": "smc", "gradient": True}],
)
def test_a_row_is_the_same_in_any_company_and_costs_are_counted(model: Any, changes: dict[str, Any]) -> None:
    wanted = settings(**changes)
    together, denoising = run(model, wanted)
    alone, _ = run(model, wanted, slice(1, 2), batch_size=1)
    torch.testing.assert_close(together.latents[1:2], alone.latents, atol=2e-4, rtol=1e-4)
    assert together.records[1]["particle"] == alone.records[0]["particle"]
    seen = len(looks(denoising.steps, 1, 0.0, 1.0))
    gradients = 3 * denoising.steps if wanted.gradient else 0
    for spent in denoising.spent:
        assert spent.network_calls == 3 * 2 * denoising.steps
        assert spent.reward_calls == 3 * (seen + 1) and spent.reward_gradients == gradients
        assert spent.decodes == 3 * (seen + 1) + gradients
    again, _ = run(model, wanted)
    assert torch.equal(again.latents, together.latents)


def test_the_best_particle_is_kept_and_steering_raises_the_reward(model: Any) -> None:
    steered, denoising = run(model, settings())
    for record in steered.records:
        assert record["rewards"][record["particle"]] == max(record["rewards"])
        assert 1 <= record["effective_size"] <= 3 + 1e-9 and sum(record["weights"]) == pytest.approx(1)
    blind, _ = run(model, settings(threshold=0.0, choose="draw", strength=1e-9))
    assert all(record["resamplings"] == 0 for record in blind.records)
    np.testing.assert_allclose([record["weights"] for record in blind.records], 1 / 3, atol=1e-6)
    reward = brightness()
    mean = [denoising.reward(reward, outcome.latents).mean().item() for outcome in (steered, blind)]
    assert mean[0] > mean[1]


def test_gradients_push_all_particles_up(model: Any) -> None:
    pushed, _ = run(model, settings(method="smc", gradient=True, strength=300.0, threshold=0.0))
    left, _ = run(model, settings(method="smc", strength=300.0, threshold=0.0))
    assert np.mean([r["rewards"] for r in pushed.records]) > np.mean([r["rewards"] for r in left.records])


def test_weighed_and_pushed_at_the_temperatures_of_the_paper(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At step k weighed at (1 + gamma)^k - 1; the step from there is pushed at that of k + 1 (DAS, equations 8, 14)."""
    weighed: list[float] = []
    pushes: list[Tensor] = []
    tempered, correction = clouds.tempered, clouds.correction

    def heard(cloud: Cloud, reward: Tensor, strength: float, temperature: float) -> Tensor:
        weighed.append(temperature)
        return tempered(cloud, reward, strength, temperature)

    def pushed(moved: Tensor, mean: Tensor, std: Tensor, push: Tensor) -> Tensor:
        pushes.append(push)
        return correction(moved, mean, std, push)

    monkeypatch.setattr(clouds, "tempered", heard)
    monkeypatch.setattr(clouds, "correction", pushed)
    found = []
    for gamma in (0.1, 0.2):  # the first step's push grows with gamma, that of step 1; nothing else has changed by then
        wanted = settings(method="smc", gradient=True, strength=1e-3, gamma=gamma, threshold=0.0)
        pushes.clear()
        _, denoising = run(model, wanted)
        found.append(pushes[0].clone())
    steps = denoising.steps
    np.testing.assert_allclose(weighed[-steps:], [*(1.2**k - 1 for k in range(1, steps)), 1.0])
    torch.testing.assert_close(found[1] * 0.1, found[0] * 0.2)
    assert found[0].abs().max() > 0


def test_when_it_looks() -> None:
    assert looks(10, 2, 0.2, 0.8) == {2, 4, 6, 8}
    assert looks(10, 1, 0.0, 1.0) == set(range(1, 10))
    assert looks(4, 8, 0.0, 1.0) == set()


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance\.gradient belongs to method: smc"):
        settings(gradient=True)
    with pytest.raises(ValueError, match=r"start \(0\.9\) must not be after"):
        settings(start=0.9, stop=0.5)
    with pytest.raises(ValueError, match=r"threshold 0\.5 of 2 particles is 1, .* never below 1"):
        settings(n=2)
    assert settings(n=2, threshold=0.6).n == 2 and settings(n=2, threshold=0.0).threshold == 0
