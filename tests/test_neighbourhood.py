"""Robust choice among many: the directions, the rules against loops, limits, and what it is worth under noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from mmalign.guidance import neighbourhood
from mmalign.stats import mean_ci

RULES: tuple[neighbourhood.Rule, ...] = ("reciprocal_rank", "wins", "worst_regret", "regret")


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------------------ directions


@pytest.mark.parametrize(("dimensions", "angle"), [(2, 25.0), (3, 40.0), (5, 60.0), (8, 10.0)])
def test_a_cap_is_uniform(dimensions: int, angle: float) -> None:
    """The angles against the distribution function, integrated by another library; the rest against symmetry."""
    wished = -1.0 - 0.3 * np.arange(dimensions)  # all negative, so that no draw is refused
    centre = wished / np.linalg.norm(wished)
    drawn = neighbourhood.cap(wished, 4000, angle, _rng(1, dimensions))
    assert np.allclose(np.linalg.norm(drawn, axis=1), 1)
    cosines = np.clip(drawn @ centre, -1, 1)
    found = np.degrees(np.arccos(cosines))
    assert found.max() <= angle + 1e-6
    whole = integrate.quad(lambda x: math.sin(x) ** (dimensions - 2), 0, math.radians(angle))[0]

    def distribution(degrees: np.ndarray) -> np.ndarray:
        parts = [integrate.quad(lambda x: math.sin(x) ** (dimensions - 2), 0, math.radians(d))[0] for d in degrees]
        return np.array(parts) / whole

    assert stats.kstest(found, distribution).pvalue > 0.01
    # Around the centre nothing is preferred: the mean of the part across it is 0 within five standard errors.
    across = drawn - cosines[:, None] * centre
    assert (np.abs(across.mean(0)) < 5 * across.std(0) / math.sqrt(len(across)) + 1e-12).all()


def test_no_axis_is_turned_round() -> None:
    drawn = neighbourhood.cap([3.0, 0.2, 0.0, -0.1], 500, 50.0, _rng(2))
    assert drawn.shape == (500, 4) and (drawn[:, :3] >= 0).all()
    assert (drawn[:, 3] > 0).any(), "an axis of which less is wished may turn"
    assert (drawn[:, 2] > 0.1).any(), "an axis of no weight gets some"


def test_dirichlet_has_the_wished_mean_and_the_variance_of_the_formula() -> None:
    wished, concentration = np.array([2.0, 1.0, 0.0, 1.0]), 20.0
    drawn = neighbourhood.dirichlet(wished, 20_000, concentration, _rng(3))
    share = wished / wished.sum()
    assert np.allclose(drawn.sum(1), 1) and not drawn[:, 2].any()
    assert np.abs(drawn.mean(0) - share).max() < 5 * drawn.std(0).max() / math.sqrt(len(drawn))
    assert np.allclose(drawn.var(0), share * (1 - share) / (concentration + 1), rtol=0.05)


def test_directions_are_a_function_of_the_seed() -> None:
    for draw in (lambda rng: neighbourhood.cap([1, 2, 3], 9, 20, rng),
                 lambda rng: neighbourhood.dirichlet([1, 2, 3], 9, 20, rng)):  # fmt: skip
        assert np.array_equal(draw(_rng(4)), draw(_rng(4)))
        assert not np.array_equal(draw(_rng(4)), draw(_rng(5)))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: neighbourhood.cap([1.0], 3, 10, _rng(0)), "two axes or more"),
        (lambda: neighbourhood.cap([0.0, 0.0], 3, 10, _rng(0)), "one that is not 0"),
        (lambda: neighbourhood.cap([1.0, math.nan], 3, 10, _rng(0)), "finite weights"),
        (lambda: neighbourhood.cap([1.0, 1.0], 3, 91, _rng(0)), "from 0 to 90 degrees"),
        (lambda: neighbourhood.cap([1.0, 1.0], 0, 9, _rng(0)), "a count from 1"),
        (lambda: neighbourhood.dirichlet([1.0, -1.0], 3, 9, _rng(0)), "use an angle for negative weights"),
        (lambda: neighbourhood.dirichlet([1.0, 1.0], 3, 0, _rng(0)), "concentration and count above 0"),
        (lambda: neighbourhood.consensus([[1.0, math.inf]], [[1, 1]], "wins"), "leave out candidates"),
        (lambda: neighbourhood.consensus([[1.0, 2.0]], [[1, 1, 1]], "wins"), "give \\[m, d\\]"),
    ],
)
def test_bad_input_is_named(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


# ------------------------------------------------------------------------------------------------ rules


def _by_hand(scores: np.ndarray, directions: np.ndarray, rule: str) -> list[float]:
    """The definitions, one direction and candidate at a time."""
    found = []
    for i in range(len(scores)):
        values = []
        for weights in directions:
            utilities = [math.fsum(w * s for w, s in zip(weights, row, strict=True)) for row in scores]
            mine, top = utilities[i], max(utilities)
            if rule == "reciprocal_rank":
                values.append(1 / (1 + sum(other > mine for other in utilities)))
            elif rule == "wins":
                values.append((mine == top) / utilities.count(top))
            else:
                values.append(mine - top)
        found.append(min(values) if rule == "worst_regret" else math.fsum(values) / len(values))
    return found


@pytest.mark.parametrize("rule", RULES)
def test_rules_are_their_definitions(rule: neighbourhood.Rule) -> None:
    rng = _rng(5)
    # Quarters times quarters add up exactly, so that ties are ties in both computations.
    scores = rng.integers(-4, 5, (9, 3)) / 4
    directions = rng.integers(0, 5, (40, 3)) / 4
    assert np.allclose(
        neighbourhood.consensus(scores, directions, rule), _by_hand(scores, directions, rule), atol=1e-14
    )


@pytest.mark.parametrize("rule", RULES)
def test_the_choice_is_the_best_of_all_by_brute_force(rule: neighbourhood.Rule) -> None:
    rng = _rng(6)
    for _ in range(30):
        scores = rng.standard_normal((8, 3))
        wished = rng.random(3)
        directions = neighbourhood.cap(wished, 60, 25, rng)
        agreed = _by_hand(scores, directions, rule)
        best = max(range(8), key=lambda i: (round(agreed[i], 12), scores[i] @ wished))
        assert neighbourhood.choose(scores, wished, directions, rule) == best


@pytest.mark.parametrize("rule", RULES)
def test_without_a_radius_it_is_plain_best_of_n(rule: neighbourhood.Rule) -> None:
    rng = _rng(7)
    for _ in range(50):
        scores, wished = rng.standard_normal((12, 4)), rng.random(4)
        directions = neighbourhood.cap(wished, 17, 0.0, rng)
        assert neighbourhood.choose(scores, wished, directions, rule) == np.argmax(scores @ wished)


@pytest.mark.parametrize(("rule", "scale"), itertools.product(RULES, ["none", "deviation", "rank"]))
def test_what_is_beaten_everywhere_is_never_chosen(rule: neighbourhood.Rule, scale: neighbourhood.Scale) -> None:
    rng = _rng(8)
    for _ in range(50):
        scores, wished = rng.standard_normal((10, 3)), rng.random(3)
        directions = neighbourhood.cap(wished, 30, 45, rng)
        chosen = neighbourhood.choose(neighbourhood.scaled(scores, scale), wished, directions, rule)
        assert not any((other > scores[chosen]).all() for other in scores)


@pytest.mark.parametrize("rule", RULES)
def test_order_and_size_of_weights_do_not_matter(rule: neighbourhood.Rule) -> None:
    rng = _rng(9)
    scores, wished = rng.standard_normal((10, 3)), rng.random(3)
    directions = neighbourhood.cap(wished, 50, 30, rng)
    chosen = neighbourhood.choose(scores, wished, directions, rule)
    order = rng.permutation(10)
    assert order[neighbourhood.choose(scores[order], wished, directions, rule)] == chosen
    assert neighbourhood.choose(scores, 7 * wished, directions[rng.permutation(50)], rule) == chosen
    axes = rng.permutation(3)
    assert neighbourhood.choose(scores[:, axes], wished[axes], directions[:, axes], rule) == chosen


def test_expected_regret_is_the_plain_choice_by_the_mean_direction() -> None:
    """Utility is linear in the weights: averaging it over directions averages the directions."""
    rng = _rng(10)
    for _ in range(50):
        scores, wished = rng.standard_normal((12, 4)), rng.random(4) + 0.1
        directions = neighbourhood.dirichlet(wished, 200, 10, rng)
        chosen = neighbourhood.choose(scores, wished, directions, "regret")
        assert chosen == np.argmax(scores @ directions.mean(0))


def test_equals_go_by_the_wished_weights_and_then_by_place() -> None:
    corners = [[1.0, 0.0], [0.0, 1.0]]  # each is the best under one and the last under the other
    assert neighbourhood.choose([[1.0, 0.0], [0.0, 1.0]], [1.0, 1.1], corners, "reciprocal_rank") == 1
    assert neighbourhood.choose([[1.0, 0.0], [0.0, 1.0]], [1.1, 1.0], corners, "reciprocal_rank") == 0
    assert neighbourhood.choose([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [1.0, 1.0], corners, "reciprocal_rank") == 1


def test_scales() -> None:
    scores = np.array([[1.0, 10.0, 5.0], [2.0, 10.0, 5.0], [4.0, 40.0, 5.0], [4.0, 20.0, 5.0]])
    ranks = neighbourhood.scaled(scores, "rank")
    assert np.allclose(ranks, [[0, 1 / 6, 0], [1 / 3, 1 / 6, 0], [5 / 6, 1, 0], [5 / 6, 2 / 3, 0]])
    deviations = neighbourhood.scaled(scores, "deviation")
    assert np.allclose(deviations[:, :2].mean(0), 0) and np.allclose(deviations[:, :2].std(0), 1)
    assert not deviations[:, 2].any()
    assert np.array_equal(neighbourhood.scaled(scores, "none"), scores)
    assert np.allclose(neighbourhood.scaled(scores * [1000, 0.1, 3] + 7, "deviation"), deviations), "units cancel"
    assert np.array_equal(neighbourhood.scaled([[3.0, 4.0]], "rank"), [[0.0, 0.0]])


# ------------------------------------------------------------------------------------------------ worth


def _study(rule: neighbourhood.Rule, trials: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Regret of the plain choice and of the rule's, under 64 weights that the user might have meant: [trials, 64]."""
    plain, robust = [], []
    for trial in range(trials):
        rng = _rng(11, trial)
        scores = rng.standard_normal((16, 4))
        wished = rng.dirichlet(np.ones(4))
        chosen = neighbourhood.choose(scores, wished, neighbourhood.cap(wished, 128, 30, rng), rule)
        meant = neighbourhood.cap(wished, 64, 30, rng)  # drawn anew: the rule has not seen these
        utility = scores @ meant.T
        regret = utility.max(0) - utility
        plain.append(regret[np.argmax(scores @ wished)])
        robust.append(regret[chosen])
    return np.array(plain), np.array(robust)


def test_minimax_regret_holds_off_the_worst_case() -> None:
    """If the user meant other weights than were said, the worst that can follow is smaller; an interval says so."""
    plain, robust = _study("worst_regret")
    gain = mean_ci(plain.max(1) - robust.max(1))
    print("worst regret, plain less robust:", gain, "plain", plain.max(1).mean())
    assert gain.low > 0.02
    # What it costs: on average it cannot be better than the plain choice by much (see the identity above).
    assert mean_ci(plain.mean(1) - robust.mean(1)).mean < 0.02


def test_wins_is_the_best_more_often() -> None:
    plain, robust = _study("wins")
    gain = mean_ci((robust == 0).mean(1) - (plain == 0).mean(1))
    print("share of meant weights under which the choice is the best:", gain)
    assert gain.low > 0


def test_ranks_hold_off_a_reward_that_is_wrong_once() -> None:
    """One score of one candidate is far too high, as a hacked reward gives it: true utility of what is chosen."""
    gains = []
    for trial in range(400):
        rng = _rng(12, trial)
        true = rng.standard_normal((16, 4))
        seen = true.copy()
        seen[rng.integers(16), rng.integers(4)] += 20
        wished = np.ones(4)
        directions = neighbourhood.cap(wished, 128, 30, rng)
        chosen = neighbourhood.choose(neighbourhood.scaled(seen, "rank"), wished, directions, "reciprocal_rank")
        gains.append((true[chosen] - true[np.argmax(seen @ wished)]) @ wished)
    gain = mean_ci(gains)
    print("true utility, robust less plain:", gain)
    assert gain.low > 1.0


def test_many_candidates_and_equal_rows_far_apart() -> None:
    """Equal candidates are level wherever they stand, and thousands of them need no cube of memory."""
    rng = _rng(13)
    scores, wished = rng.standard_normal((3000, 3)), np.ones(3)
    directions = neighbourhood.cap(wished, 500, 20, rng)
    scores[2999] = scores[neighbourhood.choose(scores, wished, directions, "reciprocal_rank")]
    agreed = neighbourhood.consensus(scores, directions, "reciprocal_rank")
    chosen = neighbourhood.choose(scores, wished, directions, "reciprocal_rank")
    assert agreed[chosen] == agreed[2999] == agreed.max() and chosen < 2999
    ranks = [1 + sum(math.fsum(w * s) > math.fsum(w * scores[chosen]) for s in scores) for w in directions[:5]]
    assert math.isclose(neighbourhood.consensus(scores, directions[:5], "reciprocal_rank")[chosen],
                        np.mean(1 / np.array(ranks)))  # fmt: skip
