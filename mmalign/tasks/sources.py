"""Where a task's items come from: a table on disk, or the shapes world."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mmalign import tables
from mmalign.jobs import Data
from mmalign.media import MediaError, check_media
from mmalign.media_table import read_media_table
from mmalign.paths import find
from mmalign.progress import track
from mmalign.records import MediaRef
from mmalign.shapes.data import drawings, judged_pairs


@dataclass(frozen=True)
class Single:
    """A captioned picture: `media` has `hash()` and `name`."""

    prompt: str
    media: Any


def singles(data: Data) -> tuple[list[Single], str]:
    """Captioned pictures, and a sentence that says how many rows were kept and dropped and why."""
    if data.shapes:
        wanted = data.shapes
        drawn = drawings(wanted.scenes, wanted.seed, held_out=wanted.held_out, counts=wanted.counts)
        return _limited([Single(str(drawing.caption), drawing) for drawing in drawn], data), f"drew {len(drawn)} scenes"
    assert data.table is not None
    rows = read_media_table(find(data.table), data.root)
    refs = [row.media if isinstance(row.media, MediaRef) else MediaRef(row.media) for row in rows]
    with ThreadPoolExecutor() as pool:
        checks = pool.map(_problem, refs) if data.verify else [None] * len(refs)
        problems = list(track(checks, "checking pictures", len(refs)))
    kept = [Single(row.prompt, ref) for row, ref, bad in zip(rows, refs, problems, strict=True) if bad is None]
    dropped = [bad for bad in problems if bad is not None]
    summary = f"kept {len(kept)} of {len(rows)} rows"
    if dropped:
        summary += f"; dropped {len(dropped)} undecodable: {'; '.join(dropped[:3])}"
    return _limited(kept, data), summary


def _problem(ref: MediaRef) -> str | None:
    try:
        check_media(ref)
    except MediaError as error:
        return str(error)
    return None


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
        assert data.table is not None
        table = tables.read_preferences(find(data.table), data.format, data.root, data.verify, data.dimension)
        found = list(tables.pairs(table, data.ties))
        summary = f"{table.summary()}; {len(found)} pairs with ties: {data.ties}"
    return _limited(found, data), summary


def _limited(items: list[Any], data: Data) -> list[Any]:
    if not items:
        raise ValueError(f"{data.table}: nothing left to train on; see the reasons for dropped rows above")
    return items[: data.limit]
