"""Agreement with people as VBench counts it, against counting by hand and against scipy."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from mmalign import cli
from mmalign.vbench.meta import PAPER, Comparison, agreement, clip_name, read_labels, read_scores

MODELS = ("lavie", "modelscope", "cogvideo", "videocrafter")
STRENGTH = {"lavie": 1.2, "modelscope": 0.4, "cogvideo": -1.0, "videocrafter": 0.1}


def world(prompts: int = 40, noise: float = 0.7) -> tuple[list[Comparison], dict[str, dict[str, dict[str, float]]]]:
    """Comparisons of all pairs of four models, by people who see clips better than the scores do."""
    rng = np.random.default_rng(3)
    scores: dict[str, dict[str, dict[str, float]]] = {model: {"scene": {}} for model in MODELS}
    comparisons = []
    for number in range(prompts):
        prompt = f"a place, {number}"
        seen = {model: STRENGTH[model] + rng.normal() for model in MODELS}
        for model in MODELS:
            scores[model]["scene"][f"{prompt}-0"] = round(4 * (seen[model] + noise * rng.normal())) / 4
        for i, a in enumerate(MODELS):
            for b in MODELS[i + 1 :]:
                gap = seen[a] - seen[b]
                human = 0.5 if abs(gap) < 0.3 else float(gap > 0)
                comparisons.append(Comparison("scene", prompt, a, b, f"{prompt}-0", f"{prompt}-0", human))
    return comparisons, scores


def by_hand(comparisons: list[Comparison], scores: Any) -> tuple[dict[str, list[float]], float]:
    """Win ratios of people and of the scores by model, and the pairwise accuracy, one comparison at a time."""
    won: dict[str, list[list[float]]] = {model: [[], []] for model in MODELS}
    right = []
    for each in comparisons:
        x, y = scores[each.model_a]["scene"][each.clip_a], scores[each.model_b]["scene"][each.clip_b]
        metric = 0.5 if x == y else float(x > y)
        for model, h, m in ((each.model_a, each.human, metric), (each.model_b, 1 - each.human, 1 - metric)):
            won[model][0].append(h)
            won[model][1].append(m)
        if each.human != 0.5:
            right.append(0.5 if metric == 0.5 else float(metric == each.human))
    return {model: [sum(side) / len(side) for side in sides] for model, sides in won.items()}, sum(right) / len(right)


def test_win_ratios_correlations_and_accuracy() -> None:
    comparisons, scores = world()
    found = agreement(comparisons, scores)["scene"]
    ratios, accuracy = by_hand(comparisons, scores)
    for model, (human, metric) in ratios.items():
        assert found["models"][model]["human"]["share"] == pytest.approx(human, abs=1e-12)
        assert found["models"][model]["metric"]["share"] == pytest.approx(metric, abs=1e-12)
        assert found["models"][model]["metric"]["low"] < metric < found["models"][model]["metric"]["high"]
    x, y = ([ratios[model][side] for model in MODELS] for side in (1, 0))
    assert found["pearson"]["value"] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
    assert found["pearson"]["low"] <= found["pearson"]["value"] <= found["pearson"]["high"] <= 1
    assert found["accuracy"]["mean"] == pytest.approx(accuracy, abs=1e-12)
    assert found["accuracy"]["low"] < accuracy < found["accuracy"]["high"]
    assert found["accuracy"]["n"] == sum(each.human != 0.5 for each in comparisons) < found["comparisons"] == 240
    assert found["prompts"] == 40 and found["points"] == 4 and found["unscored"] == 0
    assert found["paper"] == PAPER["scene"] and 0 < found["metric_ties"] < 0.3
    total = sum(found["models"][model]["human"]["share"] for model in MODELS)
    assert total == pytest.approx(2.0, abs=1e-12), "each comparison is one win, so that ratios are 1/2 in the mean"


def test_the_interval_of_the_accuracy_counts_prompts() -> None:
    """The same comparisons ten times over are no more evidence where prompts are the unit."""
    comparisons, scores = world()
    once = agreement(comparisons, scores)["scene"]["accuracy"]
    again = agreement(comparisons * 10, scores)["scene"]["accuracy"]
    assert again["mean"] == pytest.approx(once["mean"], abs=1e-12)
    assert again["high"] - again["low"] == pytest.approx(once["high"] - once["low"], rel=0.02)


def test_scores_that_agree_disagree_and_say_nothing() -> None:
    comparisons, scores = world(noise=0.0)
    truth = {model: {"scene": {clip: value for clip, value in scores[model]["scene"].items()}} for model in MODELS}
    turned = {model: {"scene": {clip: -v for clip, v in scores[model]["scene"].items()}} for model in MODELS}
    level = {model: {"scene": dict.fromkeys(scores[model]["scene"], 1.0)} for model in MODELS}
    good, bad, none = (agreement(comparisons, each)["scene"] for each in (truth, turned, level))
    assert good["accuracy"]["mean"] > 0.95 and bad["accuracy"]["mean"] == pytest.approx(1 - good["accuracy"]["mean"])
    assert good["pearson"]["value"] == pytest.approx(-bad["pearson"]["value"], abs=1e-9)
    assert none["accuracy"]["mean"] == 0.5 and none["metric_ties"] == 1.0
    assert none["pearson"]["value"] is None and none["spearman"]["value"] is None, "a level side has no correlation"


def test_four_points_have_eleven_ranks() -> None:
    """Why the printed .9651 cannot be Spearman's over four models."""
    import itertools

    values = {round(stats.spearmanr(range(4), order).statistic, 4) for order in itertools.permutations(range(4))}
    assert len(values) == 11 and not values & {round(value, 4) for value in PAPER.values()}


def test_another_evaluator_and_what_is_not_scored() -> None:
    comparisons, scores = world(6)
    for model in MODELS:
        scores[model]["scene@blip"] = scores[model].pop("scene")
    del scores["lavie"]["scene@blip"]["a place, 0-0"]
    found = agreement(comparisons, scores, "scene@blip")["scene"]
    assert found["unscored"] == 3 and found["comparisons"] == 33
    with pytest.raises(
        ValueError, match="no comparison has two scores: the first wants 'a place, 0-0' of lavie under scene"
    ):
        agreement(comparisons, scores)
    with pytest.raises(ValueError, match=r"no scores of cogvideo.*the nearest is cogvideox"):
        agreement(comparisons, {model: {} for model in ("lavie", "modelscope", "videocrafter", "cogvideox")})


def test_two_models_alone() -> None:
    comparisons, scores = world(8)
    two = [each for each in comparisons if {each.model_a, each.model_b} == {"lavie", "cogvideo"}]
    found = agreement(two, scores)["scene"]
    assert found["points"] == 2 and math.isclose(abs(found["spearman"]["value"]), 1)


# ------------------------------------------------------------------------------------------------ files


def test_tables_of_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    rows: list[dict[str, Any]] = [
        {"dimension": "scene", "prompt": "a beach", "model_a": "x", "model_b": "y", "label": "a", "index": 2},
        {"dimension": "scene", "prompt": "a beach", "model_a": "x", "model_b": "y", "label": "tie"},
        {
            "dimension": "color",
            "model_a": "x",
            "model_b": "y",
            "label": 0,
            "clip_a": "v/red car-1.mp4",
            "clip_b": "k.gif",
        },
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_labels(path)
    assert found[0] == Comparison("scene", "a beach", "x", "y", "a beach-2", "a beach-2", 1.0)
    assert found[1].clip_a == "a beach-0" and found[1].human == 0.5
    assert found[2] == Comparison("color", "red car", "x", "y", "red car-1", "k", 0.0)
    assert [each.dimension for each in read_labels(path, "color")] == ["color"]
    with pytest.raises(ValueError, match="no comparison of style; it has scene, color"):
        read_labels(path, "style")
    table = tmp_path / "labels.csv"
    table.write_text("dimension,prompt,model_a,model_b,label\nscene,a beach,x,y,B\nscene,a beach,x,y,0.5\n")
    assert [each.human for each in read_labels(table)] == [0.0, 0.5]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "left"}, "label is 'left'; write a, b or tie"),
        ({"label": True}, "label is True"),
        ({"label": 0.7}, "label is 0.7"),
        ({"label": None}, "label is None"),
        ({"model_b": "x"}, "both 'x'"),
        ({"prompt": " "}, "prompt is ' '"),
        ({"index": -1}, "index is -1"),
        ({"dimension": 3}, "dimension is 3"),
    ],
)
def test_wrong_labels_are_said_by_row(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    good = {"dimension": "scene", "prompt": "a beach", "model_a": "x", "model_b": "y", "label": "a"}
    path = tmp_path / "labels.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(good | change)}\n")
    with pytest.raises(ValueError, match=words) as caught:
        read_labels(path)
    assert "line 2" in str(caught.value)


def test_tables_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        read_labels(path)
    path.write_text('{"dimension": "scene", "prompt": "a", "model_a": "x", "model_b": "y", "winner": "a"}')
    with pytest.raises(ValueError, match="has no column label, which a table of labels needs"):
        read_labels(path)


def published(**changes: Any) -> dict[str, Any]:
    return {
        "prompt_en": "a beach",
        "scene_en": "beach",
        "question_en": "Which is closer to a beach?",
        "videos": {"lavie": "https://host/a/lavie/a%20beach-3.mp4?x=1", "cogvideo": "b/a beach-3.gif",
                   "modelscope": "m/a beach-3.mp4"},
        "human_anno": {
            "lavie": {"cogvideo": 1, "modelscope": 0.5},
            "cogvideo": {"lavie": 0, "modelscope": 0},
            "modelscope": {"lavie": 0.5, "cogvideo": 1},
        },
    } | changes  # fmt: skip


def test_the_published_layout(tmp_path: Path) -> None:
    path = tmp_path / "scene.json"
    path.write_text(json.dumps([published()]))
    found = read_labels(path)
    assert [(each.model_a, each.model_b, each.human) for each in found] == [
        ("lavie", "cogvideo", 1.0), ("lavie", "modelscope", 0.5), ("cogvideo", "modelscope", 0.0)]  # fmt: skip
    assert {each.dimension for each in found} == {"scene"} and found[0].clip_a == found[0].clip_b == "a beach-3"
    other = path.rename(tmp_path / "annotations.json")
    assert read_labels(other, "color")[0].dimension == "color"
    with pytest.raises(ValueError, match="which dimension is it of"):
        read_labels(other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"human_anno": {"lavie": {"cogvideo": 1}, "cogvideo": {"lavie": 1}}},
            "cogvideo against lavie is 1, and lavie",
        ),
        ({"human_anno": {"lavie": {"cogvideo": 0.7}}}, "is 0.7; it is 1, 0.5 or 0"),
        ({"human_anno": []}, "not both objects"),
        ({"videos": {"lavie": "a-0.mp4"}}, "no one clip of 'cogvideo'"),
        ({"prompt_en": ""}, "prompt_en is ''"),
    ],
)
def test_published_files_that_are_wrong(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = tmp_path / "scene.json"
    path.write_text(json.dumps([published(), published(**changes)]))
    with pytest.raises(ValueError, match=words) as caught:
        read_labels(path)
    assert "scene.json row 1" in str(caught.value), "counted from 0, as every .json table is"


def test_names_of_clips() -> None:
    assert clip_name("a/b/Dr. No walks-0.mp4") == "Dr. No walks-0" and clip_name("Dr. No walks-0") == "Dr. No walks-0"
    assert clip_name("C:\\clips\\x-1.GIF") == "x-1" and clip_name("https://h/a%20b-1.mp4?t=1") == "a b-1"


def test_scores_from_results_files(tmp_path: Path) -> None:
    file = tmp_path / "a_eval_results.json"
    rows = [{"video_path": f"v/a beach-{i}.mp4", "video_results": value} for i, value in enumerate((True, None, False))]
    file.write_text(json.dumps({"dynamic_degree": [0.5, rows]}))
    assert read_scores({"x": tmp_path}) == {"x": {"dynamic_degree": {"a beach-0": 1.0, "a beach-2": 0.0}}}
    rows.append({"video_path": "w/a beach-0.mp4", "video_results": 0.2})
    file.write_text(json.dumps({"dynamic_degree": [0.5, rows]}))
    with pytest.raises(ValueError, match=r"'a beach-0' twice, with 1\.0 and 0\.2"):
        read_scores({"x": file})


def test_the_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    comparisons, scores = world(12)
    named = []
    for model in MODELS:
        rows = [{"video_path": f"{clip}.mp4", "video_results": v} for clip, v in scores[model]["scene"].items()]
        (tmp_path / f"{model}.json").write_text(json.dumps({"scene": [0.5, rows]}))
        named.append(f"{model}={tmp_path / model}.json")
    labels = tmp_path / "labels.jsonl"
    lines = [
        {
            "dimension": "scene",
            "prompt": each.prompt,
            "model_a": each.model_a,
            "model_b": each.model_b,
            "label": each.human,
        }
        for each in comparisons
    ]
    labels.write_text("\n".join(map(json.dumps, lines)))

    def call(*words: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmalign", "vbench", "agreement", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capsys.readouterr()

    code, out, _ = call(labels, *named, "--json")
    assert code in (0, None) and json.loads(out) == json.loads(json.dumps(agreement(comparisons, scores)))
    out = call(labels, *named)[1]
    assert "pairwise accuracy" in out and "Pearson" in out and "called Spearman there, is 0.9407" in out
    code, _, err = call(labels, "lavie")
    assert code == 2 and "write MODEL=RESULTS, such as lavie=lavie" in err
