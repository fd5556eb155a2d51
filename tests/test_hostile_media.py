"""Seven hundred odd, broken and hostile files: read as stated, or a row with a reason; nothing hangs or crashes."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_bomb_kit import hostile
from hostile_kit import Case, every_case, lay_out, plain, png, ramp
from hostile_still_kit import stills
from plugin_package import install
from report_kit import Page
from scorer_kit import clip_folder

from mmalign.media import MediaError, content_hash, image_size, is_video, read_image, read_video
from mmalign.results import read_results
from mmalign.source import shown, well_formed

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as mmalign.media does outside of pytest
LOOKS = '''
import torch

from mmalign.evaluation import AllFrames, Evaluator


class Looks(Evaluator):
    """What an evaluator gets to see of an item: its size, and its mean colour from 0 to 255."""

    needs, modality, frames = {"frames"}, {"image", "video"}, AllFrames()
    licence, source = "Apache-2.0", "a test"

    def score(self, batch):
        rows = [[*clip.shape[::2], clip.shape[3], *clip.double().mean(dim=(0, 2, 3))] for clip in batch.clips()]
        table = torch.tensor(rows, dtype=torch.float64)
        return dict(zip(("frames", "height", "width", "red", "green", "blue"), table.unbind(1)))
'''
# Not ru_maxrss, which a new process inherits from the one that starts it.
PEAK = """
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""
CHILD = f"""
import json, os, resource, sys
from mmalign import cli
{PEAK}

sys.argv[0] = "mmalign"
code = 1
try:
    cli.main()
    code = 0
except SystemExit as end:
    code = end.code or 0
most = max(peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
print(json.dumps({{"code": code, "peak": most * 1024}}))
"""


@pytest.fixture(name="cases", scope="module")
def _cases() -> list[Case]:
    return every_case()


def unlike(found: np.ndarray | str, case: Case) -> str | None:
    """What is wrong with what became of a case: its pixels or the reason why there are none."""
    if isinstance(found, str):
        if case.reason is None and not case.either:
            return f"refused: {found}"
        return None if case.reason is None or re.search(case.reason, found) else f"reason {found!r} for {case.reason!r}"
    if case.reason is not None and not case.either:
        return f"read as {found.shape}"
    if case.pixels is None:
        return None
    if found.shape != case.pixels.shape:
        return f"shape {found.shape} for {case.pixels.shape}"
    off = int(np.abs(found.astype(int) - case.pixels).max())
    return f"pixels differ by {off}" if off > case.tolerance else None


def read(case: Case) -> np.ndarray | str:
    try:
        if case.modality == "image":
            return read_image(case.data)
        return read_video(case.data).frames.permute(0, 2, 3, 1).numpy()
    except MediaError as error:
        return error.problem


def test_every_file_is_read_as_stated_or_refused_with_its_reason(cases: list[Case]) -> None:
    assert len(cases) >= 500 and len({case.name for case in cases}) == len(cases)
    assert sum(len(case.data) for case in cases) < 4 << 20
    wrong = {shown(case.name): problem for case in cases if (problem := unlike(read(case), case)) is not None}
    assert not wrong
    again = {case.name: case.data for case in (*stills(), *hostile())}
    assert all(case.data == again.get(case.name, case.data) for case in cases), "made from fixed seeds"


def test_the_size_from_the_header_is_that_of_the_picture(cases: list[Case]) -> None:
    for case in cases:
        if case.modality == "image" and isinstance(found := read(case), np.ndarray):
            assert image_size(case.data) == found.shape[:2], case.name


# ------------------------------------------------------------------------------------------------ what is no file


def strange(folder: Path) -> list[tuple[str, str, str | None]]:
    """(path as a table has it, modality, pattern of the reason or None where it is read)."""
    good = plain()["rgb.png"][0]
    (folder / "real.png").write_bytes(good)
    (folder / "folder.png").mkdir()
    for name in ("pipe.png", "pipe.mp4"):
        os.mkfifo(folder / name)
    os.mknod(folder / "socket.png", stat.S_IFSOCK | 0o600)
    targets = {"endless": "/dev/zero", "loop": "loop.png", "gone": "nowhere.png", "link": "real.png"}
    for name, target in targets.items():
        (folder / f"{name}.png").symlink_to(target)
    (folder / "locked.png").write_bytes(good)
    (folder / "locked.png").chmod(0)
    for name, size in (("hole.png", 1 << 40), ("hole.mp4", 1 << 40), ("text.png", 3 << 30)):
        with open(folder / name, "wb") as file:
            if name == "text.png":  # a text chunk of 2 GiB
                file.write(png((9, 9), 8, 2, b"")[:33] + (2**31 - 1).to_bytes(4) + b"tEXt")
            file.truncate(size)
    device = "is a pipe, socket or device, not a file"
    locked = None if os.access(folder / "locked.png", os.R_OK) else "check its permissions"
    return [
        ("folder.png", "image", "is a folder.*; name one file"), ("pipe.png", "image", device),
        ("pipe.mp4", "video", device), ("socket.png", "image", device), ("endless.png", "image", device),
        ("loop.png", "image", "a link that leads back to itself"), ("gone.png", "image", "no such file; check"),
        ("link.png", "image", None), ("absent.png", "image", "no such file"), ("locked.png", "image", locked),
        ("real.png/a.png", "image", "no such file"), ("http://example.com/a.png", "image", "no such file"),
        ("hole.png", "image", r"a file of 1,024.0 GiB, more than"), ("hole.mp4", "video", r"a file of 1,024.0 GiB"),
        ("text.png", "image", "a file of 3.0 GiB, more than 1;"), ("/proc/self/mem", "image", "is empty"),
        ("nul\0.png", "image", "no path that a file"), ("half\ud800.png", "image", "no path that a file can have"),
        ("n" * 300 + ".png", "image", "shorten the path"),
    ]  # fmt: skip


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    for name, _, reason in strange(tmp_path):
        path = os.path.join(tmp_path, name)
        for look in (read_image, read_video, content_hash, image_size, lambda p: is_video(f"{p}.unknown")):
            if reason is None or look not in (read_image, content_hash):
                try:
                    look(path)
                except MediaError:
                    continue
            elif look is read_image or "GiB, more than 1;" not in reason:
                with pytest.raises(MediaError, match=reason) as caught:
                    look(path)
                assert str(caught.value).isprintable()


# ------------------------------------------------------------------------------------------------ memory

BOMBS = f"""
import sys, threading
from mmalign.media import MAX_PIXELS, read_image
{PEAK}
data = open(sys.argv[1], "rb").read()
before = peak()
threads = [threading.Thread(target=lambda: sizes.append(read_image(data).size)) for _ in range(4)]
sizes = []
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert sizes == [3 * 10_000 * 9_999] * 4 and 10_000 * 9_999 < MAX_PIXELS
print(peak() - before)
"""


def test_pictures_just_below_the_limit_are_decoded_one_after_the_other(tmp_path: Path) -> None:
    """12 kB each, that become 300 MB: whatever the number of threads, one of them is decoded at a time."""
    (tmp_path / "bomb.png").write_bytes(png((10_000, 9_999), 1, 0, bytes(1251 * 9_999)))
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    command = [sys.executable, "-c", BOMBS, str(tmp_path / "bomb.png")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=240).stdout) * 1024
    assert 300 << 20 < grown < 800 << 20


# ------------------------------------------------------------------------------------------------ the run


def mmalign(site: Path, *arguments: Any) -> tuple[dict[str, Any], str]:
    """The command line in a process of its own: its exit code and peak of memory, and what it printed."""
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    said, _, last = done.stdout.rstrip().rpartition("\n")
    assert "Traceback" not in done.stderr, done.stderr
    return json.loads(last), said


@pytest.fixture(name="scored", scope="module")
def _scored(cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Good files alone, and then all files, through `mmalign score` with two evaluators."""
    home = tmp_path_factory.mktemp("hostile")
    site = install(home / "site", {"looks": "looks_code:Looks"}, "looks", LOOKS)
    weights = clip_folder(home / "hps", "HPS_v2.1_compressed.safetensors").parent
    good = [case for case in cases if case.reason is None and not case.either]
    held: dict[str, Any] = {"home": home, "cases": {well_formed(case.name): case for case in cases}}
    for name, chosen in (("good", good), ("all", cases)):
        table = lay_out(home / name, chosen)
        if name == "all":
            listed = strange(home / name)
            odd = [{"sample": media, "media": media, "modality": kind, "prompt": "-"} for media, kind, _ in listed]
            table.write_text(table.read_text() + "".join(json.dumps(row) + "\n" for row in odd))
            held["strange"] = {well_formed(media): reason for media, _, reason in listed}
        out = home / f"{name}-scores"
        words = (
            "score",
            table,
            "-e",
            "looks",
            "-e",
            "hps",
            "-o",
            out,
            "--set",
            f"evaluators.1.params.checkpoint={weights}",
        )
        held[name], held[f"{name}-said"] = mmalign(site, *words, "--set", "device=cpu")
        held[f"{name}-results"] = read_results(out)
    yield held
    (home / "all" / "locked.png").chmod(0o600)


def test_the_run_ends_and_memory_is_bounded(scored: dict[str, Any]) -> None:
    assert (scored["good"]["code"], scored["all"]["code"]) == (0, 0)
    more = scored["all"]["peak"] - scored["good"]["peak"]
    assert more < 1 << 30, f"{more >> 20} MiB more than good files take"


def test_each_file_is_a_row_with_its_score_or_a_reason(scored: dict[str, Any]) -> None:
    results, cases = scored["all-results"], scored["cases"]
    rows = {(row["sample"], row["evaluator"], row["subscore"]): row for row in results.rows}
    names = [*cases, *scored["strange"]]
    parts = ("frames", "height", "width", "red", "green", "blue")
    assert set(rows) == {(n, "looks", part) for n in names for part in parts} | {(n, "hps", "score") for n in names}
    wrong: dict[str, str] = {}
    for name in names:
        row = rows[name, "hps", "score"]
        assert (row["status"] == "ok") == (rows[name, "looks", "red"]["status"] == "ok"), name
        if row["status"] != "ok":
            assert row["status"] == "error" and row["score"] is None and row["reason"].isprintable(), name
            expected = cases[name].reason if name in cases else scored["strange"][name]
            if not (name in cases and cases[name].either) and not re.search(expected or "^read", row["reason"]):
                wrong[name] = row["reason"]
            continue
        assert math.isfinite(row["score"])
        case = cases.get(name, Case("link.png", b"", pixels=ramp()))
        seen = [rows[name, "looks", part]["score"] for part in parts]
        if case.reason is not None and not case.either:
            wrong[name] = f"read as {seen}"
        elif case.pixels is not None:
            clip = case.pixels.reshape(-1, *case.pixels.shape[-3:])
            colour = clip.mean((0, 1, 2))
            if (
                seen[:3] != list(clip.shape[:3])
                or np.abs(np.array(seen[3:]) - colour).max() > min(case.tolerance, 20) + 1e-6
            ):
                wrong[name] = f"{seen} for {clip.shape} of {colour}"
    assert not wrong


def test_coverage_is_in_the_summary_the_report_and_on_the_command_line(scored: dict[str, Any]) -> None:
    from mmalign.report import build

    results, said = scored["all-results"], scored["all-said"]
    total = len(scored["cases"]) + len(scored["strange"])
    ok = sum(row["status"] == "ok" for row in results.rows if row["evaluator"] == "hps")
    for name in ("looks", "hps"):
        entry = results.summary["evaluators"][name]
        assert (entry["n_ok"], entry["n_skipped"], entry["n_error"]) == (ok, 0, total - ok)
        assert entry["coverage"] == pytest.approx(ok / total)
        assert sum(entry["reasons"].values()) + entry["other_reasons"] == total - ok
        counts = list(entry["reasons"].values())
        assert counts == sorted(counts, reverse=True) and counts[0] > 20, "reasons do not name the file, so they add up"
        assert f"{name}: {ok} of {total} scored ({100 * ok // total} %), {total - ok} failed" in said
    assert all(line.isprintable() for line in said.splitlines())
    assert said.count("for other reasons; parts/ has a row for each") == said.count("for the same reasons") == 1
    assert results.summary["n_rows"] == total
    html = build([results.folder], scored["home"] / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert f"hps all-scores {total} {ok} {100 * ok // total} % 0 {total - ok}" in " | ".join(
        text for _, text in page.find("tr")
    )
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)  # the page's own, which plays clips, and no other
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert html.count("<script") == len(scripts) == 1 and f"script-src 'sha256-{digests[0]}';" in html
    assert all(attributes["src"].startswith("data:") for attributes, _ in page.find("img"))
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", html)
    assert all(line.startswith(("looks: 2", "hps: 2", "results: ")) for line in scored["good-said"].splitlines())
