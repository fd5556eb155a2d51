"""What is particular to a video family: CogVideoX's schedule, HunyuanVideo's texts, LTX-Video's rate and decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from family_kit import recorded
from video_kit import FRAMES, MAKERS, PROMPTS, compare_first_calls, draw, folders_of, start

from mmalign.jobs_inputs import Model
from mmalign.models import base


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return folders_of(tuple(MAKERS), tmp_path_factory)


def test_abar_of_cogvideox_is_the_schedulers(folders: dict[str, Path]) -> None:
    """SNR shifted by the scale s, abar / (s + (1 - s) abar), then rescaled to end at 0 (2305.08891, algorithm 1)."""
    for name, scale in (("cogvideox-2b", 3.0), ("cogvideox-5b", 1.0)):
        process = base.load(Model(path=folders[name])).process
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
        abar = (1 - betas).cumprod(0)
        root = (abar / (scale + (1 - scale) * abar)).sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        assert process.kind == "v"
        torch.testing.assert_close(process.alphas_cumprod.double(), root.square(), rtol=1e-5, atol=1e-6)
        assert process.alphas_cumprod[-1] == 0


def test_the_text_of_a_small_cogvideox_has_one_length(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"model\.max_sequence_length: the positions of .* after 226 text tokens"):
        base.load(Model(path=folders["cogvideox-2b"], max_sequence_length=16))
    with pytest.raises(ValueError, match=r"reads at most 226 text tokens"):
        base.load(Model(path=folders["cogvideox-5b"], max_sequence_length=300))


def test_llamas_tokenizer_is_read_as_it_was_written(folders: dict[str, Path]) -> None:
    """transformers 5 makes Llama 2's of it where it is called a LlamaTokenizer, as the published folder calls it."""
    from tokenizers import Tokenizer
    from transformers import LlamaTokenizerFast

    place = folders["hunyuan_video"] / "tokenizer"
    adapter = base.load(Model(path=folders["hunyuan_video"]))
    written = Tokenizer.from_file(str(place / "tokenizer.json"))
    text = "describe a red circle\n\nthat moves"
    assert adapter.pipe.tokenizer(text).input_ids == written.encode(text).ids
    assert LlamaTokenizerFast.from_pretrained(place)(text).input_ids != written.encode(text).ids, "mended: drop our own"
    assert adapter.pipe.tokenizer.padding_side == "right"


def test_hunyuans_template_is_as_long_as_the_pipeline_counts(folders: dict[str, Path]) -> None:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as told

    tokenizer = base.load(Model(path=folders["hunyuan_video"])).pipe.tokenizer
    assert len(tokenizer(told["template"].partition("{}")[0]).input_ids) == told["crop_start"] == 95


def test_hunyuan_is_told_its_guidance(folders: dict[str, Path]) -> None:
    loaded: Any = base.load(Model(path=folders["hunyuan_video"], guidance=6.0))
    with recorded(loaded.denoiser) as calls, torch.no_grad():
        loaded.predict(start(loaded), torch.tensor([0.5, 0.25]), loaded.encode_prompt(PROMPTS))
        draw(loaded, 6.0, steps=1)
    assert [call["guidance"].tolist() for call in calls] == [[6000.0, 6000.0]] * 2
    guided = loaded.call_arguments(2.0, ["", ""], 2)
    assert (guided["guidance_scale"], guided["true_cfg_scale"]) == (6.0, 2.0)
    assert base.load(Model(path=folders["hunyuan_video"])).guidance == 1.0
    with pytest.raises(ValueError, match=r"model\.guidance: the transformer of .* takes none; drop the key"):
        base.load(Model(path=folders["hunyuan_video-plain"], guidance=3.5))


def test_ltx_is_told_the_rate_of_its_clips(folders: dict[str, Path]) -> None:
    loaded: Any = base.load(Model(path=folders["ltx-0.9.0"]))
    condition, t = loaded.encode_prompt(PROMPTS), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        usual = loaded.predict(start(loaded), t, condition)
        loaded.fps = 8.0
        slow = loaded.predict(start(loaded), t, condition)
    assert (usual - slow).abs().max() > 1e-4
    assert loaded.call_arguments(1.0, None)["frame_rate"] == 8.0
    compare_first_calls(loaded)


def test_ltxs_decoder_is_told_a_time(folders: dict[str, Path]) -> None:
    """Decoding mixes a fixed noise in and denoises it: the same for each row, and again, whatever was drawn before."""
    loaded: Any = base.load(Model(path=folders["ltx-0.9.1"]))
    told = loaded.call_arguments(1.0, None)
    assert (told["decode_timestep"], told["decode_noise_scale"]) == (0.05, 0.025)
    assert "decode_timestep" not in base.load(Model(path=folders["ltx-0.9.0"])).call_arguments(1.0, None)
    latents = start(loaded)
    with torch.no_grad():
        first = loaded.decode(latents)
        state = torch.random.get_rng_state()
        assert torch.equal(loaded.decode(latents), first)
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left as it was"
        same = loaded.decode(latents[:1].expand(2, -1, -1, -1, -1))
        assert torch.equal(same[0], same[1])
        loaded.decode_noise = 0.0
        raw = loaded.unscaled(latents)
        torch.manual_seed(0)
        expected = loaded.vae.decode(raw, torch.tensor([0.05, 0.05])).sample
        torch.testing.assert_close(loaded.decode(latents), expected, rtol=0, atol=1e-6)
    assert (first - expected).abs().max() > 1e-4


def test_clips_of_ltx_depend_on_their_seed_alone(folders: dict[str, Path]) -> None:
    """The decoder of 0.9.1 adds noise from the global generator to its layers; drawn twice, clips are the same."""
    loaded: Any = base.load(Model(path=folders["ltx-0.9.1"]))
    first = draw(loaded)
    torch.randn(7)
    assert torch.equal(draw(loaded), first)


def test_other_checkpoints_of_a_family_are_refused_by_name(folders: dict[str, Path]) -> None:
    for name, entry, match in (
        ("hunyuan_video", {"image_condition_type": "token_replace"}, "is told a first frame"),
        ("ltx-0.9.0", {"patch_size": 2}, "patches are larger than 1"),
        ("cogvideox-5b", {"in_channels": 8}, "takes 8 channels, and CogVideoXPipeline feeds it 4"),
    ):
        loaded = base.load(Model(path=folders[name]))
        loaded.denoiser.register_to_config(**entry)
        with pytest.raises(ValueError, match=match):
            type(loaded)(loaded.pipe, loaded.config)


@pytest.mark.parametrize("name", ["cogvideox-2b"])
def test_cogvideox_is_sampled_with_its_own_noise_levels(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    from mmalign import sample
    from mmalign.jobs import SampleConfig

    def loaded(scheduler: str) -> Any:
        tree = {"model": {"path": folders[name]}, "prompts": "p.txt", "output": tmp_path, "scheduler": scheduler}
        return sample.load(SampleConfig.model_validate({**tree, "frames": FRAMES, "fps": 4}), torch.device("cpu"))

    own = base.load(Model(path=folders[name])).process.alphas_cumprod
    for scheduler, kind in (("ddim", diffusers.CogVideoXDDIMScheduler), ("dpm++sde", diffusers.CogVideoXDPMScheduler)):
        adapter = loaded(scheduler)
        assert isinstance(adapter.pipe.scheduler, kind) and adapter.fps == 4
        assert torch.equal(adapter.pipe.scheduler.alphas_cumprod.float(), own)
    with pytest.raises(ValueError, match=r"scheduler: euler: .* use own or ddim or dpm\+\+sde"):
        loaded("euler")
