"""ViCLIP (InternVid, Wang et al., 2307.06942): a clip of 8 frames and a text as unit vectors whose cosine is the score.

CLIP ViT-L/14 read over time: every frame is cut into 256 patches, a temporal embedding is added to those of each frame,
and all 2,048 attend to one another and to one class token, whose state is projected. The text tower is CLIP ViT-L/14's
with a context of 32 tokens. Blocks and text tower are open_clip's classes, which have the published names.

The published file is ``ViClip-InternVid-10M-FLT.pth``, names below ``vision_encoder.`` and ``text_encoder.`` and the
trained temperature ``temp``, all below ``model``. Beside them the training's config may lie, Python objects that are
not read: `mmalign weights convert` takes the tensors out. The names without ``model`` are read too, and safetensors.
Every size is read from the tensors but that of a head, which is 64 as in every ViT of CLIP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmalign.backbones.clip import ClipTokenizer
from mmalign.backbones.clip_config import OPENAI_MEAN, OPENAI_STD, Preprocess
from mmalign.evaluation import Batch, Middle
from mmalign.weights import load_into, read_state_dict

__all__ = [
    "ViClip",
    "ViClipModel",
    "ViClipSizes",
    "check_fits",
    "load_viclip",
    "middle_square",
    "viclip_sizes",
    "video_features",
]

HEAD_WIDTH = 64
CLIPS_AT_ONCE = 8  # in one pass of the tower, 2,049 tokens each
TEXTS_KEPT = 4096


@dataclass(frozen=True)
class ViClipSizes:
    """Sizes of a ViCLIP; the defaults are the published one's.

    Attributes:
        image_size, patch_size: in pixels.
        frames: of a clip.
        vision_width, vision_layers: of the image tower.
        text_width, text_layers, context_length, vocab_size: of the text tower.
        embed_dim: number of features.
    """

    image_size: int = 224
    patch_size: int = 14
    frames: int = 8
    vision_width: int = 1024
    vision_layers: int = 24
    text_width: int = 768
    text_layers: int = 12
    context_length: int = 32
    vocab_size: int = 49408
    embed_dim: int = 768


# ------------------------------------------------------------------------------------------------ the network


class _VideoTower(nn.Module):
    """The tower under the authors' names: normalised clips [B, T, 3, S, S] -> states [B, vision_width]."""

    def __init__(self, sizes: ViClipSizes):
        super().__init__()
        from open_clip.transformer import QuickGELU, Transformer

        width, patch = sizes.vision_width, sizes.patch_size
        scale = width**-0.5
        self.conv1 = nn.Conv3d(3, width, (1, patch, patch), (1, patch, patch), bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn((sizes.image_size // patch) ** 2 + 1, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, sizes.frames, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, sizes.vision_layers, width // HEAD_WIDTH, act_layer=QuickGELU)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, sizes.embed_dim))

    def forward(self, clips: Tensor) -> Tensor:
        batch, frames = clips.shape[:2]
        # A kernel of one frame: every frame by itself, which is many times faster as a 2-D convolution.
        patches = F.conv2d(clips.flatten(0, 1), self.conv1.weight[:, :, 0], stride=self.conv1.stride[1:])
        patches = patches.flatten(2).transpose(1, 2) + self.positional_embedding[1:]
        patches = patches.unflatten(0, (batch, frames)) + self.temporal_positional_embedding[:, :, None]
        first = (self.class_embedding + self.positional_embedding[0]).expand(batch, 1, -1)
        states = self.transformer(self.ln_pre(torch.cat([first, patches.flatten(1, 2)], dim=1)))
        pooled: Tensor = self.ln_post(states[:, 0])
        return pooled


class ViClipModel(nn.Module):
    """Both towers as one module, whose state dict has the published names."""

    def __init__(self, sizes: ViClipSizes):
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer

        self.sizes = sizes
        self.vision_encoder = _VideoTower(sizes)
        self.text_encoder = TextTransformer(
            context_length=sizes.context_length,
            vocab_size=sizes.vocab_size,
            width=sizes.text_width,
            heads=sizes.text_width // HEAD_WIDTH,
            layers=sizes.text_layers,
            output_dim=sizes.embed_dim,
            act_layer=QuickGELU,
        )
        self.temp = nn.Parameter(torch.tensor(0.01))


def viclip_sizes(state: Mapping[str, Tensor], origin: str) -> ViClipSizes:
    """The sizes that a state dict's shapes tell.

    Args:
        state: names to tensors, whose values are not looked at.
        origin: the file, for the message.

    Raises:
        ValueError: a tensor that tells a size is missing or has another number of axes; the kernel reads several
            frames; or a width is no multiple of 64.
    """
    told = {
        "vision_encoder.conv1.weight": 5,
        "vision_encoder.positional_embedding": 2,
        "vision_encoder.temporal_positional_embedding": 3,
        "vision_encoder.proj": 2,
        "text_encoder.token_embedding.weight": 2,
        "text_encoder.positional_embedding": 2,
    }
    wrong = [name for name, axes in told.items() if name not in state or state[name].ndim != axes]
    if wrong:
        raise ValueError(
            f"{origin}: no ViCLIP; it has no {', '.join(wrong)}, or with another number of axes. The published file "
            "is ViClip-InternVid-10M-FLT.pth."
        )
    width, _, depth, patch, _ = state["vision_encoder.conv1.weight"].shape
    text_width = state["text_encoder.token_embedding.weight"].shape[1]
    if depth != 1:
        raise ValueError(f"{origin}: its patches span {depth} frames; a ViCLIP whose patches are of one frame is read.")
    if width % HEAD_WIDTH or text_width % HEAD_WIDTH:
        raise ValueError(f"{origin}: widths {width} and {text_width} are no multiples of {HEAD_WIDTH}, a head's width.")
    patches = state["vision_encoder.positional_embedding"].shape[0] - 1
    return ViClipSizes(
        image_size=int(patches**0.5) * patch,
        patch_size=patch,
        frames=state["vision_encoder.temporal_positional_embedding"].shape[1],
        vision_width=width,
        vision_layers=_layers(state, "vision_encoder.transformer.resblocks."),
        text_width=text_width,
        text_layers=_layers(state, "text_encoder.transformer.resblocks."),
        context_length=state["text_encoder.positional_embedding"].shape[0],
        vocab_size=state["text_encoder.token_embedding.weight"].shape[0],
        embed_dim=state["vision_encoder.proj"].shape[1],
    )


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].partition(".")[0] for name in state if name.startswith(prefix)})


def _assembled(state: Mapping[str, Tensor], origin: str) -> ViClipModel:
    sizes = viclip_sizes(state, origin)
    with torch.device("meta"):
        model = ViClipModel(sizes)
    load_into(model, state, origin, assign=True)
    return model


def check_fits(state: Mapping[str, Tensor], file: Path) -> None:
    """Whether a checkpoint's names and shapes are those of a ViCLIP.

    Raises:
        ValueError: missing, unexpected or mis-shaped tensors, all named.
    """
    _assembled(state, str(file))


# ------------------------------------------------------------------------------------------------ pixels


def middle_square(images: Tensor, size: int) -> Tensor:
    """What VBench gives ViCLIP: 8-bit pixels, shortest side to `size`, bicubic without a filter, and the middle square.

    The result is rounded half to even to whole levels and clamped to 0..255, as torchvision resizes uint8 tensors.
    Images whose shortest side is `size` already are only cut.

    Args:
        images: uint8 [N, 3, H, W], or float in [0, 1] where a gradient is wanted: their pixels are rounded to levels
            first, so that both give the same. The gradient passes both roundings as if they were not there.

    Returns:
        float32 [N, 3, size, size] in [0, 1].
    """
    levels = images.float() if images.dtype == torch.uint8 else _rounded(images.float() * 255)
    height, width = images.shape[-2:]
    long = int(size * max(height, width) / min(height, width))
    new = (size, long) if height <= width else (long, size)
    if min(height, width) != size:
        levels = F.interpolate(levels, size=new, mode="bicubic", align_corners=False, antialias=False)
        levels = _rounded(levels.clamp(0.0, 255.0))
    top, left = (round((side - size) / 2) for side in new)
    return levels[..., top : top + size, left : left + size] / 255


def _rounded(levels: Tensor) -> Tensor:
    return levels + (levels.round() - levels).detach()


# ------------------------------------------------------------------------------------------------ as scorers run it


class ViClip:
    """Unit-length features of clips and of prompts from one ViCLIP with frozen weights.

    The towers run in `dtype`; the last projection of clips, and all lengths, are float32.

    Attributes:
        sizes: of the network; ``sizes.frames`` is the number of frames that it reads of a clip.
        tokenizer: CLIP's own vocabulary, cut to the context with the end token last.
        device, dtype: where and in what precision the towers run.
    """

    def __init__(self, model: ViClipModel, device: torch.device, dtype: torch.dtype):
        self.sizes, self.device, self.dtype = model.sizes, device, dtype
        text = {"context_length": self.sizes.context_length, "vocab_size": self.sizes.vocab_size}
        self.tokenizer = ClipTokenizer(text)
        self._plan = Middle(self.sizes.frames)
        self._preprocess = Preprocess(self.sizes.image_size, OPENAI_MEAN, OPENAI_STD)
        self._projection = model.vision_encoder.proj.detach().float().to(device)
        model.text_encoder.attn_mask = torch.full((self.sizes.context_length,) * 2, float("-inf")).triu_(1)
        self._model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self._texts: dict[str, Tensor] = {}

    @torch.no_grad()
    def videos(self, clips: Sequence[Tensor]) -> Tensor:
        """Unit-length features of clips uint8 [T, 3, H, W] of any lengths and sizes: float32 [B, D].

        Of a clip that has not ``sizes.frames`` frames those of `Middle` are read.
        """
        found = []
        for start in range(0, len(clips), CLIPS_AT_ONCE):
            part = clips[start : start + CLIPS_AT_ONCE]
            found.append(self._encode(torch.cat([self._pixels(clip[None]) for clip in part])))
        return torch.cat(found)

    def video_tensor(self, clips: Tensor) -> Tensor:
        """`videos` with a gradient: float [B, T, 3, H, W] in [0, 1] -> float32 [B, D]; see `middle_square`."""
        return torch.cat([self._encode(self._pixels(part)) for part in clips.split(CLIPS_AT_ONCE)])

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit-length features of prompts, float32 [B, D]; each distinct prompt is encoded once, and remembered."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            self._texts |= zip(new, self._encode_texts(new).unbind(), strict=True)
        features = torch.stack([self._texts[prompt] for prompt in prompts])
        for oldest in list(self._texts)[: max(0, len(self._texts) - TEXTS_KEPT)]:
            del self._texts[oldest]
        return features

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """For each prompt, whether it is longer than the context."""
        return self.tokenizer.truncated(prompts)

    def _pixels(self, clips: Tensor) -> Tensor:
        """What the tower reads of clips [B, T, 3, H, W] of one size."""
        clips = clips[:, self._plan.indices(clips.shape[1], 0.0)].to(self.device)
        square = middle_square(clips.flatten(0, 1), self.sizes.image_size)
        return self._preprocess.normalise(square).unflatten(0, clips.shape[:2])

    def _encode(self, pixels: Tensor) -> Tensor:
        states = self._model.vision_encoder(pixels.to(self.dtype)).float()
        return F.normalize(states @ self._projection, dim=-1)

    @torch.inference_mode(False)  # what is remembered has to serve callers who want a gradient too
    @torch.no_grad()
    def _encode_texts(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(prompts).to(self.device)
        found = [self._model.text_encoder(chunk).float() for chunk in tokens.split(64)]
        return F.normalize(torch.cat(found), dim=-1)


def load_viclip(*, checkpoint: Path, device: torch.device, dtype: torch.dtype) -> ViClip:
    """Loader for a `BackboneSpec`.

    Raises:
        ValueError: the file cannot be read safely, or its tensors are not those of a ViCLIP (all named).
    """
    model = _assembled(read_state_dict(checkpoint), str(checkpoint))
    return ViClip(model.float(), device, dtype)


def video_features(viclip: ViClip, batch: Batch) -> Tensor:
    """Unit-length features of a batch's clips, float32 [B, D]; one pass for all who ask for the same network."""
    return batch.shared((id(viclip), "viclip videos"), lambda: viclip.videos(batch.frames))
