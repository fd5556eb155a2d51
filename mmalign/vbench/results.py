"""Results files in the reference's layout: ``{name}_eval_results.json``. What else a run found is in `record`.

The layout (vbench/__init__.py of Vchitect/VBench) is one object, ``{dimension: [score, [row, ...]]}``, each row
``{"video_path": path, "video_results": value, ...}``. What is read besides:

- Camera motion of the image-to-video suite has three parts: score, score per type of motion (NaN for a type that no
  clip asks for, which is not JSON), rows. VBench-Long has three as well: score, rows per part of a clip, rows per clip.
- Culture fairness has a score per culture beside its score; gender, skin and safety have a row per prompt, with its
  clips in it.
- A value may be a number on the scale of its dimension (imaging quality from 0 to 100), a boolean, or a word.

The final-score scripts read the first part of each dimension and nothing else.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmalign.vbench.dimensions import I2V, QUALITY, SEMANTIC, TRUST, base
from mmalign.vbench.record import RECORD_FILE, VBenchRecord, read_record
from mmalign.vbench.score import I2V_QUALITY, VBENCH2

__all__ = [
    "SUFFIX",
    "Clip",
    "DimensionResults",
    "Loaded",
    "load",
    "read_eval_results",
    "results_files",
    "suite_of",
    "write_eval_results",
]

SUFFIX = "_eval_results.json"
FURTHER = "_further_results.json"
_MOST = 5  # mistakes of a file that are told
_VBENCH2 = {name for names in VBENCH2.values() for name in names}


@dataclass(frozen=True)
class Clip:
    """One clip of a dimension.

    Attributes:
        path: of the video, as the file has it.
        value: on the dimension's scale of clips; None where the file has no number (NaN, null, a word).
        extra: what else the row has; a word in the place of the value is ``video_results`` here.
    """

    path: str
    value: float | None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DimensionResults:
    """One dimension: its score (None where it is no finite number), its clips, and a score per kind if it has one."""

    score: float | None
    clips: tuple[Clip, ...] = ()
    per_type: dict[str, float | None] | None = None


# ------------------------------------------------------------------------------------------------ read


def read_eval_results(path: str | Path) -> dict[str, DimensionResults]:
    """The dimensions of a results file, in its order.

    Raises:
        ValueError: no JSON, or not this layout; with the file, the dimension and the row.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise ValueError(f"{path} is empty; the reference writes its results at the very end of a run")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    if not isinstance(data, dict):
        hint = "; this is a list of prompts, as in a _full_info.json" if isinstance(data, list) else ""
        raise ValueError(f"{path} is no results file: it holds no object of dimensions{hint}")
    if not data:
        raise ValueError(f"{path} holds no dimension")
    problems: list[str] = []
    found = {name: _dimension(str(name), value, problems) for name, value in data.items()}
    if problems:
        more = f"; and {len(problems) - _MOST} more" if len(problems) > _MOST else ""
        raise ValueError(f"{path} is no results file: {'; '.join(problems[:_MOST])}{more}")
    return found


def _dimension(name: str, value: Any, problems: list[str]) -> DimensionResults:
    if not isinstance(value, list) or not value:
        problems.append(f"{name} is {_kind(value)}, and should be [score, [rows]]")
        return DimensionResults(None)
    head, *parts = value
    per_type = next((part for part in parts if isinstance(part, dict)), None)
    if isinstance(head, list) and len(head) == 2 and isinstance(head[1], dict):  # culture fairness
        head, per_type = head
    if not _is_number(head) and head is not None:
        problems.append(f"{name}[0] is {_kind(head)}, and should be a score")
        return DimensionResults(None)
    place, rows = next(((i, part) for i, part in enumerate(parts, 1) if isinstance(part, list)), (0, []))
    if parts and not place:
        problems.append(f"{name} has no list of rows")
    clips = [clip for i, row in enumerate(rows) for clip in _clips(f"{name}[{place}][{i}]", row, problems)]
    types = None if per_type is None else {str(kind): _number(each) for kind, each in per_type.items()}
    return DimensionResults(_number(head), tuple(clips), types)


def _clips(where: str, row: Any, problems: list[str]) -> list[Clip]:
    """The clip of a row, or those of a prompt's row."""
    if not isinstance(row, dict):
        problems.append(f"{where} is {_kind(row)}, and should be an object with video_path and video_results")
        return []
    if "video_path" not in row and isinstance(row.get("video_results"), list):
        shared = {key: each for key, each in row.items() if key != "video_results"}
        inner = [
            clip
            for i, part in enumerate(row["video_results"])
            for clip in _clips(f"{where}.video_results[{i}]", part, problems)
        ]
        return [Clip(clip.path, clip.value, shared | clip.extra) for clip in inner]
    missing = [key for key in ("video_path", "video_results") if key not in row]
    if missing or not isinstance(row["video_path"], str):
        problems.append(f"{where} has no {' and no '.join(missing) or 'text as video_path'}")
        return []
    value = row["video_results"]
    extra = {key: each for key, each in row.items() if key not in ("video_path", "video_results")}
    if not _is_number(value) and value is not None:
        extra["video_results"] = value
    return [Clip(row["video_path"], _number(value), extra)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)  # booleans are numbers here: dynamic degree, human action


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "a boolean", int: "a number", float: "a number"}
    return "an empty list" if value == [] else kinds.get(type(value), "null")


# ------------------------------------------------------------------------------------------------ write


def write_eval_results(results: Mapping[str, DimensionResults], folder: str | Path, name: str) -> list[Path]:
    """Write ``{name}_eval_results.json`` as the reference's final-score scripts read it.

    That of the image-to-video suite fails at any dimension that it does not know, and neither knows a substitute, so
    all others go to ``{name}_further_results.json`` in the same layout. A dimension without a score is written nowhere:
    for the scripts it counts as 0 either way, and null would stop them.

    Args:
        name: of the run; a colon, which some file systems refuse, becomes a dash.

    Returns:
        The paths written, that of the reference first; an older file that would now be empty is removed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = set(I2V + I2V_QUALITY) if suite_of(results) == "i2v" else {*QUALITY, *SEMANTIC, *TRUST, *_VBENCH2}
    there = {label: each for label, each in results.items() if each.score is not None}
    written = []
    for suffix, inside in ((SUFFIX, True), (FURTHER, False)):
        chosen = {label: _layout(each) for label, each in there.items() if (label in known) is inside}
        path = folder / f"{name.replace(':', '-')}{suffix}"
        if not chosen:
            path.unlink(missing_ok=True)
            continue
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        text = json.dumps(chosen, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, path)
        written.append(path)
    return written


def _layout(results: DimensionResults) -> list[Any]:
    rows = [{"video_path": clip.path, "video_results": clip.value, **clip.extra} for clip in results.clips]
    types = [] if results.per_type is None else [results.per_type]
    return [results.score, *types, rows]


# ------------------------------------------------------------------------------------------------ several


def suite_of(names: Sequence[str] | Mapping[str, Any]) -> Literal["t2v", "i2v", "trust", "vbench2"]:
    """Which suite labels of dimensions are of: ``i2v``, ``vbench2``, ``trust`` or ``t2v``.

    The quality dimensions are in two suites; one dimension of images (``i2v_subject``) decides for that one.
    """
    bases = {base(name) for name in names}
    if bases & set(I2V):
        return "i2v"
    if bases and all(name.replace(" ", "_") in _VBENCH2 for name in bases):
        return "vbench2"
    return "trust" if bases and bases <= set(TRUST) else "t2v"


@dataclass(frozen=True)
class Loaded:
    """Scores of several files together.

    Attributes:
        scores: evaluator's label -> score.
        origin: label -> the file that it came from.
        record: of the one folder of ours that was named; None where files alone were.
    """

    scores: dict[str, float | None]
    origin: dict[str, Path]
    record: VBenchRecord | None = None


def results_files(path: str | Path) -> list[Path]:
    """The results files that a path means: the file itself, or those of the reference's name in a folder.

    Raises:
        ValueError: nothing there, a zip, or a folder without one.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(path.glob(f"*{SUFFIX}")) + sorted(path.glob(f"*{FURTHER}"))
        if not found:
            raise ValueError(f"{path} holds no *{SUFFIX}; name the file itself if it is called otherwise")
        return found
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    if path.suffix.lower() == ".zip":
        raise ValueError(f"{path} is a zip; unpack it and name the folder")
    return [path]


def load(paths: Sequence[str | Path]) -> Loaded:
    """The scores of results files and of folders that hold some, the reference's or ours.

    Raises:
        ValueError: no file, not the layout, or two files with different scores of one dimension.
    """
    scores: dict[str, float | None] = {}
    origin: dict[str, Path] = {}
    for file in [file for path in paths for file in results_files(path)]:
        if file.name == RECORD_FILE:
            raise ValueError(f"{file} is the record of a run; name its folder, or the *{SUFFIX} beside it")
        for label, results in read_eval_results(file).items():
            label = label.replace(" ", "_")
            if label in scores and scores[label] != results.score:
                raise ValueError(
                    f"{label} is {scores[label]} in {origin[label]} and {results.score} in {file}; "
                    "name the files of one run"
                )
            scores[label], origin[label] = results.score, file
    records = [Path(path) for path in paths if (Path(path) / RECORD_FILE).is_file()]
    return Loaded(scores, origin, read_record(records[0]) if len(paths) == 1 and records else None)
