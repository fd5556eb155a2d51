"""A suite's clips: from a folder or a table to rows that can be scored, and how many of those expected are there.

A clip that is not there is a row too, with the path where it is expected: it becomes an error of every evaluator that
is asked for it, so that no denominator shrinks unseen.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mmalign.media_folder import table_in
from mmalign.media_table import MediaRow, read_media_table
from mmalign.source import shown
from mmalign.vbench.dimensions import DIMENSIONS
from mmalign.vbench.hints import causes
from mmalign.vbench.names import FORMS, Clips, same
from mmalign.vbench.suite import SuitePrompt

__all__ = ["HOMES", "Coverage", "Found", "find_images", "from_folder", "from_table", "has_table"]

FLICKERING, STATIC = "temporal_flickering", "static_filter"
HOMES: dict[str, str] = {
    "motion_smoothness": "subject_consistency",
    "dynamic_degree": "subject_consistency",
    "background_consistency": "scene",
    "aesthetic_quality": "overall_consistency",
    "imaging_quality": "overall_consistency",
}
"""Whose folder holds a dimension's clips, where they lie in a folder for each prompt file; else its own."""
_SHOWN, _LETTERS = 3, 70


def _some(names: Sequence[str]) -> str:
    """The first few, long ones cut in the middle."""
    half = _LETTERS // 2
    short = [name if len(name) <= _LETTERS else f"{name[:half]}...{name[-half:]}" for name in names[:_SHOWN]]
    return ", ".join(map(shown, short)) + (", ..." if len(names) > _SHOWN else "")


@dataclass(frozen=True)
class Coverage:
    """How many of a dimension's clips are there.

    Attributes:
        missing: names of those that are not, in the suite's order.
    """

    dimension: str
    expected: int
    missing: tuple[str, ...]

    @property
    def found(self) -> int:
        """Clips that are there."""
        return self.expected - len(self.missing)

    def line(self) -> str:
        """For a person."""
        text = f"{self.dimension}: {self.found} of {self.expected} clips"
        if not self.missing:
            return text
        return f"{text}, {len(self.missing)} missing: {_some(self.missing)}"


@dataclass(frozen=True)
class Found:
    """What there is to score.

    Attributes:
        rows: one per expected clip, there or not.
        coverage: per dimension, in the order of the leaderboard.
        missing: samples (names of rows) whose clip is not there.
        causes: why clips may be missing.
        others: files that are none of the suite's clips; they are left out.
        notes: sentences on what was taken.
    """

    rows: tuple[MediaRow, ...]
    coverage: tuple[Coverage, ...]
    missing: frozenset[str] = frozenset()
    causes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def lines(self) -> list[str]:
        """For a person: a line per dimension, what was left out, and why clips may be missing."""
        lines = [each.line() for each in self.coverage]
        if self.others:
            lines.append(f"{len(self.others)} other files are left out: {_some(self.others)}")
        return [*lines, *self.notes, *(f"likely cause: {each}" for each in self.causes)]


def from_folder(
    folder: Path,
    prompts: Sequence[SuitePrompt],
    *,
    samples: int = 5,
    filtered: bool = False,
    images: Mapping[str, str] | None = None,
) -> Found:
    """The clips ``{prompt}-{i}`` of a folder, i from 0.

    They may also lie in one folder for each prompt file, called as the authors' are (`scene/`, `subject_consistency/`).

    Args:
        prompts: with the dimensions that are wanted alone.
        samples: clips per prompt.
        filtered: whether the static filter chooses the clips of temporal_flickering: then all that are there are rows,
            also for the evaluator of that name, and at least as many as `samples` are expected.
        images: input image by its name in the suite, see `find_images`.

    Raises:
        ValueError: the folder cannot be listed, has not one of the clips (saying why that may be), or holds clips for
            one of two prompts that differ in case alone.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; media names the folder of the clips, or a media table")
    homes = {HOMES.get(name, name) for each in prompts for name in each.dimensions}
    parted = _parted(folder, homes, prompts)
    rest = homes - set(parted) if parted else set()
    parts = []
    for home in parted or [""]:
        asked = [each for each in (_at_home(each, home) for each in prompts) if each.dimensions] if home else prompts
        parts.append(_part(folder, home, asked, samples, filtered, images or {}))
    if rest:
        parts.append(_absent(folder, rest, prompts, samples, images or {}))
    rows = [row for part in parts for row in part.rows]
    missing = {name for part in parts for name in part.missing}
    why = list(dict.fromkeys(each for part in parts for each in part.why))
    if rest:
        why.append(f"there is no folder {', '.join(sorted(rest))} beside {', '.join(parted)}")
    used = {os.path.basename(str(row.media)) for row in rows if row.sample not in missing}
    others = [name for part in parts for name in part.others if name.rstrip("/") not in {*used, *parted}]
    notes = tuple(each for part in parts for each in part.notes)
    if len(missing) == len(rows):
        told = "; ".join(why) or "are these the clips of another suite?"
        example = os.path.basename(str(rows[0].media))
        raise ValueError(f"{folder} has none of the {len(rows)} clips, such as {example!r}: {told}")
    return Found(tuple(rows), _coverage(rows, missing), frozenset(missing), tuple(why), tuple(others), notes)


def from_table(
    table: Path,
    prompts: Sequence[SuitePrompt],
    *,
    samples: int = 5,
    filtered: bool = False,
    images: Mapping[str, str] | None = None,
) -> Found:
    """The clips of a media table, or of a folder with one, that names its prompts; file names mean nothing.

    A row's own dimensions narrow those of the suite, its ``aux`` and its reference go before the suite's.

    Raises:
        ValueError: as `mmalign.media_table.read_media_table` and `from_folder`.
    """
    given: dict[str, list[MediaRow]] = {}
    for row in read_media_table(table):
        given.setdefault(same(row.prompt), []).append(row)
    rows: list[MediaRow] = []
    missing: set[str] = set()
    further: list[str] = []
    for each in prompts:
        mine = given.pop(same(each.prompt), [])
        static = filtered and FLICKERING in each.dimensions
        further += [] if static else [row.sample for row in mine[samples:]]
        for number, row in enumerate(mine if static else mine[:samples]):
            asked = each.dimensions if number < samples else (FLICKERING,)
            wanted = set(asked) & set(row.dimensions or asked)
            only = dataclasses.replace(each, dimensions=tuple(name for name in each.dimensions if name in wanted))
            if not only.dimensions:
                continue
            rows.append(_of_suite(row, _row(only, row.sample, row.media, images or {}, filtered)))
            if isinstance(row.media, str) and not os.path.lexists(row.media):
                missing.add(row.sample)
        for number in range(len(mine), samples):
            path = os.path.abspath(table.parent / f"{each.prompt.replace('/', '_')}-{number}.mp4")
            rows.append(_row(each, f"{each.prompt} (clip {number + 1} of {samples})", path, images or {}, filtered))
            missing.add(rows[-1].sample)
    if len(missing) == len(rows):
        example = next(iter(given), "")
        raise ValueError(
            f"{table}: no row has a prompt of the suite, such as {prompts[0].prompt!r}; its first prompt is {example!r}"
        )
    others = (*further, *(row.sample for left in given.values() for row in left))
    why = (f"the table has fewer than {samples} rows for some prompts, or names files that are not there",)
    return Found(tuple(rows), _coverage(rows, missing), frozenset(missing), why if missing else (), others)


def has_table(folder: Path) -> bool:
    """Whether this is a media table, or a folder with one in it."""
    return folder.is_file() or table_in(folder) != folder


def find_images(folder: Path, names: Collection[str], ratio: str | None) -> dict[str, str]:
    """The input images of the image-to-video suite: ``{folder}/{ratio}/{name}``, or ``{folder}/{name}``.

    Args:
        ratio: width to height as the authors write it, such as ``16-9``; None: the one folder that is there.

    Raises:
        ValueError: no such folder, several ratios to choose from, or images that are not there.
    """
    if not folder.is_dir():
        raise ValueError(f"vbench.images: {folder} is no folder; give the image suite's folder crop/, or one in it")
    ratios = sorted(each.name for each in folder.iterdir() if each.is_dir() and re.fullmatch(r"\d+-\d+", each.name))
    wanted = None if ratio is None else ratio.replace(":", "-")
    if wanted is not None and wanted not in ratios and folder.name != wanted:
        raise ValueError(
            f"vbench.ratio: {folder} has no images of {wanted}; there are {', '.join(ratios) or 'none'}. The authors' "
            "are 1-1, 8-5, 7-4 and 16-9; others are cut with `mmalign vbench crop`"
        )
    if wanted is None and len(ratios) > 1:
        raise ValueError(f"vbench.ratio: {folder} has images of {', '.join(ratios)}; say which the clips began with")
    home = folder if wanted == folder.name or not ratios else folder / (wanted or ratios[0])
    absent = [name for name in names if not (home / name).is_file()]
    if absent:
        raise ValueError(f"vbench.images: {home} lacks {len(absent)} of {len(names)} images, such as {absent[0]!r}")
    return {name: os.path.abspath(home / name) for name in names}


# ------------------------------------------------------------------------------------------------ parts


class _Part(NamedTuple):
    """What one folder of a suite's clips has, and lacks."""

    rows: list[MediaRow]
    missing: set[str]
    others: Sequence[str] = ()
    notes: Sequence[str] = ()
    why: Sequence[str] = ()


def _parted(folder: Path, homes: Collection[str], prompts: Sequence[SuitePrompt]) -> list[str]:
    """The folders, one per prompt file, in which the clips lie; none where they lie side by side."""
    parted = sorted(home for home in homes if (folder / home).is_dir())
    if not parted:
        return []
    flat = Clips(folder, [each.prompt for each in prompts])
    return [] if any(flat.numbers(each.prompt) for each in prompts) else parted


def _part(
    folder: Path,
    home: str,
    asked: Sequence[SuitePrompt],
    samples: int,
    filtered: bool,
    images: Mapping[str, str],
) -> _Part:
    held = Clips(folder / home, [each.prompt for each in asked])
    _refuse_collisions(held)
    place = f"{home}/" if home else ""
    found = _rows(held, asked, samples, filtered, place, images)
    missing = {row.sample for row, there in found if not there}
    taken = {str(row.media) for row, there in found if there}
    left = [clip for clip in held.files if clip.path not in taken]
    others = [place + clip.name for clip in left] + [place + name for name in held.others]
    why = causes(held, asked, samples, left) if missing else ()
    return _Part([row for row, _ in found], missing, others, _notes(held, asked, samples, filtered), why)


def _absent(
    folder: Path, homes: Collection[str], prompts: Sequence[SuitePrompt], samples: int, images: Mapping[str, str]
) -> _Part:
    """The clips of folders that are not there at all."""
    rows = []
    for each in prompts:
        for home in sorted({HOMES.get(name, name) for name in each.dimensions} & set(homes)):
            one = _at_home(each, home)
            for number in range(samples):
                path = os.path.abspath(folder / home / f"{one.prompt.replace('/', '_')}-{number}.mp4")
                rows.append(_row(one, f"{home}/{one.prompt}-{number}", path, images, False))
    return _Part(rows, {row.sample for row in rows})


def _at_home(prompt: SuitePrompt, home: str) -> SuitePrompt:
    names = tuple(name for name in prompt.dimensions if HOMES.get(name, name) == home)
    return dataclasses.replace(prompt, dimensions=names)


def _rows(
    held: Clips, prompts: Sequence[SuitePrompt], samples: int, filtered: bool, place: str, images: Mapping[str, str]
) -> list[tuple[MediaRow, bool]]:
    form = Counter(clip.form for clip in held.files).most_common(1)
    suffix = form[0][0] if form else FORMS[0]
    found = []
    for each in prompts:
        static = filtered and FLICKERING in each.dimensions
        further = [number for number in held.numbers(each.prompt) if number >= samples] if static else []
        for number in (*range(samples), *further):
            clip = held.find(each.prompt, number)
            path = clip.path if clip else held.expected(each.prompt, number, suffix)
            only = dataclasses.replace(each, dimensions=(FLICKERING,)) if number >= samples else each
            sample = f"{place}{each.prompt}-{number}"
            found.append((_row(only, sample, path, images, static), clip is not None))
    return found


def _row(each: SuitePrompt, sample: str, media: object, images: Mapping[str, str], filtered: bool) -> MediaRow:
    further = (STATIC,) if filtered and FLICKERING in each.dimensions else ()
    return MediaRow(
        sample,
        each.prompt,
        media,  # type: ignore[arg-type]
        "video",
        group=each.prompt,
        reference=images.get(each.image) if each.image else None,
        dimensions=(*each.dimensions, *further),
        aux=dict(each.aux),
    )


def _of_suite(row: MediaRow, suite: MediaRow) -> MediaRow:
    """A table's row, with what the suite says of its prompt."""
    return dataclasses.replace(
        row,
        modality="video",
        group=suite.group,
        prompt=suite.prompt,
        dimensions=suite.dimensions,
        reference=row.reference or suite.reference,
        aux={**suite.aux, **row.aux},
    )


def _coverage(rows: Sequence[MediaRow], missing: Collection[str]) -> tuple[Coverage, ...]:
    names = {name for row in rows for name in row.dimensions or ()}
    result = []
    for name in (each for each in DIMENSIONS if each in names):
        mine = [row.sample for row in rows if name in (row.dimensions or ())]
        result.append(Coverage(name, len(mine), tuple(sample for sample in mine if sample in missing)))
    return tuple(result)


def _refuse_collisions(held: Clips) -> None:
    if pairs := held.collisions():
        there, absent = pairs[0]
        raise ValueError(
            f"{held.folder} has clips called {there!r} and none called {absent!r}: the names differ in case alone, and "
            "a file system that does not tell them apart (macOS, Windows) keeps one for both, so whose clips these are "
            "cannot be known. Sample one of them under other names and give a media table with a column prompt, or "
            "leave the dimensions of one out with vbench.dimensions"
        )


def _notes(held: Clips, prompts: Sequence[SuitePrompt], samples: int, filtered: bool) -> list[str]:
    notes = []
    if held.doubles:
        notes.append(f"{len(held.doubles)} clips are there in two forms; left out: {held.doubles[0]}, ...")
    flickering = [] if filtered else [each.prompt for each in prompts if FLICKERING in each.dimensions]
    further = sum(number >= samples for prompt in flickering for number in held.numbers(prompt))
    if further:
        notes.append(
            f"{further} further clips of {FLICKERING} are left out, as the reference does without its static filter; "
            f"with the evaluator {STATIC} in the config the first {samples} static ones of all count"
        )
    return notes
