"""A local model that judges answers: what it is told, what it writes, and what is read of that.

Any folder of an image-text model, or of a language model where the judge sees no picture. It writes greedily, in the
batches that are scored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmalign.backbones.text_model import TextModel, load_text_model, reads_images
from mmalign.backbones.vlm import FAMILIES, VisionLanguageModel, load_vlm
from mmalign.backbones.vlm_generate import Asked, Decoding
from mmalign.backbones.vlm_loading import vlm_files
from mmalign.backbones.vlm_text import VlmParams
from mmalign.evaluation import BackboneSpec, Batch, ItemErrors, Scores

__all__ = ["Judge", "JudgeParams", "collected", "fill", "rating", "read_prompt", "unread", "verdict"]

_FIELD = re.compile(r"\{(\w*)\}")
_QUOTED = 200


class JudgeParams(VlmParams):
    """The judge, and what it sees.

    Attributes:
        model: a folder of transformers: an image-text model, or a language model for `see: text`.
        see: text, or image: the picture stands before the question.
        max_new_tokens: of a reply; more is cut off, and then often has no rating.
    """

    see: Literal["text", "image"] = "text"
    max_new_tokens: int = Field(512, ge=1)


class Judge:
    """Asks a model about answers.

    Args:
        model: what the spec of `spec` loads.
    """

    def __init__(self, model: VisionLanguageModel | TextModel, params: JudgeParams):
        self.model, self._decoding = model, Decoding(params.max_new_tokens)

    @staticmethod
    def spec(params: JudgeParams) -> BackboneSpec:
        """The model as a backbone; an image-text one is shared with other evaluators that ask it."""
        return BackboneSpec.of(load_vlm if reads_images(params.model) else load_text_model, **params.loading())

    @staticmethod
    def files(params: JudgeParams, *prompts: Path | None) -> list[Path]:
        """The model's files and those of the prompts that are given.

        Raises:
            ValueError: no such folder, one of another kind of model, or a language model that has to see a picture.
        """
        if not reads_images(params.model) and params.see == "image":
            raise ValueError(f"model: {params.model} reads no images; give an image-text model, or set see: text")
        return [*vlm_files(params.model), *(prompt.expanduser() for prompt in prompts if prompt is not None)]

    def question(self, text: str, images: Sequence[Tensor] = ()) -> Asked:
        """A question, images uint8 [3, H, W] before it.

        Raises:
            ValueError: the text holds a control token of the model's, or it reads one image and there are several.
        """
        if len(images) > 1 and not FAMILIES.get(self.model.family, True):
            raise ValueError(f"{self.model.family} models read one image, and this item has {len(images)}")
        return Asked(self.model.words.chat(text, len(images)), tuple(images))

    def scores(
        self,
        batch: Batch,
        ask: Callable[[int], Sequence[Asked]],
        read: Callable[[int, Sequence[str]], Mapping[str, float]],
    ) -> Scores:
        """Scores of a batch, float64 [B] each; all questions are written to together, replies are kept as notes.

        Args:
            ask: the questions about the item at a place; ValueError where there are none.
            read: the scores of the item at a place, from the judge's replies; ValueError where they have none.

        Raises:
            ItemErrors: some items cannot be asked, are too long for the judge, or their replies cannot be read.
        """
        asked: dict[int, Sequence[Asked]] = {}
        errors: dict[int, Exception] = {}
        found: dict[int, Mapping[str, float]] = {}
        for place in range(len(batch)):
            try:
                asked[place] = ask(place)
            except ValueError as error:
                errors[place] = error.with_traceback(None)
        questions = [one for item in asked.values() for one in item]
        written = iter(self.model.writer.write(questions, self._decoding))
        for place, item in asked.items():
            replies: list[str] = []
            try:
                for reply in [next(written) for _ in item]:
                    if isinstance(reply, ValueError):
                        raise reply
                    replies.append(reply.text)
                batch.notes[place] = "\n\n".join(replies)
                found[place] = read(place, replies)
            except ValueError as error:
                errors[place] = error.with_traceback(None)
        scores = collected(len(batch), found)
        if errors:
            raise ItemErrors(errors, scores)
        return scores


def collected(size: int, found: Mapping[int, Mapping[str, float]]) -> Scores:
    """Scores by name, float64 [size], of the items at these places; NaN elsewhere."""
    if not found:
        return torch.full((size,), torch.nan, dtype=torch.float64)
    names = next(iter(found.values()))
    return {
        name: torch.tensor([found[place][name] if place in found else torch.nan for place in range(size)]).double()
        for name in names
    }


# ------------------------------------------------------------------------------------------------ what it is told


def read_prompt(file: Path | None, default: str, fields: Collection[str], parameter: str = "prompt") -> str:
    """What the judge is told, fields such as ``{answer}`` still in it.

    Args:
        file: in place of the default.
        fields: that an item fills; ``answer`` has to be among those of a file.

    Raises:
        ValueError: the file cannot be read, names another field or lacks ``{answer}``.
    """
    if file is None:
        return default
    path = file.expanduser()
    try:
        text = path.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{parameter}: {path} cannot be read as text ({error})") from None
    known = ", ".join(f"{{{name}}}" for name in fields)
    if strange := [name for name in _FIELD.findall(text) if name not in fields]:
        raise ValueError(f"{parameter}: {path} has {{{strange[0]}}}, which is no field; there are {known}")
    if "{answer}" not in text:
        raise ValueError(f"{parameter}: {path} has no {{answer}}, so every answer would be judged alike")
    return text


def fill(prompt: str, values: Mapping[str, Any]) -> str:
    """The prompt with its fields filled; braces of the values are left alone.

    Raises:
        ValueError: the item lacks what a field stands for (None or empty; the answer may be empty).
    """
    for name in _FIELD.findall(prompt):
        if values[name] is None or (name != "answer" and not str(values[name]).strip()):
            raise ValueError(f"the row has no {name}, which the judge's prompt asks for")
    return _FIELD.sub(lambda found: str(values[found[1]]), prompt)


# ------------------------------------------------------------------------------------------------ what is read


def rating(reply: str, cue: str, highest: int) -> int | None:
    """The whole number from 0 to `highest` behind the cue; None without one, or with several different numbers.

    Small letters or capitals; spaces, stars and a bracket may stand around the colon.

    >>> rating("The dog is made up. **Rating:** 2", "rating", 6)
    2
    """
    found = set(re.findall(rf"\b{cue}[\s*_]*:[\s*_\[(]*(-?\d+(?:\.\d+)?)", reply, flags=re.IGNORECASE))
    numbers = {float(one) for one in found}
    one = numbers.pop() if len(numbers) == 1 else -1.0
    return int(one) if 0 <= one <= highest and one == int(one) else None


def verdict(reply: str, cue: str) -> bool | None:
    """Yes or no behind the cue, written as for `rating`; None without one, or with both.

    >>> verdict("It explains how to stay safe. Safe: yes", "safe")
    True
    """
    found = {one.lower() for one in re.findall(rf"\b{cue}[\s*_]*:[\s*_\[(]*(yes|no)\b", reply, flags=re.IGNORECASE)}
    return found == {"yes"} if len(found) == 1 else None


def unread(reply: str, what: str) -> ValueError:
    """The error of a reply that has not what was asked for, with its beginning."""
    return ValueError(f"the judge gave no {what}; it wrote: {reply.strip()[:_QUOTED]!r}")
