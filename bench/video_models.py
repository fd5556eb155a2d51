"""Video pipelines for `bench/video.py`: the sizes of published ones and smaller ones, with random weights or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import nn
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from mmalign.paths import find
from mmalign.testing.tiny_transformers import tiny_t5_tokenizer

Makers = dict[str, Callable[[], nn.Module]]

SIZES = {"shapes": (32, 32, 9), "small": (64, 64, 17), "wan-1.3b": (480, 832, 33), "cogvideox-2b": (480, 720, 49)}
"""Height, width and frames of the clips that each is timed on."""

TEXT_TOKENS = {"shapes": 24, "small": 64, "wan-1.3b": 512, "cogvideox-2b": 226}


def makers(name: str) -> tuple[str, Makers, Any]:
    """The pipeline class, its networks by name, and its scheduler."""
    flow = UniPCMultistepScheduler(flow_shift=3.0, use_flow_sigmas=True, prediction_type="flow_prediction")
    if name == "cogvideox-2b":
        steps = CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
            clip_sample=False, snr_shift_scale=3.0,
        )  # fmt: skip
        return "CogVideoXPipeline", {
            "transformer": lambda: CogVideoXTransformer3DModel(time_embed_dim=512),
            "vae": lambda: AutoencoderKLCogVideoX(
                down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            ),
            "text_encoder": lambda: T5EncoderModel(T5Config(vocab_size=32128, **_xxl())),
        }, steps  # fmt: skip
    if name == "wan-1.3b":
        return "WanPipeline", {
            "transformer": lambda: WanTransformer3DModel(
                num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=30, text_dim=4096
            ),
            "vae": AutoencoderKLWan,
            "text_encoder": lambda: UMT5EncoderModel(UMT5Config(vocab_size=256384, **_xxl())),
        }, flow  # fmt: skip
    if name == "small":
        text: dict[str, Any] = dict(d_model=512, d_kv=64, d_ff=1024, num_layers=4, num_heads=8)
        return "WanPipeline", {
            "transformer": lambda: WanTransformer3DModel(
                num_attention_heads=6, attention_head_dim=64, ffn_dim=1536, num_layers=12, text_dim=512
            ),
            "vae": lambda: AutoencoderKLWan(base_dim=12),
            "text_encoder": lambda: UMT5EncoderModel(
                UMT5Config(vocab_size=4096, feed_forward_proj="gated-gelu", dropout_rate=0.0, **text)
            ),
        }, flow  # fmt: skip
    folder = find("configs/shapes/video")
    kinds: dict[str, Any] = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan}
    parts: Makers = {
        part: lambda kind=kind, part=part: kind.from_config(kind.load_config(folder / part))  # type: ignore[misc]
        for part, kind in kinds.items()
    }
    parts["text_encoder"] = lambda: UMT5EncoderModel(UMT5Config.from_pretrained(folder / "text_encoder"))
    return "WanPipeline", parts, flow


def _xxl() -> dict[str, Any]:
    """Of the text encoders that the large models share."""
    return dict(
        d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", dropout_rate=0.0
    )


def write(name: str, folder: Path, *, weights: bool, device: torch.device, dtype: torch.dtype) -> Path:
    """Saves a pipeline, unless it is there: configs, and with `weights` random ones of `dtype` (the VAE float32)."""
    if (folder / "model_index.json").is_file():
        return folder
    pipeline, parts, scheduler = makers(name)
    index: dict[str, Any] = {"_class_name": pipeline, "scheduler": ["diffusers", type(scheduler).__name__]}
    for part, make in parts.items():
        torch.manual_seed(0)
        if weights:
            with device:
                module: Any = make()
            module = module.to(torch.float32 if part == "vae" else dtype)
            module.save_pretrained(str(folder / part))
        else:
            with init_empty_weights():
                module = make()
            saved = module.config if part == "text_encoder" else module
            (saved.save_pretrained if part == "text_encoder" else saved.save_config)(str(folder / part))
        library = "transformers" if part == "text_encoder" else "diffusers"
        index[part] = [library, type(module).__name__]
        del module
    scheduler.save_pretrained(str(folder / "scheduler"))
    if name == "shapes":
        shutil.copytree(find("configs/shapes/video/tokenizer"), folder / "tokenizer")
    else:
        tiny_t5_tokenizer().save_pretrained(str(folder / "tokenizer"))
    index["tokenizer"] = ["transformers", "T5Tokenizer"]
    if pipeline == "WanPipeline":
        index |= {"transformer_2": [None, None], "boundary_ratio": None, "expand_timesteps": False}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder
