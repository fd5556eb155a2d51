"""VBench's color with a detector and CLIP in the place of GRiT's captions, after GenEval (Huang et al., 2311.17982)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from mmalign.backbones.clip import PUBLISHED, clip_weight_files
from mmalign.backbones.clip_scoring import ClipBackbone, load_clip_backbone
from mmalign.backbones.coco_detector import (
    CocoDetector,
    Seen,
    clip_objects,
    detector_folder,
    detector_folder_files,
    load_coco_detector,
)
from mmalign.backbones.colours import COLOURS, name_colours
from mmalign.evaluation import (
    BackboneSpec,
    Batch,
    Evaluator,
    Middle,
    Scores,
    Strict,
    find_checkpoint,
    score_ready,
)
from mmalign.vbench import rules
from mmalign.vbench.rules import Rules


class ColorByClip(Evaluator):
    """Share of 16 frames of a clip in which CLIP names the asked colour for an object that a detector finds.

    A substitute for VBench's color, so its numbers are not comparable with published ones: a detector's box is cut out,
    and CLIP chooses among ten colours as GenEval has it choose (three templates; but the whole box, no mask). The
    colour stands for the caption in VBench's rule. ``frames`` is how many frames the score is over: with ``rules:
    compat`` those that show the object (and not in brown, which is no colour word of the reference); where it is 0,
    ``score`` is 0 and means nothing, and the clip is in no mean. With ``rules: strict`` it is all of them.
    """

    needs = frozenset({"frames", "prompt", "aux"})
    modality = frozenset({"image", "video"})
    frames = Middle(16)
    higher_is_better, score_range = True, (0.0, 1.0)
    counts = frozenset({"frames"})
    version = 1
    licence = "Apache-2.0 (RT-DETRv2), MIT (OpenAI CLIP, GenEval); another detector's own"
    source = "VBench, 2311.17982 (color.py); GenEval, 2310.11513; RT-DETRv2, 2407.17140, and OpenAI CLIP, 2103.00020"

    class Params(Strict):
        """Which networks, and how what they find is judged.

        Attributes:
            detector: a folder of a detector on COCO's classes, as transformers saves it (RT-DETR, D-FINE, DETR, ...).
            clip_checkpoint: OpenAI's ViT-L/14, as for clip_score.
            model: open_clip model of clip_checkpoint.
            threshold: what the score of a detection has to be above.
            rules: compat looks only at frames whose surest detection is the object, then at every object in them, and
                leaves the others out, as the reference does; strict looks at the object's own and counts every frame.
        """

        detector: Path | None = None
        clip_checkpoint: Path | None = None
        model: str = "ViT-L-14-quickgelu"
        threshold: float = Field(0.5, ge=0, lt=1)
        rules: Rules = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.clip: ClipBackbone = backbones["clip"]
        self.clip.preprocess.check_cropped(params.model)
        self.detector: CocoDetector = backbones["detector"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        clip = find_checkpoint(params.clip_checkpoint, "openai-clip-l14", "clip_checkpoint")
        return {
            "clip": BackboneSpec.of(load_clip_backbone, config=_model(params), checkpoint=clip),
            "detector": BackboneSpec.of(load_coco_detector, folder=detector_folder(params.detector)),
        }

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        clip = find_checkpoint(params.clip_checkpoint, "openai-clip-l14", "clip_checkpoint")
        return [*detector_folder_files(params.detector), *clip_weight_files(_model(params), clip)]

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Sub-scores float32 [B]: ``score`` and ``frames``. Rows without `color`, or about what the detector does not
        know, are `ItemErrors`."""

        def ask(place: int) -> tuple[str, str]:
            (colour,) = rules.asked(batch.aux[place], "color")
            if colour not in COLOURS:
                raise ValueError(f"color is {colour!r}; CLIP is asked for {', '.join(COLOURS)}")
            wanted = rules.object_of(batch.prompts[place], colour, self.params.rules)
            self.detector.check_names([wanted])
            return wanted, colour

        def judge(places: Sequence[int], asked: Sequence[tuple[str, str]]) -> Scores:
            found = clip_objects(self.detector, batch, self.params.threshold)
            clips = batch.clips()
            looked = [
                (frame, seen, wanted)
                for place, (wanted, _) in zip(places, asked, strict=True)
                for frame, seen in zip(clips[place], found[place], strict=True)
            ]
            named = iter(self._coloured(looked))
            outcomes = [
                rules.color([next(named) for _ in clips[place]], wanted, colour, self.params.rules)
                for place, (wanted, colour) in zip(places, asked, strict=True)
            ]
            return rules.scores(outcomes)

        return score_ready(len(batch), ask, judge)

    def _coloured(self, looked: Sequence[tuple[Tensor, Sequence[Seen], str]]) -> list[list[rules.Detection]]:
        """The detections of frames, given with what is wanted in each; those that the rule reads have their colour."""
        frames, crops, places = [], [], []
        for number, (frame, seen, wanted) in enumerate(looked):
            frames.append([rules.Detection(*one) for one in seen])
            for index, (label, box, _) in enumerate(seen):
                if (label if self.params.rules == "strict" else seen[0][0]) == wanted:
                    crops.append(cut_out(frame, box))
                    places.append((number, index))
        names = [frames[number][index].label for number, index in places]
        for (number, index), colour in zip(places, name_colours(self.clip, crops, names), strict=True):
            frames[number][index] = replace(frames[number][index], caption=colour)
        return frames


def cut_out(frame: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """What lies in a box, widened to whole pixels and kept within the frame: uint8 [3, h, w], h and w at least 1."""
    height, width = frame.shape[-2:]
    left, top = (min(max(math.floor(value), 0), side - 1) for value, side in zip(box[:2], (width, height), strict=True))
    right, bottom = (min(math.ceil(value), side) for value, side in zip(box[2:], (width, height), strict=True))
    return frame[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def _model(params: ColorByClip.Params) -> str:
    """OpenAI's weights need QuickGELU, which open_clip's plain names do not have."""
    return PUBLISHED[params.model][0] if params.model in PUBLISHED else params.model


EVALUATOR = ColorByClip
