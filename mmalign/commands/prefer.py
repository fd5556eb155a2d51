"""The verb that labels: prefer, with merge and audit beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mmalign.commands.configs import Config, Job, Overrides, load_job

if TYPE_CHECKING:
    from mmalign.jobs import EvaluatorSpec

Table = Annotated[Path, typer.Argument(metavar="TABLE", help="A preference table in any known format.")]


class _RunIsUnderstood(TyperGroup):
    """`prefer CONFIG` is `prefer run CONFIG`, as every other verb takes its config."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] in ("-h", "--help"))
        return super().parse_args(ctx, args if named or not args else ["run", *args])


def register(app: typer.Typer) -> None:
    """Add the group ``prefer`` to the command line."""
    group = typer.Typer(
        cls=_RunIsUnderstood,
        no_args_is_help=True,
        rich_markup_mode="rich",
        help="Rank pictures by several rewards and write preferences to train on; merge people's answers; audit labels."
        "\n\n[bold]Examples[/bold]\n\n    mmalign prefer configs/shapes/prefer.yaml"
        "\n\n    mmalign prefer merge runs/shapes-prefer/preferences.jsonl answers.jsonl -o merged.jsonl"
        "\n\n    mmalign prefer audit runs/shapes-prefer/preferences.jsonl",
    )
    for verb in (run, merge, audit):
        group.command()(verb)
    app.add_typer(group, name="prefer", rich_help_panel="Jobs")
    app.command("prefer-answers", rich_help_panel="Jobs")(prefer_answers)


def run(
    config: Config,
    overrides: Overrides = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Make new labels of the pictures that are there, by other rules.")
    ] = False,
) -> None:
    """Draw pictures, score them by several rewards, and write a preference table. The word `run` may be left out.

    [bold]Examples[/bold]

        mmalign prefer configs/shapes/prefer.yaml

        mmalign prefer run configs/shapes/prefer.yaml --set label.kind=pairs --replace
    """
    settings = load_job(config, overrides, Job.prefer)
    from mmalign.prefer import run as run_job

    typer.echo(f"preference table: {run_job(settings, replace_labels=replace)}")


def prefer_answers(config: Config, overrides: Overrides = None) -> None:
    """Build preference rows of a vision-language model's answers: from claims, habit, several pictures, or negatives.

    [bold]Examples[/bold]

        mmalign prefer-answers configs/prefer/answers_claims.yaml

        mmalign prefer-answers configs/prefer/answers_bdhs.yaml --set rows=data/captions.jsonl --set limit=100
    """
    settings = load_job(config, overrides, Job.build)
    from mmalign.build_answers import run as run_job

    typer.echo(f"rows to train on: {run_job(settings)}")


def merge(
    table: Table,
    answers: Annotated[list[Path], typer.Argument(metavar="ANSWERS", help="Filled-in JSONL or CSV; repeatable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The table to write, .jsonl.")],
    user: Annotated[str | None, typer.Option(help="Whose answers they are, where the file does not say.")] = None,
    dimension: Annotated[str | None, typer.Option(help="What people were asked about, such as phi.")] = None,
) -> None:
    """Merge people's answers into a preference table: they take the place of the rewards' verdict on those pairs.

    [bold]Examples[/bold]

        mmalign prefer merge runs/x/preferences.jsonl answers-anna.jsonl -o runs/x/merged.jsonl
    """
    from mmalign.routing import merge as merge_answers

    merged = merge_answers(table, answers, output, user=user, dimension=dimension)
    typer.echo(f"{merged.sentence()}\npreference table: {output}")


def audit(
    table: Table,
    format: Annotated[str, typer.Option(help="See `mmalign list formats`; auto tells it by the columns.")] = "auto",
    root: Annotated[Path | None, typer.Option(help="Folder that relative media paths start from.")] = None,
    dimension: Annotated[
        str | None, typer.Option(help="Which judgement is audited; default: the only one, or phi.")
    ] = None,
    scores: Annotated[
        list[Path] | None, typer.Option(help="Results folder with scores of the table's media; repeatable.")
    ] = None,
    evaluator: Annotated[
        list[str] | None, typer.Option("--evaluator", "-e", help="Evaluator to score the media with; repeatable.")
    ] = None,
    params: Annotated[
        list[str] | None, typer.Option(help="Parameters of each evaluator in turn, as a JSON object; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first rows.")] = None,
    pictures: Annotated[bool, typer.Option(help="Read the pictures, for brightness and other biases.")] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The JSON file; default: audit.json beside the table.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a self-contained page too.")] = None,
) -> None:
    """Look at labels before training on them: agreement, calibration, ties, biases, and who judged how.

    [bold]Examples[/bold]

        mmalign prefer audit pairs.jsonl

        mmalign prefer audit test.json --root images -e clip_score --params '{"checkpoint": "weights/clip"}'

        mmalign prefer audit pairs.jsonl --scores runs/x/scores --html audit.html
    """
    from mmalign.audit import run as run_audit

    specs = _specs(evaluator or [], params or [])
    written = run_audit(
        table, format=format, root=root, dimension=dimension, scores=scores or [], evaluators=specs, limit=limit,
        pictures=pictures, output=output, html=html,
    )  # fmt: skip
    typer.echo(f"audit: {written}")


def _specs(names: list[str], params: list[str]) -> list[EvaluatorSpec]:
    from mmalign.jobs import EvaluatorSpec

    if len(params) > len(names):
        raise ValueError(f"there are {len(params)} --params for {len(names)} --evaluator; give each evaluator one")
    specs = []
    for place, name in enumerate(names):
        text = params[place] if place < len(params) else "{}"
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--params {text!r} is not JSON ({error.msg}); write --params '{{\"key\": 1}}'") from None
        if not isinstance(values, dict):
            raise ValueError(f"--params {text!r} is not a JSON object; write --params '{{\"key\": 1}}'")
        specs.append(EvaluatorSpec(name=name, params=values))
    return specs
