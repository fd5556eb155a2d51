"""What half precision must not change: small updates of a LoRA, whose weights compute, and how pictures are decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from training_kit import lists, method_settings, moved

from mmalign import train
from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.models.negative import guide_away
from mmalign.tasks import finish
from mmalign.tasks.preference import PreferenceTask
from mmalign.testing.tiny import tiny_sd, tiny_sdxl
from mmalign.testing.tiny_transformers import tiny_sd3

CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.fixture(scope="module", name="models")
def _models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {"sd": tiny_sd(home / "sd"), "sdxl": tiny_sdxl(home / "sdxl"), "sd3": tiny_sd3(home / "sd3", t5=False)}


@pytest.fixture(scope="module", name="table")
def _table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lists(tmp_path_factory.mktemp("lists"))


@pytest.fixture(scope="module", name="lora")
def _lora(models: dict[str, Path], table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA whose update is small beside the weights, as after an ordinary training."""
    home = tmp_path_factory.mktemp("lora")
    run = train.run(method_settings(home, models["sd3"], table, "diffusion_dpo", optim__steps=20, optim__lr=1e-4))
    return run / "export"


def test_a_second_round_begins_at_its_reference(
    models: dict[str, Path], table: Path, lora: Path, tmp_path: Path
) -> None:
    """The policy goes on from the LoRA, the reference has it fused: both are the same model, in half precision too."""
    settings = method_settings(
        tmp_path, models["sd3"], table, "diffusion_dpo", precision="bf16", lora={"rank": 4, "init": str(lora)},
        reference={"lora": str(lora)},
    )  # fmt: skip
    task = PreferenceTask(settings, CPU)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        model, reference, _ = task.measure(task.load([(i, 0) for i in range(4)]), compare=False)
    assert reference is not None
    torch.testing.assert_close(model, reference, rtol=1e-6, atol=0)
    task.frozen = None
    with torch.no_grad(), torch.autocast("cpu", BF16):  # and not at the model without it
        _, plain, _ = task.measure(task.load([(i, 0) for i in range(4)]), compare=False)
    assert plain is not None and not torch.allclose(plain, reference, rtol=1e-4)


def test_training_goes_on_from_a_lora_to_the_last_digit(
    models: dict[str, Path], table: Path, lora: Path, tmp_path: Path
) -> None:
    wanted = {"precision": "bf16", "lora": {"rank": 4, "init": str(lora)}}
    task = PreferenceTask(method_settings(tmp_path, models["sd3"], table, "diffusion_dpo", **wanted), CPU)
    held = load_file(lora / "pytorch_lora_weights.safetensors")
    state = get_peft_model_state_dict(task.adapter.denoiser)
    assert held.keys() == {f"transformer.{key}" for key in state}
    assert all(torch.equal(value, held[f"transformer.{key}"]) for key, value in state.items())


def test_a_lora_of_the_model_stays_where_training_adds_one(
    models: dict[str, Path], table: Path, lora: Path, tmp_path: Path
) -> None:
    """In half precision too, the reference is the model with its own LoRA, and a fresh policy is that."""
    found = {}
    for name, changes in {"with": {"model__lora": str(lora)}, "frozen": {"reference": {"lora": str(lora)}}}.items():
        settings = method_settings(tmp_path, models["sd3"], table, "diffusion_dpo", precision="bf16", **changes)
        task = PreferenceTask(settings, CPU)
        with torch.no_grad(), torch.autocast("cpu", BF16):
            found[name] = task.measure(task.load([(i, 0) for i in range(4)]), compare=False)[:2]
    (policy, reference), (_, frozen) = found["with"], found["frozen"]
    assert torch.equal(policy, reference)
    torch.testing.assert_close(reference, frozen, rtol=1e-6, atol=0)


def _pictures(path: Path, lora: Path | None, dtype: torch.dtype, negative: Path | None = None) -> np.ndarray:
    adapter = base.load(Model(path=path, lora=lora), dtype=dtype)
    if negative:
        guide_away(adapter, negative, 0.5)
    images = adapter.pipeline()(
        ["a red circle"], num_inference_steps=2, height=32, width=32, output_type="np",
        **adapter.call_arguments(3.0, None, 1), generator=[torch.Generator().manual_seed(0)],
    ).images  # fmt: skip
    return np.asarray(images, float)


def test_sampling_in_half_precision_keeps_a_lora_beside_the_weights(models: dict[str, Path], lora: Path) -> None:
    """So the LoRA itself is rounded to 8 bits, not its sum with weights a thousand times as large."""
    name, stored = "transformer_blocks.0.attn.to_q", load_file(lora / "pytorch_lora_weights.safetensors")
    given = torch.randn(5, base.load(Model(path=models["sd3"])).denoiser.get_submodule(name).in_features)
    found = []
    for one in (None, lora):
        layer = base.load(Model(path=models["sd3"], lora=one), dtype=BF16).denoiser.get_submodule(name).float()
        found.append(layer(given))
    down, up = (stored[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
    update = given @ down.T @ up.T
    torch.testing.assert_close(found[1] - found[0], update, rtol=0, atol=0.02 * update.abs().max().item())
    exact, half = (_pictures(models["sd3"], lora, dtype) for dtype in (torch.float32, BF16))
    assert np.abs(exact - half).max() < 0.1


def test_a_negative_lora_stands_beside_one_of_the_model(models: dict[str, Path], lora: Path) -> None:
    """Half precision keeps both apart from the weights; the pictures are those of float32, where one is fused."""
    exact, half = (_pictures(models["sd3"], lora, dtype, negative=lora) for dtype in (torch.float32, BF16))
    assert np.abs(exact - half).max() < 0.1
    strong = _strengthened(lora)
    with_both, alone, without = (
        _pictures(models["sd3"], one, torch.float32, negative=other)
        for one, other in ((strong, strong), (None, strong), (strong, None))
    )
    assert np.abs(with_both - alone).max() > 0.01 and np.abs(with_both - without).max() > 0.01
    torch.testing.assert_close(
        torch.tensor(_pictures(models["sd3"], strong, BF16, negative=strong)), torch.tensor(with_both), rtol=0, atol=0.1
    )


def _strengthened(lora: Path) -> Path:
    """The same LoRA with an update a hundred times as large."""
    folder = lora.parent / "strong"
    folder.mkdir(exist_ok=True)
    tensors = load_file(lora / "pytorch_lora_weights.safetensors")
    larger = {name: value * (100 if "lora_B" in name else 1) for name, value in tensors.items()}
    save_file(larger, folder / "pytorch_lora_weights.safetensors")
    return folder


def test_the_policy_that_inverts_lends_no_weights_to_the_one_that_learns(
    models: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    """Autocast keeps casts by parameter; the inverting weights must not be found there in place of the current ones."""
    settings = method_settings(
        tmp_path, models["sd3"], table, "diffusion_dpo", precision="bf16",
        noise={"kind": "ddim_inversion", "inversion": {"model": "policy", "steps": 2}},
    )  # fmt: skip
    task = moved(settings, 0.1)
    batch = task.load([(0, 0)])
    found = {}
    for cached in (True, False):
        with torch.autocast("cpu", BF16, cache_enabled=cached):
            found[cached] = task.loss({**batch, "generators": task.load([(0, 0)])["generators"]})[0].item()
    assert found[True] == pytest.approx(found[False], rel=1e-6)


def test_validation_decodes_as_exactly_as_it_encodes(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    settings = method_settings(tmp_path, models["sdxl"], table, "diffusion_dpo", precision="bf16")
    task = PreferenceTask(settings, CPU)
    seen: list[torch.dtype] = []
    task.adapter.vae.decoder.conv_out.register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    finish.draw(task.adapter, settings, ["a red circle"], range(1), 1, 1.0)
    assert seen == [torch.float32]
    assert "decode" not in vars(task.adapter.vae)
