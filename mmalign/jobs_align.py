"""What preference training adds to a training job: timesteps, noise, guards, the reference, rounds on own pictures.

Parts of `mmalign.jobs.TrainConfig`, in a module of their own for length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmalign.config import Strict

Probability = Annotated[float, Field(ge=0, le=1)]


class EvaluatorSpec(Strict):
    """An evaluator by name, with its own parameters (`mmalign list evaluators`)."""

    name: str
    params: dict[str, Any] = {}


class RewardSpec(EvaluatorSpec):
    """An evaluator that votes, by one of its scores; lower-is-better ones vote with their sign turned."""

    subscore: str | None = Field(None, description="which of its scores, for evaluators that give several")
    weight: float = Field(1.0, ge=0, description="of its vote; with 0 its score is kept in the table and does not vote")
    column: str | None = Field(
        None, description="its name in the table; default: as results call it, such as shapes_truth/fidelity"
    )


class Timesteps(Strict):
    """How the timesteps of training are drawn."""

    density: Literal["auto", "uniform", "logit_normal"] = Field(
        "auto", description="auto: uniform over the schedule for eps and v, logit_normal (2403.03206) for flow"
    )
    mean: float = Field(0.0, description="of the Gaussian whose sigmoid is drawn by logit_normal")
    std: PositiveFloat = 1.0
    shift: Literal["auto"] | PositiveFloat = Field(
        "auto", description="of flow times, towards noise; auto: what the checkpoint's scheduler samples with"
    )
    low: Probability = Field(0.0, description="only this part of the schedule, 0 is clean and 1 is noise")
    high: Probability = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Timesteps:
        if self.low >= self.high:
            raise ValueError(f"timesteps.low ({self.low}) must be below timesteps.high ({self.high})")
        return self


class Inversion(Strict):
    """How inverted noise is found: the sampler's steps walked backwards from the clean picture to t."""

    steps: PositiveInt = Field(10, description="grid over the whole schedule; a draw of t walks the part below it")
    eta: Probability = Field(0.0, description="noise added at each step; 0.1 in DDIM-InPO's code")
    model: Literal["reference", "policy"] = Field(
        "reference", description="reference: once per draw, cached; policy: as it was at the last refresh"
    )
    refresh: PositiveInt = Field(50, description="optimiser steps between refreshes of the policy that inverts")


class Noise(Strict):
    """The noise of a pair or list."""

    kind: Literal["shared", "independent", "ddim_inversion", "renoise"] = Field(
        "shared",
        description="one draw for the whole group; one each; DDIM-InPO (2503.18454); SmPO's ReNoise (2506.02698)",
    )
    inversion: Inversion = Inversion()

    @property
    def inverted(self) -> bool:
        return self.kind in ("ddim_inversion", "renoise")

    @property
    def lagged(self) -> bool:
        """Whether the policy itself inverts, as it was at the last refresh."""
        return self.inverted and self.inversion.model == "policy"

    def cached(self, draws: int | None, cache: str) -> bool:
        """Whether an inversion is worth keeping: the same draw comes again, and there is a cache."""
        return self.inverted and draws is not None and cache != "off"

    def identity(self) -> dict[str, Any]:
        """What an error or a noisy latent depends on."""
        return self.model_dump() if self.inverted else {"kind": self.kind}


class AutoBeta(Strict):
    """beta that follows the margins, so that the mean sigmoid of the logits' sizes stays at a target."""

    target: float = Field(0.8, gt=0.5, lt=1, description="mean of sigmoid(|logit|); 1/2 is no preference at all")
    decay: float = Field(0.99, gt=0, lt=1, description="of the moving average of |margin|")
    low: PositiveFloat = Field(0.1, le=1, description="beta is not made smaller than this times loss.beta")
    high: float = Field(10.0, ge=1, description="nor larger than this times loss.beta")


class EarlyStopping(Strict):
    """Ends a run when a reward that it is not trained on stops getting better, and keeps the best weights."""

    evaluator: EvaluatorSpec = Field(description="any evaluator; best one that has no part in the labels")
    subscore: str | None = Field(None, description="which of its scores; default: its first")
    prompts: Path = Field(description="text file, a prompt per line")
    limit: PositiveInt = Field(64, description="use only the first prompts")
    every: PositiveInt = Field(100, description="optimiser steps between looks")
    patience: PositiveInt = Field(3, description="looks without a gain before the run ends")
    min_gain: float = Field(0.0, ge=0, description="what counts as a gain, in units of the score")
    steps: PositiveInt = Field(20, description="of sampling")
    guidance_scale: float = 5.0
    seed: int = 0
    batch_size: PositiveInt = 16


class Guards(Strict):
    """What keeps a run from leaving the reference too far behind; each works with every objective that can have it."""

    winner: float = Field(0.0, ge=0, description="adds this times the policy's own error on the best picture")
    anchor: float = Field(0.0, ge=0, description="adds this times |prediction - reference's prediction|^2")
    velocity: float = Field(
        0.0, ge=0, description="adds this times relu(|prediction| / |reference's| - 1 - velocity_slack)^2"
    )
    velocity_slack: float = Field(
        0.0, ge=0, description="how much longer predictions may be, relative to the reference's"
    )
    drop_saturated: float | None = Field(
        None, gt=0, description="pairs whose logit is above this weigh nothing; 4 is sigmoid 0.98"
    )
    auto_beta: AutoBeta | None = None
    early_stopping: EarlyStopping | None = None


class Reference(Strict):
    """The model that preferences are measured against."""

    kind: Literal["auto", "adapter_off", "frozen", "cached"] = Field(
        "auto",
        description="auto: adapter_off with LoRA, frozen copy without; cached: errors stored per draw, of answers "
        "log-probabilities per token",
    )
    model: Path | None = Field(None, description="another checkpoint folder whose denoiser is the reference")
    variant: str | None = Field(None, description="of its files, as model.variant")
    lora: Path | None = Field(None, description="LoRA on top of it; with a LoRA of an earlier round, its policy")
    draws: PositiveInt | None = Field(
        None,
        description="K fixed (t, noise, crop, flip) draws per pair, visited in turn; `cached` needs it of generators",
    )

    @model_validator(mode="after")
    def _draws(self) -> Reference:
        if self.other and self.kind == "adapter_off":
            raise ValueError("reference.kind: adapter_off is the model itself; drop it, or reference.model and .lora")
        return self

    @property
    def other(self) -> bool:
        """Whether the reference is another model than the one that is trained."""
        return self.model is not None or self.lora is not None


class HeldOut(Strict):
    """What no round trains on: prompts to draw and score, and pairs to rank."""

    prompts: Path = Field(description="as for sampling")
    limit: PositiveInt | None = Field(None, description="use only the first prompts, and the first rows of pairs")
    per_prompt: PositiveInt = 1
    seed: int = Field(0, description="the same pictures are compared from round to round")
    evaluators: tuple[EvaluatorSpec, ...] = Field((), description="rewards that are not trained on")
    pairs: Path | None = Field(None, description="preference table; how often the policy ranks its pairs right")
    draws: PositiveInt = Field(4, description="(t, noise) draws per held-out pair")


class Online(Strict):
    """Rounds on the policy's own pictures: sample, label, train, and look at what no round trains on."""

    iterations: PositiveInt
    prefer: Path = Field(description="config of `mmalign prefer`; its sources with this model draw from the policy")
    reference: Literal["fixed", "moved"] = Field(
        "fixed",
        description="the run's first model (without lora.init), or the policy that drew the round's pictures",
    )
    offline_share: float = Field(
        0.0, ge=0, lt=1, description="share of each round's rows that come from data.table instead"
    )
    held_out: HeldOut | None = None
