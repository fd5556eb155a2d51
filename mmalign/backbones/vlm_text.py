"""What a vision-language model reads: a question with places for images, in its own chat format, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import field_validator

from mmalign.backbones.vlm_loading import model_folder
from mmalign.config import Strict

__all__ = ["ChatFormat", "End", "VlmParams", "fill"]

End = Literal["never", "always", "needed"]

IMAGE_TEXT = {family: "<|vision_start|><|image_pad|><|vision_end|>" for family in ("qwen2_vl", "qwen2_5_vl")}
"""What stands for one image in a conversation of the user's own, where it is more than the placeholder."""


class VlmParams(Strict):
    """Which model is asked, and how it is addressed: the parameters of every evaluator that asks one.

    Attributes:
        model: a folder of an image-text model of transformers with its processor.
        conversation: what the model reads, in place of the folder's chat template; ``{images}`` and ``{question}`` are
            replaced. For folders without a template, or to repeat somebody's format to the letter.
        answer_prefix: what stands before the model's answer; by default a space, unless white space or a control token
            is there already.
    """

    model: Path
    conversation: str | None = None
    answer_prefix: str | None = None

    @field_validator("conversation")
    @classmethod
    def _places(cls, value: str | None) -> str | None:
        if value is not None and not ("{images}" in value and "{question}" in value):
            raise ValueError("needs both {images} and {question}, as in 'USER: {images}\n{question} ASSISTANT:'")
        return value

    def loading(self, weights: bool = True) -> dict[str, Any]:
        """Arguments for `load_vlm`; equal ones give evaluators the same model. ``weights``: see `model_folder`."""
        folder = str(model_folder(self.model, weights=weights))
        return {"folder": folder, "conversation": self.conversation, "answer_prefix": self.answer_prefix}


def fill(template: str, prompt: str) -> str:
    """The template with ``{prompt}`` replaced; braces of the prompt are left alone.

    Raises:
        ValueError: the prompt is empty.
    """
    if not prompt.strip():
        raise ValueError("The prompt is empty, and a question about nothing has no answer; give the row a prompt.")
    return template.replace("{prompt}", prompt)


class ChatFormat:
    """Texts and their tokens for one model.

    Attributes:
        placeholder: id of the token that stands for an image; -1 for a model of text alone.
    """

    def __init__(self, processor: Any, family: str, conversation: str | None, answer_prefix: str | None):
        self._processor, self._tokenizer, self._family = processor, processor.tokenizer, family
        self._conversation, self._answer_prefix = conversation, answer_prefix
        image = processor.image_token
        self._image = IMAGE_TEXT.get(family, image or "")
        special = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        self._control = frozenset([*special, *([image] if image else [])])
        self.placeholder = int(self._tokenizer.convert_tokens_to_ids(image)) if image else -1

    def chat(self, question: str, images: int, prefill: str = "", system: str | None = None) -> str:
        """What the model reads: images, then the question, in its own chat format, up to where its answer begins.

        Args:
            question: the user's words.
            images: how many placeholders are put before them.
            prefill: the beginning of the answer, put into the model's mouth.
            system: what stands before all in the role of the system, in place of what the template itself puts there.

        Raises:
            ValueError: the question holds a control token of the model's, such as ``<image>``; or a system message for
                a conversation of one's own, which has it in it.
        """
        if system is not None and self._conversation is not None:
            raise ValueError("`conversation` is all that the model reads; write the system message into it")
        if self._conversation is None:
            content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": self.plain(question)}]
            before = [{"role": "system", "content": [{"type": "text", "text": self.plain(system)}]}] if system else []
            text = self.render([*before, {"role": "user", "content": content}], answer=True)
        else:
            text = self._conversation.replace("{images}", self._image * images)
            text = text.replace("{question}", self.plain(question))
        return text + self.joint(text) + prefill if prefill else text

    def render(self, messages: list[dict[str, Any]], answer: bool) -> str:
        """Messages in the folder's chat template; with ``answer`` up to where the model's answer begins."""
        return str(self._processor.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False))

    def plain(self, text: str) -> str:
        """The text itself, if it holds no control token of the model's; else ValueError."""
        found = sorted(token for token in self._control if token in text)
        if found:
            raise ValueError(
                f"The text holds {found[0]!r}, which steers {self._family} models; take it out of the row."
            )
        return text

    def joint(self, text: str) -> str:
        """What stands between the text and an answer: a space, unless the text ends in white space or a control token.

        So the answer gets the token that it has in the model's training data: ``▁Yes`` after ``ASSISTANT:``, ``Yes``
        after a line break.
        """
        if self._answer_prefix is not None:
            return self._answer_prefix
        return "" if text[-1:].isspace() or any(text.endswith(token) for token in self._control) else " "

    def special(self, text: str) -> dict[str, bool]:
        """Whether the tokenizer adds its first token: not where the template has written it already."""
        bos = self._tokenizer.bos_token
        return {"add_special_tokens": not (bos and text.startswith(bos))}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, one placeholder for each image."""
        return list(self._tokenizer(text, **self.special(text))["input_ids"])

    def choice_ids(self, text: str, answers: Sequence[str], end: End = "never") -> list[tuple[int, ...]]:
        """Token ids of answers behind a text.

        Args:
            end: whether the token that ends an answer is added: to all of them, to none, or to all if the tokens of one
                are how another begins (``no`` and ``no one``).

        Raises:
            ValueError: an answer has no token of its own there, or its first one swallows the end of the text.
        """
        before, joint = self.ids(text), self.joint(text)
        found = []
        for answer in answers:
            whole = self.ids(text + joint + answer)
            if whole[: len(before)] != before or len(whole) == len(before):
                raise ValueError(
                    f"The answer '{answer}' cannot be told apart from the end of the question in the tokens of this "
                    f"{self._family} model; set `answer_prefix` to what the model writes before an answer, or ''."
                )
            found.append(tuple(whole[len(before) :]))
        alike = any(a != b and b[: len(a)] == a for a in found for b in found)
        if end == "always" or (end == "needed" and alike):
            return [(*ids, int(self._tokenizer.eos_token_id)) for ids in found]
        return found
