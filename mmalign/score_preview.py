"""`mmalign score --dry-run`: what a run would decode, load and compute, how often, and why; nothing is loaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmalign.evaluation import BackboneSpec, resolve_dtype
from mmalign.jobs import ScoreConfig
from mmalign.results import WHOLE_SET
from mmalign.score_plan import Item, Job, Plan, set_key, to_do
from mmalign.score_store import Store
from mmalign.weights import count_numbers, weight_files_of

__all__ = ["Evaluation", "Network", "Preview", "preview", "show"]

LIKENESS = ("sample", "evaluator", "status", "key", "media_hash", "params_hash", "weight_hash", "evaluator_version")
SHOWN = 5


@dataclass(frozen=True)
class Network:
    """A network that would be loaded, once for all evaluators that ask for the same.

    Attributes:
        name: what the evaluators call it.
        loader: the function that reads it.
        files: its weight files, by path, and their sizes in bytes.
        numbers: how many its tensors hold, by the files' headers; None where they do not say.
        memory: bytes of these numbers in the config's dtype. What the passes need comes on top.
        evaluators: labels of those that share it.
    """

    name: str
    loader: str
    files: dict[str, int]
    numbers: int | None
    memory: int | None
    evaluators: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """What one evaluator would do.

    Attributes:
        whole_set: whether it gives one score for all items.
        done: results that are there already.
        to_do: number of results to compute by why they are not there.
        skipped: number of items that it does not score, by reason.
    """

    evaluator: str
    whole_set: bool
    done: int
    to_do: dict[str, int]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Preview:
    """A run that has not taken place.

    Attributes:
        items: rows of the table.
        decoded: items that are decoded for evaluators of single items, once each whatever their number.
        decoded_for_sets: items that are decoded once more, for evaluators of the whole set.
        results: how many of these evaluators' results are computed from what is decoded.
        batches: with something to do.
        unreadable: items that cannot be read, by their first few reasons.
        n_unreadable: how many.
        processes: scoring processes, each of which loads the networks.
    """

    table: str
    output: str
    engine: str
    processes: int
    dtype: str
    items: int
    n_unreadable: int
    unreadable: dict[str, str]
    decoded: int
    decoded_for_sets: int
    results: int
    batches: int
    evaluators: tuple[Evaluation, ...]
    networks: tuple[Network, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def preview(plan: Plan, config: ScoreConfig) -> Preview:
    """What `mmalign.score.run` would do with this plan and what its results folder holds."""
    store = Store(config.output)
    done = store.done()
    todo = to_do(plan, done)
    former = _former(store)
    evaluations = tuple(_evaluation(plan, job, config, done, former) for job in plan.jobs)
    busy = [job for job, each in zip(plan.jobs, evaluations, strict=True) if each.to_do]
    wanted = [(index, jobs) for batch in todo for index, jobs in batch]
    bad = [item for item in plan.items if item.problem is not None]
    sets = any(job.is_set for job in busy)
    return Preview(
        table=str(config.source),
        output=str(config.output),
        engine=config.engine,
        processes=config.processes,
        dtype=config.dtype,
        items=len(plan.items),
        n_unreadable=len(bad),
        unreadable={item.row.sample: str(item.problem) for item in bad[:SHOWN]},
        decoded=sum(plan.items[i].problem is None and any(job.sees for job in jobs) for i, jobs in wanted),
        decoded_for_sets=len(plan.items) - len(bad) if sets else 0,
        results=sum(len(jobs) for _, jobs in wanted),
        batches=len(todo),
        evaluators=evaluations,
        networks=_networks(busy, config.dtype),
    )


# ------------------------------------------------------------------------------------------------ why


def _former(store: Store) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What is known already, by (name of the evaluator, sample)."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in store.read([*LIKENESS, "dtype", "prompt"]).to_pylist():
        rows.setdefault((row["evaluator"].partition("[")[0], row["sample"]), []).append(row)
    return rows


def _evaluation(
    plan: Plan,
    job: Job,
    config: ScoreConfig,
    done: set[tuple[str, str]],
    former: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
) -> Evaluation:
    settled, why, skipped = 0, Counter[str](), Counter[str]()
    if job.is_set:
        key = set_key(plan, job)
        settled = int((WHOLE_SET, key) in done)
        if not settled:
            why[_why(job, None, key, config.dtype, former.get((job.name, WHOLE_SET), ()))] += 1
        return Evaluation(job.label, True, settled, dict(why), {})
    for item, key in zip(plan.items, plan.keys[plan.jobs.index(job)], strict=True):
        reason = plan.skip_reason(job, item)
        if not plan.asks(job, item):
            continue
        if reason is not None:
            skipped[reason] += 1
        elif (item.row.sample, key) in done:
            settled += 1
        else:
            why[_why(job, item, key, config.dtype, former.get((job.name, item.row.sample), ()))] += 1
    return Evaluation(job.label, False, settled, dict(why.most_common()), dict(skipped.most_common()))


def _why(job: Job, item: Item | None, key: str, dtype: str, former: Sequence[Mapping[str, Any]]) -> str:
    """Why a result is not there, by the earlier one that it differs from in the fewest things."""
    if not former:
        return "new"
    if any(row["key"] == key for row in former):
        return "failed before"
    rest = "other items in the set" if item is None else "another reference, response, frame rate or further column"
    fewest = min((_changes(job, item, dtype, row) for row in former), key=len)
    return ", ".join(fewest) or rest


def _changes(job: Job, item: Item | None, dtype: str, row: Mapping[str, Any]) -> list[str]:
    changed = {
        "the media changed": item is not None and job.sees and row["media_hash"] != item.media_hash,
        "the prompt changed": item is not None and "prompt" in job.cls.needs and row["prompt"] != item.row.prompt,
        "other parameters": row["params_hash"] != job.params_hash,
        "the weights changed": row["weight_hash"] != job.weight_hash,
        "the evaluator has a new version": row["evaluator_version"] != job.cls.version,
        "another precision": row["dtype"] != dtype,
    }
    return [name for name, yes in changed.items() if yes]


# ------------------------------------------------------------------------------------------------ networks


def _networks(jobs: Sequence[Job], dtype: str) -> tuple[Network, ...]:
    users: dict[BackboneSpec, tuple[str, list[str]]] = {}
    for job in jobs:
        for name, spec in job.cls.backbone_specs(job.params).items():
            users.setdefault(spec, (name, []))[1].append(job.label)
    return tuple(_network(spec, name, labels, dtype) for spec, (name, labels) in users.items())


def _network(spec: BackboneSpec, name: str, labels: Sequence[str], dtype: str) -> Network:
    values = [value for _, value in spec.arguments if isinstance(value, str | Path)]
    # A folder beside a file says what the network is, and may hold other checkpoints too.
    places = [value for value in values if Path(value).is_file()] or values
    files = dict.fromkeys(file for value in places for file in weight_files_of(value))
    counts = [count_numbers(file) for file in files]
    numbers = sum(count for count in counts if count is not None) if files and None not in counts else None
    memory = None if numbers is None else numbers * resolve_dtype(dtype).itemsize
    sizes = {str(file): file.stat().st_size for file in files}
    return Network(name, spec.loader.__name__, sizes, numbers, memory, tuple(dict.fromkeys(labels)))


# ------------------------------------------------------------------------------------------------ for people


def show(found: Preview) -> None:
    """Print the preview as tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(f"{found.table}: {found.items} items -> {found.output}", markup=False, highlight=False)
    for line in _sentences(found):
        console.print(f"  {line}", markup=False, highlight=False)
    evaluators = Table("evaluator", "done", "to do", "why", "skipped", title="results", title_justify="left")
    for each in found.evaluators:
        name = f"{each.evaluator} (whole set)" if each.whole_set else each.evaluator
        to_do, skipped = sum(each.to_do.values()), sum(each.skipped.values())
        left_out = f"{skipped}: {_reasons(each.skipped)}" if skipped else ""
        cells = [name, str(each.done), str(to_do), _reasons(each.to_do), left_out]
        evaluators.add_row(*(Text(cell) for cell in cells))
    console.print(evaluators)
    where = f", in each of {found.processes} processes" if found.processes > 1 else ""
    title = f"networks to load, once each{where}"
    networks = Table(title=title, title_justify="left")
    for heading in ("network", "for", "files", "on disk", f"in {found.dtype}"):
        networks.add_column(heading, overflow="fold")
    for network in found.networks:
        disk = sum(network.files.values())
        memory = "unknown" if network.memory is None else _size(network.memory)
        cells = [network.name, "\n".join(network.evaluators), "\n".join(network.files), _size(disk), memory]
        networks.add_row(*(Text(cell) for cell in cells))
    if found.networks:
        console.print(networks)


def _sentences(found: Preview) -> list[str]:
    lines = [
        f"{found.decoded} to decode, once each, for {found.results} results in {found.batches} batches"
        if found.results
        else "nothing to compute item by item"
    ]
    if found.decoded_for_sets:
        lines.append(f"{found.decoded_for_sets} to decode once more, for evaluators that see the whole set")
    if found.n_unreadable:
        lines.append(f"{found.n_unreadable} cannot be read and become errors, among them:")
        lines += [f"  {problem}" for problem in found.unreadable.values()]
    return lines


def _reasons(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return "\n".join(f"{count} {reason}" for reason, count in counts.items())


def _size(count: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.3g} {unit}"
    return f"{math.ceil(count)} B"
