"""The records of an estimate of memory, and what of it any task has: weights, gradients, optimiser, the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.jobs import TrainConfig
from mmalign.models.tracing import size_of


class NotEstimatedError(ValueError):
    """A run whose memory cannot be told without carrying it out; it says why, and what to do."""


@dataclass(frozen=True)
class Part:
    """A network of the pipeline.

    Attributes:
        parameters, trained: how many numbers, and how many of them are trained.
        dtypes: numbers by dtype.
        bytes: with buffers.
        waits: whether it is in CPU memory but for the time in which it is used.
    """

    name: str
    parameters: int
    trained: int
    dtypes: dict[str, int]
    bytes: int
    waits: bool


@dataclass(frozen=True)
class Pass:
    """What a computation takes beside weights: `kept` bytes (for backward, where there is one), their `peak`, FLOPs."""

    kept: int
    peak: int
    flops: int


@dataclass(frozen=True)
class Step:
    """A micro-batch: what the policy's forward keeps for backward, the peak of it all, FLOPs of its three passes."""

    activations: int
    peak: int
    forward_flops: int
    reference_flops: int
    backward_flops: int


@dataclass(frozen=True)
class Bucket:
    """A shape that items are cut to: width x height (x frames), latents [C, (T,) h, w], tokens (1 each for a UNet)."""

    name: str
    items: int
    latents: tuple[int, ...]
    tokens: int


@dataclass(frozen=True)
class Estimate:
    """A run's memory in bytes, and its FLOPs.

    Attributes:
        rows: pictures or clips in a micro-batch.
        steps: by "checkpointed" and "plain"; of generators both, else as the run is configured.
        text, latents: encoding prompts and media apart from the step; None where nothing is.
        phases: device bytes of each phase; the largest is the run's.
        cached: whether latents and embeddings are kept, so that the encoders are used for what is new alone.
        errors_cached: the same of the reference's errors.
        available: bytes that the device has.
    """

    summary: str
    family: str
    device: str
    precision: str
    rows: int
    accumulate: int
    checkpointing: bool
    cached: bool
    errors_cached: bool
    parts: tuple[Part, ...]
    gradients: int
    optimiser: int
    average: int
    copies: int
    reference: int
    buckets: tuple[Bucket, ...]
    steps: dict[str, Step]
    text: Pass | None
    latents: Pass | None
    phases: dict[str, int]
    available: int

    @property
    def total(self) -> int:
        return max(self.phases.values())

    @property
    def step(self) -> Step:
        """As the run is configured."""
        return self.steps["checkpointed" if self.checkpointing else "plain"]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "total": self.total}


# ------------------------------------------------------------------------------------------------ what stays


def networks(adapter: Any) -> dict[str, nn.Module]:
    """The denoiser, the autoencoder and the encoders of prompts and first frames, by their names in the pipeline."""
    names = (adapter.denoiser_name, "vae", *adapter.text_encoders, "image_encoder")
    return {name: part for name in names if (part := getattr(adapter.pipe, name, None)) is not None}


def part_of(name: str, module: nn.Module, *, waits: bool = False) -> Part:
    """A network as it is: its numbers, dtypes and bytes."""
    numbers: dict[str, int] = {}
    for parameter in module.parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        numbers[dtype] = numbers.get(dtype, 0) + parameter.numel()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return Part(name, sum(numbers.values()), trained, numbers, weights(module), waits)


def weights(part: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return size_of([*part.parameters(), *part.buffers()])


def optimiser_bytes(trained: Sequence[Tensor], kind: str) -> int:
    """What the optimiser keeps of these tensors between steps, in bytes."""
    if kind == "adamw":
        return 2 * size_of(trained) + 4 * len(trained)
    counts = [p.numel() for p in trained]
    return sum(2 * count + 8 * -(-count // 256) if count >= 4096 else 8 * count for count in counts)


def finished(
    config: TrainConfig, device: torch.device, parts: Sequence[Part], trained: Sequence[Tensor], step: Step,
    bucket: Bucket, *, rows: int, summary: str, family: str, checkpointing: bool = False,
) -> Estimate:  # fmt: skip
    """The estimate of a task that encodes nothing apart from its steps, and has no second model."""
    gradients, optimiser = size_of(trained), optimiser_bytes(trained, config.optim.optimizer)
    average = gradients if config.ema else 0
    steady = sum(part.bytes for part in parts) + optimiser + average
    numbers = [p.numel() * 4 for p in trained]
    spare = sum(numbers) if device.type == "cuda" else 2 * max(numbers)  # as in `memory`
    between = gradients if config.optim.accumulate > 1 else 0
    phases = {"step": steady + between + step.peak, "update": steady + gradients + spare}
    return Estimate(
        summary=summary, family=family, device=str(device), precision=config.precision, rows=rows,
        accumulate=config.optim.accumulate, checkpointing=checkpointing, cached=False, errors_cached=False,
        parts=tuple(parts), gradients=gradients, optimiser=optimiser, average=average, copies=0, reference=0,
        buckets=(bucket,), steps={"checkpointed" if checkpointing else "plain": step}, text=None, latents=None,
        phases=phases, available=available(device),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the device


def available(device: torch.device) -> int:
    """Bytes: all of a GPU's memory; of a CPU's what is free now, or what the process's group may still take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(known["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
