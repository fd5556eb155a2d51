"""HunyuanVideo (2412.03603): a flow transformer told by a language model and CLIP, guidance as a number."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Condition, cast
from mmalign.models.video import VideoAdapter
from mmalign.noise import Process
from mmalign.paths import find

_CLIP_TOKENS = 77
SKIPPED = 2  # layers at the end of the language model whose states are not used


class HunyuanVideo(VideoAdapter):
    """Adapter for folders that `HunyuanVideoPipeline.from_pretrained` loads.

    The transformer is guidance-distilled and takes the guidance as a number, in thousandths. Sampling passes
    `guidance_scale`, training `model.guidance`, 1 by default (see `Adapter._embedded_guidance`).
    """

    family = "hunyuan_video"
    pipeline_class: Any = HunyuanVideoPipeline
    noise_dtype = torch.float32
    even_sigmas = True
    guides_in_one_call = False
    text_encoders = ("text_encoder", "text_encoder_2")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    flow_schedulers = ("euler",)  # the pipeline hands over its own sigmas
    fps = 24.0
    frames = 129
    max_sequence_length = 256

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        self.process = Process("flow")
        folder = find(config.components.get("tokenizer", config.path / "tokenizer"))
        if (folder / "tokenizer.json").is_file():
            # The published folder calls it a LlamaTokenizer, which in transformers 5 cuts texts as Llama 2's does,
            # whatever its file says (seen in 5.23).
            pipe.register_modules(tokenizer=PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
        pipe.tokenizer.padding_side = "right"  # the template is counted from the left, and masked text from the right
        told = self.denoiser.config.image_condition_type
        if (told is not None) != self.of_image:
            what = f"is told a first frame ({told}), as HunyuanVideo-I2V" if told else "is told no first frame"
            raise ValueError(
                f"{config.path}: the transformer {what}, and {self.pipeline_class.__name__} is for the other kind; "
                "give a checkpoint whose model_index.json names the pipeline of its transformer"
            )

    @property
    def temporal(self) -> int:
        return int(self.vae.config.temporal_compression_ratio)

    @property
    def vae_factor(self) -> int:
        return int(self.vae.config.spatial_compression_ratio)

    def call_arguments(
        self, guidance_scale: float, negative_prompts: list[str] | None, count: int = 1
    ) -> dict[str, Any]:
        """`guidance_scale` is the embedded guidance; with negative prompts that of two calls, as in other families.

        The two multiply, so with negative prompts the embedded one is `model.guidance`. A transformer that takes none
        is guided by two calls, away from the empty prompt by default.
        """
        arguments = super().call_arguments(guidance_scale, negative_prompts, count)
        if self.guidance is None and negative_prompts is None and guidance_scale > 1:
            arguments["negative_prompt"] = negative_prompts = [""] * count
        if negative_prompts is None:
            return arguments
        embedded = {} if self.guidance is None else {"guidance_scale": self.guidance}
        return {**arguments, "true_cfg_scale": guidance_scale, **embedded}

    def guiding(self, guidance_scale: float, negative: bool) -> tuple[float | None, float]:
        if self.guidance is not None and not negative:
            return guidance_scale, 1.0
        return self.guidance, super().guiding(guidance_scale, negative)[1]

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """encoder_hidden_states [B, L, D] of the language model with encoder_attention_mask [B, L] (int64), and CLIP's
        pooled_projections [B, P].

        The prompts stand in the pipeline's template, whose beginning is left out of the states.
        """
        pipe, first = self.pipe, int(DEFAULT_PROMPT_TEMPLATE["crop_start"])
        texts = [DEFAULT_PROMPT_TEMPLATE["template"].format(prompt) for prompt in prompts]
        tokens = self.tokens(pipe.tokenizer, texts, first + (self.text_length or self.max_sequence_length))
        with self.encoding(grad):
            found = pipe.text_encoder(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, output_hidden_states=True
            )
        return {
            "encoder_hidden_states": found.hidden_states[-(SKIPPED + 1)][:, first:],
            "encoder_attention_mask": tokens.attention_mask[:, first:],
            **self.pooled(prompts, grad=grad),
        }

    def pooled(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """pooled_projections [B, P] of CLIP."""
        tokens = self.tokens(self.pipe.tokenizer_2, prompts, _CLIP_TOKENS)
        with self.encoding(grad):
            return {"pooled_projections": self.pipe.text_encoder_2(tokens.input_ids).pooler_output}

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The velocity at flow times t [B]; the transformer counts them, and the guidance, in thousandths."""
        model = denoiser or self.denoiser
        dtype = next(model.parameters()).dtype
        timestep = t.to(noisy.device) * self.pipe.scheduler.config.num_train_timesteps
        guidance = None if self.guidance is None else torch.full_like(timestep, self.guidance * 1000.0, dtype=dtype)
        return model(noisy.to(dtype), timestep=timestep, guidance=guidance, **cast(condition, dtype)).sample
