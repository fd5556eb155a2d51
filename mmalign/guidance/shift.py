"""What a shift of the score means to a prediction, and what a strategy that shifts it tells of each request."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmalign.noise import Process


def shifted(process: Process, prediction: Tensor, t: Tensor, shift: Tensor, max_ratio: float | None = None) -> Tensor:
    """The prediction of a model whose score at t is larger by `shift`.

    With x_t = a x_0 + s eps the score is -eps / s, so eps moves by -s g, and with it x_0 by s^2 g / a:

        eps:   eps - s g              (classifier guidance: 2105.05233, algorithm 2)
        v:     v = a eps - s x_0      moves by -(a s + s^3 / a) g = -(s / a) g, since a^2 + s^2 = 1
        flow:  v = eps - x_0          moves by -(s + s^2 / a) g   = -(s / a) g, since a + s = 1:  -t / (1 - t) g

    Args:
        prediction: [B, ...] at timesteps t [B], after classifier-free guidance.
        shift: g, shaped as the prediction: the weight times the gradient of the reward by the noisy latents.
        max_ratio: s / a counts as at most this, in all three; it grows without bound towards pure noise.
    """
    signal, noise = process.scales(t, prediction)
    ratio = noise / signal
    ratio = ratio if max_ratio is None else ratio.clamp(max=max_ratio)
    return prediction - (ratio * signal if process.kind == "eps" else ratio) * shift


def relative(prediction: Tensor, direction: Tensor, scale: float) -> Tensor:
    """The prediction moved against the noise's share of `direction`, by `scale` times its own length, row by row.

    prediction - scale |prediction| g / |g|; rows whose direction is 0 stay as they are.
    """
    shape = (-1, *[1] * (prediction.ndim - 1))
    factor = length(prediction) / length(direction).clamp(min=torch.finfo(direction.dtype).tiny)
    return prediction - scale * factor.reshape(shape) * direction


def length(values: Tensor) -> Tensor:
    """Euclidean length of each row, [B]."""
    return values.flatten(1).norm(dim=1)


class Followed:
    """How far each of B requests was led, for its record."""

    def __init__(self, count: int):
        self._count = count
        self._moved: list[Tensor] = []
        self._values: list[Tensor] = []

    def add(self, prediction: Tensor, guided: Tensor, value: Tensor) -> None:
        """A prediction as it was and as it became, [B, ...], and the rewards [B] whose gradient did it."""
        self._moved.append((length(guided - prediction) / length(prediction).clamp(min=1e-12)).detach().cpu())
        self._values.append(value.detach().cpu())

    @property
    def reward(self) -> float | None:
        """The mean of the latest rewards; None before the first."""
        return self._values[-1].mean().item() if self._values else None

    def records(self) -> list[dict[str, Any]]:
        """Of each request how often it was led, how far relative to its predictions, and the rewards on the way."""
        if not self._moved:
            return [{"guided": 0} for _ in range(self._count)]
        sizes, seen = torch.stack(self._moved, dim=1), torch.stack(self._values, dim=1)
        return [
            {"guided": len(self._moved), "mean_shift": size.mean().item(), "largest_shift": size.max().item(),
             "seen_rewards": row.tolist()}
            for size, row in zip(sizes, seen, strict=True)
        ]  # fmt: skip
