"""`mmalign prefer`: draw pictures, score them by several rewards, rank each prompt's, write a preference table.

Sampling and scoring are those verbs, in folders of their own below `output`, so that a stopped run goes on with what is
missing. What is made of the scores is a pure function of them (`mmalign.labelling`), made anew each time in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmalign import labelling, prefer_pool, score
from mmalign.config import dump, nearest
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.jobs_align import RewardSpec
from mmalign.jobs_prefer import PHI, Filters, Pairs, PreferConfig, Ranking, Route, SampleSource
from mmalign.prefer_pool import TOO_FEW, PictureList, content
from mmalign.progress import track
from mmalign.records import MediaRef
from mmalign.results import Results, flat, is_ok, read_results, score_label
from mmalign.routing import write_to_label
from mmalign.runs import versions
from mmalign.score_plan import Job, make_jobs
from mmalign.source import whole_file
from mmalign.tables import Dropped, MediaRow, PreferenceRow, write_media_table, write_preferences

SOURCE = "prefer"  # of the rows that this job writes
_Fact = TypeVar("_Fact")


@dataclass(frozen=True)
class Reward:
    """A column of scores: which evaluator's, what its vote weighs, and whether it was turned to "higher is better"."""

    column: str
    evaluator: str
    subscore: str
    weight: float
    higher_is_better: bool


@dataclass(frozen=True)
class Ranked:
    """A list with its scores [k, r], every one finite and higher the better."""

    group: PictureList
    scores: labelling.Floats
    weights: tuple[float, ...]

    @cached_property
    def phi(self) -> labelling.Floats:
        """[k]"""
        return labelling.phi(self.scores, self.weights)

    @cached_property
    def signs(self) -> labelling.Signs:
        """[P, r]"""
        return labelling.signs(self.scores)

    @cached_property
    def vote(self) -> labelling.Floats:
        """[P, 3]"""
        return labelling.vote(self.signs, self.weights)

    @cached_property
    def strength(self) -> labelling.Floats:
        """[P], of the direction that phi gives."""
        first, second = labelling.pair_index(len(self.phi))
        return labelling.strength(self.vote, self.phi[first] - self.phi[second])

    @cached_property
    def mean_strength(self) -> float:
        """Over the pairs that phi decides; 1/2 where it decides none."""
        first, second = labelling.pair_index(len(self.phi))
        decided = self.strength[self.phi[first] != self.phi[second]]
        return float(decided.mean()) if len(decided) else 0.5

    @cached_property
    def tau(self) -> labelling.Floats:
        """[r, r], tau-b between the rewards."""
        return labelling.tau_b(self.signs)

    @cached_property
    def agreement(self) -> float:
        """Mean tau-b between the rewards; NaN where it is undefined."""
        return labelling.list_agreement(self.tau, self.weights)


def run(config: PreferConfig, *, replace_labels: bool = False, plugins: bool = True) -> Path:
    """Do what is missing, write everything below `config.output`, and return the preference table.

    Args:
        config: sources or relabel, rewards, label, filters, route.
        replace_labels: let other rewards, labels, filters or routes overwrite what an earlier config made of the same
            pictures.
        plugins: whether evaluators of other installed packages may be named.

    Raises:
        ValueError: before anything is drawn, for an evaluator, model or table that cannot be used, and for a folder
            that another config filled; afterwards, for an unknown sub-score, a reward that scored nothing, answers in
            to_label.* to other pairs, and where no preference is left. What an earlier config made is then still there,
            under its own name.
    """
    from mmalign import prefer_summary

    folder, preferences = config.output, config.output / "preferences.jsonl"
    jobs = check(config, plugins)
    now = _identity(config, jobs)
    signed = _check_same(folder, now, replace_labels)
    pool = prefer_pool.gather(config)
    write_media_table(folder / "pictures.jsonl", pool.rows())
    results = read_results(score.run(_score_config(config, jobs), plugins=plugins))
    rewards = resolve(config.rewards, jobs, results)
    ranked, dropped = _ranked(pool.lists, rewards, results)
    rows, unclear = label(ranked, rewards, config.label, config.filters)
    dropped = [*pool.dropped, *dropped, *unclear]
    if not rows:
        summary = prefer_summary.summarise(ranked, rewards, rows, dropped, 0)
        if not preferences.exists():
            _write_json(folder / "summary.json", summary)
        raise ValueError(f"no preference is left: {prefer_summary.reasons(summary)}; loosen filters or label")
    routed = write_to_label(folder, ranked, config.route) if config.route else _ask_nobody(folder)
    summary = prefer_summary.summarise(ranked, rewards, rows, dropped, routed)
    if not signed:  # a table never stands under another config's name, wherever this is stopped
        preferences.unlink(missing_ok=True)
    _sign(config, now)
    _write_json(folder / "summary.json", summary)
    write_preferences(preferences, rows)
    prefer_summary.show(summary)
    return preferences


def check(config: PreferConfig, plugins: bool = True) -> list[Job]:
    """Looks at evaluators, columns, models, prompts and tables before anything is drawn; the job of each reward.

    Raises:
        ValueError: an evaluator, model, prompts file or table that cannot be used, one evaluator with two checkpoints,
            or two rewards with the same column.
    """
    jobs = make(config.rewards, plugins)
    for spec, job in zip(config.rewards, jobs, strict=True):
        if job.is_set:
            raise ValueError(f"{spec.name} scores whole sets, not pictures, and so cannot prefer one to another")
    distinct(config.rewards, jobs)
    _check_columns(config.rewards, jobs)
    prefer_pool.check(config)
    return jobs


# ------------------------------------------------------------------------------------------------ scores


def make(specs: Iterable[EvaluatorSpec], plugins: bool = True) -> list[Job]:
    """The job of each spec, equal ones too. ValueError for what `make_jobs` cannot use."""
    return [make_jobs([(spec.name, spec.params)], plugins)[0] for spec in specs]


def distinct(specs: Sequence[EvaluatorSpec], jobs: Sequence[Job]) -> tuple[EvaluatorSpec, ...]:
    """Each evaluator once, however many of its sub-scores are asked for: what to score with.

    Raises:
        ValueError: two of one label in the results have different checkpoints, so their scores would be mixed up.
    """
    found: dict[str, tuple[Job, EvaluatorSpec]] = {}
    for spec, job in zip(specs, jobs, strict=True):
        first, _ = found.setdefault(job.label, (job, EvaluatorSpec(name=spec.name, params=spec.params)))
        if (first.params_text, first.weight_hash) != (job.params_text, job.weight_hash):
            raise ValueError(
                f"{job.label} is asked for with two different checkpoints, and results tell evaluators apart by name "
                "and parameters, not by checkpoint or `column`; keep one of them, or put the other under a name of its "
                "own: an evaluator file of yours that subclasses it (docs/evaluators.md)"
            )
    return tuple(spec for _, spec in found.values())


def _check_columns(specs: Sequence[RewardSpec], jobs: Sequence[Job]) -> None:
    """Refuses columns that are equal whatever the evaluators will give; `resolve` knows the rest."""
    seen: set[tuple[str, bool]] = set()
    for spec, job in zip(specs, jobs, strict=True):
        undecided = spec.column is None and spec.subscore is None
        column = spec.column or score_label(job.label, spec.subscore)
        if (column, undecided) in seen:
            raise ValueError(_TWICE.format(column))
        seen.add((column, undecided))


_TWICE = "two columns of the table would be called {!r}; give one reward a `column`"


def resolve(specs: Sequence[RewardSpec], jobs: Sequence[Job], results: Results) -> list[Reward]:
    """Which scores of the results the rewards are.

    Raises:
        ValueError: an unknown sub-score (with the nearest one), none named where there are several, a column twice.
    """
    rewards: list[Reward] = []
    for spec, job in zip(specs, jobs, strict=True):
        given = {str(row["subscore"]) for row in results.rows if row["evaluator"] == job.label and is_ok(row)}
        names = sorted(given - job.cls.counts)
        if not names:
            reason = next(row["reason"] for row in results.rows if row["evaluator"] == job.label)
            raise ValueError(f"{job.label} scored none of the pictures, so it cannot rank them: {reason}")
        subscore = spec.subscore if spec.subscore is not None else names[0]
        if subscore not in names:
            hint = nearest(subscore, names)
            raise ValueError(f"{job.label} has no sub-score {subscore!r}.{hint} It has: {', '.join(names)}.")
        if spec.subscore is None and len(names) > 1:
            raise ValueError(f"{job.label} gives {', '.join(names)}; choose one with `subscore`")
        column = spec.column or score_label(job.label, subscore)
        if column == PHI or any(column == other.column for other in rewards):
            raise ValueError(_TWICE.format(column))
        rewards.append(Reward(column, job.label, subscore, spec.weight, job.cls.higher_is_better))
    return rewards


def _ranked(
    lists: Sequence[PictureList], rewards: Sequence[Reward], results: Results
) -> tuple[list[Ranked], list[Dropped]]:
    """The lists with their scores, less the pictures that some reward could not score."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for result in results.rows:
        found.setdefault((result["evaluator"], result["subscore"]), {})[result["sample"]] = result
    columns = [found[reward.evaluator, reward.subscore] for reward in rewards]
    signs = np.array([1.0 if reward.higher_is_better else -1.0 for reward in rewards])
    weights = tuple(reward.weight for reward in rewards)
    faults: dict[str, Dropped] = {}
    ranked: list[Ranked] = []
    dropped: list[Dropped] = []
    for each in lists:
        good = []
        for row in each.rows:
            fault = faults.get(row.sample) or _fault(row, rewards, columns)
            if fault is None:
                good.append(row)
            else:
                faults[row.sample] = fault
        if len(good) < 2:
            dropped.append(Dropped(each.prompt, TOO_FEW, f"{len(good)} of {len(each.rows)} could be scored"))
            continue
        scores = np.array([[float(column[row.sample]["score"]) for column in columns] for row in good]) * signs
        # 0.0 is added so that a turned zero is written as 0.0, not -0.0
        ranked.append(Ranked(replace(each, rows=tuple(good)), scores + 0.0, weights))
    return ranked, [*faults.values(), *dropped]


def _fault(row: MediaRow, rewards: Sequence[Reward], columns: Sequence[Mapping[str, dict[str, Any]]]) -> Dropped | None:
    """Why a picture cannot be ranked: the first reward that has no score for it."""
    for reward, column in zip(rewards, columns, strict=True):
        result = column.get(row.sample)
        if result is None or not is_ok(result):
            reason = "it has no row" if result is None else str(result.get("reason") or "its score is not finite")
            return Dropped(row.sample, f"not scored by {reward.column}", reason)
    return None


def _score_config(config: PreferConfig, jobs: Sequence[Job]) -> ScoreConfig:
    return ScoreConfig(
        table=config.output / "pictures.jsonl",
        output=config.output / "scores",
        evaluators=distinct(config.rewards, jobs),
        **dict(config.scoring),
    )


# ------------------------------------------------------------------------------------------------ labels


def label(
    ranked: Sequence[Ranked], rewards: Sequence[Reward], spec: Ranking | Pairs, filters: Filters
) -> tuple[list[PreferenceRow], list[Dropped]]:
    """Preference rows with all scores kept, and the lists and pairs that were too unclear."""
    columns = [reward.column for reward in rewards]
    rows: list[PreferenceRow] = []
    dropped: list[Dropped] = []
    for each in track(ranked, "labelling", len(ranked)):
        unclear = _unclear(each, filters)
        if unclear:
            dropped.append(unclear)
        elif isinstance(spec, Ranking):
            members = range(len(each.phi))
            weakest = filters.min_strength
            if weakest is not None and each.mean_strength < weakest:
                detail = f"mean strength {each.mean_strength:.3f}"
                dropped.append(Dropped(each.group.prompt, f"prompt with strength below {weakest:g}", detail))
            else:
                rows.append(_row(each, columns, members, each.mean_strength if spec.weight == "strength" else 1.0))
        else:
            made, weak = _pair_rows(each, columns, spec, filters.min_strength)
            rows += made
            dropped += weak
    return rows, dropped


def _unclear(each: Ranked, filters: Filters) -> Dropped | None:
    least = filters.min_agreement
    if least is None or each.agreement >= least:
        return None
    if np.isnan(each.agreement):
        return Dropped(each.group.prompt, "agreement of the rewards is undefined", "all of them but one tie everywhere")
    return Dropped(each.group.prompt, f"agreement of the rewards below {least:g}", f"mean tau-b {each.agreement:.3f}")


def _pair_rows(
    each: Ranked, columns: Sequence[str], spec: Pairs, weakest: float | None
) -> tuple[list[PreferenceRow], list[Dropped]]:
    measure = each.phi if spec.by == PHI else each.scores[:, columns.index(spec.by)]
    chosen = labelling.choose(measure, spec.select, count=spec.count, min_margin=spec.min_margin, ties=spec.ties)
    place = {pair: n for n, pair in enumerate(zip(*labelling.pair_index(len(measure)), strict=True))}
    rows, dropped = [], []
    for pair in chosen:
        strength = float(each.strength[place[pair]])
        if weakest is not None and strength < weakest:
            names = " and ".join(each.group.rows[i].sample for i in pair)
            detail = f"{names}: strength {strength:.3f}"
            dropped.append(Dropped(each.group.prompt, f"pair with strength below {weakest:g}", detail))
        else:
            rows.append(_row(each, columns, pair, strength if spec.weight == "strength" else 1.0))
    if not chosen:
        dropped.append(Dropped(each.group.prompt, f"no pair by {spec.select}", f"{spec.by} is level, or too close"))
    return rows, dropped


def _row(each: Ranked, columns: Sequence[str], members: Sequence[int], weight: float) -> PreferenceRow:
    media = tuple(_ref(each.group.rows[i]) for i in members)
    scores = {PHI: tuple(float(each.phi[i]) for i in members)}
    scores |= {name: tuple(float(each.scores[i, n]) for i in members) for n, name in enumerate(columns)}
    rows = [each.group.rows[i] for i in members]
    return PreferenceRow(
        each.group.prompt, media, scores=scores, weight=round(weight, 12), source=SOURCE,
        fps=_known([row.fps for row in rows]), num_frames=_known([row.num_frames for row in rows]),
        models=_known([row.model for row in rows]),
    )  # fmt: skip


def _known(values: Sequence[_Fact | None]) -> tuple[_Fact | None, ...] | None:
    """As a preference row has them: nothing at all where nothing is known."""
    return tuple(values) if any(value is not None for value in values) else None


def _ref(row: MediaRow) -> MediaRef:
    return MediaRef(row.media) if isinstance(row.media, str) else row.media


# ------------------------------------------------------------------------------------------------ the folder


def _check_same(folder: Path, now: Mapping[str, str], replace_labels: bool) -> bool:
    """Whether the folder is signed with this identity. ValueError, with the keys that differ, for one that another
    config filled.
    """
    path = folder / "run.json"
    before = json.loads(path.read_text())["config"] if path.is_file() else now
    changed = sorted(key for key in {*now, *before} if now.get(key) != before.get(key))
    fixed = [key for key in changed if key.split(".")[0] in ("prompts", "sources", "relabel")]
    if fixed or (changed and not replace_labels):
        also = "" if fixed else ", or add --replace to make new labels of the pictures that are there"
        raise ValueError(
            f"{folder} was made with other values of: {', '.join(changed)}. "
            f"Choose another folder with --set output=...{also}, or remove this one."
        )
    return path.is_file() and not changed


def _sign(config: PreferConfig, identity: Mapping[str, str]) -> None:
    """Writes config.yaml and run.json, once nothing is left that could be refused."""
    (config.output / "config.yaml").write_text(dump(config))
    _write_json(config.output / "run.json", {"config": identity, "versions": versions()})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _ask_nobody(folder: Path) -> int:
    """Removes what an earlier config asked and nobody has begun to answer; 0, the number of pairs to label."""
    with suppress(ValueError):  # there are answers: they stay, for `merge`
        write_to_label(folder, [], Route())
    return 0


def _identity(config: PreferConfig, jobs: Sequence[Job]) -> dict[str, str]:
    """What decides the result. Files count by content; a source's model is checked by `sample`, in its folder."""
    data = {name: getattr(config, name).model_dump(mode="json") for name in ("label", "filters")}
    rewards = [
        {"job": job.label, "params": job.params_text, "weights": job.weight_hash}
        | spec.model_dump(include={"subscore", "weight", "column"})
        for spec, job in zip(config.rewards, jobs, strict=True)
    ]
    sources = [
        source.model_dump(mode="json", exclude={"model", "batch_size", "device", "provenance"})
        | ({} if isinstance(source, SampleSource) else {"table": content(source.table)})
        for source in config.sources
    ]
    relabel = config.relabel and {**config.relabel.model_dump(mode="json"), "table": content(config.relabel.table)}
    decides = data | {
        "prompts": config.prompts and content(config.prompts),
        "sources": {str(number): source for number, source in enumerate(sources)},
        "relabel": relabel,
        "rewards": {str(number): reward for number, reward in enumerate(rewards)},
        "route": config.route and config.route.model_dump(mode="json"),
        "scoring": {"dtype": config.scoring.dtype, "decoder": config.scoring.decoder},
    }
    return dict(flat(decides))
