"""temporal_flickering: goldens, numpy's float32 means of the reference, any chunks."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch, ItemErrors
from mmalign.testing import check_evaluator
from mmalign.vbench import consistency
from mmalign.vbench.consistency import flicker


def clip_of(frames, height=33, width=70, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)


def scores(*clips):
    return load_evaluator("temporal_flickering", {}, "cpu").score(Batch(frames=list(clips), prompts=[""] * len(clips)))


def reference(clip):
    """The order and precision of the reference: float32 images [H, W, 3], numpy's means, Python's division."""
    frames = np.ascontiguousarray(clip.permute(0, 2, 3, 1).numpy()[..., ::-1]).astype(np.float32)
    means = np.array([np.mean(np.abs(a - b)) for a, b in pairwise(frames)])
    assert means.dtype == np.float32
    return (255.0 - np.mean(means).item()) / 255.0


def test_goldens():
    still = clip_of(1).expand(5, -1, -1, -1)
    assert scores(still).tolist() == [1.0]
    black_and_white = torch.zeros(6, 3, 8, 8, dtype=torch.uint8)
    black_and_white[::2] = 255
    assert scores(black_and_white).tolist() == [0.0]
    for step in (1, 7, 50):  # constant change per frame
        ramp = (torch.arange(5) * step).to(torch.uint8)[:, None, None, None].expand(5, 3, 9, 4)
        assert scores(ramp, ramp.flip(0)).tolist() == pytest.approx([1 - step / 255] * 2, abs=1e-15)
    one_pixel = torch.zeros(2, 3, 10, 10, dtype=torch.uint8)
    one_pixel[1, 0, 4, 4] = 51
    assert scores(one_pixel).tolist() == pytest.approx([1 - 51 / 300 / 255], abs=1e-15)


def test_it_is_the_reference_to_1e_6_and_exact_in_float64():
    for frames, height, width in ((2, 1, 1), (7, 33, 70), (4, 480, 854)):
        clip = clip_of(frames, height, width)
        exact = 1 - np.abs(np.diff(clip.numpy().astype(np.float64), axis=0)).mean() / 255
        (found,) = scores(clip).tolist()
        assert found == pytest.approx(exact, abs=1e-14)
        assert found == pytest.approx(reference(clip), abs=1e-6)


def test_chunks_change_nothing(monkeypatch):
    clip = clip_of(9)
    whole = flicker(clip)
    assert clip.nbytes < consistency.CHUNK_BYTES
    for held in (1, clip[0].nbytes * 3, clip[0].nbytes * 8):
        monkeypatch.setattr(consistency, "CHUNK_BYTES", held)
        assert torch.equal(flicker(clip), whole)
        torch.testing.assert_close(flicker(clip.double() / 255), whole, rtol=0, atol=1e-12)


def test_the_gradient_is_the_sign_of_each_change():
    clip = (clip_of(3, 4, 5).float() / 255).requires_grad_(True)
    evaluator = load_evaluator("temporal_flickering", {}, "cpu")
    found = evaluator.score_tensor(clip[None], [""])
    plain = scores((clip.detach() * 255).round().to(torch.uint8))
    assert float(found.detach()) == pytest.approx(float(plain), abs=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), clip)
    change = torch.sign(clip[1:] - clip[:-1]).detach() / (2 * clip[0].numel())
    expected = torch.stack([change[0], change[1] - change[0], -change[1]])
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-8)


def test_a_clip_of_one_frame_is_an_error_of_its_own():
    with pytest.raises(ItemErrors, match="the clip has 1 frame; this compares frames") as caught:
        scores(clip_of(3), clip_of(1), clip_of(2))
    assert list(caught.value.errors) == [1]
    kept = caught.value.scores
    assert kept[[0, 2]].tolist() == scores(clip_of(3), clip_of(2)).tolist() and bool(kept[1].isnan())


def test_temporal_flickering_keeps_the_contract():
    check_evaluator("temporal_flickering")
