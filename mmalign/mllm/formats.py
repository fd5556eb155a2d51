"""Tables of answers: which formats there are, telling them apart, reading and writing.

What a row is, is in `mmalign.mllm.rows`; `docs/answers.md` shows each format. A new one is a generator that takes a
`Fields` and gives rows or raises `Unusable`, and a line in `ADAPTERS`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mmalign.mllm.answers_writing import write_answers
from mmalign.mllm.fields import KEPT, OPTIONS, Fields
from mmalign.mllm.formats_chat import llama_factory, llava, ms_swift, povid, trl
from mmalign.mllm.formats_sets import (
    align_anything,
    beavertails_v,
    critiques,
    dress,
    mdpo,
    mia_dpo,
    mm_rlhf,
    plain_dpo,
    rlaif_v,
    rlaif_v_pairs,
    rlhf_v,
    spa_vl,
)
from mmalign.mllm.rows import AnswerRow, Unusable
from mmalign.preference_row import Dropped
from mmalign.records import Record, Records, missing_columns, nearest, read_records
from mmalign.tables import report, summary, verified

__all__ = ["ADAPTERS", "FORMATS", "Adapter", "AnswerTable", "detect", "read_answers", "write_answers"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AnswerTable:
    """The usable rows of a table of answers, and what was left out with the reason for each."""

    rows: list[AnswerRow]
    dropped: list[Dropped]
    format: str = ""

    def summary(self) -> str:
        """Such as "kept 10 of 12 rows; dropped 2: 1 tie (dpo_pairs.jsonl line 7), 1 no image (...)"."""
        return summary(len(self.rows), self.dropped)


@dataclass(frozen=True)
class Adapter:
    """A format.

    Attributes:
        each: the rows of one record; raises `Unusable` for what cannot be used.
        needs: sets of columns of which a table must have one.
        uses: further columns that are read.
        keeps: columns that the data set has and that go to `meta`.
        source: what `AnswerRow.source` says if no column does.
        auto: whether it is told by its columns; the others read what another one reads, and go by name alone.
    """

    each: Callable[[Fields], Iterator[AnswerRow]]
    needs: tuple[tuple[str, ...], ...]
    uses: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    source: str | None = None
    auto: bool = True

    @property
    def summary(self) -> str:
        """The first line of the generator's docstring."""
        assert self.each.__doc__
        return self.each.__doc__.strip().splitlines()[0]

    @property
    def knows(self) -> set[str]:
        """Every column that a table in this format may have."""
        return {name for need in self.needs for name in need} | {*self.uses, *self.keeps, *OPTIONS, *KEPT}

    def rows(
        self, records: Iterable[Record], names: Mapping[str, str] | None = None, table: Iterable[str] = (),
        extra: tuple[str, ...] = (),
    ) -> Iterator[AnswerRow | Dropped]:  # fmt: skip
        """Rows as they stand in a file in, answer rows out; what cannot be used with its reason.

        `names` are the file's names of columns, by the format's; `table` all columns of the file; `extra` go to `meta`.
        """
        columns = frozenset(table)
        for record in records:
            try:
                yield from self.each(Fields(record, (*self.keeps, *extra), names, columns, self.source))
            except Unusable as fault:
                yield fault.dropped(record.origin)


_MEDIA = ("image", "images", "video", "videos")
_SET = ("origin_dataset", "origin_split", "ds_name", "ds_question_id", "image_id", "image_path", "logps")
_SCORED = ("reference_chosen_logp", "reference_rejected_logp", "ls_factor", "margins")
_NOT_READ = ("audios", "tools", "rejected_audios", "rejected_videos", "rejected_tools")
_BEAVER = (
    *("image_severity", "response_1_from", "response_2_from", "is_response_1_safe", "is_response_2_safe"),
    *(f"response_{number}_{what}_rate" for what in ("harmless", "helpful") for number in (1, 2)),
)


def _needs(*columns: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(each.split()) for each in columns)


_PAIRS = _needs("prompt chosen rejected", "chosen rejected", "prompt chosen rejected_images")
_TEXTS = ("chosen", "rejected", "completion", "label")

ADAPTERS: dict[str, Adapter] = {
    "trl": Adapter(trl, (*_PAIRS, *_needs("prompt completion", "messages", "prompt")), uses=(*_TEXTS, *_MEDIA)),
    "hf_formatted": Adapter(trl, _PAIRS[:1], uses=_MEDIA, auto=False),
    "ms_swift": Adapter(
        ms_swift,
        _needs(
            "messages rejected_response", "messages rejected_messages", "messages rejected_images", "messages label"
        ),
        uses=("images", "videos", *_NOT_READ),
    ),
    "llama_factory": Adapter(
        llama_factory,
        _needs("conversations chosen rejected", "conversations kto_tag"),
        uses=(*_MEDIA, "system"),
        keeps=("tools",),
    ),
    "llava": Adapter(llava, _needs("conversations"), uses=(*_MEDIA, "system"), keeps=("model",)),
    "povid": Adapter(povid, _needs("conversations rejected_conversations"), uses=("image", "images")),
    "rlhf_v": Adapter(rlhf_v, _needs("text image", "text image_path"), keeps=_SET, source="rlhf_v"),
    "rlaif_v": Adapter(rlaif_v, _needs("question chosen rejected image"), keeps=_SET, source="rlaif_v"),
    "rlaif_v_pairs": Adapter(
        rlaif_v_pairs,
        _needs("question chosen rejected image_path org_infos"),
        uses=("image",),
        keeps=(*_SET, "org_infos"),
        source="rlaif_v_pairs",
    ),
    "mm_rlhf": Adapter(
        mm_rlhf,
        _needs("prompt chosen rejected chosen_reason", "prompt chosen rejected rejected_reason"),
        uses=("image", "video", "is_tie", "mixed_up_image"),
        keeps=("chosen_reason", "rejected_reason", *_SCORED),
        source="mm_rlhf",
    ),
    "mia_dpo": Adapter(mia_dpo, _needs("prompt chosen rejected image gt"), keeps=("gt",), source="mia_dpo"),
    "plain_dpo": Adapter(plain_dpo, _needs("prompt chosen rejected image"), auto=False),
    "mdpo": Adapter(mdpo, _needs("prompt chosen rejected img_path"), source="mdpo"),
    "spa_vl": Adapter(
        spa_vl,
        _needs("question chosen rejected image image_name"),
        keeps=("image_name", "class1", "class2", "class3"),
        source="spa_vl",
    ),
    "align_anything": Adapter(
        align_anything, _needs("question image response_1 response_2 overall_response"), source="align_anything"
    ),
    "beavertails_v": Adapter(
        beavertails_v,
        _needs(
            "question image response_1 response_2 more_helpful_response_id", "question image response is_response_safe"
        ),
        uses=("safer_response_id",),
        keeps=_BEAVER,
        source="beavertails_v",
    ),
    "dress": Adapter(dress, _needs("interaction image_id", "interaction image"), keeps=("caption",), source="dress"),
    "critiques": Adapter(critiques, _needs("question response critique refined"), uses=("image", "images")),
}
FORMATS = {name: adapter.summary for name, adapter in ADAPTERS.items()}
"""Name and one-line summary of each answer format, for `mmalign list formats`."""


def detect(columns: Iterable[str], first: Record | None = None) -> str:
    """The format of a table with these columns; `first` is its first record, which tells RLHF-V's text from another.

    The format that explains most columns wins. ValueError if none fits, or several do that read different columns.
    """
    columns = list(columns)
    fits: dict[str, set[str]] = {}
    for name, adapter in ADAPTERS.items():
        if not adapter.auto or (name == "rlhf_v" and first is not None and not _json_object(first.values.get("text"))):
            continue
        for need in adapter.needs:
            if set(need) <= set(columns) and len(need) > len(fits.get(name, ())):
                fits[name] = set(need)
    best = [name for name, need in fits.items() if not any(need < other for other in fits.values())]
    if len(best) > 1:
        raise ValueError(f"the columns {', '.join(columns)} fit the formats {' and '.join(best)}; name one of them")
    if not best:
        raise ValueError(f"the columns {', '.join(columns)} fit no format of {', '.join(ADAPTERS)}; name one of them")
    return best[0]


def _json_object(value: Any) -> bool:
    try:
        return isinstance(value, dict) or (isinstance(value, str) and isinstance(json.loads(value), dict))
    except ValueError:
        return False


def read_answers(
    path: str | Path,
    format: str = "auto",
    root: str | Path | None = None,
    limit: int | None = None,
    verify: bool = True,
    columns: Mapping[str, str] | None = None,
    unknown_columns: Literal["error", "keep"] = "error",
) -> AnswerTable:
    """Read a table of answers: .jsonl, .json, .csv, .tsv or .parquet, or a folder of .parquet files.

    Args:
        path: the table.
        format: a name in `FORMATS`, or "auto" to tell it by its columns.
        root: where relative media paths start; default the table's folder.
        limit: read so many of the table's rows at most.
        verify: decode every image and clip now, once each, and drop the rows where one fails.
        columns: the file's names of columns, by the format's: {"chosen": "good_answer"}.
        unknown_columns: what becomes of those that the format does not know: an error, or kept in `meta`.

    Raises:
        ValueError: the file cannot be read; an unknown, unclear or ill-fitting format; a column missing, or (unless
            kept) one that is unknown, with the nearest name; no usable row.
    """
    if format not in ("auto", *ADAPTERS):
        known = ", ".join(("auto", *ADAPTERS))
        raise ValueError(f"unknown answer format {format!r}; there are {known}.{nearest(format, ADAPTERS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it is 1 or more")
    if unknown_columns not in ("error", "keep"):
        raise ValueError(f"unknown_columns is {unknown_columns!r}; it is 'error' or 'keep'")
    path = Path(path)
    records = read_records(path, root)
    names = dict(columns or {})
    if columns is None and format == "llama_factory":
        names = _dataset_info(path)
    if absent := [name for name in names.values() if name not in records.columns]:
        raise ValueError(missing_columns(path, absent, records.columns, "columns"))
    name, rows = _told(records, format, names)
    adapter = ADAPTERS[name]
    if strange := sorted(set(names) - adapter.knows):
        raise ValueError(f"format {name!r} has no column {strange[0]!r}.{nearest(strange[0], adapter.knows)}")
    _fitting(records, name, names)
    unknown = _unknown(records, name, names, unknown_columns)
    kept: list[AnswerRow] = []
    dropped: list[Dropped] = []
    for outcome in adapter.rows(islice(rows, limit), names, records.columns, unknown):
        (kept if isinstance(outcome, AnswerRow) else dropped).append(outcome)  # type: ignore[arg-type]
    if verify:
        kept, undecodable = verified(kept, lambda row: row.media)
        dropped += undecodable
    table = AnswerTable(kept, dropped, name)
    report(path, bool(kept), dropped, f"format {name}: {table.summary()}")
    return table


def _told(records: Records, format: str, names: Mapping[str, str]) -> tuple[str, Iterator[Record]]:
    """The format's name, and the records, of which the first may have been looked at."""
    rows = iter(records)
    if format != "auto":
        return format, rows
    first = next(rows)
    ours = {theirs: own for own, theirs in names.items()}
    try:
        name = detect([ours.get(each, each) for each in records.columns], first)
    except ValueError as error:
        raise ValueError(f"{records.path}: {error}") from None
    _log.info("%s: the columns are those of format %s", records.path, name)
    return name, _and(first, rows)


def _and(first: Record, rows: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from rows


def _fitting(records: Records, name: str, names: Mapping[str, str]) -> None:
    needs = [tuple(names.get(each, each) for each in need) for need in ADAPTERS[name].needs]
    if not any(set(need) <= set(records.columns) for need in needs):
        closest = min(needs, key=lambda need: len(set(need) - set(records.columns)))
        raise ValueError(missing_columns(records.path, closest, records.columns, f"format {name!r}"))


def _unknown(records: Records, name: str, names: Mapping[str, str], becomes: str) -> tuple[str, ...]:
    """The columns that the format does not know, to be kept; ValueError that names the first, if they are an error."""
    knows = {names.get(each, each) for each in ADAPTERS[name].knows}
    unknown = tuple(each for each in records.columns if each not in knows)
    if unknown and becomes == "error":
        raise ValueError(
            f"{records.path} has the column {unknown[0]!r}, which format {name!r} does not know; it knows "
            f"{', '.join(sorted(knows))}.{nearest(unknown[0], knows)} If it stands for one of these, say so with "
            f"columns: {{the known name: {unknown[0]}}}; unknown_columns: keep puts such columns into meta (in a "
            "training job both are keys of mllm)"
        )
    return unknown


def _dataset_info(path: Path) -> dict[str, str]:
    """The columns that LLaMA-Factory's dataset_info.json beside the table names for it, by our names for them."""
    info = path.parent / "dataset_info.json"
    if not info.is_file():
        return {}
    try:
        entries = json.loads(info.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{info} is not valid JSON ({error})") from None
    for entry in entries.values() if isinstance(entries, dict) else ():
        if isinstance(entry, dict) and entry.get("file_name") == path.name:
            named = {"conversations" if own == "messages" else own: it for own, it in entry.get("columns", {}).items()}
            return {own: it for own, it in named.items() if own in ADAPTERS["llama_factory"].knows}
    return {}
