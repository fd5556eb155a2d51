"""What scoring is told of a benchmark of answers: its files, and where the answers are from.

A part of `mmalign.jobs.ScoreConfig`, in a module of its own for length, and as light.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from mmalign.config import Strict
from mmalign.jobs_respond import Responding

__all__ = ["Answers"]


class Answers(Strict):
    """A benchmark that judges what a vision-language model answers: questions, and saved answers or a model."""

    kind: Literal["pope", "hallusionbench", "amber", "mmhal", "object_halbench", "questions"] = Field(
        description="whose files the questions are; questions: your own, see docs/scorers/answer_questions.md"
    )
    questions: tuple[Path, ...] = Field(min_length=1, description="file or files, as the authors publish them")
    annotations: Path | None = Field(None, description="amber: annotations.json")
    images: Path | None = Field(
        None,
        description="folder of the images; not needed for saved answers; object_halbench: its pictures are put there",
    )
    responses: tuple[Path, ...] | None = Field(
        None, description="saved answers: the benchmark's own layout, or a table with sample and response"
    )
    model: Responding | None = Field(None, description="answer with this model first, into output/responses")

    @field_validator("questions", "responses", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value

    @model_validator(mode="after")
    def _consistent(self) -> Answers:
        if (self.responses is None) == (self.model is None):
            raise ValueError("give exactly one of benchmark.responses (saved answers) and benchmark.model")
        if (self.kind == "amber") != (self.annotations is not None):
            raise ValueError(
                "benchmark.annotations is AMBER's annotations.json: give it for kind amber, and drop it for others"
            )
        if self.model and self.images is None:
            raise ValueError("benchmark.model looks at the images: give their folder as benchmark.images")
        if self.model and self.model.per_prompt > 1:
            raise ValueError("benchmark.model.per_prompt: a benchmark takes one answer to each question; drop it")
        return self
