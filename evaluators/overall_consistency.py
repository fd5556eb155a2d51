"""VBench's overall consistency: how well a clip's ViCLIP features agree with those of its whole prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.viclip import ViClip, load_viclip, video_features
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Middle, Strict, find_checkpoint


class OverallConsistency(Evaluator):
    """VBench overall_consistency: cosine of ViCLIP's features of 8 frames and of the prompt.

    It can be below 0; the benchmark's totals take 0 to 0.364 for the ends of its scale. Prompts of more than 32 tokens
    are cut.
    """

    needs = frozenset({"frames", "prompt"})
    modality = frozenset({"video"})
    frames = Middle(8)
    score_range = (-1.0, 1.0)
    differentiable = True
    licence = "MIT (weights, as their repository's card says)"
    source = "VBench, 2311.17982; ViCLIP of InternVid, 2307.06942"

    class Params(Strict):
        """Which weights.

        Attributes:
            checkpoint: ViClip-InternVid-10M-FLT as .pth or .safetensors, or a folder that holds it.
        """

        checkpoint: Path | None = None

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.viclip: ViClip = backbones["viclip"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"viclip": BackboneSpec.of(load_viclip, checkpoint=_file(params))}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return [_file(params)]

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """Cosines float32 [B]."""
        return (video_features(self.viclip, batch) * self.viclip.texts(batch.prompts)).sum(dim=-1)

    def score_tensor(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Clips float [B, T, 3, H, W] in [0, 1] -> [B]; the gradient passes the roundings to 8-bit levels."""
        return (self.viclip.video_tensor(images) * self.viclip.texts(prompts)).sum(dim=-1)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return self.viclip.truncated(prompts)


def _file(params: OverallConsistency.Params) -> Path:
    return find_checkpoint(params.checkpoint, "viclip-internvid-10m-flt")


EVALUATOR = OverallConsistency
