"""One row of a preference table, and the checks that every format's rows go through (`mmalign.formats`).

A row that says nothing usable becomes a `Dropped` with its reason, never a guess; ties stay ties.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmalign.records import MediaRef, Record

Verdict = Literal["A", "B", "same"]
OVERALL = "overall"  # the dimension of data sets that ask one question
INVALID = "invalid"  # a verdict on one of several dimensions that says nothing, as if the dimension were not there


@dataclass(frozen=True)
class Resampled:
    """How a clip is made to play at a common rate: its own frames per second on average, those wanted, and how many
    frames. `to_fps` is None where clips keep their own rate."""

    from_fps: float
    to_fps: float | None
    frames: int


@dataclass(frozen=True)
class PreferenceRow:
    """What somebody preferred among k >= 2 media made for one prompt, as exactly one of three things:

    - `scores`: per dimension k numbers, higher is better;
    - `rank`: k numbers, lower is better, equal ones are ties;
    - `label`: per dimension "A", "B" or "same" (k is 2).

    `prompts`: one per medium where they were made for different ones (joint preferences); `prompt` is the first then.
    `fps`, `num_frames`, `models`: of each medium, as the table says; None where it does not. `resampled`: what training
    makes of each clip (`mmalign.tasks.lengths`).
    """

    prompt: str
    media: tuple[MediaRef, ...]
    scores: dict[str, tuple[float, ...]] | None = None
    rank: tuple[float, ...] | None = None
    label: dict[str, Verdict] | None = None
    user_id: str | None = None
    weight: float = 1.0
    source: str | None = None
    prompts: tuple[str, ...] | None = None
    fps: tuple[float | None, ...] | None = None
    num_frames: tuple[int | None, ...] | None = None
    models: tuple[str | None, ...] | None = None
    resampled: tuple[Resampled, ...] | None = field(default=None, compare=False)
    origin: str = field(default="", compare=False)

    def dimensions(self) -> tuple[str, ...]:
        """The names of what was judged; `("overall",)` for a rank."""
        return tuple(self.scores or self.label or {OVERALL: None})

    def order(self, dimension: str | None = None) -> tuple[float, ...]:
        """k numbers, lower is better, equal ones are ties: the one view that every kind of row has.

        ValueError if the row has several dimensions and none is named, or not the one that is named.
        """
        names = self.dimensions()
        if dimension is None and len(names) > 1:
            raise ValueError(f"{self.origin} judges {', '.join(names)}; choose one as the dimension")
        if dimension is not None and dimension not in names:
            raise ValueError(f"{self.origin} does not judge {dimension!r}; it judges {', '.join(names)}")
        chosen = dimension or names[0]
        if self.scores is not None:
            return tuple(-score for score in self.scores[chosen])
        if self.label is not None:
            return {"A": (0.0, 1.0), "B": (1.0, 0.0), "same": (0.0, 0.0)}[self.label[chosen]]
        assert self.rank is not None
        return self.rank


@dataclass(frozen=True)
class Dropped:
    """A row that was left out: where it stands, a short reason (rows are counted by it), and what exactly was wrong."""

    origin: str
    reason: str
    detail: str = ""


Outcome = PreferenceRow | Dropped


def counted(dropped: Sequence[Dropped]) -> dict[str, dict[str, object]]:
    """Reason -> how many, and the first three of them with the details."""
    counts = Counter(each.reason for each in dropped)
    examples = {
        reason: [f"{each.origin}: {each.detail}" for each in dropped if each.reason == reason][:3] for reason in counts
    }
    return {reason: {"count": count, "examples": examples[reason]} for reason, count in counts.items()}


# ------------------------------------------------------------------------------------------------ finishing a row


def finished(
    record: Record,
    prompt_column: str,
    media: tuple[MediaRef, ...],
    *,
    user: Any = None,
    weight: Any = 1.0,
    source: Any = None,
    clips: dict[str, Any] | None = None,
    **judged: Any,
) -> Iterator[Outcome]:
    """The finished row, or the reason why there is none.

    Args:
        clips: `fps`, `num_frames` and `models`, a list of one per medium each; any may be missing.
        judged: one of `scores`, `rank`, `label`.
    """
    prompt = record.values.get(prompt_column)
    prompts = record.values.get("prompts") if prompt_column == "prompt" else None
    if prompts is not None:
        fault = _prompts_fault(prompts, media)
        if fault:
            yield Dropped(record.origin, "no prompt", fault)
            return
        prompt = prompts[0]
    ((kind, value),) = judged.items()
    reason, detail = _fault(prompt, media, kind, value, weight)
    if not reason and prompts is None and len(set(media)) < len(media):
        reason, detail = "bad media", "one medium stands in it twice, which compares it to itself"
    known = {name: values for name, values in (clips or {}).items() if values is not None}
    if not reason:
        reason, detail = clips_fault(known, media)
    if reason:
        yield Dropped(record.origin, reason, detail)
        return
    assert isinstance(prompt, str)
    facts: dict[str, Any] = {
        name: tuple(None if one is None else kind(one) for one in known[name])
        for name, (kind, _, _) in _FACTS.items()
        if any(one is not None for one in known.get(name, ()))
    }
    user_id = None if user is None else str(user)
    whose = None if source is None else str(source)
    yield PreferenceRow(
        prompt, media, user_id=user_id, weight=float(weight), source=whose, origin=record.origin, **{kind: value},
        prompts=None if prompts is None else tuple(prompts), **facts,
    )  # fmt: skip


_FACTS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "fps": (float, lambda value: not not_finite(value) and value > 0, "frames per second above 0"),
    "num_frames": (int, lambda value: type(value) is int and value > 0, "a whole number from 1 up"),
    "models": (str, lambda value: isinstance(value, str), "text"),
}


def clips_fault(known: dict[str, Any], media: Sequence[MediaRef]) -> tuple[str, str]:
    """Reason and detail of what is wrong with `fps`, `num_frames` or `models` of media; empty if nothing is."""
    for name, (_, is_good, wanted) in _FACTS.items():
        values = known.get(name, ())
        if not isinstance(values, list | tuple) or (values and len(values) != len(media)):
            return f"bad {name}", f"{name} is a list with an entry per medium; here it is {values!r:.60}"
        bad = [value for value in values if value is not None and not is_good(value)]
        if bad:
            return f"bad {name}", f"{name} holds {bad[0]!r:.40}, not {wanted}"
    return "", ""


def _prompts_fault(prompts: Any, media: Sequence[MediaRef]) -> str:
    """What is wrong with a row's own prompt for each medium; empty if nothing is."""
    if not isinstance(prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in prompts):
        return "prompts must be a list of texts"
    return "" if len(prompts) == len(media) else f"{len(prompts)} prompts for {len(media)} media"


def _fault(prompt: Any, media: Sequence[MediaRef], kind: str, value: Any, weight: Any) -> tuple[str, str]:
    if not isinstance(prompt, str):
        return "no prompt", f"the prompt is {prompt!r:.40}, not text"
    if len(media) < 2:
        return "bad media", "two or more media paths are needed"
    if numbers([weight]) is None or weight < 0:
        return "bad weight", f"weight is {weight!r}, not a number from 0 up"
    if not value:
        return "no label", f"{kind} is empty or not numeric"
    lists = [value] if kind == "rank" else list(value.values())
    if kind == "label":
        strange = [verdict for verdict in lists if verdict not in ("A", "B", "same")]
        if strange or len(media) != 2:
            detail = f"a label is A, B or same, for two media; here it is {lists} for {len(media)}"
            return "unknown label", detail
    elif any(numbers is None for numbers in lists):
        return "no label", f"{kind} holds something that is no finite number"
    elif any(len(numbers) != len(media) for numbers in lists):
        return "bad label", f"{kind} has {[len(numbers) for numbers in lists]} entries for {len(media)} media"
    return "", ""


def paths_of(record: Record, values: Any, inside: str | None = None) -> tuple[MediaRef, ...]:
    """A reference per path; nothing if one of them is no path, which `_fault` then reports."""
    if not isinstance(values, list | tuple):
        return ()
    try:
        return tuple(record.path(value, inside) for value in values)
    except ValueError:
        return ()


def by_dimension(value: Any) -> dict[str, Any]:
    """`{"overall": value}` for a bare value; parquet fills the dimensions that a row lacks with None."""
    if isinstance(value, dict):
        return {name: item for name, item in value.items() if item is not None}
    return {OVERALL: value}


def numbers(values: Any) -> tuple[float, ...] | None:
    if not isinstance(values, list | tuple) or any(not_finite(value) for value in values):
        return None
    return tuple(float(value) for value in values)


def not_finite(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
