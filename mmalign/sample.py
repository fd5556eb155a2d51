"""Batch generation: prompts in, pictures or clips and a media table out. Each has its own seed, whatever its batch."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmalign import provenance, report_sheet
from mmalign.guidance import sampling as guided
from mmalign.guidance.summary import lines, summarise
from mmalign.jobs import SampleConfig
from mmalign.locks import alone_in, refuse_if_busy
from mmalign.media import clip_facts, read_image
from mmalign.media_table import MediaRow, write_media_table
from mmalign.models import base
from mmalign.models.adapter import Adapter
from mmalign.models.negative import guide_away
from mmalign.models.video import VideoAdapter
from mmalign.paths import find
from mmalign.progress import Progress
from mmalign.records import Record, missing_columns, read_records
from mmalign.runs import begin_folder, pick_device, refuse_other
from mmalign.tasks.inputs import View, cut
from mmalign.weights import files_hash

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Request:
    """One picture or clip to make."""

    prompt: str
    seed: int
    group: str
    image: Path | None = None  # that a clip goes on from

    @property
    def sample(self) -> str:
        return f"{self.group}-{self.seed}"


def requests(config: SampleConfig) -> list[Request]:
    """What to make: `per_prompt` consecutive seeds for each prompt; a table's own `seed` column is the first of them.

    Raises:
        ValueError: the prompts file is missing, empty, or has no `prompt` column.
    """
    rows = read_prompts(find(config.prompts))[: config.limit]
    return [
        Request(prompt, (config.seed if seed is None else seed) + k, f"{number:06d}")
        for number, (prompt, seed) in enumerate(rows)
        for k in range(config.per_prompt)
    ]


def read_prompts(path: Path) -> list[tuple[str, int | None]]:
    """Prompts and their own seeds, of a text file or a table. ValueError where it is none, or empty."""
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


def _with_images(config: SampleConfig, wanted: list[Request]) -> list[Request]:
    """The requests with the picture that each goes on from: the column `image` of the prompts' table.

    Raises:
        ValueError: there is no such column, or a picture is missing.
    """
    path = find(config.prompts)
    records = [] if path.suffix == ".txt" else list(read_records(path))[: config.limit]
    found: dict[str, Path] = {}
    for number, record in enumerate(records):
        image = record.values.get("image")
        if isinstance(image, str):
            found[f"{number:06d}"] = path.parent / image  # an absolute path stays itself
    for request in wanted:
        if not (request.group in found and found[request.group].is_file()):
            raise ValueError(
                f"{config.model.path} draws clips that go on from a picture, and {path} has none for the prompt "
                f"{request.prompt!r}: give a table (JSONL, CSV) with a column `image`, a path from the table's folder"
            )
    return [replace(request, image=found[request.group]) for request in wanted]


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
    """Generates what is missing and returns the media table `output/table.jsonl`; `index.html` beside it shows them.

    Pictures that a killed run left behind are kept: they appear whole or not at all, and the config is checked.

    Raises:
        ValueError: bad prompts or model folder, or `output` was made with another config, or another run works there.
    """
    wanted = requests(config)
    folder = config.output
    refuse_if_busy(folder)
    device = pick_device(config.device, config.dtype)
    clips = check(config)  # before anything is written: a mistyped path leaves no folder behind
    if base.goes_on_from_image(config.model):
        if config.guidance:
            raise ValueError("guidance steers what is drawn from text alone; drop it, or use a text-to-video model")
        wanted = _with_images(config, wanted)
    same = _check_same(config, [request.image for request in wanted if request.image])
    missing = lacking(folder, wanted, clips, config.batch_size)
    missing = guided.with_sets(wanted, missing, config.guidance)
    adapter = load(config, device) if missing else None
    with alone_in(folder, "mmalign sample"):
        begin_folder(folder, config, same, "videos" if clips else "images")
        if adapter is not None:
            told = teller(config, same, adapter)
            with Progress("sampling", len(wanted), len(wanted) - len(missing)) as bar:
                done = len(wanted) - len(missing)
                for part, images in _drawn(adapter, missing, config, bar, done):
                    for request, image in zip(part, images, strict=True):
                        write(config, place(folder, request, clips), image, adapter, told(request))
                    done += len(part)
                    bar.update(done)
        name = str(config.model.lora or config.model.path)
        rows = [
            MediaRow(
                r.sample, r.prompt, str(place(folder, r, clips).absolute()), group=r.group, seed=r.seed, model=name,
                aux=guided.columns(guided.read_record(folder, r.sample)) if config.guidance else {},
                **(_clip_facts(place(folder, r, clips)) if clips else {}),
            )
            for r in wanted
        ]  # fmt: skip
        write_media_table(folder / "table.jsonl", rows)
        if config.guidance:
            records = [guided.read_record(folder, request.sample) for request in wanted]
            found = summarise(config.guidance, records, [request.group for request in wanted], folder)
            print(lines(found), file=sys.stderr)
        report_sheet.build([folder / "table.jsonl"], folder / "index.html")
    return folder / "table.jsonl"


def check(config: SampleConfig) -> bool:
    """Looks at settings and the model's folder before any weights are loaded; whether what is drawn are clips.

    Raises:
        ValueError: a side, a LoRA, a reward or a folder that cannot be used, or settings of clips for a model of
            images.
    """
    _check_sides(config, 8)
    if config.negative_lora:
        base.lora_file(config.negative_lora, "negative_lora")
    if config.guidance:
        guided.check(config.guidance)
    base.check(config.model)
    clips = base.modality_of(config.model) == "video"
    for name in ("frames", "fps", "lossless"):
        if getattr(config, name) and not clips:
            raise ValueError(f"{name}: the model of {config.model.path} draws pictures, and this is for clips; drop it")
    return clips


def _drawn(
    adapter: Adapter, missing: list[Request], config: SampleConfig, bar: Progress, done: int
) -> Iterator[tuple[list[Request], list[np.ndarray]]]:
    """Batches with their pictures, plain or guided."""
    if config.guidance is None:
        return generate(adapter, missing, config)

    def tell(drawn: float, reward: float | None) -> None:
        bar.update(done + drawn, {} if reward is None else {"reward": reward})

    return guided.run(adapter, missing, config, tell)


_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),  # its default clips to [-1, 1], where pixels are, not latents
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
}


def load(config: SampleConfig, device: torch.device) -> Adapter:
    """The model that a config asks for, with its LoRA, its pipeline under the config's scheduler.

    Raises:
        ValueError: a side that the model cannot draw, or a scheduler that it cannot be sampled with.
    """
    adapter = base.load(config.model, device=device, dtype=_DTYPES[config.dtype])
    _check_sides(config, adapter.multiple)
    if isinstance(adapter, VideoAdapter) and config.frames:
        adapter.check_frames(config.frames, "frames")
    if isinstance(adapter, VideoAdapter) and config.fps:
        adapter.fps = config.fps
    if config.negative_lora:
        guide_away(adapter, config.negative_lora, config.negative_weight)
    if config.scheduler != "own":
        import diffusers

        own = adapter.pipe.scheduler.config
        flow = adapter.process.kind == "flow"
        name, settings = _flow_scheduler(adapter, config.scheduler) if flow else _scheduler(adapter, config.scheduler)
        adapter.pipe.scheduler = getattr(diffusers, name).from_config(own, **settings)
    return adapter


def _scheduler(adapter: Adapter, wanted: str) -> tuple[str, dict[str, Any]]:
    """Class and settings of the scheduler of an eps or v model."""
    if adapter.schedulers is None:
        return _SCHEDULERS[wanted]
    if wanted not in adapter.schedulers:
        raise ValueError(
            f"scheduler: {wanted}: it does not have the noise levels that {adapter.family} was trained with; use "
            f"{' or '.join(('own', *adapter.schedulers))}"
        )
    return adapter.schedulers[wanted]


def _flow_scheduler(adapter: Adapter, wanted: str) -> tuple[str, dict[str, Any]]:
    """Class and settings of a flow's scheduler, with the shift of the checkpoint's own."""
    if wanted not in adapter.flow_schedulers:
        why = {
            "ddim": "a flow has no DDIM: euler is its deterministic step",
            "dpm++sde": "the pipelines of flows do not seed the noise that it adds at each step",
        }.get(wanted, f"{adapter.pipeline_class.__name__} hands its scheduler times that {wanted} does not take")
        raise ValueError(f"scheduler: {wanted}: {why}; use {' or '.join(('own', *adapter.flow_schedulers))}")
    own = adapter.pipe.scheduler.config
    shift = own.get("flow_shift") or own.get("shift") or 1.0
    if wanted == "euler":
        return "FlowMatchEulerDiscreteScheduler", {"shift": shift}
    settings = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    return "DPMSolverMultistepScheduler", {**settings, "algorithm_type": "dpmsolver++"}


def generate(
    adapter: Adapter, wanted: list[Request], config: SampleConfig
) -> Iterator[tuple[list[Request], list[np.ndarray]]]:
    """Batches of requests with their pictures, uint8 [H, W, 3], or clips [F, H, W, 3]; one CPU generator for each."""
    length = {"num_frames": config.frames} if config.frames else {}
    for start in range(0, len(wanted), config.batch_size):
        part = wanted[start : start + config.batch_size]
        negative = [config.negative_prompt] * len(part) if config.negative_prompt else None
        images = adapter.draw(
            [request.prompt for request in part],
            [torch.Generator().manual_seed(request.seed) for request in part],
            guidance_scale=config.guidance_scale, negative_prompts=negative, num_inference_steps=config.steps,
            **{name: side for name in ("height", "width") if (side := getattr(config, name))}, **length,
            **({"images": _first_frames(adapter, part, config)} if adapter.of_image else {}),
        )  # fmt: skip
        if not np.isfinite(images).all():
            raise ValueError(
                f"the model drew values that are not finite with dtype {config.dtype}, in a batch that begins with "
                f"{part[0].prompt!r}; use dtype: float32 or bfloat16, or check the weights"
            )
        yield part, list((images * 255).round().astype(np.uint8))


def _first_frames(adapter: Adapter, part: list[Request], config: SampleConfig) -> list[Image.Image]:
    """The pictures that clips go on from, cut to their size as first frames are in training."""
    own = adapter.default_size()
    size, found = (config.height or own[0], config.width or own[1]), []
    for request in part:
        assert request.image is not None
        pixels, _ = cut(read_image(request.image), size, View())
        found.append(Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()))
    return found


def teller(
    config: SampleConfig, known: dict[str, Any], adapter: Adapter
) -> Callable[[Request], provenance.Record | None]:
    """What gives a request the record of how it was drawn, or none where the config wants none.

    Args:
        known: what `identity` says of the config.
    """
    if not config.provenance:
        return lambda request: None
    weights = {name: digest for name, digest in known["model"].items() if isinstance(digest, str)}
    told = {name: known[name] for name in ("negative_lora", "guidance")}
    scheduler = type(adapter.pipe.scheduler).__name__
    if config.guidance:  # it takes these steps itself
        scheduler = "Euler" if adapter.process.kind == "flow" else "DDIM"

    def tell(request: Request) -> provenance.Record:
        image = files_hash([request.image]) if request.image else None
        return provenance.record(
            config, weights, request.prompt, request.seed, scheduler=scheduler, image=image, **told
        )  # fmt: skip

    return tell


def place(folder: Path, request: Request, clips: bool) -> Path:
    """Where a request's picture or clip lies in the folder of a run."""
    return folder / ("videos" if clips else "images") / f"{request.sample}{'.mp4' if clips else '.png'}"


def lacking(folder: Path, wanted: Sequence[Request], clips: bool, batch_size: int) -> list[Request]:
    """The requests of every batch that lacks a file: with other neighbours a last bit of what is drawn could turn."""
    batches = [wanted[start : start + batch_size] for start in range(0, len(wanted), batch_size)]
    return [each for batch in batches if not all(place(folder, r, clips).is_file() for r in batch) for each in batch]


def write(
    config: SampleConfig, path: Path, picture: np.ndarray, adapter: Adapter, told: provenance.Record | None
) -> None:
    """Writes a picture uint8 [H, W, 3] as PNG, or a clip [F, H, W, 3] as MP4 at the model's rate, with its record."""
    if isinstance(adapter, VideoAdapter):
        frames = torch.from_numpy(picture).permute(0, 3, 1, 2)
        provenance.write_clip(path, frames, adapter.fps, told, lossless=config.lossless)
    else:
        provenance.write_picture(path, picture, told)


def _clip_facts(path: Path) -> dict[str, Any]:
    facts = clip_facts(path)
    return {"modality": "video", "fps": facts.fps, "num_frames": facts.num_frames}


def _check_sides(config: SampleConfig, multiple: int) -> None:
    for name, side in (("height", config.height), ("width", config.width)):
        if side is not None and side % multiple:
            near = max(1, round(side / multiple)) * multiple
            raise ValueError(f"{name}: {side} is not a multiple of {multiple}; use {near}")


def _check_same(config: SampleConfig, images: list[Path]) -> dict[str, Any]:
    """What decides the pictures, for `begin_folder`. ValueError for a folder that another config filled.

    Files count by content, not by path.
    """
    ignored = {"batch_size", "device", "output", "limit", "provenance"}
    now = {key: value for key, value in json.loads(config.model_dump_json()).items() if key not in ignored}
    now["prompts"] = hashlib.sha256(json.dumps(read_prompts(find(config.prompts))).encode()).hexdigest()
    if images:
        now["images"] = [files_hash([image]) for image in dict.fromkeys(images)]
    now |= identity(config)
    refuse_other(config.output, now, "pictures")
    return now


def identity(config: SampleConfig) -> dict[str, Any]:
    """What draws, by content: the parts of the model, a LoRA to lead away from, guidance."""
    told = config.model.model_dump(include={"max_sequence_length", "guidance", "expert"}, exclude_none=True)
    return {
        "negative_lora": files_hash([base.lora_file(config.negative_lora)]) if config.negative_lora else None,
        "guidance": guided.identity(config.guidance) if config.guidance else None,
        "model": {**base.fingerprint(config.model), "from_scratch": list(config.model.from_scratch), **told},
    }
