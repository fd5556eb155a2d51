"""Scoring: planning, rows for everything that happens, what is done already, several processes, figures."""

import errno
import json
import os
import sys
import weakref

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mmalign import score_decode, score_store
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.media import write_image, write_video
from mmalign.results import read_results
from mmalign.score import run
from mmalign.score_plan import make_jobs
from mmalign.score_store import SCHEMA, Store
from mmalign.score_summary import account

pytestmark = pytest.mark.usefixtures("plugins")


def pictures(folder, values, prompts=None, name="table.jsonl", **columns):
    """A table of plain grey images; a value of None is a file that is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, value in enumerate(values):
        if value is not None:
            write_image(folder / f"{index}.png", np.full((6, 5, 3), value, np.uint8))
        row = {
            "sample": f"s{index}",
            "media": f"{index}.png",
            **{key: column[index] for key, column in columns.items()},
        }
        lines.append(json.dumps(row | ({"prompt": prompts[index]} if prompts else {})))
    (folder / name).write_text("\n".join(lines))
    return folder / name


def config(table, output, *evaluators, **settings):
    specs = [e if isinstance(e, tuple) else (e, {}) for e in evaluators]
    specs = tuple(EvaluatorSpec(name=name, params=params) for name, params in specs)
    return ScoreConfig(table=table, output=output, evaluators=specs, device="cpu", **settings)


def rows_of(folder):
    return {(row["sample"], row["evaluator"], row["subscore"]): row for row in read_results(folder).rows}


def read(folder, name="summary.json"):
    return json.loads((folder / name).read_text())


# ------------------------------------------------------------------------------------------------ rows and figures


def test_rows_and_summary_are_right(tmp_path):
    values, prompts = [0, 51, 102, 255, 153], ["a b c", "a b c", "dog", "cat and a mouse", "dog"]
    table = pictures(tmp_path, values, prompts, model=["base", "base", "tuned", "tuned", "base"], seed=[1, 2, 3, 4, 5])
    folder = run(config(table, tmp_path / "out", "brightness", "words", batch_size=2))
    rows = rows_of(folder)
    assert len(rows) == 15
    for index, value in enumerate(values):
        row = rows[f"s{index}", "brightness", "score"]
        assert row["score"] == pytest.approx(value / 255, abs=1e-7) and row["status"] == "ok"
        assert row["prompt"] == prompts[index] and row["seed"] == index + 1 and row["decoder"].startswith("pillow")
        assert len(row["media_hash"]) == 64 and row["evaluator_version"] == 1 and row["prompt_truncated"] is None
    parts = list((folder / "parts").glob("part-*.parquet"))
    assert [pq.read_schema(part).names for part in parts] == [SCHEMA.names]
    entry = read(folder)["evaluators"]["brightness"]
    assert (entry["n_ok"], entry["n_skipped"], entry["n_error"]) == (5, 0, 0)
    assert entry["mean"] == pytest.approx(np.mean(values) / 255) and entry["std"] == pytest.approx(
        np.std(values, ddof=1) / 255
    )
    low, high = entry["ci95"]
    assert low < entry["mean"] < high
    assert entry["licence"] == "Apache-2.0" and entry["higher_is_better"] is True and entry["weight_hash"] is None
    assert entry["by_model"]["tuned"]["score"]["mean"] == pytest.approx((102 + 255) / 2 / 255)
    words = read(folder)["evaluators"]["words"]
    assert words["truncated_prompt_share"] == pytest.approx(1 / 5)
    assert words["subscores"]["letters"]["n"] == 5 and words["subscores"]["words"]["mean"] == pytest.approx(
        (3 + 3 + 1 + 4 + 1) / 5
    )
    about = read(folder, "run.json")
    assert about["computed"] == 10 and about["device"] == "cpu"


def test_intervals_are_clustered_by_prompt(tmp_path):
    values = [value for value in range(20, 220, 20) for _ in range(3)]
    wide = run(config(pictures(tmp_path / "a", values, [str(v) for v in values]), tmp_path / "wide", "brightness"))
    alone = [str(place) for place in range(30)]
    narrow = run(config(pictures(tmp_path / "b", values, alone), tmp_path / "narrow", "brightness"))
    spans = [np.ptp(read(folder)["evaluators"]["brightness"]["ci95"]) for folder in (wide, narrow)]
    assert spans[0] > spans[1] * 1.4


def test_every_failure_is_a_row_with_its_reason(tmp_path):
    prompts = ["one", "explode", "two words", "three", "", "missing", "broken"]
    table = pictures(tmp_path, [10, 20, 30, 40, 50, None, 60], prompts)
    whole = (tmp_path / "6.png").read_bytes()
    (tmp_path / "6.png").write_bytes(whole[: len(whole) // 2])
    folder = run(config(table, tmp_path / "out", "words", "brightness"))
    rows = rows_of(folder)
    assert len(rows) == 7 * 3, "no gaps: every item has a row for every sub-score"
    for name in ("words", "letters"):
        status = [rows[f"s{index}", "words", name]["status"] for index in range(7)]
        assert status == ["ok", "error", "error", "ok", "skipped", "error", "error"]
        assert "the prompt exploded" in rows["s1", "words", name]["reason"]
        assert "words is nan" in rows["s2", "words", name]["reason"]
        assert rows["s4", "words", name]["reason"] == "the row has no prompt"
        assert "5.png" in rows["s5", "words", name]["reason"] and "no such file" in rows["s5", "words", name]["reason"]
        assert "6.png" in rows["s6", "words", name]["reason"]
    entry = read(folder)["evaluators"]["words"]
    assert (entry["n_ok"], entry["n_skipped"], entry["n_error"]) == (2, 1, 4)
    assert any("exploded" in reason for reason in entry["reasons"])
    assert entry["examples"][next(reason for reason in entry["reasons"] if "exploded" in reason)] == "s1"
    assert any(line.endswith("the prompt exploded' (s1)") for line in account(read(folder))), "which item it is"
    assert rows["s4", "brightness", "score"]["status"] == "ok", (
        "an item that one evaluator skips is scored by the other"
    )
    # A second run tries the failures again, and only them; it gives the same rows.
    again = rows_of(run(config(table, tmp_path / "out", "words", "brightness")))
    assert {key: (row["status"], row["score"]) for key, row in again.items()} == {
        key: (row["status"], row["score"]) for key, row in rows.items()
    }
    assert read(folder, "run.json")["computed"] == 4 + 2
    # And once the files are mended, their rows become scores.
    write_image(tmp_path / "5.png", np.full((4, 4, 3), 70, np.uint8))
    (tmp_path / "6.png").write_bytes(whole)
    mended = rows_of(run(config(table, tmp_path / "out", "words", "brightness")))
    assert mended["s5", "words", "letters"]["score"] == 7.0 and mended["s6", "brightness", "score"]["status"] == "ok"
    assert len(mended) == 21


def test_an_evaluator_that_runs_out_of_memory_gets_smaller_batches_from_then_on(tmp_path, caplog):
    """The first batch of eight fails as a whole and in halves of four; what then goes through is what the rest gets."""
    table = pictures(tmp_path, range(1, 28))
    rows = rows_of(run(config(table, tmp_path / "out", ("hungry", {"most": 3}), "brightness", batch_size=8)))
    seen = sys.modules["plug_in_code"].Hungry.seen
    assert seen == [8, 4, 2, 2, 4, 2, 2] + [2] * 4 * 2 + [1, 2]
    assert [row["status"] for row in rows.values()] == ["ok"] * 27 * 2
    assert "ran out of memory on 8 items: 2 at a time from here" in caplog.text


def test_one_item_too_large_for_memory_does_not_make_all_batches_small(tmp_path):
    """A black picture never fits: it is an error, its batch of four is halved, and the next gets what went through."""
    table = pictures(tmp_path, [1, 0, 2, 3, *range(4, 12)])
    rows = rows_of(run(config(table, tmp_path / "out", ("hungry", {"most": 9}), batch_size=4)))
    assert sys.modules["plug_in_code"].Hungry.seen == [4, 2, 1, 1, 2] + [2, 2] * 2
    status = [rows[f"s{i}", "hungry[most=9]", "score"]["status"] for i in range(12)]
    assert status == ["ok", "error", *["ok"] * 10]
    assert "out of memory on one item" in rows["s1", "hungry[most=9]", "score"]["reason"]


def test_memory_of_a_pass_that_failed_is_free_for_its_halves(tmp_path, monkeypatch):
    """The exception's frames would hold it: what a failed pass had made is gone when the next begins."""
    alive = []

    class Large:
        pass

    def score(self, batch):
        assert not any(one() for one in alive), "the failed pass is still in memory"
        large = Large()
        alive.append(weakref.ref(large))
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.ones(1)

    table = pictures(tmp_path, [1, 2, 3])
    jobs = make_jobs([("hungry", {})])
    monkeypatch.setattr(jobs[0].cls, "score", score)
    rows = rows_of(run(config(table, tmp_path / "out", "hungry")))
    assert len(alive) == 3 + 2 and all(row["status"] == "ok" for row in rows.values())


def test_sets_are_scored_whole_or_not_at_all(tmp_path):
    values = [0, 100, 200, 255]
    table = pictures(tmp_path, values)
    folder = run(config(table, tmp_path / "out", "spread", "brightness"))
    (row,) = [row for row in read_results(folder).rows if row["evaluator"] == "spread"]
    assert row["score"] == pytest.approx(np.std(np.array(values) / 255, ddof=1)) and row["media"] == "4 items"
    assert read(folder)["evaluators"]["spread"]["mean"] == pytest.approx(row["score"])
    (tmp_path / "1.png").write_bytes(b"")
    (row,) = [row for row in read_results(run(config(table, tmp_path / "out", "spread"))).rows]
    assert row["status"] == "error" and "1 of 4 items cannot be read" in row["reason"]


def test_videos_are_decoded_by_plan_and_mixed_tables_skip(tmp_path):
    frames = torch.stack([torch.full((3, 16, 16), v, dtype=torch.uint8) for v in (0, 80, 160, 240)])
    write_video(tmp_path / "clip.mkv", frames, 8, lossless=True)
    table = pictures(tmp_path, [100], ["a still image"])
    table.write_text(table.read_text() + "\n" + json.dumps({"sample": "v", "media": "clip.mkv", "prompt": "a clip"}))
    folder = run(config(table, tmp_path / "out", "brightness", "words"))
    rows = rows_of(folder)
    # Uniform(2) takes the first and the last frame.
    assert rows["v", "brightness", "score"]["score"] == pytest.approx(120 / 255, abs=2 / 255)
    assert "pyav" in rows["v", "brightness", "score"]["decoder"]
    assert rows["v", "words", "letters"]["reason"] == "words scores images; this is a video"


# ------------------------------------------------------------------------------------------------ sharing


def test_each_medium_is_decoded_once_for_all_evaluators(tmp_path, monkeypatch):
    calls = []
    ask = score_decode._Process.ask
    monkeypatch.setattr(score_decode._Process, "ask", lambda *a: calls.append(str(a[1].media)) or ask(*a))
    run(
        config(pictures(tmp_path, range(5), ["x"] * 5), tmp_path / "out", "brightness", "words", "hungry", batch_size=2)
    )
    assert len(calls) == len(set(calls)) == 5


def test_processes_give_the_rows_of_one(tmp_path):
    table = pictures(tmp_path, range(0, 220, 20), ["a b c", "d"] * 5 + ["e"])
    outcomes = []
    for processes in (1, 2, 3):
        folder = run(
            config(table, tmp_path / f"out{processes}", "brightness", "words", batch_size=2, processes=processes)
        )
        outcomes.append({key: (row["score"], row["status"], row["key"]) for key, row in rows_of(folder).items()})
        figures = read(folder)["evaluators"]
        for entry in figures.values():
            entry.pop("seconds_per_item")
        outcomes[-1]["summary"] = figures
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_process_that_dies_is_named_and_finished_rows_stay(tmp_path):
    table = pictures(tmp_path, [0, *range(100, 111)])
    with pytest.raises(RuntimeError, match=r"process 0 ended with code 3.*the same command goes on"):
        run(config(table, tmp_path / "out", "fatal", batch_size=2, processes=2))
    kept = Store(tmp_path / "out").done()
    assert len(kept) == 6, "the other process finished its share"
    write_image(tmp_path / "0.png", np.full((4, 4, 3), 9, np.uint8))
    run(config(table, tmp_path / "out", "fatal", batch_size=2, processes=2))
    assert read(tmp_path / "out", "run.json")["computed"] == 6
    assert read(tmp_path / "out")["evaluators"]["fatal"]["n_ok"] == 12


# ------------------------------------------------------------------------------------------------ resume


def test_only_what_is_missing_is_computed(tmp_path):
    table = pictures(tmp_path, [10, 20, 30, 40], ["a", "b", "c", "d"])
    folder = tmp_path / "out"

    def computed(*evaluators, **settings):
        run(config(table, folder, *evaluators, **settings))
        return read(folder, "run.json")["computed"]

    assert computed("brightness") == 4
    assert computed("brightness") == 0
    assert computed("brightness", "words") == 4
    assert computed("brightness", dtype="bfloat16") == 4
    assert computed("brightness") == 0, "what another precision left behind is still there"
    assert {row["dtype"] for row in read_results(folder).rows} == {"float32"}, "and is what the folder shows again"
    assert computed(("brightness", {"scale": 2})) == 4
    assert {row["evaluator"] for row in read_results(folder).rows} == {"brightness[scale=2.0]"}
    write_image(tmp_path / "2.png", np.full((6, 5, 3), 35, np.uint8))
    assert computed("brightness") == 1
    assert rows_of(folder)["s2", "brightness", "score"]["score"] == pytest.approx(35 / 255)
    pictures(tmp_path, [10, 20, 35, 40], ["a", "b", "other", "d"])
    assert computed("brightness") == 0, "brightness does not read the prompt"
    assert computed("words") == 1
    pictures(tmp_path, [10, 20], ["a", "b"])
    assert computed("brightness") == 0
    assert len(read_results(folder).rows) == 2, "rows that left the table are not counted"


def test_a_new_version_is_computed_again(tmp_path, monkeypatch):
    table = pictures(tmp_path, [10, 20])
    run(config(table, tmp_path / "out", "brightness"))
    monkeypatch.setattr(sys.modules["plug_in_code"].Brightness, "version", 2)
    run(config(table, tmp_path / "out", "brightness"))
    assert read(tmp_path / "out", "run.json")["computed"] == 2
    assert {row["evaluator_version"] for row in read_results(tmp_path / "out").rows} == {2}


# ------------------------------------------------------------------------------------------------ messages


def test_a_missing_column_is_said_before_anything_is_loaded(tmp_path):
    table = pictures(tmp_path, [1, 2], model=["m", "m"])
    with pytest.raises(
        ValueError, match=r"words needs the column prompt; .*table\.jsonl has sample, media, modality, model"
    ):
        run(config(table, tmp_path / "out", "words"))
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_said_before_the_table_is_hashed(tmp_path, monkeypatch):
    monkeypatch.setattr("mmalign.score.make_plan", lambda *a: pytest.fail("too late"))
    with pytest.raises(ValueError, match="xswu/HPSv2"):
        run(
            config(pictures(tmp_path, [1], ["x"]), tmp_path / "out", ("hps", {"checkpoint": str(tmp_path / "none.pt")}))
        )


def test_a_table_of_the_wrong_modality_is_refused(tmp_path):
    table = pictures(tmp_path, [1], ["x"], modality=["video"])
    with pytest.raises(ValueError, match=r"words scores images; every row .* is of modality video"):
        run(config(table, tmp_path / "out", "words"))


def test_one_label_for_two_evaluators_is_refused(tmp_path):
    with pytest.raises(ValueError, match="both be called 'brightness'"):
        run(config(pictures(tmp_path, [1]), tmp_path / "out", "brightness", "brightness"))


def test_a_full_disk_leaves_no_half_part(tmp_path, monkeypatch):
    table = pictures(tmp_path, range(1, 5))
    run(config(table, tmp_path / "out", "hungry"))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(score_store.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*finished rows are kept") as error:
        run(config(table, tmp_path / "out", "hungry", "brightness"))
    assert error.value.errno == errno.ENOSPC
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert len(Store(tmp_path / "out").done()) == 4


def test_a_damaged_part_is_named(tmp_path):
    table = pictures(tmp_path, range(3))
    folder = run(config(table, tmp_path / "out", "brightness"))
    (part,) = (folder / "parts").glob("*.parquet")
    part.write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=rf"{part.name} cannot be read.*delete it and score again"):
        run(config(table, tmp_path / "out", "brightness"))
