"""How VBench decides by optical flow whether a clip moves (dynamic degree) or is static (static filter).

``compat`` is the published rule, ``strict`` the same without its accidents: half to even when counts are rounded, flow
measured on padding too, and clips so short that every one or none would pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from torch import Tensor

__all__ = [
    "DYNAMIC_SHARE",
    "STATIC_SHARE",
    "Rules",
    "check_measurable",
    "dynamic_needed",
    "dynamic_threshold",
    "dynamic_verdict",
    "file_order",
    "first_static",
    "static_allowed",
    "static_limit",
    "static_threshold",
    "top_mean",
]

Rules = Literal["compat", "strict"]
DYNAMIC_SHARE, STATIC_SHARE = 0.05, 0.02
"""Shares of a frame's pixels, the fastest ones, whose mean is the speed of a pair of frames."""


def top_mean(flow: Tensor, share: float) -> Tensor:
    """Mean length of the longest vectors of each flow: [n, 2, H, W] -> float64 [n], in pixels.

    Their number is ``int(H * W * share)``, at least 1.
    """
    lengths = flow.square().sum(1).sqrt().flatten(1)
    count = max(1, int(lengths.shape[1] * share))
    return lengths.topk(count, dim=1, sorted=False).values.double().mean(1)


def check_measurable(height: int, width: int, least: int, rules: Rules) -> None:
    """ValueError for frames on which the published network gives no number.

    Args:
        least: shortest side, padded to a multiple of 8, that it measures (`mmalign.backbones.raft.LEAST_SIDE`).
    """
    side = -(-min(height, width) // 8) * 8
    if rules == "compat" and side < least:
        raise ValueError(
            f"frames of {width} x {height} pixels are too small for VBench's RAFT, whose flow is NaN below {least - 7} "
            "pixels on a side (VBench then calls a clip static; below 57 it ends with an error). `rules: strict` "
            "measures them."
        )


def dynamic_threshold(height: int, width: int) -> float:
    """Speed above which a pair of frames counts as fast, in pixels: 6 for a shorter side of 256."""
    return 6.0 * (min(height, width) / 256.0)


def dynamic_needed(frames: int, rules: Rules) -> int:
    """Fast pairs that make a clip of this many sampled frames dynamic: a quarter of the frames, rounded.

    In ``compat`` a half goes to the even number, and two frames need no fast pair at all.

    Raises:
        ValueError: ``strict``, and fewer than 3 frames.
    """
    if rules == "compat":
        return round(4 * (frames / 16.0))
    if frames < 3:
        raise ValueError(
            f"{frames} sampled frame{'s' * (frames > 1)}: a quarter of them is no pair, so motion is undefined; "
            "VBench calls one frame static and two dynamic, whatever they show (`rules: compat`)."
        )
    return math.floor(frames / 4 + 0.5)


def dynamic_verdict(fast: int, seen: int, pairs: int, needed: int) -> bool | None:
    """Whether a clip is dynamic, by `fast` of the `seen` first of its `pairs`; None while it is open.

    A clip without a pair is not, also where none is needed: the published loop then asks nothing.
    """
    if pairs == 0:
        return False
    if fast >= needed:
        return True
    return False if fast + pairs - seen < needed else None


def static_threshold(height: int, width: int) -> float:
    """Speed above which a pair counts against a static clip, in pixels: 3 for a shorter side of 256."""
    return 3.0 * (min(height, width) / 256.0)


def static_allowed(frames: int, rules: Rules) -> int:
    """Fast pairs that a static clip may have: an eighth of all frames, rounded.

    In ``compat`` a half goes to the even number, and clips of up to 4 frames may have none; as the limit between first
    and last frame (`static_limit`) is then 0 too, they are refused unless their flow is exactly zero. ``strict`` allows
    at least 1.

    Raises:
        ValueError: ``strict``, and a single frame.
    """
    if rules == "compat":
        return round(2 * (frames / 16.0))
    if frames < 2:
        raise ValueError("one frame: there is no pair of frames to tell whether the clip is static.")
    return max(1, math.floor(frames / 8 + 0.5))


def static_limit(threshold: float, allowed: int) -> float:
    """Largest speed from the first frame to the last, and back, of a static clip, in pixels."""
    return threshold * allowed * 2


def file_order(names: Iterable[str], rules: Rules) -> list[str]:
    """Names in the order in which a prompt's clips are taken: as text (``-10`` before ``-2``), or by number."""
    if rules == "compat":
        return sorted(names)
    return sorted(names, key=lambda name: ([_part(text) for text in re.split(r"(\d+)", name)], name))


def _part(text: str) -> tuple[int, int, str]:
    return (0, int(text), "") if text.isdecimal() else (1, 0, text)


def first_static(names: Sequence[str], is_static: Callable[[str], bool | None], wanted: int) -> tuple[list[str], int]:
    """The first clips, in this order, that are static, at most `wanted`; and how many were asked about.

    Args:
        is_static: None where it is not known, which ends the search there.
    """
    found: list[str] = []
    for number, name in enumerate(names):
        if len(found) == wanted:
            return found, number
        answer = is_static(name)
        if answer is None:
            return found, number
        if answer:
            found.append(name)
    return found, len(names)
