"""Objects and their boxes in pictures, from any detector of transformers that is a folder: RT-DETR, D-FINE, DETR, ...

`mmalign.backbones.detector` is GenEval's, a Mask2Former with MMDetection's arithmetic; here the folder's own image
processor does what comes before and after the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.mask2former import COCO, VOC_NAMES
from mmalign.backbones.vlm_loading import load_model, model_folder, unreadable, vlm_files
from mmalign.config import nearest
from mmalign.evaluation import Batch
from mmalign.weights import find_checkpoint
from mmalign.weights_read import BAD_CONFIG, read_json

__all__ = ["CocoDetector", "Seen", "clip_objects", "detector_folder", "detector_folder_files", "load_coco_detector"]

FORWARD_CHUNK = 16
KNOWN = "rtdetr-v2-r50"
# What detectors call COCO's classes besides; upper case and underscores do not matter.
OTHER_NAMES = {
    **VOC_NAMES,
    "television": "tv",
    "hair dryer": "hair drier",
    "doughnut": "donut",
    "cellphone": "cell phone",
    "mobile phone": "cell phone",
    "tennis racquet": "tennis racket",
}

Seen = tuple[str, tuple[float, float, float, float], float]
"""An object: its class, its box (left, top, right, bottom in pixels of the picture), its score in (0, 1]."""


def coco_name(label: str) -> str:
    """COCO's name for a detector's class, or the class as it is called where COCO has none such."""
    name = label.replace("_", " ").strip()
    plain = OTHER_NAMES.get(name.lower(), name.lower())
    return plain if plain in COCO else name


class CocoDetector:
    """A detector with frozen weights; float32 throughout, since what is made of it are decisions at a threshold.

    Attributes:
        names: the classes that it knows, by COCO's names where COCO has them.
    """

    def __init__(self, folder: str | Path, device: torch.device):
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.folder = model_folder(folder, "detector")
        self.device = device
        model = load_model(AutoModelForObjectDetection, folder, torch.float32, "detector")
        try:
            self._processor: Any = AutoImageProcessor.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except BAD_CONFIG as error:
            raise unreadable(f"detector: {self.folder}", error) from error
        if not hasattr(self._processor, "post_process_object_detection"):
            kind = type(self._processor).__name__
            raise ValueError(f"detector: {self.folder}: its image processor ({kind}) does not read boxes.")
        self._names = {int(number): coco_name(str(label)) for number, label in model.config.id2label.items()}
        self.names = frozenset(self._names.values())
        self._model = model.eval().requires_grad_(False).to(device)

    def check_names(self, wanted: Iterable[str]) -> None:
        """ValueError, by name, for a class that this detector does not know."""
        unknown = [name for name in wanted if name not in self.names]
        if unknown:
            near = nearest(unknown[0], sorted(self.names))
            raise ValueError(
                f"the detector {self.folder.name} has no class {unknown[0]!r}.{near} It knows {len(self.names)}; take "
                "one that was trained on COCO's."
            )

    @torch.no_grad()
    def detect(self, frames: Sequence[Tensor], threshold: float) -> list[list[Seen]]:
        """Objects with a score above ``threshold``, the surest first, in each of uint8 [3, H, W] of any sizes."""
        owners: dict[tuple[int, ...], list[int]] = {}
        for index, frame in enumerate(frames):
            owners.setdefault(tuple(frame.shape[-2:]), []).append(index)
        found: dict[int, list[Seen]] = {}
        for size, members in owners.items():  # pictures of one size need no padding, which some detectors see
            for start in range(0, len(members), FORWARD_CHUNK):
                chunk = members[start : start + FORWARD_CHUNK]
                pictures = [frames[index].to(self.device) for index in chunk]
                found |= zip(chunk, self._forward(pictures, size, threshold), strict=True)
        return [found[index] for index in range(len(frames))]

    def _forward(self, pictures: list[Tensor], size: tuple[int, ...], threshold: float) -> list[list[Seen]]:
        inputs = self._processor(images=pictures, return_tensors="pt", input_data_format="channels_first")
        output = self._model(**inputs.to(self.device))
        results = self._processor.post_process_object_detection(
            output, threshold=threshold, target_sizes=[size] * len(pictures)
        )
        return [self._objects(each) for each in results]

    def _objects(self, result: dict[str, Tensor]) -> list[Seen]:
        scores, order = result["scores"].sort(descending=True, stable=True)
        labels, boxes = result["labels"][order].tolist(), result["boxes"][order].tolist()
        return [
            (self._names[label], (box[0], box[1], box[2], box[3]), score)
            for label, box, score in zip(labels, boxes, scores.tolist(), strict=True)
        ]


def clip_objects(detector: CocoDetector, batch: Batch, threshold: float) -> list[list[list[Seen]]]:
    """Objects of every frame of every item; found once for all evaluators of a batch with this detector."""

    def detect() -> list[list[list[Seen]]]:
        clips = batch.clips()
        found = iter(detector.detect([frame for clip in clips for frame in clip], threshold))
        return [[next(found) for _ in clip] for clip in clips]

    return batch.shared((id(detector), "objects", threshold), detect)


def detector_folder(path: Path | None) -> Path:
    """The folder that a setting means; None is where `mmalign weights fetch` puts RT-DETRv2.

    Raises:
        ValueError: there is no config.json, or it names a backbone that transformers would ask the hub for.
    """
    file = find_checkpoint(path, KNOWN, "detector")
    config = read_json(file, "fetch the folder again")
    if isinstance(config.get("backbone"), str) and not config.get("backbone_config"):
        raise ValueError(
            f"detector: {file} names its backbone ({config['backbone']}) and does not describe it, so transformers "
            "would ask the hub. Take a folder with a backbone_config: for facebook/detr-resnet-50 its revision "
            "no_timm, or load it once where there is a network and save it again."
        )
    return file.parent


def detector_folder_files(path: Path | None) -> list[Path]:
    """Every file that decides a detection; ValueError where the folder lacks some."""
    return vlm_files(detector_folder(path), "detector")


def load_coco_detector(*, folder: Path, device: torch.device, dtype: torch.dtype) -> CocoDetector:
    """Loader for a `BackboneSpec`; ``dtype`` is the other networks'. Raises ValueError as `load_model` does."""
    return CocoDetector(folder, device)
