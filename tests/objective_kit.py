"""What the tests of the objectives share: numbers to call each with, and one way to call any of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.methods import PREFERENCES, Preference

B, K = 5, 4
BETA, KAPPA = 300.0, 0.5
BY_KIND: dict[str, type[Preference]] = {cls.model_fields["kind"].default: cls for cls in PREFERENCES}
OWN_BETA = {"dspo": {"beta": 0.8}}  # must be below 1
WITH_REFERENCE = [kind for kind, cls in BY_KIND.items() if not cls.reference_free]


def rand(*shape: int, seed: int, scale: float = 1e-2, mean: float = 1.0) -> np.ndarray:
    return mean + scale * np.random.default_rng(seed).standard_normal(shape)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def log_sigmoid(x: Any) -> Any:
    return -np.logaddexp(0, -np.asarray(x, float))


PHI = np.array([[1, 2 / 3, 1 / 3, 0], [0.5, 0.5, 1, 0], [0.2, 0.9, 0.4, 0.4], [0, 0.1, 0.6, 0], [1, 0, 0, 0]])
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]], bool)
GIVEN: dict[str, np.ndarray] = {
    "label": np.array([1, 0.5, 0.8, 1, 0.25]),
    "weight": np.array([1, 0.5, 2, 1, 0]),
    "t": np.array([0.05, 0.3, 0.5, 0.8, 0.99]),
    "drift": np.abs(rand(B, 2, seed=9, scale=1e-3, mean=2e-3)),
    "scores": np.array([[0.9, 0.8], [0.7, 0.7], [0.5, 0.2], [1, 0.9], [0.6, 0.3]]),
    "gap": np.array([0, 0.1, 0.4, 0.9, 1]),
    "mean_strength": np.array(0.48),
    "phi": PHI,
    "reward": PHI * 1.5,
    "mask": MASK,
    "desirable": np.array([True, False, True, True, False]),
}


def members_of(i: int) -> list[int]:
    return [j for j in range(K) if MASK[i, j]]


def function_of(kind: str) -> Callable[..., Any]:
    module, _, name = BY_KIND[kind].function.partition(":")
    return getattr(importlib.import_module(module), name)


def shape_of(kind: str) -> tuple[int, ...]:
    return {"pairs": (B, 2), "lists": (B, K), "singles": (B,)}[BY_KIND[kind].items]


def call(
    kind: str, model: Tensor, reference: Tensor | None, settings: dict[str, Any], **changes: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    cls = BY_KIND[kind]
    given = {name: torch.as_tensor(GIVEN[name]) for name in cls.needs} | changes
    beta = {"beta": BETA} if "beta" in cls.model_fields and kind not in OWN_BETA else {}
    own = cls(**{**beta, **OWN_BETA.get(kind, {}), **settings}).own()
    tensors = (model,) if cls.reference_free else (model, reference)
    return function_of(kind)(*tensors, **given, **own)


def pairs_of_errors(seed: int = 3) -> tuple[Tensor, Tensor]:
    return torch.tensor(rand(B, 2, seed=seed)).float(), torch.tensor(rand(B, 2, seed=seed + 1)).float()
