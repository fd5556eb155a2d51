"""A row as tensors: the processor's own work on its prompt and images, its answers as tokens.

Every row goes through the processor by itself, so that what it becomes does not depend on its neighbours. No token is
ever cut off: a row that is too long is made shorter by smaller images, left out, or refused, as the policy says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, resize

from mmalign.losses.answer_tokens import changed_tokens
from mmalign.mllm.chat import Chat, Framed
from mmalign.mllm.passes import TEXT_INPUTS, Prompt
from mmalign.mllm.rows import AnswerRow, Part, Turn

Policy = Literal["resize", "drop", "error"]
_TRIES = 12
_LEAST_SIDE = 16  # pixels: below it a picture shows nothing


@dataclass(frozen=True)
class Media:
    """The pictures and clips of a row: uint8 [3, H, W] and [T, 3, H, W], with the clips' frames per second."""

    images: tuple[Tensor, ...] = ()
    videos: tuple[Tensor, ...] = ()
    fps: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Encoded:
    """A row's prompt and answers as a model reads them.

    Attributes:
        answers: token ids with the end of turn: chosen and rejected, or the one that there is.
        negative: the same prompt with the negative images, where an objective asks for it.
        contrast: the same prompt with a request for a better and for a worse answer, where an objective asks for it.
        changed: for each answer, which of its tokens belong to corrected segments, where an objective asks for it.
        scale: by how much the images were made smaller for the row to fit; 1 is not at all.
    """

    prompt: Prompt
    answers: tuple[tuple[int, ...], ...]
    negative: Prompt | None = None
    changed: tuple[tuple[bool, ...], ...] | None = None
    scale: float = 1.0
    contrast: tuple[Prompt, Prompt] | None = None

    @property
    def length(self) -> int:
        """Tokens of the longest prompt and the longest answer."""
        prompts = (self.prompt, self.negative, *(self.contrast or ()))
        return max(len(p.ids) for p in prompts if p) + max(map(len, self.answers))


class TooLong(ValueError):
    """A row does not fit, and policy or smallest images leave no way."""


class Encoder:
    """Rows to tensors for one model's processor.

    Args:
        media_ids: ids of the tokens that stand for a feature of an image or clip.
        arguments: of the processor, such as ``do_image_splitting``; they are part of what a cache's keys hold.
        max_length: of prompt and longest answer together, in tokens; None is what the model reads.
        policy: for rows beyond it.
        contrast: requests for a better and a worse answer, for objectives that compare what they change.
    """

    def __init__(
        self, processor: Any, chat: Chat, media_ids: frozenset[int], *, max_length: int | None = None,
        policy: Policy = "error", system: str | None = None, arguments: dict[str, Any] | None = None,
        min_block: int = 3, both_sides: bool = False, contrast: tuple[str, str] | None = None,
    ):  # fmt: skip
        self.processor, self.chat, self.media_ids = processor, chat, media_ids
        self.max_length, self.policy = max_length, policy
        self.system, self.arguments = system, dict(arguments or {})
        self.min_block, self.both_sides, self.contrast = min_block, both_sides, contrast
        self._alone = Lock()  # a fast tokenizer that two threads ask at once may refuse ("Already borrowed")

    def encode(
        self, row: AnswerRow, media: Media, negatives: tuple[Tensor, ...] | None = None, segments: bool = False
    ) -> Encoded:
        """One row.

        Args:
            media: what the row's placeholders stand for, in their order.
            negatives: images that the answers are not about, as many as the row's.
            segments: whether to mark the tokens that differ between the answers.

        Raises:
            TooLong: the row is longer than `max_length` and may not or cannot be made shorter.
            ValueError: the chat template or the processor cannot do it; the row's origin is named.
        """
        try:
            with self._alone:
                framed = self.chat.frame(row.prompt, self.system)
                texts = [text for text in (row.chosen, row.rejected) if text is not None]
                answers = tuple(self.chat.answer(framed, text) for text in texts)
                changed = self._changed(framed, row, answers) if segments else None
                asked = [self.chat.frame(_asking(row.prompt, text), self.system) for text in self.contrast or ()]
                made = self._fitted(framed, answers, media, negatives, [each.text for each in asked])
        except TooLong:
            raise
        except ValueError as error:
            raise ValueError(f"{row.origin}: {error}") from error
        return replace(made, changed=changed)

    def _fitted(
        self, framed: Framed, answers: tuple[tuple[int, ...], ...], media: Media,
        negatives: tuple[Tensor, ...] | None, asked: Sequence[str],
    ) -> Encoded:  # fmt: skip
        """The row at the largest size of its images at which it fits; `asked`: the texts of contrasting prompts."""
        scale = 1.0
        for _ in range(_TRIES):
            prompt = self.prompt(framed.text, _scaled(media, scale))
            other = None
            if negatives is not None:
                other = self.prompt(framed.text, _scaled(replace(media, images=negatives), scale))
            contrast = [self.prompt(text, _scaled(media, scale)) for text in asked]
            made = Encoded(prompt, answers, other, None, scale, (contrast[0], contrast[1]) if contrast else None)
            if self.max_length is None or made.length <= self.max_length:
                return made
            told = f"{made.length} tokens, and mllm.max_length is {self.max_length}"
            seen = sum(map(len, (media.images, media.videos)))
            if self.policy != "resize" or not seen:
                raise TooLong(told)
            text = made.length - self._media_tokens(prompt)
            room = self.max_length - text
            if room <= 0:
                raise TooLong(f"{told}; {text} of them are text")
            scale *= min(0.9, math.sqrt(room / max(1, self._media_tokens(prompt))) * 0.97)
        raise TooLong(f"{told}, also with images at {scale:.2f} of their sides")

    def _media_tokens(self, prompt: Prompt) -> int:
        return sum(1 for token in prompt.ids if token in self.media_ids)

    def prompt(self, text: str, media: Media) -> Prompt:
        """A prompt's text with its media, through the processor. ValueError where places and media do not match."""
        given: dict[str, Any] = {}
        if media.images:
            given |= {"images": [list(media.images)], "input_data_format": "channels_first"}
        if media.videos:
            given["videos"] = [list(media.videos)]
        try:
            made = self.processor(
                text=[text], **given, return_tensors="pt", **self.chat.special(text), **self._extra(media),
                **self.arguments,
            )  # fmt: skip
        except (ValueError, TypeError, IndexError, RuntimeError, KeyError) as error:
            what = f"{len(media.images)} images and {len(media.videos)} clips"
            raise ValueError(f"the processor cannot read this prompt with {what}: {error}") from error
        vision = {name: value for name, value in made.items() if name not in TEXT_INPUTS and isinstance(value, Tensor)}
        kinds = made.get("mm_token_type_ids", made.get("token_type_ids"))
        return Prompt(
            tuple(made["input_ids"][0].tolist()), None if kinds is None else tuple(kinds[0].tolist()), vision
        )  # fmt: skip

    def _extra(self, media: Media) -> dict[str, Any]:
        """Frames are picked already; what remains to be said of them is their rate."""
        if not media.videos:
            return {}
        facts = [
            {
                "total_num_frames": len(clip), "fps": fps, "duration": len(clip) / fps,
                "frames_indices": list(range(len(clip))),
            }
            for clip, fps in zip(media.videos, media.fps, strict=True)
        ]  # fmt: skip
        return {"do_sample_frames": False, "video_metadata": [facts]}

    def _changed(
        self, framed: Framed, row: AnswerRow, answers: Sequence[tuple[int, ...]]
    ) -> tuple[tuple[bool, ...], ...]:
        """Tokens of given spans, or where the two answers differ. ValueError for a single answer without spans."""
        spans = (row.chosen_spans, row.rejected_spans)
        if all(each is not None for each in spans):
            texts = (row.chosen or "", row.rejected or "")
            return tuple(
                tuple(_touches(place, each or ()) for place in self.chat.offsets(framed, text))
                for text, each in zip(texts, spans, strict=True)
            )
        if len(answers) != 2:
            raise ValueError("segments are what differs between two answers, and this row has one")
        return changed_tokens(*answers, min_block=self.min_block, both_sides=self.both_sides)


def _asking(turns: Sequence[Turn], request: str) -> tuple[Turn, ...]:
    """The conversation with a request behind what was asked last."""
    last = max(place for place, turn in enumerate(turns) if turn.role == "user")
    asked = replace(turns[last], parts=(*turns[last].parts, Part("text", f"\n{request}")))
    return (*turns[:last], asked, *turns[last + 1 :])


def _touches(place: tuple[int, int], spans: Sequence[tuple[int, int]]) -> bool:
    """Whether a token's characters overlap one of the spans."""
    start, stop = place
    return any(start < b and a < stop for a, b in spans)


def _scaled(media: Media, scale: float) -> Media:
    """The media with sides times `scale`, antialiased; as they are for 1."""
    if scale >= 1:
        return media
    images = tuple(_resized(image, scale) for image in media.images)
    return replace(media, images=images, videos=tuple(_resized(clip, scale) for clip in media.videos))


def _resized(pixels: Tensor, scale: float) -> Tensor:
    sides = [max(_LEAST_SIDE, round(side * scale)) for side in pixels.shape[-2:]]
    sides = [min(new, old) for new, old in zip(sides, pixels.shape[-2:], strict=True)]
    smaller: Tensor = resize(pixels, sides, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return torch.as_tensor(smaller)
