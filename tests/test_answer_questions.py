"""Questions of one's own: how answers are read, figures by hand, files and what is refused, a model that answers."""

import pytest
from hallucination_kit import judge

from mmalign.hallucination.answer_rules import due, normal, said
from mmalign.testing import check_evaluator

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
