"""Before a VBench run: are the clips of a suite there, and the input images at the ratio of the clips?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mmalign.vbench.clips import Found


def check(
    media: Annotated[Path, typer.Argument(metavar="FOLDER", help="The clips: a folder, or a media table.")],
    suite: Annotated[Path | None, typer.Option(help="The suite's JSON file, as its authors publish it.")] = None,
    mode: Annotated[str, typer.Option(help="standard, category, custom; auto: by what is given.")] = "auto",
    dimensions: Annotated[
        list[str] | None, typer.Option("--dimensions", "-d", help="These alone; repeatable. Default: all of the suite.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Clips per prompt.")] = 5,
    category: Annotated[Path | None, typer.Option(help="Mode category: text file with a prompt per line.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="Image-to-video: the folder of input images, to check too.")
    ] = None,
    ratio: Annotated[str | None, typer.Option(help="Image-to-video: which of their ratios, such as 16-9.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every missing name.")] = False,
) -> None:
    """Say for each dimension how many of the clips are there, which are not, and why that may be.

    Exit codes: 0 if all are there, 1 if some are missing, 2 a mistake in what was asked for, or a folder without any.

    [bold]Examples[/bold]

        mmalign vbench check my_clips --suite VBench_full_info.json

        mmalign vbench check my_clips --suite VBench_full_info.json -d human_action -d scene --json

        mmalign vbench check my_clips --suite vbench2_i2v_full_info.json --images crop --ratio 16-9
    """
    from mmalign.config import build, nearest
    from mmalign.jobs_vbench import VBench
    from mmalign.score_vbench import find
    from mmalign.vbench.suite import read_suite

    asked = [name for text in dimensions or [] for name in text.replace(",", " ").split()]
    given: dict[str, Any] = {"suite": suite, "category": category, "images": images, "ratio": ratio}
    values = {name: str(value) for name, value in given.items() if value is not None}
    block = build(VBench, {**values, "mode": mode, "samples": samples}, "mmalign vbench check")
    if block.kind == "custom":
        found = find(media, block, [])
    else:
        known = list(read_suite(block.suite).dimensions) if block.suite else []
        if known and (strangers := [name for name in asked if name not in known]):
            near = nearest(strangers[0], known)
            raise ValueError(
                f"--dimensions: {suite} has none called {strangers[0]!r}.{near} It has {', '.join(known)}."
            )
        found = find(media, block, asked or known or ["human_action"], scoring=False)
    if as_json:
        typer.echo(json.dumps(_told(found), indent=2, ensure_ascii=False))
    else:
        there = len(found.rows) - len(found.missing)
        typer.echo("\n".join([*found.lines(), f"{media}: {there} of {len(found.rows)} clips are there"]))
    if found.missing:
        raise typer.Exit(1)


def _told(found: Found) -> dict[str, Any]:
    return {
        "clips": len(found.rows),
        "missing": sorted(found.missing),
        "dimensions": {
            each.dimension: {"expected": each.expected, "found": each.found, "missing": list(each.missing)}
            for each in found.coverage
        },
        "causes": list(found.causes),
        "others": list(found.others),
        "notes": list(found.notes),
    }


def crop(
    info: Annotated[Path, typer.Argument(metavar="INFO", help="i2v-bench-info.json of the image suite.")],
    originals: Annotated[Path, typer.Argument(metavar="ORIGINALS", help="Folder of the original images, origin/.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder of the crops, for vbench.images.")],
    ratio: Annotated[str, typer.Option(help="Width to height, from 1-1 up to 16-9, such as 5-4.")],
) -> None:
    """Cut the image-to-video suite's images to a ratio that its authors do not offer, exactly as they do.

    [bold]Examples[/bold]

        mmalign vbench crop i2v-bench-info.json origin crop --ratio 5-4
    """
    from mmalign.vbench.crops import crop_images

    typer.echo(f"images: {crop_images(info, originals, output, ratio)}")
