"""Evaluators as rewards: what scoring says of the written file, weights and signs, clips, gradients, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign import score
from mmalign.config import Strict
from mmalign.evaluation import (
    Backbones,
    Batch,
    Evaluator,
    ItemErrors,
    Scores,
    SetEvaluator,
    Uniform,
    score_ready,
)
from mmalign.guidance.rewards import (
    Costs,
    Rewards,
    differentiable,
    fitting,
    load_scorers,
    refuse_without_gradient,
    without_gradients,
)
from mmalign.jobs import ScoreConfig
from mmalign.jobs_align import EvaluatorSpec, RewardSpec
from mmalign.media import write_image, write_video
from mmalign.media_table import MediaRow, write_media_table
from mmalign.pixel_scores import PixelScorer
from mmalign.results import read_results
from mmalign.score_plan import Job

CPU = torch.device("cpu")
HPS = {"name": "hps", "params": {"checkpoint": "assets/shapes-clip"}}
PROMPTS = ["a red circle", "a large green square on a grey background", "a blue triangle"]


class Brightness(Evaluator):
    """Mean of the pixels, from 0 to 1, of images and of the picked frames of clips."""

    needs = frozenset({"frames"})
    modality = frozenset({"image", "video"})
    frames = Uniform(3)
    differentiable = True
    licence = source = "test"

    def score(self, batch: Batch) -> dict[str, Tensor]:
        mean = torch.stack([clip.double().mean() / 255 for clip in batch.clips()])
        return {"mean": mean, "frames": torch.tensor([float(len(clip)) for clip in batch.clips()], dtype=torch.float64)}

    def score_tensor(self, images: Tensor, prompts: Any) -> Tensor:
        return images.mean((1, 2, 3))


class Darkness(Evaluator):
    """Mean of the pixels, the lower the better, of stills alone."""

    needs = frozenset({"image"})
    higher_is_better = False
    licence = source = "test"

    def score(self, batch: Batch) -> Tensor:
        return torch.stack([image.double().mean() / 255 for image in batch.images])


class Broken(Evaluator):
    """Refuses the second item of a batch, and has no score for the first."""

    licence = source = "test"

    def score(self, batch: Batch) -> Tensor:
        scores = torch.arange(len(batch), dtype=torch.float64)
        scores[0] = math.nan
        raise ItemErrors({1: ValueError("no")}, scores)


class Motion(Evaluator):
    """Mean difference between neighbouring frames: of clips alone, whole."""

    needs = frozenset({"frames"})
    modality = frozenset({"video"})
    differentiable = True
    licence = source = "test"

    def score(self, batch: Batch) -> Tensor:
        assert all(fps == 8.0 for fps in batch.fps)
        return torch.stack([clip.double().diff(dim=0).abs().mean() / 255 for clip in batch.frames])

    def score_tensor(self, images: Tensor, prompts: Any) -> Tensor:
        return images.diff(dim=1).abs().mean((1, 2, 3, 4))


def _scorer(cls: Any, frames: int = 4, fps: float | None = None) -> PixelScorer:
    return PixelScorer(cls(Strict(), {}, CPU), cls.__name__, frames, fps)


def _rewards(*parts: tuple[Any, float, str | None], **options: Any) -> Rewards:
    specs = [RewardSpec(name=cls.__name__, weight=weight, subscore=sub) for cls, weight, sub in parts]
    return Rewards(specs, [_scorer(cls, **options) for cls, _, _ in parts])


def _pixels(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random(shape, dtype=np.float32))


# ------------------------------------------------------------------------------------------------ as scoring says


def _loaded(specs: list[dict[str, Any]], modality: str = "image", **options: Any) -> list[PixelScorer]:
    jobs = fitting([EvaluatorSpec.model_validate(spec) for spec in specs], "rewards")
    return load_scorers(jobs, modality, CPU, dtype="float32", backbones=Backbones(), **options)


def _scored(rows: list[MediaRow], folder: Path, specs: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """What `mmalign score` says of media, by (sample, sub-score)."""
    write_media_table(folder / "table.jsonl", rows)
    config = {"table": folder / "table.jsonl", "output": folder / "scores", "evaluators": specs, "device": "cpu"}
    score.run(ScoreConfig.model_validate(config))
    return {(row["sample"], row["subscore"]): row["score"] for row in read_results(folder / "scores").rows}


def test_a_reward_is_what_scoring_says_of_the_written_picture(tmp_path: Path) -> None:
    pixels = _pixels(3, 3, 40, 64)
    rows = []
    for k, picture in enumerate(pixels):
        write_image(tmp_path / f"{k}.png", (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        rows.append(MediaRow(str(k), PROMPTS[k], str(tmp_path / f"{k}.png")))
    specs = [HPS, {"name": "shapes_truth"}]
    told = _scored(rows, tmp_path, specs)
    hps, truth = _loaded(specs)
    found = {**hps.named(pixels, PROMPTS), **truth.named(pixels, PROMPTS)}
    assert len(told) == 3 * len(found) and len(found) == 6
    for (sample, name), value in told.items():
        assert found[name][int(sample)].item() == pytest.approx(value, abs=1e-6), name


def test_a_reward_is_what_scoring_says_of_a_lossless_clip(tmp_path: Path) -> None:
    pixels = _pixels(2, 3, 12, 40, 64)
    rows = []
    for k, clip in enumerate(pixels):
        frames = (clip.transpose(0, 1) * 255).round().to(torch.uint8)
        write_video(tmp_path / f"{k}.mp4", frames, 8, lossless=True)
        rows.append(MediaRow(str(k), PROMPTS[k], str(tmp_path / f"{k}.mp4"), "video"))
    told = _scored(rows, tmp_path, [HPS])
    found = _loaded([HPS], "video", fps=8.0)[0].named(pixels, PROMPTS[:2])["score"]
    assert found.tolist() == pytest.approx([told["0", "score"], told["1", "score"]], abs=1e-6)


# ----------------------------------------------------------------------------------------------- sums and clips


def test_weights_signs_and_names() -> None:
    pixels = _pixels(4, 3, 8, 8)
    rewards = _rewards((Brightness, 2.0, "mean"), (Darkness, 0.5, None), (Brightness, 0.0, "frames"))
    mean = (pixels * 255).round().double().mean((1, 2, 3)) / 255
    parts = rewards.parts(pixels, [*PROMPTS, "x"])
    assert list(parts) == rewards.names == ["Brightness/mean", "Darkness", "Brightness/frames"]
    torch.testing.assert_close(parts["Darkness"], mean)
    torch.testing.assert_close(rewards.scores(pixels, [*PROMPTS, "x"]), 2 * mean - 0.5 * mean)
    assert parts["Brightness/frames"].tolist() == [1.0] * 4


def test_a_subscore_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="Brightness gives mean, frames, not 'hue'; name one of these"):
        _rewards((Brightness, 1.0, "hue")).scores(_pixels(1, 3, 8, 8), ["x"])


def test_what_cannot_be_scored_is_never_chosen() -> None:
    found = _rewards((Broken, 1.0, None)).scores(_pixels(3, 3, 8, 8), PROMPTS)
    assert found.tolist() == [-math.inf, -math.inf, 2.0]


class Refuses(Evaluator):
    """Refuses all that is drawn, so that nobody sees the names of its sub-scores."""

    licence = source = "test"

    def score(self, batch: Batch) -> Scores:
        def refused(place: int) -> None:
            raise ValueError("too small")

        return score_ready(len(batch), refused, lambda places, ready: {"mean": torch.zeros(len(places))})


def test_why_nothing_has_a_score_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rewards = _rewards((Refuses, 1.0, "mean"))
    for _ in range(3):
        assert rewards.scores(_pixels(2, 3, 8, 8), PROMPTS[:2]).tolist() == [-math.inf] * 2
    assert [record.message for record in caplog.records] == ["Refuses has no score of 2 of 2 drawings: too small"]


def test_clips_are_whole_for_those_who_take_clips_and_stills_for_others() -> None:
    pixels = _pixels(2, 3, 9, 8, 8)
    whole = (pixels * 255).round() / 255
    frames = whole.mean((1, 3, 4)).double()  # [2, 9]
    rewards = _rewards((Brightness, 1.0, None), (Darkness, 1.0, None), (Motion, 1.0, None), frames=2, fps=8.0)
    parts = rewards.parts(pixels, PROMPTS[:2])
    torch.testing.assert_close(parts["Brightness"], frames[:, [0, 4, 8]].mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(parts["Darkness"], frames[:, [0, 8]].mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(parts["Motion"], whole.double().diff(dim=2).abs().mean((1, 2, 3, 4)), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 9, 8, 8)])
def test_the_tensor_is_the_score_with_a_gradient(shape: tuple[int, ...]) -> None:
    pixels = ((_pixels(*shape) * 255).round() / 255).requires_grad_()
    clips = len(shape) == 5
    rewards = _rewards((Brightness, 2.0, "mean"), *(((Motion, 1.0, None),) if clips else ()), fps=8.0)
    found = rewards.tensor(pixels, PROMPTS[:2])
    torch.testing.assert_close(found.double(), rewards.scores(pixels, PROMPTS[:2]), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), pixels)
    if not clips:
        torch.testing.assert_close(gradient, torch.full_like(gradient, 2.0 / 192))
    else:
        seen = gradient.abs().sum((0, 1, 3, 4)) > 0
        assert seen.all(), "motion looks at every frame"


def test_hps_has_the_same_score_with_and_without_a_gradient() -> None:
    pixels = (_pixels(2, 3, 32, 32) * 255).round() / 255
    rewards = Rewards([RewardSpec(**HPS)], _loaded([HPS]))
    assert rewards.differentiable
    torch.testing.assert_close(
        rewards.tensor(pixels, PROMPTS[:2]).double().detach(), rewards.scores(pixels, PROMPTS[:2]), rtol=0, atol=1e-5
    )


def test_a_reward_without_gradient_is_named_with_the_alternatives() -> None:
    rewards = _rewards((Brightness, 1.0, None), (Darkness, 1.0, None))
    assert not rewards.differentiable
    with pytest.raises(ValueError, match="Darkness cannot be differentiated") as told:
        rewards.tensor(_pixels(1, 3, 8, 8), ["x"])
    assert "hps" in differentiable() and "shapes_truth" not in differentiable()
    assert {"best_of_n", "search"} <= {*without_gradients()}
    for each in ("hps", "clip_score", "best_of_n", "search"):
        assert each in str(told.value)
    refuse_without_gradient([(RewardSpec(name="x", weight=0), Darkness)])  # reported, not followed


def test_only_the_first_subscore_has_a_gradient() -> None:
    rewards = _rewards((Brightness, 1.0, "frames"))
    with pytest.raises(ValueError, match="Brightness has a gradient for mean alone, not for frames"):
        rewards.tensor(_pixels(1, 3, 8, 8), ["x"])


# ------------------------------------------------------------------------------------------------ costs, refusals


def test_every_look_is_paid_by_its_request() -> None:
    rewards = _rewards((Brightness, 1.0, None), (Brightness, 0.5, "frames"))
    rewards.spent = [Costs(), Costs()]
    rewards.scores(_pixels(4, 3, 8, 8), ["x"] * 4)
    rewards.scores(_pixels(3, 3, 8, 8), ["x"] * 3, rows=[1, 1, 0])
    assert [(each.reward_calls, each.reward_gradients) for each in rewards.spent] == [(3, 0), (4, 0)]
    single = _rewards((Brightness, 1.0, None))
    single.spent = [Costs(), Costs()]
    single.tensor(_pixels(2, 3, 8, 8), ["x"] * 2)
    assert [(each.reward_calls, each.reward_gradients) for each in single.spent] == [(0, 1), (0, 1)]


class _Whole(SetEvaluator):
    """A set."""

    licence = source = "test"

    def update(self, batch: Batch) -> None: ...

    def compute(self) -> float:
        return 0.0


def test_evaluators_that_cannot_judge_a_drawing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"There is no evaluator 'hpss'\. Did you mean 'hps'"):
        fitting([EvaluatorSpec(name="hpss")], "guidance.rewards")
    with pytest.raises(
        ValueError, match=r"guidance\.rewards: geneval needs aux, which nothing that is being.*mmalign score"
    ):
        fitting([EvaluatorSpec(name="geneval")], "guidance.rewards")
    monkeypatch.setattr("mmalign.guidance.rewards.evaluator_class", lambda name: _Whole)
    with pytest.raises(ValueError, match=r"guidance\.held_out: whole scores whole sets"):
        fitting([EvaluatorSpec(name="whole")], "guidance.held_out")
    motion = Job("motion", "motion", Motion, Strict(), "{}", None)
    with pytest.raises(ValueError, match="motion scores videos, and this model draws images"):
        load_scorers([motion], "image", CPU, dtype="float32", backbones=Backbones())


def test_equal_evaluators_are_loaded_once() -> None:
    first, second = _loaded([{"name": "shapes_truth"}, {"name": "shapes_truth"}])
    assert first is second
