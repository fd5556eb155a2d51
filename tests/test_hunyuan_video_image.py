"""HunyuanVideo-I2V: what a language model that sees the picture makes of prompts; memory; folders that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_kit import check_faults_are_named, recorded
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_kit import config
from video_kit import FRAMES, SIDE, clip_preferences, generators, start

from mmalign import memory
from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.models.checkpoint import check_folder
from mmalign.tasks.preference import PreferenceTask
from mmalign.testing.tiny_video import tiny_hunyuan_video

KINDS = ("token_replace", "latent_concat")
LONG = "a red circle moves left " * 40
PROMPTS = ["a red circle", LONG, "", "a blue square"]


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("hunyuan")
    return {kind: tiny_hunyuan_video(home / kind, image=kind) for kind in KINDS}  # type: ignore[arg-type]


def _pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(count)]


def _pixels(pictures: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) / 127.5 - 1 for each in pictures])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_read_with_their_pictures_as_the_pipeline_reads_them(kind: str, folders: dict[str, Path]) -> None:
    """Short, cut, empty: each row alone by the pipeline's `encode_prompt`, ours in one batch."""
    adapter: Any = base.load(Model(path=folders[kind]))
    pictures = _pictures(len(PROMPTS))
    found = adapter.join(adapter.encode_prompt(PROMPTS) | adapter.encode_images(_pixels(pictures), FRAMES))
    told = {"image_embed_interleave": 2 if kind == "latent_concat" else 4, "max_sequence_length": 256}
    for i, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True)):
        with torch.no_grad():
            states, pooled, mask = adapter.pipe.encode_prompt(picture, prompt, **told)
        torch.testing.assert_close(found["encoder_attention_mask"][i], mask[0], rtol=0, atol=0)
        torch.testing.assert_close(found["pooled_projections"][i], pooled[0], rtol=0, atol=1e-5)
        seen = mask[0].bool()  # what is padding, the transformer does not read
        torch.testing.assert_close(found["encoder_hidden_states"][i][seen], states[0][seen], rtol=0, atol=1e-5)
    other = adapter.join(adapter.encode_prompt(PROMPTS) | adapter.encode_images(_pixels(pictures[::-1]), FRAMES))
    tokens = 576 // told["image_embed_interleave"]
    moved = (other["encoder_hidden_states"] - found["encoder_hidden_states"])[0, tokens : tokens + 5]
    assert moved.abs().max() > 1e-4, "the prompt's states must depend on the picture"


@pytest.mark.parametrize("kind", KINDS)
def test_clips_have_the_frames_that_are_asked_for(kind: str, folders: dict[str, Path]) -> None:
    adapter: Any = base.load(Model(path=folders[kind]))
    told = {"height": SIDE, "width": SIDE, "num_inference_steps": 1, "guidance_scale": 1.0}
    drawn = adapter.draw(PROMPTS[:1], generators()[:1], images=_pictures(1), num_frames=FRAMES, **told)
    assert drawn.shape == (1, FRAMES, SIDE, SIDE, 3)
    adapter.frames = 5
    assert adapter.draw(PROMPTS[:1], generators()[:1], images=_pictures(1), **told).shape[1] == 5


def _task(folder: Path, model: Path, **changes: Any) -> Any:
    folder.mkdir(exist_ok=True)
    table = clip_preferences(folder, pairs=2)
    told = {"loss": {"kind": "flow_dpo", "beta": 50.0}, "data__frames": FRAMES, **changes}
    return config(folder / "run", model, table, **told)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_prompt_and_first_frame_is_read_once(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """With a cache the vision-language model has no work in the second epoch; what it made is what it would make."""
    task = PreferenceTask(_task(tmp_path, folders[kind]), torch.device("cpu"))
    with recorded(task.adapter.pipe.text_encoder.model.language_model) as calls:
        first, second = (task._inputs(task.load([(0, epoch), (1, epoch)]))[2] for epoch in (0, 1))
    assert len(calls) == 4, "two pairs of clips"
    fresh = PreferenceTask(_task(tmp_path, folders[kind], data__cache="off"), torch.device("cpu"))
    expected = fresh._inputs(fresh.load([(0, 0), (1, 0)]))[2]
    assert first.keys() == expected.keys() >= {"encoder_hidden_states", "image_latents"}
    for name, value in expected.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=1e-5)
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-5)
    states = first["encoder_hidden_states"]
    assert (states[0] - states[1]).abs().max() > 1e-4, "one prompt, the first frames of two clips"


def test_both_kinds_may_share_a_cache(folders: dict[str, Path], tmp_path: Path) -> None:
    """The published ones have the same autoencoder and encoders, and are told other things of the same clips."""
    alike = {"vae": str(folders["token_replace"] / "vae")}
    told = {"data__cache_dir": str(tmp_path / "cache"), "model__components": alike}
    found = []
    for kind, cache in (("token_replace", "disk"), ("latent_concat", "disk"), ("latent_concat", "off")):
        task = PreferenceTask(_task(tmp_path, folders[kind], data__cache=cache, **told), torch.device("cpu"))
        batch = task.load([(0, 0)])
        found.append((task._inputs(batch)[2], batch["fetched"][0].moments))
    (_, kept), (second, drawn), (expected, plain) = found
    for name, value in expected.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn, plain, rtol=0, atol=1e-5)
    assert not kept[1, :, 0].any() and drawn[1, :, 0].all(), "a frame that is kept has no deviation"


@pytest.mark.parametrize("kind", KINDS)
def test_memory_counts_the_model_that_sees(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    found = memory.estimate(_task(tmp_path, folders[kind]))
    loaded: Any = base.load(Model(path=folders[kind]))
    sizes = {part.name: part.parameters for part in found.parts}
    assert sizes["text_encoder"] == sum(p.numel() for p in loaded.pipe.text_encoder.parameters())
    joined = loaded.join(loaded.encode_prompt([""]) | loaded.blank(1))
    assert found.text.kept >= joined["encoder_hidden_states"].nbytes and found.text.flops > 0


def test_faults_of_a_folder_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    whole = folders["token_replace"]
    check_faults_are_named(whole, ("transformer", "vae", "text_encoder_2"), tmp_path)
    broken = shutil.copytree(whole, tmp_path / "llava")
    file = broken / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["vision_tower.pre_layrnorm.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"text_encoder \(Llava\w+\): 1 missing tensor: \S*vision_tower.pre_layrnorm.b"
    ):
        check_folder(broken)


def test_what_does_not_fit_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    adapter: Any = base.load(Model(path=folders["token_replace"]))
    with pytest.raises(ValueError, match=r"hunyuan_video_i2v is told the first frame: join what encode_images"):
        adapter.predict(start(adapter), torch.tensor([0.5, 0.9]), {})
    with pytest.raises(ValueError, match=r"goes on from a picture; give the table of prompts a column `image`"):
        adapter.draw(["a"], generators()[:1], guidance_scale=1.0)
    with pytest.raises(ValueError, match=r"optim\.train_text_encoder: .* sees pictures"):
        adapter.encode_prompt(["a"], grad=True)

    other = _changed(folders["token_replace"], tmp_path / "a", "model_index.json", _class_name="HunyuanVideoPipeline")
    with pytest.raises(ValueError, match=r"is told a first frame \(token_replace\), .*HunyuanVideoPipeline is for the"):
        base.load(Model(path=other))
    blind = _changed(folders["token_replace"], tmp_path / "b", "text_encoder/config.json", pad_token_id=None)
    with pytest.raises(ValueError, match=r'text_encoder/config\.json; add "pad_token_id": \d+'):
        base.load(Model(path=blind))
    moved = _changed(folders["token_replace"], tmp_path / "c", "text_encoder/config.json", image_token_index=7)
    with pytest.raises(ValueError, match=r"does not put <image> where the pipeline counts on it"):
        base.load(Model(path=moved))


def _changed(folder: Path, to: Path, name: str, **entries: Any) -> Path:
    shutil.copytree(folder, to)
    (to / name).write_text(json.dumps({**json.loads((to / name).read_text()), **entries}))
    return to
