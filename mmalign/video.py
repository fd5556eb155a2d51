"""Clips: one reader over PyAV and decord.

decord 0.6 carries FFmpeg 4.2 and PyAV its own newer one. Measured on the same files, they differ in these ways, and
each has a defined answer here (`docs/tables.md` has the table):
- 8-bit YUV and RGB: identical pixels, colour matrix and range tags included. 10 bits and more: different, so refused.
- decord's random access returns wrong frames after an open GOP (leading B-frames), so it is read in order only.
- decord ignores edit lists and shows frames that the file cuts away, and loses the first group of an MPEG-TS: refused.
- decord cannot read AV1, GIF, or some small widths (8, 12, 16, 24, 48, 72); it says so, and the message passes it on.
- decord conceals damage inside the bitstream silently; PyAV flags the frame, and the clip is refused.
Both apply the rotation tag. `decoder="auto"` is PyAV: over a whole clip it is also the faster.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import av
import numpy as np

from mmalign.frame_plans import (
    AllFrames,
    CommonFps,
    EveryFps,
    FramePlan,
    Middle,
    QwenFps,
    Starts,
    StrideFps,
    Timeline,
    Uniform,
    picked,
)
from mmalign.source import MediaError, Source, name_of, read_bytes, refuse_shape
from mmalign.video_container import MAX_FRAME_PIXELS, Facts, open_clip, short, stream_of, survey, timeline

if TYPE_CHECKING:  # imported where it is used: processes that only decode do without it, and start at once
    import torch

__all__ = [
    "MAX_CLIP_BYTES",
    "MAX_FRAME_PIXELS",
    "VIDEO_SUFFIXES",
    "AllFrames",
    "Clip",
    "ClipFacts",
    "CommonFps",
    "EveryFps",
    "FramePlan",
    "Frames",
    "Middle",
    "QwenFps",
    "Starts",
    "StrideFps",
    "Uniform",
    "check_video",
    "clip_facts",
    "clip_frames",
    "decord_version",
    "pyav_version",
    "read_frames",
    "read_video",
]

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"})
MAX_CLIP_BYTES = 4 << 30  # of picked frames as uint8 RGB: 10 minutes of 640x360 at 10 a second, 690 frames of 1080p


@dataclass(frozen=True)
class Clip:
    """Frames picked from a clip: `frames` uint8 [T, 3, H, W] RGB; `fps` and `num_frames` of the file itself;
    `indices` the T picked frame numbers; `decoder` what decoded them, with versions."""

    frames: torch.Tensor
    fps: float
    num_frames: int
    decoder: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Frames:
    """As `Clip`, with the picked frames as arrays uint8 [H, W, 3] by number, each once, and when all are shown."""

    picked: dict[int, np.ndarray]
    timeline: Timeline
    decoder: str
    indices: tuple[int, ...]

    @property
    def fps(self) -> float:
        return self.timeline.fps

    @property
    def num_frames(self) -> int:
        return len(self.timeline.starts)


def read_video(
    source: Source,
    plan: FramePlan | None = None,
    *,
    decoder: Literal["auto", "decord", "pyav"] = "auto",
    max_bytes: int = MAX_CLIP_BYTES,
) -> Clip:
    """Decode the frames that `plan` picks (default: all) to uint8 [T, 3, H, W] RGB, turned upright.

    The whole clip is always decoded (only the picked frames are converted), so that a damaged clip is refused whatever
    the plan, and a plan counts the frames that are really there. `decoder="decord"` gives the same frames or refuses.

    Raises MediaError, naming the file and the remedy, when it is missing, empty, no file or no clip, truncated or
    damaged, without a usable frame rate, of frames below 2 pixels on a side, longer than 100:1, beyond
    `MAX_FRAME_PIXELS` or of several sizes, larger than `max_bytes` once decoded, or when the asked-for decoder is
    absent or would differ.
    """
    import torch

    found = read_frames(source, plan or AllFrames(), decoder=decoder, max_bytes=max_bytes)
    places: dict[int, list[int]] = {}
    for place, index in enumerate(found.indices):
        places.setdefault(index, []).append(place)
    height, width = found.picked[found.indices[0]].shape[:2]
    frames = torch.empty(len(found.indices), 3, height, width, dtype=torch.uint8)
    for index, copies in places.items():
        frames[copies] = torch.from_numpy(found.picked.pop(index)).permute(2, 0, 1)
    return Clip(frames, found.fps, found.num_frames, found.decoder, found.indices)


def read_frames(
    source: Source,
    plan: FramePlan,
    *,
    decoder: Literal["auto", "decord", "pyav"] = "auto",
    max_bytes: int = MAX_CLIP_BYTES,
) -> Frames:
    """As `read_video`, without torch and without a copy for frames that the plan picks twice."""
    if decoder not in ("auto", "decord", "pyav"):
        raise ValueError(f"decoder is 'auto', 'decord' or 'pyav', not {decoder!r}")
    media = _held(source)
    facts = survey(media)
    take, version = _take_pyav, pyav_version()
    if decoder == "decord":
        take, version = _take_decord, _usable_decord(facts, name_of(media))
    times = facts.timeline
    for _ in range(2):  # twice only where packets are not frames: hidden, cut or field-coded pictures
        indices = _asked(plan, times, media)
        picks = _Picks(name_of(media), set(indices), max_bytes)
        picks.refuse_too_many(facts.height, facts.width)
        times = take(media, picks, times)
        if _asked(plan, times, media) == indices:
            break
    return Frames(picks.frames, times, version, indices)


def _asked(plan: FramePlan, times: Timeline, media: Source) -> tuple[int, ...]:
    try:
        return picked(plan, times)
    except ValueError as error:
        raise MediaError(name_of(media), str(error)) from None


def check_video(source: Source) -> None:
    """Decode the whole clip without keeping a frame. MediaError as in `read_video`."""
    media = _held(source)
    _take_pyav(media, _Picks(name_of(media), set(), MAX_CLIP_BYTES), survey(media).timeline)


# ------------------------------------------------------------------------------------------------ for training


def clip_frames(source: Source, *, fps: float | None, frames: int, at: float = 0.0) -> np.ndarray:
    """`frames` frames that play at `fps`, uint8 [frames, H, W, 3] RGB in 0..255, upright.

    Args:
        fps: which frames those are follows from when each is shown, also where the rate varies (`CommonFps`); None
            takes frames in a row, at whatever rate the clip has.
        at: where the part that is taken lies in the clip, from 0 (at its start) to 1 (at its end).

    Raises:
        MediaError: as in `read_video`, and for a clip too short for as many frames. None is padded.
    """
    found = read_frames(source, CommonFps(fps, frames, at))
    return np.stack([found.picked[index] for index in found.indices])


class ClipFacts(NamedTuple):
    """What is known of a clip without decoding it; `fps` is the average by its times, so num_frames / fps is its length
    in seconds. Height and width are those of an upright frame."""

    num_frames: int
    fps: float
    height: int
    width: int

    def frames_at(self, fps: float | None) -> int:
        """How many frames `clip_frames` can give at this rate."""
        return CommonFps(fps, 1).longest(Timeline.regular(self.num_frames, self.fps))


def clip_facts(source: Source) -> ClipFacts:
    """Of the file's headers and packets, and one frame, which alone says how a phone was held.

    MediaError as in `read_video` but for what only decoding shows: damage inside, packets that hold no frame.
    """
    media = _held(source)
    facts = survey(media)
    height, width = _first_size(media)
    return ClipFacts(len(facts.timeline.starts), facts.timeline.rate, height, width)


def _first_size(media: Source) -> tuple[int, int]:
    name = name_of(media)
    with open_clip(media) as container:
        stream = stream_of(container, name)
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        try:
            frame = next(container.decode(stream), None)
        except av.FFmpegError as error:
            message = f"is truncated or damaged at frame 0 ({short(error)}); write it again, or drop the row"
            raise MediaError(name, message) from error
        if frame is None:
            raise MediaError(name, _NOTHING)
        refuse_shape(name, frame.width, frame.height)
        return (frame.width, frame.height) if _turns(frame, name) % 2 else (frame.height, frame.width)


@dataclass(frozen=True)
class _Fetched:
    """Media that does not lie in a file of its own, fetched once though a clip is read through two or three times."""

    name: str
    data: bytes

    def read(self) -> bytes:
        return self.data


def _held(source: Source) -> Source:
    if isinstance(source, str | os.PathLike | bytes) or isinstance(getattr(source, "path", None), Path):
        return source
    return _Fetched(name_of(source), read_bytes(source))


class _Picks:
    """The frames that a plan picks, uint8 [H, W, 3] by their number, of one size and of `max_bytes` together."""

    def __init__(self, name: str, wanted: set[int], max_bytes: int) -> None:
        self.name, self.wanted, self.max_bytes = name, wanted, max_bytes
        self.frames: dict[int, np.ndarray] = {}
        self._size: tuple[int, int] | None = None

    def refuse_too_many(self, height: int, width: int) -> None:
        """MediaError if as many frames of this size need more than `max_bytes`."""
        need = len(self.wanted) * height * width * 3
        if need > self.max_bytes:
            size = f"{len(self.wanted)} frames of {width}x{height} need {need / 2**30:.1f} GiB"
            advice = "pick fewer with a frame plan, or raise max_bytes to score it"
            raise MediaError(self.name, f"{size}, more than max_bytes={self.max_bytes:,}; {advice}")

    def see(self, height: int, width: int) -> None:
        """Every frame is looked at before its pixels are, since a frame may be larger than its container says."""
        if self._size is None:
            refuse_shape(self.name, width, height)
            self.refuse_too_many(height, width)
            self._size = height, width
        if self._size != (height, width):
            raise MediaError(self.name, "changes its frame size half-way; re-encode it at one size")


def pyav_version() -> str:
    """Such as "pyav 18.1.0 / libavcodec 62.28.102"."""
    return f"pyav {av.__version__} / libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"


def decord_version() -> str | None:
    """Such as "decord 0.6.0", without importing it; None where it is not installed."""
    try:
        return f"decord {importlib.metadata.version('decord')}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _take_pyav(media: Source, picks: _Picks, expected: Timeline) -> Timeline:
    """Decode all, convert the picked frames; when the frames that were found are shown."""
    name, count, told = picks.name, 0, []
    with open_clip(media) as container:
        stream = stream_of(container, name)
        stream.thread_type = "SLICE"  # with frames in threads the mark of a damaged one is lost now and then
        # FFmpeg's own limit is that of its arithmetic.
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise MediaError(name, f"frame {count} is damaged; write or download it again, or drop the row")
                picks.see(frame.height, frame.width)
                if count in picks.wanted:
                    picks.frames[count] = _upright(frame, name)
                if frame.pts is not None:
                    told.append((frame.pts, frame.duration))
                count += 1
        except av.FFmpegError as error:
            message = f"is truncated or damaged at frame {count} ({short(error)}); write it again, or drop the row"
            raise MediaError(name, message) from error
    if not count:
        raise MediaError(name, _NOTHING)
    return timeline(told, count, stream.time_base, expected.fps)


_NOTHING = "holds no decodable frame; write or download it again, or drop the row"


def _upright(frame: Any, name: str) -> np.ndarray:
    """uint8 [H, W, 3]. FFmpeg gives the rotation tag in degrees counter-clockwise, and numpy turns that way too."""
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), k=_turns(frame, name)))


def _turns(frame: Any, name: str) -> int:
    """By how many right angles a frame is to be turned."""
    if frame.rotation % 90:
        raise MediaError(name, f"is tagged as turned by {frame.rotation} degrees; re-encode it upright")
    return int(frame.rotation // 90)


_DECORD_CONTAINERS = ("mov", "matroska", "avi")
_DECORD_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "gbrp", "bgr0")


def _usable_decord(facts: Facts, name: str) -> str:
    """decord's version, or a MediaError that says why its frames cannot be had or would not be PyAV's."""
    use = "use decoder='auto'"
    try:
        importlib.import_module("decord")
    except (ImportError, OSError) as error:  # OSError: its shared library does not load
        raise MediaError(name, f"decord cannot be imported ({error}); pip install decord, or {use}") from error
    if facts.pixels not in _DECORD_PIXELS:
        raise MediaError(name, f"decord converts {facts.pixels} differently from PyAV; {use}")
    if not facts.container.startswith(_DECORD_CONTAINERS):
        raise MediaError(name, f"decord loses frames of {facts.container} files; {use}")
    if facts.cut:
        raise MediaError(name, f"decord would show frames that this file cuts away at its ends; {use}")
    return decord_version() or "decord"


def _take_decord(media: Source, picks: _Picks, expected: Timeline) -> Timeline:
    """As `_take_pyav`, with times by the packets.

    In order, never by seeking: after an open GOP decord's random access is off by some frames.
    """
    import decord  # here, since it is optional and brings a second FFmpeg into the process

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(io.BytesIO(read_bytes(media)), num_threads=1)
        for start in range(0, len(reader), 16):
            chunk = range(start, min(start + 16, len(reader)))
            frames = reader.get_batch(chunk).asnumpy()  # .next() gives sheared pictures at widths such as 16 and 48
            picks.see(*frames.shape[1:3])
            picks.frames |= {index: frames[index - start].copy() for index in chunk if index in picks.wanted}
    except (decord.DECORDError, StopIteration, RuntimeError) as error:
        raise MediaError(picks.name, f"decord cannot decode it ({short(error)}); use decoder='auto'") from error
    return expected if len(reader) == len(expected.starts) else Timeline.regular(len(reader), expected.fps)
