"""imaging_quality of VBench: distortions of single frames (noise, blur, exposure), rated by MUSIQ."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.musiq import Musiq, load_musiq
from mmalign.evaluation import AllFrames, BackboneSpec, Batch, Evaluator, Strict, find_checkpoint, score_ready
from mmalign.vbench.imaging import Mode, prepare, target

PATCHES = 4096  # that pass through the network at once: 16 frames of 16:9


class ImagingQuality(Evaluator):
    """VBench's imaging_quality: MUSIQ trained on SPAQ rates every frame from 0 to 100; a clip has their mean.

    The dimension's value is the mean over clips divided by 100. A still image is a clip of one frame.
    """

    needs = frozenset({"frames"})
    modality = frozenset({"image", "video"})
    frames = AllFrames()
    higher_is_better = True
    differentiable = True
    version = 1
    licence = "Apache-2.0 (Google's weights; the terms of their conversion were not read)"
    source = "MUSIQ, 2108.05997; VBench, 2311.17982; weights chaofengc/IQA-PyTorch-Weights"

    class Params(Strict):
        """Which file, and how frames are resized before MUSIQ makes its own scales of them.

        Attributes:
            checkpoint: musiq_spaq_ckpt-358bb6af.pth, or a folder that holds it; of any size of network.
            mode: the side that becomes 512 pixels where it has more: longer, the default of VBench; shorter; or
                shorter_centercrop, which also cuts out the middle; None keeps the size.
            rules: compat cuts sides to integers as VBench does (511 instead of 512 for some sizes); strict rounds.
        """

        checkpoint: Path | None = None
        mode: Mode = "longer"
        rules: Literal["compat", "strict"] = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.musiq: Musiq = backbones["musiq"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"musiq": BackboneSpec.of(load_musiq, checkpoint=find_checkpoint(params.checkpoint, "musiq-spaq"))}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return [find_checkpoint(params.checkpoint, "musiq-spaq")]

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        clips = batch.clips()

        def fits(place: int) -> int:
            return self._per_pass(clips[place])

        def means(places: Sequence[int], numbers: Sequence[int]) -> Tensor:
            rated = (self._rate(clips[i], number) for i, number in zip(places, numbers, strict=True))
            return torch.stack([ratings.double().mean() for ratings in rated])

        return score_ready(len(batch), fits, means)

    def score_tensor(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._rate(images * 255, self._per_pass(images))

    def _per_pass(self, frames: Tensor) -> int:
        """How many frames go through the network at once; ValueError where they are too narrow for it."""
        height, width = frames.shape[-2:]
        return max(1, PATCHES // Musiq.count(*target(height, width, self.params.mode, self.params.rules == "strict")))

    def _rate(self, frames: Tensor, number: int) -> Tensor:
        """Ratings float32 [T] of frames [T, 3, H, W] from 0 to 255, `number` at a time."""
        strict = self.params.rules == "strict"
        parts = (prepare(part.to(self.device), self.params.mode, strict) for part in frames.split(number))
        return torch.cat([self.musiq(part) for part in parts])


EVALUATOR = ImagingQuality
