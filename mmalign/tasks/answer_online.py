"""Rejected answers that the policy writes during training: BDHS's online form (Amirloo et al. 2407.02477)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mmalign import noise
from mmalign.builders.habit import anew, likeness
from mmalign.jobs_mllm import Online
from mmalign.mllm.decode import Decoder
from mmalign.mllm.encode import Encoded, TooLong
from mmalign.mllm.loading import evaluating
from mmalign.mllm.passes import Passes
from mmalign.mllm.readout import Head
from mmalign.mllm.rows import AnswerRow
from mmalign.tasks.answers import Answers, content

__all__ = ["OnlineAnswers"]


class OnlineAnswers:
    """What a batch becomes before its step.

    Args:
        module: the policy; it writes without dropout and gradients.
        seed: of the run: what is written depends on it, the step, the row and the policy's weights alone.
    """

    def __init__(self, settings: Online, answers: Answers, module: nn.Module, head: Head, seed: int):
        self.settings, self.answers, self.module, self.seed = settings, answers, module, seed
        self.decoder = Decoder(Passes(module, False), head, answers.encoder.media_ids)
        self.similar = likeness(settings.encoder, next(module.parameters()).device)
        self.step = 0

    def renewed(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with a pair (row, what the policy writes) for each row, and before them the rows that are pairs
        already.

        Raises:
            ValueError: nothing else than the good answers was written for any row.
        """
        places = [i for i, each in enumerate(batch["encoded"]) if len(each.answers) == 2]
        encoded: list[Encoded] = [batch["encoded"][i] for i in places]
        with evaluating(self.module):
            for i, item in enumerate(batch["items"]):
                made = self._pair(self.answers.rows[item], batch["encoded"][i])
                if made is not None:
                    encoded.append(made)
                    places.append(i)
        if not encoded:
            raise ValueError(
                "mllm.online: the policy writes the chosen answers themselves; lower mllm.online.similarity"
            )
        taken = {name: value[places] for name, value in batch.items() if isinstance(value, Tensor)}
        return {**batch, **taken, "items": [batch["items"][i] for i in places], "encoded": encoded}

    def _pair(self, row: AnswerRow, known: Encoded) -> Encoded | None:
        """The row against what is written now; None where that says the same, or does not fit."""
        encoder, settings = self.answers.encoder, self.settings
        assert row.chosen is not None
        framed = encoder.chat.frame(row.prompt, encoder.system)
        seen = [place for place, token in enumerate(known.prompt.ids) if token in encoder.media_ids]
        built = anew(
            row.chosen, framed, known.prompt, seen, encoder.chat, self.decoder, self.similar, settings,
            noise.generator("online", self.seed, self.step, content(row)),
            max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
        )  # fmt: skip
        if not built.text or built.text == row.chosen.strip():
            return None
        pair = replace(row, rejected=built.text, chosen_spans=None, rejected_spans=None, label=None)
        try:
            return self.answers.encode(pair)
        except TooLong:  # what was written is longer than all that was measured before the run
            return None
