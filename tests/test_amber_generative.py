"""AMBER's descriptions by hand, and on its own files where they are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from public_kit import DATA, needs

from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch, ItemErrors
from mmalign.hallucination.amber_captions import Things, Vectors, figures, judged
from mmalign.hallucination.files import json_rows

AMBER = DATA / "amber"
RELATION = {
    "tree": ["forest", "leave"],
    "person": ["man", "people"],
    "dog": [],
    "sea": ["water"],
    "light": [],
    "cat": [],
}


@pytest.fixture(name="files")
def _files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "relation.json").write_text(json.dumps(RELATION))
    (tmp_path / "safe_words.txt").write_text("light\nsign\n")
    return tmp_path / "relation.json", tmp_path / "safe_words.txt"


def test_counts_by_hand(files: tuple[Path, Path]) -> None:
    things = Things(*files)
    text = "Two men and a dog walk through the forest in the light. The dogs look at the water; a house stands there."
    found = judged(text, ["person", "tree", "cat"], ["dog", "sea", "light"], things)[0]
    # nouns: man dog forest light dog water; house is no word of AMBER's. Wrong: dog, dog, water.
    assert (found["nouns"], found["wrong"]) == (6, 3)
    assert (found["things"], found["named"]) == (3, 2)
    assert (found["targets"], found["expected"]) == (3, 3)
    other, _ = judged("A cat.", ["cat"], ["dog"], things)
    empty, _ = judged("", ["cat"], [], things)
    told = figures([{"scores": each} for each in (found, other, empty)])
    assert told["chair"] == pytest.approx(3 / 7)
    assert told["cover"] == pytest.approx(3 / 5)
    assert told["hal"] == pytest.approx(1 / 3)
    assert told["cog"] == pytest.approx(3 / 4)
    assert figures([{"scores": empty}])["chair"] is None


def test_nearness_and_taggers(files: tuple[Path, Path], tmp_path: Path) -> None:
    things = Things(*files)
    (tmp_path / "vectors.txt").write_text("dog 1 0\ncat 0.9 0.1\nsea 0 1\nother 5 5\n")
    vectors = Vectors.read(tmp_path / "vectors.txt", things.words)
    assert vectors.near("cat", ["dog"])
    assert not vectors.near("sea", ["dog"])
    assert not vectors.near("tree", ["dog"])
    assert judged("A cat by the sea.", ["dog"], [], things, vectors)[1] == ["sea"]
    tagged, _ = judged("A cat by the sea.", ["dog"], [], things, tagger=lambda text: ["sea"])
    assert (tagged["nouns"], tagged["wrong"]) == (1, 1)
    (tmp_path / "vectors.txt").write_text("dog 1 x\n")
    with pytest.raises(ValueError, match=r"vectors.txt:1: is no word with its numbers"):
        Vectors.read(tmp_path / "vectors.txt", things.words)


def test_the_evaluator(files: tuple[Path, Path]) -> None:
    params = {"relation": str(files[0]), "safe_words": str(files[1])}
    evaluator: Any = load_evaluator("amber_generative", params, device="cpu")
    aux: list[dict[str, Any]] = [{"truth": ["dog"], "hallu": []}, {}]
    with pytest.raises(ItemErrors, match="the row has no truth") as raised:
        evaluator.score(Batch(prompts=["", ""], responses=["A dog, a cat.", "x"], aux=aux))
    assert raised.value.scores["right"][0] == 0.5  # type: ignore[call-overload,index]
    with pytest.raises(ValueError, match="tagger: no_such_pipeline needs spaCy and that pipeline"):
        load_evaluator("amber_generative", {**params, "tagger": "no_such_pipeline"}, device="cpu")
    with pytest.raises(ValueError, match=r"is not AMBER's relation\.json"):
        Things(files[1].parent / _other(files[1].parent), files[1])


def _other(folder: Path) -> str:
    (folder / "other.json").write_text('{"a": 1}')
    return "other.json"


@needs(AMBER / "relation.json")
@needs(AMBER / "annotations.json")
def test_on_the_public_files() -> None:
    """Naming all that is there covers everything and is wrong nowhere; naming what is likely is as wrong as can be."""
    things = Things(AMBER / "relation.json", AMBER / "safe_words.txt")
    rows = [row for row in json_rows(AMBER / "annotations.json") if row["type"] == "generative"]
    assert len(rows) == 1004
    single = {name for name in things.words if name.isalpha()}  # AMBER too reads word by word
    known = [row for row in rows if {*row["truth"], *row["hallu"]} <= single]
    perfect = [{"scores": judged(". ".join(row["truth"]), row["truth"], row["hallu"], things)[0]} for row in known]
    likely = [{"scores": judged(". ".join(row["hallu"]), row["truth"], row["hallu"], things)[0]} for row in known]
    told, wrong = figures(perfect), figures(likely)
    assert (told["chair"], told["cover"], told["hal"]) == (0, 1, 0)
    assert wrong["cog"] == 1
    assert wrong["chair"] is not None
    assert wrong["chair"] > 0.8
