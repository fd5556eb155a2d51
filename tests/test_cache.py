"""The cache: exactness, crashes, damage, and a disk that fills up."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mmalign.cache
from mmalign.cache import KINDS, Cache, Held, default_root


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(4, 8, 8, generator=generator)
    return {
        "float": half,
        "bf16": half.to(torch.bfloat16),
        "view": half.transpose(0, 1),  # neither contiguous nor its own storage
        "count": torch.tensor([1, 2, 3]),
        "nothing": torch.zeros(0, 3),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().view(torch.uint8) if t.numel() else t for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def test_what_is_put_comes_back_bit_for_bit(cache: Cache) -> None:
    key = cache.key(model="abc", resolution=64, flip=False)
    assert cache.get("latents", key) is None
    cache.put("latents", key, tensors())
    back = cache.get("latents", key)
    assert back is not None and back.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert same_bits(back[name], tensor), name
    assert cache.get("prompt_embeddings", key) is None  # kinds are apart


def test_keys_depend_on_content_version_and_type_but_not_on_order(cache: Cache, tmp_path: Path) -> None:
    key = cache.key(model="abc", resolution=64)
    assert key == cache.key(resolution=64, model="abc") == Cache(tmp_path / "other").key(model="abc", resolution=64)
    assert key != Cache(tmp_path, version=2).key(model="abc", resolution=64)
    variants = [64, 64.0, "64", [64], {"a": 64}, None]
    assert len({cache.key(model="abc", resolution=value) for value in variants}) == len(variants)
    assert cache.key(a=1) != cache.key(a=True)
    assert cache.key(model="é") != cache.key(model="e")


def test_a_key_is_stable_between_releases() -> None:
    """A changed hash would silently throw away everybody's cache: change the layout number with it, and this."""
    expected = "f5785e9ce00b"
    assert Cache("/nowhere", version=1).key(model="abc", resolution=64, flip=False).startswith(expected)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({1: "a"}, "use strings"),
        (float("nan"), "identifies nothing"),
        ([1.0, float("inf")], r"part\[1\]"),
        (torch.zeros(1), "give a hash of it"),
        ({"deep": [object()]}, r"part.deep\[0\]"),
    ],
)
def test_parts_that_would_collide_are_refused(cache: Cache, part: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache.key(part=part)


def test_unknown_kind_and_key_are_named(cache: Cache) -> None:
    with pytest.raises(ValueError, match="Did you mean 'latents'"):
        cache.get("latent", cache.key(a=1))
    with pytest.raises(ValueError, match="64 hex digits"):
        cache.put("latents", "../../escape", tensors())
    with pytest.raises(ValueError, match="tensors is empty"):
        cache.put("latents", cache.key(a=1), {})


def test_truncation_anywhere_is_detected_deleted_and_recomputed(cache: Cache) -> None:
    key = cache.key(a=1)
    cache.put("inversions", key, tensors())
    path = cache.path("inversions", key)
    whole = path.read_bytes()
    for length in (0, 5, 8, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match=r"damaged .*deleted, it will be recomputed"):
            assert cache.get("inversions", key) is None
        assert not path.exists()
        assert cache.get("inversions", key) is None  # and no second warning
        cache.put("inversions", key, tensors())
        assert path.read_bytes() == whole


def test_one_flipped_bit_is_detected(cache: Cache) -> None:
    key = cache.key(a=1)
    cache.put("reference_errors", key, {"error": torch.rand(64)})
    path = cache.path("reference_errors", key)
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) - 100, 20, 3):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="damaged"):
            assert cache.get("reference_errors", key) is None
        path.write_bytes(whole)
    assert cache.get("reference_errors", key) is not None


def left_behind(cache: Cache) -> list[Path]:
    return [path for path in cache.root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_names_folder_and_remedy(cache: Cache, monkeypatch: pytest.MonkeyPatch, code: int, call: str) -> None:
    def full(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    key = cache.key(a=1)
    cache.put("latents", cache.key(a=0), tensors())
    before = left_behind(cache)
    monkeypatch.setattr(mmalign.cache.os, call, full)
    with pytest.raises(
        OSError, match=r"no space left in the cache for [\d,]+ bytes of latents.*mmalign cache clear"
    ) as caught:
        cache.put("latents", key, tensors())
    assert caught.value.errno == code and str(cache.root) in str(caught.value)
    assert left_behind(cache) == before
    monkeypatch.undo()
    assert cache.get("latents", key) is None
    cache.put("latents", key, tensors())
    assert cache.get("latents", key) is not None


def test_other_disk_errors_pass_unchanged_and_leave_nothing(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(mmalign.cache.os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output error"):
        cache.put("latents", cache.key(a=1), tensors())
    assert left_behind(cache) == []


def test_a_really_full_disk(small_disk: Path) -> None:
    cache = Cache(small_disk / "cache")
    cache.put("latents", cache.key(n=0), {"x": torch.zeros(16 * 1024)})
    with pytest.raises(OSError, match="mmalign cache clear") as caught:
        for n in range(1, 20):
            cache.put("latents", cache.key(n=n), {"x": torch.full((16 * 1024,), float(n))})
    assert caught.value.errno == errno.ENOSPC
    assert all(path.suffix == ".safetensors" for path in left_behind(cache))
    kept = cache.ls()[0].entries
    for n in range(kept):  # every entry that is there is whole
        back = cache.get("latents", cache.key(n=n))
        assert back is not None and bool((back["x"] == n).all())
    assert cache.clear().entries == kept
    cache.put("latents", cache.key(n=99), {"x": torch.zeros(16 * 1024)})


def test_a_writer_killed_half_way_leaves_no_entry(cache: Cache) -> None:
    """A real kill -9 between the write and the rename: the entry is absent, and its temporary file is no entry."""
    script = (
        "import os, signal, sys, torch, mmalign.cache as c\n"
        "c.os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache = c.Cache(sys.argv[1]); cache.put('latents', cache.key(a=1), {'x': torch.zeros(1000)})\n"
    )
    repo = Path(mmalign.cache.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script, str(cache.root)], cwd=repo, capture_output=True)
    assert done.returncode == -9, done.stderr
    assert cache.get("latents", cache.key(a=1)) is None
    assert cache.ls()[0] == Held("latents", 0, 0)
    (orphan,) = left_behind(cache)
    cache.clear()
    assert orphan.exists()  # it might belong to a writer at work
    old = time.time() - 7200
    os.utime(orphan, (old, old))
    cache.clear()
    assert left_behind(cache) == []


def test_ls_and_clear(cache: Cache) -> None:
    assert [held.kind for held in cache.ls()] == list(KINDS) and not any(held.entries for held in cache.ls())
    for n in range(3):
        cache.put("latents", cache.key(n=n), {"x": torch.zeros(10)})
    cache.put("inversions", cache.key(n=0), {"x": torch.zeros(10)})
    (cache.root / "latents" / "notes.txt").write_text("mine")
    size = cache.path("latents", cache.key(n=0)).stat().st_size
    assert cache.ls()[0] == Held("latents", 3, 3 * size)
    assert cache.clear("latents") == Held("latents", 3, 3 * size)
    assert {held.kind: held.entries for held in cache.ls()} == {kind: int(kind == "inversions") for kind in KINDS}
    assert cache.clear() == Held("all", 1, size)
    assert (cache.root / "latents" / "notes.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="Did you mean 'inversions'"):
        cache.clear("inversion")


def test_default_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path))
    assert default_root() == Cache().root == tmp_path
    monkeypatch.delenv("MMALIGN_CACHE")
    assert default_root() == Path.home() / ".cache" / "mmalign"
