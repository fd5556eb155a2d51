"""VBench's dynamic degree: does the clip move? A share of fast pairs of frames by RAFT's optical flow."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.raft import LEAST_SIDE
from mmalign.backbones.raft_clips import CLIP_FLOW, clip_motion, pair_speeds, raft_backbone, raft_file
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Strict, StrideFps, score_ready
from mmalign.vbench.motion import (
    DYNAMIC_SHARE,
    check_measurable,
    dynamic_needed,
    dynamic_threshold,
    dynamic_verdict,
)


class DynamicDegree(Evaluator):
    """VBench dynamic degree: 1 if a quarter of the pairs of frames (8 per second) are fast by RAFT's flow, else 0.

    A pair is fast if its fastest 5 % of pixels move on average by more than 6 pixels per 256 of the frame's shorter
    side. Beside the score: ``share`` of fast pairs, ``motion`` (mean speed of the pairs, 1 is the threshold), both 0
    for one frame, and the number of ``pairs``; with ``early`` only those looked at.
    """

    needs = frozenset({"frames"})
    modality = frozenset({"video"})
    frames = StrideFps(8)
    higher_is_better = True
    counts = frozenset({"pairs"})
    score_range = (0.0, None)
    version = 1
    licence = "Apache-2.0 (VBench's rule), BSD-3-Clause (RAFT)"
    source = "https://github.com/Vchitect/VBench (2311.17982); RAFT, 2003.12039"

    class Params(Strict):
        """Which weights, which rule.

        Attributes:
            checkpoint: RAFT's file, the authors' or torchvision's, or the folder that holds it.
            network: which of the two is looked for: raft-things or raft-large-torchvision.
            rules: compat is VBench's; strict rounds halves up, measures the frame without its padding and also frames
                below 121 pixels, and refuses clips of one or two frames.
            early: stop a clip when enough pairs are fast, or too few can be. The score is the same; share and motion
                are not given.
        """

        checkpoint: Path | None = None
        network: Literal["raft-things", "raft-large-torchvision"] = "raft-things"
        rules: Literal["compat", "strict"] = "compat"
        early: bool = False

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
        """``score`` (0 or 1), ``pairs`` and, unless ``early``, ``share`` and ``motion``: float64 [B] each."""

        def prepare(place: int) -> int:
            clip = batch.frames[place]
            check_measurable(clip.shape[-2], clip.shape[-1], LEAST_SIDE, self.params.rules)
            return dynamic_needed(len(clip), self.params.rules)

        def score(places: Sequence[int], needed: Sequence[int]) -> dict[str, Tensor]:
            measure = self._early if self.params.early else self._whole
            rows = [measure(batch, place, count) for place, count in zip(places, needed, strict=True)]
            return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}

        return score_ready(len(batch), prepare, score)  # type: ignore[return-value]

    def _whole(self, batch: Batch, place: int, needed: int) -> dict[str, float]:
        clip = batch.frames[place]
        threshold = dynamic_threshold(*clip.shape[-2:])
        known = batch.shared((CLIP_FLOW, self.raft, self.frames, self.params.rules), dict)
        if place not in known:
            known[place] = clip_motion(self.raft, clip, self.params.rules)
        speeds = known[place].speeds
        fast, pairs = int((speeds > threshold).sum()), len(speeds)
        moving = dynamic_verdict(fast, pairs, pairs, needed)
        return {
            "score": float(bool(moving)),
            "share": fast / max(1, pairs),
            "motion": float(speeds.mean()) / threshold if pairs else 0.0,
            "pairs": float(pairs),
        }

    def _early(self, batch: Batch, place: int, needed: int) -> dict[str, float]:
        clip = batch.frames[place]
        threshold, pairs = dynamic_threshold(*clip.shape[-2:]), len(clip) - 1
        fast, seen, verdict = 0, 0, dynamic_verdict(0, 0, pairs, needed)
        speeds = pair_speeds(self.raft, clip, list(pairwise(range(len(clip)))), DYNAMIC_SHARE, self.params.rules)
        while verdict is None:
            fast, seen = fast + (next(speeds) > threshold), seen + 1
            verdict = dynamic_verdict(fast, seen, pairs, needed)
        return {"score": float(bool(verdict)), "pairs": float(seen)}


EVALUATOR = DynamicDegree
