"""Where the shapes of an image of the shapes world stand, and how large they are, read from its pixels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmalign.evaluation import Batch, Evaluator
from mmalign.shapes.reader import read
from mmalign.shapes.scene import SIDE

SUBSCORES = ("x", "y", "radius", "saturation")


class ShapesPlace(Evaluator):
    """Attributes that no caption need ask for: place, size and saturation of what an image of the shapes world shows.

    Sub-scores, each the mean over the proper shapes of the image: ``x`` and ``y`` of the centres in [0, 1] from the top
    left, ``radius`` as a share of half the side, in [0, 1], and HSV ``saturation`` in [0, 1]. Without a proper shape
    the middle, radius and saturation 0. None of them is better or worse: they say how alike two images are.
    """

    needs = frozenset({"image"})
    score_range = (0.0, 1.0)
    licence = "Apache-2.0"
    source = "mmalign.shapes: the reader"

    def score(self, batch: Batch) -> dict[str, Tensor]:
        """Sub-scores float64 [B]."""
        rows = [_attributes(image.permute(1, 2, 0).cpu().numpy()) for image in batch.images]
        return dict(zip(SUBSCORES, torch.tensor(rows, dtype=torch.float64).reshape(-1, 4).T, strict=True))


def _attributes(image: np.ndarray) -> list[float]:
    shapes = [shape for shape in read(image).shapes if shape.proper]
    if not shapes:
        return [0.5, 0.5, 0.0, 0.0]
    seen = np.array([(s.x / SIDE, s.y / SIDE, s.radius / (SIDE / 2), s.saturation) for s in shapes])
    values: list[float] = np.clip(seen.mean(axis=0), 0.0, 1.0).tolist()
    return values


EVALUATOR = ShapesPlace
