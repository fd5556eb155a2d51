"""Tiny pipelines of Wan 2.2's two kinds, and a preference table of short clips."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel

from mmalign.media import write_video
from mmalign.records import MediaRef
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.testing.tiny_video import tiny_wan


def tiny_a14b(path: Path, boundary: float = 0.875, *, image: bool = False) -> Path:
    """A pipeline with two transformers, of different weights, as Wan 2.2 A14B; with `image` from a first frame."""
    pipe = WanPipeline.from_pretrained(tiny_wan(path.with_name(path.name + "-one")), local_files_only=True)
    torch.manual_seed(5)
    parts = {name: part for name, part in pipe.components.items() if name != "transformer_2"}
    if image:
        parts["transformer"] = WanTransformer3DModel.from_config({**pipe.transformer.config, "in_channels": 12})
    second = WanTransformer3DModel.from_config(parts["transformer"].config)
    kind = WanImageToVideoPipeline if image else WanPipeline
    kind(**parts, transformer_2=second, boundary_ratio=boundary).save_pretrained(str(path))
    return path


def tiny_ti2v(path: Path, *, image: bool = False) -> Path:
    """A pipeline with a residual autoencoder of patched pixels and times for each token, as Wan 2.2 TI2V-5B; with
    `image` from a first frame.
    """
    pipe = WanPipeline.from_pretrained(tiny_wan(path.with_name(path.name + "-one")), local_files_only=True)
    torch.manual_seed(6)
    vae = AutoencoderKLWan(
        base_dim=8, decoder_base_dim=8, z_dim=6, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1 * i for i in range(6)], latents_std=[1 + 0.1 * i for i in range(6)], is_residual=True,
        in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=8, scale_factor_temporal=4,
    )  # fmt: skip
    told = {**pipe.transformer.config, "in_channels": 6, "out_channels": 6}
    transformer = WanTransformer3DModel.from_config(told)
    kept = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "scheduler")}
    kind = WanImageToVideoPipeline if image else WanPipeline
    kind(**kept, vae=vae, transformer=transformer, expand_timesteps=True).save_pretrained(str(path))
    return path


def clip_pairs(folder: Path, pairs: int = 2, frames: int = 9, side: int = 32) -> Path:
    """A table of pairs of MP4 files; winners are dark, losers bright."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(pairs):
        places = [folder / f"{i}-{name}.mp4" for name in "wl"]
        for place, low in zip(places, (0, 128), strict=True):
            pixels = torch.randint(low, low + 128, (frames, 3, side, side), dtype=torch.uint8, generator=generator)
            write_video(place, pixels, 8.0)
        media = (MediaRef(str(places[0])), MediaRef(str(places[1])))
        rows.append(PreferenceRow(f"a red circle, clip {i}", media, label={"overall": "A"}))
    write_preferences(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"
