"""Where a model looks while it answers: the share of its attention to images that goes to one of them, or to a region.

MIA-DPO (Liu et al. 2410.17637) selects rejected answers so, with LLaVA-1.5's layer 16 and 24x24 grid written into the
code. Here nothing of a family is: an image's tokens are found by laying the processor's tokens beside the tokens of the
text that it was given, and where a token lies in its image by giving the processor a picture of coordinates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmalign.mllm.loading import LANGUAGE
from mmalign.mllm.passes import Branching, Passes, Prompt

Box = tuple[float, float, float, float]
"""left, top, right, bottom of a region, as shares of the image's sides in [0, 1]."""


def image_places(
    ids: Sequence[int], bare: Sequence[int], placeholder: int, image: int, counts: Sequence[int] | None = None
) -> list[list[int]]:
    """Places of each image's tokens in a prompt.

    Args:
        ids: the prompt as the processor made it.
        bare: the tokens of its text before that, in which each image is one placeholder.
        placeholder: its id; Gemma's is not the token of a feature.
        image: id of the token that stands for a feature.
        counts: features of each image, where they are known (`Passes.counts`): needed for templates that put images
            side by side (LLaVA-OneVision's).

    Raises:
        ValueError: the two differ in more than the placeholders, or images stand side by side and there are no counts,
            so that it cannot be told where one of them ends.
    """
    if counts is not None:
        places = [place for place, token in enumerate(ids) if token == image]
        if sum(counts) != len(places):
            raise ValueError(f"{len(places)} places for {sum(counts)} features of images")
        ends = [sum(counts[:number]) for number in range(len(counts) + 1)]
        return [places[a:b] for a, b in itertools.pairwise(ends)]
    marks = [-1, *(i for i, token in enumerate(bare) if token == placeholder), len(bare)]
    texts = [list(bare[a + 1 : b]) for a, b in itertools.pairwise(marks)]
    start, found = _find(ids, texts[0], 0, first=True) + len(texts[0]), []
    for number, text in enumerate(texts[1:], 1):
        last = number == len(texts) - 1
        if not text and not last:
            raise ValueError("two images stand side by side in the prompt; give counts, or put text between them")
        stop = len(ids) - len(text) if last else _find(ids, text, start)
        found.append([place for place in range(start, stop) if ids[place] == image])
        start = stop + len(text)
    if start != len(ids) or list(ids[len(ids) - len(texts[-1]) :]) != texts[-1] or not all(found):
        raise ValueError(_OTHER)
    return found


_OTHER = "the processor changes more of a prompt than the places of its images"


def _find(ids: Sequence[int], text: Sequence[int], start: int, first: bool = False) -> int:
    """Where `text` stands next, or ValueError; with `first` it has to be at once."""
    for place in range(start, start + 1 if first else len(ids) - len(text) + 1):
        if list(ids[place : place + len(text)]) == list(text):
            return place
    raise ValueError(_OTHER)


# ------------------------------------------------------------------------------------------------------------ regions


def coordinates(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A picture whose red is x and whose green is y, a black one and a white one: uint8 [3, H, W] each."""
    x = torch.linspace(0, 255, width).expand(height, width)
    y = torch.linspace(0, 255, height)[:, None].expand(height, width)
    black = torch.zeros(3, height, width, dtype=torch.uint8)
    return torch.stack([x, y, torch.zeros_like(x)]).round().to(torch.uint8), black, black + 255


def token_centres(coordinate: Prompt, black: Prompt, white: Prompt, count: int) -> Tensor:
    """Where the tokens of a prompt's only image lie in it: (x, y) in [0, 1], float32 [count, 2]; NaN for those that lie
    nowhere, such as the ends of LLaVA-NeXT's rows and padding.

    Args:
        coordinate, black, white: the same prompt with each of `coordinates`, through the processor.
        count: tokens of the image.

    Raises:
        ValueError: tokens that are no square grid of the processor's tiles.
    """
    low, high, value = (each.vision["pixel_values"].float() for each in (black, white, coordinate))
    share = (value - low) / torch.where(high > low, high - low, math.nan)  # a processor's scaling and mean undone
    grid = coordinate.vision.get("image_grid_thw")
    if grid is not None:  # Qwen: rows are patches (channel, time, height, width), those of a token next to each other
        patches = share.unflatten(1, (3, -1)).nanmean(2)
        return patches[:, :2].unflatten(0, (count, -1)).nanmean(1)
    tiles = share.reshape(-1, *share.shape[-3:])
    if "image_sizes" in coordinate.vision:  # LLaVA-NeXT: the whole picture first; of its tiles nothing is said
        return _whole_first(tiles, count)
    side = math.isqrt(count // len(tiles))
    if side * side * len(tiles) != count:
        raise ValueError(f"{count} tokens of {len(tiles)} tiles are no square grids, so their places are not known")
    return torch.cat([_centres(tile, side) for tile in tiles])


def _whole_first(tiles: Tensor, count: int) -> Tensor:
    """The side of the whole picture's grid divides its pixels, and there are that many tokens and more."""
    sides = [side for side in range(2, tiles.shape[-1]) if tiles.shape[-1] % side == 0 and side * side <= count]
    centres = torch.full((count, 2), math.nan)
    side = max(sides)
    centres[: side * side] = _centres(tiles[0], side)
    return centres


def _centres(tile: Tensor, side: int) -> Tensor:
    """Mean x and y of each cell of a [3, H, W] tile cut into side x side cells, row by row: [side * side, 2]."""
    height, width = (size - size % side for size in tile.shape[-2:])
    cells = tile[:2, :height, :width].reshape(2, side, height // side, side, width // side)
    return cells.permute(1, 3, 2, 4, 0).flatten(2, 3).nanmean(2).flatten(0, 1)


def inside(centres: Tensor, box: Box) -> Tensor:
    """Which centres [n, 2] lie in a region: bool [n]."""
    x, y = centres.unbind(1)
    left, top, right, bottom = box
    return (x >= left) & (x < right) & (y >= top) & (y < bottom)


# ---------------------------------------------------------------------------------------------------------- attention


@torch.no_grad()
def attention_to_prompt(passes: Passes, branching: Branching, layer: int | None = None) -> Tensor:
    """How much an answer's tokens attend to each token of the prompt: mean over heads and answer tokens, float32 [P].

    Args:
        passes: of a model with `attention: eager`; others do not say what they attend to.
        branching: the prompt with one answer.
        layer: of the language model, from 0; the middle one by default (16 of 32 in MIA-DPO).

    Raises:
        ValueError: another attention than eager, or no such layer.
    """
    model = passes.model
    if model.config._attn_implementation != "eager":
        raise ValueError("attention weights need mllm.attention: eager")
    text = next(module for name, module in passes.base.named_children() if name in LANGUAGE)
    layers: Any = text.layers
    number = len(layers) // 2 if layer is None else layer
    if not 0 <= number < len(layers):
        raise ValueError(f"attention.layer is {number}, and the language model has layers 0 to {len(layers) - 1}")
    seen: list[Tensor] = []
    hook = layers[number].self_attn.register_forward_hook(lambda module, given, output: seen.append(output[1]))
    try:
        passes.hidden([branching], passes.see([branching.prompt]))
    finally:
        hook.remove()
    start = len(branching.prompt.ids)
    rows = seen[0][0, :, start : start + len(branching.answers[0]), :start]  # [heads, answer, prompt]
    return rows.float().mean((0, 1))


def share_of(attention: Tensor, target: Sequence[int], images: Sequence[int]) -> float:
    """Attention that goes to `target`, of what goes to all tokens of `images`; 0 where nothing does."""
    total = float(attention[list(images)].sum())
    return float(attention[list(target)].sum()) / total if total > 0 else 0.0
