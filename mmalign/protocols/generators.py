"""How far a score ranks the generators as people do, where a benchmark says which generator made what; numpy alone.

A scorer can be poor on single pairs and still rank generators well, since means over many media forgive it; so both are
told. Entries are dictionaries that JSON can carry, with None where a figure is undefined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmalign.protocols.pairs import Floats, Pairs, mean_by_prompt

SAMPLES = 1000  # bootstrap draws of prompts
_CHUNK = 1 << 22  # signs held at once


class Marks(NamedTuple):
    """One kind of mark [n] that media got: whose medium it is, for which prompt, and the mark (higher is better)."""

    generator: Sequence[str]
    prompt: Sequence[str]
    value: Floats


def contests(pairs: Pairs, generator: Sequence[str | None]) -> tuple[Marks, Marks]:
    """The contests between two generators, each for both: what people said, and what the score says; 1, 1/2 or 0.

    Args:
        pairs: those that count.
        generator: [slots] who made the medium in a slot. Pairs of one generator with itself, or of an unnamed one, tell
            nothing about generators and are left out.
    """
    ours, theirs = ([generator[slot] for slot in side] for side in (pairs.first, pairs.second))
    kept = np.array([a is not None and b is not None and a != b for a, b in zip(ours, theirs, strict=True)], dtype=bool)
    kept &= ~np.isnan(pairs.human)
    names = [str(name) for side in (ours, theirs) for name, keep in zip(side, kept, strict=True) if keep]
    prompts = [prompt for prompt, keep in zip(pairs.prompts, kept, strict=True) if keep] * 2
    said = [(np.sign(side[kept]) + 1) / 2 for side in (pairs.human, pairs.difference)]
    human, score = (Marks(names, prompts, np.concatenate([won, 1 - won])) for won in said)
    return human, score


def generator_figure(score: Marks, human: Marks, wins: Marks | None) -> dict[str, Any] | None:
    """Each generator's means, and the rank correlations of those means over generators; None for fewer than two.

    Args:
        score: scores of the media, each once.
        human: what people gave: ratings of media, or wins of contests.
        wins: of the score in the same contests, where there are contests.

    Returns:
        n (generators); `generators`: name -> score, human, wins (mean, low, high, n); `means` and `wins`: the
        correlations of the score's mean, or of its share of wins, with people's: kendall_tau_b, kendall_tau_c and
        spearman, each with value, low and high (95 %, percentile bootstrap over prompts, the generators fixed).
    """
    names = sorted(set(score.generator) & set(human.generator))
    if len(names) < 2:
        return None
    kinds = {"score": score, "human": human, "wins": wins}
    return {
        "n": len(names),
        "generators": {
            name: {kind: _mean(marks, name) for kind, marks in kinds.items() if marks is not None} for name in names
        },
        "means": correlated(score, human, names),
        "wins": None if wins is None else correlated(wins, human, names),
    }


def _mean(marks: Marks, name: str) -> dict[str, Any]:
    inside = [number for number, own in enumerate(marks.generator) if own == name]
    return mean_by_prompt(marks.value[inside], [marks.prompt[number] for number in inside])


def correlated(
    ours: Marks,
    theirs: Marks,
    names: Sequence[str],
    statistic: Callable[[Floats, Floats], dict[str, Floats]] | None = None,
) -> dict[str, dict[str, float | None]]:
    """Correlations of two means of each generator: value, low and high (95 %, percentile bootstrap over prompts).

    Args:
        names: the generators, at least two.
        statistic: means [rows, generators] of either side -> figures [rows] by name; None: `rank_correlations`.
    """
    statistic = statistic or rank_correlations
    prompts = sorted({*ours.prompt, *theirs.prompt})
    totals = [_totals(marks, names, prompts) for marks in (ours, theirs)]
    values = statistic(*(_means(np.ones((1, len(prompts))), each) for each in totals))
    parts = [statistic(*(_means(weights, each) for each in totals)) for weights in _draws(len(prompts), len(names))]
    found: dict[str, dict[str, float | None]] = {}
    for kind, value in values.items():
        held = np.concatenate([part[kind] for part in parts])
        held = held[np.isfinite(held)]
        known = bool(np.isfinite(value[0])) and len(prompts) > 1 and len(held) > SAMPLES // 2
        low, high = np.quantile(held, [0.025, 0.975]) if known else (None, None)
        ends = {"low": low if low is None else float(low), "high": high if high is None else float(high)}
        found[kind] = {"value": float(value[0]) if np.isfinite(value[0]) else None, **ends}
    return found


def _totals(marks: Marks, names: Sequence[str], prompts: Sequence[str]) -> tuple[Floats, Floats]:
    """Sum and number of the marks of each prompt and generator, each [prompts, generators]."""
    row, column = ({name: number for number, name in enumerate(each)} for each in (prompts, names))
    kept = [number for number, name in enumerate(marks.generator) if name in column]
    place = [row[marks.prompt[number]] * len(names) + column[marks.generator[number]] for number in kept]
    shape, size = (len(prompts), len(names)), len(prompts) * len(names)
    codes = np.array(place, dtype=np.intp)
    sums = np.bincount(codes, weights=marks.value[kept], minlength=size).reshape(shape)
    counts = np.bincount(codes, minlength=size).reshape(shape)
    return sums.astype(np.float64), counts.astype(np.float64)


def _means(weights: Floats, totals: tuple[Floats, Floats]) -> Floats:
    """[draws, generators] mean marks where prompt p counts weights[draw, p] times; NaN where a generator has none."""
    sums, counts = (weights @ each for each in totals)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = np.where(counts > 0, sums / counts, np.nan)
    return found


def _draws(prompts: int, generators: int) -> Iterator[Floats]:
    """How often each prompt is drawn, [draws, prompts] at a time, `SAMPLES` in all."""
    rng = np.random.default_rng(0)
    step = max(1, _CHUNK // max(prompts, generators**2))
    for start in range(0, SAMPLES, step):
        count = min(step, SAMPLES - start)
        drawn = [np.bincount(rng.integers(0, prompts, prompts), minlength=prompts) for _ in range(count)]
        yield np.stack(drawn).astype(np.float64)


def rank_correlations(x: Floats, y: Floats) -> dict[str, Floats]:
    """tau-b, tau-c and rho of each row of x and y [rows, n]; NaN where one side of a row is level or not known."""
    x, y = _rounded(x), _rounded(y)
    s, t = (np.sign(each[:, :, None] - each[:, None, :]) for each in (x, y))
    balance = (s * t).sum((1, 2))
    r, q = s.sum(2), t.sum(2)
    n = x.shape[1]
    levels = np.array([min(len(np.unique(a)), len(np.unique(b))) for a, b in zip(x, y, strict=True)])
    with np.errstate(invalid="ignore", divide="ignore"):
        tau = balance / np.sqrt((s * s).sum((1, 2)) * (t * t).sum((1, 2)))
        stuart = balance / (n * n * (levels - 1) / levels)
        rho = (r * q).sum(1) / np.sqrt((r * r).sum(1) * (q * q).sum(1))
    return {"kendall_tau_b": tau, "kendall_tau_c": np.where(levels > 1, stuart, np.nan), "spearman": rho}


def _rounded(means: Floats) -> Floats:
    """Over the greatest of them, to twelve places: equal means differ in the last bits by the order of their sums."""
    scale = float(np.nanmax(np.abs(means)))
    found: Floats = np.round(means / scale, 12) if scale > 0 else means
    return found
