"""UMT, the Unmasked Teacher's video classifier (Li et al., 2303.16058): a plain ViT over all patches of 16 frames.

Patches of one frame and 16 x 16 pixels, a fixed sinusoidal table of positions, pre-norm blocks, the mean over all
tokens, a layer norm and a linear head. Blocks are timm's of BEiT, which have the published names (``attn.q_bias`` and
``attn.v_bias`` beside ``attn.qkv.weight``, and no bias of keys).

The published file is ``l16_ptk710_ftk710_ftk400_f16_res224.pth``: the tensors themselves, in float16. Depth, widths,
the patch and the number of classes are read from them, a head's width is 64. The table of positions is no part of the
file: it is that of 8 frames of 14 x 14 patches, brought to the number of frames by linear interpolation and, where
there are other numbers of patches, by bicubic interpolation. A file that holds one (``pos_embed``) is read with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.weights import load_into, read_state_dict

__all__ = ["CLIPS_AT_ONCE", "Umt", "UmtModel", "UmtSizes", "check_fits", "load_umt", "positions", "umt_sizes"]

HEAD_WIDTH = 64
TRAINED_FRAMES, TRAINED_SIDE = 8, 14  # of the table of positions before it is interpolated
CLIPS_AT_ONCE = 4
"""In one pass of the network, 3,136 tokens each."""


@dataclass(frozen=True)
class UmtSizes:
    """Sizes of a UMT classifier; the defaults are ViT-L/16's on Kinetics-400.

    Attributes:
        image_size, patch_size: in pixels.
        frames: of a clip.
        width, layers, hidden: of the ViT; ``hidden`` is its MLP's width.
        classes: number of logits.
        own_positions: whether the file holds the table of positions.
    """

    image_size: int = 224
    patch_size: int = 16
    frames: int = 16
    width: int = 1024
    layers: int = 24
    hidden: int = 4096
    classes: int = 400
    own_positions: bool = False

    @property
    def side(self) -> int:
        """Patches along a side of a frame."""
        return self.image_size // self.patch_size


def positions(frames: int, side: int, width: int) -> Tensor:
    """The table of positions, float32 [frames * side^2, width], as the authors' code makes it.

    Position p of 8 x 14 x 14 in order of time, row, column has sin(p / 10000^(2i/width)) at 2i and the cosine of the
    same at 2i + 1, computed in float64. Other sides are interpolated bicubically, other numbers of frames linearly,
    both in float32 and without aligned corners.
    """
    columns = np.arange(width)
    angles = np.arange(TRAINED_FRAMES * TRAINED_SIDE**2)[:, None] / np.power(10000.0, 2 * (columns // 2) / width)
    table = torch.from_numpy(np.where(columns % 2 == 0, np.sin(angles), np.cos(angles))).float()
    grid = table.view(TRAINED_FRAMES, TRAINED_SIDE, TRAINED_SIDE, width)
    if side != TRAINED_SIDE:
        grid = F.interpolate(grid.permute(0, 3, 1, 2), size=(side, side), mode="bicubic", align_corners=False)
        grid = grid.permute(0, 2, 3, 1)
    if frames != TRAINED_FRAMES:
        lines = grid.permute(1, 2, 3, 0).flatten(0, 1)  # [side^2, width, 8]
        lines = F.interpolate(lines, size=frames, mode="linear", align_corners=False)
        grid = lines.unflatten(0, (side, side)).permute(3, 0, 1, 2)
    return grid.reshape(-1, width)


class _Patches(nn.Module):
    """A convolution whose kernel is one frame deep, under the authors' name."""

    def __init__(self, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch))

    def forward(self, clips: Tensor) -> Tensor:
        # Every frame by itself, which is many times faster as a 2-D convolution.
        weight, size = self.proj.weight[:, :, 0], self.proj.stride[1:]
        patches = F.conv2d(clips.flatten(0, 1), weight, self.proj.bias, stride=size)
        return patches.flatten(2).transpose(1, 2).unflatten(0, clips.shape[:2]).flatten(1, 2)


class UmtModel(nn.Module):
    """The classifier under the authors' names: normalised clips [B, T, 3, S, S] -> logits [B, classes]."""

    def __init__(self, sizes: UmtSizes):
        super().__init__()
        from timm.models.beit import Block

        self.sizes = sizes
        width = sizes.width
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = _Patches(width, sizes.patch_size)
        ratio = sizes.hidden / width
        heads = width // HEAD_WIDTH
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, mlp_ratio=ratio, norm_layer=norm) for _ in range(sizes.layers)
        )
        self.fc_norm = norm(width)
        self.head = nn.Linear(width, sizes.classes)
        table = torch.zeros(1, sizes.frames * sizes.side**2, width)
        self.pos_embed: Tensor
        if sizes.own_positions:
            self.pos_embed = nn.Parameter(table)
        else:
            self.register_buffer("pos_embed", table, persistent=False)

    def fill(self) -> None:
        """Compute what the file does not hold, after tensors were put into a model without memory."""
        for block in self.blocks:
            attention: Any = block.attn
            attention.k_bias = torch.zeros_like(attention.q_bias)
        if not self.sizes.own_positions:
            self.pos_embed = positions(self.sizes.frames, self.sizes.side, self.sizes.width)[None]

    def forward(self, clips: Tensor) -> Tensor:
        states = self.patch_embed(clips)
        states = states + self.pos_embed.to(states.dtype)
        for block in self.blocks:
            states = block(states)
        logits: Tensor = self.head(self.fc_norm(states.mean(dim=1)))
        return logits


def umt_sizes(state: Mapping[str, Tensor], origin: str, frames: int = 16, image_size: int = 224) -> UmtSizes:
    """The sizes that a state dict's shapes tell.

    Args:
        state: names to tensors, whose values are not looked at.
        origin: the file, for the message.
        frames, image_size: what no shape tells.

    Raises:
        ValueError: a tensor that tells a size is missing or has another number of axes; patches span several frames
            or do not fill the image; or the width is no multiple of 64.
    """
    told = {"patch_embed.proj.weight": 5, "blocks.0.mlp.fc1.weight": 2, "head.weight": 2}
    wrong = [name for name, axes in told.items() if name not in state or state[name].ndim != axes]
    if wrong:
        raise ValueError(
            f"{origin}: no classifier of UMT; it has no {', '.join(wrong)}, or with another number of axes. The "
            "published file is l16_ptk710_ftk710_ftk400_f16_res224.pth."
        )
    width, _, depth, patch, _ = state["patch_embed.proj.weight"].shape
    if depth != 1 or image_size % patch:
        raise ValueError(f"{origin}: patches of {depth} x {patch} x {patch}; those of 1 frame that fill {image_size} "
                         "pixels are read.")  # fmt: skip
    if width % HEAD_WIDTH:
        raise ValueError(f"{origin}: the width {width} is no multiple of {HEAD_WIDTH}, a head's width.")
    return UmtSizes(
        image_size=image_size,
        patch_size=patch,
        frames=frames,
        width=width,
        layers=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        hidden=state["blocks.0.mlp.fc1.weight"].shape[0],
        classes=state["head.weight"].shape[0],
        own_positions="pos_embed" in state,
    )


def _assembled(state: Mapping[str, Tensor], origin: str) -> UmtModel:
    sizes = umt_sizes(state, origin)
    with torch.device("meta"):
        model = UmtModel(sizes)
    load_into(model, state, origin, assign=True)
    return model


def check_fits(state: Mapping[str, Tensor], file: Path) -> None:
    """Whether a checkpoint's names and shapes are those of a UMT classifier.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, all named.
    """
    _assembled(state, str(file))


class Umt:
    """Logits of clips from one UMT classifier with frozen weights; the tower runs in `dtype`.

    Attributes:
        sizes: of the network.
        device, dtype: where and in what precision it runs.
    """

    def __init__(self, model: UmtModel, device: torch.device, dtype: torch.dtype):
        self.sizes, self.device, self.dtype = model.sizes, device, dtype
        self._model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)

    @torch.no_grad()
    def logits(self, clips: Tensor) -> Tensor:
        """Normalised clips float32 [B, frames, 3, image_size, image_size] -> float32 [B, classes]."""
        parts = clips.to(self.device).split(CLIPS_AT_ONCE)
        return torch.cat([self._model(part.to(self.dtype)).float() for part in parts])


def load_umt(*, checkpoint: Path, device: torch.device, dtype: torch.dtype) -> Umt:
    """Loader for a `BackboneSpec`.

    Raises:
        ValueError: the file cannot be read safely, or its tensors are not those of a UMT classifier (all named).
    """
    model = _assembled(read_state_dict(checkpoint), str(checkpoint))
    model = model.float()
    model.fill()
    return Umt(model, device, dtype)
