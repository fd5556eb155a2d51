"""The settings of objectives on answers: what counts of an answer, the terms that are summed up, margins, guidance.

A new term is a pure function in `mmalign/losses/answer_terms.py`, a class here and its name in `TERMS`; the task calls
it with sequence scores, beta and every setting of its own. Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.objective import NonNegative, Objective

FlipRate = Annotated[float, Field(ge=0, lt=0.5)]


class Part(Strict):
    """What terms, transforms and scalings have in common: a pure function and the settings that it takes."""

    function: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    """What has to be measured: reference, changed, blind, kl, safer, margin, drift, guided."""

    def own(self) -> dict[str, Any]:
        """The settings that the function takes."""
        return {name: value for name, value in self if name not in ("kind", "weight")}


# ------------------------------------------------------------------------------------------------- which tokens count
class Plain(Part):
    """Every token of the answer counts once."""

    function: ClassVar[str] = "mmalign.losses.answer_tokens:plain"
    kind: Literal["plain"] = "plain"


class Mean(Part):
    """The mean over the answer's tokens."""

    function: ClassVar[str] = "mmalign.losses.answer_tokens:mean"
    kind: Literal["mean"] = "mean"


class Segments(Part):
    """RLHF-V's dense scoring: corrected segments count gamma times (2312.00849)."""

    function: ClassVar[str] = "mmalign.losses.answer_tokens:segments"
    needs: ClassVar[frozenset[str]] = frozenset({"changed"})
    kind: Literal["segments"] = "segments"
    gamma: PositiveFloat = Field(5.0, description="5 in the paper with beta 0.5; 1.1 in the released recipe with 0.1")
    normalise: bool = Field(True, description="by the weighted length, as in the paper; false: a sum, as released")
    min_block: PositiveInt = Field(3, description="shorter runs of common tokens count as changed; without spans")
    both_sides: bool = Field(
        False, description="only spans in which both answers have tokens, as released: not what one of them adds"
    )

    def own(self) -> dict[str, Any]:
        return {"gamma": self.gamma, "normalise": self.normalise}


class ChangedOnly(Part):
    """VL-RLHF's dense DPO: tokens that both answers share count nothing."""

    function: ClassVar[str] = "mmalign.losses.answer_tokens:changed_only"
    needs: ClassVar[frozenset[str]] = frozenset({"changed"})
    kind: Literal["changed_only"] = "changed_only"
    min_block: PositiveInt = Field(3, description="shorter runs of common tokens count as changed; without spans")
    both_sides: bool = False

    def own(self) -> dict[str, Any]:
        return {}


class LD(Part):
    """LD-DPO: tokens beyond the shorter answer's length count alpha (2409.06411)."""

    function: ClassVar[str] = "mmalign.losses.answer_tokens:ld"
    kind: Literal["ld"] = "ld"
    alpha: float = Field(0.5, ge=0, le=1, description="1 is DPO")


Tokens = Annotated[Plain | Mean | Segments | ChangedOnly | LD, Field(discriminator="kind")]


# ---------------------------------------------------------------------------------------------------------- the terms
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
    AOTUnpaired, ORPO, SimPO, SFT, KTO, ImageDPO, Anchor, CHiP, SafeDPO,
)  # fmt: skip
AnyTerm = Annotated[
    DPO | Conservative | Robust | Hinge | IPO | DPONorm | FDPO | JPO | BCOPair | SPPO | NCA | EXO | APOZero | APODown
    | DiscoPOP | AOT | AOTUnpaired | ORPO | SimPO | SFT | KTO | ImageDPO | Anchor | CHiP | SafeDPO,
    Field(discriminator="kind"),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ what acts on them all
class Margin(Strict):
    """MM-RLHF's dynamic reward scaling: a clearer preference pulls harder (2502.10391)."""

    kind: Literal["reward", "released"] = Field(
        "reward", description="reward: the paper's, by the rows' margin; released: the batch's own mean instead"
    )
    scale: NonNegative = Field(0.5, description="w: the largest relative increase of beta; 0 is plain")
    rate: PositiveFloat = Field(0.5, description="k: how fast it comes with the margin")


class Guidance(Strict):
    """V-DPO: the policy's answers under visual guidance, away from what a negative image gives (2411.02712)."""

    guidance: float = Field(1.5, ge=1, description="g in g z - (g - 1) z_negative; 1 is none")
    space: Literal["logits", "log_probs"] = "logits"


class MLLM(Objective):
    """Answers of a vision-language model: one term or several, of sequence scores under policy and reference."""

    task: ClassVar[str] = "mllm"
    function: ClassVar[str] = "mmalign.losses.answers:combine"
    parameterisations: ClassVar[tuple[str, ...]] = ("none",)
    kind: Literal["mllm"] = "mllm"
    beta: PositiveFloat = Field(
        0.1, description="strength of the pull to the reference; 0.1 is usual, 0.5 for RLHF-V, 2 for SimPO"
    )
    tokens: Tokens = Plain()
    terms: tuple[AnyTerm, ...] = Field((DPO(),), min_length=1, description="summed with their weights")
    margin: Margin | None = Field(None, description="beta by each row's margin")
    visual_guidance: Guidance | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What has to be measured for these settings."""
        found = self.tokens.needs.union(*(term.needs for term in self.terms))
        found |= {"margin"} if self.margin and self.margin.kind == "reward" else set()
        found |= {"guided", "reference"} if self.visual_guidance else set()
        return found

    @property
    def reference_free(self) -> bool:
        return "reference" not in self.needs

    @property
    def items(self) -> Literal["pairs", "singles"]:
        """Rows of two answers, or of one: singles where every term takes them, and labels or cross-entropy alone."""
        return "singles" if all(term.singles for term in self.terms) else "pairs"

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        kinds = [term.kind for term in self.terms]
        twice = next((kind for kind in kinds if kinds.count(kind) > 1), None)
        if twice:
            raise ValueError(f"loss.terms: {twice} is there twice; add up their weights")
        if not any(term.weight for term in self.terms):
            raise ValueError("loss.terms: every weight is 0, so nothing would be trained")
        if self.items == "singles" and self.tokens.kind not in ("plain", "mean"):
            raise ValueError(
                f"loss.tokens: {self.tokens.kind} compares two answers, and these terms take one; use plain"
            )
        normed = {"ipo", "dpo_norm", "orpo", "simpo"} & set(kinds)
        if normed and (self.tokens.kind == "mean" or (self.tokens.kind == "segments" and self.tokens.normalise)):
            raise ValueError(
                f"loss.terms: {sorted(normed)[0]} divides by the length itself, and loss.tokens: {self.tokens.kind} "
                "does so already; use tokens: plain, or another term"
            )
        if self.visual_guidance and ("blind" in self.needs):
            raise ValueError(
                "loss.visual_guidance guides by the negative image, which another term compares with; drop one"
            )
        return self


# fmt: off
PRESETS = {
    "mpo": ("DPO, BCO and SFT (InternVL's MPO, 2411.10442): weights 0.8, 0.2, 1",
            "dpo 0.8 + bco_pair 0.2 + sft 1"),
    "rlhf_v": ("RLHF-V, dense DPO on corrected segments (2312.00849)", "dpo, tokens: segments, beta 0.5"),
    "mdpo": ("mDPO: answers, images and an anchor (2406.11839)", "dpo + image_dpo + anchor"),
    "mm_rlhf": ("MM-DPO: beta by the reward margin (2502.10391)", "dpo, margin"),
    "v_dpo": ("V-DPO: visual guidance on the policy (2411.02712)", "dpo, visual_guidance"),
}
"""Named methods that are a combination: name -> (summary, the settings); configs/train/mllm has each."""
# fmt: on


def described() -> list[dict[str, Any]]:
    """Rows for `mmalign list methods`: terms, token transforms and presets."""
    rows: list[dict[str, Any]] = []
    for kinds, setting in ((TERMS, "loss.terms"), ((Segments, ChangedOnly, LD, Mean), "loss.tokens")):
        for part in kinds:
            kind, summary = part.model_fields["kind"].default, (part.__doc__ or "").splitlines()[0]
            rows.append({"name": f"mllm/{kind}", "summary": summary, "setting": f"{setting}: {kind}"})
    rows += [{"name": f"mllm/{name}", "summary": told, "setting": how} for name, (told, how) in PRESETS.items()]
    return rows
