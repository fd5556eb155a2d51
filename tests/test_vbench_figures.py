"""What a VBench run writes, from rows of results of all sixteen dimensions, as no tiny network could give them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mmalign.config import Strict
from mmalign.evaluation import Evaluator
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.jobs_vbench import VBench
from mmalign.media_table import MediaRow
from mmalign.score_plan import Item, Job, Plan
from mmalign.score_store import SCHEMA
from mmalign.score_vbench_results import lines, unscored, write
from mmalign.vbench.dimensions import DIMENSIONS, I2V, QUALITY, SEMANTIC, base
from mmalign.vbench.record import VBenchRecord, read_record

COUNTS = {name: each.counted_by for name, each in DIMENSIONS.items() if each.counted_by}
COUNTS |= {"color": "frames", "object_class": "frames", "static_filter": "pairs"}


class Params(Strict):
    rules: str = "compat"
    checkpoint: Path | None = None


def job(label: str, **params: Any) -> Job:
    name = label.partition("[")[0]
    limits = (0.0, 100.0) if name == "imaging_quality" else (0.0, 1.0)
    counts = frozenset({COUNTS[base(name)]} if base(name) in COUNTS else ())
    declared = {"modality": frozenset({"video"}), "score_range": limits, "counts": counts, "Params": Params}
    cls = type("Dimension", (Evaluator,), declared)
    return Job(label, name, cls, Params(**params), "{}", None)


class Case:
    """A run of these evaluators on 4 prompts for each dimension, 5 clips each, with random scores."""

    def __init__(self, folder: Path, *labels: str, **block: Any) -> None:
        rng = np.random.default_rng(0)
        self.jobs = tuple(job(label, **({"rules": "strict"} if "strict" in label else {})) for label in labels)
        self.items, self.rows = [], []
        self.values: dict[str, list[tuple[str, float, float]]] = {}
        for dimension in dict.fromkeys(map(base, labels)):
            asked = [each for each in self.jobs if base(each.label) == dimension]
            for number in range(20):
                sample = f"{dimension} {number // 5}-{number % 5}"
                row = MediaRow(sample, sample[:-2], f"/clips/{sample}.mp4", "video", dimensions=(dimension,))
                self.items.append(Item(row, "0" * 64, None, None))
                for each in asked:
                    top = 100 if dimension == "imaging_quality" else 1
                    value, count = float(rng.random() * top), float(rng.integers(1, 30))
                    self.values.setdefault(each.label, []).append((sample, value, count))
                    self.row(each, sample, "score", value)
                    for name in each.cls.counts:
                        self.row(each, sample, name, count)
        settings = VBench(**{"name": "run", **block})
        specs = tuple(EvaluatorSpec(name=each.name) for each in self.jobs)
        self.config = ScoreConfig(media=folder, output=folder, evaluators=specs, vbench=settings)

    def row(self, each: Job, sample: str, subscore: str, score: float | None, reason: str | None = None) -> None:
        values = {"sample": sample, "evaluator": each.label, "subscore": subscore, "score": score, "reason": reason}
        self.rows.append({**dict.fromkeys(SCHEMA.names), **values, "decoder": "pyav 1"})

    def write(self) -> VBenchRecord:
        keys = tuple(tuple("k" for _ in self.items) for _ in self.jobs)
        plan = Plan(self.jobs, tuple(self.items), keys, ())
        return write(plan, self.config, pa.Table.from_pylist(self.rows, SCHEMA), {"torch": "2", "decord": None})


def expected(case: Case, name: str) -> float:
    """The reference's rule in numpy."""
    values = np.array([value for _, value, _ in case.values[name]])
    counts = np.array([count for _, _, count in case.values[name]])
    by_pairs, by_frames = ("subject", "background"), ("object", "multiple", "spatial", "scene", "appearance")
    if name.startswith((*by_pairs, *by_frames)):
        return float((values * counts).sum() / counts.sum())
    return float(values.mean()) / (100 if name == "imaging_quality" else 1)


def test_all_dimensions_and_totals(tmp_path: Path) -> None:
    case = Case(tmp_path, *SEMANTIC, *QUALITY, model="tiny")
    record = case.write()
    assert [each.name for each in record.dimensions] == [*QUALITY, *SEMANTIC], "in the order of the leaderboard"
    scores = {each.name: each.score for each in record.dimensions}
    assert scores == pytest.approx({name: expected(case, name) for name in scores}, abs=1e-12)
    scaled = {
        name: (scores[name] - DIMENSIONS[name].lowest) / (DIMENSIONS[name].highest - DIMENSIONS[name].lowest)  # type: ignore[operator]
        for name in scores
    }
    quality = sum(scaled[name] * (0.5 if name == "dynamic_degree" else 1) for name in QUALITY) / 6.5
    semantic = sum(scaled[name] for name in SEMANTIC) / 9
    totals = {name: figure.value for name, figure in record.totals.items()}
    assert totals == pytest.approx({"quality": quality, "semantic": semantic, "total": (4 * quality + semantic) / 5})
    for figure in record.totals.values():
        assert figure.ci95 is not None and figure.ci95[0] < (figure.value or 0) < figure.ci95[1]
    assert record.quirks and record.libraries == {"torch": "2"} and record.model == "tiny"
    assert read_record(tmp_path) == record
    data = json.loads((tmp_path / "run_eval_results.json").read_text())
    assert {name: entry[0] for name, entry in data.items()} == pytest.approx(scores)
    first = data["imaging_quality"][1][0]
    assert first["video_results"] == pytest.approx(case.values["imaging_quality"][0][1]), "on its own scale"
    assert {"video_sim", "cnt_per_video"} <= set(data["background_consistency"][1][0])
    assert data["object_class"][1][0]["frame_count"] == case.values["object_class"][0][2]
    assert not (tmp_path / "run_further_results.json").exists()
    text = "\n".join(lines(record))
    assert f"total: {100 * totals['total']:.2f} [" in text and not unscored(record)


def test_substitutes_stand_beside_unless_asked_in(tmp_path: Path) -> None:
    labels = [f"{name}@other" if name == "color" else name for name in SEMANTIC]
    record = Case(tmp_path, *labels).write()
    color = next(each for each in record.dimensions if each.name == "color@other")
    assert color.kind == "substitute" and color.normalised is None and color.score is not None
    assert record.totals["semantic"].value is None and record.totals["semantic"].missing == ("color",)
    assert list(json.loads((tmp_path / "run_further_results.json").read_text())) == ["color@other"]
    assert "semantic: none, without color" in lines(record)
    counted = Case(tmp_path, *labels, substitutes=True).write().totals["semantic"]
    assert counted.value is not None and counted.substitutes == ("color@other",) and counted.ci95 is not None


def test_strict_takes_another_mean_and_another_name(tmp_path: Path) -> None:
    case = Case(tmp_path, "subject_consistency", "motion_smoothness", rules="strict")
    record = case.write()
    assert [each.name for each in record.dimensions] == ["subject_consistency[rules=strict]", "motion_smoothness"]
    values = [value for _, value, _ in case.values["subject_consistency"]]
    assert record.dimensions[0].score == pytest.approx(np.mean(values)) and record.dimensions[0].kind == "substitute"
    assert record.dimensions[1].kind == "exact" and record.rules == "strict"


def test_image_to_video_has_its_own_totals(tmp_path: Path) -> None:
    names = [*I2V, *(name for name in QUALITY if name != "temporal_flickering")]
    record = Case(tmp_path, *names).write()
    scores = {each.name: each.score or 0 for each in record.dimensions}
    i2v = (
        (scores["i2v_subject"] - 0.1462) / (1 - 0.1462)
        + (scores["i2v_background"] - 0.2615) / (1 - 0.2615)
        + 0.1 * scores["camera_motion"]
    ) / 2.1
    assert set(record.totals) == {"i2v", "i2v_quality", "i2v_total"}
    assert record.totals["i2v"].value == pytest.approx(i2v)
    total = record.totals["i2v_total"]
    assert total.value == pytest.approx((i2v + (record.totals["i2v_quality"].value or 0)) / 2) and total.ci95


def test_the_static_filter_chooses_clips_of_flickering(tmp_path: Path) -> None:
    case = Case(tmp_path, "temporal_flickering", samples=2)
    static = job("static_filter")
    case.jobs = (*case.jobs, static)
    still = {"0": (1, 2, 3), "1": (4,), "2": (), "3": (0, 1)}
    for place, item in enumerate(case.items):
        row = item.row
        case.items[place] = Item(
            MediaRow(row.sample, row.prompt, row.media, "video", dimensions=(*row.dimensions, "static_filter")),  # type: ignore[misc]
            "0" * 64, None, None,
        )  # fmt: skip
        prompt, number = row.sample.split()[1].split("-")
        case.row(static, row.sample, "score", float(int(number) in still[prompt]))
        case.row(static, row.sample, "pairs", 3.0)
    (dimension,) = case.write().dimensions
    kept = {f"temporal_flickering {name}" for name in ("0-1", "0-2", "1-4", "3-0", "3-1")}
    assert dimension.score == pytest.approx(np.mean([v for s, v, _ in case.values["temporal_flickering"] if s in kept]))
    assert dimension.expected == 5 and "left 5 of 20 clips" in dimension.notes[0]
    assert "1 prompts have fewer than 2 static clips and 1 have none" in dimension.notes[1]
    assert len(json.loads((tmp_path / "run_eval_results.json").read_text())["temporal_flickering"][1]) == 5


def test_booleans_are_booleans_and_failures_count_as_zero_in_the_open(tmp_path: Path) -> None:
    case = Case(tmp_path, "dynamic_degree", on_error="zero")
    for row in case.rows:
        row["score"] = float(row["score"] > 0.5)
    failed = case.rows[3]
    failed["score"], failed["reason"] = None, f"{case.items[3].row.media}: is truncated (x)"
    (dimension,) = case.write().dimensions
    rows = json.loads((tmp_path / "run_eval_results.json").read_text())["dynamic_degree"][1]
    assert {row["video_results"] for row in rows} == {True, False} and len(rows) == 20
    assert rows[3]["error"].endswith("is truncated (x)") and rows[3]["video_results"] == 0.0
    assert dimension.failed == 1 and dimension.reasons == {"is truncated (x)": 1}
    assert dimension.score == pytest.approx(sum(bool(row["video_results"]) for row in rows) / 20)


def test_a_verdict_has_bounds_though_the_speeds_beside_it_have_none(tmp_path: Path) -> None:
    case = Case(tmp_path, "dynamic_degree", on_error="skip")
    case.jobs[0].cls.score_range = (0.0, None)  # as the evaluator declares, for `share` and `motion` too
    for row in case.rows:
        row["score"] = float(row["score"] > 0.5)
    case.rows[3]["score"] = None
    (dimension,) = case.write().dimensions
    moving = sum(row["score"] or 0 for row in case.rows)
    assert dimension.score == pytest.approx(moving / 19)
    assert dimension.bounds == pytest.approx((moving / 20, (moving + 1) / 20))
