"""What builders ask a vision-language model: continuations, attention, log-probabilities of one prompt at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mmalign.devices import resolve_device, resolve_dtype
from mmalign.jobs_mllm import Mllm
from mmalign.jobs_respond import Responding
from mmalign.mllm import loading
from mmalign.mllm.chat import Chat, Framed
from mmalign.mllm.decode import Decoder
from mmalign.mllm.encode import Encoder, Media
from mmalign.mllm.passes import Passes, Prompt
from mmalign.mllm.readout import Head
from mmalign.mllm.rows import Turn
from mmalign.paths import find


@dataclass
class Kit:
    """A model with its processor, read a prompt at a time."""

    model: Any
    encoder: Encoder
    passes: Passes
    head: Head
    decoder: Decoder
    asked: Responding

    @classmethod
    def load(cls, asked: Responding, attention: str = "sdpa") -> Kit:
        """ValueError as `loading.load`; or a conversation of one's own, which rows of several turns have none of."""
        if asked.conversation is not None:
            raise ValueError("model.conversation is for questions; rows here are conversations: use the chat template")
        device, dtype = resolve_device(asked.device), resolve_dtype(asked.dtype)
        model, processor = loading.load(find(asked.path), Mllm(attention=attention), dtype, device)
        if asked.lora is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(find(asked.lora))).merge_and_unload()
        model.eval().requires_grad_(False)
        chat = Chat(processor, loading.ends(model))
        encoder = Encoder(processor, chat, loading.media_ids(model.config), system=asked.system)
        passes, head = Passes(model, True), Head.of(model)
        decoder = Decoder(passes, head, encoder.media_ids)
        return cls(model, encoder, passes, head, decoder, asked)

    def framed(self, turns: tuple[Turn, ...]) -> Framed:
        return self.encoder.chat.frame(turns, self.asked.system)

    def prompt(self, framed: Framed, media: Media) -> Prompt:
        return self.encoder.prompt(framed.text, media)

    def image_tokens(self, prompt: Prompt) -> list[int]:
        """Places of all image tokens."""
        return [place for place, token in enumerate(prompt.ids) if token in self.encoder.media_ids]

    def answer(self, prompt: Prompt, seed: int = 0) -> tuple[int, ...]:
        """Tokens of an answer, greedy or drawn as the settings say, without the end."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(self.decoder.write(
            self.decoder.open(prompt), (), self.encoder.chat.ends, max_new_tokens=self.asked.max_new_tokens,
            temperature=self.asked.temperature, generator=generator,
        ))  # fmt: skip
