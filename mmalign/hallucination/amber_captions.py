"""AMBER's open queries: which things a description names, and which of them are in the picture (2311.07397).

Nouns are words of relation.json (things and what goes with them). One is right if it is among the picture's truth, goes
with it, or means nearly the same; words of safe_words.txt are never wrong. The authors take nouns by NLTK's tagger and
nearness by spaCy's large vectors; neither's data come with a package, so by default every word of relation.json counts
as a noun and nothing but itself is near. Give `tagger` and `vectors` for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmalign.hallucination.files import json_rows
from mmalign.hallucination.words import singular, tokens

NEAR = 0.8
Nouns = Callable[[str], list[str]]
"""A description -> its nouns in lower case, singular, in order."""


@dataclass(frozen=True)
class Vectors:
    """Unit vectors of words: nearness is their product."""

    rows: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, file: str | Path, wanted: frozenset[str]) -> Vectors:
        """GloVe's or word2vec's text form, a word and its numbers per line; only the wanted words are kept.

        Raises:
            ValueError: the file is not there, or a line is no word with numbers.
        """
        path, rows = Path(file).expanduser(), {}
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    word, _, rest = line.rstrip().partition(" ")
                    if word in wanted:
                        rows[word] = _unit(rest, f"vectors: {path}:{number}")
        except OSError as error:
            raise ValueError(f"vectors: {path}: {error.strerror or error}") from None
        return cls(rows)

    def near(self, word: str, others: Sequence[str]) -> bool:
        """Whether the word is nearer than `NEAR` to one of the others."""
        own = self.rows.get(word)
        known = [self.rows[other] for other in others if other in self.rows]
        return own is not None and bool(known) and float((np.stack(known) @ own).max()) > NEAR


def _unit(numbers: str, where: str) -> np.ndarray:
    """The numbers as a vector of length 1."""
    try:
        vector = np.array([float(value) for value in numbers.split()])
    except ValueError as error:
        raise ValueError(f"{where}: is no word with its numbers ({error})") from None
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


class Things:
    """relation.json and safe_words.txt.

    Attributes:
        goes_with: thing -> words that stand for it too.
        words: all of them.
        safe: words that are never wrong.
    """

    def __init__(self, relation: str | Path, safe: str | Path):
        """ValueError for files in another layout."""
        (told, *rest) = json_rows(Path(relation).expanduser())
        if rest or not all(isinstance(value, list) for value in told.values()):
            raise ValueError(f"{relation} is not AMBER's relation.json, which has a list of words for each thing")
        self.goes_with: dict[str, list[str]] = {name: list(map(str, value)) for name, value in told.items()}
        self.words = frozenset(self.goes_with) | {word for value in self.goes_with.values() for word in value}
        try:
            lines = Path(safe).expanduser().read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"{safe}: {error.strerror or error}; it is AMBER's safe_words.txt") from None
        self.safe = frozenset(line.strip() for line in lines if line.strip())

    def nouns(self, text: str, tagger: Nouns | None = None) -> list[str]:
        """The words of `words` in a description, in order and each time."""
        found = tagger(text) if tagger else [singular(word, self.words) for word in tokens(text)]
        return [word for word in found if word in self.words]

    def around(self, names: Sequence[str]) -> list[str]:
        """These things and what goes with them."""
        return [word for name in names for word in (name, *self.goes_with.get(name, ()))]


def judged(
    response: str, truth: Sequence[str], targets: Sequence[str], things: Things, vectors: Vectors | None = None,
    tagger: Nouns | None = None,
) -> tuple[dict[str, float], list[str]]:  # fmt: skip
    """Counts of one description: nouns, wrong ones, things of the picture and those named, likely hallucinations
    (targets) and those named, words; and the wrong nouns themselves."""
    nouns = things.nouns(response, tagger)
    right, likely = things.around(truth), things.around(targets)
    said = set(nouns)

    def is_wrong(noun: str) -> bool:
        if noun in things.safe or noun in right:
            return False
        return vectors is None or not vectors.near(noun, right)

    wrong = [noun for noun in nouns if is_wrong(noun)]
    return {
        "nouns": float(len(nouns)),
        "wrong": float(len(wrong)),
        "things": float(len(truth)),
        "named": float(sum(bool(said & set(things.around([name]))) for name in truth)),
        "targets": float(len(targets)),
        "expected": float(sum(bool(said & set(things.around([name]))) for name in targets if name in likely)),
        "words": float(len(tokens(response))),
    }, wrong


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """`chair` (wrong of all nouns), `cover` (things of the pictures that are named), `hal` (descriptions with a wrong
    noun), `cog` (likely hallucinations that are named) and the mean `words`; shares, where AMBER prints percent."""
    scores = [row["scores"] for row in rows]

    def share(part: str, whole: str) -> float | None:
        total = sum(each[whole] for each in scores)
        return sum(each[part] for each in scores) / total if total else None

    return {
        "chair": share("wrong", "nouns"),
        "cover": share("named", "things"),
        "hal": sum(each["wrong"] > 0 for each in scores) / len(scores),
        "cog": share("expected", "targets"),
        "words": sum(each["words"] for each in scores) / len(scores),
    }
