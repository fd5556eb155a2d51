"""Texts about scenes: what they claim, and whether it is true. Every property holds over thousands of random scenes."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from mmalign.shapes.answers import preference_row, scene_at, training_row
from mmalign.shapes.captions import KINDS
from mmalign.shapes.claims import CATEGORIES, Claims, Mention, judge, read_description, summary
from mmalign.shapes.descriptions import LENGTHS, WORDS, beliefs_of, describe, noisy_description, places_of, write
from mmalign.shapes.scene import Scene, Shape
from mmalign.shapes.twins import ERRORS, EXTRA, corrupt
from mmalign.shapes.typical import COMPANIONS, FAVOURITES, temptations, typical_scene

RED = Shape("circle", "red", 16, 16, 13)
BLUE = Shape("cross", "blue", 48, 18, 9)
TWO = Scene((RED, BLUE), "grey")


@cache
def drawn() -> list[Scene]:
    rng = np.random.default_rng(1)
    return [typical_scene(rng) for _ in range(3000)]


def scenes(count: int, skip: int = 0) -> list[Scene]:
    return drawn()[skip : skip + count]


def verdict(text: str, scene: Scene = TWO):
    return judge(read_description(text), scene)


def errors(text: str, scene: Scene = TWO) -> dict[str, int]:
    return {name: count for name, count in verdict(text, scene).errors.items() if count}


# --- descriptions ---


def test_true_descriptions_are_read_in_full_and_are_true():
    words: set[str] = set()
    for i, scene in enumerate(scenes(3000)):
        text = describe(scene, [2, i])
        claims = read_description(text.text)
        found = judge(claims, scene)
        assert found.false == 0 and found.hallucinated == 0, text.text
        assert found.covered == found.shapes == found.mentions, text.text
        said = {name: {s.about for s in text.slots if s.category == name} for name in (*CATEGORIES, "kind")}
        assert found.claims["size"] == len(said["size"]), text.text
        assert found.claims["place"] == len(said["place"]), text.text
        assert found.claims["relation"] == len({frozenset(about) for about in said["relation"]}), text.text
        assert found.claims["background"] == len(said["background"]) and found.claims["count"] == len(said["count"])
        assert LENGTHS[0] <= found.words <= LENGTHS[1]
        words |= set(text.text.lower().replace(".", "").split())
    assert words <= {word.lower() for word in WORDS} and len(WORDS) <= 150


def test_slots_are_the_words_that_claim():
    for i, scene in enumerate(scenes(300)):
        written = describe(scene, i)
        for slot in written.slots:
            text = written.text[slot.start : slot.end].lower()
            if slot.category in ("kind", "colour", "size"):
                assert text == getattr(beliefs_of(scene).things[slot.about[0]], slot.category)
            elif slot.category == "background":
                assert text == scene.background
            elif slot.category == "place":
                assert set(text.replace("middle", "centre").split()) & {"left", "right", "top", "bottom", "centre"}
        spans = [(slot.start, slot.end) for slot in written.slots]
        assert spans == sorted(spans) and all(a[1] <= b[0] for a, b in pairwise(spans))
        assert [written.text[end - 1] for _, end, _ in written.sentences] == ["."] * len(written.sentences)


def test_the_same_seed_writes_the_same_text_and_other_seeds_others():
    assert describe(TWO, 5) == describe(TWO, 5)
    assert len({describe(TWO, seed).text for seed in range(200)}) > 150


@pytest.mark.parametrize("shapes", [(), (RED, BLUE) * 2])
def test_only_one_to_three_shapes_are_described(shapes):
    with pytest.raises(ValueError, match="one to three shapes, not"):
        describe(Scene(shapes, "white"), 0)


def test_close_calls_are_not_said():
    scene = Scene((Shape("circle", "red", 32 - 7.5, 32 + 7.5, 11),), "white")
    thing = beliefs_of(scene).things[0]
    assert thing.size is None and thing.place is None
    assert {slot.category for seed in range(100) for slot in describe(scene, seed).slots} == {
        "kind", "colour", "background", "count",
    }  # fmt: skip


def test_places():
    assert places_of(RED) == {"left", "top", "top left"}
    assert places_of(Shape("circle", "red", 32, 40, 9)) == {"bottom"}
    assert places_of(Shape("circle", "red", 38, 26, 9)) == {"centre"}


def test_careless_writers_err_where_habit_tempts_them_and_nowhere_else():
    rates: Counter[str] = Counter()
    for i, scene in enumerate(scenes(3000)):
        found = judge(read_description(noisy_description(scene, [7, i], 1.0).text), scene)
        tempted = temptations(scene)
        wrong = {name for name, count in found.errors.items() if count}
        assert bool(found.hallucinated) == any(name != "relation" for name in tempted)
        assert found.errors["object"] == ("companion" in tempted)
        assert found.errors["colour"] == sum(name.startswith("colour") for name in tempted)
        assert wrong <= {"object", "colour", "count", "relation"}
        rates.update(wrong)
        assert judge(read_description(noisy_description(scene, [7, i], 0.0).text), scene).false == 0
    assert min(rates[name] for name in ("object", "colour", "relation")) > 40


def test_typical_scenes_have_habits():
    shapes = [shape for scene in drawn() for shape in scene.shapes]
    kinds = Counter(shape.kind for shape in shapes)
    assert set(kinds) == set(KINDS) and kinds["circle"] > 1.5 * kinds["triangle"]
    for kind, colour in FAVOURITES.items():
        assert np.mean([shape.colour == colour for shape in shapes if shape.kind == kind]) > 0.4
    several = [{shape.kind for shape in scene.shapes} for scene in drawn() if len(scene.shapes) == 3]
    with_triangle = [kinds for kinds in several if "triangle" in kinds]
    without = [kinds for kinds in several if "triangle" not in kinds]
    beside = [np.mean([COMPANIONS["triangle"] in kinds for kinds in group]) for group in (with_triangle, without)]
    assert beside[0] > beside[1] + 0.3


# --- reading ---


def test_pronouns_and_repetitions_are_no_mentions():
    claims = read_description(
        "There is a red circle. The red circle is large. It is on the left. A red circle. It is red."
    )
    assert claims.mentions == (Mention("circle", "red", "large", "left"),)
    assert claims.words == 21


@pytest.mark.parametrize(
    ("text", "relations"),
    [
        ("A red circle is left of a blue cross.", ((0, "left of", 1),)),
        ("To the left of the red circle is a blue cross.", ((1, "left of", 0),)),
        ("There is a red circle. To its right there is a blue cross.", ((1, "right of", 0),)),
        ("There is a red circle. A blue cross is to its right.", ((1, "right of", 0),)),
        ("There is a red circle. Below it is a blue cross.", ((1, "below", 0),)),
        ("A red circle. A green cross. Above the green cross there is a square. It is below the circle.",
         ((2, "above", 1), (2, "below", 0))),
        ("A red circle is above the red circle.", ()),
        ("A red circle is above.", ()),
        ("To its left is a red circle.", ()),
        ("A red circle is below a blue cross. The red circle is below the blue cross.", ((0, "below", 1),)),
    ],
)  # fmt: skip
def test_relations_stand_between_what_is_named(text, relations):
    assert read_description(text).relations == relations


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("a circle. the circle is red.", [Mention("circle", "red")]),
        ("a red circle and another red circle", [Mention("circle", "red")] * 2),
        ("two red circles", [Mention("circle", "red")] * 2),
        ("a small red circle and a large red circle", [Mention("circle", "red", s) for s in ("small", "large")]),
        ("a red circle. the circle is blue.", [Mention("circle", "red", more=(("colour", "blue"),))]),
        ("in the top left there is a large cross", [Mention("cross", None, "large", "top left")]),
        ("a cross in the upper right corner", [Mention("cross", place="top right")]),
        ("a white square on a black background", []),
        ("a the is red red of circle circle", [Mention("circle")]),
        ("", []),
    ],
)
def test_mentions_of_odd_texts(text, mentions):
    assert list(read_description(text).mentions) == mentions


def test_backgrounds_and_counts_are_read():
    claims = read_description("There are two shapes in the picture. The background is plain grey.")
    assert claims == Claims((), (), ("grey",), (2,), 12)


@pytest.mark.parametrize("seed", range(3))
def test_no_text_is_refused(seed):
    rng = np.random.default_rng(seed)
    words = [*sorted(WORDS), ".", ",", "its", "two", "zebra", "?"]
    for scene in scenes(1000, 1000 * seed):
        found = verdict(" ".join(rng.choice(words, size=int(rng.integers(60)))), scene)
        assert 0 <= found.hallucinated <= found.mentions and 0 <= found.covered <= found.shapes
        assert all(0 <= found.errors[name] <= found.claims[name] for name in CATEGORIES)


# --- judging ---


def test_five_objects_where_two_are_have_three_hallucinated():
    text = "There is a red circle. I can see a blue cross, a green square, a yellow triangle and a purple square."
    found = verdict(text)
    assert (found.mentions, found.hallucinated, found.covered) == (5, 3, 2)
    assert errors(text) == {"object": 3}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("A large red circle is in the top left. A small blue cross is to its right.", {}),
        ("A blue circle.", {"colour": 1}),
        ("A small red circle.", {"size": 1}),
        ("A red circle on the right.", {"place": 1}),
        ("A red circle is right of a blue cross.", {"relation": 1}),
        ("A red circle is right of a blue square.", {"object": 1}),
        ("A green circle is right of a blue cross.", {"colour": 1, "relation": 1}),
        ("The background is white.", {"background": 1}),
        ("There are three shapes.", {"count": 1}),
        ("A red circle. Another red circle.", {"object": 1}),
        ("A small yellow square in the bottom right.", {"object": 1}),
    ],
)
def test_each_error_is_counted_as_what_it_is(text, wrong):
    assert errors(text) == wrong


def test_mentions_are_matched_with_distinct_shapes_in_the_best_order():
    scene = Scene((RED, Shape("circle", "blue", 48, 48, 9)), "white")
    assert verdict("A circle and a red circle.", scene).matched == (1, 0)
    assert verdict("A green circle and a red circle.", scene).errors["colour"] == 1
    assert verdict("A green circle, a red circle and a yellow circle.", scene).errors["object"] == 1


def test_places_and_sizes_have_room_at_their_limits():
    edge = Scene((Shape("circle", "red", 32 - 6.5, 32, 10.4),), "white")
    assert errors("A small red circle is on the left.", edge) == {}
    assert errors("A small red circle is in the centre.", edge) == {}
    assert errors("A large red circle is on the right.", edge) == {"size": 1, "place": 1}


def test_summary_over_texts():
    figures = summary([verdict("A red circle."), verdict("A red circle. A green square. A blue cross.")])
    assert figures["chair_i"] == 1 / 4 and figures["chair_s"] == 1 / 2 and figures["recall"] == 3 / 4
    assert figures["words"] == 6 and figures["mentions"] == 2
    assert figures["false_object"] == 1 / 4 and np.isnan(figures["false_count"])
    assert np.isnan(summary([verdict("Nothing.")])["chair_i"])


# --- twins ---


@pytest.mark.parametrize("count", [1, 2, 3])
def test_twins_have_exactly_so_many_errors_of_the_kinds_that_they_name(count):
    for i, scene in enumerate(scenes(700, 1000)):
        twins = corrupt(scene, [10, i], count)
        true, false = verdict(twins.chosen, scene), verdict(twins.rejected, scene)
        assert true.false == 0 and true.covered == true.shapes
        wanted = Counter("object" if name == EXTRA else name for name in twins.errors)
        assert +Counter(false.errors) == wanted and sum(wanted.values()) == count, twins
        assert abs(false.words - true.words) <= 8
        hallucinated = wanted["object"] + wanted["colour"]
        assert false.hallucinated == hallucinated


def cut(text: str, spans: tuple[tuple[int, int], ...]) -> list[str]:
    """What stands between the spans."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    return [text[a:b] for a, b in zip(ends, starts, strict=True)]


@pytest.mark.parametrize("kind", ERRORS)
def test_spans_hold_all_that_differs(kind):
    found = 0
    for i, scene in enumerate(scenes(150)):
        try:
            twins = corrupt(scene, i, 1, [kind])
        except ValueError:
            continue  # one shape has no relation, a shape between two places no place
        found += 1
        assert twins.errors == (kind,)
        assert cut(twins.chosen, twins.chosen_spans) == cut(twins.rejected, twins.rejected_spans)
        assert len(twins.chosen_spans) == len(twins.rejected_spans) >= 1
    assert found > 90


def test_what_cannot_be_corrupted_is_an_error():
    with pytest.raises(ValueError, match="no kind of error is called colours; there are: object, colour"):
        corrupt(TWO, 0, 1, ["colours"])
    with pytest.raises(ValueError, match="no description of this scene with 2 false claims among background"):
        corrupt(TWO, 0, 2, ["background"])


def test_the_same_seed_writes_other_beliefs_in_the_same_sentences():
    a, b = (write(beliefs_of(scene), 3) for scene in (TWO, Scene((BLUE, RED), "white")))
    assert [slot.category for slot in a.slots] == [slot.category for slot in b.slots]


# --- rows ---


def test_rows_are_trl_columns_and_made_by_seed_and_index():
    row, again = (preference_row(4, 17, errors=2) for _ in range(2))
    assert np.array_equal(row.pop("images")[0], again.pop("images")[0]) and row == again
    assert row["prompt"][0]["content"][0] == {"type": "image"}
    chosen, rejected = (row[name][0]["content"][0]["text"] for name in ("chosen", "rejected"))
    assert verdict(chosen, scene_at(4, 17)).false == 0 and verdict(rejected, scene_at(4, 17)).false == 2
    assert len(row["meta"]["errors"]) == 2
    assert preference_row(4, 18)["chosen"] != row["chosen"]


def test_training_rows_mix_descriptions_and_answers():
    rows = [training_row(1, i, descriptions=0.7) for i in range(600)]
    texts = [row["chosen"][0]["content"][0]["text"] for row in rows]
    short = [text for text in texts if text in ("Yes.", "No.")]
    assert 0.2 < len(short) / len(texts) < 0.4
    assert 0.4 < np.mean([text == "Yes." for text in short]) < 0.6
    found = [verdict(text, scene_at(1, i)) for i, text in enumerate(texts) if text not in ("Yes.", "No.")]
    assert 0.05 < summary(found)["chair_i"] < 0.25
    assert rows[0]["images"][0].shape == (64, 64, 3) and rows[0]["images"][0].dtype == np.uint8
