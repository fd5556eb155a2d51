"""From table rows to tensors: sources, joint crop and flip, cached latents and prompt embeddings.

Everything random is drawn from a generator seeded by what it is for (`noise.generator`), so a batch holds the
same tensors whatever its size, its process and its place in the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmalign import noise
from mmalign.cache import Cache
from mmalign.jobs import Data, Model
from mmalign.models.base import Condition
from mmalign.models.checkpoint import weight_hash
from mmalign.paths import find


@dataclass(frozen=True)
class View:
    """How a picture is cut: position of the crop in [0, 1] along each axis, and a horizontal flip."""

    flip: bool = False
    down: float = 0.5
    right: float = 0.5

    @staticmethod
    def draw(data: Data, generator: torch.Generator) -> View:
        """A view from the config's probabilities; the same three numbers are drawn whatever the config."""
        flip, down, right = torch.rand(3, generator=generator).tolist()
        if data.crop == "center":
            down = right = 0.5
        return View(flip < data.flip, down, right)


def cut(image: np.ndarray, resolution: int, view: View) -> tuple[Tensor, Tensor]:
    """Resizes the short side to `resolution` (Lanczos), crops a square, flips.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        Pixels [3, R, R] in [-1, 1], and sizes [6] as SDXL's time_ids: original height and width, top and left of
        the crop, target height and width.
    """
    height, width = image.shape[:2]
    scale = resolution / min(height, width)
    new_height, new_width = max(resolution, round(height * scale)), max(resolution, round(width * scale))
    if (new_height, new_width) != (height, width):
        image = np.asarray(Image.fromarray(image).resize((new_width, new_height), Image.Resampling.LANCZOS))
    top, left = round((new_height - resolution) * view.down), round((new_width - resolution) * view.right)
    image = image[top : top + resolution, left : left + resolution]
    if view.flip:
        image = image[:, ::-1]
        left = new_width - resolution - left
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float() / 127.5 - 1
    sizes = torch.tensor([height, width, top, left, resolution, resolution], dtype=torch.float32)
    return pixels, sizes


def picture(source: Any) -> np.ndarray:
    """uint8 RGB [H, W, 3] of a table's media reference or of a drawing of the shapes world."""
    if hasattr(source, "image"):
        return source.image()
    from mmalign.media import read_image

    return read_image(source)


@dataclass
class Fetched:
    """One picture on its way to latents: found in the cache, or as pixels still to be encoded."""

    key: str
    moments: Tensor | None
    pixels: Tensor | None
    sizes: Tensor


class Inputs:
    """Turns pictures into posterior moments and prompts into conditions, once each if a cache is on."""

    def __init__(self, adapter: Any, model: Model, data: Data, *, train_text: bool = False):
        self.adapter, self.data = adapter, data
        self.keep_text = data.cache != "off" and not train_text
        self.memory: dict[str, dict[str, Tensor]] = {}
        self.disk = Cache(data.cache_dir) if data.cache == "disk" else None
        self._keys = self.disk or Cache()
        self.model_key = _model_key(model) if self.disk else ["memory"]

    def _get(self, kind: str, key: str) -> dict[str, Tensor] | None:
        if self.disk:
            return self.disk.get(kind, key)
        return self.memory.get(key)

    def _put(self, kind: str, key: str, tensors: dict[str, Tensor]) -> None:
        if self.disk:
            self.disk.put(kind, key, tensors)
        elif self.data.cache == "memory":
            self.memory[key] = tensors

    def key(self, **parts: Any) -> str:
        """A cache key that holds the model and everything in `parts`."""
        return self._keys.key(model=self.model_key, **parts)

    def fetch(self, source: Any, view: View) -> Fetched:
        """CPU half of `latents`: looks into the cache, and decodes, resizes and crops on a miss."""
        key = self.key(media=source.hash(), resolution=self.data.resolution, view=[view.flip, view.down, view.right])
        found = self._get("latents", key) if self.data.cache != "off" else None
        if found is not None:
            return Fetched(key, found["moments"], None, found["sizes"])
        pixels, sizes = cut(picture(source), self.data.resolution, view)
        return Fetched(key, None, pixels, sizes)

    def latents(self, fetched: Sequence[Fetched], generators: Sequence[torch.Generator]) -> Tensor:
        """Latents [B, C, h, w] on the device: posterior moments, sampled with each picture's own generator."""
        missing = [item for item in fetched if item.moments is None]
        # With a cache, one picture at a time: what is stored must not depend on who else was in the batch.
        size = 1 if self.data.cache == "disk" else max(1, len(missing))
        for start in range(0, len(missing), size):
            part = missing[start : start + size]
            moments = self.adapter.encode_media(torch.stack([item.pixels for item in part]))  # type: ignore[misc]
            for item, value in zip(part, moments.cpu(), strict=True):
                item.moments, item.pixels = value.clone(), None
                self._put("latents", item.key, {"moments": item.moments, "sizes": item.sizes})
        moments = torch.stack([item.moments for item in fetched])  # type: ignore[misc]
        unit = torch.stack([torch.randn(moments.shape[2:], generator=g) for g in generators])
        return (moments[:, 0] + moments[:, 1] * unit).to(self.adapter.device)

    def conditions(self, prompts: Sequence[str], *, grad: bool = False) -> Condition:
        """The adapter's condition for a batch of prompts, on the device."""
        if not self.keep_text:
            return self.adapter.encode_prompt(list(prompts), grad=grad)
        rows = [self._condition(prompt) for prompt in prompts]
        return {name: torch.stack([row[name] for row in rows]).to(self.adapter.device) for name in rows[0]}

    def _condition(self, prompt: str) -> Condition:
        key = self.key(prompt=prompt)
        found = self._get("prompt_embeddings", key)
        if found is None:
            found = {name: value[0].cpu() for name, value in self.adapter.encode_prompt([prompt]).items()}
            self._put("prompt_embeddings", key, found)
        return found


def _model_key(model: Model) -> list[str]:
    """What latents and embeddings depend on: every part's weights but the denoiser's."""
    path = find(model.path)
    parts = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name not in ("unet", "transformer", "scheduler"))
    replaced = {name: weight_hash(find(folder)) for name, folder in model.components.items()}
    return [f"{name}={replaced.get(name) or weight_hash(path, components=[name])}" for name in parts]


def draw(seed: int, *identity: object) -> torch.Generator:
    """The generator of one training draw; a thin name so that every task seeds alike."""
    return noise.generator("train", seed, *identity)
