"""Fitting networks that read picture and prompt at once: ImageReward's BLIP, and Qwen2-VL with special tokens."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blip_kit import TINY, blip_folder, vocabulary
from fitting_kit import CPU, PROMPTS, config, fit, pictures, table, tensors
from reward_family_kit import BRIGHT, CASES, EVALUATORS, SMALL, WEIGHTS, run_of, scored, task_at
from safetensors.torch import load_file
from training_kit import records

from mmalign.backbones.qwen2_vl_checkpoint import EMBEDDINGS, read_base
from mmalign.backbones.qwen2_vl_fitted import vlm_reward_files
from mmalign.discovery import load_evaluator
from mmalign.jobs import ScoreConfig
from mmalign.jobs_align import EvaluatorSpec
from mmalign.media import write_image
from mmalign.records import MediaRef
from mmalign.results import read_results
from mmalign.score import run as score
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.tasks.reward import RewardTask
from mmalign.testing import check_evaluator
from mmalign.testing.tiny_vlm import tiny_qwen2_vl
from mmalign.weights import scorer_of


@pytest.fixture(scope="module", name="pairs")
def _pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of which the brighter picture is preferred."""
    return table(tmp_path_factory.mktemp("pairs"), **BRIGHT)


@pytest.fixture(scope="module", name="bases")
def _bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bases")
    return {"image_reward": blip_folder(home / "blip").parent, "qwen2_vl": tiny_qwen2_vl(home / "vlm")}


@pytest.fixture(scope="module", name="fitted")
def _fitted(tmp_path_factory: pytest.TempPathFactory, pairs: Path, bases: dict[str, Path]) -> dict[str, Path]:
    """The export folder of a run of each family, six steps with a checkpoint at four."""
    home = tmp_path_factory.mktemp("fitted")
    return {family: fit(home / family, {"table": str(pairs)}, **run_of(family, bases[family])) for family in CASES}


# ------------------------------------------------------------------------------------------------------------ the loop


@pytest.mark.parametrize("family", CASES)
def test_brightness_is_learned(family: str, pairs: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    optim = (
        {"steps": 60, "batch_size": 8, "lr": 5e-4}
        if family == "image_reward"
        else {"steps": 40, "batch_size": 8, "lr": 3e-3}
    )
    run = run_of(family, bases[family], optim=optim)
    folder = fit(tmp_path / "run", {"table": str(pairs)}, **run)
    logged = records(folder.parent)
    losses = [record["loss"] for record in logged]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    images = tensors([pairs.parent / "images" / f"{i}.png" for i in range(16)])
    found = scored(family, folder, images, ["a circle"] * 16)
    order = np.argsort(np.argsort(found.numpy()))
    assert np.corrcoef(order, np.arange(16))[0, 1] > 0.9, "with a prompt that no pair had"


@pytest.mark.parametrize("family", CASES)
def test_resuming_ends_in_the_same_bytes(
    family: str, fitted: dict[str, Path], pairs: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Dropout and stochastic depth are on in both."""
    whole, stopped = fitted[family].parent, tmp_path / "run"
    shutil.copytree(whole, stopped)
    shutil.rmtree(stopped / "checkpoints" / "step-00000006")
    shutil.rmtree(stopped / "export")
    fit(stopped, {"table": str(pairs)}, resume=True, **run_of(family, bases[family]))
    for file in ("checkpoints/step-00000006/weights.safetensors", f"export/{WEIGHTS[family]}"):
        assert (stopped / file).read_bytes() == (whole / file).read_bytes(), file


@pytest.mark.parametrize("family", CASES)
def test_an_export_scores_as_the_trained_module(
    family: str, fitted: dict[str, Path], pairs: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Through `mmalign score`; of the VLM with its adapters beside the weights, and merged into them."""
    task = task_at(family, bases[family], pairs, fitted[family].parent)
    rng, media = np.random.default_rng(5), []
    for i, size in enumerate([(64, 64), (50, 90), (90, 51), (20, 28)]):
        write_image(tmp_path / f"{i}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        media.append(MediaRef(str(tmp_path / f"{i}.png")))
    with torch.no_grad():
        wanted = task.source.features(task.source.inputs(media, PROMPTS)).own
    rows = [{"sample": str(i), "media": m.file, "prompt": PROMPTS[i]} for i, m in enumerate(media)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name, key = EVALUATORS[family]
    spec = EvaluatorSpec(name=name, params={key: str(fitted[family])})
    output = score(ScoreConfig(table=tmp_path / "t.jsonl", output=tmp_path / "out", evaluators=(spec,), device="cpu"))
    written = {row["sample"]: row["score"] for row in read_results(output).rows}
    found = torch.tensor([written[row["sample"]] for row in rows])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert wanted.std() > 0.01, "the case tells nothing"


@pytest.mark.parametrize("family", CASES)
def test_an_ordinal_run_gives_expected_grades(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """The evaluator's `rating` is that of the run's own thresholds, beside the score that it is a function of."""
    media = pictures(tmp_path / "images", 6)
    rows = [
        PreferenceRow(PROMPTS[i], (media[2 * i], media[2 * i + 1]), scores={"q": grades})
        for i, grades in enumerate([(1, 3), (2, 5), (4, 4)])
    ]
    write_preferences(tmp_path / "t.jsonl", rows)
    loss, optim = {"kind": "ordinal"}, {"steps": 3, "batch_size": 3, "lr": 0.02}
    run = run_of(family, bases[family], loss=loss, optim=optim)
    data = {"table": str(tmp_path / "t.jsonl"), "ties": "soft"}
    folder = fit(tmp_path / "run", data, **run)
    kept = load_file(sorted((folder.parent / "checkpoints").glob("step-*"))[-1] / "weights.safetensors")
    first, steps = (kept[f"trained.thresholds.{name}"].double() for name in ("first", "steps"))
    thresholds = torch.cat([first[None], first + torch.nn.functional.softplus(steps).cumsum(0)])
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(3)]
    found = scored(family, folder, images, list(PROMPTS[:3]))
    assert list(found) == ["score", "rating"]
    wanted = 1 + torch.sigmoid(found["score"].double()[:, None] - thresholds).sum(1)
    torch.testing.assert_close(found["rating"].double(), wanted, rtol=0, atol=1e-5)
    assert scorer_of(folder) == EVALUATORS[family][0]


# ------------------------------------------------------------------------------------------------------ what is trained


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value.float(), after[name].float())}


def test_of_image_reward_only_the_last_layers_and_the_head_move(
    fitted: dict[str, Path], bases: dict[str, Path]
) -> None:
    before = torch.load(bases["image_reward"] / "ImageReward.pt", weights_only=True)
    changed = moved(before, load_file(fitted["image_reward"] / "ImageReward.safetensors"))
    parts = ("blip.visual_encoder.blocks.2.", "blip.visual_encoder.norm.", "blip.text_encoder.encoder.layer.1.", "mlp.")
    assert changed and all(name.startswith(parts) for name in changed)
    for part in parts:
        assert any(name.startswith(part) for name in changed), part
    assert {name for name in before if name.startswith("mlp.")} <= changed


def test_of_the_vlm_adapters_special_token_and_the_last_vision_groups_move(
    fitted: dict[str, Path], bases: dict[str, Path]
) -> None:
    before, after = read_base(bases["qwen2_vl"]), load_file(fitted["qwen2_vl"] / "model.safetensors")
    head = {name: after.pop(name) for name in list(after) if name.startswith("rm_head.")}
    old, new = before.pop(EMBEDDINGS), after.pop(EMBEDDINGS)
    assert list(head) == ["rm_head.weight"] and len(new) < len(old), "the base's spare rows are cut off"
    assert torch.equal(new[:-1], old[: len(new) - 1]), "weight decay too leaves ordinary tokens alone"
    start = old[: len(new) - 1].mean(0)
    assert (new[-1] - start).abs().max() > 1e-4
    changed = moved(before, after)
    linear = {name for name in before if "language_model.layers" in name and name.endswith("_proj.weight")}
    vision = {name for name in before if name.startswith(("model.visual.blocks.1.", "model.visual.merger."))}
    assert linear <= changed and changed <= linear | vision
    assert {name for name in vision if name.endswith("weight")} <= changed


def test_vision_and_language_are_unlocked_from_their_ends(bases: dict[str, Path], pairs: Path) -> None:
    def free(**reward: Any) -> set[str]:
        task = task_at("qwen2_vl", bases["qwen2_vl"], pairs, reward={"vlm": SMALL, **reward}, lora=None)
        names = (name for name, p in task.modules["vlm"].named_parameters() if p.requires_grad)
        return {name.removeprefix("reward.").removeprefix("model.") for name in names}

    everything = free()
    assert not any("embed_tokens" in name for name in everything) and {"rows", "rm_head.weight"} <= everything
    assert any("patch_embed" in name for name in everything) and "language_model.norm.weight" in everything
    assert free(unlocked_image=0, unlocked_text=0) == {"rows", "rm_head.weight"}
    merger = free(unlocked_image=1, unlocked_text=0) - {"rows", "rm_head.weight"}
    assert merger and all(name.startswith("visual.merger.") for name in merger)
    last = free(unlocked_image=0, unlocked_text=1) - {"rows", "rm_head.weight", "language_model.norm.weight"}
    assert last and all(name.startswith("language_model.layers.1.") for name in last)
    with pytest.raises(ValueError, match="there are 2 parts"):
        free(unlocked_text=3)


def test_a_step_in_bfloat16_with_checkpointing_trains_in_float32(
    pairs: Path, bases: dict[str, Path], tmp_path: Path
) -> None:
    optim = {"steps": 2, "batch_size": 4, "lr": 1e-3, "gradient_checkpointing": True}
    for family in CASES:
        changes = run_of(family, bases[family], optim=optim, precision="bf16", device="cpu")
        folder = fit(tmp_path / family, {"table": str(pairs)}, **changes)
        kept = load_file(folder.parent / "checkpoints" / "step-00000002" / "weights.safetensors")
        assert {value.dtype for value in kept.values()} == {torch.float32}
        stored = {name: value.dtype for name, value in load_file(folder / WEIGHTS[family]).items()}
        if family == "qwen2_vl":
            assert stored["model.language_model.layers.0.self_attn.q_proj.weight"] == torch.float32, "merged"
            assert stored["model.language_model.layers.0.input_layernorm.weight"] == torch.bfloat16, "frozen"
        images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
        assert torch.isfinite(scored(family, folder, images, ["a", "b"])).all()


def test_gradient_checkpointing_changes_no_gradient(pairs: Path, bases: dict[str, Path]) -> None:
    for family in CASES:
        found = []
        for on in (False, True):
            optim = {"steps": 1, "batch_size": 4, "gradient_checkpointing": on}
            task = task_at(family, bases[family], pairs, optim=optim)
            task.modules.train()
            torch.manual_seed(0)
            task.loss(task.load([(i, 0) for i in range(4)]))[0].backward()
            found.append({name: p.grad for name, p in task.modules.named_parameters() if p.requires_grad})
        for name, gradient in found[0].items():
            assert gradient is not None, f"{name} is trained and has no gradient"
            torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


def test_image_reward_from_scratch_needs_sizes_and_words_alone(pairs: Path, tmp_path: Path) -> None:
    vocabulary(tmp_path / "new")
    (tmp_path / "new" / "blip_config.json").write_text(TINY.model_dump_json())
    model = {"path": str(tmp_path / "new"), "family": "image_reward", "from_scratch": ["blip"]}
    run = run_of("image_reward", tmp_path, steps=2, model=model, reward={})
    folder = fit(tmp_path / "run", {"table": str(pairs)}, **run)
    check_evaluator("image_reward", {"checkpoint": str(folder)}, processes=1)
    (tmp_path / "new" / "blip_config.json").write_text(TINY.model_copy(update={"vocab_size": 30}).model_dump_json())
    with pytest.raises(ValueError, match="set vocab_size"):
        RewardTask(config(tmp_path / "x", {"table": str(pairs)}, **run), CPU)


def test_the_scorer_keeps_the_contract(fitted: dict[str, Path]) -> None:
    check_evaluator("vlm_reward", {"model": str(fitted["qwen2_vl"])}, processes=1, tolerance=1e-4,
                    sizes=[(28, 28), (50, 90), (90, 50), (28, 28)], prompts=["a", "b red", "c", "a"])  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- bad input

VLM = {"path": "x", "family": "qwen2_vl"}
BLIP = {"path": "x", "family": "image_reward"}
SHAPES = {"shapes": {"scenes": 4}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": BLIP, "reward": {"head": {"kind": "linear"}}}, "has a head of its own"),
        ({"model": BLIP, "reward": {"train": "head"}}, "reward.train: head needs a head"),
        ({"model": BLIP, "reward": {"resize": "crop"}}, "has its own pixels"),
        ({"model": BLIP, "reward": {"vlm": {"shared": True}}}, "is for model.family: qwen2_vl"),
        ({"model": BLIP, "lora": {"rank": 4}}, "lora is not for image_reward"),
        ({"model": BLIP, "loss": {"kind": "gaussian_bt"}}, "image_reward gives one number"),
        ({"model": BLIP, "loss": {"kind": "contrastive"}}, "contrastive trains two towers"),
        ({"model": BLIP, "loss": {"kind": "triplet"}}, "embeddings of two towers"),
        ({"model": VLM, "lora": {"rank": 4}, "reward": {"unlocked_text": 1}}, "drop reward.unlocked_text"),
        ({"model": VLM, "lora": {"rank": 4, "init": "x"}}, "give its export as model.path"),
        ({"model": {**VLM, "from_scratch": ["vlm"]}}, "not trained from nothing"),
        ({"model": VLM, "reward": {"vlm": {"shared": True}}}, "is for several tokens"),
        ({"model": VLM, "reward": {"vlm": {"tokens": ["<|a|>", "<|b|>"]}}}, "one token per axis"),
        ({"model": VLM, "reward": {"vlm": {"tokens": ["reward"]}}}, "write them as"),
        ({"model": VLM, "reward": {"vlm": {"tokens": ["<|a|>", "<|a|>"]}}}, "there twice"),
        ({"model": VLM, "reward": {"vlm": {"instruction": "rate <|reward|>"}}}, "{prompt} 0 times"),
        ({"model": VLM, "reward": {"vlm": {"instruction": "{prompt}"}}}, "<|reward|> 0 times"),
        ({"model": VLM, "reward": {"vlm": {"min_pixels": 9999999}}}, "is above max_pixels"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_its_reason(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config(tmp_path / "run", SHAPES, **{"reward": {}, **changes})


def test_bad_folders_say_what_is_missing(
    fitted: dict[str, Path], bases: dict[str, Path], pairs: Path, tmp_path: Path
) -> None:
    open_clip_head = tmp_path / "head"
    open_clip_head.mkdir()
    (open_clip_head / "reward.json").write_text('{"family": "open_clip"}')
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("vlm_reward", {"model": bases["qwen2_vl"]}, "model.family: qwen2_vl"),
        ("vlm_reward", {"model": open_clip_head}, "scored by fitted_reward"),
        ("vlm_reward", {"model": tmp_path / "none"}, "reward.json"),
        ("fitted_reward", {"model": fitted["qwen2_vl"]}, "vlm_reward"),
        ("fitted_reward", {"model": fitted["image_reward"]}, "image_reward"),
    ]
    for name, params, message in cases:
        with pytest.raises(ValueError, match=message):
            load_evaluator(name, params, "cpu")
    shutil.copytree(fitted["qwen2_vl"], tmp_path / "part")
    (tmp_path / "part" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        vlm_reward_files(tmp_path / "part")
    with pytest.raises(ValueError, match="no linear layer 'to_q'"):
        task_at("qwen2_vl", bases["qwen2_vl"], pairs, lora={"rank": 2, "targets": ["to_q"]})
