"""DreamSim's ensemble (Fu et al., 2306.09344): DINO, CLIP and OpenCLIP as ViT-B/16 with LoRA, in one embedding.

The layout is that of the authors' package from 0.2.0 on (release v0.2.0-checkpoints): two CLIP towers renamed to DINO's
names, with the norm before the blocks as ``pos_drop`` and the projection as ``proj``, and one LoRA folder of peft for
all three. DINO's own weights are not among them. The package asks a repository for DINO's code when it is used, which a
job must not do; here all three run on timm's class (`mmalign.backbones.dino`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.backbones.clip import Preprocess
from mmalign.backbones.clip_scoring import FORWARD_CHUNK, Resize, pil_pass, tower_pixels
from mmalign.backbones.dino import IMAGENET, SIDE, VIT_B_16, VitSizes, build_vit, by_size, vit_sizes, vit_tokens
from mmalign.weights import load_into, read_state_dict
from mmalign.weights_read import read_json

__all__ = [
    "CLIP_FILE",
    "LORA_CONFIG",
    "OPEN_CLIP_FILE",
    "DreamSim",
    "check_fits",
    "dreamsim_files",
    "load_dreamsim",
    "squash",
]

CLIP_FILE, OPEN_CLIP_FILE = "clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar"
LORA_CONFIG = "ensemble_lora/adapter_config.json"
TOWERS = ("DINO", "CLIP", "OpenCLIP")
_LORA = re.compile(r"base_model\.model\.extractor_list\.([012])\.model\.blocks\.(\d+)\.attn\.qkv\.lora_([AB])\.weight")
_CHANGED = ("use_dora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")


# ------------------------------------------------------------------------------------------------ pictures


def squash(
    images: Tensor, size: int, *, antialias: bool = True, levels: bool = False, overshoot: bool = False
) -> Tensor:
    """Bicubic to a square, whatever the proportions.

    Args:
        images: float [B, 3, H, W] in [0, 1].
        size: side of the result in pixels.
        antialias: False is torchvision's resize of a tensor without filter, whose overshoot beyond [0, 1] stays.
        levels: round to 1/255 after each of the two passes, as PIL does on 8-bit images.
        overshoot: as torchvision resizes a float tensor with a filter: in one pass, not clamped.

    Returns:
        [B, 3, size, size].
    """
    if images.shape[-2:] == (size, size):
        return images
    if overshoot or not antialias:
        return F.interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=antialias)
    return pil_pass(pil_pass(images, (images.shape[-2], size), levels), (size, size), levels)


# ------------------------------------------------------------------------------------------------ the network


class DreamSim:
    """Unit-length embeddings of pictures with frozen weights.

    DINO's class token as it leaves the last block (768 numbers, no norm), CLIP's and OpenCLIP's projected embeddings
    (512 each), put side by side, less their mean, divided by their norm.

    Attributes:
        width: number of features.
        device, dtype: where and in what precision the networks run; projections and what follows are float32.
    """

    def __init__(self, towers: Sequence[Any], projections: Sequence[Tensor], device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self._towers = [tower.eval().requires_grad_(False).to(device=device, dtype=dtype) for tower in towers]
        self._projections = [projection.float().to(device) for projection in projections]
        self.width = int(towers[0].embed_dim) + sum(projection.shape[1] for projection in projections)

    def images(self, images: Tensor, resize: Resize) -> Tensor:
        """Embeddings of images of one size.

        Args:
            images: uint8 [N, 3, H, W], or float in [0, 1] where a gradient is wanted.
            resize: to the networks' input, from images in [0, 1] and `SIDE`.

        Returns:
            float32 [N, width] on the device.
        """
        return torch.cat([self._embed(chunk, resize) for chunk in images.split(FORWARD_CHUNK)])

    def _embed(self, images: Tensor, resize: Resize) -> Tensor:
        plain = tower_pixels(images, resize, Preprocess(SIDE, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), self.device)
        dino, *clips = self._towers
        parts = [vit_tokens(dino, IMAGENET.normalise(plain).to(self.dtype))[:, 0].float()]
        pixels = Preprocess(SIDE).normalise(plain).to(self.dtype)
        for clip, projection in zip(clips, self._projections, strict=True):
            parts.append(clip.norm(vit_tokens(clip, pixels)[:, 0]).float() @ projection)
        together = torch.cat(parts, dim=-1)
        return F.normalize(together - together.mean(-1, keepdim=True), dim=-1)

    def frames(self, clips: Sequence[Tensor], resize: Resize) -> Tensor:
        """Embeddings of every frame of clips uint8 [T, 3, H, W] of any sizes: float32 [sum of T, width]."""
        return by_size(clips, lambda frames: self.images(frames, resize))


# ------------------------------------------------------------------------------------------------ checkpoints


def dreamsim_files(lora: Path, dino: Path) -> list[Path]:
    """Every file that decides an embedding.

    Args:
        lora: ``ensemble_lora/adapter_model.safetensors``; the others lie where the authors' archive has them.
        dino: DINO's ViT-B/16.

    Raises:
        ValueError: one of the archive's files is missing.
    """
    root = lora.parent.parent
    files = [lora, lora.parent / Path(LORA_CONFIG).name, root / CLIP_FILE, root / OPEN_CLIP_FILE]
    absent = [str(file) for file in files if not file.is_file()]
    if absent:
        raise ValueError(
            f"DreamSim: {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing; unzip the whole "
            "dreamsim_ensemble_checkpoint.zip in one folder."
        )
    return [*files, dino]


def load_dreamsim(*, lora: Path, dino: Path, device: torch.device, dtype: torch.dtype) -> DreamSim:
    """Loader for a `BackboneSpec`, from the files that `dreamsim_files` names; LoRA is added to the weights.

    Raises:
        ValueError: a file is missing or cannot be read safely; tensors are missing, unexpected or mis-shaped, all
            named; the LoRA is of a kind that the authors' is not.
    """
    file, config, clip, open_clip, dino = dreamsim_files(lora, dino)
    scale = _scale(config)
    changes = _by_tower(read_state_dict(file), str(file))
    towers, projections = [], []
    for number, (origin, settings) in enumerate(_places(dino, clip, open_clip)):
        state = read_state_dict(origin)
        if number:
            projections.append(_projection(state, str(origin)))
            state = {re.sub(r"^pos_drop\.", "norm_pre.", name): value for name, value in state.items()}
        sizes = vit_sizes(state, str(origin))
        vit = build_vit(sizes, **settings)
        load_into(vit, state, str(origin))
        _check_lora(changes[number], sizes, TOWERS[number], str(file))
        for block, (down, up) in changes[number].items():
            vit.blocks[block].attn.qkv.weight.data += scale * (up.float() @ down.float())
        towers.append(vit)
    return DreamSim(towers, projections, device, dtype)


class _QuickGELU(nn.Module):
    """OpenAI's: x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def _places(dino: Path, clip: Path, open_clip: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Each tower's file, and how its network differs from DINO's."""
    norms: dict[str, Any] = {"epsilon": 1e-5, "pre_norm": True}
    return [(dino, {}), (clip, {**norms, "activation": _QuickGELU}), (open_clip, norms)]


def _projection(state: dict[str, Tensor], origin: str) -> Tensor:
    if "proj" not in state or "pos_drop.weight" not in state:
        raise ValueError(
            f"{origin}: proj or pos_drop.weight is missing; it has to be a CLIP with DINO's names, as "
            f"DreamSim's archive has it in {CLIP_FILE} and {OPEN_CLIP_FILE}."
        )
    return state.pop("proj")


def _scale(config: Path) -> float:
    """What the product of LoRA's two matrices is multiplied by; the authors' is 0.5 / 16."""
    told = read_json(config)
    other = [name for name in _CHANGED if told.get(name)]
    rank, alpha = told.get("r"), told.get("lora_alpha")
    if other or told.get("peft_type") != "LORA" or told.get("bias", "none") != "none":
        raise ValueError(
            f"{config}: has to be a plain LoRA without biases; it sets {', '.join(other) or 'another kind'}."
        )
    if not isinstance(rank, int) or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"{config}: r has to be a whole number from 1 and lora_alpha a number; get the file again.")
    return float(alpha) / (rank**0.5 if told.get("use_rslora") else rank)


def _by_tower(state: Mapping[str, Tensor], origin: str) -> list[dict[int, tuple[Tensor, Tensor]]]:
    """LoRA's two matrices [r, width] and [3 * width, r] by block, of each tower."""
    found: list[dict[int, dict[str, Tensor]]] = [{}, {}, {}]
    strange = []
    for name, value in state.items():
        match = _LORA.fullmatch(name)
        if match is None:
            strange.append(name)
        else:
            found[int(match[1])].setdefault(int(match[2]), {})[match[3]] = value
    halves = [
        f"extractor_list.{tower} block {block}"
        for tower, blocks in enumerate(found)
        for block, pair in blocks.items()
        if len(pair) < 2
    ]
    if strange or halves:
        said = f"has {', '.join(strange[:3])}" if strange else f"has half of {', '.join(halves[:3])}"
        raise ValueError(
            f"{origin}: {said}; it has to be ensemble_lora of DreamSim's release v0.2.0-checkpoints, with names such "
            "as base_model.model.extractor_list.0.model.blocks.0.attn.qkv.lora_A.weight."
        )
    return [{block: (pair["A"], pair["B"]) for block, pair in blocks.items()} for blocks in found]


def _check_lora(blocks: Mapping[int, tuple[Tensor, Tensor]], sizes: VitSizes, tower: str, origin: str) -> None:
    if sorted(blocks) != list(range(sizes.depth)):
        raise ValueError(f"{origin}: changes blocks {sorted(blocks)} of {tower}, which has {sizes.depth}.")
    for block, (down, up) in blocks.items():
        wanted = (down.shape[0], sizes.width), (3 * sizes.width, down.shape[0])
        if (tuple(down.shape), tuple(up.shape)) != wanted:
            raise ValueError(
                f"{origin}: block {block} of {tower} has LoRA of {list(down.shape)} and {list(up.shape)}; it has to be "
                f"{list(wanted[0])} and {list(wanted[1])}."
            )


def check_fits(state: Mapping[str, Tensor], file: Path) -> None:
    """Whether a checkpoint's names and shapes are those of the ensemble's LoRA; values are not looked at.

    Raises:
        ValueError: they are not; with what differs.
    """
    for tower, blocks in zip(TOWERS, _by_tower(state, str(file)), strict=True):
        _check_lora(blocks, VIT_B_16, tower, str(file))
