"""How long and how large clips are, known from their headers, and which are too short to be trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeVar

from mmalign.formats import Dropped
from mmalign.jobs import Data
from mmalign.media import MediaError, clip_facts
from mmalign.progress import track

Item = TypeVar("Item")


@cache
def facts(medium: Any, fps: float | None) -> tuple[tuple[int, int], int]:
    """Height and width of a clip, and how many frames it has at `fps`. MediaError for one that cannot be read."""
    if hasattr(medium, "clip"):
        return medium.size, int(medium.num_frames)
    found = clip_facts(medium)
    return (found.height, found.width), found.frames_at(fps) if fps else found.num_frames


def long_enough(
    items: Sequence[Item], media: Callable[[Item], Sequence[Any]], data: Data
) -> tuple[list[Item], list[Dropped]]:
    """Items whose clips all fill the shortest length that `data` takes, and the others with the reason.

    A row is dropped whole: one clip of a pair alone says nothing, and frames that are not there are not made up.
    """
    if data.frames is None:
        return list(items), []
    shortest = min((*data.frame_buckets, data.frames))
    kept: list[Item] = []
    dropped: list[Dropped] = []
    for item in track(items, "reading lengths", len(items)):
        fault = next((found for medium in media(item) if (found := _fault(medium, shortest, data.fps))), None)
        if fault is None:
            kept.append(item)
        else:
            dropped.append(Dropped(str(getattr(item, "origin", fault[0])), *fault[1:]))
    return kept, dropped


def _fault(medium: Any, shortest: int, fps: float | None) -> tuple[str, str, str] | None:
    try:
        _, frames = facts(medium, fps)
    except MediaError as error:
        return medium.name, "undecodable clip", error.problem
    if frames >= shortest:
        return None
    at = f" at {fps:g} frames per second" if fps else ""
    return medium.name, f"fewer than {shortest} frames", f"{medium.name} has {frames}{at}"
