"""`mmalign score --dry-run`: what would be loaded and computed, and why, without a weight being read."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scorer_kit import TINY, clip_folder
from test_score import config, pictures
from typer.testing import CliRunner

from mmalign import evaluation, weights
from mmalign.cli import app
from mmalign.evaluation import AllFrames
from mmalign.media import write_image
from mmalign.score import plan_for, run
from mmalign.score_preview import preview, show
from mmalign.weights import count_numbers, weight_files_of

pytestmark = pytest.mark.usefixtures("plugins")


def previewed(settings):
    return preview(plan_for(settings), settings)


def by_name(found):
    return {each.evaluator: each for each in found.evaluators}


@pytest.fixture(name="shared")
def _shared(tmp_path):
    """A tiny CLIP that clip_score and aesthetic share, a head, and hps on a checkpoint of its own."""
    clip = clip_folder(tmp_path / "clip", "model.safetensors", dtype=torch.float16)
    hps = clip_folder(tmp_path / "hps", "HPS_v2.1_compressed.pt")
    torch.save({"weight": torch.randn(1, 24), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    return [
        ("hps", {"checkpoint": str(hps)}),
        ("clip_score", {"checkpoint": str(clip), "model": str(tmp_path / "clip")}),
        (
            "aesthetic",
            {"head": "v1", "checkpoint": str(tmp_path / "head.pth"), "clip_checkpoint": str(clip),
             "model": str(tmp_path / "clip")},
        ),
    ]  # fmt: skip


def test_networks_are_named_once_with_those_that_share_them(tmp_path, shared):
    table = pictures(tmp_path, [1, 2, 3], ["a", "b", "c"])
    found = previewed(config(table, tmp_path / "out", *shared, "brightness", dtype="bfloat16", processes=2))
    with torch.device("meta"):
        import open_clip

        numbers = sum(value.numel() for value in open_clip.CLIP(**TINY).state_dict().values())
    own, clip, head = found.networks
    labels = [each.evaluator for each in found.evaluators]
    assert (own.name, own.evaluators) == ("clip", (labels[0],))
    assert (clip.name, clip.evaluators) == ("clip", (labels[1], labels[2]))
    assert (head.name, head.evaluators) == ("head", (labels[2],))
    places = (tmp_path / "hps" / "HPS_v2.1_compressed.pt", tmp_path / "clip" / "model.safetensors")
    for network, place in zip((own, clip), places, strict=True):
        assert network.files == {str(place): place.stat().st_size}
        assert network.numbers == numbers and network.memory == 2 * numbers
    assert head.numbers == 25 and found.processes == 2
    assert (found.items, found.decoded, found.results, found.batches) == (3, 3, 12, 1)


def test_nothing_is_loaded_written_or_decoded(tmp_path, shared, monkeypatch):
    table = pictures(tmp_path, [1, 2, 3], ["a", "b", "c"])

    def refuse(*arguments, **named):
        pytest.fail("a dry run has loaded something")

    plain = torch.load
    monkeypatch.setattr(evaluation.Backbones, "get", refuse)
    monkeypatch.setattr(weights, "read_state_dict", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr("mmalign.score_decode._Process.__init__", refuse)
    monkeypatch.setattr(torch, "load", lambda *a, **k: plain(*a, **k) if k["map_location"] == "meta" else refuse())
    found = previewed(config(table, tmp_path / "out", *shared))
    assert found.results == 9 and not (tmp_path / "out").exists()


def test_why_each_result_is_not_there(tmp_path, monkeypatch):
    prompts = ["one", "explode", "a b c", "d e f", "g"]
    table = pictures(tmp_path, [10, 20, 30, 40, 50], prompts)
    evaluators = ("brightness", "words", "spread")
    settings = config(table, tmp_path / "out", *evaluators, batch_size=2)
    first = by_name(previewed(settings))
    assert all(each.done == 0 and each.to_do == {"new": 1 if each.whole_set else 5} for each in first.values())
    assert first["spread"].whole_set and previewed(settings).decoded_for_sets == 5
    run(settings)
    again = previewed(settings)
    assert (again.decoded, again.decoded_for_sets, again.batches, again.networks) == (1, 0, 1, ())
    assert by_name(again)["words"].to_do == {"failed before": 1} and by_name(again)["words"].done == 4
    assert by_name(again)["brightness"].done == 5 and by_name(again)["spread"].done == 1

    write_image(tmp_path / "0.png", np.full((6, 5, 3), 15, np.uint8))
    prompts[2] = "x y z"
    pictures(tmp_path, [15, 20, 30, 40, 50, 60], [*prompts, "new"])
    found = previewed(settings)
    assert by_name(found)["brightness"].to_do == {"the media changed": 1, "new": 1}
    assert by_name(found)["words"].to_do == {
        "the media changed": 1, "failed before": 1, "the prompt changed": 1, "new": 1,
    }  # fmt: skip
    assert by_name(found)["spread"].to_do == {"other items in the set": 1}
    assert (found.decoded, found.results, found.decoded_for_sets) == (4, 6, 6)

    other = by_name(previewed(config(table, tmp_path / "out", ("brightness", {"scale": 2}), "words", dtype="bfloat16")))
    assert other["brightness[scale=2.0]"].to_do == {
        "other parameters, another precision": 4,
        "the media changed, other parameters, another precision": 1,
        "new": 1,
    }
    monkeypatch.setattr(sys.modules["plug_in_code"].Brightness, "version", 2)
    assert by_name(previewed(settings))["brightness"].to_do["the evaluator has a new version"] == 4


def test_changed_weights_are_named(tmp_path, shared):
    table = pictures(tmp_path, [1], ["a"])
    settings = config(table, tmp_path / "out", shared[0])
    run(settings)
    assert previewed(settings).results == 0
    clip_folder(tmp_path / "hps", "HPS_v2.1_compressed.pt", seed=1)
    (found,) = previewed(settings).evaluators
    assert found.to_do == {"the weights changed": 1}


def test_what_is_skipped_and_what_cannot_be_read(tmp_path):
    table = pictures(tmp_path, [10, 20, None], ["a", "", "c"])
    found = previewed(config(table, tmp_path / "out", "words", "brightness"))
    assert by_name(found)["words"].skipped == {"the row has no prompt": 1}
    assert by_name(found)["words"].to_do == {"new": 2}
    assert found.n_unreadable == 1 and "2.png: no such file" in found.unreadable["s2"]
    assert (found.decoded, found.results) == (2, 5)


def test_the_verb_prints_tables_or_json(tmp_path, shared, monkeypatch, capsys):
    table = pictures(tmp_path, [1, 2, None], ["a", "b", ""])
    runner = CliRunner()
    words = ["score", str(table), "-e", "words", "-e", "spread", "-o", str(tmp_path / "out"), "--dry-run"]
    done = runner.invoke(app, [*words, "--json", "--engine", "ray"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found["engine"] == "ray" and found["decoded_for_sets"] == 2
    assert found["evaluators"][0]["skipped"] == {"the row has no prompt": 1}
    plain = runner.invoke(app, words).output
    assert "2 to decode, once each, for 2 results in 1 batches" in plain
    assert "2 to decode once more, for evaluators that see the whole set" in plain
    assert "1 cannot be read and become errors" in plain and "spread (whole set)" in plain
    assert runner.invoke(app, [*words[:-1], "--json"]).exit_code == 2
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    show(previewed(config(table, tmp_path / "out", *shared, processes=3)))
    shown = capsys.readouterr().out
    assert "networks to load, once each, in each of 3 processes" in shown and "KiB" in shown
    assert "clip_score[model=" in shown, "what is in brackets is no style"


# ------------------------------------------------------------------------------------------------ headers


def test_numbers_are_counted_by_the_header(tmp_path):
    tensors = {"a.weight": torch.randn(3, 5), "b": torch.randn(7).half(), "steps": torch.arange(4)}
    save_file(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    torch.save({"state_dict": tensors, "optimizer": {"c": torch.randn(9)}}, tmp_path / "y.pt")
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    torch.save(AllFrames(), tmp_path / "object.pt")
    counts = {file.name: count_numbers(file) for file in tmp_path.glob("*.*t*") if file.is_file()}
    assert counts == {
        "x.safetensors": 22, "x.pt": 22, "y.pt": 22, "old.pt": None, "broken.safetensors": None, "object.pt": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["large.safetensors", "large.pt"])
def test_counting_reads_no_tensor(tmp_path, name):
    tensors = {"a": torch.zeros(4 << 20), "b": torch.zeros(1 << 20, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / name) if name.endswith("safetensors") else torch.save(tensors, tmp_path / name)
    count_numbers(tmp_path / name)  # whatever has to be imported

    def read():
        return int(Path("/proc/self/io").read_text().split()[1])

    before = read()
    assert count_numbers(tmp_path / name) == 5 << 20
    assert read() - before < 1 << 20 < (tmp_path / name).stat().st_size


def test_weight_files_of_a_folder_are_its_safetensors_or_the_rest(tmp_path):
    for name in ("a.safetensors", "b.safetensors", "c.bin", "config.json"):
        (tmp_path / name).write_bytes(b"x")
    assert [file.name for file in weight_files_of(tmp_path)] == ["a.safetensors", "b.safetensors"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "c.pt").write_bytes(b"x")
    assert [file.name for file in weight_files_of(str(tmp_path / "old"))] == ["c.pt"]
    assert weight_files_of("ViT-H-14") == [] == weight_files_of(tmp_path / "config.json")


def test_a_folder_beside_a_file_is_not_counted(tmp_path, monkeypatch):
    """`config` names the folder for its architecture; the other version's checkpoint lies in it too."""
    place = clip_folder(tmp_path / "hps", "HPS_v2.1_compressed.pt")
    clip_folder(tmp_path / "hps", "HPS_v2_compressed.pt")
    settings = config(pictures(tmp_path, [1], ["a"]), tmp_path / "out", ("hps", {"checkpoint": str(tmp_path / "hps")}))
    (network,) = previewed(settings).networks
    assert list(network.files) == [str(place)]
