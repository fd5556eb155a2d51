"""A content-addressed cache of tensors on disk, in safetensors, that survives kills, full disks and bad sectors.

An entry lives at `root/kind/ab/abcdef....safetensors`; its key is the hash of everything that decided its content, so
an entry is never out of date, only unused. (Of kind `digests` it holds the state of the files that it speaks of, and
`mmalign.score_media` compares.) Writing is: a temporary file, fsync, rename. Reading checks the length that safetensors
declares and a CRC-32 over the tensors, so half a file or a flipped bit costs a recomputation, not a run.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import json
import os
import struct
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save

KINDS = (
    "latents",
    "prompt_embeddings",
    "reference_errors",
    "inversions",
    "features",
    "digests",
    "reference_log_probs",
    "answer_sizes",
)
_LAYOUT = 1  # enters every key: raise it when what an entry means changes
_NO_CRC = "00000000"
_STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class Held:
    """What a cache holds of one kind: the number of entries and their size in bytes."""

    kind: str
    entries: int
    bytes: int


def default_root() -> Path:
    """`$MMALIGN_CACHE`, or `~/.cache/mmalign`."""
    return Path(os.environ.get("MMALIGN_CACHE") or "~/.cache/mmalign").expanduser()


class Cache:
    """A folder of tensors by key. Safe with many processes on one folder: entries appear whole, and the last one wins.

    `version` enters every key; give it whatever makes older entries meaningless (a scheme's number, a library's).
    """

    def __init__(self, root: str | Path | None = None, version: str | int = 1) -> None:
        self.root = Path(root).expanduser() if root is not None else default_root()
        self.version = version

    def key(self, **parts: Any) -> str:
        """sha256 (hex) of `parts` as canonical JSON: model hash, processor, resolution, flip, media hash and the like.

        Parts are strings, numbers, booleans, None, and lists, tuples or string-keyed dicts of them. Order does not
        matter, types do (1, 1.0, True and "1" differ). ValueError for anything else, NaN included.
        """
        for name, value in parts.items():
            _refuse_inexact(name, value)
        whole = {"layout": _LAYOUT, "version": self.version, "parts": parts}
        text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, kind: str, key: str) -> Path:
        """Where an entry lies, present or not. ValueError for an unknown kind or a key that `key` did not make."""
        if len(key) != 64 or set(key) - set("0123456789abcdef"):
            raise ValueError(f"a cache key is 64 hex digits made by Cache.key(...), not {key!r}")
        return self.root / _known(kind) / key[:2] / f"{key}.safetensors"

    def get(self, kind: str, key: str) -> dict[str, torch.Tensor] | None:
        """The tensors put under `key`, bit for bit and on the CPU; None if there are none.

        An entry that is cut off or damaged is deleted with a warning, and None is returned, so that it is recomputed.
        """
        path = self.path(kind, key)
        try:
            blob = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            _check(blob)
            return safetensors_load(blob)
        except Exception as error:  # safetensors has its own exception types, and each of them means a bad entry
            warnings.warn(f"cache entry {path} is damaged ({error}); deleted, it will be recomputed", stacklevel=2)
            path.unlink(missing_ok=True)
            return None

    def put(self, kind: str, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store `tensors` (any device and dtype) under `key`, whole or not at all, replacing what was there.

        OSError with the folder's name and what to do when the disk is full; no partial file is left behind.
        """
        path = self.path(kind, key)
        blob = _pack(tensors)
        temporary = path.with_name(f".{key}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(blob)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                need = f"{len(blob):,} bytes of {kind}"
                advice = "free some space, run `mmalign cache clear`, or set MMALIGN_CACHE to a folder on another disk"
                raise OSError(
                    error.errno, f"no space left in the cache for {need}; {advice}", str(self.root)
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def ls(self) -> list[Held]:
        """What the cache holds, one line per kind, kinds with nothing included."""
        held = []
        for kind in KINDS:
            sizes = [size for path in self._files(kind, "*.safetensors") if (size := _size(path)) is not None]
            held.append(Held(kind, len(sizes), sum(sizes)))
        return held

    def clear(self, kind: str | None = None) -> Held:
        """Delete every entry of `kind` (default: of all kinds); what was deleted. Other files in the folder stay.

        Left-over temporary files of killed processes go too, once they are an hour old (a younger one may be in use).
        """
        kinds = KINDS if kind is None else (_known(kind),)
        entries = total = 0
        for each in kinds:
            for path in list(self._files(each, "*.safetensors")):
                size = _size(path)
                path.unlink(missing_ok=True)
                entries, total = entries + 1, total + (size or 0)
            for path in list(self._files(each, ".*.tmp")):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink(missing_ok=True)
        return Held(kind or "all", entries, total)

    def _files(self, kind: str, pattern: str) -> Iterator[Path]:
        return (self.root / kind).glob(f"[0-9a-f][0-9a-f]/{pattern}")


def _known(kind: str) -> str:
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no cache of kind {kind!r}; there are {', '.join(KINDS)}.{hint}")
    return kind


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process cleared it between the listing and now
        return None


def _refuse_inexact(name: str, value: Any) -> None:
    """JSON would quietly turn the key 1 into "1", and NaN equals nothing: neither may decide what is looked up."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(
                    f"cache key part {name!r} has the key {key!r}; use strings, which stay distinct in JSON"
                )
            _refuse_inexact(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_inexact(f"{name}[{index}]", item)
    elif isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        raise ValueError(f"cache key part {name!r} is {value}, which identifies nothing; leave it out")
    elif not (value is None or isinstance(value, str | int | float)):
        kind = type(value).__name__
        raise ValueError(f"cache key part {name!r} is a {kind}; give a hash of it, or a string, number, list or dict")


def _pack(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """A safetensors file whose header carries the CRC-32 of its tensors."""
    if not tensors:
        raise ValueError("nothing to put into the cache: tensors is empty")
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}  # no shared storage
    blob = bytearray(safetensors_save(own, metadata={"crc32": _NO_CRC}))
    start = _data_start(blob)
    place = blob.index(b'"crc32":"' + _NO_CRC.encode()) + len('"crc32":"')
    assert place < start
    blob[place : place + 8] = f"{zlib.crc32(memoryview(blob)[start:]):08x}".encode()
    return bytes(blob)


def _data_start(blob: bytes | bytearray) -> int:
    return 8 + int(struct.unpack("<Q", blob[:8])[0])


def _check(blob: bytes) -> None:
    """ValueError unless the header is readable and the tensors have the CRC-32 that it states."""
    if len(blob) < 8 or _data_start(blob) > len(blob):
        raise ValueError(f"only {len(blob)} bytes are left")
    stated = json.loads(blob[8 : _data_start(blob)]).get("__metadata__", {}).get("crc32")
    found = f"{zlib.crc32(memoryview(blob)[_data_start(blob) :]):08x}"
    if stated != found:
        raise ValueError(f"checksum {found}, {stated} expected")
