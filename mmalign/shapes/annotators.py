"""Simulated annotators: people with tastes, noise and ties, who judge images of the shapes world from their pixels.

An annotator's utility of an image is a weighted sum of five features in [0, 1]. Between two images it answers by the
model of Rao and Kupper, Bradley-Terry with ties: with d = utility_a - utility_b, temperature T and margin m,

    P(A) = 1 / (1 + exp((m - d) / T)),   P(B) = 1 / (1 + exp((m + d) / T)),   P(same) = 1 - P(A) - P(B).

This is a logistic error of scale T on d, and a tie wherever the sum lies within m of 0. For m = 0 it is Bradley-Terry.

P. V. Rao and L. L. Kupper, Ties in paired-comparison experiments: a generalization of the Bradley-Terry model, Journal
of the American Statistical Association 62 (1967) 194-204; their threshold parameter theta is exp(m / T).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mmalign.shapes.captions import Caption
from mmalign.shapes.reader import Reading, read
from mmalign.shapes.scene import RADII, SATURATION, SIDE

FEATURES = ("fidelity", "size", "centring", "saturation", "cleanliness")
Label = Literal["A", "B", "same"]


@dataclass(frozen=True)
class Annotator:
    """One annotator.

    `tastes`: weight of each feature, not negative, sum 1; a feature that is left out has no weight.
    `features`: what there are tastes for.
    `dislikes`: features of which less is better: one minus their value is weighed.
    `temperature`: scale of the logistic error, in units of utility (which lies in [0, 1]).
    `tie_margin`: noisy differences smaller than this are answered with "same".
    Raises ValueError for other values.
    """

    name: str
    tastes: Mapping[str, float] = field(hash=False)
    temperature: float = 0.08
    tie_margin: float = 0.02
    user_id: str = ""
    dislikes: frozenset[str] = frozenset()
    features: tuple[str, ...] = FEATURES

    def __post_init__(self) -> None:
        unknown = sorted((set(self.tastes) | self.dislikes) - set(self.features))
        if unknown:
            raise ValueError(
                f"annotator {self.name!r} has a taste for {', '.join(unknown)}; known: {', '.join(self.features)}."
            )
        if min(self.tastes.values(), default=-1.0) < 0 or abs(sum(self.tastes.values()) - 1) > 1e-6:
            raise ValueError(f"the tastes of annotator {self.name!r} must not be negative and must add up to 1.")
        if self.temperature <= 0 or self.tie_margin < 0:
            raise ValueError(f"annotator {self.name!r} needs a temperature above 0 and a tie_margin of 0 or more.")

    def utility(self, caption: Caption, image: np.ndarray) -> float:
        """Noise-free utility in [0, 1] of one image, uint8 RGB [height, width, 3]."""
        return self.weigh(features(caption, image))

    def weigh(self, values: Mapping[str, float]) -> float:
        """Utility in [0, 1] from the features of an image; nothing drawn has none, whatever is disliked."""
        if not any(values.values()):
            return 0.0
        liked = {name: 1 - values[name] if name in self.dislikes else values[name] for name in self.tastes}
        return float(sum(weight * liked[name] for name, weight in self.tastes.items()))

    def probabilities(self, utility_a: float, utility_b: float) -> dict[Label, float]:
        """How often this annotator gives each answer."""
        difference = utility_a - utility_b
        a = _logistic((difference - self.tie_margin) / self.temperature)
        b = _logistic((-difference - self.tie_margin) / self.temperature)
        return {"A": a, "B": b, "same": max(0.0, 1 - a - b)}

    def judge(self, rng: np.random.Generator, utility_a: float, utility_b: float) -> Label:
        """One answer; uses up one draw of `rng`."""
        noisy = utility_a - utility_b + rng.logistic(scale=self.temperature)
        if abs(noisy) < self.tie_margin:
            return "same"
        return "A" if noisy > 0 else "B"


def features(caption: Caption, image: np.ndarray) -> dict[str, float]:
    """The five features, each in [0, 1], of one image, uint8 RGB [height, width, 3]; see `weighables`."""
    return weighables(caption, read(image))


def weighables(caption: Caption, reading: Reading) -> dict[str, float]:
    """The five features of an image that has been read.

    `fidelity`: share of the asked kinds and colours that are there, less one share for each object beyond the asked
    number. `size`: mean radius over the range of `scene.RADII`. `centring`: 1 when the centre of mass is in the middle,
    0 at half a side from it. `saturation`: mean over the range of `scene.SATURATION`. `cleanliness`: the reading's own.
    Objects that are no proper shapes count as objects, and for nothing else; without a proper shape all else is 0.
    """
    asked = Counter((item.kind, item.colour) for item in caption.items)
    found = Counter((shape.kind, shape.colour) for shape in reading.shapes)
    kept = sum(min(count, found[name]) for name, count in asked.items())
    extra = max(0, len(reading.shapes) - len(caption.items))
    values = dict.fromkeys(FEATURES, 0.0)
    values["fidelity"] = max(0.0, (kept - extra) / len(caption.items))
    shapes = [shape for shape in reading.shapes if shape.proper]
    if shapes:
        centres = np.array([(shape.x, shape.y) for shape in shapes])
        centre = np.average(centres, axis=0, weights=[shape.radius**2 for shape in shapes])
        away = float(np.hypot(*(centre - SIDE / 2)))
        values["size"] = _within(float(np.mean([shape.radius for shape in shapes])), *RADII)
        values["centring"] = max(0.0, 1 - away / (SIDE / 2))
        values["saturation"] = _within(float(np.mean([shape.saturation for shape in shapes])), *SATURATION)
        values["cleanliness"] = reading.cleanliness
    return values


def _within(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else 1 - 1 / (1 + math.exp(value))


@dataclass(frozen=True)
class Cycle:
    """Somebody whose preferences go round: each kind is preferred to the next, the last to the first.

    No utility says that, so it is no `Annotator`. Between pictures of one proper shape each, P(A) is
    1 / (1 + exp(-1 / T)) if A's kind is the one before B's and as much the other way round; among equal kinds 1/2.
    """

    kinds: tuple[str, ...] = ("circle", "square", "triangle")
    temperature: float = 0.4

    def prefers(self, kind_a: str, kind_b: str) -> float:
        """1 if the first is preferred without noise, 0 if the second, 1/2 among equals and those two steps away."""
        step = (self.kinds.index(kind_b) - self.kinds.index(kind_a)) % len(self.kinds)
        return {1: 1.0, len(self.kinds) - 1: 0.0}.get(step, 0.5)

    def probability(self, kind_a: str, kind_b: str) -> float:
        """How often the first is preferred."""
        return _logistic((2 * self.prefers(kind_a, kind_b) - 1) / self.temperature)


def _annotator(name: str, temperature: float, tie_margin: float, dislikes: str = "", **tastes: float) -> Annotator:
    return Annotator(name, tastes, temperature, tie_margin, f"shapes-{name}", frozenset(dislikes.split()))


ANNOTATORS: dict[str, Annotator] = {
    annotator.name: annotator
    for annotator in (
        _annotator("faithful", 0.08, 0.02, fidelity=0.7, cleanliness=0.2, centring=0.1),
        _annotator("bold", 0.06, 0.02, fidelity=0.35, size=0.4, saturation=0.25),
        _annotator("tidy", 0.06, 0.03, fidelity=0.3, centring=0.4, cleanliness=0.3),
        _annotator("vivid", 0.06, 0.02, fidelity=0.3, saturation=0.6, cleanliness=0.1),
        _annotator("mixed", 0.06, 0.02, fidelity=0.35, size=0.2, centring=0.15, saturation=0.15, cleanliness=0.15),
        _annotator("polished", 0.06, 0.02, fidelity=0.4, cleanliness=0.6),
        _annotator("grainy", 0.06, 0.02, "cleanliness", fidelity=0.4, cleanliness=0.6),
        _annotator("careless", 0.4, 0.1, fidelity=0.35, size=0.2, centring=0.15, saturation=0.15, cleanliness=0.15),
    )
}
