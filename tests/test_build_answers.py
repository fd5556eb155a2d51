"""`mmalign prefer-answers` on tiny models: every method, a stop and going on, another model in the same folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_kit import mllm_folder, write_rows
from transformers import BertConfig, BertModel, BertTokenizer

from mmalign import build_answers
from mmalign.builders import makers
from mmalign.builders.similarity import SentenceEncoder
from mmalign.config import build
from mmalign.jobs_build import BuildConfig
from mmalign.mllm.formats import read_answers


@pytest.fixture(scope="module", name="models")
def _models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {family: mllm_folder(home / family, family) for family in FAMILIES}


@pytest.fixture(scope="module", name="table")
def _table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"), 5)


def _config(output: Path, table: Path, folder: Path | None, **wanted: Any) -> BuildConfig:
    told: dict[str, Any] = {"rows": str(table), "output": str(output), "build": wanted.pop("build")}
    if folder is not None:
        told["model"] = {"path": str(folder), "max_new_tokens": 8, "device": "cpu", **wanted.pop("model", {})}
    return build(BuildConfig, {**told, **wanted}, "test", [])


SAMPLED = {"per_prompt": 3, "temperature": 1.0}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bdhs": ({"kind": "bdhs"}, {}),
    "several": ({"kind": "several", "forms": ["sequence"], "counts": [2], "least_perplexity": 1.0}, {}),
    "collage": ({"kind": "several", "forms": ["collage"], "counts": [2, 3], "least_perplexity": 1.0}, {}),
    "pic_in_pic": ({"kind": "several", "forms": ["pic_in_pic"], "least_perplexity": 1.0}, {}),
}


FAMILIES = ("qwen2_vl", "smolvlm", "gemma3", "llava")
# LLaVA-1.5 reads one image to a row.
CASES = [(name, family) for name in METHODS for family in FAMILIES if (name, family) != ("several", "llava")]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_rows_are_built_and_read_back(name: str, family: str, models: Any, table: Path, tmp_path: Path) -> None:
    method, changes = METHODS[name]
    config = _config(tmp_path / "out", table, models[family], build=method, model=changes)
    built = read_answers(build_answers.run(config)).rows
    facts = json.loads((tmp_path / "out" / "build.json").read_text())
    assert facts["built"] == len(built) > 0
    assert len(built) + sum(facts["left_out"].values()) == 5
    for row in built:
        assert row.rejected
        assert row.chosen
        assert row.rejected != row.chosen
        assert len(row.images) == (2 if name == "several" else 1)
        if name != "bdhs":
            assert 0 <= row.meta["share"] <= 1
            assert "image" in [part.kind for turn in row.prompt for part in turn.parts]


def test_answers_are_judged_by_their_claims(
    models: Any, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model writes no lists, so its lists are given here; answers, probabilities and pairs are its own."""
    monkeypatch.setattr(makers.FromClaims, "_list", lambda self, text, decoding: ["Is it red?", "Is it round?"])
    config = _config(
        tmp_path / "out", table, models["qwen2_vl"], model=SAMPLED, build={"kind": "claims", "length_filter": False}
    )
    try:
        built = read_answers(build_answers.run(config)).rows
    except ValueError as error:  # a model with random weights may accept as much of each answer
        assert "their answers are level" in str(error)
        built = []
    said = [json.loads(line)["said"] for line in (tmp_path / "out" / "said.jsonl").read_text().splitlines()]
    assert len(said) == 5
    assert all(len(answer["accepted"]) == 2 for each in said for answer in each["answers"])
    assert all(row.margin and row.margin >= 1 for row in built)


def test_negatives_are_written_beside_their_rows(table: Path, tmp_path: Path) -> None:
    config = _config(tmp_path / "out", table, None, build={"kind": "negatives", "negative": {"kind": "rotate"}})
    built = read_answers(build_answers.run(config)).rows
    assert [len(row.rejected_images or ()) for row in built] == [1] * 5
    assert [len(row.rejected_images or ()) for row in built] == [1] * 5
    for row in built:
        assert row.rejected_images is not None
        assert row.images[0].hash() != row.rejected_images[0].hash()


def test_rows_of_a_table_with_columns_of_its_own(table: Path, tmp_path: Path) -> None:
    own = table.with_name("own.jsonl")
    own.write_text(table.read_text().replace('"chosen"', '"better"').replace('"images"', '"x": 1, "images"'))
    wanted: dict[str, Any] = {"columns": {"chosen": "better"}, "build": {"kind": "negatives"}}
    with pytest.raises(ValueError, match=r"has the column 'x', .*unknown_columns: keep"):
        build_answers.run(_config(tmp_path / "none", own, None, **wanted))
    built = read_answers(build_answers.run(_config(tmp_path / "out", own, None, **wanted, unknown_columns="keep"))).rows
    assert len(built) == 5 and all(row.chosen for row in built)


def test_a_stop_costs_one_row_and_the_same_is_built(
    models: Any, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"kind": "bdhs"}
    whole = build_answers.run(_config(tmp_path / "whole", table, models["smolvlm"], build=method))
    kept, asked = makers.FromHabit.say, []

    def stop(self: Any, number: int, row: Any) -> Any:
        asked.append(number)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return kept(self, number, row)

    config = _config(tmp_path / "half", table, models["smolvlm"], build=method)
    monkeypatch.setattr(makers.FromHabit, "say", stop)
    with pytest.raises(KeyboardInterrupt):
        build_answers.run(config)
    with (tmp_path / "half" / "said.jsonl").open("a") as file:
        file.write('{"key": "cut off')
    half = build_answers.run(config)
    assert asked == [0, 1, 2, 2, 3, 4]
    assert [row.rejected for row in read_answers(half).rows] == [row.rejected for row in read_answers(whole).rows]
    asked.clear()
    build_answers.run(config)
    assert asked == []
    other = _config(tmp_path / "half", table, models["gemma3"], build=method)
    with pytest.raises(ValueError, match="was built by another model, method or seed; give another output"):
        build_answers.run(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"build": {"kind": "claims"}}, "set model.per_prompt to 2 or more, and model.temperature above 0"),
        ({"build": {"kind": "bdhs"}, "model": SAMPLED}, "bdhs has one answer to a row; drop model.per_prompt"),
        ({"build": {"kind": "negatives"}}, "negatives asks no model; drop it"),
        ({"build": {"kind": "several", "counts": [1]}}, "build.counts are from 2 to 9 pictures"),
    ],
)
def test_configs_without_meaning(changes: dict[str, Any], message: str, table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _config(tmp_path / "out", table, Path("model"), **changes)


def test_rows_of_which_nothing_can_be_built(models: Any, tmp_path: Path) -> None:
    table = write_rows(tmp_path, 2, images=(0,))
    with pytest.raises(ValueError, match="nothing could be built of 2 rows: 2 no image"):
        build_answers.run(_config(tmp_path / "out", table, models["smolvlm"], build={"kind": "bdhs"}))


def test_similarity_is_a_cosine_of_means(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "blue", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    BertModel(BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )).save_pretrained(tmp_path)  # fmt: skip
    encoder = SentenceEncoder(tmp_path, torch.device("cpu"))
    assert encoder.similarity("a red dog", "a red dog") == pytest.approx(1)
    assert encoder.similarity("a red dog", "a blue cat") < 0.999
    assert encoder.similarity("a", "a red dog") == pytest.approx(encoder.similarity("a red dog", "a"), abs=1e-6)
