"""What there is to score, known before any weights are loaded: evaluators checked, media hashed, batches laid out.

Each pair of an item and an evaluator has a key, a hash of everything that decides the score. Results are found again by
it, so that a second run computes only what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.config import Strict
from mmalign.discovery import configured
from mmalign.evaluation import PIXELS, Evaluator, SetEvaluator
from mmalign.media import MediaError
from mmalign.media_folder import how_to_prompt
from mmalign.score_media import media_hashes
from mmalign.score_params import further_paths, label_of, params_text
from mmalign.source import Source, well_formed
from mmalign.tables import MediaRow
from mmalign.weights import all_missing, files_hash, how_to_get

__all__ = ["VIDEO_SHARE", "Item", "Job", "Plan", "Todo", "digest", "make_jobs", "make_plan", "set_key", "to_do"]

VIDEO_SHARE = 16
"""A batch of videos has this many times fewer items than one of images, since each brings many frames."""


@dataclass(frozen=True)
class Job:
    """One evaluator of the config, its parameters and weight files checked, nothing loaded.

    Attributes:
        label: as results name it: the name, and those parameters in brackets that are not at their default.
        params_text: the parameters as canonical JSON without places of files, since it is their content that counts.
        weight_hash: sha256 over the weight files; None where there are none.
    """

    label: str
    name: str
    cls: type[Evaluator] | type[SetEvaluator]
    params: Strict
    params_text: str
    weight_hash: str | None

    @property
    def params_hash(self) -> str:
        """sha256 of the parameters, 64 hex digits."""
        return hashlib.sha256(self.params_text.encode()).hexdigest()

    @property
    def sees(self) -> bool:
        """Whether it looks at pixels; otherwise its items' media are neither hashed for its keys nor decoded."""
        return bool(PIXELS & set(self.cls.needs))

    @property
    def is_set(self) -> bool:
        """Whether it scores the whole set at once."""
        return issubclass(self.cls, SetEvaluator)


@dataclass(frozen=True)
class Item:
    """One row of the table, with the hashes of its media; ``problem`` says why it cannot be read.

    ``reference_problem`` says so of its reference, which only some evaluators look at.
    """

    row: MediaRow
    media_hash: str | None
    reference_hash: str | None
    problem: str | None
    reference_problem: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything to score.

    Attributes:
        jobs: the evaluators.
        items: in the table's order.
        keys: ``keys[job][item]``.
        batches: indices of items, of one modality each, equal prompts together. They depend on the table alone, however
            many processes share the work; of each, `to_do` leaves what was not computed before.
    """

    jobs: tuple[Job, ...]
    items: tuple[Item, ...]
    keys: tuple[tuple[str, ...], ...]
    batches: tuple[tuple[int, ...], ...]

    def asks(self, job: Job, item: Item) -> bool:
        """Whether the row is for this evaluator: it says so, or does not say for which it is."""
        return item.row.dimensions is None or job.name.partition("@")[0] in item.row.dimensions

    def skip_reason(self, job: Job, item: Item) -> str | None:
        """Why this evaluator does not score this item, or None."""
        row = item.row
        if row.modality not in job.cls.modality:
            what = "a row without media" if row.modality == "text" else f"a {row.modality}"
            return f"{job.name} scores {_kinds(job)}; this is {what}"
        absent = [need for need in sorted(_COLUMN_NEEDS & set(job.cls.needs)) if not _has(row, need)]
        if absent:
            why = row.aux.get("response_error") if "response" in absent else None
            return f"the row has no {', '.join(absent)}{f': {why}' if why else ''}"
        if "prompt" in job.cls.needs and well_formed(row.prompt) != row.prompt:
            return "the prompt holds half of a surrogate pair, which is no letter; write it again as UTF-8"
        return None


Todo = list[tuple[int, tuple[Job, ...]]]
"""A batch or a part of one: indices of items, each with the evaluators that want it."""


def to_do(plan: Plan, done: Collection[tuple[str, str]]) -> list[Todo]:
    """Batches with something left to do: for each item the evaluators that still want it.

    Args:
        done: (sample, key) of what is settled.
    """
    result = []
    for batch in plan.batches:
        wanted = [
            (
                index,
                tuple(
                    job
                    for job, keys in zip(plan.jobs, plan.keys, strict=True)
                    if not job.is_set
                    and plan.asks(job, plan.items[index])
                    and (plan.items[index].row.sample, keys[index]) not in done
                    and plan.skip_reason(job, plan.items[index]) is None
                ),
            )
            for index in batch
        ]
        wanted = [(index, jobs) for index, jobs in wanted if jobs]
        if wanted:
            result.append(wanted)
    return result


_COLUMN_NEEDS = frozenset({"prompt", "reference", "response", "aux"})


def _kinds(job: Job) -> str:
    names = {"image": "images", "video": "videos", "text": "rows without media"}
    return " and ".join(name for kind, name in names.items() if kind in job.cls.modality)


def make_jobs(specs: Sequence[tuple[str, Mapping[str, Any]]], plugins: bool = True) -> tuple[Job, ...]:
    """Check every evaluator's name, parameters and weight files.

    Args:
        specs: (name, parameters).

    Raises:
        ValueError: unknown names or parameters, missing files, or two that would have the same label.
    """
    named = [(name, *configured(name, values, plugins)) for name, values in specs]
    _check_weights(named)
    jobs: list[Job] = []
    for name, cls, params in named:
        files = cls.weight_files(params)
        weight_hash = files_hash(files)
        label = label_of(name, params, files, weight_hash)
        further = further_paths(params, files, cls.weight_files)
        job = Job(label, name, cls, params, params_text(params, files, further), weight_hash)
        if any(job.label == other.label for other in jobs):
            raise ValueError(
                f"Two evaluators of this config would both be called '{job.label}' in the results. Give them different "
                "parameters, or score them into two folders."
            )
        jobs.append(job)
    return tuple(jobs)


def _check_weights(named: Sequence[tuple[str, type[Evaluator] | type[SetEvaluator], Strict]]) -> None:
    """All files that are missing in one ValueError; where it is one alone, its own."""
    missing = [(name, each) for name, cls, params in named for each in all_missing(partial(cls.weight_files, params))]
    names = dict.fromkeys(each.known for _, each in missing)
    if len(names) == 1:
        raise missing[0][1]
    if not missing:
        return
    lines = [f"{len(names)} files of weights are missing:"]
    for known in names:
        users = dict.fromkeys(name for name, each in missing if each.known == known)
        found = next(each.found for _, each in missing if each.known == known)
        lines.append(f"  {known} (for {', '.join(users)}): {found}")
    raise ValueError("\n".join([*lines, *how_to_get(names)]))


def make_plan(jobs: tuple[Job, ...], rows: Sequence[MediaRow], table: str | Path, batch_size: int, dtype: str) -> Plan:
    """Hash the media and lay out the work.

    Raises:
        ValueError: the table is empty, a sample name occurs twice, or no row has a column that an evaluator needs.
    """
    if not rows:
        raise ValueError(f"{table} has no rows, so there is nothing to score.")
    names: set[str] = set()
    for row in rows:
        if row.sample in names:
            raise ValueError(f"{table}: the sample '{row.sample}' occurs twice; results are told apart by this name.")
        names.add(row.sample)
    _check_needs(jobs, rows, table)
    seen = rows if any(job.sees for job in jobs) else ()
    sources = (source for row in seen for source in (row.media, row.reference) if source)
    hashes = media_hashes(sources, table) if seen else {}
    items = tuple(_item(row, hashes) for row in rows)
    keys = tuple(tuple(_key(job, item, dtype) for item in items) for job in jobs)
    return Plan(jobs, items, keys, _batches(rows, batch_size))


def set_key(plan: Plan, job: Job) -> str:
    """The key of a whole set's score: that of all items that it is asked for, in any order."""
    keys = zip(plan.items, plan.keys[plan.jobs.index(job)], strict=True)
    return digest("set", sorted(key for item, key in keys if plan.asks(job, item)))


def digest(*parts: object) -> str:
    """sha256 of a list as canonical JSON."""
    return hashlib.sha256(_canonical(parts)).hexdigest()


def _canonical(parts: object) -> bytes:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return text.encode("utf-8", "surrogatepass")


def _check_needs(jobs: Sequence[Job], rows: Sequence[MediaRow], table: str | Path) -> None:
    present = [f.name for f in fields(MediaRow) if any(_has(row, f.name) for row in rows)]
    for job in jobs:
        absent = [need for need in sorted(_COLUMN_NEEDS & set(job.cls.needs)) if need not in present]
        if absent:
            raise ValueError(
                f"{job.name} needs the column{'s' if len(absent) > 1 else ''} {', '.join(absent)}; "
                f"{table} has {', '.join(present)}.{how_to_prompt(table) if 'prompt' in absent else ''}"
            )
        named = {name for row in rows for name in row.dimensions or ()}
        if named and job.name.partition("@")[0] not in named and all(row.dimensions for row in rows):
            raise ValueError(
                f"no row of {table} is for {job.name}: its column dimensions names {', '.join(sorted(named))}"
            )
        if not any(row.modality in job.cls.modality for row in rows):
            found = ", ".join(sorted({row.modality for row in rows}))
            raise ValueError(f"{job.name} scores {_kinds(job)}; every row of {table} is of modality {found}.")


def _has(row: MediaRow, column: str) -> bool:
    value = getattr(row, column)
    if column == "response":  # of which the empty one is an answer too
        return value is not None
    return bool(value.strip()) if isinstance(value, str) else value not in (None, {}, ())


def _item(row: MediaRow, hashes: Mapping[Any, str | MediaError]) -> Item:
    media, problem = _found(hashes, row.media)
    reference, reference_problem = _found(hashes, row.reference)
    return Item(row, media, reference, problem, reference_problem)


def _found(hashes: Mapping[Any, str | MediaError], source: Source | None) -> tuple[str | None, str | None]:
    """The hash of the content, or why there is none; neither of what nobody looks at."""
    found = hashes.get(source)
    return (None, str(found)) if isinstance(found, MediaError) else (found, None)


def _key(job: Job, item: Item, dtype: str) -> str:
    row, needs = item.row, {*job.cls.needs, *job.cls.may_read}
    return digest(
        job.name,
        job.cls.version,
        job.params_text,
        job.weight_hash,
        dtype,
        repr(job.cls.frames) if row.modality == "video" else "",
        (item.media_hash or f"unreadable {row.sample}") if job.sees else "",
        row.prompt if "prompt" in needs else "",
        _reference(item) if "reference" in needs else "",
        row.fps if "fps" in needs else "",
        row.aux if "aux" in needs else "",
        *([row.sample] if "sample" in needs else []),
        *([{"response": row.response}] if "response" in needs else []),
    )


def _reference(item: Item) -> str | None:
    """One that cannot be read is another thing than none: where there is none the row is skipped, which is settled."""
    return f"unreadable {item.row.sample}" if item.reference_problem is not None else item.reference_hash


def _batches(rows: Sequence[MediaRow], batch_size: int) -> tuple[tuple[int, ...], ...]:
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(row.prompt or "", index)
    order = sorted(range(len(rows)), key=lambda index: (rows[index].modality, first[rows[index].prompt or ""], index))
    batches: list[list[int]] = []
    for index in order:
        modality = rows[index].modality
        size = batch_size if modality != "video" else max(1, batch_size // VIDEO_SHARE)
        if not batches or len(batches[-1]) >= size or rows[batches[-1][0]].modality != modality:
            batches.append([])
        batches[-1].append(index)
    return tuple(tuple(batch) for batch in batches)
