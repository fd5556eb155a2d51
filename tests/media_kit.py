"""Random pictures, a moving one, and their encodings, for the tests of media."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mmalign import video

needs_decord = pytest.mark.skipif(
    video.decord_version() is None, reason="decord, which has wheels for Linux on x86-64 alone, is not installed here"
)


def picture(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def moving(count: int = 12, height: int = 64, width: int = 96) -> torch.Tensor:
    """A gradient that drifts under a moving disc: every frame differs, and chroma has edges. uint8 [T, 3, H, W]."""
    y, x = np.mgrid[0:height, 0:width]
    frames = np.empty((count, height, width, 3), np.uint8)
    for t in range(count):
        frames[t] = np.stack([x * 2 + 5 * t, y * 3 + 7 * t, x + y + 11 * t], -1) % 256
        cy, cx = height / 2 + height / 4 * np.sin(t / 3), width / 2 + width / 4 * np.cos(t / 3)
        frames[t][(y - cy) ** 2 + (x - cx) ** 2 < (height / 5) ** 2] = (255, 30, 10)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()


def encode(path: Path, frames: torch.Tensor, codec: str = "libx264", pixels: str = "yuv420p", **more: object) -> Path:
    """Any codec, unlike `write_video`: what other people's files look like. `options` and `container` go to FFmpeg."""
    with av.open(str(path), "w", options=more.get("container", {})) as container:
        stream = container.add_stream(codec, rate=more.get("fps", 12), options=more.get("options", {}))
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], pixels
        if "matrix" in more:
            stream.codec_context.colorspace, stream.codec_context.color_range = more["matrix"]
        for frame in frames.permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
