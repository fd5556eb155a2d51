"""One row of a file on its way to an `AnswerRow`: its values, its media, and the columns that every format may have."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmalign.mllm.rows import AnswerRow, Span, Turn, Unusable, check_media, checked, only_user, placed, turn
from mmalign.records import MediaRef, Record

OPTIONS = ("margin", "weight", "chosen_spans", "rejected_spans", "safer", "source", "meta", "rejected_images")
"""Columns that a table in any format may have besides its own; they mean what the fields of `AnswerRow` mean."""
KEPT = ("id", "idx", "index", "category", "__index_level_0__")
"""Columns that data sets have for their own sake; any format keeps them in `meta`."""


@dataclass(frozen=True)
class Fields:
    """A record, the names that its format uses for its columns (`names`: the format's -> the file's), and which columns
    are kept as `meta`."""

    record: Record
    keeps: tuple[str, ...] = ()
    names: Mapping[str, str] | None = None
    table: Collection[str] = ()
    source: str | None = None

    def column(self, name: str) -> str:
        """What the file calls it."""
        return (self.names or {}).get(name, name)

    def get(self, name: str) -> Any:
        """The value as it stands, or None."""
        return self.record.values.get(self.column(name))

    def text(self, name: str, reason: str) -> str:
        """A value that has to be text. Unusable, with this reason, if it is not."""
        value = self.get(name)
        if not isinstance(value, str):
            raise Unusable(reason, f"{name} is missing" if value is None else f"{name} is {value!r:.40}, not text")
        return value

    def media(self, *names: str) -> tuple[MediaRef, ...]:
        """The media of the first of these columns that has any; each may hold one or a list, in the row or as paths."""
        filled = [found for name in names if (found := self._media(name))]
        if len(filled) > 1 and len(set(filled)) > 1:
            raise Unusable("bad media", f"the row has {' and '.join(names)}, which differ; leave one out")
        return filled[0] if filled else ()

    def first_media(self, *names: str) -> tuple[MediaRef, ...]:
        """The media of the first of these columns that has any, whatever the others hold."""
        return next((found for name in names if (found := self._media(name))), ())

    def _media(self, name: str) -> tuple[MediaRef, ...]:
        column = self.column(name)
        if column in self.record.cells:
            return self.record.media(column)
        value = self.record.values.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):  # a list in one cell of a CSV
            value = _json(value, name)
        if value is None or value == "":
            return ()
        return tuple(self.place(item) for item in (value if isinstance(value, list | tuple) else [value]))

    def place(self, value: Any) -> MediaRef:
        """The media that one value names: a path, {path}, or a written-out `MediaRef`. Unusable for all else."""
        if isinstance(value, dict) and "file" not in value:
            value = value.get("path")
        if isinstance(value, str) and value.startswith(("http://", "https://", "data:")):
            raise Unusable("bad media", f"{value[:60]} is no file; download it and name the copy")
        try:
            return self.record.path(value)
        except ValueError as error:
            raise Unusable("bad media", str(error)) from None

    def row(
        self,
        prompt: Sequence[Turn],
        chosen: Any,
        rejected: Any = None,
        images: tuple[MediaRef, ...] = (),
        videos: tuple[MediaRef, ...] = (),
        **known: Any,
    ) -> AnswerRow:
        """The finished row with the optional columns filled in, those in `known` excepted. Unusable as `checked`."""
        found: dict[str, Any] = {
            "rejected_images": self.media("rejected_images") or None,
            "margin": self.get("margin"),
            "weight": 1.0 if self.get("weight") is None else self.get("weight"),
            "chosen_spans": spans(self.get("chosen_spans"), "chosen_spans"),
            "rejected_spans": spans(self.get("rejected_spans"), "rejected_spans"),
            "safer": self.get("safer"),
            "source": self.get("source") or self.source,
            "meta": self.meta(),
        }
        found.update(known)
        row = AnswerRow(tuple(prompt), chosen, rejected, images, videos, origin=self.record.origin, **found)
        checked(row)
        margin = None if row.margin is None else float(row.margin)
        return replace(row, margin=margin, weight=float(row.weight))

    def pair(
        self, question: Any, chosen: Any, rejected: Any, images: tuple[MediaRef, ...], **known: Any
    ) -> Iterator[AnswerRow]:
        """The row of the simplest data sets: one question, two answers as text."""
        if chosen is None or rejected is None:
            raise Unusable("empty answer", f"{'chosen' if chosen is None else 'rejected'} is missing")
        videos = known.pop("videos", ())
        yield self.row(only_user(question, len(images), len(videos)), chosen, rejected, images, videos, **known)

    def meta(self) -> dict[str, Any]:
        """The `meta` of a row: its own `meta` column, and the columns that its format keeps."""
        value = self.get("meta")
        own = _json(value, "meta") if isinstance(value, str) else value
        if own is not None and not isinstance(own, dict):
            raise Unusable("bad meta", f"meta is {own!r:.40}, not an object")
        kept = {name: value for name in (*KEPT, *self.keeps) if (value := self.get(name)) is not None}
        return {**kept, **(own or {})}


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(f"bad {name}", f"{name} is no valid JSON ({error})") from None


def spans(value: Any, name: str) -> tuple[Span, ...] | None:
    """[[start, end], ...] as tuples; what lies in them is checked with the row."""
    if isinstance(value, str):
        value = _json(value, name)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(item, list | tuple) for item in value):
        raise Unusable("bad spans", f"{name} is {value!r:.40}, not a list of [start, end]")
    return tuple(tuple(item) for item in value)


# ------------------------------------------------------------------------------------------------ conversations


def message(item: Any) -> Turn:
    """A turn from {role, content} or, as ShareGPT has it, {from, value}."""
    if isinstance(item, dict) and "role" in item:
        return turn(item["role"], item.get("content"))
    if isinstance(item, dict) and "from" in item:
        return turn(item["from"], item.get("value"))
    raise Unusable("bad content", f"a message is {{role, content}} or {{from, value}}, not {item!r:.60}")


def conversation(items: Any, images: int, videos: int, system: Any = None) -> tuple[Turn, ...]:
    """The turns of a list of messages, with placeholders for all images (`placed`, in messages of plain text alone)."""
    if not isinstance(items, list | tuple) or not items:
        raise Unusable("no prompt", f"a conversation is a list of messages, not {items!r:.40}")
    turns = [message(item) for item in items]
    plain = {number for number, item in enumerate(items) if isinstance(item.get("content", item.get("value")), str)}
    out = placed(turns, images, videos, plain)
    return (turn("system", system), *out) if isinstance(system, str) and system else out


def said_media(items: Any, fields: Fields, kind: str) -> tuple[MediaRef, ...]:
    """The files that messages name in their own parts: {"type": "image", "image": "a.png"} and its like."""
    found = []
    for item in items if isinstance(items, list | tuple) else ():
        content = item.get("content") if isinstance(item, dict) else None
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, dict) and part.get("type") in (kind, f"{kind}_url"):
                value = next((part[key] for key in (kind, "path", "url", f"{kind}_url") if part.get(key)), None)
                if value is not None:
                    found.append(fields.place(value["url"] if isinstance(value, dict) and "url" in value else value))
    return tuple(found)


def answer(value: Any, name: str) -> Any:
    """The text of an answer: text, or one assistant message. None stays None."""
    if value is None or isinstance(value, str):
        return value
    items = list(value) if isinstance(value, list | tuple) else [value]
    if len(items) != 1:
        raise Unusable("several turns in an answer", f"{name} has {len(items)} messages; an answer is one")
    return answer_text(message(items[0]), name)


def answer_text(said: Turn, name: str) -> str:
    """The text of an assistant's turn. Unusable if another said it, or it holds images."""
    if said.role != "assistant":
        raise Unusable("unknown role", f"{name} is said by the {said.role}, not by the assistant")
    if any(part.kind != "text" for part in said.parts):
        raise Unusable("placeholder in an answer", f"{name} holds an image or a clip; an answer is text alone")
    return said.text


def each_answer(
    fields: Fields, turns: Sequence[Turn], images: tuple[MediaRef, ...], videos: tuple[MediaRef, ...], **known: Any
) -> Iterator[AnswerRow]:
    """A row to imitate for each of the assistant's turns, with the media that were shown up to it."""
    check_media(turns, len(images), len(videos))  # of the whole, before it is cut into its answers
    answers = [number for number, each in enumerate(turns) if each.role == "assistant"]
    if not answers:
        raise Unusable("empty answer", "the assistant says nothing")
    for number in answers:
        before = turns[:number]
        shown = [part.kind for each in before for part in each.parts]
        row = fields.row(
            before, answer_text(turns[number], "an answer"), None,
            images[: shown.count("image")], videos[: shown.count("video")], **known,
        )  # fmt: skip
        yield row if len(answers) == 1 else replace(row, origin=f"{row.origin} turn {number}")
