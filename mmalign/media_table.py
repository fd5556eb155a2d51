"""Media tables: a row per generated (or real) item. Written by `sample`, read by `score`; see `docs/tables.md`."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.media import VIDEO_SUFFIXES
from mmalign.media_folder import folder_records, table_in
from mmalign.records import MediaRef, Record, json_lines, missing_columns, open_parquet, read_records
from mmalign.source import shown, well_formed, whole_file


@dataclass(frozen=True)
class MediaRow:
    """One generated (or real) item. `media` and `reference` are paths, or a `MediaRef` if they lie inside parquet.

    `dimensions` names the evaluators that the row is for; None is all. One that stands for another's dimension by other
    means (`color@clip`) goes by what stands before the @.

    A row of text alone, such as a question about nothing that is shown, has modality `text` and the empty text for
    `media`. `response` is what a model answered; `images` are further pictures that it was shown, behind `media`.
    """

    sample: str
    prompt: str
    media: str | MediaRef
    modality: str = "image"
    group: str | None = None
    seed: int | None = None
    model: str | None = None
    reference: str | MediaRef | None = None
    fps: float | None = None
    num_frames: int | None = None
    dimensions: tuple[str, ...] | None = None
    response: str | None = None
    images: tuple[str, ...] = ()
    aux: dict[str, Any] = field(default_factory=dict)


_KINDS: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "modality": (str,),
    "group": (str, int),
    "seed": (int,),
    "model": (str,),
    "fps": (int, float),
    "num_frames": (int,),
    "response": (str,),
}
_ALIASES = {"file_name": "media", "text": "prompt"}  # what Hugging Face image folders call them in metadata.jsonl


def read_media_table(path: str | Path, root: str | Path | None = None, questions: bool | None = None) -> list[MediaRow]:
    """The rows of a .jsonl, .json, .csv or .parquet media table, or of a folder.

    A folder has its table in it (`metadata.jsonl` and such, or the `table.jsonl` that sampling writes), or else a row
    for each picture and clip below it, see `mmalign.media_folder`.

    Only `media` is needed, and of `questions` not even that: rows without it are text alone. None takes a table with a
    column `response` for questions. Relative paths start at `root` (default: the table's folder) and come back
    absolute; without `sample` the path as written is the sample; without `modality` it goes by the file's suffix;
    columns that the table format does not know land in `aux`. Files are not opened.

    Raises ValueError, naming the row, for an empty table, no `media` column (with the columns that are there and the
    nearest name), a value of the wrong type or range, or a sample named twice.
    """
    table = table_in(path)
    records = folder_records(table) if table.is_dir() else read_records(table, root)
    names = {
        _ALIASES.get(name, name) if _ALIASES.get(name) not in records.columns else name for name in records.columns
    }
    if questions is None:
        questions = "response" in names
    if "media" not in names and not questions:
        raise ValueError(missing_columns(table, ["media"], records.columns, "a media table"))
    rows, seen = [], dict[str, str]()
    for record in records:
        row = _media_row(record, questions)
        if row.sample in seen:
            raise ValueError(f"{record.origin}: sample {row.sample!r} is also {seen[row.sample]}; samples must differ")
        seen[row.sample] = record.origin
        rows.append(row)
    return rows


def _media_row(record: Record, questions: bool = False) -> MediaRow:
    values = dict(record.values)
    for alias, name in _ALIASES.items():
        if name not in values and name not in record.cells and alias in values:
            values[name] = values.pop(alias)
    found: dict[str, Any] = {}
    for name in ("media", "reference"):
        found[name] = _place(record, name, values.pop(name, None))
    if found["media"] is None and not questions:
        raise ValueError(f"{record.origin}: media is missing; give a path, or remove the row")
    found["images"] = _further(record, values.pop("images", None), found["media"])
    bare = found["media"] is None
    found["media"] = "" if bare else found["media"]
    for name, kinds in _KINDS.items():
        value = values.pop(name, None)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ValueError(f"{record.origin}: {name} is {value!r:.40}, not {' or '.join(k.__name__ for k in kinds)}")
        if isinstance(value, int) and abs(value) >= 1 << 63:
            raise ValueError(f"{record.origin}: {name} is a number of more than 63 bits; give a smaller one")
        found[name] = value
    found["prompt"] = found["prompt"] or ""
    found["group"] = None if found["group"] is None else well_formed(str(found["group"]))
    found["model"] = None if found["model"] is None else well_formed(found["model"])
    found["fps"] = None if found["fps"] is None else float(found["fps"])
    if found["fps"] is not None and not 0 < found["fps"] < math.inf:
        raise ValueError(f"{record.origin}: fps is {found['fps']}; it is frames per second, above 0")
    found["modality"] = found["modality"] or ("text" if bare else _modality(found["media"]))
    if found["modality"] not in (("text",) if bare else ("image", "video")):
        due = "text, since the row has no media" if bare else "image or video"
        raise ValueError(f"{record.origin}: modality is {found['modality']!r}; it is {due}")
    found["dimensions"] = _dimensions(values.pop("dimensions", None), record.origin)
    sample = values.pop("sample", None)
    if sample is None:
        written = record.values.get("media") or record.values.get("file_name")
        sample = written if isinstance(written, str) else record.origin
    aux = _aux(values.pop("aux", None), record.origin)
    extra = {name: value for name, value in values.items() if value is not None}
    return MediaRow(sample=well_formed(str(sample)), aux={**extra, **aux}, **found)


def _dimensions(value: Any, origin: str) -> tuple[str, ...] | None:
    """A list of names, or text with spaces or commas between them."""
    names = value.replace(",", " ").split() if isinstance(value, str) else value
    if names is None:
        return None
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{origin}: dimensions is {value!r:.40}, not a list of evaluators; leave it out for all")
    return tuple(names)


def _place(record: Record, name: str, value: Any) -> str | MediaRef | None:
    """A plain file as the text of its absolute path, which every tool takes; media inside parquet as a reference."""
    if name not in record.cells and value is None:
        return None
    try:
        ref = record.cell(name) if name in record.cells else record.path(value)
    except ValueError as error:
        raise ValueError(f"{record.origin}: {name}: {error}") from None
    return ref.file if ref.row is None else ref


def _further(record: Record, value: Any, media: str | MediaRef | None) -> tuple[str, ...]:
    """The column `images`: a list of paths."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) and each for each in value):
        raise ValueError(f"{record.origin}: images is {value!r:.40}, not a list of paths")
    if value and media is None:
        raise ValueError(f"{record.origin}: images holds further pictures, and media none; put the first into media")
    return tuple(record.path(each).file for each in value)


def _modality(media: str | MediaRef) -> str:
    return "video" if isinstance(media, str) and Path(media).suffix.lower() in VIDEO_SUFFIXES else "image"


def _aux(value: Any, origin: str) -> dict[str, Any]:
    """`aux` is an object; parquet, which has no free-form objects, keeps it as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{origin}: aux is not valid JSON ({error.msg})") from None
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{origin}: aux is {value!r:.40}, not an object")
    return value or {}


def write_media_table(path: str | Path, rows: Sequence[MediaRow]) -> None:
    """Write `rows` as .jsonl or .parquet, whole or not at all; `read_media_table` gives equal rows back.

    Files below the table's folder are written relative to it, so that the folder can be moved; others stay as they are.
    ValueError for no rows, another suffix, a sample used twice, or an `aux` that JSON cannot hold exactly.
    """
    path = Path(path)
    if not rows:
        raise ValueError(f"{path}: there are no rows to write")
    twice = [sample for sample, count in Counter(row.sample for row in rows).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: sample {twice[0]!r} is used twice; samples must differ")
    home = os.path.abspath(path.parent)
    items = [_written(row, home) for row in rows]
    if path.suffix.lower() == ".parquet":
        _refuse_half_pairs(items)
        with whole_file(path) as temporary:
            pq.write_table(_arrow(items), temporary)
    elif path.suffix.lower() == ".jsonl":
        write_json_lines(path, items)
    else:
        raise ValueError(f"{path}: a media table is written as .jsonl or .parquet")


def _written(row: MediaRow, home: str) -> dict[str, Any]:
    values = {each.name: getattr(row, each.name) for each in fields(row)}
    for name in ("media", "reference"):
        if values[name]:
            values[name] = portable(values[name], home)
    if not row.media:
        del values["media"]
    values["images"] = [portable(image, home) for image in row.images] or None
    if values["dimensions"] is not None:
        values["dimensions"] = list(values["dimensions"])
    if not values["aux"]:
        del values["aux"]
    elif json.loads(to_json(values["aux"], row.sample)) != values["aux"]:
        raise ValueError(f"sample {row.sample!r}: aux does not survive JSON; use lists for tuples and text for keys")
    return {name: value for name, value in values.items() if value is not None}


def _refuse_half_pairs(items: Iterable[Mapping[str, Any]]) -> None:
    for item in items:
        for name, value in item.items():
            if isinstance(value, str) and well_formed(value) != value:
                what = f"sample {shown(item['sample'])!r}: {name} holds half of a surrogate pair"
                raise ValueError(f"{what}, which parquet cannot hold; write the table as .jsonl, or mend it")


def portable(media: str | MediaRef, home: str) -> str | dict[str, Any]:
    """How `media` is written into a table in the folder `home`: relative if below it; a parquet cell as an object."""
    file = media if isinstance(media, str) else media.file
    if os.path.isabs(file) and os.path.commonpath([home, os.path.abspath(file)]) == home:
        file = Path(os.path.relpath(file, home)).as_posix()
    if isinstance(media, str) or media.row is None:
        return file
    item = {} if media.item is None else {"item": media.item}
    return {"file": file, "row": media.row, "column": media.column, **item}


def to_json(value: Any, where: str) -> str:
    """JSON text, exact for what JSON has. ValueError, naming `where`, for NaN, infinities and objects."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}; use text, finite numbers, lists and objects of them") from None


def write_json_lines(path: Path, items: Sequence[dict[str, Any]]) -> None:
    """One object per line, whole or not at all. Half a surrogate pair is written as JSON's escape for it."""
    kind = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
    with whole_file(path) as temporary, open(temporary, "w", **kind) as file:  # type: ignore[call-overload]
        for number, item in enumerate(items):
            file.write(to_json(item, f"{path} row {number}") + "\n")


_CELL = pa.struct([("file", pa.string()), ("row", pa.int64()), ("column", pa.string()), ("item", pa.int64())])
_ARROW = {"seed": pa.int64(), "num_frames": pa.int64(), "fps": pa.float64()}


def _arrow(items: Sequence[dict[str, Any]]) -> pa.Table:
    """The columns that some row fills, in the order of `MediaRow`."""
    arrays = {}
    for name in (each.name for each in fields(MediaRow)):
        values = [item.get(name) for item in items]
        if all(value is None for value in values):
            continue
        kind = _ARROW.get(name, pa.string())
        if name in ("dimensions", "images"):
            kind = pa.list_(pa.string())
        elif name == "aux":
            values = [None if value is None else to_json(value, "aux") for value in values]
        elif any(isinstance(value, dict) for value in values):
            kind, values = _CELL, [{"file": value} if isinstance(value, str) else value for value in values]
        arrays[name] = pa.array(values, kind)
    return pa.table(arrays)


def columns(path: str | Path) -> set[str]:
    """The columns of a media table in which some row has a value, `aux.x` for each x in `aux`; no media is read.

    For planning: an evaluator's `needs` are compared with this before any weights load. Columns unknown to the table
    format count as `aux.x` too, since that is where `read_media_table` puts them. ValueError as there.
    """
    found: set[str] = set()
    for name, inner in _filled(table_in(path)):
        found.add(name)
        found.update(f"aux.{key}" for key in inner)
    own = {each.name for each in fields(MediaRow)}
    known = set()
    for name in found:
        alias = _ALIASES.get(name)
        name = alias if alias and alias not in found else name
        known.add(name if name in own or name.startswith("aux.") else f"aux.{name}")
    return known


def _filled(table: Path) -> Iterator[tuple[str, Iterable[str]]]:
    """(column, its keys if it is `aux`) for what is not null, one line or row group in memory at a time."""
    if table.suffix.lower() == ".jsonl" and table.is_file() and table.stat().st_size:
        for number, values in json_lines(table):
            for name, value in values.items():
                if value is not None:
                    yield name, _aux(value, f"{table}:{number}") if name == "aux" else ()
        return
    # Either refuses what is missing, cut off or empty.
    records = folder_records(table, quiet=True) if table.is_dir() else read_records(table)
    if table.suffix.lower() != ".parquet":
        for record in records:
            for name, value in record.values.items():
                if value is not None:
                    yield name, _aux(value, record.origin) if name == "aux" else ()
        return
    file = open_parquet(table)
    for name in records.columns:
        if name == "aux":
            for group in range(file.num_row_groups):
                held = file.read_row_group(group, columns=["aux"])["aux"].to_pylist()
                yield from (("aux", _aux(value, str(table))) for value in held if value is not None)
        elif not _all_null(file, name):
            yield name, ()


def _all_null(file: pq.ParquetFile, name: str) -> bool:
    """By the file's own statistics; a column without them counts as filled."""
    for group in range(file.num_row_groups):
        part = file.metadata.row_group(group)
        for index in range(part.num_columns):
            column = part.column(index)
            if column.path_in_schema.split(".")[0] == name:
                counted = column.statistics is not None and column.statistics.has_null_count
                if not counted or column.statistics.null_count < part.num_rows:
                    return False
    return True
