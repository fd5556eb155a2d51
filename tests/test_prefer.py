"""`mmalign prefer` from end to end: pictures, scores, rankings, pairs, filters, mistakes."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefer_kit import LISTS, REWARDS, answer, config, questions, rows_of, settings, summary_of, table
from public_kit import IMAGE_REWARD, needs
from table_kit import pairs

from mmalign import cli, labelling, prefer, routing
from mmalign.config import load
from mmalign.jobs import SampleConfig
from mmalign.jobs_prefer import PreferConfig, SampleSource
from mmalign.media import write_image
from mmalign.paths import find
from mmalign.tables import read_media_table, read_preferences

pytestmark = pytest.mark.usefixtures("colour_evaluators")


# ------------------------------------------------------------------------------------------------ what it makes


def test_a_ranking_keeps_every_score_and_phi(tmp_path: Path, source: Path) -> None:
    rows = rows_of(prefer.run(config(tmp_path / "out", source)))
    assert [(row.prompt, len(row.media)) for row in rows] == [("agreed", 4), ("fought", 3), ("level", 2)]
    for row in rows:
        colours = np.array(LISTS[row.prompt], float) * [1, 1, -1]
        assert row.scores is not None and list(row.scores) == ["phi", "red", "green", "blue"]
        assert pytest.approx(colours) == np.array([row.scores[name] for name in ("red", "green", "blue")]).T
        assert row.scores["phi"] == pytest.approx(labelling.phi(colours))
        assert row.weight == 1 and row.source == "prefer"
    assert rows[0].scores["phi"] == (1, pytest.approx(2 / 3), pytest.approx(1 / 3), 0)
    assert rows[2].scores["phi"] == (0.5, 0.5), "nothing preferred: a tie, which training treats as told"
    assert len(pairs(read_preferences(tmp_path / "out/preferences.jsonl"), "drop", dimension="phi")) == 6 + 3
    summary = summary_of(tmp_path / "out")
    assert (summary["lists"], summary["pictures"], summary["rows"], summary["dropped"]) == (3, 9, 3, {})
    assert summary["list_sizes"] == {"2": 1, "3": 1, "4": 1}
    assert summary["rewards"]["blue"]["higher_is_better"] is False


def test_agreement_in_the_summary(tmp_path: Path, source: Path) -> None:
    prefer.run(config(tmp_path / "out", source))
    entries = {(e["a"], e["b"]): e for e in summary_of(tmp_path / "out")["agreement"]}
    red_green = entries["red", "green"]
    assert red_green["tau_b"]["mean"] == pytest.approx((1 - 1) / 2) and red_green["tau_b"]["n"] == 2
    assert red_green["same_order"]["share"] == pytest.approx(6 / 9)
    assert entries["green", "blue"]["same_order"]["share"] == 1
    assert red_green["same_order"]["low"] < 6 / 9 < red_green["same_order"]["high"]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ({"select": "best_worst"}, {"agreed": [(0, 3)], "fought": [(0, 2)]}),
        ({"select": "all", "ties": "drop"}, {"agreed": 6, "fought": 3}),
        ({"select": "all"}, {"agreed": 6, "fought": 3, "level": 1}),
        ({"select": "top_bottom", "count": 2}, {"agreed": [(0, 2), (0, 3), (1, 2), (1, 3)], "fought": [(0, 2)]}),
        ({"select": "margin", "min_margin": 0.6}, {"agreed": [(0, 2), (0, 3), (1, 3)]}),
        ({"select": "best_worst", "by": "red"}, {"agreed": [(0, 3)], "fought": [(0, 2)]}),
    ],
)
def test_pairs(tmp_path: Path, source: Path, label: dict[str, Any], expected: dict[str, Any]) -> None:
    made: dict[str, list[tuple[int, int]]] = {}
    places = {row.media: n for n, row in enumerate(read_media_table(source))}
    starts = {"agreed": 0, "fought": 4, "level": 7}
    for row in rows_of(prefer.run(config(tmp_path / "out", source, label={"kind": "pairs", **label}))):
        i, j = (places[ref.file] - starts[row.prompt] for ref in row.media)
        made.setdefault(row.prompt, []).append((i, j))
        assert row.scores is not None and set(row.scores) == {"phi", "red", "green", "blue"}
    assert made.keys() == expected.keys()
    for prompt, wanted in expected.items():
        assert len(made[prompt]) == wanted if isinstance(wanted, int) else made[prompt] == wanted


def test_strength_as_weight_and_filters(tmp_path: Path, source: Path) -> None:
    """In "fought" two rewards of three (green, blue) prefer the later picture."""
    label = {"kind": "pairs", "select": "all", "weight": "strength"}
    rows = rows_of(prefer.run(config(tmp_path / "a", source, label=label)))
    weights = {prompt: {round(row.weight, 6) for row in rows if row.prompt == prompt} for prompt in LISTS}
    assert weights == {"agreed": {1.0}, "fought": {round(2 / 3, 6)}, "level": {0.5}}
    kept = rows_of(prefer.run(config(tmp_path / "b", source, label=label, filters={"min_strength": 0.7})))
    assert {row.prompt for row in kept} == {"agreed"}
    dropped = summary_of(tmp_path / "b")["dropped"]["pair with strength below 0.7"]
    assert dropped["count"] == 4 and len(dropped["examples"]) == 3
    kept = rows_of(prefer.run(config(tmp_path / "c", source, filters={"min_agreement": 0.5})))
    assert {row.prompt for row in kept} == {"agreed"}
    dropped = summary_of(tmp_path / "c")["dropped"]
    assert dropped["agreement of the rewards below 0.5"]["count"] == 1
    assert dropped["agreement of the rewards is undefined"]["count"] == 1
    kept = rows_of(prefer.run(config(tmp_path / "d", source, filters={"min_strength": 0.9})))
    assert {row.prompt for row in kept} == {"agreed"}


def test_nothing_left_is_said_with_the_reasons(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ValueError, match="no preference is left: 1 agreement of the rewards below 1"):
        lists = {"fought": LISTS["fought"]}
        prefer.run(config(tmp_path / "out", table(tmp_path / "in", lists, "x.jsonl"), filters={"min_agreement": 1}))


def test_weights_count_and_a_reward_of_weight_nothing_is_kept(tmp_path: Path, source: Path) -> None:
    rewards = [{**REWARDS[0], "weight": 3}, REWARDS[1], {**REWARDS[2], "weight": 0}]
    rows = rows_of(prefer.run(config(tmp_path / "out", source, rewards=rewards)))
    assert rows[1].scores["phi"] == pytest.approx((3 / 4, 1 / 2, 1 / 4))
    assert rows[1].scores["blue"] == pytest.approx((-90, -80, -70))


def test_pictures_without_a_score_are_left_out_and_named(tmp_path: Path) -> None:
    lists = {"black": [(9, 9, 9), (0, 0, 0), (7, 9, 9)], "short": [(0, 0, 0), (1, 1, 1)], "single": [(4, 4, 4)]}
    source = table(tmp_path, lists)
    (tmp_path / "table.jsonl-2.png").write_bytes(b"no picture at all")
    lines = source.read_text().splitlines()
    source.write_text("\n".join([*lines, lines[0].replace('"s0"', '"again"')]))
    rewards = REWARDS[:1] + REWARDS[2:]
    with pytest.raises(ValueError, match="no preference is left"):
        prefer.run(config(tmp_path / "out", source, rewards=rewards))
    dropped = summary_of(tmp_path / "out")["dropped"]
    assert dropped["not scored by blue"]["count"] == 2 and "score is nan" in str(dropped["not scored by blue"])
    assert dropped["not scored by red"]["examples"][0].startswith("0:s2: ")
    assert dropped["fewer than two pictures"]["count"] == 3
    assert dropped["the same picture again"]["examples"] == ["0:again: as 0:s0"]


def test_sources_meet_by_prompt_and_the_summary_says_who_wins(tmp_path: Path) -> None:
    good = table(tmp_path, {"p": [(200, 200, 0)], "q": [(180, 180, 0)], "alone": [(1, 2, 3)]}, "good.jsonl")
    bad = table(tmp_path, {"p": [(20, 20, 90), (30, 30, 80)], "q": [(10, 20, 80)]}, "bad.jsonl", model="poor")
    sources = [{"kind": "table", "table": good, "name": "good"}, {"kind": "table", "table": bad}]
    rows = rows_of(prefer.run(config(tmp_path / "out", good, sources=sources)))
    assert [len(row.media) for row in rows] == [3, 2]
    found = summary_of(tmp_path / "out")["sources"]
    assert found["good"]["phi"]["mean"] == 1 and found["good"]["best"]["share"] == 1
    assert found["poor"]["phi"]["n"] == 3 and found["poor"]["best"]["share"] == 0


def test_sampled_pictures(tmp_path: Path, model: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na red circle\n")
    drawn = {"kind": "sample", "name": "tiny", "model": {"path": model}, "steps": 1, "per_prompt": 3, "device": "cpu"}
    job = config(tmp_path / "out", tmp_path, sources=[drawn], prompts=tmp_path / "prompts.txt")
    rows = rows_of(prefer.run(job))
    assert [(row.prompt, len(row.media)) for row in rows] == [("a red circle", 3), ("a blue square", 3)]
    assert (tmp_path / "out/source-0/images/000000-0.png").is_file()
    again = summary_of(tmp_path / "out")["dropped"]["the same picture again"]
    assert again["count"] == 3 and again["examples"][0] == "0:000002-0: as 0:000000-0"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/source-0/images").iterdir()}
    first = (tmp_path / "out/preferences.jsonl").read_bytes()
    shutil.move(tmp_path / "out", tmp_path / "moved")  # a folder stands by itself
    prefer.run(config(tmp_path / "moved", tmp_path, sources=[drawn], prompts=tmp_path / "prompts.txt"))
    moved = {tmp_path / "out/source-0/images" / p.name: p.stat().st_mtime_ns
             for p in (tmp_path / "moved/source-0/images").iterdir()}  # fmt: skip
    assert moved == before and (tmp_path / "moved/preferences.jsonl").read_bytes() == first
    other = config(tmp_path / "moved", tmp_path, sources=[{**drawn, "steps": 2}], prompts=tmp_path / "prompts.txt")
    about = (tmp_path / "moved/config.yaml").read_bytes()
    with pytest.raises(ValueError, match=r"other values of: sources\.0\.steps\. Choose another folder"):
        prefer.run(other, replace_labels=True)
    assert (tmp_path / "moved/config.yaml").read_bytes() == about


def test_the_shipped_config_in_small(tmp_path: Path) -> None:
    small = ["limit=2", "sources.0.per_prompt=2", "sources.0.steps=2", "sources.0.device=cpu", "scoring.device=cpu"]
    job = load(PreferConfig, find("configs/shapes/prefer.yaml"), [*small, f"output={tmp_path / 'out'}"])
    rows = rows_of(prefer.run(job))
    assert [(len(row.media), list(row.scores)) for row in rows] == [(2, ["phi", "hps", "bold", "tidy"])] * 2


def test_a_sampled_source_has_the_keys_of_sampling() -> None:
    """They are written out, so that a source refuses `output`; what sampling learns, a source has to learn too."""
    own = {name: field for name, field in SampleSource.model_fields.items() if name not in ("kind", "name")}
    given = ("prompts", "output", "limit", "guidance")  # a policy is judged by what it draws without a reward's help
    theirs = {n: f for n, f in SampleConfig.model_fields.items() if n not in given}
    assert own.keys() == theirs.keys()
    for name, field in own.items():
        assert (field.annotation, field.default) == (theirs[name].annotation, theirs[name].default), name


# ------------------------------------------------------------------------------------------------ relabelling


def test_a_preference_set_gets_new_labels(tmp_path: Path) -> None:
    colours = [(200, 200, 10), (90, 90, 20), (10, 10, 90)]
    for number, colour in enumerate(colours):
        write_image(tmp_path / f"{number}.png", np.full((8, 8, 3), colour, np.uint8))
    old = [("0.png", "1.png", "A", "anna"), ("0.png", "1.png", "B", "ben"), ("2.png", "1.png", "A", "anna")]
    lines = [json.dumps({"prompt": "p", "media": [a, b], "label": v, "user_id": u}) for a, b, v, u in old]
    (tmp_path / "old.jsonl").write_text("\n".join(lines))
    job = settings(tmp_path / "out", tmp_path, sources=[], relabel={"table": tmp_path / "old.jsonl"})
    rows = rows_of(prefer.run(PreferConfig.model_validate(job)))
    assert [(tuple(Path(ref.file).name for ref in row.media), row.scores["phi"]) for row in rows] == [
        (("0.png", "1.png"), (1, 0)),
        (("2.png", "1.png"), (0, 1)),
    ]
    summary = summary_of(tmp_path / "out")
    assert summary["pictures"] == 4 and summary["dropped"]["judged again"]["count"] == 1
    assert len(read_media_table(tmp_path / "out/pictures.jsonl")) == 3, "a picture in two pairs is scored once"
    assert summary["former"]["phi"] == summary["former"]["red"]
    assert summary["former"]["phi"]["share"] == pytest.approx(1 / 3) and summary["former"]["phi"]["n"] == 3


def test_pictures_inside_parquet(tmp_path: Path) -> None:
    """Pick-a-Pic as published keeps its pictures in the table: relabelled, shown to people, merged back from there."""
    shades = [(200, 10, 90), (50, 200, 70), (90, 90, 20)]
    data = []
    for colour in shades:
        write_image(tmp_path / "x.png", np.full((8, 8, 3), colour, np.uint8))
        data.append((tmp_path / "x.png").read_bytes())
    pair = [(0, 1, 1.0), (2, 0, 0.0)]
    columns = {"caption": ["p", "q"], "jpg_0": [data[a] for a, _, _ in pair], "jpg_1": [data[b] for _, b, _ in pair]}
    pq.write_table(pa.table({**columns, "label_0": [label for _, _, label in pair]}), tmp_path / "pick.parquet")
    relabel = {"table": tmp_path / "pick.parquet"}
    job = PreferConfig.model_validate(settings(tmp_path / "out", tmp_path, sources=[], relabel=relabel, route={}))
    rows = rows_of(prefer.run(job))
    assert [row.scores["red"] for row in rows] == [(200, 50), (90, 200)] and rows[0].media[0].row == 0
    file = tmp_path / "out/to_label.csv"
    file.write_text(file.read_text().replace(",,", ",A,"))
    merged = routing.merge(tmp_path / "out/preferences.jsonl", [file], tmp_path / "out/m.jsonl")
    assert merged.replaced == 2
    assert rows_of(tmp_path / "out/m.jsonl")[0].media[0].read() in data


@needs(IMAGE_REWARD)
def test_imagereward_goes_through(tmp_path: Path) -> None:
    """The published file, with plain pictures in place of its own."""
    entries = json.loads(IMAGE_REWARD.read_text())[:6]
    for entry in entries:
        for place, name in enumerate(entry["generations"]):
            shade = 250 - 20 * entry["ranking"][place]
            write_image(tmp_path / name, np.full((8, 8, 3), (shade, shade, 250 - shade), np.uint8))
    relabel = {"table": IMAGE_REWARD, "root": tmp_path}
    job = PreferConfig.model_validate(settings(tmp_path / "out", tmp_path, sources=[], relabel=relabel, limit=6))
    rows = rows_of(prefer.run(job))
    assert [len(row.media) for row in rows] == [len(entry["generations"]) for entry in entries]
    assert summary_of(tmp_path / "out")["former"]["phi"]["share"] == 1


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rewards": []}, "at least 1 item"),
        ({"rewards": [{**REWARDS[0], "weight": 0}]}, "none of them votes"),
        ({"rewards": [REWARDS[0], {**REWARDS[1], "column": "red"}]}, "'red' is given twice"),
        ({"rewards": [{**REWARDS[0], "column": "phi"}]}, "ensemble's own ranking"),
        ({"sources": []}, "exactly one of sources"),
        ({"prompts": "p.txt"}, "need each other"),
        ({"sources": [{"kind": "sample", "model": {"path": "m"}}]}, "need each other"),
        ({"sources": [{"kind": "table", "table": "t"}] * 2}, "both be called 't'"),
        ({"label": {"kind": "pairs", "by": "rde"}}, "one of phi, red, green, blue"),
        ({"label": {"kind": "pairs", "select": "margin"}}, "needs label.min_margin"),
        ({"label": {"kind": "pairs", "select": "all", "count": 2}}, "means nothing"),
        ({"label": {"kind": "pairs", "min_margin": 2}}, "phi, from 0 to 1, is never that far apart"),
        ({"rewards": [{**REWARDS[0], "weight": float("inf")}]}, "finite number"),
        ({"rewards": REWARDS[:1], "route": {}}, "one alone votes"),
        ({"rewards": REWARDS[:1], "filters": {"min_agreement": 0}}, "one alone votes"),
    ],
)
def test_the_schema_refuses(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(tmp_path / "out", tmp_path / "t.jsonl", **changes)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([{"name": "colour"}], "no evaluator 'colour'. Did you mean 'colours'"),
        ([{"name": "colours", "subscore": "rde"}], "no sub-score 'rde'. Did you mean 'red'"),
        ([{"name": "colours"}], "gives blue, green, red; choose one with `subscore`"),
        ([{"name": "whole"}], "scores whole sets"),
        ([{"name": "nothing"}], "scored none of the pictures.*nan"),
        ([{"name": "blueness"}, {"name": "blueness"}], "would be called 'blueness'"),
    ],
)
def test_rewards_that_cannot_vote(tmp_path: Path, source: Path, rewards: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prefer.run(config(tmp_path / "out", source, rewards=rewards))


def test_mistakes_are_heard_of_before_anything_is_written(tmp_path: Path, source: Path, model: Path) -> None:
    sources = [{"kind": "table", "table": source}, {"kind": "sample", "model": {"path": tmp_path / "none"}}]
    (tmp_path / "prompts.txt").write_text("p\n")
    once = {"kind": "sample", "model": {"path": model}, "per_prompt": 1}
    for changes in (
        {"sources": sources, "prompts": tmp_path / "prompts.txt"},
        {"sources": [once], "prompts": tmp_path / "prompts.txt"},
        {"rewards": [{"name": "colour"}]},
        {"scoring": {"device": "abacus"}},
    ):
        with pytest.raises(ValueError):
            prefer.run(config(tmp_path / "out", source, **changes))
    assert not (tmp_path / "out").exists()
    seeds = [{"prompt": "p", "seed": seed} for seed in (1, 2)]  # one prompt, two pictures
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, seeds)))
    prefer.check(config(tmp_path / "out", source, sources=[once], prompts=tmp_path / "prompts.jsonl"))


def test_two_checkpoints_or_columns_of_one_name_are_refused_before_anything_is_drawn(
    tmp_path: Path, source: Path
) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    two = [{"name": "shade", "params": {"checkpoint": tmp_path / name}, "column": name} for name in "ab"]
    with pytest.raises(ValueError, match=r"shade is asked for with two different checkpoints.*put the other under a"):
        prefer.run(config(tmp_path / "out", source, rewards=two))
    red = {"name": "colours", "subscore": "red"}
    for same in ([red, red], [{"name": "shade"}] * 2, [{"name": "shade", "column": "colours/red"}, red]):
        with pytest.raises(ValueError, match="give one reward a `column`"):
            prefer.run(config(tmp_path / "out", source, rewards=same))
    assert not (tmp_path / "out").exists()
    (tmp_path / "b").write_text("a")  # a copy is the same evaluator
    assert len(rows_of(prefer.run(config(tmp_path / "out", source, rewards=two)))) == 3


def test_one_picture_per_prompt(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no prompt has two pictures"):
        prefer.run(config(tmp_path / "out", table(tmp_path, {"a": [(1, 1, 1)], "b": [(1, 2, 1)]})))


# ------------------------------------------------------------------------------------------------ command line


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mmalign", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_verb(tmp_path: Path, source: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "x.yaml").write_text(json.dumps(settings(tmp_path / "out", source), default=str))
    route = ("--set", "route={count: 2}")
    assert call(monkeypatch, "prefer", tmp_path / "x.yaml", *route) == 0
    out = capsys.readouterr().out
    assert "Do the rewards agree?" in out and "1 pairs to label" in out and "preference table: " in out
    assert call(monkeypatch, "prefer", "run", tmp_path / "x.yaml", *route, "--set", "label.kind=pairs") == 2
    assert "add --replace" in capsys.readouterr().err
    pairs_of_all = ("--set", "label={kind: pairs, select: all}", "--replace")
    assert call(monkeypatch, "prefer", tmp_path / "x.yaml", *route, *pairs_of_all) == 0
    filled = answer(tmp_path, {**questions(tmp_path / "out")[0], "answer": "A", "user_id": "anna"})
    words = ("prefer", "merge", tmp_path / "out/preferences.jsonl", filled, "-o", tmp_path / "out/m.jsonl")
    assert call(monkeypatch, *words) == 0
    assert "1 answers of 1 people: 1 rows replaced" in capsys.readouterr().out
    assert call(monkeypatch, "prefer", tmp_path / "none.yaml") == 2
    assert "no such file" in capsys.readouterr().err


def test_config_check_knows_the_job(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "x.yaml").write_text("output: out\nrewards: [{name: hps, wieght: 2}]\nsources: [{kind: table}]\n")
    assert call(monkeypatch, "config", "check", tmp_path / "x.yaml") == 2
    said = capsys.readouterr().err
    assert "Did you mean 'weight'?" in said and "table is missing" in said
    assert call(monkeypatch, "config", "schema", "prefer") == 0
    assert "min_agreement" in capsys.readouterr().out


def test_every_pair_of_a_long_list_agrees_with_its_definition(tmp_path: Path) -> None:
    """The whole path once more, against loops: votes, strength and phi of seven pictures."""
    rng = np.random.default_rng(3)
    colours = [tuple(int(x) for x in rng.integers(1, 6, 3) * 40) for _ in range(7)]
    colours = list(dict.fromkeys(colours))
    source = table(tmp_path, {"p": colours})
    label = {"kind": "pairs", "select": "all", "weight": "strength"}
    rows = rows_of(prefer.run(config(tmp_path / "out", source, label=label)))
    values = np.array(colours, float) * [1, 1, -1]
    assert len(rows) == len(list(itertools.combinations(colours, 2)))
    for row, (i, j) in zip(rows, itertools.combinations(range(len(colours)), 2), strict=True):
        share = np.mean((1 + np.sign(values[i] - values[j])) / 2)
        ahead = np.sign(row.scores["phi"][0] - row.scores["phi"][1])
        assert row.weight == pytest.approx(0.5 + ahead * (share - 0.5))
