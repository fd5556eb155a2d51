"""Checkpoints are read without running code, and what does not fit is named."""

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from scorer_kit import batch_of, clip_folder, pictures
from torch import nn

from mmalign.discovery import load_evaluator
from mmalign.known_weights import KNOWN, NO_TENSORS
from mmalign.score_plan import make_jobs
from mmalign.weights import MissingWeights, file_hash, files_hash, find_checkpoint, load_into, read_state_dict


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_state_dict_is_read_from_each_safe_form(tmp_path):
    state = {"weight": torch.randn(2, 3), "bias": torch.randn(2)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pth")
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "c.pt")
    for name in ("a.safetensors", "b.pth", "c.pt"):
        loaded = read_state_dict(tmp_path / name)
        assert set(loaded) == set(state) and all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_a_pickle_of_objects_is_refused_and_never_run(tmp_path, form):
    trap, file = tmp_path / "sprung", tmp_path / "model.pt"
    if form == "torch":
        torch.save({"state_dict": {"w": Trap(trap)}}, file)
    else:
        file.write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match=r"model\.pt: holds pickled Python objects.*refused.*safetensors"):
        read_state_dict(file)
    assert not trap.exists()


def test_a_whole_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "mps.pth")
    with pytest.raises(ValueError, match="refused"):
        read_state_dict(tmp_path / "mps.pth")


def test_torchscript_is_refused_with_the_way_out(tmp_path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "ViT-L-14.pt"))
    with pytest.raises(ValueError, match=r"TorchScript program.*save_file"):
        read_state_dict(tmp_path / "ViT-L-14.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damaged_files_are_named(tmp_path, suffix):
    file = tmp_path / f"w.{suffix}"
    state = {"weight": torch.randn(100, 100)}
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    file.write_bytes(file.read_bytes()[:20000])
    with pytest.raises(ValueError, match=rf"w\.{suffix}: .*truncated"):
        read_state_dict(file)
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"w\.{suffix}: the checkpoint is empty"):
        read_state_dict(file)


def test_things_that_are_no_state_dict_are_named(tmp_path):
    torch.save({"weight": torch.zeros(2), "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no tensors: epoch"):
        read_state_dict(tmp_path / "a.pt")
    torch.save([torch.zeros(2)], tmp_path / "b.pt")
    with pytest.raises(ValueError, match="holds list"):
        read_state_dict(tmp_path / "b.pt")
    with pytest.raises(ValueError, match="no such checkpoint"):
        read_state_dict(tmp_path / "c.pt")


def test_what_does_not_fit_is_named_all_at_once():
    state = {"weight": torch.zeros(3, 2), "scale": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        load_into(nn.Linear(2, 2), state, "file.pt")
    text = str(error.value)
    assert text.startswith("file.pt: the tensors do not fit Linear.")
    assert "1 missing: bias" in text and "1 unexpected: scale" in text
    assert "weight is [3, 2] and has to be [2, 2]" in text


def test_a_checkpoint_is_found_by_file_or_folder(tmp_path):
    file = tmp_path / "HPS_v2.1_compressed.safetensors"
    file.write_bytes(b"x")
    assert find_checkpoint(file, "hps-v2.1") == find_checkpoint(tmp_path, "hps-v2.1") == file
    for name, entry in KNOWN.items():
        with pytest.raises(ValueError) as error:
            find_checkpoint(tmp_path / "nowhere", name, "clip_checkpoint")
        assert entry.files[0] in str(error.value) and entry.repo in str(error.value)
        assert "does not exist" in str(error.value) and "`clip_checkpoint`" in str(error.value)


def test_a_fitted_scorer_names_its_evaluator_to_every_other(tmp_path):
    """Whatever the folder holds: names that would be taken, and none."""
    (tmp_path / "reward.json").write_text('{"scorer": "vlm_reward"}')
    whole = {name for name, entry in KNOWN.items() if entry.keys not in NO_TENSORS}
    assert {"hpsv3", "pickscore", "video-reward", "mps", "aesthetic-v2", "openai-clip-l14"} <= whole
    for name in whole:
        with pytest.raises(ValueError, match="was fitted for another evaluator; it is scored by vlm_reward"):
            find_checkpoint(tmp_path, name)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match="it is scored by vlm_reward"):
            find_checkpoint(path, "pickscore")
    for name in ("hpsv3", "pickscore", "video_reward", "mps", "clip_score", "social_reward"):
        with pytest.raises(ValueError, match="it is scored by vlm_reward"):
            load_evaluator(name, {"checkpoint": tmp_path}, "cpu")
    assert find_checkpoint(_touched(tmp_path / "vocab.txt"), "bert-base-uncased").name == "vocab.txt", "is no scorer"


def test_a_fitted_cosine_is_a_clip_for_who_names_its_file(tmp_path):
    (tmp_path / "reward.json").write_text('{"scorer": "fitted_reward"}')
    file = _touched(tmp_path / "HPS_v2.1_compressed.safetensors")
    assert find_checkpoint(tmp_path, "hps-v2.1") == find_checkpoint(file, "openai-clip-b32") == file
    with pytest.raises(ValueError, match=r"holds none of .* was fitted by `mmalign train`; it is scored by fitted_re"):
        find_checkpoint(tmp_path, "pickscore")
    for name in ("hpsv3", "image-reward", "mps"):
        with pytest.raises(ValueError, match="was fitted for another evaluator; it is scored by fitted_reward"):
            find_checkpoint(file, name)


def _touched(path):
    path.touch()
    return path


def test_hashes_follow_the_content(tmp_path):
    file, other = tmp_path / "a", tmp_path / "b"
    file.write_bytes(b"abc")
    other.write_bytes(b"abd")
    assert file_hash(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files_hash([]) is None and files_hash([file]) == file_hash(file)
    assert files_hash([file, other]) != files_hash([other, file])
    before = file_hash(file)
    file.write_bytes(b"abcd")
    assert file_hash(file) != before


def test_a_converted_file_is_taken_before_the_pickle_beside_it(tmp_path):
    (tmp_path / "MPS_overall_checkpoint.pth").touch()
    assert find_checkpoint(tmp_path, "mps").name == "MPS_overall_checkpoint.pth"
    (tmp_path / "MPS_overall_checkpoint.safetensors").touch()
    assert find_checkpoint(tmp_path, "mps").name == "MPS_overall_checkpoint.safetensors"


def test_scorers_find_what_was_fetched_without_being_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"weights/hps-v2\.1 does not exist\. Run `mmalign weights fetch hps-v2\.1`, or"
    ):
        load_evaluator("hps", {}, "cpu")
    clip_folder(tmp_path / "weights" / "hps-v2.1", "HPS_v2.1_compressed.pt")
    batch = batch_of(pictures())
    here = load_evaluator("hps", {}, "cpu").score(batch)
    (tmp_path / "weights").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(tmp_path / "elsewhere"))
    there = load_evaluator("hps", {}, "cpu").score(batch)
    told = load_evaluator("hps", {"checkpoint": tmp_path / "elsewhere" / "hps-v2.1"}, "cpu").score(batch)
    assert torch.equal(here, there) and torch.equal(there, told)


def test_all_files_that_are_missing_are_named_at_once(tmp_path, monkeypatch):
    """Those of one evaluator that needs two as well, and one command for all that can be fetched."""
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(tmp_path))
    names = ["subject_consistency", "i2v_subject", "temporal_flickering", "aesthetic_quality", "motion_smoothness"]
    with pytest.raises(ValueError, match="4 files of weights are missing") as caught:
        make_jobs([(name, {}) for name in names])
    said = str(caught.value)
    assert f"dino-vitb16 (for subject_consistency, i2v_subject): {tmp_path / 'dino-vitb16'} does not exist" in said
    assert "`mmalign weights fetch dino-vitb16 aesthetic-v1 openai-clip-l14`" in said
    assert f"amt-s: {KNOWN['amt-s'].by_hand}, and put it into {tmp_path / 'amt-s'}." in said
    with pytest.raises(MissingWeights, match=r"^amt-s weights: .*set `checkpoint` to the file"):
        make_jobs([("temporal_flickering", {}), ("motion_smoothness", {})])


def test_what_else_is_wrong_is_said_before_and_beside_missing_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(tmp_path))
    with pytest.raises(ValueError, match="There is no evaluator 'motion_smothness'"):
        make_jobs([("subject_consistency", {}), ("motion_smothness", {})])
    folder = tmp_path / "rtdetr-v2-r50"
    folder.mkdir()
    (folder / "config.json").write_text('{"backbone": "resnet50"}')
    with pytest.raises(ValueError, match="names its backbone") as caught:
        make_jobs([("object_class@rtdetr", {})])
    assert not isinstance(caught.value, MissingWeights)
