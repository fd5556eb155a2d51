"""Video families that go on from a picture: the first frame is a condition of the denoiser."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXImageToVideoPipeline, LTXImageToVideoPipeline, WanImageToVideoPipeline
from PIL import Image
from torch import Tensor, nn

from mmalign.jobs_inputs import Model
from mmalign.models.adapter import Condition, exact
from mmalign.models.cogvideox import CogVideoX
from mmalign.models.ltx import LTXVideo
from mmalign.models.video import VideoAdapter
from mmalign.models.wan import Wan


class FromImage(VideoAdapter):
    """What they share. In training a clip's own first frame is the condition; in sampling it is given.

    Posteriors of first frames are taken at their mean.
    """

    of_image = True

    def draw(
        self, prompts: list[str], generators: list[torch.Generator], *, images: list[Image.Image] | None = None,
        negative_prompts: list[str] | None = None, **options: Any,
    ) -> np.ndarray:  # fmt: skip
        """As in other families; a clip for each of the images, drawn one by one: pipelines batch images differently.

        Raises:
            ValueError: there are no images.
        """
        if images is None:
            raise ValueError(f"{self.family} goes on from a picture; give the table of prompts a column `image`")
        away: list[str | None] = [*negative_prompts] if negative_prompts else [None] * len(prompts)
        rows = zip(prompts, generators, images, away, strict=True)
        return np.concatenate(
            [
                # LTX-Video's decoder takes a generator and no list of one.
                super(FromImage, self).draw([p], g, image=image, negative_prompts=n and [n], **options)  # type: ignore[arg-type]
                for p, g, image, n in rows
            ]
        )

    def first_latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], each a clip of one frame, to the means of their latents [B, C, 1, h, w]."""
        with exact(self.device), torch.no_grad():
            posterior = self.vae.encode(images.to(self.device, self.vae.dtype)[:, :, None]).latent_dist
        return self.scaled(posterior.mean.float(), posterior.std.float())[0]


class CogVideoXImage(FromImage, CogVideoX):
    """Adapter for folders that `CogVideoXImageToVideoPipeline.from_pretrained` loads.

    The first frame's latents, and zeros for the other frames, stand beside the noisy ones as channels.
    """

    family = "cogvideox_i2v"
    pipeline_class: Any = CogVideoXImageToVideoPipeline
    beside = ("image_latents",)

    def encode_images(self, images: Tensor, frames: int) -> Condition:
        """image_latents [B, C, T, h, w]."""
        first = self.first_latents(images)
        if self.vae.config.invert_scale_latents:  # of 1.5, whose training divided here
            first = first / self.vae.config.scaling_factor**2
        rest = first.new_zeros(*first.shape[:2], self.latent_frames(frames) - 1, *first.shape[3:])
        return {"image_latents": torch.cat([first, rest], dim=2)}


class LTXVideoImage(FromImage, LTXVideo):
    """Adapter for folders that `LTXImageToVideoPipeline.save_pretrained` wrote.

    The first latent frame is the image's, at time 0. Its velocity is known, (x_t - x_0) / t, and `predict` returns
    that: so it adds nothing to a loss, and a sampler ends at the image, as the pipeline, which leaves it there.
    """

    family = "ltx_i2v"
    pipeline_class: Any = LTXImageToVideoPipeline

    def encode_images(self, images: Tensor, frames: int) -> Condition:
        """image_latents [B, C, 1, h, w]."""
        return {"image_latents": self.first_latents(images)}

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        known = dict(condition)
        image = known.pop("image_latents").to(noisy)
        t = t.to(noisy.device)
        frames = torch.ones(noisy.shape[2], device=noisy.device)
        frames[0] = 0
        each = (t[:, None] * frames).repeat_interleave(noisy.shape[3] * noisy.shape[4], dim=1)  # of each token
        found = super().predict(torch.cat([image, noisy[:, :, 1:]], dim=2), each, known, denoiser)
        velocity = (noisy[:, :, :1] - image) / t[:, None, None, None, None]
        return torch.cat([velocity.to(found), found[:, :, 1:]], dim=2)


class WanImage(FromImage, Wan):
    """Adapter for folders that `WanImageToVideoPipeline.from_pretrained` loads: Wan 2.1 I2V.

    Latents of the clip that is the first frame and then grey, after a mask of what is known, stand beside the noisy
    ones as channels; the states of CLIP's vision tower beside the text.
    """

    family = "wan_i2v"
    pipeline_class: Any = WanImageToVideoPipeline
    text_encoders = ("text_encoder",)
    lora_targets = (*Wan.lora_targets, "add_k_proj", "add_v_proj")

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        if pipe.config.expand_timesteps or pipe.image_encoder is None or self.denoiser.config.image_dim is None:
            raise ValueError(
                f"{config.path}: this is no Wan 2.1 image-to-video model, whose transformer is told the states of a "
                "vision tower; Wan 2.2's are not built"
            )

    def frozen(self) -> list[nn.Module]:
        return [*super().frozen(), self.pipe.image_encoder]

    @torch.no_grad()
    def encode_images(self, images: Tensor, frames: int) -> Condition:
        """image_latents [B, r + C, T, h, w] with the autoencoder's stride r in time, encoder_hidden_states_image."""
        clip = torch.cat(
            [images[:, :, None], images.new_zeros(*images.shape[:2], frames - 1, *images.shape[2:])], dim=2
        )
        latents = self.encode_media(clip)[:, 0]
        mask = latents.new_zeros(len(latents), self.temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        pictures = [
            Image.fromarray(image.permute(1, 2, 0).numpy())
            for image in ((images / 2 + 0.5) * 255).round().clamp(0, 255).to("cpu", torch.uint8)
        ]
        with exact(self.device):
            states = self.pipe.encode_image(pictures, self.device)
        return {"image_latents": torch.cat([mask, latents], dim=1), "encoder_hidden_states_image": states.float()}

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        known = dict(condition)
        beside = known.pop("image_latents").to(noisy)
        return super().predict(torch.cat([noisy, beside], dim=1), t, known, denoiser)
