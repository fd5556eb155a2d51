"""Any video classifier of transformers (VideoMAE, TimeSformer and others): clips to probabilities of its classes.

A folder is what ``save_pretrained`` writes for a model and its processor: config.json with the classes (``id2label``)
and the number of frames, model.safetensors, and preprocessor_config.json (or video_preprocessor_config.json), whose
settings prepare the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.vlm_loading import check_report, model_folder, unreadable
from mmalign.frame_plans import Middle
from mmalign.progress import quiet_transformers
from mmalign.weights_read import BAD_CONFIG

__all__ = ["VideoClassifier", "load_video_classifier"]

CLIPS_AT_ONCE = 8


class VideoClassifier:
    """Logits of clips from one classifier with frozen weights.

    Attributes:
        classes: names in the order of the logits.
        frames: how many of a clip's the network reads.
        device, dtype: where and in what precision it runs.
    """

    def __init__(self, model: Any, processor: Any, classes: Sequence[str], frames: int, dtype: torch.dtype):
        self.classes, self.frames = tuple(classes), frames
        self.device, self.dtype = model.device, dtype
        self._model, self._processor = model, processor

    @torch.no_grad()
    def logits(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips uint8 [T, 3, H, W] of any lengths and sizes -> float32 [B, classes]; frames are taken by `Middle`."""
        plan, found = Middle(self.frames), []
        for start in range(0, len(clips), CLIPS_AT_ONCE):
            part = [self._prepared(clip[plan.indices(len(clip), 0.0)]) for clip in clips[start : start + CLIPS_AT_ONCE]]
            inputs = {name: torch.cat([each[name] for each in part]).to(self.device, self.dtype) for name in part[0]}
            found.append(self._model(**inputs).logits.float())
        return torch.cat(found)

    def _prepared(self, clip: Tensor) -> dict[str, Tensor]:
        # Alone, since clips of several sizes would be brought to one in another way than each by itself.
        return dict(self._processor([clip], do_sample_frames=False, return_tensors="pt"))


def load_video_classifier(*, model: Path, device: torch.device, dtype: torch.dtype) -> VideoClassifier:
    """Loader for a `BackboneSpec`.

    Args:
        model: the folder.

    Raises:
        ValueError: no such folder, a model that classifies no videos or needs code of its own, a config or processor
            that cannot be read or names no frames and classes, or tensors that are missing, unexpected or mis-shaped
            (all named).
    """
    from transformers import MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING, AutoConfig, AutoVideoProcessor

    path = model_folder(model)
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **local)
        try:
            kind: Any = MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING[type(config)]
        except KeyError:
            raise ValueError(f"transformers has no video classifier of the type {config.model_type}.") from None
        processor = AutoVideoProcessor.from_pretrained(path, **local)
        with quiet_transformers():
            network, report = kind.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                ignore_mismatched_sizes=True,  # so that all of them are told at once, by check_report
                output_loading_info=True,
                local_files_only=True,
            )
    except BAD_CONFIG as error:
        raise unreadable(str(path), error) from error
    check_report(report, str(path))
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    if not isinstance(frames, int):
        raise ValueError(f"{path}: its config.json does not say how many frames the network reads (num_frames).")
    classes = [str(config.id2label[number]) for number in range(config.num_labels)]
    return VideoClassifier(network.eval().requires_grad_(False).to(device), processor, classes, frames, dtype)
