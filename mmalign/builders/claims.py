"""RLAIF-V's feedback (Yu et al. 2405.17220): an answer is split into claims, each becomes a yes/no question, and the
model itself says how likely yes is; an answer's score is minus the number of claims that it rejects.

Answers to compare are of one model with other seeds alone, so that they differ in nothing but trust.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

SPLIT = (
    "Below is a question about a picture and an answer to it. List every statement of fact that the answer makes about "
    "the picture, each as one short sentence that can be checked by itself, on a line of its own that begins with "
    "'- '. Leave out opinions and guesses. Write nothing else.\n\nQuestion: {question}\nAnswer: {answer}\n"
)
ASK = (
    "Turn every statement below into a question about a picture that is answered with yes if the statement is true. "
    "Ask about what the statement says, without taking any of it for granted. Write one question for each line, each "
    "beginning with '- ', and nothing else.\n\n{claims}\n"
)
SUFFIX = " Please answer yes or no."
YES, NO = ("yes", "Yes"), ("no", "No")
LONGEST = 300  # words of an answer that are split


def listed(text: str) -> list[str]:
    """The lines of a list ("- ", "* ", "1. "), without their marks; a model that says there is none gives none."""
    found = []
    for line in text.splitlines():
        item = re.match(r"\s*(?:[-*•]|\d+[.)])\s+(.*\S)", line)
        if item and not re.fullmatch(r"(none|n/a)\.?", item[1], re.IGNORECASE):
            found.append(item[1])
    return found


def shortened(answer: str, words: int = LONGEST) -> str:
    """The answer's first words; spaces and line breaks as they were."""
    found = list(re.finditer(r"\S+", answer))
    return answer if len(found) <= words else answer[: found[words - 1].end()]


def accepted(log_probs: Sequence[float]) -> bool:
    """Whether p(yes) + p(Yes) > p(no) + p(No), of log-probabilities of the first token of `YES` and `NO` in order."""
    p = torch.tensor(log_probs, dtype=torch.float64).exp()
    return bool(p[: len(YES)].sum() > p[len(YES) :].sum())


@dataclass(frozen=True)
class Judged:
    """An answer and which of its claims were accepted."""

    text: str
    claims: tuple[str, ...]
    accepted: tuple[bool, ...]

    @property
    def score(self) -> int:
        """Minus the number of rejected claims."""
        return -sum(not each for each in self.accepted)


def pairs(
    judged: Sequence[Judged], *, at_most: int, least: int = 1, generator: torch.Generator
) -> list[tuple[Judged, Judged]]:
    """(better, worse) of one question's answers: those whose scores are `least` or more apart, a draw of `at_most`.

    Answers that say the same word for word are no pair.
    """
    found = [
        (a, b) if a.score > b.score else (b, a)
        for a, b in itertools.combinations(judged, 2)
        if abs(a.score - b.score) >= least and a.text.strip() != b.text.strip()
    ]
    order = torch.randperm(len(found), generator=generator).tolist()
    return [found[i] for i in sorted(order[:at_most])]


def length_limit(lengths: Sequence[tuple[int, int]], step: float = 0.02, most: float = 1.0) -> float:
    """The r at which the mean lengths of chosen and rejected answers are closest, of 0, 0.02, ..., `most`.

    Pairs of which the rejected answer is longer by more than that share of itself are dropped: (len_rejected -
    len_chosen) / len_rejected > r. The smallest r among equals; `most` where nothing would be left.

    Args:
        lengths: of each pair, (chosen, rejected), in words.
    """
    best, closest = most, float("inf")
    for number in range(round(most / step) + 1):
        limit = number * step
        kept = [pair for pair in lengths if not too_long(pair, limit)]
        if kept:
            gap = abs(sum(c - r for c, r in kept) / len(kept))
            if gap < closest - 1e-12:
                best, closest = limit, gap
    return best


def too_long(lengths: tuple[int, int], limit: float) -> bool:
    """Whether the rejected answer is longer than the chosen one by more than `limit` of itself."""
    chosen, rejected = lengths
    return rejected > 0 and (rejected - chosen) / rejected > limit + 1e-12
