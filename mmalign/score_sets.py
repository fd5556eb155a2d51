"""Evaluators of whole sets: all items in one process, since their statistics cannot be cut into rows.

One that fails, or whose score is no finite number, gets a row with the reason; the others go on.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch

from mmalign.evaluation import SetEvaluator
from mmalign.jobs import ScoreConfig
from mmalign.media import decoder_fingerprint
from mmalign.progress import Progress
from mmalign.results import WHOLE_SET
from mmalign.score_decode import Decoded, Decoder
from mmalign.score_plan import Item, Job, Plan, Todo, set_key
from mmalign.score_store import Store
from mmalign.score_worker import Row, Worker, make_batch, row_of

__all__ = ["score_sets"]


def score_sets(plan: Plan, config: ScoreConfig, store: Store, done: Collection[tuple[str, str]]) -> None:
    """Score the plan's evaluators of whole sets, and write their rows down.

    Args:
        done: (sample, key) of what is settled.

    Raises:
        ValueError: a checkpoint does not fit.
        OSError: the results cannot be written.
    """
    jobs = [job for job in plan.jobs if job.is_set and (WHOLE_SET, set_key(plan, job)) not in done]
    if not jobs:
        return
    found = _Sets(plan, Worker(plan, config.device, config.dtype, config.compile), jobs)
    todo = [
        [(index, tuple(job for job in jobs if _takes(plan, job, plan.items[index]))) for index in batch]
        for batch in plan.batches
    ]
    with Decoder(config, found.worker.device) as decoder, Progress("scoring sets", len(plan.items)) as progress:
        seen = 0
        for batch, decoded in decoder.stream(plan, todo):
            found.update(batch, decoded)
            seen += len(batch)
            progress.update(seen)
    for job in jobs:
        store.append(found.rows(job, config.dtype))


def _takes(plan: Plan, job: Job, item: Item) -> bool:
    return plan.asks(job, item) and plan.skip_reason(job, item) is None


class _Sets:
    """The evaluators, the items that could not be read for each, and what the evaluators themselves raised."""

    def __init__(self, plan: Plan, worker: Worker, jobs: list[Job]):
        self.plan, self.worker, self.jobs = plan, worker, jobs
        self.unreadable: dict[str, list[str]] = {job.label: [] for job in jobs}
        self.failures: dict[str, str] = {}

    @torch.no_grad()
    def update(self, batch: Todo, decoded: Mapping[int, Decoded]) -> None:
        """Show a batch to each evaluator that has not failed before: what it says after that is worth nothing."""
        for job in self.jobs:
            problems = {index: decoded[index].problem_for(job) for index, jobs in batch if job in jobs}
            self.unreadable[job.label] += [problem for problem in problems.values() if problem is not None]
            good = [index for index, problem in problems.items() if problem is None]
            if not good or job.label in self.failures:
                continue
            evaluator: SetEvaluator = self.worker.evaluator(job)
            try:
                evaluator.update(make_batch(self.plan, good, dict(decoded), job.cls.frames if job.sees else None))
            except Exception as error:  # becomes the row's reason, as for evaluators of single items
                self.failures[job.label] = f"{type(error).__name__}: {error}"
                torch.cuda.empty_cache()

    def rows(self, job: Job, dtype: str) -> list[Row]:
        """A row for each of the evaluator's scores, or one with the reason why there are none."""
        base: Row = row_of(self.plan, job, 0, dtype, decoder_fingerprint())
        base |= dict.fromkeys(("prompt", "group", "seed", "model", "media_hash"))
        base |= {"sample": WHOLE_SET, "media": f"{len(self.plan.items)} items", "key": set_key(self.plan, job)}
        found = self._found(job)
        if isinstance(found, str):
            return [base | {"reason": found}]
        return [base | {"subscore": name, "score": score, "status": "ok"} for name, score in found.items()]

    def _found(self, job: Job) -> dict[str, float] | str:
        unreadable = self.unreadable[job.label]
        if job.label in self.failures:
            return self.failures[job.label]
        if unreadable:
            # A distance over fewer items than the table has is another number; it is not given out as this one.
            return f"{len(unreadable)} of {len(self.plan.items)} items cannot be read: {unreadable[0]}"
        try:
            value = self.worker.evaluator(job).compute()
            named = {
                name: float(score) for name, score in (value if isinstance(value, dict) else {"score": value}).items()
            }
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        broken = [f"{name} is {score}" for name, score in named.items() if not math.isfinite(score)]
        return ", ".join(broken) or named or f"{job.name} returned no score"
