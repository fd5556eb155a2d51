"""What is read off hidden states at the places that predict an answer's tokens: log-probabilities, KL, guided ones.

Logits over the vocabulary exist for a slice of the places at a time, in float32, and are computed again in the backward
pass where they would be more than `KEPT` numbers; so their memory does not grow with the answers. Families that scale
or cap their logits (Cohere, Granite, Gemma 2 and 3) do so here as in their own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

KEPT = 2**24
"""Logits that are kept for the backward pass; one slice has at most so many too."""


@dataclass(frozen=True)
class Head:
    """A language model's last layer: hidden states [n, D] -> float32 logits [n, V].

    Attributes:
        module: the output embeddings.
        scale: logits are multiplied by it.
        softcap: then z becomes softcap * tanh(z / softcap); None leaves them.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a transformers model, with what its forward does to logits.

        The text config names scales and caps, and some classes do not use what their config names (Gemma 3 with
        images), so the model itself is asked, with four tokens.

        Raises:
            ValueError: its logits are neither plain nor what the config says.
        """
        text = model.config.get_text_config()
        found = [getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")]
        scale = next((value for value in found if value is not None), None)
        divisor = getattr(text, "logits_scaling", None)
        if scale is None and divisor is not None:
            scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
        softcap = getattr(text, "final_logit_softcapping", None)
        module = model.get_output_embeddings()
        heads = [cls(module, 1.0 if scale is None else float(scale), softcap), cls(module)]
        own, hidden = _probe(model)
        for head in heads:
            if torch.allclose(head(hidden).float(), own.float(), rtol=1e-3, atol=1e-3 * float(own.abs().max())):
                return head
        raise ValueError(
            f"{model.config.model_type} changes its logits after the head in a way that is not known here; its answers "
            "cannot be tuned"
        )

    @property
    def vocabulary(self) -> int:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return int(weight.shape[0])

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.module(hidden)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        logits = logits * self.scale if self.scale != 1.0 else logits
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits


@torch.no_grad()
def _probe(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of the model's own forward for a few tokens, and the hidden states before its head: [4, V], [4, D]."""
    training = model.training
    model.eval()
    try:
        ids = torch.arange(4, device=model.device)[None]
        ask = {"input_ids": ids, "use_cache": False, "return_dict": True}
        return model(**ask).logits[0], model.base_model(**ask).last_hidden_state[0]
    finally:
        model.train(training)


def log_probs(head: Head, hidden: Tensor, ids: Tensor) -> Tensor:
    """log p(token): hidden states [n, D] that predict tokens `ids` [n] -> [n], at least float32, softmax over all V."""

    def read(hidden: Tensor, ids: Tensor) -> Tensor:
        logits = head(hidden)
        return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(1)

    return _sliced(read, head.vocabulary, hidden, ids)


def kl(head: Head, hidden: Tensor, reference_head: Head, reference: Tensor) -> Tensor:
    """KL(reference || policy) over the vocabulary at each place: hidden [n, D], reference [n, D] -> float32 [n]."""

    def read(hidden: Tensor, reference: Tensor) -> Tensor:
        policy = F.log_softmax(head(hidden), 1)
        with torch.no_grad():
            known = F.log_softmax(reference_head(reference), 1)
        return (known.exp() * (known - policy)).sum(1)

    return _sliced(read, max(head.vocabulary, reference_head.vocabulary), hidden, reference)


def guided_log_probs(
    head: Head, hidden: Tensor, blind_head: Head, blind: Tensor, ids: Tensor, *, guidance: float, space: str = "logits"
) -> Tensor:
    """log p(token) under visual guidance (V-DPO): hidden, blind [n, D], ids [n] -> float32 [n].

    Args:
        blind: hidden states at the same places under another picture; no gradient goes there.
        guidance: g; 1 is no guidance.
        space: "logits": log softmax(g z - (g - 1) z_blind); "log_probs": g log p - (g - 1) log p_blind, which is not
            normalised.
    """

    def read(hidden: Tensor, blind: Tensor, ids: Tensor) -> Tensor:
        seen = head(hidden)
        with torch.no_grad():
            unseen = blind_head(blind)
        if space == "logits":
            return F.log_softmax(guidance * seen - (guidance - 1) * unseen, 1).gather(1, ids[:, None])[:, 0]
        both = (F.log_softmax(logits, 1).gather(1, ids[:, None])[:, 0] for logits in (seen, unseen))
        return guidance * next(both) - (guidance - 1) * next(both)

    return _sliced(read, head.vocabulary, hidden, blind, ids)


def _sliced(read: Callable[..., Tensor], vocabulary: int, *rows: Tensor) -> Tensor:
    """`read` of slices of the rows; kept for the backward pass only where everything together is small."""
    size = max(1, KEPT // vocabulary)
    count = len(rows[0])
    if count == 0:
        return rows[0].new_zeros(0, dtype=torch.float32)
    if count <= size:
        return read(*rows)
    found = []
    for start in range(0, count, size):
        part = [row[start : start + size] for row in rows]
        again = torch.is_grad_enabled()
        found.append(checkpoint(read, *part, use_reentrant=False) if again else read(*part))
    return torch.cat(found)
