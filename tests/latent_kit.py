"""What the tests of latent rewards share: tiny pipelines of every family, tables of pictures, configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.config import build
from mmalign.jobs import TrainConfig
from mmalign.jobs_inputs import Model
from mmalign.media import read_image, write_image
from mmalign.models import base
from mmalign.records import MediaRef
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.testing import tiny, tiny_transformers, tiny_video

CPU = torch.device("cpu")
PROMPTS = ("a red circle", "a blue square", "a large green triangle", "a photo of a small circle")
MAKERS = {
    "sd": tiny.tiny_sd,
    "sdxl": tiny.tiny_sdxl,
    "sd3": tiny_transformers.tiny_sd3,
    "flux": tiny_transformers.tiny_flux,
    "pixart": tiny_transformers.tiny_pixart,
    "sana": tiny_transformers.tiny_sana,
    "qwen_image": tiny_transformers.tiny_qwen_image,
    "wan": tiny_video.tiny_wan,
    "cogvideox": tiny_video.tiny_cogvideox,
    "hunyuan_video": tiny_video.tiny_hunyuan_video,
    "ltx": tiny_video.tiny_ltx,
    "animatediff": tiny_video.tiny_animatediff,
}


def maker(factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a family's folder when it is first asked for."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = MAKERS[family](factory.mktemp(family))
        return made[family]

    return make


def loaded(path: Path, **changes: Any) -> Any:
    return base.load(Model(path=path, **changes))


def given(adapter: Any, count: int = 2, side: int = 32) -> tuple[Tensor, Tensor, Any]:
    """Noisy latents, times and condition of a few prompts."""
    generator = torch.Generator().manual_seed(0)
    side = max(side, 2 * adapter.multiple)
    length = {"frames": 9} if adapter.modality == "video" else {}
    latents = torch.randn(count, *adapter.latent_shape(side, side, **length), generator=generator)
    t = torch.linspace(0.2, 0.8, count)
    t = t if adapter.process.alphas_cumprod is None else (t * 1000).long()
    condition = adapter.encode_prompt(list(PROMPTS[:count]))
    sizes = torch.tensor([[side, side, 0, 0, side, side]]).float().expand(count, -1)
    return latents, t, adapter.add_size(condition, sizes)


def table(folder: Path, rows: int = 12, axes: bool = False) -> Path:
    """Dark pictures win; of two axes `dark` says so and `bright` the opposite, with a tie and a gap."""
    rng, written = np.random.default_rng(0), []
    for i in range(rows):
        places = [folder / f"{i}-{side}.png" for side in (0, 1)]
        for place, low in zip(places, (0, 150), strict=True):
            write_image(place, rng.integers(low, low + 100, (32, 32, 3), dtype=np.uint8))
        media = (MediaRef(str(places[0])), MediaRef(str(places[1])))
        label = {"dark": "A", **({} if i == 1 else {"bright": "same" if i == 2 else "B"})} if axes else {"overall": "A"}
        written.append(PreferenceRow(PROMPTS[i % 4], media, label=label))
    write_preferences(folder / "pairs.jsonl", written)
    return folder / "pairs.jsonl"


def settings(output: Path, model: Path, data: Path, **changes: Any) -> TrainConfig:
    tree: dict[str, Any] = {
        "task": "reward",
        "output": str(output),
        "model": {"path": str(model), "family": "latent"},
        "data": {"table": str(data), "resolution": 32, "cache": "memory", "verify": False},
        "loss": {"kind": "bradley_terry"},
        "reward": {"train": "head", "latent": {"blocks": 1, "hidden": [16]}},
        "optim": {"steps": 30, "batch_size": 6, "lr": 1e-2},
        "log": {"every": 10, "trackers": []},
        "device": "cpu",
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        at = tree
        for name in path:
            at = at.setdefault(name, {})
        if value is None:
            at.pop(last, None)
        else:
            at[last] = value
    return build(TrainConfig, tree, "test")


def pictures(folder: Path, count: int = 6) -> list[Tensor]:
    names = [f"{i}-{side}.png" for i in range(count // 2) for side in (0, 1)]
    return [torch.from_numpy(read_image(str(folder / name)).copy()).permute(2, 0, 1) for name in names]
