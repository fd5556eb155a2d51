"""Folders of VideoReward: which step is taken, what does not fit, and what adapters have to cover."""

import json

import pytest
import torch
from qwen2_vl_kit import (
    LINEARS,
    video_config,
    video_folder,
)
from safetensors.torch import load_file, save_file
from video_reward_kit import clips_of, score

from mmalign.discovery import evaluator_class, load_evaluator, parse_params


def test_the_highest_step_is_taken_unless_one_is_named(tmp_path):
    params, _ = video_folder(tmp_path)
    cls = evaluator_class("video_reward")

    def files(**change):
        return [path.relative_to(tmp_path).as_posix() for path in
                cls.weight_files(parse_params(cls, "video_reward", params | change))]  # fmt: skip

    assert files()[:2] == ["model_config.json", "checkpoint-20/model.pth"] and files()[-1] == "prompt_template.py"
    assert files(checkpoint=tmp_path / "checkpoint-20") == files(step=20) == files()
    assert files(checkpoint=tmp_path / "checkpoint-20" / "model.pth") == files()
    with pytest.raises(ValueError, match=r"checkpoint-3: holds neither model\.pth nor adapter_model\.safetensors and"):
        files(step=3)
    with pytest.raises(ValueError, match=r"has no checkpoint-7; there are .*checkpoint-20"):
        files(step=7)
    with pytest.raises(ValueError, match="`checkpoint` is checkpoint-20, but `step` is 3"):
        files(checkpoint=tmp_path / "checkpoint-20", step=3)
    adapter, _ = video_folder(tmp_path / "adapter", "adapter")
    names = [path.name for path in cls.weight_files(parse_params(cls, "video_reward", adapter))]
    assert names[1:4] == ["adapter_model.safetensors", "non_lora_state_dict.pth", "model.safetensors"]


def test_missing_files_are_named_with_their_source(tmp_path):
    params, _ = video_folder(tmp_path / "good")
    cls = evaluator_class("video_reward")
    (tmp_path / "empty" / "checkpoint-1").mkdir(parents=True)
    for change, message in (
        ({"checkpoint": tmp_path / "nothing"}, r"checkpoint-11352/model\.pth from the Hugging Face repository KwaiVGI"),
        ({"checkpoint": tmp_path / "empty"}, r"holds no model_config\.json; get it from .*KwaiVGI/VideoReward"),
        ({"base": tmp_path}, r"config\.json from the Hugging Face repository Qwen/Qwen2-VL-2B-Instruct.*`base`"),
        ({"instruction": tmp_path / "x"}, r"prompt_template\.py from https://github\.com/KwaiVGI/VideoAlign"),
    ):
        with pytest.raises(ValueError, match=message):
            cls.weight_files(parse_params(cls, "video_reward", params | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_config": {"fps": 4.0}}, r"fps is 4\.0; this scorer is for .* 2 frames per second"),
        ({"data_config": {"num_frames": 16}}, "num_frames is 16"),
        ({"data_config": {"max_frame_pixels": None}}, r"not VideoReward's model_config\.json: int\(\)"),
        ({"data_config": {"sample_type": "multi_pts"}}, "sample_type is multi_pts"),
        ({"data_config": {"prompt_template_type": "simple"}}, "prompt_template_type is simple"),
        ({"model_config": {"output_dim": 4}}, "output_dim is 4"),
        ({"model_config": {"use_special_tokens": False}}, "use_special_tokens is False"),
        ({"inference_config": {"VQ_std": 0.0}}, "a standard deviation in inference_config is 0"),
        ({"inference_config": {"TA_mean": "x"}}, r"not VideoReward's model_config\.json: could not convert string"),
    ],
)
def test_settings_that_mean_another_scorer_are_refused(tmp_path, change, message):
    params, _ = video_folder(tmp_path)
    config = video_config()
    for part, values in change.items():
        config[part] = {**config[part], **values}
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_evaluator("video_reward", params, "cpu")


@pytest.mark.parametrize("text", ["{", "[]", '{"data_config": {}}', '{"data_config": {}, "model_config": {}}'])
def test_a_config_of_something_else_is_refused(tmp_path, text):
    params, _ = video_folder(tmp_path)
    (tmp_path / "model_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"model_config\.json: not VideoReward's"):
        load_evaluator("video_reward", params, "cpu")


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    params, _ = video_folder(tmp_path)
    path = tmp_path / "checkpoint-20" / "model.pth"
    state = torch.load(path, weights_only=True)
    gone = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
    torch.save({name: value for name, value in state.items() if name != gone}, path)
    with pytest.raises(
        ValueError, match=r"1 modules have only one half of the adapter, such as .*1\.self_attn\.q_proj"
    ):
        load_evaluator("video_reward", params, "cpu")
    torch.save(state | {"base_model.model.visual.more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"1 unexpected: model\.visual\.more"):
        load_evaluator("video_reward", params, "cpu")
    (tmp_path / "model_config.json").write_text(json.dumps(video_config(outputs=3)))
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"rm_head\.weight is \[1, 32\] and has to be \[3, 32\]"):
        load_evaluator("video_reward", params, "cpu")


def rewritten(path, keep, load=None, save=torch.save):
    """The file without the tensors whose names `keep` refuses; how many went."""
    state = load(path) if load else torch.load(path, weights_only=True)
    kept = {name: value for name, value in state.items() if keep(name)}
    save(kept, path)
    return len(state) - len(kept)


def test_a_wrapped_weight_without_its_adapter_is_refused(tmp_path):
    params, _ = video_folder(tmp_path)
    path = tmp_path / "checkpoint-20" / "model.pth"
    gone = "layers.1.self_attn.q_proj.lora_"
    assert rewritten(path, lambda name: gone not in name) == 2
    with pytest.raises(ValueError, match=r"model\.pth: 1 weights are wrapped.*They are .*1\.self_attn\.q_proj\.$"):
        load_evaluator("video_reward", params, "cpu")
    assert rewritten(path, lambda name: ".lora_" not in name) == 2 * 13
    with pytest.raises(ValueError, match=r"model\.pth: 14 weights are wrapped"):
        load_evaluator("video_reward", params, "cpu")
    config = video_config(lora=False)
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"model\.pth: 14 weights are wrapped"):
        load_evaluator("video_reward", params, "cpu")


def test_an_adapter_has_to_cover_every_layer(tmp_path):
    params, _ = video_folder(tmp_path, "adapter")
    path = tmp_path / "checkpoint-20" / "adapter_model.safetensors"
    assert rewritten(path, lambda name: ".layers.0." not in name, load_file, save_file) == 14
    with pytest.raises(ValueError, match=r"7 modules have no adapter, .*layers\.0\.mlp\.down_proj, .*v_proj\.$"):
        load_evaluator("video_reward", params, "cpu")


def configured(folder, **parts):
    """model_config.json with other values in its parts."""
    config = video_config()
    for part, values in parts.items():
        config[part] = {**config[part], **values}
    (folder / "model_config.json").write_text(json.dumps(config))


def test_a_trained_vision_tower_does_not_come_from_the_base(tmp_path):
    """VideoAlign stores what was trained: the tower unless it is frozen, its merger where that is tuned."""
    params, _ = video_folder(tmp_path, "adapter")
    path = tmp_path / "checkpoint-20" / "non_lora_state_dict.pth"

    def refused(message):
        with pytest.raises(ValueError, match=message):
            load_evaluator("video_reward", params, "cpu")

    for frozen in ({"freeze_vision_tower": True}, {"tune_merger": False}):
        configured(tmp_path, model_config=frozen)
        refused(
            r"non_lora_state_dict\.pth: holds \d+ tensors of the vision tower that were not trained.*one training run"
        )
    configured(tmp_path, peft_lora_config={"vision_lora": True})
    refused(r"holds \d\d tensors of the vision tower that were not trained, by .*vision_lora of model_config\.json")
    configured(tmp_path)
    rewritten(path, lambda name: "visual.merger.mlp.2.bias" not in name)
    refused(r"lacks 1 tensors of the vision tower that were trained.*are model\.visual\.merger\.mlp\.2\.bias")
    rewritten(path, lambda name: "visual.merger." not in name)
    refused(r"lacks 6 tensors of the vision tower that were trained")
    configured(tmp_path, model_config={"tune_merger": False})
    load_evaluator("video_reward", params, "cpu")
    rewritten(path, lambda name: "visual." not in name)
    refused(r"non_lora_state_dict\.pth: lacks \d\d tensors of the vision tower")
    configured(tmp_path, model_config={"freeze_vision_tower": True, "tune_merger": False})
    load_evaluator("video_reward", params, "cpu")


@pytest.mark.parametrize("layout", ["model.pth", "adapter"])
def test_adapters_are_where_the_settings_put_them(tmp_path, layout):
    params, _ = video_folder(tmp_path, layout)
    kept = ["lm_head", "rm_head", "embed_tokens", "visual"]
    for excluded, message in (
        (
            [*kept, "v_proj"],
            r"2 modules have an adapter that lora_namespan_exclude .*0\.self_attn\.v_proj, .*1\.self_att",
        ),
        (
            kept[:3],
            r"\d+ modules have no adapter, though lora_namespan_exclude .* model\.visual\.blocks\.0\.attn\.proj, ",
        ),
        (["lm_head", "embed_tokens", "visual"], r"1 modules have no adapter, .* rm_head\.$"),
        ([*kept, "model.layers.1"], r"7 modules have an adapter that lora_namespan_exclude"),
        (None, r"not VideoReward's model_config\.json: .*NoneType"),
    ):
        configured(tmp_path, peft_lora_config={"lora_namespan_exclude": excluded})
        with pytest.raises(ValueError, match=message):
            load_evaluator("video_reward", params, "cpu")
    configured(tmp_path, peft_lora_config={"num_lora_modules": 7})
    with pytest.raises(ValueError, match="num_lora_modules is 7"):
        load_evaluator("video_reward", params, "cpu")


def test_pefts_own_settings_have_to_say_the_same(tmp_path):
    """adapter_config.json as PEFT writes it, whole names, ends of names or a pattern; and each difference refused."""
    from peft import LoraConfig

    params, _ = video_folder(tmp_path, "adapter")
    folder = tmp_path / "checkpoint-20"
    whole = [f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEARS]

    def wrote(**changes):
        LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": whole, **changes}).save_pretrained(folder)

    expected = score(params, clips_of()[:1], ["a"])
    ends = [linear.rpartition(".")[2] for linear in LINEARS]
    for targets in (whole, ends, r"model\.layers\.\d\.(self_attn|mlp)\..*_proj"):
        wrote(target_modules=targets)
        assert torch.equal(score(params, clips_of()[:1], ["a"])["Overall"], expected["Overall"])
    for changes, message in (
        ({"r": 8}, r"adapter_config\.json: r is 8, and 4 is what"),
        ({"lora_alpha": 16}, "lora_alpha is 16"),
        ({"use_rslora": True}, "use_rslora is True"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is all"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is "),
        ({"target_modules": whole[:13]}, r"1 modules have an adapter that its target_modules .*1\.mlp\.down_proj"),
        (
            {"target_modules": [*ends, "qkv"]},
            r"2 modules have no adapter, though its target_modules .*visual\.blocks\.1",
        ),
        ({"target_modules": [*whole, "nothing"]}, "target_modules has nothing, which no adapter is on"),
    ):
        wrote(**changes)
        with pytest.raises(ValueError, match=message):
            load_evaluator("video_reward", params, "cpu")
    for text in ("{", "{}", "[]", '{"target_modules": 3}'):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=r"not PEFT's adapter_config\.json"):
            load_evaluator("video_reward", params, "cpu")


def test_settings_of_lora_are_read_only_where_it_is_on(tmp_path):
    params, _ = video_folder(tmp_path, "plain")
    config = video_config(lora=False)
    config["peft_lora_config"] = {"lora_enable": False, "lora_alpha": None}
    (tmp_path / "model_config.json").write_text(json.dumps(config))
    load_evaluator("video_reward", params, "cpu")


def test_an_adapter_needs_the_embeddings_of_its_tokens(tmp_path):
    params, _ = video_folder(tmp_path, "adapter")
    path = tmp_path / "checkpoint-20" / "non_lora_state_dict.pth"
    state = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in state.items() if "embed_tokens" not in name}, path)
    with pytest.raises(ValueError, match="holds no embed_tokens"):
        load_evaluator("video_reward", params, "cpu")
