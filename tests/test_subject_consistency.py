"""subject_consistency and DINO: published keys, features of any size against float64, goldens, neighbours."""

import itertools
from pathlib import Path

import dino_kit
import numpy as np
import pytest
import torch
from clip_kit import meta
from dino_kit import SMALL, clip_of, dino_file, vit_keys

from mmalign.backbones.clip_scoring import Geometry
from mmalign.backbones.dino import SIDE, check_fits, resize_short
from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch, ItemErrors
from mmalign.known_weights import KNOWN
from mmalign.testing import check_evaluator
from mmalign.vbench.consistency import consistency, resemblance
from mmalign.weights import load_into

SIZES = [(240, 400), (300, 230), (224, 224), (450, 231)]


def evaluator(folder):
    return load_evaluator("subject_consistency", {"checkpoint": str(folder)}, "cpu")


def score(scorer, *clips):
    return scorer.score(Batch(frames=list(clips), prompts=[""] * len(clips)))


def short(clip):
    """DINO224 in float64: [T, 3, H, W] -> T pictures [h, w, 3] in 0 to 1; resized on 0 to 255, then divided."""
    height, width = clip.shape[-2:]
    small = min(height, width)
    new = (SIDE, int(SIDE * width / small)) if height == small else (int(SIDE * height / small), SIDE)
    pictures = clip.permute(0, 2, 3, 1).numpy().astype(np.float64)
    return [dino_kit.bilinear(picture, *new) / 255 if small != SIDE else picture / 255 for picture in pictures]


def test_dino_has_the_published_keys():
    check_fits(meta(vit_keys()), Path("dino_vitbase16_pretrain.pth"))
    assert KNOWN["dino-vitb16"].fits == ("mmalign.backbones.dino:check_fits",)
    keys = {**vit_keys(), "head.weight": (1000, 768), "norm.weight": (4,)}
    del keys["blocks.11.attn.qkv.bias"]
    said = (
        r"missing: blocks\.11\.attn\.qkv\.bias.*unexpected: head\.weight.*norm\.weight is \[4\] and has to be \[768\]"
    )
    with pytest.raises(ValueError, match=said):
        check_fits(meta(keys), Path("dino_vitbase16_pretrain.pth"))


def test_timms_dino_has_the_same_keys():
    import timm

    with torch.device("meta"):
        load_into(timm.create_model("vit_base_patch16_224.dino"), meta(vit_keys()), "DINO", assign=True)


@pytest.mark.parametrize("size", [(240, 400), (300, 230), (224, 224), (448, 112)])
def test_features_of_any_size_are_those_of_float64(tmp_path, size):
    """448 x 112 has 28 x 7 = 196 patches, as many as in training and yet other places."""
    state = dino_file(tmp_path)
    dino = evaluator(tmp_path).dino
    clip = clip_of(2, *size)
    as_it_is = Geometry.of(resize_short, antialias=False, mode="bilinear")
    found = dino.images(clip, lambda images, side: images)
    expected = [dino_kit.dino_feature(picture / 255, state) for picture in clip.permute(0, 2, 3, 1).numpy()]
    assert np.abs(found.numpy() - expected).max() < 3e-6
    resized = dino.frames([clip], as_it_is)
    expected = [dino_kit.dino_feature(picture, state) for picture in short(clip)]
    assert np.abs(resized.numpy() - expected).max() < 3e-6


def test_positions_by_size_would_be_others(tmp_path):
    """What timm does; so that the test above can tell."""
    state = dino_file(tmp_path)
    learned = np.asarray(state["pos_embed"][0], dtype=np.float64)
    ours = dino_kit.positions(learned, 14, 24, False)
    table = torch.from_numpy(learned[1:].reshape(1, 14, 14, -1)).permute(0, 3, 1, 2)
    plain = torch.nn.functional.interpolate(table, size=(14, 24), mode="bicubic")
    assert np.abs(ours[1:] - plain[0].flatten(1).T.numpy()).max() > 0.01


@pytest.mark.parametrize("size", [(240, 400), (333, 250), (1080, 1920), (100, 100), (224, 301), (100, 224)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_the_resize_is_torchvisions_on_0_to_255(size, mode):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    clip = clip_of(1, *size)
    found = resize_short(clip.float() / 255, SIDE, mode=mode)
    expected = resize(clip.float(), [SIDE], InterpolationMode(mode), antialias=False) / 255
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5
    filtered = resize(clip.float(), [SIDE], InterpolationMode(mode), antialias=True) / 255
    assert (resize_short(clip.float() / 255, SIDE, mode=mode, antialias=True) - filtered).abs().max() < 1e-5


def test_scores_are_those_of_float64_frame_by_frame(tmp_path):
    state = dino_file(tmp_path)
    clips = [clip_of(3 + number, *size, seed=number) for number, size in enumerate(SIZES)]
    found = score(evaluator(tmp_path), *clips)
    for number, clip in enumerate(clips):
        features = [dino_kit.dino_feature(picture, state) for picture in short(clip)]
        assert float(found["score"][number]) == pytest.approx(dino_kit.consistent(features), abs=3e-6)
    assert found["pairs"].tolist() == [2, 3, 4, 5]
    assert float(found["score"].min()) > 0.05 and float(found["score"].max()) < 0.999


def test_goldens(tmp_path):
    dino_file(tmp_path)
    scorer = evaluator(tmp_path)
    one, other = clip_of(1, 230, 300), clip_of(1, 230, 300, seed=5)
    still = score(scorer, one.expand(4, -1, -1, -1))
    assert still["score"].tolist() == pytest.approx([1.0], abs=1e-6) and still["pairs"].tolist() == [3]
    # A A B: the cosine c of A and B counts in one pair of two, as neighbour and against the first.
    with torch.no_grad():
        features = scorer.dino.images(torch.cat([one, other]), Geometry.of(resize_short, mode="bilinear"))
    cosine = float((features[0] * features[1]).sum().clamp(min=0))
    assert score(scorer, torch.cat([one, one, other]))["score"].tolist() == pytest.approx([(1 + cosine) / 2], abs=1e-6)


def test_the_formulas_by_hand():
    """Unit vectors in the plane, by their angles; cosines below 0 count as 0."""

    def features(*degrees):
        angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    assert float(consistency(features(0, 60, 180))) == pytest.approx(((0.5 + 0.5) / 2 + 0 / 2) / 2)
    assert float(consistency(features(0, 60, 120))) == pytest.approx((0.5 + (0.5 + 0) / 2) / 2)
    # c = 1/2, 1, 0; k = 1/2, 0
    found = resemblance(features(0, 60, 180), features(60)[0])
    assert float(found) == pytest.approx(0.4 * 1 + 0.3 * 0.25 + 0.3 * 0)
    assert float(resemblance(features(0, 0, 60), features(0)[0])) == pytest.approx(0.4 + 0.3 * 0.75 + 0.3 * 0.5)
    random = torch.nn.functional.normalize(torch.randn(9, 6, dtype=torch.float64), dim=-1)
    assert float(consistency(random)) == pytest.approx(dino_kit.consistent(random.numpy()), abs=1e-12)
    assert float(resemblance(random[1:], random[0])) == pytest.approx(
        dino_kit.resembling(random[1:].numpy(), random[0].numpy()), abs=1e-12
    )
    for formula in (consistency, lambda one: resemblance(one, random[0])):
        with pytest.raises(ValueError, match="has 1 frame; this compares frames, so it takes 2 or more"):
            formula(random[:1])


def test_frames_in_a_batch_are_frames_one_by_one(tmp_path):
    dino_file(tmp_path)
    scorer = evaluator(tmp_path)
    clips = [clip_of(3, *size, seed=number) for number, size in enumerate(itertools.islice(itertools.cycle(SIZES), 8))]
    eight = score(scorer, *clips)["score"]
    alone = torch.cat([score(scorer, clip)["score"] for clip in clips])
    torch.testing.assert_close(eight, alone, rtol=0, atol=2e-6)
    backwards = score(scorer, *reversed(clips))["score"].flip(0)
    torch.testing.assert_close(eight, backwards, rtol=0, atol=2e-6)


def test_one_frame_is_an_error_of_its_own(tmp_path):
    dino_file(tmp_path)
    clips = [clip_of(frames, 64, 64) for frames in (1, 3)]
    with pytest.raises(ItemErrors, match="the clip has 1 frame") as caught:
        score(evaluator(tmp_path), *clips)
    assert list(caught.value.errors) == [0] and caught.value.scores["pairs"][1] == 2


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("pos_embed", None, "pos_embed is missing"),
        ("pos_embed", torch.zeros(1, 196, 128), "195 places besides the first, which are no square grid"),
        ("patch_embed.proj.weight", torch.zeros(100, 3, 16, 16), "100 features cannot be divided into heads of 64"),
        ("blocks.1.norm1.bias", None, r"missing: blocks\.1\.norm1\.bias"),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, name, value, said):
    state = dino_file(tmp_path)
    state.pop(name) if value is None else state.update({name: value})
    torch.save(state, tmp_path / "dino_vitbase16_pretrain.pth")
    with pytest.raises(ValueError, match=f"dino_vitbase16_pretrain.pth: .*{said}"):
        evaluator(tmp_path)


def test_missing_weights_are_said_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"dino-vitb16 weights: .*mmalign weights fetch dino-vitb16"):
        evaluator(tmp_path)


def test_bfloat16_is_near(tmp_path):
    dino_file(tmp_path)
    half = load_evaluator("subject_consistency", {"checkpoint": str(tmp_path)}, "cpu", dtype="bfloat16")
    clip = clip_of(3, 230, 300)
    found = score(half, clip)["score"]
    assert found.dtype == torch.float32 and abs(float(found - score(evaluator(tmp_path), clip)["score"])) < 0.02


def test_subject_consistency_keeps_the_contract(tmp_path):
    dino_file(tmp_path, **{**SMALL, "width": 64, "hidden": 64})
    sizes = [(64, 64), (33, 70), (20, 90), (64, 64)]
    check_evaluator("subject_consistency", {"checkpoint": str(tmp_path)}, sizes=sizes, prompts=["a"] * 4)
