"""Rows of answers: placeholders, the checks with their reasons, and writing and reading back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_kit import png, put_images, put_json

from mmalign.mllm.fields import conversation
from mmalign.mllm.formats import FORMATS, AnswerTable, read_answers, write_answers
from mmalign.mllm.rows import AnswerRow, Part, Turn, Unusable, check_media, checked, only_user, parts_of, placed, turn
from mmalign.preference_row import Dropped
from mmalign.records import MediaRef

IMAGE, VIDEO = Part("image"), Part("video")


def said(text: str) -> Part:
    return Part("text", text)


def row(**changes: Any) -> AnswerRow:
    """A pair about one image, with some fields changed."""
    base = AnswerRow(only_user("What is it?", 1), "A dog.", "A cat.", (MediaRef("/a.png"),), origin="line 1")
    return replace(base, **changes)


# ------------------------------------------------------------------------------------------------ placeholders


@pytest.mark.parametrize(
    "text, parts",
    [
        ("What?", (said("What?"),)),
        (" spaces stay ", (said(" spaces stay "),)),
        ("", ()),
        ("<image>\nWhat?", (IMAGE, said("What?"))),
        ("What?\n<image>", (said("What?"), IMAGE)),
        ("<image>\n<image>\n日本語 é?", (IMAGE, IMAGE, said("日本語 é?"))),
        ("a <image> b\n<video>", (said("a "), IMAGE, said(" b"), VIDEO)),
        ("1:<image>\n2:<image>\n In 1", (said("1:"), IMAGE, said("\n2:"), IMAGE, said("\n In 1"))),
        ("<image-placeholder>x", (IMAGE, said("x"))),
        ("<|image|>x<|video|>", (IMAGE, said("x"), VIDEO)),
        ("<|vision_start|><|image_pad|><|vision_end|>x", (IMAGE, said("x"))),
        ("<|image_pad|>x<start_of_image>", (IMAGE, said("x"), IMAGE)),
        ("<image>", (IMAGE,)),
        ("an <img> or < image > is text", (said("an <img> or < image > is text"),)),
    ],
)
def test_placeholders_become_parts_in_place(text: str, parts: tuple[Part, ...]) -> None:
    assert parts_of(text) == parts


def test_images_go_before_the_first_user_text() -> None:
    system, first, second = turn("system", "Be brief."), turn("user", "Hello"), turn("user", "What?")
    between = turn("assistant", "Hi")
    out = placed([system, first, between, second], 2, 1)
    assert out == (system, Turn("user", (IMAGE, IMAGE, VIDEO, said("Hello"))), between, second)
    assert placed([turn("user", "A <image>?")], 1, 0) == (Turn("user", (said("A "), IMAGE, said("?"))),)
    assert placed([first], 0, 0) == (first,)
    assert placed([first], 1, 0, plain=()) == (first,), "a message of typed parts says itself where its images are"


TYPED = [{"type": "text", "text": "a"}, {"type": "image"}]
TALKS: list[tuple[list[dict[str, Any]], int]] = [
    ([{"role": "user", "content": "What?"}], 0),
    ([{"role": "user", "content": "What?"}], 3),
    ([{"role": "system", "content": "S"}, {"role": "user", "content": "é?"}], 1),
    ([{"role": role, "content": role} for role in ("user", "assistant", "user")], 2),
    (
        [{"role": "user", "content": TYPED}, {"role": "assistant", "content": "b"}, {"role": "user", "content": TYPED}],
        2,
    ),
    ([{"role": "user", "content": TYPED}], 2),
    ([{"role": "user", "content": TYPED[:1]}], 1),
]


@pytest.mark.parametrize("talk, count", TALKS)
def test_images_stand_where_trl_puts_them(talk: list[dict[str, Any]], count: int) -> None:
    """Where TRL refuses a conversation, so do the checks. (But plain text after a typed image: there TRL adds another
    placeholder and refuses the row, and here the typed one counts.)"""
    trl = pytest.importorskip("trl.data_utils")
    images = [f"{number}.png" for number in range(count)]
    turns = conversation(talk, count, 0)
    try:
        theirs = trl.prepare_multimodal_messages(talk, images)
    except ValueError:
        with pytest.raises(Unusable, match="placeholders do not match"):
            check_media(turns, count, 0)
        return
    check_media(turns, count, 0)
    ours = [[("image", "") if part.kind == "image" else ("text", part.text) for part in each.parts] for each in turns]
    assert ours == [[(part["type"], part.get("text", "")) for part in each["content"]] for each in theirs]


@pytest.mark.parametrize("chosen, rejected", [("The sky is blue", "The sky is green"), ("a bc", "a bd"), ("xa", "xb")])
def test_prompts_inside_answers_end_where_trl_ends_them(tmp_path: Path, chosen: str, rejected: str) -> None:
    trl = pytest.importorskip("trl.data_utils")
    theirs = trl.extract_prompt({"chosen": chosen, "rejected": rejected})
    (row,) = read_answers(put_json(tmp_path / "t.jsonl", [{"chosen": chosen, "rejected": rejected}])).rows
    found = [row.prompt[0].text, row.chosen, row.rejected]
    assert found == [theirs["prompt"], theirs["chosen"].lstrip(" "), theirs["rejected"].lstrip(" ")]


def test_kinds_and_media() -> None:
    other = (MediaRef("/b.png"),)
    assert row().kind == "pair" and row(rejected_images=other).kind == "pair"
    assert row(rejected=None).kind == "answer"
    assert row(rejected=None, label=False).kind == "unpaired"
    assert row(rejected=None, rejected_images=other).kind == "image_pair"
    assert row(chosen=None, rejected=None).kind == "prompt"
    assert row(rejected_images=other, videos=(MediaRef("/c.mp4"),)).media == tuple(
        MediaRef(name) for name in ("/a.png", "/c.mp4", "/b.png")
    )
    assert len({row(), row(meta={"a": [1]})}) == 2, "rows can be hashed whatever their meta"
    assert row(origin="line 1") == row(origin="line 2")


# ------------------------------------------------------------------------------------------------ checks


def refused(**changes: Any) -> str:
    with pytest.raises(Unusable) as caught:
        checked(row(**changes))
    return str(caught.value)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ()}, "no prompt: there is no turn before the answer"),
    (
        {"prompt": (*only_user("Q", 1), turn("assistant", "A"))},
        "no prompt: the last turn before the answer is the assistant's, not the user's",
    ),
    ({"prompt": only_user(" ", 1)}, "no prompt: the user says nothing"),
    (
        {"prompt": (*only_user("Q", 1), turn("system", "S"), turn("user", "Q"))},
        "unknown role: a system turn stands first or not at all",
    ),
    ({"images": ()}, "no image: the prompt has 1 image placeholder and the row no image"),
    (
        {"prompt": only_user("<video> <video> what?", 1), "videos": ()},
        "no video: the prompt has 2 video placeholders and the row no video",
    ),
    (
        {"prompt": only_user("<image> and <image>?", 1)},
        "placeholders do not match: the prompt has 2 image placeholders for 1 image",
    ),
    (
        {"prompt": only_user("<image> what?", 1), "images": (MediaRef("/a.png"), MediaRef("/b.png"))},
        "placeholders do not match: the prompt has 1 image placeholder for 2 images",
    ),
    ({"chosen": "A cat. "}, "chosen equals rejected: both are 'A cat. '"),
    ({"chosen": None}, "empty answer: chosen is missing"),
    ({"chosen": " \n"}, "empty answer: chosen is empty"),
    ({"rejected": ""}, "empty answer: rejected is empty"),
    ({"chosen": 7}, "bad answer: chosen is 7, not text"),
    ({"rejected": "See <image>"}, "placeholder in an answer: rejected says <image>; an answer is text alone"),
    ({"label": True}, "bad label: label is True; it is true or false, of one answer"),
    ({"label": 2, "rejected": None}, "bad label: label is 2; it is true or false, of one answer"),
    ({"margin": float("nan")}, "bad margin: margin is nan, not finite"),
    ({"margin": float("-inf")}, "bad margin: margin is -inf, not finite"),
    ({"margin": "0.5"}, "bad margin: margin is '0.5', not a number"),
    ({"margin": True}, "bad margin: margin is True, not a number"),
    ({"weight": -1}, "bad weight: weight is -1; it is 0 or more"),
    ({"weight": "2"}, "bad weight: weight is '2', not a number"),
    (
        {"chosen_spans": ((2, 7),)},
        "bad spans: chosen_spans holds [2, 7], which does not lie after 0 in 6 characters",
    ),
    (
        {"rejected_spans": ((0, 3), (2, 4))},
        "bad spans: rejected_spans holds [2, 4], which does not lie after 3 in 6 characters",
    ),
    ({"chosen_spans": ((0.0, 3),)}, "bad spans: chosen_spans holds (0.0, 3), not a start and an end"),
    ({"rejected": None, "rejected_spans": ((0, 1),)}, "bad spans: rejected_spans has no answer to lie in"),
    ({"safer": "both"}, "bad safer: safer is 'both'; it is chosen, rejected or same, of two answers"),
    ({"safer": "same", "rejected": None}, "bad safer: safer is 'same'; it is chosen, rejected or same, of two answers"),
    ({"rejected_images": ()}, "bad rejected_images: 0 rejected images for 1 image"),
    ({"rejected_images": (MediaRef("/a.png"),)}, "bad rejected_images: the rejected images are the images themselves"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message.split(":")[0] for _, message in BAD])
def test_what_cannot_be_used_says_why(changes: dict[str, Any], message: str) -> None:
    assert refused(**changes) == message


def test_good_rows_pass_unchanged() -> None:
    for good in (
        row(),
        row(margin=-0.5, weight=0, safer="rejected", chosen_spans=((0, 1), (2, 6)), rejected_spans=()),
        row(rejected_images=(MediaRef("/b.png"),)),
        row(chosen=None, rejected=None),
        AnswerRow(only_user("No image at all", 0), "A", "B"),
    ):
        assert checked(good) is good


@pytest.mark.parametrize(
    "role, content, message",
    [
        ("usr", "x", "unknown role: 'usr' is none of system, user, human, assistant, gpt, model. Did you mean 'user'?"),
        (None, "x", "unknown role: None is none of system, user, human, assistant, gpt, model."),
        ("user", 3, "bad content: a turn's content is text or a list of parts, not 3"),
        ("user", [{"type": "audio"}], "bad content: a part is of type text, image or video, not {'type': 'audio'}"),
        ("user", [{"type": "text"}], "bad content: a part is of type text, image or video, not {'type': 'text'}"),
    ],
)
def test_roles_and_parts_are_checked(role: Any, content: Any, message: str) -> None:
    with pytest.raises(Unusable) as caught:
        turn(role, content)
    assert str(caught.value) == message


# ------------------------------------------------------------------------------------------------ round trips


def every_kind(folder: Path) -> list[AnswerRow]:
    """A row of each kind but "prompt", with and without images, in several turns, and with all optional fields."""
    put_images(folder, "a.png", "deep/b.png", "c.png")
    a, b, c = (MediaRef(str(folder / name)) for name in ("a.png", "deep/b.png", "c.png"))
    talk = (turn("system", "Be brief."), *only_user("é <image> 日本?", 1), turn("assistant", "x"), turn("user", "y\n"))
    return [
        AnswerRow(
            only_user("Which?", 2), "the first", " the\nsecond 🐶", (a, b), source="set", meta={"n": [1, {"x": None}]}
        ),
        AnswerRow(
            talk, "1", "2", (a,), margin=0.25, weight=0.5, safer="same", chosen_spans=((0, 1),), rejected_spans=()
        ),
        AnswerRow(only_user("no image", 0), "A", "B"),
        AnswerRow(only_user("<image>?", 1), "A", None, (a,), rejected_images=(c,)),
        AnswerRow(only_user("<image>?", 1), "A", "B", (a,), rejected_images=(b,)),
        AnswerRow(only_user("good?", 1), "A", None, (b,), label=False),
        AnswerRow(only_user("imitate", 0), "A", None),
    ]


def test_jsonl_reads_back_equal(tmp_path: Path) -> None:
    rows = every_kind(tmp_path)
    write_answers(rows, tmp_path / "t.jsonl")
    assert read_answers(tmp_path / "t.jsonl") == AnswerTable(rows, [], "trl")
    first = json.loads((tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()[0])
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which?"}]
    assert first == {
        "prompt": [{"role": "user", "content": content}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "the first"}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": " the\nsecond 🐶"}]}],
        "images": ["a.png", "deep/b.png"],
        "source": "set",
        "meta": {"n": [1, {"x": None}]},
    }  # fmt: skip
    assert [each.origin for each in read_answers(tmp_path / "t.jsonl").rows][:2] == ["t.jsonl line 1", "t.jsonl line 2"]


def test_parquet_holds_the_bytes(tmp_path: Path) -> None:
    rows = every_kind(tmp_path) * 20  # more than one row group
    write_answers(rows, tmp_path / "t.parquet")
    back = read_answers(tmp_path / "t.parquet").rows
    assert len(back) == len(rows) and pq.ParquetFile(tmp_path / "t.parquet").num_row_groups > 1
    for old, new in zip(rows, back, strict=True):
        assert [ref.read() for ref in new.media] == [ref.read() for ref in old.media]
        none: dict[str, Any] = {"images": (), "rejected_images": None}
        assert replace(new, **none) == replace(old, **none)
        assert new.kind == old.kind and all(ref.row is not None for ref in new.media)
    write_answers(back, tmp_path / "again.jsonl")  # names the cells
    assert read_answers(tmp_path / "again.jsonl").rows == back


def test_prompts_alone_stand_in_a_table_of_their_own(tmp_path: Path) -> None:
    rows = every_kind(tmp_path)
    prompts = [replace(each, chosen=None, rejected=None) for each in (rows[0], rows[2])]
    write_answers(prompts, tmp_path / "p.jsonl")
    assert [each.kind for each in read_answers(tmp_path / "p.jsonl").rows] == ["prompt", "prompt"]
    with pytest.raises(ValueError, match="rows without an answer stand in a table of their own"):
        write_answers([*rows, *prompts], tmp_path / "mixed.jsonl")
    with pytest.raises(ValueError, match=r"answers are written as \.jsonl or \.parquet"):
        write_answers(rows, tmp_path / "t.csv")
    with pytest.raises(ValueError, match="there are no rows to write"):
        write_answers([], tmp_path / "t.jsonl")
    with pytest.raises(ValueError, match="not JSON serializable"):
        write_answers([replace(rows[0], meta={"x": {1}})], tmp_path / "t.parquet")
    assert not list(tmp_path.glob("*t.*")), "whole or not at all"


def test_lists_of_images_inside_parquet_are_counted_without_reading_them(tmp_path: Path) -> None:
    cells = [[{"bytes": png(n), "path": None} for n in range(count)] for count in (0, 1, 3)]
    for kind in (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), pa.binary()):
        values = cells if pa.types.is_struct(kind) else [[item["bytes"] for item in cell] for cell in cells]
        texts = pa.array(["hello?", "what?", "which?"])
        columns = {
            "prompt": texts,
            "chosen": texts,
            "rejected": ["x", "y", "z"],
            "images": pa.array(values, pa.list_(kind)),
        }
        pq.write_table(pa.table(columns), tmp_path / "t.parquet")
        rows = read_answers(tmp_path / "t.parquet").rows
        assert [len(each.images) for each in rows] == [0, 1, 3]
        assert rows[2].images[1].name == "t.parquet row 2 images[1]" and rows[2].images[1].read() == png(1)


def test_what_is_dropped_is_counted_and_named(tmp_path: Path) -> None:
    put_images(tmp_path, "a.png")
    (tmp_path / "torn.png").write_bytes(png(3)[:40])
    base = {"prompt": "what?", "chosen": "A", "rejected": "B", "image": "a.png"}
    changes: list[dict[str, Any]] = [
        {}, {"image": "torn.png"}, {"image": "gone.png"}, {"chosen": "B"}, {"image": None, "prompt": "<image> what?"},
        {"image": 7}, {"image": "https://x/y.png"}, {"margin": "big"}, {"prompt": [{"role": "usr", "content": "?"}]},
        {"chosen": None, "rejected": None}, {"rejected": None}, {"chosen_spans": [3]}, {"meta": "{"},
        {"completion": "C"},
    ]  # fmt: skip
    put_json(tmp_path / "t.jsonl", [{**base, **change} for change in changes])
    table = read_answers(tmp_path / "t.jsonl")
    assert len(table.rows) == 1
    reasons = {each.origin: each.reason for each in table.dropped}
    line = "t.jsonl line {}".format
    assert reasons == {
        f"{line(2)} {tmp_path / 'torn.png'}": "undecodable image",
        f"{line(3)} {tmp_path / 'gone.png'}": "undecodable image",
        line(4): "chosen equals rejected", line(5): "no image", line(6): "bad media", line(7): "bad media",
        line(8): "bad margin", line(9): "unknown role", line(10): "empty answer", line(11): "empty answer",
        line(12): "bad spans", line(13): "bad meta", line(14): "several kinds of answer",
    }  # fmt: skip
    assert table.summary().startswith("kept 1 of 14 rows; dropped 13: 1 chosen equals rejected (t.jsonl line 4), ")
    assert Dropped(line(7), "bad media", "https://x/y.png is no file; download it and name the copy") in table.dropped
    assert len(read_answers(tmp_path / "t.jsonl", verify=False).rows) == 3
    assert len(read_answers(tmp_path / "t.jsonl", verify=False, limit=2).rows) == 2


def test_csv_as_a_spreadsheet_writes_it(tmp_path: Path) -> None:
    put_images(tmp_path, "a.png", "b.png")
    (tmp_path / "t.csv").write_text('prompt,chosen,rejected,image,margin\nHow many?,2,3,a.png,0.5\n"é, ""?""",4,5,,\n')
    table = read_answers(tmp_path / "t.csv")
    assert [(row.prompt[0].text, row.chosen, row.rejected, len(row.images)) for row in table.rows] == [
        ("How many?", "2", "3", 1),
        ('é, "?"', "4", "5", 0),
    ]
    assert [row.margin for row in table.rows] == [0.5, None]
    (tmp_path / "k.csv").write_text('prompt,completion,label,images\nWhat?,A,1,"[""a.png"", ""b.png""]"\n')
    assert [(row.label, len(row.images)) for row in read_answers(tmp_path / "k.csv").rows] == [(True, 2)]


@pytest.mark.parametrize("name, text", [("t.jsonl", "{"), ("t.json", "{}"), ("t.csv", ""), ("t.parquet", "PAR1")])
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read_answers(tmp_path / name)


def test_the_page_shows_rows_that_are_read_and_names_every_format(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "answers.md").read_text(encoding="utf-8")
    (tmp_path / "t.jsonl").write_text(page.split("One of each kind:")[1].split("```")[1].lstrip(), encoding="utf-8")
    table = read_answers(tmp_path / "t.jsonl", format="trl", verify=False)
    assert [each.kind for each in table.rows] == [
        "pair",
        "image_pair",
        "unpaired",
        "answer",
        "answer",
    ] and not table.dropped
    named = {line.split("`")[1] for line in page.split("## Formats")[1].splitlines() if line.startswith("| `")}
    assert set(FORMATS) <= named
