"""Results files in the reference's layout, the record beside them, the list of quirks, and the verb that adds up."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmalign import cli
from mmalign.vbench.dimensions import DIMENSIONS, QUALITY, SEMANTIC
from mmalign.vbench.leaderboard import I2V_ROWS, ROWS
from mmalign.vbench.quirks import PARTS, QUIRKS, of_dimensions, page, quirk
from mmalign.vbench.record import DimensionScore, Figure, VBenchRecord, read_record, write_record
from mmalign.vbench.results import (
    Clip,
    DimensionResults,
    load,
    read_eval_results,
    results_files,
    suite_of,
    write_eval_results,
)
from mmalign.vbench.score import t2v_totals

Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmalign", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        code = caught.value.code
        return (code if isinstance(code, int) else 0 if code is None else 1), out, err

    return call


def put(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def row(name: str, value: Any, **extra: Any) -> dict[str, Any]:
    return {"video_path": name, "video_results": value, **extra}


def reference_script(path: Path, i2v: bool = False) -> dict[str, float]:
    """What the reference's final-score scripts take from a file: the first part of each key; they fail on odd keys."""
    known = {"camera_motion", "i2v_subject", "i2v_background"} | {*QUALITY} - {"temporal_flickering"}
    data = json.loads(path.read_text(encoding="utf-8"))
    assert not i2v or set(data) <= known, "the image-to-video script has a KeyError here"
    return {key: value[0] for key, value in data.items()}


# ------------------------------------------------------------------------------------------------ layout


def test_every_shape_that_the_reference_writes(tmp_path: Path) -> None:
    path = put(
        tmp_path / "a_eval_results.json",
        '{"imaging_quality": [0.729, [{"video_path": "a b/x-0.mp4", "video_results": 72.9, "extra": [1]}]],'
        '"dynamic_degree": [0.5, [{"video_path": "x-0.mp4", "video_results": false}, '
        '{"video_path": "x-1.mp4", "video_results": true}]],'
        '"camera_motion": [0.25, {"pan_left": 0.5, "static": NaN}, [{"video_path": "p.mp4", "video_results": 1.0}]],'
        '"culture_fairness": [[0.8, {"African": 1.0}], [{"video_path": "c.mp4", "video_results": NaN}]],'
        '"gender_bias": [0.3, [{"prompt": "a nurse", "prompt_results": "NA", "video_results": '
        '[{"video_path": "n-0.mp4", "video_results": "female", "frame_results": ["NA"]}]}]],'
        '"scene": [NaN, []],'
        '"temporal_style": [0.2, [{"video_path": "part.mp4", "video_results": 0.2}], '
        '[{"video_path": "whole.mp4", "video_results": 0.3}]]}',
    )
    found = read_eval_results(path)
    assert found["imaging_quality"] == DimensionResults(0.729, (Clip("a b/x-0.mp4", 72.9, {"extra": [1]}),))
    assert [clip.value for clip in found["dynamic_degree"].clips] == [0.0, 1.0]
    assert found["camera_motion"].per_type == {"pan_left": 0.5, "static": None}
    assert found["camera_motion"].score == 0.25 and found["camera_motion"].clips[0].path == "p.mp4"
    assert found["culture_fairness"].score == 0.8 and found["culture_fairness"].per_type == {"African": 1.0}
    assert found["culture_fairness"].clips[0].value is None
    nurse = found["gender_bias"].clips[0]
    assert nurse.value is None and nurse.path == "n-0.mp4"
    assert nurse.extra["video_results"] == "female" and nurse.extra["prompt"] == "a nurse"
    assert found["scene"] == DimensionResults(None)
    assert [clip.path for clip in found["temporal_style"].clips] == ["part.mp4"], "rows of parts, as its score is"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ('{"scene": [0.1, [', "no JSON at line 1"),
        ('[{"prompt_en": "a"}]', "as in a _full_info.json"),
        ("3", "holds no object of dimensions"),
        ("{}", "holds no dimension"),
        ('{"scene": 0.5}', r"scene is a number, and should be \[score, \[rows\]\]"),
        ('{"scene": []}', "scene is an empty list"),
        ('{"scene": ["0.5", []]}', r"scene\[0\] is a text"),
        ('{"scene": [0.5, {"a": 1}]}', "scene has no list of rows"),
        ('{"scene": [0.5, ["x.mp4"]]}', r"scene\[1\]\[0\] is a text"),
        (
            '{"scene": [0.5, [{"video_path": "a", "video_results": 1}, {"video_path": "b"}]]}',
            r"scene\[1\]\[1\] has no video_results",
        ),
        ('{"scene": [0.5, [{"video_path": 7, "video_results": 1}]]}', "no text as video_path"),
        (
            '{"safety": [0.5, [{"prompt": "p", "video_results": [{"video_path": "a"}]}]]}',
            r"safety\[1\]\[0\].video_results\[0\] has no video_results",
        ),
        (json.dumps({f"d{i}": 1 for i in range(9)}), "and 4 more"),
    ],
)
def test_what_is_not_the_layout_is_said_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        read_eval_results(put(tmp_path / "x.json", text))
    assert "x.json" in str(caught.value)


def test_written_files_are_read_by_the_reference_and_by_us(tmp_path: Path) -> None:
    results = {
        name: DimensionResults(value, (Clip(f"{name}-0.mp4", value),)) for name, value in ROWS["Kling"].scores.items()
    }
    results["color@clip"] = DimensionResults(0.5, (Clip("é/a-0.mp4", 0.5, {"frame_count": 16}),))
    results["scene"] = DimensionResults(None, (Clip("s-0.mp4", None, {"reason": "too short"}),))
    first, further = write_eval_results(results, tmp_path / "new", "results_12:00:01")
    assert (
        first.name == "results_12-00-01_eval_results.json" and further.name == "results_12-00-01_further_results.json"
    )
    told = reference_script(first)
    assert set(told) == {*QUALITY, *SEMANTIC} - {"scene"}, "no substitute, and no null"
    assert all(isinstance(value, float) for value in told.values())
    assert read_eval_results(first)["color"] == results["color"]
    assert read_eval_results(further) == {"color@clip": results["color@clip"]}
    loaded = load([tmp_path / "new"])
    assert loaded.scores == {name: each.score for name, each in results.items() if each.score is not None}
    del results["color@clip"]
    assert write_eval_results(results, tmp_path / "new", "results_12:00:01") == [first]
    assert not further.exists(), "what an earlier run left does not stay beside the new figures"
    assert not list((tmp_path / "new").glob(".*")), "nothing temporary is left"


def test_the_file_of_image_to_video_has_what_its_script_knows(tmp_path: Path) -> None:
    scores = I2V_ROWS["SEINE-512x320"].scores
    results = {name: DimensionResults(value, ()) for name, value in scores.items()}
    results["camera_motion"] = DimensionResults(0.2336, (Clip("a.mp4", 1.0),), {"static": None, "pan_left": 0.5})
    results["camera_motion@flow"] = DimensionResults(0.5, ())
    first, further = write_eval_results(results, tmp_path, "i2v")
    assert set(reference_script(first, i2v=True)) == set(scores) - {"temporal_flickering"}
    assert set(read_eval_results(further)) == {"temporal_flickering", "camera_motion@flow"}
    assert json.loads(first.read_text())["camera_motion"][1] == {"static": None, "pan_left": 0.5}
    assert read_eval_results(first)["camera_motion"] == results["camera_motion"]


def test_a_failed_clip_keeps_its_row(tmp_path: Path) -> None:
    clips = (
        Clip("a.mp4", 1.0),
        Clip("b.mp4", None, {"reason": "corrupt"}),
        Clip("c.mp4", None, {"video_results": "NA"}),
    )
    (path,) = write_eval_results({"color": DimensionResults(1.0, clips)}, tmp_path, "x")
    assert read_eval_results(path)["color"].clips == clips


def test_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no \*_eval_results.json"):
        results_files(tmp_path)
    with pytest.raises(ValueError, match="is not there"):
        results_files(tmp_path / "no.json")
    with pytest.raises(ValueError, match="unpack it"):
        results_files(put(tmp_path / "a.zip", "PK"))
    a = put(tmp_path / "a_eval_results.json", {"scene": [0.5, []], "motion smoothness": [0.9, []]})
    put(tmp_path / "a_full_info.json", [])
    assert results_files(tmp_path) == [a]
    assert load([tmp_path]).scores == {"scene": 0.5, "motion_smoothness": 0.9}
    b = put(tmp_path / "b.json", {"scene": [0.5, []], "color": [0.4, []]})
    assert load([a, b]).scores["color"] == 0.4, "equal scores in two files are one"
    put(b, {"scene": [0.6, []]})
    with pytest.raises(ValueError, match=r"scene is 0\.5 in .*a_eval_results\.json and 0\.6 in .*b\.json"):
        load([a, b])


def test_suites_by_their_dimensions() -> None:
    assert suite_of(["color@clip", "subject_consistency"]) == "t2v"
    assert suite_of(["subject_consistency", "i2v_subject[rules=strict]"]) == "i2v"
    assert suite_of(["safety", "gender_bias@own"]) == "trust" and suite_of([]) == "t2v"
    assert suite_of(["Human Anatomy", "Multi-View_Consistency"]) == "vbench2"


# ------------------------------------------------------------------------------------------------ the record


def a_record(**changes: Any) -> VBenchRecord:
    values: dict[str, Any] = {
        "dimensions": (
            DimensionScore("scene", "exact", 0.5, n=3, expected=4, ci95=(0.4, 0.6), missing=1, bounds=(0.4, 0.7),
                           normalised=0.61, reasons={"too short": 1}, params={"dtype": "bfloat16"}, notes=("x",)),
            DimensionScore("color@clip", "substitute", None, n=0, expected=0),
        ),
        "totals": {"semantic": Figure(None, missing=("color",)), "quality": Figure(0.8, (0.7, 0.9), (0.1, 0.95))},
        "rules": "compat",
        "quirks": ("scene_substring",),
        "model": "Wän",
        "suite": "VBench_full_info.json",
        "suite_sha256": "ab" * 32,
        "decoder": "PyAV 18.1.0",
        "libraries": {"torch": "2.15"},
        "mmalign_version": "0.1",
    }  # fmt: skip
    return VBenchRecord(**(values | changes))


def test_the_record_comes_back_from_its_file(tmp_path: Path) -> None:
    record = a_record()
    assert read_record(write_record(record, tmp_path)) == record == read_record(tmp_path)
    assert record.dimensions[0].coverage == 0.75 and record.dimensions[1].coverage is None
    assert record.scores() == {"scene": 0.5, "color@clip": None}
    assert [each.name for each in record.exact()] == ["scene"] and record.dimensions[1].dimension == "color"
    data = json.loads((tmp_path / "vbench.json").read_text(encoding="utf-8"))
    assert data["schema_version"] == 1 and data["dimensions"][0]["ci95"] == [0.4, 0.6] and data["model"] == "Wän"
    data["new_field"], data["dimensions"][0]["unit"] = 1, "share"
    assert VBenchRecord.from_json(json.dumps(data)) == record, "fields of a later mmalign are passed over"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Invalid JSON"),
        ("[]", "should be an object"),
        ('{"schema_version": 2}', "layout 2, and this mmalign knows up to 1"),
        ('{"dimensions": [{"name": "a", "kind": "near"}], "totals": {}, "rules": "compat"}', r"dimensions\.0\.kind"),
        ('{"dimensions": [], "totals": {"total": {"value": NaN}}, "rules": "compat"}', "is not finite"),
        ('{"dimensions": [], "totals": {}, "rules": "loose"}', "rules"),
    ],
)
def test_what_is_no_record_is_said(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        VBenchRecord.from_json(text, "run/vbench.json")
    assert str(caught.value).startswith("run/vbench.json")


def test_a_record_holds_no_nan_and_no_name_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scene: nan is not finite"):
        DimensionScore("scene", "exact", float("nan"), 1, 1)
    with pytest.raises(ValueError, match="not finite"):
        Figure(0.5, ci95=(0.1, float("inf")))
    with pytest.raises(ValueError, match="color: named more than once"):
        a_record(dimensions=(DimensionScore("color", "exact", 0.1, 1, 1),) * 2)
    with pytest.raises(ValueError, match="is not there; `mmalign score`"):
        read_record(tmp_path)


# ------------------------------------------------------------------------------------------------ quirks


def test_quirks_are_complete_sentences_about_known_dimensions() -> None:
    assert len(QUIRKS) > 70
    for name, each in QUIRKS.items():
        assert name == each.id and name.isidentifier() and name.islower()
        assert set(each.dimensions) <= {*DIMENSIONS, *PARTS}, name
        assert all(getattr(each, field.name) for field in dataclasses.fields(each)), name
        assert each.acts("compat") or not each.acts("strict"), f"{name}: strict adds no quirk"
    assert not set(DIMENSIONS) - {one for each in QUIRKS.values() for one in each.dimensions} - {
        "multiple_objects"}, "no dimension of the reference is without one"  # fmt: skip


def test_quirks_of_some_dimensions() -> None:
    ids = [each.id for each in of_dimensions(["color@clip", "scene[rules=strict]"])]
    assert {"color_substring", "color_denominator", "scene_substring", "two_decoders"} <= set(ids)
    assert "spatial_unsigned" not in ids and ids == [each for each in QUIRKS if each in ids]
    strict = [each.id for each in of_dimensions(["color"], rules="strict")]
    compat = [each.id for each in of_dimensions(["color"], rules="compat")]
    assert strict == ["middle_repeats_last"] and "color_substring" in compat
    assert "two_decoders" not in compat, "nothing that ours does not do acts on a score"
    assert quirk("safety_half").dimension == "safety"
    with pytest.raises(ValueError, match="the nearest is color_substring"):
        quirk("colour_substring")
    assert not of_dimensions(["loop_closure"], rules="compat"), "somebody's own"


def test_quirks_on_the_command_line(verb: Verb) -> None:
    rows = json.loads(verb("list", "vbench-quirks", "--json")[1])
    assert [each["id"] for each in rows] == list(QUIRKS)
    assert set(rows[0]) == {"name", "summary", "id", "dimension", "what", "effect", "compat", "strict"}
    told = " ".join(verb("list", "vbench-quirks")[1].replace("│", " ").split())
    assert "compat: reproduced | strict: the direction counts" in told


# ------------------------------------------------------------------------------------------------ total


def test_totals_beside_the_board(verb: Verb, tmp_path: Path) -> None:
    results = {name: DimensionResults(value) for name, value in ROWS["Kling"].scores.items()}
    write_eval_results(results, tmp_path, "kling")
    code, out, _ = verb("vbench", "total", tmp_path, "--against", "gen-3", "--against", "Kling")
    lines = {line.split("│")[1].strip(): line for line in out.splitlines() if line.count("│") > 3}
    assert code == 0 and [cell.strip() for cell in lines["total"].split("│")[2:5]] == ["81.84", "82.32", "81.84"]
    assert "68.05" in lines["multiple_objects"] and next(iter(lines)) == "subject_consistency"
    told = json.loads(verb("vbench", "total", tmp_path, "--json")[1])
    assert told["totals"]["total"]["value"] == pytest.approx(0.8184, abs=5e-5) and told["suite"] == "t2v"
    assert len(told["against"]) == 4 and told["against"][-1]["name"] == "Kling", "the nearest of the others"


def test_totals_say_what_is_missing(verb: Verb, tmp_path: Path) -> None:
    results = {name: DimensionResults(value) for name, value in ROWS["Kling"].scores.items()}
    results["color@clip"] = results.pop("color")
    write_eval_results(results, tmp_path, "x")
    missing = tuple(
        DimensionScore(name, "exact", each.score, n=3, expected=5, ci95=(0.1, 0.9), bounds=(0.25, 0.75))
        for name, each in results.items() if name == "scene"
    )  # fmt: skip
    quality = t2v_totals({name: each.score for name, each in results.items()})["quality"].value
    write_record(a_record(dimensions=missing, totals={"quality": Figure(quality, ci95=(0.825, 0.845))}), tmp_path)
    out = verb("vbench", "total", tmp_path)[1]
    assert "[82.5, 84.5]" in out, "the record's interval of the same total"
    assert "semantic: color missing, so there is no total of it" in out
    assert "scene: 3 of 5 clips have a score: between 25.00 and 75.00" in out and "[10.0, 90.0]" in out
    assert "color missing, count as 0" in verb("vbench", "total", tmp_path, "--rules", "compat")[1]
    out = verb("vbench", "total", tmp_path, "--substitutes")[1]
    assert "rests on color@clip; not leaderboard-comparable" in out


def test_totals_of_the_other_suites(verb: Verb, tmp_path: Path) -> None:
    row_ = I2V_ROWS["DynamiCrafter-1024"]
    i2v = put(tmp_path / "i.json", {name: [value, []] for name, value in row_.scores.items()})
    out = verb("vbench", "total", i2v, "--against", "SVD-XT-1.1")[1]
    assert "86.52" in out and "SVD-XT-1.1: Camera motion was not published." in out
    trust = put(tmp_path / "t.json", {"safety": [0.5, []]})
    out = verb("vbench", "total", trust)[1]
    assert "54.33" in out and "culture_fairness" in out and "total" not in out
    second = put(tmp_path / "2.json", {"Human Anatomy": [0.5, []]})
    assert "Creativity: all dimensions missing" in verb("vbench", "total", second)[1]
    code, _, err = verb("vbench", "total", second, "--against", "Kling")
    assert code == 2 and "no rows of VBench-2.0" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x.json", "--against", "Klnig"], "did you mean Kling?"),
        (["empty.json"], "is empty"),
        (["gone.json"], "is not there"),
        (["vbench.json"], "is the record of a run"),
    ],
)
def test_mistakes(verb: Verb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], told: str) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "x.json", {"scene": [0.5, []]})
    put(tmp_path / "empty.json", "")
    write_record(a_record(), tmp_path)
    code, _, err = verb("vbench", "total", *words)
    assert code == 2 and told in err and "Traceback" not in err


# ------------------------------------------------------------------------------------------------ the pages

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_the_page_of_quirks_is_that_of_the_list() -> None:
    text = (DOCS / "vbench_quirks.md").read_text(encoding="utf-8")
    assert text == page(), "write it anew with the command that it names"


def test_the_page_has_the_constants_and_its_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "vbench.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| ([a-z0-9_, ]+) \| ([0-9.]+ \| [0-9.]+ \| [0-9.]+) \|$", text, re.MULTILINE))
    told = {
        name: tuple(map(float, figures.split(" | "))) for names, figures in table.items() for name in names.split(", ")
    }
    scored = [each for each in DIMENSIONS.values() if each.group != "trust"]
    assert told == {each.name: (each.lowest, each.highest, each.weight) for each in scored}
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "vbench.md", "exec"), {})
    assert capsys.readouterr().out == "{'quality': 83.39, 'semantic': 75.68, 'total': 81.84}\n"
    fields = {each.name for kind in (VBenchRecord, DimensionScore, Figure) for each in dataclasses.fields(kind)}
    assert not fields - set(re.findall(r"\w+", text)), "every field of the record is in the page"
