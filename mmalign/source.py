"""Where media comes from: paths, bytes, or anything that can hand out its bytes; and the one error they share."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable


class MediaError(ValueError):
    """A file that cannot be used. `source` names it; the message says what is wrong and what to do."""

    def __init__(self, source: str, problem: str) -> None:
        super().__init__(f"{source}: {problem}")
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


def read_bytes(source: Source) -> bytes:
    """The encoded bytes of `source`. MediaError when it is missing, a folder, unreadable or empty."""
    if isinstance(source, bytes):
        data = source
    elif isinstance(source, str | os.PathLike):
        name = str(source)
        try:
            data = Path(source).read_bytes()
        except FileNotFoundError:
            hint = "check the path (in a table, relative paths start at the table's folder)"
            raise MediaError(name, f"no such file; {hint}") from None
        except IsADirectoryError:
            raise MediaError(name, "is a folder; name one file in it") from None
        except OSError as error:
            raise MediaError(name, f"cannot be read ({error.strerror}); check its permissions and disk") from error
    else:
        data = source.read()
    if not data:
        raise MediaError(name_of(source), "is empty (0 bytes); write or download it again, or drop the row")
    return data


def content_hash(source: Source) -> str:
    """sha256 (hex) of the encoded bytes, whatever the file is called. MediaError as in `read_bytes`."""
    return hashlib.sha256(read_bytes(source)).hexdigest()


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
