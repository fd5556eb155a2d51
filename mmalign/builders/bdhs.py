"""Bias-driven hallucination sampling (Amirloo et al. 2407.02477): rejected answers from a model that hardly sees.

Of every sentence of a good answer the beginning is kept and the end is written anew, behind the true sentences before
it, while most image tokens are hidden by the attention mask; so what is written is what habit expects. An answer that
still means the same is tried again, and after that one is written without any of the good one's words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mmalign.jobs_mllm import BDHS

Write = Callable[[str, frozenset[int], bool], str]
"""(words so far, hidden places, whether to stop at a full stop) -> what the model writes behind them."""


@dataclass(frozen=True)
class Built:
    """A rejected answer, how often it was tried, how similar it is to the good one, and whether it was written without
    the good one's words."""

    text: str
    tries: int
    similarity: float
    unguided: bool


def sentences(text: str) -> list[str]:
    """The sentences of an answer, each with the white space behind it; together they are the answer."""
    return [part for part in re.split(r"(?<=[.!?])(?=\s)", text) if part]


def hidden_places(places: Sequence[int], share: float, generator: torch.Generator) -> frozenset[int]:
    """Image tokens that are hidden: each with probability `share`, by itself."""
    drawn = torch.rand(len(places), generator=generator)
    return frozenset(place for place, value in zip(places, drawn.tolist(), strict=True) if value < share)


def beginning(sentence: str, flip: float, generator: torch.Generator) -> str:
    """The kept part of a sentence: up to a random place between its words, perhaps nothing.

    An answer of yes or no keeps this word, turned into its opposite with probability `flip`.
    """
    answered = re.match(r"\s*(yes|no)\b", sentence, re.IGNORECASE)
    if answered:
        word = answered[0]
        return _opposite(word) if torch.rand((), generator=generator).item() < flip else word
    words = list(re.finditer(r"\S+", sentence))
    kept = int(torch.randint(0, max(1, len(words)), (), generator=generator))
    return sentence[: words[kept - 1].end()] if kept else ""


def _opposite(word: str) -> str:
    bare = word.strip()
    other = "no" if bare.lower() == "yes" else "yes"
    other = other.upper() if bare.isupper() and len(bare) > 1 else other.capitalize() if bare[0].isupper() else other
    return word.replace(bare, other)


def rejected(
    text: str, places: Sequence[int], write: Write, similar: Callable[[str, str], float], settings: BDHS,
    generator: torch.Generator,
) -> Built:  # fmt: skip
    """A rejected answer for a good one.

    Args:
        places: of the prompt's image tokens.
        write: the model.
        similar: of two answers, 1 for the same.
    """
    closest = 0.0
    for attempt in range(1, settings.tries + 1):
        hidden = hidden_places(places, settings.hidden, generator)
        made, before = "", ""
        for sentence in sentences(text):
            kept = beginning(sentence, settings.flip, generator)
            made += kept + write(before + kept, hidden, True)  # the model writes the space behind them itself
            before += sentence
        closest = similar(text, made)
        if made.strip() and closest <= settings.similarity:
            return Built(made.strip(), attempt, closest, False)
    made = write("", hidden_places(places, settings.hidden, generator), False).strip()
    return Built(made, settings.tries + 1, similar(text, made), True)
