"""Fitting Qwen2-VL on several axes, with a spread, and on clips; what a request means by default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fitting_kit import CPU, PROMPTS, config, fit, pictures, table, tensors
from reward_family_kit import BRIGHT, SMALL, run_of, scored, task_at
from training_kit import records

from mmalign.backbones.qwen2_vl_fitted import own_scores
from mmalign.discovery import load_evaluator
from mmalign.jobs import ScoreConfig
from mmalign.jobs_align import EvaluatorSpec
from mmalign.jobs_reward import Vlm
from mmalign.media import write_video
from mmalign.records import MediaRef
from mmalign.results import read_results
from mmalign.score import run as score
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.tasks.reward import RewardTask
from mmalign.testing import check_evaluator
from mmalign.testing.tiny_vlm import tiny_qwen2_vl

AXES = ("VQ", "MQ", "text fit")
WAYS: dict[str, dict[str, Any]] = {
    "own outputs": {},
    "shared output": {"shared": True},
    "one token": {"tokens": ["<|reward|>"], "head": "ranknet"},
}


@pytest.fixture(scope="module", name="pairs")
def _pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("pairs"), **BRIGHT)


@pytest.fixture(scope="module", name="base")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2_vl(tmp_path_factory.mktemp("base") / "vlm")


@pytest.fixture(scope="module", name="judged")
def _judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bright is better for VQ, dark for MQ, which half of the rows lack; text fit is a tie."""
    folder = tmp_path_factory.mktemp("judged")
    rng, media, rows = np.random.default_rng(1), pictures(folder / "images"), []
    for i in range(24):
        a, b = sorted(rng.choice(len(media), 2, replace=False).tolist())
        label: dict[str, Any] = {"VQ": "B", "text fit": "same"} | ({"MQ": "A"} if i % 2 else {})
        rows.append(PreferenceRow(PROMPTS[i % 4], (media[a], media[b]), label=label))
    write_preferences(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


@pytest.mark.parametrize("way", WAYS)
def test_axes_are_learned_apart(way: str, judged: Path, base: Path, tmp_path: Path) -> None:
    data = {"table": str(judged), "axes": AXES, "ties": "soft"}
    reward = {"vlm": {**SMALL, **WAYS[way]}}
    run = run_of("qwen2_vl", base, steps=30, loss={"kind": "btt"}, reward=reward)
    folder = fit(tmp_path / "run", data, **run)
    last = records(folder.parent)[-1]
    assert last["accuracy/VQ"] > 0.8 and last["accuracy/MQ"] > 0.8
    images = tensors([judged.parent / "images" / f"{i}.png" for i in (0, 15)])
    found = scored("qwen2_vl", folder, images, ["a red circle"] * 2)
    assert list(found) == ["overall", *AXES]
    assert found["VQ"][1] > found["VQ"][0] and found["MQ"][1] < found["MQ"][0]
    torch.testing.assert_close(found["overall"], sum(found[axis] for axis in AXES) / 3)
    if way == "own outputs":
        check_evaluator(
            "vlm_reward",
            {"model": str(folder)},
            processes=1,
            tolerance=1e-4,
            prompts=PROMPTS[:2],
            sizes=((48, 48), (33, 70)),
        )
    told = json.loads((folder / "reward.json").read_text())
    assert len(told["tokens"]) == (1 if way == "one token" else 3)
    assert "<|text_fit_reward|>" in told["tokens"] or way == "one token"
    told["asked"]["axes"][2] = "overall"
    (folder / "reward.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="an axis is called 'overall'"):
        load_evaluator("vlm_reward", {"model": folder}, "cpu")


def test_one_axis_is_one_score(base: Path, tmp_path: Path) -> None:
    """Its labels and mask are [B] as the scores are; [B, 1] beside [B] would compare every pair with every label."""
    data = {"table": str(table(tmp_path / "one", label={"VQ": "A"})), "axes": ["VQ"]}
    model, reward = {"path": str(base), "family": "qwen2_vl"}, {"vlm": SMALL}
    task = RewardTask(config(tmp_path / "run", data, model=model, reward=reward), CPU)
    batch = task.load([(i, 0) for i in range(6)])
    with torch.no_grad():
        own = task.source.features(batch["inputs"]).own
        loss = task.loss(batch)[0]
    assert own.shape == (12,)
    torch.testing.assert_close(loss, torch.log1p(torch.exp(own[6:] - own[:6])).mean(), rtol=1e-5, atol=1e-6)


def test_outputs_at_tokens_become_scores() -> None:
    rewards = torch.arange(12.0).reshape(2, 2, 3)
    assert torch.equal(own_scores(rewards[:, :1]), rewards[:, 0])
    assert torch.equal(own_scores(rewards[:, :1, :1]), torch.tensor([0.0, 6.0]))
    assert torch.equal(own_scores(rewards[:, :, :1]), torch.tensor([[0.0, 3.0], [6.0, 9.0]]))
    assert torch.equal(own_scores(rewards[:, :, :2]), torch.tensor([[0.0, 4.0], [6.0, 10.0]]))


def test_a_gaussian_gives_its_spread_and_goes_on_from_its_export(pairs: Path, base: Path, tmp_path: Path) -> None:
    reward, loss = {"vlm": {**SMALL, "head": "ranknet"}}, {"kind": "gaussian_bt"}
    run = run_of("qwen2_vl", base, steps=2, reward=reward, loss=loss)
    folder = fit(tmp_path / "run", {"table": str(pairs)}, **run)
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    found = scored("qwen2_vl", folder, images, ["a", "b"])
    assert list(found) == ["score", "spread"] and (found["spread"] > 0).all()
    again = task_at("qwen2_vl", folder, pairs, reward=reward, loss=loss)
    media = [MediaRef(str(pairs.parent / "images" / f"{i}.png")) for i in range(2)]
    with torch.no_grad():
        own = again.source.features(again.source.inputs(media, ["a", "b"])).own
    images = tensors([Path(medium.file) for medium in media])
    torch.testing.assert_close(own[:, 0], scored("qwen2_vl", folder, images, ["a", "b"])["score"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="was fitted with head"):
        task_at("qwen2_vl", folder, pairs)


def test_clips_are_read_where_asked(base: Path, tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), []
    for i in range(4):
        level = 30 + 50 * i
        frames = torch.from_numpy(rng.integers(level, level + 20, (8, 3, 56, 56), dtype=np.uint8))
        write_video(tmp_path / f"{i}.mp4", frames, fps=4)
    for a, b in ((0, 1), (1, 2), (2, 3), (0, 3)):
        media = (MediaRef(str(tmp_path / f"{a}.mp4")), MediaRef(str(tmp_path / f"{b}.mp4")))
        rows.append(PreferenceRow("a red circle", media, label={"overall": "B"}))
    write_preferences(tmp_path / "pairs.jsonl", rows)
    data = {"table": str(tmp_path / "pairs.jsonl")}
    optim = {"steps": 2, "batch_size": 4, "lr": 1e-3}
    reward = {"vlm": {**SMALL, "media": "video"}}
    folder = fit(tmp_path / "run", data, **run_of("qwen2_vl", base, reward=reward, optim=optim))
    task = task_at("qwen2_vl", base, tmp_path / "pairs.jsonl", folder.parent, reward=reward, optim=optim)
    inputs = task.source.inputs(rows[0].media, ["a red circle"] * 2)
    assert inputs["requests"][0].grid[0] == 2, "four frames, two by two"
    with torch.no_grad():
        wanted = task.source.features(inputs).own
    lines = [{"sample": str(i), "media": m.file, "prompt": "a red circle"} for i, m in enumerate(rows[0].media)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spec = EvaluatorSpec(name="vlm_reward", params={"model": str(folder)})
    output = score(ScoreConfig(table=tmp_path / "t.jsonl", output=tmp_path / "out", evaluators=(spec,), device="cpu"))
    written = {row["sample"]: row["score"] for row in read_results(output).rows}
    torch.testing.assert_close(torch.tensor([written["0"], written["1"]]), wanted, rtol=1e-4, atol=1e-5)
    still = task_at("qwen2_vl", base, tmp_path / "pairs.jsonl")
    with pytest.raises(ValueError, match=r"set reward\.vlm\.media: video"):
        still.source.inputs(rows[0].media, ["a"] * 2)


def test_defaults_of_a_request() -> None:
    tokens, text = Vlm().asked(())
    assert tokens == ("<|reward|>",) and text.endswith("overall: <|reward|>") and text.count("{prompt}") == 1
    tokens, text = Vlm(media="video").asked(("VQ", "a b"))
    assert tokens == ("<|VQ_reward|>", "<|a_b_reward|>") and text.endswith("VQ: <|VQ_reward|>\na b: <|a_b_reward|>")
