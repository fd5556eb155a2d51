"""The command line: what each verb hands on, and what a user is told when something is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mmalign
from mmalign import cli, config, doctor
from mmalign.commands import inspect
from mmalign.commands.inspect import Kind, listing
from mmalign.errors import Stopped

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).resolve().parents[1]

TRAIN = """\
task: preference
output: run
model: {path: some/model}
data: {table: pairs.jsonl}
loss: {kind: diffusion_dpo}
"""
SCORE = "table: t.jsonl\noutput: out\nevaluators: [{name: shapes_truth}]\n"
VERBS = ["quickstart", "train", "sample", "score", "compare", "report", "list", "doctor"]
VERBS += ["prefer", "prefer run", "prefer merge", "prefer audit", "bench reward"]
VERBS += ["weights list", "weights fetch", "weights verify", "weights convert"]
VERBS += ["config show", "config schema", "config check", "cache ls", "cache clear"]
VERBS += ["vbench check", "vbench crop", "vbench total", "vbench agreement", "new evaluator"]
SAMPLE = "model: {path: some/model}\nprompts: prompts.txt\noutput: out\n"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call the command line in an empty folder; gives exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmalign", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    return call


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Callable[..., Any]], None]:
    """Put a function in the place of ``mmalign.NAME.run``, so that no model is needed to see what it is given."""

    def put(name: str, function: Callable[..., Any]) -> None:
        module = types.ModuleType(f"mmalign.{name}")
        module.run = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"mmalign.{name}", module)

    return put


class TestJobs:
    def test_train_gets_the_config_with_its_overrides(self, run: Run, job: Any, tmp_path: Path) -> None:
        calls = []
        job("train", lambda settings, *, resume: calls.append((settings, resume)) or Path("run"))
        (tmp_path / "x.yaml").write_text(TRAIN)
        code, out, _ = run("train", "x.yaml", "--set", "loss.beta=5e2", "--set", "seed=3", "--resume")
        assert (code, out) == (0, "run: run\n")
        ((settings, resume),) = calls
        assert (settings.loss.beta, settings.seed, resume) == (500.0, 3, True)

    def test_sample(self, run: Run, job: Any, tmp_path: Path) -> None:
        calls: list[Any] = []
        job("sample", lambda settings: calls.append(settings) or Path("out/table.jsonl"))
        (tmp_path / "x.yaml").write_text(SAMPLE)
        assert run("sample", "x.yaml")[0] == 0
        assert calls[0].prompts == Path("prompts.txt")

    def test_score_from_a_config_or_from_a_table(self, run: Run, job: Any, tmp_path: Path) -> None:
        calls: list[Any] = []
        job("score", lambda settings, launched: calls.append(settings) or settings.output)
        (tmp_path / "x.yaml").write_text(SCORE)
        assert run("score", "x.yaml", "--table", "an: other #1.jsonl")[:2] == (0, "results: out\n")
        assert run("score", "d/t.jsonl", "-e", "hps", "-e", "clip_score")[:2] == (0, "results: d/scores\n")
        assert run("score", "--table", "t.parquet", "--evaluator", "hps", "-o", "o", "--set", "batch_size=2")[0] == 0
        assert run("score", "t.jsonl", "-e", "hps", "--set", "evaluators.0.params.version=v2.1")[0] == 0
        assert calls[0].table == Path("an: other #1.jsonl")
        assert [one.name for one in calls[1].evaluators] == ["hps", "clip_score"]
        assert (calls[2].table, calls[2].output, calls[2].batch_size) == (Path("t.parquet"), Path("o"), 2)
        assert calls[3].evaluators[0].params == {"version": "v2.1"}
        assert run("score", "t.jsonl", "-e", "hps", "--engine", "ray")[0] == 0 and calls[4].engine == "ray"
        (tmp_path / "y.yaml").write_text(SCORE.replace("table:", "media:"))
        assert run("score", "y.yaml", "--table", "other.jsonl")[0] == 0, "the option goes before either key"
        assert (calls[5].table, calls[5].media) == (Path("other.jsonl"), None)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "score needs a table and --evaluator NAME; or name a config."),
            (["t.jsonl"], "score needs --evaluator NAME; see `mmalign list evaluators`; or name a config."),
            (["--evaluator", "hps"], "score needs a table; or name a config."),
            (
                ["t.jsonl", "--table", "u.jsonl", "-e", "hps"],
                "both t.jsonl and --table u.jsonl name a table; keep one.",
            ),
            (["x.yaml", "-e", "hps"], "--evaluator goes with a table; a config names its evaluators itself."),
            (
                ["t.jsonl", "-e", "hps", "--set", "batch=2"],
                "--set batch: batch: unknown key. Did you mean 'batch_size'?",
            ),
        ],
    )
    def test_score_asked_wrongly(self, run: Run, words: list[str], message: str) -> None:
        code, out, err = run("score", *words)
        assert (code, out, err) == (2, "", f"error: {message}\n")

    def test_quickstart(self, run: Run, job: Any) -> None:
        calls: list[Any] = []
        job("quickstart", lambda output, **options: calls.append((output, options)))
        assert run("quickstart", "--seed", "3", "--short", "--output", "q")[0] == 0
        assert calls == [(Path("q"), {"seed": 3, "short": True})]
        job("quickstart_answers", lambda output, **options: calls.append((output, options)))
        assert run("quickstart", "--answers", "--seed", "2")[0] == 0
        assert calls[1] == (Path("runs/quickstart-answers"), {"seed": 2, "short": False})

    def test_a_config_of_another_job_names_its_verb(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text(SCORE)
        code, _, err = run("train", "x.yaml")
        assert (code, err) == (2, "error: x.yaml:1: this is a score config; run `mmalign score x.yaml`.\n")

    def test_a_slip_in_a_key_does_not_hide_the_job(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text(TRAIN.replace("task:", "tsk:"))
        code, _, err = run("config", "check", "x.yaml")
        assert code == 2 and "x.yaml:1: tsk: unknown key. Did you mean 'task'?" in err


class TestConfigVerbs:
    def test_show_writes_out_the_defaults(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text(TRAIN)
        code, out, _ = run("config", "show", "x.yaml", "--set", "loss.beta=7")
        (tmp_path / "y.yaml").write_text(out)
        assert code == 0 and "beta: 7.0\n" in out and "max_grad_norm: 1.0" in out
        assert run("config", "show", "y.yaml")[1] == out

    @pytest.mark.parametrize("name", ["train", "sample", "score"])
    def test_schema(self, run: Run, name: str) -> None:
        code, out, _ = run("config", "schema", name)
        schema = json.loads(out)
        assert code == 0 and "output" in schema["required"] and "extends" in schema["properties"]

    def test_check_prints_every_mistake_of_every_file(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "good.yaml").write_text(SCORE)
        (tmp_path / "a.yaml").write_text(
            TRAIN.replace("loss: {kind: diffusion_dpo}", "loss: {kind: diffusion_dpo, bta: 1}")
        )
        (tmp_path / "b.yaml").write_text(SAMPLE + "stps: 3\nguidence_scale: 3\n")
        code, out, err = run("config", "check", "good.yaml", "a.yaml", "b.yaml", "c.yaml")
        assert (code, out) == (2, "good.yaml: good\n")
        assert err.splitlines() == [
            "errors:",
            "a.yaml:5: loss.bta: unknown key. Did you mean 'beta'?",
            "b.yaml:4: stps: unknown key. Did you mean 'steps'?",
            "b.yaml:5: guidence_scale: unknown key. Did you mean 'guidance_scale'?",
            "c.yaml: no such file. Did you mean 'b.yaml'?",
        ]

    def test_keys_that_do_not_tell(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text("output: out\n")
        code, _, err = run("config", "check", "x.yaml")
        assert code == 2 and "add --job with one of train, sample, score, prefer" in err
        assert "evaluators is missing" in run("config", "check", "x.yaml", "--job", "score")[2]
        (tmp_path / "y.yaml").write_text("output: out\nevaluators: [{name: hps}]\n")
        assert "exactly one of table and media" in run("config", "check", "y.yaml", "--job", "score")[2]


class TestListing:
    @pytest.mark.parametrize("kind", [kind.value for kind in Kind])
    def test_json_is_a_list_of_names_and_one_line_summaries(self, run: Run, kind: str) -> None:
        code, out, _ = run("list", kind, "--json")
        rows = json.loads(out)
        assert code == 0 and rows
        for row in rows:
            assert row["name"] and row["summary"] and "\n" not in row["summary"]
        names = [row["name"] for row in rows]
        assert len(set(names)) == len(names)
        table = run("list", kind)[1]
        assert all(name in table for name in names)

    def test_known_names(self) -> None:
        expected = {
            Kind.evaluators: {"hps", "clip_score", "aesthetic", "shapes_truth"},
            Kind.methods: {"diffusion_dpo", "flow_dpo", "rank_dpo", "diffusion_kto", "ddim_inpo"},
            Kind.models: {"sd", "sdxl"},
            Kind.formats: {"pickapic", "hpdv2", "hpdv3", "imagereward", "jsonl", "folder"},
        }
        for kind, names in expected.items():
            assert names <= {row["name"] for row in listing(kind)}

    def test_evaluators_as_json_say_what_they_declare(self) -> None:
        rows = {row["name"]: row for row in listing(Kind.evaluators, plugins=False, declared=True)}
        assert rows.keys() == {path.stem.replace("__", "@") for path in (ROOT / "evaluators").glob("[!_]*.py")}
        page = (ROOT / "docs" / "evaluators.md").read_text(encoding="utf-8")
        for name, row in rows.items():
            assert "error" not in row and row["licence"] and row["source"] and row["modality"], row
            assert isinstance(row["differentiable"], bool) and row["version"] >= 1, name
            if name not in {"shapes_truth", "shapes_motion", "shapes_place", "shapes_claims"}:
                led = re.search(rf"\[{re.escape(name)}\]\(scorers/([\w@]+\.md)", page)  # some share a page
                assert led, f"docs/evaluators.md does not lead to {name}'s page"
                assert name in (ROOT / "docs" / "scorers" / led[1]).read_text(encoding="utf-8"), f"{name} has no page"
            expected = name in {"aesthetic", "clip_score", "fitted_reward", "hps", "hpsv3", "image_reward", "mps"} | {
                "pickscore", "social_reward", "vlm_reward", "imaging_quality", "motion_smoothness", "temporal_style",
                "overall_consistency", "temporal_flickering", "subject_consistency", "background_consistency",
                "aesthetic_quality"}  # fmt: skip
            assert row["differentiable"] == expected, f"{name}: its contract test follows a gradient to the pixels"
            sees = {"image", "frames"} & set(row["needs"])  # evaluators of answers take videos unseen
            assert ("video" in row["modality"]) <= ("frames" in row["needs"] or not sees), name
        assert {"v1", "v2"} <= set(rows["aesthetic"]["params"]["head"]["enum"])

    def test_a_broken_plugin_is_shown_beside_the_others(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        from mmalign import discovery

        found = {
            "good": discovery.Found("good", "built in", "Is good."),
            "bad": discovery.Found("bad", "bad-metric 0.1", "", "bad-metric 0.1 cannot be imported: no\nmore lines"),
        }
        monkeypatch.setattr(discovery, "find_evaluators", lambda plugins=True: found)
        shown = discovery.evaluator_class("pickscore")
        monkeypatch.setattr(discovery, "evaluator_class", lambda name, plugins=True: {"good": shown}[name])
        rows = {row["name"]: row for row in inspect.listing(Kind.evaluators)}
        assert rows["bad"]["summary"] == "broken: bad-metric 0.1 cannot be imported: no"
        assert "error" not in rows["good"]
        code, out, _ = run("list", "evaluators")
        assert code == 0 and "broken: bad-metric 0.1" in out and "Is good." in out
        words = " ".join(out.replace("\u2502", " ").split())
        assert (
            "image, video | differentiable | PickScore, 2305.01569; weights yuvalkirstain/PickScore_v1 | MIT" in words
        )

    def test_an_unknown_kind(self, run: Run) -> None:
        code, _, err = run("list", "evaluator")
        assert code == 2 and "'evaluators'" in err


class TestMistakes:
    def test_all_errors_exit_code_2_no_traceback(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text(
            TRAIN.replace("kind: diffusion_dpo", "kind: diffusion_dpo, bta: 5") + "oputput: x\n"
        )
        code, out, err = run("train", "x.yaml", "--set", "optim.stps=4")
        assert (code, out) == (2, "")
        assert err.splitlines() == [
            "errors:",
            "x.yaml:5: loss.bta: unknown key. Did you mean 'beta'?",
            "x.yaml:6: oputput: unknown key. Did you mean 'output'?",
            "--set optim.stps: optim.stps: unknown key. Did you mean 'steps'?",
        ]

    def test_our_value_error_is_a_message_a_foreign_one_is_a_defect(
        self, run: Run, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "x.yaml").write_text(TRAIN)
        job("train", lambda settings, resume: config.loads(type(settings), ""))
        code, _, err = run("train", "x.yaml")
        assert code == 2 and err.startswith("error: <text>:1: the file is empty") and "Traceback" not in err

        job("train", lambda settings, resume: json.loads("not json"))
        monkeypatch.setattr(sys, "argv", ["mmalign", "train", "x.yaml"])
        with pytest.raises(json.JSONDecodeError):
            cli.main()

    def test_debug_shows_the_traceback_of_users_mistakes_too(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MMALIGN_DEBUG", "1")
        monkeypatch.setattr(sys, "argv", ["mmalign", "train", "missing.yaml"])
        with pytest.raises(config.ConfigError):
            cli.main()

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (
                FileNotFoundError(2, "No such file or directory", "model/x"),
                "error: model/x: No such file or directory",
            ),
            (OSError(28, "No space left on device", "out/a"), "error: out/a: No space left on device. Free some space"),
            (
                OSError(28, "the cache is full; run `mmalign cache clear`", "c"),
                "error: c: the cache is full; run `mmalign cache clear`",
            ),
            (ModuleNotFoundError("x", name="bitsandbytes"), "error: bitsandbytes is not installed"),
            (ModuleNotFoundError("x", name="mmalign.evaluators"), "error: the evaluators are not installed."),
            (type("OutOfMemoryError", (RuntimeError,), {})("tried 2 GiB"), "error: the accelerator's memory is full"),
            (ModuleNotFoundError("x", name="something_else"), None),
            (ValueError("raised by a test, not by mmalign"), None),
            (AssertionError("an invariant"), None),
        ],
    )
    def test_what_is_said(self, error: Exception, message: str | None) -> None:
        said = cli.user_message(error)
        assert said is None if message is None else said is not None and said.startswith(message)

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (Stopped("a process died"), 1),
            (OSError(28, "No space left on device", "out/a"), 1),
            (OSError(122, "Disk quota exceeded", "out/a"), 1),
            (type("OutOfMemoryError", (RuntimeError,), {})("tried 2 GiB"), 1),
            (OSError(13, "Permission denied", "out/a"), 2),
            (FileNotFoundError(2, "No such file or directory", "model/x"), 2),
            (ModuleNotFoundError("x", name="bitsandbytes"), 2),
        ],
        ids=["stopped", "disk", "quota", "memory", "permission", "file", "module"],
    )
    def test_a_run_that_stops_on_the_way_is_no_mistake(
        self, run: Run, job: Any, tmp_path: Path, error: Exception, code: int
    ) -> None:
        def fails(settings: object, resume: bool) -> None:
            raise error

        (tmp_path / "x.yaml").write_text(TRAIN)
        job("train", fails)
        found, _, said = run("train", "x.yaml")
        assert found == code and said.startswith("error: ")

    def test_interrupted(self, run: Run, job: Any, tmp_path: Path) -> None:
        def interrupted(settings: object, resume: bool) -> None:
            raise KeyboardInterrupt("stopped after step 3")

        (tmp_path / "x.yaml").write_text(TRAIN)
        job("train", interrupted)
        code, _, err = run("train", "x.yaml")
        assert (code, err) == (130, "interrupted: stopped after step 3\n")

    def test_unknown_verb_and_option(self, run: Run) -> None:
        assert run("trian")[0] == 2
        assert run("train", "x.yaml", "--sett", "a=b")[0] == 2

    def test_a_real_process_ends_as_promised(self, tmp_path: Path) -> None:
        (tmp_path / "x.yaml").write_text("loss: {}\n")
        done = subprocess.run(
            [sys.executable, "-m", "mmalign", "train", "x.yaml"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 2 and "loss.kind is missing" in done.stderr and "Traceback" not in done.stderr

    def test_a_real_process_is_interrupted(self, tmp_path: Path) -> None:
        code = (
            "import signal, sys, time, types, mmalign\n"
            # A shell starts background jobs, such as this whole suite, with SIGINT ignored, and children inherit that.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "def run(output, **options):\n    print('ready', flush=True)\n    time.sleep(60)\n"
            "sys.modules['mmalign.quickstart'] = types.SimpleNamespace(run=run)\n"
            "sys.argv = ['mmalign', 'quickstart']\n"
            "from mmalign.cli import main\nmain()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as p:
            assert p.stdout is not None and p.stderr is not None
            assert p.stdout.readline() == b"ready\n"
            os.kill(p.pid, signal.SIGINT)
            assert p.wait(timeout=120) == 130
            assert b"Traceback" not in p.stderr.read()


class TestHelp:
    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_teaches_with_an_example(self, run: Run, verb: str) -> None:
        code, out, _ = run(*verb.split(), "--help")
        assert code == 0 and "Example" in out and f"mmalign {verb}" in out.split("Example", 1)[1]

    def test_version(self, run: Run) -> None:
        assert run("--version")[:2] == (0, f"mmalign {mmalign.__version__}\n")


class TestCache:
    def test_ls_and_clear(self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import torch

        from mmalign.cache import Cache

        cache = Cache(tmp_path / "c")
        cache.put("latents", cache.key(a=1), {"x": torch.zeros(3)})
        cache.put("inversions", cache.key(a=2), {"x": torch.zeros(3)})
        rows = {row["kind"]: row for row in json.loads(run("cache", "ls", "--root", "c", "--json")[1])}
        assert (rows["latents"]["entries"], rows["inversions"]["entries"], rows["prompt_embeddings"]["entries"]) == (
            1,
            1,
            0,
        )
        assert "latents" in run("cache", "ls", "--root", "c")[1]

        code, _, err = run("cache", "clear", "latnets", "--root", "c", "--yes")
        assert code == 2 and "Did you mean 'latents'?" in err
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert run("cache", "clear", "latents", "--root", "c")[0] == 1, "without an answer nothing is deleted"
        assert cache.ls()[0].entries == 1
        assert run("cache", "clear", "latents", "--root", "c", "--yes")[1].startswith("deleted 1 entries, ")
        assert [held.entries for held in cache.ls() if held.entries] == [1]
        assert run("cache", "clear", "--root", "c", "--yes")[0] == 0
        assert not any(held.entries for held in cache.ls())


class TestDoctor:
    def test_what_it_looks_at(self, run: Run) -> None:
        code, out, _ = run("doctor", "--json")
        found = json.loads(out)
        assert code == (0 if found["healthy"] else 1)
        names = {
            section: {line["name"]: line for line in lines} for section, lines in found.items() if section != "healthy"
        }
        assert {"python", "mmalign", "torch", "diffusers", "av"} <= set(names["versions"])
        assert {"cpu", "memory"} <= set(names["devices"])
        assert "libavcodec" in names["decoders"]["pyav"]["value"]
        assert "GiB free" in names["folders"]["cache"]["value"]
        assert names["environment"]["HF_HUB_OFFLINE"]["value"] == "1"
        for part in doctor.OPTIONAL:
            line = names["optional"][part.module]
            assert line["state"] == "ok" or line["fix"].startswith("pip install ")

    def test_a_missing_requirement_is_bad_and_has_its_command(self, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
        monkeypatch.setattr(
            doctor.importlib.metadata, "requires", lambda name: ["torch>=999", "no-such-part>=1", "x; extra == 'y'"]
        )
        lines = {line.name: line for line in doctor._versions()}
        assert lines["torch"].state == "bad" and lines["torch"].fix == "pip install 'torch>=999'"
        assert lines["no-such-part"].value == "missing, >=1 is needed"
        assert "x" not in lines
        code, out, _ = run("doctor")
        assert code == 1 and "pip install 'no-such-part>=1'" in out and "mmalign will not work" in out

    def test_a_cache_that_cannot_be_written(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
        line = doctor._space("cache", tmp_path / "not" / "there")
        assert line.state == "bad" and "MMALIGN_CACHE" in line.fix
