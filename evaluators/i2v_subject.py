"""VBench++'s i2v_subject: how far a clip shows the subject of its input image all along, in DINO's features."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.clip_scoring import Geometry, resize_crop
from mmalign.backbones.dino import SIDE, DinoBackbone, dino_features, load_dino
from mmalign.backbones.pil_pixels import as_it_is, pil_bicubic
from mmalign.evaluation import AllFrames, BackboneSpec, Batch, Evaluator, Scores, Strict, find_checkpoint, score_ready
from mmalign.vbench.consistency import pair_count, resemblance

INPUT = Geometry.of(resize_crop, levels=True, short=256)
"""Near PIL, one pixel in a thousand a level away, and for many frames at once."""


class I2VSubject(Evaluator):
    """VBench++ i2v_subject: cosines of a clip's frames with its input image, and with each other, in DINO ViT-B/16.

    0.4 of the best with the input image, 0.3 of the mean and 0.3 of the least of neighbouring frames. Negative cosines
    count as 0. The input image is the row's reference (of a clip its first frame), of any size. A reward is told no
    reference, so that this is none.
    """

    needs = frozenset({"frames", "reference"})
    modality = frozenset({"video"})
    frames = AllFrames()
    score_range = (0.0, 1.0)
    licence = "Apache-2.0"
    source = "VBench++, 2411.13503; weights DINO, 2104.14294"

    class Params(Strict):
        """How frames are resized.

        Attributes:
            checkpoint: DINO's weights (dino_vitbase16_pretrain.pth), or a folder that holds them.
            antialias: filter frames before shrinking them. The reference leaves it to torchvision: off until 0.16, with
                which the published scores were made, on since 0.17.
            rules: compat resizes frames as float tensors and the input image as an 8-bit picture with a filter, as the
                reference does; strict resizes both as the input image, so that ``antialias`` has no meaning.
        """

        checkpoint: Path | None = None
        antialias: bool = False
        rules: Literal["compat", "strict"] = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.dino: DinoBackbone = backbones["dino"]
        as_tensors = Geometry.of(resize_crop, antialias=params.antialias, overshoot=True, short=256)
        self.geometry = INPUT if params.rules == "strict" else as_tensors

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"dino": BackboneSpec.of(load_dino, checkpoint=find_checkpoint(params.checkpoint, "dino-vitb16"))}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return [find_checkpoint(params.checkpoint, "dino-vitb16")]

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """[B]; ValueError for an item of one frame, where the reference has no pair, or without an input image."""
        counts = [len(clip) for clip in batch.frames]

        def measured(places: Sequence[int], inputs: Sequence[Tensor]) -> Tensor:
            frames = dino_features(self.dino, batch, self.geometry).split(counts)
            images = self.dino.frames(inputs, as_it_is if self.params.rules == "compat" else INPUT)
            return torch.stack([resemblance(frames[place], image) for place, image in zip(places, images, strict=True)])

        return score_ready(len(batch), lambda place: self._input(batch, place), measured)

    def _input(self, batch: Batch, place: int) -> Tensor:
        """An item's input image, uint8 [1, 3, H, W], at the network's size where it is not resized as frames are."""
        pair_count(len(batch.frames[place]))
        if not batch.references:
            raise ValueError("there is no input image; give the row the image that the clip was made from as reference")
        image = batch.references[place][:1]
        return pil_bicubic(image[0], 256, SIDE)[None] if self.params.rules == "compat" else image


EVALUATOR = I2VSubject
