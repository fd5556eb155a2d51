"""Stores a shapes model in half precision: `python -m mmalign.shapes.pack runs/shapes-sd/export assets/shapes-sd`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor


def pack(source: Path, target: Path) -> None:
    """A pipeline's folder, or that of an image-text model with its processor."""
    local: dict[str, Any] = {"dtype": torch.float16, "local_files_only": True, "use_safetensors": True}
    if (source / "model_index.json").is_file():
        index = json.loads((source / "model_index.json").read_text())
        absent = {name: None for name, entry in index.items() if isinstance(entry, list) and not entry[0]}
        getattr(diffusers, index["_class_name"]).from_pretrained(source, **local, **absent).save_pretrained(target)
    else:
        AutoModelForImageTextToText.from_pretrained(source, **local).save_pretrained(target)
        AutoProcessor.from_pretrained(source, local_files_only=True).save_pretrained(target)
    for file in target.rglob("*.json"):  # where the weights lay before is nobody's business, and changes each time
        config = json.loads(file.read_text())
        if config.pop("_name_or_path", None):
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    pack(Path(sys.argv[1]), folder)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    print(f"{folder}: {size / 1e6:.1f} MB of safetensors")
