"""A conversation and its answers as a model's own chat template writes them, and the answers' tokens.

An answer's tokens are those of its text and of its end of turn, and nothing else: neither the template's header before
it nor the line break that many templates write behind the end. A template needs no generation marks for that. Where
the template writes no end of turn (LLaVA-1.5's does not), the model's end-of-sequence token stands for it, since a
model that never learns to stop is never measured on a whole answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmalign.mllm.rows import Turn

_MARK = "Qz7answerQz7"  # what no template changes: neither white space nor a control token


@dataclass(frozen=True)
class Framed:
    """A prompt up to where an answer begins, and what the template writes around the answer.

    Attributes:
        text: the prompt, placeholders not expanded.
        before: between `text` and the answer: mostly nothing, a space in LLaVA-1.5's template.
        after: behind the answer, as far as the end of turn; without one, nothing.
        ended: whether `after` has the end of turn.
    """

    text: str
    before: str
    after: str
    ended: bool


class Chat:
    """The texts and tokens of one model's conversations.

    Attributes:
        ends: ids of the tokens that end an answer.
    """

    def __init__(self, processor: Any, ends: Sequence[int], template: str | None = None):
        """`ends`: the model's end-of-sequence ids, from its generation config; the first one ends where nothing does.

        Raises:
            ValueError: there is no chat template, or no end token.
        """
        self._processor, self._tokenizer, self._template = processor, processor.tokenizer, template
        self.ends = tuple(ends) or tuple(i for i in (processor.tokenizer.eos_token_id,) if i is not None)
        if not self.ends:
            raise ValueError("neither the generation config nor the tokenizer has an end-of-sequence token")
        own = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
        if template is None and not own:
            raise ValueError(
                "the model's folder has no chat template (chat_template.jinja); put the one of its publisher there, or "
                "give mllm.chat_template, a Jinja file"
            )
        self._ends = sorted(filter(None, self._tokenizer.convert_ids_to_tokens(list(self.ends))), key=len, reverse=True)
        special = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        more = (getattr(processor, name, None) for name in ("image_token", "video_token"))
        self._control = frozenset(special.union(token for token in more if isinstance(token, str)))

    def frame(self, turns: Sequence[Turn], system: str | None = None) -> Framed:
        """The prompt in the chat template.

        Raises:
            ValueError: a text holds a control token of the model's, or the template refuses the conversation or
                changes answers, so that their tokens could not be told from its own.
        """
        messages = self._messages(turns, system)
        answer = {"role": "assistant", "content": [{"type": "text", "text": _MARK}]}
        open_, bare = self._render(messages, True), self._render(messages, False)
        whole = self._render([*messages, answer], False)
        head, found, after = whole.partition(_MARK)
        if not found or _MARK in after:
            raise ValueError(
                "the chat template does not write an assistant's text as it stands, so its tokens cannot be told from "
                "the template's; give mllm.chat_template, a Jinja file that does"
            )
        asks = open_ != bare and head.startswith(open_)  # else there is no header to ask with: take the answer's own
        text, before = (open_, head[len(open_) :]) if asks else (head, "")
        return Framed(text, before, *self._ended(after))

    def _ended(self, after: str) -> tuple[str, bool]:
        places = [(after.find(end), end) for end in self._ends if end in after]
        if not places:
            return "", False
        place, end = min(places)
        return after[: place + len(end)], True

    def answer(self, framed: Framed, text: str) -> tuple[int, ...]:
        """Token ids of an answer with its end of turn.

        Tokenised behind the prompt, so that the first token is the one a model would write there, and by itself where
        the two would melt into one token.

        Raises:
            ValueError: the answer holds a control token, or nothing but white space.
        """
        if not text.strip():
            raise ValueError("an answer is empty")
        tail = framed.before + self.plain(text) + framed.after
        before, joint = self.ids(framed.text), self.ids(framed.text + tail)
        if joint[: len(before)] == before:
            ids = joint[len(before) :]
        else:
            ids = list(self._tokenizer(tail, add_special_tokens=False)["input_ids"])
        return tuple(ids) if framed.ended else (*ids, self.ends[0])

    def begun(self, framed: Framed, text: str) -> tuple[int, ...]:
        """Token ids of an answer that is not at its end, without the white space that the next word will bring."""
        said = self.plain(text.rstrip())
        if not said:
            return ()
        before, joint = self.ids(framed.text), self.ids(framed.text + framed.before + said)
        if joint[: len(before)] == before:
            return tuple(joint[len(before) :])
        return tuple(self._tokenizer(framed.before + said, add_special_tokens=False)["input_ids"])

    def behind(self, begun: Sequence[int], more: Sequence[int]) -> str:
        """What further tokens add to the text of those before them, spaces as they fall."""
        whole = self._tokenizer.decode([*begun, *more], skip_special_tokens=True)
        start = self._tokenizer.decode(list(begun), skip_special_tokens=True)
        return str(whole[len(start) :])

    def offsets(self, framed: Framed, text: str) -> list[tuple[int, int]]:
        """Where in `text` each of the answer's tokens stands; (n, n) for those of the template, n its length.

        Raises:
            ValueError: the tokenizer cannot tell (one without a Rust backend).
        """
        tail = framed.before + text + framed.after
        if not getattr(self._tokenizer, "is_fast", False):
            raise ValueError("spans of characters need a fast tokenizer, and this model's folder has a slow one")
        before, joint = self.ids(framed.text), self.ids(framed.text + tail)
        alone = joint[: len(before)] != before
        whole = tail if alone else framed.text + tail
        special = {"add_special_tokens": False} if alone else self.special(framed.text)
        found = self._tokenizer(whole, return_offsets_mapping=True, **special)["offset_mapping"]
        shift = len(framed.before) if alone else len(framed.text) + len(framed.before)
        kept = found if alone else found[len(before) :]
        places = [(min(max(a - shift, 0), len(text)), min(max(b - shift, 0), len(text))) for a, b in kept]
        return places if framed.ended else [*places, (len(text), len(text))]

    def ids(self, text: str) -> list[int]:
        """Token ids of a text that begins a conversation, placeholders not expanded."""
        return list(self._tokenizer(text, **self.special(text))["input_ids"])

    def special(self, text: str) -> dict[str, bool]:
        """Whether the tokenizer adds its first token: not where the template has written it already."""
        bos = self._tokenizer.bos_token
        return {"add_special_tokens": not (bos and text.startswith(bos))}

    def plain(self, text: str) -> str:
        """The text itself, if it holds no control token of the model's; else ValueError."""
        found = sorted(token for token in self._control if token in text)
        if found:
            raise ValueError(f"a text holds {found[0]!r}, which steers this model; take it out of the row")
        return text

    def _messages(self, turns: Sequence[Turn], system: str | None) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if system is not None and turns[0].role != "system":
            messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        for turn in turns:
            parts: list[Mapping[str, str]] = [
                {"type": "text", "text": self.plain(part.text)} if part.kind == "text" else {"type": part.kind}
                for part in turn.parts
            ]
            messages.append({"role": turn.role, "content": parts})
        return messages

    def _render(self, messages: list[dict[str, Any]], ask: bool) -> str:
        from jinja2 import TemplateError

        more = {} if self._template is None else {"chat_template": self._template}
        try:
            text = self._processor.apply_chat_template(messages, add_generation_prompt=ask, tokenize=False, **more)
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
        return str(text)
