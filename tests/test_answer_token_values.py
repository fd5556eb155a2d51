"""TGDPO, T-REG, SparsePO and TDPO: formulas in float64 with their gradients, identities, and through whole models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mllm_kit import answer_settings, mllm_folder, stopped_and_resumed, write_rows
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mmalign import train
from mmalign.config import ConfigError
from mmalign.losses import answer_terms as terms
from mmalign.losses import answer_tokens as tokens
from mmalign.losses.answers import Pairs, Side
from mmalign.methods_mllm import Sparse
from mmalign.tasks.mllm import MLLMTask
from mmalign.tasks.token_masks import Masks

CPU = torch.device("cpu")
B, T, BETA, ALPHA = 3, 5, 0.3, 0.8
LENGTHS = ((5, 2, 4), (3, 5, 1))
LN2 = math.log(2)


def masks() -> list[Tensor]:
    return [torch.arange(T)[None] < torch.tensor(lengths)[:, None] for lengths in LENGTHS]


def numbers(seed: int, low: float = -3.0, high: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(B, T, generator=generator, dtype=torch.float64)


def values(side: int) -> dict[str, Tensor]:
    """policy, reference, rewards in [-1/2, 1/2], masks in [0, 2], KLs."""
    return {
        "policy": numbers(10 * side), "reference": numbers(10 * side + 1), "rewards": numbers(10 * side + 2, -0.5, 0.5),
        "sparse": numbers(10 * side + 3, 0, 2), "sparse_kl": numbers(10 * side + 4, 0, 2),
        "kl": numbers(10 * side + 5, 0, 1),
    }  # fmt: skip


def by_hand(method: str, sides: list[dict[str, Tensor]]) -> Tensor:
    """The papers' formulas, token by token, in float64: a loss for each row."""
    losses = []
    for row in range(B):
        total: Any = 0.0
        plain: Any = 0.0
        divergence: Any = 0.0
        rewarded: Any = 0.0
        for sign, side, length in zip((1, -1), sides, (LENGTHS[0][row], LENGTHS[1][row]), strict=True):
            for t in range(length):
                of = {name: value[row, t] for name, value in side.items()}
                ratio = of["policy"] - of["reference"]
                weight = {"tgdpo": 1 + sign * ALPHA * of["rewards"], "sparse_po": of["sparse"]}.get(method, 1.0)
                total = total + sign * weight * ratio
                plain = plain + sign * ratio
                counted = of["sparse_kl"] if method == "sparse_po" else 1.0
                divergence = divergence + sign * counted * of["kl"]
                rewarded = rewarded + of["rewards"] * of["policy"]
        if method == "t_reg":
            held = torch.sigmoid(-BETA * plain).detach()
            losses.append(-torch.nn.functional.logsigmoid(BETA * plain) - ALPHA * held * BETA * rewarded)
        elif method == "tgdpo":
            losses.append(-torch.nn.functional.logsigmoid(BETA * total))
        else:
            losses.append(-torch.nn.functional.logsigmoid(BETA * (total + divergence)))
    return torch.stack(losses)


def ours(method: str, sides: list[dict[str, Tensor]]) -> Tensor:
    made = [Side(mask=mask, **side) for mask, side in zip(masks(), sides, strict=True)]
    pairs = Pairs(made[0], made[1], torch.ones(B))
    if method == "tgdpo":
        return terms.dpo(tokens.guided(pairs, alpha=ALPHA), beta=BETA)
    if method == "t_reg":
        scores = tokens.plain(pairs)
        return terms.dpo(scores, beta=BETA) + ALPHA * terms.t_reg(scores, beta=BETA)
    if method == "sparse_po":
        return terms.tdpo(tokens.sparse(pairs), beta=BETA, alpha=1.0, both=True)
    plain = [Side(side.policy, side.mask, side.reference, kl=side.kl) for side in made]
    return terms.tdpo(tokens.plain(Pairs(plain[0], plain[1], torch.ones(B))), beta=BETA, alpha=1.0, both=True)


@pytest.mark.parametrize("method", ["tgdpo", "t_reg", "sparse_po", "tdpo1"])
def test_values_and_gradients_are_the_formulas(method: str) -> None:
    moving = ("policy", "sparse", "sparse_kl", "kl")
    found = []
    for function in (by_hand, ours):
        sides = [{n: v.clone().requires_grad_(n in moving) for n, v in values(side).items()} for side in (0, 1)]
        loss = function(method, sides)
        (loss * torch.tensor([0.5, 1.0, 2.0])).sum().backward()
        leaves = [side[name] for side in sides for name in moving]
        found.append((loss.detach(), [torch.zeros(B, T) if leaf.grad is None else leaf.grad for leaf in leaves]))
    (expected, slopes), (value, gradients) = found
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    for slope, gradient in zip(slopes, gradients, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_tdpo_2_holds_the_chosen_answers_kl() -> None:
    sides = [{n: v.clone().requires_grad_(n == "kl") for n, v in values(side).items()} for side in (0, 1)]
    made = [Side(mask=mask, **{**side, "sparse_kl": None}) for mask, side in zip(masks(), sides, strict=True)]
    scores = tokens.plain(Pairs(made[0], made[1], torch.ones(B)))
    terms.tdpo(scores, beta=BETA).sum().backward()
    assert sides[0]["kl"].grad is None
    assert sides[1]["kl"].grad is not None
    torch.testing.assert_close(terms.tdpo(scores, beta=BETA, alpha=0.0), terms.dpo(scores, beta=BETA))


def test_what_weighs_nothing_leaves_dpo() -> None:
    sides = [values(side) for side in (0, 1)]

    def pairs(**same: float) -> Pairs:
        made = [
            Side(mask=mask, **{**side, **{name: torch.full((B, T), value) for name, value in same.items()}})
            for mask, side in zip(masks(), sides, strict=True)
        ]
        return Pairs(made[0], made[1], torch.ones(B))

    dpo = terms.dpo(tokens.plain(pairs()), beta=BETA)
    torch.testing.assert_close(terms.dpo(tokens.guided(pairs(), alpha=0.0), beta=BETA), dpo)
    torch.testing.assert_close(terms.dpo(tokens.guided(pairs(rewards=0.0), alpha=3.0), beta=BETA), dpo)
    ones = tokens.sparse(pairs(sparse=1.0, sparse_kl=0.0))
    torch.testing.assert_close(terms.tdpo(ones, beta=BETA, alpha=1.0, both=True), dpo)
    assert (terms.t_reg(tokens.plain(pairs(rewards=0.0)), beta=BETA) == 0).all()


def test_activation_masks_go_from_0_to_1_within_an_answer() -> None:
    made = Masks(Sparse(mask="activation"), 4)
    assert not list(made.parameters())
    hidden = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    mask, same = made(hidden, [4, 1, 2])
    assert mask is same
    assert (mask[:4].min(), mask[:4].max()) == (0, 1)
    assert mask[4] == 1  # one token alone
    order = hidden[:4].mean(1).argsort()
    assert torch.equal(mask[:4].argsort(), order)
    assert (made(torch.ones(3, 4), [3])[0] == 1).all()


# ------------------------------------------------------------------------------------------------------ whole models


@pytest.fixture(scope="module", name="model", params=["qwen2_5_vl", "idefics3"])
def _model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mllm_folder(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module", name="table")
def _table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


def task_of(*args: Any, **changes: Any) -> MLLMTask:
    return MLLMTask(answer_settings(*args, **changes), CPU)


def moved(task: MLLMTask, seed: int = 0) -> MLLMTask:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in task.policy.module.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return task


def loss_of(task: MLLMTask) -> float:
    with torch.no_grad():
        return float(task.loss(task.load([(0, 0), (1, 0), (2, 0)]))[0])


def test_a_guide_that_is_the_reference_leaves_dpo_and_another_does_not(
    model: Path, table: Path, tmp_path: Path
) -> None:
    guided = {"kind": "guided", "alpha": 2.0}
    plain = loss_of(moved(task_of(tmp_path / "a", model, table)))
    same = task_of(tmp_path / "b", model, table, loss__tokens=guided, mllm__guide=str(model))
    assert loss_of(moved(same)) == pytest.approx(plain, rel=1e-5)
    run = train.run(answer_settings(tmp_path / "guide", model, table, optim__lr=3e-2))
    task = moved(task_of(tmp_path / "c", model, table, loss__tokens=guided, mllm__guide=str(run / "export")))
    assert abs(loss_of(task) - plain) > 1e-4
    pairs = task.measure(task.load([(0, 0)]))
    assert pairs.chosen.rewards is not None
    assert pairs.chosen.reference is not None
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
    PeftModel.from_pretrained(base, run / "export").merge_and_unload().save_pretrained(tmp_path / "merged")
    task.processor.save_pretrained(tmp_path / "merged")
    merged = task_of(tmp_path / "d", tmp_path / "merged", table)
    under_guide = merged.measure(merged.load([(0, 0)])).chosen.policy
    expected = task.objective.beta * (under_guide - pairs.chosen.reference)
    torch.testing.assert_close(pairs.chosen.rewards, expected, rtol=1e-4, atol=1e-6)


def test_requests_that_are_the_same_leave_dpo(model: Path, table: Path, tmp_path: Path) -> None:
    same = {"kind": "t_reg", "better": "Answer.", "worse": "Answer."}
    dpo = loss_of(moved(task_of(tmp_path / "a", model, table)))
    assert loss_of(moved(task_of(tmp_path / "b", model, table, ["dpo", same]))) == pytest.approx(dpo, rel=1e-6)
    task = moved(task_of(tmp_path / "c", model, table, ["dpo", "t_reg"]))
    assert abs(loss_of(task) - dpo) > 1e-7
    encoded = task.load([(0, 0)])["encoded"][0]
    better, worse = (task.processor.tokenizer.decode(prompt.ids) for prompt in encoded.contrast)
    assert "Answer as well as you can" in better
    assert "Answer as badly as you can" in worse
    rewards = task.measure(task.load([(0, 0)])).chosen.rewards
    assert rewards is not None
    assert 0 < rewards.abs().max() <= 0.5


def test_a_cached_reference_gives_the_same_token_rewards(model: Path, table: Path, tmp_path: Path) -> None:
    online = loss_of(moved(task_of(tmp_path / "a", model, table, ["dpo", "t_reg"])))
    cached = moved(task_of(tmp_path / "b", model, table, ["dpo", "t_reg"], reference__kind="cached"))
    assert loss_of(cached) == pytest.approx(online, rel=1e-5)


SPARSE = {
    "terms": [{"kind": "tdpo", "alpha": 1.0, "both": True}],
    "loss__tokens": {"kind": "sparse", "independent": True, "dropout": 0.2},
}


def test_learned_masks_are_trained_resumed_and_not_exported(model: Path, table: Path, tmp_path: Path) -> None:
    whole = train.run(answer_settings(tmp_path / "whole", model, table, **SPARSE, optim__lr=1e-2))
    half = answer_settings(tmp_path / "half", model, table, **SPARSE, optim__lr=1e-2)
    stopped_and_resumed(half)
    name = "checkpoints/step-00000004/weights.safetensors"
    assert (whole / name).read_bytes() == (tmp_path / "half" / name).read_bytes()
    held = {key: value for key, value in load_file(whole / name).items() if "masks" in key}
    assert len(held) == 4  # two heads
    started = MLLMTask(half, CPU)
    assert any(not torch.equal(value, started.modules["masks"].state_dict()[key.split("masks.")[1]])
               for key, value in held.items())  # fmt: skip
    assert not any("masks" in key for key in load_file(whole / "export" / "adapter_model.safetensors"))


def test_masks_start_between_nothing_and_everything(model: Path, table: Path, tmp_path: Path) -> None:
    task = task_of(tmp_path / "run", model, table, **SPARSE)
    loss, metrics = task.loss(task.load([(0, 0), (1, 0)]))
    assert loss.item() == pytest.approx(LN2, abs=1e-5)  # policy and reference are the same still
    assert 0 <= float(metrics["sparsity"]) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__tokens": {"kind": "guided"}}, "takes token rewards from mllm.guide"),
        ({"mllm__guide": "somewhere"}, "give both, or neither"),
        ({**SPARSE, "reference__kind": "cached"}, "reads the reference's whole distribution"),
        ({**SPARSE, "sharding": "fsdp2"}, "a model of their own"),
        ({"terms": ["dpo", "t_reg"], "loss__tokens": {"kind": "guided"}, "mllm__guide": "x"}, "use one of them"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str, model: Path, table: Path, tmp_path: Path) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        answer_settings(tmp_path / "run", model, table, changes.get("terms", ("dpo",)),
                        **{name: value for name, value in changes.items() if name != "terms"})  # fmt: skip
