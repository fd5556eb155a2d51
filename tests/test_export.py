"""An exported adapter gives, in programs that know nothing of mmalign, the image that the trained pipeline gave."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import init_empty_weights
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmalign.export import export_full, export_lora, model_card
from mmalign.kohya import import_kohya, kohya_name, ldm_name
from mmalign.testing.tiny import tiny_sd, tiny_sdxl

ATTENTION = ["to_k", "to_q", "to_v", "to_out.0"]
EVERYTHING = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "time_emb_proj"]
EVERYTHING += ["conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_embedding.linear_1"]
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"sd": tiny_sd(root / "sd"), "sdxl": tiny_sdxl(root / "sdxl")}


def load(folder: Path, family: str) -> Any:
    pipe = PIPELINES[family].from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> np.ndarray:
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(1), "output_type": "np"}
    return pipe("a red circle on blue", guidance_scale=3.0, **options).images


def trained(folder: Path, family: str, config: LoraConfig) -> Any:
    """Return a pipeline whose adapter is far from zero, as after training."""
    pipe = load(folder, family)
    pipe.unet.add_adapter(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0.0, 0.3, generator=generator)
    return pipe


def configs() -> dict[str, LoraConfig]:
    return {
        "alpha-is-rank": LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION),
        "alpha-is-twice-the-rank": LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION),
        "odd-scale": LoraConfig(r=3, lora_alpha=7, target_modules=ATTENTION),
        "every-kind-of-module": LoraConfig(r=4, lora_alpha=2, target_modules=EVERYTHING),
        "mixed-ranks": LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, rank_pattern={"to_q": 2}),
        "mixed-alphas": LoraConfig(
            r=4, lora_alpha=8, target_modules=ATTENTION, rank_pattern={"to_q": 2}, alpha_pattern={"attn2.to_k": 1}
        ),
        "rslora": LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, use_rslora=True),
    }


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in configs().items()])
def test_both_files_draw_what_the_trained_pipeline_draws(
    folders: dict[str, Path], family: str, config: LoraConfig, tmp_path: Path
) -> None:
    pipe = trained(folders[family], family, config)
    expected = draw(pipe)
    files = export_lora(get_peft_model_state_dict(pipe.unet), config, family, pipe.unet.config, tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "pytorch_lora_weights.safetensors",
        "comfyui/mmalign.safetensors",
    ]
    plain = load(folders[family], family)
    assert np.abs(draw(plain) - expected).max() > 1e-2, "the adapter must matter"
    plain.load_lora_weights(tmp_path)
    np.testing.assert_array_equal(draw(plain), expected)
    kohya = load(folders[family], family)
    if config.alpha_pattern:
        # diffusers reads one alpha for a whole kohya file; our reader has to do.
        state, read = import_kohya(files[1], kohya.unet)
        kohya.unet.add_adapter(read)
        assert not set_peft_model_state_dict(kohya.unet, state).unexpected_keys
    else:
        kohya.load_lora_weights(tmp_path / "comfyui", weight_name="mmalign.safetensors")
    np.testing.assert_array_equal(draw(kohya), expected)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("config", [pytest.param(config, id=name) for name, config in configs().items()])
def test_kohya_round_trip_is_exact(folders: dict[str, Path], family: str, config: LoraConfig, tmp_path: Path) -> None:
    pipe = trained(folders[family], family, config)
    state = get_peft_model_state_dict(pipe.unet)
    file = export_lora(state, config, family, pipe.unet.config, tmp_path, name="mine")[1]
    assert file.name == "mine.safetensors"
    for unet in (pipe.unet, load(folders[family], family).unet):
        again, read = import_kohya(file, unet)
        assert set(again) == set(state)
        assert all(torch.equal(again[key], state[key]) for key in state)
    other = load(folders[family], family)
    other.unet.add_adapter(read)
    scales = {
        name: module.scaling["default"] for name, module in other.unet.named_modules() if hasattr(module, "scaling")
    }
    wanted = {
        name: module.scaling["default"] for name, module in pipe.unet.named_modules() if hasattr(module, "scaling")
    }
    assert scales == pytest.approx(wanted, rel=1e-7)
    second = export_lora(again, read, family, pipe.unet.config, tmp_path / "second")[1]
    first, repeated = load_file(file), load_file(second)
    assert first.keys() == repeated.keys()
    assert all(torch.equal(first[key], repeated[key]) for key in first)


# Written by hand after files that are published: SD 1.x by sd-scripts, SDXL by sd-scripts (block numbers of the
# latent-diffusion UNet), and the table of equivalents in ComfyUI's comfy/utils.py.
PUBLISHED = {
    "sd": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        ),
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0": (
            "lora_unet_up_blocks_3_attentions_2_transformer_blocks_0_attn2_to_out_0"
        ),
        "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj": (
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_0_proj"
        ),
        "down_blocks.1.attentions.1.proj_in": "lora_unet_down_blocks_1_attentions_1_proj_in",
    },
    "sdxl": {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        ),
        "down_blocks.1.attentions.1.transformer_blocks.1.attn2.to_k": (
            "lora_unet_input_blocks_5_1_transformer_blocks_1_attn2_to_k"
        ),
        "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2": (
            "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_2"
        ),
        "mid_block.attentions.0.proj_in": "lora_unet_middle_block_1_proj_in",
        "mid_block.resnets.1.conv1": "lora_unet_middle_block_2_in_layers_2",
        "up_blocks.0.attentions.2.transformer_blocks.9.attn1.to_out.0": (
            "lora_unet_output_blocks_2_1_transformer_blocks_9_attn1_to_out_0"
        ),
        "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_v": (
            "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_v"
        ),
        "up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
        "down_blocks.0.downsamplers.0.conv": "lora_unet_input_blocks_3_0_op",
        "up_blocks.2.resnets.0.conv_shortcut": "lora_unet_output_blocks_6_0_skip_connection",
        "down_blocks.2.resnets.0.time_emb_proj": "lora_unet_input_blocks_7_0_emb_layers_1",
        "up_blocks.0.resnets.2.conv2": "lora_unet_output_blocks_2_0_out_layers_3",
        "conv_in": "lora_unet_input_blocks_0_0",
        "conv_out": "lora_unet_out_2",
        "add_embedding.linear_2": "lora_unet_label_emb_0_2",
    },
}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_names_are_those_of_published_files(folders: dict[str, Path], family: str) -> None:
    config = load(folders[family], family).unet.config
    assert {module: kohya_name(module, family, config) for module in PUBLISHED[family]} == PUBLISHED[family]


CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"
FULL_SIZE = {
    "sd15": {
        "down_block_types": (*[CROSS.format("Down")] * 3, PLAIN.format("Down")),
        "up_block_types": (PLAIN.format("Up"), *[CROSS.format("Up")] * 3),
        "cross_attention_dim": 768,
    },
    "sdxl": {
        "down_block_types": (PLAIN.format("Down"), *[CROSS.format("Down")] * 2),
        "up_block_types": (*[CROSS.format("Up")] * 2, PLAIN.format("Up")),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.mark.parametrize("size", FULL_SIZE)
def test_every_module_of_the_full_size_unets_has_the_name_that_the_published_checkpoint_gives_it(size: str) -> None:
    """diffusers' converter of latent-diffusion checkpoints, a second opinion, must map each name back."""
    with init_empty_weights():
        unet = UNet2DConditionModel(**FULL_SIZE[size])
    weights = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    original = {
        f"model.diffusion_model.{ldm_name(name, unet.config)}.{part}": f"{name}.{part}"
        for name in weights
        for part in ("weight", "bias")
    }
    assert len(original) == 2 * len(weights)
    back = convert_ldm_unet_checkpoint(original, unet.config)
    assert len(back) == 2 * len(weights)
    assert all(key == value for key, value in back.items())
    inside = [name for name in weights if ".attentions." in name]
    assert len(inside) == {"sd15": 192, "sdxl": 722}[size], "the number of UNet modules that sd-scripts reports"


def test_files_hold_exactly_the_keys_that_the_tools_read(folders: dict[str, Path], tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"])
    pipe = trained(folders["sdxl"], "sdxl", config)
    plain, comfy = export_lora(get_peft_model_state_dict(pipe.unet), config, "sdxl", pipe.unet.config, tmp_path)
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert set(load_file(plain)) == {f"{module}.lora_A.weight", f"{module}.lora_B.weight"}
    with safe_open(plain, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 8)
    name = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
    tensors = load_file(comfy)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"{name}.lora_down.weight": (4, 24),
        f"{name}.lora_up.weight": (24, 4),
        f"{name}.alpha": (),
    }
    assert tensors[f"{name}.alpha"].item() == 8
    with safe_open(comfy, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "4"
        assert file.metadata()["ss_network_alpha"] == "8.0"


def test_every_spelling_that_comfyui_reads_can_be_imported(folders: dict[str, Path], tmp_path: Path) -> None:
    """A SDXL file with diffusers names, as some trainers write it, and one without alpha."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=ATTENTION)
    pipe = trained(folders["sdxl"], "sdxl", config)
    state = get_peft_model_state_dict(pipe.unet)
    file = export_lora(state, config, "sd", pipe.unet.config, tmp_path)[1]
    save_file({key: value for key, value in load_file(file).items() if not key.endswith("alpha")}, file)
    again, read = import_kohya(file, pipe.unet)
    assert all(torch.equal(again[key], state[key]) for key in state)
    assert (read.r, read.lora_alpha, read.alpha_pattern) == (4, 4, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "the adapter is empty"),
        (lambda state: dict(list(state.items())[:1]), "has lora_A alone; both A and B are needed"),
        (lambda state: state | {"x.lora_magnitude_vector": torch.ones(1)}, "no plain LoRA weight .* use_dora=False"),
    ],
)
def test_what_no_file_can_hold_is_refused(
    folders: dict[str, Path], tmp_path: Path, change: Callable[[dict], dict], message: str
) -> None:
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"])
    pipe = trained(folders["sd"], "sd", config)
    with pytest.raises(ValueError, match=message):
        export_lora(change(get_peft_model_state_dict(pipe.unet)), config, "sd", pipe.unet.config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_module_without_a_kohya_name_can_be_exported_for_diffusers_alone(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    pipe = load(folders["sdxl"], "sdxl")
    state = {f"strange.to_q.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"])
    with pytest.raises(ValueError, match=r"'strange\.to_q' has no name in the latent-diffusion UNet"):
        export_lora(state, config, "sdxl", pipe.unet.config, tmp_path)
    assert not list(tmp_path.iterdir())
    assert len(export_lora(state, config, "sdxl", pipe.unet.config, tmp_path, comfyui=False)) == 1


NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_te_text_model_x.alpha": torch.tensor(1.0)}, "belongs to a text encoder"),
        ({f"{NAME}.hada_w1_a": torch.ones(2, 2)}, "belongs to no plain LoRA of a UNet"),
        ({"lora_unet_nowhere.alpha": torch.tensor(1.0)}, "this UNet has no module for 'lora_unet_nowhere.alpha'"),
        ({f"{NAME}.lora_up.weight": torch.ones(32, 4)}, "has lora_B alone"),
        (
            {f"{NAME}.lora_up.weight": torch.ones(320, 4), f"{NAME}.lora_down.weight": torch.ones(4, 320)},
            "maps 320 to 320 channels and the module maps 32 to 32",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    folders: dict[str, Path], tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        import_kohya(tmp_path / "other.safetensors", load(folders["sd"], "sd").unet)


def test_full_export_draws_what_the_trained_pipeline_draws(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = load(folders["sd"], "sd")
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(1.5)
    wanted = draw(pipe)  # which leaves padding and truncation in the tokenizer
    folder = export_full(pipe, tmp_path / "full")
    assert (folder / "tokenizer/tokenizer.json").read_bytes() == (
        folders["sd"] / "tokenizer/tokenizer.json"
    ).read_bytes()
    np.testing.assert_array_equal(draw(load(folder, "sd")), wanted)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="carries a LoRA adapter"):
        export_full(pipe, tmp_path / "again")


def test_model_card_has_front_matter_scores_and_configuration(tmp_path: Path) -> None:
    file = model_card(
        tmp_path,
        config={"task": "preference", "loss": {"kind": "dpo", "beta": 5000.0}},
        data="1,000 pairs of Pick-a-Pic v2.",
        scores={"hps": {"base": 0.27123, "aligned": 0.29}, "win rate": {"aligned": 0.7}},
        base_model="stabilityai/stable-diffusion-xl-base-1.0",
        licence="openrail++",
        family="sdxl",
    )
    assert file == tmp_path / "README.md"
    _, front, body = file.read_text(encoding="utf-8").split("---\n", 2)
    header = yaml.safe_load(front)
    assert header["license"] == "openrail++"
    assert header["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert header["library_name"] == "diffusers"
    assert "lora" in header["tags"]
    assert "1,000 pairs of Pick-a-Pic v2." in body
    assert "| measure | base | aligned |" in body
    assert "| hps | 0.2712 | 0.29 |" in body
    assert "| win rate |  | 0.7 |" in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["loss"] == {"kind": "dpo", "beta": 5000.0}
    assert 'StableDiffusionXLPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")' in body


def test_model_card_keeps_a_private_path_to_itself(tmp_path: Path) -> None:
    folder = tmp_path / "secret-place" / "my-model"
    folder.mkdir(parents=True)
    text = model_card(
        tmp_path / "CARD.md",
        config={},
        data="own",
        scores={},
        base_model=str(folder),
        licence="mit",
        family="sd",
        lora=False,
    ).read_text(encoding="utf-8")
    assert "secret-place" not in text
    assert "my-model" in text
    assert "base_model" not in text
    assert "Not scored." in text


def test_equal_adapters_are_equal_files(folders: dict[str, Path], tmp_path: Path) -> None:
    """safetensors orders its metadata anew at each save; eight saves would agree by chance once in a hundred times."""
    pipe = trained(folders["sd"], "sd", configs()["alpha-is-rank"])
    state, adapter = get_peft_model_state_dict(pipe.unet), pipe.unet.peft_config["default"]
    found = [export_lora(state, adapter, "sd", pipe.unet.config, tmp_path / str(i)) for i in range(8)]
    for files in zip(*found, strict=True):
        assert len({file.read_bytes() for file in files}) == 1, files[0].name
