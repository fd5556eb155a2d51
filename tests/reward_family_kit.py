"""Runs that fit a small network of each family which reads picture and prompt at once, and their scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fitting_kit import CPU, config
from safetensors.torch import load_file

from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch
from mmalign.tasks.reward import RewardTask

BRIGHT = {"label": {"overall": "B"}}
SMALL = {"max_pixels": 56 * 56}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "image_reward": {"reward": {"unlocked_image": 1, "unlocked_text": 1}},
    "qwen2_vl": {"reward": {"vlm": SMALL, "unlocked_image": 2}, "lora": LORA},
}
EVALUATORS = {"image_reward": ("image_reward", "checkpoint"), "qwen2_vl": ("vlm_reward", "model")}
WEIGHTS = {"image_reward": "ImageReward.safetensors", "qwen2_vl": "model.safetensors"}


def run_of(family: str, base: Path, steps: int = 6, **changes: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(base), "family": family},
        "optim": {"steps": steps, "batch_size": 8, "lr": 3e-3, "weight_decay": 0.1},
        "checkpoint": {"every": 4},
        **CASES[family],
        **changes,
    }


def task_at(family: str, base: Path, pairs: Path, run: Path | None = None, **changes: Any) -> RewardTask:
    """The task of such a run, with the weights of its last checkpoint, in evaluation mode."""
    settings = run_of(family, base, **changes)
    task = RewardTask(config(Path("unused"), {"table": str(pairs)}, **settings), CPU)
    if run:
        kept = load_file(sorted((run / "checkpoints").glob("step-*"))[-1] / "weights.safetensors")
        _, unexpected = task.modules.load_state_dict(
            {name.removeprefix("trained."): value for name, value in kept.items()}, strict=False
        )
        assert kept and not unexpected
    task.modules.eval()
    return task


def scored(family: str, folder: Path, images: list[torch.Tensor], prompts: list[str]) -> Any:
    name, key = EVALUATORS[family]
    evaluator: Any = load_evaluator(name, {key: folder}, "cpu")
    return evaluator.score(Batch(images=images, frames=[image[None] for image in images], prompts=prompts))
