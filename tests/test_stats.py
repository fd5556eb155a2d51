"""Intervals and tests of mmalign.stats: identities, limits, and coverage of known truths."""

import ast
import inspect
import math
import sys
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest

from mmalign import stats
from mmalign.stats import mean_ci, permutation_test, sign_test, win_rate


def test_imports_numpy_and_the_standard_library_alone():
    tree = ast.parse(inspect.getsource(stats))
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    assert outside == {"numpy"}


# --- mean_ci ---------------------------------------------------------------------------------------------------------


def test_mean_is_the_plain_mean_and_lies_inside():
    x = np.random.default_rng(0).normal(size=200)
    mean, low, high = mean_ci(x)
    assert mean == pytest.approx(x.mean(), abs=1e-15)
    assert low < mean < high
    # 200 independent values: the interval must agree with the textbook one to some per cent of its width
    half = 1.972 * x.std(ddof=1) / math.sqrt(200)
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)


def test_shift_and_scale_carry_over():
    x = np.random.default_rng(1).exponential(size=60)
    labels = np.repeat(np.arange(20), 3)
    first = np.array(mean_ci(x, labels, seed=5))
    second = np.array(mean_ci(3 * x + 2, labels, seed=5))
    np.testing.assert_allclose(second, 3 * first + 2, rtol=1e-12)


def test_same_seed_same_interval_other_seed_other_interval():
    x = np.random.default_rng(2).normal(size=30)
    assert mean_ci(x, seed=1) == mean_ci(x, seed=1)
    assert mean_ci(x, seed=1) != mean_ci(x, seed=2)


def test_cluster_labels_may_be_anything_hashable():
    x = [1.0, 2.0, 3.0, 4.0, 7.0, 9.0]
    by_text = mean_ci(x, ["a", "a", "b", "b", "c", "c"])
    assert by_text == mean_ci(x, [9, 9, None, None, ("c",), ("c",)])


def test_repeating_every_value_inside_its_cluster_adds_no_information():
    x = np.random.default_rng(3).normal(size=25)
    once = mean_ci(x, np.arange(25), seed=4)
    often = mean_ci(np.repeat(x, 8), np.repeat(np.arange(25), 8), seed=4)
    np.testing.assert_allclose(often, once, rtol=1e-12)
    ignoring = mean_ci(np.repeat(x, 8), seed=4)
    assert ignoring.high - ignoring.low < 0.5 * (once.high - once.low)


@pytest.mark.parametrize("groups, each", [(10, 3), (10, 1), (40, 4)])
def test_coverage_of_the_cluster_bootstrap(groups, each):
    rng = np.random.default_rng(11)
    labels = np.repeat(np.arange(groups), each)
    runs, hit, naive = 600, 0, 0
    for run in range(runs):
        x = rng.normal(size=groups)[labels] + 0.5 * rng.normal(size=len(labels))
        _, low, high = mean_ci(x, labels, seed=run, samples=400)
        hit += low <= 0 <= high
        _, low, high = mean_ci(x, None, seed=run, samples=400)
        naive += low <= 0 <= high
    assert 0.92 <= hit / runs <= 0.975  # 0.95, with 3.4 standard errors of the simulation below
    if each > 1:
        assert naive / runs < 0.85  # what ignoring the prompts would have claimed to be 95 %


def test_one_cluster_has_a_mean_and_no_interval():
    mean, low, high = mean_ci([2.5])
    assert mean == 2.5 and math.isnan(low) and math.isnan(high)
    mean, low, high = mean_ci([1.0, 3.0], ["same", "same"])
    assert mean == 2.0 and math.isnan(low) and math.isnan(high)


def test_constant_values_have_a_point_interval():
    assert mean_ci([0.25] * 12) == (0.25, 0.25, 0.25)


def test_chunks_do_not_change_the_result(monkeypatch):
    x = np.random.default_rng(5).normal(size=64)
    whole = mean_ci(x, seed=3), permutation_test(x, x - 0.1, seed=3)
    monkeypatch.setattr(stats, "_CHUNK", 64 * 8)
    assert (mean_ci(x, seed=3), permutation_test(x, x - 0.1, seed=3)) == whole


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: mean_ci([1.0, math.nan, math.inf]), r"2 NaN or infinite values of 3, the first at position 1"),
        (lambda: mean_ci([]), "nothing to average"),
        (lambda: mean_ci([1.0, 2.0], ["a"]), "1 labels for 2 values"),
        (lambda: mean_ci([1.0, 2.0], level=95), "between 0 and 1"),
        (lambda: mean_ci([1.0, 2.0], samples=10), "at least 100"),
        (lambda: mean_ci([[1.0], [2.0]]), "one-dimensional"),
        (lambda: win_rate([1.0], [1.0, 2.0]), "same items"),
        (lambda: win_rate([1.0], [math.nan]), "b holds 1 NaN"),
        (lambda: win_rate([1.0], [2.0], ties="keep"), "'half' or 'drop'"),
        (lambda: sign_test(-1, 2), "cannot be negative"),
        (lambda: permutation_test([1.0], [2.0], samples=0), "at least 1"),
        (lambda: permutation_test([], []), "empty"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- win_rate --------------------------------------------------------------------------------------------------------


def test_counts_and_ties():
    a, b = [1, 2, 3, 4, 5], [0, 2, 4, 4, 1]
    half = win_rate(a, b)
    assert (half.wins, half.ties, half.losses, half.n) == (2, 2, 1, 5)
    assert half.rate == pytest.approx(3 / 5)
    dropped = win_rate(a, b, ties="drop")
    assert (dropped.wins, dropped.ties, dropped.losses, dropped.n) == (2, 2, 1, 5)
    assert dropped.rate == pytest.approx(2 / 3)


@pytest.mark.parametrize("ties", ["half", "drop"])
def test_exchanging_the_sides_mirrors_the_interval(ties):
    rng = np.random.default_rng(6)
    a, b = rng.integers(0, 4, size=90), rng.integers(0, 4, size=90)
    labels = rng.integers(0, 30, size=90)
    ab, ba = win_rate(a, b, labels, ties=ties), win_rate(b, a, labels, ties=ties)
    assert ab.rate + ba.rate == pytest.approx(1)
    assert ab.low + ba.high == pytest.approx(1) and ab.high + ba.low == pytest.approx(1)
    assert (ab.wins, ab.losses) == (ba.losses, ba.wins)


def test_matches_agresti_coull_for_independent_decided_pairs():
    # 17 wins of 20: the published formula, p~ +- z sqrt(p~ (1 - p~) / n~) with n~ = n + z^2
    z = 1.959963984540054
    n = 20 + z * z
    p = (17 + z * z / 2) / n
    half = z * math.sqrt(p * (1 - p) / n)
    got = win_rate([1] * 17 + [0] * 3, [0] * 17 + [1] * 3)
    assert got.low == pytest.approx(p - half, rel=1e-12)
    assert got.high == pytest.approx(min(1, p + half), rel=1e-12)


@pytest.mark.parametrize("n", [1, 2, 10, 256])
def test_limits_stay_honest(n):
    wins = win_rate(np.ones(n), np.zeros(n))
    assert wins.rate == 1 and wins.high == 1 and 0 < wins.low < 1
    ties = win_rate(np.ones(n), np.ones(n))
    assert ties.rate == 0.5 and ties.low < 0.5 < ties.high and ties.ties == n
    undecided = win_rate(np.ones(n), np.ones(n), ties="drop")
    assert math.isnan(undecided.rate) and (undecided.low, undecided.high) == (0, 1)


def test_all_wins_in_ten_prompts_count_as_ten_not_eighty():
    labels = np.repeat(np.arange(10), 8)
    clustered = win_rate(np.ones(80), np.zeros(80), labels)
    assert clustered.low == pytest.approx(win_rate(np.ones(10), np.zeros(10)).low)
    assert clustered.low < win_rate(np.ones(80), np.zeros(80)).low


@pytest.mark.parametrize(
    "groups, each, chance, alike, tied",
    [(256, 1, 0.65, 0.0, 0.1), (30, 1, 0.8, 0.0, 0.3), (12, 4, 0.7, 1.0, 0.0), (40, 4, 0.6, 0.8, 0.2)],
)
def test_coverage_of_the_win_rate_interval(groups, each, chance, alike, tied):
    rng = np.random.default_rng(12)
    labels = np.repeat(np.arange(groups), each)
    truth, runs, hit = tied / 2 + (1 - tied) * chance, 1000, 0
    for _ in range(runs):
        shared = rng.random(groups)[labels]
        u = np.where(rng.random(len(labels)) < alike, shared, rng.random(len(labels)))
        sign = np.where(u < tied, 0, np.where(u < tied + (1 - tied) * chance, 1, -1))
        got = win_rate(sign, np.zeros_like(sign), labels)
        assert got.low <= got.rate <= got.high
        hit += got.low <= truth <= got.high
    assert 0.925 <= hit / runs <= 0.98


# --- sign_test -------------------------------------------------------------------------------------------------------


def exact_sign_test(wins: int, losses: int) -> Fraction:
    n, k = wins + losses, min(wins, losses)
    return min(Fraction(1), 2 * sum(Fraction(math.comb(n, i), 2**n) for i in range(k + 1)))


@pytest.mark.parametrize("wins, losses", [(0, 0), (1, 0), (5, 0), (7, 7), (8, 7), (3, 12), (180, 76), (900, 1100)])
def test_sign_test_is_exact(wins, losses):
    assert sign_test(wins, losses) == pytest.approx(float(exact_sign_test(wins, losses)), rel=1e-10)
    assert sign_test(wins, losses) == sign_test(losses, wins)


def test_sign_test_against_scipy():
    for wins in range(0, 41):
        assert sign_test(wins, 40 - wins) == pytest.approx(binomtest(wins, 40).pvalue, rel=1e-9)


def test_sign_test_of_a_million_pairs_neither_overflows_nor_underflows_to_a_negative():
    assert sign_test(500_000, 500_000) == 1.0
    assert 0 <= sign_test(0, 1_000_000) < 1e-300
    assert sign_test(501_000, 499_000) == pytest.approx(0.0456, abs=2e-4)  # z = 2


# --- permutation_test ------------------------------------------------------------------------------------------------


def test_permutation_test_agrees_with_full_enumeration():
    rng = np.random.default_rng(7)
    a, b = rng.normal(0.6, 1, size=24), rng.normal(size=24)
    labels = np.repeat(np.arange(12), 2)
    sums = np.bincount(labels, weights=a - b)
    exact = np.mean([abs(np.dot(s, sums)) >= abs(sums.sum()) - 1e-9 for s in product([1, -1], repeat=12)])
    got = permutation_test(a, b, labels, samples=40_000)
    assert got == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 40_000))


def test_permutation_test_never_says_zero_and_is_one_without_a_difference():
    x = np.random.default_rng(8).normal(size=50)
    assert permutation_test(x + 5, x, samples=999) == 1 / 1000
    assert permutation_test(x, x) == 1.0
    assert permutation_test([3.0], [1.0]) == 1.0  # one pair cannot tell


def test_permutation_test_is_symmetric_and_seeded():
    rng = np.random.default_rng(9)
    a, b = rng.normal(size=40), rng.normal(size=40)
    assert permutation_test(a, b, seed=1) == permutation_test(b, a, seed=1)
    assert permutation_test(a, b, seed=1) == permutation_test(a, b, seed=1)


def test_permutation_test_keeps_its_level_under_clustering():
    rng = np.random.default_rng(10)
    labels = np.repeat(np.arange(20), 5)
    runs, clustered, naive = 400, 0, 0
    for run in range(runs):
        difference = rng.normal(size=20)[labels] + 0.3 * rng.normal(size=100)
        zero = np.zeros(100)
        clustered += permutation_test(difference, zero, labels, seed=run, samples=300) <= 0.05
        naive += permutation_test(difference, zero, seed=run, samples=300) <= 0.05
    assert clustered / runs <= 0.085  # 0.05 and 3.2 standard errors
    assert naive / runs > 0.2  # pairs of one prompt taken as independent
