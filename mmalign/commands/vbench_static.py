"""The verb that chooses the clips on which VBench's temporal flickering is measured: vbench static-filter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def static_filter(
    folder: Annotated[Path, typer.Argument(help="Folder of clips called {prompt}-{number}.mp4.")],
    suite: Annotated[Path, typer.Option(help="VBench's suite, VBench_full_info.json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the chosen clips and what was measured.")],
    weights: Annotated[
        Path | None, typer.Option(help="RAFT's file or its folder; default: where `mmalign weights` keeps it.")
    ] = None,
    network: Annotated[
        Literal["raft-things", "raft-large-torchvision"], typer.Option(help="Which known weights, without --weights.")
    ] = "raft-things",
    rules: Annotated[
        Literal["compat", "strict"],
        typer.Option(help="compat is VBench's; strict repairs rounding and the order of names."),
    ] = "compat",
    clips: Annotated[int, typer.Option(min=1, help="Clips of each prompt that are wanted.")] = 5,
    whole: Annotated[
        bool, typer.Option("--whole", help="Measure each clip to its end, also when it is known that it moves.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    processes: Annotated[int, typer.Option(min=1, help="Scoring processes, one per GPU.")] = 1,
) -> None:
    """Choose, of each prompt's clips, the first five in which nothing moves, and copy them for temporal flickering.

    Run the same command again to go on after a stop. Prompts with too few static clips are said.

    [bold]Examples[/bold]

        mmalign vbench static-filter runs/flicker --suite VBench_full_info.json --output runs/static

        mmalign vbench static-filter runs/flicker --suite VBench_full_info.json -o runs/static --weights raft-things.pth
    """
    from mmalign.static_filter import Settings, run
    from mmalign.weights import MissingWeights

    params: dict[str, object] = {"network": network, "rules": rules, "early": not whole}
    if weights is not None:
        params["checkpoint"] = str(weights.absolute())
    scoring = {"device": device, "processes": processes}
    try:
        found = run(Settings(folder, suite, output, clips, params, scoring))
    except MissingWeights as missing:
        raise ValueError(missing.told("give as --weights")) from None
    typer.echo("\n".join([*found.account(), f"clips: {output / 'filtered_videos'}"]))
    if not any(found.static.values()):
        typer.echo("error: no clip is static; the reasons stand above", err=True)
        raise typer.Exit(1)
