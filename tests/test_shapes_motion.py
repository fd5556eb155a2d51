"""Captions of motion, moving scenes, and clips drawn for training."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest

from mmalign.shapes.captions import Item
from mmalign.shapes.clip import (
    APART,
    MARGIN,
    QUICK,
    RADII,
    SLOW,
    SPEED_RANGE,
    Moving,
    MovingScene,
    render_clip,
    sample_moving,
)
from mmalign.shapes.clip_data import drawn_clips
from mmalign.shapes.motion import DIRECTIONS, SPEEDS, WORDS, MotionCaption, Mover, motions, parse_motion
from mmalign.shapes.scene import LARGE, SIDE, SMALL, Scene, Shape, render

CAPTIONS = motions(600, 3, held_out=False) + motions(200, 3, held_out=True)


def test_captions_are_written_and_parsed_back():
    for caption in CAPTIONS:
        assert parse_motion(str(caption)) == caption
        assert set(str(caption).split()) <= set(WORDS)
    assert {word for caption in CAPTIONS for word in str(caption).split()} == set(WORDS)
    assert parse_motion("  A red circle moves LEFT slowly on a grey background. ") == MotionCaption(
        (Mover(Item("circle", "red"), "left", "slowly"),), "grey"
    )


@pytest.mark.parametrize(
    "text",
    ["", "a red circle", "a red circle moves", "a red circle stands still quickly", "a red circle moves left left",
     "a red circle moves left and a blue square", "red circle moves left", "a red circle moves left\0"],
)  # fmt: skip
def test_other_texts_are_no_captions(text):
    with pytest.raises(ValueError, match="not a caption of moving shapes"):
        parse_motion(text)


def test_two_shapes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="nobody could tell apart"):
        parse_motion("a red circle moves left and a small red circle moves up")


def test_a_tenth_of_all_captions_is_held_out():
    train, held = CAPTIONS[:600], CAPTIONS[600:]
    assert not any(caption.held_out for caption in train) and all(caption.held_out for caption in held)
    items = [Item(kind, colour) for kind in ("circle", "cross") for colour in ("red", "blue", "cyan")]
    every = [
        MotionCaption((Mover(item, direction, speed),), background)
        for item, direction, speed, background in itertools.product(
            items, DIRECTIONS, (None, *SPEEDS), (None, "white", "grey", "black")
        )
    ]
    share = np.mean([caption.held_out for caption in every])
    assert 0.05 < share < 0.15


def test_counts_are_the_shares_of_captions_with_one_and_two_shapes():
    found = Counter(len(caption.movers) for caption in motions(2000, 0, held_out=False))
    assert abs(found[1] / 2000 - 0.75) < 0.04 and set(found) == {1, 2}
    assert {len(caption.movers) for caption in motions(50, 0, held_out=False, counts=(0, 1))} == {2}
    assert {len(caption.movers) for caption in motions(50, 0, held_out=False, counts=(1,))} == {1}
    with pytest.raises(ValueError, match="one and of two"):
        motions(1, 0, held_out=False, counts=(0.5, 0.3, 0.2))


@pytest.mark.parametrize(("frames", "fps"), [(9, 8.0), (1, 8.0), (17, 16.0)])
def test_scenes_keep_their_captions_inside_the_frame_and_apart_all_the_time(frames, fps):
    for number, caption in enumerate(CAPTIONS):
        scene = sample_moving(caption, np.random.default_rng(number), frames=frames, fps=fps)
        assert caption.background in (None, scene.background)
        for mover, moving in zip(caption.movers, scene.shapes, strict=True):
            shape, speed = moving.shape, np.hypot(moving.vx, moving.vy)
            assert (shape.kind, shape.colour) == (mover.item.kind, mover.item.colour)
            assert RADII[0] <= shape.radius <= RADII[1][len(scene.shapes) - 1]
            assert mover.item.size != "small" or shape.radius <= SMALL
            assert mover.item.size != "large" or shape.radius >= LARGE
            assert mover.direction is None or SPEED_RANGE[0] <= speed <= SPEED_RANGE[1]
            assert mover.speed != "slowly" or speed < SLOW
            assert mover.speed != "quickly" or speed > QUICK
            signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), None: (0, 0)}[mover.direction]
            assert (np.sign(moving.vx), np.sign(moving.vy)) == signs
        for k in range(frames):
            shapes = scene.at(k / fps).shapes
            for shape in shapes:
                edge = shape.radius + MARGIN - 1e-9
                assert edge <= min(shape.x, shape.y) and max(shape.x, shape.y) <= SIDE - edge
            for a, b in itertools.combinations(shapes, 2):
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + APART - 1e-9


def test_a_second_has_room_for_every_pair_of_movements_and_sizes():
    ways = [(None, None), *itertools.product(DIRECTIONS, SPEEDS)]
    for one, other in itertools.product(ways, ways):
        for sizes in (("large", "large"), ("small", "large"), (None, None)):
            movers = (Mover(Item("circle", "red", sizes[0]), *one), Mover(Item("square", "blue", sizes[1]), *other))
            sample_moving(MotionCaption(movers), np.random.default_rng(0))


def test_a_clip_without_room_says_so():
    with pytest.raises(ValueError, match="use fewer frames"):
        sample_moving(parse_motion("a large red circle moves left quickly"), np.random.default_rng(0), frames=65)


def test_frames_are_the_scene_at_their_times():
    moving = Moving(Shape("circle", "red", 40.0, 20.0, 9.0), vx=-16.0, vy=4.0)
    clip = render_clip(MovingScene((moving,), "grey"), frames=5, fps=4.0, side=48)
    assert clip.shape == (5, 48, 48, 3) and clip.dtype == np.uint8
    for k in range(5):
        shape = Shape("circle", "red", 40.0 - 4.0 * k, 20.0 + k, 9.0)
        assert np.array_equal(clip[k], render(Scene((shape,), "grey"), 48))


def test_drawn_clips_are_items_for_training():
    items = drawn_clips(40, 7)
    again = [pickle.loads(pickle.dumps(item)) for item in drawn_clips(40, 7)]
    assert all(np.array_equal(a.clip(), b.clip()) and a.hash() == b.hash() for a, b in zip(items, again, strict=True))
    assert len({item.hash() for item in [*items, *drawn_clips(40, 8), *drawn_clips(40, 7, fps=16)]}) == 120
    for item in items:
        assert item.clip().shape == (item.num_frames, *item.size, 3) == (9, 32, 32, 3) and item.fps == 8
        assert not item.caption.held_out and str(item.caption) in item.name
    assert all(item.caption.held_out for item in drawn_clips(10, 7, held_out=True))
    (long,) = drawn_clips(1, 7, frames=13, side=48, fps=12)
    assert long.clip().shape == (13, 48, 48, 3) and long.fps == 12
    with pytest.raises(ValueError, match="above 0"):
        drawn_clips(1, 7, fps=0)
