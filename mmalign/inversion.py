"""Inversion: from a clean latent to the noisy one that the deterministic sampler would have come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from mmalign.noise import Process

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy [b, ...], t [b], rows [b]) -> prediction; `rows` are indices into the whole batch, for its conditions."""


@torch.no_grad()
def invert(
    predict: Predict,
    process: Process,
    latents: Tensor,
    t: Tensor,
    *,
    steps: int = 10,
    method: Literal["ddim_inversion", "renoise"] = "ddim_inversion",
    eta: float = 0.0,
    generators: Sequence[torch.Generator] = (),
) -> Tensor:
    """x_t [B, ...] for clean latents [B, ...] and timesteps t [B] of their own, each row as if it were alone.

    The sampler's step is undone along a grid of `steps` over the whole schedule, as far as t and then to t itself:

        ddim_inversion   x' = inverse_step(x, m(x, t'))                      (DDIM-InPO 2503.18454; Song 2010.02502)
        renoise          x' = inverse_step(x, [m(x, t') + m(x_1, t')] / 2)   (SmPO 2506.02698; ReNoise 2403.14602)

    where x_1 is the result of the first line. For a flow both are straight-line inversion, an Euler step backwards and
    one with its velocity averaged. The published code takes the first row's timestep for the whole batch, and stops at
    the last grid point below t while the model is told t; here t is reached exactly.

    Args:
        predict: evaluates the model on some rows at the timestep they are to reach.
        eta: adds eta * (ancestral deviation) * noise after each step but the one to t, from the row's own generator;
            needs `generators` [B].
    """
    noisy = latents.clone()
    now = torch.full_like(t, process.clean)
    for level in _grid(process, steps, t):
        after = torch.minimum(level, t)
        rows = torch.nonzero(after > now).flatten()
        if not len(rows):
            break
        x, at, to = noisy[rows], now[rows], after[rows]
        first = predict(x, to, rows).float()
        moved = process.inverse_step(x, first, at, to)
        if method == "renoise":
            second = predict(moved, to, rows).float()
            moved = process.inverse_step(x, (first + second) / 2, at, to)
        if eta:
            moved = moved + eta * process.ancestral_std(at, to, moved) * _draws(generators, rows, to < t[rows], moved)
        noisy[rows], now[rows] = moved, to
    return noisy


def evaluations(process: Process, t: Tensor, steps: int, method: str) -> Tensor:
    """How many model evaluations `invert` spends on each row: [B]."""
    levels = torch.stack(_grid(process, steps, t))
    below = (levels < t).sum(0) + 1
    return below * (2 if method == "renoise" else 1)


def _grid(process: Process, steps: int, t: Tensor) -> list[Tensor]:
    """Upper ends of `steps` equal parts of the schedule, each shaped and typed as t."""
    if process.alphas_cumprod is None:
        return [torch.full_like(t, (j + 1) / steps) for j in range(steps)]
    total = len(process.alphas_cumprod)
    return [torch.full_like(t, -(-total * (j + 1) // steps) - 1) for j in range(steps)]


def _draws(generators: Sequence[torch.Generator], rows: Tensor, wanted: Tensor, like: Tensor) -> Tensor:
    """Unit noise for the wanted rows, zeros for the others."""
    drawn = torch.zeros_like(like)
    for i, (row, is_wanted) in enumerate(zip(rows.tolist(), wanted.tolist(), strict=True)):
        if is_wanted:
            drawn[i] = torch.randn(like.shape[1:], generator=generators[row]).to(like.device)
    return drawn
