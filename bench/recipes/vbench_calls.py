"""How VBench computes its quality dimensions (Vchitect/VBench 0.1.5), as computations, for `bench/vbench.py`.

A dimension at a time: its network is read from its file, then for each clip the whole clip is decoded and goes through
it. DINO, MUSIQ, RAFT and AMT take one frame, or one pair, at a time; CLIP ViT-B/32 takes a whole clip and, like MUSIQ,
keeps what a backward pass would need; CLIP ViT-L/14 takes 32 frames. RAFT encodes both frames of a pair and the first
one's context for each pair and brings the flow of every one of its 20 updates to full size; the lengths of the last
one are sorted whole by numpy. Frames that RAFT does not look at go to the device too.

The networks are this project's, and so is the decoder, so that what is measured is how they are called. DINO's
attention is written out, as its authors' is. What MUSIQ's authors pad is left out, which spares the recipe a sixth of
its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Lambda, Normalize, Resize

from mmalign.backbones.amt import load_amt
from mmalign.backbones.clip import OPENAI_MEAN, OPENAI_STD, PUBLISHED, load_clip
from mmalign.backbones.dino import IMAGENET, load_dino, vit_tokens
from mmalign.backbones.heads import load_head
from mmalign.backbones.musiq import load_musiq
from mmalign.backbones.raft import UPDATES, load_raft
from mmalign.video import Clip, read_video

Row = dict[str, float]
AESTHETIC_BATCH = 32
LARGEST = 512  # of the longer side of what MUSIQ gets


class Reference:
    """The seven dimensions, each by `score(name, files)`.

    Args:
        files: of the networks (`vbench_weights.Files`).
        timed: called with load, decode or compute; a context in which this part runs.
    """

    def __init__(self, files: Any, device: torch.device, timed: Callable[[str], Any]):
        self.files, self.device, self.timed = files, device, timed

    def score(self, name: str, clips: Sequence[Path]) -> list[Row]:
        """A row of sub-scores for each clip."""
        with self.timed("load"):
            network = getattr(self, f"load_{name}", lambda: None)()
        rows = []
        for path in clips:
            with self.timed("decode"):
                clip = read_video(path)
            with self.timed("compute"):
                rows.append(getattr(self, name)(network, clip))
        return rows

    def _loader(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": torch.float32}

    # -------------------------------------------------------------------------------------------- features

    def load_subject_consistency(self) -> Any:
        vit = load_dino(checkpoint=self.files.dino, **self._loader())._vit
        for block in vit.blocks:
            block.attn.fused_attn = False
        return vit

    def subject_consistency(self, vit: Any, clip: Clip) -> Row:
        transform = Compose([
            Lambda(lambda frames: frames.float()), Resize(IMAGENET.size, antialias=False),
            Lambda(lambda frames: frames.div(255.0)), Normalize(IMAGENET.mean, IMAGENET.std),
        ])  # fmt: skip
        pixels = transform(clip.frames)
        features = []
        for frame in pixels:
            with torch.no_grad():
                tokens = vit_tokens(vit, frame[None].to(self.device))
                features.append(F.normalize(vit.norm(tokens)[:, 0], dim=-1))
        return _consistency(features)

    def load_background_consistency(self) -> Any:
        network, side = self._clip(self.files.b32, self.files.clip_b32)
        return network.requires_grad_(True), side

    def background_consistency(self, networks: Any, clip: Clip) -> Row:
        clip_model, side = networks
        with torch.enable_grad():
            pixels = _clip_pixels(clip.frames, side)
            features = F.normalize(clip_model.encode_image(pixels.to(self.device)), dim=-1)
            return _consistency(list(features.split(1)))

    def load_aesthetic_quality(self) -> Any:
        return *self._clip(self.files.l14, self.files.clip_l14), load_head(
            checkpoint=self.files.head, head="v1", **self._loader()
        )

    @torch.no_grad()
    def aesthetic_quality(self, networks: Any, clip: Clip) -> Row:
        clip_model, side, head = networks
        pixels = _clip_pixels(clip.frames, side)
        rated = [
            head(F.normalize(clip_model.encode_image(part.to(self.device)), dim=-1)).squeeze(-1) / 10
            for part in pixels.split(AESTHETIC_BATCH)
        ]
        return {"score": torch.cat(rated).mean().item()}

    def _clip(self, config: str, checkpoint: Path) -> tuple[Any, int]:
        """The network and the side of its input."""
        name, _ = PUBLISHED.get(config, (config, ""))
        network, _, preprocess = load_clip(name, checkpoint)
        return network.eval().to(self.device), preprocess.size

    def load_imaging_quality(self) -> Any:
        return load_musiq(checkpoint=self.files.musiq, **self._loader()).requires_grad_(True)

    def imaging_quality(self, musiq: Any, clip: Clip) -> Row:
        height, width = clip.frames.shape[-2:]
        frames = clip.frames.float()
        if max(height, width) > LARGEST:
            scale = LARGEST / max(height, width)
            size = [int(scale * height), int(scale * width)]
            frames = Resize(size, antialias=False)(frames)
        frames = frames / 255.0
        total = 0.0
        with torch.enable_grad():
            for frame in frames:
                total += musiq(frame[None].to(self.device)).item()
        return {"score": total / len(frames)}

    # -------------------------------------------------------------------------------------------- pairs

    def temporal_flickering(self, _: None, clip: Clip) -> Row:
        frames = list(clip.frames.permute(0, 2, 3, 1).contiguous().numpy())
        means = [np.mean(np.abs(one.astype(np.float32) - other.astype(np.float32))) for one, other in pairwise(frames)]
        return {"score": (255.0 - float(np.mean(means))) / 255.0}

    def load_motion_smoothness(self) -> Any:
        return load_amt(checkpoint=self.files.amt, **self._loader())

    @torch.no_grad()
    def motion_smoothness(self, amt: Any, clip: Clip) -> Row:
        kept = [(frame[None].float() / 255.0).to(self.device) for frame in clip.frames[::2]]
        height, width = clip.frames.shape[-2:]
        left, top = -width % 16 // 2, -height % 16 // 2
        sides = (left, -width % 16 - left, top, -height % 16 - top)
        kept = [F.pad(frame, sides, mode="replicate") for frame in kept]
        shown = clip.frames[1::2].permute(0, 2, 3, 1).numpy()
        means = []
        for place, (one, other) in enumerate(pairwise(kept)):
            drawn = amt(one, other)[0, :, top : top + height, left : left + width]
            picture = (drawn.permute(1, 2, 0).cpu().numpy() * 255.0).clip(0, 255).astype(np.uint8)
            apart = np.maximum(picture, shown[place]) - np.minimum(picture, shown[place])
            means.append(np.mean(apart))
        return {"score": float((255.0 - np.mean(means)) / 255.0)}

    def load_dynamic_degree(self) -> Any:
        return load_raft(checkpoint=self.files.raft, **self._loader()).network

    @torch.no_grad()
    def dynamic_degree(self, raft: Any, clip: Clip) -> Row:
        frames = [frame[None].float().to(self.device) for frame in clip.frames]
        frames = frames[:: max(1, round(clip.fps / 8))]
        height, width = frames[0].shape[-2:]
        left, top = -width % 8 // 2, -height % 8 // 2
        sides = (left, -width % 8 - left, top, -height % 8 - top)
        speeds = []
        for pair in pairwise(frames):
            one, other = (2 * (F.pad(frame, sides, mode="replicate") / 255.0) - 1.0 for frame in pair)
            flow = raft(one, other, num_flow_updates=UPDATES)[-1][0].permute(1, 2, 0).cpu().numpy()
            lengths = np.sqrt(np.square(flow[..., 0]) + np.square(flow[..., 1])).flatten()
            speeds.append(np.mean(np.abs(np.sort(-lengths))[: int(lengths.size * 0.05)]))
        threshold = 6.0 * (min(height, width) / 256.0)
        fast = sum(speed > threshold for speed in speeds)
        return {
            "score": float(fast >= round(4 * (len(frames) / 16.0))),
            "share": float(fast / len(speeds)),
            "motion": float(np.mean(speeds) / threshold),
        }


def _clip_pixels(frames: Tensor, side: int) -> Tensor:
    """A whole clip uint8 [T, 3, H, W] -> float32 [T, 3, side, side], resized without a filter."""
    transform = Compose([
        Lambda(lambda frames: frames.float()), Resize(side, InterpolationMode.BICUBIC, antialias=False),
        CenterCrop(side), Lambda(lambda frames: frames.div(255.0)), Normalize(OPENAI_MEAN, OPENAI_STD),
    ])  # fmt: skip
    found: Tensor = transform(frames)
    return found


def _consistency(features: Sequence[Tensor]) -> Row:
    """Frame by frame, each cosine fetched from the device."""
    total = 0.0
    for former, feature in pairwise(features):
        before = max(0.0, F.cosine_similarity(former, feature).item())
        first = max(0.0, F.cosine_similarity(features[0], feature).item())
        total += (before + first) / 2
    return {"score": total / (len(features) - 1)}
