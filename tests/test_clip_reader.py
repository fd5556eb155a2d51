"""The clip reader against clips whose truth is known: tracks, velocities, flicker, repeated frames, odd media."""

import warnings

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy.stats import theilslopes

from mmalign.shapes import clip_reader
from mmalign.shapes.axes import axes, everything
from mmalign.shapes.captions import Caption
from mmalign.shapes.clip import Moving, MovingScene, render_clip
from mmalign.shapes.clip_data import DrawnClip, drawn_clips
from mmalign.shapes.clip_reader import STILL, ClipReading, read_clip
from mmalign.shapes.damage import Film, damage, film
from mmalign.shapes.motion import parse_motion
from mmalign.shapes.reader import read
from mmalign.shapes.scene import Scene, Shape, render, sample_scene

FPS = 8.0
CLIPS = drawn_clips(60, 40) + drawn_clips(30, 41, counts=(0, 1))


def one(vx: float = 0.0, vy: float = 0.0, kind: str = "circle", **shape) -> MovingScene:
    return MovingScene((Moving(Shape(kind, "red", **{"x": 32.0, "y": 32.0, "radius": 10.0} | shape), vx, vy),), "grey")


def errors(item: DrawnClip, reading: ClipReading) -> list[tuple[float, float, float]]:
    """Of place, velocity and radius, for each drawn shape against the track that begins nearest to it."""
    found = []
    for moving in item.scene.shapes:
        track = min(reading.tracks, key=lambda t: np.hypot(t.x - moving.shape.x, t.y - moving.shape.y))
        found.append(
            (
                np.hypot(track.x - moving.shape.x, track.y - moving.shape.y),
                np.hypot(track.vx - moving.vx, track.vy - moving.vy),
                abs(track.radius - moving.shape.radius),
            )
        )
    return found


@pytest.mark.parametrize("side", [32, 48, 64])
def test_small_pictures_are_read_at_their_own_side(side):
    rng = np.random.default_rng(side)
    for item in drawn_clips(60, 42, side=side):
        scene = sample_scene(parse_plain(item), rng)
        reading = read(render(scene, side), side)
        assert sorted((s.kind, s.colour) for s in reading.shapes) == sorted((s.kind, s.colour) for s in scene.shapes)
        assert reading.background == scene.background and reading.cleanliness > 0.98
        for shape in scene.shapes:
            seen = min(reading.shapes, key=lambda s: np.hypot(s.x - shape.x, s.y - shape.y))
            assert np.hypot(seen.x - shape.x, seen.y - shape.y) < 0.2 and abs(seen.radius - shape.radius) < 0.2
            assert np.allclose(seen.rgb, shape.rgb, atol=0.03)


def test_pictures_are_not_read_larger_than_the_frame():
    for side in (0, 65, 128):
        with pytest.raises(ValueError, match="1 to 64 pixels across"):
            read(np.zeros((128, 128, 3), np.uint8), side)


def parse_plain(item: DrawnClip) -> Caption:
    """The caption without its motion, for a picture."""
    return Caption(tuple(mover.item for mover in item.caption.movers), background=item.caption.background)


@pytest.mark.parametrize("side", [32, 48, 64])
def test_drawn_clips_are_read_back(side):
    for drawn in CLIPS:
        item = DrawnClip(drawn.caption, drawn.seed, side=side)
        reading = read_clip(item.clip(), FPS)
        assert everything(item.caption, reading), str(item.caption)
        assert min(axes(item.caption, reading).values()) > 0.98
        assert np.max(errors(item, reading), axis=0) == pytest.approx(0, abs=0.2)
        assert reading.strays == 0 and reading.identity == 1 and reading.dropped == 0
        assert reading.background == item.scene.background and reading.background_constancy == 1


def generated(clip, rng):
    """About as a small model draws: softer, noisier, each clip with colours of its own."""
    gain = rng.uniform(0.9, 1.1) * rng.uniform(0.97, 1.03, 3)
    soft = [np.asarray(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(0.5))) for frame in clip]
    return np.clip(np.stack(soft) * gain + rng.normal(0, 6, clip.shape), 0, 255).round().astype(np.uint8)


def test_spoilt_clips_are_read_back():
    rng = np.random.default_rng(0)
    readings = [(item, read_clip(generated(item.clip(), rng), FPS)) for item in CLIPS]
    assert np.mean([everything(item.caption, reading) for item, reading in readings]) >= 0.97
    wrong = np.array([error for item, reading in readings for error in errors(item, reading)])
    assert np.median(wrong, axis=0) == pytest.approx(0, abs=0.3) and np.quantile(wrong[:, 1], 0.95) < 1.0
    assert np.mean([reading.identity for _, reading in readings]) > 0.97


def test_a_tracks_velocity_is_theil_and_sens_and_its_jitter_the_distance_from_that_line():
    rng = np.random.default_rng(3)
    for _ in range(5):
        scenes = damage(film(one(12, -7), fps=FPS), "jitter", 0.5, rng)
        (track,) = read_clip(scenes.draw(), FPS).tracks
        times = np.arange(9) / FPS
        x, y, radius = np.array([(s.x, s.y, s.radius) for s in track.sightings]).T
        assert track.vx == pytest.approx(theilslopes(x, times)[0], abs=1e-9)
        assert track.vy == pytest.approx(theilslopes(y, times)[0], abs=1e-9)
        line = (np.median(x - times * track.vx) + times * track.vx, np.median(y - times * track.vy) + times * track.vy)
        away = (x - line[0]) ** 2 + (y - line[1]) ** 2 + (radius - np.median(radius)) ** 2
        assert track.jitter == pytest.approx(np.sqrt(away.mean()), abs=1e-9)
        truth = [(scene.shapes[0].x, scene.shapes[0].y) for scene in scenes.scenes]
        assert np.allclose(track.places[:, :2], truth, atol=0.2)


@pytest.mark.parametrize(
    ("vx", "vy", "direction"),
    [(-20, 0, "left"), (20, 8, "right"), (3, -14, "up"), (0, 6, "down"), (0, 0, "still"), (1.5, 1.5, "still"),
     (12, 12, None), (-12, 9, None)],
)  # fmt: skip
def test_directions(vx, vy, direction):
    (track,) = read_clip(render_clip(one(vx, vy)), FPS).tracks
    assert track.direction == direction and track.speed == pytest.approx(np.hypot(vx, vy), abs=0.2)
    assert (track.speed < STILL) == (direction == "still")


def test_speed_is_per_second_whatever_the_rate():
    scene = one(16)
    for frames, fps in ((9, 8.0), (5, 4.0), (17, 16.0), (2, 1.0)):
        (track,) = read_clip(render_clip(scene, frames, fps), fps).tracks
        assert track.speed == pytest.approx(16, abs=0.2)


def test_repeated_frames_are_found_and_no_others():
    rng = np.random.default_rng(5)
    found, truth = [], []
    for item in CLIPS:
        if any(mover.direction for mover in item.caption.movers):
            shown = damage(film(item.scene), "repeat", 0.3, rng)
            reading = read_clip(shown.draw(), FPS)
            found.append(set(reading.held))
            truth.append({k for k in range(1, 9) if shown.scenes[k] == shown.scenes[k - 1]})
            leaps = {k for k in range(1, 9) if k - 1 in truth[-1] and k not in truth[-1]}
            assert set(reading.leapt) <= leaps and len(truth[-1]) == 1
            assert reading.dropped == (len(reading.held) + len(reading.leapt)) / 8
    assert np.mean([a == b for a, b in zip(found, truth, strict=True)]) >= 0.97 and len(truth) > 50


def test_steady_and_standing_clips_drop_no_frame():
    for scene in (one(), one(-16, 0), one(5, 0)):
        reading = read_clip(render_clip(scene), FPS)
        assert reading.held == reading.leapt == () and reading.dropped == 0
    skipped = render_clip(one(-12, 0, x=46.0), 11)[[0, 1, 2, 3, 4, 7, 8, 9, 10]]
    reading = read_clip(skipped, FPS)
    assert reading.leapt == (5,) and reading.held == () and reading.dropped == 1 / 8


def test_identity_is_the_share_of_sightings_that_are_kept():
    rng = np.random.default_rng(6)
    for item in CLIPS:
        tracks = len(item.caption.movers)
        for kind in ("swap", "vanish"):
            reading = read_clip(damage(film(item.scene), kind, 0.8, rng).draw(), FPS)
            assert len(reading.tracks) == tracks and reading.strays == 0
            assert reading.identity == pytest.approx(1 - 3 / (9 * tracks))  # round(0.8 * 8 / 2) of 9 frames
            asked = sorted((mover.item.kind, mover.item.colour) for mover in item.caption.movers)
            assert sorted((track.kind, track.colour) for track in reading.tracks) == asked


def test_what_is_there_for_a_moment_is_a_stray():
    frames = list(film(one(-8)).scenes)
    for k in (3, 4):
        frames[k] = Scene((*frames[k].shapes, Shape("square", "blue", 50.0, 52.0, 8.0)), "grey")
    reading = read_clip(Film(tuple(frames)).draw(), FPS)
    assert [(t.kind, t.colour) for t in reading.tracks] == [("circle", "red")] and reading.strays == 2
    assert reading.identity == pytest.approx(9 / 11)


def test_shapes_that_pass_each_other_stay_themselves():
    left = Moving(Shape("circle", "red", 14.0, 14.0, 9.0), vx=28.0)
    right = Moving(Shape("circle", "blue", 50.0, 40.0, 9.0), vx=-28.0)
    reading = read_clip(render_clip(MovingScene((left, right), "white")), FPS)
    assert [(t.colour, t.direction, t.kept) for t in reading.tracks] == [("red", "right", 9), ("blue", "left", 9)]


def test_a_shape_that_leaps_across_the_frame_is_one_track_with_much_jitter():
    frames = list(film(one(x=14.0)).scenes[:5]) + list(film(one(x=50.0)).scenes[:4])
    reading = read_clip(Film(tuple(frames)).draw(), FPS)
    assert len(reading.tracks) == 1 and reading.jitter > 5 and reading.identity == 1


def test_flicker_is_the_change_of_colours_from_frame_to_frame():
    clip = render_clip(one(), 9)
    factors = np.array([1, 0.8, 1, 0.9, 0.9, 0.7, 1, 0.95, 0.85])
    dimmed = np.round(clip * factors[:, None, None, None]).astype(np.uint8)
    red, grey = Shape("circle", "red", 0, 0, 1).rgb, np.full(3, 0.62)
    largest = max(np.sqrt((red**2).mean()), np.sqrt((grey**2).mean()))
    expected = np.sqrt(np.mean((np.diff(factors) * largest) ** 2))
    assert read_clip(dimmed, FPS).flicker == pytest.approx(expected, abs=0.005)
    assert read_clip(clip, FPS).flicker < 1e-3
    assert read_clip(clip[:1], FPS).flicker == 0


def test_another_shape_in_its_place_is_no_flicker():
    frames = list(film(one()).scenes[:5]) + [Scene((Shape("circle", "blue", 32.0, 32.0, 10.0),), "grey")] * 4
    assert read_clip(Film(tuple(frames)).draw(), FPS).flicker < 1e-3


def test_the_background_is_that_of_most_frames():
    frames = [*render_clip(one(), 6), *render_clip(MovingScene(one().shapes, "black"), 3)]
    reading = read_clip(np.stack(frames), FPS)
    assert reading.background == "grey" and reading.background_constancy == pytest.approx(6 / 9)
    assert reading.flicker == pytest.approx(np.sqrt((0.62 - 0.06) ** 2 / 8), abs=0.01)


def test_an_empty_frame_is_clean_and_an_empty_clip_is_nothing():
    clip = render_clip(one())
    clip[4] = clip[0, 0, 0]
    reading = read_clip(clip, FPS)
    assert reading.cleanliness > 0.98 and reading.identity == pytest.approx(8 / 9)
    empty = read_clip(np.full((9, 32, 32, 3), 158, np.uint8), FPS)
    assert empty.tracks == () and empty.cleanliness == empty.identity == empty.jitter == empty.dropped == 0


def test_any_pixels_are_read_without_an_error_or_a_warning():
    rng = np.random.default_rng(0)
    caption = parse_motion("a red circle moves left quickly and a small blue square stands still on a grey background")
    sizes = [(9, 32, 32), (1, 32, 32), (2, 48, 48), (3, 64, 64), (9, 1, 1), (4, 5, 77), (2, 128, 96), (17, 24, 24)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in sizes:
            for clip in (rng.integers(0, 256, (*size, 3)), rng.normal(128, 25, (*size, 3)).clip(0, 255)):
                values = axes(caption, read_clip(clip.astype(np.uint8), FPS))
                assert all(0 <= value <= 1 for value in values.values())
                assert values["VQ"] < 0.05 and values["MQ"] < 0.6


@pytest.mark.parametrize(
    "clip",
    [np.zeros((9, 32, 32, 3)), np.zeros((32, 32, 3), np.uint8), np.zeros((9, 3, 32, 32), np.uint8),
     np.zeros((0, 32, 32, 3), np.uint8)],
)  # fmt: skip
def test_other_arrays_are_refused(clip):
    with pytest.raises(ValueError, match="needs a uint8 RGB clip"):
        read_clip(clip, FPS)


@pytest.mark.parametrize("fps", [0, -8, float("nan"), float("inf")])
def test_a_rate_is_above_zero(fps):
    with pytest.raises(ValueError, match="rate above 0"):
        read_clip(render_clip(one()), fps)


def test_a_clip_costs_one_reading_of_each_frame(monkeypatch):
    sides = []
    monkeypatch.setattr(clip_reader, "read", lambda frame, side: sides.append(side) or read(frame, side))
    clip = CLIPS[0].clip()
    assert len(read_clip(clip, FPS).frames) == len(clip) == len(sides) and set(sides) == {clip.shape[1]}
