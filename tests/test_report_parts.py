"""Parts of the report: pictures and clips made small, plots, metrics, figures."""

import base64
import hashlib
import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from report_kit import HOSTILE, Page, picture, row, write

from mmalign.figures import short
from mmalign.report import build
from mmalign.report_media import Thumbnails
from mmalign.report_plots import curves, histogram
from mmalign.report_run import read_metrics
from mmalign.results import Results


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
