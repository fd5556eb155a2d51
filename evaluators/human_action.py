"""VBench's human action: whether UMT's classifier sees the action that a prompt names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.umt import CLIPS_AT_ONCE, Umt, load_umt
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Middle, Scores, Strict, find_checkpoint, score_ready
from mmalign.vbench.actions import asked_label, kinetics_400, named_label, place_of, read_classes, shown, top_five
from mmalign.vbench.opencv import resize_bilinear

SHORT_SIDE = 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class HumanAction(Evaluator):
    """VBench human_action: 1 where UMT-L/16 on Kinetics-400 has the prompt's action in its top 5 at 0.85 or more.

    The prompts of the suite are "A person is" and one of the 400 classes. Sub-scores: ``score`` (0 or 1) and
    ``probability`` of the class (0 where no class bears the label): the sigmoid of its logit, or with ``rules: strict``
    the softmax.
    """

    needs = frozenset({"frames", "prompt"})
    modality = frozenset({"video"})
    frames = Middle(16)
    score_range = (0.0, 1.0)
    licence = "MIT (weights, as the card of OpenGVLab/UMT says)"
    source = "VBench, 2311.17982; UMT, 2303.16058"

    class Params(Strict):
        """Which weights, which classes, and which rule.

        Attributes:
            checkpoint: l16_ptk710_ftk710_ftk400_f16_res224 as .pth or .safetensors, or a folder that holds it.
            labels: the classes in the order of the logits, one a line or each with a tab and its number; None is
                Kinetics-400 in UMT's order.
            rules: compat is the reference's: the label cut from the file's name, a sigmoid of 0.85. strict takes the
                whole label from the prompt, refuses one that is no class, and asks for the top 5 alone.
        """

        checkpoint: Path | None = None
        labels: Path | None = None
        rules: Literal["compat", "strict"] = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.umt: Umt = backbones["umt"]
        self.classes = kinetics_400() if params.labels is None else read_classes(params.labels)
        if len(self.classes) != self.umt.sizes.classes:
            raise ValueError(
                f"human_action: {params.labels or 'Kinetics-400'} has {len(self.classes)} classes, and the weights "
                f"tell {self.umt.sizes.classes} apart; give the list they were trained with as `labels`."
            )

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"umt": BackboneSpec.of(load_umt, checkpoint=find_checkpoint(params.checkpoint, "umt-l16-k400"))}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        if params.labels is not None:
            read_classes(params.labels)
        return [find_checkpoint(params.checkpoint, "umt-l16-k400"), *([params.labels] if params.labels else [])]

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """``score`` and ``probability`` [B]; with ``rules: strict`` ValueError where the prompt names no class."""

        def judged(places: Sequence[int], asked: Sequence[int | None]) -> Scores:
            parts = [places[start : start + CLIPS_AT_ONCE] for start in range(0, len(places), CLIPS_AT_ONCE)]
            pixels = (torch.stack([self._pixels(batch.frames[place]) for place in part]) for part in parts)
            return self._judge(torch.cat([self.umt.logits(clips) for clips in pixels]).cpu(), asked)

        return score_ready(len(batch), lambda place: self._class(batch.prompts[place]), judged)

    def _class(self, prompt: str) -> int | None:
        """The number of the class that the prompt names; with ``rules: compat`` None where there is none."""
        strict = self.params.rules == "strict"
        label = asked_label(prompt) if strict else named_label(prompt)
        found = place_of(label, self.classes)
        if found is None and strict:
            raise ValueError(
                f"human_action: {label!r:.80} is none of the {len(self.classes)} classes; write the prompt as "
                "'A person is' and one of them, such as 'A person is riding a bike'."
            )
        return found

    def _judge(self, logits: Tensor, asked: Sequence[int | None]) -> dict[str, Tensor]:
        strict = self.params.rules == "strict"
        likely = logits.softmax(dim=1) if strict else logits.sigmoid()
        scores, probabilities = torch.zeros(len(asked)), torch.zeros(len(asked))
        for row, place in enumerate(asked):
            if place is not None:
                scores[row] = float(top_five(logits[row], place) if strict else shown(logits[row], place))
                probabilities[row] = likely[row, place]
        return {"score": scores, "probability": probabilities}

    def _pixels(self, clip: Tensor) -> Tensor:
        """What the network reads of a clip uint8 [T, 3, H, W]: float32 [frames, 3, side, side].

        The short side to 256 as OpenCV resizes 8-bit images, the middle square, ImageNet's mean and deviation.
        """
        clip = clip[Middle(self.umt.sizes.frames).indices(len(clip), 0.0)].to(self.device)
        height, width = clip.shape[-2:]
        new = (int(SHORT_SIDE * height / width), SHORT_SIDE) if width < height else (
            SHORT_SIDE, int(SHORT_SIDE * width / height))  # fmt: skip
        side = self.umt.sizes.image_size
        top, left = (round((length - side) / 2) for length in new)
        square = resize_bilinear(clip, *new)[..., top : top + side, left : left + side].float() / 255
        mean, std = (square.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
        return (square - mean) / std


EVALUATOR = HumanAction
