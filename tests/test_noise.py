"""The processes' identities, against float64 closed forms and diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from mmalign import noise

STEPS = 1000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
ABAR = torch.cumprod(1 - BETAS, 0).float()
TIMES = torch.tensor([0, 1, 250, 500, 998, 999])


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(name="latents")
def _latents() -> Tensor:
    return _draw(len(TIMES), 4, 8, 8, seed=1)


@pytest.fixture(name="unit")
def _unit() -> Tensor:
    return _draw(len(TIMES), 4, 8, 8, seed=2)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("trailing", [(4, 8, 8), (4, 3, 8, 8), (7,)])
def test_the_true_target_gives_back_latents_and_noise(kind: noise.Parameterisation, trailing: tuple[int, ...]) -> None:
    # Not the last timesteps: dividing by sqrt(abar) = 0.07 there multiplies float32's rounding for eps.
    t = torch.tensor([0, 1, 250, 500, 700, 800])
    latents, unit = _draw(len(t), *trailing, seed=1), _draw(len(t), *trailing, seed=2)
    noisy = noise.add_noise(latents, unit, t, ABAR)
    target = noise.target(kind, latents, unit, t, ABAR)
    x0, eps = noise.to_x0_eps(kind, noisy, target, t, ABAR)
    torch.testing.assert_close(x0, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(eps, unit, rtol=0, atol=1e-5)


def test_noisy_latents_are_the_closed_form(latents: Tensor, unit: Tensor) -> None:
    abar = torch.cumprod(1 - BETAS, 0)[TIMES].reshape(-1, 1, 1, 1)
    expected = abar.sqrt() * latents.double() + (1 - abar).sqrt() * unit.double()
    torch.testing.assert_close(noise.add_noise(latents, unit, TIMES, ABAR).double(), expected, rtol=0, atol=2e-6)


def test_unit_variance_is_preserved() -> None:
    latents, unit = _draw(1, 400_000, seed=3), _draw(1, 400_000, seed=4)
    for t in TIMES:
        variance = noise.add_noise(latents, unit, t.reshape(1), ABAR).var().item()
        assert variance == pytest.approx(1, abs=0.01), int(t)


def test_v_error_is_eps_error_over_signal(latents: Tensor, unit: Tensor) -> None:
    """At a given x_t, eps - eps* = sqrt(abar) (v - v*): so the v-error is the eps-error divided by abar."""
    abar = ABAR.double()
    noisy = noise.add_noise(latents.double(), unit.double(), TIMES, abar)
    true_v = noise.target("v", latents.double(), unit.double(), TIMES, abar)
    guess_v = true_v + 0.3 * _draw(*latents.shape, seed=5).double()
    _, guess_eps = noise.to_x0_eps("v", noisy, guess_v, TIMES, abar)
    v_error = (guess_v - true_v).square().mean((1, 2, 3))
    eps_error = (guess_eps - unit).square().mean((1, 2, 3))
    torch.testing.assert_close(v_error, eps_error / abar[TIMES], rtol=2e-5, atol=0)


def test_a_prediction_in_eps_and_the_same_in_v_mean_the_same_x0(latents: Tensor, unit: Tensor) -> None:
    t = torch.full((len(latents),), 400)
    noisy = noise.add_noise(latents, unit, t, ABAR)
    v = _draw(*latents.shape, seed=6)
    x0, eps = noise.to_x0_eps("v", noisy, v, t, ABAR)
    again, same = noise.to_x0_eps("eps", noisy, eps, t, ABAR)
    torch.testing.assert_close(again, x0, rtol=0, atol=1e-5)
    assert same is eps


def test_snr() -> None:
    expected = (ABAR.double() / (1 - ABAR.double()))[TIMES]
    torch.testing.assert_close(noise.snr(TIMES, ABAR).double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("kind", "name"), [("eps", "epsilon"), ("v", "v_prediction")])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_step_is_diffusers_step(kind: noise.Parameterisation, name: str, to_one: bool) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=to_one,
        prediction_type=name, steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(20)
    stride = STEPS // 20
    abar = scheduler.alphas_cumprod
    for t in scheduler.timesteps.tolist():
        noisy, prediction = _draw(1, 4, 8, 8, seed=t), _draw(1, 4, 8, 8, seed=t + 1)
        # Past the first timestep diffusers takes abar = 1, or abar_0 with set_alpha_to_one off; ours are -1 and 0.
        previous = torch.tensor([t - stride if t >= stride else (-1 if to_one else 0)])
        x0, eps = noise.to_x0_eps(kind, noisy, prediction, torch.tensor([t]), abar)
        ours = noise.ddim_step(noisy, x0, eps, previous, abar)
        theirs = scheduler.step(prediction, t, noisy)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x0, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)


def test_ddim_steps_may_differ_within_a_batch() -> None:
    noisy, x0, eps = _draw(2, 4, 2, 2, seed=1), _draw(2, 4, 2, 2, seed=2), _draw(2, 4, 2, 2, seed=3)
    both = noise.ddim_step(noisy, x0, eps, torch.tensor([-1, 300]), ABAR)
    assert torch.equal(both[0], x0[0])
    assert torch.equal(both[1:], noise.ddim_step(noisy[1:], x0[1:], eps[1:], torch.tensor([300]), ABAR))


def test_draws_depend_on_what_they_are_for_alone() -> None:
    torch.manual_seed(1)
    first = torch.randn(5, generator=noise.generator("train", 0, "pair", 3))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(first, torch.randn(5, generator=noise.generator("train", 0, "pair", 3)))
    assert torch.equal(state, torch.get_rng_state()), "the global stream must stay untouched"
    others = [("train", 1, "pair", 3), ("train", 0, "pair", 4), ("train", 0, "other", 3), ("step", 0, "pair", 3)]
    assert all(not torch.equal(first, torch.randn(5, generator=noise.generator(*other))) for other in others)


def test_draws_are_the_same_on_every_machine() -> None:
    """The numbers themselves: a change of the seeding would silently change every run that is resumed."""
    assert noise.generator("order", 0, 0).initial_seed() == 111427634045840773
