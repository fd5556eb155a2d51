"""Scenes, a request to describe each, and yes/no questions about it, as a media table with its pictures.

`python -m mmalign.shapes.benchmark FOLDER` writes it, `mmalign respond` answers it; `shapes_claims` judges the
descriptions and `pope` the yes and no.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmalign.media_table import MediaRow, write_media_table
from mmalign.progress import track
from mmalign.shapes.answers import PROMPTS, scene_at
from mmalign.shapes.captions import BACKGROUNDS, COLOURS, KINDS
from mmalign.shapes.questions import FAMILIES, questions
from mmalign.shapes.scene import Scene, Shape, render

__all__ = ["rows", "scene_of", "told", "write"]

PROMPT = PROMPTS[1]  # "Describe the picture in detail."


def write(folder: Path, scenes: int, seed: int, families: Sequence[str] = FAMILIES) -> Path:
    """Writes `folder/table.jsonl` and a PNG per scene.

    Args:
        seed: of the scenes; training rows of `mmalign.shapes.answers` with another seed share none but by chance.
        families: of yes/no questions (`mmalign.shapes.questions`); none for descriptions alone.
    """
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    found: list[MediaRow] = []
    for index in track(range(scenes), "drawing scenes", scenes):
        scene = scene_at(seed, index)
        name = f"pictures/{index:05}.png"
        Image.fromarray(render(scene)).save(folder / name)
        found += [replace(row, media=name) for row in rows(scene, index, seed, families)]
    write_media_table(folder / "table.jsonl", found)
    return folder / "table.jsonl"


def rows(scene: Scene, index: int, seed: int, families: Sequence[str] = FAMILIES) -> Iterator[MediaRow]:
    """The questions about one scene; `media` is left to whoever draws it."""
    group = f"scene{index:05}"
    yield MediaRow(
        f"{group}-describe", PROMPT, "", group=group, dimensions=("shapes_claims",), aux={"scene": told(scene)}
    )
    for family in families:
        for number, one in enumerate(questions(scene, family, [seed, index, FAMILIES.index(family)])):
            yield MediaRow(
                f"{group}-{family}{number}", one.text, "", group=group, dimensions=("pope",),
                aux={"label": "yes" if one.yes else "no", "split": family},
            )  # fmt: skip


def told(scene: Scene) -> dict[str, Any]:
    """A scene in plain JSON."""
    return {"background": scene.background, "shapes": [asdict(shape) for shape in scene.shapes]}


def scene_of(value: Any) -> Scene:
    """The scene that `told` wrote.

    Raises:
        ValueError: it is not one, with what is wrong.
    """
    if not isinstance(value, Mapping) or not {"background", "shapes"} <= set(value):
        raise ValueError("aux.scene has to be {background, shapes}, as mmalign.shapes.benchmark writes it")
    if value["background"] not in BACKGROUNDS:
        raise ValueError(f"aux.scene: the background is one of {', '.join(BACKGROUNDS)}, not {value['background']!r}")
    return Scene(tuple(_shape(each) for each in value["shapes"]), value["background"])


def _shape(value: Mapping[str, Any]) -> Shape:
    try:
        shape = Shape(**value)
        numbers = np.array([shape.x, shape.y, shape.radius, shape.saturation], float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"aux.scene: {value!r:.80} is no shape ({error})") from None
    if shape.kind not in KINDS or shape.colour not in COLOURS or not np.isfinite(numbers).all():
        raise ValueError(f"aux.scene: {value!r:.80} is no shape of this world")
    return shape


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where table.jsonl and pictures/ are written")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7, help="of the scenes; not that of training rows (default: 7)")
    given = parser.parse_args()
    print(write(given.folder, given.scenes, given.seed))


if __name__ == "__main__":
    main()
