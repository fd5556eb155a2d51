"""Dimensions that compare clips with prompts, through the runner: files of several lengths, two processes."""

import json

import pytest
from media_kit import encode, moving
from test_human_action_videomae import folder_of
from umt_kit import umt_file
from viclip_kit import viclip_file

from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch, Middle, subscores
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.media import read_video
from mmalign.results import read_results
from mmalign.score import run

PROMPTS = ["A person is riding a bike", "A person is yoga, zoom in", "a shark, zoom out", "no action here"]
LENGTHS = [5, 16, 33, 1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for place, (length, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        encode(folder / f"{place}.mp4", moving(length, 64, 96 - 16 * place))
        rows.append({"sample": str(place), "prompt": prompt, "media": f"{place}.mp4"})
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "videomae").mkdir()
    folder_of(folder / "videomae")
    params = {
        "overall_consistency": {"checkpoint": str(viclip_file(folder)[0])},
        "temporal_style": {"checkpoint": str(folder), "rules": "strict"},
        "human_action": {"checkpoint": str(umt_file(folder)[0])},
        "human_action@videomae": {"model": str(folder / "videomae")},
    }
    return folder, params


def test_files_score_alone_as_in_two_processes(files, tmp_path):
    folder, params = files
    config = ScoreConfig(
        table=folder / "table.jsonl",
        output=tmp_path / "scores",
        evaluators=tuple(EvaluatorSpec(name=name, params=each) for name, each in params.items()),
        batch_size=3,
        processes=2,
        device="cpu",
    )
    rows = read_results(run(config)).rows
    found = {(row["evaluator"].partition("[")[0], row["subscore"], int(row["sample"])): row for row in rows}
    clips = [read_video(folder / f"{place}.mp4").frames for place in range(len(LENGTHS))]
    assert [len(clip) for clip in clips] == LENGTHS
    for name, each in params.items():
        evaluator = load_evaluator(name, each, "cpu")
        plan = Middle(16 if "action" in name else 8)
        for place, clip in enumerate(clips):
            mine = {key[1]: row for key, row in found.items() if key[0] == name and key[2] == place}
            batch = Batch(frames=[clip[plan.indices(len(clip), 0.0)]], prompts=[PROMPTS[place]])
            if any(row["status"] == "error" for row in mine.values()):
                with pytest.raises(ValueError, match=r"last comma|none of the classifier's"):
                    evaluator.score(batch)
                continue
            for subscore, value in subscores(evaluator.score(batch), 1, name).items():
                assert mine[subscore]["score"] == pytest.approx(float(value), abs=1e-5), (name, place)
    errors = {(name, place) for (name, _, place), row in found.items() if row["status"] == "error"}
    # A prompt without a comma has no style for `strict`; one that names no class is 0 for the reference alone.
    assert errors == {("temporal_style", 0), ("temporal_style", 3)} | {
        ("human_action@videomae", place) for place in (1, 2, 3)
    }
    assert [found["human_action", "score", place]["score"] for place in (2, 3)] == [0, 0]
