"""Families whose clips go on from a picture, against their pipelines; training and sampling with first frames."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from family_kit import recorded
from PIL import Image
from torch import Tensor
from training_kit import records, settings
from video_kit import FRAMES, PROMPTS, SIDE, clip_preferences, close, deterministic, generators, start, times
from wan_kit import tiny_a14b, tiny_ti2v

from mmalign import sample, train
from mmalign.jobs import SampleConfig, TrainConfig
from mmalign.jobs_inputs import Model
from mmalign.media import clip_frames, write_image
from mmalign.media_table import read_media_table
from mmalign.models import base
from mmalign.provenance import read_provenance
from mmalign.testing import tiny_video as tiny
from mmalign.weights import files_hash

MAKERS = {
    "wan": partial(tiny.tiny_wan, image=True),
    "cogvideox-5b": partial(tiny.tiny_cogvideox, kind="5b", image=True),
    "cogvideox-1.5": partial(tiny.tiny_cogvideox, kind="1.5", image=True),
    "ltx-0.9.0": partial(tiny.tiny_ltx, image=True),
    "ltx-0.9.1": partial(tiny.tiny_ltx, image=True, told_time=True),
    "wan-2.2-a14b": partial(tiny_a14b, image=True),
    "wan-2.2-ti2v": partial(tiny_ti2v, image=True),
    "hunyuan-concat": partial(tiny.tiny_hunyuan_video, image="latent_concat", embedded=False),
    "hunyuan-replace": partial(tiny.tiny_hunyuan_video, image="token_replace"),
}


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("videos")
    return {name: make(home / name) for name, make in MAKERS.items()}


@pytest.fixture(scope="module", name="adapter", params=MAKERS)
def _adapter(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    return base.load(Model(path=folders[request.param]))


@pytest.fixture(name="_at_the_mean", autouse=True)
def _mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipelines of CogVideoX and LTX-Video draw a first frame's latents from its posterior; here, at its mean."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


def _pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in PROMPTS]


def _pixels() -> Tensor:
    rows = [torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1 for picture in _pictures()]
    return torch.stack(rows)


def _frames(adapter: Any) -> int:
    """Frames of what is denoised, where FRAMES are kept: the first ones of a picture among the channels of
    HunyuanVideo-I2V are dropped.
    """
    return FRAMES + (4 if adapter.denoiser.config.get("image_condition_type") == "latent_concat" else 0)


def _condition(adapter: Any) -> dict[str, Tensor]:
    return adapter.join(adapter.encode_prompt(PROMPTS) | adapter.encode_images(_pixels(), _frames(adapter)))


def _start(adapter: Any) -> Tensor:
    """What the pipeline begins with: noise, in HunyuanVideo's with a thousandth of the picture in each frame."""
    noise = start(adapter, _frames(adapter))
    return noise if adapter.family != "hunyuan_video_i2v" else 0.999 * noise + 0.001 * adapter.first_latents(_pixels())


def _draw(adapter: Any, guidance: float = 1.0, steps: int = 4) -> Tensor:
    drawn = adapter.draw(
        PROMPTS, generators(), images=_pictures(), guidance_scale=guidance, num_inference_steps=steps, height=SIDE,
        width=SIDE, num_frames=FRAMES,
    )  # fmt: skip
    return torch.from_numpy(drawn)


def test_the_denoiser_is_fed_what_the_pipelines_sampler_feeds_it(adapter: Any) -> None:
    with recorded(adapter.denoiser) as theirs:
        _draw(adapter)
    steps = len(theirs) // 2  # of the first clip, then of the second
    with recorded(adapter.denoiser) as ours, torch.no_grad():
        adapter.predict(_start(adapter), times(adapter)[:1].expand(2), _condition(adapter))
    told = {name: value for name, value in theirs[0].items() if value is not None and name != "return_dict"}
    for name, value in told.items():
        assert name in ours[0], f"the pipeline passes {name}, the adapter does not"
        both = isinstance(value, Tensor) and len(value) == 1 and name != "ofs" and ours[0][name].ndim == value.ndim
        rows = torch.cat([value, theirs[steps][name]]) if both else value
        close(ours[0][name], rows, name)
    for name, value in ours[0].items():
        assert value is None or name in told, f"only the adapter passes {name}"


def test_sampling_through_the_adapter_is_sampling_through_the_pipeline(adapter: Any) -> None:
    with deterministic(adapter):
        expected = _draw(adapter)
        schedule = [*times(adapter).tolist(), adapter.process.clean]
        latents, condition = _start(adapter), _condition(adapter)
        with torch.no_grad():
            for now, after in itertools.pairwise(schedule):
                t = torch.full((2,), now)
                prediction = adapter.predict(latents, t, condition)
                latents, _ = adapter.process.step(latents, prediction, t, torch.full((2,), after))
            ours = (adapter.decode(latents)[:, :, -FRAMES:] / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(ours.permute(0, 2, 3, 4, 1), expected, rtol=0, atol=2e-5)


def test_a_row_depends_on_its_own_picture_alone(adapter: Any) -> None:
    noisy, condition = _start(adapter), _condition(adapter)
    t = torch.tensor([0.25, 0.75]) if adapter.process.kind == "flow" else torch.tensor([250, 750])
    with torch.no_grad():
        both = adapter.predict(noisy, t, condition)
        alone = adapter.predict(noisy[:1], t[:1], {name: value[:1] for name, value in condition.items()})
        turned = adapter.predict(noisy, t, {**condition, "image_latents": condition["image_latents"].flip(0)})
    torch.testing.assert_close(alone[0], both[0], rtol=0, atol=1e-5)
    assert (turned - both)[:, :, 1:].abs().max() > 1e-4, "the picture must do something to the other frames"
    found = adapter.encode_images(_pixels()[1:], FRAMES)
    for name, value in adapter.encode_images(_pixels(), FRAMES).items():
        torch.testing.assert_close(found[name][0], value[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ltx-0.9.0", "wan-2.2-ti2v", "hunyuan-replace"])
def test_a_first_frame_that_is_kept_adds_nothing_to_a_loss(name: str, folders: dict[str, Path]) -> None:
    """Its velocity is known, and its latents are what the denoiser is told: so the target is predicted there."""
    loaded: Any = base.load(Model(path=folders[name]))
    condition, noise, t = _condition(loaded), start(loaded), torch.tensor([0.3, 0.9])
    rest = torch.rand(2, 3, FRAMES - 1, SIDE, SIDE, generator=torch.Generator().manual_seed(5)) * 2 - 1
    moments = loaded.encode_media(torch.cat([_pixels()[:, :, None], rest], dim=2))
    latents = base.sample_latents(moments, torch.randn(noise.shape, generator=torch.Generator().manual_seed(6)))
    torch.testing.assert_close(latents[:, :, :1], condition["image_latents"], rtol=0, atol=1e-5)
    plain = super(type(loaded).__mro__[1], loaded).encode_media(torch.cat([_pixels()[:, :, None], rest], dim=2))
    torch.testing.assert_close(moments[:, :, :, 1:], plain[:, :, :, 1:], rtol=0, atol=0)
    if loaded.family != "hunyuan_video_i2v":  # whose encoder's norms see all frames; that of others is causal
        torch.testing.assert_close(moments[:, 0], plain[:, 0], rtol=0, atol=1e-4)
    loaded.denoiser.requires_grad_(True)
    found = loaded.predict(loaded.process.noisy(latents, t, noise), t, condition)
    squares = (found - (noise.double() - latents.double())).square()
    assert squares[:, :, 0].max() < 1e-8 and squares[:, :, 1:].mean() > 0.1
    gradients = torch.autograd.grad(squares[:, :, 0].sum(), [*loaded.denoiser.parameters()], allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    "name", ["wan", "cogvideox-5b", "ltx-0.9.0", "wan-2.2-ti2v", "hunyuan-concat", "hunyuan-replace"]
)
def test_a_lora_is_trained_with_first_frames(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Cached and not, the loss is the same; the LoRA loads in plain diffusers and draws the same clips."""
    table, runs = clip_preferences(tmp_path, pairs=2), []
    for cache in ("disk", "off", "disk"):
        told = settings(
            tmp_path / f"run{len(runs)}", folders[name], table, data__frames=FRAMES, data__cache=cache,
            data__cache_dir=str(tmp_path / "cache"), optim__steps=2, optim__lr=1e-2, reference__draws=1,
            loss__beta=100.0,
        )  # fmt: skip
        runs.append(train.run(TrainConfig.model_validate(told)))
    losses = [[record["loss"] for record in records(run)] for run in runs]
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0] == losses[2]
    ours: Any = base.load(Model(path=folders[name], lora=runs[0] / "export"))
    clips = _draw(ours, steps=2)
    assert (clips - _draw(base.load(Model(path=folders[name])), steps=2)).abs().max() > 1e-4
    told = {part: None for part in ours.may_lack}
    if ours.family == "hunyuan_video_i2v":  # transformers reads the folder's as of another kind
        told["tokenizer"] = ours.pipe.tokenizer
    pipe = getattr(diffusers, type(ours.pipe).__name__).from_pretrained(folders[name], **told)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(runs[0] / "export")
    told = {**ours.call_arguments(1.0, None, 1), "negative_prompt": None, "num_frames": _frames(ours)}
    theirs = [
        pipe(
            image=picture, prompt=prompt, num_inference_steps=2, generator=generator, height=SIDE, width=SIDE,
            output_type="np", **told,
        ).frames
        for picture, prompt, generator in zip(_pictures(), PROMPTS, generators(), strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(torch.from_numpy(np.concatenate(theirs)), clips, rtol=0, atol=1e-5)
    assert "load_image" in (runs[0] / "export" / "README.md").read_text()


@pytest.mark.parametrize("name", ["wan-2.2-a14b", "wan-2.2-ti2v", "hunyuan-concat", "hunyuan-replace"])
def test_half_precision(name: str, folders: dict[str, Path]) -> None:
    """bfloat16 weights take what the adapter feeds."""
    whole: Any = base.load(Model(path=folders[name]))
    half: Any = base.load(Model(path=folders[name]), dtype=torch.bfloat16, vae_dtype=torch.float32)
    noisy, t = _start(whole), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        expected, found = (each.predict(noisy, t, _condition(each)) for each in (whole, half))
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


def _sample(model: Path, home: Path, **changes: Any) -> SampleConfig:
    for i, picture in enumerate(_pictures()):
        write_image(home / f"{i}.png", np.array(picture))
    rows = [json.dumps({"prompt": prompt, "image": f"{i}.png", "seed": i}) for i, prompt in enumerate(PROMPTS)]
    (home / "prompts.jsonl").write_text("\n".join(rows))
    tree = {"model": {"path": model}, "prompts": home / "prompts.jsonl", "output": home / "out", "steps": 2,
            "height": SIDE, "width": SIDE, "frames": FRAMES, "device": "cpu", "guidance_scale": 3.0, "lossless": True,
            **changes}  # fmt: skip
    return SampleConfig.model_validate(tree)


@pytest.mark.parametrize(
    "name", ["wan", "cogvideox-1.5", "ltx-0.9.1", "wan-2.2-a14b", "wan-2.2-ti2v", "hunyuan-concat"]
)
def test_clips_are_sampled_from_a_table_with_pictures(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    rows = list(read_media_table(sample.run(_sample(folders[name], tmp_path))))
    loaded: Any = base.load(Model(path=folders[name]))
    expected = (_draw(loaded, guidance=3.0, steps=2) * 255).round()
    for row, clip in zip(rows, expected, strict=True):
        found = clip_frames(row.media, fps=None, frames=FRAMES).astype(float)
        assert np.abs(found - clip.numpy()).max() <= 1
    told = [read_provenance(row.media)["image"]["hash"] for row in rows]  # type: ignore[index, arg-type]
    assert told == [files_hash([tmp_path / f"{i}.png"]) for i in range(2)]
    with pytest.raises(ValueError, match=r"made with other values of: images"):
        sample.run(_sample(folders[name], tmp_path).model_copy(update={"prompts": _moved(tmp_path)}))


def _moved(home: Path) -> Path:
    """The table with the first picture for both prompts."""
    rows = [json.dumps({"prompt": prompt, "image": "0.png", "seed": i}) for i, prompt in enumerate(PROMPTS)]
    (home / "other.jsonl").write_text("\n".join(rows))
    return home / "other.jsonl"


def test_what_is_missing_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    wanted = _sample(folders["wan"], tmp_path)
    (tmp_path / "plain.txt").write_text("\n".join(PROMPTS))
    with pytest.raises(ValueError, match=r"go on from a picture, and .*plain.txt has none .* column `image`"):
        sample.run(wanted.model_copy(update={"prompts": tmp_path / "plain.txt"}))
    (tmp_path / "0.png").unlink()
    with pytest.raises(ValueError, match=r"none for the prompt 'a red circle'"):
        sample.run(wanted)
    assert not (tmp_path / "out").exists()
    table = clip_preferences(tmp_path, pairs=1)
    told = settings(tmp_path / "run", folders["wan"], table, data__frames=FRAMES, validation__prompts=["a red circle"])
    with pytest.raises(ValueError, match=r"validation\.prompts: wan_i2v draws from pictures"):
        train.run(TrainConfig.model_validate(told))
