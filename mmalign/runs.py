"""The run folder: what is written beside the checkpoints, and what is checked before a run begins."""

from __future__ import annotations

import importlib.util
import json
import platform
import resource
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from mmalign import checkpoints, distributed
from mmalign.config import dump
from mmalign.evaluation import resolve_device
from mmalign.jobs import TrainConfig
from mmalign.source import whole_file

_MAY_CHANGE = {"checkpoint", "validation", "log", "output", "device", "sharding"}
_LAYOUT = {
    "optim.batch_size", "optim.accumulate", "optim.compile", "optim.compile_backend", "data.cache", "data.cache_dir",
    "optim.offload", "model.vae.slicing",
}  # fmt: skip
"""Keys that decide how a step is computed, but not of what: the number of items in a step is compared instead."""


def versions() -> dict[str, str]:
    """Library versions, the git commit of the working folder if there is one, and the machine."""
    names = ("mmalign", "diffusers", "transformers", "open_clip_torch", "accelerate", "peft")
    found = {"torch": torch.__version__, **{name: version(name) for name in names}}  # torch's own names the build
    commit = "none"
    if shutil.which("git"):
        command = ["git", "rev-parse", "HEAD"]
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
        commit = git.stdout.strip() if git.returncode == 0 else "none"
    return {**found, "python": platform.python_version(), "git": commit, "machine": platform.machine()}


def items_per_step(config: TrainConfig, accelerator: Any) -> int:
    """How many items one optimiser step sees, over micro-batches and processes."""
    processes: int = accelerator.num_processes
    return config.optim.batch_size * config.optim.accumulate * processes


def together(config: TrainConfig, accelerator: Any) -> int | None:
    """How many items are computed at a time over all processes, where that decides the result; else None.

    It does where buckets are filled, and where a loss looks at its neighbours.
    """
    matters = config.data.buckets != "off" or getattr(config.loss, "looks_around", False)
    return config.optim.batch_size * accelerator.num_processes if matters else None


def check_output(config: TrainConfig, resume: bool, accelerator: Any) -> None:
    """Looks at the run folder before anything is loaded.

    Raises:
        ValueError: it already holds a run and `resume` is off, or the config differs from the one it was begun with.
    """
    last = checkpoints.newest(config.output / "checkpoints")
    if last and not resume:
        raise ValueError(
            f"{config.output} already holds a run ({last.name}). Add --resume to go on with it, "
            "or choose another folder with --set output=..."
        )
    if last:
        state = checkpoints.read(last)[1]
        _check_unchanged(config, state, items_per_step(config, accelerator), together(config, accelerator))
    accelerator.wait_for_everyone()  # nobody may read what another has begun to write


def _check_unchanged(config: TrainConfig, state: dict[str, Any], items: int, at_once: int | None = None) -> None:
    before = flat(_as_now(state["config"]))
    now = flat(json.loads(config.model_dump_json()))
    changed = [
        f"{key} (then {before.get(key)}, now {now.get(key)})"
        for key in sorted({*now, *before})
        if now.get(key) != before.get(key) and key.split(".")[0] not in _MAY_CHANGE and key not in _LAYOUT
    ]
    if changed:
        raise ValueError(
            f"{config.output} was begun with other values of: {', '.join(changed)}. Resume with the same config "
            f"(it is in {config.output}/config.yaml), or begin a new run in another folder."
        )
    if state.get("items", items) != items:  # checkpoints of 0.1 before several processes were compared have none
        raise ValueError(
            f"{config.output} was begun with {state['items']} items in a step, and this makes {items}. Choose "
            "optim.batch_size and optim.accumulate so that batch_size x accumulate x processes is the same again."
        )
    if state.get("together", at_once) != at_once:
        raise ValueError(
            f"{config.output} was begun with {state['together']} items at a time, and this makes {at_once}; with "
            "buckets, or a loss that looks at its neighbours, that changes the result. Choose optim.batch_size so that "
            "batch_size x processes is the same again."
        )


def _as_now(config: str) -> dict[str, Any]:
    """A stored config with the defaults of keys that came since, so that an older run can go on; as it is, if it can't.

    A new key's default is what was done before it.
    """
    stored: dict[str, Any] = json.loads(config)
    try:
        return json.loads(TrainConfig.model_validate(stored).model_dump_json())
    except ValidationError:
        return stored


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones: {"optim": {"lr": 1}} to {"optim.lr": 1}."""
    items: dict[str, Any] = {}
    for key, value in config.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return items


def pick_device(name: str, precision: str = "float32") -> torch.device:
    """The device of a config: `auto` is cuda when present, else cpu.

    Raises:
        ValueError: there is no such device here, or half precision is asked for on a CPU.
    """
    device = resolve_device(name)
    if device.type == "cpu" and precision in ("fp16", "float16"):
        raise ValueError(
            f"{precision} needs a GPU; on a CPU use {'bf16 or fp32' if precision == 'fp16' else 'float32'}"
        )
    return device


def check_trackers(names: tuple[str, ...]) -> None:
    """ValueError for a tracker that is not installed; accelerate would leave it out without a word."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"log.trackers: {name} is not installed; install it with `pip install {name}`, or drop it")


def write_facts(config: TrainConfig, task: Any, parameters: int, processes: int) -> None:
    """Makes the run folder and writes config.yaml, resolved, and run.json; the data's summary is printed.

    run.json holds versions, the summary, the number of trained parameters and what the task adds.
    """
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "config.yaml").write_text(dump(config))
    facts = {
        "versions": versions(),
        "seed": config.seed,
        "items": task.size,
        "trained_parameters": parameters,
        "processes": processes,
        **task.facts,
    }
    (config.output / "run.json").write_text(json.dumps(facts, indent=2, default=str))
    print(f"{config.task}: {task.facts.get('data', '')}; training {parameters:,} parameters", file=sys.stderr)


def add_facts(folder: Path, facts: dict[str, Any]) -> None:
    """Adds to run.json, whole or not at all."""
    path = folder / "run.json"
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps({**json.loads(path.read_text()), **facts}, indent=2, default=str))


def peak_memory() -> int:
    """Bytes: the GPU's peak where there is one, else this process's resident peak."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class MetricsLog:
    """metrics.jsonl, and whatever trackers the config names. On resume, records after the checkpoint are dropped."""

    def __init__(self, folder: Path, accelerator: Any, step: int):
        self.accelerator = accelerator
        self.file = None
        if accelerator.is_main_process:
            path = folder / "metrics.jsonl"
            kept = [line for line in _lines(path) if json.loads(line)["step"] <= step] if step else []
            with whole_file(path) as temporary:  # a kill here must not lose the records so far
                temporary.write_text("".join(kept))
            self.file = path.open("a")
        self.last_step = step

    def write(self, loop: Any, sums: dict[str, Tensor], seconds: float) -> dict[str, float]:
        """Averages over processes and writes one record."""
        values = distributed.means(self.accelerator, sums)
        steps = loop.step - self.last_step
        items = items_per_step(loop.config, self.accelerator)
        self.last_step = loop.step
        record = {
            "step": loop.step,
            "epoch": loop.step * items / loop.task.size,
            **{name: value.item() for name, value in values.items()},
            "lr": loop.schedule.get_last_lr()[0],
            f"{loop.task.unit}_per_second": steps * items / max(seconds, 1e-9),
            "peak_memory": peak_memory(),
        }
        if self.file:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        self.accelerator.log({key: value for key, value in record.items() if key != "step"}, step=loop.step)
        return record

    def close(self) -> None:
        if self.file:
            self.file.close()


def _lines(path: Path) -> list[str]:
    """Complete lines of a file that a kill may have cut short."""
    text = path.read_text() if path.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


class CatchInterrupt:
    """Turns Ctrl-C into a flag, so that the step in progress is finished and saved. A second one acts at once."""

    def __init__(self) -> None:
        self.hit = False

    def __enter__(self) -> CatchInterrupt:
        try:
            self._before: Any = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # not in the main thread: leave signals alone
            self._before = None
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.hit:
            raise KeyboardInterrupt
        self.hit = True
        print("finishing this step, then saving (press Ctrl-C again to stop at once)", file=sys.stderr)

    def __exit__(self, *details: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def begin_folder(folder: Path, config: Any, identity: dict[str, Any], media: str = "images") -> None:
    """Makes the folder of what is drawn, with config.yaml and run.json; once nothing can be mistyped any more."""
    (folder / media).mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    (folder / "run.json").write_text(json.dumps({"config": identity, "versions": versions()}, indent=2))


def refuse_other(folder: Path, identity: dict[str, Any], what: str) -> None:
    """ValueError, with the keys, for a folder that holds what another config made, as `begin_folder` wrote it down."""
    path = folder / "run.json"
    before = json.loads(path.read_text())["config"] if path.is_file() else identity
    changed = sorted(key for key in identity if identity[key] != before.get(key))
    if changed:
        raise ValueError(
            f"{folder} holds {what} made with other values of: {', '.join(changed)}. "
            "Choose another folder with --set output=..., or remove this one."
        )
