"""Where VBench's code does what its papers, its documents or plain sense would not have it do.

Each has an id, what it is, what it does to a score, and what ``rules: compat`` and ``rules: strict`` do about it. A
quirk is listed whether or not a mode changes anything: who compares two figures wants to know. Read in Vchitect/VBench
(package 0.1.5 and the code after it) where not said otherwise; `docs/vbench.md` shows them all.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from mmalign.vbench import quirks_quality, quirks_semantic, quirks_suites
from mmalign.vbench.dimensions import base

__all__ = ["PARTS", "QUIRKS", "Quirk", "of_dimensions", "page", "quirk"]

PARTS = ("all", "suite", "files", "score", "static_filter", "long", "vbench2")
"""What a quirk may belong to besides a dimension; ``all`` is every dimension."""


@dataclass(frozen=True)
class Quirk:
    """A deviation of the reference.

    Attributes:
        id: in lower case with underscores; results name it.
        dimension: a dimension, or one of `PARTS`; several are joined by a comma and a space.
        what: what the reference does.
        effect: what that does to scores.
        compat, strict: what our two modes do about it.
    """

    id: str
    dimension: str
    what: str
    effect: str
    compat: str
    strict: str

    @property
    def dimensions(self) -> tuple[str, ...]:
        """What it belongs to, one by one."""
        return tuple(self.dimension.split(", "))

    def acts(self, rules: str) -> bool:
        """Whether our mode, compat or strict, reproduces it; its words then begin with "reproduced"."""
        return {"compat": self.compat, "strict": self.strict}[rules].startswith("reproduced")


def _all() -> dict[str, Quirk]:
    rows = quirks_quality.ROWS + quirks_semantic.ROWS + quirks_suites.ROWS
    found = {row[0]: Quirk(*row) for row in rows}
    assert len(found) == len(rows), "two quirks have one id"
    return found


QUIRKS: dict[str, Quirk] = _all()
"""Every known quirk by id, those of dimensions in the order of the leaderboard, then suite, files and score."""


def quirk(id: str) -> Quirk:
    """A quirk by its id.

    Raises:
        ValueError: no such quirk; with the nearest id.
    """
    if id not in QUIRKS:
        near = difflib.get_close_matches(id, QUIRKS, n=1, cutoff=0)[0]
        raise ValueError(f"no quirk {id!r}; the nearest is {near} (mmalign list vbench-quirks)")
    return QUIRKS[id]


def of_dimensions(names: Iterable[str], *, rules: str | None = None) -> list[Quirk]:
    """The quirks of dimensions, by evaluators' labels, and those of all; in the order of `QUIRKS`.

    A dimension that is not VBench's has none of its own.

    Args:
        rules: only those that act under compat, or under strict; None: all.
    """
    wanted = {base(name) for name in names}
    chosen = [each for each in QUIRKS.values() if "all" in each.dimensions or wanted & set(each.dimensions)]
    return [each for each in chosen if rules is None or each.acts(rules)]


def page() -> str:
    """The text of docs/vbench_quirks.md: every quirk, in the order of `QUIRKS`."""
    lines = [
        "# Quirks of VBench",
        "",
        f"The {len(QUIRKS)} places known in which VBench's code does what its papers, its documents or plain sense "
        "would not have it do, and what `rules: compat` and `rules: strict` do about each. `mmalign list "
        "vbench-quirks` shows them too, with `--json` for programs; the report shows those that acted on a run. Read "
        "in Vchitect/VBench (package 0.1.5 and the code after it). This page is made from `mmalign/vbench/quirks.py` "
        "(`python -c \"from mmalign.vbench.quirks import page; print(page(), end='')\"`); a test keeps it so.",
    ]
    for each in QUIRKS.values():
        lines += [
            "",
            f"### {each.id}",
            "",
            f"{', '.join(f'`{name}`' for name in each.dimensions)}. {_sentence(each.what)} {_sentence(each.effect)}",
            "",
            f"- compat: {each.compat}",
            f"- strict: {each.strict}",
        ]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
