"""Writing answer rows in TRL's columns: JSONL that names its media, or parquet that holds them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.media_table import portable, to_json, write_json_lines
from mmalign.mllm.rows import AnswerRow, Turn
from mmalign.records import MediaRef
from mmalign.source import whole_file

_MEDIA = ("images", "videos", "rejected_images")
_ROWS_AT_ONCE = 64  # of parquet with its media inside; few enough that their bytes fit into memory


def write_answers(rows: Sequence[AnswerRow], path: str | Path) -> None:
    """Write `rows` in TRL's columns, whole or not at all; `mmalign.mllm.formats.read_answers` gives equal rows back.

    A .jsonl names media by path, relative if below its folder. A .parquet holds their encoded bytes, so that rows read
    back from it equal these but for where their media are.

    ValueError for no rows, another suffix, prompts without an answer among other rows, or a `meta` that JSON cannot
    hold. MediaError if media for a .parquet cannot be read.
    """
    path = Path(path)
    if not rows:
        raise ValueError(f"{path}: there are no rows to write")
    kinds = {row.kind for row in rows}
    if "prompt" in kinds and len(kinds) > 1:
        raise ValueError(f"{path}: rows without an answer stand in a table of their own; these are {sorted(kinds)}")
    if path.suffix.lower() == ".jsonl":
        home = os.path.abspath(path.parent)
        write_json_lines(path, [_item(row, lambda ref: portable(ref, home)) for row in rows])
    elif path.suffix.lower() == ".parquet":
        _write_parquet(rows, path)
    else:
        raise ValueError(f"{path}: answers are written as .jsonl or .parquet")


def _item(row: AnswerRow, place: Any) -> dict[str, Any]:
    values: dict[str, Any] = {"prompt": [_message(turn) for turn in row.prompt]}
    if row.kind in ("unpaired", "answer"):
        values["completion"] = _said(row.chosen)
    else:
        values |= {"chosen": _said(row.chosen), "rejected": _said(row.rejected)}
    for name in _MEDIA:
        values[name] = [place(ref) for ref in getattr(row, name) or ()] or None
    for name in ("chosen_spans", "rejected_spans"):
        spans = getattr(row, name)
        values[name] = None if spans is None else [list(span) for span in spans]
    values |= {"label": row.label, "margin": row.margin, "weight": None if row.weight == 1 else row.weight}
    values |= {"safer": row.safer, "source": row.source, "meta": dict(row.meta) or None}
    return {name: value for name, value in values.items() if value is not None}


def _message(turn: Turn) -> dict[str, Any]:
    parts = [{"type": "text", "text": part.text} if part.kind == "text" else {"type": part.kind} for part in turn.parts]
    return {"role": turn.role, "content": parts}


def _said(answer: str | None) -> list[dict[str, Any]] | None:
    return None if answer is None else [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]


# ------------------------------------------------------------------------------------------------ parquet

_PARTS = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", _PARTS)]))
_HELD = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
_SPANS = pa.list_(pa.list_(pa.int64()))
_KINDS = {
    **dict.fromkeys(("prompt", "chosen", "rejected", "completion"), _MESSAGES),
    **dict.fromkeys(_MEDIA, _HELD),
    "label": pa.bool_(),
    **dict.fromkeys(("margin", "weight"), pa.float64()),
    **dict.fromkeys(("chosen_spans", "rejected_spans"), _SPANS),
    **dict.fromkeys(("safer", "source", "meta"), pa.string()),
}


def _write_parquet(rows: Sequence[AnswerRow], path: Path) -> None:
    filled = {name for row in rows for name in _item(row, lambda ref: ref)}
    schema = pa.schema([(name, kind) for name, kind in _KINDS.items() if name in filled])
    with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for batch in _batches(rows):
            items = [_item(row, _bytes) for row in batch]
            for row, item in zip(batch, items, strict=True):
                if "meta" in item:
                    item["meta"] = to_json(item["meta"], row.origin or "a row")
            columns = [pa.array([item.get(each.name) for item in items], each.type) for each in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _batches(rows: Sequence[AnswerRow]) -> Iterable[Sequence[AnswerRow]]:
    yield from (rows[start : start + _ROWS_AT_ONCE] for start in range(0, len(rows), _ROWS_AT_ONCE))


def _bytes(ref: MediaRef) -> dict[str, Any]:
    return {"bytes": ref.read(), "path": Path(ref.file).name if ref.row is None else None}
