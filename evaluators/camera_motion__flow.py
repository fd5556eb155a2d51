"""VBench++'s camera motion with points tracked along RAFT's flow: a substitute for CoTracker, free to use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.raft_clips import CLIP_FLOW, ClipMotion, clip_motion, raft_backbone, raft_file
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Strict, StrideFps, score_ready
from mmalign.vbench.camera import asked_type, camera_types, is_hit


class CameraMotionFlow(Evaluator):
    """Camera motion as the prompt asks for it ("camera pans left"), 1 or 0, by four points followed along RAFT's flow.

    VBench++'s rules on another tracker: not comparable with published figures. ``types`` says how many motions were
    found.
    """

    needs = frozenset({"frames", "prompt"})
    modality = frozenset({"video"})
    frames = StrideFps(8)
    higher_is_better = True
    counts = frozenset({"types"})
    score_range = (0.0, None)
    version = 1
    licence = "Apache-2.0 (VBench's rules), BSD-3-Clause (RAFT)"
    source = "https://github.com/Vchitect/VBench, vbench2_beta_i2v (2411.13503), with RAFT, 2003.12039, for CoTracker2"

    class Params(Strict):
        """Which weights, which rules.

        Attributes:
            checkpoint: RAFT's file, the authors' or torchvision's, or the folder that holds it.
            network: which of the two is looked for: raft-things or raft-large-torchvision.
            rules: compat is VBench++'s; strict takes the edges' true middles and fractions of pixels, lets a motion and
                its opposite cancel, and refuses prompts that ask for two.
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
        """``score`` (0 or 1) and ``types``: float64 [B] each."""
        rules = self.params.rules

        def prepare(place: int) -> str:
            if len(batch.frames[place]) < 2:
                raise ValueError("one frame: there is no motion of the camera to be seen.")
            return asked_type(batch.prompts[place], rules)

        def score(places: Sequence[int], asked: Sequence[str]) -> dict[str, Tensor]:
            found = [self._types(batch, place) for place in places]
            hits = [is_hit(each, types) for each, types in zip(asked, found, strict=True)]
            return {
                "score": torch.tensor(hits, dtype=torch.float64),
                "types": torch.tensor([len(types) for types in found], dtype=torch.float64),
            }

        return score_ready(len(batch), prepare, score)  # type: ignore[return-value]

    def _types(self, batch: Batch, place: int) -> set[str]:
        clip, rules = batch.frames[place], self.params.rules
        known: dict[int, ClipMotion] = batch.shared((CLIP_FLOW, self.raft, self.frames, rules), dict)
        if place not in known:
            known[place] = clip_motion(self.raft, clip, rules)
        return camera_types(known[place].start, known[place].end, clip.shape[-2], clip.shape[-1], rules)


EVALUATOR = CameraMotionFlow
