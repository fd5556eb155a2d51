"""Teaches the vision tower of `shapes-vlm` to see before its words are learned, as LLaVA's comes from CLIP.

Each image token learns to tell which shape has its centre in its patch. `python -m mmalign.shapes.sight FOLDER` writes
a whole model whose tower sees and whose language model is untrained.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.progress import Progress
from mmalign.shapes.answers import scene_at
from mmalign.shapes.captions import BACKGROUNDS, COLOURS, KINDS
from mmalign.shapes.scene import SIDE, Scene, render
from mmalign.shapes.vlm import PATCH, untrained, write_vlm

__all__ = ["Reading", "labels", "loss", "teach"]

CELLS = SIDE // PATCH
PARTS = (len(KINDS) + 1, len(COLOURS), len(BACKGROUNDS), 3)  # kind or none, colour, background, (x, y, radius)


class Reading(nn.Module):
    """A linear reading of image tokens [B, N, C] into `PARTS`, for this training alone."""

    def __init__(self, width: int):
        super().__init__()
        self.out = nn.Linear(width, sum(PARTS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.out(tokens).split(PARTS, -1)


def labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What each patch holds, row by row: kind (the last index is none), colour, background as int64 [N, 3]; and
    float32 [N, 3], the centre in the picture in [0, 1] and the radius in patches, where a shape is.

    A centre within its patch leaves the language model without places: it told them, and relations, by chance.
    """
    told = np.zeros((CELLS * CELLS, 3), np.int64)
    told[:, 0], told[:, 2] = len(KINDS), BACKGROUNDS.index(scene.background)
    where = np.zeros((CELLS * CELLS, 3), np.float32)
    for shape in scene.shapes:
        column, row = (min(int(value // PATCH), CELLS - 1) for value in (shape.x, shape.y))
        cell = row * CELLS + column
        told[cell, :2] = KINDS.index(shape.kind), COLOURS.index(shape.colour)
        where[cell] = shape.x / SIDE, shape.y / SIDE, shape.radius / PATCH
    return told, where


def loss(parts: tuple[Tensor, ...], told: Tensor, where: Tensor) -> Tensor:
    """Cross-entropies of kind and background over all patches, of colour and the distance of place and radius where a
    shape is: scalar."""
    kind, colour, background, place = parts
    there = told[..., 0] < len(KINDS)
    return (
        F.cross_entropy(kind.flatten(0, 1), told[..., 0].flatten())
        + F.cross_entropy(background.flatten(0, 1), told[..., 2].flatten())
        + F.cross_entropy(colour[there], told[..., 1][there])
        + F.l1_loss(place[there], where[there])
    )


def teach(model: Any, steps: int = 3000, batch_size: int = 64, lr: float = 1.5e-3, seed: int = 21) -> dict[str, float]:
    """Trains the tower on drawn scenes and returns how often patches with a shape are read right on others."""
    torch.manual_seed(seed)
    tower = model.model.vision_tower
    reading = Reading(tower.config.hidden_size)
    weights = [*tower.parameters(), *reading.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=0.05)
    with Progress("learning to see", steps) as bar:
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
            pixels, told, where = _batch(seed, step * batch_size, batch_size)
            value = loss(reading(_tokens(tower, pixels)), told, where)
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            if step % 50 == 49:
                bar.update(step + 1, {"loss": value.item()})
    return _accuracy(tower, reading, seed + 1)


@torch.no_grad()
def _accuracy(tower: Any, reading: Reading, seed: int, count: int = 1000) -> dict[str, float]:
    pixels, told, _ = _batch(seed, 0, count)
    kind, colour, _, _ = reading(_tokens(tower, pixels))
    there = told[..., 0] < len(KINDS)
    right = (kind.argmax(-1) == told[..., 0]), (colour.argmax(-1) == told[..., 1])
    return {
        "kind": float(right[0][there].float().mean()),
        "colour": float(right[1][there].float().mean()),
        "empty": float(right[0][~there].float().mean()),
    }


def _tokens(tower: Any, pixels: Tensor) -> Tensor:
    """What LLaVA takes of the tower: the last hidden states without the class token."""
    states: Tensor = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    return states[:, 1:]


def _batch(seed: int, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    scenes = [scene_at(seed, first + i) for i in range(count)]
    pictures = np.stack([render(scene) for scene in scenes])
    told, where = zip(*map(labels, scenes), strict=True)
    pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    return pixels, torch.from_numpy(np.stack(told)), torch.from_numpy(np.stack(where))


def main() -> None:
    """Writes a folder to train words from."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    given = parser.parse_args()
    model = untrained()
    print(teach(model, given.steps))
    write_vlm(given.folder)
    model.save_pretrained(given.folder)


if __name__ == "__main__":
    main()
