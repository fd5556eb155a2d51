"""Where a task's items come from: a table on disk, or the shapes world."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmalign.jobs import Data
from mmalign.paths import find
from mmalign.shapes.data import drawings, judged_pairs


@dataclass(frozen=True)
class Single:
    """A captioned picture: `media` has `hash()` and `name`."""

    prompt: str
    media: Any


def singles(data: Data) -> tuple[list[Single], str]:
    """Captioned pictures, and a sentence that says how many rows were kept and dropped."""
    if data.shapes:
        wanted = data.shapes
        drawn = drawings(wanted.scenes, wanted.seed, held_out=wanted.held_out, counts=wanted.counts)
        found = [Single(str(drawing.caption), drawing) for drawing in drawn]
        summary = f"drew {len(found)} scenes of the shapes world"
    else:
        from mmalign import tables

        assert data.table is not None
        table = tables.captioned(find(data.table), root=data.root, verify=data.verify)
        found = [Single(row.prompt, row.media) for row in table.rows]
        summary = table.summary()
    return _limited(found, data), summary


def pairs(data: Data) -> tuple[list[Any], str]:
    """Preference pairs (`prompt, winner, loser, label, weight, origin`), and the same sentence."""
    if data.shapes:
        found: list[Any] = judged_pairs(
            data.shapes.scenes, data.shapes.seed, data.shapes.annotator, held_out=data.shapes.held_out
        )
        if data.ties == "drop":
            found = [pair for pair in found if pair.label != 0.5]
        summary = f"drew {data.shapes.scenes} pairs of the shapes world, kept {len(found)}"
    else:
        from mmalign import tables

        assert data.table is not None
        table = tables.read_preferences(
            find(data.table), data.format, root=data.root, verify=data.verify, dimension=data.dimension
        )
        found = tables.pairs(table, data.ties)
        summary = f"{table.summary()}; {len(found)} pairs with ties: {data.ties}"
    return _limited(found, data), summary


def _limited(items: list[Any], data: Data) -> list[Any]:
    if not items:
        raise ValueError(f"{data.table}: nothing left to train on; see the reasons for dropped rows above")
    return items[: data.limit]
