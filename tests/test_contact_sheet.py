"""The contact sheet as a file: complete, escaped, fetching nothing; what it does in a browser is in test_browser.py."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from media_kit import moving, picture
from report_kit import row, write
from typer.testing import CliRunner

from mmalign import report_sheet
from mmalign.cli import app
from mmalign.media import write_image, write_video
from mmalign.media_table import MediaRow, write_media_table
from mmalign.report_sheet import build

HOSTILE = """</script><script>alert(1)</script> "><img src=x onerror=alert(2)> & 'so' https://example.com/a.png"""


def _page(path: Path) -> tuple[str, dict[str, Any]]:
    """The page, and what its script is given."""
    html = path.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert found
    return html, json.loads(found[1])


def _run(folder: Path, count: int = 6, **aux: Any) -> Path:
    """A folder as sampling leaves it: pictures and, for every third, a clip."""
    rows = []
    for i in range(count):
        clip = i % 3 == 2
        place = folder / "images" / f"{i:06d}-0.{'mp4' if clip else 'png'}"
        if clip:
            write_video(place, moving(4, 32, 32), 8)
        else:
            write_image(place, picture(8, 12, seed=i))
        kind = "video" if clip else "image"
        told = {"reward": i / 10, "baseline_reward": 1 - i / 10, "costs": {"network_calls": 60}, "kind": "best_of_n"}
        rows.append(MediaRow(f"{i:06d}-0", f"prompt {i}", str(place), kind, seed=i, model="base", aux=told | aux))
    write_media_table(folder / "table.jsonl", rows)
    return folder


def test_a_folder_of_samples_gets_a_page_beside_its_media(tmp_path: Path) -> None:
    path = build([_run(tmp_path / "my run")])
    assert path == tmp_path / "my run/index.html"
    html, data = _page(path)
    assert "<title>my run: contact sheet</title>" in html and "The media are files beside this page" in html
    assert [score["label"] for score in data["scores"]] == ["reward", "baseline_reward", "costs/network_calls"]
    assert [item["scores"] for item in data["items"]] == [[i / 10, 1 - i / 10, 60] for i in range(6)]
    assert [item["src"] for item in data["items"]][:3] == [
        "images/000000-0.png", "images/000001-0.png", "images/000002-0.mp4",
    ]  # fmt: skip
    assert [item["clip"] for item in data["items"]] == [False, False, True] * 2
    assert all((path.parent / item["src"]).is_file() for item in data["items"])
    assert data["items"][0]["notes"] == [["kind", "best_of_n"]] and data["items"][4]["seed"] == 4


def test_scores_come_from_results(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 4)
    name = [f"{i:06d}-0" for i in range(4)]
    files = [run / "images" / f"{sample}.{'mp4' if i == 2 else 'png'}" for i, sample in enumerate(name)]
    rows = [row(name[i], i * 1.5, files[i], seed=i) for i in range(3)]
    rows += [
        row(name[3], None, files[3], status="error", reason="bad <b>file</b>"),
        row(name[0], np.nan, files[0], "x"),
    ]
    rows += [row(name[1], 0.5, files[1], "flicker", "mean"), row("(whole set)", 3.0, "4 items", "fid", prompt=None)]
    config = {"table": str(run / "table.jsonl")}
    folder = write(run / "scores", rows, config, {"hps": True, "x": True, "flicker": False, "fid": False})
    data = _page(build([run]))[1]
    labels = [score["label"] for score in data["scores"]]
    assert labels == ["reward", "baseline_reward", "costs/network_calls", "hps", "x", "flicker/mean"]
    assert [score["lower"] for score in data["scores"]] == [False] * 5 + [True]
    values = {item["sample"]: dict(zip(labels, item["scores"], strict=True)) for item in data["items"]}
    assert [values[sample]["hps"] for sample in name] == [0.0, 1.5, 3.0, None]
    assert values[name[1]]["flicker/mean"] == 0.5 and values[name[0]]["flicker/mean"] is None
    assert data["items"][3]["reasons"] == {str(labels.index("hps")): "error: bad <b>file</b>"}
    assert data["items"][0]["reasons"] == {str(labels.index("x")): "ok: the score is not a finite number"}
    assert data["items"][1]["reasons"] == {}
    beside = _page(build([folder]))[1]  # the results by themselves lead to the same
    assert [item["scores"] for item in beside["items"]] == [item["scores"] for item in data["items"]]
    assert beside["items"][2]["src"] == "../images/000002-0.mp4" and beside["items"][2]["clip"]


def test_results_will_do_where_the_table_is_gone(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", picture(8, 8))
    write_video(tmp_path / "b.mp4", moving(3, 32, 32), 8)
    rows = [row("a", 1.0, tmp_path / "a.png", model="m", seed=3), row("b", 2.0, "b.mp4"), row("c", 3.0, "gone.png")]
    data = _page(build([write(tmp_path / "scores", rows)], tmp_path / "page.html"))[1]
    assert [item.get("src") for item in data["items"]] == ["a.png", "b.mp4", None]
    assert [item["clip"] for item in data["items"]] == [False, True, False]
    assert data["items"][2]["fault"] == "gone.png: no such file"
    assert (data["items"][0]["model"], data["items"][0]["seed"], data["items"][0]["prompt"]) == ("m", 3, "prompt a")


def test_several_sources_are_told_apart(tmp_path: Path) -> None:
    folders = []
    for name in ("base", "aligned"):
        run = _run(tmp_path / name / "samples", 2)
        rows = [row(f"{i:06d}-0", float(i), run / f"images/{i:06d}-0.png") for i in range(2)]
        folders.append(write(run / "scores", rows, {"table": str(run / "table.jsonl")}))
    html, data = _page(build(folders, tmp_path / "both.html"))
    assert [item["model"] for item in data["items"]] == ["base/samples"] * 2 + ["aligned/samples"] * 2
    assert '<option value="aligned/samples">' in html and len(data["items"]) == 4
    assert data["items"][3]["src"] == "aligned/samples/images/000001-0.png"


# ------------------------------------------------------------------------------------------------ safe to open


def test_hostile_texts_and_names_stay_texts(tmp_path: Path) -> None:
    place = tmp_path / "javascript:alert(1)#?%41 ä.png"
    write_image(place, picture(8, 8))
    rows = [MediaRow(HOSTILE, HOSTILE, str(place), model=HOSTILE, aux={HOSTILE: 1.0, "note": HOSTILE, "x": "\ud800"})]
    write_media_table(tmp_path / "table.jsonl", rows)
    path = build([tmp_path], title=HOSTILE)
    html, data = _page(path)
    assert html.count("<script") == html.count("</script>") == 2 and "<img src=x" not in html
    assert data["items"][0]["prompt"] == HOSTILE == data["items"][0]["sample"] == data["scores"][0]["label"]
    assert data["items"][0]["src"] == "javascript%3Aalert%281%29%23%3F%2541%20%C3%A4.png"


def test_only_its_own_script_may_run_and_nothing_is_fetched(tmp_path: Path) -> None:
    linked, embedded = build([_run(tmp_path / "run")]), build([tmp_path / "run"], tmp_path / "e.html", embed=True)
    for path, own in ((linked, True), (embedded, False)):
        html = path.read_text(encoding="utf-8")
        script = html.rsplit("<script>", 1)[1].split("</script>")[0]
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        found = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
        assert found
        policy = dict(part.strip().split(" ", 1) for part in unescape(found[1]).split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == f"'sha256-{digest}'"
        assert policy["img-src"] == policy["media-src"] == ("data: 'self' file:" if own else "data:")
        assert not re.findall(r"https?://", html) and "url(" not in html and "@import" not in html
        assert "innerHTML" not in script and "eval(" not in script and " on" not in re.findall(r"<body[^>]*>", html)[0]


def test_a_page_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    _run(tmp_path, 1)
    (tmp_path / "index.html").write_text("<title>my site</title>")
    with pytest.raises(ValueError, match=r"index\.html is there and no contact sheet; name another file with --output"):
        build([tmp_path])
    build([tmp_path], tmp_path / "index.html")
    build([tmp_path])  # its own


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a table, a folder of media or a results folder"):
        build([])
    with pytest.raises(ValueError, match="nothing does not exist"):
        build([tmp_path / "nothing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="without a picture or clip"):
        build([tmp_path / "empty"])


# ------------------------------------------------------------------------------------------------ media inside


def test_embedded_media_need_no_files(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 3)
    path = build([run], tmp_path / "e.html", embed=True)
    html, data = _page(path)
    assert "beside this page" not in html
    assert [item["src"][:15] for item in data["items"]] == ["data:image/webp", "data:image/webp", "data:video/mp4;"]
    assert data["items"][2]["poster"].startswith("data:image/webp")
    assert path.read_bytes() == build([run], tmp_path / "e.html", embed=True).read_bytes()


def test_what_is_over_the_budget_is_linked_and_said(tmp_path: Path) -> None:
    path = build([_run(tmp_path / "run", 6)], tmp_path / "e.html", embed=True, budget=1500)
    html, data = _page(path)
    inside = [item["src"].startswith("data:") for item in data["items"]]
    assert 0 < sum(inside) < 6 and inside == sorted(inside, reverse=True)
    assert f"The first {sum(inside)} items are inside this page; {6 - sum(inside)} more would have made it too" in html
    assert data["items"][5]["src"] == "run/images/000005-0.mp4"


def test_media_inside_parquet_and_broken_ones(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png", picture(8, 8))
    cells = [(tmp_path / "x.png").read_bytes(), b"no picture at all"]
    pq.write_table(pa.table({"sample": ["a", "b"], "prompt": ["p", "q"], "media": cells}), tmp_path / "table.parquet")
    html, data = _page(build([tmp_path / "table.parquet"]))
    assert data["items"][0]["src"].startswith("data:image/webp") and "file" not in data["items"][0]
    assert "holds text, not an image" in data["items"][1]["fault"] and "cannot be read: 1." in html


def test_many_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_image(tmp_path / "x.png", picture(8, 8))
    rows = []
    for i in range(2000):
        os.link(tmp_path / "x.png", tmp_path / f"{i}.png")
        rows.append(MediaRow(str(i), f"a prompt of some length, number {i}", str(tmp_path / f"{i}.png"), seed=i))
    write_media_table(tmp_path / "table.jsonl", rows)
    path = build([tmp_path])
    assert len(_page(path)[1]["items"]) == 2000 and path.stat().st_size < 1e6
    monkeypatch.setattr(report_sheet, "MOST", 50)
    html, data = _page(build([tmp_path]))
    assert len(data["items"]) == 50 and "The first 50 of 2,000 items are shown." in html


def test_the_verb(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 2)
    done = CliRunner().invoke(app, ["contact", str(run), "--title", "Mine"])
    assert done.exit_code == 0 and "contact sheet:" in done.stdout
    assert "<h1>Mine</h1>" in (run / "index.html").read_text()
    done = CliRunner().invoke(app, ["contact", str(run), "--embed", "-o", str(tmp_path / "m.html")])
    assert done.exit_code == 0 and "data:image/webp" in (tmp_path / "m.html").read_text()
