"""Wan 2.x text-to-video (2503.20314): a flow transformer over space and time, a causal 3D autoencoder, UMT5.

Wan 2.2 A14B has two transformers: `transformer` where t >= boundary_ratio, the high noise, `transformer_2` below. One
is trained at a time, on times of its own part; sampling takes both.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Condition, cast
from mmalign.models.checkpoint import index_parts
from mmalign.models.video import VideoAdapter, channel_statistics
from mmalign.noise import Process

_EXPERTS = {"high": "transformer", "low": "transformer_2"}


class Wan(VideoAdapter):
    """Adapter for folders that `WanPipeline.from_pretrained` loads: Wan 2.1 T2V, 2.2 A14B, and 2.2 TI2V from text."""

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
        self.denoiser_name = _EXPERTS[config.expert or "high"]
        super().__init__(pipe, config)
        self.process = Process("flow")
        if config.expert is not None:
            boundary = float(pipe.config.boundary_ratio)
            self.span = (boundary, 1.0) if config.expert == "high" else (0.0, boundary)

    @classmethod
    def idle_in_training(cls, config: Model) -> tuple[str, ...]:
        """The transformer of the other part of the schedule."""
        index = json.loads((config.path / "model_index.json").read_text())
        two = bool(index_parts(config.path).get("transformer_2", ("", ""))[0])
        if two and index.get("boundary_ratio") is None:
            raise ValueError(f"{config.path} has two transformers, and model_index.json no boundary_ratio between them")
        if two and config.expert is None:
            raise ValueError(
                f"{config.path} has two transformers, one for each part of the schedule (Wan 2.2 A14B), and one is "
                "trained at a time; set model.expert: high (or low)"
            )
        if config.expert is not None and not two:
            raise ValueError(f"model.expert: {config.path} has one transformer, for all of the schedule; drop the key")
        return tuple(name for expert, name in _EXPERTS.items() if two and expert != config.expert)

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """encoder_hidden_states [B, L, D] of UMT5, zeros behind each prompt's end, as the pipeline has them."""
        tokens = self.tokens(self.pipe.tokenizer, [prompt_clean(text) for text in prompts], self.text_length)
        with self.encoding(grad):
            states = self.pipe.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        # Not a product, which would turn what is not finite behind the end into more of it.
        return {"encoder_hidden_states": states.masked_fill(tokens.attention_mask[..., None] == 0, 0.0)}

    @property
    def vae_factor(self) -> int:
        return int(self.vae.config.scale_factor_spatial)

    def scaled(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        centre, spread = channel_statistics(self.vae.config, mean)
        return (mean - centre) / spread, std / spread

    def unscaled(self, latents: Tensor) -> Tensor:
        centre, spread = channel_statistics(self.vae.config, latents)
        return latents * spread + centre

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The velocity at flow times t [B]; the transformer counts them in thousandths, TI2V for each token.

        Where both transformers of Wan 2.2 A14B are there, each row is the business of the one for its time.
        """
        timestep = t.to(noisy.device) * self.pipe.scheduler.config.num_train_timesteps
        if denoiser is not None or self.pipe.transformer is None or self.pipe.transformer_2 is None:
            return self._velocity(denoiser or self.denoiser, noisy, timestep, condition)
        high = timestep >= self.pipe.config.boundary_ratio * self.pipe.scheduler.config.num_train_timesteps
        if high.all() or not high.any():
            model = self.pipe.transformer if high.all() else self.pipe.transformer_2
            return self._velocity(model, noisy, timestep, condition)
        found = torch.empty_like(noisy)
        for rows, model in ((high, self.pipe.transformer), (~high, self.pipe.transformer_2)):
            own = {name: value[rows] for name, value in condition.items()}
            found = found.masked_scatter(
                rows.view(-1, *[1] * (noisy.ndim - 1)),
                self._velocity(model, noisy[rows], timestep[rows], own).to(found),
            )
        return found

    def _velocity(self, model: Any, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        dtype = model.dtype  # not that of the first parameter: some stay in float32
        if self.pipe.config.expand_timesteps:
            timestep = self.token_times(timestep, tuple(noisy.shape))
        velocity: Tensor = model(noisy.to(dtype), timestep=timestep, **cast(condition, dtype)).sample
        return velocity

    def token_times(self, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        """t [B] for each token [B, L] of latents of this shape."""
        return t[:, None].expand(-1, self.image_tokens(shape))
