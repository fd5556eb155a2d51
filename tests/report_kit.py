"""Results and runs to report on, and a reader of the page."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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
