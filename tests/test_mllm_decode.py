"""Continuations with hidden image tokens: greedy answers are transformers' own, hidden tokens are as if not there."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from mllm_kit import FAMILIES, mllm_folder, picture
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from mmalign.mllm import loading
from mmalign.mllm.chat import Chat
from mmalign.mllm.decode import Decoder, greedy
from mmalign.mllm.encode import Encoder, Media
from mmalign.mllm.passes import Branching, Passes, Prompt
from mmalign.mllm.readout import Head
from mmalign.mllm.rows import Part, Turn


@pytest.fixture(scope="module", name="read")
def _read(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("mllm")

    @cache
    def read(family: str) -> tuple[Any, Encoder, Decoder]:
        folder = mllm_folder(home / family, family)
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
        processor = AutoProcessor.from_pretrained(folder)
        encoder = Encoder(processor, Chat(processor, loading.ends(model)), loading.media_ids(model.config))
        return model, encoder, Decoder(Passes(model, True), Head.of(model))

    return read


def _prompt(encoder: Encoder, seed: int = 0) -> tuple[str, Prompt]:
    text = encoder.chat.frame((Turn("user", (Part("image"), Part("text", "What is it?"))),)).text
    return text, encoder.prompt(text, Media((picture(seed=seed),)))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_transformers_own(family: str, read: Any) -> None:
    model, encoder, decoder = read(family)
    _, prompt = _prompt(encoder)
    found = greedy(decoder, Branching(prompt, ()), encoder.chat.ends, 12)
    given = {"input_ids": torch.tensor([prompt.ids]), "attention_mask": torch.ones(1, len(prompt.ids)).long()}
    if prompt.kinds is not None:
        given["token_type_ids" if family == "gemma3" else "mm_token_type_ids"] = torch.tensor([prompt.kinds])
    config = GenerationConfig(max_new_tokens=12, eos_token_id=list(encoder.chat.ends), pad_token_id=0)
    vision = {name: v.double() if v.is_floating_point() else v for name, v in prompt.vision.items()}
    with torch.no_grad():
        stock = model.generate(**given, **vision, generation_config=config)[0, len(prompt.ids) :].tolist()
    assert found == [token for token in stock if token not in encoder.chat.ends]
    assert len(found) > 3


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_hidden_is_not_seen(family: str, read: Any) -> None:
    """With every image token hidden another picture changes nothing; with none hidden it does. A prefix that the model
    wrote itself is gone on with as before."""
    model, encoder, decoder = read(family)
    image = {getattr(model.config, name, None) for name in ("image_token_id", "image_token_index")}
    answers = []
    for hide in (True, False):
        for seed in (0, 5):
            _, prompt = _prompt(encoder, seed)
            places = [i for i, token in enumerate(prompt.ids) if token in image]
            opened = decoder.open(prompt, places if hide else ())
            first = decoder.head(opened.last)[0].detach()
            whole = decoder.write(opened, (), encoder.chat.ends, max_new_tokens=8)
            if len(whole) > 3:
                rest = decoder.write(opened, whole[:3], encoder.chat.ends, max_new_tokens=len(whole) - 3)
                assert whole[:3] + rest == whole
            answers.append(first)
    torch.testing.assert_close(answers[0], answers[1], rtol=0, atol=1e-5)
    assert float((answers[2] - answers[3]).abs().max()) > 1e-3
    assert float((answers[0] - answers[2]).abs().max()) > 1e-3


def test_drawn_answers_follow_their_seed_and_stop_where_told(read: Any) -> None:
    _, encoder, decoder = read("smolvlm")
    _, prompt = _prompt(encoder)
    opened = decoder.open(prompt)

    def draw(seed: int, **more: Any) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return decoder.write(opened, (), (), max_new_tokens=6, temperature=1.0, generator=generator, **more)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1, stop=lambda ids: len(ids) == 2) == draw(1)[:2]
