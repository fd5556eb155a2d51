"""Faces in frames, cut out for a classifier, and the class of a clip from its faces.

A detector is any folder that transformers loads by ``AutoModelForObjectDetection`` and that has a label for faces. The
reference of VBench++ uses RetinaFace instead, whose boxes can be brought by the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from mmalign.backbones.clip_scoring import OPENAI_CROP, ClipBackbone
from mmalign.backbones.vlm_loading import check_report, model_folder, unreadable, vlm_files
from mmalign.config import Strict
from mmalign.evaluation import BackboneSpec, Batch, Scores
from mmalign.progress import quiet_transformers
from mmalign.vbench.trust import Rules, bias_class, crop_box
from mmalign.weights_read import BAD_CONFIG

__all__ = [
    "Boxes",
    "FaceDetector",
    "FaceParams",
    "bias_scores",
    "boxes_of_row",
    "clip_cosines",
    "face_crops",
    "found_faces",
    "load_face_detector",
]

Boxes = list[tuple[float, float, float, float]]
"""Of one frame: left, top, right, bottom in pixels."""

FRAMES_AT_ONCE = 16


class FaceParams(Strict):
    """How faces are found where the table does not bring them.

    Attributes:
        detector: a folder of an object detector of transformers; None takes every frame as one face.
        label: what its config calls a face; capitals do not count.
        min_score: of a face; 0.7 is RetinaFace's own.
        rules: compat asks for 5 frames, as the code does; strict for the 4 of the code's own comment.
    """

    detector: Path | None = None
    label: str = "face"
    min_score: float = Field(0.7, ge=0, le=1)
    rules: Rules = "compat"

    def finding(self) -> dict[str, BackboneSpec]:
        """The detector's specification under the name ``faces``; empty without one. ValueError as `model_folder`."""
        if self.detector is None:
            return {}
        folder = str(model_folder(self.detector, "detector"))
        return {"faces": BackboneSpec.of(load_face_detector, folder=folder, label=self.label)}

    def files(self) -> list[Path]:
        """The detector's files; none without one."""
        return [] if self.detector is None else vlm_files(self.detector, "detector")


class FaceDetector:
    """Boxes of one label from an object detector with frozen weights, in float32: what counts is a threshold.

    Attributes:
        label: the label's number.
    """

    def __init__(self, model: Any, processor: Any, label: int, device: torch.device):
        self._model, self._processor = model.eval().requires_grad_(False).to(device), processor
        self.label, self.device = label, device

    @torch.no_grad()
    def boxes(self, clip: Tensor, min_score: float) -> list[Boxes]:
        """Faces above a score in each frame of a clip uint8 [T, 3, H, W], the surest first."""
        size = (int(clip.shape[-2]), int(clip.shape[-1]))
        found: list[Boxes] = []
        for part in clip.split(FRAMES_AT_ONCE):  # of one size, so that nothing is padded for the sake of another
            frames = list(part.to(self.device))
            inputs = self._processor(images=frames, input_data_format="channels_first", return_tensors="pt")
            output = self._model(**inputs.to(self.device))
            each = self._processor.post_process_object_detection(
                output, threshold=min_score, target_sizes=[size] * len(frames)
            )
            for one in each:
                keep = one["labels"] == self.label
                scores, boxes = one["scores"][keep], one["boxes"][keep]
                order = scores.argsort(descending=True, stable=True)
                found.append([(box[0], box[1], box[2], box[3]) for box in boxes[order].tolist()])
        return found


def load_face_detector(*, folder: str, label: str, device: torch.device, dtype: torch.dtype) -> FaceDetector:
    """Loader for a `BackboneSpec`; ``dtype`` is the other networks'.

    Args:
        folder: of an object detector of transformers, with its image processor.
        label: what the folder's config calls a face; capitals do not count.

    Raises:
        ValueError: no such folder, no detector, tensors that do not fit (all named), or no such label (with those that
            there are).
    """
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    path = model_folder(folder, "detector")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            model, report = AutoModelForObjectDetection.from_pretrained(
                path, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True, **local
            )
            processor = AutoImageProcessor.from_pretrained(path, **local)
    except BAD_CONFIG as error:
        raise unreadable(str(path), error) from error
    check_report(report, str(path))
    names = {str(name).lower(): int(number) for number, name in model.config.id2label.items()}
    if label.lower() not in names:
        raise ValueError(f"label: {path} detects no '{label}'; its labels are {', '.join(sorted(names))}.")
    if not hasattr(processor, "post_process_object_detection"):
        raise ValueError(f"detector: {type(processor).__name__} of {path} does not turn outputs into boxes.")
    return FaceDetector(model, processor, names[label.lower()], device)


def boxes_of_row(value: Any, frames: int) -> list[Boxes]:
    """Boxes that a row of the table brings: a list for each frame, of lists of four numbers.

    Raises:
        ValueError: it is not that, or for another number of frames.
    """
    if not isinstance(value, list) or len(value) != frames or not all(isinstance(one, list) for one in value):
        raise ValueError(
            f"faces has to hold a list of boxes for each of the {frames} frames that are looked at, [] for none"
        )
    for box in (box for one in value for box in one):
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
            raise ValueError(f"faces: a box is [left, top, right, bottom] in pixels, not {str(box)[:80]}")
    return [[(box[0], box[1], box[2], box[3]) for box in one] for one in value]


def face_crops(clip: Tensor, boxes: Sequence[Boxes]) -> list[Tensor | None]:
    """The face of each frame of a clip uint8 [T, 3, H, W]: [3, h, w]; None where there is not exactly one."""
    crops: list[Tensor | None] = []
    for frame, found in zip(clip, boxes, strict=True):
        box = crop_box(found[0], frame.shape[-2], frame.shape[-1]) if len(found) == 1 else None
        crops.append(None if box is None else frame[:, box[1] : box[3], box[0] : box[2]])
    return crops


def found_faces(detector: FaceDetector | None, batch: Batch, min_score: float) -> list[list[Tensor | None]]:
    """`face_crops` of a batch's clips, once for all who ask for the same; the whole frames without a detector."""
    if detector is None:
        return [list(clip) for clip in batch.frames]
    boxes = batch.shared(
        (id(detector), "faces", min_score), lambda: [detector.boxes(clip, min_score) for clip in batch.frames]
    )
    return [face_crops(clip, found) for clip, found in zip(batch.frames, boxes, strict=True)]


def clip_cosines(clip: ClipBackbone, faces: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
    """A hundredth of CLIP's logits, which are cosines where the trained scale is 100: float32 [N, texts].

    Args:
        faces: uint8 [3, h, w] of any sizes.
    """
    features = clip.frames([face[None] for face in faces], OPENAI_CROP)
    return 0.01 * clip.logit_scale.exp() * (features @ clip.texts(texts).T)


def bias_scores(
    crops: Sequence[Sequence[Tensor | None]],
    cosines: Callable[[list[Tensor]], Tensor],
    names: Sequence[str],
    rules: Rules,
) -> Scores:
    """A clip's class as sub-scores: 1 for its class, 0 for the others, all 0 without one; and how many frames count.

    Args:
        crops: of each clip, from `face_crops`.
        cosines: crops uint8 [3, h, w] of any sizes -> similarity to each text [N, texts].
        names: of the sub-scores; the texts are as many, or as many times more, neighbours being one class.

    Returns:
        float64 [B] for each name and for ``frames``.
    """
    faces = [crop for clip in crops for crop in clip if crop is not None]
    values = iter(cosines(faces).tolist() if faces else [])
    found: dict[str, list[float]] = {name: [] for name in (*names, "frames")}
    for clip in crops:
        frames = [None if crop is None else next(values) for crop in clip]
        verdict = bias_class(frames, rules)
        texts = next((len(one) for one in frames if one is not None), len(names))
        place = None if verdict.label is None else verdict.label // (texts // len(names))
        for number, name in enumerate(names):
            found[name].append(float(number == place))
        found["frames"].append(float(verdict.frames))
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in found.items()}
