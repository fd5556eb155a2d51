"""Finding, checking and loading a checkpoint folder; `models/adapter.py` is what comes out."""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Adapter
from mmalign.models.checkpoint import check_folder, component_faults, index_parts, part_class, variant_in
from mmalign.paths import find
from mmalign.weights import files_hash

EXPERT = "mmalign.expert"
"""In the header of a LoRA file, which of two transformers it is for: high or low."""

_HASHED = {".safetensors", ".json", ".txt", ".model"}
MISFITS = (RuntimeError, ValueError, KeyError, SafetensorError)  # how diffusers says that a LoRA does not fit
_CLASSES = {
    "StableDiffusionPipeline": ("sd", "mmalign.models.sd:StableDiffusion"),
    "StableDiffusionXLPipeline": ("sdxl", "mmalign.models.sdxl:StableDiffusionXL"),
    "StableDiffusion3Pipeline": ("sd3", "mmalign.models.sd3:StableDiffusion3"),
    "FluxPipeline": ("flux", "mmalign.models.flux:Flux"),
    "PixArtSigmaPipeline": ("pixart", "mmalign.models.pixart:PixArtSigma"),
    "SanaPipeline": ("sana", "mmalign.models.sana:Sana"),
    "QwenImagePipeline": ("qwen_image", "mmalign.models.qwen_image:QwenImage"),
    "WanPipeline": ("wan", "mmalign.models.wan:Wan"),
    "WanImageToVideoPipeline": ("wan_i2v", "mmalign.models.image_to_video:WanImage"),
    "CogVideoXPipeline": ("cogvideox", "mmalign.models.cogvideox:CogVideoX"),
    "CogVideoXImageToVideoPipeline": ("cogvideox_i2v", "mmalign.models.image_to_video:CogVideoXImage"),
    "HunyuanVideoPipeline": ("hunyuan_video", "mmalign.models.hunyuan_video:HunyuanVideo"),
    "HunyuanVideoImageToVideoPipeline": (
        "hunyuan_video_i2v",
        "mmalign.models.hunyuan_video_image:HunyuanVideoImage",
    ),
    "LTXPipeline": ("ltx", "mmalign.models.ltx:LTXVideo"),
    "LTXImageToVideoPipeline": ("ltx_i2v", "mmalign.models.image_to_video:LTXVideoImage"),
    "AnimateDiffPipeline": ("animatediff", "mmalign.models.animatediff:AnimateDiff"),
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
        raise ValueError(
            f"{path}: no adapter for {name or 'an index without _class_name'}; known: {', '.join(_CLASSES)}"
        )
    return _CLASSES[name][0]


def modality_of(config: Model) -> str:
    """What a checkpoint draws, image or video, before it is loaded. ValueError as `family_of`."""
    return modality_of_family(family_of(find(config.path)))


def modality_of_family(family: str) -> str:
    """What a family of generators draws: image or video."""
    return _class(family).modality


def goes_on_from_image(config: Model) -> bool:
    """Whether a checkpoint draws clips that go on from a picture. ValueError as `family_of`."""
    return adapter_class(find(config.path)).of_image


def adapter_class(path: Path) -> type[Adapter]:
    """The class of the adapter of a checkpoint folder. ValueError as `family_of`."""
    return _class(family_of(path))


def _class(family: str) -> type[Adapter]:
    module, _, name = {key: where for key, where in _CLASSES.values()}[family].partition(":")
    found: type[Adapter] = getattr(importlib.import_module(module), name)
    return found


def pipeline_name(family: str) -> str:
    """The name of the diffusers pipeline class of a family."""
    return {known: name for name, (known, _) in _CLASSES.items()}[family]


def check(config: Model) -> Path:
    """Looks at a checkpoint folder and at what replaces its parts, before any weights are loaded; the folder.

    Raises:
        ValueError: anything that would not load, or would load as something else than it says; the message has the fix.
    """
    path = find(config.path)
    skip = ("safety_checker", "feature_extractor", *config.components, *config.from_scratch)
    check_folder(path, variant=config.variant, skip=skip)
    folders = (path, *map(find, config.components.values()))
    if config.variant and not any(variant_in(folder, config.variant) for folder in folders):
        raise ValueError(f"model.variant: {path} has no weights of the variant {config.variant!r}; drop the key")
    parts = index_parts(path)
    for name in (*config.components, *config.from_scratch):
        if name not in parts:
            raise ValueError(f"{path} has no part {name!r} to replace; it has: {', '.join(parts)}")
    for name in config.from_scratch:
        folder = find(config.components.get(name, path / name))
        if not (folder / "config.json").is_file():
            raise ValueError(f"model.from_scratch: {name} is made from {folder / 'config.json'}, which does not exist")
    for name in config.components.keys() - set(config.from_scratch):
        folder = find(config.components[name])
        faults = ["the folder does not exist."]
        if folder.is_dir():
            faults = component_faults(folder, *part_class(path, name), variant_in(folder, config.variant))
        if faults:
            raise ValueError(f"model.components.{name}: {folder} cannot be used: {' '.join(faults)}")
    if config.lora:
        lora_file(config.lora)
    family = family_of(path)
    if config.family not in ("auto", family):
        raise ValueError(
            f"{config.path} holds a {family} model, but model.family says {config.family}; write family: auto"
        )
    return path


def load(
    config: Model,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    vae_dtype: torch.dtype | None = None,
    waiting: Collection[str] = (),
    training: bool = False,
) -> Adapter:
    """Loads a checkpoint folder behind its family's adapter; `vae_dtype` is `dtype` unless given.

    `waiting`: parts that stay in CPU memory until `Adapter.at_hand` lends them to the device; `text_encoder` is all.
    `training`: leaves out what training has no use for.

    A LoRA is added to float32 weights, and stays beside those of half precision, which would round most of so small an
    update away.

    Raises:
        ValueError: see `check`.
    """
    path = check(config)
    no_bars()
    found = config.model_copy(update={"path": path})
    kind = adapter_class(path)
    idle = kind.idle_in_training(found) if training or config.expert else ()
    away = {name for each in waiting for name in (kind.text_encoders if each == "text_encoder" else (each,))}
    adapter: Adapter = kind.load(
        found, device=device, dtype=dtype, vae_dtype=vae_dtype or dtype, waiting=away, without=idle if training else ()
    )
    work_in_parts(adapter)
    if config.lora:
        _check_expert(adapter, lora_file(config.lora))
        _add_lora(adapter, lora_file(config.lora), fuse=dtype == torch.float32)
    return adapter


def _check_expert(adapter: Adapter, file: Path) -> None:
    """ValueError where a LoRA is for the other one of two transformers, or nothing says which it is for."""
    with safe_open(file, "pt") as opened:
        told = (opened.metadata() or {}).get(EXPERT)
    wanted = adapter.config.expert
    both = getattr(adapter.pipe, "transformer_2", None) is not None
    if both and wanted is None:
        raise ValueError(
            f"model.lora: {file} is for one of two transformers; set model.expert: {told or 'high or low'}"
        )
    if told and wanted and told != wanted:
        raise ValueError(f"model.lora: {file} is for the transformer of {told} noise; set model.expert: {told}")


def work_in_parts(adapter: Adapter) -> None:
    """Turns on the autoencoder's slicing and tiling as `model.vae` says.

    Raises:
        ValueError: this autoencoder has no such thing.
    """
    for name in ("slicing", "tiling"):
        if getattr(adapter.config.vae, name):
            if not hasattr(adapter.vae, f"use_{name}"):
                kind = type(adapter.vae).__name__
                raise ValueError(f"model.vae.{name}: the autoencoder of {adapter.family} ({kind}) has none; drop it")
            getattr(adapter.vae, f"enable_{name}")()


def no_bars() -> None:
    """Turns off the libraries' bars: loading takes a second, and mmalign's own progress must stay readable."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def lora_file(path: Path, key: str = "model.lora") -> Path:
    """The safetensors file of a LoRA, given as a file or a folder, such as a run's export. ValueError without one."""
    path = find(path)
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    if not file.exists():
        raise ValueError(
            f"{key}: {file} does not exist; give a LoRA file, or a folder with this file (a run's export/)"
        )
    if file.suffix != ".safetensors":
        raise ValueError(f"{key}: {file} is not a safetensors file, and pickled weights are refused; convert it first")
    return file


def _add_lora(adapter: Adapter, file: Path, fuse: bool) -> None:
    """Puts a LoRA beside the weights, or adds it to them.

    Raises:
        ValueError: not every tensor of the file has its place in the model.
    """
    import diffusers

    fix = "it was trained on another architecture; give the LoRA of this model, or the model of this LoRA"
    logging = diffusers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn that a LoRA of the denoiser has nothing for the text encoder
    pipe, denoiser = adapter.pipeline(), adapter.denoiser
    # PixArt-Sigma's pipeline has no LoRA loader, its transformer has; and of two transformers only one may be there.
    own = hasattr(pipe, "load_lora_weights") and adapter.config.expert is None
    options = {"weight_name": file.name, "local_files_only": True, "use_safetensors": True}
    try:
        if own:
            pipe.load_lora_weights(str(file.parent), **options)
        else:
            denoiser.load_lora_adapter(str(file.parent), prefix="transformer", **options)
    except MISFITS as error:
        raise ValueError(f"model.lora: {file} does not fit the model ({str(error).splitlines()[0]}); {fix}") from error
    finally:
        logging.set_verbosity(level)
    if not (pipe.get_active_adapters() if own else getattr(denoiser, "peft_config", None)):
        raise ValueError(f"model.lora: no tensor of {file} has a place in the model; {fix}")
    loaded = pipe if own else denoiser
    updates = [] if fuse else _updates(pipe)
    if fuse:
        # All parts that can have one: FLUX's own default leaves its text encoder out.
        parts = [name for name in getattr(pipe, "_lora_loadable_modules", ()) if getattr(pipe, name, None) is not None]
        loaded.fuse_lora(**({"components": parts} if own else {}))
    getattr(loaded, "unload_lora_weights" if own else "unload_lora")()
    for part, name, update in updates:
        part.get_submodule(name).register_forward_hook(update)


def _updates(pipe: Any) -> list[tuple[nn.Module, str, Any]]:
    """The LoRA layers of all parts of a pipeline, as forward hooks of the layers that they belong to.

    As hooks they stay when training adds a LoRA of its own, and when that is switched off for the reference.
    """
    from peft.tuners.lora import LoraLayer

    found = []
    for part in pipe.components.values():
        for name, layer in part.named_modules() if isinstance(part, nn.Module) else ():
            if isinstance(layer, LoraLayer):
                for adapter in layer.active_adapters:
                    if adapter in layer.lora_magnitude_vector:
                        raise ValueError(
                            "model.lora: a DoRA scales the weights themselves, which half precision rounds away; "
                            "use float32, or export the whole pipeline with it first"
                        )
                    down, up = (of[adapter].requires_grad_(False) for of in (layer.lora_A, layer.lora_B))
                    found.append((part, name, partial(_added, down, up, layer.scaling[adapter])))
    return found


def _added(down: Any, up: Any, scale: float, layer: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
    """What a LoRA layer makes of its layer's output, computed as PEFT does."""
    return (out + up(down(given[0].to(down.weight.dtype))) * scale).to(out.dtype)


def fingerprint(config: Model) -> dict[str, str]:
    """sha256 of each part of a model (weights, configs, vocabularies), with the variant, and of its LoRA."""
    path = find(config.path)
    named = index_parts(path) if (path / "model_index.json").is_file() else {}
    off = {name for name, (library, _) in named.items() if not library}  # not loaded, whatever lies in the folder
    parts = {part.name: part for part in path.iterdir() if part.is_dir() and part.name not in off}
    parts |= {name: find(folder) for name, folder in config.components.items()}
    parts |= {"lora": lora_file(config.lora)} if config.lora else {}
    files = {name: [part] if part.is_file() else sorted(part.rglob("*")) for name, part in sorted(parts.items())}
    which = f"-{config.variant}" if config.variant else ""
    hashes = {
        name: (files_hash(f for f in found if f.suffix in _HASHED) or "empty") + which for name, found in files.items()
    }
    if config.vae.tiling and "vae" in hashes:  # its latents are others
        hashes["vae"] += "-tiled"
    return hashes


def sample_latents(moments: Tensor, noise: Tensor) -> Tensor:
    """Latents from posterior moments [B, 2, C, h, w] and unit noise [B, C, h, w]."""
    return moments[:, 0] + moments[:, 1] * noise
