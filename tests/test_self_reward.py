"""Implicit rewards, best of several answers by them, and self-rewarded pairs with their consistency."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mllm_kit import answer_settings, mllm_folder, write_rows
from peft import PeftModel
from scipy.stats import kendalltau
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign import build_answers, respond, train
from mmalign.builders import consistency
from mmalign.config import ConfigError, build
from mmalign.jobs_build import BuildConfig
from mmalign.jobs_respond import RespondConfig
from mmalign.losses import answer_terms, answers
from mmalign.media import read_image
from mmalign.media_table import MediaRow, read_media_table, write_media_table
from mmalign.mllm.encode import Media
from mmalign.mllm.formats import read_answers
from mmalign.mllm.implicit import BASE, Implicit
from mmalign.mllm.rows import Part, Turn

CPU = torch.device("cpu")
FAMILIES = ("qwen2_5_vl", "llava")


@pytest.fixture(scope="module", name="table")
def _table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module", name="made", params=FAMILIES)
def _made(
    request: pytest.FixtureRequest, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """A model and the LoRAs of two rounds."""
    folder = tmp_path_factory.mktemp(request.param)
    model = mllm_folder(folder / request.param, request.param)
    runs = [
        train.run(answer_settings(folder / f"round{seed}", model, table, optim__lr=3e-2, seed=seed)) / "export"
        for seed in (0, 1)
    ]
    return model, runs[0], runs[1]


def turns(text: str) -> tuple[Turn, ...]:
    return (Turn("user", (Part("image"), Part("text", text))),)


def test_a_reward_is_the_mean_log_ratio_of_stock_models(made: tuple[Path, Path, Path], table: Path) -> None:
    folder, lora, _ = made
    image = torch.from_numpy(read_image(table.parent / "0-0.png")).permute(2, 0, 1)
    told = ["A red circle.", "No circle at all, it is blue"]
    judge = Implicit(folder, {"lora": lora}, dtype=torch.float64, device=CPU)
    found = judge.means(turns("What is it?"), Media((image,)), told)
    framed = judge.encoder.chat.frame(turns("What is it?"))
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(
        text=[framed.text], images=[image], return_tensors="pt", **judge.encoder.chat.special(framed.text)
    )
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    tuned = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64)
    tuned = PeftModel.from_pretrained(tuned, lora).merge_and_unload().eval()
    for place, text in enumerate(told):
        ids = torch.tensor([judge.encoder.chat.answer(framed, text)])
        whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = torch.cat([whole["mm_token_type_ids"], torch.zeros_like(ids)], 1)
        means = []
        for model in (plain, tuned):
            with torch.no_grad():
                logits = model(**whole).logits[:, -ids.shape[1] - 1 : -1].log_softmax(-1)
            means.append(float(logits.gather(2, ids[..., None]).mean()))
        assert found[BASE][place] == pytest.approx(means[0], rel=1e-6)
        assert found["lora"][place] == pytest.approx(means[1] - means[0], rel=1e-5)
    alone = judge.means(turns("What is it?"), Media((image,)), told[1:])
    assert alone["lora"][0] == pytest.approx(found["lora"][1], rel=1e-9)


def test_kendall_is_scipys() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 8):
        one, other = rng.normal(size=(2, count))
        assert consistency.kendall(one, other) == pytest.approx(kendalltau(one, other).statistic)
    assert consistency.agreement([1.0, 2.0, 3.0], [5.0, 6.0, 7.0]) == 1
    assert consistency.agreement([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == 0
    assert consistency.agreement([1.0, 1.0], [1.0, 2.0]) == 0.5
    assert consistency.agreement([1.0], [2.0]) == 0.5


def test_two_weighted_rows_are_the_papers_loss() -> None:
    sure, beta = 0.7, 0.3
    policy, reference = torch.tensor([-3.0, -2.0]), torch.tensor([-2.5, -2.8])
    length = torch.ones(2)
    best = answers.Score(policy, reference, length)
    worst = answers.Score(policy.flip(0), reference.flip(0), length)
    losses = answer_terms.dpo(answers.Scores(best, worst), beta=beta)  # rows: as it is, and turned round
    two = answers.combine([(1.0, losses)], torch.tensor([2 * sure, 2 * (1 - sure)]))
    h = (policy[0] - reference[0]) - (policy[1] - reference[1])
    expected = -sure * torch.nn.functional.logsigmoid(beta * h) - (1 - sure) * torch.nn.functional.logsigmoid(-beta * h)
    assert two.item() == pytest.approx(expected.item(), rel=1e-6)


def building(output: Path, table: Path, folder: Path, **changes: Any) -> BuildConfig:
    asked = {"path": str(folder), "max_new_tokens": 6, "device": "cpu", "per_prompt": 4, "temperature": 1.0}
    method = {"kind": "self_reward", **changes.pop("build", {})}
    told = {"rows": str(table), "output": str(output), "model": {**asked, **changes.pop("model", {})}, "build": method}
    return build(BuildConfig, {**told, **changes}, "test", [])


def test_the_best_and_the_worst_and_how_sure_two_rounds_are(
    made: tuple[Path, Path, Path], table: Path, tmp_path: Path
) -> None:
    model, first, second = made
    lora = {"model": {"lora": str(second)}}
    same = read_answers(
        build_answers.run(building(tmp_path / "a", table, model, **lora, build={"earlier": str(second)}))
    )
    assert len(same.rows) == 5  # two rounds that agree leave no reversed pairs
    assert all(row.weight == pytest.approx(2) for row in same.rows)
    rows = read_answers(
        build_answers.run(building(tmp_path / "b", table, model, **lora, build={"earlier": str(first)}))
    ).rows
    said = [json.loads(line)["said"] for line in (tmp_path / "b" / "said.jsonl").read_text().splitlines()]
    agreed = [consistency.agreement(each["rewards"], each["earlier"]) for each in said]
    mean = sum(agreed) / len(agreed)
    assert 0 < mean < 1
    assert len(rows) == 10
    for pair, turned, each in zip(rows[::2], rows[1::2], said, strict=True):
        best = each["answers"][int(np.argmax(each["rewards"]))]
        assert (pair.chosen, turned.rejected) == (best, best)
        assert pair.rejected == turned.chosen == each["answers"][int(np.argmin(each["rewards"]))]
        assert (pair.weight, turned.weight) == pytest.approx((2 * mean, 2 * (1 - mean)))
        assert pair.margin == pytest.approx(max(each["rewards"]) - min(each["rewards"]))
    plain = building(tmp_path / "b", table, model, **lora, build={"earlier": str(first), "consistency": "off"})
    with pytest.raises(ValueError, match="was built by another model, method or seed"):
        build_answers.run(plain)
    trained = train.run(answer_settings(tmp_path / "next", model, tmp_path / "b" / "rows.jsonl"))
    assert (trained / "export" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "give the LoRA of the last round"),
        ({"model": {"per_prompt": 1}}, "set model.per_prompt to 2 or more"),
        ({"model": {"lora": "x"}, "build": {"consistancy": "row"}}, "Did you mean 'consistency'"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        building(tmp_path / "out", tmp_path / "rows.jsonl", tmp_path / "model", **changes)


# -------------------------------------------------------------------------------------------------------- best of n


@pytest.fixture(name="questions")
def _questions(table: Path, tmp_path: Path) -> Path:
    rows = [MediaRow(str(i), f"What is it, {i}?", str(table.parent / f"{i}-0.png")) for i in range(3)]
    write_media_table(tmp_path / "questions.jsonl", rows)
    return tmp_path / "questions.jsonl"


def responding(output: Path, questions: Path, model: Path, **changes: Any) -> RespondConfig:
    asked = {"path": str(model), "max_new_tokens": 6, "device": "cpu", "temperature": 1.0, **changes}
    return build(RespondConfig, {"questions": str(questions), "output": str(output), "model": asked}, "test", [])


def test_the_answer_with_the_highest_reward_is_kept(
    made: tuple[Path, Path, Path], questions: Path, tmp_path: Path
) -> None:
    model, lora, _ = made
    found = read_media_table(respond.run(responding(tmp_path / "best", questions, model, lora=str(lora), best_of=4)))
    drawn = read_media_table(respond.run(responding(tmp_path / "all", questions, model, lora=str(lora), per_prompt=4)))
    judge = Implicit(model, {"lora": lora}, dtype=torch.float32, device=CPU)
    for row in found:
        several = [each for each in drawn if each.prompt == row.prompt]
        image = torch.from_numpy(read_image(row.media)).permute(2, 0, 1)
        rewards = judge.means(turns(row.prompt), Media((image,)), [str(each.response) for each in several])["lora"]
        assert row.aux["response_rewards"] == pytest.approx(rewards, rel=1e-4, abs=1e-6)
        best = several[int(np.argmax(rewards))]
        assert (row.response, row.aux["response_seed"]) == (best.response, best.seed or best.aux["response_seed"])
    assert len({row.aux["response_seed"] for row in found}) >= 1
    one = read_media_table(
        respond.run(responding(tmp_path / "one", questions, model, lora=str(lora), best_of=4, batch_size=1))
    )
    assert [row.response for row in one] == [row.response for row in found]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best_of": 3}, "without one all are 0: give model.lora"),
        ({"best_of": 3, "temperature": 0.0}, "set temperature above 0"),
        ({"best_of": 3, "lora": "x", "per_prompt": 2}, "best_of keeps one answer"),
    ],
)
def test_mistakes_of_best_of(changes: dict[str, Any], message: str, questions: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        responding(tmp_path / "out", questions, tmp_path, **changes)
