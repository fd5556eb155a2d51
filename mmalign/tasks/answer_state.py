"""What objectives on answers remember between steps: buffers, so that checkpoints hold them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.losses.answer_terms import multiplier_step
from mmalign.losses.answers import Scores
from mmalign.methods_mllm_terms import BCOPair, Part, SafeDPO, Term

_DECAY = 0.99


def function(part: Part) -> Callable[..., Any]:
    """The pure function of a term or transform."""
    module, _, name = part.function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


class State(nn.Module):
    """BCO's running mean of rewards, and the logarithm of the Lagrange multiplier.

    Attributes:
        tracks: the metrics that they are fed with.
    """

    def __init__(self, terms: Sequence[Term]):
        super().__init__()
        self.safe = next((term for term in terms if isinstance(term, SafeDPO)), None)
        self.shifted = any(isinstance(term, BCOPair) and term.running_shift for term in terms)
        self.tracks: tuple[str, ...] = ()
        if self.safe:
            self.tracks += ("unsafe",)
            self.log_multiplier: Tensor
            self.register_buffer("log_multiplier", torch.tensor(math.log(self.safe.initial), dtype=torch.float64))
        if self.shifted:
            self.tracks += ("reward_centre",)
            self.total: Tensor
            self.weight: Tensor
            self.register_buffer("total", torch.zeros((), dtype=torch.float64))
            self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    def given(self, term: Term) -> dict[str, Tensor]:
        """Arguments of a term's function that are remembered."""
        if isinstance(term, SafeDPO):
            return {"multiplier": self.log_multiplier.exp().float()}
        if isinstance(term, BCOPair) and self.shifted:
            return {"shift": (self.total / self.weight.clamp(min=1e-12)).float()}
        return {}

    def seen(self, scores: Scores, beta: Tensor | float) -> dict[str, Tensor]:
        """What is remembered of a batch, as metrics."""
        found = {}
        if self.safe:
            assert scores.safer is not None
            judged = scores.safer != 0
            wrong = (scores.difference.detach() * scores.safer < 0) & judged
            found["unsafe"] = wrong.float().sum() / judged.float().sum().clamp(min=1)
            found["multiplier"] = self.log_multiplier.exp().float()
        if self.shifted:
            found["reward_centre"] = (beta * (scores.chosen.ratio + scores.rejected.ratio) / 2).detach().mean()
        return found

    @torch.no_grad()
    def track(self, means: Mapping[str, Tensor]) -> None:
        """Called after each optimiser step with the means of `tracks` over micro-batches and processes."""
        if self.safe:
            step = multiplier_step(
                self.log_multiplier, means["unsafe"].double(), budget=self.safe.budget, rate=self.safe.rate
            )
            self.log_multiplier.copy_(step)
        if self.shifted:
            self.total.mul_(_DECAY).add_((1 - _DECAY) * means["reward_centre"].double())
            self.weight.mul_(_DECAY).add_(1 - _DECAY)
