"""Answer formats of training tools: TRL's, which is also mmalign's own, ms-swift's, LLaMA-Factory's and LLaVA's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmalign.mllm.fields import Fields, answer, answer_text, conversation, each_answer, message, said_media
from mmalign.mllm.rows import AnswerRow, Turn, Unusable, only_user
from mmalign.records import MediaRef


def trl(row: Fields) -> Iterator[AnswerRow]:
    """TRL's columns, mmalign's own form: prompt, chosen, rejected (or completion, label; or messages), images."""
    prompt, completion, messages = row.get("prompt"), row.get("completion"), row.get("messages")
    paired = row.get("chosen") is not None or row.get("rejected") is not None
    if (completion is not None) + (messages is not None) + paired > 1:
        raise Unusable("several kinds of answer", "a row has one of chosen, completion, messages")
    if row.get("label") is not None and completion is None:
        raise Unusable("bad label", "a label is about a completion, and the row has none")
    images = row.media("images", "image") or said_media(prompt or messages, row, "image")
    videos = row.media("videos", "video") or said_media(prompt or messages, row, "video")
    if messages is not None:
        yield from each_answer(row, conversation(messages, len(images), len(videos)), images, videos)
    elif completion is not None:
        label = row.get("label")
        label = bool(label) if label in (0, 1) else label  # CSV has no true and false
        turns = _prompt(prompt, images, videos)
        yield row.row(turns, answer(completion, "completion"), None, images, videos, label=label)
    elif paired and prompt is None:
        yield from _implicit(row, images, videos)
    elif paired:
        turns = _prompt(prompt, images, videos)
        chosen, rejected = answer(row.get("chosen"), "chosen"), answer(row.get("rejected"), "rejected")
        if rejected is None and not row.media("rejected_images"):
            raise Unusable("empty answer", "rejected is missing")
        yield row.row(turns, chosen, rejected, images, videos)
    elif set(row.table) & {row.column(name) for name in ("chosen", "rejected", "completion", "messages")}:
        raise Unusable("empty answer", "the row has no answer")
    else:
        yield row.row(_prompt(prompt, images, videos), None, None, images, videos)


def _prompt(prompt: Any, images: tuple[MediaRef, ...], videos: tuple[MediaRef, ...]) -> tuple[Turn, ...]:
    if isinstance(prompt, list | tuple):
        return conversation(prompt, len(images), len(videos))
    return only_user(prompt, len(images), len(videos))


def _implicit(row: Fields, images: tuple[MediaRef, ...], videos: tuple[MediaRef, ...]) -> Iterator[AnswerRow]:
    """The prompt is what both answers begin with, as TRL has it: messages, or characters up to a space."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        end = _common(chosen, rejected)
        if end and chosen[end - 1 : end] == " " and end < max(len(chosen), len(rejected)):
            end -= 1
        turns = only_user(chosen[:end], len(images), len(videos))
        yield row.row(turns, chosen[end:].lstrip(" "), rejected[end:].lstrip(" "), images, videos)
        return
    if not isinstance(chosen, list | tuple) or not isinstance(rejected, list | tuple):
        raise Unusable("empty answer", "without a prompt, chosen and rejected are both texts or both conversations")
    images = images or said_media(chosen, row, "image")
    yield from split_pair(row, chosen, rejected, images, videos)


def split_pair(
    row: Fields, chosen: Any, rejected: Any, images: tuple[MediaRef, ...], videos: tuple[MediaRef, ...],
    system: Any = None, **known: Any,
) -> Iterator[AnswerRow]:  # fmt: skip
    """A pair from two conversations that differ in their last message alone."""
    same = _common(chosen, rejected)
    rests = (chosen[same:], rejected[same:])
    if not rests[0] and not rests[1]:
        raise Unusable("chosen equals rejected", "the conversations are the same")
    if any(len(rest) != 1 for rest in rests):
        detail = f"the conversations part after {same} messages and go on for {len(rests[0])} and {len(rests[1])}"
        raise Unusable("prompts differ" if same < min(len(chosen), len(rejected)) else "no prompt", detail)
    turns = conversation(chosen[:same], len(images), len(videos), system)
    first, second = answer_text(message(rests[0][0]), "chosen"), answer_text(message(rests[1][0]), "rejected")
    yield row.row(turns, first, second, images, videos, **known)


def _common(first: Any, second: Any) -> int:
    """How many entries two sequences have in common at their beginnings."""
    ends = (number for number, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(ends, min(len(first), len(second)))


def ms_swift(row: Fields) -> Iterator[AnswerRow]:
    """ms-swift's: messages with the better answer last, and rejected_response, rejected_messages or rejected_images."""
    messages, images, videos = row.get("messages"), row.media("images"), row.media("videos")
    for name in ("audios", "tools", "rejected_audios", "rejected_videos", "rejected_tools"):
        if row.get(name):
            raise Unusable(f"has {name}", f"{name} are not read")
    rejected, other = row.get("rejected_response"), row.get("rejected_messages")
    negatives = row.media("rejected_images")
    known: dict[str, Any] = {"rejected_images": None if negatives in ((), images) else negatives}
    if known["rejected_images"] and (rejected is not None or other is not None):
        raise Unusable("several kinds of answer", "the rejected answer has images of its own, which no row can say")
    if other is not None:
        yield from split_pair(row, messages, other, images, videos, **known)
        return
    turns = conversation(messages, len(images), len(videos))
    if rejected is None and not known["rejected_images"] and row.get("label") is None:
        yield from each_answer(row, turns, images, videos, **known)
        return
    label = None if rejected is not None or known["rejected_images"] else bool(row.get("label"))
    chosen = answer_text(turns[-1], "the last message")
    yield row.row(turns[:-1], chosen, rejected, images, videos, label=label, **known)


def llama_factory(row: Fields) -> Iterator[AnswerRow]:
    """LLaMA-Factory's ShareGPT preference form: conversations, chosen {from, value}, rejected {from, value}, images."""
    images, videos = row.media("images", "image"), row.media("videos")
    turns = conversation(row.get("conversations"), len(images), len(videos), row.get("system"))
    label = row.get("kto_tag")
    if label is not None:
        yield row.row(turns[:-1], answer_text(turns[-1], "the last message"), None, images, videos, label=label)
        return
    chosen, rejected = answer(row.get("chosen"), "chosen"), answer(row.get("rejected"), "rejected")
    if chosen is None or rejected is None:
        raise Unusable("empty answer", f"{'chosen' if chosen is None else 'rejected'} is missing")
    yield row.row(turns, chosen, rejected, images, videos)


def llava(row: Fields) -> Iterator[AnswerRow]:
    """LLaVA's instruction files: image, conversations [{from: human|gpt, value}]; a row to imitate per answer."""
    images, videos = row.media("image", "images"), row.media("video", "videos")
    turns = conversation(row.get("conversations"), len(images), len(videos), row.get("system"))
    yield from each_answer(row, turns, images, videos)


def povid(row: Fields) -> Iterator[AnswerRow]:
    """POVID's and CSR's: LLaVA's conversations, and rejected_conversations that end in the worse answer."""
    images = row.media("image", "images")
    yield from split_pair(row, row.get("conversations") or [], row.get("rejected_conversations") or [], images, ())
