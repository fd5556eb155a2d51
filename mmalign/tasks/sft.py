"""Supervised fine-tuning, and training from scratch: one step denoises a batch of captioned pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign import noise
from mmalign.jobs import Denoising, TrainConfig
from mmalign.losses import supervised
from mmalign.losses.pairwise import squared_error
from mmalign.tasks import finish, sources
from mmalign.tasks.inputs import Inputs, View, draw


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
                self.modules[name] = getattr(self.adapter.pipe, name).requires_grad_(True).train()
        self.inputs = Inputs(self.adapter, config.model, config.data, train_text=self.train_text)
        self.facts: dict[str, Any] = {"data": summary}

    def load(self, positions: list[tuple[int, int]]) -> dict[str, Any]:
        data, fetched, generators, prompts = self.config.data, [], [], []
        for index, epoch in positions:
            item = self.items[index]
            generator = draw(self.config.seed, item.media.hash(), item.prompt, epoch)
            fetched.append(self.inputs.fetch(item.media, View.draw(data, generator)))
            drop = torch.rand((), generator=generator).item() < data.caption_dropout
            prompts.append("" if drop else item.prompt)
            generators.append(generator)
        return {"fetched": fetched, "generators": generators, "prompts": prompts, "items": [i for i, _ in positions]}

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        adapter, generators = self.adapter, batch["generators"]
        latents = self.inputs.latents(batch["fetched"], generators)
        t = torch.cat([adapter.sample_timesteps(1, g) for g in generators]).to(latents.device)
        unit = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(latents.device)
        condition = self.inputs.conditions(batch["prompts"], grad=self.train_text)
        condition = adapter.add_size(condition, torch.stack([item.sizes for item in batch["fetched"]]))
        prediction = adapter.predict(adapter.noisy(latents, t, unit), t, condition)
        error = squared_error(prediction, adapter.target(latents, t, unit))
        gamma = self.objective.snr_gamma
        return supervised.denoising(
            error, snr=noise.snr(t, adapter.alphas_cumprod), snr_gamma=gamma, parameterisation=adapter.parameterisation
        )

    def validate(self, folder: Path, step: int) -> None:
        finish.validate(self.adapter, self.config, folder, step)

    def export(self, folder: Path) -> None:
        finish.export(self.adapter, self.config, folder, self.facts)

    def describe(self, batch: dict[str, Any]) -> str:
        return ", ".join(self.items[i].media.name for i in batch["items"])
