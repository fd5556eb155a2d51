"""The DPO recipe of the diffusers project's published LoRA script, as a computation in plain torch and diffusers.

Every step decodes both pictures, encodes them with the VAE in fp32 and the prompts with the text encoder, runs the
policy on winners and losers in one batch, runs the reference with the adapters disabled, clips and takes an AdamW step.
Nothing is kept between steps. Nothing here comes from mmalign, so that it can be held against it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor

BETA, KAPPA, LR, RANK = 2000.0, 0.5, 1e-5, 8
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Row:
    """A pair on disk, as the recipe reads it."""

    prompt: str
    winner: Path
    loser: Path


@dataclass(frozen=True)
class Draws:
    """The randomness of a batch of B pairs: posterior noise [2B, ...], timesteps [B], noise [B, ...]."""

    posterior: Tensor
    t: Tensor
    noise: Tensor


class Recipe:
    """Trains the LoRA that `pipe.unet` already has. `low` runs the UNet under bf16 autocast; the VAE stays in fp32."""

    def __init__(self, pipe: Any, rows: list[Row], batch_size: int, low: bool, device: torch.device):
        self.unet, self.vae, self.text, self.tokenizer = pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer
        self.process = DDPMScheduler.from_config(pipe.scheduler.config)
        self.beta = BETA
        self.rows, self.batch_size, self.low, self.device = rows, batch_size, low, device
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.01)

    def load(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Pixels [2B, 3, R, R] in [-1, 1], winners first, and token ids [B, L]."""
        rows = [self.rows[i] for i in indices]
        files = [row.winner for row in rows] + [row.loser for row in rows]
        arrays = [np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 127.5 - 1 for file in files]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
        words = self.tokenizer(
            [row.prompt for row in rows], padding="max_length", truncation=True,
            max_length=self.tokenizer.model_max_length, return_tensors="pt",
        )  # fmt: skip
        return pixels, words.input_ids

    def loss(self, pixels: Tensor, tokens: Tensor, draws: Draws | None = None) -> Tensor:
        """The loss of a batch; with `draws`, on that randomness instead of fresh, and encoding one item at a time.

        A convolution over a batch rounds otherwise than over its items, and the difference of two gradients that
        nearly cancel shows it; where two computations are compared, both have to encode alike.
        """
        with torch.no_grad():
            pixels, tokens = pixels.to(self.device, torch.float32), tokens.to(self.device)
            if draws is None:
                sampled, words = self.vae.encode(pixels).latent_dist.sample(), self.text(tokens)[0]
            else:
                found = [self.vae.encode(one).latent_dist for one in pixels.split(1)]
                given = draws.posterior.to(self.device).split(1)
                sampled = torch.cat([each.mean + each.std * unit for each, unit in zip(found, given, strict=True)])
                words = torch.cat([self.text(one)[0] for one in tokens.split(1)])
            latents, words = sampled * self.vae.config.scaling_factor, words.repeat(2, 1, 1)
        half = latents.shape[0] // 2
        eps = torch.randn_like(latents[:half]) if draws is None else draws.noise.to(self.device)
        t = torch.randint(0, self.process.config.num_train_timesteps, (half,)) if draws is None else draws.t
        eps, t = eps.repeat(2, 1, 1, 1), t.to(self.device).repeat(2)
        noisy = self.process.add_noise(latents, eps, t).to(self.unet.dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            policy = self.unet(noisy, t, words.to(self.unet.dtype)).sample
        self.unet.disable_adapters()
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            reference = self.unet(noisy, t, words.to(self.unet.dtype)).sample
        self.unet.enable_adapters()
        velocity = self.process.config.prediction_type == "v_prediction"
        target = self.process.get_velocity(latents, eps, t) if velocity else eps
        ours, theirs = ((prediction.float() - target).pow(2).mean((1, 2, 3)) for prediction in (policy, reference))
        difference = (ours[:half] - ours[half:]) - (theirs[:half] - theirs[half:])
        return -F.logsigmoid(-KAPPA * self.beta * difference).mean()

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        loss = self.loss(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()

    def block(self, steps: int) -> None:
        """`steps` steps; a thread decodes two batches ahead, as a data loader's worker does."""
        size = self.batch_size
        wanted = [list(range(step * size, (step + 1) * size)) for step in range(steps)]
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(self.load, indices) for indices in wanted[:2]]
            for step in range(steps):
                batch = ahead.pop(0).result()
                if step + 2 < steps:
                    ahead.append(pool.submit(self.load, wanted[step + 2]))
                self.step(batch)
