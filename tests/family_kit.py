"""What the tests of image and video families share: what a denoiser is fed, and folders with faults."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mmalign.models.checkpoint import check_folder


@contextmanager
def recorded(denoiser: Any) -> Iterator[list[dict[str, Any]]]:
    """What is fed to a denoiser, by argument, and what comes out."""
    calls: list[dict[str, Any]] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found = dict(zip(("hidden_states", "timestep"), args, strict=False)) | kwargs
        calls.append({**found, "output": output[0]})

    handle = denoiser.register_forward_hook(hook, with_kwargs=True)
    yield calls
    handle.remove()


def check_faults_are_named(whole: Path, parts: tuple[str, ...], tmp_path: Path) -> None:
    """A folder is small; and with a tensor lost and another mis-shaped in each of its parts, both are named."""
    assert sum(file.stat().st_size for file in whole.rglob("*")) < 3e6
    folder = tmp_path / "broken"
    shutil.copytree(whole, folder)
    named = []
    for part in parts:
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        key = max(tensors, key=lambda key: tensors[key].ndim)
        tensors[key] = tensors[key][:-1].contiguous()
        lost = min(set(tensors) - {key})
        named.append((part, lost, key))
        del tensors[lost]
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError) as caught:
        check_folder(folder)
    for part, lost, key in named:
        said = "\n".join(line for line in str(caught.value).splitlines() if line.startswith(f"  {part} ("))
        # transformers says the names that the module has, which may be longer than those of the file.
        assert re.search(rf"1 missing tensor: \S*{re.escape(lost)}", said)
        assert re.search(rf"1 mis-shaped tensor: \S*{re.escape(key)}", said)
