"""Captions of pictures by BLIP (Li et al., 2201.12086), as transformers has it: beams, no sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.vlm_loading import load_model, model_folder, unreadable, vlm_files
from mmalign.evaluation import Batch
from mmalign.weights import find_checkpoint
from mmalign.weights_read import BAD_CONFIG

__all__ = ["Captioner", "captioner_files", "captioner_folder", "clip_captions", "load_captioner"]

FORWARD_CHUNK = 16
KNOWN = "blip-captioning-large"


class Captioner:
    """A BLIP with frozen weights; float32 throughout, since a caption is a row of decisions."""

    def __init__(self, folder: str | Path, device: torch.device):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        path = model_folder(folder, "captioner")
        self.device = device
        model = load_model(AutoModelForImageTextToText, folder, torch.float32, "captioner")
        if model.config.model_type != "blip":
            raise ValueError(f"captioner: {path} is a {model.config.model_type}; a BLIP that captions is needed.")
        try:
            self._processor: Any = AutoProcessor.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except BAD_CONFIG as error:
            raise unreadable(f"captioner: {path}", error) from error
        self._model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def captions(self, frames: Sequence[Tensor], beams: int, shortest: int, longest: int) -> list[str]:
        """A caption for each of uint8 [3, H, W] of any sizes.

        Args:
            beams: of the search.
            shortest, longest: tokens of a caption.
        """
        texts: list[str] = []
        for start in range(0, len(frames), FORWARD_CHUNK):
            chunk = [frame.to(self.device) for frame in frames[start : start + FORWARD_CHUNK]]
            pixels = self._processor.image_processor(
                images=chunk, return_tensors="pt", input_data_format="channels_first"
            ).pixel_values.to(self.device)
            ids = self._model.generate(
                pixel_values=pixels, num_beams=beams, do_sample=False, min_new_tokens=shortest, max_new_tokens=longest
            )
            texts += self._processor.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]


def clip_captions(captioner: Captioner, batch: Batch, beams: int, shortest: int, longest: int) -> list[list[str]]:
    """Captions of every frame of every item; made once for all evaluators of a batch that ask for the same."""

    def write() -> list[list[str]]:
        clips = batch.clips()
        frames = [frame for clip in clips for frame in clip]
        found = iter(captioner.captions(frames, beams, shortest, longest))
        return [[next(found) for _ in clip] for clip in clips]

    return batch.shared((id(captioner), "captions", beams, shortest, longest), write)


def captioner_folder(path: Path | None) -> Path:
    """The folder that a setting means; None is where `mmalign weights fetch` puts BLIP.

    Raises:
        ValueError: there is no config.json.
    """
    return find_checkpoint(path, KNOWN, "captioner").parent


def captioner_files(path: Path | None) -> list[Path]:
    """Every file that decides a caption; ValueError where the folder lacks some."""
    return vlm_files(captioner_folder(path), "captioner")


def load_captioner(*, folder: Path, device: torch.device, dtype: torch.dtype) -> Captioner:
    """Loader for a `BackboneSpec`; ``dtype`` is the other networks'. Raises ValueError as `load_model` does."""
    return Captioner(folder, device)
