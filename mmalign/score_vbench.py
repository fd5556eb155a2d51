"""Before a VBench run: what `mmalign score` scores where its config has a block `vbench`.

The suite's clips, found in a folder or a table (`mmalign.vbench.clips`), become rows that name their dimensions.
`mmalign.score_vbench_results` makes figures of their scores.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmalign.config import nearest
from mmalign.discovery import evaluator_class
from mmalign.jobs import ScoreConfig
from mmalign.jobs_vbench import VBench
from mmalign.media import VIDEO_SUFFIXES
from mmalign.media_folder import table_in
from mmalign.tables import MediaRow, read_media_table
from mmalign.vbench.clips import FLICKERING, STATIC, Found, find_images, from_folder, from_table, has_table
from mmalign.vbench.dimensions import I2V, base
from mmalign.vbench.leaderboard import I2V_ROWS, ROWS
from mmalign.vbench.suite import Suite, SuitePrompt, read_prompts, read_suite

__all__ = ["find", "rows_of", "specs"]

_log = logging.getLogger(__name__)
_NUMBER = re.compile(r"(.+?)-\d+", re.DOTALL)


def specs(config: ScoreConfig, plugins: bool = True) -> list[tuple[str, dict[str, Any]]]:
    """(name, parameters) of the evaluators: those of the dimensions that are asked for, with the run's rules.

    Raises:
        ValueError: an unknown evaluator, a dimension that none of them measures, or a row that is not on the board,
            with the nearest.
    """
    given = [(spec.name, dict(spec.params)) for spec in config.evaluators]
    block = config.vbench
    if block is None:
        return given
    board = {**ROWS, **I2V_ROWS}
    for name in block.against:
        if name not in board:
            raise ValueError(f"vbench.against: the board has no {name!r}.{nearest(name, list(board))}")
    if block.dimensions is not None:
        known = list(dict.fromkeys(base(name) for name, _ in given))
        for name in block.dimensions:
            if name not in known:
                raise ValueError(
                    f"vbench.dimensions: no evaluator of this config measures {name!r}.{nearest(name, known)} It has "
                    f"{', '.join(known)}."
                )
        given = [(name, params) for name, params in given if base(name) in (*block.dimensions, STATIC)]
    for name, params in given:
        if "rules" in evaluator_class(name, plugins).Params.model_fields:
            params.setdefault("rules", block.rules)
    return given


def rows_of(config: ScoreConfig) -> list[MediaRow]:
    """The rows to score, for any config; with a block `vbench` the coverage is logged."""
    if config.vbench is None:
        return read_media_table(config.source)
    found = find(config.source, config.vbench, [spec.name for spec in config.evaluators])
    for line in found.lines():
        _log.info("%s", line)
    model = config.vbench.model
    return [row if row.model else dataclasses.replace(row, model=model) for row in found.rows]


def find(place: Path, block: VBench, evaluators: Sequence[str], scoring: bool = True) -> Found:
    """The clips of a VBench run.

    Args:
        place: a folder, or a media table.
        evaluators: that are asked for; dimensions will do.
        scoring: whether input images are needed, which are only looked at where they are given otherwise.

    Raises:
        ValueError: a suite that is wrong or of another benchmark, dimensions that it has not, images that are not
            there, or a folder without one of the clips, saying why that may be.
    """
    place = place.expanduser()
    names = list(dict.fromkeys(base(name) for name in evaluators))
    if block.dimensions is not None:
        names = [name for name in names if name in block.dimensions or name == STATIC]
    wanted = [name for name in names if name != STATIC]
    if block.kind == "custom":
        return _custom(place, block)
    images: dict[str, str] = {}
    if block.kind == "category":
        assert block.category is not None
        prompts = [SuitePrompt(text, tuple(wanted), {}) for text in read_prompts(block.category)]
    else:
        assert block.suite is not None
        suite = read_suite(block.suite)
        prompts = _asked(suite, wanted)
        images = _images(suite, prompts, block, wanted if scoring else [])
    read = from_table if has_table(place) else from_folder
    filtered = STATIC in names and FLICKERING in wanted
    return read(place, prompts, samples=block.samples, filtered=filtered, images=images)


def _asked(suite: Suite, wanted: Sequence[str]) -> list[SuitePrompt]:
    strangers = [name for name in wanted if name not in suite.dimensions]
    if strangers:
        other = ""
        if set(strangers) & set(I2V):
            other = " It is one of image-to-video, whose suite is vbench2_i2v_full_info.json."
        raise ValueError(
            f"{suite.path} has no prompt for {', '.join(strangers)}."
            f"{nearest(strangers[0], list(suite.dimensions))}{other} It is for {', '.join(suite.dimensions)}; choose "
            "among these with vbench.dimensions."
        )
    narrowed = (
        dataclasses.replace(each, dimensions=tuple(name for name in each.dimensions if name in wanted))
        for each in suite.prompts
    )
    return [each for each in narrowed if each.dimensions]


def _images(suite: Suite, prompts: Sequence[SuitePrompt], block: VBench, wanted: Sequence[str]) -> dict[str, str]:
    if suite.kind == "text":
        if block.images is not None:
            raise ValueError(f"vbench.images: {suite.path} is the suite of text-to-video, which has no images; drop it")
        return {}
    if block.images is None:
        compared = [name for name in wanted if name in ("i2v_subject", "i2v_background")]
        if compared:
            raise ValueError(
                f"{suite.path} is the suite of image-to-video, and {' and '.join(compared)} compare with its images: "
                "set vbench.images to the image suite's folder crop/, and vbench.ratio to the ratio of the clips"
            )
        return {}
    return find_images(block.images, sorted({each.image for each in prompts if each.image}), block.ratio)


def _custom(place: Path, block: VBench) -> Found:
    """Every clip of a folder or table, for every evaluator."""
    if not place.exists():
        raise ValueError(f"{place} is not there; media names a folder of clips, or a media table")
    rows = read_media_table(place)
    listed = place.is_file() or table_in(place) != place
    clips = rows if listed else _clips(rows, place)
    if not clips:
        raise ValueError(f"{place} holds no clip; it holds {len(rows)} pictures, such as {rows[0].sample!r}")
    taken = {str(row.media) for row in clips}
    others = {row.sample for row in rows if taken.isdisjoint({str(row.media), os.path.dirname(str(row.media))})}
    prompts = _prompts(block, clips, place)
    named = [dataclasses.replace(row, prompt=prompts.get(row.sample, row.prompt)) for row in clips]
    grouped = [row if row.group else dataclasses.replace(row, group=row.prompt or _stem(row)) for row in named]
    return Found(tuple(grouped), (), others=tuple(sorted(others)))


def _clips(rows: Sequence[MediaRow], place: Path) -> list[MediaRow]:
    """Clips as files, and folders below `place` whose pictures have numbers, one clip each."""
    found: dict[str, MediaRow] = {}
    for row in rows:
        path = Path(str(row.media))
        if path.suffix.lower() in VIDEO_SUFFIXES | {".gif"}:
            found[row.sample] = dataclasses.replace(row, modality="video")
        elif path.parent != place.absolute() and re.search(r"\d", path.stem):
            sample = Path(row.sample).parent.as_posix()
            found.setdefault(sample, MediaRow(sample, "", str(path.parent), "video"))
    return list(found.values())


def _stem(row: MediaRow) -> str:
    """The name without its number: clips that differ in it alone are taken for samples of one prompt."""
    path = Path(row.sample)
    stem = path.stem if path.suffix.lower() in VIDEO_SUFFIXES | {".gif"} else path.name
    numbered = _NUMBER.fullmatch(stem)
    return (path.parent / (numbered[1] if numbered else stem)).as_posix()


def _prompts(block: VBench, rows: Sequence[MediaRow], place: Path) -> dict[str, str]:
    """Prompts by sample, where the config brings them."""
    if block.prompts is None:
        return {}
    if block.prompts == "names":
        return {row.sample: Path(_stem(row)).name for row in rows}
    path = Path(block.prompts).expanduser()
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"vbench.prompts: {path} cannot be read as JSON ({error})") from None
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise ValueError(f'vbench.prompts: {path} has to be an object of texts, such as {{"a.mp4": "a cat runs"}}')
    names = {os.path.normpath(key): value for key, value in data.items()}
    found = {}
    for row in rows:
        media = str(row.media)
        keys = (row.sample, os.path.basename(media), os.path.normpath(media), os.path.relpath(media, place))
        prompt = next((names[key] for key in keys if key in names), None)
        if prompt is None and not row.prompt:
            raise ValueError(
                f"vbench.prompts: {path} has no prompt for {row.sample!r}.{nearest(row.sample, list(names))}"
            )
        if prompt is not None:
            found[row.sample] = prompt
    return found
