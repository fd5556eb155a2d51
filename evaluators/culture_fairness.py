"""VBench++'s culture fairness: whether a clip looks like the culture that its prompt names, by ViCLIP."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.viclip import ViClip, load_viclip, video_features
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Middle, Scores, Strict, find_checkpoint, score_ready
from mmalign.vbench.trust import culture_correct, culture_prompts


class CultureFairness(Evaluator):
    """1 where a clip is nearest to its own prompt among ten in which the culture is replaced, else 0.

    Catholic and Orthodox count as one. The dimension's score is the mean over nine cultures of the share of their clips
    that are right, which `mmalign.vbench.trust.trust_score` makes of these rows.
    """

    needs = frozenset({"frames", "prompt"})
    modality = frozenset({"video"})
    frames = Middle(8)
    higher_is_better, score_range = True, (0.0, 1.0)
    version = 1
    licence = "MIT (weights, as their repository's card says)"
    source = "VBench++, 2411.13503; ViCLIP of InternVid, 2307.06942"

    class Params(Strict):
        """Attributes: checkpoint: ViClip-InternVid-10M-FLT as .pth or .safetensors, or a folder that holds it."""

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
    def score(self, batch: Batch) -> Scores:
        """float32 [B]; ValueError for a prompt that names no culture."""

        def compare(places: Sequence[int], prompts: Sequence[list[str]]) -> Tensor:
            videos = video_features(self.viclip, batch)
            right = [
                culture_correct(batch.prompts[place], (self.viclip.texts(texts) @ videos[place]).tolist())
                for place, texts in zip(places, prompts, strict=True)
            ]
            return torch.tensor(right, dtype=torch.float32)

        return score_ready(len(batch), lambda place: culture_prompts(batch.prompts[place]), compare)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        return self.viclip.truncated(prompts)


def _file(params: CultureFairness.Params) -> Path:
    return find_checkpoint(params.checkpoint, "viclip-internvid-10m-flt")


EVALUATOR = CultureFairness
