"""The job of `mmalign optimise-prompt`: pairs of prompts are drawn and judged until the best is known well enough.

All that a run knows is in comparisons.jsonl, a line per comparison. What is compared next follows from these lines and
the config alone, so that a run that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign import provenance, sample
from mmalign.backbones.clip_scoring import load_clip_backbone
from mmalign.evaluation import Backbones
from mmalign.guidance import prompts as bandits
from mmalign.guidance.features import clip_files
from mmalign.guidance.rewards import Rewards, fitting, load_scorers
from mmalign.jobs import SampleConfig
from mmalign.jobs_prompts import EvaluatorJudge, PromptsConfig
from mmalign.locks import alone_in, refuse_if_busy
from mmalign.media import AllFrames, read_image, read_video, write_image, write_video
from mmalign.models import base
from mmalign.models.adapter import Adapter
from mmalign.models.video import VideoAdapter
from mmalign.noise import generator
from mmalign.paths import find
from mmalign.progress import Progress
from mmalign.records import MediaRef
from mmalign.routing import answers_in, question_page
from mmalign.runs import begin_folder, pick_device, refuse_other
from mmalign.source import whole_file

TO_COMPARE = "to_compare"


@dataclass(frozen=True)
class Comparison:
    """Two prompts side by side, both drawn from the same `seeds`; `share` of the answers for `a`, None while open."""

    number: int
    a: int
    b: int
    seeds: tuple[int, ...]
    share: float | None = None
    scores: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        return f"c{self.number:06d}"


def run(config: PromptsConfig, answers: Sequence[Path] = ()) -> Path:
    """Compares prompts until `comparisons` are judged, or people have to be asked; the path of best.json.

    Args:
        answers: files of people's answers, beside `answers*.jsonl` and `.csv` in the output folder.

    Raises:
        ValueError: fewer than two prompts, a folder of another config, a model that goes on from a picture, or whatever
            drawing and scoring find wrong.
    """
    refuse_if_busy(config.output)
    device = pick_device(config.device, config.dtype)
    candidates = listed(config)
    settings = _sampling(config)
    media = "videos" if sample.check(settings) else "images"
    if base.goes_on_from_image(config.model):
        raise ValueError(
            f"{config.model.path} draws clips that go on from a picture, and prompts are compared by what is drawn "
            "from text alone; use a text-to-video model"
        )
    identity = _check_same(config, candidates)
    adapter = sample.load(settings, device)
    embeddings = bandits.standardised(embedded(config, candidates, adapter))
    with alone_in(config.output, "mmalign optimise-prompt"):
        begin_folder(config.output, config, identity, media)
        told = sample.teller(settings, identity, adapter)
        done = read(config.output)
        rewards = _rewards(config.judge, adapter) if isinstance(config.judge, EvaluatorJudge) else None
        with Progress("comparing", config.comparisons, len(done)) as bar:
            while len(done) < config.comparisons:
                asked = propose(config, embeddings, done)
                _draw(config, candidates, asked, adapter, told)
                judged = (
                    _scored(config, candidates, asked, rewards, adapter)
                    if rewards
                    else _answered(config, candidates, asked, answers, adapter)
                )
                if judged is None:
                    break
                done += judged
                _write_lines(config.output / "comparisons.jsonl", [asdict(each) for each in done])
                bar.update(len(done))
        return _finish(config, candidates, embeddings, done)


# ------------------------------------------------------------------------------------------------ what is compared


def listed(config: PromptsConfig) -> list[bandits.Candidate]:
    """The candidates. ValueError for fewer than two, or one that comes twice."""
    if config.candidates.kind == "template":
        found = bandits.expand(config.candidates.text)
    else:
        found = [bandits.Candidate(prompt) for prompt, _ in sample.read_prompts(find(config.candidates.path))]
    names = [each.prompt for each in found]
    twice = [name for name in names if names.count(name) > 1] if len(set(names)) < len(names) else []
    if len(found) < 2 or twice:
        what = f"{twice[0]!r} comes twice" if twice else f"there is {len(found)}"
        raise ValueError(f"candidates: {what}; give two or more different prompts")
    return found


def embedded(config: PromptsConfig, candidates: Sequence[bandits.Candidate], adapter: Adapter) -> Tensor:
    """Embeddings [K, D] as the config has them; a prompt's row does not depend on the others."""
    words = [each.prompt for each in candidates]
    if config.embedding.kind == "choices":
        return bandits.choice_features(candidates)
    with torch.no_grad():
        if config.embedding.kind == "clip":
            own, weights = clip_files(config.embedding.checkpoint, config.embedding.model, "embedding.checkpoint")
            clip = load_clip_backbone(config=own, checkpoint=weights, device=adapter.device, dtype=torch.float32)
            return torch.cat([clip.texts([each]) for each in words]).double().cpu()
        rows = []
        for each in words:
            parts = [
                part[0].double().cpu() for part in adapter.encode_prompt([each]).values() if part.is_floating_point()
            ]
            rows.append(torch.cat([part.mean(0) if part.ndim == 2 else part.flatten() for part in parts]))
        return torch.stack(rows)


def propose(config: PromptsConfig, embeddings: Tensor, done: Sequence[Comparison]) -> list[Comparison]:
    """The next round: a function of the comparisons so far, and nothing else that happened."""
    settings = config.bandit
    pairs = [(each.a, each.b) for each in done]
    start, count = len(done), min(settings.round, config.comparisons - len(done))
    belief = None
    asked: list[Comparison] = []
    for number in range(start, start + count):
        if number < settings.initial:
            pair = bandits.random_pair(len(embeddings), settings.seed, number)
        else:
            belief = belief or _belief(config, embeddings, done)
            waiting = [(each.a, each.b) for each in asked]
            pair = bandits.next_pair(belief, pairs, waiting, ridge=settings.ridge, nu=settings.nu)
            # The first is the favourite; it must not always stand left.
            if torch.rand((), generator=generator("side", settings.seed, number)).item() < 0.5:
                pair = pair[::-1]
        seeds = tuple(config.seed + number * config.per_prompt + k for k in range(config.per_prompt))
        asked.append(Comparison(number, *pair, seeds))
    return asked


def _belief(config: PromptsConfig, embeddings: Tensor, done: Sequence[Comparison]) -> bandits.Belief:
    settings = config.bandit
    pairs = [(each.a, each.b) for each in done]
    shares = [each.share if each.share is not None else 0.5 for each in done]
    return bandits.believe(embeddings, pairs, shares, hidden=settings.hidden, ridge=settings.ridge, seed=settings.seed)


# ------------------------------------------------------------------------------------------------ what is drawn


def _sampling(config: PromptsConfig) -> SampleConfig:
    """The sampling job with these settings; its prompts and folder are not read."""
    values = {name: getattr(config, name) for name in SampleConfig.model_fields if hasattr(config, name)}
    return SampleConfig(**{**values, "prompts": config.output, "output": config.output})


def _request(candidates: Sequence[bandits.Candidate], candidate: int, seed: int) -> sample.Request:
    return sample.Request(candidates[candidate].prompt, seed, f"{candidate:05d}")


def _draw(
    config: PromptsConfig, candidates: Sequence[bandits.Candidate], asked: Sequence[Comparison], adapter: Adapter,
    told: Callable[[sample.Request], provenance.Record | None],
) -> None:  # fmt: skip
    """The pictures or clips of a round that are not there yet."""
    wanted = list(
        {_request(candidates, k, seed): None for each in asked for k in (each.a, each.b) for seed in each.seeds}
    )
    settings, clips = _sampling(config), isinstance(adapter, VideoAdapter)
    missing = sample.lacking(config.output, wanted, clips, config.batch_size)
    for part, images in sample.generate(adapter, missing, settings):
        for request, image in zip(part, images, strict=True):
            sample.write(settings, sample.place(config.output, request, clips), image, adapter, told(request))


def _seen(
    config: PromptsConfig,
    candidates: Sequence[bandits.Candidate],
    candidate: int,
    seeds: Sequence[int],
    adapter: Adapter,
) -> np.ndarray:
    """One side of a comparison as its files show it: uint8 [n, H, W, 3], or clips [n, F, H, W, 3]."""
    clips = isinstance(adapter, VideoAdapter)
    places = [sample.place(config.output, _request(candidates, candidate, seed), clips) for seed in seeds]
    if clips:
        return np.stack([read_video(each, AllFrames()).frames.permute(0, 2, 3, 1).numpy() for each in places])
    return np.stack([read_image(each) for each in places])


# ------------------------------------------------------------------------------------------------ judges


def _rewards(judge: EvaluatorJudge, adapter: Adapter) -> Rewards:
    jobs = fitting(judge.rewards, "judge.rewards")
    scorers = load_scorers(
        jobs, adapter.modality, adapter.device, dtype="float32", backbones=Backbones(), frames=judge.reward_frames,
        fps=adapter.fps,
    )  # fmt: skip
    return Rewards(judge.rewards, scorers)


def _scored(
    config: PromptsConfig, candidates: Sequence[bandits.Candidate], asked: Sequence[Comparison], rewards: Rewards,
    adapter: Adapter,
) -> list[Comparison]:  # fmt: skip
    """The round judged by evaluators: the mean over a side's pictures or clips decides, or draws a noisy answer."""
    judge = config.judge
    assert isinstance(judge, EvaluatorJudge)
    found = []
    for each in asked:
        means = []
        for k in (each.a, each.b):
            pixels = torch.from_numpy(_seen(config, candidates, k, each.seeds, adapter)).movedim(-1, 1) / 255
            wish = [config.wish or candidates[k].prompt] * len(pixels)
            means.append(float(rewards.scores(pixels, wish).mean()))
        share = answer(means[0], means[1], judge.temperature, (config.bandit.seed, each.number))
        found.append(Comparison(each.number, each.a, each.b, each.seeds, share, (means[0], means[1])))
    return found


def answer(a: float, b: float, temperature: float, identity: Sequence[int]) -> float:
    """1 where the first is preferred, 0 where the second is, 1/2 where they are level.

    temperature 0: by the scores alone; above, 1 with probability sigmoid((a - b) / temperature), drawn by `identity`.
    """
    gap = 0.0 if a == b else a - b  # also where neither could be scored, -inf both
    if temperature == 0 or math.isinf(gap):
        return float(np.sign(gap) + 1) / 2
    likes = torch.sigmoid(torch.tensor(gap / temperature, dtype=torch.float64)).item()
    drawn = torch.rand((), generator=generator("answer", *identity), dtype=torch.float64).item()
    return float(drawn < likes)


def _answered(
    config: PromptsConfig, candidates: Sequence[bandits.Candidate], asked: Sequence[Comparison], files: Sequence[Path],
    adapter: Adapter,
) -> list[Comparison] | None:  # fmt: skip
    """The round as people judged it; None, and a page that asks, where some pair has no answer yet."""
    home = config.output
    found = [*files, *sorted(home.glob("answers*.jsonl")), *sorted(home.glob("answers*.csv"))]
    table = home / f"{TO_COMPARE}.jsonl"
    given = answers_in([*found, *([table] if table.is_file() else [])])
    said = {each.name: [value for (name, _), value in given.items() if name == each.name] for each in asked}
    points = {"A": 1.0, "same": 0.5, "B": 0.0}
    if all(said.values()):
        for suffix in (".jsonl", ".html"):
            (home / f"{TO_COMPARE}{suffix}").unlink(missing_ok=True)
        return [
            Comparison(c.number, c.a, c.b, c.seeds, sum(points[v] for v in said[c.name]) / len(said[c.name]))
            for c in asked
        ]
    _ask(config, candidates, [each for each in asked if not said[each.name]], table, adapter)
    print(
        f"{sum(not value for value in said.values())} of {len(asked)} comparisons wait for an answer: open "
        f"{home / TO_COMPARE}.html, put the downloaded answers into {home}, and run the same command again",
        file=sys.stderr,
    )
    return None


def _ask(
    config: PromptsConfig, candidates: Sequence[bandits.Candidate], waiting: Sequence[Comparison], table: Path,
    adapter: Adapter,
) -> None:  # fmt: skip
    """Writes the page and the table of what is to be answered; an answered table is left as it is."""
    assert config.judge.kind == "person"
    home, rows = config.output, []
    for each in waiting:
        names = {}
        for letter, k in (("a", each.a), ("b", each.b)):
            beside = np.concatenate(_seen(config, candidates, k, each.seeds, adapter), axis=-2)
            names[letter] = _sheet(home, f"{each.name}-{letter}", beside, adapter).relative_to(home).as_posix()
        rows.append({"pair": each.name, "prompt": config.wish, **names, "answer": "", "user_id": ""})
    with whole_file(home / f"{TO_COMPARE}.html") as temporary:
        hint = "Then put the downloaded file into the folder of this page, and run the same command again."
        pictures_of = {str(row["pair"]): [MediaRef(str(home / str(row[name]))) for name in ("a", "b")] for row in rows}
        temporary.write_text(question_page(rows, pictures_of, config.judge.side, hint), encoding="utf-8")
    kept = [json.loads(line)["pair"] for line in table.read_text().splitlines()] if table.is_file() else []
    if not {row["pair"] for row in rows} <= set(kept):
        _write_lines(table, rows)


def _sheet(home: Path, name: str, beside: np.ndarray, adapter: Adapter) -> Path:
    """Writes what one side shows, its pictures or clips beside one another; a clip so that every browser plays it."""
    path = home / "sheets" / f"{name}.{'png' if adapter.modality == 'image' else 'mp4'}"
    path.parent.mkdir(exist_ok=True)
    if isinstance(adapter, VideoAdapter):
        write_video(path, torch.from_numpy(beside).permute(0, 3, 1, 2), adapter.fps)
    else:
        write_image(path, beside)
    return path


# ------------------------------------------------------------------------------------------------ files


def read(folder: Path) -> list[Comparison]:
    """The comparisons of an earlier run. The file is replaced as a whole after each round, so no line is broken."""
    path = folder / "comparisons.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [_comparison(json.loads(line)) for line in lines]


def _comparison(values: dict[str, Any]) -> Comparison:
    scores = values["scores"]
    kept = None if scores is None else (float(scores[0]), float(scores[1]))
    return Comparison(values["number"], values["a"], values["b"], tuple(values["seeds"]), values["share"], kept)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _check_same(config: PromptsConfig, candidates: Sequence[bandits.Candidate]) -> dict[str, Any]:
    """What decides the comparisons, for run.json. ValueError for a folder that another config filled."""
    ignored = {"batch_size", "device", "output", "comparisons", "judge", "candidates", "model", "provenance"}
    now: dict[str, Any] = json.loads(config.model_dump_json(exclude=ignored))
    now["candidates"] = [each.prompt for each in candidates]
    now |= sample.identity(_sampling(config))
    now["judge"] = json.loads(config.judge.model_dump_json(exclude={"rewards", "side"}))
    if isinstance(config.judge, EvaluatorJudge):
        now["judge"]["rewards"] = [
            {"subscore": spec.subscore, "weight": spec.weight, "params": job.params_text, "weights": job.weight_hash}
            for spec, job in zip(config.judge.rewards, fitting(config.judge.rewards, "judge.rewards"), strict=True)
        ]
    refuse_other(config.output, now, "comparisons")
    return now


def _finish(
    config: PromptsConfig, candidates: Sequence[bandits.Candidate], embeddings: Tensor, done: Sequence[Comparison]
) -> Path:
    """Writes best.json: the best prompt that was compared, and all of them by what the network believes."""
    belief = _belief(config, embeddings, done)
    wins = {k: [s for each in done for s in _shares(each, k)] for k in range(len(candidates))}
    order = sorted(range(len(candidates)), key=lambda k: (-float(belief.scores[k]), k))
    ranking = [
        {
            "prompt": candidates[k].prompt,
            "score": float(belief.scores[k]),
            "compared": len(wins[k]),
            "won": sum(wins[k]) / len(wins[k]) if wins[k] else None,
        }
        for k in order
    ]
    best = belief.best([(each.a, each.b) for each in done])
    found = {"prompt": candidates[best].prompt, "comparisons": len(done), "of": config.comparisons, "ranking": ranking}
    path = config.output / "best.json"
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(found, indent=2, ensure_ascii=False), encoding="utf-8")
    if done:
        print(f"best of {len(candidates)} prompts after {len(done)} comparisons: {found['prompt']}", file=sys.stderr)
    return path


def _shares(each: Comparison, candidate: int) -> list[float]:
    assert each.share is not None
    return [share for k, share in ((each.a, each.share), (each.b, 1 - each.share)) if k == candidate]
