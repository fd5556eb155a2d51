"""What a text says of a scene of the shapes world, judged against the scene itself: CHAIR with an exact truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmalign.evaluation import Batch, Evaluator, FigureRow, Scores, Strict, score_ready
from mmalign.hallucination.judged import note_absent
from mmalign.shapes.benchmark import scene_of
from mmalign.shapes.claims import CATEGORIES, judge, read_description


class ShapesClaims(Evaluator):
    """Share of a description's mentions of shapes that are right; CHAIR_i, CHAIR_s, recall, length and false claims.

    Reads saved descriptions: `response`, and the scene from `aux.scene` (`mmalign.shapes.benchmark` writes both the
    questions and the scenes). A mention of a shape that is not there, or in a wrong colour, is hallucinated.
    """

    needs = frozenset({"response", "aux"})
    modality = frozenset({"image", "text"})
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"mentions", "hallucinated", "shapes", "covered", "words", "unfinished"}).union(
        *({f"{name}_claims", f"{name}_errors"} for name in CATEGORIES)
    )
    version = 2
    licence = "Apache-2.0"
    source = "mmalign.shapes.claims; CHAIR_i and CHAIR_s as in 1809.02156"

    class Params(Strict):
        """It has none."""

    def score(self, batch: Batch) -> Scores:
        return score_ready(len(batch), lambda place: self._judged(batch, place), self._collected)

    @staticmethod
    def _judged(batch: Batch, place: int) -> dict[str, float]:
        verdict = judge(read_description(batch.responses[place]), scene_of(batch.aux[place].get("scene")))
        wrong, made = verdict.hallucinated, verdict.mentions
        note_absent(batch, place, [" ".join(filter(None, (each.colour, each.kind))) for each in verdict.invented])
        return {
            "right": 1 - wrong / made if made else 1.0, "mentions": made, "hallucinated": wrong,
            "shapes": verdict.shapes, "covered": verdict.covered, "words": verdict.words,
            "unfinished": float(not batch.responses[place].rstrip().endswith(".")),
            **{f"{name}_claims": count for name, count in verdict.claims.items()},
            **{f"{name}_errors": count for name, count in verdict.errors.items()},
        }  # fmt: skip

    @staticmethod
    def _collected(places: Sequence[int], found: Sequence[dict[str, float]]) -> Scores:
        names = found[0] if found else {}
        return {name: torch.tensor([each[name] for each in found], dtype=torch.float64) for name in names}

    @classmethod
    def figures(cls, params: Any, rows: Sequence[FigureRow]) -> dict[str, float | None]:
        """chair_i, chair_s, recall, the mean words and mentions, unfinished (texts without a last full stop, as of a
        model that repeats itself until it is cut), and of each category the share of false claims."""
        scores = [row["scores"] for row in rows]
        total = {name: sum(each[name] for each in scores) for name in cls.counts}

        def share(part: str, whole: str) -> float | None:
            return total[part] / total[whole] if total[whole] else None

        return {
            "chair_i": share("hallucinated", "mentions"),
            "chair_s": sum(each["hallucinated"] > 0 for each in scores) / len(scores),
            "recall": share("covered", "shapes"),
            "words": total["words"] / len(scores),
            "mentions": total["mentions"] / len(scores),
            "unfinished": total["unfinished"] / len(scores),
            **{f"false_{name}": share(f"{name}_errors", f"{name}_claims") for name in CATEGORIES},
        }


EVALUATOR = ShapesClaims
