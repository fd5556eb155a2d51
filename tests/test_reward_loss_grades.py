"""Objectives on lists and ratings, each against its formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradient_kit import numeric_gradient
from reward_loss_kit import RNG, WEIGHT, B, K, function_of, scores, sigmoid, tensors

from mmalign.losses import graded, reward

HELD = np.array(
    [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1]], bool
)
GRADES = np.where(HELD, np.random.default_rng(3).integers(0, 5, (B, K)), -9).astype(float)
THRESHOLDS = np.array([-2.0, -0.5, 0.1, 1.4])


def listwise_closed(s: np.ndarray) -> float:
    total = 0.0
    for row, grade, held, weight in zip(s, GRADES, HELD, WEIGHT, strict=True):
        x, t = row[held], grade[held] / 0.7
        wanted = np.exp(t) / np.exp(t).sum()
        total += weight * -(wanted * np.log(np.exp(x) / np.exp(x).sum())).sum()
    return total / B


def mse_closed(s: np.ndarray) -> float:
    rows = [weight * np.mean((x[h] - g[h]) ** 2) for x, g, h, weight in zip(s, GRADES, HELD, WEIGHT, strict=True)]
    return float(np.mean(rows))


def ordinal_closed(s: np.ndarray, thresholds: np.ndarray = THRESHOLDS) -> float:
    edges = np.concatenate([[-np.inf], thresholds, [np.inf]])
    total = 0.0
    for row, grade, held, weight in zip(s, GRADES, HELD, WEIGHT, strict=True):
        x, c = row[held], grade[held].astype(int)
        total += weight * np.mean(-np.log(sigmoid(edges[c + 1] - x) - sigmoid(edges[c] - x)))
    return total / B


@pytest.mark.parametrize(
    ("kind", "settings", "closed"),
    [
        ("listwise_ce", {"temperature": 0.7}, listwise_closed),
        ("mse", {}, mse_closed),
        ("ordinal", {"thresholds": torch.tensor(THRESHOLDS).float()}, ordinal_closed),
    ],
)
def test_graded_formula_and_gradient(kind: str, settings: dict[str, Any], closed: Callable[[Any], float]) -> None:
    s = scores((B, K), 5)
    hidden = np.where(HELD, s, np.nan)  # what stands where there is no medium must not be read
    (found,) = tensors(hidden)
    target, weight = tensors(GRADES, WEIGHT, grad=False)
    loss, metrics = function_of(kind)(found, target, weight=weight, mask=torch.tensor(HELD), **settings)
    assert loss.item() == pytest.approx(closed(s), rel=3e-6)
    loss.backward()
    np.testing.assert_allclose(found.grad, np.where(HELD, numeric_gradient(closed, s), 0), rtol=3e-4, atol=2e-6)  # type: ignore[arg-type]
    right = [
        float(x[i] > x[j])
        for x, g, h in zip(s, GRADES, HELD, strict=True)
        for i in range(K)
        for j in range(K)
        if h[i] and h[j] and g[i] > g[j]
    ]
    assert metrics["pairwise_accuracy"].item() == pytest.approx(np.mean(right))


def test_ordinal_probabilities_sum_to_one_and_thresholds_learn() -> None:
    thresholds = torch.tensor(THRESHOLDS, dtype=torch.float32, requires_grad=True)
    score = torch.tensor([[0.37]])
    each = [graded.ordinal(score, torch.tensor([[float(c)]]), thresholds)[0] for c in range(5)]
    assert sum(math.exp(-loss.item()) for loss in each) == pytest.approx(1, rel=1e-5)
    s = scores((B, K), 5)
    target, weight = tensors(GRADES, WEIGHT, grad=False)
    graded.ordinal(tensors(s)[0], target, thresholds, weight=weight, mask=torch.tensor(HELD))[0].backward()
    expected = numeric_gradient(lambda t: ordinal_closed(s, t), THRESHOLDS)
    np.testing.assert_allclose(thresholds.grad, expected, rtol=3e-4, atol=2e-6)  # type: ignore[arg-type]


def test_the_error_of_an_ordinal_run_is_in_grades() -> None:
    """Of the expected grade, which the score becomes by the thresholds; the score itself has another unit."""
    s, thresholds = np.array([[0.3, -2.0, 5.0]]), torch.tensor(THRESHOLDS).float()
    target = np.array([[2.0, 0.0, 4.0]])
    _, metrics = graded.ordinal(*tensors(s, target), thresholds)
    expected = sigmoid(s[..., None] - THRESHOLDS).sum(-1)
    assert metrics["squared_error"].item() == pytest.approx(np.mean((expected - target) ** 2), rel=1e-5)
    assert metrics["pairwise_accuracy"] == 1


def test_an_error_is_told_where_scores_are_ratings() -> None:
    """A softmax is the same wherever all scores of a list lie, so a distance from the grades would mean nothing."""
    s, target = np.array([[0.3, -2.0, 5.0]]), np.array([[2.0, 0.0, 4.0]])
    found = {shift: graded.listwise_ce(*tensors(s + shift, target)) for shift in (0.0, 100.0)}
    assert found[0.0][0].item() == pytest.approx(found[100.0][0].item(), rel=1e-5)
    assert found[0.0][1] == found[100.0][1] == {"pairwise_accuracy": torch.tensor(1.0)}
    _, metrics = graded.mse(*tensors(s, target))
    assert metrics["squared_error"].item() == pytest.approx(np.mean((s - target) ** 2), rel=1e-6)


@pytest.mark.parametrize("shift", [0.0, 30.0, -30.0, 200.0])
def test_grades_far_from_every_threshold_are_finite(shift: float) -> None:
    """Probabilities of grades are differences of nearly equal numbers there; their logarithms are not."""
    score = torch.full((1, 5), shift, requires_grad=True)
    thresholds = torch.tensor([-1e-3, 0.0, 1e-3, 40.0])
    loss, _ = graded.ordinal(score, torch.arange(5.0)[None], thresholds)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(score.grad).all()  # type: ignore[arg-type]
    log_p = graded.grade_log_probabilities(torch.tensor(shift, dtype=torch.float64), thresholds.double())
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_a_list_of_two_is_bradley_terry_with_a_soft_label() -> None:
    s, target = scores((B, 2), 1), RNG.random((B, 2))
    found, _ = graded.listwise_ce(*tensors(s, target), temperature=0.3)
    label = torch.tensor(sigmoid((target[:, 0] - target[:, 1]) / 0.3)).float()
    plain, _ = reward.bradley_terry(*tensors(s[:, 0], s[:, 1]), label=label)
    assert found.item() == pytest.approx(plain.item(), rel=1e-5)
