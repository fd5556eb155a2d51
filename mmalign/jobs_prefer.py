"""The schema of `mmalign prefer`: where the pictures come from, which rewards rank them, and what is made of that.

Beside `mmalign.jobs`, which has the other jobs' schemas, and as light.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.jobs import Sampling, Scoring
from mmalign.jobs_align import Probability, RewardSpec

PHI = "phi"  # the dimension under which the ensemble's ranking stands in the table


class SampleSource(Sampling):
    """A model that draws `per_prompt` pictures for each prompt; its keys mean what they mean to `mmalign sample`."""

    kind: Literal["sample"] = "sample"
    name: str | None = Field(None, description="how the summary calls it; default: the path of its LoRA or model")

    @property
    def title(self) -> str:
        return self.name or str(self.model.lora or self.model.path)


class TableSource(Strict):
    """Pictures (or clips) that exist: a media table, whose rows join the others of the same prompt."""

    kind: Literal["table"] = "table"
    name: str | None = Field(None, description="how the summary calls it; default: the rows' `model`, else the path")
    table: Path = Field(description="media table: JSONL, parquet, CSV, or a folder of media")
    root: Path | None = Field(None, description="folder that relative media paths start from; default: the table's own")

    @property
    def title(self) -> str:
        return self.name or str(self.table)


class Relabel(Strict):
    """A preference set that exists: its lists of media are kept, and its labels are replaced by the rewards'."""

    table: Path
    format: str = Field("auto", description="see `mmalign list formats`")
    root: Path | None = Field(None, description="folder that relative media paths start from; default: the table's own")
    dimension: str | None = Field(None, description="which of its labels to compare with, where it holds several")


class Ranking(Strict):
    """A row per prompt, with all its media."""

    kind: Literal["ranking"] = "ranking"
    weight: Literal["one", "strength"] = Field(
        "one", description="weight of a row: 1, or the mean strength of the votes on its decided pairs"
    )


class Pairs(Strict):
    """A row per pair."""

    kind: Literal["pairs"] = "pairs"
    select: Literal["best_worst", "all", "top_bottom", "margin"] = "best_worst"
    by: str = Field(PHI, description="what best, worst and margin go by: phi, or the `column` that a reward was given")
    count: PositiveInt | None = Field(
        None, description="top_bottom: how many at either end (1); margin: the most pairs per prompt (all)"
    )
    min_margin: float = Field(0.0, ge=0, description="leave out pairs that are less than this apart, in units of `by`")
    ties: Literal["keep", "drop"] = Field("keep", description="whether all and margin keep pairs that are level")
    weight: Literal["one", "strength"] = Field("one", description="weight of a row: 1, or the strength of its vote")

    @model_validator(mode="after")
    def _limited(self) -> Pairs:
        if self.select == "margin" and self.count is None and not self.min_margin:
            raise ValueError("label.select: margin needs label.min_margin or label.count; without, it is `all`")
        if self.by == PHI and self.min_margin > 1:
            raise ValueError(f"label.min_margin is {self.min_margin:g}, and phi, from 0 to 1, is never that far apart")
        if self.select in ("best_worst", "all") and self.count is not None:
            raise ValueError(f"label.count means nothing to label.select: {self.select}; use top_bottom or margin")
        return self


class Filters(Strict):
    """What is too unclear to train on."""

    min_agreement: float | None = Field(
        None, ge=-1, le=1, description="drop prompts whose mean Kendall tau-b between the rewards is below this"
    )
    min_strength: Probability | None = Field(
        None, description="drop pairs (rankings: prompts, by the mean) with a smaller share of the vote behind them"
    )


class Route(Strict):
    """Pairs for people: those on which the rewards disagree most."""

    count: PositiveInt = Field(50, description="how many pairs")
    per_prompt: PositiveInt = Field(1, description="at most so many of one prompt")
    seed: int = Field(0, description="of which of the two pictures stands left")
    side: PositiveInt = Field(512, description="longest side, in pixels, of the pictures inside the page")


Source = Annotated[SampleSource | TableSource, Field(discriminator="kind")]
LabelSpec = Annotated[Ranking | Pairs, Field(discriminator="kind")]


class PreferConfig(Strict):
    """`mmalign prefer FILE`: rank pictures by several rewards and write a preference table."""

    output: Path = Field(description="folder: preferences.jsonl, summary.json, pictures.jsonl, scores/, to_label.*")
    prompts: Path | None = Field(None, description="as for sampling; needed by sources of kind sample")
    limit: PositiveInt | None = Field(None, description="use only the first prompts, or rows of the relabelled table")
    sources: tuple[Source, ...] = ()
    relabel: Relabel | None = None
    rewards: tuple[RewardSpec, ...] = Field(min_length=1)
    label: LabelSpec = Ranking()
    filters: Filters = Filters()
    route: Route | None = None
    scoring: Scoring = Scoring()

    @model_validator(mode="after")
    def _consistent(self) -> PreferConfig:
        _check_sources(self)
        _check_rewards(self)
        return self


def _check_sources(config: PreferConfig) -> None:
    if bool(config.sources) == (config.relabel is not None):
        raise ValueError("give exactly one of sources (models, media tables) and relabel (a preference table)")
    samples = any(source.kind == "sample" for source in config.sources)
    if samples != (config.prompts is not None):
        raise ValueError("prompts and sources of kind sample need each other; media tables bring their own prompts")
    titles = [source.title for source in config.sources]
    twice = [title for title in titles if titles.count(title) > 1]
    if twice:
        raise ValueError(f"two sources would both be called {twice[0]!r}; give each a name, or raise its per_prompt")


def _check_rewards(config: PreferConfig) -> None:
    if not any(reward.weight for reward in config.rewards):
        raise ValueError("the weights of all rewards are 0, so none of them votes; give one a weight above 0")
    columns = [reward.column for reward in config.rewards if reward.column is not None]
    taken = [name for name in columns if name == PHI or columns.count(name) > 1]
    if taken:
        reason = "is what the ensemble's own ranking is called" if taken[0] == PHI else "is given twice"
        raise ValueError(f"rewards: the column {taken[0]!r} {reason}; choose another")
    if config.label.kind == "pairs" and config.label.by not in (PHI, *columns):
        raise ValueError(
            f"label.by is {config.label.by!r}, which no reward is called; it is one of "
            f"{', '.join((PHI, *columns))} (give a reward a column to name it here)"
        )
    if sum(reward.weight > 0 for reward in config.rewards) < 2:
        needy = {"filters.min_agreement": config.filters.min_agreement is not None, "route": config.route is not None}
        wanted = [name for name, given in needy.items() if given]
        if wanted:
            raise ValueError(f"{wanted[0]} is about rewards that disagree, and one alone votes here; add another")
