"""The quickstart from end to end: in small by default, and on three seeds against its bar in the slow suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from table_kit import pairs

from mmalign import quickstart
from mmalign.shapes.annotators import ANNOTATORS
from mmalign.tables import read_preferences

KEYS = {"win_rate", "win_rate_ci95", "fidelity_base", "fidelity_aligned", "n", "seed", "seconds"}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quickstart")
    quickstart.run(output, seed=4, short=True)
    return output


def test_it_writes_what_it_promises(short: Path) -> None:
    summary = json.loads((short / "summary.json").read_text())
    assert summary.keys() >= KEYS
    assert summary["n"] == quickstart.SHORT.held_out
    assert summary["seed"] == 4
    assert 0 <= summary["win_rate_ci95"][0] <= summary["win_rate"] <= summary["win_rate_ci95"][1] <= 1
    page = (short / "report.html").read_text()
    assert "Quickstart" in page and "shapes_truth" in page and "hps" in page


def test_the_lora_is_loadable_by_plain_diffusers_names(short: Path) -> None:
    assert (short / "train/export/pytorch_lora_weights.safetensors").is_file()
    assert list((short / "train/export/comfyui").glob("*.safetensors"))


def test_labels_are_the_annotators(short: Path) -> None:
    """Every row is judged once, and what wins has the higher noise-free utility more often than not."""
    table = read_preferences(short / "preferences.jsonl")
    assert len(table.rows) == quickstart.SHORT.train_prompts
    assert {row.user_id for row in table.rows} == {ANNOTATORS[quickstart.ANNOTATOR].user_id}
    assert len(pairs(table, "soft")) == len(table.rows)


def test_a_second_run_does_nothing_again(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (short / "pairs/images").iterdir()}
    first = json.loads((short / "summary.json").read_text())
    second = quickstart.run(short, seed=4, short=True)
    assert {path: path.stat().st_mtime_ns for path in (short / "pairs/images").iterdir()} == before
    assert {k: v for k, v in second.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}
    assert "aligned beats base" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_alignment_reaches_the_bar(seed: int, tmp_path: Path) -> None:
    """Win rate >= 0.65 with the interval above 0.58, and fidelity at most one point lower."""
    summary = quickstart.run(tmp_path, seed=seed)
    assert summary["n"] >= 256
    assert summary["win_rate"] >= 0.65
    assert summary["win_rate_ci95"][0] > 0.58
    assert summary["fidelity_aligned"] >= summary["fidelity_base"] - 0.01
