"""VBench's motion smoothness with frames interpolated along RAFT's flow: a substitute for AMT, free to use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.raft_clips import middle_frames, raft_backbone, raft_file
from mmalign.evaluation import AllFrames, BackboneSpec, Batch, Evaluator, Strict, score_ready
from mmalign.vbench.smoothness import differences, smoothness


class MotionSmoothnessFlow(Evaluator):
    """Motion smoothness, 0 to 1: how near each frame is to the one between its neighbours along RAFT's flow.

    1 less the mean absolute difference of pixel values over 255, as VBench takes it, but of another interpolator:
    another scale, not to be normalised with VBench's constants. ``pairs`` is the number of frames that were predicted.
    """

    needs = frozenset({"frames"})
    modality = frozenset({"video"})
    frames = AllFrames()
    higher_is_better = True
    counts = frozenset({"pairs"})
    score_range = (0.0, None)
    version = 1
    licence = "Apache-2.0 (VBench's rule), BSD-3-Clause (RAFT)"
    source = "https://github.com/Vchitect/VBench (2311.17982), with RAFT, 2003.12039, and warping, 1712.00080, for AMT"

    class Params(Strict):
        """Which weights, which frames.

        Attributes:
            checkpoint: RAFT's file, the authors' or torchvision's, or the folder that holds it.
            network: which of the two is looked for: raft-things or raft-large-torchvision.
            rules: compat predicts every second frame, so that the last one of an even number is left out, and cuts
                fractions off predicted values, as VBench does; strict predicts every frame but the ends, and rounds.
        """

        checkpoint: Path | None = None
        network: Literal["raft-things", "raft-large-torchvision"] = "raft-things"
        rules: Literal["compat", "strict"] = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.raft = backbones["raft"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"raft": raft_backbone(params.checkpoint, params.network)}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return [raft_file(params.checkpoint, params.network)]

    def score(self, batch: Batch) -> dict[str, Tensor]:
        """``score`` and ``pairs``: float64 [B] each."""

        def prepare(place: int) -> Tensor:
            if len(batch.frames[place]) < 3:
                raise ValueError("fewer than 3 frames: none lies between two others.")
            return batch.frames[place]

        def score(_: Sequence[int], clips: Sequence[Tensor]) -> dict[str, Tensor]:
            found = [self._differences(clip) for clip in clips]
            return {
                "score": torch.stack([smoothness(each) for each in found]),
                "pairs": torch.tensor([len(each) for each in found], dtype=torch.float64),
            }

        return score_ready(len(batch), prepare, score)  # type: ignore[return-value]

    def _differences(self, clip: Tensor) -> Tensor:
        """Mean absolute differences of predicted and real frames, 0 to 255: float64 [K]."""
        strict = self.params.rules == "strict"
        pairs = [(first, first + 2) for first in range(0, len(clip) - 2, 1 if strict else 2)]
        found = []
        for place, frame in middle_frames(self.raft, clip, pairs):
            # A thousandth is more than float32 rounds off: a warped constant stays itself where fractions are cut off.
            predicted = (frame.round() if strict else (frame + 1e-3).floor()).clamp(0, 255)
            real = clip[pairs[place][0] + 1].to(frame.device).float()
            found.append(differences(predicted[None], real[None]).cpu())
        return torch.cat(found)


EVALUATOR = MotionSmoothnessFlow
