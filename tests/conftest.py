"""What holds for every test: no network, no model hub, no cache of the user's, few threads."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Set before any library that reads them is imported; subprocesses that tests start inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("MMALIGN_DEBUG", None)
# Workers share the cores: one thread each is quicker than two that wait for each other. They inherit what the
# controller, which reads this file first, has set.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("MPLBACKEND", "Agg")


class NetworkBlocked(RuntimeError):
    """A test tried to reach another machine."""


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    host = address[0]
    if host in {"localhost", ""}:
        return True
    try:
        return ipaddress.ip_address(host.split("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Connections go to this machine only; name look-ups of other machines fail too."""
    patch = pytest.MonkeyPatch()
    connect, connect_ex, look_up = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def guarded(original: Any) -> Any:
        def call(self: socket.socket, address: Any) -> Any:
            if not _is_local(address):
                raise NetworkBlocked(f"a test tried to connect to {address}")
            return original(self, address)

        return call

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name is not None and not _is_local((name,)) and name != socket.gethostname():
            raise NetworkBlocked(f"a test tried to look up {name}")
        return look_up(host, *args, **kwargs)

    patch.setattr(socket.socket, "connect", guarded(connect))
    patch.setattr(socket.socket, "connect_ex", guarded(connect_ex))
    patch.setattr(socket, "getaddrinfo", guarded_look_up)
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever is cached goes into a temporary folder, never into the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MMALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module", name="model")
def _model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion folder; to be read only."""
    from mmalign.testing.tiny import tiny_sd

    return tiny_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module", name="table")
def _table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of four decided pairs."""
    from training_kit import preferences

    return preferences(tmp_path_factory.mktemp("data"))


@pytest.fixture(name="small_disk")
def _small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB; mounting one takes rights that not every machine gives."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("a small disk cannot be mounted here: no mount command")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(name="colour_evaluators")
def _colour_evaluators(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The evaluators of prefer_kit, installed as somebody's package."""
    from prefer_kit import plug_in

    monkeypatch.syspath_prepend(str(plug_in(tmp_path_factory.mktemp("site"))))
    yield
    sys.modules.pop("colour_code", None)


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> Path:
    """A table of the plain pictures in prefer_kit.LISTS."""
    from prefer_kit import LISTS, table

    (tmp_path / "in").mkdir()
    return table(tmp_path / "in", LISTS)


@pytest.fixture(name="plugins")
def _plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The evaluators of plugin_package, installed as somebody's package in the folder that it gives."""
    from plugin_package import install

    monkeypatch.syspath_prepend(str(install(tmp_path / "site")))
    yield tmp_path / "site"
    sys.modules.pop("plug_in_code", None)
