"""Reward against compute: every strategy of `mmalign sample`'s guidance block on the shapes models.

    python bench/guidance.py                                  all models, strategies and seeds 0 1 2; resumable
    python bench/guidance.py --model flow --seeds 0 --strategies "best of n,particles"     what begins so, of one model
    python bench/guidance.py --model video --video-model runs/shapes-video/export          clips of another folder
    python bench/guidance.py --sweep                          what the settings were chosen by: SWEEP_SEED, both models
    OMP_NUM_THREADS=1 python bench/guidance.py &              once per core: each takes what no other is at
    python bench/guidance.py --table                          only table.md and guidance.png of what has been run

The figures of each cell are a line in bench/guidance.jsonl, and what stands there is not run again; pictures and
records lie in runs/bench-guidance and may be deleted.

One cell: a strategy at one setting draws a picture for each of 32 held-out captions (a set of four for 8 of them, where
a strategy chooses sets), and `mmalign sample` itself draws the plain picture of the same seed beside it. The reward
that is followed is HPS of assets/shapes-clip. What is held out is the truth of the shapes world, read from pixels:
whether exactly the asked shapes and colours are there, and an annotator's utility. `nrg` follows a reward on noisy
latents that is fitted here, to HPS' own verdicts on pictures of the model; its HPS is held out too. Clips are judged by
the mean HPS of their frames and held to the axes of the clip reader; strategies without gradients follow its text
alignment as well.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import onednn
import torch
from guidance_table import SWEEP_SEED, line, table
from machine import machine
from methods import alone, ledger, scored

from mmalign import sample, train
from mmalign.config import build, load
from mmalign.jobs import SampleConfig, TrainConfig
from mmalign.media import read_image
from mmalign.media_table import read_media_table
from mmalign.paths import find
from mmalign.records import MediaRef
from mmalign.shapes.captions import captions
from mmalign.shapes.motion import motions
from mmalign.tables import PreferenceRow, write_preferences

CLIP = "assets/shapes-clip"
HPS = {"name": "hps", "params": {"checkpoint": CLIP}}
SAMPLING: dict[str, Any] = {"steps": 12, "guidance_scale": 2.0, "batch_size": 32, "height": 64, "width": 64}
MODELS: dict[str, dict[str, Any]] = {
    "sd": {"model": {"path": "assets/shapes-sd"}, **SAMPLING},
    "flow": {"model": {"path": "assets/shapes-flow", "max_sequence_length": 1}, **SAMPLING},
    "video": {
        "model": {"path": "assets/shapes-video", "max_sequence_length": 24}, **SAMPLING, "height": 32, "width": 32,
        "frames": 9, "fps": 8, "lossless": True,
    },
}  # fmt: skip
SETS, OF_EACH = ("diversity",), 4  # strategies that choose a set for a prompt, and how many pictures it has
TRAINING_CAPTIONS, LATENT_STEPS = 96, 150  # of the reward that nrg follows: four pictures each


def particles(method: str, **more: Any) -> dict[str, Any]:
    return {"kind": "particles", "method": method, "strength": 100.0, "every": 2, **more}


STRATEGIES: dict[str, list[dict[str, Any]]] = {
    "best of n": [{"kind": "best_of_n", "n": n} for n in (2, 4, 8, 16)],
    # No choice at all: what the particles' noisy steps do by themselves. One of two, drawn: half of its calls would do.
    "stochastic steps alone": [
        {"kind": "particles", "n": 2, "strength": 1e-6, "every": 100, "threshold": 0, "choose": "draw"}
    ],
    # What particles have to beat: as many of the same noisy steps, and nothing resampled.
    "stochastic best of n": [particles("fk", n=n, threshold=0, every=100) for n in (2, 4, 8, 16)],
    "search, random": [{"kind": "search", "method": "random", "rounds": r, "n": 4} for r in (1, 2, 4)],
    "search, zero order": [{"kind": "search", "method": "zero_order", "rounds": r, "n": 2} for r in (1, 2, 4, 8)],
    "search, paths": [
        {"kind": "search", "method": "paths", "keep": keep, "n": n, "back": 1, "forth": 4}
        for keep, n in ((1, 2), (2, 2), (2, 4))
    ],
    "particles, max": [particles("fk", potential="max", n=n) for n in (4, 8)],
    "particles, difference": [particles("fk", potential="difference", n=n) for n in (4, 8)],
    "particles, sum": [particles("fk", potential="sum", n=n) for n in (4, 8)],
    "particles, smc": [particles("smc", n=n) for n in (4, 8)],
    "particles, smc with gradient": [particles("smc", gradient=True, n=n) for n in (4, 8)],
    "noise, reno": [{"kind": "noise", "method": "reno", "iterations": k} for k in (2, 5, 10)],
    "noise, doodl": [{"kind": "noise", "method": "doodl", "iterations": k} for k in (2, 5, 10)],
    "gradient, scale": [{"kind": "gradient", "scale": scale} for scale in (0.05, 0.1, 0.2)],
    "gradient, recurrence": [{"kind": "gradient", "scale": 0.1, "recurrence": k} for k in (2, 4)],
    "neighbourhood": [{"kind": "neighbourhood", "n": n} for n in (4, 8, 16)],
    "diversity": [{"kind": "diversity", "candidates": n, "initial": n // 2, "children": 4} for n in (16, 32, 64)],
    "nrg": [{"kind": "nrg", "scale": scale} for scale in (0.5, 2.0, 8.0)],
}
"""The settings of each strategy, from cheap to dear; the name is that of its line in the plot."""

SWEEP_CAPTIONS = 8
SWEPT: dict[str, list[dict[str, Any]]] = {
    "noise, reno": [{"kind": "noise", "method": "reno", "iterations": 5, "lr": lr} for lr in (1.0, 5.0, 50.0)],
    "noise, doodl": [{"kind": "noise", "method": "doodl", "iterations": 5, "lr": lr} for lr in (1.0, 5.0, 50.0)],
    "particles, max": [particles("fk", potential="max", n=4) | {"strength": s} for s in (10.0, 100.0, 1000.0)],
}
"""What was tried on SWEEP_SEED, which is in no table of results."""

ANY_REWARD = ("best of n", "search", "particles, max", "particles, difference", "particles, sum")


# ----------------------------------------------------------------------------------------------------------- one cell


def rewards(cell: dict[str, Any], latent: Path | None) -> dict[str, Any]:
    """What a cell follows and what it is held to."""
    video, kind = cell["model"] == "video", cell["guidance"]["kind"]
    truth = {"name": "shapes_motion" if video else "shapes_truth"}
    if cell["follows"] == "TA":
        told = [
            {**truth, "subscore": axis, "column": axis, "weight": float(axis == "TA")} for axis in ("TA", "VQ", "MQ")
        ]
        return {"rewards": told, "held_out": [HPS]}
    if kind == "nrg":
        return {"rewards": [{"name": "latent_reward", "params": {"model": str(latent)}}], "held_out": [HPS, truth]}
    followed = [{**HPS, "column": "hps"}]
    if kind == "neighbourhood":  # a second taste, that pictures be clean, of an evaluator that is not the one held out
        tidy = "smooth" if video else "tidy"
        second = {
            **truth,
            "params": {"annotator": tidy},
            "subscore": "VQ" if video else "cleanliness",
            "column": "clean",
        }
        return {"rewards": [{**followed[0], "weight": 2.0}, {**second, "weight": 1.0}], "held_out": [truth],
                "scale": "deviation"}  # fmt: skip
    sets = {"clip": CLIP, "judge": {"name": "shapes_place"}, "judge_scores": ["x", "y", "radius"]}
    return {"rewards": followed, "held_out": [truth], **(sets if kind == "diversity" else {})}


def config(cell: dict[str, Any], home: Path, settings: argparse.Namespace, latent: Path | None = None) -> SampleConfig:
    """The cell as `mmalign sample` takes it."""
    texts = prompts(cell, cell["captions"])
    several = cell["guidance"]["kind"] in SETS
    if several:
        texts = texts[: max(1, cell["captions"] // OF_EACH)]
    home.mkdir(parents=True, exist_ok=True)
    (home / "prompts.txt").write_text("\n".join(texts))
    tree = {
        **model(cell["model"], settings), "prompts": str(home / "prompts.txt"), "output": str(home / "samples"),
        "seed": 1000 * cell["seed"], "per_prompt": OF_EACH if several else 1,
        "guidance": {**cell["guidance"], **rewards(cell, latent)},
    }  # fmt: skip
    return build(SampleConfig, tree)


def prompts(cell: dict[str, Any], count: int) -> list[str]:
    """Held-out captions of a seed."""
    make: Any = motions if cell["model"] == "video" else captions
    return list(dict.fromkeys(str(each) for each in make(3 * count, 77 + cell["seed"], held_out=True)))[:count]


def model(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Model and sampling settings; clips may come from another folder."""
    tree = MODELS[name]
    return {**tree, "model": {**tree["model"], "path": settings.video_model}} if name == "video" else tree


def figures(folder: Path) -> dict[str, Any]:
    """What is kept of a run, from its guidance.json: gains over plain sampling with intervals, and costs."""
    found = json.loads((folder / "guidance.json").read_text())
    told: dict[str, Any] = {"followed": found["reward"]["gain"], "of": found["requests"]}
    for name, each in {**found["held_out"], **found["rewards"]}.items():
        told[name.removeprefix("shapes_truth/").removeprefix("shapes_motion/")] = each["gain"] | {
            "plain": each["plain"]["mean"]
        }
    costs = {name: found["cost"][name] for name in ("network_calls", "decodes", "reward_calls", "reward_gradients")}
    return {
        "gains": _rounded(told), **_rounded(costs), "times": _rounded(found["cost_ratio"]),
        "seconds": round(found["cost"]["seconds"], 3), "plain_seconds": round(found["plain_cost"]["seconds"], 3),
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 5) if isinstance(value, float) else value


def one(cell: dict[str, Any], settings: argparse.Namespace) -> None:
    """Runs a cell that is missing and adds its line to the ledger."""
    name = f"{cell['strategy']} {told(cell['guidance'])} {cell['follows']}".translate(str.maketrans(" ,=", "---"))
    base = settings.out / cell["model"]
    home = base / f"seed-{cell['seed']}" / name
    with alone(home, wait=False) as mine:
        if not mine or cell in [{key: done.get(key) for key in cell} for done in ledger(settings.figures)]:
            return
        latent = fitted(base, cell["model"], settings) if cell["guidance"]["kind"] == "nrg" else None
        wanted = config(cell, home, settings, latent)
        sample.run(wanted)
        done = {**cell, **figures(wanted.output), "machine": machine(torch.device("cpu"))}
        with settings.figures.open("a") as file:  # one short write, so that lines of several processes do not mix
            file.write(json.dumps(done) + "\n")
        print(
            f"{cell['model']} seed {cell['seed']} {cell['strategy']} {told(cell['guidance'])}: {line(done)}", flush=True
        )


def told(guidance: dict[str, Any]) -> str:
    """Settings in a few words, without what the strategy's name says."""
    return " ".join(f"{key}={value}" for key, value in guidance.items() if key not in ("kind", "method", "potential"))


# ------------------------------------------------------------------------------------------ the reward that nrg follows


def fitted(base: Path, name: str, settings: argparse.Namespace) -> Path:
    """A reward on noisy latents, fitted to the verdicts of HPS on four pictures for each of some training captions."""
    with alone(base / "latent", wait=True):
        done = base / "latent" / "run" / "export"
        if done.is_dir():
            return done
        home, begun = base / "latent", time.perf_counter()
        texts = list(dict.fromkeys(map(str, captions(3 * TRAINING_CAPTIONS, 901, held_out=False))))[:TRAINING_CAPTIONS]
        (home / "prompts.txt").write_text("\n".join(texts))
        tree = {**model(name, settings), "prompts": str(home / "prompts.txt"), "output": str(home / "pool"),
                "per_prompt": 4, "seed": 500_000}  # fmt: skip
        rows = read_media_table(sample.run(build(SampleConfig, tree)))
        scores = scored([read_image(row.media) for row in rows], [row.prompt for row in rows])
        groups: dict[str, list[tuple[Any, float]]] = {}
        for row, score in zip(rows, scores, strict=True):
            groups.setdefault(row.group, []).append((row, score))
        pairs = [
            PreferenceRow(a.prompt, (MediaRef(str(a.media)), MediaRef(str(b.media))), scores={"hps": (x, y)})
            for group in groups.values()
            for (a, x), (b, y) in combinations(group, 2)
        ]
        write_preferences(home / "pairs.jsonl", pairs)
        place = model(name, settings)["model"]
        length = place.get("max_sequence_length")
        run = train.run(load(TrainConfig, find("configs/train/reward/latent_shapes_sd.yaml"), [
            f"model.path={place['path']}", *([f"model.max_sequence_length={length}"] if length else []),
            f"output={home / 'run'}", f"data.table={home / 'pairs.jsonl'}", "data.shapes=null", "data.dimension=hps",
            "data.verify=false", f"data.cache_dir={home / 'cache'}", f"optim.steps={LATENT_STEPS}", "log.trackers=[]",
            "loss.kind=bradley_terry", "data.soft_labels=false", "checkpoint.every=100000",
        ]), resume=True)  # fmt: skip
        print(f"{name}: the latent reward took {time.perf_counter() - begun:.0f} s", flush=True)
        return Path(run) / "export"


# ---------------------------------------------------------------------------------------------------------------- main


def queue(settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What identifies each cell: seed by seed, the cheapest setting of every strategy first, then the next."""
    strategies, seeds = (SWEPT, [SWEEP_SEED]) if settings.sweep else (STRATEGIES, settings.seeds)
    names = [name for name in settings.model or MODELS if not absent(name, settings)]
    for seed, rank, model in product(seeds, range(max(map(len, strategies.values()))), names):
        for strategy, choices in strategies.items():
            if settings.strategies and not strategy.startswith(tuple(settings.strategies.split(","))):
                continue
            for guidance in choices[rank : rank + 1]:
                for follows in followed(model, strategy, guidance):
                    yield {"model": model, "strategy": strategy, "guidance": guidance, "follows": follows, "seed": seed,
                           "captions": SWEEP_CAPTIONS if settings.sweep else settings.captions,
                           "steps": SAMPLING["steps"]}  # fmt: skip


def followed(model: str, strategy: str, guidance: dict[str, Any]) -> tuple[str, ...]:
    """The rewards that a strategy follows on a model, each in a cell of its own; none where it is not measured."""
    if model != "video":
        return ("hps",)
    if guidance["kind"] in (*SETS, "nrg"):  # whose judge is of pictures; whose reward has a bench of its own
        return ()
    return ("hps", "TA") if strategy.startswith(ANY_REWARD) else ("hps",)


def absent(name: str, settings: argparse.Namespace) -> bool:
    place = Path(model(name, settings)["model"]["path"])
    return not (find(place) / "model_index.json").is_file()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="repeatable; default: all")
    parser.add_argument("--video-model", default="assets/shapes-video", help="folder of the video pipeline")
    parser.add_argument("--strategies", help="comma-separated beginnings of names, such as `noise`; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--captions", type=int, default=32, help="held-out captions of a cell")
    parser.add_argument("--sweep", action="store_true", help=f"what the settings were chosen by, on seed {SWEEP_SEED}")
    parser.add_argument("--onednn", action="store_true", help="oneDNN's matrix products: faster on AMD (onednn.py)")
    parser.add_argument("--table", action="store_true", help="only make the table and the plot")
    parser.add_argument("--figures", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-guidance"))
    settings = parser.parse_args(arguments)
    if settings.onednn:
        onednn.use()
    if not settings.table:
        for name in settings.model or MODELS:
            if absent(name, settings):
                print(f"{name}: {model(name, settings)['model']['path']} is not there, so its cells are skipped")
        for cell in queue(settings):
            one(cell, settings)
    table(ledger(settings.figures), settings.out)


if __name__ == "__main__":
    main()
