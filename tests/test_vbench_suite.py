"""Suites of VBench: their files row by row, and the names of their clips."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from public_kit import VBENCH, VBENCH_I2V, needs

from mmalign.vbench.clips import find_images, from_folder, from_table
from mmalign.vbench.crops import crop_box, crop_images
from mmalign.vbench.names import FORMS, Clips, spellings
from mmalign.vbench.suite import SuitePrompt, read_prompts, read_suite

ROWS: list[dict[str, Any]] = [
    {"prompt_en": "an alley", "dimension": ["scene", "background_consistency"],
     "auxiliary_info": {"scene": {"scene": {"scene": "alley"}}}},
    {"prompt_en": "a red bird", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a bus, in a still frame", "dimension": ["temporal_flickering"]},
    {"prompt_en": "a cat on the left of a dog", "dimension": ["spatial_relationship"],
     "auxiliary_info": {"spatial_relationship": {"spatial_relationship": {
         "object_a": "cat", "object_b": "dog", "relationship": "on the left of"}}}},
]  # fmt: skip


def put(folder: Path, rows: Any, name: str = "suite.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def prompts(*texts: str, dimension: str = "temporal_flickering") -> list[SuitePrompt]:
    return [SuitePrompt(text, (dimension,), {}) for text in texts]


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def taken(found: Any) -> dict[str, str]:
    """Name of the clip that each row got; rows whose clip is missing are left out."""
    return {row.sample: os.path.basename(row.media) for row in found.rows if row.sample not in found.missing}


# ------------------------------------------------------------------------------------------------ the file


@needs(VBENCH, VBENCH_I2V)
def test_the_published_suites_are_read() -> None:
    text, image = read_suite(VBENCH), read_suite(VBENCH_I2V)
    assert (len(text.rows), len(text.prompts), text.kind) == (946, 944, "text")
    assert (len(image.rows), len(image.prompts), image.kind) == (1118, 1118, "image")
    counts = {name: sum(name in each.dimensions for each in text.prompts) for name in text.dimensions}
    assert counts["subject_consistency"] == 72 and counts["human_action"] == 100 and counts["color"] == 85
    assert len(counts) == 16
    merged = next(each for each in text.prompts if each.prompt == "The bund Shanghai, oil painting")
    assert set(merged.dimensions) == {"appearance_style", "overall_consistency", "aesthetic_quality", "imaging_quality"}
    assert merged.aux == {"appearance_style": "oil painting"}
    left = next(each for each in text.prompts if "spatial_relationship" in each.dimensions)
    assert set(left.aux) == {"object_a", "object_b", "relationship"}


def test_what_a_row_says_is_flat(tmp_path: Path) -> None:
    suite = read_suite(put(tmp_path, ROWS))
    assert [each.aux for each in suite.prompts] == [
        {"scene": "alley"}, {"color": "red"}, {},
        {"object_a": "cat", "object_b": "dog", "relationship": "on the left of"},
    ]  # fmt: skip
    assert suite.dimensions == (
        "background_consistency",
        "temporal_flickering",
        "color",
        "spatial_relationship",
        "scene",
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("text", "row 4: is str, not an object"),
        ({"prompt": "x", "dimension": ["scene"]}, "row 4: prompt_en is missing. Did you mean 'prompt'?"),
        ({"prompt_en": " ", "dimension": ["human_action"]}, "row 4: prompt_en is ' '"),
        ({"prompt_en": "x", "dimension": "scene"}, "row 4: dimension is 'scene', not a list of names"),
        ({"prompt_en": "x", "dimension": ["temporal_flicker"]}, "Did you mean 'temporal_flickering'?"),
        ({"prompt_en": "x", "dimension": ["color"]}, "row 4: auxiliary_info.color.color is missing"),
        ({"prompt_en": "x", "dimension": ["color"], "auxiliary_info": {"color": {"colour": "red"}}},
         "auxiliary_info.color.color is missing. Did you mean 'colour'?"),
        ({"prompt_en": "x", "dimension": ["color"], "auxiliary_info": {"colour": {}}},
         "auxiliary_info: there is no dimension 'colour'. Did you mean 'color'?"),
        ({"prompt_en": "x", "dimension": ["color"], "auxiliary_info": []}, "auxiliary_info is [], not an object"),
        ({"prompt_en": "x", "dimension": ["i2v_subject"]}, "row 4: image_name is missing"),
        ({"prompt_en": "x", "dimension": ["human_action"], "image_name": "../x.jpg"}, "not the name of a file"),
        ({"prompt_en": "a red bird", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
         "row 4: the prompt 'a red bird' is that of row 1 too, and both are for color"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(ValueError) as error:
        read_suite(put(tmp_path, [*ROWS, row]))
    assert said in str(error.value) and "suite.json" in str(error.value)


def test_all_mistakes_are_told_at_once_up_to_ten(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        read_suite(put(tmp_path, [{"prompt_en": f"p{n}", "dimension": ["nothing"]} for n in range(25)]))
    lines = str(error.value).splitlines()
    assert len(lines) == 11 and "row 9" in lines[9] and lines[10] == "... and 15 more"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "no list of rows"),
        ('{"scene": [0.5, []]}', "file of results"),
        ('[{"prompt_en": "x", "dimension": ["Human_Anatomy"]}, {"prompt_en": "y", "dimension": ["Camera_Motion"]}]',
         "that of VBench-2.0"),
    ],
)  # fmt: skip
def test_another_file_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "suite.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        read_suite(path)
    assert "VBench_full_info.json" in str(error.value), "says where the right one is"


def test_a_suite_that_is_not_there_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not there\. The authors have it in their repository Vchitect/VBench"):
        read_suite(tmp_path / "VBench_full_info.json")
    with pytest.raises(ValueError, match="is a folder"):
        read_suite(tmp_path)


def test_prompts_of_a_category(tmp_path: Path) -> None:
    path = tmp_path / "animal.txt"
    path.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert read_prompts(path) == ("a cat", "a dog")
    path.write_text("a cat\na dog\na cat\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"animal\.txt:3: this prompt is line 1 too"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        read_prompts(path)
    with pytest.raises(ValueError, match="prompts_per_category"):
        read_prompts(tmp_path / "plant.txt")


# ------------------------------------------------------------------------------------------------ names


def test_exact_names_are_found_in_every_form(tmp_path: Path) -> None:
    names = [f"a cat-{number}{form}" for number, form in enumerate([".mp4", ".gif", ".png", ".webm", ".mkv"])]
    touch(tmp_path, *names)
    found = from_folder(tmp_path, prompts("a cat"))
    assert taken(found) == {f"a cat-{number}": name for number, name in enumerate(names)}
    row = found.rows[0]
    assert row.prompt == row.group == "a cat" and row.modality == "video" and os.path.isabs(str(row.media))
    assert {".mp4", ".gif", ".png", ""} <= set(FORMS)


def test_a_folder_of_frames_is_a_clip_and_other_folders_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "a cat-0", "0.png", "1.png")
    touch(tmp_path / "old", "a cat-1.mp4")
    found = from_folder(tmp_path, prompts("a cat"), samples=2)
    assert taken(found) == {"a cat-0": "a cat-0"} and found.others == ("old/",)


def test_a_clip_that_is_not_there_is_a_row_with_its_place(tmp_path: Path) -> None:
    touch(tmp_path, "a cat-0.webm", "a cat-1.webm", "notes.txt", "a horse-0.webm")
    found = from_folder(tmp_path, prompts("a cat", "a dog"), samples=2)
    assert [row.sample for row in found.rows] == ["a cat-0", "a cat-1", "a dog-0", "a dog-1"]
    assert found.missing == {"a dog-0", "a dog-1"} and str(found.rows[2].media) == str(tmp_path / "a dog-0.webm")
    assert found.coverage[0].expected == 4 and found.coverage[0].found == 2
    assert found.coverage[0].line() == "temporal_flickering: 2 of 4 clips, 2 missing: a dog-0, a dog-1"
    assert set(found.others) == {"notes.txt", "a horse-0.webm"}


def test_slashes_quotes_and_other_refused_signs(tmp_path: Path) -> None:
    texts = ['a 24/7 shop "open"', "an AC/DC sign", "what: a cat?", "it's a dog", "a (soccer) goal"]
    touch(tmp_path, 'a 24_7 shop "open"-0.mp4', "an AC-DC sign-0.mp4", "what_ a cat_-0.mp4", "it's a dog-0.mp4",
          "a (soccer) goal-0.mp4")  # fmt: skip
    found = from_folder(tmp_path, prompts(*texts), samples=1)
    assert not found.missing and not found.others
    assert found.rows[0].prompt == texts[0], "the prompt itself stays as the suite has it"


def test_a_spelling_that_means_two_prompts_is_neither(tmp_path: Path) -> None:
    touch(tmp_path, "a_b-0.mp4", "c-0.mp4")
    found = from_folder(tmp_path, prompts("a/b", "a:b", "c"), samples=1)
    assert found.missing == {"a/b-0", "a:b-0"}
    found = from_folder(tmp_path, prompts("a_b", "a:b", "c"), samples=1)
    assert taken(found) == {"a_b-0": "a_b-0.mp4", "c-0": "c-0.mp4"}, "an exact name is its own prompt's"


def test_prompts_too_long_for_names(tmp_path: Path) -> None:
    long = "a " + "very " * 50 + "long prompt"
    assert spellings(long)[-1] == long[:180]
    touch(tmp_path, f"{long[:180]}-0.mp4")
    assert taken(from_folder(tmp_path, prompts(long), samples=1)) == {f"{long}-0": f"{long[:180]}-0.mp4"}
    touch(tmp_path, "x-0.mp4")
    found = from_folder(tmp_path, prompts(long, long + " indeed", "x"), samples=1)
    assert len(found.missing) == 2, "both begin so"


def test_unicode_is_compared_however_it_is_written(tmp_path: Path) -> None:
    text = "rock-carved façades"
    touch(tmp_path, unicodedata.normalize("NFD", text) + "-0.mp4")
    assert not from_folder(tmp_path, prompts(unicodedata.normalize("NFC", text)), samples=1).missing


def test_case_is_exact_first_and_then_free(tmp_path: Path) -> None:
    touch(tmp_path, "a cat-0.mp4", "A Dog-0.MP4")
    assert taken(from_folder(tmp_path, prompts("A cat", "a dog"), samples=1)) == {
        "A cat-0": "a cat-0.mp4", "a dog-0": "A Dog-0.MP4"
    }  # fmt: skip
    both = touch(tmp_path / "both", "A fantasy landscape-0.mp4", "a fantasy landscape-0.mp4")
    if len(os.listdir(both)) == 2:  # on a file system that tells capitals from small letters
        found = from_folder(both, prompts("A fantasy landscape", "a fantasy landscape"), samples=1)
        assert taken(found) == {f"{name}-0": f"{name}-0.mp4" for name in ("A fantasy landscape", "a fantasy landscape")}


def test_one_file_for_two_prompts_that_differ_in_case_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "A fantasy landscape-0.mp4", "A fantasy landscape-1.mp4")
    with pytest.raises(ValueError, match="differ in case alone") as error:
        from_folder(tmp_path, prompts("a fantasy landscape", "A fantasy landscape"))
    assert "'A fantasy landscape'" in str(error.value) and "'a fantasy landscape'" in str(error.value)


def test_a_name_in_two_forms_is_taken_once(tmp_path: Path) -> None:
    touch(tmp_path, "a cat-0.gif", "a cat-0.mp4")
    found = from_folder(tmp_path, prompts("a cat"), samples=1)
    assert taken(found) == {"a cat-0": "a cat-0.mp4"} and found.others == ("a cat-0.gif",)
    assert "two forms" in found.notes[0]


@needs(VBENCH, VBENCH_I2V)
def test_every_name_of_the_published_suite_is_found(tmp_path: Path) -> None:
    suite = read_suite(VBENCH)
    touch(tmp_path, *(f"{each.prompt}-{number}.mp4" for each in suite.prompts for number in range(5)))
    found = from_folder(tmp_path, suite.prompts)
    assert len(found.rows) == 4720 and not found.missing and not found.others and not found.causes
    assert {each.dimension: each.expected for each in found.coverage}["color"] == 425
    assert all(os.path.basename(str(row.media)) == f"{row.sample}.mp4" for row in found.rows)


def test_a_folder_for_each_prompt_file(tmp_path: Path) -> None:
    """As the authors lay clips out; a prompt of two files has clips of its own in each."""
    asked = [SuitePrompt("the bund", ("appearance_style", "aesthetic_quality"), {})]
    for home in ("appearance_style", "overall_consistency"):
        touch(tmp_path / home, "the bund-0.mp4")
    found = from_folder(tmp_path, asked, samples=1)
    assert {row.sample: row.dimensions for row in found.rows} == {
        "appearance_style/the bund-0": ("appearance_style",), "overall_consistency/the bund-0": ("aesthetic_quality",)
    }  # fmt: skip
    assert not found.others and len({str(row.media) for row in found.rows}) == 2
    (tmp_path / "overall_consistency" / "the bund-0.mp4").unlink()
    (tmp_path / "overall_consistency").rmdir()
    found = from_folder(tmp_path, asked, samples=1)
    assert found.missing == {"overall_consistency/the bund-0"} and "no folder overall_consistency" in found.causes[0]


def test_a_folder_that_is_only_called_so_does_not_hide_the_clips(tmp_path: Path) -> None:
    touch(tmp_path, "the bund-0.mp4")
    touch(tmp_path / "scene", "old-0.mp4")
    found = from_folder(tmp_path, [SuitePrompt("the bund", ("scene",), {"scene": "bund"})], samples=1)
    assert taken(found) == {"the bund-0": "the bund-0.mp4"} and found.others == ("scene/",)


def test_the_static_filter_sees_all_clips(tmp_path: Path) -> None:
    touch(tmp_path, *(f"a cat-{number}.mp4" for number in range(12)))
    asked = [SuitePrompt("a cat", ("temporal_flickering", "motion_smoothness"), {})]
    plain, every = from_folder(tmp_path, asked), from_folder(tmp_path, asked, filtered=True)
    assert len(plain.rows) == 5 and "7 further clips of temporal_flickering" in plain.notes[0]
    assert len(every.rows) == 12 and not every.notes and not every.others
    assert every.rows[4].dimensions == ("temporal_flickering", "motion_smoothness", "static_filter")
    assert every.rows[5].dimensions == ("temporal_flickering", "static_filter")


# ------------------------------------------------------------------------------------------------ likely causes


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"a brown cat-{n}.mp4" for n in range(1, 6)], "numbers begin at 1"),
        ([f"a brown cat-{n}.wmv" for n in range(5)], "end in '.wmv'"),
        (["a brown cat.mp4"], "have no number"),
        ([f"a_brown_cat-{n}.mp4" for n in range(5)], "_ for spaces"),
        ([f"a horse number {n}-0.mp4" for n in range(9)], "is it another suite?"),
        (["a brown cat-0.mp4"], "2 prompts have fewer than 5 clips, mostly 1"),
    ],
)
def test_the_likely_cause_is_said(tmp_path: Path, names: list[str], said: str) -> None:
    touch(tmp_path, "a dog-0.mp4", *names)
    found = from_folder(tmp_path, prompts("a dog", "a brown cat"))
    assert any(said in each for each in found.causes), found.causes


def test_names_cut_at_another_length(tmp_path: Path) -> None:
    long = "a brown cat that walks slowly over the roof of an old house in the evening"
    touch(tmp_path, "a dog-0.mp4", f"{long[:50]}-0.mp4")
    found = from_folder(tmp_path, prompts("a dog", long), samples=1)
    assert "cut at 50 letters" in found.causes[0]


def test_a_folder_without_one_of_the_clips_is_a_mistake(tmp_path: Path) -> None:
    asked = prompts("a cat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is empty"):
        from_folder(tmp_path / "empty", asked)
    touch(tmp_path / "runs" / "clips", *(f"a cat-{number}.mp4" for number in range(5)))
    with pytest.raises(ValueError, match=r"clips holds 5; name that folder"):
        from_folder(tmp_path / "runs", asked)
    with pytest.raises(ValueError, match="is no folder"):
        from_folder(tmp_path / "nowhere", asked)
    touch(tmp_path / "texts", "a.txt")
    with pytest.raises(ValueError, match="holds no clip; it holds 1 other"):
        from_folder(tmp_path / "texts", asked)


# ------------------------------------------------------------------------------------------------ tables and images


def test_a_table_names_prompts(tmp_path: Path) -> None:
    lines = [
        {"media": "1.mp4", "prompt": "a cat", "seed": 3},
        {"media": "2.mp4", "prompt": "a cat", "dimensions": ["dynamic_degree"], "aux": {"extra": "x"}},
        {"media": "3.mp4", "prompt": "something else"},
        {"media": "4.mp4", "prompt": "a cat"},
    ]
    touch(tmp_path, "1.mp4", "2.mp4", "3.mp4", "4.mp4")
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(map(json.dumps, lines)))
    asked = [SuitePrompt("a cat", ("dynamic_degree", "color"), {"color": "red"}), *prompts("a dog")]
    found = from_table(table, asked, samples=2)
    assert [(row.sample, row.dimensions) for row in found.rows[:2]] == [
        ("1.mp4", ("dynamic_degree", "color")), ("2.mp4", ("dynamic_degree",))
    ]  # fmt: skip
    assert found.rows[0].seed == 3 and found.rows[1].aux == {"color": "red", "extra": "x"}
    assert found.missing == {"a dog (clip 1 of 2)", "a dog (clip 2 of 2)"} and found.others == ("4.mp4", "3.mp4")
    (tmp_path / "2.mp4").unlink()
    assert "2.mp4" in from_table(table, asked, samples=2).missing
    with pytest.raises(ValueError, match="no row has a prompt of the suite, such as 'a horse'"):
        from_table(table, prompts("a horse"))


def test_input_images_by_crop_ratio(tmp_path: Path) -> None:
    for ratio in ("1-1", "16-9"):
        touch(tmp_path / "crop" / ratio, "cat.jpg")
    assert find_images(tmp_path / "crop", ["cat.jpg"], "16:9") == {"cat.jpg": str(tmp_path / "crop/16-9/cat.jpg")}
    assert find_images(tmp_path / "crop" / "1-1", ["cat.jpg"], None) == {"cat.jpg": str(tmp_path / "crop/1-1/cat.jpg")}
    assert find_images(tmp_path / "crop" / "1-1", ["cat.jpg"], "1-1")
    with pytest.raises(ValueError, match="images of 1-1, 16-9; say which"):
        find_images(tmp_path / "crop", ["cat.jpg"], None)
    with pytest.raises(ValueError, match="no images of 8-5; there are 1-1, 16-9"):
        find_images(tmp_path / "crop", ["cat.jpg"], "8-5")
    with pytest.raises(ValueError, match=r"lacks 1 of 2 images, such as 'dog.jpg'"):
        find_images(tmp_path / "crop", ["cat.jpg", "dog.jpg"], "1-1")
    asked = [SuitePrompt("a cat", ("i2v_subject",), {}, "cat.jpg")]
    touch(tmp_path / "clips", "a cat-0.mp4")
    images = find_images(tmp_path / "crop", ["cat.jpg"], "1-1")
    assert from_folder(tmp_path / "clips", asked, samples=1, images=images).rows[0].reference == images["cat.jpg"]


def test_clips_are_listed_whatever_lies_there(tmp_path: Path) -> None:
    touch(tmp_path, ".hidden.mp4", "a-0.mp4", "Thumbs.db")
    held = Clips(tmp_path, ["a"])
    assert [clip.name for clip in held.files] == ["a-0.mp4"] and held.others == ["Thumbs.db"]
    assert held.numbers("a") == [0] and held.find("a", 1) is None


# ------------------------------------------------------------------------------------------------ crops

# Two entries of i2v-bench-info.json that the authors' README prints (vbench2_beta_i2v/README.md, section 2.3).
PRINTED = [
    {"file_name": "a beach.jpg",
     "first_crop": {"width": 4882, "height": 6102, "first_bbox": [0, 530, 4882, 4882]},
     "second_crop": {"width": 4882, "height": 4882, "second_bbox": [0, 1094, 4880, 2745]},
     "diff_ratio_crop": {"8-5": [0, 1345, 4880, 3050], "7-4": [0, 1584, 4879, 2788]}},
    {"file_name": "a squirrel.jpg",
     "first_crop": {"width": 3381, "height": 2254, "first_bbox": [0, 252, 3376, 1899]},
     "second_crop": {"width": 3376, "height": 1899, "second_bbox": [720, 0, 1899, 1899]},
     "diff_ratio_crop": {"8-5": [26, 252, 3032, 1895], "7-4": [3, 252, 3318, 1896]}},
]  # fmt: skip


@pytest.mark.parametrize("entry", PRINTED, ids=lambda entry: entry["file_name"])
@pytest.mark.parametrize("ratio", ["8-5", "7-4"])
def test_boxes_are_those_that_the_authors_print(entry: dict[str, Any], ratio: str) -> None:
    assert list(crop_box(entry, ratio)) == entry["diff_ratio_crop"][ratio]


def test_a_box_holds_the_inner_one_and_lies_in_the_outer_one() -> None:
    for entry in PRINTED:
        left, top, outer_width, outer_height = entry["first_crop"]["first_bbox"]
        x, y, width, height = entry["second_crop"]["second_bbox"]
        for ratio in ("1-1", "6-5", "5-4", "4:3", "3-2", "17-10"):
            wide, high = map(int, ratio.replace(":", "-").split("-"))
            box = crop_box(entry, ratio)
            assert box[2] * high == box[3] * wide, "exactly this ratio"
            assert left <= box[0] and top <= box[1]
            assert box[0] + box[2] <= left + outer_width and box[1] + box[3] <= top + outer_height
            if ratio == "1-1":
                continue
            slack = max(wide, high)  # the inner box was rounded to its own ratio
            assert box[0] <= left + x + slack and box[0] + box[2] >= left + x + width - slack
            assert box[1] <= top + y + slack and box[1] + box[3] >= top + y + height - slack


def test_images_are_cut_where_the_boxes_lie(tmp_path: Path) -> None:
    pixels = np.arange(60 * 40 * 3, dtype=np.uint8).reshape(60, 40, 3)
    (tmp_path / "origin").mkdir()
    Image.fromarray(pixels).save(tmp_path / "origin" / "a.png")
    entry = {"file_name": "a.png", "first_crop": {"first_bbox": [0, 10, 40, 40]},
             "second_crop": {"width": 40, "height": 40, "second_bbox": [0, 9, 40, 22]}}  # fmt: skip
    (tmp_path / "info.json").write_text(json.dumps([entry]))
    x, y, width, height = crop_box(entry, "5-4")
    folder = crop_images(tmp_path / "info.json", tmp_path / "origin", tmp_path / "crop", "5:4")
    assert folder == tmp_path / "crop" / "5-4" and (width, height) == (40, 32)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "a.png")), pixels[y : y + 32, x : x + 40])
    assert find_images(tmp_path / "crop", ["a.png"], "5-4")


def test_mistakes_with_crops(tmp_path: Path) -> None:
    for ratio, said in (("2-1", "does not lie between"), ("4-5", "does not lie between"), ("wide", "not of the form")):
        with pytest.raises(ValueError, match=said):
            crop_box(PRINTED[0], ratio)
    with pytest.raises(ValueError, match="boxes are as in"):
        crop_box({"file_name": "x"}, "5-4")
    (tmp_path / "info.json").write_text(json.dumps(PRINTED))
    with pytest.raises(ValueError, match=r"lacks 2 of 2 originals, such as 'a beach\.jpg'"):
        crop_images(tmp_path / "info.json", tmp_path, tmp_path / "crop", "5-4")
    (tmp_path / "info.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"is no i2v-bench-info\.json"):
        crop_images(tmp_path / "info.json", tmp_path, tmp_path / "crop", "5-4")
