"""The quickstart of a vision-language model from end to end: in small by default, in full in the slow suite."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmalign import quickstart_answers as quickstart
from mmalign.media_table import read_media_table


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quickstart")
    quickstart.run(output, seed=4, short=True)
    return output


def test_it_writes_what_it_promises(short: Path) -> None:
    summary = json.loads((short / "summary.json").read_text())
    assert summary["scenes"] == quickstart.SHORT.scenes
    assert summary["seed"] == 4
    figures = ("chair_i", "chair_s", "recall", "words", "unfinished")
    for name in (*figures, "pope_random", "pope_popular", "pope_adversarial"):
        figure = summary[name]
        assert figure["difference"] == pytest.approx(figure["aligned"] - figure["base"])
        assert figure["ci95"][0] <= figure["difference"] <= figure["ci95"][1]
    assert 0.6 < summary["recall"]["base"] <= 1
    assert (short / "train" / "export" / "adapter_model.safetensors").is_file()


def test_the_report_shows_what_was_said(short: Path) -> None:
    page = (short / "report.html").read_text()
    assert "Quickstart: answers" in page
    rows = [row for row in read_media_table(short / "aligned" / "table.jsonl") if "scene" in row.aux]
    assert sum(str(row.response).split(".")[0] in page for row in rows) > 0
    assert "chair_i" in page
    assert "data:image" in page


def test_a_second_run_does_nothing_again(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (short / "aligned" / "answers.jsonl").stat().st_mtime_ns
    first = json.loads((short / "summary.json").read_text())
    second = quickstart.run(short, seed=4, short=True)
    assert {k: v for k, v in second.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}
    assert "hallucinated mentions" in capsys.readouterr().out
    assert (short / "aligned" / "answers.jsonl").stat().st_mtime_ns >= before


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_less_is_made_up_and_as_much_is_found(seed: int, tmp_path: Path) -> None:
    summary = quickstart.run(tmp_path, seed=seed)
    assert summary["chair_i"]["ci95"][1] < 0
    assert summary["recall"]["difference"] >= -0.02
    assert summary["unfinished"]["aligned"] <= 0.01
