"""Small pictures and tables of them, for the tests of tables."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign import judgements
from mmalign.jobs_inputs import Data
from mmalign.tables import PreferenceTable


def png(shade: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade, 0, 255 - shade)).save(buffer, "PNG")
    return buffer.getvalue()


def put_images(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))


def put_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class Pair:
    """A pair as training sees it, by name."""

    prompt: str
    winner: Any
    loser: Any
    label: float
    weight: float
    origin: str


def pairs(table: PreferenceTable, ties: Any = "drop", **data: Any) -> list[Pair]:
    """The pairs that a training config with these data settings makes of a table."""
    settings = Data(table="unused", ties=ties, **data)
    found = judgements.pairs(judgements.judged(table.rows, settings), settings)
    return [Pair(one.prompts[0], *one.media, one.values[0], one.weight, one.origin) for one in found]
