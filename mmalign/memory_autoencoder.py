"""What training an autoencoder takes of a device's memory: `mmalign.memory` says how it is counted."""

from __future__ import annotations

import torch
from torch import nn

from mmalign.jobs import TrainConfig
from mmalign.memory_estimate import Bucket, Estimate, Step, finished, networks, part_of
from mmalign.methods import Reconstruction
from mmalign.models.skeleton import fake_mode, skeleton
from mmalign.models.tracing import Traced, without_values
from mmalign.runs import pick_device
from mmalign.tasks import autoencoder, finish, sources


def estimate(config: TrainConfig) -> Estimate:
    """The estimate of a run of `task: autoencoder`; the whole pipeline is loaded, and its autoencoder trained.

    Raises:
        ValueError: a model folder or data that training would refuse.
    """
    device, data = pick_device(config.device, config.precision), config.data
    items, summary = sources.singles(data.model_copy(update={"verify": False}))
    adapter = skeleton(config.model)
    vae = autoencoder.trainable(adapter, config, torch.device("meta"))  # channels last would take as many bytes
    mode = fake_mode()
    for part in networks(adapter).values():
        without_values(part, mode)
    size = (data.resolution, data.resolution, *((data.frames,) if data.frames else ()))
    with mode:
        step = _step(config, vae, size)
    latents = tuple(adapter.latent_shape(*size))
    bucket = Bucket("x".join(map(str, size)), len(items), latents, adapter.image_tokens(latents))
    parts = [part_of(name, part) for name, part in networks(adapter).items()]
    return finished(
        config, device, parts, [p for p in vae.parameters() if p.requires_grad], step, bucket,
        rows=config.optim.batch_size, summary=summary, family=adapter.family,
    )  # fmt: skip


def _step(config: TrainConfig, vae: nn.Module, size: tuple[int, ...]) -> Step:
    """One micro-batch, by the task's own loss."""
    assert isinstance(config.loss, Reconstruction)
    rows, dtype = config.optim.batch_size, finish.PRECISIONS[config.precision]
    generators = [torch.Generator() for _ in range(rows)]
    with Traced() as traced, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        pixels = torch.empty(rows, 3, *size[2:], *size[:2])
        begun = traced.mark()
        loss, _ = autoencoder.losses(vae, config.loss, pixels, generators)
        activations, forward = traced.live - begun, traced.flops
        loss.backward()
    peak, backward = traced.peak, traced.flops - forward
    vae.zero_grad(set_to_none=True)
    return Step(activations, peak, forward, 0, backward)
