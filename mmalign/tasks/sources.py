"""Where a task's items come from: a table on disk, or the shapes world."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmalign import judgements, tables
from mmalign.jobs_inputs import Data
from mmalign.judgements import Group
from mmalign.paths import find
from mmalign.preference_row import PreferenceRow
from mmalign.records import nearest
from mmalign.shapes import clip_data
from mmalign.shapes.data import drawings, judged_groups
from mmalign.tasks.lengths import long_enough, resampling

WORTH_A_POOL = 5000  # pairs, a hundred seconds of judging in one process


@dataclass(frozen=True)
class Single:
    """A captioned picture: `media` has `hash()` and `name`."""

    prompt: str
    media: Any


def singles(data: Data) -> tuple[list[Single], str]:
    """Captioned pictures, and a sentence that says how many rows were kept and dropped and why."""
    if data.shapes:
        wanted = data.shapes
        told = {"held_out": wanted.held_out, **({"counts": wanted.counts} if wanted.counts else {}), **_clips(data)}
        drawn: list[Any] = (clip_data.drawn_clips if data.frames else drawings)(wanted.scenes, wanted.seed, **told)
        summary = f"drew {len(drawn)} scenes"
        return _some([Single(str(drawing.caption), drawing) for drawing in drawn], data, summary)[: data.limit], summary
    assert data.table is not None
    table = tables.captioned(find(data.table), data.root, data.verify)
    rows, short = long_enough(table.rows, lambda row: (row.media,), data)
    summary = tables.summary(len(rows), [*table.dropped, *short]) + resampling(rows)
    found = [Single(row.prompt, row.media) for row in rows]
    return _some(found, data, summary)[: data.limit], summary


def _clips(data: Data) -> dict[str, Any]:
    """How clips of the shapes world are drawn for these data; nothing for pictures."""
    told = {"frames": data.frames, "side": data.resolution, "fps": data.fps}
    return {name: value for name, value in told.items() if value} if data.frames else {}


def groups(data: Data, items: Literal["pairs", "lists", "singles"]) -> tuple[list[Group], str]:
    """Judged pictures as an objective takes them, and the same sentence."""
    if data.shapes:
        wanted = data.shapes
        told: dict[str, Any] = {
            "votes": wanted.votes,
            "per_prompt": wanted.per_prompt,
            "held_out": wanted.held_out,
            "processes": 1 if wanted.scenes < WORTH_A_POOL else os.cpu_count() or 1,
            **({"counts": wanted.counts} if wanted.counts else {}),
            **_clips(data),
            **({"axes": data.axes, "dimensions": data.dimensions} if data.frames else {}),
        }
        draw = clip_data.judged_clips if data.frames else judged_groups
        judge = wanted.annotator or ("balanced" if data.frames else "faithful")
        found = draw(wanted.scenes, wanted.seed, judge, **told)[: data.limit]
        summary = f"drew {wanted.scenes} groups of {wanted.per_prompt} of the shapes world"
    else:
        assert data.table is not None
        table = preferences(data)
        rows, short = long_enough(table.rows, lambda row: row.media, data)
        found = judgements.judged(rows[: data.limit], data)
        summary = tables.summary(len(rows), [*table.dropped, *short]) + resampling(rows)
    kept = judgements.AS[items](found, data)
    used = f", of the first {data.limit}" if data.limit else ""
    summary = f"{summary}; {len(kept)} {items}{used}, ties: {data.ties}"
    if not any(group.weight for group in _some(kept, data, summary)):
        raise ValueError(f"{data.table}: every row has weight 0, so nothing would be trained on ({summary})")
    return kept, summary


def preferences(data: Data) -> tables.PreferenceTable:
    """The table's rows that were judged on something that `data` asks for.

    Raises:
        ValueError: as `tables.read_preferences`, or no row is judged on one of the dimensions or axes.
    """
    assert data.table is not None
    chosen = data.dimension or data.axes or _weighted(data.dimensions)
    table = tables.read_preferences(find(data.table), data.format, data.root, data.verify, chosen)
    _check_dimensions(table.rows, data)
    return table


def _weighted(dimensions: dict[str, float] | None) -> tuple[str, ...] | None:
    return tuple(name for name, weight in dimensions.items() if weight > 0) if dimensions else None


def _check_dimensions(rows: Sequence[PreferenceRow], data: Data) -> None:
    """ValueError for a name that no row is judged on, which would else count for nothing without a word."""
    held = list(dict.fromkeys(name for row in rows for name in row.dimensions()))
    for key, wanted in (("data.dimensions", _weighted(data.dimensions)), ("data.axes", data.axes)):
        absent = next((name for name in wanted or () if name not in held), None)
        if absent is not None:
            raise ValueError(
                f"{key}: no row of {data.table} is judged on {absent!r}.{nearest(absent, held)} "
                f"It judges {', '.join(held)}."
            )


def _some(items: list[Any], data: Data, summary: str) -> list[Any]:
    if not items:
        raise ValueError(f"{data.table or 'data.shapes'}: nothing left to train on ({summary})")
    return items


def digest(items: Sequence[Single | Group]) -> str:
    """A hash of what is trained on: prompts, judgements, and where pictures lie in the folder that holds all of them.

    Pictures are not read, and the folder may be moved.
    """
    every = [[item.media] if isinstance(item, Single) else list(item.media) for item in items]
    folders = {os.path.dirname(medium.name) for media in every for medium in media if os.path.isabs(medium.name)}
    home = os.path.commonpath(folders) if folders else ""
    found = hashlib.sha256()
    for item, media in zip(items, every, strict=True):
        names = [os.path.relpath(medium.name, home) if os.path.isabs(medium.name) else medium.name for medium in media]
        said: Any = item.prompt if isinstance(item, Single) else (item.prompts, item.values, item.scores, item.weight)
        if isinstance(item, Group) and item.axes:
            said = (*said, item.axes, item.axis_scores)
        found.update(repr((names, said)).encode())
    return found.hexdigest()
