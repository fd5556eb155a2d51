"""Stable Diffusion XL: two text encoders, pooled embedding, and the picture's size and crop as a condition."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from mmalign.models.adapter import Condition
from mmalign.models.sd import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """Adapter for every folder that `StableDiffusionXLPipeline.from_pretrained` loads.

    It is Stable Diffusion with another condition (2307.01952, section 2.2).
    """

    family = "sdxl"
    pipeline_class: Any = StableDiffusionXLPipeline
    text_encoders = ("text_encoder", "text_encoder_2")
    unused = ()

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """Both encoders' penultimate states side by side [B, L, D1 + D2], and the second's pooled embedding [B, P].

        An empty prompt gives zeros where the pipeline was saved with force_zeros_for_empty_prompt, as in sampling.
        """
        pipe = self.pipe
        with self.encoding(grad):
            first = pipe.text_encoder(self.tokens(pipe.tokenizer, prompts).input_ids, output_hidden_states=True)
            second = pipe.text_encoder_2(self.tokens(pipe.tokenizer_2, prompts).input_ids, output_hidden_states=True)
            hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
            pooled = second.text_embeds
        if pipe.config.get("force_zeros_for_empty_prompt"):
            keep = torch.tensor([bool(prompt) for prompt in prompts], device=hidden.device)
            hidden, pooled = hidden * keep[:, None, None], pooled * keep[:, None]
        return {"encoder_hidden_states": hidden, "text_embeds": pooled}

    def add_size(self, condition: Condition, sizes: Tensor) -> Condition:
        """Adds time_ids [B, 6]: original height and width, crop top and left, target height and width, in pixels."""
        return {**condition, "time_ids": sizes.to(self.device)}

    def _arguments(self, condition: Condition) -> dict[str, Any]:
        added = {"text_embeds": condition["text_embeds"], "time_ids": condition["time_ids"]}
        return {"encoder_hidden_states": condition["encoder_hidden_states"], "added_cond_kwargs": added}
