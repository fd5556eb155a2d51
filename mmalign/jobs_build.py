"""What `mmalign prefer-answers` is told to build preference rows of answers: the rows, the model, one method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.jobs_mllm import BDHS, Columns, Negative, UnknownColumns
from mmalign.jobs_respond import Responding

Ratio = Annotated[float, Field(ge=1)]


class Claims(Strict):
    """RLAIF-V: several answers to each prompt, split into claims that the model is asked about (2405.17220)."""

    kind: Literal["claims"] = "claims"
    splitter: Path | None = Field(
        None, description="folder of the model that splits answers; null: the one that answers"
    )
    split: Literal["model", "shapes"] = Field(
        "model", description="who splits answers: a model that is asked to, or the grammar of the shapes world"
    )
    pairs: PositiveInt = Field(2, description="most pairs of a prompt")
    least: PositiveInt = Field(1, description="how many rejected claims a pair is apart")
    length_filter: bool = Field(True, description="drop pairs with long rejected answers until mean lengths agree")


class Several(Strict):
    """MIA-DPO: questions about one picture among several; answers that look at the wrong one (2410.17637)."""

    kind: Literal["several"] = "several"
    forms: tuple[Literal["sequence", "collage", "pic_in_pic"], ...] = Field(
        ("sequence", "collage", "pic_in_pic"), min_length=1
    )
    counts: tuple[int, ...] = Field((2, 3, 4, 5), min_length=1, description="pictures of a sequence or collage, drawn")
    layer: int | None = Field(None, ge=0, description="whose attention is read; null: the middle one")
    longest: PositiveInt = Field(512, description="characters of a chosen answer")
    least_perplexity: float = Field(1.1, description="of the greedy answer; below it is said by heart")
    length_ratio: Ratio | None = Field(None, description="of the longer to the shorter answer, at most")

    @model_validator(mode="after")
    def _counted(self) -> Several:
        if min(self.counts) < 2 or max(self.counts) > 9:
            raise ValueError("build.counts are from 2 to 9 pictures")
        return self


class SelfReward(Strict):
    """Self-rewarding rounds: the model's own answers by its implicit reward, believed as far as two rounds agree
    (CREAM, 2410.12735)."""

    kind: Literal["self_reward"] = "self_reward"
    earlier: Path | None = Field(
        None, description="LoRA of the round before, whose order is compared; null: the base model's log-probabilities"
    )
    consistency: Literal["mean", "row", "off"] = Field(
        "mean", description="weights C and 1 - C of a pair and its reverse: C of all prompts, as in the paper, or of "
        "each; off: pairs as they are"
    )  # fmt: skip
    least: float = Field(0.0, ge=0, description="how far apart the rewards of a pair are, per token")


class Negatives(Strict):
    """Negative images for rows that are there, written to files: for mDPO, CHiP and others to share."""

    kind: Literal["negatives"] = "negatives"
    negative: Negative = Negative()


class BuildConfig(Strict):
    """`mmalign prefer-answers FILE`: preference rows of answers, built by a vision-language model."""

    rows: Path = Field(description="rows with prompts, images and perhaps answers, in any form of docs/answers.md")
    format: str = Field("auto", description="see `mmalign list formats`")
    root: Path | None = Field(None, description="folder that relative media paths start from; default: the table's own")
    columns: Columns = {}
    unknown_columns: UnknownColumns = "error"
    limit: PositiveInt | None = Field(None, description="use only the first rows")
    model: Responding | None = Field(None, description="who answers; negatives need none")
    build: BDHS | Claims | Several | SelfReward | Negatives = Field(discriminator="kind")
    seed: int = 0
    output: Path = Field(
        description="folder: rows.jsonl to train on, images/, build.json with what was left out and why"
    )

    @model_validator(mode="after")
    def _consistent(self) -> BuildConfig:
        kind = self.build.kind
        if (self.model is None) != (kind == "negatives"):
            raise ValueError(
                f"build.kind: {kind} {'needs a model' if self.model is None else 'asks no model; drop it'}"
            )
        if (
            kind in ("claims", "self_reward")
            and self.model
            and (self.model.per_prompt < 2 or not self.model.temperature)
        ):
            raise ValueError(
                f"build.kind: {kind} compares answers of one model: set model.per_prompt to 2 or more, and "
                "model.temperature above 0"
            )
        if kind == "self_reward" and self.model and self.model.lora is None:
            raise ValueError(
                "build.kind: self_reward takes rewards from what model.lora changes: give the LoRA of the last round. "
                "The first round's is trained on answers of people, or on rows of build.kind: claims"
            )
        if kind in ("bdhs", "several") and self.model is not None and self.model.per_prompt > 1:
            raise ValueError(f"build.kind: {kind} has one answer to a row; drop model.per_prompt")
        return self
