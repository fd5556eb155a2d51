"""The worked examples of CONTRIBUTING.md, taken out of the page and run."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from training_kit import config as training_config
from training_kit import preferences

from mmalign import config, jobs_inputs, methods
from mmalign.discovery import make_evaluator, parse_params
from mmalign.evaluation import Batch, check_class
from mmalign.losses import pairwise
from mmalign.models import base
from mmalign.tasks.preference import PreferenceTask
from mmalign.testing.tiny import tiny_sd

PAGE = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- (\S+\.py) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


def module(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example that belongs into `path`, as the module that it would be."""
    made = ModuleType(path.removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(compile(EXAMPLES[path], path, "exec"), made.__dict__)
    return made


def test_every_example_is_run_here() -> None:
    new = {"evaluators/colourfulness.py", "mmalign/losses/offset.py", "mmalign/models/sd_pag.py"}
    assert EXAMPLES.keys() == new | {"mmalign/methods.py", "mmalign/models/base.py"}


def test_the_evaluator(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module("evaluators/colourfulness.py", monkeypatch)
    cls = check_class(made.EVALUATOR, "colourfulness")
    evaluator: Any = make_evaluator(cls, "colourfulness", parse_params(cls, "colourfulness", {}), "cpu")
    grey, halves = torch.full((3, 8, 8), 77, dtype=torch.uint8), torch.zeros(3, 8, 8, dtype=torch.uint8)
    halves[0, :, :4], halves[1, :, 4:] = 200, 200  # red beside green: rg is +-200, yb is 100 everywhere
    scores = evaluator.score(Batch(images=[grey, halves], prompts=["", ""]))
    torch.testing.assert_close(scores, torch.tensor([0.0, 200 + 0.3 * 100], dtype=torch.float64))


def test_the_loss_and_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offset_dpo = module("mmalign/losses/offset.py", monkeypatch).offset_dpo
    model, reference = torch.tensor([[0.8, 0.9], [0.5, 0.7]]), torch.tensor([[1.0, 1.0], [0.5, 0.6]])
    gap = torch.tensor([0.5, 0.0])
    loss, metrics = offset_dpo(model, reference, gap, beta=4.0, scale=2.0)
    logits = [0.5 * 4 * 0.1 - 2 * 0.5, 0.5 * 4 * 0.1]
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-logit)) for logit in logits) / 2, rel=1e-5)
    assert metrics["implicit_accuracy"] == 1
    plain, _ = pairwise.diffusion_dpo(model, reference, beta=4.0)
    assert offset_dpo(model, reference, gap, beta=4.0, scale=0.0)[0].item() == pytest.approx(plain.item())

    scope = dict(vars(methods))
    exec(compile(EXAMPLES["mmalign/methods.py"], "methods.py", "exec"), scope)
    schema = scope["OffsetDPO"]
    made = config.build(schema, {"kind": "offset_dpo", "beta": 50, "scale": 2}, "loss")
    with pytest.raises(config.ConfigError, match="scale"):
        config.build(schema, {"kind": "offset_dpo", "scale": -1}, "loss")
    settings = training_config(tmp_path / "run", tiny_sd(tmp_path / "model"), preferences(tmp_path))
    task = PreferenceTask(settings.model_copy(update={"loss": made}), torch.device("cpu"))
    loss, _ = task.loss(task.load([(0, 0), (1, 0)]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(2.0))), "hard labels: every gap is 1, every logit 0"


def test_the_model_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_sd(tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPAGPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no adapter for StableDiffusionPAGPipeline"):
        base.load(jobs_inputs.Model(path=folder))

    module("mmalign/models/sd_pag.py", monkeypatch)
    monkeypatch.setattr(base, "_CLASSES", dict(base._CLASSES))
    monkeypatch.setattr(
        jobs_inputs, "FAMILIES", {**jobs_inputs.FAMILIES, "sd_pag": "Stable Diffusion with perturbed attention"}
    )
    if hasattr(base, "FAMILIES"):
        monkeypatch.setattr(base, "FAMILIES", jobs_inputs.FAMILIES)
    exec(compile(EXAMPLES["mmalign/models/base.py"], "base.py", "exec"), vars(base))
    adapter = base.load(jobs_inputs.Model(path=folder))
    assert (adapter.family, type(adapter.pipeline()).__name__) == ("sd_pag", "StableDiffusionPAGPipeline")
    condition = adapter.encode_prompt(["a red circle"])
    latents = torch.randn(1, *adapter.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    prediction = adapter.predict(latents, torch.tensor([500]), condition)
    assert prediction.shape == latents.shape and math.isfinite(prediction.sum().item())
