"""The report page: self-contained, escaped, complete, and with the comparison's own figures."""

import os
import re

import numpy as np
import pytest
from PIL import Image
from report_kit import HOSTILE, Page, picture, row, training_run, write

from mmalign.compare import compare
from mmalign.figures import number, p_value, share_interval, signed_interval
from mmalign.report import build
from mmalign.results import read_results


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """12 prompts, of which `aligned` wins 8; hostile texts everywhere; two media and two scores missing."""
    home = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    folders = []
    for side, model in enumerate(("base", "aligned <i>&")):
        rows = []
        for i in range(12):
            media = home / f"{side}/{i}.png"
            if i != 5:
                picture(media, colour=tuple(int(c) for c in rng.integers(0, 255, 3)))
            more = {"model": model, "seed": i, "prompt": HOSTILE if i == 3 else f"prompt {i}"}
            gain = (0.1 + i / 100) if i < 8 else -(0.1 + i / 100)
            rows.append(row(str(i), i / 10 + side * gain, media, **more, note=f"saw <u>{i}</u>" if i > 8 else None))
            failed = {"score": None, "status": "error", "reason": "bad <u>file</u>"} if i == 0 else {}
            rows.append(row(str(i), 1 - i / 10, media, "artefacts", "blur", **more) | failed)
        config = {"table": str(home / "table.jsonl"), "note": "<em>config</em>"}
        folders.append(write(home / f"scores-{side}", rows, config, {"hps": True, "artefacts": False}))
    return folders, training_run(home / "run")


@pytest.fixture(scope="module")
def html(inputs, tmp_path_factory):
    folders, run = inputs
    path = build(folders, tmp_path_factory.mktemp("out") / "new/report.html", run=run)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_nothing_is_fetched_and_nothing_runs(page, html):
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "image", "use"}
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")], (tag, attrs)
        for name in ("src", "srcset", "href", "xlink:href", "data", "poster", "action", "background"):
            assert re.match(r"data:image/|#|$", attrs.get(name, "")), (tag, name, attrs[name][:80])
        assert not re.search(r"url\((?!#)", attrs.get("style", "") + attrs.get("clip-path", ""))
    styles = "".join(text for _, text in page.find("style"))
    assert "url(" not in styles and "@import" not in styles
    policy = next(attrs["content"] for attrs, _ in page.find("meta", http_equiv="Content-Security-Policy"))
    assert policy.startswith("default-src 'none'; img-src data:;") and "script-src" not in policy
    # the only address in the page is the one that a prompt mentions
    assert set(re.findall(r"https?://[^\s\"'&<]+", html)) == {"https://example.com/a.png"}


def test_hostile_text_is_shown_as_text(page, html):
    assert "<script" not in html and "onerror=alert(2)>" not in html
    prompts = [text for _, text in page.find("p", class_="prompt")]
    assert " ".join(HOSTILE.split()) in prompts
    assert {text for _, text in page.find("p", class_="wrote")} == {f"saw <u>{i}</u>" for i in (9, 10, 11)}
    assert "aligned <i>& against base" in next(text for _, text in page.find("h1"))
    everything = next(text for _, text in page.find("body"))
    for text in ("1 \N{MULTIPLICATION SIGN} bad <u>file</u>", "<em>config</em>", "# <b>bold</b>"):
        assert text in everything
    assert not {"i", "u", "em"} & {tag for tag, attrs in page.tags if not attrs.get("class")}


def test_figures_are_those_of_the_comparison(page, inputs):
    comparison = compare(*inputs[0])
    for score in comparison.scores:
        text = next(text for _, text in page.find("tr", data_score=score.label))
        for figure in (number(score.mean_a), number(score.mean_b), p_value(score.permutation_p), p_value(score.sign_p)):
            assert figure in text
        assert signed_interval(score.difference) in text and share_interval(score.wins) in text
    headline = comparison.score("hps")
    values = [float(attrs["data-value"]) for attrs, _ in page.find("div", class_="big") if "data-value" in attrs]
    assert values == [headline.wins.rate, headline.difference.mean]
    everything = next(text for _, text in page.find("body"))
    assert f"{headline.wins.wins} wins, {headline.wins.ties} ties, {headline.wins.losses} losses" in everything
    bars = [attrs["aria-label"] for attrs, _ in page.find("div", class_="track")]
    assert len(bars) == 1 + len(comparison.scores) and share_interval(headline.wins) in bars[0]


def test_a_verdict_needs_an_interval_that_excludes_a_draw(page, tmp_path, inputs):
    assert "No clear winner between aligned <i>& and base by hps." in next(t for _, t in page.find("p", class_="lead"))
    media = picture(tmp_path / "x.png")
    low, high = ([row(str(i), x + i / 100, media) for i in range(20)] for x in (0, 1))
    worse = build([write(tmp_path / "a", high), write(tmp_path / "b", low)], tmp_path / "r.html")
    assert "b loses to a by hps." in worse.read_text()
    better = build([tmp_path / "b", tmp_path / "a"], tmp_path / "r.html")
    assert "a beats b by hps." in better.read_text()


def test_gains_losses_and_extremes_are_in_order(page):
    cards = [text for _, text in page.find("article", class_="pair")]
    changes = [re.search(r"seed (\d+) ([+-]?[\d.]+)$", text).groups() for text in cards]
    gains, losses = changes[:6], changes[6:10]
    assert [seed for seed, _ in gains] == ["7", "6", "5", "4", "3", "2"] and gains[0][1] == "+0.170"
    assert [seed for seed, _ in losses] == ["11", "10", "9", "8"] and losses[0][1] == "-0.210"
    figures = [text for _, text in page.find("figure")]
    strips = figures[2 * len(cards) :]
    assert strips[0].startswith("1.10 prompt 11") and strips[6].startswith("0 prompt 0")
    # by `artefacts/blur` lower is better: sample 11 has the lowest, and sample 0 has none
    assert strips[24].startswith("-0.100 prompt 11") and strips[24 + 6].startswith("0.900 prompt 1")


def test_missing_media_show_a_placeholder_and_are_counted(page, inputs):
    tiles = [attrs for attrs, _ in page.find("span", class_="missing")]
    assert tiles and all("no such file" in attrs["title"] and attrs["role"] == "img" for attrs in tiles)
    summary = [text for _, text in page.find("summary")]
    assert "2 of the 24 pictures chosen for this page could not be shown" in summary
    everything = next(text for _, text in page.find("body"))
    assert "0/5.png: no such file" in everything and "1/5.png: no such file" in everything


def test_counts_and_reasons_of_failures(page):
    rows = [text for _, text in page.find("tr")]
    assert "artefacts/blur base 12 11 91 % 0 1 3 3.0 1 \N{MULTIPLICATION SIGN} bad <u>file</u>" in rows
    assert "hps base 12 12 100 % 0 0 3 3.0" in rows
    remarks = next(text for _, text in page.find("ul", class_="remarks"))
    assert "left out because a side has no score: artefacts/blur 1" in remarks


def test_training_curves_config_and_versions(page):
    everything = next(text for _, text in page.find("body"))
    for text in (
        "run, 60 steps",
        "implicit_accuracy 0.5",
        "Odd thing",
        "loss: {kind: diffusion_dpo}",
        "1.2.3",
        "9.8.7",
    ):
        assert text in everything
    assert "Lines of metrics.jsonl that could not be read and are left out: 1." in everything
    drawn = [attrs["aria-label"] for attrs, _ in page.find("svg")]
    assert [label for label in drawn if label.startswith("Training")] == [
        "Training curves: loss",
        "Training curves: implicit_accuracy",
        "Training curves: margin",
        "Training curves: odd_thing",
    ]
    assert "Distribution of hps: base, aligned <i>&" in drawn


def test_the_same_input_gives_the_same_bytes(html, inputs, tmp_path):
    assert build(inputs[0], tmp_path / "again.html", run=inputs[1]).read_text(encoding="utf-8") == html


def test_a_given_comparison_is_shown_instead_of_a_new_one(inputs, tmp_path):
    given = compare(*inputs[0], names=("before", "after"), higher_is_better={"artefacts": True}, level=0.8)
    page = Page(build(inputs[0], tmp_path / "r.html", comparison=given, title="My title").read_text())
    assert next(text for _, text in page.find("h1")) == "My title"
    text = next(text for _, text in page.find("tr", data_score="artefacts/blur"))
    assert share_interval(given.score("artefacts/blur").wins) in text and "lower is better" not in text
    assert "win rate [80 %]" in next(text for _, text in page.find("thead")).replace("\xa0", " ")


def test_one_folder_needs_no_comparison(inputs, tmp_path):
    page = Page(build(inputs[0][:1], tmp_path / "one.html").read_text())
    text = next(text for _, text in page.find("tr", data_score="hps"))
    assert text.split()[:3] == ["hps", "12", number(0.55)]
    assert "Scores of base" in next(text for _, text in page.find("h1"))
    assert not list(page.find("article")) and len(list(page.find("div", class_="strip"))) == 4


def test_three_folders_are_each_compared_with_the_first(inputs, tmp_path):
    third = write(tmp_path / "third", [row(**fields(r, model="third")) for r in read_results(inputs[0][1]).rows])
    page = Page(build([*inputs[0], third], tmp_path / "three.html", rank_by=["hps"]).read_text())
    headings = [text for _, text in page.find("h3")]
    assert "third against base" in headings and "aligned <i>& against base" in headings
    assert len(list(page.find("tr", data_score="hps"))) == 2
    with pytest.raises(ValueError, match="3 results folders need 2 comparisons"):
        build([*inputs[0], third], tmp_path / "x.html", comparison=compare(*inputs[0]))


def fields(r: dict, **more) -> dict:
    return {
        k: v for k, v in r.items() if k in ("sample", "score", "media", "evaluator", "subscore", "prompt", "seed")
    } | more


def test_a_score_of_the_whole_set_has_no_interval_and_no_gallery(tmp_path):
    media = picture(tmp_path / "x.png")
    for name, fid in (("a", 30.0), ("b", 25.0)):
        whole = row("(whole set)", fid, "2 items", "fid", prompt=None)
        write(
            tmp_path / name, [row("1", 1.0, media), row("2", 2.0, media), whole], directions={"hps": True, "fid": False}
        )
    page = Page(build([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html").read_text())
    text = next(text for _, text in page.find("tr", data_score="fid"))
    assert text == "fid lower is better 1 30.00 25.00 -5.00 [–, –] – – –"  # noqa: RUF001
    assert "One figure for the whole set, hence without interval and test: fid." in next(
        t for _, t in page.find("ul", class_="remarks")
    )
    assert len(list(page.find("svg"))) == 1 and not list(page.find("span", class_="missing"))


@pytest.mark.parametrize("prompt", [None, ""])
def test_items_without_a_prompt_each_stand_for_themselves(tmp_path, prompt):
    media = picture(tmp_path / "x.png")
    scores = [0.0, 1.0, 2.0, 4.0, 3.0]
    write(tmp_path / "a", [row(str(i), score, media, prompt=prompt) for i, score in enumerate(scores)])
    page = Page(build([tmp_path / "a"], tmp_path / "r.html").read_text())
    text = next(text for _, text in page.find("tr", data_score="hps"))
    ends = re.search(r"\[(-?[\d.]+), (-?[\d.]+)\]", text)
    assert ends and 0 < float(ends[1]) < 2 < float(ends[2]) < 4


def test_mistakes_are_named(inputs, tmp_path):
    out = tmp_path / "r.html"
    with pytest.raises(ValueError, match="at least one results folder"):
        build([], out)
    with pytest.raises(ValueError, match=r"rank_by names hsp; the scores are hps, artefacts/blur"):
        build(inputs[0], out, rank_by=["hsp"])
    with pytest.raises(ValueError, match=r"is not a training run: it has no metrics\.jsonl"):
        build(inputs[0], out, run=tmp_path)
    (tmp_path / "metrics.jsonl").write_text("\n{}\n")
    with pytest.raises(ValueError, match="holds no training record with a step"):
        build(inputs[0], out, run=tmp_path)
    assert not out.exists()


def test_thousands_of_rows_stay_under_five_megabytes(tmp_path):
    rng = np.random.default_rng(1)
    noise = tmp_path / "noise.png"  # the picture that compresses worst
    Image.fromarray(rng.integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(noise)
    for name in "ab":
        rows = []
        for i in range(2000):
            media = tmp_path / name / f"{i}.png"
            media.parent.mkdir(exist_ok=True)
            os.link(noise, media)
            rows += [row(str(i), float(rng.normal()), media, evaluator=e) for e in ("hps", "clip_score", "aesthetic")]
        write(tmp_path / f"scores-{name}", rows)
    path = build([tmp_path / "scores-a", tmp_path / "scores-b"], tmp_path / "r.html")
    pictures = len(list(Page(path.read_text()).find("img")))
    assert pictures == 3 * (2 * 18 + 4 * 6)
    assert path.stat().st_size < 5e6
