"""The story of a vision-language model on a CPU in minutes: ask, align with DPO, ask again, score, report.

As `mmalign.quickstart`, of verbs and shipped configs alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mmalign import compare as comparing
from mmalign import report, respond, score, train
from mmalign.compare_figures import FigureComparison
from mmalign.config import load
from mmalign.jobs import ScoreConfig, TrainConfig
from mmalign.jobs_respond import RespondConfig
from mmalign.paths import find
from mmalign.shapes import benchmark
from mmalign.shapes.questions import SPLITS

__all__ = ["FULL", "SHORT", "Size", "ask", "judge", "run"]

CONFIG = "configs/shapes/vlm_dpo.yaml"
_console = Console(stderr=True)


@dataclass(frozen=True)
class Size:
    """How much is done: held-out scenes, and steps of training (None: what the config says)."""

    scenes: int = 400
    steps: int | None = None


FULL, SHORT = Size(), Size(scenes=12, steps=4)


def run(output: Path = Path("runs/quickstart-answers"), *, seed: int = 0, short: bool = False) -> dict[str, Any]:
    """Runs everything below `output` and returns what it wrote into `output/summary.json`.

    Answers and scores of an earlier, stopped run with the same seed are kept; training goes on from its checkpoint.

    Args:
        output: folder; report.html and summary.json are its results.
        seed: of scenes and training.
        short: a few scenes and steps, to see that every part works; proves nothing about alignment.

    Returns:
        Figures as {"base", "aligned", "difference", "ci95"}: chair_i, chair_s, recall, words, unfinished and
        POPE's accuracies; scenes, seed, seconds.
    """
    size, started = SHORT if short else FULL, time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    _say(1, f"drawing {size.scenes} scenes that no training sees, with a request and yes/no questions to each")
    table = benchmark.write(output / "questions", size.scenes, seed + 1000, SPLITS)
    _say(2, "asking the base model")
    answers = {"base": ask(table, output / "base")}
    _say(3, "DPO and cross-entropy with a LoRA: true descriptions against twins with false claims")
    steps = [f"optim.steps={size.steps}"] if size.steps else []
    overrides = [f"output={output / 'train'}", f"seed={seed}", f"data.shapes.seed={seed + 31}", *steps]
    trained = train.run(load(TrainConfig, find(CONFIG), overrides), resume=True)
    _say(4, "asking the aligned model")
    answers["aligned"] = ask(table, output / "aligned", trained / "export")
    _say(5, "judging what both say against the scenes")
    results = [judge(path, output / f"{name}-scores") for name, path in answers.items()]
    comparison = comparing.compare(*results, names=("base", "aligned"), seed=seed)
    page = report.build(results, output / "report.html", run=trained, comparison=comparison,
                        title="Quickstart: answers", rank_by=["shapes_claims/right"])  # fmt: skip
    summary = _summary(comparison.figures, size.scenes, seed, time.perf_counter() - started)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    comparison.show()
    print(_sentence(summary))
    print(f"report: {page}")
    return summary


def ask(table: Path, output: Path, lora: Path | None = None, model: Path = Path("assets/shapes-vlm")) -> Path:
    """The table with a model's answers, greedy."""
    overrides = [f"questions={table}", f"output={output}", f"model.path={model}"]
    overrides += [f"model.lora={lora}"] if lora else []
    return respond.run(load(RespondConfig, find("configs/respond/shapes.yaml"), overrides))


def judge(table: Path, output: Path) -> Path:
    """The results folder of a table with answers."""
    return score.run(load(ScoreConfig, find("configs/shapes/vlm_score.yaml"), [f"table={table}", f"output={output}"]))


def _say(number: int, text: str) -> None:
    _console.print(f"[bold]{number}/5[/bold] {text}")


def _summary(figures: Sequence[FigureComparison], scenes: int, seed: int, seconds: float) -> dict[str, Any]:
    wanted = {("shapes_claims", name): name for name in ("chair_i", "chair_s", "recall", "words", "unfinished")}
    wanted |= {("pope", f"{split}/accuracy"): f"pope_{split}" for split in SPLITS}
    found: dict[str, Any] = {}
    for each in figures:
        name = wanted.get((each.evaluator, each.figure))
        if name:
            gap = each.difference
            found[name] = {
                "base": each.value_a, "aligned": each.value_b, "difference": gap.mean, "ci95": [gap.low, gap.high]
            }  # fmt: skip
    return {**found, "scenes": scenes, "seed": seed, "seconds": round(seconds, 1)}


def _sentence(summary: dict[str, Any]) -> str:
    def told(name: str) -> str:
        each = summary[name]
        shown = [f"{each[side]:.1%}" if each[side] is not None else "none" for side in ("base", "aligned")]
        return f"{shown[0]} before, {shown[1]} after"

    return (
        f"hallucinated mentions: {told('chair_i')}; shapes found: {told('recall')}; "
        f"words: {summary['words']['base']:.1f} and {summary['words']['aligned']:.1f}; {summary['seconds']:.0f} s"
    )
