"""Descriptions and yes/no questions of the shapes world as a benchmark: its table, and what judges the answers."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmalign import score
from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import Batch, ItemErrors
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.media import read_image
from mmalign.media_table import read_media_table, write_media_table
from mmalign.shapes import benchmark
from mmalign.shapes.answers import scene_at
from mmalign.shapes.claims import judge, read_description, summary
from mmalign.shapes.descriptions import noisy_description
from mmalign.shapes.questions import FAMILIES
from mmalign.shapes.scene import Scene, Shape, render

SCENE = Scene((Shape("circle", "red", 16, 20, 9), Shape("square", "blue", 45, 40, 13)), "grey")


def judged(text: str, scene: Any) -> dict[str, float]:
    evaluator = load_evaluator("shapes_claims", device="cpu")
    scores = evaluator.score(Batch(responses=[text], aux=[{"scene": scene}]))
    assert isinstance(scores, dict)
    return {name: float(value) for name, value in scores.items()}


def test_a_description_by_hand() -> None:
    text = "There is a red circle. A blue square is to its left. There is a green triangle. The background is black."
    found = judged(text, benchmark.told(SCENE))
    assert found["mentions"] == 3
    assert found["hallucinated"] == 1
    assert found["right"] == pytest.approx(2 / 3)
    assert (found["shapes"], found["covered"], found["words"]) == (2, 2, 21)
    assert (found["object_claims"], found["object_errors"]) == (3, 1)
    assert (found["relation_claims"], found["relation_errors"]) == (1, 1)
    assert (found["background_claims"], found["background_errors"]) == (1, 1)
    assert judged("", benchmark.told(SCENE))["right"] == 1
    texts = {text: 0.0, "A red circle.\n": 0.0, "": 1.0, "I can see a small,,,,,": 1.0, "A red circle": 1.0}
    assert {each: judged(each, benchmark.told(SCENE))["unfinished"] for each in texts} == texts


def test_what_was_made_up_is_noted() -> None:
    texts = ["There is a blue circle. There is a green triangle. There is a triangle.", "There is a red circle.", ""]
    batch = Batch(responses=texts, aux=[{"scene": benchmark.told(SCENE)}] * 3)
    load_evaluator("shapes_claims", device="cpu").score(batch)
    assert batch.notes == {0: "not in the picture: blue circle, green triangle, triangle"}


def test_figures_are_those_of_the_world() -> None:
    scenes = [scene_at(5, index) for index in range(60)]
    texts = [noisy_description(scene, [5, index], 0.7).text for index, scene in enumerate(scenes)]
    rows: Any = [
        {"sample": str(i), "group": str(i), "scores": judged(text, benchmark.told(scene)), "aux": {}}
        for i, (text, scene) in enumerate(zip(texts, scenes, strict=True))
    ]
    expected = summary(judge(read_description(text), scene) for text, scene in zip(texts, scenes, strict=True))
    cls = evaluator_class("shapes_claims")
    found = cls.figures(cls.Params(), rows)
    assert found["chair_i"] and found["chair_i"] > 0.05
    for name in ("chair_i", "chair_s", "recall", "words", "mentions", "false_colour", "false_relation", "false_place"):
        assert found[name] == pytest.approx(expected[name], rel=1e-12)
    nothing: Any = [{"sample": "a", "group": "a", "scores": judged("Hello.", benchmark.told(SCENE)), "aux": {}}]
    empty = cls.figures(cls.Params(), nothing)
    assert empty["chair_i"] is None
    assert empty["recall"] == 0


@pytest.mark.parametrize(
    ("scene", "message"),
    [
        (None, r"aux.scene has to be \{background, shapes\}"),
        ({"background": "pink", "shapes": []}, "background is one of white, grey, black, not 'pink'"),
        ({"background": "grey", "shapes": [{"kind": "circle"}]}, "is no shape"),
        ({"background": "grey", "shapes": [asdict(Shape("star", "red", 1, 1, 9))]}, "is no shape of this world"),
        ({"background": "grey", "shapes": [asdict(Shape("circle", "red", math.nan, 1, 9))]}, "is no shape of this"),
    ],
)
def test_a_row_without_a_scene_costs_the_others_nothing(scene: Any, message: str) -> None:
    evaluator = load_evaluator("shapes_claims", device="cpu")
    batch = Batch(responses=["A red circle."] * 2, aux=[{"scene": scene}, {"scene": benchmark.told(SCENE)}])
    with pytest.raises(ItemErrors) as caught:
        evaluator.score(batch)
    assert list(caught.value.errors) == [0]
    with pytest.raises(ValueError, match=message):
        raise caught.value.errors[0]


def test_the_table(tmp_path: Path) -> None:
    table = benchmark.write(tmp_path, scenes=12, seed=9)
    rows = read_media_table(table)
    described = [row for row in rows if row.dimensions == ("shapes_claims",)]
    asked = [row for row in rows if row.dimensions == ("pope",)]
    assert len(described) == 12
    assert len(described) + len(asked) == len(rows)
    for index, row in enumerate(described):
        assert benchmark.scene_of(row.aux["scene"]) == scene_at(9, index)
        assert np.array_equal(read_image(row.media), render(scene_at(9, index)))
    for family in FAMILIES:
        labels = [row.aux["label"] for row in asked if row.aux["split"] == family]
        assert labels
        assert labels.count("yes") == labels.count("no")
    again = benchmark.write(tmp_path / "again", scenes=12, seed=9)
    assert again.read_bytes() == table.read_bytes()


def test_scored_with_its_own_evaluators(tmp_path: Path) -> None:
    rows = read_media_table(benchmark.write(tmp_path, scenes=6, seed=9, families=("random",)))
    answers = []
    for row in rows:
        told = "Yes." if row.aux.get("label") == "yes" else "No."
        if "scene" in row.aux:
            told = noisy_description(benchmark.scene_of(row.aux["scene"]), 3, 0.0).text
        answers.append(type(row)(**{**vars(row), "response": told}))
    write_media_table(tmp_path / "answers.jsonl", answers)
    config = ScoreConfig(
        table=tmp_path / "answers.jsonl", output=tmp_path / "scores",
        evaluators=(EvaluatorSpec(name="shapes_claims"), EvaluatorSpec(name="pope")),
    )  # fmt: skip
    found = json.loads((score.run(config) / "summary.json").read_text())["evaluators"]
    assert found["shapes_claims"]["figures"]["chair_i"]["value"] == 0
    assert found["shapes_claims"]["figures"]["recall"]["value"] == 1
    assert found["pope"]["figures"]["random/accuracy"]["value"] == 1
