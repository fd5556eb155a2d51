"""Joining two results folders, and every reason to refuse or to remark."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from mmalign.compare import compare, pair_rows
from mmalign.figures import number, p_value, share_interval, signed_interval
from mmalign.results import distinct_names, read_results
from mmalign.stats import Interval, WinRate, mean_ci, permutation_test, sign_test, win_rate


def row(sample, prompt, score, evaluator="hps", subscore="score", **more):
    fields = {
        "sample": sample,
        "prompt": prompt,
        "media": f"{sample}.png",
        "evaluator": evaluator,
        "subscore": subscore,
        "score": score,
        "status": "ok",
        "reason": "",
        "seconds": 0.1,
        "evaluator_version": 1,
        "params_hash": "p1",
        "weight_hash": "w1",
        "decoder": "pillow 12.0",
        "group": None,
        "model": None,
    }
    return fields | more


def write(folder: Path, rows: list[dict], directions: dict[str, bool] | None = None, parts: int = 2) -> Path:
    (folder / "parts").mkdir(parents=True)
    for i in range(parts):
        mine = rows[i * len(rows) // parts : (i + 1) * len(rows) // parts]
        pq.write_table(
            pa.Table.from_pylist(mine, schema=pa.Table.from_pylist(rows).schema), folder / f"parts/part-{i:05d}.parquet"
        )
    evaluators = {name: {"higher_is_better": up} for name, up in (directions or {"hps": True}).items()}
    (folder / "summary.json").write_text(json.dumps({"evaluators": evaluators}))
    return folder


@pytest.fixture
def two(tmp_path):
    """40 prompts of 2 seeds; `aligned` is better by about 0.3, shuffled, and scored for `hps` and an error measure."""
    rng = np.random.default_rng(0)
    base, aligned = [], []
    for prompt in range(40):
        for seed in range(2):
            name = f"{prompt:03d}-{seed}"
            x = rng.normal()
            y = x + 0.3 + rng.normal()
            for rows, value, model in ((base, x, "base"), (aligned, y, "aligned")):
                rows.append(row(name, f"prompt {prompt}", value, model=model, seed=seed))
                rows.append(row(name, f"prompt {prompt}", value, "error", "lpips", model=model, seed=seed))
    order = rng.permutation(len(aligned))
    directions = {"hps": True, "error": False}
    return write(tmp_path / "a", base, directions), write(tmp_path / "b", [aligned[i] for i in order], directions)


def test_figures_are_those_of_the_statistics_module(two):
    a, b = (read_results(folder) for folder in two)
    got = compare(*two).score("hps")
    left = {(r["prompt"], r["seed"]): r["score"] for r in a.rows_of("hps")}
    right = {(r["prompt"], r["seed"]): r["score"] for r in b.rows_of("hps")}
    keys = list(left)
    x, y, prompts = [left[k] for k in keys], [right[k] for k in keys], [k[0] for k in keys]
    assert (got.n, got.prompts, got.failed) == (80, 40, 0)
    assert got.mean_a == pytest.approx(np.mean(x)) and got.mean_b == pytest.approx(np.mean(y))
    assert got.difference == mean_ci(np.subtract(y, x), prompts)
    assert got.difference.mean == pytest.approx(got.mean_b - got.mean_a)
    assert got.wins == win_rate(y, x, prompts)
    assert got.sign_p == sign_test(got.wins.wins, got.wins.losses)
    assert got.permutation_p == permutation_test(y, x, prompts)


def test_lower_is_better_turns_wins_round_and_leaves_the_difference(two):
    result = compare(*two)
    up, down = result.score("hps"), result.score("error/lpips")
    assert not down.higher_is_better
    assert (down.wins.wins, down.wins.losses) == (up.wins.losses, up.wins.wins)
    assert down.difference == up.difference and down.permutation_p == up.permutation_p


def test_exchanging_the_folders_mirrors_everything(two):
    there, back = compare(*two).score("hps"), compare(*reversed(two)).score("hps")
    assert there.difference.mean == pytest.approx(-back.difference.mean)
    assert there.wins.rate == pytest.approx(1 - back.wins.rate)
    assert there.wins.low == pytest.approx(1 - back.wins.high)


def test_names_come_from_the_model_column_then_the_folders(two, tmp_path):
    result = compare(*two)
    assert (result.name_a, result.name_b, result.paired_by) == ("base", "aligned", "prompt and seed")
    assert compare(*two, names=("left", "right")).name_b == "right"
    same = [write(tmp_path / x / "scores", [row("s", "p", 1.0, model="sd")]) for x in "cd"]
    assert distinct_names([read_results(f) for f in same]) == ("c/scores", "d/scores")


def test_pairs_by_sample_where_seeds_are_missing(tmp_path):
    a = write(tmp_path / "a", [row("s1", "p", 1.0), row("s2", "p", 5.0)])
    b = write(tmp_path / "b", [row("s2", "p", 6.0), row("s1", "p", 0.0)])
    result = compare(a, b)
    assert result.paired_by == "prompt and sample"
    assert result.score("hps").wins[3:] == (1, 0, 1, 2)
    with pytest.raises(ValueError, match="rows without a seed; pair by sample"):
        compare(a, b, pair_by="seed")
    with pytest.raises(ValueError, match="use 'auto', 'seed' or 'sample'"):
        compare(a, b, pair_by="position")


def test_the_same_sample_name_under_another_prompt_is_another_item(tmp_path):
    a = write(tmp_path / "a", [row("s1", "a cat", 1.0), row("s2", "a dog", 1.0)])
    b = write(tmp_path / "b", [row("s1", "a cat", 2.0), row("s2", "a fox", 2.0)])
    result = compare(a, b)
    assert (result.items, result.unmatched_a, result.unmatched_b) == (1, 1, 1)
    assert "1 items of a and 1 of b have no partner with the same prompt and sample" in result.remarks()[0]


def test_failures_are_counted_and_not_averaged(tmp_path):
    bad = {"status": "error", "reason": "CUDA out of memory"}
    a = write(tmp_path / "a", [row("1", "p", 1.0), row("2", "q", None, **bad), row("3", "r", 3.0), row("4", "s", 2.0)])
    b = write(tmp_path / "b", [row("1", "p", 2.0), row("2", "q", 9.0), row("3", "r", math.nan), row("4", "s", 2.5)])
    result = compare(a, b)
    score = result.score("hps")
    assert (score.n, score.failed, score.mean_a, score.mean_b) == (2, 2, 1.5, 2.25)
    assert "left out because a side has no score: hps 2" in " ".join(result.remarks())
    assert len(pair_rows(read_results(a), read_results(b), "hps")) == 2


def test_nothing_but_failures_gives_an_undefined_row(tmp_path):
    a = write(tmp_path / "a", [row("1", "p", None, status="error")], parts=1)
    b = write(tmp_path / "b", [row("1", "p", 2.0)], parts=1)
    score = compare(a, b).score("hps")
    assert score.n == 0 and score.failed == 1 and math.isnan(score.mean_a) and score.permutation_p == 1.0
    text = json.dumps(compare(a, b).to_json(), allow_nan=False)
    assert json.loads(text)["scores"][0]["wins"]["rate"] is None


@pytest.mark.parametrize(
    "column, other, called",
    [
        ("evaluator_version", 2, "evaluator version 1 in a, 2 in b"),
        ("params_hash", "p2", "parameters p1 in a, p2 in b"),
        ("weight_hash", "w2", "weights w1 in a, w2 in b"),
        ("decoder", "pillow 13.0", "media decoder pillow 12.0 in a, pillow 13.0 in b"),
    ],
)
def test_a_different_measuring_stick_is_refused_unless_allowed(tmp_path, column, other, called):
    a = write(tmp_path / "a", [row("1", "p", 1.0), row("2", "q", 1.0)])
    b = write(tmp_path / "b", [row("1", "p", 2.0, **{column: other}), row("2", "q", 2.0, **{column: other})])
    with pytest.raises(ValueError, match=called) as caught:
        compare(a, b)
    assert "not be the models'" in str(caught.value) and "Score both again" in str(caught.value)
    result = compare(a, b, allow_different=True)
    assert result.score("hps").wins.wins == 2
    assert called in result.remarks()[0]


def test_a_failed_row_without_weights_is_no_difference(tmp_path):
    failed = row("2", "q", None, status="error", weight_hash=None, decoder=None)
    a = write(tmp_path / "a", [row("1", "p", 1.0), failed])
    b = write(tmp_path / "b", [row("1", "p", 2.0), row("2", "q", 2.0)])
    assert compare(a, b).score("hps").n == 1


def test_scores_of_one_side_alone_are_said(tmp_path):
    a = write(tmp_path / "a", [row("1", "p", 1.0), row("1", "p", 1.0, "clip_score", "")])
    b = write(tmp_path / "b", [row("1", "p", 2.0), row("1", "p", 1.0, "aesthetic", "v2")])
    result = compare(a, b)
    assert (result.only_a, result.only_b) == (("clip_score",), ("aesthetic/v2",))
    assert result.remarks() == ["Scored in a alone: clip_score.", "Scored in b alone: aesthetic/v2."]
    with pytest.raises(ValueError, match="no score called 'hsp' was compared; there are hps"):
        result.score("hsp")


def test_direction_is_asked_for_said_or_given(tmp_path):
    a = write(tmp_path / "a", [row("1", "p", 1.0, "fvd")], {"hps": True}, parts=1)
    b = write(tmp_path / "b", [row("1", "p", 2.0, "fvd")], {"hps": True}, parts=1)
    assert "do not say which direction" in compare(a, b).remarks()[0]
    assert compare(a, b).score("fvd").wins.wins == 1
    given = compare(a, b, higher_is_better={"fvd": False})
    assert given.score("fvd").wins.losses == 1 and not given.remarks()


def test_mistakes_are_named(tmp_path):
    a = write(tmp_path / "a", [row("1", "p", 1.0)], parts=1)
    other = write(tmp_path / "b", [row("1", "p", 1.0, "clip_score")], parts=1)
    far = write(tmp_path / "c", [row("9", "z", 1.0)], parts=1)
    twice = write(tmp_path / "d", [row("1", "p", 1.0, seed=7), row("2", "p", 1.0, seed=7)])
    (tmp_path / "e").mkdir()
    with pytest.raises(ValueError, match="no score in common"):
        compare(a, other)
    with pytest.raises(ValueError, match=r"the first items are 'p', '1' and 'z', '9'"):
        compare(a, far)
    with pytest.raises(ValueError, match="samples '1' and '2' share the prompt 'p' and the seed 7"):
        compare(twice, twice)
    assert compare(twice, twice, pair_by="sample").score("hps").wins.ties == 2
    with pytest.raises(ValueError, match="not a results folder"):
        compare(a, tmp_path / "e")


def test_later_parts_replace_earlier_rows_and_broken_parts_are_named(tmp_path):
    a = write(tmp_path / "a", [row("1", "p", None, status="error"), row("1", "p", 4.0)])
    assert [r["score"] for r in read_results(a).rows] == [4.0]
    part = a / "parts/part-00001.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"part-00001.parquet cannot be read"):
        read_results(a)
    pq.write_table(pa.table({"sample": ["1"]}), part)
    with pytest.raises(ValueError, match="has no column prompt, media, evaluator"):
        read_results(a)


def test_table_prints_the_figures_and_takes_names_literally(two):
    result = compare(*two, names=("[red]base", "aligned"))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(result.table())
    text = console.export_text()
    score = result.score("hps")
    for expected in ("[red]base", signed_interval(score.difference), share_interval(score.wins), "(lower is better)"):
        assert expected in text


def test_json_round_trip(two, tmp_path):
    result = compare(*two)
    saved = json.loads(result.save(tmp_path / "new/comparison.json").read_text())
    first = saved["scores"][0]
    assert first["label"] == "hps" and first["difference"]["low"] == result.scores[0].difference.low
    assert first["wins"]["rate"] == result.scores[0].wins.rate and saved["unmatched_a"] == 0


def test_figures_are_readable():
    texts = [number(x) for x in (0, 0.273912, 12.34567, -1234.567, 4e-9, 1e9, math.nan, None)]
    assert texts == ["0", "0.2739", "12.35", "-1235", "4.000e-09", "1.000e+09", "–", "–"]  # noqa: RUF001
    assert signed_interval(Interval(0.0131, 0.0099, 0.0164)) == "+0.0131 [+0.0099, +0.0164]"
    assert signed_interval(Interval(2.0, math.nan, math.nan)) == "+2.00 [–, –]"  # noqa: RUF001
    assert share_interval(WinRate(0.715, 0.656, 0.767, 0, 0, 0, 0)) == "71.5 % [65.6, 76.7]"
    assert (p_value(0.0499), p_value(0.00001)) == ("0.050", "< 0.001")
