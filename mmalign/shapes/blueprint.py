"""Writes the shapes models' configuration folders, no weights: `python -m mmalign.shapes.blueprint configs/shapes`.

The tokenizer is a real CLIP byte-pair tokenizer whose merges make every word of the grammar one token; any other
text falls back to letters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTokenizer, T5Tokenizer, UMT5Config

from mmalign.shapes import motion
from mmalign.shapes.captions import WORDS
from mmalign.shapes.vlm import write_vlm

TOKENS = 24  # longest prompt, with begin and end


def byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes that CLIP's byte-level BPE starts from."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("\xa1"), ord("\xac") + 1),
        *range(ord("\xae"), ord("\xff") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """vocab.json and the lines of merges.txt."""
    letters = byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:  # in order of priority, as BPE applies them
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == pair:
                    parts[i : i + 2] = ["".join(pair)]
                i += 1
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            parts[:2] = ["".join(pair)]
            merges.append(pair)
            tokens.append(parts[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, [" ".join(pair) for pair in merges]


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """Saves the tokenizer folder and returns the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=TOKENS, pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_sd(folder: Path) -> None:
    """configs/shapes/sd: a StableDiffusionPipeline of about 3 million parameters, 64x64 pixels, 16x16x4 latents."""
    tokenizer = write_tokenizer(folder / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=TOKENS, projection_dim=96, hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    text.architectures = ["CLIPTextModel"]
    text.save_pretrained(folder / "text_encoder")
    UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 64, 96), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96, attention_head_dim=4, norm_num_groups=8,
    ).save_config(folder / "unet")  # fmt: skip
    write_vae(folder / "vae")
    DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction", timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_vae(folder: Path, shift: float | None = None) -> None:
    """The autoencoder of both generators."""
    AutoencoderKL(
        latent_channels=4, block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=4, sample_size=64,
        mid_block_add_attention=False, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, shift_factor=shift,
    ).save_config(folder)  # fmt: skip


def write_flow(folder: Path) -> None:
    """configs/shapes/flow: a StableDiffusion3Pipeline of about 4 million parameters on the same latents, without T5."""
    for tokenizer_name, encoder_name in (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")):
        tokenizer = write_tokenizer(folder / tokenizer_name)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=64, hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        text.architectures = ["CLIPTextModelWithProjection"]
        text.save_pretrained(folder / encoder_name)
    SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=6, num_attention_heads=4,
        attention_head_dim=28, caption_projection_dim=112, joint_attention_dim=128, pooled_projection_dim=128,
        pos_embed_max_size=16, qk_norm="rms_norm",
    ).save_config(folder / "transformer")  # fmt: skip
    write_vae(folder / "vae", shift=0.0)
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": [None, None],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_video(folder: Path) -> None:
    """configs/shapes/video: a WanPipeline of about 4 million parameters, clips of 9 frames of 32x32 pixels.

    Latents are 8x8 for a frame in 8 channels, and one frame for four but the first; UMT5 reads a word a token.
    """
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    letters = [(chr(code), -8.0) for code in range(ord("a"), ord("z") + 1)]  # what any other text falls back to
    pieces = [*special, *(("▁" + word, -1.0) for word in motion.WORDS), *letters]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)
    tokenizer.save_pretrained(folder / "tokenizer")
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=96, d_kv=24, d_ff=256, num_layers=3, num_heads=4, dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    text.architectures = ["UMT5EncoderModel"]
    text.save_pretrained(folder / "text_encoder")
    WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=36, in_channels=8, out_channels=8, text_dim=96,
        freq_dim=64, ffn_dim=432, num_layers=7, rope_max_seq_len=32,
    ).save_config(folder / "transformer")  # fmt: skip
    AutoencoderKLWan(
        base_dim=12, z_dim=8, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.0] * 8, latents_std=[1.0] * 8, scale_factor_temporal=4, scale_factor_spatial=4,
    ).save_config(folder / "vae")  # fmt: skip
    FlowMatchEulerDiscreteScheduler(shift=1.0).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_clip(folder: Path) -> None:
    """configs/shapes/clip: an open_clip model of 1.6 million parameters for 64x64 pixels, with a ResNet as its tower.

    A vision transformer of the same cost learned more slowly; docs/shapes.md has the figures.
    """
    tokenizer = write_tokenizer(folder / "tokenizer")
    model = {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32},
        "text_cfg": {
            "context_length": TOKENS, "vocab_size": len(tokenizer), "hf_tokenizer_name": "tokenizer",
            "width": 96, "heads": 4, "layers": 2,
        },
    }  # fmt: skip
    config = {"model_cfg": model, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    write_sd(Path(sys.argv[1]) / "sd")
    write_flow(Path(sys.argv[1]) / "flow")
    write_video(Path(sys.argv[1]) / "video")
    write_clip(Path(sys.argv[1]) / "clip")
    write_vlm(Path(sys.argv[1]) / "vlm")
