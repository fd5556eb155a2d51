"""Score batches: hand each to every evaluator that wants it, turn whatever happens into rows, write them down."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from mmalign.discovery import make_evaluator
from mmalign.evaluation import Backbones, Batch, Evaluator, ItemErrors, SetEvaluator, resolve_device, subscores
from mmalign.jobs import ScoreConfig
from mmalign.media import FramePlan
from mmalign.score_decode import Decoded, Decoder
from mmalign.score_plan import Job, Plan, Todo
from mmalign.score_store import Store

__all__ = ["Scorer", "Worker", "make_batch", "row_of"]

Row = dict[str, Any]
_NO_SCORE = {"score": None}
logger = logging.getLogger(__name__)


class Scorer:
    """Scores a share of the batches: what one process does, and keeps for the next share.

    Args:
        rank: the process's number, for the names of its parts and for its GPU where none is named.
        share: how many processes score on this machine.
    """

    def __init__(self, plan: Plan, config: ScoreConfig, rank: int = 0, share: int = 1, gpu: int | None = None):
        self.plan, self.rank = plan, rank
        self.worker = Worker(plan, _device(config.device, rank if gpu is None else gpu), config.dtype, config.compile)
        self.decoder = Decoder(config, self.worker.device, share)
        self.store = Store(config.output)

    def score(self, todo: Sequence[Todo]) -> Iterator[int]:
        """Scores these batches one after the other and writes each while the next is scored; the number of results."""
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            written: Future[Any] = writer.submit(int)
            for piece, decoded in self.decoder.stream(self.plan, todo):
                rows = self.worker.score(piece, decoded)
                written.result()  # a disk that is slower than the scoring holds it up, and one that is full ends it
                written = writer.submit(self.store.append, rows, self.rank)
                yield sum(len(jobs) for _, jobs in piece)
            written.result()

    def close(self) -> None:
        """End the decoders."""
        self.decoder.close()


def _device(device: str, number: int) -> str:
    """Processes take the GPUs in turn, unless one is named."""
    if resolve_device(device).type == "cuda" and device in ("auto", "cuda"):
        return f"cuda:{number % torch.cuda.device_count()}"
    return device


class Worker:
    """Loads evaluators when they are first needed, sharing their backbones, and scores decoded batches."""

    def __init__(self, plan: Plan, device: str, dtype: str, compiled: bool = False):
        self.plan, self.dtype = plan, dtype
        self.device = resolve_device(device)
        self._backbones = Backbones(compiled)
        self._most: dict[str, int] = {}
        self._warned: set[str] = set()
        self._evaluators: dict[str, Evaluator | SetEvaluator] = {}
        if self.device.type == "cuda" and dtype == "float32":
            # TF32 keeps 10 bits of the mantissa: not what a person asks for who asks for float32.
            torch.backends.cudnn.allow_tf32 = False

    def evaluator(self, job: Job) -> Any:
        """The job's evaluator, loaded once."""
        if job.label not in self._evaluators:
            self._evaluators[job.label] = make_evaluator(
                job.cls, job.name, job.params, self.device, self.dtype, self._backbones
            )
        return self._evaluators[job.label]

    def score(self, todo: Todo, decoded: dict[int, Decoded]) -> list[Row]:
        """Rows for every (item, job) of a batch; a failure becomes rows with its reason and stops nothing else."""
        rows: list[Row] = []
        batches: dict[tuple[FramePlan | None, tuple[int, ...]], Batch] = {}
        for job in self.plan.jobs:
            wanted = [index for index, jobs in todo if job in jobs]
            problems = {index: decoded[index].problem_for(job) for index in wanted}
            good = tuple(index for index, problem in problems.items() if problem is None)
            rows += [
                row_of(self.plan, job, index, self.dtype, decoded[index].decoder, reason=problem)
                for index, problem in problems.items()
                if problem is not None
            ]
            if not good:
                continue
            if not job.sees:
                rows += self._rows(job, good, make_batch(self.plan, good, decoded, None), decoded)
                continue
            # A still is the same clip under every plan: evaluators with different plans share what they compute of it.
            still = self.plan.items[good[0]].row.modality == "image" and "reference" not in job.cls.needs
            place = (None if still else job.cls.frames, good)
            if place not in batches:
                batches[place] = make_batch(self.plan, good, decoded, job.cls.frames)
            rows += self._rows(job, good, batches[place], decoded)
        return rows

    def _rows(self, job: Job, indices: tuple[int, ...], batch: Batch, decoded: dict[int, Decoded]) -> list[Row]:
        evaluator = self.evaluator(job)
        start = time.perf_counter()
        outcomes = self._outcomes(job.label, evaluator, batch)
        seconds = (time.perf_counter() - start) / len(indices)
        cut = self._truncated(job, evaluator, batch.prompts)
        rows = []
        for place, (index, outcome) in enumerate(zip(indices, outcomes, strict=True)):
            for name, value in outcome.scores.items():
                decoder = decoded[index].decoder if job.sees else ""
                row = row_of(self.plan, job, index, self.dtype, decoder, subscore=name, score=value)
                row["seconds"], row["prompt_truncated"] = seconds, cut[place]
                row["reason"], row["note"] = outcome.reason, outcome.note
                rows.append(row)
        return rows

    def _truncated(self, job: Job, evaluator: Evaluator, prompts: list[str]) -> Sequence[bool | None]:
        """Whether each prompt was seen only in part; None where that is not known, which takes nothing from a score."""
        if "prompt" not in job.cls.needs:
            return [None] * len(prompts)
        try:
            found = evaluator.truncated(prompts)
            return (
                [None] * len(prompts) if found is None else [bool(each) for _, each in zip(prompts, found, strict=True)]
            )
        except Exception as error:
            if len(prompts) > 1:  # so that one prompt does not take it from the others
                return [self._truncated(job, evaluator, [prompt])[0] for prompt in prompts]
            if job.label not in self._warned:
                self._warned.add(job.label)
                logger.warning(
                    "%s.truncated failed: %s: %s. prompt_truncated stays empty", job.label, _kind(error), error
                )
            return [None]

    def _outcomes(self, label: str, evaluator: Evaluator, batch: Batch) -> list[_Outcome]:
        """As `_outcomes` below, in parts of a size that is known to fit where a batch before ran out of memory."""
        size, passes = len(batch), _Passes()
        outcomes = _in_parts(evaluator, batch, math.ceil(size / self._most.get(label, size)), passes)
        if passes.ran_out and passes.largest:
            self._most[label] = passes.largest
            logger.warning("%s ran out of memory on %d items: %d at a time from here", label, size, passes.largest)
        return outcomes


def make_batch(plan: Plan, indices: Sequence[int], decoded: dict[int, Decoded], frames: FramePlan | None) -> Batch:
    """The batch that an evaluator with this frame plan sees; without a plan the table's columns alone."""
    items = [plan.items[index].row for index in indices]
    clips = [] if frames is None else [decoded[index].clips[frames] for index in indices]
    references = [decoded[i].reference[frames] for i in indices if frames and frames in decoded[i].reference]
    still = items[0].modality == "image"
    return Batch(
        images=[clip[0] for clip in clips] if still else [],
        frames=clips,
        prompts=[row.prompt or "" for row in items],
        references=references if len(references) == len(clips) else [],
        responses=[row.response or "" for row in items],
        fps=[row.fps if row.fps is not None else decoded[index].fps for index, row in zip(indices, items, strict=True)],
        aux=[dict(row.aux) for row in items],
        samples=[row.sample for row in items],
    )


def row_of(
    plan: Plan,
    job: Job,
    index: int,
    dtype: str,
    decoder: str,
    *,
    subscore: str = "score",
    score: float | None = None,
    reason: str | None = None,
    skipped: bool = False,
) -> Row:
    """One row of results; without a score it is an error, or skipped."""
    item = plan.items[index]
    row = item.row
    return {
        "sample": row.sample,
        "prompt": row.prompt,
        "media": getattr(row.media, "name", None) or str(row.media),
        "modality": row.modality,
        "group": row.group,
        "seed": row.seed,
        "model": row.model,
        "response": row.response if "response" in job.cls.needs else None,
        "evaluator": job.label,
        "subscore": subscore,
        "score": score,
        "status": "ok" if score is not None else "skipped" if skipped else "error",
        "reason": reason,
        "note": None,
        "evaluator_version": job.cls.version,
        "params": job.params_text,
        "params_hash": job.params_hash,
        "weight_hash": job.weight_hash,
        "dtype": dtype,
        "decoder": decoder,
        "media_hash": item.media_hash,
        "key": plan.keys[plan.jobs.index(job)][index],
    }


@dataclass(frozen=True)
class _Outcome:
    """An item's named scores, or the reason why there are none; and what the evaluator wrote down of it."""

    scores: Mapping[str, float | None]
    reason: str | None = None
    note: str | None = None


@dataclass
class _Passes:
    """What happened to a batch: whether memory ran out, and the most items that went through at once."""

    ran_out: bool = False
    largest: int = 0


def _outcomes(evaluator: Evaluator, batch: Batch, passes: _Passes) -> list[_Outcome]:
    """Of each item. A batch that does not fit into memory is halved until it does; one that fails otherwise is scored
    item by item, so that the failure stays with the item that caused it."""
    found, size = _attempt(evaluator, batch), len(batch)
    if not isinstance(found, Exception):
        passes.largest = max(passes.largest, size)
        return found
    out_of_memory = isinstance(found, torch.OutOfMemoryError)
    if size == 1:
        said = str(found)
        reason = f"out of memory on one item: {said.splitlines()[0]}" if out_of_memory else f"{_kind(found)}: {said}"
        return [_Outcome(_NO_SCORE, reason, _note(batch, 0))]
    passes.ran_out |= out_of_memory
    return _in_parts(evaluator, batch, 2 if out_of_memory else size, passes)


def _in_parts(evaluator: Evaluator, batch: Batch, parts: int, passes: _Passes) -> list[_Outcome]:
    if parts == 1:
        return _outcomes(evaluator, batch, passes)
    size = len(batch)
    edges = [size * part // parts for part in range(parts + 1)]
    places = [range(low, high) for low, high in pairwise(edges)]
    return [outcome for place in places for outcome in _outcomes(evaluator, batch.take(place), passes)]


def _attempt(evaluator: Evaluator, batch: Batch) -> list[_Outcome] | Exception:
    """Outcomes; or what the evaluator raised, whatever it was: it becomes a reason, not the end of the run."""
    batch.notes.clear()
    try:
        errors: dict[int, Exception] = {}
        with torch.no_grad():
            try:
                scores = evaluator.score(batch)
            except ItemErrors as partly:
                scores, errors = partly.scores, partly.errors
        named = {name: values.tolist() for name, values in subscores(scores, len(batch), evaluator.name).items()}
        return [
            _outcome({name: values[place] for name, values in named.items()}, errors.get(place), _note(batch, place))
            for place in range(len(batch))
        ]
    except Exception as error:
        # Without its traceback, whose frames hold the tensors that filled the memory.
        failure = error.with_traceback(None)
    if isinstance(failure, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    return failure


def _note(batch: Batch, place: int) -> str | None:
    return str(batch.notes[place]) if place in batch.notes else None


def _kind(error: Exception) -> str:
    return type(error).__name__


def _outcome(named: dict[str, float], error: Exception | None, note: str | None) -> _Outcome:
    if error is not None:
        return _Outcome(_NO_SCORE, f"{_kind(error)}: {error}", note)
    broken = [f"{name} is {value}" for name, value in named.items() if not math.isfinite(value)]
    return _Outcome(_NO_SCORE, ", ".join(broken), note) if broken else _Outcome(dict(named), note=note)
