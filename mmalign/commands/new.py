"""The verb that begins something new: new evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the group ``new`` to the command line."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Begin an evaluator of your own.")
    group.callback()(_new)
    group.command()(evaluator)
    app.add_typer(group, name="new", rich_help_panel="Look and check")


def _new() -> None:
    """Keeps `evaluator` a command of its own while it is the only one."""


def evaluator(
    name: Annotated[str, typer.Argument(help="As configs shall name it, such as steadiness, or color@mine.")],
    package: Annotated[
        bool, typer.Option("--package", help="A package of its own in the folder NAME, for an installed mmalign.")
    ] = False,
) -> None:
    """Write an evaluator that works as it stands, with its test, to be made your own; docs/add-a-dimension.md.

    In a checkout: evaluators/NAME.py and tests/test_NAME.py. With --package: a folder with a pyproject.toml.

    [bold]Examples[/bold]

        mmalign new evaluator steadiness

        mmalign new evaluator steadiness --package
    """
    from mmalign.skeletons import new_evaluator, new_package

    folder = Path(name.replace("@", "__"))
    files = new_package(name, folder) if package else new_evaluator(name)
    for file in files:
        typer.echo(f"wrote {file}")
    typer.echo("next:")
    if package:
        typer.echo(f"  pip install --editable {folder}")
    typer.echo(f"  python -m pytest {files[-1]}")
    typer.echo(f"  mmalign score CLIPS --evaluator {name} --output scores    # a folder of clips, or a media table")
    typer.echo("  mmalign report scores")
