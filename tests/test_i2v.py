"""i2v_subject and i2v_background: scores in float64, all ways of resizing, DreamSim's published layout."""

import json
import re
from pathlib import Path

import clip_reference as reference
import dino_kit
import numpy as np
import pytest
import torch
from clip_kit import meta, pil_resize
from dino_kit import SMALL, clip_of, dino_file, vit_keys
from PIL import Image
from safetensors.torch import save_file

from mmalign.backbones.dreamsim import CLIP_FILE, OPEN_CLIP_FILE, check_fits, squash
from mmalign.backbones.pil_pixels import pil_bicubic
from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import Batch, ItemErrors
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.known_weights import KNOWN
from mmalign.media import read_video, write_video
from mmalign.results import read_results
from mmalign.score import run
from mmalign.testing import check_evaluator

CLIP_NORM = np.stack([reference.MEAN, reference.STD])
SIZES = [(240, 400), (300, 230), (224, 224), (256, 390)]
RANK, ALPHA = 4, 3.0
NAMES = ["i2v_subject", "i2v_background"]


def lora_name(tower, block, half):
    return f"base_model.model.extractor_list.{tower}.model.blocks.{block}.attn.qkv.lora_{half}.weight"


def lora_keys(width=768, depth=12, rank=16):
    shapes = {"A": (rank, width), "B": (3 * width, rank)}
    return {lora_name(t, b, half): shape for t in range(3) for b in range(depth) for half, shape in shapes.items()}


def dreamsim_folder(folder, **sizes):
    """The authors' archive with small towers; what each tower is once LoRA is added, and the two projections."""
    sizes = {**SMALL, **sizes}
    towers = [dino_file(folder, seed=3, **sizes)]
    for number, name in enumerate((CLIP_FILE, OPEN_CLIP_FILE)):
        keys = {**vit_keys(**sizes), "pos_drop.weight": (sizes["width"],), "pos_drop.bias": (sizes["width"],)}
        state = dino_kit.random_state({**keys, "proj": (sizes["width"], 32)}, seed=4 + number)
        torch.save({"state_dict": state, "epoch": 3}, folder / name)
        towers.append(state)
    lora = dino_kit.random_state(lora_keys(sizes["width"], sizes["depth"], RANK), seed=9)
    (folder / "ensemble_lora").mkdir()
    save_file(lora, folder / "ensemble_lora" / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["qkv"]}
    (folder / "ensemble_lora" / "adapter_config.json").write_text(json.dumps({**told, "lora_dropout": 0.3}))
    changed = []
    for tower, state in enumerate(towers):
        state = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
        for block in range(sizes["depth"]):
            down, up = (lora[lora_name(tower, block, half)].double().numpy() for half in "AB")
            state[f"blocks.{block}.attn.qkv.weight"] = (
                state[f"blocks.{block}.attn.qkv.weight"] + ALPHA / RANK * up @ down
            )
        changed.append(state)
    return changed


def embedding(pixels, towers):
    """DreamSim's embedding in float64 of pixels [H, W, 3]."""
    dino, *clips = towers
    parts = [dino_kit.tokens((pixels - dino_kit.IMAGENET[0]) / dino_kit.IMAGENET[1], dino)[0]]
    for state, activation in zip(clips, (dino_kit.quick_gelu, dino_kit.gelu), strict=True):
        normed = (pixels - CLIP_NORM[0]) / CLIP_NORM[1]
        settings = {"epsilon": 1e-5, "activation": activation, "pre_norm": "pos_drop"}
        last = dino_kit.tokens(normed, state, **settings)[0]
        parts.append(dino_kit.layer_norm(last, state, "norm", 1e-5) @ state["proj"])
    together = np.concatenate(parts)
    return dino_kit.unit(together - together.mean())


def settings(name, folder):
    """(parameters, a picture's features in float64)."""
    if name == "i2v_subject":
        state = dino_file(folder)
        return {"checkpoint": str(folder)}, lambda pixels: dino_kit.dino_feature(pixels, state)
    towers = dreamsim_folder(folder)
    return {"checkpoint": str(folder), "dino_checkpoint": str(folder)}, lambda pixels: embedding(pixels, towers)


def new_size(name, height, width):
    if name == "i2v_background":
        return 224, 224
    return (256, int(256 * width / height)) if height <= width else (int(256 * height / width), 256)


def central(picture, name):
    if name == "i2v_background":
        return picture
    top, left = (round((side - 224) / 2) for side in picture.shape[:2])
    return picture[top : top + 224, left : left + 224]


def frame_pixels(name, clip, antialias):
    """Frames as the reference resizes them, as floats from 0 to 255."""
    for frame in clip.permute(0, 2, 3, 1).numpy().astype(np.float64):
        new = new_size(name, *frame.shape[:2])
        yield central(frame if frame.shape[:2] == new else reference.resize(frame, *new, antialias), name) / 255


def input_pixels(name, image):
    """The input image as the reference resizes it: by PIL, to 8 bits."""
    array = image.permute(1, 2, 0).numpy()
    new = new_size(name, *array.shape[:2])
    return central(np.array(Image.fromarray(array).resize(new[::-1], Image.Resampling.BICUBIC)), name) / 255.0


def clips_and_inputs(sizes=SIZES, frames=3):
    clips = [clip_of(frames + number, *size, seed=number) for number, size in enumerate(sizes)]
    others = [(180, 320), (420, 300), (224, 224), (512, 512)]
    inputs = [clip_of(1, *others[number % 4], seed=20 + number) for number in range(len(clips))]
    return clips, inputs


def batch_of(clips, inputs):
    return Batch(frames=clips, references=inputs, prompts=[""] * len(clips))


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_float64_for_inputs_of_other_sizes(tmp_path, name, antialias):
    params, feature = settings(name, tmp_path)
    clips, inputs = clips_and_inputs(SIZES[:3])
    evaluator = load_evaluator(name, {**params, "antialias": antialias}, "cpu")
    found = evaluator.score(batch_of(clips, inputs)).tolist()
    for score, clip, image in zip(found, clips, inputs, strict=True):
        features = np.stack([feature(pixels) for pixels in frame_pixels(name, clip, antialias)])
        assert score == pytest.approx(dino_kit.resembling(features, feature(input_pixels(name, image[0]))), abs=3e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_antialias_and_rules_change(tmp_path, name):
    params, feature = settings(name, tmp_path)
    clips, inputs = clips_and_inputs([(400, 640)])
    given = [{}, {"antialias": True}, {"rules": "strict"}]
    off, on, strict = (load_evaluator(name, {**params, **each}, "cpu").score(batch_of(clips, inputs)) for each in given)
    assert abs(float(off - on)) > 1e-3
    assert abs(float(strict - on)) > 1e-6, "a filter too, but in 8 bits"
    frames = np.stack([feature(input_pixels(name, frame)) for frame in clips[0]])
    expected = dino_kit.resembling(frames, feature(input_pixels(name, inputs[0][0])))
    assert float(strict) == pytest.approx(expected, abs=2e-4), "single pixels are a level off"
    # The clip that stands still on its input image is a perfect one only where both are resized alike.
    still = [inputs[0].expand(3, -1, -1, -1)]
    strict, compat = (
        load_evaluator(name, {**params, "rules": rules}, "cpu").score(batch_of(still, inputs)).item()
        for rules in ("strict", "compat")
    )
    assert strict == pytest.approx(1, abs=1e-6) and 0.6 <= compat < 1 - 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_change_nothing(tmp_path, name):
    params, _ = settings(name, tmp_path)
    evaluator = load_evaluator(name, params, "cpu")
    clips, inputs = clips_and_inputs(SIZES * 2, frames=2)
    eight = evaluator.score(batch_of(clips, inputs))
    alone = torch.cat([evaluator.score(batch_of([c], [i])) for c, i in zip(clips, inputs, strict=True)])
    torch.testing.assert_close(eight, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_items_that_cannot_be_scored(tmp_path, name):
    params, _ = settings(name, tmp_path)
    evaluator = load_evaluator(name, params, "cpu")
    clips = [clip_of(1, 64, 64), clip_of(3, 64, 64)]
    with pytest.raises(ItemErrors, match="the clip has 1 frame") as caught:
        evaluator.score(batch_of(clips, [clips[0], clips[0]]))
    assert list(caught.value.errors) == [0] and bool(caught.value.scores[1] > 0)
    with pytest.raises(ItemErrors, match="there is no input image; give the row"):
        evaluator.score(batch_of(clips[1:], []))


@pytest.mark.parametrize("name", NAMES)
def test_they_keep_the_contract(tmp_path, name):
    params, _ = settings(name, tmp_path)
    sizes = [(64, 64), (33, 70), (20, 60), (64, 64)]
    check_evaluator(name, params, sizes=sizes, prompts=["a"] * 4, processes=1)
    assert not evaluator_class(name).differentiable and "reference" in evaluator_class(name).needs


@pytest.mark.parametrize("size", [(240, 400), (333, 250), (1080, 1920), (100, 100), (224, 301), (255, 224)])
def test_squares_are_torchvisions(size):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import center_crop, resize

    from mmalign.backbones.clip_scoring import resize_crop

    clip = clip_of(1, *size)
    clip[..., ::7, ::5] = 255  # edges that overshoot
    for antialias in (False, True):
        expected = resize(clip.float(), [224, 224], InterpolationMode.BICUBIC, antialias=antialias) / 255
        found = squash(clip.float() / 255, 224, antialias=antialias, overshoot=True)
        assert (found - expected).abs().max() < 1e-5
        wide = resize(clip.float(), [256], InterpolationMode.BICUBIC, antialias=antialias)
        found = resize_crop(clip.float() / 255, 224, short=256, antialias=antialias, overshoot=True)
        assert (found - center_crop(wide, [224]) / 255).abs().max() < 1e-5
    image = Image.fromarray(clip[0].permute(1, 2, 0).numpy())
    expected = np.array(image.resize((224, 224), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(pil_bicubic(clip[0], (224, 224)).numpy(), expected)
    wide = center_crop(resize(image, 256, InterpolationMode.BICUBIC), [224])
    assert np.array_equal(pil_bicubic(clip[0], 256, 224).numpy(), np.array(wide).transpose(2, 0, 1))
    in_turn = pil_resize(clip[0].permute(1, 2, 0).numpy(), (224, 224)).transpose(2, 0, 1)
    near = (squash(clip.float() / 255, 224, levels=True)[0] * 255 - torch.from_numpy(in_turn)).abs()
    assert near.max() < 2.01 and (near > 0.5).float().mean() < 0.003


# ------------------------------------------------------------------------------------------------ DreamSim's files


def test_dreamsims_lora_has_the_published_keys():
    """As peft names them in the authors' class since 0.2.0: 12 blocks of three towers."""
    check_fits(meta(lora_keys()), Path("adapter_model.safetensors"))
    assert KNOWN["dreamsim-ensemble"].fits == ("mmalign.backbones.dreamsim:check_fits",)
    with pytest.raises(ValueError, match=r"changes blocks \[0, 1, .*, 10\] of DINO, which has 12"):
        check_fits(meta(lora_keys(depth=11)), Path("adapter_model.safetensors"))
    with pytest.raises(ValueError, match=r"block 0 of DINO has LoRA of \[16, 384\] and \[1152, 16\]"):
        check_fits(meta(lora_keys(width=384)), Path("adapter_model.safetensors"))
    older = {"base_model.model.base_model.model.blocks.8.attn.qkv.lora_A.weight": (32, 768)}
    with pytest.raises(ValueError, match=r"release v0\.2\.0-checkpoints"):
        check_fits(meta(older), Path("adapter_model.bin"))


def test_the_published_lora_names_are_pefts_on_three_towers():
    """peft itself on modules that are nested as the authors' are."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from torch import nn

    from mmalign.backbones.dino import VitSizes, build_vit

    class Extractor(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build_vit(VitSizes(64, 2, 64, 16, 2))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.extractor_list = nn.ModuleList(Extractor() for _ in range(3))

    told = get_peft_model(Model(), LoraConfig(r=RANK, lora_alpha=0.5, target_modules=["qkv"], bias="none"))
    found = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(told).items()}
    assert found == lora_keys(64, 2, RANK)


@pytest.mark.parametrize("missing", [CLIP_FILE, OPEN_CLIP_FILE, "ensemble_lora/adapter_config.json"])
def test_a_part_of_the_archive_that_is_missing_is_named(tmp_path, missing):
    params, _ = settings("i2v_background", tmp_path)
    (tmp_path / missing).unlink()
    cls = evaluator_class("i2v_background")
    with pytest.raises(ValueError, match=rf"DreamSim: \S*{re.escape(missing)} is missing; unzip the whole"):
        cls.weight_files(cls.Params(**params))


def test_the_files_decide_the_score(tmp_path):
    params, _ = settings("i2v_background", tmp_path)
    cls = evaluator_class("i2v_background")
    files = {str(file.relative_to(tmp_path)) for file in cls.weight_files(cls.Params(**params))}
    archive = {
        "ensemble_lora/adapter_model.safetensors",
        "ensemble_lora/adapter_config.json",
        CLIP_FILE,
        OPEN_CLIP_FILE,
    }
    assert files == archive | {"dino_vitbase16_pretrain.pth"}
    with pytest.raises(ValueError, match=r"dreamsim-ensemble weights: .*Download dreamsim_ensemble_checkpoint\.zip"):
        cls.weight_files(cls.Params(checkpoint=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "has to be a plain LoRA without biases; it sets use_dora"),
        ({"bias": "all"}, "has to be a plain LoRA"),
        ({"r": 0}, "r has to be a whole number from 1"),
        ({"lora_alpha": "much"}, "lora_alpha a number"),
    ],
)
def test_another_lora_is_refused(tmp_path, change, said):
    params, _ = settings("i2v_background", tmp_path)
    file = tmp_path / "ensemble_lora" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        load_evaluator("i2v_background", params, "cpu")


def test_another_tower_is_refused(tmp_path):
    params, _ = settings("i2v_background", tmp_path)
    (tmp_path / CLIP_FILE).write_bytes((tmp_path / "dino_vitbase16_pretrain.pth").read_bytes())
    with pytest.raises(ValueError, match=rf"{CLIP_FILE}: proj or pos_drop\.weight is missing"):
        load_evaluator("i2v_background", params, "cpu")
    lora = tmp_path / "ensemble_lora" / "adapter_model.safetensors"
    state = {name: torch.zeros(shape) for name, shape in lora_keys(SMALL["width"], SMALL["depth"], RANK).items()}
    del state[lora_name(1, 0, "B")]
    save_file(state, lora)
    with pytest.raises(ValueError, match=r"has half of extractor_list\.1 block 0"):
        load_evaluator("i2v_background", params, "cpu")


# ------------------------------------------------------------------------------------------------ a run


def test_a_run_scores_clips_with_their_input_images(tmp_path):
    """Files, a table, the runner: PNG and JPEG inputs of other sizes than the clips; one process and two."""
    dino_file(tmp_path, width=64, hidden=64)
    rows = []
    for number, ending in enumerate(("png", "jpg", "png")):
        clip = clip_of(4, 64, 96, seed=number)
        write_video(tmp_path / f"{number}.mp4", clip, 8.0)
        Image.fromarray(clip[0, :, :48, :80].permute(1, 2, 0).numpy()).save(tmp_path / f"{number}.{ending}")
        rows.append({"sample": str(number), "prompt": "a", "media": f"{number}.mp4", "modality": "video",
                     "reference": f"{number}.{ending}"})  # fmt: skip
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ("i2v_subject", "subject_consistency", "temporal_flickering")
    found = []
    for processes in (1, 2):
        config = ScoreConfig(
            table=tmp_path / "table.jsonl", output=tmp_path / f"scores-{processes}", batch_size=2,
            evaluators=tuple(
                EvaluatorSpec(name=name, params={} if "flicker" in name else {"checkpoint": str(tmp_path)})
                for name in names
            ), processes=processes, device="cpu",
        )  # fmt: skip
        results = read_results(run(config)).rows
        assert {row["status"] for row in results} == {"ok"}, [row["reason"] for row in results]
        found.append({(row["evaluator"], row["subscore"], row["sample"]): row["score"] for row in results})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 3 * 4
    for key, score in found[0].items():
        assert found[1][key] == pytest.approx(score, abs=2e-6)
    for number, ending in enumerate(("png", "jpg", "png")):
        clip = read_video(tmp_path / f"{number}.mp4").frames
        image = torch.from_numpy(np.array(Image.open(tmp_path / f"{number}.{ending}"))).permute(2, 0, 1)[None]
        alone = load_evaluator("i2v_subject", {"checkpoint": str(tmp_path)}, "cpu").score(batch_of([clip], [image]))
        assert found[0]["i2v_subject", "score", str(number)] == pytest.approx(alone.item(), abs=2e-6)
