"""Every preference objective against its formula in float64, gradients included."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradient_kit import numeric_gradient
from objective_kit import (
    BETA,
    BY_KIND,
    GIVEN,
    KAPPA,
    PHI,
    B,
    call,
    function_of,
    log_sigmoid,
    members_of,
    rand,
    shape_of,
    sigmoid,
)


def _reward(model: np.ndarray, reference: np.ndarray, beta: Any = BETA) -> np.ndarray:
    return -KAPPA * beta * (model - reference)


# ------------------------------------------------------------------------------- the formulas, written once more


def _dpo_each(logit: Any, label: Any) -> Any:
    return -label * log_sigmoid(logit) - (1 - label) * log_sigmoid(-logit)


def _pair(change: Callable[[np.ndarray], np.ndarray]) -> Callable[..., float]:
    """A pairwise loss that is a function of the logit alone: `change` of +logit and of -logit, mixed by the label."""

    def closed(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray], **settings: Any) -> float:
        reward = _reward(model, reference)
        logit = reward[:, 0] - reward[:, 1]
        each = g["label"] * change(logit, **settings) + (1 - g["label"]) * change(-logit, **settings)
        return float(np.mean(g["weight"] * each))

    return closed


def _flow(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray], beta_schedule: str) -> float:
    scale = (1 - g["t"]) ** 2 if beta_schedule == "(1-t)^2" else np.ones(B)
    reward = _reward(model, reference, BETA * scale[:, None])
    return float(np.mean(g["weight"] * _dpo_each(reward[:, 0] - reward[:, 1], g["label"])))


def _f_dpo(
    model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray], divergence: str, alpha: float, scale: float
) -> float:
    u = np.exp(scale * _reward(model, reference))
    slope = {
        "reverse_kl": np.log(u) + 1, "forward_kl": -1 / u, "js": np.log(2 * u / (1 + u)),
        "alpha": (1 - u ** (-alpha)) / alpha,
    }[divergence]  # fmt: skip
    return float(np.mean(g["weight"] * _dpo_each((slope[:, 0] - slope[:, 1]) / scale, g["label"])))


def _dspo(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray], beta: float) -> float:
    """In the scalars: cross = <m - target, ref - target> from the cosine rule, then the square written out."""
    reward = _reward(model, reference, beta)
    share = {0: g["label"], 1: 1 - g["label"]}
    total = 0.0
    for w, likely in share.items():
        gate = beta * (1 - sigmoid(reward[:, w] - reward[:, 1 - w]))
        e, r, d = model[:, w], reference[:, w], g["drift"][:, w]
        cross = (e + r - d) / 2
        total += float(np.mean(g["weight"] * likely * (e - 2 * gate * (e - cross) + gate**2 * d)))
    return total


def _mapo(model: np.ndarray, reference: None, g: dict[str, np.ndarray], beta: float, a: float, t: float) -> float:
    f = a * model / (np.exp(a * model) - 1)
    own = g["label"] * model[:, 0] + (1 - g["label"]) * model[:, 1]
    return float(np.mean(g["weight"] * (own + beta * _dpo_each(t * (f[:, 0] - f[:, 1]), g["label"]))))


def _npo(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray]) -> float:
    reward = _reward(model, reference)
    return float(np.mean(g["weight"] * _dpo_each(reward[:, 1] - reward[:, 0], g["label"])))


def _video(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray], pivot: float, power: float) -> float:
    reward = _reward(model, reference)
    dup = (pivot / (g["scores"][:, 0] * g["scores"][:, 1])) ** power
    return float(np.mean(g["weight"] * dup * _dpo_each(reward[:, 0] - reward[:, 1], g["label"])))


def _smpo(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray], gamma: float) -> float:
    alpha = gamma * np.exp(g["gap"]) / (np.exp(g["gap"]) + 1)  # softmax of (gap, 0)
    reward = _reward(model, reference)
    return float(np.mean(g["weight"] * -log_sigmoid((2 * alpha - gamma) * (reward[:, 0] - reward[:, 1]))))


def _margin(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray], scale: float, rate: float) -> float:
    beta = BETA * (1 + scale * (1 - np.exp(-rate * g["gap"])))
    reward = _reward(model, reference, beta[:, None])
    return float(np.mean(g["weight"] * _dpo_each(reward[:, 0] - reward[:, 1], g["label"])))


def _strength(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray], power: float) -> float:
    reward = _reward(model, reference)
    each = g["gap"] ** power / g["mean_strength"] * _dpo_each(reward[:, 0] - reward[:, 1], g["label"])
    return float(np.mean(g["weight"] * each))


def _rank_of(score: np.ndarray, members: list[int], j: int) -> float:
    higher = sum(score[m] > score[j] for m in members)
    tied = sum(score[m] == score[j] for m in members)
    return higher + (1 + tied) / 2


def _dcg(score_for_rank: str) -> Callable[..., float]:
    def closed(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray]) -> float:
        reward, total = _reward(model, reference), []
        for i in range(B):
            members, each = members_of(i), 0.0
            ranked = PHI[i] if score_for_rank == "phi" else reward[i]
            for a, b in itertools.permutations(members, 2):
                if PHI[i, a] > PHI[i, b]:
                    gain = abs(2 ** PHI[i, a] - 2 ** PHI[i, b])
                    discount = [1 / math.log(1 + _rank_of(ranked, members, m)) for m in (a, b)]
                    each += gain * abs(discount[0] - discount[1]) * -log_sigmoid(reward[i, a] - reward[i, b])
            total.append(each)
        return float(np.mean(g["weight"] * np.array(total)))

    return closed


def _plackett(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray]) -> float:
    reward, total = _reward(model, reference), []
    for i in range(B):
        each = 0.0
        for a in members_of(i):
            rivals = [a, *(b for b in members_of(i) if PHI[i, b] < PHI[i, a])]
            each -= reward[i, a] - np.log(sum(np.exp(reward[i, b]) for b in rivals))
        total.append(each)
    return float(np.mean(g["weight"] * np.array(total)))


def _pro(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray], sft: float) -> float:
    reward, total = _reward(model, reference), []
    for i in range(B):
        members, each = members_of(i), 0.0
        for a in members:
            worse = [b for b in members if PHI[i, b] < PHI[i, a]]
            if worse:
                temperature = {b: 1 / (PHI[i, a] - PHI[i, b]) for b in worse}
                own = np.exp(reward[i, a] / min(temperature.values()))
                each -= np.log(own / (own + sum(np.exp(reward[i, b] / temperature[b]) for b in worse)))
        top = max(PHI[i, b] for b in members)
        best = [b for b in members if PHI[i, b] == top]
        total.append(each + sft * np.mean(model[i, best]))
    return float(np.mean(g["weight"] * np.array(total)))


def _kto(
    model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray], utility: str, up: float, down: float
) -> float:
    reward, liked = -1.0 * BETA * (model - reference), g["desirable"]
    origin = max(0.0, (FIXED["kto"][liked].mean() + FIXED["kto"][~liked].mean()) / 2)
    z = np.where(liked, 1, -1) * (reward - origin)
    value = {"kahneman_tversky": sigmoid(z), "loss_averse": log_sigmoid(z), "risk_seeking": -log_sigmoid(-z)}[utility]
    return float(np.mean(g["weight"] * np.where(liked, up, down) * (1 - value)))


def _bco(model: np.ndarray, reference: np.ndarray, g: dict[str, np.ndarray]) -> float:
    reward, liked = _reward(model, reference), g["desirable"]
    delta = (FIXED["bco"][liked].mean() + FIXED["bco"][~liked].mean()) / 2
    return float(np.mean(g["weight"] * -log_sigmoid(np.where(liked, 1, -1) * (reward - delta))))


def _rwr(
    model: np.ndarray, reference: None, g: dict[str, np.ndarray], weighting: str, temperature: float, cap: float
) -> float:
    total = []
    for i in range(B):
        members = members_of(i)
        r = g["reward"][i, members]
        weights = {
            "raw": np.minimum(r, cap), "exponential": np.minimum(np.exp(r / temperature), cap),
            "softmax": len(members) * np.exp(r / temperature) / np.exp(r / temperature).sum(),
        }[weighting]  # fmt: skip
        total.append(np.mean(weights * model[i, members]))
    return float(np.mean(g["weight"] * np.array(total)))


def _best(model: np.ndarray, reference: None, g: dict[str, np.ndarray]) -> float:
    total = []
    for i in range(B):
        members = members_of(i)
        top = [m for m in members if g["reward"][i, m] == g["reward"][i, members].max()]
        total.append(np.mean(model[i, top]))
    return float(np.mean(g["weight"] * np.array(total)))


FIXED: dict[
    str, np.ndarray
] = {}  # rewards through which no gradient goes, held while the closed form is differentiated

CASES: list[tuple[str, dict[str, Any], Callable[..., float], dict[str, Any]]] = [
    ("diffusion_dpo", {}, _pair(lambda x: -log_sigmoid(x)), {}),
    ("jpo", {}, _pair(lambda x: -log_sigmoid(x)), {}),
    ("flow_dpo", {"beta_schedule": "constant"}, _flow, {"beta_schedule": "constant"}),
    ("flow_dpo", {"beta_schedule": "(1-t)^2"}, _flow, {"beta_schedule": "(1-t)^2"}),
    ("ipo", {}, _pair(lambda x: BETA**2 * (x / BETA - 1 / (2 * BETA)) ** 2), {}),
    ("hinge", {}, _pair(lambda x: np.maximum(0, 1 - x)), {}),
    ("conservative_dpo", {"flip_rate": 0.2}, _pair(lambda x: -0.8 * log_sigmoid(x) - 0.2 * log_sigmoid(-x)), {}),
    ("robust_dpo", {"flip_rate": 0.2}, _pair(lambda x: (-0.8 * log_sigmoid(x) + 0.2 * log_sigmoid(-x)) / 0.6), {}),
    *(
        ("f_dpo", {"divergence": d, "alpha": 0.3, "scale": s}, _f_dpo, {"divergence": d, "alpha": 0.3, "scale": s})
        for d in ("reverse_kl", "forward_kl", "js", "alpha")
        for s in (1.0, 0.2)
    ),
    ("dspo", {"beta": 0.8}, _dspo, {"beta": 0.8}),
    ("mapo", {"beta": 0.2, "sharpness": 0.5, "timesteps": 1000.0}, _mapo, {"beta": 0.2, "a": 0.5, "t": 1000.0}),
    ("diffusion_npo", {}, _npo, {}),
    ("video_dpo", {"pivot": 0.72, "power": 1.5}, _video, {"pivot": 0.72, "power": 1.5}),
    ("smpo", {"gamma": 10.0}, _smpo, {"gamma": 10.0}),
    ("margin_dpo", {"scale": 0.5, "rate": 4.0}, _margin, {"scale": 0.5, "rate": 4.0}),
    ("strength_dpo", {"power": 0.5}, _strength, {"power": 0.5}),
    ("rank_dpo", {}, _dcg("phi"), {}),
    ("lipo", {}, _dcg("reward"), {}),
    ("plackett_luce", {}, _plackett, {}),
    ("pro", {"sft": 0.05}, _pro, {"sft": 0.05}),
    *(
        ("diffusion_kto", {"utility": u, "kappa": 1.0, "desirable_weight": 1.3, "undesirable_weight": 0.6}, _kto,
         {"utility": u, "up": 1.3, "down": 0.6})
        for u in ("kahneman_tversky", "loss_averse", "risk_seeking")
    ),
    ("bco", {}, _bco, {}),
    *(
        ("rwr", {"weighting": w, "temperature": 0.4, "max_weight": 9.0}, _rwr,
         {"weighting": w, "temperature": 0.4, "cap": 9.0})
        for w in ("raw", "exponential", "softmax")
    ),
    ("best_of_group", {}, _best, {}),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(
    ("kind", "settings", "closed", "own"), CASES, ids=[f"{c[0]}-{'-'.join(map(str, c[1].values()))}" for c in CASES]
)
def test_loss_and_gradient_are_the_formula(
    kind: str, settings: dict[str, Any], closed: Callable[..., float], own: dict[str, Any]
) -> None:
    shape = shape_of(kind)
    # Numbers that float32 holds exactly enough: both sides see the same errors.
    model, reference = (torch.tensor(rand(*shape, seed=seed)).float() for seed in (1, 2))
    at, ref = model.double().numpy(), reference.double().numpy()
    FIXED["kto"], FIXED["bco"] = -1.0 * BETA * (at - ref), _reward(at, ref)
    model.requires_grad_(True)
    loss, metrics = call(kind, model, reference, settings)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    expected = closed(at, ref, GIVEN, **own)
    assert loss.item() == pytest.approx(expected, rel=2e-4, abs=2e-5)
    loss.backward()
    numeric = numeric_gradient(lambda m: closed(m, ref, GIVEN, **own), at)
    assert model.grad is not None
    np.testing.assert_allclose(model.grad.double().numpy(), numeric, rtol=2e-3, atol=2e-4 * np.abs(numeric).max())
    assert np.abs(numeric).max() > 0
    assert not any(value.requires_grad for value in metrics.values())


def test_every_objective_has_a_closed_form_here() -> None:
    assert {case[0] for case in CASES} == set(BY_KIND)


@pytest.mark.parametrize("kind", BY_KIND)
def test_settings_and_needs_are_the_functions_parameters(kind: str) -> None:
    """The task passes errors by position, then needs, averages and settings by name: nothing missing, nothing over."""
    cls = BY_KIND[kind]
    parameters = inspect.signature(function_of(kind)).parameters
    by_position = ["model"] if cls.reference_free else ["model", "reference"]
    assert list(parameters)[: len(by_position)] == by_position
    passed = {*by_position, *cls.needs, *cls.tracked, *cls().own()}
    assert passed == set(parameters)
    assert cls.__doc__ and "\n" not in cls.__doc__.strip()
