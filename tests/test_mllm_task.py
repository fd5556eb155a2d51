"""Training on answers through the task and the loop, on tiny models of the real classes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_kit import answer_settings, mllm_folder, picture, stopped_and_resumed, write_rows
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmalign import train
from mmalign.config import ConfigError
from mmalign.media import write_image
from mmalign.methods_mllm_terms import TERMS
from mmalign.mllm import loading
from mmalign.tasks.mllm import MLLMTask

CPU = torch.device("cpu")
LN2 = math.log(2)
KINDS = [term.model_fields["kind"].default for term in TERMS]


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mllm_folder(tmp_path_factory.mktemp("model") / "qwen", "qwen2_5_vl")


@pytest.fixture(scope="module", name="table")
def _table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    columns = {"margin": [0.0, 1.0, 2.0, 5.0, 0.5], "safer": ["chosen", "rejected", "same", "rejected", "chosen"]}
    return write_rows(tmp_path_factory.mktemp("rows"), images=(1, 2), **columns)


def _task(*args: Any, **changes: Any) -> MLLMTask:
    return MLLMTask(answer_settings(*args, **changes), CPU)


def _moved(task: MLLMTask, seed: int = 0) -> MLLMTask:
    """The adapters away from zero, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in task.policy.module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return task


def _loss(task: MLLMTask, items: tuple[int, ...] = (0, 1, 2)) -> tuple[float, dict[str, Any]]:
    with torch.no_grad():
        loss, metrics = task.loss(task.load([(i, 0) for i in items]))
    return loss.item(), metrics


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_term(kind: str, model: Path, table: Path, tmp_path: Path) -> None:
    task = _task(tmp_path / "run", model, table, [kind])
    loss, metrics = task.loss(task.load([(0, 0), (1, 0), (2, 0)]))
    loss.backward()
    gradients = [p.grad for n, p in task.modules.named_parameters() if "lora_B" in n]
    assert torch.isfinite(loss)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    if not task.objective.reference_free and task.objective.items == "pairs":
        assert metrics["implicit_accuracy"].item() == pytest.approx(0.5)
        assert metrics["reward_chosen"].item() == pytest.approx(0, abs=1e-5)


def test_the_first_loss_is_ln_2_for_each_comparison(model: Path, table: Path, tmp_path: Path) -> None:
    """Also for images: policy and reference see the same negative, unlike in mDPO's code."""
    task = _task(tmp_path / "run", model, table, ["dpo", "image_dpo", "anchor"])
    assert _loss(task)[0] == pytest.approx(3 * LN2, abs=1e-5)
    assert _loss(task) == _loss(task)


@pytest.mark.parametrize("kind", ["crop", "noise", "black", "rotate", "other"])
def test_negative_images_are_the_rows_own_and_other_ones(kind: str, model: Path, table: Path, tmp_path: Path) -> None:
    told = {"mllm__negative": {"kind": kind}}
    one, other = (_task(tmp_path / "run", model, table, ["image_dpo"], **told).load([(0, 0)]) for _ in range(2))
    first, again = one["encoded"][0], other["encoded"][0]
    assert torch.equal(first.negative.vision["pixel_values"], again.negative.vision["pixel_values"])
    if kind != "other":  # which may be its own
        assert not torch.equal(first.negative.vision["pixel_values"], first.prompt.vision["pixel_values"])
    assert first.negative.ids == first.prompt.ids


def test_rejected_images_come_before_made_ones(model: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "worse.png", picture((30, 30), 77).permute(1, 2, 0).numpy())
    table = write_rows(tmp_path, 2, rejected_images=[["worse.png"]] * 2)
    task = _task(tmp_path / "run", model, table, ["image_dpo"])
    plain = _task(tmp_path / "run", model, write_rows(tmp_path, 2), ["image_dpo"])
    given, made = (each.load([(0, 0)])["encoded"][0].negative.vision["pixel_values"] for each in (task, plain))
    assert given.shape == made.shape
    assert not torch.equal(given, made)


TOKENS = [{"kind": "plain"}, {"kind": "segments"}, {"kind": "changed_only"}, {"kind": "ld"}, {"kind": "mean"}]


@pytest.mark.parametrize("changes", [
    *({"loss__tokens": tokens} for tokens in TOKENS),
    {"loss__margin": {}}, {"loss__margin": {"kind": "released"}}, {"loss__visual_guidance": {}},
], ids=str)  # fmt: skip
def test_layouts_and_caches_give_the_same_loss(
    changes: dict[str, Any], model: Path, table: Path, tmp_path: Path
) -> None:
    """Rows that share a prompt, rows of their own, and a reference from the cache, cold and warm."""
    ways: list[dict[str, Any]] = [{"mllm__shared_prompt": "on"}, {"mllm__shared_prompt": "off"}]
    if "loss__visual_guidance" not in changes:
        ways += [{"reference__kind": "cached"}] * 2
    found = [_loss(_moved(_task(tmp_path / "run", model, table, **changes, **way)))[0] for way in ways]
    assert found == pytest.approx([found[0]] * len(found), rel=1e-5)
    if len(found) == 4:
        assert found[2] == found[3]


def test_gradients_of_layouts_agree(model: Path, table: Path, tmp_path: Path) -> None:
    found = []
    for shared in ("on", "off"):
        task = _moved(_task(tmp_path / "run", model, table, ["chip"], mllm__shared_prompt=shared))
        task.loss(task.load([(0, 0), (1, 0)]))[0].backward()
        found.append(torch.cat([p.grad.flatten() for p in task.policy.module.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5 * float(found[0].abs().max()))


def test_a_cached_reference_follows_the_processor_and_the_weights(
    model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other pixel limits or other weights are other entries; a changed adapter is not the reference's business."""
    settings = {"reference__kind": "cached"}
    asked: list[int] = []

    def entries(**changes: Any) -> int:
        task = _task(tmp_path / "run", changes.pop("folder", model), table, **settings, **changes)
        kept = task.cache.put  # type: ignore[union-attr]
        asked.clear()
        monkeypatch.setattr(task.cache, "put", lambda *each: (asked.append(1), kept(*each))[1])
        _loss(_moved(task, seed=len(changes)))
        return len(asked)

    assert entries() == 6
    assert entries() == 0
    assert entries(mllm__processor={"size": {"shortest_edge": 784, "longest_edge": 784}}) == 6
    assert entries(folder=mllm_folder(tmp_path / "other", "qwen2_5_vl", seed=3)) == 6
    assert entries(mllm__attention="eager") == 6


@pytest.mark.parametrize("vision", ["frozen", "projector", "trained"])
def test_full_fine_tuning_has_a_frozen_copy_of_what_is_trained(
    vision: str, model: Path, table: Path, tmp_path: Path
) -> None:
    task = _task(tmp_path / "run", model, table, lora=None, mllm__vision=vision)
    assert task.frozen is not None
    own = {id(p) for p in task.policy.module.parameters()}
    shared = [name for name, p in task.frozen.named_parameters() if id(p) in own]
    assert {loading.part_of(name) for name in shared} == ({"vision", "projector"} if vision == "frozen" else set())
    assert task.alike == (vision == "frozen")
    task.loss(task.load([(0, 0), (1, 0)]))[0].backward()
    trained = {loading.part_of(n) for n, p in task.policy.module.named_parameters() if p.grad is not None}
    assert trained == loading.TRAINED[vision]
    assert all(p.grad is None for p in task.frozen.parameters() if id(p) not in own)


def test_adapters_go_where_vision_is_not_frozen(model: Path, table: Path, tmp_path: Path) -> None:
    for vision in ("frozen", "projector", "trained"):
        task = _task(tmp_path / "run", model, table, mllm__vision=vision)
        names = [n for n, p in task.policy.module.named_parameters() if p.requires_grad]
        assert {loading.part_of(name) for name in names} == loading.TRAINED[vision]
        assert all("lora_" in name for name in names)


def test_a_cached_full_fine_tune_keeps_no_second_model(model: Path, table: Path, tmp_path: Path) -> None:
    online = _task(tmp_path / "run", model, table, lora=None)
    cached = _task(tmp_path / "run", model, table, lora=None, reference__kind="cached")
    assert cached.frozen is None
    for task in (online, cached):
        with torch.no_grad():
            for name, parameter in task.policy.module.named_parameters():
                if "mlp" in name and loading.part_of(name) == "language":
                    parameter.mul_(1.05)
    assert _loss(online)[0] == pytest.approx(_loss(cached)[0], rel=1e-5)
    assert abs(_loss(online)[0] - LN2) > 1e-3


# --------------------------------------------------------------------------------------------------- runs and exports


def test_a_run_that_is_resumed_ends_in_the_same_bytes(model: Path, table: Path, tmp_path: Path) -> None:
    terms = ["dpo", {"kind": "bco_pair", "running_shift": True}, "safe_dpo"]
    whole = train.run(answer_settings(tmp_path / "whole", model, table, terms, lora__dropout=0.1))
    half = answer_settings(tmp_path / "half", model, table, terms, lora__dropout=0.1)
    stopped_and_resumed(half)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (whole / "export" / name).read_bytes() == (tmp_path / "half" / "export" / name).read_bytes()
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["multiplier"] != 1.0
    assert {"loss_dpo", "loss_bco_pair", "loss_safe_dpo", "reward_chosen", "implicit_accuracy"} <= lines[-1].keys()


def test_a_lora_of_an_earlier_round_is_gone_on_with(model: Path, table: Path, tmp_path: Path) -> None:
    first = train.run(answer_settings(tmp_path / "first", model, table, optim__lr=3e-2))
    init = str(first / "export")
    task = _task(tmp_path / "second", model, table, lora__init=init)
    assert abs(_loss(task)[1]["margin"].item()) > 1e-3  # the reference is the model without adapters
    again = train.run(answer_settings(tmp_path / "still", model, table, lora__init=init, optim__lr=1e-30))
    name = "export/adapter_model.safetensors"
    before, after = load_file(first / name), load_file(again / name)
    assert all(torch.equal(before[key], after[key]) for key in before.keys() | after.keys())
    with pytest.raises(ValueError, match=r"lora.init: .* give the same lora.rank"):
        _task(tmp_path / "other", model, table, lora__init=init, lora__rank=4)
    with pytest.raises(ValueError, match=r"lora.init: .* has no adapter_config.json"):
        _task(tmp_path / "none", model, table, lora__init=str(tmp_path))


@pytest.mark.parametrize("lora", [{"rank": 2}, None])
def test_what_is_exported_is_what_was_trained(lora: Any, model: Path, table: Path, tmp_path: Path) -> None:
    config = answer_settings(tmp_path / "run", model, table, lora=lora)
    output = train.run(config)
    base = AutoModelForImageTextToText.from_pretrained(model)
    plain = base(input_ids=torch.arange(8)[None]).logits
    if lora:
        loaded: Any = PeftModel.from_pretrained(base, output / "export")
        told = json.loads((output / "export" / "adapter_config.json").read_text())
        assert told["base_model_name_or_path"] == model.name
    else:
        loaded = AutoModelForImageTextToText.from_pretrained(output / "export")
    task = _task(tmp_path / "again", model, table, lora=lora)
    state = load_file(sorted((output / "checkpoints").iterdir())[-1] / "weights.safetensors")
    trained = {name.removeprefix("trained.model."): value for name, value in state.items() if ".model." in name}
    task.policy.module.load_state_dict(trained, strict=False)
    with torch.no_grad():
        own = task.policy.module.eval()(input_ids=torch.arange(8)[None]).logits
        theirs = loaded.eval()(input_ids=torch.arange(8)[None]).logits
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    assert float((own - plain).abs().max()) > 1e-4
    card = (output / "export" / "README.md").read_text()
    assert "dpo x 1" in card
    assert str(tmp_path) not in card.partition("## Configuration")[0]


# -------------------------------------------------------------------------------------------------------------- rows


def test_rows_with_and_without_images_share_batches(model: Path, tmp_path: Path) -> None:
    table = write_rows(tmp_path, 4, images=(1, 0, 2, 0))
    task = _moved(_task(tmp_path / "run", model, table))
    together, _ = _loss(task, (0, 1, 2, 3))
    alone = [_loss(task, (i,))[0] for i in range(4)]
    assert together == pytest.approx(sum(alone) / 4, rel=1e-5)


def test_a_picture_of_one_pixel_and_one_of_64_million(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = write_rows(tmp_path, 3)
    for name, side in (("0-0.png", 1), ("1-0.png", 8000)):
        Image.new("RGB", (side, side), (200, 30, 30)).save(tmp_path / name)
    with caplog.at_level("INFO"):
        task = _task(tmp_path / "run", model, table)
    assert task.size == 2 and "1 undecodable image (rows.jsonl line 1" in task.facts["data"]
    assert "0-0.png: is 1x1 pixels, below min_side=2; replace it or drop the row" in caplog.text
    (large, usual) = task.load([(0, 0), (1, 0)])["encoded"]
    assert large.length > usual.length
    assert all(math.isfinite(_loss(task, (i,))[0]) for i in (0, 1))


def test_long_rows_are_told(model: Path, tmp_path: Path) -> None:
    table = write_rows(tmp_path, images=(1, 2), scale=3)
    lengths = [_task(tmp_path / "run", model, table).load([(i, 0)])["encoded"][0].length for i in range(5)]
    limit = sorted(lengths)[2]
    with pytest.raises(ValueError, match=r"2 of 5 rows are too long, first .*rows.jsonl line \d.*over_long"):
        _task(tmp_path / "run", model, table, mllm__max_length=limit)
    dropped = _task(tmp_path / "run", model, table, mllm__max_length=limit, mllm__over_long="drop")
    assert dropped.size == 3
    assert "dropped 2: 2 too long" in dropped.facts["data"]
    smaller = _task(tmp_path / "run", model, table, mllm__max_length=limit, mllm__over_long="resize")
    assert smaller.size == 5
    assert "2 with smaller images, to fit into mllm.max_length" in smaller.facts["data"]
    with pytest.raises(ValueError, match="no row is left to train on"):
        _task(tmp_path / "run", model, table, mllm__max_length=20, mllm__over_long="drop")


def test_sizes_are_remembered_and_forgotten_with_the_processor(
    model: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmalign.tasks.answers import Answers

    kept, seen = Answers.encode, []
    monkeypatch.setattr(Answers, "encode", lambda self, row: (seen.append(row), kept(self, row))[1])
    counts = []
    for changes in ({}, {}, {"mllm__processor": {"size": {"shortest_edge": 784, "longest_edge": 1568}}}):
        seen.clear()
        _task(tmp_path / "run", model, table, **changes)
        counts.append(len(seen))
    assert counts == [5, 0, 5]


def test_a_table_with_columns_of_its_own(model: Path, table: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    own = [{"better" if key == "chosen" else key: value for key, value in line.items()} | {"x": 1} for line in lines]
    other = table.with_name("own.jsonl")
    other.write_text("\n".join(map(json.dumps, own)))
    with pytest.raises(ValueError, match="has the column 'better', which"):
        _task(tmp_path / "run", model, other)
    renamed: dict[str, Any] = {"mllm__columns": {"chosen": "better"}}
    with pytest.raises(ValueError, match=r"has the column 'x', .* \(in a training job both are keys of mllm"):
        _task(tmp_path / "run", model, other, **renamed)
    task = _task(tmp_path / "run", model, other, **renamed, mllm__unknown_columns="keep", validation__table=str(other))
    assert _loss(task) == _loss(_task(tmp_path / "run", model, table))
    with pytest.raises((ValueError, ConfigError), match=r"mllm\.columns are of data\.table"):
        answer_settings(tmp_path, model, table, data__table=None, data__shapes={"scenes": 4}, **renamed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__resolution": 256}, "data.resolution is about generated pictures"),
        ({"model__variant": "fp16"}, "model.variant is for generators"),
        ({"noise": {"kind": "independent"}}, "noise is for generators"),
        ({"mllm__quantise": "4bit", "lora": None}, "is for weights under a lora"),
        ({"mllm__quantise": "8bit", "sharding": "fsdp2"}, "bitsandbytes keeps codes"),
        ({"reference__kind": "cached", "terms": ["sft"]}, "loss.terms have no reference"),
        ({"reference__kind": "cached", "terms": ["chip"]}, "reads the reference's whole distribution"),
        ({"terms": ["dpo", "dpo"]}, "dpo is there twice"),
        ({"terms": [{"kind": "dpo", "weight": 0}]}, "every weight is 0"),
        ({"terms": ["simpo"], "loss__tokens": {"kind": "mean"}}, "simpo divides by the length itself"),
        ({"terms": ["kto"], "loss__tokens": {"kind": "segments"}}, "segments compares two answers"),
        ({"terms": [{"kind": "dpo", "bta": 1}]}, "Did you mean 'beta'|bta"),
        ({"task": "sft"}, "does not go with task sft"),
    ],
)
def test_configs_without_meaning(
    changes: dict[str, Any], message: str, model: Path, table: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        answer_settings(tmp_path / "run", model, table, changes.pop("terms", ("dpo",)), **changes)


@pytest.mark.parametrize(
    ("columns", "terms", "changes", "message"),
    [
        ({}, ["dpo"], {"loss__margin": {}}, "no margin"),
        ({}, ["safe_dpo"], {}, "no judgement of safety"),
        ({"images": [[]] * 2}, ["image_dpo"], {}, "no image"),
    ],
)
def test_rows_that_lack_what_an_objective_needs(
    columns: Any, terms: Any, changes: Any, message: str, model: Path, tmp_path: Path
) -> None:
    table = write_rows(tmp_path, 2, images=(0,) if columns else (1,))
    with pytest.raises(ValueError, match=message):
        _task(tmp_path / "run", model, table, terms, **changes)
