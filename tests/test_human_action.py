"""human_action: OpenCV's resize, UMT's classifier and the rule, against independent slow arithmetic."""

import hashlib
import json

import numpy as np
import pytest
import torch
from clip_kit import meta
from public_kit import VBENCH, needs
from torch.nn import functional as F
from umt_kit import FILE, logits, published, slow_resize, table, umt_file
from viclip_kit import clips_of

from mmalign.backbones.umt import UmtModel, UmtSizes, check_fits, load_umt, positions
from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch, ItemErrors, Middle
from mmalign.known_weights import KNOWN
from mmalign.testing import check_evaluator
from mmalign.vbench.actions import asked_label, kinetics_400, named_label, place_of, read_classes, shown, top_five
from mmalign.vbench.opencv import resize_bilinear

CPU = torch.device("cpu")
BIKE = "A person is riding a bike"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return umt_file(tmp_path_factory.mktemp("umt"))


# ------------------------------------------------------------------------------------------------ OpenCV's resize


@pytest.mark.parametrize(
    ("old", "new"),
    [((40, 60), (32, 48)), ((33, 47), (64, 91)), ((48, 64), (24, 32)), ((48, 64), (24, 30)), ((9, 7), (9, 7)),
     ((5, 8), (40, 64)), ((100, 30), (13, 4)), ((1, 3), (6, 18)), ((2, 2), (32, 32)), ((31, 45), (32, 46))],
)  # fmt: skip
def test_resize_is_opencvs_arithmetic_to_the_level(old, new):
    images = clips_of([(2, *old)], seed=sum(old))[0]
    found = resize_bilinear(images, *new)
    expected = np.stack([slow_resize(image, *new) for image in images.permute(0, 2, 3, 1).numpy()])
    assert found.dtype == torch.uint8 and np.array_equal(found.permute(0, 2, 3, 1).numpy(), expected)
    exact = F.interpolate(images.double(), size=new, mode="bilinear", align_corners=False)
    assert (found - exact).abs().max() <= 1.01, "fixed-point arithmetic is within a level of exact bilinear weights"


def test_resize_keeps_constant_images():
    for value in (0, 1, 127, 128, 254, 255):
        for new in ((64, 91), (20, 30), (36, 52)):
            image = torch.full((1, 3, 37, 53), value, dtype=torch.uint8)
            assert bool((resize_bilinear(image, *new) == value).all())


# ------------------------------------------------------------------------------------------------ the network


def test_the_table_of_positions():
    for frames in (8, 16, 4):
        expected = torch.from_numpy(table(frames, 14, 10).reshape(-1, 10))
        assert (positions(frames, 14, 10) - expected).abs().max() < 1e-5
    assert positions(16, 4, 10).shape == (256, 10)
    # Frame 0 of 16 lies before the first of 8, so that it is the first one; frames 1 and 2 lie a quarter to its sides.
    eight, sixteen = positions(8, 14, 10).view(8, 196, 10), positions(16, 14, 10).view(16, 196, 10)
    assert torch.equal(sixteen[0], eight[0])
    assert torch.allclose(sixteen[1], 0.75 * eight[0] + 0.25 * eight[1], atol=1e-6)
    whole = torch.linspace(0, 1, 8)[:, None, None].expand(8, 14, 14)
    small = F.interpolate(whole[:, None], size=(4, 4), mode="bicubic", align_corners=False)[:, 0]
    assert torch.allclose(small, torch.linspace(0, 1, 8)[:, None, None].expand(8, 4, 4), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_equal_independent_float64(dtype, tmp_path):
    path, state = umt_file(tmp_path, dtype=dtype)
    umt = load_umt(checkpoint=path, device=CPU, dtype=torch.float32)
    assert umt.sizes == UmtSizes(patch_size=56, width=128, layers=2, hidden=320)
    squares = np.random.default_rng(0).integers(0, 256, (2, 16, 224, 224, 3), dtype=np.uint8)
    places = positions(16, 4, 128).view(16, 4, 4, 128)
    expected = torch.stack([logits(clip, state, places) for clip in squares])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(squares).float() / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    found = umt.logits(pixels)
    assert found.dtype == torch.float32 and (found.double() - expected).abs().max() < 2e-5
    assert expected.std() > 0.3


def test_a_network_of_the_published_patch_and_grid(tmp_path):
    path, state = umt_file(tmp_path, width=64, layers=1, patch=16, hidden=64, classes=7)
    umt = load_umt(checkpoint=path, device=CPU, dtype=torch.float32)
    squares = np.random.default_rng(1).integers(0, 256, (16, 224, 224, 3), dtype=np.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(squares).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = logits(squares, state, table(16, 14, 64), heads=1)
    assert (umt.logits(pixels[None])[0].double() - expected).abs().max() < 2e-5


def test_the_published_names_and_shapes_at_full_size(tmp_path):
    keys = published()
    with torch.device("meta"):
        model = UmtModel(UmtSizes())
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == keys and len(keys) == 318
    # 579 MiB in float16, as large as the published file: it holds no table of positions, which would be 6 MiB more.
    assert sum(value.numel() for value in model.parameters()) == 303_484_304
    check_fits(meta(keys), tmp_path / FILE)
    check_fits(meta(keys | {"pos_embed": (1, 3136, 1024)}), tmp_path / FILE)
    with pytest.raises(ValueError, match="1 missing: fc_norm"):
        check_fits(meta({key: shape for key, shape in keys.items() if key != "fc_norm.bias"}), tmp_path / FILE)
    with pytest.raises(ValueError, match="1 unexpected: cls_token"):
        check_fits(meta(keys | {"cls_token": (1, 1, 1024)}), tmp_path / FILE)
    with pytest.raises(ValueError, match=r"of the wrong shape: blocks\.3\.attn\.q_bias"):
        check_fits(meta(keys | {"blocks.3.attn.q_bias": (1000,)}), tmp_path / FILE)
    for name, shape, said in (
        ("patch_embed.proj.weight", (1024, 3, 2, 16, 16), "patches of 2 x 16 x 16"),
        ("patch_embed.proj.weight", (1000, 3, 1, 16, 16), "no multiple of 64"),
        ("head.weight", (400,), "it has no head.weight"),
    ):
        with pytest.raises(ValueError, match=said):
            check_fits(meta(keys | {name: shape}), tmp_path / FILE)
    assert KNOWN["umt-l16-k400"].files[0] == FILE


def test_a_file_with_its_own_positions_is_read_with_them(tmp_path):
    own = torch.randn(1, 256, 128, generator=torch.Generator().manual_seed(3))
    path, state = umt_file(tmp_path, changes={"pos_embed": own})
    umt = load_umt(checkpoint=path, device=CPU, dtype=torch.float32)
    squares = np.random.default_rng(0).integers(0, 256, (16, 224, 224, 3), dtype=np.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((torch.from_numpy(squares).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    expected = logits(squares, state, own.view(16, 4, 4, 128))
    assert (umt.logits(pixels[None])[0].double() - expected).abs().max() < 2e-5


# ------------------------------------------------------------------------------------------------ labels and the rule


def test_the_classes_are_the_references_list():
    names = kinetics_400()
    text = "".join(f"{name}\t{number}\n" for number, name in enumerate(names))
    # sha256 of kinetics_400_categories.txt of Vchitect/VBench, as published by others who use it.
    digest = "903552632974b59d4d1beda96f7bb2829602bfeca1b3fdd5eb4bec3c5a12c1df"
    assert hashlib.sha256(text.encode()).hexdigest() == digest
    assert names[0] == "riding a bike" and names[341] == "abseiling" and names[399] == "playing badminton"
    assert list(names) != sorted(names), "the order of most libraries is another one"


@needs(VBENCH)
def test_every_prompt_of_the_suite_names_a_class():
    rows = json.loads(VBENCH.read_text(encoding="utf-8"))
    prompts = [row["prompt_en"] for row in rows if "human_action" in row["dimension"]]
    labels = [named_label(prompt) for prompt in prompts]
    assert len(set(labels)) == 100 and all(place_of(label, kinetics_400()) is not None for label in labels)
    assert labels == [asked_label(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    ("prompt", "cut", "whole"),
    [
        (BIKE, "riding a bike", "riding a bike"),
        ("A Person Is Playing Harp", "playing harp", "playing harp"),
        ("A person is push-up training.", "push", "push-up training"),
        ("person is a_b", "a", "a_b"),
        ("a person is sad and a person is crying", "crying", "crying"),
        ("nobody rides", "nobody rides", "nobody rides"),
    ],
)
def test_labels_as_the_reference_cuts_them_and_whole(prompt, cut, whole):
    assert named_label(prompt) == cut and asked_label(prompt) == whole


def test_a_list_of_classes_is_read_in_both_forms(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("b\t1\na c\t0\n\n", encoding="utf-8")
    assert read_classes(path) == ("a c", "b")
    path.write_text("x y\nz\n", encoding="utf-8")
    assert read_classes(path) == ("x y", "z")
    for text, said in (
        ("a\t0\nb\t2\n", "have to be 0 to 1"),
        ("a\t0\nb\n", "no list"),
        ("", "no list"),
        ("a\tx\n", "no number"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=said):
            read_classes(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_classes(tmp_path / "absent.txt")


def test_the_rule_at_its_edges():
    def with_logits(*values):
        return torch.tensor([*values, *[-9.0] * 10])

    def logit(probability):
        return float(torch.tensor(probability, dtype=torch.float64).logit())

    assert shown(with_logits(logit(0.86)), 0) and not shown(with_logits(logit(0.84)), 0)
    assert shown(with_logits(logit(0.84996)), 0), "0.85 after rounding to four digits"
    assert not shown(with_logits(logit(0.84994)), 0)
    four, five = with_logits(2.0, 3.0, 4.0, 5.0, 6.0), with_logits(2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
    assert shown(four, 0) and not shown(five, 0), "the fifth is in, the sixth is out"
    assert top_five(four, 0) and not top_five(five, 0)


# ------------------------------------------------------------------------------------------------ the dimension


def biased(folder, **wanted):
    """A file whose logits are -9 but for the classes named, whatever the clip shows."""
    bias = torch.full((400,), -9.0)
    for name, value in wanted.items():
        bias[kinetics_400().index(name.replace("_", " "))] = value
    return umt_file(folder, changes={"head.weight": torch.zeros(400, 128), "head.bias": bias})[0]


def scores(path, prompts, **params):
    evaluator = load_evaluator("human_action", {"checkpoint": path, **params}, "cpu")
    return evaluator.score(Batch(frames=clips_of([(16, 40, 60)] * len(prompts)), prompts=prompts))


def test_the_rule_on_clips(tmp_path):
    path = biased(tmp_path, riding_a_bike=2.0, marching=1.0)
    prompts = [BIKE, "A person is marching", "A person is yoga", "two cats"]
    found = scores(path, prompts)
    assert found["score"].tolist() == [1, 0, 0, 0]
    likely = [1 / (1 + np.exp(-value)) for value in (2.0, 1.0, -9.0)]
    assert np.allclose(found["probability"].numpy(), [*likely, 0.0], atol=1e-6)
    strict = scores(path, prompts[:2], rules="strict")
    assert strict["score"].tolist() == [1, 1], "without the threshold of the sigmoid"
    total = np.exp(2) + np.exp(1) + 398 * np.exp(-9)
    assert np.allclose(strict["probability"].numpy(), [np.exp(2) / total, np.exp(1) / total], atol=1e-6)
    with pytest.raises(ItemErrors, match="'two cats' is none of the 400 classes") as error:
        scores(path, [BIKE, "two cats"], rules="strict")
    assert error.value.scores["score"][0] == 1 and set(error.value.errors) == {1}


@pytest.mark.parametrize("size", [(40, 60), (300, 256), (256, 300), (512, 700), (640, 512), (230, 231)])
def test_probabilities_equal_independent_float64_through_the_references_pixels(size, small):
    path, state = small
    clip = clips_of([(16, *size)], seed=size[0])[0]
    height, width = size
    new = (int(256 * height / width), 256) if width < height else (256, int(256 * width / height))
    top, left = round((new[0] - 224) / 2), round((new[1] - 224) / 2)
    # resize_bilinear itself is held to the slow one above.
    squares = resize_bilinear(clip, *new)[..., top : top + 224, left : left + 224].permute(0, 2, 3, 1).numpy()
    expected = logits(squares, state, positions(16, 4, 128).view(16, 4, 4, 128)).sigmoid()
    evaluator = load_evaluator("human_action", {"checkpoint": path}, "cpu")
    prompts = [f"A person is {kinetics_400()[place]}" for place in (0, 17, 399)]
    found = evaluator.score(Batch(frames=[clip] * 3, prompts=prompts))
    assert (found["probability"].double() - expected[[0, 17, 399]]).abs().max() < 1e-5


def test_short_clips_repeat_their_last_frame_and_batches_do_not_matter(small):
    evaluator = load_evaluator("human_action", {"checkpoint": small[0]}, "cpu")
    assert type(evaluator).frames == Middle(16)
    clips = clips_of([(3, 40, 60), (16, 40, 60), (16, 50, 30), (1, 40, 60), (33, 30, 30), (16, 40, 60)])
    prompts = [BIKE] * len(clips)
    together = evaluator.score(Batch(frames=clips, prompts=prompts))["probability"]
    alone = [evaluator.score(Batch(frames=[clip], prompts=[BIKE]))["probability"][0] for clip in clips]
    assert torch.allclose(together, torch.stack(alone), atol=1e-6) and together.std() > 1e-4
    repeated = clips[0][[0, 1, 2, *[2] * 13]]
    assert torch.allclose(
        evaluator.score(Batch(frames=[repeated], prompts=[BIKE]))["probability"], together[:1], atol=1e-6
    )


def test_classes_of_ones_own_have_to_fit_the_weights(tmp_path):
    path, _ = umt_file(tmp_path, classes=3)
    with pytest.raises(ValueError, match="has 400 classes, and the weights tell 3 apart"):
        load_evaluator("human_action", {"checkpoint": path}, "cpu")
    (tmp_path / "classes.txt").write_text("waving\nriding a bike\nnothing\n", encoding="utf-8")
    found = scores(path, [BIKE, "A person is waving"], labels=tmp_path / "classes.txt")
    assert set(found) == {"score", "probability"} and (found["probability"] > 0).all()
    with pytest.raises(ValueError, match=r"absent\.txt: cannot be read"):
        scores(path, [BIKE], labels=tmp_path / "absent.txt")


def test_the_contract(small):
    check_evaluator("human_action", {"checkpoint": str(small[0])}, prompts=[BIKE, "A person is yoga", "x", BIKE],
                    sizes=[(40, 60), (33, 70), (64, 40), (40, 60)])  # fmt: skip
