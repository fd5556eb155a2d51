"""`mmalign score` with a block `vbench`: clips in, `vbench.json` and the reference's files out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from vbench_run_kit import PROMPTS, config, standard, vbench_home

from mmalign.cli import app
from mmalign.media import read_video, write_image, write_video
from mmalign.report import build
from mmalign.results import read_results
from mmalign.score import plan_for, run
from mmalign.score_plan import to_do
from mmalign.score_shares import costs, share_out
from mmalign.score_vbench import specs
from mmalign.vbench.record import read_record
from mmalign.vbench.results import read_eval_results


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vbench_home(tmp_path_factory.mktemp("vbench"))


def flicker(path: Path) -> float:
    """The formula once more, in numpy."""
    frames = np.asarray(read_video(path).frames, dtype=np.float64)
    return (255 - np.abs(np.diff(frames, axis=0)).mean()) / 255


# ------------------------------------------------------------------------------------------------ what is written


def test_a_suite_becomes_scores_and_files(home: Path, tmp_path: Path) -> None:
    folder = run(config(home / "clips", tmp_path / "out", block=standard(home, name="mine", model="tiny")))
    record = read_record(folder)
    values = {path.name: flicker(path) for path in (home / "clips").iterdir()}
    (dimension,) = record.dimensions
    assert dimension.name == "temporal_flickering" and dimension.kind == "exact"
    assert dimension.score == pytest.approx(np.mean(list(values.values())), abs=1e-9)
    assert (dimension.n, dimension.expected, dimension.missing, dimension.coverage) == (9, 9, 0, 1.0)
    assert dimension.normalised == pytest.approx((dimension.score - 0.6293) / (1 - 0.6293))
    assert dimension.ci95 is not None and dimension.ci95[0] <= dimension.score <= dimension.ci95[1]
    assert record.model == "tiny" and record.mode == "standard" and record.suite == "suite.json"
    assert record.totals["quality"].value is None and "dynamic_degree" in record.totals["quality"].missing
    assert record.decoder and record.libraries["torch"] and record.results == "mine_eval_results.json"
    found = read_eval_results(folder / "mine_eval_results.json")["temporal_flickering"]
    assert found.score == dimension.score
    assert {Path(clip.path).name: clip.value for clip in found.clips} == pytest.approx(values, abs=1e-9)
    info = json.loads((folder / "mine_full_info.json").read_text())
    assert [row["prompt_en"] for row in info] == PROMPTS, "of the dimensions that were asked for alone"
    assert [len(row["video_list"]) for row in info] == [3, 3, 3] and Path(info[1]["video_list"][0]).is_file()
    assert not [name for name in os.listdir(folder) if name.startswith(".") and name != ".lock"], "nothing half written"
    results = read_results(folder).rows
    assert {row["group"] for row in results} == set(PROMPTS)


def test_the_report_shows_the_rows_that_the_config_names(home: Path, tmp_path: Path) -> None:
    folder = run(config(home / "clips", tmp_path / "out", block=standard(home, against=["Kling"])))
    text = build([folder], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Kling" in text and "Open-Sora-2.0" not in text
    with pytest.raises(ValueError, match=r"the board has no 'Klin'\. Did you mean 'Kling'"):
        plan_for(config(home / "clips", tmp_path, block=standard(home, against=["Klin"])))


@pytest.fixture(name="broken")
def _broken(home: Path, tmp_path: Path) -> Path:
    """One clip missing, one that is cut off, and a file that is none."""
    clips = tmp_path / "clips"
    shutil.copytree(home / "clips", clips)
    (clips / "a red bird-0.mp4").unlink()
    whole = (clips / "a red bird-1.mp4").read_bytes()
    (clips / "a red bird-1.mp4").write_bytes(whole[:300])
    (clips / "Thumbs.db").write_bytes(b"x")
    return clips


def test_nothing_is_left_out_in_silence(home: Path, tmp_path: Path, broken: Path) -> None:
    records = {}
    for policy in ("error", "skip", "zero"):
        block = standard(home, on_error=policy)
        records[policy] = read_record(run(config(broken, tmp_path / "out", block=block)))
    (error,), (skip,), (zero,) = (record.dimensions for record in records.values())
    good = [flicker(path) for path in broken.glob("*.mp4") if path.name[-5] in "012" and path.stat().st_size > 300]
    assert len(good) == 7 and error.score is None
    assert skip.score == pytest.approx(np.mean(good), abs=1e-9) and zero.score == pytest.approx(sum(good) / 9, abs=1e-9)
    for each in (error, skip, zero):
        assert (each.n, each.expected, each.missing, each.failed) == (7, 9, 1, 1)
        assert each.bounds == pytest.approx((sum(good) / 9, (sum(good) + 2) / 9))
        assert "truncated" in next(iter(each.reasons))
    assert "no score while 2 of 9 clips have none" in error.notes[0]
    assert "left out of the mean; with them the score lies between" in skip.notes[0]
    assert "counted as 0" in zero.notes[0]
    info = json.loads((tmp_path / "out" / "vbench_full_info.json").read_text())
    assert [len(row["video_list"]) for row in info] == [3, 3, 2]


def test_the_command_says_what_is_missing_and_ends_with_1(
    home: Path, tmp_path: Path, broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"{key}={value}" for key, value in {
        "vbench.suite": home / "suite.json", "vbench.samples": 3, "device": "cpu", "decode_workers": 1,
    }.items()]  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(
        f"media: {broken}\noutput: {tmp_path / 'o'}\nevaluators: [{{name: temporal_flickering}}]\nvbench: {{}}"
    )
    sets = [part for word in words for part in ("--set", word)]
    with caplog.at_level("INFO", "mmalign"):
        ended = CliRunner().invoke(app, ["score", str(path), *sets])
    assert ended.exit_code == 1, ended.output
    assert "temporal_flickering: 8 of 9 clips, 1 missing: a red bird-0" in caplog.text
    assert "Thumbs.db" in caplog.text
    assert "temporal_flickering: no score (7 of 9 clips, 1 missing, 1 failed)" in ended.output
    assert "no score of temporal_flickering" in ended.stderr
    assert (tmp_path / "o" / "vbench.json").is_file(), "all else is written"
    ended = CliRunner().invoke(app, ["score", str(path), *sets, "--set", "vbench.on_error=skip"])
    assert ended.exit_code == 0 and "quality: none, without subject_consistency" in ended.output


def test_strict_is_the_default_of_every_evaluator_that_has_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign import score_vbench
    from mmalign.config import Strict

    class Params(Strict):
        rules: str = "compat"

    class Ruled:
        pass

    Ruled.Params = Params  # type: ignore[attr-defined]
    plain = score_vbench.evaluator_class("temporal_flickering")
    monkeypatch.setattr(score_vbench, "evaluator_class", lambda name, plugins: Ruled if "color" in name else plain)
    asked = config(tmp_path, tmp_path, "color@clip", ("color", {"rules": "compat"}), "temporal_flickering",
                   block={"rules": "strict"})  # fmt: skip
    assert specs(asked) == [
        ("color@clip", {"rules": "strict"}), ("color", {"rules": "compat"}), ("temporal_flickering", {})
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ the check


def test_check_says_what_is_there(home: Path, broken: Path) -> None:
    words = ["vbench", "check", str(broken), "--suite", str(home / "suite.json"), "--samples", "3"]
    ended = CliRunner().invoke(app, [*words, "-d", "temporal_flickering"])
    assert ended.exit_code == 1 and "temporal_flickering: 8 of 9 clips, 1 missing: a red bird-0" in ended.stdout
    told = json.loads(CliRunner().invoke(app, [*words, "-d", "temporal_flickering", "--json"]).stdout)
    assert told["dimensions"]["temporal_flickering"] == {"expected": 9, "found": 8, "missing": ["a red bird-0"]}
    assert told["others"] == ["Thumbs.db"]
    every = CliRunner().invoke(app, words)
    assert "human_action: 0 of 3 clips" in every.stdout and "no clip at all" in every.stdout
    whole = CliRunner().invoke(app, ["vbench", "check", str(home / "clips"), *words[3:], "-d", "temporal_flickering"])
    assert whole.exit_code == 0
    wrong = CliRunner().invoke(app, [*words, "-d", "scene"])
    assert "has none called 'scene'" in str(wrong.exception)


# ------------------------------------------------------------------------------------------------ one pass


def test_batches_and_processes_change_nothing(home: Path, tmp_path: Path) -> None:
    """1 and 8 clips at a time, and two processes, whose shares differ from those of one."""
    texts = {}
    for name, more in {"one": {"batch_size": 16}, "eight": {"batch_size": 128}, "two": {"processes": 2}}.items():
        texts[name] = read_record(run(config(home / "clips", tmp_path / name, block=standard(home), **more)))
    assert texts["one"] == texts["eight"] == texts["two"]
    parts = [read_results(tmp_path / name).rows for name in texts]
    scores = [{row["sample"]: row["score"] for row in rows} for rows in parts]
    assert scores[0] == scores[1] == scores[2] and len(scores[0]) == 9


@pytest.mark.usefixtures("plugins")
def test_a_killed_run_computes_only_the_rest(home: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("")
    path = tmp_path / "c.yaml"
    path.write_text(
        json.dumps(
            {
                "media": str(home / "clips"),
                "output": str(tmp_path / "out"),
                "device": "cpu",
                "batch_size": 16,
                "decode_workers": 1,
                "evaluators": [
                    {"name": "temporal_flickering"},
                    {"name": "slow", "params": {"seconds": 0.25, "log": str(log)}},
                ],
                "vbench": {},
            }
        )
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mmalign", "score", str(path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        until = time.monotonic() + 60
        while len(log.read_text().splitlines()) < 3 and time.monotonic() < until and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    before = len(log.read_text().splitlines())
    assert 3 <= before < 9, "killed in the middle"
    kept = sum(row["evaluator"].startswith("slow") for row in read_results_raw(tmp_path / "out"))
    assert before - kept <= 2, "the clip in work and the one that was being written"
    slow = ("slow", {"seconds": 0.25, "log": log})
    folder = run(config(home / "clips", tmp_path / "out", "temporal_flickering", slow, batch_size=16))
    whole = run(config(home / "clips", tmp_path / "whole"))
    assert read_record(folder).dimensions == read_record(whole).dimensions
    assert len(log.read_text().splitlines()) - before == 9 - kept, "what was written is not computed again"


def read_results_raw(folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return [row for part in sorted((folder / "parts").glob("*.parquet")) for row in pq.read_table(part).to_pylist()]


# ------------------------------------------------------------------------------------------------ shares


def test_shares_cost_about_the_same(tmp_path: Path) -> None:
    """Clips of 2 to 60 frames and two sizes: by number alone one process would get three times the other's work."""
    rng = np.random.default_rng(1)
    for number in range(24):
        frames, side = (60, 64) if number % 2 == 0 and number < 12 else (int(rng.integers(2, 12)), 32)
        write_video(
            tmp_path / "clips" / f"{number:02d}.mp4", torch.zeros((frames, 3, side, side), dtype=torch.uint8), fps=8
        )
    plan = plan_for(config(tmp_path / "clips", tmp_path / "out", batch_size=16))
    todo = to_do(plan, set())
    each = costs(plan, todo)
    assert each[0] == 2 * 60 * 64 * 64, "frames x pixels x (1 + one evaluator)"
    for number in (2, 3, 5):
        shares = share_out(plan, todo, number)
        assert sorted(batch[0][0] for share in shares for batch in share) == list(range(24)), "each batch once"
        assert all([batch[0][0] for batch in share] == sorted(batch[0][0] for batch in share) for share in shares)
        loads = [sum(each[todo.index(batch)] for batch in share) for share in shares]
        assert max(loads) <= sum(loads) / number + max(each), "within one batch of the mean"
        if number < 5:
            assert max(loads) / min(loads) < 1.1
        assert shares == share_out(plan, todo, number)
    dealt = [sum(each[place] for place in range(rank, 24, 2)) for rank in range(2)]
    assert max(dealt) / min(dealt) > 3, "as they were dealt before"


def test_equal_costs_go_round_and_what_cannot_be_read_costs_nothing(tmp_path: Path) -> None:
    for number in range(6):
        write_video(tmp_path / f"{number}.mp4", torch.zeros((4, 3, 32, 32), dtype=torch.uint8), fps=8)
    plan = plan_for(config(tmp_path, tmp_path / "out", batch_size=16))
    todo = to_do(plan, set())
    assert share_out(plan, todo, 2) == [todo[::2], todo[1::2]]
    assert share_out(plan, todo, 1) == [todo]
    (tmp_path / "3.mp4").write_bytes(b"no clip at all" * 100)
    (tmp_path / "4.mp4").unlink()
    lines = [json.dumps({"media": f"{number}.mp4"}) for number in range(6)]
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    plan = plan_for(config(tmp_path / "table.jsonl", tmp_path / "out", batch_size=16))
    found = costs(plan, to_do(plan, set()))
    assert found[0] == found[1] == 2 * 4 * 32 * 32 and found[4] == 2.0
    assert found[3] == 2 * 1400 * 100, "by its bytes, where there is no header"


def test_folders_of_frames_cost_their_pixels(tmp_path: Path) -> None:
    for name, number in (("long", 9), ("short", 3), ("empty", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "about.txt").write_text("x")
        for frame in range(number):
            write_image(tmp_path / name / f"{frame}.png", np.zeros((20, 30, 3), np.uint8))
    lines = [json.dumps({"media": name, "modality": "video"}) for name in ("long", "short", "empty")]
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    plan = plan_for(config(tmp_path / "table.jsonl", tmp_path / "out", batch_size=16))
    assert costs(plan, to_do(plan, set())) == [2 * 9 * 600, 2 * 3 * 600, 2.0]
