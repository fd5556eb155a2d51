"""`mmalign weights`: fetching from a hub and from a repository's page, verifying a copy; the table of known weights."""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scorer_kit import clip_folder, pictures
from torch import nn

from mmalign import known_weights, weights_fetch
from mmalign.backbones.clip import check_fits
from mmalign.discovery import evaluator_class
from mmalign.known_weights import KNOWN
from mmalign.weights_read import meta_state
from mmalign.weights_verify import verify

# ------------------------------------------------------------------------------------------------ fetch

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does, for `files`; and serves ``/page/raw/HEAD/NAME`` as a repository's page does."""

    files: dict[str, bytes] = {}
    lies: dict[str, str] = {}
    small: set[str] = set()  # files that are not in LFS, of which the hub knows git's hash
    status: int = 200
    gets: list[str] = []

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if self.status != 200:
            return self.send_error(self.status)
        if path.startswith("/api/models/"):
            answer = self._tree() if "/tree/" in path else self._info()
            return self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)
        content = self.files.get(path.rpartition("/")[2])
        if content is None:
            return self.send_error(404)
        if body:
            self.gets.append(path.rpartition("/")[2])
        digest = hashlib.sha256(content).hexdigest()
        self._send(content, {"ETag": f'"{digest}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}, body)

    def _info(self) -> dict[str, Any]:
        siblings = []
        for name, content in self.files.items():
            digest = self.lies.get(name, hashlib.sha256(content).hexdigest())
            lfs = {"sha256": digest, "size": len(content), "pointerSize": 130}
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            one = {"rfilename": name, "size": len(content), "blobId": self.lies.get(name, blob)}
            siblings.append(one if name in self.small else {**one, "lfs": lfs})
        return {"id": "owner/name", "sha": REVISION, "siblings": siblings}

    def _tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": one["rfilename"], "size": one["size"], "oid": one["blobId"]}
            for one in self._info()["siblings"]
        ]

    def _send(self, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        """Quiet."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub on this machine; nothing outside of it is asked."""
    Hub.files, Hub.lies, Hub.gets, Hub.small, Hub.status = {}, {}, [], set(), 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def run(hub: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return mmalign(hub, folder, "weights", *words)


def mmalign(hub: str, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "COLUMNS": "200"}
    words = (sys.executable, "-m", "mmalign", *words)
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment)


def test_fetch_from_the_hub_records_and_verifies(hub: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"logit_scale": torch.ones(())}}, buffer)
    Hub.files = {"HPS_v2.1_compressed.pt": buffer.getvalue(), "README.md": b"not asked for"}
    done = run(hub, tmp_path, "fetch", "hps-v2.1")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "weights" / "hps-v2.1" / "HPS_v2.1_compressed.pt"
    assert file.read_bytes() == buffer.getvalue() and not (file.parent / "README.md").exists()
    record = json.loads((file.parent / "weights.json").read_text())
    assert record["revision"] == REVISION and record["repo"] == "xswu/HPSv2"
    assert record["files"] == {file.name: hashlib.sha256(buffer.getvalue()).hexdigest()}
    assert Hub.gets == [file.name]
    assert run(hub, tmp_path, "fetch", "hps-v2.1").returncode == 0 and Hub.gets == [file.name], "fetched twice"
    looked = run(hub, tmp_path, "verify", "hps-v2.1", "weights/hps-v2.1")
    assert looked.returncode == 1 and "ok    record: 1 file as fetched from xswu/HPSv2" in looked.stdout
    assert "WRONG names and shapes" in looked.stdout and "visual.conv1.weight" in looked.stdout
    file.write_bytes(buffer.getvalue() + b"x")
    assert "WRONG record: changed" in run(hub, tmp_path, "verify", "hps-v2.1", "weights/hps-v2.1").stdout


def test_fetch_says_what_is_wrong(hub: str, tmp_path: Path) -> None:
    Hub.files = {"other.bin": b"x"}
    done = run(hub, tmp_path, "fetch", "hps-v2.1")
    assert done.returncode == 2 and "has no HPS_v2.1_compressed.pt; it has other.bin" in done.stderr
    Hub.files, Hub.lies = {"HPS_v2.1_compressed.pt": b"x"}, {"HPS_v2.1_compressed.pt": "0" * 64}
    done = run(hub, tmp_path, "fetch", "hps-v2.1")
    assert done.returncode == 2 and "is damaged" in done.stderr and "Traceback" not in done.stderr
    done = run(hub, tmp_path, "fetch", "hps-v2.1", "hps-2.1")
    assert done.returncode == 2 and "Did you mean 'hps-v2.1'?" in done.stderr


def test_fetch_from_a_page_checks_the_published_digest(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Hub.files = {"head.pth": b"weights"}
    digest = hashlib.sha256(b"weights").hexdigest()
    entry = known_weights.Checkpoint(("head.pth",), f"{hub}/page", "MIT", "linear", digest)
    monkeypatch.setitem(KNOWN, "head", entry)
    assert (weights_fetch.fetch("head", tmp_path) / "head.pth").read_bytes() == b"weights"
    monkeypatch.setitem(KNOWN, "head", replace(entry, sha256="0" * 64))
    with pytest.raises(ValueError, match=f"sha256 {digest}, and the published file has 000"):
        weights_fetch.fetch("head", tmp_path)
    monkeypatch.setitem(KNOWN, "head", replace(entry, by_hand="Ask its authors"))
    with pytest.raises(ValueError, match=r"cannot be fetched by a program\. Ask its authors\."):
        weights_fetch.fetch("head", tmp_path)


def test_small_files_are_compared_by_gits_hash(hub: str, tmp_path: Path) -> None:
    Hub.files, Hub.small = {"config.json": b"{}", "tokenizer.json": b"{}"}, {"config.json", "tokenizer.json"}
    Hub.files |= {name: b"x" for name in ("tokenizer_config.json", "vocab.json", "merges.txt")}
    assert run(hub, tmp_path, "fetch", "qwen2-vl-2b-config").returncode == 0
    Hub.lies = {"tokenizer.json": "0" * 40}
    done = run(hub, tmp_path, "fetch", "qwen2-vl-2b-config", "--to", "again")
    assert done.returncode == 2 and "tokenizer.json is damaged: its git hash is not 000" in done.stderr


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, ("refuses (401", "Accept its licence at https://huggingface.co/xswu/HPSv2", "HF_TOKEN")),
     (403, ("refuses (403", "HF_TOKEN")), (404, ("answers 404", "see whether it moved")),
     (429, ("answers 429", "Try again later")), (500, ("answers 500",))],
)  # fmt: skip
def test_a_hub_that_refuses_is_a_message_with_the_fix(
    hub: str, tmp_path: Path, status: int, words: tuple[str, ...]
) -> None:
    Hub.status = status
    done = run(hub, tmp_path, "fetch", "hps-v2.1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for word in (*words, "place HPS_v2.1_compressed.pt of", "in weights/hps-v2.1 by hand",
                 "mmalign weights verify hps-v2.1 weights/hps-v2.1"):  # fmt: skip
        assert word in done.stderr, done.stderr


CLOSED = "http://127.0.0.1:9"  # the port of `discard`, where nothing listens


@pytest.mark.parametrize("name", ["hps-v2.1", "aesthetic-v2"])
def test_no_network_is_a_message_with_the_fix(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, CLOSED)
    done = run(CLOSED, tmp_path, "fetch", name)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be reached" in done.stderr and "Connect this machine to the network" in done.stderr
    assert f"in weights/{name} by hand" in done.stderr and not (tmp_path / "weights" / name / "weights.json").exists()


@pytest.mark.parametrize("status", [401, 404, 503])
def test_a_page_that_refuses_is_a_message(
    hub: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Hub.status = status
    monkeypatch.setitem(KNOWN, "head", known_weights.Checkpoint(("head.pth",), f"{hub}/page", "MIT", "linear"))
    with pytest.raises(ValueError, match=rf"head: {hub}/page (refuses|answers) \(?{status}"):
        weights_fetch.fetch("head", tmp_path)


def test_errors_underneath_are_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN, "head", known_weights.Checkpoint(("head.pth",), "https://host/page", "MIT", "linear"))

    def failing(error: Exception) -> None:
        def download(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        weights_fetch.fetch("head", tmp_path)

    with pytest.raises(OSError, match="no space left for head; free some, or fetch to another disk") as full:
        failing(OSError(errno.ENOSPC, "No space left on device"))
    assert full.value.filename == str(tmp_path / "head")
    for error in (http.client.IncompleteRead(b"x"), TimeoutError("timed out"), ConnectionResetError("reset"),
                  urllib.error.URLError("unknown host"), ssl.SSLError("certificate")):  # fmt: skip
        with pytest.raises(ValueError, match=r"head: https://host/page cannot be reached"):
            failing(error)
    with pytest.raises(PermissionError):
        failing(PermissionError(errno.EACCES, "Permission denied", "head.pth"))


def test_a_folder_that_cannot_be_made_is_told(hub: str, tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a file where the folder should be")
    done = run(hub, tmp_path, "fetch", "hps-v2.1")
    assert done.returncode == 2 and "Traceback" not in done.stderr and "weights" in done.stderr


def test_a_file_that_was_there_is_compared_or_left_out_of_the_record(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Hub.files = {"head.pth": b"weights", "notes.txt": b"notes"}
    entry = known_weights.Checkpoint(("head.pth",), f"{hub}/page", "MIT", "linear", also=("notes.txt",))
    monkeypatch.setitem(KNOWN, "head", entry)
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "head.pth").write_bytes(b"someone's own")
    weights_fetch.fetch("head", tmp_path)
    record = json.loads((tmp_path / "head" / "weights.json").read_text())
    assert list(record["files"]) == ["notes.txt"] and Hub.gets == ["notes.txt"]
    assert "head.pth was there already" in caplog.text and "not recorded as fetched" in caplog.text
    assert (tmp_path / "head" / "head.pth").read_bytes() == b"someone's own"
    caplog.clear()
    (tmp_path / "head" / "head.pth").unlink()
    weights_fetch.fetch("head", tmp_path)
    weights_fetch.fetch("head", tmp_path)  # both are in the record now, and as they were fetched
    assert not caplog.text and Hub.gets == ["notes.txt", "head.pth"]
    assert len(json.loads((tmp_path / "head" / "weights.json").read_text())["files"]) == 2
    (tmp_path / "head" / "head.pth").write_bytes(b"changed since")
    weights_fetch.fetch("head", tmp_path)
    assert "head.pth was there already" in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", '{"files": [1]}', ""])
def test_a_damaged_record_is_written_anew_with_a_message(hub: str, text: str, tmp_path: Path) -> None:
    Hub.files = {"HPS_v2.1_compressed.pt": b"weights"}
    (tmp_path / "weights" / "hps-v2.1").mkdir(parents=True)
    record = tmp_path / "weights" / "hps-v2.1" / "weights.json"
    record.write_text(text)
    done = run(hub, tmp_path, "fetch", "hps-v2.1")
    assert done.returncode == 0 and "It is written anew" in done.stderr
    assert json.loads(record.read_text())["name"] == "hps-v2.1"


def test_a_dry_run_asks_no_one(hub: str, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "fetch", "--dry-run", "hps-v2.1", "mps")
    assert done.returncode == 0 and not Hub.gets and not (tmp_path / "weights").exists()
    assert "HPS_v2.1_compressed.pt from https://huggingface.co/xswu/HPSv2 into weights/hps-v2.1" in done.stdout
    assert "mps: by hand. Download" in done.stdout


def test_fetch_then_score_needs_no_other_step(hub: str, tmp_path: Path) -> None:
    """The three lines of the README, in a folder that holds nothing else.

    The hub serves a small CLIP under the published name; what it would not serve is the config that says it is small.
    """
    path = clip_folder(tmp_path / "source", "HPS_v2.1_compressed.pt")
    Hub.files = {path.name: path.read_bytes()}
    here = tmp_path / "here"
    (here / "my_images").mkdir(parents=True)
    for index, picture in enumerate(pictures([(32, 40), (40, 32)])):
        Image.fromarray(picture).save(here / "my_images" / f"{index}.png")
        (here / "my_images" / f"{index}.txt").write_text("a red circle")
    assert run(hub, here, "fetch", "hps-v2.1").returncode == 0
    shutil.copy(path.parent / "open_clip_config.json", here / "weights" / "hps-v2.1")
    for words in (("score", "my_images", "-e", "hps"), ("report", "my_images/scores")):
        done = mmalign(hub, here, *words)
        assert done.returncode == 0, done.stderr
    assert (here / "my_images" / "scores").is_dir()


# ------------------------------------------------------------------------------------------------ the table


def test_headers_are_enough_to_see_whether_a_file_fits(tmp_path: Path) -> None:
    model = open_clip.create_model("ViT-B-32-quickgelu", load_weights=False)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "m.safetensors")
    state = meta_state(tmp_path / "m.safetensors")
    assert all(value.is_meta for value in state.values())
    assert {name: value.shape for name, value in state.items()} == {n: v.shape for n, v in model.state_dict().items()}
    check_fits(state, tmp_path / "m.safetensors", "ViT-B-32-quickgelu")
    state["ln_final.bias"] = torch.empty(3, device="meta")
    with pytest.raises(ValueError, match=r"ln_final\.bias is \[3\] and has to be \[512\]"):
        check_fits(state, tmp_path / "m.safetensors", "ViT-B-32-quickgelu")


def test_every_entry_of_the_table_is_whole() -> None:
    for name, entry in KNOWN.items():
        assert entry.files and entry.repo and entry.licence and entry.keys, name
        assert entry.sha256 is None or len(bytes.fromhex(entry.sha256)) == 32, name
        assert not entry.pickled or any(file.endswith(".safetensors") for file in entry.files), name
        assert "://" in entry.repo or len(entry.repo.split("/")) == 2, name


def test_an_evaluators_licence_is_that_of_its_weights() -> None:
    """`list evaluators` and `weights list` do not say different things of one file."""
    own = {"hps": "hps-v2.1", "pickscore": "pickscore", "mps": "mps", "image_reward": "image-reward",
           "hpsv3": "hpsv3", "video_reward": "video-reward", "social_reward": "social-reward",
           "unified_reward": "unified-reward-qwen-7b", "multi_tap": "multi-tap-qwen2-vl-2b"}  # fmt: skip
    for name, known in own.items():
        assert evaluator_class(name).licence.startswith(KNOWN[known].licence), name
    assert all("terms of the weights were not read" in KNOWN[name].licence for name in ("hpsv3", "video-reward"))
    pages = Path(__file__).parents[1] / "docs" / "scorers"
    for name in ("hpsv3", "video_reward"):
        assert "The code is MIT; the terms of the weights were not read." in (pages / f"{name}.md").read_text()
    assert KNOWN["openai-clip-l14"].licence in (pages / "geneval.md").read_text()
    for text in ("MIT", "Apache-2.0"):
        assert text in evaluator_class("clip_score").licence, text


def test_what_is_looked_at_is_said_for_each(tmp_path: Path) -> None:
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    findings = verify("aesthetic-v1", tmp_path)
    assert [(what, right) for what, right, _ in findings] == [
        ("published digest", False), ("record", None), ("reads safely", True), ("names and shapes", True)
    ]  # fmt: skip
