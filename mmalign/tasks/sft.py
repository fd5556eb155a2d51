"""Supervised fine-tuning, and training from scratch: one step denoises a batch of captioned pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.jobs import TrainConfig
from mmalign.losses import supervised
from mmalign.losses.errors import squared_error
from mmalign.methods import Denoising
from mmalign.tasks import buckets, finish, sources
from mmalign.tasks.inputs import Inputs, View, draw, timesteps, unit_noise


class SFTTask:
    unit = "images"

    def __init__(self, config: TrainConfig, device: torch.device):
        assert isinstance(config.loss, Denoising)
        self.config, self.objective = config, config.loss
        self.items, summary = sources.singles(config.data)
        self.size = len(self.items)
        self.adapter = finish.load(config, device)
        self.modules = finish.make_trainable(self.adapter, config)
        self.train_text = config.optim.train_text_encoder
        if self.train_text:
            for name in self.adapter.text_encoders:
                if getattr(self.adapter.pipe, name) is None:
                    continue
                self.modules[name] = getattr(self.adapter.pipe, name).requires_grad_(True).train()
        self.inputs = Inputs(self.adapter, config.model, config.data, train_text=self.train_text)
        self.targets = buckets.targets([(item.media,) for item in self.items], config.data, self.adapter)
        self.buckets = self.targets.numbers
        facts = self.targets.facts(lambda size: {})
        self.facts: dict[str, Any] = {"data": summary + self.targets.summary(), **facts}
        self.facts["contents"] = sources.digest(self.items)

    def load(self, positions: list[tuple[int, int]]) -> dict[str, Any]:
        data, fetched, generators, prompts = self.config.data, [], [], []
        for index, epoch in positions:
            item = self.items[index]
            generator = draw(self.config.seed, item.media.hash(), item.prompt, epoch)
            fetched.append(self.inputs.fetch(item.media, View.draw(data, generator), self.targets.size(index)))
            drop = torch.rand((), generator=generator).item() < data.caption_dropout
            prompts.append("" if drop else item.prompt)
            generators.append(generator)
        return {"fetched": fetched, "generators": generators, "prompts": prompts, "items": [i for i, _ in positions]}

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        adapter, generators = self.adapter, batch["generators"]
        latents = self.inputs.latents(batch["fetched"], generators)
        t = timesteps(adapter, self.config.timesteps, latents.shape[1:], generators)
        unit = unit_noise(adapter, latents.shape[1:], generators)
        condition = self.inputs.conditions(batch["prompts"], grad=self.train_text)
        condition = self.inputs.seen(condition, batch["fetched"])
        prediction = adapter.predict(adapter.process.noisy(latents, t, unit), t, condition)
        error = squared_error(prediction, adapter.process.target(latents, t, unit))
        return supervised.denoising(
            error, snr=adapter.process.snr(t), snr_gamma=self.objective.snr_gamma, parameterisation=adapter.process.kind
        )

    def validate(self, folder: Path, step: int) -> None:
        finish.validate(self.adapter, self.config, folder, step)

    @property
    def network(self) -> nn.Module:
        """What several processes may share, and torch may compile."""
        denoiser: nn.Module = self.adapter.denoiser
        return denoiser

    def take_whole(self, state: dict[str, Tensor]) -> None:
        finish.take_whole(self.adapter, state)

    def export(self, folder: Path) -> None:
        finish.export(self.adapter, self.config, folder, self.facts)

    def describe(self, batch: dict[str, Any]) -> str:
        return ", ".join(self.items[i].media.name for i in batch["items"])
