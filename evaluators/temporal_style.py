"""VBench's temporal style: how well a clip's ViCLIP features agree with its prompt, or with the style that it asks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.viclip import ViClip, load_viclip, video_features
from mmalign.evaluation import BackboneSpec, Batch, Evaluator, Middle, Scores, Strict, find_checkpoint, score_ready


class TemporalStyle(Evaluator):
    """VBench temporal_style: cosine of ViCLIP's features of 8 frames and of the prompt.

    Prompts of the suite end with the style after a comma ("..., zoom in"). The reference compares with the whole
    prompt, the paper with the description of the style: ``rules: strict`` does as the paper says. Texts of more than 32
    tokens are cut, so that of a long prompt the reference may not see the style at all.
    """

    needs = frozenset({"frames", "prompt"})
    modality = frozenset({"video"})
    frames = Middle(8)
    score_range = (-1.0, 1.0)
    differentiable = True
    licence = "MIT (weights, as their repository's card says)"
    source = "VBench, 2311.17982; ViCLIP of InternVid, 2307.06942"

    class Params(Strict):
        """Which weights, and which text.

        Attributes:
            checkpoint: ViClip-InternVid-10M-FLT as .pth or .safetensors, or a folder that holds it.
            rules: compat reads the whole prompt, as the reference does; strict what stands behind its last comma.
        """

        checkpoint: Path | None = None
        rules: Literal["compat", "strict"] = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.viclip: ViClip = backbones["viclip"]

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        return {"viclip": BackboneSpec.of(load_viclip, checkpoint=_file(params))}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return [_file(params)]

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """Cosines float32 [B]; with ``rules: strict`` ValueError for a prompt that has nothing behind a comma."""

        def compared(places: Sequence[int], texts: Sequence[str]) -> Tensor:
            videos = video_features(self.viclip, batch)[list(places)]
            return (videos * self.viclip.texts(texts)).sum(dim=-1)

        return score_ready(len(batch), lambda place: self._text(batch.prompts[place]), compared)

    def score_tensor(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Clips float [B, T, 3, H, W] in [0, 1] -> [B]; the gradient passes the roundings to 8-bit levels."""
        texts = self.viclip.texts([self._text(prompt) for prompt in prompts])
        return (self.viclip.video_tensor(images) * texts).sum(dim=-1)

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        if self.params.rules == "strict":
            prompts = [prompt.rpartition(",")[2] for prompt in prompts]
        return self.viclip.truncated(prompts)

    def _text(self, prompt: str) -> str:
        """What a clip is compared with."""
        if self.params.rules == "compat":
            return prompt
        style = prompt.rpartition(",")[2].strip() if "," in prompt else ""
        if not style:
            raise ValueError(
                f"temporal_style with rules: strict reads the style behind the prompt's last comma, and {prompt!r:.80} "
                "has none; write it there ('..., zoom in'), or use rules: compat."
            )
        return style


def _file(params: TemporalStyle.Params) -> Path:
    return find_checkpoint(params.checkpoint, "viclip-internvid-10m-flt")


EVALUATOR = TemporalStyle
