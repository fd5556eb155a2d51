"""What every transformer family loads and trains in: folders with faults, half precision, the published sizes."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from family_kit import check_faults_are_named
from test_families import MAKERS, PROMPTS, _condition, _start

from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.tasks.finish import _check_targets
from mmalign.testing.tiny_language import tiny_qwen_tokenizer


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("families")
    return {name: make(home / name) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_is_small_and_its_faults_are_named(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    check_faults_are_named(folders[name], ("transformer", "text_encoder", "vae"), tmp_path)


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision_with_checkpointing(name: str, folders: dict[str, Path]) -> None:
    """bfloat16 weights take what the adapter feeds, masks included, and gradients reach the transformer."""
    whole = base.load(Model(path=folders[name]))
    half = base.load(Model(path=folders[name]), dtype=torch.bfloat16, vae_dtype=torch.float32)
    half.denoiser.enable_gradient_checkpointing()
    half.denoiser.requires_grad_(True).train()
    t = torch.tensor([0.25, 0.75]) if whole.process.kind == "flow" else torch.tensor([250, 750])
    with torch.no_grad():
        expected = whole.predict(_start(whole), t, _condition(whole, PROMPTS))
    found = half.predict(_start(half), t, _condition(half, PROMPTS))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()
    found.float().square().mean().backward()
    gradients = [p.grad for n, p in half.denoiser.named_parameters() if "to_q" in n]
    assert gradients and all(g is not None and g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_qwens_template_is_as_long_as_the_pipeline_counts() -> None:
    tokenizer = tiny_qwen_tokenizer()
    template = diffusers.QwenImagePipeline.__init__.__code__.co_consts
    (text,) = [value for value in template if isinstance(value, str) and value.startswith("<|im_start|>system")]
    assert len(tokenizer(text.partition("{}")[0]).input_ids) == 34


PUBLISHED: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "SD3.5-medium": (
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536,
         "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
        2.2e9,
    ),
    "FLUX.1-dev": (
        "FluxPipeline",
        "FluxTransformer2DModel",
        {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128,
         "guidance_embeds": True},
        11.9e9,
    ),
    "PixArt-Sigma-XL-2-1024": (
        "PixArtSigmaPipeline",
        "PixArtTransformer2DModel",
        {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "caption_channels": 4096,
         "interpolation_scale": 2, "use_additional_conditions": False},
        0.61e9,
    ),
    "Sana-1.6B": (
        "SanaPipeline",
        "SanaTransformer2DModel",
        {"num_layers": 20, "num_attention_heads": 70, "attention_head_dim": 32, "caption_channels": 2304},
        1.6e9,
    ),
    "Qwen-Image": (
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128},
        20.4e9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_transformer_has_the_default_lora_targets(name: str) -> None:
    pipeline, transformer, shape, parameters = PUBLISHED[name]
    module, _, kind = base._CLASSES[pipeline][1].partition(":")
    targets = getattr(importlib.import_module(module), kind).lora_targets
    with torch.device("meta"):
        model = getattr(diffusers, transformer)(**shape)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.05)
    _check_targets(model, targets)
    named = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    attention = {n for n in named if re.search(r"\.attn\d?\.", n)}
    covered = {n for n in named if any(n.endswith("." + target) for target in targets)}
    assert covered == attention, "the targets are all of the attention's projections, and nothing else"
