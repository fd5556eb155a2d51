"""Detectors and captioners of transformers: their arithmetic, and the folders that they are read from."""

import json

import pytest
import torch
from public_kit import VBENCH, needs
from vbench_kit import LEAST, SIDE, blip_folder, clips, expected_objects, greedy, rtdetr_folder

from mmalign.backbones.captioner import Captioner
from mmalign.backbones.coco_detector import CocoDetector, coco_name
from mmalign.backbones.mask2former import COCO
from mmalign.backbones.vlm_fits import check_folder
from mmalign.discovery import evaluator_class
from mmalign.known_weights import KNOWN
from mmalign.vbench import rules

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def detector_path(tmp_path_factory):
    return rtdetr_folder(tmp_path_factory.mktemp("detector"))


@pytest.fixture(scope="module")
def detector(detector_path):
    return CocoDetector(detector_path, CPU)


@pytest.fixture(scope="module")
def blip_path(tmp_path_factory):
    return blip_folder(tmp_path_factory.mktemp("blip"))


# ------------------------------------------------------------------------------------------------ detections


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


@needs(VBENCH)
def test_a_detector_on_coco_knows_every_name_of_the_suite(detector):
    for row in json.loads(VBENCH.read_text(encoding="utf-8")):
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


# ------------------------------------------------------------------------------------------------ captions


def test_captions_equal_a_loop_over_words(blip_path):
    captioner = Captioner(blip_path, CPU)
    frames = list(clips(sizes=[(SIDE, SIDE)], frames=5)[0])
    found = captioner.captions(frames, 1, 0, 7)
    assert found == [greedy(blip_path, frame, 7) for frame in frames]
    assert len(set(found)) > 2, "the case tells nothing"
    beams = captioner.captions(frames, 3, 6, 8)
    assert beams == [captioner.captions([frame], 3, 6, 8)[0] for frame in frames] != found
    assert captioner.captions([], 1, 0, 5) == []


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
