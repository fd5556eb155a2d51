"""The verbs that show results: compare, report, contact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (compare, report, contact):
        app.command(rich_help_panel="Results")(verb)


def compare(
    a: Annotated[Path, typer.Argument(help="Results folder to compare against, as a rule the base model's.")],
    b: Annotated[Path, typer.Argument(help="Results folder whose wins are counted.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the comparison to this JSON file.")
    ] = None,
    allow_different: Annotated[
        bool, typer.Option("--allow-different", help="Compare although versions or weights of an evaluator differ.")
    ] = False,
    pair_by: Annotated[
        Literal["auto", "seed", "sample"],
        typer.Option(help="What makes a pair besides its prompt; auto takes the seed where every row has one."),
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare two scored runs prompt by prompt: differences, win rates, intervals, tests.

    [bold]Examples[/bold]

        mmalign compare runs/base/scores runs/aligned/scores

        mmalign compare runs/base/scores runs/aligned/scores --json
    """
    from mmalign.compare import compare as compare_runs

    comparison = compare_runs(a, b, allow_different=allow_different, pair_by=pair_by)
    if output is not None:
        comparison.save(output)
    if as_json:
        typer.echo(json.dumps(comparison.to_json(), indent=2, ensure_ascii=False))
    else:
        comparison.show()


def report(
    results: Annotated[list[Path], typer.Argument(help="One or more results folders, the base model's first.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    run: Annotated[Path | None, typer.Option(help="Training run whose curves and config to show.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    rank_by: Annotated[
        list[str] | None,
        typer.Option(help="Score by which pictures are chosen, such as hps or shapes_truth/fidelity; may be repeated."),
    ] = None,
    vbench_against: Annotated[
        list[str] | None,
        typer.Option(
            help="Row of VBench's board to show beside; may be repeated. Default: the top three, the nearest."
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page: distributions, win rates, thumbnails, training curves, the config.

    [bold]Examples[/bold]

        mmalign report runs/base/scores runs/aligned/scores --run runs/dpo --output report.html

        mmalign report runs/wan/scores --vbench-against Wan2.1-14B --vbench-against Kling
    """
    from mmalign.report import build

    typer.echo(
        f"report: {build(results, output, run=run, title=title, rank_by=rank_by, vbench_against=vbench_against)}"
    )


def contact(
    sources: Annotated[
        list[Path], typer.Argument(help="Media tables, folders of media, or results folders; one or more.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The HTML file; default: index.html in the folder of the only source."),
    ] = None,
    embed: Annotated[
        bool, typer.Option("--embed", help="Put small copies of the media into the page instead of links.")
    ] = False,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
) -> None:
    """Write a contact sheet: all pictures and clips on one page, to sort by any score, to filter, and to play.

    [bold]Examples[/bold]

        mmalign contact runs/base

        mmalign contact runs/base/scores runs/aligned/scores --output contact.html

        mmalign contact runs/base --embed --output to-mail.html
    """
    from mmalign.report_sheet import build

    typer.echo(f"contact sheet: {build(sources, output, embed=embed, title=title)}")
