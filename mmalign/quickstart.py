"""The whole story on a CPU in minutes: sample, label, align, sample again, score, report.

Every step is one of the verbs with one of the shipped configs; nothing here knows how they work.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mmalign import compare as comparing
from mmalign import report, sample, score, train
from mmalign.config import load
from mmalign.jobs import SampleConfig, ScoreConfig, TrainConfig
from mmalign.media import read_image
from mmalign.media_table import read_media_table
from mmalign.paths import find
from mmalign.progress import track
from mmalign.records import MediaRef
from mmalign.shapes.annotators import ANNOTATORS
from mmalign.shapes.captions import captions, parse_caption
from mmalign.tables import PreferenceRow, write_preferences

ANNOTATOR = "bold"
TRUTH = f"shapes_truth[annotator={ANNOTATOR}]"  # how results label an evaluator with a parameter of its own
_console = Console(stderr=True)


@dataclass(frozen=True)
class Size:
    """How much is done. `train_prompts` get two pictures each; `held_out` prompts compare base and aligned model."""

    train_prompts: int = 256
    held_out: int = 256
    steps: int | None = None  # None: what the config says


FULL, SHORT = Size(), Size(train_prompts=24, held_out=16, steps=6)


def run(output: Path = Path("runs/quickstart"), *, seed: int = 0, short: bool = False) -> dict[str, Any]:
    """Runs everything below `output` and returns what it wrote into `output/summary.json`.

    Pictures and scores of an earlier, stopped run with the same seed are kept; training goes on from its checkpoint.

    Args:
        output: folder; report.html and summary.json are its results.
        seed: of captions, sampling, annotator and training.
        short: a few pictures and steps, to see that every part works; proves nothing about alignment.

    Returns:
        win_rate (aligned over base, by the annotator's noise-free utility), win_rate_ci95, fidelity_base,
        fidelity_aligned (share with exactly the asked shapes and colours), n, seed, seconds, and more.
    """
    size, started = SHORT if short else FULL, time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    _say(1, f"sampling two pictures for each of {size.train_prompts} captions")
    drawn = _sample(output / "pairs", _prompts(output / "train.jsonl", size.train_prompts, seed, held_out=False), 2)
    _say(2, f"asking the annotator {ANNOTATOR!r} which picture of each pair is better")
    preferences, counts = label(drawn, output / "preferences.jsonl", seed)
    _say(3, f"Diffusion-DPO on {counts['A'] + counts['B']} pairs, with a LoRA")
    trained = _train(output / "train", preferences, seed, size.steps)
    _say(4, f"sampling base and aligned model on the same {size.held_out} held-out captions and seeds")
    held_out = _prompts(output / "held_out.jsonl", size.held_out, seed, held_out=True)
    tables = {"base": _sample(output / "base", held_out, 1),
              "aligned": _sample(output / "aligned", held_out, 1, trained / "export")}  # fmt: skip
    _say(5, "scoring with hps and shapes_truth")
    results = [_score(table, output / f"{name}-scores") for name, table in tables.items()]
    comparison = comparing.compare(*results, names=("base", "aligned"), seed=seed)
    page = report.build(results, output / "report.html", run=trained, comparison=comparison, title="Quickstart",
                        rank_by=[f"{TRUTH}/utility", "hps"])  # fmt: skip
    summary = _summary(comparison, counts, seed, time.perf_counter() - started)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    comparison.show()
    print(_sentence(summary))
    print(f"report: {page}")
    return summary


def label(table: Path, output: Path, seed: int) -> tuple[Path, dict[str, int]]:
    """Lets the annotator judge the two pictures of each prompt, and writes a preference table; ties stay ties."""
    annotator = ANNOTATORS[ANNOTATOR]
    groups: dict[str, list[Any]] = {}
    for row in read_media_table(table):
        groups.setdefault(str(row.group), []).append(row)
    rows, counts = [], {"A": 0, "B": 0, "same": 0}
    for number, (first, second) in enumerate(track(groups.values(), "labelling", len(groups))):
        caption = parse_caption(first.prompt)
        utilities = [annotator.utility(caption, read_image(row.media)) for row in (first, second)]
        verdict = annotator.judge(np.random.default_rng([seed, number]), *utilities)
        counts[verdict] += 1
        media = (MediaRef(str(first.media)), MediaRef(str(second.media)))
        rows.append(PreferenceRow(first.prompt, media, label={"overall": verdict}, user_id=annotator.user_id))
    write_preferences(output, rows)
    return output, counts


def _say(number: int, text: str) -> None:
    _console.print(f"[bold]{number}/5[/bold] {text}")


def _prompts(path: Path, count: int, seed: int, *, held_out: bool) -> Path:
    lines = [
        json.dumps({"prompt": str(caption), "seed": 1000 * seed + 100_000 * held_out + 2 * i})
        for i, caption in enumerate(captions(count, seed + 11, held_out=held_out))
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def _sample(output: Path, prompts: Path, per_prompt: int, lora: Path | None = None) -> Path:
    overrides = [f"prompts={prompts}", f"output={output}", f"per_prompt={per_prompt}"]
    overrides += [f"model.lora={lora}"] if lora else []
    return sample.run(load(SampleConfig, find("configs/shapes/sample.yaml"), overrides))


def _train(output: Path, preferences: Path, seed: int, steps: int | None) -> Path:
    overrides = [
        f"output={output}",
        f"data.table={preferences}",
        "data.shapes=null",
        f"seed={seed}",
    ]
    overrides += [f"optim.steps={steps}"] if steps else []
    return train.run(load(TrainConfig, find("configs/shapes/dpo.yaml"), overrides), resume=True)


def _score(table: Path, output: Path) -> Path:
    return score.run(load(ScoreConfig, find("configs/shapes/score.yaml"), [f"table={table}", f"output={output}"]))


def _summary(comparison: comparing.Comparison, counts: dict[str, int], seed: int, seconds: float) -> dict[str, Any]:
    utility, fidelity = comparison.score(f"{TRUTH}/utility"), comparison.score(f"{TRUTH}/fidelity")
    return {
        "win_rate": utility.wins.rate,
        "win_rate_ci95": [utility.wins.low, utility.wins.high],
        "utility_base": utility.mean_a,
        "utility_aligned": utility.mean_b,
        "fidelity_base": fidelity.mean_a,
        "fidelity_aligned": fidelity.mean_b,
        "hps_win_rate": comparison.score("hps").wins.rate,
        "n": utility.n,
        "annotator": ANNOTATOR,
        "labels": counts,
        "seed": seed,
        "seconds": round(seconds, 1),
    }


def _sentence(summary: dict[str, Any]) -> str:
    low, high = summary["win_rate_ci95"]
    return (
        f"aligned beats base in {summary['win_rate']:.1%} of {summary['n']} pairs "
        f"(95 % interval {low:.1%} to {high:.1%}); "
        f"right shapes and colours: {summary['fidelity_base']:.1%} before, {summary['fidelity_aligned']:.1%} after; "
        f"{summary['seconds']:.0f} s"
    )
