"""On-policy rounds on tiny models: the verbs in their folders, going on from the policy, resumed to the byte."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prefer_kit import plug_in
from safetensors.torch import load_file
from training_kit import preferences, settings

from mmalign import rounds, tables, train
from mmalign.config import load
from mmalign.jobs import TrainConfig
from mmalign.jobs_align import EvaluatorSpec, HeldOut
from mmalign.jobs_inputs import Model
from mmalign.jobs_prefer import PreferConfig, SampleSource
from mmalign.tasks.sources import groups
from mmalign.testing.tiny import tiny_sd

PROMPTS = ("a red circle", "a blue square", "a green triangle", "a photo of a circle")


@pytest.fixture(scope="module", name="world")
def _world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, a prefer config that likes red, held-out prompts and pairs."""
    home = tmp_path_factory.mktemp("rounds")
    model = tiny_sd(home / "model")
    (home / "prompts.txt").write_text("\n".join(PROMPTS))
    (home / "held.txt").write_text("a small circle\na large square\na small circle\n")
    source = {
        "kind": "sample", "name": "policy", "model": {"path": str(model)}, "per_prompt": 3, "steps": 3,
        "guidance_scale": 1.0, "scheduler": "ddim", "height": 32, "width": 32, "device": "cpu",
    }  # fmt: skip
    prefer = {
        "output": str(home / "unused"), "prompts": str(home / "prompts.txt"), "sources": [source],
        "rewards": [{"name": "colours", "subscore": "red", "column": "red"}], "label": {"kind": "pairs"},
        "scoring": {"device": "cpu"},
    }  # fmt: skip
    (home / "prefer.yaml").write_text(yaml.safe_dump(prefer))
    return {
        "model": model, "prefer": home / "prefer.yaml", "held": home / "held.txt", "pairs": preferences(home, pairs=3),
        "plugins": plug_in(tmp_path_factory.mktemp("plugins")),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def _plugged(world: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(world["plugins"]))


def _config(world: dict[str, Path], output: Path, **changes: Any) -> TrainConfig:
    online = {
        "iterations": 2, "prefer": str(world["prefer"]),
        "held_out": {
            "prompts": str(world["held"]), "evaluators": [{"name": "blueness"}], "pairs": str(world["pairs"]),
            "draws": 2,
        },
    }  # fmt: skip
    tree = settings(output, world["model"], world["pairs"], online=online, **changes)
    if not tree["online"].get("offline_share"):
        del tree["data"]["table"]
    tree["data"]["cache"] = "memory"
    tree["data"].pop("cache_dir")
    return TrainConfig.model_validate(tree)


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module", name="whole")
def _whole(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of two rounds that several tests look at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(world["plugins"]))
        return rounds.run(_config(world, tmp_path_factory.mktemp("whole") / "run", optim__lr=1e-2))


def test_every_round_is_made_of_the_verbs(whole: Path) -> None:
    for number in range(2):
        home = whole / f"round-{number:02d}"
        assert (home / "prefer" / "preferences.jsonl").is_file()
        assert (home / "train" / "export" / "pytorch_lora_weights.safetensors").is_file()
        assert (home / "held_out" / "scores" / "summary.json").is_file()
    first, second, last = (_weights(whole / part) for part in ("round-00/train", "round-01/train", "."))
    assert all(torch.equal(second[key], last[key]) for key in last), "export/ is the last round's"
    assert any(not torch.equal(first[key], second[key]) for key in first)


def test_pictures_come_from_the_policy_with_fresh_seeds(whole: Path, world: dict[str, Path]) -> None:
    drawn = []
    for number in range(2):
        signed = json.loads((whole / f"round-{number:02d}/prefer/source-0/run.json").read_text())["config"]
        drawn.append((signed["seed"], signed["model"].get("lora")))
    assert drawn[0][1] is None and drawn[1][1] is not None, "round 1 draws with round 0's LoRA"
    assert drawn[0][0] != drawn[1][0]


def test_a_round_goes_on_from_the_policy(whole: Path) -> None:
    begun = yaml.safe_load((whole / "round-01/train/config.yaml").read_text())
    assert begun["lora"]["init"] == str(whole / "round-00/train/export")
    assert begun["reference"].get("lora") is None, "fixed: the reference is the model with the LoRA off"
    found = [json.loads(line) for line in (whole / "round-01/train/metrics.jsonl").read_text().splitlines()]
    assert abs(found[0]["logit"]) > 0, "the policy of round 1 begins away from its reference"


def test_what_is_looked_at_is_in_one_file(whole: Path) -> None:
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    for record in records:
        assert {"reward/colours/red", "held_out/blueness", "ranking_accuracy", "implicit_accuracy", "drift"} <= set(
            record
        )
        assert 0 <= record["ranking_accuracy"] <= 1
    assert (records[0]["implicit_accuracy"], records[0]["drift"]) == (0.5, 0.0), "the base is its own reference"
    assert records[2]["drift"] > records[0]["drift"]
    page = (whole / "report.html").read_text()
    assert "Drift" in page and "blueness" in page


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(
    whole: Path, world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(world, tmp_path / "run", optim__lr=1e-2)
    update, calls = train.Loop._update, [0]

    def dying(loop: Any, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 6:  # in the second round
            raise RuntimeError("killed")
        return update(loop, batch)

    monkeypatch.setattr(train.Loop, "_update", dying)
    with pytest.raises(RuntimeError, match="killed"):
        rounds.run(config)
    with pytest.raises(ValueError, match=r"already holds rounds\. Add --resume"):
        rounds.run(config)
    rounds.run(config, resume=True)
    again, before = _weights(config.output), _weights(whole)
    assert all(torch.equal(again[key], before[key]) for key in before)


def test_more_rounds_can_follow_and_other_settings_cannot(whole: Path, world: dict[str, Path]) -> None:
    config = _config(world, whole, optim__lr=1e-2)
    assert config.online is not None
    more = config.model_copy(update={"online": config.online.model_copy(update={"iterations": 3})})
    with pytest.raises(ValueError, match=r"begun with other values of: loss\.beta"):
        rounds.run(_config(world, whole, optim__lr=1e-2, loss__beta=7.0), resume=True)
    contents = json.loads((whole / "online.json").read_text())["contents"]
    rounds._prepare(more, contents, resume=True)
    rounds._prepare(config, contents, resume=True)


def test_a_moved_reference_is_the_policy_that_drew(world: dict[str, Path], tmp_path: Path) -> None:
    config = _config(world, tmp_path / "run", optim__lr=1e-2)
    assert config.online is not None
    online = config.online.model_copy(update={"reference": "moved", "held_out": None})
    run = rounds.run(config.model_copy(update={"online": online}))
    begun = yaml.safe_load((run / "round-01/train/config.yaml").read_text())
    assert begun["reference"]["lora"] == begun["lora"]["init"] == str(run / "round-00/train/export")
    found = [json.loads(line) for line in (run / "round-01/train/metrics.jsonl").read_text().splitlines()]
    assert found[0]["loss"] == pytest.approx(0.693147, abs=1e-3), "policy and reference begin equal again"


def test_full_fine_tuning_keeps_the_first_model_as_reference(world: dict[str, Path], tmp_path: Path) -> None:
    config = _config(world, tmp_path / "run", lora=None, optim__lr=1e-4)
    assert config.online is not None
    online = config.online.model_copy(update={"held_out": None})
    run = rounds.run(config.model_copy(update={"online": online}))
    begun = yaml.safe_load((run / "round-01/train/config.yaml").read_text())
    assert begun["model"]["path"] == str(run / "round-00/train/export")
    assert begun["reference"]["model"] == str(world["model"])
    assert (run / "export" / "model_index.json").is_file()


def test_offline_rows_are_mixed_in(world: dict[str, Path], tmp_path: Path) -> None:
    online = {"iterations": 1, "prefer": str(world["prefer"]), "offline_share": 0.5}
    tree = settings(tmp_path / "run", world["model"], world["pairs"], online=online)
    run = rounds.run(TrainConfig.model_validate(tree))
    own = tables.read_preferences(run / "round-00/prefer/preferences.jsonl").rows
    mixed = tables.read_preferences(run / "round-00/mixed.jsonl").rows
    assert len(mixed) == 2 * len(own)
    assert {row.source for row in mixed} > {row.source for row in own} or len({row.media for row in mixed}) > len(own)
    kept = json.loads((run / "round-00/train/run.json").read_text())
    assert kept["items"] == len(mixed), "offline rows are trained on, too"


def _labelling(monkeypatch: pytest.MonkeyPatch, folder: Path, sizes: tuple[int, ...]) -> None:
    """In place of `prefer`: a table of so many rows in each round."""
    queue = {f"round-{number:02d}": size for number, size in enumerate(sizes)}
    (folder / "own").mkdir()
    judged = tables.read_preferences(preferences(folder / "own", pairs=max(sizes)), verify=False).rows
    rows = [replace(row, label=None, scores={"phi": (1.0, 0.0)}) for row in judged]

    def run(job: PreferConfig) -> Path:
        path = job.output / "preferences.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        tables.write_preferences(path, rows[: queue[job.output.parent.name]])
        return path

    monkeypatch.setattr(rounds.prefer, "run", run)


def _mixed(config: TrainConfig, labels: PreferConfig, number: int) -> list[str]:
    """Pictures of the offline rows in a round's table."""
    assert config.data.table is not None
    home = config.output / f"round-{number:02d}"
    rows = tables.read_preferences(rounds._labelled(config, labels, None, number, home), verify=False).rows
    return [row.media[0].file for row in rows if Path(row.media[0].file).parent == config.data.table.parent]


def _offline(world: dict[str, Path], tmp_path: Path, pairs: int, **changes: Any) -> tuple[TrainConfig, PreferConfig]:
    (tmp_path / "offline").mkdir()
    table = preferences(tmp_path / "offline", pairs=pairs)
    online = {"iterations": 3, "prefer": str(world["prefer"]), "offline_share": 0.5}
    tree = settings(tmp_path / "run", world["model"], table, online=online, **changes)
    return TrainConfig.model_validate(tree), load(PreferConfig, world["prefer"])


def test_offline_rows_take_turns_though_rounds_differ_in_size(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, labels = _offline(world, tmp_path, pairs=6)
    _labelling(monkeypatch, tmp_path, (1, 4, 3))
    found = [_mixed(config, labels, number) for number in range(3)]
    assert [len(each) for each in found] == [1, 4, 3]
    assert len({*found[0], *found[1], found[2][0]}) == 6, "each once before any comes twice"
    assert found[2][1:] == [found[0][0], found[1][0]], "and then in the same turn"
    assert _mixed(config, labels, 1) == found[1], "a round that is made again takes the same"


def test_a_limit_is_of_the_offline_table(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the round's own config it would cut off the offline rows, which come last."""
    config, labels = _offline(world, tmp_path, pairs=5, data__limit=2)
    _labelling(monkeypatch, tmp_path, (3,))
    found = _mixed(config, labels, 0)
    assert len(found) == 3 and {Path(file).name for file in found} == {"0-w.png", "1-w.png"}
    table = tmp_path / "run/round-00/mixed.jsonl"
    data = rounds._round(config, labels, table, None, tmp_path / "run/round-00").data
    assert data.limit is None
    assert len(groups(data, "pairs")[0]) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "sft", "loss": {"kind": "denoising"}}, "online rounds train on preferences"),
        (
            {"online": {"iterations": 1, "prefer": "p.yaml", "offline_share": 0.3}, "data__table": None},
            "give the table",
        ),
        ({"reference": {"lora": "x"}}, "online rounds set the reference themselves"),
        ({"online": {"iterations": 0, "prefer": "p.yaml"}}, "greater than 0"),
        ({"lora": None, "model__components": {"unet": "x"}}, "drop model.components and from_scratch of unet"),
    ],
)
def test_what_rounds_refuse(world: dict[str, Path], tmp_path: Path, change: dict[str, Any], message: str) -> None:
    online = {"iterations": 1, "prefer": str(world["prefer"])}
    tree = settings(tmp_path / "run", world["model"], world["pairs"], **{"online": online, **change})
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(tree)


def test_several_processes_are_refused(world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would draw the same pictures into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="sample and label in one process, and several were started"):
        rounds.run(_config(world, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_prefer_config_of_another_model_is_refused(world: dict[str, Path], tmp_path: Path) -> None:
    other = tiny_sd(tmp_path / "other", seed=3)
    tree = settings(tmp_path / "run", other, world["pairs"], online={"iterations": 1, "prefer": str(world["prefer"])})
    with pytest.raises(ValueError, match=r"no source of .* draws from model\.path"):
        rounds.run(TrainConfig.model_validate(tree))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"lora": "other"}, {"components": {"vae": "other"}}, {"from_scratch": ["unet"]}])
def test_a_source_with_other_weights_is_not_the_policy(
    world: dict[str, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    config, labels = _config(world, tmp_path / "run"), load(PreferConfig, world["prefer"])
    own = labels.sources[0]
    assert isinstance(own, SampleSource)
    other = own.model_copy(update={"model": Model.model_validate({"path": world["model"], **change}), "name": "other"})
    both = labels.model_copy(update={"sources": (other, own)})
    kept, drawn = rounds._sources(config, both, tmp_path / "policy", 1)
    assert kept == other and drawn.model.lora == tmp_path / "policy"
    with pytest.raises(ValueError, match=r"no source of .* draws from model\.path .* with the LoRA and components"):
        rounds._sources(config, labels.model_copy(update={"sources": (other,)}), None, 0)


def test_parts_are_told_by_where_they_are(world: dict[str, Path], tmp_path: Path) -> None:
    """The same vae by another path, and the LoRA that training begins with, said or left out."""
    around = world["model"].parent / "x" / ".." / "model"
    begun = {"rank": 4, "init": str(tmp_path / "begun")}
    config = _config(world, tmp_path / "run", lora=begun, model__components={"vae": str(world["model"] / "vae")})
    labels = load(PreferConfig, world["prefer"])
    for lora in (None, tmp_path / "begun"):
        model = Model(path=around, components={"vae": around / "vae"}, lora=lora)
        source = labels.sources[0].model_copy(update={"model": model})
        assert rounds._ours(config, labels.model_copy(update={"sources": (source,)})) == [0]


def test_the_first_policy_is_the_lora_that_training_begins_with(
    world: dict[str, Path], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(world, tmp_path / "run", lora={"rank": 4, "init": str(whole / "export")})
    seen = []

    def labelled(config: TrainConfig, labels: PreferConfig, policy: Path | None, number: int, home: Path) -> Path:
        raise KeyboardInterrupt(policy)

    monkeypatch.setattr(rounds, "_labelled", labelled)
    monkeypatch.setattr(rounds, "_look", lambda config, labels, policy, home: seen.append(policy))
    with pytest.raises(KeyboardInterrupt) as caught:
        rounds.run(config)
    assert seen == [whole / "export"] and caught.value.args == (whole / "export",)


def _means(
    world: dict[str, Path], folder: Path, rewards: list[dict[str, Any]], evaluators: list[dict[str, Any]]
) -> dict[str, float]:
    """What a look at the base finds, with these rewards and held-out evaluators."""
    tree = yaml.safe_load(world["prefer"].read_text())
    labels = PreferConfig.model_validate({**tree, "rewards": rewards})
    held = HeldOut.model_validate({"prompts": world["held"], "limit": 1, "evaluators": evaluators})
    config = _config(world, folder / "run")
    return rounds._rewards(config, labels, held, None, folder / "held_out")


def test_two_rewards_of_one_evaluator_are_looked_at_once(world: dict[str, Path], tmp_path: Path) -> None:
    rewards = [{"name": "colours", "subscore": name, "column": name} for name in ("red", "green")]
    found = _means(world, tmp_path, rewards, [{"name": "blueness"}, {"name": "colours"}])
    names = {"reward/colours/red", "reward/colours/green", "held_out/colours/blue", "held_out/blueness"}
    assert set(found) == names


def test_an_evaluator_with_other_parameters_is_held_out(world: dict[str, Path], tmp_path: Path) -> None:
    """It is the one that shows a hacked reward; only the reward itself counts as trained on."""
    found = _means(world, tmp_path, [{"name": "shade"}], [{"name": "shade", "params": {"channel": 2}}])
    assert set(found) == {"reward/shade", "held_out/shade[channel=2]"}
    again = _means(world, tmp_path, [{"name": "shade", "params": {"channel": 2}}], [{"name": "shade"}])
    assert set(again) == {"held_out/shade", "reward/shade[channel=2]"}


def test_mistyped_subscores_are_heard_of_at_the_first_look(world: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sub-score 'rde'"):
        _means(world, tmp_path, [{"name": "colours", "subscore": "rde"}], [])


@pytest.mark.parametrize("edited", ["held", "pairs"])
def test_edited_files_are_not_mixed_into_a_run(world: dict[str, Path], tmp_path: Path, edited: str) -> None:
    own = world | {"held": tmp_path / "held.txt", "pairs": preferences(tmp_path, pairs=2)}
    own["held"].write_text("a circle\n")
    config, labels = _config(own, tmp_path / "run"), load(PreferConfig, world["prefer"])
    rounds._prepare(config, rounds._contents(config, labels), resume=False)
    before = own[edited].read_text()
    own[edited].write_text(before + before)
    rounds._prepare(config, rounds._contents(config, labels), resume=True)  # nothing was looked at yet
    (tmp_path / "run/base").mkdir()
    (tmp_path / "run/base/look.json").write_text("{}")
    own[edited].write_text(before)
    key = {"held": "prompts", "pairs": "pairs"}[edited]
    with pytest.raises(
        ValueError, match=rf"begun with other content of: online\.held_out\.{key}\. .*put the files back"
    ):
        rounds.run(config, resume=True)
    own[edited].write_text(before + before)
    rounds._prepare(config, rounds._contents(config, labels), resume=True)


def test_a_run_of_before_contents_were_kept_goes_on(world: dict[str, Path], tmp_path: Path) -> None:
    config, labels = _config(world, tmp_path / "run"), load(PreferConfig, world["prefer"])
    contents = rounds._contents(config, labels)
    rounds._prepare(config, contents, resume=False)
    signed = tmp_path / "run/online.json"
    kept = json.loads(signed.read_text())
    assert kept.pop("contents") == contents
    signed.write_text(json.dumps(kept))
    rounds._prepare(config, contents, resume=True)
    assert json.loads(signed.read_text())["contents"] == contents


def test_missing_files_and_mixed_up_evaluators_leave_no_folder(world: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"online\.held_out\.prompts: .* does not exist"):
        rounds.run(_config(world | {"held": tmp_path / "none.txt"}, tmp_path / "run"))
    for name in "ab":
        (tmp_path / name).write_text(name)
    two = [{"name": "shade", "params": {"checkpoint": str(tmp_path / name)}} for name in "ab"]
    tree = yaml.safe_load(world["prefer"].read_text())
    (tmp_path / "prefer.yaml").write_text(yaml.safe_dump({**tree, "rewards": two[:1]}))
    config = _config(world | {"prefer": tmp_path / "prefer.yaml"}, tmp_path / "run")
    assert config.online is not None and config.online.held_out is not None
    held = config.online.held_out.model_copy(update={"evaluators": (EvaluatorSpec(**two[1]),)})
    online = config.online.model_copy(update={"held_out": held})
    with pytest.raises(ValueError, match="shade is asked for with two different checkpoints"):
        rounds.run(config.model_copy(update={"online": online}))
    assert not (tmp_path / "run").exists()


def test_a_lora_of_another_rank_is_refused(world: dict[str, Path], whole: Path, tmp_path: Path) -> None:
    tree = settings(tmp_path / "run", world["model"], world["pairs"], lora={"rank": 2, "init": str(whole / "export")})
    with pytest.raises(ValueError, match=r"lora\.init: .* does not fit the adapter"):
        train.run(TrainConfig.model_validate(tree))
