"""What bench/guidance.py runs, and what it makes of its runs: every strategy, pooled gains, the table and the plot."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import guidance
import guidance_table
import numpy as np
import pytest
from scipy.stats import t as student

from mmalign.guidance import sampling
from mmalign.jobs_guidance import strategies


def told(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    settings = {
        "model": None, "video_model": str(tmp_path / "absent"), "strategies": None, "seeds": [0], "captions": 4,
        "sweep": False, "figures": tmp_path / "ledger.jsonl", "out": tmp_path / "out",
    }  # fmt: skip
    return argparse.Namespace(**{**settings, **changes})


def test_every_strategy_is_measured_with_settings_that_it_takes(tmp_path: Path) -> None:
    settings, seen = told(tmp_path), set()
    for k, cell in enumerate(guidance.queue(settings)):
        config = guidance.config(cell, tmp_path / str(k), settings, tmp_path / "latent")
        assert config.guidance is not None and config.guidance.kind == cell["guidance"]["kind"]
        if config.guidance.kind != "nrg":  # whose reward is fitted first
            sampling.check(config.guidance)
        seen.add(config.guidance.kind)
        assert len(set((tmp_path / str(k) / "prompts.txt").read_text().splitlines())) == (
            1 if config.guidance.kind == "diversity" else 4
        )
    assert seen == {kind for kind, _ in strategies()}


def test_clips_are_skipped_where_there_is_no_model_and_not_where_there_is_one(tmp_path: Path) -> None:
    assert {cell["model"] for cell in guidance.queue(told(tmp_path))} == {"sd", "flow"}
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model_index.json").write_text("{}")
    settings = told(tmp_path, model=["video"], video_model=str(tmp_path / "there"))
    cells = list(guidance.queue(settings))
    assert {cell["follows"] for cell in cells} == {"hps", "TA"}
    for k, cell in enumerate(cells):
        config = guidance.config(cell, tmp_path / str(k), settings)
        assert (config.frames, config.model.path) == (9, tmp_path / "there")
        sampling.check(config.guidance)
        held = {spec.name for spec in config.guidance.held_out}
        assert held == ({"hps"} if cell["follows"] == "TA" else {"shapes_motion"})
        assert not cell["guidance"].get("gradient") or cell["follows"] == "hps"


def run(seed: int, hps: float, calls: float = 2.0, **changes: Any) -> dict[str, Any]:
    gain = {"mean": hps, "low": hps - 0.1, "high": hps + 0.2, "n": 4, "plain": 0.8}
    return {
        "model": "flow", "strategy": "best of n", "guidance": {"kind": "best_of_n", "n": 2}, "follows": "hps",
        "seed": seed, "gains": {"followed": gain, "of": 4, "hps": gain, "fidelity": gain, "utility": gain},
        "times": {"network_calls": calls, "seconds": 2.5}, "reward_gradients": 0.0, "reward_calls": 2.0, **changes,
    }  # fmt: skip


def test_one_seed_has_the_interval_of_its_prompts_and_several_have_students() -> None:
    assert guidance_table.pooled([run(0, 0.3)], "hps") == pytest.approx((0.3, 0.2, 0.5))
    means = [0.1, 0.4, 0.25]
    mean, low, high = guidance_table.pooled([run(k, each) for k, each in enumerate(means)], "hps")
    half = student.ppf(0.975, 2) * np.std(means, ddof=1) / np.sqrt(3)
    assert (mean, low, high) == pytest.approx((0.25, 0.25 - half, 0.25 + half))


def test_the_table_has_a_row_for_each_setting_and_leaves_the_sweep_out(tmp_path: Path) -> None:
    more = {"guidance": {"kind": "best_of_n", "n": 8}}
    swept = run(guidance_table.SWEEP_SEED, 9.0, strategy="noise, reno", guidance={"kind": "noise", "lr": 5.0})
    guidance_table.table([run(0, 0.1), run(1, 0.3), run(0, 0.4, 8.0, **more), swept], tmp_path)
    text = (tmp_path / "table.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| best of n")]
    assert rows[0].startswith("| best of n | n 2 | 2 | 2 | 2.5 | 2 | 0 | +0.200 (") and "| n 8 | 1 | 8 |" in rows[1]
    assert "+9.000" not in text.split("Tried on seed")[0] and "lr 5.0" in text
    assert (tmp_path / "guidance.png").stat().st_size > 10_000


def test_what_is_kept_of_a_run(tmp_path: Path) -> None:
    def compared(mean: float) -> dict[str, Any]:
        return {"gain": {"mean": mean, "low": 0.0, "high": 1.0, "n": 2}, "plain": {"mean": 0.5}, "guided": {}}

    found = {
        "requests": 2, "reward": compared(0.1), "rewards": {"hps": compared(0.1)},
        "held_out": {"shapes_truth/fidelity": compared(-0.2)}, "cost_ratio": {"network_calls": 4.0, "seconds": 5.0},
        "cost": {"network_calls": 8.0, "decodes": 3.0, "reward_calls": 2.0, "reward_gradients": 0.0, "seconds": 1.0},
        "plain_cost": {"network_calls": 2.0, "seconds": 0.2},
    }  # fmt: skip
    (tmp_path / "guidance.json").write_text(json.dumps(found))
    kept = guidance.figures(tmp_path)
    assert kept["gains"]["fidelity"] == {"mean": -0.2, "low": 0.0, "high": 1.0, "n": 2, "plain": 0.5}
    assert kept["gains"]["hps"]["mean"] == kept["gains"]["followed"]["mean"] == 0.1
    assert (kept["times"]["network_calls"], kept["network_calls"], kept["plain_seconds"]) == (4.0, 8.0, 0.2)


def test_a_cell_is_run_once_through_the_verb_and_its_line_says_what_it_found(tmp_path: Path) -> None:
    settings = told(tmp_path, model=["flow"], captions=2, strategies="best of n")
    cell = {**next(guidance.queue(settings)), "steps": 12}
    guidance.one(cell, settings)
    guidance.one(cell, settings)
    (line,) = guidance.ledger(settings.figures)
    assert {key: line[key] for key in cell} == cell and line["times"]["network_calls"] == 2.0
    records = list((tmp_path / "out" / "flow").rglob("guidance/*.json"))
    assert len(records) == 2
    gains = [json.loads(path.read_text()) for path in records]
    mean = np.mean([each["reward"] - each["baseline"]["reward"] for each in gains])
    assert line["gains"]["hps"]["mean"] == pytest.approx(mean, abs=1e-5) and mean >= 0
