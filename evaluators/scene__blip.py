"""VBench's scene with BLIP's captions in the place of Tag2Text's (Huang et al., 2311.17982)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from mmalign.backbones.captioner import Captioner, captioner_files, captioner_folder, clip_captions, load_captioner
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Middle, Scores, Strict, score_ready
from mmalign.vbench import rules
from mmalign.vbench.rules import Rules


class SceneByBlip(Evaluator):
    """Share of 16 frames of a clip whose caption by BLIP names the scene.

    A substitute for VBench's scene: the same rule on another network's captions, so its numbers are not comparable with
    published ones, nor is their empirical maximum of 0.8222. ``frames`` is how many frames were captioned.
    """

    needs = frozenset({"frames", "aux"})
    modality = frozenset({"image", "video"})
    frames = Middle(16)
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"frames"})
    version = 1
    licence = "BSD-3-Clause"
    source = "VBench, 2311.17982 (scene.py); captions by BLIP, 2201.12086"

    class Params(Strict):
        """Which captioner, how it writes, and how the captions are judged; beams and lengths are Tag2Text's in VBench.

        Attributes:
            captioner: a folder of a BLIP that captions, as transformers saves it.
            beams: of the search.
            shortest, longest: tokens of a caption.
            rules: compat is content with parts of words; strict asks for whole ones.
        """

        captioner: Path | None = None
        beams: int = Field(3, ge=1)
        shortest: int = Field(10, ge=0)
        longest: int = Field(30, ge=1)
        rules: Rules = "compat"

        @model_validator(mode="after")
        def _lengths(self) -> "SceneByBlip.Params":
            if self.shortest > self.longest:
                raise ValueError(f"shortest ({self.shortest}) is above longest ({self.longest}); exchange them")
            return self

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.captioner: Captioner = backbones["captioner"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"captioner": BackboneSpec.of(load_captioner, folder=captioner_folder(params.captioner))}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return captioner_files(params.captioner)

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Sub-scores float32 [B]: ``score`` and ``frames``. Rows without `scene` are `ItemErrors`."""
        params = self.params

        def ask(place: int) -> str:
            return rules.asked(batch.aux[place], "scene")[0]

        def judge(places: Sequence[int], wanted: Sequence[str]) -> Scores:
            found = clip_captions(self.captioner, batch, params.beams, params.shortest, params.longest)
            pairs = zip(places, wanted, strict=True)
            return rules.scores([rules.scene(found[place], name, params.rules) for place, name in pairs])

        return score_ready(len(batch), ask, judge)


EVALUATOR = SceneByBlip
