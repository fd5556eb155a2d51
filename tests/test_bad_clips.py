"""Clips that are odd or broken, as rows of a preference table: kept and read right, or dropped with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from film_kit import numbered, numbers, steady, timed
from hostile_clip_kit import GONE
from media_kit import encode, moving
from public_kit import REAL_CLIP, needs
from table_kit import png, put_json
from test_video import FAST_START, cut_off, damaged, turned

from mmalign.jobs_inputs import Data
from mmalign.media import MediaError, clip_facts, clip_frames, read_image, read_video, write_image, write_video
from mmalign.tables import read_preferences
from mmalign.tasks import sources


def table(folder: Path, *names: str) -> Path:
    """A pair with `good.mp4` for each name, which is the better one, and a pair of two good ones."""
    steady(folder / "good.mp4", 24, 12)
    steady(folder / "other.mp4", 24, 12)
    rows = [{"prompt": name, "media": [name, "good.mp4"], "label": "A"} for name in (*names, "other.mp4")]
    return put_json(folder / "t.jsonl", rows)


def wanted(path: Path, **changes: Any) -> Data:
    return Data(table=path, frames=9, fps=8.0, resolution=16, **changes)


def empty(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    return path


def sized(path: Path, height: int, width: int) -> Path:
    frames = moving(12)[:, :, :height, :width].contiguous()
    write_video(path, frames, 12, lossless=True)
    return path


def still(path: Path) -> Path:
    path.write_bytes(png(3))
    return path


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty.mp4": (empty, "holds no video stream|holds no frame|no readable clip"),
    "nothing.mp4": (lambda path: path, "no such file"),
    "damaged.mp4": (
        lambda path: damaged(encode(path, moving(40), container=FAST_START, options={"g": "10"})),
        r"frame \d+ is damaged|damaged at frame \d+",
    ),
    "damaged.mkv": (lambda path: damaged_matroska(path), r"frame \d+ is damaged|damaged at frame \d+"),
    "half.mp4": (lambda path: cut_off(encode(path, moving(40), container=FAST_START), 0.6), GONE),
    "dot.mkv": (lambda path: sized(path, 1, 1), "is 1x1 pixels, below min_side=2"),
    "strip.mkv": (lambda path: strip(path), "is a strip of 402x2 pixels"),
    "still.mp4": (still, "holds a PNG image, not a clip; set modality: image"),
}


def damaged_matroska(path: Path) -> Path:
    """As `damaged`, of a Matroska file: zeros over what lies in its middle, its third group of pictures."""
    data = bytearray(encode(path, moving(40), options={"g": "10"}).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = bytes(600)
    path.write_bytes(data)
    return path


def strip(path: Path) -> Path:
    write_video(path, moving(3)[:, :, :2, :67].repeat(1, 1, 1, 6).contiguous(), 12, lossless=True)
    return path


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_row_with_a_clip_that_cannot_be_read_is_dropped_whole(tmp_path: Path, name: str) -> None:
    make, problem = UNREADABLE[name]
    make(tmp_path / name)
    path = table(tmp_path, name)
    found = read_preferences(path, verify=True)
    assert [row.prompt for row in found.rows] == ["other.mp4"]
    (dropped,) = found.dropped
    assert dropped.reason == "undecodable clip" and dropped.origin.startswith("t.jsonl line 1 ")
    assert re.search(problem, dropped.detail)
    assert "kept 1 of 2 rows; dropped 1: 1 undecodable clip (t.jsonl line 1 " in found.summary()
    with pytest.raises(MediaError):
        clip_frames(tmp_path / name, fps=8.0, frames=3)


@pytest.mark.parametrize(("count", "fps", "there"), [(1, 12, 1), (12, 12, 8), (24, 24, 8), (5, 8, 5)])
def test_a_clip_of_fewer_frames_than_are_wanted_drops_its_row(tmp_path: Path, count: int, fps: int, there: int) -> None:
    steady(tmp_path / "short.mp4", count, fps)
    path = table(tmp_path, "short.mp4")
    assert len(read_preferences(path).rows) == 2, "it decodes: how much is wanted is training's to say"
    for verify in (True, False):
        groups, summary = sources.groups(wanted(path, verify=verify), "pairs")
        assert [group.prompts[0] for group in groups] == ["other.mp4"]
        assert "kept 1 of 2 rows; dropped 1: 1 fewer than 9 frames (t.jsonl line 1)" in summary
    with pytest.raises(MediaError, match=rf"{count} frames? at {fps} .* give.? {there} at 8, and 9 are wanted"):
        clip_frames(tmp_path / "short.mp4", fps=8.0, frames=9)


def test_nothing_long_enough_is_an_error(tmp_path: Path) -> None:
    path = table(tmp_path)
    with pytest.raises(ValueError, match=r"nothing left to train on \(kept 0 of 1 rows; dropped 1: 1 fewer than 41"):
        sources.groups(Data(table=path, frames=41, fps=8.0, resolution=16), "pairs")


ODD: dict[str, tuple[Callable[[Path], Path], tuple[int, int]]] = {
    "odd.mp4": (lambda path: sized(path, 17, 31), (17, 31)),
    "odd_lossy.mp4": (lambda path: encode(path, moving(12, 34, 62), codec="mpeg4"), (34, 62)),
    "tiny.mkv": (lambda path: sized(path, 2, 2), (2, 2)),
    "wide.mkv": (lambda path: sized(path, 8, 96), (8, 96)),
    "turned.mp4": (lambda path: turned(encode(path.with_name("t.mp4"), moving(12, 50, 70)), path, 90), (70, 50)),
    "loud.mp4": (lambda path: steady(path, 12, sound=True), (16, 24)),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_clips_are_kept_and_have_their_own_size(tmp_path: Path, name: str) -> None:
    make, size = ODD[name]
    make(tmp_path / name)
    path = table(tmp_path, name)
    groups, summary = sources.groups(Data(table=path, frames=8, fps=8.0, resolution=16), "pairs")
    assert len(groups) == 2 and "dropped" not in summary
    found = clip_frames(groups[0].media[0], fps=8.0, frames=8)
    assert found.shape == (8, *size, 3) and found.dtype == np.uint8
    assert clip_facts(groups[0].media[0])[2:] == size
    plain = clip_frames(groups[0].media[0], fps=None, frames=12)
    assert np.array_equal(found, plain[[0, 1, 3, 4, 6, 7, 9, 10]]), "12 a second to 8: two of three"


def test_sound_changes_nothing(tmp_path: Path) -> None:
    silent, loud = steady(tmp_path / "a.mp4", 12), steady(tmp_path / "b.mp4", 12, sound=True)
    assert np.array_equal(clip_frames(silent, fps=8, frames=8), clip_frames(loud, fps=8, frames=8))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_pair_of_a_variable_and_a_faster_longer_clip(tmp_path: Path, suffix: str) -> None:
    """Both play the same second and an eighth at 8 a second, each by its own times."""
    times = [Fraction(n, 12) for n in (0, 1, 2, 3, 4, 10, 11, 12, 13)]
    timed(tmp_path / f"jumpy{suffix}", numbered(9), times)
    steady(tmp_path / "good.mp4", 36, 24)
    item = {"prompt": "p", "media": [f"jumpy{suffix}", "good.mp4"], "label": "A"}
    path = put_json(tmp_path / "t.jsonl", [item])
    (row,), dropped = sources.long_enough(read_preferences(path).rows, lambda each: each.media, wanted(path))
    assert dropped == [] and [one.frames for one in row.resampled or ()] == [9, 9]
    assert [round(one.from_fps, 1) for one in row.resampled or ()] == [7.7, 24.0]
    jumpy, steadily = (numbers(clip_frames(ref, fps=8.0, frames=9)) for ref in row.media)
    assert jumpy == [0, 1, 3, 4, 4, 4, 4, 5, 7] and steadily == [0, 3, 6, 9, 12, 15, 18, 21, 24]


@needs(REAL_CLIP)
def test_a_real_clip(tmp_path: Path) -> None:
    assert clip_facts(REAL_CLIP) == (310, 30.0, 240, 426)
    every = clip_frames(REAL_CLIP, fps=None, frames=310)
    assert np.array_equal(clip_frames(REAL_CLIP, fps=15, frames=33), every[0:66:2])
    assert np.array_equal(clip_frames(REAL_CLIP, fps=16, frames=3, at=0.0), every[[0, 1, 3]])
    half = tmp_path / "half.mkv"
    half.write_bytes(REAL_CLIP.read_bytes()[: REAL_CLIP.stat().st_size // 2])
    with pytest.raises(MediaError, match="is truncated"):
        clip_facts(half)


def test_pictures_keep_the_reason_that_they_had(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", read_image(png(1)))
    (tmp_path / "b.png").write_bytes(b"no picture")
    path = put_json(tmp_path / "p.jsonl", [{"prompt": "p", "media": ["a.png", "b.png"], "label": "A"}])
    with pytest.raises(ValueError, match="1 undecodable image"):
        read_preferences(path)


def test_damage_is_seen_every_time(tmp_path: Path) -> None:
    """FFmpeg that decodes frames in threads forgets in some of a hundred reads that one is damaged."""
    clip = damaged_matroska(tmp_path / "damaged.mkv")
    for _ in range(100):
        with pytest.raises(MediaError, match="damaged"):
            read_video(clip)
