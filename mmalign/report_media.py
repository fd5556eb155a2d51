"""What the pages show: thumbnails, small enough that hundreds fit in one and never silently missing; and scripts."""

from __future__ import annotations

import base64
import hashlib
import io
import tempfile
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from PIL import Image

from mmalign.frame_plans import CommonFps, Timeline, Uniform
from mmalign.results import Results

if TYPE_CHECKING:
    from mmalign.video import Frames

PIXEL_ART = 128  # images up to this size are kept as they are and enlarged without blurring
_CLIPS = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"})
# (longest side, WebP quality) and (share of the longest side, CRF), tried in turn until the limit is met.
_IMAGE_STEPS = ((256, 80), (256, 60), (208, 50), (160, 40), (112, 30))
_CLIP_STEPS = ((1.0, 18), (1.0, 26), (0.83, 31), (0.7, 36), (0.6, 42))
_CLIP_SIDE, _CLIP_FRAMES = 192, 48
# Of clips that have to be judged: frames per second and frames at most, CRFs in turn, and the limit of bytes.
_JUDGED_FPS, _JUDGED_FRAMES, _JUDGED_CRFS, _JUDGED_BYTES = 30, 240, (18, 23, 28), 3_000_000


@dataclass
class Thumbnail:
    """What a tile shows: a picture (of a clip the first frame) as a data URI, or why there is none; and the clip."""

    uri: str | None
    reason: str = ""
    width: int = 1
    height: int = 1
    crisp: bool = False
    video: str | None = None


@dataclass
class Thumbnails:
    """Makes and remembers thumbnails, and counts the media that could not be shown.

    Args:
        limit: bytes per thumbnail to aim at; the last step of quality is taken as it comes.
    """

    limit: int = 14_000
    failures: dict[str, str] = field(default_factory=dict)
    _made: dict[tuple[Path, str], Thumbnail] = field(default_factory=dict)
    _tables: dict[Path, dict[str, Any]] = field(default_factory=dict)

    @property
    def shown(self) -> int:
        """How many different media were asked for, those that failed among them."""
        return len(self._made)

    @property
    def clips(self) -> bool:
        """Whether any of them is a clip."""
        return any(made.video for made in self._made.values())

    def of(self, results: Results, row: dict[str, Any]) -> Thumbnail:
        """The thumbnail of a result row's media."""
        key = (results.folder, str(row["media"]))
        if key not in self._made:
            self._made[key] = self._make(results, row)
        return self._made[key]

    def _make(self, results: Results, row: dict[str, Any]) -> Thumbnail:
        from mmalign.media import MediaError

        if not row["media"]:
            return Thumbnail(None, "a row without media")
        try:
            source, clip = self._find(results, row)
            return thumbnail(source, clip, self.limit)
        except MediaError as error:
            self.failures[str(row["media"])] = str(error)
            return Thumbnail(None, str(error))

    def _find(self, results: Results, row: dict[str, Any]) -> tuple[Any, bool]:
        """Where the media is (a file, or bytes in the table that was scored), and whether it is a clip."""
        media = Path(str(row["media"]))
        config = results.run.get("config")
        table = Path(config["table"]) if isinstance(config, dict) and config.get("table") else None
        homes = [Path(), results.folder] + ([table if table.is_dir() else table.parent] if table else [])
        for home in homes:
            if (home / media).is_file() and media.suffix.lower() in _CLIPS:
                return home / media, True
            if (home / media).is_file() or (home / media).is_dir():
                return home / media, row.get("modality") == "video"
        if table is not None and table.exists():
            item = self._rows(table).get(str(row["sample"]))
            if item is not None:
                return item.media, item.modality == "video"
        return media, False

    def _rows(self, table: Path) -> dict[str, Any]:
        if table not in self._tables:
            from mmalign.tables import read_media_table

            self._tables[table] = {row.sample: row for row in read_media_table(table)}
        return self._tables[table]


def script(*names: str) -> tuple[Markup, str]:
    """Scripts of this package as one, and the source under which a content security policy lets it run."""
    text = "".join(files("mmalign").joinpath(name).read_text(encoding="utf-8") for name in names)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(text), f"sha256-{digest}"


def thumbnail(source: Any, clip: bool, limit: int) -> Thumbnail:
    """A picture or clip in some `limit` bytes. MediaError if it cannot be read."""
    return _clip(source, limit) if clip else _image(source, limit)


def inline(source: Any, side: int, quality: int = 85) -> Thumbnail:
    """A picture or clip of at most `side` pixels for a page on which it has to be judged. MediaError if unreadable.

    A clip has all its frames, so that its motion can be seen: at its own rate, one of variable rate as it plays at 30
    frames per second, no faster than that, and of more than 240 frames so many evenly.
    """
    from mmalign.media import is_video, read_image

    if is_video(source):
        return _judged_clip(source, side)
    image = Image.fromarray(read_image(source))
    if max(image.size) <= PIXEL_ART:
        return _tile(_encode(image, lossless=True), image.size, crisp=True)
    small = _fit(image, side)
    return _tile(_encode(small, quality=quality), small.size)


@dataclass(frozen=True)
class _Played:
    """Frame plan: a clip as it plays on the page."""

    def rate(self, timeline: Timeline) -> float:
        own = float(_JUDGED_FPS) if timeline.variable else timeline.rate
        return min(own, _JUDGED_FPS, _JUDGED_FRAMES / max(float(timeline.end), 0.001))

    def on(self, timeline: Timeline) -> list[int]:
        rate = self.rate(timeline)
        return CommonFps(rate, CommonFps(rate, 1).longest(timeline)).on(timeline)


@dataclass(frozen=True)
class _AtMost:
    """Frame plan: so many frames evenly, of a shorter clip all."""

    n: int

    def indices(self, num_frames: int, fps: float) -> list[int]:
        return Uniform(min(self.n, num_frames)).indices(num_frames, fps)


def _frames(source: Any, plan: Any) -> Frames:
    from mmalign.stills import are_stills, read_stills
    from mmalign.video import read_frames

    return read_stills(source, plan) if are_stills(source) else read_frames(source, plan)


def _judged_clip(source: Any, side: int) -> Thumbnail:
    plan = _Played()
    found = _frames(source, plan)
    small = {index: _even(Image.fromarray(pixels), side) for index, pixels in found.picked.items()}
    frames, rate = [small[index] for index in found.indices], plan.rate(found.timeline)
    crisp = max(frames[0].size) <= PIXEL_ART
    data = b""
    for crf in _JUDGED_CRFS:
        data = _mp4(frames, rate, crf)
        if len(data) <= _JUDGED_BYTES:
            break
    return _with_clip(_tile(_encode(frames[0], quality=60, lossless=crisp), frames[0].size, crisp), data)


def _image(source: Any, limit: int) -> Thumbnail:
    from mmalign.media import read_image

    image = Image.fromarray(read_image(source))
    if max(image.size) <= PIXEL_ART:
        data = _encode(image, lossless=True)
        if len(data) <= limit:
            return _tile(data, image.size, crisp=True)
    for side, quality in _IMAGE_STEPS:
        small = _fit(image, side)
        data = _encode(small, quality=quality)
        if len(data) <= limit:
            break
    return _tile(data, small.size)


def _clip(source: Any, limit: int, side: int = _CLIP_SIDE) -> Thumbnail:
    """A small H.264 clip that takes as long as the real one, and its first frame; it has no sound and no tags."""
    found = _frames(source, _AtMost(_CLIP_FRAMES))
    frames = [Image.fromarray(found.picked[index]) for index in found.indices]
    rate = min(60.0, max(0.1, found.fps * len(frames) / found.num_frames))
    crisp = max(frames[0].size) <= PIXEL_ART
    for share, crf in _CLIP_STEPS:
        small = [_even(frame, max(side if crisp else 64, round(share * side))) for frame in frames]
        poster, data = _encode(small[0], quality=60, lossless=crisp), _mp4(small, rate, crf)
        if len(poster) + len(data) <= limit:
            break
    return _with_clip(_tile(poster, small[0].size, crisp), data)


def _with_clip(tile: Thumbnail, data: bytes) -> Thumbnail:
    tile.video = "data:video/mp4;base64," + base64.b64encode(data).decode("ascii")
    return tile


def _even(image: Image.Image, side: int) -> Image.Image:
    """At most `side` long and even on both sides, as 4:2:0 wants, which every browser plays."""
    width, height = (max(2, length - length % 2) for length in _fit(image, side).size)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def _mp4(frames: list[Image.Image], rate: float, crf: int) -> bytes:
    import numpy as np
    import torch

    from mmalign.media import write_video

    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        write_video(path, pixels, rate, crf=crf)
        return path.read_bytes()


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = min(1.0, side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _encode(image: Image.Image, *, quality: int = 80, lossless: bool = False) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, lossless=lossless, method=4)
    return buffer.getvalue()


def _tile(data: bytes, size: tuple[int, int], crisp: bool = False) -> Thumbnail:
    uri = "data:image/webp;base64," + base64.b64encode(data).decode("ascii")
    return Thumbnail(uri, "", size[0], size[1], crisp)
