"""The contract for answers: rows without pixels or media, and figures that are no means over items."""

import json

import numpy as np
import pytest

from mmalign import score_decode
from mmalign.compare import compare
from mmalign.discovery import evaluator_class
from mmalign.evaluation import Batch, Evaluator, check_class
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.media import write_image
from mmalign.report import build
from mmalign.results import read_results
from mmalign.score import run
from mmalign.score_figures import FILE, resamples
from mmalign.score_summary import account
from mmalign.tables import MediaRow, read_media_table, write_media_table
from mmalign.testing import check_evaluator

pytestmark = pytest.mark.usefixtures("plugins")

ANSWERS = [("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"), ("yes", "yes"), ("no", "no")]


def answers(folder, pairs=ANSWERS, name="table.jsonl", **columns):
    """A table of (label, response), two rows to an image that is not there; the last row has none."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, (label, response) in enumerate(pairs):
        row = {"sample": f"q{index:03}", "prompt": "Is it?", "label": label, "response": response}
        if index + 1 < len(pairs):
            row["media"] = f"absent-{index // 2}.jpg"
        lines.append(json.dumps(row | {key: column[index] for key, column in columns.items()}))
    (folder / name).write_text("\n".join(lines))
    return folder / name


def config(table, output, *evaluators, **settings):
    specs = tuple(EvaluatorSpec(name=name) for name in evaluators or ("agreement",))
    return ScoreConfig(table=table, output=output, evaluators=specs, device="cpu", **settings)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())["evaluators"]


# ------------------------------------------------------------------------------------------------ rows of answers


def test_answers_are_scored_without_looking_at_media(tmp_path, monkeypatch):
    monkeypatch.setattr(score_decode._Process, "__init__", lambda self: pytest.fail("nothing is to be decoded"))
    folder = run(config(answers(tmp_path), tmp_path / "out"))
    rows = {row["sample"]: row for row in read_results(folder).rows if row["subscore"] == "right"}
    assert [rows[f"q{index:03}"]["score"] for index in range(6)] == [1, 0, 1, 0, 1, 1]
    assert {row["status"] for row in rows.values()} == {"ok"} and {row["decoder"] for row in rows.values()} == {""}
    assert rows["q005"]["modality"] == "text" and rows["q005"]["media"] == ""
    assert rows["q000"]["modality"] == "image" and rows["q000"]["media_hash"] is None


def test_only_a_changed_response_is_scored_again(tmp_path):
    def computed():
        run(config(tmp_path / "table.jsonl", tmp_path / "out"))
        return json.loads((tmp_path / "out" / "run.json").read_text())["computed"]

    answers(tmp_path)
    assert computed() == 6 and computed() == 0
    answers(tmp_path, [*ANSWERS[:-1], ("no", "")])
    assert computed() == 1, "an empty answer is an answer"
    write_image(tmp_path / "absent-0.jpg", np.zeros((8, 8, 3), np.uint8))
    assert computed() == 0, "the media have no part in it"


def test_pixels_and_answers_in_one_run(tmp_path):
    table = answers(tmp_path)
    for number in range(2):
        write_image(tmp_path / f"absent-{number}.jpg", np.full((8, 8, 3), 51, np.uint8))
    folder = run(config(table, tmp_path / "out", "agreement", "brightness"))
    entries = summary(folder)
    assert entries["agreement"]["n_ok"] == 6, "also of the row whose picture is missing"
    bright = entries["brightness"]
    assert (bright["n_ok"], bright["n_error"], bright["n_skipped"]) == (4, 1, 1)
    assert "brightness scores images and videos; this is a row without media" in bright["reasons"]


def test_a_table_without_responses_is_said(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    (tmp_path / "t.jsonl").write_text(json.dumps({"media": "a.png", "label": "yes"}))
    with pytest.raises(ValueError, match=r"agreement needs the column response; .* has sample, media, modality, aux"):
        run(config(tmp_path / "t.jsonl", tmp_path / "out"))
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "Is it?", "label": "yes"}))
    with pytest.raises(ValueError, match="media"):
        run(config(tmp_path / "t.jsonl", tmp_path / "out"))


def test_tables_hold_answers_and_further_images(tmp_path):
    rows = [
        MediaRow("a", "which?", str(tmp_path / "1.png"), images=(str(tmp_path / "2.png"), "/far/3.png"), response=""),
        MediaRow("b", "how?", "", "text", response="so\n"),
    ]
    for suffix in ("jsonl", "parquet"):
        write_media_table(tmp_path / f"t.{suffix}", rows)
        assert read_media_table(tmp_path / f"t.{suffix}") == rows
    assert '"images": ["2.png", "/far/3.png"]' in (tmp_path / "t.jsonl").read_text()
    for wrong, said in (
        ({"images": "x.png", "media": "a.png"}, "images is 'x.png', not a list of paths"),
        ({"images": ["x.png"]}, "put the first into media"),
        ({"modality": "image"}, "it is text, since the row has no media"),
        ({"response": 3}, "response is 3, not str"),
    ):
        (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": "p", "response": "r", **wrong}))
        with pytest.raises(ValueError, match=said):
            read_media_table(tmp_path / "bad.jsonl")


# ------------------------------------------------------------------------------------------------ figures


def test_figures_stand_in_the_summary_and_are_told(tmp_path):
    folder = run(config(answers(tmp_path), tmp_path / "out"))
    entry = summary(folder)["agreement"]
    # yes said 3 times of 6; of these 2 are right; of the 3 that are yes 2 are found
    assert entry["figures"]["yes_ratio"]["value"] == 0.5
    assert entry["figures"]["precision"]["value"] == pytest.approx(2 / 3)
    assert entry["figures_of"] == {"n": 6, "clusters": 4, "resamples": 2000}
    told = account({"evaluators": {"agreement": entry}})
    assert told[0] == "agreement: 6 of 6 scored (100 %)" and told[1].startswith("  yes_ratio 0.5000 [")
    assert (folder / FILE).exists()
    page = build([folder], tmp_path / "report.html").read_text()
    assert 'data-figure="agreement: yes_ratio"' in page and "a row without media" in page


def test_intervals_are_those_of_a_ratio_over_clusters(tmp_path):
    pairs = [("yes", "yes" if (index // 4) % 3 else "no") for index in range(240)]
    groups = [f"image {index // 4}" for index in range(240)]
    entry = summary(run(config(answers(tmp_path, pairs, group=groups), tmp_path / "out")))["agreement"]
    low, high = entry["figures"]["yes_ratio"]["ci95"]
    # 60 clusters whose share is 0 or 1: the spread is that of 60 draws, not of 240
    assert entry["figures_of"]["clusters"] == 60
    assert (high - low) / 2 == pytest.approx(2.0 * np.sqrt(2 / 3 * 1 / 3 / 60), rel=0.1)


def test_figures_depend_on_neither_order_nor_processes_nor_batch(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [tuple(rng.choice(["yes", "no"], 2)) for _ in range(40)]
    groups = [f"g{index % 7}" for index in range(40)]
    table = answers(tmp_path, pairs, group=groups)
    lines = table.read_text().splitlines()
    shuffled = tmp_path / "other.jsonl"
    shuffled.write_text("\n".join(lines[index] for index in rng.permutation(40)))
    found = [
        summary(run(config(place, tmp_path / f"out{number}", **settings)))["agreement"]["figures"]
        for number, (place, settings) in enumerate(
            [(table, {}), (table, {"batch_size": 3, "processes": 2}), (shuffled, {"batch_size": 7})]
        )
    ]
    assert found[0] == found[1] == found[2]


def test_what_is_undefined_is_none_and_coverage_stays(tmp_path):
    table = answers(tmp_path, [("no", "no"), ("no", "no"), ("yes", "?"), ("no", "no"), ("no", "no")])
    folder = run(config(table, tmp_path / "out"))
    entry = summary(folder)["agreement"]
    assert (entry["n_ok"], entry["n_error"], entry["coverage"]) == (4, 1, 0.8)
    assert entry["figures"]["precision"] == {"value": None, "ci95": None}
    assert entry["figures"]["yes_ratio"]["value"] == 0
    lines = account({"evaluators": {"agreement": entry}})
    assert lines[0] == "agreement: 4 of 5 scored (80 %), 1 failed" and "no answer in '?'" in lines[1]


def test_models_have_figures_of_their_own(tmp_path):
    models = ["base", "base", "base", "tuned", "tuned", "tuned"]
    entry = summary(run(config(answers(tmp_path, model=models), tmp_path / "out")))["agreement"]
    assert entry["figures_by_model"]["base"]["yes_ratio"]["value"] == pytest.approx(1 / 3)
    assert entry["figures_by_model"]["tuned"]["yes_ratio"]["value"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ([0.5], "TypeError: agreement.figures returned list"),
        ({"f1": "high"}, "'high' for 'f1'; it has to be a number"),
        ({"f1": float("nan")}, "what is undefined is None"),
    ],
)
def test_figures_that_fail_lose_no_scores(tmp_path, monkeypatch, returned, said):
    monkeypatch.setattr(evaluator_class("agreement"), "figures", classmethod(lambda cls, params, rows: returned))
    folder = run(config(answers(tmp_path), tmp_path / "out"))
    entry = summary(folder)["agreement"]
    assert entry["n_ok"] == 6 and said in entry["figures_problem"] and not (folder / FILE).exists()
    assert any("no figures, since computing them failed" in line for line in account({"evaluators": {"a": entry}}))


def test_many_items_are_resampled_less_often():
    assert [resamples(number) for number in (1, 2000, 4000, 10**6)] == [2000, 2000, 1000, 200]


# ------------------------------------------------------------------------------------------------ the contract


def test_check_evaluator_takes_answers():
    aux = [{"label": label} for label, _ in ANSWERS]
    check_evaluator("agreement", aux=aux, responses=[response for _, response in ANSWERS])


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ({"needs": {"response", "reference"}}, "needs 'reference', so also 'image' or 'frames'"),
        ({"needs": set()}, "needs nothing of an item"),
        ({"needs": {"frames"}, "modality": {"text"}}, "rows of modality 'text' have none"),
        ({"needs": {"answer"}}, "needs \\['answer'\\]"),
    ],
)
def test_declarations_without_pixels_are_checked(declared, said):
    plain = {"needs": {"response"}, "modality": {"text"}, "licence": "x", "source": "x"}
    score = {"score": lambda self, batch: None}
    assert check_class(type("Mine", (Evaluator,), plain | score), "here")
    with pytest.raises(TypeError, match=said):
        check_class(type("Mine", (Evaluator,), plain | score | declared), "here")


def test_a_batch_of_answers_has_a_length():
    batch = Batch(responses=["a", "b", "c"], aux=[{"x": 1}, {"x": 2}, {"x": 3}])
    assert len(batch) == 3 and batch.take([2, 0]).responses == ["c", "a"] and batch.take([2, 0]).aux[0] == {"x": 3}


# ------------------------------------------------------------------------------------------------ two folders


def test_figures_of_the_same_items_are_compared_in_pairs(tmp_path):
    rng = np.random.default_rng(1)
    labels = [str(each) for each in rng.choice(["yes", "no"], 200)]
    base = [(label, str(rng.choice(["yes", "no"]))) for label in labels]
    other = [(label, label if number % 10 == 0 else said) for number, (label, said) in enumerate(base)]
    for name, pairs in (("a", base), ("b", other), ("c", other[:150])):
        groups = [f"image {index // 4}" for index in range(len(pairs))]
        run(config(answers(tmp_path / name, pairs, group=groups), tmp_path / name / "out"))
    found = compare(tmp_path / "a" / "out", tmp_path / "b" / "out", names=("a", "b"))
    precision = {each.figure: each for each in found.figures}["precision"]
    assert precision.same_items and precision.difference.mean == precision.value_b - precision.value_a
    alone = [summary(tmp_path / name / "out")["agreement"]["figures"]["precision"]["ci95"] for name in "ab"]
    apart = np.hypot(*(high - low for low, high in alone))
    assert 0 < precision.difference.high - precision.difference.low < 0.8 * apart, "pairs share their items' spread"
    assert found.to_json()["figures"][0]["difference"]["mean"] is not None
    assert "agreement: precision" in [row for row in found.table().columns[0]._cells][-1].plain

    page = build([tmp_path / "a" / "out", tmp_path / "b" / "out"], tmp_path / "report.html", comparison=found)
    assert page.read_text().count('data-figure="agreement: precision"') == 2

    fewer = compare(tmp_path / "a" / "out", tmp_path / "c" / "out", names=("a", "c"))
    assert np.isnan(fewer.figures[0].difference.low) and not fewer.figures[0].same_items
    assert any("figures of agreement are of different items" in remark for remark in fewer.remarks())
