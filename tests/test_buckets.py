"""Aspect buckets: which shape a group is cut to, what the model is told of it, and training in several shapes."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageFile, features
from pydantic import ValidationError
from training_kit import PROMPTS, config, moved, preferences, records

from mmalign import checkpoints, train
from mmalign.media import MediaError, image_size, read_image, write_image
from mmalign.records import MediaRef
from mmalign.shapes.data import drawings
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.tasks import buckets
from mmalign.tasks.inputs import View, cut
from mmalign.tasks.preference import PreferenceTask
from mmalign.tasks.sft import SFTTask
from mmalign.testing import tiny, tiny_transformers

CPU = torch.device("cpu")
LN2 = math.log(2)
ASPECT = {"data__buckets": "aspect", "data__bucket_step": 8}  # of 32: 24 wide and 40 high, 32x32, 40x24
TALL, SQUARE, WIDE = (40, 24), (32, 32), (24, 40)
PAIRS = [  # sizes of winner and loser; then the bucket
    ((80, 48), (40, 24), TALL), ((64, 64), (32, 32), SQUARE), ((48, 80), (50, 90), WIDE), ((96, 56), (80, 48), TALL),
    ((20, 20), (64, 60), SQUARE), ((48, 80), (80, 48), SQUARE), ((24, 40), (33, 60), WIDE),
]  # fmt: skip


def table(folder: Path, groups: list[list[tuple[int, int]]]) -> Path:
    """Preferences on pictures of these heights and widths; earlier ones are better and darker."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, group in enumerate(groups):
        media = []
        for j, size in enumerate(group):
            write_image(folder / f"{i}-{j}.png", rng.integers(40 * j, 40 * j + 90, (*size, 3), dtype=np.uint8))
            media.append(MediaRef(str(folder / f"{i}-{j}.png")))
        scores = {"quality": tuple(0.9 - 0.2 * j for j in range(len(group)))}
        rows.append(PreferenceRow(PROMPTS[i % len(PROMPTS)], tuple(media), scores=scores))
    write_preferences(folder / "table.jsonl", rows)
    return folder / "table.jsonl"


@pytest.fixture(scope="module", name="mixed")
def _mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("mixed"), [[winner, loser] for winner, loser, _ in PAIRS])


@pytest.fixture(scope="module", name="sdxl")
def _sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


def _loss(task: Any, items: list[int], epoch: int = 0) -> float:
    with torch.no_grad():
        return task.loss(task.load([(i, epoch) for i in items]))[0].item()


# ------------------------------------------------------------------------------------------------------- buckets


def test_the_buckets_of_1024_are_those_of_sdxl() -> None:
    """2307.01952, appendix I: the largest of each short side, up to an aspect of 2."""
    wide = [(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1344)]
    assert buckets.shapes(1024, 64, 2.0) == [(w, h) for h, w in reversed(wide[1:])] + wide


@pytest.mark.parametrize(
    ("resolution", "step", "limit"), [(32, 8, 2.0), (512, 64, 2.0), (1024, 32, 3.0), (768, 16, 1.5)]
)
def test_buckets_are_as_large_as_the_area_allows(resolution: int, step: int, limit: float) -> None:
    """Against a search over every size of the grid: those of which neither side can grow."""
    sides = range(step, int(resolution * limit) + step, step)
    fits = {(h, w) for h, w in itertools.product(sides, sides) if h * w <= resolution**2}
    full = {(h, w) for h, w in fits if max(h, w) / min(h, w) <= limit and (
        ((h, w + step) not in fits) if w >= h else ((h + step, w) not in fits))}  # fmt: skip
    found = buckets.shapes(resolution, step, limit)
    assert set(found) == full and len(found) == len(full)
    assert (resolution, resolution) in found
    assert [w / h for h, w in found] == sorted(w / h for h, w in found)


def _kept_area(picture: tuple[int, int], bucket: tuple[int, int]) -> float:
    """By resizing and cropping with real numbers, not by the ratio of aspects."""
    scale = max(bucket[0] / picture[0], bucket[1] / picture[1])
    return bucket[0] * bucket[1] / (picture[0] * scale * picture[1] * scale)


def test_a_group_gets_the_bucket_that_keeps_most() -> None:
    shapes, rng = buckets.shapes(1024, 64, 2.0), np.random.default_rng(0)
    for _ in range(300):
        group = [tuple(size) for size in rng.integers(200, 3000, (rng.integers(1, 5), 2)).tolist()]
        chosen = shapes[buckets.best(group, shapes)]
        products = {bucket: math.prod(_kept_area(size, bucket) for size in group) for bucket in shapes}
        worst = {bucket: min(_kept_area(size, bucket) for size in group) for bucket in shapes}
        most = max(products.values())
        tied = [bucket for bucket in shapes if products[bucket] > most * (1 - 1e-9)]
        assert chosen in tied
        assert worst[chosen] >= max(worst[bucket] for bucket in tied) * (1 - 1e-9)
        turned = shapes[buckets.best([(w, h) for h, w in reversed(group)], shapes)]
        assert max(turned) / min(turned) == max(chosen) / min(chosen), "portraits are treated as landscapes are"


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([(1200, 1200)], (1024, 1024)),
        ([(1080, 1920)], (768, 1344)),
        ([(10000, 100)], (1344, 768)),  # beyond the largest aspect
        ([(768, 1344), (1344, 768)], (1024, 1024)),  # both lose as much
        ([(768, 1344)] * 3 + [(1344, 768)], (768, 1344)),  # one odd picture does not cost the others
    ],
)
def test_choices(group: list[tuple[int, int]], expected: tuple[int, int]) -> None:
    shapes = buckets.shapes(1024, 64, 2.0)
    assert shapes[buckets.best(group, shapes)] == expected


# -------------------------------------------------------------------------------------------------- sizes, crops


def _encoded(kind: str, orientation: int | None = None) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(buffer, kind, exif=exif.tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])])
@pytest.mark.parametrize("orientation", [None, 3, 6, 8])
def test_a_size_is_that_of_the_decoded_picture(
    tmp_path: Path, kind: str, orientation: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _encoded(kind, orientation)
    (tmp_path / "picture").write_bytes(data)
    pq.write_table(pa.table({"image": pa.array([data], pa.binary())}), tmp_path / "t.parquet")
    sources = (data, tmp_path / "picture", MediaRef(str(tmp_path / "picture")),
               MediaRef(str(tmp_path / "t.parquet"), 0, "image"))  # fmt: skip
    expected = read_image(data).shape[:2]
    assert expected == ((30, 20) if orientation in (6, 8) else (20, 30))

    def decode(self: Any) -> None:
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    assert [image_size(source) for source in sources] == [expected] * 4


@pytest.mark.parametrize(("content", "said"), [(None, "no such file"), (b"text", "holds text, not an image")])
def test_a_picture_without_a_size_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(MediaError, match=rf"a\.png: {said}"):
        image_size(tmp_path / "a.png")


def test_a_drawing_knows_its_size() -> None:
    drawing = drawings(1, 0)[0]
    assert drawing.size == drawing.image().shape[:2]


def test_a_rectangle_is_cut_from_what_covers_it() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (48, 96, 3), dtype=np.uint8)
    pixels, sizes = cut(picture, (24, 40), View(down=0.5, right=0.25))
    whole = np.asarray(Image.fromarray(picture).resize((48, 24), Image.Resampling.LANCZOS))
    np.testing.assert_allclose((pixels.permute(1, 2, 0).numpy() + 1) * 127.5, whole[:, 2:42], atol=1e-4)
    assert sizes.tolist() == [48, 96, 0, 2, 24, 40]
    flipped, mirrored = cut(picture, (24, 40), View(flip=True, down=0.5, right=0.25))
    assert torch.equal(flipped, pixels.flip(2)) and mirrored.tolist() == [48, 96, 0, 6, 24, 40]
    tall, told = cut(picture, (40, 24), View())
    assert tall.shape == (3, 40, 24) and told.tolist() == [48, 96, 0, 28, 40, 24]
    exact, _ = cut(picture, (48, 96), View())
    np.testing.assert_allclose((exact.permute(1, 2, 0).numpy() + 1) * 127.5, picture, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- training


def test_pairs_are_cut_to_their_bucket_and_counted(model: Path, mixed: Path, tmp_path: Path) -> None:
    task = PreferenceTask(config(tmp_path / "run", model, mixed, **ASPECT), CPU)
    assert [task.targets.size(i) for i in range(task.size)] == [bucket for *_, bucket in PAIRS]
    facts = task.facts
    assert {name: held["items"] for name, held in facts["buckets"].items()} == {"24x40": 2, "32x32": 3, "40x24": 2}
    for name, held in facts["buckets"].items():
        width, height = map(int, name.split("x"))
        assert held["latent_elements"] == 4 * (height // 4) * (width // 4)
        assert held["beta_per_sample"] == pytest.approx(500.0)
        assert held["beta_per_element"] == pytest.approx(500.0 / held["latent_elements"])
    assert facts["pictures_enlarged"] == 1  # 20x20 to 32x32
    lost = [1 - _kept_area(size, bucket) for *pair, bucket in PAIRS for size in pair]
    assert facts["mean_cropped_share"] == pytest.approx(np.mean(lost))
    assert "3 of 3 buckets used, 1 of 14 pictures enlarged" in facts["data"]
    for i, (winner, loser, bucket) in enumerate(PAIRS):
        fetched = task.load([(i, 0)])["fetched"]
        assert [item.pixels.shape[1:] for item in fetched] == [bucket, bucket]
        assert [tuple(item.sizes[:2].tolist()) for item in fetched] == [winner, loser]
        assert task._inputs(task.load([(i, 0)]))[0].shape == (2, 4, bucket[0] // 4, bucket[1] // 4)


def test_without_buckets_all_is_square_and_nothing_is_read(model: Path, mixed: Path, tmp_path: Path) -> None:
    task = PreferenceTask(config(tmp_path / "run", model, mixed), CPU)
    assert task.buckets is None and "buckets" not in task.facts and "pictures_enlarged" not in task.facts
    assert task.targets.size(2) == (32, 32) and task.targets.together(3) == [[0, 1, 2]]


def test_a_square_bucket_shares_the_cache_of_square_runs(model: Path, mixed: Path, tmp_path: Path) -> None:
    tasks = [PreferenceTask(config(tmp_path / "run", model, mixed, **more), CPU) for more in ({}, ASPECT)]
    keys = [[[item.key for item in task.load([(i, 0)])["fetched"]] for i in range(task.size)] for task in tasks]
    assert [one == other for one, other in zip(*keys, strict=True)] == [bucket == SQUARE for *_, bucket in PAIRS]
    medium = tasks[1].groups[0].media[0]
    assert len({tasks[1].inputs.fetch(medium, View(), size).key for size in (TALL, SQUARE, WIDE)}) == 3


def test_sdxl_is_told_original_size_crop_and_target(sdxl: Path, mixed: Path, tmp_path: Path) -> None:
    task = PreferenceTask(config(tmp_path / "run", sdxl, mixed, **ASPECT), CPU)
    time_ids = task._inputs(task.load([(2, 0)]))[2]["time_ids"]
    # 48x80 fits 24x40; 50x90 becomes 24x43 and loses a column at its left and two at its right (round(1.5) is 2).
    assert time_ids.tolist() == [[48, 80, 0, 0, 24, 40], [50, 90, 0, 2, 24, 40]]
    time_ids = task._inputs(task.load([(5, 0)]))[2]["time_ids"]
    # 48x80 and 80x48 to the square: 32x53 and 53x32.
    assert time_ids.tolist() == [[48, 80, 0, 10, 32, 32], [80, 48, 10, 0, 32, 32]]


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sdxl": tiny.tiny_sdxl,
    "sd3": tiny_transformers.tiny_sd3,
    "flux": tiny_transformers.tiny_flux,
    "pixart": tiny_transformers.tiny_pixart,
    "sana": tiny_transformers.tiny_sana,
    "qwen_image": tiny_transformers.tiny_qwen_image,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_begins_at_ln_2_in_every_bucket(family: str, mixed: Path, tmp_path: Path) -> None:
    kind = "diffusion_dpo" if family in ("sdxl", "pixart") else "flow_dpo"
    settings = config(
        tmp_path / "run", FAMILIES[family](tmp_path / "model"), mixed, loss={"kind": kind, "beta": 50.0}, **ASPECT
    )  # fmt: skip
    task = PreferenceTask(settings, CPU)
    seen: list[tuple[int, ...]] = []
    shift = task.adapter.shift
    task.adapter.shift = lambda shape: seen.append(tuple(shape)) or shift(shape)
    for items in task.targets.together(task.size):
        loss, metrics = task.loss(task.load([(i, 0) for i in items]))
        assert loss.item() == pytest.approx(LN2, abs=1e-4)
        assert metrics["implicit_accuracy"].item() == pytest.approx(0.5, abs=0.5)
        loss.backward()
    if kind == "flow_dpo":
        expected = [task.adapter.latent_shape(*size) for size in (TALL, SQUARE, WIDE)]
        assert seen == expected, "flow times are shifted for the shape of the bucket"


def test_a_group_gives_the_same_loss_in_its_bucket_and_alone(model: Path, mixed: Path, tmp_path: Path) -> None:
    changes = {"data__flip": 0.5, "data__crop": "random", "data__cache": "off"}
    task = moved(config(tmp_path / "run", model, mixed, **changes, **ASPECT))
    alone = moved(config(tmp_path / "run", model, mixed, **changes))
    for items in task.targets.together(task.size):
        losses = []
        for item in items:
            alone.targets = buckets.Targets([task.targets.size(item)])
            losses.append(_loss(alone, [item], 3))
            assert _loss(task, [item], 3) == losses[-1]
        assert _loss(task, items, 3) == pytest.approx(np.mean(losses), rel=1e-4)
        assert max(abs(loss - LN2) for loss in losses) > 1e-3


def test_a_cached_reference_is_measured_bucket_by_bucket(model: Path, mixed: Path, tmp_path: Path) -> None:
    found = []
    for kind in ("adapter_off", "cached"):
        task = moved(config(tmp_path / "run", model, mixed, reference={"kind": kind, "draws": 2}, **ASPECT))
        groups = task.targets.together(task.size)
        found.append([_loss(task, items, epoch) for items in groups for epoch in (0, 1, 2)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    full = config(tmp_path / "run", model, mixed, reference={"kind": "cached", "draws": 2}, lora=None, **ASPECT)
    task = PreferenceTask(full, CPU)  # here all are measured before the first step
    assert all(_loss(task, items, 1) == pytest.approx(LN2, abs=1e-6) for items in task.targets.together(task.size))


def test_lists_of_mixed_sizes_and_lengths_share_a_batch(model: Path, tmp_path: Path) -> None:
    groups = [[(80, 48), (40, 24), (60, 40)], [(48, 80), (24, 40)], [(90, 50), (64, 64), (80, 48), (70, 41)]]
    loss = {"kind": "rank_dpo", "beta": 50.0}
    task = moved(config(tmp_path / "run", model, table(tmp_path, groups), loss=loss, **ASPECT))
    assert [task.targets.size(i) for i in range(3)] == [TALL, WIDE, TALL]
    assert _loss(task, [0, 2]) == pytest.approx((_loss(task, [0]) + _loss(task, [2])) / 2, rel=1e-4)
    assert math.isfinite(_loss(task, [1]))


def test_supervised_fine_tuning_in_buckets(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, lines = np.random.default_rng(1), []
    for i, size in enumerate([TALL, WIDE, WIDE, SQUARE, TALL, WIDE]):
        write_image(tmp_path / f"{i}.png", rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        lines.append(json.dumps({"sample": str(i), "media": f"{i}.png", "prompt": PROMPTS[i % len(PROMPTS)]}))
    (tmp_path / "media.jsonl").write_text("\n".join(lines))
    shapes: list[set[Any]] = []
    load = SFTTask.load

    def watched(self: SFTTask, positions: list[tuple[int, int]]) -> dict[str, Any]:
        batch = load(self, positions)
        shapes.append({tuple(item.sizes[4:].tolist()) for item in batch["fetched"]})
        return batch

    monkeypatch.setattr(SFTTask, "load", watched)
    run = config(
        tmp_path / "run", model, tmp_path / "media.jsonl", task="sft", loss={"kind": "denoising"}, optim__steps=9,
        validation={"prompts": PROMPTS[:1], "every": 9, "steps": 1}, **ASPECT,
    )  # fmt: skip
    train.run(run)
    assert all(len(held) == 1 for held in shapes), "one shape in a batch"
    counts = Counter(shape for held in shapes for shape in held)
    for shape, items in ((TALL, 2), (SQUARE, 1), (WIDE, 3)):
        assert abs(counts[shape] - 9 * items / 6) <= 1
    facts = json.loads((run.output / "run.json").read_text())
    assert facts["buckets"] == {"24x40": {"items": 2}, "32x32": {"items": 1}, "40x24": {"items": 3}}
    assert read_image(run.output / "validation" / "step-000009.png").shape == (64, 32, 3), "two squares"


@pytest.mark.parametrize("cached", [False, True])
def test_stopped_and_resumed_it_ends_in_the_same_bytes(
    model: Path, mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    changes: dict[str, Any] = {**ASPECT, "optim__steps": 8, "checkpoint__every": 1, "data__flip": 0.5}
    changes |= {"reference": {"kind": "cached", "draws": 2}} if cached else {"data__crop": "random"}
    whole, part = (
        config(tmp_path / name, model, mixed, data__cache_dir=str(tmp_path / f"cache-{name}"), **changes)
        for name in ("whole", "part")
    )
    train.run(whole)
    save = train.Loop.save

    def stop(self: train.Loop) -> None:
        save(self)
        if self.step == 3:
            raise InterruptedError("stopped by the test")

    monkeypatch.setattr(train.Loop, "save", stop)
    with pytest.raises(InterruptedError):
        train.run(part)
    monkeypatch.setattr(train.Loop, "save", save)
    train.run(part, resume=True)
    files = [run.output / "checkpoints" / "step-00000008" / "weights.safetensors" for run in (whole, part)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert [record["loss"] for record in records(whole.output)] == [record["loss"] for record in records(part.output)]
    assert checkpoints.steps(part.output / "checkpoints")[-1] == 8


def test_a_bucket_smaller_than_a_batch_trains(model: Path, mixed: Path, tmp_path: Path) -> None:
    run = config(tmp_path / "run", model, mixed, optim__batch_size=4, optim__steps=4, **ASPECT)
    assert all(math.isfinite(record["loss"]) for record in records(train.run(run)))


# ---------------------------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__bucket_step": 6}, r"data\.bucket_step: 6 is not a multiple of 4, .*; use 8$"),
        ({"data__bucket_step": 64}, r"data\.bucket_step: data\.resolution 32 is not a multiple of 64; use .* 64"),
        ({"data__bucket_step": 12}, r"data\.resolution 32 is not a multiple of 12; use resolution 24 or another step"),
        (
            {"data__bucket_max_aspect": 1.2},
            r"only the square of 32 with bucket_step 8 and bucket_max_aspect 1\.2; use a",
        ),
    ],
)
def test_settings_that_do_not_go_together(
    model: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=said):
        PreferenceTask(config(tmp_path / "run", model, preferences(tmp_path), **{**ASPECT, **changes}), CPU)


def test_bad_values_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    bad = partial(config, tmp_path, tmp_path, tmp_path)
    with pytest.raises(ValidationError, match=r"bucket_max_aspect\n  Input should be greater than or equal to 1"):
        bad(**ASPECT, data__bucket_max_aspect=0.5)
    with pytest.raises(ValidationError, match=r"data\.buckets is for .* preference and sft; drop it, autoencoder"):
        bad(**ASPECT, task="autoencoder", loss={"kind": "reconstruction"}, lora=None)


def test_a_missing_picture_is_named_before_the_first_step(model: Path, tmp_path: Path) -> None:
    path = table(tmp_path, [[TALL, TALL], [WIDE, WIDE]])
    (tmp_path / "1-0.png").unlink()
    with pytest.raises(MediaError, match=r"1-0\.png: no such file"):
        PreferenceTask(config(tmp_path / "run", model, path, **ASPECT), CPU)
