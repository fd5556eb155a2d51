"""The terms that an objective on answers sums up: the settings of each, and the pure function that it names.

A new term is a function in `mmalign/losses/answer_terms.py`, a class here and its name in `TERMS`; the task calls it
with sequence scores, beta and every setting of its own. Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from mmalign.config import Strict
from mmalign.objective import NonNegative

FlipRate = Annotated[float, Field(ge=0, lt=0.5)]


class Part(Strict):
    """What terms, transforms and scalings have in common: a pure function and the settings that it takes."""

    function: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """What has to be measured: reference, changed, blind, kl, safer, margin, drift, guided, guide, contrast, mask."""

    def own(self) -> dict[str, Any]:
        """The settings that the function takes."""
        return {name: value for name, value in self if name not in ("kind", "weight")}


class Term(Part):
    """One summand of the loss."""

    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    singles: ClassVar[bool] = False  # whether it is also for rows of one answer
    looks_around: ClassVar[bool] = False  # whether a row's loss depends on the others of its micro-batch
    weight: NonNegative = Field(1.0, description="factor of this term in the loss")


_TERMS = "mmalign.losses.answer_terms:"


class DPO(Term):
    """DPO: the chosen answer's log-ratio above the rejected one's (2305.18290); TRL's sigmoid."""

    function: ClassVar[str] = _TERMS + "dpo"
    kind: Literal["dpo"] = "dpo"


class Conservative(Term):
    """cDPO: labels smoothed, since a share of them may be wrong (Mitchell 2023)."""

    function: ClassVar[str] = _TERMS + "conservative"
    kind: Literal["conservative"] = "conservative"
    flip_rate: FlipRate = 0.1


class Robust(Term):
    """Robust DPO: unbiased when a share of the labels is flipped (2403.00409)."""

    function: ClassVar[str] = _TERMS + "robust"
    kind: Literal["robust"] = "robust"
    flip_rate: FlipRate = 0.1


class Hinge(Term):
    """Hinge: no more pull once the margin is there (SLiC, 2305.10425)."""

    function: ClassVar[str] = _TERMS + "hinge"
    kind: Literal["hinge"] = "hinge"


class IPO(Term):
    """IPO: a margin of 1 / (2 beta) instead of an endless one, per token (2310.12036)."""

    function: ClassVar[str] = _TERMS + "ipo"
    kind: Literal["ipo"] = "ipo"
    average: bool = Field(True, description="per token, as TRL and the authors; false: of the whole answer")


class DPONorm(Term):
    """Length-normalised DPO: log-ratios per token (2411.15124); TRL's sigmoid_norm."""

    function: ClassVar[str] = _TERMS + "dpo_norm"
    kind: Literal["dpo_norm"] = "dpo_norm"


class FDPO(Term):
    """f-divergence DPO: another divergence from the reference than reverse KL (2309.16240)."""

    function: ClassVar[str] = _TERMS + "f_dpo"
    kind: Literal["f_dpo"] = "f_dpo"
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "js"
    alpha: float = Field(0.5, ge=0, le=1, description="of alpha: 1 is reverse KL, 0 forward KL, as in TRL")


class JPO(Term):
    """JPO: preferences over (prompt, answer) pairs with different prompts, those of the batch (2404.00530)."""

    function: ClassVar[str] = _TERMS + "jpo"
    looks_around: ClassVar[bool] = True
    kind: Literal["jpo"] = "jpo"


class BCOPair(Term):
    """BCO on pairs: chosen and rejected classified by their own log-ratios (2404.04656)."""

    function: ClassVar[str] = _TERMS + "bco_pair"
    kind: Literal["bco_pair"] = "bco_pair"
    running_shift: bool = Field(False, description="less a running mean of rewards; TRL 1.16 has none")

    def own(self) -> dict[str, Any]:
        return {}


class SPPO(Term):
    """SPPO: log-ratios of +-1 / (2 beta) (2405.00675)."""

    function: ClassVar[str] = _TERMS + "sppo_hard"
    kind: Literal["sppo_hard"] = "sppo_hard"


class NCA(Term):
    """NCA: the chosen answer against noise, so that its likelihood does not sink (2402.05369)."""

    function: ClassVar[str] = _TERMS + "nca_pair"
    kind: Literal["nca_pair"] = "nca_pair"


class EXO(Term):
    """EXO: reverse KL to the smoothed label (2402.00856)."""

    function: ClassVar[str] = _TERMS + "exo_pair"
    kind: Literal["exo_pair"] = "exo_pair"
    flip_rate: float = Field(1e-3, gt=0, lt=0.5, description="the label's smoothing; 0 would be an endless loss")


class APOZero(Term):
    """APO-zero: chosen up, rejected down; for answers better than the model's own (2408.06266)."""

    function: ClassVar[str] = _TERMS + "apo_zero"
    kind: Literal["apo_zero"] = "apo_zero"


class APODown(Term):
    """APO-down: both down, rejected more; for answers worse than the model's own (2408.06266)."""

    function: ClassVar[str] = _TERMS + "apo_down"
    kind: Literal["apo_down"] = "apo_down"


class DiscoPOP(Term):
    """DiscoPOP: a blend of logistic and exponential loss that a language model found (2406.08414)."""

    function: ClassVar[str] = _TERMS + "discopop"
    kind: Literal["discopop"] = "discopop"
    tau: PositiveFloat = 0.05


class AOT(Term):
    """AOT: differences of policy and reference, each sorted over the batch (2406.05882)."""

    function: ClassVar[str] = _TERMS + "aot"
    looks_around: ClassVar[bool] = True
    kind: Literal["aot"] = "aot"
    flip_rate: FlipRate = 0.0


class AOTUnpaired(Term):
    """AOT unpaired: log-ratios of chosen and of rejected, each sorted over the batch (2406.05882)."""

    function: ClassVar[str] = _TERMS + "aot_unpaired"
    looks_around: ClassVar[bool] = True
    kind: Literal["aot_unpaired"] = "aot_unpaired"
    flip_rate: FlipRate = 0.0


class ORPO(Term):
    """ORPO: cross-entropy and the log of an odds ratio, without a reference; beta weighs it (2403.07691)."""

    function: ClassVar[str] = _TERMS + "orpo"
    needs: ClassVar[frozenset[str]] = frozenset()
    kind: Literal["orpo"] = "orpo"


class SimPO(Term):
    """SimPO: mean log-probabilities with a target margin, without a reference; beta is about 2 (2405.14734)."""

    function: ClassVar[str] = _TERMS + "simpo"
    needs: ClassVar[frozenset[str]] = frozenset()
    kind: Literal["simpo"] = "simpo"
    gamma: NonNegative = Field(0.5, description="the target margin, after beta")


class SFT(Term):
    """SFT: cross-entropy of the chosen answer, per token of the batch; no reference."""

    function: ClassVar[str] = _TERMS + "sft"
    needs: ClassVar[frozenset[str]] = frozenset()
    singles: ClassVar[bool] = True
    looks_around: ClassVar[bool] = True
    kind: Literal["sft"] = "sft"


class KTO(Term):
    """KTO: good and bad answers by themselves, against the policy's drift on other prompts (2402.01306)."""

    function: ClassVar[str] = _TERMS + "kto"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "drift"})
    singles: ClassVar[bool] = True
    looks_around: ClassVar[bool] = True
    kind: Literal["kto"] = "kto"
    desirable_weight: NonNegative = 1.0
    undesirable_weight: NonNegative = 1.0


class ImageDPO(Term):
    """mDPO's conditional preference: the chosen answer under its image and under a negative one (2406.11839)."""

    function: ClassVar[str] = _TERMS + "image_dpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "blind"})
    kind: Literal["image_dpo"] = "image_dpo"


class Anchor(Term):
    """mDPO's anchor: the chosen answer's log-ratio stays above delta / beta (2406.11839)."""

    function: ClassVar[str] = _TERMS + "anchor"
    kind: Literal["anchor"] = "anchor"
    delta: float = Field(0.0, description="0 in the released code")


class CHiP(Term):
    """CHiP: responses, images and tokens in one log sigmoid (2501.16629); with tokens: segments as released."""

    function: ClassVar[str] = _TERMS + "chip"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "blind", "kl"})
    kind: Literal["chip"] = "chip"
    token_beta: NonNegative = Field(0.1, description="of the difference of token KLs; 0.1 as released")


class TDPO(Term):
    """TDPO: DPO with the difference of the answers' token KLs (2404.11999)."""

    function: ClassVar[str] = _TERMS + "tdpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "kl"})
    kind: Literal["tdpo"] = "tdpo"
    alpha: NonNegative = Field(0.5, description="of the difference; 0.5 in the paper, 1 for TDPO1 and SparsePO")
    both: bool = Field(False, description="gradients through the chosen answer's KL too: TDPO1 and SparsePO")


class TReg(Term):
    """T-REG: tokens that the reference would say when asked for a better answer, up; others down (2412.02685)."""

    function: ClassVar[str] = _TERMS + "t_reg"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "contrast"})
    kind: Literal["t_reg"] = "t_reg"
    weight: NonNegative = Field(0.25, description="alpha of the paper, which tries 0.1, 0.25 and 0.5")
    better: str = Field(
        "Answer as well as you can: helpful, correct, coherent, concise, and true to what is shown.",
        min_length=1, description="put behind the question",
    )  # fmt: skip
    worse: str = Field(
        "Answer as badly as you can: unhelpful, wrong, incoherent, long-winded, and untrue to what is shown.",
        min_length=1,
    )  # fmt: skip

    def own(self) -> dict[str, Any]:
        return {}


class SafeDPO(Term):
    """Helpful and safe labels with a Lagrange multiplier: Safe RLHF-V's Lagrangian on preferences (2503.17682)."""

    function: ClassVar[str] = _TERMS + "safe_dpo"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "safer"})
    kind: Literal["safe_dpo"] = "safe_dpo"
    budget: float = Field(0.05, ge=0, lt=1, description="share of pairs whose unsafe answer the policy may prefer")
    rate: NonNegative = Field(0.1, description="of the dual ascent on the multiplier's logarithm; 0 keeps it")
    initial: PositiveFloat = Field(1.0, description="the multiplier at the start")

    def own(self) -> dict[str, Any]:
        return {}


TERMS: tuple[type[Term], ...] = (
    DPO, Conservative, Robust, Hinge, IPO, DPONorm, FDPO, JPO, BCOPair, SPPO, NCA, EXO, APOZero, APODown, DiscoPOP, AOT,
    AOTUnpaired, ORPO, SimPO, SFT, KTO, ImageDPO, Anchor, CHiP, TDPO, TReg, SafeDPO,
)  # fmt: skip
AnyTerm = Annotated[
    DPO | Conservative | Robust | Hinge | IPO | DPONorm | FDPO | JPO | BCOPair | SPPO | NCA | EXO | APOZero | APODown
    | DiscoPOP | AOT | AOTUnpaired | ORPO | SimPO | SFT | KTO | ImageDPO | Anchor | CHiP | TDPO | TReg | SafeDPO,
    Field(discriminator="kind"),
]  # fmt: skip
