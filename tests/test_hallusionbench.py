"""HallusionBench: accuracies of questions, figures and sets by hand, the skip rule, unclear answers, the diagnosis."""

import json

import pytest
from hallucination_kit import json_list, judge
from public_kit import HALLUSION_BENCH, needs

from mmalign.hallucination.hallusionbench import answers, diagnosis, figures, questions
from mmalign.testing import check_evaluator


def aux(category, subcategory, set_id, figure, question, label, shown=None):
    shown = ("0" if figure == "0" else "1") if shown is None and category == "VS" else shown or "1"
    keys = {"category": category, "subcategory": subcategory, "set_id": set_id, "figure_id": figure}
    return keys | {"question_id": question, "visual_input": shown, "label": label}


def items(*asked):
    """(answer, category, subcategory, set, figure, question, label[, visual_input])."""
    return [(said, aux(*rest), f"{rest[1]}/{rest[2]}") for said, *rest in asked]


SMALL = items(
    ("Yes", "VD", "ocr", "0", "0", "0", "yes"),
    ("No", "VD", "ocr", "0", "0", "1", "yes"),  # wrong
    ("no", "VD", "ocr", "0", "1", "0", "no", "2"),
    ("No.", "VD", "ocr", "0", "1", "1", "no", "2"),
    ("I cannot say", "VS", "ocr", "0", "0", "0", "yes"),  # unclear, without a figure
    ("yes", "VS", "ocr", "0", "1", "0", "yes"),
    ("yes", "VS", "ocr", "0", "2", "0", "no", "2"),  # wrong
)


def test_accuracies_by_hand():
    scores, found = judge("hallusionbench", SMALL)
    assert scores["accuracy"] == [1, 0, 1, 1, 0, 1, 0] and scores["unclear"] == [0, 0, 0, 0, 1, 0, 0]
    assert found["aAcc"] == 4 / 7
    # figures: VD 0 (wrong), VD 1 (right), VS 1 (right), VS 2 (wrong); VS 0 is no figure
    assert found["fAcc"] == 2 / 4
    # questions: VD 0 (right, right), VD 1 (wrong), VS 0 (wrong)
    assert found["qAcc"] == 1 / 3
    assert found["VD/aAcc"] == 3 / 4 and found["VD/fAcc"] == 1 / 2 and found["VD/qAcc"] == 1 / 2
    assert found["VS-ocr/aAcc"] == 1 / 3 and found["VS/fAcc"] == 1 / 2 and found["VS-ocr/qAcc"] == 0
    assert found["yes_ratio"] == 3 / 7 and found["unclear"] == 1 / 7 and found["words"] == pytest.approx(9 / 7)


def test_vlmevalkit_merges_what_has_one_name():
    _, found = judge("hallusionbench", SMALL, keys="vlmevalkit")
    assert found["aAcc"] == 4 / 6, "without the row that has no figure"
    # ocr_0_0: VD alone (wrong); ocr_0_1: VD right, VS right; ocr_0_2: wrong
    assert found["fAcc"] == 1 / 3
    # ocr_0_0: VD right, right, VS right, wrong; ocr_0_1: wrong
    assert found["qAcc"] == 0
    assert "LH" not in found and "ocr/aAcc" in found


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        # VD: the original wrong
        ([("No", "VD", "m", "0", "0", "0", "yes"), ("No", "VD", "m", "0", "1", "0", "no", "2")], "VI"),
        # VD: the original right, the edited one wrong with the same answer
        ([("Yes", "VD", "m", "0", "0", "0", "yes"), ("Yes", "VD", "m", "0", "1", "0", "no", "2")], "Mix"),
        # VD: with another answer
        ([("Yes", "VD", "m", "0", "0", "0", "yes"), ("No", "VD", "m", "0", "1", "0", "yes", "2")], "VI"),
        ([("Yes", "VD", "m", "0", "0", "0", "yes"), ("perhaps", "VD", "m", "0", "1", "0", "no", "2")], "VI"),
        # VS: wrong without a figure, and the same with it
        ([("Yes", "VS", "m", "0", "0", "0", "no"), ("Yes", "VS", "m", "0", "1", "0", "no")], "LH"),
        # VS: wrong without a figure, and another wrong answer with it
        ([("Yes", "VS", "m", "0", "0", "0", "no"), ("No", "VS", "m", "0", "1", "0", "yes")], "Mix"),
        ([("Yes", "VS", "m", "0", "0", "0", "no"), ("perhaps", "VS", "m", "0", "1", "0", "no")], "Mix"),
        # VS: unclear without a figure, wrong with it
        ([("perhaps", "VS", "m", "0", "0", "0", "no"), ("Yes", "VS", "m", "0", "1", "0", "no")], "VI"),
        # VS: right without a figure, wrong with the original one
        ([("No", "VS", "m", "0", "0", "0", "no"), ("Yes", "VS", "m", "0", "1", "0", "no")], "VI"),
        # VS: right without, wrong with the edited one: the same answer as without, and another one
        ([("No", "VS", "m", "0", "0", "0", "no"), ("No", "VS", "m", "0", "2", "0", "yes", "2")], "LH"),
        ([("No", "VS", "m", "0", "0", "0", "no"), ("Yes", "VS", "m", "0", "2", "0", "no", "2")], "VI"),
    ],
)
def test_diagnosis_case_by_case(asked, kind):
    _, found = judge("hallusionbench", items(*asked))
    assert {name: found[name] for name in ("LH", "VI", "Mix")} == {"LH": 0.0, "VI": 0.0, "Mix": 0.0} | {kind: 1.0}


def test_nothing_wrong_has_no_diagnosis():
    _, found = judge("hallusionbench", items(("Yes", "VD", "m", "0", "0", "0", "yes")))
    assert (found["LH"], found["aAcc"], found["fAcc"], found["qAcc"]) == (None, 1, 1, 1)
    # an unclear answer without a figure is nobody's fault, as the authors have it
    assert diagnosis([]) == {"LH": None, "VI": None, "Mix": None}


def test_a_set_that_is_drawn_twice_counts_twice():
    scores, _ = judge("hallusionbench", SMALL)
    rows = [
        {"group": f"{one[2]}{again}", "aux": one[1], "scores": {name: scores[name][place] for name in scores}}
        for again in ("", " (drawn 2)")
        for place, one in enumerate(SMALL)
    ]
    for keys in ("official", "vlmevalkit"):
        assert figures(rows, keys) == pytest.approx(figures(rows[: len(SMALL)], keys))


# ------------------------------------------------------------------------------------------------ the public file


@needs(HALLUSION_BENCH)
def test_the_public_file():
    rows = questions(HALLUSION_BENCH, None)
    assert len(rows) == 1129 and len({row.sample for row in rows}) == 1129
    categories = [row.aux["category"] for row in rows]
    assert (categories.count("VD"), categories.count("VS")) == (591, 538)
    bare = [row for row in rows if row.modality == "text"]
    assert len(bare) == 178 and all(row.media == "" and row.aux["figure_id"] == "0" for row in bare)
    first = next(row for row in rows if row.media)
    assert first.media == "VS/chart/0_1.png" and first.prompt.startswith("Is China, Hongkong SAR, the leading")


@pytest.mark.parametrize("said", ["Yes", "No", None])
@needs(HALLUSION_BENCH)
def test_constant_and_perfect_answers(said):
    rows = questions(HALLUSION_BENCH, None)
    _, found = judge("hallusionbench", [(said or row.aux["label"], row.aux, row.group) for row in rows])
    yes = sum(row.aux["label"] == "yes" for row in rows) / 1129
    assert yes == pytest.approx(484 / 1129)
    assert found["aAcc"] == pytest.approx({"Yes": yes, "No": 1 - yes, None: 1}[said])
    assert found["yes_ratio"] == pytest.approx({"Yes": 1, "No": 0, None: yes}[said])
    if said is None:
        assert all(found[name] == 1 for name in found if name.endswith("Acc"))
        assert found["LH"] is None
    else:
        assert 0 < found["fAcc"] < found["aAcc"] and found["qAcc"] < found["aAcc"]
        assert found["LH"] + found["VI"] + found["Mix"] == pytest.approx(1)
    pictures = {row.media for row in rows if row.media}
    named = {(row.group, row.aux["category"], row.aux["figure_id"]) for row in rows if row.media}
    assert len(pictures) == len(named), "a figure's key is a picture"


@needs(HALLUSION_BENCH)
def test_saved_answers_are_joined(tmp_path):
    held = json.loads(HALLUSION_BENCH.read_text())
    rows = questions(HALLUSION_BENCH, None)
    told = json_list(tmp_path / "result.json", [line | {"model_prediction": f"Yes {n}"} for n, line in enumerate(held)])
    found = answers(told, rows)
    assert [found[row.sample] for row in rows] == [f"Yes {n}" for n in range(1129)]
    with pytest.raises(ValueError, match="has no model_prediction"):
        answers(HALLUSION_BENCH, rows)
    twice = json_list(tmp_path / "twice.json", [held[0] | {"response": "x"}] * 2)
    with pytest.raises(ValueError, match="VS-chart-0-0-0 is answered twice"):
        answers(twice, rows)


def test_contract():
    told = [one[1] for one in SMALL[:6]]
    check_evaluator("hallusionbench", aux=told)
