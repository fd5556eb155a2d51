"""imaging_quality: MUSIQ's published layout, its values in float64, VBench's resizing, and the contract."""

import json

import musiq_reference as reference
import numpy as np
import pytest
import torch
from musiq_reference import TINY, published, random_state
from safetensors.torch import save_file
from torchvision.transforms import functional

from mmalign.backbones.musiq import Musiq, MusiqConfig, check_fits, hashed, load_musiq, scaled
from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import Batch, ItemErrors
from mmalign.known_weights import KNOWN
from mmalign.testing import check_evaluator
from mmalign.vbench.imaging import prepare, target
from mmalign.weights_verify import verify

NAME = "imaging_quality"
FILE = "musiq_spaq_ckpt-358bb6af.pth"
SHAPES = [(70, 45), (33, 200), (300, 250), (2, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("musiq")
    torch.save(random_state(), path / FILE)
    return path


@pytest.fixture(scope="module")
def musiq(folder):
    return load_musiq(checkpoint=folder / FILE, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def evaluator(folder):
    return load_evaluator(NAME, {"checkpoint": folder}, "cpu")


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------- the network


def test_full_size_has_the_published_names_and_shapes(tmp_path):
    with torch.device("meta"):
        model = Musiq(MusiqConfig())
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == published()
    assert len(found) == 1 + 2 + 12 + 2 + 5 + 14 * 16 + 2
    state = {name: torch.empty(shape, device="meta") for name, shape in published().items()}
    assert MusiqConfig.of(state) == MusiqConfig()
    check_fits(state, tmp_path / FILE)


def test_sizes_are_read_from_the_tensors(musiq):
    assert musiq.config == TINY
    assert {name: tuple(value.shape) for name, value in musiq.state_dict().items()} == published(TINY)


@pytest.mark.parametrize("shape", SHAPES)
def test_ratings_equal_independent_float64(musiq, shape):
    image = noise(3, *shape, seed=shape[0]).float() / 255
    expected = reference.rate(image.numpy(), random_state())
    double = Musiq(TINY).double().requires_grad_(False)
    double.load_state_dict(random_state())
    assert float(double(image[None])) == pytest.approx(expected, abs=2e-6)  # the resizing is float32 in both precisions
    assert float(musiq(image[None])) == pytest.approx(expected, abs=2e-5)


def test_the_cases_tell_something(musiq):
    """Ratings of the cases differ by far more than the tolerance, and each scale counts."""
    images = [noise(1, 3, *shape, seed=shape[0]).float() / 255 for shape in SHAPES]
    ratings = [float(musiq(image)) for image in images]
    assert min(np.diff(sorted(ratings))) > 1e-3
    image = images[2]
    blurred = torch.nn.functional.avg_pool2d(image, 3, 1, 1)  # which the smallest copy hardly sees
    assert abs(float(musiq(image) - musiq(blurred))) > 1e-2


def test_places_are_cells_of_a_stretched_grid():
    for side, count in ((32, 1), (33, 2), (320, 10), (500, 16), (1920, 60)):
        rows = hashed(side, 1, 10)
        assert rows.tolist() == [i * 10 // count * 10 for i in range(count)]
        assert hashed(1, side, 10).tolist() == [i * 10 // count for i in range(count)]
    assert hashed(64, 96, 10).tolist() == [0, 3, 6, 50, 53, 56]


def test_copies_are_rounded_half_to_even_and_counted():
    assert scaled(512, 288) == [(224, 126), (384, 216)]
    assert scaled(448, 5) == [(224, 2), (384, 4)]  # 2.5 and 4.29
    assert scaled(64, 64) == [(224, 224), (384, 384)]
    assert Musiq.count(288, 512) == 4 * 7 + 7 * 12 + 9 * 16
    with pytest.raises(ValueError, match=r"3000 x 4 has no pixels left across.*crop it"):
        scaled(4, 3000)


def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path):
    state = random_state()
    state["head.0.weight"] = state.pop("head.weight")  # as the weights of AVA have it, with ten outputs
    torch.save(state, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"1 missing: head\.weight; 1 unexpected: head\.0\.weight"):
        load_evaluator(NAME, {"checkpoint": tmp_path}, "cpu")
    state = {name: torch.empty(shape, device="meta") for name, shape in published().items()}
    state["transformer_encoder.transformer.encoderblock_9.mlp.fc1.weight"] = torch.empty(3, 384, device="meta")
    with pytest.raises(ValueError, match=r"1 of the wrong shape: .*encoderblock_9\.mlp\.fc1\.weight is \[3, 384\]"):
        check_fits(state, tmp_path / FILE)
    state["embedding.weight"] = torch.empty(385, 16384, device="meta")
    with pytest.raises(ValueError, match=r"musiq_spaq.*multiples of 6.*got 64, 256 and 385"):
        check_fits(state, tmp_path / FILE)


def test_known_weights_name_the_file(folder, tmp_path):
    entry = KNOWN["musiq-spaq"]
    assert entry.files[0] == FILE and entry.repo == "chaofengc/IQA-PyTorch-Weights"
    assert evaluator_class(NAME).licence == entry.licence
    assert dict((what, right) for what, right, _ in verify("musiq-spaq", folder))["names and shapes"]
    with pytest.raises(ValueError, match=r"musiq_spaq_ckpt-358bb6af\.pth"):
        load_evaluator(NAME, {"checkpoint": tmp_path}, "cpu")


# ---------------------------------------------------------------------------------------------- what VBench does to it


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [
        ((720, 1280), "longer", (288, 512)),
        ((1280, 720), "longer", (512, 288)),
        ((480, 720), "longer", (341, 512)),  # 341.33
        ((512, 300), "longer", (512, 300)),
        ((561, 561), "longer", (511, 511)),  # 512 / 561 * 561 is below 512 in floating point
        ((720, 1280), "shorter", (512, 910)),  # 910.2
        ((400, 1280), "shorter", (400, 1280)),
        ((720, 1280), "shorter_centercrop", (512, 910)),
        ((720, 1280), "None", (720, 1280)),
    ],
)
def test_sides_are_those_of_the_reference(size, mode, expected):
    assert target(*size, mode) == expected


def test_strict_rules_round_sides():
    assert target(561, 561, "longer", True) == (512, 512)
    assert target(480, 720, "longer", True) == (341, 512)
    assert target(700, 1000, "shorter", True) == (512, 731)  # 731.4
    off = [side for side in range(513, 8193) if target(side, side, "longer") != (512, 512)]
    assert len(off) == 1069 and off[:3] == [561, 569, 644], "what the docstring says"
    assert all(target(side, side, "longer", True) == (512, 512) for side in off)
    with pytest.raises(ValueError, match="2000 x 1 has no pixels left across at 512"):
        target(1, 2000, "longer")


def test_frames_are_resized_bilinearly_without_a_filter():
    frames = noise(2, 3, 60, 1025)
    found = prepare(frames)
    assert found.shape == (2, 3, 29, 512) and found.dtype == torch.float32
    for frame, values in zip(frames, found, strict=True):
        expected = reference.resize(frame.double().numpy(), (29, 512), cubic=False) / 255
        np.testing.assert_allclose(values.numpy(), expected, atol=1e-5)
    small = noise(1, 3, 40, 50)
    assert torch.equal(prepare(small), small.float() / 255)
    wide = noise(1, 3, 600, 1000)
    cropped = prepare(wide, "shorter_centercrop")
    resized = prepare(wide, "shorter")
    assert resized.shape[-2:] == (512, 853)
    assert torch.equal(cropped, resized[..., 170:682])  # 170.5, rounded half to even
    assert torch.equal(prepare(wide, "None"), wide.float() / 255)


@pytest.mark.parametrize("size", [(600, 1000), (561, 700), (700, 561), (513, 514)])
def test_frames_are_those_that_torchvision_makes(size):
    """Which the reference uses; 561 becomes 511, and the crop then adds a row or column of zeros."""
    frames = noise(1, 3, *size)
    for mode in ("longer", "shorter"):
        expected = functional.resize(frames.float(), list(target(*size, mode)), antialias=False) / 255
        assert torch.equal(prepare(frames, mode), expected)
    shorter = functional.resize(frames.float(), list(target(*size, "shorter")), antialias=False)
    expected = functional.center_crop(shorter, 512)
    assert torch.equal(prepare(frames, "shorter_centercrop"), expected / 255)


def test_a_clip_has_the_mean_of_its_frames(evaluator, musiq):
    clip = noise(5, 3, 40, 530)
    ratings = [float(musiq(prepare(frame[None]))) for frame in clip]
    found = evaluator.score(Batch(frames=[clip], prompts=["x"]))
    assert float(found) == pytest.approx(np.mean(ratings), abs=1e-5)
    assert np.ptp(ratings) > 1e-4
    scaled_up = evaluator.score(Batch(frames=[clip[:1].expand(4, -1, -1, -1)], prompts=["x"]))
    assert float(scaled_up) == pytest.approx(ratings[0], abs=1e-5), "identical frames rate as one"


def test_passes_of_any_length_give_the_same(evaluator):
    clip = noise(7, 3, 50, 60, seed=3)
    whole = evaluator._rate(clip, 7)
    for number in (1, 3):
        torch.testing.assert_close(evaluator._rate(clip, number), whole, rtol=0, atol=1e-5)
    assert evaluator._per_pass(noise(1, 3, 288, 512)) == 4096 // 256
    assert load_evaluator(NAME, {"checkpoint": evaluator.params.checkpoint, "mode": "None"}, "cpu")._per_pass(
        torch.empty(1, 3, 4320, 7680)
    ) == 1  # fmt: skip


def test_modes_and_rules_change_what_they_say(folder):
    clip = noise(1, 3, 520, 561)
    batch = Batch(frames=[clip], prompts=["x"])
    rated = {
        (mode, rules): float(
            load_evaluator(NAME, {"checkpoint": folder, "mode": mode, "rules": rules}, "cpu").score(batch)
        )
        for mode, rules in (("longer", "compat"), ("longer", "strict"), ("shorter", "compat"), ("None", "compat"))
    }
    assert len({round(value, 6) for value in rated.values()}) == 4


def test_float_frames_rate_as_bytes_do_and_pass_a_gradient(evaluator):
    frames = noise(2, 3, 30, 600)
    pixels = (frames.float() / 255).requires_grad_(True)
    found = evaluator.score_tensor(pixels, ["a", "b"])
    expected = evaluator.score(Batch(frames=[frame[None] for frame in frames], prompts=["a", "b"]))
    torch.testing.assert_close(found.detach().double(), expected, rtol=0, atol=2e-5)
    (gradient,) = torch.autograd.grad(found[0], pixels)
    assert bool(gradient[0].any()) and not bool(gradient[1].any())


def test_a_frame_that_is_too_narrow_is_one_items_error(evaluator):
    batch = Batch(frames=[noise(1, 3, 40, 40), noise(1, 3, 1, 500)], prompts=["a", "b"])
    with pytest.raises(ItemErrors, match="no pixels left across") as caught:
        evaluator.score(batch)
    assert list(caught.value.errors) == [1]
    expected = evaluator.score(Batch(frames=batch.frames[:1], prompts=["a"]))
    torch.testing.assert_close(caught.value.scores[:1], expected)


def test_halves_are_close(folder, evaluator):
    batch = Batch(frames=[noise(2, 3, 64, 80)], prompts=["x"])
    half = load_evaluator(NAME, {"checkpoint": folder}, "cpu", "bfloat16").score(batch)
    assert float(half) == pytest.approx(float(evaluator.score(batch)), abs=0.05)


def test_safetensors_is_read_too(tmp_path, evaluator):
    save_file(random_state(), tmp_path / "musiq_spaq_ckpt-358bb6af.safetensors")
    batch = Batch(frames=[noise(1, 3, 40, 60)], prompts=["x"])
    assert torch.equal(load_evaluator(NAME, {"checkpoint": tmp_path}, "cpu").score(batch), evaluator.score(batch))


def test_imaging_quality_keeps_the_contract(folder):
    check_evaluator(NAME, {"checkpoint": folder}, tolerance=2e-5)


def test_its_parameters_are_read_as_words():
    params = evaluator_class(NAME).Params(**json.loads('{"mode": "None"}'))
    assert params.mode == "None" and params.rules == "compat"
