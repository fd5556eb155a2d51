"""Public benchmarks of human judgements, read from the folders in which they are published.

Each reader gives every medium that was judged once (a row to score), and the groups that people judged. Nothing is
looked for on disk here but the annotation files: media that are not there are found, named and counted by the verb, and
keep their place. A row that says nothing usable is `dropped` with its reason.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmalign.formats import hpdv2, imagereward, pickapic
from mmalign.formats_video import ClipPair, bench_axes, clip_pair
from mmalign.jobs_bench import BenchConfig
from mmalign.media_table import MediaRow
from mmalign.preference_row import OVERALL, Dropped, PreferenceRow
from mmalign.protocols.pairs import VOTES
from mmalign.records import MediaRef, Record, missing_columns, read_records

NAN = float("nan")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Group:
    """Media of one prompt that people compared.

    Attributes:
        samples: names of the media, as in `RewardSet.items`.
        human: axis -> a value per medium, higher is better, equal ones are ties; NaN where it was not judged.
        unit: what a macro average counts once.
        vote: index into `mmalign.protocols.pairs.VOTES`, -1 for none.
        validation: whether the benchmark keeps it for fitting thresholds.
        labels: skills that the prompt asks for.
        people: what each person said, in the same order and sense, where the benchmark says so.
    """

    prompt: str
    samples: tuple[str, ...]
    human: dict[str, tuple[float, ...]]
    unit: str
    vote: int = -1
    validation: bool = False
    labels: tuple[str, ...] = ()
    people: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class RewardSet:
    """A benchmark as it was read.

    Attributes:
        items: a row to score per medium and prompt, whether or not the medium is there.
        groups: what people judged; empty for suites of prompts without judgements.
        places: for such suites, where each item stands (style, task, question, ...), parallel to `items`.
        dropped: rows of the annotation file that say nothing usable.
        aliases: other names of samples in tables of scores, where the authors' own files differ -> sample.
    """

    items: tuple[MediaRow, ...]
    groups: tuple[Group, ...] = ()
    places: tuple[dict[str, Any], ...] = ()
    dropped: tuple[Dropped, ...] = ()
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, ...]:
        """What was judged, in the benchmark's order."""
        return tuple(dict.fromkeys(axis for group in self.groups for axis in group.human))


@dataclass
class Items:
    """Media by name and prompt. One that was made for a single prompt, as nearly all are, is called by its name."""

    rows: dict[tuple[str, str], MediaRow] = field(default_factory=dict)

    def add(self, name: str, row: MediaRow) -> tuple[str, str]:
        key = (name, row.prompt)
        self.rows.setdefault(key, row)
        return key

    def names(self) -> dict[tuple[str, str], str]:
        """Key -> sample; where a medium stands under several prompts, with the first digits of the prompt's hash."""
        prompts: dict[str, int] = {}
        for name, _ in self.rows:
            prompts[name] = prompts.get(name, 0) + 1
        return {
            (name, prompt): name if prompts[name] == 1 else f"{name}#{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
            for name, prompt in self.rows
        }

    def finish(self, groups: Iterable[tuple[Sequence[tuple[str, str]], Group]], dropped: Iterable[Dropped]) -> Any:
        names = self.names()
        items = tuple(replace(row, sample=names[key]) for key, row in self.rows.items())
        named = tuple(replace(group, samples=tuple(names[key] for key in keys)) for keys, group in groups)
        return RewardSet(items, named, dropped=tuple(dropped))


def annotation_file(config: BenchConfig, *names: str) -> Path:
    """The first of these files below the folder, or the folder itself where it is a file.

    Raises:
        ValueError: there is none of them.
    """
    folder = config.folder
    if folder.is_file():
        return folder
    for name in names:
        found = sorted(folder.glob(name)) if "*" in name else [folder / name]
        if found and found[0].is_file():
            return found[0]
    state = "does not exist" if not folder.exists() else f"has no {' or '.join(names)}"
    raise ValueError(
        f"folder: {folder} {state}, which {config.benchmark} needs; `mmalign list benchmarks` shows the layout"
    )


def shards(found: Path, split: str) -> list[Path]:
    """All files of a split, where one of `<split>-*.parquet` was found; else that file alone."""
    if found.suffix != ".parquet" or not found.name.startswith(f"{split}-"):
        return [found]
    return sorted(found.parent.glob(f"{split}-*.parquet"))


def media_root(config: BenchConfig, home: Path, *candidates: str) -> Path:
    """`config.media`, else the first candidate folder that is there, else `home`."""
    if config.media is not None:
        return config.media
    return next((home / name for name in candidates if (home / name).is_dir()), home)


def existing(stem: Path, suffixes: Sequence[str] = SUFFIXES) -> str:
    """The absolute path of the file with one of the suffixes; with the first of them where there is none."""
    found = next((suffix for suffix in suffixes if stem.with_name(stem.name + suffix).is_file()), suffixes[0])
    return os.path.abspath(stem.with_name(stem.name + found))


# ------------------------------------------------------------------------------------------------ lists


def read_hpdv2(config: BenchConfig) -> RewardSet:
    """`test.json`: {prompt, image_path[], rank[] (averaged, lower is better), raw_annotations}; pictures in `test/`."""
    table = annotation_file(config, "test.json")
    records = read_records(table, media_root(config, table.parent))
    if missing := {"prompt", "image_path", "rank"} - set(records.columns):
        other = " This is imagereward's file." if "generations" in records.columns else ""
        raise ValueError(missing_columns(table, sorted(missing), records.columns, "hpdv2's test.json") + other)
    return _ranked(list(records), hpdv2, "image_path")


def read_imagereward(config: BenchConfig) -> RewardSet:
    """`test.json`: {id, prompt, generations[], ranking[] (1 is best, ties are equal)}; pictures in `test_images/`."""
    table = annotation_file(config, "test.json", "data/test.json", "ImageReward_test.json")
    records = read_records(table, media_root(config, table.parent, "test_images", "data/test_images"))
    if missing := {"prompt", "generations", "ranking"} - set(records.columns):
        other = " This is hpdv2's file." if "image_path" in records.columns else ""
        raise ValueError(missing_columns(table, sorted(missing), records.columns, "ImageReward's test.json") + other)
    return _ranked(list(records), imagereward, "generations")


def _ranked(records: Sequence[Record], reader: Any, column: str) -> RewardSet:
    """Rows with a rank per medium; each row is a unit, for some prompts stand in several."""
    items, groups, dropped = Items(), [], []
    for number, (record, outcome) in enumerate(zip(records, reader(records), strict=True)):
        if isinstance(outcome, Dropped):
            dropped.append(outcome)
            continue
        assert outcome.rank is not None
        written = record.values[column]
        keys = [
            items.add(str(name), MediaRow(str(name), outcome.prompt, _plain(ref)))
            for name, ref in zip(written, outcome.media, strict=True)
        ]
        human = {OVERALL: tuple(-rank for rank in outcome.rank)}
        people = _people(record.values.get("raw_annotations"), len(keys))
        groups.append((keys, Group(outcome.prompt, (), human, unit=f"row {number}", people=people)))
    found: RewardSet = items.finish(groups, dropped)
    return found


def _people(annotations: Any, count: int) -> tuple[tuple[float, ...], ...]:
    """The ranks of each person, turned; those that do not rank all media are left out."""
    found = []
    for one in annotations or ():
        rank = one.get("rank") if isinstance(one, dict) else None
        if isinstance(rank, list) and len(rank) == count and all(isinstance(value, int | float) for value in rank):
            found.append(tuple(-float(value) for value in rank))
    return tuple(found)


def _plain(ref: MediaRef) -> str | MediaRef:
    return ref.file if ref.row is None else ref


# ------------------------------------------------------------------------------------------------ pairs


def read_pickapic(config: BenchConfig) -> RewardSet:
    """`<split>-*.parquet` (or a JSONL table) with caption, jpg_0, jpg_1, image_0_uid, image_1_uid, label_0, has_label.

    All files of the split are read. `validation_unique` beside `test_unique` is read too, for the tie threshold. In the
    sets without pictures `media` names a folder of `<uid>.jpg`.
    """
    split = config.split or "test_unique"
    table = annotation_file(config, f"data/{split}-*.parquet", f"{split}-*.parquet", f"{split}.parquet")
    tables = [(table, False)] if config.folder.is_file() else [(path, False) for path in shards(table, split)]
    if split == "test_unique" and not config.folder.is_file():
        tables += [(path, True) for path in sorted(table.parent.glob("validation_unique[-.]*parquet"))]
    items, groups, dropped = Items(), [], []
    for path, validation in tables:
        records = read_records(path, media_root(config, path.parent, "images"))
        if missing := {"caption", "label_0"} - set(records.columns):
            raise ValueError(missing_columns(path, sorted(missing), records.columns, "Pick-a-Pic"))
        rows = [_with_pictures(record, set(records.columns)) for record in records]
        for record, outcome in zip(rows, pickapic(rows), strict=True):
            if isinstance(outcome, Dropped):
                dropped.append(outcome)
                continue
            keys = [
                items.add(_uid(record, n), MediaRow("", outcome.prompt, _plain(ref), model=_text(record, f"model_{n}")))
                for n, ref in enumerate(outcome.media)
            ]
            human = {OVERALL: _sides(outcome)}
            groups.append((keys, Group(outcome.prompt, (), human, outcome.prompt, validation=validation)))
    found: RewardSet = items.finish(groups, dropped)
    return found


def _with_pictures(record: Record, columns: set[str]) -> Record:
    """The record as it is, or with the files that its uids name where the set came without pictures."""
    if {"jpg_0", "jpg_1"} <= columns:
        return record
    files = {
        f"jpg_{n}": existing(record.root / str(record.values.get(f"image_{n}_uid")), (".jpg", ".png")) for n in (0, 1)
    }
    return replace(record, values={**record.values, **files})


def _uid(record: Record, number: int) -> str:
    return _text(record, f"image_{number}_uid") or f"{record.origin} jpg_{number}"


def _text(record: Record, column: str) -> str | None:
    value = record.values.get(column)
    return None if value is None else str(value)


def _sides(row: PreferenceRow) -> tuple[float, ...]:
    assert row.label is not None
    return _LABELS[row.label[OVERALL]]


_LABELS: dict[str, tuple[float, ...]] = {"A": (1.0, 0.0), "B": (0.0, 1.0), "same": (0.0, 0.0)}


def read_videogen(config: BenchConfig) -> RewardSet:
    """`videogen-rewardbench.csv`: path_A, path_B, prompt, VQ, MQ, TA, Overall (A, B or same), A_model, fps_A, ...

    A clip stands in many pairs and is scored once. A label that is none of the three is not judged on that axis.
    VideoAlign's own script calls Overall `ALL`; both names are read.
    """
    table = annotation_file(config, "videogen-rewardbench.csv", "*.csv")
    records = read_records(table, media_root(config, table.parent))
    columns = bench_axes(records.columns)
    if missing := {"path_A", "path_B", "prompt", *columns.values()} - set(records.columns):
        raise ValueError(missing_columns(table, sorted(missing), records.columns, "VideoGen-RewardBench"))
    items, groups, dropped = Items(), [], []
    for record in records:
        pair = clip_pair(record, columns)
        if isinstance(pair, Dropped):
            dropped.append(pair)
            continue
        keys = [items.add(pair.names[side], _clip(pair, side)) for side in (0, 1)]
        human = {axis: _LABELS[pair.label[axis]] if axis in pair.label else (NAN, NAN) for axis in columns}
        groups.append((keys, Group(pair.prompt, (), human, unit=pair.prompt)))
    found: RewardSet = items.finish(groups, dropped)
    return found


def _clip(pair: ClipPair, side: int) -> MediaRow:
    fps, frames = pair.fps[side], pair.num_frames[side]
    return MediaRow(
        "", pair.prompt, pair.media[side].file, modality="video", model=pair.models[side],
        fps=None if fps is None else float(fps), num_frames=None if frames is None else int(frames),
    )  # fmt: skip


_TASKS = {
    "genai_bench_image": ("image_generation", "image"),
    "genai_bench_edit": ("image_edition", "output_image"),
    "genai_bench_video": ("video_generation", "video"),
}
_VOTES = {"leftvote": 0, "rightvote": 1, "tievote": 2, "bothbad_vote": 3}
assert len(_VOTES) == len(VOTES)


def read_genai_bench(config: BenchConfig) -> RewardSet:
    """TIGER-Lab's GenAI-Bench: `<task>/<split>-*.parquet` with left_*, right_*, prompt and vote_type.

    `split` is `test_v1` (the paper's 1,735, 919 and 1,069 votes) or `test` (more votes). Clips are named by address:
    the file of that name is looked for in `media`, or in `videos/`. Samples are `00000/left`, `00000/right`, ....
    """
    task, column = _TASKS[config.benchmark]
    split = config.split or "test_v1"
    first = annotation_file(config, f"{task}/{split}-*.parquet", f"{split}-*.parquet", f"{task}.jsonl")
    tables = [first] if config.folder.is_file() else shards(first, split)
    items, groups, dropped, number = Items(), [], [], -1
    text = "prompt" if config.benchmark != "genai_bench_edit" else config.edit_prompt
    for path in tables:
        records = read_records(path, media_root(config, path.parent, "videos", "../videos"))
        needed = (text, "vote_type", f"left_{column}", f"right_{column}")
        if missing := set(needed) - set(records.columns):
            raise ValueError(missing_columns(path, sorted(missing), records.columns, config.benchmark))
        for record in records:
            number += 1
            vote = _VOTES.get(str(record.values.get("vote_type")))
            prompt = record.values.get(text)
            if vote is None or not isinstance(prompt, str):
                detail = f"vote_type is {record.values.get('vote_type')!r}, not {', '.join(_VOTES)}"
                dropped.append(Dropped(record.origin, "unknown label" if vote is None else "no prompt", detail))
                continue
            keys = [
                items.add(f"{number:05d}/{side}", _voted(record, side, column, prompt)) for side in ("left", "right")
            ]
            human = {OVERALL: _LABELS[("A", "B", "same", "same")[vote]]}
            groups.append((keys, Group(prompt, (), human, prompt, vote=vote)))
    found: RewardSet = items.finish(groups, dropped)
    return found


def _voted(record: Record, side: str, column: str, prompt: str) -> MediaRow:
    name = f"{side}_{column}"
    model = _text(record, f"{side}_model")
    if column == "video":
        file = record.path(str(record.values.get(name)).rsplit("/", 1)[-1]).file
        return MediaRow("", prompt, file, modality="video", model=model)
    source = None
    if "source_image" in record.cells or record.values.get("source_image"):
        source = _plain(record.cell("source_image"))
    texts = {key: record.values[key] for key in ("source_prompt", "target_prompt", "instruct_prompt")
             if isinstance(record.values.get(key), str)}  # fmt: skip
    return MediaRow("", prompt, _plain(record.cell(name)), model=model, reference=source, aux=texts)


def each_item(groups: Iterable[Group], axis: str) -> Iterator[tuple[Group, str, float]]:
    """(group, sample, human value) of every judged medium."""
    for group in groups:
        for sample, value in zip(group.samples, group.human[axis], strict=True):
            yield group, sample, value
