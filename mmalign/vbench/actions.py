"""Human actions: the classes of Kinetics-400, the label that a prompt names, and when a clip shows it.

Sources: human_action.py of Vchitect/VBench, and the list kinetics_400_categories.txt beside it, which is that of
UniFormer and UMT. It is not in alphabetical order, as the lists of most libraries are: with theirs a clip of these
networks would be called by another class's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["asked_label", "kinetics_400", "named_label", "place_of", "read_classes", "shown", "top_five"]

TOP = 5
LEAST = 0.85
"""The smallest sigmoid that counts, after rounding to four digits."""

# Places in the alphabetical list of the classes that UMT numbers from 0 to 399.
# fmt: off
_ORDER = (
    267, 192, 94, 228, 54, 280, 352, 57, 98, 170, 28, 212, 327, 363, 117, 38, 3, 234, 12, 315, 395, 253, 161, 274,
    294, 338, 111, 306, 107, 92, 116, 231, 270, 190, 364, 214, 334, 249, 370, 312, 223, 172, 297, 366, 29, 307, 378,
    275, 292, 156, 241, 206, 15, 174, 127, 91, 397, 211, 42, 134, 180, 87, 90, 265, 153, 58, 120, 244, 296, 381,
    183, 36, 80, 177, 350, 20, 311, 305, 133, 76, 8, 61, 27, 288, 86, 393, 349, 308, 13, 260, 97, 259, 30, 285, 304,
    60, 179, 106, 324, 147, 149, 49, 269, 17, 123, 318, 201, 128, 248, 130, 78, 343, 284, 18, 319, 59, 302, 126,
    301, 266, 45, 124, 131, 383, 360, 25, 316, 371, 346, 389, 268, 314, 362, 43, 222, 239, 250, 230, 351, 376, 299,
    246, 139, 185, 191, 144, 330, 113, 163, 323, 175, 226, 140, 391, 358, 356, 276, 341, 1, 26, 154, 347, 19, 215,
    256, 68, 359, 152, 377, 313, 348, 160, 44, 51, 290, 208, 150, 243, 35, 136, 277, 300, 257, 278, 159, 32, 204,
    355, 89, 2, 236, 396, 40, 320, 109, 217, 188, 251, 353, 262, 326, 65, 6, 52, 340, 361, 88, 157, 83, 55, 321,
    382, 110, 255, 337, 114, 155, 233, 165, 81, 141, 298, 158, 225, 122, 365, 102, 271, 368, 344, 309, 372, 62, 168,
    162, 198, 186, 93, 379, 145, 390, 135, 332, 200, 73, 96, 108, 178, 264, 10, 258, 336, 70, 261, 329, 342, 195,
    16, 33, 325, 37, 333, 169, 196, 115, 121, 148, 392, 77, 374, 227, 203, 252, 199, 103, 119, 209, 237, 331, 129,
    47, 112, 289, 345, 242, 72, 95, 205, 375, 132, 219, 137, 310, 335, 166, 386, 273, 216, 182, 207, 394, 118, 5,
    64, 339, 322, 48, 193, 24, 232, 224, 142, 254, 279, 151, 11, 373, 380, 7, 221, 328, 82, 387, 9, 167, 100, 41,
    238, 283, 388, 385, 399, 56, 263, 46, 39, 187, 50, 21, 164, 85, 0, 66, 79, 63, 84, 104, 367, 357, 138, 281, 67,
    23, 247, 105, 75, 53, 125, 369, 287, 293, 176, 272, 74, 181, 14, 202, 317, 71, 210, 398, 291, 99, 213, 235, 197,
    295, 171, 286, 245, 101, 303, 220, 34, 354, 189, 143, 229, 22, 282, 173, 384, 146, 194, 240, 184, 31, 69, 4,
    218,
)
# fmt: on


@cache
def kinetics_400() -> tuple[str, ...]:
    """The 400 classes of Kinetics-400 in the order of UMT's logits."""
    from torchvision.models.video import MViT_V2_S_Weights

    names = sorted(MViT_V2_S_Weights.KINETICS400_V1.meta["categories"], key=str.lower)
    return tuple(names[place] for place in _ORDER)


def read_classes(path: Path) -> tuple[str, ...]:
    """Classes from a text file: one a line in order of their numbers, or each followed by a tab and its number.

    Raises:
        ValueError: the file cannot be read, is empty, or its numbers are not 0, 1, 2, ... each once.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a list of classes ({error}).") from None
    if not lines or not all("\t" in line for line in lines):
        if not lines or any("\t" in line for line in lines):
            raise ValueError(f"{path}: no list of classes; write one a line, each with a tab and its number or none.")
        return tuple(line.strip() for line in lines)
    numbered = {}
    for line in lines:
        name, _, number = line.rpartition("\t")
        if not number.strip().isdecimal():
            raise ValueError(f"{path}: {line!r:.80} has no number behind its tab.")
        numbered[int(number)] = name.strip()
    if sorted(numbered) != list(range(len(lines))):
        raise ValueError(f"{path}: the numbers of {len(lines)} classes have to be 0 to {len(lines) - 1}, each once.")
    return tuple(numbered[number] for number in range(len(lines)))


def named_label(prompt: str) -> str:
    """The label as the reference takes it from the name ``{prompt}-0.mp4``.

    In lower case, up to the first "-", behind the last "person is ", up to the first "_".
    """
    return f"{prompt}-0.mp4".lower().split("-")[0].split("person is ")[-1].split("_")[0]


def asked_label(prompt: str) -> str:
    """What stands behind "person is " in a prompt, whole, in lower case; the whole prompt where that is not in it."""
    return prompt.lower().rpartition("person is ")[2].strip(" .")


def place_of(label: str, classes: Sequence[str]) -> int | None:
    """The number of the class of this name in lower case; None where there is none."""
    lowered = [name.lower() for name in classes]
    return lowered.index(label) if label in lowered else None


def top_five(values: Tensor, place: int) -> bool:
    """Whether fewer than five of the values [classes] are larger than that at a place."""
    return int((values > values[place]).sum()) < TOP


def shown(logits: Tensor, place: int) -> bool:
    """The reference's rule on one clip's logits [classes]: in the top five, and its sigmoid at least 0.85.

    The sigmoid is rounded to four digits first, so that 0.84995 is enough. It is taken of each logit by itself, of a
    network that was trained with a softmax over all of them.
    """
    probabilities = torch.sigmoid(logits.float())
    return top_five(probabilities, place) and round(float(probabilities[place]), 4) >= LEAST
