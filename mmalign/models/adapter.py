"""What a model family is to the rest of the suite: an adapter over a diffusers pipeline.

A family differs from the others in its adapter and nowhere else. It says what its pipeline class is, which process it
was trained for, how prompts become a condition, and how its denoiser is called. What most of them share (an
AutoencoderKL, how a folder is loaded) stands here, so that a family is its differences.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.checkpoint import index_parts, part_class, variant_in
from mmalign.noise import Process, dynamic_shift
from mmalign.paths import find

Condition = dict[str, Tensor]
"""What the denoiser is told besides latents and time: tensors by name, first dimension B."""


class Adapter(ABC):
    """A family's models behind one face.

    A subclass sets what stands below as class attributes, sets `self.process` in `__init__`, and defines
    `encode_prompt` and `predict`.
    """

    family: str
    pipeline_class: Any
    modality: Literal["image", "video"] = "image"  # what the pipeline draws; latents of clips have an axis of frames
    fps: float | None = None  # at which the family's clips play, as it was trained, or as a job says
    frames: int = 1  # of a clip that the pipeline draws by default
    of_image: bool = False  # whether clips go on from a picture: the denoiser is told the first frame
    sees_image: bool = False  # whether a text encoder is shown the first frame, so that `join` has to follow
    denoiser_name: str = "transformer"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    unused: tuple[str, ...] = ()  # parts of the pipeline that are left out on loading
    may_lack: tuple[str, ...] = ()  # parts that a checkpoint may come without
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    flow_schedulers: tuple[str, ...] = ("euler", "dpm++")  # of a flow: what its pipeline's call can be sampled with
    even_sigmas: bool = False  # of a flow: its pipeline hands the scheduler 1, ..., 1/N before the shift
    schedulers: Mapping[str, tuple[str, dict[str, Any]]] | None = None  # class and settings, where they are its own
    noise_dtype: torch.dtype | None = None  # in which the pipeline draws initial noise; None: in the denoiser's
    guides_in_one_call: bool = True  # whether the pipeline asks for both branches of guidance in one batch
    fixed_arguments: Mapping[str, Any] = {}  # of the pipeline's call: captions and sizes are to be as they are given
    no_negative: str | None = None  # what the pipeline's call takes where there is no negative prompt
    max_sequence_length: int | None = None  # text tokens, where the family's pipeline lets its caller choose
    longest_text: int | None = None  # what it may be set to at most
    span: tuple[float, float] = (0.0, 1.0)  # the part of the flow's times that the denoiser is trained for
    process: Process

    def __init__(self, pipe: Any, config: Model):
        self.pipe, self.config = pipe, config
        self.waiting: frozenset[str] = frozenset()
        self._lent: set[str] = set()
        self.denoiser: Any = getattr(pipe, self.denoiser_name)
        self.vae = pipe.vae
        self.text_length = config.max_sequence_length or self.max_sequence_length
        self.guidance = self._embedded_guidance(config)
        for module in self.frozen():
            module.requires_grad_(False).eval()

    @classmethod
    def load(
        cls, config: Model, *, device: torch.device | str, dtype: torch.dtype, vae_dtype: torch.dtype,
        waiting: Collection[str] = (), without: Collection[str] = (),
    ) -> Adapter:  # fmt: skip
        """Loads a pipeline folder but for the parts `without`.

        `from_scratch` parts are made from their config.json, and `waiting` ones are put away.
        """
        if config.max_sequence_length and cls.max_sequence_length is None:
            raise ValueError(f"model.max_sequence_length: {cls.family} reads prompts of one length; drop the key")
        if cls.longest_text and (config.max_sequence_length or 0) > cls.longest_text:
            raise ValueError(f"model.max_sequence_length: {cls.family} reads at most {cls.longest_text} text tokens")
        dtypes = {"default": dtype, "vae": vae_dtype}
        # Sorted, since each part made from scratch takes its weights from one stream of random numbers.
        names = sorted({*config.components, *config.from_scratch} - {*without})
        parts = {name: load_part(config, name, dtypes.get(name, dtype)) for name in names}
        pipe = cls.pipeline_class.from_pretrained(
            config.path, dtype=dtypes, variant=variant_in(config.path, config.variant), local_files_only=True,
            use_safetensors=True, **cls.left_out(config), **dict.fromkeys(without), **parts,
        )  # fmt: skip
        pipe.set_progress_bar_config(disable=True)
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module) and name not in waiting:
                part.to(device)
        adapter = cls(pipe, config)
        adapter.put_away(waiting)
        return adapter

    @classmethod
    def left_out(cls, config: Model) -> dict[str, Any]:
        """Arguments of `from_pretrained` for parts that are not needed, and for those that the folder comes without.

        ValueError for a text encoder or tokenizer that is missing and that the family cannot do without.
        """
        absent = {name for name, (library, _) in index_parts(config.path).items() if not library}
        absent -= {*config.components}
        needed = {"vae", "scheduler", cls.denoiser_name, *cls.text_encoders}
        needed |= {name.replace("text_encoder", "tokenizer") for name in cls.text_encoders}
        # An encoder that a checkpoint may come without goes with its tokenizer.
        halved = {name for name in cls.may_lack if name not in absent} and {*cls.may_lack} & absent
        missing = sorted(absent & needed - {*cls.may_lack}) + sorted(halved)
        if missing:
            raise ValueError(
                f"{config.path} comes without {' and '.join(missing)}, and {cls.family} cannot do without; give the "
                f"folder of the part: model.components: {{{missing[0]}: path/to/{missing[0]}}}"
            )
        return dict.fromkeys({*cls.unused, *absent} - {*config.components})

    @classmethod
    def idle_in_training(cls, config: Model) -> tuple[str, ...]:
        """Parts that training does not load, by the folder's index. ValueError where the config has to say which."""
        if config.expert is not None:
            raise ValueError(f"model.expert: {cls.family} has one denoiser for all of the schedule; drop the key")
        return ()

    def frozen(self) -> list[nn.Module]:
        """The parts that preference training never changes."""
        encoders = (getattr(self.pipe, name) for name in self.text_encoders)
        return [self.vae, *(encoder for encoder in encoders if encoder is not None)]

    def put_away(self, names: Collection[str]) -> None:
        """Moves frozen parts of the pipeline, by name, into CPU memory, where they stay but for `at_hand`."""
        self.waiting = frozenset(name for name in names if getattr(self.pipe, name, None) is not None)
        for name in self.waiting:
            getattr(self.pipe, name).to("cpu")

    @contextmanager
    def at_hand(self, *names: str) -> Iterator[None]:
        """Inside, these parts are on the device, those too that were put away."""
        lent = [name for name in names if name in self.waiting and name not in self._lent]
        with ExitStack() as stack:
            for name in lent:
                self._lent.add(name)
                stack.callback(self._lent.discard, name)
                stack.enter_context(lent_to(self.device, getattr(self.pipe, name)))
            yield

    @property
    def parameterisation(self) -> str:
        return self.process.kind

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def pipeline(self) -> Any:
        """The diffusers pipeline that shares this adapter's modules."""
        return self.pipe

    def _embedded_guidance(self, config: Model) -> float | None:
        """The guidance that a distilled denoiser is told in training; None for a denoiser that takes none.

        A guidance-distilled model (2210.03142) predicts for a value g what classifier-free guidance of strength g
        would give. Only at 1 is that the velocity of the data itself, whose error a training loss can measure: so 1
        is the default, as other families are trained without guidance and sampled with it.
        """
        if self.denoiser.config.get("guidance_embeds"):
            return 1.0 if config.guidance is None else config.guidance
        if config.guidance is not None:
            raise ValueError(f"model.guidance: the {self.denoiser_name} of {config.path} takes none; drop the key")
        return None

    def call_arguments(
        self, guidance_scale: float, negative_prompts: list[str] | None, count: int = 1
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call with `count` prompts: guidance, and what the family fixes on top."""
        length = {"max_sequence_length": self.text_length} if self.text_length else {}
        negative = negative_prompts or self.no_negative
        return {"guidance_scale": guidance_scale, "negative_prompt": negative, **length, **self.fixed_arguments}

    def guiding(self, guidance_scale: float, negative: bool) -> tuple[float | None, float]:
        """What `call_arguments` come to: the guidance that the denoiser is told, and that of classifier-free guidance.

        The first is None for denoisers that are told none, the second 1 where the unconditional branch is left out.
        """
        return None, guidance_scale if guidance_scale > 1 else 1.0

    def guided(self, towards: Tensor, away: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance (2207.12598) of two predictions, shaped as latents [B, C, ...]."""
        return away + scale * (towards - away)

    @contextmanager
    def told(self, guidance: float | None) -> Iterator[None]:
        """Inside, `predict` tells a guidance-distilled denoiser this guidance."""
        before, self.guidance = self.guidance, guidance
        try:
            yield
        finally:
            self.guidance = before

    @torch.no_grad()
    def draw(
        self, prompts: list[str], generators: list[torch.Generator], *, guidance_scale: float,
        negative_prompts: list[str] | None = None, **options: Any,
    ) -> np.ndarray:  # fmt: skip
        """Pictures float [B, H, W, 3] in [0, 1] by the pipeline's own call; of a video family clips [B, F, H, W, 3].

        Args:
            prompts, generators: [B]; a row's picture depends on its own generator alone.
            guidance_scale, negative_prompts: as `call_arguments` takes them.
            options: further arguments of the pipeline's call (num_inference_steps, height, width, num_frames).
        """
        told = self.call_arguments(guidance_scale, negative_prompts, len(prompts))
        return self.drawn(self.pipeline()(prompt=prompts, generator=generators, output_type="np", **told, **options))

    def drawn(self, output: Any) -> np.ndarray:
        """The pictures in what the pipeline's call returned."""
        pictures: np.ndarray = output.images
        return pictures

    # ------------------------------------------------------------------------------------------------ prompts

    @abstractmethod
    def encode_prompt(self, prompts: list[str], *, grad: bool = False) -> Condition:
        """The condition of B prompts, as the family's pipeline encodes them. A row never depends on its neighbours."""

    def encode_negative(self, prompts: list[str]) -> Condition:
        """The condition of B prompts to be guided away from, as the family's pipeline encodes them."""
        return self.encode_prompt(prompts)

    def add_size(self, condition: Condition, sizes: Tensor) -> Condition:
        """The condition with what the family needs to know of picture sizes and crops.

        sizes [B, 6]: original height and width, top and left of the crop, target height and width, in pixels.
        """
        return condition

    def join(self, condition: Condition) -> Condition:
        """The condition of prompts and first frames as the denoiser takes it; other than it came where a text encoder
        sees the frame (`sees_image`).
        """
        return condition

    @contextmanager
    def encoding(self, grad: bool) -> Iterator[None]:
        """What text encoders run under: autocast only where they are trained, so that a cached value fits every run."""
        with torch.set_grad_enabled(grad), exact(self.device, off=not grad):
            yield

    def tokens(self, tokenizer: Any, prompts: list[str], length: int | None = None) -> Any:
        """Prompts padded and cut to `length` (the tokenizer's own by default): input_ids and attention_mask [B, L]."""
        return tokenizer(
            prompts, padding="max_length", max_length=length or tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip

    # ------------------------------------------------------------------------------------------------ pictures

    @property
    def vae_factor(self) -> int:
        """How many pixels a side of one latent covers."""
        factor: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return factor

    @property
    def patch(self) -> int:
        """How many latents a side of one of the denoiser's tokens covers; 1 for a UNet."""
        return int(self.denoiser.config.get("patch_size") or 1)

    @property
    def multiple(self) -> int:
        """Sides of pictures, in pixels, are multiples of this."""
        return self.vae_factor * self.patch

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Shape of one sample's latents for a picture of this size in pixels, or for a clip of so many frames."""
        return self.vae.config.latent_channels, height // self.vae_factor, width // self.vae_factor

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels that the pipeline's call has without either."""
        call = inspect.signature(self.pipeline_class.__call__).parameters
        if call["height"].default is not None:
            return call["height"].default, call["width"].default
        side = getattr(self.pipe, "default_sample_size", None) or self.denoiser.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.vae_factor, width * self.vae_factor

    def draw_noise(self, shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
        """Unit noise [B, *shape], float32, as the pipeline draws it from a CPU generator for each sample."""
        dtype = self.noise_dtype or next(self.denoiser.parameters()).dtype
        drawn = [torch.randn((1, *shape), generator=each, dtype=dtype) for each in generators]
        return torch.cat(drawn).to(self.device, torch.float32)

    @torch.no_grad()
    def encode_media(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] to posterior moments (mean, std) [B, 2, C, h, w], scaled for the denoiser.

        Autocast is off: SDXL's autoencoder overflows in float16.
        """
        with exact(self.device):
            posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        factor = self.vae.config.scaling_factor
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return torch.stack([(posterior.mean - shift) * factor, posterior.std * factor], dim=1).float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pixels [B, 3, H, W] in [-1, 1]; differentiable."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        return self.vae.decode((latents / self.vae.config.scaling_factor + shift).to(self.vae.dtype)).sample

    # ------------------------------------------------------------------------------------------------ denoiser

    @abstractmethod
    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        """The prediction, shaped as `noisy` [B, C, h, w], at timesteps t [B], by `denoiser` or the adapter's own."""

    def image_tokens(self, shape: tuple[int, ...]) -> int:
        """How many tokens the transformer makes of latents of this shape."""
        return (shape[-2] // self.patch) * (shape[-1] // self.patch)

    def shift(self, shape: tuple[int, ...]) -> float:
        """The shift of flow times that the pipeline's own scheduler would use for latents of this shape."""
        config = self.pipe.scheduler.config
        if config.get("use_dynamic_shifting"):
            return dynamic_shift(self.image_tokens(shape), config)
        return float(config.get("flow_shift") or config.get("shift") or 1.0)


@contextmanager
def lent_to(device: torch.device, module: nn.Module) -> Iterator[None]:
    """Inside, a module that waits in CPU memory is on the device."""
    module.to(device)
    try:
        yield
    finally:
        module.to("cpu")


def exact(device: torch.device, off: bool = True) -> Any:
    """Switches autocast off, if `off`."""
    return torch.autocast(device.type, enabled=False) if off else nullcontext()


def cast(condition: Condition, dtype: torch.dtype) -> Condition:
    """The condition with its floating tensors in the denoiser's dtype; masks and indices as they are."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}


def load_part(config: Model, name: str, dtype: torch.dtype) -> Any:
    """A pipeline part from another folder, or with fresh weights from its config."""
    import diffusers
    import transformers

    library, class_name = part_class(config.path, name)
    kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
    folder = find(config.components.get(name, config.path / name))
    variant = variant_in(folder, config.variant)
    if not issubclass(kind, nn.Module):  # a scheduler or a tokenizer
        return kind.from_pretrained(folder, local_files_only=True)
    if name not in config.from_scratch:
        return kind.from_pretrained(folder, dtype=dtype, variant=variant, local_files_only=True, use_safetensors=True)
    if library == "diffusers":
        return _as(kind.from_config(kind.load_config(folder)), dtype)
    return _as(kind(kind.config_class.from_pretrained(folder)), dtype)


def _as(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    return module if dtype == torch.float32 else module.to(dtype)
