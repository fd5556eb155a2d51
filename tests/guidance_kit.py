"""What tests of guidance strategies share: a reward with a gradient, and a model that is asked along a trajectory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.config import Strict
from mmalign.evaluation import Batch, Evaluator, Uniform
from mmalign.guidance.denoising import Denoising, begin
from mmalign.guidance.rewards import Rewards
from mmalign.jobs import SampleConfig
from mmalign.jobs_align import RewardSpec
from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.pixel_scores import PixelScorer

PROMPTS = ["a red circle", "a large green square", "a blue circle"]
SEEDS = [5, 6, 7]


class Brightness(Evaluator):
    """Mean of the pixels, from 0 to 1, of images and of all frames of clips."""

    needs = frozenset({"frames"})
    modality = frozenset({"image", "video"})
    frames = Uniform(9)
    differentiable = True
    licence = source = "test"

    def score(self, batch: Batch) -> Tensor:
        return torch.stack([clip.double().mean() / 255 for clip in batch.clips()])

    def score_tensor(self, images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))


def brightness(weight: float = 1.0) -> Rewards:
    """The reward that pictures are bright."""
    scorer = PixelScorer(Brightness(Strict(), {}, torch.device("cpu")), "brightness", frames=4, fps=8.0)
    return Rewards([RewardSpec(name="brightness", weight=weight)], [scorer])


def asked(model: Path, settings: Any, rewards: Rewards, rows: slice = slice(None), **changes: Any) -> Denoising:
    """A batch of `PROMPTS`, or of some of them, whose costs the rewards count in too."""
    tree = {"model": {"path": str(model)}, "prompts": "unused.txt", "output": "unused", "steps": 4, "height": 32,
            "width": 32, "guidance_scale": 2.0, "batch_size": 4, **changes}  # fmt: skip
    config = SampleConfig.model_validate(tree)
    adapter = base.load(Model(path=model))
    found = begin(adapter, PROMPTS[rows], SEEDS[rows], config, strategy=settings.kind, lower=settings.lower)
    rewards.spent = found.spent
    return found


def unheard(share: float, reward: float | None = None) -> None:
    """A bar that nobody watches."""
