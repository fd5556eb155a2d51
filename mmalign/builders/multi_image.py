"""MIA-DPO (Liu et al. 2410.17637): questions about one picture become questions about several, and answers that look
at the wrong one are rejected.

Three forms: *sequence*, the picture among others, named by its number; *collage*, numbered cells on white;
*pic_in_pic*, the picture in the middle of another. The chosen answer is the question's own; the rejected one is the
model's, kept if it differs and its attention to the picture that is asked about is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, pil_to_tensor, resize, to_pil_image

Form = Literal["sequence", "collage", "pic_in_pic"]
Box = tuple[float, float, float, float]

# The largest share of the attention to images that may go to the one asked about, by their number (its released code).
LIMITS: dict[str, dict[int, float]] = {
    "sequence": {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6},
    "collage": {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3},
    "pic_in_pic": {2: 0.8},
}
CELL, GAP, INNER = 448, 8, 0.7


@dataclass(frozen=True)
class Composed:
    """A question about several pictures.

    Attributes:
        images: uint8 [3, H, W]; one for collage and pic_in_pic.
        text: with `<image>` where a picture goes.
        target: number of the picture asked about among `images`.
        box: of its region within that image, (left, top, right, bottom) in [0, 1].
    """

    images: tuple[Tensor, ...]
    text: str
    target: int
    box: Box


def sequence(images: Sequence[Tensor], target: int, question: str) -> Composed:
    """The pictures one after the other, numbered from 1."""
    named = "".join(f"Image{number}:<image>\n" for number in range(1, len(images) + 1))
    return Composed(tuple(images), f"{named}In Image{target + 1}, {_small(question)}", target, (0.0, 0.0, 1.0, 1.0))


def collage(images: Sequence[Tensor], target: int, question: str) -> Composed:
    """One picture of cells with their numbers, row by row, on white."""
    count = len(images)
    columns = count if count <= 3 else math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    side = CELL + GAP
    canvas = Image.new("RGB", (columns * side + GAP, rows * side + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, image in enumerate(images):
        left, top = GAP + number % columns * side, GAP + number // columns * side
        canvas.paste(to_pil_image(_within(image, CELL, CELL)), _centred(image, left, top, CELL, CELL))
        draw.rectangle((left, top, left + 44, top + 44), fill="white")
        draw.text((left + 22, top + 22), str(number + 1), fill="black", anchor="mm", font=ImageFont.load_default(32))
    left, top = GAP + target % columns * side, GAP + target // columns * side
    box = (left / canvas.width, top / canvas.height, (left + CELL) / canvas.width, (top + CELL) / canvas.height)
    text = f"<image>\nThe picture has {count} numbered parts. In part {target + 1}, {_small(question)}"
    return Composed((pil_to_tensor(canvas),), text, 0, box)


def pic_in_pic(inner: Tensor, outer: Tensor, question: str, share: float = INNER) -> Composed:
    """A picture in the middle of another, at most `share` of its sides."""
    height, width = outer.shape[-2:]
    room = (max(1, int(height * share)), max(1, int(width * share)))
    small = _within(inner, *room)
    h, w = small.shape[-2:]
    top, left = (height - h) // 2, (width - w) // 2
    made = outer.clone()
    made[:, top : top + h, left : left + w] = small
    box = (left / width, top / height, (left + w) / width, (top + h) / height)
    return Composed((made,), f"<image>\nIn the picture in the middle, {_small(question)}", 0, box)


def accepted(
    answer: str, truth: str, share: float, perplexity: float, form: Form, count: int, *, longest: int = 512,
    least_perplexity: float = 1.1, length_ratio: float | None = None,
) -> str:  # fmt: skip
    """Why a model's answer is no rejected answer; nothing if it is one.

    Args:
        share: of its attention to images, what goes to the picture asked about.
        perplexity: exp of minus the mean log of its greedy tokens' probabilities; near 1 it says by heart.
        count: how many pictures the question shows.
        length_ratio: largest ratio of the longer to the shorter of the two answers, in characters.
    """
    if answer.strip().lower() == truth.strip().lower():
        return "right"
    if len(truth) >= longest:
        return "a long answer"
    if perplexity <= least_perplexity:
        return "said by heart"
    if share > limit(form, count):
        return "looked at the right picture"
    short, long = sorted((len(answer.strip()), len(truth.strip())))
    if length_ratio is not None and long > length_ratio * max(1, short):
        return "of another length"
    return ""


def limit(form: Form, count: int) -> float:
    """The largest share for so many pictures: of the nearest number that its code has."""
    known = LIMITS[form]
    return known[min(known, key=lambda number: (abs(number - count), number))]


def _small(question: str) -> str:
    """The question with a small first letter, unless it begins with a name of capitals."""
    return question[:1].lower() + question[1:] if question[1:2].islower() or question[1:2] == " " else question


def _within(image: Tensor, height: int, width: int) -> Tensor:
    """The picture resized so that it fills one side of the room and fits the other."""
    scale = min(height / image.shape[-2], width / image.shape[-1])
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    made: Tensor = resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return torch.as_tensor(made)


def _centred(image: Tensor, left: int, top: int, height: int, width: int) -> tuple[int, int]:
    small = _within(image, height, width)
    return left + (width - small.shape[-1]) // 2, top + (height - small.shape[-2]) // 2
