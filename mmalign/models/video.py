"""What the adapters of video families share: clips of so many frames, latents with an axis of time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.models.adapter import Adapter, Condition, exact


class VideoAdapter(Adapter):
    """An adapter whose pixels are clips [B, 3, F, H, W] in [-1, 1], and whose latents are [B, C, T, h, w].

    A subclass sets `fps`, defines what `Adapter` asks for, and, where its autoencoder is of another kind, `temporal`,
    `vae_factor`, `scaled` and `unscaled`.
    """

    modality = "video"
    fps: float  # frames per second at which the family's clips play, as it was trained
    frames: int  # of a clip that the pipeline draws by default
    guides_in_one_call = True

    @property
    def temporal(self) -> int:
        """How many frames one latent frame covers, but for the first, which covers one."""
        return int(self.vae.config.scale_factor_temporal)

    @property
    def patch(self) -> int:
        """How many latents a side of one of the denoiser's tokens covers."""
        patch: Any = self.denoiser.config.get("patch_size") or 1
        return int(patch if isinstance(patch, int) else patch[-1])

    @property
    def patch_frames(self) -> int:
        """How many latent frames one of the denoiser's tokens covers."""
        patch: Any = self.denoiser.config.get("patch_size_t") or self.denoiser.config.get("patch_size") or 1
        return int(patch[0]) if not isinstance(patch, int) else int(self.denoiser.config.get("patch_size_t") or 1)

    @property
    def channels(self) -> int:
        """Of the latents."""
        config = self.vae.config
        return int(config.get("z_dim") or config.latent_channels)

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return self.channels, self.latent_frames(frames), height // self.vae_factor, width // self.vae_factor

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip of so many frames."""
        return (frames - 1) // self.temporal + 1

    def check_frames(self, frames: int, key: str) -> None:
        """ValueError, with the nearest numbers that fit, for a number of frames that the family cannot have."""
        step = 2 * self.temporal * self.patch_frames
        if not self._fits(frames):
            fitting = [n for n in range(1, frames + step) if self._fits(n)]
            near = " or ".join(map(str, sorted(sorted(fitting, key=lambda n: (abs(n - frames), n))[:2])))
            raise ValueError(
                f"{key}: {frames} frames do not fit {self.family}, whose autoencoder {self.coding}; use {near}"
            )

    @property
    def coding(self) -> str:
        """Why not every number of frames fits, in words."""
        return f"makes one latent frame of {self.temporal} after the first"

    def _fits(self, frames: int) -> bool:
        return (frames - 1) % self.temporal == 0 and self.latent_frames(frames) % self.patch_frames == 0

    def image_tokens(self, shape: tuple[int, ...]) -> int:
        return (shape[-3] // self.patch_frames) * super().image_tokens(shape)

    def encode_images(self, images: Tensor, frames: int) -> Condition:
        """What the denoiser is told of the first frames [B, 3, H, W] in [-1, 1] of clips of so many frames; nothing by
        default.
        """
        return {}

    def drawn(self, output: Any) -> np.ndarray:
        return np.asarray(output.frames)

    # ------------------------------------------------------------------------------------------------ clips

    def scaled(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and deviation [B, C, T, h, w] as the denoiser knows latents."""
        factor = self.vae.config.scaling_factor
        return mean * factor, std * factor

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled` for latents: what the autoencoder decodes."""
        return latents / self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_media(self, pixels: Tensor) -> Tensor:
        """Clips [B, 3, F, H, W] in [-1, 1] to posterior moments (mean, std) [B, 2, C, T, h, w]."""
        with exact(self.device):
            posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return torch.stack(self.scaled(posterior.mean.float(), posterior.std.float()), dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] to clips [B, 3, F, H, W] in [-1, 1]; differentiable."""
        return self.vae.decode(self.unscaled(latents).to(self.vae.dtype)).sample


def channel_statistics(config: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each latent channel, [C, 1, 1, 1], of an autoencoder that has them in its config."""
    mean, std = (like.new_tensor(list(values)) for values in (config.latents_mean, config.latents_std))
    return mean[:, None, None, None], std[:, None, None, None]
