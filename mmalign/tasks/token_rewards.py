"""What single tokens of an answer are worth, from models that are not trained: TGDPO's guide, T-REG's two requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.backbones.vlm_lora import NAMES, merge_adapter
from mmalign.jobs_mllm import Mllm
from mmalign.mllm import loading
from mmalign.mllm.encode import Encoded
from mmalign.mllm.passes import Branching
from mmalign.paths import find

__all__ = ["contrasted", "load_guide"]


def load_guide(folder: Path, base: Path, settings: Mllm, dtype: torch.dtype, device: torch.device) -> Any:
    """The frozen guide: a whole model's folder, or a LoRA's on `base`.

    Raises:
        ValueError: as `loading.load` and `merge_adapter`.
    """
    path = find(folder)
    adapter = (path / NAMES[0]).is_file()
    module, _ = loading.load(find(base) if adapter else path, settings, dtype, device)
    if adapter:
        module = merge_adapter(module, path)
    return module.requires_grad_(False).eval()


def contrasted(encoded: Sequence[Encoded], reference: Callable[[list[Branching]], Tensor]) -> Tensor:
    """T-REG's rewards of all tokens, in [-1/2, 1/2]: sigmoid(log p(y | better) - log p(y | worse)) - 1/2, flat [N].

    Args:
        reference: log-probabilities of all answers' tokens behind their prompts.
    """
    asks = []
    for side in (0, 1):
        for each in encoded:
            assert each.contrast is not None
            asks.append(Branching(each.contrast[side], each.answers))
    better, worse = reference(asks).float().chunk(2)
    return torch.sigmoid(better - worse) - 0.5
