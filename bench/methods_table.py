"""What `bench/methods.py` has found so far: a line per cell, `table.json`, `table.md` and `methods.png`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mmalign.stats import mean_ci, win_rate

CONDITIONS = {"clean": "clean labels", "flipped": "a fifth turned round", "multi": "three annotators vote"}
MODELS = {"sd": ("eps, shapes-sd", "#1f6f8b", "o"), "flow": ("flow, shapes-flow", "#d9822b", "s")}


def summary(runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Of (base, aligned) results, one pair for each seed: paired win rates and changes over all prompts of all seeds.

    Intervals are over prompts; `by_seed` has the win rate of each training alone.
    """

    def column(which: int, name: str, of: Sequence[Any] = runs) -> np.ndarray:
        return np.array([row[name] for run in of for row in run[which]["rows"]])

    def hps(which: int) -> np.ndarray:
        return np.array([value for run in runs for value in run[which]["hps"]])

    apart = [np.mean([value for run in runs for value in run[which]["apart"]]) for which in (0, 1)]
    by_seed = [win_rate(column(1, "bold", [run]), column(0, "bold", [run])).rate for run in runs]
    change = mean_ci(column(1, "fidelity") - column(0, "fidelity"))
    return {
        "win": list(win_rate(column(1, "bold"), column(0, "bold")))[:3],
        "mixed": list(win_rate(column(1, "mixed"), column(0, "mixed")))[:3],
        "hps": list(win_rate(hps(1), hps(0)))[:3], "fidelity": float(column(1, "fidelity").mean()),
        "change": list(change)[:3],
        "diversity": float(apart[1] / apart[0]), "by_seed": by_seed,
        "seconds": float(np.mean([run[1]["seconds"] for run in runs])),
    }  # fmt: skip


def line(found: dict[str, Any]) -> str:
    win, low, high = (100 * x for x in found["win"])
    change = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in found["change"]))
    seeds = " ".join(f"{100 * x:.0f}" for x in found["by_seed"])
    return (
        f"win {win:.1f} [{low:.1f}, {high:.1f}] % (seeds {seeds}), mixed win {100 * found['mixed'][0]:.1f} %, "
        f"fidelity {100 * found['fidelity']:.1f} % ({change}), hps win {100 * found['hps'][0]:.1f} %, "
        f"diversity {found['diversity']:.2f}, {found['seconds']:.0f} s"
    )


def cells(out: Path) -> list[dict[str, Any]]:
    """A summary for every model, condition and method that has a result, over the seeds that have one."""
    paths: dict[tuple[str, str, str], list[Path]] = {}
    for result in sorted(out.glob("*/seed-*/*/*/result.json")):
        model, _, condition, method = result.relative_to(out).parts[:4]
        paths.setdefault((model, condition, method), []).append(result)
    found = []
    for (model, condition, method), results in sorted(paths.items()):
        runs = [(json.loads((r.parents[2] / "base.json").read_text()), json.loads(r.read_text())) for r in results]
        found.append({"model": model, "condition": condition, "method": method, **summary(runs)})
    return found


def table(out: Path) -> None:
    """Prints a line per cell and writes the three files into `out`."""
    found = cells(out)
    for cell in found:
        print(f"{cell['model']:5} {cell['condition']:8} {cell['method']:18} {line(cell)}")
    (out / "table.json").write_text(json.dumps(found, indent=1))
    (out / "table.md").write_text(markdown(found))
    plot(found).savefig(out / "methods.png", dpi=110)


def markdown(found: Sequence[dict[str, Any]]) -> str:
    """A row per model and method; of each condition the win rate with its interval, and the change in fidelity."""
    at = {(cell["model"], cell["method"], cell["condition"]): cell for cell in found}
    heads = [f"{c}: win %, fidelity" for c in CONDITIONS] + ["multi: mixed win %", "hps win %", "diversity", "s"]
    lines = ["| model | method | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for model, method in sorted({key[:2] for key in at}):
        row = [model, method]
        for condition in CONDITIONS:
            cell = at.get((model, method, condition))
            row.append("" if cell is None else "{:.0f} [{:.0f}, {:.0f}], ".format(*(100 * x for x in cell["win"])) +
                       f"{100 * cell['change'][0]:+.1f}")  # fmt: skip
        multi, clean = at.get((model, method, "multi")), at.get((model, method, "clean"))
        row.append(f"{100 * multi['mixed'][0]:.0f}" if multi else "")
        row += [f"{100 * clean['hps'][0]:.0f}", f"{clean['diversity']:.2f}", f"{clean['seconds']:.0f}"] if clean else [
            "", "", ""
        ]  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def plot(found: Sequence[dict[str, Any]]) -> Figure:
    """Win rate against the base model by method: a panel per condition, a marker per model, bars the interval."""
    mean = {m: np.mean([c["win"][0] for c in found if c["method"] == m]) for m in {c["method"] for c in found}}
    order = sorted(mean, key=lambda name: float(mean[name]))
    figure = Figure(figsize=(11, 1.2 + 0.26 * len(order)), layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(np.atleast_1d(figure.subplots(1, len(CONDITIONS), sharey=True, sharex=True)))
    for axes, (condition, title) in zip(panels, CONDITIONS.items(), strict=True):
        for shift, (model, (label, colour, marker)) in zip((0.14, -0.14), MODELS.items(), strict=True):
            chosen = [c for c in found if c["model"] == model and c["condition"] == condition]
            if chosen:
                win, low, high = 100 * np.array([c["win"] for c in chosen]).T
                y = [order.index(c["method"]) + shift for c in chosen]
                axes.errorbar(win, y, xerr=[win - low, high - win], fmt=marker, color=colour, label=label,
                              markersize=4.5, elinewidth=1.2)  # fmt: skip
        axes.axvline(50, color="#888888", linewidth=0.8, linestyle="--")
        axes.set_title(title, fontsize=10)
        axes.grid(axis="both", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(range(len(order)), order, fontsize=9)
    panels[1].set_xlabel("win rate against the base model, % (interval over prompts of all seeds)", fontsize=9)
    panels[-1].legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="lower right")
    return figure
