"""What tests of video families share: a tiny pipeline of each, and how to look into what is fed to a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from family_kit import recorded
from torch import Tensor

from mmalign.media import write_video
from mmalign.models.video import VideoAdapter
from mmalign.records import MediaRef
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.testing import tiny_video as tiny

MAKERS: dict[str, Callable[[Path], Path]] = {
    "wan": tiny.tiny_wan,
    "cogvideox-2b": tiny.tiny_cogvideox,
    "cogvideox-5b": partial(tiny.tiny_cogvideox, kind="5b"),
    "cogvideox-1.5": partial(tiny.tiny_cogvideox, kind="1.5"),
    "hunyuan_video": tiny.tiny_hunyuan_video,
    "hunyuan_video-plain": partial(tiny.tiny_hunyuan_video, embedded=False),
    "ltx-0.9.0": tiny.tiny_ltx,
    "ltx-0.9.1": partial(tiny.tiny_ltx, told_time=True),
    "animatediff": tiny.tiny_animatediff,
}
"""A folder of each family, and of each kind of checkpoint that a family has."""

FAMILIES = ("wan", "cogvideox-2b", "hunyuan_video", "ltx-0.9.0", "animatediff")
"""One of each family, where kinds make no difference."""

PROMPTS = ["a red circle", "a photo of a large green square on a small blue triangle"]
SIDE, FRAMES = 32, 9


def folders_of(names: tuple[str, ...], factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = factory.mktemp("videos")
    return {name: MAKERS[name](home / name) for name in names}


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]


def start(adapter: VideoAdapter, frames: int = FRAMES) -> Tensor:
    """The noise that a pipeline draws from `generators`; CogVideoX draws frame by frame."""
    c, t, h, w = adapter.latent_shape(SIDE, SIDE, frames)
    if adapter.family.startswith("cogvideox"):
        return torch.cat([torch.randn(1, t, c, h, w, generator=g) for g in generators()]).transpose(1, 2)
    return torch.cat([torch.randn(1, c, t, h, w, generator=g) for g in generators()])


def draw(adapter: VideoAdapter, guidance: float = 1.0, steps: int = 4, **options: Any) -> Tensor:
    """Clips [B, F, H, W, 3] in [0, 1] by the pipeline's own call."""
    sides = {"height": SIDE, "width": SIDE, "num_frames": FRAMES, **options}
    drawn = adapter.draw(PROMPTS, generators(), guidance_scale=guidance, num_inference_steps=steps, **sides)
    return torch.from_numpy(drawn)


def times(adapter: VideoAdapter) -> Tensor:
    """The pipeline's last schedule as our timesteps: flow times, or the discrete ones."""
    scheduler = adapter.pipeline().scheduler
    if adapter.process.kind != "flow":
        return scheduler.timesteps.long()
    return scheduler.timesteps.float() / scheduler.config.num_train_timesteps


@contextmanager
def deterministic(adapter: VideoAdapter) -> Iterator[None]:
    """Inside, the pipeline samples with the scheduler whose step is `Process.step`, and decodes without fresh noise."""
    own = adapter.pipe.scheduler
    if adapter.family.startswith("cogvideox"):
        adapter.pipe.scheduler = diffusers.CogVideoXDDIMScheduler.from_config(own.config)
    elif adapter.process.kind == "flow" and not isinstance(own, diffusers.FlowMatchEulerDiscreteScheduler):
        shape = adapter.latent_shape(SIDE, SIDE, FRAMES)
        adapter.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=adapter.shift(shape))
    told = {"decode_noise": 0.0} if adapter.family.startswith("ltx") else {}
    vars(adapter).update(told)
    try:
        yield
    finally:
        adapter.pipe.scheduler = own
        for name in told:
            delattr(adapter, name)


def close(ours: Any, theirs: Any, name: str) -> None:
    """Tensors within 1e-5 wherever they stand in a structure, and equal numbers."""
    if isinstance(theirs, Tensor):
        torch.testing.assert_close(ours.float(), theirs.float().expand_as(ours), rtol=0, atol=1e-5, msg=name)
    elif isinstance(theirs, list | tuple):
        for i, value in enumerate(theirs):
            close(ours[i], value, f"{name}[{i}]")
    else:
        assert ours == pytest.approx(theirs), name


def compare_first_calls(adapter: VideoAdapter) -> None:
    """Every argument that the pipeline's sampler gives its denoiser is what `predict` gives it; so is the output."""
    with recorded(adapter.denoiser) as theirs:
        draw(adapter)
    with recorded(adapter.denoiser) as ours, torch.no_grad():
        found = adapter.predict(start(adapter), times(adapter)[:1].expand(2), adapter.encode_prompt(PROMPTS))
    unread = {"return_dict"} | (
        {"guidance"} if adapter.guidance is None else set()
    )  # a transformer without its weights
    told = {name: value for name, value in theirs[0].items() if value is not None and name not in unread}
    assert told.keys() >= {"hidden_states", "timestep", "output"}
    for name, value in told.items():
        assert name in ours[0], f"the pipeline passes {name}, the adapter does not"
        close(ours[0][name], value, name)
    for name, value in ours[0].items():
        assert value is None or name in told, f"only the adapter passes {name}"
    assert found.shape == (2, *adapter.latent_shape(SIDE, SIDE, FRAMES))


def pixels(count: int = 2, frames: int = FRAMES, seed: int = 1) -> Tensor:
    """Clips [count, 3, frames, H, W] in [-1, 1]."""
    return torch.rand(count, 3, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def clip_preferences(folder: Path, pairs: int = 4, frames: int = FRAMES) -> Path:
    """A table of pairs of clips at 8 frames per second; winners are dark, losers bright."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(pairs):
        places = [folder / f"{i}-{side}.mp4" for side in ("w", "l")]
        for place, low in zip(places, (0, 128), strict=True):
            noise = rng.integers(low, low + 128, (frames, 3, SIDE, SIDE), dtype=np.uint8)
            write_video(place, torch.from_numpy(noise), 8.0)
        media = (MediaRef(str(places[0])), MediaRef(str(places[1])))
        rows.append(PreferenceRow(PROMPTS[i % 2], media, label={"overall": "A"}))
    write_preferences(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"
