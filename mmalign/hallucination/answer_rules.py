"""Answers to questions of one's own: what is due, what an answer says, and the figures.

Three kinds. `yes_no`: the right answer is yes or no, read by VLMEvalKit's rule (`yes_no.words`). `choice`: there are
options, and an answer names one by its letter or its text. `text`: a short answer, the same but for case, articles and
punctuation. What says nothing of the kind is unparsed, and wrong.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmalign.hallucination.yes_no import words

__all__ = ["Due", "Kind", "due", "figures", "kind_of", "normal", "said"]

Kind = Literal["yes_no", "choice", "text"]
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Due:
    """What is right.

    Attributes:
        kind: of the question.
        right: yes or no; a letter; or the answers that are accepted, as `normal` writes them.
        options: of a choice, in the order of their letters.
    """

    kind: Kind
    right: tuple[str, ...]
    options: tuple[str, ...] = ()


def kind_of(aux: Mapping[str, Any]) -> Kind:
    """The kind of a question with these columns."""
    if aux.get("options") is not None:
        return "choice"
    answer = aux.get("answer")
    return "yes_no" if isinstance(answer, str) and answer.strip().lower() in ("yes", "no") else "text"


def due(aux: Mapping[str, Any]) -> Due:
    """What is right for a question with the columns `answer` and perhaps `options`.

    Raises:
        ValueError: no answer, options that are no list of different texts, or an answer that is none of them.
    """
    answer, kind = aux.get("answer"), kind_of(aux)
    several = answer if isinstance(answer, list) and kind == "text" else [answer]
    if not several or not all(_is_plain(one) and str(one).strip() for one in several):
        raise ValueError(f"answer is {answer!r:.60}; it is a text, a number, or for short answers a list of these")
    if kind == "choice":
        options = _options(aux["options"])
        return Due(kind, (_letter_of(str(answer), options),), options)
    if kind == "yes_no":
        return Due(kind, (str(answer).strip().lower(),))
    right = tuple(normal(str(one)) for one in several)
    if not all(right):
        raise ValueError(f"answer is {answer!r:.60}; nothing of it is left without articles and punctuation")
    return Due(kind, right)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _options(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(map(_is_plain, value)) or not 2 <= len(value) <= len(LETTERS):
        raise ValueError(f"options is {value!r:.60}; it is a list of 2 to {len(LETTERS)} texts")
    options = tuple(str(one).strip() for one in value)
    if len({one.casefold() for one in options}) < len(options) or not all(options):
        raise ValueError(f"options is {value!r:.60}; options are different texts, none of them empty")
    for letter, option in zip(LETTERS, options, strict=False):
        if option.upper() in LETTERS[: len(options)] and option.upper() != letter:
            raise ValueError(f"option {letter} is {option!r}, the letter of another option; write it in another way")
    return options


def _letter_of(answer: str, options: Sequence[str]) -> str:
    """The letter of an answer that is a letter or an option's text."""
    for letter, option in zip(LETTERS, options, strict=False):
        if answer.strip().casefold() in (option.casefold(), letter.lower()):
            return letter
    raise ValueError(
        f"answer is {answer!r:.60}, which is neither a letter nor the text of one of {len(options)} options"
    )


# ------------------------------------------------------------------------------------------------ what is said


def said(response: str, asked: Due) -> str | None:
    """What an answer says: yes or no, a letter, or its words as `normal` writes them; None where none can be told."""
    if asked.kind == "yes_no":
        return words(response)
    return _chosen(response, asked.options) if asked.kind == "choice" else normal(response) or None


def normal(text: str) -> str:
    """A short answer without case, articles, white space and punctuation; signs and points of numbers stay."""
    plain = re.sub(r"(?<=\w)['\u2019.](?=\w)(?!\d)", "", text.casefold())
    plain = re.sub(r"[^\w\s.,:+\u2212-]|[.,:+\u2212-](?!\d)", " ", plain)
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))


def _chosen(response: str, options: Sequence[str]) -> str | None:
    """The letter of the option that is named. Texts go first, the longest first, and letters are looked for in what is
    left ("vitamin C" names no third option). Several letters are none; a letter and another option's text are nothing.
    """
    plain = response.strip().strip(".").casefold()
    for letter, option in zip(LETTERS, options, strict=False):
        if plain in (option.casefold(), option.casefold().strip(".")):
            return letter
    rest, named = response, set()
    patterns = {
        letter: "" if option.upper() == letter else _pattern(option)
        for letter, option in zip(LETTERS, options, strict=False)
    }
    for letter in sorted(patterns, key=lambda letter: -len(patterns[letter])):
        pattern = patterns[letter]
        if pattern and list(patterns.values()).count(pattern) == 1 and re.search(pattern, rest, re.IGNORECASE):
            named.add(letter)
            rest = re.sub(pattern, " \0 ", rest, flags=re.IGNORECASE)
    letters = _letters(rest, LETTERS[: len(options)])
    if len(letters) == 1:
        return None if len(named) == 1 and named != letters else letters.pop()
    return named.pop() if len(named) == 1 else None


def _pattern(option: str) -> str:
    """An option's words, with an article before them or without; empty for an option of signs alone."""
    found = re.findall(r"[-\u2212+]?\d[\d.,]*\d|[-\u2212+]?\d|[^\W\d_]+", option.casefold())
    while len(found) > 1 and found[0] in ("a", "an", "the"):
        found = found[1:]
    if not found or found == ["a"]:
        return ""
    number = r"(?<!\d[.,])(?<![-\u2212])" if found[0][0].isdigit() else ""
    return rf"(?<!\w){number}(?:(?:an?|the)\s+)?" + r"[\W_]*".join(map(re.escape, found)) + r"(?!\w)(?![.,]\d)"


def _letters(text: str, letters: str) -> set[str]:
    """Options that a text names by letter: one letter in any case if that is all or begins the text as in "b)", else
    capitals that stand alone. A and I are words where another word follows, unless that is "or", "and", "is" or
    "because", or "answer", "option" or "choice" stands before them."""
    whole = re.match(r"[\W_]*([A-Za-z])(?:[\W_]*$|[).:])", text)
    if whole and whole[1].islower():
        return {whole[1].upper()} & set(letters)
    found = set()
    for match in re.finditer(r"(?<![\w'\u2019-])([A-Z])(?![\w'\u2019-])", text):
        is_word = match[1] in "AI" and re.match(r"\s+(?!(?:or|and|is|because)\b)[\w\0]", text[match.end() :])
        told = re.search(r"(?:answer|option|choice)(?:\s+is)?[\W_]*$", text[: match.start()], re.IGNORECASE)
        if match[1] in letters and (told or not is_word):
            found.add(match[1])
    return found


# ------------------------------------------------------------------------------------------------ figures


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of all questions, of each `kind/` and of each `category/`: accuracy, unparsed (share), words (mean length), and
    yes_ratio (share of yes among the yes/no questions) where there are such.

    Args:
        rows: as `mmalign.evaluation.FigureRow`, with the scores accuracy, yes, unparsed and words.
    """
    parts: dict[str, list[float]] = {}
    for row in rows:
        aux, scores = row["aux"], row["scores"]
        kind, category = kind_of(aux), aux.get("category")
        values = scores["accuracy"], scores["unparsed"], scores["words"], float(kind == "yes_no"), scores["yes"]
        for part in ("", f"kind/{kind}/", *(() if category is None else (f"category/{category}/",))):
            sums = parts.setdefault(part, [0.0] * 6)
            sums[0] += 1
            for place, value in enumerate(values, 1):
                sums[place] += value
    found: dict[str, float | None] = {}
    for part, (number, right, unparsed, length, yes_no, yes) in sorted(parts.items()):
        found |= {f"{part}accuracy": right / number, f"{part}unparsed": unparsed / number}
        found[f"{part}words"] = length / number
        if yes_no:
            found[f"{part}yes_ratio"] = yes / yes_no
    return found
