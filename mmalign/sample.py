"""Batch generation: prompts in, pictures and a media table out. Each picture has its own seed, whatever its batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmalign.config import dump
from mmalign.jobs import SampleConfig
from mmalign.media import write_image
from mmalign.media_table import MediaRow, write_media_table
from mmalign.models import base
from mmalign.paths import find
from mmalign.progress import Progress
from mmalign.records import Record, missing_columns, read_records
from mmalign.runs import pick_device, versions

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """One picture to make."""

    prompt: str
    seed: int
    group: str

    @property
    def sample(self) -> str:
        return f"{self.group}-{self.seed}"


def requests(config: SampleConfig) -> list[Request]:
    """What to make: `per_prompt` consecutive seeds for each prompt; a table's own `seed` column is the first of them.

    Raises:
        ValueError: the prompts file is missing, empty, or has no `prompt` column.
    """
    rows = _prompts(find(config.prompts))[: config.limit]
    return [
        Request(prompt, (config.seed if seed is None else seed) + k, f"{number:06d}")
        for number, (prompt, seed) in enumerate(rows)
        for k in range(config.per_prompt)
    ]


def _prompts(path: Path) -> list[tuple[str, int | None]]:
    if path.suffix == ".txt":
        if not path.is_file():
            raise ValueError(f"{path} does not exist; check the path of `prompts`")
        rows: list[tuple[str, int | None]] = [
            (line.strip(), None) for line in path.read_text().splitlines() if line.strip()
        ]
    else:
        records = read_records(path)
        if "prompt" not in records.columns:
            raise ValueError(missing_columns(path, ["prompt"], records.columns, "a table of prompts"))
        rows = [(_prompt(record), _seed(record)) for record in records]
    if not rows:
        raise ValueError(f"{path} holds no prompts; write one per line")
    return rows


def _prompt(record: Record) -> str:
    prompt = record.values["prompt"]
    if not isinstance(prompt, str):
        raise ValueError(f"{record.origin}: the prompt is {prompt!r}; give text, or remove the row")
    return prompt


def _seed(record: Record) -> int | None:
    seed = record.values.get("seed")
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, int | float) or seed != int(seed):
        raise ValueError(f"{record.origin}: the seed is {seed!r}; give a whole number, or none")
    return int(seed)


def run(config: SampleConfig) -> Path:
    """Generates what is missing and returns the media table `output/table.jsonl`.

    Pictures that a killed run left behind are kept: they appear whole or not at all, and the config is checked.

    Raises:
        ValueError: bad prompts or model folder, or `output` was made with another config.
    """
    wanted = requests(config)
    folder = config.output
    device = pick_device(config.device, config.dtype)
    _check_sides(config)
    base.check(config.model)  # before anything is written: a mistyped path leaves no folder behind
    _check_same(config)
    missing = [request for request in wanted if not _place(folder, request).is_file()]
    if missing:
        pipe = pipeline(config, device)
        with Progress("sampling", len(wanted), len(wanted) - len(missing)) as bar:
            done = len(wanted) - len(missing)
            for part, images in generate(pipe, missing, config):
                for request, image in zip(part, images, strict=True):
                    write_image(_place(folder, request), image)
                done += len(part)
                bar.update(done)
    name = str(config.model.lora or config.model.path)
    rows = [
        MediaRow(r.sample, r.prompt, str(_place(folder, r).absolute()), group=r.group, seed=r.seed, model=name)
        for r in wanted
    ]
    write_media_table(folder / "table.jsonl", rows)
    return folder / "table.jsonl"


_SCHEDULERS: dict[str, tuple[str, dict[str, str]]] = {
    "ddim": ("DDIMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
}


def pipeline(config: SampleConfig, device: torch.device) -> Any:
    """The diffusers pipeline that a config asks for: its model, with its LoRA, under its scheduler."""
    pipe = base.load(config.model, device=device, dtype=_DTYPES[config.dtype]).pipeline()
    if config.scheduler != "own":
        import diffusers

        name, settings = _SCHEDULERS[config.scheduler]
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **settings)
    return pipe


def generate(
    pipe: Any, wanted: list[Request], config: SampleConfig
) -> Iterator[tuple[list[Request], list[np.ndarray]]]:
    """Batches of requests with their pictures, uint8 [H, W, 3]; one CPU generator per picture."""
    for start in range(0, len(wanted), config.batch_size):
        part = wanted[start : start + config.batch_size]
        with torch.no_grad():
            images = pipe(
                [request.prompt for request in part],
                negative_prompt=[config.negative_prompt] * len(part) if config.negative_prompt else None,
                num_inference_steps=config.steps, guidance_scale=config.guidance_scale,
                height=config.height, width=config.width, output_type="np",
                generator=[torch.Generator().manual_seed(request.seed) for request in part],
            ).images  # fmt: skip
        if not np.isfinite(images).all():
            raise ValueError(
                f"the model drew values that are not finite with dtype {config.dtype}, in a batch that begins with "
                f"{part[0].prompt!r}; use dtype: float32 or bfloat16, or check the weights"
            )
        yield part, list((images * 255).round().astype(np.uint8))


def _place(folder: Path, request: Request) -> Path:
    return folder / "images" / f"{request.sample}.png"


def _check_sides(config: SampleConfig) -> None:
    for name, side in (("height", config.height), ("width", config.width)):
        if side is not None and side % 8:
            raise ValueError(f"{name}: {side} is not a multiple of 8; use {max(8, round(side / 8) * 8)}")


def _check_same(config: SampleConfig) -> None:
    """Writes config.yaml, or refuses a folder that another config filled. Files count by content, not by path."""
    folder, ignored = config.output, {"batch_size", "device", "output", "limit"}
    path = folder / "run.json"
    now = {key: value for key, value in json.loads(config.model_dump_json()).items() if key not in ignored}
    now["prompts"] = hashlib.sha256(json.dumps(_prompts(find(config.prompts))).encode()).hexdigest()
    now["model"] = {**base.fingerprint(config.model), "from_scratch": list(config.model.from_scratch)}
    if path.is_file():
        before = json.loads(path.read_text())["config"]
        changed = sorted(key for key in now if now[key] != before.get(key))
        if changed:
            raise ValueError(
                f"{folder} holds pictures made with other values of: {', '.join(changed)}. "
                "Choose another folder with --set output=..., or remove this one."
            )
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    path.write_text(json.dumps({"config": now, "versions": versions()}, indent=2))
