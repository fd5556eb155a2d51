"""One row for tuning a vision-language model on answers, and the checks that every format's rows go through.

A row is a prompt (turns of text, images and clips) and one of: two answers of which one is better, one answer with a
yes or no, one answer to imitate, or no answer yet. A row that cannot be used becomes a `Dropped` with its reason.
`mmalign.mllm.formats` reads such rows from files; `docs/answers.md` shows them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from mmalign.preference_row import Dropped
from mmalign.records import MediaRef, nearest

Role = Literal["system", "user", "assistant"]
Kind = Literal["pair", "image_pair", "unpaired", "answer", "prompt"]
Safer = Literal["chosen", "rejected", "same"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A piece of a turn: text, or a placeholder that stands for the row's next image or clip (and has no text)."""

    kind: Literal["text", "image", "video"]
    text: str = ""


@dataclass(frozen=True)
class Turn:
    """What one side said: text and placeholders in the order in which they were said."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The text parts alone, joined."""
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class AnswerRow:
    """A prompt and what was answered to it.

    Attributes:
        prompt: the turns up to the answer; the last is the user's. Its placeholders are as many as `images` and
            `videos`, and stand for them in order.
        chosen: the better answer, or the only one; plain text without any template. None in a row of kind "prompt".
        rejected: the worse answer.
        rejected_images: one image for each of `images`, with which `chosen` is the worse answer (image-conditional
            terms, such as mDPO's).
        label: of an unpaired row (KTO): whether `chosen` is a good answer.
        margin: how much better `chosen` is, in the units of whatever scored it; from below 0 to above it, finite.
        weight: of the row in the mean, from 0 up.
        chosen_spans, rejected_spans: (start, end) characters of the answer that differ in substance, in order and
            apart; None where nobody said, for which a text diff can stand in.
        safer: which answer is the safer one, where that was judged apart from which is the more helpful.
        meta: what else the data set says (reasons, scores, ids), plain JSON values.
    """

    prompt: tuple[Turn, ...]
    chosen: str | None
    rejected: str | None
    images: tuple[MediaRef, ...] = ()
    videos: tuple[MediaRef, ...] = ()
    rejected_images: tuple[MediaRef, ...] | None = None
    label: bool | None = None
    margin: float | None = None
    weight: float = 1.0
    chosen_spans: tuple[Span, ...] | None = None
    rejected_spans: tuple[Span, ...] | None = None
    safer: Safer | None = None
    source: str | None = None
    origin: str = field(default="", compare=False)
    meta: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def kind(self) -> Kind:
        """What can be learnt from it: "pair", "image_pair" (images alone), "unpaired", "answer" (SFT), "prompt"."""
        if self.chosen is None:
            return "prompt"
        if self.rejected is not None:
            return "pair"
        if self.label is not None:
            return "unpaired"
        return "answer" if self.rejected_images is None else "image_pair"

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """All images and clips that the row needs: `images`, `videos`, `rejected_images`."""
        return (*self.images, *self.videos, *(self.rejected_images or ()))


class Unusable(ValueError):
    """Why a row cannot be used: a short `reason`, by which rows are counted, and a `detail`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def dropped(self, origin: str) -> Dropped:
        return Dropped(origin, self.reason, self.detail)


# ------------------------------------------------------------------------------------------------ turns

_IMAGE = r"<image>|<image-placeholder>|<\|image\|>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<\|image_pad\|>"
_VIDEO = r"<video>|<video-placeholder>|<\|video\|>|<\|vision_start\|><\|video_pad\|><\|vision_end\|>|<\|video_pad\|>"
PLACEHOLDER = re.compile(f"(?P<image>{_IMAGE}|<start_of_image>)|(?P<video>{_VIDEO})")
"""How the public formats and the chat templates write "an image goes here" inside text."""

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}


def parts_of(text: str) -> tuple[Part, ...]:
    """`text` with its placeholders turned into parts.

    White space beside placeholders at the beginning or the end goes, since chat templates put their own ("<image>\\n"
    is how LLaVA's files begin); between texts it stays as it is.
    """
    found: list[Part] = []
    end = 0
    for match in PLACEHOLDER.finditer(text):
        found += [Part("text", text[end : match.start()]), Part("image" if match["image"] else "video")]
        end = match.end()
    found.append(Part("text", text[end:]))
    if len(found) == 1:
        return (Part("text", text),) if text else ()
    words = [number for number, part in enumerate(found) if part.text.strip()]
    first, last = (words[0], words[-1]) if words else (len(found), -1)
    parts = []
    for number, part in enumerate(found):
        said = part.text
        if number <= first and number > 0:
            said = said.lstrip()
        if number >= last and number < len(found) - 1:
            said = said.rstrip()
        if part.kind != "text":
            parts.append(part)
        elif said and first <= number <= last:
            parts.append(Part("text", said))
    return tuple(parts)


def turn(role: Any, content: Any) -> Turn:
    """A turn from a role as some format writes it and its content: text, or a list of typed parts as TRL has them.

    Of a part `{"type": "image", ...}` only its place is kept. Unusable for an unknown role or part.
    """
    if not isinstance(role, str) or role not in ROLES:
        hint = nearest(role, ROLES) if isinstance(role, str) else ""
        raise Unusable("unknown role", f"{role!r:.40} is none of {', '.join(ROLES)}.{hint}")
    if isinstance(content, str):
        return Turn(ROLES[role], parts_of(content))
    if not isinstance(content, list | tuple):
        raise Unusable("bad content", f"a turn's content is text or a list of parts, not {content!r:.40}")
    return Turn(ROLES[role], tuple(part for item in content for part in _typed(item)))


def _typed(item: Any) -> tuple[Part, ...]:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return _in_place(item["text"])
    if kind in ("image", "image_url"):
        return (Part("image"),)
    if kind in ("video", "video_url"):
        return (Part("video"),)
    raise Unusable("bad content", f"a part is of type text, image or video, not {item!r:.60}")


def _in_place(text: str) -> tuple[Part, ...]:
    return parts_of(text) if PLACEHOLDER.search(text) else (Part("text", text),)


def placed(turns: Sequence[Turn], images: int, videos: int, plain: Iterable[int] | None = None) -> tuple[Turn, ...]:
    """`turns` with placeholders for all images and clips; TRL's rule: before the first user text, if there are none.

    `plain` are the numbers of the turns that may take them (those that were plain text; default: all).
    """
    able = set(range(len(turns)) if plain is None else plain)
    missing: list[Part] = []
    for kind, count in (("image", images), ("video", videos)):
        if not any(part.kind == kind for each in turns for part in each.parts):
            missing += [Part(kind)] * count  # type: ignore[arg-type]
    out = list(turns)
    for number, each in enumerate(turns):
        if missing and each.role == "user" and number in able:
            out[number] = replace(each, parts=(*missing, *each.parts))
            break
    return tuple(out)


def only_user(text: Any, images: int, videos: int = 0) -> tuple[Turn, ...]:
    """A prompt of one user turn, with the images before its text unless it has placeholders."""
    if not isinstance(text, str):
        raise Unusable("no prompt", f"the prompt is {text!r:.40}, not text")
    return placed([turn("user", text)], images, videos)


# ------------------------------------------------------------------------------------------------ checks


def checked(row: AnswerRow) -> AnswerRow:
    """`row` itself. Unusable, with the reason, for anything that training could not use or would use wrongly."""
    _check_prompt(row)
    check_media(row.prompt, len(row.images), len(row.videos))
    _check_answers(row)
    _check_negatives(row)
    for name in ("margin", "weight"):
        value = getattr(row, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise Unusable(f"bad {name}", f"{name} is {value!r:.40}, not a number")
        if value is not None and not math.isfinite(value):
            raise Unusable(f"bad {name}", f"{name} is {value}, not finite")
    if row.weight < 0:
        raise Unusable("bad weight", f"weight is {row.weight}; it is 0 or more")
    _check_spans("chosen_spans", row.chosen_spans, row.chosen)
    _check_spans("rejected_spans", row.rejected_spans, row.rejected)
    if row.safer is not None and (row.safer not in get_args(Safer) or row.rejected is None):
        raise Unusable("bad safer", f"safer is {row.safer!r:.40}; it is chosen, rejected or same, of two answers")
    return row


def check_media(turns: Sequence[Turn], images: int, videos: int) -> None:
    """Unusable unless `turns` have as many placeholders as there are images and videos."""
    for name, count in (("image", images), ("video", videos)):
        places = sum(part.kind == name for each in turns for part in each.parts)
        said = f"the prompt has {_many(places, f'{name} placeholder')}"
        if places and not count:
            raise Unusable(f"no {name}", f"{said} and the row no {name}")
        if places != count:
            raise Unusable("placeholders do not match", f"{said} for {_many(count, name)}")


def _many(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


def _check_prompt(row: AnswerRow) -> None:
    if not row.prompt:
        raise Unusable("no prompt", "there is no turn before the answer")
    if row.prompt[-1].role != "user":
        raise Unusable("no prompt", f"the last turn before the answer is the {row.prompt[-1].role}'s, not the user's")
    if not row.prompt[-1].parts or not any(each.text.strip() for each in row.prompt if each.role == "user"):
        raise Unusable("no prompt", "the user says nothing")
    if any(each.role == "system" for each in row.prompt[1:]):
        raise Unusable("unknown role", "a system turn stands first or not at all")


def _check_answers(row: AnswerRow) -> None:
    if row.chosen is None and (row.rejected is not None or row.label is not None):
        raise Unusable("empty answer", "chosen is missing")
    for name in ("chosen", "rejected"):
        answer = getattr(row, name)
        if answer is None:
            continue
        if not isinstance(answer, str):
            raise Unusable("bad answer", f"{name} is {answer!r:.40}, not text")
        if not answer.strip():
            raise Unusable("empty answer", f"{name} is empty")
        if found := PLACEHOLDER.search(answer):
            raise Unusable("placeholder in an answer", f"{name} says {found.group()}; an answer is text alone")
    if row.label is not None and (not isinstance(row.label, bool) or row.rejected is not None):
        raise Unusable("bad label", f"label is {row.label!r:.40}; it is true or false, of one answer")
    if row.chosen is not None and row.rejected is not None and row.chosen.strip() == row.rejected.strip():
        raise Unusable("chosen equals rejected", f"both are {row.chosen!r:.60}")


def _check_negatives(row: AnswerRow) -> None:
    if row.rejected_images is None:
        return
    if len(row.rejected_images) != len(row.images) or not row.images:
        detail = f"{_many(len(row.rejected_images), 'rejected image')} for {_many(len(row.images), 'image')}"
        raise Unusable("bad rejected_images", detail)
    if row.rejected_images == row.images:
        raise Unusable("bad rejected_images", "the rejected images are the images themselves")


def _check_spans(name: str, spans: tuple[Span, ...] | None, answer: str | None) -> None:
    if spans is None:
        return
    if answer is None:
        raise Unusable("bad spans", f"{name} has no answer to lie in")
    end = 0
    for span in spans:
        if len(span) != 2 or any(type(place) is not int for place in span):
            raise Unusable("bad spans", f"{name} holds {span!r:.40}, not a start and an end")
        if not end <= span[0] < span[1] <= len(answer):
            detail = f"{name} holds {list(span)}, which does not lie after {end} in {len(answer)} characters"
            raise Unusable("bad spans", detail)
        end = span[1]
