"""Sub-scores that only count are kept in the results and nowhere taken for a measure of quality."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from plugin_package import install

from mmalign import compare, prefer, report, report_sheet
from mmalign.discovery import load_evaluator
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.jobs_align import RewardSpec
from mmalign.media import write_image
from mmalign.pixel_scores import PixelScorer
from mmalign.results import Results, read_results
from mmalign.rounds import _means
from mmalign.score import run
from mmalign.score_plan import make_jobs

SOURCE = '''
import torch

from mmalign.evaluation import Evaluator


class Counting(Evaluator):
    """Brightness, and over how many pixels it is the mean."""

    counts = {"pixels"}
    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        values = torch.stack([image.float().mean() / 255 for image in batch.images])
        if float(values.min()) == 0:
            raise ValueError("black")
        pixels = torch.tensor([float(image[0].numel()) for image in batch.images])
        return {"pixels": pixels, "score": values}


class Several(Counting):
    """Two scores and a count."""

    def score(self, batch):
        values = Counting.score(self, batch)
        return {"light": values["score"], "dark": 1 - values["score"], "pixels": values["pixels"]}
'''


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Results of two models with three good pictures of different sizes and a black one, for both evaluators."""
    entries = {"counting": "counter_code:Counting", "several": "counter_code:Several"}
    monkeypatch.syspath_prepend(str(install(tmp_path / "site", entries, "counter", SOURCE)))
    found = []
    for model, values in (("base", (10, 20, 30, 0)), ("tuned", (40, 80, 10, 0))):
        lines = []
        for i, value in enumerate(values):
            write_image(tmp_path / model / f"{i}.png", np.full((4 + i, 5, 3), value, np.uint8))
            lines.append({"sample": str(i), "media": f"{i}.png", "prompt": f"p{i}", "seed": i, "model": model})
        table = tmp_path / model / "table.jsonl"
        table.write_text("\n".join(map(json.dumps, lines)))
        specs = (EvaluatorSpec(name="counting"), EvaluatorSpec(name="several"))
        found.append(run(ScoreConfig(table=table, output=tmp_path / model / "scores", evaluators=specs, device="cpu")))
    yield found
    sys.modules.pop("counter_code", None)


def test_the_summary_has_no_figures_of_counts(folders: list[Path]) -> None:
    entries = json.loads((folders[0] / "summary.json").read_text())["evaluators"]
    assert entries["counting"]["counts"] == ["pixels"]
    assert entries["counting"]["mean"] == pytest.approx(20 / 255), "a single score, as if there were no count"
    assert "subscores" not in entries["counting"] and "by_model" not in entries["counting"]
    assert (entries["counting"]["n_ok"], entries["counting"]["n_error"]) == (3, 1)
    assert list(entries["counting"]["reasons"].values()) == [1]
    assert set(entries["several"]["subscores"]) == {"light", "dark"}


def test_results_keep_them_apart(folders: list[Path]) -> None:
    results = read_results(folders[0])
    assert results.labels() == ["counting", "several/dark", "several/light"]
    assert results.count_labels == {"counting/pixels", "several/pixels"}
    assert [row["score"] for row in results.rows_of("counting/pixels")] == [20, 25, 30, None], (
        "a failed item has a row of each"
    )
    without = Results(results.folder, results.rows)  # folders of before have no `counts`
    assert "counting/pixels" in without.labels() and not without.count_labels


def test_comparison_report_and_contact_sheet_leave_them_out(folders: list[Path], tmp_path: Path) -> None:
    comparison = compare.compare(*folders)
    assert [score.label for score in comparison.scores] == ["counting", "several/dark", "several/light"]
    page = report.build(folders, tmp_path / "report.html").read_text()
    assert "several/light" in page and "counting/pixels" not in page and "several/pixels" not in page
    assert "counting/pixels" not in report.build(folders[:1], tmp_path / "one.html").read_text()
    with pytest.raises(ValueError, match="rank_by names counting/pixels"):
        report.build(folders, tmp_path / "no.html", rank_by=["counting/pixels"])
    text = report_sheet.build(folders[:1], tmp_path / "sheet.html").read_text()
    data = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL).group(1))
    assert [each["label"] for each in data["scores"]] == ["counting", "several/dark", "several/light"]
    assert '"counting/pixels"' in json.dumps(data["items"]), "told beside the item, and not sorted by"


def test_rewards_are_no_counts(folders: list[Path]) -> None:
    results = read_results(folders[0])
    specs = [RewardSpec(name="counting")]
    jobs = make_jobs([("counting", {})])
    (reward,) = prefer.resolve(specs, jobs, results)
    assert reward.subscore == "score", "the only one left, so that none has to be named"
    with pytest.raises(ValueError, match="has no sub-score 'pixels'"):
        prefer.resolve([RewardSpec(name="counting", subscore="pixels")], jobs, results)
    assert set(_means(results, set())) == {"held_out/counting", "held_out/several/light", "held_out/several/dark"}
    pixels = PixelScorer(load_evaluator("several"), "several")
    assert set(pixels.named(torch.full((2, 3, 4, 4), 0.5), ["", ""])) == {"light", "dark"}
