"""The configuration folder of `shapes-vlm`, no weights; `mmalign.shapes.blueprint` writes it to configs/shapes/vlm.

A LLaVA: a CLIP vision tower of 64x64 pixels, a projector and a Llama decoder, with a `LlavaProcessor` whose tokenizer
has one token per word of the descriptions and questions.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmalign.shapes import answers, descriptions, questions
from mmalign.shapes.scene import SIDE

PATCH = 16  # pixels: 16 tokens for a picture, and a step takes little more than half as long as with 64
LONGEST = 192  # tokens, those of the picture among them
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>", "<|user|>", "<|assistant|>")
HEADS = frozenset(
    ["a", "above", "at", "below", "everything", "in", "is", "it", "left", "on", "right", "the", "there", "to"]
)  # words that open sentences
TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% else %}<|assistant|>{% generation %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{ part.text }}{% endfor %}{% endif %}</s>{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def words() -> list[str]:
    """Every word that descriptions, questions and prompts are made of, as it stands at the head of a sentence too."""
    asked = {word for text in answers.PROMPTS for word in text.rstrip(".?").split()}
    plain = {word.rstrip("?") for word in descriptions.WORDS | questions.WORDS} - {""}
    return sorted(plain | {word.capitalize() for word in plain if word in HEADS} | asked | {"Yes", "No"})


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word and per mark, spaces between words and none before marks; all else is <unk>."""
    vocabulary = [*SPECIAL, ".", ",", "?", *words()]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=LONGEST, padding_side="right", clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": "<image>", "user_token": "<|user|>", "assistant_token": "<|assistant|>"},
    )  # fmt: skip
    made.chat_template = TEMPLATE
    return made


def processor(patch: int = PATCH) -> LlavaProcessor:
    """Pictures at 64x64 pixels in [-1, 1], one <image> token per patch."""
    pictures = CLIPImageProcessor(
        size={"height": SIDE, "width": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        pictures, tokenizer(), patch_size=patch, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip


def config(vocabulary: PreTrainedTokenizerFast, patch: int = PATCH) -> LlavaConfig:
    """2.7 million parameters: CLIP 4 layers of 128, Llama 4 layers of 192."""
    vision = CLIPVisionConfig(
        image_size=SIDE, patch_size=patch, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, projection_dim=128,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=6, max_position_embeddings=LONGEST, tie_word_embeddings=True,
        bos_token_id=vocabulary.bos_token_id, eos_token_id=vocabulary.eos_token_id,
        pad_token_id=vocabulary.pad_token_id,
    )  # fmt: skip
    made = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary.get_vocab()["<image>"],
        vision_feature_layer=-1, vision_feature_select_strategy="default", image_seq_length=(SIDE // patch) ** 2,
        tie_word_embeddings=True,
    )  # fmt: skip
    made.architectures = ["LlavaForConditionalGeneration"]
    return made


def write_vlm(folder: Path) -> None:
    """Saves what a training from scratch needs: configs, processor, tokenizer with template."""
    made = processor()
    made.save_pretrained(folder)
    config(made.tokenizer).save_pretrained(folder)
    GenerationConfig(
        max_new_tokens=64, do_sample=False, bos_token_id=made.tokenizer.bos_token_id,
        eos_token_id=made.tokenizer.eos_token_id, pad_token_id=made.tokenizer.pad_token_id,
    ).save_pretrained(folder)  # fmt: skip


def untrained(seed: int = 0) -> LlavaForConditionalGeneration:
    """The model with random weights in float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config(tokenizer()))
