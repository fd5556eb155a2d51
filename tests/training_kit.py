"""What the training tests share: a few pictures, a preference table, a config of a few tiny steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.jobs import TrainConfig
from mmalign.media import write_image
from mmalign.methods import PREFERENCES
from mmalign.records import MediaRef
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.tasks.preference import PreferenceTask

PROMPTS = ("a red circle", "a blue square", "a large green triangle", "a photo of a small circle")


def preferences(folder: Path, pairs: int = 4, ties: int = 0, shape: tuple[int, int] = (32, 32)) -> Path:
    """A table of `pairs` decided pairs and then `ties` undecided ones; winners are dark, losers bright."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(pairs + ties):
        places = [folder / f"{i}-{side}.png" for side in ("w", "l")]
        for place, low in zip(places, (0, 128), strict=True):
            write_image(place, rng.integers(low, low + 128, (*shape, 3), dtype=np.uint8))
        media = (MediaRef(str(places[0])), MediaRef(str(places[1])))
        verdict = "A" if i < pairs else "same"
        rows.append(PreferenceRow(PROMPTS[i % len(PROMPTS)], media, label={"overall": verdict}))
    write_preferences(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


def captioned(folder: Path, count: int = 4) -> Path:
    """A media table for supervised fine-tuning."""
    rng = np.random.default_rng(1)
    lines = []
    for i in range(count):
        write_image(folder / f"{i}.png", rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        lines.append(json.dumps({"sample": str(i), "media": f"{i}.png", "prompt": PROMPTS[i % len(PROMPTS)]}))
    (folder / "media.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "media.jsonl"


def lists(folder: Path, sizes: tuple[int, ...] = (4, 4, 3, 2), **changes: Any) -> Path:
    """A table of rows with scores in (0, 1), of different lengths; pictures get brighter with their rank."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, size in enumerate(sizes):
        media = []
        for j in range(size):
            write_image(folder / f"{i}-{j}.png", rng.integers(40 * j, 40 * j + 90, (32, 32, 3), dtype=np.uint8))
            media.append(MediaRef(str(folder / f"{i}-{j}.png")))
        scores = {"quality": tuple(0.9 - 0.2 * j + 0.01 * i for j in range(size))}
        rows.append(PreferenceRow(PROMPTS[i % len(PROMPTS)], tuple(media), scores=scores, **changes))
    write_preferences(folder / "lists.jsonl", rows)
    return folder / "lists.jsonl"


def settings(output: Path, model: Path, table: Path, **changes: Any) -> dict[str, Any]:
    """A preference run of four steps on 32x32 pictures; `changes` are dotted keys with __ for the dot."""
    tree: dict[str, Any] = {
        "task": "preference",
        "output": str(output),
        "model": {"path": str(model)},
        "data": {"table": str(table), "resolution": 32, "cache_dir": str(output.parent / "cache"), "verify": False},
        "loss": {"kind": "diffusion_dpo", "beta": 500.0},
        "lora": {"rank": 4},
        "optim": {"steps": 4, "batch_size": 2, "lr": 1e-3, "weight_decay": 0.0},
        "log": {"trackers": [], "memory": False},
        "device": "cpu",
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        place = tree
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return tree


def config(output: Path, model: Path, table: Path, **changes: Any) -> TrainConfig:
    """`settings` through the schema."""
    return TrainConfig.model_validate(settings(output, model, table, **changes))


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def moved(settings: TrainConfig, noise: float = 0.05) -> PreferenceTask:
    """A preference task whose trained weights have moved by `noise`, so that policy and reference differ."""
    task = PreferenceTask(settings, torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in task.modules.parameters():
            if parameter.requires_grad:
                parameter += noise * torch.randn(parameter.shape, generator=generator)
    return task


_FIELDS = {cls.model_fields["kind"].default: cls.model_fields for cls in PREFERENCES}


def method_settings(tmp_path: Path, model: Path, table: Path, kind: str, **changes: Any) -> Any:
    """A run of one objective, with a beta that moves tiny models."""
    loss = {"kind": kind, **({"beta": 50.0} if "beta" in _FIELDS[kind] and kind not in ("mapo", "dspo") else {})}
    return config(tmp_path / "run", model, table, loss=loss, **changes)
