"""What fitting a scorer adds to a training job: which parts are trained, the head on them, and how labels are treated.

Parts of `mmalign.jobs.TrainConfig`, in a module of their own for length. The settings of a head are also what an
exported folder's `reward.json` holds, from which the head is built again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from mmalign.config import Strict
from mmalign.jobs_align import Probability
from mmalign.methods_reward import BTMargin, Fitting, Ordinal, ScaledBT
from mmalign.objective import Objective

Widths = tuple[PositiveInt, ...]
TWO_TOWERS = ("open_clip",)
REWARD_FAMILIES = {
    "open_clip": "CLIP in an open_clip folder: two towers; cosine, or any head on their embeddings",
    "image_reward": "ImageReward: a BLIP whose text encoder reads the picture too, with its own head",
    "qwen2_vl": "Qwen2-VL with special tokens at which its own head reads scores, as HPSv3 and VideoReward",
    "latent": "the first blocks of a generator with a head that knows the time, on noisy latents (Flow-NRG's)",
}
"""Families that `task: reward` fits, for `model.family`; auto is open_clip."""


# --------------------------------------------------------------------------------------------------------- heads
class Cosine(Strict):
    """exp(logit_scale) times the cosine of two towers; adds nothing to the network (HPS, PickScore)."""

    kind: Literal["cosine"] = "cosine"


class Own(Strict):
    """The head that the network comes with, as ImageReward's and VideoReward's do."""

    kind: Literal["own"] = "own"


class Linear(Strict):
    """A linear map or an MLP on the features; one output for each of `data.axes`."""

    kind: Literal["linear"] = "linear"
    hidden: Widths = Field((), description="widths of hidden layers; none is a linear map")
    dropout: Probability = 0.0


class Gaussian(Strict):
    """As linear, with a mean and the logarithm of a standard deviation as outputs (HPSv3, 2508.03789)."""

    kind: Literal["gaussian"] = "gaussian"
    hidden: Widths = Field((), description="widths of hidden layers; none is a linear map")
    dropout: Probability = 0.0


class GPM(Strict):
    """General preference model: embeddings whose skew product is the preference; knows cycles (2410.02197)."""

    kind: Literal["gpm"] = "gpm"
    dim: int = Field(6, ge=2, multiple_of=2, description="of the embedding; each two of them hold a cycle")
    tau: PositiveFloat = Field(0.1, description="the skew product of unit embeddings is divided by it; 0.1 in its code")
    gate: bool = Field(True, description="planes weighed by the prompt (needs two towers); else alike")
    hidden: Widths = ()


class PAL(Strict):
    """PAL: each user's ideal point is a mixture of prototypes that all users share (2406.08469)."""

    kind: Literal["pal"] = "pal"
    variant: Literal["A", "B"] = Field(
        "B", description="B: prototypes are functions of the prompt (needs two towers); A: they are points"
    )
    prototypes: int = Field(4, ge=2, description="K; as many as tastes are expected, or more")
    dim: PositiveInt = Field(64, description="of the space in which media and ideal points lie")
    similarity: Literal["angle", "distance"] = Field(
        "angle", description="a learned scale times the cosine, as its code on images; or minus the squared distance"
    )
    hidden: Widths = Field((128,), description="hidden layers of the maps into that space")


class VPL(Strict):
    """VPL: a latent of the user, inferred from labelled pairs, is an input of the reward (2408.10075)."""

    kind: Literal["vpl"] = "vpl"
    latent: PositiveInt = 8
    hidden: PositiveInt = Field(64, description="width of the pair encoder and of the decoder")
    context: PositiveInt = Field(16, description="pairs of the user that the latent is inferred from in training")
    kl: float = Field(0.003, ge=0, description="weight of the divergence to the prior, once it is annealed")
    annealing: int = Field(200, ge=0, description="optimiser steps over which that weight rises from 0")


Head = Annotated[Cosine | Own | Linear | Gaussian | GPM | PAL | VPL, Field(discriminator="kind")]
PERSONAL = ("pal", "vpl")


# ------------------------------------------------------------------------------------------------------------ VLM
PLACE = "{prompt}"
TOKEN = re.compile(r"<\|[^|<>\s]+\|>")


class Vlm(Strict):
    """What a VLM is asked, and how its scores are read, for model.family: qwen2_vl."""

    media: Literal["image", "video"] = Field("image", description="video: clips at two frames per second; stills too")
    tokens: tuple[str, ...] = Field(
        (), description="special tokens at which scores are read, such as <|reward|>; default: one, or one per axis"
    )
    instruction: str | None = Field(
        None,
        description="text behind the picture, with {prompt} and every token once; default: docs/reward_families.md",
    )
    head: Literal["linear", "ranknet"] = Field("linear", description="ranknet: HPSv3's, of three layers")
    shared: bool = Field(
        False, description="several tokens share one output of the head; else each has its own (VideoReward)"
    )
    min_pixels: PositiveInt = Field(56 * 56, description="of a picture or frame; smaller ones are enlarged")
    max_pixels: PositiveInt = Field(256 * 28 * 28, description="of a picture or frame; larger ones are shrunk")
    positions: Literal["sequential", "mrope"] = Field(
        "sequential", description="0, 1, 2, ..., as HPSv3 and VideoReward; mrope: Qwen2-VL's, by time, row and column"
    )
    rope: Literal["float32", "bfloat16"] = Field(
        "float32", description="bfloat16 rounds the rotary frequencies, as the published rewards were trained"
    )

    @model_validator(mode="after")
    def _bounded(self) -> Vlm:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"reward.vlm.min_pixels ({self.min_pixels}) is above max_pixels ({self.max_pixels})")
        wrong = [token for token in self.tokens if not TOKEN.fullmatch(token)]
        if wrong or len(set(self.tokens)) < len(self.tokens):
            raise ValueError(
                f"reward.vlm.tokens: {wrong[0] if wrong else 'one is there twice'}; write them as <|reward|>, each once"
            )
        return self

    def asked(self, axes: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
        """Tokens and instruction, the defaults filled in for these axes.

        Raises:
            ValueError: the instruction lacks the prompt's place or a token, or has one twice or in another order.
        """
        tokens = self.tokens or tuple(f"<|{re.sub(r'[^0-9A-Za-z]+', '_', axis)}_reward|>" for axis in axes)
        tokens = tokens or ("<|reward|>",)
        what = "picture" if self.media == "image" else "video"
        names = axes if len(axes) == len(tokens) else ("overall",) * len(tokens)
        asked = "".join(f"\n{name}: {token}" for name, token in zip(names, tokens, strict=True))
        text = self.instruction
        if text is None:
            text = f'Rate this {what}. It was made for the prompt "{PLACE}".{asked}'
        places = [text.find(token) for token in tokens]
        problems = [f"{name} {text.count(name)} times" for name in (PLACE, *tokens) if text.count(name) != 1]
        if problems or places != sorted(places):
            wrong = ", ".join(problems) or f"{', '.join(tokens)} in another order"
            raise ValueError(f"reward.vlm.instruction has {wrong}; it needs {{prompt}} and every token once, in order")
        return tokens, text


# --------------------------------------------------------------------------------------------------------- latents
class Latent(Strict):
    """A reward on noisy latents, for model.family: latent, whose model.path is a generator's folder."""

    blocks: PositiveInt = Field(
        4,
        description="K, how many of the denoiser's first blocks; of a UNet down blocks, and the middle one after them",
    )
    pooling: Literal["mean", "attention"] = Field("mean", description="of tokens; attention: with a query per axis")
    hidden: Widths = Field((256,), description="widths of the head's hidden layers")
    dropout: Probability = 0.0
    noised: bool = Field(
        True, description="false: on clean latents alone, which guidance then meets as something that it has never seen"
    )
    noise: Literal["independent", "shared"] = Field(
        "independent", description="noise of a pair's latents; their time is always the same (docs/guidance/nrg.md)"
    )


# -------------------------------------------------------------------------------------------------------- labels
class Fold(Strict):
    """A part of the prompts that is left out, so that this model can judge it unseen."""

    of: int = Field(5, ge=2, description="how many parts; a prompt's part is a hash of its text")
    left_out: int = Field(0, ge=0, description="which one this run does not see, from 0")

    @model_validator(mode="after")
    def _one_of_them(self) -> Fold:
        if self.left_out >= self.of:
            raise ValueError(f"reward.fold.left_out is {self.left_out}, and parts are counted from 0 to {self.of - 1}")
        return self


def score_names(axes: Sequence[str], graded: bool) -> list[str]:
    """What a scorer's scores are called: `score`, or of several axes `overall`, their mean, and each; ratings too.

    Args:
        graded: whether it was fitted to grades (loss.kind: ordinal), and so gives expected ones.
    """
    names = ["overall", *axes] if len(axes) > 1 else ["score"]
    ratings = ["rating", *(f"{axis}_rating" for axis in axes)] if len(axes) > 1 else ["rating"]
    return names + (ratings if graded else [])


class Denoise(Strict):
    """Labels treated by how strongly an ensemble of fitted scorers prefers their winner (2401.06080)."""

    ensemble: tuple[Path, ...] = Field(
        min_length=1, description="folders of fitted scorers: export/ of runs with other seeds or folds"
    )
    mode: Literal["flip", "drop", "soft", "weight", "margin"] = Field(
        "flip",
        description="of the `share` of pairs with the weakest preferences, as far as these contradict the label: flip "
        "their labels, or drop them; of all pairs: sigmoid of the strength as label or as weight, or the strength as "
        "margin (loss.kind: bt_margin); ties stay as they are",
    )
    share: Probability = Field(0.1, description="of all decided pairs, for flip and drop")
    unseen: bool = Field(
        True, description="a scorer with a fold judges only what it has not seen; those without judge everything"
    )


class Reward(Strict):
    """What is fitted, for task: reward."""

    train: Literal["all", "head"] = Field(
        "all",
        description="head: towers are frozen, and what they say of every picture and prompt is computed once (not of "
        "noisy latents, which are drawn anew)",
    )
    unlocked_image: int | None = Field(
        None,
        ge=0,
        description="train only the last groups of the image tower (HPS v2: 20; ImageReward: 8 of 24 layers; of "
        "qwen2_vl the merger is the last group); null: all of it",
    )
    unlocked_text: int | None = Field(
        None,
        ge=0,
        description="train only the last layers of the text tower (HPS v2: 11; ImageReward: 4 of 12); null: all of it",
    )
    head: Head | None = Field(None, description="null: the cosine of two towers, or the network's own")
    resize: Literal["pad", "crop"] = Field(
        "pad", description="pad: HPS's; crop: short side and centre, CLIP's, PickScore's and ImageReward's"
    )
    antialias: bool = Field(
        False, description="filter when padding shrinks; HPS's authors did not (docs/scorers/hps.md). crop always does"
    )
    vlm: Vlm = Vlm()
    latent: Latent = Latent()
    swap: Probability = Field(0.0, description="probability that a pair's media change places, and its label with them")
    fold: Fold | None = None
    denoise: Denoise | None = None


def check(
    reward: Reward, loss: Objective, axes: tuple[str, ...], family: str, lora: bool = False, *, ties: str = "drop",
    across: bool = False,
) -> None:  # fmt: skip
    """ValueError for a head, objective, family and labels that do not go together; each message names a way out.

    Args:
        axes, ties: of the data.
        across: whether pairs are of different prompts.
    """
    head = reward.head or (Cosine() if family in TWO_TOWERS else Own())
    towers = family in TWO_TOWERS
    partly = reward.unlocked_image is not None or reward.unlocked_text is not None
    names = score_names(axes, isinstance(loss, Ordinal))
    taken = ", ".join(axis for axis in dict.fromkeys(axes) if names.count(axis) > 1)
    problems = _of_family(reward, head.kind, loss, axes, family, lora)
    problems += [
        (head.kind == "own" and towers, "reward.head: own is for networks with a head; use cosine"),
        (
            head.kind in ("cosine", "own") and reward.train == "head" and family != "latent",
            "reward.train: head needs a head; use linear",
        ),
        (reward.train == "head" and partly, "reward.train: head freezes both towers; drop unlocked_image and _text"),
        (head.kind == "vpl" and reward.train != "head", "reward.head: vpl needs frozen towers; set reward.train: head"),
        (isinstance(head, GPM) and head.gate and not towers, "reward.head.gate needs two towers; set it to false"),
        (isinstance(head, PAL) and head.variant == "B" and not towers, "reward.head.variant B needs two towers; use A"),
        (
            bool(axes) and head.kind not in ("linear", "own"),
            "data.axes needs reward.head: linear, or the network's own",
        ),
        (bool(taken), f"data.axes: {taken} is what another score of this scorer is called; give the axis another name"),
    ]
    if isinstance(loss, Fitting):
        problems += _of_loss(reward, head.kind, loss, towers, bool(axes))
    else:
        problems += [
            (head.kind != "cosine" or reward.train == "head", "loss.kind: contrastive trains two towers"),
            (reward.swap > 0, "reward.swap is for pairs, and loss.kind contrastive takes captioned pictures; drop it"),
            (reward.denoise is not None, "reward.denoise is for labels of pairs, and loss.kind contrastive has none; "
             "drop it"),
        ]  # fmt: skip
    alone = isinstance(head, GPM) and head.gate
    of_one = isinstance(loss, Fitting) and (loss.towers or loss.anchor > 0)
    problems += [
        (reward.denoise is not None and ties == "half", "reward.denoise would take sides on ties that data.ties: half "
         "writes as two opposite verdicts; use ties: soft or drop"),
        (across and (alone or of_one), "data.pairing: across compares media of two prompts, and "
         f"{'reward.head.gate' if alone else 'this objective'} looks at one; use pairing: within, or "
         f"{'gate: false' if alone else 'bradley_terry without an anchor'}"),
    ]  # fmt: skip
    for wrong, message in problems:
        if wrong:
            raise ValueError(message)


def _of_family(
    reward: Reward, head: str, loss: Objective, axes: tuple[str, ...], family: str, lora: bool
) -> list[tuple[bool, str]]:
    spread = isinstance(loss, Fitting) and loss.spread
    prepared = reward.resize != "pad" or reward.antialias
    problems = [
        (family not in TWO_TOWERS and head != "own", f"{family} has a head of its own; drop reward.head, or put "
         f"{head} on an open_clip folder"),
        (family not in TWO_TOWERS and prepared, f"{family} has its own pixels; drop reward.resize and antialias"),
        (family != "qwen2_vl" and reward.vlm != Vlm(), f"reward.vlm is for model.family: qwen2_vl, not {family}"),
        (family != "latent" and reward.latent != Latent(), f"reward.latent is for model.family: latent, not {family}"),
        (family not in ("qwen2_vl", "latent") and lora, f"lora is not for {family} under task reward; drop it, or use "
         "reward.unlocked_image"),
        (lora and reward.unlocked_text is not None, "lora trains adapters in the language model, whose own layers stay "
         "as they are; drop reward.unlocked_text"),
        (family == "image_reward" and (spread or bool(axes)), "image_reward gives one number; drop data.axes and use "
         "another loss.kind than gaussian_bt, or use model.family: qwen2_vl"),
    ]  # fmt: skip
    if family == "latent":
        partly = reward.unlocked_image is not None or reward.unlocked_text is not None
        problems += [
            (partly, "reward.unlocked_image and _text are for towers; a generator's blocks are trained whole (train: "
             "all), by lora, or not at all (train: head)"),
            (lora and reward.train == "head", "lora trains adapters in the blocks, and reward.train: head freezes "
             "them; drop one"),
            (spread and len(axes) > 1, "loss.kind gaussian_bt has one score with its spread; drop data.axes"),
            (reward.denoise is not None, "reward.denoise asks scorers of pictures, and is not built for latents; "
             "drop it"),
        ]  # fmt: skip
    if family == "qwen2_vl":
        count = len(reward.vlm.asked(axes)[0])
        problems += [
            (count > 1 and count != len(axes), f"reward.vlm.tokens: {count} tokens and {len(axes)} of data.axes; give "
             "one token per axis, or one token"),
            (spread and (count > 1 or bool(axes)), "loss.kind gaussian_bt has one score with its spread; drop "
             "data.axes, and all tokens but one"),
            (count == 1 and reward.vlm.shared, "reward.vlm.shared is for several tokens; drop it"),
        ]  # fmt: skip
    return problems


def _of_loss(reward: Reward, head: str, loss: Fitting, towers: bool, axes: bool) -> list[tuple[bool, str]]:
    kind, pairs, swaps = type(loss).model_fields["kind"].default, loss.items == "pairs", reward.swap > 0
    frozen, denoise = reward.train == "head", reward.denoise
    margin = denoise is not None and denoise.mode == "margin"
    by_gap = isinstance(loss, ScaledBT) or (isinstance(loss, BTMargin) and loss.by_gap)
    return [
        (loss.spread and head not in ("gaussian", "own"), f"loss.kind {kind} needs a spread: use reward.head: "
         "gaussian"),
        (head == "gaussian" and not loss.spread, "reward.head: gaussian needs loss.kind: gaussian_bt, or its spread is "
         "never fitted"),
        (head == "gpm" and not (pairs and loss.differences), f"reward.head: gpm has preferences and no scores, which "
         f"loss.kind {kind} needs; use bradley_terry"),
        (head == "vpl" and not pairs, f"reward.head: vpl is inferred from pairs, and loss.kind {kind} takes lists"),
        (loss.towers and (head != "cosine" or frozen), f"loss.kind {kind} is on the embeddings of two towers; use "
         "reward.head: cosine and train: all"),
        (loss.anchor > 0 and (not towers or frozen or not pairs), "loss.anchor keeps two towers together that are "
         "trained on pairs; drop it"),
        (axes and loss.towers, f"loss.kind {kind} has one score; drop data.axes"),
        (axes and by_gap, f"loss.kind {kind} goes by one gap in rewards, and axes have one each; drop data.axes, or "
         "use bradley_terry"),
        (swaps and not pairs, f"reward.swap is for pairs, and loss.kind {kind} takes lists; drop it"),
        (denoise is not None and (not pairs or axes), "reward.denoise is for pairs with one label; drop it"),
        (margin and kind != "bt_margin", "reward.denoise.mode: margin needs loss.kind: bt_margin"),
    ]  # fmt: skip
