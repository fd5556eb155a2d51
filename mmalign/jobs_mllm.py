"""What training a vision-language model on answers adds to a training job: the block `mllm`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.jobs_align import Probability

Share = Annotated[float, Field(gt=0, le=1)]
Columns = Annotated[
    dict[str, str],
    Field(description="what the table calls a format's columns, e.g. {prompt: question, chosen: better_answer}"),
]
UnknownColumns = Annotated[
    Literal["error", "keep"],
    Field(description="columns that the format does not know: an error that names one, or kept in meta"),
]


class Negative(Strict):
    """Images that the answers are not about, for terms that compare with them; made once per row, from its content."""

    kind: Literal["crop", "noise", "black", "rotate", "other"] = Field(
        "crop",
        description="crop: a small part, enlarged (mDPO); noise: the picture after so many steps of diffusion (CHiP, "
        "POVID); black; rotate: by 90, 180 or 270 degrees; other: a picture of another row. A row's own "
        "rejected_images come before all of them",
    )
    low: Share = Field(0.01, description="crop: smallest share of the area; 0.01 in mDPO's code")
    high: Share = Field(0.2, description="crop: largest share; 0.2 in mDPO's code")
    step: int = Field(500, ge=0, lt=1000, description="noise: step of a linear DDPM schedule of 1000")

    @model_validator(mode="after")
    def _ordered(self) -> Negative:
        if self.low > self.high:
            raise ValueError(f"mllm.negative.low ({self.low}) is above high ({self.high})")
        return self


class BDHS(Strict):
    """Rejected answers from a model that hardly sees, to good answers that are there (2407.02477)."""

    kind: Literal["bdhs"] = "bdhs"
    hidden: Probability = Field(0.99, description="share of image tokens that the attention mask hides")
    tries: PositiveInt = Field(5, description="masks and places until an answer is different enough")
    similarity: Probability = Field(0.97, description="above it an answer says the same")
    encoder: Path | None = Field(
        None,
        description="folder of a sentence encoder for similarity, such as all-mpnet-base-v2 (mean of its last states); "
        "null: the share of words in common",
    )
    flip: Probability = Field(0.5, description="probability that a leading yes or no is turned round")


class Online(BDHS):
    """Rejected answers that the policy writes anew, at each step, from what it has learned so far (BDHS's online form).

    A row with a rejected answer of its own is then two pairs, whose losses are averaged.
    """

    max_new_tokens: PositiveInt = Field(64, description="of each end of a sentence")
    temperature: float = Field(0.0, ge=0, description="0: greedy")


class Mllm(Strict):
    """How a vision-language model reads rows, and what of it is trained; for task: mllm."""

    columns: Columns = {}
    unknown_columns: UnknownColumns = "error"
    max_length: PositiveInt | None = Field(
        None, description="tokens of a prompt and its longest answer; null: what the model reads. Nothing is cut off"
    )
    over_long: Literal["resize", "drop", "error"] = Field(
        "error", description="rows beyond it: make their images smaller, and drop what still does not fit; drop; stop"
    )
    vision: Literal["frozen", "projector", "trained"] = Field(
        "frozen",
        description="the vision tower: frozen with its projector, so that each image is encoded once for chosen, "
        "rejected and reference; frozen itself; or trained. Under a lora, adapters are in what is not frozen",
    )
    shared_prompt: Literal["auto", "on", "off"] = Field(
        "auto", description="chosen and rejected behind one prompt in one row, where the family's positions allow it"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    quantise: Literal["none", "4bit", "8bit"] = Field(
        "none", description="the frozen weights under a lora, by bitsandbytes (QLoRA)"
    )
    system: str | None = Field(None, description="system prompt for rows that bring none; null: the template's own")
    chat_template: Path | None = Field(None, description="Jinja file in place of the folder's chat template")
    processor: dict[str, Any] = Field(
        {}, description="arguments of the folder's processor, e.g. {max_pixels: 1003520} or {do_image_splitting: false}"
    )
    frames: PositiveInt = Field(8, description="of each clip, evenly spaced")
    negative: Negative = Negative()
    guide: Path | None = Field(
        None, description="for loss.tokens: guided: a model that was aligned before, or the folder of its LoRA"
    )
    online: Online | None = Field(None, description="rejected answers written during training; null: those of the rows")


def check(config: Any) -> None:
    """ValueError for keys of a training job (`mmalign.jobs.TrainConfig`) that mean nothing for answers, and for
    combinations that cannot work; each message names a way out."""
    data, loss = config.data, config.loss
    images = sorted(name for name in type(data).model_fields if name not in DATA and _given(data, name))
    model = sorted(name for name in type(config.model).model_fields if name not in MODEL and _given(config.model, name))
    blocks = sorted(name for name in GENERATORS if _given(config, name))
    quantised, lora = config.mllm.quantise != "none", config.lora
    cached, shared = config.reference.kind == "cached", config.sharding == "fsdp2"
    problems = [
        (bool(images), f"data.{images[0] if images else ''} is about generated pictures; drop it from task mllm"),
        (bool(model), f"model.{model[0] if model else ''} is for generators; drop it from task mllm"),
        (bool(blocks), f"{blocks[0] if blocks else ''} is for generators; drop it from task mllm"),
        (config.model.from_scratch not in ((), ("model",)), "model.from_scratch of task mllm is [model], or nothing"),
        (bool(config.validation.prompts), "validation.prompts are drawn, which task mllm does not; give rows that are "
         "held out as validation.table"),
        (data.shapes is not None and bool(config.mllm.columns), "mllm.columns are of data.table; drop them, or "
         "data.shapes"),
        (quantised and lora is None, f"mllm.quantise: {config.mllm.quantise} is for weights under a lora; give one"),
        (quantised and shared, "sharding: fsdp2 cuts weights that are numbers, and bitsandbytes keeps codes; use "
         "sharding: zero2 or none, or mllm.quantise: none"),
        (config.optim.train_text_encoder or bool(config.optim.offload), "optim.train_text_encoder and offload are for "
         "generators; drop them from task mllm"),
        (config.reference.lora is not None, "reference.lora is for denoisers; merge it, and give reference.model"),
        (config.reference.draws is not None, "reference.draws are of noise, which answers have none of; drop it"),
        (loss.reference_free and cached, "loss.terms have no reference; drop reference.kind: cached"),
        (("guide" in loss.needs) != (config.mllm.guide is not None), "loss.tokens: guided takes token rewards from "
         "mllm.guide, a model or LoRA that was aligned before: give both, or neither"),
        ("mask" in loss.needs and shared, "sharding: fsdp2 shares the policy, and the masks of loss.tokens: sparse are "
         "a model of their own; drop one"),
        (cached and bool({"kl", "guided", "mask"} & set(loss.needs)), "reference.kind: cached keeps one number for "
         "each token, and this objective reads the reference's whole distribution; use auto"),
        (config.mllm.online is not None and cached, "mllm.online writes other answers at each step, and "
         "reference.kind: cached keeps those of rows; use auto"),
        (config.mllm.online is not None and shared, "mllm.online writes answers of other lengths on every process, and "
         "sharding: fsdp2 has all work together; drop one"),
        (config.mllm.online is not None and bool({"margin", "safer"} & set(loss.needs)), "mllm.online writes answers "
         "that the rows' margins and judgements of safety say nothing of; drop it, or what reads them"),
        (config.mllm.online is not None and loss.items == "singles", "mllm.online writes rejected answers, and these "
         "terms take single ones; drop it, or use pairs"),
        (shared and cached and lora is None, "sharding: fsdp2 and a cached reference without a lora do not go "
         "together: every process would measure all rows; use reference.kind: frozen"),
    ]  # fmt: skip
    for wrong, message in problems:
        if wrong:
            raise ValueError(message)


DATA = frozenset({"table", "format", "root", "shapes", "limit", "verify", "cache", "cache_dir"})
MODEL = frozenset({"path", "from_scratch"})
GENERATORS = ("timesteps", "noise", "guards", "online")


def _given(block: Any, name: str) -> bool:
    """Whether a key has another value than its default."""
    field = type(block).model_fields[name]
    return bool(getattr(block, name) != field.get_default(call_default_factory=True))
