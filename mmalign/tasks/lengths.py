"""How long and how large clips are, known from their headers, and which are too short to be trained on."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from mmalign.jobs_inputs import Data
from mmalign.media import ClipFacts, MediaError, clip_facts
from mmalign.preference_row import Dropped, PreferenceRow, Resampled
from mmalign.progress import track
from mmalign.tables import Captioned

Item = TypeVar("Item", PreferenceRow, Captioned)


def facts(medium: Any, fps: float | None) -> tuple[tuple[int, int], int]:
    """Height and width of a clip, and how many frames it has at `fps`. MediaError for one that cannot be read."""
    if hasattr(medium, "clip"):
        return medium.size, int(medium.num_frames)
    found = _read(medium)
    return (found.height, found.width), found.frames_at(fps) if fps else found.num_frames


@cache
def _read(medium: Any) -> ClipFacts:
    return clip_facts(medium)


def long_enough(
    items: Sequence[Item], media: Callable[[Item], Sequence[Any]], data: Data
) -> tuple[list[Item], list[Dropped]]:
    """Items whose clips all fill the shortest length that `data` takes, and the others with the reason.

    A row is dropped whole: one clip of a pair alone says nothing, and frames that are not there are not made up. What
    is kept says how its clips are `resampled`.
    """
    if data.frames is None:
        return list(items), []
    lengths = sorted((*data.frame_buckets, data.frames))
    kept: list[Item] = []
    dropped: list[Dropped] = []
    every = list(dict.fromkeys(medium for item in items for medium in media(item)))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        looked = pool.map(lambda medium: _fault(medium, lengths[0], data.fps), every)
        faults = dict(zip(every, track(looked, "reading lengths", len(every)), strict=True))
    for item in items:
        fault = next((found for medium in media(item) if (found := faults[medium])), None)
        if fault is None:
            there = min(facts(medium, data.fps)[1] for medium in media(item))
            frames = max(length for length in lengths if length <= there)
            told = tuple(Resampled(_read(medium).fps, data.fps, frames) for medium in media(item))
            kept.append(replace(item, resampled=told))
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


def resampling(rows: Iterable[PreferenceRow | Captioned]) -> str:
    """How the clips of rows are read, to follow another sentence; empty for pictures."""
    held = [one for row in rows for one in row.resampled or ()]
    if not held:
        return ""
    rates = Counter(f"{one.from_fps:.4g}" for one in held)
    told = ", ".join(f"{rates[rate]} at {rate}" for rate in sorted(rates, key=float))
    to = held[0].to_fps
    what = "at their own rate" if to is None else f"resampled to {to:g} frames per second"
    return f"; clips are taken {what} ({told})"
