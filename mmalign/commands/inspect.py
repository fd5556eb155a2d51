"""The verbs that look around: list, info, cache, doctor."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Kind(StrEnum):
    """What can be listed."""

    evaluators = "evaluators"
    methods = "methods"
    guidance = "guidance"
    models = "models"
    formats = "formats"
    benchmarks = "benchmarks"
    configs = "configs"
    vbench_quirks = "vbench-quirks"


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Root = Annotated[Path | None, typer.Option("--root", help="The cache's folder, if not the usual one.")]


def register(app: typer.Typer) -> None:
    """Add the verbs and the group ``cache`` to the command line."""
    panel = "Look and check"
    app.command("list", rich_help_panel=panel)(list_)
    app.command(rich_help_panel=panel)(info)
    app.command(rich_help_panel=panel)(doctor)
    group = typer.Typer(
        help="The cache of latents, embeddings, reference errors, inversions and digests of media.",
        no_args_is_help=True,
    )
    group.command("ls")(cache_ls)
    group.command("clear")(cache_clear)
    app.add_typer(group, name="cache", rich_help_panel=panel)


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: AsJson = False,
    plugins: Annotated[bool, typer.Option(help="Look for evaluators in other installed packages too.")] = True,
) -> None:
    """List what there is: evaluators, methods, guidance, model families, formats, benchmarks, configs, VBench's quirks.

    [bold]Examples[/bold]

        mmalign list evaluators

        mmalign list methods --json
    """
    rows = listing(kind, plugins=plugins, declared=True)
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column(kind.value, no_wrap=True, overflow="ignore", min_width=max(len(row["name"]) for row in rows))
    table.add_column("summary")
    for row in rows:
        told = Text(row["summary"], style="red" if "error" in row else "")
        if kind is Kind.evaluators and "error" not in row:
            told.append(f"\n{_in_a_line(row)}", style="dim")
        if kind is Kind.vbench_quirks:
            told.append(f"\n{row['dimension']}: {row['effect']}", style="dim")
            told.append(f"\ncompat: {row['compat']} | strict: {row['strict']}", style="dim")
        table.add_row(Text(row["name"]), told)
    Console().print(table)


def _in_a_line(row: dict[str, Any]) -> str:
    """What an evaluator takes, whether a gradient reaches the pixels, whose it is and under what terms."""
    gradient = "differentiable" if row["differentiable"] else "no gradient"
    return f"{', '.join(row['modality'])} | {gradient} | {row['source']} | {row['licence']}"


def listing(kind: Kind, *, plugins: bool = True, declared: bool = False) -> list[dict[str, Any]]:
    """What there is of one kind: dictionaries with at least ``name`` and a one-line ``summary``, sorted as shown.

    Args:
        plugins: whether evaluators of other packages count.
        declared: import every evaluator for what its class declares: modality, licence, source, parameters and so on.
    """
    match kind:
        case Kind.evaluators:
            return _evaluators(plugins, declared)
        case Kind.methods:
            return _methods()
        case Kind.guidance:
            return _guidance()
        case Kind.models:
            from mmalign.jobs_inputs import ANSWERING, FAMILIES

            return _named({**FAMILIES, **{f"mllm/{name}": told for name, told in ANSWERING.items()}})
        case Kind.formats:
            from mmalign.formats import FORMATS
            from mmalign.mllm.formats import FORMATS as ANSWERS

            return [
                *({**row, "rows": "preferences"} for row in _named(FORMATS)),
                *({**row, "rows": "answers", "name": f"mllm/{row['name']}"} for row in _named(ANSWERS)),
            ]
        case Kind.benchmarks:
            from mmalign.protocols.benchmarks import described

            return described()
        case Kind.configs:
            return _configs()
        case Kind.vbench_quirks:
            from mmalign.vbench.quirks import QUIRKS

            return [{"name": each.id, "summary": each.what, **asdict(each)} for each in QUIRKS.values()]


def _named(summaries: dict[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "summary": summary} for name, summary in summaries.items()]


def _evaluators(plugins: bool, declared: bool) -> list[dict[str, Any]]:
    from mmalign.discovery import find_evaluators

    rows = []
    for name, found in sorted(find_evaluators(plugins=plugins).items()):
        row: dict[str, Any] = {"name": name, "summary": found.summary or "", "origin": str(found.origin)}
        if found.error:
            row |= {"summary": f"broken: {found.error.splitlines()[0]}", "error": found.error}
        elif declared:
            row |= _declarations(name, plugins)
        rows.append(row)
    return rows


def _declarations(name: str, plugins: bool) -> dict[str, Any]:
    """What an evaluator's class says of itself, or why it cannot be imported."""
    from mmalign.discovery import evaluator_class

    try:
        cls = evaluator_class(name, plugins)
    except (ValueError, TypeError) as error:
        return {"summary": f"broken: {error}".splitlines()[0], "error": str(error)}
    return {
        "modality": sorted(cls.modality),
        "needs": sorted(cls.needs),
        "frames": repr(cls.frames),
        "differentiable": bool(getattr(cls, "differentiable", False)),
        "higher_is_better": cls.higher_is_better,
        "version": cls.version,
        "licence": cls.licence,
        "source": cls.source,
        "params": cls.Params.model_json_schema().get("properties", {}),
    }


def _methods() -> list[dict[str, Any]]:
    """Every objective, and what changes the data or the noise of any of them."""
    from mmalign import methods_mllm
    from mmalign.methods import LOSSES, OPTIONS, Preference

    rows: list[dict[str, Any]] = []
    for variant in LOSSES:
        row: dict[str, Any] = {
            "name": variant.model_fields["kind"].default,
            "summary": (variant.__doc__ or "").strip().splitlines()[0],
            "task": variant.task,
            "parameterisations": list(variant.parameterisations),
        }
        if issubclass(variant, Preference):
            row |= {"family": variant.family, "items": variant.items, "reference": not variant.reference_free}
        rows.append(row)
    for name, (family, setting, summary) in OPTIONS.items():
        option = {"name": name, "summary": f"{summary} [{setting}]", "task": "preference", "family": family}
        rows.append({**option, "parameterisations": ["eps", "v", "flow"], "setting": setting})
    for each in methods_mllm.described():
        rows.append({"task": "mllm", "family": "answers", "parameterisations": ["none"], **each})
    return rows


def _guidance() -> list[dict[str, Any]]:
    """Every strategy of guided sampling."""
    from mmalign.jobs_guidance import strategies

    return [
        {"name": kind, "summary": (strategy.__doc__ or "").strip().splitlines()[0], "gradients": strategy.gradients}
        for kind, strategy in strategies()
    ]


def _configs() -> list[dict[str, Any]]:
    from mmalign.paths import shipped

    root = shipped("configs")
    rows = []
    for path in sorted(root.rglob("*.yaml")):
        # The first line of a shipped config is its command, the second says what it does; a test keeps both.
        lines = [line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines()[:2]]
        rows.append({"name": f"configs/{path.relative_to(root).as_posix()}", "summary": lines[1], "command": lines[0]})
    return rows


def info(
    file: Annotated[Path, typer.Argument(help="A picture or clip.")],
    as_json: AsJson = False,
) -> None:
    """Say what a picture or clip is, and how it was drawn: the record that `mmalign sample` keeps in each file.

    [bold]Examples[/bold]

        mmalign info runs/base/images/000000-0.png

        mmalign info clip.mp4 --json
    """
    from mmalign.provenance import read_provenance

    found = {**_media_facts(file), "provenance": read_provenance(file)}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mmalign.results import flat
    from mmalign.source import shown

    record = found.pop("provenance")
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in [*flat(found), *flat(record or {"provenance": "none that mmalign wrote"})]:
        table.add_row(Text(shown(name), style="dim"), Text(shown(value)))
    Console().print(table)


def _media_facts(file: Path) -> dict[str, Any]:
    from mmalign.media import Uniform, content_hash, image_size, is_video
    from mmalign.video import read_frames

    told: dict[str, Any] = {"file": str(file), "sha256": content_hash(file)}
    if is_video(file):
        clip = read_frames(file, Uniform(1))
        height, width = next(iter(clip.picked.values())).shape[:2]
        return told | {"kind": "video", "size": f"{width}x{height}", "frames": clip.num_frames, "fps": clip.fps}
    height, width = image_size(file)
    return told | {"kind": "image", "size": f"{width}x{height}"}


def cache_ls(as_json: AsJson = False, root: Root = None) -> None:
    """Show what the cache holds, by kind: entries and size.

    [bold]Examples[/bold]

        mmalign cache ls
    """
    from mmalign.cache import Cache

    cache = Cache(root)
    rows = [asdict(held) for held in cache.ls()]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("kind")
    for heading in ("entries", "size"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["kind"], f"{row['entries']:,}", size_text(row["bytes"]))
    console = Console()
    console.print(table)
    console.print(f"in {cache.root}", markup=False, highlight=False, soft_wrap=True)


def cache_clear(
    kind: Annotated[str | None, typer.Argument(help="Only this kind, as `mmalign cache ls` names it.")] = None,
    root: Root = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete the cache, or one kind of it. Everything in it can be computed again.

    [bold]Examples[/bold]

        mmalign cache clear

        mmalign cache clear latents --yes
    """
    from mmalign.cache import Cache

    cache = Cache(root)
    held = [one for one in cache.ls() if kind in (None, one.kind)]
    entries = sum(one.entries for one in held)
    if entries and not yes:
        size = size_text(sum(one.bytes for one in held))
        typer.confirm(f"Delete {entries:,} entries ({size}) of {kind or 'every kind'} in {cache.root}?", abort=True)
    gone = cache.clear(kind)
    typer.echo(f"deleted {gone.entries:,} entries, {size_text(gone.bytes)}")


def size_text(count: float) -> str:
    """Bytes for a person, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def doctor(as_json: AsJson = False) -> None:
    """Say what this installation has: versions, devices, decoders, space, and what is missing with its command.

    [bold]Examples[/bold]

        mmalign doctor
    """
    from mmalign.doctor import examine, render

    findings = examine()
    if as_json:
        typer.echo(json.dumps(findings.to_json(), indent=2, ensure_ascii=False))
    else:
        render(findings)
    if not findings.healthy:
        raise typer.Exit(1)
