"""What a clip's file says before anything is decoded: container, stream, rate, times, and whether it is whole."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.stream import Disposition

from mmalign.frame_plans import Timeline
from mmalign.source import MediaError, Source, contents, head_of, name_of, opened

MAX_FRAME_PIXELS = 1 << 26  # 8192x8192; FFmpeg decodes several frames at once, and an empty one of any size is tiny
SLOWEST, FASTEST = 0.01, 1000  # frames per second; beyond lie damaged time bases
_AGAIN = "it was cut off: write or download it again, or drop the row"


@dataclass(frozen=True)
class Facts:
    """What a file says about its clip before it is decoded; each packet counts as a frame, as it nearly always is."""

    timeline: Timeline
    width: int
    height: int
    pixels: str  # FFmpeg's name of the pixel format
    container: str
    cut: bool  # packets that are decoded but not shown: an edit list, or pictures before the first key frame


# Demuxers that read one file and nothing else. Playlists (HLS, DASH, concat) name further files and addresses, which
# FFmpeg would open: a text called x.mp4 could pull in any clip of this machine. Those of still pictures make up a rate.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"


@contextmanager
def open_clip(media: Source, **options: str) -> Iterator[Any]:
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
            problem = f"is no readable clip, or is truncated ({short(error)}); write it again, or drop the row"
            raise MediaError(name, problem) from error
        with container:
            yield container


def clip_tags(source: Source) -> dict[str, str]:
    """The tags of a clip's container, such as `title` and `comment`, their names in small letters. Nothing is decoded.

    MediaError for what is no readable clip.
    """
    with open_clip(source) as container:
        return {name.lower(): value for name, value in container.metadata.items()}


def short(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]


def stream_of(container: Any, name: str) -> Any:
    """The first video stream that is no cover picture of a piece of music."""
    streams = [each for each in container.streams.video if not each.disposition & Disposition.attached_pic]
    if not streams:
        raise MediaError(name, "holds no video stream; drop the row, or set modality: image if it is a picture")
    return streams[0]


def survey(media: Source) -> Facts:
    """Reads the file through without decoding it. MediaError as `mmalign.video.read_video` raises it."""
    name = name_of(media)
    with open_clip(media) as container:
        stream = stream_of(container, name)
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
            raise MediaError(name, f"is truncated or damaged ({short(error)}); write it again, or drop it") from error
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
        told = sorted((packet.pts, packet.duration) for packet in shown if packet.pts is not None)
        times = timeline(told, len(shown), stream.time_base, float(rate))
        return Facts(times, context.width, context.height, pixels, format_name, cut)


def timeline(told: Sequence[tuple[int, int | None]], count: int, base: Fraction | None, fps: float) -> Timeline:
    """Of `count` frames by what is told of them, (start, duration) in ticks; by the rate where one tells nothing."""
    if base is None or not told or len(told) < count:
        return Timeline.regular(count, fps)
    return Timeline.stated([start for start, _ in told], told[-1][1] or 0, base, fps)


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
    with open_clip(media, ignore_editlist="1") as container:
        return sum(bool(packet.size) for packet in container.demux(stream_of(container, name_of(media))))


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
