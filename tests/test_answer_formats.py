"""Answer formats: three rows of each as its data set has them, telling them apart, and tables that fit none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from table_kit import png, put_images, put_json

from mmalign.media import write_video
from mmalign.mllm.formats import ADAPTERS, FORMATS, AnswerTable, detect, read_answers
from mmalign.mllm.rows import AnswerRow

NAMES = ("a.png", "b.png", "c.png")


def read(folder: Path, rows: list[dict[str, Any]], name: str = "t.jsonl", **options: Any) -> AnswerTable:
    put_images(folder, *NAMES)
    return read_answers(put_json(folder / name, rows), **options)


def shown(row: AnswerRow) -> str:
    """The prompt in a line: who says what, [i] and [v] for images and clips."""
    marks = {"image": "[i]", "video": "[v]"}
    return " | ".join(f"{each.role}: {''.join(marks.get(p.kind, p.text) for p in each.parts)}" for each in row.prompt)


def brief(table: AnswerTable) -> list[tuple[Any, ...]]:
    """Prompt, both answers and the names of the images of each row."""
    return [(shown(r), r.chosen, r.rejected, *(Path(ref.file).name for ref in r.images)) for r in table.rows]


def reasons(table: AnswerTable) -> list[str]:
    return [f"{each.reason}: {each.detail}" for each in table.dropped]


def human(text: str) -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


Q = "user: [i]What?"
SLOT = "<image-placeholder>"
PREAMBLE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PAIR = {"chosen": "A", "rejected": "B"}
ASKED = {"question": "What?", "image": "a.png", **PAIR}
TWO = {"question": "What?", "image": "a.png", "response_1": "one", "response_2": "two"}
SIMPLE: dict[str, tuple[list[dict[str, Any]], list[tuple[Any, ...]]]] = {
    "rlhf_v": (
        [
            {"image": "a.png", "text": json.dumps({"question": "What?", **PAIR}), "origin_split": "{}", "idx": 0},
            {"image": "b.png", "text": json.dumps({"question": "é?", **PAIR, "logps": []})},
            {"image_path": "c.png", "text": json.dumps({"question": "<image>\nWhat?", **PAIR})},
        ],
        [(Q, "A", "B", "a.png"), ("user: [i]é?", "A", "B", "b.png"), (Q, "A", "B", "c.png")],
    ),
    "rlaif_v": (
        [{**ASKED, "ds_name": "x", "origin_dataset": "y", "image_path": "elsewhere.jpg"}, {**ASKED, "idx": 3}, ASKED],
        [(Q, "A", "B", "a.png")] * 3,
    ),
    "mia_dpo": (
        [
            {"image": ["a.png", "b.png"], "prompt": f"1:{SLOT}\n2:{SLOT}\nIn 1?", **PAIR, "gt": "A"},
            {"image": ["c.png"], "prompt": "What?", **PAIR, "gt": "A"},
            {"image": "c.png", "prompt": f"{SLOT}What?", **PAIR, "gt": "A"},
        ],
        [("user: 1:[i]\n2:[i]\nIn 1?", "A", "B", "a.png", "b.png"), (Q, "A", "B", "c.png"), (Q, "A", "B", "c.png")],
    ),
    "povid": (
        [
            {"image": "a.png", "conversations": [human("<image>\nWhat?"), gpt("A")],
             "rejected_conversations": [human("<image>\nWhat?"), gpt("B")]},
            {"image": "b.png", "conversations": [human("<image>\nHi"), gpt("Yes"), human("What?"), gpt("A")],
             "rejected_conversations": [human("<image>\nHi"), gpt("Yes"), human("What?"), gpt("B")]},
            {"conversations": [human("What?"), gpt("A")], "rejected_conversations": [human("What?"), gpt("B")]},
        ],
        [
            (Q, "A", "B", "a.png"),
            ("user: [i]Hi | assistant: Yes | user: What?", "A", "B", "b.png"),
            ("user: What?", "A", "B"),
        ],
    ),
    "mdpo": (
        [
            {"img_path": "a.png", "prompt": f"{PREAMBLE} USER: <image>\nWhat? ASSISTANT:", **PAIR},
            {"img_path": "b.png", "prompt": "Short. USER: <image>\nHi ASSISTANT: Yes</s>USER: Why? ASSISTANT:", **PAIR},
            {"img_path": "c.png", "prompt": "USER: What?\nASSISTANT:", **PAIR},
        ],
        [(Q, "A", "B", "a.png"), ("system: Short. | user: [i]Hi | assistant: Yes | user: Why?", "A", "B", "b.png")],
    ),
    "llama_factory": (
        [
            {"conversations": [human("<image>What?")], "chosen": gpt("A"), "rejected": gpt("B"), "images": ["a.png"]},
            {"conversations": [human("Hi"), gpt("Yes"), human("<image>?")], "chosen": gpt("A"), "rejected": gpt("B"),
             "images": ["b.png"], "system": "S"},
            {"conversations": [human("What?")], "chosen": gpt("A"), "rejected": gpt("B")},
        ],
        [
            (Q, "A", "B", "a.png"),
            ("system: S | user: Hi | assistant: Yes | user: [i]?", "A", "B", "b.png"),
            ("user: What?", "A", "B"),
        ],
    ),
    "llava": (
        [
            {"id": "1", "image": "a.png", "conversations": [human("<image>\nWhat?"), gpt("A")]},
            {"image": "b.png", "conversations": [human("What?\n<image>"), gpt("A"), human("More?"), gpt("B")]},
            {"conversations": [human("Hi"), gpt("Yes")]},
        ],
        [
            (Q, "A", None, "a.png"),
            ("user: What?[i]", "A", None, "b.png"),
            ("user: What?[i] | assistant: A | user: More?", "B", None, "b.png"),
            ("user: Hi", "Yes", None),
        ],
    ),
    "spa_vl": (
        [{**ASKED, "image_name": "x", "class1": "c"}, {**ASKED, "image_name": "y"}, {**ASKED, "image_name": "z"}],
        [(Q, "A", "B", "a.png")] * 3,
    ),
    "align_anything": (
        [{**TWO, "overall_response": 1}, {**TWO, "overall_response": 2}, {**TWO, "overall_response": "2"}],
        [(Q, "one", "two", "a.png"), (Q, "two", "one", "a.png"), (Q, "two", "one", "a.png")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIMPLE)
def test_three_rows_of_each(tmp_path: Path, name: str) -> None:
    rows, wanted = SIMPLE[name]
    table = read(tmp_path, rows)
    assert table.format == name, "told by its columns"
    assert brief(table)[: len(wanted)] == wanted and not (table.dropped and name != "mdpo")
    assert brief(read(tmp_path, rows, "t.json", format=name))[: len(wanted)] == wanted
    if ADAPTERS[name].source:
        assert {row.source for row in table.rows} == {name}


def test_vicuna_text_without_a_placeholder_does_not_guess(tmp_path: Path) -> None:
    table = read(tmp_path, SIMPLE["mdpo"][0] + [{"img_path": "a.png", "prompt": "What?", **PAIR}])
    assert reasons(table) == [
        "placeholders do not match: the prompt has 0 image placeholders for 1 image",
        "no prompt: the prompt has no USER: and so is not in Vicuna's template",
    ]


def test_embedded_images_and_extra_columns_of_the_released_parquet(tmp_path: Path) -> None:
    """RLHF-V and BeaverTails-V as they lie on the hub: {bytes, path}, in a folder of files."""
    image = [{"bytes": png(n), "path": f"{n}.png"} for n in range(3)]
    text = [json.dumps({"question": "What?", "chosen": f"A{n}", "rejected": "B"}) for n in range(3)]
    columns = {"image": image, "text": text, "ds_name": ["x", "y", None], "image_path": ["gone.jpg"] * 3}
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "set" / "train-0.parquet")
    pq.write_table(pa.table(columns), tmp_path / "set" / "train-1.parquet", row_group_size=1)
    table = read_answers(tmp_path / "set")
    assert table.format == "rlhf_v" and [row.chosen for row in table.rows] == ["A0", "A1", "A2"] * 2
    assert [row.images[0].read() for row in table.rows[:3]] == [png(n) for n in range(3)]
    assert table.rows[0].meta == {"ds_name": "x", "image_path": "gone.jpg"} and table.rows[5].images[0].row == 2


def test_beavertails_has_two_labels(tmp_path: Path) -> None:
    def labelled(helpful: Any, safer: Any) -> dict[str, Any]:
        return {**TWO, "more_helpful_response_id": helpful, "safer_response_id": safer, "is_response_1_safe": "no"}

    table = read(tmp_path, [labelled("1", "1"), labelled("1", "2"), labelled(2, None), labelled("0", "1")])
    assert table.format == "beavertails_v"
    assert [(row.chosen, row.safer) for row in table.rows] == [("one", "chosen"), ("one", "rejected"), ("two", None)]
    assert table.rows[0].meta == {"is_response_1_safe": "no"}
    assert reasons(table) == ["no label: more_helpful_response_id is '0', not 1 or 2"]
    said = [
        {"question": "What?", "image": "a.png", "response": "A", "is_response_safe": is_it}
        for is_it in ("yes", "no", "")
    ]
    single = read(tmp_path, said)
    assert single.format == "beavertails_v" and [row.label for row in single.rows] == [True, False]


def test_mm_rlhf_with_clips_ties_and_reasons(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", torch.zeros(4, 3, 16, 16, dtype=torch.uint8), fps=4)
    base = {"prompt": "<image>\nWhat?", **PAIR, "chosen_reason": "true", "rejected_reason": "false", "ls_factor": 0.5}
    table = read(
        tmp_path,
        [
            {"id": 1, "image": "a.png", **base, "mixed_up_image": "b.png"},
            {"video": "clip.mp4", **base, "prompt": "What?"},
            {"image": "a.png", **base, "is_tie": True},
            {"video": "clip.mp4", **base},
        ],
    )
    first, second = table.rows
    assert table.format == "mm_rlhf" and shown(second) == "user: [v]What?" and not second.images
    assert [Path(ref.file).name for ref in (*second.videos, *(first.rejected_images or ()))] == ["clip.mp4", "b.png"]
    assert first.meta == {"id": 1, "chosen_reason": "true", "rejected_reason": "false", "ls_factor": 0.5}
    assert reasons(table) == ["tie: is_tie is set", "no image: the prompt has 1 image placeholder and the row no image"]


def test_pairs_that_rlaif_v_writes_have_a_margin(tmp_path: Path) -> None:
    infos = {"scores": {"chosen": {"judge": "x", "score": -1}, "rejected": {"score": -3}}}
    base = {"image_id": 1, "image_path": "a.png", "ds_question_id": "q", "question": "What?", **PAIR}
    table = read(tmp_path, [{**base, "org_infos": infos}, {**base, "org_infos": {}}, {**base, "org_infos": None}])
    assert table.format == "rlaif_v_pairs" and [row.margin for row in table.rows] == [2.0, None, None]
    assert table.rows[0].meta["org_infos"] == infos


# ------------------------------------------------------------------------------------------------ chat formats


def test_trl_in_all_its_shapes(tmp_path: Path) -> None:
    typed = [user([{"type": "image"}, text("What?")])]
    one = {"images": ["a.png"]}
    table = read(
        tmp_path,
        [
            {"prompt": "What?", **PAIR, "image": "a.png"},
            {"prompt": typed, "chosen": [assistant("A")], "rejected": [assistant([text("B")])], **one},
            {"prompt": [user("What?")], "chosen": [assistant("A")], "rejected": [assistant("B")], **one},
            {"chosen": [*typed, assistant("A")], "rejected": [*typed, assistant("B")], **one},
            {"chosen": "The sky is blue", "rejected": "The sky is green"},
            {"prompt": "What?", "completion": "A", "label": False, **one},
            {"prompt": typed, "completion": [assistant("A")], **one},
            {"messages": [*typed, assistant("A"), user("More?"), assistant("B")], **one},
            {"messages": [user([{"type": "image", "image": "a.png"}, text("What?")]), assistant("A")]},
        ],
        format="trl",
    )  # fmt: skip
    assert table.format == "trl" and not table.dropped
    assert brief(table) == [
        *[(Q, "A", "B", "a.png")] * 4, ("user: The sky is", "blue", "green"), *[(Q, "A", None, "a.png")] * 3,
        (f"{Q} | assistant: A | user: More?", "B", None, "a.png"), (Q, "A", None, "a.png"),
    ]  # fmt: skip
    assert [row.kind for row in table.rows[5:7]] == ["unpaired", "answer"] and table.rows[5].label is False
    assert table.rows[8].origin == "t.jsonl line 8 turn 3"


def test_hf_formatted_and_plain_dpo_go_by_name(tmp_path: Path) -> None:
    typed = [user([{"text": None, "type": "image"}, {"text": "What?", "type": "text"}])]
    answers = {each: [assistant([{"text": each, "type": "text"}])] for each in ("chosen", "rejected")}
    images = [[{"bytes": png(1), "path": None}]] * 3
    columns = {"prompt": [typed] * 3, "images": images, **{name: [it] * 3 for name, it in answers.items()}}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    table = read_answers(tmp_path / "t.parquet", format="hf_formatted")
    assert brief(table) == [(Q, "chosen", "rejected", "t.parquet")] * 3 == brief(read_answers(tmp_path / "t.parquet"))
    rows = [{"prompt": "What?", "image": "a.png", **PAIR}]
    assert brief(read(tmp_path, rows, format="plain_dpo")) == brief(read(tmp_path, rows)) == [(Q, "A", "B", "a.png")]


def test_what_trl_rows_may_not_be(tmp_path: Path) -> None:
    good = {"prompt": "What?", **PAIR}
    both = [user("Hi"), assistant("A")]
    table = read(
        tmp_path,
        [
            good,
            {"prompt": "What?", "chosen": [*both], "rejected": "B"},
            {"prompt": "What?", "chosen": [user("A")], "rejected": "B"},
            {"chosen": both, "rejected": both},
            {"chosen": both, "rejected": [user("Other"), assistant("A")]},
            {"chosen": "A", "rejected": both},
            {"prompt": [user([{"type": "text", "text": "What?"}])], **PAIR, "image": "a.png"},
            {"prompt": 3, **PAIR},
            {**good, "label": True},
        ],
    )
    assert reasons(table) == [
        "several turns in an answer: chosen has 2 messages; an answer is one",
        "unknown role: chosen is said by the user, not by the assistant",
        "chosen equals rejected: the conversations are the same",
        "prompts differ: the conversations part after 0 messages and go on for 2 and 2",
        "empty answer: without a prompt, chosen and rejected are both texts or both conversations",
        "placeholders do not match: the prompt has 0 image placeholders for 1 image",
        "no prompt: the prompt is 3, not text",
        "bad label: a label is about a completion, and the row has none",
    ]


def test_ms_swift(tmp_path: Path) -> None:
    told = {"messages": [user("<image>What?"), assistant("A")], "images": ["a.png"]}
    other = [user("<image>What?"), assistant("B")]
    table = read(
        tmp_path,
        [
            {**told, "rejected_response": "B"},
            {**told, "rejected_messages": other, "rejected_images": ["a.png"]},
            {**told, "rejected_images": ["b.png"]},
            {**told, "label": True},
            told,
            {**told, "rejected_response": "B", "rejected_images": ["b.png"]},
            {**told, "rejected_response": "B", "audios": ["x.wav"]},
        ],
    )
    assert table.format == "ms_swift" and {shown(row) for row in table.rows} == {Q}
    assert [row.kind for row in table.rows] == ["pair", "pair", "image_pair", "unpaired", "answer"]
    assert [row.rejected for row in table.rows[:2]] == ["B", "B"] and table.rows[1].rejected_images is None
    assert reasons(table) == [
        "several kinds of answer: the rejected answer has images of its own, which no row can say",
        "has audios: audios are not read",
    ]


def test_llama_factory_reads_its_dataset_info(tmp_path: Path) -> None:
    entry = {"messages": "talk", "chosen": "good", "rejected": "bad", "images": "pics"}
    info = {"ours": {"file_name": "t.json", "formatting": "sharegpt", "ranking": True, "columns": entry}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    rows = [{"talk": [human("<image>What?")], "good": gpt("A"), "bad": gpt("B"), "pics": ["a.png"]}]
    assert brief(read(tmp_path, rows, "t.json", format="llama_factory")) == [(Q, "A", "B", "a.png")]
    kto = [{"conversations": [human("<image>What?"), gpt("A")], "kto_tag": False, "images": ["a.png"]}]
    assert [(row.kind, row.label) for row in read(tmp_path, kto).rows] == [("unpaired", False)]


def test_conversations_that_do_not_fit(tmp_path: Path) -> None:
    table = read(
        tmp_path,
        [
            {"conversations": [human("Hi"), gpt("Yes")]},
            {"image": "a.png", "conversations": [human("<image> <image>"), gpt("Yes")]},
            {"conversations": [human("Hi")]},
            {"conversations": [{"from": "narrator", "value": "x"}]},
            {"conversations": [{"who": "x"}]},
            {"conversations": None},
        ],
        format="llava",
    )
    assert reasons(table) == [
        "placeholders do not match: the prompt has 2 image placeholders for 1 image",
        "empty answer: the assistant says nothing",
        "unknown role: 'narrator' is none of system, user, human, assistant, gpt, model.",
        "bad content: a message is {role, content} or {from, value}, not {'who': 'x'}",
        "no prompt: a conversation is a list of messages, not None",
    ]


# ------------------------------------------------------------------------------------------------ feedback in words


def test_dress_gives_a_refinement_to_imitate_and_a_pair(tmp_path: Path) -> None:
    def step(asks: str, says: str, rating: str) -> dict[str, str]:
        return {"user": asks, "model": says, "rating": rating, "critique NLF": f"{says} is poor."}

    better = [step("What?", "first", "2"), step("Say more.", "second", "4"), step("Again.", "third", "3")]
    table = read(
        tmp_path, [{"image_id": "a.png", "interaction": better}, {"image_id": "b.png", "interaction": better[:1]}]
    )
    talk = f"{Q} | assistant: first | user: first is poor.\nSay more."
    assert table.format == "dress"
    assert brief(table) == [
        (talk, "second", None, "a.png"),
        (Q, "second", "first", "a.png"),
        (f"{talk} | assistant: second | user: second is poor.\nAgain.", "third", None, "a.png"),
    ]
    assert table.rows[1].margin == 2.0 and table.rows[1].meta["ratings"] == [2.0, 4.0]
    assert table.rows[1].origin == "t.jsonl line 1 refinement 1 pair"
    assert reasons(table) == [
        "refined answer is rated lower: refinement 2 goes from 4 to 3",
        "no refinement: there is one answer and no other that refines it",
    ]


def test_critiques_in_columns_of_their_own(tmp_path: Path) -> None:
    base = {"question": "What?", "response": "B", "critique": "No.", "refined": "A", "image": "a.png"}
    table = read(tmp_path, [base, {**base, "critique": " "}, {**base, "refined": None}])
    assert brief(table) == [(f"{Q} | assistant: B | user: No.", "A", None, "a.png"), (Q, "A", "B", "a.png")]
    assert reasons(table) == [
        "no critique: nobody says what is wrong with the answer",
        "empty answer: the refined answer is missing",
    ]


# ------------------------------------------------------------------------------------------------ telling apart


def test_every_format_has_a_line_and_a_test() -> None:
    assert all(line.endswith(".") and len(line) < 130 for line in FORMATS.values())
    for name, adapter in ADAPTERS.items():
        for need in adapter.needs if adapter.auto else ():
            assert detect(need) == name, need


def test_columns_that_fit_several_formats_or_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, [{**ASKED, "prompt": "Which?"}])
    said = "the columns question, image, chosen, rejected, prompt fit the formats trl and rlaif_v; name one of them"
    assert str(caught.value) == f"{tmp_path / 't.jsonl'}: {said}"
    with pytest.raises(ValueError, match=r"the columns caption, url fit no format of trl, hf_formatted, ms_swift, "):
        read(tmp_path, [{"caption": "x", "url": "y"}])
    with pytest.raises(ValueError, match="the columns image, text fit no format"):
        read(tmp_path, [{"image": "a.png", "text": "a caption and no JSON"}])


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"marginn": 1}, {}, "t.jsonl has the column 'marginn', which format 'trl' does not know; it knows "),
        ({"marginn": 1}, {}, r"Did you mean 'margin'\? If .* columns: {the known name: marginn}; unknown_co"),
        ({}, {"format": "mdpo"}, "has no column img_path, which format 'mdpo' needs; its columns are prompt, chosen"),
        ({}, {"format": "rlhfv"}, r"unknown answer format 'rlhfv'; there are auto, trl, .* Did you mean 'rlhf_v'\?"),
        ({}, {"columns": {"chosen": "choosen"}}, r"no column choosen, which columns needs; .*Did you mean 'chosen'\?"),
        ({}, {"columns": {"choosen": "chosen"}}, r"format 'trl' has no column 'choosen'. Did you mean 'chosen'\?"),
        ({}, {"limit": 0}, "limit is 0; it is 1 or more"),
        ({}, {"unknown_columns": "drop"}, "unknown_columns is 'drop'; it is 'error' or 'keep'"),
        ({"rejected": "A"}, {}, "no row can be used, format trl: kept 0 of 1 rows; dropped 1: 1 chosen equals"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_read(tmp_path: Path, change: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, [{"prompt": "What?", **PAIR, **change}], **options)


def test_own_names_and_extra_columns(tmp_path: Path) -> None:
    rows = [{"ask": "What?", "good": "A", "bad": "B", "pic": "a.png", "split": "x", "margin": 2}]
    names = {"prompt": "ask", "chosen": "good", "rejected": "bad", "image": "pic"}
    table = read(tmp_path, rows, columns=names, unknown_columns="keep")
    assert brief(table) == [(Q, "A", "B", "a.png")] and table.rows[0].meta == {"split": "x"}
    assert table.rows[0].margin == 2.0
