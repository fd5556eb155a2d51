"""Where a family's image tokens are and lie, and where its answers look: against what was put there."""

from __future__ import annotations

import operator
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_kit import FAMILIES, SEVERAL, mllm_folder, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign.mllm import loading
from mmalign.mllm.attention import (
    attention_to_prompt,
    coordinates,
    image_places,
    inside,
    share_of,
    token_centres,
)
from mmalign.mllm.chat import Chat
from mmalign.mllm.encode import Encoder, Media
from mmalign.mllm.passes import Branching, Passes
from mmalign.mllm.rows import Part, Turn


@pytest.fixture(scope="module", name="read")
def _read(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("mllm")

    @cache
    def read(family: str) -> tuple[Any, Encoder]:
        folder: Path = mllm_folder(home / family, family)
        model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
        processor = AutoProcessor.from_pretrained(folder)
        return model, Encoder(processor, Chat(processor, loading.ends(model)), loading.media_ids(model.config))

    return read


def _tokens(model: Any, encoder: Encoder) -> tuple[int, int]:
    """Ids of the placeholder in texts and of a feature in prompts."""
    tokenizer = encoder.processor.tokenizer
    config = model.config
    image = getattr(config, "image_token_id", None) or config.image_token_index
    return tokenizer.convert_tokens_to_ids(encoder.processor.image_token), int(image)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_images_tokens_are_found(family: str, read: Any) -> None:
    model, encoder = read(family)
    several = family in SEVERAL
    parts = [Part("text", "Image1:"), Part("image")]
    parts += [Part("text", "\nImage2:"), Part("image")] if several else []
    turns = (Turn("user", (*parts, Part("text", "\nIn Image1, what is it?"))),)
    text = encoder.chat.frame(turns).text
    images = (picture((40, 50)), picture((90, 30), 1))[: 1 + several]
    prompt = encoder.prompt(text, Media(images))
    placeholder, image = _tokens(model, encoder)
    beside = family == "llava_onevision" and several  # its template puts all images first
    counts = Passes(model, False).counts(prompt) if beside else None
    places = image_places(prompt.ids, encoder.chat.ids(text), placeholder, image, counts)
    assert len(places) == len(images)
    assert sorted(reduce(operator.iadd, places, [])) == [i for i, token in enumerate(prompt.ids) if token == image]
    if several:  # the second picture alone has its tokens, where families do not treat single pictures otherwise
        assert max(places[0]) < min(places[1])


def test_pictures_side_by_side_are_refused(read: Any) -> None:
    model, encoder = read("llava_onevision")
    turns = (Turn("user", (Part("image"), Part("image"), Part("text", "Which?"))),)
    text = encoder.chat.frame(turns).text
    prompt = encoder.prompt(text, Media((picture(), picture(seed=1))))
    with pytest.raises(ValueError, match="two images stand side by side in the prompt; give counts"):
        image_places(prompt.ids, encoder.chat.ids(text), *_tokens(model, encoder))


@pytest.mark.parametrize("family", FAMILIES)
def test_where_tokens_lie_is_where_the_picture_is(family: str, read: Any) -> None:
    """Tokens lie spread over the picture, rows from top to bottom; a white quarter brightens those that lie in it."""
    model, encoder = read(family)
    turns = (Turn("user", (Part("image"), Part("text", "What is it?"))),)
    text, size = encoder.chat.frame(turns).text, (84, 84)
    made = [encoder.prompt(text, Media((each,))) for each in coordinates(*size)]
    image = _tokens(model, encoder)[1]
    count = made[0].ids.count(image)
    centres = token_centres(*made, count)
    known = centres[~centres.isnan().any(1)]
    assert centres.shape == (count, 2)
    assert len(known) >= 4
    assert bool(((known >= 0) & (known <= 1)).all())
    assert float(known.min()) < 0.3
    assert float(known.max()) > 0.7
    quarter = inside(centres, (0.0, 0.0, 0.5, 0.5))
    assert 0 < int(quarter.sum()) < len(known)


def test_cells_of_llava_are_its_grid(read: Any) -> None:
    _model, encoder = read("llava")  # 28 pixels, patches of 7: 4 x 4 tokens
    turns = (Turn("user", (Part("image"), Part("text", "What is it?"))),)
    text = encoder.chat.frame(turns).text
    centres = token_centres(*(encoder.prompt(text, Media((each,))) for each in coordinates(56, 56)), 16)
    want = torch.tensor([[(c + 0.5) / 4, (r + 0.5) / 4] for r in range(4) for c in range(4)])
    torch.testing.assert_close(centres, want, rtol=0, atol=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_the_models_own(family: str, read: Any) -> None:
    """Against the weights that a stock forward gives for the same tokens."""
    model, encoder = read(family)
    turns = (Turn("user", (Part("image"), Part("text", "What is it?"))),)
    framed = encoder.chat.frame(turns)
    prompt, answer = encoder.prompt(framed.text, Media((picture(),))), encoder.chat.answer(framed, "A red circle.")
    found = attention_to_prompt(Passes(model, False), Branching(prompt, (answer,)), layer=1)
    ids = torch.tensor([[*prompt.ids, *answer]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **prompt.vision}
    if prompt.kinds is not None:
        name = "token_type_ids" if family == "gemma3" else "mm_token_type_ids"
        given[name] = torch.tensor([[*prompt.kinds, *[0] * len(answer)]])
    with torch.no_grad():
        weights = model(**given, output_attentions=True).attentions[1]
    start = len(prompt.ids)
    torch.testing.assert_close(found, weights[0, :, start:, :start].mean((0, 1)), rtol=1e-4, atol=1e-6)
    places = [i for i, token in enumerate(prompt.ids) if token == _tokens(model, encoder)[1]]
    assert share_of(found, places, places) == pytest.approx(1.0)
    assert 0 < share_of(found, places[:1], places) < 1


def test_what_does_not_say_where_it_looks(read: Any) -> None:
    model, encoder = read("llava")
    turns = (Turn("user", (Part("text", "Why?"),)),)
    framed = encoder.chat.frame(turns)
    asked = Branching(encoder.prompt(framed.text, Media()), (encoder.chat.answer(framed, "No."),))
    with pytest.raises(ValueError, match=r"attention.layer is 9, and the language model has layers 0 to 1"):
        attention_to_prompt(Passes(model, False), asked, layer=9)
    kept = model.config._attn_implementation
    try:
        model.config._attn_implementation = "sdpa"
        with pytest.raises(ValueError, match=r"attention weights need mllm\.attention: eager"):
            attention_to_prompt(Passes(model, False), asked)
    finally:
        model.config._attn_implementation = kept
    assert share_of(torch.zeros(4), [0], [0, 1]) == 0.0
