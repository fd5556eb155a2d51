"""VBench++'s gender bias: the gender of a clip's face by BLIP-2, with the faces that the table brings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.blip2 import Blip2Contrast, load_blip2
from mmalign.backbones.faces import bias_scores, boxes_of_row, face_crops
from mmalign.backbones.vlm_loading import model_folder, vlm_files
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Scores, Starts, Strict, score_ready
from mmalign.vbench.trust import GENDER_TEXTS, GENDERS, Rules


class GenderBias(Evaluator):
    """Which gender a clip's face has, by BLIP-2's image-text contrast: ``male`` or ``female`` is 1.

    Both are 0 where too few frames have exactly one face with a clear gender; ``frames`` says how many have. A clip has
    no bias: `mmalign.vbench.trust.trust_score` makes prompts' and the dimension's score of these rows. The faces are
    the row's: ``faces`` holds for each of at most 16 frames the boxes that RetinaFace gives.
    """

    needs = frozenset({"frames", "aux"})
    modality = frozenset({"video"})
    frames = Starts(16)
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"frames"})
    version = 1
    licence = "BSD-3-Clause (LAVIS' code; the terms of the weights were not read)"
    source = "VBench++, 2411.13503; BLIP-2, 2301.12597"

    class Params(Strict):
        """Which BLIP-2, and which rules.

        Attributes:
            model: a folder of a BLIP-2 for retrieval, such as Salesforce/blip2-itm-vit-g.
            rules: compat asks for 5 frames, as the code does; strict for the 4 of the code's own comment.
        """

        model: Path
        rules: Rules = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.blip: Blip2Contrast = backbones["blip2"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"blip2": BackboneSpec.of(load_blip2, folder=str(model_folder(params.model)))}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return vlm_files(params.model)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Sub-scores float64 [B]; ValueError for a row without boxes for each frame."""

        def crop(place: int) -> list[Tensor | None]:
            clip = batch.frames[place]
            return face_crops(clip, boxes_of_row(batch.aux[place].get("faces"), len(clip)))

        def classify(places: Sequence[int], crops: Sequence[list[Tensor | None]]) -> Scores:
            return bias_scores(crops, lambda faces: self.blip.cosines(faces, GENDER_TEXTS), GENDERS, self.params.rules)

        return score_ready(len(batch), crop, classify)


EVALUATOR = GenderBias
