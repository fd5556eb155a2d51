"""Clips whose frames tell their number, at any times, with sound, turned: for the tests of video preferences."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

STEP = 7  # grey levels between a frame and the next


def numbered(count: int, height: int = 16, width: int = 24) -> np.ndarray:
    """uint8 [T, H, W, 3]: frame i is grey of level STEP * i, so that at most 36 frames differ."""
    levels = (STEP * np.arange(count)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)))


def numbers(frames: np.ndarray) -> list[int]:
    """Which frames of `numbered` these are, decoded from their pixels: [T, H, W, 3]."""
    return [round(float(frame.mean()) / STEP) for frame in frames]


def timed(
    path: Path, frames: np.ndarray, times: Sequence[Fraction], *, last: Fraction = Fraction(1, 12), sound: bool = False
) -> Path:
    """A lossless clip whose frame i is shown at `times[i]` seconds and the last one for `last`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", rate=12, options={"crf": "0", "bf": "0", "g": "4", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "rgb24"
        base = stream.time_base = stream.codec_context.time_base = Fraction(1, 120_000)
        voice = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        shown = dict(zip(((time / base).numerator for time in times), frames, strict=True))
        ends = [*list(shown)[1:], list(shown)[-1] + (last / base).numerator]
        lasting = dict(zip(shown, ends, strict=True))
        packets = []
        for ticks, pixels in shown.items():
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = ticks, base
            packets += stream.encode(frame)
        packets += stream.encode()
        for packet in packets:
            packet.duration = lasting[packet.pts] - packet.pts
            container.mux(packet)
        if voice is not None:
            for start in range(0, 16_384, 1024):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 8000, start
                container.mux(voice.encode(samples))
            container.mux(voice.encode())
    return path


def steady(path: Path, count: int, fps: int | Fraction = 12, **more: bool) -> Path:
    """`numbered(count)` at a constant rate."""
    step = 1 / Fraction(fps)
    return timed(path, numbered(count), [i * step for i in range(count)], last=step, **more)
