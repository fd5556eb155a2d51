"""The pictures that are to be ranked, in lists: sampled, from media tables, or those of a preference set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmalign import sample
from mmalign.evaluation import resolve_device
from mmalign.jobs import SampleConfig
from mmalign.jobs_prefer import PreferConfig, Relabel, SampleSource, TableSource
from mmalign.media import VIDEO_SUFFIXES
from mmalign.models import base
from mmalign.paths import find
from mmalign.records import MediaRef
from mmalign.score_plan import digest
from mmalign.source import content_hash
from mmalign.tables import Dropped, MediaRow, PreferenceRow, read_media_table, read_preferences

TOO_FEW = "fewer than two pictures"
AGAIN = "judged again"
SAME = "the same picture again"


@dataclass(frozen=True)
class PictureList:
    """What is ranked together: two or more media of one prompt, and the rows that judged them before, if any did."""

    prompt: str
    rows: tuple[MediaRow, ...]
    former: tuple[PreferenceRow, ...] = ()


@dataclass(frozen=True)
class Pool:
    """All lists, and what was left out before anything was scored.

    A media row's `model` says which source it is from; its `sample` is different in each.
    """

    lists: list[PictureList]
    dropped: list[Dropped] = field(default_factory=list)

    def rows(self) -> list[MediaRow]:
        """Each picture once, in the order of the lists."""
        return list({row.sample: row for each in self.lists for row in each.rows}.values())


def check(config: PreferConfig) -> None:
    """Looks at models, prompts and tables before anything is written or drawn; ValueError for what would fail later."""
    resolve_device(config.scoring.device)
    for number, source in enumerate(config.sources):
        if isinstance(source, SampleSource):
            base.check(source.model)
            drawn = {(each.prompt, each.seed) for each in sample.requests(sample_config(config, source, number))}
            if len(config.sources) == 1 and len({prompt for prompt, _ in drawn}) == len(drawn):
                raise ValueError("sources: one model draws one picture per prompt: raise per_prompt, or add a source")
        else:
            read_media_table(find(source.table), source.root)


def gather(config: PreferConfig) -> Pool:
    """Draw what is missing, read the rest, and put together what belongs to one prompt.

    Raises:
        ValueError: what `sample.run` and the readers of tables raise; no list has two pictures.
    """
    if config.relabel is not None:
        pool = _former(config.relabel, config.limit)
    else:
        pool = _by_prompt(*_drawn(config), config.limit, _first(config))
    if not pool.lists:
        raise ValueError("no prompt has two pictures, so there is nothing to prefer; raise per_prompt or add a source")
    return pool


def sample_config(config: PreferConfig, source: SampleSource, number: int) -> SampleConfig:
    """The sampling job of a source: its keys, with the prompts and a folder of its own."""
    values = {name: value for name, value in source if name not in ("kind", "name")}
    folder = config.output / f"source-{number}"
    return SampleConfig(prompts=config.prompts, output=folder, limit=config.limit, **values)


def _drawn(config: PreferConfig) -> tuple[list[MediaRow], list[Dropped]]:
    """The rows of all sources, each picture once: a prompt that stands twice is drawn twice with the same seeds."""
    rows: dict[tuple[object, ...], MediaRow] = {}
    dropped = []
    for number, source in enumerate(config.sources):
        if isinstance(source, SampleSource):
            found = read_media_table(sample.run(sample_config(config, source, number)))
        else:
            found = read_media_table(find(source.table), source.root)
        for row in found:
            row = replace(row, sample=f"{number}:{row.sample}", model=_maker(source, row))
            same = (number, row.seed) if isinstance(source, SampleSource) else (row.media,)
            first = rows.setdefault((row.prompt, *same), row)
            if first is not row:
                dropped.append(Dropped(row.sample, SAME, f"as {first.sample}"))
    return list(rows.values()), dropped


def _maker(source: SampleSource | TableSource, row: MediaRow) -> str:
    return source.title if isinstance(source, SampleSource) or source.name or not row.model else row.model


def _first(config: PreferConfig) -> list[str]:
    """The prompts that sampling takes, in their order, one for each line; none where nothing is sampled."""
    for number, source in enumerate(config.sources):
        if isinstance(source, SampleSource):
            wanted = sample.requests(sample_config(config, source, number))
            return [prompt for _, prompt in dict.fromkeys((request.group, request.prompt) for request in wanted)]
    return []


def _by_prompt(rows: Sequence[MediaRow], dropped: list[Dropped], limit: int | None, first: Sequence[str]) -> Pool:
    """Lists in the order of `first`, then of the rows; `limit` cuts the same prompts from every source."""
    groups: dict[str, list[MediaRow]] = {}
    for row in rows:
        if row.prompt:
            groups.setdefault(row.prompt, []).append(row)
        else:
            dropped.append(Dropped(row.sample, "no prompt", "the row names none, so it belongs to no list"))
    lists = []
    known = set(first)
    order = dict.fromkeys([*first, *(prompt for prompt in groups if prompt not in known)][:limit])
    for number, prompt in enumerate(prompt for prompt in order if prompt in groups):
        members = groups[prompt]
        if len(members) < 2:
            dropped.append(Dropped(prompt, TOO_FEW, f"{members[0].sample} alone has this prompt"))
        else:
            lists.append(PictureList(prompt, tuple(replace(row, group=f"{number:06d}") for row in members)))
    return Pool(lists, dropped)


def _former(relabel: Relabel, limit: int | None) -> Pool:
    """Lists of a preference set: a row each, but once where several people judged the same media."""
    table = read_preferences(
        find(relabel.table), relabel.format, relabel.root, verify=False, dimension=relabel.dimension
    )
    groups: dict[tuple[str, frozenset[MediaRef]], list[PreferenceRow]] = {}
    for row in table.rows[:limit]:
        row.order()  # several dimensions and none chosen: said now, not after everything is scored
        groups.setdefault((row.prompt, frozenset(row.media)), []).append(row)
    names: dict[tuple[str, MediaRef], str] = {}
    lists, dropped = [], list(table.dropped)
    for number, ((prompt, refs), former) in enumerate(groups.items()):
        dropped += [Dropped(row.origin, AGAIN, "its media are ranked once") for row in former[1:]]
        if len(refs) < 2:
            dropped.append(Dropped(former[0].origin, TOO_FEW, "all its media are one and the same"))
            continue
        first = former[0]
        members = tuple(
            _media_row(first, place, names.setdefault((prompt, ref), f"{len(names):06d}"), number)
            for place, ref in enumerate(first.media)
            if ref not in first.media[:place]
        )
        lists.append(PictureList(prompt, members, tuple(former)))
    return Pool(lists, dropped)


def _media_row(row: PreferenceRow, place: int, name: str, group: int) -> MediaRow:
    """A medium of a row; a clip by its suffix, or since the row says how fast it plays or how long it is."""
    ref = row.media[place]
    fps = row.fps[place] if row.fps else None
    num_frames = row.num_frames[place] if row.num_frames else None
    model = row.models[place] if row.models else None
    clip = (ref.row is None and Path(ref.file).suffix.lower() in VIDEO_SUFFIXES) or fps or num_frames
    return MediaRow(
        name, row.prompt, ref.file if ref.row is None else ref, modality="video" if clip else "image",
        group=f"{group:06d}", model=model, fps=fps, num_frames=num_frames,
    )  # fmt: skip


def content(path: Path) -> str:
    """A hash of a file's bytes, or of a folder's names and sizes."""
    path = find(path)
    if path.is_file():
        return content_hash(path)
    return digest(str(path), sorted((f.name, f.stat().st_size) for f in path.glob("*") if f.is_file()))
