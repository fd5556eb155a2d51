"""Scores of dimensions and totals from those of clips: the reference's rules, intervals, bounds, policies."""

from __future__ import annotations

import numpy as np
import pytest

from mmalign.stats import bootstrap_ratio, mean_ci
from mmalign.vbench.aggregate import ClipScore, Mean, dimension_mean, static_only, total_ends
from mmalign.vbench.dimensions import DIMENSIONS, QUALITY, SEMANTIC
from mmalign.vbench.score import t2v_totals


def clips(values, prompts=None, counts=None, **columns) -> list[ClipScore]:
    """One clip per value; None has no score."""
    return [
        ClipScore(
            f"s{number}",
            prompts[number] if prompts else f"p{number}",
            f"/clips/s{number}.mp4",
            value,
            {} if counts is None else counts[number],
            None if value is not None else "broken",
            **columns,
        )
        for number, value in enumerate(values)
    ]


def random_clips(seed: int, prompts: int = 20, each: int = 5, name: str = "pairs") -> list[ClipScore]:
    rng = np.random.default_rng(seed)
    values = rng.random((prompts, each)) * 0.2 + rng.random((prompts, 1)) * 0.8
    labels = [f"p{number}" for number in range(prompts) for _ in range(each)]
    return clips(values.ravel().tolist(), labels, [{name: float(n)} for n in rng.integers(1, 40, values.size)])


def test_consistency_is_weighted_by_pairs_as_on_one_gpu_and_strict_is_not() -> None:
    held = random_clips(0)
    values = np.array([clip.value for clip in held])
    pairs = np.array([clip.counts["pairs"] for clip in held])
    for name in ("subject_consistency", "background_consistency"):
        assert dimension_mean(name, held).score == pytest.approx((values * pairs).sum() / pairs.sum(), abs=1e-14)
        assert dimension_mean(name, held, rules="strict").score == pytest.approx(values.mean(), abs=1e-14)
    assert dimension_mean("motion_smoothness", held).score == pytest.approx(values.mean(), abs=1e-14)
    style = random_clips(1, name="frames")
    values, frames = (np.array(each) for each in zip(*((c.value, c.counts["frames"]) for c in style), strict=True))
    assert dimension_mean("appearance_style", style).score == pytest.approx((values * frames).sum() / frames.sum())


def test_imaging_quality_is_divided_by_100() -> None:
    mean = dimension_mean("imaging_quality", clips([60.0, 80.0, None]), policy="skip", limits=(0.0, 100.0))
    assert mean.score == pytest.approx(0.7) and mean.bounds == pytest.approx((1.4 / 3, 2.4 / 3))
    assert mean.ci95 is not None and mean.ci95[0] < 0.7 < mean.ci95[1]


def test_a_colour_without_its_object_is_in_no_mean() -> None:
    held = clips([0.5, 0.0, 1.0], counts=[{"frames": 8.0}, {"frames": 0.0}, {"frames": 2.0}])
    mean = dimension_mean("color", held)
    assert mean.score == pytest.approx(0.75) and mean.unjudged == 1
    assert dimension_mean("human_action", held).score == pytest.approx(0.5), "of color alone"
    weighted = dimension_mean("object_class", held)
    assert weighted.score == pytest.approx((0.5 * 8 + 2) / 10) and weighted.unjudged == 1, "no weight is no clip"
    assert dimension_mean("color", clips([0.0], counts=[{"frames": 0.0}])) == Mean(None, unjudged=1)


def test_what_becomes_of_clips_without_a_score() -> None:
    held = clips([0.8, None, 0.6, None])
    error, skip, zero = (dimension_mean("human_action", held, policy=policy) for policy in ("error", "skip", "zero"))
    assert error.score is None and error.ci95 is None
    assert skip.score == pytest.approx(0.7) and zero.score == pytest.approx(0.35)
    for mean in (error, skip, zero):
        assert mean.bounds == pytest.approx((0.35, 0.85)), "the same, whatever becomes of them"
    whole = dimension_mean("human_action", clips([0.8, 0.6]))
    assert whole.bounds == (whole.score, whole.score)


def test_weights_of_clips_without_a_score_are_the_mean_weight() -> None:
    held = clips([0.9, 0.5, None], counts=[{"pairs": 10.0}, {"pairs": 30.0}, {}])
    assert dimension_mean("subject_consistency", held, policy="zero").score == pytest.approx((9 + 15) / 60)
    low, high = dimension_mean("subject_consistency", held, policy="skip").bounds or (0, 0)
    assert (low, high) == pytest.approx((24 / 60, 44 / 60))


def test_zero_is_the_lowest_score_where_0_is_none() -> None:
    held = clips([0.2, None])
    zero = dimension_mean("temporal_style", held, policy="zero", limits=(-1.0, 1.0))
    assert zero.score == pytest.approx(0.1) and zero.bounds == pytest.approx((-0.4, 0.6))
    assert dimension_mean("temporal_style", clips([3.0, None]), policy="zero", limits=(1.0, 5.0)).score == 2.0
    assert dimension_mean("temporal_style", held, policy="skip", limits=(None, 1.0)).bounds is None


def test_no_clip_has_a_score() -> None:
    assert dimension_mean("scene", clips([None, None]), policy="skip") == Mean(None)
    assert dimension_mean("scene", []) == Mean(None)


def test_intervals_are_clustered_by_prompt() -> None:
    held = random_clips(3)
    alone = [ClipScore(f"s{n}", f"q{n}", clip.path, clip.value) for n, clip in enumerate(held)]
    wide, narrow = (dimension_mean("motion_smoothness", each).ci95 for each in (held, alone))
    assert wide is not None and narrow is not None
    assert np.ptp(wide) > 1.4 * np.ptp(narrow)
    usual = mean_ci([float(clip.value or 0) for clip in held], [clip.prompt for clip in held])
    assert wide == pytest.approx((usual.low, usual.high), abs=0.02), "as of any other score"
    assert dimension_mean("scene", clips([0.1, 0.9], ["p", "p"])).ci95 is None, "one prompt says nothing of the spread"


def test_the_bootstrap_is_that_of_a_slow_one() -> None:
    values, weights, labels = [0.1, 0.5, 0.9, 0.3], [1.0, 2.0, 1.0, 4.0], ["b", "a", "b", "c"]
    drawn = bootstrap_ratio(values, weights, labels, seed=7, samples=100)
    rng = np.random.default_rng(7)
    of = {label: [place for place, each in enumerate(labels) if each == label] for label in "abc"}
    for found, chosen in zip(drawn, rng.integers(0, 3, size=(100, 3)), strict=True):
        places = [place for number in chosen for place in of["abc"[number]]]
        total = sum(values[place] * weights[place] for place in places)
        assert found == pytest.approx(total / sum(weights[place] for place in places), abs=1e-12)
    with pytest.raises(ValueError, match="above 0"):
        bootstrap_ratio([0.1], [0.0], ["a"])


def test_order_of_clips_changes_nothing() -> None:
    held = random_clips(4)
    mixed = [held[place] for place in np.random.default_rng(0).permutation(len(held))]
    first, second = dimension_mean("subject_consistency", held), dimension_mean("subject_consistency", mixed)
    assert first.score == pytest.approx(second.score, abs=1e-14) and first.ci95 == pytest.approx(second.ci95, abs=1e-12)


def all_means() -> dict[str, Mean]:
    return {
        name: dimension_mean(name, [
            ClipScore(c.sample, f"{DIMENSIONS[name].group}{c.prompt}", "", (c.value or 0) * DIMENSIONS[name].divisor)
            for c in random_clips(number)
        ]) for number, name in enumerate((*QUALITY, *SEMANTIC))
    }  # fmt: skip


def test_totals_have_intervals_and_bounds_of_their_formula() -> None:
    means = all_means()
    figures = total_ends(means, t2v_totals)
    plain = t2v_totals({name: mean.score for name, mean in means.items()})
    assert {name: figure.value for name, figure in figures.items()} == {n: f.value for n, f in plain.items()}
    # The formula once more, on each replicate.
    replicates = {name: mean.replicates for name, mean in means.items()}
    scaled = {
        name: (drawn - DIMENSIONS[name].lowest) / (DIMENSIONS[name].highest - DIMENSIONS[name].lowest)
        for name, drawn in replicates.items()
    }
    quality = sum(scaled[name] * DIMENSIONS[name].weight for name in QUALITY) / 6.5
    semantic = sum(scaled[name] for name in SEMANTIC) / 9
    for name, drawn in {"quality": quality, "semantic": semantic, "total": (4 * quality + semantic) / 5}.items():
        figure = figures[name]
        assert figure.ci95 is not None and figure.bounds == pytest.approx((figure.value, figure.value))
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert figure.ci95[0] <= low < figure.value < high <= figure.ci95[1], "a little wider: 20 prompts"
        assert np.ptp(figure.ci95) < 1.3 * (high - low)


def test_dimensions_of_the_same_prompts_are_drawn_together() -> None:
    """Twice the same dimension: their mean is as uncertain as one of them, not less."""
    one, two = (dimension_mean(name, random_clips(5)) for name in ("motion_smoothness", "dynamic_degree"))
    other = dimension_mean("scene", [ClipScore(c.sample, f"x{c.prompt}", c.path, c.value) for c in random_clips(5)])
    assert one.replicates is not None and two.replicates is not None and other.replicates is not None
    np.testing.assert_allclose(one.replicates, two.replicates, atol=1e-12)
    assert abs(np.corrcoef(one.replicates, other.replicates)[0, 1]) < 0.1


def test_bounds_of_a_total_are_those_of_its_dimensions() -> None:
    means = all_means()
    held = random_clips(0)
    broken = [*held[:-10], *clips([None] * 10, [f"quality{clip.prompt}" for clip in held[-10:]])]
    means["subject_consistency"] = dimension_mean("subject_consistency", broken, policy="skip")
    figures = total_ends(means, t2v_totals)
    low, high = means["subject_consistency"].bounds or (0, 0)
    assert high > low and figures["quality"].bounds is not None
    assert np.ptp(figures["quality"].bounds) == pytest.approx((high - low) / (1 - 0.1462) / 6.5)
    assert np.ptp(figures["total"].bounds or (0, 0)) == pytest.approx((high - low) / (1 - 0.1462) / 6.5 * 0.8)


def test_a_total_that_lacks_a_dimension_has_no_value() -> None:
    means = all_means()
    means["scene"] = Mean(None)
    figures = total_ends(means, t2v_totals)
    assert figures["quality"].value is not None and figures["quality"].ci95 is not None
    assert figures["semantic"].value is None and figures["semantic"].missing == ("scene",)
    assert figures["total"].value is None and figures["total"].ci95 is None


def test_the_static_filter_takes_the_first_five_by_name() -> None:
    """`-10` stands before `-2`, as in a sorted listing of the folder."""
    held = [ClipScore(f"a-{n}", "a", f"/clips/a-{n}.mp4", n / 100) for n in range(12)]
    static: dict[str, float | None] = {f"a-{n}": float(n not in (0, 3)) for n in range(12)}
    assert [clip.sample for clip in static_only(held, static, 5)] == ["a-1", "a-10", "a-11", "a-2", "a-4"]
    static["a-10"] = None
    left = static_only(held, static, 5)
    assert [clip.sample for clip in left] == ["a-1", "a-10", "a-11", "a-2", "a-4"]
    assert left[1].value is None and "static filter" in str(left[1].reason)
    assert static_only(held, {f"a-{n}": 0.0 for n in range(12)}, 5) == []


def test_intervals_of_totals_cover_the_truth_as_often_as_they_say() -> None:
    """200 drawn benchmarks of ten prompts, with effects of prompts that dimensions of one suite share."""
    shared = {"motion_smoothness": "subject_consistency", "dynamic_degree": "subject_consistency"}
    shared |= {"aesthetic_quality": "overall_consistency", "imaging_quality": "overall_consistency"}
    rng = np.random.default_rng(7)
    truth = t2v_totals(dict.fromkeys((*QUALITY, *SEMANTIC), 0.5))
    hits = dict.fromkeys(truth, 0)
    for _ in range(200):
        effects: dict[str, np.ndarray] = {}
        means = {}
        for name in (*QUALITY, *SEMANTIC):
            suite = shared.get(name, name)
            effect = effects.setdefault(suite, 0.1 * rng.normal(size=10))
            values = 0.5 + np.repeat(effect, 3) + 0.08 * rng.normal(size=30)
            prompts = [f"{suite} {number // 3}" for number in range(30)]
            counts = [{"pairs": float(n), "frames": float(n)} for n in rng.integers(8, 40, 30)]
            held = clips((values * DIMENSIONS[name].divisor).tolist(), prompts, counts)
            means[name] = dimension_mean(name, held, limits=(None, None))
        for total, figure in total_ends(means, t2v_totals).items():
            low, high = figure.ci95 or (1.0, 0.0)
            hits[total] += low <= (truth[total].value or 0.0) <= high
    assert all(0.90 <= hit / 200 <= 0.995 for hit in hits.values()), hits
