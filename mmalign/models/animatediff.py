"""AnimateDiff (2307.04725): Stable Diffusion 1.x with motion modules between the layers of its UNet."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AnimateDiffPipeline
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Condition, cast, exact
from mmalign.models.sd import discrete
from mmalign.models.video import VideoAdapter

_CHUNK = 16  # pictures that are encoded or decoded at once, as in the pipeline


class AnimateDiff(VideoAdapter):
    """Adapter for folders that `AnimateDiffPipeline.save_pretrained` wrote, motion modules in the UNet.

    Each frame is a picture of its own for the autoencoder and the text; the motion modules alone see several. The
    folder's motion_adapter is left out: its weights are in the UNet.
    """

    family = "animatediff"
    pipeline_class: Any = AnimateDiffPipeline
    denoiser_name = "unet"
    unused = ("motion_adapter", "feature_extractor", "image_encoder")
    fps = 8.0
    frames = 16

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        self.process = discrete(pipe.scheduler)

    # ------------------------------------------------------------------------------------------------ clips

    @property
    def temporal(self) -> int:
        return 1

    @property
    def longest(self) -> int:
        """Frames for which the motion modules have positions."""
        lengths: Any = self.denoiser.config.motion_max_seq_length
        return int(lengths if isinstance(lengths, int) else min(lengths))

    def check_frames(self, frames: int, key: str) -> None:
        if frames > self.longest:
            raise ValueError(
                f"{key}: {frames} frames do not fit {self.family}, whose motion modules have positions for "
                f"{self.longest}; use {self.longest} or fewer"
            )

    @torch.no_grad()
    def encode_media(self, pixels: Tensor) -> Tensor:
        pictures = pixels.transpose(1, 2).flatten(0, 1)
        with exact(self.device):
            found = [
                self.vae.encode(part.to(self.device, self.vae.dtype)).latent_dist for part in pictures.split(_CHUNK)
            ]
        mean, std = (torch.cat(parts).float() for parts in ([p.mean for p in found], [p.std for p in found]))
        return torch.stack([self._clips(value, len(pixels)) for value in self.scaled(mean, std)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        pictures = self.unscaled(latents).to(self.vae.dtype).transpose(1, 2).flatten(0, 1)
        return self._clips(torch.cat([self.vae.decode(part).sample for part in pictures.split(_CHUNK)]), len(latents))

    def _clips(self, pictures: Tensor, count: int) -> Tensor:
        """Pictures [B * F, C, h, w], clip by clip, to [B, C, F, h, w]."""
        return pictures.unflatten(0, (count, -1)).transpose(1, 2)

    # ------------------------------------------------------------------------------------------------ prompts

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """encoder_hidden_states [B, L, D] of CLIP. Longer prompts are cut, EOT kept."""
        tokens = self.tokens(self.pipe.tokenizer, prompts)
        with self.encoding(grad):
            return {"encoder_hidden_states": self.pipe.text_encoder(tokens.input_ids)[0]}

    # ------------------------------------------------------------------------------------------------ denoiser

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The noise at timesteps t [B]; the text is there for each frame."""
        model = denoiser or self.denoiser
        dtype = next(model.parameters()).dtype
        states = cast(condition, dtype)["encoder_hidden_states"].repeat_interleave(noisy.shape[2], dim=0)
        return model(noisy.to(dtype), t.to(noisy.device), encoder_hidden_states=states).sample
