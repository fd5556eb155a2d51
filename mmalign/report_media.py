"""Thumbnails for the report: small enough that hundreds fit in a page, and never silently missing."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.results import Results

PIXEL_ART = 128  # images up to this size are kept as they are and enlarged without blurring
_CLIPS = frozenset({".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts"})
# (longest side, WebP quality) and (frames, longest side, quality), tried in turn until the limit is met.
_IMAGE_STEPS = ((256, 80), (256, 60), (208, 50), (160, 40), (112, 30))
_CLIP_STEPS = ((8, 160, 50), (6, 144, 35), (4, 128, 30), (3, 112, 20))


@dataclass
class Thumbnail:
    """What a tile shows: a data URI, or why there is none."""

    uri: str | None
    reason: str = ""
    width: int = 1
    height: int = 1
    crisp: bool = False


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

    def of(self, results: Results, row: dict[str, Any]) -> Thumbnail:
        """The thumbnail of a result row's media."""
        key = (results.folder, str(row["media"]))
        if key not in self._made:
            self._made[key] = self._make(results, row)
        return self._made[key]

    def _make(self, results: Results, row: dict[str, Any]) -> Thumbnail:
        from mmalign.media import MediaError

        try:
            source, clip = self._find(results, row)
            return _clip(source, self.limit) if clip else _image(source, self.limit)
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
            if (home / media).is_file():
                return home / media, media.suffix.lower() in _CLIPS
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


def inline(source: Any, side: int, quality: int = 85) -> Thumbnail:
    """A picture of at most `side` pixels for a page on which it has to be judged; a clip becomes a small moving one.

    MediaError if it cannot be read.
    """
    from mmalign.media import is_video, read_image

    if is_video(source):
        return _clip(source, 20 * 14_000)
    image = Image.fromarray(read_image(source))
    if max(image.size) <= PIXEL_ART:
        return _tile(_encode([image], lossless=True), image.size, crisp=True)
    small = _fit(image, side)
    return _tile(_encode([small], quality=quality), small.size)


def _image(source: Any, limit: int) -> Thumbnail:
    from mmalign.media import read_image

    image = Image.fromarray(read_image(source))
    if max(image.size) <= PIXEL_ART:
        data = _encode([image], lossless=True)
        if len(data) <= limit:
            return _tile(data, image.size, crisp=True)
    for side, quality in _IMAGE_STEPS:
        small = _fit(image, side)
        data = _encode([small], quality=quality)
        if len(data) <= limit:
            break
    return _tile(data, small.size)


def _clip(source: Any, limit: int) -> Thumbnail:
    """A few frames as an animated WebP that takes as long as the clip, at most four seconds."""
    from mmalign.media import Uniform
    from mmalign.video import read_video

    for count, side, quality in _CLIP_STEPS:
        clip = read_video(source, Uniform(count))
        frames = [_fit(Image.fromarray(frame.permute(1, 2, 0).numpy()), side) for frame in clip.frames]
        seconds = min(4.0, clip.num_frames / clip.fps) if clip.fps else 1.0
        data = _encode(frames, quality=quality, milliseconds=max(40, round(1000 * seconds / count)))
        if len(data) <= limit:
            break
    return _tile(data, frames[0].size)


def _fit(image: Image.Image, side: int) -> Image.Image:
    scale = min(1.0, side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _encode(
    frames: list[Image.Image], *, quality: int = 80, lossless: bool = False, milliseconds: int | None = None
) -> bytes:
    buffer = io.BytesIO()
    moving: dict[str, Any] = (
        {}
        if milliseconds is None
        else {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
    )
    frames[0].save(buffer, "WEBP", quality=quality, lossless=lossless, method=4, **moving)
    return buffer.getvalue()


def _tile(data: bytes, size: tuple[int, int], crisp: bool = False) -> Thumbnail:
    uri = "data:image/webp;base64," + base64.b64encode(data).decode("ascii")
    return Thumbnail(uri, "", size[0], size[1], crisp)
