"""Latent rewards on decoded media: encoded by the pipeline that they were fitted on, and scored as clean latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmalign.backbones.latent_reward import Loaded, clean_time, latent_files, load_latent, read_latent, weight_hashes
from mmalign.backbones.latent_trunk import cut
from mmalign.backbones.reward_folder import named_scores
from mmalign.frame_plans import Uniform
from mmalign.models import base
from mmalign.models.video import VideoAdapter

FRAMES = 8


class LatentScorer:
    """A latent reward with its pipeline, whose denoiser is cut after the blocks that are read.

    Attributes:
        reward: the network and its reward.json.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        self.facts = read_latent(folder)
        check_pipeline_files(folder)
        self.adapter = base.load(self.facts.model, device=device, dtype=dtype, vae_dtype=torch.float32)
        if self.facts.fps is not None and isinstance(self.adapter, VideoAdapter):
            self.adapter.fps = self.facts.fps  # some families are told it
        self.reward: Loaded = load_latent(folder, self.adapter)
        adapter, blocks = self.adapter, self.facts.latent.blocks
        if self.reward.network.trunk is None:
            self.reward.network.trunk = cut(adapter.denoiser, blocks).requires_grad_(False).eval()
        adapter.denoiser = self.reward.network.trunk
        setattr(adapter.pipe, adapter.denoiser_name, adapter.denoiser)  # the rest is freed

    @torch.no_grad()
    def named(self, clips: Sequence[Tensor], prompts: Sequence[str], normalise: bool) -> dict[str, Tensor]:
        """Scores [B] by name of uint8 [T, 3, H, W]; a picture has T = 1. Grades give `rating` besides.

        Each is scored by itself, so that it cannot depend on the others. A reward on pictures gives a clip the mean
        over 8 of its frames, one on clips reads the beginning of a longer one.

        Raises:
            ValueError: a clip is too short.
        """
        raw = torch.cat([self._one(clip, text) for clip, text in zip(clips, prompts, strict=True)])
        facts, reward = self.facts, self.reward
        one = len(facts.names) == 1
        found = named_scores(raw[:, 0] if one else raw, facts.axes, facts.grades)
        if normalise:
            scaled = (raw - reward.mean) / reward.std
            found |= named_scores(scaled[:, 0] if one else scaled, facts.axes, None)
        return found

    def _one(self, clip: Tensor, prompt: str) -> Tensor:
        """Raw scores [1, axes] of one medium."""
        adapter, side, wanted = self.adapter, self.facts.resolution, self.facts.frames or 1
        height, width = clip.shape[-2:]
        if adapter.modality == "image":
            pixels = covered(clip[Uniform(FRAMES).indices(len(clip), 1.0)], side)
        elif len(clip) < wanted:
            raise ValueError(f"the reward was fitted on clips of {wanted} frames, and this has {len(clip)}")
        else:
            pixels = covered(clip[:wanted], side).transpose(0, 1)[None]  # [1, 3, F, H, W]
        latents = adapter.encode_media(pixels.to(adapter.device))[:, 0]
        condition = adapter.encode_prompt([prompt])
        condition = adapter.add_size(condition, torch.tensor([[float(height), float(width), 0, 0, side, side]]))
        told = {name: value.expand(len(latents), *value.shape[1:]) for name, value in condition.items()}
        t = clean_time(adapter.process, latents)
        return self.reward.scores(adapter, latents, t, told, normalise=False).mean(0, keepdim=True)


def covered(clip: Tensor, side: int) -> Tensor:
    """uint8 [T, 3, H, W] as float in [-1, 1], resized until it covers the square of `side`, and its middle."""
    height, width = clip.shape[-2:]
    pixels = clip.float() / 127.5 - 1
    if (height, width) == (side, side):
        return pixels
    scale = side / min(height, width)
    new = max(side, round(height * scale)), max(side, round(width * scale))
    pixels = F.interpolate(pixels, new, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (new[0] - side) // 2, (new[1] - side) // 2
    return pixels[..., top : top + side, left : left + side]


def check_pipeline_files(folder: str | Path) -> None:
    """ValueError unless the pipeline that a reward was fitted on is where it was, with the files that it had."""
    facts = read_latent(folder)
    base.check(facts.model)
    now = weight_hashes(facts.model)
    unread = {"unet", "transformer"} if facts.trunk == "own" else set()
    changed = sorted(name for name, told in facts.parts.items() if now.get(name) != told and name not in unread)
    if changed:
        raise ValueError(
            f"{folder}: was fitted on {facts.model.path}, where {' and '.join(changed)} changed since; put the old "
            "files back, or fit a new reward"
        )


def scoring_files(folder: str | Path) -> list[Path]:
    """Every file that decides a score: the reward's own. Those of the pipeline are told by hash in reward.json.

    Raises:
        ValueError: one is missing, or the pipeline is not what it was.
    """
    files = latent_files(folder)
    check_pipeline_files(folder)
    return files


def load_scorer(*, folder: Path, device: torch.device, dtype: torch.dtype) -> LatentScorer:
    """Loader for a `BackboneSpec`."""
    return LatentScorer(folder, device, dtype)
