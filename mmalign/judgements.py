"""From rows of preference tables to what objectives take: pairs, lists and single judged pictures.

Whatever a row states (scores, rank, labels of one or several dimensions, votes of several people) becomes one matrix:
`wins[i, j]`, how likely medium i is better than j. Pairs and lists are read off it, so that ties, soft votes and
weighted dimensions mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from mmalign.jobs_inputs import Data
from mmalign.preference_row import PreferenceRow

_DIGITS = 12  # means of weighted votes are rounded to: a half of them is a tie, whatever order they were added in


@dataclass(frozen=True)
class Group:
    """k media to train on together, k = 1 for singles; in a pair the winner comes first.

    `values`: in [0, 1], higher is better; (label, 1 - label) for a pair, phi for a list, 1 or 0 for a single.
    `scores`: as a reward gave them, where there is one. `rewards`: the same normalised over the table; without scores
    the shares of votes, for a single `values`. `axes`: with `data.axes` what `values` is, for each of them; None where
    it was not judged. `axis_scores`: likewise. `user`: who judged, empty if nobody is named.
    """

    prompts: tuple[str, ...]
    media: tuple[Any, ...]
    values: tuple[float, ...]
    scores: tuple[float, ...] | None = None
    rewards: tuple[float, ...] = ()
    weight: float = 1.0
    origin: str = ""
    user: str = ""
    axes: tuple[tuple[float, ...] | None, ...] = ()
    axis_scores: tuple[tuple[float, ...] | None, ...] = ()

    @property
    def identity(self) -> tuple[str, ...]:
        """What seeds this group's draws: the pictures, and the prompt (all of them where they differ)."""
        prompts = self.prompts[:1] if len(set(self.prompts)) == 1 else self.prompts
        return (*(medium.hash() for medium in self.media), *prompts)

    @property
    def gap(self) -> float:
        """How much better the winner of a pair is, in [0, 1]: by rewards, or by the share of votes."""
        return max(0.0, self.rewards[0] - self.rewards[1])


@dataclass(frozen=True)
class Judged:
    """A row, or several people's rows on the same media, as one matrix."""

    prompts: tuple[str, ...]
    media: tuple[Any, ...]
    wins: np.ndarray  # [k, k], wins + wins.T = 1 off the diagonal, diagonal 1/2
    scores: tuple[float, ...] | None
    weight: float
    origin: str
    user: str = ""
    axes: tuple[np.ndarray | None, ...] = ()  # wins on each of data.axes
    axis_scores: tuple[tuple[float, ...] | None, ...] = ()

    @property
    def share(self) -> np.ndarray:
        """phi, [k] in [0, 1]."""
        return share_of(self.wins)


def share_of(wins: np.ndarray) -> np.ndarray:
    """phi: mean of wins [k, k] over the other media, [k] in [0, 1]."""
    shares: np.ndarray = np.round((wins.sum(1) - 0.5) / (len(wins) - 1), _DIGITS)
    return shares


def wins_of(row: PreferenceRow, dimensions: dict[str, float] | None = None, dimension: str | None = None) -> np.ndarray:
    """1 where medium i is better than j, 0 where it is worse, 1/2 for ties and on the diagonal: [k, k].

    Args:
        dimensions: weights; the result is the weighted mean over those that the row was judged on.
        dimension: one of them, needed if the row has several and no weights are given.

    Raises:
        ValueError: the row has several dimensions and neither is given, or none of the weighted ones.
    """
    if dimensions is None:
        return _compared(row.order(dimension))
    known = {name: weight for name, weight in dimensions.items() if name in row.dimensions() and weight > 0}
    if not known:
        raise ValueError(
            f"{row.origin} is judged on {', '.join(row.dimensions())}, none of data.dimensions or data.axes "
            f"({', '.join(dimensions)})"
        )
    total = sum(weight * _compared(row.order(name)) for name, weight in known.items())
    wins: np.ndarray = np.round(np.asarray(total) / sum(known.values()), _DIGITS)
    return wins


def _compared(order: Sequence[float]) -> np.ndarray:
    lower = np.asarray(order, float)
    return 0.5 + 0.5 * np.sign(lower[None, :] - lower[:, None])


def judged(rows: Sequence[PreferenceRow], data: Data) -> list[Judged]:
    """Rows as matrices; with `data.votes: share` the rows on the same media are one, each vote at its row's weight.

    Scores of several dimensions are min-max normalised over the table before they are added up. With `data.axes` a
    row's matrix is the mean over those that it was judged on. Ratings of several people become their mean, likewise.
    """
    ranges = _ranges(rows)
    weights = dict.fromkeys(data.axes, 1.0) or data.dimensions
    found = [
        Judged(
            row.prompts or (row.prompt,) * len(row.media), row.media, wins_of(row, weights, data.dimension),
            _scores(row, data, ranges), row.weight, row.origin, row.user_id or "",
            tuple(wins_of(row, None, axis) if axis in row.dimensions() else None for axis in data.axes),
            tuple((row.scores or {}).get(axis) for axis in data.axes),
        )
        for row in rows
    ]  # fmt: skip
    return _merged(found) if data.votes == "share" else found


def _ranges(rows: Sequence[PreferenceRow]) -> dict[str, tuple[float, float]]:
    held: dict[str, list[float]] = {}
    for row in rows:
        for name, values in (row.scores or {}).items():
            held.setdefault(name, []).extend(values)
    return {name: (min(values), max(values)) for name, values in held.items()}


def _scores(row: PreferenceRow, data: Data, ranges: dict[str, tuple[float, float]]) -> tuple[float, ...] | None:
    if row.scores is None or data.axes:
        return None
    if data.dimensions is None:
        return row.scores[data.dimension or next(iter(row.scores))]
    known = {name: weight for name, weight in data.dimensions.items() if name in row.scores and weight > 0}
    total = np.zeros(len(row.media))
    for name, weight in known.items():
        low, high = ranges[name]
        total += weight * (np.asarray(row.scores[name]) - low) / (high - low or 1.0)
    return tuple((total / sum(known.values())).tolist())


def _merged(found: list[Judged]) -> list[Judged]:
    """One matrix for each set of media, whatever order a row lists them in."""
    together: dict[Any, list[Judged]] = {}
    for one in found:
        together.setdefault(frozenset(zip(one.prompts, map(str, one.media), strict=True)), []).append(one)
    merged = []
    for votes in together.values():
        first = votes[0]
        names = list(map(str, first.media))
        places = [[list(map(str, vote.media)).index(name) for name in names] for vote in votes]
        weights = [vote.weight for vote in votes]
        wins = _mean_of([vote.wins for vote in votes], weights, places)
        assert wins is not None
        numbers = range(len(first.axes))
        axes = tuple(_mean_of([vote.axes[axis] for vote in votes], weights, places) for axis in numbers)
        scores = _ratings_of([vote.scores for vote in votes], weights, places)
        rated = tuple(_ratings_of([vote.axis_scores[axis] for vote in votes], weights, places) for axis in numbers)
        user = first.user if len({vote.user for vote in votes}) == 1 else ""
        weight = float(np.mean(weights))
        merged.append(replace(first, wins=wins, weight=weight, user=user, axes=axes, scores=scores, axis_scores=rated))
    return merged


def _mean_of(
    votes: Sequence[np.ndarray | None], weights: Sequence[float], places: Sequence[list[int]]
) -> np.ndarray | None:
    """Weighted mean of the matrices, or rows of ratings, that there are, the media of each in another order.

    None if there are none.
    """
    held = [
        (vote[np.ix_(*[place] * vote.ndim)], weight)
        for vote, weight, place in zip(votes, weights, places, strict=True)
        if vote is not None
    ]
    if not held:
        return None
    shares = np.array([weight for _, weight in held])
    total, arrays = shares.sum(), [vote for vote, _ in held]
    mean = np.tensordot(shares / total, arrays, 1) if total else np.mean(arrays, 0)
    return np.round(np.asarray(mean), _DIGITS)


def _ratings_of(
    votes: Sequence[tuple[float, ...] | None], weights: Sequence[float], places: Sequence[list[int]]
) -> tuple[float, ...] | None:
    """`_mean_of`, of ratings: one that only some people gave is the mean of theirs."""
    mean = _mean_of([None if vote is None else np.array(vote) for vote in votes], weights, places)
    return None if mean is None else tuple(mean.tolist())


def _normalised(found: Sequence[Judged], data: Data) -> list[tuple[float, ...] | None]:
    """Scores mapped to [0, 1] by the table's least and largest, or as they are with `data.normalise: none`."""
    values = [score for one in found if one.scores is not None for score in one.scores]
    low, high = (min(values), max(values)) if values and data.normalise == "minmax" else (0.0, 1.0)
    spread = high - low or 1.0
    return [None if one.scores is None else tuple((score - low) / spread for score in one.scores) for one in found]


def pairs(found: Sequence[Judged], data: Data) -> list[Group]:
    """Every pair of every row: the better one first, ties by `data.ties`; labels hard unless `data.soft_labels`.

    A tie is left out (`drop`), becomes a pair with label 1/2 (`soft`), or two pairs, in both orders at half the weight.
    With `data.pairing: across` the rows of different prompts are paired first, see `across`.
    """
    found = across(found) if data.pairing == "across" else found
    groups: list[Group] = []
    for one, rewards in zip(found, _normalised(found, data), strict=True):
        for a, b in combinations(range(len(one.media)), 2):
            i, j = (a, b) if one.wins[a, b] >= 0.5 else (b, a)
            won = label = float(one.wins[i, j])
            axes = _axes_of(one, i, j, data)
            tie = label == 0.5
            if data.ties == "drop" and (all(axis is None for axis in axes) if one.axes else tie):
                continue
            orders, weight = [(i, j)], one.weight
            if tie and data.ties == "half":
                orders, weight, label = [(i, j), (j, i)], one.weight / 2, 1.0
            elif not data.soft_labels and not tie:
                label = 1.0
            for better, worse in orders:
                both = (better, worse)
                values = (label, 1 - label)
                scores = None if one.scores is None else tuple(one.scores[k] for k in both)
                rewarded = (won, 1 - won) if rewards is None else tuple(rewards[k] for k in both)
                prompts, media = tuple(one.prompts[k] for k in both), tuple(one.media[k] for k in both)
                rated = tuple(None if row is None else tuple(row[k] for k in both) for row in one.axis_scores)
                groups.append(
                    Group(prompts, media, values, scores, rewarded, weight, one.origin, one.user, axes, rated)
                )
    return groups


def _axes_of(one: Judged, i: int, j: int, data: Data) -> tuple[tuple[float, ...] | None, ...]:
    """(label, 1 - label) of i over j on each axis, None where it was not judged, or is a tie that is dropped."""
    labels = [None if wins is None else float(wins[i, j]) for wins in one.axes]
    if data.ties == "drop":
        labels = [None if label == 0.5 else label for label in labels]
    if not data.soft_labels:
        labels = [None if label is None else 0.5 + 0.5 * np.sign(label - 0.5) for label in labels]
    return tuple(None if label is None else (float(label), 1 - float(label)) for label in labels)


def across(found: Sequence[Judged]) -> list[Judged]:
    """Joint preferences (2404.00530): medium j of each row against medium j of the next row with another prompt.

    Which is better is a matter of scores, that must therefore mean the same for every prompt. As many pairs as a row
    has media, for each row but the last prompt's. ValueError for rows without scores.
    """
    bare = next((one for one in found if one.scores is None), None)
    if bare is not None:
        raise ValueError(f"data.pairing: across compares scores, and {bare.origin} has none; use pairing: within")
    paired = []
    for one, other in _with_next(found):
        for a, b, *both in zip(one.media, other.media, one.scores or (), other.scores or (), strict=False):
            prompts = (one.prompts[0], other.prompts[0])
            weight = (one.weight + other.weight) / 2
            wins = _compared([-score for score in both])
            paired.append(Judged(prompts, (a, b), wins, tuple(both), weight, f"{one.origin} and {other.origin}"))
    return paired


def _with_next(found: Sequence[Judged]) -> Iterator[tuple[Judged, Judged]]:
    """Each row and the next one with another prompt, where there is one."""
    following: Judged | None = None
    ways = []
    for one, other in reversed(list(pairwise(found))):
        following = other if one.prompts[0] != other.prompts[0] else following
        ways.append((one, following))
    return ((one, other) for one, other in reversed(ways) if other is not None)


def lists(found: Sequence[Judged], data: Data) -> list[Group]:
    """Every row as a list; phi are the row's own scores where they are named phi, else shares of wins.

    Rows in which all are tied rank nothing and are left out, unless `data.ties` keeps them.
    """
    groups = []
    named = data.dimension == "phi" and data.dimensions is None
    for one, rewards in zip(found, _normalised(found, data), strict=True):
        phi = one.scores if named and one.scores is not None else tuple(one.share.tolist())
        if not all(-1e-9 <= value <= 1 + 1e-9 for value in phi):
            raise ValueError(
                f"{one.origin}: phi is a share of comparisons won, from 0 to 1, and here it is {max(phi, key=abs):g}; "
                "call the column otherwise, and data.dimension by that name: then it is ranked"
            )
        if len(set(phi)) == 1 and data.ties == "drop":
            continue
        axes = tuple(None if wins is None else tuple(share_of(wins).tolist()) for wins in one.axes)
        groups.append(
            Group(
                one.prompts, one.media, phi, one.scores, rewards or phi, one.weight, one.origin, one.user, axes,
                one.axis_scores,
            )
        )  # fmt: skip
    return groups


def singles(found: Sequence[Judged], data: Data) -> list[Group]:
    """Every medium by itself: a like if it is better than the rest of its row, or if its score reaches a threshold.

    With `data.desirable_from` a like is a score of at least that; else a share of wins above 1/2, and a picture at
    exactly 1/2 is neither and left out.
    """
    groups = []
    for one, rewards in zip(found, _normalised(found, data), strict=True):
        for i in range(len(one.media)):
            if data.desirable_from is not None:
                if one.scores is None:
                    raise ValueError(f"data.desirable_from needs scores, and {one.origin} has none; drop the key")
                desirable = float(one.scores[i] >= data.desirable_from)
            elif one.share[i] == 0.5:
                continue
            else:
                desirable = float(one.share[i] > 0.5)
            score = None if one.scores is None else (one.scores[i],)
            reward = (desirable,) if rewards is None else (rewards[i],)
            groups.append(
                Group((one.prompts[i],), (one.media[i],), (desirable,), score, reward, one.weight, one.origin, one.user)
            )
    return groups


AS = {"pairs": pairs, "lists": lists, "singles": singles}
