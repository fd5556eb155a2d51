"""Objectives on answers against formulas written out in NumPy, gradients by central differences, limits and identities.

What TRL has too is compared with TRL in test_mllm_trl.py, through whole models.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gradient_kit import numeric_gradient
from torch import Tensor

from mmalign.losses import answer_terms as terms
from mmalign.losses import answer_tokens as tokens
from mmalign.losses import answers
from mmalign.losses.answers import Pairs, Score, Scores, Side

B, T, BETA, LN2 = 4, 6, 0.7, math.log(2)
LENGTHS = ((6, 3, 1, 4), (2, 5, 1, 6))


def _mask(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(T)[None] < torch.tensor(lengths)[:, None]


def _table(seed: int, mask: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(B, T, generator=generator, dtype=torch.float64) * 2 * mask


def _pairs(**more: Any) -> Pairs:
    sides = []
    for number, lengths in enumerate(LENGTHS):
        mask = _mask(lengths)
        names = ("policy", "reference", "blind", "blind_reference")
        values = {name: _table(10 * number + i, mask) for i, name in enumerate(names)}
        changed = torch.rand(B, T, generator=torch.Generator().manual_seed(number)) < 0.5
        sides.append(Side(mask=mask, changed=changed & mask, kl=_table(99 + number, mask).abs(), **values))
    return Pairs(sides[0], sides[1], weight=torch.ones(B, dtype=torch.float64), **more)


def _scores(**more: Any) -> Scores:
    return tokens.plain(_pairs(**more))


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x: Any) -> Any:
    return np.log(sigmoid(x))


def n(value: Tensor | None) -> np.ndarray:
    assert value is not None
    return value.detach().double().numpy()


def _ratios(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    return tuple(n(s.policy) - n(s.reference) for s in (scores.chosen, scores.rejected))  # type: ignore[return-value]


def _means(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    return tuple(n(s.policy) / n(s.length) for s in (scores.chosen, scores.rejected))  # type: ignore[return-value]


def _jpo(w: np.ndarray, r: np.ndarray) -> np.ndarray:
    return np.array([np.mean([-log_sigmoid(BETA * (w[i] - r[j])) for j in range(B) if j != i]) for i in range(B)])


def _odds(mean: np.ndarray) -> np.ndarray:
    p = np.exp(mean)
    return np.log(p / (1 - p))


SAFER = torch.tensor([1.0, -1.0, 0.0, -1.0])
FORMULAS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], Callable[[Scores, Any, Any], Any]]] = {
    "dpo": (terms.dpo, {}, lambda s, w, r: -log_sigmoid(BETA * (w - r))),
    "conservative": (
        terms.conservative, {"flip_rate": 0.2},
        lambda s, w, r: -0.8 * log_sigmoid(BETA * (w - r)) - 0.2 * log_sigmoid(-BETA * (w - r)),
    ),
    "robust": (
        terms.robust, {"flip_rate": 0.2},
        lambda s, w, r: (-0.8 * log_sigmoid(BETA * (w - r)) + 0.2 * log_sigmoid(-BETA * (w - r))) / 0.6,
    ),
    "hinge": (terms.hinge, {}, lambda s, w, r: np.maximum(0, 1 - BETA * (w - r))),
    "ipo": (
        terms.ipo, {},
        lambda s, w, r: (w / n(s.chosen.length) - r / n(s.rejected.length) - 1 / (2 * BETA)) ** 2,
    ),
    "ipo_sum": (terms.ipo, {"average": False}, lambda s, w, r: (w - r - 1 / (2 * BETA)) ** 2),
    "dpo_norm": (
        terms.dpo_norm, {}, lambda s, w, r: -log_sigmoid(BETA * (w / n(s.chosen.length) - r / n(s.rejected.length)))
    ),
    "f_dpo_forward": (
        terms.f_dpo, {"divergence": "forward_kl"}, lambda s, w, r: -log_sigmoid(BETA * (np.exp(-r) - np.exp(-w)))
    ),
    "f_dpo_js": (
        terms.f_dpo, {"divergence": "js"},
        lambda s, w, r: -log_sigmoid(BETA * np.log(2 * sigmoid(w) / (2 * sigmoid(r)))),
    ),
    "f_dpo_alpha": (
        terms.f_dpo, {"divergence": "alpha", "alpha": 0.3},
        lambda s, w, r: -log_sigmoid(BETA * (np.exp(-0.7 * w) - np.exp(-0.7 * r)) / -0.7),
    ),
    "jpo": (terms.jpo, {}, lambda s, w, r: _jpo(w, r)),
    "bco_pair": (
        terms.bco_pair, {"shift": 0.3}, lambda s, w, r: -log_sigmoid(BETA * w - 0.3) - log_sigmoid(0.3 - BETA * r)
    ),
    "sppo_hard": (terms.sppo_hard, {}, lambda s, w, r: (w - 0.5 / BETA) ** 2 + (r + 0.5 / BETA) ** 2),
    "nca_pair": (
        terms.nca_pair, {},
        lambda s, w, r: -log_sigmoid(BETA * w) - log_sigmoid(-BETA * w) / 2 - log_sigmoid(-BETA * r) / 2,
    ),
    "exo_pair": (
        terms.exo_pair, {"flip_rate": 0.1},
        lambda s, w, r: sigmoid(BETA * (w - r)) * np.log(sigmoid(BETA * (w - r)) / 0.9)
        + sigmoid(BETA * (r - w)) * np.log(sigmoid(BETA * (r - w)) / 0.1),
    ),
    "apo_zero": (terms.apo_zero, {}, lambda s, w, r: 1 - sigmoid(BETA * w) + sigmoid(BETA * r)),
    "apo_down": (terms.apo_down, {}, lambda s, w, r: sigmoid(BETA * w) + 1 - sigmoid(BETA * (w - r))),
    "discopop": (
        terms.discopop, {"tau": 0.4},
        lambda s, w, r: -log_sigmoid(BETA * (w - r)) * (1 - sigmoid(BETA * (w - r) / 0.4))
        + np.exp(-BETA * (w - r)) * sigmoid(BETA * (w - r) / 0.4),
    ),
    "aot": (
        terms.aot, {"flip_rate": 0.1},
        lambda s, w, r: _smoothed(
            np.sort(n(s.chosen.policy) - n(s.rejected.policy))
            - np.sort(n(s.chosen.reference) - n(s.rejected.reference))
        ),
    ),
    "aot_unpaired": (terms.aot_unpaired, {"flip_rate": 0.1}, lambda s, w, r: _smoothed(np.sort(w) - np.sort(r))),
    "orpo": (
        terms.orpo, {}, lambda s, w, r: -_means(s)[0] - BETA * log_sigmoid(_odds(_means(s)[0]) - _odds(_means(s)[1]))
    ),
    "simpo": (terms.simpo, {"gamma": 0.4}, lambda s, w, r: -log_sigmoid(BETA * (_means(s)[0] - _means(s)[1]) - 0.4)),
    "kto": (
        terms.kto, {"desirable_weight": 1.3, "undesirable_weight": 0.6},
        lambda s, w, r: (1.3 * (1 - sigmoid(BETA * (w - 0.2))) + 0.6 * (1 - sigmoid(BETA * (0.2 - r)))) / 2,
    ),
    "image_dpo": (
        terms.image_dpo, {},
        lambda s, w, r: -log_sigmoid(BETA * (w - (n(s.chosen.blind) - n(s.chosen.blind_reference)))),
    ),
    "anchor": (terms.anchor, {"delta": 0.3}, lambda s, w, r: -log_sigmoid(BETA * w - 0.3)),
    "chip": (
        terms.chip, {"token_beta": 0.4},
        lambda s, w, r: -log_sigmoid(BETA * (
            w - r + w - (n(s.chosen.blind) - n(s.chosen.blind_reference)) - 0.4 * (n(s.rejected.kl) - n(s.chosen.kl))
        )),
    ),
    "safe_dpo": (
        terms.safe_dpo, {"multiplier": 1.5},
        lambda s, w, r: np.array([
            (-log_sigmoid(BETA * h) + 1.5 * -log_sigmoid(BETA * h * z)) / 2.5 if z else -log_sigmoid(BETA * h)
            for h, z in zip(w - r, SAFER.tolist(), strict=True)
        ]),
    ),
}  # fmt: skip


def _smoothed(delta: np.ndarray) -> np.ndarray:
    return -0.9 * log_sigmoid(BETA * delta) - 0.1 * log_sigmoid(-BETA * delta)


def _given() -> dict[str, Any]:
    return {"safer": SAFER.double(), "drift": torch.tensor(0.2, dtype=torch.float64)}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_term_is_its_formula(name: str) -> None:
    function, settings, formula = FORMULAS[name]
    scores = _scores(**_given())
    found = function(scores, beta=BETA, **settings)  # sums are float32 inside; the formulas get the same sums
    np.testing.assert_allclose(n(found), formula(scores, *_ratios(scores)), rtol=2e-6, atol=1e-6)


def _double(policy: Tensor, other: Tensor, blind: Tensor, kl: Tensor, scores: Scores) -> Scores:
    """Sequence scores in float64 with these policy numbers."""

    def score(of: Score, policy: Tensor, kl: Tensor) -> Score:
        assert of.reference is not None
        assert of.blind_reference is not None
        return Score(policy, of.reference.double(), of.length, blind, of.blind_reference.double(), kl)

    return Scores(
        score(scores.chosen, policy, scores.chosen.kl.double()), score(scores.rejected, other, kl),  # type: ignore[union-attr]
        drift=scores.drift, safer=scores.safer, nll=scores.nll,
    )  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_by_central_differences(name: str) -> None:
    function, settings, _ = FORMULAS[name]
    scores = _scores(**_given())
    start = [n(scores.chosen.policy), n(scores.rejected.policy), n(scores.chosen.blind), n(scores.rejected.kl)]
    flat = torch.tensor(np.concatenate(start), requires_grad=True)
    weights = torch.linspace(0.5, 1.5, B, dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        return (function(_double(*values.split(B), scores), beta=BETA, **settings) * weights).sum()

    loss(flat).backward()
    expected = numeric_gradient(lambda values: loss(torch.tensor(values)).item(), n(flat))
    assert flat.grad is not None
    np.testing.assert_allclose(n(flat.grad), expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------- limits, identities


def _alike() -> Scores:
    """The policy is the reference, under both images."""
    pairs = _pairs()
    sides = [
        Side(s.policy, s.mask, s.policy, s.changed, s.blind, s.blind, torch.zeros_like(s.policy))
        for s in (pairs.chosen, pairs.rejected) if s is not None
    ]  # fmt: skip
    return tokens.plain(Pairs(sides[0], sides[1], pairs.weight, safer=SAFER, drift=torch.tensor(0.0)))


@pytest.mark.parametrize(
    "name", ["dpo", "conservative", "dpo_norm", "f_dpo_js", "jpo", "image_dpo", "chip", "safe_dpo"]
)
def test_a_policy_that_is_its_reference_loses_ln_2(name: str) -> None:
    function, settings, _ = FORMULAS[name]
    torch.testing.assert_close(function(_alike(), beta=BETA, **settings).double(), torch.full((B,), LN2).double())


def test_limits() -> None:
    scores = _scores(**_given())
    plain = terms.dpo(scores, beta=BETA)
    same = {
        "conservative": terms.conservative(scores, beta=BETA, flip_rate=0.0),
        "robust": terms.robust(scores, beta=BETA, flip_rate=0.0),
        "reverse KL": terms.f_dpo(scores, beta=BETA, divergence="reverse_kl"),
        "alpha 1": terms.f_dpo(scores, beta=BETA, divergence="alpha", alpha=1.0),
        "no multiplier": terms.safe_dpo(scores, beta=BETA, multiplier=0.0),
        "gamma 1": terms.dpo(tokens.segments(_pairs(), gamma=1.0, normalise=False), beta=BETA),
        "ld 1": terms.dpo(tokens.ld(_pairs(), alpha=1.0), beta=BETA),
    }
    for name, value in same.items():
        torch.testing.assert_close(value, plain, check_dtype=False, msg=name)
    forward = terms.f_dpo(scores, beta=BETA, divergence="forward_kl")
    torch.testing.assert_close(terms.f_dpo(scores, beta=BETA, divergence="alpha", alpha=0.0), forward)
    mean = terms.dpo(tokens.mean(_pairs()), beta=BETA)
    torch.testing.assert_close(mean, terms.dpo_norm(scores, beta=BETA))
    torch.testing.assert_close(terms.dpo(tokens.segments(_pairs(), gamma=1.0), beta=BETA), mean)


def test_bad_flip_rates_are_refused() -> None:
    with pytest.raises(ValueError, match=r"flip_rate is 0.5; it must lie in \[0, 0.5\)"):
        terms.robust(_scores(), beta=BETA, flip_rate=0.5)


def test_chip_holds_the_chosen_answers_kl() -> None:
    scores = _scores()
    held, moved = (torch.ones(B, requires_grad=True) for _ in range(2))
    chosen, rejected = (
        Score(s.policy, s.reference, s.length, s.blind, s.blind_reference, kl)
        for s, kl in ((scores.chosen, held), (scores.rejected, moved))
    )
    terms.chip(Scores(chosen, rejected), beta=BETA).sum().backward()
    assert held.grad is None
    assert moved.grad is not None


def test_kto_on_labels_is_kto_on_pairs() -> None:
    pairs = _pairs(drift=torch.tensor(0.1))
    assert pairs.rejected is not None
    both = terms.kto(tokens.plain(pairs), beta=BETA)
    halves = [
        terms.kto(
            tokens.plain(Pairs(side, None, pairs.weight, label=torch.full((B,), label), drift=pairs.drift)), beta=BETA
        )
        for side, label in ((pairs.chosen, 1.0), (pairs.rejected, 0.0))
    ]
    torch.testing.assert_close(both, (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("name", [name for name in FORMULAS if name not in ("jpo", "aot", "aot_unpaired")])
def test_rows_do_not_see_each_other(name: str) -> None:
    function, settings, _ = FORMULAS[name]
    whole = function(_scores(**_given()), beta=BETA, **settings)
    for i in range(B):
        pairs = _pairs(**_given())
        assert pairs.rejected is not None
        sides = [
            Side(**{k: None if v is None else v[i : i + 1] for k, v in vars(side).items()})
            for side in (pairs.chosen, pairs.rejected)
        ]
        one = tokens.plain(Pairs(*sides, pairs.weight[:1], safer=SAFER[i : i + 1], drift=pairs.drift))
        found = function(one, beta=BETA, **settings)
        torch.testing.assert_close(found, whole[i : i + 1], check_dtype=False)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_batch_of_one_is_finite(name: str) -> None:
    function, settings, _ = FORMULAS[name]
    score = Score(*(torch.tensor([value]) for value in (-3.0, -2.5, 4.0, -3.5, -2.0, 0.3)))
    scores = Scores(score, score, drift=torch.tensor(0.0), safer=torch.tensor([1.0]), nll=torch.tensor(0.5))
    assert torch.isfinite(function(scores, beta=BETA, **settings)).all()
    extreme = Score(*(torch.tensor([value]) for value in (-1e-9, -2000.0, 4.0, -3000.0, -1.0, 5.0)))
    far = Scores(score, extreme, drift=torch.tensor(0.0), safer=torch.tensor([1.0]))
    assert torch.isfinite(function(far, beta=BETA, **settings)).all()


# ------------------------------------------------------------------------------------------------------------- tokens


def test_segments_by_the_paper_and_as_released() -> None:
    pairs = _pairs()
    side, gamma = pairs.chosen, 5.0
    paper, released = (tokens.segments(pairs, gamma=gamma, normalise=way).chosen for way in (True, False))
    for i in range(B):
        marks = [(float(side.policy[i, t]), bool(_one(side.changed)[i, t])) for t in range(T) if side.mask[i, t]]
        total = sum(value * (gamma if changed else 1) for value, changed in marks)
        norm = sum(gamma if changed else 1 for _, changed in marks)
        assert paper.policy[i].item() == pytest.approx(total / norm, rel=1e-6)
        assert released.policy[i].item() == pytest.approx(total, rel=1e-6)


def _one(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def test_ld_counts_the_tail_less() -> None:
    pairs = _pairs()
    found = tokens.ld(pairs, alpha=0.25)
    for side, score in ((pairs.chosen, found.chosen), (pairs.rejected, found.rejected)):
        assert side is not None
        for i in range(B):
            shared = min(LENGTHS[0][i], LENGTHS[1][i])
            row = side.policy[i].tolist()
            assert score.policy[i].item() == pytest.approx(sum(row[:shared]) + 0.25 * sum(row[shared:]), rel=1e-6)


def test_only_what_changed_counts() -> None:
    pairs = _pairs()
    want = (pairs.chosen.policy * _one(pairs.chosen.changed)).sum(1)
    torch.testing.assert_close(tokens.changed_only(pairs).chosen.policy.double(), want, rtol=1e-6, atol=1e-6)


def test_padding_changes_nothing() -> None:
    pairs = _pairs()
    assert pairs.rejected is not None

    def wider(side: Side) -> Side:
        given = {name: value for name, value in vars(side).items() if value is not None}
        return Side(**{name: torch.nn.functional.pad(value, (0, 3)) for name, value in given.items()})

    padded = Pairs(wider(pairs.chosen), wider(pairs.rejected), pairs.weight)
    for transform in (tokens.plain, tokens.mean, tokens.segments, tokens.ld, tokens.changed_only):
        one, other = transform(pairs), transform(padded)
        torch.testing.assert_close(one.chosen.policy, other.chosen.policy)
        torch.testing.assert_close(one.rejected.policy, other.rejected.policy)
        torch.testing.assert_close(one.nll, other.nll)


@pytest.mark.parametrize(
    ("one", "other", "settings", "expected"),
    [
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], {}, ("-----", "-----")),
        ([1, 2, 3, 9, 5, 6, 7], [1, 2, 3, 8, 8, 5, 6, 7], {}, ("---x---", "---xx---")),
        (
            [1, 2, 3, 9, 5, 8, 6, 7],
            [1, 2, 3, 4, 5, 4, 6, 7],
            {},
            ("---xxxxx", "---xxxxx"),
        ),  # runs of 1 and 2 are chance
        ([1, 2, 3, 9, 5, 8, 6, 7], [1, 2, 3, 4, 5, 4, 6, 7], {"min_block": 1}, ("---x-x--", "---x-x--")),
        ([1, 2, 3], [1, 2, 3, 4, 5], {}, ("---", "---xx")),
        ([1, 2, 3], [1, 2, 3, 4, 5], {"both_sides": True}, ("---", "-----")),
        ([1, 2, 3, 9], [1, 2, 3, 4, 5], {"both_sides": True}, ("---x", "---xx")),
        ([1, 2], [3, 4, 5], {}, ("xx", "xxx")),
        ([], [1], {}, ("", "x")),
    ],
)
def test_what_two_answers_do_not_share(one: Any, other: Any, settings: Any, expected: tuple[str, str]) -> None:
    found = tokens.changed_tokens(one, other, **settings)
    assert tuple("".join("x" if mark else "-" for mark in marks) for marks in found) == expected


# ------------------------------------------------------------------------------------------------------ margins, sums


def test_margins_raise_beta_between_their_bounds() -> None:
    margin = torch.tensor([-3.0, 0.0, 0.5, 2.0, 1e4])
    found = answers.margin_beta(0.1, margin, scale=0.5, rate=0.5)
    want = [0.1 * (1 + 0.5 * (1 - math.exp(-0.5 * max(0.0, m)))) for m in margin.tolist()]
    np.testing.assert_allclose(n(found), want, rtol=1e-6)
    assert found[0] == pytest.approx(0.1)
    assert found[-1] == pytest.approx(0.15)
    assert torch.equal(answers.margin_beta(0.1, margin, scale=0.0), torch.full((5,), 0.1))


def test_the_released_beta_of_a_batch_is_finite_for_one_row() -> None:
    assert answers.batch_beta(0.1, torch.tensor([3.0])).tolist() == pytest.approx([0.1])
    h = torch.tensor([0.0, 1.0, 2.0, 3.0, 14.0])  # of these the last lies farthest from the mean of 4
    assert answers.batch_beta(0.1, h, scale=0.5).tolist() == pytest.approx([0.1 * (1 + 0.5 * (1.5 - 4))] * 5, abs=0.2)
    assert bool((answers.batch_beta(0.1, h, scale=0.5) > 0).all())


def test_weights_are_of_rows_and_terms() -> None:
    weight = torch.tensor([1.0, 0.0, 2.0])
    found = answers.combine([(0.5, torch.tensor([1.0, 5.0, 3.0])), (2.0, torch.tensor([0.0, 7.0, 1.0]))], weight)
    assert found.item() == pytest.approx(0.5 * 7 / 3 + 2.0 * 2 / 3)


def test_the_multiplier_rises_with_violations_and_stays_in_bounds() -> None:
    start = torch.tensor(0.0)
    assert terms.multiplier_step(start, torch.tensor(0.3), budget=0.1, rate=0.5).item() == pytest.approx(0.1)
    assert terms.multiplier_step(start, torch.tensor(0.0), budget=0.1, rate=0.5).item() == pytest.approx(-0.05)
    assert terms.multiplier_step(start + 5, torch.tensor(1.0), budget=0.0, rate=9.0).item() == 5.0


def test_metrics_are_scalars_and_equal_rewards_are_half_right() -> None:
    found = answers.metrics(_alike(), BETA)
    assert found["implicit_accuracy"].item() == 0.5
    assert found["image_accuracy"].item() == 0.5
    assert found["margin"].item() == 0
    assert all(value.ndim == 0 and not value.requires_grad for value in found.values())
