"""`mmalign prefer audit`: each figure against an independent computation, and the verb from end to end."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_kit import judged, rounded
from prefer_kit import answer, config, questions, table
from public_kit import IMAGE_REWARD, needs
from scipy.optimize import minimize_scalar

from mmalign import agreement, audit, cli, prefer, routing
from mmalign import audit_figures as figures
from mmalign.audit_table import judgements, look
from mmalign.jobs import EvaluatorSpec
from mmalign.media import read_image, write_image
from mmalign.records import MediaRef
from mmalign.shapes.data import judged_groups
from mmalign.tables import PreferenceRow, write_preferences

RNG = np.random.default_rng(11)


pytestmark = pytest.mark.usefixtures("colour_evaluators")


# ------------------------------------------------------------------------------------------------ calibration


def simulated(n: int, slope: float, ties: float = 0.0) -> tuple[np.ndarray, np.ndarray, list[str]]:
    difference = RNG.normal(0, 2, n)
    answer = (RNG.random(n) < 1 / (1 + np.exp(-slope * difference))).astype(float)
    answer[RNG.random(n) < ties] = 0.5
    return difference, answer, [f"prompt {i // 2}" for i in range(n)]


@pytest.mark.parametrize(("slope", "ties"), [(0.3, 0.0), (1.0, 0.2), (4.0, 0.0)])
def test_the_temperature_is_the_likeliest(slope: float, ties: float) -> None:
    difference, answer, _ = simulated(400, slope, ties)

    def nll(s: float) -> float:
        x = s * difference
        return float(np.mean(answer * np.log1p(np.exp(-x)) + (1 - answer) * np.log1p(np.exp(x))))

    expected = minimize_scalar(nll, bounds=(0, 10), method="bounded", options={"xatol": 1e-9}).x
    assert agreement.fit_slope(difference, answer) == pytest.approx(expected, rel=1e-4)
    for unit in (1e-200, 1e200):
        assert agreement.fit_slope(difference * unit, answer) * unit == pytest.approx(expected, rel=1e-4)


def test_a_true_probability_is_calibrated() -> None:
    difference, answer, prompts = simulated(6000, 0.7)
    found = agreement.calibration(difference, answer, prompts, figures.held_out(prompts))
    assert found is not None
    assert found["temperature"] == pytest.approx(1 / 0.7, rel=0.1) and found["ece"] < 0.03
    assert found["fitted_on"] + found["nll"]["n"] == 6000 and 2400 < found["fitted_on"] < 3600
    assert sum(each["won"]["n"] for each in found["bins"]) == found["nll"]["n"]
    for each in found["bins"]:
        assert each["from"] <= each["predicted"] <= each["to"]
        assert each["won"]["low"] - 0.02 < each["predicted"] < each["won"]["high"] + 0.02


def test_figures_of_calibration_are_their_definitions() -> None:
    difference, answer, prompts = simulated(300, 1.0, 0.1)
    held = figures.held_out(prompts)
    found = agreement.calibration(difference, answer, prompts, held)
    assert found is not None
    p = 1 / (1 + np.exp(-difference[held] / found["temperature"]))
    y = answer[held]
    assert found["nll"]["mean"] == pytest.approx(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))
    assert found["brier"]["mean"] == pytest.approx(np.mean((p - y) ** 2))
    favoured, won = np.maximum(p, 1 - p), np.where(p > 0.5, y, 1 - y)
    place = np.minimum(((favoured - 0.5) * 10).astype(int), 4)
    gaps = [abs(favoured[place == b].mean() - won[place == b].mean()) * (place == b).mean() for b in set(place)]
    assert found["ece"] == pytest.approx(sum(gaps))


def test_which_side_is_a_changes_nothing() -> None:
    """Some data sets write the winner first; turning any pair round leaves every figure as it is."""
    difference, answer, prompts = simulated(200, 1.0)
    held = figures.held_out(prompts)
    turn = np.where(answer == 1, 1.0, -1.0)
    ours = agreement.calibration(difference, answer, prompts, held)
    theirs = agreement.calibration(difference * turn, np.ones(200), prompts, held)
    assert rounded(ours) == rounded(theirs)


def test_scores_that_know_nothing_or_everything() -> None:
    difference, answer, prompts = simulated(200, 1.0)
    held = figures.held_out(prompts)
    against = agreement.calibration(-difference, answer, prompts, held)
    assert against is not None and against["temperature"] is None
    assert against["nll"]["mean"] == pytest.approx(math.log(2)) and against["brier"]["mean"] == pytest.approx(0.25)
    assert against["ece"] == 0 and against["bins"][0]["won"]["share"] == 0.5, "at slope 0 nobody is favoured"
    perfect = agreement.calibration(difference, (difference > 0).astype(float), prompts, held)
    assert perfect is not None and perfect["nll"]["mean"] < 0.05 and math.isfinite(perfect["temperature"])
    level = agreement.calibration(0 * difference, answer, prompts, held)
    assert level is not None and level["temperature"] is None and level["ece"] == 0
    assert agreement.calibration(difference, answer, prompts, np.ones(200, bool)) is None


@pytest.mark.parametrize("ties", [0.0, 0.3, 1.0])
def test_what_ignorance_earns_depends_on_ties(ties: float) -> None:
    """Always saying 1/2: NLL ln 2 with and without ties, Brier 1/4 of the share that is no tie."""
    difference, answer, prompts = simulated(400, 1.0, ties)
    held = figures.held_out(prompts)
    found = agreement.calibration(difference, answer, prompts, held)
    assert found is not None
    y = answer[held]
    assert found["ignorant"]["brier"] == pytest.approx(np.mean((0.5 - y) ** 2)) == pytest.approx(np.mean(y != 0.5) / 4)
    assert found["ignorant"]["nll"] == pytest.approx(-np.mean(y * np.log(0.5) + (1 - y) * np.log(0.5)))
    useless = agreement.calibration(-difference, answer, prompts, held)
    assert useless is not None and useless["temperature"] is None and useless["ece"] == 0
    for name, value in found["ignorant"].items():
        assert useless[name]["mean"] == pytest.approx(value) == useless["ignorant"][name]
        assert ties == 1 or found[name]["mean"] < value  # a score that knows something does better on the same pairs


def test_accuracy() -> None:
    given = [judged("p", "x", "y", 1), judged("p", "x", "z", 0), judged("q", "x", "y", 0.5), judged("q", "x", "z", 1)]
    scores = {("p", MediaRef("/x")): 2.0, ("p", MediaRef("/y")): 1.0, ("p", MediaRef("/z")): 2.0}
    found = figures.reward(given, scores)
    assert (found["n"], found["missing"]) == (2, 2)
    assert found["accuracy"]["share"] == pytest.approx((1 + 0.5) / 2) and found["level"]["share"] == 0.5
    assert figures.reward(given, {})["calibration"] is None


# ------------------------------------------------------------------------------------------------ biases


def test_what_a_picture_looks_like() -> None:
    plain = look(np.full((40, 60, 3), (255, 0, 0), np.uint8))
    assert plain["brightness"] == pytest.approx(0.299) and plain["saturation"] == 1 and plain["megapixels"] == 0.0024
    assert plain["sharpness"] == pytest.approx(0, abs=1e-12) and plain["contrast"] == pytest.approx(0, abs=1e-12)
    board = np.indices((32, 32)).sum(0)[..., None].repeat(3, 2) % 2 * 255
    edgy = look(board.astype(np.uint8))
    assert edgy["saturation"] == 0 and edgy["contrast"] == pytest.approx(0.5) and edgy["sharpness"] > 3
    assert look(np.zeros((2, 2, 3), np.uint8))["saturation"] == 0
    assert look(np.zeros((700, 20, 3), np.uint8))["megapixels"] == 0.014


def test_biases_point_at_the_winner() -> None:
    seen = {MediaRef(f"/{n}"): dict.fromkeys(audit.PROPERTIES, float(n)) for n in range(4)}
    given = [judged("p", "3", "1", 1), judged("q", "0", "2", 0), judged("r", "2", "3", 1), judged("s", "1", "2", 0.5)]
    given += [judged("t", "9", "1", 1)]
    found = figures.biases(given, seen)["brightness"]
    assert found["difference"]["mean"] == pytest.approx((2 + 2 - 1) / 3) and found["difference"]["n"] == 3
    assert found["more_wins"]["share"] == pytest.approx(2 / 3)
    assert figures.biases(given, {}) == {}


def test_prompt_length() -> None:
    given = [judged("one", "a", "b", 0.5), judged("one two", "a", "b", 1), judged("a much longer prompt", "a", "b", 0)]
    short, long = figures.by_prompt_length(
        given, {"r": {("one two", MediaRef("/a")): 1, ("one two", MediaRef("/b")): 0}}
    )
    assert (short["n"], long["n"]) == (2, 1) and short["ties"]["share"] == 0.5 and long["ties"]["share"] == 0
    assert short["accuracy"]["r"]["share"] == 1 and long["accuracy"]["r"]["n"] == 0


def test_judgements_of_lists_and_labels() -> None:
    refs = tuple(MediaRef(f"/{n}") for n in range(3))
    rows = [
        PreferenceRow("p", refs, rank=(1, 2, 2), user_id="anna"),
        PreferenceRow("q", refs[:2], label={"quality": "B", "overall": "same"}),
        PreferenceRow("r", refs[:2], label={"quality": "A"}),
        PreferenceRow("s", refs[:2], scores={"overall": (1.0, 2.0)}),
        PreferenceRow("s", refs[:2], scores={"overall": (1.0, 2.0)}, user_id="anna"),
    ]
    found = judgements(rows, "overall")
    assert [(each.prompt, each.answer, each.sided) for each in found] == [
        ("p", 1, False), ("p", 1, False), ("p", 0.5, False), ("q", 0.5, True), ("s", 0, True), ("s", 0, True)
    ]  # fmt: skip
    assert [each.by_rewards for each in found] == [False] * 4 + [True, False], "a person's ratings have a user_id"


# ------------------------------------------------------------------------------------------------ the verb


@pytest.fixture(name="labelled")
def _labelled(tmp_path: Path) -> Path:
    """Forty pairs of which the redder picture wins nine times in ten, judged by two people."""
    rng = np.random.default_rng(5)
    rows = []
    for n in range(40):
        refs = []
        for side in range(2):
            file = tmp_path / f"{n}-{side}.png"
            write_image(file, np.full((8, 8, 3), tuple(rng.integers(1, 250, 3)), np.uint8))
            refs.append(MediaRef(str(file)))
        red = [int(read_image(ref)[0, 0, 0]) for ref in refs]
        for user in ("anna", "ben"):
            right = rng.random() < 0.9
            verdict = "A" if (red[0] > red[1]) == right else "B"
            rows.append(PreferenceRow(f"prompt {n}", tuple(refs), label={"overall": verdict}, user_id=user))
    write_preferences(tmp_path / "labels.jsonl", rows)
    return tmp_path / "labels.jsonl"


def test_evaluators_and_results_folders_give_the_same(labelled: Path, tmp_path: Path) -> None:
    spec = EvaluatorSpec(name="colours")
    out = audit.run(labelled, evaluators=[spec], output=tmp_path / "a/audit.json", html=tmp_path / "a/page.html")
    found = json.loads(out.read_text())
    assert found["judgements"] == 80 and found["pairs"] == 40 and found["pictures"] == 80
    red = found["rewards"]["colours/red"]
    assert red["accuracy"]["share"] > 0.8 > 0.65 > found["rewards"]["colours/green"]["accuracy"]["share"]
    assert red["accuracy"]["low"] < red["accuracy"]["share"] < red["accuracy"]["high"] and red["missing"] == 0
    assert found["annotators"]["krippendorff"]["n"] == 40 and found["annotators"]["krippendorff"]["alpha"] > 0.4
    assert {user: entry["n"] for user, entry in found["people"].items()} == {"anna": 40, "ben": 40}
    assert (
        found["biases"]["megapixels"]["more_wins"]["n"] == 0 and found["biases"]["brightness"]["difference"]["n"] == 80
    )
    assert found["remarks"] == []
    again = audit.run(labelled, scores=[tmp_path / "a/audit-scores"], output=tmp_path / "b.json")
    assert json.loads(again.read_text())["rewards"] == found["rewards"]
    page = (tmp_path / "a/page.html").read_text()
    assert (
        "Krippendorff" in page and "<svg" in page and "<script" not in page and "http" not in page.split("</head>")[1]
    )


def test_an_annotators_temperature_is_found_again(tmp_path: Path) -> None:
    """In the shapes world the truth is known: whose utility it is predicts the labels best, at about its temperature.

    `bold` errs with a logistic of scale 0.06 and calls differences below 0.02 a tie.
    """
    rng = np.random.default_rng(8)
    rows = []
    for n, group in enumerate(judged_groups(100, 8, "bold")):
        files = [tmp_path / f"{n}-{side}.png" for side in range(2)]
        turned = rng.random() < 0.5
        for file, drawing in zip(files, group.media[:: -1 if turned else 1], strict=True):
            write_image(file, drawing.image())
        refs = (MediaRef(str(files[0])), MediaRef(str(files[1])))
        first = group.wins[0, 1]
        verdict: Any = "same" if first == 0.5 else "B" if turned == (first > 0.5) else "A"
        rows.append(PreferenceRow(group.prompts[0], refs, label={"overall": verdict}))
    write_preferences(tmp_path / "t.jsonl", rows)
    specs = [EvaluatorSpec(name="shapes_truth", params={"annotator": name}) for name in ("bold", "tidy")]
    found = json.loads(audit.run(tmp_path / "t.jsonl", evaluators=specs).read_text())["rewards"]
    ours, other = (found[f"shapes_truth[annotator={name}]/utility"] for name in ("bold", "tidy"))
    assert ours["accuracy"]["share"] > other["accuracy"]["share"] and ours["accuracy"]["low"] > 0.7
    assert 0.035 < ours["calibration"]["temperature"] < 0.1
    assert ours["calibration"]["nll"]["mean"] < other["calibration"]["nll"]["mean"] < math.log(2)


def test_a_table_of_the_label_factory(tmp_path: Path) -> None:
    lists = {f"p{n}": [tuple(map(int, RNG.integers(1, 250, 3))) for _ in range(3)] for n in range(8)}
    preferences = prefer.run(config(tmp_path / "out", table(tmp_path, lists)))
    found = json.loads(audit.run(preferences, html=tmp_path / "x.html").read_text())
    assert found["dimension"] == "phi" and set(found["rewards"]) == {"red", "green", "blue"}
    assert found["first"]["n"] == 0, "a list has no sides"
    assert any("proves nothing" in remark for remark in found["remarks"])
    assert any("two people" in remark for remark in found["remarks"])
    by_red = json.loads(audit.run(preferences, dimension="red", pictures=False).read_text())
    assert set(by_red["rewards"]) == {"phi", "green", "blue"} and by_red["biases"] == {}
    with pytest.raises(ValueError, match=r"judges nothing on 'rde'; it judges blue, green, phi, red"):
        audit.run(preferences, dimension="rde")
    with pytest.raises(ValueError, match="has no score of a picture of this table"):
        other = table(tmp_path, {"else": [(1, 2, 3), (3, 2, 1)]}, "other.jsonl")
        prefer.run(config(tmp_path / "other", other))
        audit.run(preferences, scores=[tmp_path / "other/scores"])


def test_a_merged_table_is_audited_against_people(tmp_path: Path, capsys: Any) -> None:
    """The rewards' ranking stays beside the answer of one person, who thereby agrees with nobody."""
    colours = {f"p{n}": [(200 - n, 10, 9), (100 - n, 110, 9), (20, 200, 9)] for n in range(6)}
    preferences = prefer.run(config(tmp_path / "out", table(tmp_path, colours), route={"count": 6}))
    lines = [{"pair": row["pair"], "answer": "A", "user_id": "anna"} for row in questions(tmp_path / "out")]
    merged = tmp_path / "out/merged.jsonl"
    routing.merge(preferences, [answer(tmp_path, *lines)], merged)
    capsys.readouterr()
    found = json.loads(audit.run(merged, pictures=False).read_text())
    assert found["annotators"]["agree"]["n"] == 0 and any("two people" in remark for remark in found["remarks"])
    assert found["against"] == "people" and {entry["n"] for entry in found["rewards"].values()} == {len(lines)}
    assert any("18 of 24 judgements are the rewards' own ranking" in remark for remark in found["remarks"])
    assert not any("proves nothing" in remark for remark in found["remarks"])
    assert "Against the 6 judgements of people." in capsys.readouterr().out
    audit.run(preferences, pictures=False)
    assert "Against the rewards' own ranking, since no answer of a person" in capsys.readouterr().out


def test_pairs_whose_scores_went_with_the_rewards_row(tmp_path: Path) -> None:
    """Answers take the place of pairs, scores and all; the results folder still has them, and the audit says so."""
    colours = {f"p{n}": [(200 - n, 10, 9), (20, 200, 5)] for n in range(6)}
    job = config(tmp_path / "out", table(tmp_path, colours), label={"kind": "pairs"}, route={"count": 3})
    preferences = prefer.run(job)
    lines = [{"pair": row["pair"], "answer": "A", "user_id": "anna"} for row in questions(tmp_path / "out")]
    routing.merge(preferences, [answer(tmp_path, *lines)], tmp_path / "m.jsonl")
    found = json.loads(audit.run(tmp_path / "m.jsonl", pictures=False).read_text())
    assert {entry["n"] for entry in found["rewards"].values()} == {0}
    assert any("name the results folder with --scores" in remark for remark in found["remarks"])
    again = audit.run(tmp_path / "m.jsonl", pictures=False, scores=[tmp_path / "out/scores"])
    found = json.loads(again.read_text())
    assert found["rewards"]["colours/red"]["n"] == 3
    assert not any("--scores" in remark for remark in found["remarks"])


def test_nothing_that_is_read_is_overwritten(labelled: Path, tmp_path: Path) -> None:
    before = labelled.read_bytes()
    (tmp_path / "link.json").symlink_to(labelled)
    for options, said in (
        ({"html": labelled}, "labels.jsonl is read, and would be overwritten; name another file with --html"),
        ({"output": tmp_path / "x/../labels.jsonl"}, "name another file with -o"),
        ({"output": tmp_path / "link.json"}, "name another file with -o"),
        ({"output": tmp_path / "a.json", "html": tmp_path / "a.json"}, "name another file with --html"),
        ({"scores": [tmp_path / "s"], "output": tmp_path / "s/summary.json"}, "name another file with -o"),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=said):
            audit.run(labelled, pictures=False, **options)
    assert labelled.read_bytes() == before and not (tmp_path / "a.json").exists()
    labelled.rename(tmp_path / "audit.jsonl")
    (tmp_path / "audit.json").write_text(json.dumps([{"prompt": "p", "path1": "a.png", "path2": "b.png"}]))
    with pytest.raises(ValueError, match=r"audit\.json is read"):
        audit.run(tmp_path / "audit.json")


def test_a_table_that_writes_the_winner_first_and_missing_pictures(tmp_path: Path, capsys: Any) -> None:
    rows = [{"prompt": f"p{n}", "path1": f"{n}a.png", "path2": f"{n}b.png"} for n in range(12)]
    (tmp_path / "hpd.json").write_text(json.dumps(rows))
    found = json.loads(audit.run(tmp_path / "hpd.json").read_text())
    assert found["first"]["share"] == 1 and found["biases"] == {}
    assert any("first medium always wins" in remark for remark in found["remarks"])
    assert any("24 of 24 pictures cannot be read" in remark for remark in found["remarks"])
    assert "24 of 24 pictures" in capsys.readouterr().out


@needs(IMAGE_REWARD)
def test_imagereward_as_published(tmp_path: Path) -> None:
    found = json.loads(audit.run(IMAGE_REWARD, output=tmp_path / "a.json", pictures=False).read_text())
    assert found["rows"] == 466 and found["judgements"] == 7230
    assert 0.1 < found["ties"]["share"] < 0.13


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mmalign", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_verb(labelled: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    words = ("prefer", "audit", labelled, "-e", "colours", "--params", "{}", "--limit", "20", "-o", tmp_path / "v.json")
    assert call(monkeypatch, *words) == 0
    out = capsys.readouterr().out
    assert "20 judgements of 10 pairs" in out and "colours/red" in out and "anna" in out
    for extra, said in (
        (("-e", "colors"), "Did you mean 'colours'"),
        (("-e", "colours", "--params", "{"), "is not JSON"),
        (("-e", "colours", "--params", "3"), "is not a JSON object"),
        (("--params", "{}"), "1 --params for 0 --evaluator"),
        (("--format", "pickpic"), "unknown preference format"),
        (("--scores", tmp_path), "is not a results folder"),
    ):
        assert call(monkeypatch, "prefer", "audit", labelled, *extra) == 2
        assert said in capsys.readouterr().err


def test_an_audit_does_not_write_into_a_data_set(tmp_path: Path, monkeypatch: Any) -> None:
    for side in ("chosen", "rejected"):
        write_image(tmp_path / "set" / side / "x.png", np.full((8, 8, 3), len(side) * 9, np.uint8))
    (tmp_path / "set/metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "prompt": "p"}))
    before = {file for file in (tmp_path / "set").rglob("*")}
    assert audit.run(tmp_path / "set") == tmp_path / "set.audit.json"
    assert {file for file in (tmp_path / "set").rglob("*")} == before


def test_several_dimensions_have_to_be_chosen_from(tmp_path: Path) -> None:
    refs = (MediaRef(str(tmp_path / "a.png")), MediaRef(str(tmp_path / "b.png")))
    write_preferences(tmp_path / "t.jsonl", [PreferenceRow("p", refs, label={"quality": "A", "motion": "same"})])
    with pytest.raises(ValueError, match="judges motion, quality; say with --dimension"):
        audit.run(tmp_path / "t.jsonl")
