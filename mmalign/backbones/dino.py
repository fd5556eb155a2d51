"""DINO's vision transformers (Caron et al., 2104.14294) on timm's class, on pictures of any size.

The network is timm's; what differs is where positions between those of training come from. DINO scales its grid of
positional embeddings bicubically by the factor (patches + 0.1) / trained patches on each axis (vision_transformer.py of
facebookresearch/dino), which samples other points than a resize to the same number of patches, as timm and transformers
do it: features differ in the third digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.backbones.clip import Preprocess
from mmalign.backbones.clip_scoring import FORWARD_CHUNK, Geometry, Resize, tower_pixels
from mmalign.evaluation import Batch
from mmalign.weights import load_into, read_state_dict

__all__ = [
    "IMAGENET",
    "SIDE",
    "VIT_B_16",
    "DinoBackbone",
    "VitSizes",
    "build_vit",
    "by_size",
    "check_fits",
    "dino_features",
    "load_dino",
    "resize_short",
    "vit_sizes",
    "vit_tokens",
]

SIDE = 224
HEAD_WIDTH = 64
IMAGENET = Preprocess(SIDE, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# ------------------------------------------------------------------------------------------------ the network


@dataclass(frozen=True)
class VitSizes:
    """What decides a vision transformer's tensors.

    Attributes:
        width: number of features; a head has 64 of them, as in every published one, or all where there are fewer.
        depth: number of blocks.
        hidden: width of the layer between the two of each block's MLP.
        patch: side of a patch in pixels.
        grid: patches on a side of the square pictures of training.
    """

    width: int
    depth: int
    hidden: int
    patch: int
    grid: int


VIT_B_16 = VitSizes(768, 12, 3072, 16, 14)


def vit_sizes(state: Mapping[str, Tensor], origin: str) -> VitSizes:
    """Sizes that a checkpoint in DINO's (and timm's) layout shows.

    Raises:
        ValueError: it is no such checkpoint; with the tensor that is missing or mis-shaped.
    """
    wanted = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}
    for name, dimensions in wanted.items():
        if name not in state or state[name].ndim != dimensions:
            found = "is missing" if name not in state else f"is {list(state[name].shape)}"
            raise ValueError(
                f"{origin}: {name} {found}; it has to be a vision transformer with DINO's names, such as "
                "dino_vitbase16_pretrain.pth."
            )
    width, patch = int(state["patch_embed.proj.weight"].shape[0]), int(state["patch_embed.proj.weight"].shape[-1])
    places = int(state["pos_embed"].shape[1]) - 1
    if math.isqrt(max(places, 0)) ** 2 != places or places < 1:
        raise ValueError(f"{origin}: pos_embed has {places} places besides the first, which are no square grid.")
    if width % min(width, HEAD_WIDTH):
        raise ValueError(f"{origin}: its {width} features cannot be divided into heads of {HEAD_WIDTH}.")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return VitSizes(width, depth, int(state["blocks.0.mlp.fc1.weight"].shape[0]), patch, math.isqrt(places))


def build_vit(
    sizes: VitSizes, *, epsilon: float = 1e-6, activation: Callable[[], nn.Module] = nn.GELU, pre_norm: bool = False
) -> Any:
    """timm's ``VisionTransformer`` of these sizes without a classifier, with random weights, on the current device.

    Args:
        epsilon: of the layer norms.
        activation: of the MLPs.
        pre_norm: a layer norm before the first block, as CLIP has it; here beside a bias of the patches.
    """
    from timm.models.vision_transformer import VisionTransformer

    norm = partial(nn.LayerNorm, eps=epsilon)
    vit = VisionTransformer(
        img_size=sizes.grid * sizes.patch,
        patch_size=sizes.patch,
        num_classes=0,
        embed_dim=sizes.width,
        depth=sizes.depth,
        num_heads=max(1, sizes.width // HEAD_WIDTH),
        mlp_ratio=sizes.hidden / sizes.width,
        norm_layer=norm,
        act_layer=activation,
        weight_init="skip",
    )
    if pre_norm:
        vit.norm_pre = norm(sizes.width)
    return vit


def vit_tokens(vit: Any, pixels: Tensor) -> Tensor:
    """What leaves the last block, before the last norm: [N, 3, H, W] -> [N, 1 + patches, width], the class token first.

    H and W are at least a patch; rows and columns beyond the last whole patch are not seen.
    """
    patches = vit.patch_embed.proj(pixels)
    rows, columns = patches.shape[-2:]
    positions = _positions(vit.pos_embed, rows, columns, square=pixels.shape[-2] == pixels.shape[-1])
    tokens = torch.cat((vit.cls_token.expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)), dim=1)
    result: Tensor = vit.blocks(vit.norm_pre(tokens + positions))
    return result


def _positions(learned: Tensor, rows: int, columns: int, square: bool) -> Tensor:
    """Positional embeddings [1, 1 + rows * columns, D] from those of training [1, 1 + grid * grid, D]."""
    places = learned.shape[1] - 1
    if rows * columns == places and square:
        return learned
    grid = math.isqrt(places)
    # A tenth of a patch more, so that rounding never loses a row; it moves every point that is sampled.
    scale = ((rows + 0.1) / grid, (columns + 0.1) / grid)
    table = learned[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    table = F.interpolate(table.float(), scale_factor=scale, mode="bicubic").to(learned.dtype)
    assert table.shape[-2:] == (rows, columns), f"{tuple(table.shape)} for {rows} x {columns} patches"
    return torch.cat((learned[:, :1], table.flatten(2).transpose(1, 2)), dim=1)


# ------------------------------------------------------------------------------------------------ pictures


def resize_short(images: Tensor, size: int, *, mode: str = "bilinear", antialias: bool = False) -> Tensor:
    """The shortest side to ``size``, the longer one in proportion and cut to whole pixels, as torchvision resizes.

    Args:
        images: float [B, 3, H, W].
        mode: of the interpolation; ``bilinear``, torchvision's default, or ``bicubic``, whose overshoot stays.
        antialias: filter before shrinking.

    Returns:
        [B, 3, h, w] with min(h, w) = size.
    """
    height, width = images.shape[-2:]
    if min(height, width) == size:
        return images
    long = int(size * max(height, width) / min(height, width))
    new = (size, long) if height <= width else (long, size)
    return F.interpolate(images, size=new, mode=mode, align_corners=False, antialias=antialias)


def by_size(clips: Sequence[Tensor], encode: Callable[[Tensor], Tensor]) -> Tensor:
    """What `encode` says of every frame of clips of any sizes, those of one size together, in the clips' order.

    Args:
        clips: uint8 [T, 3, H, W] each.
        encode: frames [n, 3, H, W] of one size, n up to `FORWARD_CHUNK` -> [n, D].

    Returns:
        [sum of T, D].
    """
    owners: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number, clip in enumerate(clips):
        owners.setdefault(tuple(clip.shape[-2:]), []).extend((number, frame) for frame in range(len(clip)))
    rows: dict[tuple[int, int], Tensor] = {}
    for places in owners.values():
        for start in range(0, len(places), FORWARD_CHUNK):
            chunk = places[start : start + FORWARD_CHUNK]
            found = encode(torch.stack([clips[number][frame] for number, frame in chunk]))
            rows |= zip(chunk, found.unbind(), strict=True)
    return torch.stack([rows[number, frame] for number, clip in enumerate(clips) for frame in range(len(clip))])


# ------------------------------------------------------------------------------------------------ the backbone


class DinoBackbone:
    """Unit-length class tokens, after the last norm, of one DINO with frozen weights.

    Attributes:
        width: number of features.
        device, dtype: where and in what precision the network runs; normalisation is float32.
    """

    def __init__(self, vit: Any, device: torch.device, dtype: torch.dtype):
        self.width, self.device, self.dtype = int(vit.embed_dim), device, dtype
        self._vit = vit.eval().requires_grad_(False).to(device=device, dtype=dtype)

    def images(self, images: Tensor, resize: Resize) -> Tensor:
        """Features of images of one size.

        Args:
            images: uint8 [N, 3, H, W], or float in [0, 1] where a gradient is wanted.
            resize: to the network's input, from images in [0, 1] and `SIDE`.

        Returns:
            float32 [N, width] on the backbone's device.
        """
        parts = []
        short, long = sorted(images.shape[-2:])
        # A sliver whose shortest side is brought to `SIDE` is as large as many pictures.
        for chunk in images.split(max(1, min(FORWARD_CHUNK, 2 * FORWARD_CHUNK * short // long))):
            pixels = tower_pixels(chunk, resize, IMAGENET, self.device)
            parts.append(self._vit.norm(vit_tokens(self._vit, pixels.to(self.dtype))[:, 0]).float())
        return F.normalize(torch.cat(parts), dim=-1)

    def frames(self, clips: Sequence[Tensor], resize: Resize) -> Tensor:
        """Features of every frame of clips uint8 [T, 3, H, W] of any sizes: float32 [sum of T, width]."""
        return by_size(clips, lambda frames: self.images(frames, resize))


def load_dino(*, checkpoint: Path, device: torch.device, dtype: torch.dtype) -> DinoBackbone:
    """Loader for a `BackboneSpec`: a file with DINO's names, which are timm's; sizes are read from it.

    Raises:
        ValueError: the file cannot be read safely; tensors are missing, unexpected or mis-shaped, all named.
    """
    state = read_state_dict(checkpoint)
    vit = build_vit(vit_sizes(state, str(checkpoint)))
    load_into(vit, state, str(checkpoint))
    return DinoBackbone(vit, device, dtype)


def check_fits(state: Mapping[str, Tensor], file: Path) -> None:
    """Whether a checkpoint's names and shapes are those of DINO's ViT-B/16; values are not looked at.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, all named.
    """
    with torch.device("meta"):
        vit = build_vit(VIT_B_16)
    load_into(vit, state, str(file), assign=True)


def dino_features(dino: DinoBackbone, batch: Batch, geometry: Geometry) -> Tensor:
    """Features of every frame of a batch, float32 [sum of T, width]; one pass for all who ask for the same."""
    return batch.shared((id(dino), geometry), lambda: dino.frames(batch.clips(), geometry))
