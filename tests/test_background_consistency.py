"""background_consistency, aesthetic_quality and appearance_style: CLIP's features as VBench resizes, in float64."""

import sys

import clip_reference as reference
import numpy as np
import pytest
import torch
from clip_kit import pil_square
from dino_kit import clip_of, consistent, unit
from public_kit import AESTHETIC_HEADS, needs
from scorer_kit import TINY, clip_folder, double

from mmalign.backbones.clip_scoring import (
    FORWARD_CHUNK,
    OPENAI_CROP,
    Geometry,
    frame_features,
    resize_crop,
)
from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import Backbones, Batch, ItemErrors
from mmalign.testing import check_evaluator
from mmalign.weights import read_state_dict

SIZES = [(60, 97), (97, 60), (28, 28), (41, 40)]
STYLES = ["Van Gogh style", "oil painting", "in super slow motion", "Van Gogh style"]


def tiny(folder, **config):
    """(the CLIP's tensors, the parameters that name it)."""
    path = clip_folder(folder, "open_clip_pytorch_model.bin", {**TINY, "quick_gelu": True, **config})
    return double(path), {"checkpoint": str(path), "model": str(folder)}


def clips_of(sizes=SIZES, frames=3):
    return [clip_of(frames + number, *size, seed=number) for number, size in enumerate(sizes)]


def batch_of(clips, styles=STYLES):
    aux = [{"appearance_style": style} for style, _ in zip(styles, clips, strict=False)]
    return Batch(frames=clips, prompts=["a cat"] * len(clips), aux=aux)


def arrays(clip):
    return clip.permute(0, 2, 3, 1).numpy()


def square(array, size=28):
    """CLIP224 at the tiny tower's size: bicubic without a filter on 0 to 255, the central square, then / 255."""
    height, width = array.shape[:2]
    new = (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    wide = array.astype(np.float64)
    wide = wide if min(height, width) == size else reference.resize(wide, *new, antialias=False)
    top, left = (round((side - size) / 2) for side in wide.shape[:2])
    return reference.normalise(wide[top : top + size, left : left + size] / 255)


def features(clip, state, pixels=square):
    return [unit(reference.encode_image(pixels(array), state, 2, quick=True)[0].numpy()) for array in arrays(clip)]


@pytest.mark.parametrize("size", [(240, 400), (333, 250), (1080, 1920), (100, 100), (224, 301), (100, 225), (255, 224)])
def test_the_square_is_torchvisions_on_0_to_255(size):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    clip = clip_of(1, *size).float()
    clip[..., ::7, ::5] = 255.0  # edges that overshoot
    expected = center_crop(resize(clip, [224], InterpolationMode.BICUBIC, antialias=False), [224]) / 255
    found = resize_crop(clip / 255, 224, antialias=False)
    assert found.shape == (1, 3, 224, 224) and (found - expected).abs().max() < 1e-5
    assert min(size) == 224 or (found.max() > 1.001), "the overshoot has to be kept"


@pytest.mark.parametrize("size", [(16, 1600), (1600, 18), (30, 241), (256, 2300), (2300, 257), (2, 4000)])
def test_of_slivers_the_square_alone_is_computed(size, monkeypatch):
    """As torchvision resizes and crops, which would make 224 x 448000 pixels of the last one."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    clip = clip_of(1, *size).float()
    clip[..., ::7, ::5] = 255.0
    side = 28 if max(size) == 4000 else 224
    expected = center_crop(resize(clip, [side], InterpolationMode.BICUBIC, antialias=False), [side]) / 255
    made = []
    plain = torch.nn.functional.interpolate

    def watched(*args, **more):
        made.append(plain(*args, **more))
        return made[-1]

    monkeypatch.setattr(torch.nn.functional, "interpolate", watched)
    found = resize_crop(clip / 255, side, antialias=False)
    assert found.shape == (1, 3, side, side) and (found - expected).abs().max() < 2e-5
    assert max(each.numel() for each in made) <= 3 * side * side * 8
    for larger in (clip, clip.mT):  # as for image-to-video: the shortest side to more than the square
        expected = center_crop(resize(larger, [side + 32], InterpolationMode.BICUBIC, antialias=False), [side]) / 255
        found = resize_crop(larger / 255, side, antialias=False, short=side + 32, overshoot=True)
        assert (found - expected).abs().max() < 2e-5


def test_background_consistency_is_that_of_float64(tmp_path):
    state, params = tiny(tmp_path)
    clips = clips_of()
    found = load_evaluator("background_consistency", params, "cpu").score(batch_of(clips))
    expected = [consistent(features(clip, state)) for clip in clips]
    assert found["score"].tolist() == pytest.approx(expected, abs=5e-6)
    assert found["pairs"].tolist() == [2, 3, 4, 5]
    assert max(expected) < 0.999 and max(expected) - min(expected) > 1e-3


def test_aesthetic_quality_is_that_of_float64_and_of_aesthetics_parameters(tmp_path):
    state, params = tiny(tmp_path)
    generator = torch.Generator().manual_seed(0)
    head = {"weight": torch.randn(1, 24, generator=generator) * 5, "bias": torch.full((1,), 5.5)}
    torch.save(head, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    params = {"checkpoint": str(tmp_path), "clip_checkpoint": params["checkpoint"], "model": params["model"]}
    clips = clips_of()
    found = load_evaluator("aesthetic_quality", params, "cpu").score(batch_of(clips))
    weight = head["weight"][0].double().numpy()
    expected = [np.mean([feature @ weight + 5.5 for feature in features(clip, state)]) / 10 for clip in clips]
    assert found.tolist() == pytest.approx(expected, abs=3e-6)
    named = {**params, "head": "v1", "divide_by": 10, "antialias": False}
    other = load_evaluator("aesthetic", named, "cpu").score(batch_of(clips))
    torch.testing.assert_close(found, other, rtol=0, atol=1e-7)
    with_filter = load_evaluator("aesthetic", {**named, "antialias": True}, "cpu").score(batch_of(clips))
    assert (found - with_filter).abs().max() > 1e-3
    torch.save({**head, "weight": torch.zeros(1, 768)}, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    with pytest.raises(ValueError, match=r"this head rates 768 features, but .* gives 24"):
        load_evaluator("aesthetic_quality", params, "cpu")


@needs(AESTHETIC_HEADS)
def test_the_published_head_rates_through_aesthetic_quality(tmp_path):
    state, params = tiny(tmp_path, embed_dim=768)
    head = read_state_dict(AESTHETIC_HEADS / "sa_0_4_vit_l_14_linear.pth")
    settings = {"checkpoint": str(AESTHETIC_HEADS), "clip_checkpoint": params["checkpoint"], "model": params["model"]}
    clips = clips_of()
    found = load_evaluator("aesthetic_quality", settings, "cpu").score(batch_of(clips))
    weight, bias = head["weight"][0].double().numpy(), float(head["bias"])
    expected = [np.mean([feature @ weight + bias for feature in features(clip, state)]) / 10 for clip in clips]
    assert found.tolist() == pytest.approx(expected, abs=3e-5)


def test_appearance_style_is_that_of_float64(tmp_path):
    """Rounded to 8 bits by PIL, so that single pixels may be a level off."""
    state, params = tiny(tmp_path)
    clips = clips_of()
    evaluator = load_evaluator("appearance_style", {**params, "rules": "strict"}, "cpu")
    found = evaluator.score(batch_of(clips))
    texts = reference.encode_text(evaluator.clip.tokenizer(STYLES), state, 2, quick=True).numpy()
    pil = [features(clip, state, lambda array: pil_square(array, 28, "round")) for clip in clips]
    expected = [np.mean(frames @ unit(text)) for frames, text in zip(pil, texts, strict=True)]
    plain = [np.mean(features(clip, state) @ unit(text)) for clip, text in zip(clips, texts, strict=True)]
    assert found["score"].tolist() == pytest.approx(expected, abs=5e-4)
    assert found["score"][2].item() == pytest.approx(expected[2], abs=1e-6), "at its own size nothing is rounded"
    assert found["frames"].tolist() == [3, 4, 5, 6]
    assert max(abs(a - b) for a, b in zip(plain, expected, strict=True)) > 5e-3, "the filter has to show"


def test_the_factor_of_appearance_style_is_the_weights_own(tmp_path):
    state, params = tiny(tmp_path)
    clips = batch_of(clips_of())
    compat, strict = (
        load_evaluator("appearance_style", {**params, "rules": rules}, "cpu").score(clips)["score"]
        for rules in ("compat", "strict")
    )
    factor = float(state["logit_scale"].exp()) / 100
    assert abs(factor - 1) > 0.1
    torch.testing.assert_close(compat, strict * factor, rtol=1e-6, atol=0)
    assert strict.abs().max() <= 1


@pytest.mark.parametrize("style", [None, "", "  ", 3, "a very long name of a style " * 20])
def test_an_item_without_a_style_is_an_error_of_its_own(tmp_path, style):
    evaluator = load_evaluator("appearance_style", tiny(tmp_path)[1], "cpu")
    batch = batch_of(clips_of())
    expected = evaluator.score(batch)["score"]
    batch = batch_of(clips_of())
    batch.aux[1] = {} if style is None else {"appearance_style": style}
    said = (
        "more than CLIP's 77 tokens" if isinstance(style, str) and len(style) > 3 else "there is no style to look for"
    )
    with pytest.raises(ItemErrors, match=said) as caught:
        evaluator.score(batch)
    assert list(caught.value.errors) == [1]
    torch.testing.assert_close(caught.value.scores["score"][[0, 2, 3]], expected[[0, 2, 3]], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["background_consistency", "appearance_style"])
def test_identical_frames_and_neighbours(tmp_path, name):
    evaluator = load_evaluator(name, tiny(tmp_path)[1], "cpu")
    clips = clips_of(SIZES * 2)
    styles = STYLES * 2
    eight = evaluator.score(batch_of(clips, styles))["score"]
    alone = torch.cat([evaluator.score(batch_of([c], [s]))["score"] for c, s in zip(clips, styles, strict=True)])
    torch.testing.assert_close(eight, alone, rtol=0, atol=2e-6)
    still = evaluator.score(batch_of([clips[0][:1].expand(4, -1, -1, -1)]))["score"]
    first = 1.0 if name == "background_consistency" else evaluator.score(batch_of([clips[0][:1]]))["score"].item()
    assert still.item() == pytest.approx(first, abs=1e-6)


def test_one_frame_has_no_background_consistency(tmp_path):
    evaluator = load_evaluator("background_consistency", tiny(tmp_path)[1], "cpu")
    with pytest.raises(ItemErrors, match="the clip has 1 frame"):
        evaluator.score(batch_of([clip_of(1, 30, 30), clip_of(2, 30, 30)]))


def test_a_long_clip_is_more_than_one_pass(tmp_path):
    evaluator = load_evaluator("background_consistency", tiny(tmp_path)[1], "cpu")
    long = clip_of(FORWARD_CHUNK + 7, 30, 40) if FORWARD_CHUNK < 100 else None
    assert long is not None
    found = evaluator.score(batch_of([long]))["score"]
    one_by_one = torch.cat(
        [evaluator.clip.images(frame[None], Geometry.of(resize_crop, antialias=False)) for frame in long]
    )
    assert found.item() == pytest.approx(consistent(one_by_one.double().numpy()), abs=2e-6)


def test_dimensions_on_one_tower_share_it_and_its_pass(tmp_path, monkeypatch):
    """background_consistency, and the same CLIP in aesthetic: one instance, and one pass for one geometry."""
    _, params = tiny(tmp_path)
    torch.save({"weight": torch.zeros(1, 24), "bias": torch.zeros(1)}, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    rated = {"checkpoint": str(tmp_path), "clip_checkpoint": params["checkpoint"], "model": params["model"]}
    backbones = Backbones()
    names = {"background_consistency": params, "aesthetic_quality": rated, "appearance_style": params}
    evaluators = [load_evaluator(name, named, "cpu", backbones=backbones) for name, named in names.items()]
    assert len({id(evaluator.clip) for evaluator in evaluators}) == 1
    passes = []
    frames = type(evaluators[0].clip).frames
    monkeypatch.setattr(
        type(evaluators[0].clip),
        "frames",
        lambda self, clips, resize: passes.append(resize) or frames(self, clips, resize),
    )
    batch = batch_of(clips_of())
    for evaluator in evaluators:
        evaluator.score(batch)
    assert passes == [Geometry.of(resize_crop, antialias=False), OPENAI_CROP]
    assert frame_features(evaluators[0].clip, batch, OPENAI_CROP) is not None and len(passes) == 2


@pytest.mark.parametrize("name", ["background_consistency", "aesthetic_quality", "appearance_style"])
def test_they_keep_the_contract(tmp_path, name):
    _, params = tiny(tmp_path)
    if name == "aesthetic_quality":
        torch.save({"weight": torch.ones(1, 24), "bias": torch.zeros(1)}, tmp_path / "sa_0_4_vit_l_14_linear.pth")
        params = {"checkpoint": str(tmp_path), "clip_checkpoint": params["checkpoint"], "model": params["model"]}
    aux = {"appearance_style": "oil painting"}
    sizes = [(64, 64), (33, 70), (5, 301), (64, 64)]
    check_evaluator(name, params, aux=aux, sizes=sizes, prompts=["a"] * 4, processes=1, tolerance=2e-5)


def test_their_weights_are_vbenchs():
    module = sys.modules[evaluator_class("background_consistency").__module__]
    assert module.BackgroundConsistency.Params().model == "ViT-B-32"
    with pytest.raises(ValueError, match="openai-clip-b32 weights"):
        module.BackgroundConsistency.backbone_specs(module.BackgroundConsistency.Params())
    with pytest.raises(ValueError, match="openai-clip-b32 weights"):
        load_evaluator("appearance_style", {}, "cpu")
    with pytest.raises(ValueError, match="aesthetic-v1 weights"):
        load_evaluator("aesthetic_quality", {}, "cpu")
