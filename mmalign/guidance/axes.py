"""Axes of diversity learned from judgements of similarity: "this is more like A than B".

Quality diversity through human feedback (Ding et al., 2310.12103): a linear projection of the features of a
frozen network, fitted so that of each judged triplet the nearer one lies nearer, by a hinge with a margin. The number
of axes is the number of rows of the projection; distances along them are what people (or whatever judged) see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmalign.noise import generator

Floats = npt.NDArray[np.float64]
HELD_OUT = 4  # a quarter of the triplets tells when to stop, as in the authors' code
PATIENCE = 50


@dataclass(frozen=True, eq=False)
class Axes:
    """A learned projection.

    `weight` [k, D] float64; `centre` [D] and `scale`: features are taken as (x - centre) / scale. `accuracy` is the
    share of held-out triplets that it orders as judged, None where too few were left to hold some out.
    """

    weight: Tensor
    centre: Tensor
    scale: float
    accuracy: float | None

    def measure(self, features: Tensor) -> Floats:
        """Where pictures lie along the axes: features [n, D] -> [n, k]."""
        centred = (features.double().cpu() - self.centre) / self.scale
        # Row by row, so that a picture's place does not depend on its neighbours to the last bit.
        return np.stack([(self.weight @ row).numpy() for row in centred])


def triplet_loss(weight: Tensor, anchor: Tensor, nearer: Tensor, farther: Tensor, margin: float) -> Tensor:
    """mean max(0, margin + |W (a - n)|^2 - |W (a - f)|^2) (2310.12103; squared distances and the
    margin of 0.05 as in its code).

    Args:
        weight: [k, D].
        anchor, nearer, farther: features [n, D]; nearer was judged to be more like the anchor.
        margin: by how much the squared distances shall differ, >= 0.
    """
    near = ((anchor - nearer) @ weight.T).square().sum(-1)
    far = ((anchor - farther) @ weight.T).square().sum(-1)
    return (margin + near - far).clamp(min=0).mean()


def fit_axes(
    triplets: Tensor, axes: int, seed: object, *, margin: float = 0.05, steps: int = 500, lr: float = 3e-2
) -> Axes:
    """The projection that orders judged triplets, by Adam on all of them at once.

    A quarter is held out, and the weights with the smallest loss on it are kept (with fewer than 16 triplets, all are
    fitted and none held out). Features are centred and divided by the root of their mean squared deviation, so that the
    margin has the same meaning for every network; the authors take them as they are, in batches of 32.

    Args:
        triplets: features [n, 3, D] of anchor, nearer and farther.
        axes: k, the number of rows of the projection.
        seed: what decides the split and the first weights.

    Raises:
        ValueError: no triplets, or features that are all the same.
    """
    if triplets.ndim != 3 or triplets.shape[1] != 3 or not len(triplets):
        raise ValueError(f"triplets have shape {list(triplets.shape)}; give features [n, 3, D], n of 1 or more")
    x = triplets.detach().double().cpu()
    centre = x.mean((0, 1))
    scale = float((x - centre).square().sum(-1).mean().sqrt())
    if not scale > 0:
        raise ValueError("all features of the judged pictures are the same; no axis can tell them apart")
    x = (x - centre) / scale
    draw = generator("axes", seed)
    order = torch.randperm(len(x), generator=draw)
    held = order[: len(x) // HELD_OUT] if len(x) >= 4 * HELD_OUT else order[:0]
    fitted = order[len(held) :]
    weight = torch.randn(axes, x.shape[-1], generator=draw, dtype=torch.float64) / x.shape[-1] ** 0.5
    weight = _descend(weight, x[fitted], x[held] if len(held) else x[fitted], margin, steps, lr)
    return Axes(weight, centre, scale, agreement(weight, x[held]) if len(held) else None)


def agreement(weight: Tensor, triplets: Tensor) -> float:
    """Share of triplets [n, 3, D] that a projection orders as judged; a tie counts half."""
    anchor, nearer, farther = triplets.unbind(1)
    gap = ((anchor - farther) @ weight.T).square().sum(-1) - ((anchor - nearer) @ weight.T).square().sum(-1)
    return float(((gap.sign() + 1) / 2).mean())


def judged(values: npt.ArrayLike, count: int, seed: object) -> npt.NDArray[np.intp]:
    """Triplets (anchor, nearer, farther) as an evaluator judges them: indices [count, 3].

    Three different pictures are drawn each time; nearer is the one whose scores lie nearer to the anchor's, each score
    in units of its standard deviation. Triplets with equal distances are left out, so that there may be fewer.

    Args:
        values: [n, s], the scores of n >= 3 pictures.

    Raises:
        ValueError: fewer than three pictures, or scores that do not tell any two apart.
    """
    scores = np.asarray(values, dtype=np.float64)
    if len(scores) < 3 or not np.isfinite(scores).all():
        raise ValueError(f"a triplet needs three scored pictures; there are {len(scores)}, or some without a score")
    spread = scores.std(axis=0)
    if not spread.any():
        raise ValueError("the judge gives all pictures the same scores; take another evaluator, or draw more pictures")
    scores = scores[:, spread > 0] / spread[spread > 0]
    draw = generator("triplets", seed)
    found = []
    for _ in range(count):
        a, b, c = torch.randperm(len(scores), generator=draw)[:3].tolist()
        near, far = (float(((scores[a] - scores[k]) ** 2).sum()) for k in (b, c))
        if near != far:
            found.append((a, b, c) if near < far else (a, c, b))
    return np.array(found, dtype=np.intp).reshape(-1, 3)


def _descend(start: Tensor, fitted: Tensor, held: Tensor, margin: float, steps: int, lr: float) -> Tensor:
    """The weights with the smallest loss on `held` on the way down that of `fitted`."""
    weight = start.clone().requires_grad_(True)
    adam = torch.optim.Adam([weight], lr=lr)
    best, lowest, since = start, float(_of(start, held, margin)), 0
    for _ in range(steps):
        adam.zero_grad()
        with torch.enable_grad():
            _of(weight, fitted, margin).backward()
        adam.step()
        with torch.no_grad():
            loss = float(_of(weight, held, margin))
        since += 1
        if loss < lowest:
            best, lowest, since = weight.detach().clone(), loss, 0
        if since >= PATIENCE or lowest == 0:
            break
    return best


def _of(weight: Tensor, triplets: Tensor, margin: float) -> Tensor:
    anchor, nearer, farther = triplets.unbind(1)
    return triplet_loss(weight, anchor, nearer, farther, margin)
