"""Prompt optimisation from comparisons alone: which of two prompts draws what is liked better?

A duelling bandit over a list of prompts (Lin et al., "Prompt Optimization with Human Feedback", APOHF, 2405.17346). A
small network h, from a prompt's embedding to a latent score, is fitted to all comparisons so far by the Bradley-Terry
model. The next pair is the prompt of the highest score, and the one with the highest upper confidence bound against it,
where uncertainty comes from the network's gradient at each prompt (the neural tangent kernel's features).

Embeddings are [K, D], float64; comparisons are pairs of indices [N, 2] with the share [N] of answers for the first,
in [0, 1]. Everything is computed anew from the comparisons and a seed, so that nothing but these needs to be kept.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmalign.noise import generator

Pair = tuple[int, int]
MOST = 10_000  # candidates that a template may have


# ------------------------------------------------------------------------------------------------ candidates


@dataclass(frozen=True)
class Candidate:
    """One prompt, and which alternative of each group it has taken, where it comes from a template."""

    prompt: str
    choices: tuple[int, ...] = ()


def expand(template: str) -> list[Candidate]:
    """All prompts of a template: "a {small |large |}red circle" has three. Groups are not nested; spaces are joined.

    The order is that of an odometer, the last group turning fastest; a prompt that comes twice is kept once.

    Raises:
        ValueError: a brace that has no other, nested groups, or more than 10,000 prompts.
    """
    parts = re.split(r"\{([^{}]*)\}", template)
    if any(brace in text for text in parts[::2] for brace in "{}"):
        raise ValueError(f"template {template!r}: write alternatives as {{a|b|c}}, each brace closed and none nested")
    groups = [part.split("|") for part in parts[1::2]]
    count = math.prod(len(group) for group in groups)
    if count > MOST:
        raise ValueError(f"template: {count} prompts are more than {MOST}; leave alternatives out, or list prompts")
    found: dict[str, Candidate] = {}
    for places in itertools.product(*(range(len(group)) for group in groups)):
        words = [group[place] for group, place in zip(groups, places, strict=True)]
        text = "".join(itertools.chain.from_iterable(itertools.zip_longest(parts[::2], words, fillvalue="")))
        prompt = " ".join(text.split())
        found.setdefault(prompt, Candidate(prompt, places))
    return list(found.values())


def choice_features(candidates: Sequence[Candidate]) -> Tensor:
    """Which alternative of each group a prompt has, one-hot: [K, sum of the groups' sizes]."""
    places = torch.tensor([each.choices for each in candidates]).reshape(len(candidates), -1)
    parts = [F.one_hot(column, int(column.max()) + 1) for column in places.T]
    return torch.cat(parts, dim=1).double() if parts else torch.zeros(len(candidates), 0, dtype=torch.float64)


def standardised(embeddings: Tensor) -> Tensor:
    """Centred, and of mean squared length 1: one setting of `ridge` and `nu` then serves every kind of embedding.

    Raises ValueError where all are the same, so that nothing could be told apart.
    """
    centred = embeddings.double() - embeddings.double().mean(0)
    length = centred.square().sum(1).mean().sqrt()
    if not length > 0:
        raise ValueError("all prompts have the same embedding; take another kind of embedding, or other prompts")
    return centred / length


# ------------------------------------------------------------------------------------------------ score


def network(width: int, hidden: Sequence[int], seed: object) -> nn.Module:
    """Fully connected with ReLU, one output, float64, Gaussian weights of variance 2 / inputs; no hidden layer: linear.

    A linear one has no bias, which no comparison could tell, and starts at 0. (The authors draw all weights from
    N(0, 1).)
    """
    if not hidden:
        linear = nn.Linear(width, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(linear.weight)
        return linear
    draw = generator("prompt network", seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise([width, *hidden, 1]):
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=draw, dtype=torch.float64))
            layer.weight.mul_((2 / inputs) ** 0.5)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def comparison_loss(scores: Tensor, pairs: Tensor, shares: Tensor) -> Tensor:
    """Bradley-Terry: the sum of -y log sigmoid(d) - (1 - y) log sigmoid(-d), d = h(first) - h(second).

    Args:
        scores: h of all prompts, [K].
        pairs: [N, 2] indices. shares: [N], y, the share of answers for the first; 1/2 where they are as good.
    """
    gap = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    return -(shares * F.logsigmoid(gap) + (1 - shares) * F.logsigmoid(-gap)).sum()


def fit(net: Any, embeddings: Tensor, pairs: Tensor, shares: Tensor, *, ridge: float, steps: int = 100) -> Any:
    """Fits the network to the comparisons: their loss plus ridge / 2 times the squared way from the first weights.

    L-BFGS with a line search on all comparisons, so that there is no learning rate and no order. (The authors take 30
    steps of Adam, from the first weights each time, which this does as well.)
    """
    if not len(pairs):
        return net
    weights = [weight.requires_grad_(True) for weight in net.parameters()]
    first = [weight.detach().clone() for weight in weights]
    solver = torch.optim.LBFGS(weights, max_iter=steps, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def loss() -> Tensor:
        solver.zero_grad()
        away = sum(((weight - start) ** 2).sum() for weight, start in zip(weights, first, strict=True))
        total = comparison_loss(net(embeddings)[:, 0], pairs, shares) + ridge / 2 * away
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(loss)
    return net


def tangents(net: Any, embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Scores h [K], and their gradients by the weights, [K, P]: the features of the neural tangent kernel."""
    weights = {name: weight.detach() for name, weight in net.named_parameters()}

    def score(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(net, parameters, (x[None],))[0, 0]
        return found

    found = torch.func.vmap(torch.func.grad_and_value(score), in_dims=(None, 0))(weights, embeddings)
    gradients, scores = found
    return scores, torch.cat([part.reshape(len(embeddings), -1) for part in gradients.values()], dim=1)


def uncertainty(gradients: Tensor, against: int, pairs: Tensor, ridge: float) -> Tensor:
    """How unsure the network is of each prompt's score less that of `against`: [K], 0 for that prompt itself.

    sigma(x) = sqrt(f^T V^-1 f) with f = g(x) - g(against) and V = ridge I + sum over comparisons of the same for their
    two prompts. V is [P, P] and has rank N beside the ridge, so it is inverted in the space of the N comparisons, by
    Woodbury's identity; the authors keep the diagonal of V alone.

    Args:
        gradients: [K, P].
        pairs: [N, 2], all that were compared, or are being compared: what was answered plays no part.
    """
    f = gradients - gradients[against]
    seen = gradients[pairs[:, 0]] - gradients[pairs[:, 1]]  # [N, P]
    square = f.square().sum(1)
    if len(pairs):
        inner = seen @ seen.T + ridge * torch.eye(len(pairs), dtype=f.dtype)
        across = seen @ f.T  # [N, K]
        square = square - (across * torch.linalg.solve(inner, across)).sum(0)
    return (square.clamp(min=0) / ridge).sqrt()


# ------------------------------------------------------------------------------------------------ choice


@dataclass(frozen=True, eq=False)
class Belief:
    """What the comparisons so far say: `scores` [K], and the `gradients` [K, P] that tell how sure that is."""

    scores: Tensor
    gradients: Tensor

    def best(self, pairs: Sequence[Pair]) -> int:
        """The prompt of the highest score among those that were compared; among all where none was."""
        asked = sorted({place for pair in pairs for place in pair}) or list(range(len(self.scores)))
        return asked[int(self.scores[asked].argmax())]


def believe(
    embeddings: Tensor,
    pairs: Sequence[Pair],
    shares: Sequence[float],
    *,
    hidden: Sequence[int],
    ridge: float,
    seed: object,
) -> Belief:
    """Fits a fresh network to the comparisons."""
    net = network(embeddings.shape[1], hidden, seed)
    fit(net, embeddings, _indices(pairs), torch.tensor(shares, dtype=torch.float64), ridge=ridge)
    return Belief(*tangents(net, embeddings))


def next_pair(belief: Belief, pairs: Sequence[Pair], pending: Sequence[Pair], *, ridge: float, nu: float) -> Pair:
    """The pair to compare next: argmax h, and argmax of h + nu sigma against it among the others.

    Pairs that are `pending` (asked, and not answered) count as seen, and are not asked again.
    """
    first = int(belief.scores.argmax())
    sigma = uncertainty(belief.gradients, first, _indices([*pairs, *pending]), ridge)
    bound = belief.scores + nu * sigma
    bound[first] = -torch.inf
    waiting = [b if a == first else a for a, b in pending if first in (a, b)]
    if len(set(waiting)) < len(bound) - 1:
        bound[waiting] = -torch.inf
    return first, int(bound.argmax())


def random_pair(count: int, seed: object, number: int) -> Pair:
    """Two different prompts at random, for the first comparisons; decided by the seed and the comparison's number."""
    first, second = torch.randperm(count, generator=generator("prompt pair", seed, number))[:2].tolist()
    return first, second


def _indices(pairs: Sequence[Pair]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
