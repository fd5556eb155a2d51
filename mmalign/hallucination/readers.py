"""Benchmarks by name: their questions as rows of a media table, and saved answers joined to them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmalign.hallucination import amber, hallusionbench, mmhal, object_halbench, pope, question_file
from mmalign.hallucination.files import json_rows
from mmalign.media_table import MediaRow, read_media_table

__all__ = ["READERS", "Reader", "answered", "read_questions"]

_log = logging.getLogger(__name__)
_SHOWN = 5


@dataclass(frozen=True)
class Reader:
    """How a benchmark's public files are read.

    Attributes:
        questions: (file, folder of images or None[, annotations]) -> rows without responses.
        answers: (file, rows that it may answer) -> answers by sample.
        annotated: whether questions come with a file of annotations.
    """

    questions: Callable[..., list[MediaRow]]
    answers: Callable[[Path, Sequence[MediaRow]], dict[str, str]]
    annotated: bool = False


READERS: dict[str, Reader] = {
    "pope": Reader(pope.questions, pope.answers),
    "hallusionbench": Reader(hallusionbench.questions, hallusionbench.answers),
    "amber": Reader(amber.questions, amber.answers, annotated=True),
    "questions": Reader(question_file.questions, question_file.answers),
    "mmhal": Reader(mmhal.questions, mmhal.answers),
    "object_halbench": Reader(object_halbench.questions, object_halbench.answers),
}


def read_questions(
    kind: str, files: Sequence[Path], images: Path | None = None, annotations: Path | None = None
) -> list[list[MediaRow]]:
    """The rows of each file.

    Raises:
        ValueError: a file that is not in the benchmark's layout, a question that is in two files, or a folder without
            a single one of the images.
    """
    reader = READERS[kind]
    found = [
        reader.questions(file.expanduser(), images, *([annotations.expanduser()] if annotations else []))
        for file in files
    ]
    seen: dict[str, Path] = {}
    for file, rows in zip(files, found, strict=True):
        for row in rows:
            if row.sample in seen:
                raise ValueError(f"{file}: question {row.sample} is also in {seen[row.sample]}; name each file once")
            seen[row.sample] = file
    shown = [row for rows in found for row in rows if row.media]
    if images is not None and shown and not any(Path(str(row.media)).is_file() for row in shown):
        raise ValueError(f"{images} has none of the {len(shown)} images, such as {shown[0].media}")
    return found


def answered(
    kind: str, questions: Sequence[Sequence[MediaRow]], files: Sequence[Path], unasked: Collection[str] = ()
) -> list[MediaRow]:
    """The rows with saved answers, of a media table with `sample` and `response` or of the benchmark's own layout.

    Several files of answers go with as many files of questions, in their order. Questions without an answer keep none,
    which the results count; they and answers to nothing are logged by name.

    Args:
        questions: the rows of each file of questions.
        files: of answers.
        unasked: samples of questions that are left out, whose answers are nothing to wonder at.

    Raises:
        ValueError: files that are neither, or that answer none of the questions.
    """
    every = [row for rows in questions for row in rows]
    found: dict[str, tuple[str, str | None]] = {}
    pairs = [(file, every) for file in files]
    if len(files) == len(questions) > 1:
        pairs = [(file, list(rows)) for file, rows in zip(files, questions, strict=True)]
    for file, rows in pairs:
        for sample, told in _answers(kind, file, rows, alone=len(questions) == 1 or len(pairs) > 1).items():
            if sample in found:
                raise ValueError(f"{file}: question {sample} is answered in another file too")
            found[sample] = told
    known = {row.sample for row in every}
    missing = [row.sample for row in every if row.sample not in found]
    extra = [sample for sample in found if sample not in known and sample not in unasked]
    names = ", ".join(map(str, files))
    if len(missing) == len(every):
        called = _some([row.sample for row in every])
        raise ValueError(
            f"{names} answers none of the {len(every)} questions; they are called {called}, the answers {_some(extra)}"
        )
    for these, what in ((missing, "questions have no answer in"), (extra, "answers to no question are in")):
        if these:
            _log.warning("%d %s %s: %s", len(these), what, names, _some(these))
    return [
        replace(row, response=found[row.sample][0], model=found[row.sample][1]) if row.sample in found else row
        for row in every
    ]


def _answers(kind: str, file: Path, rows: Sequence[MediaRow], alone: bool) -> Mapping[str, tuple[str, str | None]]:
    """(answer, what gave it) by sample; `alone`: the rows are of one file of questions."""
    file = file.expanduser()
    if _is_table(file):
        held = read_media_table(file, questions=True)
        return {row.sample: (row.response, row.model) for row in held if row.response is not None}
    if not alone and kind == "pope":
        raise ValueError(
            f"{file}: POPE numbers the questions of each split from 1; give one file of answers for each file of "
            "questions, in the same order"
        )
    return {sample: (text, None) for sample, text in READERS[kind].answers(file, rows).items()}


def _is_table(file: Path) -> bool:
    if file.suffix.lower() in (".parquet", ".csv", ".tsv") or file.is_dir():
        return True
    first: Mapping[str, Any] = json_rows(file)[0]
    return "sample" in first and ("response" in first or "prompt" in first)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
