"""`mmalign bench reward` on suites of prompts that nobody has judged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import reward_kit as kit
from public_kit import GECKO, needs
from reward_kit import figures, run


def test_hpsv2s_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kit.styles(tmp_path / "hpd")
    rng = np.random.default_rng(0)
    values: dict[str, float | None] = {
        f"{style}/{n:05d}.jpg": float(rng.normal(0.28, 0.02))
        for style in ("anime", "concept-art", "paintings", "photo")
        for n in range(160)
    }
    anime = [100 * value for name, value in values.items() if name.startswith("anime") and value is not None]
    del values["photo/00003.jpg"]
    report = run("hpsv2_benchmark", folder, tmp_path / "out", scores=kit.scores(tmp_path / "t.jsonl", values))
    table = figures(report)["styles"]
    means = [np.mean(anime[:80]), np.mean(anime[80:])]
    assert table["styles"]["anime"]["mean"] == pytest.approx(np.mean(means))
    assert table["styles"]["anime"]["std"] == pytest.approx(np.std(means))
    assert table["styles"]["photo"]["missing"] == 1 and table["styles"]["photo"]["groups"] == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "SDXL Refiner 0.9 by HPS v2.1 31.34" in out and "have no figure here" in out
    assert f"{np.mean(means):.2f}" in out
    drawn = kit.scores(tmp_path / "d.jsonl", {"00000.jpg": 0.2, "00001.jpg": 0.3})
    assert figures(run("hpsv2_drawbench", folder, tmp_path / "d", scores=drawn))["styles"]["average"]["mean"] == 25.0


def test_drawbench_is_one_mean(tmp_path: Path) -> None:
    """HPSv2 averages its 200 prompts at once, and not groups of 80 of which the last is smaller."""
    folder = kit.styles(tmp_path / "hpd")
    (folder / "benchmark/drawbench.json").write_text(json.dumps([f"prompt {n}" for n in range(200)]))
    values: dict[str, float | None] = {f"{n:05d}.jpg": float(n) for n in range(200)}
    table = kit.scores(tmp_path / "d.jsonl", values)
    found = figures(run("hpsv2_drawbench", folder, tmp_path / "d", scores=table))["styles"]
    drawn = found["styles"]["drawbench"]
    assert drawn["mean"] == pytest.approx(found["average"]["mean"]) == pytest.approx(9950.0)
    assert drawn["groups"] == 1 and drawn["std"] is None


def test_geneval_from_its_own_results(tmp_path: Path) -> None:
    """results.jsonl of the authors' detector: a path and a flag for each picture."""
    lines = [json.dumps({"tag": tag, "include": [], "prompt": f"{tag} {n}"}) for n, tag in enumerate(["a", "a", "b"])]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    correct = [True, False, True, True, False, False, False, False, True, True, True, False]
    rows = [
        {"filename": f"/data/out/{n // 4:05d}/samples/{n % 4:04d}.png", "tag": "a", "correct": value, "reason": ""}
        for n, value in enumerate(correct)
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run("geneval", tmp_path, tmp_path / "out", scores=tmp_path / "results.jsonl")
    found = figures(report)["tasks"]
    assert found["tasks"]["a"]["mean"] == 3 / 8 and found["tasks"]["b"]["mean"] == 3 / 4
    assert found["overall"]["mean"] == pytest.approx((3 / 8 + 3 / 4) / 2) and found["images"]["mean"] == 0.5
    assert found["prompts"]["mean"] == pytest.approx(2 / 3)
    text = (tmp_path / "results.jsonl").read_text()  # its page has four digits, its sampling script writes five
    (tmp_path / "results.jsonl").write_text(text.replace("samples/", "samples/0"))
    five = run("geneval", tmp_path, tmp_path / "five", scores=tmp_path / "results.jsonl")
    assert figures(five)["tasks"] == found and five["results"][0]["coverage"]["scored"] == 12


@needs(GECKO)
def test_geckos_skills(tmp_path: Path) -> None:
    values = {str(n): float(n % 7) for n in range(1500)}
    report = run("gecko", GECKO, tmp_path / "out", scores=kit.scores(tmp_path / "t.jsonl", values))
    found = figures(report)["skills"]
    assert found["all"]["missing"] == 46 and found["families"]["part"]["labels"]["Gecko(S)"]["n"] == 930
    assert report["results"][0]["coverage"]["unscored"]["n"] == 46
    counting = found["families"]["skill"]["labels"]["Gecko(S) att/count"]
    assert counting["n"] == 93 + 13 + 11 + 11 and counting["low"] < counting["mean"] < counting["high"]
