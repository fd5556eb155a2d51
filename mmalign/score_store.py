"""Scores on disk: long parquet, a row per (sample, evaluator, sub-score), appended part by part and never rewritten in
place.

``parts/`` holds the results of the last config on the last table; ``earlier/`` keeps what other configs or tables left,
so that it need not be computed again. A part appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmalign.errors import Stopped
from mmalign.results import read_parts
from mmalign.source import well_formed

__all__ = ["SCHEMA", "Store"]

SCHEMA = pa.schema(
    [
        ("sample", pa.string()),
        ("prompt", pa.string()),
        ("media", pa.string()),
        ("modality", pa.string()),
        ("group", pa.string()),
        ("seed", pa.int64()),
        ("model", pa.string()),
        ("response", pa.string()),
        ("evaluator", pa.string()),
        ("subscore", pa.string()),
        ("score", pa.float64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("note", pa.string()),
        ("seconds", pa.float64()),
        ("prompt_truncated", pa.bool_()),
        ("evaluator_version", pa.int64()),
        ("params", pa.string()),
        ("params_hash", pa.string()),
        ("weight_hash", pa.string()),
        ("dtype", pa.string()),
        ("decoder", pa.string()),
        ("media_hash", pa.string()),
        ("key", pa.string()),
    ]
)
"""Columns of every part. ``status`` is ok, skipped or error; ``reason`` says why where it is not ok; ``note`` is what
the evaluator wrote down of the item."""

PATIENCE = 90.0
"""Seconds; NFS looks for new files once a minute."""
NEEDED = ("sample", "key", "status", "score")


class Store:
    """A results folder that scores are appended to."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.parts, self.earlier = self.folder / "parts", self.folder / "earlier"

    def create(self) -> None:
        """Make the folders, and clear away what a killed run had half written."""
        for folder in (self.parts, self.earlier):
            folder.mkdir(parents=True, exist_ok=True)
        self._clear()

    def _clear(self) -> None:
        for pattern in ("*/.part-*.tmp", ".attempt-*"):
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)

    def append(self, rows: Sequence[Mapping[str, Any]], rank: int = 0) -> None:
        """Write rows as one more part.

        Raises:
            OSError: the disk is full or cannot be written to; nothing half-written is left.
        """
        if rows:
            held = [{name: well_formed(v) if isinstance(v, str) else v for name, v in row.items()} for row in rows]
            self._write(pa.Table.from_pylist(held, schema=SCHEMA), self.parts, rank)

    def done(self) -> set[tuple[str, str]]:
        """(sample, key) of everything that is settled; errors are not, so that they are tried again."""
        table = self.read(["sample", "key", "status"])
        columns = (table.column(name).to_pylist() for name in ("sample", "key", "status"))
        return {(sample, key) for sample, key, status in zip(*columns, strict=True) if status != "error"}

    def settle(self, wanted: Mapping[tuple[str, str], str]) -> pa.Table:
        """Leave exactly the wanted results in ``parts/``, one row per (sample, evaluator, sub-score), the rest in
        ``earlier/``.

        An item that failed gets a row for each sub-score that its evaluator gave elsewhere, so that no sub-score's
        denominator shrinks unseen.

        Args:
            wanted: (sample, key) of every result, in the order in which they shall stand, and the evaluator's label,
                which an earlier version may have written otherwise.

        Returns:
            The wanted rows.

        Raises:
            Stopped: some are not there, which were written by another machine.
            OSError: as `append`.
        """
        old, table = self._whole(wanted)
        current, rest = _choose(table, tuple(wanted))
        chosen = _spread_failures(_named(table.take(pa.array(current, pa.int64())), wanted))
        self._write(table.take(pa.array(rest, pa.int64())), self.earlier, 0)
        self._write(chosen, self.parts, 0)
        for file in old:
            file.unlink()
        self._clear()  # of a process that was killed while the others went on
        return chosen

    def _whole(self, wanted: Collection[tuple[str, str]]) -> tuple[list[Path], pa.Table]:
        """All parts and rows, once the wanted are among them: a shared disk shows other machines' parts a while later.

        Without them an evaluator would seem to have been asked about fewer items, and nothing would say so.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            files, table = self._read(None)
            pairs = (table.column(name).to_pylist() for name in ("sample", "key"))
            absent = set(wanted) - set(zip(*pairs, strict=True))
            if not absent:
                return files, table
            if time.monotonic() > deadline:
                raise Stopped(
                    f"{len(absent)} results that were computed cannot be seen in {self.folder}. Do all machines share "
                    "this folder? The same command computes what is missing."
                )
            time.sleep(0.5)

    def _files(self) -> list[Path]:
        found = [*self.parts.glob("part-*.parquet"), *self.earlier.glob("part-*.parquet")]
        return sorted(found, key=lambda file: file.name)

    def read(self, columns: list[str] | None = None) -> pa.Table:
        """All rows of the folder, other configs' too, oldest part first. ValueError for a part that is damaged."""
        return self._read(columns)[1]

    def _read(self, columns: list[str] | None) -> tuple[list[Path], pa.Table]:
        def rows(file: Path) -> pa.Table:
            table = _without_broken(pq.read_table(file, columns=columns and [*{*columns, *NEEDED}]))
            return table.select([name for name in columns if name in table.column_names]) if columns else table

        found = read_parts(self._files, rows)
        names = SCHEMA.names if columns is None else columns
        empty = pa.schema([SCHEMA.field(name) for name in names]).empty_table()
        whole = pa.concat_tables([empty, *(table for _, table in found)], promote_options="default")
        return [file for file, _ in found], whole.combine_chunks()

    def _write(self, table: pa.Table, folder: Path, rank: int) -> None:
        if not table.num_rows:
            return
        name = f"part-{time.time_ns():020d}-{rank:03d}-{os.getpid()}"
        temporary = folder / f".{name}.tmp"
        try:
            with open(temporary, "wb") as file:
                pq.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / f"{name}.parquet")
        except OSError as error:
            with contextlib.suppress(OSError):  # what cannot be written may refuse this too; `error` is the cause
                temporary.unlink(missing_ok=True)
            message = f"Scores cannot be written to {folder} ({error.strerror or error}). Make room, then run the same "
            raise OSError(error.errno, message + "command again: finished rows are kept.") from error


def _without_broken(part: pa.Table) -> pa.Table:
    """Without results that have a sub-score of NaN, which is computed again: 0.1 kept them where a set had one."""
    broken = pc.and_(pc.equal(part["status"], "ok"), pc.invert(pc.is_finite(part["score"])))
    if not pc.any(broken).as_py():
        return part
    bad = part.filter(broken)
    bad = set(zip(bad["sample"].to_pylist(), bad["key"].to_pylist(), strict=True))
    pairs = zip(part["sample"].to_pylist(), part["key"].to_pylist(), strict=True)
    return part.filter(pa.array([pair not in bad for pair in pairs]))


def _choose(table: pa.Table, wanted: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Row numbers of the wanted results and of all others; of several for one sub-score the last counts."""
    samples, keys = table.column("sample").to_pylist(), table.column("key").to_pylist()
    status, names = table.column("status").to_pylist(), table.column("subscore").to_pylist()
    pairs: dict[tuple[str, str], dict[str, int]] = {}
    for number, pair in enumerate(zip(samples, keys, strict=True)):
        seen = pairs.setdefault(pair, {})
        settled = [other for other in seen.values() if status[other] != "error"]
        if status[number] == "error" and settled:
            continue
        if status[number] != "error" and seen and not settled:
            seen.clear()  # it failed before and works now
        seen[names[number]] = number
    order = {pair: place for place, pair in enumerate(wanted)}
    current: list[int] = []
    rest: list[int] = []
    for pair, seen in pairs.items():
        (current if pair in order else rest).extend(seen.values())
    current.sort(key=lambda number: (order[samples[number], keys[number]], names[number]))
    return current, rest


def _named(table: pa.Table, labels: Mapping[tuple[str, str], str]) -> pa.Table:
    pairs = zip(table.column("sample").to_pylist(), table.column("key").to_pylist(), strict=True)
    place = SCHEMA.get_field_index("evaluator")
    return table.set_column(place, "evaluator", pa.array([labels[pair] for pair in pairs], pa.string()))


def _spread_failures(table: pa.Table) -> pa.Table:
    rows = table.select(["evaluator", "subscore", "status"]).to_pylist()
    names: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] == "ok" and row["subscore"] not in names.setdefault(row["evaluator"], []):
            names[row["evaluator"]].append(row["subscore"])
    take: list[int] = []
    subscore: list[str] = []
    seen: set[tuple[str, str]] = set()
    samples = table.column("sample").to_pylist()
    for number, row in enumerate(rows):
        known = names.get(row["evaluator"], [])
        if row["status"] == "ok" or not known:
            take.append(number)
            subscore.append(row["subscore"])
        elif (row["evaluator"], samples[number]) not in seen:
            # Once per item: an earlier run may have spread this failure already.
            seen.add((row["evaluator"], samples[number]))
            take += [number] * len(known)
            subscore += known
    result = table.take(pa.array(take, pa.int64()))
    place = SCHEMA.get_field_index("subscore")
    return result.set_column(place, "subscore", pa.array(subscore, pa.string()))
