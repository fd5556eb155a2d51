"""MMHal-Bench: ratings as judges write them, figures by hand, its file, and tiny judges that were taught to rate."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hallucination_kit import config, json_list, summary
from judge_kit import SHORT, teach_text, text_folder
from vlm_kit import teach, vlm_folder

from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import Batch, ItemErrors
from mmalign.hallucination import mmhal
from mmalign.hallucination.judge import fill, read_prompt
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.media import write_image
from mmalign.results import read_results
from mmalign.score import run
from mmalign.testing import check_evaluator
from mmalign.weights import file_hash

RATINGS = [
    ("Rating: 4", 4, 4),
    ("Rating: 4.", 4, 4),
    ("It is fine.\nrating: 0, since all is made up", 0, 0),
    ("RATING: 6", 6, 6),
    ("Rating: 4/6", 4, 4),
    ("Rating: 2. As I said, rating: 2", 2, 2),
    ("Rating: 5 ... no, rating: 2", None, None),  # two ratings
    ("Rating: 7", None, None),
    ("Rating: 10", None, 1),  # the script of the authors finds "rating: 1"
    ("Rating: 3.5", None, 3),
    ("Rating: -1", None, None),
    ("**Rating:** 4", 4, None),
    ("**Rating**: 4", 4, None),
    ("Rating: **4**", 4, None),
    ("Rating:4", 4, None),
    ("rating:  4", 4, None),
    ("My overrating: 3", None, 3),
    ("I rate it 4", None, None),
    ("Rating: good", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("reply", "strict", "official"), RATINGS)
def test_one_rating_from_0_to_6_or_none(reply, strict, official):
    assert mmhal.read_rating(reply) == strict
    assert mmhal.read_rating(reply, "official") == official


def scored(rating, unrated=0.0, words=3.0, **aux):
    return {"group": "g", "aux": aux, "scores": {"rating": float(rating), "unrated": unrated, "words": words}}


def test_figures_by_hand():
    rows = [
        scored(6, question_type="counting"), scored(2, question_type="counting", words=9.0),
        scored(3, question_type="other"), scored(0, 1.0, question_type="other"),
    ]  # fmt: skip
    found = mmhal.figures(rows)
    assert found["rating"] == 11 / 4 and found["hallucination"] == 2 / 4
    assert found["informativeness"] == pytest.approx((3 + 2 + 0 + 0) / 3 / 4)
    assert found["counting/rating"] == 4 and found["counting/hallucination"] == 0.5
    assert found["counting/informativeness"] == pytest.approx(5 / 6)
    assert found["other/rating"] == 1.5 and found["other/informativeness"] == 0
    assert found["unrated"] == 0.25 and found["words"] == 18 / 4


def test_kinds_go_by_the_index_where_the_row_names_none():
    found = mmhal.figures([scored(4, index=1), scored(2, index=9), scored(6, index="2"), scored(0)])
    assert found["type_1/rating"] == 3 and found["type_2/rating"] == 6 and found["rating"] == 3
    assert {name.partition("/")[0] for name in found if "/" in name} == {"type_1", "type_2"}


# ------------------------------------------------------------------------------------------------ what a judge is told


def test_the_prompt_has_all_fields_and_the_scale():
    for prompt in mmhal.PROMPTS.values():
        assert all(f"{{{name}}}" in prompt for name in mmhal.FIELDS) and "{sight}" not in prompt
        assert all(f"\n{number}: " in prompt for number in range(7))
        assert mmhal.read_rating(prompt) is None, "a judge that repeats it has given no rating"
    assert "You see the picture" in mmhal.PROMPTS["image"] and "do not see" in mmhal.PROMPTS["text"]


def test_fields_are_filled_once_and_must_be_there():
    values = mmhal.fields_of("What {answer}?", "{question}", {"gt_answer": "a dog", "image_content": ["dog", "cat"]})
    assert fill("{question}|{gt_answer}|{image_content}|{answer}", values) == "What {answer}?|a dog|dog, cat|{question}"
    assert fill("{answer}", mmhal.fields_of("", "", {})) == "", "an empty answer is one"
    with pytest.raises(ValueError, match="the row has no gt_answer, which the judge's prompt asks for"):
        fill("{gt_answer} {answer}", mmhal.fields_of("Q", "A", {}))
    with pytest.raises(ValueError, match="the row has no image_content"):
        fill("{image_content} {answer}", mmhal.fields_of("Q", "A", {"image_content": []}))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{question} {anwser}", r"has \{anwser\}, which is no field; there are \{question\}, \{gt_answer\}, "),
        ("{} {answer}", r"has \{\}, which is no field"),
        ("{question}", r"has no \{answer\}, so every answer"),
        (None, "cannot be read as text"),
    ],
)
def test_prompts_that_cannot_be_are_refused(text, said, tmp_path):
    if text is not None:
        (tmp_path / "p.txt").write_text(text)
    with pytest.raises(ValueError, match=f"prompt: .*{said}"):
        read_prompt(tmp_path / "p.txt", "", mmhal.FIELDS)


# ------------------------------------------------------------------------------------------------ its file


def entry(number, **more):
    return {
        "question_type": ["attribute", "adversarial", "comparison"][number % 3], "question_topic": "food",
        "image_id": f"id{number}", "image_src": f"https://example.org/a/{number}_o.jpg",
        "image_content": ["Dog", "Tree"], "question": f"What is {number}?", "gt_answer": f"It is {number}.",
        "model_answer": "",
    } | more  # fmt: skip


def test_the_public_layout(tmp_path):
    (tmp_path / "0_o.jpg").touch()
    (tmp_path / "id1.png").touch()
    file = json_list(tmp_path / "t.json", [entry(number) for number in range(3)])
    rows = mmhal.questions(file, tmp_path)
    assert [Path(row.media).name for row in rows] == ["0_o.jpg", "id1.png", "2_o.jpg"]
    assert rows[1].sample == "mmhal-1" and rows[1].group == "id1" and rows[1].dimensions == ("mmhal",)
    assert rows[1].prompt == "What is 1?" and rows[1].aux == {
        "index": 1, "question_type": "adversarial", "question_topic": "food", "image_content": ["Dog", "Tree"],
        "gt_answer": "It is 1.",
    }  # fmt: skip
    turned = json_list(tmp_path / "a.json", [entry(n, model_answer=f"It is {n}.") for n in (2, 0, 1)])
    assert mmhal.answers(turned, rows) == {f"mmhal-{n}": f"It is {n}." for n in range(3)}
    with pytest.raises(ValueError, match="the template without answers"):
        mmhal.answers(file, rows)
    with pytest.raises(ValueError, match="entry 2: the question about id0 is answered twice"):
        mmhal.answers(json_list(tmp_path / "b.json", [entry(0, model_answer="x")] * 2), rows)
    with pytest.raises(ValueError, match=r"entry 1: image_content is 'Dog'; it is a list"):
        mmhal.questions(json_list(tmp_path / "c.json", [entry(0, image_content="Dog")]), None)
    with pytest.raises(ValueError, match="entry 1: has no gt_answer"):
        mmhal.questions(json_list(tmp_path / "d.json", [entry(0, gt_answer=None)]), None)


# ------------------------------------------------------------------------------------------------ judges

REPLIES = {"a dog": "Rating: 4", "a cat": "None.\nRating: 1", "two dogs, I think": "Rating: 2 or rating: 5", "": "Hm"}


@pytest.fixture(scope="module", name="prompt")
def _prompt(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "judge.txt"
    path.write_text(SHORT + "\n")
    return path


@pytest.fixture(scope="module", name="texts")
def _texts(tmp_path_factory):
    """A language model that was taught to rate four answers."""
    folder = text_folder(tmp_path_factory.mktemp("text"))
    teach_text(folder, [(f"Q: What?\nA: {answer}", reply) for answer, reply in REPLIES.items()])
    return folder


@pytest.fixture(scope="module", name="seer")
def _seer(tmp_path_factory):
    """An image-text model that was taught to rate the same answer 1 about a black picture and 5 about a white one."""
    folder = vlm_folder(tmp_path_factory.mktemp("seer"), "qwen2_vl")
    lessons = [
        (picture(value)[None], "Q: What?\nA: a dog", f"Rating: {rating}") for value, rating in ((0, 1), (255, 5))
    ]
    teach(folder, lessons)
    return folder


def picture(value):
    return torch.full((3, 40, 50), value, dtype=torch.uint8)


def batch(answers, **columns):
    size = len(answers)
    return Batch(responses=list(answers), prompts=["What?"] * size, aux=[{"gt_answer": "a dog"}] * size, **columns)


def test_a_language_model_rates_and_batches_change_nothing(texts, prompt, caplog):
    evaluator = load_evaluator("mmhal", {"model": texts, "prompt": prompt, "max_new_tokens": 40}, "cpu")
    whole = batch([*REPLIES, "a dog"])
    found = {name: values.tolist() for name, values in evaluator.score(whole).items()}
    assert found == {"rating": [4, 1, 0, 0, 4], "unrated": [0, 0, 1, 1, 0], "words": [2, 2, 4, 0, 2]}
    assert [record.args for record in caplog.records] == [("What?", "Rating: 2 or rating: 5"), ("What?", "Hm")]
    for size in (1, 2, 3):
        parts = [evaluator.score(whole.take(range(start, min(5, start + size)))) for start in range(0, 5, size)]
        assert {name: torch.cat([part[name] for part in parts]).tolist() for name in found} == found
    official = load_evaluator(
        "mmhal", {"model": texts, "prompt": prompt, "max_new_tokens": 40, "parser": "official"}, "cpu"
    )
    assert official.score(whole)["rating"].tolist() == found["rating"]


def test_a_judge_that_sees_goes_by_the_picture(seer, prompt):
    params = {"model": seer, "prompt": prompt, "max_new_tokens": 20}
    seeing = load_evaluator("mmhal", params | {"see": "image"}, "cpu")
    images = [picture(255), picture(0), picture(255)]
    whole = batch(["a dog"] * 3, images=images, frames=[one[None] for one in images])
    assert seeing.score(whole)["rating"].tolist() == [5, 1, 5]
    assert seeing.needs == {"response", "prompt", "aux", "image"} and seeing.modality == {"image"}
    blind = load_evaluator("mmhal", params, "cpu")
    assert "image" not in blind.needs and len(set(blind.score(whole)["rating"].tolist())) == 1


def test_what_cannot_be_judged_is_an_error_of_its_own(texts, prompt):
    evaluator = load_evaluator("mmhal", {"model": texts, "prompt": prompt, "max_new_tokens": 40}, "cpu")
    with pytest.raises(ItemErrors) as raised:
        evaluator.score(batch(["a dog", "x<|im_end|>", "z " * 9000, "a cat"]))
    assert "holds '<|im_end|>', which steers qwen2 models" in str(raised.value.errors[1])
    assert "this qwen2 model reads 8192" in str(raised.value.errors[2])
    scores = raised.value.scores["rating"]
    assert scores[0] == 4 and scores[3] == 1 and scores[1:3].isnan().all()
    whole = load_evaluator("mmhal", {"model": texts, "max_new_tokens": 4}, "cpu")
    with pytest.raises(ItemErrors, match="the row has no image_content") as raised:
        whole.score(batch(["a dog"]))
    assert raised.value.scores.isnan().all()


def test_folders_that_cannot_judge_are_refused(texts, tmp_path):
    def files(**params):
        cls = evaluator_class("mmhal")
        return cls.weight_files(cls.Params(**params))

    assert {file.name for file in files(model=texts)} >= {"config.json", "model.safetensors", "tokenizer.json"}
    with pytest.raises(ValueError, match="reads no images; give an image-text model, or set see: text"):
        files(model=texts, see="image")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="holds a t5, which is neither an image-text nor a language model"):
        files(model=tmp_path)
    bare = text_folder(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template; set `conversation`"):
        load_evaluator("mmhal", {"model": bare}, "cpu")
    own = load_evaluator("mmhal", {"model": bare, "conversation": "{images}USER: {question}\nASSISTANT:"}, "cpu")
    assert own.judge.question("Hm?").text == "USER: Hm?\nASSISTANT:"


@pytest.mark.parametrize("see", ["text", "image"])
def test_mmhal_keeps_the_contract(see, tmp_path):
    folder = vlm_folder(tmp_path / "vlm", "qwen2_vl")
    aux = [{"gt_answer": "Yes.", "image_content": ["dog"], "index": number} for number in range(3)]
    check_evaluator(
        "mmhal", {"model": str(folder), "see": see, "max_new_tokens": 3}, prompts=("Is it?", "What, 立方体?", "x"),
        sizes=((64, 64), (33, 70), (2, 2)), aux=aux, responses=("Yes", "", "A dog."),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ a run


def saved(tmp_path):
    """Six questions with saved answers, all of them known to the taught judge."""
    told = [*REPLIES, "a dog", "a cat"]
    lines = [entry(number, question="What?", model_answer=answer) for number, answer in enumerate(told)]
    return json_list(tmp_path / "mmhal.json", lines)


def only(folder):
    (entry,) = summary(folder).values()
    return entry


def job(tmp_path, output, texts, prompt, **more):
    file = saved(tmp_path)
    params = {"model": str(texts), "prompt": str(prompt), "max_new_tokens": 40}
    wanted = config(tmp_path / output, "mmhal", kind="mmhal", questions=file, responses=file)
    spec = EvaluatorSpec(name="mmhal", params=params)
    return ScoreConfig(**wanted.model_dump() | {"evaluators": (spec,), "batch_size": 2, **more})


def test_saved_answers_are_judged_and_the_judge_is_named(tmp_path, texts, prompt):
    found = only(run(job(tmp_path, "out", texts, prompt)))
    figures = {name: each["value"] for name, each in found["figures"].items()}
    assert found["n_ok"] == 6 and figures["rating"] == 10 / 6 and figures["hallucination"] == 4 / 6
    assert figures["unrated"] == 2 / 6 and figures["adversarial/rating"] == 2.5
    assert found["figures"]["rating"]["ci95"] and found["figures_of"]["clusters"] == 6
    assert found["params"]["model"] == str(texts), "the judge by name"
    rows = read_results(tmp_path / "out").rows
    assert {row["weight_hash"] for row in rows} == {found["weight_hash"]}
    assert {row["response"]: row["note"] for row in rows} == REPLIES, "what the judge wrote"
    before = found["weight_hash"]
    prompt_of_another = tmp_path / "other.txt"
    prompt_of_another.write_text("Judge.\n" + SHORT)
    other = only(run(job(tmp_path, "other", texts, prompt_of_another)))
    assert other["weight_hash"] != before and len(file_hash(texts / "model.safetensors")) == 64


def test_a_killed_run_goes_on(tmp_path, texts, prompt):
    due = only(run(job(tmp_path, "due", texts, prompt)))["figures"]
    wanted = job(tmp_path, "out", texts, prompt)
    code = (
        "import os, sys\nfrom mmalign.jobs import ScoreConfig\nfrom mmalign.score import run\n"
        "from mmalign.score_store import Store\nreal = Store.append\ndef append(self, rows, rank=0):\n"
        "    real(self, rows, rank)\n    if len(list(self.parts.glob('*.parquet'))) == 2:\n"
        "        os.kill(os.getpid(), 9)\n"
        "Store.append = append\nrun(ScoreConfig.model_validate_json(sys.argv[1]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, wanted.model_dump_json()], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()
    assert not (tmp_path / "out" / "summary.json").exists()
    assert only(run(wanted))["figures"] == due
    assert json.loads((tmp_path / "out" / "run.json").read_text())["computed"] == 2
    assert only(run(job(tmp_path, "out", texts, prompt, batch_size=5)))["figures"] == due


def test_pictures_are_read_only_for_a_judge_that_sees(tmp_path, seer, prompt):
    write_image(tmp_path / "0_o.jpg", np.full((40, 50, 3), 255, np.uint8))
    lines = [entry(number, question="What?", model_answer="a dog") for number in range(2)]
    file = json_list(tmp_path / "mmhal.json", lines)
    entries = {}
    for see in ("text", "image"):
        params = {"model": str(seer), "prompt": str(prompt), "max_new_tokens": 20, "see": see}
        wanted = config(tmp_path / see, "mmhal", kind="mmhal", questions=file, responses=file, images=tmp_path)
        wanted = wanted.model_copy(update={"evaluators": (EvaluatorSpec(name="mmhal", params=params),)})
        entries[see] = only(run(wanted))
    assert entries["text"]["n_ok"] == 2 and entries["image"]["n_ok"] == 1 == entries["image"]["n_error"]
    assert entries["image"]["figures"]["rating"]["value"] == 5
