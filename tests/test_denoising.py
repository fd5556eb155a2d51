"""The guided sampler is the pipelines' own, its Gaussian steps keep marginals, and its costs are counted exactly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from mmalign import sample
from mmalign.guidance.denoising import Denoising, begin, candidate_seed, timesteps
from mmalign.jobs import SampleConfig
from mmalign.models.adapter import Adapter
from mmalign.noise import Process
from mmalign.testing import tiny, tiny_transformers, tiny_video

CPU = torch.device("cpu")
MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.tiny_sd,
    "sd-v": partial(tiny.tiny_sd, prediction_type="v_prediction"),
    "sdxl": tiny.tiny_sdxl,
    "sd3": tiny_transformers.tiny_sd3,
    "flux-dev": tiny_transformers.tiny_flux,
    "flux-schnell": partial(tiny_transformers.tiny_flux, dev=False),
    "pixart": tiny_transformers.tiny_pixart,
    "sana": tiny_transformers.tiny_sana,
    "qwen_image": tiny_transformers.tiny_qwen_image,
    "wan": tiny_video.tiny_wan,
    "cogvideox": tiny_video.tiny_cogvideox,
    "cogvideox-1.5": partial(tiny_video.tiny_cogvideox, kind="1.5"),
    "hunyuan_video": tiny_video.tiny_hunyuan_video,
    "hunyuan_video-undistilled": partial(tiny_video.tiny_hunyuan_video, embedded=False),
    "ltx": tiny_video.tiny_ltx,
    "animatediff": tiny_video.tiny_animatediff,
}
VIDEO = ("wan", "cogvideox", "cogvideox-1.5", "hunyuan_video", "hunyuan_video-undistilled", "ltx", "animatediff")
PROMPTS = ["a red circle", "a large green square", "a blue circle"]


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("families")
    (home / "prompts.txt").write_text("\n".join(PROMPTS))
    return home


def _settings(folder: Path, **changes: Any) -> SampleConfig:
    tree = {
        "model": {"path": folder}, "prompts": folder.parent / "prompts.txt", "output": folder.parent / "out",
        "device": "cpu", "height": 32, "width": 32, "steps": 4, **changes,
    }  # fmt: skip
    return SampleConfig.model_validate(tree)


def _begin(adapter: Adapter, config: SampleConfig, prompts: list[str] = PROMPTS, first: int = 5) -> Denoising:
    return begin(adapter, prompts, list(range(first, first + len(prompts))), config)


@pytest.fixture(scope="module", name="sd")
def _sd(home: Path) -> tuple[Adapter, SampleConfig]:
    config = _settings(tiny.tiny_sd(home / "tiny-sd"), scheduler="ddim", guidance_scale=3.0)
    return sample.load(config, CPU), config


# --------------------------------------------------------------------------------------- against the pipelines


@pytest.mark.parametrize("name", MAKERS)
def test_plain_sampling_is_the_pipelines_own_call(name: str, home: Path) -> None:
    """Initial noise, timesteps, guidance, steps and decoding at once: the pictures of `mmalign sample`."""
    folder = MAKERS[name](home / name)
    width = 32 if name == "cogvideox-1.5" else 64  # its rotary embedding takes squares alone at this size
    clips = {"frames": 9, "width": width} if name in VIDEO else {"width": width}
    plain = _settings(folder, **clips)
    adapter = sample.load(plain, CPU)
    steps = "euler" if adapter.process.kind == "flow" else "ddim"
    spaced = {} if steps == "euler" else {"timestep_spacing": "leading"}  # others are in the next test
    adapter = sample.load(_settings(folder, scheduler=steps, **clips), CPU)
    adapter.pipe.scheduler = type(adapter.pipe.scheduler).from_config(adapter.pipe.scheduler.config, **spaced)
    for scale, negative in ((1.0, ""), (3.0, ""), (3.0, "blue square")):
        what = f"{name}, scale {scale}, negative {negative!r}"
        config = _settings(folder, guidance_scale=scale, negative_prompt=negative, scheduler=steps, **clips)
        theirs = torch.from_numpy(
            adapter.draw(
                PROMPTS, [torch.Generator().manual_seed(5 + k) for k in range(3)], guidance_scale=scale,
                negative_prompts=[negative] * 3 if negative else None, num_inference_steps=4, height=32, width=width,
                **({"num_frames": 9} if name in VIDEO else {}),
            )
        )  # fmt: skip
        denoising = _begin(adapter, config)
        with torch.no_grad():
            pixels = denoising.pixels(denoising.plain(denoising.initial()))
        ours = pixels.permute(0, 2, 3, 4, 1) if name in VIDEO else pixels.permute(0, 2, 3, 1)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5, msg=what)
        branches = 1 if denoising.negative is None else 2
        assert [each.network_calls for each in denoising.spent] == [4 * branches] * 3
        assert [each.decodes for each in denoising.spent] == [1] * 3


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("to_one", [True, False])
def test_the_schedulers_own_spacing_and_end(
    spacing: str, to_one: bool, sd: tuple[Adapter, SampleConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Timesteps and last step are those of DDIM for every spacing, with set_alpha_to_one or without."""
    adapter, config = sd
    scheduler = diffusers.DDIMScheduler.from_config(
        adapter.pipe.scheduler.config, timestep_spacing=spacing, set_alpha_to_one=to_one, clip_sample=False
    )
    monkeypatch.setattr(adapter.pipe, "scheduler", scheduler)
    found = timesteps(adapter, 5, (4, 4, 4))
    scheduler.set_timesteps(5)
    assert found[:-1].tolist() == scheduler.timesteps.tolist()
    denoising = _begin(adapter, _settings(config.model.path, scheduler="ddim", guidance_scale=3.0, steps=5))
    x, prediction = (torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    theirs = scheduler.step(prediction, scheduler.timesteps[-1], x).prev_sample
    torch.testing.assert_close(denoising.step(x, prediction, 4), theirs, rtol=1e-5, atol=1e-6)


def test_more_steps_than_timesteps_are_refused(sd: tuple[Adapter, SampleConfig]) -> None:
    with pytest.raises(ValueError, match="steps: 1000 do not fit a schedule of 1000 timesteps; use fewer"):
        timesteps(sd[0], 1000, (4, 4, 4))


def test_neighbours_do_not_matter(sd: tuple[Adapter, SampleConfig]) -> None:
    """A request alone, among others and in another order: the same noise to the bit, latents to rounding.

    Networks in float64: float32 rounds otherwise in a batch of another size, and latents of 17 show it.
    """
    config = sd[1]
    adapter = sample.load(config, CPU)
    adapter.pipe.unet.double()
    adapter.pipe.text_encoder.double()
    prompts, seeds = [PROMPTS[k % 3] for k in range(8)], list(range(8))
    together = begin(adapter, prompts, seeds, config)
    drawn = together.plain(together.initial())
    for k in (0, 3, 7):
        alone = begin(adapter, [prompts[k]], [seeds[k]], config)
        assert torch.equal(alone.initial()[0], together.initial()[k])
        torch.testing.assert_close(alone.plain(alone.initial())[0], drawn[k], rtol=1e-6, atol=1e-6)
        first, second = (
            torch.randn(3, generator=each) for each in (alone.generator(0, "x"), together.generator(k, "x"))
        )
        assert torch.equal(first, second)
    turned = begin(adapter, prompts[::-1], seeds[::-1], config.model_copy(update={"batch_size": 3}))
    torch.testing.assert_close(turned.plain(turned.initial()).flip(0), drawn, rtol=1e-6, atol=1e-6)


def test_rows_choose_prompts_and_pay(sd: tuple[Adapter, SampleConfig]) -> None:
    adapter, config = sd
    denoising = _begin(adapter, config)
    latents = denoising.draw([1, 2, 3, 4])
    picked = denoising.predict(latents, 1, rows=[2, 0, 0, 2])
    assert [each.network_calls for each in denoising.spent] == [4, 0, 4]
    for k, row in enumerate([2, 0, 0, 2]):
        alone = begin(adapter, [PROMPTS[row]], [0], config)
        torch.testing.assert_close(alone.predict(latents[k : k + 1], 1)[0], picked[k], rtol=0, atol=1e-5)
    assert denoising.rows(6) == [0, 0, 1, 1, 2, 2]


def test_predictions_have_a_gradient(sd: tuple[Adapter, SampleConfig]) -> None:
    """Against a central difference along a direction, through guidance and estimate."""
    adapter, config = sd
    denoising = _begin(adapter, config, PROMPTS[:1])
    x = denoising.initial().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))

    def value(latents: Tensor) -> Tensor:
        return denoising.estimate(latents, denoising.predict(latents, 2), 2).double().square().mean()

    (gradient,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        step = 1e-2
        difference = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=2e-2)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in adapter.denoiser.parameters())


# ----------------------------------------------------------------------------------------- steps that add noise


def _abar() -> Tensor:
    return torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)


PROCESSES = {"eps": Process("eps", _abar()), "v": Process("v", _abar()), "flow": Process("flow")}


def _analytic(kind: str, mean: float, std: float, steps: int) -> Denoising:
    """The model that knows E[x_0 | x_t] of data from N(mean, std^2): latents [B, 1] in float64."""
    process = PROCESSES[kind]

    def predict(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        a, s = process.scales(t, x)
        x0 = mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)
        eps = (x - a * x0) / s
        return {"eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[kind]

    adapter: Any = SimpleNamespace(process=process, predict=predict, device=CPU, told=lambda value: nullcontext())
    spaced = torch.linspace(999, 0, steps + 1).long() if kind != "flow" else torch.linspace(1, 0, steps + 1)
    times = torch.cat([spaced[:-1], torch.tensor([process.clean], dtype=spaced.dtype)])
    return Denoising(adapter, ["one"], [0], (1,), 1.0, None, {}, None, times)


def _moments(denoising: Denoising, i: int, mean: Tensor, variance: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """The exact mean and variance after a step, which is linear for Gaussian data: from its value at two points."""
    values = []
    for x in (torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)):
        prediction = denoising.adapter.predict(x, denoising.times(i, 1), {})
        _, centre, std = denoising.stochastic_step(x, prediction, i, [torch.Generator().manual_seed(0)], eta)
        values.append(centre[0, 0])
    slope = values[1] - values[0]
    return values[0] + slope * mean, slope**2 * variance + std.flatten()[0] ** 2


def _end(kind: str, mean: float, std: float, steps: int, eta: float) -> tuple[float, float]:
    """Mean and variance of what is drawn, from x_T of the right distribution."""
    denoising = _analytic(kind, mean, std, steps)
    a, s = denoising.adapter.process.scales(denoising.times(0, 1), torch.zeros(1, dtype=torch.float64))
    at, variance = a[0] * mean, a[0] ** 2 * std**2 + s[0] ** 2
    for i in range(steps):
        at, variance = _moments(denoising, i, at, variance, eta)
    return at.item(), variance.item()


@pytest.mark.parametrize("kind", PROCESSES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_noisy_steps_keep_the_marginals_of_a_point_exactly(kind: str, eta: float) -> None:
    """Where x_0 and eps are known, x_t is N(a m, s^2) after every one of few steps."""
    denoising = _analytic(kind, 0.7, 0.0, 5)
    like = torch.zeros(1, dtype=torch.float64)
    a, s = denoising.adapter.process.scales(denoising.times(0, 1), like)
    mean, variance = a[0] * 0.7, s[0] ** 2
    for i in range(5):
        mean, variance = _moments(denoising, i, mean, variance, eta)
        a, s = denoising.adapter.process.scales(denoising.times(i + 1, 1), like)
        assert mean.item() == pytest.approx((a[0] * 0.7).item(), abs=1e-12)
        assert variance.item() == pytest.approx((s[0] ** 2).item(), abs=1e-12)


@pytest.mark.parametrize("kind", PROCESSES)
def test_noisy_steps_end_in_the_data_as_they_become_small(kind: str) -> None:
    errors = [abs(_end(kind, 0.7, 0.5, steps, 1.0)[1] - 0.25) for steps in (40, 160, 640)]
    assert errors[2] < 0.01 and errors[0] > 2 * errors[1] > 4 * errors[2], errors
    assert _end(kind, 0.7, 0.5, 160, 1.0)[0] == pytest.approx(0.7, abs=0.01)


def test_a_step_of_the_flows_sde_keeps_them_in_the_limit_alone() -> None:
    """Flow-GRPO's Euler-Maruyama step on a point: what it was not chosen for."""
    errors = []
    for steps in (5, 50):
        times = torch.linspace(0.95, 0, steps + 1, dtype=torch.float64)
        mean, variance = (1 - times[0]) * 0.7, times[0] ** 2
        for now, after in pairwise(times[:-1]):
            dt, g2 = after - now, 0.49 * now / (1 - now)
            slope = 1 + g2 / (2 * now) * dt + (1 + g2 * (1 - now) / (2 * now)) / now * dt
            mean = slope * mean - (1 + g2 * (1 - now) / (2 * now)) * 0.7 / now * dt
            variance = slope**2 * variance + g2 * -dt
        errors.append(abs(variance - times[-2] ** 2).item() / (times[-2] ** 2).item())
    assert errors[0] > 0.05 and errors[1] > 1e-3


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_noisy_steps_are_ddims_equations_12_and_16(kind: str) -> None:
    denoising, abar = _analytic(kind, 0.3, 0.8, 6), _abar()
    x = torch.randn(4, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    now, after = abar[denoising.timesteps[2]], abar[denoising.timesteps[3]]
    eps = torch.randn(4, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
    prediction = eps if kind == "eps" else now.sqrt() * eps - (1 - now).sqrt() * x0
    sigma = 0.6 * ((1 - after) / (1 - now)).sqrt() * (1 - now / after).sqrt()
    generators = [torch.Generator().manual_seed(k) for k in range(4)]
    z = torch.stack([torch.randn(1, generator=torch.Generator().manual_seed(k)) for k in range(4)]).double()
    expected = after.sqrt() * x0 + (1 - after - sigma**2).sqrt() * eps
    found, mean, std = denoising.stochastic_step(x, prediction, 2, generators, eta=0.6)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, expected + sigma * z, rtol=0, atol=1e-12)
    assert std.flatten().tolist() == pytest.approx([sigma.item()] * 4, abs=1e-12)


@pytest.mark.parametrize("kind", PROCESSES)
def test_no_eta_is_the_deterministic_step(kind: str) -> None:
    denoising = _analytic(kind, 0.3, 0.8, 6)
    x, prediction = torch.randn(2, 5, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generators = [torch.Generator().manual_seed(k) for k in range(5)]
    for i in (0, 3, 5):
        found, mean, std = denoising.stochastic_step(x, prediction, i, generators, eta=0.0)
        torch.testing.assert_close(found, denoising.step(x, prediction, i), rtol=0, atol=1e-12)
        assert torch.equal(found, mean) and not std.any()


@pytest.mark.parametrize("kind", PROCESSES)
def test_going_back_keeps_the_marginals(kind: str) -> None:
    """x_t of any data taken to a noisier time is q(x_0 -> that time): signal and noise combine exactly."""
    process = PROCESSES[kind]
    at, to = (torch.tensor([value]) for value in ((300, 800) if kind != "flow" else (0.3, 0.8)))
    zero = torch.zeros(1, dtype=torch.float64)
    (a, s), (b, r) = process.scales(at, zero), process.scales(to, zero)
    one = torch.ones(1, dtype=torch.float64)
    slope = process.diffused(one, at, to, 0 * one)
    spread = process.diffused(0 * one, at, to, one)
    assert (slope * a).item() == pytest.approx(b.item(), abs=1e-12)
    assert ((slope * s) ** 2 + spread**2).item() == pytest.approx((r**2).item(), abs=1e-12)
    assert torch.equal(process.diffused(one, at, at, one), one)


# --------------------------------------------------------------------------------------------- what goes wrong


def test_latents_that_overflow_stop_the_run(sd: tuple[Adapter, SampleConfig]) -> None:
    adapter, config = sd
    denoising = begin(adapter, PROMPTS, [0, 1, 2], config, strategy="nrg", lower="scale")
    latents = denoising.initial()
    latents[1, 0, 0, 0] = float("nan")
    match = r"guidance nrg: 1 of 3 latents are not finite after step 3 of 4, .*lower guidance\.scale, or use a lower"
    with pytest.raises(ValueError, match=match):
        denoising.step(latents, torch.zeros_like(latents), 2)


def test_pixels_that_overflow_stop_the_run(sd: tuple[Adapter, SampleConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, config = sd
    denoising = begin(adapter, PROMPTS, [0, 1, 2], config, strategy="search")
    decode = adapter.decode
    monkeypatch.setattr(
        adapter, "decode", lambda latents: decode(latents) / (latents[:, :3, :1, :1] != latents[0, 0, 0, 0])
    )
    with pytest.raises(ValueError, match=r"guidance search: 1 of 3 decoded latents are not finite.*use a lower"):
        denoising.reward(None, denoising.initial())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart"])
def test_the_size_is_the_pipelines_own_by_default(name: str, home: Path) -> None:
    folder = MAKERS[name](home / f"{name}-size")
    config = _settings(folder, height=None, width=None, steps=1)
    adapter = sample.load(config, CPU)
    drawn = adapter.draw(PROMPTS[:1], [torch.Generator()], guidance_scale=1.0, num_inference_steps=1)
    assert drawn.shape[1:3] == adapter.default_size()
    assert _begin(adapter, config).shape == adapter.latent_shape(*adapter.default_size())


def test_seeds_of_candidates_are_seeds_of_their_own() -> None:
    found = {(seed, k): candidate_seed(seed, k) for seed in range(20) for k in range(50)}
    assert all(found[seed, 0] == seed for seed in range(20))
    assert len(set(found.values())) == len(found) and min(found.values()) >= 0 and max(found.values()) < 2**32
    assert candidate_seed(7, 3) == candidate_seed(7, 3)
