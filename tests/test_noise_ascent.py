"""Noise optimisation: its terms against independent computations, its gradient with and without memory, its gain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from guidance_kit import asked, brightness, unheard
from scipy.stats import chi

from mmalign.guidance.noise_ascent import clipped, drawn, length_likelihood, noise_ascent, to_sphere
from mmalign.jobs_guidance import NoiseOptimisation
from mmalign.testing import tiny, tiny_transformers, tiny_video

MAKERS = {"sd": tiny.tiny_sd, "sd3": tiny_transformers.tiny_sd3, "wan": tiny_video.tiny_wan}


@pytest.fixture(scope="module", name="model", params=MAKERS)
def _model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = MAKERS[request.param](tmp_path_factory.mktemp("noise") / request.param)
    return folder, {"frames": 5} if request.param == "wan" else {}


def settings(**changes: Any) -> NoiseOptimisation:
    told = {"rewards": [{"name": "hps"}], "iterations": 3, "lr": 20.0}
    return NoiseOptimisation.model_validate({**told, **changes})


def run(model: Any, wanted: NoiseOptimisation, rows: slice = slice(None), **changes: Any) -> Any:
    rewards = brightness()
    denoising = asked(model[0], wanted, rewards, rows, **{"steps": 2, **model[1], **changes})
    return noise_ascent(denoising, rewards, wanted, unheard), denoising


# --------------------------------------------------------------------------------------------------------- terms


def test_the_length_term_is_the_density_of_a_chi_distribution() -> None:
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 3, 4, 2)) * 1.3)
    lengths = noise.flatten(1).norm(dim=1).numpy()
    expected = chi.logpdf(lengths, 24)
    found = length_likelihood(noise).numpy()
    np.testing.assert_allclose(found - found[0], expected - expected[0], rtol=1e-4, atol=1e-4)
    grown = noise / noise.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    tops = [length_likelihood(grown * s).mean().item() for s in (0.95 * 23**0.5, 23**0.5, 1.05 * 23**0.5)]
    assert tops[1] == max(tops)


def test_noise_is_put_back_to_its_sphere_and_gradients_are_cut_row_by_row() -> None:
    noise = (
        torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
        * torch.tensor([0.1, 1.0, 9.0])[:, None, None, None]
    )
    first = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    back = to_sphere(noise, first)
    np.testing.assert_allclose(
        back.double().square().sum((1, 2, 3)).sqrt(), first.double().square().sum((1, 2, 3)).sqrt(), rtol=1e-5
    )
    torch.testing.assert_close(torch.nn.functional.cosine_similarity(back.flatten(1), noise.flatten(1)), torch.ones(3))
    short = clipped(noise, 2.0)
    assert torch.equal(short[0], noise[0])
    torch.testing.assert_close(short.flatten(1).norm(dim=1)[1:], torch.full((2,), 2.0))


# ------------------------------------------------------------------------------------------------------ gradient


def test_the_gradient_is_the_same_when_steps_are_computed_again(model: Any) -> None:
    found = []
    for remember in (False, True):
        rewards = brightness()
        denoising = asked(model[0], settings(), rewards, **{"steps": 3, **model[1]})
        noise = denoising.initial().requires_grad_(True)
        reward = rewards.tensor(denoising.pixels(drawn(denoising, noise, remember)), denoising.prompts)
        found.append(torch.autograd.grad(reward.sum(), noise)[0])
        calls = denoising.costs.network_calls
        assert calls == len(denoising.prompts) * 2 * 3 * (2 if remember else 1)  # the second computing is counted
    torch.testing.assert_close(found[0], found[1], atol=1e-8, rtol=1e-4)
    assert found[0].abs().max() > 0


def test_the_gradient_is_that_of_finite_differences(model: Any) -> None:
    rewards = brightness()
    denoising = asked(model[0], settings(), rewards, slice(0, 1), **{"steps": 2, **model[1]})
    denoising.adapter.denoiser.double()
    denoising.adapter.vae.double()
    condition = {name: value.double() for name, value in denoising.condition.items() if value.is_floating_point()}
    denoising.condition = {**denoising.condition, **condition}
    start = denoising.initial()

    def reward(noise: torch.Tensor) -> torch.Tensor:
        return rewards.tensor(denoising.pixels(drawn(denoising, noise, True)), denoising.prompts).sum()

    noise = start.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(noise), noise)
    along = gradient / gradient.norm()
    step = 0.05
    slope = (reward(start + step * along) - reward(start - step * along)).item() / (2 * step)
    assert slope == pytest.approx(gradient.norm().item(), rel=0.05)


# ------------------------------------------------------------------------------------------------------ strategy


@pytest.mark.parametrize("method", ["reno", "doodl"])
def test_it_never_falls_and_a_row_is_the_same_in_any_company(model: Any, method: str) -> None:
    wanted = settings(method=method)
    together, denoising = run(model, wanted)
    alone, _ = run(model, wanted, slice(1, 2), batch_size=1)
    torch.testing.assert_close(together.latents[1:2], alone.latents, atol=1e-3, rtol=1e-3)
    for record in together.records:
        assert record["rewards"][record["iteration"]] == max(record["rewards"]) > record["rewards"][0]
    rewards = brightness()
    plain = denoising.reward(rewards, denoising.plain(denoising.initial()))
    np.testing.assert_allclose([record["rewards"][0] for record in together.records], plain, atol=1e-6)
    spent = denoising.spent[0]
    assert spent.reward_gradients == 3 and spent.reward_calls >= 4


def test_drift_and_length_hold_the_noise_back(model: Any) -> None:
    told = {"length": 0.0, "iterations": 8, "lr": 1.0, "momentum": 0.0}
    free, _ = run(model, settings(**told))
    held, _ = run(model, settings(**told, drift=200.0))
    assert all(h["moved"] < f["moved"] for h, f in zip(held.records, free.records, strict=True))


def test_doodl_stays_on_the_sphere(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    import mmalign.guidance.noise_ascent as module

    original = module.to_sphere

    def spy(noise: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        seen.append(original(noise, first))
        return seen[-1]

    monkeypatch.setattr(module, "to_sphere", spy)
    _, denoising = run(model, settings(method="doodl"))
    own = denoising.initial().flatten(1).norm(dim=1)
    assert len(seen) == 3 and own.std() > 0
    for noise in seen:
        torch.testing.assert_close(noise.flatten(1).norm(dim=1), own)


def test_a_step_that_leaves_all_bounds_is_stopped_and_named(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance noise: .* not finite .* lower guidance\.lr"):
        run(model, settings(lr=1e38, max_grad_norm=1e9, length=0.0))
