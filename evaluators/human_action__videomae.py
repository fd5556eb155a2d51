"""The action that a prompt names, as a video classifier of transformers sees it: a substitute for VBench's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.video_classifier import VideoClassifier, load_video_classifier
from mmalign.backbones.vlm_loading import vlm_files
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Middle, Scores, Strict, score_ready
from mmalign.vbench.actions import asked_label, place_of, top_five

FRAMES = 16


class HumanActionVideoMAE(Evaluator):
    """Like VBench's human_action, by another classifier: 1 where the prompt's action is in its top 5.

    Any video classifier of transformers that reads up to 16 frames, such as VideoMAE on Kinetics-400. Sub-scores:
    ``score`` (0 or 1) and ``probability``, the softmax of the class. Values are not comparable with human_action's, and
    are in no total that is.
    """

    needs = frozenset({"frames", "prompt"})
    modality = frozenset({"video"})
    frames = Middle(FRAMES)
    score_range = (0.0, 1.0)
    licence = "the model's own (VideoMAE's weights: CC-BY-NC-4.0)"
    source = "a classifier of transformers in place of UMT; dimension of VBench, 2311.17982"

    class Params(Strict):
        """Which classifier.

        Attributes:
            model: a transformers folder with config.json, weights and preprocessor_config.json, such as that of
                MCG-NJU/videomae-base-finetuned-kinetics.
        """

        model: Path

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.classifier: VideoClassifier = backbones["classifier"]
        if self.classifier.frames > FRAMES:
            raise ValueError(
                f"human_action@videomae: {params.model} reads {self.classifier.frames} frames, and {FRAMES} are taken "
                "of a clip; give a classifier that reads no more, as VideoMAE does."
            )

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"classifier": BackboneSpec.of(load_video_classifier, model=params.model)}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return vlm_files(params.model)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """``score`` and ``probability`` [B]; ValueError for a prompt that names none of the classes."""

        def judged(places: Sequence[int], asked: Sequence[int]) -> dict[str, Tensor]:
            logits = self.classifier.logits([batch.frames[place] for place in places]).cpu()
            found = [float(top_five(row, place)) for row, place in zip(logits, asked, strict=True)]
            likely = logits.softmax(dim=1)[torch.arange(len(asked)), torch.tensor(asked)]
            return {"score": torch.tensor(found), "probability": likely}

        return score_ready(len(batch), lambda place: self._class(batch.prompts[place]), judged)

    def _class(self, prompt: str) -> int:
        label = asked_label(prompt)
        place = place_of(label, self.classifier.classes)
        if place is None:
            raise ValueError(
                f"human_action@videomae: {label!r:.80} is none of the classifier's {len(self.classifier.classes)} "
                "classes (id2label of its config.json); write the prompt as 'A person is' and one of them."
            )
        return place


EVALUATOR = HumanActionVideoMAE
