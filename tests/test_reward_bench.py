"""`mmalign bench reward` from end to end: scores that exist and scores made now, on every kind of benchmark."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reward_kit as kit
from protocol_kit import inversion_score, strict_counts
from public_kit import IMAGE_REWARD, needs
from reward_kit import FEW, figures, run

from mmalign.media import write_image
from mmalign.results import read_results

RED = {"name": "colours", "subscore": "red"}


@pytest.fixture(name="cli_run")
def _cli_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return kit.caller(capsys, monkeypatch)


# ------------------------------------------------------------------------------------------------ the real file


@needs(IMAGE_REWARD)
class TestImageRewardAsPublished:
    """466 lists whose pictures are not there: only their scores are needed."""

    def rows(self) -> list[dict[str, Any]]:
        return json.loads(IMAGE_REWARD.read_text())

    def table(self, path: Path, seed: int = 0) -> dict[str, float]:
        rng = np.random.default_rng(seed)
        values = {
            name: float(rng.normal() - 0.4 * rank)
            for row in self.rows()
            for name, rank in zip(row["generations"], row["ranking"], strict=True)
        }
        kit.scores(path, values)
        return values

    def test_from_the_command_line(self, tmp_path: Path, cli_run: Any) -> None:
        values = self.table(tmp_path / "mine.jsonl")
        yaml = tmp_path / "bench.yaml"
        yaml.write_text(
            f"benchmark: imagereward\nfolder: {IMAGE_REWARD.parent}\nscores: {tmp_path / 'mine.jsonl'}\n"
            f"output: {tmp_path / 'out'}\nprotocols: {{simulations: 2}}\n"
        )
        code, out, _ = cli_run("bench", "reward", str(yaml), "--json")
        assert code == 0 and json.loads(out) == json.loads((tmp_path / "out" / "bench.json").read_text())
        code, out, _ = cli_run("bench", "reward", str(yaml))
        assert code == 0 and "imagereward_macro" in out and "HPS v2.1 66.8" in out and "6399" in out
        report = json.loads((tmp_path / "out" / "bench.json").read_text())
        found = figures(report)
        counts = [strict_counts([values[name] for name in row["generations"]], row["ranking"]) for row in self.rows()]
        micro, macro = sum(r for r, _ in counts) / 6399, np.mean([r / n for r, n in counts])
        assert found["imagereward_micro"]["micro"]["mean"] == pytest.approx(micro)
        assert found["imagereward_macro"]["macro"]["mean"] == pytest.approx(macro) != pytest.approx(micro, abs=1e-6)
        (entry,) = report["results"]
        covered = entry["coverage"]
        assert (covered["media"], covered["scored"], covered["pairs"]) == (2720, 2720, 7230)
        assert covered["tied_by_people"] == 831 and covered["unscored"]["n"] == 0
        assert report["data"] == {"media": 2720, "prompts": 463, "groups": 466, "validation_groups": 0,
                                  "missing_media": None, "dropped_rows": {}}  # fmt: skip
        assert found["ties_aware"]["fit"] == "held-out halves, crosswise" and len(found["ties_aware"]["fitted"]) == 2
        assert found["calibration"]["result"]["nll"]["mean"] < 0.65
        assert 0.3 < found["correlations"]["within_groups"]["kendall_tau_b"]["mean"] < 0.45

    def test_mistakes_in_the_config(self, tmp_path: Path, cli_run: Any) -> None:
        self.table(tmp_path / "mine.jsonl")
        yaml = tmp_path / "bench.yaml"
        text = f"benchmark: imagereward\nfolder: {IMAGE_REWARD.parent}\noutput: {tmp_path}/out\n"
        text += f"scores: {tmp_path}/mine.jsonl\n"
        yaml.write_text(text.replace("imagereward\n", "imagerewad\n", 1) + "protocls: {}\n")
        code, _, err = cli_run("bench", "reward", str(yaml))
        assert code == 2 and "protocls: unknown key. Did you mean 'protocols'?" in err and "'imagereward'" in err
        yaml.write_text(text + "protocols: {only: [hpdv2_inversions]}\n")
        code, _, err = cli_run("bench", "reward", str(yaml))
        assert code == 2 and "hpdv2_inversions does not fit imagereward" in err and "Traceback" not in err
        yaml.write_text(text.replace("mine.jsonl", "none.jsonl"))
        assert "none.jsonl does not exist" in cli_run("bench", "reward", str(yaml))[2]

    def test_perfect_and_reversed(self, tmp_path: Path) -> None:
        for sign, expected in ((-1.0, 1.0), (1.0, 0.0)):
            values = {
                name: sign * rank
                for row in self.rows()
                for name, rank in zip(row["generations"], row["ranking"], strict=True)
            }
            table = kit.scores(tmp_path / "t.jsonl", values)
            found = figures(run("imagereward", IMAGE_REWARD, tmp_path / "out", scores=table))
            assert (
                found["imagereward_macro"]["macro"]["mean"] == found["imagereward_micro"]["micro"]["mean"] == expected
            )
            assert found["ties_aware"]["macro"]["mean"] == pytest.approx(1.0 if expected else 831 / 7230, abs=0.02)

    def test_the_pages_example(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """docs/bench.md prints it: a scorer that prefers what is listed first, which the file's order rewards."""
        values = {name: -float(place) for row in self.rows() for place, name in enumerate(row["generations"])}
        table = kit.scores(tmp_path / "listed.jsonl", values)
        run("imagereward", IMAGE_REWARD, tmp_path / "out", scores=table, protocols={})
        printed = [" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()]
        page = (Path(__file__).parents[1] / "docs" / "bench.md").read_text().splitlines()
        shown = [" ".join(line.split()) for line in page if line.startswith("listed  overall")]
        assert len(shown) == 6
        for line in shown:
            assert any(each.startswith(line) for each in printed), line

    def test_neither_the_order_of_groups_nor_of_scores_matters(self, tmp_path: Path) -> None:
        self.table(tmp_path / "a.jsonl")
        rows, lines = self.rows()[:80], (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "one.json").write_text(json.dumps(rows))
        random.Random(0).shuffle(rows)
        random.Random(1).shuffle(lines)
        (tmp_path / "two.json").write_text(json.dumps(rows))
        (tmp_path / "b.jsonl").write_text("".join(lines))
        reports = [
            figures(run("imagereward", tmp_path / name, tmp_path / name[:3], scores=tmp_path / table))
            for name, table in (("one.json", "a.jsonl"), ("two.json", "b.jsonl"))
        ]
        for name in ("imagereward_macro", "imagereward_micro", "ties_aware", "no_ties"):
            for average in ("macro", "micro"):
                assert reports[1][name][average] == pytest.approx(reports[0][name][average], abs=1e-12)
        first, second = (one["calibration"]["result"] for one in reports)
        assert second["nll"] == pytest.approx(first["nll"]) and second["temperature"] == first["temperature"]
        for kind in ("within_groups", "pooled"):
            for name, one in reports[0]["correlations"][kind].items():
                assert reports[1]["correlations"][kind][name] == pytest.approx(one)

    def test_gaps_are_counted_and_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        values: dict[str, float | None] = dict(self.table(tmp_path / "t.jsonl"))
        first = next(iter(values))
        values[first] = None
        last = list(values)[-1]
        del values[last]
        values["somebody/else.png"] = 1.0
        report = run("imagereward", IMAGE_REWARD, tmp_path / "out", scores=kit.scores(tmp_path / "t.jsonl", values))
        covered = report["results"][0]["coverage"]
        lists = [row["generations"] for row in self.rows()]
        lost = sum(len(names) - 1 for names in lists if first in names or last in names)
        assert (covered["scored"], covered["pairs"], covered["pairs_without_two_scores"]) == (2718, 7230 - lost, lost)
        assert covered["unscored"]["first"] == [first, last] and covered["scores_of_other_media"] == 1
        assert covered["unscored"]["reasons"] == {"no finite number": 1}
        out = " ".join(capsys.readouterr().out.split())
        assert "2 of 2720 media have no score" in out and f"{lost} pairs are left out" in out


# ------------------------------------------------------------------------------------------------ scored now


@pytest.mark.usefixtures("colour_evaluators")
class TestScoredNow:
    def test_pictures_are_scored_once(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = kit.imagereward(tmp_path / "ir", pictures=True)
        report = run("imagereward", folder, tmp_path / "out", evaluators=[RED, {"name": "blueness"}, RED])
        red, blue, again = report["results"]
        assert (red["scorer"], blue["scorer"]) == ("colours/red", "blueness") and red == again
        assert red["figures"][0]["macro"]["mean"] == 1.0 and red["coverage"]["unscored"]["n"] == 0
        assert blue["figures"][0]["macro"]["mean"] == 0.0  # all are equally blue: level scores are wrong
        assert blue["figures"][0]["level_scores"] == 18
        results = read_results(tmp_path / "out" / "scores")
        assert set(results.labels()) == {"colours/red", "colours/green", "colours/blue", "blueness"}
        first = json.loads((tmp_path / "out/scores/run.json").read_text())
        run("imagereward", folder, tmp_path / "out", evaluators=[RED, {"name": "blueness"}, RED])
        second = json.loads((tmp_path / "out/scores/run.json").read_text())
        assert first["computed"] and not second["computed"]
        assert "Published by imagereward_macro" in capsys.readouterr().out

    def test_a_results_folder_gives_the_same(self, tmp_path: Path) -> None:
        folder = kit.hpdv2(tmp_path / "hpd")
        now = run("hpdv2", folder, tmp_path / "out", evaluators=[RED, {"name": "blueness"}])
        later = run("hpdv2", folder, tmp_path / "later", scores=tmp_path / "out" / "scores")
        by_name = {one["scorer"]: one for one in later["results"]}
        assert set(by_name) == {"colours/red", "colours/green", "colours/blue", "blueness"}
        for entry in now["results"]:
            assert by_name[entry["scorer"]]["figures"] == entry["figures"]
        inverted = figures(now | {"results": now["results"][:1]})["hpdv2_inversions"]
        lists = [([250, 200, 100], [1, 2, 3]), ([50, 150], [2, 1])]
        assert inverted["macro"]["mean"] == np.mean([inversion_score(*each) for each in lists]) == 1.0
        assert now["data"]["dropped_rows"]["no label"]["count"] == 1
        people = [inversion_score([-rank for rank in ranks], [1, 2, 3]) for ranks in ([1, 2, 3], [1, 3, 2])]
        assert inverted["baselines"]["one_person"]["macro"] == pytest.approx(np.mean(people)) == pytest.approx(5 / 6)

    def test_missing_media_stop_or_are_counted(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = kit.imagereward(tmp_path / "ir", pictures=True)
        (folder / "test_images/part/0002/b.png").unlink()
        with pytest.raises(ValueError, match=r"1 of 18 media are not there: part/0002/b.png; .*set missing: count"):
            run("imagereward", folder, tmp_path / "out", evaluators=[RED])
        assert not (tmp_path / "out").exists()  # nothing was scored
        report = run("imagereward", folder, tmp_path / "out", evaluators=[RED], missing="count")
        assert report["data"]["missing_media"] == {"n": 1, "first": ["part/0002/b.png"]}
        covered = report["results"][0]["coverage"]
        assert (covered["scored"], covered["pairs_without_two_scores"]) == (17, 2)
        assert "no such file" in next(iter(covered["unscored"]["reasons"]))
        assert "1 of 18 media are not there: part/0002/b.png" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"18 of 18 media are not there.*or give `scores`|18 of 18.*give `scores`"):
            run("imagereward", folder, tmp_path / "x", evaluators=[RED], missing="count", media=tmp_path / "none")

    def test_pictures_inside_parquet(self, tmp_path: Path) -> None:
        report = run("pickapic", kit.pickapic(tmp_path / "pick"), tmp_path / "out", evaluators=[RED])
        found = figures(report)["pickapic_tiecredit"]
        assert found["fit"] == "validation split" and found["micro"]["n"] == 3
        assert report["data"]["groups"] == 3 and report["data"]["validation_groups"] == 2
        covered = report["results"][0]["coverage"]
        assert (covered["media"], covered["scored"], covered["validation_pairs"]) == (10, 10, 2)
        assert (covered["pairs"], covered["tied_by_people"]) == (3, 1)

    @pytest.mark.parametrize(
        ("evaluator", "message"),
        [
            ({"name": "colors"}, "colours"),
            ({"name": "colours"}, "gives blue, green, red; say with `subscore`"),
            ({"name": "colours", "subscore": "rad"}, "no sub-score 'rad'. Did you mean 'red'"),
            ({"name": "colours", "subscore": "red", "axes": {"Overal": "red"}}, "judges overall, not 'Overal'"),
            ({"name": "whole"}, "scores whole sets"),
            ({"name": "nothing"}, "scored none of the media"),
        ],
    )
    def test_evaluators_that_cannot_be_tested(self, evaluator: dict[str, Any], message: str, tmp_path: Path) -> None:
        folder = kit.imagereward(tmp_path / "ir", pictures=True)
        with pytest.raises(ValueError, match=message):
            run("imagereward", folder, tmp_path / "out", evaluators=[evaluator])

    def test_evaluators_that_need_what_no_row_has(self, tmp_path: Path) -> None:
        """Such as personal_reward, which asks every row for its user."""
        folder = kit.imagereward(tmp_path / "ir", pictures=True)
        with pytest.raises(ValueError, match=r"personal needs aux of every medium, and imagereward has none.*`scores`"):
            run("imagereward", folder, tmp_path / "out", evaluators=[{"name": "personal"}])
        clips = kit.videogen(tmp_path / "v", [("a", "b", ("A",) * 4)])
        with pytest.raises(ValueError, match="colours scores images; videogen_rewardbench is of videos"):
            run("videogen_rewardbench", clips, tmp_path / "out", evaluators=[RED])
        assert not (tmp_path / "out").exists()

    def test_questions_are_asked_of_each_picture_of_a_grid(self, tmp_path: Path) -> None:
        """Red is the probability of yes: three of four pictures answer yes to all, the last no."""
        (tmp_path / "dpg_bench.csv").write_text(kit.DPG)
        grid = np.zeros((16, 16, 3), np.uint8)
        grid[..., 0] = 200
        grid[8:, 8:, 0] = 10
        (tmp_path / "pictures").mkdir()
        write_image(tmp_path / "pictures/one.png", grid)
        write_image(tmp_path / "pictures/two.png", np.full((16, 16, 3), 250, np.uint8))
        options = {"media": tmp_path / "pictures", "grid": {"pictures": 4}, "evaluators": [RED]}
        report = run("dpg_bench", tmp_path, tmp_path / "out", **options, protocols={"yes_from": 100})
        found = figures(report)["questions"]
        assert found["score"]["mean"] == pytest.approx((0.75 + 1) / 2) and found["score"]["n"] == 2
        # one: 1/2 + 1/4 + 1/8 over 3 questions, two: 1/2
        assert found["baselines"]["coin"] == pytest.approx((0.875 / 3 + 0.5) / 2)
        assert found["categories"]["entity"]["n"] == 8 and found["categories"]["entity"]["mean"] == 7 / 8
        assert found["categories"]["attribute - color"]["mean"] == 0.75
        last = run("dpg_bench", tmp_path, tmp_path / "out", **options,
                   protocols={"yes_from": 100, "question_categories": "last_crop"})  # fmt: skip
        assert figures(last)["questions"]["categories"]["attribute"]["mean"] == 0.0
        (tmp_path / "pictures/two.png").unlink()
        holed = run("dpg_bench", tmp_path, tmp_path / "o2", **options, missing="count", protocols={"yes_from": 100})
        assert figures(holed)["questions"]["missing"] == {"n": 4, "first": [f"two/{crop}" for crop in range(4)]}
        assert figures(holed)["questions"]["score"]["n"] == 1


# ------------------------------------------------------------------------------------------------ axes


CLIPS = [
    ("a", "b", ("A", "B", "same", "A")),
    ("c", "d", ("B", "A", "A", "B")),
    ("e", "f", ("same", "same", "B", "same")),
    ("e", "h", ("A", "?", "A", "A")),
]


def clip_scores() -> dict[str, float]:
    return {f"videos/{name}.mp4": float(n) for n, name in enumerate("hfedcba")}


def test_each_axis_has_its_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = kit.videogen(tmp_path / "v", CLIPS)
    good, turned = clip_scores(), {name: -value for name, value in clip_scores().items()}
    table = kit.scores(tmp_path / "t.jsonl", good, VQ=good, MQ=turned, TA=good, Overall=good)
    report = run("videogen_rewardbench", folder, tmp_path / "out", scores=table)
    assert [one["axis"] for one in report["results"]] == ["Overall", "VQ", "MQ", "TA"]
    assert {one["scorer"] for one in report["results"]} == {"t"}
    d = {"ab": 1.0, "cd": 1.0, "ef": 1.0, "eh": 2.0}
    labels = {"Overall": (1, -1, 0, 1), "VQ": (1, -1, 0, 1), "MQ": (-1, 1, 0, None), "TA": (0, 1, -1, 1)}
    for axis, said in labels.items():
        sign = -1 if axis == "MQ" else 1
        known = [(h, sign * value) for h, value in zip(said, d.values(), strict=True) if h is not None]
        decided = [h * value > 0 for h, value in known if h]
        found = figures(report, axis)
        assert found["videogen_without_ties"]["micro"]["mean"] == pytest.approx(np.mean(decided))
        assert found["videogen_with_ties"]["baselines"]["all_tie"]["micro"] == pytest.approx(
            np.mean([h == 0 for h, _ in known])
        )
    assert figures(report, "MQ")["no_ties"]["micro"]["n"] == 2
    out = " ".join(capsys.readouterr().out.split())
    assert "1 pairs are not judged on MQ" in out and "VideoReward 61.26" in out and "random 41.86" in out
    named = kit.scores(tmp_path / "u.jsonl", good, x=good, y=turned)
    axes = {"Overall": "x", "VQ": "x", "MQ": "y", "TA": "x"}
    again = run("videogen_rewardbench", folder, tmp_path / "u", scores=named, axes=axes)
    assert [one["figures"] for one in again["results"]] == [one["figures"] for one in report["results"]]
    alone = run("videogen_rewardbench", folder, tmp_path / "w", scores=named)
    assert [one["scorer"] for one in alone["results"]] == ["x"] * 4 + ["y"] * 4
    for wrong, message in (({"Overal": "x"}, "not 'Overal'. Did you mean 'Overall'"),
                           ({"Overall": "z"}, "no score 'z'"), ({"Overall": "x"}, "VQ, MQ, TA too")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run("videogen_rewardbench", folder, tmp_path / "e", scores=named, axes=wrong)


def test_four_votes(tmp_path: Path) -> None:
    votes = ["leftvote", "rightvote", "tievote", "bothbad_vote"] * 8
    folder = kit.genai_bench(tmp_path / "g", votes)
    values = {}
    for number, vote in enumerate([*votes[::2], *votes[1::2]]):  # as the two shards hold them
        level = {"tievote": 5.0, "bothbad_vote": -5.0}.get(vote, 0.0)
        lift = {"leftvote": 3.0, "rightvote": -3.0}.get(vote, 0.01)
        values |= {f"{number:05d}/left": level + lift, f"{number:05d}/right": level}
    table = kit.scores(tmp_path / "t.jsonl", values)
    found = figures(run("genai_bench_image", folder, tmp_path / "out", scores=table))
    assert found["genai_four_way"]["micro"]["mean"] == 1.0 and found["ties_aware"]["micro"]["mean"] == 1.0
    assert found["no_ties"]["micro"]["n"] == 16
    baselines = found["genai_four_way"]["baselines"]
    assert baselines["random"]["micro"] == 0.25 == baselines["majority"]["micro"] == baselines["all_tie"]["micro"]
    assert len(found["genai_four_way"]["fitted"]) == 2


def test_ratings_and_skills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    models = ("DALLE_3", "SDXL_Base", "Midjourney_6")
    ratings = {f"{n:05d}": {m: rng.integers(1, 6, 3).tolist() for m in models} for n in range(40)}
    folder = kit.cmu(tmp_path / "c", ratings, {"basic": list(range(25)), "counting": list(range(20, 40))})
    human = {f"{m}/{n}.jpeg": float(np.mean(held[m])) for n, held in ratings.items() for m in models}
    values = {name: value + rng.normal() for name, value in human.items()}
    table = kit.scores(tmp_path / "t.jsonl", values)
    found = figures(run("genai_bench_cmu", folder, tmp_path / "out", scores=table))
    x, y = np.array(list(values.values())), np.array(list(human.values()))
    every = found["correlations"]["pooled"]
    assert (
        every["spearman"]["value"] == pytest.approx(stats.spearmanr(x, y).statistic) and every["spearman"]["n"] == 120
    )
    assert every["kendall_tau_b"]["value"] == pytest.approx(stats.kendalltau(x, y).statistic)
    basic = [n for n, name in enumerate(human) if int(name[-10:-5]) < 25]
    skill = found["skills"]["skills"]["basic"]
    assert skill["spearman"]["value"] == pytest.approx(stats.spearmanr(x[basic], y[basic]).statistic)
    assert skill["n"] == 75 and skill["human"]["mean"] == pytest.approx(y[basic].mean())
    ranked = found["correlations"]["generators"]
    assert set(ranked["generators"]) == set(models) and ranked["n"] == 3 and ranked["wins"] is None
    sides = [
        [np.mean([v for k, v in held.items() if k.startswith(f"{m}/")]) for m in models] for held in (values, human)
    ]
    assert ranked["means"]["spearman"]["value"] == pytest.approx(stats.spearmanr(*sides).statistic)
    assert ranked["generators"]["DALLE_3"]["human"]["mean"] == pytest.approx(sides[1][0])
    assert every["kendall_tau_c"]["value"] == pytest.approx(stats.kendalltau(x, y, variant="c").statistic)
    pooled = found["ties_aware_pooled"]
    assert pooled["micro"]["n"] == 2 * (60 * 59 // 2) and pooled["micro"]["low"] < pooled["micro"]["mean"]
    ties = np.mean([a == b for i, a in enumerate(y) for b in y[:i]])
    assert pooled["baselines"]["all_tie"]["micro"] == pytest.approx(ties)
    same = figures(run("genai_bench_cmu", folder, tmp_path / "s", scores=table, protocols={"fit": "same", **FEW}))
    assert same["ties_aware_pooled"]["micro"]["n"] == 120 * 119 // 2
    assert same["ties_aware_pooled"]["micro"]["mean"] >= pooled["micro"]["mean"]  # fitted on what it is tried on
    out = capsys.readouterr().out
    assert "By skill" in out and "By generator" in out and "tau-c" in out


@pytest.mark.usefixtures("colour_evaluators")
def test_generators_are_ranked_where_the_rows_name_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides' generators of every contest; a scorer with the generators' true order ranks them without a fault."""
    votes = ["leftvote", "rightvote", "tievote", "bothbad_vote", "leftvote"] * 12
    folder = kit.genai_bench(tmp_path / "g", votes)  # m1 is always on the left
    values = {f"{n:05d}/{side}": float(n % 3) + (side == "left") for n in range(60) for side in ("left", "right")}
    report = run("genai_bench_image", folder, tmp_path / "out", scores=kit.scores(tmp_path / "t.jsonl", values))
    found = figures(report)["correlations"]["generators"]
    assert found["n"] == 2 and found["means"]["kendall_tau_b"]["value"] == found["wins"]["spearman"]["value"] == 1.0
    assert found["generators"]["m1"]["human"]["mean"] == pytest.approx((2 + 0.5 * 2) / 5)  # two of five won, two tied
    assert found["generators"]["m1"]["wins"]["mean"] == 1.0 and found["generators"]["m2"]["score"]["n"] == 60
    assert "Rank correlation of generators" in capsys.readouterr().out
    pairs = run("pickapic", kit.pickapic(tmp_path / "p"), tmp_path / "o", evaluators=[RED])
    won = figures(pairs)["correlations"]["generators"]["generators"]["a"]["human"]
    assert (won["mean"], won["n"]) == (0.5, 3)  # of the test split: won, lost, tied
    plain = run("imagereward", kit.imagereward(tmp_path / "ir", pictures=True), tmp_path / "i", evaluators=[RED])
    assert figures(plain)["correlations"]["generators"] is None
    assert "Rank correlation of generators" not in capsys.readouterr().out.split("imagereward:")[-1]
