"""The contract of a model adapter, and the loader that picks one.

A family differs from the others here and nowhere else. An adapter is a plain class with these members:

    family: str                      its name in a config
    parameterisation: "eps" | "v"    what the denoiser predicts
    denoiser: nn.Module              what is fine-tuned
    alphas_cumprod: Tensor [T]       the noise schedule
    latent_shape(height, width)      -> (C, h, w)
    encode_prompt(prompts, grad)     -> Condition: dict of tensors, first dim B
    add_size(condition, sizes)       -> the condition with what the family needs to know of picture sizes and crops
    encode_media(pixels)             [B, 3, H, W] in [-1, 1] -> moments [B, 2, C, h, w]: scaled mean and std of the posterior
    decode(latents)                  -> pixels [B, 3, H, W] in [-1, 1]
    noisy, target, predict, step     the process; see `StableDiffusion`
    pipeline()                       the diffusers pipeline that shares these modules
    lora_targets                     default modules of an adapter
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.jobs import FAMILIES, Model
from mmalign.paths import find

Condition = dict[str, Tensor]
_CLASSES = {
    "StableDiffusionPipeline": ("sd", "mmalign.models.sd:StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "mmalign.models.sdxl:StableDiffusionXL"),
}


def family_of(path: Path) -> str:
    """The family of a checkpoint folder, from its model_index.json.

    Raises:
        ValueError: the folder or the index is missing, or no adapter knows the pipeline class.
    """
    index = path / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{path}: no model_index.json here; model.path must be a folder that save_pretrained wrote")
    name = json.loads(index.read_text()).get("_class_name", "")
    if name not in _CLASSES:
        raise ValueError(f"{path}: no adapter for {name or 'an index without _class_name'}; known: {', '.join(_CLASSES)}")
    return _CLASSES[name][0]


def load(config: Model, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Loads a checkpoint folder behind its family's adapter. Raises ValueError with the fix for a bad folder."""
    from mmalign.models.checkpoint import check_folder

    path = find(config.path)
    if not config.from_scratch:
        check_folder(path, skip=("safety_checker", "feature_extractor", *config.components))
    found = family_of(path)
    family = found if config.family == "auto" else config.family
    if family != found:
        raise ValueError(f"{config.path} holds a {found} model, but model.family says {family}; write family: auto")
    module, _, name = {key: where for key, where in _CLASSES.values()}[family].partition(":")
    assert family in FAMILIES
    adapter = getattr(importlib.import_module(module), name).load(config.model_copy(update={"path": path}), device=device, dtype=dtype)
    if config.lora:
        if not config.lora.exists():
            raise ValueError(f"model.lora: {config.lora} does not exist; give a folder or file with LoRA weights")
        adapter.pipeline().load_lora_weights(str(config.lora), local_files_only=True)
        adapter.pipeline().fuse_lora()
        adapter.pipeline().unload_lora_weights()
    return adapter


def sample_latents(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents from posterior moments [B, 2, C, h, w] and unit noise [B, C, h, w]."""
    return moments[:, 0] + moments[:, 1] * noise
