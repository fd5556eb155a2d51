"""Clips on their way into training: cut alike frame by frame, resampled, bucketed by length; and drawn by `sample`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_kit import PROMPTS, config, records, settings

from mmalign import sample, train
from mmalign.jobs import SampleConfig, TrainConfig
from mmalign.jobs_inputs import Data, Model
from mmalign.media import read_video, write_video
from mmalign.media_table import read_media_table
from mmalign.models import base
from mmalign.records import MediaRef
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.tasks import buckets
from mmalign.tasks.inputs import Inputs, View, cut, cut_clip
from mmalign.tasks.preference import PreferenceTask
from mmalign.tasks.sft import SFTTask
from mmalign.testing import tiny, tiny_video

CPU = torch.device("cpu")
CLIPS = {"data__frames": 5, "data__fps": 8.0}


@pytest.fixture(scope="module", name="wan")
def _wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_video.tiny_wan(tmp_path_factory.mktemp("wan") / "model")


def clip(place: Path, frames: int, fps: float = 8.0, side: tuple[int, int] = (32, 32), seed: int = 0) -> MediaRef:
    """A file in which every frame has one colour of its own, lossless."""
    rng = np.random.default_rng(seed)
    colours = torch.from_numpy(rng.integers(0, 256, (frames, 3, 1, 1), dtype=np.uint8)).expand(-1, -1, *side)
    write_video(place, colours.contiguous(), fps, lossless=True)
    return MediaRef(str(place))


def pairs(folder: Path, lengths: list[tuple[int, int]], **told: Any) -> Path:
    """A table of decided pairs of clips with these numbers of frames."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        PreferenceRow(
            PROMPTS[i % len(PROMPTS)],
            (clip(folder / f"{i}-w.mp4", long, seed=2 * i, **told), clip(folder / f"{i}-l.mp4", short, seed=2 * i + 1)),
            label={"overall": "A"},
        )
        for i, (long, short) in enumerate(lengths)
    ]
    write_preferences(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


# ------------------------------------------------------------------------------------------------------- tensors


def test_a_clip_is_cut_as_each_of_its_frames_would_be() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 64, 3), dtype=np.uint8)
    view = View(True, 0.2, 0.9)
    pixels, sizes = cut_clip(frames, (16, 24), view)
    assert pixels.shape == (3, 3, 16, 24)
    for k, frame in enumerate(frames):
        alone, told = cut(frame, (16, 24), view)
        assert torch.equal(pixels[:, k], alone) and torch.equal(sizes, told)


def test_pictures_are_cut_as_before_there_were_clips() -> None:
    """The draw of a picture's view, and all that its generator gives afterwards, must not move."""
    generator = torch.Generator().manual_seed(3)
    view = View.draw(Data(crop="random", flip=0.5), generator)
    after = torch.rand((), generator=generator)
    numbers = torch.rand(4, generator=torch.Generator().manual_seed(3))
    assert view == View(bool(numbers[0] < 0.5), numbers[1].item(), numbers[2].item()) and after == numbers[3]


def test_random_crops_of_clips_begin_anywhere_and_centre_ones_at_the_start() -> None:
    def draw(crop: str) -> list[float]:
        data = Data.model_validate({"crop": crop, "frames": 9})
        return [View.draw(data, torch.Generator().manual_seed(i)).after for i in range(20)]

    assert set(draw("center")) == {0.0}
    assert min(draw("random")) < 0.2 and max(draw("random")) > 0.8


def test_the_cache_tells_rates_lengths_and_beginnings_apart(wan: Path, tmp_path: Path) -> None:
    medium = clip(tmp_path / "a.mp4", 17)
    adapter = base.load(TrainConfig.model_validate(settings(tmp_path, wan, tmp_path)).model)
    keys = set()
    for fps in (8.0, 4.0, None):
        data = Data(frames=5, fps=fps, resolution=32, cache_dir=tmp_path / "cache")
        inputs = Inputs(adapter, config(tmp_path, wan, tmp_path).model, data)
        for size in ((32, 32, 5), (32, 32, 9)):
            for after in (0.0, 0.5):
                if fps == 4.0 and size[2] == 9 and after:
                    continue
                keys.add(inputs.fetch(medium, View(after=after), size).key)
    assert len(keys) == 11


# ------------------------------------------------------------------------------------------------------- buckets


def test_a_group_gets_the_longest_length_that_all_of_its_clips_fill(wan: Path, tmp_path: Path) -> None:
    table = pairs(tmp_path / "t", [(17, 13), (9, 9), (17, 5), (20, 18)])
    task = PreferenceTask(
        config(tmp_path / "run", wan, table, data__frames=17, data__fps=8.0, data__frame_buckets=[5, 9]), CPU
    )
    assert [task.targets.size(i) for i in range(4)] == [(32, 32, 9), (32, 32, 9), (32, 32, 5), (32, 32, 17)]
    assert task.targets.largest == (32, 32, 17)
    found = task.facts["buckets"]
    assert {name: each["items"] for name, each in found.items()} == {"32x32x5": 1, "32x32x9": 2, "32x32x17": 1}
    assert found["32x32x9"]["latent_elements"] == 4 * 3 * 8 * 8  # channels, latent frames, height, width
    assert found["32x32x9"]["beta_per_element"] == pytest.approx(500 / (4 * 3 * 8 * 8))


def test_beta_keeps_its_strength_per_element_over_lengths(wan: Path, tmp_path: Path) -> None:
    """Scaled to each batch's latents it is what the beta of that length alone would be."""
    table = pairs(tmp_path / "t", [(9, 9), (5, 5)])
    small, large = 4 * 2 * 8 * 8, 4 * 3 * 8 * 8
    told = {"data__frames": 9, "data__frame_buckets": [5], "loss__kind": "flow_dpo", "optim__batch_size": 1}
    scaled = PreferenceTask(
        config(tmp_path / "a", wan, table, **told, loss__beta=300.0, loss__beta_elements=small), CPU
    )
    found = {name: each for name, each in scaled.facts["buckets"].items()}
    assert found["32x32x5"]["beta_per_element"] == found["32x32x9"]["beta_per_element"] == 300 / small
    assert found["32x32x9"]["beta_per_sample"] == pytest.approx(300 * large / small)
    for item, beta in ((0, 300 * large / small), (1, 300.0)):
        fixed = PreferenceTask(config(tmp_path / "b", wan, table, **told, loss__beta=beta), CPU)
        with torch.no_grad():
            for task in (scaled, fixed):
                for name, weight in task.adapter.denoiser.named_parameters():
                    if "lora_B" in name:
                        weight.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
            losses = [task.loss(task.load([(item, 0)]))[0].item() for task in (scaled, fixed)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0] != pytest.approx(np.log(2), rel=1e-4)


def test_beta_of_sums_is_per_element_already(wan: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reduction: sum it is per element already"):
        config(tmp_path, wan, tmp_path, loss__beta_elements=10, loss__reduction="sum")


def test_with_one_budget_for_clips_shorter_ones_are_larger(wan: Path, tmp_path: Path) -> None:
    adapter = base.load(config(tmp_path, wan, tmp_path).model)
    data = Data(resolution=32, frames=17, frame_buckets=(5,), bucket_budget="clip")
    media = [[clip(tmp_path / "a.mp4", 5)], [clip(tmp_path / "b.mp4", 17)]]
    found = buckets.targets(media, data, adapter)
    assert [found.size(i) for i in range(2)] == [(48, 48, 5), (32, 32, 17)]  # 5 latent frames against 2
    small, large = (int(np.prod(adapter.latent_shape(*found.size(i)))) for i in range(2))
    assert 0.8 < small / large <= 1


def test_lengths_and_shapes_are_bucketed_together(wan: Path, tmp_path: Path) -> None:
    adapter = base.load(config(tmp_path, wan, tmp_path).model)
    data = Data(resolution=32, frames=9, frame_buckets=(5,), buckets="aspect", bucket_step=8)
    media = [[clip(tmp_path / "a.mp4", 9, side=(24, 40))], [clip(tmp_path / "b.mp4", 6, side=(64, 64))]]
    assert [buckets.targets(media, data, adapter).size(i) for i in range(2)] == [(24, 40, 9), (32, 32, 5)]


# ------------------------------------------------------------------------------------------------------ training


def test_short_and_broken_clips_cost_their_row_and_are_counted(wan: Path, tmp_path: Path) -> None:
    table = pairs(tmp_path / "t", [(9, 9), (9, 4), (6, 9)])
    run = train.run(config(tmp_path / "run", wan, table, **CLIPS))
    facts = json.loads((run / "run.json").read_text())
    assert "kept 2 of 3 rows" in facts["data"] and "1 " in facts["data"]
    assert facts["latent_elements"] == 4 * 2 * 8 * 8


def test_the_rate_decides_which_frames_are_seen_and_which_clips_are_too_short(wan: Path, tmp_path: Path) -> None:
    table = pairs(tmp_path / "t", [(9, 9), (6, 9)])
    slow = PreferenceTask(config(tmp_path / "a", wan, table, data__frames=5, data__fps=4.0), CPU)
    assert slow.size == 1  # six frames at eight a second are three at four a second
    fast = PreferenceTask(config(tmp_path / "b", wan, table, data__frames=5, data__fps=8.0), CPU)
    assert fast.size == 2
    every = read_video(tmp_path / "t" / "0-w.mp4").frames
    seen = slow._assemble([(0, 0)])["fetched"][0].pixels
    expected = every[[0, 2, 4, 6, 8]].permute(1, 0, 2, 3).float() / 127.5 - 1
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("loss", "beta"),
    [("flow_dpo", 100.0), ("ipo", 100.0), ("rank_dpo", 100.0), ("diffusion_kto", 100.0), ("rwr", None)],
)
def test_objectives_of_every_kind_train_on_clips_of_the_shapes_world(
    loss: str, beta: float | None, wan: Path, tmp_path: Path
) -> None:
    told = {"loss": {"kind": loss, **({"beta": beta} if beta else {})}, "data__table": None}
    shapes = {"data__shapes": {"scenes": 6, "annotator": "balanced", "per_prompt": 3}, "data__ties": "soft"}
    run = train.run(config(tmp_path / "run", wan, tmp_path, **told, **shapes, data__frames=9, optim__lr=1e-4))
    rows = records(run)
    assert len(rows) == 4 and all(np.isfinite(row["loss"]) for row in rows)
    assert (run / "export" / "pytorch_lora_weights.safetensors").is_file()


def test_fine_tuning_and_autoencoder_train_on_clips(wan: Path, tmp_path: Path) -> None:
    shapes = {"shapes": {"scenes": 6}, "resolution": 32, "frames": 9, "cache": "memory"}
    tree = settings(tmp_path / "sft", wan, tmp_path, task="sft", loss={"kind": "denoising"}, data=shapes)
    tree["validation"] = {"prompts": ["a red circle moves left", "a blue cross stands still"], "every": 4, "steps": 2}
    run = train.run(TrainConfig.model_validate(tree))
    shown = read_video(run / "validation" / "step-000004.mp4")
    assert shown.frames.shape == (9, 3, 64, 64)  # two prompts beside each other, trained above untrained
    tree = settings(tmp_path / "vae", wan, tmp_path, task="autoencoder", lora=None, data={**shapes, "cache": "off"})
    tree["loss"] = {"kind": "reconstruction"}
    run = train.run(TrainConfig.model_validate(tree))
    folder = run / "export" / "vae"
    told = json.loads((folder / "config.json").read_text())
    assert told["latents_mean"] == [0.0] * 4 and told["latents_std"] == [1.0] * 4  # `whiten` has them in the weights
    adapter = base.load(Model(path=wan, components={"vae": folder}))
    task = SFTTask(TrainConfig.model_validate({**tree, "task": "sft", "loss": {"kind": "denoising"},
                                               "data": {**shapes, "cache": "memory"}}), CPU)  # fmt: skip
    pixels = torch.stack([task.load([(i, 0)])["fetched"][0].pixels for i in range(6)])
    means = adapter.encode_media(pixels)[:, 0].movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(means.mean(0), torch.zeros(4), rtol=0, atol=1e-3)
    assert (means.std(0) <= 1.001).all()  # times each channel's share of signal
    assert adapter.encode_media(pixels)[:, 1].max() < 1e-6  # and no noise of the posterior


def test_a_resumed_run_on_clips_ends_in_the_same_bytes(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pairs(tmp_path / "t", [(9, 9), (9, 5), (6, 9)])
    told = {**CLIPS, "data__crop": "random", "checkpoint": {"every": 1}}
    whole = train.run(config(tmp_path / "whole", wan, table, **told))
    save = train.Loop.save

    def stop(self: train.Loop) -> None:
        save(self)
        if self.step == 2:
            raise InterruptedError("stopped by the test")

    monkeypatch.setattr(train.Loop, "save", stop)
    with pytest.raises(InterruptedError):
        train.run(config(tmp_path / "cut", wan, table, **told))
    monkeypatch.setattr(train.Loop, "save", save)
    resumed = train.run(config(tmp_path / "cut", wan, table, **told), resume=True)
    name = "export/pytorch_lora_weights.safetensors"
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({}, r"data\.frames: wan is trained on clips; say how many frames"),
        ({"data__frames": 8}, r"data\.frames: 8 frames do not fit wan.*use 5 or 9"),
        ({"data__frames": 9, "data__frame_buckets": [4]}, r"data\.frame_buckets: 4 frames .* use 1 or 5"),
    ],
)
def test_frames_that_do_not_fit_are_refused_with_those_that_do(
    told: dict[str, Any], message: str, wan: Path, tmp_path: Path
) -> None:
    table = pairs(tmp_path / "t", [(9, 9)])
    with pytest.raises(ValueError, match=message):
        PreferenceTask(config(tmp_path / "run", wan, table, **told), CPU)


def test_frames_mean_nothing_to_a_model_of_pictures(tmp_path: Path) -> None:
    folder = tiny.tiny_sd(tmp_path / "sd")
    table = pairs(tmp_path / "t", [(9, 9)])
    with pytest.raises(ValueError, match=r"data\.frames: sd is trained on pictures; drop the key"):
        PreferenceTask(config(tmp_path / "run", folder, table, **CLIPS), CPU)


# ------------------------------------------------------------------------------------------------------ sampling


def _sampling(wan: Path, output: Path, **changes: Any) -> SampleConfig:
    (output.parent / "prompts.txt").write_text("a red circle\na blue square\n")
    tree = {"model": {"path": str(wan)}, "prompts": str(output.parent / "prompts.txt"), "output": str(output),
            "steps": 2, "height": 32, "width": 32, "frames": 5, "guidance_scale": 2.0, "device": "cpu"}  # fmt: skip
    return SampleConfig.model_validate({**tree, **changes})


def test_sampling_writes_clips_and_their_table(wan: Path, tmp_path: Path) -> None:
    table = sample.run(_sampling(wan, tmp_path / "out", fps=12.0, lossless=True))
    rows = read_media_table(table)
    assert [(row.modality, row.fps, row.num_frames) for row in rows] == [("video", 12.0, 5)] * 2
    shown = read_video(rows[0].media)
    assert shown.frames.shape == (5, 3, 32, 32) and shown.fps == 12.0
    alone = sample.run(_sampling(wan, tmp_path / "alone", fps=12.0, lossless=True, batch_size=1))
    other = read_video(read_media_table(alone)[1].media).frames
    assert (other.int() - read_video(rows[1].media).frames.int()).abs().max() <= 1  # one step of 255


def test_sampling_clips_goes_on_where_it_was_stopped(wan: Path, tmp_path: Path) -> None:
    table = sample.run(_sampling(wan, tmp_path / "out", batch_size=1))
    places = [Path(str(row.media)) for row in read_media_table(table)]
    kept = [place.read_bytes() for place in places]
    places[1].unlink()
    sample.run(_sampling(wan, tmp_path / "out", batch_size=1))
    assert [place.read_bytes() for place in places] == kept


def test_keys_of_clips_are_refused_for_models_of_pictures_and_lengths_that_do_not_fit(
    wan: Path, tmp_path: Path
) -> None:
    folder = tiny.tiny_sd(tmp_path / "sd")
    with pytest.raises(ValueError, match=r"frames: the model of .* draws pictures"):
        sample.run(_sampling(folder, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"frames: 6 frames do not fit wan.* use 5 or 9"):
        sample.run(_sampling(wan, tmp_path / "out", frames=6))
    assert not (tmp_path / "out").exists()
