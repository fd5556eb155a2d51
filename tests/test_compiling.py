"""Compiled steps are eager steps: the same losses, LoRA switched on and off, pictures in between, the same names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_kit import PROMPTS, config, records

from mmalign import checkpoints, compiling, train
from mmalign.jobs import Optim
from mmalign.media import read_image
from mmalign.testing.tiny_transformers import tiny_sd3


@pytest.fixture(scope="module", name="sd3")
def _sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd3(tmp_path_factory.mktemp("models") / "sd3", t5=False)


def _trained(home: Path, name: str, model: Path, table: Path, **changes: Any) -> Path:
    pictures = {"prompts": list(PROMPTS[:2]), "every": 2, "steps": 2}
    loss = {"kind": "flow_dpo", "beta": 50.0}
    torch.compiler.reset()
    run = config(home / name, model, table, loss=loss, validation=pictures, optim__steps=3, optim__lr=5e-4, **changes)
    train.run(run)
    return home / name


def _same(one: Path, other: Path) -> None:
    """As `test_distributed`: 1e-5 on weights."""
    losses = [[record["loss"] for record in records(run)] for run in (one, other)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and len(set(losses[0])) == 3
    for place in ("checkpoints/step-00000003/weights.safetensors", "export/pytorch_lora_weights.safetensors"):
        a, b = load_file(one / place), load_file(other / place)
        assert a.keys() == b.keys() and not any("_orig_mod" in name for name in a)
        assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-5
    pictures = [read_image(run / "validation" / "step-000002.png").astype(int) for run in (one, other)]
    assert abs(pictures[0] - pictures[1]).max() <= 1


def test_compiled_steps_are_eager_steps(sd3: Path, table: Path, tmp_path: Path) -> None:
    """By AOT autograd without code generation, which takes seconds and has the same graphs."""
    eager = _trained(tmp_path, "eager", sd3, table)
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = _trained(
        tmp_path, "compiled", sd3, table, optim__compile=True, optim__compile_backend="aot_eager",
        optim__gradient_checkpointing=True,
    )  # fmt: skip
    assert graphs["unique_graphs"] > 0
    _same(eager, compiled)


@pytest.mark.slow  # C++ is generated and compiled for each graph
def test_generated_code_gives_eager_losses(sd3: Path, table: Path, tmp_path: Path) -> None:
    eager = _trained(tmp_path, "eager", sd3, table)
    compiled = _trained(tmp_path, "compiled", sd3, table, optim__compile=True)
    _same(eager, compiled)


def test_a_run_may_be_compiled_from_its_second_half_on(sd3: Path, table: Path, tmp_path: Path) -> None:
    run = config(tmp_path / "run", sd3, table, loss={"kind": "flow_dpo", "beta": 50.0}, optim__steps=1)
    train.run(run)
    compiled = {"compile": True, "compile_backend": "aot_eager"}  # which needs no C++ compiler
    changed = run.model_copy(update={"optim": run.optim.model_copy(update=compiled)})
    train.run(changed, resume=True)  # nothing is left to do, so nothing is compiled
    assert checkpoints.steps(run.output / "checkpoints") == [1]


def test_no_compiler_is_said_before_anything_is_loaded(
    sd3: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler.*apt install g\+\+.*compile_backend: aot_eager"):
        train.run(config(tmp_path / "run", sd3, table, optim__compile=True))
    compiling.check(Optim(compile=True, compile_backend="aot_eager"))
    compiling.check(Optim())


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"compile_backend: inductr is none of .*inductor"):
        compiling.check(Optim(compile=True, compile_backend="inductr"))


def test_only_denoisers_are_compiled(sd3: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is for denoisers, not for task autoencoder; drop it"):
        config(
            tmp_path, sd3, table, task="autoencoder", loss={"kind": "reconstruction"}, lora=None, optim__compile=True
        )
