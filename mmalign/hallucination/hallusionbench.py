"""HallusionBench: questions with and without figures, original and edited; its file and its figures.

Guan et al., 2310.14566; tianyi-lab/HallusionBench (BSD-3-Clause). VD questions depend on a figure, VS ones are also
asked without it (visual_input 0). There a GPT-4 tells correct, incorrect and unclear; here yes and no are parsed, and
what is neither is unclear.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mmalign.hallucination.files import image_path, json_rows, needed
from mmalign.media_table import MediaRow

__all__ = ["answers", "diagnosis", "figures", "questions"]

KEYS = ("category", "subcategory", "set_id", "figure_id", "question_id")
ANSWERS = ("model_prediction", "response", "answer", "prediction")


def questions(file: Path, images: Path | None) -> list[MediaRow]:
    """The rows, clustered by subcategory and set; `aux` has the file's columns and label (yes, no).

    Raises:
        ValueError: not the layout.
    """
    rows = []
    for number, line in enumerate(json_rows(file), 1):
        shown, asked, due, *names = needed(line, f"{file}:{number}", "visual_input", "question", "gt_answer", *KEYS)
        if str(due) not in ("0", "1"):
            raise ValueError(f"{file}:{number}: gt_answer is {due!r}; it is 0 or 1")
        aux = {name: str(value) for name, value in zip(KEYS, names, strict=True)}
        picture = f"{aux['category']}/{aux['subcategory']}/{aux['set_id']}_{aux['figure_id']}.png"
        bare = str(shown) == "0"
        rows.append(
            MediaRow(
                _sample(aux), asked, "" if bare else image_path(images, picture), "text" if bare else "image",
                group=f"{aux['subcategory']}/{aux['set_id']}", dimensions=("hallusionbench",),
                aux=aux | {"visual_input": str(shown), "label": "yes" if str(due) == "1" else "no"},
            )
        )  # fmt: skip
    return rows


def _sample(aux: Mapping[str, str]) -> str:
    return "-".join(str(aux[key]) for key in KEYS)


def answers(file: Path, rows: Sequence[MediaRow]) -> dict[str, str]:
    """Saved answers: the questions' file with a further key, as its evaluation.py reads it.

    Raises:
        ValueError: no such key, or a question answered twice.
    """
    found: dict[str, str] = {}
    lines = json_rows(file)
    key = next((key for key in ANSWERS if key in lines[0]), ANSWERS[0])
    for number, line in enumerate(lines, 1):
        text, *names = needed(line, f"{file}:{number}", key, *KEYS)
        sample = _sample(dict(zip(KEYS, names, strict=True)))
        if sample in found:
            raise ValueError(f"{file}:{number}: question {sample} is answered twice")
        found[sample] = str(text)
    return found


# ------------------------------------------------------------------------------------------------ figures

Row = Mapping[str, Any]


def figures(rows: Sequence[Row], keys: Literal["official", "vlmevalkit"] = "official") -> dict[str, float | None]:
    """aAcc, fAcc and qAcc of all, of VD and VS and of each subcategory; yes_ratio, unclear, words; LH, VI and Mix.

    Args:
        rows: with the scores accuracy, yes, unclear, words and the columns of `questions`.
        keys: vlmevalkit counts the rows with a figure alone, names figures and questions without their category, which
            merges VD's and VS's ocr, and does not skip VS's figure 0.
    """
    if keys == "vlmevalkit":
        rows = [row for row in rows if row["aux"]["visual_input"] != "0"]
    parts: dict[str, list[Row]] = {"": list(rows)}
    for row in rows:
        aux = row["aux"]
        parts.setdefault(f"{aux['category']}/", []).append(row)
        whole = aux["subcategory"] if keys == "vlmevalkit" else f"{aux['category']}-{aux['subcategory']}"
        parts.setdefault(f"{whole}/", []).append(row)
    found: dict[str, float | None] = {}
    for part in sorted(parts):
        for name, value in _accuracies(parts[part], keys).items():
            found[part + name] = value
    number = len(rows)
    for name in ("yes", "unclear", "words"):
        told = "yes_ratio" if name == "yes" else name
        found[told] = sum(row["scores"][name] for row in rows) / number if number else None
    return found | (diagnosis(rows) if keys == "official" else {})


def _accuracies(rows: Sequence[Row], keys: str) -> dict[str, float | None]:
    right = 0.0
    figure: dict[Any, bool] = {}
    question: dict[Any, bool] = {}
    for row in rows:
        aux, correct = row["aux"], row["scores"]["accuracy"]
        right += correct
        # A row's group has subcategory and set, and tells a set that a resample holds twice from itself.
        category = "" if keys == "vlmevalkit" else aux["category"]
        asked = row["group"], category, aux["question_id"]
        question[asked] = question.get(asked, True) and bool(correct)
        if keys == "vlmevalkit" or not (category == "VS" and aux["figure_id"] == "0"):
            seen = row["group"], category, aux["figure_id"]
            figure[seen] = figure.get(seen, True) and bool(correct)
    return {
        "aAcc": right / len(rows) if rows else None,
        "fAcc": _share(figure.values()),
        "qAcc": _share(question.values()),
    }


def _share(values: Iterable[bool]) -> float | None:
    held = list(values)
    return sum(held) / len(held) if held else None


def diagnosis(rows: Sequence[Row]) -> dict[str, float | None]:
    """Why questions are not right on all their figures: shares of these that are LH (language hallucination), VI
    (visual illusion) and Mix, by the rules of `get_eval_pair_all` in the authors' utils.py.

    There a GPT-4 tells whether two answers are the same; here two answers are, when the same of yes and no is parsed.
    Questions whose original (figure 0) has no score are left out.
    """
    original: dict[Any, Row] = {}
    for row in rows:
        if row["aux"]["figure_id"] == "0":
            original[_asked(row)] = row
    blamed: dict[Any, tuple[int, int]] = {}
    for row in rows:
        key = _asked(row)
        if key in original:
            language, vision = _blame(row, original[key])
            before = blamed.get(key, (0, 0))
            blamed[key] = before[0] + language, before[1] + vision
    kinds = ["Mix" if lh and vi else "LH" if lh else "VI" for lh, vi in blamed.values() if lh or vi]
    return {name: kinds.count(name) / len(kinds) if kinds else None for name in ("LH", "VI", "Mix")}


def _asked(row: Row) -> tuple[str, str, str]:
    return row["group"], row["aux"]["category"], row["aux"]["question_id"]


def _blame(row: Row, original: Row) -> tuple[int, int]:
    """(language, vision) for one answer, beside that to the original question."""
    depends, now, before = row["aux"]["category"] == "VD", _verdict(row), _verdict(original)
    if now == "correct":
        return 0, 0
    if row is original:
        if depends:
            return 0, 1
        return (1, 0) if now == "incorrect" else (0, 0)
    same = now != "unclear" and before != "unclear" and row["scores"]["yes"] == original["scores"]["yes"]
    if depends:
        return (1, 1) if before == "correct" and now == "incorrect" and same else (0, 1)
    if before == "incorrect":
        return (1, 0) if now == "incorrect" and same else (1, 1)
    if before == "correct" and now == "incorrect" and same and row["aux"]["visual_input"] == "2":
        return 1, 0
    return 0, 1


def _verdict(row: Row) -> Literal["correct", "incorrect", "unclear"]:
    if row["scores"]["unclear"]:
        return "unclear"
    return "correct" if row["scores"]["accuracy"] else "incorrect"
