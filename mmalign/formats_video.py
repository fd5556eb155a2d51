"""Public preference data sets of clips: VideoAlign's pairs by axis, VideoGen-RewardBench, VideoDPO."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.preference_row import INVALID, OVERALL, Dropped, Outcome, Verdict, clips_fault, finished
from mmalign.records import MediaRef, Record, Records, read_records

AXES = ("VQ", "MQ", "TA")
"""Visual quality, motion quality, text alignment, as VideoAlign (2501.13918) calls them."""


# ------------------------------------------------------------------------------------------------ pairs by axis


@dataclass(frozen=True)
class ClipPair:
    """A row of VideoAlign's tables: two clips of one prompt and what was said of them on each axis.

    Attributes:
        names: the paths as written.
        label: axis -> A, B or same, where it was judged.
        strange: axis -> what is written there and is no verdict.
    """

    prompt: str
    names: tuple[str, str]
    media: tuple[MediaRef, MediaRef]
    fps: tuple[Any, Any]
    num_frames: tuple[Any, Any]
    models: tuple[str | None, str | None]
    label: dict[str, Verdict]
    strange: dict[str, Any]


_VERDICTS: dict[str, Verdict] = {"A": "A", "B": "B", "same": "same"}


def clip_pair(record: Record, axes: dict[str, str]) -> ClipPair | Dropped:
    """Columns `path_A path_B prompt`, one per axis, and where there are such `A_model fps_A num_frames_A` (and B).

    Args:
        axes: name of each axis -> its column. An empty cell or `invalid` says that the pair was not judged on it.
    """
    values = record.values
    if not all(isinstance(values.get(name), str) and values[name] for name in ("path_A", "path_B", "prompt")):
        return Dropped(record.origin, "no prompt or path", "prompt, path_A and path_B must be text")
    names = (values["path_A"], values["path_B"])
    said = {axis: str(values.get(column) or INVALID).strip() for axis, column in axes.items()}
    models = tuple(None if values.get(f"{side}_model") is None else str(values[f"{side}_model"]) for side in "AB")
    media = (record.path(names[0]), record.path(names[1]))
    fps = (values.get("fps_A"), values.get("fps_B"))
    num_frames = (_whole(values.get("num_frames_A")), _whole(values.get("num_frames_B")))
    reason, detail = clips_fault({"fps": fps, "num_frames": num_frames}, media)
    if reason:
        return Dropped(record.origin, reason, detail)
    return ClipPair(
        values["prompt"], names, media, fps, num_frames, (models[0], models[1]),
        {axis: _VERDICTS[word] for axis, word in said.items() if word in _VERDICTS},
        {axis: word for axis, word in said.items() if word not in _VERDICTS and word.lower() != INVALID},
    )  # fmt: skip


def _whole(value: Any) -> Any:
    """CSV columns with an empty cell come as 49.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def videoalign(records: Iterable[Record]) -> Iterator[Outcome]:
    """VideoAlign's training CSV (Liu et al., 2501.13918): A, B or same on VQ, MQ and TA; an axis may be missing."""
    for record in records:
        yield from _by_axis(record, {axis: axis for axis in AXES}, "videoalign")


def videogen_rewardbench(records: Iterable[Record]) -> Iterator[Outcome]:
    """VideoGen-RewardBench (Liu et al., 2501.13918): as videoalign, and Overall; its own script calls that ALL."""
    for record in records:
        yield from _by_axis(record, bench_axes(record.values), "videogen_rewardbench")


def bench_axes(columns: Iterable[str]) -> dict[str, str]:
    """VideoGen-RewardBench's axes, in its leaderboard's order, and their columns."""
    held = set(columns)
    overall = "ALL" if "ALL" in held and "Overall" not in held else "Overall"
    return {"Overall": overall, **{axis: axis for axis in AXES}}


def _by_axis(record: Record, axes: dict[str, str], source: str) -> Iterator[Outcome]:
    pair = clip_pair(record, axes)
    if isinstance(pair, Dropped):
        yield pair
    elif pair.strange:
        detail = ", ".join(f"{axis} is {word!r:.40}" for axis, word in pair.strange.items())
        yield Dropped(record.origin, "unknown label", f"{detail}; a label is A, B, same or invalid")
    else:
        clips = {"fps": pair.fps, "num_frames": pair.num_frames, "models": pair.models}
        yield from finished(record, "prompt", pair.media, label=pair.label, source=source, clips=clips)


# ------------------------------------------------------------------------------------------------ VideoDPO


def videodpo(records: Iterable[Record]) -> Iterator[Outcome]:
    """VideoDPO (Liu et al., 2412.14167): pair.json names a better and a worse entry of metadata.json beside it."""
    for record in records:
        values = record.values
        if values.get("label") not in (None, 0):
            yield Dropped(
                record.origin, "unclear label", f"label is {values['label']!r}, and video1 is to be the better"
            )
            continue
        if values.get("trouble"):
            yield Dropped(record.origin, "bad media", values["trouble"])
            continue
        media = (record.path(values["clips"][0]), record.path(values["clips"][1]))
        yield from finished(record, "prompt", media, label={OVERALL: "A"}, source="videodpo")


def videodpo_files(path: Path) -> list[Path]:
    """The pair files that `path` stands for: itself, `pair.json` in it, or `pair.json` in each folder in it."""
    if path.is_file():
        return [path]
    own = [path / "pair.json"] if (path / "pair.json").is_file() else sorted(path.glob("*/pair.json"))
    return [each for each in own if (each.parent / "metadata.json").is_file()]


def videodpo_records(path: Path, root: str | Path | None = None) -> Records:
    """The pairs of VideoDPO's folders, each with the paths of its two clips (`clips`) and its `prompt`.

    Entries of metadata.json hold `basic.clip_path` and `misc.frame_caption`. A path is relative to the folder; where no
    file is there, as with a path of the authors' own machine, its last two parts below the folder are meant.

    Raises:
        ValueError: no such files, or they are not what they should be.
    """
    files = videodpo_files(path)
    if not files:
        raise ValueError(f"{path} is no VideoDPO set; it needs pair.json and metadata.json, or folders with both")
    rows, columns = [], dict[str, None]()
    for file in files:
        home = Path(root) if root is not None else file.parent
        clips = _metadata(file.parent / "metadata.json")
        pairs = read_records(file, home)
        columns |= dict.fromkeys(pairs.columns)
        label = file.parent.name if len(files) > 1 else ""
        for pair in pairs:
            where = f"{label}/{pair.origin}" if label else pair.origin
            rows.append(Record(_joined(pair.values, clips, home), where, file, pair.row, home))
    return Records(path, tuple(columns), rows)


def _metadata(file: Path) -> Sequence[Any]:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; the numbers in pair.json are places in it")
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); download it again") from None
    if not isinstance(held, list):
        raise ValueError(f"{file} holds one {type(held).__name__}, not a list of clips")
    return held


def _joined(pair: dict[str, Any], clips: Sequence[Any], home: Path) -> dict[str, Any]:
    """The pair with `clips` and `prompt`, or with `trouble` where its numbers or their entries are of no use."""
    found = []
    for name in ("video1", "video2"):
        number = pair.get(name)
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(clips):
            return {**pair, "trouble": f"{name} is {number!r:.40}, and metadata.json has {len(clips)} entries from 0"}
        basic = clips[number].get("basic") if isinstance(clips[number], dict) else None
        clip = basic.get("clip_path") if isinstance(basic, dict) else None
        if not isinstance(clip, str) or not clip:
            return {**pair, "trouble": f"entry {number} of metadata.json has no basic.clip_path"}
        found.append(_placed(clip, home))
    return {**pair, "clips": found, "prompt": _caption(pair.get("frame_caption"))}


def _placed(clip: str, home: Path) -> str:
    inside = home.joinpath(*Path(clip).parts[-2:])
    return clip if (home / clip).is_file() or not inside.is_file() else os.fspath(inside)


def _caption(value: Any) -> Any:
    """The text; in metadata.json, and in some sets' pairs, it is a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
