"""Figures of the shapes models that assets/README.md reports: `python bench/shapes_models.py`.

shapes-sd, shapes-flow: share of pictures for held-out captions with exactly the asked shapes and colours, by reader.
shapes-video: share of clips that keep everything their held-out captions ask, by reader, and the mean of each axis.
shapes-clip: share of held-out pairs that the scorer orders as the annotator's noise-free utility does.
shapes-vlm: hallucinated mentions, recall and the rest of `shapes_claims`, and yes/no accuracies, on scenes of its own.
The autoencoders: the same shares on reconstructions of perfect drawings, which bound what the generators can reach.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign import sample
from mmalign.backbones.clip import load_clip
from mmalign.backbones.clip_scoring import resize_pad
from mmalign.config import load
from mmalign.jobs import SampleConfig
from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.paths import find
from mmalign.quickstart_answers import ask, judge
from mmalign.shapes import benchmark
from mmalign.shapes.axes import AXES, axes, everything, kept
from mmalign.shapes.captions import captions
from mmalign.shapes.clip import FPS
from mmalign.shapes.clip_data import drawn_clips
from mmalign.shapes.clip_reader import read_clip
from mmalign.shapes.data import drawings, judged_groups
from mmalign.shapes.motion import MotionCaption, motions
from mmalign.shapes.reader import fidelity, read
from mmalign.stats import mean_ci

FLOW = ["scheduler=own", "guidance_scale=3", "model.max_sequence_length=1"]


def share(hits: list[float], prompts: list[str] | None = None) -> dict[str, float]:
    """A mean with its 95 % interval, clustered by prompt."""
    found = mean_ci(np.asarray(hits, float), prompts)
    return {"mean": found.mean, "low": found.low, "high": found.high, "n": len(hits)}


def drawn(path: str, wanted: Sequence[Any], seed: int, overrides: list[str]) -> tuple[list[np.ndarray], str]:
    """What a sampling config draws for captions, and how it was sampled."""
    config = load(SampleConfig, find(path), overrides)
    adapter = sample.load(config, torch.device("cpu"))
    made = [sample.Request(str(caption), seed * 10_000 + i, str(i)) for i, caption in enumerate(wanted)]
    found = [each for _, part in sample.generate(adapter, made, config) for each in part]
    return found, f"{config.scheduler}, {config.steps} steps, guidance_scale {config.guidance_scale}"


def generator(folder: Path, count: int, seed: int, overrides: list[str]) -> dict[str, Any]:
    """Fidelity of pictures for held-out captions, in all and by number of shapes, sampled as the quickstart does."""
    wanted = captions(count, seed, held_out=True)
    images, sampling = drawn("configs/shapes/sample.yaml", wanted, seed, [f"model.path={folder}", *overrides])
    readings = [read(image) for image in images]
    judged = [fidelity(caption, reading) for caption, reading in zip(wanted, readings, strict=True)]
    texts = [str(caption) for caption in wanted]
    by_count = {
        len_: share([float(f.shape_colour) for f, c in zip(judged, wanted, strict=True) if len(c.items) == len_])
        for len_ in sorted({len(c.items) for c in wanted})
    }
    return {
        "sampling": sampling,
        "shape_colour": share([float(f.shape_colour) for f in judged], texts),
        "everything_asked": share([float(f.everything) for f in judged], texts),
        "by_number_of_shapes": by_count,
        "cleanliness": share([reading.cleanliness for reading in readings], texts),
    }


def moving(folder: Path, count: int, seed: int, overrides: list[str]) -> dict[str, Any]:
    """What clips for held-out captions keep of what is asked, in all and by part, and the means of the axes."""
    wanted = motions(count, seed, held_out=True)
    clips, sampling = drawn("configs/shapes/video_sample.yaml", wanted, seed, [f"model.path={folder}", *overrides])
    return {"sampling": sampling, **judged_clips(wanted, clips)}


def judged_clips(wanted: Sequence[MotionCaption], clips: Sequence[np.ndarray]) -> dict[str, Any]:
    texts, readings = [str(caption) for caption in wanted], [read_clip(clip, FPS) for clip in clips]
    parts: dict[str, list[float]] = {}
    for caption, reading in zip(wanted, readings, strict=True):
        for name, part in kept(caption, reading).items():
            parts.setdefault(name.split()[0], []).append(float(part.exact))
    every = [float(everything(c, r)) for c, r in zip(wanted, readings, strict=True)]
    graded = [axes(c, r) for c, r in zip(wanted, readings, strict=True)]
    return {
        "everything": share(every, texts),
        "by_number_of_shapes": {
            len_: share([hit for hit, c in zip(every, wanted, strict=True) if len(c.movers) == len_])
            for len_ in sorted({len(c.movers) for c in wanted})
        },
        **{axis: share([each[axis] for each in graded], texts) for axis in AXES},
        "kept_by_part": {name: share(hits) for name, hits in sorted(parts.items())},
    }


@torch.no_grad()
def clip_autoencoder(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """The same of reconstructions of perfect clips, and their mean squared error in [0, 1]."""
    adapter = base.load(Model(path=folder))
    perfect = drawn_clips(count, seed, held_out=True, side=32)
    clips, errors = [], []
    for item in perfect:
        pixels = torch.from_numpy(item.clip()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        decoded = adapter.decode(adapter.encode_media(pixels)[:, 0]).clamp(-1, 1)
        errors.append(((decoded - pixels) / 2).square().mean().item())
        clips.append(((decoded[0].permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy())
    found = judged_clips([item.caption for item in perfect], clips)
    return {"everything": found["everything"], "psnr_db": -10 * math.log10(float(np.mean(errors)))}


@torch.no_grad()
def autoencoder(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Fidelity of reconstructions of perfect drawings, and their mean squared error in [0, 1]."""
    adapter = base.load(Model(path=folder))
    hits, errors = [], []
    for drawing in drawings(count, seed, held_out=True):
        pixels = torch.from_numpy(drawing.image()).permute(2, 0, 1)[None].float() / 127.5 - 1
        decoded = adapter.decode(adapter.encode_media(pixels)[:, 0]).clamp(-1, 1)
        errors.append(((decoded - pixels) / 2).square().mean().item())
        image = ((decoded[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
        hits.append(float(fidelity(drawing.caption, read(image)).shape_colour))
    return {"shape_colour": share(hits), "psnr_db": -10 * math.log10(float(np.mean(errors)))}


@torch.no_grad()
def scorer(folder: Path, count: int, seed: int, annotator: str) -> dict[str, Any]:
    """Pairwise accuracy on held-out captions against noise-free utility, and against the noisy labels."""
    clip, tokenizer, preprocess = load_clip(folder, next(iter(sorted(folder.glob("*.safetensors")))))
    clip.eval()
    clean, noisy = [], []
    for group in judged_groups(count, seed, annotator, held_out=True):
        images = [drawing.image() for drawing in group.media]
        pixels = torch.stack([torch.from_numpy(i.copy()).permute(2, 0, 1).float() / 255 for i in images])
        image = clip.encode_image(preprocess.normalise(resize_pad(pixels, preprocess.size)), normalize=True)
        scores = image @ clip.encode_text(tokenizer([group.prompts[0]]), normalize=True)[0]
        better = bool(scores[0] > scores[1])
        utilities, share_of_first = group.scores or (), group.wins[0, 1]
        if utilities[0] != utilities[1]:
            clean.append(float(better == (utilities[0] > utilities[1])))
        if share_of_first != 0.5:
            noisy.append(float(better == (share_of_first > 0.5)))
    return {"pairwise_accuracy": share(clean), "pairwise_accuracy_noisy_labels": share(noisy)}


def describer(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Every figure of what a model says of scenes, with its interval over scenes."""
    with tempfile.TemporaryDirectory() as place:
        table = benchmark.write(Path(place) / "questions", count, seed)
        scored = judge(ask(table, Path(place) / "answers", model=folder), Path(place) / "scores")
        told = json.loads((scored / "summary.json").read_text())["evaluators"]
    return {f"{name}/{figure}": each for name in told for figure, each in told[name].get("figures", {}).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd", type=Path, default=find("assets/shapes-sd"))
    parser.add_argument("--flow", type=Path, default=find("assets/shapes-flow"))
    parser.add_argument("--clip", type=Path, default=find("assets/shapes-clip"))
    parser.add_argument("--video", type=Path, default=find("assets/shapes-video"))
    parser.add_argument("--vlm", type=Path, default=find("assets/shapes-vlm"))
    parser.add_argument("--only", choices=("sd", "flow", "vae", "video", "video-vae", "clip", "vlm"))
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--seed", type=int, default=77)
    parser.add_argument("--set", action="append", default=[], help="as in mmalign sample: guidance_scale=3")
    parser.add_argument("--annotator", default="faithful")
    args = parser.parse_args()
    jobs = {
        "sd": lambda: generator(args.sd, args.count, args.seed, args.set),
        "flow": lambda: generator(args.flow, args.count, args.seed, [*FLOW, *args.set]),
        "vae": lambda: autoencoder(args.sd, args.count, args.seed),
        "video": lambda: moving(args.video, args.count, args.seed, args.set),
        "video-vae": lambda: clip_autoencoder(args.video, args.count, args.seed),
        "clip": lambda: scorer(args.clip, args.count, args.seed, args.annotator),
        "vlm": lambda: describer(args.vlm, args.count, args.seed),
    }
    for name, job in jobs.items():
        if args.only in (None, name):
            print(json.dumps({name: job()}, indent=2), flush=True)


if __name__ == "__main__":
    main()
