"""Methods against hallucination under equal compute on the shapes world, where truth is exact.

    python bench/mllm_methods.py                              all methods, seeds 0 1 2; resumable
    python bench/mllm_methods.py --methods dpo,dense --seeds 0
    python bench/mllm_methods.py --methods dpo --set lr=5e-4 --seeds 9    a setting, on a seed that is not reported
    python bench/mllm_methods.py --table                      only the table of what has been run

The figures of each run are a line in bench/mllm_methods.jsonl, and what stands there is not run again; answers and
weights lie in runs/bench-mllm and may be deleted.

One run: a LoRA on assets/shapes-vlm is trained on as many pairs as in every other run, then describes held-out scenes,
the same for all, and answers yes/no questions about them. `shapes_claims` judges the descriptions against the scenes,
`pope` the answers; each figure's interval resamples scenes. Seeds change rows, weights and order.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onednn
import torch
from machine import machine
from mllm_methods_table import summary_line, table
from PIL import Image

from mmalign import build_answers, train
from mmalign.config import load
from mmalign.jobs import TrainConfig
from mmalign.jobs_build import BuildConfig
from mmalign.mllm.answers_writing import write_answers
from mmalign.paths import find
from mmalign.quickstart_answers import ask, judge
from mmalign.records import MediaRef
from mmalign.shapes import benchmark
from mmalign.shapes.questions import SPLITS
from mmalign.tasks.answer_sources import DrawnRows

LINES, WORK = Path("bench/mllm_methods.jsonl"), Path("runs/bench-mllm")
SCENES, STEPS, PAIRS, LR = 200, 80, 32, 1e-3
SHARES = {"twins": 1, "self": 4, "bdhs": 8}  # of what is trained on: a model writes fewer pairs, which are seen again
SCENE_SEED = 7  # of the scenes that are judged; training rows have other seeds
_BESIDE: dict[str, Any] = {"kind": "sft", "weight": 3.0}
_BOTH: dict[str, Any] = {"terms": [{"kind": "dpo"}, _BESIDE]}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("twins", {"terms": [{"kind": "sft"}]}),
    "dpo alone": ("twins", {"terms": [{"kind": "dpo"}]}),
    "dpo": ("twins", _BOTH),
    "dense": ("twins", {**_BOTH, "beta": 0.5, "tokens": {"kind": "segments"}}),
    "mdpo": ("twins", {"terms": [{"kind": "dpo"}, {"kind": "image_dpo"}, {"kind": "anchor"}, _BESIDE]}),
    "margin": ("twins", {**_BOTH, "margin": {"kind": "reward"}}),
    "bdhs": ("bdhs", _BOTH),
    "self": ("self", _BOTH),
}
"""Method -> (whose pairs, the objective). Alone, DPO makes answers short; all others have the cross-entropy of the
chosen answer beside it, as MPO has; with weight 1 some answers end in repetition."""


def rows(kind: str, seed: int, count: int) -> Path:
    """The table of training rows of a seed.

    twins: true descriptions, and the same with one to three false claims. bdhs: the true ones, and what the model
    itself writes when its image is hidden. self: answers of the model, judged by its own yes and no, claim by claim.
    """
    folder = WORK / "rows" / f"{kind}-{seed}"
    if kind == "twins":
        if not (folder / "rows.jsonl").is_file():
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
            drawn = []
            for number, row in enumerate(DrawnRows(100 + seed, count, "pairs")):
                name = f"pictures/{number:05}.png"
                Image.fromarray(row.images[0].image()).save(folder / name)
                drawn.append(replace(row, images=(MediaRef(name),)))
            write_answers(drawn, folder / "rows.jsonl")
        return folder / "rows.jsonl"
    twins = rows("twins", seed, count)
    model = {"path": "assets/shapes-vlm", "max_new_tokens": 64}
    build: dict[str, Any] = {"kind": "bdhs"}
    if kind == "self":
        build = {"kind": "claims", "split": "shapes"}
        model |= {"per_prompt": 6, "temperature": 1.0, "max_new_tokens": 64}
    config = {
        "rows": str(twins), "limit": count // SHARES[kind], "model": model, "build": build, "seed": seed,
        "output": str(folder),
    }  # fmt: skip
    return build_answers.run(BuildConfig.model_validate(config))


def trained(method: str, seed: int, folder: Path, changed: dict[str, float]) -> tuple[Path, float]:
    """The export of a trained LoRA, and the seconds of training."""
    source, loss = METHODS[method]
    steps, lr = int(changed.get("steps", STEPS)), changed.get("lr", LR)
    table_file = rows(source, seed, steps * PAIRS)
    objective = {"kind": "mllm", "beta": 0.1, **loss}
    if "beta" in changed:
        objective["beta"] = changed["beta"]
    if "weight" in changed:
        objective["terms"] = [
            {**each, "weight": changed["weight"]} if each is _BESIDE else each for each in loss["terms"]
        ]
    overrides = [
        f"output={folder}", f"seed={seed}", f"optim.steps={steps}", f"optim.lr={lr}", f"optim.batch_size={PAIRS}",
        "data.shapes=null", f"data.table={table_file}", f"loss={json.dumps(objective)}",
        f"checkpoint.every={steps}",
    ]  # fmt: skip
    started = time.perf_counter()
    run = train.run(load(TrainConfig, find("configs/shapes/vlm_dpo.yaml"), overrides), resume=True)
    return run / "export", time.perf_counter() - started


def figures(folder: Path, lora: Path | None) -> dict[str, Any]:
    """Every figure of a model's answers, with its interval."""
    questions = WORK / "questions"
    if not (questions / "table.jsonl").is_file():
        benchmark.write(questions, SCENES, SCENE_SEED, SPLITS)
    scored = judge(ask(questions / "table.jsonl", folder / "answers", lora), folder / "scores")
    told = json.loads((scored / "summary.json").read_text())["evaluators"]
    return {f"{name}/{figure}": each for name in told for figure, each in told[name].get("figures", {}).items()}


def known() -> dict[tuple[str, int, str], dict[str, Any]]:
    """What has been run, by method, seed and changed settings."""
    if not LINES.is_file():
        return {}
    lines = [json.loads(line) for line in LINES.read_text().splitlines()]
    return {(line["method"], line["seed"], json.dumps(line["changed"])): line for line in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="steps, lr, beta, or weight: of the cross-entropy"
    )
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    onednn.use()
    changed = {key: float(value) for key, _, value in (pair.partition("=") for pair in given.set)}
    if given.table:
        print(table(list(known().values())))
        return
    wanted = [("base", 0, {}), *((m, seed, changed) for seed in given.seeds for m in given.methods.split(","))]
    for method, seed, settings in wanted:
        if (method, seed, json.dumps(settings)) in known():
            continue
        folder = WORK / "-".join([method.replace(" ", "-"), str(seed), *(f"{k}{v}" for k, v in settings.items())])
        lora, seconds = (None, 0.0) if method == "base" else trained(method, seed, folder / "train", settings)
        line = {
            "method": method, "seed": seed, "changed": settings, "steps": int(settings.get("steps", STEPS)),
            "train_seconds": round(seconds, 1), "scenes": SCENES, "figures": figures(folder, lora),
            "machine": machine(torch.device("cpu")),
        }  # fmt: skip
        with LINES.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(summary_line(line), flush=True)


if __name__ == "__main__":
    main()
