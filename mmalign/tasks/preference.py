"""Preference training on pairs: one step compares winner and loser under the policy and the reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.jobs import DiffusionDPO, TrainConfig
from mmalign.losses import pairwise
from mmalign.models import base
from mmalign.models.base import Condition
from mmalign.progress import track
from mmalign.tasks import finish, sources
from mmalign.tasks.inputs import DENOISER, Inputs, View, draw


class PreferenceTask:
    """Pairs share t, noise, crop, flip and caption dropout; errors are float32; see `losses.pairwise`."""

    unit = "pairs"

    def __init__(self, config: TrainConfig, device: torch.device):
        assert isinstance(config.loss, DiffusionDPO)
        self.config, self.objective = config, config.loss
        self.pairs, summary = sources.pairs(config.data)
        self.size = len(self.pairs)
        self.adapter = finish.load(config, device)
        self.inputs = Inputs(self.adapter, config.model, config.data)
        kind = config.reference.kind
        self.reference = ("adapter_off" if config.lora else "frozen") if kind == "auto" else kind
        self.frozen: nn.Module | None = None
        if self.reference == "frozen" or not config.lora:
            self.frozen = copy.deepcopy(self.adapter.denoiser).requires_grad_(False).eval()
        self.modules = finish.make_trainable(self.adapter, config)
        self.weights_key = self._reference_key() if self.reference == "cached" else {}
        if self.reference == "cached" and self.frozen is not None:
            self._measure_all()
            self.frozen = None  # every error is in the cache: the second copy is not needed again
        shape = self.adapter.latent_shape(config.data.resolution, config.data.resolution)
        elements = int(torch.tensor(shape).prod())
        units = pairwise.beta_units(self.objective.beta, elements, self.objective.reduction)
        self.facts: dict[str, Any] = {
            "data": summary,
            "reference": self.reference,
            "latent_elements": elements,
            **units,
        }

    def load(self, positions: list[tuple[int, int]]) -> dict[str, Any]:
        return self._assemble([(i, self._draw_number(epoch)) for i, epoch in positions])

    def _draw_number(self, epoch: int) -> int:
        """Which of a pair's draws an epoch uses: all different, or K visited in turn."""
        return epoch % self.config.reference.draws if self.config.reference.draws else epoch

    def _assemble(self, numbered: list[tuple[int, int]]) -> dict[str, Any]:
        """Pairs with their numbered draws: pictures fetched, nothing computed on the device yet."""
        data = self.config.data
        batch: dict[str, Any] = {
            "numbered": numbered,
            "winners": [],
            "losers": [],
            "prompts": [],
            "generators": [],
            "keys": [],
        }
        for index, number in numbered:
            pair = self.pairs[index]
            identity = (pair.winner.hash(), pair.loser.hash(), pair.prompt, number)
            generator = draw(self.config.seed, *identity)
            view = View.draw(data, generator)
            drop = torch.rand((), generator=generator).item() < data.caption_dropout
            batch["winners"].append(self.inputs.fetch(pair.winner, view))
            batch["losers"].append(self.inputs.fetch(pair.loser, view))
            batch["prompts"].append("" if drop else pair.prompt)
            batch["generators"].append(generator)
            batch["keys"].append((*identity, batch["winners"][-1].key, batch["losers"][-1].key, batch["prompts"][-1]))
        label = [self.pairs[i].label for i, _ in numbered]
        return {
            **batch,
            "label": torch.tensor(label),
            "weight": torch.tensor([self.pairs[i].weight for i, _ in numbered]),
        }

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        noisy, t, condition, target = self._inputs(batch)
        model = self._errors(self.adapter.predict(noisy, t, condition), target)
        reference = self._reference_errors(batch, noisy, t, condition, target)
        loss = self.objective
        return pairwise.diffusion_dpo(
            *model.chunk(2), *reference.to(model.device).chunk(2), beta=loss.beta, kappa=loss.kappa, anchor=loss.anchor,
            label=batch["label"].to(model.device), weight=batch["weight"].to(model.device),
        )  # fmt: skip

    def _inputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Condition, Tensor]:
        """Noisy latents, timesteps, condition and targets [2B, ...], winners first; one draw for a pair."""
        adapter, generators = self.adapter, batch["generators"]
        latents = torch.cat([self.inputs.latents(batch[side], generators) for side in ("winners", "losers")])
        t = torch.cat([adapter.sample_timesteps(1, g) for g in generators]).to(latents.device).repeat(2)
        unit = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(latents.device)
        unit = unit.repeat(2, *[1] * (unit.ndim - 1))
        condition = self.inputs.conditions(batch["prompts"])
        condition = {name: torch.cat([value, value]) for name, value in condition.items()}
        sizes = torch.stack([item.sizes for item in (*batch["winners"], *batch["losers"])])
        condition = adapter.add_size(condition, sizes)
        return adapter.noisy(latents, t, unit), t, condition, adapter.target(latents, t, unit)

    def _errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        return pairwise.squared_error(prediction, target, self.objective.reduction)

    @torch.no_grad()
    def _reference_errors(
        self, batch: dict[str, Any], noisy: Tensor, t: Tensor, condition: Condition, target: Tensor
    ) -> Tensor:
        """Errors of the reference [2B]: from the cache where every pair is in it, else one pass for the batch."""
        if self.reference != "cached":
            return self._reference_pass(noisy, t, condition, target)
        stored = [self._stored(key) for key in batch["keys"]]
        if any(value is None for value in stored):
            # The whole batch again, so that a value never depends on which of its neighbours were already known.
            fresh = self._reference_pass(noisy, t, condition, target).cpu().reshape(2, -1).T
            for i, key in enumerate(batch["keys"]):
                if stored[i] is None:
                    stored[i] = fresh[i]
                    self.inputs.disk.put("reference_errors", self._error_key(key), {"errors": fresh[i].clone()})  # type: ignore[union-attr]
        return torch.stack(stored).T.reshape(-1)  # type: ignore[arg-type]

    def _reference_pass(self, noisy: Tensor, t: Tensor, condition: Condition, target: Tensor) -> Tensor:
        if self.frozen is not None:
            return self._errors(self.adapter.predict(noisy, t, condition, self.frozen), target)
        with _adapter_off(self.adapter.denoiser):
            return self._errors(self.adapter.predict(noisy, t, condition), target)

    def _stored(self, key: tuple[Any, ...]) -> Tensor | None:
        found = self.inputs.disk.get("reference_errors", self._error_key(key))  # type: ignore[union-attr]
        return found["errors"] if found else None

    def _error_key(self, key: tuple[Any, ...]) -> str:
        return self.inputs.key(weights=self.weights_key, seed=self.config.seed, pair=list(key),
                               reduction=self.objective.reduction, precision=self.config.precision)  # fmt: skip

    def _reference_key(self) -> dict[str, str]:
        """Identifies the reference: the denoiser and its schedule; `Inputs.key` has the other parts and the LoRA."""
        model = self.config.model
        if "unet" in model.from_scratch:
            raise ValueError("reference.kind: cached cannot tell fresh weights apart; drop model.from_scratch")
        return {name: value for name, value in base.fingerprint(model).items() if name in DENOISER}

    def _measure_all(self) -> None:
        """Fills the cache with the error of every pair and draw, while the reference is still the model itself."""
        size, draws = self.config.optim.batch_size, self.config.reference.draws or 1
        numbered = [(i, k) for k in range(draws) for i in range(self.size)]
        starts, dtype = range(0, len(numbered), size), finish.PRECISIONS[self.config.precision]
        for start in track(starts, "reference errors", len(starts)):
            batch = self._assemble(numbered[start : start + size])
            if any(self._stored(key) is None for key in batch["keys"]):
                # As in the loop, or a fresh policy in half precision would differ from its own reference.
                with torch.no_grad(), torch.autocast(self.adapter.device.type, dtype, enabled=dtype != torch.float32):
                    self._reference_errors(batch, *self._inputs(batch))

    def validate(self, folder: Path, step: int) -> None:
        finish.validate(self.adapter, self.config, folder, step)

    def export(self, folder: Path) -> None:
        finish.export(self.adapter, self.config, folder, self.facts)

    def describe(self, batch: dict[str, Any]) -> str:
        return ", ".join(str(self.pairs[i].origin) for i, _ in batch["numbered"])


@contextmanager
def _adapter_off(denoiser: Any) -> Iterator[None]:
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()
