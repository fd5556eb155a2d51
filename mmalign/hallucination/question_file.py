"""Files of questions of one's own: JSON lines with ``question_id``, ``question``, ``answer`` and perhaps more.

``image`` or ``images``; ``options``; ``category``; of personalisation ``concept`` (who or what the question is about),
``concept_images``, ``description`` and ``preference`` (what the model is told before it is asked) and ``turns`` (talk
of other things in between). Without turns the model is told in the words of the question, behind all pictures. With
them it is told first, the pictures of the concept with it, says `GOT_IT`, and the turns follow: MMPB (2509.22820,
AIDASLab/MMPB) does so, whose own files have other columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.hallucination.answer_rules import LETTERS, due
from mmalign.hallucination.files import image_path, json_rows, needed
from mmalign.media_table import MediaRow
from mmalign.turns import earlier_turns

__all__ = ["GOT_IT", "answers", "questions"]

GOT_IT = "I got it."
"""What the assistant says to what it is told, where turns follow."""

ANSWERS = ("response", "prediction", "text")
"""Keys of saved answers; never ``answer``, which is what is right."""

_TOLD = ("question", "image", "images", "concept_images", "description", "preference", "turns")


def questions(file: Path, images: Path | None) -> list[MediaRow]:
    """The rows, clustered by concept, else by the question's first picture; `aux` has answer, options, concept and
    category, all columns that are not known, and `turns` as `mmalign respond` reads them.

    Raises:
        ValueError: not the layout; the message names the line.
    """
    rows = []
    for number, line in enumerate(json_rows(file), 1):
        where = f"{file}:{number}"
        needed(line, where, "question_id", "question", "answer")
        try:
            rows.append(_row(line, images))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return rows


def _row(line: Mapping[str, Any], images: Path | None) -> MediaRow:
    asked = due(line)
    own, of_concept = _pictures(line), _list(line, "concept_images")
    if of_concept and line.get("concept") is None:
        raise ValueError("concept_images show a concept; name it in concept")
    prompt = "\n".join(
        [_text(line, "question"), *(f"{letter}. {one}" for letter, one in zip(LETTERS, asked.options, strict=False))]
    )
    told, turns = _told(line, len(of_concept)), list(line.get("turns") or [])
    if any(turn.images for turn in earlier_turns(line.get("turns"))):
        raise ValueError("turns of a file of questions show no pictures; drop images from them")
    if told and turns:
        turns = [{"role": "user", "content": told, "images": len(of_concept)},
                 {"role": "assistant", "content": GOT_IT}, *turns]  # fmt: skip
    elif told:
        prompt = f"{told}\n\n{prompt}"
    places = [image_path(images, name) for name in (*of_concept, *own)]
    aux = {name: value for name, value in line.items() if name not in _TOLD and value is not None}
    concept = None if line.get("concept") is None else _text(line, "concept")
    return MediaRow(
        str(line["question_id"]), prompt, *((places[0], "image") if places else ("", "text")),
        group=concept or next(iter(own), None), dimensions=("answer_questions",), images=tuple(places[1:]),
        aux=aux | ({"turns": turns} if turns else {}),
    )  # fmt: skip


def _told(line: Mapping[str, Any], shown: int) -> str:
    """What the model is told before the question: which pictures show the concept, its description, the preference."""
    which = "first picture shows" if shown == 1 else f"first {shown} pictures show"
    parts = [f"The {which} {line['concept']}."] if shown else []
    return "\n".join([*parts, *(_text(line, name) for name in ("description", "preference") if line.get(name))])


def _pictures(line: Mapping[str, Any]) -> list[str]:
    """Those of the question itself."""
    if line.get("image") is None:
        return _list(line, "images")
    if line.get("images") is not None:
        raise ValueError("has both image and images; give one of them")
    return [_text(line, "image")]


def _list(line: Mapping[str, Any], name: str) -> list[str]:
    value = line.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, str) and each for each in value):
        raise ValueError(f"{name} is {value!r:.60}; it is a list of pictures")
    return value


def _text(line: Mapping[str, Any], name: str) -> str:
    value = line[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {value!r:.60}; it is a text")
    return value


def answers(file: Path, rows: Sequence[MediaRow]) -> dict[str, str]:
    """Saved answers: ``question_id`` and one of `ANSWERS`, perhaps with the question's own columns.

    Raises:
        ValueError: no such key, or a question answered twice.
    """
    found: dict[str, str] = {}
    lines = json_rows(file)
    key = next((key for key in ANSWERS if key in lines[0]), ANSWERS[0])
    for number, line in enumerate(lines, 1):
        name, text = needed(line, f"{file}:{number}", "question_id", key)
        if str(name) in found:
            raise ValueError(f"{file}:{number}: question {name} is answered twice")
        found[str(name)] = str(text)
    return found
