"""Training the autoencoder of a latent diffusion pipeline: one step reconstructs a batch of pictures or clips."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor, nn

from mmalign.jobs import TrainConfig
from mmalign.losses import supervised
from mmalign.media import write_image
from mmalign.methods import Reconstruction
from mmalign.models import base
from mmalign.tasks import sources
from mmalign.tasks.inputs import View, check_sizes, clip, cut, cut_clip, draw, picture


class AutoencoderTask:
    unit = "images"

    def __init__(self, config: TrainConfig, device: torch.device):
        assert isinstance(config.loss, Reconstruction)
        self.config, self.objective = config, config.loss
        self.items, dropped = sources.singles(config.data)
        self.size = len(self.items)
        self.adapter = base.load(config.model, device=device)
        self.vae = trainable(self.adapter, config, device)
        self.modules = nn.ModuleDict({"vae": self.vae})
        self.facts: dict[str, Any] = {"data": dropped, "contents": sources.digest(self.items)}

    def load(self, positions: list[tuple[int, int]]) -> dict[str, Any]:
        data, pixels, generators = self.config.data, [], []
        for index, epoch in positions:
            item = self.items[index]
            generator = draw(self.config.seed, item.media.hash(), epoch)
            view = View.draw(data, generator)
            if data.frames:
                frames, side = clip(item.media, data.frames, data.fps, view), (data.resolution, data.resolution)
                pixels.append(cut_clip(frames, side, view)[0])
            else:
                pixels.append(cut(picture(item.media), data.resolution, view)[0])
            generators.append(generator)
        return {"pixels": torch.stack(pixels), "generators": generators, "items": [i for i, _ in positions]}

    def loss(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = batch["pixels"].to(self.adapter.device)
        return losses(self.vae, self.objective, pixels, batch["generators"])

    @torch.no_grad()
    def validate(self, folder: Path, step: int) -> None:
        """Writes a strip of originals above their reconstructions; of clips their frames one below the other."""
        pixels = self.load([(i, 0) for i in range(min(8, self.size))])["pixels"].to(self.adapter.device)
        decoded = self.vae.decode(self.vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        if pixels.ndim == 5:
            pixels, decoded = (part.transpose(1, 2).flatten(0, 1) for part in (pixels[:4], decoded[:4]))
            count = self.config.data.frames or 1
            strips = [part[i : i + count] for i in range(0, len(pixels), count) for part in (pixels, decoded)]
        else:
            strips = [pixels, decoded]
        rows = torch.cat([torch.cat(list(part), dim=2) for part in strips], dim=1)
        image = ((rows.permute(1, 2, 0).cpu().numpy() + 1) * 127.5).round().astype(np.uint8)
        write_image(folder / f"step-{step:06d}.png", image)

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        """Saves the VAE with white latents (see `whiten`), or, without quant_conv, with latents of unit variance."""
        self.vae.eval()
        posteriors = [
            self.vae.encode(self.load([(i, 0)])["pixels"].to(self.adapter.device)).latent_dist
            for i in range(min(256, self.size))
        ]
        mean, var = torch.cat([p.mean for p in posteriors]), torch.cat([p.var for p in posteriors])
        if self.vae.quant_conv is None:
            self.vae.register_to_config(scaling_factor=round(1 / mean.std().item(), 5))
        else:
            whiten(self.vae, mean, var)
        _lay_out(self.vae, torch.contiguous_format, torch.contiguous_format)
        self.vae.save_pretrained(folder / "vae")

    def describe(self, batch: dict[str, Any]) -> str:
        return ", ".join(self.items[i].media.name for i in batch["items"])


def trainable(adapter: Any, config: TrainConfig, device: torch.device) -> Any:
    """The adapter's autoencoder as it is trained.

    Raises:
        ValueError: it is of another kind than this trains, or the data's sizes do not fit it.
    """
    if not isinstance(adapter.vae, AutoencoderKL | AutoencoderKLWan):
        raise ValueError(
            f"task: autoencoder trains an AutoencoderKL or AutoencoderKLWan, and {config.model.path} has "
            f"{type(adapter.vae).__name__}; take a model of another family (sd, sdxl, sd3, flux, pixart, wan)"
        )
    check_sizes(adapter, config.data)
    vae = adapter.vae.requires_grad_(True).train()
    if device.type == "cpu":
        _lay_out(vae, torch.channels_last, torch.channels_last_3d)
    return vae


def losses(
    vae: Any, objective: Reconstruction, pixels: Tensor, generators: Sequence[torch.Generator]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and metrics of pixels [B, 3, (F,) H, W] in [-1, 1]; a generator for the noise of each."""
    posterior = vae.encode(pixels).latent_dist
    unit = torch.stack([torch.randn(posterior.mean.shape[1:], generator=g) for g in generators])
    decoded = vae.decode(posterior.mean + posterior.std * unit.to(pixels.device)).sample
    mean, var = posterior.mean, posterior.var  # not posterior.kl(), which takes pictures alone
    kl = 0.5 * (mean.square() + var - 1 - posterior.logvar).flatten(1).mean(1)
    return supervised.reconstruction(pixels, decoded, kl, l1=objective.l1, l2=objective.l2, kl_weight=objective.kl)


def _lay_out(vae: nn.Module, flat: torch.memory_format, deep: torch.memory_format) -> None:
    """Puts the weights of convolutions into a memory format; with channels last a CPU is up to four times faster."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.to(memory_format=flat if isinstance(module, nn.Conv2d) else deep)


@torch.no_grad()
def whiten(vae: Any, mean: Tensor, var: Tensor) -> None:
    """Makes latents white and noiseless by an affine map in `quant_conv` and its inverse in `post_quant_conv`.

    A plain scaling_factor leaves channels of very different spread under the same noise (0.3 to 3.5 in the shapes
    world). A channel that the decoder hardly uses is mostly posterior noise, which no denoiser can predict: each is
    therefore also scaled by its share of signal, and encoding gives the posterior's mean whatever the generator.
    Reconstructions from posterior means do not change.

    Args:
        vae: AutoencoderKL with quant_conv and post_quant_conv (as Stable Diffusion's); scaling_factor becomes 1. Or
            AutoencoderKLWan; latents_mean becomes 0 and latents_std 1.
        mean, var: of the posteriors of some pictures, [N, C, h, w], or clips, [N, C, T, h, w].
    """
    channels = mean.shape[1]
    rows = mean.double().movedim(1, -1).reshape(-1, channels)
    noise = var.double().mean((0, *range(2, var.ndim)))
    centre = rows.mean(0)
    values, axes = torch.linalg.eigh((rows - centre).T @ (rows - centre) / len(rows) + noise.diag())
    forward = axes @ (values.clamp_min(1e-6) ** -0.5).diag() @ axes.T
    signal = (1 - forward**2 @ noise).clamp_min(0.01)
    forward = signal[:, None] * forward
    back = torch.linalg.inv(forward)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    weight, bias = encode.weight.double().flatten(1), encode.bias.double()
    new_weight, new_bias = torch.zeros_like(weight), torch.empty_like(bias)
    new_weight[:channels], new_bias[:channels] = forward @ weight[:channels], forward @ (bias[:channels] - centre)
    new_bias[channels:] = -30  # the least that DiagonalGaussianDistribution takes for a logarithm of a variance
    encode.weight.copy_(new_weight.reshape(encode.weight.shape))
    encode.bias.copy_(new_bias)
    weight = decode.weight.double().flatten(1)
    decode.bias.copy_(decode.bias.double() + weight @ centre)
    decode.weight.copy_((weight @ back).reshape(decode.weight.shape))
    if isinstance(vae, AutoencoderKLWan):
        vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    else:
        vae.register_to_config(scaling_factor=1.0)
