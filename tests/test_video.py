"""Decoding and encoding clips: the same frames from both decoders, a message for every kind of bad file."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hostile_clip_kit import muxed
from media_kit import encode, encoded, moving, needs_decord, picture
from PIL import Image
from public_kit import REAL_CLIP, needs

from mmalign import media, video, video_container
from mmalign.frame_plans import _linspace
from mmalign.media import (
    AllFrames,
    EveryFps,
    MediaError,
    Middle,
    QwenFps,
    Starts,
    StrideFps,
    Uniform,
    check_media,
    is_video,
    read_video,
    write_video,
)


def trimmed(source: Path, target: Path, ticks: int) -> Path:
    """Shift every time stamp back by `ticks` of the stream's time base, so that the file begins in the middle."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - ticks, packet.dts - ticks, copy
                new.mux(packet)
    return target


def turned(source: Path, target: Path, degrees: int) -> Path:
    """The same MP4 with another rotation matrix in its track header."""
    one = 0x10000
    matrix = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    data = bytearray(source.read_bytes())
    place = data.index(b"tkhd") + 44
    a, b, c, d = matrix
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    target.write_bytes(data)
    return target


def test_frame_plans() -> None:
    assert AllFrames().indices(3, 24.0) == [0, 1, 2]
    assert Uniform(1).indices(9, 24.0) == [4]
    assert Uniform(3).indices(9, 24.0) == [0, 4, 8]
    assert Uniform(4).indices(10, 24.0) == [0, 3, 6, 9]
    assert Uniform(5).indices(2, 24.0) == [0, 0, 1, 1, 1]  # fewer frames than asked for: repeated, never short
    assert Uniform(2).indices(1, 24.0) == [0, 0]
    assert EveryFps(2.0).indices(10, 8.0) == [0, 4, 8]
    assert EveryFps(8.0).indices(4, 8.0) == EveryFps(30.0).indices(4, 8.0) == [0, 1, 2, 3]
    assert EveryFps(2.0).indices(75, 30000 / 1001) == [0, 15, 30, 45, 60]
    assert EveryFps(0.1).indices(10, 24.0) == [0]
    assert {Uniform(3): 1}[Uniform(3)] == 1  # usable as a key


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 100])
def test_uniform_is_spaced_within_one_frame_and_never_out_of_range(n: int) -> None:
    for frames in (1, 2, 5, 16, 81, 1000):
        picks = Uniform(n).indices(frames, 24.0)
        assert len(picks) == n and picks == sorted(picks) and picks[0] >= 0 and picks[-1] < frames
        if n > 1:
            ideal = np.linspace(0, frames - 1, n)
            assert np.abs(np.array(picks) - ideal).max() <= 0.5


def test_qwen_fps_samples_as_qwens_own_tools_do() -> None:
    """Worked out by hand: seconds * 2, rounded to even (a half to the even pair), at least 4, at most what is there."""
    plan = QwenFps(2.0)
    for (frames, fps), count in {
        (120, 24.0): 10, (40, 8.0): 10, (49, 8.0): 12, (20, 8.0): 4, (28, 8.0): 8, (75, 30000 / 1001): 6,
        (75, 30.0): 4, (24, 24.0): 4, (5, 24.0): 4, (3, 24.0): 2, (2, 24.0): 2, (1, 24.0): 1, (40000, 24.0): 768,
    }.items():  # fmt: skip
        picks = plan.indices(frames, fps)
        assert len(picks) == count, (frames, fps)
        assert picks == sorted(picks) and picks[0] == 0 and picks[-1] == frames - 1
        assert len(picks) < 2 or np.abs(np.array(picks) - np.linspace(0, frames - 1, count)).max() <= 0.5 + 1e-2
    assert plan.indices(9, 24.0) == [0, 3, 5, 8] and plan.indices(3, 24.0) == [0, 2]
    assert QwenFps(16.0).indices(40, 8.0) == list(range(40))
    assert {plan: 1}[QwenFps()] == 1


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch rounds its product too on a CPU without fused multiply-add, and lands on other halves",
)
def test_qwen_fps_is_torchs_linspace_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    pairs = [(frames, count) for frames in range(2, 200) for count in range(2, frames + 1, 2)]
    pairs += [(int(frames), 2 * int(half)) for frames, half in rng.integers((800, 1), (2_000_000, 385), (4000, 2))]
    for frames, count in pairs:
        theirs = torch.linspace(0, frames - 1, count)
        assert np.array_equal(_linspace(frames - 1, count), theirs.numpy()), (frames, count)
        plan = QwenFps(1.0, min_frames=count, max_frames=count)
        assert plan.indices(frames, 1e6) == theirs.round().int().tolist(), (frames, count)


def test_plans_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="at least 1 frame"):
        Uniform(0)
    with pytest.raises(ValueError, match="positive rate"):
        EveryFps(0)
    with pytest.raises(ValueError, match="positive rate"):
        QwenFps(0)
    with pytest.raises(ValueError, match="even bounds from 2, got 3 and 768"):
        QwenFps(2, min_frames=3)


# ------------------------------------------------------------------------------------------------ clips


@pytest.mark.parametrize("size", [(64, 96), (17, 31), (48, 16)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_lossless_clips_come_back_bit_for_bit(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    frames = torch.randint(0, 256, (5, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_video(tmp_path / f"a{suffix}", frames, 12, lossless=True)
    clip = read_video(tmp_path / f"a{suffix}")
    assert torch.equal(clip.frames, frames) and clip.frames.is_contiguous()
    assert (clip.fps, clip.num_frames, clip.indices) == (12.0, 5, (0, 1, 2, 3, 4))
    assert clip.decoder == f"pyav {av.__version__} / libavcodec {'.'.join(map(str, av.library_versions['libavcodec']))}"


@pytest.mark.parametrize("size", [(64, 96), (63, 95)])
def test_lossy_clips_keep_size_and_colour(tmp_path: Path, size: tuple[int, int]) -> None:
    flat = torch.tensor([[200, 30, 60], [20, 180, 220], [128, 128, 128]], dtype=torch.uint8)
    frames = flat[:, :, None, None].expand(3, 3, *size).contiguous()
    write_video(tmp_path / "a.mp4", frames, 29.97)
    clip = read_video(tmp_path / "a.mp4")
    assert clip.frames.shape == frames.shape and clip.fps == pytest.approx(29.97)
    assert (clip.frames.int() - frames.int()).abs().max() <= 3  # a wrong colour matrix or range is off by 10 and more
    first = (tmp_path / "a.mp4").read_bytes()
    for _ in range(10):
        write_video(tmp_path / "a.mp4", frames, 29.97)
        assert (tmp_path / "a.mp4").read_bytes() == first
        read_video(tmp_path / "a.mp4")  # leaves the heap in another state, which x264's AVX-512 code let through


@pytest.mark.parametrize("plan", [AllFrames(), Uniform(5), Uniform(1), Uniform(40), EveryFps(3.0)])
def test_a_plan_picks_the_same_frames_as_indexing_all_of_them(tmp_path: Path, plan: media.FramePlan) -> None:
    path = encode(tmp_path / "a.mp4", moving(30), options={"bf": "3", "g": "10"})
    everything = read_video(path)
    clip = read_video(path, plan)
    assert clip.indices == tuple(plan.indices(30, 12.0)) and clip.num_frames == 30
    assert torch.equal(clip.frames, everything.frames[list(clip.indices)])
    assert torch.equal(read_video(path.read_bytes(), plan).frames, clip.frames)


CLIPS: dict[str, Callable[[Path], Path]] = {
    "h264.mp4": lambda path: encode(path, moving()),
    "odd_size.mp4": lambda path: encode(path, moving(8, 50, 70)),
    "open_gop.mp4": lambda path: encode(
        path, moving(40), options={"bf": "3", "g": "10", "x264-params": "open-gop=1:b-pyramid=normal"}
    ),
    "open_gop.mkv": lambda path: encode(path, moving(40), options={"bf": "3", "g": "10", "x264-params": "open-gop=1"}),
    "mpeg4.avi": lambda path: encode(path, moving(20), codec="mpeg4", options={"bf": "2"}),
    "bt709.mp4": lambda path: encode(path, moving(), matrix=(1, 1)),
    "full_range.mp4": lambda path: encode(path, moving(), matrix=(1, 2)),
    "yuv444.mp4": lambda path: encode(path, moving(), pixels="yuv444p"),
    "yuv422.mp4": lambda path: encode(path, moving(), pixels="yuv422p"),
    "hevc.mp4": lambda path: encode(path, moving(), codec="libx265", options={"x265-params": "log-level=none"}),
    "vp9.webm": lambda path: encode(path, moving(), codec="libvpx-vp9"),
    "mjpeg.avi": lambda path: encode(path, moving(), codec="mjpeg", pixels="yuvj420p"),
    "fragmented.mp4": lambda path: encode(path, moving(20), container={"movflags": "frag_keyframe+empty_moov"}),
    "film_rate.mkv": lambda path: encode(path, moving(), fps=24),
    "turned90.mp4": lambda path: turned(encode(path.with_name("t.mp4"), moving()), path, 90),
    "turned180.mp4": lambda path: turned(encode(path.with_name("t.mp4"), moving()), path, 180),
    "turned270.mp4": lambda path: turned(encode(path.with_name("t.mp4"), moving()), path, 270),
}


@needs_decord
@pytest.mark.parametrize("name", CLIPS)
def test_decord_and_pyav_give_identical_frames(tmp_path: Path, name: str) -> None:
    path = CLIPS[name](tmp_path / name)
    by_pyav, by_decord = read_video(path, decoder="pyav"), read_video(path, decoder="decord")
    assert by_pyav.num_frames == by_decord.num_frames and by_pyav.fps == by_decord.fps
    assert torch.equal(by_pyav.frames, by_decord.frames)
    assert by_decord.decoder == video.decord_version() and by_pyav.decoder == video.pyav_version()
    sparse = Uniform(4)  # sparse picks too: decord's own random access is wrong after open GOPs
    assert torch.equal(read_video(path, sparse).frames, read_video(path, sparse, decoder="decord").frames)


def test_frames_are_those_that_were_encoded_in_order_and_upright(tmp_path: Path) -> None:
    """Both decoders could agree and be wrong: the nearest original of each decoded frame is the one at its place."""
    originals = moving(40)
    path = encode(tmp_path / "a.mp4", originals, options={"bf": "3", "g": "10", "x264-params": "open-gop=1"})
    for turns, clip in enumerate([read_video(path), read_video(turned(path, tmp_path / "b.mp4", 90))]):
        frames = torch.rot90(
            clip.frames, turns, (2, 3)
        ).int()  # tagged 90: shown clockwise, so turned back the other way
        distance = (frames[:, None] - originals[None].int()).abs().float().mean((2, 3, 4))
        assert distance.argmin(1).tolist() == list(range(40))


DIFFERENT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "ten_bit.mp4": (lambda path: encode(path, moving(), pixels="yuv420p10le"), "converts yuv420p10le differently"),
    "stream.ts": (lambda path: encode(path, moving(40), options={"bf": "2", "g": "10"}), "loses frames of mpegts"),
    "edit_list.mp4": (
        lambda path: trimmed(encode(path.with_name("x.mp4"), moving(40), options={"g": "40"}), path, 512 * 10 * 2),
        "frames that this file cuts away",
    ),
    "small.mp4": (lambda path: encode(path, moving(4, 32, 16)), "decord cannot decode it"),
    "movie.gif": (lambda path: encode(path, moving(), codec="gif", pixels="rgb8"), "differently from PyAV"),
}


@needs_decord
@pytest.mark.parametrize("name", DIFFERENT)
def test_decord_is_refused_where_its_frames_would_differ(tmp_path: Path, name: str) -> None:
    make, message = DIFFERENT[name]
    path = make(tmp_path / name)
    assert read_video(path).num_frames > 0
    with pytest.raises(MediaError, match=f"{message}.*use decoder='auto'"):
        read_video(path, decoder="decord")


def test_an_edit_list_hides_frames(tmp_path: Path) -> None:
    whole = encode(tmp_path / "a.mp4", moving(40), options={"g": "40"})
    cut = trimmed(whole, tmp_path / "b.mp4", 1024 * 10)
    clip = read_video(cut)
    assert clip.num_frames == 30
    assert torch.equal(clip.frames, read_video(whole).frames[10:])
    assert read_video(cut, Uniform(2)).indices == (0, 29)


def test_without_decord_auto_says_pyav_and_asking_for_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.mp4", moving(4))
    monkeypatch.setitem(sys.modules, "decord", None)  # what Python does for a package that cannot be imported
    assert read_video(path).decoder.startswith("pyav ")
    with pytest.raises(MediaError, match=r"decord cannot be imported .* or use decoder='auto'"):
        read_video(path, decoder="decord")
    with pytest.raises(ValueError, match="not 'cv2'"):
        read_video(path, decoder="cv2")  # type: ignore[arg-type]


@needs_decord
@needs(REAL_CLIP)
def test_decord_and_pyav_agree_on_a_real_clip() -> None:
    by_pyav, by_decord = read_video(REAL_CLIP, decoder="pyav"), read_video(REAL_CLIP, decoder="decord")
    assert by_pyav.frames.shape == (310, 3, 240, 426) and by_pyav.fps == by_decord.fps == 30.0
    assert torch.equal(by_pyav.frames, by_decord.frames)
    assert torch.equal(read_video(REAL_CLIP, EveryFps(2)).frames, by_decord.frames[::15])


def damaged(path: Path) -> Path:
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    middle = start + (len(data) - start) // 2
    for place in range(middle, middle + 600):  # less than a frame may still be a legal one
        data[place] ^= 0x5A
    path.write_bytes(data)
    return path


def cut_off(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def sizeless(path: Path) -> Path:
    """A Matroska file whose segment does not say how long it is, as when it was streamed."""
    data = bytearray(path.read_bytes())
    place = data.index(b"\x18\x53\x80\x67") + 4
    assert data[place] == 1, "eight bytes of size"
    data[place : place + 8] = b"\x01" + b"\xff" * 7
    path.write_bytes(data)
    return path


FAST_START = {"movflags": "faststart"}
BAD_CLIPS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "index_first.mp4": (
        lambda path: cut_off(encode(path, moving(40), container=FAST_START), 0.6),
        r"is truncated, \d+ of 40 frames are there; it was cut off: write or download it again",
    ),
    "index_last.mp4": (lambda path: cut_off(encode(path, moving(40)), 0.6), "no readable clip, or is truncated"),
    "half.mkv": (
        lambda path: cut_off(encode(path, moving(40)), 0.6),
        r"is truncated, [\d,]+ of [\d,]+ bytes are there",
    ),
    "a_frame_less.mkv": (lambda path: cut_off(encode(path, moving(40)), 0.98), r"is truncated, [\d,]+ of [\d,]+ bytes"),
    "no_size.mkv": (
        lambda path: cut_off(sizeless(encode(path, moving(40))), 0.6),
        r"is truncated, [\d.]+ of 3\.\d+ seconds are there",
    ),
    "half.webm": (lambda path: cut_off(encode(path, moving(40), codec="libvpx-vp9"), 0.5), "is truncated"),
    "damaged.mp4": (
        lambda path: damaged(encode(path, moving(40), container=FAST_START, options={"g": "10"})),
        r"frame \d+ is damaged|damaged at frame \d+",
    ),
}


@pytest.mark.parametrize("name", BAD_CLIPS)
@pytest.mark.parametrize("plan", [AllFrames(), Uniform(1)])
def test_bad_clips_are_refused_whatever_the_plan(tmp_path: Path, name: str, plan: media.FramePlan) -> None:
    make, message = BAD_CLIPS[name]
    path = make(tmp_path / name)
    with pytest.raises(MediaError, match=message) as caught:
        read_video(path, plan)
    assert name in str(caught.value)
    with pytest.raises(MediaError, match=message):
        check_media(path)


def test_what_is_no_clip_at_all(tmp_path: Path) -> None:
    cases = {
        "noise.mp4": (bytes(range(256)) * 9, "no readable clip"),
        "empty.mp4": (b"", "is empty"),
        "text.mp4": (b"not a clip" * 50, "holds text, not a clip"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=message):
            read_video(tmp_path / name)
    with pytest.raises(MediaError, match="no such file"):
        read_video(tmp_path / "gone.mp4")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(MediaError, match="holds no video stream"):
        read_video(tmp_path / "sound.mkv")


def test_a_clip_too_large_for_memory_is_refused_before_decoding(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", moving(30))
    with pytest.raises(
        MediaError, match=r"30 frames of 96x64 need .* pick fewer with a frame plan, or raise max_bytes"
    ):
        read_video(path, max_bytes=29 * 96 * 64 * 3)
    assert len(read_video(path, Uniform(4), max_bytes=4 * 96 * 64 * 3).frames) == 4


def test_a_stream_without_a_size_is_read_whole(tmp_path: Path) -> None:
    path = sizeless(encode(tmp_path / "a.mkv", moving(40)))
    assert read_video(path).num_frames == 40


def test_memory_is_counted_by_the_frames_not_by_what_the_container_says(tmp_path: Path) -> None:
    stills = [encoded(Image.fromarray(picture(64, 96)), "JPEG")] * 3
    data = muxed(tmp_path / "a.mkv", "mjpeg", stills, (8, 8), "yuvj420p")
    assert read_video(data).frames.shape == (3, 3, 64, 96)
    with pytest.raises(MediaError, match="3 frames of 96x64 need"):
        read_video(data, max_bytes=3 * 96 * 64 * 3 - 1)


def test_a_text_cannot_pull_in_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg's playlists name further files, and it would read them, whatever the playlist is called."""
    encode(tmp_path / "secret.mp4", moving(4))
    monkeypatch.chdir(tmp_path)
    for text in ("ffconcat version 1.0\nfile 'secret.mp4'\n", "\0ffconcat version 1.0\nfile 'secret.mp4'\n"):
        (tmp_path / "a.mp4").write_text(text)
        for decoder in ("auto", "decord"):
            with pytest.raises(MediaError, match=r"holds text|no readable clip"):
                read_video(tmp_path / "a.mp4", decoder=decoder)
    plain = video_container.contents
    monkeypatch.setattr(video_container, "contents", lambda head: None)  # FFmpeg's own list refuses it too
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile 'secret.mp4'\n")
    with pytest.raises(MediaError, match="no readable clip"):
        read_video(tmp_path / "a.mp4")
    assert plain(b"ffconcat version 1.0") is not None


def test_write_video_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    frames = moving(2)
    for wrong in (frames.float(), frames[0], frames[:0], frames.permute(0, 2, 3, 1)):
        with pytest.raises(ValueError, match=r"takes uint8 \[T, 3, H, W\]"):
            write_video(tmp_path / "a.mp4", wrong, 12)
    with pytest.raises(ValueError, match=r"cannot write '\.gif'; use"):
        write_video(tmp_path / "a.gif", frames, 12)
    with pytest.raises(ValueError, match="fps must be positive"):
        write_video(tmp_path / "a.mp4", frames, 0)
    assert list(tmp_path.iterdir()) == []


def test_clips_and_images_are_told_apart_by_suffix_or_content(tmp_path: Path) -> None:
    clip = encode(tmp_path / "a.mp4", moving(4))
    assert is_video(clip) and is_video(clip.read_bytes())
    assert is_video(encode(tmp_path / "a.mkv", moving(4)).read_bytes())
    assert is_video(encode(tmp_path / "a.avi", moving(4), codec="mpeg4").read_bytes())
    for format in ("PNG", "JPEG", "WEBP", "AVIF"):
        assert not is_video(encoded(Image.fromarray(picture()), format))
    check_media(clip)
    check_media(encoded(Image.fromarray(picture()), "PNG"))


def test_plans_of_vbench() -> None:
    """By hand, from the published rules: middles of equal stretches, the last one again; a stride rounded to even."""
    assert Middle(8).indices(16, 8.0) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert Middle(8).indices(17, 8.0) == [0, 2, 4, 6, 8, 10, 12, 15]
    assert Middle(4).indices(3, 8.0) == [0, 1, 2, 2]
    assert Middle(16).indices(1, 8.0) == [0] * 16
    strides = {8: 1, 10: 1, 12: 2, 15: 2, 16: 2, 20: 2, 24: 3, 25: 3, 30: 4, 50: 6, 60: 8, 4: 1}
    assert {fps: StrideFps(8).indices(100, fps)[1] for fps in strides} == strides
    assert Starts(16).indices(16, 8.0) == list(range(16)) and Starts(16).indices(3, 8.0) == [0, 1, 2]
    assert Starts(16).indices(49, 8.0) == [int(i * (49 / 16)) for i in range(16)]
    assert Starts(3).indices(10, 8.0) == [0, 3, 6]
    for plan, value in ((Middle, 0), (Starts, 0), (StrideFps, 0.0)):
        with pytest.raises(ValueError, match=plan.__name__):
            plan(value)
