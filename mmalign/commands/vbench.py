"""The verbs around VBench: totals of results files, agreement with people."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the group ``vbench`` to the command line."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="rich",
        help="VBench beside `mmalign score`: totals of results files, agreement with people.",
    )
    for verb in ():
        group.command()(verb)
    app.add_typer(group, name="vbench", rich_help_panel="Results")
