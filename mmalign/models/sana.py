"""Sana (2410.10629): a linear-attention transformer, a flow in the latents of a deterministic autoencoder, Gemma 2."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Adapter, Condition, cast, exact
from mmalign.noise import Process


class Sana(Adapter):
    """Adapter for every folder that `SanaPipeline.from_pretrained` loads.

    Prompts follow the instruction to the language model that the pipeline's call has by default. An empty prompt is
    encoded without it, as the pipeline encodes what it guides away from, so that caption dropout trains that.
    """

    family = "sana"
    pipeline_class: Any = SanaPipeline
    max_sequence_length = 300
    fixed_arguments = {"clean_caption": False, "use_resolution_binning": False}
    no_negative = ""

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        self.process = Process("flow")
        pipe.tokenizer.padding_side = "right"  # as the pipeline does when it is called
        lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
        self.instruction = "\n".join(lines)

    # ------------------------------------------------------------------------------------------------ prompts

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """encoder_hidden_states [B, L, D] of Gemma for prompts in lower case, encoder_attention_mask [B, L] int64."""
        texts = [prompt.lower().strip() for prompt in prompts]
        full = [i for i, text in enumerate(texts) if text]
        empty = [i for i, text in enumerate(texts) if not text]
        with self.encoding(grad):
            parts = [
                self._states([prefix + texts[i] for i in rows], prefix)
                for prefix, rows in ((self.instruction, full), ("", empty))
                if rows
            ]
        order = torch.tensor([*full, *empty], device=self.device).argsort()
        states, mask = (torch.cat(values)[order] for values in zip(*parts, strict=True))
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def encode_negative(self, prompts: list[str]) -> Condition:
        """As `encode_prompt`, without the instruction."""
        with self.encoding(False):
            states, mask = self._states([prompt.lower().strip() for prompt in prompts], "")
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def _states(self, texts: list[str], prefix: str) -> tuple[Tensor, Tensor]:
        """States and mask of the first token and the last L - 1, which leaves the prefix out."""
        length = self.text_length or self.max_sequence_length
        before = len(self.pipe.tokenizer.encode(prefix)) - 2 if prefix else 0
        tokens = self.tokens(self.pipe.tokenizer, texts, before + length)
        states = self.pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        kept = [0, *range(before + 1, before + length)]
        return states[:, kept], tokens.attention_mask[:, kept]

    # ------------------------------------------------------------------------------------------------ pictures

    @property
    def vae_factor(self) -> int:
        factor: int = 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)
        return factor

    @torch.no_grad()
    def encode_media(self, pixels: Tensor) -> Tensor:
        """As in other families; the autoencoder is deterministic, so the deviation is 0."""
        with exact(self.device):
            latents = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent
        mean = latents.float() * self.vae.config.scaling_factor
        return torch.stack([mean, torch.zeros_like(mean)], dim=1)

    # ------------------------------------------------------------------------------------------------ denoiser

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The velocity at flow times t [B], which the transformer counts in its own scale."""
        model = denoiser or self.denoiser
        dtype = next(model.parameters()).dtype
        counted = self.pipe.scheduler.config.num_train_timesteps
        timestep = t.to(noisy.device) * counted * self.denoiser.config.timestep_scale
        return model(noisy.to(dtype), timestep=timestep, **cast(condition, dtype)).sample
