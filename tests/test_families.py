"""The transformer families against the pipelines they wrap: real classes, tiny weights, a user's folder layout.

A new family adds its tiny pipeline to `MAKERS`, and every test here holds for it.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import math
import shutil
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from family_kit import recorded
from peft import PeftModel
from torch import Tensor
from training_kit import config, preferences, records, settings

from mmalign import noise, train
from mmalign.jobs import TrainConfig
from mmalign.jobs_inputs import Data, Model
from mmalign.models import base
from mmalign.models.adapter import Adapter
from mmalign.tasks.inputs import Inputs
from mmalign.testing import tiny_transformers as tiny

MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd3": tiny.tiny_sd3,
    "sd3-no-t5": partial(tiny.tiny_sd3, t5=False),
    "sd3.5": partial(tiny.tiny_sd3, medium=True),
    "flux-dev": tiny.tiny_flux,
    "flux-schnell": partial(tiny.tiny_flux, dev=False),
    "pixart": tiny.tiny_pixart,
    "sana": tiny.tiny_sana,
    "qwen_image": tiny.tiny_qwen_image,
}
PROMPTS = ["a red circle", "a photo of a large green square on a small blue triangle"]
SIDE = 32


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("families")
    return {name: make(home / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module", name="adapter", params=MAKERS)
def _adapter(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    return base.load(Model(path=folders[request.param]))


def _generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]


def _start(adapter: Adapter) -> Tensor:
    """The noise that a pipeline draws from `_generators`."""
    shape = adapter.latent_shape(SIDE, SIDE)
    return torch.cat([torch.randn(1, *shape, generator=g) for g in _generators()])


def _draw(adapter: Adapter, guidance: float = 1.0, steps: int = 3, **arguments: Any) -> Any:
    with torch.no_grad():
        return adapter.pipeline()(
            PROMPTS, num_inference_steps=steps, generator=_generators(), height=SIDE, width=SIDE,
            **adapter.call_arguments(guidance, None, len(PROMPTS)), **arguments,
        ).images  # fmt: skip


def _times(adapter: Adapter) -> Tensor:
    """The pipeline's last schedule as our timesteps: flow times, or the discrete ones."""
    scheduler = adapter.pipeline().scheduler
    if adapter.process.kind != "flow":
        return scheduler.timesteps.long()
    return scheduler.timesteps.float() / scheduler.config.num_train_timesteps


def _sizes(count: int) -> Tensor:
    return torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32).expand(count, -1)


def _condition(adapter: Adapter, prompts: list[str]) -> dict[str, Tensor]:
    return adapter.add_size(adapter.encode_prompt(prompts), _sizes(len(prompts)))


def _close(ours: Any, theirs: Any, name: str) -> None:
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours.float(), theirs.float().expand_as(ours), rtol=0, atol=1e-5, msg=name)
    elif isinstance(theirs, dict):
        for key, value in theirs.items():
            _close(ours[key], value, f"{name}.{key}")
    elif isinstance(theirs, list | tuple):
        for i, value in enumerate(theirs):
            _close(ours[i], value, f"{name}[{i}]")


# ------------------------------------------------------------------------------------------ against the pipeline


def test_the_denoiser_is_fed_what_the_pipelines_sampler_feeds_it(adapter: Adapter) -> None:
    _compare_first_calls(adapter)


@pytest.mark.parametrize("name", MAKERS)
def test_a_long_prompt_is_cut_as_the_pipeline_cuts_it(name: str, folders: dict[str, Path]) -> None:
    short = base.load(Model(path=folders[name], max_sequence_length=8))
    assert short.call_arguments(1.0, None)["max_sequence_length"] == 8
    _compare_first_calls(short)


def _compare_first_calls(adapter: Adapter) -> None:
    """Every tensor that the pipeline's sampler feeds its denoiser is what `predict` feeds it."""
    with recorded(adapter.denoiser) as theirs:
        _draw(adapter)
    times, latents, condition = _times(adapter), _start(adapter), _condition(adapter, PROMPTS)
    with recorded(adapter.denoiser) as ours, torch.no_grad():
        adapter.predict(latents, times[:1].expand(2), condition)
    assert theirs[0].keys() >= {"hidden_states", "timestep", "output"}
    for name, value in theirs[0].items():
        if isinstance(value, Tensor) or (isinstance(value, dict | list | tuple) and value):
            assert name in ours[0], f"the pipeline passes {name}, the adapter does not"
            _close(ours[0][name], value, name)
    for name, value in ours[0].items():
        assert not isinstance(value, Tensor) or theirs[0].get(name) is not None, f"only the adapter passes {name}"


def test_sampling_through_the_adapter_is_sampling_through_the_pipeline(adapter: Adapter) -> None:
    """Encoding, prediction, steps and decoding at once: the pictures are equal."""
    scheduler = adapter.pipeline().scheduler
    if adapter.process.kind != "flow":
        adapter.pipe.scheduler = diffusers.DDIMScheduler.from_config(
            scheduler.config, clip_sample=False, timestep_spacing="leading"
        )
    elif not isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        adapter.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=adapter.shift((1, 8, 8)))
    try:
        expected = torch.as_tensor(_draw(adapter, output_type="pt"))
        times = [*_times(adapter).tolist(), adapter.process.clean]
    finally:
        adapter.pipe.scheduler = scheduler
    latents, condition = _start(adapter), _condition(adapter, PROMPTS)
    with torch.no_grad():
        for now, after in itertools.pairwise(times):
            t = torch.full((2,), now)
            prediction = adapter.predict(latents, t, condition)
            latents, _ = adapter.process.step(latents, prediction, t, torch.full((2,), after))
        ours = (adapter.decode(latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_guidance_uses_the_empty_prompt_as_training_does(adapter: Adapter) -> None:
    """Caption dropout trains the condition of ""; the guided pipeline must be fed the same one."""
    with recorded(adapter.denoiser) as calls:
        _draw(adapter, guidance=4.0, steps=2)
    condition = _condition(adapter, ["", ""])
    with recorded(adapter.denoiser) as ours, torch.no_grad():
        adapter.predict(_start(adapter), _times(adapter)[:1].expand(2), condition)
    if len(calls[0]["hidden_states"]) == 2 and len(calls) == 2:
        return  # guidance-distilled: one call for each step, no empty prompt
    if len(calls[0]["hidden_states"]) == 2:
        second = calls[1]  # conditional and unconditional in two calls
        unconditional = {name: value for name, value in second.items() if isinstance(value, Tensor)}
    else:
        unconditional = {name: value[:2] for name, value in calls[0].items() if isinstance(value, Tensor)}
    for name in unconditional.keys() & ours[0].keys() - {"output", "timestep"}:
        _close(ours[0][name], unconditional[name], name)


def test_a_prompt_is_encoded_alike_alone_and_in_a_batch(adapter: Adapter) -> None:
    """What a row means must not depend on its neighbours: the prediction is the same, and so is what is cached."""
    prompts = ["", *PROMPTS]
    both = adapter.encode_prompt(prompts)
    for i, prompt in enumerate(prompts):
        for name, value in adapter.encode_prompt([prompt]).items():
            torch.testing.assert_close(value[0], both[name][i], rtol=0, atol=1e-5)


def test_decoding_undoes_encoding_as_the_autoencoder_does(adapter: Adapter) -> None:
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moments = adapter.encode_media(pixels)
    assert moments.shape == (2, 2, *adapter.latent_shape(SIDE, SIDE))
    with torch.no_grad():
        alone = torch.cat([adapter.encode_media(picture[None]) for picture in pixels])
    torch.testing.assert_close(moments, alone, rtol=0, atol=1e-5)


def test_times_are_shifted_as_the_pipeline_shifts_them(adapter: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sigmas of the pipeline's schedule are the shifted even ones: the pipeline's own, or the scheduler's."""
    scheduler = adapter.pipeline().scheduler
    if adapter.process.kind != "flow":  # PixArt: there are no flow times, and nothing may shift its discrete ones
        assert adapter.shift(adapter.latent_shape(SIDE, SIDE)) == 1.0
        return
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler):  # Sana
        _draw(adapter, steps=4)
        even = (1 - torch.linspace(1, 1 / 1000, 5)).flip(0)[:-1]
        ours = noise.shifted(even, adapter.shift(adapter.latent_shape(SIDE, SIDE)))
        torch.testing.assert_close(ours, scheduler.sigmas[:-1].float(), rtol=1e-4, atol=1e-6)
        return
    asked: dict[str, Any] = {}
    set_timesteps = scheduler.set_timesteps  # the pipeline looks at the signature for `sigmas`
    noting = wraps(set_timesteps)(lambda *a, **k: _note(asked, set_timesteps, a, k))
    monkeypatch.setattr(scheduler, "set_timesteps", noting)
    _draw(adapter, steps=4)
    given = asked.get("sigmas")
    even = torch.linspace(scheduler.sigma_max, scheduler.sigma_min, 4) if given is None else torch.as_tensor(given)
    shift = adapter.shift(adapter.latent_shape(SIDE, SIDE))
    ours = (shift * even / (1 + (shift - 1) * even)).float()
    if scheduler.config.shift_terminal:
        ours = scheduler.stretch_shift_to_terminal(ours)
    torch.testing.assert_close(ours, scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)


def _note(asked: dict[str, Any], function: Callable[..., None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Calls a function and keeps the keywords that it was called with."""
    asked.update(kwargs)
    function(*args, **kwargs)


def test_a_negative_prompt_is_encoded_as_a_prompt(adapter: Adapter) -> None:
    """With negative prompts every family is guided away from them, by its pipeline's own means."""
    guided = adapter.call_arguments(4.0, ["blue square", "red"], 2)
    with recorded(adapter.denoiser) as calls, torch.no_grad():
        adapter.pipeline()(
            PROMPTS, num_inference_steps=2, generator=_generators(), height=SIDE, width=SIDE, **guided
        )  # fmt: skip
    assert len(calls) == 4 or len(calls[0]["hidden_states"]) == 4, "two predictions for each step"


# ------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module", name="table")
def _table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preferences(tmp_path_factory.mktemp("table"))


@pytest.mark.parametrize("name", MAKERS)
def test_a_lora_is_trained_saved_and_loaded_by_plain_diffusers(
    name: str, folders: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    wanted = config(
        tmp_path / "run", folders[name], table, reference__draws=1, optim__batch_size=4, optim__steps=5, optim__lr=5e-3
    )
    run = train.run(wanted)
    found = records(run)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-4), "policy and reference begin equal"
    assert found[-1]["loss"] < math.log(2) - 0.02
    ours = base.load(Model(path=folders[name], lora=run / "export"))
    pictures = torch.as_tensor(_draw(ours, output_type="pt"))
    plain = torch.as_tensor(_draw(base.load(Model(path=folders[name])), output_type="pt"))
    assert (pictures - plain).abs().max() > 1e-3, "the LoRA must do something"

    index = json.loads((folders[name] / "model_index.json").read_text())
    absent = {part: None for part, entry in index.items() if isinstance(entry, list) and not entry[0]}
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folders[name], **absent)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(pipe, "load_lora_weights"):
        pipe.load_lora_weights(run / "export")
    else:
        pipe.transformer = PeftModel.from_pretrained(pipe.transformer, run / "export")
    with torch.no_grad():
        theirs = pipe(
            PROMPTS, num_inference_steps=3, generator=_generators(), height=SIDE, width=SIDE, output_type="pt",
            **ours.call_arguments(1.0, None, len(PROMPTS)),
        ).images  # fmt: skip
    torch.testing.assert_close(torch.as_tensor(theirs), pictures, rtol=0, atol=1e-5)
    card = (run / "export" / "README.md").read_text()
    assert index["_class_name"] in card


@pytest.mark.parametrize("name", MAKERS)
def test_full_fine_tuning_saves_a_pipeline(name: str, folders: dict[str, Path], table: Path, tmp_path: Path) -> None:
    run = train.run(config(tmp_path / "run", folders[name], table, lora=None, optim__steps=2, optim__lr=1e-4))
    assert records(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    again = base.load(Model(path=run / "export"))
    assert again.family == base.load(Model(path=folders[name])).family


def test_a_missing_text_encoder_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(folders["sd3"], folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_2"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"comes without text_encoder_2.*model\.components"):
        base.load(Model(path=folder))


def test_guidance_is_told_to_distilled_models_only(folders: dict[str, Path]) -> None:
    loaded = base.load(Model(path=folders["flux-dev"], guidance=3.5))
    condition = _condition(loaded, PROMPTS)
    with recorded(loaded.denoiser) as calls, torch.no_grad():
        loaded.predict(_start(loaded), torch.tensor([0.5, 0.25]), condition)
        _draw(loaded, 3.5, steps=1)
    assert [call["guidance"].tolist() for call in calls] == [[3.5, 3.5]] * 2
    guided = loaded.call_arguments(2.0, ["", ""], 2)
    assert (guided["guidance_scale"], guided["true_cfg_scale"]) == (3.5, 2.0)
    assert base.load(Model(path=folders["flux-dev"])).guidance == 1.0
    with pytest.raises(ValueError, match=r"model\.guidance: the transformer of .* takes none; drop the key"):
        base.load(Model(path=folders["flux-schnell"], guidance=3.5))


def test_text_length_is_the_callers_where_the_family_has_one(folders: dict[str, Path]) -> None:
    short = base.load(Model(path=folders["sd3-no-t5"], max_sequence_length=1))
    assert short.encode_prompt(["a"])["encoder_hidden_states"].shape[1] == 32 + 1
    assert short.call_arguments(1.0, None)["max_sequence_length"] == 1


@pytest.mark.parametrize("where", [where for _, where in base._CLASSES.values()])
def test_texts_are_as_long_as_the_pipelines_own_default(where: str) -> None:
    module, _, kind = where.partition(":")
    adapter = getattr(importlib.import_module(module), kind)
    asked = inspect.signature(adapter.pipeline_class.__call__).parameters.get("max_sequence_length")
    assert adapter.max_sequence_length == (asked.default if asked else None)


def test_another_text_length_misses_the_cache(folders: dict[str, Path], table: Path, tmp_path: Path) -> None:
    data = Data(table=table, resolution=SIDE, cache_dir=tmp_path / "cache")
    for length in (16, 8):
        model = Model(path=folders["sana"], max_sequence_length=length)
        found = Inputs(base.load(model), model, data).conditions(PROMPTS)
        assert found["encoder_hidden_states"].shape[:2] == found["encoder_attention_mask"].shape == (2, length)


@pytest.mark.parametrize("name", ["sana", "qwen_image"])
def test_an_autoencoder_of_another_kind_is_not_trained(
    name: str, folders: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    changes = {"task": "autoencoder", "loss": {"kind": "reconstruction"}, "lora": None}
    tree = settings(tmp_path / "run", folders[name], table, **changes)
    tree["data"] = {"shapes": {"scenes": 4}, "resolution": SIDE}
    told = r"task: autoencoder trains an AutoencoderKL or AutoencoderKLWan, and .* has Autoencoder"
    with pytest.raises(ValueError, match=told):
        train.run(TrainConfig.model_validate(tree))
