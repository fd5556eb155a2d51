"""LTX-Video (2501.00103): a flow in the tokens of a strongly compressing video autoencoder, told by T5."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import LTXPipeline
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Condition, cast
from mmalign.models.video import VideoAdapter
from mmalign.noise import Process, generator


class LTXVideo(VideoAdapter):
    """Adapter for folders that `LTXPipeline.from_pretrained` loads: LTX-Video 0.9.0, and 0.9.1 with its decoder that
    is told a time.

    Latents are [B, C, T, h, w] outside of `predict`, and a row of tokens inside. Positions in time are in seconds: so
    `fps` is a condition of the transformer. It is an attribute that may be set, since all clips of a job share it.

    A decoder that is told a time denoises a little: `decode_noise` of the latents is noise, and the time is
    `decode_time`, as the model's authors advise. `decode` draws this noise from a seed that is always the same, so
    that a clip's pixels are a function of its latents.
    """

    family = "ltx"
    pipeline_class: Any = LTXPipeline
    noise_dtype = torch.float32
    even_sigmas = True
    flow_schedulers = ("euler",)  # the pipeline hands over its own sigmas
    fps = 25.0
    frames = 161
    max_sequence_length = 128
    decode_time = 0.05
    decode_noise = 0.025

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        self.process = Process("flow")
        if (self.denoiser.config.patch_size, self.denoiser.config.patch_size_t) != (1, 1):
            raise ValueError(
                f"{config.path}: the transformer's patches are larger than 1, and LTXPipeline counts positions for "
                "patches of 1; use a published LTX-Video checkpoint"
            )

    @property
    def told_time(self) -> bool:
        """Whether the autoencoder's decoder is told a time (0.9.1 and later)."""
        return bool(self.vae.config.timestep_conditioning)

    def call_arguments(
        self, guidance_scale: float, negative_prompts: list[str] | None, count: int = 1
    ) -> dict[str, Any]:
        decoding = {"decode_timestep": self.decode_time, "decode_noise_scale": self.decode_noise}
        arguments = super().call_arguments(guidance_scale, negative_prompts, count)
        return {**arguments, "frame_rate": self.fps, **(decoding if self.told_time else {})}

    def draw(self, *args: Any, **options: Any) -> np.ndarray:
        with self._seeded():
            return super().draw(*args, **options)

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """Inside, the noise that some decoders add to their layers (decoder_inject_noise) is always the same.

        They take it from the global generator, which is left as it was.
        """
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            yield

    # ------------------------------------------------------------------------------------------------ clips

    @property
    def temporal(self) -> int:
        return int(self.vae.temporal_compression_ratio)

    @property
    def vae_factor(self) -> int:
        return int(self.vae.spatial_compression_ratio)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each channel, [C, 1, 1, 1]: weights of the autoencoder, not entries of its config."""
        mean, std = (value.to(like)[:, None, None, None] for value in (self.vae.latents_mean, self.vae.latents_std))
        return mean, std / self.vae.config.scaling_factor

    def scaled(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        centre, spread = self._statistics(mean)
        return (mean - centre) / spread, std / spread

    def unscaled(self, latents: Tensor) -> Tensor:
        centre, spread = self._statistics(latents)
        return latents * spread + centre

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, T, h, w] to clips [B, 3, F, H, W] in [-1, 1]; differentiable.

        Sliced clips are decoded one by one here: the autoencoder's own slicing (diffusers 0.42) mixes up the rows of
        times and latents.
        """
        if not self.told_time:
            with self._seeded():
                return super().decode(latents)
        raw = self.unscaled(latents)
        noise = torch.randn(raw.shape[1:], generator=generator("ltx decoder")).to(raw)
        raw = ((1 - self.decode_noise) * raw + self.decode_noise * noise).to(self.vae.dtype)
        parts = []
        for rows in raw.split(1 if self.vae.use_slicing else len(raw)):
            with self._seeded():
                parts.append(self.vae.decode(rows, rows.new_full((len(rows),), self.decode_time)).sample)
        return torch.cat(parts)

    # ------------------------------------------------------------------------------------------------ prompts

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """encoder_hidden_states [B, L, D] of T5, and encoder_attention_mask [B, L] (int64) for the transformer."""
        tokens = self.tokens(self.pipe.tokenizer, prompts, self.text_length)
        with self.encoding(grad):
            states = self.pipe.text_encoder(tokens.input_ids)[0]
        return {"encoder_hidden_states": states, "encoder_attention_mask": tokens.attention_mask}

    # ------------------------------------------------------------------------------------------------ denoiser

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The velocity at flow times t [B]; the transformer counts them in thousandths, and positions in seconds."""
        model = denoiser or self.denoiser
        dtype = next(model.parameters()).dtype
        _, _, frames, height, width = noisy.shape
        tokens = model(
            hidden_states=noisy.to(dtype).flatten(2).transpose(1, 2),
            timestep=t.to(noisy.device) * self.pipe.scheduler.config.num_train_timesteps,
            num_frames=frames, height=height, width=width,
            rope_interpolation_scale=(self.temporal / self.fps, self.vae_factor, self.vae_factor),
            **cast(condition, dtype),
        ).sample  # fmt: skip
        return tokens.transpose(1, 2).reshape(noisy.shape)
