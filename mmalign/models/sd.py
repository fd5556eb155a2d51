"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet in the latents of an AutoencoderKL."""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Adapter, Condition, cast
from mmalign.noise import Parameterisation, Process

PARAMETERISATIONS: dict[str, Parameterisation] = {"epsilon": "eps", "v_prediction": "v"}


def discrete(scheduler: Any) -> Process:
    """The process of a scheduler that counts timesteps in abar. ValueError for a prediction that is not known."""
    kind = scheduler.config.get("prediction_type")
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"the scheduler is {type(scheduler).__name__}, which has no abar: this family is trained on eps or v, with "
            "a scheduler such as DDIMScheduler"
        )
    if kind not in PARAMETERISATIONS:
        raise ValueError(f"the scheduler's prediction_type is {kind!r}; known: {', '.join(PARAMETERISATIONS)}")
    return Process(PARAMETERISATIONS[kind], scheduler.alphas_cumprod.float())


class StableDiffusion(Adapter):
    """Adapter for every folder that `StableDiffusionPipeline.from_pretrained` loads."""

    family = "sd"
    pipeline_class: Any = StableDiffusionPipeline
    denoiser_name = "unet"
    unused: tuple[str, ...] = ("safety_checker", "feature_extractor")

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        self.process = discrete(pipe.scheduler)

    @classmethod
    def left_out(cls, config: Model) -> dict[str, Any]:
        return {**super().left_out(config), **({"requires_safety_checker": False} if cls.unused else {})}

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """Text to the UNet's condition: encoder_hidden_states [B, L, D]. Longer prompts are cut, EOT kept."""
        tokens = self.tokens(self.pipe.tokenizer, prompts)
        with self.encoding(grad):
            return {"encoder_hidden_states": self.pipe.text_encoder(tokens.input_ids)[0]}

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The UNet's output for noisy latents at t [B]."""
        model = denoiser or self.denoiser
        dtype = next(model.parameters()).dtype
        return model(noisy.to(dtype), t.to(noisy.device), **self._arguments(cast(condition, dtype))).sample

    def _arguments(self, condition: Condition) -> dict[str, Any]:
        return {"encoder_hidden_states": condition["encoder_hidden_states"]}
