"""VBench's dimensions against the truth of the shapes world: rank correlations with intervals.

    OMP_NUM_THREADS=1 python bench/vbench_shapes.py            # trains what is missing, scores, writes the ledger
    python bench/vbench_shapes.py --table                      # the tables of docs/vbench_shapes.md

Clips of the shapes world have one fault each, to a known amount (`mmalign.shapes.damage`), or move as fast as is known,
or show what another caption says. They are scored by the evaluators through `mmalign score`, with small networks of the
real classes that were trained on other clips (`vbench_shapes_models.py`), since no published weights are at hand; what
is judged by rules on detections gets those of the world's own reader. So this tells whether a dimension measures what
its name says where the truth is exact, not how well the published networks do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vbench_shapes_clips import FPS, KIND_WORDS, SERIES
from vbench_shapes_models import FRAME, TRAINED

from mmalign.jobs import ScoreConfig
from mmalign.media import write_image, write_video
from mmalign.protocols.correlations import spearman
from mmalign.results import read_results
from mmalign.score import run
from mmalign.shapes.clip_data import drawn_clips
from mmalign.shapes.reader import Reading, read
from mmalign.tables import MediaRow, write_media_table

LEDGER = Path(__file__).with_name("vbench_shapes.jsonl")
SHAPES_CLIP = Path(__file__).resolve().parents[1] / "assets" / "shapes-clip"
CLIP_FILE = SHAPES_CLIP / "HPS_v2.1_compressed.safetensors"
RESAMPLES = 1000
Found = dict[tuple[str, str, str], tuple[list[float], list[float]]]


ON_TARGET = (  # dimension, sub-score, series, sign that it should have
    ("temporal_flickering", "score", "flicker", -1),
    ("subject_consistency", "score", "swap", -1),
    ("subject_consistency", "score", "vanish", -1),
    ("background_consistency", "score", "background", -1),
    ("motion_smoothness", "score", "jitter", -1),
    ("motion_smoothness", "score", "repeat", -1),
    ("motion_smoothness", "score", "lurch", -1),
    ("motion_smoothness@flow", "score", "jitter", -1),
    ("motion_smoothness@flow", "score", "repeat", -1),
    ("motion_smoothness@flow", "score", "lurch", -1),
    ("dynamic_degree", "motion", "speed", 1),
    ("dynamic_degree", "score", "speed", 1),
    ("imaging_quality", "score", "noise", -1),
    ("imaging_quality", "score", "blur", -1),
    ("aesthetic_quality", "score", "noise", -1),
    ("aesthetic_quality", "score", "blur", -1),
    ("appearance_style", "score", "style", 1),
    ("overall_consistency", "score", "caption", 1),
    ("temporal_style", "score", "caption", 1),
    ("i2v_subject", "score", "input", 1),
    ("human_action", "score", "action", 1),
    ("human_action", "probability", "action", 1),
    ("object_class", "score", "object", 1),
    ("multiple_objects", "score", "objects", 1),
    ("color", "score", "colour", 1),
    ("spatial_relationship", "score", "relation", 1),
    ("color[rules=strict]", "score", "colour", 1),
    ("spatial_relationship[rules=strict]", "score", "relation", 1),
    ("scene", "score", "scene", 1),
)
STRICT = ("color", "spatial_relationship")
SEEN = ("temporal_flickering", "subject_consistency", "background_consistency", "motion_smoothness",
        "motion_smoothness@flow", "dynamic_degree", "imaging_quality", "aesthetic_quality")  # fmt: skip
"""Dimensions that read the pixels alone: each is tried on every fault."""
FAULTS = ("flicker", "swap", "vanish", "jitter", "repeat", "lurch", "noise", "blur", "background", "speed")


# ------------------------------------------------------------------------------------------------ scoring


def detections_line(sample: str, pixels: np.ndarray) -> dict[str, Any]:
    """What the world's reader finds in each frame, as a detector with captions would tell it."""
    frames, said = [], []
    for frame in pixels:
        reading: Reading = read(frame[::2, ::2].copy())
        found = []
        for shape in (each for each in reading.shapes if each.proper):
            x, y, r = shape.x, shape.y, shape.radius
            box = [2 * side for side in (x - r, y - r, x + r, y + r)]
            word = KIND_WORDS[str(shape.kind)]
            found.append({"label": word, "box": box, "caption": f"a {shape.colour} {word}"})
        frames.append(found)
        said.append(f"shapes on a {reading.background} background")
    return {"clip": sample, "frames": frames, "captions": said}


def fit_head(folder: Path, seed: int) -> None:
    """A linear head of aesthetics on the shapes world's CLIP: 10 for a clean frame, less for noise and blur."""
    from mmalign.backbones.clip_scoring import Geometry, load_clip_backbone, resize_crop
    from mmalign.shapes.damage import spoil

    clip = load_clip_backbone(
        config=str(SHAPES_CLIP), checkpoint=CLIP_FILE,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    rng, features, targets = np.random.default_rng(seed), [], []
    for item in drawn_clips(300, seed + 1, side=FRAME):
        frame, target = item.clip()[4:5], 10.0
        for kind in ("noise", "blur"):
            amount = float(rng.random()) * bool(rng.integers(2))
            frame, target = spoil(frame, kind, amount, rng), target - 5 * amount
        pixels = torch.from_numpy(frame).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            features.append(clip.images(pixels, Geometry.of(resize_crop, antialias=False))[0].double())
        targets.append(target)
    x, y = torch.stack(features), torch.tensor(targets, dtype=torch.float64)
    centred = x - x.mean(0)
    weight = torch.linalg.solve(
        centred.T @ centred + 0.01 * torch.eye(x.shape[1], dtype=torch.float64), centred.T @ (y - y.mean())
    )
    bias = y.mean() - x.mean(0) @ weight
    torch.save({"weight": weight[None].float(), "bias": bias[None].float()}, folder / "sa_0_4_vit_l_14_linear.pth")


def specs(weights: Path, detections: Path) -> list[dict[str, Any]]:
    """The evaluators with the networks that were trained."""
    clip = {"model": str(SHAPES_CLIP)}
    raft, seen = {"checkpoint": weights / "raft-things.pth"}, {"detections": detections}
    params: dict[str, dict[str, Any]] = {
        "temporal_flickering": {},
        "subject_consistency": {"checkpoint": weights / "dino_vitbase16_pretrain.pth"},
        "background_consistency": {**clip, "checkpoint": CLIP_FILE},
        "motion_smoothness": {"checkpoint": weights / "amt-s.pth"},
        "motion_smoothness@flow": raft,
        "dynamic_degree": raft,
        "imaging_quality": {"checkpoint": weights / "musiq_spaq_ckpt-358bb6af.pth"},
        "aesthetic_quality": {
            **clip, "clip_checkpoint": CLIP_FILE, "checkpoint": weights / "sa_0_4_vit_l_14_linear.pth",
        },
        "appearance_style": {**clip, "checkpoint": CLIP_FILE},
        "i2v_subject": {"checkpoint": weights / "dino_vitbase16_pretrain.pth"},
        "temporal_style": {"checkpoint": weights / "ViClip-InternVid-10M-FLT.pth"},
        "overall_consistency": {"checkpoint": weights / "ViClip-InternVid-10M-FLT.pth"},
        "human_action": {
            "checkpoint": weights / "l16_ptk710_ftk710_ftk400_f16_res224.pth", "labels": weights / "actions.txt",
        },
        **dict.fromkeys(("object_class", "multiple_objects", "color", "scene", "spatial_relationship"), seen),
    }  # fmt: skip
    found = [{"name": name, "params": {k: str(v) for k, v in values.items()}} for name, values in params.items()]
    return [
        *found,
        *({"name": name, "params": {"detections": str(detections), "rules": "strict"}} for name in STRICT),
    ]


def wanted_by(series: str, off_target: bool) -> tuple[str, ...]:
    """The dimensions that clips of a series are scored on."""
    named = {label.partition("[")[0] for label, _, of, _ in ON_TARGET if of == series}
    return tuple(sorted(named | (set(SEEN) if off_target and series in FAULTS else set())))


def score(work: Path, weights: Path, name: str, off_target: bool, count: int, seed: int) -> Found:
    """(series, label, sub-score) -> truths and scores of the clips of one entry of `SERIES`.

    Evaluators whose network is not trained are left out, with a line that says so.
    """
    rows, truths, lines, work = [], {}, [], work / name
    (work / "clips").mkdir(parents=True, exist_ok=True)
    for place, clip in enumerate(SERIES[name](count, seed + 100 + list(SERIES).index(name))):
        sample = f"{clip.series}-{place}"
        file, reference = work / "clips" / f"{sample}.mp4", work / "clips" / f"{sample}.png"
        if not file.exists():
            write_video(file, torch.from_numpy(clip.pixels).permute(0, 3, 1, 2), FPS, lossless=True)
        if clip.reference is not None:
            write_image(reference, clip.reference)
        dimensions = tuple(each.partition("@")[0] for each in wanted_by(clip.series, off_target))
        rows.append(
            MediaRow(
                sample, clip.prompt, str(file), "video", dimensions=dimensions, aux=clip.aux,
                reference=None if clip.reference is None else str(reference),
            )
        )  # fmt: skip
        truths[sample] = clip.series, clip.truth
        if name == "objects":
            lines.append(json.dumps(detections_line(sample, clip.pixels)))
    (work / "detections.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    write_media_table(work / "table.jsonl", rows)
    wanted = {each for kind, _ in truths.values() for each in wanted_by(kind, off_target)}
    evaluators = [each for each in specs(weights, work / "detections.jsonl") if each["name"] in wanted]
    for each in [each for each in evaluators if not _trained(each)]:
        print(f"{name}: {each['name']} is left out, its network is not trained")
        evaluators.remove(each)
    if not evaluators:
        return {}
    config = {"table": work / "table.jsonl", "output": work / "scores", "evaluators": evaluators}
    run(ScoreConfig.model_validate(config), plugins=False)
    found: Found = {}
    held = read_results(work / "scores").rows
    # Clips that VBench leaves out of the mean: their object was in no frame that it looks at.
    empty = {(row["sample"], row["evaluator"]) for row in held if row["subscore"] == "frames" and row["score"] == 0}
    for row in held:
        if (row["sample"], row["evaluator"]) in empty:
            continue
        if row["status"] == "ok":
            series, truth = truths[row["sample"]]
            x, y = found.setdefault((series, _label(row["evaluator"]), row["subscore"]), ([], []))
            x.append(truth)
            y.append(row["score"])
        elif row["status"] == "error":
            print(row["sample"], row["evaluator"], row["reason"])
    return found


def _trained(spec: dict[str, Any]) -> bool:
    """Whether the files that an evaluator names are there."""
    return all(Path(value).exists() for key, value in spec["params"].items() if "checkpoint" in key)


def _label(label: str) -> str:
    name = label.partition("[")[0]
    return f"{name}[rules=strict]" if "rules=strict" in label else name


def rank_correlation(truth: list[float], scores: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rho and the ends of its 95 % percentile bootstrap interval over clips; NaN where nothing varies."""
    x, y, rng = np.array(truth), np.array(scores), np.random.default_rng(seed)
    if len(set(truth)) < 2 or len(set(scores)) < 2:
        return float("nan"), float("nan"), float("nan")
    values = []
    for _ in range(RESAMPLES):
        chosen = rng.integers(len(x), size=len(x))
        if len(set(x[chosen])) > 1 and len(set(y[chosen])) > 1:
            values.append(spearman(x[chosen], y[chosen]).value)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(spearman(x, y).value), float(low), float(high)


# ------------------------------------------------------------------------------------------------ the ledger


def train(weights: Path, names: Sequence[str], seed: int) -> None:
    """Train those of the networks that the folder lacks."""
    weights.mkdir(parents=True, exist_ok=True)
    for name in names:
        done = weights / f"{name}.json"
        if not done.exists():
            began = time.perf_counter()
            loss = TRAINED[name](weights, seed)
            done.write_text(json.dumps({"loss": loss, "seconds": time.perf_counter() - began}))


def measure(work: Path, names: Sequence[str], off_target: bool, count: int, seed: int) -> None:
    """Score series after series with the networks that are there; each goes into the ledger as it is done."""
    weights = work / f"weights-{seed}"
    if not (weights / "sa_0_4_vit_l_14_linear.pth").exists():
        fit_head(weights, seed)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    for name in names:
        began = time.perf_counter()
        found = score(work / f"seed-{seed}-{count}", weights, name, off_target, count, seed)
        seconds = time.perf_counter() - began
        with LEDGER.open("a", encoding="utf-8") as ledger:
            for (series, label, subscore), (truth, scores) in sorted(found.items()):
                rho, low, high = rank_correlation(truth, scores)
                entry = {"seed": seed, "series": series, "label": label, "subscore": subscore, "n": len(truth)}
                ends = {"rho": rho, "low": low, "high": high} if rho == rho else dict.fromkeys(("rho", "low", "high"))
                line = {**entry, **ends, "seconds": round(seconds, 1), "commit": commit.stdout.strip()}
                ledger.write(json.dumps(line) + "\n")


def table() -> str:
    """On target with the sign that it should have; then each dimension that reads pixels alone against each fault."""
    held = [json.loads(line) for line in LEDGER.read_text(encoding="utf-8").splitlines()]
    by = {(each["series"], each["label"], each["subscore"]): each for each in held}
    lines = ["| dimension | truth | should | n | Spearman's rho | as it should |", "|---|---|---|---|---|---|"]
    for label, subscore, series, sign in ON_TARGET:
        each = by.get((series, label, subscore))
        if each is None:
            continue
        name = label if subscore == "score" else f"{label}, {subscore}"
        should = "rise" if sign > 0 else "fall"
        if each["rho"] is None:
            lines.append(f"| {name} | {series} | {should} | {each['n']} | every clip scores the same | does not |")
            continue
        good = min(sign * each["low"], sign * each["high"]) > 0
        lines.append(
            f"| {name} | {series} | {should} | {each['n']} | {each['rho']:.2f} "
            f"[{each['low']:.2f}, {each['high']:.2f}] | {'yes' if good else 'does not'} |"
        )
    lines += ["", f"| dimension | {' | '.join(FAULTS)} |", "|---" * (len(FAULTS) + 1) + "|"]
    for label in SEEN:
        subscore = "motion" if label == "dynamic_degree" else "score"
        cells = (by.get((series, label, subscore)) for series in FAULTS)
        shown = ("-" if cell is None or cell["rho"] is None else f"{cell['rho']:.2f}" for cell in cells)
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/vbench_shapes"), help="networks, clips and scores")
    parser.add_argument("--count", type=int, default=48, help="clips of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the tables of the ledger and end")
    parser.add_argument("--train", nargs="+", choices=tuple(TRAINED), help="train these alone (once per core) and end")
    parser.add_argument("--series", nargs="+", choices=tuple(SERIES), default=tuple(SERIES), help="score these alone")
    parser.add_argument("--on-target", action="store_true", help="leave out dimensions that a fault should not move")
    parser.add_argument("--no-training", action="store_true", help="leave out dimensions whose network is missing")
    chosen = parser.parse_args()
    chosen.work = chosen.work.resolve()  # a table's relative paths start at its own folder
    if not chosen.table and not chosen.no_training:
        train(chosen.work / f"weights-{chosen.seed}", chosen.train or tuple(TRAINED), chosen.seed)
    if chosen.train:
        return
    if not chosen.table:
        measure(chosen.work, chosen.series, not chosen.on_target, chosen.count, chosen.seed)
    print(table())


if __name__ == "__main__":
    main()
