"""What other programs found in clips: detections and captions by clip, from one JSONL file.

So `mmalign.vbench.rules` judge what the reference's own models (GRiT, Tag2Text) saw, which no maintained package runs.
A line is a clip::

    {"clip": "a red car-0.mp4", "frames": [[{"label": "car", "box": [12, 30, 80, 66], "caption": "a red car"}], []]}
    {"clip": "alley-0.mp4", "captions": ["a narrow alley with a cat", "a cat in an alley"]}

``frames`` has a list for each frame, empty where nothing was found; ``score`` and ``caption`` of an object may be left
out. A clip may have both.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from mmalign import paths
from mmalign.config import Strict, Words, nearest
from mmalign.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from mmalign.records import json_lines
from mmalign.vbench.rules import Detection

__all__ = ["Found", "Seen", "read_seen", "seen_files"]


class _Object(Strict):
    label: str
    box: tuple[float, float, float, float]
    score: float = 1.0
    caption: str = ""

    @model_validator(mode="after")
    def _sides(self) -> _Object:
        left, top, right, bottom = self.box
        if right < left or bottom < top:
            raise ValueError(f"a box is left, top, right, bottom in pixels, and here it is {list(self.box)}")
        return self


class _Line(Strict):
    clip: Words
    frames: tuple[tuple[_Object, ...], ...] | None = Field(None, min_length=1)
    captions: tuple[str, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _something(self) -> _Line:
        if self.frames is None and self.captions is None:
            raise ValueError("a line has frames, captions or both")
        return self


@dataclass(frozen=True)
class Found:
    """What is known of one clip.

    Attributes:
        clip: its name as the file has it.
        frames: detections of each frame; None where the file has captions alone.
        captions: of each frame; None where the file has detections alone.
    """

    clip: str
    frames: tuple[tuple[Detection, ...], ...] | None
    captions: tuple[str, ...] | None


class Seen:
    """The clips of a file by name."""

    def __init__(self, origin: Path, clips: list[Found]):
        self._origin = origin
        self._clips: dict[str, list[Found]] = {}
        for each in clips:
            for name in dict.fromkeys(_names(each.clip)):
                self._clips.setdefault(name, []).append(each)

    def frames(self, sample: str) -> tuple[tuple[Detection, ...], ...]:
        """The detections of the clip that a table calls ``sample``; ValueError where there are none."""
        found = self._of(sample).frames
        if found is None:
            raise ValueError(f"{self._origin}: has captions of {sample!r} and no frames with detections")
        return found

    def captions(self, sample: str) -> tuple[str, ...]:
        """Its captions; ValueError where there are none."""
        found = self._of(sample).captions
        if found is None:
            raise ValueError(f"{self._origin}: has detections of {sample!r} and no captions")
        return found

    def _of(self, sample: str) -> Found:
        """By the whole name, else by what stands behind the last slash; what a file ends in does not matter."""
        for name in _names(sample):
            found = self._clips.get(name, [])
            if len(found) > 1:
                clips = " and ".join(repr(each.clip) for each in found[:2])
                raise ValueError(f"{self._origin}: {sample!r} may be {clips}; write them as the table's samples are")
            if found:
                return found[0]
        raise ValueError(f"{self._origin}: has no line for {sample!r}.{nearest(sample, list(self._clips))}")


def _names(clip: str) -> tuple[str, str]:
    """The name without the suffix of a picture or clip, and what stands behind its last slash."""
    name = clip.replace("\\", "/")
    if Path(name).suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        name = name[: -len(Path(name).suffix)]
    return name, name.rpartition("/")[2]


def seen_files(path: str | Path) -> list[Path]:
    """The file itself, after it was read whole, for `weight_files`; ValueError as `read_seen`."""
    read_seen(path)
    return [paths.find(Path(path).expanduser())]


def read_seen(path: str | Path) -> Seen:
    """The clips of a JSONL file; read once as long as the file stays as it is.

    Raises:
        ValueError: there is no such file, or a line is wrong, with its number, or a clip has two.
    """
    file = paths.find(Path(path).expanduser())
    if not file.is_file():
        raise ValueError(f"detections: {file} is no file; give a JSONL file with a line for each clip")
    status = file.stat()
    return _read(file, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(file: Path, size: int, modified_ns: int) -> Seen:
    clips: dict[str, Found] = {}
    for number, values in json_lines(file):
        try:
            line = _Line.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{file}:{number}: {f'{place}: ' if place else ''}{first['msg']}") from None
        if line.clip in clips:
            raise ValueError(f"{file}:{number}: {line.clip!r} is on an earlier line too; keep one")
        clips[line.clip] = Found(line.clip, _detections(line), line.captions)
    if not clips:
        raise ValueError(f"{file}: has no lines; a line is a clip with its frames or captions")
    return Seen(file, list(clips.values()))


def _detections(line: _Line) -> tuple[tuple[Detection, ...], ...] | None:
    if line.frames is None:
        return None
    return tuple(tuple(Detection(o.label, o.box, o.score, o.caption) for o in frame) for frame in line.frames)
