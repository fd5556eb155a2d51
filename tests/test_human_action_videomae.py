"""human_action@videomae: transformers' real classes on small random weights, in the layout that is published."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    TimesformerConfig,
    TimesformerForVideoClassification,
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VivitConfig,
    VivitForVideoClassification,
)
from viclip_kit import clips_of

from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch, ItemErrors, Middle
from mmalign.testing import check_evaluator
from mmalign.vbench.actions import kinetics_400

NAMES = ["abseiling", "riding a bike", "yoga", "marching", "playing harp", "crying", "zumba"]
BIKE = "A person is riding a bike"
# As MCG-NJU/videomae-base-finetuned-kinetics has it, but for the sizes.
PROCESSOR = {
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "VideoMAEImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 32},
}


def folder_of(folder, kind=VideoMAEForVideoClassification, config=VideoMAEConfig, names=NAMES, seed=0, **sizes):
    torch.manual_seed(seed)
    sizes = {"image_size": 32, "patch_size": 16, "num_frames": 16, "hidden_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "intermediate_size": 48, "initializer_range": 0.3} | sizes  # fmt: skip
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: place for place, name in enumerate(names)}}
    model = kind(config(**sizes, **labels))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    return model.eval()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videomae")
    return folder, folder_of(folder)


def test_probabilities_are_the_models_own_on_pixels_made_by_hand(small):
    folder, model = small
    evaluator = load_evaluator("human_action@videomae", {"model": folder}, "cpu")
    assert type(evaluator).frames == Middle(16) and evaluator.classifier.classes == tuple(NAMES)
    clips = clips_of([(16, 32, 32), (16, 32, 41)])
    found = evaluator.score(Batch(frames=clips, prompts=[BIKE, "a person is CRYING."]))
    for row, (clip, label) in enumerate(zip(clips, (1, 5), strict=True)):
        left = (clip.shape[-1] - 32) // 2
        pixels = clip.numpy()[..., left : left + 32].transpose(0, 2, 3, 1) / 255.0
        pixels = (pixels - np.array(PROCESSOR["image_mean"])) / np.array(PROCESSOR["image_std"])
        with torch.no_grad():
            logits = model(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float()[None]).logits[0].double().numpy()
        likely = np.exp(logits) / np.exp(logits).sum()
        assert float(found["probability"][row]) == pytest.approx(likely[label], abs=1e-5)
        assert float(found["score"][row]) == float((np.argsort(-logits)[:5] == label).any())


def test_the_top_five_and_no_threshold(small, tmp_path):
    _, model = small
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) / 10)
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    evaluator = load_evaluator("human_action@videomae", {"model": tmp_path}, "cpu")
    prompts = [f"A person is {name}" for name in NAMES]
    found = evaluator.score(Batch(frames=clips_of([(16, 40, 50)] * 7), prompts=prompts))
    assert found["score"].tolist() == [1, 1, 1, 1, 1, 0, 0]
    with pytest.raises(ItemErrors, match="'swimming' is none of the classifier's 7 classes") as error:
        evaluator.score(Batch(frames=clips_of([(16, 40, 50)] * 2), prompts=["A person is swimming", BIKE]))
    assert error.value.scores["score"][1] == 1


def test_other_families_and_numbers_of_frames(tmp_path):
    (tmp_path / "t").mkdir()
    folder_of(tmp_path / "t", TimesformerForVideoClassification, TimesformerConfig, num_frames=8)
    evaluator = load_evaluator("human_action@videomae", {"model": tmp_path / "t"}, "cpu")
    clip = clips_of([(16, 40, 50)])[0]
    whole = evaluator.score(Batch(frames=[clip], prompts=[BIKE]))["probability"]
    half = evaluator.score(Batch(frames=[clip[Middle(8).indices(16, 0.0)]], prompts=[BIKE]))["probability"]
    assert torch.equal(whole, half)
    (tmp_path / "v").mkdir()
    folder_of(tmp_path / "v", VivitForVideoClassification, VivitConfig, num_frames=32)
    with pytest.raises(ValueError, match="reads 32 frames, and 16 are taken"):
        load_evaluator("human_action@videomae", {"model": tmp_path / "v"}, "cpu")


def test_folders_that_are_none_say_why(small, tmp_path):
    with pytest.raises(ValueError, match=r"the model folder .* does not exist"):
        load_evaluator("human_action@videomae", {"model": tmp_path / "absent"}, "cpu")
    folder_of(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "vit"}), encoding="utf-8")
    with pytest.raises(ValueError, match="no video classifier of the type vit"):
        load_evaluator("human_action@videomae", {"model": tmp_path}, "cpu")
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"missing: videomae\.encoder\.layer\.2"):
        load_evaluator("human_action@videomae", {"model": tmp_path}, "cpu")


def test_classes_of_kinetics_in_any_order(tmp_path):
    names = sorted(kinetics_400())
    folder_of(tmp_path, names=names)
    evaluator = load_evaluator("human_action@videomae", {"model": tmp_path}, "cpu")
    assert evaluator._class(BIKE) == names.index("riding a bike") != kinetics_400().index("riding a bike")


def test_the_contract(small):
    check_evaluator("human_action@videomae", {"model": str(small[0])}, prompts=[BIKE, "A person is yoga", BIKE],
                    sizes=[(40, 60), (33, 70), (64, 40)])  # fmt: skip
