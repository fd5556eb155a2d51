"""Duelling bandits over prompts: each part against float64 loops, and what the choice of pairs is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import optimize

from mmalign.guidance import prompts
from mmalign.noise import generator
from mmalign.stats import mean_ci


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _embeddings(count: int, width: int, seed: int) -> torch.Tensor:
    return prompts.standardised(torch.from_numpy(_rng(seed).standard_normal((count, width))))


# ------------------------------------------------------------------------------------------------ candidates


def test_a_template_is_all_its_alternatives() -> None:
    found = prompts.expand("a {small |large |}red {circle|square}{, clean|}")
    assert [each.prompt for each in found[:3]] == [
        "a small red circle, clean",
        "a small red circle",
        "a small red square, clean",
    ]
    assert len(found) == 12 and found[-1].prompt == "a red square" and found[-1].choices == (2, 1, 1)
    assert all("  " not in each.prompt and each.prompt == each.prompt.strip() for each in found)
    assert [each.prompt for each in prompts.expand("{x|x|y}")] == ["x", "y"], "what comes twice is kept once"
    assert prompts.expand("a red circle") == [prompts.Candidate("a red circle")]


def test_choices_are_one_hot() -> None:
    found = prompts.choice_features(prompts.expand("{a|b|c} {d|e}"))
    assert found.shape == (6, 5) and (found.sum(1) == 2).all()
    assert found[3].tolist() == [0, 1, 0, 0, 1]
    assert prompts.choice_features([prompts.Candidate("a"), prompts.Candidate("b")]).shape == (2, 0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: prompts.expand("a {b|c"), "each brace closed"),
        (lambda: prompts.expand("a {b|{c|d}}"), "none nested"),
        (lambda: prompts.expand("{a|b}" * 14), "16384 prompts are more than 10000"),
        (lambda: prompts.standardised(torch.ones(4, 3)), "the same embedding"),
    ],
)
def test_bad_candidates_are_named(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_standardised_embeddings() -> None:
    found = prompts.standardised(torch.randn(20, 7) * 50 + 3)
    assert found.dtype == torch.float64 and torch.allclose(
        found.mean(0), torch.zeros(7, dtype=torch.float64), atol=1e-6
    )
    assert float(found.square().sum(1).mean()) == pytest.approx(1)


# ------------------------------------------------------------------------------------------------ score


def test_the_loss_is_bradley_terry() -> None:
    scores, pairs, shares = _rng(1).standard_normal(5), [(0, 1), (3, 2), (4, 0)], [1.0, 0.0, 0.3]
    expected, slope = 0.0, np.zeros(5)
    for (a, b), y in zip(pairs, shares, strict=True):
        p = 1 / (1 + math.exp(scores[b] - scores[a]))
        expected -= y * math.log(p) + (1 - y) * math.log(1 - p)
        slope[a] += p - y
        slope[b] -= p - y
    tensor = torch.tensor(scores, requires_grad=True)
    loss = prompts.comparison_loss(tensor, torch.tensor(pairs), torch.tensor(shares, dtype=torch.float64))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert np.allclose(tensor.grad, slope, rtol=1e-12, atol=1e-14)
    huge = prompts.comparison_loss(torch.tensor([1e4, 0.0]), torch.tensor([[1, 0]]), torch.tensor([1.0]))
    assert huge.item() == pytest.approx(1e4), "no overflow"


def test_a_linear_fit_is_penalised_logistic_regression() -> None:
    """Against another library's minimum of the same function, written out."""
    x, rng = _embeddings(8, 3, 2).numpy(), _rng(3)
    pairs, shares = rng.integers(0, 8, (15, 2)), rng.random(15).round(1)

    def objective(w: np.ndarray) -> float:
        gap = (x[pairs[:, 0]] - x[pairs[:, 1]]) @ w
        return float((shares * np.log1p(np.exp(-gap)) + (1 - shares) * np.log1p(np.exp(gap))).sum() + 0.35 / 2 * w @ w)

    expected = optimize.minimize(objective, np.zeros(3), method="BFGS", options={"gtol": 1e-10}).x
    net = prompts.network(3, (), 0)
    prompts.fit(net, torch.from_numpy(x), torch.from_numpy(pairs), torch.from_numpy(shares), ridge=0.35)
    assert np.allclose(net.weight.detach()[0], expected, atol=1e-5)


def test_limits_of_the_fit() -> None:
    x, pairs, shares = (
        _embeddings(6, 4, 4),
        torch.tensor([[0, 1], [2, 3]]),
        torch.tensor([1.0, 0.0], dtype=torch.float64),
    )
    before = prompts.tangents(prompts.network(4, (16, 16), 5), x)[0]
    stiff = prompts.fit(prompts.network(4, (16, 16), 5), x, pairs, shares, ridge=1e9)
    assert torch.allclose(prompts.tangents(stiff, x)[0], before, atol=1e-6), "an endless ridge keeps the first weights"
    loose = prompts.tangents(prompts.fit(prompts.network(4, (16, 16), 5), x, pairs, shares, ridge=1e-6), x)[0]
    assert loose[0] - loose[1] > 5 and loose[3] - loose[2] > 5, "without one the answers are all believed"
    none = prompts.believe(x, [], [], hidden=(16, 16), ridge=1.0, seed=5)
    assert torch.equal(none.scores, before)
    even = prompts.believe(x, [(0, 1)] * 4, [1.0, 0.0, 1.0, 0.0], hidden=(), ridge=1.0, seed=5)
    assert torch.allclose(even.scores, torch.zeros(6, dtype=torch.float64), atol=1e-8)


def test_gradients_are_those_of_finite_differences() -> None:
    net, x = prompts.network(3, (5, 4), 6), _embeddings(4, 3, 7)
    scores, gradients = prompts.tangents(net, x)
    flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    assert gradients.shape == (4, len(flat))
    numeric = np.zeros((4, len(flat)))
    for p in range(len(flat)):
        values = []
        for step in (1e-6, -1e-6):
            moved = flat.clone()
            moved[p] += step
            torch.nn.utils.vector_to_parameters(moved, net.parameters())
            values.append(net(x)[:, 0].detach().numpy())
        numeric[:, p] = (values[0] - values[1]) / 2e-6
    torch.nn.utils.vector_to_parameters(flat, net.parameters())
    assert np.allclose(gradients, numeric, atol=1e-8)
    assert torch.allclose(scores, net(x)[:, 0])


def _bound_by_hand(gradients: np.ndarray, against: int, pairs: list[tuple[int, int]], ridge: float) -> list[float]:
    v = ridge * np.eye(gradients.shape[1])
    for a, b in pairs:
        v += np.outer(gradients[a] - gradients[b], gradients[a] - gradients[b])
    inverse = np.linalg.inv(v)
    return [
        math.sqrt(max(0.0, float((g - gradients[against]) @ inverse @ (g - gradients[against])))) for g in gradients
    ]


@pytest.mark.parametrize("hidden", [(), (6, 5)])
def test_the_confidence_bound_is_its_formula(hidden: tuple[int, ...]) -> None:
    x = _embeddings(7, 3, 8)
    gradients = prompts.tangents(prompts.network(3, hidden, 9), x)[1]
    pairs = [(0, 1), (2, 3), (2, 3), (6, 0)]
    found = prompts.uncertainty(gradients, 2, torch.tensor(pairs), 0.7)
    assert np.allclose(found, _bound_by_hand(gradients.numpy(), 2, pairs, 0.7), atol=1e-10)
    assert found[2] == 0
    none = prompts.uncertainty(gradients, 2, torch.zeros(0, 2, dtype=torch.long), 0.7)
    assert np.allclose(none, _bound_by_hand(gradients.numpy(), 2, [], 0.7)), "before anything was compared"
    assert (found <= none + 1e-12).all() and found[3] < none[3] / 1.5, "what was compared is surer"


# ------------------------------------------------------------------------------------------------ choice


@pytest.mark.parametrize("nu", [0.0, 0.5, 100.0])
def test_the_pair_is_the_best_and_the_highest_bound_against_it(nu: float) -> None:
    x, pairs, shares = _embeddings(9, 4, 10), [(0, 1), (2, 3), (4, 5)], [1.0, 0.0, 1.0]
    belief = prompts.believe(x, pairs, shares, hidden=(8, 8), ridge=0.5, seed=11)
    first = int(np.argmax(belief.scores))
    sigma = _bound_by_hand(belief.gradients.numpy(), first, pairs, 0.5)
    second = max((k for k in range(9) if k != first), key=lambda k: belief.scores[k].item() + nu * sigma[k])
    assert prompts.next_pair(belief, pairs, [], ridge=0.5, nu=nu) == (first, second)
    third = prompts.next_pair(belief, pairs, [(second, first)], ridge=0.5, nu=nu)
    assert third[0] == first and third[1] not in (first, second), "what is being asked is not asked again"
    assert belief.best(pairs) == max(range(6), key=lambda k: belief.scores[k].item())


def test_two_prompts_can_only_be_compared_with_each_other() -> None:
    belief = prompts.believe(_embeddings(2, 4, 12), [(0, 1)], [0.0], hidden=(), ridge=1.0, seed=0)
    assert prompts.next_pair(belief, [(0, 1)], [(1, 0)], ridge=1.0, nu=1.0) == (1, 0)
    assert belief.best([(0, 1)]) == 1


def test_pairs_and_beliefs_are_functions_of_the_seed() -> None:
    drawn = [prompts.random_pair(30, 1, number) for number in range(50)]
    assert drawn == [prompts.random_pair(30, 1, number) for number in range(50)]
    assert len(set(drawn)) > 40 and all(a != b for a, b in drawn)
    assert drawn != [prompts.random_pair(30, 2, number) for number in range(50)]
    x = _embeddings(6, 4, 13)
    twice = [prompts.believe(x, [(0, 1)], [1.0], hidden=(8,), ridge=0.5, seed=3) for _ in range(2)]
    assert torch.equal(twice[0].scores, twice[1].scores)


def _regret(seed: int, rounds: int, bandit: bool, hidden: tuple[int, ...]) -> tuple[float, float]:
    """Mean regret of both prompts over all rounds, and of the prompt that is named best at the end."""
    rng = _rng(14, seed)
    x = prompts.standardised(torch.from_numpy(rng.standard_normal((40, 6))))
    utility = (x @ torch.from_numpy(rng.standard_normal(6))).numpy() * 4
    answers = generator("answers", seed)
    pairs, shares, lost = [], [], []
    settings = {"hidden": hidden, "ridge": 0.3, "seed": seed}
    for number in range(rounds):
        if bandit and number >= 4:
            pair = prompts.next_pair(prompts.believe(x, pairs, shares, **settings), pairs, [], ridge=0.3, nu=0.5)
        else:
            pair = prompts.random_pair(40, seed, number)
        likes = 1 / (1 + math.exp(utility[pair[1]] - utility[pair[0]]))
        shares.append(float(torch.rand((), generator=answers).item() < likes))
        pairs.append(pair)
        lost.append(utility.max() - (utility[pair[0]] + utility[pair[1]]) / 2)
    best = prompts.believe(x, pairs, shares, **settings).best(pairs)
    return float(np.mean(lost)), float(utility.max() - utility[best])


@pytest.mark.parametrize(("hidden", "seeds"), [((), 8), ((16,), 4)])
def test_it_regrets_less_than_pairs_at_random(hidden: tuple[int, ...], seeds: int) -> None:
    """40 prompts with a linear utility, 25 noisy answers: cumulative regret, by an interval over environments."""
    ours = [_regret(seed, 25, True, hidden) for seed in range(seeds)]
    theirs = [_regret(seed, 25, False, hidden) for seed in range(seeds)]
    gain = mean_ci([b[0] - a[0] for a, b in zip(ours, theirs, strict=True)])
    final = mean_ci([b[1] - a[1] for a, b in zip(ours, theirs, strict=True)])
    print(f"hidden {hidden}: regret per round, random less bandit {gain}; of the final prompt {final}")
    assert gain.low > 1.0
    assert final.mean > -0.2, "and what it names best in the end is no worse"
