"""The guided sampler is the pipelines' own, its Gaussian steps keep marginals, and its costs are counted exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign import noise, sample
from mmalign.guidance.denoising import Denoising, begin, candidate_seed, timesteps
from mmalign.jobs import SampleConfig
from mmalign.models.adapter import Adapter
from mmalign.testing import tiny, tiny_transformers

CPU = torch.device("cpu")
MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.tiny_sd,
    "sd-v": partial(tiny.tiny_sd, prediction_type="v_prediction"),
    "sdxl": tiny.tiny_sdxl,
    "sd3": tiny_transformers.tiny_sd3,
    "flux-dev": tiny_transformers.tiny_flux,
    "flux-schnell": partial(tiny_transformers.tiny_flux, dev=False),
    "pixart": tiny_transformers.tiny_pixart,
    "sana": tiny_transformers.tiny_sana,
    "qwen_image": tiny_transformers.tiny_qwen_image,
}
PROMPTS = ["a red circle", "a photo of a large green square", "a small blue triangle"]


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("families")
    (home / "prompts.txt").write_text("\n".join(PROMPTS))
    return {name: make(home / name) for name, make in MAKERS.items()}


def _settings(folder: Path, **changes: Any) -> SampleConfig:
    tree = {
        "model": {"path": folder}, "prompts": folder.parent / "prompts.txt", "output": folder.parent / "out",
        "device": "cpu", "height": 32, "width": 64, "steps": 4, **changes,
    }  # fmt: skip
    return SampleConfig.model_validate(tree)


def _begin(adapter: Adapter, config: SampleConfig, prompts: list[str] = PROMPTS, first: int = 5) -> Denoising:
    return begin(adapter, prompts, list(range(first, first + len(prompts))), config)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(("scale", "negative"), [(1.0, ""), (3.0, ""), (3.0, "blue square")])
def test_plain_sampling_is_the_pipelines_own_call(
    name: str, scale: float, negative: str, folders: dict[str, Path]
) -> None:
    """Initial noise, timesteps, guidance, steps and decoding at once: the pictures of `mmalign sample`."""
    flow = name in ("sd3", "flux-dev", "flux-schnell", "sana", "qwen_image")
    config = _settings(
        folders[name], guidance_scale=scale, negative_prompt=negative, scheduler="euler" if flow else "ddim"
    )
    adapter = sample.load(config, CPU)
    if name == "pixart":  # its scheduler's spacing is linspace, along which diffusers' DDIM does not step
        adapter.pipe.scheduler = diffusers.DDIMScheduler.from_config(
            adapter.pipe.scheduler.config, timestep_spacing="leading"
        )
    generators = [torch.Generator().manual_seed(5 + k) for k in range(3)]
    with torch.no_grad():
        theirs = adapter.pipeline()(
            PROMPTS, num_inference_steps=4, height=32, width=64, output_type="pt", generator=generators,
            **adapter.call_arguments(scale, [negative] * 3 if negative else None, 3),
        ).images  # fmt: skip
    denoising = _begin(adapter, config)
    ours = denoising.pixels(denoising.plain(denoising.initial()))
    torch.testing.assert_close(ours.detach(), torch.as_tensor(theirs), rtol=0, atol=2e-5)
    branches = 1 if denoising.negative is None else 2
    assert [each.network_calls for each in denoising.spent] == [4 * branches] * 3
