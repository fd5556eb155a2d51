"""Vision-language models as folders: how pictures are prepared, published layouts, and what is refused."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from vlm_kit import FAMILIES, clips, vlm_folder

from mmalign.backbones.vlm import load_vlm
from mmalign.backbones.vlm_loading import vlm_files
from mmalign.discovery import load_evaluator

CPU = torch.device("cpu")


def load(folder, dtype=torch.float32, **kwargs):
    return load_vlm(folder=str(folder), device=CPU, dtype=dtype, **kwargs)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    return request.param, vlm_folder(tmp_path_factory.mktemp("vlm") / request.param, request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return vlm_folder(tmp_path_factory.mktemp("vlm") / "qwen", "qwen2_vl")


# ------------------------------------------------------------------------------------------------ preprocessing


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("size", [(40, 50), (150, 224), (301, 90)])
@pytest.mark.parametrize("kind", ["smooth", "noise"])
def test_images_are_prepared_as_pil_would_within_a_grey_level(tmp_path, name, size, kind):
    """torchvision's uint8 resize against Pillow's: one level on smooth pictures, on noise half a level on average,
    since both clamp between two passes whose order differs. The other families cut images after this resize.
    """
    vlm = load(vlm_folder(tmp_path, name))
    clip = clips([size])[0]
    if kind == "smooth":
        coarse = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        smooth = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
        clip = (smooth * 255).round().to(torch.uint8)
    inputs = vlm._inputs([vlm.words.chat("x", 1)], [clip])
    image = Image.fromarray(clip[0].permute(1, 2, 0).numpy())
    if name == "llava":
        scale = 28 / min(size)
        height, width = (28 if side == min(size) else int(side * scale) for side in size)
        top, left = (height - 28) // 2, (width - 28) // 2
        due = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))[top : top + 28, left : left + 28]
        found = inputs["pixel_values"][0].permute(1, 2, 0)
    else:
        _, rows, columns = inputs["image_grid_thw"][0].tolist()
        due = np.asarray(image.resize((columns * 14, rows * 14), Image.Resampling.BICUBIC))
        patches = inputs["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)[..., 0, :, :]
        found = patches.permute(0, 2, 5, 1, 3, 6, 4).reshape(rows * 14, columns * 14, 3)
    processor = vlm._processor.image_processor
    levels = (found * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)) * 255
    difference = (levels.double() - torch.from_numpy(due.astype(np.float64))).abs()
    assert difference.max() <= (1.001 if kind == "smooth" else 20)
    assert difference.mean() <= 0.5


@pytest.mark.parametrize("new", [(28, 56), (84, 112), (140, 56)])
def test_the_float_resize_of_a_gpu_is_within_a_grey_level_too(new):
    """On CUDA torchvision resizes uint8 by way of float32: the same budget, measured where there is no GPU."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    noise = clips([(150, 224)])[0].float()
    coarse = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 255
    smooth = torch.nn.functional.interpolate(coarse, size=(150, 224), mode="bilinear").round()
    for image, most in ((smooth, 1.001), (noise, 30)):
        found = resize(image, list(new), interpolation=InterpolationMode.BICUBIC, antialias=True).round().clamp(0, 255)
        pixels = Image.fromarray(image[0].permute(1, 2, 0).byte().numpy())
        due = np.asarray(pixels.resize((new[1], new[0]), Image.Resampling.BICUBIC)).astype(float)
        difference = np.abs(found[0].permute(1, 2, 0).numpy() - due)
        assert difference.max() <= most and difference.mean() <= 0.5


# ------------------------------------------------------------------------------------------------ published folders


def _published(name):
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Config,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
    )

    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    if name == "qwen2_vl":  # Qwen2-VL-2B-Instruct
        text = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
                "num_key_value_heads": 2, "vocab_size": 151936, "rope_parameters": rope}  # fmt: skip
        vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
        return Qwen2VLForConditionalGeneration(config)
    if name == "qwen2_5_vl":  # Qwen2.5-VL-7B-Instruct, also UnifiedReward-qwen-7b
        text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                "num_key_value_heads": 4, "vocab_size": 152064, "rope_parameters": rope}  # fmt: skip
        vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                  "out_hidden_size": 3584, "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    if name == "llava":  # llava-1.5-7b-hf
        return LlavaForConditionalGeneration(LlavaConfig(text_config=LlamaConfig(vocab_size=32064)))
    if name == "llava_onevision":  # llava-onevision-qwen2-0.5b-ov-hf
        text = Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        config = LlavaOnevisionConfig(text_config=text, tie_word_embeddings=True)
        return LlavaOnevisionForConditionalGeneration(config)
    text = LlamaConfig(  # SmolVLM-256M-Instruct, which is of Idefics3's class; SmolVLM2-256M has the same sizes
        vocab_size=49280, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=False,
    )  # fmt: skip
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "patch_size": 16, "image_size": 512}  # fmt: skip
    config, model = {
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    }[name]
    return model(config(text_config=text, vision_config=vision, scale_factor=4))


# Parameters as the model pages state them (bytes of the bfloat16 files, halved), and shapes in today's key names.
PUBLISHED = {
    "qwen2_vl": (2_208_985_600, {
        "model.visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        "model.visual.merger.mlp.2.weight": (1536, 5120),
        "model.language_model.layers.27.self_attn.k_proj.weight": (256, 1536),
        "model.language_model.embed_tokens.weight": (151936, 1536),
    }),
    "qwen2_5_vl": (8_292_166_656, {
        "model.visual.blocks.31.mlp.gate_proj.weight": (3420, 1280),
        "model.language_model.layers.27.self_attn.k_proj.bias": (512,),
        "lm_head.weight": (152064, 3584),
    }),
    "llava": (7_063_427_072, {
        "model.vision_tower.embeddings.position_embedding.weight": (577, 1024),
        "model.multi_modal_projector.linear_1.weight": (4096, 1024),
        "lm_head.weight": (32064, 4096),
    }),
    "llava_onevision": (893_618_208, {
        "model.image_newline": (896,),
        "model.vision_tower.embeddings.position_embedding.weight": (729, 1152),
        "model.language_model.embed_tokens.weight": (151936, 896),
    }),
    "idefics3": (256_484_928, {
        "model.connector.modality_projection.proj.weight": (576, 12288),
        "model.text_model.embed_tokens.weight": (49280, 576),
        "lm_head.weight": (49280, 576),
    }),
}  # fmt: skip
PUBLISHED["smolvlm"] = PUBLISHED["idefics3"]


@pytest.mark.parametrize("name", FAMILIES)
def test_real_architecture_has_the_published_size(name):
    with torch.device("meta"):
        model = _published(name)
    count, shapes = PUBLISHED[name]
    assert sum(value.numel() for value in model.parameters()) == count
    state = model.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_folders_have_the_published_key_names_and_load_from_them(family, tmp_path):
    name, folder = family
    state = load_file(folder / "model.safetensors")
    if name in ("llava", "llava_onevision"):  # the towers' old prefix, which transformers 5 no longer writes
        state = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in state.items()}
    roots = {
        "qwen2_vl": ("visual.blocks.0.norm1.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"),
        "llava": (
            "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
            "language_model.model.layers.0.self_attn.q_proj.weight",
            "language_model.lm_head.weight",
            "multi_modal_projector.linear_2.bias",
        ),
        "llava_onevision": ("image_newline", "vision_tower.vision_model.post_layernorm.weight"),
        "idefics3": ("model.vision_model.embeddings.patch_embedding.weight", "model.text_model.norm.weight"),
    }
    roots |= {"qwen2_5_vl": roots["qwen2_vl"], "smolvlm": roots["idefics3"]}
    assert set(roots[name]) <= set(state)
    shutil.copytree(folder, tmp_path / "m")
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    one, two = load(folder)._model.state_dict(), load(tmp_path / "m")._model.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# ------------------------------------------------------------------------------------------------ bad folders


def test_weights_that_do_not_fit_are_named_and_never_random(tmp_path, qwen):
    shutil.copytree(qwen, tmp_path / "m")
    state = load_file(qwen / "model.safetensors")
    state["extra.weight"] = state.pop("model.norm.weight")
    state["visual.merger.ln_q.weight"] = state["visual.merger.ln_q.weight"][:3].clone()
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    match = r"1 missing: model\.language_model\.norm\.weight; 1 unexpected: extra\.weight; 1 of the wrong shape: .*ln_q"
    with pytest.raises(ValueError, match=match):
        load(tmp_path / "m")


def test_folders_that_are_none_are_explained(tmp_path, qwen):
    with pytest.raises(ValueError, match=rf"Did you mean '{qwen}'"):
        vlm_files(f"{qwen}s")
    with pytest.raises(ValueError, match=r"nothing is downloaded.*hf download Qwen/Q --local-dir models/Q"):
        vlm_files("Qwen/Q")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        vlm_files(qwen / "config.json")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        vlm_files(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        vlm_files(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    with pytest.raises(ValueError, match="no weights"):
        vlm_files(tmp_path)
    files = {path.name for path in vlm_files(qwen)}
    assert {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= files


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": 3}, {"text_config": [1]}, {"image_token_id": "x"}, {"text_config": {"hidden_size": "x"}},
        {"text_config": {"num_attention_heads": 0}}, {"text_config": {"hidden_act": "foo"}},
        {"text_config": {"rope_parameters": {"rope_type": "foo"}}}, {"vision_config": {"patch_size": 0}},
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_config_is_a_value_error_that_names_the_folder(change, tmp_path, qwen):
    shutil.copytree(qwen, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / 'm'))}: ."):
        load(tmp_path / "m")


def test_a_fitted_scorer_is_no_chat_model(tmp_path, qwen):
    shutil.copytree(qwen, tmp_path / "m")
    (tmp_path / "m" / "reward.json").write_text('{"scorer": "vlm_reward"}')
    for name, params in (("vqascore", {}), ("multi_tap", {"ridge": tmp_path / "r.safetensors"})):
        with pytest.raises(ValueError, match="was fitted for another evaluator; it is scored by vlm_reward"):
            load_evaluator(name, {"model": tmp_path / "m", **params}, "cpu")


def test_code_of_a_folders_own_is_not_run(tmp_path, qwen):
    shutil.copytree(qwen, tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    config = json.loads(path.read_text())
    config["model_type"] = "my_vlm"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForImageTextToText": "evil.Model"}
    path.write_text(json.dumps(config))
    (tmp_path / "m" / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match=r"my_vlm|trust_remote_code"):
        load(tmp_path / "m")


def test_encoder_decoders_and_folders_without_a_template_are_refused(tmp_path, qwen):
    from transformers import Florence2Config

    Florence2Config().save_pretrained(tmp_path / "f")
    save_file({"x": torch.zeros(1)}, tmp_path / "f" / "model.safetensors")
    with pytest.raises(ValueError, match="only decoder-only models"):
        load(tmp_path / "f")
    shutil.copytree(qwen, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template; set `conversation`"):
        load(tmp_path / "m")
    load(tmp_path / "m", conversation="{images}{question}")


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("vqascore", {"answer": " "}),
        ("dpg", {"yes": "\t"}),
        ("dpg", {"no": ""}),
        ("vision_reward", {"yes": " "}),
        ("vision_reward", {"no": "\n"}),
        ("personal_reward", {"column": ""}),
    ],
)
def test_blank_words_are_refused_by_name(name, params):
    with pytest.raises(ValueError, match=rf"{next(iter(params))}: must not be empty or blank"):
        load_evaluator(name, params, "cpu")


def test_a_processor_that_lacks_a_package_says_what_to_install(tmp_path, monkeypatch):
    """SmolVLM's own wants num2words, which is not installed with mmalign."""
    from transformers import SmolVLMVideoProcessor
    from transformers.models.smolvlm import processing_smolvlm

    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    folder = vlm_folder(tmp_path, "smolvlm")
    SmolVLMVideoProcessor().save_pretrained(folder)
    for name in ("processor_config.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("Idefics3Processor", "SmolVLMProcessor"))
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}: .*`pip install num2words`"):
        load(folder)
