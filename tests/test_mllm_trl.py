"""Every loss that TRL's DPOTrainer has too: the same rows through its collator, forward and loss, in float32.

TRL reads whole rows through the stock forward and its fused head; here images are encoded once and two answers share a
prompt. Values and gradients of all trained weights agree to 1e-5 of the largest.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mllm_kit import mllm_folder, picture
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmalign import tasks
from mmalign.config import build
from mmalign.jobs import TrainConfig
from mmalign.losses import answer_terms
from mmalign.losses.answers import Score, Scores
from mmalign.media import write_image
from mmalign.mllm import loading

trl = pytest.importorskip("trl", reason="TRL is the oracle of these tests: pip install 'mmalign[test]'")
datasets = pytest.importorskip("datasets", reason="TRL's rows are a data set: pip install 'mmalign[test]'")

BETA = 0.3
ANSWERS = [
    ("A red circle.", "No, it is blue and small."),
    ("Yes.", "It is a very long answer, much longer than the other one."),
    ("Red, I think, and on the left.", "Blue"),
]
FAMILIES = ("qwen2_5_vl", "smolvlm", "internvl", "gemma3")

LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({"loss_type": ["sigmoid"]}, {}),
    "hinge": ({"loss_type": ["hinge"]}, {}),
    "ipo": ({"loss_type": ["ipo"]}, {}),
    "exo_pair": ({"loss_type": ["exo_pair"], "label_smoothing": 0.05}, {"flip_rate": 0.05}),
    "nca_pair": ({"loss_type": ["nca_pair"]}, {}),
    "robust": ({"loss_type": ["robust"], "label_smoothing": 0.2}, {"flip_rate": 0.2}),
    "bco_pair": ({"loss_type": ["bco_pair"]}, {}),
    "sppo_hard": ({"loss_type": ["sppo_hard"]}, {}),
    "aot": ({"loss_type": ["aot"], "label_smoothing": 0.1}, {"flip_rate": 0.1}),
    "aot_unpaired": ({"loss_type": ["aot_unpaired"], "label_smoothing": 0.1}, {"flip_rate": 0.1}),
    "apo_zero": ({"loss_type": ["apo_zero"]}, {}),
    "apo_down": ({"loss_type": ["apo_down"]}, {}),
    "discopop": ({"loss_type": ["discopop"], "discopop_tau": 0.5}, {"tau": 0.5}),
    "sft": ({"loss_type": ["sft"]}, {}),
    "dpo_norm": ({"loss_type": ["sigmoid_norm"]}, {}),
    "f_dpo:forward_kl": ({"f_divergence_type": "forward_kl"}, {"divergence": "forward_kl"}),
    "f_dpo:js": ({"f_divergence_type": "js_divergence"}, {"divergence": "js"}),
    "f_dpo:alpha": ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.4},
                    {"divergence": "alpha", "alpha": 0.4}),
}  # fmt: skip


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policy and reference folders, with small weights, so that log-ratios are of the order of one.

    Their templates write no line break behind an end of turn: TRL would score it.
    """
    home = tmp_path_factory.mktemp("trl")
    for family in FAMILIES:
        for number, name in enumerate(("policy", "reference")):
            folder = mllm_folder(home / family / name, family)
            model = AutoModelForImageTextToText.from_pretrained(folder)
            generator = torch.Generator().manual_seed(number)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    parameter.mul_(1 if parameter.ndim < 2 else 0.3)
                    if (
                        number and loading.part_of(key) == "language"
                    ):  # the vision tower is frozen, and the same in both
                        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
            model.save_pretrained(folder)
            template = folder / "chat_template.jinja"
            told = template.read_text(encoding="utf-8")
            for end in ("<|im_end|>", "<end_of_utterance>", "<end_of_turn>"):
                told = told.replace(f"{end}\n'", f"{end}'")
            template.write_text(told, encoding="utf-8")
    return home


@pytest.fixture(scope="module", name="rows")
def _rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    home, rows, lines = tmp_path_factory.mktemp("rows"), [], []
    for i, (chosen, rejected) in enumerate(ANSWERS):
        pixels = picture((40 + 20 * i, 50), seed=i).permute(1, 2, 0).numpy()
        write_image(home / f"{i}.png", pixels)
        row = {
            "prompt": [{"role": "user", "content": ("What is it?", "Is it red?", "Where is it, and what?")[i]}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        rows.append({"images": [Image.fromarray(np.asarray(pixels))], **row})
        lines.append(json.dumps({"images": [f"{i}.png"], **row}))
    (home / "rows.jsonl").write_text("\n".join(lines))
    return home / "rows.jsonl", rows


def _theirs(
    folder: Path, rows: list[dict[str, Any]], output: Path, kind: str = "DPO", **settings: Any
) -> tuple[float, dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, reference = (
            AutoModelForImageTextToText.from_pretrained(folder / name, dtype=torch.float32)
            for name in ("policy", "reference")
        )
        arguments = getattr(trl, f"{kind}Config")(
            output_dir=str(output), per_device_train_batch_size=len(rows), max_length=None, report_to=[], use_cpu=True,
            bf16=False, beta=BETA, remove_unused_columns=False, gradient_checkpointing=False, **settings,
        )  # fmt: skip
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model, ref_model=reference, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=AutoProcessor.from_pretrained(folder / "policy"),
        )  # fmt: skip
        batch = trainer.data_collator([dict(row) for row in rows])
        loss = trainer.compute_loss(model, batch)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _ours(folder: Path, table: Path, output: Path, **loss: Any) -> tuple[float, dict[str, Tensor], Any]:
    config = build(TrainConfig, {
        "task": "mllm", "output": str(output / "run"), "model": {"path": str(folder / "policy")},
        "data": {"table": str(table), "cache": "off"}, "loss": {"kind": "mllm", "beta": BETA, **loss},
        "reference": {"model": str(folder / "reference")}, "device": "cpu", "log": {"trackers": []},
    }, "test", [])  # fmt: skip
    task = tasks.make(config, torch.device("cpu"))
    value, metrics = task.loss(task.load([(i, 0) for i in range(len(ANSWERS))]))
    value.backward()
    module = task.policy.module
    return value.item(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, metrics


def _agree(ours: tuple[float, dict[str, Tensor], Any], theirs: tuple[float, dict[str, Tensor]], record: Any) -> None:
    """`record` writes the differences into a report (`--junitxml`), from which the table in docs/mllm.md is made."""
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in theirs[1].values())
    assert largest > 1e-4
    assert any("language_model" in name or "text_model" in name for name in ours[1])
    worst = max(float((gradient - theirs[1][name]).abs().max()) for name, gradient in ours[1].items()) / largest
    record("loss", f"{theirs[0]:.6f}")
    record("value", f"{abs(ours[0] / theirs[0] - 1):.1e}")
    record("gradient", f"{worst:.1e}")
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_trls(name: str, home: Path, rows: Any, tmp_path: Path, record_property: Any) -> None:
    settings, own = LOSSES[name]
    theirs = _theirs(home / "qwen2_5_vl", rows[1], tmp_path, **settings)
    ours = _ours(home / "qwen2_5_vl", rows[0], tmp_path, terms=[{"kind": name.partition(":")[0], **own}])
    _agree(ours, theirs, record_property)


@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_other_families_are_trls(
    name: str, family: str, home: Path, rows: Any, tmp_path: Path, record_property: Any
) -> None:
    settings, own = LOSSES[name]
    theirs = _theirs(home / family, rows[1], tmp_path, **settings)
    _agree(_ours(home / family, rows[0], tmp_path, terms=[{"kind": name, **own}]), theirs, record_property)


def test_mpo_and_ld_dpo_are_trls(home: Path, rows: Any, tmp_path: Path, record_property: Any) -> None:
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    theirs = _theirs(
        home / "qwen2_5_vl", rows[1], tmp_path, loss_type=list(weights), loss_weights=list(weights.values())
    )
    terms = [{"kind": name.replace("sigmoid", "dpo"), "weight": weight} for name, weight in weights.items()]
    _agree(_ours(home / "qwen2_5_vl", rows[0], tmp_path, terms=terms), theirs, record_property)
    theirs = _theirs(home / "qwen2_5_vl", rows[1], tmp_path, ld_alpha=0.3)
    ours = _ours(home / "qwen2_5_vl", rows[0], tmp_path, tokens={"kind": "ld", "alpha": 0.3})
    _agree(ours, theirs, record_property)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_kto_is_trls(family: str, home: Path, rows: Any, tmp_path: Path, record_property: Any) -> None:
    """Both kinds of answers, weighted; the drift of the policy is measured on answers to other rows' prompts."""
    lines, single = [], []
    for i, row in enumerate(rows[1]):
        good = i != 1
        told = {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}
        single.append({"images": row["images"], **told})
        lines.append(json.dumps({"images": [str(rows[0].parent / f"{i}.png")], **told}))
    (tmp_path / "single.jsonl").write_text("\n".join(lines))
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    theirs = _theirs(home / family, single, tmp_path, "KTO", **weights)
    ours = _ours(home / family, tmp_path / "single.jsonl", tmp_path, terms=[{"kind": "kto", **weights}])
    _agree(ours, theirs, record_property)


def test_the_terms_of_orpo_and_simpo_are_trls() -> None:
    """Their trainers take no images, so their functions are given mean log-probabilities; ORPO's, its odds alone."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3.0, 7.0, 5.0])
    means = -3 * torch.rand(2, 3, generator=generator)
    settings = {"beta": 2.0, "accelerator": SimpleNamespace(device="cpu"), "alpha": 0.0, "label_smoothing": 0.0}
    trainer = SimpleNamespace(**settings, loss_type="simpo", simpo_gamma=0.6)
    gradients = []
    for own in (True, False):
        given = means.clone().requires_grad_()
        if own:
            none = torch.zeros(3)
            scores = Scores(*(Score(each * lengths, none, lengths) for each in given))
            simpo = answer_terms.simpo(scores, beta=2.0, gamma=0.6)
            orpo = answer_terms.orpo(scores, beta=2.0) + given[0]
        else:
            simpo = CPOTrainer.cpo_loss(trainer, *given)[0]
            orpo = -ORPOTrainer.odds_ratio_loss(trainer, *given)[0]
        found = [torch.autograd.grad(loss.sum(), given, retain_graph=True)[0] for loss in (simpo, orpo)]
        gradients.append((simpo.detach(), orpo.detach(), *found))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
