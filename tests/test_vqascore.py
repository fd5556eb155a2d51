"""VQAScore: likelihoods of the answer against the stock model in float64, its settings, and bad rows."""

import numpy as np
import pytest
import torch
from vlm_kit import SEVERAL, ask, batch_of, clips, oracle, prepared, vlm_folder

from mmalign.discovery import load_evaluator
from mmalign.testing import check_evaluator

SIZES = [(40, 50), (64, 64), (150, 224), (5, 301)]
PROMPTS = ["a red circle", "two cats, on a MAT!", "a {prompt} in {braces}", "ein Würfel"]
TEMPLATE = 'Does this figure show "{}"? Please answer yes or no.'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return vlm_folder(tmp_path_factory.mktemp("vlm"), "qwen2_vl")


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "llava_onevision", "idefics3"])
def test_scores_equal_one_stock_float64_pass_each(tmp_path, family):
    folder = vlm_folder(tmp_path, family)
    items = clips(SIZES[:2]) + (clips(SIZES[:2], frames=3) if family in SEVERAL else clips(SIZES[2:]))
    first = load_evaluator("vqascore", {"model": folder}, "cpu").score(batch_of(items, PROMPTS))
    whole = load_evaluator("vqascore", {"model": folder, "answer_score": "sequence"}, "cpu").score(
        batch_of(items, PROMPTS)
    )
    exact = []
    for clip, prompt in zip(items, PROMPTS, strict=True):
        text = ask(folder, TEMPLATE.replace("{}", prompt), len(clip))
        joint = " " if family in ("llava", "idefics3") else ""
        start = prepared(folder, clip, text)["input_ids"].shape[1]
        inputs, logits, _ = oracle(folder, clip, text + joint + "Yes")
        ids = inputs["input_ids"][0, start:].tolist()
        assert len(ids) == 1
        end = {"qwen2_vl": "<|im_end|>", "llava_onevision": "<|im_end|>", "llava": "</s>"}.get(
            family, "<end_of_utterance>"
        )
        from transformers import AutoTokenizer

        ids.append(AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(end))
        chances = logits.softmax(-1)[[start - 1, start], ids]
        exact.append((float(chances[0]), float(chances.log().mean().exp())))  # the geometric mean
    np.testing.assert_allclose(first.numpy(), [one for one, _ in exact], rtol=3e-5)
    np.testing.assert_allclose(whole.numpy(), [two for _, two in exact], rtol=3e-5)
    assert first.dtype == torch.float32
    assert max(first) / min(first) > 1.5, "the case tells nothing"


def test_question_and_answer_are_parameters(folder):
    batch = batch_of(clips(SIZES), PROMPTS)
    base = load_evaluator("vqascore", {"model": folder}, "cpu").score(batch)
    for change in ({"answer": "No"}, {"answer": "yes"}, {"template": "{prompt}? Yes or No"}):
        other = load_evaluator("vqascore", {"model": folder} | change, "cpu").score(batch_of(clips(SIZES), PROMPTS))
        assert not torch.allclose(base, other, rtol=0.01), change
    with pytest.raises(ValueError, match=r"template.*needs \{prompt\}"):
        load_evaluator("vqascore", {"model": folder, "template": "Is it good?"}, "cpu")
    with pytest.raises(ValueError, match=r"conversation.*\{images\} and \{question\}"):
        load_evaluator("vqascore", {"model": folder, "conversation": "USER: {question}"}, "cpu")


def test_two_evaluators_of_one_model_share_the_vision_tower(folder, monkeypatch):
    from mmalign.evaluation import Backbones

    backbones = Backbones()
    pair = [
        load_evaluator("vqascore", {"model": folder, "answer": answer}, "cpu", backbones=backbones)
        for answer in ("Yes", "No")
    ]
    assert pair[0].vlm is pair[1].vlm
    tower, runs = pair[0].vlm._model.base_model.visual, []
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *a, **k: runs.append(1) or forward(*a, **k))
    batch = batch_of(clips(SIZES), PROMPTS)
    for evaluator in pair:
        evaluator.score(batch)
    assert runs == [1]


def test_bad_rows_are_told_and_spare_the_others(folder, tmp_path):
    """Through the runner: an empty prompt, a control token and a text of 10,000 characters, and a good row."""
    import json

    from mmalign.jobs import EvaluatorSpec, ScoreConfig
    from mmalign.media import write_image
    from mmalign.results import read_results
    from mmalign.score import run

    prompts = {"good": "a red circle", "blank": "  ", "steers": "a cat <|im_end|>", "long": "colour " * 1430}
    lines = []
    for name, prompt in prompts.items():
        write_image(tmp_path / f"{name}.png", np.full((40, 50, 3), 90, dtype=np.uint8))
        lines.append(json.dumps({"sample": name, "prompt": prompt, "media": f"{name}.png"}))
    (tmp_path / "table.jsonl").write_text("\n".join(lines) + "\n")
    config = ScoreConfig(
        table=tmp_path / "table.jsonl",
        output=tmp_path / "out",
        evaluators=(EvaluatorSpec(name="vqascore", params={"model": str(folder)}),),
        device="cpu",
    )
    rows = {row["sample"]: row for row in read_results(run(config)).rows}
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "ok", "blank": "skipped", "steers": "error", "long": "error",
    }  # fmt: skip
    assert "prompt" in rows["blank"]["reason"]
    assert "'<|im_end|>', which steers qwen2_vl" in rows["steers"]["reason"]
    assert "model reads 8192; shorten the prompt" in rows["long"]["reason"]
    assert rows["good"]["prompt_truncated"] is False


def test_missing_folders_are_told_before_anything_is_loaded(tmp_path):
    from mmalign.score_plan import make_jobs

    with pytest.raises(ValueError, match=r"model: the model folder .*absent does not exist"):
        make_jobs([("vqascore", {"model": tmp_path / "absent"})])


def test_vqascore_keeps_the_contract(folder):
    check_evaluator("vqascore", {"model": folder})
