"""The strategies that choose among candidates, on the shapes models: what they keep, and what it does not depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign import sample
from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch
from mmalign.guidance import neighbourhood
from mmalign.guidance.denoising import candidate_seed
from mmalign.guidance.sampling import batches, with_sets
from mmalign.jobs import SampleConfig
from mmalign.jobs_guidance import Diversity
from mmalign.media import read_image
from mmalign.testing import check_evaluator

ROOT = Path(__file__).resolve().parents[1]
CLIP = str(ROOT / "assets" / "shapes-clip")
HPS = {"name": "hps", "params": {"checkpoint": CLIP}}
TRUTH = {
    "name": "shapes_truth",
    "params": {"annotator": "bold"},
    "subscore": "utility",
    "column": "bold",
    "weight": 2.0,
}
CLEAN = {"name": "shapes_truth", "subscore": "cleanliness", "column": "cleanliness"}
PLAIN = {"kind": "best_of_n", "n": 1, "rewards": [HPS], "baseline": False}
AXES = [TRUTH, CLEAN, {**HPS, "weight": 0.5}]
DIVERSE = {
    "kind": "diversity", "rewards": [HPS], "candidates": 10, "initial": 6, "children": 2, "cells": 2, "clip": CLIP,
    "judge": {"name": "shapes_place"}, "judge_scores": ["x", "y"], "baseline": False,
}  # fmt: skip


def _config(folder: Path, guidance: dict[str, Any], **changes: Any) -> SampleConfig:
    prompts = folder / "prompts.txt"
    folder.mkdir(parents=True, exist_ok=True)
    prompts.write_text("a red circle\na large blue square on a white background\n")
    tree = {
        "model": {"path": ROOT / "assets" / "shapes-sd"}, "prompts": prompts, "output": folder / "out", "steps": 3,
        "guidance_scale": 2.0, "device": "cpu", "seed": 7, "guidance": guidance, **changes,
    }  # fmt: skip
    return SampleConfig.model_validate(tree)


def _pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: read_image(path) for path in sorted((folder / "out" / "images").glob("*.png"))}


def _record(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "out" / "guidance" / f"{name}.json").read_text())["chosen"]


# ------------------------------------------------------------------------------------------------ neighbourhood


@pytest.fixture(scope="module", name="robust")
def _robust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("robust")
    guidance = {"kind": "neighbourhood", "n": 4, "rewards": AXES, "angle": 30.0, "rule": "worst_regret"}
    sample.run(_config(folder, {**guidance, "scale": "deviation", "baseline": False}, batch_size=2))
    return folder


def test_the_choice_is_that_of_the_neighbourhood_of_the_weights(robust: Path, tmp_path: Path) -> None:
    """Candidates drawn as plain samples of their seeds, scored as files are, chosen as the pure function chooses."""
    records = [_record(robust, f"00000{k}-7") for k in (0, 1)]
    for number, record in enumerate(records):
        assert [each["seed"] for each in record["candidates"]] == [candidate_seed(7, k) for k in range(4)]
        scores = np.array([each["scores"] for each in record["candidates"]])
        directions = neighbourhood.cap([2.0, 1.0, 0.5], 256, 30.0, np.random.default_rng(0))
        units = (scores - scores.mean(0)) / np.where(scores.std(0) > 0, scores.std(0), 1)
        regrets = (units @ directions.T).max(0) - units @ directions.T
        assert record["candidate"] == int(np.argmin(regrets.max(1)))
        assert record["plain"] == int(np.argmax(units @ [2.0, 1.0, 0.5]))
        prompts = tmp_path / f"{number}.jsonl"
        prompt = ["a red circle", "a large blue square on a white background"][number]
        prompts.write_text(json.dumps({"prompt": prompt, "seed": record["seed"]}) + "\n")
        sample.run(_config(tmp_path / str(number), PLAIN, prompts=prompts))
        (drawn,) = _pictures(tmp_path / str(number)).values()
        kept = _pictures(robust)[f"00000{number}-7"]
        assert np.abs(drawn.astype(int) - kept.astype(int)).max() <= 1
        truth = load_evaluator("shapes_truth", {"annotator": "bold"}, "cpu")
        told = truth.score(Batch(images=[torch.from_numpy(kept).permute(2, 0, 1)], prompts=[prompt]))
        assert isinstance(told, dict)
        assert scores[record["candidate"], 0] == pytest.approx(told["utility"].item(), abs=0.02)


def test_batches_and_neighbours_do_not_matter(robust: Path, tmp_path: Path) -> None:
    guidance = {"kind": "neighbourhood", "n": 4, "rewards": AXES, "angle": 30.0, "rule": "worst_regret"}
    sample.run(_config(tmp_path, {**guidance, "scale": "deviation", "baseline": False}, batch_size=1, limit=1))
    (alone,) = _pictures(tmp_path).values()
    assert np.abs(alone.astype(int) - _pictures(robust)["000000-7"].astype(int)).max() <= 1
    assert _record(tmp_path, "000000-7")["candidate"] == _record(robust, "000000-7")["candidate"]


# ------------------------------------------------------------------------------------------------ diversity


@pytest.fixture(scope="module", name="diverse")
def _diverse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diverse")
    sample.run(_config(folder, DIVERSE, per_prompt=3, batch_size=4))
    return folder


def test_a_set_is_of_different_candidates_and_says_what_it_covers(diverse: Path) -> None:
    assert len(_pictures(diverse)) == 6
    for number in (0, 1):
        records = [_record(diverse, f"00000{number}-{seed}") for seed in (7, 8, 9)]
        assert len({record["candidate"] for record in records}) == 3
        told = records[0]["set"]
        assert told["candidates"] == 10 and 0 < told["coverage_initial"] <= told["coverage"] <= 1
        assert all(record["set"] == told and record["reward"] <= told["best_reward"] for record in records)
        assert records[0]["reward"] == told["best_reward"], "the best of all comes first"
        assert told["qd_score"] <= told["coverage"] * 4 * told["best_reward"] + 1e-9
        costs = json.loads((diverse / "out" / "guidance" / f"00000{number}-7.json").read_text())
        calls = [
            json.loads((diverse / "out" / "guidance" / f"00000{number}-{seed}.json").read_text())["network_calls"]
            for seed in (7, 8, 9)
        ]
        assert sum(calls) == 10 * 3 * 2 and costs["reward_calls"] in (3, 4), "ten candidates, three steps, two branches"


def test_candidates_of_the_first_population_are_plain_samples(diverse: Path, tmp_path: Path) -> None:
    names = [f"00000{number}-{seed}" for number in (0, 1) for seed in (7, 8, 9)]
    name = next(name for name in names if _record(diverse, name)["parent"] < 0)
    prompt = ["a red circle", "a large blue square on a white background"][int(name[5])]
    prompts = tmp_path / "one.jsonl"
    seed = candidate_seed(7, _record(diverse, name)["candidate"])
    prompts.write_text(json.dumps({"prompt": prompt, "seed": seed}) + "\n")
    sample.run(_config(tmp_path, PLAIN, prompts=prompts))
    (drawn,) = _pictures(tmp_path).values()
    assert np.abs(drawn.astype(int) - _pictures(diverse)[name].astype(int)).max() <= 1


def test_a_set_that_lacks_a_member_is_drawn_again_and_is_the_same(diverse: Path) -> None:
    before = _pictures(diverse)
    (diverse / "out" / "images" / "000001-8.png").unlink()
    sample.run(_config(diverse, DIVERSE, per_prompt=3, batch_size=4))
    after = _pictures(diverse)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_prompts_do_not_depend_on_each_other_or_on_batches(diverse: Path, tmp_path: Path) -> None:
    sample.run(_config(tmp_path, DIVERSE, per_prompt=3, batch_size=7, limit=1))
    for name, picture in _pictures(tmp_path).items():
        assert np.abs(picture.astype(int) - _pictures(diverse)[name].astype(int)).max() <= 1


def test_axes_from_what_people_said(diverse: Path, tmp_path: Path) -> None:
    names = sorted(_pictures(diverse))
    table = tmp_path / "judged.jsonl"
    rows = [
        {"anchor": f"{a}.png", "a": f"{b}.png", "b": f"{c}.png", "answer": answer}
        for a, b, c, answer in [(*names[:3], "A"), (*names[1:4], "B"), (*names[2:5], "a")]
    ]
    for name, picture in _pictures(diverse).items():
        from mmalign.media import write_image

        write_image(tmp_path / f"{name}.png", picture)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {**{k: v for k, v in DIVERSE.items() if not k.startswith("judge")}, "judgements": str(table)}
    sample.run(_config(tmp_path, told, per_prompt=2, limit=1))
    assert _record(tmp_path, "000000-7")["set"]["axes_accuracy"] is None, "three judgements: none held out"
    table.write_text(json.dumps({**rows[0], "answer": "C"}) + "\n")
    with pytest.raises(ValueError, match=r"judged\.jsonl line 1: the answer is 'C'; it is A or B"):
        sample.run(_config(tmp_path / "new", told, per_prompt=2, limit=1))


def test_batches_of_sets() -> None:
    wanted = [sample.Request("x", seed, group) for group in "ab" for seed in range(3)]
    sets = Diversity.model_validate({**DIVERSE, "clip": CLIP})
    assert [[r.sample for r in part] for part in batches(wanted, sets, 2)] == [
        ["a-0", "a-1", "a-2"], ["b-0", "b-1", "b-2"]
    ]  # fmt: skip
    assert with_sets(wanted, [wanted[4]], sets) == wanted[3:]
    assert with_sets(wanted, [wanted[4]], None) == [wanted[4]]


@pytest.mark.parametrize(
    ("guidance", "said"),
    [
        ({"kind": "neighbourhood", "rewards": [HPS]}, "give two or more a weight above 0"),
        ({"kind": "neighbourhood", "rewards": AXES, "angle": 100}, "less than or equal to 90"),
        ({**DIVERSE, "judgements": "x.jsonl"}, "give one"),
        ({**DIVERSE, "judge": None}, "give one"),
        ({**DIVERSE, "initial": 11}, r"initial \(11\) is above candidates \(10\)"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, guidance: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _config(tmp_path, guidance)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip": str(ROOT / "assets")}, "holds 0 files of weights"),
        ({"judge": {"name": "shapes_plaice"}}, "shapes_plaice"),
        ({"judge_scores": ["z"]}, "shapes_place gives x, y, radius, saturation, not z"),
    ],
)
def test_bad_judges_are_named(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sample.run(_config(tmp_path, {**DIVERSE, **changes}, per_prompt=2, limit=1, steps=1))


def test_the_evaluator_of_places_keeps_the_contract() -> None:
    check_evaluator("shapes_place", prompts=["a", "b", "c"], sizes=[(64, 64), (33, 70), (2, 2)])


def test_places_are_those_of_the_scene() -> None:
    from mmalign.shapes.scene import Scene, Shape, render

    scene = Scene(
        (Shape("circle", "red", 20.0, 40.0, 12.0, 0.8), Shape("square", "blue", 50.0, 20.0, 10.0, 0.7)), "white"
    )
    image = torch.from_numpy(render(scene)).permute(2, 0, 1)
    told = load_evaluator("shapes_place", device="cpu").score(Batch(images=[image, torch.zeros_like(image)]))
    assert isinstance(told, dict)
    for name, expected in {"x": 35 / 64, "y": 30 / 64, "radius": 11 / 32, "saturation": 0.75}.items():
        assert told[name][0].item() == pytest.approx(expected, abs=0.02)
    assert [told[name][1].item() for name in told] == [0.5, 0.5, 0.0, 0.0], "nothing is drawn"


@pytest.mark.parametrize("family", ["flux", "wan"])
def test_flows_and_clips_go_the_same_way(tmp_path: Path, family: str) -> None:
    from mmalign.media_table import read_media_table
    from mmalign.testing.tiny_transformers import tiny_flux
    from mmalign.testing.tiny_video import tiny_wan

    {"flux": tiny_flux, "wan": tiny_wan}[family](tmp_path / "model")
    size = {"model": {"path": tmp_path / "model"}, "height": 32, "width": 32, "limit": 1, "per_prompt": 2, "steps": 2}
    clips = {"frames": 5} if family == "wan" else {}
    other = {**HPS, "params": {"checkpoint": CLIP, "antialias": True}, "column": "filtered"}
    robust = {"kind": "neighbourhood", "n": 2, "rewards": [HPS, other], "baseline": False}
    diverse = {**DIVERSE, "candidates": 5, "initial": 3, "children": 1, "judge": HPS, "judge_scores": []}
    for guidance in (robust, diverse):
        folder = tmp_path / guidance["kind"]
        rows = read_media_table(sample.run(_config(folder, guidance, **size, **clips)))
        assert [row.modality for row in rows] == ["video" if clips else "image"] * 2
        assert len({_record(folder, row.sample)["candidate"] for row in rows}) == 2 or guidance is robust
