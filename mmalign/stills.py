"""Clips that are no video files: a folder of numbered pictures, or one picture, which is a clip of one frame.

Neither states a frame rate. Unless the table's row does (`fps`), 8 frames a second are assumed: at this rate plans that
go by time take every frame.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from pathlib import Path

import numpy as np

from mmalign.frame_plans import FramePlan, Timeline, picked
from mmalign.media import IMAGE_SUFFIXES, MAX_PIXELS, content_hash, read_image
from mmalign.source import MediaError, Source, name_of
from mmalign.video import MAX_CLIP_BYTES, Frames

__all__ = ["FPS", "are_stills", "folder_hash", "frame_files", "read_stills"]

FPS = 8.0
_PARTS = re.compile(r"(\d+)")


def are_stills(source: Source) -> bool:
    """Whether a clip's source is a folder, or called a picture. GIFs are decoded as the clips that they often are."""
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        return True
    return Path(name_of(source)).suffix.lower() in IMAGE_SUFFIXES - {".gif"}


def frame_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The pictures in a folder, in the order of the numbers in their names (2 before 10), hidden files left out.

    MediaError where it has none, or cannot be listed.
    """
    name = str(folder)
    try:
        files = [each for each in Path(folder).iterdir() if each.suffix.lower() in IMAGE_SUFFIXES]
    except OSError as error:
        raise MediaError(name, f"is a folder that cannot be listed ({error.strerror}); check its permissions") from None
    found = sorted((each for each in files if not each.name.startswith(".")), key=_numbered)
    if not found:
        raise MediaError(name, "is a folder without pictures; name one file, or the folder of a clip's frames")
    return found


def _numbered(file: Path) -> tuple[list[tuple[int, str]], str]:
    """Digits by their value; the name itself where that leaves two equal (`1.png`, `01.png`)."""
    parts = _PARTS.split(file.stem)
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)], file.name


def folder_hash(folder: str | os.PathLike[str]) -> str:
    """sha256 (hex) over the contents of a clip's frames in their order. MediaError as in `frame_files`."""
    whole = hashlib.sha256(b"frames")
    for file in frame_files(folder):
        whole.update(bytes.fromhex(content_hash(file)))
    return whole.hexdigest()


def read_stills(
    source: Source,
    plan: FramePlan,
    *,
    fps: float | None = None,
    max_bytes: int = MAX_CLIP_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Frames:
    """The frames that `plan` picks of a folder of pictures, or of a single one.

    All pictures are decoded, also those that are not picked, so that a damaged clip is refused whatever the plan.

    Args:
        fps: at which they play; None: 8 are assumed.
        max_bytes: of the picked frames as uint8 RGB.
        max_pixels: of a picture.

    Raises:
        MediaError: a folder without pictures, one that cannot be read, pictures of several sizes, too many of them.
    """
    name = name_of(source)
    sources: list[Source] = [source]
    if isinstance(source, str | os.PathLike) and os.path.isdir(source):
        sources = list(frame_files(source))
    timeline = Timeline.regular(len(sources), fps or FPS)
    try:
        indices = picked(plan, timeline)
    except ValueError as error:
        raise MediaError(name, str(error)) from None
    frames: dict[int, np.ndarray] = {}
    size: tuple[int, ...] | None = None
    for number, each in enumerate(sources):
        frame = read_image(each, max_pixels=max_pixels)
        if size is not None and frame.shape != size:
            of = f"{frame.shape[1]}x{frame.shape[0]} after {size[1]}x{size[0]}"
            raise MediaError(name, f"has frames of several sizes ({name_of(each)} is {of}); resize them to one")
        if size is None and len(set(indices)) * frame.size > max_bytes:
            held = f"has {len(set(indices))} frames to look at, more than max_bytes={max_bytes:,}"
            raise MediaError(name, f"{held}; pick fewer with a frame plan, or raise max_bytes to score it")
        size = frame.shape
        if number in indices:
            frames[number] = frame
    return Frames(frames, timeline, f"pillow {importlib.metadata.version('pillow')}", indices)
