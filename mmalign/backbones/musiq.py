"""MUSIQ, a transformer that rates a picture's quality at three scales (Ke et al., 2108.05997), under published names.

A picture is cut into patches of 32 pixels at its own size and resized so that its longer side is 224 and 384. A
convolutional stem embeds each patch; a token's place is hashed to a 10 x 10 grid, so that any size and aspect ratio has
embeddings. `Musiq` keeps the names of the PyTorch files that IQA-PyTorch converted from the authors' (google-research,
musiq), and computes what these files are evaluated with: weights standardised by the unbiased deviation, exact GELU,
zero padding as TensorFlow's SAME, resizing by PyTorch's bicubic without a filter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.weights import load_into, read_state_dict

__all__ = ["LONGER_SIDES", "PATCH", "Musiq", "MusiqConfig", "build_musiq", "check_fits", "load_musiq"]

PATCH = 32
LONGER_SIDES = (224, 384)
"""Of the resized copies, in the order of their scale embeddings; the picture itself has the last one."""
GROUPS, HEADS = 32, 6
STEM_PATCHES = 2048  # that pass through the stem at once: about 130 MB in float32
BLOCKS = "transformer_encoder.transformer.encoderblock_"


@dataclass(frozen=True)
class MusiqConfig:
    """Sizes of a network; the defaults are the published ones.

    Attributes:
        stem: channels of the first convolution; a multiple of the 32 groups of its normalisation.
        patch_width: channels of the residual block after it, a multiple of 32.
        width: of the tokens, a multiple of the 6 heads.
        mlp: width of the layers' MLPs.
        layers: of the transformer.
        grid: side of the grid of place embeddings.
    """

    stem: int = 64
    patch_width: int = 256
    width: int = 384
    mlp: int = 1152
    layers: int = 14
    grid: int = 10

    def __post_init__(self) -> None:
        if min(self.stem, self.patch_width, self.width, self.mlp, self.layers, self.grid) < 1:
            raise ValueError(f"MUSIQ takes sizes of at least 1, got {self}")
        if self.stem % GROUPS or self.patch_width % GROUPS or self.width % HEADS:
            raise ValueError(
                f"MUSIQ takes stem and patch_width in multiples of {GROUPS} and width in multiples of {HEADS}, "
                f"got {self.stem}, {self.patch_width} and {self.width}"
            )

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> MusiqConfig:
        """Sizes that a checkpoint's shapes show; the published ones where a tensor is missing or has another rank."""
        told = cls()

        def size(name: str, dim: int, rank: int, default: int) -> int:
            value = state.get(name)
            return int(value.shape[dim]) if value is not None and value.ndim == rank else default

        numbers = {name.removeprefix(BLOCKS).partition(".")[0] for name in state if name.startswith(BLOCKS)}
        layers = {int(number) for number in numbers if number.isdecimal()}
        cells = size("transformer_encoder.posembed_input.position_emb", 1, 3, told.grid**2)
        return cls(
            stem=size("conv_root.weight", 0, 4, told.stem),
            patch_width=size("block1.conv3.weight", 0, 4, told.patch_width),
            width=size("embedding.weight", 0, 2, told.width),
            mlp=size(f"{BLOCKS}0.mlp.fc1.weight", 0, 2, told.mlp),
            layers=max(layers, default=told.layers - 1) + 1,
            grid=math.isqrt(cells),
        )


class _StandardConv(nn.Conv2d):
    """A convolution without bias whose kernels have mean 0 and deviation 1, zero-padded as TensorFlow's SAME."""

    def __init__(self, channels: int, kernels: int, size: int, stride: int = 1):
        super().__init__(channels, kernels, size, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (deviation + 1e-5)
        return F.conv2d(_same(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class _Bottleneck(nn.Module):
    """Residual block of 1 x 1, 3 x 3 and 1 x 1 convolutions with a projection: [N, stem, h, w] -> [N, out, h, w]."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv1 = _StandardConv(channels, channels, 1)
        self.gn1 = nn.GroupNorm(GROUPS, channels, eps=1e-4)
        self.conv2 = _StandardConv(channels, channels, 3)
        self.gn2 = nn.GroupNorm(GROUPS, channels, eps=1e-4)
        self.conv3 = _StandardConv(channels, out, 1)
        self.gn3 = nn.GroupNorm(GROUPS, out, eps=1e-4)
        self.projects = channels != out
        if self.projects:
            self.conv_proj = _StandardConv(channels, out, 1)
            self.gn_proj = nn.GroupNorm(GROUPS, out, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        y = self.gn3(self.conv3(y))
        return F.relu(y + (self.gn_proj(self.conv_proj(x)) if self.projects else x))


class _Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        result: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return result


class _Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, mlp: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = _Attention(width)
        self.mlp = _Mlp(width, mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class _Encoder(nn.Module):
    """Embeddings of place and scale, the first token, the layers: tokens [N, L, width] -> its state [N, width]."""

    def __init__(self, config: MusiqConfig):
        super().__init__()
        width = config.width
        self.posembed_input, self.scaleembed_input = nn.Module(), nn.Module()
        self.posembed_input.position_emb = nn.Parameter(torch.randn(1, config.grid**2, width) * 0.02)
        self.scaleembed_input.scale_emb = nn.Parameter(torch.randn(len(LONGER_SIDES) + 1, width) * 0.02)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        layers = {f"encoderblock_{i}": _Layer(width, config.mlp) for i in range(config.layers)}
        self.transformer = nn.ModuleDict(layers)

    def forward(self, tokens: Tensor, places: Tensor, scales: Tensor) -> Tensor:
        place: Any = self.posembed_input.position_emb
        scale: Any = self.scaleembed_input.scale_emb
        x = tokens + place[0, places] + scale[scales]
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        for layer in self.transformer.values():
            x = layer(x)
        result: Tensor = self.encoder_norm(x[:, 0])
        return result


class Musiq(nn.Module):
    """Pictures of one size -> ratings; see the module's words."""

    def __init__(self, config: MusiqConfig):
        super().__init__()
        self.config = config
        self.conv_root = _StandardConv(3, config.stem, 7, stride=2)
        self.gn_root = nn.GroupNorm(GROUPS, config.stem, eps=1e-6)
        self.block1 = _Bottleneck(config.stem, config.patch_width)
        self.embedding = nn.Linear(config.patch_width * (PATCH // 4) ** 2, config.width)
        self.transformer_encoder = _Encoder(config)
        self.head = nn.Linear(config.width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Ratings of pictures of one size.

        Padding tokens, which the authors' batches of mixed sizes need, are left out: they are masked there, so that the
        rating is the same.

        Args:
            images: float [N, 3, H, W] RGB in [0, 1].

        Returns:
            float32 [N]; from 0 to 100 by the weights that were trained on SPAQ, but not clipped to that.

        Raises:
            ValueError: a picture so narrow that nothing is left of it when its longer side is 224.
        """
        dtype = self.head.weight.dtype
        pixels = (images.float() - 0.5) * 2
        sizes = scaled(images.shape[-2], images.shape[-1])
        copies = [F.interpolate(pixels, size, mode="bicubic", align_corners=False) for size in sizes]
        cut, places, scales = [], [], []
        for scale, copy in enumerate((*copies, pixels)):
            cut.append(F.unfold(_same(copy, PATCH, PATCH), PATCH, stride=PATCH).transpose(1, 2))
            places.append(hashed(copy.shape[-2], copy.shape[-1], self.config.grid))
            scales.append(torch.full_like(places[-1], scale))
        patches = torch.cat(cut, dim=1).to(dtype)
        tokens = self._embed(patches.reshape(-1, 3, PATCH, PATCH)).unflatten(0, patches.shape[:2])
        where, which = (torch.cat(values).to(images.device) for values in (places, scales))
        rating: Tensor = self.head(self.transformer_encoder(tokens, where, which)).squeeze(-1)
        return rating.float()

    def _embed(self, patches: Tensor) -> Tensor:
        """Patches [P, 3, 32, 32] -> tokens [P, width]; features are flattened with the channels last."""
        parts = []
        for part in patches.split(STEM_PATCHES):
            x = F.relu(self.gn_root(self.conv_root(part)))
            x = self.block1(F.max_pool2d(_same(x, 3, 2), 3, 2))
            parts.append(self.embedding(x.permute(0, 2, 3, 1).flatten(1)))
        return torch.cat(parts)

    @staticmethod
    def count(height: int, width: int) -> int:
        """How many patches a picture of this size is cut into, at all scales together."""
        return sum(-(-h // PATCH) * -(-w // PATCH) for h, w in (*scaled(height, width), (height, width)))


def scaled(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of the resized copies, rounded half to even.

    Raises:
        ValueError: one would have no pixels.
    """
    longer = max(height, width)
    sizes = [(round(height * (side / longer)), round(width * (side / longer))) for side in LONGER_SIDES]
    if any(0 in size for size in sizes):
        raise ValueError(
            f"MUSIQ looks at pictures whose longer side is {LONGER_SIDES[0]} pixels, and one of {width} x {height} has "
            "no pixels left across then; crop it"
        )
    return sizes


def hashed(height: int, width: int, grid: int) -> Tensor:
    """Each patch's cell of the grid, row by row: int64 [patches]; the grid is stretched by nearest neighbours."""
    cells = torch.arange(grid, dtype=torch.float32).view(1, 1, grid)
    rows, columns = (
        F.interpolate(cells, -(-side // PATCH), mode="nearest").flatten().long() for side in (height, width)
    )
    return (rows[:, None] * grid + columns).flatten()


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around [N, C, h, w] so that a kernel gives ceil(side / stride); the odd one is at the end."""
    margins: list[int] = []
    for side in (x.shape[-1], x.shape[-2]):
        more = max(0, (-(-side // stride) - 1) * stride + kernel - side)
        margins += [more // 2, more - more // 2]
    return F.pad(x, margins)


def build_musiq(config: MusiqConfig | None = None) -> Musiq:
    """A randomly initialised float32 network on the CPU; without a config, of the published size."""
    return Musiq(config or MusiqConfig())


def load_musiq(*, checkpoint: Path, device: torch.device, dtype: torch.dtype) -> Musiq:
    """The network of a checkpoint, for evaluation, without gradients of its own; its sizes are those of the tensors.

    Args:
        dtype: of the weights; pixels are resized in float32 all the same.

    Raises:
        ValueError: the file cannot be read safely, or tensors are missing, unexpected or mis-shaped (all named).
    """
    state = read_state_dict(checkpoint)
    model = _on_meta(state, str(checkpoint))
    load_into(model, state, str(checkpoint), assign=True)
    return model.eval().requires_grad_(False).to(device, dtype)


def check_fits(state: Mapping[str, Tensor], file: Path) -> None:
    """Whether names and shapes are those of a MUSIQ that rates with one number; values are not looked at.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, all named.
    """
    load_into(_on_meta(state, str(file)), state, str(file), assign=True)


def _on_meta(state: Mapping[str, Tensor], origin: str) -> Musiq:
    try:
        config = MusiqConfig.of(state)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}; get the file again.") from None
    with torch.device("meta"):
        return Musiq(config)
