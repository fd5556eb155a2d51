"""VBench's static filter: does nothing move in the clip, so that temporal flickering can be measured on it?"""

from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.raft import LEAST_SIDE
from mmalign.backbones.raft_clips import pair_speeds, raft_backbone, raft_file
from mmalign.evaluation import AllFrames, BackboneSpec, Batch, Evaluator, Strict, score_ready
from mmalign.vbench.motion import STATIC_SHARE, check_measurable, static_allowed, static_limit, static_threshold


class StaticFilter(Evaluator):
    """VBench's static filter: 1 if a clip is still by RAFT's flow at full frame rate and from end to end, else 0.

    A pair of neighbours is fast if its fastest 2 % of pixels move on average by more than 3 pixels per 256 of the
    frame's shorter side. A static clip of n frames has at most n / 8 such pairs (``allowed``), and from its first to
    its last frame and back no more than twice that many times the threshold. Beside the score: numbers of ``pairs`` and
    of ``fast`` ones, and ``drift``, the larger speed between the ends, in thresholds.
    """

    needs = frozenset({"frames"})
    modality = frozenset({"video"})
    frames = AllFrames()
    higher_is_better = True
    counts = frozenset({"pairs", "fast", "allowed", "drift"})
    score_range = (0.0, None)
    version = 1
    licence = "Apache-2.0 (VBench's rule), BSD-3-Clause (RAFT)"
    source = "https://github.com/Vchitect/VBench (2311.17982), static_filter.py; RAFT, 2003.12039"

    class Params(Strict):
        """Which weights, which rule.

        Attributes:
            checkpoint: RAFT's file, the authors' or torchvision's, or the folder that holds it.
            network: which of the two is looked for: raft-things or raft-large-torchvision.
            rules: compat is VBench's; strict rounds halves up and to at least 1, measures the frame without its padding
                and also frames below 121 pixels, and refuses single frames.
            early: begin with the two ends, and stop when it is known that the clip moves. The score is the same; fast
                and drift are not given.
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
        """``score`` (0 or 1), ``pairs``, ``allowed``; unless ``early`` ``fast`` and ``drift`` too: float64 [B] each."""

        def prepare(place: int) -> int:
            clip = batch.frames[place]
            check_measurable(clip.shape[-2], clip.shape[-1], LEAST_SIDE, self.params.rules)
            return static_allowed(len(clip), self.params.rules)

        def score(places: Sequence[int], allowed: Sequence[int]) -> dict[str, Tensor]:
            rows = [self._clip(batch.frames[place], count) for place, count in zip(places, allowed, strict=True)]
            return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in rows[0]}

        return score_ready(len(batch), prepare, score)  # type: ignore[return-value]

    def _clip(self, clip: Tensor, allowed: int) -> dict[str, float]:
        threshold, last = static_threshold(*clip.shape[-2:]), len(clip) - 1
        # The two ends first: a clip that moves is mostly told by these.
        pairs = [(0, last), (last, 0), *pairwise(range(len(clip)))]
        speeds = pair_speeds(self.raft, clip, pairs, STATIC_SHARE, self.params.rules)
        drift = max(islice(speeds, 2))
        static, fast, seen = drift <= static_limit(threshold, allowed), 0, 2
        if static or not self.params.early:
            for speed in speeds:
                fast, seen = fast + (speed > threshold), seen + 1
                static = static and fast <= allowed
                if self.params.early and not static:
                    break
        told = {"score": float(static), "pairs": float(seen), "allowed": float(allowed)}
        return told if self.params.early else {**told, "fast": float(fast), "drift": drift / threshold}


EVALUATOR = StaticFilter
