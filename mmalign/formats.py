"""Public preference data sets, each by one pure generator: rows as they stand in the file in, preference rows out.

Those of clips are in `mmalign.formats_video`; what a row is, in `mmalign.preference_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mmalign.formats_video import videoalign, videodpo, videogen_rewardbench
from mmalign.preference_row import (
    INVALID,
    OVERALL,
    Dropped,
    Outcome,
    Verdict,
    by_dimension,
    finished,
    not_finite,
    numbers,
    paths_of,
)
from mmalign.records import Record


def pickapic(records: Iterable[Record]) -> Iterator[Outcome]:
    """Pick-a-Pic v1 and v2 (Kirstain et al., 2305.01569): `label_0` is 1 if image 0 won, 0 if it lost, 0.5 if tied."""
    for record in records:
        value, other = record.values.get("label_0"), record.values.get("label_1")
        if record.values.get("has_label") is False or value is None or not_finite(value):
            yield Dropped(record.origin, "no label")
        elif value not in (0, 0.5, 1):
            yield Dropped(record.origin, "unknown label", f"label_0 is {value}, not 1, 0 or 0.5")
        elif other is not None and not not_finite(other) and value + other != 1:
            yield Dropped(record.origin, "contradicting labels", f"label_0 is {value} and label_1 is {other}")
        else:
            label: dict[str, Verdict] = {OVERALL: {1: "A", 0: "B", 0.5: "same"}[value]}  # type: ignore[dict-item]
            media = (record.cell("jpg_0"), record.cell("jpg_1"))
            yield from finished(
                record, "caption", media, label=label, user=record.values.get("user_id"), source="pickapic"
            )


def hpdv2(records: Iterable[Record]) -> Iterator[Outcome]:
    """HPDv2 (Wu et al., 2306.09341): train.json has `human_preference` (1 is better), test.json averaged `rank`."""
    for record in records:
        if "human_preference" in record.values:
            wins, paths = numbers(record.values["human_preference"]), record.values.get("file_path")
            media = paths_of(record, paths, "train")
            if wins is not None and len(wins) == 2 and len(media) == 2:
                verdict: Verdict = "same" if wins[0] == wins[1] else "A" if wins[0] > wins[1] else "B"
                user = record.values.get("user_hash")
                yield from finished(record, "prompt", media, label={OVERALL: verdict}, user=user, source="hpdv2")
            else:
                rank = None if wins is None else tuple(-win for win in wins)
                yield from finished(record, "prompt", media, rank=rank, source="hpdv2")
        else:
            media = paths_of(record, record.values.get("image_path"), "test")
            yield from finished(record, "prompt", media, rank=numbers(record.values.get("rank")), source="hpdv2")


def hpdv2_annotators(records: Iterable[Record]) -> Iterator[Outcome]:
    """HPDv2 test.json once more, a row for each annotator in `raw_annotations` instead of their average."""
    for record in records:
        media = paths_of(record, record.values.get("image_path"), "test")
        votes = record.values.get("raw_annotations") or []
        if not votes:
            yield Dropped(record.origin, "no label")
        for vote in votes:
            rank, user = numbers(vote.get("rank")), vote.get("user_hash")
            yield from finished(record, "prompt", media, rank=rank, user=user, source="hpdv2")


def hpdv3(records: Iterable[Record]) -> Iterator[Outcome]:
    """HPDv3 (Ma et al., 2508.03789): `path1` is always the preferred one."""
    for record in records:
        media = (*paths_of(record, [record.values.get("path1")]), *paths_of(record, [record.values.get("path2")]))
        source, models = record.values.get("source") or "hpdv3", [record.values.get(f"model{n}") for n in (1, 2)]
        yield from finished(
            record, "prompt", media, label={OVERALL: "A"}, source=source, clips={"models": models}
        )  # fmt: skip


def imagereward(records: Iterable[Record]) -> Iterator[Outcome]:
    """ImageReward's test.json (Xu et al., 2304.05977): `ranking` of `generations`, 1 is best, ties are equal."""
    for record in records:
        media = paths_of(record, record.values.get("generations"))
        yield from finished(record, "prompt", media, rank=numbers(record.values.get("ranking")), source="imagereward")


def plain(records: Iterable[Record]) -> Iterator[Outcome]:
    """mmalign's own form: `prompt`, `media`, one of `scores`, `rank`, `label`; maybe `user_id`, `weight`, `fps`, ..."""
    for record in records:
        values = record.values
        media = paths_of(record, values.get("media"))
        judged = [name for name in ("scores", "rank", "label") if values.get(name) is not None]
        if len(judged) != 1:
            detail = f"a row has exactly one of scores, rank, label; this one has {', '.join(judged) or 'none'}"
            yield Dropped(record.origin, "no label" if not judged else "several kinds of label", detail)
            continue
        found: dict[str, Any] = {}
        if judged == ["rank"]:
            found["rank"] = numbers(values["rank"])
        elif judged == ["scores"]:
            found["scores"] = {name: numbers(item) for name, item in by_dimension(values["scores"]).items()}
        else:
            named = by_dimension(values["label"]).items()
            said = {name: verdict.upper() if verdict in ("a", "b") else verdict for name, verdict in named}
            found["label"] = {name: verdict for name, verdict in said.items() if verdict != INVALID}
        weight = 1.0 if values.get("weight") is None else values["weight"]
        user, source = values.get("user_id"), values.get("source")
        clips = {name: values.get(name) for name in ("fps", "num_frames", "models")}
        yield from finished(record, "prompt", media, user=user, weight=weight, source=source, clips=clips, **found)


def folder(records: Iterable[Record]) -> Iterator[Outcome]:
    """Two folders joined by file name: `chosen/x.png` is better than `rejected/x.png`; prompts in `metadata.jsonl`."""
    for record in records:
        name = record.values.get("file_name")
        if not isinstance(name, str):
            yield Dropped(record.origin, "bad media", "file_name must be text")
            continue
        media = (record.path(f"chosen/{name}"), record.path(f"rejected/{name}"))
        yield from finished(record, "prompt", media, label={OVERALL: "A"}, source="folder")


@dataclass(frozen=True)
class Adapter:
    """A format: its generator, and the sets of columns of which a table must have one."""

    rows: Callable[[Iterable[Record]], Iterator[Outcome]]
    needs: tuple[tuple[str, ...], ...]

    @property
    def summary(self) -> str:
        """The generator's docstring, which is one line."""
        assert self.rows.__doc__
        return self.rows.__doc__.strip()


ADAPTERS = {
    "pickapic": Adapter(pickapic, (("caption", "jpg_0", "jpg_1", "label_0"),)),
    "hpdv2": Adapter(hpdv2, (("prompt", "file_path", "human_preference"), ("prompt", "image_path", "rank"))),
    "hpdv2_annotators": Adapter(hpdv2_annotators, (("prompt", "image_path", "raw_annotations"),)),
    "hpdv3": Adapter(hpdv3, (("prompt", "path1", "path2"),)),
    "imagereward": Adapter(imagereward, (("prompt", "generations", "ranking"),)),
    "videogen_rewardbench": Adapter(
        videogen_rewardbench,
        (("path_A", "path_B", "prompt", "Overall"), ("path_A", "path_B", "prompt", "ALL")),
    ),
    "videoalign": Adapter(videoalign, tuple(("path_A", "path_B", "prompt", axis) for axis in ("VQ", "MQ", "TA"))),
    "videodpo": Adapter(videodpo, (("video1", "video2", "frame_caption"),)),
    "jsonl": Adapter(plain, (("prompt", "media"), ("prompts", "media"))),
    "folder": Adapter(folder, (("file_name", "prompt"),)),
}
FORMATS = {name: adapter.summary for name, adapter in ADAPTERS.items()}
"""Name and one-line summary of each preference format, for `mmalign list formats`."""
