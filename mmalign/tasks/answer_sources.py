"""Where rows with answers come from: a table on disk, or the shapes world."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mmalign.jobs import TrainConfig
from mmalign.mllm.formats import read_answers
from mmalign.mllm.rows import AnswerRow, Part, Turn
from mmalign.paths import find
from mmalign.preference_row import Dropped
from mmalign.shapes import answers as shapes
from mmalign.shapes.scene import render


def rows(config: TrainConfig, items: Literal["pairs", "singles"]) -> tuple[Sequence[AnswerRow], list[Dropped]]:
    """Rows with what the objective needs, and what was left out with the reason for each.

    Raises:
        ValueError: the table cannot be read; or no row of the shapes world has what the objective needs.
    """
    data, loss = config.data, config.loss
    if data.shapes is not None:
        drawn = DrawnRows(data.shapes.seed, min(data.shapes.scenes, data.limit or data.shapes.scenes), items)
        why = lacking(drawn[0], loss, items)
        if why:
            raise ValueError(
                f"data.shapes: rows of the shapes world have {why}, which loss.terms need; give data.table"
            )
        return drawn, []
    assert data.table is not None
    table = read_answers(
        find(data.table), data.format, data.root, verify=data.verify, columns=config.mllm.columns or None,
        unknown_columns=config.mllm.unknown_columns,
    )  # fmt: skip
    found, dropped = [], list(table.dropped)
    for row in table.rows[: data.limit]:
        why = lacking(row, loss, items, config.mllm.online is not None)
        if why:
            dropped.append(Dropped(row.origin, why))
        else:
            found.append(row)
    return _of_one_kind(found, loss, items), dropped


def lacking(row: AnswerRow, loss: Any, items: str, online: bool = False) -> str:
    """What an objective needs and the row does not have; nothing if it can be trained on.

    Args:
        online: whether rejected answers are written during training, which takes an image.
    """
    needs, kinds = loss.needs, {term.kind for term in loss.terms}
    if row.chosen is None:
        return "no answer"
    if online and not row.images:
        return "no image"
    if items == "pairs" and row.rejected is None and not online:
        return "no rejected answer"
    if "kto" in kinds and items == "singles" and row.kind not in ("unpaired", "pair"):
        return "no label"
    if "sft" in kinds and items == "singles" and row.label is False:
        return "a bad answer"
    if "margin" in needs and row.margin is None:
        return "no margin"
    if "safer" in needs and row.safer is None:
        return "no judgement of safety"
    if {"blind", "guided"} & needs and not row.images:
        return "no image"
    return ""


def _of_one_kind(found: list[AnswerRow], loss: Any, items: str) -> list[AnswerRow]:
    """For terms on single answers: of a pair its chosen answer to be imitated, or both with their labels."""
    if items == "pairs":
        return found
    if {term.kind for term in loss.terms} == {"sft"}:
        return [replace(row, rejected=None, rejected_spans=None, label=None) for row in found]
    single = []
    for row in found:
        if row.rejected is None:
            single.append(row)
            continue
        alone = replace(row, rejected=None, rejected_spans=None, chosen_spans=None)
        single += [replace(alone, label=True), replace(alone, chosen=row.rejected, label=False)]
    return single


# ---------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Drawn:
    """The picture of a scene of the shapes world, rendered when it is asked for."""

    seed: int
    index: int

    @property
    def name(self) -> str:
        return f"scene {self.index} of seed {self.seed}"

    def hash(self) -> str:
        """SHA-256 of what decides the picture."""
        return hashlib.sha256(f"shapes {self.seed} {self.index}".encode()).hexdigest()

    def image(self) -> np.ndarray:
        """uint8 RGB [64, 64, 3]."""
        return render(shapes.scene_at(self.seed, self.index))


@dataclass(frozen=True)
class DrawnRows(Sequence[AnswerRow]):
    """Rows of the shapes world, each drawn when it is asked for: careless writers' answers, or pairs."""

    seed: int
    size: int
    items: str

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(index)
        return _drawn(self.seed, index % self.size, self.items)

    def digest(self) -> str:
        """SHA-256 of what decides the rows."""
        return hashlib.sha256(f"shapes answers {self}".encode()).hexdigest()


def _drawn(seed: int, index: int, items: str) -> AnswerRow:
    """A careless writer's answer to imitate, or a true description against its twin with one to three errors."""
    pairs = items == "pairs"
    told = shapes.preference_row(seed, index, 1 + index % 3) if pairs else shapes.training_row(seed, index)
    asked = told["prompt"][0]["content"][-1]["text"]
    texts = {side: told[side][0]["content"][0]["text"] if side in told else None for side in ("chosen", "rejected")}
    spans: dict[str, Any] = {
        name: tuple(map(tuple, told[name])) for name in ("chosen_spans", "rejected_spans") if name in told
    }
    image: Any = Drawn(seed, index)
    turn = Turn("user", (Part("image"), Part("text", asked)))
    return AnswerRow(
        (turn,), texts["chosen"], texts["rejected"], images=(image,), margin=told.get("margin"), source="shapes",
        origin=image.name, **spans,
    )  # fmt: skip
