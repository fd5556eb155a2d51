"""What the tests of fitted scorers share: tables of small pictures judged by users, and configs of quick runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign import train
from mmalign.config import build
from mmalign.jobs import TrainConfig
from mmalign.media import read_image, write_image
from mmalign.records import MediaRef
from mmalign.tables import PreferenceRow, write_preferences

CPU = torch.device("cpu")
CLIP = "assets/shapes-clip"
PROMPTS = ("a red circle", "a blue square", "a large green triangle", "a small circle")
LINEAR = {"kind": "linear", "hidden": [16]}
SHAPES = {"shapes": {"scenes": 12, "annotator": "mixed", "votes": 3}, "ties": "soft", "soft_labels": True}  # as data


def pictures(folder: Path, count: int = 16) -> list[MediaRef]:
    """Plain pictures of 64x64 pixels, each brighter than the one before."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        level = 20 + 210 * i // count
        write_image(folder / f"{i}.png", rng.integers(level, level + 24, (64, 64, 3), dtype=np.uint8))
    return [MediaRef(str(folder / f"{i}.png")) for i in range(count)]


def tensors(paths: list[Path]) -> list[torch.Tensor]:
    """uint8 [3, H, W] of picture files."""
    return [torch.from_numpy(read_image(str(path)).copy()).permute(2, 0, 1) for path in paths]


def table(folder: Path, rows: int = 24, **changes: Any) -> Path:
    """Pairs judged by four users: users 0 and 2 like bright pictures, 1 and 3 dark ones."""
    rng, media = np.random.default_rng(1), pictures(folder / "images")
    written = []
    for i in range(rows):
        a, b = sorted(rng.choice(len(media), 2, replace=False).tolist())
        bright = i % 2 == 0
        judged: dict[str, Any] = {"label": {"overall": "B" if bright else "A"}}
        written.append(
            PreferenceRow(PROMPTS[i % 4], (media[a], media[b]), user_id=f"user-{i % 4}", **(judged | changes))
        )
    write_preferences(folder / "pairs.jsonl", written)
    return folder / "pairs.jsonl"


def settings(output: Path, data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of a few steps on frozen towers of the shapes world; `changes` replace whole parts."""
    return {
        "task": "reward",
        "output": str(output),
        "model": {"path": CLIP},
        "data": {"verify": False, "cache": "memory", **data},
        "loss": {"kind": "bradley_terry"},
        "reward": {"train": "head", "head": LINEAR},
        "optim": {"steps": 4, "batch_size": 8, "lr": 3e-3},
        "log": {"trackers": []},
        "device": "cpu",
        **changes,
    }


def config(output: Path, data: dict[str, Any], **changes: Any) -> TrainConfig:
    """`settings` through the schema."""
    return build(TrainConfig, settings(output, data, **changes), "test")


def fit(output: Path, data: dict[str, Any], *, resume: bool = False, **changes: Any) -> Path:
    """The export folder of such a run."""
    return train.run(config(output, data, **changes), resume=resume) / "export"
