"""Write clips that every machine reads back alike."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
from av.video.reformatter import ColorRange, Colorspace

from mmalign.source import whole_file

if TYPE_CHECKING:  # imported where it is used, as in `mmalign.video`
    import torch


def write_video(
    path: str | Path,
    frames: torch.Tensor,
    fps: float,
    lossless: bool = False,
    *,
    crf: int = 17,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write uint8 [T, 3, H, W] RGB as H.264 in .mp4, .mkv or .mov, whole or not at all.

    Lossy: quality `crf` from 1 (best) to 51, BT.601 limited range, tagged as such (untagged, viewers guess by size);
    4:2:0 where both sides are even, else 4:4:4, never a resize. Lossless: RGB H.264 that `read_video` gives back bit
    for bit, which few browsers play. `tags` are the container's (.mp4 knows `title`, `comment`). The same frames and
    tags give the same bytes. ValueError for another dtype, shape, suffix, rate or quality.
    """
    import torch

    path = Path(path)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise ValueError(f"write_video takes uint8 [T, 3, H, W], got {frames.dtype} {list(frames.shape)}")
    if path.suffix.lower() not in {".mp4", ".mkv", ".mov"}:
        raise ValueError(f"{path}: cannot write {path.suffix or 'a file without suffix'!r}; use .mp4, .mkv or .mov")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if not 1 <= crf <= 51:
        raise ValueError(f"crf is from 1 (best) to 51, got {crf}")
    even = frames.shape[2] % 2 == 0 and frames.shape[3] % 2 == 0
    pixels = "rgb24" if lossless else "yuv420p" if even else "yuv444p"
    # A fixed thread count, since x264's output depends on it.
    options = {"preset": "medium", "threads": "4", "crf": "0" if lossless else str(crf)}
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        # x264 165's AVX-512 code gives other bytes when the heap has been used; the rest of it is exact and as fast.
        options["x264-params"] = "asm=avx2"
    with whole_file(path) as temporary, av.open(str(temporary), "w") as container:
        container.metadata.update(tags or {})
        rate = Fraction(fps).limit_denominator(1001)
        stream: Any = container.add_stream("libx264rgb" if lossless else "libx264", rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], pixels
        if not lossless:
            stream.codec_context.colorspace = Colorspace.ITU601
            stream.codec_context.color_range = ColorRange.MPEG
        for picture in frames.permute(0, 2, 3, 1).contiguous().cpu().numpy():
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if not lossless:
                frame = frame.reformat(format=pixels, dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
