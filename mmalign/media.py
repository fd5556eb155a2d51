"""Decode and encode images and clips: one behaviour, declared, on every machine.

Everything is 8-bit RGB. What is done to a file that is something else is part of the contract, since a score depends
on it: EXIF orientation is applied (EXIF that cannot be read counts as none); transparency is composited over white
(what a viewer shows); CMYK and palettes are converted by Pillow without colour management; of deeper samples the high
byte is kept; of an animated image the first frame is read. ICC profiles are ignored, as every published scorer ignores
them.

Clips are in `mmalign.video` and `mmalign.video_writer`, sources in `mmalign.source`; import all of it from here.
"""

from __future__ import annotations

import importlib.metadata
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError, features

from mmalign.source import (
    MIN_SIDE,
    MediaError,
    Readable,
    Source,
    content_hash,
    contents,
    head_of,
    name_of,
    opened,
    read_bytes,
    refuse_shape,
    whole_file,
)
from mmalign.video import (
    VIDEO_SUFFIXES,
    AllFrames,
    Clip,
    ClipFacts,
    CommonFps,
    EveryFps,
    FramePlan,
    Middle,
    QwenFps,
    Starts,
    StrideFps,
    Uniform,
    check_video,
    clip_facts,
    clip_frames,
    decord_version,
    pyav_version,
    read_video,
)
from mmalign.video_writer import write_video

__all__ = [
    "IMAGE_SUFFIXES",
    "VIDEO_SUFFIXES",
    "AllFrames",
    "Clip",
    "ClipFacts",
    "CommonFps",
    "EveryFps",
    "FramePlan",
    "MediaError",
    "Middle",
    "QwenFps",
    "Readable",
    "Source",
    "Starts",
    "StrideFps",
    "Uniform",
    "check_media",
    "clip_facts",
    "clip_frames",
    "content_hash",
    "decoder_fingerprint",
    "image_size",
    "image_text",
    "is_video",
    "read_bytes",
    "read_image",
    "read_video",
    "write_image",
    "write_video",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"})
# Only formats that Pillow decodes in process: EPS, for one, would start Ghostscript on a stranger's file.
Image.init()
# What Pillow warns of without naming a file (odd EXIF, tags cut off) either does not matter or is a row's reason.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
_PIL_FORMATS: list[str] = [
    name
    for name in ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
    if name in Image.OPEN
]
MAX_PIXELS = 100_000_000
"""Of an image; Pillow needs up to 8 bytes for each while it decodes. A header can announce far more in 100 bytes."""
MAX_IMAGE_BYTES = 1 << 30
LARGE = 1 << 24  # pixels from which images are decoded one after the other, however many threads there are
_STRIP = 1 << 22  # pixels that are converted at a time
_OPEN_LOCK, _ONE_AT_A_TIME = threading.Lock(), threading.Lock()


def decoder_fingerprint() -> str:
    """Every decoder whose version can change a pixel, in one line: written into each result."""
    codecs = [
        f"{name} {features.version(name)}" for name in ("libjpeg_turbo", "webp", "zlib") if features.version(name)
    ]
    pillow = f"pillow {importlib.metadata.version('pillow')} ({', '.join(codecs)})"
    return f"{pillow}; {pyav_version()}; {decord_version() or 'decord absent'}"


def read_image(source: Source, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> np.ndarray:
    """Decode one image to uint8 [H, W, 3] RGB in 0..255 (the module's docstring says how each kind is converted).

    Raises MediaError, naming the file and the remedy, when it is missing, empty, no file or no image, truncated, not
    what its own checksums say, smaller than `min_side` on a side, longer than 100:1, larger than `max_pixels` (checked
    on the header, before anything is decoded), or of a kind that has no agreed 8-bit range.
    """
    name = name_of(source)
    with opened(source, MAX_IMAGE_BYTES) as file:
        try:
            with _open_image(file) as image:
                _check_size(image, name, max_pixels, min_side)
                with _ONE_AT_A_TIME if math.prod(image.size) > LARGE else nullcontext():
                    pixels = _to_rgb(image, name)
            _check_whole(file, image.format or "")
            return pixels
        except MediaError:
            raise
        except UnidentifiedImageError:
            raise MediaError(name, _not_an_image(head_of(source))) from None
        except Exception as error:  # hostile bytes make decoders raise nearly anything, and each means the same here
            raise MediaError(
                name, f"is truncated or damaged ({error}); write or download it again, or drop the row"
            ) from error


def _check_size(image: Image.Image, name: str, max_pixels: int, min_side: int) -> None:
    width, height = image.size
    refuse_shape(name, width, height, min_side)
    tags = getattr(image, "tag_v2", {})  # a TIFF's tiles may be larger than its picture, and are decoded whole
    tile = math.prod(side for tag in (322, 323) if isinstance(side := tags.get(tag, 0), int))
    if max(width * height, tile) > max_pixels:
        size = (
            f"has {width}x{height} = {width * height:,} pixels"
            if tile <= max_pixels
            else f"has tiles of {tile:,} pixels"
        )
        raise MediaError(
            name, f"{size}, more than max_pixels={max_pixels:,}; resize it, or raise max_pixels to score it"
        )


def _check_whole(file: BinaryIO, format: str) -> None:
    """What Pillow's decoders leave out: the checksums and the end of a PNG, the end of a JPEG 2000.

    Without it flipped bits in a PNG give other pixels, and a JPEG 2000 cut off after its header a black picture.
    """
    file.seek(0)
    if format == "PNG":
        with _open_image(file) as image:
            image.verify()
    elif format == "JPEG2000" and b"\xff\xd9" not in file.read():
        raise ValueError("the end of the codestream is missing")


def image_size(source: Source) -> tuple[int, int]:
    """Height and width of the image that `read_image` gives, read from the header: no pixel is decoded.

    Only an orientation that a PNG states behind its pixels, where few programs look, is not seen. MediaError as in
    `read_image` for what has no header that can be read.
    """
    with opened(source, MAX_IMAGE_BYTES) as file:
        try:
            with _open_image(file) as image:
                width, height = image.size
                # The base class's own, since that of a PNG decodes the picture to look behind its pixels. Of a TIFF
                # Pillow gives the size as turned already.
                turned = image.format != "TIFF" and _orientation(partial(Image.Image.getexif, image)) >= 5
        except Exception:  # it says what is wrong, or reads after all what it can
            height, width = read_image(source).shape[:2]
            turned = False
    return (width, height) if turned else (height, width)


@contextmanager
def _open_image(file: BinaryIO) -> Iterator[Image.Image]:
    """Open lazily with Pillow's own size guard off: it is a process-wide constant that warns or raises as it likes,
    and `max_pixels` above is checked before any pixel is decoded. The lock keeps threads from restoring it early."""
    with _OPEN_LOCK:
        guard, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file, formats=_PIL_FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = guard
    with image:
        yield image


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    """uint8 [H, W, 3], upright. Converted strip by strip, so that a large picture is not held several times over."""
    image.load()  # an animated file stays on its first frame
    convert = _sixteen_bits if _is_sixteen_bits(image) else _eight_bits
    if image.mode in {"I", "F"} and convert is _eight_bits:
        raise MediaError(
            name, f"holds signed or 32-bit samples (mode {image.mode}) with no agreed range; save it as 8 or 16 bit"
        )
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP // width)
    for top in range(0, height, rows):
        box = (0, top, width, min(top + rows, height))
        pixels[top : top + rows] = convert(image if rows >= height else image.crop(box), image)
    return np.ascontiguousarray(_TURNS[_orientation(image.getexif)](pixels))


def _eight_bits(strip: Image.Image, image: Image.Image) -> np.ndarray:
    if strip.has_transparency_data:
        layer = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


def _is_sixteen_bits(image: Image.Image) -> bool:
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in {"PNG", "PPM"})


def _sixteen_bits(strip: Image.Image, image: Image.Image) -> np.ndarray:
    """Grey samples by their high byte; a TIFF says how deep they are and which end is white, a PNG what is clear."""
    samples, tags = np.asarray(strip).astype(np.uint32), getattr(image, "tag_v2", {})
    depth = tags.get(258, (16,))[0]
    grey = (samples >> (depth - 8)).clip(0, 255).astype(np.uint8)
    if tags.get(262) == 0:  # white is zero
        grey = 255 - grey
    if isinstance(key := image.info.get("transparency"), int):
        grey[samples == key] = 255
    return np.repeat(grey[:, :, None], 3, axis=2)


_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, k=-1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, k=1),
}
"""EXIF orientation -> what makes the picture upright."""


def _orientation(exif: Callable[[], Image.Exif]) -> int:
    """1 to 8. Another number, or EXIF that cannot be read, says nothing: viewers show such a picture as it lies."""
    try:
        value = exif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's parser raises whatever the bytes lead it to
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _not_an_image(head: bytes) -> str:
    content = contents(head)
    if content is None:
        return f"is no image in a known format ({', '.join(_PIL_FORMATS)}); convert it to PNG or JPEG"
    if content.kind != "image":
        return content.instead_of("an image")
    if content.label in ("a HEIC image", "a HEIF image"):
        return f"holds {content.label}, which is not read; convert it to PNG or JPEG"
    return "is truncated or damaged in its header, or of a rare kind; write it again as PNG or JPEG, or drop the row"


def image_text(source: Source) -> dict[str, str]:
    """The texts that a PNG has before its pixels, by their keywords; none for other images. No pixel is decoded.

    MediaError as in `read_image` for what has no header that can be read.
    """
    with opened(source, MAX_IMAGE_BYTES) as file:
        try:
            with _open_image(file) as image:
                held = image.info if image.format == "PNG" else {}
                return {str(key): str(value) for key, value in held.items() if isinstance(value, str)}
        except UnidentifiedImageError:
            raise MediaError(name_of(source), _not_an_image(head_of(source))) from None
        except Exception as error:  # as in `read_image`
            problem = f"is damaged in its header ({error}); write or download it again"
            raise MediaError(name_of(source), problem) from error


def write_image(path: str | Path, image: np.ndarray, text: Mapping[str, str] | None = None) -> None:
    """Write uint8 [H, W, 3] RGB as .png or .webp (both lossless) or .jpg (quality 95, no chroma subsampling).

    `text` becomes a PNG's text chunks, by keyword; the pixels are encoded as without. The file appears whole or not at
    all. ValueError for another dtype, shape or suffix, or text for what is no PNG.
    """
    path = Path(path)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"write_image takes uint8 [H, W, 3], got {image.dtype} {list(image.shape)}; scale to 0..255 first"
        )
    options: dict[str, dict[str, Any]] = {
        ".png": {"format": "PNG"},
        ".webp": {"format": "WEBP", "lossless": True, "exact": True},
        ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    }
    options[".jpeg"] = options[".jpg"]
    if path.suffix.lower() not in options:
        raise ValueError(f"{path}: cannot write {path.suffix or 'a file without suffix'!r}; use .png, .webp or .jpg")
    if text:
        if path.suffix.lower() != ".png":
            raise ValueError(f"{path}: text is kept in PNG alone; use .png")
        chunks = PngImagePlugin.PngInfo()
        for keyword, value in text.items():
            chunks.add_text(keyword, value)
        options[".png"]["pnginfo"] = chunks
    with whole_file(path) as temporary:
        Image.fromarray(np.ascontiguousarray(image)).save(temporary, **options[path.suffix.lower()])


def check_media(source: Source) -> None:
    """Decode `source` fully and throw the pixels away: MediaError if it cannot be used."""
    if is_video(source):
        check_video(source)
    else:
        read_image(source)


def is_video(source: Source) -> bool:
    """Whether `source` is a clip: by its suffix if it has a known one, else by its first bytes."""
    suffix = Path(name_of(source)).suffix.lower()
    if suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES:
        return suffix in VIDEO_SUFFIXES
    content = contents(head_of(source))
    return content is not None and content.kind == "clip"
