"""AMBER's score, which takes the figures of both of its evaluators: by hand, and resampled by picture."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hallucination_kit import json_lines, json_list, summary
from public_kit import AMBER_ANNOTATIONS, AMBER_QUERIES, DATA, needs

from mmalign.compare import compare
from mmalign.hallucination.amber import questions, score
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.results import read_results
from mmalign.score import run
from mmalign.score_figures import FILE

EXISTENCE, STATE = "discriminative-hallucination", "discriminative-attribute-state"

# A picture each: what is there, what is described, (type, due, answer) of its questions.
PICTURES = [
    (["dog"], "A dog and a cat.", [(EXISTENCE, "no", "No"), (STATE, "yes", "Yes")]),
    (["cat"], "A cat.", [(EXISTENCE, "no", "Yes"), (STATE, "no", "No")]),
    (["dog"], "Two dogs, a cat, a cat.", [(EXISTENCE, "no", "No"), (STATE, "yes", "No")]),
    (["cat"], "Nothing.", [(EXISTENCE, "no", "Perhaps")]),
]
NOUNS, WRONG = [2, 1, 3, 0], [1, 0, 2, 0]
SAID, DUE, BOTH = [1, 1, 2, 0], [1, 2, 1, 1], [1, 1, 1, 0]  # no is said, is due, both


def by_hand(places):
    """Of these pictures, one perhaps several times."""
    nouns, wrong, said, due, both = (sum(each[p] for p in places) for each in (NOUNS, WRONG, SAID, DUE, BOTH))
    return None if not nouns else (100 - 100 * wrong / nouns + 100 * 2 * both / (said + due)) / 2


@pytest.fixture(name="files")
def _files(tmp_path):
    """Queries, annotations and answers in AMBER's layouts, and its word lists."""
    queries, notes, told = [], [], []
    for place, (truth, description, asked) in enumerate(PICTURES, 1):
        for kind, due, answer in (("generative", truth, description), *asked):
            name = len(queries) + 1
            queries.append({"id": name, "image": f"AMBER_{place}.jpg", "query": "?"})
            notes.append({"id": name, "type": kind, "truth": due, "hallu": []})
            told.append({"id": name, "response": answer})
    (tmp_path / "relation.json").write_text(json.dumps({"dog": [], "cat": []}))
    (tmp_path / "safe_words.txt").write_text("light\n")
    json_list(tmp_path / "q.json", queries)
    json_list(tmp_path / "n.json", notes)
    return json_list(tmp_path / "r.json", told).parent


def config(home, output, responses="r.json", parsers=("exact",)):
    lists = {"relation": str(home / "relation.json"), "safe_words": str(home / "safe_words.txt")}
    specs = [EvaluatorSpec(name="amber_generative", params=lists)]
    specs += [EvaluatorSpec(name="amber_discriminative", params={"parser": parser}) for parser in parsers]
    benchmark = {
        "kind": "amber", "questions": home / "q.json", "annotations": home / "n.json", "responses": home / responses,
    }  # fmt: skip
    return ScoreConfig(benchmark=benchmark, output=home / output, evaluators=tuple(specs), device="cpu")


def test_the_score_is_half_of_what_is_not_made_up_and_f1(files):
    entry = summary(run(config(files, "out")))
    found = entry["amber_generative"]["figures"]
    # CHAIR 3 of 6; F1 of no: said 4, due 5, both 3
    assert found["chair"]["value"] == 0.5
    assert entry["amber_discriminative"]["figures"]["f1"]["value"] == pytest.approx(6 / 9)
    assert found["amber_score"]["value"] == pytest.approx((100 - 50 + 100 * 6 / 9) / 2) == by_hand(range(4))
    assert found["amber_score"]["n"] == 11 and "amber_score" not in entry["amber_discriminative"]["figures"]
    low, high = found["amber_score"]["ci95"]
    assert low < found["amber_score"]["value"] < high


def test_a_picture_is_drawn_with_its_description_and_its_questions(files):
    folder = run(config(files, "out"))
    (row,) = [row for row in pq.read_table(folder / FILE).to_pylist() if row["figure"] == "amber_score"]
    generator = np.random.default_rng(0)
    due = [by_hand(generator.integers(0, 4, 4)) for _ in row["resampled"]]
    assert [None if np.isnan(value) else pytest.approx(value) for value in row["resampled"]] == due
    told = json.loads((files / "r.json").read_text())
    json_list(files / "other.json", [each | ({"response": "No"} if each["id"] in (5, 11) else {}) for each in told])
    other = run(config(files, "other", "other.json"))
    (compared,) = [one for one in compare(read_results(folder), read_results(other)).figures if "score" in one.figure]
    assert compared.same_items and 0 <= compared.difference.low < compared.difference.mean


def test_tables_of_two_runs_make_one_score(files):
    """As a model leaves them that describes in one run and answers in another."""
    told = json.loads((files / "r.json").read_text())
    for name, described in (("a.jsonl", True), ("b.jsonl", False)):
        rows = [one for one in told if (one["id"] in (1, 4, 7, 10)) == described]
        json_lines(files / name, [{"sample": str(one["id"]), "response": one["response"]} for one in rows])
    whole = config(files, "out")
    block = whole.benchmark.model_copy(update={"responses": (files / "a.jsonl", files / "b.jsonl")})
    found = summary(run(whole.model_copy(update={"benchmark": block})))["amber_generative"]["figures"]
    assert found["amber_score"]["value"] == pytest.approx(by_hand(range(4))) and found["amber_score"]["n"] == 11


def test_two_parsers_are_two_scores_and_one_evaluator_is_none(files):
    found = summary(run(config(files, "both", parsers=("exact", "vlmevalkit"))))["amber_generative"]["figures"]
    assert [name for name in found if "score" in name] == [
        "amber_score (amber_discriminative)", "amber_score (amber_discriminative[parser=vlmevalkit])",
    ]  # fmt: skip
    assert "amber_score" not in summary(run(config(files, "one", parsers=())))["amber_generative"]["figures"]


def test_what_is_not_defined_is_none():
    described = {"scores": {"nouns": 2.0, "wrong": 1.0, "things": 1.0, "named": 1.0, "targets": 0.0, "expected": 0.0,
                            "words": 3.0}}  # fmt: skip
    silent = {"scores": described["scores"] | {"nouns": 0.0, "wrong": 0.0}}
    asked = {"scores": {"yes": 0.0, "unknown": 0.0, "due": 0.0, "words": 1.0}}
    assert score([described, asked]) == 75
    assert score([described]) is score([asked]) is score([]) is score([silent, asked]) is None
    never_no = {"scores": asked["scores"] | {"due": 1.0, "yes": 1.0}}
    assert score([described, never_no]) is None


@needs(AMBER_QUERIES, AMBER_ANNOTATIONS, DATA / "amber" / "relation.json", DATA / "amber" / "safe_words.txt")
def test_perfect_answers_to_the_public_files_have_a_hundred(tmp_path):
    asked = questions(AMBER_QUERIES, None, AMBER_ANNOTATIONS)
    kept = {row.group for row in asked[:40]}
    rows = [row for row in asked if row.group in kept]
    told = [
        {
            "id": row.aux["id"],
            "response": ". ".join(row.aux["truth"]) if "truth" in row.aux else row.aux["label"].title(),
        }
        for row in rows
    ]
    saved = json_list(tmp_path / "r.json", told)
    amber = DATA / "amber"
    lists = {"relation": str(amber / "relation.json"), "safe_words": str(amber / "safe_words.txt")}
    benchmark = {
        "kind": "amber", "questions": AMBER_QUERIES, "annotations": AMBER_ANNOTATIONS, "responses": saved,
    }  # fmt: skip
    specs = EvaluatorSpec(name="amber_generative", params=lists), EvaluatorSpec(name="amber_discriminative")
    found = summary(run(ScoreConfig(benchmark=benchmark, output=tmp_path / "out", evaluators=specs, device="cpu")))
    figure = found["amber_generative"]["figures"]["amber_score"]
    assert figure["value"] == 100 and figure["n"] == len(rows)
