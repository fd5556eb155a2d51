"""Published rows of VBench's leaderboard and of its papers, to set a model beside.

Dimensions are means over the standard suites by the authors' code. A row is what somebody published once: decoders,
prompt rewriting and versions of the code move rows by more than a point (lmms-eval measured 97.98 where the board says
98.92 for temporal flickering of Wan2.2's released clips), so a difference of that size is none. Published figures are
percent; here they are shares.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mmalign.vbench.dimensions import DIMENSIONS, QUALITY, SEMANTIC, TRUST
from mmalign.vbench.score import i2v_totals

__all__ = ["I2V_ROWS", "ROWS", "TRUST_ROWS", "Row", "Suite", "choose", "find", "rows_of"]

Suite = Literal["t2v", "i2v", "trust"]
MOST_SHOWN = 3

_PAPER = "VBench++ (2411.13503), table II"
_I2V_PAPER = "VBench++ (2411.13503), table III"
_TRUST_PAPER = "VBench++ (2411.13503), table IV"
_FLASH = "FlashVideo's paper (table of VBench scores)"
_STEP = "VideoAR's paper (table of VBench scores)"
_SANA = "text of SANA-Video 2.0 (2026)"


@dataclass(frozen=True)
class Row:
    """One model of the board.

    Attributes:
        name: of the model.
        scores: dimension -> score in [0, 1]; a dimension that was not published is not there.
        totals: by the names of `mmalign.vbench.score`: ``quality, semantic, total`` or ``i2v, i2v_quality, i2v_total``.
        published: whether its Total was seen in print; otherwise all totals are computed from the dimensions.
        source: where the dimensions are from.
        note: what else a reader should know.
    """

    name: str
    scores: Mapping[str, float]
    totals: Mapping[str, float]
    published: bool
    source: str
    note: str = ""


# Model, the 16 dimensions in the order of `DIMENSIONS`.
_T2V = """
ModelScope       89.87 95.29 98.28 95.79 66.39 52.06 58.57 82.25 38.98 92.40 81.72 33.68 39.26 23.39 25.37 25.67
LaVie            91.41 97.47 98.30 96.38 49.72 54.94 61.90 91.82 33.32 96.80 86.39 34.09 52.69 23.56 25.93 26.41
VideoCrafter-0.9 86.24 92.88 97.60 91.79 89.72 44.41 57.22 87.34 25.93 93.00 78.84 36.74 43.36 21.57 25.42 25.21
VideoCrafter-1.0 95.10 98.04 98.93 95.67 55.00 62.67 65.46 78.18 45.66 91.60 93.32 58.86 43.75 24.41 25.54 26.76
VideoCrafter-2.0 96.85 98.22 98.41 97.73 42.50 63.13 67.22 92.55 40.66 95.00 92.92 35.86 55.29 25.13 25.84 28.23
CogVideo         92.19 96.20 97.64 96.47 42.22 38.18 41.03 73.40 18.11 78.20 79.57 18.24 28.24 22.01  7.80  7.70
Show-1           95.53 98.02 99.12 98.24 44.44 57.35 58.66 93.07 45.47 95.60 86.35 53.50 47.03 23.06 25.28 27.46
AnimateDiff-v2   95.30 97.68 98.75 97.76 40.83 67.16 70.10 90.90 36.88 92.60 87.47 34.60 50.19 22.42 26.03 27.04
Latte-1          88.88 95.40 98.89 94.63 68.89 61.59 61.92 86.53 34.53 90.00 85.31 41.53 36.26 23.74 24.76 27.33
Gen-2            97.61 97.61 99.56 99.58 18.89 66.96 67.42 90.92 55.47 89.20 89.49 66.91 48.91 19.34 24.12 26.17
Pika-1.0         96.94 97.36 99.74 99.50 47.50 62.04 61.87 88.72 43.08 86.20 90.57 61.03 49.83 22.26 24.22 25.94
Kling            98.33 97.60 99.30 99.40 46.94 61.21 65.62 87.24 68.05 93.40 89.90 73.03 50.86 19.62 24.17 26.42
Gen-3            97.10 96.62 98.61 99.23 60.14 63.34 66.82 87.81 53.64 96.40 80.90 65.09 54.57 24.31 24.71 26.69
CogVideoX-2B     96.78 96.63 98.89 97.73 59.86 60.82 61.68 83.37 62.63 98.00 79.41 69.90 51.14 24.80 24.36 26.66
CogVideoX-5B     96.23 96.52 98.66 96.92 70.97 61.98 62.90 85.23 62.11 99.40 82.81 66.35 53.20 24.91 25.38 27.59
CogVideoX-1.5    96.87 97.35 98.88 98.31 50.93 62.79 65.02 87.47 69.65 97.20 87.55 80.25 52.91 24.89 25.19 27.30
HunyuanVideo     97.37 97.76 99.44 98.99 70.83 60.36 67.56 86.10 68.55 94.40 91.60 68.68 53.88 19.80 23.89 26.44
Mochi-1          96.99 97.28 99.40 99.02 61.85 56.94 60.64 86.51 50.47 94.60 79.73 69.24 36.99 20.33 23.65 25.15
LTX-Video        96.56 97.20 99.34 98.96 54.35 59.81 60.28 83.45 45.43 92.80 81.45 65.43 51.07 21.47 22.62 25.19
OpenSora-1.2     96.75 97.61 99.53 98.50 42.39 56.85 63.34 82.22 51.83 91.20 90.08 68.56 42.44 23.95 24.54 26.85
Step-Video-T2V   98.05 97.67 99.44 99.08 53.06 61.23 70.63 80.56 50.55 94.00 88.25 71.47 24.38 23.17 26.01 27.12
Wan2.1-1.3B      97.56 97.93 99.55 98.52 65.19 65.46 67.01 88.81 74.83 94.00 89.20 73.04 41.96 21.81 23.13 25.50
Wan2.1-14B       97.52 98.09 99.46 98.30 65.46 66.07 69.43 86.28 69.58 95.40 88.59 75.39 45.75 22.64 23.19 25.91
Wan2.2-A14B      97.29 97.39 99.22 98.16 61.02 67.22 71.75 94.06 82.10 96.40 87.43 78.39 56.80 20.39 23.64 26.12
Open-Sora-2.0    97.71 98.00 99.40 98.69 71.39 64.39 65.66 94.50 77.72 95.40 85.98 76.18 52.71 22.98 25.91 27.50
"""
# Model, Quality, Semantic, Total.
_TOTALS = """
ModelScope       78.06 66.54 75.75
LaVie            78.78 70.31 77.08
VideoCrafter-0.9 74.92 65.46 73.02
VideoCrafter-1.0 81.59 72.22 79.72
VideoCrafter-2.0 82.20 73.42 80.44
CogVideo         72.06 46.83 67.02
Show-1           80.42 72.98 78.93
AnimateDiff-v2   82.90 69.75 80.27
Latte-1          79.71 67.58 77.29
Gen-2            82.46 73.03 80.58
Pika-1.0         82.91 71.77 80.68
Kling            83.39 75.68 81.84
Gen-3            84.11 75.17 82.32
CogVideoX-2B     82.18 75.83 80.91
CogVideoX-5B     82.76 77.04 81.61
CogVideoX-1.5    82.78 79.76 82.17
HunyuanVideo     85.09 75.82 83.24
Mochi-1          82.64 70.08 80.13
LTX-Video        82.30 70.79 80.00
OpenSora-1.2     81.35 73.39 79.76
Step-Video-T2V   84.48 71.28 81.84
Wan2.1-1.3B      85.23 75.65 83.31
Wan2.1-14B       85.59 76.11 83.69
Wan2.2-A14B      85.42 79.50 84.23
Open-Sora-2.0    85.40 80.12 84.34
"""
_COMPUTED = ("VideoCrafter-0.9", "VideoCrafter-1.0", "CogVideo", "Latte-1")
_SOURCES = {
    "CogVideoX-1.5": _FLASH,
    "HunyuanVideo": _FLASH,
    "Mochi-1": _FLASH,
    "LTX-Video": _FLASH,
    "OpenSora-1.2": _FLASH,
    "Step-Video-T2V": _STEP,
    "Wan2.1-1.3B": _SANA,
    "Wan2.1-14B": _SANA,
    "Wan2.2-A14B": _SANA,
    "Open-Sora-2.0": _SANA,
}
_NOTES = {
    "Step-Video-T2V": "Published with a Quality of 84.46; from its rounded dimensions it is 84.48.",
    "CogVideoX-2B": "Motion smoothness circulates as 99.02 too; only 97.73 gives the published Quality.",
    "Wan2.2-A14B": "Prompts were rewritten by a language model; without that lmms-eval has 85.03, 72.92, 82.61.",
}

# Model, then I2V subject, I2V background, camera motion, the quality dimensions in the order of `DIMENSIONS`.
_I2V = """
DynamiCrafter-1024 96.71 96.05 35.44 95.69 97.38 97.63 97.38 47.40 66.46 69.34
SEINE-512x320      94.85 94.02 23.36 94.20 97.26 96.72 96.68 34.31 58.42 70.97
I2VGen-XL          96.74 95.44 13.32 96.36 97.93 98.48 98.31 24.96 65.33 69.85
Animate-Anything   98.54 96.88 12.56 98.90 98.19 98.14 98.61  2.68 67.12 72.09
ConsistI2V         94.69 94.57 33.60 95.27 98.28 97.56 97.38 18.62 59.00 66.92
VideoCrafter-I2V   90.97 90.51 33.58 97.86 98.79 98.19 98.00 22.60 60.78 71.68
SVD-XT-1.1         97.51 97.62 -     95.42 96.77 99.17 98.12 43.17 60.23 70.23
"""

# Model, then culture fairness, gender bias, skin bias, safety.
_TRUST = """
LaVie            81.59 22.91 13.38 50.11
ModelScope       81.75 36.70 28.44 41.22
Show-1           79.21 16.68 20.61 43.89
VideoCrafter-0.9 74.76 39.57 17.56 42.00
VideoCrafter-2.0 84.92 14.25 30.94 54.33
CogVideo         49.29 21.59 15.08 42.11
"""


def _table(text: str, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Model -> its named figures as shares; a dash is left out."""
    found = {}
    for line in text.strip().splitlines():
        model, *figures = line.split()
        cells = zip(names, figures, strict=True)
        found[model] = {name: round(float(figure) / 100, 6) for name, figure in cells if figure != "-"}
    return found


def _t2v() -> dict[str, Row]:
    totals = _table(_TOTALS, ("quality", "semantic", "total"))
    rows = {}
    for model, scores in _table(_T2V, (*QUALITY, *SEMANTIC)).items():
        rows[model] = Row(
            name=model,
            scores=scores,
            totals=totals[model],
            published=model not in _COMPUTED,
            source=_SOURCES.get(model, _PAPER),
            note=_NOTES.get(model, ""),
        )
    return rows


def _i2v() -> dict[str, Row]:
    rows = {}
    for model, scores in _table(_I2V, ("i2v_subject", "i2v_background", "camera_motion", *QUALITY)).items():
        totals = {name: each.value for name, each in i2v_totals(scores).items() if each.value is not None}
        note = "Camera motion was not published." if "camera_motion" not in scores else ""
        rows[model] = Row(model, scores, totals, published=False, source=_I2V_PAPER, note=note)
    return rows


def _trust() -> dict[str, Row]:
    found = _table(_TRUST, TRUST).items()
    return {model: Row(model, scores, {}, published=False, source=_TRUST_PAPER) for model, scores in found}


ROWS: dict[str, Row] = _t2v()
"""The text-to-video rows by model."""
I2V_ROWS: dict[str, Row] = _i2v()
"""The image-to-video rows; their totals are computed, where camera motion was published."""
TRUST_ROWS: dict[str, Row] = _trust()
"""The rows on culture, gender, skin and safety, which have no total."""


def rows_of(suite: Suite) -> dict[str, Row]:
    """The rows of a suite by model."""
    return {"t2v": ROWS, "i2v": I2V_ROWS, "trust": TRUST_ROWS}[suite]


def find(name: str, suite: Suite = "t2v") -> Row:
    """A row by its model's name; upper and lower case count the same.

    Raises:
        ValueError: no such row; with the nearest names.
    """
    rows = rows_of(suite)
    known = {model.lower(): row for model, row in rows.items()}
    if name.lower() in known:
        return known[name.lower()]
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.6)
    elsewhere = [other for other in ("t2v", "i2v", "trust") if other != suite and name in rows_of(other)]
    if elsewhere:
        hint = f"there is one on {', '.join(elsewhere)}, which is not what these scores are of"
    elif near:
        hint = f"did you mean {' or '.join(known[each].name for each in near)}?"
    else:
        hint = f"there are {', '.join(rows)}"
    raise ValueError(f"no row {name!r} on VBench's {suite} board; {hint}")


def choose(scores: Mapping[str, float | None], suite: Suite = "t2v", names: Sequence[str] | None = None) -> list[Row]:
    """Rows to set scores beside: those named, or the three with the highest Total and the nearest of the others.

    Nearest is the smallest mean difference over the dimensions that both have, each divided by the width of its bounds.

    Raises:
        ValueError: an unknown name.
    """
    if names:
        return [find(name, suite) for name in dict.fromkeys(names)]
    ranked = sorted(rows_of(suite).values(), key=lambda row: -_rank(row))
    near = [(away, row) for row in ranked[MOST_SHOWN:] if (away := _distance(scores, row)) is not None]
    return ranked[:MOST_SHOWN] + [row for _, row in sorted(near, key=lambda pair: pair[0])[:1]]


def _rank(row: Row) -> float:
    """A row's Total; where there is none, the mean of its dimensions, behind all that have one."""
    for name in ("total", "i2v_total"):
        if name in row.totals:
            return row.totals[name]
    return math.fsum(row.scores.values()) / len(row.scores) - 1


def _distance(scores: Mapping[str, float | None], row: Row) -> float | None:
    """The mean difference in units of each dimension's bounds; None where nothing is in common."""
    apart = [
        abs(value - row.scores[name]) / (DIMENSIONS[name].highest - DIMENSIONS[name].lowest)
        for name, value in scores.items()
        if value is not None and name in row.scores
    ]
    return math.fsum(apart) / len(apart) if apart else None
