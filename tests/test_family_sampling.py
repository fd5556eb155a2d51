"""`mmalign sample` with every transformer family: batches, schedulers, sides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import MAKERS, PROMPTS, SIDE

from mmalign import sample
from mmalign.jobs import SampleConfig
from mmalign.jobs_inputs import Data, Model
from mmalign.media import read_image
from mmalign.media_table import read_media_table
from mmalign.models import base
from mmalign.tasks.inputs import check_sizes


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("families")
    return {name: make(home / name) for name, make in MAKERS.items()}


def _sample(name: str, folders: dict[str, Path], home: Path, **changes: Any) -> SampleConfig:
    home.mkdir(exist_ok=True)
    (home / "prompts.txt").write_text("\n".join(PROMPTS))
    tree = {"model": {"path": folders[name]}, "prompts": home / "prompts.txt", "output": home / "out", "steps": 4,
            "height": SIDE, "width": SIDE, "device": "cpu", "guidance_scale": 3.0, **changes}  # fmt: skip
    return SampleConfig.model_validate(tree)


@pytest.mark.parametrize("name", MAKERS)
def test_a_batch_is_sampled_as_its_pictures_are_alone(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for size in (1, 2):
        made = _sample(name, folders, tmp_path / str(size), batch_size=size, negative_prompt="blue")
        found.append([read_image(row.media).astype(int) for row in read_media_table(sample.run(made))])
    for alone, together in zip(*found, strict=True):
        assert alone.shape == (SIDE, SIDE, 3)
        assert abs(alone - together).max() <= 1


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("scheduler", ["euler", "dpm++", "ddim"])
def test_other_schedulers_draw_nearly_the_same(
    name: str, scheduler: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """With many steps every solver ends where the model's own does."""
    device = torch.device("cpu")
    many = {"steps": 25, "guidance_scale": 1.0, "limit": 1}
    own = sample.load(_sample(name, folders, tmp_path, **many), device)
    other = _sample(name, folders, tmp_path, scheduler=scheduler, **many)
    wanted = sample.requests(other)
    if own.process.kind == "flow" and scheduler not in own.flow_schedulers:
        with pytest.raises(ValueError, match=rf"scheduler: {re.escape(scheduler)}: .* use own or euler"):
            sample.load(other, device)
        return
    pictures = [
        next(iter(sample.generate(loaded, wanted, other)))[1]
        for loaded in (own, sample.load(other, device))
    ]  # fmt: skip
    for mine, theirs in zip(*pictures, strict=True):
        assert abs(mine.astype(int) - theirs).mean() < 3


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++sde"])
def test_what_a_flow_is_not_sampled_with(scheduler: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"scheduler: {re.escape(scheduler)}: .*; use own or euler or dpm\+\+"):
        sample.run(_sample("sd3", folders, tmp_path, scheduler=scheduler))
    assert not (tmp_path / "out").exists()


def test_sides_fit_the_transformers_patch(folders: dict[str, Path]) -> None:
    loaded = base.load(Model(path=folders["flux-schnell"]))
    assert (loaded.vae_factor, loaded.patch, loaded.multiple) == (4, 2, 8)
    with pytest.raises(ValueError, match=r"28 is not a multiple of the autoencoder's 4, times .*patch of 2; use 32"):
        check_sizes(loaded, Data(table="pairs.jsonl", resolution=28))
