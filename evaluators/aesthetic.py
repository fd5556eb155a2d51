"""LAION's aesthetic predictors v1 and v2, a rating from the image alone on OpenAI's CLIP."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmalign.backbones.clip import PUBLISHED, clip_weight_files
from mmalign.backbones.clip_scoring import (
    OPENAI_CROP,
    ClipBackbone,
    Geometry,
    clip_means,
    frame_features,
    load_clip_backbone,
    resize_crop,
)
from mmalign.backbones.heads import load_head
from mmalign.evaluation import (
    AllFrames,
    BackboneSpec,
    Batch,
    Evaluator,
    Strict,
    find_checkpoint,
)

V1_FILES = {"openai-clip-b32": "aesthetic-v1-b32", "openai-clip-b16": "aesthetic-v1-b16"}


class Aesthetic(Evaluator):
    """LAION aesthetic rating v1 / v2: a head on unit-length CLIP features, affine but for one, about 1 to 10.

    Typical values are 4.5 to 6.5; the map itself has no bounds. A video's score is the mean over all its frames: with
    ``head: v1``, ``divide_by: 10`` and ``antialias: false`` that is VBench's ``aesthetic_quality``, but for VBench's
    own decoding and fp16.
    """

    needs = frozenset({"frames"})
    modality = frozenset({"image", "video"})
    frames = AllFrames()
    higher_is_better = True
    differentiable = True
    version = 3
    licence = "MIT (v1), Apache-2.0 (v2)"
    source = "LAION aesthetic-predictor and improved-aesthetic-predictor; weights OpenAI CLIP, 2103.00020"

    class Params(Strict):
        """Which head, on which CLIP.

        Attributes:
            checkpoint: the head's file, or a folder that holds it under its published name.
            clip_checkpoint: OpenAI's weights of ``model`` with open_clip's or transformers' names, or a folder that
                holds them.
            head: v1 (sa_0_4_vit_l_14_linear.pth, and files for ViT-B-32 and ViT-B-16); v2
                (sac+logos+ava1-l14-linearMSE.pth); v2-ava-logos (ava+logos-l14-linearMSE.pth); v2-ava-logos-relu
                (ava+logos-l14-reluMSE.pth), the only one that is not affine.
            model: the CLIP that the head was fitted on: ViT-L-14, for v1 also ViT-B-32 and ViT-B-16, all OpenAI's with
                QuickGELU; or another open_clip name, a folder or a config file.
            divide_by: above 0; VBench divides v1 by 10.
            antialias: False resizes without a filter, as VBench does; the heads' authors filter (PIL).
        """

        checkpoint: Path | None = None
        clip_checkpoint: Path | None = None
        head: Literal["v1", "v2", "v2-ava-logos", "v2-ava-logos-relu"] = "v2"
        model: str = "ViT-L-14"
        divide_by: float = Field(1.0, gt=0)
        antialias: bool = True

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.clip: ClipBackbone = backbones["clip"]
        self.clip.preprocess.check_cropped(params.model)
        self.geometry = OPENAI_CROP if params.antialias else Geometry.of(resize_crop, antialias=False)
        self.head: nn.Sequential = backbones["head"]
        taken = self.head[0].in_features
        if taken != self.clip.width:
            raise ValueError(
                f"{_files(params)[0]}: this head rates {taken} features, but {params.model} gives {self.clip.width}; "
                "the published l14 heads belong to OpenAI's ViT-L/14, b_32 and b_16 to its ViT-B/32 and ViT-B/16."
            )

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        head, config, clip = _files(params)
        return {
            "clip": BackboneSpec.of(load_clip_backbone, config=config, checkpoint=clip),
            "head": BackboneSpec.of(load_head, checkpoint=head, head=params.head),
        }

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        head, config, clip = _files(params)
        return [head, *clip_weight_files(config, clip)]

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        return clip_means(self._rate(frame_features(self.clip, batch, self.geometry)), batch.clips())

    def score_tensor(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._rate(self.clip.images(images, self.geometry))

    def _rate(self, features: Tensor) -> Tensor:
        return self.head(features).squeeze(-1) / self.params.divide_by


def _files(params: Aesthetic.Params) -> tuple[Path, str, Path]:
    """The head's file, the CLIP's config, its file."""
    config, known = PUBLISHED.get(params.model, (params.model, "openai-clip-l14"))
    name = V1_FILES.get(known, "aesthetic-v1") if params.head == "v1" else f"aesthetic-{params.head}"
    head = find_checkpoint(params.checkpoint, name)
    return head, config, find_checkpoint(params.clip_checkpoint, known, "clip_checkpoint")


EVALUATOR = Aesthetic
