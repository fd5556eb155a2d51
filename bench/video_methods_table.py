"""What `bench/video_methods.py` has found so far, as a markdown table: intervals are Student's t over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

SWEEP_SEED = 9  # settings are chosen on it, and it is in no table of results
AXES = ("VQ", "MQ", "TA")
NAMES = {
    "flow_dpo": "Flow-DPO, beta constant", "flow_dpo_late": "Flow-DPO, beta (1 - t)^2",
    "flow_dpo_late_same": "Flow-DPO, beta (1 - t)^2", "rwr": "Flow-RWR", "sft": "SFT on the best of four",
}  # fmt: skip


def over_seeds(values: Sequence[float]) -> str:
    """Mean and 95 % interval over seeds, Student's t; of one seed only the value."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.1f} (one seed)"
    half = float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"


def win_rate(counts: Sequence[int]) -> float:
    """Percent of wins, ties halved."""
    wins, ties, losses = counts
    return 100 * (wins + ties / 2) / (wins + ties + losses)


def table(ledger: Sequence[dict[str, Any]]) -> str:
    """A row for each method and weighting: win rates on the axes, and the change of what is kept exactly, in points."""
    results = _table([run for run in ledger if run["seed"] != SWEEP_SEED])
    tried = _table([run for run in ledger if run["seed"] == SWEEP_SEED])
    apart = _contrasts([run for run in ledger if run["seed"] != SWEEP_SEED and run["weights"] == "1:1:1"])
    return f"{results}\n\n{apart}\n\nTried on seed {SWEEP_SEED}, which is in no other table:\n\n{tried}"


def _contrasts(ledger: Sequence[dict[str, Any]]) -> str:
    """Differences of two methods on the same seeds, whose base clips and training pools are the same."""
    runs = {(run["method"], run["seed"]): run for run in ledger}
    lines = [
        "| difference | seeds | wins on VQ, points | on MQ | on TA | mean of axes, points |",
        "|---" * 6 + "|",
    ]
    for first, second in combinations(NAMES, 2):
        seeds = [seed for method, seed in sorted(runs) if method == first and (second, seed) in runs]
        if not seeds:
            continue
        pairs = [(runs[first, seed], runs[second, seed]) for seed in seeds]
        wins = [over_seeds([win_rate(one[axis]) - win_rate(other[axis]) for one, other in pairs]) for axis in AXES]
        means = [100 * np.mean([one[f"{a}_mean"][1] - other[f"{a}_mean"][1] for a in AXES]) for one, other in pairs]
        lines.append(f"| {first} - {second} | {len(seeds)} | {' | '.join(wins)} | {over_seeds(means)} |")
    return "\n".join(lines)


def _table(ledger: Sequence[dict[str, Any]]) -> str:
    runs: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for run in ledger:
        key = (run["method"], run["weights"], run["lr"], run["beta"], run["steps"])
        runs.setdefault(key, {})[run["seed"]] = run
    lines = [
        "| objective | beta | lr, steps | VQ:MQ:TA | seeds | wins on VQ % | on MQ % | on TA % | mean of axes, points | "
        "all kept, points |",
        "|---" * 10 + "|",
    ]
    for (method, weights, lr, beta, steps), seeds in sorted(runs.items(), key=lambda item: _place(item[0])):
        found = [seeds[seed] for seed in sorted(seeds)]
        wins = [over_seeds([win_rate(run[axis]) for run in found]) for axis in AXES]
        gains = [np.mean([run[f"{a}_mean"][1] - run[f"{a}_mean"][0] for a in AXES]) * 100 for run in found]
        kept = [100 * (run["everything_mean"][1] - run["everything_mean"][0]) for run in found]
        name, strength = NAMES[method], f"{beta:g}" if beta else ""
        cells = [
            name,
            strength,
            f"{lr:g}, {steps}",
            weights,
            str(len(found)),
            *wins,
            over_seeds(gains),
            over_seeds(kept),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _place(key: tuple[Any, ...]) -> tuple[Any, ...]:
    method, weights, *rest = key
    return weights != "1:1:1", list(NAMES).index(method), weights, *rest
