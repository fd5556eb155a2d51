"""Media tables, and references to media in files and in cells of parquet files."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_kit import png, put_images, put_json

from mmalign import records
from mmalign.media import MediaError, read_image
from mmalign.records import read_records
from mmalign.reward_scores import _NAMES
from mmalign.tables import (
    MediaRef,
    MediaRow,
    columns,
    read_media_table,
    write_media_table,
)

# ------------------------------------------------------------------------------------------------ media tables


def some_rows(folder: Path) -> list[MediaRow]:
    return [
        MediaRow("a", "a red square", str(folder / "images" / "a.png"), group="red", seed=2**53 + 1, model="base"),
        MediaRow(
            "b", 'ünïcode "quotes"\nand a second line\u2028', str(folder / "b.png"), aux={"color": "red", "n": [1, 2]}
        ),
        MediaRow(
            "c", "", "/elsewhere/c.mp4", "video", fps=30000 / 1001, num_frames=81, reference=str(folder / "c0.png")
        ),
        MediaRow(
            "d", "in parquet", MediaRef(str(folder / "x.parquet"), 3, "jpg_0"), aux={"deep": {"x": 0.1, "y": None}}
        ),
    ]


@pytest.mark.parametrize("name", ["table.jsonl", "table.parquet"])
def test_media_tables_round_trip_exactly(tmp_path: Path, name: str) -> None:
    rows = some_rows(tmp_path)
    for chosen in (rows, rows[:1], rows[1:3]):
        write_media_table(tmp_path / name, chosen)
        assert read_media_table(tmp_path / name) == chosen
        first = (tmp_path / name).read_bytes()
        write_media_table(tmp_path / name, read_media_table(tmp_path / name))
        assert (tmp_path / name).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_csv_as_a_spreadsheet_writes_it(tmp_path: Path) -> None:
    put_images(tmp_path, "a.png", "b.png")
    head, first_row = (
        "file_name,text,sample,seed,fps,score\r\n",
        'a.png,"two ""red"" squares,\nand a dot",007,3,,0.5\r\n',
    )
    text = head + first_row + "b.png,42,008,,24,1\r\n"
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "t.tsv").write_text(
        text.replace("squares,", "squares;").replace(",", "\t").replace("squares;", "squares,")
    )
    first, second = read_media_table(tmp_path)
    assert first == MediaRow(
        "007", 'two "red" squares,\nand a dot', str(tmp_path / "a.png"), seed=3, aux={"score": 0.5}
    )
    assert second == MediaRow("008", "42", str(tmp_path / "b.png"), fps=24.0, aux={"score": 1.0})
    assert read_media_table(tmp_path / "t.tsv") == [first, second]
    assert columns(tmp_path / "t.tsv") == {"media", "prompt", "sample", "seed", "fps", "aux.score"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"media,prompt\na.png,red, round\n", "Expected 2 columns, got 3.*quote cells"),
        (b"media,prompt\na.png,r\xff\n", "UTF-8"),
        (b"media,note\na.png,r\xff\n", "UTF-8"),
        (b"media,note,note\na.png,x,y\n", "two columns called note"),
        (b"media,prompt\n", "holds no rows"),
        (b"", "holds no rows"),
        (b"medai,prompt\na.png,red\n", "Did you mean 'medai'"),
    ],
)
def test_csv_that_is_not_one(tmp_path: Path, text: bytes, words: str) -> None:
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(ValueError, match=words):
        read_media_table(tmp_path / "t.csv")


def test_a_csv_holds_numbers_and_text_alone(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("media,day,good,n\na.png,2026-11-21,true,\nb.png,2026-11-22,false,2\n")
    assert [row.aux for row in read_media_table(tmp_path / "t.csv")] == [
        {"day": "2026-11-21", "good": "true"},
        {"day": "2026-11-22", "good": "false", "n": 2},
    ]


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_whatever_may_name_a_row_stays_text(tmp_path: Path, suffix: str) -> None:
    """Also in tables of scores: `007` is the name of another picture than `7`."""
    between = {"csv": ",", "tsv": "\t"}[suffix]
    for name in (*_NAMES, "user_id", "prompt", "group"):
        path = tmp_path / f"{name}.{suffix}"
        path.write_text(f"{name}{between}score\n007{between}1\n08{between}2\n")
        assert [row.values for row in read_records(path)] == [{name: "007", "score": 1}, {name: "08", "score": 2}]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_keys_of_aux_count_as_columns_in_every_format(tmp_path: Path, suffix: str) -> None:
    rows = {
        "json": '[{"media": "a.png", "aux": {"color": "red"}}]',
        "jsonl": '{"media": "a.png", "aux": {"color": "red"}}\n',
        "csv": 'media,aux\na.png,"{""color"": ""red""}"\n',
    }
    (tmp_path / f"t.{suffix}").write_text(rows[suffix])
    assert columns(tmp_path / f"t.{suffix}") == {"media", "aux", "aux.color"}
    assert read_media_table(tmp_path / f"t.{suffix}")[0].aux == {"color": "red"}


@pytest.mark.parametrize("name", ["table.jsonl", "table.parquet"])
def test_a_moved_folder_keeps_its_media(tmp_path: Path, name: str) -> None:
    put_images(tmp_path / "old", "images/a.png")
    write_media_table(tmp_path / "old" / name, [MediaRow("a", "p", str(tmp_path / "old" / "images" / "a.png"))])
    (tmp_path / "old").rename(tmp_path / "new")
    (row,) = read_media_table(tmp_path / "new" / name)
    assert row.media == str(tmp_path / "new" / "images" / "a.png")
    assert read_image(row.media).shape == (8, 8, 3)
    (row,) = read_media_table(tmp_path / "new" / name, root=tmp_path / "third")
    assert row.media == str(tmp_path / "third" / "images" / "a.png")


def test_defaults_and_unknown_columns(tmp_path: Path) -> None:
    table = put_json(tmp_path / "t.jsonl", [{"media": "a.png", "style": "photo"}, {"media": "b.MP4", "group": 3}])
    first, second = read_media_table(table)
    assert first == MediaRow("a.png", "", str(tmp_path / "a.png"), aux={"style": "photo"})
    assert (second.sample, second.modality, second.group) == ("b.MP4", "video", "3")


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    put_json(tmp_path / "metadata.jsonl", [{"file_name": "a.png", "text": "a dog"}])
    assert read_media_table(tmp_path) == [MediaRow("a.png", "a dog", str(tmp_path / "a.png"))]
    assert columns(tmp_path) == {"media", "prompt"}
    with pytest.raises(ValueError, match=r"folder without metadata\.jsonl, and without a picture or clip; it is empty"):
        (tmp_path / "empty").mkdir()
        read_media_table(tmp_path / "empty")


def test_media_bytes_inside_parquet(tmp_path: Path) -> None:
    table = pa.table({"sample": ["a", "b"], "prompt": ["x", "y"], "media": pa.array([png(1), png(2)], pa.binary())})
    pq.write_table(table, tmp_path / "t.parquet")
    rows = read_media_table(tmp_path / "t.parquet")
    assert rows[1].media == MediaRef(str(tmp_path / "t.parquet"), 1, "media")
    assert read_image(rows[1].media)[0, 0].tolist() == [2, 0, 253]


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet"])
def test_columns_are_those_with_something_in_them(tmp_path: Path, name: str) -> None:
    write_media_table(tmp_path / name, some_rows(tmp_path))
    everything = {"sample", "prompt", "media", "modality", "group", "seed", "model", "reference", "fps", "num_frames"}
    assert columns(tmp_path / name) == everything | {"aux", "aux.color", "aux.n", "aux.deep"}
    write_media_table(tmp_path / name, some_rows(tmp_path)[:1])
    assert columns(tmp_path / name) == {"sample", "prompt", "media", "modality", "group", "seed", "model"}


def test_columns_of_foreign_tables(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"media": ["a"], "style": ["x"], "seed": pa.array([None], pa.int64())}), tmp_path / "t.parquet"
    )
    assert columns(tmp_path / "t.parquet") == {"media", "aux.style"}
    assert columns(put_json(tmp_path / "t.json", [{"media": "a", "seed": None}, {"media": "b", "style": 1}])) == {
        "media",
        "aux.style",
    }


BAD_TABLES: dict[str, tuple[str, str, str]] = {
    "empty": ("t.jsonl", "", r"t\.jsonl holds no rows"),
    "blank": ("t.jsonl", "\n \n", r"t\.jsonl holds no rows"),
    "empty list": ("t.json", "[]", r"t\.json holds no rows"),
    "no media": (
        "t.jsonl",
        '{"medium": "a.png", "promt": "x"}',
        r"no column media, which a media table needs; its columns are medium, promt\. Did you mean 'medium'\?",
    ),
    "half a line": ("t.jsonl", '{"media": "a.png"}\n{"media": ', r"t\.jsonl:2:\d+: not valid JSON"),
    "a list": ("t.jsonl", "[1, 2]", r"t\.jsonl:1: each row is an object"),
    "an object": ("t.json", '{"media": "a"}', "holds one dict, not a list"),
    "cut json": ("t.json", '[{"media": "a"}', r"t\.json:1:\d+: not valid JSON"),
    "media missing": ("t.jsonl", '{"media": "a"}\n{"media": null}', r"t\.jsonl line 2: media is missing"),
    "media is a number": ("t.jsonl", '{"media": 3}', "line 1: media: a media path must be text, not 3"),
    "prompt is a list": ("t.jsonl", '{"media": "a", "prompt": ["x"]}', r"line 1: prompt is \['x'\], not str"),
    "seed is text": ("t.jsonl", '{"media": "a", "seed": "1"}', "line 1: seed is '1', not int"),
    "seed is a bool": ("t.jsonl", '{"media": "a", "seed": true}', "line 1: seed is True, not int"),
    "modality": ("t.jsonl", '{"media": "a", "modality": "movie"}', "modality is 'movie'; it is image or video"),
    "aux": ("t.jsonl", '{"media": "a", "aux": 3}', "aux is 3, not an object"),
    "twice": ("t.jsonl", '{"media": "a"}\n{"media": "a"}', "line 2: sample 'a' is also t.jsonl line 1"),
    "no parquet": ("t.parquet", "PAR1 no", "is not a whole parquet file"),
    "suffix": ("t.txt", "a", r"ends in \.jsonl, \.json, \.csv, .*, not '\.txt'"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_media_tables_say_where_and_what(tmp_path: Path, case: str) -> None:
    name, text, message = BAD_TABLES[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_media_table(tmp_path / name)


def test_missing_truncated_and_empty_parquet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_media_table(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match="does not exist"):
        columns(tmp_path / "gone.jsonl")
    write_media_table(tmp_path / "t.parquet", some_rows(tmp_path))
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"not a whole parquet file .* download or write it again"):
        read_media_table(tmp_path / "t.parquet")
    pq.write_table(pa.table({"media": pa.array([], pa.string())}), tmp_path / "t.parquet")
    for read in (read_media_table, columns):
        with pytest.raises(ValueError, match="holds no rows"):
            read(tmp_path / "t.parquet")
    (tmp_path / "t.jsonl").write_bytes(b'{"media": "\xff.png"}')
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_media_table(tmp_path / "t.jsonl")


def test_what_cannot_be_written_exactly_is_refused(tmp_path: Path) -> None:
    row = MediaRow("a", "p", "a.png")
    with pytest.raises(ValueError, match="no rows to write"):
        write_media_table(tmp_path / "t.jsonl", [])
    with pytest.raises(ValueError, match="sample 'a' is used twice"):
        write_media_table(tmp_path / "t.jsonl", [row, row])
    with pytest.raises(ValueError, match=r"written as \.jsonl or \.parquet"):
        write_media_table(tmp_path / "t.csv", [row])
    for aux in ({"x": float("nan")}, {"x": (1, 2)}, {1: "x"}, {"x": object()}):
        with pytest.raises(ValueError, match=r"aux does not survive JSON|use text, finite numbers"):
            write_media_table(tmp_path / "t.jsonl", [replace(row, aux=aux)])
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ references


def big_parquet(path: Path, rows: int = 60, group: int = 10, kind: str = "bytes") -> Path:
    images = [png(n) for n in range(rows)]
    column: pa.Array = pa.array(images, pa.binary())
    if kind == "struct":  # as Hugging Face's image feature is stored
        column = pa.array([{"bytes": image, "path": None} for image in images])
    pq.write_table(pa.table({"caption": [f"c{n}" for n in range(rows)], "jpg_0": column}), path, row_group_size=group)
    return path


@pytest.mark.parametrize("kind", ["bytes", "struct"])
def test_a_cell_reads_its_row_group_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    fresh = records._RowGroups(groups=2)
    monkeypatch.setattr(records, "_ROW_GROUPS", fresh)
    asked: list[tuple[int, Any]] = []
    original = pq.ParquetFile.read_row_group

    def spy(self: pq.ParquetFile, group: int, columns: Any = None, **more: Any) -> pa.Table:
        asked.append((group, columns))
        return original(self, group, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    path = str(big_parquet(tmp_path / "t.parquet", kind=kind))
    for row in (25, 20, 29, 0, 21):  # neighbours cost no second read
        assert MediaRef(path, row, "jpg_0").read() == png(row)
    assert asked == [(2, ["jpg_0"]), (0, ["jpg_0"])]
    assert MediaRef(path, 59, "jpg_0").read() == png(59)  # the third group pushes out the first
    assert MediaRef(path, 9, "jpg_0").read() == png(9)
    assert len(asked) == 4 and len(fresh._groups) == 2


def test_references_have_names_hashes_and_survive_pickling_and_forks(tmp_path: Path) -> None:
    path = str(big_parquet(tmp_path / "train.parquet"))
    ref = MediaRef(path, 12, "jpg_0")
    assert ref.name == "train.parquet row 12 jpg_0" and pickle.loads(pickle.dumps(ref)) == ref
    (tmp_path / "a.png").write_bytes(png(12))
    assert ref.hash() == MediaRef(str(tmp_path / "a.png")).hash()
    assert MediaRef(str(tmp_path / "a.png")).name == str(tmp_path / "a.png")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(_read, [MediaRef(path, row, "jpg_0") for row in range(30)]) == [png(row) for row in range(30)]


def _read(ref: MediaRef) -> bytes:
    return ref.read()


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = big_parquet(tmp_path / "t.parquet", rows=3)
    ref = MediaRef(str(path), 0, "jpg_0")
    assert ref.read() == png(0)
    pq.write_table(pa.table({"jpg_0": pa.array([png(200)], pa.binary())}), path)
    assert ref.read() == png(200)


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(1))
    ref, reads = MediaRef(str(path)), []
    monkeypatch.setattr(MediaRef, "read", lambda self: reads.append(self) or path.read_bytes())
    assert ref.hash() == ref.hash() == hashlib.sha256(png(1)).hexdigest() and len(reads) == 1
    path.write_bytes(png(2, size=9))
    assert ref.hash() == hashlib.sha256(png(2, size=9)).hexdigest() and len(reads) == 2
    monkeypatch.undo()
    path.unlink()
    with pytest.raises(MediaError, match="no such file"):
        ref.hash()
    assert ref.path == path and MediaRef(str(path), 0, "jpg_0").path is None


def test_unreadable_cells_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"jpg_0": pa.array([None, b""], pa.binary()), "text": ["a", "b"]}), path)
    for ref, message in [
        (MediaRef(str(path), 0, "jpg_0"), "t.parquet row 0 jpg_0: holds no bytes"),
        (MediaRef(str(path), 1, "jpg_0"), "t.parquet row 1 jpg_0: holds no bytes"),
        (MediaRef(str(path), 0, "text"), "holds no bytes"),
        (MediaRef(str(path), 2, "jpg_0"), "cannot be read from .* download that file again"),
        (MediaRef(str(path), 0, "jpg_9"), "cannot be read from"),
        (MediaRef(str(tmp_path / "gone.parquet"), 0, "jpg_0"), "no such file"),
        (MediaRef(str(tmp_path / "gone.png")), "no such file"),
    ]:
        with pytest.raises(MediaError, match=message):
            ref.read()


@pytest.mark.parametrize("name", ["table.jsonl", "table.parquet"])
def test_rows_say_for_which_evaluators_they_are(tmp_path: Path, name: str) -> None:
    rows = [
        MediaRow("a", "", str(tmp_path / "a.mp4"), "video", dimensions=("color", "scene")),
        MediaRow("b", "", str(tmp_path / "b.mp4"), "video"),
    ]
    write_media_table(tmp_path / name, rows)
    assert read_media_table(tmp_path / name) == rows
    (tmp_path / "text.jsonl").write_text('{"media": "a.mp4", "dimensions": "color, scene"}\n')
    assert read_media_table(tmp_path / "text.jsonl")[0].dimensions == ("color", "scene")
    (tmp_path / "bad.jsonl").write_text('{"media": "a.mp4", "dimensions": [3]}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl line 1: dimensions is \[3\]"):
        read_media_table(tmp_path / "bad.jsonl")
