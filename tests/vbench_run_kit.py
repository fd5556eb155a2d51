"""Clips of three prompts, the suite that asks for them, and configs of runs on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.jobs_vbench import VBench
from mmalign.media import write_video

PROMPTS = ["a bus, in a still frame", "a 24/7 shop", "a red bird"]


def vbench_home(home: Path) -> Path:
    """Three clips of each prompt, of different lengths and sizes, and the suite that asks for them."""
    rng = np.random.default_rng(0)
    (home / "clips").mkdir()
    for place, prompt in enumerate(PROMPTS):
        for number in range(3):
            shape = (3 + 4 * number, 3, 32 + 16 * place, 48)
            pixels = rng.integers(0, 40 + 60 * place, shape, dtype=np.uint8)
            name = f"{prompt.replace('/', '_')}-{number}.mp4"
            write_video(home / "clips" / name, torch.from_numpy(pixels), fps=8)
    rows = [{"prompt_en": prompt, "dimension": ["temporal_flickering"]} for prompt in PROMPTS]
    rows.append({"prompt_en": "a person is riding a bike", "dimension": ["human_action"]})
    (home / "suite.json").write_text(json.dumps(rows))
    return home


def config(
    media: Path, output: Path, *evaluators: Any, block: dict[str, Any] | None = None, **more: Any
) -> ScoreConfig:
    given = [each if isinstance(each, tuple) else (each, {}) for each in evaluators or ("temporal_flickering",)]
    chosen = tuple(EvaluatorSpec(name=name, params=params) for name, params in given)
    settings = {"batch_size": 32, "decode_workers": 1, **more}
    return ScoreConfig(
        media=media, output=output, evaluators=chosen, device="cpu", vbench=VBench(**(block or {})), **settings
    )


def standard(home: Path, **more: Any) -> dict[str, Any]:
    return {"suite": home / "suite.json", "samples": 3, **more}
