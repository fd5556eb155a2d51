"""The video families against the pipelines they wrap: real classes, tiny weights, a user's folder layout."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from family_kit import recorded
from torch import Tensor
from video_kit import (
    FAMILIES,
    FRAMES,
    MAKERS,
    PROMPTS,
    SIDE,
    close,
    compare_first_calls,
    deterministic,
    draw,
    folders_of,
    pixels,
    start,
    times,
)

from mmalign.guidance.denoising import begin
from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.models.video import VideoAdapter

SIDES = ("height", "width")


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders_of(tuple(MAKERS), tmp_path_factory)


@pytest.fixture(scope="module", name="adapter", params=MAKERS)
def _adapter(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    return base.load(Model(path=folders[request.param]))


# ------------------------------------------------------------------------------------------ against the pipeline


def test_the_denoiser_is_fed_what_the_pipelines_sampler_feeds_it(adapter: VideoAdapter) -> None:
    compare_first_calls(adapter)


@pytest.mark.parametrize("name", ["wan", "cogvideox-5b", "hunyuan_video", "ltx-0.9.0"])
def test_a_long_prompt_is_cut_as_the_pipeline_cuts_it(name: str, folders: dict[str, Path]) -> None:
    short = base.load(Model(path=folders[name], max_sequence_length=8))
    assert short.call_arguments(1.0, None)["max_sequence_length"] == 8
    compare_first_calls(short)


def test_sampling_through_the_adapter_is_sampling_through_the_pipeline(adapter: VideoAdapter) -> None:
    """Encoding, prediction, steps and decoding at once: the clips are equal."""
    with deterministic(adapter):
        expected = draw(adapter)
        schedule = [*times(adapter).tolist(), adapter.process.clean]
        latents, condition = start(adapter), adapter.encode_prompt(PROMPTS)
        with torch.no_grad():
            for now, after in itertools.pairwise(schedule):
                t = torch.full((2,), now)
                prediction = adapter.predict(latents, t, condition)
                latents, _ = adapter.process.step(latents, prediction, t, torch.full((2,), after))
            ours = (adapter.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert ours.shape == (2, 3, FRAMES, SIDE, SIDE)
    torch.testing.assert_close(ours.permute(0, 2, 3, 4, 1), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guided_sampling_without_a_reward_is_the_pipelines(adapter: VideoAdapter, scale: float) -> None:
    """What strategies steer: noise by seed, timesteps, classifier-free guidance, steps, pixels."""
    sampling = SimpleNamespace(
        steps=4, guidance_scale=scale, negative_prompt="", height=SIDE, width=SIDE, frames=FRAMES, batch_size=2
    )
    with deterministic(adapter):
        expected = draw(adapter, guidance=scale)
        denoising = begin(adapter, PROMPTS, [0, 1], sampling)
        noise = denoising.initial()
        assert torch.equal(noise, start(adapter))
        found = denoising.pixels(denoising.plain(noise))
    torch.testing.assert_close(found.permute(0, 2, 3, 4, 1), expected, rtol=0, atol=2e-5)


def test_a_frame_sees_the_others(adapter: VideoAdapter) -> None:
    """What the first latent frame is predicted to be depends on the last one: these are no pictures side by side."""
    noisy, t = start(adapter), times(adapter)[:1].expand(2) if adapter.process.kind == "flow" else torch.tensor([9, 9])
    t = torch.tensor([0.5, 0.5]) if adapter.process.kind == "flow" else t
    other = noisy.clone()
    other[:, :, -1] += 1
    condition = adapter.encode_prompt(PROMPTS)
    with torch.no_grad():
        one, two = (adapter.predict(value, t, condition)[:, :, 0] for value in (noisy, other))
    assert (one - two).abs().max() > 1e-5


def test_guidance_uses_the_empty_prompt_as_training_does(adapter: VideoAdapter) -> None:
    """Caption dropout trains the condition of ""; the guided pipeline must be fed the same one."""
    with recorded(adapter.denoiser) as calls:
        draw(adapter, guidance=4.0, steps=2)
    together = len(calls[0]["hidden_states"]) == 4
    assert together == adapter.guides_in_one_call
    if not together and len(calls) == 2:
        assert adapter.guidance is not None, (
            "one call for each step: guidance is a number, and there is no empty prompt"
        )
        return
    with recorded(adapter.denoiser) as ours, torch.no_grad():
        adapter.predict(start(adapter), times(adapter)[:1].expand(2), adapter.encode_prompt(["", ""]))
    unguided = calls[0 if together else 1]  # one batch of both, or the conditional call first
    for name in unguided.keys() & ours[0].keys() - {"output", "timestep", "guidance"}:
        value = unguided[name]
        if isinstance(value, Tensor):
            close(ours[0][name], value[: len(ours[0][name])] if together else value, name)


def test_a_negative_prompt_is_encoded_as_a_prompt(adapter: VideoAdapter) -> None:
    with recorded(adapter.denoiser) as calls:
        adapter.draw(
            PROMPTS, [torch.Generator().manual_seed(i) for i in range(2)], guidance_scale=4.0, num_inference_steps=2,
            negative_prompts=["blue square", "red"], height=SIDE, width=SIDE, num_frames=FRAMES,
        )  # fmt: skip
    assert len(calls) == 4 or len(calls[0]["hidden_states"]) == 4, "two predictions for each step"


def test_what_a_row_means_does_not_depend_on_its_neighbours(adapter: VideoAdapter) -> None:
    prompts = ["", *PROMPTS]
    both, t = adapter.encode_prompt(prompts), torch.tensor([0.25, 0.5, 0.75])
    t = t if adapter.process.kind == "flow" else (t * 1000).long()
    noisy = torch.randn(3, *adapter.latent_shape(SIDE, SIDE, FRAMES), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        together = adapter.predict(noisy, t, both)
        clips = adapter.decode(noisy)
        for i, prompt in enumerate(prompts):
            alone = adapter.encode_prompt([prompt])
            for name, value in alone.items():
                torch.testing.assert_close(value[0], both[name][i], rtol=0, atol=1e-5)
            found = adapter.predict(noisy[i : i + 1], t[i : i + 1], alone)
            torch.testing.assert_close(found[0], together[i], rtol=0, atol=1e-5)
            torch.testing.assert_close(adapter.decode(noisy[i : i + 1])[0], clips[i], rtol=1e-5, atol=1e-5)


def test_times_are_shifted_as_the_pipeline_shifts_them(adapter: VideoAdapter) -> None:
    """The pipeline's schedule is the shifted even one, from the sigmas that it hands over or its scheduler's own."""
    if adapter.process.kind != "flow":
        assert adapter.shift(adapter.latent_shape(SIDE, SIDE, FRAMES)) == 1.0
        return
    with deterministic(adapter):
        draw(adapter, steps=4)
        scheduler = adapter.pipe.scheduler
        shift = adapter.shift(adapter.latent_shape(SIDE, SIDE, FRAMES))
        even = {
            "wan": torch.linspace(scheduler.sigma_max, scheduler.sigma_min, 4),
            "hunyuan_video": torch.linspace(1, 0.25, 4),
            "ltx": torch.linspace(1, 0.25, 4),
        }[adapter.family]
        ours = shift * even / (1 + (shift - 1) * even)
        if scheduler.config.shift_terminal:  # the last time is moved there, and the others with it
            ours = 1 - (1 - ours) * (1 - scheduler.config.shift_terminal) / (1 - ours[-1])
        torch.testing.assert_close(ours, scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- clips


def _counts(adapter: VideoAdapter) -> list[int]:
    return [n for n in range(1, 14) if adapter._fits(n)] if adapter.family != "animatediff" else [1, 2, 9]


def test_clips_of_every_length_that_fits_come_back_as_long(adapter: VideoAdapter) -> None:
    for frames in _counts(adapter):
        clips = pixels(2, frames)
        moments = adapter.encode_media(clips)
        assert moments.shape == (2, 2, *adapter.latent_shape(SIDE, SIDE, frames))
        alone = torch.cat([adapter.encode_media(clip[None]) for clip in clips])
        torch.testing.assert_close(moments, alone, rtol=0, atol=1e-5)
        with torch.no_grad():
            assert adapter.decode(moments[:, 0]).shape == clips.shape
        adapter.check_frames(frames, "data.frames")


FITTING = {
    "wan": (8, "9"), "cogvideox-2b": (13, "9 or 17"), "cogvideox-5b": (48, "41 or 49"), "cogvideox-1.5": (5, "1 or 9"),
    "hunyuan_video": (62, "61 or 65"), "ltx-0.9.0": (16, "13 or 17"), "animatediff": (17, "16 or fewer"),
}  # fmt: skip


@pytest.mark.parametrize("name", FITTING)
def test_a_wrong_number_of_frames_is_refused_with_the_right_ones(name: str, folders: dict[str, Path]) -> None:
    frames, right = FITTING[name]
    with pytest.raises(ValueError, match=rf"data\.frames: {frames} frames do not fit .*; use .*{right}"):
        base.load(Model(path=folders[name])).check_frames(frames, "data.frames")


def test_latents_are_the_autoencoders_scaled(adapter: VideoAdapter) -> None:
    """Mean and deviation of the posterior, in the units in which the pipeline decodes; from the autoencoder itself."""
    clips, vae = pixels(), adapter.vae
    with torch.no_grad():
        if adapter.family == "animatediff":
            found = [vae.encode(clips[:, :, i]).latent_dist for i in range(FRAMES)]
            mean, std = (torch.stack([getattr(p, n) for p in found], dim=2) for n in ("mean", "std"))
        else:
            posterior = vae.encode(clips).latent_dist
            mean, std = posterior.mean, posterior.std
    mean, std = mean.double(), std.double()
    config = vae.config
    if adapter.family in ("wan", "ltx"):
        centre, spread = (
            torch.as_tensor(value, dtype=torch.float64)[:, None, None, None]
            for value in (
                (config.latents_mean, config.latents_std)
                if adapter.family == "wan"
                else (vae.latents_mean, vae.latents_std)
            )
        )
        mean, std = (mean - centre) / spread, std / spread
    else:
        mean, std = mean * config.scaling_factor, std * config.scaling_factor
    if adapter.patch_frames == 2:
        mean, std = (torch.cat([value[:, :, :1], value], dim=2) for value in (mean, std))
    ours = adapter.encode_media(clips)
    torch.testing.assert_close(ours[:, 0].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[:, 1].double(), std, rtol=1e-5, atol=1e-5)
    again = adapter.unscaled(adapter.scaled(mean, std)[0])
    torch.testing.assert_close(again, mean, rtol=1e-6, atol=1e-6)


def test_sliced_clips_are_the_same(adapter: VideoAdapter) -> None:
    clips, noisy = pixels(), start(adapter)
    with torch.no_grad():
        whole = adapter.encode_media(clips), adapter.decode(noisy)
        adapter.vae.enable_slicing()
        try:
            sliced = adapter.encode_media(clips), adapter.decode(noisy)
        finally:
            adapter.vae.disable_slicing()
    for one, other in zip(whole, sliced, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_tiled_clips_are_as_large(name: str, folders: dict[str, Path]) -> None:
    adapter: Any = base.load(Model(path=folders[name]))
    noisy = torch.randn(1, *adapter.latent_shape(64, 64, FRAMES), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = adapter.decode(noisy)
        if name == "animatediff":
            adapter.vae.enable_tiling()
            adapter.vae.tile_sample_min_size, adapter.vae.tile_latent_min_size = 32, 8
        elif name == "cogvideox-2b":
            adapter.vae.enable_tiling(32, 32, 0.25, 0.25)
        else:
            sides = {
                f"tile_sample_{kind}_{side}": size for kind, size in (("min", 32), ("stride", 24)) for side in SIDES
            }
            adapter.vae.enable_tiling(**sides)
        tiled = adapter.decode(noisy)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole), "tiles see less of each other"


def test_decoding_is_differentiable(adapter: VideoAdapter) -> None:
    latents = start(adapter).requires_grad_(True)
    adapter.decode(latents).square().mean().backward()
    own = latents.grad[:, :, 1:] if adapter.patch_frames == 2 else latents.grad  # the copy of CogVideoX 1.5 is not seen
    assert own.isfinite().all() and (own.abs().amax(dim=(1, 3, 4)) > 0).all(), "every latent frame is seen"
