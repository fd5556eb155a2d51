"""mmalign vbench static-filter: which clips are chosen, what is written, stops, and what is not overwritten."""

import json
import shutil

import pytest
from raft_kit import bright_file, flat
from typer.testing import CliRunner

from mmalign import static_filter
from mmalign.cli import app
from mmalign.media import write_video
from mmalign.results import read_json, read_results
from mmalign.static_filter import Settings, clips_of, suite_prompts
from mmalign.tables import read_media_table

WHITE, BLACK = 255, 20
PROMPTS = ["a still lake", 'a cup, on a "table"-2', "nobody drew this"]
ROWS = [
    *({"prompt_en": prompt, "dimension": ["temporal_flickering", "imaging_quality"]} for prompt in PROMPTS),
    {"prompt_en": "a dog runs", "dimension": ["dynamic_degree"]},
]
MOVING = {"a still lake": {1, 11}, PROMPTS[1]: {0, 1, 2}}  # the numbers of clips that move


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve clips of the first prompt, four of the second, and files that belong to none."""
    home = tmp_path_factory.mktemp("clips")
    for level in (WHITE, BLACK):
        write_video(home / f"a dog runs-{level}.mp4", flat([level] * 5), 8.0, lossless=True)
    for prompt, count in ((PROMPTS[0], 12), (PROMPTS[1], 4)):
        for number in range(count):
            level = WHITE if number in MOVING[prompt] else BLACK
            # Shades differ, so that each file has its own content.
            write_video(home / f"{prompt}-{number}.mp4", flat([level - number % 12] * 5), 8.0, lossless=True)
    (home / "a still lake-3.txt").write_text("no clip")
    return home


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return bright_file(tmp_path_factory.mktemp("weights"))


def settings(folder, suite, output, weights, **params):
    params = {"checkpoint": str(weights), "early": True, **params}
    return Settings(folder, suite, output, 5, params, {"device": "cpu"})


def chosen(output):
    return {prompt: [path.name for path in paths] for prompt, paths in output.static.items()}


def test_the_first_five_static_clips_in_the_order_of_their_names(folder, suite, tmp_path, weights):
    done = CliRunner().invoke(
        app,
        ["vbench", "static-filter", str(folder), "--suite", str(suite), "--output", str(tmp_path / "out"),
         "--weights", str(weights), "--device", "cpu"],
        catch_exceptions=False,
    )  # fmt: skip
    assert done.exit_code == 0
    assert (
        "6 of 15 clips (40 %): 1 of 3 prompts have 5; 14 clips were measured, 3 files belong to no prompt"
        in done.stdout
    )
    assert '1 of 5, of 4 clips: a cup, on a "table"-2' in done.stdout and "0 of 5, of 0 clips" in done.stdout
    kept = [f"a still lake-{number}.mp4" for number in (0, 10, 2, 3, 4)]
    videos = tmp_path / "out" / "filtered_videos"
    for place, name in enumerate(kept):
        assert (videos / f"a still lake-{place}.mp4").read_bytes() == (folder / name).read_bytes()
    assert len(list(videos.iterdir())) == 6
    record = read_json(tmp_path / "out" / "filtered_static_video.json")
    assert {prompt: each["static_count"] for prompt, each in record.items()} == dict(
        zip(PROMPTS, (5, 1, 0), strict=True)
    )
    assert record[PROMPTS[0]]["static_path"] == [str(folder / name) for name in kept]
    rows = read_media_table(tmp_path / "out" / "table.jsonl")
    assert {row.prompt for row in rows} == set(PROMPTS[:2]) and len(rows) == 6
    assert all(row.dimensions == ("temporal_flickering",) for row in rows)
    measured = {row["sample"] for row in read_results(tmp_path / "out" / "scores").rows}
    assert "a still lake-7.mp4" in measured and not {"a still lake-8.mp4", "a still lake-9.mp4"} & measured


def test_strict_goes_by_number_and_a_second_run_computes_nothing(folder, suite, tmp_path, weights):
    found = static_filter.run(settings(folder, suite, tmp_path / "out", weights, rules="strict"))
    assert chosen(found)[PROMPTS[0]] == [f"a still lake-{number}.mp4" for number in (0, 2, 3, 4, 5)]
    videos = tmp_path / "out" / "filtered_videos"
    before = {file.name: file.stat().st_mtime_ns for file in videos.iterdir()}
    again = static_filter.run(settings(folder, suite, tmp_path / "out", weights, rules="strict"))
    assert chosen(again) == chosen(found)
    assert read_json(tmp_path / "out" / "scores" / "run.json")["computed"] == 0
    assert {file.name: file.stat().st_mtime_ns for file in videos.iterdir()} == before


def test_a_stopped_run_goes_on_where_it_was(folder, suite, tmp_path, weights, monkeypatch):
    rounds = []
    real, copy = static_filter.score, shutil.copyfile

    def stop(config):
        if len(rounds) == 1:
            raise KeyboardInterrupt
        rounds.append(real(config))
        return rounds[-1]

    want = settings(folder, suite, tmp_path / "out", weights)
    monkeypatch.setattr(static_filter, "score", stop)
    with pytest.raises(KeyboardInterrupt):
        static_filter.run(want)
    assert not (tmp_path / "out" / "filtered_videos").exists()
    computed = []

    def counted(config):
        found = real(config)
        computed.append(read_json(found / "run.json")["computed"])
        return found

    def full(source, target):
        if "lake-2" in str(target):
            raise OSError(28, "No space left on device", str(target))
        return copy(source, target)

    monkeypatch.setattr(static_filter, "score", counted)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        static_filter.run(want)
    assert computed == [0, 5], "the first round is there; five clips more of the first prompt were not"
    videos = tmp_path / "out" / "filtered_videos"
    assert {file.name for file in videos.iterdir()} == {"a still lake-0.mp4", "a still lake-1.mp4"}
    (videos / ".a still lake-2.cut.mp4").write_bytes(b"half")  # what a kill leaves behind
    monkeypatch.setattr(shutil, "copyfile", copy)
    found = static_filter.run(want)
    assert computed[2:] == [0, 0] and len(found.static[PROMPTS[0]]) == 5
    assert len([file for file in videos.iterdir() if not file.name.startswith(".")]) == 6


def test_nothing_is_replaced_by_another_clip(folder, suite, tmp_path, weights):
    want = settings(folder, suite, tmp_path / "out", weights)
    static_filter.run(want)
    videos = tmp_path / "out" / "filtered_videos"
    shutil.copyfile(folder / "a still lake-1.mp4", videos / "a still lake-4.mp4")
    with pytest.raises(ValueError, match=r"lake-4\.mp4 is not what this run chose \(1 such file\), and is not"):
        static_filter.run(want)
    shutil.copyfile(folder / "a still lake-4.mp4", videos / "a still lake-4.mp4")
    static_filter.run(want)
    (videos / "mine.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"mine\.mp4 is not what this run chose"):
        static_filter.run(want)


def test_a_clip_that_cannot_be_measured_counts_as_moving_and_is_said(folder, suite, tmp_path, weights):
    home = tmp_path / "clips"
    home.mkdir()
    (home / "a still lake-0.mp4").write_bytes((folder / "a still lake-0.mp4").read_bytes()[:200])
    write_video(home / "a still lake-1.mp4", flat([BLACK] * 5, 64), 8.0, lossless=True)
    shutil.copyfile(folder / "a still lake-5.mp4", home / "a still lake-2.mp4")
    found = static_filter.run(settings(home, suite, tmp_path / "out", weights))
    assert chosen(found)[PROMPTS[0]] == ["a still lake-2.mp4"] and found.measured == 1
    assert sorted(found.failed) == ["a still lake-0.mp4", "a still lake-1.mp4"]
    assert "too small for VBench's RAFT" in found.failed["a still lake-1.mp4"]
    assert any("not measured, counted as moving: a still lake-0.mp4" in line for line in found.account())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("{}", "holds dict, not a list"),
        ('[{"prompt_en": "a", "dimension": ["scene"]}, {"prompt_en": 3}]', "row 1: has no text prompt_en"),
        ('[{"prompt_en": "a", "dimension": ["scene"]}]', "no prompt is for temporal_flickering"),
    ],
)
def test_a_wrong_suite_is_said_by_row(tmp_path, text, message):
    (tmp_path / "suite.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        suite_prompts(tmp_path / "suite.json")


def test_a_folder_without_clips_of_the_suite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        clips_of(tmp_path / "none", PROMPTS, "compat")
    (tmp_path / "a dog runs-0.mp4").touch()
    (tmp_path / ".hidden").touch()
    with pytest.raises(ValueError, match=r"none of its 1 files is a clip called after .*'a still lake-0\.mp4'"):
        clips_of(tmp_path, PROMPTS, "compat")
    (tmp_path / "a still lake.MP4").touch()  # VBench takes a name without number too
    assert clips_of(tmp_path, PROMPTS, "compat") == (
        {PROMPTS[0]: ["a still lake.MP4"], PROMPTS[1]: [], PROMPTS[2]: []},
        1,
    )


def test_weights_that_are_not_there_are_asked_for_by_the_name_of_the_option(folder, suite, tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(tmp_path / "none"))
    done = CliRunner().invoke(app, ["vbench", "static-filter", str(folder), "--suite", str(suite), "-o", str(tmp_path)])
    assert "give as --weights the file or its folder" in str(done.exception or done.output)
    assert "checkpoint" not in str(done.exception or done.output)
