"""What the readers of the benchmarks' public files share."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["image_path", "json_rows", "needed", "present"]


def json_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, or of one JSON list. ValueError, naming the place, for anything else."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); get it from the benchmark's repository") from None
    try:
        found = json.loads(text)
        rows = found if isinstance(found, list) else [found]
    except json.JSONDecodeError:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: is neither a JSON list nor JSON lines ({error.msg})") from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: holds no objects; get it from the benchmark's repository")
    return rows


def needed(row: Mapping[str, Any], where: str, *names: str) -> list[Any]:
    """The values of these keys. ValueError, with the keys that are there, where one is missing."""
    absent = [name for name in names if row.get(name) is None]
    if absent:
        raise ValueError(f"{where}: has no {', '.join(absent)}; it has {', '.join(row)}")
    return [row[name] for name in names]


def present(files: Sequence[Path], page: str) -> list[Path]:
    """The files, with ~ written out. ValueError for one that is not there; `page` says where it is from."""
    found = [file.expanduser() for file in files]
    for file in found:
        if not file.is_file():
            raise ValueError(f"{file} is not there; {page} says where it is from")
    return found


def image_path(images: Path | None, name: str) -> str:
    """Where a picture lies; its name where no folder is given, for answers that are scored without looking at it."""
    return name if images is None else os.path.abspath(images.expanduser() / name)
