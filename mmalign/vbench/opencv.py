"""OpenCV's bilinear resize of 8-bit images, in its fixed-point arithmetic, for dimensions whose reference uses it.

Source: modules/imgproc/src/resize.cpp of OpenCV 4 (``INTER_LINEAR`` on 8-bit images). There is no filter: shrinking
takes four pixels of the source for each pixel, whatever the factor.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["resize_bilinear"]

ONE = 2048  # weights are whole numbers out of this


def resize_bilinear(images: Tensor, height: int, width: int) -> Tensor:
    """Images uint8 [N, 3, H, W] -> uint8 [N, 3, height, width], to the level as ``cv2.resize`` gives them.

    Weights of the two neighbours are rounded to 1/2048 and the sums cut to whole numbers on their way, so that results
    may lie a level below exact arithmetic. Shrinking both sides to exactly a half takes the mean of each 2 x 2 pixels,
    rounded half up. An image that has the size already is returned as it is.
    """
    old_height, old_width = images.shape[-2:]
    if (old_height, old_width) == (height, width):
        return images
    if (old_height, old_width) == (2 * height, 2 * width):
        whole = images.to(torch.int32)
        total = whole[..., 0::2, 0::2] + whole[..., 0::2, 1::2] + whole[..., 1::2, 0::2] + whole[..., 1::2, 1::2]
        return ((total + 2) >> 2).to(torch.uint8)
    # Rows that no pixel of the result needs are not widened.
    rows, row_weights = _neighbours(old_height, height)
    columns, column_weights = _neighbours(old_width, width)
    # Beyond the first and last column the nearest one counts fully; rows are repeated instead, each with its weight.
    outside = (columns < 0) | (columns >= old_width - 1)
    column_weights = np.where(outside[:, None], np.array([ONE, 0]), column_weights)
    left, right = (_index(columns + step, old_width, images) for step in (0, 1))
    needed, places = np.unique(np.stack([rows, rows + 1]).clip(0, old_height - 1), return_inverse=True)
    images = images[..., torch.from_numpy(needed).to(images.device), :]
    first, second = (_tensor(weights, images) for weights in column_weights.T)
    wide = (images[..., left].to(torch.int32) * first + images[..., right].to(torch.int32) * second) >> 4
    upper, lower = (torch.from_numpy(place).to(images.device) for place in places.reshape(2, -1))
    above, below = (_tensor(weights, images)[:, None] for weights in row_weights.T)
    total = ((wide[..., upper, :] * above) >> 16) + ((wide[..., lower, :] * below) >> 16)
    return ((total + 2) >> 2).clamp(0, 255).to(torch.uint8)


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each new pixel, the first of its two old neighbours (it may lie outside) and both weights [new, 2]."""
    scale = 1.0 / (new / old)  # in this order, as OpenCV divides
    places = ((np.arange(new) + 0.5) * scale - 0.5).astype(np.float32)
    first = np.floor(places)
    share = places - first
    weights = np.stack([np.float32(1) - share, share], axis=1) * np.float32(ONE)
    return first.astype(np.int64), np.rint(weights).astype(np.int64)


def _index(places: np.ndarray, size: int, like: Tensor) -> Tensor:
    return torch.from_numpy(places.clip(0, size - 1)).to(like.device)


def _tensor(weights: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(weights.astype(np.int32)).to(like.device)
