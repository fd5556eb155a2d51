"""`mmalign sample` with every video family: clips in files, batches, lengths, rates; folders with faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_kit import check_faults_are_named
from video_kit import FAMILIES, FRAMES, PROMPTS, SIDE, folders_of

from mmalign import sample
from mmalign.jobs import SampleConfig
from mmalign.media import clip_facts, clip_frames
from mmalign.media_table import read_media_table


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders_of(FAMILIES, tmp_path_factory)


def _config(model: Path, home: Path, **changes: Any) -> SampleConfig:
    home.mkdir(exist_ok=True)
    (home / "prompts.txt").write_text("\n".join(PROMPTS))
    tree = {"model": {"path": model}, "prompts": home / "prompts.txt", "output": home / "out", "steps": 2,
            "height": SIDE, "width": SIDE, "frames": FRAMES, "device": "cpu", "guidance_scale": 3.0, "lossless": True,
            **changes}  # fmt: skip
    return SampleConfig.model_validate(tree)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_sampled_as_its_clips_are_alone(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for size in (1, 2):
        made = _config(folders[name], tmp_path / str(size), batch_size=size, negative_prompt="blue", fps=5)
        rows = list(read_media_table(sample.run(made)))
        assert [row.prompt for row in rows] == PROMPTS
        for row in rows:
            facts = clip_facts(row.media)
            assert (facts.num_frames, facts.fps, facts.height, facts.width) == (FRAMES, 5, SIDE, SIDE)
        found.append([clip_frames(row.media, fps=None, frames=FRAMES).astype(int) for row in rows])
    for alone, together in zip(*found, strict=True):
        assert abs(alone - together).max() <= 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_wrong_length_is_refused_before_anything_is_written(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    frames = 40 if name == "animatediff" else 8
    with pytest.raises(ValueError, match=rf"frames: {frames} frames do not fit"):
        sample.run(_config(folders[name], tmp_path, frames=frames))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_is_small_and_its_faults_are_named(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    parts = ("unet" if name == "animatediff" else "transformer", "text_encoder", "vae")
    check_faults_are_named(folders[name], parts, tmp_path)
