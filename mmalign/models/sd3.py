"""Stable Diffusion 3 and 3.5: an MMDiT trained as a rectified flow, two CLIP encoders and a T5 that may be left out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Adapter, Condition, cast
from mmalign.noise import Process


class StableDiffusion3(Adapter):
    """Adapter for every folder that `StableDiffusion3Pipeline.from_pretrained` loads (2403.03206)."""

    family = "sd3"
    pipeline_class: Any = StableDiffusion3Pipeline
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    max_sequence_length = 256
    longest_text = 512
    may_lack = ("text_encoder_3", "tokenizer_3")

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        self.process = Process("flow")
        if pipe.vae.config.shift_factor is None:  # the pipeline adds it without asking
            pipe.vae.register_to_config(shift_factor=0.0)

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """encoder_hidden_states [B, L, D] and pooled_projections [B, P].

        The penultimate states of both CLIP encoders side by side, padded with zeros to T5's width, are followed by
        T5's states; where there is no T5, by as many zero tokens, as in the pipeline.
        """
        pipe, length = self.pipe, self.text_length or self.max_sequence_length
        with self.encoding(grad):
            found = [
                encoder(self.tokens(tokenizer, prompts).input_ids, output_hidden_states=True)
                for encoder, tokenizer in (
                    (pipe.text_encoder, pipe.tokenizer),
                    (pipe.text_encoder_2, pipe.tokenizer_2),
                )
            ]
            clip = torch.cat([each.hidden_states[-2] for each in found], dim=-1)
            pooled = torch.cat([each.text_embeds for each in found], dim=-1)
            width = self.denoiser.config.joint_attention_dim
            if pipe.text_encoder_3 is None:
                long = clip.new_zeros(len(prompts), length, width)
            else:
                long = pipe.text_encoder_3(self.tokens(pipe.tokenizer_3, prompts, length).input_ids)[0]
        clip = F.pad(clip, (0, long.shape[-1] - clip.shape[-1]))
        return {"encoder_hidden_states": torch.cat([clip, long.to(clip.dtype)], dim=1), "pooled_projections": pooled}

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The velocity at flow times t [B]; the transformer counts them in thousandths."""
        model = denoiser or self.denoiser
        dtype = next(model.parameters()).dtype
        timestep = t.to(noisy.device) * self.pipe.scheduler.config.num_train_timesteps
        return model(noisy.to(dtype), timestep=timestep, **cast(condition, dtype)).sample
