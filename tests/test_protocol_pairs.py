"""Protocols on pairs against the benchmarks' own loops, their baselines, and what is known of real files."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from protocol_kit import Group, acc_eq, credit, inversion_score, judged, listed_places, lists, strict_counts
from public_kit import IMAGE_REWARD, needs

from mmalign.jobs_bench import Counting
from mmalign.protocols import pairs
from mmalign.protocols.figures import protocol_figure
from mmalign.protocols.pairs import Judged, averages, expand


def figure(groups: list[Judged], protocol: str, average: pairs.Average = "macro", **options: object) -> dict:
    return protocol_figure(protocol, expand(groups).pairs, Counting.model_validate(options), average)


@pytest.mark.parametrize("seed", range(3))
def test_inversions_are_hpsv2s(seed: int) -> None:
    groups = lists(np.random.default_rng(seed), 40, level=0.5)
    found = figure(judged(groups), "hpdv2_inversions", hpdv2_ties="free")
    each = [inversion_score(*group) for group in groups]
    assert found["macro"]["mean"] == pytest.approx(np.mean(each)) and found["macro"]["n"] == 40
    pairs = [len(group[0]) * (len(group[0]) - 1) / 2 for group in groups]
    assert found["micro"]["mean"] == pytest.approx(np.average(each, weights=pairs))
    listed = figure(judged(groups), "hpdv2_inversions")
    assert listed["macro"]["mean"] == pytest.approx(np.mean([inversion_score(listed_places(s), r) for s, r in groups]))
    assert listed["macro"]["mean"] < found["macro"]["mean"]  # equal scores are no longer free


@pytest.mark.parametrize("seed", range(3))
def test_strict_pairs_are_imagerewards(seed: int) -> None:
    groups = lists(np.random.default_rng(seed), 40, level=0.5)
    counts = [strict_counts(*group) for group in groups]
    found = figure(judged(groups), "imagereward_macro")
    assert found["macro"]["mean"] == pytest.approx(np.mean([right / total for right, total in counts if total]))
    assert found["macro"]["n"] == sum(total > 0 for _, total in counts)
    assert found["micro"]["mean"] == pytest.approx(sum(right for right, _ in counts) / sum(n for _, n in counts))
    assert found["micro"]["mean"] != pytest.approx(found["macro"]["mean"], abs=1e-4)
    assert found["micro"]["n"] == sum(total for _, total in counts)


def test_level_scores_count_half_without_ties() -> None:
    groups = [Judged([1.0, 1.0], [2.0, 1.0], "p", 0), Judged([2.0, 1.0], [2.0, 1.0], "q", 1)]
    assert figure(groups, "no_ties")["micro"]["mean"] == 0.75
    assert figure(groups, "imagereward_micro")["micro"]["mean"] == 0.5
    assert figure(groups, "no_ties")["level_scores"] == 1


def test_known_baselines_of_inversions() -> None:
    """Finding 5: an all-tied group scores 1, and a random scorer 0.625 where ranks are drawn from four values."""
    rng = np.random.default_rng(0)
    groups = [(rng.normal(size=9).tolist(), rng.integers(1, 5, 9).astype(float).tolist()) for _ in range(4000)]
    baselines = figure(judged(groups), "hpdv2_inversions")["baselines"]
    assert baselines["random"]["exact"] and baselines["random"]["macro"] == pytest.approx(0.625, abs=0.003)
    seen = np.mean([inversion_score(*group) for group in groups])  # the scores are noise
    assert baselines["random"]["macro"] == pytest.approx(seen, abs=0.005)
    tied = [(scores, [1.0] * 9) for scores, _ in groups[:5]]
    assert figure(judged(tied), "hpdv2_inversions")["macro"]["mean"] == 1.0


@pytest.mark.parametrize("lift", [0.0, 2.0])
def test_all_ties_earn_the_order_of_the_list_by_hpsv2s_script(lift: float) -> None:
    """It ranks before it counts, so level scores stand as they are listed; only `hpdv2_ties: free` gives them 100."""
    rng = np.random.default_rng(3)
    groups = [
        (rng.normal(size=5).tolist(), np.round(rng.integers(1, 5, 5) - lift * np.arange(5) / 4).tolist())
        for _ in range(200)
    ]  # with a lift what is listed last is better, more often than not
    level = [([7.0] * 5, ranks) for _, ranks in groups]
    first = np.mean([inversion_score([5.0, 4.0, 3.0, 2.0, 1.0], ranks) for _, ranks in groups])
    last = np.mean([inversion_score([1.0, 2.0, 3.0, 4.0, 5.0], ranks) for _, ranks in groups])
    tested = figure(judged(level), "hpdv2_inversions")
    assert tested["macro"]["mean"] == pytest.approx(first) and tested["level_scores"] == len(groups) * 10
    for own in (level, groups):  # baselines are of the data, whatever is tested
        baselines = figure(judged(own), "hpdv2_inversions")["baselines"]
        assert baselines["all_tie"]["macro"] == pytest.approx(first)
        assert baselines["majority"]["macro"] == pytest.approx(max(first, last)) and max(first, last) < 1
        assert baselines["random"]["macro"] == pytest.approx((first + last) / 2)
    free = figure(judged(level), "hpdv2_inversions", hpdv2_ties="free")
    assert free["macro"]["mean"] == free["baselines"]["all_tie"]["macro"] == 1.0
    assert free["baselines"]["majority"]["macro"] == pytest.approx(max(first, last))


def test_all_tie_and_majority_are_scorers() -> None:
    """Each baseline is the figure of a scorer that answers so."""
    groups = lists(np.random.default_rng(5), 60)
    level = [([0.0] * len(scores), ranks) for scores, ranks in groups]
    first = [([-float(i) for i in range(len(scores))], ranks) for scores, ranks in groups]
    last = [([float(i) for i in range(len(scores))], ranks) for scores, ranks in groups]
    for protocol in ("hpdv2_inversions", "imagereward_macro", "no_ties", "ties_aware"):
        baselines = figure(judged(groups), protocol, simulations=2)["baselines"]
        constant = [figure(judged(each), protocol, simulations=2) for each in (level, first, last)]
        if protocol != "ties_aware":  # where first and last may be made ties by the fit
            for average in pairs.AVERAGES:
                assert baselines["all_tie"][average] == pytest.approx(constant[0][average]["mean"])
                assert baselines["majority"][average] == pytest.approx(max(one[average]["mean"] for one in constant))
                assert baselines["majority"][average] < 1
        else:
            ties = np.mean([r[i] == r[j] for _, r in groups for i in range(len(r)) for j in range(i)])
            assert baselines["all_tie"]["micro"] == pytest.approx(ties)


def test_a_random_scorer_is_simulated_where_something_is_fitted() -> None:
    groups = lists(np.random.default_rng(1), 80, values=3)
    baseline = figure(judged(groups), "ties_aware", "micro", simulations=30)["baselines"]["random"]
    rng = np.random.default_rng(99)
    noise = [
        figure(judged([(rng.normal(size=len(s)).tolist(), r) for s, r in groups]), "ties_aware", "micro", simulations=1)
        for _ in range(30)
    ]
    drawn = np.array([one["micro"]["mean"] for one in noise])
    assert not baseline["exact"] and baseline["simulations"] == 30 and baseline["micro_error"] > 0
    spread = 4 * np.hypot(baseline["micro_error"], drawn.std(ddof=1) / np.sqrt(30))
    assert abs(baseline["micro"] - drawn.mean()) < spread
    again = figure(judged(groups), "ties_aware", "micro", simulations=30)["baselines"]["random"]
    assert again == baseline  # seeded


def test_perfect_and_reversed() -> None:
    groups = [(scores, ranks) for scores, ranks in lists(np.random.default_rng(2), 30) if len(set(ranks)) > 1]
    perfect = [([-rank for rank in ranks], ranks) for _, ranks in groups]
    reverse = [(ranks, ranks) for _, ranks in groups]
    for protocol in ("imagereward_macro", "imagereward_micro", "no_ties"):
        assert figure(judged(perfect), protocol)["macro"]["mean"] == 1.0
        assert figure(judged(reverse), protocol)["micro"]["mean"] == 0.0
    assert figure(judged(perfect), "ties_aware", simulations=1)["macro"]["mean"] == 1.0
    assert figure(judged(perfect), "hpdv2_inversions")["macro"]["mean"] == 1.0


def macro_acc_eq(groups: list[Group], epsilon: float) -> float:
    """Deutsch et al. "group by item": the mean over groups of each one's acc_eq."""
    each = []
    for scores, ranks in groups:
        every = list(itertools.combinations(range(len(scores)), 2))
        d = [scores[i] - scores[j] for i, j in every]
        each.append(acc_eq(d, [float(np.sign(ranks[j] - ranks[i])) for i, j in every], epsilon))
    return float(np.mean(each))


def gaps(groups: list[Group]) -> list[float]:
    return sorted({0.0, *(abs(a - b) for scores, _ in groups for a, b in itertools.combinations(scores, 2))})


@pytest.mark.parametrize("level", [0.0, 0.5])
def test_ties_aware_is_fitted_by_group_and_on_the_other_half(level: float) -> None:
    groups = lists(np.random.default_rng(7), 40, values=3, level=level)
    best = max(macro_acc_eq(groups, epsilon) for epsilon in gaps(groups))
    same = figure(judged(groups), "ties_aware", fit="same", simulations=1)
    assert same["macro"]["mean"] == pytest.approx(best) == pytest.approx(same["fitted"][0]["accuracy_where_fitted"])
    half = pairs.halves(f"p{number}" for number in range(40))
    sides = [[group for number, group in enumerate(groups) if half[f"p{number}"] == side] for side in (True, False)]
    total = 0.0
    for fit, tried in (sides, sides[::-1]):
        values = [(round(macro_acc_eq(fit, epsilon), 12), -epsilon) for epsilon in gaps(fit)]
        total += macro_acc_eq(tried, -max(values)[1]) / 2  # the smallest of the best, halves of twenty each
    found = figure(judged(groups), "ties_aware", simulations=1)
    assert found["macro"]["mean"] == pytest.approx(total) and found["macro"]["mean"] < best


# ------------------------------------------------------------------------------------------------ Pick-a-Pic


def pick_a_pic(rng: np.random.Generator, count: int, validation: int = 0, ties: float = 0.2) -> list[Judged]:
    groups = []
    for number in range(count):
        d = rng.normal(0, 1.5)
        label = 0.0 if rng.random() < ties else float(np.sign(d + rng.normal()))
        human = {1.0: (1.0, 0.0), -1.0: (0.0, 1.0), 0.0: (0.0, 0.0)}[label]
        groups.append(Judged([d, 0.0], human, f"p{number}", number, number < validation))
    return groups


def picked(groups: list[Judged], threshold: float, scale: float = 1.0) -> float:
    """The loop of PickScore's evaluation at one threshold."""
    total = 0.0
    for one in groups:
        p = 1 / (1 + np.exp(-scale * (one.scores[0] - one.scores[1])))
        said = "tie" if abs((1 - p) - p) <= threshold else "0" if p > 0.5 else "1"
        label = "tie" if one.human[0] == one.human[1] else "0" if one.human[0] > one.human[1] else "1"
        total += credit(label, said)
    return total / len(groups)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_tie_credit_with_a_threshold_from_the_validation_split(scale: float) -> None:
    groups = pick_a_pic(np.random.default_rng(0), 300, validation=150)
    found = figure(groups, "pickapic_tiecredit", "micro", choice_scale=scale, simulations=2)
    grid = [n / 10 for n in range(11)]
    chosen = grid[int(np.argmax([picked(groups[:150], t, scale) for t in grid]))]
    assert found["fitted"][0]["threshold"] == chosen and found["fit"] == "validation split"
    assert found["micro"]["mean"] == pytest.approx(picked(groups[150:], chosen, scale)) and found["micro"]["n"] == 150


def test_tie_credit_fitted_on_itself_and_its_baselines() -> None:
    groups = pick_a_pic(np.random.default_rng(1), 400, ties=0.5)
    same = figure(groups, "pickapic_tiecredit", "micro", fit="same", simulations=40)
    assert same["micro"]["mean"] == pytest.approx(max(picked(groups, n / 10) for n in range(11)))
    ties = np.mean([one.human[0] == one.human[1] for one in groups])
    assert same["baselines"]["all_tie"]["micro"] == pytest.approx(ties + (1 - ties) / 2)
    # The authors' closed form at threshold t is ties (1 + t) / 2 + (1 - ties) / 2, so the best is at t = 1: all ties.
    assert same["baselines"]["random"]["micro"] == pytest.approx(ties + (1 - ties) / 2, abs=0.01)
    assert same["fit"] == "same" and same["fitted"][0]["accuracy_where_fitted"] == pytest.approx(same["micro"]["mean"])


def test_the_scale_of_choices_can_be_fitted() -> None:
    """Scores in other units earn the same, once their scale is fitted."""
    groups = pick_a_pic(np.random.default_rng(2), 300, validation=150)
    small = [one._replace(scores=[s / 250 for s in one.scores]) for one in groups]
    ours, theirs = (figure(each, "pickapic_tiecredit", choice_scale="fit", simulations=1) for each in (groups, small))
    assert ours["micro"] == pytest.approx(theirs["micro"])
    assert theirs["fitted"][0]["scale"] == pytest.approx(250 * ours["fitted"][0]["scale"], rel=1e-6)


# ------------------------------------------------------------------------------------------------ VideoGen


def clips(rng: np.random.Generator, count: int, ties: float, skill: float = 0.0) -> list[Judged]:
    groups = []
    for number in range(count):
        label = 0.0 if rng.random() < ties else float(rng.choice([-1.0, 1.0]))
        scores = [rng.normal() + skill * label, rng.normal()]
        human = {1.0: (1.0, 0.0), -1.0: (0.0, 1.0), 0.0: (0.0, 0.0)}[label]
        groups.append(Judged(scores, human, f"p{number // 3}", f"p{number // 3}"))
    return groups


def test_a_random_scorer_with_ties_is_as_good_as_all_ties() -> None:
    """Finding 9: 59 per cent of ties make a random scorer's "accuracy with ties" 59."""
    groups = clips(np.random.default_rng(0), 3000, ties=0.59)
    with_ties = figure(groups, "videogen_with_ties", "micro", simulations=5)
    assert with_ties["micro"]["mean"] == pytest.approx(0.59, abs=0.02)
    assert with_ties["baselines"]["all_tie"]["micro"] == pytest.approx(0.59, abs=0.02)
    assert with_ties["baselines"]["majority"] == with_ties["baselines"]["all_tie"]
    assert with_ties["baselines"]["random"]["micro"] == pytest.approx(0.59, abs=0.02)
    without = figure(groups, "videogen_without_ties", "micro")
    assert without["micro"]["mean"] == pytest.approx(0.5, abs=0.04)
    assert without["baselines"]["random"]["micro"] == 0.5 and without["baselines"]["all_tie"]["micro"] == 0.0


def test_unknown_labels_are_left_out_or_wrong() -> None:
    nan = float("nan")
    groups = [*clips(np.random.default_rng(1), 40, 0.3, 1.0), Judged([1.0, 0.0], (nan, nan), "p1", "p1")]
    pairs = expand(groups).pairs
    human, d = pairs.human, pairs.difference
    for protocol in ("videogen_with_ties", "videogen_without_ties"):
        left, wrong = (
            figure(groups, protocol, "micro", unknown_labels=how, simulations=1) for how in ("leave_out", "wrong")
        )
        assert wrong["micro"]["n"] == left["micro"]["n"] + 1
        assert wrong["micro"]["mean"] < left["micro"]["mean"]
    right = int((human * d > 0).sum())
    assert figure(groups, "videogen_without_ties", "micro", unknown_labels="wrong")["micro"]["mean"] == pytest.approx(
        right / int((human != 0).sum())
    )


# ------------------------------------------------------------------------------------------------ averages and folds


def test_intervals_are_by_prompt() -> None:
    """Forty pairs that always agree within a prompt tell no more than its prompt does."""
    rng = np.random.default_rng(3)
    good = rng.random(12) < 0.6
    together = [
        Judged([1.0, 0.0] if good[p] else [0.0, 1.0], (1.0, 0.0), f"prompt {p}", f"prompt {p}")
        for p in range(12)
        for _ in range(40)
    ]
    apart = [one._replace(prompt=f"{one.prompt} {number}") for number, one in enumerate(together)]
    wide, narrow = (figure(each, "no_ties", "micro")["micro"] for each in (together, apart))
    assert wide["mean"] == narrow["mean"]
    assert wide["high"] - wide["low"] > 4 * (narrow["high"] - narrow["low"])


def test_the_order_of_groups_changes_nothing() -> None:
    rng = np.random.default_rng(4)
    groups = judged(lists(rng, 50, level=0.5), lambda number: f"prompt {number % 30}")
    other = [groups[i] for i in rng.permutation(len(groups))]
    for protocol in ("hpdv2_inversions", "imagereward_micro", "ties_aware", "no_ties"):
        ours, theirs = (figure(each, protocol, simulations=1) for each in (groups, other))
        for name in pairs.AVERAGES:
            assert theirs[name] == pytest.approx(ours[name], abs=1e-12)
        assert [one["epsilon"] for one in theirs["fitted"] if "epsilon" in one] == [
            one["epsilon"] for one in ours["fitted"] if "epsilon" in one
        ]


def test_which_of_two_is_first_changes_nothing() -> None:
    groups = clips(np.random.default_rng(5), 200, 0.3, 0.5)
    turned = [
        one._replace(scores=one.scores[::-1], human=one.human[::-1]) if number % 2 else one
        for number, one in enumerate(groups)
    ]
    for protocol in ("videogen_without_ties", "videogen_with_ties", "ties_aware", "no_ties"):
        ours, theirs = (figure(each, protocol, simulations=1) for each in (groups, turned))
        assert theirs["micro"] == pytest.approx(ours["micro"])


def test_halves_part_prompts_evenly_whatever_their_order() -> None:
    prompts = [f"prompt {n}" for n in range(31)]
    half = pairs.halves(prompts)
    assert sum(half.values()) == 15 and half == pairs.halves(reversed(prompts + prompts))


def test_folds() -> None:
    found = expand(clips(np.random.default_rng(6), 60, 0.3)).pairs
    (first, second), how = pairs.folds(found, "held_out")
    assert how == "held-out halves, crosswise"
    assert (first.fit == second.tried).all() and (first.fit ^ first.tried).all()
    held = {prompt for prompt, tried in zip(found.prompts, first.tried, strict=True) if tried}
    assert not held & {prompt for prompt, fit in zip(found.prompts, first.fit, strict=True) if fit}
    with pytest.raises(ValueError, match="no half can be held out"):
        pairs.folds(replace(found, prompt=("p",) * len(found.prompt)), "held_out")
    with pytest.raises(ValueError, match="no group"):
        expand([])


def test_pairs_without_two_scores_are_counted() -> None:
    groups = [Judged([1.0, float("nan"), 3.0], [3.0, 2.0, 1.0], "p", 0), Judged([1.0, 2.0], [1.0, 2.0], "q", 1)]
    found = expand(groups)
    assert len(found.pairs) == 2 and found.unscored == 2
    macro = averages(pairs.decided(found.pairs.human, np.sign(found.pairs.difference)), found.pairs)["macro"]
    assert (macro["mean"], macro["n"]) == (0.5, 2)


# ------------------------------------------------------------------------------------------------ the real file


@needs(IMAGE_REWARD)
def test_imagereward_as_published() -> None:
    rows = json.loads(IMAGE_REWARD.read_text())
    rng = np.random.default_rng(0)
    groups = [(rng.normal(size=len(row["ranking"])).tolist(), row["ranking"]) for row in rows]
    found = expand(judged(groups, lambda number: rows[number]["prompt"]))
    assert len(rows) == 466 and found.pairs.slots == 2720 and len(found.pairs) == 7230
    assert int((found.pairs.human == 0).sum()) == 831
    for protocol in ("imagereward_macro", "imagereward_micro"):
        one = protocol_figure(protocol, found.pairs, Counting(), "macro")
        assert (one["micro"]["n"], one["macro"]["n"]) == (6399, 466)
        counts = [strict_counts(*group) for group in groups]
        assert one["micro"]["mean"] == pytest.approx(sum(right for right, _ in counts) / 6399)
        assert one["macro"]["mean"] == pytest.approx(np.mean([right / total for right, total in counts]))
        # The file lists better pictures first more often than not: "the first wins" is right in 59 per cent.
        assert one["baselines"]["majority"]["micro"] == pytest.approx(0.590, abs=5e-4)
