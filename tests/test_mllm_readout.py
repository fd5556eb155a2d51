"""Log-probabilities, KL and guided ones, a slice of places at a time: against whole tables in float64, gradients too,
and against stock models that cap or scale their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from mmalign.mllm import readout
from mmalign.mllm.readout import Head, guided_log_probs, kl, log_probs

WIDTH, VOCABULARY, PLACES = 6, 11, 23


def _head(seed: int = 0, **settings: Any) -> Head:
    torch.manual_seed(seed)
    return Head(nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.float64), **settings)


def _hidden(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(PLACES, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)


IDS = torch.arange(PLACES) % VOCABULARY
HEADS = [{}, {"scale": 0.25}, {"softcap": 1.5}, {"scale": 3.0, "softcap": 0.7}]


def _table(head: Head, hidden: Tensor) -> Tensor:
    """log softmax of all logits, written out."""
    logits = hidden @ head.module.weight.T * head.scale  # type: ignore[operator, union-attr]
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits - logits.exp().sum(1, keepdim=True).log()


@pytest.mark.parametrize("settings", HEADS)
@pytest.mark.parametrize("kept", [2**24, 5 * VOCABULARY, 1])
def test_slices_are_the_whole(settings: dict[str, float], kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of hidden states and head, for one slice, for slices of five places and of one."""
    monkeypatch.setattr(readout, "KEPT", kept)
    head, weights = _head(**settings), torch.linspace(-1, 1, PLACES, dtype=torch.float64)
    found = []
    for way in ("slices", "whole"):
        hidden = _hidden()
        head.module.zero_grad()
        values = log_probs(head, hidden, IDS) if way == "slices" else _table(head, hidden)[torch.arange(PLACES), IDS]
        (values * weights).sum().backward()
        assert hidden.grad is not None
        found.append((values.detach(), hidden.grad, head.module.weight.grad.clone()))  # type: ignore[operator, union-attr]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kept", [2**24, 3 * VOCABULARY])
def test_kl_is_the_sum_over_the_vocabulary(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "KEPT", kept)
    head, other, hidden, reference = _head(), _head(5), _hidden(), _hidden(7)
    found = kl(head, hidden, other, reference)
    policy, known = _table(head, hidden), _table(other, reference)
    torch.testing.assert_close(found, (known.exp() * (known - policy)).sum(1), rtol=1e-10, atol=1e-12)
    found.sum().backward()
    assert hidden.grad is not None
    assert reference.grad is None  # the reference is not trained
    torch.testing.assert_close(
        kl(head, hidden, head, hidden.detach()).detach(), torch.zeros(PLACES, dtype=torch.float64)
    )


def test_guidance_of_one_is_none_and_more_moves_away_from_the_blind() -> None:
    head, hidden, blind = _head(), _hidden(), _hidden(3)
    plain = log_probs(head, hidden, IDS)
    for space in ("logits", "log_probs"):
        unguided = guided_log_probs(head, hidden, head, blind, IDS, guidance=1.0, space=space)
        torch.testing.assert_close(unguided, plain, rtol=1e-10, atol=1e-12)
    seen, unseen = _table(head, hidden), _table(head, blind)
    mixed = 1.5 * seen - 0.5 * unseen
    guided = guided_log_probs(head, hidden, head, blind, IDS, guidance=1.5, space="log_probs")
    torch.testing.assert_close(guided, mixed[torch.arange(PLACES), IDS], rtol=1e-10, atol=1e-12)
    normalised = guided_log_probs(head, hidden, head, blind, IDS, guidance=1.5)
    whole = mixed - mixed.exp().sum(1, keepdim=True).log()  # softmax of mixed logits is that of mixed log-probabilities
    torch.testing.assert_close(normalised, whole[torch.arange(PLACES), IDS], rtol=1e-10, atol=1e-12)
    normalised.sum().backward()
    assert blind.grad is None


def test_no_places_have_no_log_probs() -> None:
    assert log_probs(_head(), _hidden()[:0], IDS[:0]).shape == (0,)


SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
STOCK: dict[str, Any] = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.5)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.0625)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)),
}


@pytest.mark.parametrize("family", STOCK)
def test_heads_do_what_the_family_does(family: str) -> None:
    torch.manual_seed(0)
    model = STOCK[family]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.5)
    ids = torch.randint(3, 40, (1, 9))
    with torch.no_grad():
        want = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
        found = log_probs(Head.of(model), hidden, ids[0, 1:])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


def test_a_head_that_does_something_else_is_refused() -> None:
    model = STOCK["gemma2"]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    kept = model.forward
    model.forward = lambda **inputs: _shifted(kept(**inputs))
    with pytest.raises(ValueError, match="gemma2 changes its logits after the head in a way that is not known here"):
        Head.of(model)


def _shifted(output: Any) -> Any:
    output.logits = output.logits * 2 + torch.arange(output.logits.shape[-1])
    return output
