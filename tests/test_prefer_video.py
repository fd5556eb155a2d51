"""`mmalign prefer` on clips: rankings, pairs, questions, relabelling, merging and audits, with the same keys."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from film_kit import numbered, numbers, timed
from media_kit import encode, moving
from prefer_kit import answer, config, questions, rows_of, settings, summary_of
from table_kit import png, put_json

from mmalign import audit, labelling, prefer, routing
from mmalign.jobs_inputs import Data
from mmalign.jobs_prefer import PreferConfig
from mmalign.media import read_video
from mmalign.report_media import inline
from mmalign.tables import read_media_table, read_preferences
from mmalign.tasks import sources

pytestmark = pytest.mark.usefixtures("colour_evaluators")

REWARDS: tuple[dict[str, Any], ...] = (
    {"name": "motion", "subscore": "rise", "column": "rise"},
    {"name": "motion", "subscore": "seconds", "column": "seconds"},
    {"name": "dimness", "column": "dim"},
)
CLIPS = {  # grey of the first and last frame, number of frames, frames per second
    "agreed": [(40, 80, 8, 4), (40, 60, 8, 8), (60, 60, 4, 8)],
    "fought": [(10, 90, 4, 8), (30, 50, 8, 8), (200, 190, 8, 4)],
}
SCORES = {
    prompt: np.array([(last - first, count / fps, -(first + last) / 2) for first, last, count, fps in clips])
    for prompt, clips in CLIPS.items()
}


def shown(first: int, last: int, count: int, fps: int) -> np.ndarray:
    """The luma on screen at every eighth of a second."""
    levels = np.round(np.linspace(first, last, count)) / 255
    return levels[[int(k * fps / 8 + 1e-9) for k in range(int(np.ceil(count * 8 / fps)))]]


MEASURES = {
    "seconds": lambda first, last, count, fps: count / fps,
    "frames per second": lambda first, last, count, fps: fps,
    "motion": lambda *clip: np.abs(np.diff(shown(*clip))).mean(),
    "brightness": lambda *clip: shown(*clip).mean(),
}


def fading(path: Path, first: int, last: int, count: int, fps: int) -> Path:
    """A clip whose grey goes evenly from the first frame to the last."""
    levels = np.round(np.linspace(first, last, count)).astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (count, 16, 24, 3))
    step = Fraction(1, fps)
    return timed(path, np.ascontiguousarray(frames), [i * step for i in range(count)], last=step)


def clip_table(folder: Path, clips: dict[str, Sequence[tuple[int, int, int, int]]] = CLIPS) -> Path:
    """A media table with rates and numbers of frames."""
    rows = []
    for prompt, each in clips.items():
        for first, last, count, fps in each:
            name = f"clip-{len(rows)}.mp4"
            fading(folder / name, first, last, count, fps)
            rows.append(
                {"media": name, "prompt": prompt, "fps": fps, "num_frames": count, "model": f"m{len(rows) % 3}"}
            )
    return put_json(folder / "table.jsonl", rows)


@pytest.fixture(name="clips")
def _clips(tmp_path: Path) -> Path:
    return clip_table(tmp_path)


def job(output: Path, source: Path, **changes: Any) -> PreferConfig:
    return config(output, source, **{"rewards": list(REWARDS), **changes})


def test_a_ranking_of_clips_keeps_scores_rates_and_models(tmp_path: Path, clips: Path) -> None:
    rows = rows_of(prefer.run(job(tmp_path / "out", clips)))
    assert [(row.prompt, len(row.media)) for row in rows] == [("agreed", 3), ("fought", 3)]
    for row in rows:
        expected = SCORES[row.prompt]
        assert row.scores is not None and list(row.scores) == ["phi", "rise", "seconds", "dim"]
        found = np.array([row.scores[name] for name in ("rise", "seconds", "dim")]).T
        assert found[:, :2] == pytest.approx(expected[:, :2]) and found[:, 2] == pytest.approx(expected[:, 2], abs=2)
        assert row.scores["phi"] == pytest.approx(labelling.phi(expected))
        assert row.fps == tuple(float(fps) for *_, fps in CLIPS[row.prompt])
        assert row.num_frames == tuple(count for *_, count, _ in CLIPS[row.prompt])
        assert row.models == ("m0", "m1", "m2")
    kept = read_media_table(tmp_path / "out/pictures.jsonl")
    assert {row.modality for row in kept} == {"video"} and kept[0].fps == 4.0 and kept[0].num_frames == 8
    found = summary_of(tmp_path / "out")["sources"]
    assert set(found) == {"m0", "m1", "m2"}
    assert found["m0"]["phi"]["mean"] == pytest.approx(np.mean([labelling.phi(each)[0] for each in SCORES.values()]))


def test_pairs_of_clips_are_trained_on(tmp_path: Path, clips: Path) -> None:
    label = {"kind": "pairs", "select": "best_worst", "weight": "strength"}
    table = prefer.run(job(tmp_path / "out", clips, label=label))
    data = Data(table=table, dimension="phi", frames=4, fps=8.0, resolution=16, cache="off")
    groups, summary = sources.groups(data, "pairs")
    for group, row in zip(groups, rows_of(table), strict=True):
        phi = labelling.phi(SCORES[row.prompt])
        places = [int(Path(ref.file).stem[-1]) % 3 for ref in group.media]
        assert places == [int(phi.argmax()), int(phi.argmin())] and row.fps is not None
    assert "clips are taken resampled to 8 frames per second" in summary


def test_questions_about_clips_and_answers(tmp_path: Path, clips: Path) -> None:
    out = tmp_path / "out"
    table = prefer.run(job(out, clips, route={"count": 2}, label={"kind": "pairs", "select": "all"}))
    asked = questions(out)
    assert asked and all(row["a"].endswith(".mp4") for row in asked)
    page = (out / "to_label.html").read_text()
    assert page.count("<article") == len(asked)
    playing = re.findall(r'<video src="data:video/mp4;base64,([^"]+)"', page)
    shown = [name for row in asked for name in (row["a"], row["b"])]
    for encoded, name in zip(playing, shown, strict=True):
        told, real = read_video(base64.b64decode(encoded)), read_video(out / name)
        assert (told.num_frames, told.fps) == (real.num_frames, real.fps), "every frame, at its own rate"
        assert (told.frames.double().mean((1, 2, 3)) - real.frames.double().mean((1, 2, 3))).abs().max() < 3
    given = answer(tmp_path, {"pair": asked[0]["pair"], "answer": "B", "user_id": "anna"})
    merged = routing.merge(table, [given], out / "merged.jsonl")
    assert merged.replaced == 1
    (row,) = [row for row in rows_of(out / "merged.jsonl") if row.user_id == "anna"]
    before = {ref: facts for each in rows_of(table) for ref, *facts in
              zip(each.media, each.fps or (), each.num_frames or (), each.models or (), strict=True)}  # fmt: skip
    assert [list(facts) for facts in zip(row.fps, row.num_frames, row.models, strict=True)] == [
        before[ref] for ref in row.media
    ]


def test_a_page_shows_clips_as_they_play(tmp_path: Path) -> None:
    """One of variable rate by its times at 30 frames per second, and of a long one 240 frames."""
    jumps = [Fraction(n, 30) for n in (0, 1, 2, 13, 14, 15)]
    timed(tmp_path / "jumps.mp4", numbered(6), jumps, last=Fraction(1, 30))
    tile = inline(tmp_path / "jumps.mp4", 64)
    assert tile.video is not None and (tile.width, tile.height) == (24, 16)
    seen = read_video(base64.b64decode(tile.video.partition(",")[2]))
    frames = seen.frames.permute(0, 2, 3, 1).numpy()
    assert seen.fps == 30.0 and numbers(frames) == [0, 1, *[2] * 11, 3, 4, 5]
    encode(tmp_path / "long.mp4", moving(500, 32, 48), fps=25)
    seen = read_video(base64.b64decode(inline(tmp_path / "long.mp4", 64).video.partition(",")[2]))
    assert seen.num_frames == 240 and seen.num_frames / seen.fps == pytest.approx(20, abs=0.05)


def test_a_video_preference_set_is_relabelled(tmp_path: Path, clips: Path) -> None:
    """VideoAlign's table: its three axes are one choice, its rates and models stay."""
    head = "path_A,path_B,prompt,VQ,MQ,TA,fps_A,num_frames_A,fps_B,num_frames_B,A_model,B_model,Overall"
    lines = [
        "clip-0.mp4,clip-2.mp4,agreed,A,B,same,4,8,8,4,m0,m2,A",
        "clip-3.mp4,clip-4.mp4,fought,B,A,A,8,4,8,8,m0,m1,B",
    ]
    (tmp_path / "videogen-rewardbench.csv").write_text("\n".join([head, *lines]) + "\n")
    relabel = {"table": tmp_path / "videogen-rewardbench.csv", "dimension": "MQ"}
    values = settings(tmp_path / "out", clips, rewards=list(REWARDS), relabel=relabel)
    values.pop("sources")
    rows = rows_of(prefer.run(PreferConfig.model_validate(values)))
    assert [row.models for row in rows] == [("m0", "m2"), ("m0", "m1")] and rows[0].num_frames == (8, 4)
    former = summary_of(tmp_path / "out")["former"]
    rise = [SCORES["agreed"][[0, 2], 0], SCORES["fought"][[0, 1], 0]]
    agrees = [values[1] > values[0] for values in rise[:1]] + [values[0] > values[1] for values in rise[1:]]
    assert former["rise"]["share"] == pytest.approx(np.mean(agrees)) and former["rise"]["n"] == 2
    with pytest.raises(ValueError, match="choose one as the dimension"):
        values["relabel"] = {"table": tmp_path / "videogen-rewardbench.csv"}
        prefer.run(PreferConfig.model_validate({**values, "output": tmp_path / "other"}))


def test_an_audit_of_clips(tmp_path: Path, clips: Path) -> None:
    table = prefer.run(job(tmp_path / "out", clips, label={"kind": "pairs", "select": "all"}))
    found = json.loads(audit.run(table, output=tmp_path / "audit.json").read_text())
    assert found["pairs"] == 6 and found["rewards"]["rise"]["accuracy"]["n"] == 6
    again = json.loads(audit.run(table, output=tmp_path / "b.json", scores=[tmp_path / "out/scores"]).read_text())
    assert any(name.endswith("/rise") for name in again["rewards"])
    winners = [(CLIPS[row.prompt], row) for row in rows_of(table)]
    ahead: dict[str, list[float]] = {"seconds": [], "frames per second": [], "motion": [], "brightness": []}
    for clips, row in winners:
        places = [int(Path(ref.file).stem[-1]) % 3 for ref in row.media]
        a, b = (clips[place] for place in places)
        sign = np.sign(row.scores["phi"][0] - row.scores["phi"][1])
        for name, measure in MEASURES.items():
            ahead[name] += [sign * (measure(*a) - measure(*b))] if sign else []
    for name, values in ahead.items():
        assert found["biases"][name]["difference"]["mean"] == pytest.approx(np.mean(values), abs=0.01), name
        assert found["biases"][name]["difference"]["n"] == len(values)
    assert not any("clips" in remark for remark in found["remarks"])


def test_a_clip_that_cannot_be_read_leaves_its_list(tmp_path: Path, clips: Path) -> None:
    (tmp_path / "clip-0.mp4").write_bytes((tmp_path / "clip-0.mp4").read_bytes()[:400])
    rows = rows_of(prefer.run(job(tmp_path / "out", clips)))
    assert [(row.prompt, len(row.media)) for row in rows] == [("agreed", 2), ("fought", 3)]
    dropped = summary_of(tmp_path / "out")["dropped"]
    assert dropped["not scored by rise"]["count"] == 1 and "clip-0.mp4" in str(dropped)


def test_an_evaluator_of_pictures_alone_cannot_rank_clips(tmp_path: Path, clips: Path) -> None:
    rewards = [*REWARDS, {"name": "colours", "subscore": "red"}]
    with pytest.raises(ValueError, match=r"colours scores images; every row of .* is of modality video"):
        prefer.run(job(tmp_path / "out", clips, rewards=rewards))


def test_clips_and_pictures_are_not_ranked_together_by_an_evaluator_of_clips(tmp_path: Path, clips: Path) -> None:
    (tmp_path / "still.png").write_bytes(png(30, 16))
    with open(clips, "a") as file:
        file.write(json.dumps({"media": "still.png", "prompt": "agreed"}) + "\n")
    rows = rows_of(prefer.run(job(tmp_path / "out", clips)))
    assert [len(row.media) for row in rows] == [3, 3]
    assert "motion scores videos; this is a image" in str(summary_of(tmp_path / "out")["dropped"]["not scored by rise"])


def test_clips_that_a_model_draws_are_ranked(tmp_path: Path) -> None:
    from mmalign.testing.tiny_video import tiny_wan

    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    model = {"path": tiny_wan(tmp_path / "wan")}
    drawn = {"kind": "sample", "name": "tiny", "model": model, "steps": 1, "per_prompt": 2, "device": "cpu",
             "height": 32, "width": 32, "frames": 5, "fps": 8, "lossless": True}  # fmt: skip
    rewards = [REWARDS[0], REWARDS[2]]
    values = {"sources": [drawn], "prompts": tmp_path / "prompts.txt", "rewards": rewards}
    rows = rows_of(prefer.run(config(tmp_path / "out", tmp_path, **values)))
    assert [row.prompt for row in rows] == ["a red circle", "a blue square"]
    for row in rows:
        assert (row.fps, row.num_frames, row.models) == ((8.0, 8.0), (5, 5), ("tiny", "tiny"))
        seen = [read_video(ref).frames.double().mean((1, 2, 3)) for ref in row.media]
        assert row.scores["rise"] == pytest.approx([float(mean[-1] - mean[0]) for mean in seen])


def test_the_table_is_read_back_as_it_was_written(tmp_path: Path, clips: Path) -> None:
    table = prefer.run(job(tmp_path / "out", clips))
    first = table.read_bytes()
    lines = [json.loads(line) for line in first.decode().splitlines()]
    assert lines[0]["fps"] == [4.0, 8.0, 8.0] and lines[0]["num_frames"] == [8, 8, 4]
    prefer.run(job(tmp_path / "out", clips))
    assert table.read_bytes() == first and len(read_preferences(table).rows) == 2
