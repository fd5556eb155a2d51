"""What `bench/guidance.py` has found so far: a line per cell, `table.md` and `guidance.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy.stats import t as student

MODELS = {"sd": "shapes-sd (v)", "flow": "shapes-flow (flow)", "video": "shapes-video (flow, clips)"}
HELD_OUT = {"sd": ("fidelity", "utility"), "flow": ("fidelity", "utility"), "video": ("TA", "MQ", "VQ")}
SWEEP_SEED = 9
GROUPS = {  # rows of the plot: beginnings of the strategies' names
    "choosing": ("best of n", "search", "neighbourhood", "diversity", "stochastic"),
    "steering": ("best of n", "stochastic best", "particles", "noise", "gradient", "nrg"),
}
COLOURS = (
    "#444444", "#1f77b4", "#e07b1a", "#2a9d4a", "#c43c39", "#8e5bb5", "#8c564b", "#d673b8", "#17a0b3", "#a3a520",
    "#5566cc", "#e8b23a",
)  # fmt: skip

Cell = dict[str, Any]


def gain(run: Cell, name: str) -> dict[str, float]:
    """mean, low and high of what one run gained; `hps` wherever it stands, followed or held out."""
    found: dict[str, float] = run["gains"][name]
    return found


def pooled(runs: Sequence[Cell], name: str) -> tuple[float, float, float]:
    """Mean gain and its 95 % interval.

    Of one seed the bootstrap over its prompts; of several Student's t over the seeds' means, each of which has prompts
    of its own.
    """
    means = [gain(run, name)["mean"] for run in runs]
    if len(runs) == 1:
        only = gain(runs[0], name)
        return only["mean"], only["low"], only["high"]
    half = float(student.ppf(0.975, len(means) - 1)) * float(np.std(means, ddof=1)) / len(means) ** 0.5
    mean = float(np.mean(means))
    return mean, mean - half, mean + half


def label(guidance: dict[str, Any], many: Sequence[dict[str, Any]]) -> str:
    """A setting in words: what differs among the settings of its strategy; all that is set where nothing does."""
    told = [key for key in guidance if key not in ("kind", "method", "potential")]
    differing = [key for key in told if len({str(each.get(key)) for each in many}) > 1]
    return ", ".join(f"{key.replace('_', ' ')} {guidance[key]}" for key in differing or told)


def cells(ledger: Sequence[Cell]) -> list[Cell]:
    """One for each model, strategy, reward and setting: all its runs, in the order of cost."""
    found: dict[tuple[str, ...], Cell] = {}
    for run in ledger:
        key = (run["model"], run["strategy"], run["follows"], str(run["guidance"]))
        cell = found.setdefault(key, {**{k: run[k] for k in ("model", "strategy", "follows", "guidance")}, "runs": []})
        cell["runs"].append(run)
    for cell in found.values():
        cell["calls"] = float(np.mean([run["times"]["network_calls"] for run in cell["runs"]]))
        cell["seconds"] = float(np.mean([run["times"]["seconds"] for run in cell["runs"]]))
        cell["gradients"] = float(np.mean([run["reward_gradients"] for run in cell["runs"]]))
        cell["seen"] = float(np.mean([run["reward_calls"] for run in cell["runs"]]))
    names = sorted({run["strategy"] for run in ledger}, key=_first)

    def place(cell: Cell) -> tuple[Any, ...]:
        model = list(MODELS).index(cell["model"])
        return model, cell["follows"], names.index(cell["strategy"]), cell["calls"], str(cell["guidance"])

    return sorted(found.values(), key=place)


def _first(strategy: str) -> tuple[bool, str]:
    """Best of n before all others, which follow by name."""
    return strategy != "best of n", strategy


def line(run: Cell) -> str:
    """What one run found, on a line."""
    parts = [f"{name} {each['mean']:+.3f}" for name, each in run["gains"].items() if isinstance(each, dict)]
    return (
        f"{run['times']['network_calls']:.3g} x the calls, {run['times']['seconds']:.3g} x the seconds; "
        + ", ".join(parts)
    )


def table(ledger: Sequence[Cell], out: Path) -> None:
    """Prints the table and writes table.md and guidance.png into `out`."""
    kept = [run for run in ledger if run["seed"] != SWEEP_SEED]
    found = cells(kept)
    told = markdown(found) + sweep([run for run in ledger if run["seed"] == SWEEP_SEED])
    print(told)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(told)
    if found:
        plot(found).savefig(out / "guidance.png", dpi=110)


def markdown(found: Sequence[Cell]) -> str:
    """A table for each model and reward: gains with intervals, costs in plain samples."""
    lines: list[str] = []
    for model, follows in dict.fromkeys((cell["model"], cell["follows"]) for cell in found):
        chosen = [cell for cell in found if (cell["model"], cell["follows"]) == (model, follows)]
        held = [name for name in (*HELD_OUT[model], "hps") if name != follows and name in chosen[0]["runs"][0]["gains"]]
        start = {name: _plain(chosen, name) for name in (follows, *held)}
        lines += [
            f"**{MODELS[model]}**, followed: {follows}. Plain sampling: "
            + ", ".join(f"{name} {value:.3f}" for name, value in start.items()) + ".", "",
            "| strategy | setting | seeds | network calls | seconds | reward looks | reward gradients | "
            + " | ".join([f"gain in {follows}", *(f"held out: {name}" for name in held)]) + " |",
            "|---" * (8 + len(held)) + "|",
        ]  # fmt: skip
        for cell in chosen:
            many = [other["guidance"] for other in chosen if other["strategy"] == cell["strategy"]]
            lines.append(
                f"| {cell['strategy']} | {label(cell['guidance'], many)} | {len(cell['runs'])} | {cell['calls']:.3g} | "
                f"{cell['seconds']:.2g} | {cell['seen']:.3g} | {cell['gradients']:.3g} | "
                + " | ".join(_interval(cell["runs"], name) for name in (follows, *held)) + " |"
            )  # fmt: skip
        lines.append("")
    return "\n".join(lines) + "\n"


def _plain(chosen: Sequence[Cell], name: str) -> float:
    """Plain sampling's mean over the runs of best of n, which all have the same prompts; else of what there is."""
    runs = [run for cell in chosen if cell["strategy"] == "best of n" for run in cell["runs"]]
    runs = runs or [run for cell in chosen for run in cell["runs"]]
    return float(np.mean([run["gains"][name]["plain"] for run in runs]))


def _interval(runs: Sequence[Cell], name: str) -> str:
    if name not in runs[0]["gains"]:
        return ""
    mean, low, high = pooled(runs, name)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"


def sweep(runs: Sequence[Cell]) -> str:
    """What settings were chosen by, a row each."""
    if not runs:
        return ""
    lines = [
        f"Tried on seed {SWEEP_SEED}, which is in no other table:", "",
        "| model | strategy | setting | network calls | gain in hps | held out: fidelity |", "|---" * 6 + "|",
    ]  # fmt: skip
    for cell in cells(runs):
        setting = ", ".join(f"{k} {v}" for k, v in cell["guidance"].items() if k not in ("kind", "method", "potential"))
        lines.append(f"| {cell['model']} | {cell['strategy']} | {setting} | {cell['calls']:.3g} | "
                     f"{_interval(cell['runs'], 'hps')} | {_interval(cell['runs'], 'fidelity')} |")  # fmt: skip
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------- plot


def plot(found: Sequence[Cell]) -> Figure:
    """Gains against network calls in plain samples: two rows per model, what only chooses and what steers, with best of
    n in both; the reward on the left, what is held out on the right."""
    found = sorted((cell for cell in found if cell["follows"] == "hps"), key=lambda cell: _first(cell["strategy"]))
    shown = [model for model in MODELS if any(cell["model"] == model for cell in found)]
    rows = [(model, *group) for model in shown for group in GROUPS.items()]
    figure = Figure(figsize=(13, 3.6 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = np.atleast_2d(np.array(figure.subplots(len(rows), 2, sharex=True)))
    most = max(cell["calls"] for cell in found)
    for (left, right), (model, title, beginnings) in zip(grid, rows, strict=True):
        mine = [cell for cell in found if cell["model"] == model and cell["strategy"].startswith(beginnings)]
        names = [each for each in dict.fromkeys(cell["strategy"] for cell in found) if each.startswith(beginnings)]
        held = HELD_OUT[model][0]
        for axes, name, said in ((left, "hps", "followed: HPS"), (right, held, f"held out: {held}")):
            for place, strategy in enumerate(names):
                points = [cell for cell in mine if cell["strategy"] == strategy and name in cell["runs"][0]["gains"]]
                _line(axes, points, name, 1 + 0.02 * (place - len(names) / 2), COLOURS[place % len(COLOURS)])
            axes.set_title(f"{MODELS[model]}, {title}; {said}", fontsize=10)
            axes.set_ylabel("gain over plain sampling", fontsize=9)
            _dress(axes, most)
        right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    for axes in grid[-1]:
        axes.set_xlabel("network calls, in plain samples", fontsize=9)
    return figure


def _line(axes: Axes, points: Sequence[Cell], name: str, apart: float, colour: str) -> None:
    """A strategy's line; `apart` moves it a little along the axis, so that bars at one cost do not hide each other."""
    if points:
        found = np.array([pooled(cell["runs"], name) for cell in points])
        x = np.array([cell["calls"] for cell in points]) * apart
        axes.plot(x, found[:, 0], color=colour, marker="o", markersize=4, linewidth=1.5, label=points[0]["strategy"])
        axes.vlines(x, found[:, 1], found[:, 2], color=colour, linewidth=1.0, alpha=0.45)


def _dress(axes: Axes, most: float) -> None:
    axes.axhline(0, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    ticks = [2**k for k in range(0, 6) if 2**k <= 1.3 * most]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.tick_params(labelbottom=True)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
