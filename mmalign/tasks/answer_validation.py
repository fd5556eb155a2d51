"""How an objective on answers stands on rows that it is not trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mmalign.jobs import TrainConfig
from mmalign.methods_mllm import MLLM
from mmalign.mllm.loading import evaluating
from mmalign.preference_row import Dropped
from mmalign.tables import summary
from mmalign.tasks import answer_sources
from mmalign.tasks.answers import Answers

SHOWN = ("loss", "implicit_accuracy", "image_accuracy", "margin")


def held_out(config: TrainConfig, like: Answers) -> Answers | None:
    """The rows of `validation.table`, read as those of training are; None without one.

    Raises:
        ValueError: no row has what the objective needs.
    """
    wanted = config.validation
    if wanted.table is None:
        return None
    data = config.data.model_copy(update={"table": wanted.table, "shapes": None, "limit": wanted.rows, "root": None})
    offline = config.mllm.model_copy(update={"online": None})
    own = config.model_copy(update={"data": data, "mllm": offline})
    assert isinstance(own.loss, MLLM)
    rows, dropped = answer_sources.rows(own, own.loss.items)
    made = like.of_rows(rows)
    left_out: list[Dropped] = [*dropped, *made.dropped]
    if not made.rows:
        raise ValueError(f"validation.table: no row is left: {summary(0, left_out)}")
    if left_out:
        print(f"validation: {summary(len(made.rows), left_out)}", file=sys.stderr)
    return made


def measured(task: Any, rows: Answers, batch_size: int) -> dict[str, float]:
    """Means over the rows of the loss and of what the objective logs, without dropout."""
    totals: dict[str, float] = {}
    with evaluating(task.modules):
        for start in range(0, len(rows.rows), batch_size):
            index = range(start, min(start + batch_size, len(rows.rows)))
            loss, metrics = task.loss(rows.load(list(index)), alone=True)
            for name, value in {"loss": loss, **metrics}.items():
                totals[name] = totals.get(name, 0.0) + float(value.float().mean()) * len(index)
    return {name: value / len(rows.rows) for name, value in totals.items()}


def write(found: dict[str, float], rows: int, folder: Path, step: int) -> None:
    """Appends a line to `folder/metrics.jsonl`, and says the most important figures."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "rows": rows, **found}) + "\n")
    told = "  ".join(f"{name} {found[name]:.4g}" for name in SHOWN if name in found)
    print(f"held out, step {step}: {told}", file=sys.stderr)
