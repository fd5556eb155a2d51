"""Answers in two processes, copied (DDP) or shared (FSDP2): they learn what one process learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from mllm_kit import answer_settings, mllm_folder, write_rows
from safetensors.torch import load_file

from mmalign import train

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
GENTLE = {"optim__lr": 2e-4, "optim__eps": 1e-5}  # where a gradient is 0 but for rounding Adam would take its sign
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "lora": ({"terms": ["dpo", "image_dpo"]}, ("none", "fsdp2", "zero2")),
    "qlora": ({"mllm__quantise": "4bit"}, ("none", "zero2")),
    "kto": ({"terms": ["kto"], "mllm__shared_prompt": "off"}, ("none",)),
    "full": ({"lora": None, "optim__gradient_checkpointing": True}, ("none", "fsdp2", "zero2")),
}
PAIRS = [(name, layout) for name, (_, layouts) in CASES.items() for layout in layouts]


@pytest.fixture(scope="module", name="runs")
def _runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case in one process with four rows a step, and in two with two each."""
    home = tmp_path_factory.mktemp("answers")
    model, table = mllm_folder(home / "model", "qwen2_5_vl"), write_rows(home, 8, images=(1, 2))
    files = []
    for name, (changes, layouts) in CASES.items():
        told = {"optim__steps": 3, **GENTLE, **changes}
        terms = told.pop("terms", ["dpo"])
        train.run(answer_settings(home / f"{name}-one", model, table, terms, optim__batch_size=4, **told))
        for layout in layouts:
            two = answer_settings(home / f"{name}-{layout}", model, table, terms, sharding=layout, **told)
            files.append(home / f"{name}-{layout}.yaml")
            files[-1].write_text(yaml.safe_dump(json.loads(two.model_dump_json())))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'tests'}"}
    command = [*LAUNCH, str(ROOT / "tests" / "processes.py"), *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return home


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_two_processes_learn_what_one_does(name: str, layout: str, runs: Path) -> None:
    one, two = (runs / f"{name}-{way}" for way in ("one", layout))
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (one, two)]
    losses = [[json.loads(line)["loss"] for line in each] for each in lines]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    file = "model.safetensors" if name == "full" else "adapter_model.safetensors"
    weights = [load_file(run / "export" / file) for run in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert float((value - weights[1][key]).abs().max()) < 2e-5, key


@pytest.mark.parametrize("name", ["lora", "full"])
def test_each_process_holds_its_share(name: str, runs: Path) -> None:
    shares = [json.loads((runs / f"{name}-fsdp2" / f"share-{rank}.json").read_text()) for rank in (0, 1)]
    assert all(share["held"] < 0.7 * share["total"] for share in shares)
