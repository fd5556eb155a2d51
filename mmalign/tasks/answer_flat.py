"""Batches of answers as flat rows of tokens, which models measure, and as tables, which objectives read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.mllm.encode import Encoded
from mmalign.mllm.passes import Branching, Prompt

__all__ = ["asks", "content", "ids", "parted", "tables"]


def asks(encoded: Sequence[Encoded]) -> list[Branching]:
    """What is asked of a model about these rows: their answers, and with negative images once more."""
    own = [Branching(each.prompt, each.answers) for each in encoded]
    return own + [Branching(each.negative, each.answers) for each in encoded if each.negative is not None]


def parted(found: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Values under the negative images, which come behind the first `count`, under names of their own."""
    names = {"policy": "blind", "reference": "blind_reference"}
    behind = {names[name]: value[count:] for name, value in found.items() if name in names and len(value) > count}
    return {name: value[:count] for name, value in found.items()} | behind


def ids(asks: Sequence[Branching]) -> Tensor:
    return torch.tensor([token for ask in asks for answer in ask.answers for token in answer], dtype=torch.long)


def content(prompt: Prompt) -> dict[str, Any]:
    """What a prompt's log-probabilities depend on: its tokens, and the pixels as the processor made them."""
    digest = hashlib.sha256()
    for name in sorted(prompt.vision):
        value = prompt.vision[name].contiguous()
        digest.update(repr((name, value.dtype, tuple(value.shape))).encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return {"prompt": list(prompt.ids), "kinds": list(prompt.kinds or ()), "vision": digest.hexdigest()}


def tables(flat: Tensor, lengths: list[list[int]], longest: int) -> list[Tensor]:
    """Values of all answers' tokens in a row -> one table [B, longest] per side, zeros behind the ends."""
    parts = iter(flat.split([length for row in lengths for length in row]))
    sides: list[list[Tensor]] = [[] for _ in lengths[0]]
    for row in lengths:
        for side in range(len(row)):
            part = next(parts)
            sides[side].append(nn.functional.pad(part, (0, longest - len(part))))
    return [torch.stack(side) for side in sides]
