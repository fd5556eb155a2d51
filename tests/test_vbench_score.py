"""Totals of VBench against the formulas written out, and against the rows that were published."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

from mmalign.vbench.dimensions import DIMENSIONS, QUALITY, SEMANTIC
from mmalign.vbench.leaderboard import I2V_ROWS, ROWS, TRUST_ROWS, choose, find
from mmalign.vbench.score import (
    VBENCH2,
    i2v_totals,
    missing_words,
    normalise,
    quality,
    semantic,
    t2v_totals,
    total,
    vbench2_total,
)

# Lowest, highest, weight, once more and exactly, from the reference's scripts/constant.py.
CONSTANTS = {
    "subject_consistency": ("0.1462", "1", "1"),
    "background_consistency": ("0.2615", "1", "1"),
    "temporal_flickering": ("0.6293", "1", "1"),
    "motion_smoothness": ("0.706", "0.9975", "1"),
    "dynamic_degree": ("0", "1", "0.5"),
    "aesthetic_quality": ("0", "1", "1"),
    "imaging_quality": ("0", "1", "1"),
    "object_class": ("0", "1", "1"),
    "multiple_objects": ("0", "1", "1"),
    "human_action": ("0", "1", "1"),
    "color": ("0", "1", "1"),
    "spatial_relationship": ("0", "1", "1"),
    "scene": ("0", "0.8222", "1"),
    "appearance_style": ("0.0009", "0.2855", "1"),
    "temporal_style": ("0", "0.364", "1"),
    "overall_consistency": ("0", "0.364", "1"),
    "i2v_subject": ("0.1462", "1", "1"),
    "i2v_background": ("0.2615", "1", "1"),
    "camera_motion": ("0", "1", "0.1"),
}


def exact(scores: dict[str, float], names: list[str]) -> Fraction:
    """The weighted mean in rational arithmetic."""
    above = below = Fraction(0)
    for name in names:
        low, high, weight = map(Fraction, CONSTANTS[name])
        above += weight * (Fraction(str(scores[name])) - low) / (high - low)
        below += weight
    return above / below


@pytest.mark.parametrize("name", ROWS)
def test_rows_reproduce_their_totals(name: str) -> None:
    row = ROWS[name]
    found = t2v_totals(row.scores)
    q, s = exact(row.scores, list(QUALITY)), exact(row.scores, list(SEMANTIC))
    expected = {"quality": q, "semantic": s, "total": (4 * q + s) / 5}
    for part, figure in found.items():
        assert figure.value == pytest.approx(float(expected[part]), abs=1e-12)
        assert abs(figure.value - row.totals[part]) < 0.0002, "0.02 points of percent"
    assert not found["total"].missing and not found["total"].substitutes


def test_the_board_is_whole() -> None:
    assert len(ROWS) == 25 and sum(row.published for row in ROWS.values()) == 21
    assert {row.name for row in ROWS.values() if not row.published} == {
        "VideoCrafter-0.9", "VideoCrafter-1.0", "CogVideo", "Latte-1"}  # fmt: skip
    assert all(set(row.scores) == {*QUALITY, *SEMANTIC} and row.source for row in ROWS.values())
    assert len(I2V_ROWS) == 7 and "camera_motion" not in I2V_ROWS["SVD-XT-1.1"].scores
    assert len(TRUST_ROWS) == 6 and TRUST_ROWS["Show-1"].scores["skin_bias"] == 0.2061


def test_the_wrong_smoothness_of_cogvideox_is_told_by_its_quality() -> None:
    scores = dict(ROWS["CogVideoX-2B"].scores)
    assert 100 * quality(scores | {"motion_smoothness": 0.9902}).value == pytest.approx(82.86, abs=0.01)


def test_image_to_video() -> None:
    row = I2V_ROWS["DynamiCrafter-1024"]
    found = i2v_totals(row.scores)
    i2v = exact(row.scores, ["i2v_subject", "i2v_background", "camera_motion"])
    q = exact(row.scores, [name for name in QUALITY if name != "temporal_flickering"])
    assert found["i2v"].value == pytest.approx(float(i2v), abs=1e-12)
    assert found["i2v_quality"].value == pytest.approx(float(q), abs=1e-12)
    assert found["i2v_total"].value == pytest.approx(float((i2v + q) / 2), abs=1e-12)
    for part, expected in zip(("i2v", "i2v_quality", "i2v_total"), (92.54, 80.50, 86.52), strict=True):
        assert 100 * found[part].value == pytest.approx(expected, abs=0.01)
    without = i2v_totals(I2V_ROWS["SVD-XT-1.1"].scores)
    assert without["i2v"].value is None and without["i2v_total"].missing == ("camera_motion",)
    assert without["i2v_quality"].value is not None


def test_constants_are_those_of_the_reference() -> None:
    for name, (low, high, weight) in CONSTANTS.items():
        each = DIMENSIONS[name]
        assert (each.lowest, each.highest, each.weight) == (float(low), float(high), float(weight))


def test_a_missing_dimension_is_no_zero() -> None:
    scores = dict(ROWS["Kling"].scores)
    del scores["scene"]
    scores["subject_consistency"] = None
    found = t2v_totals(scores)
    assert found["quality"].value is None and found["quality"].missing == ("subject_consistency",)
    assert found["semantic"].value is None and found["semantic"].missing == ("scene",)
    assert found["total"].value is None and found["total"].missing == ("subject_consistency", "scene")
    zeros = scores | {"scene": 0.0, "subject_consistency": 0.0}
    for part, figure in t2v_totals(scores, rules="compat").items():
        assert figure.value == pytest.approx(t2v_totals(zeros)[part].value, abs=1e-15), "0 before it is normalised"
        assert figure.missing == found[part].missing, "and it is said"
    assert normalise("subject_consistency", 0.0) < 0


def test_what_is_missing_in_words() -> None:
    found = t2v_totals({name: 0.5 for name in QUALITY[1:]})
    assert missing_words("quality", found["quality"]) == "subject_consistency"
    assert missing_words("semantic", found["semantic"]) == "all dimensions"
    assert missing_words("quality", quality({name: 0.5 for name in QUALITY})) == ""
    assert missing_words("Creativity", vbench2_total({})["Creativity"]) == "all dimensions"


def test_substitutes_count_on_request_alone() -> None:
    scores = dict(ROWS["Kling"].scores)
    scores["color@clip"] = scores.pop("color")
    scores["scene[rules=strict]"] = 0.9
    assert total(scores).value is None and total(scores).missing == ("color",)
    found = total(scores, substitutes=True)
    assert found.substitutes == ("color@clip",), "scene has its own score"
    assert found.value == pytest.approx(total(ROWS["Kling"].scores).value, abs=1e-15)
    scores["color[rules=strict]"] = 0.1
    with pytest.raises(ValueError, match=r"color@clip, color\[rules=strict\] all stand for color"):
        semantic(scores, substitutes=True)


def test_normalise() -> None:
    assert normalise("scene", 0.8222) == 1.0 and normalise("motion_smoothness", 0.706) == 0.0
    assert normalise("scene", 0.9) > 1, "not clipped"
    with pytest.raises(ValueError, match="the nearest is color"):
        normalise("colour", 0.5)
    with pytest.raises(ValueError, match="color@clip stands for color and is not it"):
        normalise("color@clip", 0.5)
    with pytest.raises(ValueError, match="color: the score is nan"):
        normalise("color", float("nan"))
    with pytest.raises(ValueError, match="scene: the score is inf"):
        semantic({"scene": float("inf")})


def test_vbench2() -> None:
    names = [name for names in VBENCH2.values() for name in names]
    assert len(set(names)) == 18
    scores = {name: (number + 1) / 20 for number, name in enumerate(names)}
    found = vbench2_total(scores)
    means = [sum(scores[name] for name in group) / len(group) for group in VBENCH2.values()]
    assert [found[group].value for group in VBENCH2] == pytest.approx(means, abs=1e-15)
    assert found["total"].value == pytest.approx(sum(means) / 5, abs=1e-15)
    spaced = {name.replace("_", " "): value for name, value in scores.items()}
    assert vbench2_total(spaced) == found
    del scores["Human_Clothes"]
    assert vbench2_total(scores)["Human Fidelity"].value is None
    assert vbench2_total(scores)["total"].missing == ("Human_Clothes",)
    zero = vbench2_total(scores, rules="compat")
    assert zero["Human Fidelity"].value == pytest.approx((means[3] * 3 - (names.index("Human_Clothes") + 1) / 20) / 3)


def test_rows_by_name() -> None:
    assert find("wan2.1-14b").name == "Wan2.1-14B"
    with pytest.raises(ValueError, match=r"did you mean Kling\?"):
        find("Klnig")
    with pytest.raises(ValueError, match="there is one on i2v"):
        find("I2VGen-XL")
    with pytest.raises(ValueError, match="there are LaVie, ModelScope"):
        find("?", "trust")


def test_chosen_rows_are_the_best_and_the_nearest() -> None:
    best = [row.name for row in sorted(ROWS.values(), key=lambda row: -row.totals["total"])[:3]]
    near = dict(ROWS["Latte-1"].scores) | {"scene": 0.37}
    assert [row.name for row in choose(near)] == [*best, "Latte-1"]
    assert [row.name for row in choose({"i2v_subject": 0.9097, "camera_motion": None}, "i2v")][-1] == "VideoCrafter-I2V"
    assert [row.name for row in choose({"my_own": 0.5})] == best, "nothing in common, so nothing is near"
    assert [row.name for row in choose(near, names=["Gen-2", "kling", "Gen-2"])] == ["Gen-2", "Kling"]


def test_sources_name_papers() -> None:
    assert all(re.search(r"2411\.13503|paper|text", row.source) for row in ROWS.values())
