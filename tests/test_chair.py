"""CHAIR: words, objects and figures, by hand; the faults of the original where they are asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hallucination_kit import summary
from public_kit import DATA, needs

from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import Batch, ItemErrors
from mmalign.hallucination import chair, words
from mmalign.hallucination.coco import Objects
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.score import run

SYNONYMS = DATA / "chair" / "synonyms.txt"
LINES = (
    "person, girl, boy, man, woman, kid, child\nbicycle, bike\nmotorcycle, scooter,  motor bike, motor cycle\n"
    "bus, minibus\ntraffic light, street light\ndog, puppy\nbear, panda\nwine glass\nchair, seat, stool\ntoilet\n"
    "tie, bow, bow tie\nskis, ski\nscissors\nknife, dagger\ncup, mug\noven, stovetop, stove, stove top oven\ntrain\n"
)


@pytest.fixture(name="synonyms")
def _synonyms(tmp_path: Path) -> Path:
    (tmp_path / "synonyms.txt").write_text(LINES)
    return tmp_path / "synonyms.txt"


def _found(text: str, synonyms: Path, mode: Any = "strict") -> list[str]:
    return [name for name, _ in words.mentions(text, words.read_synonyms(synonyms, mode), mode)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two buses and a minibus.", ["bus", "bus"]),
        ("The bus stops.", ["bus"]),
        ("Three men, women & children; a person's bike.", ["person", "person", "person", "person", "bicycle"]),
        ("Some people look at knives.", ["person", "knife"]),
        ("Skis, a ski, and scissors", ["skis", "skis", "scissors"]),
        ("Wine glasses beside a wine-glass", ["wine glass", "wine glass"]),
        ("Traffic lights; a street light", ["traffic light", "traffic light"]),
        ("A baby bear and an adult dog on a passenger train", ["bear", "dog", "train"]),
        ("A toilet seat and a seat", ["toilet", "chair"]),
        ("He wears a bow tie.", ["tie"]),
        ("a stove top oven", ["oven"]),
        ("a motor bike", ["motorcycle"]),
        ("Nothing at all", []),
        ("", []),
    ],
)
def test_what_a_person_would_find(text: str, expected: list[str], synonyms: Path) -> None:
    assert _found(text, synonyms) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a bus", []),  # its singular is "bu"
        ("two buses", ["bus"]),
        ("a motor bike", []),  # two spaces before it in the file
        ("a toilet and a seat", ["toilet"]),
        ("wine glasses", []),
        ("a wine glass", ["wine glass"]),
        ("a stove top oven", ["oven", "oven"]),  # three words are never one
    ],
)
def test_the_faults_of_the_original(text: str, expected: list[str], synonyms: Path) -> None:
    assert _found(text, synonyms, "compat") == expected


def test_there_are_as_many_double_words_as_published() -> None:
    assert len(set(words.DOUBLE)) == 27


@pytest.fixture(name="coco")
def _coco(tmp_path: Path) -> list[Path]:
    """Picture 1 has a dog and, by a caption, a man; picture 2 a bus; picture 3 two chairs."""
    instances = {
        "categories": [{"id": 18, "name": "dog"}, {"id": 6, "name": "bus"}, {"id": 62, "name": "chair"}],
        "annotations": [
            {"image_id": 1, "category_id": 18}, {"image_id": 2, "category_id": 6}, {"image_id": 3, "category_id": 62},
            {"image_id": 3, "category_id": 62},
        ],
    }  # fmt: skip
    captions = {
        "annotations": [{"image_id": 1, "caption": "A man with his dog."}, {"image_id": 2, "caption": "Traffic."}]
    }
    files = []
    for name, told in (("instances_val2014", instances), ("captions_val2014", captions)):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(told))
    return files


RESPONSES = {
    1: "A man and two dogs, a puppy, next to a bike.",  # person dog dog bicycle: one of four wrong
    2: "A bus. A bus! And a dog, and the dog's cup.",  # bus bus dog dog cup: three of five
    3: "Stools.",  # right
}


def test_counts_and_figures_by_hand(synonyms: Path, coco: list[Path]) -> None:
    objects = Objects(synonyms, coco)
    assert (objects.of(1), objects.of(2), objects.of(3)) == ({"person", "dog"}, {"bus"}, {"chair"})
    rows = [{"scores": chair.judged(text, objects.of(image), objects)[0]} for image, text in RESPONSES.items()]
    assert [(row["scores"]["hallucinated"], row["scores"]["mentions"]) for row in rows] == [(1, 4), (3, 5), (0, 1)]
    found = chair.figures(rows)
    assert found["chair_i"] == pytest.approx(4 / 10)
    assert found["chair_s"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(4 / 4)
    assert found["words"] == pytest.approx((11 + 11 + 1) / 3)
    silent = [{"scores": chair.judged("Nothing.", {"dog"}, objects)[0]}, rows[0]]
    assert chair.figures(silent)["chair_s"] == 0.5
    assert chair.figures(silent)["chair_s_mentioning"] == 1.0
    assert chair.figures(silent[:1]) == {
        "chair_i": None, "chair_s": 0.0, "chair_s_mentioning": None, "recall": 0.0, "words": 1.0
    }  # fmt: skip


def test_the_evaluator_reads_numbers_from_names_or_aux(synonyms: Path, coco: list[Path]) -> None:
    cls = evaluator_class("chair")
    params = {"synonyms": str(synonyms), "objects": [str(file) for file in coco]}
    evaluator: Any = load_evaluator("chair", params, device="cpu")
    batch = Batch(
        prompts=[""] * 3, responses=list(RESPONSES.values()), samples=["COCO_val2014_000000000001.jpg", "x", "3"],
        aux=[{}, {"image_id": 2}, {}],
    )  # fmt: skip
    scores = evaluator.score(batch)
    assert evaluator.score(batch)["right"].tolist() == scores["right"].tolist()
    assert scores["right"].tolist() == pytest.approx([3 / 4, 2 / 5, 1])
    assert batch.notes == {0: "not in the picture: bicycle", 1: "not in the picture: cup, dog (2)"}
    with pytest.raises(ItemErrors) as raised:
        evaluator.score(Batch(prompts=["", ""], responses=["a dog", "a dog"], samples=["7.jpg", "dog"], aux=[{}, {}]))
    assert "nothing of image 7" in str(raised.value.errors[0])
    assert "no number of COCO's" in str(raised.value.errors[1])
    with pytest.raises(ValueError, match=r"is not there; docs/scorers/chair.md"):
        cls.weight_files(cls.Params(**{**params, "objects": [synonyms.parent / "missing.json"]}))


def test_a_table_of_names_and_captions_is_enough(synonyms: Path, coco: list[Path], tmp_path: Path) -> None:
    """Nothing but samples and responses: the pictures' numbers are in their names."""
    lines = [{"sample": f"COCO_val2014_{image:012}.jpg", "response": text} for image, text in RESPONSES.items()]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, lines)))
    params = {"synonyms": synonyms, "objects": coco}
    specs = (EvaluatorSpec(name="chair", params=params),)
    run(ScoreConfig(table=tmp_path / "table.jsonl", output=tmp_path / "out", evaluators=specs, device="cpu"))
    entry = summary(tmp_path / "out")["chair[objects=2 files]"]
    assert (entry["n_ok"], entry["figures"]["chair_i"]["value"]) == (3, 4 / 10)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"annotations": []}, "has no annotations"),
        ({"annotations": [{"image_id": 1}]}, "has no category_id"),
        ({"annotations": [{"image_id": 1, "category_id": 9}], "categories": [{"id": 9, "name": "unicorn"}]}, "unicorn"),
    ],
)
def test_files_that_are_not_cocos(told: Any, message: str, synonyms: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=message):
        Objects(synonyms, [tmp_path / "bad.json"])


@needs(SYNONYMS)
def test_the_published_synonyms() -> None:
    strict, compat = (words.read_synonyms(SYNONYMS, mode) for mode in ("strict", "compat"))  # type: ignore[arg-type]
    assert len(set(strict.values())) == 80
    assert strict["motor bike"] == "motorcycle"
    assert "motor bike" not in compat
    assert strict["iphone"] == "cell phone"
    text = (
        "Two buses pass a man on a motor bike; traffic lights, three dogs, wine glasses and knives on dining tables. "
    )
    assert [name for name, _ in words.mentions(text, strict)] == [
        "bus", "person", "motorcycle", "traffic light", "dog", "wine glass", "knife", "dining table"
    ]  # fmt: skip
    started = time.perf_counter()
    for _ in range(200):
        words.mentions(text * 4, strict)
    print(f"{200 / (time.perf_counter() - started):.0f} captions of 80 words per second")
