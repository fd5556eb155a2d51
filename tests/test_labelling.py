"""Wins, phi, strength, disagreement and choice: against loops that follow the definitions, and by identities."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import kendalltau, rankdata

from mmalign import labelling

RNG = np.random.default_rng(7)
# Few distinct values, so that ties of every kind occur.
CASES = [RNG.integers(0, 4, (k, r)).astype(float) for k in (2, 3, 4, 7) for r in (1, 2, 3, 5) for _ in range(4)]
WEIGHTS = [RNG.uniform(0.1, 2, case.shape[1]) for case in CASES]
cases = pytest.mark.parametrize(("scores", "weights"), list(zip(CASES, WEIGHTS, strict=True)))


def slow_phi(scores: np.ndarray, weights: np.ndarray) -> list[float]:
    """The definition, one comparison at a time."""
    k, r = scores.shape
    phi = []
    for i in range(k):
        won = 0.0
        for j, n in itertools.product(range(k), range(r)):
            if i != j:
                won += weights[n] * (1.0 if scores[i, n] > scores[j, n] else 0.5 if scores[i, n] == scores[j, n] else 0)
        phi.append(won / (weights.sum() * (k - 1)))
    return phi


@cases
def test_phi_is_its_definition(scores: np.ndarray, weights: np.ndarray) -> None:
    assert labelling.phi(scores, weights) == pytest.approx(slow_phi(scores, weights), abs=1e-11)
    assert labelling.phi(scores) == pytest.approx(slow_phi(scores, np.ones(scores.shape[1])), abs=1e-11)


@cases
def test_phi_adds_up_to_half_the_list(scores: np.ndarray, weights: np.ndarray) -> None:
    phi = labelling.phi(scores, weights)
    assert phi.sum() == pytest.approx(len(scores) / 2) and (phi >= 0).all() and (phi <= 1).all()


@cases
def test_only_order_counts(scores: np.ndarray, weights: np.ndarray) -> None:
    """Any rising function of a reward changes nothing, nor does a common factor of the weights."""
    bent = scores.copy()
    bent[:, 0] = np.exp(3 * bent[:, 0]) - 100
    assert (labelling.phi(bent, weights) == labelling.phi(scores, weights)).all()
    assert (labelling.phi(1e-3 * scores, 8 * weights) == labelling.phi(scores, weights)).all()


@cases
def test_permutations_come_through(scores: np.ndarray, weights: np.ndarray) -> None:
    order = np.random.default_rng(1).permutation(len(scores))
    assert (labelling.phi(scores[order], weights) == labelling.phi(scores, weights)[order]).all()
    turned = np.random.default_rng(2).permutation(scores.shape[1])
    assert labelling.phi(scores[:, turned], weights[turned]) == pytest.approx(labelling.phi(scores, weights), abs=1e-11)


def test_one_reward_without_ties_gives_the_normalised_rank() -> None:
    scores = RNG.normal(size=(6, 1))
    assert labelling.phi(scores) == pytest.approx((rankdata(scores[:, 0]) - 1) / 5)


def test_turning_every_reward_round_turns_phi_round() -> None:
    for scores, weights in zip(CASES, WEIGHTS, strict=True):
        assert labelling.phi(-scores, weights) == pytest.approx(1 - labelling.phi(scores, weights))


def test_nothing_preferred_is_a_half() -> None:
    assert labelling.phi(np.full((4, 3), 7.0)).tolist() == [0.5] * 4


def test_equal_counts_are_ties_whatever_the_order_of_the_sum() -> None:
    """0.1 + 0.2 is not 0.3 in floats; pictures that won the same weight of comparisons have to be level."""
    scores = np.array([[2, 2, 1], [1, 1, 2], [0, 0, 0]])
    phi = labelling.phi(scores, [0.1, 0.2, 0.3])
    assert phi[0] == phi[1]


def test_a_weight_of_nothing_does_not_vote() -> None:
    scores = RNG.normal(size=(5, 3))
    assert (labelling.phi(scores, [1, 0, 2]) == labelling.phi(scores[:, [0, 2]], [1, 2])).all()


@pytest.mark.parametrize(
    ("scores", "weights", "said"),
    [
        (np.zeros((1, 2)), None, "one picture alone"),
        (np.zeros((3, 0)), None, "two pictures or more"),
        (np.array([[0.0], [math.nan]]), None, "NaN"),
        (np.zeros((3, 2)), [0, 0], "one of them above 0"),
        (np.zeros((3, 2)), [1, -1], "not negative"),
        (np.zeros((3, 2)), [1], "2 rewards and 1 weights"),
    ],
)
def test_what_cannot_be_ranked_is_refused(scores: np.ndarray, weights: list[float] | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        labelling.phi(scores, weights)


# ------------------------------------------------------------------------------------------------ votes


@cases
def test_signs_and_votes(scores: np.ndarray, weights: np.ndarray) -> None:
    signs = labelling.signs(scores)
    pairs = list(itertools.combinations(range(len(scores)), 2))
    assert [tuple(row) for row in signs] == [tuple(np.sign(scores[i] - scores[j])) for i, j in pairs]
    shares = labelling.vote(signs, weights)
    assert shares.sum(1) == pytest.approx(1)
    assert shares[:, 0] == pytest.approx([(weights * (scores[i] > scores[j])).sum() / weights.sum() for i, j in pairs])


@cases
def test_phi_is_the_mean_of_the_votes(scores: np.ndarray, weights: np.ndarray) -> None:
    """A picture's phi is the mean over its pairs of the share for it: so Borda and pairwise votes are one figure."""
    shares = labelling.vote(labelling.signs(scores), weights)
    total = np.zeros(len(scores))
    for (i, j), (a, same, b) in zip(itertools.combinations(range(len(scores)), 2), shares, strict=True):
        total[i] += a + same / 2
        total[j] += b + same / 2
    assert labelling.phi(scores, weights) == pytest.approx(total / (len(scores) - 1))


def test_strength() -> None:
    shares = np.array([[0.75, 0.25, 0.0], [0.75, 0.25, 0.0], [0.2, 0.0, 0.8], [0.0, 1.0, 0.0], [0.9, 0.1, 0]])
    found = labelling.strength(shares, [0.3, -0.3, -1, 0.5, 0])
    assert found == pytest.approx([0.875, 0.125, 0.8, 0.5, 0.5])


def test_disagreement_is_the_mean_difference_of_two_voters() -> None:
    shares = RNG.dirichlet([1, 1, 1], size=20)
    answers = np.array([1, 0.5, 0])
    expected = [(p[:, None] * p[None] * abs(answers[:, None] - answers[None])).sum() for p in shares]
    assert labelling.disagreement(shares) == pytest.approx(expected)
    assert labelling.disagreement(np.array([[0.5, 0, 0.5], [0, 1, 0], [1, 0, 0]])) == pytest.approx([0.5, 0, 0])


@cases
def test_tau_b_is_scipys(scores: np.ndarray, weights: np.ndarray) -> None:
    tau = labelling.tau_b(labelling.signs(scores))
    for a, b in itertools.product(range(scores.shape[1]), repeat=2):
        expected = kendalltau(scores[:, a], scores[:, b]).statistic
        assert tau[a, b] == pytest.approx(expected, nan_ok=True)


def test_list_agreement_leaves_out_what_does_not_vote_and_what_is_constant() -> None:
    scores = np.array([[1, 3, 1, 5], [2, 2, 2, 5], [3, 1, 3, 5.0]])
    tau = labelling.tau_b(labelling.signs(scores))
    assert labelling.list_agreement(tau) == pytest.approx((-1 + 1 - 1) / 3)
    assert labelling.list_agreement(tau, [1, 0, 1, 1]) == pytest.approx(1)
    assert math.isnan(labelling.list_agreement(tau, [1, 0, 0, 1]))
    assert math.isnan(labelling.list_agreement(tau, [1, 0, 0, 0]))


# ------------------------------------------------------------------------------------------------ choice

PHI = [0.2, 0.9, 0.5, 0.5, 0.4]


@pytest.mark.parametrize(
    ("select", "options", "pairs"),
    [
        ("best_worst", {}, [(0, 1)]),
        ("best_worst", {"min_margin": 0.8}, []),
        ("all", {}, list(itertools.combinations(range(5), 2))),
        ("all", {"ties": "drop"}, [pair for pair in itertools.combinations(range(5), 2) if pair != (2, 3)]),
        ("all", {"min_margin": 0.4}, [(0, 1), (1, 2), (1, 3), (1, 4)]),
        ("top_bottom", {}, [(0, 1)]),
        ("top_bottom", {"count": 2}, [(0, 1), (0, 2), (1, 4), (2, 4)]),
        ("top_bottom", {"count": 9}, [(0, 1), (0, 2), (1, 4), (2, 4)]),
        ("margin", {"count": 2}, [(0, 1), (1, 4)]),
        ("margin", {"min_margin": 0.5}, [(0, 1), (1, 4)]),
    ],
)
def test_choose(select: str, options: dict, pairs: list) -> None:
    assert labelling.choose(PHI, select, **options) == pairs


def test_a_level_list() -> None:
    """Nothing is best or worst; `all` keeps ties as ties, unless told otherwise."""
    level = [0.5] * 3
    assert labelling.choose(level, "best_worst") == labelling.choose(level, "top_bottom") == []
    assert labelling.choose(level, "all") == [(0, 1), (0, 2), (1, 2)]
    assert labelling.choose(level, "all", ties="drop") == []
    assert labelling.choose(level, "margin", min_margin=0.1) == []
