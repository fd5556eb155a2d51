"""The verbs around VBench: whether clips are there, totals of results files, agreement with people."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmalign.commands.vbench_check import check, crop
from mmalign.commands.vbench_static import static_filter

if TYPE_CHECKING:
    from rich.table import Table

    from mmalign.vbench.leaderboard import Row
    from mmalign.vbench.record import Figure
    from mmalign.vbench.results import Loaded

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the group ``vbench`` to the command line."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="rich",
        help="VBench beside `mmalign score`: are the clips there, totals of results files, agreement with people.",
    )
    for verb in (check, crop, static_filter, total, agreement):
        group.command()(verb)
    app.add_typer(group, name="vbench", rich_help_panel="Results")


def total(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Results files, the reference's or ours, or their folders.")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="A row of the leaderboard to show beside; may be repeated. Default: the top three and the nearest."
        ),
    ] = None,
    rules: Annotated[
        Literal["strict", "compat"],
        typer.Option(help="strict: no total where a dimension is missing; compat: 0 for it, as the reference does."),
    ] = "strict",
    substitutes: Annotated[
        bool, typer.Option("--substitutes", help="Let color@clip count where color is missing, and say so.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show dimensions, Quality, Semantic and Total of results, beside rows of the leaderboard.

    [bold]Examples[/bold]

        mmalign vbench total results_2026_eval_results.json

        mmalign vbench total runs/wan/scores --against Wan2.1-14B --against Kling

        mmalign vbench total quality_eval_results.json semantic_eval_results.json --rules compat --json
    """  # fmt: skip
    from mmalign.vbench.leaderboard import choose
    from mmalign.vbench.results import load, suite_of

    loaded = load(files)
    suite = suite_of(loaded.scores)
    totals = _with_intervals(_totals(loaded.scores, suite, rules, substitutes), loaded)
    board = [] if suite == "vbench2" else choose(loaded.scores, suite, against)
    if suite == "vbench2" and against:
        raise ValueError("no rows of VBench-2.0's board are known; leave --against out")
    if as_json:
        told = {
            "suite": suite,
            "rules": rules,
            "files": sorted({str(file) for file in loaded.origin.values()}),
            "dimensions": loaded.scores,
            "totals": {name: asdict(each) for name, each in totals.items()},
            "against": [asdict(row) for row in board],
        }
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    Console().print(_table(loaded, totals, board))
    for line in _remarks(loaded, totals, rules, board):
        typer.echo(line)


def _totals(scores: dict[str, float | None], suite: str, rules: Any, substitutes: bool) -> dict[str, Figure]:
    from mmalign.vbench.score import i2v_totals, t2v_totals, vbench2_total

    match suite:
        case "t2v":
            return t2v_totals(scores, rules=rules, substitutes=substitutes)
        case "i2v":
            return i2v_totals(scores, rules=rules, substitutes=substitutes)
        case "vbench2":
            return vbench2_total(scores, rules=rules)
    return {}


def _with_intervals(totals: dict[str, Figure], loaded: Loaded) -> dict[str, Figure]:
    """The record's own figures, which have intervals, where they are of the same rules and so have the same values."""
    found = dict(totals)
    for name, figure in (loaded.record.totals if loaded.record else {}).items():
        value = found[name].value if name in found else None
        if value is not None and figure.value is not None and abs(value - figure.value) < 1e-9:
            found[name] = figure
    return found


def _table(loaded: Loaded, totals: dict[str, Figure], board: list[Row]) -> Table:
    from rich.table import Table

    from mmalign.vbench.dimensions import DIMENSIONS, base

    table = Table()
    table.add_column("percent", no_wrap=True)
    for name in ("these", *(row.name for row in board)):
        table.add_column(name, justify="right", overflow="fold")
    order = {name: number for number, name in enumerate(DIMENSIONS)}
    labels = dict.fromkeys([*loaded.scores, *(board[0].scores if board else ())])
    ends = {each.name: each.ci95 for each in loaded.record.dimensions} if loaded.record else {}
    for label in sorted(labels, key=lambda label: (order.get(base(label), len(order)), label)):
        value = _percent(loaded.scores.get(label), ends.get(label))
        table.add_row(label, value, *(_percent(row.scores.get(label)) for row in board))
    table.add_section()
    for name, figure in totals.items():
        value = _percent(figure.value, figure.ci95)
        table.add_row(name, value, *(_percent(row.totals.get(name)) for row in board))
    return table


def _percent(value: float | None, ends: tuple[float, float] | None = None) -> str:
    from mmalign.figures import percent

    return percent(value) + (f"\n[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if value is not None and ends else "")


def _remarks(loaded: Loaded, totals: dict[str, Figure], rules: str, board: list[Row]) -> list[str]:
    from mmalign.vbench.score import missing_words

    lines = []
    for each in loaded.record.dimensions if loaded.record else ():
        if each.n < each.expected:
            bounds = f": between {_percent(each.bounds[0])} and {_percent(each.bounds[1])}" if each.bounds else ""
            lines.append(f"{each.name}: {each.n} of {each.expected} clips have a score{bounds}")
    for name, figure in totals.items():
        if figure.missing and name not in ("total", "i2v_total"):
            fate = "count as 0" if rules == "compat" else "so there is no total of it (--rules compat counts them as 0)"
            lines.append(f"{name}: {missing_words(name, figure)} missing, {fate}")
        if figure.substitutes and name not in ("total", "i2v_total"):
            lines.append(f"{name}: rests on {', '.join(figure.substitutes)}; not leaderboard-comparable")
    lines += [f"{row.name}: {row.note}" for row in board if row.note]
    return lines


def agreement(
    labels: Annotated[Path, typer.Argument(help="People's comparisons: a table, or a published file of VBench.")],
    scores: Annotated[
        list[str], typer.Argument(metavar="MODEL=RESULTS...", help="Each model's results file, or its folder.")
    ],
    dimension: Annotated[
        str | None, typer.Option(help="Only this dimension; of a published file, the dimension that it is of.")
    ] = None,
    evaluator: Annotated[
        str | None, typer.Option(help="Try this evaluator's scores, such as color@clip, on every dimension.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how far scores agree with people: win ratios, their correlation, pairwise accuracy with intervals.

    docs/vbench.md has the format of the labels.

    [bold]Examples[/bold]

        mmalign vbench agreement labels.jsonl lavie=lavie_eval_results.json cogvideo=runs/cogvideo/scores

        mmalign vbench agreement scene.json lavie=a.json modelscope=b.json --dimension scene --json
    """
    from mmalign.vbench.meta import agreement as agree
    from mmalign.vbench.meta import read_labels, read_scores

    named = dict(_named(each) for each in scores)
    found = agree(read_labels(labels, dimension), read_scores(named), evaluator)
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    for name, figures in found.items():
        console.print(_agreement_table(name, figures))
        for line in _agreement_lines(figures):
            typer.echo(line)


def _named(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ValueError(f"{text!r} names no model; write MODEL=RESULTS, such as lavie={path or text}")
    return name, path


def _agreement_table(name: str, figures: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title=name, title_justify="left")
    for column in ("win ratio, percent", "people", "scores"):
        table.add_column(column, justify="right" if column != "win ratio, percent" else "left")
    for model, sides in figures["models"].items():
        table.add_row(model, *(_interval(sides[side], "share") for side in ("human", "metric")))
    return table


def _agreement_lines(figures: dict[str, Any]) -> list[str]:
    count = f"{figures['comparisons']} comparisons on {figures['prompts']} prompts"
    if figures["unscored"]:
        count += f"; {figures['unscored']} more without two scores are left out"
    lines = [count]
    if figures["accuracy"]["mean"] is not None:
        ties = f"scores tie on {100 * figures['metric_ties']:.1f} %"
        lines.append(f"pairwise accuracy {_interval(figures['accuracy'], 'mean')} % ({ties}, which count half)")
    told = [
        f"{kind.capitalize()} {figures[kind]['value']:.4f}"
        for kind in ("pearson", "spearman")
        if figures[kind] is not None and figures[kind]["value"] is not None
    ]
    if told:
        paper = f"; the paper's figure, called Spearman there, is {figures['paper']:.4f}" if figures["paper"] else ""
        lines.append(f"correlation of win ratios over {figures['points']} models: {', '.join(told)}{paper}")
    return lines


def _interval(entry: dict[str, Any], key: str) -> str:
    if entry[key] is None:
        return "–"  # noqa: RUF001
    ends = "" if entry["low"] is None else f" [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"
    return f"{100 * entry[key]:.1f}{ends}"
