"""Where media comes from: paths, bytes, or anything that can hand out its bytes; and the one error they share."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, runtime_checkable

MIN_SIDE = 2  # pixels
MAX_ASPECT = 100  # of the longer side to the other; scorers that resize the shorter one blow a strip up without end
MAX_FILE_BYTES = 8 << 30  # a file that only claims to be larger (a hole on disk) would be hashed for hours


class MediaError(ValueError):
    """A file that cannot be used. `source` names it; the message says what is wrong and what to do."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{shown(source)}: {problem}")
        self.source = source
        self.problem = problem


@runtime_checkable
class Readable(Protocol):
    """Anything that can hand out its bytes, such as `mmalign.tables.MediaRef`."""

    @property
    def name(self) -> str: ...

    def read(self) -> bytes: ...


Source = str | Path | bytes | Readable


def name_of(source: Source) -> str:
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    return str(source) if isinstance(source, str | os.PathLike) else source.name


def shown(text: str) -> str:
    r"""`text` for one line of a message: what does not print (line breaks, escape sequences, direction marks, lone
    surrogates) becomes an escape such as ``\n``, so that a file's name can neither break a log nor pose as another."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def well_formed(text: str) -> str:
    r"""`text` itself, or with its lone surrogates as escapes (``\udcff``), so that UTF-8, and so parquet, can hold it.

    They come from JSON's ``\ud800`` and from names of files that are no UTF-8.
    """
    return text.encode("utf-8", "backslashreplace").decode()


def refuse_shape(name: str, width: int, height: int, min_side: int = MIN_SIDE) -> None:
    """MediaError for a picture or frame below `min_side` pixels on a side, or longer than `MAX_ASPECT`."""
    short, long = sorted((width, height))
    if short < min_side:
        raise MediaError(name, f"is {width}x{height} pixels, below min_side={min_side}; replace it or drop the row")
    if long > MAX_ASPECT * short:
        raise MediaError(name, f"is a strip of {width}x{height} pixels, longer than {MAX_ASPECT}:1; crop it")


_ADVICE = {
    errno.EACCES: "check its permissions",
    errno.ELOOP: "it is a link that leads back to itself; point it at the file",
    errno.ENAMETOOLONG: "shorten the path",
}


def open_file(path: str | os.PathLike[str], max_bytes: int = MAX_FILE_BYTES) -> BinaryIO:
    """A file of media, opened for reading.

    MediaError when it is missing, a folder, a pipe or device (which would block, or never end), unreadable, empty, or
    larger than `max_bytes`.
    """
    name = str(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise MediaError(name, "is a folder; name one file in it")
        if not stat.S_ISREG(status.st_mode):
            raise MediaError(name, "is a pipe, socket or device, not a file; copy what it holds into a file")
        if status.st_size > max_bytes:
            unit, called = (1 << 30, "GiB") if max_bytes >= 1 << 30 else (1 << 20, "MiB")
            size = f"{status.st_size / unit:,.1f} {called}, more than {max_bytes / unit:g}"
            raise MediaError(name, f"is a file of {size}; cut or compress it")
        if not status.st_size:
            raise MediaError(name, "is empty (0 bytes); write or download it again, or drop the row")
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        hint = "check the path (in a table, relative paths start at the table's folder)"
        raise MediaError(name, f"no such file; {hint}") from None
    except OSError as error:
        raise _unreadable(name, error) from error
    except MediaError:
        raise
    except ValueError as error:  # a NUL, or half a surrogate pair
        raise MediaError(name, f"is no path that a file can have ({error}); mend the table") from error


def _unreadable(name: str, error: OSError) -> MediaError:
    advice = _ADVICE.get(error.errno or 0, "check the file and its disk")
    return MediaError(name, f"cannot be read ({error.strerror}); {advice}")


def opened(source: Source, max_bytes: int = MAX_FILE_BYTES) -> BinaryIO:
    """The encoded bytes of `source` as a file that can seek; one on disk stays there. MediaError as in `open_file`."""
    if isinstance(source, str | os.PathLike):
        return open_file(source, max_bytes)
    path = getattr(source, "path", None)
    if isinstance(path, Path):
        return open_file(path, max_bytes)
    data = source if isinstance(source, bytes) else source.read()
    if not data:
        raise MediaError(name_of(source), "is empty (0 bytes); write or download it again, or drop the row")
    return io.BytesIO(data)


def read_bytes(source: Source, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The encoded bytes of `source`. MediaError as in `open_file`."""
    if isinstance(source, bytes) and source:
        return source
    with opened(source, max_bytes) as file:
        try:
            return file.read()
        except OSError as error:
            raise _unreadable(name_of(source), error) from error


def content_hash(source: Source) -> str:
    """sha256 (hex) of the encoded bytes, whatever the file is called. MediaError as in `open_file`."""
    file: Any
    with opened(source) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(name_of(source), error) from error


# ------------------------------------------------------------------------------------------------ what bytes are


@dataclass(frozen=True)
class Content:
    """What a file's first bytes say that it is, whatever its name says.

    Attributes:
        kind: image, clip, archive, document or text.
        label: for messages, such as "a PNG image".
        start: how a text begins.
    """

    kind: Literal["image", "clip", "archive", "document", "text"]
    label: str
    start: str = ""

    def instead_of(self, wanted: Literal["an image", "a clip"]) -> str:
        """What is wrong with a file of this kind where another was wanted, and what to do."""
        found = f"holds {self.label}, not {wanted}"
        match self.kind:
            case "text":
                return f"{found} (it begins {self.start!r}); often a saved error page: download it again"
            case "archive":
                return f"{found}; unpack it and name the files inside"
            case "document":
                return f"{found}; save its pictures as PNG or JPEG"
            case _:
                return f"{found}; set modality: {'video' if self.kind == 'clip' else 'image'} for this row"


_SIGNATURES: tuple[tuple[int, bytes, Content], ...] = (
    (0, b"\x89PNG", Content("image", "a PNG image")),
    (0, b"\xff\xd8\xff", Content("image", "a JPEG image")),
    (0, b"GIF8", Content("image", "a GIF image")),
    (0, b"II*\0", Content("image", "a TIFF image")),
    (0, b"MM\0*", Content("image", "a TIFF image")),
    (0, b"II+\0", Content("image", "a TIFF image")),
    (0, b"MM\0+", Content("image", "a TIFF image")),
    (0, b"\0\0\0\x0cjP  ", Content("image", "a JPEG 2000 image")),
    (0, b"\xff\x4f\xff\x51", Content("image", "a JPEG 2000 image")),
    (8, b"WEBP", Content("image", "a WebP image")),
    (8, b"AVI ", Content("clip", "an AVI clip")),
    (0, b"\x1aE\xdf\xa3", Content("clip", "a Matroska or WebM clip")),
    (0, b"\0\0\x01\xba", Content("clip", "an MPEG clip")),
    (0, b"PK\x03\x04", Content("archive", "a zip archive")),
    (0, b"PK\x05\x06", Content("archive", "a zip archive")),
    (257, b"ustar", Content("archive", "a tar archive")),
    (0, b"\x1f\x8b", Content("archive", "gzip-compressed data")),
    (0, b"BZh", Content("archive", "bzip2-compressed data")),
    (0, b"\xfd7zXZ\0", Content("archive", "xz-compressed data")),
    (0, b"7z\xbc\xaf\x27\x1c", Content("archive", "a 7z archive")),
    (0, b"Rar!", Content("archive", "a RAR archive")),
    (0, b"(\xb5/\xfd", Content("archive", "zstd-compressed data")),
    (0, b"%PDF", Content("document", "a PDF document")),
)
_STILL_BRANDS = {b"avif": "an AVIF image", b"heic": "a HEIC image", b"heix": "a HEIC image", b"mif1": "a HEIF image"}
HEAD = 512  # bytes that `contents` wants to see


def head_of(source: Source) -> bytes:
    """The first `HEAD` bytes. MediaError as in `open_file`."""
    with opened(source) as file:
        try:
            return file.read(HEAD)
        except OSError as error:
            raise _unreadable(name_of(source), error) from error


def contents(head: bytes) -> Content | None:
    """What the first `HEAD` bytes of a file belong to; None where they say nothing."""
    if head[4:8] == b"ftyp":
        brand = bytes(head[8:12])
        still = _STILL_BRANDS.get(brand)
        return Content("image", still) if still else Content("clip", "an MP4 or QuickTime clip")
    for offset, magic, content in _SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return content
    if head[:2] == b"BM" and head[6:10] == bytes(4):  # two letters alone begin many a text
        return Content("image", "a BMP image")
    if len(head) > 188 and head[0] == head[188] == 0x47:
        return Content("clip", "an MPEG-TS clip")
    start = _text(head)
    return Content("text", "text", start) if start else None


def _text(head: bytes) -> str:
    """The beginning of what is text, at most 40 letters; empty if it is none."""
    if b"\0" in head:
        return ""
    try:
        start = head.decode("utf-8-sig").strip()[:40]
    except UnicodeDecodeError as error:
        if error.start < HEAD - 3:  # otherwise it is a letter that `HEAD` cuts in two
            return ""
        start = head[: error.start].decode("utf-8-sig").strip()[:40]
    return start if "".join(start.split()).isprintable() else ""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
