"""Guided sampling of a table of requests: batches to pictures, each with a record of what it gained and cost."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmalign.evaluation import Backbones
from mmalign.guidance.denoising import Bar, Denoising, Outcome, begin
from mmalign.guidance.rewards import Rewards, fitting, load_scorers, name_of, refuse_without_gradient
from mmalign.jobs import SampleConfig
from mmalign.jobs_guidance import Strategy
from mmalign.models.adapter import Adapter
from mmalign.paths import find
from mmalign.pixel_scores import PixelScorer
from mmalign.results import score_label
from mmalign.score_plan import Job
from mmalign.source import whole_file
from mmalign.weights import files_hash

Record = dict[str, Any]


class Request(Protocol):
    """What is to be drawn; `mmalign.sample.Request` is one."""

    prompt: str
    seed: int
    group: str

    @property
    def sample(self) -> str: ...


def check(settings: Strategy) -> None:
    """Looks at rewards and held-out evaluators before any weights are loaded.

    Raises:
        ValueError: unknown names or parameters, missing weights, a reward without the gradient that the strategy needs,
            or two rewards of one name.
    """
    jobs = fitting(settings.rewards, "guidance.rewards")
    fitting(settings.held_out, "guidance.held_out")
    for key, judge in settings.judges.items():
        fitting([judge], f"guidance.{key}")
    if settings.checks:
        _named(settings.checks)(settings)
    if settings.needs_gradients:
        refuse_without_gradient([(spec, job.cls) for spec, job in zip(settings.rewards, jobs, strict=True)])
    names = [name_of(spec, job.label) for spec, job in zip(settings.rewards, jobs, strict=True)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"guidance.rewards: two are called {twice[0]!r}; give each a column of its own")


def _named(place: str) -> Any:
    """The function that "module:function" names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def identity(settings: Strategy) -> Record:
    """What decides the pictures, for run.json: evaluators by parameters and weights, files by content."""
    told: Record = json.loads(settings.model_dump_json(exclude={"rewards", "held_out"}))
    for name, value in settings:
        if isinstance(value, Path):
            place = find(value)
            told[name] = files_hash(sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place])
    for key in ("rewards", "held_out"):
        specs = getattr(settings, key)
        told[key] = [
            {**spec.model_dump(exclude={"params"}, mode="json"), **_evaluator(job)}
            for spec, job in zip(specs, fitting(specs, f"guidance.{key}"), strict=True)
        ]
    for key, judge in settings.judges.items():
        told[key] = _evaluator(fitting([judge], f"guidance.{key}")[0])
    return told


def _evaluator(job: Job) -> Record:
    return {"params": job.params_text, "weight_hash": job.weight_hash, "version": job.cls.version}


def record_path(folder: Path, sample: str) -> Path:
    """Where a request's record lies."""
    return folder / "guidance" / f"{sample}.json"


def read_record(folder: Path, sample: str) -> Record:
    """A request's record, as `run` wrote it."""
    found: Record = json.loads(record_path(folder, sample).read_text(encoding="utf-8"))
    return found


def run(
    adapter: Adapter, wanted: Sequence[Any], config: SampleConfig, tell: Callable[[float, float | None], None]
) -> Iterator[tuple[list[Any], list[np.ndarray]]]:
    """Batches of requests with their pictures, uint8 [H, W, 3], or clips [T, H, W, 3].

    The records of a batch are written before it is handed over, so a medium that exists has its record.

    Args:
        tell: called with the number of requests that are done, a part of one counting as such, and the mean reward.

    Raises:
        ValueError: latents or pixels that are not finite, or whatever the rewards find wrong.
    """
    settings: Any = config.guidance
    strategy = _named(settings.function)
    rewards, held_out = _judges(adapter, config)
    start = 0
    for part in batches(wanted, settings, config.batch_size):
        pixels, records = _batch(adapter, part, config, strategy, rewards, held_out, _bar(tell, start, len(part)))
        for request, record in zip(part, records, strict=True):
            _write(record_path(config.output, request.sample), record)
        start += len(part)
        tell(start, None)
        whole = (pixels * 255).round().to("cpu", torch.uint8)
        yield part, list((whole.permute(0, 2, 3, 1) if whole.ndim == 4 else whole.permute(0, 2, 3, 4, 1)).numpy())


def batches(wanted: Sequence[Any], settings: Strategy, size: int) -> Iterator[list[Any]]:
    """The requests in batches of `size`; a strategy that chooses sets gets all of a prompt's at once, and no others."""
    if settings.sets:
        for _, part in itertools.groupby(wanted, key=lambda request: request.group):
            yield list(part)
    else:
        for start in range(0, len(wanted), size):
            yield list(wanted[start : start + size])


def with_sets(wanted: Sequence[Any], missing: Sequence[Any], settings: Strategy | None) -> list[Any]:
    """What has to be drawn where some are missing: a set that lacks a member is drawn again as a whole."""
    if settings is None or not settings.sets:
        return list(missing)
    groups = {request.group for request in missing}
    return [request for request in wanted if request.group in groups]


def _bar(tell: Callable[[float, float | None], None], start: int, count: int) -> Bar:
    """A batch's bar; the last reward stays where none is told."""
    last: list[float | None] = [None]

    def bar(share: float, reward: float | None = None) -> None:
        last[0] = last[0] if reward is None else reward
        tell(start + share * count, last[0])

    return bar


def _judges(adapter: Adapter, config: SampleConfig) -> tuple[Rewards, list[PixelScorer]]:
    """The rewards, and what is held out; they share their networks, and run in float32 as scoring does by default."""
    settings: Any = config.guidance
    jobs = [fitting(settings.rewards, "guidance.rewards"), fitting(settings.held_out, "guidance.held_out")]
    scorers = load_scorers(
        [*jobs[0], *jobs[1]], adapter.modality, adapter.device, dtype="float32",
        backbones=Backbones(), frames=settings.reward_frames, fps=adapter.fps,
    )  # fmt: skip
    count = len(jobs[0])
    unique = {scorer.label: scorer for scorer in scorers[count:]}
    return Rewards(settings.rewards, scorers[:count]), list(unique.values())


Run = Callable[[Denoising], Outcome]


def _batch(
    adapter: Adapter, part: list[Any], config: SampleConfig, strategy: Any, rewards: Rewards,
    held_out: list[PixelScorer], bar: Bar,
) -> tuple[Tensor, list[Record]]:  # fmt: skip
    """Pixels [B, 3, ...] in [0, 1] of a batch, and its records."""
    settings: Any = config.guidance

    def guided(denoising: Denoising) -> Outcome:
        outcome: Outcome = strategy(denoising, rewards, settings, bar)
        return outcome

    pixels, records = _drawn(adapter, part, config, guided, rewards, held_out)
    if settings.baseline:
        for record, plain in zip(records, _drawn(adapter, part, config, _plain, rewards, held_out)[1], strict=True):
            del plain["sample"], plain["chosen"]
            record["baseline"] = plain
    return pixels, records


def _plain(denoising: Denoising) -> Outcome:
    return Outcome(denoising.plain(denoising.initial()), [{} for _ in denoising.prompts])


def _drawn(
    adapter: Adapter, part: list[Any], config: SampleConfig, run: Run, rewards: Rewards, held_out: list[PixelScorer]
) -> tuple[Tensor, list[Record]]:
    """What one way of sampling draws, what that cost, and what the evaluators say of it; saying it is no cost."""
    settings: Any = config.guidance
    prompts = [request.prompt for request in part]
    begun = time.perf_counter()
    denoising = begin(
        adapter, prompts, [request.seed for request in part], config, strategy=settings.kind, lower=settings.lower
    )
    rewards.spent = denoising.spent
    outcome = run(denoising)
    with torch.no_grad():
        pixels = denoising.pixels(outcome.latents)
    if adapter.device.type == "cuda":
        torch.cuda.synchronize(adapter.device)
    seconds = (time.perf_counter() - begun) / len(part)
    rewards.spent = []
    parts = rewards.parts(pixels, prompts)
    total = rewards.total(parts)
    held = {
        score_label(scorer.label, name): values
        for scorer in held_out
        for name, values in scorer.named(pixels, prompts).items()
    }
    records = [
        {
            "sample": request.sample,
            "reward": total[b].item(),
            "rewards": {name: values[b].item() for name, values in parts.items()},
            "held_out": {name: values[b].item() for name, values in held.items()},
            **asdict(denoising.spent[b]),
            "seconds": seconds,
            "chosen": outcome.records[b],
        }
        for b, request in enumerate(part)
    ]
    return pixels, records


def _write(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(_finite(record), indent=1), encoding="utf-8")


def _finite(value: Any) -> Any:
    """As JSON has it: null for what is not finite."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def columns(record: Record) -> Record:
    """What a record adds to the media table's row, without levels: reward, held_out/..., baseline/..., costs."""
    plain = record.get("baseline", {})
    flat = {"reward": record["reward"], **{f"held_out/{name}": value for name, value in record["held_out"].items()}}
    flat |= {f"baseline/{name}": plain[name] for name in ("reward", "network_calls", "seconds") if plain}
    flat |= {f"baseline/held_out/{name}": value for name, value in plain.get("held_out", {}).items()}
    return flat | {name: record[name] for name in ("network_calls", "seconds")}
