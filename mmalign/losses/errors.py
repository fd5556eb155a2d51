"""From predictions to the per-sample numbers that the objectives of preference are made of."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

Metrics = dict[str, Tensor]
T = TypeVar("T")


def squared_error(prediction: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Squared error of each sample, float32: [B, ...] -> [B]; `reduction` over all dims but the first."""
    error = (prediction.float() - target.float()).square().flatten(1)
    return error.mean(1) if reduction == "mean" else error.sum(1)


def implicit_reward(model: Tensor, reference: Tensor, beta: float | Tensor, kappa: float) -> Tensor:
    """r = -kappa beta (E - E_ref): the reward that DPO's optimum would have (2311.12908), up to a constant.

    Any shape; float32. A policy that denoises a sample better than the reference does gives it a reward above 0.
    """
    return -kappa * beta * (model.float() - reference.float())


def accuracy(logit: Tensor) -> Tensor:
    """Share of logits above 0, those at 0 counted as one half: scalar."""
    return ((logit > 0).float() + 0.5 * (logit == 0).float()).mean()


def detached(**metrics: Tensor) -> Metrics:
    """Scalar metrics without their graph."""
    return {name: value.detach().float().mean() for name, value in metrics.items()}


def weighted_mean(each: Tensor, weight: Tensor | None) -> Tensor:
    """sum(weight * each) / B, so that a weight means the same however a step is cut into batches. None is 1."""
    return each.mean() if weight is None else (weight.float() * each).mean()


def across_processes(total: Tensor) -> Tensor:
    """The sum of a detached tensor over all processes of a distributed run; itself in a single one."""
    total = total.detach().clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    return total


def from_process_before(value: T) -> T:
    """What the process before this one gives, the last one to the first; its own in a single process. For small things,
    which travel pickled among the processes of one run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    given: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(given, value)
    found: T = given[torch.distributed.get_rank() - 1]
    return found


def beta_units(beta: float, elements: int, reduction: str) -> dict[str, float]:
    """beta in both units for a latent of `elements` numbers.

    A mean over D elements with beta is a sum with beta / D: `beta_per_sample` multiplies mean errors,
    `beta_per_element` multiplies summed errors. Only the latter compares across resolutions.
    """
    per_element = beta / elements if reduction == "mean" else beta
    return {"beta_per_element": per_element, "beta_per_sample": per_element * elements}
