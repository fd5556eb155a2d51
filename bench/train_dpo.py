"""Pairs per second and peak memory of Diffusion-DPO here, against the recipe of the diffusers project's own script.

    python bench/train_dpo.py                              # a tiny model, seconds: shows that it works
    python bench/train_dpo.py --model shapes               # assets/shapes-sd at 64 px
    python bench/train_dpo.py --model sd15                 # SD 1.5's sizes, random weights; CPU 128 px, GPU 512 px
    python bench/train_dpo.py --model sd15 --precision bf16 --batch-size 8 --steps 12 --json figures.json

The recipe (`recipes/diffusers_dpo.py`) is that script as a computation: both encoders and the reference run in every
step. Against it runs `mmalign.train`'s loop with its preference task and its own log, in three states of the cache:

    cold      an empty cache: the first epoch, which encodes and also writes what it encoded
    latents   latents and prompt embeddings are there: every later epoch, with a reference pass
    errors    reference errors are there too: later visits of a draw, beta sweeps and other losses on the same draws

All four share one set of weights, one batch size and one machine. First both computations get the same draws, and have
to agree in loss and gradient (1e-4 on a tiny model, 1e-3 on the timed one).
Then blocks alternate (recipe, cold, latents, errors, recipe, ...); a block is
one pass over the pairs. A ratio is the median over rounds of recipe seconds / mmalign seconds of the same round; the
range of n rounds holds the true median with confidence 1 - 2^(1-n). Checkpoints and validation are left out on both
sides. Peak memory is of a block: CUDA's allocator, or the resident peak of the process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from machine import clock, machine, matmul_ceiling, peak_of
from PIL import Image
from recipes.diffusers_dpo import BETA, KAPPA, LR, RANK, TARGETS, Draws, Recipe, Row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from mmalign import noise, tasks
from mmalign.config import build
from mmalign.jobs import TrainConfig
from mmalign.paths import find
from mmalign.testing.tiny import tiny_sd, tiny_tokenizer
from mmalign.train import Loop

STATES = ("cold", "latents", "errors")
GOALS = {"latents": 1.3, "errors": 1.8}
WAYS = ("recipe", *STATES)


# ------------------------------------------------------------------------------------------------ model and data
def sd15(folder: Path) -> Path:
    """Saves a pipeline with the published sizes of SD 1.5 and random weights (4.3 GB), unless it is there."""
    if (folder / "model_index.json").is_file():
        return folder
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 77
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, projection_dim=768, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=77, hidden_act="quick_gelu", pad_token_id=1, **special,
    ))  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, attention_head_dim=8,
        cross_attention_dim=768,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, scaling_factor=0.18215,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(str(folder))  # fmt: skip
    return folder


def model_folder(name: str, scratch: Path, folder: Path | None) -> Path:
    """The checkpoint folder of a `--model`."""
    if name == "shapes":
        return find("assets/shapes-sd")
    make = {"tiny": tiny_sd, "sd15": sd15}[name]
    return make(folder or scratch / name)


def write_pairs(folder: Path, count: int, side: int) -> tuple[Path, list[Row]]:
    """JPEG pairs of the training resolution (so that neither way resizes), as a preference table and as rows."""
    rng, rows = np.random.default_rng(0), []
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        for name in "wl":
            coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
            image.save(folder / "images" / f"{i}-{name}.jpg", quality=90)
        prompt = f"a {('large', 'small')[i % 2]} red circle on a blue square, photo {i}"
        rows.append(Row(prompt, folder / "images" / f"{i}-w.jpg", folder / "images" / f"{i}-l.jpg"))
    lines = [
        json.dumps({"prompt": row.prompt, "media": [str(row.winner), str(row.loser)], "label": "A"}) for row in rows
    ]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl", rows


# ------------------------------------------------------------------------------------------------ this trainer
class Ours:
    """`mmalign.train`'s loop on a real config; the state of the cache is chosen per block."""

    def __init__(self, model: Path, table: Path, options: argparse.Namespace, scratch: Path, device: torch.device):
        steps, size = options.steps, options.batch_size
        config = build(TrainConfig, {
            "task": "preference", "output": str(scratch / "run"), "model": {"path": str(model)},
            "data": {"table": str(table), "resolution": options.resolution, "cache_dir": str(scratch / "cache")},
            "loss": {"kind": "diffusion_dpo", "beta": BETA, "kappa": KAPPA},
            "reference": {"kind": "cached", "draws": 1}, "lora": {"rank": RANK, "targets": TARGETS},
            "optim": {"steps": steps, "batch_size": size, "lr": LR, "schedule": "constant"},
            "precision": options.precision, "device": device.type, "log": {"trackers": []},
        }, "train_dpo", [])  # fmt: skip
        config.output.mkdir(parents=True)
        self.task = tasks.make(config, device)
        low = {"fp32": "no"}.get(options.precision, options.precision)
        self.loop = Loop(config, self.task, Accelerator(mixed_precision=low, cpu=device.type == "cpu"))
        self.loop._housekeeping = lambda interrupted: None  # type: ignore[method-assign]  # no checkpoint per block
        self.cache = self.task.inputs.disk
        self.pipe = self.task.adapter.pipeline()

    def block(self, state: str, steps: int) -> None:
        """The first `steps` steps of the run's order."""
        if state == "cold":
            self.cache.clear("latents")
            self.cache.clear("prompt_embeddings")
        self.task.reference = "cached" if state == "errors" else "adapter_off"
        self.loop.step = self.loop.config.optim.steps - steps
        self.loop.fit()


@torch.no_grad()
def fill(task: Any, loop: Any) -> None:
    """Everything that can be cached, for every pair of a loop's steps."""
    task.reference = "cached"
    for step in range(loop.config.optim.steps):
        batch = task.load(loop.positions(step, 0))
        with loop.accelerator.autocast():
            task._reference_errors(batch, *task._inputs(batch))


def verify(ours: Ours, recipe: Recipe, resolution: int, limit: float) -> dict[str, float]:
    """How far loss and gradient of both computations are apart on the same draws; RuntimeError if beyond `limit`.

    Under a beta of 20: at 2000 the rounding of an error of 1 in float32 (1e-7) alone moves the loss by 1e-4.
    """
    task, positions, wanted = ours.task, ours.loop.positions(0, 0), ours.task.objective
    task.objective, recipe.beta = wanted.model_copy(update={"beta": 20.0}), 20.0
    for parameter in recipe.trained:  # a LoRA that has not moved has no gradient in A: let it have moved
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=noise.generator("verify")).to(parameter)
    task.reference = "adapter_off"
    batch = task.load(positions)
    copies = [torch.Generator() for _ in positions]
    for copied, generator in zip(copies, batch["generators"], strict=True):
        copied.set_state(generator.get_state())
    mine = task.loss(batch)[0]
    found = _gradient(mine, recipe.trained)

    side = task.adapter.latent_shape(resolution, resolution)
    winners = torch.stack([torch.randn(side, generator=g) for g in copies])
    losers = torch.stack([torch.randn(side, generator=g) for g in copies])
    t = torch.cat([torch.randint(0, 1000, (1,), generator=g) for g in copies])
    draws = Draws(torch.cat([winners, losers]), t, torch.stack([torch.randn(side, generator=g) for g in copies]))
    theirs = recipe.loss(*recipe.load([index for index, _ in positions]), draws)
    expected = _gradient(theirs, recipe.trained)
    apart = {
        "loss": abs(mine.item() - theirs.item()),
        "gradient": ((found - expected).norm() / expected.norm()).item(),
        "gradient_norm": expected.norm().item(),
    }
    task.objective, recipe.beta = wanted, BETA
    if not (max(apart["loss"], apart["gradient"]) <= limit and apart["gradient_norm"] > 0):
        raise RuntimeError(f"the two computations differ, so their times would say nothing: {apart}")
    return apart


def _gradient(loss: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


# ------------------------------------------------------------------------------------------------ measuring
@contextmanager
def forwards(pipe: Any) -> Iterator[Counter[str]]:
    """Counts how many samples go through each network; the UNet's with a gradient apart from those without."""
    seen: Counter[str] = Counter()

    def hook(name: str) -> Callable[..., None]:
        def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            graded = name == "unet" and torch.is_grad_enabled()
            seen["policy" if graded else "reference" if name == "unet" else name] += first.shape[0]

        return count

    networks = {"unet": pipe.unet, "vae": pipe.vae.encoder, "text": pipe.text_encoder}
    handles = [net.register_forward_hook(hook(name), with_kwargs=True) for name, net in networks.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def work_per_pair(run: Callable[[int], None], pipe: Any, size: int) -> dict[str, float]:
    """Network samples and GFLOP (convolutions and matrix products) per pair, over one step."""
    with forwards(pipe) as seen, FlopCounterMode(display=False) as flops, sdpa_kernel(SDPBackend.MATH):
        run(1)
    counts = {name: seen[name] / size for name in ("policy", "reference", "vae", "text")}
    return {**counts, "gflop": flops.get_total_flops() / size / 1e9}


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything, as one dictionary."""
    device = torch.device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = model_folder(options.model, scratch, options.folder)
    table, rows = write_pairs(scratch / "pairs", options.pairs, options.resolution)
    ours = Ours(model, table, options, scratch, device)
    recipe = Recipe(ours.pipe, rows, options.batch_size, options.precision == "bf16", device)
    agreement = check(ours, recipe, options, scratch, device)
    ours.cache.clear()
    run: dict[str, Callable[[int], None]] = {"recipe": recipe.block}
    run |= {state: lambda steps, state=state: ours.block(state, steps) for state in STATES}
    work = {way: work_per_pair(run[way], ours.pipe, options.batch_size) for way in ("recipe", "cold")}
    filling = clock(lambda: fill(ours.task, ours.loop), device) / options.pairs
    work |= {way: work_per_pair(run[way], ours.pipe, options.batch_size) for way in ("latents", "errors")}
    blocks: dict[str, list[tuple[float, int | None]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            blocks[way].append(peak_of(lambda way=way: run[way](options.steps), device))
    return summary(options, blocks, work, filling, agreement, device)


def check(ours: Ours, recipe: Recipe, options: argparse.Namespace, scratch: Path, device: torch.device) -> Any:
    """`verify` to 1e-4 on a tiny model, and to 1e-3 on the timed one where that is in fp32.

    The gradients of winner and loser nearly cancel in a network with random weights, and what is left shows the
    rounding of every layer: 8e-5 at 860 M parameters. In bf16 no such comparison means anything.
    """
    small = argparse.Namespace(**{**vars(options), "precision": "fp32", "resolution": 64, "pairs": 2, "steps": 1})
    small.batch_size, folder = 2, scratch / "check"
    table, rows = write_pairs(folder / "pairs", 2, 64)
    tiny = Ours(tiny_sd(folder / "model"), table, small, folder, device)
    found = {"tiny": verify(tiny, Recipe(tiny.pipe, rows, 2, False, device), 64, 1e-4)}
    if options.precision == "fp32":
        found[options.model] = verify(ours, recipe, options.resolution, 1e-3)
    return found


def summary(
    options: argparse.Namespace, blocks: dict[str, list[tuple[float, int | None]]], work: dict[str, dict[str, float]],
    filling: float, agreement: dict[str, dict[str, float]], device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """Ratios first, then rates, memory and work, then where it was measured."""
    seconds = {way: [time for time, _ in found] for way, found in blocks.items()}
    ratios = {}
    for state in STATES:
        each = [theirs / ours for theirs, ours in zip(seconds["recipe"], seconds[state], strict=True)]
        ratios[state] = {"median": statistics.median(each), "low": min(each), "high": max(each), "rounds": each}
    rates = {way: options.pairs / statistics.median(times) for way, times in seconds.items()}
    found: dict[str, Any] = {
        "ratio_over_recipe": ratios,
        "confidence": 1 - 2.0 ** (1 - options.rounds),
        "pairs_per_second": rates,
        "peak_bytes": {way: max((peak for _, peak in found if peak), default=None) for way, found in blocks.items()},
        "per_pair": work,
        "seconds_per_pair_to_fill": filling,
        "agreement": agreement,
        "machine": machine(device),
        "settings": {key: str(value) for key, value in vars(options).items()},
    }
    if device.type == "cuda":
        ceiling = matmul_ceiling(device, torch.bfloat16)
        found["bf16_matmul_tflops"] = ceiling
        found["share_of_bf16_ceiling"] = {way: rates[way] * work[way]["gflop"] / 1000 / ceiling for way in WAYS}
    return found


def show(figures: dict[str, Any]) -> None:
    """The table that goes into the documents."""
    rows = [("", "ratio", "range", "pairs/s", "peak GiB", "policy", "reference", "VAE", "text", "GFLOP")]
    for way in WAYS:
        ratio = figures["ratio_over_recipe"].get(way)
        peak, work = figures["peak_bytes"][way], figures["per_pair"][way]
        rows.append((
            way,
            f"{ratio['median']:.2f}x" if ratio else "1",
            f"{ratio['low']:.2f}-{ratio['high']:.2f}" if ratio else "",
            f"{figures['pairs_per_second'][way]:.3g}", f"{peak / 2**30:.2f}" if peak else "?",
            *(f"{work[name]:g}" for name in ("policy", "reference", "vae", "text")), f"{work['gflop']:.4g}",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in
                        enumerate(zip(row, widths, strict=True))))  # fmt: skip
    for state, goal in GOALS.items():
        reached = figures["ratio_over_recipe"][state]["median"]
        print(f"goal with {state} cached: {goal}x; measured {reached:.2f}x")
    for model, apart in figures["agreement"].items():
        loss, gradient = apart["loss"], apart["gradient"]
        print(f"same draws, {model}: loss apart by {loss:.1e}, gradient by {gradient:.1e} of its norm")
    print(f"range: {figures['confidence']:.1%} confidence; policy to text: samples through each network per pair")
    print(f"filling every cache with one draw: {figures['seconds_per_pair_to_fill']:.3g} s per pair, once")
    if "share_of_bf16_ceiling" in figures:
        shares = ", ".join(f"{way} {share:.0%}" for way, share in figures["share_of_bf16_ceiling"].items())
        print(f"share of the measured bf16 matmul ceiling ({figures['bf16_matmul_tflops']:.0f} TFLOP/s): {shares}")
    print(figures["machine"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", default="tiny", choices=("tiny", "shapes", "sd15"))
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="the VAE stays in fp32")
    parser.add_argument("--resolution", type=int, help="pixels; default 64, sd15: 512 on a GPU, else 128")
    parser.add_argument("--batch-size", type=int, help="pairs per step; default 8, sd15 on a CPU: 2")
    parser.add_argument("--steps", type=int, help="steps of a block; default 8, sd15 on a CPU: 1")
    parser.add_argument("--pairs", type=int, help="pairs on disk; one block visits each, so it is steps x batch size")
    parser.add_argument("--rounds", type=int, default=6, help="how often the four blocks alternate")
    parser.add_argument("--folder", type=Path, help="where the model lies, or is to be kept for the next call")
    parser.add_argument("--tmp", default=None, help="folder for what is thrown away (4.3 GB with sd15)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    options = parser.parse_args()
    small = options.model == "sd15" and options.device == "cpu"
    options.batch_size = options.batch_size or (2 if small else 8)
    options.steps = options.steps or (options.pairs or 0) // options.batch_size or (1 if small else 8)
    options.pairs = options.pairs or options.steps * options.batch_size
    if options.pairs != options.steps * options.batch_size:
        parser.error(f"--pairs has to be --steps times --batch-size: {options.steps * options.batch_size}")
    options.resolution = options.resolution or (64 if options.model != "sd15" else 128 if small else 512)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.tmp) as folder:
        figures = measure(options, Path(folder))
    show(figures)
    size = f"{options.model}, {options.resolution} px, {options.batch_size} pairs per step, {options.precision}"
    print(f"{size}, {options.rounds} rounds of {options.pairs} pairs; {time.perf_counter() - started:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
