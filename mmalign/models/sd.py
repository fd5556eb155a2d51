"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet in the latents of an AutoencoderKL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from mmalign import noise as process
from mmalign.jobs import Model
from mmalign.models.base import Condition
from mmalign.paths import find

PARAMETERISATIONS: dict[str, process.Parameterisation] = {"epsilon": "eps", "v_prediction": "v"}


class StableDiffusion:
    """Adapter for every folder that `StableDiffusionPipeline.from_pretrained` loads."""

    family = "sd"
    pipeline_class: Any = StableDiffusionPipeline
    text_encoders: tuple[str, ...] = ("text_encoder",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.denoiser: nn.Module = pipe.unet
        self.vae = pipe.vae
        for module in self.frozen():
            module.requires_grad_(False).eval()
        kind = pipe.scheduler.config.prediction_type
        if kind not in PARAMETERISATIONS:
            raise ValueError(f"the scheduler's prediction_type is {kind!r}; known: {', '.join(PARAMETERISATIONS)}")
        self.parameterisation = PARAMETERISATIONS[kind]
        self.alphas_cumprod: Tensor = pipe.scheduler.alphas_cumprod.float()

    @classmethod
    def load(
        cls, config: Model, *, device: torch.device | str, dtype: torch.dtype, vae_dtype: torch.dtype
    ) -> StableDiffusion:
        """Loads a pipeline folder without safety checker; `from_scratch` parts are made from their config.json."""
        dtypes = {"default": dtype, "vae": vae_dtype}
        # Sorted, since each part made from scratch takes its weights from one stream of random numbers.
        names = sorted({*config.components, *config.from_scratch})
        parts = {name: _load_part(config, name, dtypes.get(name, dtype)) for name in names}
        missing = {"safety_checker": None} if cls.family == "sd" else {}
        kwargs: dict[str, Any] = {"requires_safety_checker": False} if missing else {}
        pipe = cls.pipeline_class.from_pretrained(
            config.path, dtype=dtypes, local_files_only=True, use_safetensors=True, **parts, **missing, **kwargs
        )
        pipe.set_progress_bar_config(disable=True)
        return cls(pipe.to(device))

    def frozen(self) -> list[nn.Module]:
        """The parts that preference training never changes."""
        return [self.vae, *(getattr(self.pipe, name) for name in self.text_encoders)]

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def pipeline(self) -> Any:
        """The diffusers pipeline that shares this adapter's modules."""
        return self.pipe

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, height // scale, width // scale

    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """Text to the UNet's condition: encoder_hidden_states [B, L, D]. Longer prompts are cut, EOT kept."""
        tokens = self._tokens(self.pipe.tokenizer, prompts)
        with self.encoding(grad):
            return {"encoder_hidden_states": self.pipe.text_encoder(tokens)[0]}

    @contextmanager
    def encoding(self, grad: bool) -> Iterator[None]:
        """What text encoders run under: autocast only where they are trained, so that a cached value fits every run."""
        with torch.set_grad_enabled(grad), _exact(self.device, off=not grad):
            yield

    def _tokens(self, tokenizer: Any, prompts: list[str]) -> Tensor:
        batch = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return batch.input_ids.to(self.device)

    def add_size(self, condition: Condition, sizes: Tensor) -> Condition:
        """SD 1.x/2.x is not told sizes: the condition is returned as it is. sizes: [B, 6], see SDXL."""
        return condition

    @torch.no_grad()
    def encode_media(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to posterior moments [B, 2, C, h, w], scaled as the UNet wants them.

        Autocast is off: SDXL's autoencoder overflows in float16.
        """
        with _exact(self.device):
            posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        factor = self.vae.config.scaling_factor
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return torch.stack([(posterior.mean - shift) * factor, posterior.std * factor], dim=1).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pixels [B, 3, H, W] in [-1, 1]; differentiable."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return self.vae.decode((latents / self.vae.config.scaling_factor + shift).to(self.vae.dtype)).sample

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform timesteps [count] on the CPU."""
        return torch.randint(0, len(self.alphas_cumprod), (count,), generator=generator)

    def noisy(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Latents at timestep t."""
        return process.add_noise(latents, noise, t, self.alphas_cumprod)

    def target(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What `predict` should return."""
        return process.target(self.parameterisation, latents, noise, t, self.alphas_cumprod)

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The prediction [B, C, h, w] for noisy latents at t [B], by `denoiser` or the adapter's own."""
        model = denoiser or self.denoiser
        dtype = next(model.parameters()).dtype
        condition = {name: value.to(dtype) for name, value in condition.items()}
        return model(noisy.to(dtype), t.to(noisy.device), **self._arguments(condition)).sample

    def _arguments(self, condition: Condition) -> dict[str, Any]:
        return {"encoder_hidden_states": condition["encoder_hidden_states"]}

    def step(self, noisy: Tensor, prediction: Tensor, t: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """One DDIM step from t [B] to `previous` [B] (-1: clean). Returns the next latents and the x0 estimate."""
        x0, eps = process.to_x0_eps(self.parameterisation, noisy, prediction, t, self.alphas_cumprod)
        return process.ddim_step(noisy, x0, eps, previous, self.alphas_cumprod), x0


def _exact(device: torch.device, off: bool = True) -> Any:
    """Switches autocast off, if `off`."""
    return torch.autocast(device.type, enabled=False) if off else nullcontext()


def _load_part(config: Model, name: str, dtype: torch.dtype) -> Any:
    """A pipeline part from another folder, or with fresh weights from its config."""
    import diffusers
    import transformers

    library, class_name = json.loads((config.path / "model_index.json").read_text())[name]
    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    folder = find(config.components.get(name, config.path / name))
    if not issubclass(kind, nn.Module):  # a scheduler or a tokenizer
        return kind.from_pretrained(folder, local_files_only=True)
    if name not in config.from_scratch:
        return kind.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True)
    if library == "diffusers":
        return _as(kind.from_config(kind.load_config(folder)), dtype)
    return _as(kind(kind.config_class.from_pretrained(folder)), dtype)


def _as(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module if dtype == torch.float32 else module.to(dtype)
