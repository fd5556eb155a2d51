"""Tiny pipelines of the transformer families: the real classes with small random weights, in a user's folder layout.

As in `tiny`: 32x32 pixels, 8x8 latents, and every folder goes through `save_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from mmalign.testing.tiny import IMAGE_SIZE, text_config, tiny_tokenizer
from mmalign.testing.tiny_language import tiny_gemma, tiny_gemma_tokenizer, tiny_qwen, tiny_qwen_tokenizer

_WIDTH = 32


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random weights from `seed`; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny_t5_tokenizer() -> T5Tokenizer:
    """A `T5Tokenizer` whose vocabulary is the printable ASCII characters and a few words."""
    words = ("a", "red", "green", "blue", "circle", "square", "triangle", "photo", "of")
    pieces = [chr(code) for code in range(33, 127)]
    special: list[tuple[str, float]] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    scored = [("▁", -2.0), *(("▁" + word, -1.0) for word in words), *((piece, -4.0) for piece in pieces)]
    return T5Tokenizer(vocab=special + scored, extra_ids=0, model_max_length=512)


def tiny_t5(tokenizer: T5Tokenizer, width: int = _WIDTH) -> T5EncoderModel:
    """A two-layer T5 encoder."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0,
        )
    )  # fmt: skip


def tiny_vae(channels: int, scaling_factor: float, shift_factor: float | None = None) -> AutoencoderKL:
    """An AutoencoderKL without the 1x1 convolutions around its latents, as the 16-channel ones are published."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=IMAGE_SIZE,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=shift_factor is None,
        use_post_quant_conv=shift_factor is None,
    )


def tiny_sd3(path: str | Path, seed: int = 0, *, t5: bool = True, medium: bool = False) -> Path:
    """Save a tiny `StableDiffusion3Pipeline`.

    Args:
        path: folder to write; made when it does not exist.
        seed: of the random weights.
        t5: with the third text encoder, or without it, as SD3 is often kept to save memory.
        medium: as SD3.5 medium (query and key normalisation, second attention in the first block), else as SD3.
    """
    with seeded(seed):
        tokenizers = tiny_tokenizer(), tiny_tokenizer(pad_token="!")
        encoders = [CLIPTextModelWithProjection(text_config(t, "quick_gelu")) for t in tokenizers]
        tokenizer_3 = tiny_t5_tokenizer() if t5 else None
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4,
            attention_head_dim=8, caption_projection_dim=32, joint_attention_dim=3 * _WIDTH,
            pooled_projection_dim=2 * _WIDTH, pos_embed_max_size=12, qk_norm="rms_norm" if medium else None,
            dual_attention_layers=(0,) if medium else (),
        )  # fmt: skip
        vae = tiny_vae(4, 1.5305, 0.0609)
        encoder_3 = tiny_t5(tokenizer_3, 3 * _WIDTH) if tokenizer_3 else None
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae,
        text_encoder=encoders[0], tokenizer=tokenizers[0], text_encoder_2=encoders[1], tokenizer_2=tokenizers[1],
        text_encoder_3=encoder_3, tokenizer_3=tokenizer_3,
    ).save_pretrained(str(path))  # fmt: skip
    return Path(path)


def tiny_flux(path: str | Path, seed: int = 0, *, dev: bool = True) -> Path:
    """Save a tiny `FluxPipeline`: as FLUX.1-dev, with guidance as an input and a shift that grows with the picture,
    or as schnell, with neither.
    """
    with seeded(seed):
        tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_t5_tokenizer()
        text_encoder, text_encoder_2 = CLIPTextModel(text_config(tokenizer, "quick_gelu")), tiny_t5(tokenizer_2)
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=2, num_attention_heads=2, attention_head_dim=16,
            joint_attention_dim=_WIDTH, pooled_projection_dim=_WIDTH, guidance_embeds=dev, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        vae = tiny_vae(4, 0.3611, 0.1159)
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if dev else {"shift": 1.0}
    FluxPipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**shift), vae=vae,
        text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2,
    ).save_pretrained(str(path))  # fmt: skip
    return Path(path)


def tiny_pixart(path: str | Path, seed: int = 0) -> Path:
    """Save a tiny `PixArtSigmaPipeline`: noise and its variance predicted, text masked, a solver of second order."""
    with seeded(seed):
        tokenizer = tiny_t5_tokenizer()
        text_encoder = tiny_t5(tokenizer)
        transformer = PixArtTransformer2DModel(
            sample_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
            caption_channels=_WIDTH, in_channels=4, out_channels=8, use_additional_conditions=False,
        )  # fmt: skip
        vae = tiny_vae(4, 0.13025)
    PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear"),
    ).save_pretrained(str(path))  # fmt: skip
    return Path(path)


def tiny_sana(path: str | Path, seed: int = 0) -> Path:
    """Save a tiny `SanaPipeline`; its autoencoder has a factor of 4, the published one's is 32."""
    with seeded(seed):
        tokenizer = tiny_gemma_tokenizer("a prompt: user enhanced scene details color of the with and red circle")
        text_encoder = tiny_gemma(tokenizer)
        transformer = SanaTransformer2DModel(
            sample_size=8, num_layers=2, num_attention_heads=4, attention_head_dim=8, num_cross_attention_heads=2,
            cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=_WIDTH, in_channels=4,
            out_channels=4, patch_size=1,
        )  # fmt: skip
        shape = {"block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 16, 16),
                 "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), (5,))}  # fmt: skip
        vae = AutoencoderDC(
            latent_channels=4, attention_head_dim=8, scaling_factor=0.41407, downsample_block_type="conv",
            upsample_block_type="interpolate",
            **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in shape.items()},
        )  # fmt: skip
    SanaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
    ).save_pretrained(str(path))  # fmt: skip
    return Path(path)


def tiny_qwen_image(path: str | Path, seed: int = 0) -> Path:
    """Save a tiny `QwenImagePipeline`, with the published one's shift, which ends above 0."""
    with seeded(seed):
        tokenizer = tiny_qwen_tokenizer()
        text_encoder = tiny_qwen(tokenizer)
        transformer = QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16,
            joint_attention_dim=_WIDTH, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075], latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
        )  # fmt: skip
    shift = {"base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
    QwenImagePipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shift),
    ).save_pretrained(str(path))  # fmt: skip
    return Path(path)
