"""Clips at a common rate: which frames are taken, of constant and variable clips, and what is too short."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from film_kit import numbered, numbers, steady, timed
from media_kit import encode, moving
from test_video import turned

from mmalign.frame_plans import ROUNDING, CommonFps, EveryFps, QwenFps, Timeline, Uniform, picked
from mmalign.media import MediaError, clip_facts, clip_frames, read_video


def by_hand(starts: list[float], end: float, fps: float, frames: int, at: float) -> list[int]:
    """What a viewer sees, in float64: of all frames that have begun, the one that began last."""
    start = at * max(0.0, end - frames / fps)
    seen = []
    for k in range(frames):
        moment = start + k / fps
        assert moment < end
        seen.append(max(i for i, begun in enumerate(starts) if begun <= moment + 1e-3))
    return seen


# ------------------------------------------------------------------------------------------------ the plan


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (30, 15, [0, 2, 4, 6, 8]),
        (24, 16, [0, 1, 3, 4, 6]),
        (24, 24, [0, 1, 2, 3, 4]),
        (8, 16, [0, 0, 1, 1, 2]),
        (Fraction(30000, 1001), 29.97, [0, 1, 2, 3, 4]),
        (Fraction(24000, 1001), 8, [0, 3, 6, 9, 12]),
    ],
)
def test_which_frames_of_a_constant_clip_are_taken(source: Fraction | int, target: float, expected: list[int]) -> None:
    assert CommonFps(target, 5).indices(40, float(source)) == expected


def test_without_a_rate_frames_are_taken_in_a_row() -> None:
    assert CommonFps(None, 4).indices(10, 24) == [0, 1, 2, 3]
    assert CommonFps(None, 4, at=1).indices(10, 24) == [6, 7, 8, 9]
    assert CommonFps(None, 4, at=0.5).indices(10, 24) == [3, 4, 5, 6]
    assert CommonFps(None, 10, at=0.7).indices(10, 24) == list(range(10))


@pytest.mark.parametrize("seed", range(40))
def test_any_times_are_read_as_a_viewer_sees_them(seed: int) -> None:
    random = np.random.default_rng(seed)
    gaps = [Fraction(int(ms), 1000) for ms in random.integers(5, 200, 30)]
    starts, end = [Fraction(0), *accumulate(gaps[:-1])], sum(gaps)
    timeline = Timeline(tuple(starts), end, 24.0)
    fps, at = float(random.uniform(3, 60)), float(random.uniform())
    plan = CommonFps(fps, 1, at)
    frames = int(random.integers(1, plan.longest(timeline) + 1))
    found = CommonFps(fps, frames, at).on(timeline)
    assert found == by_hand([float(start) for start in starts], float(end), fps, frames, at)
    assert found == sorted(found)
    # The last moment that is asked for is one at which something is shown, and one frame more would not be.
    longest = plan.longest(timeline)
    assert (longest - 1) / fps <= float(end - ROUNDING) + 1e-9 < longest / fps + 2e-9


def test_the_window_moves_from_one_end_to_the_other() -> None:
    """33 frames at 16 a second of 100 at 24: two seconds and a sixteenth of four and a sixth."""
    first, last = (CommonFps(16, 33, at).indices(100, 24) for at in (0, 1))
    assert first[:3] == [0, 1, 3] and first[-1] == 48
    slack = 100 / 24 - 33 / 16
    assert last[0] == math.floor(slack * 24 + 0.024) and last[-1] == math.floor((slack + 2) * 24 + 0.024) == 98
    starts = [CommonFps(16, 33, k / 10).indices(100, 24)[0] for k in range(11)]
    assert starts == sorted(starts) and len(set(starts)) == 11


@pytest.mark.parametrize("num_frames", range(1, 50))
def test_it_takes_what_there_is_and_never_makes_up_an_end(num_frames: int) -> None:
    for source, target in ((24, 16), (24, 24), (12, 16), (30, 8)):
        plan = CommonFps(target, 1)
        there = plan.longest(Timeline.regular(num_frames, source))
        assert there == math.ceil(num_frames * target / source)
        assert CommonFps(target, there).indices(num_frames, source)[-1] <= num_frames - 1
        with pytest.raises(ValueError, match=rf"{num_frames} frames? at {source} .* give.? {there} at {target}, and"):
            CommonFps(target, there + 1).indices(num_frames, source)
    with pytest.raises(ValueError, match=rf"{num_frames} frames? at 24 frames per second, and {num_frames + 1} are"):
        CommonFps(None, num_frames + 1).indices(num_frames, 24)


def test_it_refuses_nonsense() -> None:
    for wrong in ({"fps": 0}, {"fps": -3}, {"frames": 0}, {"at": -0.1}, {"at": 1.1}, {"at": math.nan}):
        with pytest.raises(ValueError, match="CommonFps takes"):
            CommonFps(**{"fps": 12, "frames": 3, **wrong})
    backwards = Timeline((Fraction(0), Fraction(2), Fraction(1)), Fraction(3), 12)
    with pytest.raises(ValueError, match="run backwards; re-encode"):
        CommonFps(12, 3).on(backwards)


def test_rounded_times_of_a_constant_clip_are_made_exact() -> None:
    """Matroska's milliseconds: without it 24 a second to 24 a second would show some frames twice."""
    exact = Timeline.regular(90, 24)
    rounded = Timeline.stated([round(1000 * i / 24) for i in range(90)], 42, Fraction(1, 1000), 24)
    assert rounded == exact and rounded.rate == 24
    assert Timeline.stated([0, 42, 83, 200], 42, Fraction(1, 1000), 24) != Timeline.regular(4, 24)
    still = Timeline.stated([0, 42, 83, 125], 2000, Fraction(1, 1000), 24)  # its last frame stands for two seconds
    assert still.end == Fraction(2125, 1000) and CommonFps(4, 1).longest(still) == 9


def test_variable_is_half_a_frame_or_more() -> None:
    assert not Timeline.regular(100, 24).variable
    assert not Timeline(tuple(Fraction(n, 100) for n in (0, 8, 17, 25, 33)), Fraction(42, 100), 12).variable
    assert Timeline(tuple(Fraction(n) for n in (0, 1, 2, 5, 6, 7)), Fraction(8), 1).variable
    assert not Timeline((Fraction(0), Fraction(5)), Fraction(6), 1).variable


# ------------------------------------------------------------------------------------------------ clips


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize(("fps", "frames", "at"), [(24, 20, 0), (16, 9, 0), (16, 9, 1), (12, 5, 0.3), (48, 21, 0.5)])
def test_a_clip_gives_the_frames_that_are_on_screen(
    tmp_path: Path, suffix: str, fps: float, frames: int, at: float
) -> None:
    path = steady(tmp_path / f"a{suffix}", 20, 24)
    found = clip_frames(path, fps=fps, frames=frames, at=at)
    assert found.dtype == np.uint8 and found.shape == (frames, 16, 24, 3)
    assert numbers(found) == by_hand([i / 24 for i in range(20)], 20 / 24, fps, frames, at)
    assert np.array_equal(clip_frames(path.read_bytes(), fps=fps, frames=frames, at=at), found)


VARIABLE = [Fraction(n, 24) for n in (0, 1, 2, 8, 9, 10, 11, 12, 20, 21, 22, 23)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_clip_of_variable_rate_is_read_by_its_times(tmp_path: Path, suffix: str) -> None:
    path = timed(tmp_path / f"a{suffix}", numbered(12), VARIABLE, last=Fraction(1, 24))
    starts = [float(time) for time in VARIABLE]
    for fps, frames, at in ((24, 24, 0.0), (8, 8, 0.0), (12, 6, 1.0), (12, 6, 0.4)):
        found = numbers(clip_frames(path, fps=fps, frames=frames, at=at))
        assert found == by_hand(starts, 1.0, fps, frames, at)
    assert numbers(clip_frames(path, fps=8, frames=8)) == [0, 2, 2, 4, 7, 7, 7, 9]
    assert numbers(clip_frames(path, fps=None, frames=12)) == list(range(12))
    with pytest.raises(MediaError, match=rf"a\{suffix}: is too short: 12 frames at 12 frames .* give 8 at 8, and 9"):
        clip_frames(path, fps=8, frames=9)
    facts = clip_facts(path)
    assert (facts.num_frames, facts.height, facts.width) == (12, 16, 24) and facts.fps == pytest.approx(12, abs=0.02)
    assert facts.frames_at(8) == 8 and facts.frames_at(None) == 12


def test_plans_by_time_follow_the_times_and_plans_by_number_do_not(tmp_path: Path) -> None:
    path = timed(tmp_path / "a.mp4", numbered(12), VARIABLE, last=Fraction(1, 24))
    every = read_video(path, EveryFps(4.0))
    assert every.indices == (0, 3, 7, 8), "nearest to 0, 6, 12 and 18 of 24"
    assert read_video(path, Uniform(3)).indices == (0, 6, 11)
    timeline = Timeline(tuple(VARIABLE), Fraction(1), 12.0)
    assert picked(EveryFps(4.0), timeline) == every.indices
    assert picked(QwenFps(2.0), timeline) == tuple(QwenFps(2.0).indices(12, 12.0))


def test_sound_is_left_out(tmp_path: Path) -> None:
    """Sound that lasts longer than the pictures does not make the clip longer."""
    silent, loud = steady(tmp_path / "a.mp4", 12), steady(tmp_path / "b.mp4", 12, sound=True)
    assert b"mp4a" in loud.read_bytes()
    assert clip_facts(loud) == clip_facts(silent) == (12, 12.0, 16, 24)
    assert np.array_equal(clip_frames(loud, fps=8, frames=8), clip_frames(silent, fps=8, frames=8))
    with pytest.raises(MediaError, match="12 frames at 12 frames per second give 8 at 8, and 9 are wanted"):
        clip_frames(loud, fps=8, frames=9)


def test_facts_are_those_of_upright_frames(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", moving(8, 50, 70))
    assert clip_facts(path) == (8, 12.0, 50, 70)
    lying = turned(path, tmp_path / "b.mp4", 90)
    assert clip_facts(lying) == (8, 12.0, 70, 50)
    assert clip_frames(lying, fps=12, frames=8).shape == (8, 70, 50, 3)
    facts = clip_facts(encode(tmp_path / "c.mkv", moving(30, 48, 64), fps=Fraction(30000, 1001)))
    assert facts.fps == pytest.approx(30000 / 1001, rel=1e-9) and facts.num_frames == 30
    assert [facts.frames_at(fps) for fps in (16, 30, 60, None)] == [17, 31, 61, 30]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_what_facts_promise_is_there(tmp_path: Path, suffix: str) -> None:
    codec = {".avi": {"codec": "mpeg4"}}.get(suffix, {})
    for count, fps in ((1, 24), (5, 24), (24, 24), (9, 10)):
        path = encode(tmp_path / f"{count}{suffix}", moving(count, 32, 48), fps=fps, **codec)
        facts = clip_facts(path)
        assert (facts.num_frames, facts.fps) == (count, fps)
        for target in (None, 8, 16, 24):
            there = facts.frames_at(target)
            assert len(clip_frames(path, fps=target, frames=there)) == there
            with pytest.raises(MediaError, match="is too short"):
                clip_frames(path, fps=target, frames=there + 1)


def test_the_refusals_of_other_readers_hold(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        clip_facts(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("not a clip" * 50)
    for read in (clip_facts, lambda path: clip_frames(path, fps=8, frames=2)):
        with pytest.raises(MediaError, match="holds text, not a clip"):
            read(tmp_path / "text.mp4")
    half = tmp_path / "half.mkv"
    half.write_bytes(steady(tmp_path / "a.mkv", 30).read_bytes()[:-200])
    with pytest.raises(MediaError, match="is truncated"):
        clip_facts(half)
