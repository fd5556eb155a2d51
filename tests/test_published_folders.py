"""Folders as they are published, and LoRAs as people bring them: what tiny pipelines of one's own do not show."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from sentencepiece import sentencepiece_model_pb2 as sentencepiece
from training_kit import config
from transformers import CLIPImageProcessor

from mmalign import rounds, sample
from mmalign.export import model_card
from mmalign.jobs import SampleConfig, TrainConfig
from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.models.checkpoint import check_folder
from mmalign.tasks import finish
from mmalign.testing.tiny import tiny_sd, tiny_sdxl
from mmalign.testing.tiny_transformers import tiny_flux, tiny_pixart, tiny_sana, tiny_sd3

MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny_sd, "sdxl": tiny_sdxl, "sd3": tiny_sd3, "flux": tiny_flux, "pixart": tiny_pixart, "sana": tiny_sana
}  # fmt: skip
PROMPT = ["a red circle"]


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {name: make(home / name) for name, make in MAKERS.items()}


def _changed(folder: Path, home: Path, change: Callable[[dict[str, Any]], object], file: str) -> Path:
    """A copy of a folder in which one JSON file is changed."""
    copy = home / "model"
    shutil.copytree(folder, copy)
    tree = json.loads((copy / file).read_text())
    change(tree)
    (copy / file).write_text(json.dumps(tree))
    return copy


def _without(folder: Path, home: Path, *parts: str) -> Path:
    nothing = {part: [None, None] for part in parts}
    return _changed(folder, home, lambda index: index.update(nothing), "model_index.json")


# ------------------------------------------------------------------------------------------- parts of a pipeline


def test_a_part_that_a_folder_comes_without_can_be_given(folders: dict[str, Path], tmp_path: Path) -> None:
    """The pipeline says of which class it is, since the index does not."""
    whole = folders["sd3"]
    parts = ("text_encoder_2", "text_encoder_3", "tokenizer_3")
    copy = _without(whole, tmp_path, *parts)
    given = base.load(Model(path=copy, components={name: whole / name for name in parts}))
    theirs = base.load(Model(path=whole)).encode_prompt(PROMPT)
    for name, value in given.encode_prompt(PROMPT).items():
        assert torch.equal(value, theirs[name])


def test_a_part_of_several_classes_has_to_be_named(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = _without(folders["sana"], tmp_path, "text_encoder")
    with pytest.raises(ValueError, match=r"model_index\.json does not say of which class text_encoder is"):
        base.load(Model(path=copy, components={"text_encoder": folders["sana"] / "text_encoder"}))


def test_an_encoder_without_its_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="comes without tokenizer_3"):
        base.load(Model(path=_without(folders["sd3"], tmp_path, "tokenizer_3")))


def test_a_part_that_is_switched_off_is_not_in_the_fingerprint(folders: dict[str, Path], tmp_path: Path) -> None:
    """T5 is usually dropped in the index alone, with its folder left where it is; embeddings are others then."""
    copy = _without(folders["sd3"], tmp_path, "text_encoder_3", "tokenizer_3")
    there, gone = (base.fingerprint(Model(path=path)) for path in (folders["sd3"], copy))
    assert there.keys() - gone.keys() == {"text_encoder_3", "tokenizer_3"}


def test_a_missing_feature_extractor_is_not_missed(folders: dict[str, Path], tmp_path: Path) -> None:
    entry = {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    copy = _changed(folders["sd"], tmp_path, lambda index: index.update(entry), "model_index.json")
    assert base.load(Model(path=copy)).encode_prompt(PROMPT)["encoder_hidden_states"].shape[0] == 1


def test_half_precision_files_are_read_by_their_variant(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = StableDiffusionPipeline.from_pretrained(folders["sd"], dtype=torch.float16)
    whole.save_pretrained(tmp_path / "half", variant="fp16")
    with pytest.raises(ValueError, match=r"set model\.variant to fp16"):
        base.load(Model(path=tmp_path / "half"))
    loaded = base.load(Model(path=tmp_path / "half", variant="fp16"))
    assert loaded.denoiser.dtype == torch.float32
    assert torch.equal(loaded.denoiser.conv_in.weight, whole.unet.conv_in.weight.float())


def test_a_variant_is_another_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """For caches, for parts from elsewhere, for the model card and for the fixed reference of a full fine-tune."""
    with pytest.raises(ValueError, match=r"model\.variant: .* has no weights of the variant 'fp16'; drop the key"):
        base.check(Model(path=folders["sd"], variant="fp16"))
    both = tmp_path / "both"
    shutil.copytree(folders["sd"], both)
    StableDiffusionPipeline.from_pretrained(tiny_sd(tmp_path / "other", seed=1)).save_pretrained(both, variant="ema")
    plain, ema = (base.fingerprint(Model(path=both, variant=variant)) for variant in (None, "ema"))
    assert plain.keys() == ema.keys() and not set(plain.values()) & set(ema.values())
    given = base.load(Model(path=both, variant="ema", components={"vae": folders["sd"] / "vae"}))
    other = base.load(Model(path=tmp_path / "other"))
    assert torch.equal(given.denoiser.conv_in.weight, other.denoiser.conv_in.weight)
    StableDiffusionPipeline.from_pretrained(folders["sd"]).save_pretrained(tmp_path / "half", variant="ema")
    taken = base.load(Model(path=both, variant="ema", components={"unet": tmp_path / "half" / "unet"}))
    assert not torch.equal(taken.denoiser.conv_in.weight, other.denoiser.conv_in.weight)
    first = Model(path=both, variant="ema", components={"vae": tmp_path / "half" / "vae"})
    assert rounds._policy(first, folders["sd"], lora=False) == Model(path=folders["sd"]), "the export is whole"
    run = config(tmp_path / "run", both, tmp_path / "none", lora=None, model__variant="ema")
    changed = rounds._from(run, folders["sd"], "fixed")
    assert (changed["reference"].model, changed["reference"].variant) == (both, "ema")
    card = model_card(tmp_path, config={"model": {"variant": "ema"}}, data="", scores={}, base_model=str(both),
                      licence="mit", family="sd")  # fmt: skip
    assert 'from_pretrained("both", variant="ema")' in card.read_text()


def test_a_variant_may_be_that_of_a_replaced_part_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    StableDiffusionPipeline.from_pretrained(folders["sd"]).save_pretrained(tmp_path / "half", variant="fp16")
    vae = {"vae": tmp_path / "half" / "vae"}
    with pytest.raises(ValueError, match=r"set model\.variant to fp16"):
        base.check(Model(path=folders["sd"], components=vae))
    base.load(Model(path=folders["sd"], components=vae, variant="fp16"))
    shutil.copytree(folders["sd"], tmp_path / "plain")
    shutil.copytree(tmp_path / "half" / "vae", tmp_path / "plain" / "extra")  # of no part that the index names
    with pytest.raises(ValueError, match="has no weights of the variant 'fp16'"):
        base.check(Model(path=tmp_path / "plain", variant="fp16"))


def test_the_feature_extractor_can_be_given(folders: dict[str, Path], tmp_path: Path) -> None:
    entry = {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    copy = _changed(folders["sd"], tmp_path, lambda index: index.update(entry), "model_index.json")
    CLIPImageProcessor().save_pretrained(tmp_path / "extractor")
    loaded = base.load(Model(path=copy, components={"feature_extractor": tmp_path / "extractor"}))
    assert loaded.pipe.feature_extractor is not None
    with pytest.raises(ValueError, match="has no part 'requires_safety_checker' to replace"):
        base.check(Model(path=copy, components={"requires_safety_checker": tmp_path}))


def test_the_variant_of_a_sharded_file_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd"], tmp_path / "model")
    (file,) = (tmp_path / "model" / "unet").glob("*.safetensors")
    file.rename(file.with_name("diffusion_pytorch_model.fp16-00001-of-00002.safetensors"))
    with pytest.raises(ValueError, match=r"set model\.variant to fp16\."):
        check_folder(tmp_path / "model")


# ------------------------------------------------------------------------------------------------ vocabularies


def _spiece(folder: Path) -> None:
    """Replaces a T5 tokenizer's tokenizer.json by the spiece.model of the same pieces, as PixArt-Sigma's has."""
    file = folder / "tokenizer.json"
    model = sentencepiece.ModelProto()
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    for text, score in json.loads(file.read_text())["model"]["vocab"]:
        piece = model.pieces.add()
        piece.piece, piece.score, piece.type = text, score, kinds.get(text, 1)
    model.trainer_spec.model_type = 1
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 0, 1, 2
    model.normalizer_spec.name, model.normalizer_spec.add_dummy_prefix = "identity", True
    (folder / "spiece.model").write_bytes(model.SerializeToString())
    file.unlink()
    told = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def test_a_vocabulary_of_sentencepiece_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folders["pixart"], copy)
    _spiece(copy / "tokenizer")
    theirs, ours = (base.load(Model(path=path)) for path in (folders["pixart"], copy))
    found = [each.tokens(each.pipe.tokenizer, ["a red circle, Photo of x"], 24).input_ids for each in (theirs, ours)]
    assert torch.equal(*found)
    before = base.fingerprint(Model(path=copy))["tokenizer"]
    with (copy / "tokenizer" / "spiece.model").open("ab") as file:
        file.write(b"\n")
    assert base.fingerprint(Model(path=copy))["tokenizer"] != before


def test_a_tokenizer_of_one_file_without_it_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Gemma's would load with five tokens, and every prompt would be <unk>."""
    copy = tmp_path / "model"
    shutil.copytree(folders["sana"], copy)
    (copy / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"its vocabulary is missing \(tokenizer\.json\)"):
        base.load(Model(path=copy))


def test_more_text_than_the_pipeline_takes_is_refused_at_once(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"model\.max_sequence_length: flux reads at most 512 text tokens"):
        base.load(Model(path=folders["flux"], max_sequence_length=513))


# -------------------------------------------------------------------------------------- schedulers and denoisers


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart"])
def test_ddim_does_not_clip_latents(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Where the folder's own scheduler has no clip_sample, DDIM's default is True: the range of pixels."""
    file = "scheduler/scheduler_config.json"
    copy = _changed(folders[name], tmp_path, lambda tree: tree.pop("clip_sample", None), file)
    (tmp_path / "prompts.txt").write_text(PROMPT[0])
    tree = {"model": {"path": copy}, "prompts": tmp_path / "prompts.txt", "output": tmp_path / "out"}
    config = SampleConfig.model_validate({**tree, "scheduler": "ddim", "height": 32, "width": 32, "device": "cpu"})
    assert sample.load(config, torch.device("cpu")).pipe.scheduler.config.clip_sample is False


@pytest.mark.parametrize("kind", ["EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_scheduler_without_abar_is_refused(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    copy = _changed(
        folders["sdxl"], tmp_path, lambda index: index.update(scheduler=["diffusers", kind]), "model_index.json"
    )
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ValueError, match=f"the scheduler is {kind}, which has no abar"):
        base.load(Model(path=copy))


def test_a_consistency_model_is_not_trained(folders: dict[str, Path], tmp_path: Path) -> None:
    """It is told its guidance as timestep_cond, and would be trained without."""
    copy = _changed(folders["sd"], tmp_path, lambda tree: tree.update(time_cond_proj_dim=16), "unet/config.json")
    model = Model(path=copy, from_scratch=("unet",))
    base.load(model)  # it may be sampled from
    run = TrainConfig.model_construct(model=model, precision="fp32", lora=None)
    with pytest.raises(ValueError, match="is told its guidance"):
        finish.load(run, torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------- LoRAs


def _layers(module: Any, targets: list[str], dora: bool = False) -> Any:
    module.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=dora))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return get_peft_model_state_dict(module)


def test_a_lora_of_fluxs_text_encoder_is_fused_too(folders: dict[str, Path], tmp_path: Path) -> None:
    plain = base.load(Model(path=folders["flux"]))
    before = plain.encode_prompt(PROMPT)["pooled_projections"]
    layers = _layers(plain.pipe.text_encoder, ["q_proj", "v_proj"])
    expected = plain.encode_prompt(PROMPT)["pooled_projections"]
    FluxPipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=layers)
    # Saved without its alpha, as this file has no metadata: diffusers then takes alpha = rank.
    loaded = FluxPipeline.from_pretrained(folders["flux"])
    loaded.load_lora_weights(tmp_path)
    theirs = loaded.text_encoder(plain.tokens(plain.pipe.tokenizer, PROMPT).input_ids).pooler_output
    assert (expected - before).abs().max() > 1e-2
    ours = base.load(Model(path=folders["flux"], lora=tmp_path)).encode_prompt(PROMPT)["pooled_projections"]
    torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-5)
    assert (ours - before).abs().max() > 1e-2


def test_a_dora_is_not_added_in_half_precision(folders: dict[str, Path], tmp_path: Path) -> None:
    plain = base.load(Model(path=folders["sd"]))
    layers = _layers(plain.denoiser, ["to_q", "to_v"], dora=True)
    plain.pipe.save_lora_weights(tmp_path, unet_lora_layers=layers)
    base.load(Model(path=folders["sd"], lora=tmp_path))
    with pytest.raises(ValueError, match="a DoRA scales the weights themselves"):
        base.load(Model(path=folders["sd"], lora=tmp_path), dtype=torch.bfloat16)
