"""The rules by which preference rows of answers are built: BDHS, claims, several pictures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmalign.builders import bdhs, claims, multi_image
from mmalign.jobs_mllm import BDHS


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------------------- BDHS

TEXT = "There is a red circle. It is left of a blue cross! Is the ground grey?"


def test_sentences_are_the_answer_again() -> None:
    found = bdhs.sentences(TEXT)
    assert [each.strip() for each in found] == [
        "There is a red circle.",
        "It is left of a blue cross!",
        "Is the ground grey?",
    ]
    assert "".join(found) == TEXT
    assert bdhs.sentences("No stop") == ["No stop"]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_visible_tokens_are_as_many_as_told(share: float) -> None:
    places = range(100, 20100)
    hidden = bdhs.hidden_places(places, share, _generator())
    assert len(hidden) / 20000 == pytest.approx(share, abs=0.01)
    assert hidden <= set(places)


def test_beginnings_end_between_words() -> None:
    seen = {bdhs.beginning(" There is a red circle.", 0.5, _generator(seed)) for seed in range(200)}
    assert seen == {"", " There", " There is", " There is a", " There is a red"}


def test_yes_and_no_are_turned_round_in_half_of_the_cases() -> None:
    found = [bdhs.beginning("Yes, there is a dog.", 0.5, _generator(seed)) for seed in range(400)]
    assert set(found) == {"Yes", "No"}
    assert found.count("No") / 400 == pytest.approx(0.5, abs=0.08)
    assert bdhs.beginning("no.", 1.0, _generator()) == "yes"
    assert bdhs.beginning("Nobody is there.", 1.0, _generator(3)).startswith(("N", ""))


def test_ends_are_written_behind_the_true_sentences() -> None:
    asked: list[str] = []

    def write(words: str, hidden: frozenset[int], stop: bool) -> str:
        asked.append(words)
        return " a green square."

    built = bdhs.rejected(TEXT, range(9), write, lambda a, b: 0.5, BDHS(), _generator(1))
    assert (built.tries, built.unguided) == (1, False)
    true = bdhs.sentences(TEXT)
    for number, words in enumerate(asked):
        history = "".join(true[:number])
        assert words.startswith(history)
        assert true[number].startswith(words[len(history) :])  # its own sentence's beginning
    assert built.text.count("a green square.") == 3


def test_an_answer_that_means_the_same_is_tried_again_and_then_written_freely() -> None:
    calls: list[tuple[str, bool]] = []

    def write(words: str, hidden: frozenset[int], stop: bool) -> str:
        calls.append((words, stop))
        return " something."

    built = bdhs.rejected("A dog.", range(4), write, lambda a, b: 0.99, BDHS(tries=5), _generator())
    assert (built.tries, built.unguided) == (6, True)
    assert len(calls) == 6
    assert calls[-1] == ("", False)


def test_a_model_that_sees_everything_and_repeats_gives_the_same_answer() -> None:
    """With nothing hidden and a model that goes on as the truth does, the answer is the good one."""

    def write(words: str, hidden: frozenset[int], stop: bool) -> str:
        assert not hidden
        rest = TEXT[len(words) :]
        return bdhs.sentences(rest)[0] if stop else rest

    built = bdhs.rejected(TEXT, range(9), write, lambda a, b: 0.0, BDHS(hidden=0.0), _generator(4))
    assert built.text == TEXT


# ------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- A dog runs.\n- It is brown.", ["A dog runs.", "It is brown."]),
        ("Facts:\n1. One.\n2) Two. \n\n* Three", ["One.", "Two.", "Three"]),
        ("- none", []),
        ("There are no facts.", []),
        ("-no space", []),
    ],
)
def test_lists_of_models_are_read(text: str, expected: list[str]) -> None:
    assert claims.listed(text) == expected


def test_long_answers_are_cut_between_words() -> None:
    assert claims.shortened("a  b\nc d", 3) == "a  b\nc"
    assert claims.shortened("a b", 3) == "a b"


@pytest.mark.parametrize(
    ("p", "expected"), [((0.3, 0.3, 0.5, 0.05), True), ((0.1, 0.3, 0.41, 0.0), False), ((0.2, 0.2, 0.2, 0.2), False)]
)
def test_yes_is_more_likely_than_no(p: tuple[float, ...], expected: bool) -> None:
    assert claims.accepted([math.log(max(each, 1e-30)) for each in p]) is expected


def _judged(text: str, *accepted: bool) -> claims.Judged:
    return claims.Judged(text, tuple(map(str, range(len(accepted)))), accepted)


def test_pairs_are_of_different_scores_and_words() -> None:
    answers = [_judged("a", True, True), _judged("b", False, True), _judged("c", False, False), _judged("a ", False)]
    assert [each.score for each in answers] == [0, -1, -2, -1]
    found = claims.pairs(answers, at_most=10, generator=_generator())
    assert {(a.text, b.text) for a, b in found} == {("a", "b"), ("a", "c"), ("b", "c"), ("a ", "c")}
    assert all(a.score > b.score for a, b in found)
    assert claims.pairs(answers, at_most=2, least=2, generator=_generator()) == [(answers[0], answers[2])]
    drawn = [claims.pairs(answers, at_most=2, generator=_generator(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 2


def test_the_length_limit_brings_the_means_together() -> None:
    lengths = [(10, 20), (10, 12), (14, 10), (10, 11), (9, 30)]
    limit = claims.length_limit(lengths)

    def gap(r: float) -> float:
        kept = [pair for pair in lengths if not claims.too_long(pair, r)]
        return abs(sum(c - r for c, r in kept) / len(kept)) if kept else math.inf

    assert gap(limit) == min(gap(number * 0.02) for number in range(51))
    assert claims.length_limit([(5, 5)]) == 0.0
    assert claims.length_limit([]) == 1.0


# ---------------------------------------------------------------------------------------------------- several pictures


def _plain(colour: tuple[int, int, int], size: tuple[int, int] = (40, 60)) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, *size).contiguous()


RED, GREEN, BLUE = _plain((255, 0, 0)), _plain((0, 255, 0), (60, 40)), _plain((0, 0, 255), (30, 30))


def _colour_of(image: Tensor, box: tuple[float, float, float, float]) -> list[int]:
    height, width = image.shape[-2:]
    x, y = (box[0] + box[2]) / 2 * width, (box[1] + box[3]) / 2 * height
    return image[:, int(y), int(x)].tolist()


def test_a_sequence_names_the_picture() -> None:
    made = multi_image.sequence([RED, GREEN, BLUE], 1, "What colour is it?")
    assert made.text == "Image1:<image>\nImage2:<image>\nImage3:<image>\nIn Image2, what colour is it?"
    assert (made.target, len(made.images)) == (1, 3)
    assert multi_image.sequence([RED, GREEN], 0, "TV or not?").text.endswith("In Image1, TV or not?")


@pytest.mark.parametrize("count", range(2, 10))
def test_cells_of_a_collage_hold_their_pictures(count: int) -> None:
    images = [_plain((20 * i, 0, 255 - 20 * i)) for i in range(count)]
    for target in range(count):
        made = multi_image.collage(images, target, "What colour?")
        assert _colour_of(made.images[0], made.box) == [20 * target, 0, 255 - 20 * target]
        assert f"In part {target + 1}, what colour?" in made.text


def test_a_picture_in_the_middle_of_another() -> None:
    made = multi_image.pic_in_pic(RED, _plain((0, 0, 255), (100, 200)), "What colour?")
    image = made.images[0]
    assert image.shape == (3, 100, 200)
    assert _colour_of(image, made.box) == [255, 0, 0]
    assert image[:, 2, 2].tolist() == [0, 0, 255]
    left, top, right, bottom = made.box
    assert (right - left <= 0.7, bottom - top <= 0.7) == (True, True)
    assert (left + right, top + bottom) == pytest.approx((1, 1), abs=0.03)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"answer": " a DOG "}, "right"),
        ({"truth": "x" * 512}, "a long answer"),
        ({"perplexity": 1.05}, "said by heart"),
        ({"share": 0.9}, "looked at the right picture"),
        ({"answer": "a cat, and much more than that", "length_ratio": 2.0}, "of another length"),
    ],
)
def test_which_answers_are_rejected_ones(changes: dict[str, object], reason: str) -> None:
    given = {"answer": "a cat", "truth": "a dog", "share": 0.3, "perplexity": 2.0, "form": "sequence", "count": 3}
    assert multi_image.accepted(**{**given, **changes}) == reason  # type: ignore[arg-type]


def test_limits_are_of_the_nearest_number() -> None:
    assert multi_image.limit("sequence", 3) == 0.7
    assert multi_image.limit("collage", 8) == 0.3
    assert multi_image.limit("collage", 5) == 0.5
