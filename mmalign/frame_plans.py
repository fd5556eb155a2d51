"""Which frames of a clip are looked at: plans that turn a number of frames, or their times, into frame numbers.

`picked` asks a plan. Those that go by time (`EveryFps`, `CommonFps`) see when each frame is shown, so that a clip of
variable frame rate is taken as a viewer sees it; the others count frames, as the scorers that they stand for do.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

ROUNDING = Fraction(1, 1000)
"""Seconds by which a stated time may be off: Matroska writes whole milliseconds."""


@dataclass(frozen=True)
class Timeline:
    """When the frames of a clip are shown.

    Attributes:
        starts: [n] seconds, exact, the first one 0; rising.
        end: seconds; the last frame is shown until then.
        fps: the average rate that the file states.
    """

    starts: tuple[Fraction, ...]
    end: Fraction
    fps: float

    @staticmethod
    def regular(num_frames: int, fps: float) -> Timeline:
        """That of a constant rate."""
        step = 1 / _exact(fps)
        return Timeline(tuple(i * step for i in range(num_frames)), num_frames * step, fps)

    @staticmethod
    def stated(ticks: Sequence[int], duration: int, base: Fraction, fps: float) -> Timeline:
        """Of times in ticks of `base` seconds, in the order of presentation; the last frame lasts `duration`.

        With a duration of 0, which states none, it lasts as long as the others on average. Times that are those of
        `fps` but for rounding become exactly these, so that a clip is the same in every container.
        """
        starts = tuple((tick - ticks[0]) * base for tick in ticks)
        mean = starts[-1] / (len(starts) - 1) if len(starts) > 1 else 1 / _exact(fps)
        end = starts[-1] + (duration * base if duration > 0 else mean)
        ideal = Timeline.regular(len(starts), fps)
        near = all(abs(told - exact) <= ROUNDING for told, exact in zip(starts, ideal.starts, strict=True))
        return ideal if near and abs(end - ideal.end) <= 2 * ROUNDING else Timeline(starts, end, fps)

    @property
    def variable(self) -> bool:
        """Whether some frame is shown half a frame or more before or after a constant rate would show it."""
        if len(self.starts) < 3:
            return False
        step = self.starts[-1] / (len(self.starts) - 1)
        return any(abs(start - i * step) * 2 >= step for i, start in enumerate(self.starts))

    @property
    def rate(self) -> float:
        """Frames per second on average, by the times."""
        return float(len(self.starts) / self.end) if self.end > 0 else self.fps

    def shown(self, moment: Fraction) -> int:
        """The frame that is on screen `moment` seconds after the first."""
        return max(0, bisect.bisect_right(self.starts, moment + ROUNDING) - 1)


def _exact(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(100_000)


@dataclass(frozen=True)
class AllFrames:
    """Every frame, in presentation order."""

    def indices(self, num_frames: int, fps: float) -> list[int]:
        return list(range(num_frames))


@dataclass(frozen=True)
class Uniform:
    """Exactly `n` frames, evenly spaced from the first to the last (one frame: the middle one).

    A clip of fewer than `n` frames repeats some, so that the count is always `n`.
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"Uniform takes at least 1 frame, got n={self.n}")

    def indices(self, num_frames: int, fps: float) -> list[int]:
        if self.n == 1:
            return [(num_frames - 1) // 2]
        step = self.n - 1  # integers only: no rounding that differs between machines
        return [(2 * i * (num_frames - 1) + step) // (2 * step) for i in range(self.n)]


@dataclass(frozen=True)
class Middle:
    """`n` frames, each from the middle of one of `n` equal stretches of the clip, as VBench (utils.py) samples them.

    A clip of fewer than `n` frames gives all of them, and its last one again until there are `n`.
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"Middle takes at least 1 frame, got n={self.n}")

    def indices(self, num_frames: int, fps: float) -> list[int]:
        parts = min(self.n, num_frames)
        edges = [int(edge) for edge in np.linspace(0, num_frames, parts + 1)]  # in float64, as it is published
        picks = [(first + past - 1) // 2 for first, past in pairwise(edges)]
        return picks + picks[-1:] * (self.n - parts)


@dataclass(frozen=True)
class Starts:
    """The first frames of `n` equal stretches of the clip, so never its last; all frames of a clip of at most `n`.

    So VBench++'s trustworthiness samples faces (gender_bias.py, at 16).
    """

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"Starts takes at least 1 frame, got n={self.n}")

    def indices(self, num_frames: int, fps: float) -> list[int]:
        count = min(self.n, num_frames)
        return [i * num_frames // count for i in range(count)]


@dataclass(frozen=True)
class StrideFps:
    """Every s-th frame from the first, where s is the clip's rate over `fps`, rounded half to even and at least 1.

    So VBench samples for optical flow (dynamic_degree.py, at 8): at least `fps` / 1.5 frames per second, and all of a
    slower clip.
    """

    fps: float

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ValueError(f"StrideFps takes a positive rate, got fps={self.fps}")

    def indices(self, num_frames: int, fps: float) -> list[int]:
        return list(range(0, num_frames, max(1, round(fps / self.fps))))


@dataclass(frozen=True)
class EveryFps:
    """Frames at `fps` per second of the clip's own time, starting at the first; all of them if the clip is slower.

    Of a variable clip those whose times come nearest, each once.
    """

    fps: float

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ValueError(f"EveryFps takes a positive rate, got fps={self.fps}")

    def indices(self, num_frames: int, fps: float) -> list[int]:
        if fps <= self.fps:
            return list(range(num_frames))
        stride = _exact(fps) / _exact(self.fps)
        half = Fraction(1, 2)
        picks = ((k * stride + half).__floor__() for k in range(int(num_frames / stride) + 1))
        return [index for index in picks if index < num_frames]

    def on(self, timeline: Timeline) -> list[int]:
        if not timeline.variable:
            return self.indices(len(timeline.starts), timeline.fps)
        step, middles = 1 / _exact(self.fps), [(a + b) / 2 for a, b in pairwise(timeline.starts)]
        moments = (k * step for k in range(int(timeline.end / step) + 1))
        return list(dict.fromkeys(bisect.bisect_right(middles, each) for each in moments if each < timeline.end))


@dataclass(frozen=True)
class CommonFps:
    """`frames` frames that play at `fps`: the k-th is what is on screen k / fps seconds after the window's start.

    So a faster clip loses frames, and of a slower one some are shown again. `at` in [0, 1] says where the window lies:
    0 begins with the clip, 1 ends with it. Without `fps` they are `frames` frames in a row, at the clip's own rate.

    Raises:
        ValueError: the clip is shorter than that, for frames are never made up at its end; or its times run backwards.
    """

    fps: float | None
    frames: int
    at: float = 0.0

    def __post_init__(self) -> None:
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"CommonFps takes a positive rate or none, got fps={self.fps}")
        if self.frames < 1 or not 0 <= self.at <= 1:
            raise ValueError(f"CommonFps takes at least 1 frame and at in [0, 1], got {self.frames} and {self.at}")

    def indices(self, num_frames: int, fps: float) -> list[int]:
        return self.on(Timeline.regular(num_frames, fps))

    def on(self, timeline: Timeline) -> list[int]:
        there = self.longest(timeline)
        if there < self.frames:
            raise ValueError(self._too_short(timeline, there))
        at, count = Fraction(self.at), len(timeline.starts)
        if self.fps is None:
            first = (at * (count - self.frames) + Fraction(1, 2)).__floor__()
            return list(range(first, first + self.frames))
        step = 1 / _exact(self.fps)
        start = at * max(timeline.end - self.frames * step, Fraction(0))
        return [timeline.shown(start + k * step) for k in range(self.frames)]

    def longest(self, timeline: Timeline) -> int:
        """How many frames the clip gives at this rate. ValueError where its times run backwards."""
        if self.fps is None:
            return len(timeline.starts)
        if any(later < earlier for earlier, later in pairwise(timeline.starts)):
            raise ValueError("states times that run backwards; re-encode it (ffmpeg -i in -fps_mode cfr out)")
        last = timeline.end - ROUNDING  # the last moment at which something is surely on screen
        return max(min(1, len(timeline.starts)), (last * _exact(self.fps)).__floor__() + 1)

    def _too_short(self, timeline: Timeline, there: int) -> str:
        count, rate = len(timeline.starts), f"{timeline.rate:.4g} frames per second"
        held = f"is too short: {count} frame{'s' * (count > 1)} at {rate}"
        if self.fps is not None:
            held += f" give{'s' * (count == 1)} {there} at {self.fps:g}"
        return f"{held}, and {self.frames} are wanted; ask for fewer frames, or leave it out"


@dataclass(frozen=True)
class QwenFps:
    """An even number of frames at about `fps` per second, evenly spaced from the first to the last, as Qwen2-VL's own
    tools (qwen-vl-utils, and VideoAlign after it) sample a clip.

    The number is the clip's seconds times `fps`, rounded to even, from `min_frames` to `max_frames` and not above the
    frames there are; a clip of one frame gives that frame, where those tools refuse it.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ValueError(f"QwenFps takes a positive rate, got fps={self.fps}")
        if self.min_frames < 2 or self.max_frames < self.min_frames or self.min_frames % 2 or self.max_frames % 2:
            raise ValueError(f"QwenFps takes even bounds from 2, got {self.min_frames} and {self.max_frames}")

    def indices(self, num_frames: int, fps: float) -> list[int]:
        if num_frames < 2:
            return [0]
        most = min(self.max_frames, num_frames) // 2 * 2
        count = round(min(max(num_frames / fps * self.fps, self.min_frames), most) / 2) * 2
        # In float32 and rounded half to even, as those tools do; an exact half is as likely to fall either way.
        return [int(index) for index in np.rint(_linspace(num_frames - 1, count))]


def _linspace(end: int, steps: int) -> np.ndarray:
    """`torch.linspace(0, end, steps)` in float32, bit for bit, without torch: processes that decode do not import it.

    torch counts up to the middle from the start, and down to it from the end. Its kernels for AVX2 and AVX-512 take the
    product from the end with one rounding (a fused multiply-add); float64 holds that product exactly, so rounding its
    difference once gives the same on every machine.
    """
    last = np.float32(end)
    step = last / np.float32(steps - 1)
    numbers = np.arange(steps)
    rising = (np.float64(step) * numbers).astype(np.float32)
    falling = (np.float64(last) - np.float64(step) * (steps - 1 - numbers)).astype(np.float32)
    return np.where(numbers < steps // 2, rising, falling)


FramePlan = AllFrames | Uniform | Middle | Starts | EveryFps | StrideFps | QwenFps | CommonFps


def picked(plan: FramePlan, timeline: Timeline) -> tuple[int, ...]:
    """The numbers of the frames that a plan takes of a clip. ValueError, saying why, where it cannot."""
    by_time = getattr(plan, "on", None)
    return tuple(by_time(timeline) if by_time else plan.indices(len(timeline.starts), timeline.fps))
