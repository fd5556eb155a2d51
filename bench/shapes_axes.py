"""What each known fault of a clip does to the axes VQ, MQ and TA: `python bench/shapes_axes.py`, about 30 s.

Prints the table of docs/shapes_video.md: means over clips of held-out captions, each with one fault.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mmalign.shapes.axes import AXES, axes, everything
from mmalign.shapes.clip import FPS
from mmalign.shapes.clip_data import DrawnClip, drawn_clips
from mmalign.shapes.clip_reader import read_clip
from mmalign.shapes.damage import MOTION, PICTURE, TEXT, parts


def faulty(items: list[DrawnClip], amount: float) -> Iterator[tuple[str, list[DrawnClip]]]:
    """The clips as they are, and with each fault; of parts of the caption those are broken that say something of it."""
    yield "none", items
    for kind in PICTURE + MOTION:
        yield kind, [replace(item, damages=((kind, amount),)) for item in items]
    for part in TEXT:
        yield f"another {part}", [replace(item, wrong=part) for item in items if part in parts(item.caption)]


def measured(items: list[DrawnClip]) -> list[float]:
    """Means of the axes, and of everything being right."""
    rows = []
    for item in items:
        reading = read_clip(item.clip(), item.fps)
        rows.append([*axes(item.caption, reading).values(), float(everything(item.caption, reading))])
    return [float(value) for value in np.mean(rows, axis=0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="clips")
    parser.add_argument("--amount", type=float, default=0.5, help="of each damage, in [0, 1]")
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--seed", type=int, default=90)
    options = parser.parse_args()
    items = drawn_clips(options.count, options.seed, held_out=True, side=options.side)
    print(f"| fault | {' | '.join(AXES)} | everything | clips |\n|---|---|---|---|---|---|")
    for name, clips in faulty(items, options.amount):
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in measured(clips))} | {len(clips)} |")
    drawn, start = [item.clip() for item in items], time.process_time()
    for clip in drawn:
        read_clip(clip, FPS)
    print(f"\n{1e3 * (time.process_time() - start) / len(drawn):.1f} ms of processor time to read a clip")


if __name__ == "__main__":
    main()
