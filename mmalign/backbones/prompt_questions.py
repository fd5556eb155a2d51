"""Questions about prompts: the file that holds them, and which words of a prompt they leave out.

A question file is JSONL, a question per line::

    {"prompt": "a red cat", "question": "What colour is the cat?", "choices": ["red", "black"], "answer": "red",
     "covers": ["red"]}

or CSV with these columns, ``choices`` and ``covers`` separated by ``|``. ``choices`` may be left out (yes and no), and
``covers`` too (then the words of question and answer count).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Question",
    "content_words",
    "question_rows",
    "read_prompts",
    "read_questions",
    "text_list",
    "uncovered",
    "write_questions",
]

# Words that an image cannot show by themselves. Places (on, under, behind), numbers and negations are not among them.
_FUNCTION_WORDS = """
a an the this that these those it its he him his she her they them their there here who whom whose which what i me my
we us our you your and or but so if then than as of to for by at from in into with is are am was were be been being has
have had having do does did will would can could shall should may might must s t
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Question:
    """One question about an image of a prompt.

    Attributes:
        question: as it is put to a model.
        choices: possible answers, at least two.
        answer: the one that is right for the prompt.
        covers: words or phrases of the prompt that it checks; empty for those that question and answer name.
    """

    question: str
    choices: tuple[str, ...]
    answer: str
    covers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise ValueError("the question is empty")
        if len(set(self.choices)) < 2 or len(set(self.choices)) != len(self.choices):
            raise ValueError(f"choices have to be two or more, each once; they are {list(self.choices)}")
        if not all(choice.strip() for choice in self.choices):
            raise ValueError("a choice is empty")
        if self.answer not in self.choices:
            raise ValueError(f"the answer '{self.answer}' is not one of the choices {list(self.choices)}")


def content_words(text: str) -> list[str]:
    """The text's distinct words in lower case and in order, without function words.

    Words are runs of letters and digits of any script, so ``5-storey`` is two words.
    """
    return list(dict.fromkeys(word for word in _WORD.findall(text.casefold()) if word not in FUNCTION_WORDS))


def uncovered(prompt: str, questions: Iterable[Question]) -> list[str]:
    """Content words of the prompt that no question covers, in their order."""
    named: set[str] = set()
    for question in questions:
        texts = question.covers or (question.question, question.answer)
        named |= {word for text in texts for word in content_words(text)}
    return [word for word in content_words(prompt) if word not in named]


def read_questions(path: str | Path) -> dict[str, tuple[Question, ...]]:
    """Questions by prompt, in the file's order.

    Raises:
        ValueError: the file is missing, in neither layout, or a question is incomplete (with its line).
    """
    path = Path(path).expanduser()
    found: dict[str, list[Question]] = {}
    for number, row in question_rows(path, {"prompt", "question", "answer"}):
        try:
            prompt = str(row.get("prompt") or "")
            if not prompt.strip():
                raise ValueError("there is no prompt")
            found.setdefault(prompt, []).append(_question(row))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}.") from None
    if not found:
        raise ValueError(f"{path}: holds no questions.")
    return {prompt: tuple(questions) for prompt, questions in found.items()}


def _question(row: Mapping[str, Any]) -> Question:
    choices = text_list(row.get("choices"), "choices") or ("yes", "no")
    answer = row.get("answer")
    if not isinstance(row.get("question"), str) or not isinstance(answer, str):
        raise ValueError("question and answer have to be text")
    return Question(row["question"].strip(), choices, answer.strip(), text_list(row.get("covers"), "covers"))


def text_list(value: Any, name: str) -> tuple[str, ...]:
    """Texts of a JSON list, or of a CSV field that separates them by bars; ValueError with its name for others."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split("|") if part.strip())
    parts = value or ()
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{name}: these have to be lists of texts, not {value!r}")
    return tuple(part.strip() for part in parts)


def question_rows(path: Path, columns: Set[str]) -> list[tuple[int, Mapping[str, Any]]]:
    """Line numbers and rows of a question file: JSONL, or CSV that has these columns.

    Raises:
        ValueError: it cannot be read as text, is in neither layout, or lacks a column.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"questions: {path} cannot be read as text ({error}).") from None
    if path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if absent := columns - set(reader.fieldnames or ()):
            raise ValueError(f"{path}: has no column {', '.join(sorted(absent))}.")
        return [(reader.line_num, row) for row in reader]
    rows: list[tuple[int, Mapping[str, Any]]] = []
    # Not splitlines, which also cuts at characters that a JSON text may hold, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: is not JSON ({error}); a question file has one per line.") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: holds {type(row).__name__}, not a question.")
            rows.append((number, row))
    return rows


def write_questions(path: str | Path, questions: Mapping[str, Sequence[Question]]) -> None:
    """Write a JSONL question file; `read_questions` gives the same back."""
    lines = [
        json.dumps({"prompt": prompt, **{name: getattr(one, name) for name in Question.__dataclass_fields__}})
        for prompt, group in questions.items()
        for one in group
    ]
    Path(path).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def read_prompts(path: str | Path) -> list[str]:
    """Distinct prompts of a CSV with a column ``prompt`` (such as Gecko's), or of a text file with one per line."""
    path = Path(path).expanduser()
    if path.suffix.lower() != ".csv":
        found = [line.removesuffix("\r") for line in path.read_text(encoding="utf-8-sig").split("\n")]
    else:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if "prompt" not in (reader.fieldnames or ()):
                raise ValueError(f"{path}: has no column prompt; it has {', '.join(reader.fieldnames or ())}.")
            found = [row["prompt"] or "" for row in reader]
    return list(dict.fromkeys(prompt for prompt in found if prompt.strip()))
