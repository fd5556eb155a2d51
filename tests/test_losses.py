"""Every objective against an independent closed form in float64, its gradient included."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.losses import pairwise, reward, supervised

B = 6


def _errors(seed: int = 0, scale: float = 1e-3) -> list[Tensor]:
    """Four error vectors whose differences are as small as training's, around 1."""
    generator = torch.Generator().manual_seed(seed)
    return [1 + scale * torch.randn(B, generator=generator) for _ in range(4)]


def _log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def _dpo(
    errors: list[Tensor], beta: float, kappa: float, label: np.ndarray, weight: np.ndarray, anchor: float
) -> float:
    model_w, model_l, ref_w, ref_l = (error.detach().double().numpy() for error in errors)
    logit = -kappa * beta * ((model_w - ref_w) - (model_l - ref_l))
    each = -label * _log_sigmoid(logit) - (1 - label) * _log_sigmoid(-logit)
    return float(np.mean(weight * (each + anchor * model_w)))


def _dpo_gradient(
    errors: list[Tensor], beta: float, kappa: float, label: np.ndarray, weight: np.ndarray, anchor: float
) -> tuple[np.ndarray, np.ndarray]:
    """d loss / d model_w and d model_l: weight / B * (label - sigmoid(logit)) * kappa * beta, with opposite signs."""
    model_w, model_l, ref_w, ref_l = (error.detach().double().numpy() for error in errors)
    logit = -kappa * beta * ((model_w - ref_w) - (model_l - ref_l))
    push = weight / B * (label - 1 / (1 + np.exp(-logit))) * kappa * beta
    return push + anchor * weight / B, -push


CASES = list(itertools.product([1.0, 500.0, 5000.0], [0.5, 1.0], ["winner", "soft"], ["none", "some"], [0.0, 0.3]))


@pytest.mark.parametrize(("beta", "kappa", "labels", "weights", "anchor"), CASES)
def test_diffusion_dpo(beta: float, kappa: float, labels: str, weights: str, anchor: float) -> None:
    errors = _errors()
    label = np.ones(B) if labels == "winner" else np.array([1, 0.5, 0.8, 0, 0.25, 1.0])
    weight = np.ones(B) if weights == "none" else np.array([1, 0.5, 2, 0, 1, 0.25])
    for error in errors:
        error.requires_grad_(True)
    loss, _ = pairwise.diffusion_dpo(
        *errors, beta=beta, kappa=kappa, anchor=anchor,
        label=None if labels == "winner" else torch.tensor(label),
        weight=None if weights == "none" else torch.tensor(weight),
    )  # fmt: skip
    # float32 errors near 1 carry 6e-8 each, which the logit multiplies by kappa * beta
    rounding = 1e-6 + 4e-7 * kappa * beta
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(_dpo(errors, beta, kappa, label, weight, anchor), rel=1e-5, abs=rounding)
    loss.backward()
    for tensor, expected in zip(errors, _dpo_gradient(errors, beta, kappa, label, weight, anchor), strict=False):
        assert tensor.grad is not None
        bound = rounding * kappa * beta / B
        np.testing.assert_allclose(tensor.grad.double().numpy(), expected, rtol=1e-5, atol=bound)


def test_zero_margin_is_ln_2_and_half_right() -> None:
    same = torch.rand(B)
    loss, metrics = pairwise.diffusion_dpo(same, same, same, same, beta=5000.0)
    assert loss.item() == torch.tensor(2.0).log().item()
    assert metrics["implicit_accuracy"].item() == 0.5
    assert metrics["margin"].item() == metrics["logit"].item() == 0


def test_accuracy_counts_wins_ties_and_losses() -> None:
    model_w, zero = torch.tensor([-1.0, 0, 1, -2]), torch.zeros(4)
    _, metrics = pairwise.diffusion_dpo(model_w, zero, zero, zero, beta=1.0)
    assert metrics["implicit_accuracy"].item() == pytest.approx((1 + 0.5 + 0 + 1) / 4)


def test_metrics_are_detached_means() -> None:
    errors = [error.requires_grad_(True) for error in _errors()]
    _, metrics = pairwise.diffusion_dpo(*errors, beta=500.0)
    names = ("model_w_err", "model_l_err", "ref_w_err", "ref_l_err")
    for name, error in zip(names, errors, strict=True):
        torch.testing.assert_close(metrics[name], error.detach().mean(), rtol=1e-6, atol=0)
    margin = (errors[1] - errors[3] - errors[0] + errors[2]).mean().item()
    assert metrics["margin"].item() == pytest.approx(margin, abs=1e-7)  # differences of float32 numbers near 1
    assert metrics["logit"].item() == pytest.approx(250 * margin, abs=250 * 1e-7)
    assert not any(value.requires_grad for value in metrics.values())


def test_small_beta_is_half_beta_times_the_margin_below_ln_2() -> None:
    """log sigmoid(x) = -ln 2 + x / 2 + O(x^2): the limit has no reference left in its gradient but its sign."""
    errors = [error.double().float() for error in _errors(scale=0.5)]
    beta = 1e-3
    loss, metrics = pairwise.diffusion_dpo(*errors, beta=beta, kappa=0.5)
    assert loss.item() == pytest.approx(math.log(2) - metrics["logit"].item() / 2, abs=2e-7)


def test_the_two_conventions_of_kappa_agree() -> None:
    """diffusers' SD 1.5 script has 2500 without the half, the paper's code 5000 with it."""
    one, _ = pairwise.diffusion_dpo(*_errors(), beta=2500.0, kappa=1.0)
    two, _ = pairwise.diffusion_dpo(*_errors(), beta=5000.0, kappa=0.5)
    assert one.item() == two.item()


def test_mean_with_beta_is_sum_with_beta_per_element() -> None:
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(B, 4, 8, 8, generator=generator)
    predictions = [target + 0.05 * torch.randn(B, 4, 8, 8, generator=generator) for _ in range(4)]
    units = pairwise.beta_units(5000.0, 256, "mean")
    assert units == {"beta_per_element": 5000 / 256, "beta_per_sample": 5000.0}
    assert pairwise.beta_units(units["beta_per_element"], 256, "sum") == units
    losses = []
    for reduction, beta in (("mean", 5000.0), ("sum", units["beta_per_element"])):
        errors = [pairwise.squared_error(prediction, target, reduction) for prediction in predictions]
        losses.append(pairwise.diffusion_dpo(*errors, beta=beta)[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_squared_error_is_per_sample_and_float32() -> None:
    prediction = torch.randn(3, 4, 5, 2, dtype=torch.bfloat16)
    target = torch.randn(3, 4, 5, 2)
    expected = ((prediction.double() - target.double()) ** 2).reshape(3, -1)
    for reduction, reduced in (("mean", expected.mean(1)), ("sum", expected.sum(1))):
        error = pairwise.squared_error(prediction, target, reduction)
        assert error.dtype == torch.float32
        torch.testing.assert_close(error.double(), reduced, rtol=1e-6, atol=0)


def test_half_precision_errors_are_raised_to_float32() -> None:
    errors = [error.bfloat16() for error in _errors(scale=0.1)]
    loss, _ = pairwise.diffusion_dpo(*errors, beta=500.0)
    exact, _ = pairwise.diffusion_dpo(*(error.float() for error in errors), beta=500.0)
    assert loss.dtype == torch.float32
    assert loss.item() == exact.item()


def test_a_soft_tie_is_symmetric_and_equals_both_orders_at_half_weight() -> None:
    model_w, model_l, ref_w, ref_l = _errors()
    half = torch.full((B,), 0.5)
    one, _ = pairwise.diffusion_dpo(model_w, model_l, ref_w, ref_l, beta=500.0, label=half)
    other, _ = pairwise.diffusion_dpo(model_l, model_w, ref_l, ref_w, beta=500.0, label=half)
    assert one.item() == pytest.approx(other.item(), rel=1e-6)
    both = [torch.cat(parts) for parts in ((model_w, model_l), (model_l, model_w), (ref_w, ref_l), (ref_l, ref_w))]
    orders, _ = pairwise.diffusion_dpo(*both, beta=500.0, weight=torch.full((2 * B,), 0.5))
    # The same sum over the ties, over twice as many rows.
    assert 2 * orders.item() == pytest.approx(one.item(), rel=1e-6)


def test_a_soft_tie_pulls_to_no_preference() -> None:
    model_w = torch.tensor([1.0], requires_grad=True)
    ref = torch.ones(1)
    loss, _ = pairwise.diffusion_dpo(model_w, ref, ref, ref, beta=500.0, label=torch.tensor([0.5]))
    loss.backward()
    assert model_w.grad is not None
    assert model_w.grad.item() == 0


def test_a_weight_means_the_same_in_every_batch() -> None:
    errors = _errors()
    weight = torch.tensor([1, 0.5, 2, 0, 1, 0.25])
    whole, _ = pairwise.diffusion_dpo(*errors, beta=500.0, weight=weight)
    single = [
        pairwise.diffusion_dpo(*(e[i : i + 1] for e in errors), beta=500.0, weight=weight[i : i + 1])[0].item()
        for i in range(B)
    ]
    plain = [pairwise.diffusion_dpo(*(e[i : i + 1] for e in errors), beta=500.0)[0].item() for i in range(B)]
    assert np.mean(single) == pytest.approx(whole.item(), rel=1e-6)
    np.testing.assert_allclose(single, np.array(plain) * weight.numpy(), rtol=1e-6)


def test_huge_margins_stay_finite() -> None:
    zero, far = torch.zeros(2), torch.tensor([1e6, -1e6])
    model_w = far.requires_grad_(True)
    loss, _ = pairwise.diffusion_dpo(model_w, zero, zero, zero, beta=5000.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert model_w.grad is not None and torch.isfinite(model_w.grad).all()


# ------------------------------------------------------------------------------------------------- supervised


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_denoising(kind: str, gamma: float | None) -> None:
    error = torch.rand(B, generator=torch.Generator().manual_seed(1), requires_grad=True)
    snr = torch.tensor([0.005, 0.5, 1, 5, 20, 1000.0])
    loss, metrics = supervised.denoising(error, snr=snr, snr_gamma=gamma, parameterisation=kind)
    ratio, raw = snr.double().numpy(), error.detach().double().numpy()
    weight = np.ones(B) if gamma is None else np.minimum(ratio, gamma) / (ratio if kind == "eps" else ratio + 1)
    assert loss.item() == pytest.approx(np.mean(weight * raw), rel=1e-6)
    assert metrics["model_err"].item() == pytest.approx(raw.mean(), rel=1e-6)
    loss.backward()
    assert error.grad is not None
    np.testing.assert_allclose(error.grad.numpy(), weight / B, rtol=1e-6)


def test_min_snr_weighs_the_x0_error_alike_in_eps_and_v() -> None:
    """min(snr, gamma) on the x0-error, whichever of the two is predicted: eps-error = snr x0-error, v = (snr + 1)."""
    snr, x0_error = torch.tensor([0.01, 1.0, 5.0, 300.0]), torch.tensor([0.3, 0.2, 0.1, 0.05])
    eps, _ = supervised.denoising(snr * x0_error, snr=snr, snr_gamma=5.0, parameterisation="eps")
    v, _ = supervised.denoising((snr + 1) * x0_error, snr=snr, snr_gamma=5.0, parameterisation="v")
    expected = (snr.clamp(max=5) * x0_error).mean().item()
    assert eps.item() == pytest.approx(expected, rel=1e-6)
    assert v.item() == pytest.approx(expected, rel=1e-6)


def test_v_weight_survives_a_zero_terminal_snr() -> None:
    loss, _ = supervised.denoising(torch.ones(1), snr=torch.zeros(1), snr_gamma=5.0, parameterisation="v")
    assert loss.item() == 0


def test_reconstruction() -> None:
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    decoded = (pixels + 0.1 * torch.randn(2, 3, 8, 8, generator=generator)).requires_grad_(True)
    kl = torch.tensor([0.3, 0.7])
    loss, metrics = supervised.reconstruction(pixels, decoded, kl, l1=1.5, l2=2.0, kl_weight=0.01)
    gap = decoded.detach().double().numpy() - pixels.double().numpy()
    expected = 1.5 * np.abs(gap).mean() + 2 * (gap**2).mean() + 0.01 * 0.5
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["kl"].item() == pytest.approx(0.5)
    loss.backward()
    assert decoded.grad is not None
    np.testing.assert_allclose(decoded.grad.numpy(), (1.5 * np.sign(gap) + 4 * gap) / gap.size, rtol=1e-4, atol=1e-9)


# ----------------------------------------------------------------------------------------------------- reward


def _unit_rows(count: int, seed: int) -> Tensor:
    rows = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def _numeric_gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        high, low = at.copy(), at.copy()
        high[index] += step
        low[index] -= step
        gradient[index] = (function(high) - function(low)) / (2 * step)
    return gradient


def test_hps() -> None:
    winner, loser, text = _unit_rows(B, 1), _unit_rows(B, 2), _unit_rows(B, 3)
    label = torch.tensor([1, 0, 0.5, 1, 0.25, 1])
    winner.requires_grad_(True)
    scale = torch.tensor(math.log(14.0), requires_grad=True)
    loss, metrics = reward.hps(winner, loser, text, scale, label)

    def closed(w: np.ndarray, temperature: float = 14.0) -> float:
        gap = temperature * ((w - loser.double().numpy()) * text.double().numpy()).sum(1)
        p = label.double().numpy()
        return float(np.mean(-p * _log_sigmoid(gap) - (1 - p) * _log_sigmoid(-gap)))

    at = winner.detach().double().numpy()
    assert loss.item() == pytest.approx(closed(at), rel=1e-5)
    loss.backward()
    assert winner.grad is not None and scale.grad is not None
    np.testing.assert_allclose(winner.grad.numpy(), _numeric_gradient(closed, at), rtol=1e-4, atol=1e-6)
    by_scale = (closed(at, 14 * math.exp(1e-5)) - closed(at, 14 * math.exp(-1e-5))) / 2e-5
    assert scale.grad.item() == pytest.approx(by_scale, rel=1e-3)
    gap = ((at - loser.double().numpy()) * text.double().numpy()).sum(1)
    assert metrics["pairwise_accuracy"].item() == pytest.approx(np.mean(gap > 0))


def test_hps_between_equal_images_is_ln_2_and_half_right() -> None:
    image, text = _unit_rows(B, 1), _unit_rows(B, 2)
    loss, metrics = reward.hps(image, image, text, torch.tensor(4.6), torch.ones(B))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["pairwise_accuracy"].item() == 0.5


def test_contrastive() -> None:
    image, text = _unit_rows(B, 4).requires_grad_(True), _unit_rows(B, 5)
    loss, metrics = reward.contrastive(image, text, torch.tensor(math.log(10.0)))

    def closed(rows: np.ndarray) -> float:
        logits = 10 * rows @ text.double().numpy().T
        both = [np.log(np.exp(part).sum(1)) - np.diag(part) for part in (logits, logits.T)]
        return float(np.mean(both))

    at = image.detach().double().numpy()
    assert loss.item() == pytest.approx(closed(at), rel=1e-5)
    loss.backward()
    assert image.grad is not None
    np.testing.assert_allclose(image.grad.numpy(), _numeric_gradient(closed, at), rtol=1e-4, atol=1e-6)
    right = (at @ text.double().numpy().T).argmax(1) == np.arange(B)
    assert metrics["retrieval_accuracy"].item() == pytest.approx(right.mean())


def test_contrastive_of_equal_embeddings_is_ln_b() -> None:
    same = _unit_rows(1, 6).expand(B, -1)
    loss, _ = reward.contrastive(same, same, torch.tensor(0.0))
    assert loss.item() == pytest.approx(math.log(B), rel=1e-6)
