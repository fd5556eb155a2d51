"""Objectives that fit a scorer, each against its formula in float64; gradients, masks, weights; what holds for all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gradient_kit import numeric_gradient
from reward_loss_kit import (
    LABEL,
    LABELS,
    MASK,
    PAIRWISE,
    RNG,
    SPREAD,
    TARGET,
    WEIGHT,
    A,
    B,
    function_of,
    log_sigmoid,
    mixed,
    scores,
    tensors,
)

from mmalign.losses import reward
from mmalign.methods import REWARDS
from mmalign.methods_reward import Fitting, Graded

# --------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("kind", PAIRWISE)
@pytest.mark.parametrize("axes", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_pairwise_formula_and_gradient(kind: str, axes: bool, normalise: bool) -> None:
    settings, each = PAIRWISE[kind]
    shape = (B, A) if axes else (B,)
    w, o = scores(shape, 1), scores(shape, 2)
    label, mask = (LABELS, MASK) if axes else (LABEL, None)

    def closed(w: np.ndarray, o: np.ndarray) -> float:
        values = each(w, o, label)
        rows = np.where(MASK, values, 0).sum(1) / A if axes else values
        return float((WEIGHT * rows).sum() / (WEIGHT.sum() if normalise else B))

    winner, loser = tensors(w, o)
    (p,), (weight,) = tensors(label, grad=False), tensors(WEIGHT, grad=False)
    held = None if mask is None else torch.tensor(mask)
    loss, metrics = function_of(kind)(winner, loser, label=p, weight=weight, mask=held, normalise=normalise, **settings)
    assert loss.item() == pytest.approx(closed(w, o), rel=2e-6)
    loss.backward()
    np.testing.assert_allclose(winner.grad, numeric_gradient(lambda x: closed(x, o), w), rtol=2e-4, atol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_allclose(loser.grad, numeric_gradient(lambda x: closed(w, x), o), rtol=2e-4, atol=1e-6)  # type: ignore[arg-type]
    judged = np.ones(shape, bool) if mask is None else mask
    decided = judged & (label != 0.5)
    right = np.sign(w - o) == np.sign(label - 0.5)
    assert metrics["pairwise_accuracy"].item() == pytest.approx(right[decided].mean())
    assert metrics["margin"].item() == pytest.approx((w - o)[judged].mean(), abs=1e-6)


def test_scaled_bt_and_margins_of_each_pair() -> None:
    w, o, margin = scores((B,), 1), scores((B,), 2), RNG.random(B)
    winner, loser = tensors(w, o)
    label, by = tensors(LABEL, margin, grad=False)

    def closed(w: np.ndarray) -> float:
        return float(np.mean(margin * mixed(lambda b, o: -log_sigmoid(b - o))(w, o, LABEL)))

    loss, _ = reward.scaled_bt(winner, loser, by, label=label)
    assert loss.item() == pytest.approx(closed(w), rel=2e-6)
    loss.backward()
    np.testing.assert_allclose(winner.grad, numeric_gradient(closed, w), rtol=2e-4, atol=1e-6)  # type: ignore[arg-type]
    each, _ = reward.bt_margin(winner, loser, margin=by, label=label)
    expected = np.mean(LABEL * -log_sigmoid(w - o - margin) + (1 - LABEL) * -log_sigmoid(o - w - margin))
    assert each.item() == pytest.approx(expected, rel=2e-6)
    wide, _ = reward.bt_margin(*tensors(scores((B, A), 1), scores((B, A), 2)), margin=by, label=torch.ones(B, A))
    by_axis = -log_sigmoid(scores((B, A), 1) - scores((B, A), 2) - margin[:, None])
    assert wide.item() == pytest.approx(by_axis.mean(), rel=2e-6)


def test_triplet() -> None:
    """On embeddings; for unit vectors it is the hinge on twice the cosine."""
    rows = [RNG.normal(size=(B, 8)) for _ in range(3)]
    w, o, t = (row / np.linalg.norm(row, axis=1, keepdims=True) for row in rows)

    winner, loser, anchor = tensors(w, o, t)
    (label,) = tensors(LABEL, grad=False)
    loss, _ = reward.triplet(winner, loser, anchor, margin=0.3, label=label)
    near, far = ((t - w) ** 2).sum(1), ((t - o) ** 2).sum(1)
    plain = LABEL * np.maximum(0, near - far + 0.3) + (1 - LABEL) * np.maximum(0, far - near + 0.3)
    assert loss.item() == pytest.approx(plain.mean(), rel=1e-5)
    loss.backward()

    def again(w: np.ndarray) -> float:
        near = ((t - w) ** 2).sum(1)
        return float(np.mean(LABEL * np.maximum(0, near - far + 0.3) + (1 - LABEL) * np.maximum(0, far - near + 0.3)))

    np.testing.assert_allclose(winner.grad, numeric_gradient(again, w), rtol=1e-3, atol=1e-6)  # type: ignore[arg-type]
    cosine = [torch.tensor(2 * (x * t).sum(1), dtype=torch.float32) for x in (w, o)]
    assert reward.ranking_hinge(*cosine, margin=0.3, label=label)[0].item() == pytest.approx(loss.item(), rel=1e-5)


def test_bt_regression() -> None:
    w, o = scores((B,), 1), scores((B,), 2)
    winner, loser = tensors(w, o)
    label, target, weight = tensors(LABEL, TARGET, WEIGHT, grad=False)

    def closed(w: np.ndarray, o: np.ndarray) -> float:
        each = mixed(lambda b, o: -log_sigmoid(b - o))(w, o, LABEL)
        return float(np.mean(WEIGHT * (each + 0.4 * ((w - TARGET[:, 0]) ** 2 + (o - TARGET[:, 1]) ** 2) / 2)))

    loss, metrics = reward.bt_regression(winner, loser, target, regression=0.4, label=label, weight=weight)
    assert loss.item() == pytest.approx(closed(w, o), rel=2e-6)
    loss.backward()
    np.testing.assert_allclose(winner.grad, numeric_gradient(lambda x: closed(x, o), w), rtol=2e-4, atol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_allclose(loser.grad, numeric_gradient(lambda x: closed(w, x), o), rtol=2e-4, atol=1e-6)  # type: ignore[arg-type]
    assert metrics["bradley_terry"] + 0.4 * metrics["squared_error"] == pytest.approx(loss.item(), rel=1e-6)


# ------------------------------------------------------------------------------------------- what holds for each kind

PAIRS = [cls for cls in REWARDS if issubclass(cls, Fitting) and not issubclass(cls, Graded)]


def call(cls: Any, order: tuple[int, int] = (0, 1), dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Any objective on pairs with made-up arguments; `order` (1, 0) exchanges the two and turns the labels round."""
    kind = cls.model_fields["kind"].default
    shape = (B, 16) if cls.towers else (B,)
    both = [torch.tensor(scores(shape, seed)).to(dtype).requires_grad_(True) for seed in (1, 2)]
    label = torch.tensor(LABEL).float()
    given = {"label": label if order == (0, 1) else 1 - label, "weight": torch.tensor(WEIGHT).float()}
    own = cls(kind=kind).own()
    if "spread" in cls.needs:
        given["spread"] = torch.tensor(SPREAD).float()
    if "margin" in cls.needs:
        given["margin"] = torch.linspace(0, 1, B)
    if "target" in cls.needs:
        given["target"] = torch.tensor(TARGET).float()[:, list(order)]
    if cls.towers:
        given["anchor"] = torch.tensor(scores(shape, 3)).to(dtype)
    loss, metrics = function_of(kind)(both[order[0]], both[order[1]], **given, **own)
    return loss, metrics | {"scores": both}


@pytest.mark.parametrize("cls", PAIRS, ids=lambda cls: cls.__name__)
def test_exchanging_the_two_changes_nothing(cls: Any) -> None:
    straight, turned = call(cls), call(cls, (1, 0))
    assert turned[0].item() == pytest.approx(straight[0].item(), rel=1e-6)
    assert turned[1]["pairwise_accuracy"] == straight[1]["pairwise_accuracy"]
    assert turned[1]["margin"].item() == pytest.approx(-straight[1]["margin"].item(), abs=1e-6)
    straight[0].backward()
    turned[0].backward()
    for one, other in zip(straight[1]["scores"], turned[1]["scores"], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cls", PAIRS, ids=lambda cls: cls.__name__)
def test_half_precision_scores_give_a_float32_loss(cls: Any) -> None:
    loss, _ = call(cls, dtype=torch.bfloat16)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(call(cls)[0].item(), rel=0.03)


@pytest.mark.parametrize("cls", [c for c in PAIRS if c.differences and not c.towers], ids=lambda cls: cls.__name__)
def test_those_on_differences_do_not_see_a_shift(cls: Any) -> None:
    kind = cls.model_fields["kind"].default
    given: dict[str, Any] = {"label": torch.tensor(LABEL).float(), **cls(kind=kind).own()}
    given |= {"spread": torch.ones(B)} if "spread" in cls.needs else {}
    given |= {"margin": torch.ones(B)} if "margin" in cls.needs else {}
    winner, loser = tensors(scores((B,), 1), scores((B,), 2))
    one = function_of(kind)(winner, loser, **given)[0].item()
    assert function_of(kind)(winner + 3, loser + 3, **given)[0].item() == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("cls", [c for c in PAIRS if "mask" in c.needs], ids=lambda cls: cls.__name__)
def test_what_nobody_judged_is_never_read(cls: Any) -> None:
    """NaN scores and labels there leave loss and gradients as they are, and zero there."""
    kind = cls.model_fields["kind"].default
    mask = torch.tensor(MASK)
    found = []
    for hole in (0.3, math.nan):
        w, o = (np.where(MASK, scores((B, A), seed), hole) for seed in (1, 2))
        winner, loser = tensors(w, o)
        label = torch.tensor(np.where(MASK, LABELS, hole)).float()
        given: dict[str, Any] = {"label": label, "mask": mask, **cls(kind=kind).own()}
        given |= {"spread": torch.full((B, A), 0.7)} if "spread" in cls.needs else {}
        given |= {"margin": torch.ones(B)} if "margin" in cls.needs else {}
        given |= {"target": torch.where(mask[:, None], 1.0, hole).expand(B, 2, A)} if "target" in cls.needs else {}
        loss, metrics = function_of(kind)(winner, loser, **given)
        loss.backward()
        assert (winner.grad[~mask] == 0).all()  # type: ignore[index]
        found.append((loss.item(), metrics["pairwise_accuracy"].item(), winner.grad[mask].sum().item()))  # type: ignore[index]
    assert found[0] == found[1]


def test_a_batch_that_weighs_nothing_has_no_loss() -> None:
    """Rows of weight 0 may fill a batch: their mean over weights is nought over nought."""
    winner, loser = tensors(scores((B,), 1), scores((B,), 2))
    for normalise in (True, False):
        loss, _ = reward.pickscore(winner, loser, weight=torch.zeros(B), normalise=normalise)
        loss.backward()
        assert loss.item() == 0 and not winner.grad.any()  # type: ignore[union-attr]


def test_an_undecided_batch_is_half_right() -> None:
    _, metrics = reward.bradley_terry(torch.tensor([1.0, 2.0]), torch.zeros(2), label=torch.full((2,), 0.5))
    assert metrics["pairwise_accuracy"].item() == 0.5
    _, metrics = reward.bradley_terry(torch.zeros(2), torch.zeros(2))
    assert metrics["pairwise_accuracy"].item() == 0.5, "an equal score is half right"


def test_far_differences_stay_finite() -> None:
    far = torch.tensor([400.0, -400.0], requires_grad=True)
    for cls in PAIRS:
        if not cls.towers and cls.needs == ("label", "weight", "mask"):
            kind = cls.model_fields["kind"].default
            loss, _ = function_of(kind)(far, torch.zeros(2), label=torch.tensor([0.0, 0.5]), **cls(kind=kind).own())
            (gradient,) = torch.autograd.grad(loss, far)
            assert torch.isfinite(loss) and torch.isfinite(gradient).all(), kind
