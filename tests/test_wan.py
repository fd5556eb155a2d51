"""Wan 2.2: two transformers of which one is trained (A14B), and times for each token (TI2V-5B); on the real classes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from scipy.stats import kstest, norm
from training_kit import config
from wan_kit import clip_pairs, tiny_a14b, tiny_ti2v

from mmalign import memory, sample, train
from mmalign.jobs import SampleConfig
from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.noise import Process
from mmalign.tasks.preference import PreferenceTask

PROMPTS = ["a red circle", "a blue square moves left"]
BOUNDARY = 0.875


@pytest.fixture(scope="module", name="a14b")
def _a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_a14b(tmp_path_factory.mktemp("a14b") / "model", BOUNDARY)


def settings(folder: Path, model: Path, **changes: Any) -> Any:
    told = {"loss": {"kind": "flow_dpo", "beta": 50.0}, "data__frames": 9, **changes}
    table = folder / "pairs.jsonl"
    return config(folder / "run", model, table if table.exists() else clip_pairs(folder), **told)


@contextmanager
def calls_of(module: torch.nn.Module) -> Iterator[list[dict[str, Any]]]:
    """What is fed to a transformer by name, and its output."""
    calls: list[dict[str, Any]] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append({**kwargs, **({"hidden_states": args[0]} if args else {}), "output": output[0]})

    handle = module.register_forward_hook(hook, with_kwargs=True)
    yield calls
    handle.remove()


def drawn(pipe: Any, steps: int) -> np.ndarray:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    with torch.no_grad():
        found: np.ndarray = pipe(
            PROMPTS, generator=generators, num_inference_steps=steps, guidance_scale=1.0, height=32, width=32,
            num_frames=9, output_type="np",
        ).frames  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------- two transformers


def test_each_time_is_asked_of_the_transformer_that_the_pipeline_asks(a14b: Path) -> None:
    adapter: Any = base.load(Model(path=a14b))
    pipe = adapter.pipeline()
    with calls_of(pipe.transformer) as high, calls_of(pipe.transformer_2) as low:
        drawn(pipe, 6)
    assert high and low
    condition = adapter.encode_prompt(PROMPTS)
    for call in [*high, *low]:
        t = call["timestep"].float() / 1000
        with torch.no_grad():
            ours = adapter.predict(call["hidden_states"], t, condition)
        torch.testing.assert_close(ours, call["output"], rtol=0, atol=1e-5)
    assert (
        min(float(c["timestep"].min()) for c in high) >= 1000 * BOUNDARY > max(float(c["timestep"].max()) for c in low)
    )


def test_rows_of_both_parts_of_the_schedule_can_share_a_batch(a14b: Path) -> None:
    adapter: Any = base.load(Model(path=a14b))
    latents = torch.randn(3, *adapter.latent_shape(32, 32, 9), requires_grad=True)
    condition = adapter.encode_prompt([*PROMPTS, "x"])
    t = torch.tensor([0.9, 0.2, BOUNDARY])
    together = adapter.predict(latents, t, condition)
    for i, model in enumerate((adapter.pipe.transformer, adapter.pipe.transformer_2, adapter.pipe.transformer)):
        own = {name: value[i : i + 1] for name, value in condition.items()}
        alone = adapter.predict(latents[i : i + 1], t[i : i + 1], own, model)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(together.square().sum(), latents)[0]
    assert (gradients.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize(("expert", "span"), [("high", (BOUNDARY, 1.0)), ("low", (0.0, BOUNDARY))])
def test_training_loads_one_and_draws_its_times(
    expert: str, span: tuple[float, float], a14b: Path, tmp_path: Path
) -> None:
    task = PreferenceTask(settings(tmp_path, a14b, model__expert=expert), torch.device("cpu"))
    pipe = task.adapter.pipe
    kept, left = ("transformer", "transformer_2")[:: 1 if expert == "high" else -1]
    assert getattr(pipe, left) is None and task.adapter.denoiser is getattr(pipe, kept)
    times = torch.cat([task._inputs(task.load([(0, epoch)]))[1] for epoch in range(40)])
    assert (times >= span[0]).all() and (times <= span[1]).all() and times.max() - times.min() > 0.05
    loss, _ = task.loss(task.load([(0, 0), (1, 0)]))
    loss.backward()
    assert any(p.grad is not None and p.grad.norm() > 0 for p in task.adapter.denoiser.parameters())


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_lora_of_one_part_loads_in_plain_diffusers(expert: str, a14b: Path, tmp_path: Path) -> None:
    wanted = settings(tmp_path, a14b, model__expert=expert, optim__steps=2, optim__lr=0.05)
    train.run(wanted)
    export = wanted.output / "export"
    assert ("load_into_transformer_2=True" in (export / "README.md").read_text()) == (expert == "low")

    plain = WanPipeline.from_pretrained(a14b, local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    before = drawn(plain, 4)
    plain.load_lora_weights(str(export), load_into_transformer_2=expert == "low")
    tuned, other = (plain.transformer_2, plain.transformer)[:: 1 if expert == "low" else -1]
    assert getattr(tuned, "peft_config", None) and not getattr(other, "peft_config", None)
    after = drawn(plain, 4)
    assert np.abs(after - before).max() > 1e-4

    ours = sample.load(
        SampleConfig(
            model=Model(path=a14b, lora=export, expert=expert), prompts=a14b, output=tmp_path / "x", device="cpu"
        ),
        torch.device("cpu"),
    )  # fmt: skip
    assert ours.pipe.transformer is not None and ours.pipe.transformer_2 is not None
    np.testing.assert_allclose(drawn(ours.pipeline(), 4), after, atol=1e-5)


@pytest.mark.parametrize(("expert", "name"), [("high", "transformer"), ("low", "transformer_2")])
def test_an_estimate_counts_the_transformer_that_is_trained(expert: str, name: str, a14b: Path, tmp_path: Path) -> None:
    found = memory.estimate(settings(tmp_path, a14b, model__expert=expert))
    assert [part.name for part in found.parts] == [name, "vae", "text_encoder"] and found.parts[0].trained


def test_a_whole_part_is_exported_as_a_part(a14b: Path, tmp_path: Path) -> None:
    wanted = settings(tmp_path, a14b, model__expert="low", optim__steps=1, lora=None)
    train.run(wanted)
    folder = wanted.output / "export" / "transformer_2"
    replaced = base.load(Model(path=a14b, components={"transformer_2": folder}))
    assert (folder / "config.json").is_file() and replaced.pipe.transformer_2 is not None


def test_mistakes_about_two_transformers_are_named(a14b: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set model\.expert: high"):
        PreferenceTask(settings(tmp_path, a14b), torch.device("cpu"))
    shown = settings(tmp_path, a14b, model__expert="low", validation__prompts=["x"])
    with pytest.raises(ValueError, match=r"drop validation\.prompts"):
        PreferenceTask(shown, torch.device("cpu"))
    narrow = settings(tmp_path, a14b, model__expert="high", timesteps={"high": 0.1, "shift": 1.0})
    task = PreferenceTask(narrow, torch.device("cpu"))
    with pytest.raises(ValueError, match="leave no time"):
        task.loss(task.load([(0, 0)]))
    one = tiny_ti2v(tmp_path / "ti2v")
    with pytest.raises(ValueError, match="one transformer"):
        base.load(Model(path=one, expert="high"), training=True)
    torn = json.loads((a14b / "model_index.json").read_text())
    assert torn["boundary_ratio"] == BOUNDARY


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize("within", [(BOUNDARY, 1.0), (0.0, BOUNDARY), (0.3, 0.6)])
def test_times_within_a_part_have_the_density_conditioned_on_it(density: str, within: tuple[float, float]) -> None:
    """Against rejection: draws of the whole schedule of which those in the part are kept; and in closed form."""
    process, shift, mean, std = Process("flow"), 3.0, 0.4, 1.3
    told: Any = {"density": density, "mean": mean, "std": std, "shift": shift}
    found = process.sample_timesteps(4000, torch.Generator().manual_seed(0), **told, within=within).double().numpy()
    assert within[0] <= found.min() and (found.max() < within[1] or within[1] == 1)

    def cdf(t: np.ndarray) -> np.ndarray:
        u = np.clip(np.asarray(t, np.float64) / (shift - (shift - 1) * np.asarray(t, np.float64)), 0, 1)
        if density == "uniform":
            return u
        with np.errstate(divide="ignore"):
            return norm.cdf((np.log(u) - np.log1p(-u) - mean) / std)

    low, high = cdf(np.asarray(within[0])), cdf(np.asarray(within[1]))
    assert kstest(found, lambda t: (cdf(t) - low) / (high - low)).pvalue > 0.01
    every = process.sample_timesteps(40000, torch.Generator().manual_seed(1), **told).double().numpy()
    kept = every[(every >= within[0]) & (every < within[1])]
    assert abs(kept.mean() - found.mean()) < 5 * found.std() / np.sqrt(min(len(kept), len(found)))


# ---------------------------------------------------------------------------------------------- TI2V


def test_each_token_is_told_its_time(tmp_path: Path) -> None:
    adapter: Any = base.load(Model(path=tiny_ti2v(tmp_path / "model")))
    assert adapter.latent_shape(32, 32, 9) == (6, 3, 4, 4) and adapter.vae_factor == 8
    pipe = adapter.pipeline()
    with calls_of(pipe.transformer) as calls:
        drawn(pipe, 3)
    condition = adapter.encode_prompt(PROMPTS)
    assert len(calls) == 3
    with calls_of(pipe.transformer) as ours, torch.no_grad():
        for call in calls:
            assert call["timestep"].shape == (2, 3 * 2 * 2)
            adapter.predict(call["hidden_states"], call["timestep"][:, 0].float() / 1000, condition)
    for mine, theirs in zip(ours, calls, strict=True):
        assert mine["timestep"].shape == theirs["timestep"].shape
        for name in ("hidden_states", "timestep", "encoder_hidden_states", "output"):
            torch.testing.assert_close(mine[name].float(), theirs[name].float(), rtol=0, atol=1e-5)


def test_latents_of_the_patched_autoencoder_are_scaled_as_the_pipeline_scales_them(tmp_path: Path) -> None:
    adapter: Any = base.load(Model(path=tiny_ti2v(tmp_path / "model")))
    clip = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = adapter.encode_media(clip)
    assert moments.shape == (1, 2, *adapter.latent_shape(32, 32, 9))
    with torch.no_grad():
        posterior = adapter.vae.encode(clip).latent_dist
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1, 1)
        for values in (adapter.vae.config.latents_mean, adapter.vae.config.latents_std)
    )
    torch.testing.assert_close(moments[:, 0].double(), (posterior.mean.double() - mean) / std, rtol=0, atol=1e-5)
    torch.testing.assert_close(moments[:, 1].double(), posterior.std.double() / std, rtol=0, atol=1e-5)
    with torch.no_grad():
        decoded = adapter.decode(moments[:, 0])
        plain = adapter.vae.decode((moments[:, 0].double() * std + mean).float()).sample
    assert decoded.shape == clip.shape
    torch.testing.assert_close(decoded, plain, rtol=0, atol=1e-5)


def test_training_steps_on_ti2v(tmp_path: Path) -> None:
    wanted = settings(tmp_path, tiny_ti2v(tmp_path / "model"), optim__steps=2)
    train.run(wanted)
    assert (wanted.output / "export" / "pytorch_lora_weights.safetensors").is_file()
