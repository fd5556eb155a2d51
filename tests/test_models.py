"""The adapters against the pipelines they wrap: real classes, tiny weights, loaded from folders as a user's are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.tasks.inputs import View, cut
from mmalign.testing.tiny import tiny_sd, tiny_sdxl

FAMILIES = ("sd-eps", "sd-v", "sdxl")
PROMPTS = ["a red circle", "a photo of a large green square on a small blue triangle"]


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {
        "sd-eps": tiny_sd(home / "sd-eps"),
        "sd-v": tiny_sd(home / "sd-v", "v_prediction"),
        "sdxl": tiny_sdxl(home / "sdxl"),
    }


@pytest.fixture(scope="module", name="loaded", params=FAMILIES)
def _loaded(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    return base.load(Model(path=folders[request.param]))


@contextmanager
def _recorded(unet: Any) -> Iterator[list[dict[str, Any]]]:
    """What a pipeline feeds to its UNet, and what it gets."""
    calls: list[dict[str, Any]] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append({"sample": args[0], "t": args[1], **kwargs, "output": output[0]})

    handle = unet.register_forward_hook(hook, with_kwargs=True)
    yield calls
    handle.remove()


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _sizes(count: int) -> torch.Tensor:
    return cut(np.zeros((32, 32, 3), np.uint8), 32, View())[1].expand(count, -1)


def _draw(adapter: Any, **arguments: Any) -> Any:
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    with torch.no_grad():
        return adapter.pipeline()(PROMPTS, num_inference_steps=3, generator=generators, **arguments).images


# ------------------------------------------------------------------------------------------------- the process


def test_family_and_parameterisation(folders: dict[str, Path]) -> None:
    found = {name: base.load(Model(path=folder)) for name, folder in folders.items()}
    assert {name: (model.family, model.parameterisation) for name, model in found.items()} == {
        "sd-eps": ("sd", "eps"), "sd-v": ("sd", "v"), "sdxl": ("sdxl", "eps"),
    }  # fmt: skip


def test_noisy_and_target_are_the_training_schedulers(loaded: Any) -> None:
    scheduler = DDPMScheduler.from_config(loaded.pipe.scheduler.config)
    t = torch.tensor([0, 13, 500, 999])
    latents, noise = _noise(4, 4, 8, 8, seed=1), _noise(4, 4, 8, 8, seed=2)
    torch.testing.assert_close(
        loaded.process.noisy(latents, t, noise), scheduler.add_noise(latents, noise, t), rtol=0, atol=1e-6
    )
    target = noise if loaded.parameterisation == "eps" else scheduler.get_velocity(latents, noise, t)
    torch.testing.assert_close(loaded.process.target(latents, t, noise), target, rtol=0, atol=1e-6)


def test_noisy_is_what_sdxls_own_sampler_shows_its_unet(folders: dict[str, Path]) -> None:
    """Euler counts in sigmas and rescales before each call; that must be the same point of the same process."""
    adapter = base.load(Model(path=folders["sdxl"]))
    scheduler = adapter.pipe.scheduler
    scheduler.set_timesteps(10)
    latents, noise = _noise(1, 4, 8, 8, seed=1), _noise(1, 4, 8, 8, seed=2)
    for t in scheduler.timesteps:
        scheduler._step_index = None
        shown = scheduler.scale_model_input(scheduler.add_noise(latents, noise, t.reshape(1)), t)
        ours = adapter.process.noisy(latents, t.long().reshape(1), noise)
        torch.testing.assert_close(ours, shown, rtol=1e-4, atol=1e-5)


def test_timesteps_are_uniform_over_the_whole_schedule(loaded: Any) -> None:
    t = loaded.process.sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert (t.min().item(), t.max().item()) == (0, 999)
    assert t.float().mean().item() == pytest.approx(499.5, abs=6)


def test_ddim_through_the_adapter_is_ddim_through_the_pipeline(loaded: Any) -> None:
    own = loaded.pipe.scheduler
    loaded.pipe.scheduler = DDIMScheduler.from_config(own.config, clip_sample=False, set_alpha_to_one=True)
    try:
        start = _noise(2, 4, 8, 8, seed=5)
        expected = torch.as_tensor(_draw(loaded, guidance_scale=1.0, latents=start, output_type="latent"))
        times = loaded.pipe.scheduler.timesteps.tolist()
    finally:
        loaded.pipe.scheduler = own
    condition = loaded.add_size(loaded.encode_prompt(PROMPTS), _sizes(2))
    latents = start
    with torch.no_grad():
        for t in times:
            now, previous = torch.tensor([t, t]), torch.tensor([t, t]) - 1000 // 3
            prediction = loaded.predict(latents, now, condition)
            latents, _ = loaded.process.step(latents, prediction, now, previous)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------- against the pipeline's calls


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_prediction_is_what_the_pipeline_gets_from_its_unet(loaded: Any, guidance: float) -> None:
    with _recorded(loaded.denoiser) as calls:
        _draw(loaded, guidance_scale=guidance, output_type="latent")
    # PNDM repeats its second timestep, so that three steps are four calls.
    assert len(calls) == (4 if type(loaded.pipe.scheduler).__name__ == "PNDMScheduler" else 3)
    # With guidance the first half is unconditional: the empty prompt, which SDXL's pipeline replaces by zeros.
    prompts = PROMPTS if guidance == 1 else ["", "", *PROMPTS]
    condition = loaded.add_size(loaded.encode_prompt(prompts), _sizes(len(prompts)))
    for call in calls:
        assert len(call["sample"]) == len(prompts)
        t = torch.as_tensor(call["t"]).long().expand(len(prompts))
        with torch.no_grad():
            ours = loaded.predict(call["sample"], t, condition)
        torch.testing.assert_close(ours, call["output"], rtol=0, atol=1e-5)


def test_prompts_are_encoded_as_the_pipeline_encodes_them(loaded: Any) -> None:
    prompts = [*PROMPTS, "a red circle " * 60]  # the last is cut
    ours = loaded.encode_prompt(prompts)
    theirs = loaded.pipe.encode_prompt(
        prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )  # fmt: skip
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs[0], rtol=0, atol=1e-5)
    empty = loaded.encode_prompt([""])
    torch.testing.assert_close(empty["encoder_hidden_states"], theirs[1][:1], rtol=0, atol=1e-5)
    if loaded.family == "sdxl":
        torch.testing.assert_close(ours["text_embeds"], theirs[2], rtol=0, atol=1e-5)
        torch.testing.assert_close(empty["text_embeds"], theirs[3][:1], rtol=0, atol=1e-5)
        assert not empty["text_embeds"].any()


def test_a_prompt_is_encoded_alike_alone_and_in_a_batch(loaded: Any) -> None:
    both = loaded.encode_prompt(["", PROMPTS[0]])
    for i, prompt in enumerate(["", PROMPTS[0]]):
        for name, value in loaded.encode_prompt([prompt]).items():
            torch.testing.assert_close(value[0], both[name][i], rtol=0, atol=1e-5)


def test_time_ids_are_the_pipelines(folders: dict[str, Path]) -> None:
    adapter = base.load(Model(path=folders["sdxl"]))
    with _recorded(adapter.denoiser) as calls:
        _draw(adapter, guidance_scale=1.0, output_type="latent")
    condition = adapter.add_size(adapter.encode_prompt(PROMPTS), _sizes(2))
    assert torch.equal(condition["time_ids"], calls[0]["added_cond_kwargs"]["time_ids"])
    with _recorded(adapter.denoiser) as calls:
        _draw(
            adapter, guidance_scale=1.0, output_type="latent", original_size=(96, 48), crops_coords_top_left=(16, 0),
            target_size=(32, 32),
        )  # fmt: skip
    picture = np.zeros((96, 48, 3), np.uint8)  # scaled to 64 x 32, cut in the middle
    _, sizes = cut(picture, 32, View())
    assert torch.equal(sizes, calls[0]["added_cond_kwargs"]["time_ids"][0])


def test_sd_is_not_told_sizes(folders: dict[str, Path]) -> None:
    adapter = base.load(Model(path=folders["sd-eps"]))
    condition = adapter.encode_prompt(PROMPTS)
    assert adapter.add_size(condition, _sizes(2)) is condition


# ---------------------------------------------------------------------------------------------------- pictures


def test_a_flip_mirrors_pixels_and_crop() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    plain, sizes = cut(picture, 32, View(right=0.25))
    flipped, mirrored = cut(picture, 32, View(flip=True, right=0.25))
    assert torch.equal(flipped, plain.flip(-1))
    assert sizes.tolist() == [32, 48, 0, 4, 32, 32]
    assert mirrored.tolist() == [32, 48, 0, 12, 32, 32]
    assert plain.min() >= -1 and plain.max() <= 1


@pytest.mark.parametrize("shape", [(33, 500), (500, 33), (31, 32), (1000, 999), (8, 9)])
@pytest.mark.parametrize("corner", [0.0, 0.5, 1.0])
def test_every_picture_is_cut_to_size(shape: tuple[int, int], corner: float) -> None:
    pixels, sizes = cut(np.full((*shape, 3), 255, np.uint8), 32, View(down=corner, right=corner))
    assert pixels.shape == (3, 32, 32)
    assert torch.allclose(pixels, torch.ones(()))
    assert sizes.tolist()[:2] == list(shape)


def test_moments_are_scaled_as_the_unet_wants_them(loaded: Any) -> None:
    pixels = _noise(2, 3, 32, 32).clamp(-1, 1)
    moments = loaded.encode_media(pixels)
    with torch.no_grad():
        posterior = loaded.vae.encode(pixels).latent_dist
    assert moments.shape == (2, 2, *loaded.latent_shape(32, 32))
    factor = loaded.vae.config.scaling_factor
    torch.testing.assert_close(moments[:, 0], posterior.mean * factor, rtol=0, atol=1e-6)
    torch.testing.assert_close(moments[:, 1], posterior.std * factor, rtol=0, atol=1e-6)
    noise = _noise(2, 4, 8, 8, seed=9)
    latents = base.sample_latents(moments, noise)
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise) * factor, rtol=0, atol=1e-5)


def test_decoding_is_the_pipelines(loaded: Any) -> None:
    start = _noise(2, 4, 8, 8, seed=5)
    latents = torch.as_tensor(_draw(loaded, guidance_scale=1.0, latents=start, output_type="latent"))
    picture = torch.as_tensor(_draw(loaded, guidance_scale=1.0, latents=start, output_type="pt"))
    with torch.no_grad():
        ours = loaded.decode(latents)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), picture, rtol=0, atol=1e-5)


def test_encode_undoes_decodes_scaling_and_shift(folders: dict[str, Path]) -> None:
    """With an autoencoder that is the identity, encoding then decoding must give the latents back."""
    adapter = base.load(Model(path=folders["sd-eps"]))
    adapter.vae.register_to_config(scaling_factor=0.3, shift_factor=0.2)

    class Same(torch.nn.Module):
        config, dtype = adapter.vae.config, torch.float32

        def encode(self, pixels: torch.Tensor) -> Any:
            posterior = type("P", (), {"mean": pixels, "std": torch.ones_like(pixels)})
            return type("E", (), {"latent_dist": posterior})

        def decode(self, latents: torch.Tensor) -> Any:
            return type("D", (), {"sample": latents})

    adapter.vae = Same()
    pixels = _noise(1, 3, 8, 8)
    moments = adapter.encode_media(pixels)
    torch.testing.assert_close(adapter.decode(moments[:, 0]), pixels, rtol=0, atol=1e-6)
    torch.testing.assert_close(moments[:, 0], (pixels - 0.2) * 0.3, rtol=0, atol=1e-6)


def test_latents_and_cached_text_do_not_depend_on_autocast(loaded: Any) -> None:
    pixels = _noise(1, 3, 32, 32)
    moments, text = loaded.encode_media(pixels), loaded.encode_prompt(PROMPTS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded.encode_media(pixels), moments)
        for name, value in loaded.encode_prompt(PROMPTS).items():
            assert torch.equal(value, text[name]), name


def test_half_precision_leaves_the_autoencoder_exact(folders: dict[str, Path]) -> None:
    exact = base.load(Model(path=folders["sdxl"]))
    adapter = base.load(Model(path=folders["sdxl"]), dtype=torch.bfloat16, vae_dtype=torch.float32)
    assert adapter.denoiser.dtype == adapter.pipe.text_encoder_2.dtype == torch.bfloat16
    pixels = _noise(1, 3, 32, 32)
    assert torch.equal(adapter.encode_media(pixels), exact.encode_media(pixels))


# ------------------------------------------------------------------------------------------------------ loading


def _random_lora(unet: Any, seed: int = 0) -> None:
    unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="module", name="lora")
def _lora(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """A LoRA for each pipeline, and the latents it draws while it is still an adapter."""
    found = {}
    for name in ("sd-eps", "sdxl"):
        adapter = base.load(Model(path=folders[name]))
        _random_lora(adapter.denoiser)
        folder = tmp_path_factory.mktemp("lora")
        layers = get_peft_model_state_dict(adapter.denoiser)
        config = adapter.denoiser.peft_config["default"].to_dict()
        adapter.pipe.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
        found[name] = folder, _draw(adapter, guidance_scale=1.0, output_type="np")
    return found


@pytest.mark.parametrize("name", ["sd-eps", "sdxl"])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_lora_is_fused(
    folders: dict[str, Path], lora: dict[str, tuple[Path, np.ndarray]], name: str, as_file: bool
) -> None:
    folder, expected = lora[name]
    path = folder / "pytorch_lora_weights.safetensors" if as_file else folder
    plain = base.load(Model(path=folders[name]))
    adapter = base.load(Model(path=folders[name], lora=path))
    assert not any("lora" in key for key in adapter.denoiser.state_dict())
    assert adapter.denoiser.state_dict().keys() == plain.denoiser.state_dict().keys()
    np.testing.assert_allclose(_draw(adapter, guidance_scale=1.0, output_type="np"), expected, rtol=0, atol=1e-5)
    assert np.abs(_draw(plain, guidance_scale=1.0, output_type="np") - expected).max() > 1e-3
    adapter.denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))  # training on top of it


def test_a_lora_of_another_model_is_refused(folders: dict[str, Path], lora: dict[str, tuple[Path, np.ndarray]]) -> None:
    with pytest.raises(ValueError, match=r"model\.lora: .*another architecture"):
        base.load(Model(path=folders["sd-eps"], lora=lora["sdxl"][0]))


def test_a_lora_without_a_place_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    save_file({"elsewhere.lora_A.weight": torch.ones(2, 3)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match=r"model\.lora: .*another architecture"):
        base.load(Model(path=folders["sd-eps"], lora=tmp_path))


@pytest.mark.parametrize("make", ["nothing", "folder", "pickle"])
def test_what_is_no_lora_is_refused(folders: dict[str, Path], tmp_path: Path, make: str) -> None:
    path = tmp_path / {"nothing": "none", "folder": "empty", "pickle": "lora.bin"}[make]
    if make == "folder":
        path.mkdir()
    if make == "pickle":
        torch.save({"unet.a": torch.ones(1)}, path)
    said = "pickled weights are refused" if make == "pickle" else "does not exist"
    with pytest.raises(ValueError, match=f"model.lora: .*{said}"):
        base.load(Model(path=folders["sd-eps"], lora=path))


def test_a_part_is_replaced(folders: dict[str, Path], tmp_path: Path) -> None:
    other = AutoencoderKL.from_pretrained(folders["sd-eps"] / "vae")
    with torch.no_grad():
        other.post_quant_conv.bias += 1
    other.save_pretrained(tmp_path / "vae")
    adapter = base.load(Model(path=folders["sd-eps"], components={"vae": tmp_path / "vae"}))
    assert torch.equal(adapter.vae.post_quant_conv.bias, other.post_quant_conv.bias)
    fresh, old = (
        base.fingerprint(Model(path=folders["sd-eps"], components=parts)) for parts in ({"vae": tmp_path / "vae"}, {})
    )
    assert fresh["vae"] != old["vae"] and fresh["unet"] == old["unet"]


def test_a_bad_replacement_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd-eps"] / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["post_quant_conv.bias"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"model\.components\.vae: .*1 missing tensor: post_quant_conv\.bias"):
        base.load(Model(path=folders["sd-eps"], components={"vae": tmp_path / "vae"}))
    with pytest.raises(ValueError, match=r"model\.components\.vae: .*does not exist"):
        base.load(Model(path=folders["sd-eps"], components={"vae": tmp_path / "nowhere"}))
    with pytest.raises(ValueError, match="has no part 'vea'"):
        base.load(Model(path=folders["sd-eps"], components={"vea": tmp_path / "vae"}))


def test_parts_from_scratch_need_no_weights_and_are_seeded(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd-eps"], tmp_path / "model")
    for part in ("unet", "text_encoder"):
        for file in (tmp_path / "model" / part).glob("*.safetensors"):
            file.unlink()
    code = (
        "import sys, torch; from mmalign.jobs import Model; from mmalign.models import base; torch.manual_seed(3);"
        "a = base.load(Model(path=sys.argv[1], from_scratch=('unet', 'text_encoder')));"
        "print(float(a.denoiser.conv_in.weight.sum()), float(next(a.pipe.text_encoder.parameters()).sum()))"
    )
    # The order of a set of strings differs between processes; the weights must not.
    said = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "model")], env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "4")
    ]  # fmt: skip
    assert said[0] == said[1]
    with pytest.raises(ValueError, match=r"unet .*no weights"):
        base.load(Model(path=tmp_path / "model"))


def test_a_family_that_is_not_there_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a sd model, but model\.family says sdxl"):
        base.load(Model(path=folders["sd-eps"], family="sdxl"))
    shutil.copytree(folders["sd-eps"], tmp_path / "other")
    index = tmp_path / "other" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "KandinskyPipeline"}))
    with pytest.raises(ValueError, match="no adapter for KandinskyPipeline; known: StableDiffusionPipeline"):
        base.load(Model(path=tmp_path / "other"))


def test_an_unknown_prediction_type_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd-eps"], tmp_path / "model")
    file = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "sample"}))
    with pytest.raises(ValueError, match="prediction_type is 'sample'; known: epsilon, v_prediction"):
        base.load(Model(path=tmp_path / "model"))


def test_a_fingerprint_knows_weights_configs_and_vocabularies(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd-eps"], tmp_path / "model")
    before = base.fingerprint(Model(path=folders["sd-eps"]))
    assert base.fingerprint(Model(path=tmp_path / "model")) == before
    for part, name in (
        ("vae", "config.json"),
        ("tokenizer", "tokenizer_config.json"),
        ("scheduler", "scheduler_config.json"),
    ):
        file = tmp_path / "model" / part / name
        file.write_text(file.read_text().replace("{", '{"changed": 1,', 1))
    now = base.fingerprint(Model(path=tmp_path / "model"))
    assert {part for part in now if now[part] != before[part]} == {"vae", "tokenizer", "scheduler"}
