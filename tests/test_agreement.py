"""Agreement of annotators: alpha and shares against their definitions, and who counts as a person."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from audit_kit import judged, rounded

from mmalign import agreement, audit
from mmalign import audit_figures as figures
from mmalign.records import MediaRef

RNG = np.random.default_rng(11)


def pairwise_alpha(units: list[list[float]]) -> float:
    """Krippendorff's alpha by its definition: disagreement within units over disagreement of any two answers."""
    units = [unit for unit in units if len(unit) > 1]
    values = [answer for unit in units for answer in unit]
    within = sum(sum(a != b for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    anyhow = sum(a != b for a, b in itertools.permutations(values, 2)) / (len(values) - 1)
    return 1 - within / anyhow


@pytest.mark.parametrize("seed", range(5))
def test_alpha_is_its_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = [list(rng.choice([1, 0.5, 0], size=rng.integers(1, 6), p=[0.6, 0.1, 0.3])) for _ in range(30)]
    found = agreement.alpha(units, [str(n % 12) for n in range(30)])
    assert found["alpha"] == pytest.approx(pairwise_alpha(units))
    assert found["low"] < found["alpha"] < found["high"]
    assert found["n"] == sum(len(unit) > 1 for unit in units)


def test_alpha_at_its_ends() -> None:
    """The example of Krippendorff's chapter for two coders and binary data, perfection, and nothing to compare."""
    coders = "0100000000", "1110010010"
    units = [[float(a), float(b)] for a, b in zip(*coders, strict=True)]
    assert agreement.alpha(units, list(range(10)))["alpha"] == pytest.approx(0.095, abs=5e-4)
    assert agreement.alpha([[1, 1], [0, 0, 0]], "ab")["alpha"] == 1
    for units in ([], [[1.0]], [[1, 1], [1, 1]]):
        assert agreement.alpha(units, list(range(len(units))))["alpha"] is None


@pytest.mark.parametrize("seed", range(5))
def test_mirrored_alpha_is_its_definition_over_both_ways_round(seed: int) -> None:
    rng = np.random.default_rng(seed)
    units = [list(rng.choice([1, 0.5, 0], size=rng.integers(1, 6), p=[0.7, 0.1, 0.2])) for _ in range(30)]
    prompts = [str(n % 12) for n in range(30)]
    found = agreement.alpha(units, prompts, mirrored=True)
    both = [*units, *([1 - answer for answer in unit] for unit in units)]
    assert found["alpha"] == pytest.approx(pairwise_alpha(both))
    assert found["low"] < found["alpha"] < found["high"] and found["n"] == sum(len(unit) > 1 for unit in units)
    turned = [[1 - answer for answer in unit] if rng.random() < 0.5 else unit for unit in units]
    assert rounded(agreement.alpha(turned, prompts, mirrored=True)) == rounded(found)
    assert agreement.alpha([[1, 1], [1, 1]], "ab", mirrored=True)["alpha"] == 1
    assert agreement.alpha([[0.5, 0.5]] * 2, "ab", mirrored=True)["alpha"] is None


def test_alpha_does_not_depend_on_the_names_of_files() -> None:
    """Two models, one of them mostly preferred, by two people who mostly agree: in folders, and under hashed names."""
    rng = np.random.default_rng(3)
    said = [(float(rng.random() < 0.9), float(rng.random() < 0.9)) for _ in range(200)]
    found = []
    for hashed in (False, True):
        names = [[f"{folder}/{n}.png" for folder in ("aligned", "base")] for n in range(len(said))]
        if hashed:
            names = [[hashlib.sha256(name.encode()).hexdigest() for name in pair] for pair in names]
        given = [
            judged(f"p{n}", *pair, answer, user)
            for n, (pair, both) in enumerate(zip(names, said, strict=True))
            for user, answer in zip(("anna", "ben"), both, strict=True)
        ]
        found.append(figures.annotators(figures.units(given)))
    assert rounded(found[0]) == rounded(found[1])
    agree = np.mean([a == b for a, b in said])  # of mirrored pairs without ties, A and B are as frequent: 1/2 by chance
    by_chance = 2 * len(said) / (4 * len(said) - 1)
    assert found[0]["krippendorff"]["alpha"] == pytest.approx(1 - (1 - agree) / by_chance)


def test_rewards_are_nobody() -> None:
    """A ranking by rewards is no annotator, and scores are held against people, where there are any."""
    rewards = [judged(f"p{n}", "x", "y", 1, by_rewards=True) for n in range(4)]
    given = [*rewards, judged("p0", "x", "y", 0, "anna"), judged("p1", "y", "x", 1), judged("p2", "x", "y", 1)]
    by_pair = figures.units(given)
    assert [len(unit) for unit in by_pair.values()] == [1, 1, 1]
    assert figures.annotators(by_pair)["krippendorff"]["n"] == 0
    assert figures.people(given, by_pair)["anna"]["with_majority"]["n"] == 0
    scores = {(f"p{n}", MediaRef(f"/{name}")): value for n in range(4) for name, value in (("x", 2.0), ("y", 1.0))}
    found = audit.examine(given, {"r": scores}, pictures=False)
    assert (found["against"], found["by_people"], found["by_rewards"], found["pairs"]) == ("people", 3, 4, 4)
    assert found["rewards"]["r"]["n"] == 3 and found["rewards"]["r"]["accuracy"]["share"] == pytest.approx(1 / 3)
    assert sum(half["accuracy"]["r"]["n"] for half in found["prompt_length"]) == 3
    alone = audit.examine(rewards, {"r": scores}, pictures=False)
    assert alone["against"] == "rewards" and alone["rewards"]["r"]["accuracy"] == {
        "share": 1, "low": pytest.approx(alone["rewards"]["r"]["accuracy"]["low"]), "high": 1, "n": 4
    }  # fmt: skip


def test_who_judged_and_how() -> None:
    given = [
        judged("p", "x", "y", 1, "anna"), judged("p", "y", "x", 0, "ben"), judged("p", "x", "y", 0, "carl"),
        judged("q", "z", "w", 0.5, "anna"), judged("q", "z", "w", 1, "ben"), judged("q", "z", "w", 0, "ben"),
    ]  # fmt: skip
    by_pair = figures.units(given)
    assert len(by_pair) == 2 and sum(len(unit) for unit in by_pair.values()) == 5, "ben's second answer does not count"
    found = figures.annotators(by_pair)
    assert found["agree"]["share"] == pytest.approx((1 / 3 + 0) / 2) and found["krippendorff"]["n"] == 2
    people = figures.people(given, by_pair)
    assert list(people) == ["ben", "anna", "carl"]
    assert people["carl"]["with_majority"]["share"] == 0 and people["carl"]["first"]["share"] == 0
    # anna and carl contradict each other on p, so ben has no majority there; on q anna is undecided
    assert people["ben"]["with_majority"]["n"] == 0 and people["ben"]["first"]["share"] == pytest.approx(1 / 3)
    assert people["anna"]["with_majority"]["n"] == 1 and people["anna"]["with_majority"]["share"] == 0.5
    assert people["anna"]["ties"]["share"] == 0.5
