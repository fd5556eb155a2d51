"""Flow-DPO, Flow-RWR and SFT on clips under equal compute, on the shapes video world, where three axes can be read.

    python bench/video_methods.py                        all cells, seeds 0 1 2; resumable, one process per core
    python bench/video_methods.py --cells flow_dpo,sft --seeds 0
    python bench/video_methods.py --sweep                what lr, beta and temperature were chosen by, on SWEEP_SEED
    python bench/video_methods.py --table                only the table of what has been run

The figures of each run are a line in bench/video_methods.jsonl, and what stands there is not run again; clips and
weights lie in runs/bench-video and may be deleted.

One run: `assets/shapes-video` draws four clips for each of 192 captions; the reader says what VQ, MQ and TA of each are
(`mmalign.shapes.axes`), and these are the labels, without noise. A LoRA is trained for as many clips as in every other
run, with the axes weighted as the cell says: on pairs for DPO, on lists for Flow-RWR (softmax of the weighted axes) and
SFT (the best of four). 192 held-out captions are then drawn with the seeds of the base model's and compared axis by
axis: a win is a higher value, a tie half of one. Nothing that is trained on is among what is judged.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from methods import alone, ledger
from video_methods_table import SWEEP_SEED, table

from mmalign import sample, train
from mmalign.config import load
from mmalign.jobs import SampleConfig, TrainConfig
from mmalign.media import read_video
from mmalign.media_table import read_media_table
from mmalign.paths import find
from mmalign.records import MediaRef
from mmalign.shapes.axes import AXES, axes, everything
from mmalign.shapes.clip_reader import read_clip
from mmalign.shapes.motion import motions, parse_motion
from mmalign.tables import PreferenceRow, write_preferences

CLIPS = 32  # of a step, whatever the method takes: 16 pairs, 8 lists of four
LOSSES = {
    "flow_dpo": ["loss.kind=flow_dpo"],
    "flow_dpo_late": ["loss.kind=flow_dpo", "loss.beta_schedule=(1-t)^2"],
    "flow_dpo_late_same": ["loss.kind=flow_dpo", "loss.beta_schedule=(1-t)^2"],  # with the beta of the constant one
    "rwr": ["loss={kind: rwr, weighting: softmax, temperature: 0.1}"],
    "sft": ["loss={kind: best_of_group}"],
}
LISTS = ("rwr", "sft")
WEIGHTS = {  # VQ:MQ:TA
    "1:1:1": (1.0, 1.0, 1.0), "1:0:0": (1.0, 0.0, 0.0), "0:1:0": (0.0, 1.0, 0.0), "0:0:1": (0.0, 0.0, 1.0),
    "1:1:4": (1.0, 1.0, 4.0), "2:2:1": (2.0, 2.0, 1.0),
}  # fmt: skip
CHOSEN: dict[str, tuple[float, float]] = {
    "flow_dpo": (3e-4, 100.0), "flow_dpo_late": (3e-4, 2500.0), "flow_dpo_late_same": (3e-4, 100.0),
    "rwr": (1e-4, 0.0), "sft": (1e-4, 0.0),
}  # fmt: skip
"""lr, and beta of Flow-DPO with mean errors, that the sweep's mean of axes was highest with."""
SWEPT = [
    *product(("flow_dpo", "flow_dpo_late"), (3e-4, 1e-3), (20.0, 100.0, 500.0, 2500.0)),
    *product(LISTS, (1e-4, 3e-4, 1e-3), (0.0,)),
]
CELLS = [
    *((method, "1:1:1") for method in LOSSES),
    *(("flow_dpo", weights) for weights in WEIGHTS if weights != "1:1:1"),
    *((method, "0:0:1") for method in ("flow_dpo_late", "flow_dpo_late_same", "rwr", "sft")),
]


def read(rows: list[Any]) -> list[dict[str, float]]:
    """The axes of each clip of a media table, and whether all that was asked is there."""
    found = []
    for row in rows:
        clip, caption = read_video(row.media), parse_motion(row.prompt)
        reading = read_clip(clip.frames.permute(0, 2, 3, 1).numpy(), clip.fps)
        found.append({**axes(caption, reading), "everything": float(everything(caption, reading))})
    return found


def drawn(folder: Path, prompts: Path, per_prompt: int, seed: int, lora: Path | None = None) -> list[Any]:
    """Rows of the media table of the model's clips, lossless, so that the reader sees what the model drew."""
    overrides = [
        f"prompts={prompts}", f"output={folder}", f"per_prompt={per_prompt}", f"seed={seed}", "steps=16",
        "batch_size=64", "lossless=true",
    ]  # fmt: skip
    overrides += [f"model.lora={lora}"] if lora else []
    return read_media_table(sample.run(load(SampleConfig, find("configs/shapes/video_sample.yaml"), overrides)))


def captions(place: Path, count: int, seed: int, held_out: bool) -> Path:
    """A file of as many different captions."""
    texts = list(dict.fromkeys(str(caption) for caption in motions(3 * count, seed, held_out=held_out)))[:count]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("\n".join(texts))
    return place


def pool(home: Path, seed: int, count: int) -> dict[str, Path]:
    """Preference tables of four clips of the base model for each caption: pairs, and lists."""
    written = {"pairs": home / "pairs.jsonl", "lists": home / "lists.jsonl"}
    if all(path.is_file() for path in written.values()):
        return written
    rows = drawn(home / "pool", captions(home / "prompts.txt", count, 900 + seed, False), 4, 50_000 * (seed + 1))
    groups: dict[str, list[tuple[Any, dict[str, float]]]] = {}
    for row, values in zip(rows, read(rows), strict=True):
        groups.setdefault(row.group, []).append((row, values))
    pairs, lists = [], []
    for group in groups.values():
        media = [MediaRef(str(row.media)) for row, _ in group]
        scores = {axis: [values[axis] for _, values in group] for axis in AXES}
        prompt = group[0][0].prompt
        lists.append(PreferenceRow(prompt, tuple(media), scores={a: tuple(v) for a, v in scores.items()}))
        for i, j in combinations(range(len(group)), 2):
            both = {axis: (values[i], values[j]) for axis, values in scores.items()}
            pairs.append(PreferenceRow(prompt, (media[i], media[j]), scores=both))
    write_preferences(written["pairs"], pairs)
    write_preferences(written["lists"], lists)
    return written


def trained(home: Path, cell: dict[str, Any], written: dict[str, Path]) -> tuple[Path, float]:
    """The LoRA of a cell, and seconds."""
    lists = cell["method"] in LISTS
    weights = ", ".join(f"{axis}: {w}" for axis, w in zip(AXES, WEIGHTS[cell["weights"]], strict=True))
    changes = LOSSES[cell["method"]]
    overrides = [
        f"output={home / 'train'}", "data.shapes=null", f"data.table={written['lists' if lists else 'pairs']}",
        f"data.dimensions={{{weights}}}", "data.verify=false", "data.soft_labels=true", "data.ties=drop",
        f"data.cache_dir={home.parent / 'cache'}", "data.cache=disk", f"seed={cell['seed']}",
        f"optim.steps={cell['steps']}", f"optim.lr={cell['lr']}", f"optim.batch_size={CLIPS // (4 if lists else 2)}",
        "optim.schedule=cosine", "checkpoint.every=100000", "log.every=10", "log.trackers=[]", *changes,
    ]  # fmt: skip
    overrides += [f"loss.beta={cell['beta']}"] if not lists else []
    started = time.perf_counter()
    run = train.run(load(TrainConfig, find("configs/shapes/video_dpo.yaml"), overrides), resume=True)
    return run / "export", time.perf_counter() - started


def figures(base: list[dict[str, float]], aligned: list[dict[str, float]]) -> dict[str, Any]:
    """[wins, ties, losses] on each axis, and means before and after."""
    found: dict[str, Any] = {}
    for name in (*AXES, "everything"):
        before, after = (np.array([row[name] for row in rows]) for rows in (base, aligned))
        found[name] = [int((after > before).sum()), int((after == before).sum()), int((after < before).sum())]
        found[f"{name}_mean"] = [round(float(before.mean()), 4), round(float(after.mean()), 4)]
        found[f"{name}_change"] = [round(float(value), 4) for value in after - before]
    return found


def one(cell: dict[str, Any], settings: argparse.Namespace) -> None:
    """Runs what is missing of one cell and adds its line to the ledger."""
    base = settings.out / f"seed-{cell['seed']}"
    name = f"{cell['method']}-{cell['weights'].replace(':', '')}-{cell['steps']}-{cell['lr']:g}-{cell['beta']:g}"
    with alone(base / name, wait=False) as mine:
        if not mine or cell in [{key: done.get(key) for key in cell} for done in ledger(settings.figures)]:
            return
        with alone(base, wait=True):
            written = pool(base, cell["seed"], settings.captions)
            prompts = captions(base / "held_out.txt", settings.held_out, 77 + cell["seed"], True)
            first = read(drawn(base / "base", prompts, 1, 9_000_000 + 1000 * cell["seed"]))
        lora, seconds = trained(base / name, cell, written)
        aligned = read(drawn(base / name / "held_out", prompts, 1, 9_000_000 + 1000 * cell["seed"], lora))
        done = {**cell, **figures(first, aligned), "seconds": round(seconds, 1)}
        with settings.figures.open("a") as file:  # one write, so that lines of several processes do not mix
            file.write(json.dumps(done) + "\n")
        said = ", ".join(f"{a} {done[f'{a}_mean'][0]:.3f} -> {done[f'{a}_mean'][1]:.3f}" for a in (*AXES, "everything"))
        print(f"{cell['method']} {cell['weights']} seed {cell['seed']}: {said}", flush=True)


def queue(settings: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The cells that were asked for, seed by seed."""
    sizes = {"steps": settings.steps, "captions": settings.captions}
    wanted = settings.cells.split(",") if settings.cells else None
    if settings.sweep:
        for method, lr, beta in SWEPT:
            if wanted is None or method in wanted:
                yield {"method": method, "weights": "1:1:1", "seed": SWEEP_SEED, "lr": lr, "beta": beta, **sizes}
        return
    for seed in settings.seeds:
        for method, weights in CELLS:
            if wanted is None or method in wanted or f"{method}@{weights}" in wanted:
                lr, beta = CHOSEN[method]
                yield {"method": method, "weights": weights, "seed": seed, "lr": lr, "beta": beta, **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", help="comma-separated: method, or method@VQ:MQ:TA; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--sweep", action="store_true", help="learning rates and betas, on a seed of their own")
    parser.add_argument("--captions", type=int, default=192, help="that the base model draws four clips for")
    parser.add_argument("--held-out", type=int, default=192, help="captions that are judged at the end")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-video"))
    parser.add_argument("--figures", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the ledger")
    parser.add_argument("--table", action="store_true", help="only the table of what has been run")
    settings = parser.parse_args()
    if not settings.table:
        for cell in queue(settings):
            one(cell, settings)
    print(table(ledger(settings.figures)))


if __name__ == "__main__":
    main()
