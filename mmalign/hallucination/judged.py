"""Sub-scores of answers as evaluators give them, and those of yes/no answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.evaluation import Batch
from mmalign.hallucination.yes_no import Said, length

__all__ = ["columns", "judged", "note_absent"]


def columns(found: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    """What was found of each of B answers, at least one, as float64 [B] by name."""
    return {name: torch.tensor([each[name] for each in found], dtype=torch.float64) for name in found[0]}


def judged(
    responses: Sequence[str], aux: Sequence[dict[str, Any]], parse: Callable[[str], Said], neither: str = "unknown"
) -> dict[str, Tensor]:
    """accuracy (1 or 0) of each answer, and the counts yes, `neither`, due (yes is right) and words: float64 [B] each.

    Args:
        aux: with the label of each, ``yes`` or ``no``.
        neither: what an answer that is neither is called.

    Raises:
        ValueError: an item without such a label.
    """
    labels = [one.get("label") for one in aux]
    for label in labels:
        if label not in ("yes", "no"):
            raise ValueError(f"the row's label is {label!r}; it has to be yes or no")
    said = [parse(response) for response in responses]
    columns = {
        "accuracy": [one == label for one, label in zip(said, labels, strict=True)],
        "yes": [one == "yes" for one in said],
        neither: [one is None for one in said],
        "due": [label == "yes" for label in labels],
        "words": [length(response) for response in responses],
    }
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}


def note_absent(batch: Batch, place: int, wrong: Sequence[str], reply: str = "") -> None:
    """Notes what an answer names that is not in its picture, each once with its count, before a judge's reply."""
    named = [name if count == 1 else f"{name} ({count})" for name, count in sorted(Counter(wrong).items())]
    if named:
        batch.notes[place] = f"not in the picture: {', '.join(named)}" + (f"\n\n{reply}" if reply else "")
