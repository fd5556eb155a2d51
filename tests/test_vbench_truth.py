"""VBench's dimensions on clips of the shapes world whose fault is known exactly: what must hold without training."""

import dino_kit
import numpy as np
import pytest
import torch

from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch
from mmalign.protocols.correlations import spearman
from mmalign.shapes.clip_data import drawn_clips
from mmalign.shapes.damage import damage, film

SIDE = 48
AMOUNTS = np.linspace(0, 1, 8)


def standing():
    """A clip in which nothing moves."""
    drawn = drawn_clips(200, 3, held_out=True, side=SIDE)
    return next(each for each in drawn if all(mover.direction is None for mover in each.caption.movers))


def spoilt(kind, amount, item=None, seed=0):
    """uint8 [T, 3, SIDE, SIDE]; one seed draws the same places and times for every amount."""
    scene = (item or standing()).scene
    clip = damage(film(scene, side=SIDE), kind, float(amount), np.random.default_rng(seed)).draw()
    return torch.from_numpy(clip).permute(0, 3, 1, 2)


def flickering(*clips):
    return load_evaluator("temporal_flickering", {}, "cpu").score(Batch(frames=list(clips), prompts=[""] * len(clips)))


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dino")
    dino_kit.dino_file(folder)
    evaluator = load_evaluator("subject_consistency", {"checkpoint": folder}, "cpu")
    return lambda *clips: evaluator.score(Batch(frames=list(clips), prompts=[""] * len(clips)))["score"]


def test_flicker_lowers_the_score_by_exactly_the_light_that_comes_and_goes():
    """In a still clip the factors are the damage's own draws: the change of a pair is the picture's mean light."""
    clip, amount = spoilt("flicker", 0).double(), 0.7
    rng = np.random.default_rng(0)
    factors = 1 - 0.4 * amount * np.random.default_rng(int(rng.integers(2**32))).random(len(clip))
    changes = np.abs(np.diff(factors)).mean() * float(clip[0].mean())
    (found,) = flickering(spoilt("flicker", amount)).tolist()
    assert changes > 1  # a level of 255 and more, or the rounding of pixels would pass for it
    assert found == pytest.approx(1 - changes / 255, abs=0.5 / 255)  # pixels are rounded


def test_the_more_flicker_the_lower_in_every_step():
    found = flickering(*(spoilt("flicker", amount) for amount in AMOUNTS)).tolist()
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert spearman(AMOUNTS, np.array(found)).value == pytest.approx(-1)


def test_what_does_not_change_from_frame_to_frame_does_not_flicker():
    still = spoilt("blur", 1.0)
    assert not torch.equal(still, spoilt("blur", 0))
    assert flickering(still).tolist() == [1.0]
    assert flickering(spoilt("noise", 1.0)).item() < 0.95


def test_identical_frames_are_one_subject(subject):
    assert subject(spoilt("swap", 0), spoilt("blur", 1.0)).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


@pytest.mark.parametrize("kind", ["swap", "vanish"])
def test_a_subject_that_is_lost_lowers_its_consistency(subject, kind):
    whole, lost = subject(spoilt(kind, 0), spoilt(kind, 1.0)).tolist()
    assert not torch.equal(spoilt(kind, 0), spoilt(kind, 1.0))
    assert lost < whole - 1e-4


def test_a_swap_counts_by_how_many_frames_it_lasts(subject):
    """Each swapped frame is as far from the first as every other, and one pair of neighbours differs."""
    clips = [spoilt("swap", amount) for amount in (0, 0.25, 0.5, 0.75, 1.0)]
    lasting = [sum(not torch.equal(frame, clip[0]) for frame in clip) for clip in clips]
    assert lasting == [0, 1, 2, 3, 4]
    losses = (1 - subject(*clips)).double().numpy()
    pairs = len(clips[0]) - 1
    per_frame = losses[1] * pairs / 2  # its likeness to the frame before and to the first: halves of one pair
    assert losses[1:] * pairs == pytest.approx([per_frame * (n + 1) for n in (1, 2, 3, 4)], rel=1e-3)
