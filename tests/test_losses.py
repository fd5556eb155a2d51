"""Supervised and reward objectives against closed forms in float64; those of preference are in test_objectives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gradient_kit import numeric_gradient
from torch import Tensor

from mmalign.losses import reward, supervised

B = 6


def _log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


# ------------------------------------------------------------------------------------------------- supervised


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_denoising(kind: str, gamma: float | None) -> None:
    error = torch.rand(B, generator=torch.Generator().manual_seed(1), requires_grad=True)
    snr = torch.tensor([0.005, 0.5, 1, 5, 20, 1000.0])
    loss, metrics = supervised.denoising(error, snr=snr, snr_gamma=gamma, parameterisation=kind)
    ratio, raw = snr.double().numpy(), error.detach().double().numpy()
    per_x0 = {"eps": ratio, "v": ratio + 1, "flow": (1 + np.sqrt(ratio)) ** 2}[kind]  # 1 / t^2, snr = ((1 - t) / t)^2
    weight = np.ones(B) if gamma is None else np.minimum(ratio, gamma) / per_x0
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
    np.testing.assert_allclose(image.grad.numpy(), numeric_gradient(closed, at), rtol=1e-4, atol=1e-6)
    right = (at @ text.double().numpy().T).argmax(1) == np.arange(B)
    assert metrics["retrieval_accuracy"].item() == pytest.approx(right.mean())


def test_contrastive_of_equal_embeddings_is_ln_b() -> None:
    same = _unit_rows(1, 6).expand(B, -1)
    loss, _ = reward.contrastive(same, same, torch.tensor(0.0))
    assert loss.item() == pytest.approx(math.log(B), rel=1e-6)
