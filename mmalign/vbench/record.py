"""What a VBench run found, beyond what the reference's results file can say: the file ``vbench.json`` beside it.

The reference's layout (`mmalign.vbench.results`) has a score per dimension and its clips. This one has what a reader
needs to trust the score: how many clips it rests on, what the missing ones could change, whether each dimension was
measured exactly or by a substitute, which quirks of the reference were in force, and with what the clips were decoded.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from mmalign.vbench.dimensions import base

__all__ = ["RECORD_FILE", "SCHEMA_VERSION", "DimensionScore", "Figure", "VBenchRecord", "read_record", "write_record"]

SCHEMA_VERSION = 1
RECORD_FILE = "vbench.json"

Ends = tuple[float, float]
"""Two ends of an interval, the lower one first."""


@dataclass(frozen=True)
class Figure:
    """A total.

    Attributes:
        value: in [0, 1] as a rule (normalised scores are not clipped); None where a dimension that it needs is missing.
        ci95: clustered by prompt; None where it cannot be known.
        bounds: the value if the missing clips had got the lowest and the highest score that there is.
        missing: dimensions that the total needs and that have no score. With ``rules: compat`` they count as 0.
        substitutes: evaluators that stand in it for a dimension, because the caller asked for that; a total with any is
            not comparable to the leaderboard's.
    """

    value: float | None
    ci95: Ends | None = None
    bounds: Ends | None = None
    missing: tuple[str, ...] = ()
    substitutes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_finite("a total", self.value, self.ci95, self.bounds)


@dataclass(frozen=True)
class DimensionScore:
    """One dimension, as one evaluator measured it.

    Attributes:
        name: the evaluator's label, such as ``color``, ``color@clip`` or ``color[rules=strict]``.
        kind: exact only where weights, preprocessing and rules are the reference's; all else is a substitute.
        score: as the reference's results file has it, in [0, 1]; None where no clip has one.
        ci95: of the score, clustered by prompt; None where it cannot be known.
        n: clips that have a score.
        expected: clips that the suite asks for.
        missing: clips that are not there.
        failed: clips that are there and have no score.
        coverage: n / expected, worked out unless given; None where nothing was expected.
        bounds: the score if those without one had got the lowest and the highest score that there is.
        normalised: the score on the scale of the totals (`mmalign.vbench.score.normalise`); None for a substitute,
            since the reference's bounds were not set for it, and where there is no score.
        reasons: why clips failed, and how many of them for each reason.
        params: parameters of the evaluator that are not its defaults.
        notes: sentences for a reader, such as a denominator that is smaller than the number of clips.
    """

    name: str
    kind: Literal["exact", "substitute"]
    score: float | None
    n: int
    expected: int
    ci95: Ends | None = None
    missing: int = 0
    failed: int = 0
    coverage: float | None = None
    bounds: Ends | None = None
    normalised: float | None = None
    reasons: dict[str, int] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_finite(self.name, self.score, self.ci95, self.bounds, self.normalised)
        if self.coverage is None and self.expected:
            object.__setattr__(self, "coverage", self.n / self.expected)

    @property
    def dimension(self) -> str:
        """The dimension that it stands for."""
        return base(self.name)


@dataclass(frozen=True)
class VBenchRecord:
    """Everything that ``vbench.json`` holds.

    Attributes:
        dimensions: in the order of the leaderboard, substitutes after the exact ones; names are distinct.
        totals: by name: ``quality, semantic, total`` of the text-to-video suite, ``i2v, i2v_quality, i2v_total`` of the
            image-to-video one. A suite's totals are there only if one of its dimensions was asked for.
        rules: compat reproduces the reference, strict repairs it.
        quirks: ids of those of `mmalign.vbench.quirks` that acted on these scores.
        model: the name of what made the clips.
        mode: of the suite: standard, custom or category.
        suite, suite_sha256: the suite file's name and hash; None in custom mode.
        on_failure: what became of clips without a score: error, skip or zero.
        decoder: what decoded the clips, with its version.
        libraries: versions that scores may depend on, by name.
        mmalign_version: of the package that wrote the file.
        results: name of the reference's results file in the same folder.
        schema_version: of this layout.
    """

    dimensions: tuple[DimensionScore, ...]
    totals: dict[str, Figure]
    rules: Literal["compat", "strict"]
    quirks: tuple[str, ...] = ()
    model: str | None = None
    mode: Literal["standard", "custom", "category"] = "standard"
    suite: str | None = None
    suite_sha256: str | None = None
    on_failure: Literal["error", "skip", "zero"] = "error"
    decoder: str | None = None
    libraries: dict[str, str] = field(default_factory=dict)
    mmalign_version: str = ""
    results: str | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        names = [each.name for each in self.dimensions]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: named more than once in `dimensions`")

    def scores(self) -> dict[str, float | None]:
        """Evaluator's label -> score, as the functions of `mmalign.vbench.score` take them."""
        return {each.name: each.score for each in self.dimensions}

    def exact(self) -> tuple[DimensionScore, ...]:
        """The dimensions that may be set beside the leaderboard's."""
        return tuple(each for each in self.dimensions if each.kind == "exact")

    def to_json(self) -> str:
        """The text of the file."""
        return _ADAPTER.dump_json(self, indent=2).decode() + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = RECORD_FILE) -> VBenchRecord:
        """The record that a text holds; fields that this version does not know are passed over.

        Raises:
            ValueError: not JSON, not this layout, or written by a later version; with `origin` and where.
        """
        try:
            version = json.loads(text).get("schema_version")
        except (ValueError, AttributeError):
            version = SCHEMA_VERSION  # what is wrong with it is said below
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise ValueError(
                f"{origin}: layout {version}, and this mmalign knows up to {SCHEMA_VERSION}; use the one that wrote it"
            )
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, each['loc'])) or 'the whole'}: {each['msg']}"
                for each in error.errors(include_url=False, include_context=False)
            ]
            raise ValueError(f"{origin} is no VBench record: {'; '.join(lines[:_MOST])}") from None


def _check_finite(whose: str, *figures: float | Ends | None) -> None:
    for figure in figures:
        if figure is not None and not all(map(math.isfinite, figure if isinstance(figure, tuple) else (figure,))):
            raise ValueError(f"{whose}: {figure} is not finite; what is not known is None")


_MOST = 5  # mistakes of a file that are told
_ADAPTER: TypeAdapter[VBenchRecord] = TypeAdapter(VBenchRecord)


def write_record(record: VBenchRecord, folder: str | Path) -> Path:
    """Write ``vbench.json`` into a folder, whole or not at all; the path."""
    path = Path(folder) / RECORD_FILE
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(record.to_json(), encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_record(path: str | Path) -> VBenchRecord:
    """Read ``vbench.json`` from a file or from a folder that holds it.

    Raises:
        ValueError: there is none, or it is not this layout.
    """
    path = Path(path)
    path = path / RECORD_FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} is not there; `mmalign score` with a VBench config writes it")
    return VBenchRecord.from_json(path.read_bytes(), str(path))
