"""`mmalign weights convert`: a pickle becomes tensors, and code in it is never run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmalign import known_weights
from mmalign.known_weights import KNOWN
from mmalign.weights import find_checkpoint, read_state_dict
from mmalign.weights_convert import convert

MAKER = """
import sys, torch
from torch import nn

class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.GELU())
        self.activation = torch.nn.functional.relu
        self.scale = nn.Parameter(torch.tensor(2.5, dtype=torch.float16))
        self.register_buffer("positions", torch.arange(4), persistent=False)
        self.register_buffer("steps", torch.arange(3))
        self.config = {"dtype": torch.bfloat16, "names": {"a", "b"}}

model = Tower()
model.head = model.layers[0]  # the same layer under two names
torch.save(model, sys.argv[1])
torch.save(model.state_dict(), sys.argv[2])
"""


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A whole pickled module whose class exists only in the process that wrote it, and its state dict."""
    folder = tmp_path_factory.mktemp("pickled")
    module, state = folder / "module.pth", folder / "state.pt"
    subprocess.run([sys.executable, "-c", MAKER, str(module), str(state)], check=True)
    return module, state


def test_a_pickled_module_gives_the_tensors_of_its_state_dict(pickled: tuple[Path, Path], tmp_path: Path) -> None:
    module, state = pickled
    with pytest.raises(ValueError, match="pickled Python objects"):
        read_state_dict(module)
    done = convert(module, tmp_path / "new" / "module.safetensors")
    found, expected = load_file(tmp_path / "new" / "module.safetensors"), torch.load(state, weights_only=True)
    assert found.keys() == expected.keys() and "positions" not in found and "steps" in found
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert done["tensors"] == len(expected) and "torch.nn.functional.relu" in done["classes"]
    assert done["source_sha256"] == hashlib.sha256(module.read_bytes()).hexdigest()


def test_a_state_dict_is_unwrapped_and_kept(pickled: tuple[Path, Path], tmp_path: Path) -> None:
    expected = torch.load(pickled[1], weights_only=True)
    torch.save({"state_dict": expected, "epoch": 3}, tmp_path / "w.pt")
    done = convert(tmp_path / "w.pt", tmp_path / "w.safetensors")
    assert load_file(tmp_path / "w.safetensors").keys() == expected.keys() and done["classes"] == []
    with pytest.raises(FileExistsError, match="is there already"):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors")


class Hostile:
    """Pickles to a call of ``os.system``, or of ``eval``."""

    def __init__(self, call: Callable[..., object], word: str):
        self.call, self.word = call, word

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return self.call, (self.word,)


@pytest.mark.parametrize("call", [os.system, eval], ids=["system", "eval"])
def test_code_in_a_pickle_is_never_run(call: Callable[..., object], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    word = f"touch {mark}" if call is os.system else f"open({str(mark)!r}, 'w')"
    torch.save({"weight": torch.ones(2), "x": Hostile(call, word)}, tmp_path / "h.pth")
    with pytest.raises(ValueError, match=r"without running code|no tensors: x"):
        convert(tmp_path / "h.pth", tmp_path / "h.safetensors")
    assert not mark.exists() and not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))


def test_what_cannot_be_converted_says_why(tmp_path: Path) -> None:
    (tmp_path / "short.pt").write_bytes(b"PK\x03\x04 not a whole archive")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"weight": torch.ones(1), "step": 4}, tmp_path / "mixed.pt")
    for name, words in (("short", "cannot be read"), ("list", "no named tensors"), ("mixed", "no tensors: step")):
        with pytest.raises(ValueError, match=words):
            convert(tmp_path / f"{name}.pt", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="no such"):
        convert(tmp_path / "none.pt", tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match=r"end in \.safetensors"):
        convert(tmp_path / "list.pt", tmp_path / "out.bin")


def test_a_converted_copy_is_preferred_to_the_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = known_weights.Checkpoint(("a.pth", "a.safetensors"), "owner/name", "MIT", "open_clip", pickled=True)
    monkeypatch.setitem(KNOWN, "a", entry)
    (tmp_path / "a.pth").write_bytes(b"x")
    assert find_checkpoint(tmp_path, "a").name == "a.pth"
    (tmp_path / "a.safetensors").write_bytes(b"x")
    assert find_checkpoint(tmp_path, "a").name == "a.safetensors"
    monkeypatch.setitem(KNOWN, "a", replace(entry, pickled=False))
    assert find_checkpoint(tmp_path, "a").name == "a.pth"
