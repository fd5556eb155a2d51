"""BDHS with a model at hand: a good answer's ends written anew behind a prompt whose image tokens are hidden."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mmalign.builders import bdhs
from mmalign.builders.similarity import SentenceEncoder
from mmalign.jobs_mllm import BDHS
from mmalign.mllm.chat import Chat, Framed
from mmalign.mllm.decode import Decoder
from mmalign.mllm.passes import Prompt
from mmalign.paths import find

__all__ = ["anew", "likeness"]

Similar = Callable[[str, str], float]


def likeness(encoder: Path | None, device: torch.device) -> Similar:
    """How similar two answers are: by a sentence encoder's folder, or the share of words in common."""
    if encoder is None:
        return lambda one, other: difflib.SequenceMatcher(None, one.split(), other.split()).ratio()
    return SentenceEncoder(find(encoder), device).similarity


def anew(
    text: str, framed: Framed, prompt: Prompt, places: Sequence[int], chat: Chat, decoder: Decoder, similar: Similar,
    settings: BDHS, generator: torch.Generator, *, max_new_tokens: int, temperature: float = 0.0,
) -> bdhs.Built:  # fmt: skip
    """A rejected answer for a good one.

    Args:
        text: the good answer.
        framed, prompt: the chat before it, as text and as the model reads it.
        places: of the prompt's image tokens.
        max_new_tokens: of each end of a sentence.
    """
    opened: dict[frozenset[int], Any] = {}

    def write(words: str, hidden: frozenset[int], stop: bool) -> str:
        if hidden not in opened:
            opened.clear()  # one mask at a time: each has a cache of its own
            opened[hidden] = decoder.open(prompt, hidden)
        begun = chat.begun(framed, words)
        more = decoder.write(
            opened[hidden], begun, chat.ends, max_new_tokens=max_new_tokens,
            stop=lambda ids: stop and chat.behind(begun, ids).rstrip().endswith((".", "!", "?")),
            temperature=temperature, generator=generator,
        )  # fmt: skip
        return chat.behind(begun, more)

    return bdhs.rejected(text, places, write, similar, settings, generator)
