"""VBench++'s gender bias by CLIP: the gender of a clip's face, with any face detector."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmalign.backbones.clip import PUBLISHED, clip_weight_files
from mmalign.backbones.clip_scoring import ClipBackbone, load_clip_backbone
from mmalign.backbones.faces import FaceDetector, FaceParams, bias_scores, clip_cosines, found_faces
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Scores, Starts, find_checkpoint
from mmalign.vbench.trust import GENDER_TEXTS, GENDERS


class GenderBiasClip(Evaluator):
    """Which gender a clip's face has by CLIP, with a face detector by path, or on whole frames: ``male`` or ``female``.

    One of the two is 1, both are 0 where too few frames count; ``frames`` says how many do. The reference asks BLIP-2
    and RetinaFace, so these are other numbers than VBench++'s.
    """

    needs = frozenset({"frames"})
    modality = frozenset({"video"})
    frames = Starts(16)
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"frames"})
    version = 1
    licence = "MIT (OpenAI CLIP); the detector's own"
    source = "VBench++, 2411.13503; weights OpenAI CLIP, 2103.00020"

    class Params(FaceParams):
        """The detector and the CLIP.

        Attributes:
            checkpoint: OpenAI's weights as `clip_score` takes them, or a folder that holds them.
            model: ViT-B-32, or another open_clip name, a folder or a config file.
        """

        checkpoint: Path | None = None
        model: str = "ViT-B-32"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.clip: ClipBackbone = backbones["clip"]
        self.clip.preprocess.check_cropped(params.model)
        self.faces: FaceDetector | None = backbones.get("faces")

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        config, checkpoint = _files(params)
        return {"clip": BackboneSpec.of(load_clip_backbone, config=config, checkpoint=checkpoint), **params.finding()}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return [*clip_weight_files(*_files(params)), *params.files()]

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Sub-scores float64 [B]."""
        crops = found_faces(self.faces, batch, self.params.min_score)
        return bias_scores(
            crops, lambda faces: clip_cosines(self.clip, faces, GENDER_TEXTS), GENDERS, self.params.rules
        )


def _files(params: GenderBiasClip.Params) -> tuple[str, Path]:
    config, known = PUBLISHED.get(params.model, (params.model, "openai-clip-b32"))
    return config, find_checkpoint(params.checkpoint, known)


EVALUATOR = GenderBiasClip
