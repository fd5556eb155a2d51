"""VBench's background consistency: how much a clip's scene stays itself, in CLIP's features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.clip import PUBLISHED, clip_weight_files
from mmalign.backbones.clip_scoring import (
    ClipBackbone,
    Geometry,
    frame_features,
    load_clip_backbone,
    resize_crop,
)
from mmalign.evaluation import AllFrames, BackboneSpec, Batch, Evaluator, Scores, Strict, find_checkpoint, score_ready
from mmalign.vbench.consistency import consistency, pair_count

CLIP_224 = Geometry.of(resize_crop, antialias=False)


class BackgroundConsistency(Evaluator):
    """VBench background_consistency: cosines of CLIP ViT-B/32's features of each frame with the last and the first.

    The frame before it, that is, and the clip's first; the mean over all frames but the first, negative cosines counted
    as 0. ``pairs`` says how many these are: the reference takes the mean over the pairs of all clips.
    """

    needs = frozenset({"frames"})
    modality = frozenset({"video"})
    frames = AllFrames()
    score_range = (0.0, 1.0)
    counts = frozenset({"pairs"})
    differentiable = True
    licence = "MIT (OpenAI CLIP)"
    source = "VBench, 2311.17982; weights OpenAI CLIP, 2103.00020"

    class Params(Strict):
        """Which CLIP.

        Attributes:
            checkpoint: OpenAI's weights of ``model`` with open_clip's or transformers' names, or a folder that holds
                them.
            model: ViT-B-32 is VBench's; another of OpenAI's names, a folder or a config file gives another measure.
        """

        checkpoint: Path | None = None
        model: str = "ViT-B-32"

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
        """``score`` and ``pairs``, [B]; ValueError for an item of one frame, where the reference divides by 0."""
        counts = [len(clip) for clip in batch.frames]

        def measured(places: Sequence[int], pairs: Sequence[int]) -> dict[str, Tensor]:
            features = frame_features(self.clip, batch, CLIP_224).split(counts)
            scores = torch.stack([consistency(features[place]) for place in places])
            return {"score": scores, "pairs": torch.tensor(pairs, dtype=torch.float64)}

        return score_ready(len(batch), lambda place: pair_count(counts[place]), measured)

    def score_tensor(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Clips float [B, T, 3, H, W] in [0, 1] -> float32 [B]; prompts are not read."""
        features = self.clip.images(images.flatten(0, 1), CLIP_224).unflatten(0, images.shape[:2])
        return torch.stack([consistency(clip) for clip in features])


def _files(params: BackgroundConsistency.Params) -> tuple[str, Path]:
    config, known = PUBLISHED.get(params.model, (params.model, "openai-clip-b32"))
    return config, find_checkpoint(params.checkpoint, known)


EVALUATOR = BackgroundConsistency
