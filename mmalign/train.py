"""The training loop, once, for every task, model and objective.

Everything random in step s is seeded by (seed, s, ...) or by the item it belongs to, never by what ran before.
So a resumed run needs only weights, buffers, optimiser, schedule, EMA and the step, and ends in the same bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mmalign import checkpoints, noise, runs, tasks
from mmalign.jobs import Optim, TrainConfig
from mmalign.progress import Progress


class _Step(nn.Module):
    """A task's loss as a module's forward, so that accelerate's wrappers see one forward per backward."""

    def __init__(self, task: Any):
        super().__init__()
        self.trained = task.modules
        self._loss = task.loss

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        return self._loss(batch)


def run(config: TrainConfig, *, resume: bool = False) -> Path:
    """Trains as the config says and returns the run folder.

    Raises:
        ValueError: the folder holds another run, the config or the data are unusable, or the loss is not finite.
        OSError: the disk is full; the last checkpoint stays intact.
        KeyboardInterrupt: after Ctrl-C, once the current step is saved.
    """
    device = runs.pick_device(config.device, config.precision)
    runs.check_trackers(config.log.trackers)
    runs.prepare_folder(config, resume)
    accelerator = _accelerator(config, device)
    torch.manual_seed(config.seed)  # for parts that are made from scratch
    task = tasks.make(config, accelerator.device)
    loop = Loop(config, task, accelerator)
    if accelerator.is_main_process:
        runs.write_facts(config, task, loop.parameter_count)
        accelerator.init_trackers("mmalign", config={"config": config.model_dump_json()})
    if resume:
        loop.restore()
    loop.fit()
    if accelerator.is_main_process:
        loop.export()
    accelerator.end_training()
    return config.output


def _accelerator(config: TrainConfig, device: torch.device) -> Accelerator:
    """Accelerate keeps device and precision for the whole process; a second run in it may want others."""
    precision = "no" if config.precision == "fp32" else config.precision
    state, cpu = AcceleratorState._shared_state, device.type == "cpu"
    if state and (state["_mixed_precision"], state["_cpu"]) != (precision, cpu):
        AcceleratorState._reset_state(reset_partial_state=True)
    if device.index is not None:
        torch.cuda.set_device(device)
    trackers = list(config.log.trackers) or None
    return Accelerator(mixed_precision=precision, cpu=cpu, log_with=trackers, project_dir=config.output)


class Loop:
    """State of one run: modules, optimiser, schedule, EMA, step."""

    def __init__(self, config: TrainConfig, task: Any, accelerator: Accelerator):
        self.config, self.task, self.accelerator = config, task, accelerator
        self.module = _Step(task)
        self.named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self.parameter_count = sum(p.numel() for p in self.named.values())
        assert self.named, "nothing to train"
        optimizer = _optimizer(config.optim, list(self.named.values()))
        self.schedule = get_scheduler(
            config.optim.schedule,
            optimizer,
            num_warmup_steps=config.optim.warmup,
            num_training_steps=config.optim.steps,
        )
        self.wrapped, self.optimizer = accelerator.prepare(self.module, optimizer)
        self.ema = EMAModel(self.named.values(), decay=config.ema.decay) if config.ema else None
        self.step = 0
        self.saved = -1
        self.folder = config.output / "checkpoints"

    def positions(self, step: int, micro: int) -> list[tuple[int, int]]:
        """(item, epoch) of this process's micro-batch: one endless shuffled stream, cut the same for any layout."""
        batch, world = self.config.optim.batch_size, self.accelerator.num_processes
        start = ((step * self.config.optim.accumulate + micro) * world + self.accelerator.process_index) * batch
        stream = range(start, start + batch)
        return [(self._order(p // self.task.size)[p % self.task.size], p // self.task.size) for p in stream]

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = noise.generator("order", self.config.seed, epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.task.size, generator=generator).tolist()
        return self._permutation

    def batches(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(micro index, batch) from the current step to the last; the next batch is loaded in a thread."""
        accumulate = self.config.optim.accumulate
        wanted = [(s, m) for s in range(self.step, self.config.optim.steps) for m in range(accumulate)]
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self.task.load, self.positions(*at)) for at in wanted[:2]]
            for i, (_, micro) in enumerate(wanted):
                batch = ahead.pop(0).result()
                if i + 2 < len(wanted):
                    ahead.append(pool.submit(self.task.load, self.positions(*wanted[i + 2])))
                yield micro, batch

    def fit(self) -> None:
        """Runs to the last step; saves on the way, at the end and on Ctrl-C."""
        config, started = self.config, time.perf_counter()
        log = runs.MetricsLog(config.output, self.accelerator, self.step)
        bar = Progress(config.task, config.optim.steps, self.step, quiet=not self.accelerator.is_main_process)
        sums: dict[str, Tensor] = {}
        with runs.CatchInterrupt() as interrupt, bar:
            for micro, batch in self.batches():
                for name, value in self._micro_step(micro, batch).items():
                    sums[name] = sums.get(name, 0) + value / config.optim.accumulate
                if micro + 1 < config.optim.accumulate:
                    continue
                sums["grad_norm"] = self._update(batch)
                self.step += 1
                if self.step % config.log.every == 0 or self.step == config.optim.steps:
                    seconds, started = time.perf_counter() - started, time.perf_counter()
                    record = log.write(self, sums, seconds)
                    bar.update(self.step, record)
                sums = {}
                self._housekeeping(interrupt.hit)
                if interrupt.hit:
                    raise KeyboardInterrupt(f"stopped after step {self.step}; run again with --resume to go on")
        log.close()

    def _micro_step(self, micro: int, batch: dict[str, Any]) -> dict[str, Tensor]:
        optim = self.config.optim
        torch.manual_seed(
            noise.generator("step", self.config.seed, self.step, micro, self.accelerator.process_index).initial_seed()
        )
        last = micro + 1 == optim.accumulate
        with self.accelerator.autocast():
            if last:
                loss, metrics = self.wrapped(batch)
            else:
                with self.accelerator.no_sync(self.wrapped):
                    loss, metrics = self.wrapped(batch)
        if not torch.isfinite(loss):
            raise self._not_finite("loss", loss, batch)
        self.accelerator.backward(loss / optim.accumulate)
        return {"loss": loss.detach(), **metrics}

    def _not_finite(self, what: str, value: Tensor, batch: dict[str, Any]) -> ValueError:
        return ValueError(
            f"the {what} is {value.item()} at step {self.step + 1}, so the run stops here; the batch held: "
            f"{self.task.describe(batch)}. Lower optim.lr or loss.beta, or use precision: fp32. "
            "Checkpoints before this step are intact."
        )

    def _update(self, batch: dict[str, Any]) -> Tensor:
        """One optimiser step; the norm of the gradient before clipping. `batch` is named if that is not finite."""
        parameters = list(self.named.values())
        limit = self.config.optim.max_grad_norm or float("inf")
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(parameters, limit))
        if not torch.isfinite(norm) and self.accelerator.scaler is None:  # a scaler skips such a step by itself
            raise self._not_finite("gradient norm", norm, batch)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.step(parameters)
        return norm

    def _housekeeping(self, interrupted: bool) -> None:
        config, final = self.config, self.step == self.config.optim.steps
        if self.step % config.checkpoint.every == 0 or final or interrupted:
            self.save()
        if self.accelerator.is_main_process and (self.step % config.validation.every == 0 or final):
            self.task.validate(config.output / "validation", self.step)

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the modules: trained parameters, and buffers such as batch norm's statistics."""
        stored = self.module.state_dict().keys()
        return {**self.named, **{name: buffer for name, buffer in self.module.named_buffers() if name in stored}}

    def save(self) -> None:
        """A checkpoint of this step."""
        if not self.accelerator.is_main_process or self.saved == self.step:
            return
        weights = self.kept()
        broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
        if broken:
            raise ValueError(
                f"{len(broken)} tensors hold values that are not finite after step {self.step}, first {broken[0]}, so "
                "no checkpoint was written and the run stops here. Lower optim.lr; earlier checkpoints are intact."
            )
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "config": self.config.model_dump_json(),
            "facts": json.dumps(runs.versions()),
        }
        checkpoints.save(self.folder, self.step, weights, state, self.config.checkpoint.keep)
        self.saved = self.step

    def restore(self) -> None:
        """Loads the newest checkpoint, if there is one."""
        checkpoint = checkpoints.newest(self.folder)
        if checkpoint is None:
            return
        weights, state = checkpoints.read(checkpoint)
        kept = self.kept()
        if weights.keys() != kept.keys():
            odd = sorted(weights.keys() ^ kept.keys())
            raise ValueError(f"{checkpoint} does not fit this config: {len(odd)} other tensors, first {odd[0]}")
        with torch.no_grad():
            for name, value in kept.items():
                value.copy_(weights[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = self.saved = state["step"]

    def export(self) -> None:
        """The finished model, with the moving average if there is one."""
        parameters = list(self.named.values())
        if self.ema:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        folder = self.config.output / "export"
        folder.mkdir(exist_ok=True)
        self.task.export(folder)
        if self.ema:
            self.ema.restore(parameters)


def _optimizer(optim: Optim, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    arguments: dict[str, Any] = dict(lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, eps=optim.eps)
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **arguments)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "optim.optimizer: adamw8bit needs bitsandbytes; install it with `pip install bitsandbytes`, or use adamw"
        ) from error
    return bitsandbytes.optim.AdamW8bit(parameters, **arguments)
