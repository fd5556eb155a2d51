"""CHAIR: objects that a caption mentions and its picture does not have (Rohrbach et al. 1809.02156).

A picture's objects are those of COCO's instances and those that its five reference captions mention. CHAIR_i is the
share of mentions that are hallucinated, repeats counted; CHAIR_s the share of captions with one. Recall and length
stand beside them: who says less hallucinates less.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.hallucination.files import json_rows, needed
from mmalign.hallucination.words import Mode, mentions, read_synonyms, tokens


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
                self._by_image[int(image)].update(name for name, _ in mentions(caption, self.synonyms, self.mode))
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
        if image not in self._by_image:
            raise ValueError(f"COCO's files have nothing of image {image}")
        return self._by_image[image]


def image_number(name: str) -> int:
    """COCO's number of a picture by its name: COCO_val2014_000000000042.jpg is 42. ValueError for another name."""
    found = re.search(r"(\d+)\.\w+$|(\d+)$", name)
    if found is None:
        raise ValueError(f"{name!r} has no number of COCO's; give aux.image_id")
    return int(found[1] or found[2])


def judged(response: str, truth: set[str], objects: Objects) -> dict[str, float]:
    """Counts of one caption: mentions, hallucinated mentions, classes of the picture and those found, words."""
    found = [name for name, _ in mentions(response, objects.synonyms, objects.mode)]
    return {
        "mentions": float(len(found)),
        "hallucinated": float(sum(name not in truth for name in found)),
        "objects": float(len(truth)),
        "found": float(len(truth & set(found))),
        "words": float(len(tokens(response))),
    }


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """`chair_i`, `chair_s`, `chair_s_mentioning` (of captions that mention any object, as Object HalBench counts),
    `recall` (classes found of all there are) and the mean `words`."""
    scores = [row["scores"] for row in rows]
    total = {
        name: sum(each[name] for each in scores) for name in ("mentions", "hallucinated", "objects", "found", "words")
    }
    wrong = sum(each["hallucinated"] > 0 for each in scores)
    mentioning = sum(each["mentions"] > 0 for each in scores)
    return {
        "chair_i": total["hallucinated"] / total["mentions"] if total["mentions"] else None,
        "chair_s": wrong / len(scores),
        "chair_s_mentioning": wrong / mentioning if mentioning else None,
        "recall": total["found"] / total["objects"] if total["objects"] else None,
        "words": total["words"] / len(scores),
    }
