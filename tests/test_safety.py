"""Safety: the safety checker, Q16 and NudeNet's detections, small and in published layouts, against separate passes."""

import json
import pickle

import clip_reference as reference
import numpy as np
import pytest
import torch
from clip_kit import hf_keys, meta
from safetensors.torch import load_file, save_file
from scorer_kit import TINY
from vbench_trust_kit import batch_of, checker_folder, clip_rows, clips_of, cropped, trust_clip

from mmalign.backbones import safety
from mmalign.backbones.safety import Q16, load_q16, load_safety_checker, nude_frames
from mmalign.discovery import evaluator_class, load_evaluator, parse_params
from mmalign.evaluation import ItemErrors
from mmalign.testing import check_evaluator

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Float64 tensors, and parameters of evaluators."""
    return trust_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(name="q16")
def _q16(tmp_path):
    path = tmp_path / "q16.safetensors"
    save_file({"prompts": torch.randn(2, TINY["embed_dim"], generator=torch.Generator().manual_seed(3))}, path)
    return path


def flags_of(folder, clip):
    """The class's own forward, frame by frame, on pixels by PIL."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    model = StableDiffusionSafetyChecker.from_pretrained(folder).eval()
    found = []
    for frame in clip:
        pixels = reference.normalise(cropped(frame)).float()
        _, bad = model(clip_input=pixels, images=[np.zeros((1, 1, 3))])
        found.append(bool(bad[0]))
    return found


@pytest.mark.parametrize("nested", [False, True])
def test_the_checker_is_the_class_own_in_both_layouts(tmp_path, nested):
    """Published files have the tower under vision_model.vision_model; the class of today has one level less."""
    folder = checker_folder(tmp_path, nested=nested)
    checker = load_safety_checker(folder=str(folder), device=CPU, dtype=torch.float32)
    clips = clips_of([(20, 28, 28), (20, 40, 50), (20, 60, 33)], smooth=True)
    found = [one.tolist() for one in checker.unsafe(clips)]
    assert found == [flags_of(folder, one) for one in clips]
    assert 0 < sum(map(sum, found)) < 60, "the case tells nothing"
    flat = load_safety_checker(folder=str(checker_folder(tmp_path / "flat")), device=CPU, dtype=torch.float32)
    assert found == [one.tolist() for one in flat.unsafe(clips)]


def test_special_care_lowers_the_thresholds(tmp_path):
    """One special concept that always is close decides for frames within a hundredth of a concept."""
    clips = clips_of([(40, 28, 28)], smooth=True)
    counts = []
    for special in (2.0, -2.0):
        folder = checker_folder(tmp_path / str(special), special=special)
        found = load_safety_checker(folder=str(folder), device=CPU, dtype=torch.float32).unsafe(clips)[0].tolist()
        assert found == flags_of(folder, clips[0])
        counts.append(sum(found))
    assert counts[0] < counts[1], "the case tells nothing"


def test_checkers_with_missing_tensors_are_refused(tmp_path):
    folder = checker_folder(tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in state.items() if name != "concept_embeds"}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match="1 missing: concept_embeds"):
        load_safety_checker(folder=str(folder), device=CPU, dtype=torch.float32)


def test_q16_is_the_nearer_of_two_embeddings(q16, tmp_path):
    prompts = load_file(q16)["prompts"].double()
    features = torch.randn(30, TINY["embed_dim"], generator=torch.Generator().manual_seed(1))
    due = []
    for row in features.double():
        cosines = [float(row @ one / row.norm() / one.norm()) for one in prompts]
        due.append(not cosines[0] > cosines[1])
    unit = features / features.norm(dim=1, keepdim=True)
    assert load_q16(checkpoint=q16, device=CPU, dtype=torch.float32).unsafe(unit).tolist() == due
    assert 0 < sum(due) < 30
    assert Q16(torch.ones(2, 4)).unsafe(torch.ones(1, 4) / 2).tolist() == [True], "as near to both is not safe"
    with open(tmp_path / "prompts.p", "wb") as file:
        pickle.dump(prompts.numpy(), file)
    with pytest.raises(ValueError, match="is a pickle, which could run any code"):
        load_q16(checkpoint=tmp_path / "prompts.p", device=CPU, dtype=torch.float32)
    save_file({"a": torch.zeros(3, 4)}, tmp_path / "three.safetensors")
    with pytest.raises(ValueError, match=r"holds one tensor \[2, width\]"):
        load_q16(checkpoint=tmp_path / "three.safetensors", device=CPU, dtype=torch.float32)


def test_nudenets_detections_are_read_as_the_library_gives_them():
    row = [[{"class": "BUTTOCKS_EXPOSED", "score": 0.8, "box": [1, 2, 3, 4]}], [], [{"class": "FACE_MALE", "score": 1}]]
    assert nude_frames(json.loads(json.dumps(row)), 3).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="a list of detections for each of the clip's 2 frames"):
        nude_frames(row, 2)
    with pytest.raises(ValueError, match="a detection has a class and a score"):
        nude_frames([[{"label": "x"}]], 1)


@pytest.mark.parametrize("rules", ["compat", "strict"])
def test_safety_counts_frames_that_any_of_the_three_calls_unsafe(clip, q16, tmp_path, rules):
    state, params = clip
    folder = checker_folder(tmp_path)
    clips = clips_of([(6, 28, 28), (7, 40, 50), (1, 33, 40), (4, 30, 30)], smooth=True)
    rows = [{"nudenet": [[{"class": "ANUS_EXPOSED", "score": 0.7}] if t % 3 == 0 else [] for t in range(len(one))]}
            for one in clips]  # fmt: skip
    every = {**params, "sd_checker": folder, "q16": q16}
    found = load_evaluator("safety", {**every, "rules": rules}, "cpu").score(batch_of(clips, aux=rows))
    prompts = load_file(q16)["prompts"].double()
    prompts /= prompts.norm(dim=1, keepdim=True)
    without = {"q16": [], "both": []}
    for place, one in enumerate(clips):
        safe = (clip_rows(state, one) @ prompts.T).double()
        asked = [not float(a) > float(b) for a, b in safe]
        checked = flags_of(folder, one)
        nude = [t % 3 == 0 for t in range(len(one))]
        unsafe = sum(a or b or c for a, b, c in zip(asked, checked, nude, strict=True))
        threshold = len(one) // 2
        due = unsafe < threshold if rules == "compat" else not unsafe > len(one) / 2
        assert [float(found[name][place]) for name in ("score", "unsafe", "frames")] == [due, unsafe, len(one)]
        without["q16"].append(sum(asked))
        without["both"].append(sum(a or b for a, b in zip(asked, checked, strict=True)))
    both = load_evaluator("safety@sd_q16", every, "cpu").score(batch_of(clips))
    assert both["unsafe"].tolist() == without["both"]
    alone = load_evaluator("safety@sd_q16", {**params, "q16": q16}, "cpu").score(batch_of(clips))
    assert alone["unsafe"].tolist() == without["q16"]


def test_safety_says_what_is_missing(clip, q16, tmp_path):
    cls = evaluator_class("safety@sd_q16")
    with pytest.raises(ValueError, match="give `sd_checker`, `q16` or both"):
        parse_params(cls, "safety@sd_q16", {})
    with pytest.raises(ValueError, match=r"sd_checker: the model folder .*none does not exist"):
        cls.weight_files(parse_params(cls, "safety@sd_q16", {"sd_checker": tmp_path / "none"}))
    save_file({"a": torch.randn(2, 9)}, tmp_path / "other.safetensors")
    wrong = load_evaluator("safety@sd_q16", {**clip[1], "q16": tmp_path / "other.safetensors"}, "cpu")
    with pytest.raises(ValueError, match="have 9 numbers and the CLIP gives 24"):
        wrong.score(batch_of(clips_of([(2, 28, 28)])))
    full = load_evaluator("safety", {**clip[1], "q16": q16, "sd_checker": checker_folder(tmp_path)}, "cpu")
    with pytest.raises(ItemErrors, match="nudenet has to hold a list of detections for each of the clip's 2 frames"):
        full.score(batch_of(clips_of([(2, 28, 28)])))


def test_safety_keeps_the_contract(clip, q16, tmp_path):
    params = {**clip[1], "q16": q16, "sd_checker": checker_folder(tmp_path)}
    sizes = ((64, 64), (33, 70), (2, 2))
    check_evaluator("safety@sd_q16", params, prompts=("a", "b", "c"), sizes=sizes, processes=1)


def refused(words, check, state, file):
    with pytest.raises(ValueError, match=words):
        check(state, file)


def test_the_published_checker_fits_at_its_size(tmp_path):
    """Names of the published file, ViT-L/14: the tower a level deeper than in the class of today."""
    from transformers import CLIPConfig

    config = CLIPConfig(
        vision_config={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                       "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "projection_dim": 768},
        projection_dim=768,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    keys = hf_keys(1024, 24, 768, 12, 768, 257)
    names = {f"vision_model.{name}": shape for name, shape in keys.items() if name.startswith("vision_model.")}
    names |= {"visual_projection.weight": (768, 1024), "vision_model.vision_model.embeddings.position_ids": (1, 257)}
    for name, count in (("concept", 17), ("special_care", 3)):
        names |= {f"{name}_embeds": (count, 768), f"{name}_embeds_weights": (count,)}
    state, file = meta(names), tmp_path / "config.json"
    safety.check_fits(state, file)
    refused("1 missing: concept_embeds$|1 missing: concept_embeds[^_]", safety.check_fits,
            {name: value for name, value in state.items() if name != "concept_embeds"}, file)  # fmt: skip
    refused("1 unexpected: stranger", safety.check_fits, {**state, "stranger": torch.empty(1, device="meta")}, file)
