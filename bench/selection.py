"""What choosing by comparison and choosing sets are worth on shapes-sd, as tables with intervals.

    python bench/selection.py prompts --pictures 24 --seeds 20
    python bench/selection.py diversity runs/shapes-diversity runs/shapes-diversity-plain

`prompts` draws some pictures of every candidate of configs/prompts/shapes.yaml once (utilities are kept), takes their
mean utility as a prompt's true value, and plays the comparisons many times, a side's pictures drawn anew from those.
`diversity` compares two folders of `mmalign sample`: the set of each caption against the best pictures of another run
of the same budget, by attributes that are read from the pixels.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch

from mmalign import optimise_prompt, sample
from mmalign.commands.configs import load_job
from mmalign.guidance import prompts as bandits
from mmalign.media import read_image
from mmalign.media_table import read_media_table
from mmalign.runs import pick_device
from mmalign.shapes.annotators import ANNOTATORS, features
from mmalign.shapes.captions import parse_caption
from mmalign.shapes.reader import read
from mmalign.shapes.scene import SIDE
from mmalign.stats import mean_ci


def utilities(pictures: int, folder: Path) -> tuple[list[str], np.ndarray]:
    """The candidates, and the utility of `pictures` pictures of each for the wish: [K, pictures]."""
    config = load_job(Path("configs/prompts/shapes.yaml"), [f"output={folder}"])
    candidates = optimise_prompt.listed(config)
    place = folder / f"utilities-{pictures}.json"
    if not place.is_file():
        settings = optimise_prompt._sampling(config)
        adapter = sample.load(settings, pick_device("auto"))
        wanted = [
            sample.Request(c.prompt, 10_000 + k, f"{i:05d}") for i, c in enumerate(candidates) for k in range(pictures)
        ]
        wish, annotator, found = parse_caption(config.wish), ANNOTATORS["bold"], []
        for _, images in sample.generate(adapter, wanted, settings):
            found += [annotator.weigh(features(wish, image)) for image in images]
            print(len(found), "of", len(wanted), flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(found))
    values = np.array(json.loads(place.read_text())).reshape(len(candidates), pictures)
    return [c.prompt for c in candidates], values


def play(
    values: np.ndarray, embeddings: torch.Tensor, seed: int, comparisons: int, choose: str, hidden: tuple[int, ...]
) -> list[float]:
    """True values: of the prompt named best after each number of CHECKED comparisons; the mean of those compared."""
    rng, pairs, shares, told = np.random.default_rng(seed), [], [], []
    settings = {"hidden": hidden, "ridge": 0.1, "seed": seed}
    for number in range(comparisons):
        if choose == "random" or number < 6:
            pair = bandits.random_pair(len(values), seed, number)
        else:
            belief = bandits.believe(embeddings, pairs, shares, **settings)
            pair = bandits.next_pair(belief, pairs, [], ridge=0.1, nu=0.3)
        scores = [values[k][rng.integers(values.shape[1], size=4)].mean() for k in pair]
        shares.append(optimise_prompt.answer(scores[0], scores[1], 0.06, (seed, number)))
        pairs.append(pair)
        if number + 1 in CHECKED:
            best = bandits.believe(embeddings, pairs, shares, **settings).best(pairs)
            told.append(float(values[best].mean()))
    return [*told, float(np.mean([values[k].mean() for pair in pairs for k in pair]))]


CHECKED = (10, 20, 40)


def prompts(arguments: argparse.Namespace) -> None:
    names, values = utilities(arguments.pictures, arguments.folder)
    means = values.mean(1)
    order = np.argsort(-means)
    print(f"{len(names)} prompts, {values.shape[1]} pictures each; mean utility {means.mean():.3f}")
    for k in [*order[:3], *order[-3:]]:
        low, high = mean_ci(values[k])[1:]
        print(f"  {means[k]:.3f} ({low:.3f} to {high:.3f})  {names[k]}")
    config = load_job(Path("configs/prompts/shapes.yaml"))
    embeddings = bandits.standardised(bandits.choice_features(optimise_prompt.listed(config)))
    for hidden in ((), (32, 32)):
        found = {
            how: np.array(
                [play(values, embeddings, seed, max(CHECKED), how, hidden) for seed in range(arguments.seeds)]
            )
            for how in ("bandit", "random")
        }
        for n, count in enumerate([*(f"best after {count}" for count in CHECKED), "mean of those compared"]):
            ours, theirs = (mean_ci(found[how][:, n].tolist()) for how in ("bandit", "random"))
            gap = mean_ci((found["bandit"][:, n] - found["random"][:, n]).tolist())
            print(
                f"hidden {hidden}, {count}: bandit {ours.mean:.3f} ({ours.low:.3f} to {ours.high:.3f}), random "
                f"{theirs.mean:.3f} ({theirs.low:.3f} to {theirs.high:.3f}), difference {gap.mean:+.3f} "
                f"({gap.low:+.3f} to {gap.high:+.3f}); the best is {means.max():.3f}"
            )


def attributes(path: str | Path) -> np.ndarray | None:
    """x, y and radius of the first proper shape, as shares of the side."""
    shapes = [shape for shape in read(read_image(path)).shapes if shape.proper]
    return np.array([shapes[0].x, shapes[0].y, shapes[0].radius]) / SIDE if shapes else None


def spread(places: list[np.ndarray | None]) -> tuple[float, float]:
    """Mean pairwise distance of places, and how many of 4 x 4 cells of the picture they reach."""
    known = [place for place in places if place is not None]
    apart = [float(np.linalg.norm(a - b)) for a, b in itertools.combinations(known, 2)]
    return float(np.mean(apart)) if apart else 0.0, float(len({tuple((p[:2] * 4).astype(int)) for p in known}))


def diversity(arguments: argparse.Namespace) -> None:
    """The set of each caption against the best of another run: `ours` kept, `theirs` all candidates with rewards."""
    groups: dict[str, dict[str, list]] = {"ours": {}, "theirs": {}}
    for name, folder in (("ours", arguments.ours), ("theirs", arguments.theirs)):
        for row in read_media_table(folder / "table.jsonl"):
            reward = json.loads((folder / "guidance" / f"{row.sample}.json").read_text())["reward"]
            groups[name].setdefault(row.prompt, []).append((reward, row.media))
    gaps: dict[str, list[float]] = {"distance": [], "cells": [], "reward": []}
    both: dict[str, list[tuple[float, float]]] = {name: [] for name in gaps}
    for prompt, mine in groups["ours"].items():
        best = sorted(groups["theirs"][prompt], key=lambda each: -each[0])[: len(mine)]
        figures = []
        for kept in (mine, best):
            figures.append((*spread([attributes(path) for _, path in kept]), float(np.mean([r for r, _ in kept]))))
        for name, a, b in zip(gaps, *figures, strict=True):
            gaps[name].append(a - b)
            both[name].append((a, b))
    for name, values in gaps.items():
        a, b = np.mean(both[name], axis=0)
        gap = mean_ci(values)
        print(f"{name}: set {a:.3f}, best of n {b:.3f}, difference {gap.mean:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(required=True)
    first = verbs.add_parser("prompts")
    first.add_argument("--pictures", type=int, default=24)
    first.add_argument("--seeds", type=int, default=20)
    first.add_argument("--folder", type=Path, default=Path("runs/shapes-prompts-values"))
    first.set_defaults(run=prompts)
    second = verbs.add_parser("diversity")
    second.add_argument("ours", type=Path)
    second.add_argument("theirs", type=Path)
    second.set_defaults(run=diversity)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
