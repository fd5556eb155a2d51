"""VBench++'s i2v_background: how far a clip shows the scene of its input image all along, in DreamSim's embedding."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.clip_scoring import Geometry
from mmalign.backbones.dino import SIDE
from mmalign.backbones.dreamsim import DreamSim, dreamsim_files, load_dreamsim, squash
from mmalign.backbones.pil_pixels import as_it_is, pil_bicubic
from mmalign.evaluation import AllFrames, BackboneSpec, Batch, Evaluator, Scores, Strict, find_checkpoint, score_ready
from mmalign.vbench.consistency import pair_count, resemblance

INPUT = Geometry.of(squash, levels=True)
"""Near PIL, one pixel in a thousand a level away, and for many frames at once."""


class I2VBackground(Evaluator):
    """VBench++ i2v_background: cosines of a clip's frames with its input image, and with each other, in DreamSim.

    0.4 of the best with the input image, 0.3 of the mean and 0.3 of the least of neighbouring frames. Negative cosines
    count as 0. The input image is the row's reference (of a clip its first frame), of any size; both are squashed to
    squares. A reward is told no reference, so that this is none.
    """

    needs = frozenset({"frames", "reference"})
    modality = frozenset({"video"})
    frames = AllFrames()
    score_range = (0.0, 1.0)
    licence = "MIT (DreamSim), Apache-2.0 (DINO)"
    source = "VBench++, 2411.13503; DreamSim, 2306.09344, on DINO, CLIP and OpenCLIP"

    class Params(Strict):
        """Whose weights, and how frames are resized.

        Attributes:
            checkpoint: the folder that dreamsim_ensemble_checkpoint.zip was unzipped in, or its LoRA file.
            dino_checkpoint: DINO's weights (dino_vitbase16_pretrain.pth), or a folder that holds them. The archive's
                dino_vitb16_pretrain.pth is another file.
            antialias: filter frames before shrinking them. The reference leaves it to torchvision: off until 0.16, with
                which the published scores were made, on since 0.17.
            rules: compat resizes frames as float tensors and the input image as an 8-bit picture with a filter, as the
                reference does; strict resizes both as the input image, so that ``antialias`` has no meaning.
        """

        checkpoint: Path | None = None
        dino_checkpoint: Path | None = None
        antialias: bool = False
        rules: Literal["compat", "strict"] = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.dreamsim: DreamSim = backbones["dreamsim"]
        as_tensors = Geometry.of(squash, antialias=params.antialias, overshoot=True)
        self.geometry = INPUT if params.rules == "strict" else as_tensors

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        lora, dino = _files(params)
        return {"dreamsim": BackboneSpec.of(load_dreamsim, lora=lora, dino=dino)}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return dreamsim_files(*_files(params))

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """[B]; ValueError for an item of one frame, where the reference has no pair, or without an input image."""
        counts = [len(clip) for clip in batch.frames]

        def measured(places: Sequence[int], inputs: Sequence[Tensor]) -> Tensor:
            key = (id(self.dreamsim), self.geometry)
            frames = batch.shared(key, lambda: self.dreamsim.frames(batch.frames, self.geometry)).split(counts)
            images = self.dreamsim.frames(inputs, as_it_is if self.params.rules == "compat" else INPUT)
            return torch.stack([resemblance(frames[place], image) for place, image in zip(places, images, strict=True)])

        return score_ready(len(batch), lambda place: self._input(batch, place), measured)

    def _input(self, batch: Batch, place: int) -> Tensor:
        """An item's input image, uint8 [1, 3, H, W], at the network's size where it is not resized as frames are."""
        pair_count(len(batch.frames[place]))
        if not batch.references:
            raise ValueError("there is no input image; give the row the image that the clip was made from as reference")
        image = batch.references[place][:1]
        return pil_bicubic(image[0], (SIDE, SIDE))[None] if self.params.rules == "compat" else image


def _files(params: I2VBackground.Params) -> tuple[Path, Path]:
    """The LoRA's file, DINO's file."""
    lora = find_checkpoint(params.checkpoint, "dreamsim-ensemble")
    return lora, find_checkpoint(params.dino_checkpoint, "dino-vitb16", "dino_checkpoint")


EVALUATOR = I2VBackground
