"""What the diffusion tasks share at both ends of a run: what is trainable, validation pictures, export."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mmalign import export as exporting
from mmalign.jobs import TrainConfig
from mmalign.media import write_image, write_video
from mmalign.models import base
from mmalign.models.adapter import exact
from mmalign.tasks.state import adapter_off, rebuilt

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(config: TrainConfig, device: torch.device) -> Any:
    """The adapter, with frozen weights in the run's precision; what is trained, and the VAE, stay in float32."""
    if config.model.expert and (config.validation.prompts or config.guards.early_stopping):
        raise ValueError(
            "model.expert: one of two transformers is loaded, and drawing takes both; drop validation.prompts and "
            "guards.early_stopping, and draw with mmalign sample"
        )
    adapter = base.load(
        config.model, training=True, device=device, dtype=frozen_dtype(config), vae_dtype=torch.float32,
        waiting=[name for name in config.optim.offload if name != "reference"],
    )  # fmt: skip
    if adapter.denoiser.config.get("time_cond_proj_dim"):
        raise ValueError(
            f"the denoiser of {config.model.path} is told its guidance (LCM: time_cond_proj_dim): a consistency model, "
            "which these losses do not train; give the model that it was distilled from"
        )
    drawing = {"validation.prompts": config.validation.prompts, "guards.early_stopping": config.guards.early_stopping}
    for name in (name for name, wanted in drawing.items() if wanted and adapter.of_image):
        raise ValueError(f"{name}: {adapter.family} draws from pictures, and there are none for prompts; drop it")
    return adapter


def frozen_dtype(config: TrainConfig) -> torch.dtype:
    """What text encoders and, under a LoRA, the denoiser are loaded in."""
    return PRECISIONS[config.precision] if config.lora else torch.float32


def make_trainable(adapter: Any, config: TrainConfig) -> nn.ModuleDict:
    """Adds a LoRA to the denoiser, or makes all of it trainable. ValueError for a LoRA target that is nowhere in it."""
    denoiser = adapter.denoiser
    if config.lora:
        targets = config.lora.targets or adapter.lora_targets
        _check_targets(denoiser, targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            denoiser.requires_grad_(False)
            denoiser.add_adapter(lora_config(config, targets))
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if config.lora.init:
            _go_on_from(denoiser, config.lora.init)
    else:
        denoiser.requires_grad_(True)
    if config.optim.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    return nn.ModuleDict({"denoiser": denoiser})


def _go_on_from(denoiser: Any, path: Path) -> None:
    """Copies a LoRA file of the same shape into the adapter. ValueError, by name, for one that has another."""
    file = base.lora_file(path, "lora.init")
    found = {key.partition(".")[2]: value for key, value in load_file(file).items()}  # without unet. or transformer.
    wanted = get_peft_model_state_dict(denoiser)
    own = denoiser.peft_config["default"]
    with safe_open(file, "pt") as opened:
        told = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    was = {name.rpartition(".")[2]: value for name, value in told.items()}
    odd = sorted(found.keys() ^ wanted.keys()) or [k for k in found if found[k].shape != wanted[k].shape]
    if odd:
        raise ValueError(
            f"lora.init: {file} does not fit the adapter: {odd[0]} and {len(odd) - 1} other tensors are in one of them "
            "alone, or of another rank; give lora.rank and lora.targets of the run that made it"
        )
    if "lora_alpha" in was and was["lora_alpha"] != own.lora_alpha:
        raise ValueError(
            f"lora.init: {file} was trained with alpha {was['lora_alpha']:g} at rank {was['r']}, and with "
            f"{own.lora_alpha:g} it would be another model; set lora.alpha: {was['lora_alpha']:g}"
        )
    set_peft_model_state_dict(denoiser, found)


def _check_targets(denoiser: nn.Module, targets: tuple[str, ...]) -> None:
    names = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in names):
            known = {".".join(name.split(".")[k:]) for name in names for k in (-1, -2)}
            near = difflib.get_close_matches(target, sorted(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "to_q, to_k, to_v and to_out.0 are usual"
            raise ValueError(f"lora.targets: the denoiser has no linear or convolution layer called {target!r}; {hint}")


def lora_config(config: TrainConfig, targets: tuple[str, ...]) -> LoraConfig:
    """PEFT's own configuration; B starts at zero, so the first policy is the reference."""
    lora = config.lora
    assert lora is not None
    return LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha or lora.rank, lora_dropout=lora.dropout, target_modules=list(targets),
        init_lora_weights="gaussian",
    )  # fmt: skip


def has_adapter(adapter: Any) -> bool:
    return bool(getattr(adapter.denoiser, "peft_config", None))


@torch.no_grad()
def validate(adapter: Any, config: TrainConfig, folder: Path, step: int) -> None:
    """A grid of pictures: a row of prompts with the trained weights, and one with the LoRA off where there is one.

    Of a video family it is a clip, in which all of them play.
    """
    wanted = config.validation
    if not wanted.prompts:
        return
    rows = [_row(adapter, config)]
    if has_adapter(adapter):
        with adapter_off(adapter.denoiser):
            rows.append(_row(adapter, config))
    grid = np.concatenate(rows, axis=-3)
    if adapter.modality == "video":
        frames = torch.from_numpy(grid).permute(0, 3, 1, 2)
        write_video(folder / f"step-{step:06d}.mp4", frames, adapter.fps)
    else:
        write_image(folder / f"step-{step:06d}.png", grid)


def _row(adapter: Any, config: TrainConfig) -> np.ndarray:
    wanted, prompts = config.validation, list(config.validation.prompts)
    seeds = range(wanted.seed, wanted.seed + len(prompts))
    return np.concatenate(draw(adapter, config, prompts, seeds, wanted.steps, wanted.guidance_scale), axis=-2)


@torch.no_grad()
def draw(
    adapter: Any, config: TrainConfig, prompts: list[str], seeds: range, steps: int, guidance_scale: float
) -> list[np.ndarray]:
    """Pictures uint8 [H, W, 3], or clips [F, H, W, 3], of the model as it is, in evaluation mode, a seed a prompt."""
    states = [(module, module.training) for module in (adapter.denoiser, *adapter.frozen())]
    for module, _ in states:
        module.eval()
    device = "cuda" if adapter.device.type == "cuda" else "cpu"
    try:
        autocast = torch.autocast(device, PRECISIONS[config.precision], enabled=config.precision != "fp32")
        with autocast, _exact_decoding(adapter), adapter.at_hand("vae", *adapter.text_encoders):
            pictures = adapter.draw(
                prompts, [torch.Generator().manual_seed(seed) for seed in seeds], guidance_scale=guidance_scale,
                num_inference_steps=steps, height=config.data.resolution, width=config.data.resolution,
                **({"num_frames": config.data.frames} if config.data.frames else {}),
            )  # fmt: skip
    finally:
        for module, training in states:
            module.train(training)
    return list((pictures * 255).round().astype(np.uint8))


@contextmanager
def _exact_decoding(adapter: Any) -> Iterator[None]:
    """Inside, pictures are decoded without autocast: SDXL's autoencoder overflows in float16."""
    vae = adapter.vae
    decode = vae.decode

    def exactly(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with exact(adapter.device):
            return decode(latents.to(vae.dtype), *args, **kwargs)

    vae.decode = exactly
    try:
        yield
    finally:
        del vae.decode


def take_whole(adapter: Any, state: dict[str, torch.Tensor]) -> None:
    """Puts a whole denoiser in the place of one that several processes shared."""
    shared = adapter.denoiser
    adapter.denoiser = rebuilt(type(shared).from_config(shared.config), shared, state)
    setattr(adapter.pipe, adapter.denoiser_name, adapter.denoiser)


@torch.no_grad()
def export(adapter: Any, config: TrainConfig, folder: Path, facts: dict[str, Any]) -> None:
    """LoRA files for diffusers and ComfyUI, or the whole pipeline; and a model card."""
    denoiser = adapter.denoiser
    if has_adapter(adapter):
        state = {name: value.detach().cpu() for name, value in get_peft_model_state_dict(denoiser).items()}
        exporting.export_lora(
            state, denoiser.peft_config["default"], adapter.family, denoiser.config, folder, expert=config.model.expert
        )
    elif config.model.expert:
        denoiser.save_pretrained(folder / adapter.denoiser_name)
    else:
        exporting.export_full(adapter.pipeline(), folder)
    exporting.model_card(
        folder, config=config.model_dump(mode="json"), data=str(facts.get("data", "")), scores={},
        base_model=str(config.model.path), licence="other", family=adapter.family, lora=has_adapter(adapter),
        absent=[n for n in adapter.may_lack if getattr(adapter.pipe, n) is None and not config.model.expert],
    )  # fmt: skip
