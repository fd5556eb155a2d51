"""Rows that are held out of training on answers: what is measured on them, and that it changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_kit import answer_settings, mllm_folder, write_rows

from mmalign import train
from mmalign.config import ConfigError
from mmalign.tasks.answer_validation import measured
from mmalign.tasks.mllm import MLLMTask


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mllm_folder(tmp_path_factory.mktemp("model") / "qwen", "qwen2_5_vl")


@pytest.fixture(scope="module", name="tables")
def _tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    made = []
    for name, count in (("training", 5), ("held_out", 7)):
        folder = tmp_path_factory.mktemp(name)
        made.append(write_rows(folder, count))
    return made[0], made[1]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "validation" / "metrics.jsonl").read_text().splitlines()]


def test_it_is_the_objective_on_other_rows_and_changes_nothing(
    model: Path, tables: tuple[Path, Path], tmp_path: Path
) -> None:
    wanted = {"lora__dropout": 0.2, "terms": ("dpo", "image_dpo")}
    plain = train.run(answer_settings(tmp_path / "plain", model, tables[0], **wanted))
    held = {"validation__table": str(tables[1]), "validation__every": 2}
    watched = train.run(answer_settings(tmp_path / "watched", model, tables[0], **wanted, **held))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (plain / "export" / name).read_bytes() == (watched / "export" / name).read_bytes()
    found = lines(watched)
    assert [line["step"] for line in found] == [2, 4]
    assert all(line["rows"] == 7 for line in found)
    assert {"loss", "implicit_accuracy", "image_accuracy", "margin", "loss_dpo"} <= found[0].keys()
    assert found[0]["loss"] != found[1]["loss"]


@pytest.mark.parametrize("terms", [("dpo",), ("kto",), ("dpo_norm", "sft")])
def test_rows_count_alike_in_any_batch(
    terms: tuple[str, ...], model: Path, tables: tuple[Path, Path], tmp_path: Path
) -> None:
    """But for what looks at the batch: KTO's drift, and the mean over all tokens of cross-entropy."""
    config = answer_settings(tmp_path / "run", model, tables[0], terms, validation__table=str(tables[1]), lora__rank=2)
    task = MLLMTask(config, torch.device("cpu"))
    assert task.held_out is not None
    with torch.no_grad():
        for name, parameter in task.policy.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    one, all_ = measured(task, task.held_out, 1), measured(task, task.held_out, 7)
    keys = {"dpo": "loss", "kto": "reward_chosen", "dpo_norm": "loss_dpo_norm"}
    assert one[keys[terms[0]]] == pytest.approx(all_[keys[terms[0]]], rel=1e-4)
    assert task.modules.training


def test_a_cached_reference_knows_them_too(model: Path, tables: tuple[Path, Path], tmp_path: Path) -> None:
    """Full fine-tuning has no second model left once everything is in the cache."""
    held = {"validation__table": str(tables[1]), "lora": None, "optim__lr": 1e-2}
    runs = [
        train.run(answer_settings(tmp_path / kind, model, tables[0], reference__kind=kind, **held))
        for kind in ("frozen", "cached")
    ]
    online, cached = (lines(run)[-1] for run in runs)
    assert abs(online["margin"]) > 1e-3
    assert cached["margin"] == pytest.approx(online["margin"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation__prompts": ["a cat"]}, "validation.prompts are drawn"),
        ({"validation__table": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"validation__tabel": "x"}, "Did you mean 'table'"),
    ],
)
def test_mistakes(
    changes: dict[str, Any], message: str, model: Path, tables: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, ConfigError, OSError), match=message):
        train.run(answer_settings(tmp_path / "run", model, tables[0], **changes))


def test_rows_without_what_the_objective_needs(model: Path, tables: tuple[Path, Path], tmp_path: Path) -> None:
    training = write_rows(tmp_path, 2, margin=[1.0, 2.0])
    config = answer_settings(
        tmp_path / "run", model, training, loss__margin={"kind": "reward"}, validation__table=str(tables[1])
    )
    with pytest.raises(ValueError, match="no margin"):
        train.run(config)
