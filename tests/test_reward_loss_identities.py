"""Objectives that fit a scorer: what a spread means, and where one objective is another."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gradient_kit import numeric_gradient
from reward_loss_kit import LABEL, SPREAD, B, expected_closed, log_sigmoid, scores, sigmoid, tensors
from scipy.integrate import quad
from scipy.stats import norm

from mmalign.losses import reward, uncertainty

# ------------------------------------------------------------------------------------------------------ uncertainty


@pytest.mark.parametrize("spread", [1e-9, 0.1, 0.7, 1.0, 1.499, 1.501, 2.0, 5.0, 30.0])
def test_the_expected_loss_is_the_integral(spread: float) -> None:
    """In float64 the quadrature is good to 1e-9; what the function returns, to single precision."""
    means = np.linspace(-8, 8, 9)
    exact = np.array([expected_closed(mean, max(spread, 1e-6)) for mean in means])
    wide = [torch.tensor(means), torch.full((9,), max(spread, 1e-6), dtype=torch.float64)]
    single = uncertainty.expected_loss(torch.tensor(means).float(), torch.full((9,), spread))
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), exact, rtol=3e-6, atol=1e-6)
    by = uncertainty._by_hermite if spread < uncertainty.SWITCH else uncertainty._by_laguerre
    np.testing.assert_allclose(by(*wide).numpy(), exact, atol=1e-9)


def test_gaussian_uncertainty() -> None:
    w, o = scores((B,), 1), scores((B,), 2)
    winner, loser, spread = tensors(w, o, SPREAD)
    (label,) = tensors(LABEL, grad=False)

    def closed(w: np.ndarray, s: np.ndarray) -> float:
        each = [
            p * expected_closed(m, d) + (1 - p) * expected_closed(-m, d)
            for m, d, p in zip(w - o, s, LABEL, strict=True)
        ]
        return float(np.mean(each))

    loss, _ = uncertainty.gaussian_bt(winner, loser, spread, label=label)
    assert loss.item() == pytest.approx(closed(w, SPREAD), rel=3e-6)
    loss.backward()
    np.testing.assert_allclose(
        winner.grad, numeric_gradient(lambda x: closed(x, SPREAD), w, 1e-4), rtol=1e-3, atol=1e-5
    )  # type: ignore[arg-type]
    np.testing.assert_allclose(
        spread.grad, numeric_gradient(lambda x: closed(w, x), SPREAD, 1e-4), rtol=1e-3, atol=1e-5
    )  # type: ignore[arg-type]


def test_a_thousand_samples_agree_with_the_quadrature_within_their_error() -> None:
    """What HPSv3 draws: the mean of -log sigmoid over samples."""
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mean, spread in ((0.5, 0.3), (-1.0, 2.0), (2.0, 4.0)):
        drawn = torch.nn.functional.softplus(-(mean + spread * z))
        exact = uncertainty.expected_loss(torch.tensor(mean), torch.tensor(spread)).item()
        assert abs(drawn.mean().item() - exact) < 4 * drawn.std().item() / math.sqrt(len(z))


def test_the_probit_form_is_the_loss_of_the_expected_probability() -> None:
    means, spread = np.linspace(-4, 4, 9), 1.3
    exact = [quad(lambda z, m=m: sigmoid(m + spread * z) * norm.pdf(z), -12, 12)[0] for m in means]
    found = uncertainty.probit_probability(torch.tensor(means), torch.tensor(spread)).exp().numpy()
    np.testing.assert_allclose(found, exact, atol=0.02)
    winner, loser = tensors(means, np.zeros(9))
    label = torch.linspace(0, 1, 9)
    loss, _ = uncertainty.gaussian_bt(winner, loser, torch.full((9,), spread), form="probit", label=label)
    closed = means / np.sqrt(1 + np.pi / 8 * spread**2)
    p = label.numpy()
    assert loss.item() == pytest.approx(np.mean(-p * log_sigmoid(closed) - (1 - p) * log_sigmoid(-closed)), rel=1e-5)


@pytest.mark.parametrize("form", ["quadrature", "probit"])
def test_without_spread_a_gaussian_is_bradley_terry(form: str) -> None:
    winner, loser = tensors(scores((B,), 1), scores((B,), 2))
    (label,) = tensors(LABEL, grad=False)
    plain, _ = reward.bradley_terry(winner, loser, label=label)
    found, _ = uncertainty.gaussian_bt(winner, loser, torch.zeros(B), form=form, label=label)
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)


def test_being_unsure_costs_in_one_form_and_is_forgiven_in_the_other() -> None:
    right, wrong = torch.tensor([2.0]), torch.tensor([-2.0])
    for form, cheaper in (("quadrature", False), ("probit", True)):
        sure, unsure = (
            uncertainty.gaussian_bt(wrong, torch.zeros(1), torch.tensor([s]), form=form)[0] for s in (0.1, 4.0)
        )
        assert (unsure < sure).item() is cheaper
    sure, unsure = (uncertainty.gaussian_bt(right, torch.zeros(1), torch.tensor([s]))[0] for s in (0.1, 4.0))
    assert unsure > sure


# ------------------------------------------------------------------------------------------------------- identities


def test_the_three_probabilities_of_btt_sum_to_one() -> None:
    d = torch.linspace(-9, 9, 37)
    for k in (1.0, 1.5, 5.0, 40.0):
        logs = reward.btt_log_probabilities(d, k)
        torch.testing.assert_close(sum(log.exp() for log in logs), torch.ones_like(d), rtol=0, atol=2e-6)
    assert reward.btt_log_probabilities(d, 1.0)[1].max() == -math.inf
    win, tie, loss = reward.btt_log_probabilities(torch.zeros(1), 5.0)
    assert win.item() == loss.item() and tie.exp().item() == pytest.approx(24 / 36)


def test_btt_with_k_1_is_bradley_terry_where_nothing_is_tied() -> None:
    winner, loser = tensors(scores((B,), 1), scores((B,), 2))
    label = torch.tensor([1, 0, 1, 1, 0.25, 0.75, 1.0])
    plain, _ = reward.bradley_terry(winner, loser, label=label)
    found, _ = reward.btt(winner, loser, k=1.0, label=label)
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)
    found.backward()
    assert torch.isfinite(winner.grad).all()  # type: ignore[arg-type]


def test_btt_takes_shares_of_ties() -> None:
    """Of votes with 3 for one, 1 for the other and 2 for neither: each part at its log probability."""
    winner, loser = tensors(np.array([0.7]), np.array([-0.2]))
    label, tie = torch.tensor([(3 + 1) / 6]), torch.tensor([2 / 6])
    loss, _ = reward.btt(winner, loser, k=3.0, label=label, tie=tie)
    win, draw, lost = (log.item() for log in reward.btt_log_probabilities(torch.tensor([0.9]), 3.0))
    assert loss.item() == pytest.approx(-(3 * win + 2 * draw + 1 * lost) / 6, rel=1e-6)


def test_pickscore_is_zero_where_the_votes_are_met_and_differs_from_bradley_terry_by_their_entropy() -> None:
    label = torch.tensor([0.5, 0.8, 0.25])
    perfect, _ = reward.pickscore(torch.logit(label), torch.zeros(3), label=label)
    assert perfect.item() == pytest.approx(0, abs=1e-6)
    winner, loser = tensors(scores((3,), 1), scores((3,), 2))
    entropy = -(label * label.log() + (1 - label) * (1 - label).log()).mean()
    gap = reward.bradley_terry(winner, loser, label=label)[0] - reward.pickscore(winner, loser, label=label)[0]
    assert gap.item() == pytest.approx(entropy.item(), rel=1e-5)
    tie = torch.tensor([0.5])
    found = reward.pickscore(*tensors([1.0], [0.2]), label=tie)[0]
    authors = reward.bradley_terry(*tensors([1.0], [0.2]), label=tie)[0] + math.log(0.5)
    assert found.item() == pytest.approx(authors.item(), rel=1e-5)


def test_prompt_weights_divided_by_their_sum_are_means_over_prompts() -> None:
    """Two prompts, one with three pairs: with weights 1/n each prompt is half of the loss, as in PickScore's code."""
    winner, loser = tensors(scores((4,), 1), scores((4,), 2))
    weight = torch.tensor([1, 1 / 3, 1 / 3, 1 / 3])
    each = [reward.pickscore(w[None], o[None])[0].item() for w, o in zip(winner, loser, strict=True)]
    found, _ = reward.pickscore(winner, loser, weight=weight)
    assert found.item() == pytest.approx((each[0] + np.mean(each[1:])) / 2, rel=1e-6)


def test_no_margin_and_tau_1_are_bradley_terry() -> None:
    winner, loser = tensors(scores((B,), 1), scores((B,), 2))
    (label,) = tensors(LABEL, grad=False)
    plain = reward.bradley_terry(winner, loser, label=label)[0].item()
    assert reward.bt_margin(winner, loser, margin=0.0, label=label)[0].item() == pytest.approx(plain, rel=1e-6)
    assert reward.likelihood_displacement(winner, loser, tau=1.0, label=label)[0].item() == pytest.approx(plain)
    assert reward.scaled_bt(winner, loser, torch.ones(B), label=label)[0].item() == pytest.approx(plain)


def test_the_softmax_over_two_scores_is_the_sigmoid_of_their_difference() -> None:
    """What HPS's and PickScore's code writes as a cross entropy over the two images."""
    w, o = scores((B,), 1), scores((B,), 2)
    both = torch.tensor(np.stack([w, o], 1))
    log_p = torch.log_softmax(both, 1).numpy()
    expected = np.mean(-LABEL * log_p[:, 0] - (1 - LABEL) * log_p[:, 1])
    found, _ = reward.bradley_terry(*tensors(w, o), label=torch.tensor(LABEL).float())
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_cosines_with_a_learned_scale() -> None:
    """HPS as it is trained: gradients reach the embeddings and the scale."""
    rows = [
        torch.nn.functional.normalize(torch.randn(B, 16, generator=torch.Generator().manual_seed(i)), dim=1)
        for i in range(3)
    ]
    winner, loser, text = rows
    winner.requires_grad_(True)
    scale = torch.tensor(math.log(14.0), requires_grad=True)
    both = [scale.exp() * (image * text).sum(1) for image in (winner, loser)]
    (label,) = tensors(LABEL, grad=False)
    loss, _ = reward.bradley_terry(*both, label=label)
    loss.backward()

    def closed(w: np.ndarray, temperature: float = 14.0) -> float:
        gap = temperature * ((w - loser.double().numpy()) * text.double().numpy()).sum(1)
        return float(np.mean(-LABEL * log_sigmoid(gap) - (1 - LABEL) * log_sigmoid(-gap)))

    at = winner.detach().double().numpy()
    assert loss.item() == pytest.approx(closed(at), rel=1e-5)
    np.testing.assert_allclose(winner.grad, numeric_gradient(closed, at), rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]
    by_scale = (closed(at, 14 * math.exp(1e-5)) - closed(at, 14 * math.exp(-1e-5))) / 2e-5
    assert scale.grad.item() == pytest.approx(by_scale, rel=1e-3)  # type: ignore[union-attr]
