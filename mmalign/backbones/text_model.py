"""Language models without images, addressed as image-text models are: one chat format, one writer of answers.

A folder is what ``save_pretrained`` writes for a model that AutoModelForCausalLM loads and for its tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmalign.backbones.vlm_generate import Writer
from mmalign.backbones.vlm_loading import load_model, model_folder, unreadable
from mmalign.backbones.vlm_text import ChatFormat
from mmalign.weights_read import BAD_CONFIG

__all__ = ["TextModel", "load_text_model", "reads_images"]


@dataclass(frozen=True)
class TextModel:
    """A frozen model.

    Attributes:
        family: its ``model_type``.
        words: makes the texts that it reads.
        writer: writes answers.
    """

    family: str
    words: ChatFormat
    writer: Writer


class _Processor:
    """A tokenizer where a processor is expected: messages lose their parts, which templates of text models do not
    know."""

    image_token = None

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], **kwargs: Any) -> Any:
        return self.tokenizer(text, **kwargs)

    def apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        plain = [{**one, "content": "".join(part["text"] for part in one["content"])} for one in messages]
        return str(self.tokenizer.apply_chat_template(plain, **kwargs))


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


def load_text_model(
    *,
    folder: str,
    device: torch.device,
    dtype: torch.dtype,
    conversation: str | None = None,
    answer_prefix: str | None = None,
) -> TextModel:
    """Loader for a `BackboneSpec`; arguments as for `mmalign.backbones.vlm.load_vlm`.

    Raises:
        ValueError: no such folder, tensors that do not fit, a tokenizer that cannot be read, or neither a chat template
            nor a conversation.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = load_model(AutoModelForCausalLM, folder, dtype)
    path = model_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except BAD_CONFIG as error:
        raise unreadable(f"model: {path}", error) from error
    if conversation is None and not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{folder}: has no chat template; set `conversation`, with {{images}} and {{question}} in it.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    processor, family = _Processor(tokenizer), str(model.config.model_type)
    words = ChatFormat(processor, family, conversation, answer_prefix)
    limit = int(getattr(model.config, "max_position_embeddings", None) or 2**31)
    model = model.eval().requires_grad_(False).to(device)
    return TextModel(family, words, Writer(model, processor, words, limit, device, dtype))
