"""VBench's aesthetic quality: LAION's first rating of every frame, on CLIP's features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.backbones.clip import PUBLISHED, clip_weight_files
from mmalign.backbones.clip_scoring import (
    ClipBackbone,
    Geometry,
    clip_means,
    frame_features,
    load_clip_backbone,
    resize_crop,
)
from mmalign.backbones.heads import load_head
from mmalign.evaluation import AllFrames, BackboneSpec, Batch, Evaluator, Strict, find_checkpoint

CLIP_224 = Geometry.of(resize_crop, antialias=False)


class AestheticQuality(Evaluator):
    """VBench aesthetic_quality: LAION's linear aesthetic rating (v1) on CLIP ViT-L/14, divided by 10, mean over frames.

    Typical values are 0.4 to 0.7; the map itself has no bounds. `aesthetic` has the other heads, and a filter before
    pictures are shrunk.
    """

    needs = frozenset({"frames"})
    modality = frozenset({"image", "video"})
    frames = AllFrames()
    differentiable = True
    licence = "MIT"
    source = "VBench, 2311.17982; LAION aesthetic-predictor; weights OpenAI CLIP, 2103.00020"

    class Params(Strict):
        """Whose weights.

        Attributes:
            checkpoint: the head (sa_0_4_vit_l_14_linear.pth), or a folder that holds it.
            clip_checkpoint: OpenAI's weights of ``model`` with open_clip's or transformers' names, or a folder that
                holds them.
            model: ViT-L-14 is VBench's; a folder or a config file of another CLIP needs a head of its own.
        """

        checkpoint: Path | None = None
        clip_checkpoint: Path | None = None
        model: str = "ViT-L-14"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.clip: ClipBackbone = backbones["clip"]
        self.clip.preprocess.check_cropped(params.model)
        self.head: nn.Sequential = backbones["head"]
        taken = self.head[0].in_features
        if taken != self.clip.width:
            raise ValueError(
                f"{_files(params)[0]}: this head rates {taken} features, but {params.model} gives {self.clip.width}; "
                "the published head belongs to OpenAI's ViT-L/14."
            )

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        head, config, clip = _files(params)
        return {
            "clip": BackboneSpec.of(load_clip_backbone, config=config, checkpoint=clip),
            "head": BackboneSpec.of(load_head, checkpoint=head, head="v1"),
        }

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        head, config, clip = _files(params)
        return [head, *clip_weight_files(config, clip)]

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        return clip_means(self._rate(frame_features(self.clip, batch, CLIP_224)), batch.clips())

    def score_tensor(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._rate(self.clip.images(images, CLIP_224))

    def _rate(self, features: Tensor) -> Tensor:
        return self.head(features).squeeze(-1) / 10


def _files(params: AestheticQuality.Params) -> tuple[Path, str, Path]:
    """The head's file, the CLIP's config, its file."""
    config, known = PUBLISHED.get(params.model, (params.model, "openai-clip-l14"))
    head = find_checkpoint(params.checkpoint, "aesthetic-v1")
    return head, config, find_checkpoint(params.clip_checkpoint, known, "clip_checkpoint")


EVALUATOR = AestheticQuality
