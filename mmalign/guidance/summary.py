"""What a guided run gained and what it cost: guidance.json, and what is printed of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmalign.guidance.rewards import fitting
from mmalign.jobs_align import EvaluatorSpec
from mmalign.jobs_guidance import Strategy
from mmalign.results import score_label
from mmalign.source import whole_file
from mmalign.stats import mean_ci

Record = dict[str, Any]
_COSTS = ("network_calls", "decodes", "reward_calls", "reward_gradients", "seconds")


def summarise(settings: Strategy, records: Sequence[Record], groups: Sequence[str], folder: Path) -> Record:
    """Writes guidance.json into the folder and returns what it holds.

    Means over all requests, with 95 % bootstrap intervals clustered by prompt. A gain is the difference to the plain
    sample of the same seed, above 0 where guidance is better, over the requests that could be scored in both.

    Args:
        records: as `mmalign.guidance.sampling.run` wrote them.
        groups: the prompt of each.
    """
    kind: Any = settings
    found: Record = {"strategy": kind.kind, "requests": len(records)}
    found["reward"] = _compared(records, groups, lambda record: record["reward"])
    names = records[0]["rewards"]
    better = {
        "rewards": dict(zip(names, _directions(settings.rewards), strict=True)),
        "held_out": _held_directions(settings, records[0]["held_out"]),
    }
    for key, values in (("rewards", names), ("held_out", records[0]["held_out"])):
        found[key] = {name: _compared(records, groups, partial(_part, key, name), better[key][name]) for name in values}
    found["cost"] = {name: sum(record[name] for record in records) / len(records) for name in _COSTS}
    if settings.baseline:
        plain = {
            name: sum(r["baseline"][name] for r in records) / len(records) for name in ("network_calls", "seconds")
        }
        found["plain_cost"] = plain
        found["cost_ratio"] = {name: found["cost"][name] / value for name, value in plain.items()}
    with whole_file(folder / "guidance.json") as temporary:
        temporary.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def _part(key: str, name: str, record: Record) -> float | None:
    value: float | None = record[key][name]
    return value


def _directions(specs: Sequence[EvaluatorSpec]) -> list[bool]:
    """Whether higher is better, of each."""
    return [job.cls.higher_is_better for job in fitting(specs, "guidance")]


def _held_directions(settings: Strategy, names: Iterable[str]) -> dict[str, bool]:
    """The same by name, for evaluators that give several scores."""
    known = {job.label: job.cls.higher_is_better for job in fitting(settings.held_out, "guidance")}
    return {name: next(way for label, way in known.items() if name in (label, _under(label, name))) for name in names}


def _under(label: str, name: str) -> str:
    return score_label(label, name.removeprefix(f"{label}/"))


def _compared(
    records: Sequence[Record], groups: Sequence[str], value: Callable[[Record], float | None], higher: bool = True
) -> Record:
    """Guided, plain and their difference, where it is known; null where nothing could be scored."""
    guided = [value(record) for record in records]
    told: Record = {"guided": _mean(guided, groups)}
    if "baseline" in records[0]:
        plain = [value(record["baseline"]) for record in records]
        sign = 1.0 if higher else -1.0
        gains = [None if a is None or b is None else sign * (a - b) for a, b in zip(guided, plain, strict=True)]
        told |= {"plain": _mean(plain, groups), "gain": _mean(gains, groups)}
    return told


def _mean(values: Sequence[float | None], groups: Sequence[str]) -> Record | None:
    known = [(value, group) for value, group in zip(values, groups, strict=True) if value is not None]
    if not known:
        return None
    mean, low, high = mean_ci([value for value, _ in known], [group for _, group in known])
    told: Record = {"mean": mean, "low": low, "high": high, "n": len(known)}
    return {key: None if isinstance(each, float) and math.isnan(each) else each for key, each in told.items()}


def lines(found: Record) -> str:
    """The summary for a person: reward and cost in a line, and a line for each score that is held out."""
    reward = found["reward"]
    first = f"guidance {found['strategy']}, {found['requests']} samples: reward {_number(reward['guided'])}"
    if "plain" not in reward:
        held = [f"  held out {name}: {_number(each['guided'])}" for name, each in found["held_out"].items()]
        return "\n".join([first, *held])
    ratio = found["cost_ratio"]
    first += f", without guidance {_number(reward['plain'])}, gain {_interval(reward['gain'])}"
    first += f"; {ratio['network_calls']:.3g} times the network calls, {ratio['seconds']:.3g} times the seconds"
    held = [f"  held out {name}: gain {_interval(each['gain'])}" for name, each in found["held_out"].items()]
    return "\n".join([first, *held])


def _number(value: Record | None) -> str:
    return "not scored" if value is None else f"{value['mean']:.4g}"


def _interval(value: Record | None) -> str:
    if value is None:
        return "not scored"
    between = "" if value["low"] is None else f" (95 %: {value['low']:+.4g} to {value['high']:+.4g})"
    return f"{value['mean']:+.4g}{between}"
