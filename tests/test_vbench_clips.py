"""Which clips `mmalign score` with a block `vbench` takes: folders, tables, suites; and settings that make no sense."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vbench_run_kit import PROMPTS, config, standard, vbench_home

from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.jobs_vbench import VBench
from mmalign.media import write_image
from mmalign.results import read_results
from mmalign.score import plan_for, run
from mmalign.score_vbench import find
from mmalign.vbench.record import read_record
from mmalign.vbench.results import read_eval_results


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vbench_home(tmp_path_factory.mktemp("vbench"))


# ------------------------------------------------------------------------------------------------ any clips


@pytest.mark.usefixtures("plugins")
def test_a_plain_folder_is_scored_in_custom_mode(home: Path, tmp_path: Path) -> None:
    folder = run(config(home / "clips", tmp_path / "out", "temporal_flickering", "brightness"))
    record = read_record(folder)
    assert record.mode == "custom" and record.suite is None and record.dimensions[0].n == 9
    assert [each.name for each in record.dimensions] == ["temporal_flickering"], "others are in summary.json"
    assert {row["group"] for row in read_results(folder).rows} == {p.replace("/", "_") for p in PROMPTS}
    assert "brightness" in json.loads((folder / "summary.json").read_text())["evaluators"]


def test_prompts_of_custom_clips(home: Path, tmp_path: Path) -> None:
    clips = home / "clips"
    names = find(clips, VBench(prompts="names"), [])
    assert {row.prompt for row in names.rows} == {prompt.replace("/", "_") for prompt in PROMPTS}
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({file.name: f"of {file.stem}" for file in clips.iterdir()}))
    found = find(clips, VBench(prompts=path), [])
    assert {row.prompt for row in found.rows} == {f"of {file.stem}" for file in clips.iterdir()}
    path.write_text(json.dumps({"a red bird-0.mp4": "x"}))
    with pytest.raises(ValueError, match=r"has no prompt for 'a 24_7 shop-0\.mp4'"):
        find(clips, VBench(prompts=path), [])
    path.write_text("[]")
    with pytest.raises(ValueError, match="object of texts"):
        find(clips, VBench(prompts=path), [])


def test_folders_of_frames_and_pictures_beside_clips(home: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    shutil.copytree(home / "clips", clips)
    for number in range(3):
        (clips / "walk").mkdir(exist_ok=True)
        (clips / "walk" / f"{number:03d}.png").write_bytes(b"x")
    (clips / "preview.png").write_bytes(b"x")
    found = find(clips, VBench(), [])
    assert len(found.rows) == 10 and found.rows[-1].sample == "walk" and found.rows[-1].modality == "video"
    assert found.others == ("preview.png",)
    for file in clips.glob("*.mp4"):
        file.unlink()
    shutil.rmtree(clips / "walk")
    with pytest.raises(ValueError, match=r"holds no clip; it holds 1 pictures, such as 'preview\.png'"):
        find(clips, VBench(), [])


def test_clips_of_every_form_are_scored(tmp_path: Path) -> None:
    """A folder of frames and a GIF as any clip; one picture is one frame, which has no pair to compare."""
    clips = tmp_path / "clips"
    frames = np.random.default_rng(0).integers(0, 255, (5, 24, 32, 3), dtype=np.uint8)
    for number, frame in enumerate(frames):
        write_image(clips / "a cat-0" / f"{number}.png", frame)
    grey = np.repeat(frames.mean(-1, keepdims=True).astype(np.uint8) // 16 * 16, 3, axis=-1)
    pictures = [Image.fromarray(frame) for frame in grey]
    pictures[0].save(clips / "a cat-1.gif", save_all=True, append_images=pictures[1:], duration=125)
    write_image(clips / "a cat-2.png", frames[0])
    (tmp_path / "suite.json").write_text(json.dumps([{"prompt_en": "a cat", "dimension": ["temporal_flickering"]}]))
    block = {"suite": tmp_path / "suite.json", "samples": 3, "on_error": "skip"}
    folder = run(config(clips, tmp_path / "out", block=block))
    scores = {row["sample"]: row["score"] for row in read_results(folder).rows}
    for sample, held in (("a cat-0", frames), ("a cat-1", grey)):
        assert scores[sample] == pytest.approx((255 - np.abs(np.diff(held.astype(float), axis=0)).mean()) / 255)
    (dimension,) = read_record(folder).dimensions
    assert (dimension.n, dimension.failed, dimension.missing) == (2, 1, 0) and scores["a cat-2"] is None


def test_a_category_by_its_prompts(home: Path, tmp_path: Path) -> None:
    (tmp_path / "things.txt").write_text("\n".join(PROMPTS[:2]))
    block = {"category": tmp_path / "things.txt", "samples": 3}
    record = read_record(run(config(home / "clips", tmp_path / "out", block=block)))
    assert record.mode == "category" and record.dimensions[0].expected == 6
    info = json.loads((tmp_path / "out" / "vbench_full_info.json").read_text())
    assert [row["prompt_en"] for row in info] == PROMPTS[:2]


def test_a_table_names_the_prompts_of_a_suite(home: Path, tmp_path: Path) -> None:
    lines = [
        json.dumps({"media": str(path), "prompt": PROMPTS[number % 3]})
        for number, path in enumerate(sorted((home / "clips").iterdir()))
    ]
    (tmp_path / "table.jsonl").write_text("\n".join(lines))
    record = read_record(run(config(tmp_path / "table.jsonl", tmp_path / "out", block=standard(home))))
    assert record.dimensions[0].n == 9 and record.dimensions[0].missing == 0


def test_a_name_that_is_no_utf8_stops_nothing(home: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    try:
        shutil.copy(home / "clips" / "a red bird-0.mp4", os.path.join(os.fsencode(clips), b"caf\xe9-0.mp4"))
    except OSError:
        pytest.skip("this file system takes no such name")
    record = read_record(run(config(clips, tmp_path / "out")))
    assert record.dimensions[0].n == 1 and len(read_eval_results(tmp_path / "out" / "vbench_eval_results.json")) == 1


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"mode": "standard"}, "vbench.mode: standard needs vbench.suite"),
        ({"mode": "custom", "suite": "x.json"}, "vbench.suite has no part in vbench.mode: custom"),
        ({"suite": "x.json", "category": "x.txt"}, "vbench.category has no part"),
        ({"suite": "x.json", "prompts": "names"}, "vbench.prompts is for mode custom"),
        ({"suite": "x.json", "ratio": "1-1"}, "give their folder"),
        ({"images": "x"}, "belong to the image-to-video suite"),
        ({"name": "a:b"}, "begins names of files"),
        ({"name": "../x"}, "begins names of files"),
        ({"on_error": "ignore"}, "'error', 'skip' or 'zero'"),
    ],
)
def test_settings_that_make_no_sense(block: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="1 validation error") as error:
        VBench(**block)
    assert said in str(error.value)


def test_table_or_media() -> None:
    spec = (EvaluatorSpec(name="temporal_flickering"),)
    for given in ({}, {"table": Path("a"), "media": Path("b")}):
        with pytest.raises(ValueError, match="exactly one of table and media"):
            ScoreConfig(output=Path("o"), evaluators=spec, **given)
    assert ScoreConfig(output=Path("o"), evaluators=spec, media=Path("b")).source == Path("b")


def test_dimensions_that_are_not_there(home: Path, tmp_path: Path) -> None:
    clips = home / "clips"
    with pytest.raises(ValueError, match=r"no evaluator of this config measures 'temporal_flicker'. Did you mean"):
        plan_for(config(clips, tmp_path, block=standard(home, dimensions=("temporal_flicker",))))
    with pytest.raises(ValueError, match="has no prompt for color"):
        find(clips, VBench(**standard(home)), ["temporal_flickering", "color@clip"])
    with pytest.raises(ValueError, match=r"whose suite is vbench2_i2v_full_info\.json"):
        find(clips, VBench(**standard(home)), ["i2v_subject"])
    with pytest.raises(ValueError, match=r"none of the 15 clips, such as 'a person is riding a bike-0\.mp4'"):
        rows = [{"prompt_en": f"{p} is riding a bike", "dimension": ["human_action"]} for p in ("a person", "b", "c")]
        (tmp_path / "other.json").write_text(json.dumps(rows))
        find(clips, VBench(suite=tmp_path / "other.json"), ["human_action"])


def test_the_suite_of_images(home: Path, tmp_path: Path) -> None:
    rows = [{"prompt_en": "a red bird", "dimension": ["i2v_subject", "temporal_flickering"], "image_name": "bird.jpg"}]
    (tmp_path / "i2v.json").write_text(json.dumps(rows))
    block = {"suite": tmp_path / "i2v.json", "samples": 3}
    with pytest.raises(ValueError, match="is the suite of image-to-video, and i2v_subject compare with its images"):
        find(home / "clips", VBench(**block), ["i2v_subject"])
    assert find(home / "clips", VBench(**block), ["temporal_flickering"]).rows[0].reference is None
    (tmp_path / "crop" / "1-1").mkdir(parents=True)
    (tmp_path / "crop" / "1-1" / "bird.jpg").write_bytes(b"x")
    found = find(home / "clips", VBench(**block, images=tmp_path / "crop"), ["i2v_subject"])
    assert found.rows[0].reference == str(tmp_path / "crop" / "1-1" / "bird.jpg")
    with pytest.raises(ValueError, match="is the suite of text-to-video, which has no images"):
        find(home / "clips", VBench(**standard(home), images=tmp_path / "crop"), ["temporal_flickering"])
