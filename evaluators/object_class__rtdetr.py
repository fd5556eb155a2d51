"""VBench's object_class with a detector of transformers in the place of GRiT (Huang et al., 2311.17982)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from mmalign.backbones.coco_detector import (
    CocoDetector,
    clip_objects,
    detector_folder,
    detector_folder_files,
    load_coco_detector,
)
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Middle, Scores, Strict, score_ready
from mmalign.vbench import rules


class ObjectClassByDetector(Evaluator):
    """Share of 16 frames of a clip in which a detector on COCO's classes finds the object.

    A substitute for VBench's object_class: the same rule on another detector's boxes, so its
    numbers are not comparable with published ones. ``frames`` is how many frames were looked at.
    """

    needs = frozenset({"frames", "aux"})
    modality = frozenset({"image", "video"})
    frames = Middle(16)
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"frames"})
    version = 1
    licence = "Apache-2.0 (RT-DETRv2); another detector's own"
    source = "VBench, 2311.17982 (object_class.py); detector RT-DETRv2, 2407.17140, or your own"

    class Params(Strict):
        """Which detector.

        Attributes:
            detector: a folder of a detector on COCO's classes, as transformers saves it (RT-DETR, D-FINE, DETR, ...).
            threshold: what the score of a detection has to be above.
        """

        detector: Path | None = None
        threshold: float = Field(0.5, ge=0, lt=1)

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.detector: CocoDetector = backbones["detector"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"detector": BackboneSpec.of(load_coco_detector, folder=detector_folder(params.detector))}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return detector_folder_files(params.detector)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Sub-scores float32 [B]: ``score`` and ``frames``. Rows that lack what is asked, or ask for a class that the
        detector does not know, are `ItemErrors`."""

        def ask(place: int) -> tuple[str, ...]:
            wanted = rules.asked(batch.aux[place], "object")
            self.detector.check_names(wanted)
            return wanted

        def judge(places: Sequence[int], wanted: Sequence[tuple[str, ...]]) -> Scores:
            found = clip_objects(self.detector, batch, self.params.threshold)
            clips = [[[rules.Detection(*one) for one in frame] for frame in found[place]] for place in places]
            return rules.scores([rules.object_class(clip, *names) for clip, names in zip(clips, wanted, strict=True)])

        return score_ready(len(batch), ask, judge)


EVALUATOR = ObjectClassByDetector
