"""CHAIR: objects that a caption mentions and its COCO picture does not have."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from mmalign.evaluation import Batch, Evaluator, FigureRow, Scores, score_ready
from mmalign.hallucination.chair import figures, judged
from mmalign.hallucination.coco import CocoFiles, Objects, image_of
from mmalign.hallucination.judged import columns, note_absent


class Chair(Evaluator):
    """Share of a caption's mentions of COCO objects that are right; CHAIR_i, CHAIR_s and recall of all captions.

    Reads saved captions: `response`, and COCO's number of the picture from `aux.image_id` or the end of its name.
    """

    needs, may_read = frozenset({"response", "sample"}), frozenset({"aux"})
    modality = frozenset({"image", "text"})
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"mentions", "hallucinated", "objects", "found", "words"})
    version = 1
    licence = "the synonyms' own: see LisaAnne/Hallucination; COCO's annotations CC BY 4.0"
    source = "CHAIR, 1809.02156; LisaAnne/Hallucination (rules written anew)"

    class Params(CocoFiles):
        """COCO's files, and how words are read.

        Attributes:
            mode: strict, or compat with the known faults of the original (no "bus" is ever found).
        """

        mode: Literal["strict", "compat"] = "strict"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.known = Objects(params.synonyms, params.objects, params.mode)

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return params.files("docs/scorers/chair.md")

    def score(self, batch: Batch) -> Scores:
        return score_ready(len(batch), lambda place: self._judged(batch, place), lambda _, found: columns(found))

    def _judged(self, batch: Batch, place: int) -> dict[str, float]:
        image = image_of(batch.aux[place] if batch.aux else {}, batch.samples[place])
        counts, wrong = judged(batch.responses[place], self.known.of(image), self.known)
        note_absent(batch, place, wrong)
        return counts

    @classmethod
    def figures(cls, params: Any, rows: Sequence[FigureRow]) -> dict[str, float | None]:
        return figures(rows)


EVALUATOR = Chair
