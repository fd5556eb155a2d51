"""AMBER's yes/no questions: positive is no, exact answers, dimensions by hand, the public files."""

import pytest
from hallucination_kit import json_list, judge
from public_kit import AMBER_ANNOTATIONS, AMBER_QUERIES, needs

from mmalign.hallucination.amber import answers, printed_f1, questions
from mmalign.testing import check_evaluator

EXISTENCE = "discriminative-hallucination"
STATE, NUMBER = "discriminative-attribute-state", "discriminative-attribute-number"


def item(said, kind, label):
    return said, {"type": kind, "label": label}


SMALL = [
    item("No", EXISTENCE, "no"),
    item("Yes", EXISTENCE, "no"),
    item("No", STATE, "no"),
    item("No", STATE, "yes"),
    item("Yes", NUMBER, "yes"),
    item("no", NUMBER, "no"),  # not to the letter
    item("Yes", "discriminative-relation", "yes"),
    item("Yes, it does", "relation", "no"),
]


def test_figures_by_hand():
    scores, found = judge("amber_discriminative", SMALL)
    assert scores["accuracy"] == [1, 0, 1, 0, 1, 0, 1, 0]
    # said no: 3, of these 2 are no; due no: 5
    assert found["accuracy"] == 4 / 8 and found["precision"] == 2 / 3 and found["recall"] == 2 / 5
    assert found["f1"] == pytest.approx(2 * (2 / 3) * 0.4 / (2 / 3 + 0.4))
    assert found["yes_ratio"] == 3 / 8 and found["unknown"] == 2 / 8 and found["words"] == pytest.approx(10 / 8)
    assert found["existence/accuracy"] == 1 / 2 and found["existence/precision"] == 1
    assert found["attribute/accuracy"] == 2 / 4 and found["attribute-state/precision"] == 1 / 2
    assert found["attribute-number/recall"] == 0 and found["attribute-number/f1"] == 0
    assert found["relation/accuracy"] == 1 / 2 and found["relation/unknown"] == 1 / 2
    _, lenient = judge("amber_discriminative", SMALL, parser="vlmevalkit")
    assert lenient["accuracy"] == 5 / 8 and lenient["unknown"] == 0 and lenient["yes_ratio"] == 4 / 8


def test_f1_as_it_is_printed():
    counts = {(0, 0, 0): 2, (0, 0, 1): 1, (1, 0, 0): 3}  # no to no, no to yes, yes to no
    # precision 2 / 3.001 = 66.6 %, recall 2 / 5.001 = 40.0 %; 2 * .666 * .4 / (1.066 + 1e-4) = 0.49976
    assert printed_f1(counts) == 0.5
    # 2 / 2.001 = 100 % and 2 / 2.001: 2 / (2 + 1e-3) = 0.9995
    assert printed_f1({(0, 0, 0): 2}, 1e-3) == 1.0
    # 1 / 1.001 = 99.9 %, 1 / 1.001: 2 * .998001 / (1.998 + 1e-4) = 0.99895
    assert printed_f1({(0, 0, 0): 1}) == pytest.approx(0.999)
    assert printed_f1({(1, 0, 1): 1}) == 0.0


@pytest.mark.parametrize(
    ("said", "due"),
    [
        ("No", {
            "existence/accuracy": 1, "existence/f1": 1, "existence/f1_printed": 1.0, "yes_ratio": 0, "recall": 1,
            "accuracy": 9427 / 14216, "precision": 9427 / 14216, "attribute/accuracy": 0.5,
            "relation/accuracy": 689 / 1664,
        }),
        ("Yes", {
            "existence/accuracy": 0, "existence/f1": 0, "f1": 0, "yes_ratio": 1, "accuracy": 4789 / 14216,
            "attribute/accuracy": 0.5, "relation/accuracy": 975 / 1664, "precision": None, "existence/precision": None,
        }),
        (None, {"accuracy": 1, "f1": 1, "existence/yes_ratio": 0, "relation/f1": 1, "yes_ratio": 4789 / 14216}),
    ],
)  # fmt: skip
@needs(AMBER_QUERIES, AMBER_ANNOTATIONS)
def test_constant_and_perfect_answers_to_the_public_files(said, due):
    rows = [row for row in questions(AMBER_QUERIES, None, AMBER_ANNOTATIONS) if "label" in row.aux]
    told = [(said or row.aux["label"].capitalize(), row.aux, row.group) for row in rows]
    _, found = judge("amber_discriminative", told)
    assert {name: found[name] for name in due} == pytest.approx(due)


@needs(AMBER_QUERIES, AMBER_ANNOTATIONS)
def test_the_public_files():
    rows = questions(AMBER_QUERIES, None, AMBER_ANNOTATIONS)
    assert len(rows) == 15220 and sum(row.dimensions == ("amber_generative",) for row in rows) == 1004
    by_type = {}
    for row in rows:
        by_type.setdefault(row.aux["type"], []).append(row.aux.get("label"))
    assert {kind: (labels.count("yes"), labels.count("no")) for kind, labels in by_type.items()} == {
        "generative": (0, 0),
        EXISTENCE: (0, 4924),
        STATE: (2382, 2382),
        NUMBER: (1036, 1036),
        "discriminative-attribute-action": (396, 396),
        "discriminative-relation": (975, 0),
        "relation": (0, 689),
    }
    assert rows[0].aux["truth"][:2] == ["sky", "forest"] and rows[0].aux["hallu"][0] == "cloud"
    assert rows[0].prompt == "Describe this image." and rows[0].group == "AMBER_1.jpg"


def test_files_that_are_not_ambers_are_refused(tmp_path):
    queries = json_list(tmp_path / "q.json", [{"id": 1, "image": "a.jpg", "query": "Is it?"}])
    for entries, said in (
        ([{"id": 2, "type": EXISTENCE, "truth": "no"}], "has no entry for the query 1"),
        ([{"id": 1, "type": "other", "truth": "no"}], "is of type 'other'"),
        ([{"id": 1, "type": EXISTENCE, "truth": "No"}], "with truth 'No'"),
        ([{"id": 1, "type": EXISTENCE}], "has no truth; it has id, type"),
    ):
        with pytest.raises(ValueError, match=said):
            questions(queries, None, json_list(tmp_path / "a.json", entries))
    told = json_list(tmp_path / "r.json", [{"id": 1, "response": "No"}, {"id": "1", "response": "Yes"}])
    with pytest.raises(ValueError, match="query 1 is answered twice"):
        answers(told, [])


def test_contract():
    check_evaluator("amber_discriminative", aux=[one[1] for one in SMALL[:6]], responses=[one[0] for one in SMALL[:6]])
