"""The parts of bench/selection.py that decide its figures."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import selection

from mmalign.guidance import prompts
from mmalign.media import write_image
from mmalign.media_table import MediaRow, write_media_table
from mmalign.shapes.scene import Scene, Shape, render


def test_spread_is_mean_distance_and_cells() -> None:
    places = [np.array([0.1, 0.1, 0.2]), None, np.array([0.1, 0.9, 0.2]), np.array([0.2, 0.15, 0.2])]
    apart = [0.8, (0.01 + 0.0025) ** 0.5, (0.01 + 0.5625) ** 0.5]
    assert selection.spread(places) == (pytest.approx(np.mean(apart)), 2.0)
    assert selection.spread([None, places[0]]) == (0.0, 1.0)


def test_a_set_is_compared_with_the_best_of_the_other_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two kept pictures far from each other against the better two of three that stand together."""
    for name, spots in (
        ("ours", [(16, 16, 0.5), (48, 48, 0.7)]),
        ("theirs", [(30, 30, 0.9), (34, 30, 0.8), (16, 48, 0.1)]),
    ):
        rows = []
        (tmp_path / name / "guidance").mkdir(parents=True)
        for k, (x, y, reward) in enumerate(spots):
            picture = tmp_path / name / f"{k}.png"
            write_image(picture, render(Scene((Shape("circle", "red", float(x), float(y), 12.0),), "white")))
            (tmp_path / name / "guidance" / f"{k}.json").write_text(json.dumps({"reward": reward}))
            rows.append(MediaRow(str(k), "a red circle", str(picture)))
        write_media_table(tmp_path / name / "table.jsonl", rows)
    selection.diversity(Namespace(ours=tmp_path / "ours", theirs=tmp_path / "theirs"))
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("distance: set 0.707, best of n 0.06")
    assert told[1].startswith("cells: set 2.000, best of n 2.000")
    assert told[2].startswith("reward: set 0.600, best of n 0.850, difference -0.250")


def test_playing_tells_true_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "CHECKED", (4, 8))
    values = np.linspace(0, 1, 6)[:, None] + np.zeros((6, 3))
    embeddings = prompts.standardised(prompts.choice_features(prompts.expand("{a|b|c} {d|e}")))
    told = selection.play(values, embeddings, 1, 8, "random", ())
    pairs = [prompts.random_pair(6, 1, number) for number in range(8)]
    assert len(told) == 3 and told[2] == pytest.approx(np.mean([k / 5 for pair in pairs for k in pair]))
    assert all(value in values for value in told[:2])
