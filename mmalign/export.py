"""Turn a trained denoiser into files that other tools load: LoRA for diffusers and ComfyUI, full pipeline, model card.

Diffusers reads ``unet.<module>.lora_A.weight`` or ``transformer.<module>.lora_A.weight`` from
``pytorch_lora_weights.safetensors``, with rank and alpha from the ``lora_adapter_metadata`` entry of the file's header
(``diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY``). ComfyUI (``comfy/lora.py``) reads kohya's names for a UNet
(`mmalign.kohya`), and diffusers' names with an ``alpha`` beside them for the transformers that it knows.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import yaml
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor

from mmalign import kohya
from mmalign.models.base import EXPERT, modality_of_family, pipeline_name
from mmalign.models.checkpoint import check_folder

UNETS = ("sd", "sdxl", "animatediff")
WITHOUT_COMFYUI = {
    "animatediff": "ComfyUI has no motion modules of its own",
    "cogvideox": "ComfyUI's LoRA loader has no names for it",
    "cogvideox_i2v": "the same",
    "hunyuan_video": "ComfyUI joins its projections into one, which LoRAs of each cannot be",
    "hunyuan_video_i2v": "the same",
}
"""Families whose LoRA is not written for ComfyUI, and why."""

_WAN = (
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0$", ".o"),
    (r"\.to_([qkv])$", r".\1"),
    (r"\.add_([kv])_proj$", r".\1_img"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
)
"""Modules of a block of Wan in diffusers, and in ComfyUI's `comfy/ldm/wan/model.py`."""


def export_lora(
    adapter_state: Mapping[str, Tensor],
    config: LoraConfig,
    family: str,
    denoiser_config: Mapping[str, Any],
    output: str | Path,
    *,
    name: str = "mmalign",
    comfyui: bool = True,
    expert: str | None = None,
) -> list[Path]:
    """Write a LoRA of a denoiser for diffusers and for ComfyUI.

    A family whose pipeline loads no LoRA also gets the files of PEFT.
    ``<output>/pytorch_lora_weights.safetensors`` loads with ``pipe.load_lora_weights(output)``, and
    ``<output>/comfyui/<name>.safetensors`` with ComfyUI; that of a UNet also with sd-scripts, AUTOMATIC1111 and
    diffusers. Both keep the tensors as they are and carry the scale beside them, so nothing is rounded when alpha
    differs from the rank. Two limits are the readers': a diffusers too old for adapter metadata takes alpha for the
    rank (give it the second file), and diffusers (seen in 0.42) drops alphas that differ between the modules of a kohya
    file (give it the first one).

    Args:
        adapter_state: as ``get_peft_model_state_dict(denoiser)`` gives it: ``<module>.lora_A.weight`` of shape [r, in]
            (or [r, in, k, k]) and ``<module>.lora_B.weight`` of shape [out, r] (or [out, r, 1, 1]).
        config: the adapter's ``LoraConfig``; ``r``, ``lora_alpha``, their patterns and ``use_rslora`` are read.
        family: a name in ``mmalign.jobs_inputs.FAMILIES``; those in `UNETS` have a UNet, the others a transformer.
        denoiser_config: the denoiser's ``config``; read for the block numbers of SDXL.
        output: folder to write into.
        name: file name, without suffix, of the ComfyUI file.
        comfyui: write the ComfyUI file, unless the family is in `WITHOUT_COMFYUI`.
        expert: of two transformers the one that the LoRA is for. diffusers' keys are the same for both, and its
            loader's `load_into_transformer_2` says which is meant; so this goes into the file's header.

    Returns:
        The files written.

    Raises:
        ValueError: a tensor is no plain LoRA weight (DoRA, biases), one of a pair is missing, or the adapter is empty.
    """
    pairs = kohya.pairs_of(adapter_state)
    scales = {module: kohya.alpha_of(module, down.shape[0], config) for module, (down, _) in pairs.items()}
    unet, comfyui = family in UNETS, comfyui and family not in WITHOUT_COMFYUI
    prefix = "unet" if unet else "transformer"
    # The kohya names are made first: a module that has none fails before anything is written.
    named = {module: _comfyui_name(module, family, denoiser_config) for module in pairs} if comfyui else {}
    tensors = {
        f"{prefix}.{module}.lora_{part}.weight": tensor
        for module, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    settings = {f"{prefix}.{key}": value for key, value in kohya.metadata(pairs, scales).items()}
    header = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}
    header |= {EXPERT: expert} if expert else {}
    folder = Path(output)
    written = [_save(tensors, folder / "pytorch_lora_weights.safetensors", header)]
    if not _loads_lora(family):
        written += _save_peft(pairs, config, folder)
    if comfyui:
        parts = kohya.KOHYA_PARTS if unet else {"A": "lora_A.weight", "B": "lora_B.weight"}
        tensors = {}
        for module, pair in pairs.items():
            for part, tensor in zip("AB", pair, strict=True):
                tensors[f"{named[module]}.{parts[part]}"] = tensor
            tensors[f"{named[module]}.alpha"] = torch.tensor(scales[module], dtype=torch.float32)
        header = kohya.kohya_header(pairs, scales) if unet else {"format": "pt"}
        written.append(_save(tensors, folder / "comfyui" / f"{name}.safetensors", header))
    return written


def _loads_lora(family: str) -> bool:
    """Whether the family's pipeline has a loader of LoRA files; PixArt-Sigma's has none, and PEFT loads its LoRA."""
    return hasattr(getattr(diffusers, pipeline_name(family)), "load_lora_weights")


def _save_peft(pairs: Mapping[str, tuple[Tensor, Tensor]], config: LoraConfig, folder: Path) -> list[Path]:
    """The two files that `PeftModel.from_pretrained` reads; written by hand since PEFT's own vary from run to run."""
    tensors = {
        f"base_model.model.{module}.lora_{part}.weight": tensor
        for module, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    settings = {**config.to_dict(), "inference_mode": True}
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(settings, indent=2, sort_keys=True, default=sorted) + "\n")  # sets in order
    return [_save(tensors, folder / "adapter_model.safetensors", {"format": "pt"}), file]


def _comfyui_name(module: str, family: str, denoiser_config: Mapping[str, Any]) -> str:
    """Kohya's name for a UNet's module; for a transformer's the one of diffusers, which ComfyUI maps to its own, or its
    own where it does not.
    """
    if family in UNETS:
        return kohya.kohya_name(module, family, denoiser_config)
    family = family.removesuffix("_i2v")
    if family not in ("ltx", "wan"):
        return f"transformer.{module}"
    for theirs, comfy in _WAN if family == "wan" else ():
        module = re.sub(theirs, comfy, module)
    return f"diffusion_model.{module}"


def export_full(pipeline: Any, output: str | Path) -> Path:
    """Write a fully fine-tuned pipeline with ``save_pretrained`` and check what was written.

    Args:
        pipeline: a diffusers pipeline that holds the trained denoiser (without an adapter).
        output: folder to write.

    Returns:
        The folder, which ``from_pretrained`` loads.

    Raises:
        ValueError: the denoiser still carries an adapter, whose tensor names no plain pipeline would load.
    """
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    if getattr(denoiser, "peft_config", None):
        raise ValueError("the denoiser carries a LoRA adapter: write it with export_lora, or fuse and unload it first.")
    for name in (
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
    ):  # the last call's padding would be saved as the tokenizer's own
        backend = getattr(getattr(pipeline, name, None), "backend_tokenizer", None)
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()
    pipeline.save_pretrained(str(output), safe_serialization=True)
    check_folder(output)
    return Path(output)


def _save(tensors: dict[str, Tensor], file: Path, header: dict[str, str]) -> Path:
    """Write a safetensors file whose metadata is sorted: the library's own order changes from run to run."""
    data = save(tensors, metadata=header)
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])
    entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    os.replace(partial, file)
    return file


def model_card(
    path: str | Path,
    *,
    config: Mapping[str, Any],
    data: str,
    scores: Mapping[str, float | str | Mapping[str, float | str]],
    base_model: str,
    licence: str,
    family: str,
    lora: bool = True,
    absent: Sequence[str] = (),
) -> Path:
    """Write the ``README.md`` of an export: YAML front matter, how to load it, data, scores and configuration.

    Args:
        path: folder of the export, or the file to write.
        config: the resolved configuration of the run, of plain values.
        data: what it was trained on, in Markdown.
        scores: measure -> value, or measure -> {column -> value} (for example base and aligned).
        base_model: hub name or folder of the base model. Only a hub name goes into the front matter, where it links.
        licence: licence identifier as the hub spells it, for example ``openrail++``; most often the base model's.
        family: a name in ``mmalign.jobs_inputs.FAMILIES``.
        lora: whether the export is a LoRA or a full pipeline.
        absent: parts that the pipeline comes without, which plain diffusers wants to be told (text_encoder_3).

    Returns:
        The file written. Nothing is sent anywhere.
    """
    hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base_model) is not None and not Path(base_model).exists()
    shown = base_model if hub_name else Path(base_model).name
    kind = f"text-to-{modality_of_family(family)}"
    header = ModelCardData(
        license=licence,
        library_name="diffusers",
        pipeline_tag=kind,
        base_model=base_model if hub_name else None,
        tags=["mmalign", kind, "diffusers", *(["lora"] if lora else [])],
    )
    variant, expert = ((config.get("model") or {}).get(key) for key in ("variant", "expert"))
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {shown}, aligned with preferences",
        f"{'A LoRA for' if lora else 'A full fine-tune of'} `{shown}`, trained with mmalign.",
        f"## Use\n\n```python\n{_usage(shown, family, lora, absent, variant, expert)}\n```",
        f"## Data\n\n{data}",
        f"## Scores\n\n{_score_table(scores)}",
        f"## Configuration\n\n```yaml\n{yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False)}```",
    ]
    target = Path(path)
    file = target if target.suffix == ".md" else target / "README.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    ModelCard("\n\n".join(sections) + "\n").save(file)
    return file


def _usage(
    base_model: str, family: str, lora: bool, absent: Sequence[str], variant: str | None, expert: str | None = None
) -> str:
    name = pipeline_name(family)
    told = "".join(f", {part}=None" for part in absent)
    source = base_model if lora else "path/to/this/folder"
    told += f', variant="{variant}"' if lora and variant else ""
    lines = [f"from diffusers import {name}", "", f'pipe = {name}.from_pretrained("{source}"{told})']
    if expert and not lora:
        part = "transformer" if expert == "high" else "transformer_2"
        lines = [f"from diffusers import WanTransformer3DModel, {name}", ""]
        lines.append(f'part = WanTransformer3DModel.from_pretrained("path/to/this/folder", subfolder="{part}")')
        lines.append(f'pipe = {name}.from_pretrained("{base_model}", {part}=part)')
    elif lora and expert == "low":
        lines.append('pipe.load_lora_weights("path/to/this/folder", load_into_transformer_2=True)')
    elif lora and _loads_lora(family):
        lines.append('pipe.load_lora_weights("path/to/this/folder")')
    elif lora:
        lines.insert(1, "from peft import PeftModel")
        lines.append('pipe.transformer = PeftModel.from_pretrained(pipe.transformer, "path/to/this/folder")')
    if modality_of_family(family) == "image":
        return "\n".join([*lines, 'pipe("a prompt").images[0].save("image.png")'])
    lines.insert(1, "from diffusers.utils import export_to_video, load_image")
    told = 'load_image("first.png"), "a prompt"' if family.endswith("_i2v") else '"a prompt"'
    return "\n".join([*lines, f'export_to_video(pipe({told}).frames[0], "clip.mp4")'])


def _score_table(scores: Mapping[str, float | str | Mapping[str, float | str]]) -> str:
    if not scores:
        return "Not scored."
    rows = {name: value if isinstance(value, Mapping) else {"value": value} for name, value in scores.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [" | ".join(["measure", *columns]), " | ".join(["---", *["---:"] * len(columns)])]
    for name, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        lines.append(" | ".join([name, *(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)]))
    return "\n".join(f"| {line} |" for line in lines)
