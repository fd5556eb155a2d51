"""A set for each prompt that covers learned axes of similarity: the search of `diversity` on a model."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.backbones.clip_scoring import OPENAI_CROP, ClipBackbone, load_clip_backbone
from mmalign.evaluation import Backbones, Uniform
from mmalign.guidance.axes import Axes, fit_axes, judged
from mmalign.guidance.denoising import Bar, Denoising, Outcome, candidate_seed
from mmalign.guidance.diversity import Drawn, Evolved, evolve
from mmalign.guidance.features import clip_files
from mmalign.guidance.rewards import Rewards, fitting, load_scorers
from mmalign.jobs_align import EvaluatorSpec
from mmalign.jobs_guidance import Diversity
from mmalign.media import read_image
from mmalign.paths import find
from mmalign.pixel_scores import PixelScorer
from mmalign.records import missing_columns, read_records
from mmalign.weights import files_hash

COLUMNS = ("anchor", "a", "b", "answer")


def check(settings: Diversity) -> None:
    """ValueError where there is no CLIP, before anything is loaded."""
    clip_files(settings.clip, settings.clip_model, "guidance.clip")


def quality_diversity(denoising: Denoising, rewards: Rewards, settings: Diversity, bar: Bar) -> Outcome:
    """Evolves one prompt's candidates and keeps as many as there are requests; all requests are of one prompt.

    Candidate i of the first population has the noise of `candidate_seed` i of the first request's seed. Costs are
    shared out over the requests; what a judge looks at is not counted as a reward.

    Raises:
        ValueError: no candidate could be scored, or a table of judgements that cannot be read.
    """
    assert len(set(denoising.prompts)) == 1, "a set is of one prompt: `Strategy.sets`"
    keep, seed, prompt = len(denoising.prompts), denoising.seeds[0], denoising.prompts[0]
    files = clip_files(settings.clip, settings.clip_model, "guidance.clip")
    clip = _clip(*files, str(denoising.adapter.device))
    latents: list[Tensor] = []
    first: list[Tensor] = []

    def draw(noise: Tensor) -> Drawn:
        rows = [(len(latents) + k) % keep for k in range(len(noise))]
        clean = denoising.plain(noise.to(denoising.adapter.device), rows)
        quality, features = [], []
        with torch.no_grad():
            for start in range(0, len(clean), denoising.batch_size):
                part = rows[start : start + denoising.batch_size]
                pixels = denoising.pixels(clean[start : start + denoising.batch_size], part)
                quality.append(rewards.scores(pixels, [prompt] * len(part), part))
                features.append(picture_features(clip, pixels, settings.reward_frames))
                if len(latents) < settings.initial:
                    first.append(pixels.cpu())
        latents.extend(clean.cpu())
        values = torch.cat(quality)
        if not len(latents) > len(clean) and not torch.isfinite(values).any():
            raise ValueError(f"guidance diversity: no picture of {prompt!r} could be scored; look at the rewards")
        bar(len(latents) / settings.candidates, values[torch.isfinite(values)].mean().item())
        return Drawn(values.numpy(), torch.cat(features).cpu())

    def learn(drawn: Drawn, noise: Tensor) -> Axes:
        triplets = _judged(settings, drawn, torch.cat(first), prompt, seed, clip)
        return fit_axes(triplets, settings.axes, seed)

    found = evolve(
        draw, learn, lambda i: denoising.draw([candidate_seed(seed, i)])[0].cpu(), initial=settings.initial,
        candidates=settings.candidates, batch=settings.children, cells=[settings.cells] * settings.axes,
        strength=settings.strength, seed=f"{seed} {prompt}",
    )  # fmt: skip
    chosen = found.kept(keep)
    told = _set_record(found, settings)
    records = [_record(found, place) | {"set": told} for place in chosen]
    return Outcome(torch.stack([latents[place] for place in chosen]).to(denoising.adapter.device), records)


def picture_features(clip: ClipBackbone, pixels: Tensor, frames: int) -> Tensor:
    """Features [n, D] of pictures [n, 3, H, W], or of clips [n, 3, F, H, W] as the mean over frames, in [0, 1]."""
    if pixels.ndim == 4:
        return clip.images(pixels, OPENAI_CROP)
    picks = Uniform(frames).indices(pixels.shape[2], 1.0)
    stills = pixels[:, :, picks].transpose(1, 2).flatten(0, 1)
    return clip.images(stills, OPENAI_CROP).unflatten(0, (len(pixels), -1)).mean(1)


@functools.lru_cache(maxsize=1)
def _clip(config: str, checkpoint: Path, device: str) -> ClipBackbone:
    return load_clip_backbone(config=config, checkpoint=checkpoint, device=torch.device(device), dtype=torch.float32)


@functools.lru_cache(maxsize=1)
def _judge(name: str, params: str, modality: str, device: str, frames: int) -> PixelScorer:
    job = fitting([EvaluatorSpec(name=name, params=json.loads(params))], "guidance.judge")
    return load_scorers(job, modality, torch.device(device), dtype="float32", backbones=Backbones(), frames=frames)[0]


def _judged(settings: Diversity, drawn: Drawn, pixels: Tensor, prompt: str, seed: int, clip: ClipBackbone) -> Tensor:
    """Features [n, 3, D] of the judged triplets: of the first population by the evaluator, or what people said."""
    if settings.judgements is not None:
        path = find(settings.judgements)
        return _told(path, files_hash([path]), clip)
    assert settings.judge is not None
    params = json.dumps(settings.judge.model_dump(mode="json")["params"], sort_keys=True)
    modality = "image" if pixels.ndim == 4 else "video"
    scorer = _judge(settings.judge.name, params, modality, str(clip.device), settings.reward_frames)
    named = scorer.named(pixels, [prompt] * len(pixels))
    unknown = sorted(set(settings.judge_scores) - set(named))
    if unknown:
        raise ValueError(f"guidance.judge_scores: {scorer.label} gives {', '.join(named)}, not {', '.join(unknown)}")
    values = torch.stack([named[name] for name in settings.judge_scores or tuple(named)], dim=1).numpy()
    scored = np.flatnonzero(np.isfinite(values).all(axis=1))
    return drawn.features[scored[judged(values[scored], settings.triplets, f"{seed} {prompt}")]]


@functools.lru_cache(maxsize=1)
def _told(path: Path, content: str, clip: ClipBackbone) -> Tensor:
    """Features of the triplets of a table of judgements of this content: anchor, nearer, farther."""
    records = read_records(path)
    absent = [name for name in COLUMNS if name not in records.columns]
    if absent:
        raise ValueError(missing_columns(path, absent, records.columns, "a table of judgements of similarity"))
    features: dict[str, Tensor] = {}
    triplets = []
    for record in records:
        answer = str(record.values["answer"] or "").strip().upper()
        if answer not in ("A", "B"):
            raise ValueError(f"{record.origin}: the answer is {answer!r}; it is A or B, the one more like the anchor")
        order = ("anchor", "a", "b") if answer == "A" else ("anchor", "b", "a")
        for name in order:
            file = str(record.path(record.values[name]).file)
            if file not in features:
                picture = torch.from_numpy(read_image(file)).permute(2, 0, 1)[None]
                with torch.no_grad():
                    features[file] = clip.images(picture, OPENAI_CROP)[0].cpu()
        triplets.append(torch.stack([features[str(record.path(record.values[name]).file)] for name in order]))
    return torch.stack(triplets)


def _record(found: Evolved, place: int) -> dict[str, Any]:
    return {
        "candidate": place,
        "parent": found.parents[place],
        "reward": float(found.quality[place]),
        "place": found.measures[place].tolist(),
        "cell": int(found.grid.cells(found.measures[place])[0]),
    }


def _set_record(found: Evolved, settings: Diversity) -> dict[str, Any]:
    first = found.coverage[0]
    return {
        "candidates": len(found.quality),
        "coverage": found.archive.coverage,
        "coverage_initial": first,
        "qd_score": found.archive.qd_score(settings.floor),
        "best_reward": float(found.quality.max()),
        "axes_accuracy": found.axes.accuracy,
    }
