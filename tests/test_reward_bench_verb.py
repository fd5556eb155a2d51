"""What `mmalign bench reward` says of tables, configs and names that it cannot use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reward_kit as kit
from reward_kit import FEW, figures, run

from mmalign.commands.configs import Job, load_job
from mmalign.jobs_bench import BENCHMARK_NAMES

RED = {"name": "colours", "subscore": "red"}


@pytest.fixture(name="cli_run")
def _cli_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return kit.caller(capsys, monkeypatch)


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    folder = kit.imagereward(tmp_path / "ir")
    good = {f"part/{n:04d}/{letter}.png": float(n) for n in range(6) for letter in "abc"}

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            run("imagereward", folder, tmp_path / "out", **changes)

    refused(
        "no score of a medium of imagereward: it names 'x.png'", scores=kit.scores(tmp_path / "a.jsonl", {"x.png": 1})
    )
    (tmp_path / "b.jsonl").write_text('{"smaple": "x", "score": 1}\n')
    refused("no column sample.*Did you mean 'smaple'", scores=tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"sample": "x", "note": "good"}\n')
    refused("no column of numbers beside sample", scores=tmp_path / "c.jsonl")
    lines = "".join(json.dumps({"sample": name, "score": 1.0}) + "\n" for name in [*good, "part/0000/a.png"])
    (tmp_path / "d.jsonl").write_text(lines)
    refused("stands there twice", scores=tmp_path / "d.jsonl")
    (tmp_path / "d.jsonl").write_text(lines.replace("part/0000/a.png", "here/part/0000/a.png", 1))
    refused("two rows are about 'part/0000/a.png'", scores=tmp_path / "d.jsonl")
    (tmp_path / "e").mkdir()
    refused("not a results folder", scores=tmp_path / "e")
    refused(
        r"has no score that is a finite number \(2 no finite number\)",
        scores=kit.scores(tmp_path / "n.jsonl", {name: float("nan") for name in list(good)[:2]}),
    )
    one = {"part/0000/a.png": 1.0, "part/0001/a.png": 2.0}
    refused("no pair of overall has two scores", scores=kit.scores(tmp_path / "f.jsonl", one))
    (tmp_path / "empty.json").write_text('[{"prompt": "p", "generations": ["a.png"], "ranking": [1]}]')
    with pytest.raises(ValueError, match=r"no row of imagereward can be used \(1 bad media"):
        run("imagereward", tmp_path / "empty.json", tmp_path / "out", scores=kit.scores(tmp_path / "g.jsonl", good))


ODD = {  # what is written for a table of three rows, the odd cell in the second; and where the message should place it
    ".jsonl": ('{"sample": "s0", "score": 1, "x": 2}\n\n{"sample": "s1", "score": "bad", "x": 3}\n', ":3"),
    ".json": ('[{"sample": "s0", "score": 1, "x": 2}, {"sample": "s1", "score": "bad", "x": 3}]', " row 1"),
    ".csv": ('sample,score,x,note\ns0,1,2,"two\nlines"\n\ns1,bad,3,\ns2,3,4,\n', ":5"),
    ".tsv": ("sample\tscore\tx\ns0\t1\t2\ns1\tbad\t3\n", ":3"),
}


@pytest.mark.parametrize("suffix", ODD)
def test_a_cell_that_is_no_number_is_named_and_never_changes_the_scorer(suffix: str, tmp_path: Path) -> None:
    """Not even where another column would do: that would be another scorer under this one's name."""
    folder = kit.imagereward(tmp_path / "ir")
    table = tmp_path / f"t{suffix}"
    text, place = ODD[suffix]
    table.write_text(text)
    with pytest.raises(ValueError, match=rf"t\{suffix}{place}: score is 'bad', no number"):
        run("imagereward", folder, tmp_path / "out", scores=table)
    table.write_text(text.replace("score", "mine"))
    with pytest.raises(ValueError, match=rf"t\{suffix}{place}: mine is 'bad', no number.*call the column of scores"):
        run("imagereward", folder, tmp_path / "out", scores=table)


def test_which_columns_are_scores(tmp_path: Path) -> None:
    folder = kit.imagereward(tmp_path / "ir")
    names = [f"part/{n:04d}/{letter}.png" for n in range(6) for letter in "abc"]

    def titles(rows: list[dict[str, Any]], suffix: str = ".jsonl") -> dict[str, int]:
        table = tmp_path / f"t{suffix}"
        if suffix == ".jsonl":
            table.write_text(
                "".join(json.dumps({"sample": n, **row}) + "\n" for n, row in zip(names, rows, strict=True))
            )
        else:
            lines = [",".join(["sample", *rows[0]])]
            lines += [",".join([n, *map(str, row.values())]) for n, row in zip(names, rows, strict=True)]
            table.write_text("\n".join(lines) + "\n")
        report = run("imagereward", folder, tmp_path / "out", scores=table)
        return {one["scorer"]: one["coverage"]["scored"] for one in report["results"]}

    rows: list[dict[str, Any]] = [{"a": n / 7, "b": n % 5, "seed": n, "model": "1.5", "note": "x"} for n in range(18)]
    for suffix in (".jsonl", ".csv"):
        assert titles(rows, suffix) == {"a": 18, "b": 18}  # what a media table says of media is no score
    rows[3] |= {"a": None}
    rows[4] |= {"a": float("nan")}
    assert titles(rows) == {"a": 16, "b": 18}
    assert titles([{**row, "a": "" if row["a"] is None else row["a"]} for row in rows], ".csv") == {"a": 16, "b": 18}
    assert titles([{"score": n % 3 > 0, "b": n} for n in range(18)]) == {"t": 18}
    with pytest.raises(ValueError, match="has no column of numbers beside sample"):
        titles([{"score": None, "b": n} for n in range(18)])


def test_level_scores_of_hpdv2_are_ranked_as_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kit.hpdv2(tmp_path / "hpd")
    level = kit.scores(tmp_path / "t.jsonl", {f"{n}.jpg": 1.0 for n in range(5)})
    found = figures(run("hpdv2", folder, tmp_path / "out", scores=level))["hpdv2_inversions"]
    assert found["macro"]["mean"] == found["baselines"]["all_tie"]["macro"] == 0.5  # ranks are 1 2 3, and 2 1
    said = " ".join(capsys.readouterr().out.split())
    assert "t: 4 pairs have level scores, which hpdv2_inversions ranks as they are listed" in said
    options = {"hpdv2_ties": "free", **FEW}
    free = figures(run("hpdv2", folder, tmp_path / "out", scores=level, protocols=options))["hpdv2_inversions"]
    assert free["macro"]["mean"] == 1.0 and "level scores" not in capsys.readouterr().out


def test_scores_of_which_less_is_better(tmp_path: Path) -> None:
    folder = kit.imagereward(tmp_path / "ir")
    values = {f"part/{n:04d}/{letter}.png": float(i) for n in range(6) for i, letter in enumerate("abc")}
    table = kit.scores(tmp_path / "t.csv.jsonl", values)
    found = figures(run("imagereward", folder, tmp_path / "out", scores=table, higher_is_better=False))
    assert found["imagereward_macro"]["macro"]["mean"] == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluators": [RED], "scores": "x.jsonl"}, "exactly one of evaluators"),
        ({"evaluators": []}, "exactly one of evaluators"),
        ({"evaluators": [RED], "axes": {"VQ": "a"}}, "name columns of `scores`"),
        ({"evaluators": [RED], "higher_is_better": True}, "is about `scores`"),
        ({"grid": {"pictures": 4}}, "grid is for dpg_bench"),
        ({"split": "test"}, "split is for pickapic, .*not for imagereward; drop it"),
        ({"images_per_prompt": 2}, "images_per_prompt is for geneval"),
        ({"skip_first_row": True}, "skip_first_row is for dpg_bench"),
        ({"edit_prompt": "instruct_prompt"}, "edit_prompt is for genai_bench_edit"),
        ({"protocols": {"fit": "test"}}, "held_out"),
    ],
)
def test_configs_that_contradict_themselves(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        kit.config("imagereward", tmp_path, tmp_path / "out", **changes)


def test_the_verb_is_where_it_is_looked_for(tmp_path: Path, cli_run: Any) -> None:
    assert "bench reward" in cli_run("bench", "reward", "--help")[1]
    rows = json.loads(cli_run("list", "benchmarks", "--json")[1])
    by_name = {row["name"]: row for row in rows}
    assert "hpdv2_inversions" in by_name["hpdv2"]["protocols"] and by_name["hpdv2"]["licence"] == "Apache-2.0"
    assert "videogen-rewardbench.csv" in by_name["videogen_rewardbench"]["layout"]
    schema = json.loads(cli_run("config", "schema", "bench")[1])
    assert {"benchmark", "folder", "output"} <= set(schema["required"])
    yaml = tmp_path / "x.yaml"
    yaml.write_text("benchmark: hpdv2\nfolder: a\noutput: b\nscores: c.jsonl\n")
    assert cli_run("config", "check", str(yaml))[:2] == (0, f"{yaml}: good\n")
    code, _, err = cli_run("score", str(yaml))
    assert code == 2 and f"run `mmalign bench reward {yaml}`" in err
    yaml.write_text("tabel: t.jsonl\noutput: b\nevaluators: [{name: hps}]\n")
    assert "Did you mean 'table'?" in cli_run("config", "check", str(yaml))[2]  # still known for a score config


@pytest.mark.parametrize("name", BENCHMARK_NAMES)
def test_a_benchmarks_name_leads_to_a_shipped_config(name: str, cli_run: Any) -> None:
    code, _, err = cli_run("bench", "reward", name)
    assert code == 2 and f"{name} is a benchmark, and no config file" in err
    command = err[err.index("configs/bench/") :].split()
    changes = [command[place + 1] for place, word in enumerate(command) if word == "--set"]
    assert changes[-1] == "folder=FOLDER"
    made = load_job(Path(command[0]), changes, Job.bench)
    assert made.benchmark == name and str(made.folder) == "FOLDER"


def test_a_file_of_that_name_is_read(tmp_path: Path, cli_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("geneval").write_text("benchmark: geneval\nfolder: nowhere\noutput: out\nscores: s.jsonl\n")
    code, _, err = cli_run("bench", "reward", "geneval")
    assert code == 2 and "folder: nowhere does not exist" in err
