"""Rewards on noisy latents: how they are fitted, what is exported, and what refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_kit import CPU, PROMPTS, given, loaded, maker, pictures, settings, table
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmalign import distributed, train
from mmalign.backbones.latent_reward import load_latent, read_latent
from mmalign.backbones.latent_scoring import LatentScorer
from mmalign.discovery import load_evaluator
from mmalign.evaluation import Batch
from mmalign.jobs import TrainConfig
from mmalign.tasks.inputs import draw
from mmalign.tasks.reward import RewardTask
from mmalign.testing import check_evaluator, tiny_transformers


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return maker(tmp_path_factory)


# --------------------------------------------------------------------------------------------------------- fitting


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, folders: Any) -> tuple[Path, Path, Path]:
    """(export, pipeline, folder of the table) of a flow model's frozen first block with a head of one score."""
    home = tmp_path_factory.mktemp("fitted")
    config = settings(home / "run", folders("sd3"), table(home))
    return train.run(config) / "export", folders("sd3"), home


def test_learns_which_pictures_win_and_scores_them(fitted: tuple[Path, Path, Path]) -> None:
    export, _, home = fitted
    log = [json.loads(line) for line in (export.parent / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["loss"] < 0.69, "noisy latents say less than pictures"
    evaluator = load_evaluator("latent_reward", {"model": str(export)})
    images = pictures(home)
    batch = Batch(images=images, frames=[i[None] for i in images], prompts=["a red circle"] * 6)
    found = evaluator.score(batch)
    dark, bright = found[0::2], found[1::2]
    assert dark.min() > bright.max()
    assert found.abs().max() < 5, "in deviations over what it was fitted to"
    alone = torch.cat([evaluator.score(batch.take([i])) for i in range(6)])
    assert torch.equal(alone, found)
    raw = load_evaluator("latent_reward", {"model": str(export), "normalise": False}).score(batch)
    facts = read_latent(export)
    torch.testing.assert_close((raw - facts.mean[0]) / facts.std[0], found)


def test_head_alone_leaves_the_blocks_to_the_pipeline(fitted: tuple[Path, Path, Path]) -> None:
    """The export has no trunk, and on the pipeline itself the reward runs on the sampler's own modules."""
    export, pipeline, _ = fitted
    assert sorted(p.name for p in export.iterdir()) == ["head.safetensors", "reward.json"]
    adapter = loaded(pipeline)
    reward = load_latent(export, adapter)
    assert reward.network.trunk is None and not any(p.requires_grad for p in reward.network.parameters())
    scorer = LatentScorer(export, CPU, torch.float32)
    asked = given(adapter)
    torch.testing.assert_close(reward.scores(adapter, *asked), scorer.reward.scores(scorer.adapter, *asked))


def test_a_reward_on_a_tuned_pipeline_keeps_its_own_blocks(fitted: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Sampling from a fine-tuned denoiser, the reward still reads with the blocks that it was fitted on."""
    export, pipeline, _ = fitted
    before = loaded(pipeline)
    asked = given(before)
    wanted = load_latent(export, before).scores(before, *asked)
    tuned = loaded(pipeline)
    with torch.no_grad():
        for parameter in tuned.denoiser.parameters():
            parameter.add_(0.05)
    tuned.pipe.save_pretrained(tmp_path / "tuned")
    adapter = loaded(tmp_path / "tuned")
    reward = load_latent(export, adapter)
    assert reward.network.trunk is not None
    torch.testing.assert_close(reward.scores(adapter, *asked), wanted)


@pytest.mark.parametrize("how", ["all", "lora"])
def test_trained_blocks_are_exported(how: str, tmp_path: Path, folders: Any) -> None:
    """What the export gives back is what was trained, adapters merged; embeddings are as they were."""
    lora = {"rank": 2, "alpha": 4.0} if how == "lora" else None
    config = settings(tmp_path / "run", folders("sd3"), table(tmp_path, 6), reward__train="all", lora=lora,
                      optim__steps=4, optim__batch_size=3, optim__gradient_checkpointing=True)  # fmt: skip
    accelerator = distributed.accelerator(config, CPU)
    torch.manual_seed(config.seed)
    task = RewardTask(config, CPU)
    loop = train.Loop(config, task, accelerator)
    loop.fit()
    export = tmp_path / "export"
    task.export(export)
    adapter = loaded(folders("sd3"))
    reward = load_latent(export, adapter)
    asked = given(adapter)
    family = task.source.family
    family.module.eval()
    with torch.no_grad():
        live = family.module(family.adapter, *asked)
        torch.testing.assert_close(reward.scores(adapter, *asked, normalise=False), live, atol=1e-5, rtol=1e-4)
    kept, trunk = adapter.denoiser.state_dict(), load_file(export / "trunk.safetensors")
    changed = {name for name, value in trunk.items() if not torch.equal(value, kept[name])}
    assert changed and all(name.startswith("transformer_blocks.0.") for name in changed)


def test_a_run_stopped_and_resumed_ends_in_the_same_bytes(tmp_path: Path, folders: Any) -> None:
    data = table(tmp_path, 6)
    changes = {"optim__batch_size": 3, "checkpoint__every": 2, "optim__steps": 4}
    whole = train.run(settings(tmp_path / "whole", folders("sd"), data, **changes))
    shutil.copytree(whole, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "export")
    (last,) = (tmp_path / "part" / "checkpoints").glob("*4*")
    shutil.rmtree(last)
    train.run(settings(tmp_path / "part", folders("sd"), data, **changes), resume=True)
    one, other = (load_file(tmp_path / run / "export" / "head.safetensors") for run in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_several_axes_with_ties_and_gaps(tmp_path: Path, folders: Any) -> None:
    """BTT on two axes: scores by name, their mean first, each axis in its own unit; attention pooling."""
    config = settings(
        tmp_path / "run", folders("sd3"), table(tmp_path, axes=True), data__axes=["dark", "bright"], data__ties="soft",
        loss={"kind": "btt"}, reward__latent={"blocks": 1, "hidden": [16], "pooling": "attention", "noised": False},
        optim__steps=60,
    )  # fmt: skip
    export = train.run(config) / "export"
    facts = read_latent(export)
    assert facts.names == ("dark", "bright") and len(facts.mean) == len(facts.std) == 2
    images = pictures(tmp_path)
    batch = Batch(images=images, frames=[i[None] for i in images], prompts=["a red circle"] * 6)
    found = load_evaluator("latent_reward", {"model": str(export)}).score(batch)
    assert list(found) == ["overall", "dark", "bright"]
    assert found["dark"][0::2].mean() > found["dark"][1::2].mean() + 0.5
    assert found["bright"][0::2].mean() < found["bright"][1::2].mean() - 0.5
    torch.testing.assert_close(found["overall"], (found["dark"] + found["bright"]) / 2)


def batches(config: TrainConfig) -> Any:
    torch.manual_seed(config.seed)
    return RewardTask(config, CPU)


def test_draws(tmp_path: Path, folders: Any) -> None:
    """A pair has one time; noise of its own by default, or shared; the draws know nothing of the batch."""
    data = table(tmp_path, 6)
    task = batches(settings(tmp_path / "a", folders("sd3"), data))
    latents, t, _ = task.source._noisy(task.load([(0, 0), (1, 0), (2, 5)])["inputs"])
    assert torch.equal(t[:3], t[3:]) and len(set(t.tolist())) == 3
    alone = task.source._noisy(task.load([(2, 5)])["inputs"])
    assert torch.equal(alone[0], latents[[2, 5]]) and torch.equal(alone[1], t[[2, 5]])
    again = task.source._noisy(task.load([(2, 6)])["inputs"])
    assert not torch.equal(again[1], alone[1])
    swapped = batches(settings(tmp_path / "s", folders("sd3"), data, reward__swap=1.0))
    turned = swapped.source._noisy(swapped.load([(2, 5)])["inputs"])
    assert torch.equal(turned[0], alone[0].flip(0)), "who stands first changes no draw"

    config = settings(tmp_path / "clean", folders("sd3"), data, reward__latent__noised=False)
    task = batches(config)
    _, t, _ = task.source._noisy(task.load([(0, 0)])["inputs"])
    assert t.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["independent", "shared"])
def test_noise_of_a_pair(kind: str, tmp_path: Path, folders: Any) -> None:
    """What noise is in the two latents, from the formula: the same in both where it is shared, else not."""
    task = batches(settings(tmp_path / "a", folders("sd3"), table(tmp_path, 2), reward__latent__noise=kind))
    inputs = task.load([(0, 0)])["inputs"]
    noisy, t, _ = task.source._noisy(inputs)
    clean, _ = task.source._clean(inputs, [draw(0, "posterior", *key) for key in inputs["own"]])
    time = t[:, None, None, None]
    eps = (noisy - (1 - time) * clean) / time
    assert torch.allclose(eps[0], eps[1], atol=1e-3) == (kind == "shared")
    assert 0.7 < eps.std().item() < 1.3


# --------------------------------------------------------------------------------------------------------- refusals


def test_files_that_do_not_fit_are_refused_by_name(
    fitted: tuple[Path, Path, Path], tmp_path: Path, folders: Any
) -> None:
    export, pipeline, _ = fitted
    adapter = loaded(pipeline)
    state = load_file(export / "head.safetensors")

    def folder(name: str, **changes: Any) -> Path:
        place = tmp_path / name
        place.mkdir()
        told = json.loads((export / "reward.json").read_text()) | changes
        (place / "reward.json").write_text(json.dumps(told))
        save_file(state, place / "head.safetensors")
        return place

    place = folder("shape")
    save_file({**state, "map.0.weight": torch.zeros(3, 3)}, place / "head.safetensors")
    with pytest.raises(ValueError, match=r"map\.0\.weight is \[3, 3\]"):
        load_latent(place, adapter)
    place = folder("missing")
    save_file({k: v for k, v in state.items() if k != "map.2.bias"}, place / "head.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: map\.2\.bias"):
        load_latent(place, adapter)
    with pytest.raises(ValueError, match=r"holds no trunk\.safetensors"):
        load_latent(folder("trunk", trunk="own"), adapter)
    with pytest.raises(ValueError, match="no such file; a latent reward is the export"):
        load_latent(tmp_path, adapter)
    with pytest.raises(ValueError, match="scored by fitted_reward"):
        load_latent(folder("other", scorer="fitted_reward"), adapter)
    with pytest.raises(ValueError, match="format"):
        load_latent(folder("format", format=2), adapter)
    with pytest.raises(ValueError, match="predicts flow, and this one predicts eps"):
        load_latent(export, loaded(folders("sd")))
    other = tiny_transformers.tiny_sd3(tmp_path / "sd3", seed=1)
    with pytest.raises(ValueError, match="another text_encoder and another text_encoder_2"):
        load_latent(export, loaded(other))
    gone = folder("gone", parts={**json.loads((export / "reward.json").read_text())["parts"], "transformer": "0"})
    with pytest.raises(ValueError, match="whose files are others by now"):
        load_latent(gone, adapter)
    with pytest.raises(ValueError, match="where transformer changed since"):
        load_evaluator("latent_reward", {"model": str(gone)})


def test_a_run_that_cannot_be_is_refused(tmp_path: Path, folders: Any) -> None:
    data, model = table(tmp_path, 2), folders("sd3")

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            settings(tmp_path / "no", model, data, **changes)

    refused("reward.latent is for model.family: latent, not open_clip", model__family="open_clip", reward__train="all")
    refused("drop one", lora={"rank": 2})
    refused("unlocked_image and _text are for towers", reward__unlocked_image=1)
    refused("model.from_scratch: what reads latents", model__from_scratch=["transformer"])
    refused("has a head of its own", reward__head={"kind": "linear"})
    with pytest.raises(ValueError, match="blocks is 9, and of this SD3"):
        batches(settings(tmp_path / "no", model, data, reward__latent__blocks=9))
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        train.run(settings(tmp_path / "no", tmp_path, data))
    assert not (tmp_path / "no").exists()


def test_weights_of_axes(fitted: tuple[Path, Path, Path]) -> None:
    export, pipeline, _ = fitted
    reward = load_latent(export, loaded(pipeline))
    assert reward.weights({"score": 2.0}).tolist() == [2.0]
    with pytest.raises(ValueError, match="no axis 'MQ'; it has score"):
        reward.weights({"MQ": 1.0})


def test_keeps_the_contract_of_evaluators(fitted: tuple[Path, Path, Path]) -> None:
    sizes = ((32, 32), (33, 70))
    check_evaluator("latent_reward", {"model": str(fitted[0])}, prompts=PROMPTS[:2], sizes=sizes, processes=1)


@pytest.mark.parametrize("t", [0.2, 0.8, 0.95])
def test_why_noise_of_their_own(t: float) -> None:
    """A linear reward fitted to Bradley-Terry labels of x_0 ~ N(0, 1): how steep it is at flow time t.

    Shared noise cancels in the difference, and the fit is beta / a, without bound towards pure noise. With noise of
    their own it stays below the conditional mean's beta a / (a^2 + s^2), which guidance wants.
    """
    generator = torch.Generator().manual_seed(0)
    beta, a, s = 2.0, 1 - t, t
    x, noise = torch.randn(2, 2, 40000, generator=generator, dtype=torch.float64)
    label = torch.bernoulli(torch.sigmoid(beta * (x[0] - x[1])), generator=generator)
    fitted = {}
    for kind, eps in (("shared", noise[:1].expand(2, -1)), ("independent", noise)):
        noisy = a * x + s * eps
        slope = torch.zeros((), dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([slope], max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-12)

        def closure(slope: Tensor = slope, noisy: Tensor = noisy, search: Any = search) -> Tensor:
            search.zero_grad()
            logit = slope * (noisy[0] - noisy[1])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, label)
            loss.backward()
            return loss

        search.step(closure)
        fitted[kind] = slope.item()
    assert fitted["shared"] == pytest.approx(beta / a, rel=0.05)
    assert 0 < fitted["independent"] < beta * a / (a**2 + s**2)
