"""Pairs for people: those on which the rewards disagree most, as a table and a page; and their answers merged back."""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign import labelling
from mmalign.formats import Verdict
from mmalign.jobs_prefer import PHI, Route
from mmalign.media_table import portable, write_json_lines
from mmalign.records import MediaRef, Record, missing_columns, read_records
from mmalign.report_media import inline
from mmalign.source import whole_file
from mmalign.tables import PreferenceRow, read_preferences, write_preferences

if TYPE_CHECKING:
    from mmalign.prefer import Ranked

HUMAN = "human"
COLUMNS = ("pair", "prompt", "a", "b", "disagreement", "answer", "user_id")
_ANSWERS: dict[str, Verdict] = {"a": "A", "b": "B", "same": "same"}


# ------------------------------------------------------------------------------------------------ out


def write_to_label(folder: Path, ranked: Sequence[Ranked], route: Route) -> int:
    """Write to_label.jsonl, .csv and .html with the pairs of largest expected disagreement; how many they are.

    The measure is `labelling.disagreement`; among equals the pair that phi separates least comes first. Pairs on which
    the rewards are of one mind are never asked about. Which picture is A is drawn by the pair's name and the seed, so
    that neither side is the favourite's. A file in which somebody has begun to answer is not overwritten.

    Raises:
        ValueError: to_label.jsonl or .csv holds answers, and other pairs would be asked about now.
    """
    home = os.path.abspath(folder)
    rows = [_question(each, i, j, d, home, route.seed) for d, each, i, j in _most_disputed(ranked, route, home)]
    for name in ("to_label.jsonl", "to_label.csv"):
        if _answered(folder / name):
            asked = [record.values.get("pair") for record in read_records(folder / name)]
            if asked != [row["pair"] for row in rows]:
                raise ValueError(
                    f"{folder / name} holds answers, to other pairs than would be asked about now; "
                    "merge it with `mmalign prefer merge`, or move it away"
                )
            return len(rows)
    if not rows:  # nothing disputed: what an earlier config asked, and nobody answered, is not asked any more
        for suffix in (".jsonl", ".csv", ".html"):
            (folder / f"to_label{suffix}").unlink(missing_ok=True)
        return 0
    write_json_lines(folder / "to_label.jsonl", rows)
    with whole_file(folder / "to_label.csv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([[_cell(row[name]) for name in COLUMNS] for row in rows])
    with whole_file(folder / "to_label.html") as temporary:
        temporary.write_text(_page(rows, home, route.side), encoding="utf-8")
    return len(rows)


def pair_name(prompt: str, a: MediaRef, b: MediaRef, home: str) -> str:
    """A pair's name in tables of questions and answers: it depends on prompt, media and order.

    `home` is the table's folder: paths below it count relative to it, so that the folder can be moved. It begins with a
    letter, so that no spreadsheet takes it for a number.
    """
    parts = [prompt, portable(a, home), portable(b, home)]
    return "p" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:15]


def _most_disputed(ranked: Sequence[Ranked], route: Route, home: str) -> list[tuple[float, Ranked, int, int]]:
    found = []
    for each in ranked:
        first, second = labelling.pair_index(len(each.phi))
        apart = abs(each.phi[first] - each.phi[second])
        for n, value in enumerate(labelling.disagreement(each.vote)):
            if value > 0:
                i, j = int(first[n]), int(second[n])
                found.append((-round(float(value), 9), round(float(apart[n]), 9), each, i, j))
    found.sort(key=lambda item: item[:2])  # stable: equals stay in the order of the table
    taken: dict[str, int] = {}
    chosen: list[tuple[float, Ranked, int, int]] = []
    for value, _, each, i, j in found:
        if taken.get(each.group.prompt, 0) < route.per_prompt and len(chosen) < route.count:
            taken[each.group.prompt] = taken.get(each.group.prompt, 0) + 1
            chosen.append((-value, each, i, j))
    return chosen


def _question(each: Ranked, i: int, j: int, value: float, home: str, seed: int) -> dict[str, Any]:
    refs = [MediaRef(m) if isinstance(m, str) else m for m in (each.group.rows[i].media, each.group.rows[j].media)]
    name = pair_name(each.group.prompt, refs[0], refs[1], home)
    if hashlib.sha256(f"{seed} {name}".encode()).digest()[0] % 2:
        refs.reverse()
        name = pair_name(each.group.prompt, refs[0], refs[1], home)
    a, b = (portable(ref, home) for ref in refs)
    values = (name, each.group.prompt, a, b, round(value, 6), "", "")
    return dict(zip(COLUMNS, values, strict=True))


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value


def _answered(path: Path) -> bool:
    return path.is_file() and any(str(r.values.get("answer") or "").strip() for r in read_records(path))


def _page(rows: Sequence[Mapping[str, Any]], home: str, side: int) -> str:
    """The page that shows the pairs: pictures inside, one small script of its own, nothing fetched."""
    from jinja2 import Environment, StrictUndefined

    pairs = []
    for row in rows:
        tiles = [inline(_ref(row[name], home), side) for name in ("a", "b")]
        kept = {name: row[name] for name in ("pair", "prompt", "a", "b")}
        pairs.append({"prompt": row["prompt"], "tiles": tiles, "row": kept})
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("mmalign").joinpath("to_label.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(pairs=pairs)


def _ref(value: Any, home: str) -> MediaRef:
    if isinstance(value, str):
        return MediaRef(os.path.join(home, value))
    cell = {name: value.get(name) for name in ("row", "column", "item")}
    return MediaRef(os.path.join(home, value["file"]), **cell)


# ------------------------------------------------------------------------------------------------ back


@dataclass(frozen=True)
class Merged:
    """What became of the answers: how many there are, and how many rows were replaced and added."""

    answers: int
    people: int
    replaced: int
    added: int
    blank: int
    repeated: int
    unknown: tuple[str, ...]

    def sentence(self) -> str:
        """Such as "12 answers of 2 people: 8 rows replaced, 4 added; 3 blank, 1 repeated, 0 of unknown pairs"."""
        names = f" ({', '.join(self.unknown[:3])})" if self.unknown else ""
        return (
            f"{self.answers} answers of {self.people} people: {self.replaced} rows replaced, {self.added} added; "
            f"{self.blank} blank, {self.repeated} repeated, {len(self.unknown)} of unknown pairs{names}"
        )


def merge(
    table: Path, answers: Sequence[Path], output: Path, *, user: str | None = None, dimension: str | None = None
) -> Merged:
    """Write the table with people's answers in it.

    An answer becomes a `label` row with its `user_id` and the source "human". It takes the place of the rewards' row of
    those two media (a row with `scores`), where there is one; rows that people labelled before, rankings of more media,
    and other people's answers stay beside it. Its dimension is that of the rows around it, so that training reads both.

    Args:
        table: the preference table. to_label.jsonl beside it says which pairs were asked about; pairs of the table's
            own rows are known without.
        answers: JSONL or CSV with `pair`, `answer` (A, B, same; empty is none) and perhaps `user_id`.
        output: the table to write, .jsonl.
        user: `user_id` of answers that have none.
        dimension: what was asked; None: phi where the table has it, else its only dimension.

    Raises:
        ValueError: another answer than these, two different ones of one person to one pair, only unknown pairs, no
            answer at all, or several dimensions to choose from.
    """
    rows = read_preferences(table, verify=False).rows
    asked = dimension or asked_about(rows, table)
    home = os.path.abspath(table if table.is_dir() else table.parent)
    given, blank, repeated = _given(answers, user)
    pairs = _known_pairs(rows, home, {name for name, _ in given})
    unknown = tuple(dict.fromkeys(name for name, _ in given if name not in pairs))
    known = {key: verdict for key, verdict in given.items() if key[0] in pairs}
    if not known:
        said = f"{len(given)} answers are to pairs that {table} does not have" if given else "nothing is answered"
        raise ValueError(f"{', '.join(map(str, answers))}: {said}; check that files and table belong together")
    theirs: dict[frozenset[MediaRef], list[PreferenceRow]] = {}
    for (name, who), verdict in known.items():
        prompt, a, b = pairs[name]
        row = PreferenceRow(prompt, (a, b), label={asked: verdict}, user_id=who, source=HUMAN)
        theirs.setdefault(frozenset((a, b)), []).append(row)
    merged, replaced = _replace(rows, theirs)
    added = sum(len(each) for each in theirs.values())
    write_preferences(output, [*merged, *(row for each in theirs.values() for row in each)])
    people = len({who for _, who in known})
    return Merged(len(known), people, replaced, added, blank, repeated, unknown)


def _replace(
    rows: Sequence[PreferenceRow], theirs: dict[frozenset[MediaRef], list[PreferenceRow]]
) -> tuple[list[PreferenceRow], int]:
    """Rows with the rewards' pairs replaced by people's; what was used is taken out of `theirs`."""
    merged: list[PreferenceRow] = []
    replaced = 0
    done: set[tuple[str, frozenset[MediaRef]]] = set()
    for row in rows:
        key = frozenset(row.media)
        mine = [each for each in theirs.get(key, ()) if each.prompt == row.prompt]
        if row.scores is None or len(row.media) != 2 or not (mine or (row.prompt, key) in done):
            merged.append(row)
            continue
        replaced += 1
        done.add((row.prompt, key))
        merged += [replace(each) for each in mine]
        theirs[key] = [each for each in theirs.get(key, ()) if each.prompt != row.prompt]
    return merged, replaced


def asked_about(rows: Sequence[PreferenceRow], table: Path) -> str:
    """The dimension that a table is about: phi where it has it, else its only one; ValueError for several."""
    names = sorted({name for row in rows for name in row.dimensions()})
    if PHI in names or len(names) == 1:
        return PHI if PHI in names else names[0]
    raise ValueError(f"{table} judges {', '.join(names)}; say with --dimension which of them people were asked about")


def _known_pairs(
    rows: Sequence[PreferenceRow], home: str, wanted: set[str]
) -> dict[str, tuple[str, MediaRef, MediaRef]]:
    """Name -> prompt and media, in the order asked, of the pairs in to_label.jsonl; and of each two media of a row,
    where some answer is to none of those.
    """
    found = {}
    asked = Path(home) / "to_label.jsonl"
    for record in read_records(asked) if asked.is_file() else ():
        values = record.values
        found[str(values["pair"])] = (values["prompt"], record.path(values["a"]), record.path(values["b"]))
    for row in rows if wanted - set(found) else ():
        for a, b in permutations(row.media, 2):
            found.setdefault(pair_name(row.prompt, a, b, home), (row.prompt, a, b))
    return found


def _given(paths: Sequence[Path], user: str | None) -> tuple[dict[tuple[str, str | None], Verdict], int, int]:
    """(pair, person) -> answer; how many lines are blank, and how many say again what was said."""
    given: dict[tuple[str, str | None], Verdict] = {}
    where: dict[tuple[str, str | None], str] = {}
    blank = repeated = 0
    for path in paths:
        records = read_records(path)
        absent = [name for name in ("pair", "answer") if name not in records.columns]
        if absent:
            raise ValueError(missing_columns(path, absent, records.columns, "a file of answers"))
        for record in records:
            verdict = _verdict(record)
            if verdict is None:
                blank += 1
                continue
            who = record.values.get("user_id")
            key = (str(record.values["pair"]), user if who in (None, "") else str(who))
            if given.get(key, verdict) != verdict:
                name = f" by {key[1]}" if key[1] else ""
                raise ValueError(
                    f"{record.origin}: pair {key[0]} is answered {verdict}{name}, and {given[key]} in {where[key]}; "
                    "keep one, or give different people a user_id each"
                )
            repeated += key in given
            given[key], where[key] = verdict, record.origin
    return given, blank, repeated


def _verdict(record: Record) -> Verdict | None:
    value = record.values.get("answer")
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    if text.lower() not in _ANSWERS:
        raise ValueError(f"{record.origin}: the answer is {text!r}; it is A, B or same, or empty for none")
    return _ANSWERS[text.lower()]


__all__ = ["HUMAN", "Merged", "asked_about", "merge", "pair_name", "write_to_label"]
