"""The two tables between the verbs: media tables (a row per item) and preference tables (a row per prompt group).

Media tables (`mmalign.media_table`) are written by `sample` and read by `score`. Preference tables are read by `train`,
from mmalign's own form or from a public data set's (`mmalign.formats`); `mmalign.judgements` makes pairs and lists
of them. `docs/tables.md` describes both, with examples. Import all of it from here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mmalign.formats import ADAPTERS, FORMATS, Adapter
from mmalign.formats_video import videodpo_files, videodpo_records
from mmalign.media import VIDEO_SUFFIXES, MediaError, check_media
from mmalign.media_table import (
    MediaRow,
    columns,
    portable,
    read_media_table,
    write_json_lines,
    write_media_table,
)
from mmalign.preference_row import OVERALL, Dropped, PreferenceRow, Resampled
from mmalign.progress import track
from mmalign.records import MediaRef, Record, Records, missing_columns, read_records

__all__ = [
    "FORMATS",
    "OVERALL",
    "Captioned",
    "CaptionedTable",
    "Dropped",
    "MediaRef",
    "MediaRow",
    "PreferenceRow",
    "PreferenceTable",
    "captioned",
    "columns",
    "read_media_table",
    "read_preferences",
    "report",
    "summary",
    "verified",
    "write_media_table",
    "write_preferences",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreferenceTable:
    """The usable rows of a preference table, and what was left out with the reason for each."""

    rows: list[PreferenceRow]
    dropped: list[Dropped]

    def summary(self) -> str:
        """Such as "kept 10 of 12 rows; dropped 2: 1 no label, 1 undecodable image (train.parquet row 7 jpg_1)"."""
        return summary(len(self.rows), self.dropped)


@dataclass(frozen=True)
class Captioned:
    """A picture or clip and what it shows: one row to fine-tune on."""

    prompt: str
    media: MediaRef
    origin: str
    resampled: tuple[Resampled, ...] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class CaptionedTable:
    """The rows of a media table that can be trained on, and what was left out with the reason for each."""

    rows: list[Captioned]
    dropped: list[Dropped]

    def summary(self) -> str:
        """As that of a `PreferenceTable`."""
        return summary(len(self.rows), self.dropped)


def summary(kept: int, dropped: Sequence[Dropped]) -> str:
    """What was kept and what was dropped and why, in one sentence without a full stop."""
    if not dropped:
        return f"kept all {kept} rows"
    by_reason: dict[str, list[str]] = {}
    for each in dropped:
        by_reason.setdefault(each.reason, []).append(each.origin)
    parts = [f"{len(origins)} {reason}{_where(reason, origins)}" for reason, origins in by_reason.items()]
    return f"kept {kept} of {kept + len(dropped)} rows; dropped {len(dropped)}: {', '.join(parts)}"


def _where(reason: str, origins: Sequence[str]) -> str:
    if reason == "no label":  # an ordinary row of most data sets, nothing that anybody would look up
        return ""
    more = f", and {len(origins) - 3} more" if len(origins) > 3 else ""
    return f" ({', '.join(origins[:3])}{more})"


def read_preferences(
    path: str | Path,
    format: str = "auto",
    root: str | Path | None = None,
    verify: bool = True,
    dimension: str | Sequence[str] | None = None,
) -> PreferenceTable:
    """Read a preference table: a file, a folder of parquet files, or a folder with `chosen/` and `rejected/`.

    Args:
        path: the table.
        format: a name in `FORMATS`, or "auto" to tell it by its columns.
        root: where relative media paths start; default the table's folder.
        verify: decode every image and clip now (in threads), and drop the rows where one fails, caption and all.
        dimension: keep this dimension alone, and drop the rows that were not judged on it. Of several, keep the rows
            that were judged on one of them, whole.

    Raises:
        ValueError: no such file, an empty table, no rows left, an unknown format, or a column missing (the message
            lists the columns that are there, and the nearest name).
    """
    records, adapter = _open(Path(path), format, root)
    kept: list[PreferenceRow] = []
    dropped: list[Dropped] = []
    for outcome in adapter.rows(records):
        if isinstance(outcome, PreferenceRow) and dimension is not None:
            outcome = _only(outcome, dimension) if isinstance(dimension, str) else _one_of(outcome, dimension)
        if isinstance(outcome, PreferenceRow):
            kept.append(outcome)
        else:
            dropped.append(outcome)
    if verify:
        kept, undecodable = verified(kept, lambda row: row.media)
        dropped += undecodable
    table = PreferenceTable(kept, dropped)
    report(path, bool(kept), dropped, table.summary())
    return table


def captioned(path: str | Path, root: str | Path | None = None, verify: bool = True) -> CaptionedTable:
    """Read a media table (as `read_media_table`) for fine-tuning: its rows with a prompt, undecodable media dropped.

    Raises ValueError as `read_media_table` does, for a table without a `prompt` column, and when no row can be used.
    """
    held = columns(path)
    if "prompt" not in held:
        raise ValueError(missing_columns(Path(path), ["prompt"], sorted(held), "fine-tuning"))
    kept: list[Captioned] = []
    dropped: list[Dropped] = []
    for row in read_media_table(path, root):
        origin = f"{Path(path).name} sample {row.sample}"
        media = MediaRef(row.media) if isinstance(row.media, str) else row.media
        if row.prompt:
            kept.append(Captioned(row.prompt, media, origin))
        else:
            dropped.append(Dropped(origin, "no prompt", "the prompt is empty"))
    if verify:
        kept, undecodable = verified(kept, lambda row: (row.media,))
        dropped += undecodable
    table = CaptionedTable(kept, dropped)
    report(path, bool(kept), dropped, table.summary())
    return table


def report(path: str | Path, usable: bool, dropped: Sequence[Dropped], summary: str) -> None:
    """Log what was kept and dropped; ValueError, with the first reasons, where nothing is usable."""
    if not usable:
        details = "; ".join(f"{each.origin}: {each.detail}" for each in dropped[:3] if each.detail)
        raise ValueError(f"{path}: no row can be used, {summary}{f' [{details}]' if details else ''}")
    _log.info("%s: %s", path, summary)
    for reason, first in {each.reason: each for each in reversed(dropped) if each.detail}.items():
        _log.info("%s, for example: %s: %s", reason, first.origin, first.detail)


def _open(path: Path, format: str, root: str | Path | None) -> tuple[Records, Adapter]:
    if format not in ("auto", *ADAPTERS):
        raise ValueError(f"unknown preference format {format!r}; there are auto, {', '.join(ADAPTERS)}")
    joined = path.is_dir() and (path / "chosen").is_dir() and (path / "rejected").is_dir()
    if format == "folder" or (format == "auto" and joined):
        return _joined_folders(path, joined), ADAPTERS["folder"]
    if format == "videodpo" or (format == "auto" and path.is_dir() and videodpo_files(path)):
        return videodpo_records(path, root), ADAPTERS["videodpo"]
    records = read_records(path, root)
    if format != "auto":
        needs = ADAPTERS[format].needs
        if not any(set(each) <= set(records.columns) for each in needs):
            closest = min(needs, key=lambda each: len(set(each) - set(records.columns)))
            raise ValueError(missing_columns(path, closest, records.columns, f"format {format!r}"))
        return records, ADAPTERS[format]
    for name, adapter in ADAPTERS.items():
        if name == "videodpo" and set(adapter.needs[0]) <= set(records.columns):
            return videodpo_records(path, root), adapter  # the numbers in it mean places in another file
        if name != "folder" and any(set(each) <= set(records.columns) for each in adapter.needs):
            return records, adapter
    known = [(name, each) for name, adapter in ADAPTERS.items() if name != "folder" for each in adapter.needs]
    name, closest = max(known, key=lambda item: len(set(item[1]) & set(records.columns)) / len(item[1]))
    problem = missing_columns(path, closest, records.columns, f"the nearest known format, {name!r},")
    raise ValueError(f"{problem} Formats: {', '.join(ADAPTERS)}.")


def _joined_folders(path: Path, joined: bool) -> Records:
    """A record per line of metadata.jsonl, and one without a prompt for each chosen file that it does not mention."""
    table = path / "metadata.jsonl"
    if not joined or not table.is_file():
        raise ValueError(f"{path} is no preference folder; it needs chosen/, rejected/ and metadata.jsonl")
    records = read_records(table)
    if missing := {"file_name", "prompt"} - set(records.columns):
        raise ValueError(missing_columns(table, sorted(missing), records.columns, "format 'folder'"))
    rows = list(records)
    named = {row.values.get("file_name") for row in rows}
    files = (file for file in sorted((path / "chosen").iterdir()) if file.is_file() and file.name not in named)
    rows += [Record({"file_name": file.name}, f"chosen/{file.name}", table, -1, path) for file in files]
    return Records(path, records.columns, rows)


def _only(row: PreferenceRow, dimension: str) -> PreferenceRow | Dropped:
    names = row.dimensions()
    if dimension not in names:
        return Dropped(row.origin, f"not judged on {dimension!r}", f"it is judged on {', '.join(names)}")
    scores = {dimension: row.scores[dimension]} if row.scores else None
    label = {dimension: row.label[dimension]} if row.label else None
    return replace(row, scores=scores, label=label)


def _one_of(row: PreferenceRow, dimensions: Sequence[str]) -> PreferenceRow | Dropped:
    names = row.dimensions()
    if not set(names) & set(dimensions):
        return Dropped(row.origin, f"not judged on {' or '.join(dimensions)}", f"it is judged on {', '.join(names)}")
    return row


# ------------------------------------------------------------------------------------------------ verification


class _Placed(Protocol):
    @property
    def origin(self) -> str: ...


_Row = TypeVar("_Row", bound=_Placed)


def verified(rows: list[_Row], media: Callable[[_Row], Sequence[MediaRef]]) -> tuple[list[_Row], list[Dropped]]:
    """Rows whose media all decode, and the others: whole rows, so that no caption is left with another's pictures."""
    problems: dict[MediaRef, str | None] = {}  # data sets show one image in many pairs

    def fault(row: _Row) -> Dropped | None:
        for ref in media(row):
            if ref not in problems:
                problems[ref] = _problem(ref)
            problem = problems[ref]
            if problem is not None:
                where = ref.name if ref.row is not None else f"{row.origin} {ref.name}"
                return Dropped(where, f"undecodable {'clip' if _moves(ref) else 'image'}", problem)
        return None

    kept: list[_Row] = []
    dropped: list[Dropped] = []
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        chunks = (rows[start : start + 256] for start in range(0, len(rows), 256))  # few futures at a time
        faults = (each for chunk in chunks for each in pool.map(fault, chunk))
        for row, found in zip(rows, track(faults, "checking media", len(rows)), strict=True):
            if found is None:
                kept.append(row)
            else:
                dropped.append(found)
    return kept, dropped


def _problem(ref: MediaRef) -> str | None:
    try:
        check_media(ref)
    except MediaError as error:
        return error.problem
    return None


def _moves(ref: MediaRef) -> bool:
    return ref.path is not None and ref.path.suffix.lower() in VIDEO_SUFFIXES


# ------------------------------------------------------------------------------------------------ writing


def write_preferences(path: str | Path, rows: Sequence[PreferenceRow]) -> None:
    """Write `rows` in mmalign's own form (.jsonl), whole or not at all; `read_preferences` gives equal rows back.

    Media inside parquet stays there and is written as where it is. What is said of resampling is a record, and not
    read again. ValueError for no rows or another suffix.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl" or not rows:
        raise ValueError(f"{path}: preferences are written as .jsonl, and at least one row")
    home = os.path.abspath(path.parent)
    items = []
    for row in rows:
        media = [portable(ref, home) for ref in row.media]
        judged = {"scores": row.scores, "rank": row.rank, "label": row.label}
        known = {"user_id": row.user_id, "source": row.source, "weight": row.weight if row.weight != 1.0 else None}
        prompt = {"prompt": row.prompt} if row.prompts is None else {"prompts": list(row.prompts)}
        clips: dict[str, Any] = {"fps": row.fps, "num_frames": row.num_frames, "models": row.models}
        clips["resampled"] = row.resampled and [asdict(one) for one in row.resampled]
        values = {**prompt, "media": media, **judged, **known, **clips}
        items.append({name: value for name, value in values.items() if value is not None})
    write_json_lines(path, items)
