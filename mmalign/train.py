"""The training loop, once, for every task, model and objective.

Everything random in step s is seeded by (seed, s, ...) or by the item it belongs to, never by what ran before.
So a resumed run needs only weights, buffers, optimiser, schedule, EMA and the step, and ends in the same bytes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mmalign import checkpoints, compiling, distributed, memory, noise, order, runs, tasks
from mmalign.jobs import Optim, TrainConfig
from mmalign.locks import alone_in, refuse_if_busy
from mmalign.progress import Progress


class _Step(nn.Module):
    """A task's loss as a module's forward, so that accelerate's wrappers see one forward per backward."""

    def __init__(self, task: Any):
        super().__init__()
        self.trained = task.modules
        self._loss = task.loss

    def forward(self, work: dict[str, Any] | Callable[[], Any]) -> Any:
        """(loss, metrics) of a batch, or the result of a function that needs the modules' whole weights."""
        return work() if callable(work) else self._loss(work)


def run(config: TrainConfig, *, resume: bool = False) -> Path:
    """Trains as the config says and returns the run folder.

    Raises:
        ValueError: the folder holds another run, or one is at work in it, the config or the data are unusable, or the
            loss is not finite.
        OSError: the disk is full; the last checkpoint stays intact.
        KeyboardInterrupt: after Ctrl-C, once the current step is saved.
    """
    device = runs.pick_device(config.device, config.precision)
    runs.check_trackers(config.log.trackers)
    compiling.check(config.optim)
    accelerator = distributed.accelerator(config, device)
    refuse_if_busy(config.output)
    runs.check_output(config, resume, accelerator)
    before = runs.peak_memory()
    torch.manual_seed(config.seed)  # for parts that are made from scratch
    task = tasks.make(config, accelerator.device)
    loop = Loop(config, task, accelerator)
    if resume:
        loop.restore()
    with alone_in(config.output, "mmalign train") if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            runs.write_facts(config, task, loop.parameter_count, accelerator.num_processes)
            accelerator.init_trackers("mmalign", config={"config": config.model_dump_json()})
        loop.fit()
        loop.export()
        if config.log.memory and accelerator.is_main_process:
            _compare_memory(config, task, before)
        accelerator.end_training()
    return config.output


def _compare_memory(config: TrainConfig, task: Any, before: int) -> None:
    """Writes estimated and measured memory into run.json, and says both."""
    if config.sharding != "none":
        return
    known = None
    if config.task in ("preference", "sft"):
        media = max((len(group.media) for group in getattr(task, "groups", ())), default=1)
        known = memory.Work(task.targets, task.size, media, "")
    found = memory.compare(config, known, before)
    runs.add_facts(config.output, {"memory": found})
    if found["estimated"]:
        total, peak, kind = found["estimated"]["total"], found["measured"]["peak"], found["measured"]["kind"]
        rest = f", of which {before / 2**30:.2f} before anything was loaded" if kind == "resident" else ""
        told = f"memory: estimated {total / 2**30:.2f} GiB, measured {peak / 2**30:.2f} ({kind}{rest})"
        print(told, file=sys.stderr)


class Loop:
    """State of one run: modules, optimiser, schedule, EMA, step."""

    def __init__(self, config: TrainConfig, task: Any, accelerator: Accelerator):
        self.config, self.task, self.accelerator = config, task, accelerator
        self.module = _Step(task)
        optimizer = _optimizer(config.optim, [p for p in self.module.parameters() if p.requires_grad])
        self.schedule = get_scheduler(
            config.optim.schedule,
            optimizer,
            num_warmup_steps=config.optim.warmup,
            num_training_steps=config.optim.steps,
        )
        self.wrapped, self.optimizer = distributed.prepare(accelerator, self.module, task, optimizer, config)
        self.named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}  # FSDP has changed them
        self.parameter_count = sum(p.numel() for p in self.named.values())
        assert self.named, "nothing to train"
        if config.optim.compile:
            compiling.apply(config.optim, (task.network, getattr(task, "frozen", None)))
        self.ema = EMAModel(self.named.values(), decay=config.ema.decay) if config.ema else None
        together = config.optim.batch_size * accelerator.num_processes
        self.order = order.order(config.seed, task.size, together, getattr(task, "buckets", None))
        self.step = 0
        self.saved = -1
        self.folder = config.output / "checkpoints"

    def positions(self, step: int, micro: int) -> list[tuple[int, int]]:
        """(item, epoch) of this process's micro-batch: its slice of what all processes see together."""
        batch, rank = self.config.optim.batch_size, self.accelerator.process_index
        return self.order.block(step * self.config.optim.accumulate + micro)[rank * batch : (rank + 1) * batch]

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
        if getattr(self.task, "over", False):  # resumed after it had ended early
            return
        log = runs.MetricsLog(config.output, self.accelerator, self.step)
        bar = Progress(config.task, config.optim.steps, self.step, quiet=not self.accelerator.is_main_process)
        sums: dict[str, Tensor] = {}
        with runs.CatchInterrupt() as interrupt, bar:
            for micro, batch in self.batches():
                if micro == 0 and hasattr(self.task, "begin"):
                    self.task.begin(self.step)
                for name, value in self._micro_step(micro, batch).items():
                    sums[name] = sums.get(name, 0) + value / config.optim.accumulate
                if micro + 1 < config.optim.accumulate:
                    continue
                sums["grad_norm"] = self._update(batch)
                self._track(sums)
                self.step += 1
                if self.step % config.log.every == 0 or self.step == config.optim.steps:
                    seconds, started = time.perf_counter() - started, time.perf_counter()
                    record = log.write(self, sums, seconds)
                    bar.update(self.step, record)
                sums = {}
                stop = distributed.any_process(self.accelerator, interrupt.hit)
                enough = distributed.any_process(self.accelerator, self._enough())
                self._housekeeping(stop or enough)
                if enough:
                    break
                if stop:
                    raise KeyboardInterrupt(f"stopped after step {self.step}; run again with --resume to go on")
        log.close()

    def _enough(self) -> bool:
        """Whether the task asks to end the run here."""
        finished = getattr(self.task, "finished", None)
        return finished is not None and finished(self.step)

    def _micro_step(self, micro: int, batch: dict[str, Any]) -> dict[str, Tensor]:
        optim = self.config.optim
        torch.manual_seed(
            noise.generator("step", self.config.seed, self.step, micro, self.accelerator.process_index).initial_seed()
        )
        last = micro + 1 == optim.accumulate
        with self.accelerator.autocast(), distributed.adding_up(self.accelerator, self.wrapped, self.optimizer, last):
            loss, metrics = self.wrapped(batch)
        if not torch.isfinite(loss):
            raise self._not_finite("loss", loss, batch)
        distributed.backward(self.accelerator, self.optimizer, loss / optim.accumulate, last)
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
        norm = distributed.clip(self.accelerator, self.optimizer, parameters, limit)
        if not torch.isfinite(norm) and self.accelerator.scaler is None:  # a scaler skips such a step by itself
            raise self._not_finite("gradient norm", norm, batch)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.step(parameters)
        return norm

    def _track(self, means: dict[str, Tensor]) -> None:
        """Gives the task the metrics that it keeps averages of, as means over all processes."""
        names = getattr(self.task, "tracks", ())
        if not names:
            return
        self.task.track(distributed.means(self.accelerator, {name: means[name] for name in names}))

    def _housekeeping(self, interrupted: bool) -> None:
        config, final = self.config, self.step == self.config.optim.steps
        if self.step % config.checkpoint.every == 0 or final or interrupted:
            self.save()
        if self.step % config.validation.every == 0 or final:
            with compiling.paused():
                distributed.validate(self.accelerator, self.wrapped, self.task, config.output / "validation", self.step)

    def kept(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the modules: trained parameters, and buffers such as batch norm's statistics."""
        trained = self.module.trained
        stored = trained.state_dict().keys()
        buffers = {f"trained.{name}": buffer for name, buffer in trained.named_buffers() if name in stored}
        return {**self.named, **buffers}

    def save(self) -> None:
        """A checkpoint of this step: written by the main process, from the shares of all."""
        main = self.accelerator.is_main_process
        if self.saved == self.step or not (main or distributed.takes_all(self.accelerator, self.optimizer)):
            return
        weights = distributed.whole(self.kept(), keep=main)
        state = {
            "step": self.step,
            "optimizer": distributed.whole(self.optimizer.state_dict(), keep=main),
            "schedule": self.schedule.state_dict(),
            "ema": distributed.whole(self.ema.state_dict(), keep=main) if self.ema else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "config": self.config.model_dump_json(),
            "items": runs.items_per_step(self.config, self.accelerator),
            "together": runs.together(self.config, self.accelerator),
            "contents": self.task.facts["contents"],
            "facts": json.dumps(runs.versions()),
        }
        self.saved = self.step
        if not main:
            return
        broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
        if broken:
            raise ValueError(
                f"{len(broken)} tensors hold values that are not finite after step {self.step}, first {broken[0]}, so "
                "no checkpoint was written and the run stops here. Lower optim.lr; earlier checkpoints are intact."
            )
        checkpoints.save(self.folder, self.step, weights, state, self.config.checkpoint.keep)

    def restore(self) -> None:
        """Loads the newest checkpoint, if there is one."""
        checkpoint = checkpoints.newest(self.folder)
        if checkpoint is None:
            return
        weights, state = checkpoints.read(checkpoint)
        kept = self.kept()
        if state.get("contents", self.task.facts["contents"]) != self.task.facts["contents"]:
            raise ValueError(
                f"{self.config.output} was begun with other data: rows, labels or names of pictures have changed. Put "
                "them back as they were, or begin a new run in another folder."
            )
        if weights.keys() != kept.keys():
            odd = sorted(weights.keys() ^ kept.keys())
            raise ValueError(f"{checkpoint} does not fit this config: {len(odd)} other tensors, first {odd[0]}")
        with torch.no_grad():
            for name, value in kept.items():
                value.copy_(distributed.part(weights[name], value))
        parameters = list(self.named.values())
        self.optimizer.load_state_dict(distributed.optimizer_parts(state["optimizer"], parameters))
        self.schedule.load_state_dict(state["schedule"])
        if self.ema:
            shadow = zip(state["ema"]["shadow_params"], parameters, strict=True)
            self.ema.load_state_dict({**state["ema"], "shadow_params": [distributed.part(*each) for each in shadow]})
            self.ema.to(self.accelerator.device)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = self.saved = state["step"]

    def export(self) -> None:
        """The finished model, with the moving average if there is one: the end of the run, in all processes."""
        if self.ema:
            self.ema.copy_to(list(self.named.values()))
        distributed.put_together(self.accelerator, self.task)
        if self.accelerator.is_main_process:
            folder = self.config.output / "export"
            folder.mkdir(exist_ok=True)
            with compiling.paused():
                self.task.export(folder)
        self.accelerator.wait_for_everyone()


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
