"""The verbs that do the work: quickstart, train, sample, respond, optimise-prompt, score."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmalign.commands.configs import Config, Job, Overrides, load_job, schema_of

if TYPE_CHECKING:
    from mmalign.jobs import ScoreConfig

TABLES = {".jsonl", ".parquet", ".csv", ".tsv"}
CONFIGS = {".yaml", ".yml"}


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    for verb in (quickstart, train, sample, respond, optimise_prompt, score):
        app.command(rich_help_panel="Jobs")(verb)


def quickstart(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for everything it makes (default: runs/quickstart).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling, annotator and training.")] = 0,
    short: Annotated[
        bool, typer.Option("--short", help="Fewer pairs and steps: shows that all parts work, proves nothing.")
    ] = False,
    answers: Annotated[
        bool, typer.Option("--answers", help="A vision-language model that describes, instead of one that draws.")
    ] = False,
) -> None:
    """Run the whole story on a CPU: sample, label, align with Diffusion-DPO, sample again, score, report.

    It takes a few minutes on two cores, and ends with one table and the path of the report.

    [bold]Examples[/bold]

        mmalign quickstart

        mmalign quickstart --seed 3 --output runs/quickstart-3

        mmalign quickstart --answers    (a vision-language model, DPO against what it makes up)
    """
    if answers:
        from mmalign.quickstart_answers import run

        run(output or Path("runs/quickstart-answers"), seed=seed, short=short)
    else:
        from mmalign.quickstart import run as run_pictures

        run_pictures(output or Path("runs/quickstart"), seed=seed, short=short)


def train(
    config: Config,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint, exactly.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check model and data, and print the memory and work it would take.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: as JSON.")] = False,
) -> None:
    """Train a model: fine-tune it on captioned media, or align it with preferences.

    [bold]Examples[/bold]

        mmalign train configs/shapes/dpo.yaml

        mmalign train configs/shapes/dpo.yaml --set loss.beta=500 --set output=runs/beta-500

        mmalign train configs/shapes/dpo.yaml --resume

        mmalign train configs/shapes/dpo.yaml --dry-run

        accelerate launch -m mmalign train configs/shapes/dpo.yaml

        mmalign train configs/shapes/online.yaml
    """
    settings = load_job(config, overrides, Job.train)
    if as_json and not dry_run:
        raise typer.BadParameter("it belongs to --dry-run; results are in the run folder", param_hint="--json")
    if dry_run:
        from mmalign.memory import estimate
        from mmalign.memory_show import show

        found = estimate(settings)
        typer.echo(json.dumps(found.to_json(), indent=2)) if as_json else show(found)
        return
    if settings.online:
        from mmalign.rounds import run
    else:
        from mmalign.train import run

    from mmalign import checkpoints

    begun = settings.output.is_dir() if settings.online else checkpoints.newest(settings.output / "checkpoints")
    if resume and not begun and _first():
        typer.echo(f"nothing to resume in {settings.output}: beginning there", err=True)
    typer.echo(f"run: {run(settings, resume=resume)}")


def sample(config: Config, overrides: Overrides = None) -> None:
    """Draw pictures or clips for a table of prompts, led by rewards if you like; writes a media table beside them.

    Each has its own seed, whatever its batch. Run the same command again to go on after a stop. Strategies that follow
    rewards: `mmalign list guidance`.

    [bold]Examples[/bold]

        mmalign sample configs/shapes/sample.yaml

        mmalign sample configs/sample/shapes_best_of_n.yaml

        mmalign sample configs/shapes/sample.yaml --set model.lora=runs/shapes-dpo/export --set output=runs/aligned
    """
    settings = load_job(config, overrides, Job.sample)
    from mmalign.sample import run

    typer.echo(f"media table: {run(settings)}")


def respond(config: Config, overrides: Overrides = None) -> None:
    """Have an image-text model answer a table of questions; writes the table with its answers beside them.

    Run the same command again to go on after a stop. `mmalign score` reads the table, and its column `response`.

    [bold]Examples[/bold]

        mmalign respond configs/respond/describe.yaml --set questions=questions.jsonl

        mmalign respond configs/respond/describe.yaml --set model.lora=runs/dpo/export --set output=runs/dpo/answers
    """
    settings = load_job(config, overrides, Job.respond)
    from mmalign.respond import run

    typer.echo(f"media table: {run(settings)}")


def optimise_prompt(
    config: Config,
    overrides: Overrides = None,
    answers: Annotated[
        list[Path] | None, typer.Option("--answers", help="File of people's answers (JSONL or CSV); repeatable.")
    ] = None,
) -> None:
    """Find the prompt that draws what is wished, by comparing two at a time; a person or evaluators judge.

    Run the same command again to go on: after a stop, when people have answered, or with more comparisons.

    [bold]Examples[/bold]

        mmalign optimise-prompt configs/prompts/shapes.yaml

        mmalign optimise-prompt configs/prompts/shapes.yaml --set judge.kind=person --answers answers-anna.jsonl
    """
    settings = load_job(config, overrides, Job.optimise)
    from mmalign.optimise_prompt import run

    typer.echo(f"prompts by what is believed of them: {run(settings, answers or ())}")


def score(
    source: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG|TABLE]", help="A YAML file, or a media table with --evaluator.")
    ] = None,
    overrides: Overrides = None,
    table: Annotated[Path | None, typer.Option(help="Media table: JSONL, parquet, or a folder of media.")] = None,
    evaluator: Annotated[
        list[str] | None, typer.Option("--evaluator", "-e", help="Name of an evaluator; repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the results.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="local, or ray: Ray Data actors for tables that outgrow one machine.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be decoded, loaded and computed, and why; load nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --dry-run: as JSON.")] = False,
) -> None:
    """Score media with evaluators; running it again does only what is missing.

    Everything can stand in a config, or a table and some evaluators can be named directly.

    Exit codes: 0 with at least one score, 1 if nothing at all could be scored or a dimension of VBench has no score, 2
    a mistake in what was asked for.

    [bold]Examples[/bold]

        mmalign score configs/shapes/score.yaml --set table=runs/aligned/table.jsonl

        mmalign score runs/base/table.jsonl --evaluator shapes_truth --output runs/base/scores

        mmalign score t.jsonl -e hps -o out --set evaluators.0.params.version=v2.1

        mmalign score my_images -e hps -o out

        mmalign score my_scans -e aesthetic -o out --set max_pixels=400000000

        mmalign score configs/shapes/score.yaml --dry-run

        mmalign score configs/score/vbench_quality.yaml --set media=my_clips

        accelerate launch -m mmalign score configs/shapes/score.yaml
    """
    if as_json and not dry_run:
        raise typer.BadParameter("it belongs to --dry-run; results are in the folder", param_hint="--json")
    words = [*(overrides or []), *([f"engine={engine}"] if engine else [])]
    settings = _score_config(source, words, table, evaluator or [], output)
    if dry_run:
        _preview(settings, as_json)
        return
    from mmalign.results import read_json
    from mmalign.score import run
    from mmalign.score_summary import account, scored_nothing

    folder = run(settings, launched=True)
    if not _first():
        return
    summary = read_json(folder / "summary.json")
    lacking = []
    told = account(summary, means=settings.vbench is None)
    if settings.vbench:
        from mmalign.score_vbench_results import lines, unscored
        from mmalign.vbench.record import read_record

        record = read_record(folder)
        lacking = unscored(record)
        told += lines(record)
    typer.echo("\n".join([*told, f"results: {folder}"]))
    if scored_nothing(summary):
        typer.echo("error: nothing could be scored; the reasons stand above", err=True)
        raise typer.Exit(1)
    if lacking:
        typer.echo(f"error: no score of {', '.join(lacking)}; why stands above, and all else is written", err=True)
        raise typer.Exit(1)


def _first() -> bool:
    """Whether this process speaks for all that a launcher started; true where none did."""
    return os.environ.get("RANK", "0") == "0"


def _preview(settings: ScoreConfig, as_json: bool) -> None:
    if not _first():
        return  # it does the looking and the printing for all that a launcher started
    from mmalign.score import plan_for
    from mmalign.score_preview import preview, show

    found = preview(plan_for(settings), settings)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        show(found)


def _score_config(
    source: Path | None, overrides: list[str] | None, table: Path | None, evaluators: list[str], output: Path | None
) -> ScoreConfig:
    from mmalign import config

    # JSON's quotes are YAML's too, so that any path arrives as it is.
    named = [
        f"{key}={json.dumps(str(value))}" for key, value in (("table", table), ("output", output)) if value is not None
    ]
    if table is not None:
        named.append("media=null")  # the other key that a config may name them by
    suffix = "" if source is None else source.suffix.lower()
    named_table = suffix in TABLES or (bool(evaluators) and suffix not in CONFIGS)
    if source is not None and (named_table or source.is_dir()):
        if table is not None:
            raise config.ConfigError([f"both {source} and --table {table} name a table; keep one."])
        table, source = source, None
    if source is not None:
        if evaluators:
            raise config.ConfigError(["--evaluator goes with a table; a config names its evaluators itself."])
        from_file: ScoreConfig = load_job(source, [*named, *(overrides or [])], Job.score)
        return from_file
    missing = [name for name, value in (("a table", table), ("--evaluator NAME", evaluators)) if not value]
    if missing:
        hint = "see `mmalign list evaluators`; or name a config." if table else "or name a config."
        raise config.ConfigError([f"score needs {' and '.join(missing)}; {hint}"])
    assert table is not None
    home = table if table.is_dir() else table.parent
    data = {
        "table": str(table),
        "evaluators": [{"name": name} for name in evaluators],
        "output": str(output or home / "scores"),
    }
    from_words: ScoreConfig = config.build(schema_of(Job.score), data, "mmalign score", overrides or [])
    return from_words
