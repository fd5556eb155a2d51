"""Batch generation: each picture depends on its prompt and seed alone, and a folder on one config alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from training_kit import PROMPTS, config, preferences

from mmalign import sample, train
from mmalign.jobs import SampleConfig
from mmalign.jobs_inputs import Model
from mmalign.media import read_image
from mmalign.media_table import read_media_table
from mmalign.models import base
from mmalign.testing.tiny import tiny_sd, tiny_sdxl
from mmalign.testing.tiny_transformers import tiny_sd3

CPU = torch.device("cpu")


@pytest.fixture(scope="module", name="models")
def _models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {"sd": tiny_sd(home / "sd"), "sdxl": tiny_sdxl(home / "sdxl")}


@pytest.fixture(name="prompts")
def _prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return tmp_path / "prompts.txt"


def _config(model: Path, prompts: Path, output: Path, **changes: Any) -> SampleConfig:
    settings = {"model": {"path": model}, "prompts": prompts, "output": output, "steps": 2, "device": "cpu", **changes}
    return SampleConfig.model_validate(settings)


def _pictures(table: Path) -> dict[str, np.ndarray]:
    return {row.sample: read_image(row.media) for row in read_media_table(table)}


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_batches_do_not_matter(models: dict[str, Path], prompts: Path, tmp_path: Path, family: str) -> None:
    found = [
        _pictures(sample.run(_config(models[family], prompts, tmp_path / str(size), batch_size=size, scheduler="ddim")))
        for size in (1, 4, 3)
    ]
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for name, picture in found[0].items():
        assert picture.shape == (32, 32, 3)
        assert max(np.abs(picture.astype(int) - other[name]).max() for other in found[1:]) <= 1
    assert len({picture.tobytes() for picture in found[0].values()}) == 4


def test_a_picture_is_the_pipelines(models: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    config = _config(
        models["sd"], prompts, tmp_path / "out", seed=11, guidance_scale=3.0, negative_prompt="small", per_prompt=2
    )  # fmt: skip
    found = _pictures(sample.run(config))
    pipe = StableDiffusionPipeline.from_pretrained(models["sd"], local_files_only=True)
    for k in (0, 1):
        image = pipe(
            PROMPTS[1], negative_prompt="small", num_inference_steps=2, guidance_scale=3.0, output_type="np",
            generator=torch.Generator().manual_seed(11 + k),
        ).images[0]  # fmt: skip
        ours = found[f"000001-{11 + k}"].astype(int)
        assert np.abs(ours - (image * 255).round()).max() <= 1


def test_the_table_says_what_was_drawn(models: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    rows = read_media_table(sample.run(_config(models["sd"], prompts, tmp_path / "out", per_prompt=2, seed=5)))
    assert [(row.prompt, row.seed, row.group) for row in rows] == [
        (prompt, 5 + k, f"{i:06d}") for i, prompt in enumerate(PROMPTS) for k in (0, 1)
    ]
    assert len({row.sample for row in rows}) == 8
    assert {row.model for row in rows} == {str(models["sd"])}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_seed_column_is_honoured(models: dict[str, Path], tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"prompts.{suffix}"
    rows = [{"prompt": PROMPTS[0], "seed": 77}, {"prompt": PROMPTS[0], "seed": None}, {"prompt": PROMPTS[0], "seed": 3}]
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    asked = sample.requests(_config(models["sd"], file, tmp_path / "out", seed=9, per_prompt=2))
    assert [request.seed for request in asked] == [77, 78, 9, 10, 3, 4]
    found = _pictures(sample.run(_config(models["sd"], file, tmp_path / "out", seed=9)))
    assert list(found) == ["000000-77", "000001-9", "000002-3"]
    assert len({picture.tobytes() for picture in found.values()}) == 3


@pytest.mark.parametrize("seed", ["three", 1.5, True])
def test_a_bad_seed_is_named(models: dict[str, Path], tmp_path: Path, seed: Any) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "x", "seed": 1}) + "\n" + json.dumps({"prompt": "x", "seed": seed}) + "\n")
    with pytest.raises(ValueError, match=r"prompts\.jsonl line 2: the seed is .*give a whole number"):
        sample.requests(_config(models["sd"], file, tmp_path / "out"))


def test_prompts_from_a_spreadsheet(models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text('prompt,seed\n"a red circle, large",7\na cross,\n')
    found = sample.requests(_config(models["sd"], file, tmp_path / "out"))
    assert [(r.prompt, r.seed) for r in found] == [("a red circle, large", 7), ("a cross", 0)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, r"none\.txt does not exist; check the path"),
        ("none.jsonl", None, r"none\.jsonl does not exist; check the path"),
        ("empty.txt", "\n \n", r"empty\.txt holds no prompts; write one per line"),
        ("empty.jsonl", "", r"empty\.jsonl holds no rows"),
        ("other.jsonl", '{"promt": "a"}\n', r"no column prompt, which a table of prompts needs; .* are promt\."),
        ("null.jsonl", '{"prompt": null}\n', r"null\.jsonl line 1: the prompt is None; give text"),
        ("prompts.xlsx", "prompt\na\n", r"a table ends in \.jsonl, \.json, \.csv, "),
    ],
)  # fmt: skip
def test_bad_prompts_are_named(
    models: dict[str, Path], tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        sample.run(_config(models["sd"], tmp_path / name, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_mistyped_model_leaves_nothing_behind(models: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    typo = models["sd"].parent / "sdd"
    with pytest.raises(ValueError, match=r"sdd' does not exist\. Did you mean '.*/sd'\?"):
        sample.run(_config(typo, prompts, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_stopped_run_keeps_its_pictures(
    models: dict[str, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _pictures(sample.run(_config(models["sd"], prompts, tmp_path / "whole")))
    config = _config(models["sd"], prompts, tmp_path / "cut", batch_size=1)
    write, written = sample.provenance.write_picture, []

    def stop(path: Path, image: np.ndarray, record: Any) -> None:
        if len(written) == 2:
            raise InterruptedError("stopped by the test")
        write(path, image, record)
        written.append(path)

    monkeypatch.setattr(sample.provenance, "write_picture", stop)
    with pytest.raises(InterruptedError):
        sample.run(config)
    assert not (tmp_path / "cut" / "table.jsonl").exists()
    times = {path: path.stat().st_mtime_ns for path in written}
    drawn: list[Path] = []
    monkeypatch.setattr(
        sample.provenance, "write_picture", lambda path, *rest: (drawn.append(path), write(path, *rest))
    )
    found = _pictures(sample.run(config))
    assert len(drawn) == 2 and not set(drawn) & set(written)
    assert times == {path: path.stat().st_mtime_ns for path in written}
    assert found.keys() == whole.keys()
    for name, picture in whole.items():
        assert np.abs(picture.astype(int) - found[name]).max() <= 1


@pytest.mark.parametrize("lost", [[1], [0, 3], [0, 1, 2]])
def test_a_batch_that_lacks_a_picture_is_drawn_whole(
    models: dict[str, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: list[int]
) -> None:
    config = _config(models["sd"], prompts, tmp_path / "out", batch_size=3)
    sample.run(config)
    files = sorted((tmp_path / "out/images").glob("*.png"))
    before = {path: path.read_bytes() for path in files}
    for place in lost:
        files[place].unlink()
    batches: list[int] = []
    generate = sample.generate
    monkeypatch.setattr(
        sample, "generate", lambda model, wanted, how: (batches.append(len(wanted)), generate(model, wanted, how))[1]
    )
    sample.run(config)
    assert {path: path.read_bytes() for path in files} == before
    assert batches == [4 if 3 in lost else 3]  # four in all: a batch of three, and one of one


def test_a_finished_run_loads_no_model(
    models: dict[str, Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(models["sd"], prompts, tmp_path / "out")
    table = sample.run(config).read_text()
    monkeypatch.setattr(sample.base, "load", lambda *a, **k: pytest.fail("a finished run has nothing to load"))
    assert sample.run(config).read_text() == table


def test_a_folder_holds_the_pictures_of_one_config(models: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample.run(_config(models["sd"], prompts, out, limit=1))
    for changes, named in (({"steps": 3}, "steps"), ({"guidance_scale": 1.0, "seed": 2}, "guidance_scale, seed")):
        with pytest.raises(ValueError, match=rf"made with other values of: {named}\. Choose another folder"):
            sample.run(_config(models["sd"], prompts, out, limit=1, **changes))
    sample.run(_config(models["sd"], prompts, out, limit=2, batch_size=1))  # these do not change a picture
    assert len(list((out / "images").iterdir())) == 2


def test_files_count_by_content(models: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(models["sd"], model)
    sample.run(_config(model, prompts, out, limit=1))
    sample.run(_config(models["sd"], prompts, out, limit=1))  # the same weights at another place
    prompts.write_text("something else\n")
    with pytest.raises(ValueError, match="made with other values of: prompts"):
        sample.run(_config(model, prompts, out, limit=1))
    prompts.write_text("\n".join(PROMPTS))
    shutil.rmtree(model)
    tiny_sd(model, seed=8)  # trained again, into the same folder
    with pytest.raises(ValueError, match="made with other values of: model"):
        sample.run(_config(model, prompts, out, limit=1))


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "dpm++sde", "euler"])
def test_schedulers(models: dict[str, Path], prompts: Path, tmp_path: Path, scheduler: str) -> None:
    own = _pictures(sample.run(_config(models["sd"], prompts, tmp_path / "own", limit=1, steps=4)))
    other = _pictures(
        sample.run(_config(models["sd"], prompts, tmp_path / "other", limit=1, steps=4, scheduler=scheduler))
    )
    assert not np.array_equal(own["000000-0"], other["000000-0"])


def test_a_scheduler_that_draws_noise_draws_it_per_picture(
    models: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    arguments = {"steps": 4, "scheduler": "dpm++sde"}
    one = _pictures(sample.run(_config(models["sd"], prompts, tmp_path / "1", batch_size=1, **arguments)))
    many = _pictures(sample.run(_config(models["sd"], prompts, tmp_path / "3", batch_size=3, **arguments)))
    assert one.keys() == many.keys() and len(one) > 2
    for name, picture in one.items():
        assert np.abs(picture.astype(int) - many[name]).max() <= 1, name
    plain = _pictures(sample.run(_config(models["sd"], prompts, tmp_path / "o", steps=4, scheduler="dpm++")))
    assert any(np.abs(picture.astype(int) - plain[name]).max() > 1 for name, picture in one.items())


def test_size(models: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    found = _pictures(sample.run(_config(models["sd"], prompts, tmp_path / "a", limit=1, height=24, width=40)))
    assert found["000000-0"].shape == (24, 40, 3)
    with pytest.raises(ValueError, match="height: 30 is not a multiple of 8; use 32"):
        sample.run(_config(models["sd"], prompts, tmp_path / "b", height=30))


def test_pictures_that_are_not_finite_are_not_written(models: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    pipe = StableDiffusionPipeline.from_pretrained(models["sd"], local_files_only=True)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("nan"))
    pipe.save_pretrained(model)
    with pytest.raises(ValueError, match="not finite with dtype float32, in a batch that begins with 'a red circle'"):
        sample.run(_config(model, prompts, tmp_path / "out"))
    assert list((tmp_path / "out" / "images").iterdir()) == []


def test_half_precision_needs_a_gpu(models: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float16 needs a GPU; on a CPU use float32"):
        sample.run(_config(models["sd"], prompts, tmp_path / "out", dtype="float16"))
    found = _pictures(sample.run(_config(models["sd"], prompts, tmp_path / "bf", dtype="bfloat16", limit=1)))
    assert found["000000-0"].shape == (32, 32, 3)


# ------------------------------------------------------------------------------------------- guidance away from a LoRA


@pytest.fixture(scope="module", name="negative")
def _negative(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], dict[str, Path]]:
    """Tiny models, and for each a LoRA that was trained on it with labels swapped."""
    home = tmp_path_factory.mktemp("negative")
    models = {"sd": tiny_sd(home / "sd"), "sdxl": tiny_sdxl(home / "sdxl"), "sd3": tiny_sd3(home / "sd3", t5=False)}
    table = preferences(home)
    loras = {}
    for name, folder in models.items():
        run = config(home / f"run-{name}", folder, table, loss={"kind": "diffusion_npo", "beta": 50.0}, optim__lr=2e-2)
        loras[name] = train.run(run) / "export"
    return models, loras


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_the_unconditional_branch_is_the_negative_model(
    name: str, negative: tuple[dict[str, Path], dict[str, Path]], tmp_path: Path
) -> None:
    """Against the two branches computed one by one from models that were loaded apart."""
    models, loras = negative
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    settings = SampleConfig(
        model={"path": models[name]}, prompts=tmp_path / "prompts.txt", output=tmp_path / "out", device="cpu",
        height=32, width=32, guidance_scale=4.0, negative_lora=loras[name], negative_weight=1.0,
    )  # fmt: skip
    guided = sample.load(settings, CPU)
    calls: list[tuple[Any, Any]] = []
    hook = guided.denoiser.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(((args, kwargs), output[0])), with_kwargs=True
    )
    sample_one = next(iter(sample.generate(guided, sample.requests(settings), settings)))
    hook.remove()
    assert sample_one[1][0].shape == (32, 32, 3)
    (args, kwargs), output = calls[0]
    plain = base.load(Model(path=models[name])).denoiser
    trained = base.load(Model(path=models[name], lora=loras[name])).denoiser
    with torch.no_grad():
        expected = torch.cat(
            [trained(*args, **kwargs)[0].chunk(2)[0], plain(*args, **kwargs)[0].chunk(2)[1]]
        )  # fmt: skip
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert (trained(*args, **kwargs)[0] - plain(*args, **kwargs)[0]).abs().max() > 1e-4


def test_a_negative_weight_of_0_changes_nothing(
    negative: tuple[dict[str, Path], dict[str, Path]], tmp_path: Path
) -> None:
    models, loras = negative
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    found = []
    for extra in ({}, {"negative_lora": loras["sd"], "negative_weight": 0.0}, {"negative_lora": loras["sd"]}):
        settings = SampleConfig(
            model={"path": models["sd"]}, prompts=tmp_path / "prompts.txt", output=tmp_path / "out", device="cpu",
            height=32, width=32, steps=3, guidance_scale=4.0, **extra,
        )  # fmt: skip
        adapter = sample.load(settings, CPU)
        found.append(np.stack(next(iter(sample.generate(adapter, sample.requests(settings), settings)))[1]).astype(int))
    assert abs(found[0] - found[1]).max() <= 1
    assert abs(found[0] - found[2]).max() > 1


def test_a_negative_lora_needs_guidance_and_a_file(tmp_path: Path) -> None:
    common: dict[str, Any] = {"model": {"path": tmp_path}, "prompts": tmp_path / "p.txt", "output": tmp_path / "out"}
    with pytest.raises(ValueError, match="set guidance_scale above 1"):
        SampleConfig(**common, negative_lora=tmp_path, guidance_scale=1.0)
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"negative_lora: .* does not exist"):
        sample.run(SampleConfig(**common, negative_lora=tmp_path / "nothing"))
