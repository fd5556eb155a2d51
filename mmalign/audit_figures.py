"""The figures of an audit, each a pure function of judgements; every share has its n and a 95 % interval by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmalign.agreement import alpha, calibration, mean_entry, share_entry
from mmalign.audit_table import PROPERTIES, Judgement, Key
from mmalign.records import MediaRef

Unit = list[tuple[str | None, float]]


def ties(given: Sequence[Judgement]) -> dict[str, Any]:
    """Share of judgements that are ties."""
    return share_entry([float(each.answer == 0.5) for each in given], [each.prompt for each in given])


def position(given: Sequence[Judgement]) -> dict[str, Any]:
    """How often the first of two was preferred, ties left out; 1/2 if it does not matter which side one stands on."""
    kept = [each for each in given if each.sided and each.answer != 0.5]
    return share_entry([each.answer for each in kept], [each.prompt for each in kept])


def by_people(given: Sequence[Judgement]) -> list[Judgement]:
    """The judgements without those that are a ranking by rewards."""
    return [each for each in given if not each.by_rewards]


def units(given: Sequence[Judgement]) -> dict[tuple[str, MediaRef, MediaRef], Unit]:
    """Pair -> (person, answer for its first) of everybody who judged it; of one person the first answer counts.

    Rows without a user are each somebody else's. Rewards are nobody, and are left out.
    """
    found: dict[tuple[str, MediaRef, MediaRef], Unit] = {}
    for each in by_people(given):
        unit = found.setdefault(each.pair, [])
        if each.user is None or all(user != each.user for user, _ in unit):
            unit.append((each.user, each.oriented))
    return found


def annotators(by_pair: Mapping[tuple[str, MediaRef, MediaRef], Unit]) -> dict[str, Any]:
    """Agreement on pairs that several people judged: Krippendorff's alpha, and the share of people's pairs agreeing."""
    shared = {pair: [answer for _, answer in unit] for pair, unit in by_pair.items() if len(unit) > 1}
    prompts = [pair[0] for pair in shared]
    agreed = []
    for answers in shared.values():
        counts = np.array([answers.count(value) for value in set(answers)])
        agreed.append(float((counts * (counts - 1)).sum() / (len(answers) * (len(answers) - 1))))
    krippendorff = alpha(list(shared.values()), prompts, mirrored=True)  # files' names say which is first
    return {"krippendorff": krippendorff, "agree": share_entry(agreed, prompts)}


def people(
    given: Sequence[Judgement], by_pair: Mapping[tuple[str, MediaRef, MediaRef], Unit]
) -> dict[str, dict[str, Any]]:
    """Per user, the busiest first: judgements, ties, how often the first side, agreement with the others' majority.

    The majority is that of all others on the same pair, without the user's own answer; pairs on which the others are
    undecided do not count, and a tie against a majority counts half.
    """
    own: dict[str, list[Judgement]] = {}
    for each in given:
        if each.user is not None:
            own.setdefault(each.user, []).append(each)
    with_others: dict[str, tuple[list[float], list[str]]] = {user: ([], []) for user in own}
    for pair, unit in by_pair.items():
        leaning = sum(answer - 0.5 for _, answer in unit)
        for user, answer in unit:
            others = leaning - (answer - 0.5)
            if user is not None and others != 0:
                values, prompts = with_others[user]
                values.append(answer if others > 0 else 1 - answer)
                prompts.append(pair[0])
    return {
        user: {
            "n": len(mine),
            "ties": ties(mine),
            "first": position(mine),
            "with_majority": share_entry(*with_others[user]),
        }
        for user, mine in sorted(own.items(), key=lambda item: (-len(item[1]), item[0]))
    }


def reward(given: Sequence[Judgement], scores: Mapping[Key, float]) -> dict[str, Any]:
    """How far a score agrees with the judgements.

    Returns:
        n judgements of which both media have a score, and how many have not; accuracy, the share of decided ones that
        the score decides alike (level scores count half); calibration of P(A > B), fitted and tried on halves of the
        prompts, so that no prompt is in both.
    """
    kept = [each for each in given if (each.prompt, each.a) in scores and (each.prompt, each.b) in scores]
    difference = np.array([scores[each.prompt, each.a] - scores[each.prompt, each.b] for each in kept])
    answer = np.array([each.answer for each in kept])
    decided = answer != 0.5
    prompts = [each.prompt for each in kept]
    right = (1 + np.sign(difference) * np.sign(answer - 0.5)) / 2
    return {
        "n": len(kept),
        "missing": len(given) - len(kept),
        "accuracy": share_entry(right[decided], [p for p, keep in zip(prompts, decided, strict=True) if keep]),
        "level": share_entry(difference == 0, prompts),
        "calibration": calibration(difference, answer, prompts, held_out(prompts)) if kept else None,
    }


def held_out(prompts: Sequence[str]) -> npt.NDArray[np.bool_]:
    """[n] True for the half of the prompts on which calibration is tried, by the prompt's own hash."""
    half = {prompt: bool(hashlib.sha256(prompt.encode()).digest()[0] % 2) for prompt in set(prompts)}
    return np.array([half[prompt] for prompt in prompts], dtype=bool)


def biases(given: Sequence[Judgement], seen: Mapping[MediaRef, Mapping[str, float]]) -> dict[str, Any]:
    """Per property: winner minus loser, and how often the one with more of it won; ties are left out.

    A share away from 1/2 is not yet a fault: people may like what is bright. It says what a model will learn.
    """
    kept = [each for each in given if each.answer != 0.5 and each.a in seen and each.b in seen]
    result = {}
    for name in PROPERTIES:
        both = [each for each in kept if name in seen[each.a] and name in seen[each.b]]
        if not both:
            continue
        prompts = [each.prompt for each in both]
        values = np.array([(seen[each.a][name], seen[each.b][name]) for each in both])
        answers = np.array([each.answer for each in both])
        ahead = (values[:, 0] - values[:, 1]) * (2 * answers - 1)
        differ = ahead != 0
        clusters = [prompt for prompt, keep in zip(prompts, differ, strict=True) if keep]
        result[name] = {
            "difference": mean_entry(ahead, prompts),
            "more_wins": share_entry((ahead > 0)[differ], clusters),
        }
    return result


def by_prompt_length(given: Sequence[Judgement], rewards: Mapping[str, Mapping[Key, float]]) -> list[dict[str, Any]]:
    """Ties, and the accuracy of each score, for the shorter and the longer prompts (in words, parted at the median)."""
    lengths = np.array([len(each.prompt.split()) for each in given])
    middle = float(np.median(lengths))
    halves = []
    for name, inside in ((f"up to {middle:g} words", lengths <= middle), (f"over {middle:g} words", lengths > middle)):
        members = [each for each, keep in zip(given, inside, strict=True) if keep]
        accuracy = {label: _accuracy(members, scores) for label, scores in rewards.items()}
        halves.append({"prompts": name, "n": len(members), "ties": ties(members), "accuracy": accuracy})
    return halves


def _accuracy(given: Sequence[Judgement], scores: Mapping[Key, float]) -> dict[str, Any]:
    values, prompts = [], []
    for each in given:
        a, b = scores.get((each.prompt, each.a)), scores.get((each.prompt, each.b))
        if each.answer != 0.5 and a is not None and b is not None:
            values.append((1 + float(np.sign(a - b)) * (2 * each.answer - 1)) / 2)
            prompts.append(each.prompt)
    return share_entry(values, prompts)
