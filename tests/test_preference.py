"""Diffusion-DPO on real pipelines: what a pair shares, which reference it is held against, and that it learns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from training_kit import config, moved, preferences, records

from mmalign import checkpoints, train
from mmalign.cache import Cache
from mmalign.media import write_image
from mmalign.noise import Process
from mmalign.records import MediaRef
from mmalign.tables import PreferenceRow, write_preferences
from mmalign.tasks.preference import PreferenceTask
from mmalign.testing.tiny import tiny_sd, tiny_sdxl

LN2 = torch.tensor(2.0).log().item()
CPU = torch.device("cpu")


@pytest.fixture(scope="module", name="models")
def _models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    return {"sd": tiny_sd(home / "sd"), "v": tiny_sd(home / "v", "v_prediction"), "sdxl": tiny_sdxl(home / "sdxl")}


@pytest.fixture(scope="module", name="table")
def _table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return preferences(tmp_path_factory.mktemp("data"))


def _errors(task: PreferenceTask, items: int = 4, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors of policy and reference for the first items."""
    batch = task.load([(i, epoch) for i in range(items)])
    inputs = task._inputs(batch)
    with torch.no_grad():
        model = task._errors(task.adapter.predict(*inputs[:3]), inputs[3])
    return model, task._reference_errors(batch, *inputs)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Counts the calls of every UNet."""
    calls, forward = [0], UNet2DConditionModel.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return forward(self, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(UNet2DConditionModel, "forward", counting)
    yield calls
    patch.undo()


# -------------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("model", ["sd", "v", "sdxl"])
@pytest.mark.parametrize("lora", [True, False])
def test_steps_lower_the_loss_from_ln_2(
    models: dict[str, Path], table: Path, tmp_path: Path, model: str, lora: bool
) -> None:
    """One fixed draw per pair and all pairs in each batch: the same objective in each step, which must fall."""
    run = config(
        tmp_path / "run", models[model], table, lora={"rank": 4} if lora else None, reference__draws=1,
        optim__batch_size=4, optim__steps=6, optim__lr=5e-3 if lora else 2e-4,
    )  # fmt: skip
    train.run(run)
    found = records(run.output)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    if model == "sdxl":  # policy and reference differ in the last digit, for a reason not found; beta = 500 enlarges it
        assert found[0]["loss"] == pytest.approx(LN2, abs=1e-4)
        assert found[0]["margin"] == pytest.approx(0, abs=2e-4)
    else:
        assert (found[0]["loss"], found[0]["margin"], found[0]["implicit_accuracy"]) == (LN2, 0, 0.5)
    assert found[-1]["loss"] < LN2 - 0.05
    assert found[-1]["implicit_accuracy"] > 0.5
    wanted = {
        "loss", "implicit_accuracy", "margin", "model_w_err", "model_l_err", "ref_w_err", "ref_l_err", "grad_norm",
        "pairs_per_second", "peak_memory", "lr", "epoch", "step",
    }  # fmt: skip
    assert wanted <= found[0].keys()
    errors = [record["ref_w_err"] for record in found]
    assert errors == pytest.approx(errors[:1] * 6, rel=1e-6), "the reference must not move; the order of pairs does"


def test_beta_is_reported_in_both_units(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    by_mean = PreferenceTask(config(tmp_path / "a", models["sd"], table, loss__beta=512.0), CPU).facts
    by_sum = PreferenceTask(
        config(tmp_path / "a", models["sd"], table, loss__beta=2.0, loss__reduction="sum"), CPU
    ).facts
    for facts in (by_mean, by_sum):
        assert (facts["latent_elements"], facts["beta_per_sample"], facts["beta_per_element"]) == (256, 512.0, 2.0)


def test_sum_with_beta_per_element_trains_as_mean(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    runs = [
        config(tmp_path / "mean", models["sd"], table, loss__beta=512.0, optim__steps=3),
        config(tmp_path / "sum", models["sd"], table, loss__beta=2.0, loss__reduction="sum", optim__steps=3),
    ]
    losses = [[record["loss"] for record in records(train.run(run))] for run in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0, atol=2e-4)
    assert losses[0][-1] != LN2


# -------------------------------------------------------------------------------------------------- references


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_every_kind_of_reference_gives_the_same_errors(
    models: dict[str, Path], table: Path, tmp_path: Path, model: str
) -> None:
    found = {}
    for lora in ({"rank": 4}, None):
        for kind in ("adapter_off", "frozen", "cached") if lora else ("frozen", "cached"):
            run = config(
                tmp_path / "run", models[model], table, lora=lora, reference={"kind": kind, "draws": 1},
                data__cache_dir=str(tmp_path / f"cache-{bool(lora)}-{kind}"),
            )  # fmt: skip
            task = moved(run, noise=0.05)
            policy, fresh = _errors(task)
            _, again = _errors(task)
            torch.testing.assert_close(again, fresh, rtol=0, atol=1e-6)
            assert (policy - fresh).abs().max() > 1e-3, "the policy has moved away from its reference"
            found[bool(lora), kind] = fresh
            assert fresh.dtype == torch.float32
    first = found[True, "adapter_off"]
    for name, errors in found.items():
        torch.testing.assert_close(errors, first, rtol=0, atol=1e-5, msg=str(name))


def test_a_frozen_reference_is_a_copy_that_does_not_train(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    task = moved(config(tmp_path / "run", models["sd"], table, lora=None), noise=0.05)
    assert task.frozen is not None
    assert not any(parameter.requires_grad for parameter in task.frozen.parameters())
    assert not {id(p) for p in task.frozen.parameters()} & {id(p) for p in task.modules.parameters()}
    task.loss(task.load([(0, 0), (1, 0)]))[0].backward()
    assert all(parameter.grad is None for parameter in task.frozen.parameters())


@pytest.mark.parametrize("lora", [True, False])
def test_cached_reference_passes_are_never_paid_again(
    models: dict[str, Path], table: Path, tmp_path: Path, lora: bool
) -> None:
    """Four pairs with two draws in batches of two: four passes fill the cache, whatever comes after."""

    def calls(name: str, **changes: Any) -> int:
        changes = {"optim__steps": 8, **changes}
        run = config(tmp_path / name, models["sd"], table, lora={"rank": 2} if lora else None, **changes)
        with _counted() as count:
            train.run(run)
        return count[0]

    cached = {"reference__kind": "cached", "reference__draws": 2}
    assert calls("plain", reference__draws=2) == 16
    assert calls("first", **cached) == 8 + 4
    assert calls("again", **cached, loss__beta=50.0) == 8
    assert calls("anchored", **cached, guards__winner=0.5, loss__kappa=1.0, optim__accumulate=2, optim__steps=4) == 8
    assert calls("other-seed", **cached, seed=1) == 8 + 4
    assert calls("other-times", **cached, timesteps__low=0.5) == 8 + 4


def test_a_cached_run_is_the_uncached_run(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    weights = []
    for kind in ("adapter_off", "cached"):
        run = config(tmp_path / kind, models["sd"], table, reference={"kind": kind, "draws": 2}, optim__steps=6)
        train.run(run)
        weights.append(load_file(run.output / "export" / "pytorch_lora_weights.safetensors"))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-6, msg=name)


def test_cached_errors_are_two_numbers_per_draw(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    run = config(tmp_path / "run", models["sd"], table, lora=None, reference={"kind": "cached", "draws": 3})
    PreferenceTask(run, CPU)
    held = {each.kind: each.entries for each in Cache(tmp_path / "cache").ls()}
    assert held["reference_errors"] == 4 * 3
    files = list((tmp_path / "cache" / "reference_errors").rglob("*.safetensors"))
    assert all(load_file(file)["errors"].shape == (2,) for file in files)


def test_a_changed_schedule_or_model_misses_the_cache(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    cached = {"reference": {"kind": "cached", "draws": 1}, "lora": None}
    PreferenceTask(config(tmp_path / "run", models["sd"], table, **cached), CPU)
    with _counted() as calls:
        PreferenceTask(config(tmp_path / "run", models["sd"], table, **cached), CPU)
        assert calls[0] == 0
        other = tiny_sd(tmp_path / "other")
        file = other / "scheduler" / "scheduler_config.json"
        file.write_text(file.read_text().replace("0.012", "0.013"))
        PreferenceTask(config(tmp_path / "run", other, table, **cached), CPU)
        assert calls[0] == 2
        PreferenceTask(config(tmp_path / "run", tiny_sd(tmp_path / "third", seed=5), table, **cached), CPU)
        assert calls[0] == 4


def test_draws_are_visited_in_turn(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    def numbers(**changes: Any) -> list[int]:
        task = PreferenceTask(config(tmp_path / "run", models["sd"], table, **changes), CPU)
        return [task.load([(0, epoch)])["numbered"][0][1] for epoch in range(5)]

    assert numbers() == [0, 1, 2, 3, 4]
    assert numbers(reference__draws=2) == [0, 1, 0, 1, 0]


# --------------------------------------------------------------------------------------------- what a pair shares


def test_a_pair_shares_time_noise_crop_flip_and_dropped_caption(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides show one picture, so that whatever is drawn apart shows as a difference."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(3):
        picture = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        places = [tmp_path / f"{i}-{side}.png" for side in ("w", "l")]
        for place in places:
            write_image(place, picture)
        media = (MediaRef(str(places[0])), MediaRef(str(places[1])))
        rows.append(PreferenceRow("a red circle", media, label={"overall": "A"}))
    write_preferences(tmp_path / "pairs.jsonl", rows)
    task = PreferenceTask(
        config(
            tmp_path / "run", models["sdxl"], tmp_path / "pairs.jsonl", data__crop="random", data__flip=0.5,
            data__caption_dropout=0.5, data__cache="off",
        ),
        CPU,
    )  # fmt: skip
    seen: dict[str, torch.Tensor] = {}
    noisy = Process.noisy

    def spy(process: Process, latents: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        seen.update(t=t, noise=noise)
        return noisy(process, latents, t, noise)

    monkeypatch.setattr(Process, "noisy", spy)
    batch = task.load([(i, epoch) for epoch in range(8) for i in range(3)])
    pixels = torch.stack([item.pixels for item in batch["fetched"]])
    assert torch.equal(pixels[::2], pixels[1::2])
    _, _, condition, _ = task._inputs(batch)
    for name, value in {**seen, **condition}.items():
        assert torch.equal(value[::2], value[1::2]), name
    count, prompts = len(batch["numbered"]), batch["prompts"][::2]
    assert len({tuple(row.flatten()[:4].tolist()) for row in seen["noise"]}) == count, "pairs differ"
    assert len(set(seen["t"].tolist())) > count // 2
    sizes = [tuple(item.sizes.tolist()) for item in batch["fetched"]]
    assert len(set(sizes)) > 5, "crops differ between draws"
    assert 0 < prompts.count("") < count
    dropped = torch.tensor([not prompt for prompt in prompts])
    assert not condition["text_embeds"][::2][dropped].any()
    assert condition["text_embeds"][::2][~dropped].any(dim=1).all()


def test_a_draw_does_not_depend_on_its_batch(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    settings = config(tmp_path / "run", models["sd"], table, data__flip=0.5, data__caption_dropout=0.3)
    task = PreferenceTask(settings, CPU)
    whole = task._inputs(task.load([(0, 5), (1, 5), (2, 5), (3, 5)]))
    alone = task._inputs(task.load([(2, 5)]))
    for together, single in zip((whole[0], whole[1], whole[3]), (alone[0], alone[1], alone[3]), strict=True):
        assert torch.equal(together[[4, 5]], single)
    torch.testing.assert_close(
        whole[2]["encoder_hidden_states"][[4, 5]], alone[2]["encoder_hidden_states"], rtol=0, atol=0
    )


@pytest.mark.parametrize("ties", ["drop", "half"])
def test_the_layout_of_a_step_does_not_matter(models: dict[str, Path], tmp_path: Path, ties: str) -> None:
    """Two micro-batches of two are one of four, also when weights differ (a tie as both orders at half weight)."""
    table = preferences(tmp_path, pairs=3, ties=1)
    weights = []
    for name, accumulate, size in (("two", 2, 2), ("one", 1, 4)):
        run = config(
            tmp_path / name, models["sd"], table, data__ties=ties, optim__accumulate=accumulate,
            optim__batch_size=size, optim__steps=4, optim__eps=1e-6,
        )  # fmt: skip
        train.run(run)
        weights.append(checkpoints.read(checkpoints.newest(run.output / "checkpoints"))[0])  # type: ignore[arg-type]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5, msg=name)
    assert max(value.abs().max().item() for name, value in weights[0].items() if "lora_B" in name) > 1e-3


@pytest.mark.parametrize(
    ("ties", "labels", "weights"),
    [("drop", [1, 1], [1, 1]), ("soft", [1, 1, 0.5], [1, 1, 1]), ("half", [1, 1, 1, 1], [1, 1, 0.5, 0.5])],
)
def test_ties(models: dict[str, Path], tmp_path: Path, ties: str, labels: list[float], weights: list[float]) -> None:
    task = PreferenceTask(config(tmp_path / "run", models["sd"], preferences(tmp_path, 2, 1), data__ties=ties), CPU)
    batch = task.load([(i, 0) for i in range(task.size)])
    assert batch["label"].tolist() == labels
    assert batch["weight"].tolist() == weights
    if ties == "half":
        names = [tuple(medium.name for medium in group.media) for group in task.groups[2:]]
        assert names[0] == names[1][::-1]


# ------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("lora", [True, False])
def test_bf16_runs_on_a_cpu_with_float32_errors(
    models: dict[str, Path], table: Path, tmp_path: Path, lora: bool
) -> None:
    run = config(
        tmp_path / "run", models["sdxl"], table, precision="bf16", lora={"rank": 2} if lora else None, optim__steps=2
    )
    train.run(run)
    found = records(run.output)
    assert found[0]["loss"] == LN2
    assert all(np.isfinite(list(record.values())).all() for record in found)
    # bfloat16 has 8 bits: an error that had passed through it would be a multiple of 2**-8 near 1
    assert any((record["model_w_err"] * 256) % 1 for record in found)
    weights, state = checkpoints.read(checkpoints.newest(run.output / "checkpoints"))  # type: ignore[arg-type]
    assert {value.dtype for value in weights.values()} == {torch.float32}
    moments = [value for entry in state["optimizer"]["state"].values() for value in entry.values()]
    assert {value.dtype for value in moments} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_gradients(
    models: dict[str, Path], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under checkpointing every picture projects its prompt itself, which sums in another order; so do both here.
    monkeypatch.setattr("mmalign.tasks.preference.once_per_prompt", lambda denoiser, prompts: nullcontext())
    gradients = []
    for on in (False, True):
        task = moved(config(tmp_path / "run", models["sd"], table, optim__gradient_checkpointing=on), noise=0.05)
        assert task.adapter.denoiser.is_gradient_checkpointing == on
        task.loss(task.load([(0, 0), (1, 0)]))[0].backward()
        gradients.append({name: p.grad for name, p in task.modules.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_only_the_adapter_trains(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    task = PreferenceTask(config(tmp_path / "run", models["sdxl"], table), CPU)
    parts = (task.adapter.denoiser, task.adapter.vae, task.adapter.pipe.text_encoder, task.adapter.pipe.text_encoder_2)
    trained = [name for part in parts for name, p in part.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_an_unknown_lora_target_is_named(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lora\.targets: .*'to_qq'; did you mean 'to_q'\?"):
        PreferenceTask(config(tmp_path / "run", models["sd"], table, lora={"targets": ["to_k", "to_qq"]}), CPU)


def test_a_batch_is_described_by_its_rows(models: dict[str, Path], table: Path, tmp_path: Path) -> None:
    task = PreferenceTask(config(tmp_path / "run", models["sd"], table), CPU)
    assert task.describe(task.load([(1, 0), (3, 0)])) == "pairs.jsonl line 2, pairs.jsonl line 4"
