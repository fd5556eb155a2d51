"""The settings of every method: one frozen class per objective, with the `kind` that a config names it by.

A new objective is a pure function in `mmalign/losses`, a class here and its name in `LOSSES`; the tasks call it through
`function`, with what `needs` lists and every setting that `own` gives. Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmalign.methods_mllm import MLLM
from mmalign.methods_reward import (
    BTT,
    HPS,
    MSE,
    BradleyTerry,
    BTMargin,
    BTRegression,
    Contrastive,
    GaussianBT,
    LikelihoodDisplacement,
    ListwiseCE,
    Ordinal,
    PickScore,
    RankingHinge,
    ScaledBT,
    Triplet,
)
from mmalign.objective import NonNegative, Objective

NO_BETA = "has no beta that scales margins and nothing else"
SHIFTED = "keeps averages of rewards, which are in units of beta"
NO_PAIRS = "is not on pairs, which are what it drops"
OTHER_LOGIT = "decides by another number than Diffusion-DPO's logit, which it looks at"
NO_BEST = "has no groups, to whose best picture it pulls"
LED_AWAY = "is to be led away from the best picture, to which it pulls"


class Preference(Objective):
    """An objective on squared denoising errors of judged pictures, under the policy and (mostly) a reference."""

    task: ClassVar[str] = "preference"
    items: ClassVar[Literal["pairs", "lists", "singles"]] = "pairs"
    needs: ClassVar[tuple[str, ...]] = ("label", "weight")
    reference_free: ClassVar[bool] = False
    family: ClassVar[str] = "pairwise"
    tracked: ClassVar[dict[str, str]] = {}  # argument -> metric whose moving average it is
    looks_around: ClassVar[bool] = False  # whether the loss of a picture depends on the others of its micro-batch
    reduction: Literal["mean", "sum"] = Field(
        "mean", description="how a sample's squared error is reduced; beta is not portable between the two"
    )

    def beta_for(self, beta: float, elements: int) -> float:
        """beta for latents of so many numbers: the same, where nothing says that it depends on them."""
        return beta

    def refuses(self) -> dict[str, str]:
        """The guards that have no meaning with these settings: name -> why."""
        return {"auto_beta": NO_BETA, "drop_saturated": OTHER_LOGIT if self.items == "pairs" else NO_PAIRS}


class WithBeta(Preference):
    """beta and kappa, as in logit = -kappa beta [(E(w) - E_ref(w)) - (E(l) - E_ref(l))]."""

    beta: PositiveFloat = Field(
        2000.0, description="strength of the pull to the reference; 2000 SD1.5, 5000 SDXL with reduction mean"
    )
    kappa: PositiveFloat = Field(
        0.5, description="factor in the logit; 0.5 in the paper's code, 1 in the diffusers SD1.5 script"
    )
    beta_elements: PositiveInt | None = Field(
        None, description="numbers in the latents that beta is meant for: it is scaled to those of each batch, so that "
        "its strength per element holds over resolutions and lengths; with reduction mean",
    )  # fmt: skip

    @model_validator(mode="after")
    def _scaled(self) -> Self:
        if self.beta_elements and self.reduction == "sum":
            raise ValueError(
                "loss.beta_elements scales beta for mean errors; with reduction: sum it is per element already: drop it"
            )
        return self

    def beta_for(self, beta: float, elements: int) -> float:
        """beta scaled from `beta_elements` to latents of so many numbers."""
        return beta * elements / self.beta_elements if self.beta_elements else beta

    def refuses(self) -> dict[str, str]:
        return {} if self.items == "pairs" else {"drop_saturated": NO_PAIRS}


# -------------------------------------------------------------------------------------------- pairwise
class DiffusionDPO(WithBeta):
    """Diffusion-DPO: prefer the winner's denoising error to the loser's, relative to a reference (2311.12908)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:diffusion_dpo"
    kind: Literal["diffusion_dpo"] = "diffusion_dpo"


class FlowDPO(WithBeta):
    """Flow-DPO: the same on velocity errors, beta constant over time or falling as (1 - t)^2 (2501.13918)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:flow_dpo"
    parameterisations: ClassVar[tuple[str, ...]] = ("flow",)
    needs: ClassVar[tuple[str, ...]] = ("label", "weight", "t")
    kind: Literal["flow_dpo"] = "flow_dpo"
    beta: PositiveFloat = Field(100.0, description="100 in flow_grpo's SD3.5-M script at 512 px, reduction mean")
    beta_schedule: Literal["constant", "(1-t)^2"] = Field(
        "constant", description="(1-t)^2 is what the derivation gives; the paper found it to lose text alignment"
    )

    def refuses(self) -> dict[str, str]:
        return {} if self.beta_schedule == "constant" else {"drop_saturated": OTHER_LOGIT}


class IPO(WithBeta):
    """IPO: bring the logit to one half instead of to infinity (2310.12036)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:ipo"
    kind: Literal["ipo"] = "ipo"


class Hinge(WithBeta):
    """Hinge: no more pull once the logit has passed 1 (SLiC, 2305.10425)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:hinge"
    kind: Literal["hinge"] = "hinge"


class ConservativeDPO(WithBeta):
    """Conservative DPO: labels smoothed, so that a share of them may be wrong (cDPO note; 2305.18290)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:conservative_dpo"
    kind: Literal["conservative_dpo"] = "conservative_dpo"
    flip_rate: float = Field(0.1, ge=0, lt=0.5, description="share of labels that are believed to be wrong")


class RobustDPO(WithBeta):
    """Robust DPO: an unbiased estimate of the loss on clean labels when a share is flipped (2403.00409)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:robust_dpo"
    kind: Literal["robust_dpo"] = "robust_dpo"
    flip_rate: float = Field(0.1, ge=0, lt=0.5, description="share of labels that are flipped; below one half")


class FDPO(WithBeta):
    """f-divergence DPO: the pull to the reference is another divergence than reverse KL (2309.16240)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:f_dpo"
    kind: Literal["f_dpo"] = "f_dpo"
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "js"
    alpha: float = Field(0.5, gt=0, lt=1, description="of the alpha divergence; towards 0 is reverse KL, 1 forward KL")
    scale: PositiveFloat = Field(1.0, description="log-ratio per unit of implicit reward; towards 0 all are DPO")

    def refuses(self) -> dict[str, str]:
        return {"auto_beta": NO_BETA, "drop_saturated": OTHER_LOGIT}


class DSPO(WithBeta):
    """DSPO: the winner's score is moved along the preference's own score (ICLR 2025; SD 1.5 form of its code)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:dspo"
    needs: ClassVar[tuple[str, ...]] = ("label", "weight", "drift")
    kind: Literal["dspo"] = "dspo"
    beta: PositiveFloat = Field(
        0.001, lt=1, description="0.001 in the released script; from 1 on, the loss pushes the policy off the winner"
    )

    def refuses(self) -> dict[str, str]:
        return {"auto_beta": NO_BETA}


class MaPO(Preference):
    """MaPO: reference-free; raises the winner's likelihood and its margin over the loser (2406.06424)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:mapo"
    reference_free: ClassVar[bool] = True
    kind: Literal["mapo"] = "mapo"
    reduction: Literal["mean"] = Field("mean", description="a sum is hundreds, at which the likelihood below is 0")
    beta: PositiveFloat = Field(0.1, description="weight of the margin term")
    sharpness: PositiveFloat = Field(0.5, description="a in a m / (e^(a m) - 1), which maps errors to (0, 1)")
    timesteps: PositiveFloat = Field(1000.0, description="T, factor of the margin")


class DiffusionNPO(WithBeta):
    """Diffusion-NPO: labels swapped; the result is the unconditional branch of guidance (2505.11245)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:diffusion_npo"
    kind: Literal["diffusion_npo"] = "diffusion_npo"
    beta: PositiveFloat = Field(500.0, description="500 in its code")

    def refuses(self) -> dict[str, str]:
        return {"drop_saturated": OTHER_LOGIT, "winner": LED_AWAY}


class JPO(WithBeta):
    """JPO: joint preference over (prompt, picture) pairs, whose prompts may differ (DOVE, 2404.00530)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:diffusion_dpo"
    kind: Literal["jpo"] = "jpo"


class VideoDPO(WithBeta):
    """VideoDPO: pairs whose two scores are rarely this low weigh more (2412.14167)."""

    function: ClassVar[str] = "mmalign.losses.pairwise:video_dpo"
    needs: ClassVar[tuple[str, ...]] = ("label", "weight", "scores")
    kind: Literal["video_dpo"] = "video_dpo"
    pivot: PositiveFloat = Field(0.72, description="product of a pair's scores (each in (0, 1]) that weighs 1")
    power: NonNegative = Field(1.0, description="0 is plain DPO")
    floor: PositiveFloat = Field(0.05, description="scores below this count as this, or their weight has no bound")


# ----------------------------------------------------------------------------------- degree of preference
class SmPO(WithBeta):
    """SmPO: labels smoothed by how far apart a reward puts the two (2506.02698); best with noise.kind: renoise."""

    function: ClassVar[str] = "mmalign.losses.strength:smpo"
    needs: ClassVar[tuple[str, ...]] = ("weight", "gap")
    family: ClassVar[str] = "degree"
    kind: Literal["smpo"] = "smpo"
    gamma: PositiveFloat = Field(10.0, description="factor of 2 p - 1; 10 was best in the paper")

    def refuses(self) -> dict[str, str]:
        return {"drop_saturated": OTHER_LOGIT}


class MarginDPO(WithBeta):
    """Margin-scaled beta: a clearer preference pulls harder, beta (1 + w (1 - e^(-k gap))) (2502.10391)."""

    function: ClassVar[str] = "mmalign.losses.strength:margin_dpo"
    needs: ClassVar[tuple[str, ...]] = ("label", "weight", "gap")
    family: ClassVar[str] = "degree"
    kind: Literal["margin_dpo"] = "margin_dpo"
    scale: NonNegative = Field(0.5, description="w: the largest relative increase of beta; 0 is plain DPO")
    rate: PositiveFloat = Field(4.0, description="k: how fast the increase comes, per unit of the gap in [0, 1]")

    def refuses(self) -> dict[str, str]:
        return {"drop_saturated": OTHER_LOGIT}


class StrengthDPO(WithBeta):
    """Strength-weighted DPO: each pair weighs as much as its preference is strong, gap^power over its mean."""

    function: ClassVar[str] = "mmalign.losses.strength:strength_dpo"
    needs: ClassVar[tuple[str, ...]] = ("label", "weight", "gap", "mean_strength")
    family: ClassVar[str] = "degree"
    kind: Literal["strength_dpo"] = "strength_dpo"
    power: NonNegative = Field(1.0, description="0 is plain DPO")


# ------------------------------------------------------------------------------------------------ ranked
class Ranked(WithBeta):
    """An objective on lists of k judged pictures."""

    items: ClassVar[Literal["pairs", "lists", "singles"]] = "lists"
    needs: ClassVar[tuple[str, ...]] = ("phi", "mask", "weight")
    family: ClassVar[str] = "ranked"


class RankDPO(Ranked):
    """RankDPO: DPO on all pairs of a ranking, weighted by DCG gains and discounts (2410.18013)."""

    function: ClassVar[str] = "mmalign.losses.listwise:rank_dpo"
    kind: Literal["rank_dpo"] = "rank_dpo"


class PlackettLuce(Ranked):
    """Plackett-Luce: the likelihood of the whole ranking under the implicit rewards (2305.18290, appendix A.3)."""

    function: ClassVar[str] = "mmalign.losses.listwise:plackett_luce"
    kind: Literal["plackett_luce"] = "plackett_luce"


class LiPO(Ranked):
    """LiPO-lambda: as RankDPO, but the discounts are those of the policy's own ranking (2402.01878)."""

    function: ClassVar[str] = "mmalign.losses.listwise:lipo"
    kind: Literal["lipo"] = "lipo"


class PRO(Ranked):
    """PRO: each picture against all below it, at a temperature set by their distance, plus SFT (2306.17492)."""

    function: ClassVar[str] = "mmalign.losses.listwise:pro"
    kind: Literal["pro"] = "pro"
    sft: NonNegative = Field(0.05, description="weight of the best picture's own error")


# ---------------------------------------------------------------------------------------------- unpaired
class DiffusionKTO(WithBeta):
    """Diffusion-KTO: likes and dislikes of single pictures, through a utility (2404.04465)."""

    function: ClassVar[str] = "mmalign.losses.unpaired:diffusion_kto"
    looks_around: ClassVar[bool] = True
    items: ClassVar[Literal["pairs", "lists", "singles"]] = "singles"
    needs: ClassVar[tuple[str, ...]] = ("desirable", "weight")
    family: ClassVar[str] = "unpaired"
    kind: Literal["diffusion_kto"] = "diffusion_kto"
    utility: Literal["kahneman_tversky", "loss_averse", "risk_seeking"] = "kahneman_tversky"
    kappa: PositiveFloat = Field(1.0, description="1 in its code, where the reward is beta (E_ref - E)")
    desirable_weight: NonNegative = 1.0
    undesirable_weight: NonNegative = 1.0

    def refuses(self) -> dict[str, str]:
        return super().refuses() | {"winner": NO_BEST}


class BCO(WithBeta):
    """BCO: a binary classifier of likes and dislikes whose logit is the reward less a running shift (2404.04656)."""

    function: ClassVar[str] = "mmalign.losses.unpaired:bco"
    items: ClassVar[Literal["pairs", "lists", "singles"]] = "singles"
    needs: ClassVar[tuple[str, ...]] = ("desirable", "weight")
    family: ClassVar[str] = "unpaired"
    tracked: ClassVar[dict[str, str]] = {name: name for name in ("liked_reward", "disliked_reward", "liked_share")}
    kind: Literal["bco"] = "bco"

    def refuses(self) -> dict[str, str]:
        return super().refuses() | {"winner": NO_BEST, "auto_beta": SHIFTED}


class RewardWeighted(Preference):
    """Reward-weighted regression (Flow-RWR): SFT in which a reward is the weight (2501.13918; 2302.12192)."""

    function: ClassVar[str] = "mmalign.losses.unpaired:reward_weighted"
    items: ClassVar[Literal["pairs", "lists", "singles"]] = "lists"
    needs: ClassVar[tuple[str, ...]] = ("reward", "mask", "weight")
    reference_free: ClassVar[bool] = True
    family: ClassVar[str] = "unpaired"
    kind: Literal["rwr"] = "rwr"
    weighting: Literal["raw", "exponential", "softmax"] = Field(
        "softmax", description="the reward itself (must not be negative), its exponential, or its softmax in the group"
    )
    temperature: PositiveFloat = Field(0.2, description="rewards are divided by it before the exponential")
    max_weight: PositiveFloat = Field(20.0, description="of raw and exponential weights")


class BestOfGroup(Preference):
    """Best-of-group SFT: fine-tune on the best picture of each list alone (flow_grpo's sft)."""

    function: ClassVar[str] = "mmalign.losses.unpaired:best_of_group"
    items: ClassVar[Literal["pairs", "lists", "singles"]] = "lists"
    needs: ClassVar[tuple[str, ...]] = ("reward", "mask", "weight")
    reference_free: ClassVar[bool] = True
    family: ClassVar[str] = "unpaired"
    kind: Literal["best_of_group"] = "best_of_group"


# ------------------------------------------------------------------------------------------- other tasks
class Denoising(Objective):
    """Denoising (SFT): the mean squared error of the model's own parameterisation on captioned images (2006.11239)."""

    task: ClassVar[str] = "sft"
    function: ClassVar[str] = "mmalign.losses.supervised:denoising"
    kind: Literal["denoising"] = "denoising"
    snr_gamma: PositiveFloat | None = Field(
        None, description="min-SNR weighting (2303.09556); 5 is usual, null is uniform"
    )


class Reconstruction(Objective):
    """Reconstruction: L1 + L2 + KL of a variational autoencoder (2112.10752, without the adversarial part)."""

    task: ClassVar[str] = "autoencoder"
    function: ClassVar[str] = "mmalign.losses.supervised:reconstruction"
    parameterisations: ClassVar[tuple[str, ...]] = ("none",)
    kind: Literal["reconstruction"] = "reconstruction"
    l1: float = Field(1.0, ge=0)
    l2: float = Field(2.0, ge=0)
    kl: float = Field(1e-3, ge=0, description="weight of the KL to a unit Gaussian, per latent element")


# fmt: off
PREFERENCES: tuple[type[Preference], ...] = (
    DiffusionDPO, FlowDPO, IPO, Hinge, ConservativeDPO, RobustDPO, FDPO, DSPO, MaPO, DiffusionNPO, JPO, VideoDPO,
    SmPO, MarginDPO, StrengthDPO, RankDPO, PlackettLuce, LiPO, PRO, DiffusionKTO, BCO, RewardWeighted, BestOfGroup,
)
REWARDS: tuple[type[Objective], ...] = (
    Contrastive, HPS, PickScore, BradleyTerry, BTT, BTMargin, ScaledBT, LikelihoodDisplacement, RankingHinge, Triplet,
    GaussianBT, BTRegression, ListwiseCE, MSE, Ordinal,
)
LOSSES: tuple[type[Objective], ...] = (*PREFERENCES, Denoising, Reconstruction, *REWARDS, MLLM)
Loss = Annotated[
    DiffusionDPO | FlowDPO | IPO | Hinge | ConservativeDPO | RobustDPO | FDPO | DSPO | MaPO | DiffusionNPO | JPO
    | VideoDPO | SmPO | MarginDPO | StrengthDPO | RankDPO | PlackettLuce | LiPO | PRO | DiffusionKTO | BCO
    | RewardWeighted | BestOfGroup | Denoising | Reconstruction | Contrastive | HPS | PickScore | BradleyTerry | BTT
    | BTMargin | ScaledBT | LikelihoodDisplacement | RankingHinge | Triplet | GaussianBT | BTRegression | ListwiseCE
    | MSE | Ordinal | MLLM,
    Field(discriminator="kind"),
]
# fmt: on

OPTIONS = {
    "soft_labels": ("degree", "data.soft_labels", "Labels between 0 and 1: shares of votes, weighted dimensions, ties"),
    "dimensions": ("degree", "data.dimensions", "Labels and scores of several dimensions, weighted, ties kept"),
    "ddim_inpo": ("inversion", "noise.kind: ddim_inversion", "DDIM-InPO: noise by DDIM inversion (2503.18454)"),
    "renoise": ("inversion", "noise.kind: renoise", "ReNoise inversion, as SmPO has it (2506.02698)"),
    "auto_beta": ("guard", "guards.auto_beta", "beta that follows the margins to a target mean sigmoid"),
    "anchor": ("guard", "guards.anchor", "Squared distance to the reference's prediction, added to the loss"),
    "velocity": ("guard", "guards.velocity", "Hinge on predictions longer than the reference's, added to the loss"),
    "winner": ("guard", "guards.winner", "The policy's own error on the best picture, added to the loss"),
    "early_stopping": ("guard", "guards.early_stopping", "Ends when a held-out reward stops rising, keeps the best"),
    "drop_saturated": ("guard", "guards.drop_saturated", "Pairs that are decided already weigh nothing"),
}
"""Methods that are no objective of their own: name -> family, the setting that turns them on, summary."""
