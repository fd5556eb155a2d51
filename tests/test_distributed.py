"""Two processes with half of the batch each do what one does: losses, weights, averages, checkpoints and exports.

Sums of floats in another order differ in their last digits; TOLERANCE is what these few steps may make of that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from training_kit import PROMPTS, captioned, config, preferences, records, settings

from mmalign import checkpoints, train
from mmalign.media import write_image
from mmalign.records import MediaRef
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.testing.tiny import tiny_sd
from mmalign.testing.tiny_transformers import tiny_sd3

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
LONG = 24  # enough that a signal comes in between
TOLERANCE = 1e-5
"""Absolute, on weights. Rates are low and eps is high where a gradient may be 0 but for rounding, as that of a key's
bias is: Adam would make whole steps of its sign."""
LOSS_TOLERANCE = 1e-4  # absolute; margins are multiplied by beta
ROBUST = {"optim__eps": 1e-5, "optim__lr": 2e-4}
LORA: dict[str, Any] = {"optim__lr": 5e-4}
FLOW: dict[str, Any] = {"loss": {"kind": "flow_dpo", "beta": 50.0}, **LORA}
PICTURES = {"prompts": list(PROMPTS[:2]), "every": 2, "steps": 2}

# name: (model, table, changes, layouts)
CASES: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "dpo": ("sd", "pairs", LORA, ("none", "fsdp2", "zero2")),
    "flow_dpo": ("sd3", "pairs", {**FLOW, "optim__gradient_checkpointing": True}, ("none", "fsdp2")),
    "bco": ("sd", "pairs", {"loss": {"kind": "bco", "beta": 50.0}, **LORA}, ("none",)),
    "kto": ("sd", "pairs", {"loss": {"kind": "diffusion_kto", "beta": 50.0}, **LORA}, ("none",)),
    "lipo": ("sd", "lists", {"loss": {"kind": "lipo", "beta": 50.0}, **LORA}, ("none",)),
    "auto_beta": ("sd3", "pairs", {**FLOW, "guards": {"auto_beta": {}, "drop_saturated": 4.0}}, ("none",)),
    "full": ("sd", "pairs", {"lora": None, "validation": PICTURES, **ROBUST}, ("none", "fsdp2", "zero2")),
    "sft": (
        "sd", "captions", {"task": "sft", "loss": {"kind": "denoising"}, "lora": None, "ema": {"decay": 0.9}, **ROBUST},
        ("none", "fsdp2", "zero2"),
    ),
    "steps_of_two": ("sd", "pairs", {"optim__accumulate": 2, "optim__max_grad_norm": 0.05, **LORA}, ("none", "zero2")),
}  # fmt: skip
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SHARED = [name for name, case in CASES.items() if "fsdp2" in case[3]]
PAIRS = [(name, layout) for name, case in CASES.items() for layout in case[3]]


def _lists(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = []
    for i, size in enumerate((3, 2, 4, 2, 3, 4)):
        places = [folder / f"list-{i}-{j}.png" for j in range(size)]
        for place in places:
            write_image(place, rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        scores = {"quality": tuple(0.9 - 0.2 * j for j in range(size))}
        rows.append(PreferenceRow(PROMPTS[i % 4], tuple(MediaRef(str(place)) for place in places), scores=scores))
    write_preferences(folder / "lists.jsonl", rows)
    return folder / "lists.jsonl"


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("distributed")
    tiny_sd(home / "sd")
    tiny_sd3(home / "sd3", t5=False)
    preferences(home, pairs=6)
    _lists(home)
    captioned(home, 6)
    return home


def _config(home: Path, name: str, layout: str, processes: int, run: str = "", **more: Any) -> tuple[Path, Any]:
    """The file and tree of a case; four items in a step whatever the number of processes."""
    model, table, changes, _ = CASES[name]
    tables = {"pairs": "pairs.jsonl", "lists": "lists.jsonl", "captions": "media.jsonl"}
    run = run or f"{name}-{processes}-{layout}"
    base = {"optim__steps": STEPS, "optim__batch_size": 4 // processes, "checkpoint": {"every": 2, "keep": 5}}
    tree = settings(home / run, home / model, home / tables[table], sharding=layout, **{**base, **changes, **more})
    (home / f"{run}.yaml").write_text(yaml.safe_dump(tree))
    return home / f"{run}.yaml", tree


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def _step(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


@pytest.fixture(scope="module", name="runs")
def _runs(home: Path) -> Path:
    """Every case in one process here, and in two of one launch; and runs that go on in another layout."""
    for name in CASES:
        tree = _config(home, name, "none", 1)[1]
        train.run(train.TrainConfig.model_validate(tree))
    wanted = [str(_config(home, name, layout, 2)[0]) for name, layout in PAIRS]
    # From the second step of two processes, and of one, to the last in two.
    for layout in ("none", "zero2"):
        same, _ = _config(home, "dpo", layout, 2, run=f"resumed-{layout}")
        wanted.append(f"{same}={_step(home / f'dpo-2-{layout}', 2)}")
    for layout in ("fsdp2", "zero2"):
        into, _ = _config(home, "sft", layout, 2, run=f"resumed-into-{layout}")
        wanted.append(f"{into}={_step(home / 'sft-1-none', 2)}")
    done = subprocess.run(
        [*LAUNCH, str(ROOT / "tests" / "processes.py"), *wanted], capture_output=True, text=True, check=False,
        env=_environment(), timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return home


def _difference(one: Path, other: Path) -> float:
    """The largest absolute difference between two files of tensors of the same names."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_two_processes_learn_what_one_does(runs: Path, name: str, layout: str) -> None:
    one, two = runs / f"{name}-1-none", runs / f"{name}-2-{layout}"
    losses = [[record["loss"] for record in records(run)] for run in (one, two)]
    assert len(losses[0]) == STEPS
    assert losses[1] == pytest.approx(losses[0], abs=LOSS_TOLERANCE)
    norms = [[record["grad_norm"] for record in records(run)] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert _difference(_step(one, STEPS) / "weights.safetensors", _step(two, STEPS) / "weights.safetensors") < TOLERANCE
    moved = _difference(_step(one, 2) / "weights.safetensors", _step(one, STEPS) / "weights.safetensors")
    assert moved > 10 * TOLERANCE, "too little has happened to compare"


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_exports_of_two_processes_are_whole(runs: Path, name: str, layout: str) -> None:
    one, two = runs / f"{name}-1-none" / "export", runs / f"{name}-2-{layout}" / "export"
    files = [file.relative_to(one) for file in sorted(one.rglob("*.*")) if "token" not in file.name]
    assert files == [file.relative_to(two) for file in sorted(two.rglob("*.*")) if "token" not in file.name]
    tensors = [file for file in files if file.suffix == ".safetensors"]
    assert tensors
    for file in tensors:
        assert _difference(one / file, two / file) < TOLERANCE
    assert (runs / f"{name}-2-{layout}" / "validation").exists() == ("validation" in CASES[name][2])


def test_a_shared_lora_loads_in_plain_diffusers(runs: Path) -> None:
    pictures = []
    for run in ("dpo-1-none", "dpo-2-fsdp2"):
        pipe = StableDiffusionPipeline.from_pretrained(runs / "sd", local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(runs / run / "export", local_files_only=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(pipe(PROMPTS[0], num_inference_steps=2, generator=generator, output_type="np").images)
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-4


@pytest.mark.parametrize("name", SHARED)
def test_each_process_holds_its_share(runs: Path, name: str) -> None:
    notes = [json.loads((runs / f"{name}-2-fsdp2" / f"share-{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(note["held"] for note in notes) == notes[0]["total"]
    assert max(note["held"] for note in notes) < 0.55 * notes[0]["total"]
    copies = json.loads((runs / f"{name}-2-none" / "share-1.json").read_text())
    assert copies["held"] == copies["total"]
    if name == "full":
        assert notes[0]["total"] == 2 * copies["total"], "the frozen reference is shared too"


@pytest.mark.parametrize("name", ["bco", "auto_beta"])
def test_averages_are_those_of_one_process(runs: Path, name: str) -> None:
    notes = [json.loads((runs / f"{name}-2-none" / f"share-{rank}.json").read_text()) for rank in (0, 1)]
    assert notes[0]["averages"] == notes[1]["averages"] != {}
    alone = load_file(_step(runs / f"{name}-1-none", STEPS) / "weights.safetensors")
    for key, value in notes[0]["averages"].items():
        assert value == pytest.approx(alone[key].item(), abs=1e-6), key
    if name == "auto_beta":
        betas = [[record["beta"] for record in records(runs / f"{name}-{n}-none")] for n in (1, 2)]
        assert betas[0] == pytest.approx(betas[1], rel=1e-3) and len(set(betas[0])) > 1


@pytest.mark.parametrize("layout", ["none", "zero2"])
def test_two_processes_resume_to_the_same_bytes(runs: Path, layout: str) -> None:
    whole, cut = runs / f"dpo-2-{layout}", runs / f"resumed-{layout}"
    name = "weights.safetensors"
    assert (_step(whole, STEPS) / name).read_bytes() == (_step(cut, STEPS) / name).read_bytes()
    states = [checkpoints.read(_step(run, STEPS))[1]["optimizer"]["state"] for run in (whole, cut)]
    for index, one in states[0].items():
        assert all(torch.equal(one[key], states[1][index][key]) for key in one)


@pytest.mark.parametrize("layout", ["fsdp2", "zero2"])
def test_what_one_process_began_two_go_on_with(runs: Path, layout: str) -> None:
    """Into shares of the model: weights, moments and averages are cut as the parameters are."""
    one, two = _step(runs / "sft-1-none", STEPS), _step(runs / f"resumed-into-{layout}", STEPS)
    assert _difference(one / "weights.safetensors", two / "weights.safetensors") < TOLERANCE
    states = [checkpoints.read(at)[1] for at in (one, two)]
    for a, b in zip(states[0]["ema"]["shadow_params"], states[1]["ema"]["shadow_params"], strict=True):
        assert type(b) is torch.Tensor and (a - b).abs().max() < TOLERANCE
    for index, moments in states[0]["optimizer"]["state"].items():
        for key, value in moments.items():
            other = states[1]["optimizer"]["state"][index][key]
            assert value.shape == other.shape
            assert (value - other).abs().max() <= 1e-3 * value.abs().max() + 1e-8


@pytest.mark.parametrize("layout", ["fsdp2", "zero2"])
@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_what_two_shared_one_goes_on_with(runs: Path, name: str, layout: str, tmp_path: Path) -> None:
    alone = f"alone-{name}-{layout}"
    tree = _config(runs, name, "none", 1, run=alone)[1]
    place = runs / alone / "checkpoints"
    place.mkdir(parents=True)
    (place / "step-00000002").symlink_to(_step(runs / f"{name}-2-{layout}", 2))
    train.run(train.TrainConfig.model_validate(tree), resume=True)
    one, other = (_step(runs / run, STEPS) / "weights.safetensors" for run in (f"{name}-1-none", alone))
    assert _difference(one, other) < TOLERANCE


def test_another_number_of_items_in_a_step_is_refused(runs: Path) -> None:
    tree = _config(runs, "dpo", "none", 2, run="dpo-2-none")[1]
    with pytest.raises(ValueError, match=r"begun with 4 items in a step, and this makes 2\. Choose optim\.batch_size"):
        train.run(train.TrainConfig.model_validate(tree), resume=True)


@pytest.mark.parametrize("layout", ["fsdp2", "zero2"])
def test_one_process_has_nobody_to_share_with(home: Path, tmp_path: Path, layout: str) -> None:
    with pytest.raises(ValueError, match=f"{layout} shares a model among processes, and there is one; start several"):
        train.run(config(tmp_path / "run", home / "sd", home / "pairs.jsonl", sharding=layout))


def test_without_deepspeed_the_command_is_said(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match="zero2 needs DeepSpeed; install it with `pip install deepspeed`"):
        train.run(config(tmp_path / "run", home / "sd", home / "pairs.jsonl", sharding="zero2"))


@pytest.mark.parametrize("changes", [{"optim__optimizer": "adamw8bit"}, {"precision": "fp16"}])
def test_what_deepspeed_is_not_used_for_is_refused(home: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="zero2 goes with optimizer adamw and precision fp32 or bf16"):
        config(tmp_path, home / "sd", home / "pairs.jsonl", sharding="zero2", **changes)


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("ACCELERATE_USE_FSDP", "true", "sharding: fsdp2"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "sharding: zero2"),
        ("ACCELERATE_DYNAMO_BACKEND", "inductor", "optim.compile: true"),
    ],
)
def test_what_accelerate_would_do_on_its_own_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, advice: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"accelerate's configuration turns on .*{advice}"):
        train.run(config(tmp_path / "run", home / "sd", home / "pairs.jsonl"))


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "sft", "loss": {"kind": "denoising"}, "lora": None, "optim__train_text_encoder": True},
        {"optim__optimizer": "adamw8bit"},
    ],
)
def test_what_cannot_be_shared_is_refused(home: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sharding: fsdp2 goes with optimizer adamw.* or use sharding: none"):
        config(tmp_path, home / "sd", home / "pairs.jsonl", sharding="fsdp2", **changes)


@pytest.mark.parametrize(
    "changes", [{"noise": {"kind": "ddim_inversion"}}, {"reference": {"kind": "cached", "draws": 2}}]
)
def test_passes_that_some_processes_skip_are_refused(home: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """A collective in one process alone would hang, or mix up tensors."""
    with pytest.raises(ValueError, match="fsdp2 needs as many passes of the denoiser in every process"):
        config(tmp_path, home / "sd", home / "pairs.jsonl", sharding="fsdp2", **changes)


# ------------------------------------------------------------------------------------------- signals, real launches


def _start(file: Path) -> subprocess.Popen[str]:
    command = [*LAUNCH, "-m", "mmalign", "train", str(file), "--resume"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment())


def _wait_for_lines(run: Path, wanted: int, process: subprocess.Popen[str]) -> None:
    metrics, started = run / "metrics.jsonl", time.monotonic()
    while process.poll() is None and time.monotonic() - started < 300:
        if metrics.exists() and len(metrics.read_bytes().splitlines()) >= wanted:
            return
        time.sleep(0.02)
    pytest.fail(f"never came to step {wanted}: {process.communicate()[1][-3000:]}")


@pytest.mark.slow  # three launches of two processes
@pytest.mark.parametrize("layout", ["none", "fsdp2", "zero2"])
def test_interrupted_and_resumed_two_processes_end_in_the_same_bytes(home: Path, layout: str) -> None:
    more: dict[str, Any] = {"optim__steps": LONG, "checkpoint": {"every": 1000, "keep": 2}}
    file, _ = _config(home, "dpo", layout, 2, run=f"cut-{layout}", **more)
    process = _start(file)
    _wait_for_lines(home / f"cut-{layout}", 5, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0 and "run again with --resume to go on" in said, said[-3000:]
    (stopped,) = checkpoints.steps(home / f"cut-{layout}" / "checkpoints")
    assert 5 <= stopped < LONG
    whole, _ = _config(home, "dpo", layout, 2, run=f"whole-{layout}", **more)
    for each in (file, whole):
        process = _start(each)
        assert process.communicate(timeout=500) and process.returncode == 0
    found = [(_step(home / f"{kind}-{layout}", LONG) / "weights.safetensors").read_bytes() for kind in ("cut", "whole")]
    assert found[0] == found[1]
