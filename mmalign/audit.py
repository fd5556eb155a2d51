"""`mmalign prefer audit`: look at labels before training on them.

Who agrees with whom, what a reward's differences are worth as probabilities, how many ties there are, what the
preferred side looks like, and how each person judged; as a table, as JSON, and as a page.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmalign import audit_figures as figures
from mmalign.audit_table import PROPERTIES, Judgement, Key, evaluate, folder_scores, judgements, own_scores, properties
from mmalign.figures import number
from mmalign.jobs import EvaluatorSpec
from mmalign.prefer_summary import interval, percent
from mmalign.preference_row import counted
from mmalign.results import read_results
from mmalign.routing import asked_about, of_rewards, refuse_overwriting, table_files
from mmalign.source import whole_file
from mmalign.tables import PreferenceRow, read_preferences

_SHOWN = 12  # people in the printed table; the JSON has them all


def run(
    table: Path,
    *,
    format: str = "auto",
    root: Path | None = None,
    dimension: str | None = None,
    scores: Sequence[Path] = (),
    evaluators: Sequence[EvaluatorSpec] = (),
    limit: int | None = None,
    pictures: bool = True,
    output: Path | None = None,
    html: Path | None = None,
) -> Path:
    """Audit a preference table, print the figures, and return the JSON file that holds them.

    Args:
        table: in any known format; `format` and `root` as for training.
        dimension: which judgement is audited; None: phi where the table has it, else its only one.
        scores: results folders with scores of the same media, which are found by prompt and content.
        evaluators: to score the media with, into the folder of `output`; done once.
        limit: only the first rows.
        pictures: read the pictures, for the biases; pictures that cannot be read are counted.
        output: the JSON file; None: audit.json in the table's folder, for a table that is a folder NAME.audit.json
            beside it.
        html: a self-contained page to write too.

    Raises:
        ValueError: what the readers of tables and results raise; several dimensions to choose from; nothing judged;
            `output` or `html` is a file that is read, or both are the same.
    """
    beside = Path(f"{os.path.abspath(table)}.audit.json") if table.is_dir() else None
    output = output or beside or table.parent / "audit.json"
    inputs = [*table_files(table), *(file for folder in scores for file in _results_files(folder))]
    refuse_overwriting(output, inputs)
    if html is not None:
        refuse_overwriting(html, [*inputs, output], "--html")
    held = read_preferences(table, format, root, verify=False)
    rows = held.rows[:limit]
    asked = dimension or asked_about(rows, table)
    given = judgements(rows, asked)
    if not given:
        names = sorted({name for row in rows for name in row.dimensions()})
        raise ValueError(f"{table} judges nothing on {asked!r}; it judges {', '.join(names)}")
    keys = list(dict.fromkeys((each.prompt, ref) for each in given for ref in (each.a, each.b)))
    rewards = own_scores(rows, asked)
    for folder in scores:
        rewards |= folder_scores(read_results(folder), keys)
    if evaluators:
        rewards |= folder_scores(evaluate(evaluators, keys, output.with_name(f"{output.stem}-scores")), keys)
    found = examine(given, rewards, pictures=pictures)
    about = {"table": str(table), "dimension": asked, "rows": len(rows), "dropped": counted(held.dropped)}
    found = {**about, **found, "remarks": [*_remarks(rows, asked, given, found), *found["remarks"]]}
    _write(output, json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if html is not None:
        _write(html, page(found))
    show(found)
    return output


def _results_files(folder: Path) -> list[Path]:
    return [folder / "summary.json", folder / "run.json", *(folder / "parts").glob("*")]


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def examine(
    given: Sequence[Judgement], rewards: dict[str, dict[Key, float]], *, pictures: bool = True
) -> dict[str, Any]:
    """All figures over judgements; see `mmalign.audit_figures` for each.

    Scores are held against what people said, where anybody did, and else against the rewards' own ranking; `against`
    says which. The two are never mixed: that rewards agree with what was made of them would pass for a merit.
    """
    by_pair = figures.units(given)
    people = figures.by_people(given)
    judges = people or given
    refs = list(dict.fromkeys(ref for each in given for ref in (each.a, each.b))) if pictures else []
    seen, unseen, reason = properties(refs)
    remarks = [f"{unseen} of {len(refs)} pictures cannot be read, the first because {reason}."] if unseen else []
    return {
        "judgements": len(given),
        "by_people": len(people),
        "by_rewards": len(given) - len(people),
        "pairs": len({each.pair for each in given}),
        "prompts": len({each.prompt for each in given}),
        "pictures": len(refs),
        "ties": figures.ties(given),
        "first": figures.position(given),
        "annotators": figures.annotators(by_pair),
        "against": "people" if people else "rewards",
        "rewards": {name: figures.reward(judges, scores) for name, scores in rewards.items()},
        "biases": figures.biases(given, seen),
        "prompt_length": figures.by_prompt_length(judges, rewards),
        "people": figures.people(given, by_pair),
        "remarks": remarks,
    }


def _remarks(rows: Sequence[PreferenceRow], asked: str, given: Sequence[Judgement], found: dict[str, Any]) -> list[str]:
    """What a reader has to know before trusting the figures, a sentence each."""
    said = []
    made = [row for row in rows if of_rewards(row) and asked in row.dimensions()]
    if found["by_people"] and found["by_rewards"]:
        said.append(
            f"{found['by_rewards']} of {found['judgements']} judgements are the rewards' own ranking: they count in "
            "ties, sides and biases, not in agreement, and no score is held against them."
        )
        if found["rewards"] and not any(entry["n"] for entry in found["rewards"].values()):
            said.append(
                "The table has no scores of the pairs that people judged, since their answers took the place of those "
                "rows; name the results folder with --scores."
            )
    elif made and found["rewards"]:
        said.append(
            f"{asked} of {len(made)} rows was made from scores that stand beside it; that they agree with it proves "
            "nothing. People's answers, or scores that had no part in it, do."
        )
    first = found["first"]
    if first["n"] >= 10 and first["share"] in (0.0, 1.0):
        which = "first" if first["share"] else "second"
        said.append(f"The {which} medium always wins: this table writes it there, so the sides say nothing of people.")
    if not found["annotators"]["krippendorff"]["n"]:
        said.append("No pair was judged by two people, so nothing is known of their agreement.")
    weights = {each.weight for each in given}
    if len(weights) > 1:
        said.append("Rows have different weights; every judgement counts once here.")
    return said


# ------------------------------------------------------------------------------------------------ shown


def sections(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The audit as tables of text, for the terminal and for the page: title, note, headings, rows."""
    every = [_overview(found), _rewards(found), _calibration(found), _biases(found), _lengths(found), _people(found)]
    return [section for section in every if section["rows"]]


def _section(title: str, note: str, headings: Sequence[str], rows: list[list[str]]) -> dict[str, Any]:
    return {"title": title, "note": note, "headings": list(headings), "rows": rows}


def _overview(found: dict[str, Any]) -> dict[str, Any]:
    of = found["annotators"]["krippendorff"]
    known = of["alpha"] is not None
    value = f"{number(of['alpha'], 3)} [{number(of['low'], 3)}, {number(of['high'], 3)}]" if known else "–"  # noqa: RUF001
    agree = found["annotators"]["agree"]
    rows = [
        ["ties", percent(found["ties"]), str(found["ties"]["n"])],
        ["first side preferred", percent(found["first"]), str(found["first"]["n"])],
        ["people agree", percent(agree), str(agree["n"])],
        ["Krippendorff's alpha", value, str(of["n"])],
    ]
    title = f"{found['judgements']} judgements of {found['pairs']} pairs, {found['prompts']} prompts"
    note = "Ties are left out of the sides; agreement is on pairs that several people judged, alpha nominal."
    return _section(title, note, ("", "share [95 %]", "n"), rows)


def _judges(found: dict[str, Any]) -> str:
    """Whom scores are held against, in words."""
    if found["against"] == "rewards":
        return "the rewards' own ranking, since no answer of a person is in the table"
    return f"the {found['by_people']} judgements of people"


def _rewards(found: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, entry in found["rewards"].items():
        fit = entry["calibration"]
        cells = [name, percent(entry["accuracy"]), str(entry["accuracy"]["n"]), str(entry["missing"])]
        if fit is None:
            rows.append([*cells, *["–"] * 4])  # noqa: RUF001
        else:
            cells += [number(fit["temperature"], 3), interval(fit["nll"]), number(fit["brier"]["mean"], 3)]
            rows.append([*cells, number(fit["ece"], 3)])
    note = (
        f"Against {_judges(found)}. Accuracy: share of decided judgements that the score decides alike. "
        "P(A>B) = 1 / (1 + exp(-difference / T)), T fitted on one half of the prompts; NLL (ignorance: 0.693), Brier "
        "(ignorance: 0.25 times the share that is no tie) and ECE on the other."
    )
    headings = ("score", "accuracy [95 %]", "n", "unscored", "T", "NLL [95 %]", "Brier", "ECE")
    return _section("Do scores agree with the labels?", note, headings, rows)


def _calibration(found: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for name, entry in found["rewards"].items():
        for each in (entry["calibration"] or {"bins": []})["bins"]:
            if each["won"]["n"]:
                ends = f"{each['from']:.1f} to {each['to']:.1f}"
                rows.append([name, ends, number(each["predicted"], 3), percent(each["won"]), str(each["won"]["n"])])
    note = "On the held-out half: how likely the score's favourite was said to win, and how often it did."
    return _section("Calibration", note, ("score", "P", "mean P", "won [95 %]", "n"), rows)


def _biases(found: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [name, interval(each["difference"]), percent(each["more_wins"]), str(each["more_wins"]["n"])]
        for name, each in found["biases"].items()
    ]
    told = "; ".join(f"{name}: {meaning}" for name, meaning in PROPERTIES.items() if name in found["biases"])
    note = (
        f"Winner minus loser, and how often the side with more of it won, ties left out. {told[:1].upper()}{told[1:]}."
    )
    return _section("What does the preferred side look like?", note, ("", "difference [95 %]", "more wins", "n"), rows)


def _lengths(found: dict[str, Any]) -> dict[str, Any]:
    halves = [half for half in found["prompt_length"] if half["n"]]
    names = list(found["rewards"])
    rows = [
        [half["prompts"], str(half["n"]), percent(half["ties"]), *(percent(half["accuracy"][name]) for name in names)]
        for half in halves
    ]
    headings = ("prompts", "n", "ties [95 %]", *(f"accuracy of {name}" for name in names))
    return _section(
        "Does the prompt's length matter?", f"Of {_judges(found)}.", headings, rows if len(rows) > 1 else []
    )


def _people(found: dict[str, Any]) -> dict[str, Any]:
    rows = [
        [name, str(each["n"]), percent(each["ties"]), percent(each["first"]), percent(each["with_majority"])]
        for name, each in list(found["people"].items())[:_SHOWN]
    ]
    more = len(found["people"]) - len(rows)
    note = f"The busiest; {more} more are in the JSON file." if more else ""
    headings = ("person", "n", "ties [95 %]", "first side [95 %]", "with the others' majority")
    return _section("Who judged", note, headings, rows)


def show(found: dict[str, Any]) -> None:
    """Prints the tables."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 150)
    for section in sections(found):
        table = Table(title=Text(section["title"]), caption=Text(section["note"]) if section["note"] else None)
        for place, heading in enumerate(section["headings"]):
            table.add_column(Text(heading), justify="right" if place else "left")
        for row in section["rows"]:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    for remark in found["remarks"]:
        console.print(f"- {remark}", markup=False, highlight=False)


def page(found: dict[str, Any]) -> str:
    """The same as one HTML page that fetches nothing and runs no script, with a drawing of each calibration."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("mmalign").joinpath("audit.html.j2").read_text(encoding="utf-8")
    plots = [
        {"name": name, "bins": [each for each in entry["calibration"]["bins"] if each["won"]["n"]]}
        for name, entry in found["rewards"].items()
        if entry["calibration"]
    ]
    return environment.from_string(template).render(found=found, sections=sections(found), plots=plots)
