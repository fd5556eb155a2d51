"""Early stopping on a reward that is not trained on: the last thing that a run that hacks its reward still says."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.discovery import load_evaluator
from mmalign.evaluation import Evaluator
from mmalign.jobs import TrainConfig
from mmalign.paths import find
from mmalign.pixel_scores import PixelScorer
from mmalign.tasks import finish
from mmalign.tasks.state import Lagged


class Watch(nn.Module):
    """Draws the same pictures every so often, scores them, and keeps the weights that scored best.

    What it remembers are buffers, so that a resumed run stops where an unbroken one would have.
    """

    best: Tensor
    looks: Tensor
    since: Tensor

    def __init__(self, run: TrainConfig, adapter: Any):
        super().__init__()
        config = run.guards.early_stopping
        assert config is not None
        self._run, self._config, self._adapter = run, config, adapter
        evaluator = load_evaluator(config.evaluator.name, config.evaluator.params, device=adapter.device)
        if not isinstance(evaluator, Evaluator):
            raise ValueError(f"early_stopping.evaluator: {config.evaluator.name} scores whole sets, not pictures")
        lines = find(config.prompts).read_text(encoding="utf-8").splitlines() if find(config.prompts).is_file() else []
        self._prompts = [line.strip() for line in lines if line.strip()][: config.limit]
        if not self._prompts:
            raise ValueError(f"early_stopping.prompts: {config.prompts} holds no prompts; write one per line")
        rate = (run.data.fps or adapter.fps) if adapter.modality == "video" else None
        self._scorer = PixelScorer(evaluator, config.evaluator.name, fps=rate)
        self._sign = self._scorer.sign
        self._weights = Lagged(adapter.denoiser)
        self.register_buffer("best", torch.zeros((), dtype=torch.float64))  # of no meaning before the first look
        self.register_buffer("looks", torch.zeros((), dtype=torch.int64))
        self.register_buffer("since", torch.zeros((), dtype=torch.int64))

    def due(self, step: int) -> bool:
        return step % self._config.every == 0

    @property
    def best_reward(self) -> float:
        """NaN before the first look that gave one."""
        return self._sign * self.best.item() if self.looks else float("nan")

    @property
    def over(self) -> bool:
        """Whether it has been enough already."""
        return int(self.since) >= self._config.patience

    @torch.no_grad()
    def reward(self) -> float:
        """The mean reward now; NaN where nothing could be scored."""
        starts = range(0, len(self._prompts), self._config.batch_size)
        scores = [score for start in starts for score in self._scores(start) if not np.isnan(score)]
        return float(np.mean(scores)) if scores else float("nan")

    def look(self) -> tuple[float, bool]:
        """The mean reward now, and whether it has not been beaten for `patience` looks."""
        reward = self.reward()
        first = not self.looks and np.isfinite(reward)
        if first or self._sign * reward > self.best + self._config.min_gain:
            self.looks += 1
            self.best.fill_(self._sign * reward)
            self.since.zero_()
            self._weights.refresh()
        else:
            self.since += 1
        return reward, self.over

    def _scores(self, start: int) -> list[float]:
        wanted, adapter = self._config, self._adapter
        prompts = self._prompts[start : start + wanted.batch_size]
        seeds = range(wanted.seed + start, wanted.seed + start + len(prompts))
        pictures = finish.draw(adapter, self._run, prompts, seeds, wanted.steps, wanted.guidance_scale)
        pixels = torch.from_numpy(np.stack(pictures)).movedim(-1, 1) / 255
        named = self._scorer.named(pixels, prompts)
        name = wanted.subscore or next(iter(named))
        if name not in named:
            raise ValueError(f"early_stopping.subscore: {wanted.evaluator.name} gives {', '.join(named)}, not {name!r}")
        scores: list[float] = named[name].tolist()
        return scores

    def best_weights(self) -> Any:
        """A context in which the denoiser has the weights that scored best; the last ones where nothing was scored."""
        return self._weights.used() if self.looks else nullcontext()
