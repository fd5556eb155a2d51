"""Training checkpoints that survive a kill at any moment: written aside, flushed, then renamed into place."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_NAME = re.compile(r"step-(\d{8})")


def save(folder: Path, step: int, weights: dict[str, Tensor], state: dict[str, Any], keep: int) -> Path:
    """Writes `folder/step-N/{weights.safetensors, state.pt}` and removes all but the newest `keep`.

    Raises:
        OSError: the disk is full (the message says so and names the newest checkpoint that is intact).
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, aside = folder / f"step-{step:08d}", folder / f".writing-{os.getpid()}"
    for left in folder.glob(".writing-*"):  # of a process that was killed here; one process writes at a time
        shutil.rmtree(left)
    try:
        aside.mkdir()
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in weights.items()}, aside / "weights.safetensors"
        )
        with open(aside / "state.pt", "wb") as file:  # given a path, torch would not say why a write failed
            torch.save(state, file)
        for written in aside.iterdir():
            _flush(written)
        _flush(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        _flush(folder)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if _disk_is_full(error):
            last = newest(folder)
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: checkpoint of step {step} was not written. Free some space and run again with "
                f"--resume; the newest intact checkpoint is {last.name if last else 'none yet'}",
                str(folder),
            ) from error
        raise
    for old in steps(folder)[:-keep]:
        (folder / f"step-{old:08d}").rename(aside)  # a kill during the removal must not leave half a checkpoint
        shutil.rmtree(aside)
    return final


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for m in (_NAME.fullmatch(p.name) for p in folder.iterdir()) if m)


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = steps(folder)
    return folder / f"step-{found[-1]:08d}" if found else None


def read(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and state of a checkpoint; no pickled objects are run."""
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    return load_file(checkpoint / "weights.safetensors"), state


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether this is behind an error: torch raises another one while it closes the file that could not be written."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):  # the latter is safetensors'
            return True
        error = error.__context__
    return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
