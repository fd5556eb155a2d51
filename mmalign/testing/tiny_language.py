"""Tiny language models as text encoders of generators: Gemma 2, Llama 3 and Qwen2.5-VL, with their tokenizers."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

_WIDTH = 32
_QWEN_WORDS = (
    "system Describe Ġthe Ġimage Ġby Ġdetailing Ġcolor Ġshape Ġsize Ġtexture Ġquantity Ġtext Ġspatial Ġrelationships "
    "Ġof Ġobjects Ġand Ġbackground user assistant red green blue Ġcircle Ġsquare"
)


def _chain(words: Iterable[str]) -> list[Any]:
    """Merges (pairs of strings) of a byte pair encoding that put whole words together from the left."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
    return list(merges)


def _vocabulary(entries: Iterable[str], merges: list[Any]) -> dict[str, int]:
    return {entry: index for index, entry in enumerate(dict.fromkeys([*entries, *("".join(pair) for pair in merges)]))}


def tiny_gemma_tokenizer(text: str) -> GemmaTokenizer:
    """A `GemmaTokenizer` of bytes, printable characters and the words of `text`, whose texts begin with <bos>."""
    merges = _chain("▁" + word for word in text.split())
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    characters = ["▁", "\n", *map(chr, range(33, 127))]
    vocab = _vocabulary([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *characters, *text], merges)
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    return tokenizer


def tiny_gemma(tokenizer: GemmaTokenizer) -> Gemma2Model:
    """A two-layer Gemma 2, the second layer with a short sliding window."""
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=64,
        )
    )  # fmt: skip


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """A `Qwen2Tokenizer` of bytes and the words of Qwen-Image's template, which is 34 tokens long, as published."""
    merges = _chain(_QWEN_WORDS.split())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = _vocabulary([*sorted(ByteLevel.alphabet()), *special], merges)
    return Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=special[1:], padding_side="right")


def tiny_qwen(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """A two-layer Qwen2.5-VL with a one-layer vision tower, which text alone never reaches."""
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": _WIDTH, "intermediate_size": 2 * _WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision: dict[str, Any] = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": _WIDTH,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def tiny_llama_tokenizer(template: str, before: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer as Llama 3's, whose texts begin with <|begin_of_text|>.

    Args:
        template: text around a place for the prompt, {}; what is special in it (<|...|>, <image>) is one token.
        before: how many tokens the template has before that place, as many as with the published vocabulary.

    Raises:
        ValueError: the template's words cannot be cut into that many tokens.
    """
    special = re.findall(r"<\|\w+\|>|<image>", template)
    words = re.findall(r"\n+| ?\w+", re.sub(r"<\|\w+\|>|<image>", "|", template))
    merges = _chain(word.replace(" ", "Ġ").replace("\n", "Ċ") for word in words)
    head = template.partition("{}")[0]

    def length(count: int) -> int:
        return len(_llama_tokenizer(special, merges[:count])(head).input_ids)

    count = bisect_left(range(len(merges)), -before, key=lambda k: -length(k))
    if length(count) != before:
        raise ValueError(f"the template falls into {length(count)} tokens, and {before} are asked for")
    return _llama_tokenizer(special, merges[:count])


def _llama_tokenizer(special: list[str], merges: list[Any]) -> PreTrainedTokenizerFast:
    begin, end, pad = "<|begin_of_text|>", "<|end_of_text|>", "<pad>"
    vocab = _vocabulary([*sorted(ByteLevel.alphabet()), begin, end, pad, *special], merges)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, vocab[begin])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=begin, eos_token=end, pad_token=pad, padding_side="right",
        additional_special_tokens=[*dict.fromkeys(special)], model_max_length=8192,
    )  # fmt: skip


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaModel:
    """A four-layer Llama: HunyuanVideo takes the states before the last two."""
    return LlamaModel(_llama_config(tokenizer))


def _llama_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def tiny_llava(tokenizer: PreTrainedTokenizerFast, side: int) -> LlavaForConditionalGeneration:
    """That Llama with a two-layer vision tower of CLIP, whose pictures [side, side] are 576 tokens, as published."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=side,
        patch_size=side // 24,
    )  # fmt: skip
    told: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id}  # the pipeline reads it beside text_config
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=_llama_config(tokenizer),
            image_token_index=tokenizer.get_vocab()["<image>"], **told,
        )
    )  # fmt: skip
