"""FLUX.1 dev and schnell: a rectified flow in packed latents, told a pooled CLIP embedding and T5's states."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Adapter, Condition, cast
from mmalign.models.packing import PATCH, pack, positions, unpack
from mmalign.noise import Process


class Flux(Adapter):
    """Adapter for every folder that `FluxPipeline.from_pretrained` loads; latents are unpacked outside of `predict`.

    dev is guidance-distilled: its transformer takes the guidance as a number. Sampling passes `guidance_scale`,
    training `model.guidance`, 1 by default (see `Adapter._embedded_guidance`). schnell takes none.
    """

    family = "flux"
    even_sigmas = True
    guides_in_one_call = False
    pipeline_class: Any = FluxPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    max_sequence_length = 512
    longest_text = 512

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        self.process = Process("flow")
        if not pipe.scheduler.config.get("use_dynamic_shifting"):
            self.flow_schedulers = ("euler",)  # the pipeline passes a dynamic shift even so, and dpm++ refuses it

    @property
    def patch(self) -> int:
        return PATCH  # the transformer's config says 1: it is fed packed latents

    def call_arguments(
        self, guidance_scale: float, negative_prompts: list[str] | None, count: int = 1
    ) -> dict[str, Any]:
        """`guidance_scale` is the embedded guidance; with negative prompts that of two calls, as in other families.

        The two multiply, so with negative prompts the embedded one is `model.guidance`.
        """
        arguments = super().call_arguments(guidance_scale, negative_prompts, count)
        if negative_prompts is None:
            return arguments
        embedded = {} if self.guidance is None else {"guidance_scale": self.guidance}
        return {**arguments, "true_cfg_scale": guidance_scale, **embedded}

    def guiding(self, guidance_scale: float, negative: bool) -> tuple[float | None, float]:
        if not negative:
            return None if self.guidance is None else guidance_scale, 1.0
        return self.guidance, super().guiding(guidance_scale, negative)[1]

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """encoder_hidden_states [B, L, D] of T5, padding included, and CLIP's pooled_projections [B, P]."""
        pipe = self.pipe
        with self.encoding(grad):
            pooled = pipe.text_encoder(self.tokens(pipe.tokenizer, prompts).input_ids).pooler_output
            states = pipe.text_encoder_2(self.tokens(pipe.tokenizer_2, prompts, self.text_length).input_ids)[0]
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The velocity at flow times t [B], which the transformer takes as they are."""
        model = denoiser or self.denoiser
        dtype = next(model.parameters()).dtype
        t = t.to(noisy.device)
        tokens = model(
            hidden_states=pack(noisy.to(dtype)),
            timestep=t,
            guidance=None if self.guidance is None else torch.full_like(t, self.guidance, dtype=torch.float32),
            txt_ids=torch.zeros(condition["encoder_hidden_states"].shape[1], 3, device=noisy.device),
            img_ids=positions(noisy.shape[-2], noisy.shape[-1], noisy.device),
            **cast(condition, dtype),
        ).sample
        return unpack(tokens, tuple(noisy.shape))
