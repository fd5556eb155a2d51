"""CHAIR: objects that a caption mentions and its picture does not have (Rohrbach et al. 1809.02156).

A picture's objects are those of COCO's instances and those that its five reference captions mention. CHAIR_i is the
share of mentions that are hallucinated, repeats counted; CHAIR_s the share of captions with one. Recall and length
stand beside them: who says less hallucinates less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmalign.hallucination.coco import Objects
from mmalign.hallucination.words import mentions, tokens

__all__ = ["counted", "figures", "judged"]


def judged(response: str, truth: set[str], objects: Objects) -> tuple[dict[str, float], list[str]]:
    """What `counted` tells of one caption, and its words; the mentioned classes that are not in the picture."""
    found = [name for name, _ in mentions(response, objects.synonyms, objects.mode)]
    wrong = [name for name in found if name not in truth]
    return {**counted(found, truth), "words": float(len(tokens(response)))}, wrong


def counted(found: Sequence[str], truth: set[str]) -> dict[str, float]:
    """Of the classes that are mentioned and those of the picture: right (share of mentions; 1 without one), mentions,
    hallucinated (not in the picture), objects (of the picture), found (of these)."""
    wrong = sum(name not in truth for name in found)
    return {
        "right": 1 - wrong / len(found) if found else 1.0,
        "mentions": float(len(found)),
        "hallucinated": float(wrong),
        "objects": float(len(truth)),
        "found": float(len(truth & set(found))),
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
