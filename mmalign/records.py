"""Rows from JSONL, JSON, CSV and parquet files with their origin, and references to media that are read when needed."""

from __future__ import annotations

import bisect
import difflib
import functools
import hashlib
import itertools
import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from mmalign.source import MediaError, contents, head_of, read_bytes

# ------------------------------------------------------------------------------------------------ references


@dataclass(frozen=True, slots=True)
class MediaRef:
    """Media that is read when asked for: a file, or (with `row` and `column`) a cell of a parquet file.

    `row` counts from 0 over the whole file; `item` picks from a list cell. Small, hashable and picklable.
    """

    file: str
    row: int | None = None
    column: str | None = None
    item: int | None = None

    @property
    def name(self) -> str:
        """For messages: the path, or such as "train.parquet row 12 jpg_0"."""
        if self.row is None:
            return self.file
        item = "" if self.item is None else f"[{self.item}]"
        return f"{Path(self.file).name} row {self.row} {self.column}{item}"

    @property
    def path(self) -> Path | None:
        """The file, or None for a cell."""
        return Path(self.file) if self.row is None else None

    def read(self) -> bytes:
        """The encoded bytes, of a parquet cell by reading its row group alone. MediaError if that fails."""
        if self.row is None or self.column is None:
            return read_bytes(self.file)
        try:
            value = _ROW_GROUPS.cell(self.file, self.row, self.column)
        except FileNotFoundError:
            raise MediaError(self.name, f"no such file as {self.file}; check the path") from None
        except (OSError, KeyError, IndexError, pa.ArrowException) as error:
            raise MediaError(
                self.name, f"cannot be read from {self.file} ({error}); download that file again"
            ) from error
        if self.item is not None and isinstance(value, list):
            value = value[self.item]
        if isinstance(value, dict):  # the image type of Hugging Face data sets: {bytes, path}
            value = value.get("bytes")
        if not isinstance(value, bytes) or not value:
            raise MediaError(self.name, "holds no bytes; drop the row, or download the file again")
        return value

    def hash(self) -> str:
        """sha256 (hex) of the encoded bytes, remembered while the file stays unchanged. MediaError as in `read`."""
        try:
            status = os.stat(self.file)
        except OSError:
            self.read()  # says what is wrong
            raise
        return _hashed(self, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=1 << 20)
def _hashed(ref: MediaRef, changed: int, size: int) -> str:
    """Training asks for the hash of every picture at every step; a read each time would cost more than the step."""
    return hashlib.sha256(ref.read()).hexdigest()


class _RowGroups:
    """The last few row groups that were read, per column, so that neighbouring cells do not cost a read each.

    Only single columns of single row groups are ever in memory; a file is mapped, not loaded.
    """

    def __init__(self, groups: int = 8, files: int = 8) -> None:
        self._limits = (groups, files)
        self.forget()

    def forget(self) -> None:
        """Start afresh, as a forked worker must: its parent's lock may be held and file positions are shared."""
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[Any, ...], pa.ChunkedArray] = OrderedDict()
        self._files: OrderedDict[tuple[Any, ...], tuple[pq.ParquetFile, list[int]]] = OrderedDict()
        self.reads = 0

    def cell(self, file: str, row: int, column: str) -> Any:
        status = os.stat(file)
        identity = (file, status.st_mtime_ns, status.st_size)
        with self._lock:
            handle, ends = self._file(identity)
            if not 0 <= row < (ends[-1] if ends else 0):
                raise IndexError(f"row {row} of {ends[-1] if ends else 0}")
            group = bisect.bisect_right(ends, row)
            values = self._group(identity, handle, group, column)
        return values[row - (ends[group - 1] if group else 0)].as_py()

    def held(self, file: str, row: int, column: str) -> Any:
        """As `cell`, but of media that are {bytes, path} only the paths are read: enough to see how many there are."""
        status = os.stat(file)
        with self._lock:
            handle, _ = self._file((file, status.st_mtime_ns, status.st_size))
            leaves = [handle.schema.column(index).path for index in range(len(handle.schema))]
        light = [leaf for leaf in leaves if leaf.startswith(f"{column}.") and leaf.endswith(".path")]
        return self.cell(file, row, light[0] if light else column)

    def _file(self, identity: tuple[Any, ...]) -> tuple[pq.ParquetFile, list[int]]:
        if identity not in self._files:
            handle = pq.ParquetFile(identity[0], memory_map=True)
            sizes = (handle.metadata.row_group(i).num_rows for i in range(handle.num_row_groups))
            self._files[identity] = (handle, list(itertools.accumulate(sizes)))
        return _newest(self._files, identity, self._limits[1])

    def _group(self, identity: tuple[Any, ...], handle: pq.ParquetFile, group: int, column: str) -> pa.ChunkedArray:
        key = (identity, group, column)
        if key not in self._groups:
            self.reads += 1
            self._groups[key] = handle.read_row_group(group, columns=[column], use_threads=False).column(0)
        return _newest(self._groups, key, self._limits[0])


def _newest(kept: OrderedDict[Any, Any], key: Any, limit: int) -> Any:
    kept.move_to_end(key)
    while len(kept) > limit:
        kept.popitem(last=False)
    return kept[key]


_ROW_GROUPS = _RowGroups()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ROW_GROUPS.forget)


# ------------------------------------------------------------------------------------------------ rows


@dataclass(frozen=True, slots=True)
class Record:
    """One row as it stands in a file: `values`, less the columns in `cells`, which hold media and stay in the file."""

    values: dict[str, Any]
    origin: str
    file: Path
    row: int
    root: Path
    cells: frozenset[str] = frozenset()

    def cell(self, column: str) -> MediaRef:
        """The media in `column`: the cell itself if it holds bytes, else the file that it names."""
        if column in self.cells:
            return MediaRef(os.path.abspath(self.file), self.row, column)
        return self.path(self.values.get(column))

    def media(self, column: str) -> tuple[MediaRef, ...]:
        """The media in a column of `cells`: none where it is null, one for each entry where it is a list."""
        file = os.path.abspath(self.file)
        value = _ROW_GROUPS.held(file, self.row, column)
        if isinstance(value, list):
            return tuple(MediaRef(file, self.row, column, item) for item in range(len(value)))
        return () if value is None else (MediaRef(file, self.row, column),)

    def path(self, value: Any, folder: str | None = None) -> MediaRef:
        """The media that `value` names: a path under `root` (in `root/folder` if there is one), or a written-out ref.

        ValueError if it is neither.
        """
        if isinstance(value, dict) and isinstance(value.get("file"), str):
            parts = {name: value.get(name) for name in ("row", "column", "item")}
            return MediaRef(os.path.abspath(self.root / value["file"]), **parts)
        if not isinstance(value, str) or not value:
            raise ValueError(f"a media path must be text, not {value!r}")
        inside = folder is not None and not value.startswith(f"{folder}/") and (self.root / folder).is_dir()
        return MediaRef(os.path.abspath((self.root / folder if inside and folder else self.root) / value))


@dataclass(frozen=True, slots=True)
class Records:
    """The rows of a table: its columns (those of every row together) and an iterator over it."""

    path: Path
    columns: tuple[str, ...]
    rows: Iterable[Record]

    def __iter__(self) -> Iterator[Record]:
        return iter(self.rows)


def read_records(path: str | Path, root: str | Path | None = None) -> Records:
    """Open a .jsonl, .json (a list), .csv, .tsv or .parquet table, or a folder of .parquet files in the order of names.

    `root` is where relative media paths start (default: the table's folder). Media inside parquet is never loaded here.
    ValueError when the file is missing, empty, of another kind, or not what its name says (with line and column).
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.parquet"))
        if not files:
            raise ValueError(f"{path} is a folder without .parquet files; name the table inside it")
    elif path.is_file():
        _refuse_media(path)
        files = [path]
    elif path.exists():
        raise ValueError(f"{path} is a pipe, socket or device; copy the table into a file")
    else:
        raise ValueError(f"{path} does not exist; check the path")
    base = Path(root) if root is not None else (path if path.is_dir() else path.parent)
    if path.is_dir() or path.suffix.lower() == ".parquet":
        return _read_parquet(path, files, base)
    if path.suffix.lower() == ".jsonl":
        rows = [Record(values, f"{path.name} line {n}", path, n, base) for n, values in json_lines(path)]
    elif path.suffix.lower() == ".json":
        rows = [Record(values, f"{path.name} row {n}", path, n, base) for n, values in enumerate(_json_list(path))]
    elif path.suffix.lower() in (".csv", ".tsv"):
        rows = [Record(values, f"{path.name} row {n}", path, n, base) for n, values in enumerate(_csv_rows(path))]
    else:
        raise ValueError(
            f"{path}: a table ends in .jsonl, .json, .csv, .tsv or .parquet, not {path.suffix or 'nothing'!r}"
        )
    if not rows:
        raise ValueError(f"{path} holds no rows; was it written by a run that stopped early?")
    return Records(path, tuple(dict.fromkeys(key for row in rows for key in row.values)), rows)


def _refuse_media(path: Path) -> None:
    """ValueError for an archive, a picture or a document where a table belongs, whatever it is called."""
    found = contents(head_of(path)) if path.stat().st_size else None
    if found is not None and found.kind != "text":
        fix = "unpack it and name what is inside" if found.kind == "archive" else "name its folder, or a table"
        raise ValueError(f"{path} holds {found.label}, not a table; {fix}")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each line that is not blank. ValueError names the line of what is wrong."""
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _object(_json(line, path, number), f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 text ({error.reason} after line {number}); save it as UTF-8"
            ) from None


def _json_list(path: Path) -> list[dict[str, Any]]:
    try:
        content = _json(path.read_text(encoding="utf-8-sig"), path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    if not isinstance(content, list):
        raise ValueError(f"{path} holds one {type(content).__name__}, not a list of objects")
    return [_object(item, f"{path} row {number}") for number, item in enumerate(content)]


def _json(text: str, path: Path, number: int | None = None) -> Any:
    """What `text` says: a whole file, or its line `number`. ValueError, naming the place, for what is no JSON."""
    where = path if number is None else f"{path}:{number}"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "" if number is None else "; one object per line"
        raise ValueError(f"{path}:{number or error.lineno}:{error.colno}: not valid JSON ({error.msg}){hint}") from None
    except RecursionError:
        raise ValueError(f"{where}: brackets are nested too deeply; a row is an object of plain values") from None
    except ValueError as error:  # a whole number of more than 4300 digits
        raise ValueError(f"{where}: {error}") from None


# What tables call names and texts; without this a CSV's sample "007" would be read as 7.
_TEXT = (
    *(
        "sample",
        "prompt",
        "text",
        "media",
        "file_name",
        "filename",
        "path",
        "reference",
        "modality",
        "group",
        "model",
        "response",
    ),
    *("aux", "user_id"),
    *("chosen", "rejected", "completion", "question", "image", "images", "video", "videos", "source"),
)


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    """Numbers where every cell of a column is one and its name is not in `_TEXT`; all else is text, also dates."""
    if not path.stat().st_size:
        return []
    try:
        table = _csv_table(path, _TEXT)
        other = [each.name for each in table.schema if not (_is_number(each.type) or pa.types.is_null(each.type))]
        table = _csv_table(path, (*_TEXT, *other))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path}: {error}; quote cells that hold separators or quotes, save it as UTF-8") from None
    twice = [name for name, count in Counter(table.column_names).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has two columns called {twice[0]}; rename or remove one")
    return table.to_pylist()


def _csv_table(path: Path, text: Iterable[str]) -> pa.Table:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    return pc.read_csv(
        path,
        parse_options=pc.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pc.ConvertOptions(
            column_types=dict.fromkeys(text, pa.string()), null_values=[""], strings_can_be_null=True
        ),
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: each row is an object with named fields, not {value!r:.60}")
    return value


def open_parquet(path: Path) -> pq.ParquetFile:
    """ValueError, naming the file, when it is truncated or not parquet at all."""
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is not a whole parquet file ({error}); download or write it again") from error


def _read_parquet(path: Path, files: list[Path], root: Path) -> Records:
    schemas = [open_parquet(file) for file in files]
    if not sum(each.metadata.num_rows for each in schemas):
        raise ValueError(f"{path} holds no rows; was it written by a run that stopped early?")
    columns = tuple(dict.fromkeys(name for each in schemas for name in each.schema_arrow.names))
    return Records(path, columns, itertools.chain.from_iterable(_parquet_rows(file, root) for file in files))


def _parquet_rows(file: Path, root: Path) -> Iterator[Record]:
    table = open_parquet(file)
    cells = frozenset(field.name for field in table.schema_arrow if _holds_media(field.type))
    plain = [name for name in table.schema_arrow.names if name not in cells]
    row = 0
    for group in range(table.num_row_groups):
        if plain:
            rows: Iterable[dict[str, Any]] = _row_group(table, group, plain, f"{file.name} row {row}")
        else:
            rows = ({} for _ in range(table.metadata.row_group(group).num_rows))
        for values in rows:
            yield Record(values, f"{file.name} row {row}", file, row, root, cells)
            row += 1


def _row_group(table: pq.ParquetFile, group: int, columns: list[str], where: str) -> list[dict[str, Any]]:
    try:
        return table.read_row_group(group, columns=columns).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{where} and after: cannot be read ({error}); download or write the file again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} or after: a text is not UTF-8 ({error.reason}); write the file again") from None


def _holds_media(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_media(kind.value_type)
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_media(field.type) for field in kind)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def nearest(name: str, columns: Iterable[str]) -> str:
    """ " Did you mean 'x'?", or nothing."""
    close = difflib.get_close_matches(name, sorted(columns), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def missing_columns(path: Path, needed: Iterable[str], columns: Iterable[str], what: str) -> str:
    """The message for a table without needed columns: which, which there are instead, and the nearest name."""
    columns = list(columns)
    absent = [name for name in needed if name not in columns]
    hints = "".join(nearest(name, set(columns) - set(needed)) for name in absent)
    names = ", ".join(absent)
    return f"{path} has no column {names}, which {what} needs; its columns are {', '.join(columns)}.{hints}"
