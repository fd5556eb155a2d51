"""Preference tables of clips: VideoAlign, VideoGen-RewardBench, VideoDPO, HPDv3, plain rows; axes, lengths, rates."""

from __future__ import annotations

import csv
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from film_kit import steady
from table_kit import pairs, put_json

from mmalign.jobs_inputs import Data
from mmalign.losses.pairwise import diffusion_dpo
from mmalign.preference_row import Dropped, PreferenceRow
from mmalign.records import MediaRef
from mmalign.tables import read_preferences, write_preferences
from mmalign.tasks import sources

COLUMNS = ("path_A", "path_B", "prompt", "VQ", "MQ", "TA", "fps_A", "num_frames_A", "fps_B", "num_frames_B")


def put_csv(path: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = COLUMNS) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(number: int, vq: str, mq: str, ta: str, **more: Any) -> dict[str, Any]:
    facts = {"fps_A": 24, "num_frames_A": 49, "fps_B": 7.96, "num_frames_B": 16}
    paths = {"path_A": f"./videos/{number}_A.mp4", "path_B": f"./videos/{number}_B.mp4"}
    return {**paths, "prompt": f"prompt, {number}", "VQ": vq, "MQ": mq, "TA": ta, **facts, **more}


def reasons(dropped: list[Dropped]) -> list[tuple[str, str]]:
    return [(each.origin, each.reason) for each in dropped]


# ------------------------------------------------------------------------------------------------ formats


def test_videoalign(tmp_path: Path) -> None:
    rows = [
        row(0, "A", "B", "same"),
        row(1, "A", "invalid", ""),
        row(2, "", "invalid", ""),
        row(3, "A", "draw", "B"),
        row(4, "B", "B", "B", prompt=""),
        row(5, "same", "same", "same", fps_A=-1),
        row(6, "B", "A", "A", fps_A="", num_frames_B=""),
    ]
    table = read_preferences(put_csv(tmp_path / "data.csv", rows), verify=False)
    first, second, last = table.rows
    assert first.label == {"VQ": "A", "MQ": "B", "TA": "same"} and first.prompt == "prompt, 0"
    assert first.media == tuple(MediaRef(str(tmp_path / f"videos/0_{side}.mp4")) for side in "AB")
    assert (first.fps, first.num_frames, first.models, first.source) == ((24.0, 7.96), (49, 16), None, "videoalign")
    assert second.label == {"VQ": "A"}, "invalid and empty: the axis was not judged"
    assert (last.fps, last.num_frames) == ((None, 7.96), (49, None))
    assert reasons(table.dropped) == [
        ("data.csv row 2", "no label"), ("data.csv row 3", "unknown label"),
        ("data.csv row 4", "no prompt or path"), ("data.csv row 5", "bad fps"),
    ]  # fmt: skip
    assert "MQ is 'draw'" in table.dropped[1].detail
    columns = tuple(name for name in COLUMNS if name != "MQ")
    without = [{name: value for name, value in each.items() if name != "MQ"} for each in rows[:2]]
    fewer = read_preferences(put_csv(tmp_path / "fewer.csv", without, columns), verify=False)
    assert [each.label for each in fewer.rows] == [{"VQ": "A", "TA": "same"}, {"VQ": "A"}]


@pytest.mark.parametrize("overall", ["Overall", "ALL"])
def test_videogen_rewardbench_for_training(tmp_path: Path, overall: str) -> None:
    rows = [
        row(0, "A", "B", "same", A_model="m1", B_model="m2", **{overall: "A"}),
        row(1, "A", "A", "A", A_model="m1", **{overall: "invalid"}),
    ]
    path = put_csv(tmp_path / "videogen-rewardbench.csv", rows, (*COLUMNS, "A_model", "B_model", overall))
    first, second = read_preferences(path, verify=False).rows
    assert first.label == {"Overall": "A", "VQ": "A", "MQ": "B", "TA": "same"}
    assert first.models == ("m1", "m2") and second.models == ("m1", None)
    assert "Overall" not in second.label and first.source == "videogen_rewardbench"
    by_name = read_preferences(path, format="videoalign", verify=False).rows
    assert by_name[0].label == {"VQ": "A", "MQ": "B", "TA": "same"}, "its three axes alone"


def videodpo(folder: Path, absolute: str = "") -> Path:
    """A set as the authors' scripts write it: winners at even numbers of metadata.json."""
    entries, found = [], []
    for number in range(3):
        for side in ("win", "lose"):
            path = f"{side}videos/{number:06}.mp4"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            steady(folder / path, 6 + number + 3 * (side == "win"), 8)
            basic = {"clip_duration": 1.6, "clip_path": f"{absolute}{path}", "globalidx": number}
            entries.append({"basic": basic, "misc": {"frame_caption": [f"caption {number}"]}})
        found.append({"video1": 2 * number, "video2": 2 * number + 1, "label": 0, "frame_caption": f"caption {number}"})
    put_json(folder / "metadata.json", entries)
    put_json(folder / "pair.json", found)
    return folder


@pytest.mark.parametrize("absolute", ["", "/home/somebody/dataset/total_score_0P_vbscore/"])
def test_videodpo(tmp_path: Path, absolute: str) -> None:
    """Paths of the authors' own machine are those in the folder."""
    folder = videodpo(tmp_path / "set", absolute)
    found = json.loads((folder / "pair.json").read_text())
    found += [
        {"video1": 6, "video2": 1, "frame_caption": "x"}, {"video1": 0, "video2": 1, "label": 1, "frame_caption": "x"},
        {"video1": 2, "video2": 2, "frame_caption": "x"}, {"video1": 4, "video2": 1, "score": 0.6},
    ]  # fmt: skip
    put_json(folder / "pair.json", found)
    for path, format in ((folder, "auto"), (folder / "pair.json", "auto"), (folder, "videodpo")):
        table = read_preferences(path, format)
        assert [each.prompt for each in table.rows] == ["caption 0", "caption 1", "caption 2"]
        assert all(each.label == {"overall": "A"} and each.source == "videodpo" for each in table.rows)
        names = [[str(Path(ref.file).relative_to(folder)) for ref in each.media] for each in table.rows]
        assert names[1] == ["winvideos/000001.mp4", "losevideos/000001.mp4"]
        assert reasons(table.dropped) == [
            ("pair.json row 3", "bad media"), ("pair.json row 4", "unclear label"),
            ("pair.json row 5", "bad media"), ("pair.json row 6", "no prompt"),
        ]  # fmt: skip
        assert table.dropped[0].detail == "video1 is 6, and metadata.json has 6 entries from 0"


def test_videodpo_in_several_folders(tmp_path: Path) -> None:
    for name in ("one", "two"):
        videodpo(tmp_path / name)
    table = read_preferences(tmp_path, verify=False)
    assert len(table.rows) == 6 and table.rows[3].origin == "two/pair.json row 0"
    assert Path(table.rows[3].media[0].file) == tmp_path / "two/winvideos/000000.mp4"
    with pytest.raises(ValueError, match=r"is no VideoDPO set; it needs pair\.json and metadata\.json"):
        read_preferences(tmp_path / "one/winvideos", "videodpo")
    (tmp_path / "one/metadata.json").write_text("{}")
    with pytest.raises(ValueError, match="holds one dict, not a list of clips"):
        read_preferences(tmp_path / "one")
    (tmp_path / "one/metadata.json").unlink()
    with pytest.raises(ValueError, match=r"metadata\.json does not exist; the numbers in pair\.json"):
        read_preferences(tmp_path / "one/pair.json")


def test_hpdv3_and_plain_rows_of_clips(tmp_path: Path) -> None:
    for number in range(3):
        steady(tmp_path / f"{number}.mp4", 4 + number, 8)
    item = {"prompt": "p", "path1": "0.mp4", "path2": "1.mp4", "model1": "wan", "model2": "ltx", "confidence": 0.9}
    (one,) = read_preferences(put_json(tmp_path / "hpdv3.json", [item])).rows
    assert one.models == ("wan", "ltx") and one.label == {"overall": "A"}
    facts = {"fps": [8, 8, 8.0], "num_frames": [4, 5, 6], "models": ["a", "b", None]}
    rows = [
        {"prompt": "p", "media": ["0.mp4", "1.mp4", "2.mp4"], "rank": [1, 2, 2], **facts},
        {"prompt": "q", "media": ["0.mp4", "1.mp4"], "label": {"MQ": "A", "TA": "invalid"}},
        {"prompt": "r", "media": ["0.mp4", "1.mp4"], "label": "A", "fps": [8]},
        {"prompt": "s", "media": ["0.mp4", "1.mp4"], "label": "A", "num_frames": [4, 5.5]},
        {"prompt": "t", "media": ["0.mp4", "1.mp4"], "label": "A", "models": "wan"},
    ]
    table = read_preferences(put_json(tmp_path / "t.jsonl", rows))
    assert (table.rows[0].fps, table.rows[0].num_frames) == ((8.0, 8.0, 8.0), (4, 5, 6))
    assert table.rows[0].models == ("a", "b", None) and table.rows[1].fps is None
    assert [each.reason for each in table.dropped] == ["bad fps", "bad num_frames", "bad models"]
    write_preferences(tmp_path / "again.jsonl", table.rows)
    assert read_preferences(tmp_path / "again.jsonl").rows == table.rows


# ------------------------------------------------------------------------------------------------ axes and weights


A, B = MediaRef("/a.mp4"), MediaRef("/b.mp4")
VERDICTS = ("A", "B", "same", None)
WEIGHTS = {"VQ": 1.0, "MQ": 1.0, "TA": 2.0}


def share(label: dict[str, str], weights: dict[str, float]) -> float:
    """P(A better): weights of the axes that say A, half of those that tie, of all that were judged."""
    worth = {"A": 1.0, "B": 0.0, "same": 0.5}
    judged = [axis for axis in weights if axis in label]
    return sum(weights[axis] * worth[label[axis]] for axis in judged) / sum(weights[axis] for axis in judged)


@pytest.mark.parametrize("said", list(product(VERDICTS, repeat=3)))
@pytest.mark.parametrize("weights", [WEIGHTS, {"VQ": 0.3, "MQ": 0.5, "TA": 0.2}, {"VQ": 1.0, "TA": 1.0}])
def test_labels_by_axis_are_weighed_over_the_axes_that_were_judged(
    said: tuple[str | None, ...], weights: dict[str, float]
) -> None:
    label: Any = {axis: word for axis, word in zip(WEIGHTS, said, strict=True) if word}
    if not set(label) & set(weights):
        return
    table = Table([PreferenceRow("p", (A, B), label=label, weight=3.0)])
    expected = share(label, weights)
    tie = abs(expected - 0.5) < 1e-9
    better = (A, B) if expected > 0.5 else (B, A)
    for ties in ("drop", "soft", "half"):
        soft, hard = (pairs(table, ties, dimensions=weights, soft_labels=kept) for kept in (True, False))
        if tie and ties == "drop":
            assert soft == hard == []
        elif tie and ties == "half":
            assert [(each.winner, each.loser, each.label, each.weight) for each in hard] == [
                (A, B, 1.0, 1.5), (B, A, 1.0, 1.5)
            ]  # fmt: skip
            assert soft == hard
        elif tie:
            assert [each.label for each in soft] == [each.label for each in hard] == [0.5]
        else:
            assert [(each.winner, each.loser, each.label) for each in hard] == [(*better, 1.0)]
            assert [each.label for each in soft] == [pytest.approx(max(expected, 1 - expected), abs=1e-12)]
            assert soft[0].winner == better[0] and soft[0].weight == 3.0


class Table:
    """What `pairs` needs of a preference table."""

    def __init__(self, rows: list[PreferenceRow]) -> None:
        self.rows = rows


def test_a_loss_on_the_weighted_label_is_the_weighted_mean_of_the_losses_by_axis() -> None:
    """DPO's loss is linear in its label, so `dimensions` with soft labels is sum_d w_d L_d / sum_d w_d, ties at 1/2."""
    label: Any = {"VQ": "A", "MQ": "same", "TA": "B"}
    (found,) = pairs(Table([PreferenceRow("p", (A, B), label=label)]), dimensions=WEIGHTS, soft_labels=True)
    assert found.winner == B
    errors = np.random.default_rng(0).uniform(0.1, 0.9, (2, 2))  # model and reference; the columns are A and B
    model, reference = (torch.from_numpy(each[None, ::-1].copy()).float() for each in errors)  # the winner first
    loss, _ = diffusion_dpo(model, reference, beta=7.0, label=torch.tensor([found.label]))

    def by_axis(word: str) -> float:
        """-log sigmoid of the logit of A over B, in float64."""
        logit = -0.5 * 7.0 * ((errors[0, 0] - errors[1, 0]) - (errors[0, 1] - errors[1, 1]))
        for_a, for_b = np.log1p(np.exp(-logit)), np.log1p(np.exp(logit))
        return {"A": for_a, "B": for_b, "same": (for_a + for_b) / 2}[word]

    expected = sum(WEIGHTS[axis] * by_axis(word) for axis, word in label.items()) / sum(WEIGHTS.values())
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_rows_that_no_weighted_axis_judges_are_dropped_and_counted(tmp_path: Path) -> None:
    said = [("A", "invalid", "invalid"), ("invalid", "B", "A"), ("A", "A", "B")]
    path = put_csv(tmp_path / "data.csv", [row(number, *each) for number, each in enumerate(said)])
    data = Data(table=path, verify=False, dimensions={"MQ": 1, "TA": 1, "VQ": 0}, ties="soft")
    found, summary = sources.groups(data, "pairs")
    assert [group.values for group in found] == [(0.5, 0.5), (0.5, 0.5)]
    assert "kept 2 of 3 rows; dropped 1: 1 not judged on MQ or TA (data.csv row 0)" in summary
    axes, summary = sources.groups(Data(table=path, verify=False, axes=("MQ", "TA"), ties="soft"), "pairs")
    assert len(axes) == 2 and "1 not judged on MQ or TA" in summary
    for key in ({"dimensions": {"VQ": 1, "MO": 2}}, {"axes": ("VQ", "MO")}):
        with pytest.raises(ValueError, match=r"no row of .* is judged on 'MO'\. Did you mean 'MQ'\? It judges VQ, MQ"):
            sources.groups(Data(table=path, verify=False, **key), "pairs")


# ------------------------------------------------------------------------------------------------ lengths and rates


def test_training_says_how_clips_are_resampled_and_leaves_short_ones_out(tmp_path: Path) -> None:
    """12 frames at 24 a second are 8 at 16; 5 at 8 are 10 at 16, some of them shown twice."""
    for name, count, fps in (("a", 12, 24), ("b", 5, 8), ("c", 3, 8), ("d", 9, 8)):
        steady(tmp_path / f"{name}.mp4", count, fps)
    media = [("a", "b"), ("a", "c"), ("b", "d")]
    rows = [{"prompt": "p", "media": [f"{n}.mp4" for n in pair], "label": "A"} for pair in media]
    path = put_json(tmp_path / "t.jsonl", rows)
    data = Data(table=path, frames=9, fps=16.0, frame_buckets=(8,), resolution=64)
    found, summary = sources.groups(data, "pairs")
    assert [[Path(ref.file).stem for ref in group.media] for group in found] == [["a", "b"], ["b", "d"]]
    assert "kept 2 of 3 rows; dropped 1: 1 fewer than 8 frames" in summary
    assert "clips are taken resampled to 16 frames per second (3 at 8, 1 at 24)" in summary
    rows_kept, short = sources.long_enough(read_preferences(path).rows, lambda each: each.media, data)
    assert [[(one.from_fps, one.to_fps, one.frames) for one in each.resampled] for each in rows_kept] == [
        [(24.0, 16.0, 8), (8.0, 16.0, 8)], [(8.0, 16.0, 9), (8.0, 16.0, 9)]
    ]  # fmt: skip
    assert "c.mp4 has 6 at 16 frames per second" in short[0].detail
    write_preferences(tmp_path / "kept.jsonl", rows_kept)
    written = json.loads((tmp_path / "kept.jsonl").read_text().splitlines()[0])
    assert written["resampled"][0] == {"from_fps": 24.0, "to_fps": 16.0, "frames": 8}
    assert read_preferences(tmp_path / "kept.jsonl").rows == rows_kept
    own, summary = sources.groups(Data(table=path, frames=3, resolution=64), "pairs")
    assert len(own) == 3 and "clips are taken at their own rate (4 at 8, 2 at 24)" in summary
