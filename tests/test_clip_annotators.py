"""Annotators of clips, judged clips for training, and the evaluator that tells the truth about clips."""

import json
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign import discovery, judgements
from mmalign.evaluation import Batch
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.jobs_inputs import Data
from mmalign.media import write_video
from mmalign.results import read_results
from mmalign.score import run
from mmalign.shapes.axes import AXES, axes, everything
from mmalign.shapes.clip_annotators import CLIP_ANNOTATORS, clip_utility, judge_axes
from mmalign.shapes.clip_data import DrawnClip, drawn_clips, judged_clips
from mmalign.shapes.clip_reader import read_clip
from mmalign.shapes.damage import MOTION, PICTURE, TEXT
from mmalign.shapes.motion import parse_motion
from mmalign.tasks import sources
from mmalign.testing.evaluators import check_evaluator

ROOT = Path(__file__).resolve().parents[1]
CAPTION = parse_motion("a red circle moves left quickly")


def test_tastes_decide():
    clips = {
        "VQ": DrawnClip(CAPTION, (3,), damages=(("noise", 0.8),)),
        "MQ": DrawnClip(CAPTION, (3,), damages=(("jitter", 0.8),)),
        "TA": DrawnClip(CAPTION, (3,), wrong="count"),
    }
    perfect = DrawnClip(CAPTION, (3,)).clip()
    for name, axis in (("visual", "VQ"), ("smooth", "MQ"), ("textual", "TA")):
        judge = CLIP_ANNOTATORS[name]
        worth = {fault: clip_utility(judge, CAPTION, clip.clip(), 8.0) for fault, clip in clips.items()}
        assert min(worth, key=worth.__getitem__) == axis
        assert clip_utility(judge, CAPTION, perfect, 8.0) == pytest.approx(1, abs=0.01)
    found = axes(CAPTION, read_clip(clips["MQ"].clip(), 8.0))
    assert clip_utility(CLIP_ANNOTATORS["balanced"], CAPTION, clips["MQ"].clip(), 8.0) == pytest.approx(
        np.mean(list(found.values()))
    )
    assert len({judge.user_id for judge in CLIP_ANNOTATORS.values()}) == len(CLIP_ANNOTATORS)
    assert all(name == judge.name for name, judge in CLIP_ANNOTATORS.items())


def test_answers_on_an_axis_are_as_frequent_as_the_closed_form():
    judge, rng = CLIP_ANNOTATORS["balanced"], np.random.default_rng(0)
    a, b = {"VQ": 0.8, "MQ": 0.5, "TA": 0.9}, {"VQ": 0.75, "MQ": 0.5, "TA": 1.0}
    draws = 8000
    answers = [judge_axes(judge, rng, a, b) for _ in range(draws)]
    for axis in AXES:
        counted = Counter(answer[axis] for answer in answers)
        for label, p in judge.probabilities(a[axis], b[axis]).items():
            assert abs(counted[label] / draws - p) <= 4.5 * np.sqrt(p * (1 - p) / draws)


def test_wrong_and_damaged_clips():
    perfect, wrong = DrawnClip(CAPTION, (1, 2)), DrawnClip(CAPTION, (1, 2), wrong="direction")
    assert wrong.scene.shapes[0].vx >= 0 > perfect.scene.shapes[0].vx
    spoilt = DrawnClip(CAPTION, (1, 2), damages=(("jitter", 0.5), ("blur", 0.5)))
    assert spoilt.scene == perfect.scene and not np.array_equal(spoilt.clip(), perfect.clip())
    assert len({perfect.hash(), wrong.hash(), spoilt.hash()}) == 3
    copy = pickle.loads(pickle.dumps(spoilt))
    assert copy == spoilt and np.array_equal(copy.clip(), spoilt.clip())


def test_longer_clips_leave_out_what_has_no_room():
    items = drawn_clips(1500, 9, counts=(0, 1), frames=17)
    assert all(len(item.scene.shapes) == 2 for item in items) and items[0].clip().shape[0] == 17
    with pytest.raises(ValueError, match="at most 17 frames"):
        drawn_clips(1, 9, frames=33)


def test_judged_clips_are_votes_on_what_the_reader_says():
    judge = CLIP_ANNOTATORS["textual"]
    for one in judged_clips(12, 3, "textual", votes=300, axes=AXES):
        rated = [axes(one.media[0].caption, read_clip(clip.clip(), 8.0)) for clip in one.media]
        assert one.prompts == (str(one.media[0].caption),) * 2 and one.user == judge.user_id and one.weight == 1
        assert one.scores == pytest.approx([judge.weigh(values) for values in rated])
        assert np.allclose(one.axis_scores, [[values[axis] for values in rated] for axis in AXES])
        for wins, (a, b) in zip((one.wins, *one.axes), (one.scores, *one.axis_scores), strict=True):
            p = judge.probabilities(a, b)
            assert wins[0, 1] == pytest.approx(p["A"] + p["same"] / 2, abs=4.5 * 0.5 / 300**0.5)
            assert wins[0, 1] + wins[1, 0] == 1 and wins[0, 0] == wins[1, 1] == 0.5


def test_judged_clips_differ_on_all_axes_and_not_together():
    scores = np.array([one.axis_scores for one in judged_clips(80, 4, "balanced", axes=AXES)])
    values = scores.transpose(1, 0, 2).reshape(3, -1)
    assert (values.std(1) > 0.1).all() and abs(np.corrcoef(values)[np.triu_indices(3, 1)]).max() < 0.4


def test_judged_clips_do_not_depend_on_processes_and_follow_the_seed():
    alone, together = (judged_clips(6, 5, "balanced", per_prompt=3, axes=AXES, processes=n) for n in (1, 2))
    for a, b in zip(alone, together, strict=True):
        assert a.media == b.media and a.scores == b.scores and np.array_equal(a.wins, b.wins)
        assert np.array_equal(a.axes, b.axes) and len(a.media) == 3
    other = judged_clips(6, 6, "balanced")
    assert [one.media for one in other] != [one.media for one in alone]
    assert all(clip.caption.held_out for one in judged_clips(3, 5, "balanced", held_out=True) for clip in one.media)


def test_dimensions_weigh_the_axes():
    plain = judged_clips(8, 7, "balanced", votes=5, axes=AXES)
    weighed = judged_clips(8, 7, "balanced", votes=5, axes=AXES, dimensions={"TA": 3.0, "MQ": 1.0})
    for a, b in zip(plain, weighed, strict=True):
        assert np.array_equal(a.axes, b.axes)
        assert np.allclose(b.wins, (3 * a.axes[2] + a.axes[1]) / 4)
    (one,) = judged_clips(1, 7, "balanced", axes=("MQ",))
    assert len(one.axes) == len(one.axis_scores) == 1 and one.axes[0].shape == (2, 2)
    (bare,) = judged_clips(1, 7, "balanced")
    assert bare.axes == bare.axis_scores == () and bare.scores == one.scores and np.array_equal(bare.wins, one.wins)


def test_judged_clips_become_pairs_for_training():
    data = Data.model_validate({"table": "any.jsonl", "axes": list(AXES), "ties": "soft", "soft_labels": True})
    judged = judged_clips(20, 8, "balanced", votes=5, axes=AXES)
    pairs = judgements.pairs(judged, data)
    assert len(pairs) == 20
    for pair, one in zip(pairs, judged, strict=True):
        first = one.media.index(pair.media[0])
        assert pair.values[0] == one.wins[first, 1 - first] >= 0.5 and pair.user == "shapes-clips-balanced"
        assert [axis[0] for axis in pair.axes] == [wins[first, 1 - first] for wins in one.axes]
        assert pair.media[0].clip().shape == (9, 32, 32, 3)
    assert len(sources.digest(pairs)) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"annotator": "faithful"}, "no annotator of clips is called 'faithful'; there are: balanced, visual"),
        ({"annotator": "balanced", "axes": ("VQ", "DQ")}, "not judged on DQ; axes are VQ, MQ, TA"),
        ({"annotator": "balanced", "dimensions": {"VQ": 0.0}}, "one is above 0"),
        ({"annotator": "balanced", "frames": 0}, "above 0"),
    ],
)
def test_other_judgements_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        judged_clips(1, 0, **arguments)


# --- the evaluator ---


def tensor(clip: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(clip).permute(0, 3, 1, 2)


def test_the_evaluator_says_what_the_reader_does():
    items = [item for one in judged_clips(6, 9, "smooth") for item in one.media]
    prompts = [str(item.caption) for item in items]
    batch = Batch(frames=[tensor(item.clip()) for item in items], prompts=prompts, fps=[item.fps for item in items])
    scores = discovery.load_evaluator("shapes_motion", {"annotator": "smooth"}, "cpu").score(batch)
    for i, item in enumerate(items):
        reading = read_clip(item.clip(), 8.0)
        for axis, value in axes(item.caption, reading).items():
            assert scores[axis][i] == pytest.approx(value)
        assert scores["everything"][i] == everything(item.caption, reading)
        assert scores["identity"][i] == reading.identity and scores["drop_free"][i] == 1 - reading.dropped
        assert scores["flicker_free"][i] == pytest.approx(np.exp(-((reading.flicker / 0.1) ** 2)))
        assert scores["utility"][i] == pytest.approx(
            clip_utility(CLIP_ANNOTATORS["smooth"], item.caption, item.clip(), 8)
        )
    two = parse_motion("a red circle moves left and a blue square moves left")
    half = DrawnClip(parse_motion("a red circle moves left and a blue square stands still"), (4,)).clip()
    batch = Batch(frames=[tensor(half)], prompts=[str(two)], fps=[8.0])
    assert discovery.load_evaluator("shapes_motion", device="cpu").score(batch)["direction"].tolist() == [0.5]


def test_the_evaluator_keeps_the_contract():
    asked = [str(item.caption) for item in drawn_clips(4, 10)]
    check_evaluator("shapes_motion", prompts=asked, sizes=[(32, 32), (33, 70), (2, 2), (64, 64)])


def test_a_prompt_outside_the_grammar_is_an_error_before_a_frame_is_read():
    broken = torch.zeros(9, 3, 32, 32)  # float: the reader would refuse it
    evaluator = discovery.load_evaluator("shapes_motion", device="cpu")
    with pytest.raises(ValueError, match="not a caption of moving shapes"):
        evaluator.score(Batch(frames=[broken] * 2, prompts=["a red circle moves left", "a dog runs"], fps=[8.0] * 2))
    with pytest.raises(ValueError, match="needs the clip's frames per second"):
        evaluator.score(Batch(frames=[broken], prompts=["a red circle moves left"], fps=[None]))
    with pytest.raises(ValueError, match="no annotator of clips 'bold'"):
        discovery.load_evaluator("shapes_motion", {"annotator": "bold"}, "cpu")


def test_clips_on_disk_are_scored_by_the_runner(tmp_path):
    """Lossless files give what the arrays give; the prompt outside the grammar is an error row, and the others stay."""
    items = drawn_clips(3, 11)
    rows = []
    for i, item in enumerate(items):
        write_video(tmp_path / f"{i}.mp4", tensor(item.clip()), item.fps, lossless=True)
        prompt = str(item.caption) if i else "a dog runs"
        rows.append({"sample": str(i), "prompt": prompt, "media": f"{i}.mp4", "modality": "video"})
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    spec = EvaluatorSpec(name="shapes_motion")
    run(ScoreConfig(table=tmp_path / "table.jsonl", output=tmp_path / "out", evaluators=[spec], device="cpu"))
    found = {(row["sample"], row["subscore"]): row for row in read_results(tmp_path / "out").rows}
    for i, item in enumerate(items):
        reading = read_clip(item.clip(), item.fps)
        for axis, value in axes(item.caption, reading).items() if i else ():
            assert found[str(i), axis]["status"] == "ok" and found[str(i), axis]["score"] == pytest.approx(value)
    refused = [row for (sample, _), row in found.items() if sample == "0"]
    assert refused and all(
        row["status"] == "error" and "not a caption of moving shapes" in row["reason"] for row in refused
    )


def test_the_table_of_faults_is_printed_by_its_command():
    script = [sys.executable, str(ROOT / "bench" / "shapes_axes.py"), "--count", "8"]
    printed = subprocess.run(script, check=True, capture_output=True, text=True, timeout=300).stdout
    cells = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    found = {name: [float(value) for value in values] for name, *values in cells if name != "fault"}
    assert set(found) == {"none", *PICTURE, *MOTION, *(f"another {part}" for part in TEXT)}
    assert min(found["none"][:4]) == 1 and found["another kind"][3] == 0 and found["repeat"][1] < 1
    page = (ROOT / "docs" / "shapes_video.md").read_text(encoding="utf-8")
    assert all(f"\n| {name} |" in page for name in (*PICTURE, *MOTION, *(f"another {part}" for part in TEXT)))
