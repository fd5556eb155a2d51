"""What the training tests share: a few pictures, a preference table, a config of a few tiny steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.jobs import TrainConfig
from mmalign.media import write_image
from mmalign.records import MediaRef
from mmalign.tables import PreferenceRow, write_preferences

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
        "log": {"trackers": []},
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
