"""VBench's dimensions against the truth of the shapes world: rank correlations with intervals.

    OMP_NUM_THREADS=1 python bench/vbench_shapes.py            # trains what is missing, scores, writes the ledger
    python bench/vbench_shapes.py --table                      # the tables of docs/benchmarks.md

Clips of the shapes world have one fault each, to a known amount (`mmalign.shapes.damage`), or move as fast as is known,
or show what another caption says. They are scored by the evaluators through `mmalign score`, with small networks of the
real classes that were trained on other clips (`vbench_shapes_models.py`), since no published weights are at hand; what
is judged by rules on detections gets those of the world's own reader. So this tells whether a dimension measures what
its name says where the truth is exact, not how well the published networks do.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vbench_shapes_models import ACTIONS, FRAME, TRAINED, action_of

from mmalign.jobs import ScoreConfig
from mmalign.media import write_video
from mmalign.protocols.correlations import spearman
from mmalign.results import read_results
from mmalign.score import run
from mmalign.shapes.axes import axes
from mmalign.shapes.captions import BACKGROUNDS, KINDS
from mmalign.shapes.clip_data import drawn_clips
from mmalign.shapes.clip_reader import read_clip
from mmalign.shapes.damage import Film, damage, film
from mmalign.shapes.reader import Reading, read
from mmalign.shapes.scene import SIDE
from mmalign.tables import MediaRow, write_media_table

LEDGER = Path(__file__).with_name("vbench_shapes.jsonl")
SHAPES_CLIP = Path(__file__).resolve().parents[1] / "assets" / "shapes-clip"
CLIP_FILE = SHAPES_CLIP / "HPS_v2.1_compressed.safetensors"
FPS = 8.0
KIND_WORDS = dict(zip(KINDS, ("sports ball", "tv", "kite", "scissors"), strict=True))  # COCO's, so that rules know them
RESAMPLES = 1000
Found = dict[tuple[str, str, str], tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Clip:
    """One clip: its pixels uint8 [T, H, W, 3], the truth that was made, its prompt, and what a suite would tell."""

    series: str
    pixels: np.ndarray
    truth: float
    prompt: str
    aux: dict[str, Any]


# ------------------------------------------------------------------------------------------------ clips with a truth


def _amounts(count: int, rng: np.random.Generator) -> np.ndarray:
    """From 0 to 1, evenly, in any order."""
    return rng.permutation(np.linspace(0, 1, count))


def faults(kind: str) -> Callable[[int, int], Iterator[Clip]]:
    """Clips with one fault of `mmalign.shapes.damage`; those of flicker stand still."""

    def make(count: int, seed: int) -> Iterator[Clip]:
        rng = np.random.default_rng(seed)
        drawn = (each for each in drawn_clips(8 * count, seed, held_out=True, side=FRAME))
        still = kind == "flicker"
        chosen = [each for each in drawn if all((m.direction is None) == still for m in each.caption.movers)][:count]
        for item, amount in zip(chosen, _amounts(len(chosen), rng), strict=True):
            spoilt = damage(film(item.scene, side=FRAME), kind, float(amount), rng)
            yield Clip(kind, spoilt.draw(), float(amount), str(item.caption), {})

    return make


def backgrounds(count: int, seed: int) -> Iterator[Clip]:
    """The ground turns from one grey to another for the last 0 to 4 frames; the truth is their share."""
    rng = np.random.default_rng(seed)
    for number, item in enumerate(drawn_clips(count, seed, held_out=True, side=FRAME)):
        scenes, turned = film(item.scene, side=FRAME).scenes, number % 5
        other = str(rng.choice([name for name in BACKGROUNDS if name != scenes[0].background]))
        changed = [replace(each, background=other) for each in scenes[len(scenes) - turned :]]
        spoilt = Film((*scenes[: len(scenes) - turned], *changed), FRAME)
        yield Clip("background", spoilt.draw(), turned / len(scenes), str(item.caption), {})


def speeds(count: int, seed: int) -> Iterator[Clip]:
    """One shape that stands or moves: pixels from frame to frame."""
    for item in drawn_clips(count, seed, held_out=True, counts=(1.0, 0.0), side=FRAME):
        first, second = item.scene.at(0.0).shapes[0], item.scene.at(1 / FPS).shapes[0]
        step = np.hypot(second.x - first.x, second.y - first.y) * FRAME / SIDE
        yield Clip("speed", item.clip(), float(step), str(item.caption), {})


def captions(count: int, seed: int) -> Iterator[Clip]:
    """A third shows the caption, a third breaks one thing of it, a third shows another caption: text alignment (TA)."""
    rng = np.random.default_rng(seed)
    items = drawn_clips(count, seed, held_out=True, side=FRAME)
    for number, item in enumerate(items):
        shown, said = item, str(item.caption)
        if number % 3 == 1:
            shown = replace(item, wrong=str(rng.choice(["kind", "colour", "direction", "count"])))
        elif number % 3 == 2:
            said = str(items[(number + 1) % len(items)].caption)
        pixels, caption = shown.clip(), items[(number + 1) % len(items)].caption if number % 3 == 2 else item.caption
        small = replace(shown, side=64).clip()
        style = str(rng.choice([f"on a {name} background" for name in BACKGROUNDS]))
        truth = axes(caption, read_clip(small, FPS))["TA"]
        yield Clip("caption", pixels, truth, said, {"appearance_style": style})


def styles(count: int, seed: int) -> Iterator[Clip]:
    """A named background that is there (1) or not (0)."""
    rng = np.random.default_rng(seed)
    for number, item in enumerate(drawn_clips(count, seed, held_out=True, side=FRAME)):
        there = item.scene.background
        named = there if number % 2 else str(rng.choice([name for name in BACKGROUNDS if name != there]))
        item_ = item.caption.movers[0].item
        phrase = f"a {item_.colour} {item_.kind} on a {named} background"
        yield Clip("style", item.clip(), float(named == there), str(item.caption), {"appearance_style": phrase})


def actions(count: int, seed: int) -> Iterator[Clip]:
    """An action that is shown (1) or another one (0)."""
    rng = np.random.default_rng(seed)
    for number, item in enumerate(drawn_clips(count, seed, held_out=True, counts=(1.0, 0.0), side=FRAME)):
        shown = action_of(item)
        named = shown if number % 2 else str(rng.choice([each for each in ACTIONS if each != shown]))
        yield Clip("action", item.clip(), float(named == shown), f"A person is {named}", {})


def objects(count: int, seed: int) -> Iterator[Clip]:
    """Two shapes and what is asked of them, right or wrong: kinds, colour, relation. The truth is of the pixels."""
    rng = np.random.default_rng(seed)
    drawn = drawn_clips(4 * count, seed, held_out=True, counts=(0.0, 1.0), side=FRAME)
    chosen = [each for each in drawn if len({m.item.kind for m in each.caption.movers}) == 2][:count]
    for number, item in enumerate(chosen):
        pixels, (a, b) = item.clip(), item.caption.movers
        kinds = [KIND_WORDS[a.item.kind], KIND_WORDS[b.item.kind]]
        absent = [KIND_WORDS[kind] for kind in KINDS if KIND_WORDS[kind] not in kinds]
        one = kinds[0] if number % 2 else absent[0]
        yield Clip("object", pixels, float(number % 2), "", {"object": one})
        yield Clip("objects", pixels, float(number % 2), "", {"object": f"{kinds[1]} and {one}"})
        colour = (
            a.item.colour
            if number % 2
            else str(rng.choice([c for c in ("red", "green", "blue") if c != a.item.colour]))
        )
        yield Clip("colour", pixels, float(number % 2), f"a {colour} {kinds[0]}", {"color": colour})
        scenes = film(item.scene, side=FRAME).scenes
        left = np.array([s.shapes[0].x < s.shapes[1].x and _across(s.shapes) for s in scenes])
        right = np.array([s.shapes[0].x > s.shapes[1].x and _across(s.shapes) for s in scenes])
        aux = {"object_a": kinds[0], "object_b": kinds[1]}
        asked, truth = (("left", left), ("right", right))[number % 2]
        yield Clip("relation", pixels, float(truth.mean()), "", {**aux, "relationship": f"on the {asked} of"})
        named = item.scene.background if number % 2 else str(
            rng.choice([name for name in BACKGROUNDS if name != item.scene.background])
        )  # fmt: skip
        yield Clip("scene", pixels, float(number % 2), "", {"scene": f"{named} background"})


def _across(shapes: Any) -> bool:
    return abs(shapes[0].x - shapes[1].x) > abs(shapes[0].y - shapes[1].y)


SERIES: dict[str, Callable[[int, int], Iterator[Clip]]] = {
    **{kind: faults(kind) for kind in ("flicker", "swap", "vanish", "jitter", "repeat", "lurch", "noise", "blur")},
    "background": backgrounds,
    "speed": speeds,
    "caption": captions,
    "style": styles,
    "action": actions,
    "objects": objects,
}
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
    ("human_action", "score", "action", 1),
    ("human_action", "probability", "action", 1),
    ("object_class", "score", "object", 1),
    ("multiple_objects", "score", "objects", 1),
    ("color", "score", "colour", 1),
    ("spatial_relationship", "score", "relation", 1),
    ("spatial_relationship[rules=strict]", "score", "relation", 1),
    ("scene", "score", "scene", 1),
)
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
        "overall_consistency": {"checkpoint": weights / "ViClip-InternVid-10M-FLT.pth"},
        "human_action": {
            "checkpoint": weights / "l16_ptk710_ftk710_ftk400_f16_res224.pth", "labels": weights / "actions.txt",
        },
        **dict.fromkeys(("object_class", "multiple_objects", "color", "scene", "spatial_relationship"), seen),
    }  # fmt: skip
    found = [{"name": name, "params": {k: str(v) for k, v in values.items()}} for name, values in params.items()]
    return [
        *found,
        {"name": "spatial_relationship", "params": {**{k: str(v) for k, v in seen.items()}, "rules": "strict"}},
    ]


def wanted_by(series: str) -> tuple[str, ...]:
    """The dimensions that clips of a series are scored on."""
    named = {label.partition("[")[0].partition("@")[0] for label, _, of, _ in ON_TARGET if of == series}
    return tuple(sorted(named | ({each.partition("@")[0] for each in SEEN} if series in FAULTS else set())))


def score(
    work: Path, weights: Path, count: int, seed: int
) -> dict[tuple[str, str, str], tuple[list[float], list[float]]]:
    """(series, label, sub-score) -> truths and scores of its clips."""
    rows, truths, lines = [], {}, []
    (work / "clips").mkdir(parents=True, exist_ok=True)
    for number, make in enumerate(SERIES.values()):
        for place, clip in enumerate(make(count, seed + 100 + number)):
            sample = f"{clip.series}-{place}"
            file = work / "clips" / f"{sample}.mp4"
            if not file.exists():
                write_video(file, torch.from_numpy(clip.pixels).permute(0, 3, 1, 2), FPS, lossless=True)
            rows.append(
                MediaRow(sample, clip.prompt, str(file), "video", dimensions=wanted_by(clip.series), aux=clip.aux)
            )
            truths[sample] = clip.series, clip.truth
            if clip.series in ("object", "objects", "colour", "relation", "scene"):
                lines.append(json.dumps(detections_line(sample, clip.pixels)))
    (work / "detections.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_media_table(work / "table.jsonl", rows)
    config = {
        "table": work / "table.jsonl",
        "output": work / "scores",
        "evaluators": specs(weights, work / "detections.jsonl"),
    }
    run(ScoreConfig.model_validate(config), plugins=False)
    found: Found = {}
    for row in read_results(work / "scores").rows:
        if row["status"] == "ok":
            series, truth = truths[row["sample"]]
            x, y = found.setdefault((series, _label(row["evaluator"]), row["subscore"]), ([], []))
            x.append(truth)
            y.append(row["score"])
        elif row["status"] == "error":
            print(row["sample"], row["evaluator"], row["reason"])
    return found


def _label(label: str) -> str:
    return "spatial_relationship[rules=strict]" if "rules=strict" in label else label.partition("[")[0]


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


def measure(work: Path, count: int, seed: int) -> None:
    """Train what is missing, score, append to the ledger."""
    weights = work / f"weights-{seed}"
    train(weights, tuple(TRAINED), seed)
    fit_head(weights, seed)
    found = score(work / f"seed-{seed}", weights, count, seed)
    with LEDGER.open("a", encoding="utf-8") as ledger:
        for (series, label, subscore), (truth, scores) in sorted(found.items()):
            rho, low, high = rank_correlation(truth, scores)
            entry = {"seed": seed, "series": series, "label": label, "subscore": subscore, "n": len(truth)}
            ledger.write(json.dumps({**entry, "rho": rho, "low": low, "high": high}) + "\n")


def table() -> str:
    """On target with the sign that it should have; then each dimension that reads pixels alone against each fault."""
    held = [json.loads(line) for line in LEDGER.read_text(encoding="utf-8").splitlines()]
    by = {(each["series"], each["label"], each["subscore"]): each for each in held}
    lines = ["| dimension | truth | should | n | Spearman's rho | as it should |", "|---|---|---|---|---|---|"]
    for label, subscore, series, sign in ON_TARGET:
        each = by.get((series, label, subscore))
        if each is None:
            continue
        good = sign * each["rho"] > 0 and sign * (each["low"] if sign > 0 else each["high"]) > 0
        name = label if subscore == "score" else f"{label}, {subscore}"
        lines.append(
            f"| {name} | {series} | {'rise' if sign > 0 else 'fall'} | {each['n']} | {each['rho']:.2f} "
            f"[{each['low']:.2f}, {each['high']:.2f}] | {'yes' if good else 'no'} |"
        )
    lines += ["", f"| dimension | {' | '.join(FAULTS)} |", "|---" * (len(FAULTS) + 1) + "|"]
    for label in SEEN:
        subscore = "motion" if label == "dynamic_degree" else "score"
        cells = (by.get((series, label, subscore)) for series in FAULTS)
        shown = ("-" if cell is None or cell["rho"] != cell["rho"] else f"{cell['rho']:.2f}" for cell in cells)
        lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/vbench_shapes"), help="networks, clips and scores")
    parser.add_argument("--count", type=int, default=48, help="clips of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the tables of the ledger and end")
    parser.add_argument("--train", nargs="+", choices=tuple(TRAINED), help="train these alone (once per core) and end")
    chosen = parser.parse_args()
    if chosen.train:
        train(chosen.work.resolve() / f"weights-{chosen.seed}", chosen.train, chosen.seed)
        return
    if not chosen.table:
        measure(chosen.work.resolve(), chosen.count, chosen.seed)
    print(table())


if __name__ == "__main__":
    main()
