"""What `mmalign respond` is told: the model that answers, how its words are chosen, and the questions.

`Responding` is also the block ``benchmark.model`` of scoring (`mmalign.jobs_answers`), and as light as all of `jobs`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from mmalign.config import Strict

__all__ = ["RespondConfig", "Responding"]


class Responding(Strict):
    """An image-text model and how it answers."""

    path: Path = Field(description="folder of an image-text model of transformers with its processor")
    lora: Path | None = Field(None, description="folder of a PEFT adapter, merged into the weights")
    system: str | None = Field(None, description="system message, in place of what the chat template puts there")
    conversation: str | None = Field(
        None, description="all that the model reads, with {images} and {question}, in place of its chat template"
    )
    suffix: str = Field("", description="put behind each question, such as '\\nAnswer with yes or no.'")
    max_new_tokens: PositiveInt = Field(512, description="tokens after which an answer is cut, which is counted")
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the likeliest tokens that have this share")
    per_prompt: PositiveInt = Field(1, description="answers to each question, with consecutive seeds")
    best_of: PositiveInt = Field(
        1, description="draw so many answers and keep the one that the lora makes likelier by most, per token"
    )
    seed: NonNegativeInt = Field(0, description="of the first answer to each question, where one is sampled")
    batch_size: PositiveInt = 8
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Responding:
        if not self.temperature and (max(self.per_prompt, self.best_of) > 1 or self.top_p < 1 or self.seed):
            raise ValueError("per_prompt, best_of, top_p, seed are of sampling: set temperature above 0, or drop them")
        if self.best_of > 1 and self.lora is None:
            raise ValueError("best_of takes rewards from what a lora changes; without one all are 0: give model.lora")
        if self.best_of > 1 and (self.per_prompt > 1 or self.conversation is not None):
            raise ValueError("best_of keeps one answer, in the chat template: drop per_prompt and conversation")
        if self.conversation is not None and not (
            "{images}" in self.conversation and "{question}" in self.conversation
        ):
            raise ValueError("conversation needs both {images} and {question}")
        if self.conversation is not None and self.system is not None:
            raise ValueError("conversation is all that the model reads; write the system message into it")
        return self


class RespondConfig(Strict):
    """`mmalign respond FILE`: answers of an image-text model to a table of questions."""

    questions: Path = Field(
        description="media table (JSONL, CSV, parquet) of questions: `prompt`; perhaps `media`, `images` and others"
    )
    images: Path | None = Field(None, description="folder in which relative paths start; default: the table's own")
    model: Responding
    output: Path = Field(description="folder: table.jsonl, the questions with a column `response`")
    limit: PositiveInt | None = Field(None, description="answer only the first questions")
