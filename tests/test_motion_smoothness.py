"""motion_smoothness: AMT's published layout, its values in float64, VBench's counting of frames, and the contract."""

import amt_reference as reference
import numpy as np
import pytest
import torch
from amt_reference import TINY, blending, published, random_state
from media_kit import moving

from mmalign.backbones.amt import Amt, AmtConfig, build_amt, check_fits, load_amt
from mmalign.backbones.amt_flow import VOLUME, Correlations, pixels, warp
from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import Batch, ItemErrors
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.known_weights import KNOWN
from mmalign.media import write_video
from mmalign.pixel_scores import PixelScorer
from mmalign.results import read_results
from mmalign.score import run
from mmalign.vbench.smoothness import differences, levels, margins, pairs, smoothness, surround
from mmalign.weights_verify import verify

NAME, FILE = "motion_smoothness", "amt-s.pth"
CPU = torch.device("cpu")


def saved(folder, state):
    """As the authors save it, beside what training leaves."""
    torch.save({"state_dict": state, "epoch": 299}, folder / FILE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("amt"), random_state())


@pytest.fixture(scope="module")
def amt(folder):
    return load_amt(checkpoint=folder / FILE, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def evaluator(folder):
    return load_evaluator(NAME, {"checkpoint": folder}, "cpu")


@pytest.fixture(scope="module")
def blend(tmp_path_factory):
    """Evaluators whose network draws the mean of two frames, by rules."""
    folder = saved(tmp_path_factory.mktemp("blend"), blending(random_state()))
    return {
        rules: load_evaluator(NAME, {"checkpoint": folder, "rules": rules}, "cpu") for rules in ("compat", "strict")
    }


def scored(evaluator, *clips):
    return evaluator.score(Batch(frames=list(clips), prompts=["x"] * len(clips)))


def pair(height=64, width=80, seed=1):
    """Two smooth pictures [3, H, W] in [0, 1]."""
    noise = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(noise, 5, 1, 2)


# ------------------------------------------------------------------------------------------------------- the network


def test_full_size_has_the_published_names_and_shapes(tmp_path):
    with torch.device("meta"):
        model = Amt(AmtConfig())
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == published()
    assert sum(value.numel() for value in model.parameters()) == 2_990_543  # 3.0 million in the paper's table
    state = {name: torch.empty(shape, device="meta") for name, shape in published().items()}
    assert AmtConfig.of(state) == AmtConfig()
    check_fits(state, tmp_path / FILE)


def test_sizes_are_read_from_the_tensors(amt):
    assert amt.config == TINY
    other = AmtConfig(channels=(5, 6, 7, 8), skip=3, flows=4, trunk=(4, 8, 8), features=6, radius=1)
    assert AmtConfig.of(build_amt(other).state_dict()) == other


def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path):
    state = random_state()
    state["update4.convc2.weight"] = state.pop("update4.convf2.weight")  # the larger AMT has another convolution
    saved(tmp_path, state)
    with pytest.raises(ValueError, match=r"1 missing: update4\.convf2\.weight; 1 unexpected: update4\.convc2\.weight"):
        load_evaluator(NAME, {"checkpoint": tmp_path}, "cpu")
    meta = {name: torch.empty(shape, device="meta") for name, shape in published().items()}
    wrong = {**meta, "update2.flow_head.2.bias": torch.empty(6, device="meta")}
    with pytest.raises(ValueError, match=r"update2\.flow_head\.2\.bias is \[6\] and has to be \[4\]"):
        check_fits(wrong, tmp_path / FILE)
    wrong = {**meta, "decoder4.convblock.1.conv2.0.weight": torch.empty(112, 20, 3, 3, device="meta")}
    with pytest.raises(ValueError, match=r"amt-s\.pth: AMT's skip has to be below the decoders' width, 60; got 112"):
        check_fits(wrong, tmp_path / FILE)


@pytest.mark.parametrize("size", [(64, 80), (96, 64)])
def test_drawn_frames_equal_independent_float64(amt, size):
    first, second = pair(*size)
    flows = {}
    expected = reference.interpolate(first, second, random_state(), told=flows)
    double = Amt(TINY).double().requires_grad_(False)
    double.load_state_dict(random_state())
    found = double(first[None].double(), second[None].double())[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(amt(first[None], second[None])[0].double(), expected, rtol=0, atol=5e-5)
    assert expected.std() > 0.05 and ((expected > 0) & (expected < 1)).double().mean() > 0.5
    assert all(flow.abs().mean() > 0.3 for flow in flows.values()), "the case tells nothing of the flow"


def test_another_moment_is_another_frame(amt):
    first, second = pair()
    expected = reference.interpolate(first, second, random_state(), time=0.25)
    found = amt(first[None], second[None], time=0.25)[0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-5)
    assert (found - amt(first[None], second[None])[0]).abs().max() > 0.01


def test_pairs_do_not_see_each_other(amt):
    frames = torch.cat([pair(seed=1), pair(seed=2), pair(seed=3)])
    together = amt(frames[:-1], frames[1:])
    alone = torch.cat([amt(frames[i : i + 1], frames[i + 1 : i + 2]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


def test_a_frames_features_depend_on_its_neighbour(amt):
    """Why nothing is computed once for the two pairs of a frame: the pair's mean is taken off before the encoders."""
    first, second = pair()
    one, other = ((first - (first + far).mean() / 2)[None] for far in (second, 0.5 * second))
    assert (amt.feat_encoder(one) - amt.feat_encoder(other)).abs().max() > 1e-3
    assert (amt.encoder(one)[0] - amt.encoder(other)[0]).abs().max() > 1e-2


def test_other_sizes_are_refused(amt):
    for shape, other in (((64, 72), (64, 72)), ((48, 64), (48, 64)), ((64, 64), (64, 80))):
        with pytest.raises(ValueError, match="multiples of 16 from 64 on"):
            amt(torch.zeros(1, 3, *shape), torch.zeros(1, 3, *other))


# ------------------------------------------------------------------------------------------- flow and correlations


def test_a_warp_by_whole_pixels_shifts_and_repeats_the_edge():
    image = torch.rand(1, 2, 6, 9, dtype=torch.float64)
    flow = torch.zeros(1, 2, 6, 9, dtype=torch.float64)
    flow[:, 0], flow[:, 1] = 2, -1
    found = warp(image, flow)
    rows, columns = (torch.arange(6) - 1).clamp(0, 5), (torch.arange(9) + 2).clamp(0, 8)
    torch.testing.assert_close(found[0], image[0][:, rows][:, :, columns])
    torch.testing.assert_close(found[0], reference.warp(image[0], flow[0]))


@pytest.mark.parametrize("size", [(8, 8), (9, 11), (16, 8)])
def test_windows_equal_those_of_the_whole_volume(size):
    generator = torch.Generator().manual_seed(4)
    first, second = torch.randn(2, 2, 5, *size, generator=generator, dtype=torch.float64)
    places = [pixels(first) + 3 * torch.randn(2, 2, *size, generator=generator, dtype=torch.float64)] * 2
    expected = []
    for a, b, near, far in zip(first, second, places[0], places[1], strict=True):
        sides = ((reference.volume(a, b), near), (reference.volume(b, a), far))
        expected.append(torch.cat([reference.look(scales, where.numpy()) for scales, where in sides]))
    kept = Correlations(first, second, radius=3, levels=4)
    found = kept.look(*places)
    torch.testing.assert_close(found, torch.stack(expected))
    assert kept.kept[0] is not None
    for limit in (1, 1000, 7000):
        parts = Correlations(first, second, radius=3, levels=4, limit=limit)
        assert parts.kept == [None, None]
        torch.testing.assert_close(parts.look(*places), found)


def test_the_memory_bound_does_not_change_the_frame(amt):
    first, second = (frame[None] for frame in pair())
    torch.testing.assert_close(amt(first, second, limit=500), amt(first, second), rtol=0, atol=2e-5)


# --------------------------------------------------------------------------------------- what VBench makes of frames


def test_margins_are_even_with_the_odd_one_at_the_end():
    assert margins(720, 1280, 16) == (0, 0, 0, 0)
    assert margins(50, 67, 16) == (6, 7, 7, 7)  # to 80 x 64
    assert margins(49, 480, 16, 64) == (0, 0, 7, 8)
    with pytest.raises(ValueError, match=r"sides are 49 pixels or more, and these are 100 x 48"):
        margins(48, 100, 16, 64)
    frames = torch.rand(2, 3, 50, 67)
    expected = np.pad(frames.numpy(), ((0, 0), (0, 0), (7, 7), (6, 7)), mode="edge")
    np.testing.assert_array_equal(surround(frames, margins(50, 67, 16)).numpy(), expected)


def test_levels_are_cut_as_a_cast_does_and_rounded_by_strict_rules():
    values = torch.tensor([0.0, 0.999 / 255, 1 / 255, 127.5 / 255, 254.9999 / 255, 1.0])
    expected = (values * 255).numpy().clip(0, 255).astype(np.uint8)
    assert levels(values).tolist() == expected.tolist()
    assert levels(values, strict=True).tolist() == [0, 1, 1, 128, 255, 255]
    leaf = values.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(levels(leaf).sum(), leaf)
    assert gradient.tolist() == [255] * 6


def test_the_formula():
    drawn, shown = torch.zeros(3, 3, 4, 5), torch.zeros(3, 3, 4, 5)
    shown[1], shown[2, 0] = 255, 51
    found = differences(drawn, shown)
    assert found.tolist() == [0, 255, 17]
    assert float(smoothness(found)) == pytest.approx(1 - (255 + 17) / 3 / 255)
    assert [pairs(frames) for frames in (3, 4, 5, 6, 81)] == [1, 1, 2, 2, 40]


@pytest.mark.parametrize("frames", [3, 6])
def test_scores_equal_the_pipeline_in_float64(evaluator, frames):
    """Padding, pairs, the network, the cut, the mean: all written out, on a size that is no multiple of 16."""
    clip = moving(frames, 50, 67)
    found = []
    for k in range((frames - 1) // 2):
        left, right = (
            torch.from_numpy(np.pad(clip[2 * k + i].numpy(), ((0, 0), (7, 7), (6, 7)), mode="edge")) / 255.0
            for i in (0, 2)
        )
        drawn = reference.interpolate(left, right, random_state())[:, 7:-7, 6:-7]
        drawn = (drawn.numpy() * 255).clip(0, 255).astype(np.uint8).astype(int)
        found.append(np.abs(drawn - clip[2 * k + 1].numpy().astype(int)).mean())
    assert float(scored(evaluator, clip)) == pytest.approx((255 - np.mean(found)) / 255, abs=1e-5)


def test_the_last_frame_of_an_even_number_is_not_used(evaluator):
    clip = moving(6, 64, 64)
    changed = clip.clone()
    changed[5] = 0
    assert float(scored(evaluator, clip)) == float(scored(evaluator, changed)) == float(scored(evaluator, clip[:5]))
    changed = clip.clone()
    changed[3] = 0
    assert float(scored(evaluator, clip)) != float(scored(evaluator, changed))


def test_what_is_exact_where_a_network_blends(blend):
    """Identical black or white frames are foretold, alternating ones never; a ramp of brightness is but for the cut."""
    for value in (0, 255):
        still = torch.full((5, 3, 64, 64), value, dtype=torch.uint8)
        assert float(scored(blend["compat"], still)) == 1.0
        flicker = still.clone()
        flicker[1::2] = 255 - value
        assert float(scored(blend["compat"], flicker)) == 0.0
    ramp = (torch.arange(7, dtype=torch.uint8) * 11 + 5).view(7, 1, 1, 1).expand(7, 3, 64, 64)
    assert float(scored(blend["strict"], ramp)) == 1.0
    assert 1 - 1 / 255 <= float(scored(blend["compat"], ramp)) <= 1.0
    jump = ramp.clone()
    jump[3] += 20  # one of three drawn frames is 20 levels off
    assert float(scored(blend["strict"], jump)) == pytest.approx(1 - 20 / 255 / 3, abs=1e-7)


# ------------------------------------------------------------------------------------------------------ the contract


def test_a_batch_gives_what_its_clips_give_alone(evaluator):
    clips = [moving(count, *size) for count, size in ((3, (64, 64)), (5, (50, 67)), (9, (64, 64)), (4, (113, 70)))] * 2
    together = scored(evaluator, *clips)
    assert together.shape == (8,) and bool(((together > 0) & (together < 1)).all())
    alone = torch.cat([scored(evaluator, clip) for clip in clips])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    torch.testing.assert_close(scored(evaluator, *clips[::-1]).flip(0), together, rtol=0, atol=1e-6)
    assert together[:4].unique().numel() == 4


def test_pairs_at_once_give_what_pairs_give_one_by_one(evaluator):
    clip = moving(17, 64, 80)
    together = evaluator._smoothness(clip, 8)
    for number in (1, 3):
        torch.testing.assert_close(evaluator._smoothness(clip, number), together, rtol=0, atol=1e-6)
    assert [evaluator._per_pass(torch.empty(3, 3, *size)) for size in ((720, 1280), (480, 832), (256, 256))] == [
        1,
        5,
        32,
    ]
    assert VOLUME > (720 * 1280 // 64) ** 2 * 4 // 3, "a pair of 720p is kept whole"


def test_clips_that_have_no_score_say_why(evaluator):
    good = moving(5, 64, 64)
    clips = [good, good[:2], good[:1], moving(5, 48, 100), good]
    with pytest.raises(ItemErrors) as caught:
        scored(evaluator, *clips)
    errors = {place: str(error) for place, error in caught.value.errors.items()}
    assert list(errors) == [1, 2, 3]
    assert "3 frames or more, and this one has 2" in errors[1] and "has 1" in errors[2]
    assert "49 pixels or more, and these are 100 x 48" in errors[3]
    assert torch.equal(caught.value.scores[[0, 4]], scored(evaluator, good, good))


def test_float_clips_score_as_bytes_do_and_pass_a_gradient(evaluator):
    clips = torch.stack([moving(6, 50, 67), moving(6, 50, 67).flip(0)])
    leaf = (clips.float() / 255).requires_grad_(True)
    found = evaluator.score_tensor(leaf, ["a", "b"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach().double(), scored(evaluator, *clips), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert bool(torch.isfinite(gradient).all())
    assert [bool(frame.any()) for frame in gradient[0]] == [True] * 5 + [False]
    step = leaf.detach() + 1e-3 * gradient.sign()
    assert bool((evaluator.score_tensor(step.clamp(0, 1), ["a", "b"]) > found).all()), "it does not lead upwards"
    with pytest.raises(ValueError, match=r"takes clips \[B, T, 3, H, W\]"):
        evaluator.score_tensor(leaf[0], ["a"])


def test_it_is_a_reward_of_clips_in_memory(evaluator):
    clips = torch.stack([moving(5, 64, 64), moving(5, 64, 64).flip(0)])
    scorer = PixelScorer(evaluator, NAME, fps=8.0)
    drawn = (clips.float() / 255).transpose(1, 2)  # [B, 3, F, H, W]
    expected = scored(evaluator, *clips)
    torch.testing.assert_close(scorer.named(drawn, ["x", "y"])["score"], expected)
    torch.testing.assert_close(scorer.tensor(drawn, ["x", "y"]).double(), expected, rtol=0, atol=1e-5)


def test_a_run_scores_clips_and_names_those_it_cannot(tmp_path, folder):
    for name, count in (("long", 7), ("short", 2)):
        write_video(tmp_path / f"{name}.mp4", moving(count, 64, 96), 8, lossless=True)
    (tmp_path / "t.jsonl").write_text('{"sample": "a", "media": "long.mp4"}\n{"sample": "b", "media": "short.mp4"}\n')
    spec = EvaluatorSpec(name=NAME, params={"checkpoint": str(folder)})
    out = run(ScoreConfig(table=tmp_path / "t.jsonl", output=tmp_path / "out", evaluators=(spec,), device="cpu"))
    rows = {row["sample"]: row for row in read_results(out).rows}
    assert rows["a"]["status"] == "ok" and 0 < rows["a"]["score"] < 1
    assert rows["b"]["status"] == "error" and "3 frames or more, and this one has 2" in rows["b"]["reason"]


def test_known_weights_are_fetched_by_hand_and_their_licence_is_shown(folder, tmp_path):
    entry = KNOWN["amt-s"]
    assert entry.files[0] == FILE and "forbids commercial use" in entry.by_hand
    assert evaluator_class(NAME).licence == entry.licence and "no commercial use" in entry.licence
    assert dict((what, right) for what, right, _ in verify("amt-s", folder))["names and shapes"]
    with pytest.raises(ValueError, match=r"forbids commercial use.*set `checkpoint` to the file"):
        load_evaluator(NAME, {"checkpoint": tmp_path}, "cpu")


def test_it_runs_in_float32_whatever_is_asked_for(folder, evaluator):
    clip = moving(3, 64, 64)
    half = load_evaluator(NAME, {"checkpoint": folder}, "cpu", "bfloat16")
    assert torch.equal(scored(half, clip), scored(evaluator, clip))
