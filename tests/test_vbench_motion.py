"""VBench's rules on optical flow, without a network: what moves, what is static, where the camera goes."""

import json
import math

import numpy as np
import pytest
import torch
from public_kit import VBENCH_I2V, needs

from mmalign.vbench.camera import (
    TYPES,
    advance,
    asked_type,
    camera_types,
    directions,
    edge_points,
    is_hit,
)
from mmalign.vbench.motion import (
    check_measurable,
    dynamic_needed,
    dynamic_threshold,
    dynamic_verdict,
    file_order,
    first_static,
    static_allowed,
    static_limit,
    static_threshold,
    top_mean,
)


@pytest.mark.parametrize(
    ("height", "width", "share"), [(128, 136, 0.05), (128, 128, 0.02), (8, 8, 0.02), (24, 16, 0.05)]
)
def test_the_speed_of_a_pair_is_the_mean_of_its_fastest_pixels(height, width, share):
    flow = torch.randn(3, 2, height, width, generator=torch.Generator().manual_seed(height)) * 5
    expected = []
    for u, v in flow.double().numpy():  # by sorting, as it is published
        lengths = np.sort(-np.sqrt(u**2 + v**2).flatten())
        expected.append(np.mean(np.abs(lengths[: int(height * width * share)])))
    assert int(height * width * share) >= 1
    found = top_mean(flow, share)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=0)


def test_how_many_fast_pairs_make_a_clip_dynamic():
    """The table of counts by sampled frames, and rounding up halves instead."""
    compat = {1: 0, 2: 0}
    for frames, count in [((3, 5), 1), ((6, 10), 2), ((11, 13), 3), ((14, 18), 4), ((19, 21), 5), ((22, 26), 6)]:
        compat |= {n: count for n in range(frames[0], frames[1] + 1)}
    assert {n: dynamic_needed(n, "compat") for n in range(1, 27)} == compat
    strict = {n: math.floor((n + 2) / 4) for n in range(3, 27)}
    assert {n: dynamic_needed(n, "strict") for n in range(3, 27)} == strict
    assert [n for n in strict if strict[n] != compat[n]] == [10, 18, 26]  # a quarter ends in .5, and is even below
    for frames in (1, 2):
        with pytest.raises(ValueError, match=f"{frames} sampled frame"):
            dynamic_needed(frames, "strict")


def test_dynamic_verdicts_are_known_as_early_as_can_be():
    assert dynamic_verdict(0, 0, 0, 0) is False, "one frame: no pair is looked at, so none makes it dynamic"
    assert dynamic_verdict(0, 0, 1, 0) is True, "two frames: none is needed"
    assert dynamic_verdict(2, 2, 9, 2) is True
    assert dynamic_verdict(1, 7, 9, 2) is None
    assert dynamic_verdict(0, 8, 9, 2) is False
    for pairs in range(1, 7):
        for needed in range(pairs + 2):
            for pattern in range(2**pairs):
                fast = [bool(pattern >> place & 1) for place in range(pairs)]
                verdicts = [dynamic_verdict(sum(fast[:seen]), seen, pairs, needed) for seen in range(pairs + 1)]
                final = sum(fast) >= needed
                assert verdicts[-1] is final and all(verdict in (None, final) for verdict in verdicts)


def test_thresholds_are_by_the_shorter_side():
    assert (dynamic_threshold(256, 400), dynamic_threshold(720, 480)) == (6.0, 11.25)
    assert (static_threshold(256, 400), static_limit(static_threshold(512, 1024), 10)) == (3.0, 120.0)
    check_measurable(121, 500, 128, "compat")
    check_measurable(20, 20, 128, "strict")
    with pytest.raises(ValueError, match=r"120 x 500 pixels are too small .* NaN below 121 .*rules: strict"):
        check_measurable(500, 120, 128, "compat")


def test_how_many_fast_pairs_a_static_clip_may_have():
    compat = {1: 0, 4: 0, 5: 1, 11: 1, 12: 2, 16: 2, 20: 2, 28: 4, 49: 6, 81: 10}
    assert {n: static_allowed(n, "compat") for n in compat} == compat
    strict = {2: 1, 4: 1, 12: 2, 20: 3, 28: 4, 36: 5, 49: 6, 81: 10}
    assert {n: static_allowed(n, "strict") for n in strict} == strict
    with pytest.raises(ValueError, match="one frame"):
        static_allowed(1, "strict")


def test_files_are_taken_letter_by_letter_or_by_number():
    names = ["a-2.mp4", "a-10.mp4", "a-0.mp4", "b 3-1.mp4", "b 12-1.mp4"]
    assert file_order(names, "compat") == ["a-0.mp4", "a-10.mp4", "a-2.mp4", "b 12-1.mp4", "b 3-1.mp4"]
    assert file_order(names, "strict") == ["a-0.mp4", "a-2.mp4", "a-10.mp4", "b 3-1.mp4", "b 12-1.mp4"]
    assert len(file_order(["1.mp4", "a.mp4", "01.mp4", "²-1.mp4"], "strict")) == 4


def test_the_first_static_clips_are_taken_and_no_more_are_asked():
    static = {"a": True, "b": False, "c": True, "d": None, "e": True}
    assert first_static(list("abcde"), static.get, 2) == (["a", "c"], 3)
    assert first_static(list("abcde"), static.get, 3) == (["a", "c"], 3), "d is not known, and may be the third"
    assert first_static(list("abc"), static.get, 5) == (["a", "c"], 3)
    assert first_static([], static.get, 5) == ([], 0)


# ------------------------------------------------------------------------------------------------------- the camera


SIDE = 256
STEP = 9.0  # of an edge point, in pixels; 1.28 is the least that counts


def moved(top, bottom, left, right, rules="compat"):
    start = edge_points(SIDE, SIDE, rules)
    return camera_types(start, start + STEP * torch.tensor([top, bottom, left, right]).double(), SIDE, SIDE, rules)


LEFT, RIGHT, UP, DOWN, STILL = (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)


@pytest.mark.parametrize("rules", ["compat", "strict"])
@pytest.mark.parametrize(
    ("edges", "types"),
    [
        ((LEFT, LEFT, LEFT, LEFT), {"pan_right"}),
        ((RIGHT, RIGHT, RIGHT, RIGHT), {"pan_left"}),
        ((DOWN, DOWN, DOWN, DOWN), {"tilt_up"}),
        ((UP, UP, UP, UP), {"tilt_down"}),
        ((UP, DOWN, LEFT, RIGHT), {"zoom_in"}),
        ((DOWN, UP, RIGHT, LEFT), {"zoom_out"}),
        ((STILL, STILL, STILL, STILL), {"static"}),
        (((-1, -1), (-1, -1), (-1, -1), (-1, -1)), {"pan_right", "tilt_down"}),  # both, for a diagonal
        ((STILL, STILL, LEFT, LEFT), {"pan_right"}),  # what moves outdoes what does not
        ((STILL, STILL, LEFT, UP), set()),  # neither: static is taken off first
        ((LEFT, RIGHT, UP, DOWN), set()),  # a turn about the middle
        ((LEFT, RIGHT, UP, UP), {"tilt_down"}),
        ((UP, DOWN, LEFT, LEFT), {"zoom_in", "pan_right"}),
        (((-1, -1), (1, 1), LEFT, RIGHT), {"zoom_in"}),
    ],
)
def test_four_points_tell_the_camera(edges, types, rules):
    assert moved(*edges, rules=rules) == types


def test_a_motion_and_its_opposite_cancel_in_strict():
    both = (LEFT, LEFT, RIGHT, RIGHT)
    assert moved(*both) == {"pan_left", "pan_right"}
    assert moved(*both, rules="strict") == set()
    assert is_hit("pan_left", moved(*both)) and not is_hit("pan_left", moved(*both, rules="strict"))


def test_a_displacement_counts_from_half_a_percent_of_the_shorter_side():
    assert directions((5.0, -5.0), 1000) == ("static",)
    assert directions((5.01, -5.01), 1000) == ("right", "up")
    assert directions((-5.01, 5.01), 1000) == ("left", "down")
    start = torch.tensor([[10.9, 10.0]] * 4).double()
    near = start + torch.tensor([1.2, 0]).double()
    assert camera_types(start, near, SIDE, SIDE) == {"pan_left"}, "10 to 12 in whole pixels"
    assert camera_types(start, near, SIDE, SIDE, "strict") == {"static"}


@pytest.mark.parametrize(("height", "width"), [(384, 512), (480, 832), (128, 128)])
def test_points_begin_in_the_middles_of_the_edges_of_the_trackers_grid(height, width):
    grid = np.array([[(8 + j * 496 / 9, 8 + i * 368 / 9) for j in range(10)] for i in range(10)])
    grid *= np.array([(width - 1) / 511, (height - 1) / 383])
    expected = np.stack([grid[0, 5], grid[9, 5], grid[5, 0], grid[5, 9]])
    assert np.abs(edge_points(height, width).numpy() - expected).max() < 1e-9
    strict = edge_points(height, width, "strict").numpy()
    assert np.abs(strict[:2, 0] - 512 / 2 * (width - 1) / 511).max() < 1e-9
    assert np.abs(strict[2:, 1] - 384 / 2 * (height - 1) / 383).max() < 1e-9
    assert np.abs(strict[[0, 1], 1] - expected[[0, 1], 1]).max() < 1e-9


def test_points_follow_the_flow_between_its_pixels_and_beyond_the_frame():
    height, width = 24, 32
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    flow = torch.stack([0.25 * x + 2, -0.5 * y]).float()  # linear, so that bilinear reading is exact
    points = torch.tensor([[3.5, 7.25], [0.0, 0.0], [27.0, 15.0]]).double()
    left, top = 2, 3
    expected = points + torch.stack([0.25 * (points[:, 0] + left) + 2, -0.5 * (points[:, 1] + top)], 1)
    torch.testing.assert_close(advance(points, flow, (left, top)), expected)
    outside = torch.tensor([[-50.0, 500.0]]).double()
    torch.testing.assert_close(advance(outside, flow), outside + torch.tensor([[2.0, -0.5 * (height - 1)]]).double())


def test_the_asked_motion_is_read_off_the_prompt():
    assert asked_type("a boat on a lake, camera pans left") == "pan_left"
    assert asked_type("camera tilts up, camera pans left") == "pan_left", "in the order of the table"
    with pytest.raises(ValueError, match="asks for pan_left and tilt_up"):
        asked_type("camera tilts up, camera pans left", "strict")
    assert asked_type("Camera Static", "strict") == "static"
    for prompt, rules in (("Camera static", "compat"), ("a camera", "compat"), ("", "strict")):
        with pytest.raises(ValueError, match="asks for no camera motion"):
            asked_type(prompt, rules)


@needs(VBENCH_I2V)
def test_the_suite_asks_for_each_motion_as_often():
    rows = [row for row in json.loads(VBENCH_I2V.read_text("utf-8")) if "camera_motion" in row["dimension"]]
    for rules in ("compat", "strict"):
        asked = [asked_type(row["prompt_en"], rules) for row in rows]
        assert {kind: asked.count(kind) for kind in TYPES.values()} == dict.fromkeys(TYPES.values(), 109)
