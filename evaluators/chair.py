"""CHAIR: objects that a caption mentions and its COCO picture does not have."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from mmalign.evaluation import Batch, Evaluator, FigureRow, Scores, Strict, score_ready
from mmalign.hallucination.chair import Objects, figures, image_number, judged


class Chair(Evaluator):
    """Share of a caption's mentions of COCO objects that are right; CHAIR_i, CHAIR_s and recall of all captions.

    Reads saved captions: `response`, and COCO's number of the picture from `aux.image_id` or the end of its name.
    """

    needs = frozenset({"response", "aux", "sample"})
    modality = frozenset({"image", "text"})
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"mentions", "hallucinated", "objects", "found", "words"})
    version = 1
    licence = "the synonyms' own: see LisaAnne/Hallucination; COCO's annotations CC BY 4.0"
    source = "CHAIR, 1809.02156; LisaAnne/Hallucination (rules written anew)"

    class Params(Strict):
        """COCO's files, and how words are read.

        Attributes:
            synonyms: CHAIR's synonyms.txt, a class per line.
            objects: instances_*.json and captions_*.json of COCO 2014; a picture's objects are what any of them has.
            mode: strict, or compat with the known faults of the original (no "bus" is ever found).
        """

        synonyms: Path
        objects: tuple[Path, ...] = Field(min_length=1)
        mode: Literal["strict", "compat"] = "strict"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.known = Objects(params.synonyms, params.objects, params.mode)

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        files = [file.expanduser() for file in (params.synonyms, *params.objects)]
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} is not there; docs/scorers/chair.md says where these files are from")
        return files

    def score(self, batch: Batch) -> Scores:
        return score_ready(len(batch), lambda place: self._judged(batch, place), self._collected)

    def _judged(self, batch: Batch, place: int) -> dict[str, float]:
        told = batch.aux[place].get("image_id")
        image = int(told) if told is not None else image_number(batch.samples[place])
        found = judged(batch.responses[place], self.known.of(image), self.known)
        right = 1 - found["hallucinated"] / found["mentions"] if found["mentions"] else 1.0
        return {"right": right, **found}

    @staticmethod
    def _collected(places: Sequence[int], found: Sequence[dict[str, float]]) -> Scores:
        return {name: torch.tensor([each[name] for each in found], dtype=torch.float64) for name in found[0]}

    @classmethod
    def figures(cls, params: Any, rows: Sequence[FigureRow]) -> dict[str, float | None]:
        return figures(rows)


EVALUATOR = Chair
