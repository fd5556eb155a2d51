"""Implicit rewards: how much likelier an adapter makes an answer than the model without it.

r(y) = (beta / T) sum over the answer's T tokens, its end of turn among them, of log pi(y_t) - log pi_ref(y_t), the
length-normalised reward of RLAIF-V's self-feedback (2405.17220). beta changes no order and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmalign.backbones.vlm_lora import adapter_files
from mmalign.jobs_mllm import Mllm
from mmalign.mllm import loading
from mmalign.mllm.chat import Chat
from mmalign.mllm.encode import Encoder, Media
from mmalign.mllm.passes import Branching, Passes, shares
from mmalign.mllm.readout import Head, log_probs
from mmalign.mllm.rows import Turn
from mmalign.paths import find

__all__ = ["BASE", "Implicit"]

BASE = "base"


class Implicit:
    """A model and adapters of it, which judge answers.

    Args:
        adapters: name -> folder of a LoRA of PEFT on the same model.
        system: system message, in place of what the chat template puts there.

    Raises:
        ValueError: as `loading.load`; or a folder is no adapter, or not one of this model.
    """

    def __init__(
        self, folder: Path, adapters: Mapping[str, Path], *, dtype: torch.dtype, device: torch.device,
        system: str | None = None,
    ):  # fmt: skip
        self.model, processor = loading.load(find(folder), Mllm(), dtype, device)
        for name, path in adapters.items():
            adapter_files(path)
            try:
                self.model.load_adapter(str(find(path)), adapter_name=name)
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"{path}: the adapter does not fit {folder} ({error})") from error
        self.model.eval().requires_grad_(False)
        self.names = tuple(adapters)
        self.system, self.device = system, device
        chat = Chat(processor, loading.ends(self.model))
        self.encoder = Encoder(processor, chat, loading.media_ids(self.model.config), system=system)
        self.passes, self.head = Passes(self.model, not shares(self.model)), Head.of(self.model)

    @torch.no_grad()
    def means(self, turns: Sequence[Turn], media: Media, answers: Sequence[str]) -> dict[str, list[float]]:
        """For each adapter the rewards of the answers, and as `BASE` their mean log-probability without any."""
        framed = self.encoder.chat.frame(turns, self.system)
        prompt = self.encoder.prompt(framed.text, media)
        ask = Branching(prompt, tuple(self.encoder.chat.answer(framed, text) for text in answers))
        with loading.adapters_off(self.model) if self.names else torch.no_grad():
            base = self._log_probs(ask)
        found = {BASE: [float(each.mean()) for each in base]}
        for name in self.names:
            self.model.set_adapter(name)
            own = self._log_probs(ask)
            found[name] = [float((a - b).mean()) for a, b in zip(own, base, strict=True)]
        return found

    def _log_probs(self, ask: Branching) -> list[Tensor]:
        """Of each answer's tokens, float64 on the CPU."""
        ids = torch.tensor([token for answer in ask.answers for token in answer], device=self.device)
        values = log_probs(self.head, self.passes.hidden([ask], self.passes.see([ask.prompt])), ids)
        return list(values.double().cpu().split([len(answer) for answer in ask.answers]))
