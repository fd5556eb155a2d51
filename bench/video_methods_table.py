"""What `bench/video_methods.py` has found so far, as a markdown table: intervals are Student's t over seeds."""

from __future__ import annotations

from collections.abc import Sequence
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
    runs: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for run in ledger:
        key = (run["method"], run["weights"], f"{run['lr']:g}", f"{run['beta']:g}", str(run["steps"]))
        runs.setdefault(key, {})[run["seed"]] = run
    lines = [
        "| objective | VQ:MQ:TA | seeds | wins on VQ % | on MQ % | on TA % | mean of axes, points | all kept, points |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (method, weights, *_), seeds in sorted(runs.items()):
        found = [seeds[seed] for seed in sorted(seeds)]
        wins = [over_seeds([win_rate(run[axis]) for run in found]) for axis in AXES]
        gains = [np.mean([run[f"{a}_mean"][1] - run[f"{a}_mean"][0] for a in AXES]) * 100 for run in found]
        kept = [100 * (run["everything_mean"][1] - run["everything_mean"][0]) for run in found]
        cells = [NAMES[method], weights, str(len(found)), *wins, over_seeds(gains), over_seeds(kept)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
