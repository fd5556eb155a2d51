"""Every objective that fits a scorer takes a step, has a line and a config; the configs run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting_kit import CPU, LINEAR, SHAPES, config, pictures
from training_kit import records

from mmalign import train
from mmalign.commands.inspect import Kind, listing
from mmalign.config import load
from mmalign.jobs import TrainConfig
from mmalign.methods import REWARDS
from mmalign.methods_reward import Fitting
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.tasks.reward import RewardTask

KINDS = {cls.model_fields["kind"].default: cls for cls in REWARDS if issubclass(cls, Fitting)}


# -------------------------------------------------------------------------------------------- every objective and head


def head_for(kind: str) -> dict[str, Any]:
    if KINDS[kind].towers:
        return {}
    return {"train": "head", "head": {"kind": "gaussian"} if KINDS[kind].spread else LINEAR}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_objective(kind: str, tmp_path: Path) -> None:
    loss, data = {"kind": kind}, {**SHAPES, "shapes": {**SHAPES["shapes"], "per_prompt": 3}}  # type: ignore[dict-item]
    if kind == "ordinal":
        rows = [
            PreferenceRow("a", media, scores={"quality": grades})
            for media, grades in zip(_threes(tmp_path), [(1, 3, 5), (2, 2, 4), (5, 1, 1), (3, 4, 2)], strict=True)
        ]
        write_preferences(tmp_path / "t.jsonl", rows)
        data = {"table": str(tmp_path / "t.jsonl")}
    task = RewardTask(config(tmp_path / "run", data, loss=loss, reward=head_for(kind)), CPU)
    value, metrics = task.loss(task.load([(i, 0) for i in range(4)]))
    value.backward()
    gradients = [p.grad for p in task.modules.parameters() if p.grad is not None]
    assert torch.isfinite(value) and sum(g.abs().sum() for g in gradients) > 0
    assert 0 <= metrics["pairwise_accuracy"] <= 1
    if kind == "ordinal":
        assert task.modules["thresholds"].first.grad is not None


def _threes(folder: Path) -> list[tuple[Any, ...]]:
    media = pictures(folder / "images", 12)
    return [tuple(media[i : i + 3]) for i in range(0, 12, 3)]


# ------------------------------------------------------------------------------------------------- what belongs to each

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {path: load(TrainConfig, path) for path in sorted((ROOT / "configs" / "train" / "reward").glob("*.yaml"))}
OWN_DATA = [path for path, made in CONFIGS.items() if made.data.shapes and not made.reward.denoise]


@pytest.mark.parametrize("cls", REWARDS, ids=lambda cls: cls.__name__)
def test_every_objective_has_a_line_and_a_config(cls: Any) -> None:
    kind = cls.model_fields["kind"].default
    page = (ROOT / "docs" / "methods" / "reward_losses.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{kind}` | ")]
    for path in re.findall(r"\(\.\./\.\./(configs/\S+?\.yaml)\)", line):
        assert load(TrainConfig, ROOT / path).loss.kind == kind
    assert "configs/" in line
    listed = {row["name"]: row for row in listing(Kind.methods)}
    assert listed[kind]["task"] == "reward"


@pytest.mark.parametrize("path", OWN_DATA, ids=lambda path: path.stem)
def test_configs_on_the_shapes_world_run(path: Path, tmp_path: Path) -> None:
    changes = [
        f"output={tmp_path / 'run'}", "optim.steps=2", "optim.batch_size=4", "optim.warmup=1", "log.trackers=[]",
        "data.shapes.scenes=12", "data.cache=memory", "log.every=1",
    ]  # fmt: skip
    run = train.run(load(TrainConfig, path, changes))
    assert len(records(run)) == 2 and any((run / "export").glob("*.safetensors"))


def test_every_head_has_a_config() -> None:
    used = {made.reward.head.kind for made in CONFIGS.values() if made.reward.head}
    assert used == {"linear", "gaussian", "gpm", "pal", "vpl"}
