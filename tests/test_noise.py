"""The processes' identities, against float64 closed forms and diffusers' own schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
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
    noisy = noise.Process("eps", ABAR).noisy(latents, t, unit)
    target = noise.Process(kind, ABAR).target(latents, t, unit)
    x0, eps = noise.Process(kind, ABAR).to_x0_eps(noisy, target, t)
    torch.testing.assert_close(x0, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(eps, unit, rtol=0, atol=1e-5)


def test_noisy_latents_are_the_closed_form(latents: Tensor, unit: Tensor) -> None:
    abar = torch.cumprod(1 - BETAS, 0)[TIMES].reshape(-1, 1, 1, 1)
    expected = abar.sqrt() * latents.double() + (1 - abar).sqrt() * unit.double()
    torch.testing.assert_close(
        noise.Process("eps", ABAR).noisy(latents, TIMES, unit).double(), expected, rtol=0, atol=2e-6
    )


def test_unit_variance_is_preserved() -> None:
    latents, unit = _draw(1, 400_000, seed=3), _draw(1, 400_000, seed=4)
    for t in TIMES:
        variance = noise.Process("eps", ABAR).noisy(latents, t.reshape(1), unit).var().item()
        assert variance == pytest.approx(1, abs=0.01), int(t)


def test_v_error_is_eps_error_over_signal(latents: Tensor, unit: Tensor) -> None:
    """At a given x_t, eps - eps* = sqrt(abar) (v - v*): so the v-error is the eps-error divided by abar."""
    abar = ABAR.double()
    noisy = noise.Process("v", abar).noisy(latents.double(), TIMES, unit.double())
    true_v = noise.Process("v", abar).target(latents.double(), TIMES, unit.double())
    guess_v = true_v + 0.3 * _draw(*latents.shape, seed=5).double()
    _, guess_eps = noise.Process("v", abar).to_x0_eps(noisy, guess_v, TIMES)
    v_error = (guess_v - true_v).square().mean((1, 2, 3))
    eps_error = (guess_eps - unit).square().mean((1, 2, 3))
    torch.testing.assert_close(v_error, eps_error / abar[TIMES], rtol=2e-5, atol=0)


def test_a_prediction_in_eps_and_the_same_in_v_mean_the_same_x0(latents: Tensor, unit: Tensor) -> None:
    t = torch.full((len(latents),), 400)
    noisy = noise.Process("eps", ABAR).noisy(latents, t, unit)
    v = _draw(*latents.shape, seed=6)
    x0, eps = noise.Process("v", ABAR).to_x0_eps(noisy, v, t)
    again, same = noise.Process("eps", ABAR).to_x0_eps(noisy, eps, t)
    torch.testing.assert_close(again, x0, rtol=0, atol=1e-5)
    assert same is eps


def test_snr() -> None:
    expected = (ABAR.double() / (1 - ABAR.double()))[TIMES]
    torch.testing.assert_close(noise.Process("eps", ABAR).snr(TIMES).double(), expected, rtol=1e-4, atol=0)


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
        ours, x0 = noise.Process(kind, abar).step(noisy, prediction, torch.tensor([t]), previous)
        theirs = scheduler.step(prediction, t, noisy)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(x0, theirs.pred_original_sample, rtol=1e-5, atol=1e-5)


def test_ddim_steps_may_differ_within_a_batch() -> None:
    process, t = noise.Process("v", ABAR), torch.tensor([500, 600])
    noisy, prediction = _draw(2, 4, 2, 2, seed=1), _draw(2, 4, 2, 2, seed=2)
    both, x0 = process.step(noisy, prediction, t, torch.tensor([-1, 300]))
    assert torch.equal(both[0], x0[0])
    alone, _ = process.step(noisy[1:], prediction[1:], t[1:], torch.tensor([300]))
    assert torch.equal(both[1:], alone)


# ------------------------------------------------------------------------------------------------------- flow

FLOW = noise.Process("flow")
FLOW_TIMES = torch.tensor([0.0, 0.01, 0.25, 0.5, 0.9, 1.0])


def test_flow_is_the_straight_line(latents: Tensor, unit: Tensor) -> None:
    t = FLOW_TIMES.double().reshape(-1, 1, 1, 1)
    expected = (1 - t) * latents.double() + t * unit.double()
    noisy = FLOW.noisy(latents, FLOW_TIMES, unit)
    torch.testing.assert_close(noisy.double(), expected, rtol=0, atol=1e-6)
    velocity = FLOW.target(latents, FLOW_TIMES, unit)
    torch.testing.assert_close(velocity, unit - latents, rtol=0, atol=0)
    x0, eps = FLOW.to_x0_eps(noisy, velocity, FLOW_TIMES)
    torch.testing.assert_close(x0, latents, rtol=0, atol=1e-5)
    torch.testing.assert_close(eps, unit, rtol=0, atol=1e-5)
    implied = FLOW.implied_noise(noisy[1:], latents[1:], FLOW_TIMES[1:])
    torch.testing.assert_close(implied, unit[1:], rtol=0, atol=1e-4)  # divided by t = 0.01


def test_eps_error_is_v_error_times_one_minus_t_squared(latents: Tensor, unit: Tensor) -> None:
    """At a given x_t, eps - eps* = (1 - t) (v - v*): Flow-DPO's beta (1 - t)^2 is DPO on the eps-error."""
    t = FLOW_TIMES.double()
    noisy, true = FLOW.noisy(latents.double(), t, unit.double()), unit.double() - latents.double()
    guess = true + 0.3 * _draw(*latents.shape, seed=5).double()
    _, eps = FLOW.to_x0_eps(noisy, guess, t)
    v_error = (guess - true).square().mean((1, 2, 3))
    eps_error = (eps - unit).square().mean((1, 2, 3))
    torch.testing.assert_close(eps_error, (1 - t) ** 2 * v_error, rtol=1e-9, atol=1e-12)


def test_flow_step_is_diffusers_euler_step_and_comes_back() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    noisy, prediction = _draw(2, 4, 8, 8, seed=1), _draw(2, 4, 8, 8, seed=2)
    for now, after in zip(scheduler.sigmas[:-1], scheduler.sigmas[1:], strict=True):
        here, there = now.expand(2), after.expand(2)
        ours, x0 = FLOW.step(noisy, prediction, here, there)
        theirs = scheduler.step(prediction, now * 1000, noisy).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        again, _ = FLOW.step(ours, prediction, there, here)
        torch.testing.assert_close(again, noisy, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours, x0), "the last sigma is 0, the clean end"


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_times_are_the_density_they_say(shift: float) -> None:
    """Half of the shifted times lie below shift / (1 + shift), for any density with its median at one half."""
    for density in ("uniform", "logit_normal"):
        t = FLOW.sample_timesteps(40_000, noise.generator("t"), density=density, shift=shift).double()  # type: ignore[arg-type]
        assert t.min() > 0 and t.max() <= 1
        assert (t < shift / (1 + shift)).double().mean().item() == pytest.approx(0.5, abs=0.01)
        u = t / (shift - (shift - 1) * t)  # the shift undone
        if density == "uniform":
            assert u.mean().item() == pytest.approx(0.5, abs=0.01)
            assert u.var().item() == pytest.approx(1 / 12, abs=0.002)
        else:
            logits = torch.logit(u.clamp(1e-6, 1 - 1e-6))
            assert (logits.mean().item(), logits.std().item()) == pytest.approx((0, 1), abs=0.02)


def test_the_default_density_is_logit_normal_for_flow_and_uniform_else() -> None:
    again = FLOW.sample_timesteps(4, noise.generator("t"), density="logit_normal")
    assert torch.equal(FLOW.sample_timesteps(4, noise.generator("t")), again)
    discrete = noise.Process("eps", ABAR).sample_timesteps(4, noise.generator("t"))
    assert torch.equal(discrete, torch.randint(0, STEPS, (4,), generator=noise.generator("t")))


@pytest.mark.parametrize("process", [FLOW, noise.Process("v", ABAR)], ids=["flow", "v"])
def test_a_part_of_the_schedule_is_kept_to(process: noise.Process) -> None:
    t = process.sample_timesteps(2000, noise.generator("t"), density="uniform", low=0.25, high=0.5).double()
    share = t if process.kind == "flow" else t / STEPS
    assert share.min() >= 0.25 and share.max() < 0.5
    assert share.mean().item() == pytest.approx(0.375, abs=0.01)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shift_is_the_schedulers(kind: str) -> None:
    config = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, **config)
    for tokens in (64, 256, 1024, 4096):
        mu = 0.5 + (tokens - 256) * 0.65 / 3840
        scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1], mu=mu)
        ours = noise.shifted(torch.tensor([0.9, 0.5, 0.1]), noise.dynamic_shift(tokens, scheduler.config))
        torch.testing.assert_close(ours, scheduler.sigmas[:-1], rtol=1e-5, atol=0)


# ------------------------------------------------------------------------------------------------------- draws


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
