"""Judged media as noisy latents, for scorers that read these: times and noise drawn, moments and prompts cached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.latent_reward import TIMES, clean_time
from mmalign.backbones.reward_folder import Grades
from mmalign.backbones.reward_heads import Features
from mmalign.jobs import TrainConfig
from mmalign.models.adapter import Condition
from mmalign.progress import track
from mmalign.reward_models.latent import LatentFamily
from mmalign.tasks import buckets
from mmalign.tasks.inputs import Inputs, View, draw, timesteps, unit_noise

Key = tuple[object, ...]
"""What a draw is of: a group's identity and the epoch."""

MEASURED = 512  # media, over which mean and deviation of the exported scores are taken
FITTED = 64  # media, on which the scale of features is fitted


class NoisedMedia:
    """A family on noisy latents as the reward task asks for one (`mmalign.reward_models`), with draws.

    The media of a group have one time, one crop and one flip. Times are drawn evenly over the schedule unless
    `timesteps.density` says otherwise: a scorer that guides is asked along all of it. Noise is each medium's own by
    default. With shared noise it cancels in the difference of two scores: on x_t^w - x_t^l = signal (x^w - x^l) a
    linear reward is as sure at the last timestep as at the first, and its gradient grows as 1 / signal. With noise of
    their own, latents at the last timestep say little, and the fitted reward says as much.
    """

    name, towers = "latent", False

    def __init__(self, family: LatentFamily, config: TrainConfig):
        self.family, self.config = family, config
        if config.data.frame_buckets:
            raise ValueError("data.frame_buckets: a reward on latents is fitted to clips of one length; drop it")
        self.module, self.width = family.module, family.width
        self.reader = Inputs(family.adapter, config.model.model_copy(update={"family": "auto"}), config.data)
        self.size = buckets.targets([], config.data, family.adapter).size(0)
        wanted = config.timesteps
        self.times = wanted.model_copy(update={"density": "uniform"}) if wanted.density == "auto" else wanted

    def inputs(self, media: Sequence[Any], prompts: Sequence[str], keys: Sequence[Key]) -> dict[str, Any]:
        """CPU work: what is known of each medium, and the generators of its draws."""
        seed, data = self.config.seed, self.config.data
        views = [View.draw(data, draw(seed, "view", *key)) for key in keys]
        fetched = [self.reader.fetch(m, view, self.size) for m, view in zip(media, views, strict=True)]
        own = [(*key, medium.hash()) for key, medium in zip(keys, media, strict=True)]
        return {"fetched": fetched, "prompts": list(prompts), "keys": list(keys), "own": own}

    def features(self, inputs: dict[str, Any]) -> Features:
        noisy, t, condition = self._noisy(inputs)
        found = self.family.scores(noisy, t, condition)
        return Features(own=found[:, 0] if found.shape[1] == 1 else found)

    def _noisy(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Condition]:
        seed, adapter, latent = self.config.seed, self.family.adapter, self.config.reward.latent
        latents, condition = self._clean(inputs, [draw(seed, "posterior", *key) for key in inputs["own"]])
        if not latent.noised:
            return latents, clean_time(adapter.process, latents), condition
        shape = tuple(latents.shape[1:])
        t = timesteps(adapter, self.times, shape, [draw(seed, "time", *key) for key in inputs["keys"]])
        whose = inputs["keys"] if latent.noise == "shared" else inputs["own"]
        unit = unit_noise(adapter, shape, [draw(seed, "noise", *key) for key in whose])
        return adapter.process.noisy(latents, t, unit), t, condition

    def _clean(self, inputs: dict[str, Any], generators: list[torch.Generator]) -> tuple[Tensor, Condition]:
        latents = self.reader.latents(inputs["fetched"], generators)
        condition = self.reader.conditions(inputs["prompts"])
        sizes = torch.stack([item.sizes for item in inputs["fetched"]])
        return latents, self.family.adapter.add_size(condition, sizes)

    @torch.no_grad()
    def fit(self, media: Sequence[Any], prompts: Sequence[str]) -> None:
        """Statistics of the features of some of these media along the schedule, on which the head begins."""
        step = max(1, len(media) // FITTED)
        media, prompts, at_once = media[::step][:FITTED], prompts[::step][:FITTED], self.config.optim.batch_size
        parts = [slice(start, start + at_once) for start in range(0, len(media), at_once)]
        for number in track(range(TIMES), "fitting the features' scale", TIMES):
            self.module.fit_scale(number, (self._hidden_at(number, media[part], prompts[part]) for part in parts))

    def _hidden_at(self, number: int, media: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """What the head is given of media at one of the times of which statistics are kept."""
        adapter, seed = self.family.adapter, self.config.seed
        inputs = self.inputs(media, prompts, [("fit", m.hash()) for m in media])
        latents, condition = self._clean(inputs, [draw(seed, "posterior", *key) for key in inputs["own"]])
        t, process = clean_time(adapter.process, latents), adapter.process
        if self.config.reward.latent.noised:
            last = 1 if process.alphas_cumprod is None else len(process.alphas_cumprod) - 1
            t = (t + number / (TIMES - 1) * last).to(t.dtype)
            generators = [draw(seed, "noise", number, *key) for key in inputs["own"]]
            latents = process.noisy(latents, t, unit_noise(adapter, tuple(latents.shape[1:]), generators))
        found: Tensor = self.module.hidden(adapter, latents, t, condition)
        return found

    @torch.no_grad()
    def measure(self, media: Sequence[Any], prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each axis over clean media (some of them, if they are many), [axes] on the CPU."""
        step = max(1, -(-len(media) // MEASURED))
        media, prompts, found = media[::step], prompts[::step], []
        at_once = self.config.optim.batch_size
        starts = range(0, len(media), at_once)
        for start in track(starts, "measuring the scores' unit", len(starts)):
            part = slice(start, start + at_once)
            inputs = self.inputs(media[part], prompts[part], [("measure", m.hash()) for m in media[part]])
            seeds = [draw(self.config.seed, "posterior", *key) for key in inputs["own"]]
            latents, condition = self._clean(inputs, seeds)
            found.append(self.family.scores(latents, clean_time(self.family.adapter.process, latents), condition))
        scores = torch.cat(found).double().cpu()
        scores = scores[:, :1] if self.family.gaussian else scores
        return scores.mean(0), scores.std(0, unbiased=False).clamp(min=1e-6)

    def save(self, folder: Path, media: Sequence[Any], prompts: Sequence[str], grades: Grades | None = None) -> None:
        """The scorer's folder, with the unit of its scores measured on these media."""
        was = self.module.training
        self.module.eval()
        self.family.save(folder, *self.measure(media, prompts), grades)
        self.module.train(was)
