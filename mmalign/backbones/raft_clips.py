"""What scorers take from RAFT's flow of a clip: speeds of pairs of frames, tracks of points, frames in between.

Flows are reduced as they come, part by part, so that those of a long clip never lie in memory together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.backbones.raft import RaftFlow, load_raft, padding
from mmalign.evaluation import BackboneSpec, find_checkpoint
from mmalign.vbench.camera import advance, edge_points
from mmalign.vbench.motion import DYNAMIC_SHARE, Rules, top_mean

__all__ = ["CLIP_FLOW", "ClipMotion", "clip_motion", "middle_frames", "pair_speeds", "raft_backbone", "raft_file"]

CLIP_FLOW = "motion of a clip by RAFT"
"""First part of the key under which a batch's `ClipMotion`s are shared; then network, frame plan and rules."""


def raft_file(checkpoint: Path | None, network: str) -> Path:
    """The weights that a user's setting means. ValueError where they are missing, saying where to get them."""
    return find_checkpoint(checkpoint, network)


def raft_backbone(checkpoint: Path | None, network: str) -> BackboneSpec:
    """The spec of the network, one for all scorers that name the same file."""
    return BackboneSpec.of(load_raft, checkpoint=raft_file(checkpoint, network))


@dataclass(frozen=True)
class ClipMotion:
    """What is kept of the flows between neighbouring frames of a clip of T frames.

    Attributes:
        speeds: of its pairs, the mean of their fastest 5 %, in pixels: float64 [T - 1].
        start, end: the points of `edge_points` in the first and in the last frame: float64 [4, 2], (x, y) in pixels.
    """

    speeds: Tensor
    start: Tensor
    end: Tensor


def clip_motion(raft: RaftFlow, clip: Tensor, rules: Rules) -> ClipMotion:
    """The motion of a clip uint8 [T, 3, H, W]; one of one frame has no speeds, and points that stay."""
    height, width = clip.shape[-2:]
    left, _, top, _ = padding(height, width)
    start = points = edge_points(height, width, rules)
    speeds = [torch.zeros(0, dtype=torch.float64)]
    for _, flow in raft.flows(clip, _neighbours(len(clip))):
        speeds.append(top_mean(_seen(flow, height, width, rules), DYNAMIC_SHARE).cpu())
        for each in flow:
            points = advance(points, each, (left, top))
    return ClipMotion(torch.cat(speeds), start, points)


def pair_speeds(
    raft: RaftFlow, clip: Tensor, pairs: Sequence[tuple[int, int]], share: float, rules: Rules
) -> Iterator[float]:
    """The speed of one pair after the other, as `top_mean` defines it; pairs that nobody asks for are not computed."""
    for _, flow in raft.flows(clip, pairs):
        yield from top_mean(_seen(flow, clip.shape[-2], clip.shape[-1], rules), share).tolist()


def _neighbours(frames: int) -> list[tuple[int, int]]:
    return list(pairwise(range(frames)))


def _seen(flow: Tensor, height: int, width: int, rules: Rules) -> Tensor:
    """The flow that counts: of the padded frame, as it is published, or of the frame alone."""
    left, _, top, _ = padding(height, width)
    return flow if rules == "compat" else flow[..., top : top + height, left : left + width]


def middle_frames(raft: RaftFlow, clip: Tensor, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Tensor]]:
    """For each pair of frames the frame halfway between them, as steady motion along RAFT's flow would give it.

    The flows from the middle to the two frames are (backward - forward) / 4 and its opposite, both read at the middle's
    own pixels (Jiang et al., 1712.00080, equation 4, at t = 1/2). Each frame is warped by its own, bilinearly, with its
    edges going on outside, and the two are averaged.

    Args:
        clip: uint8 [T, 3, H, W].

    Yields:
        The place in `pairs`, and the frame: float32 [3, H, W] from 0 to 255.
    """
    height, width = clip.shape[-2:]
    left, _, top, _ = padding(height, width)
    both = [pair for first, second in pairs for pair in ((first, second), (second, first))]
    waiting: Tensor | None = None
    for places, flows in raft.flows(clip, both):
        for place, flow in zip(places, flows[..., top : top + height, left : left + width], strict=True):
            if place % 2 == 0:
                waiting = flow
                continue
            assert waiting is not None, "a pair's two directions come one after the other"
            back = (flow - waiting) / 4
            first, second = (clip[index].to(flow.device).float() for index in pairs[place // 2])
            yield place // 2, (_warp(first, back) + _warp(second, -back)) / 2


def _warp(frame: Tensor, flow: Tensor) -> Tensor:
    """The frame [3, H, W] read at every pixel's place plus its flow [2, H, W]."""
    height, width = frame.shape[-2:]
    y, x = torch.meshgrid(
        torch.arange(height, device=frame.device), torch.arange(width, device=frame.device), indexing="ij"
    )
    sides = flow.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    places = torch.stack([x + flow[0], y + flow[1]], dim=-1)
    grid = 2 * places / sides - 1
    return F.grid_sample(frame[None], grid[None], padding_mode="border", align_corners=True)[0]
