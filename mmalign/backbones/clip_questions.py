"""Yes/no questions about a clip: how they are asked together, and what their answers make of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor

from mmalign.backbones.vlm import Media, VisionLanguageModel
from mmalign.backbones.vlm_text import fill
from mmalign.backbones.vlm_yes_no import YesNoParams, alive, margins
from mmalign.evaluation import Batch, Scores, score_ready

__all__ = [
    "Asked",
    "ClipQuestion",
    "Combine",
    "QuestionParams",
    "Shown",
    "answer_clips",
    "combined",
    "part_of",
    "scores_of",
]

Shown = Literal["all", "first_half", "second_half", "first", "last"]
Combine = Literal["mean", "all", "chain", "condition"]


class QuestionParams(YesNoParams):
    """The model, and how questions are asked and added up.

    Attributes:
        template: what the model is asked; ``{question}`` is replaced, and ``{prompt}`` in questions.
        answers: ``exact``: 1 where the answer is the expected one, yes being the answer where it is likelier than no;
            ``soft``: the probability of the expected one, of yes and no together. Either way a question hangs on an
            answer, and a condition holds, where it is the expected one.
        combine: ``mean``: weighted by the questions' weights; ``all``: the product, so 1 where all answers are right;
            ``chain``: the share of right answers before the first wrong one; ``condition``: the first of several
            questions says whether the clip can be judged, and the others count as with ``all``.
        shown: for questions that come without it, which part of the clip the first, the second, ... is asked of; all
            of it where nothing is said.
    """

    template: str = "{question} Answer yes or no."
    answers: Literal["exact", "soft"] = "exact"
    combine: Combine = "mean"
    shown: tuple[Shown, ...] = ()

    @field_validator("template")
    @classmethod
    def _place(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError("needs {question}")
        return value


@dataclass(frozen=True)
class ClipQuestion:
    """One question.

    Attributes:
        name: by which others depend on it.
        text: as it is put to a model, before the template; ``{prompt}`` is replaced.
        parents: names of the questions without whose expected answers this one counts 0.
        expected: whether yes is the right answer.
        weight: in the mean; above 0.
        dimension: sub-score that it belongs to besides the score; empty for none.
        shown: the part of the clip that it is asked of.
    """

    name: str
    text: str
    parents: tuple[str, ...] = ()
    expected: bool = True
    weight: float = 1.0
    dimension: str = ""
    shown: Shown = "all"


@dataclass(frozen=True)
class Asked:
    """The questions about one clip, and how they count.

    Attributes:
        questions: in order.
        combine: mean, all or chain.
        gate: what the first of them is: ``none``, a question like the others; ``error``, a condition without which the
            clip has no score; ``share``, one without which the score is 1 / (number of the others), as VBench-2.0's
            Composition has it.
    """

    questions: tuple[ClipQuestion, ...]
    combine: Literal["mean", "all", "chain"] = "mean"
    gate: Literal["none", "error", "share"] = "none"

    @staticmethod
    def of(questions: Sequence[ClipQuestion], combine: Combine) -> Asked:
        """As the parameter ``combine`` has it; a condition needs a question besides itself."""
        if combine != "condition":
            return Asked(tuple(questions), combine)
        return Asked(tuple(questions), "all", "error" if len(questions) > 1 else "none")


# ------------------------------------------------------------------------------------------------------- arithmetic


def combined(values: Tensor, weights: Tensor, how: Literal["mean", "all", "chain"]) -> float:
    """Values float64 [questions] in [0, 1] as one: weighted mean, product, or mean of the running products."""
    if how == "mean":
        return float((values * weights).sum() / weights.sum())
    return float(values.prod() if how == "all" else values.cumprod(0).mean())


def scores_of(asked: Asked, ahead: Tensor, soft: bool) -> dict[str, float]:
    """A clip's ``score`` and its dimensions from ``log p(yes) - log p(no)`` [questions].

    Raises:
        ValueError: the clip fails the condition.
    """
    names = [one.name for one in asked.questions]
    yes = [float(margin) > 0 for margin in ahead]  # as likely as no is no
    passed = {one.name: said == one.expected for one, said in zip(asked.questions, yes, strict=True)}
    counted = alive(passed, {one.name: one.parents for one in asked.questions})
    if soft:
        wanted = torch.tensor([1.0 if one.expected else -1.0 for one in asked.questions], dtype=torch.float64)
        values = (ahead.double() * wanted).sigmoid()
    else:
        values = torch.tensor([float(passed[name]) for name in names], dtype=torch.float64)
    values = values * torch.tensor([float(counted[name]) for name in names], dtype=torch.float64)
    first = asked.questions[0]
    rest = 0 if asked.gate == "none" else 1
    if rest and not passed[first.name]:
        if asked.gate == "error":
            said = "no" if first.expected else "yes"
            raise ValueError(f"The clip fails the condition '{first.text}' (answered with {said}), so it has no score.")
        return {"score": 1 / (len(names) - 1)}
    weights = torch.tensor([one.weight for one in asked.questions], dtype=torch.float64)
    found = {"score": combined(values[rest:], weights[rest:], asked.combine)}
    for dimension in dict.fromkeys(one.dimension for one in asked.questions if one.dimension):
        places = [place for place, one in enumerate(asked.questions) if one.dimension == dimension]
        found[dimension] = combined(values[places], weights[places], asked.combine)
    return found


def part_of(clip: Tensor, shown: Shown) -> Tensor:
    """Part of a clip [T, 3, H, W]; halves have T / 2 frames, rounded up."""
    half = (len(clip) + 1) // 2
    return {
        "all": clip, "first_half": clip[:half], "second_half": clip[-half:], "first": clip[:1], "last": clip[-1:],
    }[shown]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- asking


def answer_clips(
    vlm: VisionLanguageModel, batch: Batch, params: QuestionParams, find: Callable[[int], Asked]
) -> Scores:
    """Scores of a batch: each clip (or each part of it that is asked about) is encoded once for all its questions.

    Args:
        find: the questions about the item at a place; ValueError where there are none. All items that it answers for
            have to have the same dimensions.

    Raises:
        ItemErrors: some items cannot be asked, or fail a condition.
    """
    clips, words = batch.clips(), params.answers_asked

    def seen(shown: Shown) -> Sequence[Media]:
        key = (id(vlm), "media") if shown == "all" else (id(vlm), "media", shown)
        return batch.shared(key, lambda: vlm.see([part_of(clip, shown) for clip in clips]))

    def ask(place: int) -> tuple[Asked, dict[Shown, list[str]]]:
        asked = find(place)
        texts: dict[Shown, list[str]] = {}
        for one in asked.questions:
            text = fill(one.text, batch.prompts[place]) if "{prompt}" in one.text else one.text
            question = params.template.replace("{question}", text)
            images = len(part_of(clips[place], one.shown))
            texts.setdefault(one.shown, []).append(vlm.words.chat(question, images))
        for shown, group in texts.items():
            vlm.check(seen(shown)[place], group, [words] * len(group), "needed")
        return asked, texts

    answers = score_answers(size=len(batch), ask=ask, vlm=vlm, seen=seen, words=words)
    soft = params.answers == "soft"

    def read(places: Sequence[int], ready: Sequence[dict[str, float]]) -> Scores:
        names = list(ready[0]) if ready else ["score"]
        return {name: torch.tensor([one[name] for one in ready], dtype=torch.float64) for name in names}

    def settle(place: int) -> dict[str, float]:
        found = answers[place]
        if isinstance(found, ValueError):
            raise found
        return scores_of(*found, soft)

    return score_ready(len(batch), settle, read)


def score_answers(
    size: int,
    ask: Callable[[int], tuple[Asked, dict[Shown, list[str]]]],
    vlm: VisionLanguageModel,
    seen: Callable[[Shown], Sequence[Media]],
    words: Sequence[str],
) -> list[tuple[Asked, Tensor] | ValueError]:
    """For each item its questions with ``log p(yes) - log p(no)`` [questions], or why it could not be asked."""
    found: list[tuple[Asked, Tensor] | ValueError] = []
    groups: list[tuple[int, Shown, list[str]]] = []
    for place in range(size):
        try:
            asked, texts = ask(place)
        except ValueError as error:
            found.append(error.with_traceback(None))
            continue
        found.append((asked, torch.empty(len(asked.questions))))
        groups += [(place, shown, group) for shown, group in texts.items()]
    media = [seen(shown)[place] for place, shown, _ in groups]
    for (place, shown, _), ahead in zip(
        groups, margins(vlm, media, [group for *_, group in groups], words), strict=True
    ):
        item = found[place]
        assert not isinstance(item, ValueError)
        asked, values = item
        values[[number for number, one in enumerate(asked.questions) if one.shown == shown]] = ahead
    return found
