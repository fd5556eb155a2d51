"""Moving scenes of the shapes world as training data: captioned clips, and clips that an annotator judged."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmalign.shapes.clip import FPS, FRAMES, PIXELS, MovingScene, render_clip, sample_moving
from mmalign.shapes.motion import COUNT_WEIGHTS, MotionCaption, motions


@dataclass(frozen=True)
class DrawnClip:
    """A clip drawn when it is needed."""

    caption: MotionCaption
    seed: tuple[int, ...]
    num_frames: int = FRAMES
    side: int = PIXELS
    fps: float = FPS

    @property
    def name(self) -> str:
        return f"shapes clip {self.seed}: {self.caption}"

    @cached_property
    def scene(self) -> MovingScene:
        return sample_moving(self.caption, np.random.default_rng(self.seed), frames=self.num_frames, fps=self.fps)

    def hash(self) -> str:
        """What identifies the clip, for caches."""
        return f"shapes-clip-1:{self.seed}:{self.caption}:{self.num_frames}x{self.side}@{self.fps:g}"

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, without drawing it."""
        return self.side, self.side

    def clip(self) -> np.ndarray:
        """uint8 RGB [num_frames, side, side, 3]."""
        return render_clip(self.scene, self.num_frames, self.fps, self.side)


def drawn_clips(
    count: int, seed: int, *, held_out: bool = False, counts: tuple[float, ...] = COUNT_WEIGHTS, frames: int = FRAMES,
    side: int = PIXELS, fps: float = FPS,
) -> list[DrawnClip]:  # fmt: skip
    """`count` captioned clips that match their captions; `counts` as in `motions`.

    Raises:
        ValueError: `counts` are not probabilities, or a clip has no frame, no pixel or no frames per second.
    """
    if frames < 1 or side < 1 or fps <= 0:
        raise ValueError(f"a clip needs frames, pixels and a rate above 0, not {frames}, {side} and {fps:g}")
    wanted = motions(count, seed, held_out=held_out, counts=counts)
    return [DrawnClip(caption, (seed, i), frames, side, fps) for i, caption in enumerate(wanted)]
