"""Batches shared out among processes, so that all of them end at about the same time.

What an item will cost is estimated before anything is decoded: its frames x the pixels of one x (1 + its evaluators),
for it is decoded once and looked at by each. Frames and pixels are what the file's header says; where it says none, a
clip counts as `PIXELS` per byte of its file and a picture as the mean of the others. An estimate that is wrong costs
time and no more: each batch is scored as it would be anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import av

from mmalign.media import image_size
from mmalign.score_plan import Item, Plan, Todo
from mmalign.source import MediaError
from mmalign.stills import frame_files
from mmalign.video_container import open_clip, stream_of

__all__ = ["PIXELS", "costs", "share_out"]

PIXELS = 100.0
"""Pixels per byte of a clip as H.264 at about 0.08 bits each."""
_THREADS = 8
_LEAST = 1.0


def share_out(plan: Plan, todo: Sequence[Todo], number: int) -> list[list[Todo]]:
    """`number` shares of the batches, each in their order; the same for the same files, whoever asks.

    The dearest batch goes to the process that has the least, and so on (Graham 1969: at most 4/3 of the best longest
    share). Batches of equal cost go round.
    """
    if number == 1:
        return [list(todo)]
    each = costs(plan, todo)
    loads, shares = [0.0] * number, [list[int]() for _ in range(number)]
    for place in sorted(range(len(todo)), key=lambda place: (-each[place], place)):
        least = min(range(number), key=lambda rank: (loads[rank], len(shares[rank]), rank))
        loads[least] += each[place]
        shares[least].append(place)
    return [[todo[place] for place in sorted(share)] for share in shares]


def costs(plan: Plan, todo: Sequence[Todo]) -> list[float]:
    """The estimate for each batch, see the module."""
    places = sorted({index for batch in todo for index, _ in batch})
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="cost") as pool:
        sizes = dict(zip(places, pool.map(lambda index: _size(plan.items[index]), places), strict=True))
    known = [size for size in sizes.values() if size is not None]
    usual = sum(known) / len(known) if known else _LEAST
    return [
        sum((usual if (size := sizes[index]) is None else size) * (1 + len(jobs)) for index, jobs in batch)
        for batch in todo
    ]


def _size(item: Item) -> float | None:
    """Pixels of all frames; None where that cannot be told. What cannot be read costs nothing."""
    media = item.row.media
    if item.problem is not None or not media:
        return _LEAST
    if not isinstance(media, str):
        return None
    try:
        if os.path.isdir(media):
            return _folder_size(media)
        return _clip_size(media) if item.row.modality == "video" else _image_size(media)
    except (OSError, ValueError, av.FFmpegError):
        return None  # the decoder will say what is wrong with it


def _image_size(path: str) -> float:
    width, height = image_size(path)
    return float(width * height)


def _folder_size(folder: str) -> float:
    frames = frame_files(folder)
    return _image_size(str(frames[0])) * len(frames)


def _clip_size(path: str) -> float:
    try:
        with open_clip(path) as container:
            stream = stream_of(container, path)
            seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
            if seconds is None and container.duration:
                seconds = container.duration / av.time_base
            rate = stream.average_rate or stream.guessed_rate
            frames = stream.frames or (seconds * float(rate) if seconds and rate else 0)
            context = stream.codec_context  # None where the codec is not known here
            pixels = context.width * context.height if context is not None else 0
    except MediaError:
        frames = pixels = 0
    return float(frames * pixels) or os.path.getsize(path) * PIXELS
