"""POPE: both parsers word for word, figures by hand, the public file with the answers that a constant gives."""

import pytest
from hallucination_kit import config, json_lines, judge, pope_file, summary
from public_kit import POPE_ADVERSARIAL, needs

from mmalign.hallucination.pope import answers, questions
from mmalign.hallucination.yes_no import official, words
from mmalign.score import run
from mmalign.testing import check_evaluator

ANSWERS = [
    ("Yes", "yes", "yes"),
    ("No", "no", "no"),
    ("no.", "no", "no"),
    ("", "yes", None),
    ("I cannot tell", "yes", None),
    ("Yes, there is. No doubt.", "yes", None),  # the official parser stops at the full stop
    ("There is not a dog", "no", None),
    ("NO", "yes", "no"),  # which is none of No, not, no
    ("Nope", "yes", None),
    ("No, there is none", "no", "no"),
    ("no!", "yes", "no"),
    ("The answer is:no", "yes", None),  # VLMEvalKit's punctuation has no colon
    ("yes/no", "yes", None),
    ("It isn't. Yes", "yes", "yes"),
    ("\nNo", "yes", "no"),  # split at spaces alone
    ("Yes1,000", "yes", None),
]


@pytest.mark.parametrize(("answer", "by_official", "by_words"), ANSWERS)
def test_parsers(answer, by_official, by_words):
    assert official(answer) == by_official
    assert words(answer) == by_words


def items(truths, said, split=None):
    aux = [{"label": truth} | ({"split": split} if split else {}) for truth in truths]
    return list(zip(said, aux, strict=True))


def test_figures_by_hand():
    truths = ["yes"] * 4 + ["no"] * 4
    said = ["Yes", "Yes", "Yes, one", "No", "Yes", "No", "No", "maybe a very long one"]
    scores, figures = judge("pope", items(truths, said))
    assert scores["accuracy"] == [1, 1, 1, 0, 0, 1, 1, 0]
    # said yes: 5 (the last one too); right among them 3; of the 4 that are yes 3 are found
    assert figures["accuracy"] == 5 / 8 and figures["precision"] == 3 / 5 and figures["recall"] == 3 / 4
    assert figures["f1"] == pytest.approx(2 * 0.6 * 0.75 / 1.35) and figures["yes_ratio"] == 5 / 8
    assert figures["unknown"] == 0 and figures["words"] == pytest.approx(13 / 8)
    _, other = judge("pope", items(truths, said), parser="vlmevalkit")
    # the last is unknown: wrong, and not positive
    assert other["accuracy"] == 5 / 8 and other["precision"] == 3 / 4 and other["recall"] == 3 / 4
    assert other["yes_ratio"] == 4 / 8 and other["unknown"] == 1 / 8


def test_splits_have_figures_of_their_own_and_a_mean():
    some = items(["yes", "no"], ["Yes", "No"], "random") + items(["yes", "no"], ["Yes", "Yes"], "popular")
    _, figures = judge("pope", some)
    assert figures["random/f1"] == 1 and figures["popular/f1"] == pytest.approx(2 / 3)
    assert figures["mean/f1"] == pytest.approx(5 / 6) and figures["mean/accuracy"] == 0.75
    assert "f1" not in figures


@pytest.mark.parametrize(
    ("said", "due"),
    [
        ("Yes", {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 1.0}),
        ("No", {"accuracy": 0.5, "precision": None, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}),
        (None, {"accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_ratio": 0.5}),
    ],
)
@needs(POPE_ADVERSARIAL)
def test_constant_and_perfect_answers_to_the_public_file(said, due, tmp_path):
    rows = questions(POPE_ADVERSARIAL, None)
    assert len(rows) == 3000 and len({row.group for row in rows}) == 500
    assert sum(row.aux["label"] == "yes" for row in rows) == 1500 and rows[0].aux["split"] == "adversarial"
    told = [(said or row.aux["label"].capitalize(), row.aux, row.group) for row in rows]
    _, figures = judge("pope", told)
    assert {name: figures[f"adversarial/{name}"] for name in due} == pytest.approx(due)


@needs(POPE_ADVERSARIAL)
def test_a_run_on_the_public_file(tmp_path):
    rows = questions(POPE_ADVERSARIAL, None)
    lines = [{"question": row.prompt, "answer": "Yes, it is." if n % 7 else "No"} for n, row in enumerate(rows)]
    saved = json_lines(tmp_path / "answers.jsonl", lines)
    wanted = config(tmp_path / "out", "pope", kind="pope", questions=POPE_ADVERSARIAL, responses=saved)
    entry = summary(run(wanted))["pope"]
    assert entry["n_ok"] == 3000 and entry["figures_of"] == {"n": 3000, "clusters": 500, "resamples": 1333}
    low, high = entry["figures"]["adversarial/accuracy"]["ci95"]
    assert low < entry["figures"]["adversarial/accuracy"]["value"] < high and high - low < 0.06
    assert entry["figures"]["adversarial/yes_ratio"]["value"] == pytest.approx(6 / 7, abs=1e-3)


# ------------------------------------------------------------------------------------------------ files


def test_answers_are_joined_by_id_or_by_place(tmp_path):
    rows = questions(pope_file(tmp_path / "coco_pope_random.json", ["yes", "no", "no"]), None)
    assert [row.sample for row in rows] == ["random-1", "random-2", "random-3"]
    by_id = [{"question_id": 3, "text": "c"}, {"question_id": 1, "text": "a"}]
    assert answers(json_lines(tmp_path / "a", by_id), rows) == {"random-3": "c", "random-1": "a"}
    by_place = [{"question": row.prompt, "answer": row.prompt[-2]} for row in rows]
    assert list(answers(json_lines(tmp_path / "b", by_place), rows).values()) == ["1", "2", "3"]
    for lines, said in (
        (by_place[:2], "none may be missing"),
        ([*by_place[1:], by_place[0]], "it is in another order"),
        ([*by_id, by_id[0]], "is answered twice"),
        ([{"question_id": 1}], "has no answer; it has question_id"),
    ):
        with pytest.raises(ValueError, match=said):
            answers(json_lines(tmp_path / "c", lines), rows)


def test_files_that_are_no_questions_are_refused(tmp_path):
    for text, said in (
        ("", "holds no objects"),
        ("{]", "neither a JSON list nor JSON lines"),
        ('{"question_id": 1, "image": "a"}', "has no text, label; it has question_id, image"),
        ('{"question_id": 1, "image": "a", "text": "b", "label": "Yes"}', "it is yes or no"),
    ):
        (tmp_path / "q.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            questions(tmp_path / "q.json", None)
    with pytest.raises(ValueError, match="cannot be read"):
        questions(tmp_path / "absent.json", None)


def test_contract():
    aux = [{"label": label, "split": split} for label in ("yes", "no") for split in ("random", "popular", "popular")]
    check_evaluator("pope", aux=aux)
    check_evaluator("pope", {"parser": "vlmevalkit"}, aux=aux, processes=1)
