"""The verbs on configs: show, schema, check; and how the verbs that run a config load it."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mmalign.yaml12 import Document

Config = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The job's YAML file; shipped ones are found from any folder.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the config; repeatable.")
]


class Job(StrEnum):
    """The kinds of config; each is the name of the verb (or of the group with the verb) that runs it."""

    train = "train"
    sample = "sample"
    score = "score"
    prefer = "prefer"
    bench = "bench"
    optimise = "optimise-prompt"
    respond = "respond"
    build = "prefer-answers"

    @property
    def command(self) -> str:
        """What to type to run such a config."""
        return "bench reward" if self is Job.bench else self.value


JobOption = Annotated[Job | None, typer.Option("--job", help="Which job the file is for, where its keys do not tell.")]


def register(app: typer.Typer) -> None:
    """Add the group ``config`` to the command line."""
    group = typer.Typer(help="Show, describe and check configs, without running anything.", no_args_is_help=True)
    for verb in (show, schema, check):
        group.command()(verb)
    app.add_typer(group, name="config", rich_help_panel="Look and check")


def schema_of(job: Job) -> Any:
    """The root schema of a job's config."""
    from mmalign import jobs, jobs_bench, jobs_build, jobs_prefer, jobs_prompts, jobs_respond

    schemas = {Job.train: jobs.TrainConfig, Job.sample: jobs.SampleConfig, Job.score: jobs.ScoreConfig}
    schemas |= {Job.prefer: jobs_prefer.PreferConfig, Job.bench: jobs_bench.BenchConfig}
    schemas |= {Job.optimise: jobs_prompts.PromptsConfig, Job.respond: jobs_respond.RespondConfig}
    return (schemas | {Job.build: jobs_build.BuildConfig})[job]


def job_of(document: Document) -> Job | None:
    """Which job a config is for: the one to which most of its tell-tale keys belong, None where they do not tell.

    A key is tell-tale where only one job has it (``loss``, ``rewards``, ``benchmark``), so that a slip in one key does
    not change the answer and no file has to repeat what its keys say. Among equals the job that knows most of the keys
    is meant (only sampling has both ``model`` and ``prompts``), then the one that misses fewest.
    """
    keys = set(document.data)
    schemas = {job: schema_of(job).model_fields for job in Job}
    fields = {job: set(held) for job, held in schemas.items()}
    missed = {job: sum(held.is_required() for name, held in schemas[job].items() if name not in keys) for job in Job}
    shares = {
        job: (
            len(keys & (own - set().union(*(fields[other] for other in Job if other != job)))),
            len(keys & own),
            -missed[job] if len(keys & own) > 1 else 0,
        )
        for job, own in fields.items()
    }
    best = max(shares.values())
    first, *others = [job for job, share in shares.items() if share == best]
    return None if others or not any(best) else first


def load_job(path: Path, overrides: list[str] | None = None, job: Job | None = None) -> Any:
    """Load a config for one job, or for the job that its keys tell.

    Raises:
        ConfigError: every mistake in the file; or the verb that runs a file of this kind.
    """
    from mmalign import config
    from mmalign.paths import find

    document = config.read(find(path), overrides or [])
    told = job_of(document)
    if job is None and told is None:
        names = ", ".join(Job)
        raise config.ConfigError([f"{path}:1: the keys do not tell which job this is; add --job with one of {names}."])
    if job is not None and told is not None and told != job:
        raise config.ConfigError([f"{path}:1: this is a {told} config; run `mmalign {told.command} {path}`."])
    return config.check(schema_of(job or told), document)  # type: ignore[arg-type]


def show(path: Config, overrides: Overrides = None, job: JobOption = None) -> None:
    """Print a config as it will be run: everything resolved, defaults included.

    [bold]Examples[/bold]

        mmalign config show configs/shapes/dpo.yaml

        mmalign config show configs/shapes/dpo.yaml --set loss.beta=500
    """
    from mmalign import config

    typer.echo(config.dump(load_job(path, overrides, job)), nl=False)


def schema(job: Annotated[Job, typer.Argument(help="Which job's config.")]) -> None:
    """Print the JSON Schema of a config, with which an editor completes and checks YAML.

    [bold]Examples[/bold]

        mmalign config schema train > train.schema.json
    """
    from mmalign import config

    typer.echo(json.dumps(config.json_schema(schema_of(job)), indent=2, ensure_ascii=False))


def check(
    paths: Annotated[list[Path], typer.Argument(help="YAML files.")],
    overrides: Overrides = None,
    job: JobOption = None,
) -> None:
    """Check configs and print every mistake in all of them; exit code 2 if there is one.

    [bold]Examples[/bold]

        mmalign config check configs/shapes/*.yaml
    """
    from mmalign.config import ConfigError

    errors: list[str] = []
    for path in paths:
        try:
            load_job(path, overrides, job)
        except ConfigError as error:
            errors += error.errors
        else:
            typer.echo(f"{path}: good")
    if errors:
        raise ConfigError(errors)
