"""The names that kohya-ss/sd-scripts and ComfyUI have for the modules of a UNet, and reading a LoRA file with them.

- kohya-ss/sd-scripts (``networks/lora.py``) joins ``lora_unet_`` and the module's path with underscores, and stores
  ``lora_down``, ``lora_up`` and a scalar ``alpha``; the update is ``alpha / rank * up @ down``. For SD 1.x and 2.x the
  path is that of the diffusers UNet (``down_blocks_0_attentions_0_...``), for SDXL that of the original
  latent-diffusion UNet (``input_blocks_4_1_...``; the same file's ``get_block_index``).
- ComfyUI (``comfy/lora.py``, ``model_lora_keys_unet``) accepts both spellings for both families, its table of
  equivalents being ``unet_to_diffusers`` in ``comfy/utils.py``. So the files here keep to what kohya publishes.

``convert_state_dict_to_kohya`` of diffusers is not used: it writes ``alpha = rank`` whatever alpha was, and diffusers
names for SDXL too.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

_PEFT_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_KOHYA_KEY = re.compile(r"(?P<module>lora_unet_[^.]+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
KOHYA_PARTS = {"A": "lora_down.weight", "B": "lora_up.weight"}

# Modules outside of the blocks, and the insides of a residual block: diffusers name -> latent-diffusion name.
_LDM_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_LDM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_LDM_MIDDLE = {("resnets", 0): 0, ("attentions", 0): 1, ("resnets", 1): 2}
_BLOCK = re.compile(
    r"(?:(?P<side>down|up)_blocks\.(?P<block>\d+)|mid_block)\."
    r"(?P<kind>resnets|attentions|downsamplers|upsamplers)\.(?P<layer>\d+)\.(?P<rest>.+)"
)


def ldm_name(module: str, unet_config: Mapping[str, Any]) -> str:
    """Name a module of a diffusers UNet as the original latent-diffusion UNet does.

    With L layers per block, ``down_blocks.b.*.j`` is ``input_blocks.(1 + b(L+1) + j)`` and ``up_blocks.b.*.j`` is
    ``output_blocks.(b(L+1) + j)``; within one, the residual block is 0, the attention 1, and an upsampler comes after
    them. Source: ``unet_to_diffusers`` in ComfyUI's ``comfy/utils.py``.

    Args:
        module: dotted path, for example ``down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q``.
        unet_config: the UNet's configuration; ``layers_per_block`` and ``up_block_types`` are read.

    Returns:
        Dotted path, for example ``input_blocks.4.1.transformer_blocks.0.attn1.to_q``.

    Raises:
        ValueError: the module has no counterpart, or the blocks differ in their number of layers.
    """
    if module in _LDM_TOP:
        return _LDM_TOP[module]
    layers = unet_config["layers_per_block"]
    match = _BLOCK.fullmatch(module)
    if match is None or not isinstance(layers, int):
        raise ValueError(
            f"'{module}' has no name in the latent-diffusion UNet (layers_per_block is {layers}), so there is no kohya "
            "file for it; take it out of the LoRA targets, or export for diffusers alone with comfyui=False."
        )
    side, kind, layer = match["side"], match["kind"], int(match["layer"])
    rest = _LDM_RESNET.get(match["rest"], match["rest"]) if kind == "resnets" else match["rest"]
    if side is None:
        return f"middle_block.{_LDM_MIDDLE[kind, layer]}.{rest}"
    first = int(match["block"]) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{1 + first + layers}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        inner = 2 if "CrossAttn" in unet_config["up_block_types"][int(match["block"])] else 1
        return f"output_blocks.{first + layers}.{inner}.{rest}"
    inner = 1 if kind == "attentions" else 0
    return (
        f"input_blocks.{1 + first + layer}.{inner}.{rest}"
        if side == "down"
        else (f"output_blocks.{first + layer}.{inner}.{rest}")
    )


def kohya_name(module: str, family: str, unet_config: Mapping[str, Any]) -> str:
    """Name a UNet module as a published kohya file of this family does, for example ``lora_unet_mid_block_...``."""
    path = ldm_name(module, unet_config) if family == "sdxl" else module
    return "lora_unet_" + path.replace(".", "_")


def import_kohya(path: str | Path, unet: nn.Module) -> tuple[dict[str, Tensor], LoraConfig]:
    """Read a kohya / ComfyUI LoRA file as a PEFT adapter of a diffusers UNet.

    Both spellings of the module names are understood, whatever the family, since they are looked up among the UNet's
    own modules. A module without an ``alpha`` has alpha equal to its rank, as in sd-scripts.

    Args:
        path: safetensors file.
        unet: the ``UNet2DConditionModel`` that the LoRA is for, with or without an adapter; it is not changed.

    Returns:
        The state in the layout of ``get_peft_model_state_dict`` and the ``LoraConfig`` for ``unet.add_adapter``.

    Raises:
        ValueError: a key is no UNet LoRA weight, belongs to no module of this UNet, does not fit it, or has no partner.
    """
    targets = _targets(unet)
    config: Mapping[str, Any] = unet.config  # type: ignore[assignment]
    modules = {kohya_name(module, "sd", config): module for module in targets}
    if isinstance(config["layers_per_block"], int):
        modules |= {kohya_name(m, "sdxl", config): m for m in targets if m in _LDM_TOP or _BLOCK.fullmatch(m)}
    state: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for key, tensor in load_file(str(path)).items():
        match = _KOHYA_KEY.fullmatch(key)
        if match is None:
            kind = "a text encoder" if key.startswith("lora_te") else "no plain LoRA of a UNet"
            raise ValueError(f"'{path}': '{key}' belongs to {kind}; take such keys out of the file, they are not read.")
        if match["module"] not in modules:
            raise ValueError(
                f"'{path}': this UNet has no module for '{key}'; is the file for another family of models?"
            )
        module = modules[match["module"]]
        if match["part"] == "alpha":
            alphas[module] = float(tensor)
        else:
            state[f"{module}.lora_{'A' if 'down' in match['part'] else 'B'}.weight"] = tensor
    pairs = pairs_of(state)
    for module, (down, up) in pairs.items():
        weight = targets[module]
        if down.shape[1:] != weight.shape[1:] or up.shape[0] != weight.shape[0]:
            raise ValueError(
                f"'{path}': the LoRA of '{module}' maps {down.shape[1]} to {up.shape[0]} channels and the module maps "
                f"{weight.shape[1]} to {weight.shape[0]}; use the base model that the file was made for."
            )
    full = {module: alphas.get(module, float(down.shape[0])) for module, (down, _) in pairs.items()}
    return state, LoraConfig(**metadata(pairs, full))


def pairs_of(state: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Group an adapter's tensors by module, on the CPU and contiguous: {module: (A, B)}, sorted by module."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _PEFT_KEY.fullmatch(key)
        if match is None:
            raise ValueError(
                f"'{key}' is no plain LoRA weight (lora_A.weight or lora_B.weight), and there is no common file format "
                "for it; train with use_dora=False, lora_bias=False and no modules_to_save."
            )
        parts.setdefault(match["module"], {})[match["part"]] = tensor.detach().cpu().contiguous()
    if not parts:
        raise ValueError("the adapter is empty; give the output of get_peft_model_state_dict(unet).")
    for module, pair in parts.items():
        if len(pair) == 1:
            raise ValueError(f"the LoRA of '{module}' has lora_{next(iter(pair))} alone; both A and B are needed.")
    return {module: (parts[module]["A"], parts[module]["B"]) for module in sorted(parts)}


def alpha_of(module: str, rank: int, config: LoraConfig) -> float:
    """Return the alpha for which ``alpha / rank`` is the scale that PEFT applies to this module.

    Patterns match the end of a module's path, as in PEFT. With ``use_rslora`` PEFT scales by ``alpha / sqrt(rank)``
    (Kalajdzievski, arXiv:2312.03732), which no file format can say, so it is folded into alpha.
    """
    patterns = config.alpha_pattern or {}
    key = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(config.lora_alpha if key is None else patterns[key])
    return alpha * math.sqrt(rank) if config.use_rslora else alpha


def metadata(pairs: Mapping[str, tuple[Tensor, Tensor]], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return the ``LoraConfig`` arguments that rebuild the adapter: the most common rank and alpha, and exceptions."""
    ranks = {module: down.shape[0] for module, (down, _) in pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        # "^" makes a pattern match the whole path: "conv_in" would match "down_blocks.0.conv_in" too.
        "rank_pattern": {f"^{module}": value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{module}": value for module, value in alphas.items() if value != alpha},
        "target_modules": sorted(pairs),
    }


def kohya_header(pairs: Mapping[str, tuple[Tensor, Tensor]], alphas: Mapping[str, float]) -> dict[str, str]:
    """Return the header entries that sd-scripts writes and viewers show; ``Dynamic`` is its word for mixed values."""
    ranks, values = {down.shape[0] for down, _ in pairs.values()}, set(alphas.values())
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(values.pop()) if len(values) == 1 else "Dynamic",
    }


def _targets(unet: nn.Module) -> dict[str, Tensor]:
    """Return the weight of every linear and convolution module of a UNet, by the name it has without an adapter."""
    return {
        name.removesuffix(".base_layer"): module.weight
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name
    }
