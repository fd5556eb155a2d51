"""PixArt-Sigma (2403.04692): a cross-attention transformer that predicts noise, told by T5 with its padding masked."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import PixArtSigmaPipeline
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Adapter, Condition, cast
from mmalign.models.sd import discrete


class PixArtTransformer2DModel(diffusers.PixArtTransformer2DModel, PeftAdapterMixin):
    """The transformer with `add_adapter` and its kin, which diffusers (0.42) gave to all transformers but this one.

    The name is the one of diffusers, since config.json is written with it.
    """


class PixArtSigma(Adapter):
    """Adapter for every folder that `PixArtSigmaPipeline.from_pretrained` loads."""

    family = "pixart"
    pipeline_class: Any = PixArtSigmaPipeline
    max_sequence_length = 300
    fixed_arguments = {"clean_caption": False, "use_resolution_binning": False}
    no_negative = ""

    def __init__(self, pipe: Any, config: Model):
        pipe.transformer.__class__ = PixArtTransformer2DModel  # the same weights, with more methods
        super().__init__(pipe, config)
        self.process = discrete(pipe.scheduler)
        if self.denoiser.use_additional_conditions:
            raise ValueError(
                f"{config.path}: the transformer wants sizes as conditions, as PixArt-alpha's at 1024 px, and "
                "PixArtSigmaPipeline has none to give; use a PixArt-Sigma checkpoint"
            )

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """encoder_hidden_states [B, L, D] of T5 for the prompts in lower case, encoder_attention_mask [B, L] int64."""
        tokens = self.tokens(self.pipe.tokenizer, [prompt.lower().strip() for prompt in prompts], self.text_length)
        with self.encoding(grad):
            states = self.pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return {"encoder_hidden_states": states, "encoder_attention_mask": tokens.attention_mask}

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The noise at timesteps t [B]; where the transformer also predicts a variance, that half is left out."""
        model = denoiser or self.denoiser
        dtype = next(model.parameters()).dtype
        output = model(
            noisy.to(dtype),
            timestep=t.to(noisy.device),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            **cast(condition, dtype),
        ).sample
        return output[:, : noisy.shape[1]]
