"""A contact sheet: every picture and clip of a run on one page, to sort by any score, to filter, and to play.

The page works from the file system and fetches nothing but the media that it links to, which its content security
policy keeps to this machine's files; the one script that may run is its own, by hash. It links to the media beside it,
or has small copies inside (`embed`), as far as a budget goes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from mmalign.figures import printable
from mmalign.media_table import MediaRow, read_media_table
from mmalign.progress import track
from mmalign.records import MediaRef
from mmalign.report_media import Thumbnail, script, thumbnail
from mmalign.results import WHOLE_SET, Results, is_ok, read_results, score_label
from mmalign.source import MediaError, whole_file

MOST = 10_000  # items on a page
BUDGET = 24 << 20  # bytes of small copies inside a page
_THUMBNAIL = 14_000  # bytes of one
_MARK = '<meta name="generator" content="mmalign contact sheet">'
Value = float | None


@dataclass
class Item:
    """One tile.

    Attributes:
        media: a file, media inside parquet, or None where the results name a file that is gone.
        scores: by label; None where the item has a row of the score and no value, with the reason in `reasons`.
        notes: whatever else is known, as text.
    """

    sample: str
    prompt: str
    media: str | MediaRef
    clip: bool
    model: str
    seed: int | None
    scores: dict[str, Value] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def build(
    sources: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    embed: bool = False,
    budget: int = BUDGET,
    title: str | None = None,
) -> Path:
    """Write a contact sheet.

    Args:
        sources: media tables, folders of media (such as `mmalign sample` writes), or results folders of
            `mmalign score`. What a folder of media has in `scores/` counts for its scores. Of a table's `aux`, numbers
            are scores too.
        output: the HTML file. None: `index.html` in the only source's folder, `contact.html` here for several.
        embed: put small copies into the page, so that it can be mailed; what does not fit into `budget` is linked.
        budget: bytes that embedded media may take.
        title: heading of the page.

    Returns:
        The path written.

    Raises:
        ValueError: no source, one that is neither, or an `index.html` that something else wrote and no `output`.
    """
    if not sources:
        raise ValueError("a contact sheet needs a table, a folder of media or a results folder")
    output = _output([Path(source) for source in sources], output)
    lower: set[str] = set()
    found: list[Item] = []
    for source, name in zip(sources, _names(sources), strict=True):
        found += _items(Path(source), name, lower)
    shown = found[:MOST]
    labels = list(dict.fromkeys(label for item in shown for label in item.scores))
    media = _Media(output.parent.absolute(), budget if embed else 0)
    drawn = track(shown, "copying media", len(shown)) if embed else shown
    data = {
        "scores": [{"label": label, "lower": label in lower} for label in labels],
        "items": [_tile(item, labels, media) for item in drawn],
    }
    remarks = media.remarks(embed)
    if len(found) > len(shown):
        remarks.append(f"The first {len(shown):,} of {len(found):,} items are shown.")
    page = {
        "title": title or _title(sources),
        "data": data,
        "remarks": remarks,
        "models": list(dict.fromkeys(item.model for item in shown)),
        "linked": bool(media.linked),
        "clips": any(item.clip for item in shown),
    }
    with whole_file(output) as temporary:
        temporary.write_text(_render(page), encoding="utf-8")
    return output


def _output(sources: Sequence[Path], output: str | Path | None) -> Path:
    if output is not None:
        return Path(output)
    if len(sources) > 1:
        return Path("contact.html")
    place = (sources[0] if sources[0].is_dir() else sources[0].parent) / "index.html"
    if place.is_file():
        with open(place, encoding="utf-8", errors="replace") as file:
            if _MARK not in file.read(2000):
                raise ValueError(f"{place} is there and no contact sheet; name another file with --output")
    return place


def _render(page: dict[str, Any]) -> str:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    template = files("mmalign").joinpath("sheet.html.j2").read_text(encoding="utf-8")
    text, digest = script("clips.js", "sheet.js")
    return environment.from_string(template).render(page, script=text, digest=digest, mark=Markup(_MARK))


def _printable(value: Any) -> Any:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


# ------------------------------------------------------------------------------------------------ items


def _names(sources: Sequence[str | Path]) -> list[str]:
    """What several sources are called, by as much of their paths as tells them apart; nothing for a single one."""
    if len(sources) == 1:
        return [""]
    parts = [[part for part in Path(source).absolute().parts if part != "scores"] for source in sources]
    for count in range(1, 4):
        names = ["/".join(each[-count:]) for each in parts]
        if len(set(names)) == len(names):
            return names
    return [str(source) for source in sources]


def _title(sources: Sequence[str | Path]) -> str:
    """The names of the run's folder, or of several."""
    homes = [Path(s).absolute() if Path(s).is_dir() else Path(s).absolute().parent for s in sources]
    return ", ".join(dict.fromkeys(home.parent.name if home.name == "scores" else home.name for home in homes))


def _items(source: Path, name: str, lower: set[str]) -> list[Item]:
    """The items of a source in its order; `lower` gets the labels of scores that are better when lower."""
    if not source.exists():
        raise ValueError(f"{source} does not exist; name a table, a folder of media or a results folder")
    if (source / "parts").is_dir():
        results = read_results(source)
        items = {row.sample: _of_table(row, name) for row in _scored_table(results)}
        known = bool(items)
        scored = {str(row["sample"]) for row in results.rows if row["sample"] != WHOLE_SET}
        items = {sample: item for sample, item in items.items() if sample in scored}
        if not known:
            items = {str(r["sample"]): _of_results(r, results, name) for r in results.rows if r["sample"] in scored}
    else:
        items = {row.sample: _of_table(row, name) for row in read_media_table(source)}
        beside = (source if source.is_dir() else source.parent) / "scores"
        results = read_results(beside) if any(beside.glob("parts/part-*.parquet")) else Results(source, [])
    for row in results.rows:
        item = items.get(str(row["sample"]))
        if item is None:
            continue
        label = score_label(row["evaluator"], row["subscore"])
        if label in results.count_labels:
            if is_ok(row):
                item.notes[label] = f"{row['score']:g}"
            continue
        if results.higher_is_better(label) is False:
            lower.add(label)
        item.scores[label] = float(row["score"]) if is_ok(row) else None
        if not is_ok(row):
            item.reasons[label] = f"{row['status']}: {row.get('reason') or 'the score is not a finite number'}"
    return list(items.values())


def _scored_table(results: Results) -> list[MediaRow]:
    """The table that was scored, where it is still there and readable; results alone will do otherwise."""
    config = results.run.get("config")
    table = config.get("table") if isinstance(config, dict) else None
    if not table or not Path(table).exists():
        return []
    try:
        return read_media_table(table)
    except ValueError:  # it has been changed since; the results say by themselves where the media were
        return []


def _of_table(row: MediaRow, name: str) -> Item:
    scores, notes = dict[str, Value](), dict[str, str]()
    for label, value in _flat(row.aux):
        if isinstance(value, int | float) and not isinstance(value, bool):
            scores[label] = float(value) if math.isfinite(value) else None
        elif value is not None:
            notes[label] = str(value)[:500]
    clip = row.modality == "video"
    return Item(row.sample, row.prompt, row.media, clip, name or row.model or "", row.seed, scores, {}, notes)


def _of_results(row: dict[str, Any], results: Results, name: str) -> Item:
    from mmalign.media import VIDEO_SUFFIXES

    written = str(row["media"])
    homes = (Path(), results.folder, results.folder.parent)
    media = next((os.path.abspath(home / written) for home in homes if (home / written).is_file()), written)
    clip = Path(written).suffix.lower() in VIDEO_SUFFIXES
    model = name or str(row.get("model") or "")
    return Item(str(row["sample"]), row.get("prompt") or "", media, clip, model, row.get("seed"))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested objects by joined names: {"reward": {"hps": 1}} is ("reward/hps", 1)."""
    for key, value in values.items():
        label = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{label}/")
        else:
            yield label, value


# ------------------------------------------------------------------------------------------------ tiles


def _tile(item: Item, labels: Iterable[str], media: _Media) -> dict[str, Any]:
    """What the script gets of an item; texts arrive as text and are shown as such."""
    return {
        "sample": item.sample,
        "prompt": item.prompt,
        "seed": item.seed,
        "model": item.model,
        "clip": item.clip,
        "scores": [item.scores.get(label) for label in labels],
        "reasons": {str(i): item.reasons[label] for i, label in enumerate(labels) if label in item.reasons},
        "notes": list(item.notes.items()),
        **media.of(item),
    }


class _Media:
    """Where each tile's media come from: a file beside the page, or a small copy inside it while the budget lasts."""

    def __init__(self, home: Path, budget: int) -> None:
        self.home, self.left = home, budget
        self.linked = self.embedded = self.missing = 0

    def of(self, item: Item) -> dict[str, Any]:
        """`src` (and `poster`, `file`), or `fault`."""
        inside = not isinstance(item.media, str) and item.media.row is not None  # no browser opens parquet
        path = None if inside else (item.media if isinstance(item.media, str) else item.media.file)
        if path is not None and not os.path.isfile(path):
            self.missing += 1
            shown = unquote(self._href(path)) if os.path.isabs(path) else path  # relative: as the results have it
            return {"fault": f"{shown}: no such file"}
        link = {} if path is None else {"file": self._href(path)}
        if path is not None and self.left <= 0:
            self.linked += 1
            return {**link, "src": link["file"]}
        try:
            made = thumbnail(item.media, item.clip, _THUMBNAIL)
        except MediaError as error:
            self.missing += 1
            return {**link, "fault": str(error)}
        self.embedded += 1
        return link | self._inside(made)

    def _inside(self, made: Thumbnail) -> dict[str, Any]:
        assert made.uri is not None
        self.left -= len(made.uri) + len(made.video or "")
        return {"src": made.video, "poster": made.uri} if made.video else {"src": made.uri}

    def _href(self, path: str) -> str:
        try:
            return quote(Path(os.path.relpath(path, self.home)).as_posix())
        except ValueError:  # another drive
            return Path(path).absolute().as_uri()

    def remarks(self, embed: bool) -> list[str]:
        found = []
        if embed and self.linked:
            found.append(
                f"The first {self.embedded:,} items are inside this page; {self.linked:,} more would have made it too "
                "large and are linked: they show while their files are where they were."
            )
        elif self.linked:
            found.append("The media are files beside this page: keep them together, or make a page with --embed.")
        if self.missing:
            found.append(f"Media that are missing or cannot be read: {self.missing:,}.")
        return found
