"""Reward benchmarks are read from the folders in which they are published, and nothing is lost on the way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import reward_kit as kit
from public_kit import GECKO, GENEVAL, IMAGE_REWARD, needs

from mmalign.jobs_bench import BENCHMARK_NAMES, PROTOCOL_NAMES
from mmalign.protocols.benchmarks import BENCHMARKS
from mmalign.protocols.published import PUBLISHED, published
from mmalign.protocols.sets import RewardSet
from mmalign.protocols.suites import cut_grids
from mmalign.records import MediaRef
from mmalign.reward_scores import missing_media


def read(benchmark: str, folder: Path, **changes: object) -> RewardSet:
    settings = kit.config(benchmark, folder, folder / "out", **changes)
    return BENCHMARKS[benchmark].read(settings)


def test_names_are_those_of_the_schema() -> None:
    assert set(BENCHMARKS) == set(BENCHMARK_NAMES)
    named = {protocol for one in BENCHMARKS.values() for protocol in one.protocols}
    assert named == set(PROTOCOL_NAMES)
    for each in PUBLISHED:
        assert each.protocol in BENCHMARKS[each.benchmark].protocols, each
        assert 0 <= each.figure <= 100 and each.source
    assert {each.scorer for each in published("hpdv2", "hpdv2_inversions")} >= {"HPS v2.1", "one person"}


def test_imagereward(tmp_path: Path) -> None:
    found = read("imagereward", kit.imagereward(tmp_path / "ir", pictures=True))
    assert len(found.items) == 18 and len(found.groups) == 6 and found.axes == ("overall",)
    assert found.items[0].sample == "part/0000/a.png" and not missing_media(found)
    assert Path(str(found.items[0].media)) == tmp_path / "ir/test_images/part/0000/a.png"
    assert found.groups[1].human["overall"] == (-1, -2, -2) and found.groups[1].unit == "row 1"
    by_file = read("imagereward", tmp_path / "ir" / "test.json")
    assert [item.sample for item in by_file.items] == [item.sample for item in found.items]


@needs(GECKO, GENEVAL, IMAGE_REWARD)
def test_imagereward_as_published() -> None:
    found = read("imagereward", IMAGE_REWARD)
    assert len(found.items) == 2720 and len(found.groups) == 466 and not found.dropped
    assert len({group.unit for group in found.groups}) == 466 and len({group.prompt for group in found.groups}) == 463
    assert len(missing_media(found)) == 2720


def test_hpdv2(tmp_path: Path) -> None:
    found = read("hpdv2", kit.hpdv2(tmp_path / "hpd"))
    assert [group.samples for group in found.groups] == [("0.jpg", "1.jpg", "2.jpg"), ("3.jpg", "4.jpg")]
    assert found.groups[1].human["overall"] == (-2, -1) and not missing_media(found)
    assert found.groups[0].people == ((-1, -2, -3), (-1, -3, -2)) and found.groups[1].people == ()
    assert [each.reason for each in found.dropped] == ["no label"]
    (tmp_path / "hpd/test/1.jpg").unlink()
    assert missing_media(read("hpdv2", tmp_path / "hpd")) == ["1.jpg"]


def test_pickapic(tmp_path: Path) -> None:
    found = read("pickapic", kit.pickapic(tmp_path / "pick"))
    assert [group.validation for group in found.groups] == [False] * 3 + [True] * 2
    assert [group.human["overall"] for group in found.groups[:3]] == [(1, 0), (0, 1), (0, 0)]
    assert found.items[0].sample == "test_unique-0-0" and found.items[0].model == "a"
    assert isinstance(found.items[0].media, MediaRef) and found.items[0].media.read().startswith(b"\x89PNG")
    assert [each.reason for each in found.dropped] == ["no label"] and not missing_media(found)
    test = read("pickapic", next((tmp_path / "pick/data").glob("test*")))
    assert len(test.groups) == 3 and not any(group.validation for group in test.groups)


def test_every_file_of_a_split_is_read(tmp_path: Path) -> None:
    """Larger splits lie in several files."""
    folder = kit.pickapic(tmp_path / "pick") / "data"
    (whole,) = folder.glob("test_unique*")
    table = pq.read_table(whole)
    whole.unlink()
    for shard in (0, 1):
        pq.write_table(table.slice(2 * shard, 2), folder / f"test_unique-0000{shard}-of-00002-abc.parquet")
    found = read("pickapic", tmp_path / "pick")
    assert [group.validation for group in found.groups] == [False] * 3 + [True] * 2
    one = read("pickapic", folder / "test_unique-00000-of-00002-abc.parquet")
    assert len(one.groups) == 2  # a file that is named is read alone


def test_pickapic_without_pictures(tmp_path: Path) -> None:
    folder = kit.pickapic(tmp_path / "pick", pictures=False)
    kit.plain(tmp_path / "images/test_unique-0-0.png", 9)
    found = read("pickapic", folder, media=tmp_path / "images")
    assert Path(str(found.items[0].media)) == tmp_path / "images/test_unique-0-0.png"
    assert missing_media(found)[0] == "test_unique-0-1" and len(missing_media(found)) == 9


def test_videogen(tmp_path: Path) -> None:
    rows = [("a", "b", ("A", "B", "same", "A")), ("a", "c", ("B", "B", "?", "same")), ("d", "e", ("A",) * 4)]
    found = read("videogen_rewardbench", kit.videogen(tmp_path / "v", rows))
    assert [item.sample for item in found.items] == [f"videos/{name}.mp4" for name in "abcde"]  # each clip once
    assert found.axes == ("Overall", "VQ", "MQ", "TA")
    first, second, _ = found.groups
    assert first.human == {"Overall": (1, 0), "VQ": (1, 0), "MQ": (0, 1), "TA": (0, 0)}
    assert all(math.isnan(value) for value in second.human["TA"]) and second.human["Overall"] == (0, 0)
    clip = found.items[1]
    assert (clip.modality, clip.fps, clip.num_frames, clip.model) == ("video", 8.0, 16, "m2")
    assert clip.prompt == "prompt, 0" and Path(str(clip.media)) == tmp_path / "v/videos/b.mp4"


def test_videogen_as_its_script_calls_it(tmp_path: Path) -> None:
    """VideoAlign's eval_videogen_rewardbench.py reads `ALL` where the data set's card has `Overall`."""
    folder = kit.videogen(tmp_path, [("a", "b", ("A", "B", "same", "B"))])
    table = folder / "videogen-rewardbench.csv"
    expected = read("videogen_rewardbench", folder)
    table.write_text(table.read_text().replace("Overall", "ALL"))
    assert read("videogen_rewardbench", folder).groups == expected.groups
    assert expected.groups[0].human["Overall"] == (0, 1)


def test_one_medium_under_two_prompts_is_two_items(tmp_path: Path) -> None:
    rows = [("a", "b", ("A",) * 4), ("a", "c", ("A",) * 4), ("a", "d", ("B",) * 4)]  # the third has another prompt
    forward = read("videogen_rewardbench", kit.videogen(tmp_path / "1", rows))
    names = [item.sample for item in forward.items if "/a." in item.sample]
    assert len(names) == 2 and all(name.startswith("videos/a.mp4#") for name in names)
    assert forward.groups[0].samples[0] == forward.groups[1].samples[0] != forward.groups[2].samples[0]


@pytest.mark.parametrize("task", ["image", "edit", "video"])
def test_genai_bench(task: str, tmp_path: Path) -> None:
    folder = {"image": "image_generation", "edit": "image_edition", "video": "video_generation"}[task]
    votes = ["leftvote", "rightvote", "tievote", "bothbad_vote", "nonsense"]
    found = read(f"genai_bench_{task}", kit.genai_bench(tmp_path, votes, folder))
    # The shards hold every second row: 0, 2, 4 (left, tie, nonsense), then 1, 3.
    assert [group.vote for group in found.groups] == [0, 2, 1, 3]
    assert [group.human["overall"] for group in found.groups] == [(1, 0), (0, 0), (0, 1), (0, 0)]
    assert found.groups[2].samples == ("00003/left", "00003/right")
    assert [each.reason for each in found.dropped] == ["unknown label"]
    item = found.items[0]
    if task == "video":
        assert Path(str(item.media)).name == "0-left.mp4" and item.modality == "video"
    else:
        assert isinstance(item.media, MediaRef) and item.media.read()
    if task == "edit":
        assert item.prompt == "target_prompt 0" and item.aux["instruct_prompt"] == "instruct_prompt 0"
        assert isinstance(item.reference, MediaRef)
        other = read("genai_bench_edit", tmp_path, edit_prompt="instruct_prompt")
        assert other.items[0].prompt == "instruct_prompt 0"
    with pytest.raises(ValueError, match=r"no .*test-\*\.parquet"):
        read(f"genai_bench_{task}", tmp_path, split="test")


def test_cmu(tmp_path: Path) -> None:
    ratings = {"00000": {"DALLE_3": [5, 4, 4], "SDXL_Base": [2, 1, 3]}, "00001": {"DALLE_3": [3]}}
    found = read("genai_bench_cmu", kit.cmu(tmp_path, ratings, {"basic": [0, 1], "counting": [1]}))
    assert found.groups[0].human["overall"] == pytest.approx((13 / 3, 2.0))
    assert found.groups[0].labels == ("basic",) and found.groups[1].labels == ("basic", "counting")
    assert found.items[0].sample == "DALLE_3/00000.jpeg" and found.items[0].model == "DALLE_3"
    assert Path(str(found.items[1].media)) == tmp_path / "SDXL_Base/00000.jpeg"
    (tmp_path / "genai_image.json").write_text("[1]")
    with pytest.raises(ValueError, match="not an object by index"):
        read("genai_bench_cmu", tmp_path)


# ------------------------------------------------------------------------------------------------ suites


def test_hpsv2_benchmark(tmp_path: Path) -> None:
    folder = kit.styles(tmp_path / "hpd")
    kit.plain(tmp_path / "mine/anime/00001.jpg", 1)
    kit.plain(tmp_path / "mine/photo/00000.png", 1)
    found = read("hpsv2_benchmark", folder, media=tmp_path / "mine")
    assert len(found.items) == 640 and found.places[161] == {"style": "concept-art", "index": 1}
    assert found.items[1].sample == "anime/00001.jpg" and found.items[1].prompt == "anime 1"
    absent = missing_media(found)
    assert len(absent) == 638 and absent[0] == "anime/00000.jpg" and "photo/00000.jpg" not in absent
    drawn = read("hpsv2_drawbench", folder, media=tmp_path)
    assert [item.prompt for item in drawn.items] == ["a cat", "a dog"]
    with pytest.raises(ValueError, match="media is missing: name the folder of the generated pictures"):
        read("hpsv2_benchmark", folder, evaluators=[{"name": "colours"}])
    (folder / "benchmark/photo.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="not a list of prompts"):
        read("hpsv2_benchmark", folder)


def metadata(index: int, tag: str) -> str:
    return json.dumps({"tag": tag, "include": [{"class": "cat", "count": index + 1}], "prompt": f"cats {index}"}) + "\n"


def test_geneval_folders_and_file(tmp_path: Path) -> None:
    for index, tag in enumerate(("counting", "position")):
        folder = tmp_path / "out" / f"{index:05d}"
        for number in range(5 - 2 * index):  # five pictures of the first, three of the second
            kit.plain(folder / "samples" / f"{number:04d}.png", number)
        (folder / "metadata.jsonl").write_text(metadata(index, tag))
        kit.plain(folder / "grid.png", 0)
    found = read("geneval", tmp_path / "out")
    names = [item.sample for item in found.items]
    assert names[:5] == [f"00000/samples/{n:04d}.png" for n in range(5)] and len(names) == 9
    assert missing_media(found) == ["00001/samples/0003.png"]
    assert found.places[-1] == {"task": "position", "prompt": "00001"} and found.items[0].aux["tag"] == "counting"
    (tmp_path / "evaluation_metadata.jsonl").write_text(metadata(0, "counting") + metadata(1, "position"))
    other = read("geneval", tmp_path / "evaluation_metadata.jsonl", media=tmp_path / "out")
    assert [item.sample for item in other.items] == names and [item.aux for item in other.items] == [
        item.aux for item in found.items
    ]
    (tmp_path / "out/00001/metadata.jsonl").write_text('{"prompt": "no tag"}\n')
    with pytest.raises(ValueError, match="no prompt or no tag"):
        read("geneval", tmp_path / "out")


@needs(GECKO, GENEVAL, IMAGE_REWARD)
def test_geneval_as_published() -> None:
    found = read("geneval", GENEVAL)
    tasks = [place["task"] for place in found.places[::4]]
    assert len(found.items) == 4 * 553 and len(set(tasks)) == 6 and tasks.count("position") == 100


def test_dpg_bench(tmp_path: Path) -> None:
    (tmp_path / "dpg_bench.csv").write_text(kit.DPG)
    found = read("dpg_bench", tmp_path, media=tmp_path / "pictures")
    assert [item.sample for item in found.items] == ["one/0/1", "one/0/2", "one/0/3", "two/0/1"]
    assert found.items[1].prompt == "Is the cat red?"
    assert [place["parents"] for place in found.places] == [(), (0,), (0, 1), ()]
    assert found.places[2]["category"] == "relation - spatial"
    assert missing_media(found)[0] == "one/0/1" and len(missing_media(found)) == 4


def test_dpg_bench_grids_are_cut(tmp_path: Path) -> None:
    (tmp_path / "dpg_bench.csv").write_text(kit.DPG)
    import numpy as np

    from mmalign.media import read_image, write_image

    grid = np.zeros((20, 28, 3), np.uint8)
    for number, (top, left) in enumerate(((0, 0), (0, 14), (10, 0), (10, 14))):
        grid[top : top + 10, left : left + 14] = 50 + number
    (tmp_path / "pictures").mkdir()
    write_image(tmp_path / "pictures/one.png", grid)
    settings = kit.config("dpg_bench", tmp_path, tmp_path / "out", media=tmp_path / "pictures", grid={"pictures": 4})
    found = BENCHMARKS["dpg_bench"].read(settings)
    assert len(found.items) == 16 and found.items[4].sample == "one/1/2"
    cut_grids(found, settings)
    assert missing_media(found) == [f"two/{crop}/1" for crop in range(4)]
    for item, place in zip(found.items[:12], found.places[:12], strict=True):
        picture = read_image(str(item.media))
        assert picture.shape == (10, 14, 3) and (picture == 50 + place["crop"]).all()
    large = settings.model_copy(update={"grid": settings.grid.model_copy(update={"side": 12})})  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="too small for picture 2 of a grid"):
        cut_grids(BENCHMARKS["dpg_bench"].read(large), large)


def test_dpg_bench_faults(tmp_path: Path) -> None:
    head, _, rest = kit.DPG.partition("\n")
    (tmp_path / "dpg_bench.csv").write_text(f"{head}\nremark,,,see,none,,,,\n{rest}")
    with pytest.raises(ValueError, match="set skip_first_row: true"):
        read("dpg_bench", tmp_path)
    assert len(read("dpg_bench", tmp_path, skip_first_row=True).items) == 4
    (tmp_path / "dpg_bench.csv").write_text(kit.DPG)
    cut = read("dpg_bench", tmp_path, skip_first_row=True)  # a parent is gone, as in the authors' code
    assert [each.reason for each in cut.dropped] == ["unknown parent"] and len(cut.items) == 1


def test_dpg_bench_takes_the_last_of_two_rows_of_a_question(tmp_path: Path) -> None:
    (tmp_path / "dpg_bench.csv").write_text(
        kit.DPG + "two,text,,1,0,entity,whole,entity - whole (cow),Is there a cow?\n"
    )
    found = read("dpg_bench", tmp_path)
    assert [item.prompt for item in found.items if item.sample == "two/0/1"] == ["Is there a cow?"]
    assert [(each.reason, each.detail[:10]) for each in found.dropped] == [("question twice", "item two h")]


@needs(GECKO, GENEVAL, IMAGE_REWARD)
def test_gecko_as_published(tmp_path: Path) -> None:
    kit.plain(tmp_path / "0.png", 1)
    kit.plain(tmp_path / "1/a.png", 1)
    kit.plain(tmp_path / "1/b.png", 1)
    found = read("gecko", GECKO, media=tmp_path)
    assert len(found.items) == 1547 and len({place["prompt"] for place in found.places}) == 1546
    assert [item.sample for item in found.items[:4]] == ["0", "1/a.png", "1/b.png", "2"]
    assert len(missing_media(found)) == 1544
    assert found.places[0] == {
        "prompt": "0",
        "part": ("Gecko(S)",),
        "category": ("ne",),
        "skill": ("Gecko(S) ne/landmarks",),
        "reliable_below": (),
    }
    assert found.places[1]["reliable_below"] == ("0.3", "0.35", "0.4", "0.45", "0.5")
    skills = {place["skill"][0] for place in found.places}
    assert "Gecko(R) stanford_paragraph" in skills and "Gecko(S) att/count" in skills
    assert sum("0.5" in place["reliable_below"] for place in found.places) == 1037 + 1


@pytest.mark.parametrize(
    ("benchmark", "file", "text", "message"),
    [
        ("imagereward", "test.json", '[{"prompt": "p", "generatons": []}]', "has no column generations.*generatons"),
        ("imagereward", "test.json", '[{"prompt": "p", "image_path": [], "rank": []}]', "This is hpdv2's file"),
        ("hpdv2", "test.json", '[{"prompt": "p", "generations": [], "ranking": []}]', "This is imagereward's file"),
        ("hpdv2", "test.json", '[{"prompt": "p"}]', "has no column image_path, rank"),
        ("videogen_rewardbench", "videogen-rewardbench.csv", "path_A,prompt\na,b\n", "has no column .*path_B"),
        ("gecko", "prompts.csv", "prompt,prompt_id\na,1\n", "has no column dataset_id"),
        ("dpg_bench", "dpg_bench.csv", "item_id\na\n", "has no column dependency"),
    ],
)
def test_a_missing_column_is_named(benchmark: str, file: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        read(benchmark, tmp_path)


@pytest.mark.parametrize("benchmark", BENCHMARK_NAMES)
def test_a_folder_of_something_else_is_refused(benchmark: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mmalign list benchmarks"):
        read(benchmark, tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read(benchmark, tmp_path / "nowhere")
