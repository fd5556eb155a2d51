"""AMBER: what a picture holds, asked openly and by yes and no; its files, and the figures of its questions.

Wang et al., 2311.07397; junyangwang0410/AMBER (Apache-2.0). Queries are `{id, image, query}`, annotations `{id, type,
truth, hallu}`, answers `[{id, response}]`. Positive is "no", a hallucination refused. Every question of existence is to
be answered no, so that a model that always says no is perfect there: the yes-ratio stands beside each figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmalign.hallucination import amber_captions
from mmalign.hallucination.files import image_path, json_rows, needed
from mmalign.hallucination.yes_no import counted, rates
from mmalign.media_table import MediaRow

__all__ = ["PARTS", "answers", "figures", "printed_f1", "questions", "score"]

PARTS = {
    "discriminative-hallucination": ("existence",),
    "discriminative-attribute-state": ("attribute", "attribute-state"),
    "discriminative-attribute-number": ("attribute", "attribute-number"),
    "discriminative-attribute-action": ("attribute", "attribute-action"),
    "discriminative-relation": ("relation",),
    "relation": ("relation",),
}
"""The dimensions that a type of question counts in; the authors count both kinds of relation as one."""


def questions(file: Path, images: Path | None, annotations: Path) -> list[MediaRow]:
    """The rows of a file of queries, clustered by image; `aux` has id, type, and truth and hallu (lists, of open
    queries) or label (yes, no). They name `amber_generative` and `amber_discriminative` as their evaluators.

    Raises:
        ValueError: not the layout, or queries that the annotations do not have.
    """
    known = {}
    for number, line in enumerate(json_rows(annotations), 1):
        name, kind, truth = needed(line, f"{annotations}: entry {number}", "id", "type", "truth")
        known[str(name)] = (kind, truth, line.get("hallu"))
    rows = []
    for number, line in enumerate(json_rows(file), 1):
        name, image, query = needed(line, f"{file}: entry {number}", "id", "image", "query")
        if str(name) not in known:
            raise ValueError(f"{annotations} has no entry for the query {name} of {file}; are both of one release?")
        kind, truth, hallu = known[str(name)]
        aux: dict[str, Any] = {"id": name, "type": kind}
        if kind == "generative":
            aux |= {"truth": truth, "hallu": hallu or []}
        elif kind not in PARTS or truth not in ("yes", "no"):
            raise ValueError(
                f"{annotations}: {name} is of type {kind!r} with truth {truth!r:.40}, which is not AMBER's"
            )
        else:
            aux["label"] = truth
        asked = "amber_generative" if kind == "generative" else "amber_discriminative"
        rows.append(MediaRow(str(name), query, image_path(images, image), group=image, dimensions=(asked,), aux=aux))
    return rows


def answers(file: Path, rows: Sequence[MediaRow]) -> dict[str, str]:
    """Saved answers, `[{id, response}]`. ValueError for another layout, or a query that is answered twice."""
    found: dict[str, str] = {}
    for number, line in enumerate(json_rows(file), 1):
        name, text = needed(line, f"{file}: entry {number}", "id", "response")
        if str(name) in found:
            raise ValueError(f"{file}: entry {number}: query {name} is answered twice")
        found[str(name)] = str(text)
    return found


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of all, of existence, attribute (and state, number, action) and relation: `accuracy, precision, recall, f1` with
    no as the positive class, f1_printed (see `printed_f1`), yes_ratio and unknown; the mean length in words."""
    parts: dict[str, Counter[tuple[float, float, float]]] = {"": Counter()}
    for kind, counts in counted(rows, lambda row: row["aux"]["type"]).items():
        for part in ("", *(f"{name}/" for name in PARTS[kind])):
            parts.setdefault(part, Counter()).update(counts)
    found: dict[str, float | None] = {}
    for part in sorted(parts):
        found |= {part + name: value for name, value in rates(parts[part], "no").items()}
        found[f"{part}f1_printed"] = printed_f1(parts[part], 1e-3 if part == "existence/" else 1e-4)
    found["words"] = sum(row["scores"]["words"] for row in rows) / len(rows)
    return found


def score(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """AMBER's score, (100 - CHAIR + F1) / 2, in percent: of rows of both evaluators, CHAIR of the descriptions and F1
    of the yes/no questions; None where one of them is not defined. Nothing is rounded on the way."""
    described = [row for row in rows if "nouns" in row["scores"]]
    asked = [row for row in rows if "nouns" not in row["scores"]]
    if not described or not asked:
        return None
    chair = amber_captions.figures(described)["chair"]
    f1 = rates(counted(asked, lambda row: "")[""], "no")["f1"]
    return None if chair is None or f1 is None else 50 * (1 - chair + f1)


def printed_f1(counts: Mapping[tuple[float, float, float], int], epsilon: float = 1e-4) -> float:
    """F1 as inference.py prints it, as a share: from precision and recall that are rounded to 0.1 %, with an epsilon
    below (1e-3 for existence), counters that begin at 0.001, and rounded itself."""
    said = due = both = 0
    for (yes, neither, due_yes), number in counts.items():
        said_no, due_no = not neither and not yes, not due_yes
        said, due, both = said + number * said_no, due + number * due_no, both + number * (said_no and due_no)
    precision = round(both / (said + 0.001) * 100, 1) / 100
    recall = round(both / (due + 0.001) * 100, 1) / 100
    return round(2 * precision * recall / (precision + recall + epsilon) * 100, 1) / 100
