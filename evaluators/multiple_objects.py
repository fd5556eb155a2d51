"""VBench's multiple_objects on detections that the reference's own GRiT made (Huang et al., 2311.17982)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmalign.evaluation import Batch, Evaluator, Scores, Strict, Uniform, score_ready
from mmalign.vbench import rules
from mmalign.vbench.detections import read_seen, seen_files


class MultipleObjects(Evaluator):
    """Share of a clip's frames in which both objects are found, from detections in a file.

    Exact where the file holds what the reference's GRiT found in its 16 "middle" frames.
    ``frames`` is how many frames the file has of the clip.
    """

    needs = frozenset({"frames", "aux", "sample"})
    modality = frozenset({"image", "video"})
    frames = Uniform(1)  # the clip itself is not looked at
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"frames"})
    version = 1
    licence = "Apache-2.0; of the detections, their maker's"
    source = "VBench, 2311.17982 (multiple_objects.py); detections by GRiT, 2212.00280"

    class Params(Strict):
        """Attributes: detections: a JSONL file with a line for each clip; see `mmalign.vbench.detections`."""

        detections: Path

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.seen = read_seen(params.detections)

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return seen_files(params.detections)

    def score(self, batch: Batch) -> Scores:
        """Sub-scores float32 [B]: ``score`` and ``frames``. Rows that lack what is asked, or a line in the file, are
        `ItemErrors`."""

        def judge(place: int) -> rules.Outcome:
            (both,) = rules.asked(batch.aux[place], "object")
            return rules.multiple_objects(self.seen.frames(batch.samples[place]), rules.two_objects(both))

        return score_ready(len(batch), judge, lambda places, found: rules.scores(found))


EVALUATOR = MultipleObjects
