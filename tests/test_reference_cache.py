"""What decides a reference's stored errors and inversions, and what a second run may and may not find there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import config, method_settings, preferences

from mmalign import train
from mmalign.tasks.preference import PreferenceTask
from mmalign.testing.tiny import tiny_sd, tiny_sdxl

CPU = torch.device("cpu")
CACHED: dict[str, Any] = {"reference": {"kind": "cached", "draws": 1}, "data__cache": "disk"}


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", name="table")
def _table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preferences(tmp_path_factory.mktemp("data"))


def _key(task: PreferenceTask) -> str:
    return task.draw_key(("group",))


def test_half_precision_weights_and_float32_ones_are_two_references(model: Path, table: Path, tmp_path: Path) -> None:
    """A LoRA run has the reference in bf16, full fine-tuning has it in float32; `precision` is the same in both."""
    lora = PreferenceTask(config(tmp_path / "a", model, table, precision="bf16", **CACHED), CPU)
    full = PreferenceTask(config(tmp_path / "b", model, table, precision="bf16", lora=None, **CACHED), CPU)
    assert _key(lora) != _key(full)


def test_the_schedule_is_the_trained_models(model: Path, table: Path, tmp_path: Path) -> None:
    """t and noise come from it, whatever schedule lies in the reference's folder."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "beta_end": 0.03}))
    settings = {**CACHED, "reference": {**CACHED["reference"], "model": str(model)}}
    one, two = (PreferenceTask(config(tmp_path / "run", path, table, **settings), CPU) for path in (model, other))
    assert _key(one) != _key(two)


def test_a_part_of_the_model_is_not_a_part_of_its_reference(model: Path, table: Path, tmp_path: Path) -> None:
    other = tiny_sd(tmp_path / "other", seed=5)
    settings = config(
        tmp_path / "run", model, table, model__components={"unet": str(other / "unet")}, reference={"model": str(model)}
    )
    task = PreferenceTask(settings, CPU)
    plain = PreferenceTask(config(tmp_path / "plain", model, table), CPU).adapter.denoiser.state_dict()
    assert task.frozen is not None
    for name, value in task.frozen.state_dict().items():
        kept = plain.get(name, plain.get(".".join([*name.split(".")[:-1], "base_layer", name.split(".")[-1]])))
        assert torch.equal(value, kept), name


def test_full_fine_tuning_finds_lost_inversions_again(model: Path, table: Path, tmp_path: Path) -> None:
    """Errors are there and inversions are not: the copy that would have to invert must not have been dropped."""
    settings = config(
        tmp_path / "run", model, table, lora=None, optim__steps=1, **CACHED,
        noise={"kind": "ddim_inversion", "inversion": {"steps": 2}},
    )  # fmt: skip
    train.run(settings)
    kept = list((tmp_path / "cache").rglob("inversions"))
    assert kept
    for folder in kept:
        shutil.rmtree(folder)
    train.run(settings.model_copy(update={"output": tmp_path / "again"}))
    one, two = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"] for name in ("run", "again")
    )
    assert one == two


def test_an_empty_prompt_of_sdxl_is_what_its_index_says(table: Path, tmp_path: Path) -> None:
    """force_zeros_for_empty_prompt stands in model_index.json alone."""
    models = [tiny_sdxl(tmp_path / "sdxl"), tmp_path / "other"]
    shutil.copytree(*models)
    index = json.loads((models[1] / "model_index.json").read_text())
    index["force_zeros_for_empty_prompt"] = not index.get("force_zeros_for_empty_prompt", True)
    (models[1] / "model_index.json").write_text(json.dumps(index))
    empty = []
    for path in models:
        task = PreferenceTask(method_settings(tmp_path, path, table, "diffusion_dpo", data__cache="disk"), CPU)
        empty.append(task.inputs.conditions([""])["encoder_hidden_states"].abs().max().item())
    assert (empty[0] == 0) != (empty[1] == 0)


def test_a_lora_goes_on_at_the_alpha_it_was_trained_with(model: Path, table: Path, tmp_path: Path) -> None:
    first = config(tmp_path / "first", model, table, lora={"rank": 4, "alpha": 16}, optim__steps=1)
    export = train.run(first) / "export"
    with pytest.raises(ValueError, match=r"trained with alpha 16 at rank 4, .*; set lora\.alpha: 16"):
        PreferenceTask(config(tmp_path / "run", model, table, lora={"rank": 4, "init": str(export)}), CPU)
    PreferenceTask(config(tmp_path / "run", model, table, lora={"rank": 4, "alpha": 16, "init": str(export)}), CPU)


@pytest.mark.parametrize(
    "changes",
    [{"loss": {"kind": "diffusion_kto", "beta": 50.0}}, {"data__buckets": "aspect", "data__bucket_step": 8}],
    ids=["kto", "buckets"],
)
def test_what_depends_on_the_micro_batch_goes_on_with_the_same(
    changes: dict[str, Any], model: Path, table: Path, tmp_path: Path
) -> None:
    settings = {**changes, "optim__steps": 2, "optim__batch_size": 4, "optim__accumulate": 1}
    train.run(config(tmp_path / "run", model, table, **settings))
    other = {**settings, "optim__batch_size": 2, "optim__accumulate": 2}
    with pytest.raises(ValueError, match="begun with 4 items at a time, and this makes 2"):
        train.run(config(tmp_path / "run", model, table, **other), resume=True)
    plain = {"optim__steps": 2, "optim__batch_size": 4}
    train.run(config(tmp_path / "plain", model, table, **plain))
    train.run(
        config(tmp_path / "plain", model, table, **{**plain, "optim__batch_size": 2, "optim__accumulate": 2}),
        resume=True,
    )
