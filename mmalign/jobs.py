"""The schemas of the jobs: one frozen root for `train`, one for `sample`, one for `score`.

Nothing heavy is imported here, so that a config can be checked in a blink. The settings of objectives are in `methods`,
models and data in `jobs_inputs`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from mmalign.config import Strict
from mmalign.jobs_align import EvaluatorSpec, Guards, Noise, Online, Probability, Reference, Timesteps
from mmalign.jobs_answers import Answers
from mmalign.jobs_guidance import Guidance
from mmalign.jobs_inputs import Data, Model
from mmalign.jobs_mllm import Mllm
from mmalign.jobs_mllm import check as check_mllm
from mmalign.jobs_reward import REWARD_FAMILIES, Reward
from mmalign.jobs_reward import check as check_reward
from mmalign.jobs_vbench import VBench
from mmalign.methods import LOSSES, Loss, Preference

BelowOne = Annotated[float, Field(ge=0, lt=1)]


class Lora(Strict):
    """Low-rank adapters (2106.09685), through PEFT."""

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = Field(None, description="scale is alpha / rank; default: alpha = rank")
    dropout: Probability = 0.0
    targets: tuple[str, ...] | None = Field(
        None, description="module names; default: the family's attention projections"
    )
    init: Path | None = Field(None, description="LoRA to go on from, of the same rank and targets; default: fresh")


class Optim(Strict):
    """Optimiser and length of the run."""

    steps: PositiveInt = Field(1000, description="optimiser steps")
    batch_size: PositiveInt = Field(4, description="pairs (or images) per process and micro-batch")
    accumulate: PositiveInt = Field(1, description="micro-batches per optimiser step")
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    lr: PositiveFloat = 1e-5
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    eps: PositiveFloat = 1e-8
    schedule: Literal["constant", "constant_with_warmup", "linear", "cosine", "polynomial"] = "constant_with_warmup"
    warmup: int = Field(0, ge=0, description="optimiser steps")
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")
    gradient_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile the denoiser; the first steps are slow")
    compile_backend: str = Field("inductor", description="of torch.compile")
    train_text_encoder: bool = Field(False, description="full fine-tuning only")
    offload: tuple[Literal["vae", "text_encoder", "reference"], ...] = Field(
        (), description="frozen parts that wait in CPU memory, and are on the device only while they are used"
    )


class EMA(Strict):
    """Moving average of the trained weights; the export uses it."""

    decay: float = Field(0.999, gt=0, lt=1, description="at most (1 + step) / (10 + step), so that it warms up")


class Checkpoint(Strict):
    every: PositiveInt = Field(500, description="optimiser steps")
    keep: PositiveInt = Field(2, description="how many of the newest to keep")


class Validation(Strict):
    """During training: pictures with the adapter on and off, or how the objective stands on rows held out."""

    prompts: tuple[str, ...] = ()
    table: Path | None = Field(None, description="task mllm: rows that are not trained on, in data.format")
    rows: PositiveInt = Field(200, description="task mllm: use only the table's first rows")
    every: PositiveInt = 500
    steps: PositiveInt = 20
    guidance_scale: float = 5.0
    seed: int = 0


class Log(Strict):
    every: PositiveInt = Field(1, description="optimiser steps between records")
    memory: bool = Field(
        True, description="at the end of a run, estimated against measured peak memory in run.json (seconds)"
    )
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",), description="metrics.jsonl is always written"
    )


class TrainConfig(Strict):
    """`mmalign train FILE`: fine-tune a model."""

    task: Literal["preference", "sft", "autoencoder", "reward", "mllm"]
    output: Path = Field(description="run folder: checkpoints, metrics.jsonl, export/")
    seed: int = 0
    model: Model
    data: Data
    loss: Loss
    timesteps: Timesteps = Timesteps()
    noise: Noise = Noise()
    guards: Guards = Guards()
    online: Online | None = None
    reward: Reward = Reward()
    mllm: Mllm = Mllm()
    reference: Reference = Reference()
    lora: Lora | None = Field(None, description="null: full fine-tuning")
    optim: Optim = Optim()
    ema: EMA | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = Field("auto", description="auto: cuda when present, else cpu")
    sharding: Literal["none", "fsdp2", "zero2"] = Field(
        "none",
        description="with several processes: all in each of them; a share of everything (fsdp2); whole weights, and a "
        "share of gradients and moments (zero2, DeepSpeed)",
    )
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    log: Log = Log()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.loss.task != self.task:
            fitting = ", ".join(str(loss.model_fields["kind"].default) for loss in LOSSES if loss.task == self.task)
            raise ValueError(f"loss.kind {self.loss.kind} does not go with task {self.task}; one of: {fitting}")
        self._sourced()
        if self.lora and (self.optim.train_text_encoder or self.model.from_scratch):
            raise ValueError("lora trains adapters only: drop lora, or train_text_encoder and from_scratch")
        if self.data.buckets != "off" and self.task not in ("preference", "sft"):
            raise ValueError(f"data.buckets is for the tasks preference and sft; drop it, {self.task} has its own size")
        if self.reference.kind == "adapter_off" and not self.lora:
            raise ValueError("reference.kind: adapter_off needs lora; use frozen or cached for full fine-tuning")
        if self.reference.kind == "cached" and self.reference.draws is None and self.task != "mllm":
            raise ValueError("reference.kind: cached needs reference.draws, for example 8")
        if self.reference.kind == "cached" and self.data.cache != "disk":
            raise ValueError("reference.kind: cached needs data.cache: disk")
        if isinstance(self.loss, Preference):
            self._guarded(self.loss)
        self._scaled()
        self._offloaded()
        self._fitted()
        if self.task == "mllm":
            check_mllm(self)
        elif self.mllm != Mllm():
            raise ValueError(f"mllm is for task mllm; drop it from task {self.task}")
        elif self.validation.table is not None:
            raise ValueError(f"validation.table is of answers, for task mllm; drop it from task {self.task}")
        return self

    def _fitted(self) -> None:
        if self.task == "reward":
            family = "open_clip" if self.model.family == "auto" else self.model.family
            if family not in REWARD_FAMILIES:
                raise ValueError(f"task reward fits the families {', '.join(REWARD_FAMILIES)}, not {family}")
            if self.lora and self.lora.init:
                raise ValueError("lora.init is for denoisers; to go on with a scorer, give its export as model.path")
            if family in ("qwen2_vl", "latent") and self.model.from_scratch:
                what = "a VLM" if family == "qwen2_vl" else "what reads latents"
                raise ValueError(f"model.from_scratch: {what} is not trained from nothing; drop it")
            check_reward(
                self.reward, self.loss, self.data.axes, family, self.lora is not None, ties=self.data.ties,
                across=self.data.pairing == "across",
            )  # fmt: skip
        elif self.reward != Reward() or self.data.axes:
            raise ValueError(f"reward and data.axes are for task reward; drop them from task {self.task}")

    def _sourced(self) -> None:
        given = self.data.table is not None or self.data.shapes is not None
        if self.online is None and not given:
            raise ValueError("give exactly one of data.table and data.shapes")
        if self.online is None:
            return
        if self.task != "preference":
            raise ValueError(
                f"online rounds train on preferences; drop online, or use task: preference, not {self.task}"
            )
        replaced = {"unet", "transformer"} & {*self.model.components, *self.model.from_scratch}
        if replaced and self.lora is None:
            raise ValueError(
                "online rounds go on from whole checkpoints of their own; drop model.components and from_scratch of "
                f"{replaced.pop()}, or train a lora"
            )
        if self.online.offline_share and self.data.table is None:
            raise ValueError("online.offline_share mixes rows of data.table in; give the table")
        if self.data.shapes is not None:
            raise ValueError("online rounds draw their own pictures; drop data.shapes")
        if self.model.lora:
            raise ValueError(
                "online rounds draw with the LoRA of the round before alone, so the model must bring none; drop "
                "model.lora and give it as lora.init, or export a whole pipeline first"
            )
        if self.reference.other:
            raise ValueError("online rounds set the reference themselves; drop reference.model and reference.lora")

    def _scaled(self) -> None:
        denoising, shared = self.task in ("preference", "sft"), self.sharding == "fsdp2"
        if self.optim.compile and not denoising:
            raise ValueError(f"optim.compile is for denoisers, not for task {self.task}; drop it")
        if self.sharding != "none" and not denoising and self.task != "mllm":
            raise ValueError(f"sharding is for denoisers and task mllm, not for task {self.task}; drop it")
        stopping = self.guards.early_stopping
        if stopping and stopping.every > self.optim.steps:
            raise ValueError(
                f"guards.early_stopping.every ({stopping.every}) is above optim.steps ({self.optim.steps}): it would "
                "never look"
            )
        if self.ema and stopping:
            raise ValueError("guards.early_stopping exports the weights that scored best, ema their average; drop one")
        if shared and stopping:
            raise ValueError(
                "sharding: fsdp2 shares the weights out, and guards.early_stopping draws with them; drop one"
            )
        if shared and (self.noise.inverted or (self.reference.kind == "cached" and self.lora)):
            raise ValueError(
                "sharding: fsdp2 needs as many passes of the denoiser in every process, and inverted noise and a "
                "reference.kind: cached under a LoRA have some where another process has none; use sharding: none"
            )
        if shared and (self.optim.train_text_encoder or self.optim.optimizer != "adamw"):
            raise ValueError(
                "sharding: fsdp2 goes with optimizer adamw and without optim.train_text_encoder; change these, or use "
                "sharding: none"
            )
        if self.sharding == "zero2" and (self.optim.optimizer != "adamw" or self.precision == "fp16"):
            raise ValueError("sharding: zero2 goes with optimizer adamw and precision fp32 or bf16; change these")

    def _offloaded(self) -> None:
        wanted = self.optim.offload
        if not wanted:
            return
        if self.task not in ("preference", "sft"):
            raise ValueError(f"optim.offload is for the tasks preference and sft; drop it from task {self.task}")
        if self.sharding != "none":
            raise ValueError(f"optim.offload and sharding: {self.sharding} each move the model about; drop one")
        if "text_encoder" in wanted and self.optim.train_text_encoder:
            raise ValueError("optim.offload: a text encoder that is trained stays on the device; drop one of the keys")
        if "reference" in wanted and self.optim.compile:
            raise ValueError(
                "optim.offload: a compiled reference stays on the device; drop reference, or optim.compile"
            )
        if "reference" in wanted and (self.task == "sft" or self.reference.kind == "adapter_off"):
            raise ValueError("optim.offload: there is no second model as reference to put away; drop reference")

    def _guarded(self, loss: Preference) -> None:
        guards, cached = self.guards, self.reference.kind == "cached"
        if cached and ("drift" in loss.needs or guards.anchor or guards.velocity):
            raise ValueError("reference.kind: cached keeps errors only, and this needs the reference's predictions")
        if cached and self.noise.lagged:
            raise ValueError(
                "reference.kind: cached needs draws that do not move; use noise.inversion.model: reference"
            )
        if cached and loss.reference_free:
            raise ValueError(f"loss.kind {loss.kind} has no reference; drop reference.kind: cached")  # type: ignore[attr-defined]
        for guard, why in loss.refuses().items():
            if getattr(guards, guard):
                raise ValueError(f"guards.{guard}: loss.kind {loss.kind} {why}; drop it")  # type: ignore[attr-defined]


class Sampling(Strict):
    """How a model draws pictures: for `mmalign sample`, and for each source of `mmalign prefer`."""

    model: Model
    per_prompt: PositiveInt = Field(1, description="pictures for each prompt, with consecutive seeds")
    seed: int = Field(0, description="first seed, for prompts that bring none")
    steps: PositiveInt = 30
    guidance_scale: float = Field(7.5, ge=0)
    negative_prompt: str = ""
    negative_lora: Path | None = Field(
        None, description="LoRA trained with loss.kind: diffusion_npo, for guidance to lead away from"
    )
    negative_weight: float = Field(1.0, ge=0, description="of its update, on top of the model's own weights")
    height: PositiveInt | None = Field(None, description="pixels; default: the model's own size")
    width: PositiveInt | None = None
    frames: PositiveInt | None = Field(None, description="of a clip, for video families; default: the pipeline's own")
    fps: float | None = Field(None, gt=0, description="at which a clip plays; default: the family's own")
    lossless: bool = Field(False, description="clips as RGB H.264 that is read back bit for bit; few browsers play it")
    scheduler: Literal["own", "ddim", "dpm++", "dpm++sde", "euler"] = Field(
        "own", description="own: the one in the checkpoint folder; dpm++sde adds noise at each step"
    )
    batch_size: PositiveInt = 8
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    provenance: bool = Field(True, description="keep prompt, seed, settings and hashes of the weights in each file")

    @model_validator(mode="after")
    def _guided(self) -> Self:
        if self.negative_lora and self.guidance_scale <= 1:
            raise ValueError("negative_lora is the branch that guidance leads away from: set guidance_scale above 1")
        return self


class SampleConfig(Sampling):
    """`mmalign sample FILE`: generate pictures for a table of prompts."""

    prompts: Path = Field(
        description="text file (a prompt per line), or a JSONL, CSV or parquet table with `prompt` and perhaps `seed`"
    )
    output: Path = Field(description="folder: images/ and table.jsonl")
    limit: PositiveInt | None = Field(None, description="use only the first prompts")
    guidance: Guidance | None = Field(None, description="towards rewards (docs/guidance.md); null: plain sampling")

    @field_validator("guidance", mode="before")
    @classmethod
    def _block(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            raise ValueError(
                "guidance is a block that begins with kind (docs/guidance.md). Did you mean 'guidance_scale', a number "
                f"such as {value:g}?"
            )
        return value

    @model_validator(mode="after")
    def _stepped(self) -> SampleConfig:
        if self.guidance and self.scheduler.startswith("dpm++"):
            raise ValueError(
                f"guidance takes its own steps, which are those of ddim and euler; scheduler: {self.scheduler} has no "
                "part in them, drop it"
            )
        return self


class Scoring(Strict):
    """How evaluators run: for `mmalign score`, and for what `mmalign prefer` scores."""

    batch_size: PositiveInt = 32
    engine: Literal["local", "ray"] = Field(
        "local", description="ray: Ray Data actors, for tables that outgrow one machine (pip install 'mmalign[ray]')"
    )
    processes: PositiveInt = Field(1, description="scoring processes, or actors of Ray; one per GPU")
    dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = Field(False, description="torch.compile the towers; the first batches are slow")
    device: str = "auto"
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    decode_workers: PositiveInt | None = Field(
        None, description="processes that decode, per scoring process; default: its share of the cores, at most 16"
    )
    decode_seconds: PositiveFloat = Field(60.0, description="a decoder that takes longer for one file is killed")
    decode_memory: PositiveFloat = Field(
        2.0, description="GiB of decoded pixels per scoring process, apart from one item in each decoder"
    )
    max_pixels: PositiveInt = Field(
        100_000_000, description="of a picture; a larger one is an error row, and is not decoded"
    )
    max_bytes: PositiveInt = Field(
        4 << 30,
        description="of the frames that are picked of a clip, as 8-bit RGB; a longer or larger one is an error row",
    )


class ScoreConfig(Scoring):
    """`mmalign score FILE`: score a media table."""

    table: Path | None = Field(None, description="media table: JSONL, parquet, CSV, or a folder of media")
    media: Path | None = Field(None, description="the same; in configs of VBench the folder of clips")
    output: Path = Field(description="results folder: parts/, summary.json")
    evaluators: tuple[EvaluatorSpec, ...] = Field(min_length=1)
    vbench: VBench | None = Field(None, description="score dimensions of VBench and their totals (docs/vbench.md)")
    benchmark: Answers | None = Field(
        None, description="judge what a model answers to a benchmark's questions (docs/hallucination.md)"
    )

    @model_validator(mode="after")
    def _sourced(self) -> ScoreConfig:
        if self.benchmark is not None:
            given = [name for name in ("table", "media", "vbench") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"benchmark brings its own questions; drop {' and '.join(given)}")
        elif (self.table is None) == (self.media is None):
            raise ValueError("give exactly one of table and media: a media table, or a folder of media")
        return self

    @property
    def source(self) -> Path:
        """Where the media are listed: `table` or `media`, or the benchmark's (first) file of questions."""
        found = self.table or self.media or (self.benchmark.questions[0] if self.benchmark else None)
        assert found is not None
        return found
