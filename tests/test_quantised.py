"""LoRA over weights in 4 and 8 bits (QLoRA, 2305.14314; LLM.int8, 2208.07339) and Adam in 8 bits, by bitsandbytes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_kit import answer_settings, mllm_folder, stopped_and_resumed, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmalign import train
from mmalign.mllm import loading
from mmalign.tasks.mllm import MLLMTask

CPU = torch.device("cpu")
BITS = ("4bit", "8bit")


@pytest.fixture(scope="module", name="given", params=["qwen2_5_vl", "llava"])
def _given(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A model's folder and a table of rows that it takes."""
    home = tmp_path_factory.mktemp(request.param)
    images = (1,) if request.param == "llava" else (1, 2)
    return mllm_folder(home / "model", request.param), write_rows(home, 6, images=images)


def _task(home: Path, given: tuple[Path, Path], bits: str) -> MLLMTask:
    return MLLMTask(answer_settings(home / bits, *given, mllm__quantise=bits), CPU)


def _stored(model: Any) -> dict[str, torch.Tensor]:
    kinds = (torch.uint8, torch.int8)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype in kinds}


@pytest.mark.parametrize("bits", BITS)
def test_weights_are_stored_in_so_many_bits(bits: str, given: tuple[Path, Path], tmp_path: Path) -> None:
    task = _task(tmp_path, given, bits)
    full = AutoModelForImageTextToText.from_pretrained(given[0])
    stored = _stored(task.policy.module)
    assert any("q_proj" in name for name in stored)
    for name, value in stored.items():
        plain = full.get_parameter(name.replace(".base_layer", ""))
        assert value.numel() == plain.numel() // (2 if bits == "4bit" else 1), name
    assert all(p.dtype == torch.float32 for p in task.policy.module.parameters() if p.requires_grad)


@pytest.mark.parametrize("bits", BITS)
def test_a_policy_without_its_adapter_is_its_reference(bits: str, given: tuple[Path, Path], tmp_path: Path) -> None:
    task = _task(tmp_path, given, bits)
    loss, metrics = task.loss(task.load([(0, 0), (1, 0), (2, 0)]))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(0, abs=1e-6)
    with loading.adapters_off(task.policy.module):
        assert not task.policy.module.training  # no dropout
    assert task.policy.module.training


@pytest.mark.parametrize("bits", BITS)
def test_stopping_and_going_on_changes_no_byte_and_the_base_stays(
    bits: str, given: tuple[Path, Path], tmp_path: Path
) -> None:
    one = answer_settings(tmp_path / "one", *given, mllm__quantise=bits)
    two = answer_settings(tmp_path / "two", *given, mllm__quantise=bits)
    train.run(one)
    stopped_and_resumed(two)
    weights = [(c.output / "export" / "adapter_model.safetensors").read_bytes() for c in (one, two)]
    assert weights[0] == weights[1]
    losses = [json.loads(line)["loss"] for line in (one.output / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.01

    whole = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(given[0]), one.output / "export")
    learned = load_file(one.output / "export" / "adapter_model.safetensors")
    assert learned.keys() <= {name.replace(".default", "") for name in whole.state_dict()}


@pytest.mark.parametrize("bits", BITS)
def test_what_is_frozen_is_not_touched(bits: str, given: tuple[Path, Path], tmp_path: Path) -> None:
    task = _task(tmp_path, given, bits)
    before = _stored(task.policy.module)
    trained = [p for p in task.modules.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    was = [p.detach().clone() for p in trained]
    for step in range(2):  # lora_A moves once lora_B is not zero
        task.loss(task.load([(0, step), (1, step)]))[0].backward()
        optimizer.step()
    after = _stored(task.policy.module)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(not torch.equal(a, b) for a, b in zip(was, trained, strict=True))


def test_adam_in_eight_bits_learns_and_goes_on(given: tuple[Path, Path], tmp_path: Path) -> None:
    runs = {
        name: answer_settings(tmp_path / name, *given, lora={"rank": 64}, optim__optimizer=kind)
        for name, kind in (("one", "adamw8bit"), ("two", "adamw8bit"), ("plain", "adamw"))
    }
    train.run(runs["one"])
    stopped_and_resumed(runs["two"])
    train.run(runs["plain"])
    files = {name: config.output / "export" / "adapter_model.safetensors" for name, config in runs.items()}
    assert files["one"].read_bytes() == files["two"].read_bytes() != files["plain"].read_bytes()
    losses = {
        name: [json.loads(line)["loss"] for line in (runs[name].output / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "plain")
    }
    assert losses["one"] == pytest.approx(losses["plain"], abs=0.02)


@pytest.mark.parametrize("changes", [{"mllm__quantise": "4bit"}, {"optim__optimizer": "adamw8bit"}])
def test_without_bitsandbytes_the_command_is_said(
    changes: dict[str, str], given: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="needs bitsandbytes; install it with `pip install bitsandbytes`"):
        train.run(answer_settings(tmp_path / "run", *given, **changes))
