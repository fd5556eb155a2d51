"""Pairs per second and peak memory of Flow-DPO on clips: encoding in every step against what is cached.

    python bench/video.py                                  # shapes (2.8 M) and a Wan of 30 M parameters, on the CPU
    python bench/video.py --model small --rounds 6 --steps 4 --json figures.json
    python bench/video.py --model wan-1.3b --precision bf16 --steps 6       # a GPU: published sizes, random weights
    python bench/video.py --model cogvideox-2b --precision bf16 --steps 6   # v prediction: Diffusion-DPO
    python bench/video.py --computed                       # no weights, no GPU: FLOPs and memory at published sizes

Every case is `mmalign.train`'s loop with its preference task and a LoRA, on MP4 files that this script writes:

    encode    nothing is kept: clips are decoded, the autoencoder and the text encoder run in every step
    latents   latents and prompt embeddings are there, the reference (the LoRA switched off) runs in every step
    errors    the reference's errors are there too

each without and with gradient checkpointing, on one set of weights and one batch size. Blocks alternate, and a block is
one pass over the pairs. A ratio is the median over rounds of encode's seconds / the case's seconds in the same round;
the range of n rounds holds the true median with confidence 1 - 2^(1-n). Peak memory is of a block: CUDA's allocator, or
the resident peak of the process. FLOPs are counted on tensors without values (`mmalign/memory.py`); the share of the
roofline is theirs over time and --peak-tflops (989: an H100's dense bf16).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from machine import clock, free_memory, machine, peak_of
from train_dpo import fill
from video_models import SIZES, TEXT_TOKENS, write

from mmalign import memory, tasks
from mmalign.config import build
from mmalign.jobs import TrainConfig
from mmalign.media import write_video
from mmalign.memory_show import size
from mmalign.tasks.buckets import Targets
from mmalign.train import Loop

STATES = ("encode", "latents", "errors")
GOALS = {"latents": 1.3, "errors": 1.7}
FPS = 8.0


def write_clips(folder: Path, count: int, shape: tuple[int, int, int]) -> Path:
    """Pairs of MP4s in which something coarse moves, as a preference table; sizes are those of training."""
    height, width, frames = shape
    generator, rows = torch.Generator().manual_seed(0), []
    folder.mkdir(parents=True)
    for i in range(count):
        names = [str(folder / f"{i}-{side}.mp4") for side in "wl"]
        for name in names:
            coarse = torch.rand(1, 3, 8, 8, generator=generator) * 255
            still = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255)[0].byte()
            clip = torch.stack([still.roll(frame * max(1, width // 32), dims=-1) for frame in range(frames)])
            write_video(name, clip, FPS)
        prompt = f"a {('large', 'small')[i % 2]} red circle moves left on a blue background, clip {i}"
        rows.append(json.dumps({"prompt": prompt, "media": names, "label": "A"}))
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "pairs.jsonl"


def settings(name: str, model: Path, table: Path, options: argparse.Namespace, scratch: Path) -> TrainConfig:
    """A run of Flow-DPO (Diffusion-DPO for a model that predicts v) with a LoRA."""
    height, width, frames = options.shape or SIZES[name]
    side = 16 * round((height * width) ** 0.5 / 16)
    wide = {"buckets": "aspect", "bucket_step": 16, "resolution": side} if height != width else {"resolution": side}
    kind = "diffusion_dpo" if name == "cogvideox-2b" else "flow_dpo"
    found: TrainConfig = build(TrainConfig, {
        "task": "preference", "output": str(scratch / "run"),
        "model": {"path": str(model), "max_sequence_length": TEXT_TOKENS[name]},
        "data": {"table": str(table), "frames": frames, "cache_dir": str(scratch / "cache"), **wide},
        "loss": {"kind": kind, "beta": 500.0}, "reference": {"kind": "cached", "draws": 1}, "lora": {"rank": 32},
        "optim": {"steps": options.steps, "batch_size": options.batch_size, "lr": 1e-5, "schedule": "constant"},
        "precision": options.precision, "device": options.device, "log": {"trackers": [], "memory": False},
    }, "video", [])  # fmt: skip
    return found


class Case:
    """One model in `mmalign.train`'s loop; what is cached, and checkpointing, are chosen for each block."""

    def __init__(self, config: TrainConfig):
        device = torch.device(config.device)
        config.output.mkdir(parents=True)
        self.task = tasks.make(config, device)
        low = {"fp32": "no"}.get(config.precision, config.precision)
        self.loop = Loop(config, self.task, Accelerator(mixed_precision=low, cpu=device.type == "cpu"))
        self.loop._housekeeping = lambda interrupted: None  # type: ignore[method-assign]  # no checkpoint per block
        self.data = self.task.inputs.data

    def block(self, state: str, checkpointed: bool) -> None:
        """One pass over the pairs."""
        inputs, denoiser = self.task.inputs, self.task.adapter.denoiser
        kept = self.data.cache if state != "encode" else "off"
        inputs.data, inputs.keep_text = self.data.model_copy(update={"cache": kept}), state != "encode"
        self.task.reference = "cached" if state == "errors" else "adapter_off"
        denoiser.enable_gradient_checkpointing() if checkpointed else denoiser.disable_gradient_checkpointing()
        disk, put = inputs.disk, inputs._put
        inputs._put = put if state != "encode" else lambda *entry: None  # type: ignore[method-assign]
        self.loop.step = 0
        self.loop.fit()
        inputs._put, inputs.disk = put, disk  # type: ignore[method-assign]


def counted(config: TrainConfig, shape: tuple[int, int, int], *, hollow: bool = False) -> memory.Estimate:
    """The estimate of a run on clips of one shape; `hollow` for a folder without weights."""
    if hollow:
        bare = config.model.model_copy(update={"from_scratch": ("transformer", "vae", "text_encoder")})
        config = config.model_copy(update={"model": bare})
    return memory.estimate(config, memory.Work(Targets([shape]), 1, 2, ""))


def work(found: memory.Estimate) -> dict[str, dict[str, float]]:
    """FLOPs per pair of each case, and their shares, by plain and checkpointed."""
    pairs, result = found.rows / 2, {}
    for way, step in found.steps.items():
        policy = (step.forward_flops + step.backward_flops) / pairs
        reference = step.reference_flops / pairs
        encoding = 2 * found.latents.flops + 2 * found.text.flops  # each counted for one clip, for one prompt
        result[way] = {
            "encode": policy + reference + encoding, "latents": policy + reference, "errors": policy,
            "forward": step.forward_flops / pairs, "reference": reference, "encoding": encoding,
        }  # fmt: skip
    return result


def measure(name: str, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Everything about one model."""
    device, low = torch.device(options.device), {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
    shape = options.shape or SIZES[name]
    model = write(name, options.folder or scratch / "model", weights=True, device=device, dtype=low)
    table = write_clips(scratch / "clips", options.steps * options.batch_size, shape)
    config = settings(name, model, table, options, scratch)
    estimate = counted(config, shape)
    case = Case(config)
    filling = clock(lambda: fill(case.task, case.loop), device) / (options.steps * options.batch_size)
    ways = [(state, way == "checkpointed") for way in options.ways for state in STATES]
    for state, way in ways:  # once each before anything counts: kernels are chosen, memory is taken
        case.block(state, way)
    blocks: dict[str, list[tuple[float, int | None]]] = {}
    for _ in range(options.rounds):
        for state, way in ways:
            key = f"{state} {'checkpointed' if way else 'plain'}"
            blocks.setdefault(key, []).append(peak_of(lambda state=state, way=way: case.block(state, way), device))
    return {**summary(options, blocks, work(estimate)), "estimate": estimate.to_json(), "shape": list(shape),
            "seconds_per_pair_to_fill": filling, "machine": machine(device), "model": name}  # fmt: skip


def summary(
    options: argparse.Namespace, blocks: dict[str, list[tuple[float, int | None]]], flops: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Of each case: rate, ratio over encode with its range, peak bytes, FLOPs, share of the roofline."""
    found = {}
    for key, measured in blocks.items():
        state, way = key.split()
        seconds = [time for time, _ in measured]
        base = [time for time, _ in blocks[f"encode {way}"]]
        each = [whole / own for whole, own in zip(base, seconds, strict=True)]
        rate = options.steps * options.batch_size / statistics.median(seconds)
        found[key] = {
            "pairs_per_second": rate, "ratio": statistics.median(each), "low": min(each), "high": max(each),
            "expected": flops[way]["encode"] / flops[way][state], "tflop_per_pair": flops[way][state] / 1e12,
            "peak_bytes": max((peak for _, peak in measured if peak), default=None),
            "share_of_roofline": rate * flops[way][state] / 1e12 / options.peak_tflops,
        }  # fmt: skip
    return {"cases": found, "confidence": 1 - 2.0 ** (1 - options.rounds)}


def show(figures: dict[str, Any], gpu: bool) -> None:
    """The table that goes into the documents."""
    shape = "x".join(map(str, figures["shape"]))
    print(f"{figures['model']}, {shape}: {figures['machine']}")
    rows = [("", "ratio", "range", "by FLOPs", "pairs/s", "peak", "TFLOP/pair", "roofline")]
    for key, case in figures["cases"].items():
        peak = size(case["peak_bytes"]) if case["peak_bytes"] else "?"
        share = f"{case['share_of_roofline']:.1%}" if gpu else "-"
        rows.append((
            key, f"{case['ratio']:.2f}x", f"{case['low']:.2f}-{case['high']:.2f}", f"{case['expected']:.2f}x",
            f"{case['pairs_per_second']:.3g}", peak, f"{case['tflop_per_pair']:.3g}", share,
        ))  # fmt: skip
    table(rows)
    for state, goal in GOALS.items():
        for key, case in figures["cases"].items():
            if key.startswith(state):
                verdict = "reached" if case["ratio"] >= goal else "missed"
                print(f"goal of {key}: {goal}x; measured {case['ratio']:.2f}x, {verdict}")
    print(f"range: {figures['confidence']:.1%} confidence; filling every cache, once: "
          f"{figures['seconds_per_pair_to_fill']:.3g} s per pair")  # fmt: skip


def table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in
                        enumerate(zip(row, widths, strict=True))))  # fmt: skip


def computed(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """FLOPs and memory at the published sizes, without a weight: LoRA of rank 32, bf16, one pair."""
    found: dict[str, Any] = {}
    told = argparse.Namespace(**{**vars(options), "precision": "bf16", "device": "cpu", "batch_size": 1, "steps": 1})
    for name in ("wan-1.3b", "cogvideox-2b"):
        folder = write(name, scratch / name, weights=False, device=torch.device("cpu"), dtype=torch.bfloat16)
        config = settings(name, folder, scratch / "none.jsonl", told, scratch)
        estimate = counted(config, SIZES[name], hollow=True)
        found[name] = {"work": work(estimate), "estimate": estimate.to_json()}
        rows = [("", "forward", "reference", "encoding", "latents cached", "errors cached")]
        for way, flops in found[name]["work"].items():
            one = [f"{flops[key] / 1e12:.4g} TFLOP" for key in ("forward", "reference", "encoding")]
            gains = [f"{flops['encode'] / flops[key]:.2f}x" for key in ("latents", "errors")]
            rows.append((way, *one, *gains))
        print(f"{name}, {'x'.join(map(str, SIZES[name]))}, {estimate.buckets[0].tokens:,} tokens a clip; per pair:")
        table(rows)
        steady = sum(part.bytes for part in estimate.parts) + estimate.optimiser
        away = sum(part.bytes for part in estimate.parts if part.name in ("vae", "text_encoder"))
        for way, step in estimate.steps.items():
            total, without = steady + step.peak, steady - away + step.peak
            print(f"  {way}: activations {size(step.activations)}, step's peak {size(step.peak)}; with all weights "
                  f"{size(total)}, encoders offloaded {size(without)}")  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--model", nargs="+", choices=tuple(SIZES), help="default: shapes small; on a GPU wan-1.3b")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="bf16" if gpu else "fp32", choices=("fp32", "bf16"), help="VAE in fp32")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("HEIGHT", "WIDTH", "FRAMES"), help="of the clips")
    parser.add_argument("--batch-size", type=int, help="pairs per step; default 1, shapes: 2")
    parser.add_argument("--steps", type=int, default=3, help="steps of a block, which visits every pair once")
    parser.add_argument("--rounds", type=int, default=5, help="how often the blocks alternate")
    parser.add_argument("--ways", nargs="+", default=["plain", "checkpointed"], choices=("plain", "checkpointed"))
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device's tensor cores, dense bf16")
    parser.add_argument("--folder", type=Path, help="where the model lies, or is to be kept for the next call")
    parser.add_argument("--tmp", default=None, help="folder for what is thrown away (16 GB at published sizes)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here too")
    parser.add_argument("--computed", action="store_true", help="FLOPs and memory at published sizes, and no more")
    options = parser.parse_args()
    options.shape = tuple(options.shape) if options.shape else None
    started, figures = time.perf_counter(), []
    for name in ["computed"] if options.computed else options.model or (["wan-1.3b"] if gpu else ["shapes", "small"]):
        with tempfile.TemporaryDirectory(dir=options.tmp) as folder:
            if options.computed:
                figures.append(computed(options, Path(folder)))
                continue
            size_of_batch = options.batch_size or (2 if name == "shapes" else 1)
            told = argparse.Namespace(**{**vars(options), "batch_size": size_of_batch})
            figures.append(measure(name, told, Path(folder)))
        show(figures[-1], options.device == "cuda")
    free = free_memory(torch.device(options.device)) / 2**30
    print(f"{time.perf_counter() - started:.0f} s in all; {free:.0f} GiB free")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
