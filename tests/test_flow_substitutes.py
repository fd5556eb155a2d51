"""camera_motion@flow and motion_smoothness@flow: on flows that are told, and through the network."""

import numpy as np
import pytest
import torch
from raft_kit import Told, bright_file, flat, raft_file, shifted
from test_raft import noise

from mmalign.backbones.raft_clips import clip_motion, middle_frames
from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import AllFrames, Batch, ItemErrors, StrideFps
from mmalign.vbench.camera import TYPES, edge_points

STILL, FRAMES = torch.zeros(2, 1, 1), 5


def field(kind, step=4.0):
    """What a camera's motion does to the picture, as a function of the pair: the flow of a padded frame."""

    def flow(first, second, height, width):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        outwards = torch.stack([x - (width - 1) / 2, y - (height - 1) / 2]) / (height / 2)
        way = (second - first) * step
        return (
            way
            * {
                "pan_left": torch.tensor([1.0, 0]).view(2, 1, 1),
                "pan_right": torch.tensor([-1.0, 0]).view(2, 1, 1),
                "tilt_up": torch.tensor([0, 1.0]).view(2, 1, 1),
                "tilt_down": torch.tensor([0, -1.0]).view(2, 1, 1),
                "zoom_in": outwards,
                "zoom_out": -outwards,
                "static": STILL,
            }[kind]
        )

    return flow


def scorer(name, folder, flow=None, **params):
    """An evaluator on a real file; with `flow` that in the place of its network."""
    found = load_evaluator(name, {"checkpoint": raft_file(folder), **params}, "cpu")
    if flow is not None:
        found.raft = Told(flow)
    return found


# The published "middles" lie right of and below the middle, so that a large zoom carries them along.
BESIDE = {"zoom_in": ("pan_left", "tilt_up"), "zoom_out": ("pan_right", "tilt_down")}


@pytest.mark.parametrize("rules", ["compat", "strict"])
@pytest.mark.parametrize("kind", list(TYPES.values()))
def test_every_motion_of_the_camera_is_told_from_its_flow(tmp_path, kind, rules):
    clip = noise(FRAMES, 131, 150)
    asked = [f"a lake, {phrase}" for phrase in TYPES]
    camera = scorer("camera_motion@flow", tmp_path, field(kind), rules=rules)
    found = camera.score(Batch(frames=[clip] * len(asked), prompts=asked))
    told = {kind} if rules == "strict" else {kind, *BESIDE.get(kind, ())}
    assert found["score"].tolist() == [float(each in told) for each in TYPES.values()]
    assert found["types"].tolist() == [len(told)] * len(asked)
    assert camera.raft.asked == [(t, t + 1) for t in range(FRAMES - 1)] * len(asked)


def test_points_are_chained_from_frame_to_frame(tmp_path):
    """A flow that depends on place and time, followed by hand; a point that leaves the frame takes its edge's flow."""
    height, width = 120, 133  # padded by 0 and by 1 and 2
    left = 1

    def flow(first, second, padded_height, padded_width):
        y, x = torch.meshgrid(torch.arange(padded_height), torch.arange(padded_width), indexing="ij")
        return torch.stack([0.1 * (x - left) + first, -0.2 * y - 3.0])

    found = clip_motion(Told(flow, part=2), noise(6, height, width), "compat")
    points = edge_points(height, width).numpy()
    assert np.array_equal(found.start.numpy(), points)
    for time in range(5):
        x = np.clip(points[:, 0], -left, 135 - left)
        y = np.clip(points[:, 1], 0, 119)
        points = points + np.stack([0.1 * x + time, -0.2 * y - 3.0], 1)
    assert (points[:, 1] < 0).any() and (points[:, 0] > width).any(), "some points have to leave"
    assert np.abs(found.end.numpy() - points).max() < 1e-4
    assert found.speeds.shape == (5,)


def test_the_camera_of_a_real_network_follows_its_flow(tmp_path):
    """White frames flow to the right in this network: the camera pans to the left; dark ones do not flow."""
    camera = load_evaluator("camera_motion@flow", {"checkpoint": bright_file(tmp_path)}, "cpu")
    clips = [flat([255] * 3), flat([20] * 3), flat([255] * 3)]
    prompts = ["camera pans left", "camera static", "camera pans right"]
    assert camera.score(Batch(frames=clips, prompts=prompts))["score"].tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", ["camera_motion@flow", "motion_smoothness@flow"])
def test_a_clip_is_scored_by_itself(tmp_path, name):
    found = scorer(name, tmp_path)
    clips = [noise(3, 64 + 8 * place, 70, seed=place) for place in range(8)]
    prompts = [*TYPES, "camera static"]
    together = found.score(Batch(frames=clips, prompts=prompts))
    alone = [found.score(Batch(frames=[clip], prompts=[text])) for clip, text in zip(clips, prompts, strict=True)]
    for key, values in together.items():
        assert torch.equal(values, torch.cat([each[key] for each in alone]))
    backwards = found.score(Batch(frames=clips[::-1], prompts=prompts[::-1]))
    assert torch.equal(backwards["score"].flip(0), together["score"])


def test_what_cannot_be_scored_is_said_and_the_others_are_scored(tmp_path):
    camera = scorer("camera_motion@flow", tmp_path, field("static"))
    batch = Batch(frames=[noise(1, 64, 64), *[noise(2, 64, 64)] * 2], prompts=["camera static"] * 2 + ["a lake"])
    with pytest.raises(ItemErrors) as caught:
        camera.score(batch)
    assert {place: str(error)[:9] for place, error in caught.value.errors.items()} == {0: "one frame", 2: "the promp"}
    assert float(caught.value.scores["score"][1]) == 1.0
    smooth = scorer("motion_smoothness@flow", tmp_path, field("static"))
    with pytest.raises(ItemErrors, match="fewer than 3 frames") as caught:
        smooth.score(Batch(frames=[noise(2, 64, 64), flat([7] * 3, 64)]))
    assert list(caught.value.errors) == [0] and float(caught.value.scores["score"][1]) == 1.0


def test_substitutes_are_named_as_such():
    for name, plan in (("camera_motion@flow", StrideFps(8)), ("motion_smoothness@flow", AllFrames())):
        cls = evaluator_class(name)
        assert cls.frames == plan and cls.modality == {"video"}


# ------------------------------------------------------------------------------------------------------- smoothness


@pytest.mark.parametrize("step", [(3, 2), (-2, 1), (0, 0)])
def test_the_middle_of_a_steady_motion_is_the_frame_itself(step):
    clip = shifted(3, step, side=96)

    def flow(first, second, height, width):
        return (second - first) * torch.tensor(step).view(2, 1, 1)

    told = Told(flow, part=1)
    ((place, middle),) = middle_frames(told, clip, [(0, 2)])
    assert place == 0 and told.asked == [(0, 2), (2, 0)]
    inner = (slice(None), slice(8, -8), slice(8, -8))
    assert (middle[inner] - clip[1][inner].float()).abs().max() < 1e-2


def test_a_frame_is_warped_between_its_pixels_and_its_edges_go_on():
    """One row by hand: forward flow 2, backward flow -1 give -(2 + 1) / 4 from the middle to the first frame."""
    clip = torch.zeros(2, 3, 16, 24, dtype=torch.uint8)
    clip[0, :], clip[1, :] = torch.arange(24, dtype=torch.uint8) * 4, 40
    told = Told(lambda first, second, *_: torch.tensor([2.0 if second > first else -1.0, 0]).view(2, 1, 1))
    ((_, middle),) = middle_frames(told, clip, [(0, 1)])
    expected = (np.clip(np.arange(24) - 0.75, 0, 23) * 4 + 40) / 2
    assert np.abs(middle[1, 5].numpy() - expected).max() < 1e-3


@pytest.mark.parametrize(("frames", "compat", "strict"), [(3, 1, 1), (4, 1, 2), (5, 2, 3), (6, 2, 4), (7, 3, 5)])
def test_every_second_frame_is_predicted_or_every_one(tmp_path, frames, compat, strict):
    """Without flow a prediction is the mean of its neighbours; levels are 5 t^2, whose middle is 5 too high."""
    clip = flat([5 * t * t for t in range(frames)], 64)
    for rules, pairs in (("compat", compat), ("strict", strict)):
        found = scorer("motion_smoothness@flow", tmp_path, field("static"), rules=rules).score(Batch(frames=[clip]))
        assert found["pairs"].tolist() == [pairs]
        assert found["score"].tolist() == [pytest.approx(1 - 5 / 255)]


def test_fractions_are_cut_off_or_rounded(tmp_path):
    clip = flat([10, 20, 11], 64)  # 10.5: 10 or, to even, 10 as well; 13.5 below: 13 or 14
    other = flat([13, 20, 14], 64)
    for rules, expected in (("compat", (10, 7)), ("strict", (10, 6))):
        found = scorer("motion_smoothness@flow", tmp_path, field("static"), rules=rules)
        differences = (1 - found.score(Batch(frames=[clip, other]))["score"]) * 255
        assert differences.tolist() == pytest.approx(list(expected), abs=1e-6)


def test_identical_frames_and_steady_motion_are_smooth_and_jumps_are_not(tmp_path):
    def measured(clip, step=(0, 0)):
        told = lambda first, second, *_: (second - first) * torch.tensor(step).float().view(2, 1, 1)  # noqa: E731
        return float(scorer("motion_smoothness@flow", tmp_path, told).score(Batch(frames=[clip]))["score"])

    assert measured(noise(1, 64, 64).repeat(5, 1, 1, 1)) == 1.0
    steady = shifted(7, (2, 0))
    jumping = steady[[0, 3, 2, 5, 4, 6, 6]]
    assert measured(steady, (2, 0)) > 0.995 > measured(steady) > measured(jumping, (2, 0))
    assert measured(flat([0, 255, 0, 255, 0], 64)) == 0.0
