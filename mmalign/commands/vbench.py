"""The verbs around VBench: totals of results files, agreement with people."""

from __future__ import annotations

import typer

from mmalign.commands.vbench_static import static_filter


def register(app: typer.Typer) -> None:
    """Add the group ``vbench`` to the command line."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="rich",
        help="VBench beside `mmalign score`: totals of results files, agreement with people.",
    )
    group.callback()(_vbench)
    for verb in (static_filter,):
        group.command()(verb)
    app.add_typer(group, name="vbench", rich_help_panel="Results")


def _vbench() -> None:
    """Keeps the verbs commands of their own, however few they are."""
