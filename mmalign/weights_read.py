"""Reading checkpoint files: tensors without running code, names and shapes from the header, and what a file is.

Two formats are read: safetensors, and PyTorch files through ``torch.load(weights_only=True)``. A file that needs Python
objects to be unpickled could run any code, so it is refused with the way to convert it. Whatever else lies under a
checkpoint's name (a Git-LFS pointer, a web page, an archive, half a download) is named.
"""

from __future__ import annotations

import json
import math
import pickle
import shlex
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor

__all__ = [
    "BAD_CONFIG",
    "DAMAGED",
    "INDEX",
    "check_file",
    "count_numbers",
    "first_line",
    "meta_state",
    "read_json",
    "read_state_dict",
    "shards",
]

INDEX = ".safetensors.index.json"
# What readers of zip files, pickles and safetensors raise on files that are cut off or have wrong bytes; found by
# cutting and changing good ones at every place.
DAMAGED = (
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(OverflowError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile, tarfile.TarError),
    *(pickle.UnpicklingError, SafetensorError),
)
BAD_CONFIG = (*DAMAGED, ArithmeticError, ImportError, StrictDataclassError)
"""What libraries raise on configs of wrong keys, types or sizes, besides."""
HEAD = 512  # bytes that are looked at to say what a file is
ARCHIVES = {
    b"\x1f\x8b": "a gzip archive",
    b"\xfd7zXZ": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"BZh": "a bzip2 archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
}
FOREIGN = {b"\x89HDF": "an HDF5 file", b"GGUF": "a GGUF file", b"\x93NUMPY": "a NumPy file"}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a ``.safetensors`` file, or from a PyTorch file without running any pickled code.

    A PyTorch file may hold the tensors directly, or under ``state_dict`` or ``model``; other entries beside these, such
    as an optimiser's state, are left out. Tensors stay on the CPU in the file's own dtype.

    Raises:
        ValueError: the file is missing, empty, damaged, a pickle of objects, of another kind (which is named), or
            holds no tensors or something other than named tensors.
    """
    path = Path(path)
    check_file(path)
    return _named(_read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path), path)


def meta_state(path: str | Path) -> dict[str, Tensor]:
    """Names and shapes of a checkpoint's tensors, without their values, as tensors on the meta device.

    Args:
        path: a file, of which the header alone is read (all of it where it is PyTorch's older format); or an index
            ``*.safetensors.index.json``, whose shards have to be there and to hold what it says.

    Raises:
        ValueError: as `read_state_dict`, and as `shards`.
    """
    path = Path(path)
    if path.name.endswith(INDEX):
        return _sharded(path)
    check_file(path)
    if path.suffix != ".safetensors":
        lazily = zipfile.is_zipfile(path)  # the older format's tensors lie in one stream
        return {name: value.to("meta") for name, value in _named(_read_torch(path, mmap=lazily), path).items()}
    try:
        with safe_open(path, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except DAMAGED as error:
        raise _unreadable_safetensors(path, error) from None
    return _named({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, path)


def shards(index: Path) -> dict[str, list[str]]:
    """What an index ``*.safetensors.index.json`` says: the names of the tensors in each file beside it.

    Raises:
        ValueError: it is no such index, names a file outside of its folder, or one that is not there.
    """
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
        result = {file: [name for name, where in places.items() if where == file] for file in files}
    except FileNotFoundError:
        raise ValueError(f"{index}: no such file.") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(
            f"{index}: is no index of shards (a weight_map from tensors to files); get it again."
        ) from None
    if not result or any(not isinstance(file, str) or Path(file).name != file for file in files):
        raise ValueError(f"{index}: its weight_map has to name files beside it; get it again.")
    absent = [file for file in files if not (index.parent / file).is_file()]
    if absent:
        raise ValueError(
            f"{index}: {len(absent)} of its {len(files)} files are missing: {', '.join(absent)}; get them."
        )
    return result


def _sharded(index: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for file, names in shards(index).items():
        held = meta_state(index.parent / file)
        lacking, more = sorted(set(names) - held.keys()), sorted(held.keys() - set(names))
        if lacking or more:
            what = f"has no {lacking[0]}" if lacking else f"holds {more[0]} besides"
            raise ValueError(f"{index.parent / file}: {what}, unlike {index.name}; get both from one revision.")
        state |= held
    return state


def count_numbers(path: Path) -> int | None:
    """How many numbers the floating-point tensors of a checkpoint hold, by its header: no tensor is read.

    None where the file does not say, or is not one that `read_state_dict` would take.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
                return sum(math.prod(each.get_shape()) for each in slices if each.get_dtype().startswith(("F", "BF")))
        if not zipfile.is_zipfile(path):
            return None  # the older format, whose tensors lie in one stream
        found = torch.load(path, map_location="meta", weights_only=True)
    except DAMAGED:
        return None
    state = _unwrapped(found)
    tensors = [value for value in state.values() if isinstance(value, Tensor)] if isinstance(state, Mapping) else []
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point()) or None


# ------------------------------------------------------------------------------------------------ the two formats


def _read_safetensors(path: Path) -> object:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except DAMAGED as error:
        raise _unreadable_safetensors(path, error) from None


def _unreadable_safetensors(path: Path, error: BaseException) -> ValueError:
    return ValueError(
        f"{path}: not a readable safetensors file ({first_line(error)}). It may be truncated or damaged; get it again."
    )


def _read_torch(path: Path, mmap: bool = False) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap or None)
    except pickle.UnpicklingError:
        new = shlex.quote(str(path.with_suffix(".safetensors")))
        raise ValueError(
            f"{path}: holds pickled Python objects (or is damaged), which could run any code when loaded, so it is "
            f"refused. Convert it once, which runs none of it: mmalign weights convert {shlex.quote(str(path))} {new}"
        ) from None
    except DAMAGED as error:
        raise ValueError(
            f"{path}: cannot be read as a PyTorch checkpoint ({first_line(error)}); it may be truncated or damaged; "
            "get it again."
        ) from None


def _unwrapped(loaded: object) -> object:
    """What lies under ``state_dict`` or ``model``, where one of them holds the tensors."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            return loaded[key]
    return loaded


def _named(loaded: object, path: Path) -> dict[str, Tensor]:
    loaded = _unwrapped(loaded)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: holds {type(loaded).__name__}, not a dictionary of named tensors.")
    strangers = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if strangers:
        rest = f" and {len(strangers) - 6} more" if len(strangers) > 6 else ""
        raise ValueError(f"{path}: not a state dict; these entries are no tensors: {', '.join(strangers[:6])}{rest}.")
    if not loaded:
        raise ValueError(f"{path}: holds no tensors at all; get the file again.")
    return {str(key): value for key, value in loaded.items()}


def first_line(error: BaseException) -> str:
    """The first line of an error's message (two, where it ends with a colon), and its kind where that is a bare key."""
    lines = [line.strip() for line in str(error).splitlines()]
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return (
        line
        if line and not isinstance(error, LookupError | AssertionError)
        else f"{type(error).__name__} {line}".strip()
    )


# ------------------------------------------------------------------------------------------------ what a file is


def check_file(path: Path) -> None:
    """Refuse what is no checkpoint by its first bytes, and say what it is and what to do.

    Raises:
        ValueError: a file that is missing, empty, a Git-LFS pointer, a web page, text, an archive, another library's
            weights, a TorchScript program, half a zip file, or one of the two formats under the other's ending.
    """
    if not path.is_file():
        what = "is a folder; name the file in it" if path.is_dir() else "no such checkpoint file"
        raise ValueError(f"{path}: {what}.")
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if not head:
        raise ValueError(f"{path}: the checkpoint is empty (0 bytes); copy or download it again.")
    if problem := _text(head) or _foreign(path, head):
        raise ValueError(f"{path}: {problem}")


def _text(head: bytes) -> str:
    """What is wrong with a file that is text; empty if it is none."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"version https://git-lfs.github.com/spec/"):
        return (
            "is a Git-LFS pointer, which stands for the weights and holds none. Run `git lfs pull` in the repository "
            "that it was cloned from, or download the file itself (`mmalign weights fetch` for a known one)."
        )
    if start[:1] == b"<":
        return (
            "is a web page, not weights: the server answered the download with a page, such as one that asks to log "
            "in or to accept a licence. Open the address in a browser, and download the file itself."
        )
    try:
        words = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < HEAD - 3:  # otherwise a letter that the end of `head` cuts in two
            return ""
        words = head[: error.start].decode("utf-8")
    if not start or not "".join(words.split()).isprintable():
        return ""
    kind = "JSON" if start[:1] in b"{[" else "text"
    return f"is {kind}, not weights; it begins {' '.join(words.split())[:60]!r}. Download the file itself."


def _foreign(path: Path, head: bytes) -> str:
    """What is wrong with a file of another format than its name says; empty if nothing is."""
    for magic, what in ARCHIVES.items():
        if head.startswith(magic):
            return f"is {what}; unpack it, and name the checkpoint that was in it."
    for magic, what in FOREIGN.items():
        if head.startswith(magic):
            return f"is {what}; safetensors and PyTorch files are read. Get the checkpoint in one of these forms."
    tensors = path.suffix == ".safetensors"
    if head[:4] == b"PK\x03\x04":
        return _zip(path, tensors)
    if not tensors and head[8:10] in (b'{"', b"{}"):
        return f"is a safetensors file by its content; rename it to {path.with_suffix('.safetensors').name}."
    if tensors and head[:1] == b"\x80" and head[8:9] != b"{":
        return f"is a Python pickle by its content; rename it to {path.with_suffix('.pt').name}."
    if not tensors and head[:1] != b"\x80":
        return f"is no PyTorch checkpoint: its first bytes are {head[:8].hex(' ')}. It may be damaged; get it again."
    return ""


def _zip(path: Path, tensors: bool) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.split("/") for name in archive.namelist()]
    except DAMAGED as error:
        return f"is a zip file that cannot be read ({first_line(error)}): it is truncated or damaged; get it again."
    if any(len(parts) > 2 and parts[1] == "code" for parts in names):
        return (
            "is a TorchScript program, not a state dict, and is not run. Get the weights as safetensors (OpenAI's: "
            "`mmalign weights fetch openai-clip-l14`, see docs/weights.md); or, where you trust the program, save its "
            "tensors once with `safetensors.torch.save_file(torch.jit.load(file).state_dict(), 'model.safetensors')`."
        )
    if not any(parts[-1] == "data.pkl" for parts in names):
        return f"is a zip archive, not PyTorch's; it holds {'/'.join(names[0]) if names else 'nothing'}. Unpack it."
    return f"is a PyTorch file by its content; rename it to {path.with_suffix('.pt').name}." if tensors else ""


def read_json(path: Path, fix: str = "get the file again") -> dict[str, Any]:
    """An object from a file; ValueError, naming it and what to do, for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # undecodable bytes among them
        raise ValueError(f"{path}: is not JSON ({error}); {fix}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds {type(found).__name__}, not an object; {fix}.")
    return found
