"""The schema of `mmalign optimise-prompt`: candidates, a judge, and how the next pair is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.jobs import Sampling
from mmalign.jobs_align import RewardSpec


class Template(Strict):
    """All prompts of a template."""

    kind: Literal["template"] = "template"
    text: str = Field(description="alternatives in braces, such as: a {small |large |}red circle")


class Listed(Strict):
    """Prompts from a file."""

    kind: Literal["file"] = "file"
    path: Path = Field(description="a prompt per line, or a JSONL, CSV or parquet table with `prompt`")


class Choices(Strict):
    """Which alternative of each group a prompt has: for templates whose words matter one by one."""

    kind: Literal["choices"] = "choices"


class OwnEncoder(Strict):
    """What the generator's own text encoders make of a prompt, the mean over its tokens."""

    kind: Literal["model"] = "model"


class ClipText(Strict):
    """The text features of a CLIP."""

    kind: Literal["clip"] = "clip"
    checkpoint: Path = Field(description="CLIP weights: a file, or a folder that holds one")
    model: str = Field("auto", description="open_clip name, folder or config; auto: the folder's own, or ViT-B-32")


class EvaluatorJudge(Strict):
    """Evaluators judge: the prompt whose pictures or clips score higher on average wins."""

    kind: Literal["evaluator"] = "evaluator"
    rewards: tuple[RewardSpec, ...] = Field(min_length=1, description="evaluators with weights, as in guidance.rewards")
    temperature: float = Field(
        0.0, ge=0, description="above 0: a simulated person, who answers by Bradley-Terry on score / temperature"
    )

    reward_frames: PositiveInt = Field(
        4, description="of a clip, evenly spaced: what evaluators of images alone see, whose scores are averaged"
    )

    @model_validator(mode="after")
    def _weighed(self) -> EvaluatorJudge:
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("the weights of all rewards are 0; give one a weight above 0")
        return self


class PersonJudge(Strict):
    """People judge: a page and a table of the next pairs are written, and the run goes on when these are answered."""

    kind: Literal["person"] = "person"
    side: PositiveInt = Field(512, description="longest side, in pixels, of what the page shows of a prompt")


class Bandit(Strict):
    """How the next pair is chosen (APOHF, 2405.17346)."""

    initial: PositiveInt = Field(6, description="comparisons of pairs at random, before anything is believed")
    round: PositiveInt = Field(1, description="comparisons that are chosen, drawn and judged at once; for people more")
    hidden: tuple[PositiveInt, ...] = Field((32, 32), description="of the score's network; [] is a linear score")
    ridge: PositiveFloat = Field(0.1, description="lambda: pull of the first weights; less of it is more doubt")
    nu: float = Field(0.3, ge=0, description="weight of doubt in the second prompt's bound; 0 never explores")
    seed: int = Field(0, description="of the first pairs, the network's first weights, and a simulated person")


Candidates = Annotated[Template | Listed, Field(discriminator="kind")]
Embedding = Annotated[Choices | OwnEncoder | ClipText, Field(discriminator="kind")]
Judge = Annotated[EvaluatorJudge | PersonJudge, Field(discriminator="kind")]


class PromptsConfig(Sampling):
    """`mmalign optimise-prompt FILE`: find the prompt that draws what is wished, by comparing two at a time."""

    output: Path = Field(
        description="folder: comparisons.jsonl, best.json, images/ or videos/; for people to_compare.html"
    )
    wish: str | None = Field(
        None, description="what is drawn is judged against, and people are told; null: each prompt's own words"
    )
    candidates: Candidates
    comparisons: PositiveInt = Field(40, description="how many in all; may be raised to go on")
    judge: Judge
    embedding: Embedding = OwnEncoder()
    bandit: Bandit = Bandit()

    @model_validator(mode="after")
    def _fitting(self) -> PromptsConfig:
        if self.embedding.kind == "choices" and self.candidates.kind != "template":
            raise ValueError(
                "embedding.kind: choices are those of a template; use model or clip for prompts from a file"
            )
        if self.judge.kind == "person" and self.wish is None:
            raise ValueError("people have to be told what to look for: give `wish`, in a sentence")
        return self
