"""Sampling led by gradients: of rewards on noisy latents (nrg), of evaluators at the decoded estimate (gradient)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latent_kit import PROMPTS, loaded, settings, table
from torch import Tensor

from mmalign import sample
from mmalign.backbones.latent_reward import load_latent
from mmalign.config import build
from mmalign.guidance.denoising import Denoising, begin
from mmalign.guidance.gradient import gradient, plain_jacobian
from mmalign.guidance.nrg import Guide, nrg
from mmalign.guidance.rewards import Rewards
from mmalign.jobs import SampleConfig
from mmalign.jobs_align import RewardSpec
from mmalign.jobs_guidance import NRG, Gradient
from mmalign.media import read_image
from mmalign.noise import Process
from mmalign.tasks.reward import RewardTask
from mmalign.testing import tiny, tiny_transformers, tiny_video

CPU = torch.device("cpu")
MAKERS: dict[str, Any] = {
    "sd": tiny.tiny_sd,
    "sd-v": partial(tiny.tiny_sd, prediction_type="v_prediction"),
    "sd3": tiny_transformers.tiny_sd3,
    "flux": tiny_transformers.tiny_flux,
    "wan": tiny_video.tiny_wan,
}
families = pytest.mark.parametrize("family", MAKERS)


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Pipelines, and for each a reward of two axes with random weights, made once."""
    place = tmp_path_factory.mktemp("guided")
    data = table(place, 4, axes=True)
    (place / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    made: dict[str, Path] = {}

    def make(family: str) -> tuple[Path, Path]:
        if family not in made:
            made[family] = MAKERS[family](place / family)
            clips = {
                "data__table": None,
                "data__shapes": {"scenes": 3, "annotator": "balanced"},
                "data__frames": 9,
                "data__fps": 8,
            }
            wanted = settings(
                place / "x", made[family], data, data__axes=["dark", "bright"] if family != "wan" else ["VQ", "MQ"],
                data__ties="soft", loss={"kind": "btt"}, reward__latent={"blocks": 1, "hidden": [16]},
                **(clips if family == "wan" else {}),
            )  # fmt: skip
            torch.manual_seed(0)
            task = RewardTask(wanted, CPU)
            with torch.no_grad():
                torch.nn.init.normal_(task.source.module.head.time[2].weight, std=0.1)
            task.export(place / f"{family}-reward")
        return made[family], place / f"{family}-reward"

    make.place = place  # type: ignore[attr-defined]
    return make


def config(home: Any, family: str, guidance: dict[str, Any], **changes: Any) -> SampleConfig:
    tree = {
        "model": {"path": str(home(family)[0])}, "prompts": str(home.place / "prompts.txt"),
        "output": str(home.place / "out"), "device": "cpu", "height": 32, "width": 32, "steps": 5,
        "guidance_scale": 3.0, "batch_size": 3, "guidance": guidance, **({"frames": 9} if family == "wan" else {}),
        **changes,
    }  # fmt: skip
    return build(SampleConfig, tree, "test")


def latent(home: Any, family: str, **changes: Any) -> dict[str, Any]:
    named = {"dark": "VQ", "bright": "MQ"} if family == "wan" else {}
    rewards = [
        {
            "name": "latent_reward", "params": {"model": str(home(family)[1])}, "subscore": named.get(axis, axis),
            "weight": weight,
        }
        for axis, weight in changes.pop("weights", {"dark": 1.0, "bright": 0.5}).items()
    ]  # fmt: skip
    return {"kind": "nrg", "rewards": rewards, **changes}


def started(adapter: Any, wanted: SampleConfig) -> Denoising:
    if wanted.guidance_scale > 1 and adapter.family == "flux":
        wanted = wanted.model_copy(update={"negative_prompt": "a blue square"})
    kind: Any = wanted.guidance
    return begin(adapter, list(PROMPTS[:3]), [3, 4, 5], wanted, kind.kind, kind.lower)


def quiet(_: float, __: float | None) -> None:
    pass


def no_rewards(denoising: Denoising) -> Rewards:
    rewards = Rewards([], [])
    rewards.spent = denoising.spent
    return rewards


def signal_noise(adapter: Any, t: Tensor) -> tuple[float, float]:
    if adapter.process.kind == "flow":
        return 1 - t.item(), t.item()
    abar = adapter.process.alphas_cumprod[t.item()].item() if t.item() >= 0 else 1.0
    return abar**0.5, (1 - abar) ** 0.5


# ------------------------------------------------------------------------------------------------------------- nrg


@families
def test_nrg_is_guidance_first_and_then_the_shift(family: str, home: Any) -> None:
    """The whole trajectory, written out: both branches, their mixture, the gradient at the noisy latents, the step."""
    pipeline, folder = home(family)
    adapter = loaded(pipeline)
    wanted = config(home, family, latent(home, family, scale=0.7, skip_above=0.7, max_ratio=1.5))
    denoising = started(adapter, wanted)
    assert isinstance(wanted.guidance, NRG)
    outcome = nrg(denoising, no_rewards(denoising), wanted.guidance, quiet)
    other = started(adapter, wanted)
    reward, x, kind, led = load_latent(folder, adapter), other.initial(), adapter.process.kind, 0
    for i in range(other.steps):
        t = other.times(i, 3)
        a, s = signal_noise(adapter, t[0])
        with torch.no_grad(), adapter.told(other.embedded):
            towards = adapter.predict(x, t, other.condition).float()
            away = adapter.predict(x, t, other.negative).float()
        prediction = away + 3.0 * (towards - away)
        share = t[0].item() if kind == "flow" else t[0].item() / 999
        if share <= 0.7:
            y = x.clone().requires_grad_(True)
            scores = reward.scores(adapter, y, t, other.condition)
            (found,) = torch.autograd.grad((scores[:, 0] + 0.5 * scores[:, 1]).sum(), y)
            ratio = min(1.5, s / a)
            prediction = prediction - 0.7 * (ratio * a if kind == "eps" else ratio) * found
            led += 1
        b, r = signal_noise(adapter, other.timesteps[i + 1])
        if kind == "flow":
            x = x + (r - s) * prediction
        else:
            eps = prediction if kind == "eps" else a * prediction + s * x
            x0 = (x - s * eps) / a
            x = b * x0 + r * eps
    torch.testing.assert_close(outcome.latents, x, atol=2e-4, rtol=2e-4)
    assert 0 < led < other.steps and all(record["guided"] == led for record in outcome.records)
    assert all(spent.reward_gradients == led and spent.network_calls == 2 * 5 for spent in denoising.spent)


@families
def test_nrg_raises_what_it_follows(family: str, home: Any) -> None:
    """A small weight raises the reward of the finished latents, its negative axis lowers it; 0 is plain sampling."""
    pipeline, folder = home(family)
    adapter = loaded(pipeline)
    reward = load_latent(folder, adapter)

    def drawn(scale: float, axis: str = "dark") -> tuple[Tensor, Tensor]:
        wanted = config(home, family, latent(home, family, scale=scale, weights={axis: 1.0}), steps=8)
        denoising = started(adapter, wanted)
        assert isinstance(wanted.guidance, NRG)
        latents = nrg(denoising, no_rewards(denoising), wanted.guidance, quiet).latents
        t = torch.zeros(3, dtype=torch.float32 if adapter.process.kind == "flow" else torch.int64)
        return latents, reward.scores(adapter, latents, t, denoising.condition)

    plain, before = drawn(0.0)
    other = started(adapter, config(home, family, latent(home, family)))
    whole = started(adapter, config(home, family, latent(home, family), steps=8))
    assert torch.equal(plain, whole.plain(whole.initial())) and other.steps == 5
    for column, axis in enumerate(("dark", "bright")):
        after = drawn(0.05, axis)[1]
        assert (after - before)[:, column].mean() > 0


def test_weights_combine_gradients(home: Any) -> None:
    """Several objectives: the gradient of a weighted sum is the weighted sum of gradients, also over two folders."""
    pipeline, folder = home("sd3")
    adapter = loaded(pipeline)
    denoising = started(adapter, config(home, "sd3", latent(home, "sd3")))
    x, t = denoising.initial(), denoising.times(2, 3)

    def of(**weights: float) -> Tensor:
        specs = [
            RewardSpec(name="latent_reward", params={"model": str(folder)}, subscore=axis, weight=weight)
            for axis, weight in weights.items()
        ]
        return Guide(specs, adapter).gradient(adapter, x, t, denoising.condition)[0]

    torch.testing.assert_close(of(dark=1.0, bright=0.5), of(dark=1.0) + 0.5 * of(bright=1.0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(of(overall=2.0), of(dark=1.0) + of(bright=1.0), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(of(dark=1.0, bright=0.0), of(dark=1.0))
    with pytest.raises(ValueError, match="has the axes dark, bright, not 'TA'"):
        of(TA=1.0)


def test_gradient_of_the_reward_against_finite_differences(home: Any) -> None:
    """Through embeddings, blocks, pooling and head at once; float32, so a wide step and a loose bound."""
    pipeline, _ = home("sd3")
    adapter = loaded(pipeline)
    denoising = started(adapter, config(home, "sd3", latent(home, "sd3")))
    guide = Guide(build_specs(home, "sd3"), adapter)
    x, t = denoising.initial(), denoising.times(2, 3)
    found, value = guide.gradient(adapter, x, t, denoising.condition)
    assert value.shape == (3,)
    for seed in range(3):
        way = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            up, down = (guide(adapter, x + sign * 0.01 * way, t, denoising.condition) for sign in (1, -1))
        slope = (up - down) / 0.02
        exact = (found * way).flatten(1).sum(1)
        torch.testing.assert_close(slope, exact, atol=0.02 * exact.abs().max().item(), rtol=0.05)


def build_specs(home: Any, family: str) -> list[RewardSpec]:
    return [RewardSpec(name="latent_reward", params={"model": str(home(family)[1])}, subscore="dark")]


def test_a_weight_that_breaks_latents_is_named(home: Any) -> None:
    wanted = config(home, "sd3", latent(home, "sd3", scale=1e38))
    denoising = started(loaded(home("sd3")[0]), wanted)
    assert isinstance(wanted.guidance, NRG)
    with pytest.raises(ValueError, match=r"guidance nrg: 3 of 3 latents are not finite .* lower guidance.scale"):
        nrg(denoising, no_rewards(denoising), wanted.guidance, quiet)


def test_from_the_command_line(home: Any, tmp_path: Path) -> None:
    """Pictures that do not depend on the batch, a summary with each axis' gain, costs, and a held-out score."""
    guidance = latent(home, "sd3", scale=0.5, weights={"dark": 1.0, "bright": 0.0})
    guidance["held_out"] = [{"name": "hps", "params": {"checkpoint": "assets/shapes-clip"}}]
    changes = {"guidance_scale": 1.0, "steps": 4}
    for size in (1, 3):
        sample.run(config(home, "sd3", guidance, output=str(tmp_path / str(size)), batch_size=size, **changes))
    names = sorted(path.name for path in (tmp_path / "1" / "images").iterdir())
    assert len(names) == 3
    for name in names:
        one, other = (read_image(str(tmp_path / size / "images" / name)).astype(int) for size in ("1", "3"))
        assert np.abs(one - other).max() <= 1
    found = json.loads((tmp_path / "3" / "guidance.json").read_text())
    assert set(found["rewards"]) == {"latent_reward/dark", "latent_reward/bright"}
    assert (
        abs(found["rewards"]["latent_reward/dark"]["gain"]["mean"]) > 0 and found["held_out"]["hps"]["gain"]["n"] == 3
    )
    assert found["cost"]["reward_gradients"] == 3 and found["cost"]["network_calls"] == 4


def test_nrg_needs_rewards_of_latents(home: Any) -> None:
    with pytest.raises(ValueError, match="hps scores finished media, and nrg follows rewards of noisy latents"):
        config(home, "sd3", {"kind": "nrg", "rewards": [{"name": "hps", "params": {}}]})
    with pytest.raises(ValueError, match="latent_reward needs params"):
        config(home, "sd3", {"kind": "nrg", "rewards": [{"name": "latent_reward"}]})
    wanted = config(home, "sd", latent(home, "sd3"))
    denoising = started(loaded(home("sd")[0]), wanted)
    assert isinstance(wanted.guidance, NRG)
    with pytest.raises(ValueError, match="predicts flow, and this one predicts eps"):
        nrg(denoising, no_rewards(denoising), wanted.guidance, quiet)


# -------------------------------------------------------------------------------------------------------- gradient


class Brightness(Rewards):
    """How bright the left half of a picture is, or of a clip's frames: a reward whose gradient is easy to see."""

    def __init__(self, denoising: Denoising):
        super().__init__([], [])
        self.spent = denoising.spent

    def tensor(self, pixels: Tensor, prompts: Any, rows: Any = None) -> Tensor:
        self._count("reward_gradients", len(pixels), rows)
        return pixels[..., : pixels.shape[-1] // 2].flatten(1).mean(1)


def pulled(home: Any, family: str, seeds: int = 3, **changes: Any) -> tuple[Tensor, Denoising, Any]:
    guidance = {"kind": "gradient", "rewards": [{"name": "hps", "params": {}}], **changes}
    wanted = config(home, family, guidance, steps=6)
    adapter = loaded(home(family)[0])
    denoising = started(adapter, wanted)
    if seeds == 1:
        denoising = begin(adapter, [PROMPTS[1]], [4], wanted, "gradient", "scale")
    assert isinstance(wanted.guidance, Gradient)
    outcome = gradient(denoising, Brightness(denoising), wanted.guidance, quiet)
    return outcome.latents, denoising, outcome


def bright(denoising: Denoising, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return Brightness(denoising).tensor(denoising.pixels(latents), denoising.prompts)


@families
@pytest.mark.parametrize("through", [True, False])
def test_gradient_raises_what_it_follows(family: str, through: bool, home: Any) -> None:
    """At every row, with the denoiser differentiated or not; scale 0 is plain sampling."""
    plain, denoising, _ = pulled(home, family, scale=0.0, through_denoiser=through)
    again = started(denoising.adapter, config(home, family, latent(home, family), steps=6))
    torch.testing.assert_close(plain, again.plain(again.initial()), atol=1e-5, rtol=1e-5)
    led, denoising, outcome = pulled(home, family, scale=0.15, through_denoiser=through)
    assert (bright(denoising, led) > bright(denoising, plain)).all()
    sizes = [record["mean_shift"] for record in outcome.records]
    assert sizes == pytest.approx([0.15] * 3, rel=1e-3)


def test_gradient_through_the_denoiser_against_finite_differences(home: Any) -> None:
    """What moves the prediction is -(t / (1 - t)) scale d reward(decode(x_0(x_t))) / d x_t, by central differences."""
    adapter = loaded(home("sd3")[0])
    guidance = {"kind": "gradient", "rewards": [{"name": "hps", "params": {}}], "normalise": False, "scale": 5.0}
    wanted = config(home, "sd3", guidance, steps=1)
    denoising = started(adapter, wanted)
    denoising.timesteps = torch.tensor([0.6, 0.0])
    x = denoising.initial()
    assert isinstance(wanted.guidance, Gradient)
    end = gradient(denoising, Brightness(denoising), wanted.guidance, quiet).latents
    with torch.no_grad():
        prediction = denoising.predict(x, 0)
        moved = (denoising.step(x, prediction, 0) - end) / -0.6  # a step of -0.6 by the change of the velocity
        for seed in range(3):
            way = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
            ends = [x + sign * 0.02 * way for sign in (1, -1)]
            up, down = (bright(denoising, denoising.estimate(y, denoising.predict(y, 0), 0)) for y in ends)
            slope = (up - down) / 0.04
            exact = (moved * way).flatten(1).sum(1) / (5.0 * 0.6 / 0.4)
            torch.testing.assert_close(slope, exact, atol=0.05 * slope.abs().max().item(), rtol=0.05)


def test_what_stands_for_the_jacobian_is_that_of_a_unit_gaussian() -> None:
    """d E[x_0 | x_t] / d x_t for x_0 ~ N(0, 1), from the formula of the posterior mean, at every kind of process."""
    abar = torch.tensor([0.9, 0.4, 0.0])
    for process, t, pairs in (
        (Process("flow"), torch.tensor([0.0, 0.3, 1.0]), [(1, 0), (0.7, 0.3), (0, 1)]),
        (Process("v", abar), torch.tensor([0, 1, 2]), [(abar[i] ** 0.5, (1 - abar[i]) ** 0.5) for i in range(3)]),
    ):
        found = plain_jacobian(process, t, torch.zeros(3, 2))[:, 0].tolist()
        assert found == pytest.approx([float(a / (a**2 + s**2)) for a, s in pairs], abs=1e-6)


def test_recurrence_range_and_costs(home: Any) -> None:
    """Only steps within [stop, start] are led, each as often as asked, and each time the end is noised anew."""
    once, denoising, outcome = pulled(home, "sd3", start=0.85, stop=0.3)
    active = [t for t in denoising.timesteps[:-1].tolist() if 0.3 <= t <= 0.85]
    assert 0 < len(active) < 6 and all(record["guided"] == len(active) for record in outcome.records)
    twice, denoising, outcome = pulled(home, "sd3", start=0.85, stop=0.3, recurrence=3)
    assert all(record["guided"] == 3 * len(active) for record in outcome.records)
    assert all(spent.network_calls == 2 * (6 + 2 * len(active)) for spent in denoising.spent)
    assert all(spent.reward_gradients == spent.decodes == 3 * len(active) for spent in denoising.spent)
    assert not torch.allclose(once, twice, atol=1e-2)
    again, _, _ = pulled(home, "sd3", start=0.85, stop=0.3, recurrence=3)
    assert torch.equal(again, twice)
    alone, _, _ = pulled(home, "sd3", 1, start=0.85, stop=0.3, recurrence=3)
    torch.testing.assert_close(alone[0], twice[1], atol=1e-4, rtol=1e-4)


def test_decoding_twice_changes_nothing(home: Any) -> None:
    plain, _, _ = pulled(home, "sd", scale=0.1)
    saved, _, _ = pulled(home, "sd", scale=0.1, checkpoint=True)
    torch.testing.assert_close(plain, saved, atol=1e-5, rtol=1e-5)


def test_a_reward_without_a_gradient_is_named_with_alternatives(home: Any, tmp_path: Path) -> None:
    guidance = {"kind": "gradient", "rewards": [{"name": "shapes_truth"}]}
    with pytest.raises(ValueError, match=r"shapes_truth cannot be differentiated.*hps.*without gradients: best_of_n"):
        sample.run(config(home, "sd", guidance, output=str(tmp_path / "out")))
    with pytest.raises(ValueError, match=r"stop \(0.9\) is not below start \(0.5\)"):
        config(home, "sd", {"kind": "gradient", "rewards": [{"name": "hps"}], "start": 0.5, "stop": 0.9})


def test_gradient_of_a_real_evaluator_from_the_command_line(home: Any, tmp_path: Path) -> None:
    """HPS on its own towers leads; its score rises over the plain pictures of the same seeds."""
    guidance = {
        "kind": "gradient", "scale": 0.2, "start": 1.0,
        "rewards": [{"name": "hps", "params": {"checkpoint": "assets/shapes-clip"}}],
    }  # fmt: skip
    sample.run(config(home, "sd", guidance, output=str(tmp_path / "out"), steps=6))
    found = json.loads((tmp_path / "out" / "guidance.json").read_text())
    assert found["reward"]["gain"]["mean"] > 0 and found["cost"]["reward_gradients"] == 6


def test_clips_from_the_command_line(home: Any, tmp_path: Path) -> None:
    """A video model led on one axis of its latent reward; the other axis and the truth are told beside it."""
    guidance = latent(home, "wan", scale=0.3, weights={"dark": 1.0, "bright": 0.0})
    guidance["held_out"] = [{"name": "shapes_motion"}]
    (tmp_path / "prompts.txt").write_text("a red circle moves left\na blue square moves right quickly\n")
    changes = {"prompts": str(tmp_path / "prompts.txt"), "steps": 3, "fps": 8.0}
    sample.run(config(home, "wan", guidance, output=str(tmp_path / "out"), **changes))
    found = json.loads((tmp_path / "out" / "guidance.json").read_text())
    assert set(found["rewards"]) == {"latent_reward/VQ", "latent_reward/MQ"}
    assert {"shapes_motion/VQ", "shapes_motion/MQ", "shapes_motion/TA"} <= set(found["held_out"])
    assert found["requests"] == 2 and found["cost"]["reward_gradients"] == 2
