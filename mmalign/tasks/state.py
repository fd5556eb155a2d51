"""What a preference run remembers between steps besides weights: buffers, so that checkpoints hold them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmalign.jobs_align import AutoBeta

_DECAY = 0.99


class Averages(nn.Module):
    """Exponential moving averages of metrics, by the name of the argument that they become.

    The average is the weighted mean of what was seen so far, so that the first values count from the first step on.
    """

    def __init__(self, metrics: Mapping[str, str], automatic: AutoBeta | None):
        super().__init__()
        self.metrics = dict(metrics)
        self.decay = automatic.decay if automatic else _DECAY
        for name in metrics:
            self.register_buffer(f"{name}_sum", torch.zeros((), dtype=torch.float64))
            self.register_buffer(f"{name}_weight", torch.zeros((), dtype=torch.float64))

    def update(self, seen: Mapping[str, Tensor]) -> None:
        for name, metric in self.metrics.items():
            total, weight = getattr(self, f"{name}_sum"), getattr(self, f"{name}_weight")
            total.mul_(self.decay).add_((1 - self.decay) * seen[metric].double())
            weight.mul_(self.decay).add_(1 - self.decay)

    def tensor(self, name: str) -> Tensor | None:
        """The average, float32; None before the first step."""
        weight = getattr(self, f"{name}_weight")
        return (getattr(self, f"{name}_sum") / weight).float() if weight > 0 else None

    def value(self, name: str) -> float | None:
        found = self.tensor(name)
        return None if found is None else found.item()


class Lagged(nn.Module):
    """The trained parameters of a denoiser as they were at the last refresh."""

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self._parameters_of = [p for p in denoiser.parameters() if p.requires_grad]
        for i, parameter in enumerate(self._parameters_of):
            self.register_buffer(f"p{i}", parameter.detach().clone())

    @torch.no_grad()
    def refresh(self) -> None:
        for parameter, buffer in zip(self._parameters_of, self.buffers(), strict=True):
            buffer.copy_(parameter)

    @contextmanager
    def used(self) -> Iterator[None]:
        """The denoiser computes with the old parameters inside."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for parameter, buffer in zip(self._parameters_of, self.buffers(), strict=True):
            parameter.data, buffer.data = buffer.data, parameter.data
        torch.clear_autocast_cache()  # it knows casts by the parameter, whose values are now others


@contextmanager
def adapter_off(denoiser: Any) -> Iterator[None]:
    """The base model inside."""
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()


def rebuilt(plain: Any, shared: Any, state: dict[str, Tensor]) -> Any:
    """`plain`, a network of random weights, with the adapters of a shared one and its whole tensors."""
    for name, settings in (getattr(shared, "peft_config", None) or {}).items():
        plain.add_adapter(copy.deepcopy(settings), adapter_name=name)
    plain.load_state_dict(state, assign=True)
    return plain
