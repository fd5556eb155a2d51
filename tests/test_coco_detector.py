"""Detectors and captioners of transformers as VBench's substitutes: their folders, arithmetic, evaluators."""

import functools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import transformers
from scorer_kit import TINY, clip_folder
from vbench_kit import DEC, SIDE, WORDS, blip_folder, clips, rtdetr_folder

from mmalign.backbones.captioner import Captioner
from mmalign.backbones.coco_detector import CocoDetector, coco_name
from mmalign.backbones.mask2former import COCO
from mmalign.backbones.vlm_fits import check_folder
from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import Backbones, Batch, ItemErrors
from mmalign.known_weights import KNOWN
from mmalign.testing import check_evaluator
from mmalign.vbench import rules

CPU = torch.device("cpu")
SUITE = Path(__file__).resolve().parents[2] / "shared" / "data" / "vbench" / "VBench_full_info.json"
LEAST = 0.92  # about the middle of what the small detector says


@pytest.fixture(scope="module")
def detector_path(tmp_path_factory):
    return rtdetr_folder(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def detector(detector_path):
    return CocoDetector(detector_path, CPU)


@pytest.fixture(scope="module")
def blip_path(tmp_path_factory):
    return blip_folder(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def clip_params(tmp_path_factory):
    path = clip_folder(tmp_path_factory.mktemp("clip"), "open_clip_pytorch_model.bin", {**TINY, "quick_gelu": True})
    return {"clip_checkpoint": path, "model": str(path.parent)}


# ------------------------------------------------------------------------------------------------ detections


@functools.cache
def doubled(name, folder):
    return getattr(transformers, name).from_pretrained(folder).double().eval()


def expected_objects(folder, frame, least):
    """From the network's raw answers, by loops in float64; the frame needs no resizing."""
    model = doubled("RTDetrV2ForObjectDetection", folder)
    with torch.no_grad():
        output = model(pixel_values=frame[None].double() / 255)
    pairs = []
    for query, logits in enumerate(output.logits[0].tolist()):
        pairs += [(1 / (1 + math.exp(-value)), query, label) for label, value in enumerate(logits)]
    pairs.sort(reverse=True)
    height, width = frame.shape[-2:]
    found = []
    for score, query, label in pairs[: len(output.logits[0])]:  # as many pairs as there are queries
        if score > least:
            x, y, w, h = output.pred_boxes[0, query].tolist()
            box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            found.append((COCO[label], box, score))
    return found


def test_objects_equal_the_networks_answers_by_hand(detector_path, detector):
    frames = clips(sizes=[(SIDE, SIDE)])[0]
    kinds = set()
    for frame, found in zip(frames, detector.detect(list(frames), LEAST), strict=True):
        expected = expected_objects(detector_path, frame, LEAST)
        assert [one[0] for one in found] == [one[0] for one in expected] and 0 < len(found) < 7
        for one, other in zip(found, expected, strict=True):
            assert one[1] == pytest.approx(other[1], abs=1e-2) and one[2] == pytest.approx(other[2], abs=1e-4)
        kinds |= {one[0] for one in found}
    assert len(kinds) > 1, "the case tells nothing of classes"


def test_boxes_are_of_the_frames_own_size(detector):
    (frame,) = clips(sizes=[(SIDE, SIDE)], frames=1)[0]
    large = frame.repeat_interleave(3, -1).repeat_interleave(2, -2)  # 128 x 192
    (small,), (wide,) = detector.detect([frame], 0.5), detector.detect([large], 0.5)
    assert all(box[2] <= 2 * SIDE for _, box, _ in small)
    assert max(box[2] for _, box, _ in wide) > 2 * SIDE, "192 pixels wide"
    assert max(box[3] for _, box, _ in wide) <= 2 * SIDE + 10, "128 pixels high"


def test_objects_depend_on_no_other_frame(detector):
    frames = [frame for clip in clips(sizes=((SIDE, SIDE), (40, 90), (SIDE, SIDE), (5, 300))) for frame in clip]
    together = detector.detect(frames * 2, 0.5)
    assert len(together) == 2 * len(frames)
    for frame, found in zip(frames, together[: len(frames)], strict=True):
        (alone,) = detector.detect([frame], 0.5)
        assert [one[0] for one in alone] == [one[0] for one in found]
        for one, other in zip(alone, found, strict=True):
            assert one[1] == pytest.approx(other[1], abs=1e-3) and one[2] == pytest.approx(other[2], abs=1e-5)
        assert [one[2] for one in found] == sorted((one[2] for one in found), reverse=True)
    assert detector.detect([], 0.5) == []


def other_detector(folder, kind):
    from transformers import (
        DetrConfig,
        DetrForObjectDetection,
        DetrImageProcessor,
        DFineConfig,
        DFineForObjectDetection,
        HGNetV2Config,
        ResNetConfig,
        RTDetrImageProcessor,
    )

    labels = {0: "N/A", 1: "person", 2: "TVMonitor", 3: "hair_dryer"}
    common = {"id2label": labels, "d_model": 16, "num_queries": 5, "decoder_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "detr":
            backbone = ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], layer_type="basic"
            )
            config = DetrConfig(
                backbone_config=backbone, use_timm_backbone=False, backbone=None, use_pretrained_backbone=False,
                encoder_layers=1, encoder_ffn_dim=16, encoder_attention_heads=2, decoder_ffn_dim=16,
                decoder_attention_heads=2, **common,
            )  # fmt: skip
            model, processor = DetrForObjectDetection(config), DetrImageProcessor(size={"height": 32, "width": 32})
        else:
            backbone = HGNetV2Config(
                stage_in_channels=[8, 8, 16, 16], stage_mid_channels=[4, 4, 8, 8], stage_out_channels=[8, 16, 16, 16],
                stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1], stem_channels=[3, 4, 8],
                hidden_sizes=[8, 16, 16, 16],
                out_features=["stage2", "stage3", "stage4"], stage_downsample=[False, True, True, True],
                stage_light_block=[False, False, True, True], stage_kernel_size=[3, 3, 5, 5],
            )  # fmt: skip
            config = DFineConfig(
                backbone_config=backbone, encoder_hidden_dim=16, encoder_in_channels=[16, 16, 16], encoder_layers=1,
                encoder_ffn_dim=16, encoder_attention_heads=2, decoder_in_channels=[16, 16, 16], decoder_ffn_dim=16,
                decoder_attention_heads=2, num_denoising=0, **common,
            )  # fmt: skip
            model = DFineForObjectDetection(config)
            processor = RTDetrImageProcessor(size={"height": 64, "width": 64})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["detr", "d_fine"])
def test_other_detectors_are_folders_too(tmp_path, kind):
    detector = CocoDetector(other_detector(tmp_path, kind), CPU)
    assert detector.names == {"N/A", "person", "tv", "hair drier"}
    frames = [frame for clip in clips(sizes=((SIDE, SIDE), (40, 90))) for frame in clip]
    for frame, found in zip(frames, detector.detect(frames, 0.01), strict=True):
        assert found
        (alone,) = detector.detect([frame], 0.01)
        assert sorted(one[0] for one in alone) == sorted(one[0] for one in found)
        assert sorted(one[2] for one in alone) == pytest.approx(sorted(one[2] for one in found), abs=1e-5)


def test_classes_have_cocos_names(detector):
    assert detector.names == set(COCO), "the folder has some of Pascal VOC's"
    for label, name in (
        ("tvmonitor", "tv"),
        ("Television", "tv"),
        ("hair_dryer", "hair drier"),
        ("Cell Phone", "cell phone"),
    ):
        assert coco_name(label) == name
    assert coco_name("Zeppelin") == "Zeppelin"


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


@pytest.mark.skipif(not SUITE.is_file(), reason="VBench_full_info.json is not here")
def test_a_detector_on_coco_knows_every_name_of_the_suite(detector):
    for row in json.loads(SUITE.read_text(encoding="utf-8")):
        aux = row.get("auxiliary_info", {})
        if "object_class" in aux:
            detector.check_names([aux["object_class"]["object"]])
        if "multiple_objects" in aux:
            detector.check_names(rules.two_objects(aux["multiple_objects"]["object"]))
        if "spatial_relationship" in aux:
            inner = aux["spatial_relationship"]["spatial_relationship"]
            detector.check_names([inner["object_a"], inner["object_b"]])
        if "color" in aux:
            detector.check_names([rules.object_of(row["prompt_en"], aux["color"]["color"])])


# ------------------------------------------------------------------------------------------------ evaluators

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


# ------------------------------------------------------------------------------------------------ captions


def greedy(folder, frame, longest):
    """Word after word, the likeliest; the picture needs no resizing."""
    model = doubled("BlipForConditionalGeneration", folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
    words = [DEC]
    with torch.no_grad():
        image = model.vision_model((frame.double() / 255 - mean)[None] / std).last_hidden_state
        for _ in range(longest):
            output = model.text_decoder(input_ids=torch.tensor([words]), encoder_hidden_states=image)
            words.append(int(output.logits[0, -1].argmax()))
            if WORDS[words[-1] : words[-1] + 1] == ("[SEP]",):
                break
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    text = " ".join(WORDS[word] for word in words[1:] if word < len(WORDS) and WORDS[word] not in special)
    return text.replace(" ##", "")


def test_captions_equal_a_loop_over_words(blip_path):
    captioner = Captioner(blip_path, CPU)
    frames = list(clips(sizes=[(SIDE, SIDE)], frames=5)[0])
    found = captioner.captions(frames, 1, 0, 7)
    assert found == [greedy(blip_path, frame, 7) for frame in frames]
    assert len(set(found)) > 2, "the case tells nothing"
    beams = captioner.captions(frames, 3, 6, 8)
    assert beams == [captioner.captions([frame], 3, 6, 8)[0] for frame in frames] != found
    assert captioner.captions([], 1, 0, 5) == []


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


# ------------------------------------------------------------------------------------------------ folders


def test_folders_that_do_not_fit_are_refused(tmp_path, detector_path, blip_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"rtdetr-v2-r50 weights: .* does not exist.*set `detector`"):
        evaluator_class("object_class@rtdetr").weight_files(
            evaluator_class("object_class@rtdetr").Params(detector=tmp_path / "none")
        )
    with pytest.raises(ValueError, match="detector: "):
        CocoDetector(blip_path, CPU)
    with pytest.raises(ValueError, match="captioner: "):
        Captioner(detector_path, CPU)
    folder = rtdetr_folder(tmp_path / "cut")
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "enc_output" in name)
    state["stranger"] = state.pop(name)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 missing: {name}; 1 unexpected: stranger"):
        CocoDetector(folder, CPU)
    (folder / "preprocessor_config.json").unlink()
    save_file(load_file(detector_path / "model.safetensors"), folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="detector: "):
        CocoDetector(folder, CPU)


def test_a_detector_that_would_ask_the_hub_is_refused(tmp_path, detector_path):
    config = json.loads((detector_path / "config.json").read_text(encoding="utf-8"))
    old = {**config, "model_type": "detr", "backbone": "resnet50", "backbone_config": None, "use_timm_backbone": True}
    (tmp_path / "config.json").write_text(json.dumps(old), encoding="utf-8")
    for name in ("object_class@rtdetr", "color@crop_clip"):
        cls = evaluator_class(name)
        params = cls.Params(detector=tmp_path, **({"clip_checkpoint": __file__} if name[0] == "c" else {}))
        with pytest.raises(ValueError, match=r"names its backbone \(resnet50\).*no_timm"):
            cls.weight_files(params)


def test_every_file_that_decides_counts(detector_path, blip_path):
    for name, params, path in (
        ("object_class@rtdetr", {"detector": detector_path}, detector_path),
        ("scene@blip", {"captioner": blip_path}, blip_path),
    ):
        cls = evaluator_class(name)
        files = {file.name for file in cls.weight_files(cls.Params(**params))}
        assert files == {file.name for file in path.iterdir()} and {"config.json", "model.safetensors"} <= files


@pytest.mark.parametrize("name", ["rtdetr-v2-r50", "blip-captioning-large"])
def test_published_folders_are_checked_from_their_names_and_shapes(tmp_path, name):
    """At real size, on the meta device: what the library builds of a config of these sizes fits, less does not."""
    from transformers import BlipConfig, BlipForConditionalGeneration, RTDetrV2Config, RTDetrV2ForObjectDetection

    if name.startswith("rtdetr"):
        config = RTDetrV2Config(id2label=dict(enumerate(COCO)))
        kind, expected = RTDetrV2ForObjectDetection, 42_800_000
    else:
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        text = {"vocab_size": 30524, "encoder_hidden_size": 1024}
        config = BlipConfig(vision_config={**vision, "image_size": 384}, text_config=text)
        kind, expected = BlipForConditionalGeneration, 470_000_000
    with torch.device("meta"):
        model = kind(config)
    assert sum(value.numel() for value in model.state_dict().values()) == pytest.approx(expected, rel=0.03)
    config.save_pretrained(tmp_path)
    known = KNOWN[name]
    (function, *more) = known.fits
    assert function == "mmalign.backbones.vlm_fits:check_folder" and known.keys == "transformers"
    state = dict(model.state_dict())
    check_folder(state, tmp_path / "config.json", *more)
    gone = next(key for key in state if key.endswith("layers.0.self_attn.qkv.weight") or "enc_output.0.weight" in key)
    with pytest.raises(ValueError, match=f"1 missing: {gone}"):
        check_folder({key: value for key, value in state.items() if key != gone}, tmp_path / "config.json", *more)
