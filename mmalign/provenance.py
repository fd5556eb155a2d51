"""How a picture or clip was made, kept in the file itself: what `mmalign sample` writes and `mmalign info` reads back.

A PNG has it twice as text: one JSON object under `mmalign`, and under `parameters` the lines that common viewers and
web interfaces show. An MP4 has the JSON as its comment, the prompt as its title, and the same JSON beside it in
`<name>.json`, which outlives programs that drop tags. A record holds what decides the pixels and nothing that differs
from run to run: no time, folder, device or batch size. So the same request gives the same bytes, also in a run that was
killed and went on, and caches that go by bytes find it again.
"""

from __future__ import annotations

import hashlib
import json
import math
import ntpath
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmalign import __version__
from mmalign.media import image_text, is_video, write_image, write_video
from mmalign.paths import find
from mmalign.source import MediaError, well_formed, whole_file
from mmalign.video_container import clip_tags

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mmalign.jobs import Sampling

Record = dict[str, Any]
KEY = "mmalign"  # of the JSON among a PNG's texts; in the JSON itself, the version that wrote it
MAX_SIDECAR_BYTES = 1 << 20
# Keys of a sampling job that decide no pixel, or that `record` says in its own words.
_ELSEWHERE = frozenset({
    "model", "prompts", "output", "limit", "per_prompt", "seed", "batch_size", "device", "provenance", "height",
    "width", "frames", "fps", "lossless", "negative_lora", "guidance", "kind", "name",
})  # fmt: skip


def record(
    config: Sampling,
    weights: Mapping[str, str],
    prompt: str,
    seed: int,
    *,
    scheduler: str = "",
    negative_lora: str | None = None,
    guidance: Mapping[str, Any] | None = None,
    image: str | None = None,
) -> Record:
    """What made one picture or clip, as plain JSON values.

    Args:
        config: the sampling job; of paths the last name alone is kept.
        weights: sha256 of each part of the model, and of its LoRA under `lora`, as `models.base.fingerprint` gives.
        scheduler: name of the class that the steps were made with.
        negative_lora: sha256 of the LoRA that guidance led away from.
        guidance: strategy and settings of reward guidance, evaluators by their weights' sha256.
        image: sha256 of the picture that a clip goes on from.
    """
    parts = {name: digest for name, digest in sorted(weights.items()) if name != "lora"}
    model: Record = {"name": _called(config.model.path), "hash": _digest(parts), "parts": parts}
    if config.model.from_scratch:
        model["from_scratch"] = sorted(config.model.from_scratch)
    model |= config.model.model_dump(include={"max_sequence_length"}, exclude_none=True)
    found: Record = {KEY: __version__, "prompt": prompt, "seed": seed, "model": model}
    if image is not None:
        found["image"] = {"hash": image}
    if config.model.lora is not None:
        digest = weights["lora"].partition("-")[0]  # behind it stands the model's variant
        found["lora"] = {"name": _called(config.model.lora), "hash": digest}
    if config.negative_lora is not None:
        found["negative_lora"] = {"name": _called(config.negative_lora), "hash": negative_lora}
    settings = {name: value for name, value in config.model_dump().items() if name not in _ELSEWHERE}
    if config.negative_lora is None:
        settings.pop("negative_weight")
    found |= {name: _plain(value) for name, value in settings.items() if value is not None}
    if scheduler:
        found["scheduler_class"] = scheduler
    if guidance:
        found["guidance"] = _plain(guidance)
    return found


def _called(path: Path) -> str:
    """What people call a model: its folder's or file's name, and its run's name for `run/export/...`."""
    path = Path(os.path.abspath(find(path)))
    while path.name in ("export", "pytorch_lora_weights.safetensors") and path.parent.name:
        path = path.parent
    return path.name.removesuffix(".safetensors")


def _digest(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """JSON's own kinds; absolute paths by their last name, since the rest of one tells of the machine, not the model.

    A plain text is kept as it is, but for one inside a block such as `guidance`, whose settings may name files.
    """
    if isinstance(value, Path):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _named(_plain(each)) for name, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_named(_plain(each)) for each in (value if isinstance(value, list | tuple) else sorted(value))]
    return value


def _named(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("{"):  # parameters of an evaluator, as results keep them
        with suppress(json.JSONDecodeError):
            return _plain(json.loads(value))
    if isinstance(value, str) and (os.path.isabs(value) or ntpath.splitdrive(value)[0]) and " " not in value:
        return ntpath.basename(value)
    return value


# ------------------------------------------------------------------------------------------------ written


def write_picture(path: str | Path, image: np.ndarray, record: Record | None) -> None:
    """Write uint8 [H, W, 3] as PNG with its record (None: without); the pixels, and their encoding, are the same."""
    if record is None:
        write_image(path, image)
        return
    full = record | {"height": image.shape[0], "width": image.shape[1]}
    write_image(path, image, {KEY: _json(full), "parameters": parameters(full)})


def write_clip(
    path: str | Path, frames: torch.Tensor, fps: float, record: Record | None, lossless: bool = False
) -> None:
    """Write uint8 [T, 3, H, W] as H.264 with its record, in tags and beside it (None: without).

    The sidecar is first, so that a clip that is there is never without it. ValueError as in `write_video`.
    """
    path = Path(path)
    if record is None:
        write_video(path, frames, fps, lossless)
        return
    full = record | {"height": frames.shape[2], "width": frames.shape[3], "frames": len(frames), "fps": fps}
    with whole_file(sidecar(path)) as temporary:
        temporary.write_text(json.dumps(full, indent=2) + "\n", encoding="ascii")
    title = well_formed(record["prompt"]).replace("\0", "\ufffd")
    write_video(path, frames, fps, lossless, tags={"title": title, "comment": _json(full)})


def sidecar(path: str | Path) -> Path:
    """Where the record beside a clip is: `clip.json` for `clip.mp4`."""
    return Path(path).with_suffix(".json")


def _json(record: Record) -> str:
    """In ASCII, so that every reader of tags takes it alike."""
    return json.dumps(record, separators=(",", ":"), allow_nan=False)


def parameters(record: Record) -> str:
    """The record as the text that viewers of generated pictures know: prompt, negative prompt, a line of settings."""
    lora = record.get("lora")
    settings = {
        "Steps": record.get("steps"),
        "Sampler": record.get("scheduler_class") or record.get("scheduler"),
        "CFG scale": record.get("guidance_scale"),
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}" if "width" in record else None,
        "Model hash": record["model"]["hash"][:10],
        "Model": record["model"]["name"],
        "Lora": lora and lora["name"],
        "Lora hash": lora and lora["hash"][:10],
        "Guidance": (record.get("guidance") or {}).get("kind"),
        "Version": f"mmalign {record[KEY]}",
    }  # fmt: skip
    line = ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
    negative = record.get("negative_prompt")
    lines = [record["prompt"], *([f"Negative prompt: {negative}"] if negative else []), line]
    return well_formed("\n".join(lines)).replace("\0", "\ufffd")


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',:\n"') else text


# ------------------------------------------------------------------------------------------------ read


def read_provenance(path: str | Path) -> Record | None:
    """The record in a picture or clip, or beside a clip; None where there is none of mmalign's.

    Raises:
        MediaError: the file is missing or no media.
        ValueError: it has a record that is damaged.
    """
    path = Path(path)
    if not is_video(path):
        text = image_text(path).get(KEY)
        return None if text is None else _parsed(text, f"{path}: its text {KEY!r}")
    comment = clip_tags(path).get("comment", "")
    if comment.startswith(f'{{"{KEY}":'):  # anybody may have a comment
        return _parsed(comment, f"{path}: its comment")
    beside = sidecar(path)
    if not beside.is_file():
        return None
    if beside.stat().st_size > MAX_SIDECAR_BYTES:
        raise ValueError(f"{beside} is no record of how {path.name} was made: it has more than 1 MiB; move it away")
    found = _parsed(beside.read_text(encoding="utf-8", errors="replace"), str(beside), strict=False)
    return found if KEY in found else None


def _parsed(text: str, where: str, strict: bool = True) -> Record:
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({error}); ask for the file again, or draw it again") from None
    if not isinstance(found, dict) or (strict and KEY not in found):
        raise ValueError(f"{where} is no record that mmalign wrote; ask for the file again, or draw it again")
    return found


__all__ = [
    "KEY", "MediaError", "Record", "parameters", "read_provenance", "record", "sidecar", "write_clip", "write_picture",
]  # fmt: skip
