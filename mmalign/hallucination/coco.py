"""COCO's pictures: which of its 80 classes are in them, by its instances and by what their captions mention."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from mmalign.config import Strict
from mmalign.hallucination.files import json_rows, needed, present
from mmalign.hallucination.words import Mode, mentions, read_synonyms

__all__ = ["CocoFiles", "Objects", "image_number", "image_of"]


class CocoFiles(Strict):
    """The files that say what is in a picture: parameters of every evaluator that counts COCO's objects.

    Attributes:
        synonyms: CHAIR's synonyms.txt or another list of that layout, a class per line.
        objects: instances_*.json and captions_*.json of COCO 2014; a picture's objects are what any of them has.
    """

    synonyms: Path
    objects: tuple[Path, ...] = Field(min_length=1)

    def files(self, page: str) -> list[Path]:
        """All of them. ValueError for one that is not there, with the page that says where it is from."""
        return present([self.synonyms, *self.objects], page)


class Objects:
    """What is in COCO's pictures, by their number.

    Attributes:
        synonyms: word -> class.
    """

    def __init__(self, synonyms: str | Path, files: Sequence[str | Path], mode: Mode = "strict"):
        """`files`: instances_*.json and captions_*.json in COCO's layout, in any order.

        Raises:
            ValueError: a file is neither, or names a class that is not among the synonyms.
        """
        self.mode: Mode = mode
        self.synonyms = read_synonyms(synonyms, mode)
        self._by_image: dict[int, set[str]] = defaultdict(set)
        self._captions: dict[int, list[str]] = defaultdict(list)
        for file in files:
            self._read(Path(file).expanduser())

    def _read(self, path: Path) -> None:
        (told, *rest) = json_rows(path)
        entries = told.get("annotations")
        if rest or not isinstance(entries, list) or not entries:
            raise ValueError(f"{path} has no annotations; give COCO's instances_*.json and captions_*.json")
        if "caption" in entries[0]:
            for number, entry in enumerate(entries):
                image, caption = needed(entry, f"{path}: annotation {number}", "image_id", "caption")
                self._captions[int(image)].append(str(caption))
            return
        names = {entry["id"]: entry["name"] for entry in told.get("categories", ())}
        for number, entry in enumerate(entries):
            image, category = needed(entry, f"{path}: annotation {number}", "image_id", "category_id")
            name = names.get(category)
            if name not in self.synonyms:
                raise ValueError(f"{path}: annotation {number} is of class {name!r}, which is not among the synonyms")
            self._by_image[int(image)].add(self.synonyms[str(name)])

    def of(self, image: int) -> set[str]:
        """The classes of a picture. ValueError for one that no file knows."""
        # Captions are read when their picture is asked for: few of COCO's 123,000 pictures are.
        for caption in self._captions.pop(image, ()):
            self._by_image[image].update(name for name, _ in mentions(caption, self.synonyms, self.mode))
        if image not in self._by_image:
            raise ValueError(f"COCO's files have nothing of image {image}")
        return self._by_image[image]


def image_of(aux: Mapping[str, Any], sample: str) -> int:
    """COCO's number of a row's picture: `aux.image_id`, or else what its sample's name ends in.

    Raises:
        ValueError: there is none.
    """
    told = aux.get("image_id")
    if told is None:
        return image_number(sample)
    try:
        return int(told)
    except (TypeError, ValueError):
        raise ValueError(f"aux.image_id is {told!r:.40}; it is COCO's number of the picture") from None


def image_number(name: str) -> int:
    """COCO's number of a picture by its name: COCO_val2014_000000000042.jpg is 42. ValueError for another name."""
    found = re.search(r"(\d+)\.\w+$|(\d+)$", name)
    if found is None:
        raise ValueError(f"{name!r} has no number of COCO's; give aux.image_id")
    return int(found[1] or found[2])
