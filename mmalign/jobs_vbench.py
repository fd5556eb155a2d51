"""What a VBench run adds to `mmalign score`: the suite, where its clips and images lie, and how scores become figures.

A part of `mmalign.jobs.ScoreConfig`, in a module of its own for length, and as light.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from mmalign.config import Strict

_REFUSED = '/\\:*?"<>|'


class VBench(Strict):
    """How the clips of a VBench run are found, and how the scores of clips become scores of dimensions."""

    suite: Path | None = Field(
        None, description="VBench_full_info.json or the file of the image-to-video suite, as the authors publish them"
    )
    mode: Literal["auto", "standard", "custom", "category"] = Field(
        "auto",
        description="standard: the suite's prompts; category: those of a text file; custom: any clips; auto: standard "
        "with a suite, category with a category, else custom",
    )
    samples: PositiveInt = Field(5, description="clips per prompt; 10 for gender bias, skin bias and safety")
    dimensions: tuple[str, ...] | None = Field(None, description="these alone; default: all that have an evaluator")
    images: Path | None = Field(None, description="input images of the image-to-video suite: its folder crop/")
    ratio: str | None = Field(None, description="width to height of these images, such as 16-9")
    prompts: Literal["names"] | Path | None = Field(
        None, description="custom: JSON {file: prompt}; names: a clip's name is its prompt, as the reference has it"
    )
    category: Path | None = Field(None, description="category: text file with a prompt per line")
    rules: Literal["compat", "strict"] = Field(
        "compat", description="compat reproduces the reference and its quirks, strict repairs them"
    )
    on_error: Literal["error", "skip", "zero"] = Field(
        "error",
        description="clips without a score: no score for their dimension; left out of its mean; or counted as 0",
    )
    name: str = Field("vbench", description="of the results files, {name}_eval_results.json")
    model: str | None = Field(None, description="what made the clips, for results and report")
    substitutes: bool = Field(False, description="let evaluators such as color@clip stand in for totals, and name them")
    against: tuple[str, ...] = Field((), description="models of the leaderboard that the report shows beside this one")

    @property
    def kind(self) -> Literal["standard", "custom", "category"]:
        """The mode, where it is left to what is given."""
        if self.mode != "auto":
            return self.mode
        return "standard" if self.suite else "category" if self.category else "custom"

    @field_validator("name")
    @classmethod
    def _portable(cls, value: str) -> str:
        bad = [letter for letter in value if letter in _REFUSED or not letter.isprintable()]
        if bad or not value.strip(" ."):
            raise ValueError(f"vbench.name begins names of files: {value!r} holds {bad or 'no letter'}; write another")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> VBench:
        needed = {"standard": "suite", "category": "category"}.get(self.kind)
        for key in ("suite", "category"):
            if needed == key and getattr(self, key) is None:
                raise ValueError(f"vbench.mode: {self.kind} needs vbench.{key}")
            if needed != key and getattr(self, key) is not None:
                raise ValueError(f"vbench.{key} has no part in vbench.mode: {self.kind}; drop one of the two")
        if self.prompts is not None and self.kind != "custom":
            raise ValueError(f"vbench.prompts is for mode custom; in mode {self.kind} names or a table say the prompt")
        if (self.images or self.ratio) and self.kind != "standard":
            raise ValueError("vbench.images and vbench.ratio belong to the image-to-video suite: give vbench.suite")
        if self.ratio and not self.images:
            raise ValueError("vbench.ratio chooses among vbench.images; give their folder")
        return self
