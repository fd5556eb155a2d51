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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import av
import numpy as np
from av.stream import Disposition

from mmalign.frame_plans import AllFrames, EveryFps, FramePlan, QwenFps, Uniform
from mmalign.source import (
    MediaError,
    Source,
    contents,
    head_of,
    name_of,
    opened,
    read_bytes,
    refuse_shape,
)

if TYPE_CHECKING:  # imported where it is used: processes that only decode do without it, and start at once
    import torch

__all__ = [
    "MAX_CLIP_BYTES",
    "MAX_FRAME_PIXELS",
    "VIDEO_SUFFIXES",
    "AllFrames",
    "Clip",
    "EveryFps",
    "FramePlan",
    "Frames",
    "QwenFps",
    "Uniform",
    "check_video",
    "decord_version",
    "pyav_version",
    "read_frames",
    "read_video",
]

VIDEO_SUFFIXES = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"})
MAX_FRAME_PIXELS = 1 << 26  # 8192x8192; FFmpeg decodes several frames at once, and an empty one of any size is tiny
MAX_CLIP_BYTES = 4 << 30  # of picked frames as uint8 RGB: 10 minutes of 640x360 at 10 a second, 690 frames of 1080p
SLOWEST, FASTEST = 0.01, 1000  # frames per second; beyond lie damaged time bases


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
    """As `Clip`, with the picked frames as arrays uint8 [H, W, 3] by frame number, each once."""

    picked: dict[int, np.ndarray]
    fps: float
    num_frames: int
    decoder: str
    indices: tuple[int, ...]


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
    facts = _survey(media)
    take, version = _take_pyav, pyav_version()
    if decoder == "decord":
        take, version = _take_decord, _usable_decord(facts, name_of(media))
    count = facts.packets
    for _ in range(2):  # twice only where packets are not frames: hidden, cut or field-coded pictures
        indices = tuple(plan.indices(count, facts.fps))
        picks = _Picks(name_of(media), set(indices), max_bytes)
        picks.refuse_too_many(facts.height, facts.width)
        found = take(media, picks)
        if found == count:
            break
        count = found
    return Frames(picks.frames, facts.fps, count, version, indices)


def check_video(source: Source) -> None:
    """Decode the whole clip without keeping a frame. MediaError as in `read_video`."""
    media = _held(source)
    _survey(media)
    _take_pyav(media, _Picks(name_of(media), set(), MAX_CLIP_BYTES))


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


_AGAIN = "it was cut off: write or download it again, or drop the row"


@dataclass(frozen=True)
class _Facts:
    """What a file says about its clip before anything is decoded."""

    packets: int
    fps: float
    width: int
    height: int
    pixels: str  # FFmpeg's name of the pixel format
    container: str
    cut: bool  # packets that are decoded but not shown: an edit list, or pictures before the first key frame


# Demuxers that read one file and nothing else. Playlists (HLS, DASH, concat) name further files and addresses, which
# FFmpeg would open: a text called x.mp4 could pull in any clip of this machine. Those of still pictures make up a rate.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"


@contextmanager
def _open(media: Source, **options: str) -> Iterator[Any]:
    """The container. MediaError for what is none, with what it is instead where its first bytes tell."""
    name = name_of(media)
    found = contents(head_of(media))
    if found is not None and found.kind != "clip" and found.label != "a GIF image":
        raise MediaError(name, found.instead_of("a clip"))
    with opened(media) as file:
        limits = {"format_whitelist": _CONTAINERS, "protocol_whitelist": ""}
        try:
            container = av.open(file, options=limits | options)
        except (av.FFmpegError, ValueError) as error:
            problem = f"is no readable clip, or is truncated ({_short(error)}); write it again, or drop the row"
            raise MediaError(name, problem) from error
        with container:
            yield container


def clip_tags(source: Source) -> dict[str, str]:
    """The tags of a clip's container, such as `title` and `comment`, their names in small letters. Nothing is decoded.

    MediaError for what is no readable clip.
    """
    with _open(_held(source)) as container:
        return {name.lower(): value for name, value in container.metadata.items()}


def _short(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def _stream(container: Any, name: str) -> Any:
    """The first video stream that is no cover picture of a piece of music."""
    streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError(name, "holds no video stream; drop the row, or set modality: image if it is a picture")
    return streams[0]


def _survey(media: Source) -> _Facts:
    name = name_of(media)
    with _open(media) as container:
        stream = _stream(container, name)
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise MediaError(name, "states no frame rate; re-mux it with one (ffmpeg -r 24 -i in -c copy out)")
        if not SLOWEST <= rate <= FASTEST:
            raise MediaError(
                name, f"states {float(rate):g} frames per second; re-mux it with its own rate (ffmpeg -r 24 -i in ...)"
            )
        context = stream.codec_context
        if context is None:
            raise MediaError(name, "is of no codec that is known here; re-encode it as H.264, or drop the row")
        if context.width * context.height > MAX_FRAME_PIXELS:
            size = f"has frames of {context.width}x{context.height}, more than {MAX_FRAME_PIXELS:,} pixels"
            raise MediaError(name, f"{size}; scale it down (ffmpeg -i in -vf scale=1920:-2 out)")
        try:
            packets, end = _packets(container, stream)
        except av.FFmpegError as error:
            raise MediaError(name, f"is truncated or damaged ({_short(error)}); write it again, or drop it") from error
        if not packets:
            raise MediaError(name, f"holds no frame; {_AGAIN}")
        whole = not any(packet.is_corrupt for packet in packets)
        if not whole or _stored(media, len(packets), stream.frames) < stream.frames:
            raise MediaError(
                name, f"is truncated, {len(packets)} of {stream.frames or 'its'} frames are there; {_AGAIN}"
            )
        if container.format.name.startswith("matroska"):
            _refuse_short(media, container, end, float(rate))
        shown = [packet for packet in packets if not packet.is_discard]
        first = packets[0]
        leading = any(packet.pts is not None and packet.pts < (first.pts or 0) for packet in packets)
        cut = len(shown) != len(packets) or len(packets) < stream.frames or not first.is_keyframe or leading
        pixels, format_name = str(context.pix_fmt), container.format.name
        return _Facts(len(shown), float(rate), context.width, context.height, pixels, format_name, cut)


def _packets(container: Any, stream: Any) -> tuple[list[Any], float]:
    """The clip's packets, in file order, and the time in seconds at which the last packet of any stream ends."""
    packets, end = [], 0.0
    for packet in container.demux():
        if not packet.size:
            continue  # the marker at the end of each stream
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream.index == stream.index:
            packets.append(packet)
    return packets, end


def _stored(media: Source, seen: int, declared: int) -> int:
    """The number of packets in the file, those outside an edit list included (MP4 counts them in what it declares)."""
    if seen >= declared:
        return seen
    with _open(media, ignore_editlist="1") as container:
        return sum(bool(packet.size) for packet in container.demux(_stream(container, name_of(media))))


def _refuse_short(media: Source, container: Any, end: float, fps: float) -> None:
    """FFmpeg reads half of a Matroska file without a word. It declares its length in bytes, and also in seconds."""
    name = name_of(media)
    with opened(media) as file:
        size, declared_size = file.seek(0, io.SEEK_END), _matroska_size(head_of(media))
    if declared_size is not None and size < declared_size:
        raise MediaError(name, f"is truncated, {size:,} of {declared_size:,} bytes are there; {_AGAIN}")
    declared = container.duration / av.time_base if container.duration else 0.0
    slack = max(3 / fps, 0.01 * declared)
    if end < declared - slack:
        raise MediaError(name, f"is truncated, {end:.2f} of {declared:.2f} seconds are there; {_AGAIN}")


def _matroska_size(head: bytes) -> int | None:
    """The bytes that a Matroska file should have: its header and its segment, each an id of four bytes and a size.

    None where the segment has no size, as in what was streamed.
    """

    def length(place: int) -> tuple[int, int | None]:
        """Where the size at `place` ends, and what it is: as many bytes as the first has leading zeros, and one."""
        width = 9 - head[place].bit_length()
        value = int.from_bytes(head[place : place + width]) & ((1 << 7 * width) - 1)
        return place + width, None if value == (1 << 7 * width) - 1 else value

    try:
        place, header = length(4)
        start, segment = length(place + (header or 0) + 4)
    except IndexError:  # a header of another kind
        return None
    return None if segment is None else start + segment


def _take_pyav(media: Source, picks: _Picks) -> int:
    """Decode all, convert the picked frames; the number of frames found."""
    name, count = picks.name, 0
    with _open(media) as container:
        stream = _stream(container, name)
        stream.thread_type = "AUTO"
        # FFmpeg's own limit is that of its arithmetic.
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        try:
            for frame in container.decode(stream):
                if frame.is_corrupt:
                    raise MediaError(name, f"frame {count} is damaged; write or download it again, or drop the row")
                picks.see(frame.height, frame.width)
                if count in picks.wanted:
                    picks.frames[count] = _upright(frame, name)
                count += 1
        except av.FFmpegError as error:
            message = f"is truncated or damaged at frame {count} ({_short(error)}); write it again, or drop the row"
            raise MediaError(name, message) from error
    if not count:
        raise MediaError(name, "holds no decodable frame; write or download it again, or drop the row")
    return count


def _upright(frame: Any, name: str) -> np.ndarray:
    """uint8 [H, W, 3]. FFmpeg gives the rotation tag in degrees counter-clockwise, and numpy turns that way too."""
    if frame.rotation % 90:
        raise MediaError(name, f"is tagged as turned by {frame.rotation} degrees; re-encode it upright")
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90))


_DECORD_CONTAINERS = ("mov", "matroska", "avi")
_DECORD_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p", "gbrp", "bgr0")


def _usable_decord(facts: _Facts, name: str) -> str:
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


def _take_decord(media: Source, picks: _Picks) -> int:
    """As `_take_pyav`. In order, never by seeking: after an open GOP decord's random access is off by some frames."""
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
        raise MediaError(picks.name, f"decord cannot decode it ({_short(error)}); use decoder='auto'") from error
    return len(reader)
