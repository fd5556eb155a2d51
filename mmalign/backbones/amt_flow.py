"""What AMT does with flow: warping, and looking up correlations of two frames' features in both directions.

Flows are in pixels of the map they belong to, x before y.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["VOLUME", "Correlations", "pixels", "resize", "warp"]

VOLUME = 300_000_000
"""Numbers of one direction's correlations that are kept; a pair of 1280 x 720 has 276 million. More are computed anew
for each look, in parts."""


def resize(x: Tensor, factor: float) -> Tensor:
    """[N, C, h, w] bilinearly, without a filter, to h and w times `factor`."""
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def pixels(like: Tensor) -> Tensor:
    """Each pixel's (x, y) in a map of the size of `like` [..., h, w]: [1, 2, h, w]."""
    height, width = like.shape[-2:]
    rows, columns = (torch.arange(side, dtype=like.dtype, device=like.device) for side in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y])[None]


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """`x` [N, C, h, w] read bilinearly where `flow` [N, 2, h, w] points; beyond the edge, the edge."""
    return _sample(x, pixels(flow) + flow, "border")


def _sample(x: Tensor, places: Tensor, beyond: str) -> Tensor:
    """`x` [N, C, h, w] at `places` [N, 2, H, W] in pixels, bilinearly: [N, C, H, W]."""
    sides = torch.tensor([x.shape[-1], x.shape[-2]], dtype=places.dtype, device=places.device)
    # From corner to corner of the outer pixels, so that a map of one pixel has a scale too.
    grid = (2 * places.permute(0, 2, 3, 1) + 1) / sides - 1
    return F.grid_sample(x, grid, mode="bilinear", padding_mode=beyond, align_corners=False)


class Correlations:
    """Products of two feature maps, pixel with pixel, at several scales of the map that is looked into.

    A scale's volume is the mean of 2 x 2 of the one before. As the product is linear, these means are taken of the
    features instead, so that no part of the volume is needed for another one.

    Args:
        first, second: [N, D, h, w].
        radius: of the window that is read, in pixels of each scale.
        levels: number of scales; 2 ** (levels - 1) has to fit into h and w.
        limit: numbers that may be kept per direction; see `VOLUME`.
    """

    def __init__(self, first: Tensor, second: Tensor, radius: int, levels: int, limit: int = VOLUME):
        self.radius, self.limit = radius, limit
        self.sides = (_Side(first, second, levels), _Side(second, first, levels))
        self.kept: list[list[Tensor] | None] = [None, None]
        if self.sides[0].numbers <= limit:
            self.kept = [side.volumes(0, side.queries) for side in self.sides]

    def look(self, forward: Tensor, backward: Tensor) -> Tensor:
        """Windows around places: [N, 2 levels (2 radius + 1)^2, h, w], of the first direction and then of the second.

        Args:
            forward: [N, 2, h, w], for each pixel of the first map a place (x, y) in the second.
            backward: the other way round.
        """
        windows = [
            self._windows(side, kept, places)
            for side, kept, places in zip(self.sides, self.kept, (forward, backward), strict=True)
        ]
        return torch.cat(windows, dim=1)

    def _windows(self, side: _Side, kept: list[Tensor] | None, places: Tensor) -> Tensor:
        size, _, height, width = places.shape
        flat = places.flatten(2).transpose(1, 2)  # [N, h w, 2]
        if kept is not None:
            found = self._read(kept, flat)
        else:
            rows = max(1, self.limit * side.queries // side.numbers)
            parts = ((at, min(at + rows, side.queries)) for at in range(0, side.queries, rows))
            found = torch.cat([self._read(side.volumes(at, past), flat[:, at:past]) for at, past in parts], dim=1)
        return found.transpose(1, 2).reshape(size, -1, height, width)

    def _read(self, volumes: list[Tensor], places: Tensor) -> Tensor:
        """Windows [N, Q, levels (2 r + 1)^2] of volumes [N Q, 1, h, w] at places [N, Q, 2].

        The window's first axis moves along x and its second along y, as the published weights have it.
        """
        steps = torch.arange(-self.radius, self.radius + 1, dtype=places.dtype, device=places.device)
        window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"))[None]  # [1, 2, 2 r + 1, 2 r + 1]
        found = []
        for level, volume in enumerate(volumes):
            middle = places.reshape(-1, 2, 1, 1) / 2**level
            found.append(_sample(volume, middle + window, "zeros").reshape(*places.shape[:2], -1))
        return torch.cat(found, dim=-1)


class _Side:
    """One direction: queries from one map, and the pyramid of the other."""

    def __init__(self, source: Tensor, looked: Tensor, levels: int):
        self.source = source.flatten(2).transpose(1, 2) / math.sqrt(source.shape[1])  # [N, h w, D]
        self.pyramid = [looked]
        for _ in range(levels - 1):
            self.pyramid.append(F.avg_pool2d(self.pyramid[-1], 2))
        self.queries = self.source.shape[1]
        self.numbers = self.source.shape[0] * self.queries * sum(math.prod(map_.shape[-2:]) for map_ in self.pyramid)

    def volumes(self, start: int, past: int) -> list[Tensor]:
        """For the queries from `start` to `past`, by level: [N (past - start), 1, h, w]."""
        query = self.source[:, start:past]
        return [(query @ map_.flatten(2)).reshape(-1, 1, *map_.shape[-2:]) for map_ in self.pyramid]
