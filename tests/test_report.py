"""The report page: self-contained, escaped, complete, and with the comparison's own figures."""

import base64
import hashlib
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmalign.compare import compare
from mmalign.figures import number, p_value, share_interval, short, signed_interval
from mmalign.report import build
from mmalign.report_media import Thumbnails
from mmalign.report_plots import curves, histogram
from mmalign.report_run import read_metrics
from mmalign.results import Results, read_results

HOSTILE = """<script>alert(1)</script> "><img src=x onerror=alert(2)> & 'so' https://example.com/a.png"""
VOID = {"meta", "img", "input", "br", "link", "base", "hr"}


class Page(HTMLParser):
    """Tags with their attributes and the text inside each, enough to ask what a page holds."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[int, str] = {}
        self.open: list[int] = []
        self.feed(html)
        assert not self.open, "every tag is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.texts[len(self.tags) - 1] = ""
        self.handle_data(" ")
        if tag not in VOID:
            self.open.append(len(self.tags) - 1)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.tags[self.open.pop()][0] == tag
        self.handle_data(" ")

    def handle_data(self, data):
        for index in self.open:
            self.texts[index] += data

    def find(self, tag, **attributes):
        """(attributes, text) of every such element; a class is matched as one word of several."""
        wanted = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        for index, (name, attrs) in enumerate(self.tags):
            fits = (v in attrs.get(k, "").split() if k == "class" else attrs.get(k) == v for k, v in wanted.items())
            if name == tag and all(fits):
                yield attrs, " ".join(self.texts[index].split())


def row(sample, score, media, evaluator="hps", subscore="score", **more):
    fields = {
        "sample": sample,
        "prompt": f"prompt {sample}",
        "media": str(media),
        "evaluator": evaluator,
        "subscore": subscore,
        "score": score,
        "status": "ok",
        "reason": None,
        "seconds": 0.25,
        "evaluator_version": 3,
        "params_hash": "p",
        "weight_hash": "w",
        "decoder": "d",
        "group": None,
        "model": None,
        "seed": None,
    }
    return fields | more


def write(folder: Path, rows, config=None, directions=None) -> Path:
    (folder / "parts").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "parts/part-0.parquet")
    evaluators = {name: {"higher_is_better": up} for name, up in (directions or {"hps": True}).items()}
    (folder / "summary.json").write_text(json.dumps({"evaluators": evaluators}))
    (folder / "run.json").write_text(json.dumps({"config": config or {}, "versions": {"torch": "9.8.7"}}))
    return folder


def picture(path: Path, size=(8, 8), colour=(200, 30, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def training_run(folder: Path, steps=60) -> Path:
    folder.mkdir()
    lines = [
        json.dumps({"step": s, "loss": 1 / s, "implicit_accuracy": 0.5, "margin": s, "odd_thing": 7, "note": "text"})
        for s in range(1, steps + 1)
    ]
    lines.append('{"step": 61, "lo')
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "config.yaml").write_text("loss: {kind: diffusion_dpo} # <b>bold</b>\n")
    (folder / "run.json").write_text(json.dumps({"versions": {"diffusers": "1.2.3"}}))
    return folder


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
            rows.append(row(str(i), i / 10 + side * gain, media, **more))
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


# --- parts -----------------------------------------------------------------------------------------------------------


def decoded(thumbnail) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(thumbnail.uri.split(",", 1)[1])))


def test_small_pictures_are_kept_pixel_by_pixel_and_large_ones_shrunk(tmp_path):
    rng = np.random.default_rng(2)
    small = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    Image.fromarray(rng.integers(0, 256, (900, 600, 3), dtype=np.uint8)).save(tmp_path / "large.png")
    results = Results(tmp_path, [])
    made = Thumbnails()
    kept = made.of(results, row("1", 0.0, "small.png"))  # found beside the results
    assert kept.crisp and np.array_equal(np.asarray(decoded(kept).convert("RGB")), small)
    shrunk = made.of(results, row("2", 0.0, tmp_path / "large.png"))
    assert not shrunk.crisp and shrunk.height <= 256 and shrunk.height / shrunk.width == pytest.approx(1.5, abs=0.02)
    assert len(shrunk.uri) * 3 / 4 <= made.limit * 1.02
    assert made.of(results, row("2", 0.0, tmp_path / "large.png")) is shrunk and made.shown == 2


def test_a_clip_becomes_a_small_clip(tmp_path):
    from media_kit import moving

    from mmalign.media import read_video, write_video

    def small(frames, fps, name="clip.mp4"):
        write_video(tmp_path / name, frames, fps=fps)
        thumbnail = Thumbnails().of(Results(tmp_path, []), row("1", 0.0, name))
        head, data = thumbnail.video.split(",", 1)
        assert head == "data:video/mp4;base64"
        return thumbnail, read_video(base64.b64decode(data)), len(thumbnail.video + thumbnail.uri) * 3 / 4

    frames = moving(12, 32, 49)  # an odd side, which 4:2:0 cannot have
    thumbnail, clip, _ = small(frames, 6)
    assert (thumbnail.width, thumbnail.height) == (48, 32) == decoded(thumbnail).size and thumbnail.crisp
    assert (clip.num_frames, clip.fps) == (12, 6)
    wide = torch.nn.functional.interpolate(frames.float(), (32, 48), mode="area")
    assert (clip.frames.float() - wide).abs().mean() < 12  # the same motion, frame by frame
    assert (clip.frames.float() - wide.flip(0)).abs().mean() > 40
    noise = torch.randint(0, 256, (60, 3, 9, 11), generator=torch.Generator().manual_seed(0)).byte()
    thumbnail, clip, size = small(noise.repeat_interleave(12, 2).repeat_interleave(13, 3), 15, "b.mp4")
    assert clip.num_frames == 48 and clip.num_frames / clip.fps == pytest.approx(4, rel=0.01)  # as long as the clip
    assert max(thumbnail.width, thumbnail.height) <= 192 and thumbnail.width % 2 == thumbnail.height % 2 == 0
    assert not thumbnail.crisp and size < 60_000
    assert small(frames, 6)[0] == Thumbnails().of(Results(tmp_path, []), row("1", 0.0, "clip.mp4"))


def test_clips_are_in_the_page_and_one_script_plays_them(tmp_path):
    from media_kit import moving

    from mmalign.media import write_video

    rows = []
    for i in range(4):
        write_video(tmp_path / f"{i}.mp4", moving(4, 32, 32), fps=8)
        rows.append(row(str(i), float(i), tmp_path / f"{i}.mp4", prompt=HOSTILE))
    html = build([write(tmp_path / "scores", rows)], tmp_path / "r.html").read_text()
    page = Page(html)
    script = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    policy = next(attrs["content"] for attrs, _ in page.find("meta", http_equiv="Content-Security-Policy"))
    assert html.count("<script") == len(script) == 1 and f"script-src 'sha256-{digest}';" in policy
    assert "media-src data:;" in policy and "runs no script" not in html
    clips = [attrs for attrs, _ in page.find("video")]
    assert len(clips) == 4
    for attrs in clips:
        assert attrs["src"].startswith("data:video/mp4;base64,") and attrs["poster"].startswith("data:image/webp")
        assert {"controls", "muted", "loop", "playsinline"} <= attrs.keys() and attrs["preload"] == "none"
        assert HOSTILE in attrs["aria-label"]


def test_broken_media_say_why(tmp_path):
    whole = picture(tmp_path / "whole.png", (64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    made = Thumbnails()
    for name in ("cut.png", "text.png", "cut.mp4", "gone.png"):
        thumbnail = made.of(Results(tmp_path, []), row(name, 0.0, name))
        assert thumbnail.uri is None and name in thumbnail.reason
    assert len(made.failures) == made.shown == 4


def test_pictures_inside_a_parquet_table_are_found_through_it(tmp_path):
    data = picture(tmp_path / "x.png").read_bytes()
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"sample": ["s1"], "prompt": ["p"], "media": [data]}), table)
    results = Results(tmp_path / "scores", [], {}, {"config": {"table": str(table)}})
    thumbnail = Thumbnails().of(results, row("s1", 0.0, "table.parquet row 0 media"))
    assert thumbnail.uri is not None and decoded(thumbnail).size == (8, 8)


def test_plots_use_the_colours_of_the_page_and_escape_names():
    rng = np.random.default_rng(3)
    plot = histogram([("$a_b$ <x>", 0, rng.normal(size=500)), ("b", 1, rng.normal(size=400))], 'hps "q"')
    assert "var(--c0)" in plot and "var(--c1)" in plot and "var(--muted)" in plot and "#0102" not in plot
    assert "#01010" not in plot and "http" not in plot and "<style" not in plot
    assert "hps &quot;q&quot;: $a_b$ &lt;x&gt;" in plot
    line = curves({"loss": (np.arange(5000.0), rng.normal(size=5000))}, reference=0.0)
    assert len(line) < 40_000  # 400 points, not 5000


@pytest.mark.parametrize("values", [[1.0], [0.5, 0.5], [0.0, 1.0, 1.0], [1e9, -1e9, 3.0, *range(20)], list(range(9))])
def test_plots_of_few_odd_values(values):
    assert histogram([("m", 0, values)], "x").count("<svg") == 1
    assert curves({"x": (np.arange(len(values), dtype=float), np.array(values, dtype=float))}).count("<svg") == 1


def test_resumed_and_broken_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 5}\n{"step": 1, "loss": 9}\n[]\n{"step": 2, "loss": 4}\n{"st')
    records, unreadable = read_metrics(path)
    assert records == [{"step": 1, "loss": 9}, {"step": 2, "loss": 4}] and unreadable == 2


def test_short_figures():
    texts = [short(x) for x in (0, 0.25, 42.137, 1.0, 99_999, 123_456, 1.24e9, -3e6, 1e-4)]
    assert texts == ["0", "0.25", "42.14", "1", "1e+05", "123.5k", "1.24G", "-3M", "0.0001"]
