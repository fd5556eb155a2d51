"""Rejected answers that the policy writes during training (BDHS online)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_kit import answer_settings, mllm_folder, stopped_and_resumed, write_rows

from mmalign import train
from mmalign.config import ConfigError
from mmalign.tasks.mllm import MLLMTask

CPU = torch.device("cpu")
ONLINE = {"max_new_tokens": 5}


@pytest.fixture(scope="module", name="model", params=["qwen2_5_vl", "llava"])
def _model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mllm_folder(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module", name="good")
def _good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good answers alone."""
    table = write_rows(tmp_path_factory.mktemp("good"))
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    lines = [{"images": row["images"], "prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return table


@pytest.fixture(scope="module", name="pairs")
def _pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("pairs"))


def task_of(*args: Any, **changes: Any) -> MLLMTask:
    return MLLMTask(answer_settings(*args, mllm__online=ONLINE, **changes), CPU)


def written(task: MLLMTask, items: tuple[int, ...] = (0, 1, 2)) -> dict[str, Any]:
    assert task.online is not None
    return task.online.renewed(task.load([(item, 0) for item in items]))


def test_what_is_written_depends_on_weights_and_step_alone(model: Path, good: Path, tmp_path: Path) -> None:
    task = task_of(tmp_path / "run", model, good)
    assert task.unit == "pairs"
    first, again = written(task), written(task)
    assert [each.answers for each in first["encoded"]] == [each.answers for each in again["encoded"]]
    assert all(len(each.answers) == 2 and each.answers[0] != each.answers[1] for each in first["encoded"])
    alone = written(task, (1,))
    assert alone["encoded"][0].answers == first["encoded"][1].answers
    task.begin(1)
    assert [each.answers for each in written(task)["encoded"]] != [each.answers for each in first["encoded"]]
    task.begin(0)
    with torch.no_grad():
        for name, parameter in task.policy.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1)
    assert [each.answers for each in written(task)["encoded"]] != [each.answers for each in first["encoded"]]
    assert task.modules.training


def test_a_row_with_a_rejected_answer_of_its_own_is_two_pairs_with_their_mean(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    task = task_of(tmp_path / "run", model, pairs)
    with torch.no_grad():
        for name, parameter in task.policy.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    batch = task.load([(0, 0), (1, 0)])
    both = written(task, (0, 1))
    assert both["items"] == [0, 1, 0, 1]
    assert [each.answers for each in both["encoded"][:2]] == [each.answers for each in batch["encoded"]]
    with torch.no_grad():
        loss = task.loss(batch)[0].item()
        own = task.loss(batch, alone=True)[0].item()
        new = task.loss({**batch, "encoded": both["encoded"][2:]}, alone=True)[0].item()
    assert abs(own - new) > 1e-4
    assert loss == pytest.approx((own + new) / 2, rel=1e-5)


def test_a_run_that_is_resumed_ends_in_the_same_bytes(model: Path, good: Path, tmp_path: Path) -> None:
    changes = {"mllm__online": {**ONLINE, "temperature": 1.0}, "lora__dropout": 0.1, "optim__lr": 1e-2}
    whole = train.run(answer_settings(tmp_path / "whole", model, good, **changes))
    half = answer_settings(tmp_path / "half", model, good, **changes)
    stopped_and_resumed(half)
    name = "export/adapter_model.safetensors"
    assert (whole / name).read_bytes() == (tmp_path / "half" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference__kind": "cached"}, "writes other answers at each step"),
        ({"sharding": "fsdp2"}, "answers of other lengths on every process"),
        ({"terms": ("sft",)}, "these terms take single ones"),
        ({"loss__margin": {"kind": "reward"}}, "the rows' margins"),
        ({"mllm__online": {"hiden": 0.5}}, "Did you mean 'hidden'"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, model: Path, good: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        answer_settings(tmp_path / "run", model, good, **{"mllm__online": ONLINE, **changes})


def test_rows_without_an_image_have_nothing_to_hide(model: Path, tmp_path: Path) -> None:
    table = write_rows(tmp_path, 2, images=(0,))
    with pytest.raises(ValueError, match=r"no row is left to train on: .*no image"):
        task_of(tmp_path / "run", model, table)
