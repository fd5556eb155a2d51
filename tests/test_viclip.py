"""ViCLIP and the dimensions that it measures, against independent float64 arithmetic."""

import numpy as np
import pytest
import torch
from clip_kit import VIT_L_14, meta
from safetensors.torch import save_file
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from viclip_kit import FILE, TINY, clips_of, published, square, text_features, viclip_file, video_features

from mmalign.backbones.viclip import ViClipModel, ViClipSizes, check_fits, load_viclip, middle_square
from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch, ItemErrors, Middle
from mmalign.known_weights import KNOWN
from mmalign.testing import check_evaluator
from mmalign.weights_convert import convert_here

CPU = torch.device("cpu")
STYLED = ["A beach, waves lapping on sand, in super slow motion", "a shark, zoom in", "The bund Shanghai, pan left"]
LONG = "snow blanketed rocky mountains surround and shadow deep canyons, " * 6 + "zoom out"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return viclip_file(tmp_path_factory.mktemp("viclip"))


# ------------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (56, 91), (57, 56), (20, 31), (28, 90), (28, 28), (9, 5)])
def test_pixels_are_torchvisions_resize_of_uint8_to_the_level(size):
    frames = clips_of([(3, *size)])[0]
    resize = Resize(28, interpolation=InterpolationMode.BICUBIC, antialias=False)
    expected = Compose([resize, CenterCrop(28)])(frames)
    found = middle_square(frames, 28)
    assert torch.equal(found * 255, expected.float())
    assert torch.equal(middle_square(frames.float() / 255, 28), found), "float pixels of whole levels are the same"
    slow = np.stack([square(frame, 28) for frame in frames.permute(0, 2, 3, 1).numpy()]).transpose(0, 3, 1, 2)
    off = np.abs(found.double().numpy() * 255 - slow)
    assert off.max() <= 1 + 1e-9 and (off > 0.5).mean() < 0.002, "float32 may round an exact half to the other level"


def test_pixels_are_rounded_and_clamped_and_the_gradient_passes():
    edge = torch.zeros(1, 3, 56, 56)
    edge[..., 28:] = 1.0
    edge[..., 24:32, :] = 0.37
    edge.requires_grad_(True)
    found = middle_square(edge, 28)
    assert found.min() >= 0 and found.max() <= 1
    assert (found * 255 - (found * 255).round()).abs().max() < 1e-4
    found.sum().backward()
    assert bool(torch.isfinite(edge.grad).all()) and float(edge.grad.abs().sum()) > 0


# ------------------------------------------------------------------------------------------------ the network


def test_features_equal_independent_float64(small):
    path, state = small
    viclip = load_viclip(checkpoint=path, device=CPU, dtype=torch.float32)
    clips = clips_of([(8, 28, 28), (8, 45, 37), (8, 20, 33)])
    expected = torch.stack([video_features(clip, state) for clip in clips])
    found = viclip.videos(clips)
    assert found.dtype == torch.float32 and (found.double() - expected)[:1].abs().max() < 2e-6
    assert (found.double() - expected).abs().max() < 2e-3, "a level that float32 rounds the other way"
    prompts = ["a cat", "Two DOGS, on a mat!", LONG]
    texts = torch.stack([text_features(prompt, state) for prompt in prompts])
    assert (viclip.texts(prompts).double() - texts).abs().max() < 2e-6
    assert viclip.truncated(prompts) == [False, False, True]
    assert torch.allclose(viclip.texts([LONG]), viclip.texts([LONG + " and more"]), atol=1e-6), "cut off"


def test_every_frame_and_its_place_matter(small):
    viclip = load_viclip(checkpoint=small[0], device=CPU, dtype=torch.float32)
    clip = clips_of([(8, 28, 28)])[0]
    first = viclip.videos([clip])
    assert (viclip.videos([clip.flip(0)]) - first).abs().max() > 1e-3
    for time in range(8):
        other = clip.clone()
        other[time] = 0
        assert (viclip.videos([other]) - first).abs().max() > 1e-4, time


def test_clips_of_other_lengths_give_the_middle_frames(small):
    viclip = load_viclip(checkpoint=small[0], device=CPU, dtype=torch.float32)
    short, long = clips_of([(3, 30, 40), (21, 30, 40)])
    for clip in (short, long):
        expected = viclip.videos([clip[Middle(8).indices(len(clip), 0.0)]])
        assert torch.equal(viclip.videos([clip]), expected)
    assert torch.equal(viclip.videos([short]), viclip.videos([short[[0, 1, 2, 2, 2, 2, 2, 2]]]))


def test_batch_and_precision(small):
    viclip = load_viclip(checkpoint=small[0], device=CPU, dtype=torch.float32)
    clips = clips_of([(8, 28, 28)] * 10 + [(8, 40, 50)])
    together = viclip.videos(clips)
    alone = torch.cat([viclip.videos([clip]) for clip in clips])
    assert (together - alone).abs().max() < 1e-6
    half = load_viclip(checkpoint=small[0], device=CPU, dtype=torch.bfloat16)
    found = half.videos(clips)
    assert found.dtype == torch.float32 and ((found * together).sum(dim=1) > 0.999).all()
    assert ((half.texts(["a cat"]) * viclip.texts(["a cat"])).sum() > 0.999).all()


# ------------------------------------------------------------------------------------------------ files


def test_the_published_names_and_shapes_at_full_size(tmp_path):
    keys = published(*VIT_L_14)
    with torch.device("meta"):
        model = ViClipModel(ViClipSizes())
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == keys and len(keys) == 447
    assert sum(value.numel() for value in model.parameters()) == 427_590_145
    check_fits(meta(keys), tmp_path / FILE)
    for name in ("text_encoder.ln_final.weight", "vision_encoder.transformer.resblocks.7.ln_2.bias", "temp"):
        with pytest.raises(ValueError, match=f"1 missing: {name}"):
            check_fits(meta({key: shape for key, shape in keys.items() if key != name}), tmp_path / FILE)
    with pytest.raises(ValueError, match="1 unexpected: extra"):
        check_fits(meta(keys | {"extra": (1,)}), tmp_path / FILE)
    with pytest.raises(ValueError, match=r"of the wrong shape: vision_encoder\.class_embedding"):
        check_fits(meta(keys | {"vision_encoder.class_embedding": (1000,)}), tmp_path / FILE)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("vision_encoder.conv1.weight", (1024, 3, 2, 14, 14), "span 2 frames"),
        ("vision_encoder.conv1.weight", (1024, 3, 14, 14), "no vision_encoder.conv1.weight"),
        ("text_encoder.token_embedding.weight", (49408, 700), "no multiples of 64"),
        ("vision_encoder.proj", None, "it has no vision_encoder.proj"),
    ],
)
def test_what_is_no_viclip_says_so(name, shape, said, tmp_path):
    keys = published(*VIT_L_14)
    keys = {key: value for key, value in keys.items() if key != name} | ({name: shape} if shape else {})
    with pytest.raises(ValueError, match=said):
        check_fits(meta(keys), tmp_path / FILE)


def test_layouts_that_are_read(small, tmp_path):
    path, state = small
    clips = clips_of([(8, 28, 28)])
    expected = load_viclip(checkpoint=path, device=CPU, dtype=torch.float32).videos(clips)
    plain, _ = viclip_file(tmp_path, name="plain.pth", wrapped=False)
    save_file({key: value.float() for key, value in state.items()}, tmp_path / "model.safetensors")
    for other in (plain, tmp_path / "model.safetensors"):
        assert torch.equal(load_viclip(checkpoint=other, device=CPU, dtype=torch.float32).videos(clips), expected)


class EasyDict(dict):
    """As the training's config is pickled beside the tensors: a dictionary whose entries are attributes too."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        super().__setitem__(name, value)


def test_a_file_with_the_trainings_config_is_converted_once(small, tmp_path):
    config = EasyDict()
    config.model = EasyDict(vision_width=128)
    config.epochs = [1, 2]
    content = torch.load(small[0], weights_only=True)
    torch.save(content | {"config": config, "epoch": 3}, tmp_path / FILE)
    with pytest.raises(ValueError, match="mmalign weights convert"):
        load_viclip(checkpoint=tmp_path / FILE, device=CPU, dtype=torch.float32)
    done = convert_here(tmp_path / FILE, tmp_path / "ViClip-InternVid-10M-FLT.safetensors")
    assert done["tensors"] == len(content["model"]) and any(name.endswith("EasyDict") for name in done["classes"])
    clips = clips_of([(8, 28, 28)])
    found = load_evaluator("overall_consistency", {"checkpoint": tmp_path}, "cpu")
    expected = load_viclip(checkpoint=small[0], device=CPU, dtype=torch.float32)
    cosine = (expected.videos(clips) * expected.texts(["a"])).sum(dim=1)
    assert torch.equal(found.score(Batch(frames=clips, prompts=["a"])), cosine)
    assert KNOWN["viclip-internvid-10m-flt"].files[0] == FILE


# ------------------------------------------------------------------------------------------------ the dimensions


@pytest.mark.parametrize("name", ["temporal_style", "overall_consistency"])
def test_scores_equal_independent_float64(name, small):
    path, state = small
    evaluator = load_evaluator(name, {"checkpoint": path}, "cpu")
    assert type(evaluator).frames == Middle(8)
    clips, prompts = clips_of([(8, 28, 28)] * 4, seed=3), [*STYLED, LONG]
    found = evaluator.score(Batch(frames=clips, prompts=prompts))
    pairs = [video_features(clip, state) @ text_features(prompt, state) for clip, prompt in zip(clips, prompts)]  # noqa: B905
    assert (found.double() - torch.stack(pairs)).abs().max() < 3e-6
    assert found.std() > 1e-3, "scores have to differ for this to say something"
    assert evaluator.truncated(prompts) == [False, False, False, True]


def test_strict_temporal_style_reads_the_style_alone(small):
    path, state = small
    compat, strict = (
        load_evaluator("temporal_style", {"checkpoint": path, "rules": r}, "cpu") for r in ("compat", "strict")
    )
    clips = clips_of([(8, 28, 28)] * 4)
    prompts = [*STYLED, LONG]
    found = strict.score(Batch(frames=clips, prompts=prompts))
    styles = ["in super slow motion", "zoom in", "pan left", "zoom out"]
    expected = [video_features(clip, state) @ text_features(style, state) for clip, style in zip(clips, styles)]  # noqa: B905
    assert (found.double() - torch.stack(expected)).abs().max() < 3e-6
    assert (found - compat.score(Batch(frames=clips, prompts=prompts))).abs().min() > 1e-4
    assert strict.truncated(prompts) == [False] * 4, "the style of a long prompt is seen"
    with pytest.raises(ItemErrors, match="behind the prompt's last comma") as error:
        strict.score(Batch(frames=clips, prompts=["no style", STYLED[1], "nothing, ", STYLED[1]]))
    assert set(error.value.errors) == {0, 2}
    assert torch.allclose(
        error.value.scores[[1, 3]], (strict.viclip.videos(clips[1::2]) * strict.viclip.texts(["zoom in"])).sum(1)
    )


def test_both_dimensions_share_one_pass(small, monkeypatch):
    from mmalign.discovery import evaluator_class
    from mmalign.evaluation import Backbones

    backbones, calls = Backbones(), []
    made = []
    for name in ("temporal_style", "overall_consistency"):
        cls = evaluator_class(name)
        params = cls.Params(checkpoint=small[0])
        specs = cls.backbone_specs(params)
        made.append(cls(params, {"viclip": backbones.get(specs["viclip"], CPU, torch.float32)}, CPU))
    assert made[0].viclip is made[1].viclip
    plain = made[0].viclip._encode
    monkeypatch.setattr(made[0].viclip, "_encode", lambda pixels: calls.append(len(pixels)) or plain(pixels))
    batch = Batch(frames=clips_of([(8, 28, 28)] * 2), prompts=STYLED[:2])
    assert torch.equal(made[0].score(batch), made[1].score(batch)) and calls == [2]


@pytest.mark.parametrize("name", ["temporal_style", "overall_consistency"])
def test_score_tensor_equals_score_and_has_a_gradient(name, small):
    evaluator = load_evaluator(name, {"checkpoint": small[0]}, "cpu")
    clips = torch.stack(clips_of([(8, 40, 52)] * 2))
    images = (clips.float() / 255).requires_grad_(True)
    found = evaluator.score_tensor(images, STYLED[:2])
    assert torch.allclose(found, evaluator.score(Batch(frames=list(clips), prompts=STYLED[:2])), atol=1e-6)
    found.sum().backward()
    assert all(bool(frame.any()) for clip in images.grad for frame in clip), "every frame is reached"


@pytest.mark.parametrize("name", ["temporal_style", "overall_consistency"])
def test_the_contract(name, small):
    check_evaluator(name, {"checkpoint": str(small[0])})


def test_small_sizes_are_read_from_the_tensors(small):
    assert load_viclip(checkpoint=small[0], device=CPU, dtype=torch.float32).sizes == TINY
