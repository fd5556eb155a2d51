"""Tiny pipelines of the video families: the real classes with small random weights, in a user's folder layout.

As in `tiny`: 32x32 pixels, and every folder goes through `save_pretrained`. A clip of 9 frames fits all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MotionAdapter,
    UNet2DConditionModel,
    UNetMotionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
    DEFAULT_PROMPT_TEMPLATE as IMAGE_TEMPLATE,
)
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
)

from mmalign.testing.tiny import text_config, tiny_tokenizer
from mmalign.testing.tiny_language import tiny_llama, tiny_llama_tokenizer, tiny_llava
from mmalign.testing.tiny_transformers import seeded, tiny_t5, tiny_t5_tokenizer, tiny_vae

_WIDTH = 32


def tiny_wan(path: str | Path, seed: int = 0, *, image: bool = False) -> Path:
    """Save a tiny `WanPipeline`, or with `image` a `WanImageToVideoPipeline`, as of Wan 2.1.

    Its autoencoder has a factor of 4 in space, the published one's is 8.
    """
    told: dict[str, Any] = {"in_channels": 12, "image_dim": _WIDTH, "added_kv_proj_dim": 32} if image else {}
    with seeded(seed):
        tokenizer = tiny_t5_tokenizer()
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer), d_model=_WIDTH, d_kv=8, d_ff=2 * _WIDTH, num_layers=2, num_heads=4,
                feed_forward_proj="gated-gelu", dropout_rate=0.0,
            )
        )  # fmt: skip
        transformer = WanTransformer3DModel(
            patch_size=(1, 2, 2), out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16,
            text_dim=_WIDTH, freq_dim=16, ffn_dim=32, rope_max_seq_len=32, **{"in_channels": 4, **told},
        )  # fmt: skip
        vae = AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
            latents_mean=[-0.7571, -0.7089, -0.9113, 0.1075], latents_std=[2.8184, 1.4541, 2.3275, 2.6558],
            scale_factor_spatial=4,
        )  # fmt: skip
        tower = _vision() if image else {}
    (WanImageToVideoPipeline if image else WanPipeline)(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction"),
        **tower,
    ).save_pretrained(str(path))  # fmt: skip
    return Path(path)


def _vision() -> dict[str, Any]:
    """A two-layer vision tower of CLIP and what cuts pictures for it."""
    config = CLIPVisionConfig(
        hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=2, num_attention_heads=4, image_size=16,
        patch_size=8,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    return {
        "image_encoder": CLIPVisionModel(config),
        "image_processor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size),
    }


def tiny_cogvideox(
    path: str | Path, seed: int = 0, *, kind: Literal["2b", "5b", "1.5"] = "2b", image: bool = False
) -> Path:
    """Save a tiny `CogVideoXPipeline`, or with `image` a `CogVideoXImageToVideoPipeline`.

    Args:
        path: folder to write; made when it does not exist.
        seed: of the random weights.
        kind: 2b has positions as sums of sines and a DDIM scheduler with a shifted signal-to-noise ratio; 5b rotary
            positions and a DPM scheduler; 1.5 patches of two latent frames besides.
    """
    rotary, fifteen = kind != "2b", kind == "1.5"
    told = {"use_learned_positional_embeddings": not fifteen, "ofs_embed_dim": 8 if fifteen else None} if image else {}
    with seeded(seed):
        tokenizer = tiny_t5_tokenizer()
        text_encoder = tiny_t5(tokenizer)
        transformer = CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=8 if image else 4, out_channels=4,
            time_embed_dim=8, text_embed_dim=_WIDTH, num_layers=2, sample_width=8, sample_height=8, sample_frames=9,
            patch_size_t=2 if fifteen else None, patch_bias=not fifteen, attention_bias=True,
            use_rotary_positional_embeddings=rotary, **told,
        )  # fmt: skip
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            scaling_factor=0.7 if rotary else 1.15258426, sample_height=32, sample_width=32,
            invert_scale_latents=image and fifteen,
        )  # fmt: skip
    settings: dict[str, Any] = {
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
        "clip_sample": False, "snr_shift_scale": 1.0 if rotary else 3.0,
    }  # fmt: skip
    (CogVideoXImageToVideoPipeline if image else CogVideoXPipeline)(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=CogVideoXDPMScheduler(**settings) if rotary else CogVideoXDDIMScheduler(**settings),
    ).save_pretrained(str(path))  # fmt: skip
    return Path(path)


def tiny_hunyuan_video(
    path: str | Path, seed: int = 0, *, embedded: bool = True,
    image: Literal["latent_concat", "token_replace"] | None = None,
) -> Path:  # fmt: skip
    """Save a tiny `HunyuanVideoPipeline`, its template 95 tokens long, as published; with `image` a
    `HunyuanVideoImageToVideoPipeline`, 103.

    Its tokenizer is of Llama 3's kind, byte by byte, under the name of Llama 2's, as the published folder has it.

    Args:
        path: folder to write; made when it does not exist.
        seed: of the random weights.
        embedded: whether the transformer takes the guidance as a number.
        image: how the transformer is told the first frame.
    """
    template = IMAGE_TEMPLATE if image else DEFAULT_PROMPT_TEMPLATE
    with seeded(seed):
        tokenizer = tiny_llama_tokenizer(template["template"], template["crop_start"])
        text_encoder = tiny_llava(tokenizer, 48) if image else tiny_llama(tokenizer)
        tokenizer_2 = tiny_tokenizer()
        told = text_config(tokenizer_2, "quick_gelu")
        told.max_position_embeddings = 77  # the pipeline pads to 77 whatever the tokenizer says
        text_encoder_2 = CLIPTextModel(told)
        transformer = HunyuanVideoTransformer3DModel(
            in_channels=9 if image == "latent_concat" else 4, out_channels=4, num_attention_heads=2,
            attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1, guidance_embeds=embedded,
            text_embed_dim=_WIDTH, pooled_projection_dim=_WIDTH, rope_axes_dim=(4, 6, 6), image_condition_type=image,
        )  # fmt: skip
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        )  # fmt: skip
    crop = {"height": 48, "width": 48}
    processor = {"image_processor": CLIPImageProcessor(size={"shortest_edge": 48}, crop_size=crop)} if image else {}
    (HunyuanVideoImageToVideoPipeline if image else HunyuanVideoPipeline)(
        text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer, vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2,
        **processor,
    ).save_pretrained(str(path))  # fmt: skip
    _rename(Path(path, "model_index.json"), tokenizer=["transformers", "LlamaTokenizerFast"])
    _rename(Path(path, "tokenizer", "tokenizer_config.json"), tokenizer_class="LlamaTokenizerFast")
    return Path(path)


def _rename(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}, indent=2) + "\n")


def tiny_ltx(path: str | Path, seed: int = 0, *, told_time: bool = False, image: bool = False) -> Path:
    """Save a tiny `LTXPipeline`, or with `image` an `LTXImageToVideoPipeline`, which has the same parts.

    Its autoencoder has a factor of 8 in space and 4 in time, the published 32 and 8.

    Args:
        path: folder to write; made when it does not exist.
        seed: of the random weights.
        told_time: with the decoder of 0.9.1, which is told a time and adds noise to its layers, or that of 0.9.0.
    """
    with seeded(seed):
        tokenizer = tiny_t5_tokenizer()
        text_encoder = tiny_t5(tokenizer)
        transformer = LTXVideoTransformer3DModel(
            in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            num_layers=2, caption_channels=_WIDTH,
        )  # fmt: skip
        vae = AutoencoderKLLTXVideo(
            latent_channels=8, block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
            down_block_types=("LTXVideoDownBlock3D",) * 3, layers_per_block=(1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1), spatio_temporal_scaling=(True, True, False),
            decoder_spatio_temporal_scaling=(True, True, False), upsample_residual=(told_time,) * 3,
            upsample_factor=(1, 1, 1), decoder_inject_noise=(told_time, told_time, told_time, False),
            timestep_conditioning=told_time, patch_size=2,
        )  # fmt: skip
        vae.latents_mean.copy_(torch.linspace(-0.5, 0.7, 8))
        vae.latents_std.copy_(torch.linspace(0.6, 1.9, 8))
        for name, weight in vae.named_parameters():
            if "per_channel_scale" in name:  # zeros at first, and the noise would be nothing
                torch.nn.init.constant_(weight, 0.1)
    (LTXImageToVideoPipeline if image else LTXPipeline)(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024,
            max_image_seq_len=4096, shift_terminal=0.1,
        ),
    ).save_pretrained(str(path))  # fmt: skip
    return Path(path)


def tiny_animatediff(path: str | Path, seed: int = 0) -> Path:
    """Save a tiny `AnimateDiffPipeline`: an SD 1.x UNet with the motion modules of an adapter, for 16 frames."""
    with seeded(seed):
        tokenizer = tiny_tokenizer()
        text_encoder = CLIPTextModel(text_config(tokenizer, "quick_gelu"))
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=4, cross_attention_dim=_WIDTH,
        )  # fmt: skip
        motion = MotionAdapter(
            block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2,
            motion_norm_num_groups=8, motion_max_seq_length=16, use_motion_mid_block=True,
        )  # fmt: skip
        for name, weight in motion.named_parameters():
            if name.endswith("proj_out.weight"):  # zeros at first, and no frame would see another
                torch.nn.init.normal_(weight, std=0.2)
        vae = tiny_vae(4, 0.18215)
    AnimateDiffPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=UNetMotionModel.from_unet2d(unet, motion),
        motion_adapter=motion,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False, steps_offset=1,
        ),
    ).save_pretrained(str(path))  # fmt: skip
    return Path(path)
