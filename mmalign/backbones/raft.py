"""RAFT optical flow (Teed and Deng, 2003.12039): torchvision's network, two published layouts, shared encoders.

The weights are the authors' ``raft-things.pth``, whose names `to_torchvision` translates, or torchvision's own file of
the same training (``C_T_V1``). `RaftFlow` runs the network on pairs of frames of one clip: a frame that occurs in
several pairs is encoded once, and only the flow of the last update is brought to full size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.weights import load_into, read_state_dict

__all__ = [
    "LEAST_SIDE",
    "UPDATES",
    "RaftFlow",
    "RaftSizes",
    "build_raft",
    "check_fits",
    "load_raft",
    "padding",
    "raft_sizes",
    "to_torchvision",
]

UPDATES = 20
"""Refinements of the flow that VBench asks for."""
LEAST_SIDE = 128
"""Padded frames with a shorter side have a level of the correlation pyramid that is one cell wide.

There the authors' code divides by a width of zero and every flow is NaN (below 64 it ends with an error); `RaftFlow`
takes what lies outside such a level as zero, as it does everywhere else.
"""
LEVELS = 4
NO_RAFT = "these tensors are no RAFT; get raft-things.pth or torchvision's C_T_V1 file."
VOLUME = 1_100_000_000
"""Correlations of a pass that are kept: those of a pair of 1920 x 1080, 4.2 GB, and a third more for coarser levels."""
# Pixels that go through the network at once; more only if one frame, or one pair, has more. A CPU gains nothing by
# batches, and loses its cache by them.
CPU_PIXELS, GPU_PIXELS = 1 << 17, 1 << 20


@dataclass(frozen=True)
class RaftSizes:
    """Channels of a RAFT; the defaults are the published one's ("large", 5.3 million parameters).

    Attributes:
        features, context: of the five layers of the two encoders.
        radius: of the window that is looked up in each of the four levels of the correlation pyramid.
        corr, flow, motion: of the motion encoder's two layers on correlations, its two on flow, and its output.
        hidden, head, mask: of the recurrent state, and inside the heads for the flow and for the upsampling mask.
    """

    features: tuple[int, ...] = (64, 64, 96, 128, 256)
    context: tuple[int, ...] = (64, 64, 96, 128, 256)
    radius: int = 4
    corr: tuple[int, ...] = (256, 192)
    flow: tuple[int, ...] = (128, 64)
    motion: int = 128
    hidden: int = 128
    head: int = 256
    mask: int = 256


def build_raft(sizes: RaftSizes | None = None) -> nn.Module:
    """torchvision's RAFT with separable recurrent convolutions, randomly initialised; by default of published size."""
    from torchvision.models.optical_flow import raft

    sizes = sizes or RaftSizes()
    block = raft.ResidualBlock
    corr = _pyramid(sizes.radius)
    update = raft.UpdateBlock(
        motion_encoder=raft.MotionEncoder(
            in_channels_corr=corr.out_channels,
            corr_layers=sizes.corr,
            flow_layers=sizes.flow,
            out_channels=sizes.motion,
        ),
        recurrent_block=raft.RecurrentBlock(
            input_size=sizes.motion + sizes.context[-1] - sizes.hidden, hidden_size=sizes.hidden
        ),
        flow_head=raft.FlowHead(in_channels=sizes.hidden, hidden_size=sizes.head),
    )
    network: nn.Module = raft.RAFT(
        feature_encoder=raft.FeatureEncoder(block=block, layers=sizes.features, norm_layer=nn.InstanceNorm2d),
        context_encoder=raft.FeatureEncoder(block=block, layers=sizes.context, norm_layer=nn.BatchNorm2d),
        corr_block=corr,
        update_block=update,
        mask_predictor=raft.MaskPredictor(in_channels=sizes.hidden, hidden_size=sizes.mask),
    )
    return network


def _pyramid(radius: int) -> Any:
    """torchvision's correlation block, which also takes frames that are too small for its four levels, or very large.

    Correlations of more numbers than `VOLUME` are computed anew at each look, a few rows of the first frame at a time.
    """
    from torchvision.models.optical_flow.raft import CorrBlock

    class Pyramid(CorrBlock):
        limit = VOLUME
        maps: tuple[Tensor, Tensor] | None = None

        def build_pyramid(self, fmap1: Tensor, fmap2: Tensor) -> None:
            size, _, height, width = fmap1.shape
            self.maps, self.corr_pyramid = (fmap1, fmap2), []
            if size * (height * width) ** 2 <= self.limit:
                self.corr_pyramid, self.maps = self.levels(fmap1, fmap2), None

        def index_pyramid(self, centroids_coords: Tensor) -> Tensor:
            if self.maps is None:
                looked_up: Tensor = super().index_pyramid(centroids_coords)
                return looked_up
            first, second = self.maps
            size, _, height, width = first.shape
            rows, parts = max(1, self.limit // (4 * size * height * width**2)), []
            for some, places in zip(first.split(rows, 2), centroids_coords.split(rows, 2), strict=True):
                self.corr_pyramid = self.levels(some, second)
                parts.append(super().index_pyramid(places))
            self.corr_pyramid = []
            return torch.cat(parts, dim=2)

        def levels(self, fmap1: Tensor, fmap2: Tensor) -> list[Tensor]:
            _, channels, height, width = fmap2.shape
            volume = torch.matmul(fmap1.flatten(2).mT, fmap2.flatten(2)).div_(math.sqrt(channels))
            volume, pyramid = volume.reshape(-1, 1, height, width), []
            for level in range(self.num_levels):
                if level:
                    height, width = height // 2, width // 2
                    whole = min(height, width) > 0
                    volume = F.avg_pool2d(volume, 2) if whole else volume.new_zeros(len(volume), 1, 1, 1)
                # A level of one cell has no width to divide by; zeros beside it are what lies outside of any level.
                missing = [max(0, 2 - side) for side in (volume.shape[3], volume.shape[2])]
                pyramid.append(F.pad(volume, (0, missing[0], 0, missing[1])) if any(missing) else volume)
            return pyramid

    return Pyramid(num_levels=LEVELS, radius=radius)


# The authors' names, behind ``module.`` of a parallel wrapper, and torchvision's. Each is tried, in this order.
_NAMES = (
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"^((?:feature|context)_encoder)\.conv1\.", r"\1.convnormrelu.0."),
    (r"^((?:feature|context)_encoder)\.norm1\.", r"\1.convnormrelu.1."),
    (r"^((?:feature|context)_encoder)\.conv2\.", r"\1.conv."),
    (r"(layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"(layer\d\.\d)\.norm([12])\.", r"\1.convnormrelu\2.1."),
    (r"(layer\d\.\d)\.norm3\.", r"\1.downsample.1."),
    (r"^update_block\.encoder\.conv([cf])(\d)\.", r"update_block.motion_encoder.conv\1\2.0."),
    (r"^update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"convc(\d)\.0", r"convcorr\1.0"),
    (r"convf(\d)\.0", r"convflow\1.0"),
    (r"^update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
)


def to_torchvision(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """A state dict of either layout under torchvision's names, values untouched.

    Args:
        state: names to tensors, of which the meta device's are taken as equal. ``module.`` before names is dropped.
        origin: the file, for the message.

    Raises:
        ValueError: the authors' ``norm3`` and ``downsample.1``, one tensor under two names, differ.
    """
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        renamed = name.removeprefix("module.")
        for pattern, replacement in _NAMES:
            renamed = re.sub(pattern, replacement, renamed)
        if renamed in result and not _same(result[renamed], value):
            raise ValueError(f"{origin}: {name} differs from its other name's tensor ({renamed}); get the file again.")
        result[renamed] = value
    return result


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and (first.is_meta or second.is_meta or torch.equal(first, second))


def raft_sizes(state: Mapping[str, Tensor]) -> RaftSizes:
    """The sizes that tensors under torchvision's names show; published ones where a tensor is missing."""

    def channels(name: str, default: int, axis: int = 0) -> int:
        value = state.get(f"{name}.weight")
        return int(value.shape[axis]) if value is not None and value.ndim == 4 else default

    known = RaftSizes()
    layers = ("convnormrelu.0", "layer1.0.convnormrelu1.0", "layer2.0.convnormrelu1.0", "layer3.0.convnormrelu1.0")
    encoders = {
        part: tuple(
            channels(f"{encoder}.{name}", default)
            for name, default in zip((*layers, "conv"), getattr(known, part), strict=True)
        )
        for part, encoder in (("features", "feature_encoder"), ("context", "context_encoder"))
    }
    motion = "update_block.motion_encoder"
    window = math.isqrt(channels(f"{motion}.convcorr1.0", LEVELS * (2 * known.radius + 1) ** 2, 1) // LEVELS)
    return RaftSizes(
        **encoders,
        radius=max(0, (window - 1) // 2),
        corr=tuple(channels(f"{motion}.convcorr{n}.0", known.corr[n - 1]) for n in (1, 2)),
        flow=tuple(channels(f"{motion}.convflow{n}.0", known.flow[n - 1]) for n in (1, 2)),
        motion=channels(f"{motion}.conv.0", known.motion - 2) + 2,
        hidden=channels("update_block.recurrent_block.convgru1.convz", known.hidden),
        head=channels("update_block.flow_head.conv1", known.head),
        mask=channels("mask_predictor.convrelu.0", known.mask),
    )


def check_fits(state: Mapping[str, Tensor], file: Path) -> None:
    """Whether a checkpoint's names and shapes are those of the published RAFT; values are not looked at.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, all named.
    """
    with torch.device("meta"):
        network = build_raft()
    load_into(network, to_torchvision(state, str(file)), str(file), assign=True)


def load_raft(*, checkpoint: Path, device: torch.device, dtype: torch.dtype) -> RaftFlow:
    """A RAFT of the checkpoint's own sizes, ready to run.

    Args:
        checkpoint: of either layout.
        dtype: of towers that scorers share; flow is always computed in float32, as the authors' is, because thresholds
            on it decide scores.

    Raises:
        ValueError: the file cannot be read safely, its names or shapes do not fit, or its sizes contradict each other.
    """
    state = to_torchvision(read_state_dict(checkpoint), str(checkpoint))
    sizes = raft_sizes(state)
    least = min(min(value) if isinstance(value, tuple) else value for value in _values(sizes))
    if least < 1 or sizes.context[-1] <= sizes.hidden:
        raise ValueError(f"{checkpoint}: {NO_RAFT}")
    network = build_raft(sizes)
    load_into(network, state, str(checkpoint))
    if any(layers[0] != layers[1] for layers in (sizes.features, sizes.context)):  # which are added to each other
        raise ValueError(f"{checkpoint}: {NO_RAFT}")
    return RaftFlow(network, device)


def _values(sizes: RaftSizes) -> list[Any]:
    return [getattr(sizes, each.name) for each in fields(sizes)]


def padding(height: int, width: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) that make both sides multiples of 8, half of it on each side ("sintel" mode)."""
    across, down = -width % 8, -height % 8
    return across // 2, across - across // 2, down // 2, down - down // 2


class RaftFlow:
    """Flow between frames of one clip, in float32.

    Args:
        network: of `build_raft`; it is put into evaluation mode, so that the context encoder's batch norms take their
            stored statistics. The feature encoder's instance norms take each frame's own. So a frame's encoding depends
            on no other frame, and sharing it changes nothing.
        pixels: bound on what goes through at once; by default as much as suits the device.
    """

    def __init__(self, network: nn.Module, device: torch.device | str = "cpu", pixels: int | None = None):
        net: Any = network.eval().requires_grad_(False).float().to(device)
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        self.pixels = pixels or (CPU_PIXELS if on_cpu else GPU_PIXELS)
        # oneDNN's kernels are the fastest where channels lie together; the feature encoder's instance norms undo that.
        self.layout = torch.channels_last if on_cpu else torch.contiguous_format
        for part in (net.context_encoder, net.update_block, net.mask_predictor):
            part.to(memory_format=self.layout)
        self.network, block = net, net.update_block
        context = net.context_encoder.output_dim - block.hidden_state_size
        recurrent = block.recurrent_block
        self.gates = [_Gates(gru, context, self.layout) for gru in (recurrent.convgru1, recurrent.convgru2)]

    @torch.no_grad()
    def flows(
        self, frames: Tensor, pairs: Sequence[tuple[int, int]], updates: int = UPDATES
    ) -> Iterator[tuple[range, Tensor]]:
        """The flow of each pair, in parts that fit into memory; whoever stops asking saves what is left.

        Args:
            frames: uint8 [T, 3, H, W] RGB; each side at least 9, better `LEAST_SIDE`.
            pairs: places (first, second) among the frames, in the order of the results.

        Yields:
            Places in `pairs`, and their flows [n, 2, H', W'] from first to second: x to the right, then y downwards, in
            pixels, for the padded frame (H', W' are the next multiples of 8; see `padding`).

        Raises:
            ValueError: a side is shorter than 9 pixels.
        """
        height, width = (-(-side // 8) * 8 for side in frames.shape[-2:])
        if min(height, width) < 16:
            raise ValueError(f"frames of {frames.shape[-1]} x {frames.shape[-2]} pixels are too small for RAFT")
        size = max(1, self.pixels // (height * width))
        features: dict[int, Tensor] = {}
        contexts: dict[int, Tensor] = {}
        for start in range(0, len(pairs), size):
            part, later = pairs[start : start + size], pairs[start + size :]
            self._encode(self.network.feature_encoder, frames, [place for pair in part for place in pair], features)
            self._encode(self.network.context_encoder, frames, [first for first, _ in part], contexts)
            both = [torch.stack([features[pair[side]] for pair in part]) for side in (0, 1)]
            yield (
                range(start, start + len(part)),
                self._pairs(both[0], both[1], torch.stack([contexts[first] for first, _ in part]), updates),
            )
            _keep(features, {place for pair in later for place in pair})
            _keep(contexts, {first for first, _ in later})

    def _encode(self, encoder: Any, frames: Tensor, places: Sequence[int], known: dict[int, Tensor]) -> None:
        """Put what the encoder makes of these frames beside what is known of others."""
        missing = [place for place in dict.fromkeys(places) if place not in known]
        size = max(1, self.pixels // (frames.shape[-2] * frames.shape[-1]))
        sides = padding(frames.shape[-2], frames.shape[-1])
        for start in range(0, len(missing), size):
            chosen = missing[start : start + size]
            images = 2 * (frames[chosen].to(self.device).float() / 255) - 1
            known.update(zip(chosen, encoder(F.pad(images, sides, mode="replicate")), strict=True))

    def _pairs(self, first: Tensor, second: Tensor, context: Tensor, updates: int) -> Tensor:
        """Flows [n, 2, 8 h, 8 w] from features and contexts [n, C, h, w].

        The authors' loop, but that the context's part in the gates is computed once, and so is the upsampling.
        """
        from torchvision.models.optical_flow._utils import make_coords_grid, upsample_flow

        net = self.network
        net.corr_block.build_pyramid(first, second)
        block, size = net.update_block, net.update_block.hidden_state_size
        context = context.contiguous(memory_format=self.layout)
        hidden, context = context[:, :size].tanh(), context[:, size:].relu()
        known = [gates.of_context(context) for gates in self.gates]
        origin = make_coords_grid(len(first), *first.shape[-2:]).to(first.device)
        coords = origin
        for _ in range(updates):
            looked_up = net.corr_block.index_pyramid(centroids_coords=coords)
            motion = block.motion_encoder((coords - origin).contiguous(memory_format=self.layout), looked_up)
            for gates, part in zip(self.gates, known, strict=True):
                hidden = gates(hidden, motion, part)
            coords = coords + block.flow_head(hidden)
        net.corr_block.corr_pyramid = []  # the volume of all pairs of cells is by far the largest thing held
        flow: Tensor = upsample_flow(flow=coords - origin, up_mask=net.mask_predictor(hidden))
        return flow


class _Gates:
    """A convolutional GRU on context and motion, for a context that stays the same from update to update.

    A convolution of channels that lie behind each other is the sum of one on each, and a third of the channels are the
    context's. Update and reset gate read the same channels, so that they are one convolution.

    Args:
        gru: torchvision's ConvGRU, on (hidden, context, motion).
        context: channels of the context.
        layout: of the kernels in memory.
    """

    def __init__(self, gru: Any, context: int, layout: torch.memory_format = torch.contiguous_format):
        self.padding = gru.convz.padding
        hidden = gru.convz.out_channels
        parts = [hidden, context, gru.convz.in_channels - hidden - context]
        self.fixed: list[tuple[Tensor, Tensor]] = []
        self.moving: list[Tensor] = []
        for convs in ((gru.convz, gru.convr), (gru.convq,)):
            weight = torch.cat([conv.weight for conv in convs])
            own, of_context, motion = weight.split(parts, dim=1)
            bias = torch.cat([conv.bias for conv in convs])
            self.fixed.append((of_context.contiguous(memory_format=layout), bias))
            self.moving.append(torch.cat([own, motion], dim=1).contiguous(memory_format=layout))

    def of_context(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What context and biases add to both gates, and to the new state: [n, 2 * hidden, h, w], [n, hidden, h, w]."""
        gates, new = (F.conv2d(context, weight, bias, padding=self.padding) for weight, bias in self.fixed)
        return gates, new

    def __call__(self, hidden: Tensor, motion: Tensor, part: tuple[Tensor, Tensor]) -> Tensor:
        """The next hidden state [n, hidden, h, w]; `part` is what `of_context` gave."""
        gates = F.conv2d(torch.cat([hidden, motion], dim=1), self.moving[0], padding=self.padding) + part[0]
        update, reset = gates.sigmoid().chunk(2, dim=1)
        new = F.conv2d(torch.cat([reset * hidden, motion], dim=1), self.moving[1], padding=self.padding) + part[1]
        return (1 - update) * hidden + update * new.tanh()


def _keep(known: dict[int, Tensor], wanted: set[int]) -> None:
    for place in known.keys() - wanted:
        del known[place]
