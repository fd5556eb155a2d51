"""Digests of media: the files' own, remembered while the files stay as they are, and never longer."""

import hashlib
import json
import logging
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_score import config, pictures

from mmalign import score_media
from mmalign.cache import Cache
from mmalign.media import MediaError
from mmalign.records import MediaRef
from mmalign.score import plan_for, run
from mmalign.score_media import media_hashes


@pytest.fixture(name="read", autouse=True)
def _read(tmp_path, monkeypatch):
    """The names of what is read to be hashed, and a cache of its own."""
    monkeypatch.setenv("MMALIGN_CACHE", str(tmp_path / "cache"))
    names, content_hash = [], score_media.content_hash

    def counted(source):
        names.append(Path(str(getattr(source, "file", source))).name)
        return content_hash(source)

    monkeypatch.setattr(score_media, "content_hash", counted)
    return names


@pytest.fixture(name="later")
def _later(monkeypatch):
    """The clock an hour on: files that were written now have long settled."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3600 * 10**9)


@pytest.fixture(name="files")
def _files(tmp_path):
    folder = tmp_path / "media"
    folder.mkdir()
    names = ["a.png", "b\n.png", "\udcff.png", "c.png"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(bytes([number]) * 70_000)
    return [str(folder / name) for name in names]


def truth(files):
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


def entry(tmp_path):
    (file,) = (tmp_path / "cache" / "digests").glob("*/*.safetensors")
    return file


@pytest.mark.usefixtures("later")
def test_a_second_run_reads_nothing_and_a_changed_file_is_read(files, read):
    assert media_hashes([*files, *files], "t") == truth(files) and len(read) == 4
    read.clear()
    assert media_hashes(files[::-1], "t") == truth(files) and read == []
    Path(files[0]).write_bytes(b"new" * 70_000)
    assert media_hashes(files, "t") == truth(files) and read == ["a.png"]
    read.clear()
    assert media_hashes(files, "t") == truth(files) and read == []
    assert media_hashes(files[:1], "another table") == truth(files[:1]) and read == ["a.png"]


@pytest.mark.usefixtures("later")
def test_a_change_that_hides_behind_size_and_time_is_seen(files, read):
    """The same number of other bytes, with the time of change set back, as copying and unpacking tools do."""
    os.utime(files[0], ns=(10**18, 10**18))
    media_hashes(files, "t")
    status = os.stat(files[0])
    time.sleep(0.05)  # more than a tick of the file system's clock
    Path(files[0]).write_bytes(bytes([9]) * 70_000)
    os.utime(files[0], ns=(10**18, 10**18))
    changed = os.stat(files[0])
    assert (changed.st_size, changed.st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    read.clear()
    assert media_hashes(files, "t") == truth(files) and read == ["a.png"]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("how", ["link", "rename"])
def test_another_file_of_the_same_size_and_times_is_seen(tmp_path, read, how):
    """Two folders that were written at once, as of two models: the name of one comes to mean the other."""
    for attempt in range(500):  # until both were written within a tick of the file system's clock
        base, tuned = (tmp_path / f"{name}-{attempt}" for name in ("base", "tuned"))
        for place in (base, tuned):
            place.mkdir()
            (place / "a.ppm").write_bytes(place.name[:1].encode() * 100)
        for place in (base, tuned):
            os.utime(place / "a.ppm", ns=(10**18, 10**18))
        if os.stat(base / "a.ppm").st_ctime_ns == os.stat(tuned / "a.ppm").st_ctime_ns:
            break
    else:
        pytest.skip("this file system's clock is too fine for two files of the same time")
    (tmp_path / "now").symlink_to(base)
    file = str(tmp_path / "now" / "a.ppm")
    assert media_hashes([file], "t") == truth([file]) and len(read) == 1
    (tmp_path / "now").unlink()
    if how == "link":
        (tmp_path / "now").symlink_to(tuned)
    else:
        tuned.rename(tmp_path / "now")
    assert media_hashes([file], "t") == truth([file]) and len(read) == 2


def test_inodes_of_any_size_are_remembered(files, read, monkeypatch, later):
    """Some network file systems count them to 2**64."""

    def large(path):
        found = {name: getattr(os.stat(path), name) for name in ("st_size", "st_mtime_ns", "st_ctime_ns")}
        return SimpleNamespace(**found, st_ino=(1 << 64) - 1)

    monkeypatch.setattr(score_media, "os", SimpleNamespace(stat=large, path=os.path))
    for _ in range(2):
        media_hashes(files[:1], "t")
    assert len(read) == 1


def test_what_changed_less_than_two_seconds_before_is_not_remembered(files, read, monkeypatch):
    """In steps of 2 s, as some file systems count, it could be written again without any sign."""
    written, now = os.stat(files[3]).st_ctime_ns, time.time_ns
    for seconds, remembered in ((0.0, False), (1.99, False), (2.0, True)):
        monkeypatch.setattr(time, "time_ns", lambda seconds=seconds: written + int(seconds * 1e9))
        media_hashes(files[3:], "t")
        read.clear()
        media_hashes(files[3:], "t")
        assert (read == []) is remembered, seconds
    monkeypatch.setattr(time, "time_ns", now)


def test_a_file_that_is_written_while_it_is_hashed_is_not_remembered(files, read, monkeypatch, later):
    counted = score_media.content_hash

    def meanwhile(source):
        digest = counted(source)
        Path(source).write_bytes(b"half" * 9)
        return digest

    monkeypatch.setattr(score_media, "content_hash", meanwhile)
    media_hashes(files[:1], "t")
    monkeypatch.setattr(score_media, "content_hash", counted)
    read.clear()
    assert media_hashes(files[:1], "t") == truth(files[:1]) and read == ["a.png"]


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_a_damaged_memory_costs_time_alone(files, read, tmp_path, damage):
    media_hashes(files, "t")
    blob = bytearray(entry(tmp_path).read_bytes())
    blob[-5] ^= 1
    entry(tmp_path).write_bytes({"cut": blob[:-9], "flipped": blob, "text": b"no tensors"}[damage])
    read.clear()
    with pytest.warns(UserWarning, match="is damaged"):
        assert media_hashes(files, "t") == truth(files)
    assert len(read) == 4
    read.clear()
    assert media_hashes(files, "t") == truth(files) and read == []


@pytest.mark.usefixtures("later")
def test_many_at_once_leave_a_whole_memory(files, read):
    """The last one's stays; each of them has right digests."""
    found, shares = {}, [files, files[1:], files[:2], files[2:]] * 3
    threads = [
        threading.Thread(target=lambda number=number, share=share: found.update({number: media_hashes(share, "t")}))
        for number, share in enumerate(shares)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[number] == truth(share) for number, share in enumerate(shares))
    assert media_hashes(files, "t") == truth(files)
    read.clear()
    assert media_hashes(files, "t") == truth(files) and read == []


@pytest.mark.usefixtures("later")
@pytest.mark.parametrize("place", ["file", "~no-such-user/cache"])
def test_without_a_folder_for_it_nothing_is_remembered_and_that_is_said(
    files, read, tmp_path, monkeypatch, place, caplog
):
    (tmp_path / "file").write_text("a file where the cache should be")
    monkeypatch.setenv("MMALIGN_CACHE", place if place.startswith("~") else str(tmp_path / place))
    with caplog.at_level(logging.WARNING):
        assert media_hashes(files, "t") == media_hashes(files, "t") == truth(files) and len(read) == 8
    assert "hashed anew" in caplog.text


@pytest.mark.usefixtures("later")
def test_an_interrupted_run_keeps_what_it_found(files, read, monkeypatch):
    counted = score_media.content_hash
    monkeypatch.setattr(score_media, "THREADS", 1)

    def interrupted(source):
        if Path(source).name == "c.png":
            raise KeyboardInterrupt
        return counted(source)

    monkeypatch.setattr(score_media, "content_hash", interrupted)
    with pytest.raises(KeyboardInterrupt):
        media_hashes(files, "t")
    monkeypatch.setattr(score_media, "content_hash", counted)
    read.clear()
    assert media_hashes(files, "t") == truth(files) and read == ["c.png"]


@pytest.mark.usefixtures("later")
def test_cells_and_files_that_cannot_be_read(files, read, tmp_path):
    """Pictures inside parquet are remembered by that file; what has no digest says why, each time."""
    pq.write_table(pa.table({"jpg": [b"one", b"two", b""]}), tmp_path / "cells.parquet")
    cells = [MediaRef(str(tmp_path / "cells.parquet"), row, "jpg") for row in range(3)]
    (tmp_path / "folder").mkdir()
    bad = [str(tmp_path / "absent.png"), str(tmp_path / "folder"), "\0", "\ud800.png", cells[2]]
    good = {**truth(files), cells[0]: hashlib.sha256(b"one").hexdigest(), cells[1]: hashlib.sha256(b"two").hexdigest()}
    for reads in (len(good) + len(bad) - 1, len(bad) - 1):  # of the folder no file is read
        read.clear()
        found = media_hashes([*good, *bad], "t")
        assert {source: found[source] for source in good} == good and len(read) == reads
        assert all(isinstance(found[source], MediaError) for source in bad)
    pq.write_table(pa.table({"jpg": [b"new", b"two", b""]}), tmp_path / "cells.parquet")
    assert media_hashes(cells, "t")[cells[0]] == hashlib.sha256(b"new").hexdigest()


def test_how_far_it_is_is_said(files, monkeypatch):
    said = []

    class Bar(score_media.Progress):
        def update(self, done, values=None):
            said.append((self.title, done, self.total))

    monkeypatch.setattr(score_media, "Progress", Bar)
    media_hashes(files, "t")
    assert said == [("hashing media", done, 4) for done in (1, 2, 3, 4)]


@pytest.mark.usefixtures("later", "plugins")
def test_a_second_run_and_a_dry_run_read_no_media(tmp_path, read):
    table = pictures(tmp_path, [10, 200, 10], ["a", "b", "c"])
    settings = config(table, tmp_path / "out", "brightness")
    folder = run(settings)
    assert len(read) == 3
    plan = plan_for(settings)
    assert len(read) == 3 and plan.items[0].media_hash == plan.items[2].media_hash != plan.items[1].media_hash
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes())
    run(settings)
    assert read[3:] == ["1.png"] and json.loads((folder / "run.json").read_text())["computed"] == 1
    assert {held.kind: held.entries for held in Cache().ls()}["digests"] == 1
    Cache().clear("digests")
    plan_for(settings)
    assert len(read) == 7
