"""The command line: assembles the verbs, and turns users' mistakes into messages.

Nothing heavy is imported here or at the top of the verbs' modules, so that ``mmalign --help`` answers at once; a test
keeps it so. Exit codes: 0 done; 1 a run that could not be finished (a full disk or memory among the reasons), one of
``score`` that scored nothing, something bad that ``doctor`` found, or a defect of mmalign (with its traceback); 2 a
mistake in what was asked for; 130 interrupted.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Annotated

import typer

from mmalign import __version__
from mmalign.commands import bench, configs, inspect, jobs, new, prefer, results, vbench, weights
from mmalign.errors import Stopped, debugging, raised_by_us

FULL = {errno.ENOSPC, errno.EDQUOT}

app = typer.Typer(
    name="mmalign",
    help="Align image and video generators with preferences, and see whether they got better.\n\n"
    "sample -> score (or label) -> train -> score again: one YAML per job, one table format between the verbs.",
    epilog="Begin with `mmalign quickstart`, then `mmalign list configs`. `mmalign VERB --help` shows examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _group in (jobs, prefer, bench, results, vbench, inspect, new, weights, configs):
    _group.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmalign {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="MMALIGN_DEBUG", help="Show the traceback of every error.")
    ] = False,
) -> None:
    if debug:
        os.environ["MMALIGN_DEBUG"] = "1"
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("mmalign").setLevel(logging.DEBUG if debug else logging.INFO)


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        app(prog_name="mmalign")
    except SystemExit as end:
        if end.code == 130:
            sys.stderr.write(f"interrupted{_interruption(end)}\n")
        raise
    except Exception as error:
        message = None if debugging() else user_message(error)
        if message is None:
            raise
        sys.stdout.flush()
        if not _told_by_another(error):
            sys.stderr.write(message.rstrip() + "\n")
        sys.exit(1 if isinstance(error, Stopped) or _out_of_room(error) else 2)


def user_message(error: BaseException) -> str | None:
    """What to tell a user about an error that is theirs to mend, or None for a defect, whose traceback is wanted.

    A ValueError raised by mmalign's own code is a message to the user (the house rule: it holds the fix); one raised in
    another library's code is a defect here, since the value should have been checked before.
    """
    if isinstance(error, Stopped) or (isinstance(error, ValueError) and raised_by_us(error)):
        return f"error: {error}" if "\n" not in str(error) else f"errors:\n{error}"
    if isinstance(error, OSError):
        return _file_message(error)
    if _out_of_room(error):
        advice = "A smaller batch or resolution, or gradient checkpointing, needs less."
        return f"error: the accelerator's memory is full: {error}\n{advice}"
    if isinstance(error, ModuleNotFoundError):
        return _module_message(error)
    return None


def _out_of_room(error: BaseException) -> bool:
    """Whether a disk or the accelerator's memory is full: no mistake, and the same command may do it another time."""
    return type(error).__name__ == "OutOfMemoryError" or (isinstance(error, OSError) and error.errno in FULL)


def _told_by_another(error: BaseException) -> bool:
    """Whether it is a mistake in the config, and another of a launcher's processes on this machine tells of it."""
    from mmalign.config import ConfigError

    return isinstance(error, ConfigError) and os.environ.get("LOCAL_RANK", "0") != "0"


def _interruption(end: BaseException) -> str:
    """What the interrupted verb said; typer has turned its KeyboardInterrupt into the exit code."""
    error: BaseException | None = end
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return f": {error}" if error is not None and str(error) else ""


def _file_message(error: OSError) -> str | None:
    if error.filename is None:
        return f"error: {error.strerror or error}" if raised_by_us(error) else None
    # Where mmalign's own code already says what to do, its words stand alone.
    plain = error.errno is not None and error.strerror == os.strerror(error.errno)
    fix = ". Free some space, or name another folder." if plain and error.errno in FULL else ""
    return f"error: {error.filename}: {error.strerror}{fix}"


def _module_message(error: ModuleNotFoundError) -> str | None:
    from mmalign.doctor import OPTIONAL

    if error.name == "mmalign.evaluators":
        return "error: the evaluators are not installed. In a checkout, install once with: pip install -e ."
    for part in OPTIONAL:
        if error.name == part.module:
            return f"error: {part.module} is not installed ({part.purpose}). Install it with: {part.install}"
    return None
