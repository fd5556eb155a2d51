"""Every preference objective under equal compute on the shapes world, where truth can be read from pixels.

    python bench/methods.py                       all methods, both models, three conditions, seeds 0 1 2; resumable
    python bench/methods.py --model sd --condition clean --seeds 0 --methods diffusion_dpo,rank_dpo
    python bench/methods.py --lr 1e-3 --seeds 3 --condition clean --methods diffusion_dpo    another learning rate
    python bench/methods.py --steps 160 --condition clean --methods diffusion_dpo            another length
    OMP_NUM_THREADS=1 python bench/methods.py &  once per core: each takes what no other is at; 1.6 times as fast as one
    python bench/methods.py --table               only the table, table.md and methods.png of what has been run

The figures of each run are a line in bench/methods.jsonl, and what stands there is not run again; pictures and weights
lie in runs/bench-methods and may be deleted.

One run: a base model draws four pictures for each of 256 captions; one observed verdict for each pair of a prompt's
pictures is written into a table of pairs and, as shares of wins, into a table of lists, so that every method sees the
same verdicts; a LoRA is trained for as many pictures as in every other run; 256 held-out captions (and a second picture
for 32 of them) are drawn and read. Conditions: `clean` verdicts are the annotator's noise-free utility; `flipped` turns
a fifth of them round; `multi` has three annotators vote. All are judged by the same annotator's noise-free utility, by
the share of pictures with exactly the asked shapes and colours, and by the shapes scorer, that nothing is trained on.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onednn
import torch
from methods_table import LR, STEPS, figures, line, summary, table

from mmalign import sample, train
from mmalign.config import load
from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch, Evaluator
from mmalign.jobs import SampleConfig, TrainConfig
from mmalign.judgements import share_of
from mmalign.labelling import phi
from mmalign.media import read_image
from mmalign.media_table import read_media_table
from mmalign.paths import find
from mmalign.records import MediaRef
from mmalign.shapes.annotators import ANNOTATORS, weighables
from mmalign.shapes.captions import captions, parse_caption
from mmalign.shapes.reader import fidelity, read
from mmalign.tables import PreferenceRow, write_preferences

MODELS = {
    "sd": ["model.path=assets/shapes-sd"],
    "flow": ["model.path=assets/shapes-flow", "model.max_sequence_length=1"],
}
SAMPLERS = {
    "sd": ["scheduler=dpm++sde", "guidance_scale=2.0", "steps=12"],  # both as right as with 20
    "flow": ["scheduler=own", "guidance_scale=3.0", "steps=12"],
}
CONDITIONS = ("clean", "flipped", "multi")
TASTES = ("bold", "tidy", "vivid")  # who votes in `multi`; the first judges in the other two, and at the end
FLIPS = 0.2
PICTURES = 32  # of a step, whatever the method takes: 16 pairs, 8 lists of four, 32 singles
TOLD_FLIPS = ("conservative_dpo", "robust_dpo")
ONLY_ONE = {"flow_dpo": "flow", "flow_dpo_late": "flow"}
VARIANTS = {"flow_dpo_late": ("flow_dpo", ["loss.beta_schedule=(1-t)^2"])}  # of a config, with what is set on top


def methods() -> list[str]:
    """Every config in configs/train/methods but that of soft labels, which has nothing to soften in single verdicts."""
    names = {path.stem for path in find("configs/train/methods").glob("*.yaml")}
    return sorted(names - {"soft_labels"} | VARIANTS.keys())


# ------------------------------------------------------------------------------------------------------ what is known


def looked_at(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[dict[str, float]]:
    """What the reader says of each picture: utilities of the annotators, and whether all that was asked is there."""
    found = []
    for image, prompt in zip(images, prompts, strict=True):
        caption, reading = parse_caption(prompt), read(image)
        features = weighables(caption, reading)
        row = {name: ANNOTATORS[name].weigh(features) for name in (*TASTES, "mixed")}
        found.append({**row, "fidelity": float(fidelity(caption, reading).shape_colour), "clean": reading.cleanliness})
    return found


def scored(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    """The shapes scorer's HPS, which no run is trained on."""
    scorer = load_evaluator("hps", {"checkpoint": "assets/shapes-clip"}, device="cpu")
    assert isinstance(scorer, Evaluator)
    found: list[float] = []
    for start in range(0, len(images), 64):
        part, told = images[start : start + 64], list(prompts[start : start + 64])
        tensors = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) for image in part]
        scores = scorer.score(Batch(images=tensors, prompts=told))
        assert isinstance(scores, torch.Tensor)
        found += scores.tolist()
    return found


def drawn(
    folder: Path,
    model: str,
    prompts: Path,
    per_prompt: int,
    seed: int,
    lora: Path | None = None,
    key: str = "model.lora",
) -> list[Any]:
    """Rows of the media table of a model's pictures; `key` says what the LoRA is to sampling."""
    overrides = [
        *MODELS[model], *SAMPLERS[model], f"prompts={prompts}", f"output={folder}", f"per_prompt={per_prompt}",
        f"seed={seed}", "batch_size=64",
    ]  # fmt: skip
    overrides += [f"{key}={lora}"] if lora else []
    return read_media_table(sample.run(load(SampleConfig, find("configs/shapes/sample.yaml"), overrides)))


def pool(home: Path, model: str, seed: int, count: int) -> list[dict[str, Any]]:
    """Four pictures of the base model for each caption, and what is known of them."""
    known = home / "pool.json"
    if known.is_file():
        found: list[dict[str, Any]] = json.loads(known.read_text())
        return found
    home.mkdir(parents=True, exist_ok=True)
    texts = list(dict.fromkeys(str(caption) for caption in captions(3 * count, 900 + seed, held_out=False)))[:count]
    (home / "prompts.txt").write_text("\n".join(texts))
    rows = drawn(home / "pool", model, home / "prompts.txt", 4, 50_000 * (seed + 1))
    told = looked_at([read_image(row.media) for row in rows], [row.prompt for row in rows])
    found = [
        {"prompt": row.prompt, "media": str(row.media), "group": row.group, **values}
        for row, values in zip(rows, told, strict=True)
    ]
    known.write_text(json.dumps(found))
    return found


def tables(home: Path, rows: list[dict[str, Any]], condition: str, seed: int) -> dict[str, Path]:
    """The same verdicts as pairs and as lists."""
    rng = np.random.default_rng([seed, CONDITIONS.index(condition)])
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    pairs, lists = [], []
    for group in groups.values():
        media = tuple(MediaRef(row["media"]) for row in group)
        utility = np.array([[row[name] for name in TASTES] for row in group])
        value = phi(utility) if condition == "multi" else utility[:, 0]
        wins = np.full((len(group), len(group)), 0.5)
        for i, j in combinations(range(len(group)), 2):
            turned = condition == "flipped" and rng.random() < FLIPS
            a, b = (value[j], value[i]) if turned else (value[i], value[j])
            wins[i, j] = 0.5 + 0.5 * np.sign(a - b)
            wins[j, i] = 1 - wins[i, j]
            pairs.append(PreferenceRow(group[0]["prompt"], (media[i], media[j]), scores={"phi": (float(a), float(b))}))
        lists.append(PreferenceRow(group[0]["prompt"], media, scores={"phi": tuple(share_of(wins).tolist())}))
    written = {"pairs": home / f"{condition}-pairs.jsonl", "lists": home / f"{condition}-lists.jsonl"}
    write_preferences(written["pairs"], pairs)
    write_preferences(written["lists"], lists)
    return written


# ------------------------------------------------------------------------------------------------------------ one run


def trained(home: Path, cell: dict[str, Any], written: dict[str, Path]) -> dict[str, Any]:
    """Trains one method; seconds, and where its LoRA is."""
    model, method = str(cell["model"]), str(cell["method"])
    file, changes = recipe(method, str(cell["condition"]))
    items = getattr(load(TrainConfig, file).loss, "items", "pairs")
    table = written["pairs" if items == "pairs" and method != "jpo" else "lists"]
    size = {"pairs": PICTURES // 2, "lists": PICTURES // 4, "singles": PICTURES}[items]
    overrides = [
        *MODELS[model], f"output={home / 'train'}", f"data.table={table}", "data.shapes=null", "data.dimension=phi",
        "data.verify=false", f"seed={cell['seed']}", f"optim.steps={cell['steps']}", f"optim.lr={cell['lr']}",
        f"optim.batch_size={size}", "log.trackers=[]",
        "checkpoint.every=100000", "log.every=10", "optim.schedule=cosine",
        "data.cache=disk", f"data.cache_dir={home.parents[2] / 'cache'}",
        *changes,
    ]  # fmt: skip
    started = time.perf_counter()
    run = train.run(load(TrainConfig, file, overrides), resume=True)
    return {"seconds": time.perf_counter() - started, "lora": str(run / "export")}


def judged(home: Path, model: str, seed: int, lora: Path | None, count: int, key: str = "model.lora") -> dict[str, Any]:
    """Held-out pictures and what is known of them, in the order of the captions."""
    texts = list(dict.fromkeys(str(caption) for caption in captions(3 * count, 77 + seed, held_out=True)))[:count]
    home.mkdir(parents=True, exist_ok=True)
    (home / "held_out.txt").write_text("\n".join(texts))
    (home / "again.txt").write_text("\n".join(texts[:32]))
    rows = drawn(home / "held_out", model, home / "held_out.txt", 1, 9_000_000 + 1000 * seed, lora, key)
    again = drawn(home / "again", model, home / "again.txt", 1, 9_500_000 + 1000 * seed, lora, key)
    images = [read_image(row.media) for row in rows]
    second = [read_image(row.media) for row in again]
    apart = [float(np.sqrt(np.mean((a.astype(float) - b) ** 2))) for a, b in zip(images, second, strict=False)]
    prompts = [row.prompt for row in rows]
    return {"rows": looked_at(images, prompts), "hps": scored(images, prompts), "apart": apart}


def one(cell: dict[str, Any], settings: argparse.Namespace) -> None:
    """Runs what is missing of one cell and adds its line to the ledger."""
    model, method, seed = str(cell["model"]), str(cell["method"]), int(cell["seed"])
    base = settings.out / model / f"seed-{seed}"
    home = base / str(cell["condition"]) / f"{method}-{cell['steps']}-{cell['lr']:g}"
    with alone(home, wait=False) as mine:
        if not mine or cell in [{key: done.get(key) for key in cell} for done in ledger(settings.figures)]:
            return
        with alone(base, wait=True):
            rows = pool(base, model, seed, settings.captions)
            reference = base / "base.json"
            if not reference.is_file():
                reference.write_text(json.dumps(judged(base / "base", model, seed, None, settings.held_out)))
            written = tables(base, rows, str(cell["condition"]), seed)
        facts = trained(home, cell, written)
        key = "negative_lora" if method == "diffusion_npo" else "model.lora"
        found = judged(home, model, seed, Path(facts["lora"]), settings.held_out, key)
        done = {**cell, **figures(json.loads(reference.read_text()), found), "seconds": round(facts["seconds"], 1)}
        with settings.figures.open("a") as file:  # one short write, so that lines of several processes do not mix
            file.write(json.dumps(done) + "\n")
        print(f"{model} {cell['condition']} {method} seed {seed}: {line(summary([done]))}", flush=True)


def ledger(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []


def queue(settings: argparse.Namespace, chosen: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What identifies each run: a changed loss or length is another one."""
    for seed in settings.seeds:
        for model in settings.model or MODELS:
            for condition in settings.condition or CONDITIONS:
                for method in chosen:
                    if ONLY_ONE.get(method, model) == model:
                        loss = load(TrainConfig, *recipe(method, condition)).loss.model_dump(mode="json")
                        yield {
                            "model": model, "condition": condition, "method": method, "seed": seed,
                            "lr": settings.lr, "steps": settings.steps, "captions": settings.captions,
                            "loss": loss,
                        }  # fmt: skip


def recipe(method: str, condition: str) -> tuple[Path, list[str]]:
    """The config of a method, and what its variant sets on top; who asks for the flip rate is told it."""
    config, changes = VARIANTS.get(method, (method, []))
    told = [f"loss.flip_rate={FLIPS}"] if condition == "flipped" and method in TOLD_FLIPS else []
    return find("configs/train/methods") / f"{config}.yaml", [*changes, *told]


@contextmanager
def alone(folder: Path, wait: bool) -> Iterator[bool]:
    """Holds a folder against other processes of this script; False if another has it and this one does not wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="repeatable; default: both")
    parser.add_argument("--condition", choices=CONDITIONS, action="append", help="repeatable; default: all three")
    parser.add_argument("--methods", help="comma-separated; default: every config in configs/train/methods")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--lr", type=float, default=LR)
    parser.add_argument("--onednn", action="store_true", help="oneDNN's matrix products: faster on AMD (onednn.py)")
    parser.add_argument("--captions", type=int, default=256, help="that the base model draws four pictures for")
    parser.add_argument("--held-out", type=int, default=256, help="captions that are judged at the end")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-methods"))
    parser.add_argument("--figures", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the ledger")
    parser.add_argument("--table", action="store_true", help="only table, table.md and plot of what has been run")
    settings = parser.parse_args()
    if settings.onednn:
        onednn.use()
    if not settings.table:
        chosen = settings.methods.split(",") if settings.methods else methods()
        unknown = sorted(set(chosen) - set(methods()))
        if unknown:
            parser.error(f"no config for {', '.join(unknown)}; there are: {', '.join(methods())}")
        for cell in queue(settings, chosen):
            one(cell, settings)
    table(ledger(settings.figures), settings.out)


if __name__ == "__main__":
    main()
