"""Prompts that are empty, endless, invisible, backwards or no text at all: each is a score or a row with a reason."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from report_kit import Page
from scorer_kit import TINY, clip_folder

from mmalign.backbones.clip import ClipTokenizer
from mmalign.compare import compare
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.media import write_image
from mmalign.media_table import MediaRow, read_media_table, write_media_table
from mmalign.report import build
from mmalign.results import Results, read_results
from mmalign.score import run
from mmalign.source import well_formed

LETTERS = random.Random(0)
NO_PROMPT, NO_TEXT = "the row has no prompt", "half of a surrogate pair, which is no letter; write it again as UTF-8"
PROMPTS: dict[str, str] = {
    "plain": "a red circle",
    "sentence": "a very long sentence about nothing " * 300,
    "word": "".join(LETTERS.choices("abcdefghijklmnopqrstuvwxyz", k=10_000)),
    "same": "a" * 10_000,
    "nul": "a red\0circle\0",
    "controls": "".join(map(chr, range(1, 32))) + "\x7f\x80\x9f",
    "terminal": "\x1b[31mred\x1b[0m \x1b]0;title\x07",
    "arabic": "دائرة حمراء على خلفية بيضاء",
    "hebrew": "עיגול אדום, a red circle, עיגול",
    "override": "\u202egnp.elcric der\u202c \u2066isolated\u2069 \u200f\u200e",
    "unclosed": "\u202e\u2067\u202b never closed",
    "family": "👨‍👩‍👧‍👦 🏳️‍🌈 👩🏽‍🚀 🇩🇪",
    "emoji": "😀" * 2_500,
    "zalgo": "c" + "\u0301\u0317" * 400,
    "invisible": "\u200b\u200c\u200d\u2060\ufeff",
    "astral": "𝔞 𝕣𝕖𝕕 𓂀 𠜎",  # noqa: RUF001
    "nothing-assigned": "\uffff\ufdd0\ue000\U0010ffff",
    "lines": "one\ntwo\r\nthree\u2028four\u2029five\x0bsix",
    "markup": "<script>alert(1)</script> \"><img src=x onerror=alert(2)> & 'so'",
    "template": "{{ 7 * 7 }} {% for x in y %} ${HOME} %s %n {0}",
    "entities": "&lt;b&gt; &amp;amp; &#0; &#xD800; &#x110000;",
    "sheet": '=HYPERLINK("x"), "quoted", semi; colon\ttab',
    "tokens": "<start_of_text> <end_of_text> <|endoftext|> [PAD]",
    "mojibake": "dÃ©jÃ  vu Ã¢â‚¬Å“",  # noqa: RUF001
}
WITHOUT = {"empty": "", "spaces": "   ", "blank": "\n\t \u3000\u00a0"}
BROKEN = {"high": "a red \ud83d circle", "low": "\udc00", "swapped": "\ude00\ud83d", "bytes": "caf\udce9"}
EVERY = PROMPTS | WITHOUT | BROKEN


@pytest.fixture(name="evaluators", scope="module")
def _evaluators(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluatorSpec, ...]:
    """Three CLIP scorers with small random weights; aesthetic reads no prompt."""
    home = tmp_path_factory.mktemp("weights")
    hps = clip_folder(home / "hps", "HPS_v2.1_compressed.safetensors")
    clip = clip_folder(home / "clip", "open_clip_model.safetensors", seed=1).parent
    head = {"weight": torch.randn(1, TINY["embed_dim"]), "bias": torch.zeros(1)}
    torch.save(head, home / "sa_0_4_vit_l_14_linear.pth")
    aesthetic = {
        "checkpoint": home / "sa_0_4_vit_l_14_linear.pth",
        "clip_checkpoint": clip,
        "model": str(clip),
        "head": "v1",
    }
    return (
        EvaluatorSpec(name="hps", params={"checkpoint": str(hps)}),
        EvaluatorSpec(name="clip_score", params={"checkpoint": str(clip), "model": str(clip)}),
        EvaluatorSpec(name="aesthetic", params={key: str(value) for key, value in aesthetic.items()}),
    )


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_bytes(json.dumps(rows, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(rows)
    return path


def scored(folder: Path, evaluators: tuple[EvaluatorSpec, ...], table: Path, name: str, **more: Any) -> Results:
    config = ScoreConfig(table=table, output=folder / name, evaluators=evaluators, device="cpu", batch_size=7, **more)
    return read_results(run(config))


def rows_for(folder: Path, prompts: dict[str, str], brightness: int = 0) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    rows = []
    for number, (name, prompt) in enumerate(prompts.items()):
        picture = torch.full((20, 30, 3), 5 * number + brightness, dtype=torch.uint8)
        picture[5:10, number % 20 : number % 20 + 5] = 200
        write_image(folder / f"{name}.png", picture.numpy())
        rows.append({"sample": name, "media": f"{name}.png", "prompt": prompt, "seed": 1})
    return rows


def test_each_prompt_is_a_score_or_a_row_with_a_reason(tmp_path: Path, evaluators: Any) -> None:
    table = as_jsonl(tmp_path / "t.jsonl", rows_for(tmp_path, EVERY))
    results = scored(tmp_path, evaluators, table, "out")
    rows = {(row["sample"], row["evaluator"]): row for row in results.rows}
    labels = [results.evaluator(label) for label in results.labels()]
    assert set(rows) == {(name, label) for name in EVERY for label in labels} and len(labels) == 3
    for (name, label), row in rows.items():
        assert row["prompt"] == well_formed(EVERY[name])
        if label.startswith("aesthetic") or name in PROMPTS:
            assert row["status"] == "ok" and math.isfinite(row["score"]), (name, label, row["reason"])
        else:
            reason = NO_PROMPT if name in WITHOUT else NO_TEXT
            assert (row["status"], row["score"]) == ("skipped", None) and row["reason"].endswith(reason), name
    cut = {name for (name, label), row in rows.items() if label.startswith("hps") and row["prompt_truncated"]}
    assert {"sentence", "word", "same", "emoji"} <= cut and "plain" not in cut and "family" not in cut
    for label in labels[:2]:
        entry = results.summary["evaluators"][label]
        assert (entry["n_ok"], entry["n_skipped"], entry["n_error"]) == (len(PROMPTS), 7, 0)
        assert entry["coverage"] == pytest.approx(len(PROMPTS) / len(EVERY))
        assert entry["reasons"] == {f"the prompt holds {NO_TEXT}": 4, NO_PROMPT: 3}
    # A second run finds every row again, those of odd names and prompts too.
    again = scored(tmp_path, evaluators, table, "out")
    assert again.run["computed"] == 0 and len(again.rows) == len(results.rows)


def test_odd_neighbours_do_not_change_a_score(tmp_path: Path, evaluators: Any) -> None:
    rows = rows_for(tmp_path, EVERY)
    among = scored(tmp_path, evaluators, as_jsonl(tmp_path / "t.jsonl", rows), "out")
    alone = scored(tmp_path, evaluators, as_jsonl(tmp_path / "u.jsonl", rows[:1]), "alone")
    score = {row["evaluator"]: row["score"] for row in among.rows if row["sample"] == "plain"}
    assert score == pytest.approx({row["evaluator"]: row["score"] for row in alone.rows}, abs=1e-6)


@pytest.mark.parametrize("write", [as_json, as_parquet, as_csv])
def test_every_kind_of_table_holds_them(tmp_path: Path, evaluators: Any, write: Callable[..., Path]) -> None:
    rows = rows_for(tmp_path, PROMPTS | (BROKEN if write is as_json else {}))
    lines = scored(tmp_path, evaluators[:1], as_jsonl(tmp_path / "t.jsonl", rows), "lines")
    other = scored(tmp_path, evaluators[:1], write(tmp_path / f"t.{write.__name__[3:]}", rows), "other")
    assert [(r["sample"], r["prompt"], r["score"]) for r in lines.rows] == [
        (r["sample"], r["prompt"], r["score"]) for r in other.rows
    ]


def test_report_and_comparison_show_them_unharmed(tmp_path: Path, evaluators: Any) -> None:
    folders = []
    for name, brightness in (("base", 0), ("tuned", 60)):
        rows = rows_for(tmp_path / name, EVERY, brightness)
        table = as_jsonl(tmp_path / name / "t.jsonl", [row | {"model": f"{name} \x1b[31m\u202e"} for row in rows])
        folders.append(scored(tmp_path, evaluators[:1], table, f"{name}-scores").folder)
    comparison = compare(*folders)
    score = comparison.scores[0]
    assert (score.n, comparison.items) == (len(PROMPTS), len(EVERY))
    comparison.save(tmp_path / "comparison.json")
    json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    for results in (folders, folders[:1]):
        html = build(results, tmp_path / "report.html", per_gallery=40).read_text(encoding="utf-8")
        page = Page(html)
        assert not list(page.find("script")) and {attributes["src"][:10] for attributes, _ in page.find("img")} == {
            "data:image"
        }
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", html)
        shown = [(attributes, text) for attributes, text in page.find("p", class_="prompt")]
        assert {attributes["dir"] for attributes, _ in shown} == {"auto"}
        texts = {text for _, text in shown}
        for name in ("plain", "arabic", "hebrew", "family", "markup", "template", "tokens", "astral"):
            assert " ".join(PROMPTS[name].split()) in texts, name


# ------------------------------------------------------------------------------------------------ their parts


def test_a_table_keeps_half_pairs_or_says_that_it_cannot(tmp_path: Path) -> None:
    rows = [MediaRow(name, prompt, str(tmp_path / f"{name}.png")) for name, prompt in EVERY.items()]
    write_media_table(tmp_path / "t.jsonl", rows)
    assert read_media_table(tmp_path / "t.jsonl") == rows
    good = [row for row in rows if row.sample not in BROKEN]
    write_media_table(tmp_path / "t.parquet", good)
    assert read_media_table(tmp_path / "t.parquet") == good
    with pytest.raises(ValueError, match=r"sample 'high': prompt holds half of a surrogate pair.* \.jsonl"):
        write_media_table(tmp_path / "u.parquet", rows)


BAD_TABLES = {
    "deep.jsonl": (b'{"media": "a.png", "aux": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "nested too deeply"),
    "deep.json": (b"[" * 100_000, "nested too deeply|not valid JSON"),
    "digits.jsonl": (b'{"media": "a.png", "seed": ' + b"9" * 5000 + b"}", r"digits.jsonl:1: .*4300 digits"),
    "seed.jsonl": (b'{"media": "a.png", "seed": 99999999999999999999}', "seed is a number of more than 63 bits"),
    "fps.jsonl": (b'{"media": "a.png", "fps": 0}', "fps is 0.0; it is frames per second, above 0"),
    "nan.jsonl": (b'{"media": "a.png", "fps": NaN}', "fps is nan"),
    "latin.jsonl": ('{"media": "a.png", "prompt": "café"}'.encode("latin-1"), "not UTF-8 text"),
    "wide.jsonl": ('{"media": "a.png"}'.encode("utf-16"), "not UTF-8 text|not valid JSON"),
    "latin.csv": ("media,prompt\na.png,café\n".encode("latin-1"), "UTF-8"),
    "zip.jsonl": (b"PK\x03\x04" + bytes(99), "holds a zip archive, not a table; unpack it"),
    "data.zip": (b"PK\x03\x04" + bytes(99), "holds a zip archive, not a table; unpack it"),
    "data.tar.gz": (b"\x1f\x8b" + bytes(99), "holds gzip-compressed data, not a table; unpack it"),
    "picture.png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "holds a PNG image, not a table; name its folder"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_say_what_is_wrong(tmp_path: Path, name: str) -> None:
    data, message = BAD_TABLES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_media_table(tmp_path / name)
    assert type(caught.value) is ValueError and name in str(caught.value)


def test_a_parquet_table_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    pq.write_table(pa.table({"media": ["a.png"], "prompt": broken}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet row 0 or after: a text is not UTF-8 .* write the file again"):
        read_media_table(tmp_path / "t.parquet")


def test_a_parquet_table_damaged_in_the_middle(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(5000)]
    pq.write_table(pa.table({"media": names}), tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    data = bytearray((tmp_path / "t.parquet").read_bytes())
    data[200:900] = bytes(700)
    (tmp_path / "t.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"t\.parquet row 0 and after: cannot be read .* write the file again"):
        read_media_table(tmp_path / "t.parquet")


def test_words_without_end_are_read_as_far_as_the_encoder_sees() -> None:
    """Byte-pair merging is quadratic in the length of a word; what is cut off lies behind the last token anyway."""
    whole, bounded = SimpleTokenizer(context_length=77), ClipTokenizer({})
    generator = random.Random(1)
    alphabets = ("abcdefghijklmnopqrstuvwxyz", "ab", "äöüßéñ", "!?&;:.-", "😀😂🎉", "0123456789", "漢字仮名")
    for alphabet in alphabets:
        text = "of " + "".join(generator.choices(alphabet, k=4_000)) + " and more"
        assert torch.equal(bounded([text]), whole([text])), alphabet
        assert bounded.truncated([text]) == [True]
    assert torch.equal(bounded(["&amp;" * 900 + " end"]), whole(["&amp;" * 900 + " end"]))
    start = time.monotonic()
    bounded(["".join(generator.choices(alphabets[0], k=300_000))])
    assert time.monotonic() - start < 30  # otherwise some half an hour
