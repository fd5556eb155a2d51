"""From rows to pairs, lists and singles: ties, votes, weighted dimensions, thresholds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mmalign import judgements
from mmalign.jobs_inputs import Data
from mmalign.records import MediaRef
from mmalign.tables import PreferenceRow
from mmalign.tasks.sources import digest

A, B, C, D = (MediaRef(f"/{name}") for name in "abcd")


def _data(**settings: Any) -> Data:
    return Data(table="unused", **settings)


def _pairs(rows: list[PreferenceRow], **settings: Any) -> list[judgements.Group]:
    data = _data(**settings)
    return judgements.pairs(judgements.judged(rows, data), data)


def _label(verdict: str, user: str = "u", media: tuple[MediaRef, ...] = (A, B), **more: Any) -> PreferenceRow:
    return PreferenceRow("p", media, label={"overall": verdict}, user_id=user, **more)


def test_votes_become_a_share() -> None:
    """Three for A, one for B, one tie of half a vote: 3.5 of 5. Rows may list the pictures in either order."""
    rows = [_label("A"), _label("A"), _label("same"), _label("B"), _label("B", media=(B, A))]
    (soft,) = _pairs(rows, votes="share", soft_labels=True)
    assert soft.media == (A, B) and soft.values == pytest.approx((0.7, 0.3))
    assert soft.gap == pytest.approx(0.4)
    (hard,) = _pairs(rows, votes="share")
    assert hard.values == (1.0, 0.0) and hard.gap == pytest.approx(0.4), "the votes say how far, hard labels or not"
    assert len(_pairs(rows)) == 4, "separate: each vote is a pair, the tie dropped"


def test_votes_count_by_their_rows_weight() -> None:
    rows = [_label("A", weight=3.0), _label("B", weight=1.0)]
    (pair,) = _pairs(rows, votes="share", soft_labels=True)
    assert pair.values[0] == pytest.approx(0.75)
    assert pair.weight == 2.0


def test_ratings_of_several_people_become_their_mean() -> None:
    """By weight, whatever order a row lists the pictures in; who gave none has no say in it."""
    rows = [
        PreferenceRow("p", (A, B), scores={"q": (5.0, 1.0)}, user_id="u"),
        PreferenceRow("p", (B, A), scores={"q": (4.0, 2.0)}, user_id="v", weight=3.0),
        PreferenceRow("p", (A, B), label={"q": "A"}, user_id="w"),
    ]
    (pair,) = _pairs(rows, votes="share", soft_labels=True)
    assert pair.media == (B, A) and pair.values == pytest.approx((0.6, 0.4))
    assert pair.scores == pytest.approx(((1 + 3 * 4) / 4, (5 + 3 * 2) / 4))
    assert _pairs(rows[::-1], votes="share", soft_labels=True)[0].scores == pair.scores
    (bare,) = _pairs(rows[2:], votes="share")
    assert bare.scores is None


def test_ratings_by_axis_become_means_too() -> None:
    rows = [
        PreferenceRow("p", (A, B), scores={"x": (1.0, 3.0), "y": (2.0, 2.5)}),
        PreferenceRow("p", (B, A), scores={"x": (1.0, 2.0)}),
    ]
    data = _data(votes="share", axes=("x", "y"), ties="soft")
    (one,) = judgements.lists(judgements.judged(rows, data), data)
    assert one.axis_scores == ((1.5, 2.0), (2.0, 2.5))
    assert judgements.lists(judgements.judged(rows[::-1], data), data)[0].axis_scores == ((2.0, 1.5), (2.5, 2.0))


def test_an_even_vote_is_a_tie() -> None:
    rows = [_label("A"), _label("B")]
    assert _pairs(rows, votes="share") == []
    (soft,) = _pairs(rows, votes="share", ties="soft")
    assert soft.values == (0.5, 0.5)
    halves = _pairs(rows, votes="share", ties="half")
    assert [pair.media for pair in halves] == [(A, B), (B, A)] and [pair.gap for pair in halves] == [0.0, 0.0]


@pytest.mark.parametrize("voters", range(2, 42, 2))
def test_an_even_vote_is_a_tie_whatever_the_sum_rounds_to(voters: int) -> None:
    rows = [_label("A" if i % 2 else "B", weight=0.1) for i in range(voters)]
    assert _pairs(rows, votes="share") == []
    data = _data(votes="share")
    assert judgements.singles(judgements.judged(rows, data), data) == []


def test_dimensions_that_cancel_are_a_tie() -> None:
    row = PreferenceRow("p", (A, B), label={"VQ": "A", "MQ": "A", "TA": "B"})
    assert _pairs([row], dimensions={"VQ": 0.1, "MQ": 0.2, "TA": 0.3}) == []


def test_weighted_dimensions_decide_together() -> None:
    """VQ for A at weight 1, MQ a tie at 1, TA for B at 2: (1 + 0.5 + 0) / 4 for A, so B wins with 0.625."""
    row = PreferenceRow("p", (A, B), label={"VQ": "A", "MQ": "same", "TA": "B"})
    (pair,) = _pairs([row], dimensions={"VQ": 1.0, "MQ": 1.0, "TA": 2.0}, soft_labels=True)
    assert pair.media == (B, A) and pair.values[0] == pytest.approx(1 - 1.5 / 4)
    assert _pairs([row], dimensions={"VQ": 1.0, "TA": 1.0}) == [], "one each is a tie"
    (only,) = _pairs([row], dimensions={"VQ": 1.0, "TA": 0.0})
    assert only.media == (A, B)


def test_dimensions_that_a_row_lacks_do_not_count() -> None:
    row = PreferenceRow("p", (A, B), label={"VQ": "A"})
    (pair,) = _pairs([row], dimensions={"VQ": 1.0, "MQ": 5.0}, soft_labels=True)
    assert pair.values == (1.0, 0.0)
    with pytest.raises(ValueError, match=r"none of data\.dimensions"):
        _pairs([row], dimensions={"MQ": 1.0})


def test_several_dimensions_want_a_choice() -> None:
    row = PreferenceRow("p", (A, B), label={"VQ": "A", "MQ": "B"}, origin="t line 1")
    with pytest.raises(ValueError, match="t line 1 judges VQ, MQ; choose one as the dimension"):
        _pairs([row])


def test_scores_of_several_dimensions_are_normalised_over_the_table() -> None:
    rows = [
        PreferenceRow("p", (A, B), scores={"x": (0.0, 10.0), "y": (5.0, 1.0)}),
        PreferenceRow("q", (C, D), scores={"x": (4.0, 6.0), "y": (3.0, 2.0)}),
    ]
    found = judgements.judged(rows, _data(dimensions={"x": 1.0, "y": 3.0}))
    assert found[0].scores == pytest.approx((0.75, 0.25))
    assert found[1].scores == pytest.approx(((0.4 + 3 * 0.5) / 4, (0.6 + 3 * 0.25) / 4))


def test_gaps_are_differences_of_normalised_scores() -> None:
    rows = [
        PreferenceRow("p", (A, B), scores={"x": (20.0, 21.0)}), PreferenceRow("q", (C, D), scores={"x": (25.0, 20.0)})
    ]  # fmt: skip
    one, two = _pairs(rows)
    assert (one.media, two.media) == ((B, A), (C, D))
    assert (one.gap, two.gap) == pytest.approx((0.2, 1.0))
    assert one.scores == (21.0, 20.0), "scores stay as the reward gave them"
    raw = _pairs(rows, normalise="none")
    assert raw[0].gap == pytest.approx(1.0)


def test_gaps_of_equal_scores_are_nothing() -> None:
    rows = [PreferenceRow("p", (A, B), scores={"x": (2.0, 2.0)})]
    (pair,) = _pairs(rows, ties="soft")
    assert pair.gap == 0 and pair.values == (0.5, 0.5)


def test_pairing_across_prompts_is_by_scores() -> None:
    rows = [
        PreferenceRow("p", (A, B), scores={"x": (0.2, 0.9)}), PreferenceRow("q", (C, D), scores={"x": (0.6, 0.9)})
    ]  # fmt: skip
    (pair,) = _pairs(rows, pairing="across")
    assert (pair.prompts, pair.media) == (("q", "p"), (C, A)), "B and D are tied"
    assert len(_pairs(rows, pairing="across", ties="soft")) == 2
    again = [PreferenceRow(prompt, (A, B), scores={"x": (n, n + 1)}) for n, prompt in enumerate("pppqq")]
    found = _pairs(again, pairing="across")
    assert [pair.prompts for pair in found] == [("q", "p")] * 6, "each of three rows meets the first of the next prompt"
    assert {pair.scores[0] for pair in found if pair.scores} == {3.0, 4.0}
    with pytest.raises(ValueError, match="compares scores"):
        _pairs([_label("A")], pairing="across")


def test_lists_have_shares_of_wins_or_phi_itself() -> None:
    data = _data(dimension="x")
    row = PreferenceRow("p", (A, B, C), scores={"x": (3.0, 9.0, 3.0)})
    (found,) = judgements.lists(judgements.judged([row], data), data)
    assert found.values == pytest.approx((0.25, 1.0, 0.25))
    assert sum(found.values) == pytest.approx(3 / 2), "phi sums to k / 2"
    data = _data(dimension="phi")
    row = PreferenceRow("p", (A, B, C), scores={"phi": (0.1, 0.7, 0.2)})
    (found,) = judgements.lists(judgements.judged([row], data), data)
    assert found.values == (0.1, 0.7, 0.2)


def test_what_is_trained_on_has_a_digest_that_a_moved_folder_keeps() -> None:
    def of(home: str, first: str = "base/0.png", second: str = "tuned/0.png", label: str = "A") -> str:
        row = PreferenceRow("p", (MediaRef(f"{home}/{first}"), MediaRef(f"{home}/{second}")), label={"overall": label})
        return digest(_pairs([row]))

    assert of("/a/b") == of("/c")
    others = [of("/a/b", label="B"), of("/a/b", second="tuned/1.png"), of("/a/b", "tuned/0.png", "base/0.png")]
    assert len({of("/a/b"), *others}) == 3  # turned round twice, it says the same
    assert others[0] == others[2]


def test_phi_is_a_share() -> None:
    data = _data(dimension="phi")
    found = judgements.judged([PreferenceRow("p", (A, B), scores={"phi": (7.0, 3.0)}, origin="t line 1")], data)
    with pytest.raises(ValueError, match=r"t line 1: phi is a share of comparisons won.* here it is 7; call"):
        judgements.lists(found, data)


def test_ranks_are_lower_better() -> None:
    data = _data()
    row = PreferenceRow("p", (A, B, C), rank=(2, 1, 3))
    (found,) = judgements.lists(judgements.judged([row], data), data)
    assert found.values == (0.5, 1.0, 0.0)
    assert found.scores is None and found.rewards == found.values


def test_singles_are_better_than_the_rest_of_their_row() -> None:
    data = _data()
    row = PreferenceRow("p", (A, B, C, D), rank=(1, 2, 2, 3))
    found = judgements.singles(judgements.judged([row], data), data)
    assert [(one.media, one.values) for one in found] == [((A,), (1.0,)), ((D,), (0.0,))], "the middle is neither"
    data = _data(desirable_from=0.5)
    row = PreferenceRow("p", (A, B), scores={"x": (0.9, 0.5)})
    found = judgements.singles(judgements.judged([row], data), data)
    assert [one.values for one in found] == [(1.0,), (1.0,)]
    with pytest.raises(ValueError, match="needs scores"):
        judgements.singles(judgements.judged([_label("A")], data), data)


@pytest.mark.parametrize("seed", range(5))
def test_wins_are_antisymmetric_whatever_is_judged(seed: int) -> None:
    rng = np.random.default_rng(seed)
    row = PreferenceRow("p", (A, B, C, D), scores={n: tuple(rng.integers(0, 4, 4).astype(float)) for n in "xyz"})
    wins = judgements.wins_of(row, {"x": 1.0, "y": 0.5, "z": 2.0})
    np.testing.assert_allclose(wins + wins.T, 1)
    np.testing.assert_allclose(np.diag(wins), 0.5)
    assert wins.min() >= 0 and wins.max() <= 1
