"""Learned axes, the archive and the search, each against its definition; and what they find on a known landscape."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmalign.guidance import axes, diversity
from mmalign.noise import generator
from mmalign.stats import mean_ci


def _features(*seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# ------------------------------------------------------------------------------------------------ axes


def test_the_loss_is_its_formula_and_so_is_its_gradient() -> None:
    weight, triplets = _features(1, shape=(2, 5)) / 3, _features(2, shape=(7, 3, 5))
    w, x, margin = weight.numpy(), triplets.numpy(), 0.05
    total, slope, flat = 0.0, np.zeros_like(w), 0
    for a, n, f in x:
        near, far = a - n, a - f
        value = margin + math.fsum((w @ near) ** 2) - math.fsum((w @ far) ** 2)
        flat += value <= 0
        if value > 0:
            total += value
            slope += 2 * np.outer(w @ near, near) - 2 * np.outer(w @ far, far)
    assert 0 < flat < 7, "both sides of the hinge are there"
    weight.requires_grad_(True)
    loss = axes.triplet_loss(weight, *triplets.unbind(1), margin)
    loss.backward()
    assert loss.item() == pytest.approx(total / 7, rel=1e-12)
    assert np.allclose(weight.grad, slope / 7, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(
        lambda w: axes.triplet_loss(w, *triplets.unbind(1), margin), (weight.detach().requires_grad_(True),)
    )


def test_turning_the_axes_changes_nothing_and_offsets_cancel() -> None:
    weight, triplets = _features(3, shape=(2, 5)), _features(4, shape=(20, 3, 5))
    turn = torch.linalg.qr(_features(5, shape=(2, 2)))[0]
    loss = axes.triplet_loss(weight, *triplets.unbind(1), 0.05)
    assert torch.isclose(axes.triplet_loss(turn @ weight, *triplets.unbind(1), 0.05), loss, rtol=1e-12)
    assert torch.isclose(axes.triplet_loss(weight, *(triplets + 3).unbind(1), 0.05), loss, rtol=1e-10)
    swapped = axes.triplet_loss(weight, triplets[:, 0], triplets[:, 2], triplets[:, 1], 0.05)
    assert not torch.isclose(swapped, loss)


def _simulated(count: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Features of 200 pictures in which two of twelve directions are what a judge looks at; triplets of them."""
    x = _features(seed, shape=(200, 12)) @ torch.linalg.qr(_features(6, shape=(12, 12)))[0]
    seen = (x @ _features(7, shape=(12, 2))).numpy()
    return x, axes.judged(seen, count, seed)


def test_axes_are_found_from_judgements() -> None:
    x, triplets = _simulated(300, 8)
    found = axes.fit_axes(x[triplets], 2, 0)
    assert found.accuracy is not None and found.accuracy > 0.9
    new, judged = _simulated(500, 9)
    correct = axes.agreement(found.weight, (new[judged] - found.centre) / found.scale)
    print("new triplets in the judged order:", correct)
    assert correct > 0.9
    # What it measures is what the judge looks at, up to a turn and a scale: a linear map explains it.
    truth = (new @ _features(7, shape=(12, 2))).numpy()
    places = found.measure(new)
    explained = places @ np.linalg.lstsq(places, truth, rcond=None)[0]
    assert 1 - ((truth - explained) ** 2).sum() / (truth**2).sum() > 0.9


def test_judgements_at_random_teach_nothing() -> None:
    x, triplets = _simulated(300, 10)
    flips = np.random.default_rng(11).random(300) < 0.5
    triplets[flips] = triplets[flips][:, [0, 2, 1]]
    found = axes.fit_axes(x[triplets], 2, 0)
    assert found.accuracy is not None and abs(found.accuracy - 0.5) < 0.2


def test_a_fit_is_a_function_of_triplets_and_seed() -> None:
    x, triplets = _simulated(40, 12)
    first, again, other = (axes.fit_axes(x[triplets], 2, seed) for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    assert axes.fit_axes(x[triplets[:10]], 2, 0).accuracy is None, "too few to hold any out"
    scaled = axes.fit_axes((7 * x + 2)[triplets], 2, 0)
    assert np.allclose(scaled.measure(7 * x + 2), first.measure(x), atol=1e-6), "units of features cancel"


def test_a_place_does_not_depend_on_the_neighbours() -> None:
    x, triplets = _simulated(40, 13)
    found = axes.fit_axes(x[triplets], 3, 0)
    whole = found.measure(x)
    assert whole.shape == (200, 3)
    assert all(np.array_equal(found.measure(x[i : i + 1])[0], whole[i]) for i in range(200))


def test_a_judge_orders_by_distance_in_deviations() -> None:
    values = np.random.default_rng(14).standard_normal((30, 2)) * [1, 1000]
    found = axes.judged(values, 400, 3)
    assert all(len(set(each)) == 3 for each in found.tolist())
    for a, n, f in found:
        near, far = (math.hypot(*((values[a] - values[k]) / values.std(0))) for k in (n, f))
        assert near < far
    assert np.array_equal(found, axes.judged(values, 400, 3))
    assert not np.array_equal(found, axes.judged(values, 400, 4))
    assert np.array_equal(axes.judged(np.c_[values, np.ones(30)], 400, 3), found), "a level score says nothing"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: axes.fit_axes(torch.zeros(0, 3, 4), 2, 0), "n of 1 or more"),
        (lambda: axes.fit_axes(torch.zeros(5, 2, 4), 2, 0), "features \\[n, 3, D\\]"),
        (lambda: axes.fit_axes(torch.ones(5, 3, 4), 2, 0), "no axis can tell them apart"),
        (lambda: axes.judged([[1.0], [2.0]], 5, 0), "three scored pictures"),
        (lambda: axes.judged([[1.0], [2.0], [math.nan]], 5, 0), "without a score"),
        (lambda: axes.judged([[1.0]] * 5, 5, 0), "all pictures the same scores"),
    ],
)
def test_bad_judgements_are_named(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


# ------------------------------------------------------------------------------------------------ archive


def test_cells_are_those_of_a_loop() -> None:
    grid = diversity.Grid(np.array([-1.0, 0.0, 2.0]), np.array([1.0, 10.0, 2.5]), (4, 3, 2))
    measures = np.random.default_rng(15).uniform([-2, -3, 1.8], [2, 13, 2.7], (300, 3))
    for row, cell in zip(measures, grid.cells(measures), strict=True):
        place = []
        for value, low, high, count in zip(row, grid.low, grid.high, grid.shape, strict=True):
            edges = [low + (high - low) * k / count for k in range(1, count)]
            place.append(sum(value >= edge for edge in edges))
        assert cell == (place[0] * 3 + place[1]) * 2 + place[2]
    assert grid.size == 24
    assert grid.cells([[1.0, 10.0, 2.5]]).tolist() == [23], "the outer edge belongs to the last cell"
    flat = diversity.Grid(np.zeros(1), np.zeros(1), (4,))
    assert flat.cells([[0.0]]).tolist() == [0], "where all lie at one place, there is one cell"


def test_the_archive_keeps_the_best_of_each_cell() -> None:
    rng = np.random.default_rng(16)
    cells, quality = rng.integers(0, 12, 200), rng.integers(0, 9, 200) / 2
    archive = diversity.Archive.empty(15)
    for start in (0, 70, 71):
        stop = {0: 70, 70: 71, 71: 200}[start]
        archive = archive.updated(cells[start:stop], quality[start:stop], np.arange(start, stop))
    for cell in range(15):
        inside = np.flatnonzero(cells == cell)
        if len(inside):
            best = inside[np.argmax(quality[inside])]  # the first among equals
            assert archive.item[cell] == best and archive.quality[cell] == quality[best]
        else:
            assert archive.item[cell] == -1 and archive.quality[cell] == -np.inf
    filled = len(set(cells.tolist()))
    assert archive.coverage == filled / 15 and len(archive.elites) == filled
    assert archive.qd_score(-1.0) == pytest.approx(sum(quality[cells == c].max() + 1 for c in set(cells.tolist())))
    whole = diversity.Archive.empty(15).updated(cells, quality, np.arange(200))
    assert np.array_equal(whole.item, archive.item), "how it is cut into batches changes nothing"
    empty = diversity.Archive.empty(3)
    assert empty.coverage == 0 and empty.qd_score(-5.0) == 0 and not len(empty.elites)


def test_spreading_out_takes_the_farthest() -> None:
    places = np.array([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0], [0.0, 7.0], [10.0, 0.1]])
    quality = np.array([5.0, 9.0, 1.0, 1.0, 2.0])
    assert diversity.spread_out(places, quality, np.arange(5), 3) == [1, 4, 3]
    assert diversity.spread_out(places, quality, np.array([0, 2]), 5) == [0, 2]
    assert diversity.spread_out(places, quality, np.arange(5), 0) == []


def test_mutation_keeps_the_noise_gaussian() -> None:
    noise, fresh = _features(17, shape=(20_000,)), _features(18, shape=(20_000,))
    child = diversity.mutated(noise, fresh, 0.6)
    assert child.std().item() == pytest.approx(1, abs=0.03)
    assert float((child * noise).mean()) == pytest.approx(0.8, abs=0.03)
    assert torch.equal(diversity.mutated(noise, fresh, 0.0), noise)
    assert torch.equal(diversity.mutated(noise, fresh, 1.0), fresh)


# ------------------------------------------------------------------------------------------------ search


def _landscape(noise: torch.Tensor) -> diversity.Drawn:
    """Features are noise seen through a fixed map; the reward also prefers one place of the two attributes."""
    quality = (-(noise[:, 2:] ** 2).mean(1) - 0.5 * ((noise[:, :2] - 0.5) ** 2).sum(1)).numpy()
    return diversity.Drawn(quality, noise @ _features(19, shape=(8, 12)))


def _judge(drawn: diversity.Drawn, noise: torch.Tensor) -> axes.Axes:
    triplets = axes.judged(noise[:, :2].numpy(), 150, 0)
    return axes.fit_axes(drawn.features[triplets], 2, 0)


def _search(seed: int, draw=_landscape, **changes) -> diversity.Evolved:
    settings = {"initial": 40, "candidates": 160, "batch": 8, "cells": (4, 4), "strength": 0.5, "seed": seed}
    fresh = lambda i: torch.randn(8, generator=generator("fresh", seed, i), dtype=torch.float64)  # noqa: E731
    return diversity.evolve(draw, _judge, fresh, **(settings | changes))


def test_the_search_against_its_own_record() -> None:
    sizes: list[int] = []

    def draw(noise: torch.Tensor) -> diversity.Drawn:
        sizes.append(len(noise))
        return _landscape(noise)

    found = _search(1, draw, candidates=150)
    assert sizes == [40] + [8] * 13 + [6] and len(found.noise) == len(found.quality) == len(found.measures) == 150
    assert torch.equal(found.noise[3], torch.randn(8, generator=generator("fresh", 1, 3), dtype=torch.float64))
    for child in range(40, 150):
        fresh = torch.randn(8, generator=generator("fresh", 1, child), dtype=torch.float64)
        assert torch.allclose(found.noise[child], 0.75**0.5 * found.noise[found.parents[child]] + 0.5 * fresh)
        assert found.parents[child] < 40 + (child - 40) // 8 * 8, "a parent was drawn before its batch"
    whole = diversity.Archive.empty(16).updated(found.grid.cells(found.measures), found.quality, np.arange(150))
    assert np.array_equal(whole.item, found.archive.item)
    assert found.coverage == sorted(found.coverage) and found.coverage[-1] == found.archive.coverage
    again = _search(1, candidates=150)
    assert torch.equal(again.noise, found.noise) and again.kept(6) == found.kept(6)


def test_what_is_kept() -> None:
    found = _search(2)
    kept = found.kept(6)
    assert len(set(kept)) == 6 and set(kept) <= set(found.archive.elites.tolist())
    assert found.kept(1) == [int(np.argmax(found.quality))], "the best picture is its cell's best, and comes first"
    more = found.kept(30)
    elites = set(found.archive.elites.tolist())
    assert len(set(more)) == 30 and set(more[: len(elites)]) == elites
    assert found.quality[more[len(elites) :]].min() >= max(np.delete(found.quality, more)), "then the best of the rest"


def test_it_covers_more_than_best_of_n_of_the_same_budget() -> None:
    """Cells of the true two attributes that a set of eight reaches, over ten seeds; and how much quality that costs."""
    gains, costs = [], []
    for seed in range(10):
        found = _search(100 + seed)
        fresh = torch.stack(
            [torch.randn(8, generator=generator("plain", seed, i), dtype=torch.float64) for i in range(160)]
        )
        plain = _landscape(fresh)
        best = np.argsort(-plain.quality)[:8]
        truth = diversity.Grid(np.full(2, -2.0), np.full(2, 2.0), (4, 4))
        ours = len(set(truth.cells(found.noise[found.kept(8), :2].numpy()).tolist()))
        theirs = len(set(truth.cells(fresh[best, :2].numpy()).tolist()))
        gains.append(ours - theirs)
        costs.append(plain.quality[best].mean() - found.quality[found.kept(8)].mean())
    print("cells reached, more than best of n:", mean_ci(gains), "quality given up:", mean_ci(costs))
    assert mean_ci(gains).low > 0.5


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_limits_of_mutation(strength: float) -> None:
    """Without mutation nothing new is found; with all of it, candidates are as drawn at random."""
    found = _search(3, strength=strength)
    if strength == 0:
        assert set(found.coverage) == {found.coverage[0]}
        assert torch.equal(found.noise[60], found.noise[found.parents[60]])
    else:
        assert torch.equal(found.noise[60], torch.randn(8, generator=generator("fresh", 3, 60), dtype=torch.float64))
