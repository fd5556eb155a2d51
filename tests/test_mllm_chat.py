"""Which tokens of a conversation are an answer's: its text and its end of turn, for every family's template."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from mllm_kit import FAMILIES, mllm_folder, picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign.mllm import loading
from mmalign.mllm.chat import Chat
from mmalign.mllm.encode import Encoder, Media, TooLong
from mmalign.mllm.rows import AnswerRow, Part, Turn

ANSWERS = ("A red circle.", "Yes", "Nein, es ist größer: 3 ≤ 4 🙂", "Two lines.\n\nAnd one more.", " leading space")
END = {
    "qwen2_vl": "<|im_end|>", "qwen2_5_vl": "<|im_end|>", "qwen3_vl": "<|im_end|>", "llava_onevision": "<|im_end|>",
    "internvl": "<|im_end|>", "llava": "</s>", "llava_next": "</s>", "idefics3": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>", "gemma3": "<end_of_turn>",
}  # fmt: skip


@pytest.fixture(scope="module", name="read")
def _read(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("mllm")

    @cache
    def read(family: str) -> tuple[Any, Chat, frozenset[int]]:
        folder = mllm_folder(home / family, family)
        model = AutoModelForImageTextToText.from_pretrained(folder)
        processor = AutoProcessor.from_pretrained(folder)
        return processor, Chat(processor, loading.ends(model)), loading.media_ids(model.config)

    return read


def _prompt(*parts: str) -> tuple[Turn, ...]:
    return (Turn("user", tuple(Part("image") if part == "image" else Part("text", part) for part in parts)),)


@pytest.mark.parametrize("text", ANSWERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scored_tokens_are_the_answer_and_its_end(family: str, text: str, read: Any) -> None:
    processor, chat, media = read(family)
    framed = chat.frame(_prompt("image", "What is it?"))
    ids = chat.answer(framed, text)
    decoded = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert decoded.removesuffix(END[family]).strip() == text.strip()
    assert decoded.endswith(END[family])
    assert ids[-1] in chat.ends
    assert not set(ids) & media
    assert processor.tokenizer.pad_token_id not in ids
    assert len(set(ids[:-1]) & set(chat.ends)) == 0  # one end, at the end


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_answer_make_what_the_processor_makes(family: str, read: Any) -> None:
    """The whole conversation through the processor has our tokens, but for what the template writes behind the end."""
    processor, chat, media = read(family)
    row = AnswerRow(_prompt("image", "What is it?"), "Yes", "A red circle.", origin="row")
    made = Encoder(processor, chat, media).encode(row, Media((picture(),)))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red circle."}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    whole = processor(
        text=[text], images=[[picture()]], input_data_format="channels_first", return_tensors="pt", **chat.special(text)
    )["input_ids"][0].tolist()
    ours = [*made.prompt.ids, *made.answers[1]]
    shared = min(len(whole), len(ours)) - 1  # the last one is the end of turn, or what stands for it
    assert whole[:shared] == ours[:shared]
    assert len(whole) - shared <= 2


def test_an_end_that_the_template_lacks_is_added_once(read: Any) -> None:
    """LLaVA-1.5's template writes no </s> behind an answer, and its training data has one."""
    processor, chat, _ = read("llava")
    framed = chat.frame(_prompt("image", "What is it?"))
    assert not framed.ended
    assert framed.text.endswith("ASSISTANT:")
    assert framed.before == " "
    assert processor.tokenizer.convert_ids_to_tokens(list(chat.answer(framed, "Yes"))) == ["▁Yes", "</s>"]


def test_a_template_without_a_generation_prompt_or_marks(read: Any) -> None:
    """The header of an answer is found from an answer; marks around generated text are not needed."""
    processor, _, _ = read("qwen2_vl")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
        "{% endfor %}"
    )
    chat = Chat(processor, (processor.tokenizer.eos_token_id,), template)
    framed = chat.frame(_prompt("image", "What is it?"))
    assert framed.text.endswith("<|im_start|>assistant\n")
    assert (framed.before, framed.after) == ("", "<|im_end|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write an assistant's text as it stands"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
    ],
)
def test_templates_that_cannot_be_used(template: str, message: str, read: Any) -> None:
    processor, _, _ = read("qwen2_vl")
    with pytest.raises(ValueError, match=message):
        Chat(processor, (1,), template).frame(_prompt("Why?"))


def test_a_folder_without_a_template(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    processor, _, _ = read("smolvlm")
    for part in (processor, processor.tokenizer):
        monkeypatch.setattr(part, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        Chat(processor, (1,))


@pytest.mark.parametrize(("text", "message"), [(" \n", "an answer is empty"), ("A <|im_end|> B", "steers this model")])
def test_answers_that_cannot_be_scored(text: str, message: str, read: Any) -> None:
    _, chat, _ = read("qwen2_vl")
    with pytest.raises(ValueError, match=message):
        chat.answer(chat.frame(_prompt("Why?")), text)


def test_control_tokens_in_a_prompt_are_refused_with_the_row_named(read: Any) -> None:
    processor, chat, media = read("qwen2_vl")
    row = AnswerRow(_prompt("Say <|image_pad|>."), "Yes", "No", origin="rows.jsonl line 7")
    with pytest.raises(ValueError, match=r"rows.jsonl line 7: .*<\|image_pad\|>.*take it out of the row"):
        Encoder(processor, chat, media).encode(row, Media())


def test_more_or_fewer_images_than_places(read: Any) -> None:
    processor, chat, media = read("qwen2_vl")
    for images in ((), (picture(), picture(seed=1))):
        row = AnswerRow(_prompt("image", "What is it?"), "Yes", "No", origin="row 3")
        with pytest.raises(ValueError, match=f"row 3: the processor cannot read this prompt with {len(images)} images"):
            Encoder(processor, chat, media).encode(row, Media(images))


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "gemma3"])
def test_character_spans_become_tokens(family: str, read: Any) -> None:
    processor, chat, _ = read(family)
    framed, text = chat.frame(_prompt("image", "What is it?")), "A red circle, größer."
    places, ids = chat.offsets(framed, text), chat.answer(framed, text)
    assert len(places) == len(ids)
    assert places[-1] == (len(text), len(text))
    start, stop = text.index("red"), text.index("red") + 3
    touched = [token for token, (a, b) in zip(ids, places, strict=True) if a < stop and start < b]
    assert processor.tokenizer.decode(touched).strip() == "red"


# -------------------------------------------------------------------------------------------------- rows too long


def _row() -> AnswerRow:
    return AnswerRow(_prompt("image", "What is it?"), "A red circle.", "Yes", origin="row")


def test_images_are_made_smaller_until_a_row_fits(read: Any) -> None:
    processor, chat, media = read("qwen2_vl")
    whole = Encoder(processor, chat, media).encode(_row(), Media((picture((200, 120)),)))
    assert whole.scale == 1
    encoder = Encoder(processor, chat, media, max_length=whole.length - 1, policy="resize")
    fitted = encoder.encode(_row(), Media((picture((200, 120)),)))
    assert fitted.length <= whole.length - 1
    assert 0 < fitted.scale < 1
    assert fitted.answers == whole.answers
    spare = [token for token in fitted.prompt.ids if token not in media]
    assert spare == [token for token in whole.prompt.ids if token not in media]  # no word is cut


@pytest.mark.parametrize(
    ("family", "policy", "spare", "message"),
    [
        ("qwen2_vl", "drop", -1, r"\d+ tokens, and mllm.max_length is \d+$"),
        ("qwen2_vl", "error", -1, r"\d+ tokens, and mllm.max_length is \d+$"),
        ("qwen2_vl", "resize", -200, r"of them are text"),
        ("llava", "resize", -1, r"also with images at 0\.\d+ of their sides"),  # as many tokens for any picture
    ],
)
def test_rows_that_do_not_fit(family: str, policy: Any, spare: int, message: str, read: Any) -> None:
    processor, chat, media = read(family)
    whole = Encoder(processor, chat, media).encode(_row(), Media((picture(),)))
    limit = max(20, whole.length + spare)
    with pytest.raises(TooLong, match=message):
        Encoder(processor, chat, media, max_length=limit, policy=policy).encode(_row(), Media((picture(),)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(2, 2), (8, 1500), (8000, 8000)])
def test_pictures_of_odd_sizes(family: str, size: tuple[int, int], read: Any) -> None:
    """Tiny, long and large ones become what the processor makes of them, or a sentence that names the row."""
    processor, chat, media = read(family)
    try:
        made = Encoder(processor, chat, media).encode(_row(), Media((picture(size),)))
    except ValueError as error:
        assert str(error).startswith("row: the processor cannot read this prompt with 1 images")
        assert size != (8000, 8000)
    else:
        assert torch.isfinite(made.prompt.vision["pixel_values"]).all()
