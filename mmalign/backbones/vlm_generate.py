"""Answers in words: greedy or sampled text of a vision-language model, for batches of questions with 0, 1 or n images.

A batch is padded on the left. Padding is masked and changes no probability but by rounding, so that a greedy answer is
the same in every batch unless two words are equally likely to the last bits of the precision; a batch of one has no
padding. Sampling draws one uniform number per question and token from a generator of its own, so an answer depends on
its seed and not on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.vlm_text import ChatFormat

__all__ = ["Asked", "Decoding", "Writer", "Written"]


@dataclass(frozen=True)
class Asked:
    """A question.

    Attributes:
        text: with the chat template applied and a placeholder for each image, see `ChatFormat.chat`.
        images: uint8 [3, H, W] each, of any sizes.
        seed: of sampling; without meaning for greedy answers.
    """

    text: str
    images: tuple[Tensor, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Decoding:
    """How words are chosen.

    Attributes:
        max_new_tokens: after which an answer is cut.
        temperature: 0 takes the likeliest token each time.
        top_p: sampling is from the smallest set of tokens with this share of the probability; 1 is from all of them.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Written:
    """An answer without control tokens, how many tokens it took without the one that ends it, and whether it was cut
    at `Decoding.max_new_tokens`."""

    text: str
    tokens: int
    cut: bool


class Writer:
    """Writes answers with a frozen model.

    Args:
        limit: tokens of question and answer that the model reads.
    """

    def __init__(
        self, model: Any, processor: Any, words: ChatFormat, limit: int, device: torch.device, dtype: torch.dtype
    ):
        self._model, self._processor, self._words = model, processor, words
        self._limit, self._device, self._dtype = limit, device, dtype

    @torch.no_grad()
    def write(self, asked: Sequence[Asked], decoding: Decoding) -> list[Written | ValueError]:
        """An answer to each question of a batch, or why there is none: it is longer than the model reads, or the
        processor refuses it.

        Sampling, temperature and penalties of the folder's generation config are not used.
        """
        found: dict[int, Written | ValueError] = {}
        # Processors do not take a batch in which some have images and some have none.
        for shown in (True, False):
            places = [place for place, one in enumerate(asked) if bool(one.images) == shown]
            if places:
                answers = self._together([asked[place] for place in places], decoding)
                found |= dict(zip(places, answers, strict=True))
        return [found[place] for place in range(len(asked))]

    def _together(self, asked: Sequence[Asked], decoding: Decoding) -> list[Written | ValueError]:
        """Answers to questions that all have images or all have none; those that cannot be asked are left out."""
        found: dict[int, Written | ValueError] = {}
        try:
            inputs = self.inputs(asked)
            for place, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
                if length + decoding.max_new_tokens > self._limit:
                    found[place] = self._too_long(length, decoding)
        except ValueError as error:  # of the processor, about one of them
            if len(asked) == 1:
                return [error.with_traceback(None)]
            return [self._together([one], decoding)[0] for one in asked]
        if not found:
            return list(self._generate(inputs, [one.seed for one in asked], decoding))
        rest = [place for place in range(len(asked)) if place not in found]
        if rest:
            found |= dict(zip(rest, self._together([asked[place] for place in rest], decoding), strict=True))
        return [found[place] for place in range(len(asked))]

    def inputs(self, asked: Sequence[Asked]) -> dict[str, Tensor]:
        """What the folder's processor makes of questions that all have images, or all have none, padded on the left."""
        tokenizer = self._processor.tokenizer
        images = [list(image.to(self._device) for image in one.images) for one in asked]
        kept = tokenizer.padding_side
        try:
            tokenizer.padding_side = "left"
            inputs = self._processor(
                text=[one.text for one in asked],
                **({"images": images, "input_data_format": "channels_first"} if asked[0].images else {}),
                return_tensors="pt",
                padding=True,
                **self._words.special(asked[0].text),
            )
        finally:
            tokenizer.padding_side = kept
        return {
            key: value.to(self._device, self._dtype if value.is_floating_point() else None)
            for key, value in inputs.items()
        }

    def _generate(self, inputs: dict[str, Tensor], seeds: Sequence[int], decoding: Decoding) -> list[Written]:
        from transformers import GenerationConfig, LogitsProcessorList

        tokenizer = self._processor.tokenizer
        ends = self._model.generation_config.eos_token_id or tokenizer.eos_token_id
        # Sampling is done by `_Draw`, which leaves the drawn token alone to be the likeliest.
        plain = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
        )
        draw = LogitsProcessorList([_Draw(seeds, decoding)] if decoding.temperature else [])
        kept = self._model.generation_config
        try:
            self._model.generation_config = plain  # unset values are otherwise filled in from the folder's
            ids = self._model.generate(**inputs, generation_config=plain, logits_processor=draw)
        finally:
            self._model.generation_config = kept
        stops = set(ends if isinstance(ends, list) else [ends])
        answers = []
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in stops), None)
            text = tokenizer.decode(row[:end], skip_special_tokens=True)
            answers.append(Written(text, len(row) if end is None else end, end is None))
        return answers

    def _too_long(self, length: int, decoding: Decoding) -> ValueError:
        return ValueError(
            f"The question with its images has {length} tokens, its answer up to {decoding.max_new_tokens}, and this "
            f"{self._model.config.model_type} model reads {self._limit}; shorten the prompt, use fewer or smaller "
            "images, or lower max_new_tokens."
        )


class _Draw:
    """A logits processor that leaves one token per row, drawn by the row's own generator."""

    def __init__(self, seeds: Sequence[int], decoding: Decoding):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._decoding = decoding

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probabilities = (scores.double() / self._decoding.temperature).softmax(dim=-1)
        sorted_, order = probabilities.sort(dim=-1, descending=True, stable=True)
        total = sorted_.cumsum(dim=-1)
        # The token with which the share is reached still belongs to the set.
        inside = total - sorted_ < self._decoding.top_p
        mass = (sorted_ * inside).sum(dim=-1)
        drawn = torch.tensor([float(torch.rand((), generator=each, dtype=torch.float64)) for each in self._generators])
        aim = drawn.double().to(mass.device) * mass
        last = inside.sum(dim=-1, keepdim=True) - 1
        places = torch.searchsorted(total, aim[:, None], right=True).minimum(last)
        return torch.full_like(scores, -torch.inf).scatter_(1, order.gather(1, places), 0.0)
