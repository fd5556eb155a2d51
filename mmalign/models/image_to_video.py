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
    keeps_first = False  # whether the first latent frame is the picture's at all times, and `predict` says so

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

    @torch.no_grad()
    def encode_images(self, images: Tensor, frames: int) -> Condition:
        """image_latents, and what `look` adds."""
        return {"image_latents": self.image_latents(images, frames), **self.look(images)}

    def image_latents(self, images: Tensor, frames: int) -> Tensor:
        """What the denoiser is given as latents, of images [B, 3, H, W] in [-1, 1]: by default [B, C, 1, h, w]."""
        return self.first_latents(images)

    def look(self, images: Tensor) -> Condition:
        """What a vision tower, or its processor, makes of images [B, 3, H, W] in [-1, 1]; nothing by default."""
        return {}

    def blank(self, rows: int) -> Condition:
        """Tensors as `look` returns them, of unknown values: memory is estimated without pictures."""
        return {}

    def first_latents(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1], each a clip of one frame, to the means of their latents [B, C, 1, h, w]."""
        with exact(self.device), torch.no_grad():
            posterior = self.vae.encode(images.to(self.device, self.vae.dtype)[:, :, None]).latent_dist
        return self.scaled(posterior.mean.float(), posterior.std.float())[0]

    @torch.no_grad()
    def encode_media(self, pixels: Tensor) -> Tensor:
        """As in other families; a first latent frame that is kept has what the denoiser is told, and no deviation."""
        moments = super().encode_media(pixels)
        if self.keeps_first:
            moments[:, 0, :, :1] = self.first_latents(pixels[:, :, 0])
            moments[:, 1, :, :1] = 0
        return moments

    def given(self, condition: Condition) -> tuple[Condition, Tensor]:
        """A condition without the latents of first frames, and these. ValueError where it has none."""
        if "image_latents" not in condition:
            raise ValueError(
                f"{self.family} is told the first frame: join what encode_images makes of it to the prompts' condition"
            )
        return {name: value for name, value in condition.items() if name != "image_latents"}, condition["image_latents"]

    def token_times(self, t: Tensor, shape: tuple[int, ...]) -> Tensor:
        """t [B] for each token [B, L] of latents of this shape; 0 in the first latent frame."""
        frames = torch.ones(shape[2], device=t.device)
        frames[0] = 0
        return (t[:, None] * frames).repeat_interleave(self.image_tokens(shape) // shape[2], dim=1)


def with_first(latents: Tensor, first: Tensor) -> Tensor:
    """Latents [B, C, T, h, w] whose first frame is `first` [B, C, 1, h, w]."""
    return torch.cat([first.to(latents), latents[:, :, 1:]], dim=2)


def known_velocity(noisy: Tensor, t: Tensor, first: Tensor) -> Tensor:
    """That of a first latent frame x_0 which is given, (x_t - x_0) / t, at flow times t [B]: [B, C, 1, h, w].

    It adds nothing to a loss, and a sampler that follows it ends at the picture.
    """
    return (noisy[:, :, :1] - first) / t[:, None, None, None, None]


class CogVideoXImage(FromImage, CogVideoX):
    """Adapter for folders that `CogVideoXImageToVideoPipeline.from_pretrained` loads.

    The first frame's latents, and zeros for the other frames, stand beside the noisy ones as channels.
    """

    family = "cogvideox_i2v"
    pipeline_class: Any = CogVideoXImageToVideoPipeline
    beside = ("image_latents",)

    def image_latents(self, images: Tensor, frames: int) -> Tensor:
        """[B, C, T, h, w]."""
        first = self.first_latents(images)
        if self.vae.config.invert_scale_latents:  # of 1.5, whose training divided here
            first = first / self.vae.config.scaling_factor**2
        rest = first.new_zeros(*first.shape[:2], self.latent_frames(frames) - 1, *first.shape[3:])
        return torch.cat([first, rest], dim=2)

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        self.given(condition)
        return super().predict(noisy, t, condition, denoiser)


class LTXVideoImage(FromImage, LTXVideo):
    """Adapter for folders that `LTXImageToVideoPipeline.save_pretrained` wrote.

    The first latent frame is the image's, at time 0, and `predict` returns its known velocity; the pipeline leaves it
    as it is.
    """

    family = "ltx_i2v"
    pipeline_class: Any = LTXImageToVideoPipeline
    keeps_first = True

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, denoiser: nn.Module | None = None) -> Tensor:
        known, first = self.given(condition)
        first, t = first.to(noisy), t.to(noisy.device)
        found = super().predict(with_first(noisy, first), self.token_times(t, tuple(noisy.shape)), known, denoiser)
        return with_first(found, known_velocity(noisy, t, first))


class WanImage(FromImage, Wan):
    """Adapter for folders that `WanImageToVideoPipeline.from_pretrained` loads.

    Wan 2.1 I2V and 2.2 I2V A14B: latents of the clip that is the first frame and then grey, after a mask of what is
    known, stand beside the noisy ones as channels; 2.1 is told the states of CLIP's vision tower beside the text.
    Wan 2.2 TI2V-5B (`expand_timesteps`): the first latent frame is the image's, at time 0, and `predict` returns its
    known velocity.
    """

    family = "wan_i2v"
    pipeline_class: Any = WanImageToVideoPipeline
    text_encoders = ("text_encoder",)
    lora_targets = (*Wan.lora_targets, "add_k_proj", "add_v_proj")

    def __init__(self, pipe: Any, config: Model):
        super().__init__(pipe, config)
        told, path = self.denoiser.config, config.path
        self.keeps_first = bool(pipe.config.expand_timesteps)
        if told.added_kv_proj_dim is None:
            self.lora_targets = Wan.lora_targets
        if told.image_dim is not None and None in (pipe.image_encoder, pipe.image_processor):
            raise ValueError(
                f"{path}: the transformer is told the states of a vision tower (Wan 2.1), and the folder has none; "
                "give it with its processor: model.components: {image_encoder: path, image_processor: path}"
            )
        channels = self.channels if self.keeps_first else 2 * self.channels + self.temporal
        if told.in_channels != channels:
            raise ValueError(
                f"{path}: the {self.denoiser_name} takes {told.in_channels} channels, and one that goes on from a "
                f"picture takes {channels} with this autoencoder; give an image-to-video checkpoint, or one of "
                "WanPipeline to draw from text"
            )

    def frozen(self) -> list[nn.Module]:
        tower = self.pipe.image_encoder
        return [*super().frozen(), *([] if tower is None else [tower])]

    def image_latents(self, images: Tensor, frames: int) -> Tensor:
        """[B, r + C, T, h, w] with the autoencoder's stride r in time; of TI2V [B, C, 1, h, w]."""
        if self.keeps_first:
            return self.first_latents(images)
        clip = torch.cat(
            [images[:, :, None], images.new_zeros(*images.shape[:2], frames - 1, *images.shape[2:])], dim=2
        )
        latents = self.encode_media(clip)[:, 0]
        mask = latents.new_zeros(len(latents), self.temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], dim=1)

    def look(self, images: Tensor) -> Condition:
        """encoder_hidden_states_image [B, L, D], where there is a vision tower."""
        if self.denoiser.config.image_dim is None:
            return {}
        with exact(self.device):
            states = self.pipe.encode_image(pictures(images), self.device)
        return {"encoder_hidden_states_image": states.float()}

    def blank(self, rows: int) -> Condition:
        if self.denoiser.config.image_dim is None:
            return {}
        seen = self.pipe.image_encoder.config
        tokens = (seen.image_size // seen.patch_size) ** 2 + 1
        return {"encoder_hidden_states_image": torch.empty(rows, tokens, seen.hidden_size)}

    def _velocity(self, model: Any, noisy: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        known, given = self.given(condition)
        given = given.to(noisy)
        if not self.keeps_first:
            return super()._velocity(model, torch.cat([noisy, given], dim=1), timestep, known)
        found = super()._velocity(model, with_first(noisy, given), timestep, known)
        t = timestep / self.pipe.scheduler.config.num_train_timesteps
        return with_first(found, known_velocity(noisy, t, given))


def pictures(images: Tensor) -> list[Image.Image]:
    """Images [B, 3, H, W] in [-1, 1] as 8-bit pictures, which processors of vision towers take."""
    seen = ((images / 2 + 0.5) * 255).round().clamp(0, 255).to("cpu", torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in seen]
