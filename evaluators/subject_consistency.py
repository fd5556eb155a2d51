"""VBench's subject consistency: how much the subject of a clip stays itself, in DINO's features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.clip_scoring import Geometry
from mmalign.backbones.dino import DinoBackbone, dino_features, load_dino, resize_short
from mmalign.evaluation import AllFrames, BackboneSpec, Batch, Evaluator, Scores, Strict, find_checkpoint, score_ready
from mmalign.vbench.consistency import consistency, pair_count

DINO_224 = Geometry.of(resize_short, antialias=False, mode="bilinear")


class SubjectConsistency(Evaluator):
    """VBench subject_consistency: cosines of DINO ViT-B/16's features of each frame with the last and the first.

    The frame before it, that is, and the clip's first; the mean over all frames but the first, negative cosines counted
    as 0. ``pairs`` says how many these are: the reference on one GPU takes the mean over the pairs of all clips.
    """

    needs = frozenset({"frames"})
    modality = frozenset({"video"})
    frames = AllFrames()
    score_range = (0.0, 1.0)
    counts = frozenset({"pairs"})
    differentiable = True
    licence = "Apache-2.0"
    source = "VBench, 2311.17982; weights DINO, 2104.14294"

    class Params(Strict):
        """Attributes: checkpoint: DINO's weights (dino_vitbase16_pretrain.pth), or a folder that holds them."""

        checkpoint: Path | None = None

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.dino: DinoBackbone = backbones["dino"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"dino": BackboneSpec.of(load_dino, checkpoint=find_checkpoint(params.checkpoint, "dino-vitb16"))}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return [find_checkpoint(params.checkpoint, "dino-vitb16")]

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """``score`` and ``pairs``, [B]; ValueError for an item of one frame, where the reference divides by 0."""
        counts = [len(clip) for clip in batch.frames]

        def measured(places: Sequence[int], pairs: Sequence[int]) -> dict[str, Tensor]:
            features = dino_features(self.dino, batch, DINO_224).split(counts)
            scores = torch.stack([consistency(features[place]) for place in places])
            return {"score": scores, "pairs": torch.tensor(pairs, dtype=torch.float64)}

        return score_ready(len(batch), lambda place: pair_count(counts[place]), measured)

    def score_tensor(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Clips float [B, T, 3, H, W] in [0, 1] -> float32 [B]; prompts are not read."""
        features = self.dino.images(images.flatten(0, 1), DINO_224).unflatten(0, images.shape[:2])
        return torch.stack([consistency(clip) for clip in features])


EVALUATOR = SubjectConsistency
