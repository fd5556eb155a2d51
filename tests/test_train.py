"""The loop: order of items, averages, trackers, pictures, and what stops it."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from training_kit import PROMPTS, captioned, config, records

from mmalign import checkpoints, runs, tasks, train
from mmalign.jobs import TrainConfig
from mmalign.media import read_image
from mmalign.tasks import finish
from mmalign.testing.tiny import tiny_sdxl


def _newest(run: TrainConfig) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    checkpoint = checkpoints.newest(run.output / "checkpoints")
    assert checkpoint is not None
    return checkpoints.read(checkpoint)


# -------------------------------------------------------------------------------------------- order of the items


class _Counting:
    """A task whose model is one number and whose items are their indices."""

    unit, facts = "items", {"data": "five items", "contents": "0 to 4"}

    def __init__(self, size: int):
        self.size, self.seen = size, []
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.modules = torch.nn.ModuleDict({"m": torch.nn.ParameterList([self.weight])})  # type: ignore[dict-item]

    def load(self, positions: list[tuple[int, int]]) -> dict[str, Any]:
        return {"positions": positions}

    def loss(self, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.seen += batch["positions"]
        loss = (self.weight - 1).square().sum()
        return loss, {"mean_index": torch.tensor(float(np.mean([i for i, _ in batch["positions"]])))}

    def describe(self, batch: dict[str, Any]) -> str:
        return str([i for i, _ in batch["positions"]])

    def validate(self, folder: Path, step: int) -> None:
        folder.mkdir(exist_ok=True)
        (folder / str(step)).touch()

    def export(self, folder: Path) -> None:
        save_file({"weight": self.weight.detach().clone()}, folder / "w.safetensors")


@pytest.fixture(name="counting")
def _counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[_Counting]]:
    made: list[_Counting] = []

    def make(settings: TrainConfig, device: torch.device) -> _Counting:
        made.append(_Counting(5))
        return made[-1]

    monkeypatch.setattr(tasks, "make", make)
    yield made


def test_an_epoch_visits_every_item_once(counting: list[_Counting], tmp_path: Path) -> None:
    train.run(config(tmp_path / "run", tmp_path, tmp_path, optim__steps=10, optim__batch_size=3))
    seen = counting[0].seen
    assert len(seen) == 30
    for epoch in range(6):
        assert sorted(index for index, number in seen if number == epoch) == [0, 1, 2, 3, 4]
    orders = {tuple(index for index, number in seen if number == epoch) for epoch in range(6)}
    assert len(orders) > 3, "each epoch has its own order"


def test_the_stream_is_the_same_for_every_layout_and_another_for_another_seed(
    counting: list[_Counting], tmp_path: Path
) -> None:
    for name, changes in {
        "a": {"optim__batch_size": 4, "optim__steps": 3},
        "b": {"optim__batch_size": 2, "optim__accumulate": 2, "optim__steps": 3},
        "c": {"optim__batch_size": 4, "optim__steps": 3, "seed": 1},
    }.items():
        train.run(config(tmp_path / name, tmp_path, tmp_path, **changes))
    assert counting[0].seen == counting[1].seen != counting[2].seen


def test_metrics_are_means_over_micro_batches(counting: list[_Counting], tmp_path: Path) -> None:
    run = config(tmp_path / "run", tmp_path, tmp_path, optim__batch_size=1, optim__accumulate=4, optim__steps=2)
    train.run(run)
    means = [np.mean([i for i, _ in counting[0].seen[k : k + 4]]) for k in (0, 4)]
    assert [record["mean_index"] for record in records(run.output)] == pytest.approx(means)
    assert [record["epoch"] for record in records(run.output)] == pytest.approx([0.8, 1.6])


def test_log_validation_and_checkpoints_keep_their_own_time(counting: list[_Counting], tmp_path: Path) -> None:
    run = config(
        tmp_path / "run", tmp_path, tmp_path, optim__steps=10, log__every=4, validation__every=3, checkpoint__every=3,
        checkpoint__keep=2,
    )  # fmt: skip
    train.run(run)
    assert [record["step"] for record in records(run.output)] == [4, 8, 10]
    assert sorted(int(file.name) for file in (run.output / "validation").iterdir()) == [3, 6, 9, 10]
    assert checkpoints.steps(run.output / "checkpoints") == [9, 10]


def test_warmup_and_clipping(counting: list[_Counting], tmp_path: Path) -> None:
    run = config(
        tmp_path / "run", tmp_path, tmp_path, optim__steps=4, optim__schedule="linear", optim__warmup=2, optim__lr=0.4,
    )  # fmt: skip
    train.run(run)
    # After step s the schedule stands at s: half of the warm-up, all of it, then half of the way down, then the end.
    assert [record["lr"] for record in records(run.output)] == pytest.approx([0.2, 0.4, 0.2, 0.0])
    assert records(run.output)[0]["grad_norm"] == pytest.approx(2)  # before clipping


def test_a_loop_moves_its_weights_as_adamw_does(counting: list[_Counting], tmp_path: Path) -> None:
    run = config(
        tmp_path / "run", tmp_path, tmp_path, optim__steps=5, optim__lr=0.1, optim__max_grad_norm=0.5,
        optim__betas=(0.8, 0.9),
        optim__weight_decay=0.1, ema={"decay": 0.5},
    )  # fmt: skip
    train.run(run)
    x = m = v = shadow = 0.0
    for step in range(1, 6):
        gradient = max(-0.5, min(0.5, 2 * (x - 1)))
        x *= 1 - 0.1 * 0.1
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        x -= 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)) ** 0.5 + 1e-8)
        done = step - 1
        decay = min(0.5, (1 + done) / (10 + done)) if done > 0 else 0
        shadow += (1 - decay) * (x - shadow)
    weights, _ = _newest(run)
    assert next(iter(weights.values())).item() == pytest.approx(x, rel=1e-5)
    assert load_file(run.output / "export" / "w.safetensors")["weight"].item() == pytest.approx(shadow, rel=1e-5)


# ------------------------------------------------------------------------------------------------ real pipelines


def test_the_export_holds_the_average(model: Path, table: Path, tmp_path: Path) -> None:
    run = config(tmp_path / "run", model, table, lora=None, ema={"decay": 0.9}, optim__steps=3, checkpoint__every=3)
    train.run(run)
    weights, state = _newest(run)
    exported = load_file(run.output / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    moved = 0.0
    unet = StableDiffusionPipeline.from_pretrained(run.output / "export", local_files_only=True).unet
    names = [name for name, _ in unet.named_parameters()]  # the order of the averages
    for name, average in zip(names, state["ema"]["shadow_params"], strict=True):
        assert torch.equal(exported[name], average), name
        moved = max(moved, (weights[f"trained.denoiser.{name}"] - average).abs().max().item())
    assert moved > 1e-5


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_an_exported_lora_draws_in_diffusers_what_the_trained_model_draws(
    model: Path, table: Path, tmp_path: Path, family: str
) -> None:
    base = model if family == "sd" else tiny_sdxl(tmp_path / "sdxl")
    run = config(
        tmp_path / "run", base, table, lora={"rank": 4, "alpha": 8}, optim__steps=3, optim__lr=0.05,
        validation={"prompts": PROMPTS[:2], "every": 3, "steps": 3, "seed": 5, "guidance_scale": 4.0},
    )  # fmt: skip
    train.run(run)
    rows = read_image(run.output / "validation" / "step-000003.png")
    assert rows.shape == (64, 64, 3)
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(base, local_files_only=True)

    def draw() -> np.ndarray:
        generators = [torch.Generator().manual_seed(5 + i) for i in range(2)]
        found = pipe(
            list(PROMPTS[:2]), num_inference_steps=3, guidance_scale=4.0, generator=generators, output_type="np"
        )  # fmt: skip
        return np.concatenate(list((found.images * 255).round().astype(np.uint8)), axis=1)

    off = draw()
    pipe.load_lora_weights(run.output / "export", local_files_only=True)
    on = draw()
    assert np.abs(on.astype(int) - off).max() > 2, "training has changed the pictures"
    # The second row of the run's own picture is drawn with the adapter off.
    assert np.abs(rows[:32].astype(int) - on).max() <= 1
    assert np.abs(rows[32:].astype(int) - off).max() <= 1


def test_full_fine_tuning_draws_one_row(model: Path, table: Path, tmp_path: Path) -> None:
    adapter = finish.load(config(tmp_path / "run", model, table), torch.device("cpu"))
    settings = config(tmp_path / "run", model, table, validation={"prompts": PROMPTS[:3], "steps": 2})
    adapter.denoiser.train()
    before = torch.get_rng_state()
    finish.validate(adapter, settings, tmp_path / "validation", 7)
    assert read_image(tmp_path / "validation" / "step-000007.png").shape == (32, 96, 3)
    assert adapter.denoiser.training and not adapter.vae.training
    assert torch.equal(torch.get_rng_state(), before)


def test_tensorboard_gets_what_metrics_jsonl_gets(model: Path, table: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = config(tmp_path / "run", model, table, log={"trackers": ["tensorboard"]}, optim__steps=2)
    train.run(run)
    events = EventAccumulator(str(next(run.output.rglob("events.out.tfevents.*")).parent))
    events.Reload()
    for record in records(run.output):
        for name in ("loss", "margin", "grad_norm", "lr"):
            found = {event.step: event.value for event in events.Scalars(name)}
            assert found[record["step"]] == pytest.approx(record[name], rel=1e-6)


def test_the_run_folder_says_how_it_was_made(model: Path, table: Path, tmp_path: Path) -> None:
    run = config(tmp_path / "run", model, table, optim__steps=1, seed=3)
    train.run(run)
    facts = json.loads((run.output / "run.json").read_text())
    assert facts["seed"] == 3 and facts["items"] == 4
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["trained_parameters"] == sum(value.numel() for value in _newest(run)[0].values())
    assert "kept all 4 rows" in facts["data"]
    assert (run.output / "config.yaml").is_file() and (run.output / "export" / "README.md").is_file()


@pytest.mark.parametrize("text", [False, True])
def test_supervised_fine_tuning_learns(model: Path, tmp_path: Path, text: bool) -> None:
    run = config(
        tmp_path / "run", model, captioned(tmp_path), task="sft", loss={"kind": "denoising", "snr_gamma": 5.0},
        lora=None, optim__batch_size=4, optim__steps=20, optim__lr=3e-3, optim__train_text_encoder=text,
    )  # fmt: skip
    train.run(run)
    losses = [record["loss"] for record in records(run.output)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    names = _newest(run)[0].keys()
    assert any("text_encoder" in name for name in names) == text
    trained = load_file(run.output / "export" / "text_encoder" / "model.safetensors")
    fresh = load_file(model / "text_encoder" / "model.safetensors")
    assert any(not torch.equal(trained[name], fresh[name]) for name in fresh) == text


def test_one_process_may_train_in_two_precisions(model: Path, table: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16", "fp32"):
        run = config(tmp_path / f"{precision}", model, table, precision=precision, optim__steps=1)
        shutil.rmtree(run.output, ignore_errors=True)
        train.run(run)
        assert records(run.output)[0]["loss"] == torch.tensor(2.0).log().item()


def test_the_memory_cache_gives_what_the_disk_cache_gives(model: Path, table: Path, tmp_path: Path) -> None:
    found = []
    for cache in ("disk", "memory"):
        run = config(tmp_path / cache, model, table, data__cache=cache, optim__steps=4)
        train.run(run)
        found.append(_newest(run)[0])
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


# ------------------------------------------------------------------------------------------------ what stops it


def test_a_loss_that_is_not_finite_names_the_batch(model: Path, table: Path, tmp_path: Path) -> None:
    poisoned = tmp_path / "poisoned"
    shutil.copytree(model, poisoned)
    file = poisoned / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    run = config(tmp_path / "run", poisoned, table)
    with pytest.raises(ValueError, match=r"the loss is nan at step 1, .*the batch held: pairs\.jsonl line \d, pairs"):
        train.run(run)
    assert checkpoints.steps(run.output / "checkpoints") == []


def test_exploding_weights_leave_earlier_checkpoints_intact(model: Path, table: Path, tmp_path: Path) -> None:
    run = config(tmp_path / "run", model, table, optim__lr=1e30, checkpoint__every=1)
    with pytest.raises(ValueError, match=r"at step \d, so the run stops here; .*pairs\.jsonl line \d.*Lower optim\.lr"):
        train.run(run)
    weights, _ = _newest(run)
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_weights_that_are_not_finite_are_never_saved(
    counting: list[_Counting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Counting, "loss", lambda self, batch: (-self.weight.sum(), {}))  # 3e38, and twice that
    run = config(tmp_path / "run", tmp_path, tmp_path, checkpoint__every=1, optim__lr=3e38, optim__betas=(0.0, 0.9))
    with pytest.raises(ValueError, match=r"1 tensors hold values that are not finite after step 2, .*no checkpoint"):
        train.run(run)
    assert checkpoints.steps(run.output / "checkpoints") == [1]


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(
    counting: list[_Counting], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss(self: _Counting, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.seen += batch["positions"]
        zero = (self.weight - self.weight).sum()
        return (zero.sqrt() if len(self.seen) > 4 else (self.weight - 1).square().sum()), {}

    monkeypatch.setattr(_Counting, "loss", loss)
    run = config(tmp_path / "run", tmp_path, tmp_path, checkpoint__every=1)
    with pytest.raises(ValueError, match=r"the gradient norm is nan at step 3, .*the batch held: \["):
        train.run(run)
    assert checkpoints.steps(run.output / "checkpoints") == [1, 2]
    assert torch.isfinite(counting[0].weight).all()


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == tracker else find(name, *rest))
    with pytest.raises(ValueError, match=rf"log\.trackers: {tracker} is not installed; .*pip install {tracker}"):
        train.run(config(tmp_path / "run", tmp_path, tmp_path, log={"trackers": [tracker]}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "fp16"}, "fp16 needs a GPU; on a CPU use bf16 or fp32"),
        ({"device": "cdua"}, "'cdua' is no device"),
        ({"device": "cuda:99"}, "cuda:99 is not here"),
    ],
)
def test_a_device_that_is_not_there_is_named(tmp_path: Path, changes: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train.run(config(tmp_path / "run", tmp_path, tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_versions_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert runs.versions()["git"] == "none"


# --------------------------------------------------------------------------------------------------- checkpoints


def _save(folder: Path, step: int, value: float = 1.0, keep: int = 2) -> None:
    checkpoints.save(folder, step, {"w": torch.full((1000,), value)}, {"step": step, "config": "{}"}, keep)


def test_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9):
        _save(tmp_path, step)
    assert checkpoints.steps(tmp_path) == [9, 10]
    weights, state = checkpoints.read(tmp_path / "step-00000010")
    assert state["step"] == 10 and weights["w"].shape == (1000,)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-00000009", "step-00000010"]


def test_what_a_killed_writer_left_is_ignored_and_removed(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    left = tmp_path / ".writing-99999"
    left.mkdir()
    (left / "weights.safetensors").write_bytes(b"half")
    assert checkpoints.newest(tmp_path) == tmp_path / "step-00000001"
    _save(tmp_path, 2)
    assert not left.exists()


@pytest.mark.parametrize("write", ["save_file", "torch.save"])
def test_a_full_disk_names_the_checkpoint_that_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    _save(tmp_path, 1)

    def full(*arguments: Any, **rest: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((checkpoints, "save_file", full) if write == "save_file" else (torch, "save", full)))
    with pytest.raises(
        OSError, match=r"the disk is full: .*step 2 was not written.*intact checkpoint is step-00000001"
    ) as told:
        _save(tmp_path, 2)
    assert told.value.errno == errno.ENOSPC and told.value.filename == str(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["step-00000001"]


def test_another_failure_is_not_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*arguments: Any, **rest: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(torch, "save", forbidden)
    with pytest.raises(PermissionError):
        _save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["weights", "state"])
def test_a_disk_that_is_really_full(small_disk: Path, where: str) -> None:
    big, small = torch.rand(100_000), torch.rand(10)
    checkpoints.save(small_disk, 1, {"w": small}, {"s": small}, 2)
    weights, state = (big, small) if where == "weights" else (small, big)
    with pytest.raises(OSError, match=r"the disk is full: .*intact checkpoint is step-00000001"):
        checkpoints.save(small_disk, 2, {"w": weights}, {"s": state}, 2)
    assert [file.name for file in small_disk.iterdir()] == ["step-00000001"]
    assert torch.equal(checkpoints.read(small_disk / "step-00000001")[0]["w"], small)
