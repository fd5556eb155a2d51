"""Yes or no: how answers are parsed, and what is made of the counts.

`official` is what POPE's evaluate.py does, `words` what VLMEvalKit does for all its yes/no sets (vlmeval/dataset/utils:
`YOrN_Extraction` over the punctuation rule of the VQA evaluation code), `exact` what AMBER's inference.py does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

__all__ = ["PARSERS", "Said", "counted", "exact", "length", "official", "rates", "words"]

Said = Literal["yes", "no"] | None
"""None: the answer is neither."""

_PUNCTUATION = (*';/[]"{}()=+\\_-', *"><@`,?!")
_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The VQA code hands re.UNICODE, which is 32, to the place of `count`; kept, since it decides very long answers."""


def official(answer: str) -> Said:
    """POPE's rule: the words before the first full stop, commas taken out; with No, not or no among them no, else yes.

    An empty answer is yes, and so is a refusal: what is no is counted, and never what is unknown.
    """
    said = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(said) else "yes"


def words(answer: str) -> Said:
    """VLMEvalKit's rule: the word yes and not no, or no and not yes, in small letters without punctuation."""
    text = answer.lower()
    loose = _COMMA.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        spaced = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if spaced or loose else " ")
    found = set(_PERIOD.sub("", plain, count=_MOST_PERIODS).split())
    yes, no = "yes" in found, "no" in found
    return None if yes == no else "yes" if yes else "no"


def exact(answer: str) -> Said:
    """AMBER's rule: the answer is `Yes` or `No` to the letter."""
    return {"Yes": "yes", "No": "no"}.get(answer)  # type: ignore[return-value]


PARSERS: dict[str, Callable[[str], Said]] = {"official": official, "vlmevalkit": words, "exact": exact}


def length(answer: str) -> int:
    """Words of an answer, as white space parts them."""
    return len(answer.split())


Counts = Counter[tuple[float, float, float]]
"""How often (yes was said, neither was said, yes is due) occurred."""


def counted(rows: Iterable[Mapping[str, Any]], part: Callable[[Mapping[str, Any]], Any]) -> dict[Any, Counts]:
    """The counts of each part of a table; rows as `mmalign.evaluation.FigureRow`, with the scores yes, unknown, due."""
    found: dict[Any, Counts] = {}
    whole = Counter(
        (part(row), scores["yes"], scores["unknown"], scores["due"]) for row in rows for scores in (row["scores"],)
    )
    for (name, yes, unknown, due), number in whole.items():
        found.setdefault(name, Counter())[yes, unknown, due] += number
    return found


def rates(counts: Counts, positive: Literal["yes", "no"]) -> dict[str, float | None]:
    """accuracy, precision, recall, f1, yes_ratio and unknown, as shares.

    What is neither is wrong for the accuracy and not positive for the others. F1 is 0 where nothing positive is right,
    as long as there was something to find; precision is None without a positive answer, recall and F1 without a
    positive truth.
    """
    total = counts.total()
    cells: Counter[tuple[bool, bool]] = Counter()  # (said positive, is positive)
    right = unknown = yes = 0
    for (said_yes, said_neither, due), number in counts.items():
        said_positive = not said_neither and bool(said_yes) == (positive == "yes")
        cells[said_positive, bool(due) == (positive == "yes")] += number
        right += number * (not said_neither and said_yes == due)
        unknown += number * int(said_neither)
        yes += number * int(said_yes)
    true, said, due_ = cells[True, True], cells[True, True] + cells[True, False], cells[True, True] + cells[False, True]
    return {
        "accuracy": right / total,
        "precision": true / said if said else None,
        "recall": true / due_ if due_ else None,
        "f1": 2 * true / (said + due_) if due_ else None,
        "yes_ratio": yes / total,
        "unknown": unknown / total,
    }
