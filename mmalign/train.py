"""The training loop, once, for every task, model and objective.

Everything random in step s is seeded by (seed, s, ...) or by the item it belongs to, never by what ran before.
So a resumed run needs only weights, optimiser, schedule, EMA and the step, and ends in the same bytes.
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
    runs.prepare_folder(config, resume)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device)
    precision = {"fp32": "no"}.get(config.precision, config.precision)
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu", log_with=list(config.log.trackers),
                              project_dir=config.output)  # fmt: skip
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
            config.optim.schedule, optimizer, num_warmup_steps=config.optim.warmup, num_training_steps=config.optim.steps
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
                sums["grad_norm"] = self._update()
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
        torch.manual_seed(noise.generator("step", self.config.seed, self.step, micro, self.accelerator.process_index).initial_seed())
        last = micro + 1 == optim.accumulate
        with self.accelerator.autocast():
            if last:
                loss, metrics = self.wrapped(batch)
            else:
                with self.accelerator.no_sync(self.wrapped):
                    loss, metrics = self.wrapped(batch)
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is {loss.item()} at step {self.step + 1}, so the run stops here; the batch held: "
                f"{self.task.describe(batch)}. Lower optim.lr or loss.beta, or use precision: fp32. "
                "Checkpoints before this step are intact."
            )
        self.accelerator.backward(loss / optim.accumulate)
        return {"loss": loss.detach(), **metrics}

    def _update(self) -> Tensor:
        parameters = list(self.named.values())
        limit = self.config.optim.max_grad_norm or float("inf")
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.step(parameters)
        return norm if isinstance(norm, Tensor) else torch.tensor(float(norm))

    def _housekeeping(self, interrupted: bool) -> None:
        config, final = self.config, self.step == self.config.optim.steps
        if self.step % config.checkpoint.every == 0 or final or interrupted:
            self.save()
        if self.accelerator.is_main_process and (self.step % config.validation.every == 0 or final):
            self.task.validate(config.output / "validation", self.step)

    def save(self) -> None:
        """A checkpoint of this step."""
        if not self.accelerator.is_main_process or self.saved == self.step:
            return
        state = {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "config": self.config.model_dump_json(),
            "facts": json.dumps(runs.versions()),
        }
        checkpoints.save(self.folder, self.step, dict(self.named), state, self.config.checkpoint.keep)
        self.saved = self.step

    def restore(self) -> None:
        """Loads the newest checkpoint, if there is one."""
        checkpoint = checkpoints.newest(self.folder)
        if checkpoint is None:
            return
        weights, state = checkpoints.read(checkpoint)
        if weights.keys() != self.named.keys():
            odd = sorted(weights.keys() ^ self.named.keys())
            raise ValueError(f"{checkpoint} does not fit this config: {len(odd)} other parameters, first {odd[0]}")
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(weights[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
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
