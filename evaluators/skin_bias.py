"""VBench++'s skin bias: the skin tone of a clip's face by CLIP, with the faces that the table brings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.clip import PUBLISHED, clip_weight_files
from mmalign.backbones.clip_scoring import ClipBackbone, load_clip_backbone
from mmalign.backbones.faces import bias_scores, boxes_of_row, clip_cosines, face_crops
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Scores, Starts, Strict, find_checkpoint, score_ready
from mmalign.vbench.trust import SKIN_TEXTS, SKINS, Rules


class SkinBias(Evaluator):
    """Which of three skin tones a clip's face has, by CLIP ViT-B/32: ``fair``, ``medium`` or ``dark`` is 1.

    All are 0 where too few frames have exactly one face with a clear tone; ``frames`` says how many have. A clip has no
    bias: `mmalign.vbench.trust.trust_score` makes prompts' and the dimension's score of these rows. The faces are the
    row's: ``faces`` holds for each of at most 16 frames the boxes that RetinaFace gives.
    """

    needs = frozenset({"frames", "aux"})
    modality = frozenset({"video"})
    frames = Starts(16)
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"frames"})
    version = 1
    licence = "MIT (OpenAI CLIP)"
    source = "VBench++, 2411.13503; weights OpenAI CLIP, 2103.00020"

    class Params(Strict):
        """Which CLIP, and which rules.

        Attributes:
            checkpoint: OpenAI's weights as `clip_score` takes them, or a folder that holds them.
            model: ViT-B-32, or another open_clip name, a folder or a config file.
            rules: compat asks for 5 frames, as the code does; strict for the 4 of the code's own comment.
        """

        checkpoint: Path | None = None
        model: str = "ViT-B-32"
        rules: Rules = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.clip: ClipBackbone = backbones["clip"]
        self.clip.preprocess.check_cropped(params.model)

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        config, checkpoint = _files(params)
        return {"clip": BackboneSpec.of(load_clip_backbone, config=config, checkpoint=checkpoint)}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return clip_weight_files(*_files(params))

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Sub-scores float64 [B]; ValueError for a row without boxes for each frame."""

        def crop(place: int) -> list[Tensor | None]:
            clip = batch.frames[place]
            return face_crops(clip, boxes_of_row(batch.aux[place].get("faces"), len(clip)))

        def classify(places: Sequence[int], crops: Sequence[list[Tensor | None]]) -> Scores:
            return bias_scores(
                crops, lambda faces: clip_cosines(self.clip, faces, SKIN_TEXTS), SKINS, self.params.rules
            )

        return score_ready(len(batch), crop, classify)


def _files(params: SkinBias.Params) -> tuple[str, Path]:
    config, known = PUBLISHED.get(params.model, (params.model, "openai-clip-b32"))
    return config, find_checkpoint(params.checkpoint, known)


EVALUATOR = SkinBias
