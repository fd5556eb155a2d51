"""Wan 2.x text-to-video (2503.20314): a flow transformer over space and time, a causal 3D autoencoder, UMT5."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from mmalign.jobs import Model
from mmalign.models.adapter import Condition, cast
from mmalign.models.video import VideoAdapter, channel_statistics
from mmalign.noise import Process


class Wan(VideoAdapter):
    """Adapter for folders that `WanPipeline.from_pretrained` loads: Wan 2.1 T2V, and 2.2 TI2V from text.

    Of Wan 2.2 A14B, which has a transformer for each half of the schedule, see `__init__`.
    """

    family = "wan"
    pipeline_class: Any = WanPipeline
    noise_dtype = torch.float32
    guides_in_one_call = False
    fps = 16.0
    frames = 81
    max_sequence_length = 512
    longest_text = 512
    may_lack = ("transformer_2",)

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        self.process = Process("flow")
        if pipe.transformer_2 is not None:
            raise ValueError(
                f"{config.path} has two transformers, one for each part of the schedule (Wan 2.2 A14B), and one is "
                "trained at a time here; save each as a pipeline of its own, without transformer_2 and boundary_ratio"
            )

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """encoder_hidden_states [B, L, D] of UMT5, zeros behind each prompt's end, as the pipeline has them."""
        tokens = self.tokens(self.pipe.tokenizer, [prompt_clean(text) for text in prompts], self.text_length)
        with self.encoding(grad):
            states = self.pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        # Not a product, which would turn what is not finite behind the end into more of it.
        return {"encoder_hidden_states": states.masked_fill(tokens.attention_mask[..., None] == 0, 0.0)}

    def scaled(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        centre, spread = channel_statistics(self.vae.config, mean)
        return (mean - centre) / spread, std / spread

    def unscaled(self, latents: Tensor) -> Tensor:
        centre, spread = channel_statistics(self.vae.config, latents)
        return latents * spread + centre

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The velocity at flow times t [B]; the transformer counts them in thousandths, TI2V for each token."""
        model: Any = denoiser or self.denoiser
        dtype = model.dtype  # not that of the first parameter: some stay in float32
        timestep = t.to(noisy.device) * self.pipe.scheduler.config.num_train_timesteps
        if self.pipe.config.expand_timesteps:
            timestep = timestep[:, None].expand(-1, self.image_tokens(tuple(noisy.shape)))
        return model(noisy.to(dtype), timestep=timestep, **cast(condition, dtype)).sample
