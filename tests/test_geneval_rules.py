"""GenEval's rules by hand, by brute force, on its published metadata and on drawn scenes."""

import itertools
import json
import math
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from public_kit import GENEVAL, needs

from mmalign.backbones.detector import Detections, _extents
from mmalign.discovery import evaluator_class
from mmalign.shapes.captions import Caption, Item, captions
from mmalign.shapes.scene import GREYS, render, sample_scene, signed_distance

geneval = sys.modules[evaluator_class("geneval").__module__]
Found, judge, parse, relations = geneval.Found, geneval.judge, geneval.parse, geneval.relations


def metadata():
    return [json.loads(line) for line in GENEVAL.read_text().splitlines()]


def box(x, y, width=10, height=10, colour=None):
    """An object by its centre and size."""
    return Found((x - width / 2, y - height / 2, x + width / 2, y + height / 2), colour)


# ------------------------------------------------------------------------------------------------ relations


@pytest.mark.parametrize(
    ("dx", "dy", "expected"),
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),  # y grows downwards
        (0, 30, {"below"}),
        (-30, -30, {"left of", "above"}),
        (30, 30, {"right of", "below"}),
        (-30, 5, {"left of"}),
        (0, 0, set()),
        (2, -2, set()),  # within 0.1 of both extents
        (2.005, 0, set()),  # 0.005 beyond it, but of a distance of 2
        (4.1, 0, {"right of"}),  # 2.1 of 4.1 is more than half
        (3.9, 0, set()),  # 1.9 of 3.9 is less
    ],
)
def test_relations_of_two_boxes_of_ten_pixels(dx, dy, expected):
    a, b = box(100 + dx, 100 + dy), box(100, 100)
    assert relations(a, b, 0.1) == expected
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(b, a, 0.1) == {opposite[name] for name in expected}


def test_centres_nearer_than_a_thousandth_of_a_pixel_have_no_relation():
    """The authors' 1e-3, on what is left of the distance; it is what keeps equal centres from 0 / 0."""
    target = box(0, 0)
    for near, far in ((box(0.0009, 0), box(0.0011, 0)), (box(0, 0.0009), box(0, 0.0011))):
        assert relations(near, target, 0.0) == set() and len(relations(far, target, 0.0)) == 1


def relation_by_vectors(a, b, offset):
    """The card's rule once more, in numpy, on centres and extents."""
    corners = np.array([a, b], dtype=float).reshape(2, 2, 2)
    centres, extents = corners.mean(1), np.abs(corners[:, 1] - corners[:, 0])
    delta = centres[0] - centres[1]
    left = np.sign(delta) * np.clip(np.abs(delta) - offset * extents.sum(0), 0, None)
    if (np.abs(left) < 1e-3).all():
        return set()
    unit = left / math.hypot(*delta)
    pairs = (("left of", "right of"), ("above", "below"))
    return {pair[int(part > 0)] for part, pair in zip(unit, pairs, strict=True) if abs(part) > 0.5}


def test_relations_equal_vector_arithmetic_on_random_boxes():
    rng = random.Random(0)
    seen = set()
    for _ in range(4000):
        (ax, ay, bx, by), sizes = (rng.randrange(0, 60) for _ in range(4)), [rng.randrange(1, 40) for _ in range(4)]
        a, b = (ax, ay, ax + sizes[0], ay + sizes[1]), (bx, by, bx + sizes[2], by + sizes[3])
        offset = rng.choice([0.0, 0.1, 0.3])
        found = relations(Found(a), Found(b), offset)
        assert found == relation_by_vectors(a, b, offset), (a, b, offset)
        seen.add(frozenset(found))
    assert len(seen) == 9, "none, four alone, four corners"


# ------------------------------------------------------------------------------------------------ rules, by hand


def verdict(asked, objects, **more):
    found = judge(parse(asked), objects, **more)
    assert found.correct == (found.count and found.colour and found.position)
    return found.count, found.colour, found.position


def test_single_object():
    asked = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
    assert verdict(asked, {"bench": [box(5, 5)]}) == (True, True, True)
    assert verdict(asked, {"bench": [box(5, 5)] * 7, "cow": [box(1, 1)]}) == (True, True, True), "others do not matter"
    assert verdict(asked, {"cow": [box(1, 1)]}) == (False, True, True)
    assert verdict(asked, {}) == (False, True, True)


def test_two_object():
    asked = {"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "sports ball", "count": 1}]}
    assert verdict(asked, {"bench": [box(5, 5)], "sports ball": [box(5, 5)]}) == (True, True, True)
    assert verdict(asked, {"bench": [box(5, 5)] * 2}) == (False, True, True)
    assert verdict(asked, {"sports ball": [box(5, 5)]}) == (False, True, True)


@pytest.mark.parametrize(("there", "right"), [(0, False), (1, False), (2, True), (3, False), (4, False), (16, False)])
def test_counting(there, right):
    asked = {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
    }
    assert verdict(asked, {"clock": [box(i, i) for i in range(there)]}) == (right, True, True)


def test_counting_without_exclude_is_at_least():
    asked = {"tag": "counting", "include": [{"class": "clock", "count": 2}]}
    assert verdict(asked, {"clock": [box(i, i) for i in range(5)]}) == (True, True, True)


def test_colors():
    asked = {"tag": "colors", "include": [{"class": "fire hydrant", "count": 1, "color": "blue"}]}
    blue, red = box(5, 5, colour="blue"), box(9, 9, colour="red")
    assert verdict(asked, {"fire hydrant": [blue]}) == (True, True, True)
    assert verdict(asked, {"fire hydrant": [blue, red]}) == (True, True, True), "the surest one counts"
    assert verdict(asked, {"fire hydrant": [red, blue]}) == (True, False, True), "the surest one counts"
    assert verdict(asked, {}) == (False, False, True), "what is not there has no colour"
    two = {"tag": "colors", "include": [{"class": "fire hydrant", "count": 2, "color": "blue"}]}
    assert verdict(two, {"fire hydrant": [blue, blue, red]}) == (True, True, True)
    assert verdict(two, {"fire hydrant": [blue, red, blue]}) == (True, False, True)


def test_color_attr():
    asked = {
        "tag": "color_attr",
        "include": [
            {"class": "wine glass", "count": 1, "color": "purple"},
            {"class": "apple", "count": 1, "color": "black"},
        ],
    }
    glass, apple = box(5, 5, colour="purple"), box(9, 9, colour="black")
    assert verdict(asked, {"wine glass": [glass], "apple": [apple]}) == (True, True, True)
    swapped = {"wine glass": [box(5, 5, colour="black")], "apple": [box(9, 9, colour="purple")]}
    assert verdict(asked, swapped) == (True, False, True)
    assert verdict(asked, {"wine glass": [glass]}) == (False, False, True)


def test_position():
    asked = {
        "tag": "position",
        "include": [
            {"class": "teddy bear", "count": 1},
            {"class": "dog", "count": 1, "position": ["right of", 0]},
        ],
        "prompt": "a photo of a dog right of a teddy bear",
    }
    bear, right, left = box(50, 50), box(90, 55), box(10, 50)
    assert verdict(asked, {"teddy bear": [bear], "dog": [right]}) == (True, True, True)
    assert verdict(asked, {"teddy bear": [bear], "dog": [left]}) == (True, True, False)
    assert verdict(asked, {"teddy bear": [bear], "dog": [left, right]}) == (True, True, False), "the surest one counts"
    assert verdict(asked, {"teddy bear": [right, bear], "dog": [box(70, 50)]}) == (True, True, False)
    assert verdict(asked, {"dog": [right]}) == (False, True, False), "right of nothing"
    assert verdict(asked, {"teddy bear": [bear]}) == (False, True, False)
    near = {"teddy bear": [bear], "dog": [box(53, 50)]}
    assert verdict(asked, near) == (True, True, False) and verdict(asked, near, offset=0.0) == (True, True, True)


def test_a_relation_holds_between_all_of_both_clauses_and_to_one_that_holds_itself():
    asked = {
        "tag": "position",
        "include": [
            {"class": "cup", "count": 2, "color": "red"},
            {"class": "dog", "count": 2, "position": ["above", 0]},
        ],
    }
    cups = [box(20, 90, colour="red"), box(40, 90, colour="red")]
    assert verdict(asked, {"cup": cups, "dog": [box(30, 10), box(35, 15)]}) == (True, True, True)
    assert verdict(asked, {"cup": cups, "dog": [box(30, 10), box(35, 90)]}) == (True, True, False)
    pale = [cups[0], box(40, 90, colour="white")]
    assert verdict(asked, {"cup": pale, "dog": [box(30, 10), box(35, 15)]}) == (True, False, False)


# ------------------------------------------------------------------------------------------------ rules, by brute force


def correct_by_cases(asked, objects, offset):
    """The benchmark's answer from the card: every demand in turn, the first that fails decides."""
    groups = []
    for demand in asked["include"]:
        seen = objects.get(demand["class"], [])
        if len(seen) < demand["count"]:
            return False
        seen = seen[: demand["count"]]
        if "color" in demand and sum(one.colour == demand["color"] for one in seen) < demand["count"]:
            return False
        if "position" in demand:
            word, other = demand["position"]
            for one, target in itertools.product(seen, groups[other]):
                if word not in relation_by_vectors(one.box, target.box, offset):
                    return False
        groups.append(seen)
    return not any(len(objects.get(d["class"], [])) >= d["count"] for d in asked.get("exclude", []))


def test_the_verdict_equals_brute_force_on_random_demands_and_objects():
    rng, names = random.Random(1), ["cup", "dog", "tv remote"]
    colours = ["red", "blue"]
    outcomes = set()
    for _ in range(4000):
        include = []
        for number in range(rng.randint(1, 3)):
            demand = {"class": rng.choice(names), "count": rng.choice([1, 1, 1, 2])}
            if rng.random() < 0.4:
                demand["color"] = rng.choice(colours)
            if number and rng.random() < 0.5:
                word = rng.choice(["left of", "right of", "above", "below"])
                demand["position"] = [word, rng.randrange(number)]
            include.append(demand)
        exclude = [{"class": rng.choice(names), "count": rng.randint(2, 4)}] if rng.random() < 0.3 else []
        asked = {"tag": "counting", "include": include, "exclude": exclude}
        objects = {
            name: [
                box(
                    rng.randrange(90),
                    rng.randrange(90),
                    rng.randrange(1, 40),
                    rng.randrange(1, 40),
                    rng.choice(colours),
                )
                for _ in range(rng.choice([0, 1, 2, 2, 3]))
            ]
            for name in names
        }
        found = judge(parse(asked), objects, 0.1)
        assert found.correct == correct_by_cases(asked, objects, 0.1), (asked, objects)
        outcomes.add((found.count, found.colour, found.position))
    assert len(outcomes) == 8, "every combination occurs"


# ------------------------------------------------------------------------------------------------ published metadata


@needs(GENEVAL)
def test_every_published_line_is_understood():
    lines = metadata()
    assert len(lines) == 553
    tags = [parse(line).tag for line in lines]
    counts = {tag: tags.count(tag) for tag in dict.fromkeys(tags)}
    assert counts == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert {clause["class"] for line in lines for clause in line["include"]} == set(geneval.NAMES)


def perfect(line):
    """Objects as a line asks for them."""
    objects, place = {}, (500.0, 500.0)
    for clause in line["include"]:
        if "position" in clause:
            dx, dy = {"left of": (-200, 0), "right of": (200, 0), "above": (0, -200), "below": (0, 200)}[
                clause["position"][0]
            ]
            place = place[0] + dx, place[1] + dy
        colour = clause.get("color")
        objects[clause["class"]] = [box(place[0] + i, place[1], 60, 40, colour) for i in range(clause["count"])]
    return objects


@needs(GENEVAL)
def test_a_perfect_image_is_right_for_every_line_and_one_fault_makes_it_wrong():
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for line in metadata():
        asked, objects = parse(line), perfect(line)
        assert judge(asked, objects).correct, line
        for clause in line["include"]:
            name = clause["class"]
            fewer = {**objects, name: objects[name][:-1]}
            assert not judge(asked, fewer).count and not judge(asked, fewer).correct, line
            more = judge(asked, {**objects, name: [*objects[name], objects[name][0]]})
            assert more.correct == (line["tag"] != "counting"), line
            if "color" in clause:
                other = "white" if clause["color"] == "black" else "black"
                repainted = {**objects, name: [Found(one.box, other) for one in objects[name]]}
                found = judge(asked, repainted)
                assert (found.count, found.colour, found.correct) == (True, False, False), line
            if "position" in clause:
                turned = {**line, "include": [line["include"][0], {**clause, "position": [
                    opposite[clause["position"][0]], 0]}]}  # fmt: skip
                assert not judge(asked, perfect(turned)).position, line


@pytest.mark.parametrize(
    ("aux", "message"),
    [
        ({}, r"needs the columns tag, include and exclude .* tag: Field required"),
        ({"tag": "counting"}, r"include: Field required"),
        ({"tag": "count", "include": [{"class": "cup", "count": 1}]}, r"tag: Input should be 'single_object'"),
        ({"tag": "counting", "include": []}, r"include: .*at least 1 item"),
        (
            {"tag": "counting", "include": [{"class": "mouse", "count": 1}]},
            r"class 'mouse' is none of the benchmark's 80",
        ),
        ({"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "grey"}]}, r"color 'grey' is none of red"),
        ({"tag": "colors", "include": [{"class": "cup", "count": 0}]}, r"include\.0\.count: .*greater than"),
        ({"tag": "colors", "include": [{"class": "cup", "count": 1, "colour": "red"}]}, r"include\.0\.colour: Extra"),
        (
            {"tag": "position", "include": [{"class": "cup", "count": 1, "position": ["beside", 0]}]},
            r"position\.0: Input should be 'left of'",
        ),
        (
            {"tag": "position", "include": [{"class": "cup", "count": 1, "position": ["above", 0]}]},
            r"include 0 stands to clause 0, which is not an earlier one",
        ),
    ],
)
def test_metadata_that_the_benchmark_does_not_know_are_refused(aux, message):
    with pytest.raises(ValueError, match=message):
        parse(aux)


# ------------------------------------------------------------------------------------------------ detections to objects


def detections(scores, labels, size=(8, 8)):
    n = len(scores)
    masks = torch.ones(n, *size, dtype=torch.bool)
    return Detections(torch.tensor(scores), torch.tensor(labels), _extents(masks), masks)


def test_objects_are_kept_class_by_class_above_a_score_and_none_is_suppressed():
    cup, mouse = geneval.NAMES.index("cup"), geneval.NAMES.index("computer mouse")
    found = detections([0.95, 0.91, 0.9, 0.6, 0.31, 0.3], [cup, mouse, cup, cup, mouse, cup])
    assert geneval.kept(found, 0.3, 16) == {"cup": [0, 2, 3], "computer mouse": [1, 4]}, "more than the score"
    assert geneval.kept(found, 0.9, 16) == {"cup": [0], "computer mouse": [1]}
    assert geneval.kept(found, 0.3, 2) == {"cup": [0, 2], "computer mouse": [1, 4]}
    assert geneval.kept(found, 0.99, 2) == {}


def test_the_benchmarks_names_stand_for_cocos_classes():
    differ = [(own, coco) for own, coco in zip(geneval.NAMES, geneval.COCO, strict=True) if own != coco]
    assert differ == [("computer mouse", "mouse"), ("tv remote", "remote"), ("computer keyboard", "keyboard")]


def test_an_object_is_cut_out_as_pil_does_it():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    mask = np.zeros((30, 40), bool)
    mask[5:20, 8:30] = rng.random((15, 22)) < 0.6
    (box_of,) = _extents(torch.from_numpy(mask)[None])
    picture = Image.composite(Image.fromarray(array), Image.new("RGB", (40, 30), "#999"), Image.fromarray(mask))
    expected = np.asarray(picture.crop(tuple(float(value) for value in box_of)))
    found = geneval.cut_out(torch.from_numpy(array).permute(2, 0, 1), box_of, torch.from_numpy(mask))
    assert found.dtype == torch.uint8
    assert np.array_equal(found.permute(1, 2, 0).numpy(), expected)


# ------------------------------------------------------------------------------------------------ drawn scenes

CLASSES = {"circle": "apple", "square": "tv", "triangle": "pizza", "cross": "scissors"}
COLOURS = {"red": "red", "yellow": "yellow", "green": "green", "blue": "blue", "purple": "purple", "cyan": "white"}


def seen(scene, image):
    """A drawn scene as a flawless detector sees it: exact masks, and the colour that is painted there."""
    centres = np.arange(64) + 0.5
    masks = [
        signed_distance(s.kind, centres[None, :] - s.x, centres[:, None] - s.y, s.radius) < 0 for s in scene.shapes
    ]
    masks = torch.from_numpy(np.stack(masks))
    labels = torch.tensor([geneval.NAMES.index(CLASSES[s.kind]) for s in scene.shapes])
    found = Detections(torch.linspace(0.99, 0.95, len(labels)), labels, _extents(masks), masks)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    objects = {}
    for name, indices in geneval.kept(found, 0.9, 16).items():
        for i in indices:
            crop = geneval.cut_out(pixels, found.boxes[i], found.masks[i])
            inside = crop.permute(1, 2, 0)[(crop != geneval.GREY).any(0)].double().mean(0)
            hue = min(scene.shapes, key=lambda s: np.abs(s.rgb * 255 - inside.numpy()).max())
            objects.setdefault(name, []).append(Found(tuple(found.boxes[i].tolist()), COLOURS[hue.colour]))
    return objects


def demands(caption):
    clauses = [{"class": CLASSES[i.kind], "count": 1, "color": COLOURS[i.colour]} for i in reversed(caption.items)]
    if caption.relation:
        clauses[1]["position"] = [caption.relation, 0]
    return {"tag": "position" if caption.relation else "color_attr", "include": clauses}


def test_drawn_scenes_are_judged_by_what_was_drawn():
    """In this world boxes never overlap, so the axis on which two shapes are farther apart always counts."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    wanted = [
        c
        for c in captions(400, 5, held_out=False, counts=(0.2, 0.7, 0.1))
        if len({i.kind for i in c.items}) == len(c.items)
    ]
    related = 0
    for number, caption in enumerate(wanted[:150]):
        scene = sample_scene(caption, np.random.default_rng([5, number]))
        objects = seen(scene, render(scene))
        line = demands(caption)
        assert judge(parse(line), objects).correct, str(caption)
        first = line["include"][0]
        wrong = {**first, "color": "red" if first["color"] != "red" else "blue"}
        if not any(one.colour == wrong["color"] for one in objects[first["class"]]):
            repainted = judge(parse({**line, "include": [wrong, *line["include"][1:]]}), objects)
            assert (repainted.count, repainted.colour) == (True, False), str(caption)
        absent = {"class": "zebra", "count": 1}
        assert not judge(parse({**line, "include": [*line["include"], absent]}), objects).count
        if caption.relation:
            related += 1
            turned = [line["include"][0], {**line["include"][1], "position": [opposite[caption.relation], 0]}]
            assert not judge(parse({**line, "include": turned}), objects).position, str(caption)
    assert related > 20


def test_counts_of_drawn_shapes():
    for number in range(1, 4):
        caption = Caption(tuple(Item("circle", colour) for colour in ("red", "blue", "green")[:number]))
        scene = sample_scene(caption, np.random.default_rng(number))
        objects = seen(scene, render(scene))
        for asked in range(1, 5):
            line = {
                "tag": "counting",
                "include": [{"class": "apple", "count": asked}],
                "exclude": [{"class": "apple", "count": asked + 1}],
            }
            assert judge(parse(line), objects).correct == (asked == number)
    assert set(GREYS) == {"white", "grey", "black"}, "backgrounds, which have no hue"
