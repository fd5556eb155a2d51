"""`mmalign new evaluator`, and docs/add-a-dimension.md done word by word as a new user would."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from report_kit import Page

from mmalign import cli, skeletons
from mmalign.skeletons import new_evaluator, new_package

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "add-a-dimension.md").read_text(encoding="utf-8")
CODE = dict(re.findall(r"<!-- (\S+\.py) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def shell(home: Path, words: str) -> str:
    """A command of the page in a process of its own; `pip install` is done by setuptools, which needs no network."""
    site = home.parent / "site"
    environment = os.environ | {"PYTHONPATH": str(site), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    argv = shlex.split(words)
    if argv[:3] == ["pip", "install", "--editable"]:
        return install(home / argv[3], site)
    programs = {"mmalign": [sys.executable, "-m", "mmalign"], "python": [sys.executable]}
    run = [*programs.get(argv[0], argv[:1]), *argv[1:]]
    done = subprocess.run(run, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def install(folder: Path, site: Path) -> str:
    """Build the package's wheel and unpack it, as pip does; the module itself is linked, as --editable does."""
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(site.parent)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = site.parent.glob("mmalign_*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for module in folder.glob("mmalign_*.py"):
        (site / module.name).unlink()
        (site / module.name).symlink_to(module)
    return done.stdout


def test_the_page_from_an_empty_folder_to_a_row_in_the_report(tmp_path: Path) -> None:
    home = tmp_path / "empty"
    home.mkdir()
    began, waiting = time.perf_counter(), dict(CODE)
    for block in re.finditer(r"<!-- (\S+\.py) -->|```bash\n(.*?)```", PAGE, re.DOTALL):
        if block[1]:
            (home / block[1]).write_text(waiting.pop(block[1]), encoding="utf-8")
            continue
        for line in block[2].strip().splitlines():
            out = shell(home, line)
            if " new evaluator " in line:
                assert "wrote loop_closure/mmalign_loop_closure.py" in out and "pip install --editable" in out
                assert all((home / name).is_file() for name in CODE if name.startswith("loop_closure/"))
    assert not waiting, "every piece of code was used"
    print(f"the page's commands: {time.perf_counter() - began:.0f} s")
    page = Page((home / "report.html").read_text(encoding="utf-8"))
    told = next(text for _, text in page.find("tr", data_score="loop_closure"))
    assert told.split()[:2] == ["loop_closure", "6"], "a row in the report, of six clips"
    assert len(CODE["loop_closure/mmalign_loop_closure.py"].splitlines()) <= 42, "about 40 lines"


def test_the_skeleton_of_a_package_passes_as_it_stands(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shell(home, "mmalign new evaluator color@mine --package")
    install(home / "color__mine", tmp_path / "site")
    assert "2 passed" in shell(home, "python -m pytest -q color__mine")


def test_the_skeleton_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evaluators").mkdir()
    evaluator, test = new_evaluator("steadiness", tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in (evaluator, test)] == [
        "evaluators/steadiness.py", "tests/test_steadiness.py"]  # fmt: skip
    scope: dict[str, Any] = {}
    exec(compile(evaluator.read_text(), str(evaluator), "exec"), scope)
    import mmalign.evaluators

    from mmalign import discovery

    monkeypatch.setattr(mmalign.evaluators, "__path__", [*mmalign.evaluators.__path__, str(evaluator.parent)])
    found = dict(discovery._sources(False))
    found["steadiness"] = [discovery._Source("steadiness", "built in, steadiness.py", file=evaluator)]
    monkeypatch.setattr(discovery, "_sources", lambda plugins: found)
    scope = {}
    exec(compile(test.read_text(), str(test), "exec"), scope)
    scope["test_contract"]()
    scope["test_known_values"]()
    assert discovery.find_evaluators()["steadiness"].summary.startswith("How steady the brightness is")
    sys.modules.pop("mmalign.evaluators.steadiness", None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("MyScore", "write my_score"),
        ("my-score", "write my_score"),
        ("2fast", "write fast"),
        ("3d", "write score_3d"),
        ("a__b", "write a_b"),
        ("_hidden", "write hidden"),
        ("color@a@b", "at most one @"),
        ("../escape", "no name for an evaluator"),
        ("", "no name for an evaluator"),
        ("ünder", "no name for an evaluator"),
        ("lambda", "write lambda_score"),
        ("match", "write match_score"),
        ("scene", "scene@mine"),
        ("hps", r"there is an evaluator hps already \(built in, hps.py\)"),
    ],
)
def test_bad_names_are_refused_with_the_fix(tmp_path: Path, name: str, words: str) -> None:
    for make in (new_evaluator, new_package):
        with pytest.raises(ValueError, match=words):
            make(name, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_steady.py").write_text("mine")
    with pytest.raises(ValueError, match=r"has tests/test_steady\.py already"):
        new_evaluator("steady", tmp_path)
    assert not (tmp_path / "evaluators").exists(), "all or nothing"
    new_package("steady", tmp_path / "steady")
    with pytest.raises(ValueError, match=r"pyproject\.toml and mmalign_steady\.py and tests/test_steady\.py already"):
        new_package("steady", tmp_path / "steady")


def test_without_a_checkout_the_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert skeletons.checkout() == Path(__file__).resolve().parents[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(skeletons, "checkout", lambda: None)
    monkeypatch.setattr(sys, "argv", ["mmalign", "new", "evaluator", "steady"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "installed from a wheel" in (err := capsys.readouterr().err) and "new evaluator steady --package" in err
    assert not list(tmp_path.iterdir())
