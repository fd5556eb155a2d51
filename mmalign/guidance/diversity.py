"""Quality diversity: a set of pictures that covers learned axes, each the best of its cell.

MAP-Elites (Mouret and Clune, 1504.04909) over the axes of `mmalign.guidance.axes`, as quality diversity through human
feedback has it (Ding et al., 2310.12103): what is searched is the initial noise. A first population is drawn at random;
then elites are mutated and drawn again, and each cell of a grid over the axes keeps its best by the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mmalign.guidance.axes import Axes
from mmalign.noise import generator

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Grid:
    """Cells over the axes: `low` and `high` [k] are the outer edges, `shape` how many cells each axis has."""

    low: Floats
    high: Floats
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def cells(self, measures: npt.ArrayLike) -> Indices:
        """The cell of each picture: measures [n, k] -> [n] in [0, size). What lies outside belongs to the edge."""
        values = np.asarray(measures, dtype=np.float64).reshape(-1, len(self.shape))
        width = np.where(self.high > self.low, self.high - self.low, 1.0)
        places = np.floor((values - self.low) / width * self.shape).astype(np.intp)
        clipped = np.clip(places, 0, np.array(self.shape) - 1)
        return np.ravel_multi_index(tuple(clipped.T), self.shape).astype(np.intp)


@dataclass(frozen=True, eq=False)
class Archive:
    """What each cell holds: `item` [size], -1 for an empty one, and its `quality` [size], -inf for an empty one."""

    item: Indices
    quality: Floats

    @classmethod
    def empty(cls, size: int) -> Archive:
        return cls(np.full(size, -1, dtype=np.intp), np.full(size, -np.inf))

    @property
    def elites(self) -> Indices:
        """The items that some cell holds, in the order of the cells."""
        return self.item[self.item >= 0]

    @property
    def coverage(self) -> float:
        """Share of the cells that hold something."""
        return float((self.item >= 0).mean())

    def qd_score(self, floor: float) -> float:
        """Sum over the filled cells of quality less `floor`, the lowest quality there can be (Pugh et al. 2016)."""
        return float((self.quality[self.item >= 0] - floor).sum())

    def updated(self, cells: Indices, quality: npt.ArrayLike, items: Indices) -> Archive:
        """With new pictures, one after another: a cell takes one that is strictly better than what it holds."""
        item, best = self.item.copy(), self.quality.copy()
        for cell, value, name in zip(cells, np.asarray(quality, dtype=np.float64), items, strict=True):
            if value > best[cell]:
                item[cell], best[cell] = name, value
        return Archive(item, best)


def spread_out(measures: npt.ArrayLike, quality: npt.ArrayLike, among: Indices, keep: int) -> list[int]:
    """`keep` of the pictures `among`, far from each other: the best first, then always the one farthest from all taken.

    Farthest-first traversal (Gonzalez 1985), which is within a factor of two of the largest possible smallest distance
    once its first is given; of two as far the better one. Fewer come back where there are fewer.
    """
    places, values = np.asarray(measures, dtype=np.float64), np.asarray(quality, dtype=np.float64)
    left = [int(i) for i in among]
    taken: list[int] = []
    while left and len(taken) < keep:
        apart = {i: min((float(np.linalg.norm(places[i] - places[j])) for j in taken), default=0.0) for i in left}
        best = max(left, key=lambda i: (apart[i], values[i], -i))
        taken.append(best)
        left.remove(best)
    return taken


def mutated(noise: Tensor, fresh: Tensor, strength: float) -> Tensor:
    """sqrt(1 - s^2) noise + s fresh: Gaussian noise again, so that the model sees what it was trained on.

    s = 1 is fresh noise, s = 0 the parent. (The authors add 0.1 of Gaussian noise and keep the sum, whose variance
    grows with each generation.)
    """
    return (1 - strength**2) ** 0.5 * noise + strength * fresh


@dataclass(frozen=True, eq=False)
class Drawn:
    """What is known of a batch of candidates: `quality` [n], and their `features` [n, D]."""

    quality: Floats
    features: Tensor


@dataclass(eq=False)
class Evolved:
    """All candidates of one prompt and the archive over them; `parents` is -1 for those of the first population."""

    archive: Archive
    grid: Grid
    axes: Axes
    quality: Floats
    measures: Floats
    noise: Tensor
    parents: list[int]
    coverage: list[float] = field(default_factory=list)

    def kept(self, keep: int) -> list[int]:
        """The set: elites far from each other; where cells are fewer than `keep`, then the best of the others."""
        chosen = spread_out(self.measures, self.quality, self.archive.elites, keep)
        others = [int(i) for i in np.argsort(-self.quality, kind="stable") if i not in chosen]
        return chosen + others[: keep - len(chosen)]


def evolve(
    draw: Callable[[Tensor], Drawn],
    learn: Callable[[Drawn, Tensor], Axes],
    fresh: Callable[[int], Tensor],
    *,
    initial: int,
    candidates: int,
    batch: int,
    cells: Sequence[int],
    strength: float,
    seed: object,
) -> Evolved:
    """MAP-Elites on initial noise, for one prompt.

    Args:
        draw: noise [n, ...] -> what came of it. Called with `initial` rows, then with at most `batch` at a time.
        learn: the first population and its noise -> the axes; the grid spans where that population lies on them.
        fresh: the noise [...] of candidate i.
        initial, candidates: how many are drawn at random, and how many in all.
        cells: how many cells each axis has.
        strength: of mutation, see `mutated`.
        seed: what decides who is a parent.
    """
    noise = torch.stack([fresh(i) for i in range(initial)])
    first = draw(noise)
    axes = learn(first, noise)
    measures = axes.measure(first.features)
    grid = Grid(measures.min(0), measures.max(0), tuple(cells))
    archive = Archive.empty(grid.size).updated(grid.cells(measures), first.quality, np.arange(initial))
    state = Evolved(archive, grid, axes, first.quality, measures, noise, [-1] * initial, [archive.coverage])
    choose = generator("parents", seed)
    while len(state.noise) < candidates:
        start = len(state.noise)
        count = min(batch, candidates - start)
        elites = state.archive.elites
        parents = elites[torch.randint(len(elites), (count,), generator=choose).numpy()]
        children = torch.stack(
            [mutated(state.noise[p], fresh(start + k), strength) for k, p in enumerate(parents.tolist())]
        )
        found = draw(children)
        places = state.axes.measure(found.features)
        state.archive = state.archive.updated(grid.cells(places), found.quality, np.arange(start, start + count))
        state.quality = np.concatenate([state.quality, found.quality])
        state.measures = np.concatenate([state.measures, places])
        state.noise = torch.cat([state.noise, children])
        state.parents += parents.tolist()
        state.coverage.append(state.archive.coverage)
    return state
