"""The job that compares prompts: judges, people's answers, and going on as if it had not been stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmalign import optimise_prompt, sample
from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch
from mmalign.guidance import prompts as bandits
from mmalign.jobs_prompts import PromptsConfig
from mmalign.media import read_image, read_video
from mmalign.provenance import read_provenance
from mmalign.stats import mean_ci
from mmalign.testing.tiny_video import tiny_wan

ROOT = Path(__file__).resolve().parents[1]
BOLD = {"name": "shapes_truth", "params": {"annotator": "bold"}, "subscore": "utility"}
WORDS = "a {small |large |}red circle{ on a white background|}"


def _config(output: Path, **changes: Any) -> PromptsConfig:
    tree = {
        "model": {"path": ROOT / "assets" / "shapes-sd"}, "output": output, "wish": "a red circle", "device": "cpu",
        "steps": 2, "guidance_scale": 2.0, "scheduler": "ddim", "per_prompt": 2, "comparisons": 5,
        "candidates": {"kind": "template", "text": WORDS}, "embedding": {"kind": "choices"},
        "judge": {"kind": "evaluator", "rewards": [BOLD], "temperature": 0.1},
        "bandit": {"initial": 2, "hidden": [8], "seed": 3}, **changes,
    }  # fmt: skip
    return PromptsConfig.model_validate(tree)


@pytest.fixture(scope="module", name="done")
def _done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prompts") / "out"
    optimise_prompt.run(_config(output))
    return output


def _lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "comparisons.jsonl").read_text().splitlines()]


def test_what_was_compared_is_what_the_bandit_chooses(done: Path) -> None:
    rows, candidates = _lines(done), bandits.expand(WORDS)
    x = bandits.standardised(bandits.choice_features(candidates))
    assert [row["number"] for row in rows] == list(range(5)) and len(candidates) == 6
    for number, row in enumerate(rows):
        assert row["seeds"] == [2 * number, 2 * number + 1]
        before = rows[:number]
        pairs, shares = [(r["a"], r["b"]) for r in before], [r["share"] for r in before]
        if number < 2:
            expected = bandits.random_pair(6, 3, number)
            assert (row["a"], row["b"]) == expected
        else:
            belief = bandits.believe(x, pairs, shares, hidden=(8,), ridge=0.1, seed=3)
            assert {row["a"], row["b"]} == set(bandits.next_pair(belief, pairs, [], ridge=0.1, nu=0.3))


def test_the_judge_looks_at_the_pictures_of_both_prompts_for_the_wish(done: Path) -> None:
    truth = load_evaluator("shapes_truth", {"annotator": "bold"}, "cpu")
    candidates = bandits.expand(WORDS)
    for row in _lines(done)[:2]:
        for k, score in zip((row["a"], row["b"]), row["scores"], strict=True):
            pictures = [read_image(done / "images" / f"{k:05d}-{seed}.png") for seed in row["seeds"]]
            images = [torch.from_numpy(picture).permute(2, 0, 1) for picture in pictures]
            told = truth.score(Batch(images=images, prompts=["a red circle"] * 2))
            assert isinstance(told, dict)
            assert score == pytest.approx(told["utility"].mean().item(), abs=1e-9)
    settings = optimise_prompt._sampling(_config(done))
    adapter = sample.load(settings, torch.device("cpu"))
    row = _lines(done)[0]
    asked = sample.Request(candidates[row["a"]].prompt, row["seeds"][1], "x")
    ((_, (image,)),) = sample.generate(adapter, [asked], settings)
    drawn = read_image(done / "images" / f"{row['a']:05d}-{row['seeds'][1]}.png")
    assert np.abs(image.astype(int) - drawn.astype(int)).max() <= 1


def test_best_is_the_highest_of_those_compared(done: Path) -> None:
    found = json.loads((done / "best.json").read_text())
    rows = _lines(done)
    compared = [each for each in found["ranking"] if each["compared"]]
    assert found["prompt"] == compared[0]["prompt"] and found["comparisons"] == 5
    assert sum(each["compared"] for each in found["ranking"]) == 10 and len(found["ranking"]) == 6
    assert sum(each["won"] * each["compared"] for each in compared) == pytest.approx(5)
    assert [each["score"] for each in found["ranking"]] == sorted((e["score"] for e in found["ranking"]), reverse=True)
    assert len({row["seeds"][0] for row in rows}) == 5


@pytest.mark.parametrize("kept", [0, 3])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(done: Path, tmp_path: Path, kept: int) -> None:
    """Killed after `kept` comparisons, in the middle of drawing the next."""
    output = tmp_path / "out"
    shutil.copytree(done, output)
    lines = (output / "comparisons.jsonl").read_text().splitlines(keepends=True)
    (output / "comparisons.jsonl").write_text("".join(lines[:kept]))
    (output / "best.json").unlink()
    for path in sorted((output / "images").glob("*.png"))[::2]:
        path.unlink()
    optimise_prompt.run(_config(output))
    for name in ("comparisons.jsonl", "best.json"):
        assert (output / name).read_bytes() == (done / name).read_bytes()
    for path in (output / "images").glob("*.png"):
        assert path.read_bytes() == (done / "images" / path.name).read_bytes()


def test_more_comparisons_go_on_and_other_settings_are_refused(done: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(done, output)
    optimise_prompt.run(_config(output, comparisons=6, batch_size=3))
    assert _lines(output)[:5] == _lines(done) and len(_lines(output)) == 6
    with pytest.raises(ValueError, match="made with other values of: wish"):
        optimise_prompt.run(_config(output, wish="a blue circle"))
    with pytest.raises(ValueError, match="made with other values of: judge"):
        optimise_prompt.run(_config(output, judge={"kind": "evaluator", "rewards": [BOLD]}))


# ------------------------------------------------------------------------------------------------ people


def test_people_are_asked_and_their_answers_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    bandit = {"initial": 2, "hidden": [], "round": 2}
    config = _config(output, judge={"kind": "person"}, bandit=bandit, comparisons=3)
    optimise_prompt.run(config)
    assert "2 of 2 comparisons wait for an answer" in capsys.readouterr().err
    asked = [json.loads(line) for line in (output / "to_compare.jsonl").read_text().splitlines()]
    assert [row["pair"] for row in asked] == ["c000000", "c000001"]
    assert {row["prompt"] for row in asked} == {"a red circle"}
    page = (output / "to_compare.html").read_text()
    assert page.count("<article") == 2 and "data:image" in page
    assert "the folder of this page" in page and "prefer merge" not in page
    assert read_image(output / asked[0]["a"]).shape == (64, 128, 3), "both pictures of a prompt, side by side"
    # One answer from the page, by two people who do not agree; the other is still open.
    (output / "answers-anna.jsonl").write_text(json.dumps({**asked[0], "answer": "A", "user_id": "anna"}) + "\n")
    (tmp_path / "more.csv").write_text("pair,answer,user_id\nc000000,same,ben\n")
    optimise_prompt.run(config, [tmp_path / "more.csv"])
    assert "1 of 2 comparisons wait" in capsys.readouterr().err and not (output / "comparisons.jsonl").exists()
    # The other one in the table itself.
    rows = [{**asked[0]}, {**asked[1], "answer": "B", "user_id": "anna"}]
    (output / "to_compare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    optimise_prompt.run(config, [tmp_path / "more.csv"])
    assert [row["share"] for row in _lines(output)] == [0.75, 0.0]
    last = [json.loads(line) for line in (output / "to_compare.jsonl").read_text().splitlines()]
    assert [row["pair"] for row in last] == ["c000002"] and "1 of 1 comparisons wait" in capsys.readouterr().err
    (output / "answers-2.jsonl").write_text(json.dumps({**last[0], "answer": "same"}) + "\n")
    found = json.loads(optimise_prompt.run(config).read_text())
    assert found["comparisons"] == found["of"] == 3
    assert not (output / "to_compare.html").exists(), "nothing waits any more"


# ------------------------------------------------------------------------------------------------ parts


def test_a_simulated_person_answers_by_bradley_terry() -> None:
    answers = [optimise_prompt.answer(0.6, 0.5, 0.1, (1, number)) for number in range(2000)]
    low, high = mean_ci(answers)[1:]
    assert low < 1 / (1 + np.exp(-1)) < high and set(answers) == {0.0, 1.0}
    assert answers[:50] == [optimise_prompt.answer(0.6, 0.5, 0.1, (1, number)) for number in range(50)]
    assert [optimise_prompt.answer(a, b, 0.0, ()) for a, b in [(1, 0), (0, 1), (2, 2)]] == [1.0, 0.0, 0.5]
    inf = float("inf")
    assert optimise_prompt.answer(-inf, 0.1, 0.1, (1, 1)) == 0.0
    assert optimise_prompt.answer(-inf, -inf, 0.0, ()) == 0.5


def test_a_round_is_chosen_at_once_and_asks_no_pair_twice() -> None:
    config = _config(Path("x"), bandit={"initial": 1, "round": 4, "hidden": []}, comparisons=9)
    x = bandits.standardised(bandits.choice_features(bandits.expand(WORDS)))
    first = optimise_prompt.propose(config, x, [])
    assert [each.number for each in first] == [0, 1, 2, 3]
    assert len({frozenset((each.a, each.b)) for each in first[1:]}) == 3
    done = [optimise_prompt.Comparison(c.number, c.a, c.b, c.seeds, 1.0) for c in first] * 2
    assert len(optimise_prompt.propose(config, x, done)) == 1, "no more than are left"
    sides = [
        optimise_prompt.propose(
            config.model_copy(update={"bandit": config.bandit.model_copy(update={"seed": s})}), x, done
        )
        for s in range(20)
    ]
    assert len({each[0].a for each in sides}) > 1, "the favourite does not always stand left"


def test_embeddings_of_a_prompt_do_not_depend_on_the_others() -> None:
    config = _config(Path("x"), embedding={"kind": "model"})
    adapter = sample.load(optimise_prompt._sampling(config), torch.device("cpu"))
    candidates = bandits.expand(WORDS)
    own = optimise_prompt.embedded(config, candidates, adapter)
    encoded = adapter.encode_prompt([candidates[2].prompt])["encoder_hidden_states"][0].double()
    assert torch.allclose(own[2], encoded.mean(0), atol=1e-6) and len({tuple(row.tolist()) for row in own}) == 6
    clip = _config(Path("x"), embedding={"kind": "clip", "checkpoint": ROOT / "assets" / "shapes-clip"})
    texts = optimise_prompt.embedded(clip, candidates, adapter)
    assert torch.allclose(texts.norm(dim=1), torch.ones(6, dtype=torch.float64), atol=1e-5)
    assert torch.equal(optimise_prompt.embedded(clip, candidates[2:3], adapter)[0], texts[2])


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\na large red circle\n\n")
    config = _config(
        tmp_path, candidates={"kind": "file", "path": tmp_path / "prompts.txt"}, embedding={"kind": "model"}
    )
    assert [each.prompt for each in optimise_prompt.listed(config)] == ["a red circle", "a large red circle"]
    (tmp_path / "prompts.txt").write_text("a red circle\na red circle\n")
    with pytest.raises(ValueError, match="'a red circle' comes twice"):
        optimise_prompt.listed(config)
    with pytest.raises(ValueError, match="there is 1; give two or more"):
        optimise_prompt.listed(_config(tmp_path, candidates={"kind": "template", "text": "a red circle"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"candidates": {"kind": "file", "path": "x.txt"}}, "choices are those of a template"),
        ({"judge": {"kind": "person"}, "wish": None}, "have to be told what to look for"),
        ({"judge": {"kind": "evaluator", "rewards": [{**BOLD, "weight": 0}]}}, "weights of all rewards are 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _config(Path("x"), **changes)


# ------------------------------------------------------------------------------------------------ clips

STILLS = (0, 1, 2, 3, 5, 6, 7, 8)  # of nine frames, eight evenly spaced
MOTION = [
    {"name": "shapes_motion", "subscore": "VQ"},
    {"name": "shapes_place", "weight": 0.5},
]


@pytest.fixture(scope="module", name="wan")
def _wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan(tmp_path_factory.mktemp("wan") / "wan")


def _of_clips(wan: Path, output: Path, **changes: Any) -> PromptsConfig:
    judge = {"kind": "evaluator", "rewards": MOTION, "reward_frames": 8}
    told = {"frames": 9, "fps": 12.0, "height": 32, "width": 32, "lossless": True, "comparisons": 3}
    words = {"kind": "template", "text": "a {small |large |}red circle moves left{ quickly|}"}
    wish = "a red circle moves left"
    drawn = {"model": {"path": wan}, "scheduler": "own", "candidates": words, "wish": wish, "judge": judge}
    return _config(output, **{**drawn, **told, **changes})


@pytest.fixture(scope="module", name="filmed")
def _filmed(wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("clips") / "out"
    optimise_prompt.run(_of_clips(wan, output))
    return output


def test_the_judge_sees_clips_whole_and_evaluators_of_images_their_frames(filmed: Path) -> None:
    """Each score again from the files: the motion reader on all nine frames, the reader of places on eight of them."""
    motion = load_evaluator("shapes_motion", {}, "cpu")
    place = load_evaluator("shapes_place", {}, "cpu")
    wish, rows = "a red circle moves left", _lines(filmed)
    assert len(rows) == 3
    for row in rows:
        for k, score in zip((row["a"], row["b"]), row["scores"], strict=True):
            alone = []
            for seed in row["seeds"]:
                clip = read_video(filmed / "videos" / f"{k:05d}-{seed}.mp4")
                assert clip.frames.shape == (9, 3, 32, 32) and clip.fps == 12.0
                seen = motion.score(Batch(frames=[clip.frames], prompts=[wish], fps=[12.0], aux=[{}]))
                found = place.score(Batch(images=[clip.frames[at] for at in STILLS], prompts=[wish] * 2))
                where = found if isinstance(found, torch.Tensor) else next(iter(found.values()))
                assert isinstance(seen, dict)
                alone.append(seen["VQ"].item() + 0.5 * where.double().mean().item())
            assert score == pytest.approx(np.mean(alone), abs=1e-5)
        gap = row["scores"][0] - row["scores"][1]
        assert row["share"] == (np.sign(gap) + 1) / 2


def test_clips_tell_how_they_were_drawn(filmed: Path) -> None:
    row, candidates = _lines(filmed)[0], bandits.expand("a {small |large |}red circle moves left{ quickly|}")
    clip = filmed / "videos" / f"{row['a']:05d}-{row['seeds'][1]}.mp4"
    found = read_provenance(clip)
    assert found is not None and found == json.loads(clip.with_suffix(".json").read_text())
    assert (found["prompt"], found["seed"]) == (candidates[row["a"]].prompt, row["seeds"][1])
    assert (found["frames"], found["fps"], found["steps"]) == (9, 12.0, 2) and "transformer" in found["model"]["parts"]


def test_clips_go_on_to_the_same_bytes(filmed: Path, wan: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(filmed, output)
    lines = (output / "comparisons.jsonl").read_text().splitlines(keepends=True)
    (output / "comparisons.jsonl").write_text("".join(lines[:1]))
    later = [path for path in sorted((output / "videos").glob("*.mp4")) if int(path.stem.split("-")[1]) > 1]
    for path in later[::2]:
        path.unlink()
    optimise_prompt.run(_of_clips(wan, output))
    for path in [filmed / "comparisons.jsonl", filmed / "best.json", *(filmed / "videos").iterdir()]:
        assert (output / path.relative_to(filmed)).read_bytes() == path.read_bytes()
    with pytest.raises(ValueError, match="made with other values of: fps"):
        optimise_prompt.run(_of_clips(wan, output, fps=8.0))


def test_people_are_shown_clips_that_play(wan: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    person = {"judge": {"kind": "person"}, "comparisons": 1, "bandit": {"initial": 1, "hidden": []}}
    optimise_prompt.run(_of_clips(wan, output, **person))
    page = (output / "to_compare.html").read_text()
    assert page.count("<video") == page.count("data:video/mp4") == 2
    (asked,) = [json.loads(line) for line in (output / "to_compare.jsonl").read_text().splitlines()]
    assert asked["a"].endswith("-a.mp4") and asked["prompt"] == "a red circle moves left"
    (drawn,) = optimise_prompt.propose(_of_clips(wan, output, **person), torch.zeros(6, 2).double(), [])
    beside = read_video(output / asked["a"])
    assert beside.frames.shape == (9, 3, 32, 64) and beside.fps == 12.0, "both clips of a prompt, side by side"
    for half, seed in zip(beside.frames.split(32, dim=3), drawn.seeds, strict=True):
        own = read_video(output / "videos" / f"{drawn.a:05d}-{seed}.mp4").frames
        assert (half.float() - own.float()).abs().mean() < 32, "the sheet is lossy, and 4:2:0"
    (output / "answers.jsonl").write_text(json.dumps({**asked, "answer": "B"}) + "\n")
    found = json.loads(optimise_prompt.run(_of_clips(wan, output, **person)).read_text())
    assert found["comparisons"] == 1 and [row["share"] for row in _lines(output)] == [0.0]


def test_what_cannot_be_drawn_or_judged_is_refused_before_anything_is_written(wan: Path, tmp_path: Path) -> None:
    goes_on = tiny_wan(tmp_path / "i2v", image=True)
    for changes, said in (
        ({"model": {"path": goes_on}}, "go on from a picture"),
        ({"frames": 6}, "frames: 6 frames do not fit"),
        ({"model": {"path": ROOT / "assets" / "shapes-sd"}}, "frames: the model of .* draws pictures"),
    ):
        with pytest.raises(ValueError, match=said):
            optimise_prompt.run(_of_clips(wan, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
