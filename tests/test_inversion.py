"""Inversion for eps, v and flow: it undoes the sampler, and a row does not depend on its batch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign import noise
from mmalign.inversion import evaluations, invert
from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.testing.tiny import tiny_sd
from mmalign.testing.tiny_transformers import tiny_sd3

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ABAR = torch.cumprod(1 - BETAS, 0)
PROCESSES = {"eps": noise.Process("eps", ABAR), "v": noise.Process("v", ABAR), "flow": noise.Process("flow")}
processes = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
METHODS = ("ddim_inversion", "renoise")


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _times(process: noise.Process, shares: list[float]) -> Tensor:
    if process.kind == "flow":
        return torch.tensor(shares, dtype=torch.float64)
    return torch.tensor([round(share * 999) for share in shares])


def _smooth(process: noise.Process) -> Any:
    """The exact prediction for data N(0, I / 4): linear in x, so that the flow's ODE has a closed form."""

    def predict(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        signal, spread = process.scales(t, x)
        x0 = 0.25 * signal / (0.25 * signal**2 + spread**2) * x
        if process.kind == "eps":
            return (x - signal * x0) / spread
        eps = (x - signal * x0) / spread
        return eps - x0 if process.kind == "flow" else signal * eps - spread * x0

    return predict


# --------------------------------------------------------------------------------------------------- one step


@processes
def test_the_inverse_step_is_the_inverse_of_the_step(process: noise.Process) -> None:
    """For any prediction: x -> step -> inverse_step is x, to float64's last digits."""
    x, prediction = _draw(4, 3, 8, 8, seed=1), _draw(4, 3, 8, 8, seed=2)
    high, low = _times(process, [0.1, 0.4, 0.7, 0.95]), _times(process, [0.05, 0.1, 0.69, 0.2])
    forth, _ = process.step(x, prediction, high, low)
    torch.testing.assert_close(process.inverse_step(forth, prediction, low, high), x, rtol=1e-10, atol=1e-10)


@processes
def test_the_inverse_step_from_clean_latents(process: noise.Process) -> None:
    x, prediction = _draw(1, 3, 8, 8, seed=1), _draw(1, 3, 8, 8, seed=2)
    high, clean = _times(process, [0.3]), torch.tensor([process.clean])
    forth, x0 = process.step(x, prediction, high, clean)
    assert torch.equal(forth, x0)
    torch.testing.assert_close(process.inverse_step(x0, prediction, clean, high), x, rtol=1e-10, atol=1e-10)


@processes
def test_ancestral_deviation_is_the_posteriors(process: noise.Process) -> None:
    """Var(x_s | x_t, x_0) of the Gaussian chain, by conditioning: s^2 (1 - (b/a)^2 s^2 / r^2)."""
    high, low = _times(process, [0.6]), _times(process, [0.35])
    (a, s), (b, r) = ([v.item() for v in process.scales(t, _draw(1))] for t in (low, high))
    gain = b / a  # x_t = gain x_s + noise of variance r^2 - gain^2 s^2
    variance = s**2 - (gain * s**2) ** 2 / r**2
    assert process.ancestral_std(low, high, _draw(1)).item() == pytest.approx(math.sqrt(variance), rel=1e-9)


# ----------------------------------------------------------------------------------------------- the whole path


@processes
@pytest.mark.parametrize("method", METHODS)
def test_more_steps_come_nearer_to_the_exact_trajectory(process: noise.Process, method: Any) -> None:
    """For Gaussian data the ODE keeps x in units of the marginal's deviation: x_t = sqrt(a^2/4 + s^2) / (1/2) x_0."""
    latents, t = 0.5 * _draw(3, 2, 4, 4, seed=3), _times(process, [0.2, 0.5, 0.9])
    signal, spread = process.scales(t, latents)
    exact = (0.25 * signal**2 + spread**2).sqrt() / 0.5 * latents
    errors = []
    for steps in (10, 40, 160):
        found = invert(_smooth(process), process, latents, t, steps=steps, method=method)
        errors.append((found - exact).abs().max().item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.07 and errors[2] < 0.3 * errors[0]


@processes
def test_renoise_comes_back_nearer_by_the_same_steps(process: noise.Process) -> None:
    """What is inverted is the sampler's step, not the ODE: down the same grid, ReNoise ends nearer to the start."""
    latents, shares = 0.5 * _draw(1, 2, 4, 4, seed=3), [j / 10 for j in range(1, 11)]
    flow = process.kind == "flow"
    grid = torch.tensor([process.clean, *(shares if flow else [round(1000 * share) - 1 for share in shares])])
    left = []
    for method in METHODS:
        x = invert(_smooth(process), process, latents, grid[-1:], steps=10, method=method)  # type: ignore[arg-type]
        for here, there in itertools.pairwise(grid.flip(0)):
            x, _ = process.step(x, _smooth(process)(x, here[None], torch.zeros(1)), here[None], there[None])
        left.append((x - latents).abs().max().item())
    assert left[1] < 0.75 * left[0]


@processes
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eta", [0.0, 0.1])
def test_a_batch_is_its_rows_one_by_one(process: noise.Process, method: Any, eta: float) -> None:
    """Each row has its own t; the published code takes the first one's for all."""
    latents, t = _draw(5, 2, 4, 4, seed=4), _times(process, [0.93, 0.0011, 0.31, 0.3, 0.99])

    def generators(rows: list[int]) -> list[torch.Generator]:
        return [noise.generator("row", row) for row in rows]

    together = invert(
        _smooth(process), process, latents, t, method=method, eta=eta, generators=generators([0, 1, 2, 3, 4])
    )
    for i in range(5):
        alone = invert(
            _smooth(process), process, latents[i : i + 1], t[i : i + 1], method=method, eta=eta,
            generators=generators([i]),
        )  # fmt: skip
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)
    assert not torch.equal(together[2], latents[2])


@processes
@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_told_the_timestep_that_is_reached(process: noise.Process, method: Any) -> None:
    """The last evaluation of every row is at its own t: no gap between the latent and what the model is told."""
    told: dict[int, list[float]] = {i: [] for i in range(3)}
    t = _times(process, [0.05, 0.42, 0.97])

    def predict(x: Tensor, now: Tensor, rows: Tensor) -> Tensor:
        for row, time in zip(rows.tolist(), now.tolist(), strict=True):
            told[row].append(time)
        return torch.zeros_like(x)

    invert(predict, process, _draw(3, 2, 4, 4), t, steps=10, method=method)
    for row, times in told.items():
        assert times[-1] == pytest.approx(t[row].item())
        assert times == sorted(times)
        assert len(times) == evaluations(process, t, 10, method)[row].item()


def test_the_mean_number_of_evaluations_is_below_the_grid() -> None:
    """Ten steps cost 5.5 evaluations on average: a row walks only the part of the grid below its t."""
    t = torch.arange(1000)
    assert evaluations(PROCESSES["eps"], t, 10, "ddim_inversion").double().mean().item() == pytest.approx(5.5)


@processes
def test_implied_noise_gives_the_inverted_latents_back(process: noise.Process) -> None:
    latents, t = _draw(3, 2, 4, 4, seed=5), _times(process, [0.1, 0.5, 0.9])
    noisy = invert(_smooth(process), process, latents, t)
    again = process.noisy(latents, t, process.implied_noise(noisy, latents, t))
    torch.testing.assert_close(again, noisy, rtol=1e-9, atol=1e-9)


# -------------------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module", name="adapters")
def _adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("models")
    folders: dict[str, Path] = {
        "eps": tiny_sd(home / "eps"), "v": tiny_sd(home / "v", "v_prediction"), "flow": tiny_sd3(home / "flow")
    }  # fmt: skip
    return {name: base.load(Model(path=folder)) for name, folder in folders.items()}


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("method", METHODS)
def test_a_models_batch_is_its_rows_one_by_one(adapters: dict[str, Any], kind: str, method: Any) -> None:
    adapter = adapters[kind]
    latents = _draw(3, *adapter.latent_shape(32, 32), seed=6).float()
    prompts = ["a red circle", "a blue square", "a photo"]
    t = torch.tensor([0.9, 0.15, 0.5]) if kind == "flow" else torch.tensor([900, 150, 500])
    condition = adapter.encode_prompt(prompts)

    def predictor(rows_of: list[int]) -> Any:
        def predict(x: Tensor, now: Tensor, rows: Tensor) -> Tensor:
            at = torch.tensor(rows_of)[rows]
            return adapter.predict(x, now, {name: value[at] for name, value in condition.items()})

        return predict

    together = invert(predictor([0, 1, 2]), adapter.process, latents, t, steps=4, method=method)
    for i in range(3):
        alone = invert(predictor([i]), adapter.process, latents[i : i + 1], t[i : i + 1], steps=4, method=method)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_sampling_from_the_inverted_latents_comes_back(adapters: dict[str, Any], kind: str) -> None:
    """Down again in the same steps: nearer to the start than from the noise of a plain draw."""
    adapter = adapters[kind]
    process, steps = adapter.process, 20
    latents = _draw(2, *adapter.latent_shape(32, 32), seed=7).float()
    condition = adapter.encode_prompt(["a red circle", "a blue square"])
    top = torch.full((2,), 0.8) if kind == "flow" else torch.full((2,), 799)

    def predict(x: Tensor, now: Tensor, rows: Tensor) -> Tensor:
        return adapter.predict(x, now, {name: value[rows] for name, value in condition.items()})

    def back(x: Tensor) -> float:
        levels = (
            [0.8 * j / 16 for j in range(16, -1, -1)] if kind == "flow" else [50 * j - 1 for j in range(16, -1, -1)]
        )
        for now, after in itertools.pairwise(levels):
            here, there = (torch.full((2,), value) for value in (now, after))
            with torch.no_grad():
                x, _ = process.step(x, predict(x, here, torch.arange(2)), here, there)
        return (x - latents).square().mean().item()

    inverted = back(invert(predict, process, latents, top, steps=steps, method="renoise"))
    drawn = back(process.noisy(latents, top, _draw(*latents.shape, seed=8).float()))
    assert inverted < 0.05 * drawn
