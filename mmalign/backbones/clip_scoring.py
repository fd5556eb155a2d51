"""CLIP as scorers run it: exact preprocessing from uint8 or float images, towers in any precision, an exact last step.

The towers may run in bfloat16; projection, normalisation and dot product are always float32. A bfloat16 dot product
would quantise a cosine near 0.3 to steps of 0.002, more than the differences that preference scorers are used to
measure.

A scorer on CLIP is a `Geometry`, a way of reading prompts and a formula on `frame_cosines`. What a batch needs of a
tower is computed once for all scorers that have the tower and the geometry, or the prompts, in common.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.backbones.clip import ClipTokenizer, Preprocess, load_clip
from mmalign.evaluation import Batch

__all__ = [
    "FORWARD_CHUNK",
    "HF_CROP",
    "OPENAI_CROP",
    "ClipBackbone",
    "Geometry",
    "Resize",
    "clip_means",
    "frame_cosines",
    "frame_features",
    "frame_pixels",
    "frame_texts",
    "image_cosines",
    "load_clip_backbone",
    "pil_pass",
    "resize_crop",
    "resize_pad",
    "tower_pixels",
]

FORWARD_CHUNK = 64
PASS_PIXELS = FORWARD_CHUNK * 512 * 512
"""Of pictures that are resized at once: as float32, and the copies that resizing makes, large ones fill any memory."""
TEXTS_KEPT = 4096
ELONGATED = 8  # times as long as wide, from which on a picture is not resized whole before it is cropped
Resize = Callable[[Tensor, int], Tensor]


# ------------------------------------------------------------------------------------------------ geometry


def resize_pad(images: Tensor, size: int, antialias: bool = False) -> Tensor:
    """HPSv2's geometry: the longest side to ``size`` by bicubic interpolation, then centred zero padding to a square.

    Args:
        images: float [B, 3, H, W] in [0, 1].
        size: side of the result in pixels.
        antialias: filter before shrinking. The authors' code resizes float tensors without naming it, which meant off
            in the torchvision of their time and on since 0.17; scores differ measurably.

    Returns:
        [B, 3, size, size]. Bicubic overshoot beyond [0, 1] is kept, as in the authors' tensor path.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    if scale != 1.0:
        # Side 1 is kept for slivers that would round to nothing.
        new = (max(1, round(height * scale)), max(1, round(width * scale)))
        # Height first: PyTorch 2.15's filtering pass repeats one row when the result is a single pixel wide.
        for size_after in ((new[0], width), new) if antialias else (new,):
            images = F.interpolate(images, size=size_after, mode="bicubic", align_corners=False, antialias=antialias)
    height, width = images.shape[-2:]
    left, top = (size - width) // 2, (size - height) // 2
    # The authors pad only when they resize, so that their 224x150 image stays 224x150 and breaks its batch.
    return F.pad(images, (left, size - width - left, top, size - height - top))


def resize_crop(
    images: Tensor,
    size: int,
    *,
    centre: Literal["round", "floor"] = "round",
    levels: bool = False,
    antialias: bool = True,
    short: int | None = None,
    overshoot: bool = False,
) -> Tensor:
    """OpenAI CLIP's geometry: the shortest side to ``size``, bicubic with antialiasing, then the central square.

    Args:
        images: float [B, 3, H, W] in [0, 1].
        size: side of the result in pixels.
        centre: where the square begins if as many pixels cannot be left out on both sides: ``round`` half to even
            (torchvision, hence OpenAI's and open_clip's preprocessing) or ``floor`` (transformers' processors).
        levels: round to 1/255 after each of the two passes as PIL does on 8-bit images, which leaves one pixel in a
            thousand a level away from PIL's. The gradient is that of the image before rounding.
        antialias: False is torchvision's resize of a tensor without filter, as VBench runs it: one pass, whose
            overshoot beyond [0, 1] stays; then ``levels`` has no meaning.
        short: the shortest side before the square is cut out, at least ``size``, which is what None means.
        overshoot: as torchvision resizes a float tensor with a filter: in one pass, not clamped.

    Returns:
        [B, 3, size, size]; each pass clamped to [0, 1] as in PIL, but for ``overshoot`` and ``antialias=False``.
    """
    height, width = images.shape[-2:]
    short = size if short is None else short
    long = int(short * max(height, width) / min(height, width))
    new = (short, long) if height <= width else (long, short)
    top, left = (_offset(side, size, centre) for side in new)
    resized = min(height, width) != short
    if resized and not antialias and max(height, width) > ELONGATED * min(height, width):
        return _window(images, new, (top, left), size)
    if resized and (overshoot or not antialias):
        images = F.interpolate(images, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    elif resized:
        # PIL resizes the width first. Columns that the crop leaves out need no second pass.
        images = pil_pass(images, (height, new[1]), levels)[..., left : left + size]
        return pil_pass(images, (new[0], size), levels)[..., top : top + size, :]
    return images[..., top : top + size, left : left + size]


def _window(images: Tensor, new: tuple[int, int], start: tuple[int, int], size: int) -> Tensor:
    """The square [size, size] from `start` on of images resized to `new`, bicubically without a filter.

    Of the longer side only what the square shows is computed: the whole of a sliver would fill any memory.
    """
    wide = images.shape[-1] > images.shape[-2]
    x, place = (images, start[1]) if wide else (images.mT, start[0])
    old = x.shape[-1]
    # In float32, as PyTorch places its points: exact ones are 1e-3 of a pixel away in a sliver.
    centres = (torch.arange(place, place + size, dtype=torch.float32) + 0.5) * (
        torch.tensor(float(old)) / max(new)
    ) - 0.5
    first = centres.floor()
    apart = ((centres - first)[:, None] - torch.arange(-1, 3)).abs()
    # Keys' kernel with a = -0.75, as PyTorch has it.
    near, far = (1.25 * apart - 2.25) * apart**2 + 1, ((-0.75 * apart + 3.75) * apart - 6) * apart + 3
    weights = torch.where(apart <= 1, near, far).to(x)
    taps = (first.long()[:, None] + torch.arange(-1, 3)).clamp(0, old - 1).to(x.device)
    cut = (x[..., taps] * weights).sum(-1)
    cut = F.interpolate(cut, size=(min(new), size), mode="bicubic", align_corners=False)
    across = start[0] if wide else start[1]  # where the shortest side is longer than the square
    cut = cut[..., across : across + size, :]
    return cut if wide else cut.mT


def _offset(side: int, size: int, centre: str) -> int:
    return round((side - size) / 2) if centre == "round" else (side - size) // 2


def pil_pass(images: Tensor, size: tuple[int, int], levels: bool) -> Tensor:
    """One of PIL's bicubic passes. It clamps in between too, which shows where sharp edges overshoot."""
    images = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(0.0, 1.0)
    # Half a level goes up, as in PIL's fixed-point arithmetic.
    return images + (images.mul(255).add(0.5).floor().div(255) - images).detach() if levels else images


@dataclass(frozen=True)
class Geometry:
    """How pictures become a tower's square, by value: scorers with equal geometries on one tower share its pass.

    Attributes:
        resize: called as ``resize(images, size, **options)``; images float [B, 3, H, W] in [0, 1].
        options: its keyword arguments as sorted pairs; see `of`.
    """

    resize: Callable[..., Tensor]
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, resize: Callable[..., Tensor], **options: Any) -> Geometry:
        """A geometry from keyword arguments."""
        return cls(resize, tuple(sorted(options.items())))

    def __call__(self, images: Tensor, size: int) -> Tensor:
        return self.resize(images, size, **dict(self.options))


OPENAI_CROP = Geometry.of(resize_crop, centre="round", levels=True)
"""Preprocessing of OpenAI's CLIP and of open_clip: PIL, torchvision's crop."""

HF_CROP = Geometry.of(resize_crop, centre="floor", levels=True)
"""Preprocessing of transformers' CLIP processor on PIL: the crop begins a pixel earlier for some odd sizes."""


def _settled(geometry: Geometry, clips: Sequence[Tensor], size: int) -> Geometry:
    """`HF_CROP` as `OPENAI_CROP` where no clip is of a size that shows the difference, so that the pass is shared."""
    if geometry != HF_CROP:
        return geometry
    sides = {int(size * max(clip.shape[-2:]) / min(clip.shape[-2:])) for clip in clips}
    same = all(_offset(side, size, "floor") == _offset(side, size, "round") for side in sides)
    return OPENAI_CROP if same else geometry


# ------------------------------------------------------------------------------------------------ pixels


def tower_pixels(images: Tensor, resize: Resize, preprocess: Preprocess, device: torch.device) -> Tensor:
    """What a tower reads of images of one size.

    Args:
        images: uint8 [N, 3, H, W], or float in [0, 1] where a gradient is wanted.
        resize: images [n, 3, H, W] in [0, 1] and the tower's side in pixels -> [n, 3, side, side].

    Returns:
        float32 [N, 3, side, side] on the device, normalised.
    """
    parts = []
    for chunk in images.split(_at_once(images, preprocess.size)):
        chunk = chunk.to(device)
        chunk = chunk.float().div(255) if chunk.dtype == torch.uint8 else chunk.float()
        parts.append(preprocess.normalise(resize(chunk, preprocess.size)))
    return torch.cat(parts)


def _at_once(images: Tensor, size: int) -> int:
    """How many pictures of this size [..., H, W] are resized in one go, their shortest side to `size`."""
    short, long = sorted(images.shape[-2:])
    return max(1, min(FORWARD_CHUNK, PASS_PIXELS // max(short * long, size * size * long // short)))


def frame_pixels(clips: Sequence[Tensor], resize: Resize, preprocess: Preprocess, device: torch.device) -> Tensor:
    """`tower_pixels` of every frame of clips uint8 [T, 3, H, W] of any sizes: float32 [sum of T, 3, side, side]."""
    owners: dict[tuple[int, ...], list[int]] = {}
    starts = [0]
    for index, clip in enumerate(clips):
        owners.setdefault(tuple(clip.shape[-2:]), []).append(index)
        starts.append(starts[-1] + len(clip))
    pixels = torch.empty(starts[-1], 3, preprocess.size, preprocess.size, device=device)
    for members in owners.values():
        # One resize for all frames of a size; the tower then sees full batches whatever the sizes were.
        rows = torch.cat([torch.arange(starts[index], starts[index + 1]) for index in members]).to(device)
        frames = [frame for index in members for frame in clips[index]]
        step = _at_once(frames[0], preprocess.size)
        for start in range(0, len(frames), step):
            # One by one: from page-locked memory each is fetched while the next is prepared.
            there = [frame.to(device, non_blocking=True) for frame in frames[start : start + step]]
            pixels[rows[start : start + step]] = tower_pixels(torch.stack(there), resize, preprocess, device)
    return pixels


def clip_means(values: Tensor, clips: Sequence[Tensor]) -> Tensor:
    """Means of the frames' values: [sum of T] and clips of [T, 3, H, W] -> [number of clips]."""
    return torch.stack([chunk.mean() for chunk in values.split([len(clip) for clip in clips])])


# ------------------------------------------------------------------------------------------------ the backbone


class ClipBackbone:
    """Normalised image and text features of one CLIP with frozen weights.

    Attributes:
        tokenizer, preprocess: of the model.
        width: number of features.
        logit_scale: float32 scalar tensor, the logarithm of the factor that the model was trained to put on cosines.
        device, dtype: where and in what precision the two towers run.
    """

    def __init__(self, config: str | Path, checkpoint: Path, device: torch.device, dtype: torch.dtype):
        model: Any
        model, self.tokenizer, self.preprocess = load_clip(config, checkpoint)
        self.device, self.dtype = device, dtype
        # Taken out of the model, so that the towers end before the projection and it can stay in float32.
        self._project_image, self.width = _take_image_projection(model.visual, device)
        self._text_projection = model.text_projection
        model.text_projection = None
        if self._text_projection is not None:
            self._text_projection = self._text_projection.requires_grad_(False).to(device)
        self.logit_scale = model.logit_scale.detach().reshape(()).clone().to(device)
        self._model = model.eval().requires_grad_(False).to(device=device, dtype=dtype)
        _sequence_first(model.transformer)
        self._texts: dict[tuple[str, bool], Tensor] = {}
        self._static = False

    def compile_towers(self, backend: str = "inductor") -> None:
        """Compile the image tower at its next calls, for numbers of images that are powers of two."""
        self._model.visual.compile(backend=backend, dynamic=False)
        self._static = True

    @cached_property
    def uncleaned(self) -> ClipTokenizer:
        """The tokeniser as transformers has it; see `ClipTokenizer`."""
        return self.tokenizer.uncleaned()

    def images(self, images: Tensor, resize: Resize) -> Tensor:
        """Unit-length features of images of one size.

        Args:
            images: uint8 [N, 3, H, W], or float in [0, 1] where a gradient is wanted.
            resize: images [n, 3, H, W] in [0, 1] and the tower's side in pixels -> [n, 3, side, side].

        Returns:
            float32 [N, D] on the backbone's device.
        """
        return self._encode(tower_pixels(images, resize, self.preprocess, self.device))

    def frames(self, clips: Sequence[Tensor], resize: Resize) -> Tensor:
        """Unit-length features of every frame of clips uint8 [T, 3, H, W] of any sizes: float32 [sum of T, D]."""
        return self._encode(frame_pixels(clips, resize, self.preprocess, self.device))

    def _encode(self, pixels: Tensor) -> Tensor:
        pooled = [self._pooled(chunk.to(self.dtype)).float() for chunk in pixels.split(FORWARD_CHUNK)]
        return F.normalize(self._project_image(torch.cat(pooled)), dim=-1)

    def _pooled(self, pixels: Tensor) -> Tensor:
        count = len(pixels)
        if self._static:  # few shapes, each of which is compiled once
            pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, (1 << (count - 1).bit_length()) - count))
        return self._model.encode_image(pixels)[:count]

    def texts(self, prompts: Sequence[str], *, cleaned: bool = True) -> Tensor:
        """Unit-length features of prompts, float32 [B, D]; each distinct prompt is encoded once, and remembered.

        Args:
            cleaned: see `ClipTokenizer`.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if (prompt, cleaned) not in self._texts]
        if new:
            keys = [(prompt, cleaned) for prompt in new]
            self._texts |= zip(keys, self._encode_texts(new, cleaned).unbind(), strict=True)
        features = torch.stack([self._texts[prompt, cleaned] for prompt in prompts])
        for oldest in list(self._texts)[: max(0, len(self._texts) - TEXTS_KEPT)]:
            del self._texts[oldest]
        return features

    @torch.inference_mode(False)  # what is remembered has to serve callers who want a gradient too
    @torch.no_grad()
    def _encode_texts(self, prompts: Sequence[str], cleaned: bool) -> Tensor:
        tokens = (self.tokenizer if cleaned else self.uncleaned)(prompts).to(self.device)
        pooled = torch.cat([self._model.encode_text(chunk).float() for chunk in tokens.split(FORWARD_CHUNK)])
        projection = self._text_projection
        if isinstance(projection, torch.nn.Linear):
            pooled = projection(pooled)
        elif projection is not None:
            pooled = pooled @ projection
        return F.normalize(pooled, dim=-1)


def _sequence_first(transformer: Any) -> None:
    """Has open_clip's text transformer run as [L, N, D], which gives the same features.

    As [N, L, D] with a mask, torch 2.15 sees a tensor that it cannot flatten, copies a layer's weight for each of the L
    tokens, and takes 17 times as long on a CPU in bfloat16. The image tower has no mask and another path.
    """
    transformer.batch_first = False
    for block in transformer.resblocks:
        block.attn.batch_first = False


def _take_image_projection(tower: Any, device: torch.device) -> tuple[Callable[[Tensor], Tensor], int]:
    """The last step of an image tower, in float32, and how many features it gives; the tower then ends before it."""
    if hasattr(tower, "attnpool"):  # a ResNet's projection is a part of its attention pooling
        pool = tower.attnpool.requires_grad_(False).to(device)
        tower.attnpool = torch.nn.Identity()
        return pool, int(pool.c_proj.out_features)
    projection = tower.proj.detach().to(device)
    tower.proj = None
    return lambda pooled: pooled @ projection, int(projection.shape[1])


def load_clip_backbone(
    *, config: str | Path, checkpoint: Path, device: torch.device, dtype: torch.dtype
) -> ClipBackbone:
    """Loader for a `BackboneSpec`; raises ValueError as `mmalign.backbones.clip.load_clip` does."""
    return ClipBackbone(config, checkpoint, device, dtype)


# ------------------------------------------------------------------------------------------------ what scorers share


def frame_features(clip: ClipBackbone, batch: Batch, geometry: Geometry) -> Tensor:
    """Unit-length features of every frame of a batch, float32 [sum of T, D]; one pass for all who ask for the same."""
    clips = batch.clips()
    geometry = _settled(geometry, clips, clip.preprocess.size)
    return batch.shared((id(clip), geometry), lambda: clip.frames(clips, geometry))


def frame_texts(clip: ClipBackbone, batch: Batch, *, prefix: str = "", cleaned: bool = True) -> Tensor:
    """Unit-length features of each frame's prompt, float32 [sum of T, D]; see `frame_cosines`."""
    prompts = [prefix + prompt for prompt in batch.prompts]
    texts = batch.shared((id(clip), "texts", prefix, cleaned), lambda: clip.texts(prompts, cleaned=cleaned))
    counts = torch.tensor([len(one) for one in batch.clips()], device=texts.device)
    return texts.repeat_interleave(counts, dim=0)


def frame_cosines(
    clip: ClipBackbone, batch: Batch, geometry: Geometry, *, prefix: str = "", cleaned: bool = True
) -> Tensor:
    """Cosine of every frame with its item's prompt, float32 [sum of T].

    Args:
        prefix: put before each prompt.
        cleaned: see `ClipTokenizer`.
    """
    frames = frame_features(clip, batch, geometry)
    return (frames * frame_texts(clip, batch, prefix=prefix, cleaned=cleaned)).sum(dim=-1)


def image_cosines(
    clip: ClipBackbone,
    images: Tensor,
    prompts: Sequence[str],
    geometry: Geometry,
    *,
    prefix: str = "",
    cleaned: bool = True,
) -> Tensor:
    """`frame_cosines` with a gradient: images float [B, 3, H, W] in [0, 1] -> float32 [B]."""
    texts = clip.texts([prefix + prompt for prompt in prompts], cleaned=cleaned)
    return (clip.images(images, geometry) * texts).sum(dim=-1)
