"""On-policy rounds: sample from the policy, label what it drew, train on it, look at what no round trains on; again.

Each round is made of the verbs as they are (`prefer`, `train`, `sample`, `score`), in folders of its own, so that a
stopped run goes on where it was.

    output/round-00/prefer/   pictures of the policy, their rewards, preferences.jsonl
    output/round-00/mixed.jsonl   with rows of data.table, if online.offline_share
    output/round-00/train/    the training run; its export is the next policy
    output/round-00/held_out/ pictures and scores of the held-out prompts
    output/base/held_out/     the same of the model that the run began with
    output/metrics.jsonl, report.html, export/
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from mmalign import judgements, prefer, report, sample, score, tables, train
from mmalign.compare import compare
from mmalign.config import dump, load
from mmalign.jobs import Data, Model, SampleConfig, ScoreConfig, TrainConfig
from mmalign.jobs_align import Guards, HeldOut
from mmalign.jobs_prefer import PHI, PreferConfig, SampleSource
from mmalign.methods import DiffusionDPO, Preference
from mmalign.paths import find
from mmalign.results import is_ok, read_results, score_label
from mmalign.runs import flat, pick_device
from mmalign.source import whole_file
from mmalign.tables import PreferenceRow
from mmalign.tasks.preference import PreferenceTask

_APART = 1_000_003  # between the seeds of two rounds: more than anybody draws for a prompt


def run(config: TrainConfig, *, resume: bool = False) -> Path:
    """Does what is missing of all rounds and returns the run folder; `export/` is the last policy.

    Raises:
        ValueError: the folder holds another run, the prefer config has no source with this model, there are several
            processes, or whatever the verbs refuse.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "online rounds sample and label in one process, and several were started; start one, or run the verbs of a "
            "round (prefer, then train with lora.init) by themselves"
        )
    online, folder = config.online, config.output
    assert online is not None
    labels = load(PreferConfig, find(online.prefer))
    _sources(config, labels, None, 0)  # before anything is drawn: a prefer config of another model is refused
    _prepare(config, resume)
    records = [_look(config, labels, None, folder / "base")]
    policy: Path | None = None
    for number in range(online.iterations):
        home = folder / f"round-{number:02d}"
        rows = _labelled(config, labels, policy, number, home)
        trained = train.run(_round(config, labels, rows, policy, home), resume=True)
        policy = trained / "export"
        records.append(_look(config, labels, policy, home))
        _write_metrics(folder, records)
    assert policy is not None
    shutil.copytree(policy, folder / "export", dirs_exist_ok=True)
    _report(config, folder)
    return folder


def _prepare(config: TrainConfig, resume: bool) -> None:
    """Makes the folder and signs it with the config. ValueError if it holds a run that this is not."""
    signed = config.output / "online.json"
    now = flat(json.loads(config.model_dump_json(exclude={"output", "device", "validation", "log", "checkpoint"})))
    if signed.is_file():
        before = json.loads(signed.read_text())
        changed = [key for key in sorted({*now, *before}) if now.get(key) != before.get(key)]
        if changed and changed != ["online.iterations"]:
            raise ValueError(f"{config.output} was begun with other values of: {', '.join(changed)}; choose another "
                             "folder with --set output=...")  # fmt: skip
        if not resume:
            raise ValueError(f"{config.output} already holds rounds. Add --resume to go on with them, or choose "
                             "another folder with --set output=...")  # fmt: skip
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "config.yaml").write_text(dump(config))
    with whole_file(signed) as temporary:
        temporary.write_text(json.dumps(now, indent=2))


def _policy(model: Model, policy: Path | None, lora: bool) -> Model:
    """The model with the policy's weights: a LoRA on top, or a whole checkpoint."""
    if policy is None:
        return model
    return model.model_copy(update={"lora": policy} if lora else {"path": policy})


def _sources(config: TrainConfig, labels: PreferConfig, policy: Path | None, number: int) -> list[Any]:
    """The prefer config's sources, those with this model drawing from the policy with fresh seeds."""
    found: list[Any] = list(labels.sources)
    for index in _ours(config, labels):
        source = found[index]
        model = _policy(source.model, policy, config.lora is not None)
        update = {"model": model, "seed": source.seed + number * _APART, "name": source.name or "policy"}
        found[index] = source.model_copy(update=update)
    return found


def _ours(config: TrainConfig, labels: PreferConfig) -> list[int]:
    """Which sources draw from the model that is trained. ValueError where none does."""
    model = find(config.model.path).resolve()
    found = [
        index
        for index, source in enumerate(labels.sources)
        if isinstance(source, SampleSource) and find(source.model.path).resolve() == model
    ]
    if not found:
        raise ValueError(
            f"online.prefer: no source of {config.online.prefer} draws from model.path {config.model.path}; "  # type: ignore[union-attr]
            "on-policy rounds need one with `kind: sample` and this model"
        )
    return found


def _labelled(config: TrainConfig, labels: PreferConfig, policy: Path | None, number: int, home: Path) -> Path:
    """The round's preference table: pictures of the policy, labelled, and the wanted share of offline rows."""
    sources_ = _sources(config, labels, policy, number)
    job = labels.model_copy(update={"sources": tuple(sources_), "output": home / "prefer"})
    own = prefer.run(job)
    online = config.online
    assert online is not None
    if not online.offline_share:
        return own
    rows = tables.read_preferences(own).rows
    data = config.data
    assert data.table is not None
    offline = tables.read_preferences(find(data.table), data.format, data.root, data.verify, data.dimension).rows
    count = round(len(rows) * online.offline_share / (1 - online.offline_share))
    mixed = [*rows, *(_as_phi(row, data) for row in _chosen(offline, count, config.seed, number))]
    tables.write_preferences(home / "mixed.jsonl", mixed)
    return home / "mixed.jsonl"


def _chosen(rows: Sequence[PreferenceRow], count: int, seed: int, number: int) -> list[PreferenceRow]:
    """`count` offline rows, all of them once before any comes twice; other ones in each round."""
    order = list(range(len(rows)))
    random.Random(f"offline {seed}").shuffle(order)
    start = number * count
    return [rows[order[(start + i) % len(order)]] for i in range(count)]


def _as_phi(row: PreferenceRow, data: Data) -> PreferenceRow:
    """An offline row with its judgement under the name that the label factory's rows have: shares of wins."""
    share = judgements.share_of(judgements.wins_of(row, data.dimensions, data.dimension))
    return replace(row, scores={PHI: tuple(share.tolist())}, rank=None, label=None)


def _round(config: TrainConfig, labels: PreferConfig, table: Path, policy: Path | None, home: Path) -> TrainConfig:
    """The round's training config: its table, going on from the policy, against the reference that was asked for."""
    online = config.online
    assert online is not None
    data = {"table": table, "format": "jsonl", "root": None, "verify": False, "dimension": PHI, "dimensions": None}
    update: dict[str, Any] = {"output": home / "train", "online": None, **_from(config, policy, online.reference)}
    update["data"] = config.data.model_copy(update=data)
    return TrainConfig.model_validate(config.model_copy(update=update).model_dump())


def _from(config: TrainConfig, policy: Path | None, against: Literal["fixed", "moved"]) -> dict[str, Any]:
    """Changes of a config that begin with the policy, against the run's first model or against the policy itself."""
    if policy is None:
        return {}
    if config.lora is not None:
        reference = {"lora": policy} if against == "moved" else {}
        changed: dict[str, Any] = {"lora": config.lora.model_copy(update={"init": policy})}
    else:
        reference = {} if against == "moved" else {"model": config.model.path}
        changed = {"model": _policy(config.model, policy, False)}
    return {**changed, "reference": config.reference.model_copy(update=reference)}


# ------------------------------------------------------------------------------------------------- looking at it


def _look(config: TrainConfig, labels: PreferConfig, policy: Path | None, home: Path) -> dict[str, float]:
    """Rewards of the policy on held-out prompts, trained and untrained ones, and how it ranks held-out pairs."""
    done = home / "look.json"
    if done.is_file():
        found: dict[str, float] = json.loads(done.read_text())
        return found
    home.mkdir(parents=True, exist_ok=True)
    record = _training(home / "prefer" / "summary.json")
    held = config.online.held_out if config.online else None
    if held is not None:
        record |= _rewards(config, labels, held, policy, home / "held_out")
        if held.pairs is not None:
            record |= _ranking(config, held, policy)
    with whole_file(done) as temporary:
        temporary.write_text(json.dumps(record, indent=2))
    return record


def _training(summary: Path) -> dict[str, float]:
    """How many rows the round was trained on."""
    if not summary.is_file():
        return {}
    held = json.loads(summary.read_text())
    return {"rows": float(held["rows"])} if isinstance(held.get("rows"), int | float) else {}


def _rewards(
    config: TrainConfig, labels: PreferConfig, held: HeldOut, policy: Path | None, folder: Path
) -> dict[str, float]:
    """Mean of every reward over the same held-out prompts and seeds: `reward/` are trained on, `held_out/` are not."""
    drawn = _sources(config, labels, policy, 0)[_ours(config, labels)[0]]
    keys = {name: value for name, value in drawn if name not in ("kind", "name", "per_prompt", "seed")}
    job = SampleConfig(
        **keys, prompts=held.prompts, output=folder / "pictures", limit=held.limit, per_prompt=held.per_prompt,
        seed=held.seed,
    )  # fmt: skip
    table = sample.run(job)
    trained = [(reward.name, reward.params) for reward in labels.rewards]
    wanted = [{"name": name, "params": params} for name, params in trained]
    wanted += [
        {"name": spec.name, "params": spec.params}
        for spec in held.evaluators
        if (spec.name, spec.params) not in trained
    ]
    scored = score.run(
        ScoreConfig.model_validate(
            {"table": table, "output": folder / "scores", "evaluators": wanted, **labels.scoring.model_dump()}
        )
    )
    ours = {score_label(row["evaluator"], row["subscore"]) for row in _rows(scored, [name for name, _ in trained])}
    means: dict[str, list[float]] = {}
    for row in read_results(scored).rows:
        if is_ok(row):
            means.setdefault(score_label(row["evaluator"], row["subscore"]), []).append(float(row["score"]))
    return {
        f"{'reward' if label in ours else 'held_out'}/{label}": sum(values) / len(values)
        for label, values in means.items()
    }


def _rows(scored: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of evaluators by name, whatever parameters their labels carry."""
    return [row for row in read_results(scored).rows if row["evaluator"].partition("[")[0] in names]


@torch.no_grad()
def _ranking(config: TrainConfig, held: HeldOut, policy: Path | None) -> dict[str, float]:
    """How the policy ranks held-out pairs, against the model that the run began with.

    ranking_accuracy: share of pairs whose winner the policy itself denoises better (2405.19534); implicit_accuracy: the
    same with the reference's error taken off, as in training; drift: mean squared distance of predictions. Errors are
    means over `draws` draws of (t, noise).
    """
    data = config.data.model_copy(update={"table": held.pairs, "format": "auto", "root": None, "limit": held.limit})
    # Another objective may want lists or scores of a table that holds plain pairs.
    loss = DiffusionDPO(reduction=config.loss.reduction if isinstance(config.loss, Preference) else "mean")
    update = {"data": data, "online": None, "loss": loss, "guards": Guards(), **_from(config, policy, "fixed")}
    device = pick_device(config.device, config.precision)
    task = PreferenceTask(config.model_copy(update=update), device)
    right: list[float] = []
    implied: list[float] = []
    drifts: list[float] = []
    for i in range(len(task.groups)):
        batches = [task.load([(i, draw)]) for draw in range(held.draws)]
        measured = [task.measure(batch, compare=True) for batch in batches]
        model = torch.cat([m for m, _, _ in measured]).mean(0)
        reference = torch.cat([r for _, r, _ in measured if r is not None]).mean(0)
        gap, relative = model[1] - model[0], (model - reference)[1] - (model - reference)[0]
        for found, value in ((right, gap), (implied, relative)):
            found.append(float(value > 0) + 0.5 * float(value == 0))
        drifts += [m["drift"].mean().item() for _, _, m in measured]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return {"ranking_accuracy": mean(right), "implicit_accuracy": mean(implied), "drift": mean(drifts)}


def _write_metrics(folder: Path, records: Sequence[dict[str, float]]) -> None:
    with whole_file(folder / "metrics.jsonl") as temporary:
        temporary.write_text("".join(json.dumps({"step": i, **record}) + "\n" for i, record in enumerate(records)))


def _report(config: TrainConfig, folder: Path) -> None:
    """report.html: held-out scores of the base and of every round side by side, and their curves over the rounds."""
    homes = [folder / "base", *sorted(folder.glob("round-*"))]
    results = [home / "held_out" / "scores" for home in homes if (home / "held_out" / "scores").is_dir()]
    if results:
        # By sample: a prompt that stands twice in the file has the same seed twice.
        against_base = [compare(results[0], other, pair_by="sample") for other in results[1:]]
        title = f"Rounds of {folder.name}"
        report.build(results, folder / "report.html", run=folder, title=title, comparison=against_base)
