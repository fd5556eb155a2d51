"""Answers gone on with, token by token, behind a prompt whose image tokens may be hidden from everything after them.

Hidden tokens keep their places, so that positions stay what the model was trained on; transformers' own generation
would count positions without them. The prompt is read once for all continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.mllm.passes import Branching, Passes, Prompt
from mmalign.mllm.readout import Head


@dataclass
class Opened:
    """A prompt that has been read: the cache, how many positions it takes, who is visible [P]."""

    cache: Any
    size: int
    behind: int
    visible: Tensor
    last: Tensor


class Decoder:
    """Continuations of one model's answers, one at a time.

    Args:
        never: ids that no answer has, such as the placeholders of images, which would have no features.
    """

    def __init__(self, passes: Passes, head: Head, never: Collection[int] = ()):
        self.passes, self.head, self.never = passes, head, sorted(never)

    @torch.no_grad()
    def open(self, prompt: Prompt, hidden: Collection[int] = ()) -> Opened:
        """Reads a prompt.

        Args:
            hidden: places of tokens that nothing behind them sees.
        """
        from transformers import DynamicCache

        cache, size = DynamicCache(), len(prompt.ids)
        visible = torch.ones(size, dtype=torch.bool)
        visible[list(hidden)] = False
        inputs, behind = self.passes.prefix(prompt, visible)
        states = self.passes.base(**inputs, past_key_values=cache, use_cache=True, return_dict=True).last_hidden_state
        return Opened(cache, size, behind, visible, states[:, -1])

    @torch.no_grad()
    def write(
        self, opened: Opened, prefix: Sequence[int], ends: Collection[int], *, max_new_tokens: int,
        stop: Callable[[list[int]], bool] = lambda ids: False, temperature: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> list[int]:  # fmt: skip
        """Tokens behind `prefix`, without an end token; the prompt's cache is as it was afterwards.

        Args:
            prefix: the answer's tokens so far.
            ends: ids that end an answer.
            stop: whether the tokens so far are enough.
            temperature: 0 takes the likeliest token each time; else one is drawn by the generator (on the CPU).
        """
        found: list[int] = []
        state, place = opened.last, 0
        if prefix:
            state, place = self._step(opened, list(prefix), 0), len(prefix)
        while len(found) < max_new_tokens:
            token = self._choose(self.head(state)[0], temperature, generator)
            if token in ends:
                break
            found.append(token)
            if stop(found):
                break
            state, place = self._step(opened, [token], place), place + 1
        if place:
            opened.cache.crop(-place)
        return found

    def _choose(self, logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
        logits[self.never] = -torch.inf
        if not temperature:
            return int(logits.argmax())
        share = (logits.double().cpu() / temperature).softmax(0)
        return int(torch.multinomial(share, 1, generator=generator))

    def _step(self, opened: Opened, tokens: list[int], place: int) -> Tensor:
        """The hidden state behind further tokens of the answer, of which `place` are in the cache already: [1, D]."""
        inputs = self.passes.further(tokens, opened.visible, opened.behind, place)
        output = self.passes.base(**inputs, past_key_values=opened.cache, use_cache=True, return_dict=True)
        state: Tensor = output.last_hidden_state[:, -1]
        return state


def greedy(decoder: Decoder, asked: Branching, ends: Collection[int], max_new_tokens: int) -> list[int]:
    """The greedy answer to a prompt, image tokens visible: what transformers' own generation gives."""
    return decoder.write(decoder.open(asked.prompt), (), ends, max_new_tokens=max_new_tokens)
