"""CogVideoX (2408.06072): a v-prediction transformer over space and time, a causal 3D autoencoder, T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Condition, cast
from mmalign.models.sd import discrete
from mmalign.models.video import VideoAdapter


class CogVideoX(VideoAdapter):
    """Adapter for folders that `CogVideoXPipeline.from_pretrained` loads: CogVideoX 2B and 5B, and CogVideoX 1.5.

    Latents are [B, C, T, h, w] outside of `predict`; the transformer takes [B, T, C, h, w]. The process is that of the
    checkpoint's scheduler, whose abar is shifted and ends at a signal-to-noise ratio of 0.

    The tokens of CogVideoX 1.5 cover two latent frames. Where their number is odd, the first is there twice, as in its
    own training, and `decode` leaves the copy out, as the pipeline does.
    """

    family = "cogvideox"
    pipeline_class: Any = CogVideoXPipeline
    fps = 8.0
    frames = 49
    beside: tuple[str, ...] = ()  # entries of the condition that stand beside the noisy latents, as channels
    max_sequence_length = 226
    longest_text = 226
    schedulers = {
        "ddim": ("CogVideoXDDIMScheduler", {"clip_sample": False}),
        "dpm++sde": ("CogVideoXDPMScheduler", {"clip_sample": False}),
    }

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        self.process = discrete(pipe.scheduler)
        told = self.denoiser.config
        self.frames = told.sample_frames
        if told.patch_size_t:  # CogVideoX 1.5
            self.fps = 16.0
        wanted = self.vae.config.latent_channels * (2 if self.of_image else 1)
        if told.patch_size_t not in (None, 1, 2) or told.in_channels != wanted:
            raise ValueError(
                f"{config.path}: the transformer has patches of {told.patch_size_t} latent frames and takes "
                f"{told.in_channels} channels, and {self.pipeline_class.__name__} feeds it {wanted}; use a published "
                "CogVideoX checkpoint of this class"
            )
        wanted = told.max_text_seq_length
        if not told.use_rotary_positional_embeddings and self.text_length != wanted:
            raise ValueError(
                f"model.max_sequence_length: the positions of {config.path} (as of CogVideoX 2B) begin after {wanted} "
                f"text tokens; use {wanted}"
            )

    # ------------------------------------------------------------------------------------------------ clips

    @property
    def temporal(self) -> int:
        return int(self.vae.config.temporal_compression_ratio)

    @property
    def patch_frames(self) -> int:
        return int(self.denoiser.config.patch_size_t or 1)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of a clip, with the copy of the first that fills the last token of CogVideoX 1.5."""
        found = super().latent_frames(frames)
        return found + found % self.patch_frames

    @property
    def coding(self) -> str:
        return f"decodes two latent frames of {self.temporal} at a time after the first"

    def _fits(self, frames: int) -> bool:
        return (frames - 1) % (2 * self.temporal) == 0

    @torch.no_grad()
    def encode_media(self, pixels: Tensor) -> Tensor:
        moments = super().encode_media(pixels)
        copies = moments.shape[3] % self.patch_frames
        return torch.cat([moments[:, :, :, :1]] * copies + [moments], dim=3)

    def decode(self, latents: Tensor) -> Tensor:
        even = latents.shape[2] % 2 == 0  # a clip that fits has an odd number of its own
        return super().decode(latents[:, :, 1:] if even else latents)

    def default_size(self) -> tuple[int, int]:
        told = self.denoiser.config
        return told.sample_height * self.vae_factor, told.sample_width * self.vae_factor

    def draw_noise(self, shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
        channels, frames, *sides = shape  # the pipeline draws frame by frame
        return super().draw_noise((frames, channels, *sides), generators).transpose(1, 2)

    # ------------------------------------------------------------------------------------------------ prompts

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """encoder_hidden_states [B, L, D] of T5, padding included."""
        tokens = self.tokens(self.pipe.tokenizer, prompts, self.text_length)
        with self.encoding(grad):
            return {"encoder_hidden_states": self.pipe.text_encoder(tokens.input_ids)[0]}

    # ------------------------------------------------------------------------------------------------ denoiser

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """v at timesteps t [B]."""
        model = denoiser or self.denoiser
        dtype = next(model.parameters()).dtype
        known = cast(condition, dtype)
        frames = torch.cat([noisy.to(dtype), *(known[name] for name in self.beside)], dim=1).transpose(1, 2)
        out = model(
            frames, encoder_hidden_states=known["encoder_hidden_states"], timestep=t.to(noisy.device),
            ofs=frames.new_full((1,), 2.0) if self.denoiser.config.ofs_embed_dim else None,
            image_rotary_emb=self._rotary(noisy),
        ).sample  # fmt: skip
        return out.transpose(1, 2)

    def _rotary(self, noisy: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cosine and sine of each token's position for latents of this shape, from the pipeline's own method."""
        if not self.denoiser.config.use_rotary_positional_embeddings:
            return None
        _, _, count, h, w = noisy.shape
        sides = h * self.vae_factor, w * self.vae_factor
        found: tuple[Tensor, Tensor] = self.pipe._prepare_rotary_positional_embeddings(*sides, count, noisy.device)
        return found
