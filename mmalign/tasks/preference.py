"""Preference training: one step compares judged pictures under the policy and the reference.

The task measures denoising errors of groups (pairs, lists, singles) and hands them to the objective's pure function;
what an objective needs besides errors is in its settings' `needs`.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.jobs import TrainConfig
from mmalign.jobs_inputs import Model
from mmalign.losses import guards
from mmalign.losses.errors import beta_units, implicit_reward, squared_error
from mmalign.methods import Preference
from mmalign.models import base
from mmalign.models.adapter import Condition, lent_to
from mmalign.models.shared_text import once_per_prompt
from mmalign.progress import track
from mmalign.tasks import buckets, finish, sources
from mmalign.tasks.groups import constants, grid, judgement
from mmalign.tasks.inputs import DENOISER, Inputs, Size, View, draw, timesteps, unit_noise
from mmalign.tasks.noising import Noising
from mmalign.tasks.state import Averages, Lagged, adapter_off
from mmalign.tasks.watch import Watch

Batch = dict[str, Any]


class PreferenceTask:
    """Groups share t, crop, flip, caption dropout and (by default) noise; errors are float32."""

    def __init__(self, config: TrainConfig, device: torch.device):
        assert isinstance(config.loss, Preference)
        self.config, self.objective = config, config.loss
        self.unit = self.objective.items
        module, _, name = self.objective.function.partition(":")
        self.function = getattr(importlib.import_module(module), name)
        self.groups, summary = sources.groups(config.data, self.objective.items)
        self.size = len(self.groups)
        self.constants = constants(self.groups, self.objective)
        self.adapter = finish.load(config, device)
        _check_parameterisation(self.objective, self.adapter)
        self.inputs = Inputs(self.adapter, config.model, config.data)
        self.targets = buckets.targets([group.media for group in self.groups], config.data, self.adapter)
        self.buckets = self.targets.numbers
        wanted = config.guards
        self.compares = bool("drift" in self.objective.needs or wanted.anchor or wanted.velocity)
        self.refers = self.compares or not self.objective.reference_free
        kind = config.reference.kind
        other = config.reference.other
        self.reference = ("adapter_off" if config.lora and not other else "frozen") if kind == "auto" else kind
        self.frozen: nn.Module | None = None
        if (self.refers or config.noise.inverted) and (self.reference == "frozen" or not config.lora or other):
            self.frozen = self._frozen(device)
        self.modules = finish.make_trainable(self.adapter, config)
        self.tracks = self._make_averages()
        self.weights_key = (
            self._reference_key()
            if self.reference == "cached" or config.noise.cached(config.reference.draws, config.data.cache)
            else {}
        )
        self.noising = Noising(self)
        stopping = config.guards.early_stopping
        self.watch = Watch(config, self.adapter) if stopping else None
        if self.watch is not None:
            self.modules["watch"] = self.watch
        if self.reference == "cached" and self.frozen is not None:
            self._measure_all()
            self.frozen = None  # every error is in the cache: the second copy is not needed again
        self.facts = self._facts(summary)

    def _frozen(self, device: torch.device) -> nn.Module:
        """A second denoiser: a copy of the model's own, or that of `reference.model` with `reference.lora`."""
        home = torch.device("cpu") if "reference" in self.config.optim.offload else device
        if not self.config.reference.other:
            copied: nn.Module = copy.deepcopy(self.adapter.denoiser).requires_grad_(False).eval()
            return copied.to(home)
        dtype = self.adapter.denoiser.dtype
        loaded = base.load(self._reference_model(), device=home, dtype=dtype, training=True)
        return loaded.denoiser.requires_grad_(False).eval()

    def _reference_model(self) -> Model:
        """What the reference is loaded from."""
        model, wanted = self.config.model, self.config.reference
        if not wanted.other:
            return model
        if wanted.model is None:
            return model.model_copy(update={"lora": wanted.lora})
        # What replaces parts of the model does not replace the reference's.
        told = {"lora": wanted.lora, "variant": wanted.variant, "max_sequence_length": model.max_sequence_length}
        told["expert"] = model.expert
        return Model(path=wanted.model, **told)

    def _make_averages(self) -> tuple[str, ...]:
        """Moving averages that the objective or auto-beta asks for; the metrics that they are fed with."""
        wanted = dict(self.objective.tracked)
        if self.config.guards.auto_beta:
            wanted["margin"] = "margin_size"
        lagged = self.config.noise.lagged
        self.averages = Averages(wanted, self.config.guards.auto_beta)
        self.lagged = Lagged(self.adapter.denoiser) if lagged else None
        if wanted:
            self.modules["averages"] = self.averages
        if self.lagged is not None:
            self.modules["lagged"] = self.lagged
        return tuple(wanted.values())

    def _facts(self, summary: str) -> dict[str, Any]:
        reference = self.reference if self.refers else "none"
        found = {"data": summary + self.targets.summary(), "reference": reference, **self._units(self.targets.largest)}
        return {**found, "contents": sources.digest(self.groups), **self.targets.facts(self._units)}

    def _units(self, size: Size) -> dict[str, Any]:
        """Numbers of a picture's (or clip's) latents, and beta per element and per sample for as many."""
        elements = int(torch.tensor(self.adapter.latent_shape(*size)).prod())
        beta = self.objective.beta_for(self.beta, elements)
        units = beta_units(beta, elements, self.objective.reduction) if beta else {}
        return {"latent_elements": elements, **units}

    @property
    def beta(self) -> float:
        """The objective's beta, as auto-beta has it now; 0 for objectives without one."""
        own = float(getattr(self.objective, "beta", 0.0))
        automatic = self.config.guards.auto_beta
        size = self.averages.value("margin") if automatic else None
        if automatic is None or size is None:
            return own
        return guards.beta_for(automatic.target, size, automatic.low * own, automatic.high * own)

    # -------------------------------------------------------------------------------------------------- batches

    def load(self, positions: list[tuple[int, int]]) -> Batch:
        return self._assemble([(i, self._draw_number(epoch)) for i, epoch in positions])

    def _draw_number(self, epoch: int) -> int:
        """Which of a group's draws an epoch uses: all different, or K visited in turn."""
        return epoch % self.config.reference.draws if self.config.reference.draws else epoch

    def _assemble(self, numbered: list[tuple[int, int]]) -> Batch:
        """Groups with their numbered draws: pictures fetched, nothing computed on the device yet."""
        data = self.config.data
        batch: Batch = {"numbered": numbered, "sizes": [], "fetched": [], "prompts": [], "generators": [], "keys": []}
        for index, number in numbered:
            group = self.groups[index]
            identity = (*group.identity, number)
            generator = draw(self.config.seed, *identity)
            view = View.draw(data, generator)
            drop = torch.rand((), generator=generator).item() < data.caption_dropout
            fetched = [self.inputs.fetch(medium, view, self.targets.size(index)) for medium in group.media]
            prompts = ["" if drop else prompt for prompt in group.prompts]
            told = prompts[:1] if len(set(prompts)) == 1 else prompts
            batch["sizes"].append(len(fetched))
            batch["fetched"] += fetched
            batch["prompts"] += prompts
            batch["generators"].append(generator)
            batch["keys"].append((*identity, *(item.key for item in fetched), *told))
        return batch | judgement([self.groups[i] for i, _ in numbered])

    # ----------------------------------------------------------------------------------------------------- loss

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        model, reference, others = self.measure(batch, compare=self.compares)
        given = {**batch, **self.constants, **others}
        loss, metrics = self._objective(model, reference, given)
        return self._guarded(loss, metrics, model, given)

    def measure(self, batch: Batch, *, compare: bool) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Errors of the policy and of the reference [B, k], and what else was measured at the same points.

        `compare` asks for the reference's predictions, not only its errors: drift, norm and reference_norm [B, k].
        """
        with self._shared_text(batch):
            return self._measured(batch, compare)

    def _measured(self, batch: Batch, compare: bool) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        noisy, t, condition, target = self._inputs(batch)
        mask = batch["mask"].to(noisy.device)
        prediction = self.adapter.predict(noisy, t, condition)
        model = grid(self._errors(prediction, target), mask)
        size = torch.tensor(noisy[0].numel())
        others, reference = {"mask": mask, "t": grid(t, mask)[:, 0], "elements": size}, None
        if compare:
            theirs = self._reference_prediction(noisy, t, condition)
            reference = grid(self._errors(theirs, target), mask)
            others |= {
                "drift": grid(self._errors(prediction, theirs), mask),
                "norm": grid(prediction.float().flatten(1).norm(dim=1), mask),
                "reference_norm": grid(theirs.float().flatten(1).norm(dim=1), mask),
            }
        elif self.refers:
            reference = grid(self._reference_errors(batch, noisy, t, condition, target).to(noisy.device), mask)
        return model, reference, others

    @contextmanager
    def _shared_text(self, batch: Batch) -> Iterator[None]:
        """Inside, each different prompt of the batch is projected once by the policy and once by a frozen reference."""
        with ExitStack() as stack:
            for denoiser in (self.adapter.denoiser, self.frozen):
                if denoiser is not None:
                    stack.enter_context(once_per_prompt(denoiser, batch["prompts"]))
            yield

    def _objective(
        self, model: Tensor, reference: Tensor | None, given: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The pure function, with what it needs, on errors [B] for singles and [B, k] else."""
        settings = self.objective.own()
        beta = self.objective.beta_for(self.beta, int(given["elements"]))
        if "beta" in settings:
            settings["beta"] = beta
        needed = {name: torch.as_tensor(given[name]).to(model.device) for name in self.objective.needs}
        averaged = {name: self.averages.tensor(name) for name in self.objective.tracked}
        needed |= {name: value for name, value in averaged.items() if value is not None}
        limit = self.config.guards.drop_saturated
        if limit is not None and reference is not None:
            reward = implicit_reward(model, reference, beta, settings["kappa"])
            kept = guards.unsaturated(reward[:, 0] - reward[:, 1], limit)
            needed["weight"] = needed["weight"] * kept
        errors = [error for error in (model, None if self.objective.reference_free else reference) if error is not None]
        if self.objective.items == "singles":
            errors = [error[:, 0] for error in errors]
        loss, metrics = self.function(*errors, **needed, **settings)
        if limit is not None and reference is not None:
            metrics["kept"] = kept.mean()
        if "logit_abs" in metrics and beta:
            metrics["margin_size"] = metrics["logit_abs"] / beta
        if self.config.guards.auto_beta:
            metrics["beta"] = torch.tensor(beta)
        return loss, metrics

    def _guarded(
        self, loss: Tensor, metrics: dict[str, Tensor], model: Tensor, given: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        wanted, mask = self.config.guards, given["mask"]
        if wanted.winner:
            loss = loss + wanted.winner * guards.best_error(model, given["phi"].to(model.device), mask)
        if self.compares:
            away = guards.anchor(given["drift"], mask)
            loss = loss + wanted.anchor * away
            ratio = (given["norm"] / given["reference_norm"].clamp(min=1e-12))[mask].mean()
            metrics |= {"drift": away.detach(), "norm_ratio": ratio.detach()}
        if wanted.velocity:
            longer = guards.velocity_hinge(given["norm"], given["reference_norm"], mask, wanted.velocity_slack)
            loss = loss + wanted.velocity * longer
        return loss, metrics

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Condition, Tensor]:
        """Noisy latents, timesteps, condition and targets [N, ...] of all pictures, group after group."""
        adapter, sizes = self.adapter, batch["sizes"]
        of_picture = [g for g, size in zip(batch["generators"], sizes, strict=True) for _ in range(size)]
        latents = self.inputs.latents(batch["fetched"], of_picture)
        repeats = torch.tensor(sizes, device=latents.device)
        t = timesteps(adapter, self.config.timesteps, latents.shape[1:], batch["generators"]).repeat_interleave(repeats)
        if self.config.noise.kind == "shared":
            unit = unit_noise(adapter, latents.shape[1:], batch["generators"]).repeat_interleave(repeats, 0)
        else:
            unit = unit_noise(adapter, latents.shape[1:], of_picture)
        condition = self.inputs.conditions(batch["prompts"])
        condition = self.inputs.seen(condition, batch["fetched"])
        noisy, unit = self.noising(batch, latents, t, unit, condition, of_picture)
        return noisy, t, condition, adapter.process.target(latents, t, unit)

    def _errors(self, prediction: Tensor, target: Tensor) -> Tensor:
        return squared_error(prediction, target, self.objective.reduction)

    # ------------------------------------------------------------------------------------------------ reference

    @torch.no_grad()
    def _reference_errors(self, batch: Batch, noisy: Tensor, t: Tensor, condition: Condition, target: Tensor) -> Tensor:
        """Errors of the reference [N]: from the cache where every group is in it, else one pass for the batch."""
        if self.reference != "cached":
            return self._errors(self._reference_prediction(noisy, t, condition), target)
        stored = [self._stored(key) for key in batch["keys"]]
        if any(value is None for value in stored):
            # The whole batch again, so that a value never depends on which of its neighbours were already known.
            fresh = self._errors(self._reference_prediction(noisy, t, condition), target).cpu().split(batch["sizes"])
            for i, key in enumerate(batch["keys"]):
                if stored[i] is None:
                    stored[i] = fresh[i].clone()
                    self.inputs.disk.put("reference_errors", self._error_key(key), {"errors": stored[i]})  # type: ignore[union-attr, dict-item]
        return torch.cat(stored)  # type: ignore[arg-type]

    @torch.no_grad()
    def _reference_prediction(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if self.frozen is not None:
            away = "reference" in self.config.optim.offload
            with lent_to(self.adapter.device, self.frozen) if away else nullcontext():
                return self.adapter.predict(noisy, t, condition, self.frozen)
        with adapter_off(self.adapter.denoiser):
            return self.adapter.predict(noisy, t, condition)

    def _stored(self, key: tuple[Any, ...]) -> Tensor | None:
        found = self.inputs.disk.get("reference_errors", self._error_key(key))  # type: ignore[union-attr]
        return found["errors"] if found else None

    def _error_key(self, key: tuple[Any, ...]) -> str:
        return self.draw_key(key, reduction=self.objective.reduction)

    def draw_key(self, key: tuple[Any, ...], **more: Any) -> str:
        """The cache key of what the reference makes of one numbered draw of a group."""
        config = self.config
        drawn: dict[str, Any] = {"timesteps": config.timesteps.model_dump(), "noise": config.noise.identity()}
        expert = config.model.expert
        drawn["told"] = [self.adapter.text_length, self.adapter.guidance, *([expert] if expert else [])]
        return self.inputs.key(
            weights=self.weights_key, seed=config.seed, pair=list(key), precision=config.precision, **drawn, **more
        )

    def _reference_key(self) -> dict[str, str]:
        """Identifies the reference: the denoiser and its schedule; `Inputs.key` has the other parts and the LoRA."""
        model = self.config.model
        if {*DENOISER} & {*model.from_scratch}:
            raise ValueError(
                "what is kept of a reference (reference.kind: cached, or inverted noise under reference.draws) is "
                "known by its files, and weights from scratch have none; drop model.from_scratch or reference.draws"
            )
        found = base.fingerprint(self._reference_model())
        key = {name: value for name, value in found.items() if name in (*DENOISER, "lora")}
        if self.config.reference.model:  # t, noise and target are the trained model's
            key["scheduler"] = base.fingerprint(model)["scheduler"]
        return {**key, "dtype": str(finish.frozen_dtype(self.config))}

    def _measure_all(self) -> None:
        """Fills the cache with the error of every group and draw, while the reference is still the model itself."""
        size, draws = self.config.optim.batch_size, self.config.reference.draws or 1
        batches: list[list[tuple[int, int]]] = []
        for items in self.targets.together(self.size):
            numbered = [(i, k) for k in range(draws) for i in items]
            batches += [numbered[start : start + size] for start in range(0, len(numbered), size)]
        dtype = finish.PRECISIONS[self.config.precision]
        for chunk in track(batches, "reference errors", len(batches)):
            batch = self._assemble(chunk)
            if any(self._stored(key) is None for key in batch["keys"]) or not self.noising.known(batch):
                # As in the loop, or a fresh policy in half precision would differ from its own reference.
                autocast = torch.autocast(self.adapter.device.type, dtype, enabled=dtype != torch.float32)
                with torch.no_grad(), autocast, self._shared_text(batch):
                    self._reference_errors(batch, *self._inputs(batch))

    # -------------------------------------------------------------------------------------------------- the loop

    def begin(self, step: int) -> None:
        """Called before each optimiser step: refreshes what lags behind the policy, and looks where it begins."""
        if self.watch is not None and step == 0:  # a mistyped sub-score is heard of now, and not after `every` steps
            print(f"step 0: held-out reward {self.watch.reward():.4g}", file=sys.stderr)
        if self.lagged is not None and step % self.config.noise.inversion.refresh == 0:
            self.lagged.refresh()
            self.noising.forget()

    def track(self, metrics: dict[str, Tensor]) -> None:
        """Called after each optimiser step with the means of `tracks` over micro-batches and processes."""
        self.averages.update(metrics)

    def validate(self, folder: Path, step: int) -> None:
        finish.validate(self.adapter, self.config, folder, step)

    @property
    def over(self) -> bool:
        """Whether the run had ended early before it was resumed."""
        return self.watch is not None and self.watch.over

    def finished(self, step: int) -> bool:
        """Called after each optimiser step: whether a held-out reward says that it is enough."""
        if self.watch is None or not self.watch.due(step):
            return False
        reward, enough = self.watch.look()
        print(f"step {step}: held-out reward {reward:.4g}, best {self.watch.best_reward:.4g}", file=sys.stderr)
        return enough

    @property
    def network(self) -> nn.Module:
        """What several processes may share, and torch may compile."""
        denoiser: nn.Module = self.adapter.denoiser
        return denoiser

    def take_whole(self, state: dict[str, Tensor]) -> None:
        finish.take_whole(self.adapter, state)

    def export(self, folder: Path) -> None:
        with self.watch.best_weights() if self.watch is not None else nullcontext():
            finish.export(self.adapter, self.config, folder, self.facts)

    def describe(self, batch: Batch) -> str:
        return ", ".join(str(self.groups[i].origin) for i, _ in batch["numbered"])


def _check_parameterisation(objective: Preference, adapter: Any) -> None:
    kind = adapter.process.kind
    if kind not in objective.parameterisations:
        known = ", ".join(objective.parameterisations)
        raise ValueError(
            f"loss.kind {objective.kind} is for {known} models, and this one predicts {kind}; "  # type: ignore[attr-defined]
            f"use {'flow_dpo' if kind == 'flow' else 'diffusion_dpo'}, or see `mmalign list methods`"
        )
