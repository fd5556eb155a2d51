"""Estimated memory against what real tensors take, byte by byte; and `mmalign train --dry-run`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fitting_kit
import pytest
import torch
from safetensors import torch as safetensors_torch
from torch import nn
from training_kit import captioned, config, preferences
from typer.testing import CliRunner
from wan_kit import clip_pairs

from mmalign import distributed, memory, train
from mmalign.cli import app
from mmalign.jobs_inputs import Model
from mmalign.memory import Work
from mmalign.memory_show import show
from mmalign.models import base
from mmalign.models.skeleton import fake_mode, skeleton
from mmalign.models.tracing import Traced, size_of, without_values
from mmalign.tasks.autoencoder import AutoencoderTask
from mmalign.tasks.buckets import Targets
from mmalign.tasks.inputs import Size
from mmalign.tasks.preference import PreferenceTask
from mmalign.testing import tiny
from mmalign.testing import tiny_transformers as still
from mmalign.testing import tiny_video as video

MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.tiny_sd, "sdxl": tiny.tiny_sdxl, "sd3": still.tiny_sd3, "flux": still.tiny_flux,
    "pixart": still.tiny_pixart, "sana": still.tiny_sana, "qwen_image": still.tiny_qwen_image,
    "wan": video.tiny_wan, "cogvideox": video.tiny_cogvideox, "hunyuan_video": video.tiny_hunyuan_video,
    "ltx": video.tiny_ltx, "animatediff": partial(video.tiny_animatediff),
}  # fmt: skip
FLOWS = {"sd3", "flux", "sana", "qwen_image", "wan", "hunyuan_video", "ltx"}
CLIPS = {"wan", "cogvideox", "hunyuan_video", "ltx", "animatediff"}


@pytest.fixture(scope="module", name="folders")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    home, made = tmp_path_factory.mktemp("models"), {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = MAKERS[name](home / name)
        return made[name]

    return folder


def settings(tmp_path: Path, model: Path, name: str, **changes: Any) -> Any:
    loss = {"kind": "flow_dpo" if name in FLOWS else "diffusion_dpo", "beta": 50.0}
    told = {"loss": loss, **({"data__frames": 9} if name in CLIPS else {}), **changes}
    return config(tmp_path / "run", model, tmp_path / "pairs.jsonl", **told)


def pairs(size: Size) -> Work:
    return Work(Targets([size]), 4, 2, "")


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skeleton_has_the_parameters_that_loading_gives(
    name: str, dtype: torch.dtype, folders: Callable[[str], Path]
) -> None:
    model = Model(path=folders(name))
    real, bare = (make(model, dtype=dtype, vae_dtype=torch.float32) for make in (base.load, skeleton))
    for part, loaded in real.pipe.components.items():
        if isinstance(loaded, nn.Module) and part != "motion_adapter":
            made = getattr(bare.pipe, part)
            listed = [{n: (p.shape, p.dtype) for n, p in each.named_parameters()} for each in (loaded, made)]
            assert listed[0] == listed[1], part
            assert all(p.is_meta for p in made.parameters()), part


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("wan", {}),
        ("wan", {"lora": None, "ema": {"decay": 0.9}}),
        ("wan", {"precision": "bf16"}),
        ("sd", {"ema": {"decay": 0.9}}),
        ("sd", {"lora": None}),
    ],
)
def test_what_stays_between_steps_is_what_a_run_allocates(
    name: str, changes: dict[str, Any], tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    (clip_pairs if name == "wan" else preferences)(tmp_path)
    wanted = settings(tmp_path, folders(name), name, **changes, data__cache="memory")
    found = memory.estimate(wanted)
    wanted.output.mkdir(parents=True)
    task = PreferenceTask(wanted, torch.device("cpu"))
    loop = train.Loop(wanted, task, distributed.accelerator(wanted, torch.device("cpu")))
    loop._micro_step(0, task.load(loop.positions(0, 0)))
    trained = list(loop.named.values())
    # A parameter without a part in the prediction has no gradient here, and would have one elsewhere.
    assert found.gradients == sum(4 * p.numel() for p in trained)
    assert sum(p.grad.nbytes for p in trained if p.grad is not None) <= found.gradients
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    loop._update({})
    state = [value for each in loop.optimizer.state_dict()["state"].values() for value in each.values()]
    assert found.optimiser == sum(value.nbytes for value in state)
    assert found.average == (sum(p.nbytes for p in loop.ema.shadow_params) if loop.ema else 0)
    assert found.reference == (size_of([*task.frozen.parameters(), *task.frozen.buffers()]) if task.frozen else 0)
    networks = {part.name: part for part in found.parts}
    for part in ("vae", "text_encoder", task.adapter.denoiser_name):
        real = getattr(task.adapter.pipe, part)
        assert networks[part].bytes == size_of([*real.parameters(), *real.buffers()]), part
        assert networks[part].trained == sum(p.numel() for p in real.parameters() if p.requires_grad), part


def test_eight_bit_moments_count_blocks_and_small_tensors_apart() -> None:
    sizes = (4096, 4097, 100)
    expected = (2 * 4096 + 8 * 16) + (2 * 4097 + 8 * 17) + 8 * 100
    assert memory.optimiser_bytes([torch.empty(n) for n in sizes], "adamw8bit") == expected


def saved_bytes(adapter: Any, rows: int, shape: tuple[int, ...], precision: str) -> int:
    """Of what autograd keeps for the backward pass of the prediction, weights left out."""
    kept: dict[int, tuple[Any, int]] = {}
    weights = {p.untyped_storage().data_ptr() for p in adapter.denoiser.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor, storage.nbytes()
        return tensor

    condition = adapter.add_size(adapter.encode_prompt(["a red circle"] * rows), torch.zeros(rows, 6))
    t = torch.full((rows,), 0.5) if adapter.process.kind == "flow" else torch.full((rows,), 500)
    told = {p.untyped_storage().data_ptr() for p in condition.values()}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        adapter.predict(torch.randn(rows, *shape), t, condition)
    return sum(size for place, (_, size) in kept.items() if place not in told)


@pytest.mark.parametrize(
    ("name", "size", "precision"),
    [
        ("sd", (32, 32), "fp32"), ("sd", (96, 32), "fp32"), ("sd", (64, 64), "bf16"),
        ("wan", (32, 32, 5), "fp32"), ("wan", (32, 32, 17), "fp32"), ("wan", (64, 48, 9), "bf16"),
    ],
)  # fmt: skip
def test_activations_are_what_torch_saves_for_backward(
    name: str, size: Size, precision: str, tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    """Within 5 %, with gradient checkpointing and without; and the prediction is alive, and what it is a view of."""
    wanted = settings(tmp_path, folders(name), name, precision=precision)
    steps = memory.estimate(wanted, pairs(size)).steps
    adapter: Any = base.load(wanted.model, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    memory.finish.make_trainable(adapter, wanted)
    spare = 2 * 4 * 4 * math.prod(adapter.latent_shape(*size))
    for way, found in steps.items():
        change = "enable" if way == "checkpointed" else "disable"
        getattr(adapter.denoiser, f"{change}_gradient_checkpointing")()
        saved = saved_bytes(adapter, 4, adapter.latent_shape(*size), precision)
        print(f"{name} {size} {precision} {way}: {found.activations:,} estimated, {saved:,} saved")
        assert saved * 0.95 <= found.activations <= saved * 1.05 + spare, way


@pytest.mark.parametrize("name", ["sd", "wan", "cogvideox", "flux"])
def test_tracing_without_values_is_tracing_with_them(name: str, folders: Callable[[str], Path]) -> None:
    """Peak, FLOPs and what is left, of encoding and of a training step; each against the same run on real tensors."""
    model = Model(path=folders(name))
    found = []
    for make in (base.load, skeleton):
        adapter: Any = make(model)
        mode = fake_mode()
        if make is skeleton:
            for part in adapter.pipe.components.values():
                if isinstance(part, nn.Module):
                    without_values(part, mode)
            mode.__enter__()
        pixels = torch.rand(2, 3, *((9,) if name in CLIPS else ()), 32, 32) * 2 - 1
        try:
            with Traced() as encoding:
                moments = adapter.encode_media(pixels)
            adapter.denoiser.requires_grad_(True)
            condition = adapter.encode_prompt(["a red circle " * 400] * 2)  # as long as text can be
            t = torch.full((2,), 0.5) if adapter.process.kind == "flow" else torch.full((2,), 500)
            with Traced() as step:
                adapter.predict(moments[:, 0], t, condition).square().mean().backward()
            found.append((encoding.peak, encoding.flops, step.peak, step.flops, step.live))
        finally:
            if make is skeleton:
                mode.__exit__(None, None, None)
    assert found[0] == found[1]


def test_traced_bytes_and_flops_of_a_known_computation() -> None:
    a, b = torch.randn(64, 32), torch.randn(32, 16)
    with Traced() as traced:
        product = a @ b  # 64 x 16
        view = product.T
        other = product + 1
        assert traced.live == 2 * 64 * 16 * 4
        del other
        assert traced.live == 64 * 16 * 4
        traced.mark()
        view.mul_(2)
    assert traced.flops == 2 * 64 * 32 * 16
    assert traced.peak == traced.live == 64 * 16 * 4


def test_gradient_checkpointing_keeps_less_and_computes_more(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    steps = memory.estimate(settings(tmp_path, folders("wan"), "wan"), pairs((32, 32, 17))).steps
    plain, saving = steps["plain"], steps["checkpointed"]
    assert saving.activations < plain.activations / 3 and saving.peak < plain.peak
    assert saving.forward_flops == plain.forward_flops > plain.reference_flops > 0  # that is without the LoRA
    extra = saving.backward_flops - plain.backward_flops
    assert 0.8 * plain.forward_flops < extra <= plain.forward_flops


def test_offloaded_parts_count_in_their_phase_alone(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    def phases(**changes: Any) -> memory.Estimate:
        return memory.estimate(settings(tmp_path, folders("wan"), "wan", **changes), pairs((32, 32, 9)))

    there, away = phases(), phases(optim__offload=["vae", "text_encoder"])
    sizes = {part.name: part.bytes for part in there.parts}
    assert there.phases["step"] - away.phases["step"] == sizes["vae"] + sizes["text_encoder"]
    assert there.phases["latents"] - away.phases["latents"] == sizes["text_encoder"]
    assert there.phases["text"] - away.phases["text"] == sizes["vae"]
    assert [part.waits for part in away.parts] == [False, True, True]


def test_a_dry_run_reads_headers_and_no_weights(
    tmp_path: Path, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("a dry run has loaded something")

    monkeypatch.setattr(safetensors_torch, "load_file", refuse)
    monkeypatch.setattr("diffusers.models.modeling_utils.load_state_dict", refuse)
    preferences(tmp_path)
    file = tmp_path / "job.yaml"
    wanted = settings(tmp_path, folders("sd"), "sd")
    file.write_text(json.dumps(json.loads(wanted.model_dump_json(exclude_unset=True))))
    done = CliRunner().invoke(app, ["train", str(file), "--dry-run", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["total"] == max(found["phases"].values()) > found["steps"]["plain"]["peak"]
    assert found["buckets"] == [{"name": "32x32", "items": 4, "latents": [4, 8, 8], "tokens": 64}]
    assert not wanted.output.exists()
    shown = CliRunner().invoke(app, ["train", str(file), "--dry-run"], catch_exceptions=False)
    assert "estimated peak on cpu" in shown.stdout and "4 pairs" in shown.stdout


def test_a_run_writes_estimated_beside_measured(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    preferences(tmp_path)
    wanted = settings(tmp_path, folders("sd"), "sd", log__memory=True, optim__steps=1)
    train.run(wanted)
    found = json.loads((wanted.output / "run.json").read_text())["memory"]
    assert found["estimated"]["total"] == memory.estimate(wanted).total
    assert found["measured"]["peak"] >= found["measured"]["before"] > 0 and found["measured"]["kind"] == "resident"


@pytest.mark.parametrize(
    ("maker", "name"),
    [(video.tiny_wan, "wan"), (partial(video.tiny_cogvideox, kind="5b"), "cogvideox"), (video.tiny_ltx, "ltx")],
)
def test_models_that_go_on_from_a_picture_are_told_it(maker: Callable[..., Path], name: str, tmp_path: Path) -> None:
    both = [maker(tmp_path / str(image), image=image) for image in (False, True)]
    plain, told = (memory.estimate(settings(tmp_path, path, name), pairs((32, 32, 9))) for path in both)
    assert told.step.peak > plain.step.peak and told.family.endswith("_i2v")
    assert ("image_encoder" in {part.name for part in told.parts}) == (name == "wan")


@pytest.mark.parametrize("name", ["sd", "wan"])
def test_an_autoencoder_takes_what_a_real_step_takes(name: str, tmp_path: Path, folders: Callable[[str], Path]) -> None:
    """Pictures, and clips of nine frames: gradients and optimiser to the byte, FLOPs, and the peak within 5 %."""
    table = captioned(tmp_path)
    if name == "wan":
        clip_pairs(tmp_path)
        rows = [{"prompt": "a", "media": str(path)} for path in sorted(tmp_path.glob("*.mp4"))]
        (table := tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = config(
        tmp_path / "run", folders(name), table, task="autoencoder", loss={"kind": "reconstruction"}, lora=None,
        data__cache="off", optim__batch_size=2, **({"data__frames": 9} if name == "wan" else {}),
    )  # fmt: skip
    found = memory.estimate(wanted)
    wanted.output.mkdir(parents=True)
    task = AutoencoderTask(wanted, torch.device("cpu"))
    loop = train.Loop(wanted, task, distributed.accelerator(wanted, torch.device("cpu")))
    batch = task.load(loop.positions(0, 0))
    with Traced() as traced:
        task.loss(batch)[0].backward()
    assert found.step.forward_flops + found.step.backward_flops == traced.flops > 0
    print(f"{name}: {found.step.peak:,} estimated, {traced.peak:,} measured")
    assert found.step.peak == pytest.approx(traced.peak, rel=0.05)
    trained = list(loop.named.values())
    assert found.gradients == sum(4 * p.numel() for p in trained) == sum(p.grad.nbytes for p in trained)
    loop._update(batch)
    state = [value for each in loop.optimizer.state_dict()["state"].values() for value in each.values()]
    assert found.optimiser == sum(value.nbytes for value in state)
    assert found.total == max(found.phases.values()) and set(found.phases) == {"step", "update"}
    show(found)


def test_rewards_are_refused_with_what_to_do(tmp_path: Path) -> None:
    wanted = fitting_kit.config(tmp_path / "run", {"table": str(tmp_path / "pairs.jsonl")})
    with pytest.raises(memory.NotEstimatedError, match=r"task: reward.*memory\.measured in run\.json"):
        memory.estimate(wanted)
