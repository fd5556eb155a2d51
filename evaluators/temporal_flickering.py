"""VBench's temporal flickering: how little neighbouring frames of a static clip differ."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mmalign.evaluation import AllFrames, Batch, Evaluator, Scores, score_ready
from mmalign.vbench.consistency import flicker, pair_count


class TemporalFlickering(Evaluator):
    """VBench temporal_flickering: (255 - mean absolute difference of neighbouring frames) / 255.

    Over all pixels and channels of all pairs of a clip, at its own size: 1 for identical frames, 0 for a change between
    black and white. It says something of static clips alone; VBench leaves the others out beforehand.
    """

    needs = frozenset({"frames"})
    modality = frozenset({"video"})
    frames = AllFrames()
    score_range = (0.0, 1.0)
    differentiable = True
    licence = "Apache-2.0"
    source = "VBench, 2311.17982; temporal_flickering.py of Vchitect/VBench"

    def score(self, batch: Batch) -> Scores:
        """float64 [B]; ValueError for an item of one frame, of which the reference makes NaN."""

        def compared(places: Sequence[int], counts: Sequence[int]) -> Tensor:
            differences = torch.stack([flicker(batch.frames[place], self.device) for place in places])
            return (255.0 - differences) / 255.0

        return score_ready(len(batch), lambda place: pair_count(len(batch.frames[place])), compared)

    def score_tensor(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Clips float [B, T, 3, H, W] in [0, 1] -> [B]; prompts are not read."""
        return torch.stack([1.0 - flicker(clip.float()) / 255.0 for clip in images])


EVALUATOR = TemporalFlickering
