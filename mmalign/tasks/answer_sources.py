"""Where rows with answers come from: a table on disk, or the shapes world."""

from __future__ import annotations

from typing import Any, Literal

from mmalign.jobs import TrainConfig
from mmalign.mllm.rows import AnswerRow
from mmalign.paths import find
from mmalign.preference_row import Dropped


def rows(config: TrainConfig, items: Literal["pairs", "singles"]) -> tuple[list[AnswerRow], list[Dropped]]:
    """Rows with what the objective needs, and what was left out with the reason for each."""
    from mmalign.mllm.formats import read_answers

    data = config.data
    assert data.table is not None
    table = read_answers(find(data.table), data.format, data.root, verify=data.verify)
    found, dropped = [], list(table.dropped)
    for row in table.rows[: data.limit]:
        why = lacking(row, config.loss, items)
        if why:
            dropped.append(Dropped(row.origin, why))
        else:
            found.append(row)
    return found, dropped


def lacking(row: AnswerRow, loss: Any, items: str) -> str:
    """What an objective needs and the row does not have; nothing if it can be trained on."""
    needs, kinds = loss.needs, {term.kind for term in loss.terms}
    if items == "pairs" and row.kind != "pair":
        return "no rejected answer"
    if "kto" in kinds and items == "singles" and row.kind not in ("unpaired", "pair"):
        return "no label"
    if row.chosen is None:
        return "no answer"
    if "margin" in needs and row.margin is None:
        return "no margin"
    if "safer" in needs and row.safer is None:
        return "no judgement of safety"
    if {"blind", "guided"} & needs and not row.images:
        return "no image"
    return ""
