"""POPE: polling questions about objects; its files and its figures.

Li et al., 2305.10355; AoiDragon/POPE (MIT). A file holds one split (random, popular, adversarial) of 3000 questions in
JSON lines: ``question_id``, ``image``, ``text``, ``label``. Saved answers are JSON lines too: with ``question_id``, or
in the questions' order, as its evaluate.py has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.hallucination.files import image_path, json_rows, needed
from mmalign.hallucination.yes_no import counted, rates
from mmalign.media_table import MediaRow

__all__ = ["answers", "figures", "questions", "split_of"]

SPLITS = ("random", "popular", "adversarial")


def split_of(file: Path) -> str:
    """The split that a file's name tells: `coco_pope_popular.json` is popular; else the whole name."""
    return next((split for split in SPLITS if split in file.stem), file.stem)


def questions(file: Path, images: Path | None) -> list[MediaRow]:
    """The rows of one file, clustered by image; `aux` has label, split and question_id.

    Raises:
        ValueError: not the layout, or a label that is neither yes nor no.
    """
    split, rows = split_of(file), []
    for number, line in enumerate(json_rows(file), 1):
        name, image, text, label = needed(line, f"{file}:{number}", "question_id", "image", "text", "label")
        if label not in ("yes", "no"):
            raise ValueError(f"{file}:{number}: the label is {label!r}; it is yes or no")
        aux = {"label": label, "split": split, "question_id": name}
        media = image_path(images, image)
        rows.append(MediaRow(f"{split}-{name}", text, media, group=image, dimensions=("pope",), aux=aux))
    return rows


def answers(file: Path, rows: Sequence[MediaRow]) -> dict[str, str]:
    """Saved answers by what they are to: of `answer` (POPE), `text` (LLaVA) or `response`.

    Raises:
        ValueError: no such key; or answers without ids that are not as many as the questions, or to others.
    """
    lines = json_rows(file)
    found: dict[str, str] = {}
    split = rows[0].aux["split"]
    key = next((key for key in ("answer", "response", "text") if lines and key in lines[0]), "answer")
    if lines and "question_id" not in lines[0]:
        if len(lines) != len(rows):
            raise ValueError(
                f"{file} has {len(lines)} answers without question_id, and there are {len(rows)} questions; answers "
                "without ids are taken in the questions' order, so none may be missing"
            )
        for row, line in zip(rows, lines, strict=True):
            if line.get("question", row.prompt) != row.prompt:
                raise ValueError(
                    f"{file}: answers {line['question']!r} where {row.prompt!r} is asked; it is in another order"
                )
    for number, line in enumerate(lines, 1):
        (text,) = needed(line, f"{file}:{number}", key)
        sample = f"{split}-{line['question_id']}" if "question_id" in line else rows[number - 1].sample
        if sample in found:
            raise ValueError(f"{file}:{number}: question {line.get('question_id')} is answered twice")
        found[sample] = str(text)
    return found


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of each split `accuracy, precision, recall, f1, yes_ratio, unknown` with yes as the positive class, and the mean
    over splits; the mean length of answers in words."""
    parts = counted(rows, lambda row: str(row["aux"].get("split", "")))
    found = {split: rates(parts[split], "yes") for split in sorted(parts)}
    told: dict[str, float | None] = {}
    for split, values in found.items():
        told |= {f"{split}/{name}" if split else name: value for name, value in values.items()}
    if len(found) > 1:
        for name in next(iter(found.values())):
            known = [value for each in found.values() if (value := each[name]) is not None]
            told[f"mean/{name}"] = sum(known) / len(known) if len(known) == len(found) else None
    told["words"] = sum(row["scores"]["words"] for row in rows) / len(rows)
    return told
