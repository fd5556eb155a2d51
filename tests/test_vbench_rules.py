"""VBench's rules on detections and captions: by hand, and against plain loops."""

import random

import pytest

from mmalign.vbench import rules
from mmalign.vbench.dimensions import DIMENSIONS


def at(label, left, top, width=10, height=10, caption=""):
    return rules.Detection(label, (left, top, left + width, top + height), caption=caption)


# ------------------------------------------------------------------------------------------------ objects


def test_objects_are_found_by_their_exact_names():
    frames = [[at("dog", 0, 0), at("cat", 0, 0)], [at("hot dog", 0, 0)], [], [at("Dog", 0, 0), at("cat", 5, 5)]]
    found = rules.object_class(frames, "dog")
    assert (found.values, found.frames, found.score) == ((1, 0, 0, 0), 4, 0.25)
    assert rules.multiple_objects(frames, ("dog", "cat")).values == (1, 0, 0, 0)
    assert rules.multiple_objects(frames, ("cat", "cat")).values == (1, 0, 0, 1)
    assert rules.object_class([], "dog") == rules.Outcome((), ()) and rules.Outcome((), ()).score == 0


def test_two_objects_are_named_with_one_and():
    assert rules.two_objects("a b and  c") == ("a b", "c")
    for text in ("dog", "dog and cat and bird", "dog and ", "sand dog"):
        with pytest.raises(ValueError, match="two names with ' and '"):
            rules.two_objects(text)


# ------------------------------------------------------------------------------------------------ colour


def test_the_object_of_a_prompt():
    assert rules.object_of("a red bicycle", "red") == rules.object_of("a red bicycle", "red", "strict") == "bicycle"
    assert rules.object_of("an orange cat", "orange") == rules.object_of("an orange cat", "orange", "strict") == "cat"
    # Inside of words: the letters "a " of "panda bear", and "red" of "fredo".
    assert rules.object_of("a red panda bear", "red") == "pandbear"
    assert rules.object_of("a red panda bear", "red", "strict") == "panda bear"
    assert rules.object_of("a red fredo", "red") == "fo"
    assert rules.object_of("an orange orange", "orange", "strict") == "orange"
    with pytest.raises(ValueError, match="names nothing that could be orange"):
        rules.object_of("an orange orange", "orange")


def both(frames, wanted, colour):
    return [rules.color(frames, wanted, colour, reading) for reading in ("compat", "strict")]


def test_covered_contains_red():
    compat, strict = both([[at("car", 0, 0, caption="a car covered in snow")]], "car", "red")
    assert (compat.score, compat.frames) == (1.0, 1)
    assert (strict.score, strict.frames) == (0.0, 1)
    compat, strict = both([[at("car", 0, 0, caption="a Red, shiny car")]], "car", "red")
    assert (compat.score, compat.frames, strict.score) == (0.0, 0, 1.0)


def test_every_caption_counts_for_the_first_detections_class():
    frame = [at("car", 0, 0, caption="a white car"), at("bird", 20, 0, caption="a red bird")]
    assert [each.score for each in both([frame], "car", "red")] == [1.0, 0.0]
    assert [each.score for each in both([frame], "bird", "red")] == [0.0, 1.0]
    assert rules.color([frame], "bird", "red").frames == 0, "the first detection is another's"


def test_the_denominator_of_colours():
    """Frames without a colour word, and clips without the object, are no part of the reference's mean."""
    right, wrong = at("cat", 0, 0, caption="a pink cat"), at("cat", 0, 0, caption="a black cat")
    plain, other = at("cat", 0, 0, caption="a cat"), at("dog", 0, 0, caption="a pink dog")
    compat, strict = both([[right], [wrong], [plain], [other], []], "cat", "pink")
    assert (compat.score, compat.frames, strict.score, strict.frames) == (0.5, 2, 0.2, 5)
    clips = [[[right]] * 4, [[other]] * 4]
    for reading, expected in (("compat", 1.0), ("strict", 0.5)):
        found = [rules.color(clip, "cat", "pink", reading) for clip in clips]
        there = [each.score for each in found if each.frames]
        assert sum(there) / len(there) == expected
    assert DIMENSIONS["color"].needs_count == "frames" and DIMENSIONS["color"].counted_by is None


def test_colours_that_the_reference_has_no_word_for():
    brown = [[at("dog", 0, 0, caption="a brown dog")], [at("dog", 0, 0, caption="a brown and white dog")]]
    compat, strict = both(brown, "dog", "brown")
    assert (compat.values, compat.frames, compat.score, strict.score) == ((1, 1), 1, 2.0, 1.0)
    assert [each.score for each in both([[at("dog", 0, 0, caption="a gray dog")]], "dog", "grey")] == [0.0, 1.0]


TWELVE = ["white", "red", "pink", "blue", "silver", "purple", "orange", "green", "gray", "yellow", "black", "grey"]


@pytest.mark.parametrize("word", TWELVE)
def test_each_of_twelve_words_says_that_there_is_a_colour(word):
    compat, strict = both([[at("cup", 0, 0, caption=f"a {word} cup")]], "cup", "teal")
    assert (compat.frames, compat.score, strict.score) == (1, 0, 0)
    assert rules.color([[at("cup", 0, 0, caption="a brown cup")]], "cup", "teal").frames == 0
    assert set(rules.COLOUR_WORDS) == set(TWELVE)


def slow_color(frames, wanted, colour):
    words = ["white", "red", "pink", "blue", "silver", "purple", "orange", "green", "gray", "yellow", "black", "grey"]
    named = right = 0
    for frame in frames:
        has_name = has_right = False
        for detection in frame:
            if frame[0].label != wanted:
                continue
            for word in words:
                has_name = has_name or detection.caption.find(word) >= 0
            has_right = has_right or detection.caption.find(colour) >= 0
        named, right = named + has_name, right + has_right
    return (right / named if named else 0.0), named


# ------------------------------------------------------------------------------------------------ relations

LEFT, RIGHT, TOP, BOTTOM = "on the left of", "on the right of", "on the top of", "on the bottom of"
BICYCLE, CAR = at("bicycle", 0, 0), at("car", 50, 8)
ABOVE, BELOW = at("bicycle", 40, 0), at("car", 44, 60)


@pytest.mark.parametrize(
    ("frame", "relation", "compat", "strict"),
    [
        ([BICYCLE, CAR], LEFT, 1, 1),
        ([BICYCLE, CAR], RIGHT, 1, 0),
        ([CAR, BICYCLE], RIGHT, 1, 0),
        ([BICYCLE, CAR], TOP, 0, 0),
        ([ABOVE, BELOW], TOP, 1, 1),
        ([ABOVE, BELOW], BOTTOM, 1, 0),
        ([ABOVE, BELOW], LEFT, 0, 0),
        ([BICYCLE, at("bicycle", 50, 0)], LEFT, 1, 0),  # two bicycles are no bicycle and car
        ([at("car", 0, 0), at("car", 50, 0), at("dog", 90, 0)], LEFT, 1, 0),
        ([at("bicycle", 0, 0), at("car", 20, 20)], LEFT, 0, 0),  # the diagonal is neither
        ([BICYCLE, CAR, at("bicycle", 20, 0)], TOP, 0, 0),
        ([BICYCLE], LEFT, 0, 0),
        ([], LEFT, 0, 0),
        ([at("car", 0, 0), BICYCLE, at("car", 60, 0)], LEFT, 1, 1),  # one of the cars is to its right
    ],
)
def test_relations(frame, relation, compat, strict):
    for reading, expected in (("compat", compat), ("strict", strict)):
        found = rules.spatial_relationship([frame], "bicycle", "car", relation, reading)
        assert (found.values, found.frames) == ((expected,), 1), reading


def test_overlapping_boxes_count_in_part():
    one, other = at("bicycle", 0, 0), at("car", 5, 0)  # 50 of 150 pixels
    for reading in ("compat", "strict"):
        assert rules.spatial_relationship([[one, other]], "bicycle", "car", LEFT, reading).score == pytest.approx(0.3)
    assert rules.iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    # Exactly 0.1 counts whole either way: 20 of 200, and 0.1 / 0.1.
    edge = [at("bicycle", 0, 0, 11, 10), at("car", 9, 0, 11, 10)]
    assert rules.spatial_relationship([edge], "bicycle", "car", LEFT).score == pytest.approx(1.0)
    assert rules.iou((3, 3, 3, 3), (3, 3, 3, 3)) == 0


def test_boxes_are_whole_pixels_as_the_reference_hands_them_on():
    frame = [at("bicycle", 0.9, 0, 10, 10), at("car", 1.0, 10.9, 10, 10)]  # cut off: 1 apart and 10 apart
    assert rules.spatial_relationship([frame], "bicycle", "car", TOP).score == 1
    near = [at("bicycle", 0.2, 0, 4, 4), at("car", 0.9, 0.5, 4, 4)]  # cut off they are the same box
    assert rules.spatial_relationship([near], "bicycle", "car", LEFT).score == 0
    assert rules.spatial_relationship([near], "bicycle", "car", LEFT, "strict").score > 0


def slow_relation(frame, a, b, relation):
    """The best of all pairs, from corners, in whole pixels."""
    boxes = [[int(value) for value in each.box] for each in frame if each.label == a or each.label == b]
    best = 0.0
    for i in range(len(boxes)):
        for j in range(i + 1, len(boxes)):
            p, q = boxes[i], boxes[j]
            dx = abs((q[0] + q[2]) / 2 - (p[0] + p[2]) / 2)
            dy = abs((q[1] + q[3]) / 2 - (p[1] + p[3]) / 2)
            inside = {(x, y) for x in range(p[0], p[2]) for y in range(p[1], p[3])}
            others = {(x, y) for x in range(q[0], q[2]) for y in range(q[1], q[3])}
            overlap = len(inside & others) / len(inside | others)
            far, near = (dx, dy) if relation in (LEFT, RIGHT) else (dy, dx)
            if far > near:
                best = max(best, 1.0 if overlap < 0.1 else 0.1 / overlap)
    return best


def test_the_references_rules_equal_plain_loops_on_random_frames():
    drawn = random.Random(0)
    captions = ("a red car", "a scarred dog", "a blue and white bird", "a thing", "the grey car", "")
    seen = set()
    for _ in range(300):
        frames = [
            [
                rules.Detection(
                    drawn.choice(("car", "dog", "bird")),
                    ((x := drawn.uniform(0, 12)), (y := drawn.uniform(0, 12)), x + drawn.uniform(1, 9), y + 4),
                    caption=drawn.choice(captions),
                )
                for _ in range(drawn.randrange(5))
            ]
            for _ in range(3)
        ]
        for colour in ("red", "blue", "grey"):
            found = rules.color(frames, "car", colour)
            assert (found.score, found.frames) == slow_color(frames, "car", colour)
        for relation in rules.RELATIONS:
            found = rules.spatial_relationship(frames, "car", "dog", relation)
            assert found.values == pytest.approx([slow_relation(frame, "car", "dog", relation) for frame in frames])
            seen |= {0 < value < 1 for value in found.values}
            strict = rules.spatial_relationship(frames, "car", "dog", relation, "strict").values
            assert max(strict) <= 1
    assert seen == {True, False}


def test_swapping_the_objects_mirrors_a_strict_relation():
    frame = [at("car", 3, 7, 12, 5), at("dog", 9, 1, 4, 8), at("dog", 0, 30, 6, 6)]
    for relation, other in ((LEFT, RIGHT), (TOP, BOTTOM)):
        one = rules.spatial_relationship([frame], "car", "dog", relation, "strict")
        assert one == rules.spatial_relationship([frame], "dog", "car", other, "strict")


def test_two_of_one_class_may_stand_to_each_other():
    """The suite never asks; nothing stands beside itself."""
    for frame, score in (([at("cat", 0, 0), at("cat", 40, 0)], 1), ([at("cat", 0, 0)], 0)):
        for reading in ("compat", "strict"):
            assert rules.spatial_relationship([frame], "cat", "cat", RIGHT, reading).score == score


def test_an_unknown_relation_is_refused():
    with pytest.raises(ValueError, match="relationship is 'near'; known are on the left of"):
        rules.spatial_relationship([[BICYCLE, CAR]], "bicycle", "car", "near")


def test_means_over_frames_and_over_clips_differ_where_clips_have_other_numbers_of_frames():
    """One GPU of the reference takes the first, several the second; with 16 frames each they are the same."""
    clips = [[[BICYCLE, CAR]], [[]] * 3]
    found = [rules.spatial_relationship(clip, "bicycle", "car", LEFT) for clip in clips]
    micro = sum(each.score * each.frames for each in found) / sum(each.frames for each in found)
    assert (micro, sum(each.score for each in found) / 2) == (0.25, 0.5)
    counted = {name: each.counted_by for name, each in DIMENSIONS.items()}
    assert all(counted[name] == "frames" for name in ("object_class", "multiple_objects", "scene"))
    assert counted["spatial_relationship"] == "frames"


# ------------------------------------------------------------------------------------------------ scenes


@pytest.mark.parametrize(
    ("caption", "wanted", "compat", "strict"),
    [
        ("people march in a street", "arch", 1, 0),
        ("a city with a skyscraper", "sky", 1, 0),
        ("an old library", "indoor library", 0, 0),
        ("an indoor library", "indoor library", 1, 1),
        ("the library is indoor.", "indoor library", 1, 1),
        ("A Beach", "beach", 0, 1),
        ("", "beach", 0, 0),
    ],
)
def test_scenes(caption, wanted, compat, strict):
    assert [rules.scene([caption], wanted, reading).values for reading in ("compat", "strict")] == [
        (compat,),
        (strict,),
    ]
