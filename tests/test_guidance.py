"""`mmalign sample` with a guidance block: folder, records, resume, summary, and mistakes; on real tiny models."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from mmalign import config as configs
from mmalign import sample, stats
from mmalign.commands.inspect import Kind, listing
from mmalign.guidance import sampling as guided
from mmalign.guidance.summary import lines, summarise
from mmalign.jobs import SampleConfig
from mmalign.jobs_guidance import BestOfN, strategies
from mmalign.media import read_image
from mmalign.media_table import read_media_table
from mmalign.testing.tiny import tiny_sd
from mmalign.testing.tiny_transformers import tiny_flux
from mmalign.testing.tiny_video import tiny_wan

HPS = {"name": "hps", "params": {"checkpoint": "assets/shapes-clip"}}
PROMPTS = ["a red circle", "a large green square", "a blue triangle"]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", name="home")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("guided")
    (home / "prompts.txt").write_text("\n".join(PROMPTS))
    tiny_sd(home / "sd")
    return home


def _config(home: Path, output: Path, model: str = "sd", **changes: Any) -> SampleConfig:
    guidance = {"kind": "best_of_n", "n": 3, "rewards": [HPS], "held_out": [{"name": "shapes_truth"}]}
    tree: dict[str, Any] = {
        "model": {"path": home / model}, "prompts": home / "prompts.txt", "output": output, "device": "cpu", "steps": 2,
        "per_prompt": 2, "batch_size": 4, "scheduler": "own", "guidance": guidance | changes.pop("guidance", {}),
    }  # fmt: skip
    return SampleConfig.model_validate(tree | changes)


@pytest.fixture(scope="module", name="done")
def _done(home: Path) -> SampleConfig:
    config = _config(home, home / "done")
    sample.run(config)
    return config


def _pictures(folder: Path) -> dict[str, np.ndarray]:
    return {row.sample: read_image(row.media) for row in read_media_table(folder / "table.jsonl")}


def test_the_table_says_what_was_gained_and_what_it_cost(done: SampleConfig) -> None:
    rows = read_media_table(done.output / "table.jsonl")
    assert [row.sample for row in rows] == [f"{g:06d}-{seed}" for g in range(3) for seed in (0, 1)]
    for row in rows:
        record = guided.read_record(done.output, row.sample)
        assert row.aux["reward"] == record["reward"] == record["rewards"]["hps"]
        assert record["reward"] == max(each["reward"] for each in record["chosen"]["candidates"])
        assert row.aux["baseline/reward"] == record["baseline"]["reward"]
        assert record["baseline"]["reward"] == pytest.approx(record["chosen"]["candidates"][0]["reward"], abs=1e-5)
        assert (row.aux["network_calls"], row.aux["baseline/network_calls"]) == (3 * 2 * 2, 2 * 2)
        assert (record["decodes"], record["reward_calls"]) == (4, 3), "three candidates, and what is written"
        assert (
            row.aux["held_out/shapes_truth/fidelity"] in (0.0, 1.0)
            and "baseline/held_out/shapes_truth/count" in row.aux
        )
        assert row.aux["seconds"] > row.aux["baseline/seconds"] > 0


def test_plain_sampling_with_the_chosen_seed_draws_the_same_picture(done: SampleConfig, home: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(home / "sd", local_files_only=True)
    pipe.scheduler = sample.load(done.model_copy(update={"scheduler": "ddim"}), torch.device("cpu")).pipe.scheduler
    for name, picture in list(_pictures(done.output).items())[:3]:
        seed = guided.read_record(done.output, name)["chosen"]["seed"]
        image = pipe(
            PROMPTS[int(name[:6])],
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images[0]
        assert np.abs(picture.astype(int) - (image * 255).round()).max() <= 1


def test_batches_do_not_matter(done: SampleConfig, home: Path, tmp_path: Path) -> None:
    other = _config(home, tmp_path / "one", batch_size=1)
    sample.run(other)
    for name, picture in _pictures(done.output).items():
        assert np.abs(picture.astype(int) - _pictures(other.output)[name]).max() <= 1
        ours, theirs = (guided.read_record(each.output, name) for each in (done, other))
        assert ours["chosen"]["seed"] == theirs["chosen"]["seed"]
        assert ours["reward"] == pytest.approx(theirs["reward"], abs=2e-3)


def test_a_killed_run_goes_on_and_ends_alike(
    done: SampleConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after one batch: its pictures and records are there, and only the others are drawn."""
    config = done.model_copy(update={"output": tmp_path / "out", "batch_size": 2})
    batch, calls = guided._batch, []

    def dying(adapter: Any, part: list[Any], *rest: Any) -> Any:
        calls.append([request.sample for request in part])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return batch(adapter, part, *rest)

    monkeypatch.setattr(guided, "_batch", dying)
    with pytest.raises(KeyboardInterrupt):
        sample.run(config)
    left = sorted(path.stem for path in (config.output / "images").iterdir())
    assert left == sorted(path.stem for path in (config.output / "guidance").iterdir()) == ["000000-0", "000000-1"]
    record = (config.output / "guidance" / "000000-0.json").read_text()
    sample.run(config)
    assert [name for part in calls[2:] for name in part] == [f"{g:06d}-{seed}" for g in (1, 2) for seed in (0, 1)]
    assert (config.output / "guidance" / "000000-0.json").read_text() == record
    for name, picture in _pictures(done.output).items():
        assert np.abs(picture.astype(int) - _pictures(config.output)[name]).max() <= 1
    assert json.loads((config.output / "guidance.json").read_text())["requests"] == 6


def test_another_block_or_other_weights_of_a_reward_are_refused(home: Path, tmp_path: Path) -> None:
    scorer = tmp_path / "scorer"
    shutil.copytree(ROOT / "assets" / "shapes-clip", scorer)
    mine = {"rewards": [{"name": "hps", "params": {"checkpoint": scorer}}], "held_out": []}
    config = _config(home, tmp_path / "out", guidance=mine, limit=1, per_prompt=1)
    sample.run(config)
    with pytest.raises(ValueError, match="made with other values of: guidance"):
        sample.run(_config(home, tmp_path / "out", guidance={**mine, "n": 2}, limit=1, per_prompt=1))
    with pytest.raises(ValueError, match="made with other values of: guidance"):
        sample.run(config.model_copy(update={"guidance": None}))
    moved = tmp_path / "moved"
    scorer.rename(moved)
    mine["rewards"] = [{"name": "hps", "params": {"checkpoint": moved}}]
    same = _config(home, tmp_path / "out", guidance=mine, limit=1, per_prompt=1)
    sample.run(same)
    weights = moved / "HPS_v2.1_compressed.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    with pytest.raises(ValueError, match="made with other values of: guidance"):
        sample.run(same)


def test_a_flow_and_clips_go_the_same_way(home: Path, tmp_path: Path) -> None:
    tiny_flux(home / "flux")
    flow = _config(home, tmp_path / "flux", "flux", limit=1, height=32, width=32, guidance={"held_out": []})
    assert len(_pictures(sample.run(flow).parent)) == 2
    tiny_wan(home / "wan")
    clips = _config(home, tmp_path / "wan", "wan", limit=1, height=32, width=32, frames=5, guidance={"held_out": []})
    rows = read_media_table(sample.run(clips))
    assert [(row.modality, row.num_frames) for row in rows] == [("video", 5)] * 2
    assert all(row.aux["reward"] >= row.aux["baseline/reward"] - 1e-5 for row in rows)


# ------------------------------------------------------------------------------------------------------ summary


def _record(reward: float | None, plain: float | None, held: float, plain_held: float) -> dict[str, Any]:
    costs = {"network_calls": 80, "decodes": 5, "reward_calls": 4, "reward_gradients": 0, "seconds": 3.0}
    one = {"reward": reward, "rewards": {"hps": reward}, "held_out": {"shapes_truth/count": held}}
    other = {"reward": plain, "rewards": {"hps": plain}, "held_out": {"shapes_truth/count": plain_held}}
    return {**one, **costs, "baseline": {**other, **costs, "network_calls": 20, "seconds": 1.0}}


def test_the_summary_has_gains_with_intervals_by_prompt(tmp_path: Path) -> None:
    settings = BestOfN.model_validate({"rewards": [HPS], "held_out": [{"name": "shapes_truth"}]})
    values = [
        (0.9, 0.5, 1.0, 0.0),
        (0.8, 0.5, 1.0, 1.0),
        (0.3, 0.4, 0.0, 1.0),
        (0.7, 0.1, 1.0, 0.0),
        (None, 0.2, 0.0, 0.0),
    ]
    groups = ["a", "a", "b", "c", "d"]
    found = summarise(settings, [_record(*each) for each in values], groups, tmp_path)
    assert json.loads((tmp_path / "guidance.json").read_text()) == found
    gain = stats.mean_ci([0.4, 0.3, -0.1, 0.6], ["a", "a", "b", "c"])
    told = found["reward"]["gain"]
    assert [told["mean"], told["low"], told["high"]] == pytest.approx([*gain]) and told["n"] == 4
    assert found["held_out"]["shapes_truth/count"]["gain"]["mean"] == pytest.approx((1 + 0 - 1 + 1 + 0) / 5)
    assert found["cost"]["network_calls"] == 80 and found["cost_ratio"] == {"network_calls": 4.0, "seconds": 3.0}
    text = lines(found)
    assert "reward 0.675, without guidance 0.34, gain +0.3 (95 %:" in text and "4 times the network calls" in text
    assert "\n  held out shapes_truth/count: gain +0.2" in text


def test_a_score_that_is_better_when_lower_gains_when_it_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmalign.evaluators import shapes_truth

    monkeypatch.setattr(shapes_truth.EVALUATOR, "higher_is_better", False)
    settings = BestOfN.model_validate({"rewards": [HPS], "held_out": [{"name": "shapes_truth"}]})
    found = summarise(settings, [_record(0.9, 0.5, 0.25, 1.0)], ["a"], tmp_path)
    assert found["held_out"]["shapes_truth/count"]["gain"]["mean"] == 0.75
    assert found["reward"]["gain"] == {"mean": pytest.approx(0.4), "low": None, "high": None, "n": 1}


def test_without_a_baseline_nothing_is_compared(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = _config(
        home, tmp_path / "out", limit=1, per_prompt=1, guidance={"baseline": False, "n": 1, "held_out": []}
    )
    sample.run(config)
    found = json.loads((config.output / "guidance.json").read_text())
    assert "gain" not in found["reward"] and "cost_ratio" not in found
    assert "guidance best_of_n, 1 samples: reward" in capsys.readouterr().err
    assert "baseline" not in guided.read_record(config.output, "000000-0")


# ----------------------------------------------------------------------------------------------------- mistakes


def test_latents_that_overflow_leave_nothing_half_written(home: Path, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(home / "sd", local_files_only=True)
    torch.nn.init.constant_(pipe.unet.conv_out.bias, float("inf"))
    pipe.save_pretrained(tmp_path / "broken")
    shutil.copy(home / "prompts.txt", tmp_path)
    with pytest.raises(ValueError, match=r"guidance best_of_n: 4 of 4 latents are not finite after step 1 of 2"):
        sample.run(_config(tmp_path, tmp_path / "out", "broken"))
    assert list((tmp_path / "out" / "images").iterdir()) == []
    assert not (tmp_path / "out" / "guidance").exists() and not (tmp_path / "out" / "table.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scheduler": "dpm++"}, "scheduler: dpm.. has no part in them, drop it"),
        ({"guidance": {"held_out": [HPS]}}, "held_out: hps is a reward, so it is not held out"),
        ({"guidance": {"rewards": [{**HPS, "weight": 0}]}}, "the weights of all rewards are 0"),
        ({"guidance": {"rewards": []}}, "rewards"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict[str, Any], told: str, home: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        _config(home, tmp_path / "out", **changes)


def test_two_rewards_of_one_name_are_refused_before_anything_is_written(home: Path, tmp_path: Path) -> None:
    config = _config(home, tmp_path / "out", guidance={"rewards": [HPS, {**HPS, "weight": 2.0}]})
    with pytest.raises(ValueError, match=r"guidance\.rewards: two are called 'hps'; give each a column"):
        sample.run(config)
    assert not (tmp_path / "out").exists()


def test_a_kind_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "model: {path: a}\nprompts: p.txt\noutput: out\nguidance: {kind: best_of_m, rewards: [{name: hps}]}\n"
    )
    with pytest.raises(configs.ConfigError, match=r"x\.yaml:4: guidance.kind.*best_of_m.*Did you mean 'best_of_n'"):
        configs.load(SampleConfig, tmp_path / "x.yaml")


# ------------------------------------------------------------------------------------------------- what there is


def test_every_strategy_has_its_function_a_page_and_a_config_and_is_listed() -> None:
    listed = {row["name"]: row for row in listing(Kind.guidance)}
    overview = (ROOT / "docs" / "guidance.md").read_text()
    shipped = [configs.load(SampleConfig, path).guidance for path in (ROOT / "configs" / "sample").glob("*.yaml")]
    for kind, strategy in strategies():
        module, _, name = strategy.function.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
        assert listed[kind]["summary"] == (strategy.__doc__ or "").splitlines()[0]
        assert listed[kind]["gradients"] == strategy.gradients
        assert (ROOT / "docs" / "guidance" / f"{kind}.md").is_file() and f"guidance/{kind}.md" in overview
        assert any(isinstance(block, strategy) for block in shipped), f"no config in configs/sample has kind: {kind}"
        if strategy.lower:
            assert strategy.lower in strategy.model_fields
    assert listed.keys() == {kind for kind, _ in strategies()}
