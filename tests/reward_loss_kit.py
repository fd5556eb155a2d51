"""Made-up scores and labels, and the objectives of scorers in numpy, for the tests of both."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

from mmalign.methods import REWARDS

B, A, K = 7, 3, 4
RNG = np.random.default_rng(0)
LABEL = np.array([1, 0, 0.5, 1, 0.25, 0.75, 1.0])
LABELS = RNG.choice([0, 0.25, 0.5, 0.8, 1], (B, A))
MASK = RNG.random((B, A)) < 0.7
WEIGHT = np.array([1, 2, 0.5, 0, 1, 3, 0.25])
SPREAD = np.array([0.05, 0.4, 1.0, 1.49, 1.51, 3.0, 9.0])
TARGET = RNG.normal(size=(B, 2))


def log_sigmoid(x: Any) -> Any:
    return -np.logaddexp(0, -x)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def mixed(pull: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any], Any]:
    """Loss of a soft label: `pull(better, worse)` both ways round, by the label."""
    return lambda w, o, p: p * pull(w, o) + (1 - p) * pull(o, w)


def btt_closed(w: Any, o: Any, p: Any, k: float = 5.0) -> Any:
    """With theta = k: P(win) = pi_w / (pi_w + k pi_l), as Rao and Kupper write it; a half is a tie."""
    win, loss = np.exp(w) / (np.exp(w) + k * np.exp(o)), np.exp(o) / (np.exp(o) + k * np.exp(w))
    tie = 1 - win - loss
    return np.where(p == 0.5, -np.log(tie), -p * np.log(win) - (1 - p) * np.log(loss))


def kl_closed(w: Any, o: Any, p: Any) -> Any:
    predicted = np.exp(w) / (np.exp(w) + np.exp(o))
    safe = np.where((p > 0) & (p < 1), p, 0.5)
    inner = safe * np.log(safe / predicted) + (1 - safe) * np.log((1 - safe) / (1 - predicted))
    return np.where(p == 1, -np.log(predicted), np.where(p == 0, -np.log(1 - predicted), inner))


def expected_closed(mean: float, spread: float) -> float:
    """The integral itself, cut where the loss bends."""
    bend = [-mean / spread] if abs(mean / spread) < 12 else None
    return quad(lambda z: np.logaddexp(0, -(mean + spread * z)) * norm.pdf(z), -13, 13, points=bend, limit=400)[0]


# kind, settings, what else the function takes, loss of each judgement
PAIRWISE: dict[str, tuple[dict[str, Any], Callable[[Any, Any, Any], Any]]] = {
    "bradley_terry": ({}, mixed(lambda b, o: -log_sigmoid(b - o))),
    "pickscore": ({}, kl_closed),
    "btt": ({"k": 5.0}, btt_closed),
    "bt_margin": ({"margin": 0.57}, mixed(lambda b, o: -np.log(sigmoid(b - o - 0.57)))),
    "likelihood_displacement": ({"tau": 0.3}, mixed(lambda b, o: -log_sigmoid(b - 0.3 * o))),
    "ranking_hinge": ({"margin": 0.8}, mixed(lambda b, o: np.maximum(0, 0.8 - (b - o)))),
}


def function_of(kind: str) -> Callable[..., Any]:
    module, _, name = next(c.function for c in REWARDS if c.model_fields["kind"].default == kind).partition(":")
    return getattr(importlib.import_module(module), name)


def tensors(*arrays: Any, grad: bool = True) -> list[Tensor]:
    return [torch.tensor(np.asarray(a), dtype=torch.float32, requires_grad=grad) for a in arrays]


def scores(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1.5, shape).astype(np.float32).astype(np.float64)
