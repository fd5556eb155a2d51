"""motion_smoothness of VBench: how well frames are foretold by interpolating between their neighbours with AMT-S."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.amt import MULTIPLE, SMALLEST, Amt, load_amt
from mmalign.backbones.amt_flow import VOLUME
from mmalign.evaluation import AllFrames, BackboneSpec, Batch, Evaluator, Strict, find_checkpoint, score_ready
from mmalign.vbench.smoothness import differences, levels, margins, pairs, smoothness, surround

PIXELS = 2_097_152  # of the frames that are drawn at once


class MotionSmoothness(Evaluator):
    """VBench's motion_smoothness: every second frame is dropped and drawn again; 1 less the mean difference / 255.

    Frames 0, 2, 4, ... are kept, and AMT-S draws the middle of each two in a row. A clip with an even number of frames
    has a last one that nothing is compared with. The network's weights are for non-commercial use only.
    """

    needs = frozenset({"frames"})
    modality = frozenset({"video"})
    frames = AllFrames()
    higher_is_better = True
    score_range = (0.0, 1.0)
    differentiable = True
    version = 1
    licence = "CC-BY-NC-4.0 (AMT's weights: no commercial use)"
    source = "AMT, 2304.09790; VBench, 2311.17982; weights lalala125/AMT"

    class Params(Strict):
        """Which file, and how a drawn frame becomes whole numbers.

        Attributes:
            checkpoint: amt-s.pth, or a folder that holds it; of any size of network.
            rules: compat cuts drawn values to integers as VBench's cast does; strict rounds them.
        """

        checkpoint: Path | None = None
        rules: Literal["compat", "strict"] = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.amt: Amt = backbones["amt"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"amt": BackboneSpec.of(load_amt, checkpoint=find_checkpoint(params.checkpoint, "amt-s"))}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return [find_checkpoint(params.checkpoint, "amt-s")]

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        clips = batch.clips()
        return score_ready(
            len(batch),
            lambda place: self._per_pass(clips[place]),
            lambda places, numbers: torch.stack(
                [self._smoothness(clips[i], number) for i, number in zip(places, numbers, strict=True)]
            ),
        )

    def score_tensor(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Clips float [B, T, 3, H, W] in [0, 1] -> float32 [B].

        Raises:
            ValueError: not such clips, or too short or small ones.
        """
        if images.ndim != 5:
            raise ValueError(f"motion_smoothness takes clips [B, T, 3, H, W], got {list(images.shape)}")
        number = self._per_pass(images[0])
        return torch.stack([self._smoothness(clip * 255, number) for clip in images]).float()

    def _per_pass(self, clip: Tensor) -> int:
        """How many pairs go through the network at once; ValueError where the clip cannot be scored."""
        pairs(len(clip))
        height, width = clip.shape[-2:]
        left, right, top, bottom = margins(height, width, MULTIPLE, SMALLEST)
        size = (height + top + bottom) * (width + left + right)
        volume = (size // 64) ** 2 * 4 // 3  # of a pair's correlations in one direction
        return max(1, min(PIXELS // size, VOLUME // volume))

    def _smoothness(self, clip: Tensor, number: int) -> Tensor:
        """A clip's score, from frames [T, 3, H, W] from 0 to 255, `number` pairs at a time; a scalar in float64."""
        count, (height, width) = pairs(len(clip)), clip.shape[-2:]
        around = margins(height, width, MULTIPLE, SMALLEST)
        inner = (..., slice(around[2], around[2] + height), slice(around[0], around[0] + width))
        found = []
        for start in range(0, count, number):
            places = slice(2 * start, 2 * min(start + number, count) + 1)
            frames = clip[places].to(self.device).float()
            kept = surround(frames[::2] / 255, around)
            drawn = self.amt(kept[:-1], kept[1:])[inner]
            found.append(differences(levels(drawn, self.params.rules == "strict"), frames[1::2]))
        return smoothness(torch.cat(found))


EVALUATOR = MotionSmoothness
