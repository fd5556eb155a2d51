"""Before a run on a benchmark of answers: its questions as rows, answered from files or by a model."""

from __future__ import annotations

from pathlib import Path

from mmalign.hallucination.readers import answered, read_questions
from mmalign.jobs import ScoreConfig
from mmalign.jobs_answers import Answers
from mmalign.respond import respond
from mmalign.tables import MediaRow, read_media_table

__all__ = ["RESPONSES", "answer", "answer_rows"]

RESPONSES = "responses"


def answer(config: ScoreConfig) -> None:
    """Have the config's model answer what it has not answered yet, if it names one.

    Raises:
        ValueError: as `mmalign.respond.run`.
    """
    block = config.benchmark
    if block is not None and block.model is not None:
        rows = [row for rows in _asked(config, block)[0] for row in rows]
        respond(rows, block.model, config.output / RESPONSES, block.model)


def answer_rows(config: ScoreConfig) -> list[MediaRow]:
    """The questions that the config's evaluators are for, with their answers.

    Raises:
        ValueError: files that cannot be read or joined; or the model has not answered yet.
    """
    block = config.benchmark
    assert block is not None
    questions, unasked = _asked(config, block)
    if block.responses is not None:
        return answered(block.kind, questions, block.responses, unasked)
    table = config.output / RESPONSES / "table.jsonl"
    if not table.is_file():
        raise ValueError(
            f"{table} is not there: the model has not answered yet. Run without --dry-run, which answers first"
        )
    wanted = {row.sample for rows in questions for row in rows}
    return [row for row in read_media_table(table, questions=True) if row.sample in wanted]


def _asked(config: ScoreConfig, block: Answers) -> tuple[list[list[MediaRow]], set[str]]:
    """The rows of each file for which an evaluator is named, and the samples of the others."""
    names = {spec.name.partition("@")[0] for spec in config.evaluators}
    found = read_questions(block.kind, block.questions, _expanded(block.images), block.annotations)
    kept = [[row for row in rows if not row.dimensions or names & set(row.dimensions)] for rows in found]
    if not any(kept):
        meant = sorted({name for rows in found for row in rows for name in row.dimensions or ()})
        raise ValueError(f"benchmark.kind {block.kind} is for {' and '.join(meant)}; name one of them in evaluators")
    asked = {row.sample for rows in kept for row in rows}
    return kept, {row.sample for rows in found for row in rows} - asked


def _expanded(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser()
