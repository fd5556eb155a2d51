"""Clips that are folders of pictures, single pictures or GIFs: the same frames and scores as those of a video file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmalign.frame_plans import AllFrames, Middle, StrideFps
from mmalign.jobs import ScoreConfig
from mmalign.media import MediaError, content_hash, write_video
from mmalign.report_media import inline, thumbnail
from mmalign.results import read_results
from mmalign.score import run
from mmalign.shapes.clip import render_clip, sample_moving
from mmalign.shapes.motion import parse_motion
from mmalign.stills import are_stills, folder_hash, frame_files, read_stills
from mmalign.tables import MediaRow, write_media_table


def frames(count: int = 6, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, *size, 3), dtype=np.uint8)


def folder(path: Path, pixels: np.ndarray, name: str = "frame{}.png") -> Path:
    path.mkdir()
    for number, frame in enumerate(pixels):
        Image.fromarray(frame).save(path / name.format(number))
    return path


def test_numbers_order_the_frames_and_other_files_are_left_out(tmp_path: Path) -> None:
    place = folder(tmp_path / "clip", frames(12))
    (place / "notes.txt").write_text("x")
    (place / ".hidden.png").write_bytes(b"x")
    assert [file.name for file in frame_files(place)] == [f"frame{n}.png" for n in range(12)]
    found = read_stills(place, AllFrames())
    assert found.fps == 8.0 and found.indices == tuple(range(12))
    assert all(np.array_equal(found.picked[n], frames(12)[n]) for n in range(12))
    assert read_stills(place, StrideFps(8), fps=24.0).indices == (0, 3, 6, 9)
    assert sorted(read_stills(place, Middle(4)).picked) == [1, 4, 7, 10]


def test_the_hash_is_that_of_the_frames(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "a", frames()), folder(tmp_path / "b", frames(), "{:05d}.png")
    assert folder_hash(one) == folder_hash(other)
    (other / "00000.png").rename(other / "00009.png")
    assert folder_hash(one) != folder_hash(other)
    single = folder(tmp_path / "c", frames(1))
    assert folder_hash(single) != content_hash(single / "frame0.png")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("empty", "is a folder without pictures; name one file"),
        ("sizes", r"frames of several sizes \(.*2.png is 8x8 after 48x32\); resize"),
        ("broken", "frame1.png: .*truncated or damaged"),
        ("bytes", "has 6 frames to look at, more than max_bytes=9,215"),
        ("pixels", "more than max_pixels=1,000"),
    ],
)
def test_what_is_refused(tmp_path: Path, case: str, words: str) -> None:
    place = folder(tmp_path / "clip", frames(0 if case == "empty" else 6))
    if case == "sizes":
        Image.new("RGB", (8, 8)).save(place / "frame2.png")
    if case == "broken":
        data = (place / "frame1.png").read_bytes()
        (place / "frame1.png").write_bytes(data[: len(data) // 2])
    limits = {"bytes": {"max_bytes": 9215}, "pixels": {"max_pixels": 1000}}.get(case, {})
    with pytest.raises(MediaError, match=words):
        read_stills(place, Middle(2) if case == "broken" else AllFrames(), **limits)


def test_a_video_file_that_holds_a_picture_is_still_a_mistake(tmp_path: Path) -> None:
    Image.fromarray(frames()[0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    assert not are_stills(tmp_path / "a.mp4") and not are_stills(tmp_path / "a.gif")


def scores(table: Path, output: Path, **settings: object) -> dict[str, tuple[float | None, str | None]]:
    specs = [{"name": "shapes_motion"}]
    run(ScoreConfig(table=table, output=output, evaluators=specs, **settings), plugins=False)
    rows = read_results(output).rows
    return {row["sample"]: (row["score"], row["reason"]) for row in rows if row["subscore"] in ("VQ", "score")}


def test_scores_are_those_of_the_video_file(tmp_path: Path) -> None:
    """A lossless video, its frames as a folder, one picture, an empty folder: each has its row, one process or two."""
    rng = np.random.default_rng(3)
    prompt = "a red circle moves left on a grey background"
    pixels = render_clip(sample_moving(parse_motion(prompt), rng))
    write_video(tmp_path / "a.mp4", torch.from_numpy(pixels).permute(0, 3, 1, 2), 8.0, lossless=True)
    folder(tmp_path / "b", pixels)
    Image.fromarray(pixels[0]).save(tmp_path / "c.png")
    (tmp_path / "d").mkdir()
    files = {"a": "a.mp4", "b": "b", "c": "c.png", "d": "d"}
    rows = [MediaRow(name, prompt, str(tmp_path / file), "video") for name, file in files.items()]
    rows.append(MediaRow("e", prompt, str(tmp_path / "b"), "video", fps=8.0))
    write_media_table(tmp_path / "table.jsonl", rows)
    found = scores(tmp_path / "table.jsonl", tmp_path / "out")
    assert found["a"][0] is not None and found["a"] == found["b"] == found["e"]
    assert found["d"][0] is None and "folder without pictures" in str(found["d"][1])
    assert found == scores(tmp_path / "table.jsonl", tmp_path / "two", processes=2)
    tile = thumbnail(tmp_path / "b", True, 14_000)
    assert tile.video and tile.uri and inline(tmp_path / "a.mp4", 64).video
