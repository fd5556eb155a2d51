"""Wan 2.2 from a picture: each of A14B's two transformers against the pipeline, trained and exported; refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from family_kit import recorded
from PIL import Image
from torch import Tensor
from training_kit import config
from video_kit import FRAMES, PROMPTS, SIDE, start
from wan_kit import clip_pairs, tiny_a14b, tiny_ti2v

from mmalign import memory, train
from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.tasks.preference import PreferenceTask
from mmalign.testing.tiny_video import tiny_wan

BOUNDARY = 0.875
BOTH = pytest.mark.parametrize(("expert", "name"), [("high", "transformer"), ("low", "transformer_2")])


@pytest.fixture(scope="module", name="a14b")
def _a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_a14b(tmp_path_factory.mktemp("a14b") / "model", BOUNDARY, image=True)


def _picture(seed: int = 3) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


def _condition(adapter: Any, *pictures: Image.Image) -> dict[str, Tensor]:
    pixels = torch.stack([torch.from_numpy(np.array(each)).permute(2, 0, 1) / 127.5 - 1 for each in pictures])
    return adapter.encode_prompt(PROMPTS[: len(pictures)]) | adapter.encode_images(pixels, FRAMES)


def _drawn(pipe: Any, steps: int = 6) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = pipe(
            image=_picture(), prompt=PROMPTS[0], generator=torch.Generator().manual_seed(0), num_inference_steps=steps,
            guidance_scale=1.0, height=SIDE, width=SIDE, num_frames=FRAMES, output_type="np",
        ).frames  # fmt: skip
    return found


def _settings(folder: Path, model: Path, **changes: Any) -> Any:
    told = {"loss": {"kind": "flow_dpo", "beta": 50.0}, "data__frames": FRAMES, **changes}
    table = folder / "pairs.jsonl"
    return config(folder / "run", model, table if table.exists() else clip_pairs(folder), **told)


def test_each_time_is_asked_of_the_transformer_that_the_pipeline_asks(a14b: Path) -> None:
    adapter: Any = base.load(Model(path=a14b))
    assert adapter.family == "wan_i2v" and adapter.pipe.image_encoder is None
    pipe, condition = adapter.pipeline(), _condition(adapter, _picture())
    with recorded(pipe.transformer) as high, recorded(pipe.transformer_2) as low:
        _drawn(pipe)
    assert len(high) + len(low) == 6 and high and low
    for part, calls in ((pipe.transformer, high), (pipe.transformer_2, low)):
        for call in calls:
            with recorded(part) as ours, torch.no_grad():
                found = adapter.predict(call["hidden_states"][:, :4], call["timestep"].float() / 1000, condition)
            assert len(ours) == 1
            torch.testing.assert_close(ours[0]["hidden_states"], call["hidden_states"], rtol=0, atol=1e-5)
            torch.testing.assert_close(found, call["output"], rtol=0, atol=1e-5)


def test_rows_of_both_parts_of_the_schedule_can_share_a_batch(a14b: Path) -> None:
    adapter: Any = base.load(Model(path=a14b))
    condition, t = _condition(adapter, _picture(3), _picture(4)), torch.tensor([0.9, 0.2])
    noisy = start(adapter).requires_grad_()
    together = adapter.predict(noisy, t, condition)
    for i, model in enumerate((adapter.pipe.transformer, adapter.pipe.transformer_2)):
        own = {name: value[i : i + 1] for name, value in condition.items()}
        alone = adapter.predict(noisy[i : i + 1], t[i : i + 1], own, model)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    gradient = torch.autograd.grad(together.square().sum(), noisy)[0]
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


@BOTH
def test_a_lora_of_one_part_is_trained_and_loads_in_plain_diffusers(
    expert: str, name: str, a14b: Path, tmp_path: Path
) -> None:
    wanted = _settings(tmp_path, a14b, model__expert=expert, optim__steps=2, optim__lr=0.05)
    assert [part.name for part in memory.estimate(wanted).parts] == [name, "vae", "text_encoder"]
    train.run(wanted)
    export = wanted.output / "export"
    assert ("load_into_transformer_2=True" in (export / "README.md").read_text()) == (expert == "low")

    plain = WanImageToVideoPipeline.from_pretrained(
        a14b, image_encoder=None, image_processor=None, local_files_only=True
    )
    plain.set_progress_bar_config(disable=True)
    before = _drawn(plain)
    plain.load_lora_weights(str(export), load_into_transformer_2=expert == "low")
    after = _drawn(plain)
    assert np.abs(after - before).max() > 1e-4
    ours: Any = base.load(Model(path=a14b, lora=export, expert=expert))  # type: ignore[arg-type]
    np.testing.assert_allclose(_drawn(ours.pipeline()), after, atol=1e-5)


@BOTH
def test_the_loss_of_one_part_is_told_the_clips_own_first_frames(
    expert: str, name: str, a14b: Path, tmp_path: Path
) -> None:
    task = PreferenceTask(_settings(tmp_path, a14b, model__expert=expert), torch.device("cpu"))
    assert task.adapter.denoiser is getattr(task.adapter.pipe, name)
    batch = task.load([(0, 0), (1, 0)])
    with recorded(task.adapter.denoiser) as calls:
        loss, _ = task.loss(batch)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in task.adapter.denoiser.parameters())
    first = torch.stack([item.first["image_latents"] for item in batch["fetched"]])
    given = calls[0]["hidden_states"][:, 4:]
    torch.testing.assert_close(given.detach(), first[: len(given)].to(given), rtol=0, atol=1e-6)
    low, high = (BOUNDARY, 1.0) if expert == "high" else (0.0, BOUNDARY)
    assert all(((low * 1000 <= c["timestep"]) & (c["timestep"] <= high * 1000)).all() for c in calls)


def test_a_folder_of_ti2v_from_text_is_made_into_one_from_pictures(tmp_path: Path) -> None:
    """As the page of video families has it; the published folder names WanPipeline."""
    text = tiny_ti2v(tmp_path / "text")
    pipe = WanImageToVideoPipeline.from_pretrained(text, image_encoder=None, image_processor=None)
    pipe.save_pretrained(tmp_path / "image")
    adapter: Any = base.load(Model(path=tmp_path / "image"))
    assert adapter.family == "wan_i2v" and adapter.keeps_first
    assert _condition(adapter, _picture())["image_latents"].shape == (1, 6, 1, 4, 4)


def test_what_does_not_fit_is_named(a14b: Path, tmp_path: Path) -> None:
    adapter: Any = base.load(Model(path=tiny_ti2v(tmp_path / "ti2v", image=True)))
    for each in (adapter, base.load(Model(path=a14b))):
        with pytest.raises(ValueError, match=r"wan_i2v is told the first frame: join what encode_images makes"):
            each.predict(start(each), torch.tensor([0.5, 0.95]), each.encode_prompt(PROMPTS))
    with pytest.raises(ValueError, match=r"set model\.expert: high"):
        PreferenceTask(_settings(tmp_path, a14b), torch.device("cpu"))

    plain = shutil.copytree(tiny_wan(tmp_path / "plain"), tmp_path / "text")
    _rename(plain, _class_name="WanImageToVideoPipeline")
    with pytest.raises(ValueError, match=r"takes 4 channels, and one that goes on from a picture takes 12 "):
        base.load(Model(path=plain))
    blind = tiny_wan(tmp_path / "blind", image=True)
    _rename(blind, image_encoder=[None, None])
    with pytest.raises(ValueError, match=r"vision tower .*model\.components: \{image_encoder: path"):
        base.load(Model(path=blind))
    told = {"image_encoder": blind / "image_encoder"}
    assert base.load(Model(path=blind, components=told)).pipe.image_encoder is not None


def _rename(folder: Path, **entries: Any) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))
