"""Evaluators as rewards of what is being drawn: the registry that scores files, on pixels that are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmalign.discovery import evaluator_class, find_evaluators, make_evaluator
from mmalign.evaluation import Backbones, Evaluator, SetEvaluator
from mmalign.jobs_align import EvaluatorSpec, RewardSpec
from mmalign.pixel_scores import PixelScorer
from mmalign.results import score_label
from mmalign.score_plan import Job, make_jobs


@dataclass
class Costs:
    """What a request has cost.

    Attributes:
        network_calls: latents through the denoiser; with classifier-free guidance a prediction is two.
        decodes: latents through the autoencoder's decoder.
        reward_calls: pictures or clips that the rewards scored, however many rewards there are.
        reward_gradients: those that they scored with a gradient.
        seconds: of the wall clock, its share of the batch.
    """

    network_calls: int = 0
    decodes: int = 0
    reward_calls: int = 0
    reward_gradients: int = 0
    seconds: float = 0.0


class Rewards:
    """The weighted sum of evaluators' scores, lower-is-better ones with their sign turned.

    Attributes:
        names: of the rewards, as their column says or as results call them.
        spent: the costs of each request of the batch in work, to count in; set by who runs the strategy.
    """

    def __init__(self, specs: Sequence[RewardSpec], scorers: Sequence[PixelScorer]):
        self._parts = [(spec, scorer) for spec, scorer in zip(specs, scorers, strict=True)]
        self.names = [name_of(spec, scorer.label) for spec, scorer in self._parts]
        self.spent: list[Costs] = []
        self._looked = False

    @property
    def differentiable(self) -> bool:
        return all(type(scorer.evaluator).differentiable for spec, scorer in self._parts if spec.weight)

    def parts(self, pixels: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Each reward by name as its evaluator gives it, float64 [B] on the CPU; counts no costs."""
        told: dict[int, dict[str, Tensor]] = {}
        found = {}
        for name, (spec, scorer) in zip(self.names, self._parts, strict=True):
            if id(scorer) not in told:
                told[id(scorer)] = scorer.named(pixels, prompts)
            found[name] = _pick(told[id(scorer)], spec, scorer.label)
        return found

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """The weighted sum, [B]; -inf where one that has a weight could not be scored, so that it is not chosen."""
        weighted = [
            spec.weight * scorer.sign * parts[name]
            for name, (spec, scorer) in zip(self.names, self._parts, strict=True)
            if spec.weight
        ]
        total = torch.stack(weighted).sum(0)
        return torch.where(total.isnan(), -torch.inf, total)

    def scores(self, pixels: Tensor, prompts: Sequence[str], rows: Sequence[int] | None = None) -> Tensor:
        """The reward of pixels [n, 3, H, W] or [n, 3, F, H, W] in [0, 1], rounded to 8 bits as in a file.

        Args:
            rows: the request that each belongs to, for the costs; as in `Denoising`.

        Returns:
            [n], float64, on the CPU.
        """
        return self.total(self.counted(pixels, prompts, rows))

    def counted(self, pixels: Tensor, prompts: Sequence[str], rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """`parts`, and counts as `scores` does: for strategies that look at each reward by itself."""
        self._count("reward_calls", len(pixels), rows)
        return self.parts(pixels, prompts)

    def axes(self, parts: dict[str, Tensor]) -> tuple[Tensor, list[float]]:
        """The rewards that have a weight, signed so that higher is better, [n, d], and their weights [d]."""
        weighed = [(name, *part) for name, part in zip(self.names, self._parts, strict=True) if part[0].weight]
        values = [scorer.sign * parts[name] for name, _, scorer in weighed]
        return torch.stack(values, dim=1), [spec.weight for _, spec, _ in weighed]

    def tensor(self, pixels: Tensor, prompts: Sequence[str], rows: Sequence[int] | None = None) -> Tensor:
        """The reward with a gradient to the pixels (not rounded), float32 [n].

        Raises:
            ValueError: a reward has no gradient; with what there is instead.
        """
        refuse_without_gradient([(spec, type(scorer.evaluator)) for spec, scorer in self._parts])
        self._refuse_other_subscores(pixels, prompts)
        self._count("reward_gradients", len(pixels), rows)
        weighted = [
            spec.weight * scorer.sign * scorer.tensor(pixels, prompts).float()
            for spec, scorer in self._parts
            if spec.weight
        ]
        return torch.stack(weighted).sum(0)

    def _refuse_other_subscores(self, pixels: Tensor, prompts: Sequence[str]) -> None:
        """ValueError for a sub-score that is not the first, which alone has a gradient; looked at once."""
        asked = [(spec, scorer) for spec, scorer in self._parts if spec.weight and spec.subscore is not None]
        for spec, scorer in asked if not self._looked else ():
            first = next(iter(scorer.named(pixels[:1], prompts[:1])))
            if spec.subscore != first:
                raise ValueError(
                    f"rewards: {scorer.label} has a gradient for {first} alone, not for {spec.subscore}; drop its "
                    f"subscore, or use a strategy without gradients: {', '.join(without_gradients())}"
                )
        self._looked = True

    def _count(self, what: str, count: int, rows: Sequence[int] | None) -> None:
        if not self.spent:
            return
        if rows is None:
            assert count % len(self.spent) == 0, f"{count} pictures for {len(self.spent)} requests: give rows"
            rows = [index // (count // len(self.spent)) for index in range(count)]
        for row in rows:
            setattr(self.spent[row], what, getattr(self.spent[row], what) + 1)


def _pick(named: dict[str, Tensor], spec: RewardSpec, label: str) -> Tensor:
    name = spec.subscore or next(iter(named))
    if name not in named:
        (values, *others) = named.values()
        if not others and bool(values.isnan().all()):
            return values  # where nothing has a score, sub-scores have no names
        raise ValueError(f"rewards: {label} gives {', '.join(named)}, not {name!r}; name one of these as subscore")
    return named[name]


def name_of(spec: RewardSpec, label: str) -> str:
    """What a reward is called: its column, or its evaluator and sub-score as in results."""
    return spec.column or score_label(label, spec.subscore)


def fitting(specs: Sequence[EvaluatorSpec], key: str) -> list[Job]:
    """The evaluators of these specs, before anything is loaded; equal specs give one job.

    Raises:
        ValueError: an unknown name or parameter, missing weights, or an evaluator that cannot score a drawing.
    """
    unique = [spec for k, spec in enumerate(specs) if not any(_same(spec, before) for before in specs[:k])]
    for spec in unique:
        cls = evaluator_class(spec.name)
        if issubclass(cls, SetEvaluator):
            raise ValueError(f"{key}: {spec.name} scores whole sets; name an evaluator that scores single items")
        absent = sorted({"reference", "response", "aux", "sample"} & set(cls.needs))
        if absent:
            raise ValueError(
                f"{key}: {spec.name} needs {' and '.join(absent)}, which nothing that is being drawn has. Score what "
                "was drawn with `mmalign score` and a media table that has it, and name an evaluator here that reads "
                "pixels and prompts alone"
            )
    jobs = make_jobs([(spec.name, spec.params) for spec in unique])
    places = [next(k for k, other in enumerate(unique) if _same(spec, other)) for spec in specs]
    return [jobs[place] for place in places]


def _same(one: EvaluatorSpec, other: EvaluatorSpec) -> bool:
    return (one.name, one.params) == (other.name, other.params)


def load_scorers(
    jobs: Sequence[Job], modality: str, device: torch.device, *, dtype: str, backbones: Backbones, frames: int = 4,
    fps: float | None = None,
) -> list[PixelScorer]:  # fmt: skip
    """A scorer for each job; equal jobs share one, and all share their networks.

    Raises:
        ValueError: an evaluator of clips for a model of images.
    """
    for job in jobs:
        if modality == "image" and "image" not in job.cls.modality:
            raise ValueError(f"rewards: {job.name} scores videos, and this model draws images; name another evaluator")
    made: dict[str, PixelScorer] = {}
    for job in jobs:
        if job.label not in made:
            evaluator = make_evaluator(job.cls, job.name, job.params, device, dtype, backbones)
            assert isinstance(evaluator, Evaluator), "`fitting` refuses others"
            made[job.label] = PixelScorer(evaluator, job.label, frames, fps)
    return [made[job.label] for job in jobs]


def refuse_without_gradient(rewards: Sequence[tuple[RewardSpec, Any]]) -> None:
    """ValueError for a reward that has a weight and no gradient, with the alternatives.

    Args:
        rewards: specs with their evaluators' classes.
    """
    lacking = sorted({spec.name for spec, cls in rewards if spec.weight and not getattr(cls, "differentiable", False)})
    if lacking:
        others = ", ".join(without_gradients())
        raise ValueError(
            f"rewards: {', '.join(lacking)} cannot be differentiated, and this strategy follows gradients. Use one "
            f"that can ({', '.join(differentiable())}), or a strategy without gradients: {others}"
        )


def differentiable() -> list[str]:
    """Names of the installed evaluators that have a gradient."""
    return [name for name, found in find_evaluators().items() if found.error is None and _has_gradient(name)]


def _has_gradient(name: str) -> bool:
    try:
        return bool(getattr(evaluator_class(name), "differentiable", False))
    except (ValueError, TypeError):  # of a package that is not whole: `mmalign list evaluators` tells
        return False


def without_gradients() -> list[str]:
    """Kinds of the strategies that take any reward."""
    from mmalign.jobs_guidance import strategies

    return [kind for kind, strategy in strategies() if strategy.any_reward]
