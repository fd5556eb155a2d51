"""Colours of cut-out objects by CLIP, as GenEval names them (Ghosh et al., 2310.11513, evaluate_images.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.backbones.clip_scoring import OPENAI_CROP, ClipBackbone

__all__ = ["COLOURS", "name_colours"]

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


def name_colours(clip: ClipBackbone, crops: Sequence[Tensor], names: Sequence[str]) -> list[str]:
    """Which of the ten colours each object has.

    Args:
        crops: uint8 [3, h, w] each, of any sizes.
        names: what each object is.
    """
    if not crops:
        return []
    features = clip.frames([crop[None] for crop in crops], OPENAI_CROP)
    kinds = {name: _prototypes(clip, name) for name in dict.fromkeys(names)}
    prototypes = torch.stack([kinds[name] for name in names])
    return [COLOURS[best] for best in torch.einsum("nd,ncd->nc", features, prototypes).argmax(-1).tolist()]


def _prototypes(clip: ClipBackbone, name: str) -> Tensor:
    """Unit-length text features of a class in each colour, the mean over the templates: float32 [10, D]."""
    texts = [form.format(colour=colour, name=name) for colour in COLOURS for form in TEMPLATES]
    return F.normalize(clip.texts(texts).unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1), dim=-1)
