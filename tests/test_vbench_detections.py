"""VBench's rules on files of detections and captions: the reader, the evaluators on such a file, the suite's rows."""

import json

import pytest
import torch
from public_kit import VBENCH, needs

from mmalign.backbones.mask2former import COCO
from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import Batch, ItemErrors
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.media import write_image
from mmalign.results import read_results
from mmalign.score import run
from mmalign.testing import check_evaluator
from mmalign.vbench import rules
from mmalign.vbench.detections import read_seen

# ------------------------------------------------------------------------------------------------ files


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def thing(label, left=0.0, top=0.0, **more):
    return {"label": label, "box": [left, top, left + 10, top + 10], **more}


def test_clips_are_found_by_name_whatever_their_files_end_in(tmp_path):
    file = write(
        tmp_path / "seen.jsonl",
        {"clip": "/data/videos/a red car-0.mp4", "frames": [[thing("car", score=0.5, caption="a red car")], []]},
        "",
        {"clip": "1.5 m of snow-0", "captions": ["snow"]},
        {"clip": "one/x.mp4", "captions": ["one"]},
        {"clip": "two/x.mp4", "captions": ["two"]},
    )
    seen = read_seen(file)
    expected = ((rules.Detection("car", (0, 0, 10, 10), 0.5, "a red car"),), ())
    for name in ("a red car-0", "a red car-0.gif", "clips/a red car-0.mp4", "/data/videos/a red car-0"):
        assert seen.frames(name) == expected
    assert seen.captions("1.5 m of snow-0.mp4") == ("snow",)
    assert [seen.captions(f"{home}/x.mp4") for home in ("one", "two")] == [("one",), ("two",)]
    assert read_seen(file) is seen
    for call, message in (
        (lambda: seen.frames("x"), r"'x' may be 'one/x.mp4' and 'two/x.mp4'"),
        (lambda: seen.frames("a red cat-0"), r"has no line for 'a red cat-0'\. Did you mean 'a red car-0'"),
        (lambda: seen.frames("one/x"), "has captions of 'one/x' and no frames"),
        (lambda: seen.captions("a red car-0"), "has detections of 'a red car-0' and no captions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    write(file, {"clip": "other", "captions": ["new"]})
    assert read_seen(file).captions("other") == ("new",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":1:2: not valid JSON"),
        ({"frames": [[]]}, ":1: clip: Field required"),
        ({"clip": " ", "captions": ["x"]}, ":1: clip: .*must not be empty"),
        ({"clip": "x"}, "a line has frames, captions or both"),
        ({"clip": "x", "frames": []}, ":1: frames: .*at least 1"),
        ({"clip": "x", "frames": [[{"label": "car"}]]}, r":1: frames\.0\.0\.box: Field required"),
        ({"clip": "x", "frames": [[thing("car", colour="red")]]}, r"frames\.0\.0\.colour: Extra inputs"),
        ({"clip": "x", "frames": [[{"label": "car", "box": [5, 0, 1, 9]}]]}, "left, top, right, bottom in pixels"),
        ({"clip": "x", "frames": [[{"label": "car", "box": [0, 0, 1]}]]}, r"frames\.0\.0\.box"),
        ('{"clip": "x", "frames": [[{"label": "car", "box": [0, 0, 1, NaN]}]]}', ":1"),
    ],
)
def test_lines_that_are_wrong_are_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read_seen(write(tmp_path / "seen.jsonl", line))


def test_files_that_are_wrong_are_refused_before_anything_runs(tmp_path):
    twice = write(tmp_path / "twice.jsonl", *[{"clip": "x", "captions": ["y"]}] * 2)
    for name in ("object_class", "multiple_objects", "color", "spatial_relationship", "scene"):
        cls = evaluator_class(name)
        for file, message in (
            (tmp_path / "none.jsonl", "is no file"),
            (twice, r":2: 'x' is on an earlier line too"),
            (write(tmp_path / "empty.jsonl"), "has no lines"),
        ):
            with pytest.raises(ValueError, match=message):
                cls.weight_files(cls.Params(detections=file))


# ------------------------------------------------------------------------------------------------ evaluators on files

ROW = {
    "object_class": {"object": "bicycle"},
    "multiple_objects": {"object": "bicycle and car"},
    "color": {"color": "red"},
    "spatial_relationship": {"object_a": "bicycle", "object_b": "car", "relationship": "on the right of"},
    "scene": {"scene": "arch"},
}
PROMPT = "a red bicycle"


@pytest.fixture
def seen(tmp_path):
    """Clips 0 to 5; each of them has both kinds of things seen."""
    first = [thing("bicycle", caption="a red bicycle"), thing("car", 40, caption="a car covered in mud")]
    lines = [
        {
            "clip": "0",
            "frames": [first, first, [], [thing("car", caption="red")]],
            "captions": ["arch", "march", "", "x"],
        },
        {"clip": "1", "frames": [[thing("car", caption="red")]] * 2, "captions": ["Arch", "a bridge"]},
        *({"clip": str(i), "frames": [first], "captions": ["an arch"]} for i in range(2, 6)),
    ]
    return write(tmp_path / "seen.jsonl", *lines)


def items(count, dimension):
    still = [torch.zeros(1, 3, 8, 8, dtype=torch.uint8)] * count
    return Batch(
        frames=still,
        prompts=[PROMPT] * count,
        aux=[dict(ROW[dimension]) for _ in still],
        samples=[str(number) for number in range(count)],
    )


@pytest.mark.parametrize(
    ("dimension", "params", "scores", "frames"),
    [
        ("object_class", {}, [0.5, 0, 1], [4, 2, 1]),
        ("multiple_objects", {}, [0.5, 0, 1], [4, 2, 1]),
        ("color", {}, [1, 0, 1], [2, 0, 1]),
        ("color", {"rules": "strict"}, [0.5, 0, 1], [4, 2, 1]),
        ("spatial_relationship", {}, [0.5, 0, 1], [4, 2, 1]),
        ("spatial_relationship", {"rules": "strict"}, [0, 0, 0], [4, 2, 1]),
        ("scene", {}, [0.5, 0, 1], [4, 2, 1]),
        ("scene", {"rules": "strict"}, [0.25, 0.5, 1], [4, 2, 1]),
    ],
)
def test_evaluators_judge_what_the_file_says(seen, dimension, params, scores, frames):
    evaluator = load_evaluator(dimension, {"detections": seen, **params}, "cpu")
    found = evaluator.score(items(3, dimension))
    assert {name: values.tolist() for name, values in found.items()} == {"score": scores, "frames": frames}
    assert evaluator.counts == {"frames"} and "frames" not in (evaluator.summary, "")
    alone = evaluator.score(items(3, dimension).take([2]))
    assert alone["score"].tolist() == scores[2:]


@pytest.mark.parametrize("dimension", ROW)
def test_what_cannot_be_judged_costs_the_others_nothing(seen, dimension):
    evaluator = load_evaluator(dimension, {"detections": seen}, "cpu")
    batch = items(3, dimension)
    batch.samples[0], batch.aux[1] = "elsewhere", {}
    with pytest.raises(ItemErrors) as caught:
        evaluator.score(batch)
    key = next(iter(ROW[dimension]))
    assert "has no line for 'elsewhere'" in str(caught.value.errors[0])
    assert str(caught.value.errors[1]).startswith(f"the row has no {key};")
    assert caught.value.scores["score"][2] == 1


@pytest.mark.parametrize("dimension", ROW)
def test_evaluators_on_files_keep_the_contract(seen, dimension):
    prompts = [PROMPT] * 6
    check_evaluator(dimension, {"detections": seen}, prompts=prompts, aux=ROW[dimension], processes=1)


def test_a_run_looks_clips_up_by_the_tables_names(tmp_path, seen):
    """The same picture twice, told apart by its name alone; another file is another result."""
    lines = []
    for name in ("0", "1"):
        write_image(tmp_path / f"{name}.png", torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())
        lines.append({"media": f"{name}.png", "prompt": PROMPT, "dimensions": ["color"], **ROW["color"]})
    table = write(tmp_path / "table.jsonl", *lines)

    def rows(**params):
        spec = EvaluatorSpec(name="color", params={"detections": str(seen), **params})
        config = ScoreConfig(table=table, output=tmp_path / "out", evaluators=(spec,), device="cpu")
        found = [row for row in read_results(run(config)).rows if row["evaluator"].startswith("color")]
        return {(row["sample"], row["subscore"]): (row["score"], row["key"]) for row in found}

    first = rows()
    assert {key: value for key, (value, _) in first.items()} == {
        ("0.png", "score"): 1.0, ("0.png", "frames"): 2.0, ("1.png", "score"): 0.0, ("1.png", "frames"): 0.0,
    }  # fmt: skip
    assert first["0.png", "score"][1] != first["1.png", "score"][1]
    write(seen, {"clip": "0", "frames": [[]]}, {"clip": "1.mp4", "frames": [[thing("bicycle", caption="red")]]})
    assert {key: value for key, (value, _) in rows().items()}["1.png", "score"] == 1.0


# ------------------------------------------------------------------------------------------------ the suite


@needs(VBENCH)
def test_the_suites_rows_are_all_understood():
    found = {name: 0 for name in ROW}
    names = set()
    for row in json.loads(VBENCH.read_text(encoding="utf-8")):
        for dimension in ROW.keys() & set(row["dimension"]):
            aux = row["auxiliary_info"][dimension]
            inner = aux.get(dimension)
            aux = inner if isinstance(inner, dict) else aux
            found[dimension] += 1
            asked = rules.asked(aux, *ROW[dimension])
            if dimension == "color":
                colour = asked[0]
                assert colour in rules.COLOUR_WORDS
                name = rules.object_of(row["prompt_en"], colour)
                assert name == rules.object_of(row["prompt_en"], colour, "strict")
                names.add(name)
            elif dimension == "spatial_relationship":
                rules.check_relation(asked[2])
                names |= set(asked[:2])
            elif dimension != "scene":
                names |= set(rules.two_objects(asked[0])) if dimension == "multiple_objects" else {asked[0]}
    assert found == {
        "object_class": 79, "multiple_objects": 82, "color": 85, "spatial_relationship": 84, "scene": 86,
    }  # fmt: skip
    assert names == set(COCO) - {"mouse"}
