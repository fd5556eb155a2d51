"""VBench's object, colour, relation and scene dimensions on transformers' detectors and captioners, against loops."""

import math
import sys

import pytest
import torch
from scorer_kit import TINY, clip_folder
from vbench_kit import LEAST, SIDE, blip_folder, clips, expected_objects, greedy, rtdetr_folder

from mmalign.backbones.mask2former import COCO
from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import Backbones, Batch, ItemErrors
from mmalign.testing import check_evaluator
from mmalign.vbench import rules


@pytest.fixture(scope="module")
def detector_path(tmp_path_factory):
    return rtdetr_folder(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def blip_path(tmp_path_factory):
    return blip_folder(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def clip_params(tmp_path_factory):
    path = clip_folder(tmp_path_factory.mktemp("clip"), "open_clip_pytorch_model.bin", {**TINY, "quick_gelu": True})
    return {"clip_checkpoint": path, "model": str(path.parent)}


ROWS = {
    "object_class": {"object": "stop sign"},
    "multiple_objects": {"object": "stop sign and broccoli"},
    "spatial_relationship": {"object_a": "stop sign", "object_b": "broccoli", "relationship": "on the left of"},
    "color": {"color": "red"},
    "scene": {"scene": "alley"},
}
PROMPT = "a red stop sign"


def judged(dimension, frames, reading):
    aux = ROWS[dimension]
    if dimension == "object_class":
        return rules.object_class(frames, aux["object"])
    if dimension == "multiple_objects":
        return rules.multiple_objects(frames, aux["object"].split(" and "))
    return rules.spatial_relationship(frames, *aux.values(), reading)


def batch_of(many, dimension):
    return Batch(frames=many, prompts=[PROMPT] * len(many), aux=[dict(ROWS[dimension]) for _ in many])


@pytest.mark.parametrize(
    ("dimension", "reading"),
    [
        ("object_class", "compat"),
        ("multiple_objects", "compat"),
        ("spatial_relationship", "compat"),
        ("spatial_relationship", "strict"),
    ],
)
def test_evaluators_put_detections_through_the_rules(detector_path, dimension, reading):
    params = {"detector": detector_path, "threshold": LEAST}
    if dimension == "spatial_relationship":
        params["rules"] = reading
    evaluator = load_evaluator(f"{dimension}@rtdetr", params, "cpu")
    many = clips(sizes=[(SIDE, SIDE)] * 8, frames=3)
    found = evaluator.score(batch_of(many, dimension))
    assert found["frames"].tolist() == [3.0] * 8
    for clip, score in zip(many, found["score"].tolist(), strict=True):
        frames = [[rules.Detection(*one) for one in expected_objects(detector_path, frame, LEAST)] for frame in clip]
        assert score == pytest.approx(judged(dimension, frames, reading).score, abs=1e-3)
    alone = torch.cat([evaluator.score(batch_of([clip], dimension))["score"] for clip in many])
    torch.testing.assert_close(alone, found["score"], rtol=0, atol=1e-6)
    assert found["score"].unique().numel() > 1, "the case tells nothing"


def test_the_three_share_detections_and_color_the_detector(detector_path, clip_params, monkeypatch):
    shared = Backbones()
    names = ["object_class@rtdetr", "multiple_objects@rtdetr", "spatial_relationship@rtdetr", "color@crop_clip"]
    params = {"detector": detector_path, "threshold": LEAST}
    made = [
        load_evaluator(name, {**params, **(clip_params if name.startswith("color") else {})}, "cpu", backbones=shared)
        for name in names
    ]
    assert len({id(each.detector) for each in made}) == 1
    calls, detect = [], made[0].detector.detect
    monkeypatch.setattr(made[0].detector, "detect", lambda *args: calls.append(len(args[0])) or detect(*args))
    batch = Batch(frames=clips(), prompts=[PROMPT] * 3)
    for each in made:
        batch.aux = [dict(ROWS[each.name.partition("@")[0]]) for _ in range(3)]
        each.score(batch)
    assert calls == [9]


@pytest.mark.parametrize("reading", ["compat", "strict"])
def test_colours_of_boxes(detector_path, clip_params, reading):
    """The crops are named one by one here, with GenEval's templates."""
    from mmalign.backbones.clip_scoring import OPENAI_CROP

    params = {"detector": detector_path, "threshold": LEAST, "rules": reading, **clip_params}
    evaluator = load_evaluator("color@crop_clip", params, "cpu")
    clip = evaluator.clip
    colours = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]

    def named(frame, label, box):
        left, top = max(math.floor(box[0]), 0), max(math.floor(box[1]), 0)
        right, bottom = min(math.ceil(box[2]), SIDE), min(math.ceil(box[3]), SIDE)
        feature = clip.images(frame[None, :, top:bottom, left:right], OPENAI_CROP)[0]
        scores = []
        for colour in colours:
            forms = (f"a photo of a {colour} {label}", f"a photo of a {colour}-colored {label}")
            text = clip.texts([*forms, f"a photo of a {colour} object"]).mean(0)
            scores.append(float(feature @ text / text.norm()))
        return colours[scores.index(max(scores))]

    many = clips(sizes=[(SIDE, SIDE)] * 4, frames=3)
    kinds, seen = set(), []
    for frames in many:
        found = evaluator.detector.detect(list(frames), LEAST)
        seen.append(
            [
                [rules.Detection(label, box, caption=named(frame, label, box)) for label, box, _ in one]
                for frame, one in zip(frames, found, strict=True)
            ]
        )
        kinds |= {each.caption for frame in seen[-1] for each in frame}
    for colour in [*sorted(kinds), "red"]:
        batch = Batch(frames=many, prompts=[f"a {colour} stop sign"] * 4, aux=[{"color": colour} for _ in many])
        expected = [rules.color(frames, "stop sign", colour, reading) for frames in seen]
        found = evaluator.score(batch)
        assert found["score"].tolist() == pytest.approx([each.score for each in expected])
        assert found["frames"].tolist() == [each.frames for each in expected]
    assert kinds & set(rules.COLOUR_WORDS)


def test_a_box_is_cut_out_whole_and_within_the_frame():
    module = sys.modules[evaluator_class("color@crop_clip").__module__]
    frame = torch.arange(3 * 6 * 8).reshape(3, 6, 8)
    for box, rows, columns in (
        ((1.2, 2.7, 3.1, 4.0), slice(2, 4), slice(1, 4)),
        ((-5, -5, 99, 99), slice(0, 6), slice(0, 8)),
        ((9, 9, 12, 12), slice(5, 6), slice(7, 8)),
        ((2, 3, 2, 3), slice(3, 4), slice(2, 3)),
        ((-9, -9, -4, -4), slice(0, 1), slice(0, 1)),
    ):
        assert torch.equal(module.cut_out(frame, box), frame[:, rows, columns])


def test_a_colour_that_clip_is_not_asked_for_is_named(detector_path, clip_params):
    evaluator = load_evaluator("color@crop_clip", {"detector": detector_path, **clip_params}, "cpu")
    with pytest.raises(ItemErrors, match="color is 'mauve'; CLIP is asked for red, orange"):
        evaluator.score(Batch(frames=clips()[:1], prompts=["a mauve cat"], aux=[{"color": "mauve"}]))


@pytest.mark.parametrize("name", ["object_class", "multiple_objects", "spatial_relationship", "color", "scene"])
def test_substitutes_keep_the_contract(name, detector_path, clip_params, blip_path):
    params = {"detector": detector_path, "threshold": LEAST}
    if name == "color":
        params |= clip_params
    elif name == "scene":
        params = {"captioner": blip_path, "shortest": 0, "longest": 5}
    suffix = {"color": "crop_clip", "scene": "blip"}.get(name, "rtdetr")
    check_evaluator(
        f"{name}@{suffix}", params, prompts=[PROMPT] * 3, sizes=((SIDE, SIDE), (2, 2), (5, 301)),
        aux=ROWS[name], processes=1,
    )  # fmt: skip


def test_a_class_that_the_detector_lacks_is_named(tmp_path):
    folder = rtdetr_folder(tmp_path / "few", labels=[name for name in COCO if name != "zebra"])
    evaluator = load_evaluator("object_class@rtdetr", {"detector": folder}, "cpu")
    frames = clips(frames=1)
    wanted = ["zebra", "car", "pony"]
    with pytest.raises(ItemErrors) as caught:
        evaluator.score(Batch(frames=frames, aux=[{"object": name} for name in wanted]))
    assert set(caught.value.errors) == {0, 2}
    assert "the detector few has no class 'zebra'" in str(caught.value.errors[0])
    assert "It knows 79" in str(caught.value.errors[0]) and not math.isnan(caught.value.scores["score"][1])


def test_scenes_by_captions(blip_path):
    params = {"captioner": blip_path, "beams": 1, "shortest": 0, "longest": 7}
    many = clips(sizes=[(SIDE, SIDE)] * 3, frames=4)
    captions = [[greedy(blip_path, frame, 7) for frame in clip] for clip in many]
    told = {word for clip in captions for caption in clip for word in caption.split()}
    assert len(told) > 2
    for wanted in [*sorted(told), "the alley"]:
        batch = Batch(frames=many, aux=[{"scene": wanted} for _ in many])
        for reading in ("compat", "strict"):
            found = load_evaluator("scene@blip", {**params, "rules": reading}, "cpu").score(batch)
            assert found["score"].tolist() == [rules.scene(each, wanted, reading).score for each in captions]
            assert found["frames"].tolist() == [4.0] * 3


def test_settings_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"shortest \(31\) is above longest \(30\)"):
        load_evaluator("scene@blip", {"shortest": 31}, "cpu")
    for name in ("object_class@rtdetr", "color@crop_clip"):
        with pytest.raises(ValueError, match="threshold"):
            load_evaluator(name, {"threshold": 1.0}, "cpu")
