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

from mmalign import judgements, prefer, prefer_pool, report, sample, score, tables, train
from mmalign.compare import compare
from mmalign.config import dump, load
from mmalign.jobs import SampleConfig, ScoreConfig, TrainConfig
from mmalign.jobs_align import Guards, HeldOut
from mmalign.jobs_inputs import Data, Model
from mmalign.jobs_prefer import PHI, PreferConfig, SampleSource
from mmalign.methods import DiffusionDPO, Preference
from mmalign.paths import find
from mmalign.results import Results, is_ok, read_results, score_label
from mmalign.runs import flat, pick_device
from mmalign.source import whole_file
from mmalign.tables import PreferenceRow
from mmalign.tasks import sources
from mmalign.tasks.preference import PreferenceTask

_APART = 1_000_003  # between the seeds of two rounds: more than anybody draws for a prompt


def run(config: TrainConfig, *, resume: bool = False) -> Path:
    """Does what is missing of all rounds and returns the run folder; `export/` is the last policy.

    Raises:
        ValueError: the folder holds another run, or one with other files behind the same config, the prefer config has
            no source with this model, there are several processes, or whatever the verbs refuse.
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
    _prepare(config, _contents(config, labels), resume)
    policy = config.lora.init if config.lora else None
    records = [_look(config, labels, policy, folder / "base")]
    for number in range(online.iterations):
        home = folder / _round_name(number)
        rows = _labelled(config, labels, policy, number, home)
        trained = train.run(_round(config, labels, rows, policy, home), resume=True)
        policy = trained / "export"
        records.append(_look(config, labels, policy, home))
        _write_metrics(folder, records)
    assert policy is not None
    shutil.copytree(policy, folder / "export", dirs_exist_ok=True)
    _report(config, folder)
    return folder


def _contents(config: TrainConfig, labels: PreferConfig) -> dict[str, str]:
    """What the files behind the config hold: hashes of tables and prompts, and of every evaluator's checkpoint.

    Raises:
        ValueError: one of them is missing, or an evaluator, model or table cannot be used.
    """
    online = config.online
    assert online is not None
    held = online.held_out
    others = held.evaluators if held else ()
    jobs = [*prefer.check(labels), *prefer.make(others)]
    prefer.distinct([*labels.rewards, *others], jobs)
    wanted = [(reward.subscore, "reward") for reward in labels.rewards] + [(None, "held_out") for _ in others]
    found = {
        f"{kind}/{score_label(job.label, subscore)}": str(job.weight_hash)
        for job, (subscore, kind) in zip(jobs, wanted, strict=True)
    }
    files = {"data.table": config.data.table if online.offline_share else None}
    if held is not None:
        files |= {"online.held_out.prompts": held.prompts, "online.held_out.pairs": held.pairs}
    for key, path in files.items():
        if path is not None and not find(path).exists():
            raise ValueError(f"{key}: {path} does not exist; check the path")
        found |= {key: prefer_pool.content(path)} if path is not None else {}
    return found


def _prepare(config: TrainConfig, contents: dict[str, str], resume: bool) -> None:
    """Makes the folder and signs it with the config and the contents of its files.

    Raises:
        ValueError: the folder holds a run that this is not, or `resume` is missing.
    """
    signed = config.output / "online.json"
    now = flat(json.loads(config.model_dump_json(exclude={"output", "device", "validation", "log", "checkpoint"})))
    if signed.is_file():
        before = json.loads(signed.read_text())
        held = before.pop("contents", contents)
        changed = [key for key in sorted({*now, *before}) if now.get(key) != before.get(key)]
        if changed and changed != ["online.iterations"]:
            raise ValueError(f"{config.output} was begun with other values of: {', '.join(changed)}; choose another "
                             "folder with --set output=...")  # fmt: skip
        if not resume:
            raise ValueError(f"{config.output} already holds rounds. Add --resume to go on with them, or choose "
                             "another folder with --set output=...")  # fmt: skip
        edited = [key for key in sorted({*contents, *held}) if contents.get(key) != held.get(key)]
        # Until the first look is done there is nothing that other files could be mixed with.
        if edited and (config.output / "base" / "look.json").is_file():
            raise ValueError(
                f"{config.output} was begun with other content of: {', '.join(edited)}. Its looks and rounds would not "
                "compare; put the files back as they were, or choose another folder with --set output=..."
            )
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / "config.yaml").write_text(dump(config))
    with whole_file(signed) as temporary:
        temporary.write_text(json.dumps({**now, "contents": contents}, indent=2))


def _policy(model: Model, policy: Path | None, lora: bool) -> Model:
    """The model with the policy's weights: a LoRA on top, or a whole checkpoint."""
    if policy is None:
        return model
    whole: dict[str, Any] = {"path": policy, "variant": None, "components": {}, "from_scratch": ()}
    return model.model_copy(update={"lora": policy} if lora else whole)


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
    """Which sources draw from the model that is trained. ValueError where none does.

    One with another LoRA or other parts is another model, which the policy must not take the place of. The LoRA that
    training begins with may be named or left out.
    """
    model = _parts(config.model)
    own = {_place(config.model.lora), _place(config.lora.init if config.lora else config.model.lora)}
    found = [
        index
        for index, source in enumerate(labels.sources)
        if isinstance(source, SampleSource) and _parts(source.model) == model and _place(source.model.lora) in own
    ]
    if not found:
        raise ValueError(
            f"online.prefer: no source of {config.online.prefer} draws from model.path {config.model.path} with the "  # type: ignore[union-attr]
            "LoRA and components that are trained; on-policy rounds need one with `kind: sample` and this model"
        )
    return found


def _parts(model: Model) -> tuple[Any, ...]:
    """What a model is made of, but for its LoRA, wherever the paths start."""
    replaced = sorted((name, _place(path)) for name, path in model.components.items())
    return _place(model.path), model.variant, replaced, sorted(model.from_scratch)


def _place(path: Path | None) -> Path | None:
    return None if path is None else find(path).resolve()


def _labelled(config: TrainConfig, labels: PreferConfig, policy: Path | None, number: int, home: Path) -> Path:
    """The round's preference table: pictures of the policy, labelled, and the wanted share of offline rows."""
    sources_ = _sources(config, labels, policy, number)
    job = labels.model_copy(update={"sources": tuple(sources_), "output": home / "prefer"})
    own = prefer.run(job)
    online = config.online
    assert online is not None
    if not online.offline_share:
        return own
    rows = tables.read_preferences(own, verify=False).rows  # every picture was scored
    data = config.data
    offline = sources.preferences(data).rows[: data.limit]
    count = round(len(rows) * online.offline_share / (1 - online.offline_share))
    used = sum(_offline_rows(config.output / _round_name(earlier)) for earlier in range(number))
    mixed = [*rows, *(_as_phi(row, data) for row in _chosen(offline, count, config.seed, used))]
    tables.write_preferences(home / "mixed.jsonl", mixed)
    return home / "mixed.jsonl"


def _round_name(number: int) -> str:
    return f"round-{number:02d}"


def _offline_rows(home: Path) -> int:
    """How many offline rows a round that was labelled before took: the lines that prefer did not write."""
    files = (home / "mixed.jsonl", home / "prefer" / "preferences.jsonl")
    both, own = (path.read_bytes().count(b"\n") for path in files)
    return both - own


def _chosen(rows: Sequence[PreferenceRow], count: int, seed: int, used: int) -> list[PreferenceRow]:
    """`count` offline rows, after the `used` ones of earlier rounds: all of them once before any comes twice."""
    order = list(range(len(rows)))
    random.Random(f"offline {seed}").shuffle(order)
    return [rows[order[(used + i) % len(order)]] for i in range(count)]


def _as_phi(row: PreferenceRow, data: Data) -> PreferenceRow:
    """An offline row with its judgement under the name that the label factory's rows have: shares of wins."""
    share = judgements.share_of(judgements.wins_of(row, data.dimensions, data.dimension))
    return replace(row, scores={PHI: tuple(share.tolist())}, rank=None, label=None)


def _round(config: TrainConfig, labels: PreferConfig, table: Path, policy: Path | None, home: Path) -> TrainConfig:
    """The round's training config: its table, going on from the policy, against the reference that was asked for."""
    online = config.online
    assert online is not None
    data = {"table": table, "format": "jsonl", "root": None, "verify": False, "dimension": PHI, "dimensions": None}
    if online.offline_share:  # the limit was the offline table's; here it would cut those rows off, which come last
        data["limit"] = None
    update: dict[str, Any] = {"output": home / "train", "online": None, **_from(config, policy, online.reference)}
    update["data"] = config.data.model_copy(update=data)
    return TrainConfig.model_validate(config.model_copy(update=update).model_dump())


def _from(config: TrainConfig, policy: Path | None, against: Literal["fixed", "moved"]) -> dict[str, Any]:
    """Changes of a config that begin with the policy, against the run's first model or against the policy itself."""
    if policy is None:
        return {}
    if config.lora is not None:
        reference: dict[str, Any] = {"lora": policy} if against == "moved" else {}
        changed: dict[str, Any] = {"lora": config.lora.model_copy(update={"init": policy})}
    else:
        reference = {} if against == "moved" else {"model": config.model.path, "variant": config.model.variant}
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
    jobs = prefer.make(labels.rewards)
    evaluators = prefer.distinct([*labels.rewards, *held.evaluators], [*jobs, *prefer.make(held.evaluators)])
    scoring = ScoreConfig(table=table, output=folder / "scores", evaluators=evaluators, **dict(labels.scoring))
    results = read_results(score.run(scoring))
    able = {row["evaluator"] for row in results.rows if is_ok(row)}
    trained = [(spec, job) for spec, job in zip(labels.rewards, jobs, strict=True) if job.label in able]
    # A mistyped sub-score is heard of at the first look. That nothing of a policy can be scored is for prefer to say.
    prefer.resolve([spec for spec, _ in trained], [job for _, job in trained], results)
    return _means(results, {(job.label, spec.subscore) for spec, job in trained})


def _means(results: Results, trained: set[tuple[str, str | None]]) -> dict[str, float]:
    """Mean of every score, by whether it is one of those that are trained on: (label, sub-score or its only one)."""
    means: dict[str, list[float]] = {}
    for row in results.rows:
        if is_ok(row) and score_label(row["evaluator"], row["subscore"]) not in results.count_labels:
            ours = {(row["evaluator"], row["subscore"]), (row["evaluator"], None)} & trained
            name = f"{'reward' if ours else 'held_out'}/{score_label(row['evaluator'], row['subscore'])}"
            means.setdefault(name, []).append(float(row["score"]))
    return {name: sum(values) / len(values) for name, values in means.items()}


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
