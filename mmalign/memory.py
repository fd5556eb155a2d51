"""What a training run takes of a device's memory, estimated before anything is loaded, and what was measured after it.

The models are made from their config.json without weights, and one micro-batch runs through them on tensors without
values (`models/tracing.py`): the family's own adapter, a LoRA as it is trained, autograd and checkpointing. So what is
counted is what the run's own code makes, at any size, in seconds and without a GPU.

Bytes of the parts, with P numbers in trained tensors, all of them float32:

    weights       the sum over parameters and buffers, in the dtypes that loading gives
    gradients     4 P
    optimiser     AdamW: 8 P, and 4 for each tensor (its step count); with 8 bits: 2 P, and 8 for each block of 256,
                  but 8 P for tensors below 4096 numbers
    average       4 P, with ema
    copies        4 P for each set of earlier weights: of a policy that inverts, of early stopping
    reference     the denoiser's weights once more, where it is a second model

A run's peak is that of its worst phase: encoding text, encoding a picture or clip, the step (policy forward, reference
forward while the policy's activations wait, backward), the optimiser's update. What is offloaded counts in its phase.

Assumed: attention by a kernel that keeps no matrix of scores (as on this CPU; on GPUs flash and memory-efficient ones);
the CPU's list of what autocast computes in half precision (a GPU's keeps some norms in float32, which are larger).
Not counted: kernels' scratch memory, the allocator's gaps, CUDA's own context (about 0.5 GiB), the batch that is loaded
ahead, pictures drawn for validation and early stopping; on a CPU Python and its libraries (about 0.5 GiB).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from mmalign import memory_autoencoder
from mmalign.jobs import TrainConfig
from mmalign.losses.errors import squared_error
from mmalign.memory_estimate import (
    Bucket,
    Estimate,
    NotEstimatedError,
    Part,
    Pass,
    Step,
    available,
    networks,
    optimiser_bytes,
    part_of,
    weights,
)
from mmalign.methods import Preference
from mmalign.models.skeleton import fake_mode, skeleton
from mmalign.models.tracing import Traced, size_of, without_values
from mmalign.runs import peak_memory, pick_device
from mmalign.tasks import buckets, finish, sources
from mmalign.tasks.inputs import Size, check_sizes
from mmalign.tasks.state import adapter_off

WITHOUT_VALUES_IMPOSSIBLE = (
    DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)  # fmt: skip
"""What torch raises where a computation needs values, or cannot be traced."""


@dataclass(frozen=True)
class Work:
    """What there is to train on: the targets of its items, how many media the largest has, and a sentence."""

    targets: buckets.Targets
    items: int
    media: int
    summary: str


def work(config: TrainConfig, adapter: Any) -> Work:
    """The items of a config's data, from the table and the headers of its media; nothing is decoded.

    Raises:
        ValueError: the data are unusable, or do not fit the model.
    """
    data = config.data.model_copy(update={"verify": False})
    check_sizes(adapter, data)
    if isinstance(config.loss, Preference):
        groups, summary = sources.groups(data, config.loss.items)
        media = [group.media for group in groups]
    else:
        items, summary = sources.singles(data)
        media = [(item.media,) for item in items]
    targets = buckets.targets(media, data, adapter)
    return Work(targets, len(media), max(map(len, media)), summary + targets.summary())


def estimate(config: TrainConfig, known: Work | None = None) -> Estimate:
    """The estimate of a run of one process with `sharding: none`.

    Args:
        known: what a generator is trained on, where it has been read already.

    Raises:
        NotEstimatedError: a run whose memory cannot be told without carrying it out.
        ValueError: a model folder or data that training would refuse.
    """
    if config.task == "autoencoder":
        return memory_autoencoder.estimate(config)
    if config.task in ("reward", "mllm"):
        raise NotEstimatedError(
            f"memory is not estimated for task: {config.task}, whose networks are not yet made without weights; set "
            "optim.steps: 5, run it, and read memory.measured in run.json"
        )
    if config.online and known is None:
        raise ValueError(
            "the pairs of online rounds are not there yet; drop online, and give data.table, for --dry-run"
        )
    device = pick_device(config.device, config.precision)
    adapter = hollow(config)
    found = known or work(config, adapter)
    mode = fake_mode()
    for part in adapter.pipe.components.values():
        if isinstance(part, nn.Module):
            without_values(part, mode)
    rows, largest = config.optim.batch_size * found.media, found.targets.largest
    cached = config.data.cache != "off"
    keeps_text = cached and not config.optim.train_text_encoder
    with mode:
        text = _text(adapter, 1 if keeps_text else rows)
        latents = _latents(adapter, largest, 1 if cached else rows)
        shape = adapter.latent_shape(*largest)
        adapter.denoiser.enable_gradient_checkpointing()
        steps = {"checkpointed": _step(config, adapter, rows, shape, largest)}
        adapter.denoiser.disable_gradient_checkpointing()
        steps["plain"] = _step(config, adapter, rows, shape, largest)
    parts = tuple(_parts(adapter, config))
    trained = [p for part in networks(adapter).values() for p in part.parameters() if p.requires_grad]
    second = 1 if copies_reference(config) else 0
    pieces = {
        "gradients": size_of(trained), "optimiser": optimiser_bytes(trained, config.optim.optimizer),
        "average": size_of(trained) if config.ema else 0,
        "copies": size_of(trained) * (config.noise.lagged + (config.guards.early_stopping is not None)),
        "reference": second * _reference_bytes(adapter),
    }  # fmt: skip
    step = steps["checkpointed" if config.optim.gradient_checkpointing else "plain"]
    phases = _phases(config, device, parts, pieces, text, latents, step, trained)
    return Estimate(
        summary=found.summary, family=adapter.family, device=str(device), precision=config.precision, rows=rows,
        accumulate=config.optim.accumulate, checkpointing=config.optim.gradient_checkpointing, cached=cached,
        errors_cached=refers(config) and config.reference.kind == "cached",
        parts=parts, buckets=tuple(_buckets(found, adapter)), steps=steps, text=text, latents=latents, phases=phases,
        available=available(device), **pieces,
    )  # fmt: skip


def hollow(config: TrainConfig) -> Any:
    """The adapter as a run has it before its first step, on the meta device; a LoRA of `model.lora` is left out."""
    adapter: Any = skeleton(
        config.model.model_copy(update={"lora": None}), dtype=finish.frozen_dtype(config), vae_dtype=torch.float32
    )
    fresh = config.lora and config.lora.model_copy(update={"init": None})
    finish.make_trainable(adapter, config.model_copy(update={"lora": fresh}))
    if config.data.fps is not None and adapter.modality == "video":
        adapter.fps = config.data.fps
    if config.optim.train_text_encoder:
        for name in adapter.text_encoders:
            if getattr(adapter.pipe, name) is not None:
                getattr(adapter.pipe, name).requires_grad_(True).train()
    return adapter


# ------------------------------------------------------------------------------------------------ what stays


def _parts(adapter: Any, config: TrainConfig) -> Iterator[Part]:
    waiting = {*config.optim.offload} | ({*adapter.text_encoders} if "text_encoder" in config.optim.offload else set())
    for name, part in networks(adapter).items():
        yield part_of(name, part, waits=name in waiting)


def _reference_bytes(adapter: Any) -> int:
    """Of a second denoiser: what the policy has without its LoRA."""
    lora = [p for name, p in adapter.denoiser.named_parameters() if ".lora_" in name]
    return weights(adapter.denoiser) - size_of(lora)


def copies_reference(config: TrainConfig) -> bool:
    """Whether a second denoiser is there in every step, as `PreferenceTask` decides it."""
    wanted = config.reference
    alone = wanted.kind == "frozen" or not config.lora or wanted.other
    return (refers(config) or config.noise.inverted) and alone and wanted.kind != "cached"


def refers(config: TrainConfig) -> bool:
    """Whether steps ask a reference."""
    if not isinstance(config.loss, Preference):
        return False
    compares = "drift" in config.loss.needs or config.guards.anchor or config.guards.velocity
    return bool(compares or not config.loss.reference_free)


def _buckets(found: Work, adapter: Any) -> Iterator[Bucket]:
    numbers = found.targets.numbers
    for number, size in enumerate(found.targets.shapes):
        items = found.items if numbers is None else numbers.count(number)
        if items:
            latents = tuple(adapter.latent_shape(*size))
            name = "x".join(map(str, (size[1], size[0], *size[2:])))
            yield Bucket(name, items, latents, adapter.image_tokens(latents))


# ------------------------------------------------------------------------------------------------ what passes take


@torch.no_grad()
def _text(adapter: Any, rows: int) -> Pass:
    with Traced() as traced:
        condition = adapter.encode_prompt([""] * rows)
        if adapter.sees_image:
            condition = adapter.join(condition | adapter.blank(rows))
        kept = size_of(condition.values())
    return Pass(kept, traced.peak, traced.flops)


def _latents(adapter: Any, size: Size, rows: int) -> Pass:
    with Traced() as traced:
        pixels = torch.empty(rows, 3, *size[2:], *size[:2])
        kept = size_of([adapter.encode_media(pixels)])
    return Pass(kept, traced.peak, traced.flops)


def _step(config: TrainConfig, adapter: Any, rows: int, shape: tuple[int, ...], size: Size) -> Step:
    """One micro-batch, as `tasks/preference.py` and `tasks/sft.py` compute it."""
    process, trains_text = adapter.process, config.optim.train_text_encoder
    dtype = finish.PRECISIONS[config.precision]
    with Traced() as traced, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        latents, unit = torch.empty(rows, *shape), torch.empty(rows, *shape)
        t = torch.full((rows,), 0.5 if process.kind == "flow" else 1)
        noisy, target = process.noisy(latents, t, unit), process.target(latents, t, unit)
        before = traced.live if trains_text else None
        condition = adapter.encode_prompt([""] * rows, grad=trains_text)
        condition = adapter.add_size(condition, torch.empty(rows, 6)) | _first_frames(adapter, rows, size)
        condition = adapter.join(condition)
        begun = traced.mark()
        flops = [traced.flops]
        prediction = adapter.predict(noisy, t, condition)
        activations = traced.live - (begun if before is None else before)
        flops.append(traced.flops)
        if refers(config):
            _reference(adapter, noisy, t, condition)
        flops.append(traced.flops)
        squared_error(prediction, target).mean().backward()
        flops.append(traced.flops)
    peak = traced.peak
    for part in networks(adapter).values():
        part.zero_grad(set_to_none=True)
    first, policy, reference, backward = flops
    return Step(activations, peak, policy - first, reference - policy, backward - reference)


@torch.no_grad()
def _first_frames(adapter: Any, rows: int, size: Size) -> dict[str, Tensor]:
    """What an image-to-video model is told of first frames; nothing for others."""
    if not adapter.of_image:
        return {}
    latents = adapter.image_latents(torch.empty(rows, 3, *size[:2]), size[-1])
    return {"image_latents": latents, **adapter.blank(rows)}


@torch.no_grad()
def _reference(adapter: Any, noisy: Tensor, t: Tensor, condition: dict[str, Tensor]) -> None:
    if finish.has_adapter(adapter):
        with adapter_off(adapter.denoiser):
            adapter.predict(noisy, t, condition)
    else:
        adapter.predict(noisy, t, condition)


def _phases(
    config: TrainConfig, device: torch.device, parts: Iterable[Part], pieces: dict[str, int], text: Pass,
    latents: Pass, step: Step, trained: Sequence[Tensor],
) -> dict[str, int]:  # fmt: skip
    """Device bytes while text and pictures are encoded, in the step, in the update."""
    here = [part for part in parts if not part.waits]
    away = {part.name: part.bytes for part in parts if part.waits}
    reference = pieces["reference"]
    waits = "reference" in config.optim.offload
    steady = sum(part.bytes for part in here) + sum(pieces[name] for name in ("optimiser", "average", "copies"))
    steady += 0 if waits else reference
    vae = away.pop("vae", 0)
    # Within a step that accumulates, the gradients of the micro-batches before are there from the beginning.
    between = pieces["gradients"] if config.optim.accumulate > 1 else 0
    numbers = [p.numel() * 4 for p in trained]
    spare = sum(numbers) if device.type == "cuda" else 2 * max(numbers)  # AdamW works on all tensors at once on a GPU
    return {
        "text": steady + between + sum(away.values()) + text.peak,
        "latents": steady + between + vae + latents.peak,
        "step": steady + between + step.peak + (reference if waits else 0),
        "update": steady + pieces["gradients"] + spare,
    }


# ------------------------------------------------------------------------------------------------ after a run


def compare(config: TrainConfig, known: Work | None, before: int) -> dict[str, Any]:
    """For run.json: the estimate of a run that has just ended, and its measured peak, in bytes.

    Args:
        before: what `runs.peak_memory` said before the run loaded anything; Python and its libraries, on a CPU.
    """
    measured = {
        "peak": peak_memory(),
        "before": before,
        "kind": "allocated" if torch.cuda.is_available() else "resident",
    }
    try:
        found = estimate(config, known)
    except NotEstimatedError as error:
        return {"estimated": None, "why_not": str(error), "measured": measured}
    except WITHOUT_VALUES_IMPOSSIBLE as error:
        return {"estimated": None, "why_not": f"the model cannot be run without values ({error})", "measured": measured}
    shown = {"total": found.total, "phases": found.phases}
    shown |= {name: getattr(found, name) for name in ("gradients", "optimiser", "average", "copies", "reference")}
    parts = {part.name: part.bytes for part in found.parts}
    return {"estimated": {**shown, "weights": parts, "activations": found.step.activations}, "measured": measured}
