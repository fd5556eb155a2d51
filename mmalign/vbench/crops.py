"""Input images of the image-to-video suite at ratios that its authors do not offer ready-made.

They cut every image by hand to 1:1 and to 16:9, one box within the other, and publish both in ``i2v-bench-info.json``
beside the originals; what lies between is cut from these. The rule is that of their crop_to_diff_ratio.py
(Vchitect/VBench, vbench2_beta_i2v), with its seed, so that boxes are theirs to the pixel.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmalign.source import whole_file

__all__ = ["Box", "crop_box", "crop_images"]

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""
SEED = 123


def crop_box(entry: Mapping[str, Any], ratio: str) -> Box:
    """Where an original is cut, for a ratio from 1-1 up to 16-9.

    Args:
        entry: of ``i2v-bench-info.json``: ``first_crop`` with first_bbox in the original; ``second_crop`` with width
            and height of the first crop, and second_bbox within it.
        ratio: width to height, such as ``5-4``.

    Raises:
        ValueError: another ratio, or an entry that lacks a box.
    """
    wide, high = _ratio(ratio)
    try:
        left, top = entry["first_crop"]["first_bbox"][:2]
        second = entry["second_crop"]
        width, height = int(second["width"]), int(second["height"])
        x, y, inner_width, inner_height = map(int, second["second_bbox"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{entry.get('file_name', 'an entry')}: {error!r}; boxes are as in i2v-bench-info.json"
        ) from None
    if width == height:  # cut from the square, across its whole width
        across, down = width // wide * wide, width // wide * high
        offset = _place(y, inner_height, down, height)
        return int(left), int(top) + offset, across, down
    across, down = height // high * wide, height // high * high
    offset = _place(x, inner_width, across, width)
    return int(left) + offset, int(top), across, down


def _ratio(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)[-:]([1-9]\d*)", text)
    if not found:
        raise ValueError(f"the ratio {text!r} is not of the form 5-4, width to height")
    wide, high = int(found[1]), int(found[2])
    if not 1.0 <= wide / high < 1.7778:
        raise ValueError(f"the ratio {text} does not lie between 1-1 and 16-9, the boxes that were drawn by hand")
    return wide, high


def _place(inner: int, size: int, wanted: int, whole: int) -> int:
    """Where a stretch of `wanted` begins that holds the inner one, [inner, inner + size), and fits into [0, whole)."""
    low = max(inner - (wanted - size), 0)
    high = min(inner + wanted, whole) - wanted
    if wanted < size or high < low:
        raise ValueError(f"a stretch of {wanted} pixels does not hold one of {size}; the entry's boxes contradict it")
    return random.Random(SEED).randint(low, high)


def crop_images(info: Path, originals: Path, output: Path, ratio: str) -> Path:
    """Cut all images of the suite into ``{output}/{ratio}``, as JPEG of Pillow's default quality like the authors'.

    Raises:
        ValueError: the info file is not theirs, or originals are missing or are no images.
    """
    try:
        entries = json.loads(info.read_text(encoding="utf-8"))
        boxes = {str(entry["file_name"]): crop_box(entry, ratio) for entry in entries}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(f"{info} is no i2v-bench-info.json of the image suite ({error!r})") from None
    absent = [name for name in boxes if not (originals / name).is_file()]
    if absent:
        raise ValueError(f"{originals} lacks {len(absent)} of {len(boxes)} originals, such as {absent[0]!r}")
    folder = output / ratio.replace(":", "-")
    for name, (x, y, width, height) in boxes.items():
        try:
            with Image.open(originals / name) as image, whole_file(folder / name) as temporary:
                image.crop((x, y, x + width, y + height)).save(temporary)
        except OSError as error:
            raise ValueError(f"{originals / name} cannot be cut ({error}); download it again") from None
    return folder
