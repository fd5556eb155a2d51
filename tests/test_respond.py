"""`mmalign respond`: a table of questions and its answers, whatever the batch, after a kill, with rows that cannot be
asked."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from vlm_kit import clips, vlm_folder

from mmalign import respond
from mmalign.backbones.vlm import load_vlm
from mmalign.backbones.vlm_generate import Asked, Decoding
from mmalign.jobs_respond import RespondConfig, Responding
from mmalign.media import write_image
from mmalign.tables import read_media_table

ASKED = [
    {"sample": "one", "prompt": "Is it red?", "media": "0.png", "label": "yes", "group": "g"},
    {"sample": "two", "prompt": "Describe the circle, please.", "media": "1.png", "aux": {"split": "hard"}},
    {"sample": "none", "prompt": "Is it?"},
    {"sample": "pair", "prompt": "Which of them is red?", "media": "0.png", "images": ["2.png"]},
    {"sample": "last", "prompt": "Please answer with Yes or No: does a bird sing?", "media": "2.png", "model": "maker"},
]


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    return vlm_folder(tmp_path_factory.mktemp("qwen"), "qwen2_vl")


@pytest.fixture(name="asked")
def _asked(tmp_path):
    return table(tmp_path, ASKED)


def table(home, rows):
    for number, clip in enumerate(clips([(28, 28), (40, 70), (56, 28)])):
        write_image(home / f"{number}.png", np.ascontiguousarray(clip[0].permute(1, 2, 0).numpy()))
    (home / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home / "questions.jsonl"


def config(asked, folder, output, limit=None, **model):
    model = {"path": folder, "max_new_tokens": 6, "device": "cpu", **model}
    return RespondConfig(questions=asked, model=Responding(**model), output=output, limit=limit)


def answers(path):
    return {row.sample: row.response for row in read_media_table(path)}


def test_the_table_has_an_answer_beside_all_that_it_had(tmp_path, asked, folder):
    place = respond.run(config(asked, folder, tmp_path / "out", suffix="\nAnswer with Yes or No."))
    rows = {row.sample: row for row in read_media_table(place)}
    assert list(rows) == [row["sample"] for row in ASKED]
    assert rows["one"].group == "g" and rows["one"].aux["label"] == "yes" and rows["two"].aux["split"] == "hard"
    assert rows["none"].modality == "text" and rows["none"].media == ""
    assert rows["pair"].images == (str(tmp_path / "2.png"),) and rows["one"].model == str(folder)
    assert rows["last"].aux["media_model"] == "maker"
    vlm = load_vlm(folder=str(folder), device=torch.device("cpu"), dtype=torch.float32)
    image = clips([(28, 28), (40, 70)])[0][0]
    text = vlm.words.chat("Is it red?\nAnswer with Yes or No.", 1)
    (found,) = vlm.writer.write([Asked(text, (image,))], Decoding(6))
    assert rows["one"].response == found.text
    assert (rows["one"].aux["response_tokens"], rows["one"].aux["response_cut"]) == (found.tokens, found.cut)
    told = json.loads((tmp_path / "out" / "run.json").read_text())
    assert len(told["config"]["model"]) == 64 and told["config"]["max_new_tokens"] == 6 and "torch" in told["versions"]


def test_neither_batch_size_nor_order_changes_an_answer(tmp_path, asked, folder):
    whole = answers(respond.run(config(asked, folder, tmp_path / "whole", batch_size=8)))
    assert len(set(whole.values())) > 2
    for size in (1, 2, 3):
        assert answers(respond.run(config(asked, folder, tmp_path / f"by{size}", batch_size=size))) == whole
    backwards = table(tmp_path, ASKED[::-1])
    assert answers(respond.run(config(backwards, folder, tmp_path / "back", batch_size=3))) == whole


def test_several_answers_have_seeds_of_their_own(tmp_path, asked, folder):
    sampled = {"temperature": 1.0, "top_p": 0.95, "per_prompt": 3, "seed": 5}
    whole = respond.run(config(asked, folder, tmp_path / "whole", **sampled))
    rows = {row.sample: row for row in read_media_table(whole)}
    assert len(rows) == 15 and rows["one-6"].aux["response_seed"] == 6 and rows["one-6"].group == "g"
    assert len({rows[f"one-{seed}"].response for seed in (5, 6, 7)}) > 1
    by_two = respond.run(config(asked, folder, tmp_path / "two", batch_size=2, **sampled))
    assert answers(by_two) == answers(whole)
    more = respond.run(config(asked, folder, tmp_path / "whole", **sampled | {"per_prompt": 4}))
    assert {name: text for name, text in answers(more).items() if not name.endswith("-8")} == answers(by_two)


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, asked, folder):
    due = answers(respond.run(config(asked, folder, tmp_path / "due", batch_size=2)))
    code = (
        "import os, sys\nfrom mmalign import respond\nfrom mmalign.jobs_respond import RespondConfig\n"
        "def kill(self, done):\n    if self.title == 'answering':\n        os.kill(os.getpid(), 9)\n"
        "respond.Progress.update = kill\nrespond.run(RespondConfig.model_validate_json(sys.argv[1]))"
    )
    wanted = config(asked, folder, tmp_path / "out", batch_size=2)
    ended = subprocess.run([sys.executable, "-c", code, wanted.model_dump_json()], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()
    file = tmp_path / "out" / respond.ANSWERS
    assert len(file.read_text().splitlines()) == 2 and not (tmp_path / "out" / "table.jsonl").exists()
    with open(file, "a") as cut:
        cut.write('{"sample": "none", "key": "')  # as a kill within a write leaves it
    assert answers(respond.run(wanted)) == due
    assert [json.loads(line)["sample"] for line in file.read_text().splitlines()] == list(due)


def test_only_what_is_missing_is_asked(tmp_path, asked, folder, monkeypatch):
    written = []
    whole = config(asked, folder, tmp_path / "out", batch_size=2)
    respond.run(config(asked, folder, tmp_path / "out", limit=2, batch_size=2))
    writer = type(load_vlm(folder=str(folder), device=torch.device("cpu"), dtype=torch.float32).writer)
    write = writer.write
    monkeypatch.setattr(writer, "write", lambda self, some, how: written.append(len(some)) or write(self, some, how))
    respond.run(whole)
    assert written == [2, 1]
    monkeypatch.setattr(respond, "load_vlm", lambda **kwargs: pytest.fail("there is nothing to ask"))
    first = (tmp_path / "out" / "table.jsonl").read_bytes()
    respond.run(whole)
    assert (tmp_path / "out" / "table.jsonl").read_bytes() == first


def test_other_questions_are_asked_anew_and_other_settings_refused(tmp_path, asked, folder):
    due = answers(respond.run(config(asked, folder, tmp_path / "out", batch_size=1)))
    changed = [{**ASKED[0], "media": "1.png"}, {**ASKED[1], "prompt": "No?"}, *ASKED[2:]]
    found = answers(respond.run(config(table(tmp_path, changed), folder, tmp_path / "out", batch_size=1)))
    alone = answers(respond.run(config(table(tmp_path, changed), folder, tmp_path / "alone", batch_size=1)))
    assert found == alone and {name for name in due if due[name] != found[name]} <= {"one", "two"}
    with pytest.raises(ValueError, match=r"holds answers made with other values of: max_new_tokens, suffix"):
        respond.run(config(asked, folder, tmp_path / "out", suffix="!", max_new_tokens=7))
    other = vlm_folder(tmp_path / "other", "qwen2_vl", seed=1)
    with pytest.raises(ValueError, match="other values of: model"):
        respond.run(config(asked, other, tmp_path / "out"))


def test_rows_that_cannot_be_asked_have_a_reason(tmp_path, folder, capsys):
    bad = [
        {"sample": "absent", "prompt": "Is it?", "media": "absent.png"},
        {"sample": "broken", "prompt": "Is it?", "media": "broken.png"},
        {"sample": "control", "prompt": "<|image_pad|> Is it?", "media": "0.png"},
        {"sample": "empty", "prompt": "  ", "media": "0.png"},
        {"sample": "long", "prompt": "z " * 9000, "media": "0.png"},
        {"sample": "clip", "prompt": "Is it?", "media": "clip.mp4"},
        {"sample": "good", "prompt": "Is it?", "media": "0.png"},
    ]
    asked = table(tmp_path, bad)
    (tmp_path / "broken.png").write_bytes((tmp_path / "1.png").read_bytes()[:300])
    (tmp_path / "clip.mp4").write_bytes(b"x")
    place = respond.run(config(asked, folder, tmp_path / "out"))
    rows = {row.sample: row for row in read_media_table(place)}
    said = {name: row.aux.get("response_error") for name, row in rows.items()}
    for name, words in (
        ("absent", "no such file"), ("broken", "truncated or damaged"), ("control", "'<|image_pad|>'"),
        ("empty", "the prompt is empty"), ("long", "qwen2_vl model reads 8192"), ("clip", "shows images"),
    ):  # fmt: skip
        assert words in said[name] and rows[name].response is None
    assert said["good"] is None and rows["good"].response is not None
    assert "1 of 7 questions answered" in capsys.readouterr().err
    write_image(tmp_path / "absent.png", np.zeros((28, 28, 3), np.uint8))
    again = {row.sample: row for row in read_media_table(respond.run(config(asked, folder, tmp_path / "out")))}
    assert again["absent"].response is not None and again["good"].response == rows["good"].response


def test_mistakes_are_said_before_a_model_is_loaded(tmp_path, asked, folder, monkeypatch):
    monkeypatch.setattr(respond, "load_vlm", lambda **kwargs: pytest.fail("too early"))
    for wrong, said in (
        ({"per_prompt": 2}, "set temperature above 0"),
        ({"conversation": "x"}, "needs both"),
        ({"conversation": "{images}{question}", "system": "x"}, "write the system message into it"),
    ):
        with pytest.raises(ValidationError, match=said):
            config(asked, folder, tmp_path / "out", **wrong)
    with pytest.raises(ValueError, match=r"model\.path: the model folder .* does not exist"):
        respond.run(config(asked, tmp_path / "nowhere", tmp_path / "out"))
    with pytest.raises(ValueError, match="no LoRA folder"):
        respond.run(config(asked, folder, tmp_path / "out", lora=tmp_path))
    assert not (tmp_path / "out").exists()
