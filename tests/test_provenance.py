"""How a picture or clip was made, in the file itself: complete, exact, and the same in every run."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from media_kit import encode, moving, picture
from PIL import Image, PngImagePlugin
from training_kit import PROMPTS, config, preferences
from typer.testing import CliRunner

from mmalign import __version__, sample, train
from mmalign.cli import app
from mmalign.jobs import SampleConfig
from mmalign.jobs_prefer import PreferConfig
from mmalign.media import read_image, read_video, write_image, write_video
from mmalign.media_table import read_media_table
from mmalign.models import base
from mmalign.provenance import parameters, read_provenance, record, sidecar, write_clip, write_picture
from mmalign.source import MediaError
from mmalign.testing.tiny import tiny_sd
from mmalign.testing.tiny_video import tiny_wan
from mmalign.video_container import clip_tags

HOSTILE = 'say "x", Steps: 3\nNegative prompt: ä 一 \N{GRINNING FACE} \0 \ud800 <b> \\'


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("models") / "sd")


def _config(model: Path, folder: Path, output: str, **changes: Any) -> SampleConfig:
    (folder / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    settings = {"model": {"path": model}, "prompts": folder / "prompts.txt", "output": folder / output, "steps": 2}
    return SampleConfig.model_validate({**settings, "device": "cpu", "batch_size": 1, **changes})


def _told(prompt: str = "a red circle", **more: Any) -> dict[str, Any]:
    digest = hashlib.sha256(b"weights").hexdigest()
    return {"mmalign": __version__, "prompt": prompt, "seed": 7, "model": {"name": "m", "hash": digest}, **more}


def _chunks(path: Path) -> list[tuple[bytes, bytes]]:
    """Kind and data of each chunk of a PNG, read by its specification; checksums are checked."""
    data, at, found = path.read_bytes(), 8, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == int.from_bytes(data[at + 8 + size : at + 12 + size], "big")
        found.append((kind, body))
        at += 12 + size
    return found


# ------------------------------------------------------------------------------------------------ pictures


def test_pixels_and_their_encoding_do_not_change(tmp_path: Path) -> None:
    write_picture(tmp_path / "with.png", picture(), _told())
    write_picture(tmp_path / "without.png", picture(), None)
    write_image(tmp_path / "plain.png", picture())
    assert (tmp_path / "without.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    plain, told = _chunks(tmp_path / "plain.png"), _chunks(tmp_path / "with.png")
    assert [chunk for chunk in told if chunk[0] not in (b"tEXt", b"iTXt")] == plain
    assert [kind for kind, _ in told] == [b"IHDR", b"tEXt", b"tEXt", *[kind for kind, _ in plain[1:]]]
    assert np.array_equal(read_image(tmp_path / "with.png"), picture())


def test_a_png_says_it_as_json_and_as_viewers_show_it(tmp_path: Path) -> None:
    told = _told(steps=30, guidance_scale=7.5, negative_prompt="blurry", scheduler="ddim", scheduler_class="DDIM")
    told |= {"lora": {"name": "my, lora", "hash": "b" * 64}, "guidance": {"kind": "best_of_n", "n": 4}}
    write_picture(tmp_path / "a.png", picture(), told)
    with Image.open(tmp_path / "a.png") as image:
        held = dict(image.text)
    assert set(held) == {"mmalign", "parameters"}
    assert json.loads(held["mmalign"]) == told | {"height": 40, "width": 60} == read_provenance(tmp_path / "a.png")
    prompt, negative, line = held["parameters"].split("\n")
    assert (prompt, negative) == ("a red circle", "Negative prompt: blurry")
    settings = dict(re.findall(r'([A-Z][A-Za-z ]+): ("[^"]*"|[^,]*)(?:, |$)', line))
    assert settings == {
        "Steps": "30", "Sampler": "DDIM", "CFG scale": "7.5", "Seed": "7", "Size": "60x40",
        "Model hash": told["model"]["hash"][:10], "Model": "m", "Lora": '"my, lora"', "Lora hash": "b" * 10,
        "Guidance": "best_of_n", "Version": f"mmalign {__version__}",
    }  # fmt: skip


def test_any_prompt_comes_back_exactly(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", picture(), _told(HOSTILE))
    write_clip(tmp_path / "a.mp4", moving(4), 8, _told(HOSTILE))
    for name in ("a.png", "a.mp4"):
        found = read_provenance(tmp_path / name)
        assert found is not None and found["prompt"] == HOSTILE
    read_image(tmp_path / "a.png")  # which looks at every chunk
    assert "\0" not in parameters(_told(HOSTILE)) and parameters(_told(HOSTILE)).encode()


# ------------------------------------------------------------------------------------------------ clips


def test_a_clip_has_it_in_its_tags_and_beside_it(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", moving(5), 8, _told())
    write_video(tmp_path / "plain.mp4", moving(5), 8)
    expected = _told(height=64, width=96, frames=5, fps=8)
    assert json.loads((tmp_path / "a.json").read_text()) == expected == read_provenance(tmp_path / "a.mp4")
    assert clip_tags(tmp_path / "a.mp4")["title"] == "a red circle"
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.frames) == (8, 5)
    assert torch.equal(read_video(tmp_path / "a.mp4").frames, read_video(tmp_path / "plain.mp4").frames)
    sidecar(tmp_path / "a.mp4").unlink()
    assert read_provenance(tmp_path / "a.mp4") == expected
    write_clip(tmp_path / "a.mp4", moving(5), 8, _told())
    shutil.copy(tmp_path / "plain.mp4", tmp_path / "a.mp4")  # a program that dropped the tags
    assert read_provenance(tmp_path / "a.mp4") == expected


def test_the_same_clip_has_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_clip(tmp_path / name / "x.mp4", moving(6), 8, _told())
    for suffix in ("mp4", "json"):
        assert (tmp_path / f"a/x.{suffix}").read_bytes() == (tmp_path / f"b/x.{suffix}").read_bytes()


def test_a_clip_that_is_there_has_its_sidecar(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes uint8"):
        write_clip(tmp_path / "a.mp4", moving(3).float(), 8, _told())
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    write_clip(tmp_path / "b.mp4", moving(3), 8, None)
    assert not (tmp_path / "b.json").exists() and read_provenance(tmp_path / "b.mp4") is None


# ------------------------------------------------------------------------------------------------ other people's files


def test_what_others_wrote_is_no_record(tmp_path: Path) -> None:
    write_image(tmp_path / "plain.png", picture())
    write_image(tmp_path / "a.jpg", picture())
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a cat\nSteps: 20")
    Image.fromarray(picture()).save(tmp_path / "other.png", pnginfo=chunks)
    write_video(tmp_path / "other.mp4", moving(3), 8, tags={"comment": '{"made": "elsewhere"}'})
    (tmp_path / "other.json").write_text('{"caption": "a cat"}')
    encode(tmp_path / "c.webm", moving(3), "libvpx")
    for name in ("plain.png", "a.jpg", "other.png", "other.mp4", "c.webm"):
        assert read_provenance(tmp_path / name) is None, name


@pytest.mark.parametrize("text", ['{"mmalign":"0.1.0", "pro', "[1]", "{}", "[" * 200_000])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    write_image(tmp_path / "a.png", picture(), {"mmalign": text})
    with pytest.raises(ValueError, match=r"a\.png: its text 'mmalign' is .*draw it again"):
        read_provenance(tmp_path / "a.png")


def test_files_that_are_no_media_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(MediaError, match="holds text, not an image"):
        read_provenance(tmp_path / "a.png")
    with pytest.raises(MediaError, match="no such file"):
        read_provenance(tmp_path / "b.mp4")
    with pytest.raises(ValueError, match=r"text is kept in PNG alone; use \.png"):
        write_image(tmp_path / "a.webp", picture(), {"mmalign": "x"})


# ------------------------------------------------------------------------------------------------ sampling


def test_sampling_says_what_it_did(model: Path, tmp_path: Path) -> None:
    settings = _config(
        model, tmp_path, "out", seed=11, negative_prompt="small", guidance_scale=3.0, scheduler="ddim", per_prompt=2
    )
    sample.run(settings)
    found = read_provenance(tmp_path / "out/images/000002-12.png")
    assert found is not None
    parts = base.fingerprint(settings.model)
    assert set(parts) >= {"unet", "vae", "text_encoder"}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    assert found == {
        "mmalign": __version__, "prompt": PROMPTS[2], "seed": 12, "steps": 2, "guidance_scale": 3.0,
        "negative_prompt": "small", "scheduler": "ddim", "scheduler_class": "DDIMScheduler", "dtype": "float32",
        "model": {"name": "sd", "hash": digest, "parts": parts}, "height": 32, "width": 32,
    }  # fmt: skip
    assert str(tmp_path) not in json.dumps(found)


def test_a_lora_is_named_by_its_run_and_hashed(model: Path, tmp_path: Path) -> None:
    run = config(tmp_path / "my-dpo", model, preferences(tmp_path), optim__steps=1)
    export = train.run(run) / "export"
    settings = _config(model, tmp_path, "out", limit=1)
    sample.run(settings.model_copy(update={"model": settings.model.model_copy(update={"lora": export})}))
    file = export / "pytorch_lora_weights.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    found = read_provenance(tmp_path / "out/images/000000-0.png")
    assert found is not None and found["lora"] == {"name": run.output.name, "hash": digest}
    assert "lora" not in found["model"]["parts"]
    away = _config(model, tmp_path, "away", negative_lora=file, negative_weight=0.5, limit=1)
    sample.run(away)
    found = read_provenance(tmp_path / "away/images/000000-0.png")
    assert found is not None and found["negative_lora"] == {"name": run.output.name, "hash": digest}
    assert found["negative_weight"] == 0.5


def test_a_killed_run_that_goes_on_writes_the_same_bytes(model: Path, tmp_path: Path) -> None:
    once = sample.run(_config(model, tmp_path, "once")).parent
    killed = sample.run(_config(model, tmp_path, "killed", limit=1)).parent
    assert len(list((killed / "images").iterdir())) == 1
    sample.run(_config(model, tmp_path, "killed"))
    moved = tmp_path / "elsewhere" / "sd"
    shutil.copytree(model, moved)
    sample.run(_config(moved, tmp_path, "moved"))
    for name in ("000000-0.png", "000001-0.png", "000002-0.png"):
        expected = (once / "images" / name).read_bytes()
        assert (killed / "images" / name).read_bytes() == expected, name
        assert (tmp_path / "moved/images" / name).read_bytes() == expected, name


def test_batches_and_folders_do_not_enter_it(model: Path, tmp_path: Path) -> None:
    one = sample.run(_config(model, tmp_path, "one")).parent
    many = sample.run(_config(model, tmp_path, "many", batch_size=3)).parent
    for file in sorted((one / "images").iterdir()):
        assert read_provenance(file) == read_provenance(many / "images" / file.name)


def test_it_can_be_left_out(model: Path, tmp_path: Path) -> None:
    told = sample.run(_config(model, tmp_path, "out")).parent / "images/000000-0.png"
    pixels, private = read_image(told), _config(model, tmp_path, "out", provenance=False)
    told.unlink()
    sample.run(private)  # the same folder: it changes no pixel
    assert read_provenance(told) is None and np.array_equal(read_image(told), pixels)
    assert {kind for kind, _ in _chunks(told)} == {b"IHDR", b"IDAT", b"IEND"}
    source = PreferConfig.model_validate({
        "output": tmp_path / "p", "prompts": tmp_path / "prompts.txt", "rewards": [{"name": "hps"}],
        "sources": [{"kind": "sample", "model": {"path": model}, "per_prompt": 2, "provenance": False}],
    }).sources[0]  # fmt: skip
    assert source.provenance is False  # type: ignore[union-attr]


def test_a_variant_belongs_to_the_model(model: Path, tmp_path: Path) -> None:
    chosen = {"path": model, "lora": tmp_path / "styles" / "ink.safetensors", "variant": "fp16"}
    settings = SampleConfig.model_validate({"model": chosen, "prompts": "p.txt", "output": "out"})
    found = record(settings, {"unet": "ab-fp16", "lora": "cd-fp16"}, "p", 1)
    assert found["model"]["parts"] == {"unet": "ab-fp16"} and found["lora"] == {"name": "ink", "hash": "cd"}


def test_settings_of_a_block_tell_no_paths(model: Path, tmp_path: Path) -> None:
    block = {
        "kind": "best_of_n", "clamp": float("inf"), "places": [tmp_path / "a" / "head", "C:\\Users\\anna\\w.pt"],
        "rewards": [{"params": '{"checkpoint": "/home/anna/hps.pt", "question": "/is this a red circle/ or not"}'}],
    }  # fmt: skip
    found = record(_config(model, tmp_path, "out"), {"unet": "x"}, "p", 1, guidance=block)["guidance"]
    assert found == {
        "kind": "best_of_n", "clamp": "inf", "places": ["head", "w.pt"],
        "rewards": [{"params": {"checkpoint": "hps.pt", "question": "/is this a red circle/ or not"}}],
    }  # fmt: skip
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_clips_of_a_video_family_have_it(tmp_path: Path) -> None:
    settings = {"frames": 5, "fps": 12.0, "height": 32, "width": 32, "limit": 1}
    table = sample.run(_config(tiny_wan(tmp_path / "wan"), tmp_path, "out", **settings))
    clip = Path(str(read_media_table(table)[0].media))
    found = read_provenance(clip)
    assert found is not None and found == json.loads(clip.with_suffix(".json").read_text())
    assert (found["frames"], found["fps"], found["width"], found["prompt"]) == (5, 12.0, 32, PROMPTS[0])
    assert found["scheduler_class"] == "UniPCMultistepScheduler" and "transformer" in found["model"]["parts"]
    before = [clip.read_bytes(), clip.with_suffix(".json").read_bytes()]
    clip.unlink()
    sample.run(_config(tmp_path / "wan", tmp_path, "out", **settings))
    assert [clip.read_bytes(), clip.with_suffix(".json").read_bytes()] == before
    assert 'src": "videos/' in (tmp_path / "out/index.html").read_text()


def test_guided_pictures_say_how_they_were_guided(model: Path, tmp_path: Path) -> None:
    reward = {"name": "hps", "params": {"checkpoint": str(Path("assets/shapes-clip").absolute())}}
    block = {"kind": "best_of_n", "n": 2, "rewards": [reward]}
    sample.run(_config(model, tmp_path, "out", guidance=block, limit=1))
    found = read_provenance(tmp_path / "out/images/000000-0.png")
    assert found is not None and found["guidance"]["kind"] == "best_of_n" and found["guidance"]["n"] == 2
    told = found["guidance"]["rewards"][0]
    assert told["name"] == "hps" and len(told["weight_hash"]) == 64
    assert str(Path.cwd()) not in json.dumps(found) and found["scheduler_class"] == "DDIM"
    with Image.open(tmp_path / "out/images/000000-0.png") as image:
        assert "Guidance: best_of_n" in image.text["parameters"]
    page = (tmp_path / "out/index.html").read_text()
    assert '"label": "reward"' in page and '"label": "baseline/reward"' in page


# ------------------------------------------------------------------------------------------------ the verb


def test_info_prints_it(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", picture(), _told(HOSTILE))
    write_clip(tmp_path / "a.mp4", moving(4), 8, None)
    told = json.loads(CliRunner().invoke(app, ["info", str(tmp_path / "a.png"), "--json"]).stdout)
    assert told["provenance"]["prompt"] == HOSTILE and (told["kind"], told["size"]) == ("image", "60x40")
    assert told["sha256"] == hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest()
    shown = CliRunner().invoke(app, ["info", str(tmp_path / "a.png")]).stdout
    assert "\0" not in shown and "seed" in shown and "model.hash" in shown
    told = json.loads(CliRunner().invoke(app, ["info", str(tmp_path / "a.mp4"), "--json"]).stdout)
    assert (told["kind"], told["size"], told["frames"], told["fps"]) == ("video", "96x64", 4, 8.0)
    assert told["provenance"] is None
    assert "none that mmalign wrote" in CliRunner().invoke(app, ["info", str(tmp_path / "a.mp4")]).stdout
