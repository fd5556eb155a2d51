"""Answers through the real classes of every family: against stock forwards in float64, rows that share a prompt against
rows of their own, values and gradients; and which tokens are scored."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_kit import FAMILIES, SEVERAL, mllm_folder, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign.mllm import loading
from mmalign.mllm.chat import Chat
from mmalign.mllm.encode import Encoded, Encoder, Media
from mmalign.mllm.passes import TEXT_INPUTS, Branching, Passes, shares
from mmalign.mllm.readout import Head, log_probs
from mmalign.mllm.rows import AnswerRow, Part, Turn

LONG = "No, it is blue, and so small that nobody would see it from here."


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("mllm")
    return cache(lambda family: mllm_folder(home / family, family))


@cache
def _loaded(folder: Path, attention: str = "sdpa") -> tuple[Any, Any, Encoder]:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation=attention)
    processor = AutoProcessor.from_pretrained(folder)
    encoder = Encoder(processor, Chat(processor, loading.ends(model)), loading.media_ids(model.config))
    return model.eval(), processor, encoder


def _turn(text: str, images: int = 0, role: Any = "user") -> Turn:
    return Turn(role, (*(Part("image") for _ in range(images)), Part("text", text)))


def _rows(family: str) -> list[tuple[AnswerRow, tuple[torch.Tensor, ...]]]:
    """One image, none, one of another size behind an earlier exchange, and several where the family reads them."""
    earlier = (_turn("What is it?", 1), _turn("A house.", role="assistant"), _turn("And its roof, which colour is it?"))
    rows = [
        (AnswerRow((_turn("What is it?", 1),), "A red circle.", LONG, origin="row 1"), (picture(),)),
        (AnswerRow((_turn("Why?"),), "Because it is.", "No.", origin="row 2"), ()),
        (AnswerRow(earlier, LONG, "Red.", origin="row 3"), (picture((70, 30), 1),)),
    ]
    if family in SEVERAL:
        both = (picture(seed=2), picture((30, 90), 3))
        rows.append((AnswerRow((_turn("Which of them?", 2),), "The first.", "Both are red.", origin="row 4"), both))
    return rows


def _encoded(family: str, encoder: Encoder) -> list[Encoded]:
    return [encoder.encode(row, Media(images)) for row, images in _rows(family)]


def _read(model: Any, encoded: list[Encoded], shared: bool, branchings: list[Branching] | None = None) -> torch.Tensor:
    passes = Passes(model, shared)
    branchings = branchings or [Branching(each.prompt, each.answers) for each in encoded]
    hidden = passes.hidden(branchings, passes.see([each.prompt for each in branchings]))
    ids = torch.tensor([token for each in branchings for answer in each.answers for token in answer])
    return log_probs(Head.of(model), hidden, ids)


def _stock(model: Any, processor: Any, encoder: Encoder, family: str) -> torch.Tensor:
    """Each answer in one stock forward of its own: prompt by the processor, the answer's tokens behind it."""
    found = []
    for row, images in _rows(family):
        framed = encoder.chat.frame(row.prompt)
        for text in (row.chosen, row.rejected):
            assert text is not None
            answer = encoder.chat.answer(framed, text)
            media = {"images": [list(images)], "input_data_format": "channels_first"} if images else {}
            inputs = processor(text=[framed.text], **media, return_tensors="pt", **encoder.chat.special(framed.text))
            start = inputs["input_ids"].shape[1]
            for name in TEXT_INPUTS & set(inputs):
                filled = torch.full((1, len(answer)), 1 if name == "attention_mask" else 0)
                more = torch.tensor([answer]) if name == "input_ids" else filled
                inputs[name] = torch.cat([inputs[name], more], 1)
            with torch.no_grad():
                logits = model(**inputs).logits[0, start - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_stock_forwards(family: str, shared: bool, folders: Any) -> None:
    model, processor, encoder = _loaded(folders(family))
    assert shares(model) is None
    with torch.no_grad():
        found = _read(model, _encoded(family, encoder), shared)
    torch.testing.assert_close(found, _stock(model, processor, encoder, family), rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_the_layout(family: str, folders: Any) -> None:
    """Also of the vision tower, whose features are then used by several rows. Norms and softmax are float32 inside."""
    model, _, encoder = _loaded(folders(family))
    encoded, found = _encoded(family, encoder), []
    for shared in (False, True):
        model.zero_grad()
        values = _read(model, encoded, shared)
        (values * torch.linspace(-1, 2, len(values))).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(loading.part_of(name) == "vision" for name in found[0])
    largest = max(float(gradient.abs().max()) for gradient in found[0].values())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("family", ["llava_next", "idefics3", "qwen3_vl", "gemma3"])
def test_neighbours_do_not_matter(family: str, folders: Any) -> None:
    """Rows of other lengths and numbers of images are padded, and their pictures too."""
    model, _, encoder = _loaded(folders(family))
    encoded = _encoded(family, encoder)
    for shared in (False, True):
        with torch.no_grad():
            together = _read(model, encoded, shared)
            alone = torch.cat([_read(model, [each], shared) for each in encoded])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_eager_attention_has_the_same_masks(family: str, folders: Any) -> None:
    found = []
    for attention in ("sdpa", "eager"):
        model, _, encoder = _loaded(folders(family), attention)
        with torch.no_grad():
            found.append(_read(model, _encoded(family, encoder), True))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)  # eager softmax is float32


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_an_image_is_encoded_once_for_both_answers(family: str, folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, encoder = _loaded(folders(family))
    encoded = _encoded(family, encoder)
    seen: list[int] = []
    kept = model.base_model.get_image_features

    def counted(**inputs: Any) -> Any:
        seen.append(len(inputs.get("image_grid_thw", inputs["pixel_values"])))
        return kept(**inputs)

    monkeypatch.setattr(model.base_model, "get_image_features", counted)
    with torch.no_grad():
        _read(model, encoded, False)
    assert seen == [sum(len(images) for _, images in _rows(family))]


def test_two_prompts_of_a_row_have_features_of_their_own(folders: Any) -> None:
    """The same words with another picture, as image-conditional terms ask."""
    model, _, encoder = _loaded(folders("qwen2_5_vl"))
    (row, images), other = _rows("qwen2_5_vl")[0], picture(seed=9)
    both = encoder.encode(row, Media(images), (other,))
    assert both.negative is not None
    assert both.negative.ids == both.prompt.ids
    asks = [Branching(both.prompt, both.answers), Branching(both.negative, both.answers[:1])]
    with torch.no_grad():
        found = _read(model, [], True, asks)
        alone = _read(model, [encoder.encode(row, Media((other,)))], False)
    count = len(both.answers[0])
    torch.testing.assert_close(found[-count:], alone[:count], rtol=0, atol=1e-12)
    assert float((found[-count:] - found[:count]).abs().max()) > 1e-3
