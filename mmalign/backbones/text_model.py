"""A local model that is asked in words alone: a text model, or an image-text model that is shown nothing.

A text model's folder is what ``save_pretrained`` writes for a model that AutoModelForCausalLM loads and its tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign.backbones.vlm import load_vlm
from mmalign.backbones.vlm_generate import Writer
from mmalign.backbones.vlm_loading import load_text_parts, model_folder, most_tokens
from mmalign.backbones.vlm_text import ChatFormat
from mmalign.evaluation import BackboneSpec

__all__ = ["TextModel", "load_text_model", "reads_images", "text_model_spec"]


@dataclass(frozen=True)
class TextModel:
    """A frozen text model, with the parts of a `VisionLanguageModel` that need no image.

    Attributes:
        family: its ``model_type``.
        words: makes the texts that it reads; of 0 images.
        writer: writes answers in words.
    """

    family: str
    words: ChatFormat
    writer: Writer


class _Tokens:
    """A tokenizer in the place of a processor: text in, text templates with plain strings for contents."""

    image_token = None

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], **options: Any) -> Any:
        return self.tokenizer(text, return_token_type_ids=False, **options)

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> str:
        plain = [{**each, "content": "".join(part["text"] for part in each["content"])} for each in messages]
        return str(self.tokenizer.apply_chat_template(plain, **options))


def reads_images(folder: str | Path, parameter: str = "model") -> bool:
    """Whether the folder's config is that of an image-text model, or else of a causal language model.

    Raises:
        ValueError: it is neither; or as `model_folder`.
    """
    from transformers.models.auto import modeling_auto as auto

    path = model_folder(folder, parameter)
    kind = json.loads((path / "config.json").read_text(encoding="utf-8"))["model_type"]
    if kind in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return True
    if kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{parameter}: {path} holds a {kind}, which is neither an image-text nor a language model")
    return False


def text_model_spec(folder: str | Path, conversation: str | None = None) -> BackboneSpec:
    """What loads the folder's model, with `words` and `writer`; an image-text model is shared with other evaluators.

    Args:
        conversation: all that the model reads, with {question} in it, in place of its chat template.

    Raises:
        ValueError: as `reads_images`.
    """
    path = str(model_folder(folder))
    if reads_images(folder):
        return BackboneSpec.of(load_vlm, folder=path, conversation=conversation, answer_prefix=None)
    return BackboneSpec.of(load_text_model, folder=path, conversation=conversation)


def load_text_model(
    *,
    folder: str,
    device: torch.device,
    dtype: torch.dtype,
    conversation: str | None = None,
    answer_prefix: str | None = None,
) -> TextModel:
    """Loader for a `BackboneSpec`: a folder that AutoModelForCausalLM and AutoTokenizer read.

    Raises:
        ValueError: another folder, tensors that do not fit, or neither a chat template nor a conversation.
    """
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_text_parts(AutoModelForCausalLM, folder, dtype)
    if conversation is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{folder}: has no chat template; set `conversation`, with {{question}} in it.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = model.eval().requires_grad_(False).to(device)
    tokens, family = _Tokens(tokenizer), str(model.config.model_type)
    words = ChatFormat(tokens, family, conversation, answer_prefix)
    return TextModel(family, words, Writer(model, tokens, words, most_tokens(model.config), device, dtype))
