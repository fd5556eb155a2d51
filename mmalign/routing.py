"""Pairs for people: those on which the rewards disagree most, as a table and a page; and their answers merged back."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mmalign import labelling
from mmalign.jobs_prefer import PHI, Route
from mmalign.media_table import portable, to_json
from mmalign.preference_row import Verdict
from mmalign.records import MediaRef, Record, Records, json_lines, missing_columns, read_records
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
    that neither side is the favourite's. Where somebody has filled in or changed a table, nothing is overwritten.

    Raises:
        ValueError: to_label.jsonl or .csv was changed since it was written, and cannot be read, or asks about other
            pairs than would be asked about now.
    """
    home = os.path.abspath(folder)
    rows = [_question(each, i, j, d, home, route.seed) for d, each, i, j in _most_disputed(ranked, route, home)]
    if _in_use(folder, rows):
        return len(rows)
    if not rows:  # nothing disputed: what an earlier config asked, and nobody answered, is not asked any more
        for suffix in (".csv", ".jsonl", ".html"):
            (folder / f"to_label{suffix}").unlink(missing_ok=True)
        return 0
    for name, rendered in _TABLES.items():
        with whole_file(folder / name) as temporary:
            temporary.write_bytes(rendered(rows))
    with whole_file(folder / "to_label.html") as temporary:
        shown = {row["pair"]: [_ref(row[name], home) for name in ("a", "b")] for row in rows}
        temporary.write_text(question_page(rows, shown, route.side), encoding="utf-8")
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


def _as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([[_cell(row[name]) for name in COLUMNS] for row in rows])
    return text.getvalue().encode()


def _as_jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(to_json(row, str(row["pair"])) + "\n" for row in rows).encode()


# The CSV is written first: an untouched one is told by the JSONL beside it, which so is never the newer of the two.
_TABLES = {"to_label.csv": _as_csv, "to_label.jsonl": _as_jsonl}


def _in_use(folder: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a table of questions is not, byte for byte, what this or an earlier run wrote; ValueError as above.

    Looking for answers instead would miss those in a file that a spreadsheet saved in a form of its own.
    """
    before = _as_written(folder / "to_label.jsonl")
    changed = False
    for name, rendered in _TABLES.items():
        path = folder / name
        if not path.is_file() or path.read_bytes() in (rendered(rows), rendered(before)):
            continue
        changed = True
        try:
            asked = {record.values.get("pair") for record in _answer_records(path)}
        except ValueError as error:
            raise ValueError(f"{path} was changed by hand and cannot be read; repair or move it: {error}") from None
        if asked - {None, ""} != {row["pair"] for row in rows}:
            raise ValueError(
                f"{path} was filled in or changed, and asks about other pairs than would be asked about now; "
                "merge it with `mmalign prefer merge`, or move it away"
            )
    return changed


def _as_written(path: Path) -> list[dict[str, Any]]:
    """The questions of an earlier to_label.jsonl without their answers; none where it is not one of ours."""
    try:
        lines = [values for _, values in json_lines(path)] if path.is_file() else []
    except ValueError:
        return []
    ours = all(tuple(values) == COLUMNS for values in lines)
    return [{**values, "answer": "", "user_id": ""} for values in lines] if ours else []


MERGE = "Then hand the downloaded file to `mmalign prefer merge`."


def question_page(
    rows: Sequence[Mapping[str, Any]], shown: Mapping[str, Sequence[MediaRef]], side: int, then: str = MERGE
) -> str:
    """The page that shows pairs: pictures inside, one small script of its own, nothing fetched.

    Args:
        rows: with pair, prompt, a and b, which the downloaded answers repeat.
        shown: the two pictures of each pair.
        side: longest side of a picture, in pixels.
        then: what to do with the answers.
    """
    from jinja2 import Environment, StrictUndefined

    pairs = []
    for row in rows:
        tiles = [inline(ref, side) for ref in shown[row["pair"]]]
        kept = {name: row[name] for name in ("pair", "prompt", "a", "b")}
        pairs.append({"prompt": row["prompt"], "tiles": tiles, "row": kept})
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("mmalign").joinpath("to_label.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(pairs=pairs, then=re.split("`", then))


def _ref(value: Any, home: str) -> MediaRef:
    if isinstance(value, str):
        return MediaRef(os.path.join(home, value))
    cell = {name: value.get(name) for name in ("row", "column", "item")}
    return MediaRef(os.path.join(home, value["file"]), **cell)


# ------------------------------------------------------------------------------------------------ back


@dataclass(frozen=True)
class Merged:
    """What became of the answers: how many are new, and how many rows were replaced and added."""

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
    those two media (`of_rewards`), where there is one; rows that people labelled or rated before, rankings of more
    media, and other people's answers stay beside it. An answer that the table holds already, by the same person or
    nameless both times, is repeated. Its dimension is that of the rows around it, so that training reads both.

    Args:
        table: the preference table. to_label.jsonl beside it says which pairs were asked about; pairs of the table's
            own rows are known without.
        answers: JSONL or CSV with `pair`, `answer` (A, B, same; empty is none) and perhaps `user_id`. A CSV may be
            parted by semicolons or tabs, and name its columns in capitals.
        output: the table to write, .jsonl; none of the files that are read.
        user: `user_id` of answers that have none.
        dimension: what was asked; None: phi where the table has it, else its only dimension.

    Raises:
        ValueError: another answer than these, two different ones of one person to one pair (in the answers or the
            table), only unknown pairs, no answer at all, several dimensions to choose from, or an output that is read.
    """
    home = os.path.abspath(table if table.is_dir() else table.parent)
    refuse_overwriting(output, [*table_files(table), *answers, Path(home) / "to_label.jsonl"])
    rows = read_preferences(table, verify=False).rows
    asked = dimension or asked_about(rows, table)
    given, blank, repeated = _given(answers, user)
    pairs = _known_pairs(rows, home, {name for name, _ in given})
    facts = _facts(rows)
    unknown = tuple(dict.fromkeys(name for name, _ in given if name not in pairs))
    known = {key: verdict for key, verdict in given.items() if key[0] in pairs}
    if not known:
        said = f"{len(given)} answers are to pairs that {table} does not have" if given else "nothing is answered"
        raise ValueError(f"{', '.join(map(str, answers))}: {said}; check that files and table belong together")
    held = {_said(row, asked) for row in rows if row.user_id is not None or row.source == HUMAN}
    before = frozenset(held)
    theirs: dict[_Pair, list[PreferenceRow]] = {}
    new: list[PreferenceRow] = []
    for (name, who), verdict in known.items():
        prompt, a, b = pairs[name]
        told: dict[str, Any] = {name: both for name, of in facts.items() if any(both := (of.get(a), of.get(b)))}
        row = PreferenceRow(prompt, (a, b), label={asked: verdict}, user_id=who, source=HUMAN, **told)
        contrary = {_said(replace(row, label={asked: other}), asked) for other in get_args(Verdict) if other != verdict}
        if who is not None and contrary & held:
            where = table if contrary & before else "the answers, with A and B in each other's place"
            raise ValueError(f"pair {name}: {who} says another thing in {where}; take out the one that does not hold")
        answered = theirs.setdefault((prompt, frozenset((a, b))), [])  # also where the table has all of it
        if _said(row, asked) not in held:
            held.add(_said(row, asked))
            answered.append(row)
            new.append(row)
    merged, replaced, added = _replace(rows, theirs)
    write_preferences(output, merged)
    people = len({row.user_id for row in new})
    return Merged(len(new), people, replaced, added, blank, repeated + len(known) - len(new), unknown)


_Pair = tuple[str, frozenset[MediaRef]]


def _facts(rows: Sequence[PreferenceRow]) -> dict[str, dict[MediaRef, Any]]:
    """What the table says of its media: rate, number of frames, model -> medium -> value."""
    found: dict[str, dict[MediaRef, Any]] = {"fps": {}, "num_frames": {}, "models": {}}
    for row in rows:
        for name, known in found.items():
            known.update(zip(row.media, getattr(row, name) or (), strict=False))
    return found


def _replace(
    rows: Sequence[PreferenceRow], theirs: Mapping[_Pair, list[PreferenceRow]]
) -> tuple[list[PreferenceRow], int, int]:
    """Rows with the rewards' rows of answered pairs replaced by people's, which else come last; replaced and added."""
    left = dict(theirs)
    merged: list[PreferenceRow] = []
    replaced = 0
    for row in rows:
        pair = row.prompt, frozenset(row.media)
        if of_rewards(row) and len(row.media) == 2 and pair in theirs:
            replaced += 1
            merged += left.pop(pair, [])
        else:
            merged.append(row)
    added = [row for each in left.values() for row in each]
    return [*merged, *added], replaced, len(added)


def _said(row: PreferenceRow, asked: str) -> tuple[Any, ...] | None:
    """Who preferred which of two media, however they stand; None for a row without such a label."""
    verdict = (row.label or {}).get(asked)
    if verdict is None:
        return None
    preferred = {"A": row.media[0], "B": row.media[1], "same": None}[verdict]
    return row.prompt, frozenset(row.media), preferred, row.user_id


def of_rewards(row: PreferenceRow) -> bool:
    """Whether a row is a ranking by rewards: it has scores, and nobody's name; people's ratings have a `user_id`."""
    return row.scores is not None and row.user_id is None


def table_files(table: Path) -> list[Path]:
    """The files that a preference table is read from: itself, or those of its folder."""
    return [*table.glob("*.parquet"), table / "metadata.jsonl"] if table.is_dir() else [table]


def refuse_overwriting(output: Path, inputs: Iterable[Path], option: str = "-o") -> None:
    """ValueError where `output` is, links resolved, one of the files that are read; `option` is what names it."""
    if output.resolve() in {path.resolve() for path in inputs}:
        raise ValueError(f"{output} is read, and would be overwritten; name another file with {option}")


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
        records = _answer_records(path)
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


def answers_in(paths: Sequence[Path]) -> dict[tuple[str, str | None], Verdict]:
    """(pair, person) -> answer, of files as `merge` takes them. ValueError for other answers, or two different ones."""
    return _given(paths, None)[0]


def _answer_records(path: Path) -> Records:
    return _spreadsheet(path) if path.suffix.lower() in (".csv", ".tsv") and path.is_file() else read_records(path)


def _spreadsheet(path: Path) -> Records:
    """A CSV as spreadsheets save it: parted by what parts its header, names in small letters, empty cells at the end.

    ValueError where it is no text, broken, without rows, or says two things of one name.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
        first = next((line for line in text.splitlines() if line.strip()), "")
        told = re.match(r'"?sep=(.)"?[\s,;]*$', first, re.IGNORECASE)  # a line that Excel writes and hides
        separator = told[1] if told else max(",;\t", key=first.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
        lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)][bool(told) :]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise ValueError(f"{path} is not a whole CSV ({error}); save it as CSV again") from None
    header = [name.strip().lower() for name in lines[0][1]] if lines else []
    named = {name: place for place, name in enumerate(header) if name}
    if len(named) < len(list(filter(None, header))) or len(lines) < 2:
        raise ValueError(f"{path} has two columns of one name, or no rows below its names; correct it")
    rows = []
    for number, cells in lines[1:]:
        where = f"{path.name} line {number}"
        if any(cell.strip() for cell in cells[len(header) :]):
            raise ValueError(f"{where}: {len(cells)} cells under {len(header)} names; quote cells with a separator")
        values: dict[str, Any] = {name: cells[place] if place < len(cells) else "" for name, place in named.items()}
        rows.append(Record(values, where, path, number, path.parent))
    return Records(path, tuple(named), rows)


def _verdict(record: Record) -> Verdict | None:
    value = record.values.get("answer")
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    if text.lower() not in _ANSWERS:
        raise ValueError(f"{record.origin}: the answer is {text!r}; it is A, B or same, or empty for none")
    return _ANSWERS[text.lower()]


__all__ = [
    "HUMAN", "Merged", "answers_in", "asked_about", "merge", "of_rewards", "pair_name", "question_page",
    "refuse_overwriting", "table_files", "write_to_label",
]  # fmt: skip
