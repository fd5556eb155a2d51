"""Training on clips: a LoRA of every video family, saved, loaded by plain diffusers; checkpointing; half precision."""

from __future__ import annotations

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from training_kit import records, settings
from video_kit import FAMILIES, FRAMES, MAKERS, PROMPTS, SIDE, clip_preferences, draw, folders_of, generators, start

from mmalign import train
from mmalign.export import WITHOUT_COMFYUI, export_lora
from mmalign.jobs import TrainConfig
from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.models.negative import guide_away
from mmalign.tasks.finish import _check_targets

KINDS = (*FAMILIES, "cogvideox-1.5")


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders_of(tuple(MAKERS), tmp_path_factory)


@pytest.fixture(scope="module", name="table")
def _table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_preferences(tmp_path_factory.mktemp("table"), pairs=2)


def _config(run: Path, model: Path, table: Path, **changes: Any) -> TrainConfig:
    told = {"data__frames": FRAMES, "data__fps": 8.0, "optim__batch_size": 2, **changes}
    return TrainConfig.model_validate(settings(run, model, table, **told))


def _plain(folder: Path) -> Any:
    """The pipeline as a user of diffusers alone loads it, from what its index says.

    HunyuanVideo's tokenizer is given: transformers 5 reads it as another.
    """
    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, entry in index.items() if isinstance(entry, list) and not entry[0]}
    if index["_class_name"] == "HunyuanVideoPipeline":
        absent["tokenizer"] = base.load(Model(path=folder)).pipe.tokenizer
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _times(adapter: Any) -> torch.Tensor:
    return torch.tensor([0.25, 0.75]) if adapter.process.kind == "flow" else torch.tensor([250, 750])


@pytest.mark.parametrize("name", KINDS)
def test_a_lora_is_trained_on_clips_saved_and_loaded_by_plain_diffusers(
    name: str, folders: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    wanted = _config(
        tmp_path / "run", folders[name], table, reference__draws=1, optim__steps=5, optim__lr=5e-3,
        optim__gradient_checkpointing=True,
        loss={"kind": "flow_dpo" if name in FLOWS else "diffusion_dpo", "beta": 500.0},
    )  # fmt: skip
    run = train.run(wanted)
    found = records(run)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-4), "policy and reference begin equal"
    assert found[-1]["loss"] < math.log(2) - 0.01
    ours: Any = base.load(Model(path=folders[name], lora=run / "export"))
    clips = draw(ours, steps=2)
    assert (clips - draw(base.load(Model(path=folders[name])), steps=2)).abs().max() > 1e-3  # type: ignore[arg-type]

    pipe = _plain(folders[name])
    pipe.load_lora_weights(run / "export")
    told = ours.call_arguments(1.0, None, 2)
    with torch.no_grad():
        theirs = pipe(
            PROMPTS, num_inference_steps=2, generator=generators(), height=SIDE, width=SIDE, num_frames=FRAMES,
            output_type="np", **told,
        ).frames  # fmt: skip
    torch.testing.assert_close(torch.as_tensor(theirs), clips, rtol=0, atol=1e-5)
    card = (run / "export" / "README.md").read_text()
    assert type(pipe).__name__ in card and "text-to-video" in card and "export_to_video" in card
    written = {file.name for file in (run / "export").rglob("*.safetensors")}
    assert ("mmalign.safetensors" in written) == (ours.family not in WITHOUT_COMFYUI)


FLOWS = ("wan", "hunyuan_video", "ltx-0.9.0")


@pytest.mark.parametrize("name", ["cogvideox-2b", "animatediff"])
def test_full_fine_tuning_saves_a_pipeline(name: str, folders: dict[str, Path], table: Path, tmp_path: Path) -> None:
    run = train.run(_config(tmp_path / "run", folders[name], table, lora=None, optim__steps=1, optim__lr=1e-4))
    assert records(run)[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    again: Any = base.load(Model(path=run / "export"))
    assert again.family == base.load(Model(path=folders[name])).family
    plain = _plain(run / "export")
    with torch.no_grad():
        theirs = plain(
            PROMPTS, num_inference_steps=1, generator=generators(), height=SIDE, width=SIDE, num_frames=FRAMES,
            output_type="np", **again.call_arguments(1.0, None, 2),
        ).frames  # fmt: skip
    torch.testing.assert_close(torch.as_tensor(theirs), draw(again, steps=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_checkpointing_changes_no_gradient(name: str, folders: dict[str, Path]) -> None:
    loaded: Any = base.load(Model(path=folders[name]))
    model, condition, noisy = loaded.denoiser.requires_grad_(True).train(), loaded.encode_prompt(PROMPTS), start(loaded)
    found = []
    for way in ("disable", "enable"):
        getattr(model, f"{way}_gradient_checkpointing")()
        model.zero_grad()
        loaded.predict(noisy, _times(loaded), condition).square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("to_q" in name for name in found[0])
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-4, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision(name: str, folders: dict[str, Path]) -> None:
    """bfloat16 weights take what the adapter feeds, masks included."""
    whole: Any = base.load(Model(path=folders[name]))
    half: Any = base.load(Model(path=folders[name]), dtype=torch.bfloat16, vae_dtype=torch.float32)
    with torch.no_grad():
        expected = whole.predict(start(whole), _times(whole), whole.encode_prompt(PROMPTS))
        found = half.predict(start(half), _times(half), half.encode_prompt(PROMPTS))
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


PUBLISHED: dict[str, tuple[str, str, dict[str, Any], float]] = {
    "Wan2.1-T2V-1.3B": (
        "WanPipeline",
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960},
        1.42e9,
    ),
    "Wan2.1-I2V-14B": (
        "WanImageToVideoPipeline",
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        16.4e9,
    ),
    "CogVideoX-2b": ("CogVideoXPipeline", "CogVideoXTransformer3DModel", {}, 1.7e9),
    "CogVideoX-5b": (
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        5.6e9,
    ),
    "HunyuanVideo": ("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel", {}, 12.8e9),
    "HunyuanVideo-I2V": (
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanVideoTransformer3DModel",
        {"image_condition_type": "token_replace"},
        12.8e9,
    ),
    "LTX-Video": ("LTXPipeline", "LTXVideoTransformer3DModel", {}, 1.92e9),
    "AnimateDiff": (
        "AnimateDiffPipeline",
        "UNetMotionModel",
        {"cross_attention_dim": 768, "use_motion_mid_block": False},
        1.31e9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_denoiser_has_the_default_lora_targets(name: str) -> None:
    pipeline, denoiser, shape, parameters = PUBLISHED[name]
    module, _, kind = base._CLASSES[pipeline][1].partition(":")
    targets = getattr(importlib.import_module(module), kind).lora_targets
    with torch.device("meta"):
        model = getattr(diffusers, denoiser)(**shape)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.05)
    _check_targets(model, targets)
    named = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    attention = {n for n in named if re.search(r"\.(attn\d?|attention_blocks\.\d+)\.(add_|to_)", n)}
    covered = {n for n in named if any(n.endswith("." + target) for target in targets)}
    assert covered == attention, "the targets are all of the attention's projections, and nothing else"


def test_comfyuis_names_of_wan_are_those_that_diffusers_reads_back(folders: dict[str, Path], tmp_path: Path) -> None:
    """diffusers converts Wan LoRAs that have ComfyUI's names, with their alphas; so the prediction must be the same."""
    trained: Any = base.load(Model(path=folders["wan"]))
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj"])
    trained.denoiser.add_adapter(config)
    generator = torch.Generator().manual_seed(0)
    for name, weight in trained.denoiser.named_parameters():
        if "lora_" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    export_lora(get_peft_model_state_dict(trained.denoiser), config, "wan", trained.denoiser.config, tmp_path)
    keys = load_file(tmp_path / "comfyui" / "mmalign.safetensors")
    assert "diffusion_model.blocks.0.self_attn.q.lora_A.weight" in keys
    assert "diffusion_model.blocks.1.cross_attn.o.alpha" in keys and "diffusion_model.blocks.1.ffn.0.alpha" in keys
    plain: Any = base.load(Model(path=folders["wan"]))
    noisy, t, condition = start(plain), torch.tensor([0.25, 0.75]), plain.encode_prompt(PROMPTS)
    with torch.no_grad():
        before = plain.predict(noisy, t, condition)
        plain.pipe.load_lora_weights(tmp_path / "comfyui", weight_name="mmalign.safetensors")
        found, expected = plain.predict(noisy, t, condition), trained.predict(noisy, t, condition)
    assert (before - expected).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_comfyuis_names_of_ltx_are_its_modules(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its LTX blocks have attn1.to_q and to_out.0 as diffusers' have (comfy/ldm/lightricks/model.py)."""
    loaded: Any = base.load(Model(path=folders["ltx-0.9.0"]))
    config = LoraConfig(r=4, target_modules=["to_q", "to_out.0"])
    loaded.denoiser.add_adapter(config)
    export_lora(get_peft_model_state_dict(loaded.denoiser), config, "ltx", loaded.denoiser.config, tmp_path)
    keys = load_file(tmp_path / "comfyui" / "mmalign.safetensors").keys()
    assert {key.rpartition(".lora_")[0] for key in keys if ".lora_" in key} == {
        f"diffusion_model.transformer_blocks.{i}.attn{j}.{part}"
        for i in range(2)
        for j in (1, 2)
        for part in ("to_q", "to_out.0")
    }


@pytest.mark.parametrize("name", ["cogvideox-5b", "ltx-0.9.0", "animatediff"])
def test_a_negative_lora_answers_for_the_unconditional_branch(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """With weight 0 the clips are those of the model; with a weight they are not, and a batch is as its clips alone."""
    loaded: Any = base.load(Model(path=folders[name]))
    config = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    loaded.denoiser.add_adapter(config)
    export_lora(get_peft_model_state_dict(loaded.denoiser), config, loaded.family, loaded.denoiser.config, tmp_path)
    expected = draw(base.load(Model(path=folders[name])), guidance=3.0, steps=2)  # type: ignore[arg-type]
    found = {}
    for weight in (0.0, 1.0):
        guided: Any = base.load(Model(path=folders[name]))
        guide_away(guided, tmp_path, weight)
        found[weight] = draw(guided, guidance=3.0, steps=2)
    torch.testing.assert_close(found[0.0], expected, rtol=0, atol=1e-5)
    assert (found[1.0] - expected).abs().max() > 1e-4


def test_a_clip_of_a_wrong_length_is_refused_before_training(
    folders: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"data\.frames: 5 frames do not fit cogvideox, .*; use 1 or 9"):
        train.run(_config(tmp_path / "run", folders["cogvideox-2b"], table, data__frames=5))
