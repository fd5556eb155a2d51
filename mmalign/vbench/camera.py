"""How VBench++ tells the camera's motion from four tracked points, and reads the asked motion off a prompt.

Source: vbench2_beta_i2v/camera_motion.py. The points are the middles of the four edges of a 10 x 10 grid, in their
places in the first and in the last frame. What moves left when the camera pans to the right is the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EDGES", "TYPES", "advance", "asked_type", "camera_types", "directions", "edge_points", "is_hit"]

Rules = Literal["compat", "strict"]
TYPES = {
    "camera pans left": "pan_left",
    "camera pans right": "pan_right",
    "camera tilts up": "tilt_up",
    "camera tilts down": "tilt_down",
    "camera zooms in": "zoom_in",
    "camera zooms out": "zoom_out",
    "camera static": "static",
}
"""The suite's phrases, and the camera motions that they ask for."""
EDGES = ("top", "bottom", "left", "right")
SHARE = 0.005  # of the shorter side: the least displacement that is a motion
_GRID, _MIDDLE = 10, 5
_TRACKED = (384, 512)  # height and width at which CoTracker2 lays out its grid; its margin is a 64th of the width
_OPPOSITE = {"pan_left": "pan_right", "tilt_up": "tilt_down", "zoom_in": "zoom_out"}
_SAME = {
    ("left", "left"): "pan_right",
    ("right", "right"): "pan_left",
    ("down", "down"): "tilt_up",
    ("up", "up"): "tilt_down",
    ("static", "static"): "static",
}
_ACROSS = {
    "vertical": {**_SAME, ("up", "down"): "zoom_in", ("down", "up"): "zoom_out"},
    "horizontal": {**_SAME, ("left", "right"): "zoom_in", ("right", "left"): "zoom_out"},
}


def asked_type(prompt: str, rules: Rules = "compat") -> str:
    """The camera motion that a prompt asks for, one of `TYPES`' values.

    ``compat`` takes the first phrase of `TYPES` that the prompt holds, in that table's order and with small letters;
    ``strict`` takes any letters, and refuses prompts that ask for two motions.

    Raises:
        ValueError: the prompt holds none of the phrases.
    """
    text = prompt if rules == "compat" else prompt.lower()
    found = [name for phrase, name in TYPES.items() if phrase in text]
    if not found:
        raise ValueError(f"the prompt asks for no camera motion; it has to hold one of: {', '.join(TYPES)}.")
    if rules == "strict" and len(found) > 1:
        raise ValueError(f"the prompt asks for {' and '.join(found)}; one camera motion can be checked.")
    return found[0]


def edge_points(height: int, width: int, rules: Rules = "compat") -> Tensor:
    """Where the points begin, in pixels (x, y): float64 [4, 2], in the order of `EDGES`.

    The grid's sixth column and row stand for the middle in ``compat``; ``strict`` has the middle itself.
    """
    margin = _TRACKED[1] / 64
    spots = torch.arange(_GRID, dtype=torch.float64) / (_GRID - 1)
    # Laid out at the tracker's size, then brought to the clip's: corners stay corners.
    y = (margin + spots * (_TRACKED[0] - 2 * margin)) * (height - 1) / (_TRACKED[0] - 1)
    x = (margin + spots * (_TRACKED[1] - 2 * margin)) * (width - 1) / (_TRACKED[1] - 1)
    middle = (x[_MIDDLE], y[_MIDDLE]) if rules == "compat" else (x.mean(), y.mean())
    places = ((middle[0], y[0]), (middle[0], y[-1]), (x[0], middle[1]), (x[-1], middle[1]))
    return torch.stack([torch.stack(place) for place in places])


def advance(points: Tensor, flow: Tensor, offset: tuple[int, int] = (0, 0)) -> Tensor:
    """Points one pair of frames later: float64 [N, 2] -> [N, 2].

    Args:
        points: (x, y) in pixels of the frame.
        flow: [2, H', W'] of the padded frame, read between its pixels bilinearly. A point that has left it moves on
            with the flow of the nearest pixel of its edge.
        offset: (left, top) padding of the flow.
    """
    height, width = flow.shape[-2:]
    places = points + points.new_tensor(offset)
    scale = points.new_tensor([max(width - 1, 1), max(height - 1, 1)])
    grid = (2 * places / scale - 1)[None, None]
    values = F.grid_sample(flow[None].double().cpu(), grid, padding_mode="border", align_corners=True)
    return points + values[0, :, 0].T


def directions(displacement: Sequence[float], shorter_side: int) -> tuple[str, ...]:
    """Where a point went: right or left, down or up, both, or static, for (dx, dy) in pixels."""
    least = shorter_side * SHARE
    x, y = displacement
    found = [name for name, there in (("right", x > least), ("left", x < -least)) if there]
    found += [name for name, there in (("down", y > least), ("up", y < -least)) if there]
    return tuple(found) or ("static",)


def camera_types(start: Tensor, end: Tensor, height: int, width: int, rules: Rules = "compat") -> set[str]:
    """The camera motions that four points tell, of `TYPES`' values; empty where they tell none.

    Args:
        start, end: (x, y) in pixels, [4, 2] in the order of `EDGES`. ``compat`` cuts them to whole pixels first,
            towards zero; ``strict`` does not, and drops a motion together with its opposite where both are told.
    """
    if rules == "compat":
        start, end = start.trunc(), end.trunc()
    moved = [directions(pair, min(height, width)) for pair in (end - start).tolist()]
    top, bottom, left, right = moved
    found = {*_told("vertical", top, bottom), *_told("horizontal", left, right)}
    if len(found) > 1:
        found.discard("static")
    if len(found) > 1:
        found.discard("none")
    if rules == "strict":
        for one, other in _OPPOSITE.items():
            if {one, other} <= found:
                found -= {one, other}
    return found - {"none"}


def _told(across: str, first: Sequence[str], second: Sequence[str]) -> Iterator[str]:
    """What two opposite points tell; "none" where nothing, which hides that the other two stand still."""
    table = _ACROSS[across]
    told = [table[pair] for pair in ((a, b) for a in first for b in second) if pair in table]
    yield from told or ["none"]


def is_hit(asked: str, found: set[str]) -> bool:
    """Whether the asked camera motion is among those found; other motions beside it do no harm."""
    return asked in found
