"""``mmalign doctor``: what this installation has, and what to do about what it lacks."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmalign import __version__

GIB = 2**30
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME", "MMALIGN_CACHE", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Part:
    """A package that mmalign can use and does not need."""

    module: str
    purpose: str
    install: str


OPTIONAL = (
    Part(
        "bitsandbytes",
        "8-bit Adam (optim.optimizer: adamw8bit), 4- and 8-bit weights (mllm.quantise)",
        "pip install bitsandbytes",
    ),
    Part("wandb", "tracking: log.trackers: [wandb]", "pip install wandb"),
    Part("trackio", "tracking without an account: log.trackers: [trackio]", "pip install trackio"),
    Part("deepspeed", "sharding: zero2", "pip install deepspeed"),
    Part("ray", "scoring by Ray Data: engine: ray", "pip install 'mmalign[ray]'"),
    Part("pytest", "the test suite", "pip install -e '.[test]'"),
    Part("ruff", "linting and formatting", "pip install -e '.[dev]'"),
    Part("mypy", "type checking", "pip install -e '.[dev]'"),
)


@dataclass(frozen=True)
class Line:
    """One finding: ``state`` is "ok", "note" (worth knowing, harmless) or "bad" (mmalign will not work)."""

    name: str
    value: str
    state: str = "ok"
    fix: str = ""


@dataclass
class Findings:
    """All that was looked at, by section."""

    sections: dict[str, list[Line]] = field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether nothing is bad."""
        return all(line.state != "bad" for lines in self.sections.values() for line in lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``{"healthy": bool, section: [{"name", "value", "state", "fix"}]}``."""
        sections = {name: [asdict(line) for line in lines] for name, lines in self.sections.items()}
        return {"healthy": self.healthy, **sections}


def examine() -> Findings:
    """Look at everything; takes a few seconds, since torch is imported to ask for devices."""
    return Findings(
        {
            "versions": _versions(),
            "devices": _devices(),
            "decoders": _decoders(),
            "optional": _optional(),
            "folders": _folders(),
            "environment": _environment(),
        }
    )


def render(findings: Findings) -> None:
    """Print the findings for a person, with the commands that mend things at the end of their lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    colours = {"ok": "green", "note": "yellow", "bad": "bold red"}
    for name, lines in findings.sections.items():
        table.add_row(Text(name, style="bold"))
        for line in lines:
            value = Text(line.value)
            if line.fix:
                value.append(f"  ->  {line.fix}", style="cyan")
            table.add_row(Text(f"  {line.name}"), Text(line.state, style=colours[line.state]), value)
    console.print(table)
    verdict = (
        "Everything that mmalign needs is here." if findings.healthy else "mmalign will not work: see `bad` above."
    )
    console.print(Text(verdict, style=colours["ok" if findings.healthy else "bad"]))


def _versions() -> list[Line]:
    """Python, mmalign, and every base requirement against the lower bound that mmalign declares."""
    python = platform.python_version()
    old = sys.version_info < (3, 11)
    lines = [
        Line(
            "python",
            f"{python} ({sys.executable})",
            "bad" if old else "ok",
            "install Python 3.11 or newer" if old else "",
        ),
        Line("mmalign", f"{__version__} ({Path(__file__).resolve().parent})"),
        Line("platform", platform.platform()),
    ]
    try:
        declared = importlib.metadata.requires("mmalign") or []
    except importlib.metadata.PackageNotFoundError:
        return [*lines, Line("install", "mmalign itself is not installed", "bad", "pip install -e .")]
    from packaging.requirements import Requirement

    for text in declared:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            lines.append(_requirement(requirement.name, requirement.specifier))
    return lines


def _requirement(name: str, specifier: Any) -> Line:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Line(name, f"missing, {specifier} is needed", "bad", f"pip install '{name}{specifier}'")
    if not specifier.contains(version, prereleases=True):
        return Line(name, f"{version}, {specifier} is needed", "bad", f"pip install '{name}{specifier}'")
    return Line(name, version)


def _devices() -> list[Line]:
    lines = [Line("cpu", _cpu()), _memory()]
    try:
        import torch
    except Exception as error:  # a broken build raises anything from ImportError to OSError, and that is the finding
        return [*lines, Line("torch", f"cannot be imported: {error}", "bad", "pip install --force-reinstall torch")]
    lines.append(Line("torch threads", str(torch.get_num_threads())))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            kind = f"compute {card.major}.{card.minor}" if torch.version.cuda else "ROCm"
            lines.append(Line(f"cuda:{index}", f"{card.name}, {card.total_memory / GIB:.1f} GiB, {kind}"))
    else:
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        lines.append(Line("cuda", f"no device ({built}); the CPU is used", "note"))
    if torch.backends.mps.is_available():
        lines.append(Line("mps", "available"))
    return lines


def _cpu() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _read("/sys/fs/cgroup/cpu.max").split()
    quota = f", limited to {int(limit[0]) / int(limit[1]):.1f}" if len(limit) == 2 and limit[0] != "max" else ""
    return f"{usable} of {os.cpu_count()} cores{quota}, {platform.machine()}"


def _memory() -> Line:
    """Memory that a process can have: the machine's, or the control group's limit where that is lower."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return Line("memory", "unknown on this system", "note")
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdecimal():
        size = min(size, int(limit))
    return Line("memory", f"{size / GIB:.1f} GiB", "ok" if size >= 4 * GIB else "note")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""  # no control groups of version 2 here: then there is no limit to report


def _decoders() -> list[Line]:
    lines = []
    try:
        import av

        libavcodec = ".".join(str(part) for part in av.library_versions["libavcodec"])
        lines.append(Line("pyav", f"{av.__version__} (libavcodec {libavcodec})"))
    except Exception as error:  # as for torch: whatever it raises is the finding
        lines.append(Line("pyav", f"cannot be imported: {error}", "bad", "pip install --force-reinstall av"))
    try:
        import decord

        lines.append(Line("decord", str(decord.__version__)))
    except ModuleNotFoundError:
        wheel = platform.system() == "Linux" and platform.machine() == "x86_64"
        fix = "pip install decord" if wheel else ""
        lines.append(Line("decord", "not installed; PyAV decodes, with the same frames", "note", fix))
    except Exception as error:
        lines.append(
            Line("decord", f"cannot be imported: {error}; PyAV decodes", "note", "pip install --force-reinstall decord")
        )
    return lines


def _optional() -> list[Line]:
    lines = []
    for part in OPTIONAL:
        if importlib.util.find_spec(part.module) is None:
            lines.append(Line(part.module, f"not installed ({part.purpose})", "note", part.install))
        else:
            lines.append(Line(part.module, f"{_version(part.module)} ({part.purpose})"))
    return lines


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def _folders() -> list[Line]:
    from mmalign.cache import default_root
    from mmalign.paths import shipped

    lines = [_space("cache", default_root()), _space("here", Path.cwd())]
    for name in ("configs", "assets"):
        try:
            lines.append(Line(name, str(shipped(name))))
        except ValueError as error:
            lines.append(Line(name, str(error), "bad", "pip install -e ."))
    return lines


def _space(name: str, folder: Path) -> Line:
    """Free space of a folder that may not exist yet, and whether it can be written."""
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    if not os.access(there, os.W_OK):
        fix = "export MMALIGN_CACHE=/a/folder/that/can/be/written" if name == "cache" else "work in another folder"
        return Line(name, f"{folder}: cannot be written", "bad" if name == "cache" else "note", fix)
    free = shutil.disk_usage(there).free / GIB
    text = f"{folder}: {free:.1f} GiB free"
    return Line(name, text) if free >= 2 else Line(name, text, "note", "`mmalign cache clear` frees some")


def _environment() -> list[Line]:
    lines = [Line(name, os.environ.get(name, "not set")) for name in OFFLINE_VARIABLES]
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    says = "off: model folders only" if offline else "possible, but mmalign downloads nothing while training or scoring"
    return [*lines, Line("model hub", says)]
