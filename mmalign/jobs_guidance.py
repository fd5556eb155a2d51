"""The `guidance` block of `mmalign sample`: one class per strategy, told apart by `kind`.

A new strategy is a class here, its line in `Guidance`, and the file that its `function` names. Beside `mmalign.jobs`,
and as light.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.jobs_align import EvaluatorSpec, RewardSpec

LATENT = "latent_reward"
"""The evaluator whose network `nrg` follows."""


class Strategy(Strict):
    """What all strategies have: the rewards that they follow, and what is reported beside.

    A subclass names its `function`, as "module:function", called with a `Denoising`, its `Rewards`, these settings and
    a bar; says whether it needs the rewards' gradients, and which of its settings to lower where latents overflow.
    """

    function: ClassVar[str]
    gradients: ClassVar[bool] = False
    any_reward: ClassVar[bool] = True  # whether it takes every evaluator
    lower: ClassVar[str | None] = None
    checks: ClassVar[str | None] = None  # "module:function" that looks at these settings before weights are loaded
    sets: ClassVar[bool] = False  # whether all pictures of a prompt are chosen together, as a batch of their own

    @property
    def needs_gradients(self) -> bool:
        """Whether these settings follow the rewards' gradients."""
        return self.gradients

    @property
    def judges(self) -> dict[str, EvaluatorSpec]:
        """Evaluators that are neither rewards nor held out, by the key that names them."""
        return {}

    rewards: tuple[RewardSpec, ...] = Field(
        min_length=1, description="evaluators with weights; what is maximised is the weighted sum of their scores"
    )
    held_out: tuple[EvaluatorSpec, ...] = Field(
        (), description="evaluators that choose nothing, and tell whether the rewards were merely pleased"
    )
    baseline: bool = Field(True, description="draw and score each seed without guidance too, to report what is gained")
    reward_frames: PositiveInt = Field(
        4, description="of a clip, evenly spaced: what evaluators that score images alone see of it; the mean counts"
    )

    @model_validator(mode="after")
    def _apart(self) -> Strategy:
        if not any(reward.weight for reward in self.rewards):
            raise ValueError("the weights of all rewards are 0; give one a weight above 0")
        named = [(reward.name, reward.params) for reward in self.rewards if reward.weight]
        for spec in self.held_out:
            if (spec.name, spec.params) in named:
                raise ValueError(f"held_out: {spec.name} is a reward, so it is not held out; drop one of the two")
        return self


class BestOfN(Strategy):
    """Draw n pictures from n seeds and keep the one with the highest reward."""

    function: ClassVar[str] = "mmalign.guidance.best_of_n:best_of_n"
    kind: Literal["best_of_n"] = "best_of_n"
    n: PositiveInt = Field(8, description="pictures for each one that is kept; the first is that of the plain seed")


class Search(Strategy):
    """Search over initial noise, or over paths, with a fixed sampler (2501.09732)."""

    function: ClassVar[str] = "mmalign.guidance.search:search"
    kind: Literal["search"] = "search"
    method: Literal["random", "zero_order", "paths"] = Field(
        "zero_order", description="independent noises; neighbours of the best noise so far; branches along the way"
    )
    rounds: PositiveInt = Field(4, description="random and zero_order: how often `n` pictures are drawn and compared")
    n: PositiveInt = Field(4, description="candidates of each round; for paths the branches of each kept path")
    radius: PositiveFloat = Field(
        0.3, le=1, description="zero_order: a neighbour is sqrt(1 - radius^2) times the pivot plus radius times noise"
    )
    keep: PositiveInt = Field(2, description="paths: how many are kept after each comparison")
    start: float = Field(0.8, gt=0, lt=1, description="paths: share of the steps left when the first are compared")
    back: PositiveInt = Field(2, description="paths: steps of forward noise before each round")
    forth: PositiveInt = Field(6, description="paths: denoising steps of a round, more than `back`")

    @model_validator(mode="after")
    def _forward(self) -> Search:
        if self.method == "paths" and self.forth <= self.back:
            raise ValueError(
                f"search over paths denoises forth ({self.forth}) and goes back ({self.back}) steps in each round; set "
                "forth above back, or it never ends"
            )
        return self


class Particles(Strategy):
    """Particles that are weighed and resampled on the way: Feynman-Kac steering (2501.06848), tempered SMC (DAS)."""

    function: ClassVar[str] = "mmalign.guidance.particles:particles"
    lower: ClassVar[str | None] = "strength"
    kind: Literal["particles"] = "particles"
    method: Literal["fk", "smc"] = Field("fk", description="fk: by potentials; smc: tempered, DAS (2501.05803)")
    n: Annotated[int, Field(ge=2)] = Field(4, description="particles for each picture that is kept")
    strength: PositiveFloat = Field(
        10.0, description="lambda: the target is what the model draws times exp(lambda reward)"
    )
    potential: Literal["difference", "max", "sum"] = Field(
        "max", description="fk: of the reward now and before, of the highest so far, of the sum so far"
    )
    gamma: PositiveFloat = Field(0.1, description="smc: the temperature is (1 + gamma)^k - 1 after k steps, at most 1")
    gradient: bool = Field(
        False, description="smc: steps are pushed up the reward's gradient, and weights take it into account"
    )
    every: PositiveInt = Field(4, description="steps between looks at the particles")
    start: float = Field(0.2, ge=0, le=1, description="share of the trajectory before which there is no look")
    stop: float = Field(0.9, ge=0, le=1, description="share of the trajectory after which there is none but the last")
    threshold: float = Field(
        0.5, ge=0, le=1, description="resample where the effective sample size is below this share of n; 0 never"
    )
    eta: float = Field(1.0, gt=0, le=1, description="noise of the steps: 1 is ancestral sampling, 0 would be DDIM")
    choose: Literal["best", "draw"] = Field("best", description="which is kept: the best, or one drawn by weight")

    @property
    def needs_gradients(self) -> bool:
        return self.gradient

    @model_validator(mode="after")
    def _pushed(self) -> Particles:
        if self.gradient and self.method != "smc":
            raise ValueError("guidance.gradient belongs to method: smc; use it, or drop gradient")
        if self.start > self.stop:
            raise ValueError(f"guidance.start ({self.start}) must not be after guidance.stop ({self.stop})")
        if 0 < self.threshold * self.n <= 1:
            raise ValueError(
                f"guidance.threshold {self.threshold:g} of {self.n} particles is {self.threshold * self.n:g}, and the "
                "effective sample size is never below 1, so nothing would be resampled; raise threshold or n, or say "
                "threshold: 0"
            )
        return self


class NoiseOptimisation(Strategy):
    """Gradient ascent on the initial noise, through all steps: ReNO (2406.04312) and DOODL (2303.13703)."""

    function: ClassVar[str] = "mmalign.guidance.noise_ascent:noise_ascent"
    any_reward: ClassVar[bool] = False
    gradients: ClassVar[bool] = True
    lower: ClassVar[str | None] = "lr"
    kind: Literal["noise"] = "noise"
    method: Literal["reno", "doodl"] = Field(
        "reno", description="reno: pulled to the length that noise has; doodl: put back to the length that it had"
    )
    iterations: PositiveInt = Field(20, description="of ascent, each a whole trajectory forth and back")
    lr: PositiveFloat = Field(5.0, description="5 in ReNO's code for one-step models")
    momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov's")
    max_grad_norm: PositiveFloat = Field(0.1, description="of each picture's gradient")
    length: float = Field(0.01, ge=0, description="reno: weight of the log likelihood of the noise's length")
    drift: float = Field(0.0, ge=0, description="weight of the mean squared distance from the first noise")
    checkpoint: bool = Field(
        True, description="keep the latents of each step alone and compute the rest again: one step's memory for all"
    )


class Neighbourhood(Strategy):
    """Draw n pictures and keep the one on which the weights around the wished ones agree (after 2510.20498)."""

    function: ClassVar[str] = "mmalign.guidance.robust:robust_choice"
    kind: Literal["neighbourhood"] = "neighbourhood"
    n: PositiveInt = Field(8, description="pictures for each one that is kept; the first is that of the plain seed")
    angle: float = Field(20.0, ge=0, le=90, description="degrees around the wished weights; 0 is plain best of n")
    concentration: PositiveFloat | None = Field(
        None, description="instead of angle: weights from a Dirichlet distribution with the wished ones as its mean"
    )
    directions: PositiveInt = Field(256, description="how many weights are drawn")
    direction_seed: int = Field(0, description="of the weights, which are the same for every prompt")
    rule: Literal["reciprocal_rank", "wins", "worst_regret", "regret"] = Field(
        "reciprocal_rank", description="how far they agree (docs/guidance/neighbourhood.md)"
    )
    scale: Literal["rank", "deviation", "none"] = Field(
        "rank", description="units of each reward among the n pictures: ranks, standard deviations, or its own"
    )

    @model_validator(mode="after")
    def _several(self) -> Neighbourhood:
        if sum(reward.weight > 0 for reward in self.rewards) < 2:
            raise ValueError("neighbourhood weighs rewards against each other: give two or more a weight above 0")
        return self


class Diversity(Strategy):
    """Evolve a set that covers learned axes of similarity, each picture the best of its cell (QDHF, 2310.12103)."""

    function: ClassVar[str] = "mmalign.guidance.quality_diversity:quality_diversity"
    checks: ClassVar[str | None] = "mmalign.guidance.quality_diversity:check"
    sets: ClassVar[bool] = True
    kind: Literal["diversity"] = "diversity"
    candidates: PositiveInt = Field(64, description="pictures drawn for each prompt; its `per_prompt` ones are the set")
    initial: int = Field(32, ge=3, description="of these at random; then elites are mutated")
    children: PositiveInt = Field(8, description="mutants between two looks at the archive")
    strength: float = Field(0.5, gt=0, le=1, description="share of fresh noise in a mutant; 1 is random search")
    axes: int = Field(2, ge=1, le=4, description="how many axes are learned")
    cells: int = Field(4, ge=1, le=64, description="cells of the archive along each axis")
    clip: Path = Field(description="CLIP weights (a file, or a folder) whose picture features the axes project")
    clip_model: str = Field("auto", description="open_clip name, folder or config; auto: the folder's own, or ViT-B-32")
    judgements: Path | None = Field(
        None, description="what people said: a JSONL with anchor, a, b (pictures) and answer (A or B is more like it)"
    )
    judge: EvaluatorSpec | None = Field(None, description="or an evaluator whose scores say how alike two pictures are")
    judge_scores: tuple[str, ...] = Field((), description="which of its scores; default: all")
    triplets: PositiveInt = Field(200, description="how many an evaluator judges, of the pictures at random")
    floor: float = Field(0.0, description="the lowest reward there can be, for the QD score")

    @property
    def judges(self) -> dict[str, EvaluatorSpec]:
        return {"judge": self.judge} if self.judge else {}

    @model_validator(mode="after")
    def _judged(self) -> Diversity:
        if (self.judge is None) == (self.judgements is None):
            raise ValueError(
                "diversity learns its axes from judgements (people) or from a judge (an evaluator): give one"
            )
        if self.initial > self.candidates:
            raise ValueError(f"initial ({self.initial}) is above candidates ({self.candidates}); lower it")
        return self


class NRG(Strategy):
    """Flow-NRG: lead each prediction by the gradient of rewards that know noisy latents (2501.13918)."""

    function: ClassVar[str] = "mmalign.guidance.nrg:nrg"
    any_reward: ClassVar[bool] = False
    lower: ClassVar[str | None] = "scale"
    kind: Literal["nrg"] = "nrg"
    scale: float = Field(1.0, ge=0, description="w, of the gradient; an axis' share of it is the weight of its reward")
    skip_above: float = Field(
        0.95, gt=0, le=1, description="share of the schedule above which nothing is led: pure noise says nothing"
    )
    max_ratio: PositiveFloat = Field(
        10.0, description="noise over signal, t / (1 - t) of a flow, counts as this at most; it grows without bound"
    )

    @model_validator(mode="after")
    def _on_latents(self) -> NRG:
        others = [spec.name for spec in self.rewards if spec.name != LATENT]
        if others:
            raise ValueError(
                f"rewards: {others[0]} scores finished media, and nrg follows rewards of noisy latents; use {LATENT} "
                "(fitted by task: reward with model.family: latent), or kind: gradient for any differentiable evaluator"
            )
        lacking = [spec for spec in self.rewards if "model" not in spec.params]
        if lacking:
            raise ValueError(f"rewards: {LATENT} needs params: {{model: the export/ folder of its run}}")
        return self


class Gradient(Strategy):
    """Lead each prediction by the gradient of differentiable evaluators at the decoded estimate (2302.07121)."""

    function: ClassVar[str] = "mmalign.guidance.gradient:gradient"
    any_reward: ClassVar[bool] = False
    gradients: ClassVar[bool] = True
    lower: ClassVar[str | None] = "scale"
    kind: Literal["gradient"] = "gradient"
    scale: float = Field(
        0.1,
        ge=0,
        description="how far a prediction is moved, relative to its length; without normalise, of the gradient",
    )
    normalise: bool = Field(True, description="moves of the same relative length at every step, whatever the unit")
    through_denoiser: bool = Field(
        True, description="the gradient by noisy latents; false: by the estimate alone, which takes less memory"
    )
    recurrence: PositiveInt = Field(1, description="how often a guided step is taken, its end noised again in between")
    start: float = Field(0.9, gt=0, le=1, description="share of the schedule from which on predictions are led")
    stop: float = Field(0.0, ge=0, lt=1, description="share of the schedule below which they are no longer")
    max_ratio: PositiveFloat = Field(10.0, description="without normalise: noise over signal counts as this at most")
    checkpoint: bool = Field(False, description="decode a second time for the gradient, which takes less memory")

    @model_validator(mode="after")
    def _range(self) -> Gradient:
        if self.stop >= self.start:
            raise ValueError(f"stop ({self.stop:g}) is not below start ({self.start:g}): no step would be led")
        return self


# fmt: off
Guidance = Annotated[
    BestOfN
    | Search
    | NRG
    | Gradient
    | Particles
    | NoiseOptimisation
    | Neighbourhood
    | Diversity,
    Field(discriminator="kind"),
]
# fmt: on


def strategies() -> Iterator[tuple[str, type[Strategy]]]:
    """(kind, class) of every strategy, in the order of the union."""
    union: Any = get_args(Guidance)[0]
    for strategy in get_args(union) or (union,):
        yield strategy.model_fields["kind"].default, strategy
