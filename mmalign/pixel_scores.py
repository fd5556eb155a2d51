"""What an evaluator says of pixels that are in memory: of what was just drawn, without writing files."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmalign.evaluation import Batch, Evaluator, ItemErrors, Uniform, subscores


class PixelScorer:
    """One evaluator, on pixels in [0, 1]: pictures [B, 3, H, W] or clips [B, 3, F, H, W].

    Args:
        label: what messages call it.
        frames: of a clip, what an evaluator of images alone is shown, evenly spaced; the mean counts.
        fps: of clips.

    Attributes:
        sign: 1 where higher is better, else -1.
    """

    def __init__(self, evaluator: Evaluator, label: str, frames: int = 4, fps: float | None = None):
        self.evaluator, self.label, self._frames, self._fps = evaluator, label, frames, fps
        self.sign = 1.0 if evaluator.higher_is_better else -1.0

    @torch.no_grad()
    def named(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Its scores by sub-score, float64 [B], of the pixels as a file would hold them; NaN where it has none."""
        whole = (pixels.detach() * 255).round().to("cpu", torch.uint8)
        if whole.ndim == 4:
            return self._score([picture[None] for picture in whole], prompts, still=True)
        return self._clips(whole.transpose(1, 2), prompts)

    def _clips(self, clips: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Of uint8 [B, F, 3, H, W]: whole for evaluators of clips, else the mean over single frames."""
        if "video" in self.evaluator.modality:
            picks = self.evaluator.frames.indices(clips.shape[1], self._fps or 1.0)
            return self._score([clip[picks] for clip in clips], prompts, still=False)
        picks = Uniform(self._frames).indices(clips.shape[1], 1.0)
        stills = [frame[None] for clip in clips for frame in clip[picks]]
        named = self._score(stills, [prompt for prompt in prompts for _ in picks], still=True)
        return {name: values.reshape(len(clips), -1).mean(1) for name, values in named.items()}

    def _score(self, clips: list[Tensor], prompts: Sequence[str], still: bool) -> dict[str, Tensor]:
        fps = [None if still else self._fps] * len(clips)
        batch = Batch(
            images=[clip[0] for clip in clips] if still else [], frames=clips, prompts=list(prompts), fps=fps,
            aux=[{} for _ in clips],
        )  # fmt: skip
        try:
            named = subscores(self.evaluator.score(batch), len(clips), self.label)
        except ItemErrors as partly:
            named = subscores(partly.scores, len(clips), self.label)
            for values in named.values():
                values[list(partly.errors)] = torch.nan
        return {name: values for name, values in named.items() if name not in self.evaluator.counts}

    def tensor(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Its (first) score with a gradient, [B]; of clips as in `named`. The evaluator has to be differentiable."""
        if pixels.ndim == 4:
            return self.evaluator.score_tensor(pixels, prompts)
        clips = pixels.transpose(1, 2)
        if set(self.evaluator.modality) == {"video"}:
            return self.evaluator.score_tensor(clips, prompts)
        plan = self.evaluator.frames if "video" in self.evaluator.modality else Uniform(self._frames)
        picks = plan.indices(clips.shape[1], self._fps or 1.0)
        repeated = [prompt for prompt in prompts for _ in picks]
        return self.evaluator.score_tensor(clips[:, picks].flatten(0, 1), repeated).reshape(len(clips), -1).mean(1)
