"""Every shipped config is good, and says on its first line the command that runs it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from mmalign import config
from mmalign.cli import app
from mmalign.commands.configs import Job, job_of, load_job, schema_of
from mmalign.jobs import ScoreConfig
from mmalign.known_weights import KNOWN
from mmalign.score_plan import make_jobs
from mmalign.score_vbench import specs

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.y*ml"))
WEIGHTLESS = {"temporal_flickering", "pope", "hallusionbench", "amber_discriminative", "answer_questions"}
named = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))


def test_there_are_configs() -> None:
    assert CONFIGS


@named
def test_goes_through_its_schema(path: Path) -> None:
    settings = load_job(path)
    assert config.loads(type(settings), config.dump(settings)) == settings


@named
def test_first_line_is_its_command(path: Path) -> None:
    first, second = path.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith("# "), "the first line of a config is a comment with its command"
    words = shlex.split(first.removeprefix("# "))
    while "=" in words[0]:  # environment variables before the command
        words.pop(0)
    if words[:3] == ["accelerate", "launch", "-m"]:
        words = words[3:]
    assert words[0] == "mmalign", first
    verb, parameters = parse(words[1:])
    job = job_of(config.read(path))
    assert verb == job, f"the command runs `{verb}`, the keys are those of a {job} config"
    file = parameters["config"] if verb != "score" else parameters["source"]
    assert ROOT / file == path, f"the command names {file}"
    assert job is not None
    config.load(schema_of(job), path, parameters["overrides"] or [])
    assert second.startswith("# ") and len(second) > 10, "the second line says in a sentence what the config does"


def parse(words: list[str]) -> tuple[str, dict]:
    """The verb and its parameters, as the command line itself reads them; raises on anything that it refuses."""
    group = get_command(app)
    with group.make_context("mmalign", list(words)) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        with command.make_context(name, rest, parent=context) as inner:
            if not hasattr(command, "resolve_command"):
                return name, inner.params
            _, verb, rest = command.resolve_command(inner, [*inner._protected_args, *inner.args])
            with verb.make_context(name, rest, parent=inner) as innermost:
                return name, innermost.params


@named
def test_writes_its_kinds_out(path: Path) -> None:
    """A union without its ``kind`` cannot be overridden by ``--set``, so shipped configs always write it."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in ("loss",):
        if isinstance(data.get(key), dict):
            assert "kind" in data[key]


def test_parse_refuses_what_the_command_line_refuses() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse(["train", "--frobnicate", "x.yaml"])


def test_every_job_has_tell_tale_keys() -> None:
    for job in Job:
        others = [set(schema_of(other).model_fields) for other in Job if other != job]
        assert set(schema_of(job).model_fields) - set().union(*others)


def test_configs_and_pages_name_weights_as_they_are_fetched() -> None:
    """`mmalign weights fetch NAME` writes into weights/NAME; a page or config that names another place is not found."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *CONFIGS]
    named = {
        (str(page.relative_to(ROOT)), name)
        for page in pages
        for name in re.findall(r"(?<![\w/.-])weights/([\w.+-]+)", page.read_text(encoding="utf-8"))
    }
    assert {name for _, name in named} & set(KNOWN)
    strangers = {(page, name) for page, name in named if name not in KNOWN and name != "NAME"}
    assert not strangers


def test_shipped_scoring_configs_find_what_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file under each name that `weights fetch` gives: every path in a shipped scoring config exists."""
    weights = tmp_path / "weights"
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(weights))
    monkeypatch.chdir(tmp_path)  # where `model: weights/NAME` is looked for
    for name, entry in KNOWN.items():
        for each in (entry.files[0], *(also for also in entry.also if "*" not in also)):
            file = weights / name / each
            file.parent.mkdir(parents=True, exist_ok=True)
            model_type = "rt_detr_v2" if name.startswith("rtdetr") else "blip"
            file.write_text(json.dumps({"name": name, "model_type": model_type}))
        if entry.keys == "transformers":  # a whole folder
            (weights / name / "model.safetensors").write_text(name)
    monkeypatch.chdir(tmp_path)  # public files that no `weights fetch` gives lie where the config says, under data/
    for path in (ROOT / "configs" / "score").glob("*.yaml"):
        settings = load_job(path)
        assert isinstance(settings, ScoreConfig)
        for name in re.findall(r"data/[\w./-]+\.(?:json|txt)\b", path.read_text(encoding="utf-8")):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        jobs = make_jobs(specs(settings, plugins=False), plugins=False)
        assert all(job.weight_hash for job in jobs if job.name not in WEIGHTLESS), path
