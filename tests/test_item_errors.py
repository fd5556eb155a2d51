"""Items that cannot be scored, beside others that can: these are scored together, once, and as if they were alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from qwen2_vl_kit import hpsv3_folder, video_folder
from safetensors.torch import load_file, save_file
from test_dpg import write as dpg_questions
from vlm_kit import batch_of, clips, vlm_folder

from mmalign.backbones.prompt_questions import Question, write_questions
from mmalign.backbones.question_writer import Writer
from mmalign.backbones.qwen2_vl_checkpoint import new_reward, save_reward
from mmalign.backbones.qwen2_vl_fitted import Asked
from mmalign.backbones.qwen2_vl_scoring import Qwen2VLScorer
from mmalign.backbones.vlm import VisionLanguageModel
from mmalign.discovery import load_evaluator
from mmalign.evaluation import ItemErrors, score_ready
from mmalign.testing.tiny_vlm import tiny_qwen2_vl

GOOD = "a red circle"
LONG = "colour " * 9000
SIZES = [(40, 50), (64, 64), (56, 84), (40, 50)]


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(vlm_folder(tmp_path_factory.mktemp("vlm"), "qwen2_vl"))


def vqascore(folder: Path, home: Path) -> dict[str, Any]:
    return {"model": folder}


def unified_reward(folder: Path, home: Path) -> dict[str, Any]:
    return {"model": folder, "cues": {"score": "Final Score:", "style": "Style:"}}


def gecko(folder: Path, home: Path) -> dict[str, Any]:
    asked = (Question("Is there a circle?", ("yes", "no"), "yes", ("circle",)),)
    write_questions(home / "q.jsonl", {GOOD: asked, LONG: (Question(LONG, ("yes", "no"), "yes"),)})
    return {"model": folder, "questions": home / "q.jsonl"}


def dpg(folder: Path, home: Path) -> dict[str, Any]:
    rows = [("p1", GOOD, 1, "0", "entity", "Is there a circle?"), ("p2", LONG, 1, "0", "entity", LONG)]
    return {"model": folder, "questions": dpg_questions(home / "d.csv", rows), "answers": "soft"}


def vision_reward(folder: Path, home: Path) -> dict[str, Any]:
    (home / "c.txt").write_text('Does it show "{prompt}"?\nIs it sharp?\n')
    (home / "w.json").write_text(json.dumps([0.5, 0.25, 0.75]))
    files = {"questions": home / "c.txt", "weights": home / "w.json"}
    return {"model": folder, **files, "answers": "soft", "alignment_model": folder, "per_question": True}


def multi_tap(folder: Path, home: Path) -> dict[str, Any]:
    state = {f"backbone_model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    head = {"reward_head.weight": torch.randn(1, 32) / 8, "reward_head.bias": torch.tensor([0.2])}
    save_file(state | head, home / "m.safetensors")
    return {"model": folder, "checkpoint": home / "m.safetensors"}


def hpsv3(folder: Path, home: Path) -> dict[str, Any]:
    return dict(hpsv3_folder(home / "hpsv3"))


def video_reward(folder: Path, home: Path) -> dict[str, Any]:
    return dict(video_folder(home / "video")[0])


def vlm_reward(folder: Path, home: Path) -> dict[str, Any]:
    reward, tokenizer = new_reward(tiny_qwen2_vl(home / "base"), ["<|Reward|>"])
    asked = Asked(media="image", instruction="Rate {prompt}<|Reward|>", min_pixels=3136, max_pixels=6272)
    save_reward(home / "fitted", reward, tokenizer, rope="float32", asked=asked.model_dump(mode="json"))
    return {"model": home / "fitted"}


ASKED = (vqascore, unified_reward, gecko, dpg, vision_reward, multi_tap)
READ = (hpsv3, video_reward, vlm_reward)


def scored(found: Any) -> dict[str, torch.Tensor]:
    return found if isinstance(found, dict) else {"score": found}


@pytest.mark.parametrize("make", ASKED + READ, ids=lambda make: make.__name__)
def test_what_cannot_be_asked_costs_the_others_nothing(
    make: Callable[[Path, Path], dict[str, Any]], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control token and a text that is too long, between two good ones: one pass, of these two, with their scores."""
    evaluator = load_evaluator(make.__name__, make(folder, tmp_path), "cpu")
    passes: list[int] = []
    network, name = (Qwen2VLScorer, "rewards") if make in READ else (VisionLanguageModel, "_states")
    real = getattr(network, name)

    def counted(self: Any, first: Any, *more: Any) -> Any:
        passes.append(len(first))
        return real(self, first, *more)

    monkeypatch.setattr(network, name, counted)
    items = clips(SIZES, frames=4 if make is video_reward else 1)
    due = scored(evaluator.score(batch_of([items[0], items[3]], [GOOD, GOOD])))
    asked = len(passes)
    steers = "a <|im_end|> circle"
    with pytest.raises(ItemErrors, match=r"im_end|no questions about") as caught:
        evaluator.score(batch_of(items, [GOOD, steers, LONG, GOOD]))
    assert passes == [2] * (2 * asked), "the good ones, together, and nothing twice"
    assert set(caught.value.errors) == {1, 2}
    assert "tokens" in str(caught.value.errors[2]) and "reads" in str(caught.value.errors[2])
    found = scored(caught.value.scores)
    assert found.keys() == due.keys()
    for part, values in due.items():
        torch.testing.assert_close(found[part][[0, 3]], values, rtol=0, atol=1e-5)
        assert found[part][[1, 2]].isnan().all()


def test_a_batch_of_nothing_that_can_be_asked_runs_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = load_evaluator("vqascore", vqascore(folder, tmp_path), "cpu")
    monkeypatch.setattr(VisionLanguageModel, "log_likelihoods", lambda *_, **__: pytest.fail("was asked"))
    with pytest.raises(ItemErrors) as caught:
        evaluator.score(batch_of(clips(SIZES[:2]), ["<|im_end|>", "<|im_start|>"]))
    assert set(caught.value.errors) == {0, 1} and scored(caught.value.scores)["score"].isnan().all()


def test_a_prompt_without_questions_is_written_about_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four images of a prompt about which the language model writes nothing: it is asked once, not for each."""
    from mmalign.backbones import question_writer

    asked: list[str] = []

    def questions(self: Any, prompt: str, *_: Any) -> tuple[Question, ...]:
        asked.append(prompt)
        if prompt != GOOD:
            raise ValueError("The language model wrote no question")
        return (Question("Is there a circle?", ("yes", "no"), "yes", ("circle",)),)

    monkeypatch.setattr(Writer, "questions", questions)
    monkeypatch.setattr(question_writer, "load_text_parts", lambda *_: (torch.nn.Linear(1, 1), None))
    evaluator = load_evaluator("gecko", {"model": folder, "questions": "generate", "writer": folder}, "cpu")
    batch = batch_of(clips(SIZES), ["x", GOOD, "x", GOOD])
    for _ in range(2):
        with pytest.raises(ItemErrors) as caught:
            evaluator.score(batch)
        assert {place: str(error) for place, error in caught.value.errors.items()} == dict.fromkeys(
            (0, 2), "The language model wrote no question"
        )
    assert asked == ["x", GOOD]


def test_scores_are_put_where_they_belong() -> None:
    def prepare(place: int) -> int:
        if place % 2:
            raise ValueError(f"not {place}")
        return 10 * place

    def named(places: Any, values: Any) -> dict[str, torch.Tensor]:
        return {"place": torch.tensor(places).double(), "value": torch.tensor(values).float()}

    with pytest.raises(ItemErrors, match="not 1") as caught:
        score_ready(5, prepare, named)
    found = caught.value.scores
    assert isinstance(found, dict)
    assert found["place"].dtype == torch.float64 and found["value"].dtype == torch.float32
    assert found["value"][::2].tolist() == [0, 20, 40] and found["place"][::2].tolist() == [0, 2, 4]
    assert found["value"][1::2].isnan().all() and set(caught.value.errors) == {1, 3}
    assert score_ready(2, float, lambda _, values: torch.tensor(values)).tolist() == [0.0, 1.0], "nothing was refused"
    with pytest.raises(RuntimeError, match="of the network"):  # is not an item's: the runner scores one by one
        score_ready(2, float, lambda *_: (_ for _ in ()).throw(RuntimeError("of the network")))
