"""What saves memory changes no result: parts that wait in CPU memory, slices of batches, gradient checkpointing.

Without a GPU both places are the CPU; the device is called `cpu:0` here, which torch takes for the same and which can
be told from `cpu`, where parts wait.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from training_kit import config, moved, preferences

from mmalign.jobs_inputs import Model
from mmalign.models import base
from mmalign.models.adapter import Adapter
from mmalign.testing import tiny
from mmalign.testing import tiny_transformers as still
from mmalign.testing import tiny_video as video

DEVICE = torch.device("cpu", 0)


@pytest.fixture(scope="module", name="sd")
def _sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_sd(tmp_path_factory.mktemp("sd") / "model")


@pytest.fixture(name="task")
def _task(tmp_path: Path, sd: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    table = preferences(tmp_path)
    monkeypatch.setattr(Adapter, "device", property(lambda self: DEVICE))

    def make(**changes: Any) -> Any:
        return moved(config(tmp_path / "run", sd, table, data__cache="off", **changes))

    return make


def places(parts: dict[str, nn.Module]) -> dict[str, str]:
    """Where each part has been moved to last, kept up to date."""
    found = dict.fromkeys(parts, "cpu")

    def watch(name: str, part: Any) -> None:
        to = part.to

        def recorded(where: Any) -> Any:
            found[name] = str(torch.device(where))
            return to(where)

        part.to = recorded

    for name, part in parts.items():
        watch(name, part)
    return found


def test_encoders_are_on_the_device_while_they_encode_and_nowhere_else(
    task: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = task(optim__offload=["vae", "text_encoder"])
    pipe = run.adapter.pipe
    where, seen = places({"vae": pipe.vae, "text_encoder": pipe.text_encoder, "unet": pipe.unet}), []
    encode, forward = pipe.vae.encode, pipe.text_encoder.forward

    def encoding(*args: Any, **kwargs: Any) -> Any:
        seen.append(("vae", dict(where)))
        return encode(*args, **kwargs)

    def reading(*args: Any, **kwargs: Any) -> Any:
        seen.append(("text_encoder", dict(where)))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.vae, "encode", encoding)
    monkeypatch.setattr(pipe.text_encoder, "forward", reading)
    pipe.unet.register_forward_pre_hook(lambda *args: seen.append(("unet", dict(where))))
    loss, _ = run.loss(run.load([(0, 0), (1, 0)]))
    loss.backward()
    for name, at in seen:
        there = {part for part, place in at.items() if place == "cpu:0"}
        assert there == ({name} if name != "unet" else set()), (name, at)
    assert {name for name, _ in seen} == {"vae", "text_encoder", "unet"}
    assert set(where.values()) == {"cpu"}


def test_a_lent_part_goes_back_when_something_fails_and_once_however_deep(sd: Path) -> None:
    adapter: Any = base.load(Model(path=sd), waiting=["vae", "text_encoder"])
    assert adapter.waiting == {"vae", "text_encoder"}
    where = places({"vae": adapter.vae})
    adapter.__class__ = type("There", (type(adapter),), {"device": property(lambda self: DEVICE)})
    with adapter.at_hand("vae"):
        with adapter.at_hand("vae", "text_encoder"):
            assert where["vae"] == "cpu:0"
        assert where["vae"] == "cpu:0"
    assert where["vae"] == "cpu"
    with pytest.raises(RuntimeError, match="broken"), adapter.at_hand("vae"):
        raise RuntimeError("broken")
    assert where["vae"] == "cpu"


def losses(run: Any) -> tuple[Tensor, Tensor]:
    loss, _ = run.loss(run.load([(0, 0), (1, 0)]))
    trained = [p for p in run.modules.parameters() if p.requires_grad]
    return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


@pytest.mark.parametrize("changes", [{}, {"lora": None}])
def test_offloading_changes_nothing(changes: dict[str, Any], task: Callable[..., Any]) -> None:
    names = ["vae", "text_encoder", *(["reference"] if changes else [])]
    for one, other in zip(losses(task(**changes)), losses(task(**changes, optim__offload=names)), strict=True):
        assert torch.equal(one, other)


def test_the_frozen_reference_is_lent_for_its_pass(task: Callable[..., Any]) -> None:
    run = task(lora=None, optim__offload=["reference"])
    where, seen = places({"reference": run.frozen}), []
    run.frozen.register_forward_pre_hook(lambda *args: seen.append(where["reference"]))
    run.adapter.denoiser.register_forward_pre_hook(lambda *args: seen.append(where["reference"]))
    run.loss(run.load([(0, 0)]))
    assert seen == ["cpu", "cpu:0"] and where["reference"] == "cpu"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__offload": ["reference"], "reference": {"kind": "adapter_off"}}, "no second model"),
        ({"optim__offload": ["text_encoder"], "lora": None, "optim__train_text_encoder": True}, "stays on the device"),
        ({"optim__offload": ["vae"], "sharding": "fsdp2"}, "drop one"),
        ({"optim__offload": ["unet"]}, "offload"),
    ],
)
def test_what_cannot_be_put_away_is_named(changes: dict[str, Any], message: str, tmp_path: Path, sd: Path) -> None:
    with pytest.raises(ValidationError, match=message):
        config(tmp_path / "run", sd, tmp_path / "pairs.jsonl", **changes)


# ------------------------------------------------------------------------------------------ slices and tiles


@pytest.mark.parametrize(
    "maker",
    [tiny.tiny_sd, still.tiny_sana, still.tiny_qwen_image, video.tiny_wan, video.tiny_cogvideox,
     video.tiny_hunyuan_video, video.tiny_ltx],
)  # fmt: skip
def test_slices_give_what_the_batch_gives(maker: Callable[[Path], Path], tmp_path: Path) -> None:
    path = maker(tmp_path / "model")  # in float64: what float32 rounds differs with the batch, and with the processor
    whole, sliced = (base.load(Model(path=path, vae={"slicing": on})) for on in (False, True))
    assert sliced.vae.use_slicing and not whole.vae.use_slicing  # type: ignore[attr-defined]
    for adapter in (whole, sliced):
        adapter.vae.double()
    frames = (9,) if whole.modality == "video" else ()
    pixels = torch.rand(3, 3, *frames, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, other = whole.encode_media(pixels), sliced.encode_media(pixels)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # statistics are kept in float32
    with torch.no_grad():
        torch.testing.assert_close(whole.decode(one[:, 0]), sliced.decode(one[:, 0]), rtol=0, atol=1e-10)


def test_tiles_are_near_the_whole_and_are_cached_apart(tmp_path: Path) -> None:
    path = video.tiny_wan(tmp_path / "model")
    whole, tiled = Model(path=path), Model(path=path, vae={"tiling": True})
    assert base.fingerprint(whole)["vae"] != base.fingerprint(tiled)["vae"]
    assert base.fingerprint(whole)["transformer"] == base.fingerprint(tiled)["transformer"]
    adapter: Any = base.load(tiled)
    adapter.vae.enable_tiling(32, 32, 16, 16)
    coarse = torch.rand(1, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = torch.nn.functional.interpolate(coarse, (9, 64, 64), mode="trilinear")
    found, expected = adapter.encode_media(pixels)[:, 0], base.load(whole).encode_media(pixels)[:, 0]
    assert found.shape == expected.shape and not torch.equal(found, expected)
    assert (found - expected).norm() < 0.3 * (expected - expected.mean()).norm()


# ------------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize(
    "maker",
    [video.tiny_wan, video.tiny_cogvideox, video.tiny_hunyuan_video, video.tiny_ltx, video.tiny_animatediff],
)
def test_gradient_checkpointing_gives_the_same_gradients(maker: Callable[[Path], Path], tmp_path: Path) -> None:
    adapter: Any = base.load(Model(path=maker(tmp_path / "model")))
    adapter.denoiser.requires_grad_(True).train()
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *adapter.latent_shape(32, 32, 9), generator=generator)
    t = torch.tensor([0.3, 0.8]) if adapter.process.kind == "flow" else torch.tensor([300, 800])
    condition = adapter.encode_prompt(["a red circle", "a blue square moves left"])
    found = []
    for way in ("disable", "enable"):
        getattr(adapter.denoiser, f"{way}_gradient_checkpointing")()
        adapter.denoiser.zero_grad()
        adapter.predict(noisy, t, condition).square().mean().backward()
        found.append({n: p.grad.clone() for n, p in adapter.denoiser.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-6, msg=name)
