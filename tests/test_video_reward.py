"""VideoReward: its checkpoint layouts, values against transformers' stock forward, and what depends on the prompt."""

import json

import numpy as np
import pytest
import torch
from qwen2_vl_kit import (
    LINEARS,
    PROMPTS,
    adapters,
    new_layout,
    old_layout,
    peft_state,
    round_rope,
    stock,
    video_folder,
)
from video_reward_kit import clips_of, expected_scores, reference, same, score

from mmalign.discovery import evaluator_class, load_evaluator
from mmalign.evaluation import Batch
from mmalign.jobs import EvaluatorSpec, ScoreConfig
from mmalign.media import write_video
from mmalign.results import read_results
from mmalign.score import run
from mmalign.testing import check_evaluator


@pytest.mark.parametrize(
    ("layout", "outputs", "names"),
    [
        ("model.pth", 1, "old"),
        ("model.pth", 3, "new"),
        ("adapter", 3, "old"),
        ("adapter", 1, "new"),
        ("plain", 1, "old"),
    ],
)
def test_values_are_those_of_the_stock_forward(tmp_path, layout, outputs, names):
    params, whole = video_folder(tmp_path, layout, outputs, names=names)
    clips = clips_of()
    hidden = reference(params["base"], round_rope(stock(params["base"], whole)), clips, PROMPTS)
    expected = expected_scores(hidden, whole["rm_head.weight"].double().numpy())
    found = score(params, clips)
    same(found, expected)
    assert min(np.ptp(values) for values in expected.values()) > 0.01, "the case tells nothing"
    raw = score(params | {"use_norm": False}, clips)
    same(raw, expected_scores(hidden, whole["rm_head.weight"].double().numpy(), None))


def test_adapters_merge_to_what_peft_computes(tmp_path):
    """The authors run the adapters unmerged, through PEFT: the same state dict in the same wrapping."""
    from peft import LoraConfig, get_peft_model

    params, whole = video_folder(tmp_path)
    state = old_layout(params["base"], 3, {"rm_head.weight": (1, 32)})
    model = stock(params["base"], state).float()
    targets = rf".*language_model.*\.({'|'.join(LINEARS)})"
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    tensors = new_layout_of_peft(peft_state(state, adapters(state)))
    del tensors["base_model.model.rm_head.weight"]
    wrapped.load_state_dict(tensors, strict=True)
    assert len(tensors) == len(state) - 1 + 2 * 7 * 2
    clips = clips_of()[:3]
    hidden = reference(params["base"], round_rope(wrapped.double().eval().base_model.model), clips, PROMPTS[:3])
    same(score(params, clips, PROMPTS[:3]), expected_scores(hidden, whole["rm_head.weight"].double().numpy()))


def new_layout_of_peft(state):
    prefix = "base_model.model."
    return {prefix + name: value for name, value in new_layout(
        {name.removeprefix(prefix): value for name, value in state.items()}).items()}  # fmt: skip


def test_visual_and_motion_quality_do_not_depend_on_the_prompt(tmp_path):
    params, _ = video_folder(tmp_path, outputs=3)
    clip = clips_of()[0]
    prompts = [*PROMPTS[:4], "x", "y y y", "z" * 40, "1"]
    evaluator = load_evaluator("video_reward", params, "cpu")
    found = evaluator.score(Batch(frames=[clip] * 8, prompts=prompts))
    for axis in ("VQ", "MQ"):
        assert len(set(found[axis].tolist())) == 1, axis
    assert len(set(found["TA"].tolist())) == 8
    work = evaluator.scorer.work
    assert (work.prefixes, work.suffixes) == (1, 8)
    later = evaluator.score(Batch(frames=[clip.clone()], prompts=["another"]))
    assert later["VQ"] == found["VQ"][0] and work.prefixes == 1 and work.suffixes == 9
    assert work.reused_tokens == 8 * work.prefix_tokens
    alone = [score(params, [clip], [prompt]) for prompt in prompts]
    for name, values in found.items():
        torch.testing.assert_close(values, torch.cat([one[name] for one in alone]), atol=1e-5, rtol=1e-5)


def test_each_setting_of_training_changes_the_score(tmp_path):
    params, whole = video_folder(tmp_path)
    trained = score(params, clips_of())
    for change in ({"positions": "mrope"}, {"rope": "float32"}):
        other = score(params | change, clips_of())
        assert all((other[axis] - trained[axis]).abs().min() > 1e-4 for axis in ("VQ", "MQ", "TA")), change
    model, head = stock(params["base"], whole), whole["rm_head.weight"].double().numpy()
    hidden = reference(params["base"], model, clips_of(), PROMPTS, "mrope")
    same(score(params | {"positions": "mrope", "rope": "float32"}, clips_of()), expected_scores(hidden, head))


def test_frames_are_sampled_at_two_per_second():
    plan = evaluator_class("video_reward").frames
    assert plan.indices(40, 8.0) == [round(index * 39 / 9) for index in range(10)]
    assert len(plan.indices(120, 24.0)) == 10 and plan.indices(120, 24.0)[-1] == 119


def test_a_table_of_clips_is_scored_with_one_reading_of_each(tmp_path):
    """Through the real runner: decoded at two frames per second, and equal to scoring those frames by hand."""
    params, _ = video_folder(tmp_path / "weights")
    clips = [torch.randint(0, 256, (n, 3, 40, 56), dtype=torch.uint8) for n in (40, 30)]
    lines = []
    for number, clip in enumerate(clips):
        write_video(tmp_path / f"{number}.mp4", clip, 8, lossless=True)
        for prompt in ("a", "red circle"):
            row = {"sample": f"{number}-{prompt}", "media": f"{number}.mp4", "modality": "video", "prompt": prompt}
            lines.append(json.dumps(row))
    (tmp_path / "table.jsonl").write_text("\n".join(lines) + "\n")
    spec = EvaluatorSpec(name="video_reward", params={name: str(value) for name, value in params.items()})
    config = ScoreConfig(table=tmp_path / "table.jsonl", output=tmp_path / "out", evaluators=(spec,), device="cpu")
    rows = {(row["sample"], row["subscore"]): row["score"] for row in read_results(run(config)).rows}
    assert len(rows) == 4 * 4
    plan = evaluator_class("video_reward").frames
    for number, clip in enumerate(clips):
        frames = clip[plan.indices(len(clip), 8.0)]
        found = score(params, [frames] * 2, ["a", "red circle"])
        for name, values in found.items():
            for place, prompt in enumerate(("a", "red circle")):
                assert rows[f"{number}-{prompt}", name] == pytest.approx(float(values[place]), abs=1e-5)


def test_a_clip_longer_than_the_model_reads_is_an_error_row_and_stops_no_other(tmp_path):
    params, _ = video_folder(tmp_path / "weights")
    path = params["base"] / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["max_position_embeddings"] = 1000
    path.write_text(json.dumps(config))
    lines = []
    for name, frames in (("short", 16), ("long", 160)):
        clip = torch.randint(0, 256, (frames, 3, 40, 56), dtype=torch.uint8)
        write_video(tmp_path / f"{name}.mp4", clip, 8, lossless=True)
        lines.append(json.dumps({"sample": name, "media": f"{name}.mp4", "modality": "video", "prompt": "a"}))
    (tmp_path / "table.jsonl").write_text("\n".join(lines) + "\n")
    spec = EvaluatorSpec(name="video_reward", params={name: str(value) for name, value in params.items()})
    job = ScoreConfig(table=tmp_path / "table.jsonl", output=tmp_path / "out", evaluators=(spec,), device="cpu")
    rows = read_results(run(job)).rows
    assert {(row["sample"], row["status"]) for row in rows} == {("short", "ok"), ("long", "error")}
    reasons = [row["reason"] for row in rows if row["sample"] == "long"]
    assert all("this model reads 1000; cut the clip shorter, or the prompt" in reason for reason in reasons)


def test_without_statistics_scores_are_raw(tmp_path):
    params, _ = video_folder(tmp_path, norm=None)
    clips = clips_of()[:2]
    normed, raw = (score(params | {"use_norm": flag}, clips, PROMPTS[:2]) for flag in (True, False))
    assert all(torch.equal(normed[name], raw[name]) for name in raw)


def test_video_reward_keeps_the_contract(tmp_path):
    params, _ = video_folder(tmp_path)
    sizes = [(64, 64), (33, 70), (5, 301), (64, 64)]
    check_evaluator("video_reward", {n: str(value) for n, value in params.items()}, prompts=PROMPTS[:4], sizes=sizes)
