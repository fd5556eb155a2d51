"""AMT-S, which draws the frame between two others (Li et al., 2304.09790), under the names of the authors' file.

Features of both frames at four scales (`encoder`) and a second set at an eighth (`feat_encoder`), whose correlations in
both directions correct the flow at three scales (`update4` to `update2`) after each decoder of IFRNet's kind
(`decoder4` to `decoder2`). The last decoder gives several flows, masks and residuals; the pictures that they warp are
averaged and corrected by `comb_block`. Written from the paper and the layout of amt-s.pth.

The pair's mean over pixels and channels is subtracted before anything else. As convolutions pad with zeros and the
pyramid is not linear, a frame's features depend on the frame it is paired with, so they cannot be computed once per
frame for both of its pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.backbones.amt_flow import VOLUME, Correlations, pixels, resize, warp
from mmalign.weights import load_into, read_state_dict

__all__ = ["LEVELS", "MULTIPLE", "SMALLEST", "Amt", "AmtConfig", "build_amt", "check_fits", "load_amt"]

MULTIPLE = 16
"""Of which both sides of a frame have to be multiples."""
LEVELS = 4
"""Scales of the correlations; the shapes show only their product with the window."""
SMALLEST = 8 * 2 ** (LEVELS - 1)
"""Pixels that a side has at least, for the coarsest scale to have one."""


@dataclass(frozen=True)
class AmtConfig:
    """Sizes of a network; the defaults are those of AMT-S.

    Attributes:
        channels: of the feature pyramid, finest first.
        skip: channels of a decoder's residual block that have convolutions of their own.
        flows: pairs of flows of the last decoder.
        trunk: channels of the stages of the feature encoder, multiples of 4.
        features: that are correlated.
        hidden, flow, correlation, fused: widths within an update block.
        radius: of the window of correlations.
    """

    channels: tuple[int, int, int, int] = (20, 32, 44, 56)
    skip: int = 20
    flows: int = 3
    trunk: tuple[int, int, int] = (32, 64, 96)
    features: int = 84
    hidden: int = 76
    flow: int = 20
    correlation: int = 64
    fused: int = 68
    radius: int = 3

    def __post_init__(self) -> None:
        sizes = (*self.channels, self.skip, self.flows, *self.trunk, self.features, self.hidden, self.flow)
        if min(*sizes, self.correlation, self.fused, self.radius) < 1 or any(stage % 4 for stage in self.trunk):
            raise ValueError(f"AMT takes sizes of at least 1 and trunk in multiples of 4, got {self}")
        narrowest = min(2 * self.channels[3], 3 * min(self.channels[:3]))
        if self.skip >= narrowest:
            raise ValueError(f"AMT's skip has to be below the decoders' width, {narrowest}; got {self.skip}")

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> AmtConfig:
        """Sizes that a checkpoint's shapes show; those of AMT-S where a tensor is missing."""
        told = cls()

        def size(name: str, default: int, dim: int = 0) -> int:
            value = state.get(f"{name}.weight")
            return int(value.shape[dim]) if value is not None and value.ndim == 4 else default

        a, b, c, d = (size(f"encoder.pyramid{i + 1}.0.0", told.channels[i]) for i in range(4))
        e, f, g = (size(f"feat_encoder.layer{i + 1}.0.conv3", told.trunk[i]) for i in range(3))
        window = size("update4.convc1", 2 * LEVELS * (2 * told.radius + 1) ** 2, 1) // (2 * LEVELS)
        return cls(
            channels=(a, b, c, d),
            skip=size("decoder4.convblock.1.conv2.0", told.skip),
            flows=size("comb_block.0", 6 * told.flows) // 6,
            trunk=(e, f, g),
            features=size("feat_encoder.conv2", told.features),
            hidden=size("update4.gru.0", told.hidden),
            flow=size("update4.convf2", told.flow),
            correlation=size("update4.convc1", told.correlation),
            fused=size("update4.conv", told.fused),
            radius=(math.isqrt(window) - 1) // 2,
        )


def _conv(channels: int, out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1), nn.PReLU(out))


class _Bottleneck(nn.Module):
    """Residual block of the feature encoder; instance norms have no parameters."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out // 4, 1)
        self.conv2 = nn.Conv2d(out // 4, out // 4, 3, stride, 1)
        self.conv3 = nn.Conv2d(out // 4, out, 1)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in (self.conv1, self.conv2, self.conv3):
            y = F.relu(F.instance_norm(layer(y)))
        if self.downsample is not None:
            x = F.instance_norm(self.downsample(x))
        return F.relu(x + y)


class _FeatureEncoder(nn.Module):
    """Pictures [N, 3, H, W] -> features [N, D, H / 8, W / 8]."""

    def __init__(self, config: AmtConfig):
        super().__init__()
        a, b, c = config.trunk
        self.conv1 = nn.Conv2d(3, a, 7, 2, 3)
        self.layer1 = nn.Sequential(_Bottleneck(a, a, 1), _Bottleneck(a, a, 1))
        self.layer2 = nn.Sequential(_Bottleneck(a, b, 2), _Bottleneck(b, b, 1))
        self.layer3 = nn.Sequential(_Bottleneck(b, c, 2), _Bottleneck(c, c, 1))
        self.conv2 = nn.Conv2d(c, config.features, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.instance_norm(self.conv1(x)))
        result: Tensor = self.conv2(self.layer3(self.layer2(self.layer1(x))))
        return result


class _Pyramid(nn.Module):
    """Pictures [N, 3, H, W] -> features at 1/2, 1/4, 1/8 and 1/16."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        for i, (old, new) in enumerate(zip((3, *channels[:-1]), channels, strict=True), start=1):
            self.add_module(f"pyramid{i}", nn.Sequential(_conv(old, new, 2), _conv(new, new)))

    def forward(self, x: Tensor) -> list[Tensor]:
        levels: list[Tensor] = []
        for stage in self.children():
            levels.append(stage(levels[-1] if levels else x))
        return levels


class _SideBlock(nn.Module):
    """Residual block in which the last `skip` channels pass through convolutions of their own in between."""

    def __init__(self, channels: int, skip: int):
        super().__init__()
        self.split = (channels - skip, skip)
        self.conv1, self.conv3 = _conv(channels, channels), _conv(channels, channels)
        self.conv2, self.conv4 = _conv(skip, skip), _conv(skip, skip)
        self.conv5 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.prelu = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for whole, side in ((self.conv1, self.conv2), (self.conv3, self.conv4)):
            most, last = whole(y).split(self.split, dim=1)
            y = torch.cat([most, side(last)], dim=1)
        result: Tensor = self.prelu(x + self.conv5(y))
        return result


class _Decoder(nn.Module):
    """What the four decoders share: inputs [N, channels, h, w] -> [N, out, 2 h, 2 w]."""

    def __init__(self, channels: int, width: int, out: int, skip: int):
        super().__init__()
        self.convblock = nn.Sequential(
            _conv(channels, width), _SideBlock(width, skip), nn.ConvTranspose2d(width, out, 4, 2, 1)
        )

    def forward(self, *parts: Tensor) -> Tensor:
        result: Tensor = self.convblock(torch.cat(parts, dim=1))
        return result


class _Update(nn.Module):
    """Corrections of features and flows from correlations, at an eighth whatever the features' scale.

    Args:
        channels: of the features.
        scale: of the features against an eighth: 1, 2 or 4.
    """

    def __init__(self, channels: int, scale: int, config: AmtConfig):
        super().__init__()
        self.scale = scale
        window = LEVELS * (2 * config.radius + 1) ** 2
        self.convc1 = nn.Conv2d(2 * window, config.correlation, 1)
        self.convf1 = nn.Conv2d(4, 2 * config.flow, 7, padding=3)
        self.convf2 = nn.Conv2d(2 * config.flow, config.flow, 3, padding=1)
        self.conv = nn.Conv2d(config.correlation + config.flow, config.fused, 3, padding=1)
        self.gru = self._two(config.fused + 4 + channels, config.hidden, config.hidden)
        self.feat_head = self._two(config.hidden, config.hidden, channels)
        self.flow_head = self._two(config.hidden, config.hidden, 4)

    @staticmethod
    def _two(channels: int, hidden: int, out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(hidden, out, 3, padding=1)
        )

    def forward(self, features: Tensor, flow: Tensor, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Corrections at the features' scale; `flow` [N, 4, H / 8, W / 8] and `windows` are at an eighth."""
        if self.scale > 1:
            features = resize(features, 1 / self.scale)
        seen = F.leaky_relu(self.convc1(windows), 0.1)
        moved = F.leaky_relu(self.convf2(F.leaky_relu(self.convf1(flow), 0.1)), 0.1)
        fused = F.leaky_relu(self.conv(torch.cat([seen, moved], dim=1)), 0.1)
        state = self.gru(torch.cat([fused, flow, features], dim=1))
        more, further = self.feat_head(state), self.flow_head(state)
        if self.scale > 1:
            more, further = resize(more, self.scale), self.scale * resize(further, self.scale)
        return more, further


class Amt(nn.Module):
    """Two frames -> the one between them; see the module's words."""

    def __init__(self, config: AmtConfig):
        super().__init__()
        self.config = config
        a, b, c, d = config.channels
        skip, flows = config.skip, config.flows
        self.feat_encoder = _FeatureEncoder(config)
        self.encoder = _Pyramid(config.channels)
        self.decoder4 = _Decoder(2 * d + 1, 2 * d, c + 4, skip)
        self.decoder3 = _Decoder(3 * c + 4, 3 * c, b + 4, skip)
        self.decoder2 = _Decoder(3 * b + 4, 3 * b, a + 4, skip)
        self.decoder1 = _Decoder(3 * a + 4, 3 * a, 8 * flows, skip)
        self.update4, self.update3, self.update2 = _Update(c, 1, config), _Update(b, 2, config), _Update(a, 4, config)
        self.comb_block = nn.Sequential(
            nn.Conv2d(3 * flows, 6 * flows, 3, 1, 1), nn.PReLU(6 * flows), nn.Conv2d(6 * flows, 3, 3, 1, 1)
        )

    def forward(self, first: Tensor, second: Tensor, time: float = 0.5, limit: int = VOLUME) -> Tensor:
        """The frames between pairs.

        Args:
            first, second: float [N, 3, H, W] RGB in [0, 1]; H and W multiples of 16, at least 64.
            time: between 0 and 1, where between the two.
            limit: numbers of correlations that are kept, see `VOLUME`; it changes the memory, not the result.

        Returns:
            [N, 3, H, W], clipped to [0, 1].

        Raises:
            ValueError: another size.
        """
        height, width = first.shape[-2:]
        if first.shape != second.shape or height % MULTIPLE or width % MULTIPLE or min(height, width) < SMALLEST:
            raise ValueError(
                f"AMT takes pairs of one size whose sides are multiples of {MULTIPLE} from {SMALLEST} on, "
                f"got {list(first.shape)} and {list(second.shape)}"
            )
        size = len(first)
        mean = torch.stack([first, second], dim=1).mean((1, 2, 3, 4)).view(size, 1, 1, 1)
        both = torch.cat([first - mean, second - mean])
        near, far = self.feat_encoder(both).split(size)
        seen = Correlations(near, far, self.config.radius, LEVELS, limit)
        levels = [level.split(size) for level in self.encoder(both)]

        moment = first.new_full((size, 1, height // 16, width // 16), time)
        made = self.decoder4(*levels[3], moment)
        flow, features = made[:, :4], made[:, 4:]
        flow, features = self._corrected(self.update4, seen, flow, features, time)
        for decoder, update, level in (
            (self.decoder3, self.update3, levels[2]),
            (self.decoder2, self.update2, levels[1]),
        ):
            made = self._decoded(decoder, features, level, flow)
            flow, features = made[:, :4] + 2 * resize(flow, 2), made[:, 4:]
            flow, features = self._corrected(update, seen, flow, features, time)
        made = self._decoded(self.decoder1, features, levels[0], flow)
        return self._combined(made, resize(flow, 2) * 2, both, mean).clamp(0, 1)

    def _decoded(self, decoder: nn.Module, features: Tensor, level: Sequence[Tensor], flow: Tensor) -> Tensor:
        result: Tensor = decoder(features, warp(level[0], flow[:, :2]), warp(level[1], flow[:, 2:]), flow)
        return result

    def _corrected(
        self, update: _Update, seen: Correlations, flow: Tensor, features: Tensor, time: float
    ) -> tuple[Tensor, Tensor]:
        """Flow and features after a look at the correlations where the flow points.

        The flow goes from the moment to each frame; that from frame to frame is taken as straight, so that 1 / time of
        the one to the second frame leads from the first to the second.
        """
        coarse = resize(flow, 1 / update.scale) / update.scale if update.scale > 1 else flow
        here = pixels(coarse)
        windows = seen.look(here + coarse[:, 2:] / time, here + coarse[:, :2] / (1 - time))
        more, further = update(features, coarse, windows)
        return flow + further, features + more

    def _combined(self, made: Tensor, flow: Tensor, both: Tensor, mean: Tensor) -> Tensor:
        """The pictures that each pair of flows gives, their mean and its correction."""
        count, (size, _, height, width) = self.config.flows, made.shape
        to_first, to_second, masks, rest = made.split([2 * count, 2 * count, count, 3 * count], dim=1)
        shape = (size * count, -1, height, width)
        warped = [
            warp(frame.repeat_interleave(count, 0), (further + base.repeat(1, count, 1, 1)).reshape(shape))
            for frame, further, base in zip(
                both.split(size), (to_first, to_second), (flow[:, :2], flow[:, 2:]), strict=True
            )
        ]
        share = masks.sigmoid().reshape(shape)
        pictures = share * warped[0] + (1 - share) * warped[1] + mean.repeat_interleave(count, 0) + rest.reshape(shape)
        stacked = pictures.reshape(size, count, 3, height, width)
        result: Tensor = stacked.mean(1) + self.comb_block(stacked.flatten(1, 2))
        return result


def build_amt(config: AmtConfig | None = None) -> Amt:
    """A randomly initialised float32 network on the CPU; without a config, AMT-S."""
    return Amt(config or AmtConfig())


def load_amt(*, checkpoint: Path, device: torch.device, dtype: torch.dtype) -> Amt:
    """The network of a checkpoint, for evaluation, without gradients of its own; its sizes are those of the tensors.

    Args:
        dtype: is not used: the network always runs in float32, since flows in pixels do not survive less.

    Raises:
        ValueError: the file cannot be read safely, or tensors are missing, unexpected or mis-shaped (all named).
    """
    state = read_state_dict(checkpoint)
    model = _on_meta(state, str(checkpoint))
    load_into(model, state, str(checkpoint), assign=True)
    return model.eval().requires_grad_(False).to(device, torch.float32)


def check_fits(state: Mapping[str, Tensor], file: Path) -> None:
    """Whether names and shapes are those of an AMT-S; values are not looked at.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, all named.
    """
    load_into(_on_meta(state, str(file)), state, str(file), assign=True)


def _on_meta(state: Mapping[str, Tensor], origin: str) -> Amt:
    try:
        config = AmtConfig.of(state)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}; get the file again.") from None
    with torch.device("meta"):
        return Amt(config)
