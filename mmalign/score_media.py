"""What media hold, by their sha256: hashed in threads, and remembered from run to run while the files stay as they are.

A score's key has the content of its media, so every run and every ``--dry-run`` needs all digests. They are kept in the
cache (`mmalign.cache`), an entry for each table, and a digest is taken from there only for a file of the same path,
inode, size and time stamps. Nothing but time is lost with the entry: a damaged one is deleted, of two runs that write
at once the last one's stays, and `mmalign cache clear digests` is always safe.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from mmalign.cache import Cache
from mmalign.media import MediaError, content_hash
from mmalign.progress import Progress
from mmalign.records import MediaRef
from mmalign.stills import folder_hash

__all__ = ["media_hashes"]

_log = logging.getLogger(__name__)

KIND = "digests"
SETTLED_NS = 2_000_000_000
"""A file that changed this shortly before it was hashed may change again without its time stamp showing it: file
systems count in steps of up to 2 s. Its digest is not remembered."""
SAVE_SECONDS, CHUNK = 60.0, 4096
THREADS = min(32, 4 + 2 * (os.cpu_count() or 1))  # hashing takes cores, and waiting for a network's disk takes none
Stamp = tuple[int, int, int, int]
INODE = (1 << 63) - 1  # some file systems count to 2**64, and a tensor of int64 does not
Known = dict[str, tuple[Stamp, str]]


def media_hashes(sources: Iterable[str | MediaRef], table: str | Path) -> dict[str | MediaRef, str | MediaError]:
    """The sha256 (hex) of each medium's encoded bytes; or why it cannot be read.

    Args:
        table: whose media they are, by which their digests are remembered.
    """
    distinct = list(dict.fromkeys(sources))
    memory = _Memory(table, {_name(source) for source in distinct})
    known: Known = {}
    found: dict[str | MediaRef, str | MediaError] = {}
    with (
        ThreadPoolExecutor(THREADS, thread_name_prefix="hash") as pool,
        Progress("hashing media", len(distinct)) as bar,
    ):
        try:
            for start in range(0, len(distinct), CHUNK):
                part = distinct[start : start + CHUNK]
                for source, (digest, stamp) in zip(part, pool.map(memory.hash, part), strict=True):
                    found[source] = digest
                    if stamp is not None and isinstance(digest, str):
                        known[_name(source)] = stamp, digest
                    bar.update(len(found))
                memory.keep(known)
        finally:  # also of a run that is interrupted
            pool.shutdown(cancel_futures=True)
            memory.keep(known, last=True)
    return found


def _stamp(source: str | MediaRef) -> Stamp | None:
    """Inode, size, and when content and inode changed: the former can be set to what it was, the latter cannot.

    The inode tells files apart that were written within one tick of the file system's clock: a link or a folder's name
    may come to mean another of them, which changes no stamp of theirs.
    """
    try:
        status = os.stat(source if isinstance(source, str) else source.file)
    except (OSError, ValueError):
        return None  # reading it says why
    return status.st_ino & INODE, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _name(source: str | MediaRef) -> str:
    if isinstance(source, str):
        return os.path.abspath(source)
    cell = [str(part) for part in (source.row, source.column, source.item) if part is not None]
    return "\n".join([os.path.abspath(source.file), *cell])


# ------------------------------------------------------------------------------------------------ remembered


class _Memory:
    """What earlier runs found of a table's media, and what this one adds."""

    def __init__(self, table: str | Path, names: set[str]) -> None:
        self._table = os.path.abspath(table)
        self._cache: Cache | None = None
        self._before: Known = {}
        self._saved = time.monotonic()
        try:
            self._cache = Cache()
            held = self._read(self._cache)
            self._before = {name: entry for name, entry in held.items() if name in names}
        except (OSError, RuntimeError) as error:  # a disk's; no home folder
            _log.warning("digests of media from earlier runs cannot be read, so all are hashed anew (%s)", error)

    def hash(self, source: str | MediaRef) -> tuple[str | MediaError, Stamp | None]:
        """The digest, and the file's stamp if both may be remembered."""
        now, stamp = time.time_ns(), _stamp(source)
        remembered = self._before.get(_name(source))
        if stamp is not None and remembered is not None and remembered[0] == stamp:
            return remembered[1], stamp
        try:
            if isinstance(source, str) and os.path.isdir(source):
                return folder_hash(source), None  # whose stamps do not show what changes in the frames
            digest = content_hash(source)
        except MediaError as error:
            return error, None
        settled = stamp is not None and now - max(stamp[2:]) >= SETTLED_NS and stamp == _stamp(source)
        return digest, stamp if settled else None

    def keep(self, known: Known, last: bool = False) -> None:
        """Keep these for the next run, now and then and at the `last` call; where that fails, this one goes on."""
        if self._cache is None or not (last or time.monotonic() - self._saved > SAVE_SECONDS):
            return
        self._saved = time.monotonic()
        merged = {**self._before, **known}
        if merged == self._before:
            return
        try:
            self._write(self._cache, merged)
            self._before = merged
        except OSError as error:
            _log.warning("digests of media are not kept, and the next run hashes them again (%s)", error)

    def _read(self, cache: Cache) -> Known:
        held = cache.get(KIND, self._key(cache))
        if held is None:
            return {}
        names = bytes(held["names"].numpy()).decode("utf-8", "surrogatepass").split("\0")
        stamps, digests = held["stamps"].tolist(), held["digests"].numpy()
        return {
            name: ((inode, size, changed, moved), bytes(digest).hex())
            for name, (inode, size, changed, moved), digest in zip(names, stamps, digests, strict=True)
        }

    def _key(self, cache: Cache) -> str:
        return cache.key(table=self._table, stamps="inode, size, changed, moved")

    def _write(self, cache: Cache, known: Known) -> None:
        names = "\0".join(known).encode("utf-8", "surrogatepass")
        digests = b"".join(bytes.fromhex(digest) for _, digest in known.values())
        tensors = {
            "names": torch.from_numpy(np.frombuffer(names, np.uint8).copy()),
            "stamps": torch.tensor([stamp for stamp, _ in known.values()], dtype=torch.int64),
            "digests": torch.from_numpy(np.frombuffer(digests, np.uint8).reshape(-1, 32).copy()),
        }
        cache.put(KIND, self._key(cache), tensors)
