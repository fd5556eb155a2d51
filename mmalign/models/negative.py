"""Guidance away from a model that was trained to be bad: Diffusion-NPO's unconditional branch (2505.11245)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.models.adapter import Adapter
from mmalign.models.base import MISFITS, lora_file


def guide_away(adapter: Adapter, path: Path, weight: float) -> None:
    """Lets a copy of the denoiser with a LoRA answer for the unconditional half of each guided call.

    The copy has the model's own weights (with `model.lora`, if there is one) plus `weight` times the LoRA's update.

    Args:
        path: a LoRA file of mmalign or diffusers, or the folder that holds it.
        weight: of the update, 0 changes nothing; the paper keeps the two branches near each other.

    Raises:
        ValueError: the family guides in two calls, or the file does not fit the denoiser.
    """
    if not adapter.guides_in_one_call:
        raise ValueError(
            f"negative_lora: the pipeline of {adapter.family} asks for both branches in separate calls; it works for "
            "sd, sdxl, sd3, pixart, sana, cogvideox, ltx and animatediff"
        )
    file = lora_file(path, "negative_lora")
    denoiser = adapter.denoiser
    negative = copy.deepcopy(denoiser)
    prefix = "unet" if adapter.denoiser_name == "unet" else "transformer"
    options = {"weight_name": file.name, "use_safetensors": True, "adapter_name": "negative"}
    try:
        negative.load_lora_adapter(str(file.parent), prefix=prefix, **options)
    except MISFITS as error:
        raise ValueError(f"negative_lora: {file} does not fit the model ({str(error).splitlines()[0]})") from error
    if not getattr(negative, "peft_config", None):
        raise ValueError(f"negative_lora: no tensor of {file} has a place in the {prefix}; it is of another model")
    negative.set_adapters("negative", weight)  # beside the weights: half precision would round it away in them
    plain = denoiser.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        latents = args[0] if args else kwargs["hidden_states"]
        total = len(latents)
        if total % 2:
            raise ValueError("negative_lora needs classifier-free guidance; set guidance_scale above 1")
        # AnimateDiff's UNet is told the text once for each frame.
        rows = {total, total * latents.shape[2]} if prefix == "unet" and latents.ndim == 5 else {total}
        away = negative(*_half(args, rows, 0), **_half(kwargs, rows, 0))
        towards = plain(*_half(args, rows, 1), **_half(kwargs, rows, 1))
        if isinstance(away, tuple):
            return (torch.cat([away[0], towards[0]]), *towards[1:])
        towards.sample = torch.cat([away.sample, towards.sample])
        return towards

    denoiser.forward = forward


def _half(value: Any, rows: set[int], which: int) -> Any:
    """The first or second half of every tensor that has as many rows as both branches have."""
    if isinstance(value, Tensor):
        return value.chunk(2)[which] if value.ndim and len(value) in rows else value
    if isinstance(value, dict):
        return {name: _half(item, rows, which) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_half(item, rows, which) for item in value)
    return value
