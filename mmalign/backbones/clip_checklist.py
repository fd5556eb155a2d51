"""Files of yes/no questions about clips: checklists of one's own, and suites in VBench-2.0's layout.

A checklist is JSONL, a question per line::

    {"id": "ball", "question": "Is there a ball?"}
    {"question": "Does it bounce?", "depends": ["ball"], "weight": 2, "dimension": "physics"}
    {"question": "Is the ball cut off by the frame?", "expected": "no", "dimension": "framing"}

or CSV with these columns, ``depends`` separated by ``|``. With a ``prompt`` a question belongs to clips of that prompt,
else to all. ``shown`` names the part of the clip that it is asked of: all, first_half, second_half, first or last
(frame). A file ``.json`` is a suite in VBench-2.0's layout: ``prompt_en``, ``dimension``, ``auxiliary_info``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mmalign.backbones.clip_questions import Asked, ClipQuestion, QuestionParams, Shown
from mmalign.backbones.prompt_questions import question_rows, text_list

__all__ = ["Checklist", "asked_of_row", "read_checklist", "read_suite"]

COLUMNS = frozenset({"id", "prompt", "question", "depends", "expected", "weight", "dimension", "shown"})
ONE_CREATURE = "Is there only one creature in the video?"


@dataclass(frozen=True)
class Checklist:
    """Questions of a file.

    Attributes:
        path: where they are from.
        common: about every clip.
        by_prompt: further ones about clips of a prompt.
    """

    path: Path
    common: tuple[ClipQuestion, ...]
    by_prompt: Mapping[str, tuple[ClipQuestion, ...]]

    def of(self, prompt: str) -> tuple[ClipQuestion, ...]:
        """What is asked about clips of a prompt; ValueError where that is nothing."""
        found = (*self.common, *self.by_prompt.get(prompt, ()))
        if not found:
            raise ValueError(f"{self.path} has no questions about this prompt: '{prompt[:200]}'.")
        return found


def read_checklist(path: Path, params: QuestionParams) -> Checklist:
    """Questions from JSONL or CSV.

    Raises:
        ValueError: the file cannot be read, or a question is wrong (with its line), or the whole does not fit: a name
            twice or not there, a dimension that only some prompts have, weights or dimensions that ``combine`` has no
            use for.
    """
    path = path.expanduser()
    common: list[ClipQuestion] = []
    prompts: dict[str, list[ClipQuestion]] = {}
    for count, (number, row) in enumerate(question_rows(path, {"question"}), start=1):
        try:
            if strangers := sorted(str(key) for key in row if key not in COLUMNS):
                raise ValueError(f"{strangers[0]} is not known; a question has {', '.join(sorted(COLUMNS))}")
            prompt = _text(row, "prompt")
            group = prompts.setdefault(prompt, []) if prompt else common
            group.append(_question(row, f"#{count}", len(group), params))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}.") from None
    found = Checklist(path, tuple(common), {prompt: tuple(group) for prompt, group in prompts.items()})
    _check(found, params)
    return found


def _question(row: Mapping[str, Any], name: str, place: int, params: QuestionParams) -> ClipQuestion:
    text = _text(row, "question")
    if not text:
        raise ValueError("the question is empty")
    expected = _text(row, "expected").lower() or "yes"
    if expected not in ("yes", "no"):
        raise ValueError(f"expected has to be yes or no, not '{expected}'")
    try:
        weight = float(row["weight"]) if row.get("weight") not in (None, "") else 1.0
    except (TypeError, ValueError):
        raise ValueError(f"weight has to be a number, not {row['weight']!r}") from None
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"weight has to be above 0, not {weight:g}")
    shown: Any = _text(row, "shown") or (params.shown[place] if place < len(params.shown) else "all")
    if shown not in get_args(Shown):
        raise ValueError(f"shown has to be one of {', '.join(get_args(Shown))}, not '{shown}'")
    parents = text_list(row.get("depends"), "depends")
    dimension = _text(row, "dimension")
    if dimension == "score":
        raise ValueError("dimension: score is the name of the whole; give it another one")
    return ClipQuestion(_text(row, "id") or name, text, parents, expected == "yes", weight, dimension, shown)


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str | int | None) or isinstance(value, bool):
        raise ValueError(f"{name} has to be text, not {value!r}")
    return "" if value is None else str(value).strip()


def _check(found: Checklist, params: QuestionParams) -> None:
    """Refuse what makes no sense together, whatever the clip."""
    if not found.common and not found.by_prompt:
        raise ValueError(f"{found.path}: holds no questions.")
    # A prompt that the file does not name is asked the common ones alone, so these have to stand by themselves.
    groups = {prompt: (*found.common, *more) for prompt, more in found.by_prompt.items()}
    if found.common:
        groups[""] = found.common
    dimensions = {prompt: {one.dimension for one in group} - {""} for prompt, group in groups.items()}
    every = set().union(*dimensions.values())
    for prompt, group in groups.items():
        where = f"{found.path}: " + (f"of the prompt '{prompt[:200]}', " if prompt else "")
        names = [one.name for one in group]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{where}the question {twice[0]} occurs twice; give each another id.")
        for one in group:
            if absent := [parent for parent in one.parents if parent not in names]:
                raise ValueError(f"{where}question {one.name} depends on {absent[0]}, which is not there.")
        if missing := sorted(every - dimensions[prompt]):
            raise ValueError(
                f"{where}there is no question of the dimension {missing[0]}, which others have. A dimension is a score "
                "of every clip: ask it of all prompts, or leave it out."
            )
    every_question = [one for group in groups.values() for one in group]
    if params.combine != "mean" and any(one.weight != 1 for one in every_question):
        raise ValueError(f"{found.path}: weights belong to combine: mean; with {params.combine} they have no meaning.")
    if params.combine == "condition" and every:
        raise ValueError(f"{found.path}: combine: condition makes one score; leave the dimensions out, or use depends.")


def read_suite(path: Path, dimension: str, params: QuestionParams) -> dict[str, Asked]:
    """Questions by prompt from a suite in VBench-2.0's layout: a JSON array of rows with auxiliary_info.

    Raises:
        ValueError: it is no such file, no row is of the dimension (with those that there are), or a row of it has no
            questions (with its number, from 0).
    """
    path = path.expanduser()
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"questions: {path} cannot be read as JSON ({error}).") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"questions: {path} has to be a JSON array of rows; a checklist of your own ends in .jsonl.")
    found: dict[str, Asked] = {}
    there: dict[str, None] = {}
    for number, row in enumerate(rows):
        named = row.get("dimension")
        names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        there |= dict.fromkeys(str(name) for name in names)
        if dimension in names:
            try:
                if not isinstance(prompt := row.get("prompt_en"), str):
                    raise ValueError("it has no prompt_en")
                asked = asked_of_row(row.get("auxiliary_info"), params)
                if found.setdefault(prompt, asked) != asked:
                    raise ValueError("its prompt has other questions in another row")
            except ValueError as error:
                raise ValueError(f"{path}: row {number}: {error}.") from None
    if not found:
        raise ValueError(f"{path}: no row is of the dimension {dimension}; there are {', '.join(there) or 'none'}.")
    return found


def asked_of_row(value: Any, params: QuestionParams) -> Asked:
    """Questions that a row brings: a list of texts; VBench-2.0's ``{"question": [...], "judge": [one, every]}``; JSON.

    ``judge`` is of VBench-2.0's Composition: whether a first question asks for a single creature, and whether all
    answers have to be yes.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"'{value[:80]}' is no list of questions") from None
    judge = None
    if isinstance(value, Mapping) and set(value) == {"question", "judge"}:
        value, judge = value["question"], value["judge"]
        if not (isinstance(judge, list) and len(judge) == 2 and all(isinstance(one, bool) for one in judge)):
            raise ValueError(f"judge has to be two of true and false, not {judge!r}")
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one.strip() for one in value):
        raise ValueError("there is no list of questions, which is what can be asked with yes and no")
    texts = [one.strip() for one in value]
    questions = [
        ClipQuestion(f"#{place + 1}", text, shown=params.shown[place] if place < len(params.shown) else "all")
        for place, text in enumerate(texts)
    ]
    if judge is None:
        return Asked.of(questions, params.combine)
    one_only, every = judge
    first = [ClipQuestion("#0", ONE_CREATURE)] if one_only else []
    return Asked((*first, *questions), "all" if every else "mean", "share" if one_only else "none")
