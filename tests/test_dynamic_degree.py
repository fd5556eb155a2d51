"""dynamic_degree and static_filter: published rules on flows of networks whose answers are known."""

import numpy as np
import pytest
import torch
from raft_kit import SMALL, bright_file, bright_raft, flat, raft_file, small_raft
from test_raft import counted, noise, plain

from mmalign.backbones.raft import RaftFlow
from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import AllFrames, Batch, ItemErrors, StrideFps
from mmalign.jobs import ScoreConfig
from mmalign.media import write_video
from mmalign.results import read_results
from mmalign.score import run
from mmalign.tables import MediaRow, write_media_table
from mmalign.testing import check_evaluator

WHITE, BLACK = 255, 20  # flow or none, with `bright_raft`


def batch_of(*clips):
    return Batch(frames=list(clips), prompts=[""] * len(clips), fps=[8.0] * len(clips), aux=[{}] * len(clips))


LOADED = {}


def evaluator(name, folder, speed=6.0, **params):
    """One with `bright_raft`'s file, loaded once."""
    key = (name, speed, *sorted(params.items()))
    if key not in LOADED:
        LOADED[key] = load_evaluator(name, {"checkpoint": bright_file(folder, speed), **params}, "cpu")
    return LOADED[key]


def scores(found, name="score"):
    return found[name].tolist()


def test_the_kits_network_flows_as_it_says(tmp_path):
    (_, flow), = RaftFlow(bright_raft(6.0)).flows(flat([WHITE, BLACK, 191]), [(0, 1), (1, 0), (2, 0)])  # fmt: skip
    inner = flow[:, :, 16:-16, 16:-16]
    expected = torch.tensor([6.0, 0, 6 * np.tanh(2 * 191 / 255 - 1) / np.tanh(1)])
    assert (inner[:, 0] - expected.view(3, 1, 1)).abs().max() < 1e-3 and float(inner[:, 1].abs().max()) < 1e-6


@pytest.mark.parametrize(("height", "width"), [(128, 128), (136, 250), (250, 128)])
def test_dynamic_flips_where_the_speed_is_six_pixels_per_256(tmp_path, height, width):
    threshold = 6 * min(height, width) / 256
    clip = flat([WHITE] * 5, height, width)
    for part, answer in ((0.995, 0.0), (1.005, 1.0)):
        for rules in ("compat", "strict"):
            found = evaluator("dynamic_degree", tmp_path, part * threshold, rules=rules).score(batch_of(clip))
            assert scores(found) == [answer]
            assert scores(found, "share") == [answer] and scores(found, "pairs") == [4.0]
            assert scores(found, "motion") == pytest.approx([part], rel=1e-3)


@pytest.mark.parametrize(
    ("frames", "fast", "compat", "strict"),
    [(3, 0, 0, 0), (3, 1, 1, 1), (6, 1, 0, 0), (6, 2, 1, 1), (10, 2, 1, 0), (10, 3, 1, 1), (14, 3, 0, 0),
     (14, 4, 1, 1)],
)  # fmt: skip
def test_a_quarter_of_the_frames_has_to_be_fast(tmp_path, frames, fast, compat, strict):
    # Spread over the clip; whether the last frame is light does not matter, since no pair begins there.
    light = {round(place) for place in np.linspace(0, frames - 2, fast)}
    clip = flat([WHITE if place in light or place == frames - 1 else BLACK for place in range(frames)])
    for rules, answer in (("compat", compat), ("strict", strict)):
        whole = evaluator("dynamic_degree", tmp_path, rules=rules).score(batch_of(clip))
        assert scores(whole) == [answer] and scores(whole, "share") == [pytest.approx(fast / (frames - 1))]
        early = evaluator("dynamic_degree", tmp_path, rules=rules, early=True).score(batch_of(clip))
        assert scores(early) == [answer] and scores(early, "pairs")[0] <= frames - 1


def test_one_and_two_frames(tmp_path):
    """compat: the published loop says no to one frame and yes to two, whatever they show; strict refuses both."""
    clips = [flat([WHITE]), flat([BLACK, BLACK]), flat([BLACK] * 3)]
    for early in (False, True):
        found = evaluator("dynamic_degree", tmp_path, early=early).score(batch_of(*clips))
        assert scores(found) == [0.0, 1.0, 0.0]
        assert scores(found, "pairs") == ([0, 0, 2] if early else [0, 1, 2])
    with pytest.raises(ItemErrors) as caught:
        evaluator("dynamic_degree", tmp_path, rules="strict").score(batch_of(*clips))
    assert {place: str(error)[:15] for place, error in caught.value.errors.items()} == {
        0: "1 sampled frame",
        1: "2 sampled frame",
    }
    assert float(caught.value.scores["score"][2]) == 0.0


def test_identical_frames_do_not_move(tmp_path):
    for name, answer in (("dynamic_degree", 0.0), ("static_filter", 1.0)):
        assert scores(evaluator(name, tmp_path).score(batch_of(flat([BLACK] * 6)))) == [answer]


def test_early_asks_for_no_more_pairs_than_decide(tmp_path):
    scorer = evaluator("dynamic_degree", tmp_path, 6.5, early=True)
    scorer.raft.pixels = 1  # pairs one at a time
    calls = counted(scorer.raft.network)
    clips = (flat([WHITE] * 16), flat([BLACK] * 16))
    found = scorer.score(batch_of(*clips))
    assert scores(found) == [1.0, 0.0]
    assert scores(found, "pairs") == [4.0, 12.0]  # four fast ones; three are left after twelve slow ones
    assert calls["mask_predictor"] == 16 and set(found) == {"score", "pairs"}


def test_small_frames_are_refused_or_measured(tmp_path):
    clips = [flat([WHITE] * 4, 120, 300), flat([WHITE] * 4)]
    for name in ("dynamic_degree", "static_filter"):
        with pytest.raises(ItemErrors, match="300 x 120 pixels are too small") as caught:
            evaluator(name, tmp_path).score(batch_of(*clips))
        assert list(caught.value.errors) == [0]
        assert float(caught.value.scores["score"][1]) == float(name == "dynamic_degree")
        small = evaluator(name, tmp_path, rules="strict").score(batch_of(flat([WHITE] * 4, 64, 64)))
        assert scores(small) == [float(name == "dynamic_degree")]


def speeds(clip, pairs, share, crop):
    """As published: torchvision's plain forward on every pair, lengths sorted; with the padding cut off if `crop`."""
    found = []
    for first, second in pairs:
        u, v = plain(small_raft(4), clip[first], clip[second]).double().numpy()
        lengths = np.sqrt(u**2 + v**2)
        if crop:
            lengths = lengths[1 : 1 + clip.shape[2], 3 : 3 + clip.shape[3]]
        found.append(np.sort(lengths.flatten())[::-1][: int(lengths.size * share)].mean())
    return np.array(found)


@pytest.mark.parametrize("rules", ["compat", "strict"])
def test_measures_equal_the_plain_network_on_every_pair(tmp_path, rules):
    clip, crop = noise(5, 134, 129, seed=9), rules == "strict"  # padded by (3, 4) and (1, 1)
    neighbours = [(t, t + 1) for t in range(4)]
    params = {"checkpoint": raft_file(tmp_path, seed=4), "rules": rules}
    found = load_evaluator("dynamic_degree", params, "cpu").score(batch_of(clip))
    expected = speeds(clip, neighbours, 0.05, crop)
    assert scores(found, "motion") == pytest.approx([expected.mean() / (6 * 129 / 256)], rel=1e-4)
    assert scores(found, "share") == [np.mean(expected > 6 * 129 / 256)]
    found = load_evaluator("static_filter", params, "cpu").score(batch_of(clip))
    expected = speeds(clip, [*neighbours, (0, 4), (4, 0)], 0.02, crop)
    assert scores(found, "drift") == pytest.approx([expected[-2:].max() / (3 * 129 / 256)], rel=1e-4)
    assert scores(found, "fast") == [np.sum(expected[:-2] > 3 * 129 / 256)] and scores(found, "pairs") == [6.0]


@pytest.mark.parametrize("name", ["dynamic_degree", "static_filter"])
def test_a_clip_is_scored_by_itself(tmp_path, name):
    """Eight clips at once, one by one and backwards: the same to the bit."""
    scorer = load_evaluator(name, {"checkpoint": raft_file(tmp_path, seed=4)}, "cpu")
    sizes = [(128, 128), (130, 140), (128, 128), (150, 123)] * 2
    clips = [noise(2 + place % 3, *size, seed=place) for place, size in enumerate(sizes)]
    together = scorer.score(batch_of(*clips))
    alone = [scorer.score(batch_of(clip)) for clip in clips]
    backwards = scorer.score(batch_of(*clips[::-1]))
    for key, values in together.items():
        assert torch.equal(values, torch.cat([each[key] for each in alone]))
        assert torch.equal(values, backwards[key].flip(0))


@pytest.mark.parametrize("name", ["dynamic_degree", "static_filter"])
def test_the_contract_holds(tmp_path, name):
    sizes = ((128, 128), (121, 140))
    check_evaluator(name, {"checkpoint": bright_file(tmp_path)}, prompts=["a", "b"], sizes=sizes)


def test_flows_are_shared_with_the_cameras_motion_in_one_batch(tmp_path):
    from mmalign.evaluation import Backbones

    backbones = Backbones()
    params = {"checkpoint": raft_file(tmp_path)}
    names = ("dynamic_degree", "camera_motion@flow")
    pair = [load_evaluator(name, params, "cpu", backbones=backbones) for name in names]
    assert pair[0].raft is pair[1].raft and pair[0].frames == pair[1].frames == StrideFps(8)
    calls = counted(pair[0].raft.network)
    batch = Batch(frames=[noise(4, 128, 128), noise(3, 128, 136)], prompts=["camera static"] * 2)
    for scorer in pair:
        scorer.score(batch)
    assert calls == {"feature_encoder": 7, "context_encoder": 5, "mask_predictor": 5}


# --------------------------------------------------------------------------------------------------- static filter


@pytest.mark.parametrize(
    ("levels", "compat", "strict"),
    [
        ([BLACK] * 16, 1, 1),
        ([BLACK, WHITE, WHITE, *[BLACK] * 13], 1, 1),  # 2 of 16 frames are an eighth
        ([BLACK, WHITE, WHITE, WHITE, *[BLACK] * 12], 0, 0),
        ([BLACK, WHITE, WHITE, WHITE, *[BLACK] * 16], 0, 1),  # 20 frames: 2.5, to even or up
        ([BLACK] * 4, 1, 1),  # no flow at all
        ([BLACK, WHITE, BLACK, BLACK], 0, 1),  # 0.5, to 0 or to 1
        ([BLACK], 1, None),
    ],
)
def test_an_eighth_of_a_static_clips_frames_may_be_fast(tmp_path, levels, compat, strict):
    clip, moving = flat(levels), sum(level == WHITE for level in levels)
    for rules, answer in (("compat", compat), ("strict", strict)):
        if answer is None:
            with pytest.raises(ItemErrors, match="one frame"):
                evaluator("static_filter", tmp_path, rules=rules).score(batch_of(clip))
            continue
        for early in (False, True):
            found = evaluator("static_filter", tmp_path, rules=rules, early=early).score(batch_of(clip))
            assert scores(found) == [answer]
            if not early:
                assert scores(found, "fast") == [moving] and scores(found, "pairs") == [len(levels) + 1]


@pytest.mark.parametrize("end", [0, -1])
@pytest.mark.parametrize(("part", "answer"), [(0.99, 1.0), (1.01, 0.0)])
def test_from_end_to_end_a_static_clip_goes_twice_its_count_times_the_threshold(tmp_path, end, part, answer):
    levels = [BLACK] * 16
    levels[end] = WHITE  # 2 fast pairs are allowed, so one does no harm; the limit is 2 * 2 * 1.5 pixels
    for early in (False, True):
        found = evaluator("static_filter", tmp_path, part * 6, early=early).score(batch_of(flat(levels)))
        assert scores(found) == [answer]
        if early and not answer:
            assert scores(found, "pairs") == [2.0], "the ends are looked at first"


def test_short_clips_pass_only_without_any_flow(tmp_path):
    faint = flat([128, 128, 128, 128])  # a flow of some hundredths of a pixel
    found = evaluator("static_filter", tmp_path).score(batch_of(faint))
    assert scores(found) == [0.0] and 0 < scores(found, "drift")[0] < 0.05
    assert scores(evaluator("static_filter", tmp_path, rules="strict").score(batch_of(faint))) == [1.0]


# ------------------------------------------------------------------------------------------------ what is declared


def test_plans_files_and_missing_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("MMALIGN_WEIGHTS", str(tmp_path / "weights"))
    assert evaluator_class("dynamic_degree").frames == StrideFps(8)
    assert evaluator_class("static_filter").frames == AllFrames()
    for name in ("dynamic_degree", "static_filter", "camera_motion@flow", "motion_smoothness@flow"):
        cls = evaluator_class(name)
        file = raft_file(tmp_path)
        assert cls.weight_files(cls.Params(checkpoint=tmp_path)) == [file]
        for network, hint in (("raft-things", "download_models.sh"), ("raft-large-torchvision", "C_T_V1.url")):
            with pytest.raises(ValueError, match=hint):
                cls.weight_files(cls.Params(network=network))
        with pytest.raises(ValueError, match="rules"):
            load_evaluator(name, {"checkpoint": file, "rules": "loose"}, "cpu")


def test_through_the_runner_frames_are_sampled_by_the_clips_rate(tmp_path):
    """24 frames a second: every third one counts; a clip that is too small is an error row with the reason."""
    levels = [WHITE if place % 3 == 0 else BLACK for place in range(24)]  # only sampled frames are light
    clips = {"a": (flat(levels), 24.0), "b": (flat(levels[1:]), 24.0), "c": (flat([WHITE] * 4, 64), 8.0)}
    rows = []
    for name, (frames, fps) in clips.items():
        write_video(tmp_path / f"{name}.mp4", frames, fps, lossless=True)
        rows.append(MediaRow(name, "", str(tmp_path / f"{name}.mp4"), "video"))
    write_media_table(tmp_path / "table.jsonl", rows)
    spec = {"name": "dynamic_degree", "params": {"checkpoint": str(bright_file(tmp_path / "w"))}}
    config = {"table": tmp_path / "table.jsonl", "output": tmp_path / "out", "evaluators": [spec], "device": "cpu"}
    found = read_results(run(ScoreConfig.model_validate(config), plugins=False)).rows
    said = {(row["sample"], row["subscore"]): row["score"] for row in found if row["status"] == "ok"}
    assert (said["a", "score"], said["a", "share"], said["a", "pairs"]) == (1.0, 1.0, 7.0)
    assert (said["b", "score"], said["b", "share"], said["b", "pairs"]) == (0.0, 0.0, 7.0)
    failed = [row for row in found if row["status"] == "error"]
    assert failed and all("64 x 64 pixels are too small" in row["reason"] for row in failed)
    assert {row["sample"] for row in failed} == {"c"}


def test_small_networks_have_the_published_parts():
    assert {name.split(".")[0] for name in small_raft().state_dict()} == {
        "feature_encoder",
        "context_encoder",
        "update_block",
        "mask_predictor",
    }
    assert SMALL.radius == 2
