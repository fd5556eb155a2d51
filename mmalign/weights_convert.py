"""A published checkpoint, once, from PyTorch's pickle to safetensors; run in a process of its own.

Nothing in the file is executed. What `torch.load(weights_only=True)` allows is read as it is. Where a file holds a
whole pickled module, every class that it names is replaced by an inert shell which only keeps its attributes;
parameters and buffers are then collected under the names that `Module.state_dict` would give them.

    python -m mmalign.weights_convert IN.pt OUT.safetensors
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.weights import file_hash
from mmalign.weights_read import DAMAGED, check_file, first_line

__all__ = ["convert", "convert_here", "tensors_of"]


def convert(source: str | Path, target: str | Path) -> dict[str, Any]:
    """Convert in a separate process, so that a hostile or huge file can harm no more than that.

    Returns:
        ``tensors`` (how many), ``bytes``, ``source_sha256``, ``classes`` (names that were replaced by shells).

    Raises:
        ValueError: the file cannot be converted, with the reason.
        FileExistsError: the target is there already.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise FileExistsError(f"{target} is there already; delete it or name another file.")
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: the new file's name has to end in .safetensors.")
    check_file(source)
    words = [sys.executable, "-m", "mmalign.weights_convert", str(source), str(target)]
    done = subprocess.run(words, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ValueError(f"{source}: the converting process was ended by {name}; is there memory for all its tensors?")
    if done.returncode or not lines:
        message = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        named = str(source) in message or str(target.parent) in message
        raise ValueError(message if named else f"{source}: the converting process failed ({message}).")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def convert_here(source: Path, target: Path) -> dict[str, Any]:
    """As `convert`, in this process."""
    from safetensors.torch import save_file

    loaded, classes = _read(source)
    tensors = {name: value.contiguous().clone() for name, value in tensors_of(loaded, str(source)).items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp")
    digest = file_hash(source)
    try:
        save_file(tensors, temporary, metadata={"format": "pt", "source": source.name, "source_sha256": digest})
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    return {"tensors": len(tensors), "bytes": size, "source_sha256": digest, "classes": sorted(classes)}


class _Shell:
    """Stands for any class or function that a pickle names: keeps what it is given, does nothing."""

    def __new__(cls, *arguments: Any) -> _Shell:
        return super().__new__(cls)

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, Mapping):
                self.__dict__.update({str(key): value for key, value in part.items()})


def _read(source: Path) -> tuple[object, list[str]]:
    check_file(source)
    try:
        return torch.load(source, map_location="cpu", weights_only=True), []
    except pickle.UnpicklingError:
        pass  # it names classes: read once more with shells in their place
    except DAMAGED as error:
        raise ValueError(f"{source}: cannot be read as a PyTorch checkpoint ({first_line(error)}).") from None
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(source)
        return _with_shells(source, names), names
    except DAMAGED as error:
        wanted = re.search(r"(?:GLOBAL|reduce for unrecognized function|Can only [^.]+ but got) .+", str(error))
        reason = wanted.group(0).split("`")[0] if wanted else first_line(error)
        raise ValueError(
            f"{source}: cannot be read without running code that it brings, so it is refused ({reason})."
        ) from None


def _with_shells(source: Path, names: list[str]) -> object:
    """What the file holds, with shells for these classes."""
    try:
        return _load(source, [(_Shell, name) for name in names])
    except pickle.UnpicklingError as error:
        if "SETITEM" not in str(error):
            raise
    # A config may be a dictionary of a class of its own, whose items a shell cannot take: an ordered dictionary can.
    own = {name for name in names if name.endswith("Dict") and not name.startswith("torch.")}
    return _load(source, [(OrderedDict if name in own else _Shell, name) for name in names])


def _load(source: Path, stand_ins: list[Any]) -> object:
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(source, map_location="cpu", weights_only=True)


def tensors_of(loaded: object, origin: str) -> dict[str, Tensor]:
    """Named tensors of a state dict (also one under ``state_dict``, ``model`` or ``module``), or of a module's shell.

    Raises:
        ValueError: there are none, or other things are among them.
    """
    for key in ("state_dict", "model", "module"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping | _Shell):
            loaded = loaded[key]
    if isinstance(loaded, _Shell):
        found = dict(_state(loaded, ""))
    elif isinstance(loaded, Mapping):
        found = {str(key): value for key, value in loaded.items()}
    else:
        found = {}
    strangers = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if strangers or not found:
        what = f"these entries are no tensors: {', '.join(strangers[:6])}" if strangers else "it holds no named tensors"
        raise ValueError(f"{origin}: not a checkpoint of weights; {what}.")
    return found


def _state(module: _Shell, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as `torch.nn.Module.state_dict` has them."""
    held = module.__dict__
    passing = held.get("_non_persistent_buffers_set", ())
    if isinstance(passing, _Shell):  # a set, in older files
        passing = passing.arguments[0] if passing.arguments else ()
    for kind in ("_parameters", "_buffers"):
        for name, value in held.get(kind, {}).items():
            if isinstance(value, Tensor) and not (kind == "_buffers" and name in passing):
                yield f"{prefix}{name}", value.detach()
    for name, child in held.get("_modules", {}).items():
        if isinstance(child, _Shell):
            yield from _state(child, f"{prefix}{name}.")


if __name__ == "__main__":
    try:
        print(json.dumps(convert_here(Path(sys.argv[1]), Path(sys.argv[2]))))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
