"""Pairs per second and peak memory of DPO on a vision-language model here, against TRL's DPOTrainer.

    python bench/mllm_dpo.py                                   # a small Qwen2.5-VL, minutes on a CPU
    python bench/mllm_dpo.py --full                            # all weights of the language model instead of a LoRA
    python bench/mllm_dpo.py --size 3b --dtype bfloat16 --side 896 --json figures.json          # on a GPU

One folder of random weights, one table of rows with a picture each, one batch size, the same LoRA (or the same trained
weights), the vision tower frozen in both. Ways:

    trl        DPOTrainer of the installed TRL: its collator, its loss, its fused head; the reference online
    online     `mmalign.train`'s task: images once per pair, one prompt for both answers, the reference online
    cached     the same with the reference's log-probabilities in the cache (TRL refuses that for images)
    rows       as online, with a row and a prompt for each answer

First all ways get the same batch, and have to agree in loss and gradient. Then blocks alternate (trl, online, cached,
rows, trl, ...); a block is a few optimiser steps with everything that makes a batch of rows, images and processor
included. A ratio is the median over rounds of TRL's seconds by ours; the range of n rounds holds the true median with
confidence 1 - 2^(1-n). Peak memory is of a process that does nothing but a few steps of one way: CUDA's allocator, or
the resident peak; "working" is without what the process held before its first step (weights, libraries).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import clock, machine, peak_of
from PIL import Image
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from mmalign import tasks
from mmalign.config import build
from mmalign.jobs import TrainConfig
from mmalign.mllm.loading import TARGETS
from mmalign.testing.tiny_vlm import SPECIAL, tiny_qwen2_vl_tokenizer

WAYS = ("trl", "online", "cached", "rows")
GOALS = {"online": 1.5, "cached": 2.0}
MEMORY_GOAL = 0.8
BETA, RANK, LR = 0.1, 16, 1e-5
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "text": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
                 "num_key_value_heads": 2, "vocab_size": 32000, "mrope": [8, 12, 12]},
        "vision": {"depth": 6, "hidden_size": 256, "intermediate_size": 768, "num_heads": 4,
                   "fullatt_block_indexes": [2, 5]},
    },
    # As published for Qwen2.5-VL-3B-Instruct.
    "3b": {
        "text": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
                 "num_key_value_heads": 2, "vocab_size": 151936, "mrope": [16, 24, 24]},
        "vision": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                   "fullatt_block_indexes": [7, 15, 23, 31]},
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ model and data
def model_folder(folder: Path, size: str, side: int) -> Path:
    """Saves a Qwen2.5-VL of these sizes with random weights and a byte tokenizer."""
    wanted = SIZES[size]
    tokenizer: Any = tiny_qwen2_vl_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.eos_token = "<|im_end|>"
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    text = dict(wanted["text"])
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": text.pop("mrope")}
    config = Qwen2_5_VLConfig(
        text_config={
            **text, "eos_token_id": ids["<|im_end|>"], "bos_token_id": None, "pad_token_id": ids["<|endoftext|>"]
        },
        vision_config={**wanted["vision"], "out_hidden_size": text["hidden_size"]},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        config, dtype=torch.float32 if size == "small" else torch.bfloat16
    )
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    pixels = {"shortest_edge": 28 * 28, "longest_edge": side * side}
    # Nothing behind the end of turn, which TRL would score and we would not.
    template = tokenizer.chat_template.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endfor %}")
    assert template != tokenizer.chat_template
    tokenizer.chat_template = None
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=pixels), tokenizer, Qwen2VLVideoProcessor(size=pixels), chat_template=template
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_rows(folder: Path, count: int, side: int, prompt: int, answer: int) -> tuple[Path, list[dict[str, Any]]]:
    """Rows with a picture, a prompt and two answers of about so many tokens (bytes), as a table and as TRL's rows."""
    rng, lines, rows = np.random.default_rng(0), [], []
    (folder / "images").mkdir(parents=True)
    letters = np.array(list("abcdefghij klmnop"))
    for i in range(count):
        file = folder / "images" / f"{i}.png"
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(file)
        said = ["".join(rng.choice(letters, n)) + "." for n in (prompt, answer, answer * 4 // 5)]
        turns = [
            [{"role": role, "content": text}]
            for role, text in zip(("user", "assistant", "assistant"), said, strict=True)
        ]
        row = dict(zip(("prompt", "chosen", "rejected"), turns, strict=True))
        lines.append(json.dumps({"images": [f"images/{i}.png"], **row}))
        rows.append({"images": [Image.open(file).convert("RGB")], **row})
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl", rows


# ------------------------------------------------------------------------------------------------------- the ways
class Ours:
    """The task of `mmalign train`, its module and an optimiser."""

    def __init__(
        self, way: str, model: Path, table: Path, options: argparse.Namespace, scratch: Path, device: torch.device
    ):
        config = build(TrainConfig, {
            "task": "mllm", "output": str(scratch / way), "model": {"path": str(model)},
            "data": {"table": str(table), "cache_dir": str(scratch / "cache")},
            "loss": {"kind": "mllm", "beta": BETA, "terms": [{"kind": "dpo"}]},
            "reference": {"kind": "cached" if way == "cached" else "auto"},
            "lora": None if options.full else {"rank": RANK, "targets": TARGETS},
            "mllm": {"shared_prompt": "off" if way == "rows" else "on"},
            "precision": "bf16" if options.dtype == "bfloat16" else "fp32", "device": device.type,
            "log": {"trackers": []},
            "optim": {"gradient_checkpointing": options.checkpointing},
        }, "mllm_dpo", [])  # fmt: skip
        self.task, self.size, self.device = tasks.make(config, device), options.batch_size, device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16")
        self.module = self.task.policy.module
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR)

    def loss(self, step: int) -> Tensor:
        batch = self.task.load([((step * self.size + i) % self.task.size, 0) for i in range(self.size)])
        with self.autocast:
            return self.task.loss(batch)[0]


class TRL:
    """DPOTrainer's collator, its loss and an optimiser on the same folder, with the same adapters or weights."""

    def __init__(
        self, model: Path, rows: list[dict[str, Any]], options: argparse.Namespace, scratch: Path, device: torch.device
    ):
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from trl import DPOConfig, DPOTrainer

        dtype = getattr(torch, options.dtype if not options.full else "float32")
        load: Callable[[], Any] = lambda: AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)  # noqa: E731
        module, processor = load(), AutoProcessor.from_pretrained(model)
        targets = r"model\.language_model\..*\.(" + "|".join(TARGETS) + ")"
        lora = (
            None if options.full else LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
        )
        settings = DPOConfig(
            output_dir=str(scratch / "trl"), per_device_train_batch_size=options.batch_size, max_length=None,
            report_to=[],
            use_cpu=device.type == "cpu", bf16=options.dtype == "bfloat16", beta=BETA, loss_type=["sigmoid"],
            gradient_checkpointing=options.checkpointing, remove_unused_columns=False, dataloader_num_workers=0,
        )  # fmt: skip
        self.trainer = DPOTrainer(
            model=module, ref_model=load() if options.full else None, args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=processor, peft_config=lora,
        )  # fmt: skip
        self.rows, self.size, self.device = rows, options.batch_size, device
        self.module = self.trainer.model.to(device)
        if options.full:
            for name, parameter in self.module.named_parameters():
                parameter.requires_grad_("visual" not in name)
        for name, parameter in self.module.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR)
        self.module.train()

    def loss(self, step: int) -> Tensor:
        chosen = [dict(self.rows[(step * self.size + i) % len(self.rows)]) for i in range(self.size)]
        batch = self.trainer._prepare_inputs(self.trainer.data_collator(chosen))
        with self.trainer.compute_loss_context_manager():
            loss = self.trainer.compute_loss(self.module, batch)
        return loss


def step(way: Any, number: int) -> float:
    loss = way.loss(number)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(way.parameters, 1.0)
    way.optimizer.step()
    way.optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


# ----------------------------------------------------------------------------------------------------- comparison
def agree(ways: dict[str, Any]) -> dict[str, float]:
    """Largest differences of loss and gradient from TRL's on the first batch, relative to TRL's own; adapters moved
    off zero alike in all of them first."""
    found: dict[str, tuple[float, Tensor]] = {}
    for name, way in ways.items():
        generator = torch.Generator().manual_seed(1)
        named = sorted(
            ((_plain(n), p) for n, p in way.module.named_parameters() if p.requires_grad), key=lambda each: each[0]
        )
        with torch.no_grad():
            for key, parameter in named:
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        way.module.eval() if name == "trl" else None
        loss = way.loss(0)
        loss.backward()
        gradient = torch.cat([p.grad.float().flatten().cpu() for _, p in named if p.grad is not None])
        found[name] = (float(loss.detach()), gradient)
        way.optimizer.zero_grad(set_to_none=True)
        way.module.train() if name == "trl" else None
    (loss, gradient), scale = found["trl"], float(found["trl"][1].abs().max())
    differences = {"loss_trl": loss}
    for name in ways:
        if name != "trl":
            differences[f"loss_{name}"] = abs(found[name][0] - loss) / abs(loss)
            differences[f"gradient_{name}"] = float((found[name][1] - gradient).abs().max()) / scale
    return differences


def _plain(name: str) -> str:
    return name.replace("base_model.model.", "").replace(".default", "")


def make(way: str, scratch: Path, options: argparse.Namespace) -> Any:
    """One way on the folder and the rows that lie in `scratch`, which are written if they are not there."""
    model, data = scratch / "model", scratch / "data"
    if not model.is_dir():
        model_folder(model, options.size, options.side)
        write_rows(data, options.rows, options.side, options.prompt, options.answer)
    if way != "trl":
        return Ours(way, model, data / "rows.jsonl", options, scratch, torch.device(options.device))
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    opened = [row | {"images": [Image.open(data / name).convert("RGB") for name in row["images"]]} for row in rows]
    return TRL(model, opened, options, scratch, torch.device(options.device))


def peak(way: str, scratch: Path, options: argparse.Namespace) -> dict[str, int]:
    """Bytes held before the first step, and the peak of a few steps, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", way, "--scratch", str(scratch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def only(options: argparse.Namespace) -> dict[str, int]:
    """What `peak` asks of its process."""
    device, way = torch.device(options.device), make(options.only, options.scratch, options)
    if options.only == "cached":  # measured by the way that has the timings; the cache is full by now
        way.loss(0)
        way.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cpu":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _held(device)
    _, found = peak_of(lambda: [step(way, n) for n in range(options.steps)], device)
    return {"before": before, "peak": found or 0}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        ways = {name: make(name, scratch, options) for name in WAYS if name in options.ways}
        encoded = ways["online"].task.load([(0, 0)])["encoded"][0]
        figures: dict[str, Any] = {
            "machine": machine(device), "options": vars(options) | {"json": None, "scratch": None},
            "tokens": {"prompt": len(encoded.prompt.ids), "answers": [len(a) for a in encoded.answers]},
            "parameters": sum(p.numel() for p in ways["online"].module.parameters()), "agree": agree(ways),
            "rounds": [],
        }  # fmt: skip
        for name, way in ways.items():  # kernels are chosen, the cache is filled
            for number in range(-(-options.rows // options.batch_size) if name == "cached" else 1):
                step(way, number)
        for _ in range(options.rounds):
            line: dict[str, Any] = {}
            for name, way in ways.items():
                line[name] = clock(lambda way=way: [step(way, n) for n in range(options.steps)], device)  # type: ignore[misc]
            figures["rounds"].append(line)
        names = list(ways)
        del ways
        figures["memory"] = {name: peak(name, scratch, options) for name in names}
    figures["summary"] = summary(figures, options)
    return figures


def _held(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def summary(figures: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    found = {}
    for name in options.ways:
        seconds = [line[name] for line in figures["rounds"]]
        ratios = [line["trl"] / line[name] for line in figures["rounds"]]
        own, theirs = figures["memory"][name], figures["memory"]["trl"]
        found[name] = {
            "pairs_per_second": options.steps * options.batch_size / statistics.median(seconds),
            "speed": statistics.median(ratios), "speed_range": [min(ratios), max(ratios)],
            "peak_mib": own["peak"] / 2**20, "peak": own["peak"] / theirs["peak"],
            "working_mib": (own["peak"] - own["before"]) / 2**20,
            "working": (own["peak"] - own["before"]) / (theirs["peak"] - theirs["before"]),
        }  # fmt: skip
    return found


def table(figures: dict[str, Any]) -> str:
    heads = ("way", "pairs/s", "speed by TRL's", "peak, MiB", "by TRL's", "working, MiB", "by TRL's")
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * 6}"]
    for name, each in figures["summary"].items():
        speed = f"{each['speed']:.2f} [{each['speed_range'][0]:.2f}, {each['speed_range'][1]:.2f}]"
        memory = f"{each['peak_mib']:.0f} | {each['peak']:.2f} | {each['working_mib']:.0f} | {each['working']:.2f}"
        lines.append(f"| {name} | {each['pairs_per_second']:.3g} | {speed} | {memory} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=list(SIZES), default="small")
    made.add_argument("--full", action="store_true", help="train all of the language model, not a LoRA")
    made.add_argument("--side", type=int, default=448, help="pixels of a picture's side; a token is 28 x 28")
    made.add_argument("--prompt", type=int, default=40, help="tokens of the question")
    made.add_argument("--answer", type=int, default=60, help="tokens of the chosen answer")
    made.add_argument("--rows", type=int, default=8)
    made.add_argument("--batch-size", type=int, default=2)
    made.add_argument("--steps", type=int, default=2, help="optimiser steps of a block")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    made.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in all ways")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    made.add_argument("--json", type=Path)
    made.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    made.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return made


def main() -> None:
    options = parser().parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.only:
        print(json.dumps(only(options)))
        return
    if not {"trl", "online"} <= set(options.ways):
        raise SystemExit("--ways needs trl and online, which the others are compared with")
    figures = measure(options)
    print(table(figures))
    print(
        json.dumps(
            {name: figures[name] for name in ("machine", "tokens", "parameters", "agree")}, indent=1, default=str
        )
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
