"""The settings of objectives on answers: what counts of an answer, the terms that are summed up, margins, guidance.

Terms are in `mmalign.methods_mllm_terms`. Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.methods_mllm_terms import DPO, TERMS, AnyTerm, Part
from mmalign.objective import NonNegative, Objective


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


class Guided(Part):
    """TGDPO: tokens that a guide rewards count more in chosen answers and less in rejected ones (2506.14574)."""

    function: ClassVar[str] = "mmalign.losses.answer_tokens:guided"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "guide"})
    kind: Literal["guided"] = "guided"
    alpha: NonNegative = Field(0.5, description="weights are 1 + alpha r and 1 - alpha r; 0 is plain")


class Sparse(Part):
    """SparsePO: tokens count as much as a mask of the reference's hidden states says (2410.05102)."""

    function: ClassVar[str] = "mmalign.losses.answer_tokens:sparse"
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "mask"})
    kind: Literal["sparse"] = "sparse"
    mask: Literal["learned", "activation"] = Field(
        "learned",
        description="learned: ReLU of a linear layer that is trained with the policy; activation: their mean over "
        "features, from 0 to 1 within each answer",
    )
    independent: bool = Field(False, description="learned: a mask of its own for the token KL of term tdpo")
    dropout: float = Field(0.01, ge=0, lt=1, description="of learned masks; 0.01 as released")

    def own(self) -> dict[str, Any]:
        return {}


Tokens = Annotated[Plain | Mean | Segments | ChangedOnly | LD | Guided | Sparse, Field(discriminator="kind")]


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
        if {"guide", "contrast"} <= self.needs:
            raise ValueError("loss: tokens: guided and term t_reg both say what tokens are worth; use one of them")
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
    "tgdpo": ("TGDPO: token rewards of a guide (2506.14574)", "dpo, tokens: guided, mllm.guide"),
    "sparse_po": ("SparsePO: token masks on rewards and KL (2410.05102)", "tdpo with alpha 1, tokens: sparse"),
    "v_dpo": ("V-DPO: visual guidance on the policy (2411.02712)", "dpo, visual_guidance"),
}
"""Named methods that are a combination: name -> (summary, the settings); configs/train/mllm has each."""
# fmt: on


def described() -> list[dict[str, Any]]:
    """Rows for `mmalign list methods`: terms, token transforms and presets."""
    rows: list[dict[str, Any]] = []
    for kinds, setting in ((TERMS, "loss.terms"), ((Segments, ChangedOnly, LD, Guided, Sparse, Mean), "loss.tokens")):
        for part in kinds:
            kind, summary = part.model_fields["kind"].default, (part.__doc__ or "").splitlines()[0]
            rows.append({"name": f"mllm/{kind}", "summary": summary, "setting": f"{setting}: {kind}"})
    rows += [{"name": f"mllm/{name}", "summary": told, "setting": how} for name, (told, how) in PRESETS.items()]
    return rows
