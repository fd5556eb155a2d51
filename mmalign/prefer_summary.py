"""What `mmalign prefer` found, in figures: which source wins, how far the rewards agree, what was kept and dropped."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmalign import labelling
from mmalign.agreement import mean_entry, share_entry
from mmalign.figures import number
from mmalign.jobs_prefer import PHI
from mmalign.preference_row import counted
from mmalign.tables import Dropped, PreferenceRow

if TYPE_CHECKING:
    from mmalign.prefer import Ranked, Reward


def summarise(
    ranked: Sequence[Ranked],
    rewards: Sequence[Reward],
    rows: Sequence[PreferenceRow],
    dropped: Sequence[Dropped],
    routed: int,
) -> dict[str, Any]:
    """The content of summary.json; every mean and share has n and a 95 % interval, with the prompt as the unit.

    Nothing in it depends on when or how often the job ran.
    """
    return {
        "prompts": len({each.group.prompt for each in ranked}),
        "lists": len(ranked),
        "pictures": sum(len(each.phi) for each in ranked),
        "pairs": sum(len(each.signs) for each in ranked),
        "list_sizes": {str(k): n for k, n in sorted(Counter(len(each.phi) for each in ranked).items())},
        "rows": len(rows),
        "dropped": counted(dropped),
        "sources": _sources(ranked),
        "rewards": {reward.column: _reward(ranked, reward, n) for n, reward in enumerate(rewards)},
        "agreement": _agreement(ranked, rewards),
        "strength": mean_entry(*_by_list(ranked, lambda each: list(each.strength[each.vote[:, 1] < 1]))),
        "former": _former(ranked, rewards),
        "routed": routed,
    }


def reasons(summary: dict[str, Any]) -> str:
    """Such as "3 no pair by best_worst, 1 fewer than two pictures"."""
    parts = [f"{entry['count']} {reason}" for reason, entry in summary["dropped"].items()]
    return ", ".join(parts) or "nothing was dropped"


def _by_list(ranked: Sequence[Ranked], values: Any) -> tuple[list[float], list[str]]:
    """All values of all lists, and the prompt of each."""
    found, prompts = [], []
    for each in ranked:
        mine = [float(value) for value in values(each)]
        found += mine
        prompts += [each.group.prompt] * len(mine)
    return found, prompts


def _sources(ranked: Sequence[Ranked]) -> dict[str, Any]:
    """Mean phi of each source's pictures, and how often one of them is the best of its list (shared if level)."""
    names = list(dict.fromkeys(str(row.model or "") for each in ranked for row in each.group.rows))
    if len(names) < 2:
        return {}
    return {
        name: {
            "phi": mean_entry(*_by_list(ranked, lambda each, name=name: each.phi[_from(each, name)])),
            "best": share_entry(*_by_list(ranked, lambda each, name=name: _best(each, name))),
        }
        for name in names
    }


def _from(each: Ranked, name: str) -> npt.NDArray[np.bool_]:
    """[k] True for the pictures of the source `name`."""
    return np.array([str(row.model or "") == name for row in each.group.rows])


def _best(each: Ranked, name: str) -> list[float]:
    """The source's share in the best place of a list; nothing where it has no picture in it."""
    mine = _from(each, name)
    return [float(mine[each.phi == each.phi.max()].mean())] if mine.any() else []


def _reward(ranked: Sequence[Ranked], reward: Reward, column: int) -> dict[str, Any]:
    return {
        "evaluator": reward.evaluator,
        "subscore": reward.subscore,
        "weight": reward.weight,
        "higher_is_better": reward.higher_is_better,
        "ties": share_entry(*_by_list(ranked, lambda each: each.signs[:, column] == 0)),
    }


def _agreement(ranked: Sequence[Ranked], rewards: Sequence[Reward]) -> list[dict[str, Any]]:
    """For each two rewards: mean tau-b over the lists, and the share of pairs that both decide alike."""
    entries = []
    for a, b in zip(*labelling.pair_index(len(rewards)), strict=True):
        values = [(float(each.tau[a, b]), each.group.prompt) for each in ranked]
        values = [(value, prompt) for value, prompt in values if math.isfinite(value)]

        def same(each: Ranked, a: int = a, b: int = b) -> list[float]:
            both = (each.signs[:, a] != 0) & (each.signs[:, b] != 0)
            return list(each.signs[both, a] == each.signs[both, b])

        entries.append(
            {
                "a": rewards[a].column,
                "b": rewards[b].column,
                "tau_b": mean_entry([value for value, _ in values], [prompt for _, prompt in values]),
                "same_order": share_entry(*_by_list(ranked, same)),
            }
        )
    return entries


def _former(ranked: Sequence[Ranked], rewards: Sequence[Reward]) -> dict[str, Any] | None:
    """How often phi and each reward order a pair as the relabelled table did; a level pair counts half."""
    if not any(each.group.former for each in ranked):
        return None
    found: dict[str, list[float]] = {name: [] for name in (PHI, *(reward.column for reward in rewards))}
    prompts: list[str] = []
    for each in ranked:
        first, second = labelling.pair_index(len(each.phi))
        measures = [each.phi, *each.scores.T]
        for before in _former_orders(each):
            decided = before[first] != before[second]
            prompts += [each.group.prompt] * int(decided.sum())
            for name, values in zip(found, measures, strict=True):
                now = np.sign(values[first] - values[second])[decided]
                found[name] += list((1 + now * np.sign(before[second] - before[first])[decided]) / 2)
    return {name: share_entry(values, prompts) for name, values in found.items()}


def _former_orders(each: Ranked) -> list[Any]:
    """The order [k] (lower is better) that every former row gave to the pictures that are left."""
    orders = []
    for row in each.group.former:
        given = {ref.name: place for ref, place in zip(row.media, row.order(), strict=True)}
        orders.append(np.array([given[m.media if isinstance(m.media, str) else m.media.name] for m in each.group.rows]))
    return orders


def show(summary: dict[str, Any]) -> None:
    """Prints tables of sources and rewards, and a sentence of counts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 150)
    if summary["sources"]:
        table = Table("source", title="Which source wins")
        for heading in ("pictures", "mean phi [95 %]", "best of its list [95 %]"):
            table.add_column(Text(heading), justify="right")
        for name, entry in summary["sources"].items():
            cells = [name, str(entry["phi"]["n"]), interval(entry["phi"]), percent(entry["best"])]
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
    if summary["agreement"]:
        table = Table("rewards", title="Do the rewards agree?")
        for heading in ("tau-b [95 %]", "same order [95 %]", "pairs"):
            table.add_column(Text(heading), justify="right")
        for entry in summary["agreement"]:
            order = entry["same_order"]
            cells = [f"{entry['a']} and {entry['b']}", interval(entry["tau_b"]), percent(order), str(order["n"])]
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
    routed = f"; {summary['routed']} pairs to label in to_label.*" if summary["routed"] else ""
    said = f"{summary['rows']} preferences from {summary['lists']} lists of {summary['pictures']} pictures or clips"
    console.print(f"{said}; dropped: {reasons(summary)}{routed}", markup=False, highlight=False, soft_wrap=True)


def interval(entry: dict[str, Any]) -> str:
    """`0.612 [0.551, 0.670]` of an entry with mean or share, low and high."""
    middle = entry.get("mean", entry.get("share"))
    return f"{number(middle, 3)} [{number(entry['low'], 3)}, {number(entry['high'], 3)}]"


def percent(entry: dict[str, Any]) -> str:
    """`61.2 % [55.1, 67.0]`; a dash where nothing was counted."""
    if entry["share"] is None:
        return "–"  # noqa: RUF001
    return f"{100 * entry['share']:.1f} % [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
