"""Qwen-Image (2508.02324): a flow in packed latents of a video autoencoder, told by a vision-language model."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Adapter, Condition, cast, exact
from mmalign.models.packing import PATCH, pack, unpack
from mmalign.noise import Process


class QwenImage(Adapter):
    """Adapter for every folder that `QwenImagePipeline.from_pretrained` loads.

    Latents are [B, C, h, w] and unpacked outside of `predict`; the autoencoder's axis of frames has length 1.
    """

    family = "qwen_image"
    even_sigmas = True
    guides_in_one_call = False
    pipeline_class: Any = QwenImagePipeline
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    flow_schedulers = ("euler",)  # the pipeline hands over its own sigmas
    max_sequence_length = 512
    longest_text = 1024

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        self.process = Process("flow")
        pipe.tokenizer.padding_side = "right"  # `encode_prompt` counts from the left
        if self.guidance is not None:
            raise ValueError(
                f"{config.path}: the transformer's config says guidance_embeds, and this version of diffusers has no "
                "such Qwen-Image transformer; use a checkpoint without, as Qwen-Image is published"
            )

    def call_arguments(
        self, guidance_scale: float, negative_prompts: list[str] | None, count: int = 1
    ) -> dict[str, Any]:
        """The pipeline guides only where it is given negative prompts; by default they are empty, as in training."""
        guided = {"negative_prompt": negative_prompts or [""] * count} if guidance_scale > 1 else {}
        return {"true_cfg_scale": guidance_scale, "max_sequence_length": self.text_length, **guided}

    def guided(self, towards: Tensor, away: Tensor, scale: float) -> Tensor:
        """As in other families, each token then as long as the conditional one, as in the pipeline."""
        tokens = pack(super().guided(towards, away, scale))
        lengths = pack(towards).norm(dim=-1, keepdim=True) / tokens.norm(dim=-1, keepdim=True)
        return unpack(tokens * lengths, tuple(towards.shape))

    # ------------------------------------------------------------------------------------------------ prompts

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """encoder_hidden_states [B, L, D], 0 where encoder_hidden_states_mask [B, L] (int64) is.

        The prompts stand in the pipeline's template, whose beginning is left out of the states.
        """
        pipe, first = self.pipe, self.pipe.prompt_template_encode_start_idx
        length = first + (self.text_length or self.max_sequence_length)
        tokens = self.tokens(pipe.tokenizer, [pipe.prompt_template_encode.format(text) for text in prompts], length)
        with self.encoding(grad):
            found = pipe.text_encoder(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True,
                logits_to_keep=1,
            )  # fmt: skip
        mask = tokens.attention_mask[:, first:]
        states = found.hidden_states[-1][:, first:]
        return {"encoder_hidden_states": states * mask[..., None], "encoder_hidden_states_mask": mask}

    # ------------------------------------------------------------------------------------------------ pictures

    @property
    def vae_factor(self) -> int:
        factor: int = 2 ** len(self.vae.config.temperal_downsample)
        return factor

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        return self.vae.config.z_dim, height // self.vae_factor, width // self.vae_factor

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's latents, [C, 1, 1]."""
        config = self.vae.config
        mean, std = (like.new_tensor(list(value))[:, None, None] for value in (config.latents_mean, config.latents_std))
        return mean, std

    @torch.no_grad()
    def encode_media(self, pixels: Tensor) -> Tensor:
        """As in other families, each picture a clip of one frame, each channel scaled by its own statistics."""
        with exact(self.device):
            posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)[:, :, None]).latent_dist
        mean, std = self._statistics(posterior.mean.float())
        moments = ((posterior.mean[:, :, 0].float() - mean) / std, posterior.std[:, :, 0].float() / std)
        return torch.stack(moments, dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pixels [B, 3, H, W] in [-1, 1]; differentiable."""
        mean, std = self._statistics(latents)
        return self.vae.decode((latents * std + mean).to(self.vae.dtype)[:, :, None]).sample[:, :, 0]

    # ------------------------------------------------------------------------------------------------ denoiser

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The velocity at flow times t [B], which the transformer takes as they are.

        Text is cut after the longest prompt of the batch: what is left out is masked in every row.
        """
        model = denoiser or self.denoiser
        dtype = next(model.parameters()).dtype
        b, _, h, w = noisy.shape
        mask = condition["encoder_hidden_states_mask"]
        known = not isinstance(mask, FakeTensor)  # without values, as in an estimate, text is as long as it can be
        mask = mask[:, : int(mask.sum(1).max())] if known else mask
        states = condition["encoder_hidden_states"][:, : mask.shape[1]]
        tokens = model(
            hidden_states=pack(noisy.to(dtype)),
            timestep=t.to(noisy.device),
            encoder_hidden_states=cast({"states": states}, dtype)["states"],
            encoder_hidden_states_mask=None if not known or mask.all() else mask,
            img_shapes=[[(1, h // PATCH, w // PATCH)]] * b,
        ).sample
        return unpack(tokens, tuple(noisy.shape))
