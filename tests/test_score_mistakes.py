"""What goes wrong around scoring, by whose fault ever: a row, or one message with its exit code, and never the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from plugin_package import install
from test_folder_table import Verb, _verb  # noqa: F401
from test_score import config, pictures, read, rows_of

from mmalign import score_sets, score_store
from mmalign.errors import Stopped
from mmalign.evaluation import resolve_device
from mmalign.jobs import Scoring
from mmalign.media import MAX_PIXELS, write_image
from mmalign.score import run
from mmalign.score_processes import stopped
from mmalign.score_store import SCHEMA, Store
from mmalign.video import MAX_CLIP_BYTES

ODD = '''
import torch
from typing import Literal
from mmalign.evaluation import Evaluator, ItemErrors, SetEvaluator, Strict


class Compared(Evaluator):
    """Mean difference from the reference."""

    needs = {"image", "reference"}
    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        assert len(batch.references) == len(batch)
        pairs = zip(batch.images, batch.references)
        return torch.stack([(image.float() - other[0].float()).mean() for image, other in pairs])


class Sums(SetEvaluator):
    """The number of items, or whatever it is told to do."""

    needs = {"image"}
    licence, source = "Apache-2.0", "a test"

    class Params(Strict):
        how: Literal["count", "nan", "inf", "update", "compute", "empty", "text"] = "count"
        words: list[str] = []  # a parameter that has no hash

    def __init__(self, params, backbones, device):
        super().__init__(params, backbones, device)
        self.number = 0

    def update(self, batch):
        if self.params.how == "update":
            raise KeyError("no update")
        self.number += len(batch)

    def compute(self):
        if self.params.how == "compute":
            raise KeyError("no score")
        found = {"nan": {"a": 1.0, "b": float("nan")}, "inf": float("-inf"), "empty": {}, "text": "many"}
        return found.get(self.params.how, self.number)


class Blind(Evaluator):
    """Scores any prompt, and cannot say of some what it saw of them."""

    needs = {"image", "prompt"}
    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        return torch.ones(len(batch))

    def truncated(self, prompts):
        if "explode" in prompts:
            raise KeyError("the prompt exploded")
        return [len(prompt) > 3 for prompt in prompts if prompt != "short"]


class Noting(Evaluator):
    """Notes what it read of each item, and scores all but two."""

    needs = {"image", "prompt"}
    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        for place, prompt in enumerate(batch.prompts):
            if prompt != "silent":
                batch.notes[place] = 7 if prompt == "seven" else f"read {prompt}"
        if "explode" in batch.prompts:
            raise KeyError("exploded")
        scores = torch.ones(len(batch))
        if "refuse" in batch.prompts:
            raise ItemErrors({batch.prompts.index("refuse"): ValueError("refused")}, scores)
        return scores
'''


@pytest.fixture(autouse=True)
def _odd(tmp_path, monkeypatch, verb):
    """The evaluators of `plugin_package` and those above, here and in processes that are started."""
    names = {"compared": "Compared", "sums": "Sums", "blind": "Blind", "noting": "Noting"}
    entries = {name: f"odd_code:{value}" for name, value in names.items()}
    odd = str(install(tmp_path / "odd", entries, "odd", ODD))
    monkeypatch.syspath_prepend(odd)
    paths = [str(Path(__file__).resolve().parents[1]), odd, str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    yield
    sys.modules.pop("odd_code", None)


# ------------------------------------------------------------------------------------------------ rows


def test_a_reference_that_cannot_be_read_fails_those_who_look_at_it(tmp_path):
    names = ["0.png", "none.png", "broken.png", None]
    write_image(tmp_path / "broken.png", np.zeros((9, 9, 3), np.uint8))
    (tmp_path / "broken.png").write_bytes((tmp_path / "broken.png").read_bytes()[:-20])
    table = pictures(tmp_path, [10, 20, 30, 40], reference=names)
    rows = rows_of(run(config(table, tmp_path / "out", "compared", "brightness", batch_size=4)))
    assert [rows[f"s{i}", "brightness", "score"]["status"] for i in range(4)] == ["ok"] * 4
    found = [rows[f"s{i}", "compared", "score"] for i in range(4)]
    assert [row["status"] for row in found] == ["ok", "error", "error", "skipped"] and found[0]["score"] == 0
    assert "none.png: no such file" in found[1]["reason"] and "broken.png: is truncated" in found[2]["reason"]
    write_image(tmp_path / "none.png", np.full((6, 5, 3), 12, np.uint8))
    again = rows_of(run(config(table, tmp_path / "out", "compared", "brightness")))
    assert again["s1", "compared", "score"]["score"] == 8
    assert read(tmp_path / "out", "run.json")["computed"] == 2, "the mended one, and the one that is still broken"


def test_a_picture_that_cannot_be_read_fails_both_whatever_its_reference(tmp_path):
    table = pictures(tmp_path, [10, None], reference=["0.png", "0.png"])
    rows = rows_of(run(config(table, tmp_path / "out", "compared", "brightness")))
    for name in ("compared", "brightness"):
        assert rows["s0", name, "score"]["status"] == "ok"
        assert "1.png: no such file" in rows["s1", name, "score"]["reason"]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("nan", "b is nan"), ("inf", "score is -inf"), ("empty", "sums returned no score"),
        ("update", "KeyError: 'no update'"), ("compute", "KeyError: 'no score'"), ("text", "ValueError: could not"),
    ],
)  # fmt: skip
def test_a_set_evaluator_that_fails_is_a_row_and_stops_no_other(tmp_path, how, reason):
    table = pictures(tmp_path, [10, 20, 30])
    for _ in range(2):  # the second run tries it again, and is not blocked by what the first has left
        folder = run(config(table, tmp_path / "out", ("sums", {"how": how}), "sums", "brightness", batch_size=2))
        rows = {row["evaluator"]: row for row in rows_of(folder).values()}
        failed = rows[f"sums[how={how}]"]
        assert failed["status"] == "error" and failed["score"] is None and failed["reason"].startswith(reason)
        assert (rows["sums"]["score"], rows["sums"]["status"], rows["brightness"]["status"]) == (3, "ok", "ok")
        assert read(folder)["evaluators"][f"sums[how={how}]"]["n_error"] == 1


def test_a_score_of_nan_that_an_older_version_kept_is_computed_again(tmp_path, monkeypatch):
    table = pictures(tmp_path, [10, 20])
    with monkeypatch.context() as older:
        older.setattr(score_sets._Sets, "_found", lambda self, job: {"a": 1.0, "b": float("nan")})
        older.setattr(score_store, "_without_broken", lambda part: part)
        with pytest.raises(ValueError, match="values holds 1 NaN"):
            run(config(table, tmp_path / "out", ("sums", {"how": "nan"})))
    (row,) = rows_of(run(config(table, tmp_path / "out", ("sums", {"how": "nan"})))).values()
    assert (row["status"], row["reason"], row["score"]) == ("error", "b is nan", None)


def test_what_cannot_be_said_of_a_prompt_takes_nothing_from_the_scores(tmp_path, caplog):
    prompts = ["a long one", "explode", "abc", "short"]  # for "short" it says nothing, where one word is expected
    table = pictures(tmp_path, [10, 20, 30, 40], prompts)
    rows = rows_of(run(config(table, tmp_path / "out", "blind")))
    assert {row["score"] for row in rows.values()} == {1.0}
    assert [rows[f"s{i}", "blind", "score"]["prompt_truncated"] for i in range(4)] == [True, None, False, None]
    assert caplog.text.count("blind.truncated failed: KeyError") == 1


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_notes_are_kept_beside_scores_and_failures_and_are_their_evaluators_own(tmp_path, batch_size):
    prompts = ["silent", "seven", "refuse", "a dog", "explode"]
    table = pictures(tmp_path, [10, 20, 30, 40, 50], prompts)
    rows = rows_of(run(config(table, tmp_path / "out", "noting", "blind", batch_size=batch_size)))
    found = [rows[f"s{i}", "noting", "score"] for i in range(5)]
    assert [row["note"] for row in found] == [None, "7", "read refuse", "read a dog", "read explode"]
    assert [row["status"] for row in found] == ["ok", "ok", "error", "ok", "error"]
    assert {rows[f"s{i}", "blind", "score"]["note"] for i in range(5)} == {None}


# ------------------------------------------------------------------------------------------------ limits


def test_the_limits_that_messages_name_can_be_set(tmp_path):
    assert (Scoring().max_pixels, Scoring().max_bytes) == (MAX_PIXELS, MAX_CLIP_BYTES)
    table = pictures(tmp_path, [10])
    (row,) = rows_of(run(config(table, tmp_path / "out", "brightness", max_pixels=29))).values()
    assert "has 5x6 = 30 pixels, more than max_pixels=29; resize it, or raise max_pixels to score it" in row["reason"]
    (row,) = rows_of(run(config(table, tmp_path / "out", "brightness", max_pixels=30))).values()
    assert row["status"] == "ok"


def test_the_limit_of_a_clip_too(tmp_path):
    import torch

    from mmalign.media import write_video

    write_video(tmp_path / "clip.mkv", torch.zeros(4, 3, 16, 16, dtype=torch.uint8), 8, lossless=True)
    (tmp_path / "t.jsonl").write_text(json.dumps({"sample": "v", "media": "clip.mkv"}))
    size = 2 * 16 * 16 * 3  # brightness takes two frames
    for limit, status in ((size - 1, "error"), (size, "ok")):
        (row,) = rows_of(run(config(tmp_path / "t.jsonl", tmp_path / "out", "brightness", max_bytes=limit))).values()
        assert row["status"] == status
        if status == "error":
            assert f"more than max_bytes={limit:,}; pick fewer with a frame plan, or raise max_bytes" in row["reason"]


# ------------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize("device", ["mps", "meta", "cuda:9", "cpu:3", "xpu"])
def test_a_device_that_is_not_here_is_said_with_those_that_are(device):
    with pytest.raises(ValueError, match=rf"device: {device} is not here.*; use one of auto, cpu"):
        resolve_device(device)
    assert resolve_device("cpu").type == resolve_device("cpu:0").type == "cpu"


def test_what_stopped_a_run_ends_in_one_full_stop():
    said = str(stopped("process 0: the file does not fit. ", config(Path("t"), Path("out"), "hps")))
    assert said == (
        "Scoring stopped: process 0: the file does not fit. Finished rows are kept in out; the same command goes on "
        "from there."
    )


ENGINES = [
    [], ["--set", "processes=2"], pytest.param(["--set", "processes=2", "--engine", "ray"], marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES, ids=["one", "processes", "ray"])
def test_a_mistake_that_is_found_after_loading_is_one_message(tmp_path, verb, engine):
    table = pictures(tmp_path, range(4), ["x"] * 4)
    (tmp_path / "no.pt").write_text("no weights")
    words = ["--set", f"evaluators.0.params.checkpoint={tmp_path / 'no.pt'}", "--set", "batch_size=1", *engine]
    code, said, error = verb("score", table, "-e", "hps", "-o", tmp_path / "out", *words)
    assert (code, said) == (1 if engine else 2, "") and "Traceback" not in error
    assert "no.pt: is text, not weights" in error and ".." not in error and "ValueError" not in error
    if engine:
        assert error.startswith("error: Scoring stopped: ") and "the same command goes on from there.\n" in error


def test_what_is_a_defect_keeps_its_traceback_in_several_processes(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    table = pictures(tmp_path, range(4))
    with pytest.raises(Stopped, match=r"process \d: ValueError: not in the mood\. Finished"):
        run(config(table, tmp_path / "out", "moody", batch_size=1, processes=2))
    assert 'raise ValueError("not in the mood")' in capfd.readouterr().err


@pytest.mark.parametrize("place", ["table.jsonl", "table.jsonl/deeper", "/proc/nowhere"])
def test_an_output_that_cannot_be_written_is_said(tmp_path, verb, place):
    table = pictures(tmp_path, [1])
    code, _, error = verb("score", table, "-e", "brightness", "-o", tmp_path / place)
    assert code == 2 and "nothing can be written there (" in error and "name another folder as output" in error


def test_one_of_a_launcher_s_processes_speaks(tmp_path, verb, monkeypatch):
    table = pictures(tmp_path, [1])
    words = ["score", table, "-e", "brightness", "-o", tmp_path / "out", "--dry-run", "--json"]
    assert json.loads(verb(*words)[1])["items"] == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert verb(*words) == (0, "", "")
    assert verb(*words, "--set", "batch_size=none") == (2, "", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "batch_size" in verb(*words, "--set", "batch_size=none")[2], "of each machine"


@pytest.mark.parametrize("engine", ENGINES, ids=["one", "processes", "ray"])
def test_nothing_scored_is_an_exit_code_of_its_own(tmp_path, verb, engine):
    table = pictures(tmp_path, [None, None, None, None], ["x"] * 4)
    words = ["score", table, "-e", "brightness", "-e", "sums", "-o", tmp_path / "out", "--set", "batch_size=1", *engine]
    code, said, error = verb(*words)
    assert code == 1 and "brightness: 0 of 4 scored (0 %), 4 failed" in said and "results: " in said
    assert error.endswith("error: nothing could be scored; the reasons stand above\n")
    write_image(tmp_path / "2.png", np.zeros((5, 5, 3), np.uint8))
    code, said, _ = verb(*words)
    assert code == 0 and "brightness: 1 of 4 scored (25 %), 3 failed" in said, "hostile files among good ones"


def test_the_cause_is_told_where_not_even_the_half_part_can_be_removed(tmp_path, monkeypatch):
    store = Store(tmp_path / "out")
    store.create()

    def refused(*a, **k):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(score_store.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(5, "Input error")))
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OSError, match="Input error") as caught:
        store._write(pa.Table.from_pylist([{"sample": "a"}], schema=SCHEMA), store.parts, 0)
    assert caught.value.errno == 5


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("early", [True, False])
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(tmp_path, processes, early):
    """It reaches every process of the group, those that are still importing too."""
    table = pictures(tmp_path, range(30))
    log = tmp_path / "log.txt"
    output = tmp_path / "out"
    words = ["score", table, "-e", "slow", "-o", output, "--set", f"evaluators.0.params.log={log}"]
    words += ["--set", "evaluators.0.params.seconds=0.1", "--set", "batch_size=1", "--set", f"processes={processes}"]
    code = (
        "import signal, sys\n"
        # A shell starts background jobs, such as this whole suite, with SIGINT ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.argv = ['mmalign', *{[str(word) for word in words]!r}]\n"
        "from mmalign.cli import main\nmain()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (output / "parts").is_dir() if early else len(list(output.glob("parts/part-*.parquet"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.5 if early else 0)
        os.killpg(process.pid, signal.SIGINT)
        said, error = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, "") and "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.endswith(f"interrupted: finished rows are kept in {output}; the same command goes on from there"), error
    kept = len(Store(output).done())
    assert kept < 30 and (early or kept)
    run(config(table, output, ("slow", {"log": str(log), "seconds": 0.1}), batch_size=1))
    assert read(output, "run.json")["computed"] == 30 - kept
