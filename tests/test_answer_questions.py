"""Questions of one's own: how answers are read, figures by hand, files and what is refused, a model that answers."""

import json

import numpy as np
import pytest
import torch
from hallucination_kit import config, json_lines, judge, summary
from vlm_kit import clips, teach, vlm_folder

from mmalign import respond
from mmalign.backbones.vlm import load_vlm
from mmalign.backbones.vlm_generate import Asked, Decoding
from mmalign.hallucination.answer_rules import due, normal, said
from mmalign.hallucination.question_file import answers, questions
from mmalign.jobs_respond import RespondConfig, Responding
from mmalign.media import write_image
from mmalign.score import run
from mmalign.tables import read_media_table
from mmalign.testing import check_evaluator
from mmalign.turns import earlier_turns

PETS = ["dog", "black cat", "cat", "vitamin C"]

CHOSEN = [
    ("B", "B"),
    ("b", "B"),
    ("(b)", "B"),
    (" **B**. ", "B"),
    ("B. black cat", "B"),
    ("b) a black cat", "B"),
    ("B: because of the fur", "B"),
    ("The answer is B", "B"),
    ("I think that option A is right", "A"),
    ("A", "A"),
    ("A.", "A"),
    ("The answer is A because of its ears", "A"),
    ("dog", "A"),
    ("Dog.", "A"),
    ("It is a black cat.", "B"),
    ("A black cat", "B"),
    ("It shows A DOG", "A"),
    ("A cat!", "C"),
    ("vitamin C", "D"),
    ("This is vitamin C.", "D"),
    ("D, vitamin C", "D"),
    ("C", "C"),
    ("B, the dog", None),  # a letter and another option's text
    ("A or B", None),
    ("a dog and a cat", None),
    ("A horse stands there", None),
    ("F", None),
    ("dogs", None),
    ("", None),
    ("I cannot say", None),
]


@pytest.mark.parametrize(("response", "letter"), CHOSEN)
def test_options_are_named_by_letter_or_text(response, letter):
    assert said(response, due({"options": PETS, "answer": "A"})) == letter


@pytest.mark.parametrize(
    ("options", "response", "letter"),
    [
        ([3, 13, 3.5], "13", "B"),
        ([3, 13, 3.5], "There are 3.5 of them", "C"),
        ([3, 13, 3.5], "3.5", "C"),
        ([3, 13], "3.7", None),
        ([5, 7], "it is -5", None),
        (["-5", "5"], "it is -5", "A"),
        (["-5", "5"], "it is 5", "B"),
        (["A", "B"], "A", "A"),
        (["A", "B"], "It is B", "B"),
        (["yes", "no"], "No", "B"),
        (["yes", "no"], "No, or yes", None),
        (["C++", "C#"], "c#", "B"),
        (["C++", "C#"], "B. C#", "B"),
        (["<", ">"], ">", "B"),
        (["New York", "York"], "in new-york", "A"),
        (["New York", "York"], "in York", "B"),
        (list("abcdefghi"), "I think so", None),
        ([f"no. {n}" for n in range(10)], "The choice is I", "I"),
    ],
)
def test_options_of_numbers_signs_and_letters(options, response, letter):
    assert said(response, due({"options": options, "answer": "A"})) == letter


def test_short_answers_are_the_same_but_for_case_articles_and_punctuation():
    for text, plain in (
        ("The  Eiffel Tower!", "eiffel tower"),
        ("U.S.", "us"),
        ("3.50", "3.50"),
        ("(5)", "5"),
        ("-5", "-5"),
        ("5.", "5"),
        ("don't", "dont"),
        ("a", ""),
        ("Straße", "strasse"),
    ):
        assert normal(text) == plain, text
    asked = due({"answer": ["Bo", "a dog", 3]})
    assert asked.kind == "text" and [said(text, asked) in asked.right for text in ("bo.", "Dog", "3", "33", "")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert said(" . ", asked) is None


def test_what_is_due():
    assert due({"answer": "Yes"}).right == ("yes",) and due({"answer": "no"}).kind == "yes_no"
    assert due({"answer": "cat", "options": PETS}).right == ("C",)
    assert due({"answer": "b", "options": PETS}).right == ("B",)
    assert due({"answer": 13, "options": [3, 13]}).right == ("B",)
    for aux, message in (
        ({}, "answer is None"),
        ({"answer": True}, "answer is True"),
        ({"answer": []}, r"answer is \[\]"),
        ({"answer": ["a"]}, "nothing of it is left"),
        ({"answer": ["A"], "options": PETS}, "answer is"),
        ({"answer": "horse", "options": PETS}, "neither a letter nor the text of one of 4 options"),
        ({"answer": "E", "options": PETS}, "neither a letter"),
        ({"answer": "A", "options": ["x"]}, "a list of 2 to 26"),
        ({"answer": "A", "options": "x y"}, "a list of 2 to 26"),
        ({"answer": "A", "options": ["x", "X "]}, "different texts"),
        ({"answer": "A", "options": ["x", " "]}, "different texts"),
        ({"answer": "A", "options": ["B", "A"]}, "option A is 'B', the letter of another option"),
    ):
        with pytest.raises(ValueError, match=message):
            due(aux)


SMALL = [
    ("Yes", {"answer": "yes", "category": "awareness"}),
    ("Yes, that is Bo.", {"answer": "no", "category": "inappropriateness"}),
    ("No", {"answer": "no", "category": "inappropriateness"}),
    ("Perhaps", {"answer": "Yes", "category": "awareness"}),
    ("C", {"answer": "cat", "options": PETS, "category": "preference"}),
    ("a horse", {"answer": "A", "options": PETS, "category": "preference"}),
    ("in the garden", {"answer": ["garden", "in garden"]}),
    ("", {"answer": 3}),
]


def test_figures_by_hand():
    scores, found = judge("answer_questions", SMALL)
    assert scores["accuracy"] == [1, 0, 1, 0, 1, 0, 1, 0] and scores["unparsed"] == [0, 0, 0, 1, 0, 1, 0, 1]
    assert scores["yes"] == [1, 1, 0, 0, 0, 0, 0, 0] and scores["words"] == [1, 4, 1, 1, 1, 2, 3, 0]
    assert found == {
        "accuracy": 4 / 8, "unparsed": 3 / 8, "words": 13 / 8, "yes_ratio": 2 / 4,
        "category/awareness/accuracy": 1 / 2, "category/awareness/unparsed": 1 / 2, "category/awareness/words": 1,
        "category/awareness/yes_ratio": 1 / 2,
        "category/inappropriateness/accuracy": 1 / 2, "category/inappropriateness/unparsed": 0,
        "category/inappropriateness/words": 5 / 2, "category/inappropriateness/yes_ratio": 1 / 2,
        "category/preference/accuracy": 1 / 2, "category/preference/unparsed": 1 / 2,
        "category/preference/words": 3 / 2,
        "kind/choice/accuracy": 1 / 2, "kind/choice/unparsed": 1 / 2, "kind/choice/words": 3 / 2,
        "kind/text/accuracy": 1 / 2, "kind/text/unparsed": 1 / 2, "kind/text/words": 3 / 2,
        "kind/yes_no/accuracy": 2 / 4, "kind/yes_no/unparsed": 1 / 4, "kind/yes_no/words": 7 / 4,
        "kind/yes_no/yes_ratio": 2 / 4,
    }  # fmt: skip


def test_contract():
    check_evaluator("answer_questions", aux=[one[1] for one in SMALL[:6]], responses=[one[0] for one in SMALL[:6]])


# ------------------------------------------------------------------------------------------------ files

TALK = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "Four."}]
ASKED = [
    {"question_id": 1, "image": "a.png", "question": "Is it red?", "answer": "yes"},
    {
        "question_id": "who", "image": "b.png", "question": "Is this Bo?", "answer": "no", "concept": "Bo",
        "category": "awareness", "concept_images": ["a.png", "c.png"], "description": "Bo is a dog.",
    },
    {
        "question_id": "what", "images": ["b.png", "c.png"], "question": "What would Bo rather have?",
        "answer": "bone", "options": ["ball", "bone"], "concept": "Bo", "category": "preference",
        "preference": "Bo likes bones.",
    },
    {
        "question_id": "later", "image": "c.png", "question": "And this?", "answer": "No", "concept": "Bo",
        "category": "inappropriateness", "concept_images": ["a.png"], "preference": "Bo likes bones.",
        "turns": TALK, "split": "hard",
    },
    {"question_id": 5, "question": "How many legs has Bo?", "answer": [4, "four"], "turns": TALK},
]  # fmt: skip


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    return vlm_folder(tmp_path_factory.mktemp("qwen"), "qwen2_vl")


@pytest.fixture(name="asked")
def _asked(tmp_path):
    (tmp_path / "images").mkdir()
    for name, clip in zip("abc", clips([(28, 28), (40, 70), (56, 28)]), strict=True):
        write_image(tmp_path / "images" / f"{name}.png", np.ascontiguousarray(clip[0].permute(1, 2, 0).numpy()))
    return json_lines(tmp_path / "q.jsonl", ASKED)


def by_model(asked, folder, output, **model):
    model = {"path": folder, "max_new_tokens": 4, "device": "cpu", "batch_size": 2, **model}
    images = asked.parent / "images"
    return config(output, "answer_questions", kind="questions", questions=asked, images=images, model=model)


def test_what_the_model_is_told_stands_before_the_question(asked):
    rows = questions(asked, None)
    assert [row.sample for row in rows] == ["1", "who", "what", "later", "5"]
    assert [row.prompt for row in rows] == [
        "Is it red?",
        "The first 2 pictures show Bo.\nBo is a dog.\n\nIs this Bo?",
        "Bo likes bones.\n\nWhat would Bo rather have?\nA. ball\nB. bone",
        "And this?",
        "How many legs has Bo?",
    ]
    assert [(row.media, *row.images) for row in rows] == [
        ("a.png",), ("a.png", "c.png", "b.png"), ("b.png", "c.png"), ("a.png", "c.png"), ("",),
    ]  # fmt: skip
    assert [row.group for row in rows] == ["a.png", "Bo", "Bo", "Bo", None] and rows[4].modality == "text"
    assert rows[3].aux["turns"] == [
        {"role": "user", "content": "The first picture shows Bo.\nBo likes bones.", "images": 1},
        {"role": "assistant", "content": "I got it."},
        *TALK,
    ]
    assert rows[3].aux["split"] == "hard" and rows[4].aux["turns"] == TALK and "turns" not in rows[1].aux
    assert rows[2].aux == {
        "question_id": "what", "answer": "bone", "options": ["ball", "bone"], "concept": "Bo", "category": "preference",
    }  # fmt: skip


def test_files_that_cannot_be_asked_are_refused(tmp_path):
    base = {"question_id": 1, "question": "Is it?", "answer": "yes"}
    for change, message in (
        ({"answer": None}, r"q:1: has no answer; it has question_id, question"),
        ({"question": " "}, r"q:1: question is ' '; it is a text"),
        ({"image": "a", "images": ["b"]}, "both image and images"),
        ({"images": "b"}, "images is 'b'; it is a list of pictures"),
        ({"concept_images": ["b"]}, "name it in concept"),
        ({"concept": 3}, "concept is 3; it is a text"),
        ({"preference": 3}, "preference is 3; it is a text"),
        ({"options": ["a", "b"]}, "q:1: answer is 'yes', which is neither a letter nor the text of one of 2 options"),
        ({"turns": TALK[:1]}, "no list of pairs"),
        ({"turns": TALK[::-1]}, "turn 1 is .* with role user"),
        ({"turns": [TALK[0] | {"images": 1}, TALK[1]]}, "show no pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            questions(json_lines(tmp_path / "q", [base | change]), None)
    for turns, message in (
        ([TALK[0] | {"images": -1}, TALK[1]], "turn 1: images is -1"),
        ([TALK[0], TALK[1] | {"images": 1}], "turn 2: images is 1"),
        ([TALK[0] | {"name": "x"}, TALK[1]], "turn 1 has name"),
        ([TALK[0] | {"images": 2}, TALK[1]], "turns show 2 pictures, and the row has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            earlier_turns(turns, 1)


# ------------------------------------------------------------------------------------------------ runs


def test_saved_answers_are_joined_and_resampled_by_concept(tmp_path, asked):
    told = {1: "Yes", "who": "No.", "what": "a bone", "later": "It is", 5: "four"}
    lines = [{**row, "prediction": told[row["question_id"]]} for row in ASKED]
    saved = json_lines(tmp_path / "a.jsonl", lines)
    entry = summary(
        run(config(tmp_path / "out", "answer_questions", kind="questions", questions=asked, responses=saved))
    )
    entry = entry["answer_questions"]
    assert entry["n_ok"] == 5 and entry["figures_of"]["clusters"] == 3
    figures = {name: each["value"] for name, each in entry["figures"].items()}
    assert figures["accuracy"] == 4 / 5 and figures["yes_ratio"] == 1 / 3 and figures["unparsed"] == 1 / 5
    assert figures["category/awareness/accuracy"] == figures["category/preference/accuracy"] == 1
    assert figures["category/inappropriateness/accuracy"] == 0
    low, high = entry["figures"]["accuracy"]["ci95"]
    assert low <= 2 / 3 and high == pytest.approx(1)
    only_answer = json_lines(tmp_path / "b.jsonl", [{"question_id": 1, "answer": "yes"}])
    with pytest.raises(ValueError, match="has no response"):
        answers(only_answer, [])
    with pytest.raises(ValueError, match="question 1 is answered twice"):
        answers(json_lines(tmp_path / "c.jsonl", [lines[0], lines[0]]), [])


def test_a_model_answers_with_all_pictures_and_turns(tmp_path, asked, folder, monkeypatch):
    first = run(by_model(asked, folder, tmp_path / "out", suffix="\nAnswer briefly."))
    assert summary(first)["answer_questions"]["n_ok"] == 5
    told = {row.sample: row for row in read_media_table(tmp_path / "out" / "responses" / "table.jsonl")}
    for size in (1, 5):
        run(by_model(asked, folder, tmp_path / f"by{size}", suffix="\nAnswer briefly.", batch_size=size))
        rows = read_media_table(tmp_path / f"by{size}" / "responses" / "table.jsonl")
        assert {row.sample: row.response for row in rows} == {name: row.response for name, row in told.items()}
    vlm = load_vlm(folder=str(folder), device=torch.device("cpu"), dtype=torch.float32)
    shown = [clip[0] for clip in clips([(28, 28), (40, 70), (56, 28)])]
    image, end = "<|vision_start|><|image_pad|><|vision_end|>", "<|im_end|>\n"
    user, system = "<|im_start|>user\n", f"<|im_start|>system\nYou are a helpful assistant.{end}"
    by_hand = (
        f"{system}{user}{image}The first picture shows Bo.\nBo likes bones.{end}<|im_start|>assistant\nI got it.{end}"
        f"{user}What is 2 + 2?{end}<|im_start|>assistant\nFour.{end}"
        f"{user}{image}And this?\nAnswer briefly.{end}<|im_start|>assistant\n"
    )
    (found,) = vlm.writer.write([Asked(by_hand, (shown[0], shown[2]))], Decoding(4))
    assert told["later"].response == found.text
    text = vlm.words.chat(f"{told['who'].prompt}\nAnswer briefly.", 3)
    (found,) = vlm.writer.write([Asked(text, (shown[0], shown[2], shown[1]))], Decoding(4))
    assert told["who"].response == found.text
    # Only what was changed is asked again: another turn is another question.
    changed = json.loads(json.dumps(ASKED))
    changed[3]["turns"][1]["content"] = "Five."
    json_lines(asked, changed)
    written = []
    write = type(vlm.writer).write

    def listened(self, some, how):
        written.append([one.text for one in some])
        return write(self, some, how)

    monkeypatch.setattr(type(vlm.writer), "write", listened)
    run(by_model(asked, folder, tmp_path / "by1", suffix="\nAnswer briefly.", batch_size=1))
    assert len(written) == 1 and written[0] == [by_hand.replace("Four.", "Five.")]


def test_a_taught_model_knows_what_it_was_told(tmp_path, asked):
    rows = [row for row in questions(asked, asked.parent / "images") if row.sample in ("1", "who", "what")]
    shown = dict(zip("abc", (clip[0] for clip in clips([(28, 28), (40, 70), (56, 28)])), strict=True))
    due_ = {"1": "Yes", "who": "No", "what": "B"}
    lessons = []
    for row in rows:
        sizes = [shown[str(place)[-5]] for place in (row.media, *row.images)]
        lessons.append((sizes, row.prompt, due_[row.sample]))
    folder = vlm_folder(tmp_path / "taught", "qwen2_vl")
    teach(folder, lessons)
    json_lines(asked, ASKED[:3])
    figures = summary(run(by_model(asked, folder, tmp_path / "out")))["answer_questions"]["figures"]
    assert figures["accuracy"]["value"] == 1 and figures["unparsed"]["value"] == 0


def test_rows_that_cannot_be_asked_have_a_reason(tmp_path, asked, folder):
    broken = config(tmp_path, "answer_questions", kind="questions", questions=asked, images=asked.parent / "images",
                    model={"path": folder, "device": "cpu", "max_new_tokens": 2,
                           "conversation": "USER: {images}\n{question} ASSISTANT:"})  # fmt: skip
    entry = summary(run(broken))["answer_questions"]
    assert (entry["n_ok"], entry["n_skipped"]) == (3, 2)
    table = read_media_table(tmp_path / "responses" / "table.jsonl")
    assert "the row has earlier turns" in table[3].aux["response_error"]


def test_turns_of_any_table_are_checked(tmp_path, folder):
    (tmp_path / "t.jsonl").write_text(json.dumps({"sample": "x", "prompt": "Is it?", "turns": "hello"}))
    model = Responding(path=folder, max_new_tokens=2, device="cpu")
    place = respond.run(RespondConfig(questions=tmp_path / "t.jsonl", model=model, output=tmp_path / "t"))
    assert "turns is no list of pairs" in read_media_table(place, questions=True)[0].aux["response_error"]
