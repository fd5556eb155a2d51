"""Preference tables in every public format, and what becomes of bad rows."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from public_kit import IMAGE_REWARD, needs
from table_kit import pairs, png, put_images, put_json

from mmalign import tables
from mmalign.media import read_image, write_video
from mmalign.tables import (
    FORMATS,
    Dropped,
    MediaRef,
    PreferenceRow,
    PreferenceTable,
    captioned,
    read_preferences,
    write_preferences,
)

PICKAPIC = pa.schema(
    [
        ("are_different", pa.bool_()),
        ("best_image_uid", pa.string()),
        ("caption", pa.string()),
        ("created_at", pa.timestamp("ns")),
        ("has_label", pa.bool_()),
        ("image_0_uid", pa.string()),
        ("image_0_url", pa.string()),
        ("image_1_uid", pa.string()),
        ("image_1_url", pa.string()),
        ("jpg_0", pa.binary()),
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),
        ("label_1", pa.float64()),
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("ranking_id", pa.int64()),
        ("user_id", pa.int64()),
        ("num_example_per_prompt", pa.int64()),
        ("__index_level_0__", pa.int64()),
    ]
)


def pickapic_row(number: int, label: float | None, **more: Any) -> dict[str, Any]:
    row = dict.fromkeys(PICKAPIC.names)
    row |= {
        "are_different": True,
        "caption": f"caption {number}",
        "has_label": label is not None,
        "jpg_0": png(2 * number),
        "jpg_1": png(2 * number + 1),
        "label_0": label,
        "label_1": None if label is None else 1 - label,
        "ranking_id": number,
        "user_id": 100 + number % 2,
        "num_example_per_prompt": 1,
        "__index_level_0__": number,
    }
    return row | more


def put_pickapic(path: Path, rows: list[dict[str, Any]], schema: pa.Schema = PICKAPIC) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=2)
    return path


def shades(pair: tables.Pair) -> tuple[int, int]:
    """Which of the images of `png(shade)` won, and which lost."""
    return int(read_image(pair.winner)[0, 0, 0]), int(read_image(pair.loser)[0, 0, 0])


def test_pickapic(tmp_path: Path) -> None:
    rows = [pickapic_row(0, 1.0), pickapic_row(1, 0.0), pickapic_row(2, 0.5), pickapic_row(3, None)]
    rows += [pickapic_row(4, 1.0, has_label=False), pickapic_row(5, float("nan"), has_label=True)]
    rows += [pickapic_row(6, 0.3), pickapic_row(7, 1.0, label_1=1.0), pickapic_row(8, 1.0, caption=None)]
    table = read_preferences(put_pickapic(tmp_path / "train.parquet", rows))
    assert [row.label for row in table.rows] == [{"overall": "A"}, {"overall": "B"}, {"overall": "same"}]
    assert [row.prompt for row in table.rows] == ["caption 0", "caption 1", "caption 2"]
    assert [row.user_id for row in table.rows] == ["100", "101", "100"]
    assert table.rows[1].origin == "train.parquet row 1" and table.rows[1].source == "pickapic"
    assert [shades(pair) for pair in pairs(table)] == [(0, 1), (3, 2)]
    assert [each.reason for each in table.dropped] == [
        *["no label"] * 3,
        "unknown label",
        "contradicting labels",
        "no prompt",
    ]
    assert table.summary() == (
        "kept 3 of 9 rows; dropped 6: 3 no label, 1 unknown label (train.parquet row 6), "
        "1 contradicting labels (train.parquet row 7), 1 no prompt (train.parquet row 8)"
    )


def test_pickapic_in_many_files_and_with_image_structs(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    put_pickapic(tmp_path / "data" / "train-00001-of-00002.parquet", [pickapic_row(3, 0.0)])
    put_pickapic(tmp_path / "data" / "train-00000-of-00002.parquet", [pickapic_row(n, 1.0) for n in range(3)])
    table = read_preferences(tmp_path / "data")
    assert [shades(pair) for pair in pairs(table)] == [(0, 1), (2, 3), (4, 5), (7, 6)]
    assert table.rows[3].origin == "train-00001-of-00002.parquet row 0"
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = PICKAPIC.set(9, pa.field("jpg_0", image)).set(10, pa.field("jpg_1", image))
    row = pickapic_row(5, 0.0)
    row |= {name: {"bytes": row[name], "path": None} for name in ("jpg_0", "jpg_1")}
    table = read_preferences(put_pickapic(tmp_path / "hub.parquet", [row], schema))
    assert [shades(pair) for pair in pairs(table)] == [(11, 10)]


def test_undecodable_bytes_go_with_their_caption_and_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [pickapic_row(n, 1.0) for n in range(12)]
    rows[3] |= {"has_label": False}
    rows[7]["jpg_1"] = rows[7]["jpg_1"][:40]
    with caplog.at_level(logging.INFO, logger="mmalign.tables"):
        table = read_preferences(put_pickapic(tmp_path / "train.parquet", rows))
    expected = "kept 10 of 12 rows; dropped 2: 1 no label, 1 undecodable image (train.parquet row 7 jpg_1)"
    assert table.summary() == expected and expected in caplog.text
    assert "truncated or damaged" in table.dropped[1].detail
    for pair in pairs(table):  # nobody's caption slid onto another's pictures
        number = int(pair.prompt.split()[1])
        assert shades(pair) == (2 * number, 2 * number + 1)
    assert len(read_preferences(tmp_path / "train.parquet", verify=False).rows) == 11


def test_nothing_but_plain_columns_is_read_without_verification(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put_pickapic(tmp_path / "train.parquet", [pickapic_row(n, 1.0) for n in range(6)])
    asked: set[str] = set()
    original = pq.ParquetFile.read_row_group

    def spy(self: pq.ParquetFile, group: int, columns: Any = None, **more: Any) -> pa.Table:
        asked.update(columns)
        return original(self, group, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    read_preferences(path, verify=False)
    assert asked == set(PICKAPIC.names) - {"jpg_0", "jpg_1"}


def test_hpdv2_train(tmp_path: Path) -> None:
    put_images(tmp_path, "train/00.jpg", "train/01.jpg", "train/02.jpg")
    rows = [
        {"human_preference": [1, 0], "prompt": "p", "file_path": ["00.jpg", "01.jpg"], "user_hash": "u1"},
        {"human_preference": [0, 1], "prompt": "q", "file_path": ["00.jpg", "02.jpg"], "user_hash": "u2"},
        {"human_preference": [1, 1], "prompt": "r", "file_path": ["00.jpg", "02.jpg"], "user_hash": "u2"},
        {"human_preference": [0, 1, 0], "prompt": "s", "file_path": ["00.jpg", "01.jpg", "02.jpg"]},
        {"human_preference": [1], "prompt": "t", "file_path": ["00.jpg", "01.jpg"]},
    ]
    table = read_preferences(put_json(tmp_path / "train.json", rows))
    assert [row.label for row in table.rows[:3]] == [{"overall": "A"}, {"overall": "B"}, {"overall": "same"}]
    assert table.rows[1].user_id == "u2"
    assert [(pair.prompt, *shades(pair)) for pair in pairs(table)] == [
        ("p", 0, 1),
        ("q", 2, 0),
        ("s", 1, 0),
        ("s", 1, 2),
    ]
    assert [(each.reason, each.origin) for each in table.dropped] == [("bad label", "train.json row 4")]


def test_hpdv2_test(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg"]
    put_images(tmp_path, *(f"test/{name}" for name in names))
    votes = [{"rank": [1, 2, 3], "user_hash": "u1"}, {"rank": [2, 1, 3], "user_hash": "u2"}]
    row = {"prompt": "p", "image_path": names, "rank": [1.5, 1.5, 3], "raw_annotations": votes}
    path = put_json(tmp_path / "test.json", [row])
    table = read_preferences(path)
    assert table.rows[0].rank == (1.5, 1.5, 3.0)
    assert [shades(pair) for pair in pairs(table)] == [(0, 2), (1, 2)]
    assert [pair.label for pair in pairs(table, ties="soft")] == [0.5, 1.0, 1.0]
    single = read_preferences(path, format="hpdv2_annotators")
    assert [(row.user_id, row.rank) for row in single.rows] == [("u1", (1, 2, 3)), ("u2", (2, 1, 3))]


def test_hpdv3_always_prefers_path1(tmp_path: Path) -> None:
    put_images(tmp_path, "images/1.jpg", "images/2.jpg")
    row = {"prompt": "p", "path1": "images/2.jpg", "path2": "images/1.jpg", "model1": "x", "model2": "y"}
    row |= {"source": "hpdv3_train", "confidence": 0.5, "choice_dist": [3, 9]}  # more votes for path2, and yet
    table = read_preferences(put_json(tmp_path / "train.json", [row, row | {"path1": None}]))
    assert [shades(pair) for pair in pairs(table)] == [(1, 0)]
    assert table.rows[0].source == "hpdv3_train" and table.dropped[0].reason == "bad media"


def test_imagereward(tmp_path: Path) -> None:
    names = [f"part-0/{n}.webp" for n in range(4)]
    put_images(tmp_path, *names)
    row = {"id": "0-0", "prompt": "p", "generations": names, "ranking": [1, 2, 5, 2]}
    table = read_preferences(put_json(tmp_path / "test.json", [row]))
    assert [shades(pair) for pair in pairs(table)] == [(0, 1), (0, 2), (0, 3), (1, 2), (3, 2)]


@needs(IMAGE_REWARD)
def test_imagereward_as_published() -> None:
    published = json.loads(IMAGE_REWARD.read_text())
    table = read_preferences(IMAGE_REWARD, verify=False)
    assert len(table.rows) == len(published) == 466 and not table.dropped
    assert [row.rank for row in table.rows] == [tuple(map(float, row["ranking"])) for row in published]
    ordered = ties = 0
    for row in published:
        for i in range(len(row["ranking"])):
            for j in range(i):
                ties += row["ranking"][i] == row["ranking"][j]
                ordered += row["ranking"][i] != row["ranking"][j]
    assert len(pairs(table)) == ordered
    assert len(pairs(table, ties="soft")) == ordered + ties and ties > 0
    with pytest.raises(ValueError, match=r"no row can be used.*466 undecodable image"):
        read_preferences(IMAGE_REWARD)  # the pictures are not there


PLAIN: list[dict[str, Any]] = [
    {
        "prompt": "p",
        "media": ["0.png", "1.png"],
        "label": {"quality": "A", "motion": "same"},
        "user_id": 7,
        "weight": 0.5,
    },
    {"prompt": "q", "media": ["0.png", "1.png", "2.png"], "scores": {"quality": [0.1, 0.9, 0.1]}, "source": "mine"},
    {"prompt": "r", "media": ["0.png", "1.png"], "rank": [2, 1]},
    {"prompt": "s", "media": ["2.png", "1.png"], "label": "B"},
]


def test_the_plain_form(tmp_path: Path) -> None:
    put_images(tmp_path, "0.png", "1.png", "2.png")
    path = put_json(tmp_path / "prefs.jsonl", PLAIN)
    table = read_preferences(path)
    assert table.summary() == "kept all 4 rows"
    assert table.rows[0] == PreferenceRow(
        "p",
        (MediaRef(str(tmp_path / "0.png")), MediaRef(str(tmp_path / "1.png"))),
        label={"quality": "A", "motion": "same"},
        user_id="7",
        weight=0.5,
    )
    assert table.rows[3].label == {"overall": "B"} and table.rows[3].origin == "prefs.jsonl line 4"
    with pytest.raises(ValueError, match=r"line 1 judges quality, motion; choose one as the dimension"):
        pairs(table)
    quality = read_preferences(path, dimension="quality")
    assert [(pair.prompt, *shades(pair), pair.weight) for pair in pairs(quality)] == [
        ("p", 0, 1, 0.5),
        ("q", 1, 0, 1.0),
        ("q", 1, 2, 1.0),
    ]
    assert quality.summary().endswith("2 not judged on 'quality' (prefs.jsonl line 3, prefs.jsonl line 4)")
    assert [pair.label for pair in pairs(read_preferences(path, dimension="motion"), ties="soft")] == [0.5]


def test_the_plain_form_in_parquet_and_elsewhere(tmp_path: Path) -> None:
    put_images(tmp_path / "images", "0.png", "1.png", "2.png")
    names = dict.fromkeys(name for row in PLAIN[:3] for name in row)
    filled = [{name: row.get(name) for name in names} for row in PLAIN[:3]]
    pq.write_table(pa.Table.from_pylist(filled), tmp_path / "prefs.parquet")
    table = read_preferences(tmp_path / "prefs.parquet", root=tmp_path / "images")
    lines = read_preferences(put_json(tmp_path / "prefs.jsonl", PLAIN[:3]), root=tmp_path / "images")
    assert table.rows == lines.rows


def test_preferences_round_trip_exactly(tmp_path: Path) -> None:
    put_images(tmp_path, "0.png", "1.png", "2.png")
    table = read_preferences(put_json(tmp_path / "prefs.jsonl", PLAIN))
    inside = read_preferences(put_pickapic(tmp_path / "train.parquet", [pickapic_row(n, n / 2) for n in range(3)]))
    rows = table.rows + inside.rows
    write_preferences(tmp_path / "new.jsonl", rows)
    assert read_preferences(tmp_path / "new.jsonl").rows == rows
    assert json.loads((tmp_path / "new.jsonl").read_text().splitlines()[4])["media"][1] == {
        "file": "train.parquet",
        "row": 0,
        "column": "jpg_1",
    }
    for path, some in ((tmp_path / "new.csv", rows), (tmp_path / "new.jsonl", [])):
        with pytest.raises(ValueError, match=r"written as \.jsonl, and at least one row"):
            write_preferences(path, some)


BAD_ROWS: list[tuple[dict[str, Any], str, str]] = [
    ({"label": "left"}, "unknown label", "A, B or same"),
    ({"label": "A", "media": ["0.png", "1.png", "2.png"]}, "unknown label", "for two media"),
    ({"label": "A", "rank": [1, 2]}, "several kinds of label", "rank, label"),
    ({}, "no label", "exactly one of scores, rank, label"),
    ({"scores": {}}, "no label", "empty"),
    ({"scores": {"x": [1]}}, "bad label", "1"),
    ({"scores": {"x": [1, None]}}, "no label", "finite"),
    ({"rank": [1, "2"]}, "no label", "numeric"),
    ({"rank": [1, 2], "media": ["0.png"]}, "bad media", "two or more"),
    ({"rank": [1, 2], "media": "0.png"}, "bad media", "two or more"),
    ({"rank": [1, 2], "media": ["0.png", 1]}, "bad media", "two or more"),
    ({"rank": [1, 2], "prompt": None}, "no prompt", "not text"),
    ({"rank": [1, 2], "weight": -1}, "bad weight", "-1"),
    ({"rank": [1, 2], "media": ["0.png", "gone.png"]}, "undecodable image", "no such file"),
]


@pytest.mark.parametrize(("change", "reason", "detail"), BAD_ROWS)
def test_bad_rows_are_dropped_with_their_reason(
    tmp_path: Path, change: dict[str, Any], reason: str, detail: str
) -> None:
    put_images(tmp_path, "0.png", "1.png", "2.png")
    good = {"prompt": "p", "media": ["0.png", "1.png"], "label": "A"}
    bad = {"prompt": "p", "media": ["0.png", "1.png"]} | change
    table = read_preferences(put_json(tmp_path / "t.jsonl", [good, bad, good]))
    assert len(table.rows) == 2
    (dropped,) = table.dropped
    assert dropped.reason == reason and dropped.origin.startswith("t.jsonl line 2") and detail in dropped.detail
    with pytest.raises(ValueError, match=rf"no row can be used, kept 0 of 1 rows; dropped 1: 1 {reason}.*{detail}"):
        read_preferences(put_json(tmp_path / "t.jsonl", [bad]))


def test_what_is_compared_with_itself_is_dropped_unless_prompts_differ(tmp_path: Path) -> None:
    put_images(tmp_path, "0.png", "1.png")
    same = {"prompt": "p", "media": ["0.png", "0.png"], "label": "a"}
    rows = [{**same, "media": ["0.png", "1.png"]}, same, {**same, "prompts": ["p", "q"]}]  # the last is JPO's
    table = read_preferences(put_json(tmp_path / "t.jsonl", rows))
    assert [row.label for row in table.rows] == [{"overall": "A"}] * 2
    assert [(each.reason, each.detail) for each in table.dropped] == [
        ("bad media", "one medium stands in it twice, which compares it to itself")
    ]


def test_the_folder_form(tmp_path: Path) -> None:
    put_images(tmp_path, "chosen/a.png", "rejected/a.png", "chosen/b.png", "chosen/c.png", "rejected/c.png")
    put_json(
        tmp_path / "metadata.jsonl", [{"file_name": "a.png", "prompt": "pa"}, {"file_name": "b.png", "prompt": "pb"}]
    )
    table = read_preferences(tmp_path)
    assert [(pair.prompt, *shades(pair)) for pair in pairs(table)] == [("pa", 0, 1)]
    assert {(each.reason, each.origin.split(" /")[0]) for each in table.dropped} == {
        ("undecodable image", "metadata.jsonl line 2"),  # no rejected/b.png
        ("no prompt", "chosen/c.png"),  # not in the metadata
    }
    assert read_preferences(tmp_path, format="folder").rows == table.rows
    put_json(tmp_path / "metadata.jsonl", [{"file": "a.png", "prompt": "pa"}])
    with pytest.raises(ValueError, match=r"no column file_name.*its columns are file, prompt"):
        read_preferences(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"it needs chosen/, rejected/ and metadata\.jsonl"):
        read_preferences(tmp_path)


def test_clips_are_verified_too(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in "abc":
        write_video(tmp_path / f"{name}.mp4", frames, 12)
    (tmp_path / "c.mp4").write_bytes((tmp_path / "c.mp4").read_bytes()[:-3000])
    rows = [{"prompt": "p", "media": ["a.mp4", f"{name}.mp4"], "label": "A"} for name in "bc"]
    table = read_preferences(put_json(tmp_path / "t.jsonl", rows))
    assert len(table.rows) == 1 and "truncated" in table.dropped[0].detail


def test_wrong_columns_are_listed_with_the_nearest_name(tmp_path: Path) -> None:
    row = {"captoin": "c", "jpg_0": b"", "jpg_1": b"", "label_0": 1.0}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    for format in ("auto", "pickapic"):
        with pytest.raises(
            ValueError,
            match=r"no column caption, which .*'pickapic',? needs; its columns are captoin, jpg_0, jpg_1, label_0\. "
            r"Did you mean 'captoin'\?",
        ):
            read_preferences(tmp_path / "t.parquet", format=format)
    with pytest.raises(ValueError, match=r"no column path1, path2, which format 'hpdv3' needs"):
        read_preferences(put_json(tmp_path / "t.json", [{"prompt": "p", "media": []}]), format="hpdv3")
    with pytest.raises(ValueError, match="unknown preference format 'hpdv4'; there are auto, pickapic"):
        read_preferences(tmp_path / "t.json", format="hpdv4")
    with pytest.raises(ValueError, match="holds no rows"):
        read_preferences(put_json(tmp_path / "t.json", []))


def test_ties_stay_ties() -> None:
    a, b, c = (MediaRef(f"/{name}") for name in "abc")
    table = PreferenceTable(
        [
            PreferenceRow("p", (a, b), label={"overall": "same"}, weight=2.0, user_id="u", origin="o"),
            PreferenceRow("q", (a, b, c), rank=(1, 1, 0)),
        ],
        [],
    )
    decided = [("q", c, a, 1.0, 1.0), ("q", c, b, 1.0, 1.0)]

    def seen(ties: Any) -> list[tuple[Any, ...]]:
        return [(pair.prompt, pair.winner, pair.loser, pair.label, pair.weight) for pair in pairs(table, ties)]

    assert seen("drop") == decided
    assert seen("soft") == [("p", a, b, 0.5, 2.0), ("q", a, b, 0.5, 1.0), *decided]
    assert seen("half") == [
        ("p", a, b, 1.0, 1.0),
        ("p", b, a, 1.0, 1.0),
        ("q", a, b, 1.0, 0.5),
        ("q", b, a, 1.0, 0.5),
        *decided,
    ]
    assert pairs(table, "soft")[0].origin == "o"


def test_summary_shortens_long_lists() -> None:
    dropped = [Dropped(f"t.json row {n}", "bad label") for n in range(6)]
    assert PreferenceTable([], dropped).summary() == (
        "kept 0 of 6 rows; dropped 6: 6 bad label (t.json row 0, t.json row 1, t.json row 2, and 3 more)"
    )


def test_captioned_rows_for_fine_tuning(tmp_path: Path) -> None:
    put_images(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "b.png").write_bytes(b"")
    rows = [{"media": "a.png", "prompt": "p"}, {"media": "b.png", "prompt": "q"}, {"media": "c.png"}]
    path = put_json(tmp_path / "t.jsonl", rows)
    table = captioned(path)
    assert [(row.prompt, row.media) for row in table.rows] == [("p", MediaRef(str(tmp_path / "a.png")))]
    assert table.summary() == (
        "kept 1 of 3 rows; dropped 2: 1 no prompt (t.jsonl sample c.png), "
        f"1 undecodable image (t.jsonl sample b.png {tmp_path / 'b.png'})"
    )
    assert len(captioned(path, verify=False).rows) == 2
    with pytest.raises(ValueError, match="no row can be used, kept 0 of 1 rows"):
        captioned(put_json(tmp_path / "t.jsonl", rows[1:2]))
    with pytest.raises(
        ValueError, match=r"no column prompt, which fine-tuning needs; its columns are aux\.caption, media"
    ):
        captioned(put_json(tmp_path / "t.jsonl", [{"media": "a.png", "caption": "p"}]))


def test_formats_are_listed_with_one_line_each() -> None:
    assert set(FORMATS) == {
        *("pickapic", "hpdv2", "hpdv2_annotators", "hpdv3", "imagereward", "jsonl", "folder"),
        *("videoalign", "videogen_rewardbench", "videodpo"),
    }
    assert all(summary and "\n" not in summary for summary in FORMATS.values())
