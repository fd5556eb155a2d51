"""Tiny diffusers pipelines for tests: the real classes with small random weights, saved as a user's checkpoint is.

A mock would only show that the code agrees with itself. These folders go through ``save_pretrained`` and
``from_pretrained`` of the real ``StableDiffusionPipeline`` and ``StableDiffusionXLPipeline``, so that the file layout,
key names, text encoders, time ids and schedulers are those of a published checkpoint. Each is made in well under a
second and takes less than 3 MB.
"""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

IMAGE_SIZE = 32
"""Side, in pixels, of the images of every tiny pipeline (8x8 latents, a VAE of factor 4)."""

TOKENS = 32
"""Length, in tokens, of the padded prompt of every tiny pipeline."""

_WIDTH = 32
_WORDS = ("a", "of", "on", "red", "green", "blue", "large", "small", "circle", "square", "triangle", "photo")
_NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Make a ``CLIPTokenizer`` whose vocabulary is every byte plus a dozen whole words.

    Any text encodes without an unknown token: words outside of the list fall apart into bytes.

    Args:
        pad_token: ``"<|endoftext|>"`` as in SD 1.x and the first SDXL encoder, ``"!"`` as in the second.
    """
    alphabet = sorted(ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces[:2] = ["".join(pair)]
    entries = [*alphabet, *(char + "</w>" for char in alphabet), *("".join(pair) for pair in merges)]
    vocab = {entry: index for index, entry in enumerate([*entries, "<|startoftext|>", "<|endoftext|>"])}
    with tempfile.TemporaryDirectory() as folder:
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        Path(folder, "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, pad_token=pad_token)


def text_config(tokenizer: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    """Two layers, 32 wide, as long as `tokenizer` pads."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        projection_dim=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(scaling_factor: float, force_upcast: bool) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=scaling_factor,
        force_upcast=force_upcast,
    )


def tiny_sd(path: str | Path, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", seed: int = 0) -> Path:
    """Save a tiny ``StableDiffusionPipeline`` as a checkpoint folder.

    Args:
        path: folder to write; made when it does not exist.
        prediction_type: ``"epsilon"`` gives the layout of SD 1.x (convolutions around the transformer blocks, PNDM);
            ``"v_prediction"`` that of SD 2.x (linear projections, GELU text encoder, DDIM).
        seed: seed of the random weights; the caller's random state is left as it was.

    Returns:
        The folder. It holds fp32 safetensors, no safety checker, and draws 32x32 images from 8x8 latents.
    """
    second = prediction_type == "v_prediction"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        text_encoder = CLIPTextModel(text_config(tokenizer, "gelu" if second else "quick_gelu"))
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(2, 4) if second else 4,
            cross_attention_dim=_WIDTH,
            use_linear_projection=second,
            norm_num_groups=8,
        )
        vae = _vae(0.18215, force_upcast=True)
    settings = {**_NOISE, "prediction_type": prediction_type, "steps_offset": 1, "set_alpha_to_one": False}
    scheduler: SchedulerMixin
    scheduler = (
        DDIMScheduler(clip_sample=False, **settings) if second else PNDMScheduler(skip_prk_steps=True, **settings)
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(str(path))
    return Path(path)


def tiny_sdxl(path: str | Path, seed: int = 0) -> Path:
    """Save a tiny ``StableDiffusionXLPipeline`` as a checkpoint folder.

    It has what sets SDXL apart: two text encoders (the second with a projection), their penultimate hidden states side
    by side as the condition, pooled text and six time ids as the added embedding, and three resolution levels of two
    layers each with attention in the lower two, so that its block numbers are those of the published model.

    Args:
        path: folder to write; made when it does not exist.
        seed: seed of the random weights; the caller's random state is left as it was.

    Returns:
        The folder. It holds fp32 safetensors and draws 32x32 images from 8x8 latents.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizers = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
        text_encoder = CLIPTextModel(text_config(tokenizers[0], "quick_gelu"))
        text_encoder_2 = CLIPTextModelWithProjection(text_config(tokenizers[1], "gelu"))
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 24),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),
            attention_head_dim=(1, 2, 3),
            cross_attention_dim=2 * _WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + _WIDTH,
            norm_num_groups=8,
        )
        vae = _vae(0.13025, force_upcast=True)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **_NOISE),
        add_watermarker=False,
    )
    pipeline.save_pretrained(str(path))
    return Path(path)
