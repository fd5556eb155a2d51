"""The schemas of the jobs: one frozen root for `train`, one for `sample`, one for `score`.

Nothing heavy is imported here, so that a config can be checked in a blink. A new objective is one more
class in `LOSSES`; a new model family one more line in `FAMILIES`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmalign.config import Strict

FAMILIES = {
    "sd": "Stable Diffusion 1.x and 2.x: one text encoder, UNet, eps or v prediction",
    "sdxl": "Stable Diffusion XL: two text encoders, size and crop conditioning (time_ids)",
}
Probability = Annotated[float, Field(ge=0, le=1)]


# ---------------------------------------------------------------------------------------------- losses
class DiffusionDPO(Strict):
    """Diffusion-DPO: prefer the winner's denoising error to the loser's, relative to a reference (2311.12908)."""

    task: ClassVar[str] = "preference"
    function: ClassVar[str] = "mmalign.losses.pairwise:diffusion_dpo"
    parameterisations: ClassVar[tuple[str, ...]] = ("eps", "v")
    kind: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: PositiveFloat = Field(
        2000.0, description="strength of the pull to the reference; 2000 SD1.5, 5000 SDXL with reduction mean"
    )
    reduction: Literal["mean", "sum"] = Field(
        "mean", description="how a sample's squared error is reduced; beta is not portable between the two"
    )
    kappa: PositiveFloat = Field(
        0.5, description="factor in the logit; 0.5 in the paper's code, 1 in the diffusers SD1.5 script"
    )
    anchor: float = Field(
        0.0, ge=0, description="weight of the policy's own error on the winner, added to the loss; 0 is plain DPO"
    )


class Denoising(Strict):
    """Denoising (SFT): the mean squared error of the model's own parameterisation on captioned images (2006.11239)."""

    task: ClassVar[str] = "sft"
    function: ClassVar[str] = "mmalign.losses.supervised:denoising"
    parameterisations: ClassVar[tuple[str, ...]] = ("eps", "v")
    kind: Literal["denoising"] = "denoising"
    snr_gamma: PositiveFloat | None = Field(
        None, description="min-SNR weighting (2303.09556); 5 is usual, null is uniform"
    )


class Reconstruction(Strict):
    """Reconstruction: L1 + L2 + KL of a variational autoencoder (2112.10752, without the adversarial part)."""

    task: ClassVar[str] = "autoencoder"
    function: ClassVar[str] = "mmalign.losses.supervised:reconstruction"
    parameterisations: ClassVar[tuple[str, ...]] = ("none",)
    kind: Literal["reconstruction"] = "reconstruction"
    l1: float = Field(1.0, ge=0)
    l2: float = Field(2.0, ge=0)
    kl: float = Field(1e-3, ge=0, description="weight of the KL to a unit Gaussian, per latent element")


class Contrastive(Strict):
    """Contrastive: CLIP's symmetric cross entropy between the images and captions of a batch (2103.00020)."""

    task: ClassVar[str] = "reward"
    function: ClassVar[str] = "mmalign.losses.reward:contrastive"
    parameterisations: ClassVar[tuple[str, ...]] = ("none",)
    kind: Literal["contrastive"] = "contrastive"


class HPS(Strict):
    """HPS: cross entropy of exp(logit_scale) * cos over the two images of a prompt, with soft labels (2306.09341)."""

    task: ClassVar[str] = "reward"
    function: ClassVar[str] = "mmalign.losses.reward:hps"
    parameterisations: ClassVar[tuple[str, ...]] = ("none",)
    kind: Literal["hps"] = "hps"
    anchor: float = Field(
        0.0, ge=0, description="weight of the contrastive loss on the same batch, which keeps text alignment"
    )


LOSSES = (DiffusionDPO, Denoising, Reconstruction, Contrastive, HPS)
Loss = Annotated[DiffusionDPO | Denoising | Reconstruction | Contrastive | HPS, Field(discriminator="kind")]


# ---------------------------------------------------------------------------------------------- shared
class Model(Strict):
    """A checkpoint folder, as `save_pretrained` writes it."""

    path: Path = Field(description="folder with model_index.json (or an open_clip folder for task: reward)")
    family: Literal["auto", "sd", "sdxl", "open_clip"] = Field("auto", description="auto reads model_index.json")
    lora: Path | None = Field(None, description="folder or file with LoRA weights to load on top")
    components: dict[str, Path] = Field({}, description="replace single parts, e.g. {vae: path/to/vae}")
    from_scratch: tuple[str, ...] = Field(
        (), description="parts to initialise at random from their config.json, e.g. [unet, vae]"
    )


class Shapes(Strict):
    """Scenes of the shapes world, rendered on the fly."""

    scenes: PositiveInt = Field(20000, description="how many different scenes")
    seed: int = 1
    held_out: bool = Field(False, description="captions from the held-out tenth of the grammar")
    counts: tuple[float, ...] = Field(
        (0.6, 0.3, 0.1), min_length=1, max_length=3, description="share of one, two and three shapes"
    )
    annotator: str = Field("faithful", description="who judges the pairs, for tasks that need pairs")
    votes: PositiveInt = Field(1, description="how often each pair is judged; the label is the winner's share of votes")


class Data(Strict):
    """What to train on, and how a picture becomes a tensor."""

    table: Path | None = Field(
        None, description="preference table (task: preference, reward) or media table (task: sft)"
    )
    format: str = Field("auto", description="see `mmalign list formats`")
    root: Path | None = Field(None, description="folder that relative media paths start from; default: the table's own")
    shapes: Shapes | None = Field(None, description="scenes of the shapes world instead of a table")
    dimension: str | None = Field(None, description="which label or score to use when a table holds several")
    ties: Literal["drop", "soft", "half"] = Field(
        "drop", description="drop them; soft: label 0.5; half: both orders at half weight"
    )
    limit: PositiveInt | None = Field(None, description="use only the first rows")
    verify: bool = Field(True, description="decode every picture once before training and drop the broken ones")
    resolution: PositiveInt = 512
    crop: Literal["center", "random"] = Field("center", description="one crop for the whole pair")
    flip: Probability = Field(0.0, description="probability of a horizontal flip, one for the whole pair")
    caption_dropout: Probability = Field(0.0, description="probability of an empty caption, one for the whole pair")
    cache: Literal["off", "memory", "disk"] = Field("disk", description="where latents and prompt embeddings are kept")
    cache_dir: Path | None = Field(
        None, description="folder of the disk cache; default: $MMALIGN_CACHE or the user's cache"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.table is None) == (self.shapes is None):
            raise ValueError("give exactly one of data.table and data.shapes")
        return self


class Reference(Strict):
    """The model that preferences are measured against."""

    kind: Literal["auto", "adapter_off", "frozen", "cached"] = Field(
        "auto", description="auto: adapter_off with LoRA, frozen copy without; cached: errors stored per draw"
    )
    draws: PositiveInt | None = Field(
        None, description="K fixed (t, noise, crop, flip) draws per pair, visited in turn; required by `cached`"
    )

    @model_validator(mode="after")
    def _draws(self) -> Reference:
        if self.kind == "cached" and self.draws is None:
            raise ValueError("reference.kind: cached needs reference.draws, for example 8")
        return self


class Lora(Strict):
    """Low-rank adapters (2106.09685), through PEFT."""

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = Field(None, description="scale is alpha / rank; default: alpha = rank")
    dropout: Probability = 0.0
    targets: tuple[str, ...] | None = Field(
        None, description="module names; default: the family's attention projections"
    )


class Optim(Strict):
    """Optimiser and length of the run."""

    steps: PositiveInt = Field(1000, description="optimiser steps")
    batch_size: PositiveInt = Field(4, description="pairs (or images) per process and micro-batch")
    accumulate: PositiveInt = Field(1, description="micro-batches per optimiser step")
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    lr: PositiveFloat = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    eps: PositiveFloat = 1e-8
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant_with_warmup"
    warmup: int = Field(0, ge=0, description="optimiser steps")
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")
    gradient_checkpointing: bool = False
    train_text_encoder: bool = Field(False, description="full fine-tuning only")


class EMA(Strict):
    """Moving average of the trained weights; the export uses it."""

    decay: float = Field(0.999, gt=0, lt=1, description="at most (1 + step) / (10 + step), so that it warms up")


class Checkpoint(Strict):
    every: PositiveInt = Field(500, description="optimiser steps")
    keep: PositiveInt = Field(2, description="how many of the newest to keep")


class Validation(Strict):
    """Pictures during training, with the adapter on and off."""

    prompts: tuple[str, ...] = ()
    every: PositiveInt = 500
    steps: PositiveInt = 20
    guidance_scale: float = 5.0
    seed: int = 0


class Log(Strict):
    every: PositiveInt = Field(1, description="optimiser steps between records")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",), description="metrics.jsonl is always written"
    )


class TrainConfig(Strict):
    """`mmalign train FILE`: fine-tune a model."""

    task: Literal["preference", "sft", "autoencoder", "reward"]
    output: Path = Field(description="run folder: checkpoints, metrics.jsonl, export/")
    seed: int = 0
    model: Model
    data: Data
    loss: Loss
    reference: Reference = Reference()
    lora: Lora | None = Field(None, description="null: full fine-tuning")
    optim: Optim = Optim()
    ema: EMA | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = Field("auto", description="auto: cuda when present, else cpu")
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    log: Log = Log()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.loss.task != self.task:
            fitting = ", ".join(str(loss.model_fields["kind"].default) for loss in LOSSES if loss.task == self.task)
            raise ValueError(f"loss.kind {self.loss.kind} does not go with task {self.task}; one of: {fitting}")
        if self.lora and (self.optim.train_text_encoder or self.model.from_scratch):
            raise ValueError("lora trains adapters only: drop lora, or train_text_encoder and from_scratch")
        if self.reference.kind == "adapter_off" and not self.lora:
            raise ValueError("reference.kind: adapter_off needs lora; use frozen or cached for full fine-tuning")
        if self.reference.kind == "cached" and self.data.cache != "disk":
            raise ValueError("reference.kind: cached needs data.cache: disk")
        return self


class SampleConfig(Strict):
    """`mmalign sample FILE`: generate pictures for a table of prompts."""

    model: Model
    prompts: Path = Field(
        description="text file (a prompt per line), or a JSONL, CSV or parquet table with `prompt` and perhaps `seed`"
    )
    output: Path = Field(description="folder: images/ and table.jsonl")
    per_prompt: PositiveInt = Field(1, description="pictures for each prompt, with consecutive seeds")
    seed: int = Field(0, description="first seed, for prompts that bring none")
    steps: PositiveInt = 30
    guidance_scale: float = Field(7.5, ge=0)
    negative_prompt: str = ""
    height: PositiveInt | None = Field(None, description="pixels; default: the model's own size")
    width: PositiveInt | None = None
    scheduler: Literal["own", "ddim", "dpm++", "dpm++sde", "euler"] = Field(
        "own", description="own: the one in the checkpoint folder; dpm++sde adds noise at each step"
    )
    batch_size: PositiveInt = 8
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    limit: PositiveInt | None = Field(None, description="use only the first prompts")


class EvaluatorSpec(Strict):
    """An evaluator by name, with its own parameters (`mmalign list evaluators`)."""

    name: str
    params: dict[str, Any] = {}


class ScoreConfig(Strict):
    """`mmalign score FILE`: score a media table."""

    table: Path = Field(description="media table: JSONL, parquet, or a folder with metadata.jsonl")
    output: Path = Field(description="results folder: parts/, summary.json")
    evaluators: tuple[EvaluatorSpec, ...] = Field(min_length=1)
    batch_size: PositiveInt = 32
    processes: PositiveInt = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    decoder: Literal["auto", "decord", "pyav"] = "auto"
