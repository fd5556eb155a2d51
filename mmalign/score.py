"""`mmalign score`: plan, skip what is done, score in one or several processes, settle, summarise.

A results folder holds ``parts/`` (long parquet), ``earlier/`` (results of other configs, kept for reuse),
``summary.json`` and ``run.json``. Killing a run loses at most the batches in work; the same command then computes only
what is missing.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch

from mmalign import __version__
from mmalign.compiling import check_inductor
from mmalign.evaluation import resolve_device
from mmalign.jobs import ScoreConfig
from mmalign.locks import alone_in, refuse_if_busy
from mmalign.media import decoder_fingerprint
from mmalign.progress import Progress
from mmalign.results import WHOLE_SET
from mmalign.score_answers import answer, answer_rows
from mmalign.score_figures import add_figures
from mmalign.score_plan import Plan, Todo, make_jobs, make_plan, set_key, to_do
from mmalign.score_processes import Advance, Ranks, score_in_processes
from mmalign.score_ray import check_ray, score_with_ray
from mmalign.score_sets import score_sets
from mmalign.score_shares import share_out
from mmalign.score_store import Store
from mmalign.score_summary import summarise
from mmalign.score_vbench import rows_of, specs
from mmalign.score_vbench_results import write
from mmalign.score_worker import Scorer, row_of

__all__ = ["plan_for", "run"]


def run(config: ScoreConfig, *, plugins: bool = True, launched: bool = False) -> Path:
    """Score a media table and return the results folder.

    Args:
        config: table, evaluators, output folder, batch size, processes, device and precision.
        plugins: whether evaluators of other installed packages may be named.
        launched: whether this is called in every process that `accelerate launch` or `torchrun` started, if it was one
            of these that started this one: they share the batches, and rank 0 settles and summarises.

    Raises:
        ValueError: before any weights are loaded, if an evaluator, a parameter, a weight file or a column that is
            needed is missing, the table is empty or unreadable, or another run works in the results folder. After
            loading, if a checkpoint does not fit.
        OSError: the results cannot be written.
        Stopped: a process died or could not go on; finished rows are kept.
        KeyboardInterrupt: after Ctrl-C, saying that finished rows are kept.
        SystemExit: in ranks other than 0, where rank 0 has an error to tell.
    """
    try:
        return _run_here(config, plugins, launched)
    except KeyboardInterrupt:
        kept = f"finished rows are kept in {config.output}; the same command goes on from there"
        raise KeyboardInterrupt(kept) from None


def _run_here(config: ScoreConfig, plugins: bool, launched: bool) -> Path:
    if not (launched and Ranks.launched()):
        return _run(config, plugins, None)
    if config.processes > 1 or config.engine != "local":
        raise ValueError(
            "a launcher has started the processes that score; leave processes at 1 and engine at local, or call "
            "`mmalign score` without it"
        )
    with Ranks() as ranks:
        if ranks.rank == 0:
            return _run(config, plugins, ranks)
        prepared = ranks.from_first(None)
        if prepared is None:
            raise SystemExit(1)  # rank 0 says why
        plan, shares = prepared
        ranks.score(plan, shares[ranks.rank], config, lambda count: None)
        return config.output


def plan_for(config: ScoreConfig, plugins: bool = True) -> Plan:
    """What there is to score: evaluators checked, media hashed, batches laid out. ValueError as in `run`."""
    resolve_device(config.device)
    if config.compile:
        check_inductor("compile", "leave compile out")
    if config.engine == "ray":
        check_ray()
    jobs = make_jobs(specs(config, plugins), plugins)
    rows = answer_rows(config) if config.benchmark else rows_of(config)
    return make_plan(jobs, rows, config.source, config.batch_size, config.dtype)


def _run(config: ScoreConfig, plugins: bool, ranks: Ranks | None) -> Path:
    started = time.time()
    store = Store(config.output)
    todo: list[Todo] | None = None
    shares: list[list[Todo]] | None = None
    with ExitStack() as held:
        try:
            refuse_if_busy(config.output)
            if ranks and config.benchmark and config.benchmark.model:
                raise ValueError("benchmark.model answers in one process; call `mmalign score` without the launcher")
            if config.benchmark:
                make_jobs(specs(config, plugins), plugins)  # a mistake in these costs no answers
                answer(config)
            plan = plan_for(config, plugins)
            held.enter_context(alone_in(config.output, "mmalign score"))  # only now: a mistake leaves no folder behind
            store.create()
            done = store.done()
            _mark_skipped(plan, store, done, config.dtype)
            todo = to_do(plan, done)
            shares = share_out(plan, todo, ranks.number) if ranks else None
        finally:
            if ranks:
                ranks.from_first(None if shares is None else (plan, shares))
        total = sum(len(wanted) for batch in todo for _, wanted in batch)
        mine = todo if shares is None else shares[0]
        with Progress("scoring", total) as progress:
            _compute(plan, mine, config, ranks, _counter(progress))
        score_sets(plan, config, store, done)
        _finish(plan, config, store, started, total)
    return store.folder


def _compute(plan: Plan, todo: list[Todo], config: ScoreConfig, ranks: Ranks | None, advance: Advance) -> None:
    """Everything that is scored item by item, by whichever engine was asked for; of a launch, this rank's share."""
    if ranks:
        ranks.score(plan, todo, config, lambda count: advance(count * ranks.number))  # the others are about as far
    elif config.engine == "ray" and todo:
        score_with_ray(plan, todo, config, advance)
    elif config.processes > 1 and len(todo) > 1:
        score_in_processes(plan, todo, config, advance)
    else:
        with closing(Scorer(plan, config)) as scorer:
            for count in scorer.score(todo):
                advance(count)


def _counter(progress: Progress) -> Advance:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done)

    return advance


def _mark_skipped(plan: Plan, store: Store, done: set[tuple[str, str]], dtype: str) -> None:
    rows = []
    for job, keys in zip(plan.jobs, plan.keys, strict=True):
        for index, item in enumerate(plan.items):
            reason = None if job.is_set or not plan.asks(job, item) else plan.skip_reason(job, item)
            if reason is not None and (item.row.sample, keys[index]) not in done:
                rows.append(row_of(plan, job, index, dtype, "", reason=reason, skipped=True))
    store.append(rows)


def _finish(plan: Plan, config: ScoreConfig, store: Store, started: float, computed: int) -> None:
    wanted: dict[tuple[str, str], str] = {}
    for job, keys in zip(plan.jobs, plan.keys, strict=True):
        if job.is_set:
            wanted[WHOLE_SET, set_key(plan, job)] = job.label
        else:
            asked = ((item, key) for item, key in zip(plan.items, keys, strict=True) if plan.asks(job, item))
            wanted |= {(item.row.sample, key): job.label for item, key in asked}
    table = store.settle(wanted)
    shared = {"table": str(config.source), "n_rows": len(plan.items), "dtype": config.dtype}
    figures = summarise(table, plan.jobs)
    add_figures(figures, table, plan, store.folder)
    _write_json(store.folder / "summary.json", {**shared, "evaluators": figures, "decoder": decoder_fingerprint()})
    seconds = round(time.time() - started, 3)
    versions = _versions()
    about = {"config": config.model_dump(mode="json"), "computed": computed, "seconds": seconds, **versions}
    about["device"] = str(resolve_device(config.device))
    _write_json(store.folder / "run.json", about)
    if config.vbench:
        write(plan, config, table, versions["versions"])


def _versions() -> dict[str, Any]:
    names = ("torch", "torchvision", "open_clip_torch", "transformers", "numpy", "pillow", "av", "decord", "pyarrow")
    installed: dict[str, str | None] = {}
    for name in names:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"mmalign": __version__, "python": platform.python_version(), "versions": installed, "gpu": gpu}


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a path may be no UTF-8
    os.replace(temporary, path)
