"""A benchmark of answers from end to end: files joined, a model that answers first, a kill, and what is told."""

import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hallucination_kit import config, json_lines, json_list, pope_file, summary
from pydantic import ValidationError
from typer.testing import CliRunner
from vlm_kit import clips, teach, vlm_folder

from mmalign import respond
from mmalign.cli import app
from mmalign.hallucination.readers import READERS
from mmalign.media import read_image, write_image
from mmalign.results import read_results
from mmalign.score import run
from mmalign.tables import read_media_table

LABELS = ["yes", "no", "no", "yes", "yes", "no", "no"]


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    return vlm_folder(tmp_path_factory.mktemp("qwen"), "qwen2_vl")


@pytest.fixture(name="questions")
def _questions(tmp_path):
    """Seven questions about three pictures."""
    (tmp_path / "images").mkdir()
    for number, clip in enumerate(clips([(28, 28), (40, 70), (56, 28)])):
        write_image(tmp_path / "images" / f"COCO_{number}.jpg", np.ascontiguousarray(clip[0].permute(1, 2, 0).numpy()))
    return pope_file(tmp_path / "coco_pope_popular.json", LABELS)


def by_model(questions, folder, output, **model):
    model = {"path": folder, "max_new_tokens": 4, "device": "cpu", "batch_size": 2, **model}
    return config(output, "pope", kind="pope", questions=questions, images=questions.parent / "images", model=model)


# ------------------------------------------------------------------------------------------------ saved answers


def test_saved_answers_of_either_layout_give_the_same(tmp_path, questions, caplog):
    told = [{"question_id": number, "answer": "No" if number % 2 else "Yes"} for number in range(1, 8)]
    table = [{"sample": f"popular-{one['question_id']}", "response": one["answer"], "model": "m"} for one in told]
    found = []
    for name, lines in (("public", told), ("table", table)):
        saved = json_lines(tmp_path / f"{name}.jsonl", lines)
        wanted = config(tmp_path / name, "pope", kind="pope", questions=questions, responses=saved)
        entry = summary(run(wanted))["pope"]
        found.append(entry["figures"])
        assert entry["n_ok"] == 7 and entry["figures_of"]["clusters"] == 3
    assert found[0] == found[1]
    assert {row["model"] for row in read_results(tmp_path / "table").rows} == {"m"}
    assert not caplog.records


def test_missing_and_extra_answers_are_named_and_counted(tmp_path, questions, caplog):
    told = [{"question_id": number, "answer": "Yes"} for number in (1, 2, 4, 99)]
    saved = json_lines(tmp_path / "a.jsonl", told)
    with caplog.at_level(logging.WARNING):
        folder = run(config(tmp_path / "out", "pope", kind="pope", questions=questions, responses=saved))
    said = [record.getMessage() for record in caplog.records]
    assert said[0].startswith("4 questions have no answer in") and "popular-3, popular-5, popular-6" in said[0]
    assert said[1].startswith("1 answers to no question are in") and "popular-99" in said[1]
    entry = summary(folder)["pope"]
    assert (entry["n_ok"], entry["n_skipped"], entry["coverage"]) == (3, 4, 3 / 7)
    assert entry["reasons"] == {"the row has no response": 4}
    strangers = json_lines(tmp_path / "b.jsonl", [{"question_id": 99, "answer": "Yes"}])
    with pytest.raises(ValueError, match=r"answers none of the 7 questions; they are called popular-1, .* and 2 more"):
        run(config(tmp_path / "none", "pope", kind="pope", questions=questions, responses=strangers))


def test_several_files_go_together_in_order(tmp_path, questions):
    other = pope_file(tmp_path / "coco_pope_random.json", ["no"] * 3)
    first = json_lines(tmp_path / "1.jsonl", [{"question_id": n, "answer": "Yes"} for n in range(1, 8)])
    second = json_lines(tmp_path / "2.jsonl", [{"question_id": n, "answer": "No"} for n in range(1, 4)])
    both = {"kind": "pope", "questions": [questions, other]}
    figures = summary(run(config(tmp_path / "out", "pope", **both, responses=[first, second])))["pope"]["figures"]
    assert figures["random/accuracy"]["value"] == 1 and figures["popular/yes_ratio"]["value"] == 1
    assert figures["mean/accuracy"]["value"] == pytest.approx((1 + 3 / 7) / 2)
    assert figures["random/f1"] == {"value": None, "ci95": None}
    with pytest.raises(ValueError, match="one file of answers for each file of questions"):
        run(config(tmp_path / "x", "pope", **both, responses=first))
    with pytest.raises(ValueError, match="is also in"):
        run(config(tmp_path / "x", "pope", kind="pope", questions=[other, other], responses=second))


def test_amber_asks_each_evaluator_its_own(tmp_path, caplog):
    kinds = ["generative", "discriminative-hallucination", "relation"]
    queries = [{"id": n, "image": f"AMBER_{n}.jpg", "query": "?"} for n in (1, 2, 3)]
    notes = [{"id": n, "type": kind, "truth": ["sky"] if n == 1 else "no"} for n, kind in enumerate(kinds, 1)]
    told = [{"id": n, "response": "No"} for n in (1, 2, 3)]
    wanted = config(
        tmp_path / "out", "amber_discriminative", kind="amber", questions=json_list(tmp_path / "q.json", queries),
        annotations=json_list(tmp_path / "n.json", notes), responses=json_list(tmp_path / "r.json", told),
    )  # fmt: skip
    entry = summary(run(wanted))["amber_discriminative"]
    assert (entry["n_ok"], entry["n_skipped"], entry["figures"]["f1"]["value"]) == (2, 0, 1)
    assert not caplog.records, "the answer to the open query is no stranger"
    with pytest.raises(ValueError, match="is for amber_discriminative and amber_generative; name one of them"):
        run(config(tmp_path / "x", "pope", **wanted.benchmark.model_dump()))


def test_a_table_with_answers_needs_no_benchmark(tmp_path):
    rows = [{"sample": str(n), "label": label, "response": "no"} for n, label in enumerate(LABELS)]
    saved = json_lines(tmp_path / "t.jsonl", rows)
    found = CliRunner().invoke(app, ["score", str(saved), "-e", "pope", "-o", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert "pope: 7 of 7 scored (100 %)" in found.output and "  yes_ratio 0 [0, 0]" in found.output
    assert "  accuracy 0.5714 [" in found.output


# ------------------------------------------------------------------------------------------------ a model


def test_a_model_answers_first_and_only_once(tmp_path, questions, folder, monkeypatch):
    wanted = by_model(questions, folder, tmp_path / "out", suffix="\nAnswer with yes or no.")
    first = summary(run(wanted))["pope"]
    assert first["n_ok"] == 7 and first["figures_of"]["clusters"] == 3
    rows = read_media_table(tmp_path / "out" / "responses" / "table.jsonl")
    assert [row.sample for row in rows] == [f"popular-{n}" for n in range(1, 8)] and rows[0].aux["label"] == "yes"
    monkeypatch.setattr(respond, "load_vlm", lambda **kwargs: pytest.fail("all is answered"))
    assert summary(run(wanted))["pope"]["figures"] == first["figures"]
    shutil.rmtree(tmp_path / "out" / "parts")
    assert summary(run(wanted))["pope"]["figures"] == first["figures"]
    with pytest.raises(ValueError, match="answers made with other values of: max_new_tokens"):
        run(by_model(questions, folder, tmp_path / "out", suffix="\nAnswer with yes or no.", max_new_tokens=5))


def test_a_taught_model_is_perfect(tmp_path, questions):
    pope_file(questions, LABELS[:3])
    rows = READERS["pope"].questions(questions, questions.parent / "images")
    lessons = [
        (torch.from_numpy(read_image(row.media)).permute(2, 0, 1)[None], row.prompt, row.aux["label"].capitalize())
        for row in rows
    ]
    folder = vlm_folder(tmp_path / "taught", "qwen2_vl")
    teach(folder, lessons)
    figures = summary(run(by_model(questions, folder, tmp_path / "out")))["pope"]["figures"]
    assert figures["popular/accuracy"]["value"] == figures["popular/f1"]["value"] == 1
    assert figures["words"]["value"] == 1 and figures["popular/yes_ratio"]["value"] == pytest.approx(1 / 3)


def test_a_killed_run_goes_on_from_its_answers(tmp_path, questions, folder):
    due = summary(run(by_model(questions, folder, tmp_path / "due")))["pope"]["figures"]
    wanted = by_model(questions, folder, tmp_path / "out")
    code = (
        "import os, sys\nfrom mmalign import respond\nfrom mmalign.jobs import ScoreConfig\n"
        "from mmalign.score import run\n"
        "def kill(self, done):\n    if self.title == 'answering' and done >= 4:\n        os.kill(os.getpid(), 9)\n"
        "respond.Progress.update = kill\nrun(ScoreConfig.model_validate_json(sys.argv[1]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, wanted.model_dump_json()], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()
    answers = tmp_path / "out" / "responses" / respond.ANSWERS
    assert len(answers.read_text().splitlines()) == 4 and not (tmp_path / "out" / "summary.json").exists()
    assert summary(run(wanted))["pope"]["figures"] == due
    assert len(answers.read_text().splitlines()) == 7


def test_the_verbs_from_the_command_line(tmp_path, questions, folder):
    rows = READERS["pope"].questions(questions, questions.parent / "images")
    lines = [{"sample": row.sample, "prompt": row.prompt, "media": row.media, **row.aux} for row in rows]
    file = tmp_path / "respond.yaml"
    file.write_text(
        f"questions: {json_lines(tmp_path / 'q.jsonl', lines)}\noutput: {tmp_path / 'answers'}\n"
        f"model: {{path: {folder}, max_new_tokens: 4, device: cpu}}\n"
    )
    found = CliRunner().invoke(app, ["respond", str(file), "--set", "model.batch_size=3"])
    assert found.exit_code == 0, found.output
    assert "7 of 7 questions answered" in found.output and "media table: " in found.output
    table = tmp_path / "answers" / "table.jsonl"
    scored = CliRunner().invoke(app, ["score", str(table), "-e", "pope", "-o", str(tmp_path / "scores")])
    assert scored.exit_code == 0 and "pope: 7 of 7 scored (100 %)" in scored.output, scored.output
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["evaluators"]["pope"]["figures"]


# ------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_are_said_before_anything_is_answered(tmp_path, questions, folder, monkeypatch):
    monkeypatch.setattr(respond, "load_vlm", lambda **kwargs: pytest.fail("too early"))
    base = {"kind": "pope", "questions": questions}
    model = {"path": folder}
    for wrong, said in (
        ({}, "exactly one of benchmark.responses"),
        ({"responses": "a", "model": model, "images": "b"}, "exactly one of benchmark.responses"),
        ({"model": model}, "looks at the images"),
        ({"model": model | {"temperature": 1, "per_prompt": 2}, "images": "b"}, "one answer to each question"),
        ({"responses": "a", "annotations": "b"}, "is AMBER's annotations.json"),
        ({"kind": "amber", "responses": "a"}, "is AMBER's annotations.json"),
    ):
        with pytest.raises(ValidationError, match=said):
            config(tmp_path / "out", "pope", **base | wrong)
    with pytest.raises(ValueError, match="has none of the 7 images, such as"):
        (tmp_path / "empty").mkdir()
        run(config(tmp_path / "out", "pope", **base, images=tmp_path / "empty", model=model))
    with pytest.raises(ValueError, match=r"is no evaluator|no evaluator"):
        run(config(tmp_path / "out", "popes", **base, images=questions.parent / "images", model=model))
    with pytest.raises(ValueError, match="has not answered yet"):
        from mmalign.score import plan_for

        plan_for(by_model(questions, folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
