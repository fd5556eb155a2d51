"""VBench's appearance style: how much frames look like a style's name, in CLIP."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmalign.backbones.clip import PUBLISHED, clip_weight_files
from mmalign.backbones.clip_scoring import OPENAI_CROP, ClipBackbone, frame_features, load_clip_backbone
from mmalign.evaluation import AllFrames, BackboneSpec, Batch, Evaluator, Scores, Strict, find_checkpoint, score_ready

KEY = "appearance_style"


class AppearanceStyle(Evaluator):
    """VBench appearance_style: mean cosine of a clip's frames with the name of a style in CLIP ViT-B/32.

    The name is the column ``appearance_style`` ("Van Gogh style"), not the prompt. ``frames`` counts the frames: the
    reference on one GPU takes the mean over all frames of all clips. Typical values are 0.2 to 0.27. It has a name to
    read besides the prompt, which a reward is not told, so that it is none; `clip_score` is one.
    """

    needs = frozenset({"frames", "aux"})
    modality = frozenset({"video"})
    frames = AllFrames()
    counts = frozenset({"frames"})
    licence = "MIT (OpenAI CLIP)"
    source = "VBench, 2311.17982; weights OpenAI CLIP, 2103.00020"

    class Params(Strict):
        """Which CLIP.

        Attributes:
            checkpoint: OpenAI's weights of ``model`` with open_clip's or transformers' names, or a folder that holds
                them.
            model: ViT-B-32 is VBench's; another of OpenAI's names, a folder or a config file gives another measure.
            rules: compat is the reference's cosine times the weights' own factor (about 100), divided by 100; strict is
                the cosine.
        """

        checkpoint: Path | None = None
        model: str = "ViT-B-32"
        rules: Literal["compat", "strict"] = "compat"

    def __init__(self, params: Params, backbones: Mapping[str, Any], device: torch.device):
        super().__init__(params, backbones, device)
        self.clip: ClipBackbone = backbones["clip"]
        self.clip.preprocess.check_cropped(params.model)
        self.factor = float(self.clip.logit_scale.double().exp()) / 100 if params.rules == "compat" else 1.0

    @classmethod
    def backbone_specs(cls, params: Params) -> dict[str, BackboneSpec]:
        config, checkpoint = _files(params)
        return {"clip": BackboneSpec.of(load_clip_backbone, config=config, checkpoint=checkpoint)}

    @classmethod
    def weight_files(cls, params: Params) -> list[Path]:
        return clip_weight_files(*_files(params))

    @torch.no_grad()
    def score(self, batch: Batch) -> Scores:
        """``score`` and ``frames``, [B]; ValueError for an item without a style's name, or with too long a one."""

        def measured(places: Sequence[int], styles: Sequence[str]) -> dict[str, Tensor]:
            counts = [len(clip) for clip in batch.frames]
            frames, texts = frame_features(self.clip, batch, OPENAI_CROP).split(counts), self.clip.texts(styles)
            means = [(frames[place] @ text).double().mean() for place, text in zip(places, texts, strict=True)]
            return {
                "score": torch.stack(means) * self.factor,
                "frames": torch.tensor([counts[place] for place in places], dtype=torch.float64),
            }

        return score_ready(len(batch), lambda place: self._style(batch, place), measured)

    def _style(self, batch: Batch, place: int) -> str:
        """The style's name of an item; ValueError where there is none, or where CLIP would read a part of it."""
        style = batch.aux[place].get(KEY) if batch.aux else None
        if not isinstance(style, str) or not style.strip():
            raise ValueError(f"there is no style to look for; give the row aux: {{{KEY}: Van Gogh style}}")
        if self.clip.tokenizer.truncated([style])[0]:
            raise ValueError(f"the style has more than CLIP's {self.clip.tokenizer.context_length} tokens; shorten it")
        return style


def _files(params: AppearanceStyle.Params) -> tuple[str, Path]:
    config, known = PUBLISHED.get(params.model, (params.model, "openai-clip-b32"))
    return config, find_checkpoint(params.checkpoint, known)


EVALUATOR = AppearanceStyle
