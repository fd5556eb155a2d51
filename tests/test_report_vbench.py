"""The report's section on VBench: figures, marks of what is not comparable, the picture, the quirks."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from report_kit import HOSTILE, Page, picture, row, write

from mmalign.report import build
from mmalign.report_plots import Bar, Mark, bars
from mmalign.vbench.leaderboard import I2V_ROWS, ROWS
from mmalign.vbench.record import DimensionScore, Figure, VBenchRecord, write_record
from mmalign.vbench.score import normalise, t2v_totals

DASH = "\u2013"


def record(scores: dict[str, float], **changes: Any) -> VBenchRecord:
    dimensions = tuple(
        DimensionScore(name, "substitute" if "@" in name else "exact", value, n=10, expected=10,
                       ci95=(value - 0.01, value + 0.01), normalised=None if "@" in name else normalise(name, value))
        for name, value in scores.items()
    )  # fmt: skip
    values: dict[str, Any] = {
        "dimensions": dimensions, "totals": t2v_totals(scores), "rules": "compat", "decoder": "PyAV 18.1.0",
        "quirks": ("color_substring", "of_the_future"), "libraries": {"torch": "2.15.0"},
    }  # fmt: skip
    return VBenchRecord(**(values | changes))


def folder(home: Path, name: str, found: VBenchRecord) -> Path:
    rows = [row(str(i), 0.5 + i / 10, picture(home / name / f"{i}.png"), "color", model=name, seed=i) for i in range(3)]
    made = write(home / f"{name}-scores", rows, directions={"color": True})
    write_record(found, made)
    return made


def cells(page: Page, **wanted: str) -> list[str]:
    return next(text for _, text in page.find("tr", **wanted)).split()


def test_the_board_beside_one_model(tmp_path: Path) -> None:
    scores = dict(ROWS["Latte-1"].scores)
    scores["color@clip"] = scores.pop("color")
    made = folder(tmp_path, "mine", record(scores))
    page = Page(build([made], tmp_path / "report.html").read_text(encoding="utf-8"))
    section = next(text for _, text in page.find("section", id="vbench"))
    assert "◆ Latte-1" in section and "● Open-Sora-2.0" in section, "the three best and the nearest"
    assert cells(page, data_dimension="scene")[:6] == ["scene", "36.26", "[35.26,", "37.26]", "44.10", "10"]
    assert cells(page, data_dimension="scene")[-1] == "36.26"
    substitute = cells(page, data_dimension="color@clip")
    assert "substitute" in substitute and substitute[-4:] == [DASH] * 4, "on no board"
    assert "mine: color@clip are substitutes, and not leaderboard-comparable." in section
    assert "color missing in semantic, which has no figure" in section
    assert cells(page, data_total="semantic")[1] == DASH and cells(page, data_total="quality")[1] == "79.71"
    assert "2 quirks of the reference in force" in section and "'red' is in 'covered' and 'colored'" in section
    assert "not known to this version" in section and "PyAV 18.1.0" in section
    drawing = next(attrs for attrs, _ in page.find("svg", aria_label="Normalised scores of VBench's dimensions"))
    assert drawing


def test_named_rows_and_two_models(tmp_path: Path) -> None:
    a = folder(tmp_path, "base", record(dict(ROWS["Gen-2"].scores)))
    b = folder(tmp_path, "tuned <i>&", record(dict(ROWS["Gen-3"].scores), rules="strict"))
    text = build([a, b], tmp_path / "r.html", vbench_against=["kling"]).read_text(encoding="utf-8")
    page = Page(text)
    head = next(text for _, text in page.find("section", id="vbench"))
    assert "● Kling" in head and "Open-Sora" not in head
    assert cells(page, data_total="total") == ["total", "80.58", "82.32", "81.84"]
    assert "tuned <i>&: strict rules repair the reference's quirks" in head
    with pytest.raises(ValueError, match=r"did you mean Kling\?"):
        build([a], tmp_path / "r.html", vbench_against=["Klinng"])


def test_missing_clips_are_told_with_their_bounds(tmp_path: Path) -> None:
    whole = record({"scene": 0.5})
    short = dataclasses.replace(whole.dimensions[0], n=7, coverage=None, missing=3, bounds=(0.35, 0.65), notes=("few",))
    totals = {"semantic": Figure(0.7, (0.6, 0.8), (0.5, 0.9), substitutes=("color@clip",))}
    made = folder(tmp_path, "m", dataclasses.replace(whole, dimensions=(short,), totals=totals, mode="custom"))
    page = Page(build([made], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert " ".join(cells(page, data_dimension="scene")[5:11]) == "7 of 10 35.00 to 65.00"
    assert "not leaderboard-comparable 70.00 [60.00, 80.00]" in " ".join(cells(page, data_total="semantic"))
    section = next(text for _, text in page.find("section", id="vbench"))
    for words in ("clips without a score: scene 7 of 10", "clips of the custom mode", "m: scene: few"):
        assert words in section


def test_image_to_video_has_its_own_board(tmp_path: Path) -> None:
    scores = dict(I2V_ROWS["SEINE-512x320"].scores)
    found = record(scores, totals={"i2v_total": Figure(0.8)})
    page = Page(build([folder(tmp_path, "x", found)], tmp_path / "r.html").read_text(encoding="utf-8"))
    assert "DynamiCrafter-1024" in next(text for _, text in page.find("section", id="vbench"))
    assert "86.52" in cells(page, data_total="i2v total")


def test_reports_without_a_record_have_no_section(tmp_path: Path) -> None:
    made = write(tmp_path / "s", [row("0", 0.5, picture(tmp_path / "0.png"))])
    assert "VBench" not in build([made], tmp_path / "r.html").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"no folder holds a vbench\.json"):
        build([made], tmp_path / "r.html", vbench_against=["Kling"])
    (made / "vbench.json").write_text('{"dimensions": 3}')
    with pytest.raises(ValueError, match=r"vbench\.json is no VBench record: dimensions"):
        build([made], tmp_path / "r.html")


def test_texts_of_a_record_stay_texts(tmp_path: Path) -> None:
    found = record({"scene": 0.5}, quirks=(HOSTILE,), decoder=HOSTILE, libraries={HOSTILE: HOSTILE})
    scene = dataclasses.replace(found.dimensions[0], notes=(HOSTILE,))
    odd = DimensionScore(f"{HOSTILE}@x", "substitute", 0.4, 1, 1)
    text = build(
        [folder(tmp_path, "m", dataclasses.replace(found, dimensions=(scene, odd)))], tmp_path / "r.html"
    ).read_text()
    page = Page(text)
    assert not list(page.find("script")) and "<img src=x" not in text
    assert not [attrs for attrs, _ in page.find("a") if not attrs["href"].startswith("#")]


def test_the_drawing() -> None:
    rows = [
        Bar("scene", [(1, 0.5, (0.4, 0.6)), (2, 0.7, None)], [Mark(0, 1.2)]),
        Bar("a@b", [(1, 0.2, None)], hollow=True),
        Bar("background_consistency[model=cad09670]", [(1, 0.2, None)], hollow=True),
        Bar("x" * 40, [(1, 0.2, None)], hollow=True),
    ]
    svg = bars(rows, "scores & more")
    assert 'aria-label="scores &amp; more"' in svg and ">scene<" in svg and ">a@b<" in svg
    assert ">background_consistency<" in svg and ">[model=cad09670]<" in svg, "cut by the edge on one line"
    assert f">{'x' * 25}…<" in svg
    assert len(re.findall(r"fill: var\(--c1\)", svg)) == 1, "a hollow bar has an outline alone"
    assert "stroke: var(--c1)" in svg and svg == bars(rows, "scores & more"), "the same text every time"
